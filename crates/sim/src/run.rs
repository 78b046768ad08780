//! Runs a scenario and reports the result.

use crate::bad_input::{BadInput, hint};
use crate::energy::watts;
use crate::scenario::{Cluster, Scenario};
use crate::what_if::WhatIf;
use crate::world::{ExternalEvent, NodeSnapshot, World};
use keel_balance::ledger::Line;
use std::collections::HashMap;

pub use crate::report::{ClusterSummary, MoveReport, Report, Series};

/// Approximate number of samples of a run without `look_s`.
const SAMPLES_DEFAULT: u64 = 480;
/// Maximum interval between two samples where energy is counted, in seconds.
const ENERGY_SAMPLE_S_MAX: u64 = 60;
/// Maximum number of alerts that a report quotes.
const ALERTS_QUOTED_MAX: usize = 10;

/// Sums over the samples.
#[derive(Default)]
struct Totals {
    joules: f64,
    demanded: f64,
    unmet: f64,
    active_nodes: f64,
    samples: f64,
    /// Per node: seconds active, and seconds overloaded.
    nodes: Vec<(f64, f64)>,
}

/// Runs a scenario, with changes. `done` is called from time to time with the completed share.
///
/// # Errors
/// An invalid scenario, or a change that does not apply.
pub fn run(
    scenario: &Scenario,
    what_if: &WhatIf,
    done: &mut dyn FnMut(f64),
) -> Result<Report, BadInput> {
    let (report, _) = simulate(scenario, what_if, Retention::Nothing, done)?;
    Ok(report)
}

/// As [`run`], with all decisions; times are simulated.
///
/// # Errors
/// As [`run`].
pub fn run_recorded(
    scenario: &Scenario,
    what_if: &WhatIf,
    done: &mut dyn FnMut(f64),
) -> Result<(Report, Vec<Line>), BadInput> {
    simulate(scenario, what_if, Retention::Decisions, done)
}

/// What is recorded in addition to the report.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Retention {
    Nothing,
    Decisions,
}

fn simulate(
    scenario: &Scenario,
    what_if: &WhatIf,
    keep: Retention,
    done: &mut dyn FnMut(f64),
) -> Result<(Report, Vec<Line>), BadInput> {
    let mut cluster = Cluster::of(scenario)?;
    what_if
        .change(&mut cluster)
        .map_err(|reason| BadInput::file(&scenario.path, reason))?;
    for node in &scenario.expect.untouched {
        let names = cluster.nodes.iter().map(|it| &*it.name);
        if !names.clone().any(|it| it == node) {
            let hint = hint(node, names);
            let reason = format!("expect.untouched: there is no node {node:?}; {hint}");
            return Err(BadInput::file(&scenario.path, reason));
        }
    }
    let mut world = World::new(cluster.settings.clone(), &cluster.nodes, &cluster.machines);
    if keep == Retention::Nothing {
        world.discard_decisions();
    }
    for (at_ms, what) in &cluster.events {
        world.schedule(*at_ms, what.clone());
    }
    let every_s = look_s(scenario, &cluster);
    let mut totals = Totals {
        nodes: vec![(0.0, 0.0); cluster.nodes.len()],
        ..Totals::default()
    };
    let start: Vec<NodeSnapshot> = world.node_snapshots().collect();
    let mut series = Series {
        every_s,
        nodes: cluster.nodes.iter().map(|it| it.name.to_string()).collect(),
        samples: vec![loads(&start)],
    };
    let start = summarize(&start, &world);
    let mut level = ConvergenceTracker::default();
    let mut now_s = 0;
    while now_s < scenario.length_s {
        let next_s = (now_s + every_s).min(scenario.length_s);
        let length_s = (next_s - now_s) as f64;
        now_s = next_s;
        world.run_until(now_s * 1000);
        let nodes: Vec<NodeSnapshot> = world.node_snapshots().collect();
        totals.add(&nodes, &cluster, length_s);
        series.samples.push(loads(&nodes));
        if scenario.expect.levelled_by_s.is_some_and(|it| it <= now_s) || now_s == scenario.length_s
        {
            level.observe(&world, now_s);
        }
        done(now_s as f64 / scenario.length_s as f64);
    }
    let mut report = report(scenario, &world, start, &totals, level);
    report.series = series;
    if cluster.power.iter().all(Option::is_none) {
        report.energy_kwh = None;
    }
    report.expectations = scenario.expect.check(&report);
    Ok((report, lines(&world, &cluster)))
}

