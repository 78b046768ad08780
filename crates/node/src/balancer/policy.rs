//! The balancer's policy in the store.

use super::handle::NodeBalancer;
use keel_balance::policy::Policy;
use keel_balance::round::Event;
use keel_store::StoreError;
use keel_store::keys::Key;
use keel_store::{Change, KeyValue, Revision};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// Pause before the watch is restarted.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// The policy in the store, and its revision; the default one if none is set.
pub(super) fn policy_of(entry: Option<&KeyValue>) -> Result<(Policy, Revision), String> {
    let Some(entry) = entry else {
        return Ok((Policy::default(), 0));
    };
    let policy: Policy = serde_json::from_slice(&entry.value)
        .map_err(|error| format!("the balancer's policy in the store is damaged: {error}"))?;
    policy.check().map_err(|error| error.to_string())?;
    Ok((policy, entry.modified))
}

pub(super) async fn follow_policy(handle: Arc<NodeBalancer>, events: UnboundedSender<Event>) {
    let take = |entry: Option<&KeyValue>| match policy_of(entry) {
        Ok((policy, revision)) => {
            let _ = events.send(Event::Policy(Box::new(policy), revision));
        }
        // The earlier policy stays in force.
        Err(error) => tracing::error!(error),
    };
    while !events.is_closed() {
        let followed: Result<(), StoreError> = async {
            let prefix = Key::Policy.to_string();
            let listing = handle.context.store.list(&prefix).await?;
            take(listing.entries.first());
            let mut watch = handle
                .context
                .store
                .watch(&prefix, listing.revision + 1)
                .await?;
            while let Some(changes) = watch.next().await {
                for change in changes?.changes {
                    match change {
                        Change::Put(entry) => take(Some(&entry)),
                        Change::Delete { .. } => take(None),
                    }
                }
            }
            Ok(())
        }
        .await;
        if let Err(error) = followed {
            tracing::warn!(%error, "the balancer's policy cannot be followed, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}
