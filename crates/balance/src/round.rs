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

use crate::Name;
use crate::cost::CostModel;
use crate::ledger::{Decision, Outcome, Stay};
use crate::load::{Absurd, Capacity, Factors, LOAD_MAX, NodeSample};
use crate::policy::{Mode, Policy, Strategy};
use crate::select::{
    Aim, Bound, CONSIDERED_MAX, Candidate, Considered, Side, Spreadable, Verdict, aim, select,
};
use crate::window::{NEWEST, Window, steady_difference};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::mem::{Discriminant, discriminant};
use std::sync::Arc;

/// Milliseconds that an answer may take.
const ANSWER_MS: u64 = 2_000;
/// Milliseconds after which promised room is free again if nothing began to come.
const GRANT_MS: u64 = 5_000;
/// Most machines that are on their way from one node. Its network is one, and what
/// leaves in turns leaves sooner than what leaves all at once.
const LEAVING_MAX: usize = 4;
/// Milliseconds that what began to come may take.
const ARRIVAL_MS: u64 = 3_600_000;
/// Samples for which a machine that arrived counts as what was promised: its own do
/// not show it yet.
const SETTLE_SAMPLES: u64 = 3;
/// Milliseconds for which a node, or a machine, is left alone after a failed move;
/// doubled by each further failure, so often at most.
const AVOID_MS: u64 = 15_000;
const AVOID_DOUBLINGS_MAX: u32 = 5;
/// Milliseconds for which a proposed move can be confirmed.
const PROPOSAL_MS: u64 = 300_000;
/// Most machines that are weighed in a round, the heaviest.
const WEIGHED_MAX: usize = 256;
/// Weight of the newest sample in a machine's factors.
const NEWEST_WEIGHT: f64 = 0.4;
/// Samples that must differ by half before a load counts as another one.
const CHANGED_SAMPLES: u32 = 3;
/// Samples that may be missing; after more of them older ones say nothing.
const GAP_SAMPLES: u64 = 10;
/// Milliseconds for which a node is pressed, and nothing can be done, before that is
/// an alert.
const HELPLESS_MS: u64 = 60_000;
/// Milliseconds after which it is told again that balancing does not help, where loads go
/// up and down around what presses.
const ALERT_AGAIN_MS: u64 = 3_600_000;
/// Rounds in a row in which a pressed node found no target before `pack` lets it use a
/// free one.
const WAKE_ROUNDS: usize = 6;
/// Rounds for which a node is not asked again that was free when it was asked, since
/// `pack` gives it nothing; and how often another one is picked instead.
const FREE_ROUNDS: u64 = 60;
const PICKS_MAX: usize = 16;
/// Most free nodes that are remembered.
const FREE_MAX: usize = 4096;
/// Most reasons that are remembered, one for each other node.
const STAYS_MAX: usize = 128;

/// What a node tells of itself in a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// The policy by which it measures.
    pub policy_revision: u64,
    /// Itself now.
    pub side: Side,
    /// Loads of its last samples, newest first.
    pub loads: Vec<f64>,
    /// Whether it has promised its room to another machine.
    pub busy: bool,
}

impl View {
    fn sanitise(&mut self) -> Vec<Absurd> {
        let mut absurd = self.side.capacity.sanitise();
        self.loads
            .truncate(crate::policy::Policy::default().window_samples.max(120));
        for load in self.loads.iter_mut().chain([&mut self.side.load]) {
            if !(0.0..=LOAD_MAX).contains(load) {
                absurd.push(Absurd {
                    field: "load".into(),
                    found: load.to_string(),
                });
                *load = 0.0;
            }
        }
        if self.side.memory_free_bytes > self.side.capacity.memory_bytes {
            absurd.push(Absurd {
                field: "memory_free_bytes".into(),
                found: self.side.memory_free_bytes.to_string(),
            });
            self.side.memory_free_bytes = 0;
        }
        absurd
    }
}

/// What one balancer asks another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Question {
    /// For its view.
    View,
    /// What machines with such factors, measured at a node with such a capacity,
    /// would weigh there.
    Weigh {
        /// The capacity of who asks.
        capacity: Capacity,
        /// The machines' factors.
        factors: Vec<Factors>,
    },
    /// Whether it takes a machine now.
    Take {
        /// Which.
        machine: Name,
        /// The capacity of who asks.
        capacity: Capacity,
        /// The machine's factors.
        factors: Factors,
        /// The load of who asks: the target must stay below it.
        load: f64,
        /// Whether it is to be filled no further than `pack` allows, unless it is free.
        packs: bool,
    },
    /// What was granted is not needed.
    Release {
        /// For which machine.
        machine: Name,
    },
}

