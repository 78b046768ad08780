//! Types of balancing: loads, the ledger, explanations.

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
use utoipa::ToSchema;

/// Default number of ledger lines of an answer.
pub const LEDGER_DEFAULT: u32 = 200;
/// The most ledger lines of an answer.
pub const LEDGER_MAX: u32 = 10_000;

/// A node's load, as its balancer sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeLoad {
    /// Its name.
    pub node: String,
    /// Its view for other nodes; `None` before it has measured for long enough.
    pub side: Option<NodeState>,
    /// Its newest sample.
    pub sample: Option<NodeSample>,
    /// Revision of the policy of the measurement.
    pub policy_revision: u64,
    /// Moves that wait for confirmation: machine and target.
    #[schema(value_type = Vec<(String, String)>)]
    pub proposals: Vec<(Name, Name)>,
    /// Traffic with other nodes, by node.
    #[serde(default)]
    pub traffic: Vec<PeerTraffic>,
    /// Typical factors by which predictions of durations and downtimes are off, and the number of
    /// moves from which they are known.
    pub model_error: (f64, f64, u32),
}

/// Traffic with another node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PeerTraffic {
    /// The node.
    pub peer: String,
    /// Bytes a second sent to it; those of a move count at its end.
    pub sent_bytes_per_s: f64,
    /// Bytes a second received from it, without moves.
    pub received_bytes_per_s: f64,
}

/// Balancing in the cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalanceInfo {
    /// The policy of the balancer.
    pub policy: Policy,
    /// The policy's revision; 0 if none was ever set.
    pub revision: u64,
    /// Loads, by node.
    pub nodes: Vec<NodeLoad>,
    /// Nodes that did not answer.
    pub silent: Vec<Silence>,
}

/// A new policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyRequest {
    /// The complete policy.
    pub policy: Policy,
    /// The revision that it is based on: a concurrent change is not overwritten.
    pub from: u64,
}

/// Lines of all nodes' ledgers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LedgerInfo {
    /// Oldest first.
    pub lines: Vec<Line>,
    /// Nodes that did not answer, whose lines are missing.
    pub silent: Vec<Silence>,
}

/// Explains why a machine does not move to a node now, or that it would.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WhyNot {
    /// The machine.
    pub machine: String,
    /// Its node.
    pub node: String,
    /// The possible target.
    pub to: String,
    /// The result of a round of these two nodes.
    pub explained: Explained,
}

/// The placement rules, and their state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RulesInfo {
    /// The rules.
    pub rules: Vec<Rule>,
    /// For each rule that counts, the machines in each of its domains.
    #[schema(value_type = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>)]
    pub holders: BTreeMap<Name, Holders>,
    /// Machines that violate a rule: they are to be moved.
    #[schema(value_type = Vec<(String, Violation)>)]
    pub broken: Vec<(Name, Violation)>,
}

/// Labels to set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelRequest {
    /// Whether the name is a node's, not a machine's.
    pub node: bool,
    /// The name.
    pub name: String,
    /// Labels; an empty value removes one.
    #[schema(value_type = BTreeMap<String, String>)]
    pub labels: Labels,
}

/// The goal of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PlanGoal {
    /// Equal loads on all nodes.
    Level {
        /// The most moves.
        #[serde(default)]
        moves_max: Option<usize>,
    },
    /// As few nodes as the load needs.
    Pack,
    /// Drains a node.
    Drain {
        /// The node.
        node: String,
    },
}

/// A move of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanStep {
    /// The machine.
    pub machine: String,
    /// Its node before the step.
    pub from: String,
    /// The target.
    pub to: String,
    /// Steps of one wave run concurrently, after those of the wave before.
    pub wave: usize,
    /// Whether the target is an intermediate stop.
    pub hop: bool,
    /// Predicted bytes that are sent.
    pub bytes: u64,
    /// Duration, in milliseconds.
    pub duration_ms: Estimate,
    /// Downtime, in milliseconds.
    pub downtime_ms: Estimate,
}

/// A machine that should move and cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeftBehind {
    /// The machine.
    pub machine: String,
    /// Its node.
    pub node: String,
    /// The reason.
    pub reason: String,
}

/// A plan for all nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanInfo {
    /// Its goal.
    pub goal: PlanGoal,
    /// Moves, in order.
    pub steps: Vec<PlanStep>,
    /// Weighted sum of the standard deviations of nodes' shares, before.
    pub before: f64,
    /// The same after the plan.
    pub after: f64,
    /// Duration, in milliseconds.
    pub duration_ms: f64,
    /// Machines that should move and cannot.
    pub left: Vec<LeftBehind>,
    /// Nodes that did not answer, whose machines do not move.
    pub silent: Vec<Silence>,
    /// Id of the steps, and of the machines as they were when the plan was made.
    pub id: String,
    /// The machines of its steps, as they were then.
    pub machines: Vec<PlannedMachine>,
}

/// A machine that a plan moves, as it was when the plan was made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct PlannedMachine {
    /// Its name.
    pub machine: String,
    /// Its owner.
    pub node: String,
    /// Raised by each change of owner, and by each restart.
    pub epoch: String,
}

/// A plan to carry out: exactly this one on an unchanged cluster, or none of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// [`PlanInfo::id`].
    pub id: String,
    /// [`PlanInfo::steps`].
    pub steps: Vec<PlanStep>,
    /// [`PlanInfo::machines`].
    pub machines: Vec<PlannedMachine>,
}

/// Progress of a plan that is carried out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlanLine {
    /// A move begins.
    Begun(PlanStep),
    /// A move has ended.
    Ended {
        /// The step.
        step: PlanStep,
        /// The outcome.
        outcome: Outcome,
    },
}

/// A node to drain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// The deadline, in milliseconds from now.
    pub deadline_ms: Option<u64>,
}

/// State of a node's drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DrainState {
    /// The node is not being drained.
    Open,
    /// Machines are leaving.
    Draining,
    /// No remaining machine can move.
    Stuck,
    /// The deadline has passed; the remaining machines stay.
    Late,
    /// No machine remains.
    Empty,
}

/// Progress of a drain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DrainInfo {
    /// The node.
    pub node: String,
    /// The state.
    pub state: DrainState,
    /// Start, in milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: Option<u64>,
    /// The deadline.
    pub deadline_unix_ms: Option<u64>,
    /// Machines that remain.
    pub machines: u32,
    /// Parts that remain, of machines with their home elsewhere or here.
    #[serde(default)]
    pub parts: u32,
    /// Machines that have left.
    pub moved: u32,
    /// The predicted end.
    pub end_unix_ms: Option<u64>,
    /// Moves in progress.
    pub moving: Vec<PlanStep>,
    /// Machines that should move and cannot at present.
    pub left: Vec<LeftBehind>,
}
