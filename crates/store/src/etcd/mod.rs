//! The external engine: an etcd of the site, for clusters that outgrow the embedded store.
//!
//! etcd (3.4 or newer) has all that the interface asks for, with these differences:
//! - *Revisions*: etcd's revision 1 is the empty store, ours is 0. Other users of the same etcd
//!   raise the revision, too.
//! - *Leases* have whole seconds and at least two of them. etcd cannot compare whether a lease is
//!   alive, so each gets a key of its own outside of the cluster's entries, which ends with it.
//! - *Refusals*: the transaction reads what its conditions are about in the same revision, and the
//!   first one that does not hold is found here.
//!
//! Two of etcd's limits are below ours; [`EtcdStore::connect`] checks them.

mod connection;
mod decoders;
mod messages;
mod watch;

use std::fmt;
use std::sync::Arc;

use futures::FutureExt;
use keel_net::BoxFuture;

pub(crate) use self::decoders::decoders;

use self::connection::{Connections, Effect, Failure};
use self::messages as pb;
use crate::interface::{
    Compare, KeyValue, LIST_BYTES_MAX, LIST_ENTRIES_MAX, LeaseId, Listing, Op, Revision, Store,
    StoreError, TXN_BYTES_MAX, TXN_PARTS_MAX, Txn, TxnOutcome, Watch,
};
use crate::model;

pub use self::connection::{EtcdOptions, EtcdTls};

/// etcd's settings that this engine needs beside the default ones.
pub(crate) const LIMIT_SETTINGS: &str = "--max-txn-ops 512 --max-request-bytes 4194304";
/// Entries in one answer of a listing.
const PAGE_ENTRIES: i64 = 1000;

const RANGE: &str = "/etcdserverpb.KV/Range";
const TXN: &str = "/etcdserverpb.KV/Txn";

/// A store in an etcd.
pub struct EtcdStore {
    etcd: Arc<Connections>,
    keys: Keys,
}

/// Where the cluster's keys are in etcd.
#[derive(Debug, Clone)]
struct Keys {
    /// Of the entries.
    entries: String,
    /// Of the leases.
    leases: String,
}

impl Keys {
    fn entry(&self, key: &str) -> Vec<u8> {
        format!("{}{key}", self.entries).into_bytes()
    }

    fn lease(&self, lease: LeaseId) -> Vec<u8> {
        format!("{}{lease}", self.leases).into_bytes()
    }

    /// All entries with a prefix: the first key and the first one after them.
    fn under(&self, prefix: &str) -> (Vec<u8>, Vec<u8>) {
        let first = self.entry(prefix);
        let mut end = first.clone();
        // The prefix is UTF-8, which has no byte 255.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        (first, end)
    }

    /// An entry as it is without the cluster's prefix.
    fn read(&self, entry: pb::KeyValue) -> Result<KeyValue, StoreError> {
        let key = String::from_utf8(entry.key).ok();
        let key = key.and_then(|key| key.strip_prefix(&self.entries).map(str::to_owned));
        let key = key.ok_or_else(|| {
            StoreError::unavailable("etcd answered with an entry that was not asked for")
        })?;
        Ok(KeyValue {
            key,
            value: entry.value,
            created: revision_of(entry.create_revision),
            modified: revision_of(entry.mod_revision),
            lease: u64::try_from(entry.lease)
                .ok()
                .filter(|id| *id > 0)
                .map(LeaseId),
        })
    }
}

/// Our revision; etcd's are positive.
fn revision_of(etcd: i64) -> Revision {
    u64::try_from(etcd).unwrap_or(0).saturating_sub(1)
}

/// etcd's revision.
fn etcd_revision(ours: Revision) -> i64 {
    i64::try_from(ours).unwrap_or(i64::MAX).saturating_add(1)
}

fn lease_number(lease: LeaseId) -> i64 {
    // etcd has no lease of a number that does not fit.
    i64::try_from(lease.0).unwrap_or(i64::MAX)
}

fn header(header: Option<pb::ResponseHeader>) -> Revision {
    header.map_or(0, |header| revision_of(header.revision))
}

fn range(key: Vec<u8>, range_end: Vec<u8>, limit: i64) -> pb::RangeRequest {
    pb::RangeRequest {
        key,
        range_end,
        limit,
        revision: 0,
    }
}

