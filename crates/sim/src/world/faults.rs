//! External events: node failures and starts, machine starts and ends, policy changes, clock jumps,
//! invalid reports and slow responses.

use super::{Node, NodeSpec, QueuedEvent, World};
use keel_balance::Name;
use keel_balance::load::{Factors, NodeSample};
use keel_balance::policy::Policy;
use keel_balance::round::{Event, Request, Response};
use keel_balance::rules::Rule;
use rand::RngExt;
use serde::{Deserialize, Serialize};

/// An external event. Nodes and machines are numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum ExternalEvent {
    /// A node fails, with all its machines.
    NodeFails(usize),
    /// A node starts, or starts again.
    NodeStarts(usize),
    /// A machine starts, on its node.
    MachineStarts(usize),
    MachineEnds(usize),
    Policy(Box<Policy>),
    /// A rule is added or replaced.
    RuleAdded(Box<Rule>),
    /// A rule is removed.
    RuleRemoved(Name),
    ClockJumps {
        node: usize,
        /// In milliseconds; backwards if negative.
        by_ms: i64,
    },
    /// A node reports invalid numbers from now on, or valid ones again.
    ReportFault(usize, Option<InvalidReport>),
    /// A node measures invalid numbers from now on, or valid ones again.
    MeasurementFault(usize, Option<InvalidReport>),
    /// A node responds late from now on, or more than once.
    SlowResponses {
        node: usize,
        /// By how many milliseconds.
        by_ms: u64,
        /// Share of its responses that are duplicated, 0 to 1.
        doubled: f64,
    },
}

/// The kind of invalid number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InvalidReport {
    Nan,
    /// They are below zero.
    Negative,
    Infinite,
    /// They exceed any real computer.
    Huge,
}

impl InvalidReport {
    fn number(self) -> f64 {
        match self {
            InvalidReport::Nan => f64::NAN,
            InvalidReport::Negative => -7.0,
            InvalidReport::Infinite => f64::INFINITY,
            InvalidReport::Huge => 1e300,
        }
    }

    fn factors(self, factors: &mut Factors) {
        factors.cpu_cores = self.number();
        factors.io_bytes_per_s = self.number();
        factors.stalled = self.number();
    }

    pub(super) fn corrupt_sample(self, sample: &mut NodeSample) {
        self.factors(&mut sample.base);
        for machine in &mut sample.machines {
            self.factors(&mut machine.factors);
        }
    }

    pub(super) fn corrupt_request(self, request: &mut Request) {
        match request {
            Request::View | Request::Release { .. } => {}
            Request::Weigh { capacity, factors } => {
                capacity.cores = self.number();
                factors.iter_mut().for_each(|it| self.factors(it));
            }
            Request::Reserve { factors, load, .. } => {
                self.factors(factors);
                *load = self.number();
            }
        }
    }

    pub(super) fn corrupt_response(self, response: &mut Response) {
        match response {
            Response::View(view) => {
                view.state.load = self.number();
                view.loads.fill(self.number());
            }
            Response::Weights(weights) => weights.fill(self.number()),
            Response::NotReady
            | Response::Granted
            | Response::Busy
            | Response::Refused { .. }
            | Response::Released => {}
        }
    }
}

impl World {
    /// Schedules an event; a time in the past means now.
    pub fn schedule(&mut self, at_ms: u64, what: ExternalEvent) {
        self.queue
            .put(at_ms.max(self.now_ms), QueuedEvent::External(what));
    }

    pub(super) fn apply_event(&mut self, what: ExternalEvent) {
        match what {
            ExternalEvent::NodeFails(node) => self.fail_node(node),
            ExternalEvent::NodeStarts(node) => self.start_node(node),
            ExternalEvent::MachineStarts(machine) => self.start_machine(machine),
            ExternalEvent::MachineEnds(machine) => {
                let it = &mut self.machines[machine];
                it.runs = false;
                let node = it.node;
                self.nodes[node].machines.retain(|it| *it != machine);
                self.update_placements();
            }
            ExternalEvent::RuleAdded(rule) => self.add_rule(*rule),
            ExternalEvent::RuleRemoved(name) => self.remove_rule(&name),
            ExternalEvent::Policy(policy) => {
                self.policy_revision += 1;
                self.settings.policy = *policy;
                for number in 0..self.nodes.len() {
                    self.publish_policy(number);
                }
            }
            ExternalEvent::ClockJumps { node, by_ms } => {
                self.nodes[node].clock_ms = self.nodes[node].clock_ms.saturating_add(by_ms);
                // Its deadlines have moved.
                self.nodes[node].wakes_ms = u64::MAX;
                self.step(node, Event::Tick);
            }
            ExternalEvent::ReportFault(node, report_fault) => {
                self.nodes[node].report_fault = report_fault
            }
            ExternalEvent::MeasurementFault(node, report_fault) => {
                self.nodes[node].measurement_fault = report_fault
            }
            ExternalEvent::SlowResponses {
                node,
                by_ms,
                doubled,
            } => {
                self.nodes[node].late_ms = by_ms;
                self.nodes[node].doubled = doubled;
            }
        }
    }

