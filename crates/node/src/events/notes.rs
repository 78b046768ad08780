//! Texts of events about machines' lives and moves.

use super::Note;
use crate::error::CommandError;
use keel_api::{CheckpointInfo, EventKind};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::checkpoint::Origin;
use keel_machine::moves::{Ending, MoveReport};
use keel_machine::spec::{Record, Status};

impl Note {
    /// The checkpoint that a machine is created from, as text.
    pub(crate) fn origin(origin: &Origin) -> String {
        let (machine, repository) = (&origin.machine, &origin.repository);
        match &origin.id {
            Some(id) => format!("checkpoint {id} of {machine} in {repository}"),
            None => format!("the newest checkpoint of {machine} in {repository}"),
        }
    }

    /// A machine's record, after its status changed from `before`.
    pub(crate) fn status(record: &Record, before: &Status) -> Note {
        let owner = &record.owner;
        let (kind, text) = match (&record.status, before) {
            (Status::Scheduled, _) => (
                EventKind::MachineScheduled,
                match &record.origin {
                    None => format!("is to run on {owner}"),
                    Some(origin) => {
                        format!(
                            "is to run on {owner}, created from {}",
                            Note::origin(origin)
                        )
                    }
                },
            ),
            (Status::Running, Status::Arriving { from }) => (
                EventKind::MachineArrived,
                format!("runs on {owner}, arrived from {from}"),
            ),
            (Status::Running, Status::Filling { from }) => (
                EventKind::MachineFilled,
                format!("has all of its memory on {owner}, and none on {from} any more"),
            ),
            (Status::Filling { from }, _) => (
                EventKind::MachineArrived,
                format!(
                    "runs on {owner}, arrived from {from}; part of its memory has still to arrive"
                ),
            ),
            (Status::Running, _) => (EventKind::MachineStarted, format!("runs on {owner}")),
            (Status::Arriving { from }, _) => (
                EventKind::MoveDone,
                format!("belongs to {owner}, and arrives from {from}"),
            ),
            (Status::Restarting { reason, .. }, _) => (
                EventKind::MachineRestarting,
                format!("ended, and is to be restarted: {reason}"),
            ),
            (Status::Exited { code }, _) => (
                EventKind::MachineExited,
                format!("ended by itself with code {code}"),
            ),
            (Status::Trapped { message }, _) => (
                EventKind::MachineTrapped,
                format!("was ended by a trap of its program: {message}"),
            ),
            (Status::Stopped, _) => (
                EventKind::MachineStopped,
                "was ended by a command".to_owned(),
            ),
            (Status::Failed { reason }, _) => {
                (EventKind::MachineFailed, format!("failed: {reason}"))
            }
        };
        let note = Note::machine(kind, &record.name, text).under(record.epoch);
        match &record.status {
            Status::Exited { code } => note.with("code", code),
            Status::Restarting { .. } => note.with("restarts", record.restarts),
            _ => note,
        }
    }

    /// The end of a move away from here.
    pub(crate) fn moved(report: &MoveReport) -> Note {
        let kind = match report.ending {
            Ending::Moved => EventKind::MoveDone,
            Ending::Stayed { .. } => EventKind::MoveFailed,
        };
        Note::machine(kind, &report.machine, report.line())
            .under(report.epoch)
            .with("target", &report.target)
            .with("downtime_micros", report.downtime_micros)
            .with("total_micros", report.total_micros)
            .with("bytes", report.bytes)
    }

    /// This node's answer to an offer.
    pub(crate) fn offered(
        machine: &MachineName,
        epoch: Epoch,
        source: &NodeName,
        refused: Option<&String>,
    ) -> Note {
        let (kind, text) = match refused {
            None => (
                EventKind::MoveAccepted,
                format!("is accepted from {source}"),
            ),
            Some(reason) => (
                EventKind::MoveRefused,
                format!("is refused from {source}: {reason}"),
            ),
        };
        Note::machine(kind, machine, text)
            .under(epoch)
            .with("source", source)
    }

    /// The result of a checkpoint.
    pub(crate) fn checkpoint(
        machine: &MachineName,
        result: &Result<CheckpointInfo, CommandError>,
    ) -> Note {
        match result {
            Ok(info) => {
                let text = format!("was kept as checkpoint {} in {}", info.id, info.repository);
                Note::machine(EventKind::CheckpointMade, machine, text)
                    .with("id", &info.id)
                    .with("repository", &info.repository)
                    .with("stored_bytes", info.stored_bytes)
                    .with("pause_micros", info.pause_micros.unwrap_or_default())
                    .with("total_micros", info.total_micros.unwrap_or_default())
            }
            Err(error) => Note::machine(EventKind::CheckpointFailed, machine, error.to_string()),
        }
    }
}
