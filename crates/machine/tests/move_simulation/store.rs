//! A store for the simulation: one map, serialised transactions, and transactions whose
//! sender received no answer.

use keel_store::{Compare, KeyValue, Op, Revision, Txn};
use std::collections::BTreeMap;

/// Entries by key.
#[derive(Debug, Default)]
pub(crate) struct Store {
    pub(crate) revision: Revision,
    entries: BTreeMap<String, KeyValue>,
    /// Transactions that may still be applied.
    pub(crate) in_flight: Vec<Txn>,
}

impl Store {
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
