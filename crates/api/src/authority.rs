//! The cluster's certificate authority.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The authorities that nodes trust, and the certificates of the nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuthorityInfo {
    /// One; while it is replaced the old one, then the new one.
    pub authorities: Vec<TrustedAuthority>,
    /// The nodes' certificates.
    pub nodes: Vec<CertificateInfo>,
    /// How long a new certificate of a node is valid, in seconds.
    pub lifetime_s: u64,
    /// Whether the authority is being replaced.
    pub is_rotating: bool,
}

/// An authority that nodes trust.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TrustedAuthority {
    /// Fingerprint of its certificate, in hex digits.
    pub fingerprint: String,
    /// Whether it signs new certificates.
    pub signs: bool,
    /// When its certificate ends, in milliseconds since 1970-01-01 UTC.
    pub ends_unix_ms: u64,
}

/// The certificate of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CertificateInfo {
    /// The node.
    pub node: String,
    /// Fingerprint of the authority that signed it; null if the node has not reported.
    pub authority: Option<String>,
    /// When it ends, in milliseconds since 1970-01-01 UTC.
    pub ends_unix_ms: Option<u64>,
    /// What the replacement of the authority waits for at this node.
    pub missing: Option<String>,
}

/// Changes of how certificates are signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthorityChange {
    /// How long certificates of nodes are valid, in seconds: a minute to ten years. Nodes renew
    /// theirs.
    pub lifetime_s: u64,
}
