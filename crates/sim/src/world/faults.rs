//! What comes from outside: nodes that die and come, machines that start and end,
//! another policy, clocks that jump, nodes that lie or answer late.

use super::{Happening, Node, NodeSpec, World};
use keel_balance::Name;
use keel_balance::load::{Factors, NodeSample};
use keel_balance::policy::Policy;
use keel_balance::round::{Answer, Event, Question};
use keel_balance::rules::Rule;
use rand::RngExt;
use serde::{Deserialize, Serialize};

/// What can befall a world. Nodes and machines are numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// A node dies, with all that runs on it.
    NodeDies(usize),
    /// A node comes, or comes back.
    NodeComes(usize),
    /// A machine starts, on its node.
    MachineStarts(usize),
    /// A machine ends.
    MachineEnds(usize),
    /// The cluster has another policy.
    Policy(Box<Policy>),
    /// The cluster has one rule more, or another one of that name.
    RuleComes(Box<Rule>),
    /// The cluster has one rule less.
    RuleGoes(Name),
    /// A node's clock jumps.
    ClockJumps {
        /// Which node.
        node: usize,
        /// By how many milliseconds; backwards if negative.
        by_ms: i64,
    },
    /// What a node tells others is wrong from now on, or right again.
    Lies(usize, Option<Lie>),
    /// What a node measures is wrong from now on, or right again.
    Mismeasures(usize, Option<Lie>),
    /// A node answers late from now on, or more than once.
    Late {
        /// Which node.
        node: usize,
        /// By how many milliseconds.
        by_ms: u64,
        /// Share of its answers that come twice, 0 to 1.
        doubled: f64,
    },
}

/// What is wrong with a node's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lie {
    /// They are not numbers.
    Nan,
    /// They are below zero.
    Negative,
    /// They are infinite.
    Infinite,
    /// They are beyond what any computer has.
    Huge,
}

impl Lie {
    fn number(self) -> f64 {
        match self {
            Lie::Nan => f64::NAN,
            Lie::Negative => -7.0,
            Lie::Infinite => f64::INFINITY,
            Lie::Huge => 1e300,
        }
    }

    fn factors(self, factors: &mut Factors) {
        factors.cpu_cores = self.number();
        factors.io_bytes_per_s = self.number();
        factors.stalled = self.number();
    }

    pub(super) fn sample(self, sample: &mut NodeSample) {
        self.factors(&mut sample.base);
        for machine in &mut sample.machines {
            self.factors(&mut machine.factors);
        }
    }

    pub(super) fn question(self, question: &mut Question) {
        match question {
            Question::View | Question::Release { .. } => {}
            Question::Weigh { capacity, factors } => {
                capacity.cores = self.number();
                factors.iter_mut().for_each(|it| self.factors(it));
            }
            Question::Take { factors, load, .. } => {
                self.factors(factors);
                *load = self.number();
            }
        }
    }

    pub(super) fn answer(self, answer: &mut Answer) {
        match answer {
            Answer::View(view) => {
                view.side.load = self.number();
                view.loads.fill(self.number());
            }
            Answer::Weights(weights) => weights.fill(self.number()),
            Answer::Measuring
            | Answer::Granted
            | Answer::Busy
            | Answer::Refused { .. }
            | Answer::Released => {}
        }
    }
}

impl World {
    /// Lets something befall the world at an instant; one that has passed is now.
    pub fn at(&mut self, at_ms: u64, what: What) {
        self.queue
            .put(at_ms.max(self.now_ms), Happening::Befall(what));
    }

    pub(super) fn befall(&mut self, what: What) {
        match what {
            What::NodeDies(node) => self.node_dies(node),
            What::NodeComes(node) => self.node_comes(node),
            What::MachineStarts(machine) => self.machine_starts(machine),
            What::MachineEnds(machine) => {
                let it = &mut self.machines[machine];
                it.runs = false;
                let node = it.node;
                self.nodes[node].machines.retain(|it| *it != machine);
                self.placed_anew();
            }
            What::RuleComes(rule) => self.rule_comes(*rule),
            What::RuleGoes(name) => self.rule_goes(&name),
            What::Policy(policy) => {
                self.policy_revision += 1;
                self.settings.policy = *policy;
                for number in 0..self.nodes.len() {
                    self.tell_policy(number);
                }
            }
            What::ClockJumps { node, by_ms } => {
                self.nodes[node].clock_ms = self.nodes[node].clock_ms.saturating_add(by_ms);
                // What it waits for is due at another instant now.
                self.nodes[node].wakes_ms = u64::MAX;
                self.step(node, Event::Tick);
            }
            What::Lies(node, lie) => self.nodes[node].lie = lie,
            What::Mismeasures(node, lie) => self.nodes[node].mismeasures = lie,
            What::Late {
                node,
                by_ms,
                doubled,
            } => {
                self.nodes[node].late_ms = by_ms;
                self.nodes[node].doubled = doubled;
            }
        }
    }

