//! What is said of nodes beside their own reports: their failure domains, and that they are being
//! drained.

use keel_cluster::NodeName;
use keel_cluster::failover::zone_of;
use keel_store::Store;
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use std::collections::{BTreeMap, BTreeSet};

/// The failure domain of each node that has one.
///
/// # Errors
/// [`StoreError`] if the store does not answer.
pub(crate) async fn zones(store: &dyn Store) -> Result<BTreeMap<NodeName, String>, StoreError> {
    let listing = store.list(keys::NODE_LABELS).await?;
    let zones = listing.entries.iter().filter_map(|entry| {
        let Ok(Key::NodeLabels(node)) = entry.key.parse() else {
            return None;
        };
        Some((node, zone_of(&entry.value)?))
    });
    Ok(zones.collect())
}

/// The nodes that are being drained.
///
/// # Errors
/// [`StoreError`] if the store does not answer.
pub(crate) async fn draining(store: &dyn Store) -> Result<BTreeSet<NodeName>, StoreError> {
    let listing = store.list(keys::DRAINS).await?;
    let drained = listing
        .entries
        .iter()
        .filter_map(|entry| match entry.key.parse() {
            Ok(Key::Drain(node)) => Some(node),
            _ => None,
        });
    Ok(drained.collect())
}
