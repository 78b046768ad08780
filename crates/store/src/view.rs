//! The readers' view: durable entries and recent changes.
//!
//! The writer publishes here after the changes are durable, so a read never sees state that a crash
//! could revert. Watches read the history themselves at their own pace; a slow one costs nothing
//! and gets [`StoreError::Compacted`] once the history has dropped its position.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use futures::StreamExt;
use tokio::sync::watch;

use super::model::{Entries, check_prefix, limit, size, under};
use crate::interface::{
    Change, Changes, KeyValue, LIST_BYTES_MAX, LIST_ENTRIES_MAX, Listing, Revision, StoreError,
    Watch,
};

/// Revisions that a watch scans while it holds the lock.
const SCAN_REVISIONS_MAX: usize = 1024;

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
    /// Error of a failed store.
    failed: Option<String>,
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
                failed: None,
            }),
            history_revisions_max,
            history_bytes_max,
        }
    }

    /// Adds changes that are durable now, in order.
    pub(super) fn publish(&self, all: Vec<Changes>) {
        let mut state = self.write();
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
            state.history_bytes += bytes;
            state.history.push_back((Arc::new(changes), bytes));
        }
        while state.history.len() > self.history_revisions_max
            || state.history_bytes > self.history_bytes_max
        {
            let Some((_, bytes)) = state.history.pop_front() else {
                break;
            };
            state.history_bytes -= bytes;
        }
    }

    /// Replaces everything by a snapshot; changes before it are not known.
    pub(super) fn replace(&self, revision: Revision, entries: Entries) {
        let mut state = self.write();
        state.revision = revision;
        state.entries = entries;
        state.history.clear();
        state.history_bytes = 0;
    }

    /// Fails the store: reads could be stale from now on.
    pub(super) fn fail(&self, reason: &str) {
        self.write().failed.get_or_insert_with(|| reason.into());
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

    /// `published` ticks after each [`View::publish`]; when its sender is
    /// dropped, the store is closed.
    pub(super) fn watch(
        self: &Arc<Self>,
        prefix: &str,
        from: Revision,
        published: watch::Receiver<()>,
    ) -> Result<Watch, StoreError> {
        check_prefix(prefix)?;
        // Revision 0 is the empty store, without changes.
        let next = from.max(1);
        self.read()?.scan(prefix, next, 0)?;
        let cursor = Cursor {
            view: Arc::clone(self),
            prefix: prefix.into(),
            next,
            published,
            over: false,
        };
        let changes = futures::stream::unfold(cursor, |mut cursor| async move {
            let item = cursor.advance().await?;
            cursor.over = item.is_err();
            Some((item, cursor))
        });
        Ok(Watch::new(changes.boxed()))
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
    /// The first changes under `prefix` from revision `next` on, looking at
    /// `revisions_max` revisions; and the revision to go on from.
    fn scan(
        &self,
        prefix: &str,
        next: Revision,
        revisions_max: usize,
    ) -> Result<(Revision, Option<Changes>), StoreError> {
        let oldest = self.revision + 1 - self.history.len() as u64;
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
        let skipped = (next - oldest) as usize;
        let mut next = next;
        for (all, _) in self.history.iter().skip(skipped).take(revisions_max) {
            next = all.revision + 1;
            let matching = all.changes.iter().filter(|c| c.key().starts_with(prefix));
            let changes: Vec<Change> = matching.cloned().collect();
            if !changes.is_empty() {
                let revision = all.revision;
                return Ok((next, Some(Changes { revision, changes })));
            }
        }
        Ok((next, None))
    }
}

struct Cursor {
    view: Arc<View>,
    prefix: String,
    next: Revision,
    published: watch::Receiver<()>,
    over: bool,
}

impl Cursor {
    async fn advance(&mut self) -> Option<Result<Changes, StoreError>> {
        if self.over {
            return None;
        }
        loop {
            self.published.mark_unchanged();
            let before = self.next;
            let scanned = self
                .view
                .read()
                .and_then(|state| state.scan(&self.prefix, self.next, SCAN_REVISIONS_MAX));
            match scanned {
                Ok((next, found)) => {
                    self.next = next;
                    if let Some(changes) = found {
                        return Some(Ok(changes));
                    }
                }
                Err(error) => return Some(Err(error)),
            }
            if self.next == before && self.published.changed().await.is_err() {
                // A final scan, for changes published before the end.
                let last = self
                    .view
                    .read()
                    .and_then(|state| state.scan(&self.prefix, self.next, usize::MAX));
                return Some(match last {
                    Ok((next, Some(changes))) => {
                        self.next = next;
                        Ok(changes)
                    }
                    Ok((_, None)) => Err(StoreError::unavailable("the store was closed")),
                    Err(error) => Err(error),
                });
            }
        }
    }
}