/// What a balancer answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// Its view.
    View(View),
    /// It has not measured for long enough.
    Measuring,
    /// What the machines would weigh, in the order asked.
    Weights(Vec<f64>),
    /// Room is promised.
    Granted,
    /// It takes part in another move.
    Busy,
    /// It does not take it.
    Refused {
        /// Why.
        why: String,
    },
    /// It is free again.
    Released,
}

/// The nodes that a balancer may ask.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Peers {
    nodes: Arc<[Name]>,
    /// Which of them is the balancer's own.
    this: Option<usize>,
}

impl Peers {
    /// Those that are alive, of which one is the balancer's own: so thousands of
    /// simulated balancers share one list. A number that is none of theirs counts as
    /// none.
    pub fn among(nodes: Arc<[Name]>, this: usize) -> Self {
        let this = (this < nodes.len()).then_some(this);
        Peers { nodes, this }
    }

    /// How many others there are.
    pub fn len(&self) -> usize {
        self.nodes.len() - usize::from(self.this.is_some())
    }

    /// Whether there are no others.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The others.
    pub fn iter(&self) -> impl Iterator<Item = &Name> {
        (0..self.len()).filter_map(|number| self.get(number))
    }

    /// One of the others, by its number from 0 to [`len`](Self::len).
    fn get(&self, number: usize) -> Option<&Name> {
        let skips = self.this.is_some_and(|this| number >= this);
        self.nodes.get(number + usize::from(skips))
    }
}

