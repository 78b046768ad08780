//! One node's side of the masterless rounds.
//!
//! ```text
//!            round due         view: heavier,        weights: one
//!            ask a random      steadily, pressed     may go
//!   Resting ───────────▶ Asking ───────────▶ Weighing ───────────▶ Offering
//!      ▲                   │ level, busy, silent │ none may go        │ refused; granted: the move
//!      └───────────────────┴─────────────────────┴────────────────────┘ is on its way meanwhile
//! ```
//!
//! Every node asks a randomly picked other one for its view at jittered intervals.
//! Whoever is asked answers at once, whatever it does itself. A node has one round
//! and one arriving machine at a time; one that has promised room to another answers
//! `Busy`. A move that was granted is no round any more: a node with much to give has
//! several on their way, each to another node. What was granted counts in the loads of
//! both sides from that moment, so that third nodes, and the next round, see the loads
//! that will be.
//!
//! Messages may be lost, late, or come twice: answers carry the number of the round
//! and are dropped when it is another one; what is granted lapses by itself. Nothing
//! here is needed for a machine to be safe: a move is one transaction of the store,
//! whatever balancers believe.
//!
//! - `messages`: what balancers tell each other
//! - `measurement`: what a balancer knows of its own node and machines
//! - `initiator`: its own rounds
//! - `responder`: other nodes' rounds

mod initiator;
mod measurement;
mod messages;
mod responder;

pub use messages::{Peers, Request, Response, View};

use crate::Name;
use crate::cost::CostModel;
use crate::ledger::{Decision, NoMoveReason, Outcome};
use crate::load::{Factors, NodeSample, ValidationError};
use crate::policy::{Policy, Strategy};
use crate::select::{Considered, Constraint, NodeState, Objective, Spreadable, Verdict, objective};
use crate::window::{NEWEST, Window};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::mem::Discriminant;

/// Most machines that are on their way from one node. Its network is one, and what
/// leaves in turns leaves sooner than what leaves all at once.
const OUTGOING_MAX: usize = 4;
/// Milliseconds that what began to come may take.
const ARRIVAL_MS: u64 = 3_600_000;
/// Samples for which a machine that arrived counts as what was promised: its own do
/// not show it yet.
const SETTLE_SAMPLES: u64 = 3;
/// Most machines that are weighed in a round, the heaviest.
const WEIGHED_MAX: usize = 256;

/// What a round would come to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explained {
    pub here: NodeState,
    pub there: NodeState,
    /// Why nothing would be offered at all, whatever becomes of single machines.
    #[serde(rename = "stay")]
    pub no_move: Option<NoMoveReason>,
    /// Every machine of this node, the chosen one first.
    pub considered: Vec<Considered>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Tick,
    Sample(NodeSample),
    /// The other nodes that are alive.
    Peers(Peers),
    /// The cluster's policy, and its revision.
    Policy(Box<Policy>, u64),
    /// Another node asks; `ticket` is given back with the reply.
    RequestReceived {
        ticket: u64,
        peer: Name,
        request: Request,
    },
    /// Another node answered, or did not.
    ResponseReceived {
        /// The round in which it was asked.
        round: u64,
        response: Option<Response>,
    },
    /// A move that this balancer wanted is over.
    MoveEnded {
        machine: Name,
        outcome: Outcome,
    },
    Arriving {
        machine: Name,
    },
    /// A machine came here by a move, whoever wanted it.
    Arrived {
        machine: Name,
        from: Name,
    },
    /// A machine went away by a move that somebody else wanted.
    Departed {
        machine: Name,
    },
    /// A machine that was to come will not.
    ArrivalFailed {
        machine: Name,
    },
    /// A person confirmed a proposed move.
    ConfirmedMove {
        machine: Name,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Ask another node; its answer is given back with the round's number, or its
    /// silence.
    SendRequest {
        round: u64,
        peer: Name,
        request: Request,
    },
    SendResponse {
        ticket: u64,
        response: Response,
    },
    /// Move a machine, if a token for it can be had.
    Move {
        machine: Name,
        target: Name,
    },
    Record(Box<Decision>),
    /// Tell people that balancing does not help any more.
    Alert(String),
}

/// Rules, as far as one machine and one target are concerned.
pub trait Constraints {
    /// Why a machine of this node may not go there, if it may not.
    fn constraint(&self, machine: &Name, target: &Name) -> Option<Constraint>;

    /// What is known of the parts that a machine may get; nothing of one that may have none.
    fn spreadable(&self, _machine: &Name) -> Option<Spreadable> {
        None
    }

