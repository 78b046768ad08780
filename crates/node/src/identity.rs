//! This node's identity as it is now: its certificate is renewed, and the authorities that it trusts
//! are replaced, while the agent runs.

use keel_cluster::certificates::Authorities;
use keel_cluster::identity::{IdentityError, NodeIdentity};
use keel_net::{Fingerprint, ServerTls};
use keel_store::Revision;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use tokio::sync::watch;

/// The record of the authorities as this node knows it; `None` until it is known, the inner one if
/// the store has none.
pub(crate) type AuthoritiesRecord = Option<Option<(Authorities, Revision)>>;

/// An identity, and what follows from it.
struct State {
    identity: Arc<NodeIdentity>,
    server: ServerTls,
    issuer: Fingerprint,
}

impl State {
    fn new(identity: NodeIdentity) -> Result<Self, IdentityError> {
        Ok(Self {
            server: identity.server_tls()?,
            issuer: identity.issuer()?,
            identity: Arc::new(identity),
        })
    }
}

/// This node's identity.
pub(crate) struct OwnIdentity {
    state: RwLock<State>,
    record: watch::Sender<AuthoritiesRecord>,
}

impl OwnIdentity {
    /// # Errors
    /// [`IdentityError`] if it is not consistent.
    pub(crate) fn new(identity: NodeIdentity) -> Result<Self, IdentityError> {
        Ok(Self {
            state: RwLock::new(State::new(identity)?),
            record: watch::Sender::new(None),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn current(&self) -> Arc<NodeIdentity> {
        self.read().identity.clone()
    }

    /// The server's side of TLS for users of the API.
    pub(crate) fn server_tls(&self) -> ServerTls {
        self.read().server.clone()
    }

    /// The authority that signed its certificate.
    pub(crate) fn issuer(&self) -> Fingerprint {
        self.read().issuer
    }

    /// # Errors
    /// [`IdentityError`] if it is not consistent; the old one stays then.
    pub(crate) fn replace(&self, identity: NodeIdentity) -> Result<(), IdentityError> {
        let state = State::new(identity)?;
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
        Ok(())
    }

    /// Follows the record of the authorities.
    pub(crate) fn record(&self) -> watch::Receiver<AuthoritiesRecord> {
        self.record.subscribe()
    }

    pub(crate) fn set_record(&self, record: Option<(Authorities, Revision)>) {
        self.record.send_replace(Some(record));
    }
}
