//! Tokens for nodes and users. Their verification is left to the node.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A token to create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
        /// Seconds until it expires; without it, it never does.
        #[serde(default)]
        ttl_s: Option<u64>,
    },
}

/// A created token. It is shown once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// The token.
    pub token: String,
    /// Fingerprint of the cluster's certificate authority, for checking the
    /// server.
    pub authority: String,
}

/// A token without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenInfo {
    /// Its number, by which it is removed.
    pub id: String,
    /// What it is for.
    pub of: TokenUseInfo,
    /// When it expires, in milliseconds since 1970-01-01 UTC.
    pub expires_unix_ms: Option<u64>,
}

/// What a token is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TokenUseInfo {
    /// A node that is to join.
    Join {
        /// The node that used it.
        used_by: Option<String>,
    },
    /// A user.
    User {
        /// Who it is for.
        name: String,
        /// `viewer`, `operator` or `admin`.
        role: String,
    },
}
