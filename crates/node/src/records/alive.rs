//! The nodes that are alive: a watch on the store.

use crate::context::Context;
use keel_cluster::NodeName;
use keel_store::Change;
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::watch;

/// Pause before the watch is restarted.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The nodes that renew their lease.
#[derive(Debug)]
pub(crate) struct AliveNodes(watch::Sender<BTreeSet<NodeName>>);

impl AliveNodes {
    pub(crate) fn new() -> Self {
        AliveNodes(watch::Sender::new(BTreeSet::new()))
    }

    /// The nodes that are alive now.
    pub(crate) fn now(&self) -> BTreeSet<NodeName> {
        self.0.borrow().clone()
    }

    /// Changes of the set.
    pub(crate) fn changes(&self) -> watch::Receiver<BTreeSet<NodeName>> {
        self.0.subscribe()
    }

    /// Follows the store until the agent ends.
    pub(crate) async fn follow(&self, context: &Context) {
        loop {
            if let Err(error) = self.follow_once(context).await {
                tracing::warn!(%error, "cannot follow which nodes are alive, trying again");
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    async fn follow_once(&self, context: &Context) -> Result<(), StoreError> {
        let node = |key: &str| match key.parse() {
            Ok(Key::Alive(node)) => Some(node),
            _ => None,
        };
        let listing = context.store.list(keys::ALIVE).await?;
        let entries = listing.entries.iter();
        self.0
            .send_replace(entries.filter_map(|entry| node(&entry.key)).collect());
        let from = listing.revision + 1;
        let mut watch = context.store.watch(keys::ALIVE, from).await?;
        while let Some(changes) = watch.next().await {
            for change in changes?.changes {
                let Some(node) = node(change.key()) else {
                    continue;
                };
                self.0.send_modify(|alive| {
                    match change {
                        Change::Put(_) => alive.insert(node),
                        Change::Delete { .. } => alive.remove(&node),
                    };
                });
            }
        }
        Ok(())
    }
}
