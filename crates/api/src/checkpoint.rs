//! Checkpoints: requests to create and delete them, and to restore machines from them. Periodic ones belong to
//! the settings of a machine, in `machine`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A checkpoint to create.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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

/// Checkpoints to delete, and what writers left that were killed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneRequest {
    /// Only those of this machine; all in the place if absent, and programs that none of them needs.
    #[serde(default)]
    pub machine: Option<String>,
    /// URL of the place; the node's own folder if absent.
    #[serde(default)]
    pub from: Option<String>,
    /// How many checkpoints of each machine are kept; all if this and `keep_for_s` are absent.
    #[serde(default)]
    pub keep: Option<u32>,
    /// Newer checkpoints than this are kept too, in seconds.
    #[serde(default)]
    pub keep_for_s: Option<u64>,
    /// Nothing is deleted.
    #[serde(default)]
    pub dry_run: bool,
}

/// What was deleted in a place, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PruneInfo {
    /// The place.
    pub repository: String,
    /// Machines of which anything was deleted.
    pub machines: Vec<PrunedMachine>,
    /// Number of programs that no checkpoint needed.
    pub programs: u64,
    /// Bytes of those.
    pub program_bytes: u64,
    /// Number of images that no checkpoint needed.
    #[serde(default)]
    pub images: u64,
    /// Bytes of those, as they are stored.
    #[serde(default)]
    pub image_bytes: u64,
    /// Why programs and images stay, if that could not be found out.
    #[serde(default)]
    pub message: Option<String>,
}

/// What was deleted of one machine's checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PrunedMachine {
    /// The machine.
    pub machine: String,
    /// Ids of complete checkpoints, oldest first.
    pub checkpoints: Vec<String>,
    /// Objects in all, with those of checkpoints that were never completed.
    pub objects: u64,
    /// Their size in bytes.
    pub bytes: u64,
}

/// The quota of a place, to be set or removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QuotaRequest {
    /// URL of the place; the node's own folder if absent.
    #[serde(default)]
    pub from: Option<String>,
    /// The most bytes that its checkpoints may have; no limit if absent.
    #[serde(default)]
    pub bytes: Option<u64>,
}

/// How much of the quota of a place is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuotaInfo {
    /// The place.
    pub repository: String,
    /// Bytes of all that is stored there.
    pub used_bytes: u64,
    /// The most bytes that its checkpoints may have; no limit if absent.
    #[serde(default)]
    pub quota_bytes: Option<u64>,
}

/// A machine to create from a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
