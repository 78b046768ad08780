//! What QEMU says of a migration.

use crate::vm::Vm;
use keel_machine::worker::MoveError;
use serde::Deserialize;

/// The status of a migration that waits, with the guest stopped, until it may send the devices.
pub(crate) const SWITCHOVER: &str = "pre-switchover";

/// The status of a migration whose guest may run at the target, and whose memory follows it.
pub(crate) const FOLLOWS: &str = "postcopy-active";

/// The status of one that has lost its connection then.
pub(crate) const INTERRUPTED: &str = "postcopy-paused";

/// How the statuses begin of one that is about to go on after that.
pub(crate) const RECOVERY: &str = "postcopy-recover";

/// Statuses from which on it is known what the guest writes.
pub(crate) const BEGUN: [&str; 6] = [
    "active",
    SWITCHOVER,
    "device",
    "completed",
    "failed",
    "cancelled",
];

/// Statuses in which a migration has ended.
pub(crate) const ENDED: [&str; 3] = ["completed", "failed", "cancelled"];

/// What QEMU says of a migration.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Info {
    #[serde(default)]
    pub(crate) status: String,
    #[serde(rename = "error-desc")]
    pub(crate) error: Option<String>,
    #[serde(default)]
    pub(crate) ram: Ram,
}

/// The memory's part.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
pub(crate) struct Ram {
    /// Bytes sent.
    pub(crate) transferred: u64,
    /// Bytes that are known to be left.
    pub(crate) remaining: u64,
    /// Bytes of all of it.
    #[serde(default)]
    pub(crate) total: u64,
    /// Bytes that were sent after the guest.
    #[serde(default, rename = "postcopy-bytes")]
    pub(crate) followed: u64,
    /// Pages for which the guest had to wait.
    #[serde(default, rename = "postcopy-requests")]
    pub(crate) requests: u64,
    /// How often the pages that were written meanwhile were looked up.
    #[serde(rename = "dirty-sync-count")]
    pub(crate) rounds: u64,
}

impl Info {
    /// Whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        ENDED.contains(&self.status.as_str())
    }

    /// # Errors
    /// If it has ended without success.
    pub(crate) fn check(&self) -> Result<(), MoveError> {
        if !self.has_ended() || self.status == "completed" {
            return Ok(());
        }
        let reason = self.error.as_deref().unwrap_or("no reason");
        Err(format!("QEMU's migration has {}: {reason}", self.status).into())
    }
}

/// # Errors
/// If the last migration of a guest has ended without success.
pub(crate) fn check(vm: &Vm) -> Result<(), MoveError> {
    let info: Info = vm.qmp()?.query("query-migrate")?;
    info.check()
}
