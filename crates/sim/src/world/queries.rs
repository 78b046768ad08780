//! Queries of the simulated state.

use super::{CompletedMove, RecordedDecision, World};
use keel_balance::Name;
use keel_balance::cost::Link;
use keel_balance::load::Capacity;
use keel_balance::policy::Policy;
use keel_balance::round::{Constraints, check_offer};
use keel_balance::select::{Candidate, Considered, NodeState, Verdict, select};

/// State of a node, without moves in flight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NodeSnapshot {
    /// Whether it is alive.
    pub alive: bool,
    /// 0 if it is not alive.
    pub load: f64,
    /// CPU demand, in its cores.
    pub cpu_cores: f64,
    pub capacity: Capacity,
    pub machines: usize,
}

impl World {
    /// Simulated time, in milliseconds.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    pub fn policy(&self) -> &Policy {
        &self.settings.policy
    }

    pub fn moves(&self) -> &[CompletedMove] {
        &self.moves
    }

    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Moves that the limit of concurrent moves prevented.
    pub fn capped(&self) -> u64 {
        self.capped
    }

    /// Rounds started, of all nodes.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    pub fn decisions(&self) -> &[RecordedDecision] {
        &self.decisions
    }

    /// Alerts so far: time, node, text.
    pub fn alerts(&self) -> &[(u64, usize, String)] {
        &self.alerts
    }

    pub fn moving(&self) -> usize {
        self.moving
    }

    /// Numbers of the machines of a node.
    pub fn machines_of(&self, node: usize) -> &[usize] {
        &self.nodes[node].machines
    }

    pub fn node_name(&self, node: usize) -> &Name {
        &self.nodes[node].name
    }

    pub fn machine_name(&self, machine: usize) -> &Name {
        &self.machines[machine].spec.name
    }

    /// Machines that do not run because their node failed.
    pub fn stranded(&self) -> usize {
        let dead = self.nodes.iter().filter(|node| !node.alive);
        dead.map(|node| node.machines.len()).sum()
    }

    /// Each node as it is.
    pub fn node_snapshots(&self) -> impl Iterator<Item = NodeSnapshot> {
        let weights = &self.settings.policy.weights;
        self.nodes.iter().map(|node| {
            let mut now = NodeSnapshot {
                alive: node.alive,
                load: 0.0,
                cpu_cores: 0.0,
                capacity: node.capacity,
                machines: 0,
            };
            if !node.alive {
                return now;
            }
            for &machine in &node.machines {
                let factors = self.factors(&self.machines[machine], &node.capacity);
                now.load += factors.weigh(&node.capacity, weights);
                now.cpu_cores += factors.cpu_cores;
                now.machines += 1;
            }
            now
        })
    }

    /// Load of each node, without moves in flight.
    pub fn loads(&self) -> Vec<f64> {
        self.node_snapshots().map(|it| it.load).collect()
    }

    /// The sum over all nodes of power times load squared.
    pub fn sum_of_squares(&self) -> f64 {
        self.node_snapshots()
            .map(|it| it.capacity.power() * it.load * it.load)
            .sum()
    }

    fn node_state(&self, number: usize) -> NodeState {
        let policy = &self.settings.policy;
        let sample = self.sample(number);
        let load = sample.load(&policy.weights);
        NodeState {
            capacity: sample.capacity,
            load,
            memory_free_bytes: sample.memory_free_bytes(),
            pressed: load >= policy.pressed_load || sample.cpu_pressure >= policy.pressed_share,
            free: sample.machines.is_empty(),
        }
    }

    /// A move that the balancer's rules admit now, hold times aside: a converged cluster has none.
    /// Returns the target and the machine.
    pub fn admissible(&self) -> Option<(Name, Considered)> {
        let policy = &self.settings.policy;
        let alive = (0..self.nodes.len()).filter(|&number| self.nodes[number].alive);
        let mut sides: Vec<(usize, NodeState)> =
            alive.map(|it| (it, self.node_state(it))).collect();
        sides.sort_by(|one, other| one.1.load.total_cmp(&other.1.load));
        for (source, here) in sides.iter().rev() {
            if self.nodes[*source].machines.is_empty() {
                continue;
            }
            for (target, there) in &sides {
                let may = check_offer(here, there, (f64::INFINITY, true), policy).is_ok();
                if source == target || !may {
                    continue;
                }
                let name = &self.nodes[*target].name;
                if let Some(first) = self.best_candidate(*source, (here, there), name) {
                    return Some((name.clone(), first));
                }
            }
        }
        None
    }

    fn best_candidate(
        &self,
        source: usize,
        (here, there): (&NodeState, &NodeState),
        target: &Name,
    ) -> Option<Considered> {
        let policy = &self.settings.policy;
        let machines = self.nodes[source].machines.iter();
        let candidates: Vec<Candidate> = machines
            .map(|&number| {
                let machine = &self.machines[number];
                let factors = self.factors(machine, &here.capacity);
                let on = factors.on(&here.capacity, &there.capacity);
                Candidate {
                    machine: machine.spec.name.clone(),
                    factors,
                    there: on.weigh(&there.capacity, &policy.weights),
                    lasted_ms: self.now_ms - machine.since_ms,
                    compile_core_s: 0.0,
                    link: Link::NEAR,
                    spreadable: None,
                    constraint: self.rule_set.constraint(&machine.spec.name, target),
                }
            })
            .filter(|it| it.constraint.is_none())
            .collect();
        let model = self.nodes[source].balancer.model();
        let considered = select(here, there, &candidates, model, policy);
        let first = considered.into_iter().next()?;
        (first.verdict == Verdict::Chosen).then_some(first)
    }
}
