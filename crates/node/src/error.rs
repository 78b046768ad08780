//! Errors of commands, as shown to users and as sent between agents.

use keel_store::StoreError;
use serde::{Deserialize, Serialize};

/// Why a command was not carried out; each variant has one HTTP status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum CommandError {
    /// The request is invalid in any state of the cluster (400).
    #[error("{0}")]
    Invalid(String),
    /// The named object does not exist (404).
    #[error("{0}")]
    NotFound(String),
    /// The present state does not allow it (409).
    #[error("{0}")]
    Conflict(String),
    /// A node, a process or the store does not answer (503).
    #[error("{0}")]
    Unavailable(String),
}

impl From<StoreError> for CommandError {
    fn from(error: StoreError) -> Self {
        CommandError::Unavailable(error.to_string())
    }
}
