//! The result of a run: the cluster at the start and at the end, the moves in between, the loads
//! over time, and which expectations were met.

use serde::Serialize;

/// State of a cluster at a time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClusterSummary {
    pub alive: usize,
    pub machines: usize,
    /// Mean load, weighted with power.
    pub load_mean: f64,
    /// Minimum load of a node.
    pub load_min: f64,
    /// Maximum load of a node.
    pub load_max: f64,
    /// Standard deviation of the loads, weighted with power.
    pub unevenness: f64,
    pub pressed: usize,
    pub free: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MoveReport {
    /// Time of its end, in seconds.
    pub at_s: f64,
    pub machine: String,
    pub source: String,
    pub target: String,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Series {
    /// Interval between two samples, in seconds.
    pub every_s: u64,
    pub nodes: Vec<String>,
    /// Loads of all nodes per sample; NaN for nodes that are not alive.
    pub samples: Vec<Vec<f32>>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub about: String,
    pub seed: u64,
    /// Seconds that were simulated.
    pub length_s: u64,
    /// State at the start.
    pub start: ClusterSummary,
    /// State at the end.
    pub end: ClusterSummary,
    /// The second from which on no move was admissible, in flight or made, at the samples'
    /// resolution; or why there was none.
    pub levelled_at_s: Result<u64, String>,
    pub moves: Vec<MoveReport>,
    /// Bytes that all moves sent.
    pub moved_bytes: f64,
    pub failed: u64,
    /// Moves that the limit of concurrent moves prevented.
    pub capped: u64,
    /// Moves that returned a machine to its previous node within the cool-down.
    pub returns: u64,
    /// Moves that a rule refused at commit, because of a concurrent one.
    pub raced: u64,
    /// Moves made to restore a rule.
    pub repairs: u64,
    /// Machines whose placement violates a rule at the end, with the reason.
    pub broken: Vec<String>,
    pub rounds: u64,
    /// Machines that do not run because their node failed.
    pub stranded: usize,
    pub alerts: u64,
    /// The first of them.
    pub alerts_quoted: Vec<String>,
    /// Mean over the nodes of the share of active time (with machines on them) in which the CPU
    /// demand reached the capacity: SLATAH of Beloglazov and Buyya 2012.
    pub overload_share: f64,
    /// Share of the CPU demand beyond the nodes' capacity.
    pub unmet_share: f64,
    /// Average number of active nodes.
    pub active_mean: f64,
    /// In kWh, if nodes have a power table.
    pub energy_kwh: Option<f64>,
    pub expectations: Vec<CheckResult>,
    #[serde(skip)]
    pub series: Series,
}

impl Report {
    /// Whether all expectations were met.
    pub fn met(&self) -> bool {
        self.expectations.iter().all(|it| it.met)
    }
}

/// An expectation and its result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckResult {
    pub expectation: String,
    pub expected: String,
    pub found: String,
    /// Whether it came so.
    pub met: bool,
}
