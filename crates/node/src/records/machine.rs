//! Machines, schedules, nodes and reservations in the store: reads, and transactions that change
//! them.

use crate::error::CommandError;
use keel_cluster::{Epoch, MachineName, NodeName, members};
use keel_machine::kind::{Features, KindName};
use keel_machine::moves::ownership::EpochBase;
pub(crate) use keel_machine::moves::ownership::{self, VersionedRecord};
use keel_machine::spec::{Record, Status};
use keel_store::Store;
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use keel_store::{KeyValue, Txn, TxnOutcome};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// Attempts at a change that loses against concurrent ones.
const ATTEMPTS_MAX: u32 = 16;
/// How long the record of an arrived machine may take to show that it runs.
const SETTLE_PATIENCE: Duration = Duration::from_secs(5);
/// Interval of polling until then.
const SETTLE_EVERY: Duration = Duration::from_millis(5);

/// A node's own record, at `node/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeRecord {
    pub(crate) address: String,
    pub(crate) cpus: u32,
    pub(crate) memory_bytes: u64,
    /// CPU features that compiled code may use.
    pub(crate) features: Vec<String>,
    pub(crate) lacks: Vec<String>,
    /// The kinds of machines that its host executes, each with how; none until that is known.
    #[serde(default)]
    pub(crate) kinds: Vec<String>,
    /// The names of these kinds; `None` until that is known, and from agents that do not say it.
    #[serde(default)]
    pub(crate) executes: Option<BTreeSet<KindName>>,
    /// What its host offers to machines of these kinds, where hosts differ.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) offers: BTreeMap<KindName, Features>,
    pub(crate) version: String,
}

/// A reservation for a machine, at `reservation/NODE/MACHINE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reservation {
    pub(crate) source: NodeName,
    pub(crate) bytes: u64,
}

/// Why a record could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("there is no machine {0:?} (see `keel ps`)")]
    NoMachine(String),
    #[error("{0}")]
    Damaged(String),
    #[error("machine {0:?} is being changed concurrently; try again")]
    Contended(String),
    #[error("{0}")]
    Refused(String),
}

impl From<RecordError> for CommandError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::NoMachine(_) => CommandError::NotFound(error.to_string()),
            RecordError::Contended(_) | RecordError::Refused(_) => {
                CommandError::Conflict(error.to_string())
            }
            RecordError::Store(_) | RecordError::Damaged(_) => {
                CommandError::Unavailable(error.to_string())
            }
        }
    }
}

fn found(entry: &KeyValue) -> Result<VersionedRecord, RecordError> {
    VersionedRecord::read(entry).map_err(RecordError::Damaged)
}

pub(crate) async fn get(
    store: &dyn Store,
    machine: &MachineName,
) -> Result<VersionedRecord, RecordError> {
    let key = Key::Machine(machine.clone()).to_string();
    match store.get(&key).await? {
        Some(entry) => found(&entry),
        None => Err(RecordError::NoMachine(machine.to_string())),
    }
}

/// A machine's record, once the end of its last move is recorded. The node that moved it knows
/// earlier than the store that it runs, and the user's next command must not be refused for that.
pub(crate) async fn settled(
    store: &dyn Store,
    machine: &MachineName,
) -> Result<VersionedRecord, RecordError> {
    let deadline = Instant::now() + SETTLE_PATIENCE;
    loop {
        let found = get(store, machine).await?;
        let arriving = matches!(found.record.status, Status::Arriving { .. });
        if !arriving || Instant::now() > deadline {
            return Ok(found);
        }
        tokio::time::sleep(SETTLE_EVERY).await;
    }
}

/// All machines, by name. A damaged record is skipped and logged.
pub(crate) async fn all(store: &dyn Store) -> Result<Vec<Record>, RecordError> {
    let listing = store.list(keys::MACHINES).await?;
    Ok(listing
        .entries
        .iter()
        .filter_map(|entry| match found(entry) {
            Ok(found) => Some(found.record),
            Err(error) => {
                tracing::error!(key = entry.key, %error);
                None
            }
        })
        .collect())
}

