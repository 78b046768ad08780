//! The interface of all stores: entries, transactions, watches, leases, and errors. Engines and the
//! way to them are beside this file.

use std::fmt;

use futures::StreamExt;
use futures::stream::BoxStream;
use keel_net::BoxFuture;
use thiserror::Error;

/// Number of a committed change; 0 is the empty store, the first change is 1.
pub type Revision = u64;

/// Longest key, in bytes; the shortest is 1.
pub const KEY_BYTES_MAX: usize = 512;
/// Longest value, in bytes: 1 MiB.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Most compares, and most operations, in a transaction.
pub const TXN_PARTS_MAX: usize = 256;
/// Most bytes of keys and values in a transaction: 2 MiB.
pub const TXN_BYTES_MAX: usize = 2 << 20;
/// Most entries a list may have.
pub const LIST_ENTRIES_MAX: usize = 200_000;
/// Most bytes of keys and values a list may have: 256 MiB.
pub const LIST_BYTES_MAX: usize = 256 << 20;
/// Most keys attached to one lease.
pub const LEASE_KEYS_MAX: usize = 4096;
/// Shortest time a lease may have, in milliseconds.
pub const LEASE_TTL_MS_MIN: u64 = 50;
/// Longest time a lease may have, in milliseconds: one day.
pub const LEASE_TTL_MS_MAX: u64 = 24 * 3600 * 1000;

/// A lease: keys attached to it are deleted when it ends. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// 1 to [`KEY_BYTES_MAX`] bytes.
    pub key: String,
    /// At most [`VALUE_BYTES_MAX`] bytes.
    pub value: Vec<u8>,
    /// The revision that put the key when it did not exist.
    pub created: Revision,
    /// The revision that put it last.
    pub modified: Revision,
    /// The lease with which it ends.
    pub lease: Option<LeaseId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    Absent {
        key: String,
    },
    Exists {
        key: String,
    },
    /// The key exists and was last put at `revision`.
    ModifiedAt {
        key: String,
        /// Its [`KeyValue::modified`].
        revision: Revision,
    },
    /// The key exists with this value.
    Value {
        key: String,
        value: Vec<u8>,
    },
    /// The key exists and is attached to this lease.
    Attached {
        key: String,
        lease: LeaseId,
    },
    /// The lease exists and has time left.
    LeaseAlive {
        lease: LeaseId,
    },
    /// No key begins with `prefix`.
    NoneUnder {
        prefix: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Set a key. Attaches it to `lease`, and detaches it from any other.
    Put {
        key: String,
        value: Vec<u8>,
        /// The lease with which it ends; it must be alive.
        lease: Option<LeaseId>,
    },
    /// Remove a key; nothing if it does not exist.
    Delete { key: String },
}

/// All compares hold, and then all operations are applied, in one revision; or
/// none is. A key may occur in one operation only.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// The conditions, checked in this order.
    pub compare: Vec<Compare>,
    pub then: Vec<Op>,
}

impl Txn {
    /// A transaction without conditions and changes yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compare.push(compare);
        self
    }

    /// Adds the condition that `key` does not exist.
    #[must_use]
    pub fn when_absent(self, key: impl Into<String>) -> Self {
        self.when(Compare::Absent { key: key.into() })
    }

    /// Adds the condition that `key` was last put at `revision`.
    #[must_use]
    pub fn when_modified_at(self, key: impl Into<String>, revision: Revision) -> Self {
        let key = key.into();
        self.when(Compare::ModifiedAt { key, revision })
    }

    /// Adds a put.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.then.push(Op::Put {
            key: key.into(),
            value: value.into(),
            lease: None,
        });
        self
    }

    /// Adds a put that ends with `lease`.
    #[must_use]
    pub fn put_leased(
        mut self,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
        lease: LeaseId,
    ) -> Self {
        self.then.push(Op::Put {
            key: key.into(),
            value: value.into(),
            lease: Some(lease),
        });
        self
    }

    /// Adds a delete.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.then.push(Op::Delete { key: key.into() });
        self
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOutcome {
    /// It is applied and durable.
    Committed {
        /// Its revision; the current one if it changed nothing.
        revision: Revision,
    },
    /// A condition did not hold; nothing was changed.
    Refused {
        /// Index of the first condition that did not hold.
        failed: usize,
        /// The revision at which it was evaluated.
        revision: Revision,
        /// The entry of the condition's key at that revision (for a prefix: the first entry).
        current: Option<KeyValue>,
    },
}

impl TxnOutcome {
    /// Whether it was applied.
    pub fn is_committed(&self) -> bool {
        matches!(self, TxnOutcome::Committed { .. })
    }
}

/// All entries with a prefix, of one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The instant: watch from `revision + 1` to miss nothing.
    pub revision: Revision,
    pub entries: Vec<KeyValue>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key has this value now.
    Put(KeyValue),
    /// The key is gone: deleted, or its lease ended.
    Delete { key: String },
}

