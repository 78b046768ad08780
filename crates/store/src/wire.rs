//! The store's requests and answers as they go over the wire. Version and
//! kinds: [`crate::encoding`]. Names of variants and fields are the format.

use serde::{Deserialize, Serialize};

use crate::interface::{
    Change, Changes, Compare, KeyValue, LeaseId, Op, Revision, StoreError, Txn, TxnOutcome,
};

/// An answer: the value or an error.
pub(super) type Answer<T> = Result<T, Failure>;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    key: String,
    #[serde(with = "serde_bytes")]
    value: Vec<u8>,
    created: u64,
    modified: u64,
    lease: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Condition {
    Absent(String),
    Exists(String),
    ModifiedAt(String, u64),
    Value(String, #[serde(with = "serde_bytes")] Vec<u8>),
    Attached(String, u64),
    LeaseAlive(u64),
    NoneUnder(String),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Step {
    Put(String, #[serde(with = "serde_bytes")] Vec<u8>, Option<u64>),
    Delete(String),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Transaction {
    compare: Vec<Condition>,
    then: Vec<Step>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Outcome {
    Committed(u64),
    Refused(u64, u64, Option<Entry>),
}

/// A request to follow a prefix from a revision.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Follow {
    pub(super) prefix: String,
    pub(super) from: Revision,
}

/// One item of a list's stream.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Listed {
    Some(Vec<Entry>),
    /// The last one: all entries were sent, as of this revision.
    End(Revision),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Changed {
    Put(Entry),
    Delete(String),
}

/// One item of a watch's stream; the first, of revision 0, confirms the watch.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Revised {
    pub(super) revision: Revision,
    pub(super) changes: Vec<Changed>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Failure {
    Unavailable(String),
    Unknown(String),
    Compacted(u64, u64),
    Ahead(u64, u64),
    Limit(String, u64, u64),
    NoSuchLease(u64),
    Invalid(String),
    NotLeader(Option<String>),
}

impl From<KeyValue> for Entry {
    fn from(entry: KeyValue) -> Self {
        Entry {
            key: entry.key,
            value: entry.value,
            created: entry.created,
            modified: entry.modified,
            lease: entry.lease.map(|lease| lease.0),
        }
    }
}

impl From<Entry> for KeyValue {
    fn from(entry: Entry) -> Self {
        KeyValue {
            key: entry.key,
            value: entry.value,
            created: entry.created,
            modified: entry.modified,
            lease: entry.lease.map(LeaseId),
        }
    }
}

impl From<Compare> for Condition {
    fn from(compare: Compare) -> Self {
        match compare {
            Compare::Absent { key } => Condition::Absent(key),
            Compare::Exists { key } => Condition::Exists(key),
            Compare::ModifiedAt { key, revision } => Condition::ModifiedAt(key, revision),
            Compare::Value { key, value } => Condition::Value(key, value),
            Compare::Attached { key, lease } => Condition::Attached(key, lease.0),
            Compare::LeaseAlive { lease } => Condition::LeaseAlive(lease.0),
            Compare::NoneUnder { prefix } => Condition::NoneUnder(prefix),
        }
    }
}

impl From<Condition> for Compare {
    fn from(condition: Condition) -> Self {
        match condition {
            Condition::Absent(key) => Compare::Absent { key },
            Condition::Exists(key) => Compare::Exists { key },
            Condition::ModifiedAt(key, revision) => Compare::ModifiedAt { key, revision },
            Condition::Value(key, value) => Compare::Value { key, value },
            Condition::Attached(key, lease) => Compare::Attached {
                key,
                lease: LeaseId(lease),
            },
            Condition::LeaseAlive(lease) => Compare::LeaseAlive {
                lease: LeaseId(lease),
            },
            Condition::NoneUnder(prefix) => Compare::NoneUnder { prefix },
        }
    }
}

impl From<Txn> for Transaction {
    fn from(txn: Txn) -> Self {
        let step = |op| match op {
            Op::Put { key, value, lease } => Step::Put(key, value, lease.map(|lease| lease.0)),
            Op::Delete { key } => Step::Delete(key),
        };
        Transaction {
            compare: txn.compare.into_iter().map(Condition::from).collect(),
            then: txn.then.into_iter().map(step).collect(),
        }
    }
}

impl From<Transaction> for Txn {
    fn from(txn: Transaction) -> Self {
        let op = |step| match step {
            Step::Put(key, value, lease) => Op::Put {
                key,
                value,
                lease: lease.map(LeaseId),
            },
            Step::Delete(key) => Op::Delete { key },
        };
        Txn {
            compare: txn.compare.into_iter().map(Compare::from).collect(),
            then: txn.then.into_iter().map(op).collect(),
        }
    }
}

impl From<TxnOutcome> for Outcome {
    fn from(outcome: TxnOutcome) -> Self {
        match outcome {
            TxnOutcome::Committed { revision } => Outcome::Committed(revision),
            TxnOutcome::Refused {
                failed,
                revision,
                current,
            } => Outcome::Refused(failed as u64, revision, current.map(Entry::from)),
        }
    }
}

impl From<Outcome> for TxnOutcome {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Committed(revision) => TxnOutcome::Committed { revision },
            Outcome::Refused(failed, revision, current) => TxnOutcome::Refused {
                failed: failed as usize,
                revision,
                current: current.map(KeyValue::from),
            },
        }
    }
}

impl From<Changes> for Revised {
    fn from(changes: Changes) -> Self {
        let changed = |change| match change {
            Change::Put(entry) => Changed::Put(entry.into()),
            Change::Delete { key } => Changed::Delete(key),
        };
        Revised {
            revision: changes.revision,
            changes: changes.changes.into_iter().map(changed).collect(),
        }
    }
}

impl From<Revised> for Changes {
    fn from(revised: Revised) -> Self {
        let change = |changed| match changed {
            Changed::Put(entry) => Change::Put(entry.into()),
            Changed::Delete(key) => Change::Delete { key },
        };
        Changes {
            revision: revised.revision,
            changes: revised.changes.into_iter().map(change).collect(),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable { reason } => Failure::Unavailable(reason),
            StoreError::Unknown { reason } => Failure::Unknown(reason),
            StoreError::Compacted { asked, oldest } => Failure::Compacted(asked, oldest),
            StoreError::Ahead { asked, current } => Failure::Ahead(asked, current),
            StoreError::Limit { what, found, limit } => Failure::Limit(what, found, limit),
            StoreError::NoSuchLease { lease } => Failure::NoSuchLease(lease.0),
            StoreError::Invalid { reason } => Failure::Invalid(reason),
            StoreError::NotLeader { leader } => Failure::NotLeader(leader),
            error @ (StoreError::Open { .. } | StoreError::Damaged { .. }) => {
                Failure::Unavailable(error.to_string())
            }
        }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Unavailable(reason) => StoreError::Unavailable { reason },
            Failure::Unknown(reason) => StoreError::Unknown { reason },
            Failure::Compacted(asked, oldest) => StoreError::Compacted { asked, oldest },
            Failure::Ahead(asked, current) => StoreError::Ahead { asked, current },
            Failure::Limit(what, found, limit) => StoreError::Limit { what, found, limit },
            Failure::NoSuchLease(lease) => StoreError::NoSuchLease {
                lease: LeaseId(lease),
            },
            Failure::Invalid(reason) => StoreError::Invalid { reason },
            Failure::NotLeader(leader) => StoreError::NotLeader { leader },
        }
    }
}
