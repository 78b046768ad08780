//! What the guest agent of a machine tells of the system in it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A system in a machine, as its guest agent tells, as far as it knows it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SystemInfo {
    /// Its host name.
    pub host_name: Option<String>,
    /// Its name and version, as `Debian GNU/Linux 12 (bookworm)`.
    pub name: Option<String>,
    /// The release of its kernel.
    pub kernel: Option<String>,
    /// Its network interfaces that others can reach.
    pub interfaces: Vec<InterfaceInfo>,
    /// Processes that run or wait for a processor or a disk, on average over 1, 5 and 15 minutes;
    /// empty if that is not known.
    pub load: Vec<f64>,
    /// What is mounted in it and has a size.
    pub file_systems: Vec<FileSystemInfo>,
}

/// A network interface of a system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InterfaceInfo {
    /// Its name.
    pub name: String,
    /// Its addresses, as `10.0.0.5/24`.
    pub addresses: Vec<String>,
}

/// A file system that is mounted in a system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileSystemInfo {
    /// The directory in the system at which it is mounted.
    pub mount_point: String,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Bytes that its users may use.
    pub total_bytes: u64,
}
