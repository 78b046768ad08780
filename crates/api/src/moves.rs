//! Moves of machines: requests, predictions and the lines of a move's answer. Proposals of the
//! balancer are in `balance`.

use keel_machine::moves::prediction::Prediction;
use keel_machine::moves::{MoveReport, Progress};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A move of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// The target node.
    pub to: String,
    /// Whether the move is post-copy: the downtime is shorter, but the machine does not survive
    /// the loss of its source before all memory has arrived. A checkpoint is made first, unless it is
    /// a whole system, which boots again then.
    #[serde(default)]
    pub post_copy: bool,
    /// The place of that checkpoint; the node's own folder if absent.
    #[serde(default)]
    pub checkpoint_to: Option<String>,
    /// Priority among the moves that wait for this node's links.
    #[serde(default)]
    pub urgency: Urgency,
    /// The longest downtime, in milliseconds: a higher limit reduces the throttling of a machine
    /// with a high dirty rate.
    #[serde(default)]
    pub downtime_ms: Option<u32>,
}

impl MoveRequest {
    /// The part of the downtime limit for sending the residual dirty pages, in microseconds:
    /// freezing and the commit need the rest.
    pub fn budget_micros(&self) -> Option<u64> {
        const BESIDE_MS: u32 = 3;
        let ms = self.downtime_ms?.saturating_sub(BESIDE_MS).max(1);
        Some(u64::from(ms) * 1000)
    }
}

/// The prediction of a move; nothing is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DryRun {
    /// The machine.
    pub machine: String,
    /// Its node.
    pub source: String,
    /// The target.
    pub target: String,
    /// Why the target would refuse it.
    pub refusal: Option<String>,
    /// Bytes of memory that it has touched.
    pub memory_bytes: u64,
    /// Bytes in its own volumes.
    pub volume_bytes: u64,
    /// By pre-copy.
    pub pre_copy: Prediction,
    /// By post-copy.
    pub post_copy: Prediction,
}

/// Priority of a move in the queue.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Urgency {
    /// After the others.
    Low,
    /// In turn.
    #[default]
    Normal,
    /// Before the others.
    High,
}

/// One line of a move's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MoveLine {
    /// Progress.
    Progress(Progress),
    /// The move has ended.
    Report(Box<MoveReport>),
    /// The move could not start.
    Error(String),
}
