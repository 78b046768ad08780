//! The simulation of the voters with a runtime that takes a seed, so that each seed repeats exactly.
//!
//! `tokio` has that only with `--cfg tokio_unstable`, for which everything is compiled once more, in
//! a folder of its own.

use crate::command::{cargo, check, root};
use anyhow::Result;

/// Runs `seeds` seeds from `first`, or shows the seed `only`, perhaps with a single kind of fault.
pub(crate) fn run(seeds: u64, first: u64, only: Option<u64>, fault: Option<String>) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut test = cargo();
    test.args(["test", "--release", "--package", "keel-store", "--lib"])
        .args(["--", "--nocapture", "raft::simulation"])
        .env("RUSTFLAGS", "--cfg tokio_unstable")
        .env("CARGO_TARGET_DIR", root().join("target/simulation"))
        .env("KEEL_SIM_SEEDS", seeds.to_string())
        .env("KEEL_SIM_FIRST", first.to_string())
        .env("KEEL_SIM_JOBS", jobs.to_string());
    if let Some(seed) = only {
        test.env("KEEL_SIM_SEED", seed.to_string());
    }
    if let Some(fault) = fault {
        test.env("KEEL_SIM_FAULT", fault);
    }
    check(&mut test)
}
