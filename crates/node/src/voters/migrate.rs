//! The store moved out of the nodes into an etcd, while the agent of its only voter does not run.
//!
//! The node must be the only voter: then its copy has all that was ever answered, and no other node
//! can answer from a copy of its own. The copy stays locked until it is put aside. In this order:
//!
//! 1. The entries are written to etcd, all but the cluster's record. What has no such record is no
//!    store of a cluster, and the next attempt begins again.
//! 2. The node's settings name etcd, durably. From now on no agent serves the copy.
//! 3. The cluster's record is written: etcd is the store. It has a higher incarnation, which all new
//!    machines' epochs get, as etcd counts revisions from a number of its own.
//! 4. The copy is put aside.
//!
//! Other nodes follow when their agents are started with the store's address ([`follow_store`]). For
//! [`HOLD_MS`] all nodes count as alive, so that machines of those that follow late are not restarted
//! elsewhere.

use super::rebuild::{Node, RebuildError, Rebuilt};
use crate::external_store::ExternalStore;
use keel_cluster::identity::ClusterId;
use keel_cluster::members::{self, MemberError};
use keel_machine::moves::ownership::{self, VersionedRecord};
use keel_store::keys::Key;
use keel_store::{KeyValue, RaftStore, Revision, Store, StoreError, Txn, TxnOutcome};
use std::path::{Path, PathBuf};

/// How long nodes count as alive that have not followed yet, in milliseconds.
const HOLD_MS: u64 = 600_000;
/// Entries, and bytes, that are written at once.
const BATCH: usize = 100;
const BATCH_BYTES: usize = 1 << 20;

/// Moves the store of the node in a folder, its only voter, to `to`. May be repeated after an error.
///
/// # Errors
/// [`RebuildError`]; the store is still in the node then.
pub async fn migrate(state_dir: &Path, to: &ExternalStore) -> Result<Rebuilt, RebuildError> {
    let mut node = Node::open(state_dir)?;
    let is_begun = node.settings.store.as_ref() == Some(to) && node.dir.store().exists();
    if let Some(store) = &node.settings.store
        && !is_begun
    {
        return Err(RebuildError::IsExternal(store.address.clone()));
    }
    let copy = RaftStore::read_copy(&node.dir.store()).await?;
    let own = node.identity.node.clone();
    if copy.voters.len() != 1 || copy.voters[0].node != own.as_str() {
        let names: Vec<&str> = copy.voters.iter().map(|it| it.node.as_str()).collect();
        return Err(RebuildError::NotAlone(names.join(", ")));
    }
    let store = to.connect().await?;
    let cluster = node.identity.cluster;
    let mut entries = copy.content.entries.clone();
    let incarnation = members::begin_anew(&mut entries, cluster, &node.voter(), 0)?;
    let next = copy.content.revision + 1;
    ownership::enter_incarnation(&mut entries, incarnation, next);
    match members::cluster_of(&store).await {
        Err(MemberError::NoCluster) => {
            let copied = copy_to(&store, cluster, entries, to).await?;
            node.settings.store = Some(to.clone());
            node.save_settings()?;
            copied.finish(&store).await?;
        }
        // The last attempt did all but put the copy aside, or does not know that it did.
        Ok((found, at)) if is_begun && found == cluster && at == incarnation => {
            hold_nodes(&store, Txn::new).await?;
        }
        Ok((found, _)) => {
            return Err(RebuildError::InUse(to.address.clone(), found.to_string()));
        }
        Err(error) => return Err(error.into()),
    }
    let old = copy.put_aside().await?;
    Ok(Rebuilt {
        node: own,
        incarnation,
        revision: store.revision().await?,
        is_external: true,
        others: Vec::new(),
        old: Some(old),
    })
}

/// Lets the node in a folder use the store at `to`, to which its cluster's was moved. Returns where
/// its own copy is now, if it had one; `None` also if it uses that store already.
///
/// # Errors
/// [`RebuildError`] if the store has not this node's cluster, or an agent runs.
pub async fn follow_store(
    state_dir: &Path,
    to: &ExternalStore,
) -> Result<Option<PathBuf>, RebuildError> {
    let mut node = Node::open_any(state_dir)?;
    if node.settings.store.as_ref() == Some(to) {
        return Ok(None);
    }
    if std::os::unix::net::UnixStream::connect(node.dir.api_socket()).is_ok() {
        return Err(RebuildError::Running(state_dir.to_path_buf()));
    }
    let copy = match node.dir.store().exists() {
        true => Some(RaftStore::read_copy(&node.dir.store()).await?),
        false => None,
    };
    let store = to.connect().await?;
    let (found, _) = members::cluster_of(&store).await?;
    if found != node.identity.cluster {
        return Err(MemberError::OtherCluster(found).into());
    }
    node.settings.store = Some(to.clone());
    node.save_settings()?;
    match copy {
        Some(copy) => Ok(Some(copy.put_aside().await?)),
        None => Ok(None),
    }
}

/// Entries that were written, all but the cluster's record.
struct Copied {
    /// When the marker of this attempt was written; nobody else wrote since.
    begun: Revision,
    record: Vec<u8>,
    address: String,
}

impl Copied {
    /// A transaction that is refused if another attempt began, or a cluster.
    fn going_on(&self) -> Txn {
        Txn::new()
            .when_modified_at(Key::Migration, self.begun)
            .when_absent(Key::Cluster)
    }

    async fn write(&self, store: &dyn Store, txn: Txn) -> Result<(), RebuildError> {
        match store.txn(txn).await?.is_committed() {
            true => Ok(()),
            false => Err(RebuildError::Raced(self.address.clone())),
        }
    }

