//! Follows the states of a worker, and records the resulting state of its machine in the store.

use super::handle::{Machines, RestartDecision};
use super::host_files;
use super::record_running::{await_source, is_running, lost_on_arrival, runs};
use super::stall_status;
use super::termination::{named_end, record_end};
use crate::events::Note;
use crate::moves::{drop_reservation, settle};
use crate::processes::WorkerHandle;
use crate::records::{self, RecordError};
use crate::spanning::machine_runs;
use keel_api::EventKind;
use keel_cluster::{Epoch, MachineName};
use keel_machine::failpoint;
use keel_machine::spec::Status;
use keel_machine::worker::control::{State, kind, unpack};
use keel_machine::worker::volume_folder;
use std::sync::Arc;
use std::time::Duration;

/// Pause after a failed store access.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Follows a worker's state, and records its end in the store.
pub(crate) fn watch_worker(machines: &Arc<Machines>, machine: &MachineName) {
    let (machines, machine) = (machines.clone(), machine.clone());
    tokio::spawn(async move {
        let Some(worker) = machines.processes.machines.get(&machine) else {
            return;
        };
        stall_status::watch(&machines, &machine, &worker);
        machines.checkpoints.keep_schedule(&machine, &worker);
        host_files::keep_members(&machines, &machine, &worker);
        let mut lost = "it does not answer".to_owned();
        if let Ok(mut states) = worker.stream(kind::STATES, &()).await {
            while let Some(item) = states.recv().await {
                let state: Result<State, _> = item.and_then(|bytes| unpack(&bytes));
                match state {
                    Ok(State::Ended { epoch, status }) => {
                        machines.moves.end_arrival_trace(&machine, Ok(()));
                        ended(&machines, &machine, &worker, epoch, status).await;
                        return;
                    }
                    Ok(State::Dropped { reason }) => {
                        tracing::info!(%machine, reason, "an arriving machine was dropped");
                        machines.moves.end_arrival_trace(&machine, Err(&reason));
                        let text = format!("its incomplete copy was dropped: {reason}");
                        let dropped = Note::machine(EventKind::ArrivalDropped, &machine, text);
                        machines.context.events.record(dropped);
                        settle(&machines.moves, &machine).await;
                        return;
                    }
                    Ok(State::Prepared {
                        source_lost: true, ..
                    }) => settle(&machines.moves, &machine).await,
                    Ok(State::Running { epoch }) => {
                        if let Err(error) = is_running(&machines, &machine, epoch).await {
                            tracing::warn!(%machine, %error, "cannot record that the machine runs");
                        }
                        machines.moves.end_arrival_trace(&machine, Ok(()));
                        let (machines, machine) = (machines.clone(), machine.clone());
                        let worker = worker.clone();
                        tokio::spawn(async move {
                            machine_runs(&machines.spanning, &machine, &worker).await;
                        });
                    }
                    Ok(State::Filling { epoch, source_lost }) => {
                        if let Err(error) = runs(&machines, &machine, epoch, true).await {
                            tracing::warn!(%machine, %error, "cannot record that the machine runs");
                        }
                        machines.moves.end_arrival_trace(&machine, Ok(()));
                        if source_lost {
                            let (machines, machine) = (machines.clone(), machine.clone());
                            let worker = worker.clone();
                            tokio::spawn(async move {
                                await_source(&machines, &machine, &worker).await;
                            });
                        }
                    }
                    Ok(_) => {}
                    Err(error) => {
                        lost = error.to_string();
                        break;
                    }
                }
            }
        }
        worker_lost(&machines, &machine, &worker, &lost).await;
    });
}

async fn ended(
    machines: &Arc<Machines>,
    machine: &MachineName,
    worker: &WorkerHandle,
    epoch: Epoch,
    status: Status,
) {
    if failpoint::pass_async("end.seen").await.is_err() {
        tokio::time::sleep(RETRY_AFTER).await;
    }
    machines.processes.exclusion.machine_ended(machine);
    let handle = machines.processes.exclusion.moves().get(machine).cloned();
    if let Some(handle) = handle {
        handle.over().await;
    }
    // Its output stays in its folder. The process is no longer needed, and must be gone before a
    // restart.
    let guarded = machines.processes.exclusion.busy().insert(machine.clone());
    // It stays in the table until its end is recorded: a source that asks for it must not get the
    // answer that it never ran.
    worker.forget().await;
    // If it is not in the table any more, another worker has replaced it.
    let end = match machines
        .processes
        .machines
        .get(machine)
        .is_some_and(|now| now.is(worker))
    {
        true => {
            machines
                .processes
                .machines
                .drop_group(&machines.context.dir, machine)
                .await;
            let epoch = epoch_of_life(machines, machine, epoch).await;
            record_end(machines, machine, epoch, status).await
        }
        false => Ok(RestartDecision::No),
    };
    machines.processes.machines.remove_exactly(machine, worker);
    settled(machines, machine, guarded, end);
}

