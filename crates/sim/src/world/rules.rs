//! Placement rules of the simulated cluster, enforced as by its store: a move that violates a rule
//! is refused whoever initiates it, and a machine whose placement violates one is moved by its
//! node.

use super::World;
use keel_balance::Name;
use keel_balance::ledger::Decision;
use keel_balance::policy::Mode;
use keel_balance::round::Constraints;
use keel_balance::rules::{
    Holders, Labels, Repair, Rule, Subject, Violation, domains_of, forbidden, holders_of, repair,
    violations_of,
};
use keel_balance::select::Constraint;
use rand::RngExt;
use std::collections::{BTreeMap, BTreeSet};

/// Interval between two repairs of a node, and between two attempts for a rule that no node
/// satisfies, in milliseconds.
const REPAIR_INTERVAL_MS: u64 = 2_000;
const UNREPAIRABLE_RETRY_MS: u64 = 60_000;

/// Rules, and the labels that they select by.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rulebook {
    pub rules: Vec<Rule>,
    pub nodes: BTreeMap<Name, Labels>,
    pub machines: BTreeMap<Name, Labels>,
}

impl Rulebook {
    /// A node, as rules see it.
    pub fn node(&self, name: &Name) -> Subject {
        subject(name, &self.nodes)
    }

    /// A machine, as rules see it.
    pub fn machine(&self, name: &Name) -> Subject {
        subject(name, &self.machines)
    }
}

fn subject(name: &Name, labels: &BTreeMap<Name, Labels>) -> Subject {
    Subject {
        name: name.clone(),
        labels: labels.get(name).cloned().unwrap_or_default(),
    }
}

#[derive(Debug, Default)]
pub(super) struct RuleSet {
    opted_out: BTreeSet<Name>,
    rulebook: Rulebook,
    holders: BTreeMap<Name, Holders>,
    domains: BTreeMap<Name, BTreeSet<String>>,
    alive: Vec<Name>,
    /// Machines whose placement violates a rule.
    pub(super) broken: Vec<(Name, Violation)>,
    /// Minute of the simulated day.
    minute: u32,
}

impl RuleSet {
    pub(super) fn new(rulebook: Rulebook, opted_out: BTreeSet<Name>) -> Self {
        RuleSet {
            opted_out,
            rulebook,
            ..RuleSet::default()
        }
    }

    pub(super) fn set_time(&mut self, now_ms: u64) {
        self.minute = (now_ms / 60_000 % 1440) as u32;
    }

    /// The rule that forbids a machine on a node.
    pub(super) fn forbids(&self, machine: &Name, node: &Name) -> Option<Violation> {
        let rules = &self.rulebook.rules;
        if rules.is_empty() {
            return None;
        }
        let machine = self.rulebook.machine(machine);
        let node = self.rulebook.node(node);
        forbidden(rules, &machine, &node, &self.holders, &self.domains)
    }
}

impl Constraints for RuleSet {
    fn constraint(&self, machine: &Name, target: &Name) -> Option<Constraint> {
        if self.opted_out.contains(machine) {
            return Some(Constraint::OptedOut);
        }
        if self.rulebook.rules.is_empty() {
            return None;
        }
        let subject = self.rulebook.machine(machine);
        let mut rules = self.rulebook.rules.iter();
        let broken = rules
            .find_map(|rule| rule.forbids_moving(&subject, self.minute))
            .or_else(|| self.forbids(machine, target))?;
        Some(Constraint::Rule {
            rule: broken.rule,
            reason: broken.why,
        })
    }
}

impl World {
    /// Machines whose placement violates a rule.
    pub fn broken(&self) -> &[(Name, Violation)] {
        &self.rule_set.broken
    }

    /// Number of moves made to restore a rule.
    pub fn repairs(&self) -> u64 {
        self.repairs
    }

    /// Number of moves that a rule refused at commit.
    pub fn raced(&self) -> u64 {
        self.raced
    }

    /// Recomputes holders and violations after a change of placements, nodes or rules.
    pub(super) fn update_placements(&mut self) {
        let rules = &self.rule_set.rulebook.rules;
        if rules.is_empty() {
            self.rule_set.broken.clear();
            return;
        }
        let mut placed = Vec::new();
        for node in &self.nodes {
            let machines = node.machines.iter();
            let names = machines.map(|number| &self.machines[*number].spec.name);
            placed.extend(names.map(|it| (self.rule_set.rulebook.machine(it), node.name.clone())));
        }
        let every: Vec<Subject> = self
            .nodes
            .iter()
            .map(|it| self.rule_set.rulebook.node(&it.name))
            .collect();
        let alive = self.nodes.iter().filter(|node| node.alive);
        let alive: Vec<Name> = alive.map(|node| node.name.clone()).collect();
        let there: Vec<Subject> = alive
            .iter()
            .map(|it| self.rule_set.rulebook.node(it))
            .collect();
        self.rule_set.holders = holders_of(rules, &placed, &every);
        self.rule_set.domains = domains_of(rules, &there);
        self.rule_set.broken = violations_of(rules, &placed, &there);
        self.rule_set.alive = alive;
    }

    pub(super) fn add_rule(&mut self, rule: Rule) {
        let rules = &mut self.rule_set.rulebook.rules;
        rules.retain(|it| it.name != rule.name);
        rules.push(rule);
        self.update_placements();
    }

    pub(super) fn remove_rule(&mut self, name: &Name) {
        self.rule_set.rulebook.rules.retain(|it| it.name != *name);
        self.update_placements();
    }

    /// Repairs a violation on a node; called once per sample.
    pub(super) fn repair(&mut self, number: usize) {
        let automatic = self.settings.policy.mode == Mode::Automatic;
        if self.rule_set.broken.is_empty()
            || !automatic
            || self.now_ms < self.nodes[number].repair_ms
        {
            return;
        }
        let node = &self.nodes[number];
        let here = |machine: &Name| {
            let machine = self.machine_numbers[machine];
            node.machines.contains(&machine)
        };
        let broken = self.rule_set.broken.iter();
        let broken: Vec<_> = broken.filter(|(it, _)| here(it)).cloned().collect();
        let movable = |machine: &Name| {
            let machine = &self.machines[self.machine_numbers[machine]];
            machine.runs && !machine.moves
        };
        let targets = |machine: &Name| {
            let others = self.rule_set.alive.iter().filter(|it| **it != node.name);
            let may = others.filter(|it| self.rule_set.forbids(machine, it).is_none());
            may.cloned().collect()
        };
        let rng = &mut self.rng;
        let found = repair(broken, movable, targets, |count| rng.random_range(0..count));
        let Some(Repair {
            machine,
            broken,
            target,
        }) = found
        else {
            return;
        };
        let pause_ms = match target {
            Some(_) => u64::MAX / 2,
            None => UNREPAIRABLE_RETRY_MS,
        };
        self.nodes[number].repair_ms = self.now_ms + pause_ms;
        self.record(
            number,
            Decision::Repair {
                machine: machine.clone(),
                target: target.clone(),
                broken,
            },
        );
        if let Some(target) = target {
            let (machine, target) = (self.machine_numbers[&machine], self.node_numbers[&target]);
            self.start_move(machine, number, target, true);
        }
    }

    pub(super) fn finish_repair(&mut self, number: usize) {
        self.nodes[number].repair_ms = self.now_ms + REPAIR_INTERVAL_MS;
    }
}
