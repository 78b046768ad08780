//! Types of balancing: loads, the ledger, why something does not move.

use crate::Silence;
use keel_balance::Name;
use keel_balance::ledger::Line;
use keel_balance::load::NodeSample;
use keel_balance::policy::Policy;
use keel_balance::round::Explained;
use keel_balance::rules::{Broken, Holders, Labels, Rule};
use keel_balance::select::Side;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How many lines of the ledger an answer has if nothing else is asked for.
pub const LEDGER_DEFAULT: u32 = 200;
/// How many lines of the ledger an answer has at most.
pub const LEDGER_MAX: u32 = 10_000;

/// A node's load, as its balancer sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeLoad {
    /// Its name.
    pub node: String,
    /// What it tells other nodes; `None` before it has measured for long enough.
    pub side: Option<Side>,
    /// Its newest sample.
    pub sample: Option<NodeSample>,
    /// Revision of the policy by which it measures.
    pub policy_revision: u64,
    /// Moves that wait for a person: machine and target.
    pub proposals: Vec<(Name, Name)>,
    /// By which factors predictions of durations and downtimes are off, typically, and
    /// from how many moves that is known.
    pub model_error: (f64, f64, u32),
}

/// Balancing in the cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BalanceInfo {
    /// What the cluster wants of its balancer.
    pub policy: Policy,
    /// The policy's revision; 0 if none was ever set.
    pub revision: u64,
    /// Loads, by node.
    pub nodes: Vec<NodeLoad>,
    /// Nodes that did not answer.
    pub silent: Vec<Silence>,
}

/// A new policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyRequest {
    /// The policy, whole.
    pub policy: Policy,
    /// The revision that it was made from: another change in between is not undone.
    pub from: u64,
}

/// Lines of all nodes' ledgers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LedgerInfo {
    /// Oldest first.
    pub lines: Vec<Line>,
    /// Nodes that did not answer: their lines are missing.
    pub silent: Vec<Silence>,
}

/// Why a machine does not go to a node now, or that it would.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WhyNot {
    /// The machine.
    pub machine: String,
    /// Where it is.
    pub node: String,
    /// Where it might go.
    pub to: String,
    /// What a round of these two nodes would come to.
    pub explained: Explained,
}

/// The placement rules, and how they are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RulesInfo {
    /// The rules.
    pub rules: Vec<Rule>,
    /// Of each rule that counts, the machines in each of its domains.
    pub holders: BTreeMap<Name, Holders>,
    /// Machines that break a rule where they are: they are to be moved.
    pub broken: Vec<(Name, Broken)>,
}

/// Labels to set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelRequest {
    /// Whether it is a node's name, or a machine's.
    pub node: bool,
    /// The name.
    pub name: String,
    /// Labels; an empty value removes one.
    pub labels: Labels,
}
