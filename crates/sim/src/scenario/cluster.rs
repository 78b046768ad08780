//! The nodes, machines and events that a scenario describes.

use super::{
    Event, InitialPlacement, MACHINES_MAX, MachineGroup, NODES_MAX, NodeGroup, Scenario,
    change_policy,
};
use crate::bad_input::{BadInput, hint};
use crate::curve::Curve;
use crate::energy::PowerTable;
use crate::traces::{self, Trace};
use crate::world::{ExternalEvent, MachineSpec, NodeSpec, Rulebook, Settings};
use keel_balance::Name;
use keel_balance::load::{Capacity, SPEED_RANGE};
use keel_balance::policy::Policy;
use keel_balance::rules::{Requirement, Rule, Subject, conflict};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use toml::Spanned;

/// A cluster with external events, ready to run.
#[derive(Debug, Clone)]
pub struct Cluster {
    pub settings: Settings,
    pub nodes: Vec<NodeSpec>,
    /// Power table of each node, if known.
    pub power: Vec<Option<PowerTable>>,
    pub machines: Vec<MachineSpec>,
    /// External events, with the time in milliseconds.
    pub events: Vec<(u64, ExternalEvent)>,
}

const MIB: f64 = 1_048_576.0;

struct Builder<'a> {
    scenario: &'a Scenario,
    rng: SmallRng,
    nodes: Vec<NodeSpec>,
    labels: Vec<BTreeMap<String, String>>,
    power: Vec<Option<PowerTable>>,
    machines: Vec<MachineSpec>,
    names: HashSet<Name>,
    rulebook: Rulebook,
    /// Number of machines placed round-robin so far: the next group continues from there.
    spread: usize,
    traces: HashMap<PathBuf, Arc<[Trace]>>,
}

impl Cluster {
    /// Builds the cluster of a scenario.
    ///
    /// # Errors
    /// The line and reason of an error; missing traces.
    pub fn of(scenario: &Scenario) -> Result<Self, BadInput> {
        let mut builder = Builder {
            scenario,
            // Placement has its own random stream: a change of the policy does not affect it.
            rng: SmallRng::seed_from_u64(scenario.seed ^ 0x70_6c61_6365),
            nodes: Vec::new(),
            labels: Vec::new(),
            power: Vec::new(),
            machines: Vec::new(),
            names: HashSet::new(),
            rulebook: Rulebook::default(),
            spread: 0,
            traces: HashMap::new(),
        };
        builder.ganeti()?;
        for group in &scenario.nodes {
            builder.node_group(group)?;
        }
        if builder.nodes.is_empty() {
            let reason = "it has no nodes: each group of them is a table [[nodes]]";
            return Err(BadInput::file(&scenario.path, reason));
        }
        for group in &scenario.machines {
            builder.machine_group(group)?;
        }
        let rules = builder.rules()?;
        let events = builder.events()?;
        Ok(Cluster {
            settings: Settings {
                seed: scenario.seed,
                network: scenario.network,
                policy: scenario.policy.clone(),
                failover_ms: scenario.failover_s.map(|s| s * 1000),
                rules,
            },
            nodes: builder.nodes,
            power: builder.power,
            machines: builder.machines,
            events,
        })
    }
}

fn milliseconds(s: f64) -> u64 {
    (s * 1e3).round() as u64
}

/// Expands a name pattern.
fn named(pattern: &str, number: usize) -> Name {
    pattern.replace("{}", &number.to_string()).into()
}

