//! Who did what: the requests that change something.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How many entries of the audit log are answered if nothing is said.
pub const AUDIT_DEFAULT: usize = 1000;
/// The most entries that are kept.
pub const AUDIT_MAX: usize = 10_000;

/// A request that was to change something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// The store's revision that recorded it, before it was carried out: entries are in this order.
    pub revision: u64,
    /// Clock of the node that was asked, in milliseconds since 1970-01-01 UTC.
    pub at_unix_ms: u64,
    /// The name of the user's token; `local` for who asks at the node's own socket.
    pub user: String,
    /// The user's role.
    pub role: String,
    /// The node that was asked.
    pub node: String,
    /// Method and path of the request.
    pub request: String,
    /// What it names: machine, node, user and the like.
    pub about: String,
    /// Status of the answer; none if the node failed meanwhile.
    pub status: Option<u16>,
}