    /// Writes the cluster's record: from now on this is its store.
    async fn finish(&self, store: &dyn Store) -> Result<(), RebuildError> {
        let last = || {
            self.going_on()
                .put(Key::Cluster, self.record.clone())
                .delete(Key::Migration)
        };
        loop {
            match store.txn(last()).await {
                Ok(outcome) if outcome.is_committed() => return Ok(()),
                // An earlier one, whose answer was lost, may have been executed.
                Ok(_) => {
                    let now = store.get(&Key::Cluster.to_string()).await?;
                    return match now.is_some_and(|it| it.value == self.record) {
                        true => Ok(()),
                        false => Err(RebuildError::Raced(self.address.clone())),
                    };
                }
                Err(StoreError::Unknown { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Lets all nodes count as alive that do not yet, for a time. Each transaction begins with `first`.
async fn hold_nodes(store: &dyn Store, first: impl Fn() -> Txn) -> Result<(), RebuildError> {
    let hold = store.lease_grant(HOLD_MS).await?;
    for member in members::members(store).await? {
        let alive = Key::Alive(member.node);
        // Refused where the node is alive by itself.
        let txn = first().when_absent(alive.clone());
        store.txn(txn.put_leased(alive, "", hold)).await?;
    }
    Ok(())
}

/// Writes the entries, but not the cluster's record.
async fn copy_to(
    store: &dyn Store,
    cluster: ClusterId,
    entries: Vec<KeyValue>,
    to: &ExternalStore,
) -> Result<Copied, RebuildError> {
    let marker = Key::Migration.to_string();
    let id = cluster.to_string();
    let left = store.list("").await?.entries;
    let own = left
        .iter()
        .find(|it| it.key == marker && it.value == id.as_bytes());
    if !left.is_empty() && own.is_none() {
        return Err(RebuildError::NotEmpty(to.address.clone()));
    }
    let begin = match own {
        Some(own) => Txn::new().when_modified_at(Key::Migration, own.modified),
        None => Txn::new().when_absent(Key::Migration),
    };
    let begin = begin.when_absent(Key::Cluster);
    let begun = store.txn(begin.put(Key::Migration, id.as_bytes())).await?;
    let TxnOutcome::Committed { revision: begun } = begun else {
        return Err(RebuildError::Raced(to.address.clone()));
    };
    let cluster_key = Key::Cluster.to_string();
    let (record, mut entries): (Vec<_>, Vec<_>) = entries
        .into_iter()
        .partition(|entry| entry.key == cluster_key);
    let record = record.into_iter().next().ok_or(MemberError::NoCluster)?;
    let copied = Copied {
        begun,
        record: record.value,
        address: to.address.clone(),
    };
    let keys = left.into_iter().map(|it| it.key).filter(|it| *it != marker);
    for some in keys.collect::<Vec<_>>().chunks(BATCH) {
        let gone = some
            .iter()
            .fold(copied.going_on(), |txn, key| txn.delete(key.clone()));
        copied.write(store, gone).await?;
    }

    // In the order in which they came, by which some are listed.
    entries.sort_by_key(|entry| entry.created);
    let mut again = Vec::new();
    for entry in &entries {
        // The epoch of a record that was never changed follows from its revision. Here that is
        // another one: the epoch is written down, and the record twice, as if it had been changed.
        if let Ok(Key::Machine(machine)) = entry.key.parse() {
            let wrong = |reason| RebuildError::Record(machine.to_string(), reason);
            let found = VersionedRecord::read(entry).map_err(wrong)?;
            let value = found.record.encode().map_err(wrong)?;
            again.push((entry.key.clone(), value));
        }
    }
    let first = entries.into_iter().map(|entry| (entry.key, entry.value));
    for some in batches(first.chain(again)) {
        let put = some
            .into_iter()
            .fold(copied.going_on(), |txn, (key, value)| txn.put(key, value));
        copied.write(store, put).await?;
    }
    hold_nodes(store, || copied.going_on()).await?;
    Ok(copied)
}

/// Entries in order, in parts that one transaction can write.
fn batches(entries: impl Iterator<Item = (String, Vec<u8>)>) -> Vec<Vec<(String, Vec<u8>)>> {
    let mut all: Vec<Vec<(String, Vec<u8>)>> = Vec::new();
    let mut bytes = 0;
    for (key, value) in entries {
        let size = key.len() + value.len();
        let is_new = match all.last() {
            // A transaction writes no key twice.
            Some(last) => {
                last.len() == BATCH
                    || bytes + size > BATCH_BYTES
                    || last.iter().any(|(other, _)| *other == key)
            }
            None => true,
        };
        if is_new {
            all.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(last) = all.last_mut() {
            last.push((key, value));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_the_order_and_no_key_is_in_one_twice() {
        let entry = |key: &str, bytes: usize| (key.to_owned(), vec![0; bytes]);
        let entries = [
            entry("a", 10),
            entry("b", 10),
            entry("a", 10),
            entry("large", BATCH_BYTES),
            entry("c", 1),
        ];
        let parts = batches(entries.into_iter());
        let keys: Vec<Vec<&str>> = parts
            .iter()
            .map(|part| part.iter().map(|(key, _)| key.as_str()).collect())
            .collect();
        assert_eq!(keys, [vec!["a", "b"], vec!["a"], vec!["large"], vec!["c"]]);
        let many = (0..BATCH + 1).map(|number| entry(&number.to_string(), 0));
        assert_eq!(batches(many).len(), 2);
    }
}
