//! Pure model of the store, without clock, disk or threads: the effect of a transaction on entries
//! and leases, and the limits.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::interface::{
    Change, Changes, Compare, KEY_BYTES_MAX, KeyValue, LEASE_KEYS_MAX, LEASE_TTL_MS_MAX,
    LEASE_TTL_MS_MIN, LeaseId, Op, Revision, StoreError, TXN_BYTES_MAX, TXN_PARTS_MAX, Txn,
    VALUE_BYTES_MAX,
};

/// Entries by key, shared between the writer's model and the readers' view.
pub(super) type Entries = BTreeMap<Arc<str>, Arc<KeyValue>>;

/// Everything the store holds, as of its newest revision.
#[derive(Debug, Default, Clone)]
pub(super) struct Model {
    pub(super) revision: Revision,
    pub(super) entries: Entries,
    pub(super) leases: HashMap<LeaseId, Lease>,
    pub(super) lease_next: u64,
    /// Bytes of all keys and values.
    pub(super) bytes: u64,
    pub(super) bytes_max: u64,
}

#[derive(Debug, Default, Clone)]
pub(super) struct Lease {
    pub(super) ttl_ms: u64,
    pub(super) keys: BTreeSet<Arc<str>>,
}

/// Outcome of a transaction, before it is durable.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Applied; no changes if it had no effect.
    Applied(Option<Changes>),
    Refused {
        failed: usize,
        current: Option<KeyValue>,
    },
}

impl Model {
    /// Applies `txn` completely or not at all.
    pub(super) fn apply(&mut self, txn: Txn) -> Result<Verdict, StoreError> {
        check(&txn)?;
        for (failed, compare) in txn.compare.iter().enumerate() {
            if !self.holds(compare) {
                let current = self.subject(compare);
                return Ok(Verdict::Refused { failed, current });
            }
        }
        self.admit(&txn)?;
        Ok(Verdict::Applied(self.change(txn.then)))
    }

    /// Adds a lease.
    pub(super) fn grant(&mut self, ttl_ms: u64) -> LeaseId {
        self.lease_next += 1;
        let lease = LeaseId(self.lease_next);
        let keys = BTreeSet::new();
        self.leases.insert(lease, Lease { ttl_ms, keys });
        lease
    }

    /// Removes a lease and its keys. `None` if there is no such lease.
    pub(super) fn end(&mut self, lease: LeaseId) -> Option<Option<Changes>> {
        let ended = self.leases.remove(&lease)?;
        let deletes = ended.keys.iter().map(|key| Op::Delete {
            key: key.to_string(),
        });
        Some(self.change(deletes.collect()))
    }

    /// Adds an entry read from disk.
    pub(super) fn load(&mut self, entry: KeyValue) {
        let key: Arc<str> = entry.key.as_str().into();
        self.bytes += size(&entry.key, &entry.value);
        if let Some(lease) = entry.lease.and_then(|id| self.leases.get_mut(&id)) {
            lease.keys.insert(Arc::clone(&key));
        }
        self.entries.insert(key, Arc::new(entry));
    }

    fn holds(&self, compare: &Compare) -> bool {
        let entry = |key: &String| self.entries.get(key.as_str());
        match compare {
            Compare::Absent { key } => entry(key).is_none(),
            Compare::Exists { key } => entry(key).is_some(),
            Compare::ModifiedAt { key, revision } => {
                entry(key).is_some_and(|e| e.modified == *revision)
            }
            Compare::Value { key, value } => entry(key).is_some_and(|e| e.value == *value),
            Compare::Attached { key, lease } => entry(key).is_some_and(|e| e.lease == Some(*lease)),
            Compare::LeaseAlive { lease } => self.leases.contains_key(lease),
            Compare::NoneUnder { prefix } => under(&self.entries, prefix).next().is_none(),
        }
    }

    /// The entry that a failed condition refers to.
    fn subject(&self, compare: &Compare) -> Option<KeyValue> {
        let entry = match compare {
            Compare::Absent { key }
            | Compare::Exists { key }
            | Compare::ModifiedAt { key, .. }
            | Compare::Value { key, .. }
            | Compare::Attached { key, .. } => self.entries.get(key.as_str()),
            Compare::NoneUnder { prefix } => under(&self.entries, prefix).next(),
            Compare::LeaseAlive { .. } => None,
        };
        entry.map(|entry| entry.as_ref().clone())
    }

    /// Whether all operations can be applied.
    fn admit(&self, txn: &Txn) -> Result<(), StoreError> {
        let mut bytes = self.bytes;
        let mut attached: HashMap<LeaseId, usize> = HashMap::new();
        for op in &txn.then {
            let Op::Put { key, value, lease } = op else {
                continue;
            };
            bytes += size(key, value);
            let Some(lease) = *lease else { continue };
            let Some(held) = self.leases.get(&lease) else {
                return Err(StoreError::NoSuchLease { lease });
            };
            if !held.keys.contains(key.as_str()) {
                let more = attached.entry(lease).or_default();
                *more += 1;
                let keys = held.keys.len() + *more;
                limit("keys attached to a lease", keys, LEASE_KEYS_MAX)?;
            }
        }
        if bytes > self.bytes && bytes > self.bytes_max {
            return Err(StoreError::Limit {
                what: "bytes in the store".into(),
                found: bytes,
                limit: self.bytes_max,
            });
        }
        Ok(())
    }

