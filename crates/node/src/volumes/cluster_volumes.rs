//! The cluster's volumes: creates, lists and removes them, and records their holders.

use crate::context::Context;
use crate::error::CommandError;
use crate::records::RecordError;
use keel_api::{ClusterVolumeInfo, VolumeContent, VolumeCreateRequest};
use keel_cluster::MachineName;
use keel_machine::cluster_volume::{VOLUME_BYTES_MAX, VolumeError, VolumeStore};
use keel_machine::object_storage::ObjectStorage;
use keel_machine::spec::{Record, Spec, VolumeKind};
use keel_store::Store;
use keel_store::clock::unix_ms;
use keel_store::encoding;
use keel_store::keys::{self, Key};
use keel_store::{KeyValue, Revision, Txn, TxnOutcome};
use keel_wasi::volume::VolumeLimits;
use serde::{Deserialize, Serialize};
use std::time::Duration;

const WHAT: &str = "a volume's record";
const VOLUME_BYTES_MIN: u64 = 64 << 10;
/// How long a place may take to open, and to show the content of a volume.
const LOOK_PATIENCE: Duration = Duration::from_secs(30);

/// The record of a volume in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct VolumeEntry {
    /// Distinguishes it from other volumes that had its name.
    id: [u8; 16],
    place: String,
    bytes: u64,
    inodes: u64,
    holder: Option<MachineName>,
    /// Number of holders so far.
    holding: u64,
    created_unix_ms: u64,
    /// Its objects are being deleted.
    removing: bool,
}

fn entry(value: &KeyValue) -> Result<VolumeEntry, CommandError> {
    encoding::decode(WHAT, &value.value)
        .map_err(|error| CommandError::Unavailable(error.to_string()))
}

fn encode(entry: &VolumeEntry) -> Result<Vec<u8>, CommandError> {
    encoding::encode(WHAT, entry).map_err(|error| CommandError::Unavailable(error.to_string()))
}

fn volume_name(name: &str) -> Result<MachineName, CommandError> {
    MachineName::new(name).map_err(|error| CommandError::Invalid(format!("volume: {error}")))
}

async fn get(
    store: &dyn Store,
    name: &MachineName,
) -> Result<(VolumeEntry, Revision), CommandError> {
    match store.get(&Key::Volume(name.clone()).to_string()).await? {
        Some(found) => Ok((entry(&found)?, found.modified)),
        None => Err(CommandError::NotFound(format!(
            "there is no volume {name:?} (see `keel volume ls`; `keel volume create {name} --at PLACE` makes one)"
        ))),
    }
}

fn volume_error(error: VolumeError) -> CommandError {
    let text = error.to_string();
    match error {
        VolumeError::Location { .. } => CommandError::Invalid(text),
        VolumeError::Store { .. } | VolumeError::Contended { .. } => {
            CommandError::Unavailable(text)
        }
        VolumeError::Vanished { .. }
        | VolumeError::Damaged { .. }
        | VolumeError::Fenced { .. }
        | VolumeError::Exists { .. }
        | VolumeError::NoSnapshot { .. } => CommandError::Conflict(text),
    }
}

async fn open(
    name: &MachineName,
    id: [u8; 16],
    url: String,
    make: bool,
) -> Result<VolumeStore, CommandError> {
    let silent = silent(name, &url);
    let name = name.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let place = match make {
            true => ObjectStorage::create(&url),
            false => ObjectStorage::open(&url),
        };
        let place = place.map_err(|source| VolumeError::Location {
            volume: name.clone(),
            source,
        })?;
        Ok(VolumeStore::new(name, id, place))
    });
    let Ok(opened) = tokio::time::timeout(LOOK_PATIENCE, opened).await else {
        return Err(silent);
    };
    let opened = opened.map_err(|error| CommandError::Unavailable(error.to_string()))?;
    opened.map_err(volume_error)
}

fn silent(name: &MachineName, place: &str) -> CommandError {
    CommandError::Unavailable(format!("volume {name:?}: {place} does not answer"))
}

