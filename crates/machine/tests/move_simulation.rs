//! Deterministic simulation of both sides of a move, their agents, users and the store:
//! messages are lost, late and repeated; transactions whose answer was lost are applied
//! at once, later or never; workers and agents die and restart; the store begins anew, from a
//! copy that has all or from a backup; users change and remove the machine, create it again, and
//! start it again after its end.
//!
//! The state machines of both sides and the commit rule
//! ([`keel_machine::moves::ownership`]) are the real ones. The store, the workers'
//! processes and the agents are modelled after the rules of the design, not after the
//! code:
//!
//! A machine with high availability runs only while its worker has a deadline. The worker
//! loses it before the store ends the lease, and gets another one only after its agent read
//! the store under a newer lease.
//!
//! 1. At most one copy of the machine runs, and the store's record names it: its owner is
//!    the copy's node, the machine has not ended, and the copy belongs to the record's
//!    creation.
//! 2. A copy that starts to run has an epoch newer than every epoch under which another
//!    process of that name ever ran, whatever was removed and created in between.
//! 3. An acknowledged change stays in the record until the machine is removed.
//! 4. The record counts no more restarts than there were deaths.
//! 5. Pages that the target of a post-copy move lacks stay at the source until the target
//!    has them, unless the source's process is killed.
//! 6. Once the faults stop, the machine runs, or it has ended or was removed and no
//!    process of it is left; it has ended only if a process of it was killed.
//!
//! A failing seed is printed; `KEEL_SIM_SEED=N` repeats it with a trace,
//! `KEEL_SIM_SEEDS=N` sets the number of seeds.

#[path = "common/record.rs"]
mod record;
#[path = "move_simulation/store.rs"]
mod store;
#[path = "move_simulation/world.rs"]
mod world;

use std::ops::Range;
use world::{CALM_STEPS, Defect, End, FAULTY_STEPS, World};

/// Seeds of the usual suite; the long test tries those up to [`MANY_SEEDS`].
const SEEDS: u64 = 12_500;
const MANY_SEEDS: u64 = 200_000;

fn run(seed: u64, defect: Defect, trace: bool) -> End {
    let mut world = World::new(seed, defect, trace);
    for _ in 0..FAULTY_STEPS {
        world.step();
    }
    world.stop_faults();
    for _ in 0..CALM_STEPS {
        if let Some(end) = world.end() {
            return end;
        }
        world.step();
    }
    panic!("it does not terminate: {world:?}");
}

#[test]
fn one_copy_runs_and_the_record_names_it() {
    if let Some(seed) = setting("KEEL_SIM_SEED") {
        println!("{:?}", run(seed, Defect::None, true));
        return;
    }
    try_seeds(0..setting("KEEL_SIM_SEEDS").unwrap_or(SEEDS));
}

#[test]
fn one_copy_runs_on_many_more_seeds() {
    try_seeds(SEEDS..MANY_SEEDS);
}

fn try_seeds(seeds: Range<u64>) {
    let mut ends = Vec::new();
    for seed in seeds.clone() {
        let result = std::panic::catch_unwind(|| run(seed, Defect::None, false));
        let Ok(end) = result else {
            panic!(
                "seed {seed}: KEEL_SIM_SEED={seed} cargo test --release -p keel-machine --test move_simulation"
            );
        };
        ends.push(end);
    }
    // Every outcome occurred often.
    let tried = seeds.end - seeds.start;
    for end in End::ALL {
        let count = ends.iter().filter(|was| **was == end).count() as u64;
        println!("{end:?}: {count} of {tried}");
        assert!(count * 2000 >= tried, "{end:?}: {count} of {tried}");
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The first seed that reveals a defect.
fn seed_that_finds(defect: Defect) -> Option<u64> {
    // Panics are expected here.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found =
        (0..100_000).find(|seed| std::panic::catch_unwind(|| run(*seed, defect, false)).is_err());
    std::panic::set_hook(hook);
    found
}

/// The simulation detects the violation of each of these rules. A single test, because
/// the panic hook belongs to the whole process.
#[test]
fn broken_rules_are_found() {
    for defect in Defect::ALL {
        let found = seed_that_finds(defect);
        println!("{defect:?}: seed {found:?}");
        assert!(found.is_some(), "{defect:?} is not found");
    }
}
