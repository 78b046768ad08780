//! The repair of violated rules by the fewest moves. Carrying them out is left to the node.

use super::{Holders, Requirement, Rule, Subject, Violation, holders_of};
use crate::Name;
use std::collections::BTreeSet;

/// A move that restores a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    pub machine: Name,
    /// The violated rule.
    pub broken: Violation,
    /// `None` if no node is allowed.
    pub target: Option<Name>,
}

/// The next repair of a node: the first of its machines that violates a rule and can move, to a
/// random allowed node.
pub fn repair(
    broken: Vec<(Name, Violation)>,
    movable: impl Fn(&Name) -> bool,
    targets: impl Fn(&Name) -> Vec<Name>,
    draw: impl FnOnce(usize) -> usize,
) -> Option<Repair> {
    let mut broken = broken.into_iter();
    let (machine, broken) = broken.find(|(machine, _)| movable(machine))?;
    let mut targets = targets(&machine);
    let target = match targets.len() {
        0 => None,
        count => Some(targets.swap_remove(draw(count).min(count - 1))),
    };
    Some(Repair {
        machine,
        broken,
        target,
    })
}

/// The machines that must move to satisfy every rule, each with the rule that it violates: the
/// minimum for each rule by itself. The result is the same on every node.
pub fn violations_of(
    rules: &[Rule],
    placed: &[(Subject, Name)],
    nodes: &[Subject],
) -> Vec<(Name, Violation)> {
    let all = holders_of(rules, placed, nodes);
    let none = Holders::new();
    let mut found: Vec<(Name, Violation)> = Vec::new();
    for rule in rules {
        let held = all.get(&rule.name).unwrap_or(&none);
        for (machine, why) in rule.violators(held, placed, nodes) {
            if !found.iter().any(|(known, _)| *known == machine) {
                found.push((machine, rule.violation(why)));
            }
        }
    }
    found
}

impl Rule {
    /// Machines that violate this rule.
    fn violators(
        &self,
        held: &Holders,
        placed: &[(Subject, Name)],
        nodes: &[Subject],
    ) -> Vec<(Name, String)> {
        // The last machines of a domain, by name, beyond the limit.
        let beyond = |domain: &str, machines: &BTreeSet<Name>, most: usize| {
            let why = format!("{} {domain} has {}", self.per(), machines.len());
            let many = machines.iter().skip(most);
            many.map(|it| (it.clone(), why.clone())).collect::<Vec<_>>()
        };
        match &self.requirement {
            Requirement::Apart { max, .. } => held
                .iter()
                .flat_map(|(domain, machines)| beyond(domain, machines, *max as usize))
                .collect(),
            Requirement::Together { .. } => by_size(held)
                .skip(1)
                .flat_map(|(d, m)| beyond(d, m, 0))
                .collect(),
            Requirement::Licence { nodes_max } => by_size(held)
                .skip(*nodes_max as usize)
                .flat_map(|(domain, machines)| beyond(domain, machines, 0))
                .collect(),
            Requirement::Spread { per, skew } => {
                let domains: BTreeSet<String> = nodes
                    .iter()
                    .map(|node| per.of(&node.name, &node.labels))
                    .collect();
                let count = |domain: &String| held.get(domain).map_or(0, BTreeSet::len);
                let least = domains.iter().map(count).min().unwrap_or(0);
                held.iter()
                    .filter(|(_, machines)| machines.len() > least + *skew as usize)
                    .flat_map(|(domain, machines)| beyond(domain, machines, machines.len() - 1))
                    .collect()
            }
            Requirement::Pin { .. } | Requirement::Avoid { .. } => placed
                .iter()
                .filter_map(|(machine, at)| {
                    let node = nodes.iter().find(|it| it.name == *at)?;
                    let broken = self.claim(machine, node, held, &BTreeSet::new()).err()?;
                    Some((machine.name.clone(), broken.why))
                })
                .collect(),
            Requirement::Stay | Requirement::Hours { .. } => Vec::new(),
        }
    }
}

/// Domains that have machines, those with the most first.
fn by_size(held: &Holders) -> impl Iterator<Item = (&String, &BTreeSet<Name>)> {
    let mut used: Vec<_> = held.iter().filter(|(_, it)| !it.is_empty()).collect();
    used.sort_by_key(|(domain, machines)| (std::cmp::Reverse(machines.len()), *domain));
    used.into_iter()
}