/// All machines.
///
/// # Errors
/// [`RecordError`], also if one record is damaged.
pub(crate) async fn all_or_none(store: &dyn Store) -> Result<Vec<Record>, RecordError> {
    let listing = store.list(keys::MACHINES).await?;
    let records = listing.entries.iter();
    records
        .map(|entry| found(entry).map(|it| it.record))
        .collect()
}

pub(crate) fn encode(record: &Record) -> Result<Vec<u8>, RecordError> {
    record.encode().map_err(RecordError::Damaged)
}

/// Changes a record, together with the operations that `more` adds to the transaction; retries on
/// conflicts. `change` returns false to leave the record as it is. It may run again after a change
/// that succeeded, with a lost answer, and was followed by other changes: the record must show
/// what must not be repeated.
pub(crate) async fn update(
    store: &dyn Store,
    machine: &MachineName,
    mut change: impl FnMut(&mut Record) -> bool,
    more: impl Fn(Txn, &Record) -> Txn,
) -> Result<Record, RecordError> {
    let key = Key::Machine(machine.clone()).to_string();
    let mut unknown = None;
    for _ in 0..ATTEMPTS_MAX {
        let VersionedRecord {
            mut record,
            revision,
        } = get(store, machine).await?;
        if unknown.take().as_ref() == Some(&record) {
            return Ok(record);
        }
        if !change(&mut record) {
            return Ok(record);
        }
        let txn = Txn::new()
            .when_modified_at(key.clone(), revision)
            .put(key.clone(), encode(&record)?);
        match store.txn(more(txn, &record)).await {
            Ok(TxnOutcome::Committed { .. }) => return Ok(record),
            Ok(TxnOutcome::Refused { .. }) => {}
            // It may have succeeded. If so, the record equals what was written, unless it was
            // changed again.
            Err(StoreError::Unknown { .. }) => unknown = Some(record),
            Err(error) => return Err(error.into()),
        }
    }
    Err(RecordError::Contended(machine.to_string()))
}

/// Prepares the first epoch of a new machine: its value, with one condition and at most one write
/// for the transaction that creates the machine. The counter starts at the revision of that
/// transaction ([`keel_machine::moves::ownership`]).
pub(crate) async fn first_epoch(
    store: &dyn Store,
    record: &mut Record,
    ran: Option<Epoch>,
    txn: Txn,
) -> Result<Txn, RecordError> {
    let key = Key::EpochBase.to_string();
    let (entry, base) = epoch_base(store).await?;
    let needed = match ran {
        Some(ran) => base.above(ran, store.revision().await?),
        None => base,
    };
    record.epoch = needed.epoch();
    let txn = match &entry {
        Some(entry) => txn.when_modified_at(key.clone(), entry.modified),
        None => txn.when_absent(key.clone()),
    };
    if needed == base {
        return Ok(txn);
    }
    let value = keel_store::encoding::encode("the base of epochs", &needed)
        .map_err(|error| RecordError::Damaged(error.to_string()))?;
    Ok(txn.put(key, value))
}

async fn epoch_base(store: &dyn Store) -> Result<(Option<KeyValue>, EpochBase), RecordError> {
    let (_, incarnation) = members::cluster_of(store)
        .await
        .map_err(|error| RecordError::Refused(error.to_string()))?;
    let entry = store.get(&Key::EpochBase.to_string()).await?;
    let base = match &entry {
        Some(entry) => keel_store::encoding::decode("the base of epochs", &entry.value)
            .map_err(|error| RecordError::Damaged(error.to_string()))?,
        None => EpochBase::default(),
    };
    Ok((entry, base.at_least(incarnation)))
}

/// An epoch not lower than any that a machine of this cluster has had.
pub(crate) async fn epochs_so_far(store: &dyn Store) -> Result<Epoch, RecordError> {
    let (_, base) = epoch_base(store).await?;
    Ok(ownership::created_at(base.epoch(), store.revision().await?))
}

