//! The readers' view: durable entries and recent changes.
//!
//! The writer publishes here after the changes are durable, so a read never sees state that a crash
//! could revert. Watches read the history themselves at their own pace; a slow one costs nothing
//! and gets [`StoreError::Compacted`] once the history has dropped a change of its prefix that it
//! had not read.
//!
//! A change wakes only those watches whose prefix it is under: in a large cluster there are many
//! thousands of watches, and most of them wait for what rarely changes. For that each prefix that
//! is followed has the list of revisions that changed something under it ([`Prefix`]).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use futures::StreamExt;
use tokio::sync::watch;

use super::model::{Entries, check_prefix, limit, size, under};
use crate::interface::{
    Change, Changes, KeyValue, LIST_BYTES_MAX, LIST_ENTRIES_MAX, Listing, Revision, StoreError,
    Watch,
};

#[derive(Debug)]
pub(super) struct View {
    state: RwLock<State>,
    history_revisions_max: usize,
    history_bytes_max: usize,
}

#[derive(Debug)]
struct State {
    revision: Revision,
    entries: Entries,
    /// One element per revision, up to `revision`.
    history: VecDeque<(Arc<Changes>, usize)>,
    history_bytes: usize,
    /// Those that watches follow; `None` once there are no more changes.
    followed: Option<HashMap<String, Prefix>>,
    /// Error of a failed store.
    failed: Option<String>,
}

/// A prefix that watches follow.
#[derive(Debug)]
struct Prefix {
    /// Wakes the watches; when it is dropped, they end.
    changed: watch::Sender<()>,
    /// Revisions of the history that changed something under it, in order.
    revisions: VecDeque<Revision>,
    /// The newest such revision that is no longer in the history, or 0.
    dropped: Revision,
}

impl View {
    pub(super) fn new(
        revision: Revision,
        entries: Entries,
        history_revisions_max: usize,
        history_bytes_max: usize,
    ) -> Self {
        Self {
            state: RwLock::new(State {
                revision,
                entries,
                history: VecDeque::new(),
                history_bytes: 0,
                followed: Some(HashMap::new()),
                failed: None,
            }),
            history_revisions_max,
            history_bytes_max,
        }
    }

    /// Adds changes that are durable now, in order.
    pub(super) fn publish(&self, all: Vec<Changes>) {
        let mut state = self.write();
        let mut woken = Vec::new();
        for changes in all {
            state.revision = changes.revision;
            let mut bytes = 0;
            for change in &changes.changes {
                match change {
                    Change::Put(entry) => {
                        bytes += size(&entry.key, &entry.value) as usize;
                        let key = entry.key.as_str().into();
                        state.entries.insert(key, Arc::new(entry.clone()));
                    }
                    Change::Delete { key } => {
                        bytes += key.len();
                        state.entries.remove(key.as_str());
                    }
                }
            }
            state.each_prefix_of(&changes, |prefix| {
                if prefix.revisions.back() != Some(&changes.revision) {
                    prefix.revisions.push_back(changes.revision);
                    woken.push(prefix.changed.clone());
                }
            });
            state.history_bytes += bytes;
            state.history.push_back((Arc::new(changes), bytes));
        }
        while state.history.len() > self.history_revisions_max
            || state.history_bytes > self.history_bytes_max
        {
            let Some((changes, bytes)) = state.history.pop_front() else {
                break;
            };
            state.history_bytes -= bytes;
            state.each_prefix_of(&changes, |prefix| {
                if prefix.revisions.front() == Some(&changes.revision) {
                    prefix.revisions.pop_front();
                }
                prefix.dropped = changes.revision;
            });
        }
        drop(state);
        for prefix in woken {
            prefix.send_replace(());
        }
    }

    /// Replaces everything by a snapshot; changes before it are not known.
    pub(super) fn replace(&self, revision: Revision, entries: Entries) {
        let mut state = self.write();
        state.revision = revision;
        state.entries = entries;
        state.history.clear();
        state.history_bytes = 0;
        for prefix in state.followed.iter_mut().flat_map(HashMap::values_mut) {
            prefix.revisions.clear();
            prefix.dropped = revision;
            prefix.changed.send_replace(());
        }
    }

    /// Fails the store: reads could be stale from now on.
    pub(super) fn fail(&self, reason: &str) {
        self.write().failed.get_or_insert_with(|| reason.into());
    }

