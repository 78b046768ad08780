//! Source of a move: feeds the state machine of `keel-machine` with what
//! happens, and carries out what it says.
//!
//! - `driver`: that, step by step
//! - `proofs`: what a target must have
//!
//! Here is how a move begins, is taken up by the next agent, and is ended from outside.

mod driver;
mod proofs;

use driver::Driver;
pub(crate) use proofs::{Proofs, needed_features};

use crate::agent::Agent;
use crate::events::Note;
use crate::offer::Offer;
use crate::record;
use crate::rules::{self, Claims};
use crate::spanning::{self, ROOM_BYTES_MIN};
use crate::workers::Worker;
use keel_api::{CheckpointRequest, EventKind, MoveLine, Urgency};
use keel_cluster::clock::unix_ms;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::moves::convergence::LAST_PAGES_BUDGET;
use keel_machine::moves::{Ending, MoveReport, SourceEvent, SourceMove, SourceState};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{Report, State};
use keel_net::Fingerprint;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// Begins what is said of a commit that lost against another placement.
pub(crate) const RACED: &str = "raced with another change of what a rule holds:";

/// What a user wants moved, and how.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MoveOrder {
    pub(crate) machine: MachineName,
    pub(crate) target: NodeName,
    /// Whether memory comes after the machine.
    pub(crate) post_copy: bool,
    /// Where the checkpoint goes that such a move begins with.
    pub(crate) checkpoint_to: Option<String>,
    pub(crate) urgency: Urgency,
    /// How long sending what is left may take while the machine stands still, in
    /// microseconds.
    pub(crate) budget_micros: Option<u64>,
}

impl MoveOrder {
    fn budget(&self) -> Duration {
        self.budget_micros
            .map_or(LAST_PAGES_BUDGET, Duration::from_micros)
    }
}

/// What others can do to a move that is under way.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    interrupt: watch::Sender<Option<SourceEvent>>,
    over: watch::Receiver<bool>,
}

impl Handle {
    /// Asks the move to stop; it may be too late.
    pub(crate) fn cancel(&self, reason: &str) {
        self.interrupt
            .send_replace(Some(SourceEvent::Cancel(reason.to_owned())));
    }

    /// Waits until the move is over, one way or the other.
    pub(crate) async fn over(mut self) {
        // A sender that is gone means the same.
        let _ = self.over.wait_for(|over| *over).await;
    }
}

/// Keeps a machine from being moved, ended or started anew until it is released.
pub(crate) struct Held(watch::Sender<bool>);

/// Holds a machine that no move concerns; `None` if one does.
pub(crate) fn hold(agent: &Agent, machine: &MachineName) -> Option<Held> {
    let (interrupt, _) = watch::channel(None);
    let (over_sender, over) = watch::channel(false);
    let mut moves = agent.moves();
    if moves.contains_key(machine) {
        return None;
    }
    moves.insert(machine.clone(), Handle { interrupt, over });
    Some(Held(over_sender))
}

impl Held {
    /// Lets whoever waits go on.
    pub(crate) fn release(self, agent: &Agent, machine: &MachineName) {
        agent.moves().remove(machine);
        self.0.send_replace(true);
    }
}

/// The machine ended by itself: a move of it, if there is one, is told.
pub(crate) fn machine_ended(agent: &Agent, machine: &MachineName) {
    if let Some(handle) = agent.moves().get(machine) {
        handle
            .interrupt
            .send_replace(Some(SourceEvent::MachineEnded));
    }
}

