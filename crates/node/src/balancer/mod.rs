//! The balancer of this node: feeds the state machine of `keel-balance` with what is
//! measured, asked and answered, and carries out what it says.
//!
//! - `meter`, `speed`: measuring this node
//! - `placements`: where all machines are
//! - `bounds`: what rules allow
//! - `eligible`: which machines may run here
//! - `slots`: how many moves may be under way
//! - `writes`: how much machines write
//! - `ledger`: decisions as they are kept
//! - `recorder`: loads as they are kept
//! - `ask`: what users and other nodes ask of it
//! - `placing`: where new machines start
//! - `plan`: plans for all nodes, and carrying them out
//! - `drain`: emptying this node
//! - `grains`: threads and memory of machines that may have parts elsewhere
//!
//! ```text
//!   meter thread ──┐
//!   store's watches┼─▶ events ─▶ Balancer::step ─▶ asks, replies ─▶ other nodes
//!   other nodes ───┘                            └▶ moves ─▶ `moving`
//!                                               └▶ decisions ─▶ ledger thread
//! ```

mod ask;
mod bounds;
mod database;
mod drain;
mod eligible;
mod grains;
mod ledger;
mod meter;
mod placements;
mod placing;
mod plan;
mod recorder;
mod slots;
mod speed;
mod writes;

pub(crate) use ask::{
    answer, change_policy, confirm, gather_ledger, gather_loads, history, why_not,
};
pub(crate) use drain::{begin as begin_drain, end as end_drain, info as drain_info};
pub(crate) use eligible::may_run_here;
pub(crate) use grains::begins_spread;
pub(crate) use ledger::{Ledger, Wanted, send_along};
pub(crate) use placing::choose as choose_node;
pub(crate) use plan::{carry_out as carry_out_plan, make as make_plan};
pub(crate) use recorder::{Recorder, Span};

use crate::agent::Agent;
use crate::events::Note;
use crate::moving::{self, MoveOrder};
use crate::service::kind as node_kind;
use bounds::{Followed, Snapshot};
use keel_api::{EventKind, MoveLine, PeerTraffic, Urgency};
use keel_balance::Name;
use keel_balance::cost::CostModel;
use keel_balance::ledger::{Decision, Line, Outcome};
use keel_balance::load::{Capacity, Factors, NodeSample};
use keel_balance::policy::{Basis, Mode, Policy};
use keel_balance::round::{Balancer, Command, Event, Request, Response};
use keel_balance::rules::{Repair, Violation, repair};
use keel_cluster::clock::unix_ms;
use keel_cluster::keys::{self, Key};
use keel_cluster::store::{Change, KeyValue, Revision};
use keel_cluster::{MachineName, NodeName, StoreError};
use keel_machine::moves::{Ending, MoveReport};
use keel_machine::spec::{BalanceBy, Balancing};
use keel_machine::worker::control::{pack, unpack};
use meter::{Measured, Meter, Runs};
use placements::Placements;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

/// How long another node may take to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);
/// Pause before the store is followed anew.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Pause between two repairs, where one failed too.
const REPAIR_EVERY: Duration = Duration::from_secs(2);
/// Pause before a rule that no node can keep is told of again.
const HELPLESS_EVERY: Duration = Duration::from_secs(60);
/// How long a repair may take.
const ARRIVAL_MAX: Duration = Duration::from_secs(3600);
/// Samples between two tries to tell how fast this node is.
const CALIBRATE_EVERY: u32 = 30;

/// Looks at the balancer between two of its steps.
type Look = Box<dyn FnOnce(&Balancer, u64, &Snapshot) + Send>;

/// What comes to the balancer's task.
enum Input {
    Event(Event),
    Measured(Box<Measured>),
    Asked(Name, Request, oneshot::Sender<Response>),
    Look(Look),
    /// A machine that broke a rule was moved, or was not.
    RepairOver,
}

