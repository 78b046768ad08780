//! Placement rules. Two nodes of a round cannot enforce a rule that spans nodes: so each rule has
//! keys in the store, one per *domain* (a node, or a value of a node label), with the machines that
//! hold it. Placing or moving a machine reads them, and compares and writes them in the same
//! transaction that places it: [`Claim`] lists them. So rules hold while no balancer runs, and of
//! two racing transactions one is refused.

use crate::Name;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Maximum number of rules of a cluster.
pub const RULES_MAX: usize = 256;
/// Search steps after which the search for a placement that satisfies all rules is abandoned: no
/// contradiction is reported then.
const SEARCH_STEPS_MAX: u32 = 200_000;

/// Labels of a node or a machine.
pub type Labels = BTreeMap<String, String>;

/// Selects machines or nodes that match all given criteria.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Selector {
    /// Names; a trailing `*` is a wildcard.
    pub names: Vec<String>,
    /// Labels that must all match.
    pub labels: Labels,
}

impl Selector {
    /// Whether it matches.
    pub fn fits(&self, name: &str, labels: &Labels) -> bool {
        let named = self.names.is_empty() || self.names.iter().any(|it| matches(it, name));
        let labelled = self
            .labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value));
        named && labelled
    }

    /// Whether it has no criteria, and so would match everything.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.labels.is_empty()
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(begin) => name.starts_with(begin),
        None => pattern == name,
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels = self
            .labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"));
        let all: Vec<String> = self.names.iter().cloned().chain(labels).collect();
        f.write_str(&all.join(" "))
    }
}

/// Failure domain over which a rule counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Domain {
    /// Each node is one.
    #[default]
    Node,
    /// All nodes with the same value of this label; a node without it is a domain of its own.
    Label(String),
}

impl Domain {
    /// The domain of a node, as a component of a key. Two nodes are in one domain exactly if these
    /// are equal.
    pub fn of(&self, node: &str, labels: &Labels) -> String {
        match self {
            Domain::Node => node.to_owned(),
            Domain::Label(label) => match labels.get(label) {
                Some(value) => value.clone(),
                None => node.to_owned(),
            },
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Domain::Node => f.write_str("node"),
            Domain::Label(label) => f.write_str(label),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "rule", deny_unknown_fields)]
pub enum Requirement {
    /// All in one domain.
    Together {
        #[serde(default)]
        per: Domain,
    },
    /// At most `max` machines per domain.
    Apart {
        #[serde(default)]
        per: Domain,
        #[serde(default = "one")]
        max: u32,
    },
    /// Evenly over domains: the counts of any two differ by at most `skew`.
    Spread {
        per: Domain,
        #[serde(default = "one")]
        skew: u32,
    },
    /// On these nodes only.
    Pin { nodes: Selector },
    /// Not on these nodes.
    Avoid { nodes: Selector },
    /// Never moved by the balancer.
    Stay,
    /// On at most so many nodes at a time: licences that are counted per node.
    Licence { nodes_max: u32 },
    /// The balancer moves these machines at these hours only.
    Hours {
        /// First minute of a day (UTC), 0 to 1439.
        from_minute: u32,
        /// End, exclusive; before `from_minute`, on the next day.
        to_minute: u32,
    },
}

fn one() -> u32 {
    1
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub name: Name,
    /// The machines to which it applies.
    pub machines: Selector,
    #[serde(flatten)]
    pub requirement: Requirement,
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Requirement::Together { per } => write!(f, "together on one {per}"),
            Requirement::Apart { per, max } => write!(f, "at most {max} on one {per}"),
            Requirement::Spread { per, skew } => {
                write!(f, "spread over every {per}, counts at most {skew} apart")
            }
            Requirement::Pin { nodes } => write!(f, "only on {nodes}"),
            Requirement::Avoid { nodes } => write!(f, "not on {nodes}"),
            Requirement::Stay => f.write_str("never moved by the balancer"),
            Requirement::Licence { nodes_max } => write!(f, "on at most {nodes_max} nodes"),
            Requirement::Hours {
                from_minute,
                to_minute,
            } => write!(
                f,
                "moved by the balancer from {:02}:{:02} to {:02}:{:02} UTC only",
                from_minute / 60,
                from_minute % 60,
                to_minute / 60,
                to_minute % 60
            ),
        }
    }
}