    /// Says that nothing is published any more: watches end after what they have not read.
    pub(super) fn end_watches(&self) {
        self.write().followed = None;
    }

    pub(super) fn revision(&self) -> Result<Revision, StoreError> {
        Ok(self.read()?.revision)
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let state = self.read()?;
        Ok(state.entries.get(key).map(|entry| entry.as_ref().clone()))
    }

    pub(super) fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        check_prefix(prefix)?;
        let state = self.read()?;
        let mut found = Vec::new();
        let mut bytes = 0;
        for entry in under(&state.entries, prefix) {
            bytes += size(&entry.key, &entry.value) as usize;
            limit("entries in a list", found.len() + 1, LIST_ENTRIES_MAX)?;
            limit("bytes in a list", bytes, LIST_BYTES_MAX)?;
            found.push(Arc::clone(entry));
        }
        let revision = state.revision;
        drop(state);
        let entries = found.iter().map(|entry| entry.as_ref().clone()).collect();
        Ok(Listing { revision, entries })
    }

    pub(super) fn watch(
        self: &Arc<Self>,
        prefix: &str,
        from: Revision,
    ) -> Result<Watch, StoreError> {
        check_prefix(prefix)?;
        // Revision 0 is the empty store, without changes.
        let next = from.max(1);
        let cursor = Cursor {
            changed: self.follow(prefix, next)?,
            view: Arc::clone(self),
            prefix: prefix.into(),
            next,
            over: false,
        };
        let changes = futures::stream::unfold(cursor, |mut cursor| async move {
            let item = cursor.advance().await?;
            cursor.over = item.is_err();
            Some((item, cursor))
        });
        Ok(Watch::new(changes.boxed()))
    }

    /// Follows a prefix from a revision on that the history has.
    fn follow(&self, prefix: &str, next: Revision) -> Result<watch::Receiver<()>, StoreError> {
        // The long part is done beside others: when a new leader serves, all nodes come at once.
        let (mut revisions, until) = {
            let state = self.read()?;
            state.check(next)?;
            match state
                .followed
                .as_ref()
                .is_some_and(|it| it.contains_key(prefix))
            {
                true => (VecDeque::new(), state.oldest() - 1),
                false => (state.revisions_of(prefix, 0), state.revision),
            }
        };
        let mut state = self.write();
        state.check(next)?;
        let oldest = state.oldest();
        if let Some(known) = state.followed.as_ref().and_then(|it| it.get(prefix)) {
            return Ok(known.changed.subscribe());
        }
        if state.failed.is_some() || until > state.revision {
            return Err(StoreError::unavailable("the store was closed"));
        }
        revisions.extend(state.revisions_of(prefix, until + 1));
        revisions.retain(|revision| *revision >= oldest);
        let Some(followed) = &mut state.followed else {
            return Err(StoreError::unavailable("the store was closed"));
        };
        let new = Prefix {
            changed: watch::Sender::new(()),
            revisions,
            // Nobody follows it from an earlier one.
            dropped: oldest - 1,
        };
        let changed = new.changed.subscribe();
        followed.insert(prefix.to_owned(), new);
        Ok(changed)
    }

    /// Ends what [`View::follow`] began, and forgets a prefix that nobody else follows.
    fn unfollow(&self, prefix: &str, changed: watch::Receiver<()>) {
        let mut state = self.write();
        drop(changed);
        let Some(followed) = &mut state.followed else {
            return;
        };
        if followed
            .get(prefix)
            .is_some_and(|it| it.changed.receiver_count() == 0)
        {
            followed.remove(prefix);
        }
    }

    fn read(&self) -> Result<RwLockReadGuard<'_, State>, StoreError> {
        // Poisoned only by a panic of the writer, which also ends the store.
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match &state.failed {
            None => Ok(state),
            Some(reason) => Err(StoreError::unavailable(reason)),
        }
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The first revision that the history has, or would have.
    fn oldest(&self) -> Revision {
        self.revision + 1 - self.history.len() as u64
    }

    /// Whether a watch can begin at a revision.
    fn check(&self, next: Revision) -> Result<(), StoreError> {
        let oldest = self.oldest();
        if next < oldest {
            return Err(StoreError::Compacted {
                asked: next,
                oldest,
            });
        }
        if next > self.revision + 1 {
            return Err(StoreError::Ahead {
                asked: next,
                current: self.revision,
            });
        }
        Ok(())
    }

    /// Revisions of the history, from one on, that changed something under a prefix.
    fn revisions_of(&self, prefix: &str, from: Revision) -> VecDeque<Revision> {
        let skipped = from.saturating_sub(self.oldest()) as usize;
        let concerned = self
            .history
            .iter()
            .skip(skipped)
            .filter(|(all, _)| all.changes.iter().any(|it| it.key().starts_with(prefix)));
        concerned.map(|(all, _)| all.revision).collect()
    }

    /// Calls `act` for each followed prefix under which something changed, several times if there
    /// are several changes.
    fn each_prefix_of(&mut self, changes: &Changes, mut act: impl FnMut(&mut Prefix)) {
        let Some(followed) = &mut self.followed else {
            return;
        };
        for change in &changes.changes {
            let key = change.key();
            for end in 0..=key.len() {
                if let Some(prefix) = key.get(..end).and_then(|it| followed.get_mut(it)) {
                    act(prefix);
                }
            }
        }
    }

    /// The first changes under a followed prefix from a revision on.
    fn first(&self, prefix: &str, next: Revision) -> Result<Option<Changes>, StoreError> {
        let oldest = self.oldest();
        let compacted = StoreError::Compacted {
            asked: next,
            oldest,
        };
        let found = match self.followed.as_ref().and_then(|it| it.get(prefix)) {
            Some(known) if known.dropped >= next => return Err(compacted),
            Some(known) => {
                let at = known.revisions.partition_point(|it| *it < next);
                known.revisions.get(at).copied()
            }
            // Nothing is published any more.
            None if next < oldest => return Err(compacted),
            None => self.revisions_of(prefix, next).front().copied(),
        };
        let all = found.and_then(|found| self.history.get((found - oldest) as usize));
        let matching = all.map(|(all, _)| Changes {
            revision: all.revision,
            changes: (all.changes.iter())
                .filter(|it| it.key().starts_with(prefix))
                .cloned()
                .collect(),
        });
        Ok(matching)
    }
}

