//! Tokens for nodes and users. Their verification is left to the node.

use serde::{Deserialize, Serialize};

/// A token to create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum TokenRequest {
    /// Lets one node join.
    Join {
        /// Seconds until it expires.
        ttl_s: u64,
    },
    /// Admits a user.
    User {
        /// Who it is for.
        name: String,
        /// `viewer`, `operator` or `admin`.
        role: String,
    },
}

/// A created token. It is shown once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The token.
    pub token: String,
    /// Fingerprint of the cluster's certificate authority, for checking the
    /// server.
    pub authority: String,
}
