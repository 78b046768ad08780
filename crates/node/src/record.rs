//! Machines and nodes in the store: reading them, and the transactions that
//! change them.

use keel_cluster::keys::{self, Key};
use keel_cluster::store::{KeyValue, Revision, Txn, TxnOutcome};
use keel_cluster::{MachineName, NodeName, Store, StoreError};
use keel_machine::spec::{Record, Status};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::time::Instant;

/// How often a change is tried again that another one got ahead of.
const ATTEMPTS_MAX: u32 = 16;
/// How long a machine that has just come may take to say that it goes on.
const SETTLE_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked at until then.
const SETTLE_EVERY: Duration = Duration::from_millis(5);

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

/// A machine's record, once a move that brought it where it is has been written down
/// as over. Whoever moved it knows that it went on before the store does; what that
/// user asks for next is not to be refused for it.
pub(crate) async fn settled(
    store: &dyn Store,
    machine: &MachineName,
) -> Result<Found, RecordError> {
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use keel_cluster::Epoch;
    use keel_cluster::store::{RedbOptions, RedbStore};
    use keel_machine::restart::Restart;
    use keel_machine::spec::{Balancing, Spec};
    use std::sync::Arc;

    /// One that runs.
    pub(crate) fn record(name: MachineName, owner: NodeName) -> Record {
        Record {
            name,
            owner,
            spec: Spec {
                module: String::new(),
                args: vec!["m".into()],
                env: Vec::new(),
                volumes: Vec::new(),
                memory_bytes: 1 << 20,
                threads_max: 1,
                cpu_limit_millis: None,
                output_bytes_per_s: 1 << 20,
                remove_at_end: false,
                restart: Restart::No,
                checkpoints: None,
                balancing: Balancing::default(),
            },
            epoch: Epoch::default(),
            status: Status::Running,
            since_unix_ms: 0,
            started_unix_ms: 0,
            stop_wanted: false,
            restarts: 0,
            created_unix_ms: 0,
            paused: None,
            origin: None,
            reports: Vec::new(),
        }
    }

    /// A user who was told that a machine moved asks for the next thing before its new
    /// node has written down that it goes on.
    #[tokio::test]
    async fn what_has_just_come_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("store.redb");
        let store = Arc::new(RedbStore::open(&file, RedbOptions::default()).unwrap());
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
