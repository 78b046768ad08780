//! Mutants of the commit rule: each comparison of it, and each write that it makes, in turn.

use super::{Mutant, Subject};

const FILE: &str = "crates/machine/src/moves/ownership.rs";

/// The commit rule, its comparisons and its simulation.
pub(super) const OWNERSHIP: Subject = Subject {
    package: "keel-machine",
    tests: &[
        ("comparisons", &["--workspace", "--test", "ownership"]),
        (
            "simulation",
            &[
                "--workspace",
                "--test",
                "move_simulation",
                "one_copy_runs_and_the_record_names_it",
            ],
        ),
    ],
    seeds: "40000",
    mutants: MUTANTS,
};

/// A mutant of the file.
const fn mutant(
    name: &'static str,
    text: &'static str,
    at: usize,
    becomes: &'static str,
) -> Mutant {
    Mutant {
        name,
        file: FILE,
        text,
        at,
        becomes,
    }
}

const MUTANTS: &[Mutant] = &[
    mutant(
        "commit: record's revision",
        ".when_modified_at(self.record_key(), self.revision)",
        0,
        "",
    ),
    mutant(
        "commit: source's entry",
        ".when(exists(self.entry(&self.source)))",
        0,
        "",
    ),
    mutant(
        "commit: reservation",
        ".when(exists(reservation.clone()))",
        0,
        "",
    ),
    mutant(
        "commit: source alive",
        ".when(exists(Key::Alive(self.source.clone())))",
        0,
        "",
    ),
    mutant(
        "commit: target alive",
        ".when(exists(Key::Alive(self.target.clone())))",
        0,
        "",
    ),
    mutant(
        "commit: source's entry stays",
        ".delete(self.entry(&self.source))",
        0,
        "",
    ),
    mutant("commit: reservation stays", ".delete(reservation))", 0, ")"),
    mutant(
        "commit: same epoch",
        "record.epoch = self.committed;",
        0,
        "",
    ),
    mutant(
        "settle: any owner",
        "record.owner == self.source && !record.status.ended();",
        0,
        "!record.status.ended();",
    ),
    mutant(
        "settle: ended, too",
        "record.owner == self.source && !record.status.ended();",
        0,
        "record.owner == self.source;",
    ),
    mutant(
        "settle: any epoch",
        "is_ours && record.epoch == self.epoch {",
        0,
        "is_ours {",
    ),
    mutant(
        "settle: unconditional write",
        ".when_modified_at(self.record_key(), *revision)",
        0,
        "",
    ),
    mutant(
        "settle: same epoch",
        "record.epoch = record.next_epoch();",
        0,
        "",
    ),
    mutant(
        "kept: any epoch",
        "is_ours && record.epoch.follows(self.epoch) && record.status",
        0,
        "is_ours && record.status",
    ),
    mutant(
        "kept: restarting, too",
        "record.epoch.follows(self.epoch) && record.status == Status::Running {",
        0,
        "record.epoch.follows(self.epoch) {",
    ),
    mutant(
        "won: any owner",
        "record.owner == self.target && record.epoch == self.committed",
        0,
        "record.epoch == self.committed",
    ),
    mutant(
        "won: any epoch",
        "record.owner == self.target && record.epoch == self.committed",
        0,
        "record.owner == self.target",
    ),
    mutant(
        "won: ended, too",
        "record.epoch == self.committed && !record.status.ended()",
        0,
        "record.epoch == self.committed",
    ),
    mutant(
        "back: any owner kept",
        "record.owner == self.source && record.epoch.follows(self.committed)",
        0,
        "record.epoch.follows(self.committed)",
    ),
    mutant(
        "back: any epoch kept",
        "record.owner == self.source && record.epoch.follows(self.committed)",
        0,
        "record.owner == self.source",
    ),
    mutant(
        "back: running there, too",
        "self.has_won(record) && record.status == Status::Arriving { from }",
        0,
        "{ let _ = from; self.has_won(record) }",
    ),
    mutant(
        "back: any commit",
        "self.has_won(record) && record.status == Status::Arriving { from }",
        0,
        "record.status == Status::Arriving { from }",
    ),
    mutant(
        "back: unconditional write",
        ".when_modified_at(self.record_key(), *revision)",
        1,
        "",
    ),
    mutant(
        "back: target's entry stays",
        ".delete(self.entry(&self.target))",
        0,
        "",
    ),
    mutant(
        "back: no entry",
        ".put(self.entry(&self.source), Vec::new());",
        0,
        ";",
    ),
    mutant(
        "may_resume: any owner",
        "record.owner == *node && record.epoch.follows(offered) && arrives",
        0,
        "record.epoch.follows(offered) && arrives",
    ),
    mutant(
        "may_resume: any epoch",
        "record.owner == *node && record.epoch.follows(offered) && arrives",
        0,
        "record.owner == *node && arrives",
    ),
    mutant(
        "may_resume: newer epoch",
        "record.epoch.follows(offered) && arrives",
        0,
        "record.epoch > offered && arrives",
    ),
    mutant(
        "may_resume: whatever status",
        "record.epoch.follows(offered) && arrives {",
        0,
        "record.epoch.follows(offered) && (arrives || true) {",
    ),
    mutant(
        "may_resume: undecided for ever",
        "record.epoch == offered && !record.status.ended()",
        0,
        "true || record.epoch == offered",
    ),
    mutant(
        "running: any owner",
        "record.owner != *node || record.epoch != epoch",
        0,
        "record.epoch != epoch",
    ),
    mutant(
        "running: any epoch",
        "record.owner != *node || record.epoch != epoch",
        0,
        "record.owner != *node",
    ),
    mutant(
        "end: any owner",
        "record.owner != *node || record.status.ended()",
        0,
        "record.status.ended()",
    ),
    mutant(
        "end: ended, too",
        "record.owner != *node || record.status.ended()",
        0,
        "record.owner != *node",
    ),
    mutant(
        "end: any epoch",
        "if record.epoch != epoch {",
        0,
        "if false {",
    ),
    mutant(
        "end: no repetition",
        "restarting && record.epoch.follows(epoch)",
        0,
        "false && restarting",
    ),
    mutant(
        "end: same epoch",
        "    record.epoch = record.next_epoch();\n    record.restarts",
        0,
        "    record.restarts",
    ),
    mutant(
        "epochs: no creation",
        "true => created_at(written, entry.created),",
        0,
        "true => written,",
    ),
    mutant(
        "epochs: base never raised",
        "EpochBase(self.0.max(least))",
        0,
        "{ let _ = least; self }",
    ),
    mutant(
        "back: from a node with a lease",
        "txn = txn.when_absent(Key::Alive(self.target.clone()));",
        0,
        "",
    ),
    mutant(
        "failover: a life that ended",
        "            from_checkpoint,\n            elsewhere: true,",
        0,
        "            from_checkpoint: true,\n            elsewhere: true,",
    ),
    mutant(
        "failover: record's revision",
        ".when_modified_at(key.clone(), found.revision)\n        .when_absent",
        0,
        ".when_absent",
    ),
    mutant(
        "failover: lease of the node",
        ".when_absent(Key::Alive(failed.clone()))",
        0,
        "",
    ),
    mutant(
        "failover: target alive",
        "            key: Key::Alive(target.clone()).to_string(),",
        0,
        "            key: Key::Alive(failed.clone()).to_string(),",
    ),
    mutant(
        "failover: entry stays",
        ".delete(Key::Schedule(failed.clone(), machine.clone()))",
        0,
        "",
    ),
    mutant(
        "failover: same epoch",
        "record.epoch = found.record.next_epoch().next();",
        0,
        "",
    ),
    mutant(
        "failover: epoch of a commit",
        "found.record.next_epoch().next();",
        0,
        "found.record.next_epoch();",
    ),
    mutant(
        "failover: ended, too",
        "record.status.ended() || record.spec.ha.is_none()",
        0,
        "record.spec.ha.is_none()",
    ),
    mutant(
        "failover: arriving, too",
        "&& holds_copy(from)",
        0,
        "&& false && holds_copy(from)",
    ),
    mutant(
        "again: what runs, too",
        "    if !record.status.ended() {\n        return Ok(None);\n    }\n    record.epoch",
        0,
        "    record.epoch",
    ),
    mutant(
        "again: its last epoch",
        "    record.epoch = record.next_epoch();\n    record.restarts = 0;",
        0,
        "    record.restarts = 0;",
    ),
    mutant(
        "again: unconditional write",
        "        .when_modified_at(key.clone(), found.revision)\n        .when(Compare",
        0,
        "        .when(Compare",
    ),
    mutant(
        "again: a node that is gone",
        "            key: Key::Alive(node.clone()).to_string(),",
        0,
        "            key: Key::Node(node.clone()).to_string(),",
    ),
];
