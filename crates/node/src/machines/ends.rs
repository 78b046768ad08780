//! Writes the end of a machine's life into the store, and removes machines that are not
//! wanted after their end.

use super::handle::{Again, Machines};
use super::remove::remove_ended;
use crate::events::Note;
use crate::records::{self, RecordError};
use keel_api::EventKind;
use keel_cluster::{Epoch, MachineName};
use keel_machine::moves::ownership::{self, EndEffect};
use keel_machine::spec::{Record, Status};
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use std::sync::Arc;
use std::time::Duration;

/// Pause after the store did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long a machine that is removed at its end can still be asked about.
const REMOVE_AFTER: Duration = Duration::from_secs(3);

/// Writes the end of the life that a machine had here under `epoch`, and takes it out
/// of the schedule, until the store has it; removes the machine if it was to be. Where
/// its policy says so, it stays scheduled under its next epoch instead, and is started
/// again.
pub(super) async fn finish(
    machines: &Arc<Machines>,
    machine: &MachineName,
    epoch: Epoch,
    status: Status,
) -> Result<Again, RecordError> {
    let mut before = None;
    let mut effect = EndEffect::None;
    loop {
        let entry = Key::Schedule(machines.context.name.clone(), machine.clone()).to_string();
        let end = |record: &mut Record| {
            let was = record.status.clone();
            effect = ownership::end(record, &machines.context.name, epoch, &status, unix_ms());
            if effect == EndEffect::Changed {
                before = Some(was);
            }
            effect == EndEffect::Changed
        };
        let written =
            records::update(
                &*machines.context.store,
                machine,
                end,
                |txn, record| match record.status.ended() {
                    true => txn.delete(entry.clone()),
                    false => txn,
                },
            )
            .await;
        if let (Ok(record), Some(before)) = (&written, &before) {
            machines.context.events.record(Note::status(record, before));
        }
        match written {
            // (An earlier attempt may have written it, whose answer was lost.)
            Ok(record) if effect == EndEffect::None && !record.status.ended() => {
                return Ok(Again::No);
            }
            Ok(record) if matches!(record.status, Status::Restarting { .. }) => {
                let reason = status.end().unwrap_or_default();
                tracing::info!(%machine, restarts = record.restarts, reason, "it is started again");
                return Ok(Again::Under(record.epoch));
            }
            Ok(record) => {
                if record.spec.remove_at_end
                    && record.status.ended()
                    && record.owner == machines.context.name
                {
                    remove_later(machines, &record);
                }
                return Ok(Again::No);
            }
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "its end is not in the store yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err(RecordError::NoMachine(_)) => return Ok(Again::No),
            Err(error) => return Err(error),
        }
    }
}
/// Removes a machine that is not wanted any more, a little later: whoever waits for
/// its end wants to know how it ended.
fn remove_later(machines: &Arc<Machines>, record: &Record) {
    let (machines, machine) = (machines.clone(), record.name.clone());
    let (created, epoch) = (record.created_unix_ms, record.epoch);
    tokio::spawn(async move {
        tokio::time::sleep(REMOVE_AFTER).await;
        loop {
            match records::get(&*machines.context.store, &machine).await {
                // Another of that name is not meant.
                Ok(found)
                    if found.record.created_unix_ms == created && found.record.epoch == epoch => {}
                Ok(_) | Err(RecordError::NoMachine(_)) => return,
                Err(_) => {
                    tokio::time::sleep(RETRY_AFTER).await;
                    continue;
                }
            }
            match remove_ended(&machines, &machine).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(%machine, %error, "it is not removed yet");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    });
}

/// Removes what an earlier agent was to remove.
pub(super) async fn sweep_ended(machines: &Arc<Machines>) {
    let all = loop {
        match records::all(&*machines.context.store).await {
            Ok(all) => break all,
            Err(_) => tokio::time::sleep(RETRY_AFTER).await,
        }
    };
    for record in all {
        if record.spec.remove_at_end
            && record.status.ended()
            && record.owner == machines.context.name
        {
            remove_later(machines, &record);
        }
    }
}

/// Why the kernel ended a machine's process, if it did for want of memory.
pub(super) fn named_end(machines: &Machines, machine: &MachineName) -> Option<String> {
    let reason = machines
        .processes
        .machines
        .out_of_memory(&machines.context.dir, machine)?
        .to_string();
    tracing::error!(%machine, reason, "the kernel ended its process");
    let told = Note::machine(EventKind::OutOfMemory, machine, &reason);
    machines.context.events.record(told);
    Some(reason)
}
