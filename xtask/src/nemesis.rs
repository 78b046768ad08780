//! Runs the nemesis for some minutes; see `keel_testkit::nemesis`. `--resume` continues an
//! interrupted run.

use crate::command::{cargo, check, provide, root};
use anyhow::{Context, Result};
use std::process::Command;

/// What the faults need, with their Debian packages.
const NEEDED: [(&str, &str); 3] = [
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("faketime", "faketime"),
];

pub(crate) fn run(minutes: u64, resume: bool, seed: Option<u64>, without: &[String]) -> Result<()> {
    if without.is_empty() {
        provide(&NEEDED)?;
    }
    check(cargo().args(["build", "--release", "--workspace"]))?;
    let built = root().join("target/release");
    let note = root().join("target/nemesis");
    let (done, last) = match resume {
        true => read(&note).context("there is no run to resume")?,
        false => (0.0, rand()),
    };
    let seed = seed.unwrap_or(last);
    println!("seed {seed}, {done:.1} of {minutes} minutes done");
    check(
        Command::new(built.join("nemesis"))
            .arg("--keel")
            .arg(built.join("keel"))
            .arg("--witness")
            .arg(root().join("guests/witness.wasm"))
            .arg("--note")
            .arg(&note)
            .args(["--minutes", &minutes.to_string()])
            .args(["--done", &done.to_string()])
            .args(["--seed", &seed.to_string()])
            .args(without.iter().flat_map(|it| ["--without", it])),
    )
}

/// Completed minutes, and a seed that they did not use.
fn read(note: &std::path::Path) -> Option<(f64, u64)> {
    let text = std::fs::read_to_string(note).ok()?;
    let (done, seed) = text.trim().split_once(' ')?;
    let seed: u64 = seed.parse().ok()?;
    Some((done.parse().ok()?, seed.wrapping_add(1)))
}

/// An arbitrary number: the time.
fn rand() -> u64 {
    std::time::UNIX_EPOCH
        .elapsed()
        .map_or(1, |time| time.as_nanos() as u64 % 1_000_000_007)
}