struct Cursor {
    view: Arc<View>,
    prefix: String,
    next: Revision,
    changed: watch::Receiver<()>,
    over: bool,
}

impl Cursor {
    async fn advance(&mut self) -> Option<Result<Changes, StoreError>> {
        if self.over {
            return None;
        }
        loop {
            self.changed.mark_unchanged();
            if let Some(found) = self.first() {
                return Some(found);
            }
            if self.changed.changed().await.is_err() {
                // What was published before the end.
                let closed = || Err(StoreError::unavailable("the store was closed"));
                return Some(self.first().unwrap_or_else(closed));
            }
        }
    }

    fn first(&mut self) -> Option<Result<Changes, StoreError>> {
        let state = self.view.read();
        let found = state.and_then(|state| state.first(&self.prefix, self.next));
        if let Ok(Some(changes)) = &found {
            self.next = changes.revision + 1;
        }
        found.transpose()
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        let (_, none) = watch::channel(());
        let own = std::mem::replace(&mut self.changed, none);
        self.view.unfollow(&self.prefix, own);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn changes(revision: Revision, keys: &[&str]) -> Changes {
        let put = |key: &&str| {
            Change::Put(KeyValue {
                key: (*key).to_owned(),
                value: vec![1],
                created: revision,
                modified: revision,
                lease: None,
            })
        };
        Changes {
            revision,
            changes: keys.iter().map(put).collect(),
        }
    }

    fn view(history: usize) -> Arc<View> {
        Arc::new(View::new(0, Entries::default(), history, 1 << 20))
    }

    /// What a watch gives without waiting: revisions and keys.
    fn ready(watch: &mut Watch) -> Vec<(Revision, Vec<String>)> {
        let mut all = Vec::new();
        while let Some(next) = watch.next().now_or_never() {
            let Some(Ok(changes)) = next else { break };
            let keys = changes.changes.iter().map(|it| it.key().to_owned());
            all.push((changes.revision, keys.collect()));
        }
        all
    }

    fn of(revision: Revision, keys: &[&str]) -> (Revision, Vec<String>) {
        (revision, keys.iter().map(|key| (*key).to_owned()).collect())
    }

    #[test]
    fn a_watch_sees_what_is_under_its_prefix() {
        let view = view(10);
        view.publish(vec![changes(1, &["a/1", "b/1"]), changes(2, &["b/2"])]);
        let mut early = view.watch("a/", 1).unwrap();
        let mut late = view.watch("a/", 2).unwrap();
        let mut all = view.watch("", 3).unwrap();
        let mut long = view.watch("a/1/longer", 1).unwrap();
        view.publish(vec![changes(3, &["a/1", "a/2", "c"])]);
        view.publish(vec![changes(4, &["ä"]), changes(5, &["a/3"])]);
        let new = [of(3, &["a/1", "a/2"]), of(5, &["a/3"])];
        assert_eq!(ready(&mut early), [&[of(1, &["a/1"])], &new[..]].concat());
        assert_eq!(ready(&mut late), new);
        assert_eq!(ready(&mut all).len(), 3);
        assert_eq!(ready(&mut long), []);
    }

    #[test]
    fn only_those_are_woken_whom_a_change_concerns() {
        let view = view(10);
        let concerned = view.follow("a/", 1).unwrap();
        let other = view.follow("b/", 1).unwrap();
        view.publish(vec![changes(1, &["a/1"])]);
        assert!(concerned.has_changed().unwrap());
        assert!(!other.has_changed().unwrap());
    }

    /// The history forgets revisions that a quiet watch did not need to read.
    #[test]
    fn a_quiet_watch_misses_nothing_and_a_slow_one_learns_that_it_did() {
        let view = view(3);
        let mut quiet = view.watch("quiet/", 1).unwrap();
        let mut slow = view.watch("slow/", 1).unwrap();
        view.publish(vec![changes(1, &["slow/1"])]);
        for revision in 2..9 {
            view.publish(vec![changes(revision, &["other"])]);
        }
        view.publish(vec![changes(9, &["quiet/1", "slow/2"])]);
        assert_eq!(ready(&mut quiet), [of(9, &["quiet/1"])]);
        let next = slow.next().now_or_never().flatten();
        let compacted = StoreError::Compacted {
            asked: 1,
            oldest: 7,
        };
        assert_eq!(next.unwrap().unwrap_err(), compacted);
        assert!(slow.next().now_or_never().unwrap().is_none());
        // Nobody can begin where the history does not reach.
        assert!(view.watch("quiet/", 6).is_err());
        assert!(view.watch("quiet/", 7).is_ok());
        assert!(view.watch("quiet/", 11).is_err());
    }

    #[test]
    fn a_snapshot_is_a_gap_for_each_watch() {
        let view = view(10);
        let mut watch = view.watch("a/", 1).unwrap();
        view.publish(vec![changes(1, &["a/1"])]);
        assert_eq!(ready(&mut watch).len(), 1);
        view.replace(20, Entries::default());
        let next = watch.next().now_or_never().flatten().unwrap();
        assert!(matches!(
            next,
            Err(StoreError::Compacted {
                asked: 2,
                oldest: 21
            })
        ));
        let mut watch = view.watch("a/", 21).unwrap();
        view.publish(vec![changes(21, &["a/2"])]);
        assert_eq!(ready(&mut watch), [of(21, &["a/2"])]);
    }

    #[test]
    fn watches_end_after_what_was_published() {
        let view = view(10);
        let mut behind = view.watch("a/", 1).unwrap();
        let mut even = view.watch("a/", 1).unwrap();
        view.publish(vec![changes(1, &["a/1"])]);
        assert_eq!(ready(&mut even), [of(1, &["a/1"])]);
        view.end_watches();
        let first = behind.next().now_or_never().flatten().unwrap();
        assert_eq!(first.unwrap().revision, 1);
        for mut watch in [behind, even] {
            let end = watch.next().now_or_never().flatten().unwrap();
            assert!(
                matches!(end, Err(StoreError::Unavailable { .. })),
                "{end:?}"
            );
        }
        assert!(view.watch("a/", 1).is_err());
    }

    #[test]
    fn a_prefix_is_forgotten_with_its_last_watch() {
        let view = view(10);
        let one = view.watch("a/", 1).unwrap();
        let other = view.watch("a/", 1).unwrap();
        let count = || view.state.read().unwrap().followed.as_ref().unwrap().len();
        assert_eq!(count(), 1);
        drop(one);
        assert_eq!(count(), 1);
        drop(other);
        assert_eq!(count(), 0);
    }
}