impl Change {
    pub fn key(&self) -> &str {
        match self {
            Change::Put(entry) => &entry.key,
            Change::Delete { key } => key,
        }
    }
}

/// The changes of one revision under a watched prefix; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    pub revision: Revision,
    pub changes: Vec<Change>,
}

/// Why the store did not answer as asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StoreError {
    /// Certainly not executed.
    #[error("the store is not available: {reason}")]
    Unavailable { reason: String },
    /// The request may or may not have taken effect, now or later.
    #[error("the store's answer was lost, the change may have been made: {reason}")]
    Unknown { reason: String },
    /// Another voter leads, or none does. Certainly not executed: ask the leader.
    #[error("this node does not lead the store{}", other_leader(.leader))]
    NotLeader {
        /// The node that leads, if known.
        leader: Option<String>,
    },
    /// Changes since the revision asked for are forgotten: list again.
    #[error("changes since revision {asked} are forgotten, the oldest known is {oldest}")]
    Compacted {
        asked: Revision,
        /// The oldest that can be watched from.
        oldest: Revision,
    },
    /// The store is older than the caller: it was restored. List again.
    #[error("revision {asked} is ahead of the store's {current}: it was restored from a backup")]
    Ahead { asked: Revision, current: Revision },
    /// A limit of this module is passed. Not executed.
    #[error("{what}: {found}, the limit is {limit}")]
    Limit {
        what: String,
        found: u64,
        limit: u64,
    },
    /// The lease ended or never was. Not executed.
    #[error("lease {lease} has ended")]
    NoSuchLease { lease: LeaseId },
    /// The request makes no sense. Not executed.
    #[error("not a valid request to the store: {reason}")]
    Invalid { reason: String },
    /// The store's file cannot be used.
    #[error("the store in {path} cannot be opened: {reason}")]
    Open { path: String, reason: String },
    /// The store's file is no store any more.
    #[error(
        "the store in {path} is damaged: {reason}; `keel store restore` begins it anew with a backup"
    )]
    Damaged { path: String, reason: String },
}

fn other_leader(leader: &Option<String>) -> String {
    match leader {
        Some(leader) => format!("; {leader} does"),
        None => "; none does at the moment".into(),
    }
}

impl StoreError {
    /// The store does not answer: nothing was changed.
    pub fn unavailable(reason: impl fmt::Display) -> Self {
        StoreError::Unavailable {
            reason: reason.to_string(),
        }
    }

    /// Whether the request certainly did not take effect.
    pub fn certainly_not_executed(&self) -> bool {
        !matches!(self, StoreError::Unknown { .. })
    }
}

/// Changes under a prefix, in order and without gaps.
pub struct Watch {
    changes: BoxStream<'static, Result<Changes, StoreError>>,
}

impl Watch {
    pub(crate) fn new(changes: BoxStream<'static, Result<Changes, StoreError>>) -> Self {
        Self { changes }
    }

    /// The same, until `over` is ready with the reason why it ends.
    pub(crate) fn until(self, over: impl Future<Output = StoreError> + Send + 'static) -> Self {
        let over = Box::pin(over);
        let changes = futures::stream::unfold(Some((self, over)), |state| async move {
            let (mut watch, mut over) = state?;
            tokio::select! {
                biased;
                item = watch.next() => {
                    let item = item?;
                    let rest = item.is_ok().then_some((watch, over));
                    Some((item, rest))
                }
                reason = &mut over => Some((Err(reason), None)),
            }
        });
        Self::new(changes.boxed())
    }

    /// The next revision's changes. After an error the watch is over (`None`):
    /// watch again from the revision after the last seen, or list again on
    /// [`StoreError::Compacted`] and [`StoreError::Ahead`]. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Changes, StoreError>> {
        self.changes.next().await
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

/// The interface of all stores.
pub trait Store: Send + Sync {
    /// The entry of `key`, not older than any change answered before the call.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>>;

    /// All entries that begin with `prefix` (all, if it is empty), of one
    /// instant, not older than any change answered before the call.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>>;

    /// Runs a transaction; durable when answered.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>>;

    /// Changes of keys that begin with `prefix`, from `from_revision` on
    /// (inclusive; may be the next one).
    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        from_revision: Revision,
    ) -> BoxFuture<'a, Result<Watch, StoreError>>;

    /// Makes a lease of [`LEASE_TTL_MS_MIN`] to [`LEASE_TTL_MS_MAX`]
    /// milliseconds. The holder counts from before it sent the request.
    fn lease_grant(&self, ttl_ms: u64) -> BoxFuture<'_, Result<LeaseId, StoreError>>;

    /// Gives a lease its full time again; answers that time in milliseconds.
    fn lease_renew(&self, lease: LeaseId) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// The shortest time of a lease on which a node's life may depend, in milliseconds: a change of
    /// the leader costs no renewal of it.
    fn node_lease_ms(&self) -> u64 {
        1500
    }

    /// Ends a lease and deletes its keys; nothing if it has ended.
    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>>;

    /// The current revision, not older than any change answered before.
    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>>;
}
