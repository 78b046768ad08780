//! The placement while a plan is made: where each machine is, what each site uses, how uneven that
//! is, and which moves are allowed. Choosing moves is left to the phases of planning.

use super::rule_counter::RuleCounter;
use super::{Amounts, Problem, RESOURCES};
use crate::rules::{Requirement, Rule, Subject};

/// The placement while a plan is made.
pub(super) struct State<'a> {
    pub(super) problem: &'a Problem,
    pub(super) at: Vec<usize>,
    /// Loads of each site.
    pub(super) on: Vec<Vec<usize>>,
    pub(super) used: Vec<Amounts>,
    /// Sums of utilisations and of their squares, per resource.
    sum: Amounts,
    squares: Amounts,
    pub(super) counters: Vec<RuleCounter>,
    /// Rules of each load, by number.
    pub(super) rules_of: Vec<Vec<usize>>,
}

impl<'a> State<'a> {
    pub(super) fn new(problem: &'a Problem) -> Self {
        let mut state = State {
            problem,
            at: problem.loads.iter().map(|load| load.site).collect(),
            on: vec![Vec::new(); problem.sites.len()],
            used: problem.sites.iter().map(|site| site.base).collect(),
            sum: [0.0; RESOURCES],
            squares: [0.0; RESOURCES],
            counters: problem
                .rules
                .iter()
                .map(|rule| RuleCounter::new(rule, &problem.sites))
                .collect(),
            rules_of: Vec::with_capacity(problem.loads.len()),
        };
        for (number, load) in problem.loads.iter().enumerate() {
            state.on[load.site].push(number);
            add(&mut state.used[load.site], &load.demand, 1.0);
            let subject = Subject {
                name: load.name.clone(),
                labels: load.labels.clone(),
            };
            let about = |rule: &(usize, &Rule)| rule.1.applies_to(&subject);
            let rules = problem.rules.iter().enumerate().filter(about);
            let rules: Vec<usize> = rules.map(|(rule, _)| rule).collect();
            for &rule in &rules {
                state.counters[rule].count(load.site, 1);
            }
            state.rules_of.push(rules);
        }
        for site in 0..problem.sites.len() {
            state.add_share(site, 1.0);
        }
        state
    }

    pub(super) fn share(&self, site: usize, resource: usize) -> f64 {
        let capacity = self.problem.sites[site].capacity[resource];
        if capacity > 0.0 {
            self.used[site][resource] / capacity
        } else {
            0.0
        }
    }

    fn add_share(&mut self, site: usize, sign: f64) {
        for resource in 0..RESOURCES {
            let share = self.share(site, resource);
            self.sum[resource] += sign * share;
            self.squares[resource] += sign * share * share;
        }
    }

    fn deviation(&self, resource: usize, sum: f64, squares: f64) -> f64 {
        let count = self.problem.sites.len().max(1) as f64;
        let mean = sum / count;
        // (Rounding errors may make it negative.)
        self.problem.weights[resource] * (squares / count - mean * mean).max(0.0).sqrt()
    }

    pub(super) fn unevenness(&self) -> f64 {
        (0..RESOURCES)
            .map(|it| self.deviation(it, self.sum[it], self.squares[it]))
            .sum()
    }

    /// The unevenness after a move of this demand between two sites.
    pub(super) fn unevenness_if_moved(&self, demand: &Amounts, from: usize, to: usize) -> f64 {
        let sites = &self.problem.sites;
        let mut total = 0.0;
        for (resource, amount) in demand.iter().enumerate() {
            if self.problem.weights[resource] == 0.0 {
                continue;
            }
            let (mut sum, mut squares) = (self.sum[resource], self.squares[resource]);
            for (site, amount) in [(from, -amount), (to, *amount)] {
                let capacity = sites[site].capacity[resource];
                if capacity > 0.0 {
                    let before = self.used[site][resource] / capacity;
                    let after = before + amount / capacity;
                    sum += after - before;
                    squares += after * after - before * before;
                }
            }
            total += self.deviation(resource, sum, squares);
        }
        total
    }

    pub(super) fn fits(&self, demand: &Amounts, to: usize) -> bool {
        (0..RESOURCES).all(|resource| {
            !self.problem.hard[resource]
                || demand[resource] <= 0.0
                || self.used[to][resource] + demand[resource]
                    <= self.problem.sites[to].capacity[resource]
        })
    }

    pub(super) fn can_relocate(&self, load: usize, to: usize) -> bool {
        let from = self.at[load];
        from != to
            && self.problem.sites[to].open
            && self.fits(&self.problem.loads[load].demand, to)
            && self.rules_of[load]
                .iter()
                .all(|rule| self.counters[*rule].allows(from, to))
    }

    /// Whether the balancer must not move it at all.
    pub(super) fn is_pinned(&self, load: usize) -> bool {
        self.problem.loads[load].fixed
            || self.rules_of[load]
                .iter()
                .any(|rule| matches!(self.counters[*rule].requirement, Requirement::Stay))
    }

    pub(super) fn relocate(&mut self, load: usize, to: usize) {
        let from = self.at[load];
        let demand = self.problem.loads[load].demand;
        for (site, sign) in [(from, -1.0), (to, 1.0)] {
            self.add_share(site, -1.0);
            add(&mut self.used[site], &demand, sign);
            self.add_share(site, 1.0);
        }
        for &rule in &self.rules_of[load] {
            self.counters[rule].count(from, -1);
            self.counters[rule].count(to, 1);
        }
        self.on[from].retain(|it| *it != load);
        self.on[to].push(load);
        self.at[load] = to;
    }

    pub(super) fn moved(&self) -> Vec<usize> {
        let loads = self.problem.loads.iter().enumerate();
        loads
            .filter(|(number, load)| self.at[*number] != load.site)
            .map(|(number, _)| number)
            .collect()
    }

    /// Sites by excess utilisation, the heaviest first.
    pub(super) fn by_excess(&self) -> Vec<usize> {
        let count = self.problem.sites.len().max(1) as f64;
        let mut scale = [0.0; RESOURCES];
        for (resource, scale) in scale.iter_mut().enumerate() {
            let mean = self.sum[resource] / count;
            let deviation = (self.squares[resource] / count - mean * mean)
                .max(0.0)
                .sqrt();
            if deviation > 0.0 {
                *scale = self.problem.weights[resource] / deviation;
            }
        }
        let excess = |site: usize| -> f64 {
            (0..RESOURCES)
                .map(|it| scale[it] * (self.share(site, it) - self.sum[it] / count))
                .sum()
        };
        let mut sites: Vec<(f64, usize)> = (0..self.problem.sites.len())
            .map(|it| (excess(it), it))
            .collect();
        sites.sort_by(|one, other| other.0.total_cmp(&one.0).then(one.1.cmp(&other.1)));
        sites.into_iter().map(|(_, site)| site).collect()
    }
}

pub(super) fn add(to: &mut Amounts, amounts: &Amounts, sign: f64) {
    for (to, amount) in to.iter_mut().zip(amounts) {
        *to += sign * amount;
    }
}