/// A node or a machine, as rules see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    pub name: Name,
    pub labels: Labels,
}

/// The machines in each domain of a rule.
pub type Holders = BTreeMap<String, BTreeSet<Name>>;

/// A violated rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    pub rule: Name,
    /// The requirement, and what violates it.
    pub why: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {:?} does not allow it: {}", &*self.rule, self.why)
    }
}

/// The change of one rule's holders by a placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub rule: Name,
    /// Domains whose holders must be unchanged since they were read: all that the rule depends on.
    pub reads: BTreeSet<String>,
    /// New holders of the changed domains.
    pub writes: Holders,
}

impl Rule {
    /// Whether the store keeps its holders.
    pub fn counts(&self) -> bool {
        match self.requirement {
            Requirement::Together { .. }
            | Requirement::Apart { .. }
            | Requirement::Spread { .. }
            | Requirement::Licence { .. } => true,
            Requirement::Pin { .. }
            | Requirement::Avoid { .. }
            | Requirement::Stay
            | Requirement::Hours { .. } => false,
        }
    }

    /// The failure domain over which it counts.
    pub fn per(&self) -> &Domain {
        match &self.requirement {
            Requirement::Together { per }
            | Requirement::Apart { per, .. }
            | Requirement::Spread { per, .. } => per,
            _ => &Domain::Node,
        }
    }

    /// Whether it applies to a machine.
    pub fn applies_to(&self, machine: &Subject) -> bool {
        self.machines.fits(&machine.name, &machine.labels)
    }

    fn violation(&self, why: String) -> Violation {
        Violation {
            rule: self.name.clone(),
            why: format!("{} ({})", self.requirement, why),
        }
    }

    /// The claim for placing a machine on a node: `None` if the rule does not apply or nothing
    /// changes. `holders` are those of all its domains, of live machines; `domains` are all domains
    /// of live nodes.
    ///
    /// # Errors
    /// [`Violation`] if the rule does not allow it.
    pub fn claim(
        &self,
        machine: &Subject,
        node: &Subject,
        holders: &Holders,
        domains: &BTreeSet<String>,
    ) -> Result<Option<Claim>, Violation> {
        if !self.applies_to(machine) {
            return Ok(None);
        }
        let name = &machine.name;
        match &self.requirement {
            Requirement::Pin { nodes } if !nodes.fits(&node.name, &node.labels) => {
                return Err(self.violation(format!("{} is not one of them", node.name)));
            }
            Requirement::Avoid { nodes } if nodes.fits(&node.name, &node.labels) => {
                return Err(self.violation(format!("{} is one of them", node.name)));
            }
            _ if !self.counts() => return Ok(None),
            _ => {}
        }
        let target = self.per().of(&node.name, &node.labels);
        let before: Vec<&String> = holders
            .iter()
            .filter(|(_, machines)| machines.contains(name))
            .map(|(domain, _)| domain)
            .collect();
        if before == [&target] {
            return Ok(None);
        }
        let mut after = holders.clone();
        for machines in after.values_mut() {
            machines.remove(name);
        }
        after
            .entry(target.clone())
            .or_default()
            .insert(name.clone());
        self.check_counts(&target, &after, domains)?;
        let mut writes = Holders::new();
        for domain in before.into_iter().chain([&target]) {
            let machines = after.get(domain).cloned().unwrap_or_default();
            writes.insert(domain.clone(), machines);
        }
        // An `apart` rule depends on the target's domain only; the others on all.
        let reads = match self.requirement {
            Requirement::Apart { .. } => writes.keys().cloned().collect(),
            _ => {
                let all = holders.keys().chain(domains).chain([&target]);
                all.cloned().collect()
            }
        };
        Ok(Some(Claim {
            rule: self.name.clone(),
            reads,
            writes,
        }))
    }

