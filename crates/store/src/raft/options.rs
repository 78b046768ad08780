//! Sizes of a voter, and what it does where there is no store.

use super::types::Voter;

/// Sizes of a [`RaftStore`](super::RaftStore).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftOptions {
    /// Revisions kept for watches. Default 20,000.
    pub history_revisions_max: usize,
    /// Bytes of keys and values kept for watches. Default 64 MiB.
    pub history_bytes_max: usize,
    /// Bytes of keys and values in the store, which are all in memory too. The same at every
    /// voter. Default 1 GiB.
    pub store_bytes_max: u64,
    /// Entries of the log after which a snapshot is made, and up to half as many more. Default 5,000.
    pub snapshot_entries: u64,
}

impl Default for RaftOptions {
    fn default() -> Self {
        Self {
            history_revisions_max: 20_000,
            history_bytes_max: 64 << 20,
            store_bytes_max: 1 << 30,
            snapshot_entries: 5_000,
        }
    }
}

/// What to do where a folder has no store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IfAbsent {
    Refuse,
    /// Begin a store with this first voter.
    Found(Voter),
    /// Wait as the voter of this number until a leader fills the copy.
    Join(u64),
}
