//! Tokens for moves: the policy limits the number of concurrent moves in the cluster. Each token
//! is a key of the store, attached to the lease of the node that moves, so that a dead node
//! releases its tokens soon.

use super::handle::NodeBalancer;
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use keel_store::{Compare, Txn};
use std::collections::HashSet;

/// A token; released by [`give_back`].
#[derive(Debug)]
pub(super) struct Slot(u32);

/// Takes a free token; `None` if all are taken, or concurrent requests won.
pub(super) async fn take(
    handle: &NodeBalancer,
    slots_max: u32,
) -> Result<Option<Slot>, StoreError> {
    let Some(lease) = *handle.context.lease.borrow() else {
        return Ok(None);
    };
    let listing = handle.context.store.list(keys::MOVE_SLOTS).await?;
    let taken: HashSet<u32> = listing
        .entries
        .iter()
        .filter_map(|entry| match entry.key.parse() {
            Ok(Key::MoveSlot(number)) => Some(number),
            _ => None,
        })
        .collect();
    let free: Vec<u32> = (0..slots_max).filter(|it| !taken.contains(it)).collect();
    if free.is_empty() {
        return Ok(None);
    }
    // A varying start, since several nodes search at the same time.
    let first = rand::random_range(0..free.len());
    for offset in 0..free.len().min(4) {
        let number = free[(first + offset) % free.len()];
        let key = Key::MoveSlot(number);
        let txn = Txn::new().when_absent(key.clone()).put_leased(
            key,
            handle.context.name.as_str(),
            lease,
        );
        if handle.context.store.txn(txn).await?.is_committed() {
            return Ok(Some(Slot(number)));
        }
    }
    Ok(None)
}

/// Releases a token. If this fails, it is released when this node's lease ends, or by its next
/// holder.
pub(super) async fn give_back(handle: &NodeBalancer, slot: Slot) {
    let key = Key::MoveSlot(slot.0).to_string();
    let txn = Txn::new()
        .when(Compare::Value {
            key: key.clone(),
            value: handle.context.name.as_str().into(),
        })
        .delete(key);
    for _ in 0..3 {
        match handle.context.store.txn(txn.clone()).await {
            Ok(_) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot release a token for moves yet");
                tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            }
        }
    }
}