    fn check_counts(
        &self,
        target: &str,
        after: &Holders,
        domains: &BTreeSet<String>,
    ) -> Result<(), Violation> {
        let count = |domain: &str| after.get(domain).map_or(0, BTreeSet::len);
        let used = after
            .values()
            .filter(|machines| !machines.is_empty())
            .count();
        match &self.requirement {
            Requirement::Together { per } if used > 1 => {
                let elsewhere = after
                    .iter()
                    .find(|(domain, machines)| domain.as_str() != target && !machines.is_empty());
                let elsewhere = elsewhere.map_or("", |(domain, _)| domain.as_str());
                Err(self.violation(format!("others are on {per} {elsewhere}")))
            }
            Requirement::Apart { per, max } if count(target) > *max as usize => {
                Err(self.violation(format!("{per} {target} has {} already", count(target) - 1)))
            }
            Requirement::Spread { per, skew } => {
                let least = domains
                    .iter()
                    .map(|domain| count(domain))
                    .min()
                    .unwrap_or(0);
                if count(target) > least + *skew as usize {
                    return Err(self.violation(format!(
                        "{per} {target} would have {}, another one has {least}",
                        count(target)
                    )));
                }
                Ok(())
            }
            Requirement::Licence { nodes_max } if used > *nodes_max as usize => {
                Err(self.violation(format!("{nodes_max} are in use already")))
            }
            _ => Ok(()),
        }
    }

    /// Why the balancer must not move a machine at this minute of the day (UTC), if it must not.
    pub fn forbids_moving(&self, machine: &Subject, minute: u32) -> Option<Violation> {
        if !self.applies_to(machine) {
            return None;
        }
        match self.requirement {
            Requirement::Stay => Some(self.violation("as it says".into())),
            Requirement::Hours {
                from_minute,
                to_minute,
            } => {
                let within = if from_minute <= to_minute {
                    (from_minute..to_minute).contains(&minute)
                } else {
                    minute >= from_minute || minute < to_minute
                };
                let now = format!("it is {:02}:{:02}", minute / 60, minute % 60);
                (!within).then(|| self.violation(now))
            }
            _ => None,
        }
    }

    /// Validates the rule by itself.
    ///
    /// # Errors
    /// A sentence that names the error.
    pub fn check(&self) -> Result<(), String> {
        let invalid = |what: &str| Err(format!("rule {:?}: {what}", &*self.name));
        if self.machines.is_empty() {
            return invalid("it names no machines (machines.names or machines.labels)");
        }
        match &self.requirement {
            Requirement::Apart { max: 0, .. } => {
                invalid("max = 0 would forbid its machines everywhere")
            }
            Requirement::Spread { skew: 0, .. } => {
                invalid("skew = 0 cannot be kept while machines are placed one by one")
            }
            Requirement::Licence { nodes_max: 0 } => {
                invalid("nodes_max = 0 would forbid its machines everywhere")
            }
            Requirement::Pin { nodes } | Requirement::Avoid { nodes } if nodes.is_empty() => {
                invalid("it names no nodes (nodes.names or nodes.labels)")
            }
            Requirement::Hours {
                from_minute,
                to_minute,
            } if *from_minute >= 1440 || *to_minute >= 1440 => {
                invalid("a day has minutes 0 to 1439")
            }
            Requirement::Hours {
                from_minute,
                to_minute,
            } if from_minute == to_minute => invalid("these hours have no length"),
            _ => Ok(()),
        }
    }
}

/// The holders of all rules for a given placement.
pub fn holders_of(
    rules: &[Rule],
    placed: &[(Subject, Name)],
    nodes: &[Subject],
) -> BTreeMap<Name, Holders> {
    let mut all = BTreeMap::new();
    for rule in rules.iter().filter(|rule| rule.counts()) {
        let holders: &mut Holders = all.entry(rule.name.clone()).or_default();
        for (machine, node) in placed
            .iter()
            .filter(|(machine, _)| rule.applies_to(machine))
        {
            let labels = nodes
                .iter()
                .find(|it| it.name == *node)
                .map(|it| &it.labels);
            let domain = rule.per().of(node, labels.unwrap_or(&Labels::new()));
            holders
                .entry(domain)
                .or_default()
                .insert(machine.name.clone());
        }
    }
    all
}

/// All domains of the counting rules, of live nodes.
pub fn domains_of(rules: &[Rule], nodes: &[Subject]) -> BTreeMap<Name, BTreeSet<String>> {
    let counting = rules.iter().filter(|rule| rule.counts());
    let of = |rule: &Rule| -> BTreeSet<String> {
        let domains = nodes.iter().map(|it| rule.per().of(&it.name, &it.labels));
        domains.collect()
    };
    counting.map(|rule| (rule.name.clone(), of(rule))).collect()
}

