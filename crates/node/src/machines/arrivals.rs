//! Machines that arrived here, or were started: the store is told that they run; what
//! becomes of one whose source or worker is lost meanwhile.

use super::ends::finish;
use super::handle::{Again, Machines, starts};
use crate::events::Note;
use crate::moves::HELD;
use crate::processes::{PROMPT, Worker};
use crate::records::{self, RecordError};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::failpoint;
use keel_machine::moves::ownership;
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{State, pack, unpack};
use keel_store::clock::unix_ms;
use std::sync::Arc;
use std::time::Duration;

/// Pause after the store did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long a source without a lease may still come back with its copy.
const GONE_PATIENCE: Duration = Duration::from_secs(10);

/// Writes that a machine which was started here, or arrived here, runs, until
/// the store has it.
pub(super) async fn is_running(
    machines: &Arc<Machines>,
    machine: &MachineName,
    epoch: Epoch,
) -> Result<(), RecordError> {
    runs(machines, machine, epoch, false).await
}

/// As [`is_running`]; of a machine that is `filling` a part of the memory is still
/// to come.
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
            // A word that comes late must not count for its next life.
            let next = ownership::running(record, &machines.context.name, epoch, filling);
            // Of two that are here at once, the one that writes it tells it.
            before = next.is_some().then(|| record.status.clone());
            let Some(next) = next else { return false };
            if starts(&record.status) {
                record.started_unix_ms = unix_ms();
            }
            record.enter(next, unix_ms());
            true
        };
        let written =
            records::update(&*machines.context.store, machine, running, |txn, _| txn).await;
        if let (Ok(record), Some(before)) = (&written, &before) {
            machines.context.events.record(Note::status(record, before));
        }
        match written {
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "that it runs is not in the store yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Ok(_) | Err(RecordError::NoMachine(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// A machine whose move was committed, but whose worker here was lost before it
/// was known to go on. Its source has the frozen copy and takes it back. It is
/// lost only when the source has none any more (it was told that the machine
/// runs here, which then was true), or its node is gone too.
pub(super) async fn lost_on_arrival(
    machines: &Arc<Machines>,
    machine: &MachineName,
    from: &NodeName,
) -> Result<Again, RecordError> {
    let mut gone_since = None;
    loop {
        let waits = |record: &Record| {
            record.owner == machines.context.name
                && matches!(record.status, Status::Arriving { .. })
        };
        let epoch = match records::get(&*machines.context.store, machine).await {
            Ok(found) if waits(&found.record) => found.record.epoch,
            Ok(_) | Err(RecordError::NoMachine(_)) => return Ok(Again::No),
            Err(error) => {
                tracing::warn!(%machine, %error, "not known yet who has it");
                tokio::time::sleep(RETRY_AFTER).await;
                continue;
            }
        };
        let alive = records::alive(&*machines.context.store).await;
        let gone = alive.is_ok_and(|alive| !alive.contains(from));
        let since = gone.then(|| gone_since.unwrap_or_else(tokio::time::Instant::now));
        gone_since = since;
        // An agent that is only away for a moment still has the copy.
        let gone = since.is_some_and(|since| since.elapsed() > GONE_PATIENCE);
        if gone || source_holds(machines, machine, from).await == Some(false) {
            let reason = format!(
                "its worker process was lost just after it arrived, and {from} has no copy any more"
            );
            return finish(machines, machine, epoch, Status::Failed { reason }).await;
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// A machine runs here whose memory is not all here, and its source is not
/// connected: waits for it. When the source is gone for good, so are pages of the
/// machine, and it can only go on from its checkpoint.
pub(super) async fn await_source(machines: &Arc<Machines>, machine: &MachineName, worker: &Worker) {
    let mut gone_since = None;
    loop {
        match worker.state().await {
            Ok(State::Filling {
                source_lost: true, ..
            }) => {}
            // It came back, or all is there.
            Ok(_) => return,
            // Busy, or lost, which is seen to elsewhere.
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
                // What follows is seen as a lost worker.
                worker.kill().await;
                return;
            }
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Whether a source has the frozen copy; `None` if it does not say.
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
