//! Checkpoints: requests to create them and to restore machines from them. Periodic ones belong to
//! the settings of a machine, in `machine`.

use serde::{Deserialize, Serialize};

/// A checkpoint to create.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// URL of the place; the node's own folder if absent.
    #[serde(default)]
    pub to: Option<String>,
    /// Whether all pages are stored, including those of earlier checkpoints.
    #[serde(default)]
    pub full: bool,
    /// How many checkpoints of the machine are kept there; all if absent.
    #[serde(default)]
    pub keep: Option<u32>,
    /// Newer checkpoints than this are kept too, in seconds.
    #[serde(default)]
    pub keep_for_s: Option<u64>,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// The machine.
    pub machine: String,
    /// Its id; later ones are greater.
    pub id: String,
    /// Its place.
    pub repository: String,
    /// The checkpoint that it is an increment of.
    pub parent: Option<String>,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// Bytes of pages in it.
    pub stored_bytes: u64,
    /// Downtime in microseconds; only when it is made.
    pub pause_micros: Option<u64>,
    /// Duration in microseconds; only when it is made.
    pub total_micros: Option<u64>,
    /// Older ones that were deleted.
    pub deleted: u32,
    /// Why it cannot be used.
    pub damage: Option<String>,
}

/// A machine to create from a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// The machine of the checkpoint.
    pub machine: String,
    /// Its id; the newest complete one if absent.
    #[serde(default)]
    pub id: Option<String>,
    /// URL of the place; the node's own folder if absent.
    #[serde(default)]
    pub from: Option<String>,
    /// A new name creates a different machine.
    #[serde(default)]
    pub name: Option<String>,
    /// The node to start it on; the one that is asked if absent.
    #[serde(default)]
    pub on: Option<String>,
    /// Whether it runs before its memory is read: it starts sooner, but damage is detected only
    /// later, and ends it.
    #[serde(default)]
    pub warm: bool,
    /// Nodes of the parts that get its memory before it runs, as in
    /// [`SpanRequest::nodes`](crate::SpanRequest::nodes); chosen if absent and it is larger
    /// than its node.
    #[serde(default)]
    pub nodes: Vec<String>,
}
