//! Plans for a whole cluster: an ordered set of moves after which all nodes are level, packed, or
//! some of them empty. Rounds converge to the same state; a plan considers all nodes at once, needs
//! fewer moves, and can be reviewed before anything moves.
//!
//! Unevenness is the weighted sum, over resources, of the standard deviation of the nodes'
//! utilisation: the measure of Ganeti's `hbal` (htools), so that the two can be compared.
//!
//! Planning has three phases. *Descent*: repeatedly the move that decreases the unevenness most
//! (steepest descent). *Refinement*: a moved machine is redirected, moved back, or replaced by
//! another one, wherever that is better; this undoes early moves that later ones made redundant.
//! *Ordering*: waves of concurrent moves, memory first freed then used, with an intermediate stop
//! at a third node where a cycle allows no other order.

use crate::Name;
use crate::rules::{Labels, Requirement, Rule, Subject};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Number of resources.
pub const RESOURCES: usize = 7;
/// Amounts of each resource.
pub type Amounts = [f64; RESOURCES];

/// Approximate number of moves that the descent evaluates, in total and per step: in a large
/// cluster only the most uneven nodes are evaluated.
const EVALUATIONS_MAX: usize = 30_000_000;
const EVALUATIONS_PER_STEP: (usize, usize) = (1_500, 60_000);
/// Targets evaluated per source, where not all are.
const TARGETS_PER_SOURCE: usize = 4;
/// Maximum number of full scans of all sites, when the extreme sites have no move left.
const FULL_SCANS_MAX: usize = 64;
/// Moved machines refined with one ranking of the sites.
const REFINED_PER_BATCH: usize = 32;
/// Maximum number of refinement passes.
const PASSES_MAX: usize = 6;
/// Exchanges evaluated per moved machine.
const EXCHANGES_MAX: usize = 64;

#[derive(Debug, Clone)]
pub struct Site {
    pub name: Name,
    pub labels: Labels,
    /// Capacity per resource; 0 if the resource does not count.
    pub capacity: Amounts,
    /// Usage of others than these machines.
    pub base: Amounts,
    /// Whether it accepts machines.
    pub open: bool,
}

