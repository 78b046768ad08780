//! Images of disks that have a name in the cluster.

use keel_machine::kind::KindName;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A name for an image that was uploaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageRequest {
    /// The kind of the machines whose disks begin as a copy of it: `qemu`.
    #[schema(value_type = String)]
    pub kind: KindName,
    /// Its hash (BLAKE3, hex).
    pub hash: String,
    /// Whether the name may have been that of another image. Machines that were made from that one
    /// keep it.
    #[serde(default)]
    pub replace: bool,
}

/// An image that has a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageInfo {
    /// Its name.
    pub name: String,
    /// Its hash (BLAKE3, hex).
    pub hash: String,
    /// Bytes of its file.
    pub file_bytes: u64,
    /// What the file is: `qcow2` or `raw`.
    pub format: String,
    /// Size of the disk in it, in bytes.
    pub disk_bytes: u64,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// The nodes that are to have a copy.
    pub keepers: Vec<ImageCopy>,
    /// The machines that need it.
    pub machines: Vec<String>,
}

/// A copy of an image, at one of the nodes that are to have one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageCopy {
    /// The node.
    pub node: String,
    /// Whether the node has it.
    pub is_there: bool,
    /// Why it has none so far, if that is known.
    pub problem: Option<String>,
}
