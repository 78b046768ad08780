//! A role that one node has for all: the holder of `lease/ROLE`. The key is attached to the holder's
//! lease: if the holder fails, the role is free at the instant at which its machines need another
//! node to act. The others wait for that without asking the store meanwhile.
//!
//! An agent that has just started lets others go first when a role becomes free: it knows less of the
//! other nodes than they do, and what its role does may have to wait for that.
//!
//! Two nodes may believe for a moment that they hold a role, so what is done in it must be safe in
//! any case.

use keel_cluster::{MachineName, NodeName};
use keel_store::keys::Key;
use keel_store::{Change, Compare, LeaseId, Store, StoreError, Txn};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// How long an agent has just started.
pub(crate) const JUST_STARTED: Duration = Duration::from_secs(5);
/// How long others have to take a role before an agent that has just started does.
const OTHERS_FIRST: Duration = Duration::from_millis(300);
/// Pause after a failed store access.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// Whether this node has a role. Clones know the same.
#[derive(Debug, Clone)]
pub(crate) struct Role {
    held: watch::Receiver<bool>,
}

impl Role {
    /// Seeks the role `name`, a valid name, until the process ends. `lease` is this node's,
    /// `started` the time at which its agent started.
    pub(crate) fn seek(
        name: &'static str,
        store: Arc<dyn Store>,
        node: NodeName,
        lease: watch::Receiver<Option<LeaseId>>,
        started: Instant,
    ) -> Self {
        let (held, is_held) = watch::channel(false);
        tokio::spawn(seek(name, store, node, lease, started, held));
        Self { held: is_held }
    }

    pub(crate) fn is_held(&self) -> bool {
        *self.held.borrow()
    }

    /// Waits for the next change of [`Role::is_held`].
    pub(crate) async fn changed(&mut self) {
        if self.held.changed().await.is_err() {
            // The process ends.
            std::future::pending().await
        }
    }
}

