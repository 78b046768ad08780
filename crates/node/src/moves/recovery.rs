//! Recovers moves that an earlier agent of this node began: withdraws its offers, and takes back
//! the machine that it was moving away, or continues the move.

use super::begin::take_over;
use super::handle::Moves;
use super::offer::{WITHDRAW, needs_copy};
use crate::events::Note;
use crate::processes::{MoveHandle, PROMPT, Processes};
use crate::records::{self, RecordError, Reservation};
use keel_api::EventKind;
use keel_cluster::{Epoch, MachineName};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{State, kind, pack};
use keel_net::RpcError;
use keel_store::keys::{self, Key};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Pause after a failed access to the store or the worker.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Recovers a machine that an earlier agent was moving away when it died: the machine may be
/// frozen, and the commit may have been sent. A write of this node's own, under a new epoch, makes
/// that commit impossible. If the commit has won already, the machine does not belong to this node
/// any more.
pub(crate) async fn resume_after_move(moves: &Arc<Moves>, machine: &MachineName) {
    let Some(worker) = moves.processes.machines.get(machine) else {
        return;
    };
    if worker.report().await.is_ok_and(|report| report.moving_away) {
        settle_after_move(moves, machine).await;
    }
}

/// Settles the last move of a machine whose worker moves it away, or runs it under the epoch before
/// that of its record: the move failed by itself after an earlier agent had kept the machine here,
/// and before the worker was told so.
pub(crate) async fn settle_after_move(moves: &Arc<Moves>, machine: &MachineName) {
    // Moves, stops and restarts of the machine wait: its epoch is about to be raised.
    if let Some(held) = hold(&moves.processes, machine) {
        settle_held(moves, machine).await;
        held.release(&moves.processes, machine);
    }
}

async fn settle_held(moves: &Arc<Moves>, machine: &MachineName) {
    // Raised only once, also if an answer was lost or the worker fails to resume.
    let mut raised = None;
    loop {
        // Checked each time: another machine of its name may have arrived, and be moving.
        let Some(worker) = moves.processes.machines.get(machine) else {
            return;
        };
        let runs_under = match worker.report().await {
            // Its watch records that, once this is over.
            Ok(report) if matches!(report.state, State::Ended { .. }) => return,
            Ok(report) if report.moving_away => None,
            Ok(report) => match report.state {
                State::Running { epoch } => Some(epoch),
                _ => return,
            },
            Err(_) => return,
        };
        let before = raised;
        let mut mine = false;
        let claim = |record: &mut Record| {
            mine = record.owner == moves.context.name
                && match runs_under {
                    None => !record.status.ended(),
                    Some(epoch) => is_behind(epoch, record),
                };
            let raises = mine && runs_under.is_none() && raised != Some(record.epoch);
            if raises {
                record.epoch = record.next_epoch();
                raised = Some(record.epoch);
            }
            raises
        };
        match records::update(&*moves.context.store, machine, claim, |txn, _| txn).await {
            Ok(record) if mine => {
                if raised != before {
                    tracing::warn!(%machine, "a move was interrupted by the agent's end; the machine continues here");
                    let text = "its move was interrupted by the agent's end; it continues here";
                    let taken_up = Note::machine(EventKind::MoveTakenUp, machine, text);
                    moves.context.events.record(taken_up.under(record.epoch));
                }
                let thawed: Result<(), RpcError> =
                    worker.ask(kind::THAW, &record.epoch, PROMPT).await;
                match thawed {
                    Ok(()) => return,
                    // If it ended, or its worker is lost, that is seen in the next round.
                    Err(error) => {
                        tracing::error!(%machine, %error, "cannot resume the machine yet");
                        tokio::time::sleep(RETRY_AFTER).await;
                    }
                }
            }
            Ok(_) | Err(RecordError::NoMachine(_)) if runs_under.is_some() => return,
            // The commit had won, and the target may be gone before it resumes the machine.
            Ok(record) if needs_copy(&moves.context.name, &record.status) => {
                let text = "its move was committed when the agent ended; it is resumed";
                let taken_up = Note::machine(EventKind::MoveTakenUp, machine, text);
                moves.context.events.record(taken_up.under(record.epoch));
                let post_copy = worker.report().await.is_ok_and(|report| report.post_copy);
                take_over(moves, record, worker, post_copy).await;
                return;
            }
            // It was given up: its output and its own disk stay.
            Ok(record) if record.owner == moves.context.name && record.status.ended() => {
                let workers = &moves.processes.machines;
                if workers.get(machine).is_some_and(|now| now.is(&worker)) {
                    workers.end(&moves.context.dir, machine).await;
                }
                return;
            }
            // It runs elsewhere, or ended there: the frozen copy is of no use.
            Ok(_) | Err(RecordError::NoMachine(_)) => {
                moves
                    .processes
                    .machines
                    .forget_exactly(&moves.context.dir, machine, Some(&worker))
                    .await;
                return;
            }
            Err(error) => {
                tracing::warn!(%machine, %error, "the owner is not settled yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// Whether a machine runs here under the epoch before that of its record, which is this node's.
/// Only an earlier agent of this node can have given it that epoch, and only by keeping it: a
/// restart passes through other states, and its worker is a new one.
pub(crate) fn is_behind(runs_under: Epoch, record: &Record) -> bool {
    matches!(record.status, Status::Running) && record.epoch.follows(runs_under)
}

/// Keeps a machine from being moved, ended or restarted until it is released.
struct Held(watch::Sender<bool>);

/// Holds a machine that has no move in progress; `None` if it has one.
fn hold(processes: &Processes, machine: &MachineName) -> Option<Held> {
    let (handle, ends) = MoveHandle::new();
    let mut under_way = processes.exclusion.moves();
    if under_way.contains_key(machine) {
        return None;
    }
    under_way.insert(machine.clone(), handle);
    Some(Held(ends.over))
}

impl Held {
    /// Releases the machine to waiting operations.
    fn release(self, processes: &Processes, machine: &MachineName) {
        processes.exclusion.moves().remove(machine);
        self.0.send_replace(true);
    }
}

/// Withdraws the offers of an earlier agent of this node that can no longer be carried out, so
/// that the targets need not wait for them.
pub(crate) async fn withdraw_old_offers(moves: Arc<Moves>) {
    let listing = match moves.context.store.list(keys::RESERVATIONS).await {
        Ok(listing) => listing,
        Err(error) => {
            tracing::warn!(%error, "cannot read old offers; they expire at their targets");
            return;
        }
    };
    for entry in &listing.entries {
        let Ok(Key::Reservation(target, machine)) = entry.key.parse() else {
            continue;
        };
        let made_here = keel_store::encoding::decode("a reservation", &entry.value)
            .is_ok_and(|reservation: Reservation| reservation.source == moves.context.name);
        if !made_here || moves.processes.exclusion.is_moving(&machine) {
            continue;
        }
        tracing::info!(%machine, %target, "withdrawing the offer of an earlier agent");
        if let Ok(payload) = pack(&machine) {
            let told = moves
                .context
                .peers
                .call(&target, WITHDRAW, payload, PROMPT)
                .await;
            if let Err(error) = told {
                tracing::info!(%machine, %target, %error, "cannot withdraw the offer; it expires at the target");
            }
        }
    }
}
