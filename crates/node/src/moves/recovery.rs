//! Moves that an earlier agent of this node began and did not see the end of: its offers are
//! withdrawn; a machine that it was giving away is taken back, or its move is taken up.

use super::begin::take_up;
use super::handle::Moves;
use super::offer::{WITHDRAW, needs_copy};
use crate::events::Note;
use crate::processes::{MoveHandle, PROMPT, Processes};
use crate::records::{self, RecordError, Reservation};
use keel_api::EventKind;
use keel_cluster::MachineName;
use keel_machine::spec::Record;
use keel_machine::worker::control::{kind, pack};
use keel_net::RpcError;
use keel_store::keys::{self, Key};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Pause after the store or the worker did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Takes up a machine that an earlier agent was giving away when it died: the
/// machine may be frozen, and the commit may have been sent. A write of this
/// node's own, under a new epoch, makes that commit impossible; where it had won
/// already, the machine is not this node's any more.
pub(crate) async fn resume_after_move(moves: &Arc<Moves>, machine: &MachineName) {
    let Some(worker) = moves.processes.machines.get(machine) else {
        return;
    };
    // What moves it, ends it or starts it anew waits: its epoch is about to be raised.
    if worker.report().await.is_ok_and(|report| report.moving_away)
        && let Some(held) = hold(&moves.processes, machine)
    {
        settle_after_move(moves, machine).await;
        held.release(&moves.processes, machine);
    }
}

async fn settle_after_move(moves: &Arc<Moves>, machine: &MachineName) {
    loop {
        // (Each time: another machine of its name may have come, and be moving.)
        let Some(worker) = moves.processes.machines.get(machine) else {
            return;
        };
        match worker.report().await {
            Ok(report) if report.moving_away => {}
            _ => return,
        }
        let mut mine = false;
        let mut raised = None;
        let claim = |record: &mut Record| {
            mine = record.owner == moves.context.name && !record.status.ended();
            // Once, also where the answer to it was lost.
            let raises = mine && raised != Some(record.epoch);
            if raises {
                record.epoch = record.epoch.next();
                raised = Some(record.epoch);
            }
            raises
        };
        match records::update(&*moves.context.store, machine, claim, |txn, _| txn).await {
            Ok(record) if mine => {
                tracing::warn!(%machine, "a move was cut off by the moves's end; it goes on here");
                let text = "its move was cut off by the moves's end; it goes on here";
                let taken_up = Note::machine(EventKind::MoveTakenUp, machine, text);
                moves.context.events.record(taken_up.under(record.epoch));
                let thawed: Result<(), RpcError> =
                    worker.ask(kind::THAW, &record.epoch, PROMPT).await;
                match thawed {
                    Ok(()) => return,
                    // It ended, or its worker is lost: others see to that.
                    Err(error) if !worker.report().await.is_ok_and(|it| it.moving_away) => {
                        tracing::warn!(%machine, %error, "it does not go on");
                        return;
                    }
                    Err(error) => {
                        tracing::error!(%machine, %error, "it does not go on yet");
                        tokio::time::sleep(RETRY_AFTER).await;
                    }
                }
            }
            // The commit had won, and the target may not live to go on.
            Ok(record) if needs_copy(&moves.context.name, &record.status) => {
                let text = "its move was committed when the moves ended; it is taken up";
                let taken_up = Note::machine(EventKind::MoveTakenUp, machine, text);
                moves.context.events.record(taken_up.under(record.epoch));
                let post_copy = worker.report().await.is_ok_and(|report| report.post_copy);
                take_up(moves, record, worker, post_copy).await;
                return;
            }
            // It runs elsewhere, or ended: the frozen copy is of no use.
            Ok(_) | Err(RecordError::NoMachine(_)) => {
                moves
                    .processes
                    .machines
                    .forget_exactly(&moves.context.dir, machine, Some(&worker))
                    .await;
                return;
            }
            Err(error) => {
                tracing::warn!(%machine, %error, "whose it is is not settled yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// Keeps a machine from being moved, ended or started anew until it is released.
struct Held(watch::Sender<bool>);

/// Holds a machine that no move concerns; `None` if one does.
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
    /// Lets whoever waits go on.
    fn release(self, processes: &Processes, machine: &MachineName) {
        processes.exclusion.moves().remove(machine);
        self.0.send_replace(true);
    }
}

/// Withdraws what an earlier agent of this node offered and can no longer go on
/// with, so that the targets need not wait for it.
pub(crate) async fn withdraw_old_offers(moves: Arc<Moves>) {
    let listing = match moves.context.store.list(keys::RESERVATIONS).await {
        Ok(listing) => listing,
        Err(error) => {
            tracing::warn!(%error, "old offers end by themselves");
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
        tracing::info!(%machine, %target, "withdrawing the offer of an earlier moves");
        if let Ok(payload) = pack(&machine) {
            let told = moves
                .context
                .peers
                .call(&target, WITHDRAW, payload, PROMPT)
                .await;
            if let Err(error) = told {
                tracing::info!(%machine, %target, %error, "it ends by itself there");
            }
        }
    }
}