/// Names of the machines in a node's schedule.
pub(crate) async fn schedule(
    store: &dyn Store,
    node: &NodeName,
) -> Result<Vec<MachineName>, StoreError> {
    let listing = store.list(&keys::schedule_of(node)).await?;
    Ok(listing
        .entries
        .iter()
        .filter_map(|entry| match entry.key.parse() {
            Ok(Key::Schedule(_, machine)) => Some(machine),
            _ => None,
        })
        .collect())
}

/// All nodes' own records, by name.
pub(crate) async fn nodes(store: &dyn Store) -> Result<Vec<(NodeName, NodeRecord)>, StoreError> {
    let listing = store.list(keys::NODES).await?;
    Ok(listing
        .entries
        .iter()
        .filter_map(|entry| match entry.key.parse() {
            Ok(Key::Node(node)) => {
                let record = keel_store::encoding::decode("a node's record", &entry.value).ok()?;
                Some((node, record))
            }
            _ => None,
        })
        .collect())
}

/// Nodes that renew their lease.
pub(crate) async fn alive(store: &dyn Store) -> Result<Vec<NodeName>, StoreError> {
    let listing = store.list(keys::ALIVE).await?;
    Ok(listing
        .entries
        .iter()
        .filter_map(|entry| match entry.key.parse() {
            Ok(Key::Alive(node)) => Some(node),
            _ => None,
        })
        .collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use keel_cluster::Epoch;
    use keel_machine::kind::KindSpec;
    use keel_machine::restart_policy::Restart;
    use keel_machine::spec::{Balancing, Spec};
    use keel_store::RaftStore;
    use std::sync::Arc;

    /// A running one.
    pub(crate) fn record(name: MachineName, owner: NodeName) -> Record {
        Record {
            name,
            owner,
            spec: Spec {
                kind: "wasm".parse().unwrap(),
                kind_spec: KindSpec::default(),
                volumes: Vec::new(),
                memory_bytes: 1 << 20,
                cpu_limit_millis: None,
                output_bytes_per_s: 1 << 20,
                remove_at_end: false,
                restart: Restart::No,
                checkpoints: None,
                ha: None,
                balancing: Balancing::default(),
            },
            epoch: Epoch::default(),
            incarnation: 0,
            status: Status::Running,
            since_unix_ms: 0,
            started_unix_ms: 0,
            stop_wanted: false,
            restarts: 0,
            failovers: 0,
            left_elsewhere: false,
            created_unix_ms: 0,
            paused: None,
            origin: None,
            reports: Vec::new(),
        }
    }

    /// After a move, a user may send the next command before the new node has recorded that the
    /// machine runs.
    #[tokio::test]
    async fn what_has_just_come_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("store");
        let store = Arc::new(RaftStore::open_alone(&file).await.unwrap());
        let name: MachineName = "m".parse().unwrap();
        let key = Key::Machine(name.clone());
        let write = |record: Record| {
            let txn = Txn::new().put(key.clone(), encode(&record).unwrap());
            let store = store.clone();
            async move { store.txn(txn).await.unwrap() }
        };
        assert!(matches!(
            settled(&*store, &name).await,
            Err(RecordError::NoMachine(_))
        ));
        let runs = record(name.clone(), "b".parse().unwrap());
        let from = "a".parse().unwrap();
        write(Record {
            status: Status::Arriving { from },
            ..runs.clone()
        })
        .await;
        let asked = tokio::spawn({
            let (store, name) = (store.clone(), name.clone());
            async move { settled(&*store, &name).await }
        });
        tokio::time::sleep(SETTLE_EVERY * 4).await;
        assert!(!asked.is_finished(), "it was not waited for");
        write(runs).await;
        let found = asked.await.unwrap().unwrap();
        assert_eq!(found.record.status, Status::Running);
    }
}
