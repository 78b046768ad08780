//! A simulated cluster: nodes with the balancer's own state machines, machines that
//! demand what their curves say, messages that take time and get lost, moves that
//! take time and fail. Time is a number; all of chance comes from one seed.

use crate::curve::Curve;
use keel_balance::Name;
use keel_balance::cost::CostModel;
use keel_balance::ledger::{Decision, Outcome};
use keel_balance::load::{Capacity, Factors, MachineSample, NodeSample};
use keel_balance::policy::Policy;
use keel_balance::round::{Answer, Balancer, Bounds, Command, Event, Question, Unbound};
use keel_balance::select::{Candidate, Considered, Side, Verdict, select};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// A node to begin with.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Its name.
    pub name: Name,
    /// What it can give.
    pub capacity: Capacity,
}

/// A machine to begin with.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// Its name.
    pub name: Name,
    /// Where it is, as the node's number.
    pub node: usize,
    /// What it demands. Cores of the reference speed; if it burns, cores of any.
    pub curve: Curve,
    /// Whether its threads never rest, so that it demands as many cores on any node.
    pub burns: bool,
    /// Memory that it occupies, in bytes.
    pub memory_bytes: u64,
    /// Bytes that it writes to memory, a second.
    pub dirty_bytes_per_s: f64,
}

/// How messages travel.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    /// Least and most milliseconds of a message.
    pub delay_ms: (u64, u64),
    /// Share of messages that get lost, 0 to 1.
    pub lost: f64,
    /// Share of messages that come twice, 0 to 1.
    pub doubled: f64,
    /// Bytes a second that one move copies.
    pub bytes_per_s: f64,
    /// Share of moves that fail, 0 to 1.
    pub moves_failed: f64,
}

impl Default for Network {
    fn default() -> Self {
        Network {
            delay_ms: (1, 3),
            lost: 0.0,
            doubled: 0.0,
            bytes_per_s: 800e6,
            moves_failed: 0.0,
        }
    }
}

/// How a simulation is run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Says all of chance.
    pub seed: u64,
    /// Milliseconds from one sample of a node to the next.
    pub sample_ms: u64,
    /// How messages travel.
    pub network: Network,
    /// What the cluster wants of its balancer.
    pub policy: Policy,
}

/// A move that took place.
#[derive(Debug, Clone, PartialEq)]
pub struct Moved {
    /// When it was over, in milliseconds.
    pub at_ms: u64,
    /// The machine's number.
    pub machine: usize,
    /// The source's number.
    pub source: usize,
    /// The target's number.
    pub target: usize,
    /// Bytes that it sent.
    pub bytes: f64,
}

/// A decision and who made it.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    /// When, in milliseconds.
    pub at_ms: u64,
    /// The node's number.
    pub node: usize,
    /// What was decided.
    pub decision: Decision,
}

#[derive(Debug)]
struct Node {
    name: Name,
    capacity: Capacity,
    balancer: Balancer,
    machines: Vec<usize>,
    alive: bool,
    /// When it is to be woken, as far as that is in the queue.
    wakes_ms: u64,
}

#[derive(Debug)]
struct Machine {
    spec: MachineSpec,
    node: usize,
    since_ms: u64,
}

#[derive(Debug)]
enum Happening {
    Sample(usize),
    Wake(usize),
    Tell(usize, Event),
    MoveOver {
        machine: usize,
        source: usize,
        target: usize,
        duration_ms: u64,
        failed: bool,
    },
}

struct Queued {
    at_ms: u64,
    number: u64,
    happening: Happening,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Queued {}

impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_ms, self.number).cmp(&(other.at_ms, other.number))
    }
}

/// A simulated cluster.
pub struct World {
    settings: Settings,
    rng: SmallRng,
    now_ms: u64,
    queue: BinaryHeap<Reverse<Queued>>,
    queued: u64,
    nodes: Vec<Node>,
    machines: Vec<Machine>,
    node_numbers: HashMap<Name, usize>,
    machine_numbers: HashMap<Name, usize>,
    /// Questions that wait for a reply: who asked, in which round.
    tickets: HashMap<u64, (usize, u64)>,
    tickets_made: u64,
    moving: usize,
    moves: Vec<Moved>,
    failed: u64,
    rounds: u64,
    decisions: Vec<Made>,
    alerts: Vec<(u64, usize, String)>,
    keep_decisions: bool,
}