impl EtcdStore {
    /// Connects, and checks that etcd takes transactions of our limits.
    ///
    /// # Errors
    /// [`StoreError`] if it does not, no member answers, or a file cannot be read.
    pub async fn connect(options: &EtcdOptions) -> Result<Self, StoreError> {
        let etcd = Connections::new(options).await;
        let etcd = etcd.map_err(|reason| StoreError::Invalid { reason })?;
        let store = Self {
            etcd: Arc::new(etcd),
            keys: Keys {
                entries: format!("{}/entries/", options.prefix),
                leases: format!("{}/leases/", options.prefix),
            },
        };
        store.check_limits().await?;
        Ok(store)
    }

    /// Asks for the largest transaction that there may be, which changes nothing: the value that it
    /// compares with is no entry's.
    async fn check_limits(&self) -> Result<(), StoreError> {
        let probe = Compare::Value {
            key: "limits".into(),
            value: vec![0; TXN_BYTES_MAX],
        };
        let mut txn = Txn::new().when(probe);
        for part in 1..TXN_PARTS_MAX {
            let key = format!("limits/{part}");
            txn = txn.when_absent(key.clone()).delete(key);
        }
        let probed = self.run(&txn, Effect::Repeatable).await;
        probed.map(drop).map_err(StoreError::from)
    }

    /// What a condition is in etcd.
    fn compare(&self, compare: &Compare) -> pb::Compare {
        use pb::{CompareResult, CompareTarget, Operand};
        let made =
            |key: Vec<u8>, result: CompareResult, target: CompareTarget, operand: Operand| {
                pb::Compare {
                    result: result as i32,
                    target: target as i32,
                    key,
                    operand: Some(operand),
                    range_end: Vec::new(),
                }
            };
        let created = |key: Vec<u8>, result: CompareResult| {
            made(
                key,
                result,
                CompareTarget::Create,
                Operand::CreateRevision(0),
            )
        };
        let equal = |key: &str, target, operand| {
            made(self.keys.entry(key), CompareResult::Equal, target, operand)
        };
        match compare {
            Compare::Absent { key } => created(self.keys.entry(key), CompareResult::Equal),
            Compare::Exists { key } => created(self.keys.entry(key), CompareResult::NotEqual),
            Compare::ModifiedAt { key, revision } => {
                let revision = etcd_revision(*revision);
                equal(key, CompareTarget::Mod, Operand::ModRevision(revision))
            }
            Compare::Value { key, value } => {
                equal(key, CompareTarget::Value, Operand::Value(value.clone()))
            }
            Compare::Attached { key, lease } => {
                let lease = lease_number(*lease);
                equal(key, CompareTarget::Lease, Operand::Lease(lease))
            }
            Compare::LeaseAlive { lease } => {
                created(self.keys.lease(*lease), CompareResult::NotEqual)
            }
            Compare::NoneUnder { prefix } => {
                let (first, range_end) = self.keys.under(prefix);
                pb::Compare {
                    range_end,
                    ..created(first, CompareResult::Equal)
                }
            }
        }
    }

    /// Reads what a condition is about.
    fn subject(&self, compare: &Compare) -> pb::RangeRequest {
        match compare {
            Compare::Absent { key }
            | Compare::Exists { key }
            | Compare::ModifiedAt { key, .. }
            | Compare::Value { key, .. }
            | Compare::Attached { key, .. } => range(self.keys.entry(key), Vec::new(), 1),
            Compare::LeaseAlive { lease } => range(self.keys.lease(*lease), Vec::new(), 1),
            Compare::NoneUnder { prefix } => {
                let (first, end) = self.keys.under(prefix);
                range(first, end, 1)
            }
        }
    }

    fn operation(&self, op: &Op) -> pb::RequestOp {
        let request = match op {
            Op::Put { key, value, lease } => pb::Request::Put(pb::PutRequest {
                key: self.keys.entry(key),
                value: value.clone(),
                lease: lease.map_or(0, lease_number),
            }),
            Op::Delete { key } => pb::Request::Delete(pb::DeleteRangeRequest {
                key: self.keys.entry(key),
            }),
        };
        pb::RequestOp {
            request: Some(request),
        }
    }