/// The epoch under which the store has the life of a machine whose worker here ended under
/// `epoch`. It is higher if the worker ended before it received a write that keeps the machine
/// here.
async fn epoch_of_life(machines: &Arc<Machines>, machine: &MachineName, epoch: Epoch) -> Epoch {
    loop {
        match records::get(&*machines.context.store, machine).await {
            Ok(found) => {
                let record = found.record;
                let raised = record.owner == machines.context.name
                    && record.epoch > epoch
                    && record.status == Status::Running;
                return if raised { record.epoch } else { epoch };
            }
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "cannot record the end yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err(_) => return epoch,
        }
    }
}

/// Handles the result of recording a machine's end.
fn settled(
    machines: &Arc<Machines>,
    machine: &MachineName,
    guarded: bool,
    end: Result<RestartDecision, RecordError>,
) {
    if guarded {
        machines.processes.exclusion.busy().remove(machine);
    }
    if let Err(error) = machines.queue_restart(machine, end) {
        tracing::error!(%machine, %error, "cannot record the end");
    }
}

async fn worker_lost(
    machines: &Arc<Machines>,
    machine: &MachineName,
    worker: &WorkerHandle,
    reason: &str,
) {
    // A worker that was ended on purpose is not in the table any more.
    if !machines
        .processes
        .machines
        .get(machine)
        .is_some_and(|now| now.is(worker))
    {
        return;
    }
    tracing::warn!(%machine, reason, "the connection to its worker was lost");
    let text = format!("the connection to its process was lost ({reason})");
    machines
        .context
        .events
        .record(Note::machine(EventKind::WorkerSilent, machine, text));
    if machines
        .processes
        .machines
        .reconnect(&machines.context.dir, machine, worker)
        .await
    {
        watch_worker(machines, machine);
        return;
    }
    // From here on no process of it runs here.
    worker.mark_lost();
    let reason = named_end(machines, machine)
        .unwrap_or_else(|| format!("its worker process was lost ({reason})"));
    machines
        .processes
        .machines
        .drop_group(&machines.context.dir, machine)
        .await;
    // Only the move knows the owner now: its commit may be in progress, and the copy may resume at
    // the target.
    machines.processes.exclusion.machine_ended(machine);
    let handle = machines.processes.exclusion.moves().get(machine).cloned();
    if let Some(handle) = handle {
        handle.over().await;
    }
    // The move may have dropped it, and another life of that name may use its folder.
    if !machines
        .processes
        .machines
        .get(machine)
        .is_some_and(|now| now.is(worker))
    {
        return;
    }
    let folder = machines.context.dir.worker(machine);
    // Its volumes are lost with its memory. A panic in the task removes nothing.
    let _ = tokio::task::spawn_blocking(move || volume_folder::remove(&folder)).await;
    let found = loop {
        match records::get(&*machines.context.store, machine).await {
            Ok(found) => break Some(found.record),
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "the owner is not known yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err(_) => break None,
        }
    };
    // Another worker may have replaced it.
    if !machines
        .processes
        .machines
        .get(machine)
        .is_some_and(|now| now.is(worker))
    {
        return;
    }
    match found {
        Some(record) if record.owner == machines.context.name => {
            // Its output stays.
            let guarded = machines.processes.exclusion.busy().insert(machine.clone());
            machines.processes.machines.remove_exactly(machine, worker);
            let end = match record.status {
                Status::Arriving { from } => lost_on_arrival(machines, machine, &from).await,
                _ => record_end(machines, machine, record.epoch, Status::Failed { reason }).await,
            };
            settled(machines, machine, guarded, end);
        }
        _ => {
            // It was only arriving, or has left.
            machines
                .processes
                .machines
                .forget_exactly(&machines.context.dir, machine, Some(worker))
                .await;
            drop_reservation(&machines.moves, machine).await;
        }
    }
}