impl World {
    /// One of these nodes and machines. Names must differ.
    pub fn new(settings: Settings, nodes: &[NodeSpec], machines: &[MachineSpec]) -> Self {
        let mut rng = SmallRng::seed_from_u64(settings.seed);
        let names: Vec<Name> = nodes.iter().map(|node| node.name.clone()).collect();
        let mut world = World {
            now_ms: 0,
            queue: BinaryHeap::new(),
            queued: 0,
            node_numbers: names.iter().cloned().zip(0..).collect(),
            machine_numbers: machines.iter().map(|it| it.name.clone()).zip(0..).collect(),
            nodes: nodes
                .iter()
                .map(|node| Node {
                    name: node.name.clone(),
                    capacity: node.capacity,
                    balancer: Balancer::new(
                        settings.policy.clone(),
                        1,
                        CostModel::default(),
                        rng.random(),
                    ),
                    machines: Vec::new(),
                    alive: true,
                    wakes_ms: u64::MAX,
                })
                .collect(),
            machines: machines
                .iter()
                .map(|spec| Machine {
                    node: spec.node,
                    spec: spec.clone(),
                    since_ms: 0,
                })
                .collect(),
            tickets: HashMap::new(),
            tickets_made: 0,
            moving: 0,
            moves: Vec::new(),
            failed: 0,
            rounds: 0,
            decisions: Vec::new(),
            alerts: Vec::new(),
            keep_decisions: true,
            rng,
            settings,
        };
        for (number, machine) in machines.iter().enumerate() {
            world.nodes[machine.node].machines.push(number);
        }
        for number in 0..world.nodes.len() {
            let first_ms = world.rng.random_range(0..world.settings.sample_ms);
            world.put(first_ms, Happening::Sample(number));
        }
        world.tell_peers();
        world
    }

    /// Decisions are not kept: large worlds make many.
    pub fn forget_decisions(&mut self) {
        self.keep_decisions = false;
    }

    fn put(&mut self, at_ms: u64, happening: Happening) {
        self.queued += 1;
        self.queue.push(Reverse(Queued {
            at_ms,
            number: self.queued,
            happening,
        }));
    }

    fn tell_peers(&mut self) {
        let alive: Vec<Name> = self
            .nodes
            .iter()
            .filter(|node| node.alive)
            .map(|node| node.name.clone())
            .collect();
        for number in 0..self.nodes.len() {
            let name = self.nodes[number].name.clone();
            let peers = alive.iter().filter(|it| **it != name).cloned().collect();
            self.step(number, Event::Peers(peers));
        }
    }

