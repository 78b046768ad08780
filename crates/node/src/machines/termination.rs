//! Records the end of a machine's life in the store, and removes machines with `rm = true` after
//! their end.

use super::handle::{Machines, RestartDecision};
use super::remove::remove_ended;
use crate::events::Note;
use crate::records::{self, RecordError};
use keel_api::EventKind;
use keel_cluster::{Epoch, MachineName};
use keel_machine::moves::ownership::{self, EndEffect};
use keel_machine::spec::{Record, Spec, Status};
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use std::sync::Arc;
use std::time::Duration;

/// Pause after a failed store access.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long a machine that is removed at its end can still be queried.
const REMOVE_AFTER: Duration = Duration::from_secs(3);

/// Records the end of the life that a machine had here under `epoch`, and deletes its schedule
/// entry; retries until the store accepts the write. Removes the machine if its spec asks for
/// that. If its restart policy says so, the machine instead stays scheduled under its next epoch
/// and is restarted.
pub(super) async fn record_end(
    machines: &Arc<Machines>,
    machine: &MachineName,
    epoch: Epoch,
    status: Status,
) -> Result<RestartDecision, RecordError> {
    let mut before = None;
    let mut effect = EndEffect::None;
    loop {
        let entry = Key::Schedule(machines.context.name.clone(), machine.clone()).to_string();
        let set = Key::InSync(machine.clone()).to_string();
        let newest = Key::Checkpoint(machine.clone()).to_string();
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
                |txn, record| match record.status {
                    Status::Restarting {
                        from_checkpoint: true,
                        ..
                    } => txn,
                    // Its next life begins anew: the checkpoints of this one are of no use.
                    Status::Restarting { .. } => {
                        match restarts_from_checkpoints(machines, &record.spec) {
                            true => txn.delete(set.clone()).delete(newest.clone()),
                            false => txn,
                        }
                    }
                    _ if record.status.ended() => txn.delete(entry.clone()),
                    _ => txn,
                },
            )
            .await;
        if let (Ok(record), Some(before)) = (&written, &before) {
            machines.context.events.record(Note::status(record, before));
        }
        match written {
            // An earlier attempt may have written it and lost the answer.
            Ok(record) if effect == EndEffect::None && !record.status.ended() => {
                return Ok(RestartDecision::No);
            }
            Ok(record) if matches!(record.status, Status::Restarting { .. }) => {
                let reason = status.end().unwrap_or_default();
                tracing::info!(%machine, restarts = record.restarts, reason, "restarting the machine");
                return Ok(RestartDecision::Under(record.epoch));
            }
            Ok(record) => {
                if record.spec.remove_at_end
                    && record.status.ended()
                    && record.owner == machines.context.name
                {
                    remove_later(machines, &record);
                }
                return Ok(RestartDecision::No);
            }
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "cannot record the end yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err(RecordError::NoMachine(_)) => return Ok(RestartDecision::No),
            Err(error) => return Err(error),
        }
    }
}

fn restarts_from_checkpoints(machines: &Machines, spec: &Spec) -> bool {
    let kind = machines.context.kinds.of(spec);
    kind.is_ok_and(|kind| kind.abilities().restarts_from_checkpoints)
}

/// Removes a machine after a delay, so that clients that wait for its end can still read how it
/// ended.
fn remove_later(machines: &Arc<Machines>, record: &Record) {
    let (machines, machine) = (machines.clone(), record.name.clone());
    let (created, epoch) = (record.created_unix_ms, record.epoch);
    tokio::spawn(async move {
        tokio::time::sleep(REMOVE_AFTER).await;
        loop {
            match records::get(&*machines.context.store, &machine).await {
                // Not another machine of the same name.
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
                    tracing::warn!(%machine, %error, "cannot remove the machine yet");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    });
}

/// Removes ended machines whose removal an earlier agent did not complete.
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

/// The reason, if the kernel killed a machine's process for lack of memory.
pub(super) fn named_end(machines: &Machines, machine: &MachineName) -> Option<String> {
    let reason = machines
        .processes
        .machines
        .out_of_memory(&machines.context.dir, machine)?
        .to_string();
    tracing::error!(%machine, reason, "the kernel killed the process");
    let told = Note::machine(EventKind::OutOfMemory, machine, &reason);
    machines.context.events.record(told);
    Some(reason)
}
