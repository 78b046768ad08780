//! Images of disks that have a name in the cluster: their records in the store.

use keel_cluster::{MachineName, NodeName};
use keel_store::encoding::{self, WireError};
use keel_store::keys::{self, Key};
use keel_store::{KeyValue, Revision, Store, StoreError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const WHAT: &str = "the record of an image";

/// The record of a name in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    /// BLAKE3, hex.
    pub(super) hash: String,
    pub(super) file_bytes: u64,
    /// In the word of the machines' kind.
    pub(super) format: String,
    pub(super) disk_bytes: u64,
    /// The node that had it when it got its name.
    pub(super) first_on: NodeName,
    pub(super) created_unix_ms: u64,
}

/// All images that have a name, by it.
#[derive(Debug, Clone)]
pub(super) struct NamedImages {
    pub(super) images: BTreeMap<MachineName, ImageRecord>,
    /// The revision of the store that they are of.
    pub(super) revision: Revision,
}

/// # Errors
/// If it is damaged.
pub(super) fn record(entry: &KeyValue) -> Result<ImageRecord, String> {
    encoding::decode(WHAT, &entry.value).map_err(|error| format!("{}: {error}", entry.key))
}

/// All images that have a name. A damaged record is skipped and logged.
pub(super) async fn all(store: &dyn Store) -> Result<NamedImages, StoreError> {
    let listing = store.list(keys::IMAGES).await?;
    let mut images = BTreeMap::new();
    for entry in &listing.entries {
        match (entry.key.parse(), record(entry)) {
            (Ok(Key::Image(name)), Ok(record)) => _ = images.insert(name, record),
            (_, Err(error)) => tracing::error!(error),
            (_, Ok(_)) => {}
        }
    }
    Ok(NamedImages {
        images,
        revision: listing.revision,
    })
}

/// The hashes of all images that have a name.
///
/// # Errors
/// If the store does not answer, or one record is damaged.
pub(super) async fn all_hashes(store: &dyn Store) -> Result<Vec<(MachineName, String)>, String> {
    let listing = store.list(keys::IMAGES).await;
    let listing = listing.map_err(|error| error.to_string())?;
    let entries = listing.entries.iter();
    let hashes = entries.map(|entry| match entry.key.parse() {
        Ok(Key::Image(name)) => Ok((name, record(entry)?.hash)),
        _ => Err(format!("{:?} is no name of an image", entry.key)),
    });
    hashes.collect()
}

/// # Errors
/// [`WireError`]; none is known.
pub(super) fn encode(record: &ImageRecord) -> Result<Vec<u8>, WireError> {
    encoding::encode(WHAT, record)
}