/// Creates a volume.
pub(crate) async fn create(
    context: &Context,
    request: VolumeCreateRequest,
) -> Result<ClusterVolumeInfo, CommandError> {
    let name = volume_name(&request.name)?;
    let bytes = request.bytes;
    if !(VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&bytes) {
        return Err(CommandError::Invalid(format!(
            "volume {name:?} of {bytes} bytes: 64 KiB to 64 GiB are possible"
        )));
    }
    let usual = VolumeLimits::of_bytes(bytes);
    let inodes = request.inodes.unwrap_or(usual.inodes_max);
    if !(1..=VolumeLimits::INODES_MAX).contains(&inodes) {
        return Err(CommandError::Invalid(format!(
            "volume {name:?} for {inodes} files: 1 to {} are possible",
            VolumeLimits::INODES_MAX
        )));
    }
    let key = Key::Volume(name.clone()).to_string();
    let taken = || {
        CommandError::Conflict(format!(
            "the name {name:?} is in use by another volume (see `keel volume ls`)"
        ))
    };
    if context.store.get(&key).await?.is_some() {
        return Err(taken());
    }
    let id: [u8; 16] = rand::random();
    let objects = open(&name, id, request.at.clone(), true).await?;
    let limits = VolumeLimits {
        bytes_max: bytes,
        inodes_max: inodes,
    };
    objects.create(limits).await.map_err(volume_error)?;
    let made = VolumeEntry {
        id,
        place: request.at,
        bytes,
        inodes,
        holder: None,
        holding: 0,
        created_unix_ms: unix_ms(),
        removing: false,
    };
    let txn = Txn::new().when_absent(key.clone()).put(key, encode(&made)?);
    let outcome = context.store.txn(txn).await;
    if let Ok(TxnOutcome::Committed { .. }) = outcome {
        return Ok(info(&name, &made));
    }
    if let Err(error @ keel_store::StoreError::Unknown { .. }) = outcome {
        return Err(CommandError::Unavailable(format!(
            "{error}; whether volume {name:?} was made is not known: see `keel volume ls`"
        )));
    }
    // No machine can hold it, so its objects are removed.
    objects.destroy().await.map_err(volume_error)?;
    outcome.map_err(CommandError::from)?;
    Err(taken())
}

fn info(name: &MachineName, entry: &VolumeEntry) -> ClusterVolumeInfo {
    ClusterVolumeInfo {
        name: name.to_string(),
        at: entry.place.clone(),
        bytes_max: entry.bytes,
        inodes_max: entry.inodes,
        machine: entry.holder.as_ref().map(ToString::to_string),
        created_unix_ms: entry.created_unix_ms,
        removing: entry.removing,
        content: None,
        damage: None,
    }
}

/// All volumes, by name.
pub(crate) async fn list(context: &Context) -> Result<Vec<ClusterVolumeInfo>, CommandError> {
    let listing = context.store.list(keys::VOLUMES).await?;
    let mut found = Vec::new();
    for value in &listing.entries {
        if let Ok(Key::Volume(name)) = value.key.parse() {
            found.push(info(&name, &entry(value)?));
        }
    }
    Ok(found)
}

/// A volume, with the content of its place.
pub(crate) async fn inspect(
    context: &Context,
    name: &str,
) -> Result<ClusterVolumeInfo, CommandError> {
    let name = volume_name(name)?;
    let (entry, _) = get(&*context.store, &name).await?;
    let mut info = info(&name, &entry);
    match look(&name, &entry).await {
        Ok(content) => info.content = Some(content),
        Err(error) => info.damage = Some(error.to_string()),
    }
    Ok(info)
}

/// The content of a volume's place.
async fn look(name: &MachineName, entry: &VolumeEntry) -> Result<VolumeContent, CommandError> {
    let looking = async {
        let objects = open(name, entry.id, entry.place.clone(), false).await?;
        objects.summary().await.map_err(volume_error)
    };
    let looked = tokio::time::timeout(LOOK_PATIENCE, looking).await;
    let summary = looked.unwrap_or_else(|_| Err(silent(name, &entry.place)))?;
    Ok(VolumeContent {
        bytes: summary.bytes,
        inodes: summary.inodes,
        segment: summary.head,
        writer: summary.writer.to_string(),
        written_unix_ms: summary.written_unix_ms,
        snapshots: summary.snapshots,
    })
}

