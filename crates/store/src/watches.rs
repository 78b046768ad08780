//! Tells the watches of other nodes what changed. In a large cluster thousands of them wait for the
//! same changes, and what commits the next change must not wait until all are told.
//!
//! The watches of a prefix that have read everything form a group. One task follows the store for
//! it, encodes each change once, and hands it to a few members at a time, between which all other
//! tasks run. Then it rests for about as long as that many messages cost, and tells what changed
//! meanwhile at once: a write to each connection, not one for each change. A watch that begins
//! earlier, or has no room for a change because its node reads slowly, reads the history by itself
//! until it has caught up. (So do etcd's synced and unsynced watchers, `mvcc/watchable_store.go`.)

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::FutureExt;
use keel_net::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::wire::{Answer, Failure, Revised};
use crate::encoding::{WireError, payload};
use crate::interface::{Changes, Revision, Store, StoreError, Watch};

/// Members of a group that are told before other tasks run.
const AT_ONCE: usize = 4;
/// Revisions that a watch is told at once.
pub(super) const BATCH_REVISIONS: usize = 8;
/// How long a group rests after each time, for each of its members: about twice what a message costs
/// (benches/README.md, a large cluster). Groups of fewer than 20 members do not rest.
const REST_FOR_EACH: Duration = Duration::from_micros(50);
const REST_MIN: Duration = Duration::from_millis(1);

/// All watches of other nodes.
#[derive(Clone)]
pub(super) struct Watches {
    /// Watches do not keep a store open.
    store: Weak<dyn Store>,
    groups: Arc<Mutex<Groups>>,
}

#[derive(Default)]
struct Groups {
    /// By prefix.
    all: HashMap<String, Group>,
    /// For the next group or member.
    number: u64,
}

/// Watches of a prefix that have read everything, or are just being told of it.
struct Group {
    number: u64,
    /// No member needs what changed up to here from anywhere else.
    told: Revision,
    members: BTreeMap<u64, Member>,
    task: AbortHandle,
}

struct Member {
    to: mpsc::Sender<Bytes>,
    /// The newest revision that it was told of.
    read: Revision,
    /// Says, with that revision, that it has to read by itself.
    left: oneshot::Sender<Revision>,
}

/// The place of a watch in a group, until it is dropped.
struct Place<'a> {
    watches: &'a Watches,
    prefix: &'a str,
    member: u64,
    left: oneshot::Receiver<Revision>,
}

impl Watches {
    pub(super) fn new(store: &Arc<dyn Store>) -> Self {
        Self {
            store: Arc::downgrade(store),
            groups: Arc::default(),
        }
    }

    /// Sends all changes under `prefix` from a revision on, until nobody receives them or the store
    /// ends them. The first item has no changes: it says that the watch has begun.
    pub(super) async fn send(self, prefix: String, from: Revision, to: mpsc::Sender<Bytes>) {
        if let Err(error) = self.send_changes(&prefix, from, &to).await
            && let Ok(item) = item(Err(error))
        {
            to.send(item).await.ok();
        }
    }

