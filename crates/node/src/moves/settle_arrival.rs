//! Target of a move: settles an arrival after the loss of its source, and answers a source that
//! does not know whether its machine runs here.

use super::handle::Moves;
use super::offer::{Arrival, passed};
use crate::processes::{PROMPT, WorkerHandle};
use crate::records::{self, RecordError};
use crate::spanning::part_of;
use keel_cluster::{Epoch, MachineName};
use keel_machine::moves::ownership::{self, ResumeDecision};
use keel_machine::spec::Record;
use keel_machine::worker::control::{State, kind};
use keel_net::RpcError;
use keel_store::keys::Key;
use keel_store::{Compare, Txn};
use std::sync::Arc;
use std::time::Duration;

/// Pause between attempts to settle.
const RETRY_AFTER: Duration = Duration::from_millis(300);

/// Settles an arrival whose source is lost: deletes the reservation, which makes a pending commit
/// impossible. If the reservation is gone already, the commit has won and the machine belongs to
/// this node.
pub(crate) async fn settle(moves: &Arc<Moves>, machine: &MachineName) {
    loop {
        match settle_once(moves, machine).await {
            Ok(()) => return,
            Err(error) => {
                tracing::warn!(%machine, error, "an arrival is not settled yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

async fn settle_once(moves: &Arc<Moves>, machine: &MachineName) -> Result<(), String> {
    let Some(worker) = moves.processes.machines.get(machine) else {
        return Ok(());
    };
    let state = worker.state().await.map_err(|error| error.to_string())?;
    // Only an arrival is settled: the source may ask to withdraw while this node moves the machine
    // back to it.
    if matches!(
        state,
        State::Running { .. } | State::Filling { .. } | State::Ended { .. }
    ) {
        return Ok(());
    }
    // Not a copy of a move: the machine is being started here, perhaps because the node that asks
    // failed.
    if matches!(state, State::Empty | State::Held { .. }) && is_started_here(moves, machine).await?
    {
        return Ok(());
    }
    passed("arrival.settle").await?;
    let key = Key::Reservation(moves.context.name.clone(), machine.clone()).to_string();
    let txn = Txn::new()
        .when(Compare::Exists { key: key.clone() })
        .delete(key);
    let taken = moves
        .context
        .store
        .txn(txn)
        .await
        .map_err(|error| error.to_string())?
        .is_committed();
    passed("arrival.settled").await?;
    if !taken && resume_if_committed(moves, machine, &worker, &state).await? {
        return Ok(());
    }
    drop_copy(moves, machine, &worker).await
}

/// A machine's present record; `None` if it was removed.
async fn record_of(moves: &Moves, machine: &MachineName) -> Result<Option<Record>, String> {
    match records::get(&*moves.context.store, machine).await {
        Ok(found) => Ok(Some(found.record)),
        Err(RecordError::NoMachine(_)) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether a machine is this node's, and to run.
async fn is_started_here(moves: &Moves, machine: &MachineName) -> Result<bool, String> {
    let record = record_of(moves, machine).await?;
    Ok(record.is_some_and(|it| it.owner == moves.context.name && !it.status.ended()))
}

/// Ends a worker whose copy is of no use.
async fn forget(moves: &Moves, machine: &MachineName, worker: &WorkerHandle) {
    let workers = &moves.processes.machines;
    workers
        .forget_exactly(&moves.context.dir, machine, Some(worker))
        .await;
}

/// Drops a copy that arrived here and will never run.
async fn drop_copy(
    moves: &Arc<Moves>,
    machine: &MachineName,
    worker: &WorkerHandle,
) -> Result<(), String> {
    if part_of(worker).await?.is_some() {
        // The machine needs its pages; it ends when the home removes it as a part.
        let reason = "the machine stays where it was".to_owned();
        let told: Result<(), RpcError> = worker.ask(kind::ABORT, &reason, PROMPT).await;
        return told.map_err(|error| error.to_string());
    }
    forget(moves, machine, worker).await;
    Ok(())
}

/// Resumes an arrival whose reservation is gone, if the record shows that the commit of its move
/// has won. False if it can never win.
async fn resume_if_committed(
    moves: &Arc<Moves>,
    machine: &MachineName,
    worker: &WorkerHandle,
    state: &State,
) -> Result<bool, String> {
    let record = record_of(moves, machine).await?;
    match state {
        State::Prepared { offered, .. } => {
            let ResumeDecision::Resume(epoch) =
                ownership::may_resume(&moves.context.name, *offered, record.as_ref())
            else {
                return Ok(false);
            };
            let gone: Result<u64, RpcError> = worker.ask(kind::GO, &epoch, PROMPT).await;
            gone.map(|_| true).map_err(|error| error.to_string())
        }
        // Its worker is still preparing it and reports when it is ready; the source then asks
        // again.
        State::Receiving { offered } => {
            let verdict = ownership::may_resume(&moves.context.name, *offered, record.as_ref());
            Ok(matches!(verdict, ResumeDecision::Resume(_)))
        }
        // Not a copy of a move: a machine of that name is being started here.
        State::Empty | State::Held { .. } => {
            Ok(record.is_some_and(|it| it.owner == moves.context.name && !it.status.ended()))
        }
        _ => Ok(false),
    }
}

/// Whether what resumed here under an epoch was given to another node, or back to its source, since
/// this node had no lease. It is held.
async fn was_given_away(
    moves: &Moves,
    machine: &MachineName,
    epoch: Epoch,
) -> Result<bool, String> {
    let record = record_of(moves, machine).await?;
    Ok(record.is_some_and(|it| {
        let is_here = it.owner == moves.context.name && it.epoch == epoch;
        it.spec.ha.is_some() && !is_here
    }))
}

/// Answers a source that does not know whether its machine runs here: resumes it, or ensures that
/// it never runs here.
pub(crate) async fn arrival(
    moves: &Arc<Moves>,
    machine: &MachineName,
    epoch: Epoch,
) -> Result<Arrival, String> {
    passed("arrival.asked").await?;
    let Some(worker) = moves.processes.machines.get(machine) else {
        return Ok(Arrival::Without);
    };
    match worker.state().await.map_err(|error| error.to_string())? {
        State::Running { epoch } | State::Filling { epoch, .. }
            if was_given_away(moves, machine, epoch).await? =>
        {
            forget(moves, machine, &worker).await;
            Ok(Arrival::Without)
        }
        State::Running { .. } | State::Filling { .. } | State::Ended { .. } => Ok(Arrival::Resumed),
        // The source assumes that its commit has won; the store decides.
        State::Prepared { offered, .. } => {
            let found = record_of(moves, machine).await?;
            match ownership::may_resume(&moves.context.name, offered, found.as_ref()) {
                ResumeDecision::Resume(won) if won == epoch => {
                    let gone: Result<u64, RpcError> = worker.ask(kind::GO, &won, PROMPT).await;
                    gone.map(|_| Arrival::Resumed)
                        .map_err(|error| error.to_string())
                }
                ResumeDecision::Drop => {
                    drop_copy(moves, machine, &worker).await?;
                    Ok(Arrival::Without)
                }
                ResumeDecision::Resume(_) | ResumeDecision::Undecided => Err(format!(
                    "machine {machine:?} was not given to {} under epoch {epoch}",
                    moves.context.name
                )),
            }
        }
        // A part of a machine that stays is removed by its home.
        State::Receiving { .. } if part_of(&worker).await?.is_some() => Ok(Arrival::Without),
        State::Empty | State::Receiving { .. } | State::Dropped { .. } | State::Held { .. } => {
            forget(moves, machine, &worker).await;
            Ok(Arrival::Without)
        }
    }
}

/// Whether this node, the source of a move, still has the frozen copy.
pub(crate) async fn holds_copy(moves: &Moves, machine: &MachineName) -> bool {
    let worker = moves.processes.machines.get(machine);
    match worker.filter(|it| !it.is_lost()) {
        Some(worker) => match worker.report().await {
            // Otherwise it is another life of that name.
            Ok(report) => report.moving_away,
            // The copy may exist as long as its process does.
            Err(_) => !worker.gone_within(Duration::ZERO).await,
        },
        None => false,
    }
}