    async fn run(&self, txn: &Txn, effect: Effect) -> Result<TxnOutcome, Failure> {
        let reads = txn.compare.iter().map(|compare| pb::RequestOp {
            request: Some(pb::Request::Range(self.subject(compare))),
        });
        let request = pb::TxnRequest {
            compare: txn.compare.iter().map(|it| self.compare(it)).collect(),
            success: txn.then.iter().map(|op| self.operation(op)).collect(),
            failure: reads.collect(),
        };
        let answer: pb::TxnResponse = self.etcd.ask(TXN, request, effect).await?;
        let revision = header(answer.header);
        if answer.succeeded {
            return Ok(TxnOutcome::Committed { revision });
        }
        for (failed, (compare, read)) in txn.compare.iter().zip(answer.responses).enumerate() {
            let found = read.range.and_then(|range| range.kvs.into_iter().next());
            if let Some(current) = self.refusal(compare, found).map_err(Failure::Store)? {
                return Ok(TxnOutcome::Refused {
                    failed,
                    revision,
                    current,
                });
            }
        }
        Err(Failure::Store(StoreError::Unknown {
            reason: "etcd refused a transaction whose conditions hold".into(),
        }))
    }

    /// The entry that a condition is about, if it does not hold; `None` if it holds.
    fn refusal(
        &self,
        compare: &Compare,
        found: Option<pb::KeyValue>,
    ) -> Result<Option<Option<KeyValue>>, StoreError> {
        if let Compare::LeaseAlive { .. } = compare {
            return Ok(found.is_none().then_some(None));
        }
        let found = found.map(|found| self.keys.read(found)).transpose()?;
        let holds = match compare {
            Compare::Absent { .. } | Compare::NoneUnder { .. } => found.is_none(),
            Compare::Exists { .. } => found.is_some(),
            Compare::ModifiedAt { revision, .. } => {
                found.as_ref().is_some_and(|it| it.modified == *revision)
            }
            Compare::Value { value, .. } => found.as_ref().is_some_and(|it| it.value == *value),
            Compare::Attached { lease, .. } => {
                found.as_ref().is_some_and(|it| it.lease == Some(*lease))
            }
            Compare::LeaseAlive { .. } => true,
        };
        Ok((!holds).then_some(found))
    }

    /// Of the leases that a transaction attaches keys to, the first that has ended.
    async fn ended_lease(&self, txn: &Txn) -> Result<StoreError, StoreError> {
        let leases = txn.then.iter().filter_map(|op| match op {
            Op::Put { lease, .. } => *lease,
            Op::Delete { .. } => None,
        });
        for lease in leases {
            let key = range(self.keys.lease(lease), Vec::new(), 1);
            let found: pb::RangeResponse = self.etcd.ask(RANGE, key, Effect::Repeatable).await?;
            if found.kvs.is_empty() {
                return Ok(StoreError::NoSuchLease { lease });
            }
        }
        Ok(StoreError::unavailable("etcd lost a lease"))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let message = pb::LeaseRequest {
            id: lease_number(lease),
        };
        // Repeated, it finds no lease.
        let revoked: Result<pb::Empty, Failure> = self
            .etcd
            .ask(
                "/etcdserverpb.Lease/LeaseRevoke",
                message,
                Effect::Repeatable,
            )
            .await;
        match revoked {
            Ok(_) | Err(Failure::NoLease) => Ok(()),
            Err(failure) => Err(failure.into()),
        }
    }
}

