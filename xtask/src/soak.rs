//! Repeated runs of guests with threads as several parts of one process, with threads moved
//! between the parts and machines captured at random, and busy processes beside them: the output
//! must equal that of the plain modules.
//!
//! Each run has the next guest, another number of parts, another rate and another seed than the
//! one before; all its options are printed if the output differs.

use crate::command::{self, Finished, root};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Guests, each with arguments for about a second as three parts. Guests whose output depends on
/// time are excluded.
const GUESTS: [(&str, &[&str]); 9] = [
    ("stencil", &["4", "34", "40", "2"]),
    ("stencil", &["3", "130", "12", "2"]),
    ("threads", &["4", "300"]),
    ("render", &["4", "64", "48", "2"]),
    ("pipeline", &["4", "60"]),
    ("store", &["4", "2000"]),
    ("matrix", &["4", "96", "2"]),
    ("mapreduce", &["4", "1", "2"]),
    ("ep", &["4", "17", "2"]),
];
/// Captures or moves a second; 0 is never.
const RATES: [u32; 4] = [0, 20, 200, 1000];
/// Numbers of parts.
const PARTS: [u32; 3] = [2, 3, 4];
/// Time limit of one run. With ten times as many busy processes as processors, a run of one second
/// has taken two minutes.
const LIMIT: Duration = Duration::from_secs(1200);

/// The task and its limits.
pub(crate) struct Soak {
    /// Minutes after which no run starts; without them runs are counted.
    pub(crate) minutes: Option<u64>,
    /// Number of runs.
    pub(crate) runs: u64,
    /// Number of busy processes beside them.
    pub(crate) busy: u32,
    /// Only guests whose name contains this.
    pub(crate) only: Option<String>,
    /// An existing `keel` binary.
    pub(crate) keel: Option<PathBuf>,
    /// Seed of the runs.
    pub(crate) seed: u64,
}

/// Processes that are killed on drop.
struct Busy(Vec<Child>);

impl Busy {
    fn start(keel: &Path, count: u32) -> Result<Self> {
        let mut busy = Busy(Vec::new());
        for _ in 0..count {
            let mut command = Command::new(keel);
            command.args(["wasm", "--plain"]).arg(module("spinner"));
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            busy.0.push(command.spawn().context("a busy process")?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn module(guest: &str) -> PathBuf {
    root().join("guests").join(guest).with_extension("wasm")
}

fn run(keel: &Path, options: &[String], guest: &str, args: &[&str]) -> Result<Finished> {
    let mut command = Command::new(keel);
    command
        .arg("wasm")
        .args(options)
        .arg(module(guest))
        .args(args);
    command::finish(&mut command, LIMIT)
}

/// Options of a run: parts, rate and seed change with its number.
fn options(number: u64, guests: u64, seed: u64) -> Vec<String> {
    // Each guest gets each number of parts and each rate in time.
    let turn = number / guests;
    let parts = PARTS[(turn % PARTS.len() as u64) as usize];
    let rate = RATES[(turn / PARTS.len() as u64 % RATES.len() as u64) as usize];
    let mut options = vec!["--parts".to_owned(), parts.to_string()];
    if rate > 0 {
        options.extend(["--shake".to_owned(), rate.to_string()]);
        let seed = seed.wrapping_add(number);
        options.extend(["--seed".to_owned(), seed.to_string()]);
    }
    options
}

/// The difference of a run from the plain one, if any.
fn difference(plain: &Finished, finished: &Result<Finished>) -> Option<String> {
    match finished {
        Err(error) => Some(format!("{error:#}")),
        Ok(finished) if finished.code != plain.code => Some(format!(
            "exit {:?} instead of {:?}: {}",
            finished.code, plain.code, finished.stderr
        )),
        Ok(finished) if finished.stdout != plain.stdout => Some(format!(
            "it printed\n{}instead of\n{}",
            String::from_utf8_lossy(&finished.stdout),
            String::from_utf8_lossy(&plain.stdout)
        )),
        Ok(_) => None,
    }
}

pub(crate) fn soak(what: &Soak) -> Result<()> {
    let keel = match &what.keel {
        Some(keel) => keel.clone(),
        None => command::keel()?,
    };
    let is_wanted = |guest: &str| what.only.as_ref().is_none_or(|only| guest.contains(only));
    let mut guests = Vec::new();
    for (guest, args) in GUESTS {
        if is_wanted(guest) {
            let plain = run(&keel, &["--plain".to_owned()], guest, args)?;
            ensure!(plain.code == Some(0), "{guest}: {}", plain.stderr);
            guests.push((guest, args, plain));
        }
    }
    ensure!(!guests.is_empty(), "no guest has that name");
    let _busy = Busy::start(&keel, what.busy)?;
    let end = what
        .minutes
        .map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let (mut number, mut failed) = (0_u64, 0_u64);
    while match end {
        Some(end) => Instant::now() < end,
        None => number < what.runs,
    } {
        let (guest, args, plain) = &guests[(number % guests.len() as u64) as usize];
        let options = options(number, guests.len() as u64, what.seed);
        let finished = run(&keel, &options, guest, args);
        if let Some(how) = difference(plain, &finished) {
            failed += 1;
            let (options, args) = (options.join(" "), args.join(" "));
            println!("run {number}: keel wasm {options} {guest}.wasm {args}: {how}");
        }
        number += 1;
        if number.is_multiple_of(100) {
            println!("{} passed, {failed} failed", number - failed);
        }
    }
    println!("{} passed, {failed} failed", number - failed);
    ensure!(failed == 0, "{failed} of {number} runs differ");
    Ok(())
}