/// Decisions in the format of a ledger.
fn lines(world: &World, cluster: &Cluster) -> Vec<Line> {
    // The policies with the time from which each was in force.
    let mut policies = vec![(0, &cluster.settings.policy)];
    for (at_ms, what) in &cluster.events {
        if let ExternalEvent::Policy(policy) = what {
            policies.push((*at_ms, policy));
        }
    }
    let made = world.decisions().iter();
    made.map(|made| {
        let policy = policies
            .iter()
            .rev()
            .find(|(at_ms, _)| *at_ms <= made.at_ms);
        Line {
            at_unix_ms: made.at_ms,
            node: world.node_name(made.node).clone(),
            policy: policy.map(|(_, policy)| (*policy).clone()),
            model: Some(made.model),
            decision: made.decision.clone(),
        }
    })
    .collect()
}

fn look_s(scenario: &Scenario, cluster: &Cluster) -> u64 {
    let usual = (scenario.length_s / SAMPLES_DEFAULT).max(1);
    let counts_energy = cluster.power.iter().any(Option::is_some);
    scenario.look_s.unwrap_or(if counts_energy {
        usual.min(ENERGY_SAMPLE_S_MAX)
    } else {
        usual
    })
}

fn loads(nodes: &[NodeSnapshot]) -> Vec<f32> {
    let load = |it: &NodeSnapshot| if it.alive { it.load as f32 } else { f32::NAN };
    nodes.iter().map(load).collect()
}

/// Tracks since when the cluster has converged.
#[derive(Default)]
struct ConvergenceTracker {
    since_s: Option<u64>,
    moves: usize,
    obstacle: String,
}

impl ConvergenceTracker {
    fn observe(&mut self, world: &World, now_s: u64) {
        let obstacle = if world.moving() > 0 {
            Some(format!(
                "{} moves are in flight at {now_s} s",
                world.moving()
            ))
        } else if let Some((target, what)) = world.admissible() {
            Some(format!(
                "{} could move to {target} at {now_s} s",
                what.machine
            ))
        } else if world.moves().len() != self.moves && self.since_s.is_some() {
            Some(format!("a machine moved before {now_s} s"))
        } else {
            None
        };
        self.moves = world.moves().len();
        match obstacle {
            Some(obstacle) => {
                self.obstacle = obstacle;
                self.since_s = None;
            }
            None => {
                self.since_s.get_or_insert(now_s);
            }
        }
    }
}

impl Totals {
    fn add(&mut self, nodes: &[NodeSnapshot], cluster: &Cluster, length_s: f64) {
        self.samples += 1.0;
        for (number, node) in nodes.iter().enumerate() {
            if node.machines == 0 {
                continue;
            }
            self.active_nodes += 1.0;
            let (demand, cores) = (node.cpu_cores, node.capacity.cores);
            // In cores of the reference speed, so that nodes can be added up.
            let reference = node.capacity.speed * length_s;
            self.demanded += demand * reference;
            self.unmet += (demand - cores).max(0.0) * reference;
            let (active_s, overloaded_s) = &mut self.nodes[number];
            *active_s += length_s;
            if demand >= cores {
                *overloaded_s += length_s;
            }
            if let Some(table) = &cluster.power[number] {
                self.joules += watts(table, demand / cores) * length_s;
            }
        }
    }

    fn overload_share(&self) -> f64 {
        let active = self.nodes.iter().filter(|(active_s, _)| *active_s > 0.0);
        let shares: Vec<f64> = active.map(|(active_s, over_s)| over_s / active_s).collect();
        share(shares.iter().sum(), shares.len() as f64)
    }
}