impl Store for EtcdStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>> {
        async move {
            model::check_key(key)?;
            let one = range(self.keys.entry(key), Vec::new(), 1);
            let found: pb::RangeResponse = self.etcd.ask(RANGE, one, Effect::Repeatable).await?;
            let entry = found.kvs.into_iter().next();
            entry.map(|entry| self.keys.read(entry)).transpose()
        }
        .boxed()
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        async move {
            model::check_prefix(prefix)?;
            let (mut first, end) = self.keys.under(prefix);
            let (mut entries, mut bytes, mut at) = (Vec::new(), 0, 0);
            loop {
                let page = pb::RangeRequest {
                    revision: at,
                    ..range(first, end.clone(), PAGE_ENTRIES)
                };
                let page: pb::RangeResponse =
                    self.etcd.ask(RANGE, page, Effect::Repeatable).await?;
                if at == 0 {
                    at = page.header.map_or(0, |header| header.revision);
                }
                for entry in page.kvs {
                    let entry = self.keys.read(entry)?;
                    bytes += entry.key.len() + entry.value.len();
                    entries.push(entry);
                }
                model::limit("entries in a list", entries.len(), LIST_ENTRIES_MAX)?;
                model::limit("bytes in a list", bytes, LIST_BYTES_MAX)?;
                match entries.last() {
                    Some(last) if page.more => {
                        first = self.keys.entry(&last.key);
                        first.push(0);
                    }
                    _ => {
                        let revision = revision_of(at);
                        return Ok(Listing { revision, entries });
                    }
                }
            }
        }
        .boxed()
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        async move {
            model::check(&txn)?;
            let effect = match txn.then.is_empty() {
                true => Effect::Repeatable,
                false => Effect::Changes,
            };
            match self.run(&txn, effect).await {
                Err(Failure::NoLease) => Err(self.ended_lease(&txn).await?),
                outcome => outcome.map_err(StoreError::from),
            }
        }
        .boxed()
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        from_revision: Revision,
    ) -> BoxFuture<'a, Result<Watch, StoreError>> {
        async move {
            model::check_prefix(prefix)?;
            let current = self.revision().await?;
            // Revision 0 is the empty store, without changes.
            let from = from_revision.max(1);
            if from > current + 1 {
                return Err(StoreError::Ahead {
                    asked: from,
                    current,
                });
            }
            watch::watch(self.etcd.clone(), self.keys.clone(), prefix, from).await
        }
        .boxed()
    }

    fn lease_grant(&self, ttl_ms: u64) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        async move {
            model::check_ttl(ttl_ms)?;
            let message = pb::LeaseGrantRequest {
                ttl: i64::try_from(ttl_ms.div_ceil(1000)).unwrap_or(i64::MAX),
            };
            let granted: pb::LeaseGrantResponse = self
                .etcd
                .ask("/etcdserverpb.Lease/LeaseGrant", message, Effect::Changes)
                .await?;
            let lease = u64::try_from(granted.id).unwrap_or(0);
            let lease = LeaseId(lease);
            let marker = pb::RequestOp {
                request: Some(pb::Request::Put(pb::PutRequest {
                    key: self.keys.lease(lease),
                    value: Vec::new(),
                    lease: granted.id,
                })),
            };
            let marker = pb::TxnRequest {
                success: vec![marker],
                ..pb::TxnRequest::default()
            };
            let marked: Result<pb::TxnResponse, Failure> =
                self.etcd.ask(TXN, marker, Effect::Changes).await;
            match marked {
                Ok(_) => Ok(lease),
                Err(failure) => {
                    // Otherwise it ends by itself.
                    self.revoke(lease).await.ok();
                    Err(failure.into())
                }
            }
        }
        .boxed()
    }

    fn lease_renew(&self, lease: LeaseId) -> BoxFuture<'_, Result<u64, StoreError>> {
        async move {
            let renewed = self
                .etcd
                .ask_for_one::<_, pb::LeaseResponse>(
                    "/etcdserverpb.Lease/LeaseKeepAlive",
                    pb::LeaseRequest {
                        id: lease_number(lease),
                    },
                    Effect::Renewal,
                )
                .await?;
            let seconds = u64::try_from(renewed.ttl).unwrap_or(0);
            match seconds {
                0 => Err(StoreError::NoSuchLease { lease }),
                seconds => Ok(seconds * 1000),
            }
        }
        .boxed()
    }

    /// An election of etcd takes up to 2 s with its default settings.
    fn node_lease_ms(&self) -> u64 {
        4000
    }

    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.revoke(lease).boxed()
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        async move {
            let nothing = range(self.keys.entry(""), Vec::new(), 1);
            let answer: pb::RangeResponse =
                self.etcd.ask(RANGE, nothing, Effect::Repeatable).await?;
            Ok(header(answer.header))
        }
        .boxed()
    }
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EtcdStore({})", self.keys.entries)
    }
}
