//! Exhaustive tests of small machines with a model checker: two and three parts, one and two pages,
//! the litmus tests of memory models (Alglave, Maranget and Tautschnig, "Herding Cats", 2014) with
//! their threads on different parts.

use crate::setup::{Action, InjectedBug, Op, Operation, Setup};
use crate::simulator::Simulator;
use stateright::{Checker, Model, Property};
use std::collections::BTreeSet;
use std::sync::Mutex;

/// Two pages.
const X: u32 = 0;
const Y: u32 = 1;

/// Values read by the threads, in order.
type Outcome = Vec<Vec<u64>>;

struct Machine {
    set: Setup,
    /// Maximum number of times that a page changes hands.
    grants_max: u32,
    outcomes: Mutex<BTreeSet<Outcome>>,
}

impl Model for Machine {
    type State = Simulator;
    type Action = Action;

    fn init_states(&self) -> Vec<Simulator> {
        vec![Simulator::new(&self.set)]
    }

    fn actions(&self, state: &Simulator, actions: &mut Vec<Action>) {
        if state.wrong.is_none() {
            state.actions(actions);
        }
    }

    fn next_state(&self, last: &Simulator, action: Action) -> Option<Simulator> {
        let mut next = last.clone();
        next.act(action);
        if next.is_done() {
            let outcome = next.threads.iter().map(|thread| thread.seen.clone());
            self.outcomes.lock().unwrap().insert(outcome.collect());
        }
        Some(next)
    }

    /// Bounds the state space: a page may alternate forever while no thread runs.
    fn within_boundary(&self, state: &Simulator) -> bool {
        state.grants.iter().all(|grants| *grants <= self.grants_max)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always("right", |_, state: &Simulator| {
            state.wrong.is_none()
        })]
    }
}

/// Explores all states; returns the possible outcomes, or the violation.
fn explore(name: &str, set: Setup) -> Result<BTreeSet<Outcome>, String> {
    let needed = |page: u32| {
        let ops = set.threads.iter().flat_map(|(_, ops)| ops);
        let those = ops.filter(|op| op.needs().iter().any(|(it, _)| *it == page));
        those.count() as u32
    };
    let machine = Machine {
        // All states that are needed, and some others.
        grants_max: (0..set.pages).map(needed).max().unwrap_or(0) + 2,
        set,
        outcomes: Mutex::default(),
    };
    let checker = machine.checker().threads(2).spawn_bfs().join();
    println!("{name}: {} states", checker.unique_state_count());
    match checker.discovery("right") {
        Some(path) => {
            let last = path.last_state().wrong.clone().unwrap_or_default();
            Err(format!("{name}: {last}, by {:?}", path.into_actions()))
        }
        None => Ok(checker.model().outcomes.lock().unwrap().clone()),
    }
}

fn all(name: &str, set: Setup) -> BTreeSet<Outcome> {
    let outcomes = explore(name, set).unwrap_or_else(|wrong| panic!("{wrong}"));
    assert!(!outcomes.is_empty(), "{name}: no thread ends");
    outcomes
}

fn set(parts: usize, pages: u32, threads: &[(usize, &[Op])]) -> Setup {
    Setup {
        parts,
        pages,
        threads: threads
            .iter()
            .map(|(part, ops)| (*part, ops.to_vec()))
            .collect(),
        ..Setup::default()
    }
}

#[test]
fn two_parts_and_a_page() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Add(X), Op::Read(X), Op::Add(X)]),
        (1, &[Op::Add(X), Op::Add(X), Op::Read(X)]),
        (1, &[Op::Read(X), Op::Add(X)]),
    ];
    let set = Setup {
        drops: true,
        ..set(2, 1, threads)
    };
    for outcome in all("two parts, one page", set) {
        // No addition is lost: the last thread sees at least its own.
        assert!(outcome[0][0] >= 1 && outcome[1][0] >= 2, "{outcome:?}");
    }
}

#[test]
fn three_parts_and_a_page() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Add(X), Op::Read(X)]),
        (1, &[Op::Add(X), Op::Read(X)]),
        (2, &[Op::Read(X), Op::Add(X)]),
    ];
    let set = Setup {
        drops: true,
        ..set(3, 1, threads)
    };
    let outcomes = all("three parts, one page", set);
    // Each of the three can be first, and last.
    assert!(outcomes.contains(&vec![vec![1], vec![2], vec![2]]));
    assert!(outcomes.contains(&vec![vec![3], vec![2], vec![0]]));
}

/// The protocol needs no message order, not even on one connection.
#[test]
fn without_any_order() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Write(X, 1), Op::Read(Y)]),
        (1, &[Op::Write(Y, 1), Op::Read(X)]),
        (1, &[Op::Add(X)]),
    ];
    let unordered = Setup {
        unordered: true,
        ..set(2, 2, threads)
    };
    all("two pages, unordered", unordered);
    let threads: &[(usize, &[Op])] = &[(1, &[Op::Add(X)]), (2, &[Op::Read(X)])];
    let unordered = Setup {
        unordered: true,
        operations: vec![
            Operation::MoveDirectory(0, 1),
            Operation::MoveDirectory(0, 2),
        ],
        ..set(3, 1, threads)
    };
    all("directories, unordered", unordered);
}

