//! Records in the store that machines run here after a start or an arrival, and handles an arrived
//! machine whose source or worker is lost before that.

use super::handle::{Machines, RestartDecision, starts};
use super::termination::record_end;
use crate::events::Note;
use crate::moves::HELD;
use crate::processes::{PROMPT, WorkerHandle};
use crate::records::{self, RecordError};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::failpoint;
use keel_machine::moves::ownership;
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{State, pack, unpack};
use keel_store::Txn;
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use std::sync::Arc;
use std::time::Duration;

/// Pause after a failed store access.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long a source without a lease may still return with its copy.
const GONE_PATIENCE: Duration = Duration::from_secs(10);

/// Records that a machine that started or arrived here runs; retries until the store accepts the
/// write.
pub(super) async fn is_running(
    machines: &Arc<Machines>,
    machine: &MachineName,
    epoch: Epoch,
) -> Result<(), RecordError> {
    runs(machines, machine, epoch, false).await
}

/// As [`is_running`]; `filling` means that part of the memory has still to arrive.
pub(super) async fn runs(
    machines: &Arc<Machines>,
    machine: &MachineName,
    epoch: Epoch,
    filling: bool,
) -> Result<(), RecordError> {
    let mut before = None;
    loop {
        if failpoint::pass_async("arrived.running").await.is_err() {
            tokio::time::sleep(RETRY_AFTER).await;
            continue;
        }
        let running = |record: &mut Record| {
            // A delayed write must not count for the machine's next life.
            let next = ownership::running(record, &machines.context.name, epoch, filling);
            // Of two concurrent writers, the one whose write succeeds emits the event.
            before = next.is_some().then(|| record.status.clone());
            let Some(next) = next else { return false };
            if starts(&record.status) {
                record.started_unix_ms = unix_ms();
            }
            record.enter(next, unix_ms());
            true
        };
        // A failover reserved the memory that it has now.
        let reserved = Key::Reservation(machines.context.name.clone(), machine.clone());
        let reserved = reserved.to_string();
        let more = |txn: Txn, _: &Record| txn.delete(reserved.clone());
        let written = records::update(&*machines.context.store, machine, running, more).await;
        if let (Ok(record), Some(before)) = (&written, &before) {
            machines.context.events.record(Note::status(record, before));
        }
        match written {
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "cannot record yet that the machine runs");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Ok(_) | Err(RecordError::NoMachine(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Handles a machine whose move was committed but whose worker here was lost before it was known
/// to run. The source holds the frozen copy and takes the machine back. The machine is lost only
/// if the source has dropped its copy, because it was informed that the machine runs here, or if
/// the source's node is gone too.
pub(super) async fn lost_on_arrival(
    machines: &Arc<Machines>,
    machine: &MachineName,
    from: &NodeName,
) -> Result<RestartDecision, RecordError> {
    let mut gone_since = None;
    loop {
        let waits = |record: &Record| {
            record.owner == machines.context.name
                && matches!(record.status, Status::Arriving { .. })
        };
        let epoch = match records::get(&*machines.context.store, machine).await {
            Ok(found) if waits(&found.record) => found.record.epoch,
            Ok(_) | Err(RecordError::NoMachine(_)) => return Ok(RestartDecision::No),
            Err(error) => {
                tracing::warn!(%machine, %error, "the owner is not known yet");
                tokio::time::sleep(RETRY_AFTER).await;
                continue;
            }
        };
        let alive = records::alive(&*machines.context.store).await;
        let gone = alive.is_ok_and(|alive| !alive.contains(from));
        let since = gone.then(|| gone_since.unwrap_or_else(tokio::time::Instant::now));
        gone_since = since;
        // An agent that is away only briefly still has the copy.
        let gone = since.is_some_and(|since| since.elapsed() > GONE_PATIENCE);
        if gone || source_holds(machines, machine, from).await == Some(false) {
            let reason = format!(
                "its worker process was lost just after it arrived, and {from} no longer has a copy"
            );
            return record_end(machines, machine, epoch, Status::Failed { reason }).await;
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Waits for the disconnected source of a machine that runs here with incomplete memory. If the
/// source is lost for good, so are pages of the machine, which then restarts from its checkpoint.
pub(super) async fn await_source(
    machines: &Arc<Machines>,
    machine: &MachineName,
    worker: &WorkerHandle,
) {
    let mut gone_since = None;
    loop {
        match worker.state().await {
            Ok(State::Filling {
                source_lost: true, ..
            }) => {}
            // The source reconnected, or all memory has arrived.
            Ok(_) => return,
            // Busy, or lost, which the watch handles.
            Err(_) => {
                if !machines
                    .processes
                    .machines
                    .get(machine)
                    .is_some_and(|now| now.is(worker))
                {
                    return;
                }
            }
        }
        if let Ok(found) = records::get(&*machines.context.store, machine).await
            && let Status::Filling { from } = &found.record.status
        {
            let alive = records::alive(&*machines.context.store).await;
            let gone = alive.is_ok_and(|alive| !alive.contains(from));
            let since = gone.then(|| gone_since.unwrap_or_else(tokio::time::Instant::now));
            gone_since = since;
            let gone = since.is_some_and(|since| since.elapsed() > GONE_PATIENCE);
            if gone || source_holds(machines, machine, from).await == Some(false) {
                tracing::error!(%machine, %from, "a part of its memory is lost with its source");
                // The watch handles the rest as a lost worker.
                worker.kill().await;
                return;
            }
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Whether a source has the frozen copy; `None` if it does not answer.
pub(super) async fn source_holds(
    machines: &Arc<Machines>,
    machine: &MachineName,
    source: &NodeName,
) -> Option<bool> {
    let payload = pack(machine).ok()?;
    let answer = machines
        .context
        .peers
        .call(source, HELD, payload, PROMPT)
        .await
        .ok()?;
    unpack(&answer).ok()
}
