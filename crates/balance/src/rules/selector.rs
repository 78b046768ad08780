//! Selectors of machines and nodes, and the failure domains of nodes. What a rule requires of them is
//! left to [`super::Requirement`].

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Labels of a node or a machine.
pub type Labels = BTreeMap<String, String>;

/// Selects machines or nodes that match all given criteria.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Selector {
    /// Names; a trailing `*` is a wildcard.
    pub names: Vec<String>,
    /// Labels that must all match.
    #[schema(value_type = BTreeMap<String, String>)]
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
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = FailureDomain)]
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
