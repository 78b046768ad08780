//! One node's side of the decentralised rounds.
//!
//! ```text
//!        round due: request       view: sustained         weights: one machine
//!        a random peer's view     excess, pressed         is eligible
//!   Idle ───────────▶ AwaitingView ───────────▶ AwaitingWeights ───────────▶ AwaitingGrant
//!    ▲                    │ level, busy, timeout      │ none eligible             │ refused, or granted:
//!    └────────────────────┴───────────────────────────┴───────────────────────────┘ the move runs
//! ```
//!
//! Every node requests the view of a randomly picked peer at jittered intervals. A request is
//! answered immediately, independent of the receiver's own round. A node has one round and one
//! incoming machine at a time; a node that has granted a reservation answers `Busy`. A granted move
//! is no longer part of a round: a node with much excess load has several outgoing moves, each to
//! another node. A granted move counts in the loads of both sides from that moment, so that other
//! nodes and the next round see the loads that will result.
//!
//! Messages may be lost, delayed or duplicated: responses carry the number of their round and are
//! dropped in another one; a reservation expires. The safety of a machine does not depend on this
//! protocol: a move is one transaction of the store, whatever balancers assume.
//!
//! - `messages`: requests and responses between balancers
//! - `measurement`: smoothed load of the own node and its machines
//! - `initiator`: rounds that this node starts
//! - `responder`: rounds of other nodes

mod initiator;
mod measurement;
mod messages;
mod responder;

pub use messages::{Peers, Request, Response, View};

use crate::Name;
use crate::cost::{CostModel, Link};
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

/// Maximum number of outgoing moves of a node. They share one network link, so moves in sequence
/// complete earlier than all in parallel.
const OUTGOING_MAX: usize = 4;
/// Maximum duration of an incoming move, in milliseconds.
const ARRIVAL_MS: u64 = 3_600_000;
/// Samples during which the announced factors of an arrived machine are used: its own samples do
/// not show its full load yet.
const SETTLE_SAMPLES: u64 = 3;
/// Maximum number of machines evaluated in a round, heaviest first.
const WEIGHED_MAX: usize = 256;

/// Result of a simulated round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = RoundExplanation)]
pub struct Explained {
    pub here: NodeState,
    pub there: NodeState,
    /// Why no machine would be offered, independent of single machines.
    #[serde(rename = "stay")]
    pub no_move: Option<NoMoveReason>,
    /// All machines of this node, the selected one first.
    pub considered: Vec<Considered>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Tick,
    Sample(NodeSample),
    /// The other live nodes.
    Peers(Peers),
    /// The cluster's policy and its revision.
    Policy(Box<Policy>, u64),
    /// A request of another node; the response carries `ticket`.
    RequestReceived {
        ticket: u64,
        peer: Name,
        request: Request,
    },
    /// A response, or `None` after a timeout or an error.
    ResponseReceived {
        /// The round of the request.
        round: u64,
        response: Option<Response>,
    },
    /// A move that this balancer started has ended.
    MoveEnded {
        machine: Name,
        outcome: Outcome,
    },
    Arriving {
        machine: Name,
    },
    /// A machine arrived by a move, whoever initiated it.
    Arrived {
        machine: Name,
        from: Name,
    },
    /// A machine left by a move that this balancer did not start.
    Departed {
        machine: Name,
    },
    /// An incoming move failed.
    ArrivalFailed {
        machine: Name,
    },
    /// A user confirmed a proposed move.
    Confirmed {
        machine: Name,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Send a request; the response, or `None`, comes back with the number of the round.
    SendRequest {
        round: u64,
        peer: Name,
        request: Request,
    },
    SendResponse {
        ticket: u64,
        response: Response,
    },
    /// Start a move, if a token for it is available.
    Move {
        machine: Name,
        target: Name,
    },
    Record(Box<Decision>),
    /// Notify users that balancing cannot relieve this node.
    Alert(String),
}

/// Placement constraints for one machine and one target.
pub trait Constraints {
    /// Why a machine of this node must not move to the target, if it must not.
    fn constraint(&self, machine: &Name, target: &Name) -> Option<Constraint>;

    /// Facts about the parts that a machine may get; `None` if it must not span.
    fn spreadable(&self, _machine: &Name) -> Option<Spreadable> {
        None
    }

    /// Compilation of the machine's program at a target before it can run there, in core-seconds; 0
    /// if compiled code is cached.
    fn compile_core_s(&self, _machine: &Name, _target: &Name) -> f64 {
        0.0
    }

