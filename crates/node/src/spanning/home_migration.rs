//! Migrates the home of a machine: chooses its successor, and releases what a failed move leaves.

use super::commands::{MoveThreadCommand, SpanCommand};
use super::handle::{Spanning, UNSPAN_PATIENCE, ask, report, text};
use super::member::mark;
use super::membership::SpanningMachine;
use super::messages::ARRIVED_PART;
use super::parts::parts_report;
use super::remote_member::WorkerKind;
use crate::error::CommandError;
use crate::events::Note;
use crate::processes::{COMPILE_PATIENCE, OLDER, PROMPT, WorkerHandle};
use keel_api::{EventKind, SpanRequest};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_kind_wasm::control::{RemovePart, kind};
use keel_kind_wasm::span::PartId;
use keel_machine::spec::Record;
use keel_machine::worker::control::kind::END_CHECKPOINT;
use keel_machine::worker::control::{pack, unpack};
use keel_net::Fingerprint;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Attempts to restore a machine's parts after a move, and the pause between two: the machine may
/// still be arriving, or part of its memory may be missing.
const PLACEMENT_TRIES: u32 = 60;
const PLACEMENT_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Where a machine's parts and threads were before its home moved.
#[derive(Debug, Clone)]
pub(crate) struct Placement {
    /// The node of each part, its home's first.
    nodes: Vec<NodeName>,
    /// Threads that were not at the home, and their nodes.
    threads: Vec<(u32, NodeName)>,
}

/// The part that takes over the home.
pub(crate) struct Successor {
    /// Its number.
    pub(crate) part: PartId,
    /// The part that holds the home's threads during the migration.
    pub(crate) threads_to: PartId,
    /// Placement of parts and threads before the migration.
    pub(crate) before: Placement,
}

/// For a spanning machine, makes the target's worker one more part, which then takes over the
/// home. `None` for a machine on one node.
pub(crate) async fn successor(
    spanning: &Arc<Spanning>,
    record: &Record,
    worker: &WorkerHandle,
    target: &NodeName,
) -> Result<Option<Successor>, CommandError> {
    let found = report(worker).await?;
    if found.parts == 0 {
        return Ok(None);
    }
    // Waits for changes of its parts in progress.
    let _setting = spanning.processes.exclusion.changes.lock().await;
    let report = parts_report(worker).await?;
    let members = report
        .nodes
        .iter()
        .filter(|(part, _)| **part != PartId::HOME);
    let threads = |part: PartId| report.threads.iter().filter(|it| it.part == part).count();
    // Preferably their final place.
    let threads_to = members.min_by_key(|(part, node)| (*node != target, threads(**part)));
    let threads_to = threads_to.map(|(part, _)| *part);
    let threads_to =
        threads_to.ok_or_else(|| CommandError::Conflict("it has no other part".into()))?;
    let node = |part: &PartId| report.nodes.get(part).cloned();
    let away = report.threads.iter().filter(|it| it.part != PartId::HOME);
    let before = Placement {
        nodes: report.nodes.values().cloned().collect(),
        threads: away
            .filter_map(|thread| Some((thread.tid, node(&thread.part)?)))
            .collect(),
    };
    let program = found.program.map(Fingerprint);
    let parts = SpanningMachine {
        spanning,
        machine: &record.name,
        spec: &record.spec,
        worker,
        program: program.ok_or_else(|| CommandError::Conflict("it has no module".into()))?,
        epoch: record.epoch,
    };
    // A checkpoint in progress is ended: the move takes priority.
    let _: () = ask(worker, END_CHECKPOINT, &(), COMPILE_PATIENCE).await?;
    let (part, _) = parts.add(target, WorkerKind::Arriving).await?;
    Ok(Some(Successor {
        part,
        threads_to,
        before,
    }))
}

/// Removes the part that was to take over the home of a machine that stays here, also after the
/// death of the agent that made it. The machine does not need it, and it would stay a member for
/// ever.
pub(crate) async fn release_successors(spanning: &Arc<Spanning>, machine: &MachineName) {
    for _ in 0..PLACEMENT_TRIES {
        match try_release(spanning, machine).await {
            Ok(()) => return,
            Err(error) => tracing::debug!(%machine, %error, "cannot release the surplus part"),
        }
        tokio::time::sleep(PLACEMENT_AGAIN_AFTER).await;
    }
}

async fn try_release(spanning: &Arc<Spanning>, machine: &MachineName) -> Result<(), CommandError> {
    let Some(worker) = spanning.processes.machines.get(machine) else {
        return Ok(());
    };
    if spanning.processes.exclusion.is_moving(machine) {
        return Err(CommandError::Conflict("it is moving again".into()));
    }
    let nodes = parts_report(&worker).await?.nodes;
    let others: BTreeSet<&NodeName> = nodes
        .values()
        .filter(|it| **it != spanning.context.name)
        .collect();
    for node in others {
        let payload =
            pack(machine).map_err(|error| CommandError::Unavailable(error.to_string()))?;
        let peers = &spanning.context.peers;
        let answer = peers.call(node, ARRIVED_PART, payload, PROMPT);
        let part: Option<PartId> = match answer.await.map_err(text) {
            Ok(answer) => {
                unpack(&answer).map_err(|error| CommandError::Unavailable(error.to_string()))?
            }
            // Then there is no such part.
            Err(why) if why == OLDER => None,
            Err(why) => return Err(CommandError::Unavailable(why)),
        };
        let Some(part) = part.filter(|part| nodes.get(part) == Some(node)) else {
            continue;
        };
        let _setting = spanning.processes.exclusion.changes.lock().await;
        if spanning.processes.exclusion.is_moving(machine) {
            return Err(CommandError::Conflict("it is moving again".into()));
        }
        let with = RemovePart {
            part,
            threads_to: PartId::HOME,
        };
        let _: u64 = ask(&worker, kind::REMOVE_PART, &with, UNSPAN_PATIENCE).await?;
    }
    Ok(())
}

