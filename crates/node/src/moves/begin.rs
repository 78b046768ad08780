//! Begins a move, or recovers one whose agent has died.

use super::handle::{MoveOrder, Moves};
use super::source::Driver;
use crate::events::Note;
use crate::processes::{MoveHandle, WorkerHandle};
use crate::records;
use crate::rules::Claims;
use crate::spanning::{release_successors, restore_placement};
use keel_api::{CheckpointRequest, EventKind, MoveLine};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::moves::convergence::LAST_PAGES_BUDGET;
use keel_machine::moves::{Ending, MoveReport, SourceMove, SourceState};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::State;
use keel_store::clock::unix_ms;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;

/// Begins a move of a machine that runs here. Progress is streamed line by line.
pub(crate) async fn begin(
    moves: &Arc<Moves>,
    machine: &MachineName,
    order: &MoveOrder,
) -> Result<mpsc::Receiver<MoveLine>, String> {
    let target = &order.target;
    let found = records::settled(&*moves.context.store, machine)
        .await
        .map_err(|error| error.to_string())?;
    let record = found.record;
    if record.owner != moves.context.name {
        return Err(format!(
            "machine {machine:?} is on {} now; try again",
            record.owner
        ));
    }
    if record.status != Status::Running {
        return Err(format!(
            "machine {machine:?} is {}, only a running one can move",
            record.status.word()
        ));
    }
    if *target == moves.context.name {
        return Err(format!("machine {machine:?} is on {target} already"));
    }
    if !moves.context.members.contains(target) {
        return Err(format!("there is no node {target:?} (see `keel nodes`)"));
    }
    moves
        .rules
        .claim(machine, target)
        .await
        .map_err(|error| error.to_string())?;
    let worker = moves
        .processes
        .machines
        .get(machine)
        .ok_or_else(|| format!("machine {machine:?} has no worker here"))?;
    // The memory of a spanning machine stays with its parts.
    let spans = worker.report().await.is_ok_and(|report| report.parts > 0);
    let post_copy = order.post_copy && !spans;
    if post_copy {
        let kind = moves.context.kinds.of(&record.spec)?;
        if !kind.abilities().post_copy {
            return Err(format!(
                "machine {machine:?} is of kind {}, whose memory cannot follow it (post-copy)",
                record.spec.kind
            ));
        }
        // What begins anew when it fails needs no checkpoint.
        if kind.abilities().restarts_from_checkpoints {
            let request = CheckpointRequest {
                to: order.checkpoint_to.clone(),
                ..CheckpointRequest::default()
            };
            let made = moves.checkpoints.create_here(machine, request).await;
            made.map_err(|error| {
                format!("a post-copy move needs a checkpoint to fall back on: {error}")
            })?;
        }
    }
    // A move to this node may have committed without having resumed the machine yet.
    match worker.state().await {
        Ok(State::Running { epoch }) if epoch == record.epoch => {}
        Ok(State::Ended { .. }) => return Err(format!("machine {machine:?} has ended")),
        Ok(state) => {
            return Err(format!(
                "machine {machine:?} is not ready to move: {state}; try again"
            ));
        }
        Err(error) => return Err(format!("its worker does not answer: {error}")),
    }
    let (handle, ends) = MoveHandle::new();
    {
        let mut under_way = moves.processes.exclusion.moves();
        if under_way.contains_key(machine) {
            return Err(format!(
                "machine {machine:?} is moving already (see `keel inspect {machine}`)"
            ));
        }
        under_way.insert(machine.clone(), handle);
    }
    let begun = Note::machine(
        EventKind::MoveStarted,
        machine,
        format!("moves to {target}"),
    );
    let begun = begun.under(record.epoch).with("target", target);
    moves.context.events.record(begun);
    let (lines, receiver) = mpsc::channel(64);
    let trace = moves.context.traces.begin("move");
    let mut driver = Driver {
        trace,
        moves: moves.clone(),
        report: new_report(&record, target),
        source: SourceMove::new(record.epoch, record.next_epoch(), post_copy),
        post_copy,
        committed: record.next_epoch(),
        record,
        revision: found.revision,
        target: target.clone(),
        worker,
        interrupted: ends.interrupted,
        lines,
        receiving: None,
        begun: Instant::now(),
        prepared: None,
        place: None,
        budget: order.budget(),
        claims: Claims::default(),
        spans: false,
        placement: None,
    };
    let (moves, machine, urgency) = (moves.clone(), machine.clone(), order.urgency);
    tokio::spawn(async move {
        driver.drive(urgency).await;
        moves.processes.exclusion.moves().remove(&machine);
        let placement = driver.placement.take();
        // The state of its successor part may be unknown.
        let stayed = match driver.source.state() {
            SourceState::Stayed { epoch, .. } => Some(*epoch),
            _ => None,
        };
        let epoch = stayed.unwrap_or(driver.committed);
        if driver.spans || placement.is_some() {
            let (spanning, machine) = (moves.spanning.clone(), machine.clone());
            tokio::spawn(async move {
                if stayed.is_some() {
                    release_successors(&spanning, &machine).await;
                }
                if let Some(placement) = placement {
                    restore_placement(&spanning, &machine, placement, epoch);
                }
            });
        }
        ends.over.send_replace(true);
    });
    Ok(receiver)
}

/// Takes over a committed move whose agent has died. The frozen copy is kept until the target
/// reports that the machine runs, or the machine is taken back. `record` is the state that the
/// commit wrote.
pub(crate) async fn take_over(
    moves: &Arc<Moves>,
    record: Record,
    worker: WorkerHandle,
    post_copy: bool,
) {
    let target = record.owner.clone();
    let committed = record.epoch;
    // Some epoch that it follows.
    let epoch = Epoch {
        counter: record.epoch.counter.saturating_sub(1),
        ..record.epoch
    };
    let record = Record {
        owner: moves.context.name.clone(),
        epoch,
        status: Status::Running,
        ..record
    };
    let machine = record.name.clone();
    let (handle, ends) = MoveHandle::new();
    moves
        .processes
        .exclusion
        .moves()
        .insert(machine.clone(), handle);
    let (source, commands) = SourceMove::handed(epoch, committed, post_copy);
    let (lines, _) = mpsc::channel(1);
    // The trace of the agent that began the move ended with it.
    let trace = moves.context.traces.begin("move");
    let mut driver = Driver {
        trace,
        moves: moves.clone(),
        report: new_report(&record, &target),
        source,
        post_copy,
        record,
        committed,
        revision: 0,
        target,
        worker,
        interrupted: ends.interrupted,
        lines,
        receiving: None,
        begun: Instant::now(),
        prepared: None,
        place: None,
        budget: LAST_PAGES_BUDGET,
        claims: Claims::default(),
        spans: false,
        placement: None,
    };
    driver.run_commands(commands.into()).await;
    moves.processes.exclusion.moves().remove(&machine);
    ends.over.send_replace(true);
}

fn new_report(record: &Record, target: &NodeName) -> MoveReport {
    MoveReport {
        machine: record.name.clone(),
        source: record.owner.clone(),
        target: target.clone(),
        epoch: record.epoch,
        started_unix_ms: unix_ms(),
        ending: Ending::Moved,
        offer_micros: 0,
        copy_micros: 0,
        rounds: Vec::new(),
        slowed: false,
        freeze_micros: 0,
        last_pages_micros: 0,
        last_bytes: 0,
        state_micros: 0,
        commit_micros: 0,
        resume_micros: 0,
        downtime_micros: 0,
        bytes: 0,
        total_micros: 0,
        fill: None,
        predicted: None,
    }
}
