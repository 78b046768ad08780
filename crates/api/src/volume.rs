//! Volumes: those of machines and of the cluster, and requests about the files in them. The content
//! of files is transferred as bytes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A volume for a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum VolumeRequest {
    /// A directory of the host, which every node that runs the machine sees.
    Host {
        /// Absolute path on the host.
        host: String,
        /// Its name for the guest.
        guest: String,
        /// Whether the guest may only read.
        #[serde(default)]
        read_only: bool,
    },
    /// The machine's own, which moves and ends with it.
    Tmp {
        /// The most bytes of its files.
        bytes: u64,
        /// The most files, directories and links; by default the usual number for its size.
        #[serde(default)]
        inodes: Option<u64>,
        /// Its name for the guest.
        guest: String,
    },
    /// One of the cluster's, which outlives the machine. It has one holder at a time.
    Cluster {
        /// Its name in the cluster.
        name: String,
        /// Its name for the guest.
        guest: String,
        /// Whether the guest may only read.
        #[serde(default)]
        read_only: bool,
    },
}

/// A volume of the cluster to create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreateRequest {
    /// Its name.
    pub name: String,
    /// Its place: a directory that all nodes see, or `s3://bucket/prefix`.
    pub at: String,
    /// The most bytes of its files.
    pub bytes: u64,
    /// The most files, directories and links; by default the usual number for its size.
    #[serde(default)]
    pub inodes: Option<u64>,
}

/// A volume of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterVolumeInfo {
    /// Its name.
    pub name: String,
    /// Its place.
    pub at: String,
    /// The most bytes of its files.
    pub bytes_max: u64,
    /// The most files, directories and links.
    pub inodes_max: u64,
    /// The machine that holds it.
    pub machine: Option<String>,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// Whether it is being removed.
    pub removing: bool,
    /// The content of its place, if it was requested and can be read.
    pub content: Option<VolumeContent>,
    /// Why its content cannot be read.
    pub damage: Option<String>,
}

/// The stored content of a volume of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeContent {
    /// Bytes of its files.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
    /// Number of the last segment of its log.
    pub segment: u64,
    /// Epoch of the writer of that segment.
    pub writer: String,
    /// Time of that segment, in milliseconds since 1970-01-01 UTC.
    pub written_unix_ms: u64,
    /// Snapshots kept for checkpoints: MACHINE.CHECKPOINT.
    pub snapshots: Vec<String>,
}

/// A machine's volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeInfo {
    /// Its name for the guest.
    pub guest: String,
    /// `tmp`, `cluster:NAME`, or the path on the host.
    pub kind: String,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// The most bytes of its files.
    pub bytes_max: Option<u64>,
    /// Present bytes of its files; only while it runs.
    pub bytes: Option<u64>,
    /// Files, directories and links; only while it runs.
    pub inodes: Option<u64>,
}

/// What is at a path of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileStat {
    /// Its size.
    pub bytes: u64,
    /// Whether it is a directory.
    pub directory: bool,
}

/// Another name for a file in a machine's volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameRequest {
    /// Its path for the guest.
    pub from: String,
    /// Its new one, in the same volume; a file that has it is replaced.
    pub to: String,
}
