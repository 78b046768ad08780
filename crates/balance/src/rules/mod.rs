//! Placement rules. Two nodes of a round cannot enforce a rule that spans nodes: so each rule has
//! keys in the store, one per *domain* (a node, or a value of a node label), with the machines that
//! hold it. Placing or moving a machine reads them, and compares and writes them in the same
//! transaction that places it: [`Claim`] lists them. So rules hold while no balancer runs, and of
//! two racing transactions one is refused.
//!
//! - `selector`: which machines and nodes a rule is about, and failure domains
//! - `claim`: placing one machine
//! - `repair`: the moves that restore violated rules
//! - `conflict`: rules that contradict each other
//!
//! Requirements and rules, and who holds them in a placement, are in this file.

mod claim;
mod conflict;
mod repair;
mod selector;
#[cfg(test)]
mod tests;

pub use claim::Claim;
pub use conflict::conflict;
pub use repair::{Repair, repair, violations_of};
pub use selector::{Domain, Labels, Selector};

use crate::Name;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Maximum number of rules of a cluster.
pub const RULES_MAX: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = RuleRequirement)]
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

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Rule {
    #[schema(value_type = String)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = RuleViolation)]
pub struct Violation {
    #[schema(value_type = String)]
    pub rule: Name,
    /// The requirement, and what violates it.
    pub why: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {:?} does not allow it: {}", &*self.rule, self.why)
    }
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