fn share(part: f64, of: f64) -> f64 {
    if of > 0.0 { part / of } else { 0.0 }
}

fn summarize(nodes: &[NodeSnapshot], world: &World) -> ClusterSummary {
    let alive: Vec<&NodeSnapshot> = nodes.iter().filter(|it| it.alive).collect();
    let power: f64 = alive.iter().map(|it| it.capacity.power()).sum();
    let weighted = |of: &dyn Fn(&NodeSnapshot) -> f64| {
        let sum: f64 = alive.iter().map(|it| it.capacity.power() * of(it)).sum();
        share(sum, power)
    };
    let mean = weighted(&|it| it.load);
    let variance = weighted(&|it| (it.load - mean) * (it.load - mean));
    let policy = world.policy();
    let waits =
        |it: &NodeSnapshot| share((it.cpu_cores - it.capacity.cores).max(0.0), it.cpu_cores);
    let pressed =
        |it: &&&NodeSnapshot| it.load >= policy.pressed_load || waits(it) >= policy.pressed_share;
    ClusterSummary {
        alive: alive.len(),
        machines: alive.iter().map(|it| it.machines).sum(),
        load_mean: mean,
        load_min: alive
            .iter()
            .map(|it| it.load)
            .reduce(f64::min)
            .unwrap_or(0.0),
        load_max: alive
            .iter()
            .map(|it| it.load)
            .reduce(f64::max)
            .unwrap_or(0.0),
        unevenness: variance.sqrt(),
        pressed: alive.iter().filter(pressed).count(),
        free: alive.iter().filter(|it| it.machines == 0).count(),
    }
}

fn report(
    scenario: &Scenario,
    world: &World,
    start: ClusterSummary,
    totals: &Totals,
    level: ConvergenceTracker,
) -> Report {
    let end: Vec<NodeSnapshot> = world.node_snapshots().collect();
    let moves = world.moves();
    let alerts = world.alerts();
    Report {
        about: scenario.about.clone(),
        seed: scenario.seed,
        length_s: scenario.length_s,
        start,
        end: summarize(&end, world),
        levelled_at_s: level.since_s.ok_or(level.obstacle),
        moved_bytes: moves.iter().map(|it| it.bytes).sum(),
        failed: world.failed(),
        capped: world.capped(),
        returns: returns(world),
        raced: world.raced(),
        repairs: world.repairs(),
        broken: {
            let broken = world.broken().iter();
            broken
                .map(|(machine, broken)| format!("{machine}: {broken}"))
                .collect()
        },
        rounds: world.rounds(),
        stranded: world.stranded(),
        alerts: alerts.len() as u64,
        alerts_quoted: alerts
            .iter()
            .take(ALERTS_QUOTED_MAX)
            .map(|(at_ms, node, text)| {
                let at_s = *at_ms as f64 / 1e3;
                format!("{at_s:.0} s, {}: {text}", world.node_name(*node))
            })
            .collect(),
        overload_share: totals.overload_share(),
        unmet_share: share(totals.unmet, totals.demanded),
        active_mean: share(totals.active_nodes, totals.samples),
        energy_kwh: Some(totals.joules / 3.6e6),
        expectations: Vec::new(),
        series: Series::default(),
        moves: moves
            .iter()
            .map(|it| MoveReport {
                at_s: it.at_ms as f64 / 1e3,
                machine: world.machine_name(it.machine).to_string(),
                source: world.node_name(it.source).to_string(),
                target: world.node_name(it.target).to_string(),
                bytes: it.bytes as u64,
            })
            .collect(),
    }
}

/// Number of moves that returned a machine within the cool-down.
pub fn returns(world: &World) -> u64 {
    let mut last: HashMap<usize, (usize, usize, u64)> = HashMap::new();
    let mut returns = 0;
    for it in world.moves() {
        let before = last.insert(it.machine, (it.source, it.target, it.at_ms));
        if let Some((source, target, at_ms)) = before
            && (source, target) == (it.target, it.source)
            && it.at_ms - at_ms < world.policy().cool_down_ms
        {
            returns += 1;
        }
    }
    returns
}
