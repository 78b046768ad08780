//! A store for the simulation: one map, serialised transactions, and transactions whose
//! sender received no answer.

use keel_cluster::Epoch;
use keel_store::keys::SCHEDULES;
use keel_store::{Compare, KeyValue, Op, Revision, Txn};
use std::collections::{BTreeMap, VecDeque};

/// Revisions of one incarnation of the cluster: more than a run has transactions.
pub(crate) const REVISIONS: Revision = 10_000;

pub(crate) type Entries = BTreeMap<String, KeyValue>;

/// Entries by key.
#[derive(Debug)]
pub(crate) struct Store {
    /// The cluster's.
    pub(crate) incarnation: u32,
    pub(crate) revision: Revision,
    pub(crate) entries: Entries,
    /// Transactions that may still be applied.
    pub(crate) in_flight: Vec<Txn>,
    /// Values of schedule entries that the watch of their node has not seen yet.
    pub(crate) unseen: VecDeque<Vec<u8>>,
}

impl Default for Store {
    fn default() -> Self {
        Store {
            incarnation: 1,
            revision: 0,
            entries: Entries::new(),
            in_flight: Vec::new(),
            unseen: VecDeque::new(),
        }
    }
}

impl Store {
    /// An epoch not lower than any that the machine has had.
    pub(crate) fn epochs_so_far(&self) -> Epoch {
        Epoch {
            incarnation: self.incarnation,
            counter: self.revision,
        }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&KeyValue> {
        self.entries.get(key)
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Applies a transaction atomically.
    pub(crate) fn apply(&mut self, txn: &Txn) -> bool {
        if !txn.compare.iter().all(|compare| self.holds(compare)) {
            return false;
        }
        let revision = self.revision + 1;
        for op in &txn.then {
            match op {
                Op::Put { key, value, .. } => self.put(key, value, revision),
                Op::Delete { key } => {
                    self.entries.remove(key);
                }
            }
        }
        self.revision = revision;
        true
    }

    fn put(&mut self, key: &str, value: &[u8], revision: Revision) {
        let created = self.entries.get(key).map_or(revision, |it| it.created);
        let entry = KeyValue {
            key: key.to_owned(),
            value: value.to_vec(),
            created,
            modified: revision,
            lease: None,
        };
        self.entries.insert(key.to_owned(), entry);
        if key.starts_with(SCHEDULES) && !value.is_empty() {
            self.unseen.push_back(value.to_vec());
        }
    }

    fn holds(&self, compare: &Compare) -> bool {
        match compare {
            Compare::Absent { key } => !self.has(key),
            Compare::Exists { key } => self.has(key),
            Compare::ModifiedAt { key, revision } => {
                self.get(key).is_some_and(|it| it.modified == *revision)
            }
            other => panic!("an unexpected condition: {other:?}"),
        }
    }
}
