//! The voters in simulation: everything of this engine, `openraft` included, with simulated time,
//! network and disks, under faults that a seed chooses.
//!
//! Each seed begins a store of one voter, which becomes one of three or five while it is used, and
//! then ends processes, fails power (of one computer or of all), lets computers or what serves their
//! clients stand still, cuts links (both ways, or one), loses and delays messages, fills disks and
//! replaces voters. What
//! must hold, from DESIGN.md:
//!
//! 1. All calls are linearizable.
//! 2. What was acknowledged is in every voter's copy at the end, and all copies are equal.
//! 3. Watches see each change once, in order, also across voters.
//! 4. At most one voter serves in a term.
//! 5. A machine that is taken over from a node whose lease ended does not run there any more.
//! 6. No voter stops by itself unless its disk was full, or it led and another voter was about to
//!    take over (`scenario::DEPOSED`).
//! 7. When the faults stop, the store answers within [`SETTLE`].
//!
//! `KEEL_SIM_SEEDS=N` sets the number of seeds, `KEEL_SIM_FIRST=N` the first one,
//! `KEEL_SIM_JOBS=N` how many run at a time; `KEEL_SIM_SEED=N` shows one of them, with
//! `KEEL_SIM_FAULT=NAME` as the only fault. The order in which tasks of one instant run is drawn by
//! the runtime, which takes a seed only if it is compiled with `--cfg tokio_unstable`:
//! `cargo xtask simulate-voters` does that. Otherwise another run of a seed differs in details.

mod clients;
mod disk;
mod far_apart;
mod faults;
#[path = "../../../tests/linearizability/mod.rs"]
mod linearizability;
mod numbers;
mod owners;
mod scenario;
mod service_pauses;
mod unconfirmed;
mod world;

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use faults::{FAULTS, Fault};
use scenario::{Run, run};

/// Seeds of the usual tests.
const SEEDS: u64 = 150;
/// Seeds of all faults for one of each fault by itself.
const SEEDS_FOR_ONE: u64 = 15;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs one seed on a clock of its own.
fn on_own_clock<T>(seed: u64, run: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true);
    #[cfg(tokio_unstable)]
    builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()));
    #[cfg(not(tokio_unstable))]
    let _ = seed;
    let runtime = builder.build().map_err(|error| error.to_string())?;
    let running = AssertUnwindSafe(|| runtime.block_on(run));
    let done = std::panic::catch_unwind(running);
    done.unwrap_or_else(|_| Err("it panicked".into()))
}

fn all_faults() -> Vec<Fault> {
    FAULTS.iter().map(|(_, fault)| *fault).collect()
}

fn simulate(seed: u64, faults: &[Fault], prints: bool) -> Result<Run, String> {
    on_own_clock(seed, run(seed, faults, prints))
}

#[test]
fn whatever_fails_the_store_keeps_its_promises() {
    if let Some(seed) = setting("KEEL_SIM_SEED") {
        let faults = match std::env::var("KEEL_SIM_FAULT") {
            Ok(name) => {
                let found = FAULTS.iter().find(|(its, _)| *its == name);
                vec![found.unwrap_or_else(|| panic!("no fault {name:?}")).1]
            }
            Err(_) => all_faults(),
        };
        let done = simulate(seed, &faults, true);
        println!("{done:?}");
        assert!(done.is_ok(), "seed {seed} fails");
        return;
    }
    let first = setting("KEEL_SIM_FIRST").unwrap_or(0);
    let seeds = setting("KEEL_SIM_SEEDS").unwrap_or(SEEDS);
    let all = simulate_all(first..first + seeds, &all_faults(), None);
    println!("{seeds} seeds: {all:?}");
    // Otherwise the checks above had nothing to check.
    if seeds >= SEEDS {
        assert!(all.has_everything(), "too few of something: {all:?}");
    }
}

/// The same for each fault alone, again and again: what one undoes another one may hide.
#[test]
fn each_fault_by_itself() {
    if setting("KEEL_SIM_SEED").is_some() {
        return;
    }
    let first = setting("KEEL_SIM_FIRST").unwrap_or(0);
    let seeds = setting("KEEL_SIM_SEEDS").unwrap_or(SEEDS) / SEEDS_FOR_ONE;
    println!(
        "{:<18} seeds  times  calls  unanswered  terms  take-overs",
        "fault"
    );
    for (name, fault) in FAULTS {
        let all = simulate_all(first..first + seeds, &[fault], Some(name));
        let times = all.faults.get(&fault).copied().unwrap_or(0);
        println!(
            "{name:<18} {seeds:>5} {times:>6} {:>6} {:>11} {:>6} {:>11}",
            all.calls, all.unanswered, all.terms, all.take_overs
        );
        assert!(all.faults.len() <= 1, "{name}: {:?}", all.faults);
        assert!(times > 0 || seeds < SEEDS / SEEDS_FOR_ONE, "{name}");
    }
}

/// Runs these seeds; the first failure ends all. `fault` is the name of the only one.
fn simulate_all(seeds: Range<u64>, faults: &[Fault], fault: Option<&str>) -> Run {
    let jobs = setting("KEEL_SIM_JOBS").unwrap_or(1);
    let (next, all) = (AtomicU64::new(seeds.start), Mutex::new(Run::default()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            match simulate(seed, faults, false) {
                Ok(run) => all.lock().unwrap().add(&run),
                Err(reason) => {
                    next.store(seeds.end, Ordering::Relaxed);
                    panic!("seed {seed}: {reason}\n{}", repeat(seed, fault));
                }
            }
            if (seed + 1 - seeds.start).is_multiple_of(5_000) {
                println!("{} seeds", seed + 1 - seeds.start);
            }
        }
    };
    std::thread::scope(|scope| (0..jobs).for_each(|_| drop(scope.spawn(work))));
    all.into_inner().unwrap()
}

fn repeat(seed: u64, fault: Option<&str>) -> String {
    if cfg!(tokio_unstable) {
        let only = fault.map_or_else(String::new, |fault| format!(" --fault {fault}"));
        return format!("cargo xtask simulate-voters --seed {seed}{only}");
    }
    let only = fault.map_or_else(String::new, |fault| format!(" KEEL_SIM_FAULT={fault}"));
    format!(
        "KEEL_SIM_SEED={seed}{only} cargo test -p keel-store --lib simulation -- --nocapture \
         (details differ from run to run; `cargo xtask simulate-voters` finds seeds that \
         repeat exactly)"
    )
}

/// Without it, `--seed` would not show what failed.
#[cfg(tokio_unstable)]
#[test]
fn a_seed_repeats_exactly() {
    for seed in 0..20 {
        let runs = [(); 2].map(|()| simulate(seed, &all_faults(), false));
        let [first, second] = runs.map(|run| run.map(|run| run.trace).unwrap_or_default());
        assert!(!first.is_empty());
        assert_eq!(first, second, "seed {seed}");
    }
}
