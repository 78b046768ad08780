//! The balancer's task: feeds measurements, requests and answers to the state machine of
//! `keel-balance`, and carries out its commands.

use super::actions::{carry_out_move, repair_now};
use super::constraints::Snapshot;
use super::declared_load::promised;
use super::handle::{Inbox, Input, NodeBalancer};
use super::ledger_transfer::{send_along, send_ledger_lines};
use super::meter::{Measured, Meter, RunningMachine};
use super::peers::ask;
use super::policy::follow_policy;
use super::{compile_ahead, dirty_rate_sampler, drain, fine_grained, memory_reclaim, speed};
use crate::events::Note;
use crate::records::PlacementChange;
use keel_api::EventKind;
use keel_balance::Name;
use keel_balance::cost::CostModel;
use keel_balance::ledger::{Decision, Line, Outcome};
use keel_balance::load::NodeSample;
use keel_balance::policy::{Mode, Policy};
use keel_balance::round::{Balancer, Command, Event, Response};
use keel_balance::rules::{Repair, repair};
use keel_cluster::gossip::Load;
use keel_cluster::{MachineName, NodeName};
use keel_store::clock::unix_ms;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

/// Pause between two repairs if the first one failed.
const REPAIR_EVERY: Duration = Duration::from_secs(2);
/// Pause before the violation of an unsatisfiable rule is reported again.
const HELPLESS_EVERY: Duration = Duration::from_secs(60);
/// How long a repair may take.
const ARRIVAL_MAX: Duration = Duration::from_secs(3600);
/// Most milliseconds between two steps of the state machine, which are events mostly.
const WAIT_MS_MAX: u64 = 5_000;
/// Samples between two attempts to measure the speed of this node.
const CALIBRATE_EVERY: u32 = 30;

/// Runs until the agent ends.
pub(crate) fn start(
    handle: &Arc<NodeBalancer>,
    inbox: Inbox,
    changes: UnboundedReceiver<PlacementChange>,
) {
    let (events, mut told) = unbounded_channel();
    tokio::spawn(drain::follow(handle.clone()));
    tokio::spawn(dirty_rate_sampler::follow(handle.clone()));
    tokio::spawn(fine_grained::follow(handle.clone()));
    tokio::spawn(memory_reclaim::follow(handle.clone()));
    tokio::spawn(compile_ahead::run(handle.clone()));
    tokio::spawn(send_ledger_lines(handle.clone(), inbox.ended_moves));
    tokio::spawn(follow_policy(handle.clone(), events.clone()));
    tokio::spawn(follow_placements(changes, events.clone()));
    tokio::spawn(follow_peers(handle.clone(), events));
    let inputs = handle.inputs.clone();
    tokio::spawn(async move {
        while let Some(event) = told.recv().await {
            if inputs.send(Input::Event(event)).is_err() {
                return;
            }
        }
    });
    let sample_ms = Arc::new(AtomicU64::new(Policy::default().sample_ms));
    if let Err(error) = measure_for_ever(handle, sample_ms.clone()) {
        tracing::error!(%error, "cannot measure this node; it takes no part in balancing");
    }
    let seed = rand::random();
    let task = Task {
        handle: handle.clone(),
        balancer: Balancer::new(Policy::default(), 0, CostModel::default(), seed),
        begun: Instant::now(),
        replies: HashMap::new(),
        tickets: 0,
        peers: Vec::new(),
        sample_ms,
        repair_after: Instant::now(),
    };
    tokio::spawn(task.run(inbox.inputs));
}

/// Measures on a thread of its own, because reading `/proc` may block.
fn measure_for_ever(handle: &Arc<NodeBalancer>, sample_ms: Arc<AtomicU64>) -> std::io::Result<()> {
    let inputs = handle.inputs.clone();
    let (workers, parts) = (
        handle.processes.machines.clone(),
        handle.processes.members.clone(),
    );
    let traffic = handle.context.traffic.clone();
    let mut meter = Meter::new(handle.context.dir.clone(), handle.context.kinds.clone());
    std::thread::Builder::new()
        .name("measure".into())
        .spawn(move || {
            let mut speed = None;
            for turn in 0u32.. {
                if speed.is_none() && turn % CALIBRATE_EVERY == 0 {
                    speed = speed::calibrate();
                }
                let measured = meter.measure(&workers, &parts, &traffic, speed.unwrap_or(1.0));
                if let Some(measured) = measured
                    && inputs.send(Input::Measured(Box::new(measured))).is_err()
                {
                    return;
                }
                let sample_ms = sample_ms.load(Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(sample_ms));
            }
        })?;
    Ok(())
}

struct Task {
    handle: Arc<NodeBalancer>,
    balancer: Balancer,
    begun: Instant,
    replies: HashMap<u64, oneshot::Sender<Response>>,
    tickets: u64,
    /// Other nodes that are alive and answer.
    peers: Vec<Name>,
    /// Sample interval in milliseconds, by the policy.
    sample_ms: Arc<AtomicU64>,
    /// Time of the next search for rule violations.
    repair_after: Instant,
}

