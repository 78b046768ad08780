//! Mutants of the store's voters: when they serve, what they put on disk before they say so, and
//! when leases end.

use super::{Mutant, Subject};

/// The voters, their unit tests and their simulation.
pub(super) const VOTERS: Subject = Subject {
    package: "keel-store",
    tests: &[("voters", &["--package", "keel-store", "--lib", "raft"])],
    seeds: "4000",
    mutants: MUTANTS,
};

macro_rules! mutant {
    ($name:literal, $file:literal, $text:literal, $becomes:literal) => {
        Mutant {
            name: concat!("voters: ", $name),
            file: concat!("crates/store/src/raft/", $file),
            text: $text,
            at: 0,
            becomes: $becomes,
        }
    };
}

const MUTANTS: &[Mutant] = &[
    mutant!(
        "reads without a quorum",
        "leader.rs",
        "        if self.is_sole_voter() {\n            return Ok(());\n        }\n        let (done",
        "        if true {\n            return Ok(());\n        }\n        let (done"
    ),
    mutant!(
        "serve unconfirmed",
        "leader.rs",
        "if self.confirm().await.is_ok() {\n            self.deadlines",
        "if self.confirm().await.is_ok() || true {\n            self.deadlines"
    ),
    mutant!(
        "committed before its own disk",
        "network.rs",
        "self.flushes.reached(last).await.map_err(unreachable)?;",
        "let _ = last;"
    ),
    mutant!(
        "alone and before its disk",
        "log.rs",
        "leads && !groups.iter().all(is_enough)",
        "leads || groups.iter().all(is_enough)"
    ),
    mutant!(
        "restarted and leads on",
        "log.rs",
        "vote.committed &= vote.leader_id.node_id != id;",
        "let _ = id;\n    vote.committed &= true;"
    ),
    mutant!(
        "leases from an older term",
        "leader.rs",
        "self.deadlines.begin_to_serve(term);",
        ""
    ),
    mutant!(
        "renewal without a quorum",
        "mod.rs",
        "            // A leader that was replaced must not extend leases.\n            leader.renewal_barrier().await?;",
        ""
    ),
    mutant!(
        "get without a quorum",
        "mod.rs",
        "            model::check_key(key)?;\n            self.tasks.leader.barrier().await?;",
        "            model::check_key(key)?;"
    ),
    mutant!(
        "renewal of what ended",
        "deadlines.rs",
        "let deadline = deadline.filter(|it| !it.is_ending)?;",
        "let deadline = deadline?;"
    ),
    mutant!(
        "end in the log forgotten",
        "deadlines.rs",
        "deadline.is_ending &= !is_new;",
        "deadline.is_ending = false;\n            let _ = is_new;"
    ),
    mutant!(
        "pause not given to leases",
        "deadlines.rs",
        "> PAUSE {",
        "> Duration::MAX {"
    ),
    mutant!(
        "lease ends early",
        "deadlines.rs",
        "!self.is_ending && self.at <= served",
        "!self.is_ending && self.at <= served + self.ttl / 2"
    ),
    mutant!(
        "end before what came is read",
        "lease_ends.rs",
        "if !service.turn().await {",
        "if false {"
    ),
    mutant!(
        "end before renewals are confirmed",
        "deadlines.rs",
        " && self.unconfirmed == 0",
        ""
    ),
    mutant!(
        "a renewal counted for ever",
        "deadlines.rs",
        "deadline.unconfirmed = deadline.unconfirmed.saturating_sub(1);",
        ""
    ),
    mutant!(
        "leases not in a snapshot",
        "snapshot.rs",
        "model.leases.insert(LeaseId(id), held);",
        "let _ = (id, held);"
    ),
    mutant!(
        "lease numbers begin anew",
        "snapshot.rs",
        "        lease_next: content.lease_next,\n",
        ""
    ),
    mutant!(
        "nothing is synced",
        "log.rs",
        "redb::Durability::Immediate",
        "redb::Durability::None"
    ),
    mutant!(
        "vote not written",
        "log.rs",
        "meta.insert(name, value.as_slice())?;",
        "let _ = (name, value);"
    ),
    mutant!(
        "vote told before written",
        "log.rs",
        "self.write(|done| Write::Meta(\"vote\", bytes, done)).await",
        "drop(tokio::spawn({\n            let log = self.clone();\n            async move { log.write(|done| Write::Meta(\"vote\", bytes, done)).await }\n        }));\n        Ok(())"
    ),
    mutant!(
        "entries sent after a gap",
        "log.rs",
        "*index != expected || (bytes",
        "(*index != expected && false) || (bytes"
    ),
    mutant!(
        "entries of another leader sent",
        "log.rs",
        "match state.truncations == self.truncations {",
        "match true {"
    ),
    mutant!(
        "truncation not written",
        "log.rs",
        "Write::Truncate(from, _) => entries.retain_in(*from.., |_, _| false)?,",
        "Write::Truncate(..) => {}"
    ),
    mutant!(
        "purge before the snapshot",
        "log.rs",
        "        let saved = self.saved.wait_for(|it| it.has_failed || has_it(it)).await;\n        if !saved.is_ok_and(|saved| has_it(&saved)) {",
        "        if false && has_it(&self.saved.borrow()) {"
    ),
    mutant!(
        "purge not recorded",
        "log.rs",
        "meta.insert(\"purged\", value.as_slice())?;",
        "let _ = value;"
    ),
    mutant!(
        "older snapshot kept as newer",
        "snapshot.rs",
        "        if self.saved.borrow().last > last {\n            return Ok(());\n        }\n",
        ""
    ),
    mutant!(
        "snapshot's entry forgotten",
        "state_machine.rs",
        "        self.applied = meta.last_log_id;\n        self.membership = meta",
        "        self.membership = meta"
    ),
    mutant!(
        "view of before the snapshot",
        "state_machine.rs",
        "        self.view\n            .replace(self.model.revision, self.model.entries.clone());\n",
        ""
    ),
    mutant!(
        "number of a former voter",
        "mod.rs",
        "Ok((last + 2).max(highest + 1))",
        "{ let _ = last; Ok(highest + 1) }"
    ),
];
