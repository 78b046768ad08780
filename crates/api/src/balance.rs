//! Types of balancing: loads, the ledger, why something does not move.

use crate::Silence;
use keel_balance::Name;
use keel_balance::cost::Estimate;
use keel_balance::ledger::{Line, Outcome};
use keel_balance::load::NodeSample;
use keel_balance::policy::Policy;
use keel_balance::round::Explained;
use keel_balance::rules::{Holders, Labels, Rule, Violation};
use keel_balance::select::NodeState;
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
    pub side: Option<NodeState>,
    /// Its newest sample.
    pub sample: Option<NodeSample>,
    /// Revision of the policy by which it measures.
    pub policy_revision: u64,
    /// Moves that wait for a person: machine and target.
    pub proposals: Vec<(Name, Name)>,
    /// What goes to and comes from other nodes, by node.
    #[serde(default)]
    pub traffic: Vec<PeerTraffic>,
    /// By which factors predictions of durations and downtimes are off, typically, and
    /// from how many moves that is known.
    pub model_error: (f64, f64, u32),
}

/// What goes to and comes from another node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerTraffic {
    /// The node.
    pub peer: String,
    /// Bytes a second to it; what moves sent is counted when they are over.
    pub sent_bytes_per_s: f64,
    /// Bytes a second from it, without what moves brought.
    pub received_bytes_per_s: f64,
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
    pub broken: Vec<(Name, Violation)>,
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

/// What a plan is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PlanGoal {
    /// All nodes level.
    Level {
        /// By so many moves at most.
        #[serde(default)]
        moves_max: Option<usize>,
    },
    /// As few nodes as carry the load.
    Pack,
    /// A node empty.
    Drain {
        /// Which.
        node: String,
    },
}

/// A move of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanStep {
    /// The machine.
    pub machine: String,
    /// Where it is then.
    pub from: String,
    /// Where it goes.
    pub to: String,
    /// Steps of one wave go at the same time, after those of the wave before.
    pub wave: usize,
    /// Whether it is a stop on the way.
    pub hop: bool,
    /// Bytes that are sent, as predicted.
    pub bytes: u64,
    /// How long it takes, in milliseconds.
    pub duration_ms: Estimate,
    /// For how long the machine stands still, in milliseconds.
    pub downtime_ms: Estimate,
}

/// A machine that should go and cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftBehind {
    /// The machine.
    pub machine: String,
    /// Where it is.
    pub node: String,
    /// Why.
    pub reason: String,
}

/// A plan for all nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanInfo {
    /// What it is for.
    pub goal: PlanGoal,
    /// Moves, in order.
    pub steps: Vec<PlanStep>,
    /// Weighted sum of the standard deviations of nodes' shares, before.
    pub before: f64,
    /// The same after it.
    pub after: f64,
    /// How long it takes, in milliseconds.
    pub duration_ms: f64,
    /// Machines that should go and cannot.
    pub left: Vec<LeftBehind>,
    /// Nodes that did not answer: they are left as they are.
    pub silent: Vec<Silence>,
    /// Names the steps, and the machines as they were when the plan was made.
    pub id: String,
    /// Where the machines of its steps were then.
    pub machines: Vec<PlannedMachine>,
}

/// A machine that a plan moves, as it was when the plan was made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PlannedMachine {
    /// Its name.
    pub machine: String,
    /// Its owner.
    pub node: String,
    /// Raised by each change of owner, and by each restart.
    pub epoch: String,
}

/// A plan to carry out: that very one, on the cluster as it was, or none of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// [`PlanInfo::id`].
    pub id: String,
    /// [`PlanInfo::steps`].
    pub steps: Vec<PlanStep>,
    /// [`PlanInfo::machines`].
    pub machines: Vec<PlannedMachine>,
}

/// What becomes of a plan that is carried out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanLine {
    /// A move begins.
    Begun(PlanStep),
    /// A move is over.
    Ended {
        /// Which.
        step: PlanStep,
        /// How.
        outcome: Outcome,
    },
}

/// A node that is to be emptied.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Milliseconds from now within which it is to be empty.
    pub deadline_ms: Option<u64>,
}

/// How a node stands that is, or is not, to be emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainState {
    /// It is not to be emptied.
    Open,
    /// Machines leave it.
    Draining,
    /// None of those that are left can go.
    Stuck,
    /// Its time is over, and some are left; they stay.
    Late,
    /// No machine is left.
    Empty,
}

/// How far emptying a node has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrainInfo {
    /// The node.
    pub node: String,
    /// How it stands.
    pub state: DrainState,
    /// Since when it is to be empty, in milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: Option<u64>,
    /// Until when.
    pub deadline_unix_ms: Option<u64>,
    /// Machines that are still there.
    pub machines: u32,
    /// Parts that are still there of machines whose home is elsewhere, or here.
    #[serde(default)]
    pub parts: u32,
    /// Machines that went.
    pub moved: u32,
    /// When it will be empty, as predicted.
    pub end_unix_ms: Option<u64>,
    /// Moves under way.
    pub moving: Vec<PlanStep>,
    /// Machines that should go and cannot just now.
    pub left: Vec<LeftBehind>,
}
