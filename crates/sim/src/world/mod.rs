//! A discrete-event simulation of a cluster: nodes with the balancer's own state machines, machines
//! with demand curves, messages with delay and loss, moves with duration and failure, node
//! failures, invalid reports and wrong clocks. Time is a number; the seed determines all random
//! choices.
//!
//! - here: the state of the simulation, and the event loop
//! - `messages`: requests and responses in flight
//! - `moves`: moves in flight
//! - `faults`: external events
//! - `queries`: queries of the state
//! - `queue`: the event queue
//! - `rules`: placement rules and their repair

mod faults;
mod messages;
mod moves;
mod queries;
mod queue;
mod rules;

pub use faults::{ExternalEvent, InvalidReport};
pub use queries::NodeSnapshot;
pub use rules::Rulebook;

use crate::curve::Curve;
use keel_balance::Name;
use keel_balance::cost::CostModel;
use keel_balance::ledger::Decision;
use keel_balance::load::{Capacity, Factors, MachineSample, NodeSample, Usage};
use keel_balance::policy::Policy;
use keel_balance::round::{Balancer, Command, Event};
use queue::Queue;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rules::RuleSet;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Initial time of the nodes' clocks, in milliseconds; large enough for them to jump back.
const CLOCK_MS: i64 = 1_000_000_000_000;

#[derive(Debug, Clone)]
pub struct NodeSpec {
    pub name: Name,
    pub capacity: Capacity,
    /// Whether it runs from the start; otherwise it starts later.
    pub there: bool,
}

#[derive(Debug, Clone)]
pub struct MachineSpec {
    pub name: Name,
    /// Number of its node.
    pub node: usize,
    /// CPU demand: cores of the reference speed or, if it is CPU-bound, cores of any speed.
    pub curve: Curve,
    /// Whether it is CPU-bound: it demands as many cores on any node.
    pub burns: bool,
    /// In bytes.
    pub memory_bytes: u64,
    /// Bytes of memory dirtied per second.
    pub dirty_bytes_per_s: f64,
    /// Bytes read from and written to disks per second.
    pub io_bytes_per_s: f64,
    /// Whether it runs from the start; otherwise it starts later.
    pub runs: bool,
    /// Whether it may be moved.
    pub balanced: bool,
}