/// Deletes the snapshots of checkpoints that are gone, in all volumes. A volume whose place does not
/// answer keeps them.
pub(crate) async fn delete_snapshots(
    context: &Context,
    snapshots: &[String],
) -> Result<(), CommandError> {
    let listing = context.store.list(keys::VOLUMES).await?;
    for value in &listing.entries {
        let Ok(Key::Volume(name)) = value.key.parse() else {
            continue;
        };
        let entry = entry(value)?;
        let deleting = async {
            let objects = open(&name, entry.id, entry.place.clone(), false).await?;
            let mut there = objects.snapshots().await.map_err(volume_error)?;
            there.retain(|snapshot| snapshots.contains(snapshot));
            let deleted = objects.delete_snapshots(&there).await;
            deleted.map_err(volume_error)
        };
        if let Err(error) = deleting.await {
            tracing::warn!(volume = %name, %error, "snapshots of deleted checkpoints stay");
        }
    }
    Ok(())
}

/// Removes a volume that no machine holds, with all its objects, or without them if `forget` is
/// set. A repeated command deletes the objects that could not be deleted before.
pub(crate) async fn remove(
    context: &Context,
    name: &str,
    forget: bool,
) -> Result<(), CommandError> {
    let name = volume_name(name)?;
    let (entry, marked) = mark_removing(&*context.store, &name).await?;
    if !forget {
        let deleted = async {
            let objects = open(&name, entry.id, entry.place.clone(), false).await?;
            objects.destroy().await.map_err(volume_error)
        };
        deleted.await.map_err(|error| {
            CommandError::Unavailable(format!(
                "{error}; nothing can be deleted there (`keel volume rm --forget {name}` leaves it as it is)"
            ))
        })?;
    }
    delete_entry(&*context.store, &name, &entry, marked).await
}

/// Marks a volume so that no machine gets it any more; returns the record and its revision.
/// Concurrent removals are possible.
async fn mark_removing(
    store: &dyn Store,
    name: &MachineName,
) -> Result<(VolumeEntry, Revision), CommandError> {
    let key = Key::Volume(name.clone()).to_string();
    let (mut entry, revision) = get(store, name).await?;
    if let Some(machine) = &entry.holder {
        return Err(in_use(name, machine));
    }
    if entry.removing {
        return Ok((entry, revision));
    }
    entry.removing = true;
    let mark = Txn::new()
        .when_modified_at(key.clone(), revision)
        .put(key, encode(&entry)?);
    match store.txn(mark).await? {
        TxnOutcome::Committed { revision } => Ok((entry, revision)),
        TxnOutcome::Refused { .. } => Err(changed(name)),
    }
}

/// Deletes the entry of a marked volume, but not of another one that has its name by now.
async fn delete_entry(
    store: &dyn Store,
    name: &MachineName,
    marked: &VolumeEntry,
    revision: Revision,
) -> Result<(), CommandError> {
    let key = Key::Volume(name.clone()).to_string();
    let delete = Txn::new()
        .when_modified_at(key.clone(), revision)
        .delete(key);
    let TxnOutcome::Refused { current, .. } = store.txn(delete).await? else {
        return Ok(());
    };
    match current {
        Some(found) if entry(&found)?.id == marked.id => Err(changed(name)),
        // A concurrent removal has deleted it.
        _ => Ok(()),
    }
}

fn changed(name: &MachineName) -> CommandError {
    CommandError::Conflict(format!(
        "volume {name:?} was just changed by others; try again"
    ))
}

fn in_use(name: &MachineName, machine: &MachineName) -> CommandError {
    CommandError::Conflict(format!(
        "volume {name:?} is in use by machine {machine:?}, and has one machine at a time (`keel rm {machine}` frees it once that has ended)"
    ))
}

