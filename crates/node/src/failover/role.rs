//! The role of the node that carries out failovers.

use crate::context::Context;
use keel_cluster::MachineName;
use keel_store::StoreError;
use keel_store::keys::Key;
use keel_store::{Compare, LeaseId, Txn, TxnOutcome};

/// Its name in the store.
const ROLE: &str = "failover";

/// What this node knows of the role.
#[derive(Debug, Default)]
pub(super) struct Role {
    /// The lease with which this node took it.
    held_with: Option<LeaseId>,
}

impl Role {
    /// Takes the role if nobody has it. True if this node has it; another one may have it a moment
    /// later, so what is done must be safe in any case.
    pub(super) async fn take(&mut self, context: &Context) -> Result<bool, StoreError> {
        let Some(lease) = *context.lease.borrow() else {
            self.held_with = None;
            return Ok(false);
        };
        if self.held_with == Some(lease) {
            return Ok(true);
        }
        let Ok(role) = MachineName::new(ROLE) else {
            return Ok(false);
        };
        let key = Key::Lease(role);
        let name = context.name.as_str();
        let take = Txn::new()
            .when_absent(key.clone())
            .put_leased(key.clone(), name, lease);
        // The answer to an earlier attempt may have been lost.
        let has = Txn::new().when(Compare::Attached {
            key: key.to_string(),
            lease,
        });
        for txn in [take, has] {
            if matches!(context.store.txn(txn).await?, TxnOutcome::Committed { .. }) {
                self.held_with = Some(lease);
                tracing::info!("this node carries out failovers");
                return Ok(true);
            }
        }
        Ok(false)
    }
}
