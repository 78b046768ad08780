//! The store moved out of the nodes into an etcd, while the agent of its only voter does not run.
//!
//! The node must be the only voter: then its copy has all that was ever answered, and no other node
//! can answer from a copy of its own. The entries are written to etcd, and the cluster's record last:
//! what has no such record is no store of a cluster, and the next attempt begins again. The record
//! has a higher incarnation, so all new epochs are above all old ones, though etcd counts revisions
//! from a number of its own.
//!
//! Other nodes follow when their agents are started with the store's address ([`follow_store`]). For
//! [`HOLD_MS`] all nodes count as alive, so that machines of those that follow late are not restarted
//! elsewhere.

use super::rebuild::{Node, RebuildError, Rebuilt};
use crate::external_store::ExternalStore;
use keel_cluster::identity::ClusterId;
use keel_cluster::members::{self, MemberError};
use keel_machine::moves::ownership::VersionedRecord;
use keel_store::keys::Key;
use keel_store::{KeyValue, RaftStore, Store, StoreError, Txn};
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
    if let Some(store) = &node.settings.store {
        return Err(RebuildError::IsExternal(store.address.clone()));
    }
    let store = to.connect().await?;
    let copy = RaftStore::read_copy(&node.dir.store()).await?;
    let own = node.identity.node.clone();
    if copy.voters.len() != 1 || copy.voters[0].node != own.as_str() {
        let names: Vec<&str> = copy.voters.iter().map(|it| it.node.as_str()).collect();
        return Err(RebuildError::NotAlone(names.join(", ")));
    }
    let cluster = node.identity.cluster;
    let mut entries = copy.content.entries;
    let incarnation = members::begin_anew(&mut entries, cluster, &node.voter(), 0)?;
    if !is_done(&store, cluster, incarnation, to).await? {
        copy_to(&store, cluster, entries, to).await?;
    }
    node.settings.store = Some(to.clone());
    let saved = node.settings.save(&node.dir.settings());
    saved.map_err(|error| RebuildError::Settings(error.to_string()))?;
    let old = RaftStore::put_aside(&node.dir.store()).await?;
    Ok(Rebuilt {
        node: own,
        incarnation,
        revision: store.revision().await?,
        is_external: true,
        others: Vec::new(),
        old,
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
    let store = to.connect().await?;
    let (found, _) = members::cluster_of(&store).await?;
    if found != node.identity.cluster {
        return Err(MemberError::OtherCluster(found).into());
    }
    let old = RaftStore::put_aside(&node.dir.store()).await?;
    node.settings.store = Some(to.clone());
    let saved = node.settings.save(&node.dir.settings());
    saved.map_err(|error| RebuildError::Settings(error.to_string()))?;
    Ok(old)
}

/// Whether an earlier attempt wrote all, and only its node does not know.
async fn is_done(
    store: &dyn Store,
    cluster: ClusterId,
    incarnation: u32,
    to: &ExternalStore,
) -> Result<bool, RebuildError> {
    match members::cluster_of(store).await {
        Err(MemberError::NoCluster) => Ok(false),
        Err(error) => Err(error.into()),
        Ok((found, at)) if found == cluster && at >= incarnation => Ok(true),
        Ok((found, _)) => Err(RebuildError::InUse(to.address.clone(), found.to_string())),
    }
}

/// Writes the entries, the cluster's record last.
async fn copy_to(
    store: &dyn Store,
    cluster: ClusterId,
    entries: Vec<KeyValue>,
    to: &ExternalStore,
) -> Result<(), RebuildError> {
    let raced = || RebuildError::Raced(to.address.clone());
    let cluster_key = Key::Cluster.to_string();
    let marker = Key::Migration.to_string();
    let id = cluster.to_string();
    let left = store.list("").await?.entries;
    let is_own = |it: &KeyValue| it.key == marker && it.value == id.as_bytes();
    if !left.is_empty() && !left.iter().any(is_own) {
        return Err(RebuildError::NotEmpty(to.address.clone()));
    }
    let begin = Txn::new()
        .when_absent(cluster_key.clone())
        .put(marker.clone(), id.as_bytes());
    if !store.txn(begin).await?.is_committed() {
        return Err(raced());
    }
    let begun = store.get(&marker).await?.ok_or_else(raced)?.modified;
    let going_on = || Txn::new().when_modified_at(marker.clone(), begun);
    let write = async |txn: Txn| match store.txn(txn).await?.is_committed() {
        true => Ok(()),
        false => Err(raced()),
    };
    let keys = left.into_iter().map(|it| it.key).filter(|it| *it != marker);
    for some in keys.collect::<Vec<_>>().chunks(BATCH) {
        write(
            some.iter()
                .fold(going_on(), |txn, key| txn.delete(key.clone())),
        )
        .await?;
    }

    let (record, mut entries): (Vec<_>, Vec<_>) = entries
        .into_iter()
        .partition(|entry| entry.key == cluster_key);
    let record = record.into_iter().next().ok_or(MemberError::NoCluster)?;
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
        write(
            some.into_iter()
                .fold(going_on(), |txn, (key, value)| txn.put(key, value)),
        )
        .await?;
    }
    let hold = store.lease_grant(HOLD_MS).await?;
    let nodes = members::members(store).await?;
    for some in nodes.chunks(BATCH) {
        let alive = some
            .iter()
            .map(|node| Key::Alive(node.node.clone()).to_string());
        write(alive.fold(going_on(), |txn, key| txn.put_leased(key, "", hold))).await?;
    }
    let last = || {
        going_on()
            .when_absent(cluster_key.clone())
            .put(cluster_key.clone(), record.value.clone())
            .delete(marker.clone())
    };
    loop {
        match store.txn(last()).await {
            Ok(outcome) if outcome.is_committed() => return Ok(()),
            // An earlier one, whose answer was lost, may have been executed.
            Ok(_) => {
                let now = store.get(&cluster_key).await?;
                return match now.is_some_and(|it| it.value == record.value) {
                    true => Ok(()),
                    false => Err(raced()),
                };
            }
            Err(StoreError::Unknown { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
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
