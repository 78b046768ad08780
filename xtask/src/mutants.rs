//! Mutants of the commit rule: each comparison of `moves/ownership.rs` is changed in turn, and the
//! tests of the rule must fail for each. A comparison whose change no test detects is not tested.
//!
//! The file is changed in place and restored, so that the rest is compiled once.

use crate::command::cargo;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::Path;
use std::process::Stdio;

const FILE: &str = "crates/machine/src/moves/ownership.rs";
/// Seeds of the simulation for each mutant.
const SEEDS: &str = "40000";

/// Without optimisation, because the crate is compiled for each mutant, which takes longer than the seeds.
const QUICK_BUILD: &str = "profile.release.package.keel-machine.opt-level=1";

/// The mutants: name, text, the occurrence of the text (from 0), replacement.
const MUTANTS: &[(&str, &str, usize, &str)] = &[
    (
        "commit: record's revision",
        ".when_modified_at(self.record_key(), self.revision)",
        0,
        "",
    ),
    (
        "commit: source's entry",
        ".when(exists(self.entry(&self.source)))",
        0,
        "",
    ),
    (
        "commit: reservation",
        ".when(exists(reservation.clone()))",
        0,
        "",
    ),
    (
        "commit: source alive",
        ".when(exists(Key::Alive(self.source.clone())))",
        0,
        "",
    ),
    (
        "commit: target alive",
        ".when(exists(Key::Alive(self.target.clone())))",
        0,
        "",
    ),
    (
        "commit: source's entry stays",
        ".delete(self.entry(&self.source))",
        0,
        "",
    ),
    ("commit: reservation stays", ".delete(reservation))", 0, ")"),
    (
        "commit: same epoch",
        "record.epoch = self.committed_epoch();",
        0,
        "",
    ),
    (
        "settle: any owner",
        "record.owner == self.source && !record.status.ended();",
        0,
        "!record.status.ended();",
    ),
    (
        "settle: ended, too",
        "record.owner == self.source && !record.status.ended();",
        0,
        "record.owner == self.source;",
    ),
    (
        "settle: any epoch",
        "is_ours && record.epoch == self.epoch {",
        0,
        "is_ours {",
    ),
    (
        "settle: unconditional write",
        ".when_modified_at(self.record_key(), *revision)",
        0,
        "",
    ),
    ("settle: same epoch", "record.epoch = kept;", 0, ""),
    (
        "kept: any epoch",
        "is_ours && record.epoch == kept && record.status",
        0,
        "is_ours && record.status",
    ),
    (
        "kept: restarting, too",
        "record.epoch == kept && record.status == Status::Running {",
        0,
        "record.epoch == kept {",
    ),
    (
        "won: any owner",
        "record.owner == self.target\n            && record.epoch",
        0,
        "record.epoch",
    ),
    (
        "won: any epoch",
        "&& record.epoch == self.committed_epoch()\n",
        0,
        "\n",
    ),
    (
        "won: ended, too",
        "record.epoch == self.committed_epoch()\n            && !record.status.ended()",
        0,
        "record.epoch == self.committed_epoch()",
    ),
    (
        "back: any owner kept",
        "record.owner == self.source && record.epoch == back",
        0,
        "record.epoch == back",
    ),
    (
        "back: any epoch kept",
        "&& record.epoch == back && record.status == Status::Running",
        0,
        "&& record.status == Status::Running",
    ),
    (
        "back: running there, too",
        "self.has_won(record) && record.status == Status::Arriving { from }",
        0,
        "{ let _ = from; self.has_won(record) }",
    ),
    (
        "back: any commit",
        "self.has_won(record) && record.status == Status::Arriving { from }",
        0,
        "record.status == Status::Arriving { from }",
    ),
    (
        "back: unconditional write",
        ".when_modified_at(self.record_key(), *revision)",
        1,
        "",
    ),
    (
        "back: target's entry stays",
        ".delete(self.entry(&self.target))",
        0,
        "",
    ),
    (
        "back: no entry",
        ".put(self.entry(&self.source), Vec::new());",
        0,
        ";",
    ),
    (
        "may_resume: any owner",
        "record.owner == *node && record.epoch == offered.next() && arrives",
        0,
        "record.epoch == offered.next() && arrives",
    ),
    (
        "may_resume: any epoch",
        "record.owner == *node && record.epoch == offered.next() && arrives",
        0,
        "record.owner == *node && arrives",
    ),
    (
        "may_resume: newer epoch",
        "record.epoch == offered.next() && arrives",
        0,
        "record.epoch > offered && arrives",
    ),
    (
        "may_resume: whatever status",
        "record.epoch == offered.next() && arrives {",
        0,
        "record.epoch == offered.next() && (arrives || true) {",
    ),
    (
        "may_resume: undecided for ever",
        "record.epoch == offered && !record.status.ended()",
        0,
        "true || record.epoch == offered",
    ),
    (
        "running: any owner",
        "record.owner != *node || record.epoch != epoch",
        0,
        "record.epoch != epoch",
    ),
    (
        "running: any epoch",
        "record.owner != *node || record.epoch != epoch",
        0,
        "record.owner != *node",
    ),
    (
        "end: any owner",
        "record.owner != *node || record.status.ended()",
        0,
        "record.status.ended()",
    ),
    (
        "end: ended, too",
        "record.owner != *node || record.status.ended()",
        0,
        "record.owner != *node",
    ),
    (
        "end: any epoch",
        "if record.epoch != epoch {",
        0,
        "if false {",
    ),
    (
        "end: no repetition",
        "restarting && record.epoch == epoch.next()",
        0,
        "false && restarting",
    ),
    (
        "end: same epoch",
        "    record.epoch = record.epoch.next();\n    record.restarts",
        0,
        "    record.restarts",
    ),
    (
        "epochs: no creation",
        "true => created_at(written, entry.created),",
        0,
        "true => written,",
    ),
    (
        "epochs: base never raised",
        "EpochBase(self.0.max(least))",
        0,
        "{ let _ = least; self }",
    ),
    (
        "back: from a node with a lease",
        "txn = txn.when_absent(Key::Alive(self.target.clone()));",
        0,
        "",
    ),
    (
        "failover: a life that ended",
        "            from_checkpoint,\n            elsewhere: true,",
        0,
        "            from_checkpoint: true,\n            elsewhere: true,",
    ),
    (
        "failover: record's revision",
        ".when_modified_at(key.clone(), found.revision)",
        0,
        "",
    ),
    (
        "failover: lease of the node",
        ".when_absent(Key::Alive(failed.clone()))",
        0,
        "",
    ),
    (
        "failover: target alive",
        "            key: Key::Alive(target.clone()).to_string(),",
        0,
        "            key: Key::Alive(failed.clone()).to_string(),",
    ),
    (
        "failover: entry stays",
        ".delete(Key::Schedule(failed.clone(), machine.clone()))",
        0,
        "",
    ),
    (
        "failover: same epoch",
        "record.epoch = found.record.epoch.next().next();",
        0,
        "",
    ),
    (
        "failover: epoch of a commit",
        "found.record.epoch.next().next();",
        0,
        "found.record.epoch.next();",
    ),
    (
        "failover: ended, too",
        "record.status.ended() || record.spec.ha.is_none()",
        0,
        "record.spec.ha.is_none()",
    ),
    (
        "failover: arriving, too",
        "&& holds_copy(from)",
        0,
        "&& false && holds_copy(from)",
    ),
];