#[test]
fn store_buffering() {
    let threads: &[(usize, &[Op])] = &[
        (1, &[Op::Write(X, 1), Op::Read(Y)]),
        (2, &[Op::Write(Y, 1), Op::Read(X)]),
    ];
    let outcomes = all("store buffering", set(3, 2, threads));
    assert!(!outcomes.contains(&vec![vec![0], vec![0]]));
    assert_eq!(outcomes.len(), 3);
}

#[test]
fn message_passing() {
    let threads: &[(usize, &[Op])] = &[
        (1, &[Op::Write(X, 1), Op::Write(Y, 1)]),
        (2, &[Op::Read(Y), Op::Read(X)]),
    ];
    let outcomes = all("message passing", set(3, 2, threads));
    assert!(!outcomes.contains(&vec![vec![], vec![1, 0]]));
    assert_eq!(outcomes.len(), 3);
}

#[test]
fn load_buffering() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Read(X), Op::Write(Y, 1)]),
        (1, &[Op::Read(Y), Op::Write(X, 1)]),
    ];
    let outcomes = all("load buffering", set(2, 2, threads));
    assert!(!outcomes.contains(&vec![vec![1], vec![1]]));
    assert_eq!(outcomes.len(), 3);
}

#[test]
fn independent_reads_of_independent_writes() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Write(X, 1)]),
        (1, &[Op::Write(Y, 1)]),
        (1, &[Op::Read(X), Op::Read(Y)]),
        (0, &[Op::Read(Y), Op::Read(X)]),
    ];
    let outcomes = all("IRIW", set(2, 2, threads));
    let forbidden = vec![vec![], vec![], vec![1, 0], vec![1, 0]];
    assert!(!outcomes.contains(&forbidden));
    // All other outcomes are possible.
    assert_eq!(outcomes.len(), 15);
}

#[test]
fn two_pages_at_once() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Write(X, 1), Op::Swap(X, Y)]),
        (1, &[Op::Swap(Y, X)]),
    ];
    for hold_micros in [0, 1] {
        let set = Setup {
            hold_micros,
            ..set(2, 2, threads)
        };
        all(&format!("two pages at once, held {hold_micros}"), set);
    }
}

#[test]
fn held_and_pinned_pages() {
    let threads: &[(usize, &[Op])] = &[(0, &[Op::Add(X)]), (1, &[Op::Add(X)]), (2, &[Op::Read(X)])];
    let held = Setup {
        hold_micros: 1,
        ..set(3, 1, threads)
    };
    all("held", held.clone());
    let pinned = Setup {
        hold_micros: 0,
        pins: 2,
        ..held
    };
    all("pinned", pinned);
}

#[test]
fn pages_and_directories_that_move() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Add(X)]),
        (1, &[Op::Add(X)]),
        (2, &[Op::Read(X), Op::Add(X)]),
    ];
    for operations in [
        vec![Operation::Move(0, X, 1), Operation::Move(2, X, 2)],
        vec![
            Operation::MoveDirectory(0, 1),
            Operation::MoveDirectory(0, 2),
        ],
        vec![
            Operation::MoveDirectory(0, 1),
            Operation::MoveDirectory(0, 0),
        ],
        vec![Operation::MoveDirectory(0, 2), Operation::Move(1, X, 1)],
        vec![Operation::MoveDirectory(0, 1), Operation::Gather],
    ] {
        let name = format!("{operations:?}");
        let set = Setup {
            operations,
            ..set(3, 1, threads)
        };
        all(&name, set);
    }
}

/// Both pages move in one run, while threads use them.
#[test]
fn pages_that_move_in_rows() {
    let two: &[(usize, &[Op])] = &[
        (0, &[Op::Add(X), Op::Add(Y)]),
        (1, &[Op::Read(Y), Op::Add(X)]),
    ];
    let three: &[(usize, &[Op])] = &[(0, &[Op::Add(Y)]), (1, &[Op::Add(X)]), (2, &[Op::Read(X)])];
    for (threads, operations) in [
        (two, vec![Operation::MoveRun(0, X, 1)]),
        (
            two,
            vec![Operation::MoveRun(0, X, 1), Operation::MoveRun(1, X, 0)],
        ),
        (
            two,
            vec![Operation::MoveRun(0, X, 1), Operation::MoveDirectory(1, 1)],
        ),
        (three, vec![Operation::MoveRun(0, X, 2)]),
        (
            &three[..2],
            vec![Operation::MoveRun(0, X, 2), Operation::MoveRun(1, X, 1)],
        ),
    ] {
        let name = format!("{} threads, {operations:?}", threads.len());
        let parts = 1 + operations
            .iter()
            .fold(1, |most, operation| match operation {
                Operation::MoveRun(_, _, to) => most.max(*to),
                _ => most,
            });
        let set = Setup {
            operations,
            ..set(parts, 2, threads)
        };
        all(&name, set.clone());
        all(
            &name,
            Setup {
                merges: true,
                ..set
            },
        );
    }
}

