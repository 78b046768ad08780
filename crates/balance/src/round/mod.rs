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

mod measurement;
mod responder;
mod initiator;
mod messages;

pub use messages::{Answer, Peers, Question, View};

use crate::Name;
use crate::cost::CostModel;
use crate::ledger::{Decision, Outcome, Stay};
use crate::load::{Absurd, Factors, NodeSample};
use crate::policy::{Policy, Strategy};
use crate::select::{Aim, Bound, Considered, Side, Spreadable, Verdict, aim};
use crate::window::{NEWEST, Window};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::mem::Discriminant;

/// Most machines that are on their way from one node. Its network is one, and what
/// leaves in turns leaves sooner than what leaves all at once.
const LEAVING_MAX: usize = 4;
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
    /// This node.
    pub here: Side,
    /// The other one.
    pub there: Side,
    /// Why nothing would be offered at all, whatever becomes of single machines.
    pub stay: Option<Stay>,
    /// Every machine of this node, the chosen one first.
    pub considered: Vec<Considered>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Time passed.
    Tick,
    /// This node was measured.
    Sample(NodeSample),
    /// The other nodes that are alive.
    Peers(Peers),
    /// The cluster's policy, and its revision.
    Policy(Box<Policy>, u64),
    /// Another node asks; `ticket` is given back with the reply.
    Asked {
        /// Which question it is.
        ticket: u64,
        /// Who asks.
        peer: Name,
        /// What.
        question: Question,
    },
    /// Another node answered, or did not.
    Answered {
        /// The round in which it was asked.
        round: u64,
        /// What it answered.
        answer: Option<Answer>,
    },
    /// A move that this balancer wanted is over.
    MoveEnded {
        /// Of which machine.
        machine: Name,
        /// How.
        outcome: Outcome,
    },
    /// A machine began to come.
    Arriving {
        /// Which.
        machine: Name,
    },
    /// A machine came here by a move, whoever wanted it.
    Arrived {
        /// Which.
        machine: Name,
        /// From where.
        from: Name,
    },
    /// A machine went away by a move that somebody else wanted.
    Left {
        /// Which.
        machine: Name,
    },
    /// A machine that was to come will not.
    ArrivalFailed {
        /// Which.
        machine: Name,
    },
    /// A person confirmed a proposed move.
    Confirmed {
        /// Of which machine.
        machine: Name,
    },
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Ask another node; its answer is given back with the round's number, or its
    /// silence.
    Ask {
        /// The round.
        round: u64,
        /// Whom.
        peer: Name,
        /// What.
        question: Question,
    },
    /// Answer a question.
    Reply {
        /// Which.
        ticket: u64,
        /// What.
        answer: Answer,
    },
    /// Move a machine, if a token for it can be had.
    Move {
        /// Which.
        machine: Name,
        /// Where to.
        target: Name,
    },
    /// Keep a decision.
    Record(Box<Decision>),
    /// Tell people that balancing does not help any more.
    Alert(String),
}