/// Begins a move of a machine that runs here. What comes is told line by line.
pub(crate) async fn begin(
    agent: &Arc<Agent>,
    machine: &MachineName,
    order: &MoveOrder,
) -> Result<mpsc::Receiver<MoveLine>, String> {
    let target = &order.target;
    let found = record::settled(&*agent.store, machine)
        .await
        .map_err(|error| error.to_string())?;
    let record = found.record;
    if record.owner != agent.name {
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
    if *target == agent.name {
        return Err(format!("machine {machine:?} is on {target} already"));
    }
    if !agent.members.contains(target) {
        return Err(format!("there is no node {target:?} (see `keel nodes`)"));
    }
    rules::claim(agent, machine, target)
        .await
        .map_err(|error| error.to_string())?;
    let worker = agent
        .workers
        .get(machine)
        .ok_or_else(|| format!("machine {machine:?} has no worker here"))?;
    // (All memory of one that spans stays with its parts.)
    let spans = worker.report().await.is_ok_and(|report| report.parts > 0);
    let post_copy = order.post_copy && !spans;
    if post_copy {
        let request = CheckpointRequest {
            to: order.checkpoint_to.clone(),
            ..CheckpointRequest::default()
        };
        crate::keep::checkpoint(agent, machine, request)
            .await
            .map_err(|error| {
                format!("a post-copy move needs a checkpoint to fall back on: {error}")
            })?;
    }
    // It may have been given to this node and not have gone on yet.
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
    let (interrupt, interrupted) = watch::channel(None);
    let (over_sender, over) = watch::channel(false);
    {
        let mut moves = agent.moves();
        if moves.contains_key(machine) {
            return Err(format!(
                "machine {machine:?} is moving already (see `keel inspect {machine}`)"
            ));
        }
        moves.insert(machine.clone(), Handle { interrupt, over });
    }
    let begun = Note::machine(
        EventKind::MoveStarted,
        machine,
        format!("moves to {target}"),
    );
    let begun = begun.under(record.epoch).with("target", target);
    agent.events.record(begun);
    let (lines, receiver) = mpsc::channel(64);
    let mut driver = Driver {
        agent: agent.clone(),
        report: new_report(&record, target),
        source: SourceMove::new(record.epoch, post_copy),
        post_copy,
        record,
        revision: found.revision,
        target: target.clone(),
        worker,
        interrupted,
        lines,
        receiving: None,
        begun: Instant::now(),
        prepared: None,
        lane: None,
        budget: order.budget(),
        claims: Claims::default(),
        spans: false,
        apart: None,
    };
    let (agent, machine, urgency) = (agent.clone(), machine.clone(), order.urgency);
    tokio::spawn(async move {
        driver.drive(urgency).await;
        agent.moves().remove(&machine);
        let apart = driver.apart.take();
        // (What came of its successor may not be known.)
        let stays = matches!(driver.source.state(), SourceState::Stayed { .. });
        if driver.spans || apart.is_some() {
            let (agent, machine) = (agent.clone(), machine.clone());
            tokio::spawn(async move {
                if stays {
                    spanning::let_successors_go(&agent, &machine).await;
                }
                if let Some(apart) = apart {
                    spanning::apart_again(&agent, &machine, apart);
                }
            });
        }
        over_sender.send_replace(true);
    });
    Ok(receiver)
}

/// Takes up a move that was handed over by an agent that has died since: the
/// frozen copy is kept until the target says that the machine runs, or taken
/// back. `record` is what the commit wrote.
pub(crate) async fn take_up(agent: &Arc<Agent>, record: Record, worker: Worker, post_copy: bool) {
    let target = record.owner.clone();
    let epoch = Epoch {
        counter: record.epoch.counter.saturating_sub(1),
        ..record.epoch
    };
    let record = Record {
        owner: agent.name.clone(),
        epoch,
        status: Status::Running,
        ..record
    };
    let machine = record.name.clone();
    let (interrupt, interrupted) = watch::channel(None);
    let (over_sender, over) = watch::channel(false);
    agent
        .moves()
        .insert(machine.clone(), Handle { interrupt, over });
    let (source, commands) = SourceMove::handed(epoch, post_copy);
    let (lines, _) = mpsc::channel(1);
    let mut driver = Driver {
        agent: agent.clone(),
        report: new_report(&record, &target),
        source,
        post_copy,
        record,
        revision: 0,
        target,
        worker,
        interrupted,
        lines,
        receiving: None,
        begun: Instant::now(),
        prepared: None,
        lane: None,
        budget: LAST_PAGES_BUDGET,
        claims: Claims::default(),
        spans: false,
        apart: None,
    };
    driver.carry_on(commands.into()).await;
    agent.moves().remove(&machine);
    over_sender.send_replace(true);
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

/// What is asked of a target.
pub(crate) fn offer_of(
    record: &Record,
    revision: u64,
    report: &Report,
    worker: Fingerprint,
    proofs: &Proofs,
    post_copy: bool,
) -> Result<Offer, String> {
    // (Of cluster volumes next to nothing comes.)
    let own = record.spec.own_volumes();
    let volumes = report.volumes.iter();
    let volumes = volumes.filter(|volume| own.contains(&volume.number));
    Ok(Offer {
        machine: record.name.clone(),
        spec: record.spec.clone(),
        program: Fingerprint(report.program.ok_or("it has no program")?),
        epoch: record.epoch,
        revision,
        worker,
        memory_pages: to_come(report),
        volume_bytes: volumes.map(|volume| volume.bytes).sum(),
        features: needed_features(),
        proofs: proofs.list(),
        post_copy,
    })
}

/// How much of each memory is to come. Of a machine that spans nothing must: its home becomes
/// one of its parts, which have the rest.
fn to_come(report: &Report) -> Vec<u64> {
    let mut pages = report.memory_pages.clone();
    if report.parts > 0 {
        pages.fill(0);
        if let Some(first) = pages.first_mut() {
            *first = ROOM_BYTES_MIN >> 16;
        }
    }
    pages
}