/// What the rest of the agent has of its balancer.
#[derive(Clone)]
pub(crate) struct Handle {
    inputs: UnboundedSender<Input>,
    ledger: Ledger,
    recorder: Recorder,
    writes: writes::Writes,
    traffic: Arc<Mutex<Vec<PeerTraffic>>>,
    rules: Followed,
    placements: Arc<Placements>,
    spreading: grains::Spreading,
    drain: drain::Progress,
}

/// The other end of a [`Handle`], until the balancer runs.
pub(crate) struct Inbox(UnboundedReceiver<Input>);

/// A balancer that does not run yet.
pub(crate) fn prepare(ledger: Ledger, recorder: Recorder) -> (Handle, Inbox) {
    let (inputs, inbox) = unbounded_channel();
    let handle = Handle {
        inputs,
        ledger,
        recorder,
        writes: writes::Writes::default(),
        traffic: Arc::default(),
        rules: Followed::default(),
        placements: Arc::default(),
        spreading: grains::Spreading::default(),
        drain: drain::Progress::default(),
    };
    (handle, Inbox(inbox))
}

impl Handle {
    /// This node's ledger.
    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Answers another node's balancer.
    pub(crate) async fn answer(
        &self,
        peer: &NodeName,
        question: Request,
    ) -> Result<Response, String> {
        let (reply, answer) = oneshot::channel();
        let asked = Input::Asked(peer.as_str().into(), question, reply);
        self.inputs.send(asked).map_err(|_| ENDED.to_owned())?;
        answer.await.map_err(|_| ENDED.to_owned())
    }

    async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Balancer, u64, &Snapshot) -> T + Send + 'static,
    ) -> Result<T, String> {
        let (reply, answer) = oneshot::channel();
        let look: Look = Box::new(|balancer, now_ms, snapshot| {
            // Whoever asked may have gone.
            let _ = reply.send(look(balancer, now_ms, snapshot));
        });
        self.inputs
            .send(Input::Look(look))
            .map_err(|_| ENDED.to_owned())?;
        answer.await.map_err(|_| ENDED.to_owned())
    }

    fn tell(&self, event: Event) {
        // It ends with the agent.
        let _ = self.inputs.send(Input::Event(event));
    }
}

const ENDED: &str = "this node's balancer has ended with its agent";

/// Runs until the agent ends.
pub(crate) fn start(agent: &Arc<Agent>, inbox: Inbox) {
    let placements = agent.balancer.placements.clone();
    let (events, mut told) = unbounded_channel();
    tokio::spawn(placements::follow(
        agent.clone(),
        placements.clone(),
        events.clone(),
    ));
    tokio::spawn(placements::follow_arrivals(agent.clone(), events.clone()));
    let rules = agent.balancer.rules.clone();
    tokio::spawn(drain::follow(agent.clone()));
    tokio::spawn(writes::follow(agent.clone()));
    tokio::spawn(grains::follow(agent.clone()));
    tokio::spawn(follow_policy(agent.clone(), events.clone()));
    for prefix in [
        Key::Rules.to_string(),
        keys::NODE_LABELS.to_owned(),
        keys::MACHINE_LABELS.to_owned(),
        keys::DRAINS.to_owned(),
    ] {
        tokio::spawn(follow_rules(agent.clone(), prefix, rules.clone()));
    }
    tokio::spawn(follow_peers(agent.clone(), events));
    let inputs = agent.balancer.inputs.clone();
    tokio::spawn(async move {
        while let Some(event) = told.recv().await {
            if inputs.send(Input::Event(event)).is_err() {
                return;
            }
        }
    });
    let sample_ms = Arc::new(AtomicU64::new(Policy::default().sample_ms));
    if let Err(error) = measure_for_ever(agent, sample_ms.clone()) {
        tracing::error!(%error, "this node is not measured, and takes no part in balancing");
    }
    let seed = rand::random();
    let task = Task {
        agent: agent.clone(),
        placements,
        balancer: Balancer::new(Policy::default(), 0, CostModel::default(), seed),
        begun: Instant::now(),
        replies: HashMap::new(),
        tickets: 0,
        peers: Vec::new(),
        sample_ms,
        rules,
        repair_after: Instant::now(),
    };
    tokio::spawn(task.run(inbox.0));
}

