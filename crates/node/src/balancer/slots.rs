//! Tokens for moves: as many may be under way in the cluster as the policy allows.
//! Each is a key of the store, attached to the lease of the node that moves, so that a
//! dead node holds none for long.

use super::handle::NodeBalancer;
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use keel_store::{Compare, Txn};
use std::collections::HashSet;

/// A token; given back by [`give_back`].
#[derive(Debug)]
pub(super) struct Slot(u32);

/// Takes a free one; `None` if all are taken, or others were faster.
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
    // Not always the first: several nodes look at the same time.
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

/// Lets others have it. If that fails it is free when this node's lease ends, or when
/// it is given back by its next holder.
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
                tracing::warn!(%error, "a token for moves is not given back yet");
                tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            }
        }
    }
}