    /// The network to a peer.
    fn link(&self, _peer: &Name) -> Link {
        Link::NEAR
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
        /// Recorded when the move begins.
        decision: Option<Box<Decision>>,
        /// Retry deadline of a move that a user confirmed.
        confirmed_until_ms: Option<u64>,
        deadline_ms: u64,
    },
}

/// A proposed move that a user confirmed.
#[derive(Debug, Clone)]
struct ConfirmedMove {
    machine: Name,
    target: Name,
    until_ms: u64,
}

/// An outgoing move.
#[derive(Debug, Clone)]
struct OutgoingMove {
    peer: Name,
    machine: Name,
    /// Its load here, which is subtracted from the window.
    here: f64,
    factors: Factors,
    link: Link,
    /// Whether the store has already reported the departure.
    left: bool,
}

/// Load history of a machine on this node.
#[derive(Debug, Clone)]
struct TrackedMachine {
    factors: Factors,
    /// Approximate load, and since when.
    level: f64,
    level_since_ms: u64,
    /// Consecutive samples that deviated from `level`.
    differing: u32,
    /// Number of the last sample that contained it.
    seen: u64,
    held_until_ms: u64,
    came_from: Option<(Name, u64)>,
    /// Announced factors, used until its own samples show its load.
    promised: Option<(Factors, u64)>,
}

/// A granted reservation.
#[derive(Debug, Clone)]
struct IncomingMove {
    machine: Name,
    from: Name,
    factors: Factors,
    weight: f64,
    until_ms: u64,
}

/// A completed move whose effect is checked after some samples.
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
    /// Time of the last event.
    now_ms: u64,
    /// Total backward jump of the clock. Without it a deadline would be late by as much.
    jumped_back_ms: u64,
    sample: Option<NodeSample>,
    sampled_ms: u64,
    window: Window,
    /// Ordered, so that floating-point sums are deterministic.
    tracked: BTreeMap<Name, TrackedMachine>,
    /// Samples so far.
    samples: u64,
    /// Whether this node's own last sample was invalid.
    own_sample_invalid: bool,
    incoming: Option<IncomingMove>,
    /// At most [`OUTGOING_MAX`], each to another node.
    outgoing: Vec<OutgoingMove>,
    /// Departed machines, with the time until which they are ignored: the store's notification may
    /// arrive after the first sample without them.
    departed: HashMap<Name, u64>,
    state: State,
    round: u64,
    due_ms: u64,
    /// Earliest time of the next round after a move was not made.
    pause_until_ms: u64,
    checks: Vec<EffectCheck>,
    proposed: HashMap<Name, (Name, u64)>,
    /// Confirmed moves, in the order of confirmation.
    confirmed: Vec<ConfirmedMove>,
    peer_backoffs: HashMap<Name, Backoff>,
    machine_backoffs: HashMap<Name, Backoff>,
    /// Peers that were free at their last response, with the time until which that counts.
    free_peers: HashMap<Name, u64>,
    last_reasons: HashMap<Name, (Discriminant<NoMoveReason>, Option<Discriminant<Verdict>>)>,
    model: CostModel,
    pressed_since_ms: Option<u64>,
    /// Consecutive rounds without a useful move although this node is pressed.
    fruitless_rounds: usize,
    alerted_ms: Option<u64>,
}

impl Balancer {
    /// Creates a node's balancer. Seeds must differ between nodes, otherwise they would pick peers
    /// in the same order.
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

    /// The newest sample, with adjusted factors.
    pub fn sample(&self) -> Option<&NodeSample> {
        self.sample.as_ref()
    }

    /// The policy in force and its revision.
    pub fn policy(&self) -> (&Policy, u64) {
        (&self.policy, self.revision)
    }

    /// The learned cost model.
    pub fn model(&self) -> &CostModel {
        &self.model
    }

    /// The state of this node; `None` before enough samples.
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
        // (The wait was measured with the outgoing machines still here.)
        let share = sample.cpu_pressure.max(sample.stall_pressure);
        let waits = self.outgoing.is_empty() && share >= self.policy.pressed_share;
        load >= self.policy.pressed_load || waits
    }

    /// Mean of the newest samples, moves in flight included.
    fn current_load(&self) -> Option<f64> {
        let newest: Vec<f64> = self.window.loads().take(NEWEST).collect();
        (newest.len() == NEWEST).then(|| newest.iter().sum::<f64>() / NEWEST as f64)
    }

    /// Time of the next timer event, in milliseconds.
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

    /// Monotonic time from a clock that may jump back.
    fn monotonic_ms(&mut self, clock_ms: u64) -> u64 {
        let now_ms = clock_ms.saturating_add(self.jumped_back_ms);
        self.jumped_back_ms += self.now_ms.saturating_sub(now_ms);
        self.now_ms = self.now_ms.max(now_ms);
        self.now_ms
    }

    /// Handles an event; returns the commands to carry out.
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
        self.expire_deadlines(now_ms, constraints, &mut commands);
        commands
    }

    /// Adjusts the window and pending checks for load that a move added or removed.
    fn shift_load(&mut self, by: f64) {
        self.window.shift(by);
        for check in &mut self.checks {
            check.predicted = (check.predicted + by).max(0.0);
        }
    }

    /// The store reports that a machine is no longer here.
    fn machine_departed(&mut self, machine: &Name) {
        let tracked = self.tracked.remove(machine);
        if let Some(sample) = &mut self.sample {
            sample.machines.retain(|it| it.name != *machine);
        }
        if let Some(outgoing) = self.outgoing.iter_mut().find(|it| it.machine == *machine) {
            // Its load was subtracted when the move was granted.
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

    fn expire_deadlines(
        &mut self,
        now_ms: u64,
        constraints: &dyn Constraints,
        commands: &mut Vec<Command>,
    ) {
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
            self.begin_round(now_ms, constraints, commands);
        }
    }
}

/// Whether a node offers a machine to a peer whose load is lower by a sustained `steady`. `wakes`
/// allows the use of a node that `pack` keeps free.
///
/// # Errors
/// The reason why it does not.
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
        // To a stronger node in any case; of two equal nodes the less loaded one empties itself.
        // The difference need not be sustained: the fill load bounds the other node.
        if there.stronger_than(here) {
            return Ok(());
        }
        if here.stronger_than(there) || here.absolute_load() >= there.absolute_load() {
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
