//! Keeps this node alive in the store: a lease with the key `alive/NODE`,
//! renewed on a thread of its own, away from everything that may be busy.

use keel_cluster::keys::Key;
use keel_cluster::store::{LeaseId, Txn};
use keel_cluster::{NodeName, Store, StoreError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long a node counts as alive without a renewal.
const TTL_MS: u64 = 3_000;
/// How often it renews.
const RENEW_EVERY: Duration = Duration::from_millis(750);

/// Renews until the process ends. The receiver has the present lease, or
/// `None` while there is none.
pub(crate) fn keep(
    store: Arc<dyn Store>,
    node: NodeName,
) -> std::io::Result<watch::Receiver<Option<LeaseId>>> {
    let (current, receiver) = watch::channel(None);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::Builder::new()
        .name("lease".into())
        .spawn(move || {
            // Without the right to it, it renews at normal priority.
            let _ = rustix::process::nice(-5);
            runtime.block_on(renew_for_ever(&*store, &node, &current));
        })?;
    Ok(receiver)
}

async fn renew_for_ever(
    store: &dyn Store,
    node: &NodeName,
    current: &watch::Sender<Option<LeaseId>>,
) {
    loop {
        let lease = *current.borrow();
        let result = match lease {
            Some(lease) => store.lease_renew(lease).await.map(drop),
            None => match take(store, node).await {
                Ok(lease) => {
                    current.send_replace(Some(lease));
                    Ok(())
                }
                Err(error) => Err(error),
            },
        };
        match result {
            Ok(()) => {}
            Err(StoreError::NoSuchLease { .. }) => {
                current.send_replace(None);
                continue;
            }
            Err(error) => tracing::warn!(%error, "this node's lease was not renewed"),
        }
        tokio::time::sleep(RENEW_EVERY).await;
    }
}

async fn take(store: &dyn Store, node: &NodeName) -> Result<LeaseId, StoreError> {
    let lease = store.lease_grant(TTL_MS).await?;
    let txn = Txn::new().put_leased(Key::Alive(node.clone()), Vec::new(), lease);
    store.txn(txn).await?;
    Ok(lease)
}