    /// Applies admitted operations as the next revision, if they have effect.
    fn change(&mut self, ops: Vec<Op>) -> Option<Changes> {
        let revision = self.revision + 1;
        let mut changes = Vec::with_capacity(ops.len());
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    let entry = self.put(key, value, lease, revision);
                    changes.push(Change::Put(entry));
                }
                Op::Delete { key } => {
                    if self.remove(&key) {
                        changes.push(Change::Delete { key });
                    }
                }
            }
        }
        if changes.is_empty() {
            return None;
        }
        self.revision = revision;
        Some(Changes { revision, changes })
    }

    fn put(
        &mut self,
        key: String,
        value: Vec<u8>,
        lease: Option<LeaseId>,
        revision: Revision,
    ) -> KeyValue {
        let created = self.entries.get(key.as_str()).map(|e| e.created);
        self.remove(&key);
        let entry = KeyValue {
            key,
            value,
            created: created.unwrap_or(revision),
            modified: revision,
            lease,
        };
        self.load(entry.clone());
        entry
    }

    fn remove(&mut self, key: &str) -> bool {
        let Some(entry) = self.entries.remove(key) else {
            return false;
        };
        self.bytes -= size(&entry.key, &entry.value);
        if let Some(lease) = entry.lease.and_then(|id| self.leases.get_mut(&id)) {
            lease.keys.remove(key);
        }
        true
    }
}

/// The entries whose keys begin with `prefix`, by key.
pub(super) fn under<'a>(
    entries: &'a Entries,
    prefix: &'a str,
) -> impl Iterator<Item = &'a Arc<KeyValue>> {
    let from = (
        std::ops::Bound::Included(prefix),
        std::ops::Bound::Unbounded,
    );
    entries
        .range::<str, _>(from)
        .take_while(move |(key, _)| key.starts_with(prefix))
        .map(|(_, entry)| entry)
}

pub(super) fn size(key: &str, value: &[u8]) -> u64 {
    (key.len() + value.len()) as u64
}

pub(super) fn limit(what: &str, found: usize, limit: usize) -> Result<(), StoreError> {
    if found <= limit {
        return Ok(());
    }
    Err(StoreError::Limit {
        what: what.into(),
        found: found as u64,
        limit: limit as u64,
    })
}

/// Whether `key` is a valid key.
pub(super) fn check_key(key: &str) -> Result<(), StoreError> {
    if key.is_empty() {
        let reason = "a key must not be empty".into();
        return Err(StoreError::Invalid { reason });
    }
    limit("bytes in a key", key.len(), KEY_BYTES_MAX)
}

/// Whether keys may begin with `prefix`.
pub(super) fn check_prefix(prefix: &str) -> Result<(), StoreError> {
    limit("bytes in a prefix", prefix.len(), KEY_BYTES_MAX)
}

/// Whether a lease may have this time.
pub(super) fn check_ttl(ttl_ms: u64) -> Result<(), StoreError> {
    match (LEASE_TTL_MS_MIN..=LEASE_TTL_MS_MAX).contains(&ttl_ms) {
        true => Ok(()),
        false => Err(StoreError::Invalid {
            reason: format!(
                "a lease has {LEASE_TTL_MS_MIN} to {LEASE_TTL_MS_MAX} ms, not {ttl_ms}"
            ),
        }),
    }
}

/// Checks of a transaction that need no store; the bytes of its keys and values.
pub(super) fn check(txn: &Txn) -> Result<usize, StoreError> {
    limit(
        "compares in a transaction",
        txn.compare.len(),
        TXN_PARTS_MAX,
    )?;
    limit("operations in a transaction", txn.then.len(), TXN_PARTS_MAX)?;
    let mut bytes = 0;
    for compare in &txn.compare {
        match compare {
            Compare::Absent { key }
            | Compare::Exists { key }
            | Compare::ModifiedAt { key, .. }
            | Compare::Attached { key, .. } => {
                check_key(key)?;
                bytes += key.len();
            }
            Compare::Value { key, value } => {
                check_key(key)?;
                limit("bytes in a value", value.len(), VALUE_BYTES_MAX)?;
                bytes += key.len() + value.len();
            }
            Compare::NoneUnder { prefix } => {
                limit("bytes in a prefix", prefix.len(), KEY_BYTES_MAX)?;
                bytes += prefix.len();
            }
            Compare::LeaseAlive { .. } => {}
        }
    }
    let mut changed = BTreeSet::new();
    for op in &txn.then {
        let key = match op {
            Op::Put { key, value, .. } => {
                limit("bytes in a value", value.len(), VALUE_BYTES_MAX)?;
                bytes += value.len();
                key
            }
            Op::Delete { key } => key,
        };
        check_key(key)?;
        bytes += key.len();
        if !changed.insert(key) {
            return Err(StoreError::Invalid {
                reason: format!("{key:?} is changed twice in one transaction"),
            });
        }
    }
    limit("bytes in a transaction", bytes, TXN_BYTES_MAX)?;
    Ok(bytes)
}