    /// Runs until an instant, in milliseconds.
    pub fn run_until(&mut self, until_ms: u64) {
        while let Some(Reverse(next)) = self.queue.peek()
            && next.at_ms <= until_ms
        {
            let Some(Reverse(next)) = self.queue.pop() else {
                break;
            };
            self.now_ms = next.at_ms;
            self.happen(next.happening);
        }
        self.now_ms = until_ms;
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Sample(node) => {
                self.put(
                    self.now_ms + self.settings.sample_ms,
                    Happening::Sample(node),
                );
                let sample = self.sample(node);
                self.step(node, Event::Sample(sample));
            }
            Happening::Wake(node) => {
                self.nodes[node].wakes_ms = u64::MAX;
                self.step(node, Event::Tick);
            }
            Happening::Tell(node, event) => self.step(node, event),
            Happening::MoveOver {
                machine,
                source,
                target,
                duration_ms,
                failed,
            } => self.move_over(machine, (source, target), duration_ms, failed),
        }
    }

    fn factors(&self, machine: &Machine, capacity: &Capacity) -> Factors {
        let demand = machine.spec.curve.cores(self.now_ms);
        let cpu_cores = if machine.spec.burns {
            demand
        } else {
            demand / capacity.speed
        };
        Factors {
            cpu_cores,
            cpu_bound_cores: if machine.spec.burns { demand } else { 0.0 },
            memory_bytes: machine.spec.memory_bytes,
            dirty_bytes_per_s: machine.spec.dirty_bytes_per_s,
            ..Factors::default()
        }
    }

    fn sample(&self, number: usize) -> NodeSample {
        let node = &self.nodes[number];
        let machines: Vec<MachineSample> = node
            .machines
            .iter()
            .map(|&number| {
                let machine = &self.machines[number];
                MachineSample {
                    name: machine.spec.name.clone(),
                    factors: self.factors(machine, &node.capacity),
                    lasted_ms: 0,
                }
            })
            .collect();
        let wanted: f64 = machines.iter().map(|it| it.factors.cpu_cores).sum();
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
        let bounds: &dyn Bounds = &Unbound;
        let commands = self.nodes[number].balancer.step(event, now_ms, bounds);
        for command in commands {
            self.carry_out(number, command);
        }
        let node = &mut self.nodes[number];
        let wake_ms = node.balancer.wake_at_ms();
        if wake_ms < node.wakes_ms {
            node.wakes_ms = wake_ms;
            self.put(wake_ms.max(now_ms), Happening::Wake(number));
        }
    }

    /// When a message that is sent now comes: never, once, or twice.
    fn arrivals(&mut self) -> Vec<u64> {
        let network = self.settings.network;
        if self.rng.random_bool(network.lost) {
            return Vec::new();
        }
        let times = if self.rng.random_bool(network.doubled) {
            2
        } else {
            1
        };
        let (least, most) = network.delay_ms;
        (0..times)
            .map(|_| self.now_ms + self.rng.random_range(least..=most))
            .collect()
    }

    fn carry_out(&mut self, number: usize, command: Command) {
        match command {
            Command::Ask {
                round,
                peer,
                question,
            } => self.ask(number, round, &peer, &question),
            Command::Reply { ticket, answer } => self.reply(ticket, &answer),
            Command::Move { machine, target } => self.begin_move(number, &machine, &target),
            Command::Record(decision) => {
                if self.keep_decisions {
                    self.decisions.push(Made {
                        at_ms: self.now_ms,
                        node: number,
                        decision: *decision,
                    });
                }
            }
            Command::Alert(text) => self.alerts.push((self.now_ms, number, text)),
        }
    }

    fn ask(&mut self, asker: usize, round: u64, peer: &Name, question: &Question) {
        if matches!(question, Question::View) {
            self.rounds += 1;
        }
        let target = self.node_numbers[peer];
        let name = self.nodes[asker].name.clone();
        for at_ms in self.arrivals() {
            self.tickets_made += 1;
            let ticket = self.tickets_made;
            self.tickets.insert(ticket, (asker, round));
            let event = Event::Asked {
                ticket,
                peer: name.clone(),
                question: question.clone(),
            };
            self.put(at_ms, Happening::Tell(target, event));
        }
    }

    fn reply(&mut self, ticket: u64, answer: &Answer) {
        let Some((asker, round)) = self.tickets.remove(&ticket) else {
            return;
        };
        for at_ms in self.arrivals() {
            let event = Event::Answered {
                round,
                answer: Some(answer.clone()),
            };
            self.put(at_ms, Happening::Tell(asker, event));
        }
    }

    fn begin_move(&mut self, source: usize, machine: &Name, target: &Name) {
        let number = self.machine_numbers[machine];
        let target = self.node_numbers[target];
        let most = self.settings.policy.moves_at_once(self.nodes.len());
        let here = self.machines[number].node == source && self.nodes[target].alive;
        if !here || self.moving >= most as usize {
            let outcome = if here {
                Outcome::Capped
            } else {
                Outcome::Stayed {
                    why: "the target is gone".into(),
                }
            };
            let event = Event::MoveEnded {
                machine: machine.clone(),
                outcome,
            };
            self.put(self.now_ms + 1, Happening::Tell(source, event));
            return;
        }
        let failed = self.rng.random_bool(self.settings.network.moves_failed);
        let duration_ms = self.duration_ms(number);
        self.moving += 1;
        let coming = Event::Arriving {
            machine: machine.clone(),
        };
        self.step(target, coming);
        self.put(
            self.now_ms + duration_ms,
            Happening::MoveOver {
                machine: number,
                source,
                target,
                duration_ms,
                failed,
            },
        );
    }

    fn bytes(&self, machine: usize) -> f64 {
        let spec = &self.machines[machine].spec;
        let rate = self.settings.network.bytes_per_s;
        let again = (spec.dirty_bytes_per_s / rate).min(0.8);
        spec.memory_bytes as f64 / (1.0 - again)
    }

    fn duration_ms(&self, machine: usize) -> u64 {
        let rate = self.settings.network.bytes_per_s;
        100 + (self.bytes(machine) / rate * 1e3) as u64
    }

    fn move_over(
        &mut self,
        machine: usize,
        (source, target): (usize, usize),
        duration_ms: u64,
        failed: bool,
    ) {
        self.moving -= 1;
        let name = self.machines[machine].spec.name.clone();
        let failed = failed || !self.nodes[target].alive;
        if failed || !self.nodes[source].alive {
            self.failed += 1;
            let gone = Event::ArrivalFailed {
                machine: name.clone(),
            };
            self.step(target, gone);
            let outcome = Outcome::Stayed {
                why: "the connection was lost".into(),
            };
            let ended = Event::MoveEnded {
                machine: name,
                outcome,
            };
            self.step(source, ended);
            return;
        }
        let bytes = self.bytes(machine);
        self.nodes[source].machines.retain(|it| *it != machine);
        self.nodes[target].machines.push(machine);
        self.machines[machine].node = target;
        self.machines[machine].since_ms = self.now_ms;
        self.moves.push(Moved {
            at_ms: self.now_ms,
            machine,
            source,
            target,
            bytes,
        });
        let arrived = Event::Arrived {
            machine: name.clone(),
            from: self.nodes[source].name.clone(),
        };
        self.step(target, arrived);
        let outcome = Outcome::Moved {
            duration_ms: duration_ms as f64,
            downtime_ms: 4.0,
            bytes: bytes as u64,
        };
        let ended = Event::MoveEnded {
            machine: name,
            outcome,
        };
        self.step(source, ended);
    }

    // ── what others may look at ─────────────────────────────────────────

    /// Now, in milliseconds.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Moves so far.
    pub fn moves(&self) -> &[Moved] {
        &self.moves
    }

    /// Moves that failed.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Rounds that were begun, of all nodes.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Decisions so far.
    pub fn decisions(&self) -> &[Made] {
        &self.decisions
    }

    /// Alerts so far: when, which node, what.
    pub fn alerts(&self) -> &[(u64, usize, String)] {
        &self.alerts
    }

    /// Moves under way.
    pub fn moving(&self) -> usize {
        self.moving
    }

    /// Machines of a node, by number.
    pub fn machines_of(&self, node: usize) -> &[usize] {
        &self.nodes[node].machines
    }

    /// Each node's load as it is, without anything in flight.
    pub fn loads(&self) -> Vec<f64> {
        let weights = &self.settings.policy.weights;
        (0..self.nodes.len())
            .map(|number| self.sample(number).load(weights))
            .collect()
    }

    /// The sum over all nodes of power times load squared.
    pub fn sum_of_squares(&self) -> f64 {
        let loads = self.loads();
        let nodes = self.nodes.iter().zip(loads);
        nodes
            .map(|(node, load)| node.capacity.power() * load * load)
            .sum()
    }

    /// A move that the balancer's own rules admit now, hold times left aside: none is
    /// left once a cluster has converged.
    pub fn admissible(&self) -> Option<(Name, Considered)> {
        let policy = &self.settings.policy;
        let loads = self.loads();
        let side = |number: usize| {
            let sample = self.sample(number);
            Side {
                capacity: sample.capacity,
                load: loads[number],
                memory_free_bytes: sample.memory_free_bytes(),
                pressed: loads[number] >= policy.pressed_load
                    || sample.cpu_pressure >= policy.pressed_share,
            }
        };
        let sides: Vec<Side> = (0..self.nodes.len()).map(side).collect();
        for (source, here) in sides.iter().enumerate() {
            for (target, there) in sides.iter().enumerate() {
                let margin = policy.margin_between(here.load, there.load);
                if source == target || here.load - there.load <= margin || !here.pressed {
                    continue;
                }
                let candidates: Vec<Candidate> = self.nodes[source]
                    .machines
                    .iter()
                    .map(|&number| {
                        let machine = &self.machines[number];
                        let factors = self.factors(machine, &here.capacity);
                        let on = factors.on(&here.capacity, &there.capacity);
                        Candidate {
                            machine: machine.spec.name.clone(),
                            factors,
                            there: on.weigh(&there.capacity, &policy.weights),
                            lasted_ms: self.now_ms - machine.since_ms,
                            bound: None,
                        }
                    })
                    .collect();
                let model = self.nodes[source].balancer.model();
                let considered = select(here, there, &candidates, model, policy);
                if let Some(first) = considered.into_iter().next()
                    && first.verdict == Verdict::Chosen
                {
                    return Some((self.nodes[target].name.clone(), first));
                }
            }
        }
        None
    }
}