#[derive(Debug, Clone)]
pub struct Workload {
    pub name: Name,
    pub labels: Labels,
    pub site: usize,
    /// Usage per resource.
    pub demand: Amounts,
    /// Whether it must stay.
    pub fixed: bool,
    /// Bytes that a move of it sends.
    pub bytes: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Goal {
    /// All sites level.
    Level {
        /// Maximum number of moves: those with the largest effect.
        moves_max: Option<usize>,
    },
    /// As few sites as carry the load, none filled beyond this utilisation.
    Pack {
        /// The share.
        fill: f64,
    },
    /// Empty these sites, by number.
    Drain(Vec<usize>),
}

/// Input of the planner.
#[derive(Debug, Clone)]
pub struct Problem {
    pub sites: Vec<Site>,
    pub loads: Vec<Workload>,
    /// Weight of each resource.
    pub weights: Amounts,
    /// Resources whose capacity must not be exceeded.
    pub hard: [bool; RESOURCES],
    pub rules: Vec<Rule>,
    /// Minimum decrease of the unevenness per move.
    pub gain_min: f64,
    /// Maximum number of machines that leave a site, and that arrive at a site, in one wave; at
    /// least one.
    pub at_once: (usize, usize),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub load: usize,
    pub from: usize,
    pub to: usize,
    /// Moves of one wave run concurrently, after those of the previous wave.
    pub wave: usize,
    /// Whether it is an intermediate stop: another step moves the machine on.
    pub hop: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// In order.
    pub steps: Vec<Step>,
    pub before: f64,
    pub after: f64,
    pub bytes: f64,
    /// Machines that should move and cannot, by number, with the reason.
    pub left: Vec<(usize, String)>,
}

pub fn plan(problem: &Problem, goal: &Goal) -> Plan {
    let mut state = State::new(problem);
    let before = state.unevenness();
    let mut left = Vec::new();
    match goal {
        Goal::Level { moves_max } => {
            level(&mut state, moves_max.unwrap_or(usize::MAX));
            // A limit changes the choice of moves. If levelling without a limit needs no more moves
            // than allowed, its result may be better.
            if let Some(most) = *moves_max {
                let mut free = State::new(problem);
                level(&mut free, usize::MAX);
                let loads = problem.loads.iter().zip(&free.at);
                let moved = loads.filter(|(load, at)| load.site != **at).count();
                if moved <= most && free.unevenness() < state.unevenness() {
                    state = free;
                }
            }
        }
        Goal::Pack { fill } => pack(&mut state, *fill),
        Goal::Drain(sites) => left = drain(&mut state, sites),
    }
    let after = state.unevenness();
    let (steps, stuck) = order(problem, &state.at);
    left.extend(stuck);
    let bytes = steps
        .iter()
        .map(|step| problem.loads[step.load].bytes)
        .sum();
    Plan {
        steps,
        before,
        after,
        bytes,
        left,
    }
}

fn level(state: &mut State<'_>, moves_max: usize) {
    descend(state, moves_max);
    refine(state, moves_max);
}

/// The current unevenness.
pub fn unevenness(problem: &Problem) -> f64 {
    State::new(problem).unevenness()
}

/// A rule with its counters while a plan is made.
struct RuleCounter {
    requirement: Requirement,
    /// The domain of each site, as a number.
    domain_of: Vec<usize>,
    counts: Vec<u32>,
    total: u32,
    /// For rules that name sites: whether each is allowed.
    allowed: Vec<bool>,
}

impl RuleCounter {
    fn new(rule: &Rule, sites: &[Site]) -> Self {
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

    fn count(&mut self, site: usize, by: i32) {
        let count = &mut self.counts[self.domain_of[site]];
        *count = count.saturating_add_signed(by);
        self.total = self.total.saturating_add_signed(by);
    }

    /// Whether one of its machines may move from one site to another.
    fn allows(&self, from: usize, to: usize) -> bool {
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

/// The placement while a plan is made.
struct State<'a> {
    problem: &'a Problem,
    at: Vec<usize>,
    /// Loads of each site.
    on: Vec<Vec<usize>>,
    used: Vec<Amounts>,
    /// Sums of utilisations and of their squares, per resource.
    sum: Amounts,
    squares: Amounts,
    counters: Vec<RuleCounter>,
    /// Rules of each load, by number.
    rules_of: Vec<Vec<usize>>,
}

impl<'a> State<'a> {
    fn new(problem: &'a Problem) -> Self {
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

    fn share(&self, site: usize, resource: usize) -> f64 {
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

    fn unevenness(&self) -> f64 {
        (0..RESOURCES)
            .map(|it| self.deviation(it, self.sum[it], self.squares[it]))
            .sum()
    }

    /// The unevenness after a move of this demand between two sites.
    fn unevenness_if_moved(&self, demand: &Amounts, from: usize, to: usize) -> f64 {
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

    fn fits(&self, demand: &Amounts, to: usize) -> bool {
        (0..RESOURCES).all(|resource| {
            !self.problem.hard[resource]
                || demand[resource] <= 0.0
                || self.used[to][resource] + demand[resource]
                    <= self.problem.sites[to].capacity[resource]
        })
    }

    fn can_relocate(&self, load: usize, to: usize) -> bool {
        let from = self.at[load];
        from != to
            && self.problem.sites[to].open
            && self.fits(&self.problem.loads[load].demand, to)
            && self.rules_of[load]
                .iter()
                .all(|rule| self.counters[*rule].allows(from, to))
    }

    /// Whether the balancer must not move it at all.
    fn is_pinned(&self, load: usize) -> bool {
        self.problem.loads[load].fixed
            || self.rules_of[load]
                .iter()
                .any(|rule| matches!(self.counters[*rule].requirement, Requirement::Stay))
    }

    fn relocate(&mut self, load: usize, to: usize) {
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

    fn moved(&self) -> Vec<usize> {
        let loads = self.problem.loads.iter().enumerate();
        loads
            .filter(|(number, load)| self.at[*number] != load.site)
            .map(|(number, _)| number)
            .collect()
    }

    /// Sites by excess utilisation, the heaviest first.
    fn by_excess(&self) -> Vec<usize> {
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

fn add(to: &mut Amounts, amounts: &Amounts, sign: f64) {
    for (to, amount) in to.iter_mut().zip(amounts) {
        *to += sign * amount;
    }
}

/// Steepest descent until no move is worthwhile or the limit of moves is reached.
fn descend(state: &mut State<'_>, moved_max: usize) {
    let sites = state.problem.sites.len();
    let per_site = state.problem.loads.len() / sites.max(1) + 1;
    // Number of heaviest and of lightest sites that are evaluated.
    let (least, most) = EVALUATIONS_PER_STEP;
    let budget = (EVALUATIONS_MAX / state.problem.loads.len().max(1)).clamp(least, most);
    let (mut heaviest, mut lightest) = (sites, sites);
    if sites * sites * per_site > budget {
        let wide = (budget / per_site / TARGETS_PER_SOURCE).isqrt().max(1);
        heaviest = wide.min(sites);
        lightest = (wide * TARGETS_PER_SOURCE).min(sites);
    }
    let moves_max = 2 * state.problem.loads.len();
    let mut full_scans = 0;
    for _ in 0..moves_max {
        let by_excess = state.by_excess();
        let sources = &by_excess[..heaviest];
        let targets = &by_excess[sites - lightest..];
        let mut best = best_move(state, sources, targets);
        if best.is_none() && heaviest < sites && full_scans < FULL_SCANS_MAX {
            full_scans += 1;
            best = by_excess
                .chunks(heaviest)
                .find_map(|sources| best_move(state, sources, targets));
        }
        let Some((load, to)) = best else { return };
        // (A moved machine may move again.)
        let moves_more = state.at[load] == state.problem.loads[load].site;
        if moves_more && state.moved().len() >= moved_max {
            return;
        }
        state.relocate(load, to);
    }
}

/// The best move between these sites, if one decreases the unevenness by enough.
fn best_move(state: &State<'_>, sources: &[usize], targets: &[usize]) -> Option<(usize, usize)> {
    let now = state.unevenness();
    let mut best = (now - state.problem.gain_min, None);
    for &source in sources {
        for &load in &state.on[source] {
            if state.is_pinned(load) {
                continue;
            }
            let demand = &state.problem.loads[load].demand;
            for &target in targets {
                if target == source {
                    continue;
                }
                let then = state.unevenness_if_moved(demand, source, target);
                if then < best.0 && state.can_relocate(load, target) {
                    best = (then, Some((load, target)));
                }
            }
        }
    }
    best.1
}

/// Reduces and improves the moves made so far.
fn refine(state: &mut State<'_>, moved_max: usize) {
    for _ in 0..PASSES_MAX {
        let mut changed = false;
        for loads in state.moved().chunks(REFINED_PER_BATCH) {
            let by_excess = state.by_excess();
            for &load in loads {
                changed |=
                    undo(state, load) || redirect(state, load, &by_excess) || exchange(state, load);
            }
        }
        if !changed {
            return;
        }
        descend(state, moved_max);
    }
}

/// Undoes a move that is no longer worthwhile.
fn undo(state: &mut State<'_>, load: usize) -> bool {
    let home = state.problem.loads[load].site;
    let (now, at) = (state.unevenness(), state.at[load]);
    let demand = &state.problem.loads[load].demand;
    let worth = state.unevenness_if_moved(demand, at, home) - now;
    // (Its original site may be closed to other machines.)
    let may = state.fits(demand, home)
        && state.rules_of[load]
            .iter()
            .all(|rule| state.counters[*rule].allows(at, home));
    if worth >= state.problem.gain_min || !may {
        return false;
    }
    state.relocate(load, home);
    true
}

/// Redirects a moved machine to the best site.
fn redirect(state: &mut State<'_>, load: usize, by_excess: &[usize]) -> bool {
    let (mut best, mut to) = (state.unevenness() - 1e-9, None);
    let demand = &state.problem.loads[load].demand;
    for &site in by_excess.iter().rev().take(EXCHANGES_MAX) {
        if site == state.problem.loads[load].site {
            continue;
        }
        let then = state.unevenness_if_moved(demand, state.at[load], site);
        if then < best && state.can_relocate(load, site) {
            (best, to) = (then, Some(site));
        }
    }
    let Some(to) = to else { return false };
    state.relocate(load, to);
    true
}

/// Replaces a moved machine by another one of the same source.
fn exchange(state: &mut State<'_>, load: usize) -> bool {
    let home = state.problem.loads[load].site;
    let there = state.at[load];
    let now = state.unevenness();
    let others: Vec<usize> = state.on[home]
        .iter()
        .copied()
        .filter(|it| state.problem.loads[*it].site == home && !state.is_pinned(*it))
        .take(EXCHANGES_MAX)
        .collect();
    let demand = state.problem.loads[load].demand;
    let mut best = (now - 1e-9, None);
    for other in others {
        // Net demand of the exchange.
        let mut net = state.problem.loads[other].demand;
        add(&mut net, &demand, -1.0);
        let then = state.unevenness_if_moved(&net, home, there);
        if then < best.0 {
            best = (then, Some(other));
        }
    }
    let Some(other) = best.1 else { return false };
    state.relocate(load, home);
    if state.can_relocate(other, there) && state.fits(&[0.0; RESOURCES], home) {
        state.relocate(other, there);
        return true;
    }
    state.relocate(load, there);
    false
}

/// Empties sites one by one into used ones, the lightest first.
fn pack(state: &mut State<'_>, fill: f64) {
    let mut sites: Vec<usize> = (0..state.problem.sites.len()).collect();
    let fullest = |state: &State<'_>, site: usize| {
        (0..RESOURCES)
            .map(|it| state.share(site, it))
            .fold(0.0, f64::max)
    };
    sites.sort_by(|one, other| {
        fullest(state, *one)
            .total_cmp(&fullest(state, *other))
            .then(one.cmp(other))
    });
    for site in sites {
        if state.on[site].is_empty() {
            continue;
        }
        let mut loads = state.on[site].clone();
        loads.sort_by(|one, other| by_size(state, *one, *other));
        let mut gone = Vec::new();
        for &load in &loads {
            let demand = &state.problem.loads[load].demand;
            let within = |to: usize| {
                (0..RESOURCES).all(|it| {
                    let capacity = state.problem.sites[to].capacity[it];
                    capacity <= 0.0
                        || demand[it] <= 0.0
                        || (state.used[to][it] + demand[it]) / capacity <= fill
                })
            };
            // Into the fullest site that accepts it: others may be emptied later.
            let target = (0..state.problem.sites.len())
                .filter(|to| *to != site && !state.on[*to].is_empty() && !state.is_pinned(load))
                .filter(|to| within(*to) && state.can_relocate(load, *to))
                .max_by(|one, other| fullest(state, *one).total_cmp(&fullest(state, *other)));
            let Some(target) = target else { break };
            state.relocate(load, target);
            gone.push(load);
        }
        // A site that does not become empty is no gain.
        if gone.len() < loads.len() {
            for load in gone {
                state.relocate(load, site);
            }
        }
    }
}

/// Empties sites; returns the machines that cannot move, with the reason.
fn drain(state: &mut State<'_>, sites: &[usize]) -> Vec<(usize, String)> {
    let mut loads: Vec<usize> = sites
        .iter()
        .flat_map(|site| state.on[*site].clone())
        .collect();
    loads.sort_by(|one, other| by_size(state, *one, *other));
    let mut left = Vec::new();
    for load in loads {
        let demand = &state.problem.loads[load].demand;
        let from = state.at[load];
        if state.problem.loads[load].fixed {
            left.push((load, "it cannot be moved".to_owned()));
            continue;
        }
        let open = (0..state.problem.sites.len()).filter(|to| !sites.contains(to));
        let target = open
            .clone()
            .filter(|to| state.can_relocate(load, *to))
            .min_by(|one, other| {
                let then = |to: usize| state.unevenness_if_moved(demand, from, to);
                then(*one).total_cmp(&then(*other)).then(one.cmp(other))
            });
        match target {
            Some(target) => state.relocate(load, target),
            None if open.clone().any(|to| state.fits(demand, to)) => {
                left.push((
                    load,
                    "no other node has room for it that rules and drains let it go to".to_owned(),
                ));
            }
            None => left.push((load, "no other node has room for it".to_owned())),
        }
    }
    left
}

/// Larger first: small machines fit into the remaining gaps.
fn by_size(state: &State<'_>, one: usize, other: usize) -> std::cmp::Ordering {
    let size = |load: usize| {
        let load = &state.problem.loads[load];
        let capacity = &state.problem.sites[load.site].capacity;
        let shares = load.demand.iter().zip(capacity);
        let shares = shares.map(|(amount, of)| if *of > 0.0 { amount / of } else { 0.0 });
        shares.fold(0.0, f64::max)
    };
    size(other).total_cmp(&size(one)).then(one.cmp(&other))
}

/// Waves of moves that lead to the placement `to`; also the machines that cannot get there.
fn order(problem: &Problem, to: &[usize]) -> (Vec<Step>, Vec<(usize, String)>) {
    let mut state = State::new(problem);
    let mut pending: Vec<usize> = (0..to.len())
        .filter(|it| to[*it] != state.at[*it])
        .collect();
    let mut hopped: Vec<bool> = vec![false; to.len()];
    let mut steps = Vec::new();
    for wave in 0.. {
        if pending.is_empty() {
            break;
        }
        let mut leaving = vec![0; problem.sites.len()];
        let mut coming = vec![0; problem.sites.len()];
        let mut going: Vec<(usize, usize, bool)> = Vec::new();
        for &load in &pending {
            let (from, target) = (state.at[load], to[load]);
            let free = leaving[from] < problem.at_once.0 && coming[target] < problem.at_once.1;
            if free && state.can_relocate(load, target) {
                leaving[from] += 1;
                coming[target] += 1;
                going.push((load, target, false));
            }
        }
        if going.is_empty() {
            // Deadlock: one machine makes an intermediate stop.
            let detour = pending.iter().filter(|it| !hopped[**it]).find_map(|&load| {
                let open = (0..problem.sites.len()).filter(|it| *it != to[load]);
                let mut open = open.filter(|it| state.can_relocate(load, *it));
                open.next().map(|site| (load, site, true))
            });
            let Some(detour) = detour else {
                let why =
                    "it waits for others that wait for it, and no node has room to step aside";
                return (
                    steps,
                    pending.into_iter().map(|it| (it, why.to_owned())).collect(),
                );
            };
            hopped[detour.0] = true;
            going.push(detour);
        }
        // Moves of a wave are concurrent: a departing machine frees its resources only at the end.
        for (load, target, hop) in going {
            if !state.can_relocate(load, target) {
                continue;
            }
            steps.push(Step {
                load,
                from: state.at[load],
                to: target,
                wave,
                hop,
            });
            state.relocate(load, target);
        }
        pending.retain(|load| state.at[*load] != to[*load]);
    }
    (steps, Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::{Domain, Selector};
    use proptest::prelude::{prop_assert, proptest};

    /// Resources 0 (CPU, soft) and 1 (memory, hard).
    fn problem(sites: &[(f64, f64)], loads: &[(usize, f64, f64)]) -> Problem {
        let amounts = |cpu: f64, memory: f64| {
            let mut amounts = [0.0; RESOURCES];
            (amounts[0], amounts[1]) = (cpu, memory);
            amounts
        };
        Problem {
            sites: sites
                .iter()
                .enumerate()
                .map(|(number, &(cpu, memory))| Site {
                    name: format!("n{number}").into(),
                    labels: Labels::new(),
                    capacity: amounts(cpu, memory),
                    base: [0.0; RESOURCES],
                    open: true,
                })
                .collect(),
            loads: loads
                .iter()
                .enumerate()
                .map(|(number, &(site, cpu, memory))| Workload {
                    name: format!("m{number}").into(),
                    labels: Labels::new(),
                    site,
                    demand: amounts(cpu, memory),
                    fixed: false,
                    bytes: memory,
                })
                .collect(),
            weights: amounts(1.0, 1.0),
            hard: [false, true, false, false, false, false, false],
            rules: Vec::new(),
            gain_min: 0.001,
            at_once: (1, 1),
        }
    }

    fn rule(name: &str, machines: &[&str], requirement: Requirement) -> Rule {
        Rule {
            name: name.into(),
            machines: Selector {
                names: machines.iter().map(|it| (*it).to_owned()).collect(),
                labels: Labels::new(),
            },
            requirement,
        }
    }

    fn ends(problem: &Problem, plan: &Plan) -> Vec<usize> {
        let mut at: Vec<usize> = problem.loads.iter().map(|load| load.site).collect();
        for step in &plan.steps {
            assert_eq!(at[step.load], step.from);
            at[step.load] = step.to;
        }
        at
    }

    const LEVEL: Goal = Goal::Level { moves_max: None };

    #[test]
    fn a_crowd_is_spread_by_no_more_moves_than_needed() {
        let problem = problem(&[(4.0, 64.0); 3], &[(0, 1.0, 4.0); 12]);
        let plan = plan(&problem, &LEVEL);
        assert_eq!(plan.steps.len(), 8);
        assert!(plan.after < 1e-6 && plan.before > 1.0, "{plan:?}");
        let ends = ends(&problem, &plan);
        for site in 0..3 {
            assert_eq!(ends.iter().filter(|it| **it == site).count(), 4);
        }
        // One leaves at a time: eight waves.
        assert_eq!(plan.steps.last().unwrap().wave, 7);
    }

    #[test]
    fn a_full_cluster_moves_by_a_third_node() {
        // Two full nodes whose machines swap places, and a third with room for one; enforced by
        // rules, since load alone would not require it.
        let mut problem = problem(&[(9.0, 10.0); 3], &[(0, 1.0, 8.0), (1, 1.0, 8.0)]);
        let named = |name: &str| Selector {
            names: vec![name.to_owned()],
            labels: Labels::new(),
        };
        problem.rules = vec![
            rule("one", &["m0"], Requirement::Avoid { nodes: named("n9") }),
            rule("two", &["m1"], Requirement::Avoid { nodes: named("n9") }),
        ];
        let (steps, stuck) = order(&problem, &[1, 0]);
        assert!(stuck.is_empty());
        assert_eq!(steps.len(), 3);
        assert!(steps[0].hop && steps[0].to == 2);
        problem.sites[2].open = false;
        let (steps, stuck) = order(&problem, &[1, 0]);
        assert!(steps.is_empty() && stuck.len() == 2, "{stuck:?}");
    }

    #[test]
    fn a_drain_says_what_cannot_go() {
        let mut problem = problem(
            &[(4.0, 16.0), (4.0, 16.0), (4.0, 4.0)],
            &[(0, 1.0, 12.0), (0, 1.0, 12.0), (0, 0.5, 2.0), (0, 0.1, 1.0)],
        );
        problem.loads[3].fixed = true;
        let plan = plan(&problem, &Goal::Drain(vec![0]));
        let ends = ends(&problem, &plan);
        assert_eq!(ends[0], 1);
        assert_ne!(ends[2], 0);
        let left: Vec<usize> = plan.left.iter().map(|(load, _)| *load).collect();
        assert_eq!(left, [1, 3], "{:?}", plan.left);
    }

    #[test]
    fn packing_empties_nodes_and_keeps_to_the_fill() {
        let problem = problem(
            &[(4.0, 16.0); 4],
            &[(0, 1.0, 2.0), (1, 1.0, 2.0), (2, 1.0, 2.0), (3, 1.0, 2.0)],
        );
        let plan = plan(&problem, &Goal::Pack { fill: 0.8 });
        let ends = ends(&problem, &plan);
        let used: std::collections::BTreeSet<usize> = ends.iter().copied().collect();
        assert_eq!(used.len(), 2, "three of four cores are 0.75: {ends:?}");
    }

    #[test]
    fn rules_are_kept_on_the_way() {
        let mut problem = problem(&[(4.0, 64.0); 3], &[(0, 1.0, 4.0); 6]);
        let per = Domain::Node;
        problem.rules = vec![
            rule("stay", &["m0"], Requirement::Stay),
            rule("pair", &["m1", "m2"], Requirement::Apart { per, max: 1 }),
        ];
        let plan = plan(&problem, &LEVEL);
        let ends = ends(&problem, &plan);
        assert_eq!(ends[0], 0);
        assert_ne!(ends[1], ends[2]);
    }

    proptest! {
        #[test]
        fn no_plan_makes_anything_worse(
            loads in proptest::collection::vec((0usize..5, 0.01f64..2.0, 0.1f64..6.0), 0..40),
        ) {
            let problem = problem(&[(4.0, 48.0), (8.0, 48.0), (2.0, 24.0), (4.0, 96.0), (4.0, 48.0)], &loads);
            let before = State::new(&problem);
            let plan = plan(&problem, &LEVEL);
            prop_assert!(plan.after <= plan.before + 1e-9);
            prop_assert!(plan.left.is_empty());
            // At no step is a node filled beyond what it has, unless it was before.
            let mut state = State::new(&problem);
            for step in &plan.steps {
                state.relocate(step.load, step.to);
                let most = before.used[step.to][1].max(problem.sites[step.to].capacity[1]);
                prop_assert!(state.used[step.to][1] <= most + 1e-9);
            }
            prop_assert!((state.unevenness() - plan.after).abs() < 1e-6);
        }

        #[test]
        fn fewer_moves_are_those_that_level_most(
            loads in proptest::collection::vec((0usize..5, 0.01f64..2.0, 0.1f64..6.0), 0..40),
        ) {
            let problem = problem(&[(4.0, 96.0), (8.0, 96.0), (2.0, 96.0), (4.0, 96.0), (4.0, 96.0)], &loads);
            let whole = plan(&problem, &LEVEL);
            let mut least = whole.before;
            for moves_max in 0..=whole.steps.len() {
                let few = plan(&problem, &Goal::Level { moves_max: Some(moves_max) });
                let moved = few.steps.iter().filter(|step| !step.hop).count();
                prop_assert!(moved <= moves_max, "{moved} of {moves_max}");
                if moves_max == 1 {
                    // No single move is better.
                    let state = State::new(&problem);
                    for (load, it) in problem.loads.iter().enumerate() {
                        for to in (0..problem.sites.len()).filter(|to| state.can_relocate(load, *to)) {
                            let single = state.unevenness_if_moved(&it.demand, it.site, to);
                            let gains = single < whole.before - problem.gain_min;
                            prop_assert!(!gains || few.after <= single + 1e-9);
                        }
                    }
                }
                prop_assert!(few.after <= whole.before + 1e-9);
                least = least.min(few.after);
            }
            prop_assert!(least <= whole.after + 1e-9);
        }
    }
}
