//! Each node publishes its code at `code/NODE`, and follows the others. The entries are hints: a
//! node that lost its cache corrects its entry a moment late, and then compiles.

use super::compilations::Code;
use super::nodes_with_code::CodeLocations;
use crate::context::Context;
use keel_store::StoreError;
use keel_store::encoding;
use keel_store::keys::{self, Key};
use keel_store::{Change, Txn};
use std::sync::Arc;
use std::time::Duration;

/// Pause before the store is accessed again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Programs that become ready within this time are written together.
const WRITE_EVERY: Duration = Duration::from_millis(200);

/// Publishes the ready programs at each change.
pub(super) async fn publish(context: Arc<Context>, code: Arc<Code>) {
    let mut changes = code.ready.subscribe();
    loop {
        changes.mark_unchanged();
        if let Err(error) = write(&context, &code).await {
            tracing::debug!(%error, "cannot publish the code of this node yet");
            tokio::time::sleep(RETRY_AFTER).await;
            continue;
        }
        if changes.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(WRITE_EVERY).await;
    }
}

async fn write(context: &Context, code: &Code) -> Result<(), String> {
    let ready = code.inner().ready.clone();
    let value = encoding::encode("a node's code", &ready).map_err(|error| error.to_string())?;
    let txn = Txn::new().put(Key::Code(context.name.clone()), value);
    context
        .store
        .txn(txn)
        .await
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Follows the code of all nodes, until the agent ends.
pub(super) async fn follow(context: Arc<Context>, code: Arc<Code>) {
    loop {
        if let Err(error) = follow_once(&context, &code.locations).await {
            tracing::debug!(%error, "cannot follow the code of other nodes, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_once(context: &Context, locations: &CodeLocations) -> Result<(), StoreError> {
    let listing = context.store.list(keys::CODE).await?;
    locations.table().clear();
    for entry in &listing.entries {
        locations.take(entry);
    }
    let mut watch = context
        .store
        .watch(keys::CODE, listing.revision + 1)
        .await?;
    while let Some(changes) = watch.next().await {
        for change in changes?.changes {
            match change {
                Change::Put(entry) => locations.take(&entry),
                Change::Delete { key } => {
                    if let Ok(Key::Code(node)) = key.parse() {
                        locations.table().remove(&node);
                    }
                }
            }
        }
    }
    Ok(())
}
