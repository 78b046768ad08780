//! Which checkpoints of a machine are kept.

use super::id::CheckpointId;
use serde::{Deserialize, Serialize};

/// Which of a machine's checkpoints are kept: those selected by any of these criteria,
/// and always the newest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = CheckpointRetention)]
pub struct Retention {
    /// The number of newest ones to keep.
    pub newest: Option<u32>,
    /// The maximum age of those to keep, in seconds.
    pub for_s: Option<u64>,
}

impl Retention {
    /// Whether all are kept.
    pub fn is_all(&self) -> bool {
        *self == Retention::default()
    }

    /// Whether a checkpoint is kept; `newer` is the number of newer ones of its machine.
    pub(super) fn keeps(&self, newer: u32, id: &CheckpointId, now_unix_ms: u64) -> bool {
        let young = self
            .for_s
            .is_some_and(|s| id.unix_ms().saturating_add(s.saturating_mul(1000)) >= now_unix_ms);
        newer == 0 || self.is_all() || young || self.newest.is_some_and(|newest| newer < newest)
    }
}
