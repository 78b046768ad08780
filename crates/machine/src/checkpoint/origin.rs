//! The checkpoint that a machine is restored from, as its record names it.

use super::id::CheckpointId;
use keel_cluster::{MachineName, NodeName};
use serde::{Deserialize, Serialize};

/// The checkpoint that a machine is restored from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// URL of the repository.
    pub repository: String,
    /// The machine whose checkpoint it is.
    pub machine: MachineName,
    /// The checkpoint; `None` for the newest intact one.
    pub id: Option<CheckpointId>,
    /// Whether the machine is a clone, with random numbers of its own.
    pub is_clone: bool,
    /// When its memory is read, and to where.
    pub memory: MemoryRestore,
}

/// When the memory of a restored machine is read, and to where. Records store the first
/// two as `false` and `true`, as in earlier versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryRestore {
    /// Before it runs.
    Eager,
    /// While it runs: it starts sooner, but damage is found only then and ends it.
    Lazy,
    /// Before it runs, to its home and to a part on each of these nodes: for machines
    /// larger than one node.
    Spanning(Vec<NodeName>),
}