    fn tell_policy(&mut self, number: usize) {
        let policy = Box::new(self.settings.policy.clone());
        let event = Event::Policy(policy, self.policy_revision);
        self.step(number, event);
    }

    fn node_dies(&mut self, node: usize) {
        if !self.nodes[node].alive {
            return;
        }
        self.nodes[node].alive = false;
        self.nodes[node].life += 1;
        for &machine in &self.nodes[node].machines {
            self.machines[machine].runs = false;
        }
        self.placed_anew();
        let noticed_ms = self.now_ms + self.settings.network.noticed_ms;
        self.queue.put(noticed_ms, Happening::Notice);
        if let Some(failover_ms) = self.settings.failover_ms {
            let life = self.nodes[node].life;
            self.queue
                .put(self.now_ms + failover_ms, Happening::FailOver(node, life));
        }
    }

    fn node_comes(&mut self, node: usize) {
        if self.nodes[node].alive {
            return;
        }
        let old = &self.nodes[node];
        let spec = NodeSpec {
            name: old.name.clone(),
            capacity: old.capacity,
            there: true,
        };
        let seed = self.rng.random();
        let mut fresh = Node::new(&spec, &self.settings.policy, seed);
        fresh.life = old.life + 1;
        fresh.clock_ms = old.clock_ms;
        // What waited for its node runs again.
        fresh.machines.clone_from(&old.machines);
        for &machine in &fresh.machines {
            self.machines[machine].runs = true;
            self.machines[machine].since_ms = self.now_ms;
        }
        self.nodes[node] = fresh;
        self.placed_anew();
        self.tell_policy(node);
        self.begin_sampling(node);
        let noticed_ms = self.now_ms + self.settings.network.noticed_ms;
        self.queue.put(noticed_ms, Happening::Notice);
    }

    fn machine_starts(&mut self, machine: usize) {
        let it = &self.machines[machine];
        if it.runs {
            return;
        }
        let node = if self.nodes[it.node].alive {
            it.node
        } else {
            match self.roomiest(machine) {
                Some(node) => node,
                None => return,
            }
        };
        self.run_on(machine, node);
    }

    fn run_on(&mut self, machine: usize, node: usize) {
        let it = &mut self.machines[machine];
        it.runs = true;
        it.node = node;
        it.since_ms = self.now_ms;
        self.nodes[node].machines.push(machine);
        self.placed_anew();
    }

    /// The node with the least load that has the memory for a machine, and on which
    /// rules allow it.
    fn roomiest(&self, machine: usize) -> Option<usize> {
        let needs = self.machines[machine].spec.memory_bytes;
        let weights = &self.settings.policy.weights;
        let name = &self.machines[machine].spec.name;
        let alive = (0..self.nodes.len()).filter(|&number| {
            let node = &self.nodes[number];
            node.alive && self.book.forbids(name, &node.name).is_none()
        });
        let roomy = alive.filter_map(|number| {
            let sample = self.sample(number);
            (sample.memory_free_bytes() >= needs).then(|| (sample.load(weights), number))
        });
        let least = roomy.min_by(|one, other| one.0.total_cmp(&other.0))?;
        Some(least.1)
    }

    pub(super) fn fail_over(&mut self, node: usize, life: u32) {
        if self.nodes[node].alive || self.nodes[node].life != life {
            return;
        }
        let mut stranded = Vec::new();
        for machine in std::mem::take(&mut self.nodes[node].machines) {
            match self.roomiest(machine) {
                Some(target) => self.run_on(machine, target),
                None => stranded.push(machine),
            }
        }
        self.nodes[node].machines = stranded;
        self.placed_anew();
    }
}