/// Assigns volumes to a machine that is being created: fills in their places, and adds to the
/// transaction that creates it. The volumes are checked first.
pub(crate) async fn take(
    context: &Context,
    record: &mut Record,
    mut txn: Txn,
) -> Result<Txn, CommandError> {
    let machine = record.name.clone();
    let mut names: Vec<MachineName> = Vec::new();
    for volume in &mut record.spec.volumes {
        let VolumeKind::Cluster {
            name,
            id,
            place,
            bytes,
            inodes,
            holding,
        } = &mut volume.kind
        else {
            continue;
        };
        if names.contains(name) {
            return Err(CommandError::Invalid(format!(
                "volume {name:?} is given twice"
            )));
        }
        names.push(name.clone());
        let (mut entry, revision) = get(&*context.store, name).await?;
        if let Some(machine) = &entry.holder {
            return Err(in_use(name, machine));
        }
        if entry.removing {
            return Err(CommandError::Conflict(format!(
                "volume {name:?} is being removed (`keel volume rm {name}` continues that)"
            )));
        }
        // A checkpoint of a removed volume does not apply to its successor.
        if *id != [0; 16] && *id != entry.id {
            return Err(CommandError::Conflict(format!(
                "volume {name:?} is another one than that of the checkpoint, which was removed"
            )));
        }
        look(name, &entry).await?;
        entry.holder = Some(machine.clone());
        entry.holding += 1;
        (*id, *holding) = (entry.id, entry.holding);
        (*bytes, *inodes) = (entry.bytes, entry.inodes);
        place.clone_from(&entry.place);
        let key = Key::Volume(name.clone()).to_string();
        txn = txn
            .when_modified_at(key.clone(), revision)
            .put(key, encode(&entry)?);
    }
    Ok(txn)
}

/// Adds the release of a machine's volumes to the transaction that removes it.
pub(crate) async fn give_back(
    store: &dyn Store,
    machine: &MachineName,
    spec: &Spec,
    mut txn: Txn,
) -> Result<Txn, RecordError> {
    for (_, kind) in spec.cluster_volumes() {
        let VolumeKind::Cluster { name, .. } = kind else {
            continue;
        };
        let key = Key::Volume(name.clone()).to_string();
        let Some(found) = store.get(&key).await? else {
            continue;
        };
        let damaged = |error: CommandError| RecordError::Damaged(error.to_string());
        let mut entry = entry(&found).map_err(damaged)?;
        if entry.holder.as_ref() != Some(machine) {
            continue;
        }
        entry.holder = None;
        txn = txn
            .when_modified_at(key.clone(), found.modified)
            .put(key, encode(&entry).map_err(damaged)?);
    }
    Ok(txn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_store::RaftStore;

    async fn put(store: &dyn Store, name: &MachineName, id: u8) {
        let made = VolumeEntry {
            id: [id; 16],
            place: "/nowhere".into(),
            bytes: VOLUME_BYTES_MIN,
            inodes: 1,
            holder: None,
            holding: 0,
            created_unix_ms: 1,
            removing: false,
        };
        let key = Key::Volume(name.clone()).to_string();
        let txn = Txn::new()
            .when_absent(key.clone())
            .put(key, encode(&made).unwrap());
        let outcome = store.txn(txn).await.unwrap();
        assert!(matches!(outcome, TxnOutcome::Committed { .. }));
    }

    /// Two removals of the same volume: before the slower one ends, another volume has the name.
    #[tokio::test]
    async fn of_two_removals_the_slower_spares_the_next_volume() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("store");
        let store = RaftStore::open_alone(&file).await.unwrap();
        let name: MachineName = "data".parse().unwrap();
        put(&store, &name, 1).await;
        let (quick, quick_marked) = mark_removing(&store, &name).await.unwrap();
        let (slow, slow_marked) = mark_removing(&store, &name).await.unwrap();
        assert_eq!((&quick, quick_marked), (&slow, slow_marked));
        assert!(quick.removing);
        delete_entry(&store, &name, &quick, quick_marked)
            .await
            .unwrap();
        assert!(get(&store, &name).await.is_err());
        delete_entry(&store, &name, &slow, slow_marked)
            .await
            .unwrap();
        put(&store, &name, 2).await;
        delete_entry(&store, &name, &slow, slow_marked)
            .await
            .unwrap();
        let (next, _) = get(&store, &name).await.unwrap();
        assert_eq!((next.id, next.removing), ([2; 16], false));
        // The same one, changed in the meantime.
        let (entry, marked) = mark_removing(&store, &name).await.unwrap();
        let key = Key::Volume(name.clone()).to_string();
        let change = Txn::new().put(key, encode(&entry).unwrap());
        store.txn(change).await.unwrap();
        let error = delete_entry(&store, &name, &entry, marked).await;
        assert!(matches!(error, Err(CommandError::Conflict(_))));
    }
}
