//! Checks of a change: lints, the usual tests, and as many long tests as fit into ten
//! minutes, those that it may affect first.

use crate::command::{cargo, check, guest_agent, has, root};
use crate::suite::{self, LONG};
use crate::{imports, licences, mutants, pages};
use anyhow::Result;
use std::process::Command;
use std::time::{Duration, Instant};

/// Time after which no further group of long tests begins, with the time to compile the tests: a
/// change of many crates affects all groups, and all of CI has an hour. On a fresh computer one
/// group runs.
const LONG_MAX: Duration = Duration::from_secs(10 * 60);
/// Environment variable with the base commit of a change.
const BASE: &str = "KEEL_CI_BASE";
/// Default base: this number of commits back.
const COMMITS: u32 = 10;

/// Formatter, imports, names in pages, lints, documentation, licences.
pub(crate) fn lint() -> Result<()> {
    check(cargo().args(["fmt", "--all", "--check"]))?;
    imports::check(&root())?;
    pages::check(&root())?;
    mutants::check(&root())?;
    check(
        cargo()
            .args(["clippy", "--release", "--workspace", "--all-targets"])
            .args(["--", "-D", "warnings"]),
    )?;
    check(
        cargo()
            .args(["doc", "--release", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    match has("cargo-deny") {
        true => check(cargo().args(["deny", "check", "licenses", "bans", "sources"])),
        false => licences::check(),
    }
}

/// All that `.ci/run` runs.
pub(crate) fn run() -> Result<()> {
    lint()?;
    guest_agent()?;
    // Long tests first, so that the summary of the usual ones is at the end.
    check(Command::new(std::env::current_exe()?).arg("long-tests"))?;
    suite::run(&[], false)
}

/// Runs long tests while there is time: the groups whose crates changed, then others, each in
/// rotation.
pub(crate) fn long_tests() -> Result<()> {
    let changed = changed_crates();
    let is_affected = |group: &suite::Group| {
        let mut crates = group.crates.iter();
        crates.any(|name| changed.iter().any(|it| it == name))
    };
    let first = first_of(LONG.len());
    let mut groups: Vec<&suite::Group> = LONG[first..].iter().chain(&LONG[..first]).collect();
    // A stable sort: each kind stays in rotation.
    groups.sort_by_key(|group| !is_affected(group));
    let (mut skipped, mut ran) = (Vec::new(), Vec::new());
    let begun = Instant::now();
    for group in groups {
        if begun.elapsed() > LONG_MAX {
            skipped.push(group.name);
            continue;
        }
        suite::run_group(group)?;
        ran.push(group.name);
    }
    println!("long tests that ran: {}", ran.join(", "));
    println!("long tests left for another turn: {}", skipped.join(", "));
    Ok(())
}

/// The index of the first group by this commit's rotation.
fn first_of(count: usize) -> usize {
    let hash = git(&["rev-parse", "HEAD"]).unwrap_or_default();
    let digits = hash.get(..7).unwrap_or_default();
    let number = usize::from_str_radix(digits, 16).unwrap_or(0);
    number % count.max(1)
}

/// Changed crates, by their folders; all if the changes are not known.
fn changed_crates() -> Vec<String> {
    let base = std::env::var(BASE).unwrap_or_else(|_| format!("HEAD~{COMMITS}"));
    let Some(files) = git(&["diff", "--name-only", &base, "HEAD"]) else {
        let crates = LONG.iter().flat_map(|group| group.crates);
        return crates.map(ToString::to_string).collect();
    };
    let folders = files.lines().filter_map(|file| {
        let rest = file.strip_prefix("crates/")?;
        Some(rest.split('/').next()?.to_owned())
    });
    folders.collect()
}

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .args(args)
        .current_dir(root())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