    /// What compiling a machine's program at a target takes before it can run there, in
    /// core-seconds; 0 where its code is ready.
    fn compile_core_s(&self, _machine: &Name, _target: &Name) -> f64 {
        0.0
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Unconstrained;

impl Constraints for Unconstrained {
    fn constraint(&self, _machine: &Name, _target: &Name) -> Option<Constraint> {
        None
    }
}

#[derive(Debug)]
enum State {
    Idle,
    AwaitingView {
        peer: Name,
        deadline_ms: u64,
    },
    AwaitingWeights {
        peer: Name,
        view: View,
        steady: f64,
        machines: Vec<Name>,
        deadline_ms: u64,
    },
    AwaitingGrant {
        peer: Name,
        machine: Name,
        /// What is recorded when the move begins.
        decision: Option<Box<Decision>>,
        /// Until when it is tried again, if a person confirmed it.
        confirmed_until_ms: Option<u64>,
        deadline_ms: u64,
    },
}

/// A proposed move that a person confirmed.
#[derive(Debug, Clone)]
struct ConfirmedMove {
    machine: Name,
    target: Name,
    until_ms: u64,
}

/// A machine on its way to another node.
#[derive(Debug, Clone)]
struct OutgoingMove {
    peer: Name,
    machine: Name,
    /// What it weighed here, which is taken off the window.
    here: f64,
    factors: Factors,
    /// Whether the store has said already that it is not here any more.
    left: bool,
}

/// What is known of a machine here.
#[derive(Debug, Clone)]
struct TrackedMachine {
    factors: Factors,
    /// About what it weighs, and since when.
    level: f64,
    level_since_ms: u64,
    /// Samples in a row that were far from it.
    differing: u32,
    /// Number of the last sample that showed it.
    seen: u64,
    held_until_ms: u64,
    came_from: Option<(Name, u64)>,
    /// What was promised when it came, until its own samples show it.
    promised: Option<(Factors, u64)>,
}

/// A machine for which room is promised.
#[derive(Debug, Clone)]
struct IncomingMove {
    machine: Name,
    from: Name,
    factors: Factors,
    weight: f64,
    until_ms: u64,
}

/// A move that is over, whose effect is looked at after some samples.
#[derive(Debug)]
struct EffectCheck {
    machine: Name,
    target: Name,
    outcome: Outcome,
    predicted: f64,
    samples_left: usize,
}

#[derive(Debug, Clone, Copy)]
struct Backoff {
    until_ms: u64,
    failures: u32,
}

#[derive(Debug)]
pub struct Balancer {
    rng: SmallRng,
    policy: Policy,
    revision: u64,
    peers: Peers,
    /// Now, as of the last event.
    now_ms: u64,
    /// By how much the clock has jumped back so far: what waits for an instant would
    /// wait that much longer.
    jumped_back_ms: u64,
    sample: Option<NodeSample>,
    sampled_ms: u64,
    window: Window,
    /// In an order, so that sums over it are the same in each run.
    tracked: BTreeMap<Name, TrackedMachine>,
    /// Samples so far.
    samples: u64,
    /// Whether this node's own last sample was absurd.
    own_sample_invalid: bool,
    incoming: Option<IncomingMove>,
    /// At most [`OUTGOING_MAX`], each to another node.
    outgoing: Vec<OutgoingMove>,
    /// Machines that a move took away, and until when that counts: the store's word
    /// that they are gone may come after the first sample without them.
    departed: HashMap<Name, u64>,
    state: State,
    round: u64,
    due_ms: u64,
    /// No round follows at once before this: a move was not made.
    pause_until_ms: u64,
    checks: Vec<EffectCheck>,
    proposed: HashMap<Name, (Name, u64)>,
    /// Proposed moves that a person confirmed, in that order.
    confirmed: Vec<ConfirmedMove>,
    peer_backoffs: HashMap<Name, Backoff>,
    machine_backoffs: HashMap<Name, Backoff>,
    /// Nodes that were free when they were asked, and until when that counts.
    free_peers: HashMap<Name, u64>,
    last_reasons: HashMap<Name, (Discriminant<NoMoveReason>, Option<Discriminant<Verdict>>)>,
    model: CostModel,
    pressed_since_ms: Option<u64>,
    /// Rounds in a row that found nothing to do although this node is pressed.
    fruitless_rounds: usize,
    alerted_ms: Option<u64>,
}

impl Balancer {
    /// One for a node, with a seed of its own: nodes with the same one would ask in
    /// the same order.
    pub fn new(policy: Policy, revision: u64, model: CostModel, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let due_ms = rng.random_range(0..=policy.interval_ms);
        Balancer {
            rng,
            window: Window::new(policy.window_samples),
            policy,
            revision,
            peers: Peers::default(),
            now_ms: 0,
            jumped_back_ms: 0,
            sample: None,
            sampled_ms: 0,
            tracked: BTreeMap::new(),
            samples: 0,
            own_sample_invalid: false,
            incoming: None,
            outgoing: Vec::new(),
            departed: HashMap::new(),
            state: State::Idle,
            round: 0,
            due_ms,
            pause_until_ms: 0,
            checks: Vec::new(),
            proposed: HashMap::new(),
            confirmed: Vec::new(),
            peer_backoffs: HashMap::new(),
            machine_backoffs: HashMap::new(),
            free_peers: HashMap::new(),
            last_reasons: HashMap::new(),
            model,
            pressed_since_ms: None,
            fruitless_rounds: 0,
            alerted_ms: None,
        }
    }

    /// The newest sample, as it counts.
    pub fn sample(&self) -> Option<&NodeSample> {
        self.sample.as_ref()
    }

    /// The policy by which it decides, and its revision.
    pub fn policy(&self) -> (&Policy, u64) {
        (&self.policy, self.revision)
    }

    /// What it has learned of moves.
    pub fn model(&self) -> &CostModel {
        &self.model
    }

    /// This node's side of a round now; `None` before it was measured.
    pub fn node_state(&self) -> Option<NodeState> {
        let sample = self.sample.as_ref()?;
        let load = self.current_load()?;
        let promised = self.incoming.as_ref();
        let promised = promised.map_or(0, |incoming| incoming.factors.memory_bytes);
        Some(NodeState {
            capacity: sample.capacity,
            load,
            memory_free_bytes: sample.memory_free_bytes().saturating_sub(promised),
            pressed: self.is_pressed(sample, load),
            free: self.tracked.is_empty() && self.incoming.is_none(),
        })
    }

    fn is_pressed(&self, sample: &NodeSample, load: f64) -> bool {
        // (What waited was measured with those that are on their way.)
        let share = sample.cpu_pressure.max(sample.stall_pressure);
        let waits = self.outgoing.is_empty() && share >= self.policy.pressed_share;
        load >= self.policy.pressed_load || waits
    }

    /// The mean of the newest samples, moves in flight included.
    fn current_load(&self) -> Option<f64> {
        let newest: Vec<f64> = self.window.loads().take(NEWEST).collect();
        (newest.len() == NEWEST).then(|| newest.iter().sum::<f64>() / NEWEST as f64)
    }

    /// When something is due by itself, in milliseconds.
    pub fn wake_at_ms(&self) -> u64 {
        let state = match &self.state {
            State::Idle if self.outgoing.len() >= OUTGOING_MAX => u64::MAX,
            State::Idle => self.due_ms,
            State::AwaitingView { deadline_ms, .. }
            | State::AwaitingWeights { deadline_ms, .. }
            | State::AwaitingGrant { deadline_ms, .. } => *deadline_ms,
        };
        let incoming = self.incoming.as_ref().map_or(u64::MAX, |it| it.until_ms);
        match state.min(incoming) {
            u64::MAX => u64::MAX,
            wake_ms => wake_ms.saturating_sub(self.jumped_back_ms),
        }
    }

    /// Time that never goes back, of a clock that may.
    fn monotonic_ms(&mut self, clock_ms: u64) -> u64 {
        let now_ms = clock_ms.saturating_add(self.jumped_back_ms);
        self.jumped_back_ms += self.now_ms.saturating_sub(now_ms);
        self.now_ms = self.now_ms.max(now_ms);
        self.now_ms
    }

    /// Takes an event; what is to be done.
    pub fn step(
        &mut self,
        event: Event,
        now_ms: u64,
        constraints: &dyn Constraints,
    ) -> Vec<Command> {
        let now_ms = self.monotonic_ms(now_ms);
        let mut commands = Vec::new();
        match event {
            Event::Tick => {}
            Event::Sample(sample) => self.record_sample(sample, now_ms, &mut commands),
            Event::Peers(peers) => self.peers = peers,
            Event::Policy(policy, revision) => {
                if self.policy.window_samples != policy.window_samples
                    || self.policy.weights != policy.weights
                {
                    self.window = Window::new(policy.window_samples);
                }
                self.policy = *policy;
                self.revision = revision;
                self.due_ms = self.due_ms.min(now_ms + self.policy.interval_ms);
            }
            Event::RequestReceived {
                ticket,
                peer,
                request,
            } => {
                let response = self.respond(&peer, request, now_ms);
                commands.push(Command::SendResponse { ticket, response });
            }
            Event::ResponseReceived { round, response } => {
                if round == self.round {
                    self.response_received(response, now_ms, constraints, &mut commands);
                }
            }
            Event::MoveEnded { machine, outcome } => {
                self.move_ended(&machine, outcome, now_ms, &mut commands);
            }
            Event::Arriving { machine } => {
                if let Some(incoming) = &mut self.incoming
                    && incoming.machine == machine
                {
                    incoming.until_ms = now_ms + ARRIVAL_MS;
                }
            }
            Event::Arrived { machine, from } => self.arrived(machine, from, now_ms),
            Event::Departed { machine } => self.machine_departed(&machine),
            Event::ArrivalFailed { machine } => self.release(&machine),
            Event::Confirmed { machine } => self.confirmed(&machine, now_ms),
        }
        self.expire_deadlines(now_ms, &mut commands);
        commands
    }

    /// Load came or went by a move.
    fn shift_load(&mut self, by: f64) {
        self.window.shift_load(by);
        for check in &mut self.checks {
            check.predicted = (check.predicted + by).max(0.0);
        }
    }

    /// The store says that a machine is not here any more.
    fn machine_departed(&mut self, machine: &Name) {
        let tracked = self.tracked.remove(machine);
        if let Some(sample) = &mut self.sample {
            sample.machines.retain(|it| it.name != *machine);
        }
        if let Some(outgoing) = self.outgoing.iter_mut().find(|it| it.machine == *machine) {
            // Its load was taken off when the move was granted.
            outgoing.left = true;
        } else if self.departed.remove(machine).is_none()
            && let Some(tracked) = tracked
        {
            let weight = self.local_weight(&tracked.factors);
            self.shift_load(-weight);
        }
    }

    fn is_outgoing(&self, machine: &Name) -> bool {
        self.outgoing.iter().any(|it| it.machine == *machine)
    }

    fn local_weight(&self, factors: &Factors) -> f64 {
        self.sample.as_ref().map_or(0.0, |sample| {
            factors.weigh(&sample.capacity, &self.policy.weights)
        })
    }

    // ── time ────────────────────────────────────────────────────────────

    fn expire_deadlines(&mut self, now_ms: u64, commands: &mut Vec<Command>) {
        if let Some(incoming) = &self.incoming
            && incoming.until_ms <= now_ms
        {
            let machine = incoming.machine.clone();
            self.release(&machine);
        }
        let silent = match &self.state {
            State::AwaitingView {
                peer, deadline_ms, ..
            }
            | State::AwaitingWeights {
                peer, deadline_ms, ..
            }
            | State::AwaitingGrant {
                peer, deadline_ms, ..
            } if *deadline_ms <= now_ms => Some(peer.clone()),
            _ => None,
        };
        if let Some(peer) = silent {
            self.abandon_round(peer, NoMoveReason::NoAnswer, now_ms, commands);
        }
        let resting = matches!(self.state, State::Idle);
        if resting && self.due_ms <= now_ms && self.outgoing.len() < OUTGOING_MAX {
            self.begin_round(now_ms, commands);
        }
    }
}

/// Whether a node offers anything to another one, of which it is heavier by `steady`
/// for some time. `wakes` says whether it may use a node that `pack` keeps free.
///
/// # Errors
/// Why it does not.
pub fn check_offer(
    here: &NodeState,
    there: &NodeState,
    (steady, wakes): (f64, bool),
    policy: &Policy,
) -> Result<(), NoMoveReason> {
    let objective = objective(here, there, policy);
    if there.free && (objective == Objective::Empty || objective == Objective::Relieve && !wakes) {
        return Err(NoMoveReason::ReservedFree);
    }
    if objective == Objective::Empty {
        // To a stronger node in any case; among equals the one that carries less
        // empties itself. How steady they are does not matter: what fills the other
        // one is bounded.
        if there.stronger_than(here) {
            return Ok(());
        }
        if here.stronger_than(there) || here.carries() >= there.carries() {
            return Err(NoMoveReason::Level);
        }
        if here.load > policy.empty_load {
            return Err(NoMoveReason::SufficientlyLoaded);
        }
        return Ok(());
    }
    let margin = policy.margin_between(here.load, there.load);
    if here.load - there.load <= margin {
        return Err(NoMoveReason::Level);
    }
    if policy.strategy != Strategy::Spread && !here.pressed {
        return Err(NoMoveReason::NoPressure);
    }
    if steady <= margin {
        return Err(NoMoveReason::Unsteady);
    }
    Ok(())
}

fn record_invalid_report(
    commands: &mut Vec<Command>,
    peer: &str,
    mut fields: Vec<ValidationError>,
) {
    fields.truncate(8);
    commands.push(Command::Record(Box::new(Decision::InvalidReport {
        peer: peer.into(),
        fields,
    })));
}