impl MachineSpec {
    /// Load factors at a time, on a node.
    pub(crate) fn factors(&self, at_ms: u64, on: &Capacity) -> Factors {
        let demand = self.curve.cores(at_ms);
        let cpu_cores = if self.burns {
            demand
        } else {
            demand / on.speed
        };
        Factors {
            cpu_cores,
            cpu_bound_cores: if self.burns { demand } else { 0.0 },
            memory_bytes: self.memory_bytes,
            dirty_bytes_per_s: self.dirty_bytes_per_s,
            io_bytes_per_s: self.io_bytes_per_s,
            ..Factors::default()
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Range of the delay of a message, in milliseconds.
    pub delay_ms: (u64, u64),
    /// Share of messages lost, 0 to 1.
    pub lost: f64,
    /// Share of messages duplicated, 0 to 1.
    pub doubled: f64,
    /// Copy rate of one move, in bytes per second.
    pub bytes_per_s: f64,
    /// Share of moves that fail, 0 to 1.
    pub moves_failed: f64,
    /// Delay until other nodes notice that a node failed or started, in milliseconds.
    pub noticed_ms: u64,
}

impl Default for Network {
    fn default() -> Self {
        Network {
            delay_ms: (1, 3),
            lost: 0.0,
            doubled: 0.0,
            bytes_per_s: 800e6,
            moves_failed: 0.0,
            noticed_ms: 3_000,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Settings {
    /// Determines all random choices.
    pub seed: u64,
    pub network: Network,
    /// The balancing policy.
    pub policy: Policy,
    /// Time after which the machines of a failed node restart on the least loaded node with enough
    /// memory, in milliseconds; `None`: they wait for their node.
    pub failover_ms: Option<u64>,
    pub rules: Rulebook,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompletedMove {
    /// Time of its end, in milliseconds.
    pub at_ms: u64,
    pub machine: usize,
    pub source: usize,
    pub target: usize,
    /// Bytes that it sent.
    pub bytes: f64,
}

/// A decision of a node.
#[derive(Debug, Clone, PartialEq)]
pub struct RecordedDecision {
    /// When, in milliseconds.
    pub at_ms: u64,
    pub node: usize,
    /// The learned cost model.
    pub model: CostModel,
    pub decision: Decision,
}

#[derive(Debug)]
struct Node {
    name: Name,
    capacity: Capacity,
    balancer: Balancer,
    machines: Vec<usize>,
    alive: bool,
    /// Incremented at each failure: events for an earlier incarnation are dropped.
    incarnation: u32,
    /// Time of its queued wake-up.
    wakes_ms: u64,
    /// Offset of its clock from the simulated time.
    clock_ms: i64,
    /// Fault in the numbers that it reports.
    report_fault: Option<InvalidReport>,
    /// Fault in the numbers that it measures.
    measurement_fault: Option<InvalidReport>,
    /// Additional delay of its responses, and the share that is duplicated.
    late_ms: u64,
    doubled: f64,
    /// Earliest time of its next repair.
    repair_ms: u64,
}

#[derive(Debug)]
struct Machine {
    spec: MachineSpec,
    node: usize,
    since_ms: u64,
    runs: bool,
    /// Whether a move of it is in flight.
    moves: bool,
}

#[derive(Debug)]
enum QueuedEvent {
    Sample(usize, u32),
    Wake(usize, u32),
    Deliver(usize, u32, Event),
    MoveOver(moves::InFlightMove),
    External(ExternalEvent),
    /// Nodes notice which peers are alive.
    MembershipChange,
    /// The machines of a failed node restart elsewhere.
    FailOver(usize, u32),
}

pub struct World {
    settings: Settings,
    rng: SmallRng,
    now_ms: u64,
    queue: Queue<QueuedEvent>,
    nodes: Vec<Node>,
    machines: Vec<Machine>,
    node_numbers: HashMap<Name, usize>,
    machine_numbers: HashMap<Name, usize>,
    rule_set: RuleSet,
    policy_revision: u64,
    moving: usize,
    moves: Vec<CompletedMove>,
    failed: u64,
    capped: u64,
    rounds: u64,
    repairs: u64,
    raced: u64,
    decisions: Vec<RecordedDecision>,
    alerts: Vec<(u64, usize, String)>,
    keep_decisions: bool,
}

impl World {
    /// Creates a simulation. Names must differ.
    pub fn new(settings: Settings, nodes: &[NodeSpec], machines: &[MachineSpec]) -> Self {
        let mut rng = SmallRng::seed_from_u64(settings.seed);
        let names: Vec<Name> = nodes.iter().map(|node| node.name.clone()).collect();
        let stays = machines.iter().filter(|it| !it.balanced);
        let mut world = World {
            now_ms: 0,
            queue: Queue::new(),
            node_numbers: names.iter().cloned().zip(0..).collect(),
            machine_numbers: machines.iter().map(|it| it.name.clone()).zip(0..).collect(),
            nodes: nodes
                .iter()
                .map(|spec| Node::new(spec, &settings.policy, rng.random()))
                .collect(),
            machines: machines
                .iter()
                .map(|spec| Machine {
                    node: spec.node,
                    runs: spec.runs,
                    spec: spec.clone(),
                    since_ms: 0,
                    moves: false,
                })
                .collect(),
            rule_set: RuleSet::new(
                settings.rules.clone(),
                stays.map(|it| it.name.clone()).collect(),
            ),
            policy_revision: 1,
            moving: 0,
            moves: Vec::new(),
            failed: 0,
            capped: 0,
            rounds: 0,
            repairs: 0,
            raced: 0,
            decisions: Vec::new(),
            alerts: Vec::new(),
            keep_decisions: true,
            rng,
            settings,
        };
        for (number, machine) in machines.iter().enumerate() {
            if machine.runs {
                world.nodes[machine.node].machines.push(number);
            }
        }
        for number in 0..world.nodes.len() {
            world.begin_sampling(number);
        }
        world.publish_peers();
        world.update_placements();
        world
    }

    /// Stops recording decisions: large simulations make many.
    pub fn discard_decisions(&mut self) {
        self.keep_decisions = false;
    }

    fn begin_sampling(&mut self, number: usize) {
        let first_ms = self.now_ms + self.rng.random_range(0..self.settings.policy.sample_ms);
        let incarnation = self.nodes[number].incarnation;
        self.queue
            .put(first_ms, QueuedEvent::Sample(number, incarnation));
    }

    /// Runs until a time, in milliseconds.
    pub fn run_until(&mut self, until_ms: u64) {
        while let Some((at_ms, event)) = self.queue.take(until_ms) {
            self.now_ms = at_ms;
            self.dispatch(event);
        }
        self.now_ms = until_ms;
    }

    fn is_incarnation(&self, node: usize, incarnation: u32) -> bool {
        self.nodes[node].alive && self.nodes[node].incarnation == incarnation
    }

    fn dispatch(&mut self, event: QueuedEvent) {
        match event {
            QueuedEvent::Sample(node, incarnation) => {
                if !self.is_incarnation(node, incarnation) {
                    return;
                }
                let next_ms = self.now_ms + self.settings.policy.sample_ms;
                self.queue
                    .put(next_ms, QueuedEvent::Sample(node, incarnation));
                let mut sample = self.sample(node);
                if let Some(report_fault) = self.nodes[node].measurement_fault {
                    report_fault.corrupt_sample(&mut sample);
                }
                self.step(node, Event::Sample(sample));
                self.repair(node);
            }
            QueuedEvent::Wake(node, incarnation) => {
                // A wake-up that was queued before an earlier one is obsolete. If it woke the node
                // it would be queued again, and the number of wake-ups would grow.
                if self.is_incarnation(node, incarnation)
                    && self.nodes[node].wakes_ms == self.now_ms
                {
                    self.nodes[node].wakes_ms = u64::MAX;
                    self.step(node, Event::Tick);
                }
            }
            QueuedEvent::Deliver(node, incarnation, event) => {
                if self.is_incarnation(node, incarnation) {
                    self.step(node, event);
                }
            }
            QueuedEvent::MoveOver(in_flight) => self.finish_move(&in_flight),
            QueuedEvent::External(what) => self.apply_event(what),
            QueuedEvent::MembershipChange => self.publish_peers(),
            QueuedEvent::FailOver(node, incarnation) => self.fail_over(node, incarnation),
        }
    }

    fn factors(&self, machine: &Machine, capacity: &Capacity) -> Factors {
        machine.spec.factors(self.now_ms, capacity)
    }

    fn sample(&self, number: usize) -> NodeSample {
        let node = &self.nodes[number];
        let mut wanted = 0.0;
        let machines: Vec<MachineSample> = node
            .machines
            .iter()
            .map(|&number| {
                let machine = &self.machines[number];
                let factors = self.factors(machine, &node.capacity);
                wanted += factors.cpu_cores;
                MachineSample {
                    name: machine.spec.name.clone(),
                    factors,
                    lasted_ms: 0,
                    usage: Usage::default(),
                }
            })
            .collect();
        let waits = (wanted - node.capacity.cores).max(0.0);
        NodeSample {
            capacity: node.capacity,
            base: Factors::default(),
            machines,
            cpu_pressure: if wanted > 0.0 { waits / wanted } else { 0.0 },
            stall_pressure: 0.0,
        }
    }

    fn step(&mut self, number: usize, event: Event) {
        if !self.nodes[number].alive {
            return;
        }
        let now_ms = self.now_ms;
        let node = &mut self.nodes[number];
        let clock_ms = now_ms.saturating_add_signed(node.clock_ms);
        self.rule_set.set_time(now_ms);
        let commands = node.balancer.step(event, clock_ms, &self.rule_set);
        for command in commands {
            self.execute(number, command);
        }
        let node = &mut self.nodes[number];
        let wake_ms = node.balancer.wake_at_ms();
        if wake_ms == u64::MAX {
            return;
        }
        let wake_ms = wake_ms.saturating_add_signed(-node.clock_ms).max(now_ms);
        if wake_ms < node.wakes_ms {
            node.wakes_ms = wake_ms;
            let wake = QueuedEvent::Wake(number, node.incarnation);
            self.queue.put(wake_ms, wake);
        }
    }

    fn execute(&mut self, number: usize, command: Command) {
        match command {
            Command::SendRequest {
                round,
                peer,
                request,
            } => self.send_request(number, round, &peer, request),
            Command::SendResponse { ticket, response } => {
                self.send_response(number, ticket, response)
            }
            Command::Move { machine, target } => self.begin_move(number, &machine, &target),
            Command::Record(decision) => self.record(number, *decision),
            Command::Alert(text) => self.alerts.push((self.now_ms, number, text)),
        }
    }

    fn record(&mut self, number: usize, decision: Decision) {
        if self.keep_decisions {
            self.decisions.push(RecordedDecision {
                at_ms: self.now_ms,
                node: number,
                model: *self.nodes[number].balancer.model(),
                decision,
            });
        }
    }
}

impl Node {
    fn new(spec: &NodeSpec, policy: &Policy, seed: u64) -> Self {
        Node {
            name: spec.name.clone(),
            capacity: spec.capacity,
            balancer: Balancer::new(policy.clone(), 1, CostModel::default(), seed),
            machines: Vec::new(),
            alive: spec.there,
            incarnation: 0,
            wakes_ms: u64::MAX,
            clock_ms: CLOCK_MS,
            report_fault: None,
            measurement_fault: None,
            late_ms: 0,
            doubled: 0.0,
            repair_ms: 0,
        }
    }
}