async fn seek(
    name: &'static str,
    store: Arc<dyn Store>,
    node: NodeName,
    mut lease: watch::Receiver<Option<LeaseId>>,
    started: Instant,
    held: watch::Sender<bool>,
) {
    let Ok(role) = MachineName::new(name) else {
        tracing::error!(name, "not a valid name of a role");
        return;
    };
    let key = Key::Lease(role);
    loop {
        let own = *lease.borrow_and_update();
        let wait = async {
            let Some(own) = own else {
                return std::future::pending().await;
            };
            match take(&*store, &key, &node, own).await {
                Ok(true) => {
                    tracing::info!(role = name, "this node has the role");
                    held.send_replace(true);
                    std::future::pending().await
                }
                Ok(false) => {
                    let freed = until_free(&*store, &key.to_string()).await;
                    if started.elapsed() < JUST_STARTED {
                        tokio::time::sleep(OTHERS_FIRST).await;
                    }
                    freed
                }
                Err(error) => Err(error),
            }
        };
        let waited = tokio::select! {
            waited = wait => waited,
            changed = lease.changed() => match changed {
                Ok(()) => Ok(()),
                Err(_) => return,
            },
        };
        held.send_if_modified(std::mem::take);
        if let Err(error) = waited {
            tracing::debug!(role = name, %error, "cannot seek the role");
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }
}

/// Takes the role if nobody has it; whether this node has it now.
async fn take(
    store: &dyn Store,
    key: &Key,
    node: &NodeName,
    lease: LeaseId,
) -> Result<bool, StoreError> {
    let take = Txn::new()
        .when_absent(key.clone())
        .put_leased(key.clone(), node.as_str(), lease);
    // The answer to an earlier attempt may have been lost.
    let has = Txn::new().when(Compare::Attached {
        key: key.to_string(),
        lease,
    });
    for txn in [take, has] {
        if store.txn(txn).await?.is_committed() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Waits until nobody has the role.
async fn until_free(store: &dyn Store, key: &str) -> Result<(), StoreError> {
    let listing = store.list(key).await?;
    if !listing.entries.iter().any(|entry| entry.key == key) {
        return Ok(());
    }
    let mut watch = store.watch(key, listing.revision + 1).await?;
    while let Some(changes) = watch.next().await {
        let is_free =
            |change: &Change| matches!(change, Change::Delete { key: gone } if gone == key);
        if changes?.changes.iter().any(is_free) {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_store::RaftStore;

    async fn until(role: &mut Role, held: bool) {
        let limit = Duration::from_secs(30);
        let waiting = async {
            while role.is_held() != held {
                role.changed().await;
            }
        };
        tokio::time::timeout(limit, waiting).await.expect("in time");
    }

    /// Seeks the role `care` with a lease of its own, by an agent that started then.
    async fn seek_since(
        store: &Arc<dyn Store>,
        name: &str,
        started: Instant,
    ) -> (LeaseId, watch::Sender<Option<LeaseId>>, Role) {
        let lease = store.lease_grant(60_000).await.unwrap();
        let (own, of_node) = watch::channel(Some(lease));
        let node = NodeName::new(name).unwrap();
        let role = Role::seek("care", store.clone(), node, of_node, started);
        (lease, own, role)
    }

    #[tokio::test]
    async fn an_agent_that_has_just_started_lets_others_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let store = RaftStore::open_alone(folder.path()).await.unwrap();
        let store: Arc<dyn Store> = Arc::new(store);
        let now = Instant::now();
        let long_ago = now.checked_sub(JUST_STARTED).expect("the host runs longer");
        // Nobody has the role: it takes it at once, as there may be no others.
        let (mut holder, mut _own, mut role) = seek_since(&store, "n0", now).await;
        until(&mut role, true).await;
        // Later its lease ends while one that has just started waits, and then an older one.
        for round in 1..=8 {
            let young = seek_since(&store, &format!("young{round}"), Instant::now()).await;
            let (lease, own, mut role) = seek_since(&store, &format!("old{round}"), long_ago).await;
            // (Both have begun to follow the key.)
            tokio::time::sleep(Duration::from_millis(50)).await;
            store.lease_revoke(holder).await.unwrap();
            until(&mut role, true).await;
            assert!(!young.2.is_held());
            store.lease_revoke(young.0).await.unwrap();
            young.1.send_replace(None);
            (holder, _own) = (lease, own);
        }
        // Where there is none, the young one has it a moment later.
        let (_, _its_own, mut young) = seek_since(&store, "last", Instant::now()).await;
        store.lease_revoke(holder).await.unwrap();
        until(&mut young, true).await;
    }

    #[tokio::test]
    async fn one_node_has_a_role_and_the_next_one_takes_it_when_it_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let store = RaftStore::open_alone(folder.path()).await.unwrap();
        let store: Arc<dyn Store> = Arc::new(store);
        let seek = async |name: &str| seek_since(&store, name, Instant::now()).await;
        let (first_lease, first_own, mut first) = seek("a").await;
        until(&mut first, true).await;
        let (second_lease, second_own, mut second) = seek("b").await;
        assert!(!second.is_held());
        // The first node fails: its lease ends, and it gets to know.
        store.lease_revoke(first_lease).await.unwrap();
        until(&mut second, true).await;
        first_own.send_replace(None);
        until(&mut first, false).await;
        // A node whose lease is another one now seeks the role anew.
        let again = store.lease_grant(60_000).await.unwrap();
        first_own.send_replace(Some(again));
        second_own.send_replace(None);
        until(&mut second, false).await;
        assert!(!first.is_held());
        store.lease_revoke(second_lease).await.unwrap();
        until(&mut first, true).await;
        let key = store.get("lease/care").await.unwrap().unwrap();
        assert_eq!((key.value, key.lease), (b"a".to_vec(), Some(again)));
    }
}
