//! A node's load while machines leave it.

use keel_balance::Name;
use keel_balance::cost::{CostModel, Link};
use keel_balance::ledger::Outcome;
use keel_balance::load::{Capacity, Factors, MachineSample, NodeSample, Usage};
use keel_balance::policy::{Mode, Policy};
use keel_balance::round::{Balancer, Command, Constraints, Event, Peers, Request, Response, View};
use keel_balance::select::{Constraint, NodeState};

const CAPACITY: Capacity = Capacity {
    cores: 1.0,
    speed: 1.0,
    memory_bytes: 16 << 30,
    io_bytes_per_s: 1e9,
};

/// Peers at another site.
struct Far(&'static [&'static str]);

impl Constraints for Far {
    fn constraint(&self, _: &Name, _: &Name) -> Option<Constraint> {
        None
    }

    fn link(&self, peer: &Name) -> Link {
        match self.0.contains(&&**peer) {
            true => Link::measured(100.0, None),
            false => Link::NEAR,
        }
    }
}

/// A node with a number of CPU-bound machines, and its commands.
struct Node {
    balancer: Balancer,
    now_ms: u64,
    machines: Vec<Name>,
    far: &'static [&'static str],
    /// Memory of each machine.
    memory_bytes: u64,
    /// Commands not carried out yet.
    commands: Vec<Command>,
}

impl Node {
    fn new(machines: usize, peers: &[&str]) -> Self {
        let mut node = Node {
            balancer: Balancer::new(Policy::default(), 1, CostModel::default(), 7),
            now_ms: 1_000,
            machines: (0..machines).map(|it| format!("m{it}").into()).collect(),
            far: &[],
            memory_bytes: 1 << 20,
            commands: Vec::new(),
        };
        let peers: Vec<Name> = peers.iter().map(|peer| (*peer).into()).collect();
        node.step(Event::Peers(Peers::from(peers)));
        node
    }

    fn step(&mut self, event: Event) {
        let commands = self.balancer.step(event, self.now_ms, &Far(self.far));
        self.commands.extend(commands);
    }

    /// Peers that it sent requests to since the last call.
    fn asks(&mut self) -> Vec<Name> {
        let asks = std::mem::take(&mut self.commands).into_iter();
        let asks = asks.filter_map(|command| match command {
            Command::SendRequest { peer, .. } => Some(peer),
            _ => None,
        });
        asks.collect()
    }

    /// A second passes, after which the node is measured.
    fn sample(&mut self) {
        self.now_ms += 1_000;
        let factors = Factors {
            cpu_cores: 1.0,
            cpu_bound_cores: 1.0,
            memory_bytes: self.memory_bytes,
            ..Factors::default()
        };
        let machines = self.machines.iter().map(|name| MachineSample {
            name: name.clone(),
            factors,
            lasted_ms: 0,
            usage: Usage::default(),
        });
        let sample = NodeSample {
            capacity: CAPACITY,
            base: Factors::default(),
            machines: machines.collect(),
            cpu_pressure: 0.9,
            stall_pressure: 0.0,
        };
        self.step(Event::Sample(sample));
    }

    /// In cores, which make up almost all of the load.
    fn load(&self) -> f64 {
        let load = self.balancer.node_state().expect("it was measured").load;
        (load * 100.0).round() / 100.0
    }

    /// Lets idle peers answer one request, or advances by a second if there is none.
    fn go_on(&mut self) -> Option<Command> {
        if self.commands.is_empty() {
            self.sample();
            return None;
        }
        let command = self.commands.remove(0);
        if let Command::SendRequest { round, request, .. } = &command {
            let (round, response) = (*round, Some(response(request)));
            self.step(Event::ResponseReceived { round, response });
        }
        Some(command)
    }

    /// Lets idle peers answer requests until it moves a machine; returns the machine and the
    /// target.
    fn move_one(&mut self) -> (Name, Name) {
        for _ in 0..200 {
            if let Some(Command::Move { machine, target }) = self.go_on() {
                return (machine, target);
            }
        }
        panic!("it moves nothing");
    }

    fn gone(&mut self, machine: &Name) {
        self.machines.retain(|it| it != machine);
    }

    fn ended(&mut self, machine: &Name) {
        self.step(Event::MoveEnded {
            machine: machine.clone(),
            outcome: Outcome::Moved {
                duration_ms: 100.0,
                downtime_ms: 4.0,
                bytes: 1 << 20,
            },
        });
    }
}

/// Response of an idle node.
fn response(request: &Request) -> Response {
    match request {
        Request::View => Response::View(View {
            policy_revision: 1,
            state: NodeState {
                capacity: CAPACITY,
                load: 0.0,
                memory_free_bytes: 15 << 30,
                pressed: false,
                free: true,
            },
            loads: vec![0.0; 8],
            busy: false,
        }),
        Request::Weigh { factors, .. } => Response::Weights(vec![1.0; factors.len()]),
        Request::Reserve { .. } => Response::Granted,
        Request::Release { .. } => Response::Released,
    }
}

#[test]
fn what_left_is_taken_off_once_whoever_tells_first() {
    for store_first in [true, false] {
        let mut node = Node::new(6, &["b"]);
        let (machine, _) = node.move_one();
        assert_eq!(node.load(), 5.0);
        let left = Event::Departed {
            machine: machine.clone(),
        };
        if store_first {
            node.step(left);
            assert_eq!(node.load(), 5.0);
            node.gone(&machine);
            node.ended(&machine);
        } else {
            node.ended(&machine);
            // It was measured before the store's notification arrived.
            node.sample();
            assert_eq!(node.load(), 5.0);
            node.gone(&machine);
            node.step(left);
        }
        assert_eq!(node.load(), 5.0, "store first: {store_first}");
        for _ in 0..8 {
            node.sample();
            assert_eq!(node.load(), 5.0, "store first: {store_first}");
        }
    }
}

