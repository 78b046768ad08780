//! Machines and nodes in the store: reading them, and the transactions that
//! change them.

use keel_cluster::keys::{self, Key};
use keel_cluster::store::{KeyValue, Revision, Txn, TxnOutcome};
use keel_cluster::{MachineName, NodeName, Store, StoreError};
use keel_machine::spec::Record;
use serde::{Deserialize, Serialize};

/// How often a change is tried again that another one got ahead of.
const ATTEMPTS_MAX: u32 = 16;

/// What a node says of itself, at `node/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeRecord {
    pub(crate) address: String,
    pub(crate) cpus: u32,
    pub(crate) memory_bytes: u64,
    /// CPU features that compiled code may use.
    pub(crate) features: Vec<String>,
    pub(crate) lacks: Vec<String>,
    pub(crate) version: String,
}

/// What a reservation for a machine says, at `reservation/NODE/MACHINE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reservation {
    pub(crate) source: NodeName,
    pub(crate) bytes: u64,
}

/// Why a record was not read or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("there is no machine {0:?} (see `keel ps`)")]
    NoMachine(String),
    #[error("{0}")]
    Damaged(String),
    #[error("machine {0:?} is being changed by others all the time; try again")]
    Contended(String),
    #[error("{0}")]
    Refused(String),
}

/// A record and the revision of its last change.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) record: Record,
    pub(crate) revision: Revision,
}

fn found(entry: &KeyValue) -> Result<Found, RecordError> {
    Ok(Found {
        record: Record::decode(&entry.value).map_err(RecordError::Damaged)?,
        revision: entry.modified,
    })
}

pub(crate) async fn get(store: &dyn Store, machine: &MachineName) -> Result<Found, RecordError> {
    let key = Key::Machine(machine.clone()).to_string();
    match store.get(&key).await? {
        Some(entry) => found(&entry),
        None => Err(RecordError::NoMachine(machine.to_string())),
    }
}

/// All machines, by name. A damaged record is left out and logged.
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

pub(crate) fn encode(record: &Record) -> Result<Vec<u8>, RecordError> {
    record.encode().map_err(RecordError::Damaged)
}

/// Changes a record, beside what `more` adds to the transaction; tries again
/// when others were faster. `change` answers false to leave it as it is.
pub(crate) async fn update(
    store: &dyn Store,
    machine: &MachineName,
    mut change: impl FnMut(&mut Record) -> bool,
    more: impl Fn(Txn, &Record) -> Txn,
) -> Result<Record, RecordError> {
    let key = Key::Machine(machine.clone()).to_string();
    for _ in 0..ATTEMPTS_MAX {
        let Found {
            mut record,
            revision,
        } = get(store, machine).await?;
        if !change(&mut record) {
            return Ok(record);
        }
        let txn = Txn::new()
            .when_modified_at(key.clone(), revision)
            .put(key.clone(), encode(&record)?);
        match store.txn(more(txn, &record)).await {
            Ok(TxnOutcome::Committed { .. }) => return Ok(record),
            // Asked again with a condition: a change that was made after all
            // is found by reading it anew.
            Ok(TxnOutcome::Refused { .. }) | Err(StoreError::Unknown { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(RecordError::Contended(machine.to_string()))
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
                let record = keel_cluster::wire::decode("a node's record", &entry.value).ok()?;
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