impl Placement {
    /// The nodes that are to have a part of the machine whose home moved, or failed to, and has
    /// run under `epoch` since. `None` if the machine ended, moved again or began anew: what was
    /// then decides.
    fn wanted(&self, epoch: Epoch, record: &Record) -> Option<Vec<NodeName>> {
        if record.status.ended() || record.epoch != epoch {
            return None;
        }
        // If the home moved to a node with a part, its old node gets one.
        let had_part = self.nodes.contains(&record.owner);
        Some(
            self.nodes
                .iter()
                .skip(usize::from(!had_part))
                .cloned()
                .collect(),
        )
    }
}

/// Restores the placement of a machine's parts after its home moved, or failed to move, in the
/// background; it has run under `epoch` since. The machine runs meanwhile; a failure is recorded as
/// an event.
pub(crate) fn restore_placement(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
    before: Placement,
    epoch: Epoch,
) {
    let (spanning, machine) = (spanning.clone(), machine.clone());
    tokio::spawn(async move {
        let mut last = String::new();
        for _ in 0..PLACEMENT_TRIES {
            match try_restore(&spanning, &machine, &before, epoch).await {
                Ok(()) => return,
                // It ended, moved again, or another operation made it span.
                Err(CommandError::NotFound(_)) => return,
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(PLACEMENT_AGAIN_AFTER).await;
        }
        let what = format!("its parts are not where they were before it moved: {last}");
        tracing::warn!(%machine, what, "spanning");
        spanning
            .context
            .events
            .record(Note::machine(EventKind::MachineSpans, &machine, what));
    });
}

/// Moves threads back to their nodes.
async fn send_back(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
    before: &Placement,
    nodes: &[String],
) {
    for (tid, node) in &before.threads {
        if !nodes.iter().any(|it| *it == node.as_str()) {
            continue;
        }
        let thread = MoveThreadCommand {
            machine: machine.clone(),
            tid: *tid,
            to: node.to_string(),
        };
        // The thread has ended in the meantime.
        if let Err(error) = spanning.move_thread(thread).await {
            tracing::debug!(%machine, tid, %error, "cannot move the thread back; it stays at the home");
        }
    }
}

async fn try_restore(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
    before: &Placement,
    epoch: Epoch,
) -> Result<(), CommandError> {
    let record = crate::records::get(&*spanning.context.store, machine)
        .await?
        .record;
    let nodes = before
        .wanted(epoch, &record)
        .ok_or_else(|| CommandError::NotFound("it has ended, or moved again".into()))?;
    let mut wanted = Vec::new();
    for node in nodes {
        if spanning
            .rules
            .cache
            .forbids(machine.as_str(), node.as_str())
            .is_none()
        {
            wanted.push(node.to_string());
        }
    }
    if wanted.iter().all(|node| *node == record.owner.as_str()) {
        return Err(CommandError::NotFound(
            "no other node may hold a part".into(),
        ));
    }
    let span = SpanCommand {
        machine: machine.clone(),
        request: SpanRequest {
            nodes: wanted.clone(),
            here: false,
        },
    };
    spanning.span(span).await?;
    send_back(spanning, machine, before, &wanted).await;
    Ok(())
}

/// Called when a machine runs here: informs the balancer if it spans, and releases the part that a
/// failed migration of its home left.
pub(crate) async fn machine_runs(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
    worker: &WorkerHandle,
) {
    if matches!(worker.report().await, Ok(report) if report.parts > 0) {
        mark(spanning, machine, worker);
        release_successors(spanning, machine).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::tests::record;
    use keel_machine::spec::Status;

    fn wanted(owner: &str, epoch: Epoch, of: Epoch) -> Option<Vec<String>> {
        let node = |name: &str| name.parse::<NodeName>().unwrap();
        let before = Placement {
            nodes: ["a", "b", "d"].map(node).to_vec(),
            threads: Vec::new(),
        };
        let mut record = record("m".parse().unwrap(), node(owner));
        record.epoch = of;
        let nodes = before.wanted(epoch, &record)?;
        Some(nodes.iter().map(NodeName::to_string).collect())
    }

    #[test]
    fn parts_stay_and_the_old_node_gets_one_for_one() {
        let epoch = Epoch::default().next();
        let at = |owner| wanted(owner, epoch, epoch).unwrap();
        assert_eq!(at("c"), ["b", "d"]);
        // One of these is the home: it is not counted by who gives parts.
        assert_eq!(at("b"), ["a", "b", "d"]);
        assert_eq!(at("a"), ["a", "b", "d"]);
    }

    #[test]
    fn a_machine_that_moved_again_is_left_alone() {
        let epoch = Epoch::default().next();
        assert_eq!(wanted("b", epoch, epoch.next()), None);
        let mut record = record("m".parse().unwrap(), "c".parse().unwrap());
        record.epoch = epoch;
        record.status = Status::Stopped;
        let before = Placement {
            nodes: vec!["a".parse().unwrap()],
            threads: Vec::new(),
        };
        assert_eq!(before.wanted(epoch, &record), None);
    }
}
