//! Who makes a request.

use keel_cluster::tokens::Role;
use std::sync::Arc;

/// Whose a request is: added where it comes in, before any handler.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) role: Role,
    /// The name of the token, or `local`.
    pub(super) user: Arc<str>,
}