#[test]
fn a_move_that_failed_gives_its_load_back() {
    let mut node = Node::new(6, &["b"]);
    let (machine, _) = node.move_one();
    let outcome = Outcome::Stayed {
        why: "the connection was lost".into(),
    };
    node.step(Event::MoveEnded { machine, outcome });
    assert_eq!(node.load(), 6.0);
}

#[test]
fn the_next_move_need_not_wait_but_goes_elsewhere() {
    let mut node = Node::new(12, &["b", "c"]);
    let (first, one) = node.move_one();
    let (second, other) = node.move_one();
    assert_ne!(first, second);
    assert_ne!(one, other);
    assert_eq!(node.load(), 10.0);
    // Every peer has an incoming move: no request is sent until a move ends.
    node.asks();
    for _ in 0..20 {
        node.sample();
    }
    assert_eq!(node.asks(), [] as [Name; 0]);
    node.gone(&first);
    node.step(Event::Departed {
        machine: first.clone(),
    });
    node.ended(&first);
    assert_eq!(node.asks(), [one]);
}

#[test]
fn what_a_person_confirms_waits_for_its_target_and_is_not_forgotten() {
    let mut node = Node::new(12, &["b"]);
    let policy = Policy {
        mode: Mode::Confirm,
        ..Policy::default()
    };
    node.step(Event::Policy(Box::new(policy), 1));
    for _ in 0..200 {
        node.go_on();
        if !node.balancer.proposals(node.now_ms).is_empty() {
            break;
        }
    }
    let (machine, target) = node.balancer.proposals(node.now_ms)[0].clone();
    assert_eq!(&*target, "b");
    node.step(Event::Confirmed {
        machine: machine.clone(),
    });
    // A confirmation is effective in any round.
    let moved = node.move_one();
    assert_eq!(moved, (machine, target));
}

#[test]
fn where_no_move_can_begin_rounds_do_not_follow_at_once() {
    let mut node = Node::new(12, &["b", "c", "d", "e"]);
    let mut moves = 0;
    let begun_ms = node.now_ms;
    for _ in 0..10_000 {
        if node.now_ms >= begun_ms + 60_000 {
            break;
        }
        if let Some(Command::Move { machine, .. }) = node.go_on() {
            moves += 1;
            let outcome = Outcome::Capped;
            node.step(Event::MoveEnded { machine, outcome });
        }
    }
    assert!(node.now_ms >= begun_ms + 60_000, "{moves} in no time");
    assert!((20..=120).contains(&moves), "one or two a second: {moves}");
    // The subtracted load was restored each time.
    assert_eq!(node.load(), 12.0);
}

#[test]
fn what_went_by_itself_is_not_confirmed_any_more() {
    let mut node = Node::new(12, &["b", "c"]);
    let mode = |mode| Policy {
        mode,
        ..Policy::default()
    };
    node.step(Event::Policy(Box::new(mode(Mode::Confirm)), 1));
    for _ in 0..200 {
        node.go_on();
    }
    let proposed = node.balancer.proposals(node.now_ms);
    assert!(!proposed.is_empty());
    node.step(Event::Policy(Box::new(mode(Mode::Automatic)), 1));
    let (first, _) = node.move_one();
    let (second, _) = node.move_one();
    assert!(
        proposed
            .iter()
            .any(|(it, _)| [&first, &second].contains(&it))
    );
    for (machine, _) in proposed {
        node.step(Event::Confirmed { machine });
    }
    let mut others = Vec::new();
    for _ in 0..200 {
        if let Some(Command::Move { machine, .. }) = node.go_on() {
            others.push(machine);
        }
    }
    assert!(
        !others.contains(&first) && !others.contains(&second),
        "{others:?}"
    );
}

/// Lets a node begin rounds that end with a response; how often each of two peers was asked.
fn asked(node: &mut Node, response: &Response) -> (usize, usize) {
    let (mut near, mut far) = (0, 0);
    while near + far < 1000 {
        node.sample();
        for command in std::mem::take(&mut node.commands) {
            let Command::SendRequest { round, peer, .. } = command else {
                continue;
            };
            match node.far.contains(&&*peer) {
                true => far += 1,
                false => near += 1,
            }
            let response = Some(response.clone());
            node.step(Event::ResponseReceived { round, response });
        }
    }
    (near, far)
}

#[test]
fn far_peers_are_asked_seldom_until_near_ones_could_not_help() {
    let mut node = Node::new(6, &["near", "far"]);
    node.far = &["far"];
    let (near, far) = asked(&mut node, &Response::Busy);
    assert!(near > 10 * far && far > 0, "{near} near, {far} far");
    // As loaded as this node.
    let Response::View(mut view) = response(&Request::View) else {
        panic!("another response");
    };
    view.loads = vec![6.0; 8];
    view.state.load = 6.0;
    let (near, far) = asked(&mut node, &Response::View(view));
    assert!(near < 2 * far, "{near} near, {far} far");
}

/// A machine of 4 GiB would take minutes over 100 Mbit/s: its load must have lasted for longer.
#[test]
fn a_far_move_must_be_worth_its_time() {
    for (far, moves) in [(&["b"][..], false), (&[], true)] {
        let mut node = Node::new(6, &["b"]);
        node.far = far;
        node.memory_bytes = 4 << 30;
        let mut moved = false;
        while node.now_ms < 60_000 {
            moved |= matches!(node.go_on(), Some(Command::Move { .. }));
        }
        assert_eq!(moved, moves, "far: {far:?}");
        while !moved && node.now_ms < 3_000_000 {
            moved |= matches!(node.go_on(), Some(Command::Move { .. }));
        }
        assert!(moved);
    }
}