    async fn send_changes(
        &self,
        prefix: &str,
        from: Revision,
        to: &mpsc::Sender<Bytes>,
    ) -> Result<(), StoreError> {
        let mut watch = self.watch(prefix, from).await?;
        // Revision 0 is the empty store, without changes.
        let mut next = from.max(1);
        let begun = Changes {
            revision: 0,
            changes: Vec::new(),
        };
        let Ok(begun) = item(Ok(begun)) else {
            return Ok(());
        };
        if to.send(begun).await.is_err() {
            return Ok(());
        }
        loop {
            watch = match self.join(prefix, next, watch, to) {
                Ok(mut place) => {
                    let left = tokio::select! {
                        () = to.closed() => return Ok(()),
                        left = &mut place.left => left,
                    };
                    let Ok(read) = left else { return Ok(()) };
                    next = read + 1;
                    self.watch(prefix, next).await?
                }
                Err(watch) => watch,
            };
            // Nobody waits for one that reads slowly.
            let Ok(room) = to.reserve().await else {
                return Ok(());
            };
            let changes = tokio::select! {
                () = to.closed() => return Ok(()),
                changes = watch.next() => changes,
            };
            let Some(changes) = changes.transpose()? else {
                return Ok(());
            };
            next = changes.revision + 1;
            let Ok(item) = item(Ok(changes)) else {
                return Ok(());
            };
            room.send(item);
        }
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, StoreError> {
        let store = self.store.upgrade();
        let store = store.ok_or_else(|| StoreError::unavailable("the store was closed"))?;
        store.watch(prefix, from).await
    }

    /// Joins the prefix's group with a watch that has read everything before revision `next`. It
    /// gets its watch back if the group was told of more.
    fn join<'a>(
        &'a self,
        prefix: &'a str,
        next: Revision,
        watch: Watch,
        to: &mpsc::Sender<Bytes>,
    ) -> Result<Place<'a>, Watch> {
        let mut groups = self.lock();
        groups.number += 2;
        let (number, member) = (groups.number, groups.number + 1);
        let group = match groups.all.get_mut(prefix) {
            Some(group) if next <= group.told => return Err(watch),
            Some(group) => group,
            None => {
                let telling = self.clone().tell(prefix.to_owned(), number, watch);
                let group = Group {
                    number,
                    told: next - 1,
                    members: BTreeMap::new(),
                    task: tokio::spawn(telling).abort_handle(),
                };
                groups.all.entry(prefix.to_owned()).or_insert(group)
            }
        };
        let (leave, left) = oneshot::channel();
        let new = Member {
            to: to.clone(),
            read: next - 1,
            left: leave,
        };
        group.members.insert(member, new);
        Ok(Place {
            watches: self,
            prefix,
            member,
            left,
        })
    }

    /// Tells a group of all changes that its watch reads.
    async fn tell(self, prefix: String, number: u64, mut watch: Watch) {
        while let Some(items) = batch(&mut watch).await {
            let Some((last, _)) = items.last() else {
                break;
            };
            let members: Vec<u64> = match self.lock().group(&prefix, number) {
                Some(group) => {
                    group.told = *last;
                    group.members.keys().copied().collect()
                }
                None => return,
            };
            for some in members.chunks(AT_ONCE) {
                match self.lock().group(&prefix, number) {
                    Some(group) => group.tell(some, &items),
                    None => return,
                }
                tokio::task::yield_now().await;
            }
            let rest = REST_FOR_EACH * u32::try_from(members.len()).unwrap_or(u32::MAX);
            if rest >= REST_MIN && items.len() < BATCH_REVISIONS {
                tokio::time::sleep(rest).await;
            }
        }
        // Each member finds out by itself why.
        let mut groups = self.lock();
        if groups.group(&prefix, number).is_some()
            && let Some(group) = groups.all.remove(&prefix)
        {
            for member in group.members.into_values() {
                member.left.send(member.read).ok();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Groups {
    /// The group of a prefix, if it is still the one with this number.
    fn group(&mut self, prefix: &str, number: u64) -> Option<&mut Group> {
        let group = self.all.get_mut(prefix)?;
        (group.number == number).then_some(group)
    }
}

impl Group {
    /// Tells some members of changes, as far as they do not know them.
    fn tell(&mut self, some: &[u64], items: &[(Revision, Bytes)]) {
        for number in some {
            let Some(member) = self.members.get_mut(number) else {
                continue;
            };
            let read = member.read;
            let mut unknown = items.iter().filter(|(revision, _)| *revision > read);
            let has_room = unknown.all(|(revision, item)| {
                let told = member.to.try_send(item.clone()).is_ok();
                if told {
                    member.read = *revision;
                }
                told
            });
            if !has_room && let Some(member) = self.members.remove(number) {
                member.left.send(member.read).ok();
            }
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut groups = self.watches.lock();
        let Some(group) = groups.all.get_mut(self.prefix) else {
            return;
        };
        group.members.remove(&self.member);
        if group.members.is_empty() {
            group.task.abort();
            groups.all.remove(self.prefix);
        }
    }
}

/// The next changes, and others that are there already; `None` if the watch ended.
async fn batch(watch: &mut Watch) -> Option<Vec<(Revision, Bytes)>> {
    let mut items = Vec::new();
    let mut next = watch.next().await;
    while let Some(Ok(changes)) = next {
        let revision = changes.revision;
        items.push((revision, item(Ok(changes)).ok()?));
        if items.len() == BATCH_REVISIONS {
            break;
        }
        match watch.next().now_or_never() {
            Some(more) => next = more,
            None => break,
        }
    }
    (!items.is_empty()).then_some(items)
}

fn item(changes: Result<Changes, StoreError>) -> Result<Bytes, WireError> {
    let answer: Answer<Revised> = changes.map(Revised::from).map_err(Failure::from);
    payload("an answer of the store", &answer)
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::encoding::decode;
    use crate::{RaftStore, Txn};

    const PUTS: u64 = 300;

    async fn read(from: &mut mpsc::Receiver<Bytes>) -> Option<Result<Revision, Failure>> {
        let item = from.recv().await?;
        let answer: Answer<Revised> = decode("changes", &item).unwrap();
        Some(answer.map(|changes| changes.revision))
    }

    /// Whatever a watch does meanwhile, it is told of each change once, and in order.
    #[tokio::test(flavor = "multi_thread", worker_threads = 3)]
    async fn each_change_is_told_once_and_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(RaftStore::open_alone(folder.path()).await.unwrap());
        let opened: Arc<dyn Store> = store.clone();
        let watches = Watches::new(&opened);
        let first = store.revision().await.unwrap() + 1;
        let last = first + 2 * PUTS - 1;
        let mut tasks = tokio::task::JoinSet::new();
        for seed in 0..60u64 {
            let (watches, store) = (watches.clone(), store.clone());
            tasks.spawn(async move {
                let mut random = StdRng::seed_from_u64(seed);
                // Changes of `a` have odd distances from the first, those of `b` even ones.
                let (prefix, step) = [("a/", 2), ("", 1)][random.random_range(0..2)];
                let mut at = first;
                while at <= last {
                    // It begins, reads some, perhaps slowly, and goes.
                    let from = at.min(store.revision().await.unwrap() + 1);
                    let (to, mut changes) = mpsc::channel(random.random_range(1..5));
                    tokio::spawn(watches.clone().send(prefix.into(), from, to));
                    assert_eq!(read(&mut changes).await.unwrap().unwrap(), 0);
                    let pauses = random.random_bool(0.3);
                    for _ in 0..random.random_range(1..200) {
                        if at > last {
                            break;
                        }
                        let revision = read(&mut changes).await.unwrap().unwrap();
                        let expected = match step {
                            1 => at,
                            _ => at + (at - first) % 2,
                        };
                        assert_eq!(revision, expected, "{prefix:?} from {from}");
                        at = match revision + step > last {
                            true => last + 1,
                            false => revision + 1,
                        };
                        if pauses {
                            for _ in 0..random.random_range(0..20) {
                                tokio::task::yield_now().await;
                            }
                        }
                    }
                }
            });
        }
        for put in 0..PUTS {
            for key in ["a/x", "b/x"] {
                let txn = Txn::new().put(key, put.to_string());
                store.txn(txn).await.unwrap();
            }
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
        // Nobody is left: nor is any group.
        let gone = async {
            while !watches.lock().all.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), gone)
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_watch_that_cannot_begin_says_why_and_others_end_with_the_store() {
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(RaftStore::open_alone(folder.path()).await.unwrap());
        let watches = Watches::new(&store);
        let (to, mut changes) = mpsc::channel(4);
        tokio::spawn(watches.clone().send("a/".into(), 1_000, to));
        let answer = read(&mut changes).await.unwrap();
        assert!(matches!(answer, Err(Failure::Ahead { .. })), "{answer:?}");
        let next = store.revision().await.unwrap() + 1;
        let (to, mut changes) = mpsc::channel(4);
        tokio::spawn(watches.clone().send("a/".into(), next, to));
        assert_eq!(read(&mut changes).await.unwrap().unwrap(), 0);
        drop(store);
        // Nothing else had it open.
        RaftStore::open_alone(folder.path()).await.unwrap();
        assert!(read(&mut changes).await.is_none_or(|it| it.is_err()));
    }
}
