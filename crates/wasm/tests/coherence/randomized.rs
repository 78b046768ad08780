//! Larger machines, in random orders. A failing seed is printed; to run it alone:

use crate::setup::{Action, InjectedBug, Op, Operation, Setup};
use crate::simulator::Simulator;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

const SEEDS: u64 = 40_000;
/// Upper bound of the steps of a run.
const STEPS_MAX: usize = 200_000;

fn draw(rng: &mut SmallRng, seed: u64) -> Setup {
    let (parts, pages) = (rng.random_range(2..=5), rng.random_range(1..=6u32));
    let page = |rng: &mut SmallRng| rng.random_range(0..pages);
    let threads = (0..rng.random_range(1..=6))
        .map(|_| {
            let ops = (0..rng.random_range(1..=20))
                .map(|_| match rng.random_range(0..10) {
                    0..4 => Op::Read(page(rng)),
                    4..6 => Op::Write(page(rng), rng.random_range(0..1000)),
                    6..9 => Op::Add(page(rng)),
                    _ if pages > 1 => {
                        let one = page(rng);
                        Op::Swap(one, (one + 1) % pages)
                    }
                    _ => Op::Add(0),
                })
                .collect();
            (rng.random_range(0..parts), ops)
        })
        .collect();
    let segment_pages = rng.random_range(1..=3);
    let mut operations: Vec<Operation> = (0..rng.random_range(0..8))
        .map(|_| match rng.random_range(0..4) {
            0 => Operation::Move(
                rng.random_range(0..parts),
                page(rng),
                rng.random_range(0..parts),
            ),
            1 => Operation::MoveRun(
                rng.random_range(0..parts),
                page(rng),
                rng.random_range(0..parts),
            ),
            _ => Operation::MoveDirectory(page(rng) / segment_pages, rng.random_range(0..parts)),
        })
        .collect();
    // A leaving part is evacuated by the home, which is the directory of all pages then.
    let mut returns = None;
    if rng.random_bool(0.3) {
        match rng.random_bool(0.5) {
            true => operations.extend([Operation::Gather; 2]),
            false => operations.retain(|operation| {
                matches!(operation, Operation::Move(..) | Operation::MoveRun(..))
            }),
        }
        let leaves = rng.random_range(1..parts);
        operations.push(Operation::Evacuate(leaves, (leaves + 1) % parts));
        if rng.random_bool(0.7) {
            let ops = (0..rng.random_range(0..=9)).map(|_| match rng.random_bool(0.5) {
                true => Op::Read(page(rng)),
                false => Op::Add(page(rng)),
            });
            returns = Some(ops.collect());
        }
    }
    if returns.is_none() && rng.random_bool(0.2) {
        match rng.random_bool(0.5) {
            true => operations.extend([Operation::Gather; 3]),
            false => operations.retain(|operation| {
                matches!(operation, Operation::Move(..) | Operation::MoveRun(..))
            }),
        }
        for _ in 0..rng.random_range(1..=3) {
            match rng.random_bool(0.5) {
                true => operations.push(Operation::MoveRun(0, 0, rng.random_range(1..parts))),
                false => {
                    let moves =
                        (0..pages).map(|page| Operation::Move(0, page, rng.random_range(1..parts)));
                    operations.extend(moves.collect::<Vec<_>>());
                }
            }
            operations.push(Operation::MigrateHome(rng.random_range(1..parts)));
        }
    } else if returns.is_none() && rng.random_bool(0.1) {
        operations.push(Operation::Lose(rng.random_range(0..parts)));
    }
    Setup {
        returns,
        parts,
        pages,
        threads,
        operations,
        // Two pages are only available together if each is held for a moment.
        hold_micros: rng.random_range(1..50),
        segment_pages,
        drops: rng.random_bool(0.5),
        pins: rng.random_range(0..10),
        unordered: rng.random_bool(0.5),
        merges: rng.random_bool(0.5),
        bug: InjectedBug::None,
        seed,
    }
}

/// Runs to the end; returns the number of steps, whether a part left, or the home migrated after a
/// directory had moved, and whether pages arrived in runs.
fn run(seed: u64) -> Result<(usize, [bool; 3]), String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut simulator = Simulator::new(&draw(&mut rng, seed));
    // Some runs prefer threads over messages, some the reverse.
    let eager = rng.random_range(1..20);
    let mut actions = Vec::new();
    for step in 0..STEPS_MAX {
        actions.clear();
        simulator.actions(&mut actions);
        let idle = |action: &Action| matches!(action, Action::Drop(..) | Action::Pin(..));
        if actions.iter().all(idle) {
            return Ok((
                step,
                [simulator.went, simulator.succeeded, simulator.rows > 0],
            ));
        }
        let weight = |action: &Action| match action {
            Action::Run(_) => eager,
            Action::Deliver { .. } | Action::Unpin(..) => 10,
            Action::Tick(_) => 3,
            Action::Drop(..) | Action::Pin(..) | Action::Perform(_) => 1,
        };
        let action = actions.choose_weighted(&mut rng, weight);
        simulator.act(*action.map_err(|error| error.to_string())?);
        if let Some(wrong) = simulator.wrong {
            return Err(format!("after {step} steps: {wrong}"));
        }
    }
    Err(format!("no end after {STEPS_MAX} steps"))
}

#[test]
fn seeds() {
    let seeds = match std::env::var("EVENKEEL_SEED").map(|seed| seed.parse()) {
        Ok(Ok(seed)) => seed..seed + 1,
        _ => 0..SEEDS,
    };
    let mut longest = 0;
    let mut after = [0; 3];
    for seed in seeds.clone() {
        match run(seed) {
            Ok((steps, did)) => {
                longest = longest.max(steps);
                (0..3).for_each(|at| after[at] += u32::from(did[at]));
            }
            Err(wrong) => panic!("seed {seed}: {wrong}"),
        }
    }
    println!("the longest took {longest} steps; after directories moved, and rows: {after:?}");
    assert!(
        seeds.count() == 1 || after.iter().all(|count| *count > 100),
        "{after:?}"
    );
}