/// The first rule that forbids a machine on a node. `holders` and `domains` are those of all rules.
pub fn forbidden(
    rules: &[Rule],
    machine: &Subject,
    node: &Subject,
    holders: &BTreeMap<Name, Holders>,
    domains: &BTreeMap<Name, BTreeSet<String>>,
) -> Option<Violation> {
    let (no_holders, no_domains) = (Holders::new(), BTreeSet::new());
    rules.iter().find_map(|rule| {
        let held = holders.get(&rule.name).unwrap_or(&no_holders);
        let domains = domains.get(&rule.name).unwrap_or(&no_domains);
        rule.claim(machine, node, held, domains).err()
    })
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(name: &str, labels: &[(&str, &str)]) -> Subject {
        Subject {
            name: name.into(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        }
    }

    fn rule(name: &str, machines: &str, requirement: Requirement) -> Rule {
        Rule {
            name: name.into(),
            machines: Selector {
                names: vec![machines.to_owned()],
                labels: Labels::new(),
            },
            requirement,
        }
    }

    fn named(node: &str) -> Selector {
        Selector {
            names: vec![node.to_owned()],
            labels: Labels::new(),
        }
    }

    fn holders(all: &[(&str, &[&str])]) -> Holders {
        let set = |names: &[&str]| names.iter().map(|name| Name::from(*name)).collect();
        all.iter()
            .map(|(domain, names)| ((*domain).to_owned(), set(names)))
            .collect()
    }

    fn domains(all: &[&str]) -> BTreeSet<String> {
        all.iter().map(|it| (*it).to_owned()).collect()
    }

    #[test]
    fn apart_is_kept_by_domain() {
        let zone = Domain::Label("zone".into());
        let apart = rule("ha", "web-*", Requirement::Apart { per: zone, max: 1 });
        let (a, b) = (
            subject("a", &[("zone", "x")]),
            subject("b", &[("zone", "y")]),
        );
        let held = holders(&[("x", &["web-1"])]);
        let web = subject("web-2", &[]);
        let broken = apart
            .claim(&web, &a, &held, &domains(&["x", "y"]))
            .unwrap_err();
        assert!(broken.why.contains("zone x has 1 already"), "{broken}");
        let claim = apart
            .claim(&web, &b, &held, &domains(&["x", "y"]))
            .unwrap()
            .unwrap();
        assert_eq!(claim.writes, holders(&[("y", &["web-2"])]));
        assert_eq!(claim.reads, domains(&["y"]));
        // On its present node nothing changes; other machines are not affected.
        let there = apart.claim(&subject("web-1", &[]), &a, &held, &domains(&["x"]));
        assert_eq!(there, Ok(None));
        let other = apart.claim(&subject("db", &[]), &a, &held, &domains(&["x"]));
        assert_eq!(other, Ok(None));
        // A move frees what it leaves.
        let moved = apart.claim(&subject("web-1", &[]), &b, &held, &domains(&["x", "y"]));
        let moved = moved.unwrap().unwrap();
        assert_eq!(moved.writes, holders(&[("x", &[]), ("y", &["web-1"])]));
    }

    #[test]
    fn each_rule_says_why() {
        let (a, b) = (subject("a", &[]), subject("b", &[]));
        let held = holders(&[("a", &["m1", "m2"]), ("b", &["m3"])]);
        let all = domains(&["a", "b", "c"]);
        let m = subject("m4", &[]);
        let why = |requirement: Requirement, node: &Subject| {
            let rule = rule("r", "m*", requirement);
            rule.check().unwrap();
            rule.claim(&m, node, &held, &all).map_err(|it| it.why)
        };
        let together = Requirement::Together { per: Domain::Node };
        assert!(
            why(together, &a)
                .unwrap_err()
                .contains("others are on node b")
        );
        let spread = Requirement::Spread {
            per: Domain::Node,
            skew: 1,
        };
        assert!(
            why(spread.clone(), &a)
                .unwrap_err()
                .contains("would have 3")
        );
        assert!(why(spread, &subject("c", &[])).is_ok());
        let licence = Requirement::Licence { nodes_max: 2 };
        assert!(why(licence.clone(), &b).is_ok());
        assert!(
            why(licence, &subject("c", &[]))
                .unwrap_err()
                .contains("2 are in use")
        );
        assert!(why(Requirement::Pin { nodes: named("b") }, &a).is_err());
        assert_eq!(why(Requirement::Pin { nodes: named("a") }, &a), Ok(None));
        assert!(why(Requirement::Avoid { nodes: named("a") }, &a).is_err());
        assert_eq!(why(Requirement::Stay, &a), Ok(None));
    }

    #[test]
    fn hours_may_pass_midnight() {
        let night = Requirement::Hours {
            from_minute: 22 * 60,
            to_minute: 6 * 60,
        };
        let night = rule("night", "*", night);
        let machine = subject("m", &[]);
        assert!(night.forbids_moving(&machine, 23 * 60).is_none());
        assert!(night.forbids_moving(&machine, 0).is_none());
        let noon = night.forbids_moving(&machine, 12 * 60).unwrap();
        assert!(noon.why.contains("22:00 to 06:00") && noon.why.contains("it is 12:00"));
        assert!(
            rule("s", "m", Requirement::Stay)
                .forbids_moving(&machine, 0)
                .is_some()
        );
    }

    #[test]
    fn the_smallest_conflict_is_named() {
        let nodes = [subject("a", &[]), subject("b", &[]), subject("c", &[])];
        let machines: Vec<Subject> = ["m1", "m2"].iter().map(|it| subject(it, &[])).collect();
        let per = Domain::Node;
        let apart = rule("apart", "m*", Requirement::Apart { per, max: 1 });
        let pin = rule("pin", "m*", Requirement::Pin { nodes: named("a") });
        let harmless = rule("harmless", "m1", Requirement::Avoid { nodes: named("c") });
        let rules = [harmless.clone(), apart.clone(), pin.clone()];
        let found = conflict(&rules, &machines, &nodes).unwrap();
        assert_eq!(found, [apart.name.clone(), pin.name]);
        assert_eq!(
            conflict(&[harmless, apart.clone()], &machines, &nodes),
            None
        );
        // Four machines apart on three nodes: one rule is enough for a conflict.
        let four: Vec<Subject> = (1..=4).map(|it| subject(&format!("m{it}"), &[])).collect();
        assert_eq!(
            conflict(std::slice::from_ref(&apart), &four, &nodes),
            Some(vec![apart.name])
        );
    }

    #[test]
    fn a_broken_rule_is_repaired_by_the_fewest_moves() {
        let nodes = [subject("a", &[]), subject("b", &[]), subject("c", &[])];
        let placed: Vec<(Subject, Name)> = [("m1", "a"), ("m2", "a"), ("m3", "a"), ("m4", "b")]
            .iter()
            .map(|(machine, node)| (subject(machine, &[]), (*node).into()))
            .collect();
        let movers = |requirement: Requirement| {
            let found = violations_of(&[rule("r", "m*", requirement)], &placed, &nodes);
            let names = found.into_iter().map(|(machine, _)| machine.to_string());
            names.collect::<Vec<_>>()
        };
        let per = Domain::Node;
        let apart = |max| Requirement::Apart {
            per: Domain::Node,
            max,
        };
        assert_eq!(movers(apart(1)), ["m2", "m3"]);
        assert_eq!(movers(apart(3)), [""; 0]);
        assert_eq!(movers(Requirement::Together { per: per.clone() }), ["m4"]);
        assert_eq!(movers(Requirement::Licence { nodes_max: 1 }), ["m4"]);
        assert_eq!(movers(Requirement::Spread { per, skew: 1 }), ["m3"]);
        assert_eq!(movers(Requirement::Pin { nodes: named("a") }), ["m4"]);
        assert_eq!(movers(Requirement::Avoid { nodes: named("b") }), ["m4"]);
    }

    #[test]
    fn nonsense_is_refused_and_toml_is_read() {
        let no_holders = Rule {
            machines: Selector::default(),
            ..rule("r", "m", Requirement::Stay)
        };
        assert!(
            no_holders
                .check()
                .unwrap_err()
                .contains("names no machines")
        );
        let per = Domain::Node;
        assert!(
            rule("r", "m", Requirement::Apart { per, max: 0 })
                .check()
                .is_err()
        );
        let text = "name = \"ha\"\nrule = \"apart\"\nper = { label = \"zone\" }\n\
                    [machines]\nlabels = { app = \"web\" }\n";
        let read: Rule = toml::from_str(text).unwrap();
        let per = Domain::Label("zone".into());
        assert_eq!(read.requirement, Requirement::Apart { per, max: 1 });
        assert!(read.applies_to(&subject("x", &[("app", "web")])));
        assert!(!read.applies_to(&subject("x", &[("app", "db")])));
    }
}