/// Rules, as far as one machine and one target are concerned.
pub trait Bounds {
    /// Why a machine of this node may not go there, if it may not.
    fn bound(&self, machine: &Name, target: &Name) -> Option<Bound>;

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

/// Nothing is bound.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unbound;

impl Bounds for Unbound {
    fn bound(&self, _machine: &Name, _target: &Name) -> Option<Bound> {
        None
    }
}

/// Where a round is.
#[derive(Debug)]
enum State {
    Resting,
    Asking {
        peer: Name,
        deadline_ms: u64,
    },
    Weighing {
        peer: Name,
        view: View,
        steady: f64,
        machines: Vec<Name>,
        deadline_ms: u64,
    },
    Offering {
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
struct Confirmed {
    machine: Name,
    target: Name,
    until_ms: u64,
}

/// A machine on its way to another node.
#[derive(Debug, Clone)]
struct Leaving {
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
struct Known {
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
struct Arriving {
    machine: Name,
    from: Name,
    factors: Factors,
    weight: f64,
    until_ms: u64,
}

/// A move that is over, whose effect is looked at after some samples.
#[derive(Debug)]
struct Check {
    machine: Name,
    target: Name,
    outcome: Outcome,
    predicted: f64,
    samples_left: usize,
}

#[derive(Debug, Clone, Copy)]
struct Avoided {
    until_ms: u64,
    failures: u32,
}

/// One node's balancer.
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
    known: BTreeMap<Name, Known>,
    /// Samples so far.
    samples: u64,
    /// Whether this node's own last sample was absurd.
    absurd: bool,
    arriving: Option<Arriving>,
    /// At most [`LEAVING_MAX`], each to another node.
    leaving: Vec<Leaving>,
    /// Machines that a move took away, and until when that counts: the store's word
    /// that they are gone may come after the first sample without them.
    gone: HashMap<Name, u64>,
    state: State,
    round: u64,
    due_ms: u64,
    /// No round follows at once before this: a move was not made.
    pause_until_ms: u64,
    checks: Vec<Check>,
    proposed: HashMap<Name, (Name, u64)>,
    /// Proposed moves that a person confirmed, in that order.
    confirmed: Vec<Confirmed>,
    avoided_peers: HashMap<Name, Avoided>,
    avoided_machines: HashMap<Name, Avoided>,
    /// Nodes that were free when they were asked, and until when that counts.
    free_peers: HashMap<Name, u64>,
    stays: HashMap<Name, (Discriminant<Stay>, Option<Discriminant<Verdict>>)>,
    model: CostModel,
    pressed_since_ms: Option<u64>,
    /// Rounds in a row that found nothing to do although this node is pressed.
    helpless: usize,
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
            known: BTreeMap::new(),
            samples: 0,
            absurd: false,
            arriving: None,
            leaving: Vec::new(),
            gone: HashMap::new(),
            state: State::Resting,
            round: 0,
            due_ms,
            pause_until_ms: 0,
            checks: Vec::new(),
            proposed: HashMap::new(),
            confirmed: Vec::new(),
            avoided_peers: HashMap::new(),
            avoided_machines: HashMap::new(),
            free_peers: HashMap::new(),
            stays: HashMap::new(),
            model,
            pressed_since_ms: None,
            helpless: 0,
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
    pub fn side(&self) -> Option<Side> {
        let sample = self.sample.as_ref()?;
        let load = self.load_now()?;
        let promised = self.arriving.as_ref();
        let promised = promised.map_or(0, |arriving| arriving.factors.memory_bytes);
        Some(Side {
            capacity: sample.capacity,
            load,
            memory_free_bytes: sample.memory_free_bytes().saturating_sub(promised),
            pressed: self.is_pressed(sample, load),
            free: self.known.is_empty() && self.arriving.is_none(),
        })
    }

    fn is_pressed(&self, sample: &NodeSample, load: f64) -> bool {
        // (What waited was measured with those that are on their way.)
        let share = sample.cpu_pressure.max(sample.stall_pressure);
        let waits = self.leaving.is_empty() && share >= self.policy.pressed_share;
        load >= self.policy.pressed_load || waits
    }

    /// The mean of the newest samples, moves in flight included.
    fn load_now(&self) -> Option<f64> {
        let newest: Vec<f64> = self.window.loads().take(NEWEST).collect();
        (newest.len() == NEWEST).then(|| newest.iter().sum::<f64>() / NEWEST as f64)
    }

    /// When something is due by itself, in milliseconds.
    pub fn wake_at_ms(&self) -> u64 {
        let state = match &self.state {
            State::Resting if self.leaving.len() >= LEAVING_MAX => u64::MAX,
            State::Resting => self.due_ms,
            State::Asking { deadline_ms, .. }
            | State::Weighing { deadline_ms, .. }
            | State::Offering { deadline_ms, .. } => *deadline_ms,
        };
        let arriving = self.arriving.as_ref().map_or(u64::MAX, |it| it.until_ms);
        match state.min(arriving) {
            u64::MAX => u64::MAX,
            wake_ms => wake_ms.saturating_sub(self.jumped_back_ms),
        }
    }

    /// Time that never goes back, of a clock that may.
    fn pass(&mut self, clock_ms: u64) -> u64 {
        let now_ms = clock_ms.saturating_add(self.jumped_back_ms);
        self.jumped_back_ms += self.now_ms.saturating_sub(now_ms);
        self.now_ms = self.now_ms.max(now_ms);
        self.now_ms
    }

    /// Takes an event; what is to be done.
    pub fn step(&mut self, event: Event, now_ms: u64, bounds: &dyn Bounds) -> Vec<Command> {
        let now_ms = self.pass(now_ms);
        let mut commands = Vec::new();
        match event {
            Event::Tick => {}
            Event::Sample(sample) => self.sampled(sample, now_ms, &mut commands),
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
            Event::Asked {
                ticket,
                peer,
                question,
            } => {
                let answer = self.answer(&peer, question, now_ms);
                commands.push(Command::Reply { ticket, answer });
            }
            Event::Answered { round, answer } => {
                if round == self.round {
                    self.answered(answer, now_ms, bounds, &mut commands);
                }
            }
            Event::MoveEnded { machine, outcome } => {
                self.move_ended(&machine, outcome, now_ms, &mut commands);
            }
            Event::Arriving { machine } => {
                if let Some(arriving) = &mut self.arriving
                    && arriving.machine == machine
                {
                    arriving.until_ms = now_ms + ARRIVAL_MS;
                }
            }
            Event::Arrived { machine, from } => self.arrived(machine, from, now_ms),
            Event::Left { machine } => self.left(&machine),
            Event::ArrivalFailed { machine } => self.release(&machine),
            Event::Confirmed { machine } => self.confirmed(&machine, now_ms),
        }
        self.pass_time(now_ms, &mut commands);
        commands
    }

    /// Load came or went by a move.
    fn shift(&mut self, by: f64) {
        self.window.shift(by);
        for check in &mut self.checks {
            check.predicted = (check.predicted + by).max(0.0);
        }
    }

    /// The store says that a machine is not here any more.
    fn left(&mut self, machine: &Name) {
        let known = self.known.remove(machine);
        if let Some(sample) = &mut self.sample {
            sample.machines.retain(|it| it.name != *machine);
        }
        if let Some(leaving) = self.leaving.iter_mut().find(|it| it.machine == *machine) {
            // Its load was taken off when the move was granted.
            leaving.left = true;
        } else if self.gone.remove(machine).is_none()
            && let Some(known) = known
        {
            let weight = self.weigh_here(&known.factors);
            self.shift(-weight);
        }
    }

    fn is_leaving(&self, machine: &Name) -> bool {
        self.leaving.iter().any(|it| it.machine == *machine)
    }

    fn weigh_here(&self, factors: &Factors) -> f64 {
        self.sample.as_ref().map_or(0.0, |sample| {
            factors.weigh(&sample.capacity, &self.policy.weights)
        })
    }

    // ── time ────────────────────────────────────────────────────────────

    fn pass_time(&mut self, now_ms: u64, commands: &mut Vec<Command>) {
        if let Some(arriving) = &self.arriving
            && arriving.until_ms <= now_ms
        {
            let machine = arriving.machine.clone();
            self.release(&machine);
        }
        let silent = match &self.state {
            State::Asking {
                peer, deadline_ms, ..
            }
            | State::Weighing {
                peer, deadline_ms, ..
            }
            | State::Offering {
                peer, deadline_ms, ..
            } if *deadline_ms <= now_ms => Some(peer.clone()),
            _ => None,
        };
        if let Some(peer) = silent {
            self.give_up(peer, Stay::NoAnswer, now_ms, commands);
        }
        let resting = matches!(self.state, State::Resting);
        if resting && self.due_ms <= now_ms && self.leaving.len() < LEAVING_MAX {
            self.begin(now_ms, commands);
        }
    }
}

/// Whether a node offers anything to another one, of which it is heavier by `steady`
/// for some time. `wakes` says whether it may use a node that `pack` keeps free.
///
/// # Errors
/// Why it does not.
pub fn offers(
    here: &Side,
    there: &Side,
    (steady, wakes): (f64, bool),
    policy: &Policy,
) -> Result<(), Stay> {
    let aim = aim(here, there, policy);
    if there.free && (aim == Aim::Empty || aim == Aim::Relieve && !wakes) {
        return Err(Stay::KeptFree);
    }
    if aim == Aim::Empty {
        // To a stronger node in any case; among equals the one that carries less
        // empties itself. How steady they are does not matter: what fills the other
        // one is bounded.
        if there.stronger_than(here) {
            return Ok(());
        }
        if here.stronger_than(there) || here.carries() >= there.carries() {
            return Err(Stay::Level);
        }
        if here.load > policy.empty_load {
            return Err(Stay::Filled);
        }
        return Ok(());
    }
    let margin = policy.margin_between(here.load, there.load);
    if here.load - there.load <= margin {
        return Err(Stay::Level);
    }
    if policy.strategy != Strategy::Spread && !here.pressed {
        return Err(Stay::NobodyPressed);
    }
    if steady <= margin {
        return Err(Stay::Unsteady);
    }
    Ok(())
}

fn tracked_absurd(commands: &mut Vec<Command>, peer: &str, mut fields: Vec<Absurd>) {
    fields.truncate(8);
    commands.push(Command::Record(Box::new(Decision::Absurd {
        peer: peer.into(),
        fields,
    })));
}