/// Measures on a thread of its own: `/proc` may take its time.
fn measure_for_ever(agent: &Arc<Agent>, sample_ms: Arc<AtomicU64>) -> std::io::Result<()> {
    let inputs = agent.balancer.inputs.clone();
    let (workers, parts) = (agent.workers.clone(), agent.parts.clone());
    let traffic = agent.traffic.clone();
    let mut meter = Meter::new(agent.dir.clone());
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
    agent: Arc<Agent>,
    placements: Arc<Placements>,
    balancer: Balancer,
    begun: Instant,
    replies: HashMap<u64, oneshot::Sender<Response>>,
    tickets: u64,
    /// Other nodes that are alive.
    peers: Vec<Name>,
    /// Milliseconds from one sample to the next, as the policy says.
    sample_ms: Arc<AtomicU64>,
    rules: Followed,
    /// When machines that break rules are looked for again.
    repair_after: Instant,
}

impl Task {
    async fn run(mut self, mut inputs: UnboundedReceiver<Input>) {
        loop {
            let now_ms = self.now_ms();
            let wait = self.balancer.wake_at_ms().saturating_sub(now_ms).min(1000);
            let input = tokio::time::timeout(Duration::from_millis(wait), inputs.recv()).await;
            let event = match input {
                Err(_) => Event::Tick,
                Ok(None) => return,
                Ok(Some(Input::Event(event))) => event,
                Ok(Some(Input::Measured(measured))) => {
                    let measured = self.sample(*measured);
                    let counted = self.counted(&measured);
                    let weights = self.balancer.policy().0.weights;
                    let recorder = &self.agent.balancer.recorder;
                    recorder.take(unix_ms(), counted.load(&weights), &measured, weights);
                    Event::Sample(counted)
                }
                Ok(Some(Input::Asked(peer, request, reply))) => {
                    self.tickets += 1;
                    self.replies.insert(self.tickets, reply);
                    Event::RequestReceived {
                        ticket: self.tickets,
                        peer,
                        request,
                    }
                }
                Ok(Some(Input::Look(look))) => {
                    look(&self.balancer, now_ms, &self.snapshot());
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
            if matches!(event, Event::Sample(_)) {
                self.repair(&snapshot);
            }
            let now_ms = self.now_ms();
            for command in self.balancer.step(event, now_ms, &snapshot) {
                self.carry_out(command);
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        let own = Name::from(self.agent.name.as_str());
        let nodes: Vec<Name> = self.peers.iter().cloned().chain([own]).collect();
        let spanning = self.agent.spanning();
        let spanning = spanning.iter().map(|it| Name::from(it.as_str())).collect();
        Snapshot::new(
            &self.rules,
            &self.placements,
            &nodes,
            (spanning, &self.agent.balancer.spreading),
            self.agent.code.clone(),
            unix_ms(),
        )
    }

    /// Moves a machine away that breaks a rule here, whatever the loads are.
    fn repair(&mut self, snapshot: &Snapshot) {
        if Instant::now() < self.repair_after || self.balancer.policy().0.mode != Mode::Automatic {
            return;
        }
        let here = self.agent.name.as_str();
        let movable = |machine: &Name| {
            let placed = self.placements.get(machine);
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
            let agent = self.agent.clone();
            tokio::spawn(async move { repair_now(&agent, machine, target, broken).await });
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The same as it counts: machines by what they promise, where that is wanted.
    fn counted(&self, measured: &NodeSample) -> NodeSample {
        let basis = self.balancer.policy().0.basis;
        let mut counted = measured.clone();
        for machine in &mut counted.machines {
            if let Some(placed) = self.placements.get(&machine.name) {
                let capacity = &measured.capacity;
                machine.factors = promised(&placed.balancing, machine.factors, capacity, basis);
            }
        }
        counted
    }

    /// What runs here of what was measured.
    fn sample(&self, mut measured: Measured) -> NodeSample {
        *self
            .agent
            .balancer
            .traffic
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut measured.traffic);
        measured.sample(|machine| {
            let placed = self.placements.get(machine.as_str())?;
            (placed.live && placed.owner == self.agent.name).then(|| Runs {
                cores_max: placed.cores_max,
                dirty_bytes_per_s: self.agent.balancer.writes.of(machine),
            })
        })
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::SendRequest {
                round,
                peer,
                request,
            } => {
                let agent = self.agent.clone();
                tokio::spawn(async move {
                    let response = ask(&agent, &peer, &request).await;
                    let response = response.inspect_err(|error| {
                        tracing::debug!(%peer, error, "a balancer did not answer");
                    });
                    let response = response.ok();
                    agent
                        .balancer
                        .tell(Event::ResponseReceived { round, response });
                });
            }
            Command::SendResponse { ticket, response } => {
                if let Some(reply) = self.replies.remove(&ticket) {
                    // Whoever asked may have gone.
                    let _ = reply.send(response);
                }
            }
            Command::Move { machine, target } => {
                let agent = self.agent.clone();
                let movable = self
                    .placements
                    .get(&machine)
                    .is_some_and(|placed| placed.movable);
                let slots_max = self.balancer.policy().0.moves_at_once(self.peers.len() + 1);
                tokio::spawn(async move {
                    let outcome = if movable {
                        carry_out_move(&agent, &machine, &target, slots_max).await
                    } else {
                        Outcome::Stayed {
                            why: "it does not run just now".into(),
                        }
                    };
                    agent.balancer.tell(Event::MoveEnded { machine, outcome });
                });
            }
            Command::Record(decision) => self.record(*decision),
            Command::Alert(text) => {
                tracing::warn!("{text}");
                let note = Note::node(EventKind::BalanceHelpless, text);
                self.agent.events.record(note);
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
            self.agent.events.record(note.with("target", target));
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
        let ledger = self.agent.balancer.ledger();
        ledger.keep(Line {
            at_unix_ms: unix_ms(),
            node: ledger.node().clone(),
            policy: decides.then(|| self.balancer.policy().0.clone()),
            model: decides.then(|| *self.balancer.model()),
            decision,
        });
        // What is said of a move when it is over goes after the machine.
        if let Some((machine, target)) = along {
            send_along(&self.agent, &machine, &target);
        }
    }
}

/// Most disk traffic that a machine may promise, in bytes a second.
pub(crate) const IO_TARGET_MAX: u64 = 1 << 40;

/// A machine's load as it counts: what it promises, where that is wanted. Memory that
/// it occupies beyond its promise is occupied all the same.
fn promised(
    balancing: &Balancing,
    measured: Factors,
    capacity: &Capacity,
    basis: Basis,
) -> Factors {
    let by_target = match balancing.by {
        BalanceBy::Policy => basis == Basis::Target,
        BalanceBy::Target => true,
        BalanceBy::Actual | BalanceBy::Off => false,
    };
    if !by_target {
        return measured;
    }
    let mut counted = measured;
    if let Some(millis) = balancing.cpu_target_millis {
        counted.cpu_cores = f64::from(millis) / 1e3 / capacity.speed;
        counted.cpu_bound_cores = 0.0;
    }
    if let Some(bytes) = balancing.memory_target_bytes {
        counted.memory_bytes = measured.memory_bytes.max(bytes);
    }
    if let Some(rate) = balancing.io_target_bytes_per_s {
        counted.io_bytes_per_s = rate.min(IO_TARGET_MAX) as f64;
    }
    counted
}

/// Moves a machine that breaks a rule where it is.
async fn repair_now(agent: &Arc<Agent>, machine: Name, target: Name, broken: Violation) {
    let outcome = match run_move(agent, &machine, &target, Urgency::High, None).await {
        Ok(report) => ended(&report),
        Err(why) => Outcome::Stayed { why },
    };
    tracing::info!(%machine, %target, %broken, %outcome, "repair");
    keep(
        agent,
        Decision::Ended {
            machine,
            target,
            outcome,
            load: None,
        },
    );
    // The balancer ends with the agent.
    let _ = agent.balancer.inputs.send(Input::RepairOver);
}

/// Keeps a decision that no round came to.
fn keep(agent: &Agent, decision: Decision) {
    let ledger = agent.balancer.ledger();
    ledger.keep(Line {
        at_unix_ms: unix_ms(),
        node: ledger.node().clone(),
        policy: None,
        model: None,
        decision,
    });
}

/// Why a machine may not be on a node, by rules and drains, if it may not.
pub(crate) async fn forbidden(
    agent: &Agent,
    machine: &MachineName,
    node: &NodeName,
) -> Option<String> {
    let (machine, node): (Name, Name) = (machine.as_str().into(), node.as_str().into());
    let look = move |_: &Balancer, _: u64, rules: &Snapshot| rules.forbids(&machine, &node);
    let broken = agent.balancer.look(look).await.ok().flatten();
    broken.map(|broken| broken.why)
}

/// Whether what the balancer decides is done.
pub(crate) async fn is_automatic(agent: &Agent) -> bool {
    let mode = agent.balancer.look(|it, _, _| it.policy().0.mode).await;
    mode == Ok(Mode::Automatic)
}

/// How loaded another node is, as it says.
pub(crate) async fn load_of(agent: &Agent, node: &NodeName) -> Option<f64> {
    match ask(agent, node.as_str(), &Request::View).await {
        Ok(Response::View(view)) => Some(view.state.load),
        _ => None,
    }
}

/// Asks another node's balancer.
async fn ask(agent: &Agent, peer: &str, question: &Request) -> Result<Response, String> {
    let peer = NodeName::new(peer).map_err(|error| error.to_string())?;
    let payload = pack(question).map_err(|error| error.to_string())?;
    let answer = agent
        .peers
        .call(&peer, node_kind::BALANCE, payload, ANSWER_PATIENCE)
        .await
        .map_err(|error| error.to_string())?;
    unpack(&answer).map_err(|error| error.to_string())
}

/// Moves a machine with a token; how it ended.
async fn carry_out_move(
    agent: &Arc<Agent>,
    machine: &str,
    target: &str,
    slots_max: u32,
) -> Outcome {
    let stayed = |why: String| Outcome::Stayed { why };
    // The target's promise does not wait until others have left this node.
    let worker = MachineName::new(machine).map(|machine| agent.workers.get(&machine));
    if let Ok(Some(worker)) = worker {
        let bytes = worker.report().await.map_or(0, |it| it.memory_bytes);
        if agent.lanes.are_full(bytes) {
            return Outcome::Capped;
        }
    }
    let slot = match slots::take(agent, slots_max).await {
        Ok(Some(slot)) => slot,
        Ok(None) => return Outcome::Capped,
        Err(error) => return stayed(error.to_string()),
    };
    let report = run_move(agent, machine, target, Urgency::Low, None).await;
    slots::give_back(agent, slot).await;
    report.map_or_else(stayed, |report| ended(&report))
}

fn ended(report: &MoveReport) -> Outcome {
    match &report.ending {
        Ending::Moved => Outcome::Moved {
            duration_ms: report.total_micros as f64 / 1e3,
            downtime_ms: report.downtime_micros as f64 / 1e3,
            bytes: report.bytes,
        },
        Ending::Stayed { reason } if reason.contains(moving::RACED) => Outcome::Raced {
            rule: reason.rsplit('"').nth(1).unwrap_or_default().to_owned(),
        },
        Ending::Stayed { .. } => Outcome::Stayed { why: report.line() },
    }
}

async fn run_move(
    agent: &Arc<Agent>,
    machine: &str,
    target: &str,
    urgency: Urgency,
    budget_micros: Option<u64>,
) -> Result<MoveReport, String> {
    let order = MoveOrder {
        machine: MachineName::new(machine).map_err(|error| error.to_string())?,
        target: NodeName::new(target).map_err(|error| error.to_string())?,
        post_copy: false,
        checkpoint_to: None,
        urgency,
        budget_micros,
    };
    let lines = crate::operate::move_anywhere(agent, &order).await;
    let mut lines = lines.map_err(|error| error.to_string())?;
    while let Some(line) = lines.recv().await {
        match line {
            MoveLine::Progress(_) => {}
            MoveLine::Report(report) => return Ok(*report),
            MoveLine::Error(error) => return Err(error),
        }
    }
    Err("it was cut off".into())
}

// ── what the store says ─────────────────────────────────────────────────

/// The policy in the store, and its revision; the default one where none was set.
pub(crate) fn policy_of(entry: Option<&KeyValue>) -> Result<(Policy, Revision), String> {
    let Some(entry) = entry else {
        return Ok((Policy::default(), 0));
    };
    let policy: Policy = serde_json::from_slice(&entry.value)
        .map_err(|error| format!("the balancer's policy in the store is damaged: {error}"))?;
    policy.check().map_err(|error| error.to_string())?;
    Ok((policy, entry.modified))
}

async fn follow_policy(agent: Arc<Agent>, events: UnboundedSender<Event>) {
    let take = |entry: Option<&KeyValue>| match policy_of(entry) {
        Ok((policy, revision)) => {
            let _ = events.send(Event::Policy(Box::new(policy), revision));
        }
        // That of before goes on.
        Err(error) => tracing::error!(error),
    };
    while !events.is_closed() {
        let followed: Result<(), StoreError> = async {
            let prefix = Key::Policy.to_string();
            let listing = agent.store.list(&prefix).await?;
            take(listing.entries.first());
            let mut watch = agent.store.watch(&prefix, listing.revision + 1).await?;
            while let Some(changes) = watch.next().await {
                for change in changes?.changes {
                    match change {
                        Change::Put(entry) => take(Some(&entry)),
                        Change::Delete { .. } => take(None),
                    }
                }
            }
            Ok(())
        }
        .await;
        if let Err(error) = followed {
            tracing::warn!(%error, "the balancer's policy cannot be followed, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Tells the balancer which other nodes are alive.
async fn follow_peers(agent: Arc<Agent>, events: UnboundedSender<Event>) {
    while !events.is_closed() {
        let followed: Result<(), StoreError> = async {
            let listing = agent.store.list(keys::ALIVE).await?;
            let node = |key: &str| match key.parse() {
                Ok(Key::Alive(node)) => Some(node),
                _ => None,
            };
            let entries = listing.entries.iter();
            let mut alive: BTreeSet<NodeName> =
                entries.filter_map(|entry| node(&entry.key)).collect();
            let tell = |alive: &BTreeSet<NodeName>| {
                let others = alive.iter().filter(|it| **it != agent.name);
                let peers: Vec<Name> = others.map(|it| it.as_str().into()).collect();
                let _ = events.send(Event::Peers(peers.into()));
            };
            tell(&alive);
            let mut watch = agent.store.watch(keys::ALIVE, listing.revision + 1).await?;
            while let Some(changes) = watch.next().await {
                for change in changes?.changes {
                    let Some(node) = node(change.key()) else {
                        continue;
                    };
                    match change {
                        Change::Put(_) => alive.insert(node),
                        Change::Delete { .. } => alive.remove(&node),
                    };
                }
                tell(&alive);
            }
            Ok(())
        }
        .await;
        if let Err(error) = followed {
            tracing::warn!(%error, "which nodes are alive cannot be followed, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Keeps rules and labels as the store has them.
async fn follow_rules(agent: Arc<Agent>, prefix: String, rules: Followed) {
    loop {
        let followed: Result<(), StoreError> = async {
            let listing = agent.store.list(&prefix).await?;
            rules.change(|book| {
                for entry in &listing.entries {
                    book.take(&entry.key, Some(entry));
                }
            });
            let mut watch = agent.store.watch(&prefix, listing.revision + 1).await?;
            while let Some(changes) = watch.next().await {
                let changes = changes?.changes;
                rules.change(|book| {
                    for change in &changes {
                        match change {
                            Change::Put(entry) => book.take(&entry.key, Some(entry)),
                            Change::Delete { key } => book.take(key, None),
                        }
                    }
                });
            }
            Ok(())
        }
        .await;
        if let Err(error) = followed {
            tracing::warn!(%error, "the rules cannot be followed, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}