/// Restores the file at the end of the run, also after a panic.
struct Original(String);

impl Drop for Original {
    fn drop(&mut self) {
        if let Err(error) = fs::write(FILE, &self.0) {
            eprintln!("{FILE} could not be restored ({error}): `git checkout {FILE}`");
        }
    }
}

/// Runs all mutants, or those whose name contains `only`.
pub(crate) fn run(only: Option<&str>) -> Result<()> {
    ensure!(Path::new(FILE).exists(), "run it in the workspace's folder");
    let original = Original(fs::read_to_string(FILE)?);
    let mut survivors = Vec::new();
    let chosen = |name: &str| only.is_none_or(|part| name.contains(part));
    for (name, text, at, becomes) in MUTANTS.iter().filter(|it| chosen(it.0)) {
        let (from, _) = original
            .0
            .match_indices(text)
            .nth(*at)
            .with_context(|| format!("{name}: {text:?} is not in {FILE} any more"))?;
        let mut mutant = original.0.clone();
        mutant.replace_range(from..from + text.len(), becomes);
        fs::write(FILE, mutant)?;
        let caught = caught_by()?;
        println!("{name:<32} {}", caught.as_deref().unwrap_or("SURVIVES"));
        if caught.is_none() {
            survivors.push(*name);
        }
    }
    ensure!(survivors.is_empty(), "not caught: {}", survivors.join(", "));
    Ok(())
}

/// The tests that fail; `None` if all pass.
fn caught_by() -> Result<Option<String>> {
    let mut failed = Vec::new();
    for (what, args) in [
        ("comparisons", &["--test", "ownership"][..]),
        ("simulation", &["--test", "move_simulation", "one_copy"]),
    ] {
        let mut test = cargo();
        test.args(["--config", QUICK_BUILD])
            .args(["test", "--release", "--workspace"])
            .args(args)
            .env("KEEL_SIM_SEEDS", SEEDS)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = test.output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        if said.contains("running 0 tests") && !said.contains("running 1") {
            bail!("{what}: no test ran");
        }
        let said_of_build = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() && said_of_build.contains("could not compile") {
            bail!("a mutant does not compile:\n{said_of_build}");
        }
        if !output.status.success() {
            failed.push(what);
        }
    }
    Ok((!failed.is_empty()).then(|| failed.join(", ")))
}
