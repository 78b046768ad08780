//! Rules that contradict each other: whether some placement satisfies all of them, found by search.
//! The placement that the search finds is not used.

use super::{Holders, Requirement, Rule, Subject, holders_of};
use crate::Name;
use std::collections::BTreeSet;

/// Search steps after which the search for a placement that satisfies all rules is abandoned: no
/// contradiction is reported then.
const SEARCH_STEPS_MAX: u32 = 200_000;

/// A minimal set of contradictory rules for these machines and nodes, found by leaving rules out
/// one by one. `None` if all rules can be satisfied, or the search was abandoned.
pub fn conflict(rules: &[Rule], machines: &[Subject], nodes: &[Subject]) -> Option<Vec<Name>> {
    if is_satisfiable(rules, machines, nodes) != Some(false) {
        return None;
    }
    let mut needed: Vec<Rule> = rules.to_vec();
    let mut at = 0;
    while at < needed.len() {
        let mut fewer = needed.clone();
        fewer.remove(at);
        if is_satisfiable(&fewer, machines, nodes) == Some(false) {
            needed = fewer;
        } else {
            at += 1;
        }
    }
    Some(needed.into_iter().map(|rule| rule.name).collect())
}

/// Whether some placement satisfies all rules; `None` if the search was abandoned.
fn is_satisfiable(rules: &[Rule], machines: &[Subject], nodes: &[Subject]) -> Option<bool> {
    let about: Vec<&Subject> = machines
        .iter()
        .filter(|machine| rules.iter().any(|rule| rule.applies_to(machine)))
        .collect();
    let mut steps = SEARCH_STEPS_MAX;
    let mut placed = Vec::with_capacity(about.len());
    search(rules, &about, nodes, &mut placed, &mut steps)
}

fn search(
    rules: &[Rule],
    left: &[&Subject],
    nodes: &[Subject],
    placed: &mut Vec<(Subject, Name)>,
    steps: &mut u32,
) -> Option<bool> {
    let Some((machine, rest)) = left.split_first() else {
        return Some(spread_holds(rules, placed, nodes));
    };
    let holders = holders_of(rules, placed, nodes);
    for node in nodes {
        *steps = steps.checked_sub(1)?;
        let allowed = rules.iter().all(|rule| {
            // A spread may be uneven in a partial placement: it is checked at the end.
            if matches!(rule.requirement, Requirement::Spread { .. }) {
                return true;
            }
            let none = Holders::new();
            let held = holders.get(&rule.name).unwrap_or(&none);
            rule.claim(machine, node, held, &BTreeSet::new()).is_ok()
        });
        if !allowed {
            continue;
        }
        placed.push(((*machine).clone(), node.name.clone()));
        let kept = search(rules, rest, nodes, placed, steps);
        placed.pop();
        if kept != Some(false) {
            return kept;
        }
    }
    Some(false)
}

fn spread_holds(rules: &[Rule], placed: &[(Subject, Name)], nodes: &[Subject]) -> bool {
    let holders = holders_of(rules, placed, nodes);
    rules.iter().all(|rule| {
        let Requirement::Spread { per, skew } = &rule.requirement else {
            return true;
        };
        let domains: BTreeSet<String> = nodes
            .iter()
            .map(|node| per.of(&node.name, &node.labels))
            .collect();
        let held = &holders[&rule.name];
        let counts = domains
            .iter()
            .map(|it| held.get(it).map_or(0, BTreeSet::len));
        let (least, most) = counts.fold((usize::MAX, 0), |(least, most), count| {
            (least.min(count), most.max(count))
        });
        most.saturating_sub(least) <= *skew as usize
    })
}