#[test]
fn a_part_that_leaves() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Add(X), Op::Read(X)]),
        (1, &[Op::Add(X), Op::Read(X)]),
        (2, &[Op::Add(X), Op::Read(X)]),
    ];
    for operations in [
        vec![Operation::Evacuate(1, 0)],
        vec![Operation::Evacuate(1, 2), Operation::Move(0, X, 2)],
        // Requested before the part left, and received after it.
        vec![Operation::Evacuate(1, 0), Operation::Move(2, X, 1)],
        vec![Operation::Evacuate(1, 0), Operation::MoveDirectory(0, 2)],
    ] {
        let name = format!("{operations:?}");
        let set = Setup {
            operations,
            ..set(3, 1, threads)
        };
        all(&name, set);
    }
}

/// A part is evacuated, leaves, and a new one takes its number, while the others run.
#[test]
fn a_part_that_leaves_and_one_that_comes() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Add(X)]),
        (1, &[Op::Add(X)]),
        (2, &[Op::Read(X), Op::Add(X)]),
    ];
    for (parts, operations) in [
        (2, vec![Operation::Evacuate(1, 0)]),
        (2, vec![Operation::Evacuate(1, 0), Operation::Move(0, X, 1)]),
        (3, vec![Operation::Evacuate(1, 2)]),
        // The target is about to leave, or is a new part by then.
        (3, vec![Operation::Evacuate(1, 0), Operation::Move(2, X, 1)]),
        // The leaving part was a directory.
        (
            2,
            vec![
                Operation::MoveDirectory(0, 1),
                Operation::Gather,
                Operation::Evacuate(1, 0),
            ],
        ),
    ] {
        let name = format!("{operations:?}");
        let set = Setup {
            operations,
            returns: Some(vec![Op::Add(X)]),
            ..set(parts, 1, &threads[..parts])
        };
        all(&name, set);
    }
}

/// A part that was a directory leaves, while requests to it may be in flight.
#[test]
fn a_directory_that_leaves() {
    let threads: &[(usize, &[Op])] = &[(0, &[Op::Add(X)]), (2, &[Op::Add(X)])];
    let set = Setup {
        operations: vec![
            Operation::MoveDirectory(0, 1),
            Operation::Gather,
            Operation::Evacuate(1, 2),
        ],
        returns: Some(vec![Op::Read(X)]),
        ..set(3, 1, threads)
    };
    all("a directory that leaves", set);
}

/// The home gives up its pages, another part takes its place, and a new one joins.
#[test]
fn the_home_moves() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Add(X)]),
        (1, &[Op::Add(X), Op::Read(X)]),
        (2, &[Op::Read(X), Op::Add(X)]),
    ];
    for (parts, operations) in [
        (2, vec![Operation::Move(0, X, 1), Operation::MigrateHome(1)]),
        (
            2,
            vec![Operation::MoveRun(0, X, 1), Operation::MigrateHome(1)],
        ),
        (3, vec![Operation::Move(0, X, 2), Operation::MigrateHome(1)]),
        (
            3,
            vec![
                Operation::Move(0, X, 1),
                Operation::MigrateHome(1),
                Operation::Move(2, X, 1),
                Operation::MigrateHome(2),
            ],
        ),
        (
            2,
            vec![
                Operation::MoveDirectory(0, 1),
                Operation::Gather,
                Operation::Move(0, X, 1),
                Operation::MigrateHome(1),
            ],
        ),
    ] {
        let name = format!("{operations:?}");
        let set = Setup {
            operations,
            drops: parts == 2,
            ..set(parts, 1, &threads[..parts])
        };
        all(&name, set);
    }
}

/// After the loss of a part the others never read a stale value, and report no protocol error,
/// until the machine is ended.
#[test]
fn a_part_that_is_lost() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Add(X), Op::Read(X)]),
        (1, &[Op::Add(X)]),
        (2, &[Op::Read(X), Op::Add(X)]),
    ];
    for part in 0..3 {
        let set = Setup {
            operations: vec![Operation::Lose(part)],
            drops: true,
            ..set(3, 1, threads)
        };
        all(&format!("part {part} is lost"), set);
    }
}

/// The checks detect injected bugs.
#[test]
fn what_is_spoilt_is_found() {
    let threads: &[(usize, &[Op])] = &[
        (0, &[Op::Write(X, 1), Op::Read(Y)]),
        (1, &[Op::Read(X), Op::Add(X), Op::Add(Y)]),
    ];
    for bug in [
        InjectedBug::SkipProtect,
        InjectedBug::SkipDiscard,
        InjectedBug::SkipWake,
    ] {
        let set = Setup {
            bug,
            ..set(2, 2, threads)
        };
        let found = explore(&format!("{bug:?}"), set);
        assert!(found.is_err(), "{bug:?}: {found:?}");
    }
}
