//! The in-sync set of a machine with high availability, at `in-sync/MACHINE`: its checkpoint that
//! survives the loss of its node, and the nodes whose own folder has all of it; or, if its kind does
//! not restart from checkpoints, the nodes that can begin it anew. Only they can restart the machine
//! after that loss.
//!
//! As in-sync replicas elsewhere (Kafka's ISR; the configuration store of Vertical Paxos): the set
//! is changed by compare-and-swap only, by the machine's owner, and only to nodes that have the
//! checkpoint durably. An owner that was replaced meanwhile changes nothing.

use super::machine::{RecordError, get};
use crate::context::Context;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::checkpoint::CheckpointId;
use keel_store::encoding;
use keel_store::keys::{IN_SYNC, Key};
use keel_store::{Compare, Revision, Store, Txn, TxnOutcome};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Attempts at a change that loses against changes of the machine's record.
const ATTEMPTS_MAX: u32 = 8;

/// A checkpoint, and the nodes that have it; or the nodes that can begin a machine anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InSyncSet {
    /// None for a machine whose kind has none: its members can begin it anew.
    pub(crate) checkpoint: Option<CheckpointId>,
    /// The nodes whose folder has the checkpoint and all that it depends on; none if it is in a
    /// repository that all nodes reach.
    pub(crate) members: BTreeSet<NodeName>,
    /// The machine's memory then, in bytes.
    pub(crate) memory_bytes: u64,
    /// Its output that is held back until the set names a checkpoint that covers it.
    #[serde(default)]
    pub(crate) held_output: Option<HeldOutput>,
}

/// Output that no reader saw behind the checkpoint of a set: a life that begins with that
/// checkpoint may use its offsets again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HeldOutput {
    /// Where the output ended at the checkpoint.
    pub(crate) end: u64,
    /// When the life began that the checkpoint is of: copies of the output of another one may differ
    /// behind their checkpoints. Milliseconds since 1970-01-01 UTC.
    pub(crate) life_unix_ms: u64,
}

impl InSyncSet {
    /// The set, where readers may have seen output behind its checkpoint.
    pub(crate) fn without_held_output(&self) -> Self {
        InSyncSet {
            held_output: None,
            ..self.clone()
        }
    }
}

/// The value of a set in the store.
///
/// # Errors
/// [`RecordError::Damaged`], never in practice.
pub(crate) fn encode(set: &InSyncSet) -> Result<Vec<u8>, RecordError> {
    encoding::encode("an in-sync set", set).map_err(|error| RecordError::Damaged(error.to_string()))
}

/// A machine's set, with the revision that wrote it; `None` before its first checkpoint.
///
/// # Errors
/// [`RecordError`] if it cannot be read.
pub(crate) async fn in_sync_set(
    store: &dyn Store,
    machine: &MachineName,
) -> Result<Option<(InSyncSet, Revision)>, RecordError> {
    let key = Key::InSync(machine.clone()).to_string();
    let Some(entry) = store.get(&key).await? else {
        return Ok(None);
    };
    let set = encoding::decode("an in-sync set", &entry.value)
        .map_err(|error| RecordError::Damaged(error.to_string()))?;
    Ok(Some((set, entry.modified)))
}

/// The sets of all machines; those that cannot be read are left out.
///
/// # Errors
/// [`RecordError`] if the store does not answer.
pub(crate) async fn in_sync_sets(
    store: &dyn Store,
) -> Result<BTreeMap<MachineName, InSyncSet>, RecordError> {
    let entries = store.list(IN_SYNC).await?.entries.into_iter();
    let sets = entries.filter_map(|entry| {
        let Ok(Key::InSync(machine)) = entry.key.parse() else {
            return None;
        };
        let set = encoding::decode("an in-sync set", &entry.value);
        let set = set.inspect_err(|error| tracing::error!(%machine, %error, "it counts as none"));
        Some((machine, set.ok()?))
    });
    Ok(sets.collect())
}

/// Replaces the set that was written at `before`, for the life of a machine that runs here under
/// `epoch`.
///
/// # Errors
/// [`RecordError::Refused`] if the machine is not this node's any more, or runs under another
/// epoch; [`RecordError::Contended`] if another change was first.
pub(crate) async fn replace_in_sync_set(
    context: &Context,
    machine: &MachineName,
    epoch: Epoch,
    before: Option<Revision>,
    set: &InSyncSet,
) -> Result<(), RecordError> {
    let key = Key::InSync(machine.clone()).to_string();
    for _ in 0..ATTEMPTS_MAX {
        let found = get(&*context.store, machine).await?;
        if found.record.owner != context.name || found.record.epoch != epoch {
            return Err(RecordError::Refused(format!(
                "machine {machine:?} does not run here under epoch {epoch} any more"
            )));
        }
        // A checkpoint that was made before a change of the spec says nothing of readers after it.
        let ha = found.record.spec.ha.as_ref();
        let set = match ha.is_some_and(|ha| ha.protects_output()) {
            true => set.clone(),
            false => set.without_held_output(),
        };
        let value = encode(&set)?;
        let unchanged = match before {
            Some(revision) => Compare::ModifiedAt {
                key: key.clone(),
                revision,
            },
            None => Compare::Absent { key: key.clone() },
        };
        let txn = Txn::new()
            .when(unchanged)
            .when_modified_at(Key::Machine(machine.clone()), found.revision)
            .put(key.clone(), value);
        match context.store.txn(txn).await? {
            TxnOutcome::Committed { .. } => return Ok(()),
            TxnOutcome::Refused { failed: 0, .. } => {
                return Err(RecordError::Contended(machine.to_string()));
            }
            // Something else of the record changed.
            TxnOutcome::Refused { .. } => {}
        }
    }
    Err(RecordError::Contended(machine.to_string()))
}