impl Task {
    async fn run(mut self, mut inputs: UnboundedReceiver<Input>) {
        loop {
            let now_ms = self.now_ms();
            let wait = self.balancer.wake_at_ms().saturating_sub(now_ms);
            let wait = wait.min(WAIT_MS_MAX);
            let input = tokio::time::timeout(Duration::from_millis(wait), inputs.recv()).await;
            let event = match input {
                Err(_) => Event::Tick,
                Ok(None) => return,
                Ok(Some(Input::Event(event))) => event,
                Ok(Some(Input::Measured(measured))) => {
                    let measured = self.sample(*measured);
                    let counted = self.counted(&measured);
                    let weights = self.balancer.policy().0.weights;
                    let recorder = &self.handle.recorder;
                    recorder.take(unix_ms(), counted.load(&weights), &measured, weights);
                    Event::Sample(counted)
                }
                Ok(Some(Input::Asked(peer, question, reply))) => {
                    self.tickets += 1;
                    self.replies.insert(self.tickets, reply);
                    Event::RequestReceived {
                        ticket: self.tickets,
                        peer,
                        request: question,
                    }
                }
                Ok(Some(Input::Query(query))) => {
                    query(&self.balancer, now_ms, &self.snapshot());
                    continue;
                }
                Ok(Some(Input::RepairOver)) => {
                    self.repair_after = Instant::now() + REPAIR_EVERY;
                    continue;
                }
            };
            if let Event::Policy(policy, _) = &event {
                self.sample_ms.store(policy.sample_ms, Ordering::Relaxed);
            }
            if let Event::Peers(peers) = &event {
                self.peers = peers.iter().cloned().collect();
            }
            let snapshot = self.snapshot();
            let is_sample = matches!(event, Event::Sample(_));
            if is_sample {
                self.repair(&snapshot);
            }
            let now_ms = self.now_ms();
            for command in self.balancer.step(event, now_ms, &snapshot) {
                self.carry_out(command);
            }
            if is_sample && let Some(state) = self.balancer.node_state() {
                self.handle.gossip.measured(Load {
                    load: state.load as f32,
                    memory_free_bytes: state.memory_free_bytes,
                    is_pressed: state.pressed,
                });
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        let own = Name::from(self.handle.context.name.as_str());
        // Rules count what is on a node also while it does not answer datagrams.
        let alive = self.handle.alive.now();
        let alive = alive.iter().map(|it| Name::from(it.as_str()));
        let nodes: Vec<Name> = alive.filter(|it| *it != own).chain([own.clone()]).collect();
        let spanning = self.handle.spanning.marked();
        let spanning = spanning.iter().map(|it| Name::from(it.as_str())).collect();
        Snapshot::new(
            self.handle.rules.cache.snapshot_of(nodes),
            &self.handle.placements,
            (spanning, &self.handle.spreading),
            (self.handle.code.clone(), self.handle.links.clone()),
            unix_ms(),
        )
    }

    /// Moves a machine that violates a rule here to another node, whatever the loads are.
    fn repair(&mut self, snapshot: &Snapshot) {
        if Instant::now() < self.repair_after || self.balancer.policy().0.mode != Mode::Automatic {
            return;
        }
        let here = self.handle.context.name.as_str();
        let movable = |machine: &Name| {
            let placed = self.handle.placements.get(machine);
            placed.is_some_and(|placed| placed.movable)
        };
        let targets = |machine: &Name| {
            let mut targets = self.peers.clone();
            targets.retain(|target| snapshot.forbids(machine, target).is_none());
            targets
        };
        let broken = snapshot.broken_on(here);
        let draw = |count| rand::random_range(0..count);
        let Some(Repair {
            machine,
            broken,
            target,
        }) = repair(broken, movable, targets, draw)
        else {
            return;
        };
        let pause = if target.is_some() {
            ARRIVAL_MAX
        } else {
            HELPLESS_EVERY
        };
        self.repair_after = Instant::now() + pause;
        self.record(Decision::Repair {
            machine: machine.clone(),
            target: target.clone(),
            broken: broken.clone(),
        });
        if let Some(target) = target {
            let handle = self.handle.clone();
            tokio::spawn(async move { repair_now(&handle, machine, target, broken).await });
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The sample with target loads in place of measurements, for the machines to which they
    /// apply.
    fn counted(&self, measured: &NodeSample) -> NodeSample {
        let basis = self.balancer.policy().0.basis;
        let mut counted = measured.clone();
        for machine in &mut counted.machines {
            if let Some(placed) = self.handle.placements.get(&machine.name) {
                let capacity = &measured.capacity;
                machine.factors = promised(&placed.balancing, machine.factors, capacity, basis);
            }
        }
        counted
    }

    /// The part of the measurement that runs here.
    fn sample(&self, mut measured: Measured) -> NodeSample {
        *self
            .handle
            .traffic
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut measured.traffic);
        measured.sample(|machine| {
            let placed = self.handle.placements.get(machine.as_str())?;
            (placed.live && placed.owner == self.handle.context.name).then(|| RunningMachine {
                cores_max: placed.cores_max,
                dirty_bytes_per_s: self.handle.dirty_rates.of(machine),
            })
        })
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::SendRequest {
                round,
                peer,
                request: question,
            } => {
                let handle = self.handle.clone();
                tokio::spawn(async move {
                    let answer = ask(&handle, &peer, &question).await;
                    let answer = answer.inspect_err(|error| {
                        tracing::debug!(%peer, error, "a balancer did not answer");
                    });
                    let answer = answer.ok();
                    handle.tell(Event::ResponseReceived {
                        round,
                        response: answer,
                    });
                });
            }
            Command::SendResponse {
                ticket,
                response: answer,
            } => {
                if let Some(reply) = self.replies.remove(&ticket) {
                    // The caller may have gone.
                    let _ = reply.send(answer);
                }
            }
            Command::Move { machine, target } => {
                let handle = self.handle.clone();
                let movable = self
                    .handle
                    .placements
                    .get(&machine)
                    .is_some_and(|placed| placed.movable);
                let slots_max = self.balancer.policy().0.moves_at_once(self.peers.len() + 1);
                tokio::spawn(async move {
                    let outcome = if movable {
                        carry_out_move(&handle, &machine, &target, slots_max).await
                    } else {
                        Outcome::Stayed {
                            why: "it is not running at present".into(),
                        }
                    };
                    handle.tell(Event::MoveEnded { machine, outcome });
                });
            }
            Command::Record(decision) => self.record(*decision),
            Command::Alert(text) => {
                tracing::warn!("{text}");
                let note = Note::node(EventKind::BalanceHelpless, text);
                self.handle.context.events.record(note);
            }
        }
    }

    fn record(&self, decision: Decision) {
        tracing::info!(decision = %decision, "balancer");
        if let Decision::Move {
            machine, target, ..
        } = &decision
            && let Ok(name) = MachineName::new(machine)
        {
            let note = Note::machine(EventKind::BalanceDecided, &name, decision.to_string());
            self.handle
                .context
                .events
                .record(note.with("target", target));
        }
        let along = match &decision {
            Decision::Ended {
                machine,
                target,
                outcome: Outcome::Moved { .. },
                ..
            } => MachineName::new(machine)
                .ok()
                .zip(NodeName::new(target).ok()),
            _ => None,
        };
        let decides = matches!(decision, Decision::Move { .. } | Decision::NoMove { .. });
        let ledger = &self.handle.ledger;
        ledger.keep(Line {
            at_unix_ms: unix_ms(),
            node: ledger.node().clone(),
            policy: decides.then(|| self.balancer.policy().0.clone()),
            model: decides.then(|| *self.balancer.model()),
            decision,
        });
        // The outcome of a move follows the machine.
        if let Some((machine, target)) = along {
            send_along(&self.handle, &machine, &target);
        }
    }
}

/// Informs the balancer of machines that arrived, left, or are arriving.
async fn follow_placements(
    mut changes: UnboundedReceiver<PlacementChange>,
    events: UnboundedSender<Event>,
) {
    while let Some(change) = changes.recv().await {
        let name = |machine: &MachineName| machine.as_str().into();
        let event = match &change {
            PlacementChange::Arrived { machine, source } => Event::Arrived {
                machine: name(machine),
                from: source.as_str().into(),
            },
            PlacementChange::Left { machine } => Event::Departed {
                machine: name(machine),
            },
            PlacementChange::Arriving { machine } => Event::Arriving {
                machine: name(machine),
            },
            PlacementChange::ArrivalFailed { machine } => Event::ArrivalFailed {
                machine: name(machine),
            },
        };
        // The balancer ends with the agent.
        if events.send(event).is_err() {
            return;
        }
    }
}

/// Informs the balancer which other nodes are alive and answer.
async fn follow_peers(handle: Arc<NodeBalancer>, events: UnboundedSender<Event>) {
    let mut alive = handle.alive.changes();
    let mut doubted = handle.gossip.doubted();
    loop {
        let peers: Vec<Name> = {
            let (alive, doubted) = (alive.borrow_and_update(), doubted.borrow_and_update());
            let others = alive.iter().filter(|it| **it != handle.context.name);
            let others = others.filter(|it| !doubted.contains(*it));
            others.map(|it| it.as_str().into()).collect()
        };
        if events.send(Event::Peers(peers.into())).is_err() {
            return;
        }
        tokio::select! {
            changed = alive.changed() => if changed.is_err() {
                return;
            },
            changed = doubted.changed() => if changed.is_err() {
                return;
            },
        }
    }
}