impl Builder<'_> {
    fn relative_to_scenario(&self, file: &Path) -> PathBuf {
        let folder = self.scenario.path.parent();
        folder.unwrap_or(Path::new("")).join(file)
    }

    fn ganeti(&mut self) -> Result<(), BadInput> {
        let Some(ganeti) = &self.scenario.ganeti else {
            return Ok(());
        };
        let utilisation = ganeti
            .utilisation
            .as_ref()
            .map(|it| self.relative_to_scenario(it));
        let file = self.relative_to_scenario(&ganeti.file);
        let cluster = traces::ganeti::read(&file, utilisation.as_deref())?;
        for node in cluster.nodes {
            self.nodes.push(NodeSpec {
                name: node.name.into(),
                capacity: node.capacity,
                there: node.online,
            });
            self.labels.push(BTreeMap::new());
            self.power.push(None);
        }
        for it in cluster.instances {
            self.machines.push(MachineSpec {
                name: it.name.into(),
                node: it.node,
                curve: Curve::Steady { cores: it.cores },
                burns: false,
                memory_bytes: it.memory_bytes,
                dirty_bytes_per_s: 0.0,
                io_bytes_per_s: 0.0,
                runs: it.runs,
                balanced: it.balanced,
            });
        }
        self.names = self.nodes.iter().map(|it| it.name.clone()).collect();
        let machines = self.machines.iter().map(|it| it.name.clone());
        self.names.extend(machines);
        Ok(())
    }

    fn node_group(&mut self, spanned: &Spanned<NodeGroup>) -> Result<(), BadInput> {
        let group = spanned.get_ref();
        let bad = |reason: String| self.scenario.error_at(spanned, reason);
        let (slowest, fastest) = SPEED_RANGE;
        let numbers = [
            ("cores", group.cores, 0.01, 65_536.0),
            ("speed", group.speed, slowest, fastest),
            ("io_mib_per_s", group.io_mib_per_s, 0.001, 1e6),
            ("memory_mib", group.memory_mib as f64, 1.0, 1e9),
        ];
        for (key, found, least, most) in numbers {
            if !(least..=most).contains(&found) {
                return Err(bad(format!(
                    "{key} is {found}; {least} to {most} are possible"
                )));
            }
        }
        if self.nodes.len().saturating_add(group.count) > NODES_MAX {
            return Err(bad(format!("at most {NODES_MAX} nodes are possible")));
        }
        if group.count > 1 && !group.name.contains("{}") {
            let reason = format!(
                "{} nodes have one name: {:?} needs a {{}}",
                group.count, group.name
            );
            return Err(bad(reason));
        }
        let table = match &group.power {
            None => None,
            Some(power) => Some(power.table().map_err(bad)?),
        };
        for number in 1..=group.count {
            let name = named(&group.name, number);
            if !self.names.insert(name.clone()) {
                return Err(self
                    .scenario
                    .error_at(spanned, format!("there is a {name:?} already")));
            }
            self.nodes.push(NodeSpec {
                name,
                capacity: Capacity {
                    cores: group.cores,
                    speed: group.speed,
                    memory_bytes: (group.memory_mib as f64 * MIB) as u64,
                    io_bytes_per_s: group.io_mib_per_s * MIB,
                },
                there: true,
            });
            self.labels.push(group.labels.clone());
            self.power.push(table);
        }
        Ok(())
    }

    fn machine_group(&mut self, spanned: &Spanned<MachineGroup>) -> Result<(), BadInput> {
        let group = spanned.get_ref();
        let numbers = [
            ("memory_mib", group.memory_mib as f64, 1e9),
            ("dirty_mib_per_s", group.dirty_mib_per_s, 1e6),
            ("io_mib_per_s", group.io_mib_per_s, 1e6),
        ];
        for (key, found, most) in numbers {
            if !(0.0..=most).contains(&found) {
                let reason = format!("{key} is {found}; 0 to {most} are possible");
                return Err(self.scenario.error_at(spanned, reason));
            }
        }
        let curves = self.curves(spanned)?;
        if self.machines.len().saturating_add(curves.len()) > MACHINES_MAX {
            let reason = format!("at most {MACHINES_MAX} machines are possible");
            return Err(self.scenario.error_at(spanned, reason));
        }
        let places = self.places(spanned)?;
        for (name, curve) in curves {
            if !self.names.insert(name.clone()) {
                return Err(self
                    .scenario
                    .error_at(spanned, format!("there is a {name:?} already")));
            }
            let at = match group.place {
                InitialPlacement::Spread => {
                    self.spread += 1;
                    (self.spread - 1) % places.len()
                }
                InitialPlacement::Random => self.rng.random_range(0..places.len()),
            };
            if !group.own_labels.is_empty() {
                let labels = group.own_labels.clone();
                self.rulebook.machines.insert(name.clone(), labels);
            }
            self.machines.push(MachineSpec {
                name,
                node: places[at],
                curve,
                burns: group.burns,
                memory_bytes: (group.memory_mib as f64 * MIB) as u64,
                dirty_bytes_per_s: group.dirty_mib_per_s * MIB,
                io_bytes_per_s: group.io_mib_per_s * MIB,
                runs: true,
                balanced: group.balance,
            });
        }
        Ok(())
    }

    /// Allowed initial nodes of a group.
    fn places(&self, spanned: &Spanned<MachineGroup>) -> Result<Vec<usize>, BadInput> {
        let group = spanned.get_ref();
        if let Some(on) = &group.on {
            return Ok(vec![self.node(spanned, on)?]);
        }
        let wanted = group.labels.iter();
        let places: Vec<usize> = (0..self.nodes.len())
            .filter(|&node| self.nodes[node].there)
            .filter(|&node| {
                let mut wanted = wanted.clone();
                wanted.all(|(label, value)| self.labels[node].get(label) == Some(value))
            })
            .collect();
        if places.is_empty() {
            return Err(self
                .scenario
                .error_at(spanned, "no node has all of these labels"));
        }
        Ok(places)
    }

    fn node<T>(&self, of: &Spanned<T>, name: &str) -> Result<usize, BadInput> {
        let found = self.nodes.iter().position(|it| &*it.name == name);
        found.ok_or_else(|| {
            let hint = hint(name, self.nodes.iter().map(|it| &*it.name));
            self.scenario
                .error_at(of, format!("there is no node {name:?}; {hint}"))
        })
    }

    /// Name and demand of each machine.
    fn curves(&mut self, spanned: &Spanned<MachineGroup>) -> Result<Vec<(Name, Curve)>, BadInput> {
        let group = spanned.get_ref();
        let bad = |reason: String| self.scenario.error_at(spanned, reason);
        let pattern = group.name.as_deref();
        if let Some(pattern) = pattern
            && group.count != Some(1)
            && !pattern.contains("{}")
            && (group.count.is_some() || group.traces.is_some())
        {
            return Err(bad(format!(
                "several machines have one name: {pattern:?} needs a {{}}"
            )));
        }
        match (&group.curve, &group.traces) {
            (Some(curve), None) => {
                let Some(pattern) = pattern else {
                    return Err(bad("it has no name; \"m{}\" is one".into()));
                };
                if !curve.cores(0).is_finite() {
                    return Err(bad("its curve has an invalid number".into()));
                }
                let numbers = 1..=group.count.unwrap_or(1);
                if *numbers.end() > MACHINES_MAX {
                    return Err(bad(format!("at most {MACHINES_MAX} machines are possible")));
                }
                Ok(numbers
                    .map(|number| (named(pattern, number), individual_curve(curve, number)))
                    .collect())
            }
            (None, Some(wanted)) => {
                let (from_share, file) = match (&wanted.planetlab, &wanted.csv) {
                    (Some(folder), None) => (true, folder),
                    (None, Some(file)) => (false, file),
                    _ => {
                        let reason = "traces are either planetlab = \"FOLDER\" or csv = \"FILE\"";
                        return Err(bad(reason.into()));
                    }
                };
                if !(0.0..=65_536.0).contains(&wanted.cores) {
                    return Err(bad(format!("cores is {}", wanted.cores)));
                }
                let file = self.relative_to_scenario(file);
                let traces = self.traces(&file, from_share)?;
                let most = traces.len().saturating_sub(wanted.first);
                let count = group.count.unwrap_or(most);
                if count > most || count == 0 {
                    let reason = format!(
                        "{} has {} traces; {count} from number {} on are requested",
                        file.display(),
                        traces.len(),
                        wanted.first
                    );
                    return Err(self.scenario.error_at(spanned, reason));
                }
                let traces = &traces[wanted.first..wanted.first + count];
                Ok(traces
                    .iter()
                    .zip(1..)
                    .map(|(trace, number)| {
                        let name =
                            pattern.map_or(trace.name.as_str().into(), |it| named(it, number));
                        let scaled = trace.samples.iter().map(|it| it * wanted.cores as f32);
                        let curve = Curve::Recorded {
                            samples: scaled.collect(),
                            every_s: trace.every_s,
                        };
                        (name, curve)
                    })
                    .collect())
            }
            _ => Err(bad(
                "it needs either a curve ({ kind = \"steady\", cores = 1 }) or traces".into(),
            )),
        }
    }

    fn traces(&mut self, file: &Path, planetlab: bool) -> Result<Arc<[Trace]>, BadInput> {
        if let Some(traces) = self.traces.get(file) {
            return Ok(traces.clone());
        }
        let traces: Arc<[Trace]> = if planetlab {
            traces::planetlab::read(file)?.into()
        } else {
            traces::csv::read(file)?.into()
        };
        self.traces.insert(file.to_owned(), traces.clone());
        Ok(traces)
    }

    /// The rules: each valid and applicable to a machine, and not contradictory.
    fn rules(&mut self) -> Result<Rulebook, BadInput> {
        let scenario = self.scenario;
        let mut rulebook = std::mem::take(&mut self.rulebook);
        let labels = self.nodes.iter().map(|it| it.name.clone());
        rulebook.nodes = labels.zip(self.labels.iter().cloned()).collect();
        let nodes: Vec<Subject> = self
            .nodes
            .iter()
            .map(|it| rulebook.node(&it.name))
            .collect();
        let machines = self.machines.iter();
        let machines: Vec<Subject> = machines.map(|it| rulebook.machine(&it.name)).collect();
        for spanned in &scenario.rules {
            let rule = spanned.get_ref();
            self.check_rule(rule, &machines, &nodes)
                .map_err(|reason| scenario.error_at(spanned, reason))?;
            if rulebook.rules.iter().any(|it| it.name == rule.name) {
                let reason = format!("there is a rule {:?} already", &*rule.name);
                return Err(scenario.error_at(spanned, reason));
            }
            rulebook.rules.push(rule.clone());
        }
        if let Some(conflict) = conflict(&rulebook.rules, &machines, &nodes) {
            let reason = format!("contradictory rules: {}", conflict.join(", "));
            return Err(BadInput::file(&scenario.path, reason));
        }
        self.rulebook = rulebook.clone();
        Ok(rulebook)
    }

    fn check_rule(
        &self,
        rule: &Rule,
        machines: &[Subject],
        nodes: &[Subject],
    ) -> Result<(), String> {
        rule.check()?;
        if !machines.iter().any(|machine| rule.applies_to(machine)) {
            return Err(format!("rule {:?} applies to no machine", &*rule.name));
        }
        if let Requirement::Pin { nodes: chosen } | Requirement::Avoid { nodes: chosen } =
            &rule.requirement
            && !nodes.iter().any(|it| chosen.fits(&it.name, &it.labels))
        {
            return Err(format!("rule {:?} names no existing node", &*rule.name));
        }
        Ok(())
    }

    fn events(&mut self) -> Result<Vec<(u64, ExternalEvent)>, BadInput> {
        let scenario = self.scenario;
        let mut events: Vec<&Spanned<Event>> = scenario.events.iter().collect();
        events.sort_by(|one, other| one.get_ref().at_s().total_cmp(&other.get_ref().at_s()));
        let mut policy = scenario.policy.clone();
        let named = scenario.rules.iter().map(|it| it.get_ref().name.clone());
        let mut rules: HashSet<Name> = named.collect();
        // Nodes and machines with an earlier event.
        let mut nodes: HashSet<usize> = HashSet::new();
        let mut machines: HashSet<usize> = HashSet::new();
        let mut schedule = Vec::new();
        for event in events {
            let at_ms = milliseconds(event.get_ref().at_s());
            let mut put = |what: ExternalEvent| schedule.push((at_ms, what));
            match event.get_ref() {
                Event::NodeDies { node, .. } => {
                    let node = self.node(event, node)?;
                    nodes.insert(node);
                    put(ExternalEvent::NodeFails(node));
                }
                Event::NodeComes { node, .. } => {
                    let node = self.node(event, node)?;
                    if nodes.insert(node) {
                        self.nodes[node].there = false;
                    }
                    put(ExternalEvent::NodeStarts(node));
                }
                Event::MachineStarts { machine, .. } => {
                    for machine in self.machines(event, machine)? {
                        if machines.insert(machine) {
                            self.machines[machine].runs = false;
                        }
                        put(ExternalEvent::MachineStarts(machine));
                    }
                }
                Event::MachineEnds { machine, .. } => {
                    for machine in self.machines(event, machine)? {
                        machines.insert(machine);
                        put(ExternalEvent::MachineEnds(machine));
                    }
                }
                Event::Policy { change, .. } => {
                    policy = self.policy(event, &policy, change)?;
                    put(ExternalEvent::Policy(Box::new(policy.clone())));
                }
                Event::RuleComes { rule, .. } => {
                    let machines = self.machines.iter();
                    let machines: Vec<Subject> =
                        machines.map(|it| self.rulebook.machine(&it.name)).collect();
                    let nodes = self.nodes.iter();
                    let nodes: Vec<Subject> =
                        nodes.map(|it| self.rulebook.node(&it.name)).collect();
                    self.check_rule(rule, &machines, &nodes)
                        .map_err(|reason| scenario.error_at(event, reason))?;
                    rules.insert(rule.name.clone());
                    put(ExternalEvent::RuleAdded(Box::new(rule.clone())));
                }
                Event::RuleGoes { rule, .. } => {
                    let name: Name = rule.as_str().into();
                    if !rules.remove(&name) {
                        let hint = hint(rule, rules.iter().map(|it| &**it));
                        let reason = format!("there is no rule {rule:?} then; {hint}");
                        return Err(scenario.error_at(event, reason));
                    }
                    put(ExternalEvent::RuleRemoved(name));
                }
                Event::ClockJumps { node, by_s, .. } => {
                    let year = 366.0 * 86_400.0;
                    if !(-year..=year).contains(by_s) {
                        return Err(
                            scenario.error_at(event, format!("by_s is {by_s}; at most a year"))
                        );
                    }
                    let node = self.node(event, node)?;
                    let by_ms = (by_s * 1e3) as i64;
                    put(ExternalEvent::ClockJumps { node, by_ms });
                }
                Event::NodeLies { node, numbers, .. } => {
                    put(ExternalEvent::ReportFault(
                        self.node(event, node)?,
                        *numbers,
                    ));
                }
                Event::NodeMismeasures { node, numbers, .. } => {
                    put(ExternalEvent::MeasurementFault(
                        self.node(event, node)?,
                        *numbers,
                    ));
                }
                Event::NodeLate {
                    node,
                    by_ms,
                    doubled,
                    ..
                } => {
                    if !(0.0..=1.0).contains(doubled) {
                        let reason = format!("doubled is {doubled}; 0 to 1 are possible");
                        return Err(scenario.error_at(event, reason));
                    }
                    let (node, by_ms, doubled) = (self.node(event, node)?, *by_ms, *doubled);
                    put(ExternalEvent::SlowResponses {
                        node,
                        by_ms,
                        doubled,
                    });
                }
            }
        }
        self.stop_unplaced();
        Ok(schedule)
    }

    /// Machines on a node that has not started yet do not run.
    fn stop_unplaced(&mut self) {
        for machine in &mut self.machines {
            machine.runs &= self.nodes[machine.node].there;
        }
    }

    fn policy(
        &self,
        event: &Spanned<Event>,
        policy: &Policy,
        change: &toml::Table,
    ) -> Result<Policy, BadInput> {
        change_policy(policy, change).map_err(|reason| self.scenario.error_at(event, reason))
    }

    fn machines(&self, event: &Spanned<Event>, wanted: &str) -> Result<Vec<usize>, BadInput> {
        let fits = |name: &str| match wanted.strip_suffix('*') {
            Some(begin) => name.starts_with(begin),
            None => name == wanted,
        };
        let found: Vec<usize> = (0..self.machines.len())
            .filter(|&number| fits(&self.machines[number].name))
            .collect();
        if found.is_empty() {
            let hint = hint(wanted, self.machines.iter().map(|it| &*it.name));
            let reason = format!("there is no machine {wanted:?}; {hint}");
            return Err(self.scenario.error_at(event, reason));
        }
        Ok(found)
    }
}

/// A machine's variant of its group's curve, with its own seed.
fn individual_curve(curve: &Curve, number: usize) -> Curve {
    let mut curve = curve.clone();
    match &mut curve {
        Curve::Bursts { seed, .. } | Curve::Noise { seed, .. } => {
            *seed = seed.wrapping_add((number as u64).wrapping_mul(0x9e37_79b9));
        }
        Curve::Steady { .. }
        | Curve::Step { .. }
        | Curve::Sawtooth { .. }
        | Curve::Wave { .. }
        | Curve::Recorded { .. } => {}
    }
    curve
}