    fn publish_policy(&mut self, number: usize) {
        let policy = Box::new(self.settings.policy.clone());
        let event = Event::Policy(policy, self.policy_revision);
        self.step(number, event);
    }

    fn fail_node(&mut self, node: usize) {
        if !self.nodes[node].alive {
            return;
        }
        self.nodes[node].alive = false;
        self.nodes[node].incarnation += 1;
        for &machine in &self.nodes[node].machines {
            self.machines[machine].runs = false;
        }
        self.update_placements();
        let noticed_ms = self.now_ms + self.settings.network.noticed_ms;
        self.queue.put(noticed_ms, QueuedEvent::MembershipChange);
        if let Some(failover_ms) = self.settings.failover_ms {
            let incarnation = self.nodes[node].incarnation;
            self.queue.put(
                self.now_ms + failover_ms,
                QueuedEvent::FailOver(node, incarnation),
            );
        }
    }

    fn start_node(&mut self, node: usize) {
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
        fresh.incarnation = old.incarnation + 1;
        fresh.clock_ms = old.clock_ms;
        // Machines that waited for their node run again.
        fresh.machines.clone_from(&old.machines);
        for &machine in &fresh.machines {
            self.machines[machine].runs = true;
            self.machines[machine].since_ms = self.now_ms;
        }
        self.nodes[node] = fresh;
        self.update_placements();
        self.publish_policy(node);
        self.begin_sampling(node);
        let noticed_ms = self.now_ms + self.settings.network.noticed_ms;
        self.queue.put(noticed_ms, QueuedEvent::MembershipChange);
    }

    fn start_machine(&mut self, machine: usize) {
        let it = &self.machines[machine];
        if it.runs {
            return;
        }
        let node = if self.nodes[it.node].alive {
            it.node
        } else {
            match self.least_loaded_node(machine) {
                Some(node) => node,
                None => return,
            }
        };
        self.place_on(machine, node);
    }

    fn place_on(&mut self, machine: usize, node: usize) {
        let it = &mut self.machines[machine];
        it.runs = true;
        it.node = node;
        it.since_ms = self.now_ms;
        self.nodes[node].machines.push(machine);
        self.update_placements();
    }

    /// The least loaded node that has the memory for a machine, and that rules allow.
    fn least_loaded_node(&self, machine: usize) -> Option<usize> {
        let needs = self.machines[machine].spec.memory_bytes;
        let weights = &self.settings.policy.weights;
        let name = &self.machines[machine].spec.name;
        let alive = (0..self.nodes.len()).filter(|&number| {
            let node = &self.nodes[number];
            node.alive && self.rule_set.forbids(name, &node.name).is_none()
        });
        let roomy = alive.filter_map(|number| {
            let sample = self.sample(number);
            (sample.memory_free_bytes() >= needs).then(|| (sample.load(weights), number))
        });
        let least = roomy.min_by(|one, other| one.0.total_cmp(&other.0))?;
        Some(least.1)
    }

    pub(super) fn fail_over(&mut self, node: usize, incarnation: u32) {
        if self.nodes[node].alive || self.nodes[node].incarnation != incarnation {
            return;
        }
        let mut stranded = Vec::new();
        for machine in std::mem::take(&mut self.nodes[node].machines) {
            match self.least_loaded_node(machine) {
                Some(target) => self.place_on(machine, target),
                None => stranded.push(machine),
            }
        }
        self.nodes[node].machines = stranded;
        self.update_placements();
    }
}
