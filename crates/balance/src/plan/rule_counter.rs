//! How many machines of a rule are in each of its domains while a plan is made. Whether a rule
//! applies to a machine is decided in [`crate::rules`].

use super::Site;
use crate::rules::{Requirement, Rule};
use std::collections::BTreeMap;

/// A rule with its counters while a plan is made.
pub(super) struct RuleCounter {
    pub(super) requirement: Requirement,
    /// The domain of each site, as a number.
    domain_of: Vec<usize>,
    counts: Vec<u32>,
    total: u32,
    /// For rules that name sites: whether each is allowed.
    allowed: Vec<bool>,
}

impl RuleCounter {
    pub(super) fn new(rule: &Rule, sites: &[Site]) -> Self {
        let mut numbers: BTreeMap<String, usize> = BTreeMap::new();
        let mut domain_of = Vec::with_capacity(sites.len());
        for site in sites {
            let domain = rule.per().of(&site.name, &site.labels);
            let next = numbers.len();
            domain_of.push(*numbers.entry(domain).or_insert(next));
        }
        let allowed = |site: &Site| match &rule.requirement {
            Requirement::Pin { nodes } => nodes.fits(&site.name, &site.labels),
            Requirement::Avoid { nodes } => !nodes.fits(&site.name, &site.labels),
            _ => true,
        };
        RuleCounter {
            requirement: rule.requirement.clone(),
            counts: vec![0; numbers.len()],
            total: 0,
            allowed: sites.iter().map(allowed).collect(),
            domain_of,
        }
    }

    pub(super) fn count(&mut self, site: usize, by: i32) {
        let count = &mut self.counts[self.domain_of[site]];
        *count = count.saturating_add_signed(by);
        self.total = self.total.saturating_add_signed(by);
    }

    /// Whether one of its machines may move from one site to another.
    pub(super) fn allows(&self, from: usize, to: usize) -> bool {
        if !self.allowed[to] {
            return false;
        }
        let (before, after) = (self.domain_of[from], self.domain_of[to]);
        if before == after {
            return true;
        }
        let there = self.counts[after];
        match &self.requirement {
            Requirement::Apart { max, .. } => there < *max,
            Requirement::Together { .. } => there + 1 == self.total,
            Requirement::Spread { skew, .. } => {
                let left = |domain: usize| self.counts[domain] - u32::from(domain == before);
                let least = (0..self.counts.len())
                    .filter(|domain| *domain != after)
                    .map(left)
                    .min();
                least.is_none_or(|least| there < least.saturating_add(*skew))
            }
            Requirement::Licence { nodes_max } => {
                let used = self.counts.iter().filter(|count| **count > 0).count() as u32;
                let frees = u32::from(self.counts[before] == 1);
                there > 0 || used - frees < *nodes_max
            }
            Requirement::Pin { .. }
            | Requirement::Avoid { .. }
            | Requirement::Stay
            | Requirement::Hours { .. } => true,
        }
    }
}
