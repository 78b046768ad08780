//! The audit log: which user asked for which change, in the store's order. An entry is written
//! before its request is carried out, so that nothing is done that is not in it; its outcome is
//! added after.

use keel_api::{AUDIT_MAX, AuditEntry};
use keel_store::encoding::{self, WireError};
use keel_store::keys::{AUDIT, Key};
use keel_store::{Store, StoreError, Txn};
use serde::{Deserialize, Serialize};

/// Entries that are removed at a time once there are too many.
const REMOVED_AT_ONCE: usize = 200;

/// How often an entry is written again if the answer is lost.
const ATTEMPTS_MAX: usize = 3;

/// An entry's value.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct AuditRecord {
    pub(crate) user: String,
    pub(crate) role: String,
    pub(crate) node: String,
    pub(crate) request: String,
    pub(crate) about: String,
    pub(crate) status: Option<u16>,
}

fn encoded(record: &AuditRecord) -> Result<Vec<u8>, StoreError> {
    encoding::encode("an entry of the audit log", record).map_err(|error: WireError| {
        StoreError::Invalid {
            reason: error.to_string(),
        }
    })
}

/// Writes an entry; its key.
pub(crate) async fn begin_audit(
    store: &dyn Store,
    at_unix_ms: u64,
    record: &AuditRecord,
) -> Result<Key, StoreError> {
    let key = Key::Audit(at_unix_ms, rand::random());
    let txn = Txn::new().put(key.clone(), encoded(record)?);
    // Nobody else has this key: a write whose answer was lost can be repeated.
    for _ in 0..ATTEMPTS_MAX {
        match store.txn(txn.clone()).await {
            Err(StoreError::Unknown { .. }) => {}
            written => return written.map(|_| key),
        }
    }
    store.txn(txn).await.map(|_| key)
}

/// Adds the outcome of an entry, and now and then removes the oldest entries.
pub(crate) async fn end_audit(
    store: &dyn Store,
    key: Key,
    record: &AuditRecord,
) -> Result<(), StoreError> {
    let txn = Txn::new().when(keel_store::Compare::Exists {
        key: key.to_string(),
    });
    store.txn(txn.put(key, encoded(record)?)).await?;
    if rand::random_range(0..REMOVED_AT_ONCE) == 0 {
        remove_oldest(store, AUDIT_MAX).await?;
    }
    Ok(())
}

async fn remove_oldest(store: &dyn Store, kept: usize) -> Result<(), StoreError> {
    let mut entries = store.list(AUDIT).await?.entries;
    entries.sort_by_key(|entry| entry.created);
    let surplus = entries.len().saturating_sub(kept);
    for some in entries[..surplus].chunks(REMOVED_AT_ONCE) {
        let delete = |txn: Txn, entry: &keel_store::KeyValue| txn.delete(entry.key.clone());
        store.txn(some.iter().fold(Txn::new(), delete)).await?;
    }
    Ok(())
}

/// The newest entries, at most `limit`, the oldest first.
pub(crate) async fn audit_log(
    store: &dyn Store,
    since_unix_ms: u64,
    limit: usize,
) -> Result<Vec<AuditEntry>, StoreError> {
    let mut log = Vec::new();
    for entry in store.list(AUDIT).await?.entries {
        let Ok(Key::Audit(at_unix_ms, _)) = entry.key.parse() else {
            continue;
        };
        if at_unix_ms < since_unix_ms {
            continue;
        }
        let record: Result<AuditRecord, WireError> =
            encoding::decode("an entry of the audit log", &entry.value);
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                tracing::warn!(key = entry.key, %error, "an entry of the audit log is left out");
                continue;
            }
        };
        log.push(AuditEntry {
            revision: entry.created,
            at_unix_ms,
            user: record.user,
            role: record.role,
            node: record.node,
            request: record.request,
            about: record.about,
            status: record.status,
        });
    }
    log.sort_by_key(|entry| entry.revision);
    let first = log.len().saturating_sub(limit);
    Ok(log.split_off(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_store::RaftStore;

    fn record(user: &str) -> AuditRecord {
        AuditRecord {
            user: user.into(),
            role: "admin".into(),
            node: "a".into(),
            request: "POST /v1/machines/m/stop".into(),
            about: String::new(),
            status: None,
        }
    }

    #[tokio::test]
    async fn entries_are_in_the_order_of_the_store_and_the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let store = RaftStore::open_alone(folder.path()).await.unwrap();
        // The second node's clock is behind.
        for (at, user) in [(500, "first"), (100, "second"), (900, "third")] {
            let key = begin_audit(&store, at, &record(user)).await.unwrap();
            let status = Some(200);
            let ended = AuditRecord {
                status,
                ..record(user)
            };
            if user != "third" {
                end_audit(&store, key, &ended).await.unwrap();
            }
        }
        let users = async |since, limit| {
            let log = audit_log(&store, since, limit).await.unwrap();
            let told = log.iter().map(|it| (it.user.clone(), it.status));
            told.collect::<Vec<_>>()
        };
        let ended = |user: &str| (user.to_owned(), Some(200));
        let third = ("third".to_owned(), None);
        let all = vec![ended("first"), ended("second"), third.clone()];
        assert_eq!(users(0, 10).await, all);
        assert_eq!(users(0, 2).await, all[1..]);
        assert_eq!(users(200, 10).await, [ended("first"), third.clone()]);
        remove_oldest(&store, 1).await.unwrap();
        assert_eq!(users(0, 10).await, [third]);
    }
}