impl From<Vec<Name>> for Peers {
    /// Of the others, without the balancer's own.
    fn from(others: Vec<Name>) -> Self {
        Peers {
            nodes: others.into(),
            this: None,
        }
    }
}

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

    /// What a machine's spec says of parts that it may get now; nothing of one that may have
    /// none.
    fn spreadable(&self, _machine: &Name) -> Option<Spreadable> {
        None
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

    // ── measuring ───────────────────────────────────────────────────────

    fn sampled(&mut self, mut sample: NodeSample, now_ms: u64, commands: &mut Vec<Command>) {
        // The node's own numbers may be absurd too. Taken as 0 they would make it the
        // lightest of all, and everybody would send machines here: so it has none.
        let absurd = sample.sanitise();
        if !absurd.is_empty() {
            if !self.absurd {
                tracked_absurd(commands, "this node", absurd);
            }
            self.absurd = true;
            self.window.clear();
            return;
        }
        self.absurd = false;
        let gap_ms = GAP_SAMPLES * self.policy.sample_ms;
        if self.sample.is_some() && now_ms.saturating_sub(self.sampled_ms) > gap_ms {
            self.window.clear();
        }
        self.sampled_ms = now_ms;
        self.samples += 1;
        self.gone.retain(|_, until_ms| *until_ms > now_ms);
        sample
            .machines
            .retain(|machine| !self.gone.contains_key(&machine.name));
        let mut load = sample.base.weigh(&sample.capacity, &self.policy.weights);
        for machine in &mut sample.machines {
            self.learn_machine(machine, &sample.capacity, now_ms);
            if !self.is_leaving(&machine.name) {
                load += machine
                    .factors
                    .weigh(&sample.capacity, &self.policy.weights);
            }
        }
        if let Some(arriving) = &self.arriving
            && !sample.machines.iter().any(|it| it.name == arriving.machine)
        {
            load += arriving.weight;
        }
        // What just arrived may be missing in a sample that was begun before.
        let weights = &self.policy.weights;
        self.known.retain(|_, known| {
            if known.seen == self.samples {
                return true;
            }
            let promised = known.promised.filter(|(_, until_ms)| *until_ms > now_ms);
            load += promised.map_or(0.0, |(it, _)| it.weigh(&sample.capacity, weights));
            promised.is_some()
        });
        self.window.add(load);
        self.sample = Some(sample);
        self.check_effects(load, commands);
        self.watch_pressure(now_ms);
        commands.extend(self.alert(now_ms).map(Command::Alert));
    }

    /// Takes a machine's sample into account; what it counts as replaces it.
    fn learn_machine(
        &mut self,
        machine: &mut crate::load::MachineSample,
        capacity: &Capacity,
        now_ms: u64,
    ) {
        let weights = &self.policy.weights;
        if !self.known.contains_key(&machine.name) {
            let known = Known {
                factors: machine.factors,
                level: machine.factors.weigh(capacity, weights),
                level_since_ms: now_ms.saturating_sub(machine.lasted_ms),
                differing: 0,
                seen: 0,
                held_until_ms: 0,
                came_from: None,
                promised: None,
            };
            self.known.insert(machine.name.clone(), known);
        }
        let Some(known) = self.known.get_mut(&machine.name) else {
            return;
        };
        known.seen = self.samples;
        if let Some((promised, until_ms)) = known.promised {
            if now_ms < until_ms {
                machine.factors.cpu_cores = machine.factors.cpu_cores.max(promised.cpu_cores);
                machine.factors.cpu_bound_cores = machine
                    .factors
                    .cpu_bound_cores
                    .max(promised.cpu_bound_cores);
                machine.factors.memory_bytes =
                    machine.factors.memory_bytes.max(promised.memory_bytes);
            } else {
                known.promised = None;
            }
        }
        known.factors = smooth(&known.factors, &machine.factors);
        let weight = machine.factors.weigh(capacity, weights);
        if (weight - known.level).abs() > 0.5 * known.level.max(0.05) {
            known.differing += 1;
            if known.differing >= CHANGED_SAMPLES {
                known.level = weight;
                known.level_since_ms = now_ms;
                known.differing = 0;
                known.factors = machine.factors;
            }
        } else {
            known.differing = 0;
        }
    }

    fn check_effects(&mut self, load: f64, commands: &mut Vec<Command>) {
        let mut done = Vec::new();
        self.checks.retain_mut(|check| {
            check.samples_left = check.samples_left.saturating_sub(1);
            if check.samples_left > 0 {
                return true;
            }
            done.push(Decision::Ended {
                machine: check.machine.clone(),
                target: check.target.clone(),
                outcome: check.outcome.clone(),
                load: Some((check.predicted, load)),
            });
            false
        });
        let done = done.into_iter().map(|it| Command::Record(Box::new(it)));
        commands.extend(done);
    }

    fn watch_pressure(&mut self, now_ms: u64) {
        if self.side().is_some_and(|side| side.pressed) {
            self.pressed_since_ms.get_or_insert(now_ms);
        } else {
            self.pressed_since_ms = None;
            self.helpless = 0;
        }
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

    fn rest(&mut self, now_ms: u64) {
        self.state = State::Resting;
        let interval = self.policy.interval_ms;
        let jittered = self
            .rng
            .random_range(interval / 2..=interval + interval / 2);
        self.due_ms = now_ms + jittered;
    }

    fn begin(&mut self, now_ms: u64, commands: &mut Vec<Command>) {
        self.round += 1;
        let reason = if self.policy.mode == Mode::Off {
            Some(Stay::Off)
        } else if self.peers.is_empty() {
            Some(Stay::Alone)
        } else if self.side().is_none() {
            Some(Stay::Measuring)
        } else if self.known.is_empty() {
            Some(Stay::NoMachines)
        } else {
            None
        };
        if let Some(why) = reason {
            self.stay(None, why, None, Vec::new(), commands);
            self.rest(now_ms);
            return;
        }
        if let Some(confirmed) = self.take_confirmed(now_ms) {
            let Confirmed {
                machine,
                target,
                until_ms,
            } = confirmed;
            self.offer(target, machine, Err(until_ms), now_ms, commands);
            return;
        }
        let Some(peer) = self.pick(now_ms) else {
            self.rest(now_ms);
            return;
        };
        if let Some(avoided) = self.avoided_peers.get(&peer)
            && avoided.until_ms > now_ms
        {
            let for_ms = avoided.until_ms - now_ms;
            let why = Stay::Avoided { for_ms };
            self.stay(Some(peer), why, None, Vec::new(), commands);
            self.rest(now_ms);
            return;
        }
        self.ask(&peer, Question::View, commands);
        self.state = State::Asking {
            peer,
            deadline_ms: now_ms + ANSWER_MS,
        };
    }

    /// One of the others, by chance, to which nothing goes just now. Where machines are
    /// packed most are free and are given nothing: of those it knows it picks another
    /// one.
    fn pick(&mut self, now_ms: u64) -> Option<Name> {
        let packs = self.policy.strategy == Strategy::Pack && self.helpless < WAKE_ROUNDS;
        let mut free_one = None;
        for _ in 0..PICKS_MAX {
            let number = self.rng.random_range(0..self.peers.len());
            let peer = self.peers.get(number)?;
            if self.leaving.iter().any(|it| it.peer == *peer) {
                continue;
            }
            let free = packs && self.free_peers.get(peer).is_some_and(|it| *it > now_ms);
            if !free {
                return Some(peer.clone());
            }
            free_one = Some(peer.clone());
        }
        free_one
    }

    fn ask(&self, peer: &Name, question: Question, commands: &mut Vec<Command>) {
        commands.push(Command::Ask {
            round: self.round,
            peer: peer.clone(),
            question,
        });
    }

    /// Ends a round without a move.
    fn give_up(&mut self, peer: Name, why: Stay, now_ms: u64, commands: &mut Vec<Command>) {
        if let State::Offering {
            peer,
            machine,
            confirmed_until_ms,
            ..
        } = &self.state
        {
            self.confirmed
                .extend(confirmed_until_ms.map(|until_ms| Confirmed {
                    machine: machine.clone(),
                    target: peer.clone(),
                    until_ms,
                }));
            // It may have granted, and its answer be lost.
            let release = Question::Release {
                machine: machine.clone(),
            };
            commands.push(Command::Ask {
                round: 0,
                peer: peer.clone(),
                question: release,
            });
        }
        self.stay(Some(peer), why, None, Vec::new(), commands);
        self.rest(now_ms);
    }

    /// Records why nothing moves, when that is another reason than the last one.
    fn stay(
        &mut self,
        peer: Option<Name>,
        why: Stay,
        there: Option<Side>,
        considered: Vec<Considered>,
        commands: &mut Vec<Command>,
    ) {
        let no_help = matches!(why, Stay::Level | Stay::KeptFree | Stay::NoneMayGo { .. });
        if no_help && self.leaving.is_empty() {
            self.helpless += 1;
        }
        let verdict = match &why {
            Stay::NoneMayGo { verdict, .. } => Some(discriminant(verdict)),
            _ => None,
        };
        let tag = (discriminant(&why), verdict);
        let key = peer.clone().unwrap_or_else(|| "".into());
        if self.stays.len() >= STAYS_MAX && !self.stays.contains_key(&key) {
            self.stays.clear();
        }
        if self.stays.insert(key, tag) == Some(tag) {
            return;
        }
        let decision = Decision::Stay {
            why,
            peer,
            here: self.side(),
            there,
            considered: nearest(considered),
        };
        commands.push(Command::Record(Box::new(decision)));
    }

    // ── this node's own round ───────────────────────────────────────────

    fn answered(
        &mut self,
        answer: Option<Answer>,
        now_ms: u64,
        bounds: &dyn Bounds,
        commands: &mut Vec<Command>,
    ) {
        let state = std::mem::replace(&mut self.state, State::Resting);
        match (state, answer) {
            (State::Asking { peer, .. }, Some(Answer::View(view))) => {
                self.seen(peer, view, now_ms, commands);
            }
            (
                State::Weighing {
                    peer,
                    view,
                    steady,
                    machines,
                    ..
                },
                Some(Answer::Weights(weights)),
            ) => {
                let asked = (view, steady, machines);
                self.weighed(peer, asked, &weights, now_ms, bounds, commands);
            }
            (
                State::Offering {
                    peer,
                    machine,
                    decision,
                    ..
                },
                Some(Answer::Granted),
            ) => self.granted(peer, machine, decision, now_ms, commands),
            (
                State::Offering {
                    peer,
                    machine,
                    confirmed_until_ms: Some(until_ms),
                    ..
                },
                answer @ (None | Some(Answer::Busy)),
            ) => {
                // What a person confirmed is tried again.
                self.confirmed.push(Confirmed {
                    machine,
                    target: peer.clone(),
                    until_ms,
                });
                let why = answer.map_or(Stay::NoAnswer, |_| Stay::Busy);
                self.stay(Some(peer), why, None, Vec::new(), commands);
                self.rest(now_ms);
            }
            // A late or doubled answer to what was asked before, in this round too.
            (state @ State::Resting, _)
            | (state @ State::Weighing { .. }, Some(Answer::View(_)))
            | (state @ State::Offering { .. }, Some(Answer::View(_) | Answer::Weights(_))) => {
                self.state = state;
            }
            (
                State::Asking { peer, .. }
                | State::Weighing { peer, .. }
                | State::Offering { peer, .. },
                answer,
            ) => {
                let why = match answer {
                    None => Stay::NoAnswer,
                    Some(Answer::Busy) => Stay::Busy,
                    Some(Answer::Measuring) => Stay::Measuring,
                    Some(Answer::Refused { why }) => Stay::Refused { why },
                    Some(other) => Stay::Refused {
                        why: format!("it answered something else: {other:?}")
                            .chars()
                            .take(200)
                            .collect(),
                    },
                };
                self.stay(Some(peer), why, None, Vec::new(), commands);
                self.rest(now_ms);
            }
        }
    }

    fn seen(&mut self, peer: Name, mut view: View, now_ms: u64, commands: &mut Vec<Command>) {
        let absurd = view.sanitise();
        if !absurd.is_empty() {
            tracked_absurd(commands, &peer, absurd);
            self.rest(now_ms);
            return;
        }
        if self.policy.strategy == Strategy::Pack {
            self.free_peers.remove(&peer);
            if self.free_peers.len() >= FREE_MAX {
                self.free_peers.clear();
            }
            if view.side.free {
                let until_ms = now_ms + FREE_ROUNDS * self.policy.interval_ms;
                self.free_peers.insert(peer.clone(), until_ms);
            }
        }
        let (why, steady) = match self.compare(&view) {
            Ok(steady) => (None, steady),
            Err(why) => (Some(why), 0.0),
        };
        if let Some(why) = why {
            self.stay(Some(peer), why, Some(view.side), Vec::new(), commands);
            self.rest(now_ms);
            return;
        }
        let Some(sample) = &self.sample else {
            self.rest(now_ms);
            return;
        };
        let (machines, question) = self.weigh_question(sample);
        self.ask(&peer, question, commands);
        self.state = State::Weighing {
            peer,
            view,
            steady,
            machines,
            deadline_ms: now_ms + ANSWER_MS,
        };
    }

    /// Which machines are to be weighed, the heaviest first, and the question.
    fn weigh_question(&self, sample: &NodeSample) -> (Vec<Name>, Question) {
        let mut machines: Vec<(Name, f64, Factors)> = sample
            .machines
            .iter()
            .filter_map(|it| {
                let known = self.known.get(&it.name)?;
                let weight = self.weigh_here(&known.factors);
                Some((it.name.clone(), weight, known.factors))
            })
            .collect();
        machines.sort_by(|one, other| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0)));
        machines.truncate(WEIGHED_MAX);
        let question = Question::Weigh {
            capacity: sample.capacity,
            factors: machines.iter().map(|(_, _, factors)| *factors).collect(),
        };
        let names = machines.into_iter().map(|(name, ..)| name);
        (names.collect(), question)
    }

    /// What to ask another node to explain what would go there; `None` before this one
    /// was measured.
    pub fn question(&self) -> Option<(Vec<Name>, Question)> {
        Some(self.weigh_question(self.sample.as_ref()?))
    }

    /// What a round with another node would come to now, and why; nothing is changed.
    /// `weights` are of `machines`, as [`question`](Self::question) named them.
    pub fn explain(
        &self,
        peer: &Name,
        mut view: View,
        machines: &[Name],
        weights: &[f64],
        now_ms: u64,
        bounds: &dyn Bounds,
    ) -> Option<Explained> {
        view.sanitise();
        let now_ms = now_ms.saturating_add(self.jumped_back_ms);
        let here = self.side()?;
        let stay = self.compare(&view).err();
        let candidates = self.candidates(peer, machines, weights, now_ms, bounds);
        Some(Explained {
            here,
            there: view.side,
            stay,
            considered: select(&here, &view.side, &candidates, &self.model, &self.policy),
        })
    }

    fn candidates(
        &self,
        peer: &Name,
        machines: &[Name],
        weights: &[f64],
        now_ms: u64,
        bounds: &dyn Bounds,
    ) -> Vec<Candidate> {
        machines
            .iter()
            .zip(weights)
            .filter_map(|(machine, &there)| {
                let known = self.known.get(machine)?;
                Some(Candidate {
                    machine: machine.clone(),
                    factors: known.factors,
                    there,
                    lasted_ms: now_ms.saturating_sub(known.level_since_ms),
                    spreadable: bounds.spreadable(machine),
                    bound: self.bound(machine, peer, now_ms, bounds),
                })
            })
            .collect()
    }

    /// By how much this node is steadily heavier; why it does not offer.
    fn compare(&self, view: &View) -> Result<f64, Stay> {
        let side = self.side().ok_or(Stay::Measuring)?;
        if view.policy_revision != self.revision {
            return Err(Stay::OtherPolicy);
        }
        let loads: Vec<f64> = self.window.loads().collect();
        let steady = steady_difference(&loads, &view.loads).ok_or(Stay::Measuring)?;
        let wakes = self.helpless >= WAKE_ROUNDS;
        offers(&side, &view.side, (steady, wakes), &self.policy)?;
        if view.busy {
            return Err(Stay::Busy);
        }
        Ok(steady)
    }

    fn bound(
        &self,
        machine: &Name,
        peer: &Name,
        now_ms: u64,
        bounds: &dyn Bounds,
    ) -> Option<Bound> {
        let known = self.known.get(machine)?;
        let confirmed = self.confirmed.iter().any(|it| it.machine == *machine);
        if confirmed || self.is_leaving(machine) {
            return Some(Bound::Moving);
        }
        if let Some(bound) = bounds.bound(machine, peer) {
            return Some(bound);
        }
        if let Some((from, until_ms)) = &known.came_from
            && from == peer
            && *until_ms > now_ms
        {
            let for_ms = until_ms - now_ms;
            return Some(Bound::CoolDown { for_ms });
        }
        if known.held_until_ms > now_ms {
            let for_ms = known.held_until_ms - now_ms;
            return Some(Bound::Held { for_ms });
        }
        let failed = self.avoided_machines.get(machine)?;
        (failed.until_ms > now_ms).then(|| Bound::Failed {
            for_ms: failed.until_ms - now_ms,
        })
    }

    fn weighed(
        &mut self,
        peer: Name,
        (view, steady, machines): (View, f64, Vec<Name>),
        weights: &[f64],
        now_ms: u64,
        bounds: &dyn Bounds,
        commands: &mut Vec<Command>,
    ) {
        let believable = |weight: &f64| (0.0..=LOAD_MAX).contains(weight);
        if weights.len() != machines.len() || !weights.iter().all(believable) {
            let field = Absurd {
                field: "weights".into(),
                found: format!("{} of {} machines", weights.len(), machines.len()),
            };
            tracked_absurd(commands, &peer, vec![field]);
            self.rest(now_ms);
            return;
        }
        // The load may be another one by now.
        let Some(side) = self.side() else {
            self.rest(now_ms);
            return;
        };
        let candidates = self.candidates(&peer, &machines, weights, now_ms, bounds);
        let considered = select(&side, &view.side, &candidates, &self.model, &self.policy);
        let first = considered.first().cloned();
        let Some(first) = first else {
            self.stay(Some(peer), Stay::NoMachines, None, Vec::new(), commands);
            self.rest(now_ms);
            return;
        };
        if first.verdict != Verdict::Chosen {
            let why = Stay::NoneMayGo {
                nearest: first.machine,
                verdict: first.verdict,
            };
            self.stay(Some(peer), why, Some(view.side), considered, commands);
            self.rest(now_ms);
            return;
        }
        let machine = first.machine;
        let decision = Box::new(Decision::Move {
            machine: machine.clone(),
            target: peer.clone(),
            mode: self.policy.mode,
            here: side,
            there: view.side,
            steady,
            considered: nearest(considered),
        });
        if self.policy.mode == Mode::Automatic {
            self.offer(peer, machine, Ok(decision), now_ms, commands);
            return;
        }
        self.proposed.retain(|_, (_, until_ms)| *until_ms > now_ms);
        let until_ms = now_ms + PROPOSAL_MS;
        let before = self.proposed.insert(machine, (peer.clone(), until_ms));
        if before.is_none_or(|(target, _)| target != peer) {
            commands.push(Command::Record(decision));
        }
        self.rest(now_ms);
    }

    fn offer(
        &mut self,
        peer: Name,
        machine: Name,
        decision: Result<Box<Decision>, u64>,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let (Some(side), Some(known)) = (self.side(), self.known.get(&machine)) else {
            self.rest(now_ms);
            return;
        };
        if self.is_leaving(&machine) {
            self.rest(now_ms);
            return;
        }
        let question = Question::Take {
            machine: machine.clone(),
            capacity: side.capacity,
            factors: known.factors,
            load: side.load,
            packs: self.policy.strategy == Strategy::Pack,
        };
        self.ask(&peer, question, commands);
        let (decision, confirmed_until_ms) = match decision {
            Ok(decision) => (Some(decision), None),
            Err(until_ms) => (None, Some(until_ms)),
        };
        self.state = State::Offering {
            peer,
            machine,
            decision,
            confirmed_until_ms,
            deadline_ms: now_ms + ANSWER_MS,
        };
    }

    fn granted(
        &mut self,
        peer: Name,
        machine: Name,
        decision: Option<Box<Decision>>,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let Some(known) = self.known.get(&machine) else {
            // It ended in between.
            self.state = State::Offering {
                peer: peer.clone(),
                machine,
                decision: None,
                confirmed_until_ms: None,
                deadline_ms: now_ms,
            };
            self.give_up(peer, Stay::NoMachines, now_ms, commands);
            return;
        };
        let factors = known.factors;
        let here = self.weigh_here(&factors);
        self.shift(-here);
        self.proposed.remove(&machine);
        self.stays.clear();
        self.helpless = 0;
        commands.extend(decision.map(Command::Record));
        commands.push(Command::Move {
            machine: machine.clone(),
            target: peer.clone(),
        });
        self.leaving.push(Leaving {
            peer,
            machine,
            here,
            factors,
            left: false,
        });
        // The next one at once: both sides know what this one changes.
        self.rest(now_ms);
        self.due_ms = now_ms.max(self.pause_until_ms);
    }

    fn move_ended(
        &mut self,
        ended: &Name,
        outcome: Outcome,
        now_ms: u64,
        commands: &mut Vec<Command>,
    ) {
        let Some(number) = self.leaving.iter().position(|it| it.machine == *ended) else {
            return;
        };
        let Leaving {
            peer,
            machine,
            here,
            factors,
            left,
        } = self.leaving.swap_remove(number);
        if let Outcome::Moved {
            duration_ms,
            downtime_ms,
            ..
        } = outcome
        {
            self.model.learn(&factors, duration_ms, downtime_ms);
            self.avoided_peers.remove(&peer);
            self.avoided_machines.remove(&machine);
            self.known.remove(&machine);
            if let Some(sample) = &mut self.sample {
                sample.machines.retain(|it| it.name != machine);
            }
            if !left {
                let until_ms = now_ms + SETTLE_SAMPLES * self.policy.sample_ms;
                self.gone.insert(machine.clone(), until_ms);
            }
            self.checks.push(Check {
                machine,
                target: peer,
                outcome,
                predicted: self.load_now().unwrap_or(0.0),
                samples_left: NEWEST,
            });
            // It takes the next one now.
            self.due_ms = self.due_ms.min(now_ms.max(self.pause_until_ms));
            return;
        }
        if !left {
            self.shift(here);
        }
        // What stopped this one would stop the next: no round follows at once.
        self.pause_until_ms = now_ms + self.policy.interval_ms;
        if matches!(outcome, Outcome::Stayed { .. }) {
            avoid(&mut self.avoided_peers, &peer, now_ms);
            avoid(&mut self.avoided_machines, &machine, now_ms);
        }
        commands.push(Command::Ask {
            round: 0,
            peer: peer.clone(),
            question: Question::Release {
                machine: machine.clone(),
            },
        });
        commands.push(Command::Record(Box::new(Decision::Ended {
            machine,
            target: peer,
            outcome,
            load: None,
        })));
        if matches!(self.state, State::Resting) {
            self.rest(now_ms);
        }
    }

    fn confirmed(&mut self, machine: &Name, now_ms: u64) {
        let Some((target, until_ms)) = self.proposed.remove(machine) else {
            return;
        };
        if until_ms > now_ms {
            self.confirmed.push(Confirmed {
                machine: machine.clone(),
                target,
                until_ms: now_ms + PROPOSAL_MS,
            });
            if matches!(self.state, State::Resting) {
                self.due_ms = now_ms;
            }
        }
    }

    /// A move that a person confirmed and that can begin now: to a node to which
    /// nothing else goes.
    fn take_confirmed(&mut self, now_ms: u64) -> Option<Confirmed> {
        self.confirmed.retain(|it| it.until_ms > now_ms);
        let leaving = &self.leaving;
        let number = self
            .confirmed
            .iter()
            .position(|it| !leaving.iter().any(|other| other.peer == it.target))?;
        Some(self.confirmed.remove(number))
    }

    /// Moves that wait for a person, with their targets.
    pub fn proposals(&self, now_ms: u64) -> Vec<(Name, Name)> {
        let now_ms = now_ms.saturating_add(self.jumped_back_ms);
        let live = self.proposed.iter();
        let mut live: Vec<(Name, Name)> = live
            .filter(|(_, (_, until_ms))| *until_ms > now_ms)
            .map(|(machine, (target, _))| (machine.clone(), target.clone()))
            .collect();
        live.sort();
        live
    }

    /// That this node, pressed for long, found nothing to do with anybody, at most once an hour.
    fn alert(&mut self, now_ms: u64) -> Option<String> {
        let since = self.pressed_since_ms?;
        let asked = self.peers.len().clamp(1, 16);
        let lasts = now_ms.saturating_sub(since) >= HELPLESS_MS;
        let told = self
            .alerted_ms
            .is_some_and(|at| now_ms < at + ALERT_AGAIN_MS);
        if told || !lasts || self.helpless < 3 * asked {
            return None;
        }
        self.alerted_ms = Some(now_ms);
        let side = self.side()?;
        Some(format!(
            "this node has been pressed for {} s (load {:.2}) and no move would help: the cluster \
             needs more nodes, fewer machines or lower limits (`keel why MACHINE`)",
            now_ms.saturating_sub(since) / 1000,
            side.load
        ))
    }

    // ── other nodes' rounds ─────────────────────────────────────────────

    fn answer(&mut self, peer: &Name, question: Question, now_ms: u64) -> Answer {
        let Some(side) = self.side() else {
            return Answer::Measuring;
        };
        match question {
            Question::View => Answer::View(View {
                policy_revision: self.revision,
                side,
                loads: self.window.loads().collect(),
                busy: self.arriving.is_some(),
            }),
            Question::Weigh {
                mut capacity,
                mut factors,
            } => {
                capacity.sanitise();
                factors.truncate(WEIGHED_MAX);
                let weigh = |factors: &mut Factors| {
                    factors.sanitise();
                    let there = factors.on(&capacity, &side.capacity);
                    there.weigh(&side.capacity, &self.policy.weights)
                };
                Answer::Weights(factors.iter_mut().map(weigh).collect())
            }
            Question::Take {
                machine,
                capacity,
                factors,
                load,
                packs,
            } => self.take(peer, (machine, capacity, factors), (load, packs), now_ms),
            Question::Release { machine } => {
                if self.arriving.as_ref().is_some_and(|it| it.from == *peer) {
                    self.release(&machine);
                }
                Answer::Released
            }
        }
    }

    fn take(
        &mut self,
        peer: &Name,
        (machine, mut capacity, mut factors): (Name, Capacity, Factors),
        (load, packs): (f64, bool),
        now_ms: u64,
    ) -> Answer {
        let Some(side) = self.side() else {
            return Answer::Measuring;
        };
        if let Some(arriving) = &self.arriving {
            let again = arriving.machine == machine && arriving.from == *peer;
            return if again { Answer::Granted } else { Answer::Busy };
        }
        if self.policy.mode == Mode::Off {
            return Answer::Refused {
                why: Stay::Off.to_string(),
            };
        }
        let mut absurd = capacity.sanitise();
        absurd.extend(factors.sanitise());
        if !absurd.is_empty() || !(0.0..=LOAD_MAX).contains(&load) {
            return Answer::Refused {
                why: "its numbers are absurd".into(),
            };
        }
        let there = factors.on(&capacity, &side.capacity);
        let weight = there.weigh(&side.capacity, &self.policy.weights);
        let kept = side.capacity.memory_bytes as f64 * self.policy.memory_headroom;
        let free = side.memory_free_bytes.saturating_sub(kept as u64);
        if factors.memory_bytes > free {
            return Answer::Refused {
                why: format!(
                    "{:.1} GiB of memory are free",
                    free as f64 / f64::from(1 << 30)
                ),
            };
        }
        let most = if packs && !side.free {
            self.policy.fill_load
        } else {
            load
        };
        if side.load + weight > most {
            return Answer::Refused {
                why: format!("its load has risen to {:.2} meanwhile", side.load),
            };
        }
        self.shift(weight);
        self.arriving = Some(Arriving {
            machine,
            from: peer.clone(),
            factors: there,
            weight,
            until_ms: now_ms + GRANT_MS,
        });
        Answer::Granted
    }

    /// Nothing came of what was granted.
    fn release(&mut self, machine: &Name) {
        if self
            .arriving
            .as_ref()
            .is_some_and(|it| it.machine == *machine)
            && let Some(arriving) = self.arriving.take()
        {
            self.shift(-arriving.weight);
        }
    }

    fn arrived(&mut self, machine: Name, from: Name, now_ms: u64) {
        self.gone.remove(&machine);
        let granted = self.arriving.take_if(|it| it.machine == machine);
        let settled_ms = now_ms + SETTLE_SAMPLES * self.policy.sample_ms;
        let promised = granted.map(|it| (it.factors, settled_ms));
        let level = promised.map_or(0.0, |(factors, _)| self.weigh_here(&factors));
        self.known.insert(
            machine,
            Known {
                factors: promised.map(|(factors, _)| factors).unwrap_or_default(),
                level,
                level_since_ms: now_ms,
                differing: 0,
                seen: 0,
                held_until_ms: now_ms + self.policy.hold_ms,
                came_from: Some((from, now_ms + self.policy.cool_down_ms)),
                promised,
            },
        );
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

fn smooth(before: &Factors, now: &Factors) -> Factors {
    let mix = |before: f64, now: f64| before + NEWEST_WEIGHT * (now - before);
    Factors {
        cpu_cores: mix(before.cpu_cores, now.cpu_cores),
        cpu_bound_cores: mix(before.cpu_bound_cores, now.cpu_bound_cores),
        memory_bytes: now.memory_bytes,
        dirty_bytes_per_s: mix(before.dirty_bytes_per_s, now.dirty_bytes_per_s),
        io_bytes_per_s: mix(before.io_bytes_per_s, now.io_bytes_per_s),
        network_bytes_per_s: mix(before.network_bytes_per_s, now.network_bytes_per_s),
        stalled: mix(before.stalled, now.stalled),
    }
}

fn avoid(avoided: &mut HashMap<Name, Avoided>, who: &Name, now_ms: u64) {
    let entry = avoided.entry(who.clone()).or_insert(Avoided {
        until_ms: 0,
        failures: 0,
    });
    let doublings = entry.failures.min(AVOID_DOUBLINGS_MAX);
    entry.until_ms = now_ms + (AVOID_MS << doublings);
    entry.failures += 1;
}

fn nearest(mut considered: Vec<Considered>) -> Vec<Considered> {
    considered.truncate(CONSIDERED_MAX);
    considered
}

fn tracked_absurd(commands: &mut Vec<Command>, peer: &str, mut fields: Vec<Absurd>) {
    fields.truncate(8);
    commands.push(Command::Record(Box::new(Decision::Absurd {
        peer: peer.into(),
        fields,
    })));
}
