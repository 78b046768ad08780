//! The log of a voter: in memory for readers, in redb for restarts.
//!
//! ```text
//! openraft ──append, vote, truncate, purge──▶ memory, then the writer thread
//!    ▲                                                    │ all that queued up
//!    └──────────── callbacks ◀── commit + fsync ◀─────────┘ meanwhile: one commit
//! ```
//!
//! Async workers never wait for the disk. All entries since the newest snapshot are in memory too:
//! a follower that is behind is served without the disk. If a commit fails, the content of the
//! disk is unknown; every request after it fails until the store is reopened.
//!
//! A leader's entries are sent while they are written, see [`flushes`](super::flushes).

#![expect(
    clippy::result_large_err,
    reason = "openraft's traits return its errors"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{EntryPayload, OptionalSend, RaftLogId, RaftLogReader};
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    TableDefinition,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot, watch};

use super::flushes::{Flush, Flushes};
use super::open_error::OpenError;
use super::snapshot::SavedSnapshot;
use super::types::{LogId, Membership, StorageError, StorageIoError, Types, Vote};
use crate::encoding;

const ENTRIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

/// Version of the tables. Version 1 had the entries of the store, without a log.
const FORMAT: u64 = 2;

/// Said of a file that redb repaired.
const REPAIRED: &str = "its log was damaged, and lacks its last changes now that it is repaired";

/// Bytes of entries that are sent to a follower at once.
const READ_BYTES_MAX: usize = 1 << 20;

type Entry = openraft::impls::Entry<Types>;

/// Approximate bytes of an entry.
fn size(entry: &Entry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(proposal) => proposal.bytes() + 64,
        EntryPayload::Blank | EntryPayload::Membership(_) => 256,
    }
}

/// The membership in an entry, if there is one.
fn membership_of(entry: &Entry) -> Option<Membership> {
    match &entry.payload {
        EntryPayload::Membership(group) => Some(Membership::new(Some(entry.log_id), group.clone())),
        EntryPayload::Blank | EntryPayload::Normal(_) => None,
    }
}

/// The log, as `openraft` uses it. Clones share it.
#[derive(Clone)]
pub(super) struct Log {
    /// The voter's number in the group.
    id: u64,
    state: Arc<Mutex<State>>,
    /// What is on disk.
    pub(super) flushes: Flushes,
    writes: mpsc::UnboundedSender<Write>,
    /// What the snapshot's file has.
    saved: watch::Receiver<SavedSnapshot>,
}

#[derive(Default)]
pub(super) struct State {
    entries: BTreeMap<u64, Entry>,
    bytes: usize,
    purged: Option<LogId>,
    vote: Option<Vote>,
    /// The newest in the entries. Without any, that of the snapshot counts.
    membership: Membership,
    /// How often entries of a former leader were removed in favour of another's.
    truncations: u64,
}

impl State {
    /// The newest membership in the entries, if there is one.
    fn membership_of_entries(&self) -> Option<Membership> {
        self.entries.values().rev().find_map(membership_of)
    }

    /// Entries from `start` to before `end`, as many as are sent at once: always from `start` on.
    fn entries_to_send(&self, start: u64, end: u64) -> Vec<Entry> {
        let mut found = Vec::new();
        let mut bytes = 0;
        for (expected, (index, entry)) in (start..).zip(self.entries.range(start..end)) {
            bytes += size(entry);
            if *index != expected || (bytes > READ_BYTES_MAX && !found.is_empty()) {
                break;
            }
            found.push(entry.clone());
        }
        found
    }
}

/// How `openraft` reads what one leader sends to one follower.
///
/// A leader that was replaced ends this a moment later. Meanwhile, as a follower, its log may lose
/// what was about to be sent: its beginning to a snapshot, its end to the new leader. `openraft`
/// sends what it is given, after the entry that it has in mind; the follower, which may not know the
/// new leader, would have a gap in its log, or entries of two leaders. Nothing is given then, and a
/// message without entries does no harm.
#[derive(Clone)]
pub(super) struct LogReader {
    log: Log,
    /// Those of the log when this was made; a leader never truncates.
    truncations: u64,
}

pub(super) enum Write {
    Append(Vec<(u64, Vec<u8>)>, Flush),
    Meta(&'static str, Vec<u8>, Done),
    Truncate(u64, Done),
    /// Removes entries to an index, inclusive, and records that.
    Purge(u64, Vec<u8>, Done),
    Stop,
}

type Done = oneshot::Sender<std::io::Result<()>>;

/// Ends the writer thread when dropped, and closes the file.
pub(super) struct Writer {
    writes: mpsc::UnboundedSender<Write>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.writes.send(Write::Stop).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// An opened log.
pub(super) struct Opened {
    pub(super) log: Log,
    pub(super) disk: Disk,
    /// What the disk has to write.
    pub(super) writes: mpsc::UnboundedReceiver<Write>,
    /// This node's number in the group.
    pub(super) id: u64,
    /// The last entry that is only in the snapshot.
    pub(super) purged: Option<LogId>,
}

impl Log {
    /// Opens the log in the file `path`. One that does not exist is created for the voter `new`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the file.
    pub(super) fn open(
        path: &Path,
        new: Option<u64>,
        saved: watch::Receiver<SavedSnapshot>,
    ) -> Result<Opened, OpenError> {
        // redb panics on some forms of corruption.
        let opening = AssertUnwindSafe(|| Disk::open(path, new));
        let loaded = std::panic::catch_unwind(opening)
            .unwrap_or_else(|_| Err(OpenError::damaged("its log cannot be read")))?;
        Ok(Self::of(loaded, saved))
    }

    /// The log that a disk has.
    pub(super) fn of(
        (disk, id, state): (Disk, u64, State),
        saved: watch::Receiver<SavedSnapshot>,
    ) -> Opened {
        let (sender, writes) = mpsc::unbounded_channel();
        let last = state.entries.last_key_value().map(|(index, _)| *index);
        let last = last.or(state.purged.map(|purged| purged.index));
        Opened {
            purged: state.purged,
            log: Log {
                id,
                flushes: Flushes::new(last),
                state: Arc::new(Mutex::new(state)),
                writes: sender,
                saved,
            },
            disk,
            writes,
            id,
        }
    }

    /// Whether another process has the file open.
    pub(super) fn is_in_use(path: &Path) -> bool {
        let opening = AssertUnwindSafe(|| Database::open(path));
        let opened = std::panic::catch_unwind(opening);
        matches!(opened, Ok(Err(DatabaseError::DatabaseAlreadyOpen)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the entries in memory.
    pub(super) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// The last entry's term and index; `None` if there never was one.
    pub(super) fn last_id(&self) -> Option<LogId> {
        let state = self.lock();
        let last = state.entries.last_key_value();
        last.map(|(_, entry)| *entry.get_log_id()).or(state.purged)
    }

    /// Whether this voter leads a group in which nothing is committed without another voter.
    fn needs_others(&self, state: &State) -> bool {
        let leads = state
            .vote
            .is_some_and(|vote| vote.committed && vote.leader_id.node_id == self.id);
        let saved = self.saved.borrow();
        let newest = match saved.membership.log_id() > state.membership.log_id() {
            true => &saved.membership,
            false => &state.membership,
        };
        let groups = newest.membership().get_joint_config();
        let is_enough = |group: &BTreeSet<u64>| group.len() == 1 && group.contains(&self.id);
        leads && !groups.iter().all(is_enough)
    }

    async fn write(&self, write: impl FnOnce(Done) -> Write) -> Result<(), StorageError> {
        let (done, written) = oneshot::channel();
        let gone = || std::io::Error::other("the thread of the store's log ended");
        let sent = self.writes.send(write(done)).map_err(|_| gone());
        let written = match sent {
            Ok(()) => written.await.unwrap_or_else(|_| Err(gone())),
            Err(error) => Err(error),
        };
        written.map_err(|error| StorageIoError::write(&error).into())
    }
}

fn encoded(value: &impl Serialize) -> Result<Vec<u8>, StorageError> {
    encoding::encode("an entry of the log", value)
        .map_err(|error| StorageIoError::write_logs(&error).into())
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        let bounds: (Bound<u64>, Bound<u64>) =
            (range.start_bound().cloned(), range.end_bound().cloned());
        let state = self.lock();
        Ok(state
            .entries
            .range(bounds)
            .map(|(_, e)| e.clone())
            .collect())
    }
}

impl RaftLogReader<Types> for LogReader {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        self.log.try_get_log_entries(range).await
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, StorageError> {
        let state = self.log.lock();
        Ok(match state.truncations == self.truncations {
            true => state.entries_to_send(start, end),
            false => Vec::new(),
        })
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, StorageError> {
        Ok(LogState {
            last_log_id: self.last_id(),
            last_purged_log_id: self.lock().purged,
        })
    }

    async fn get_log_reader(&mut self) -> LogReader {
        LogReader {
            log: self.clone(),
            truncations: self.lock().truncations,
        }
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        // See `as_follower`.
        let bytes = encoded(&as_follower(*vote, self.id))?;
        self.lock().vote = Some(*vote);
        self.write(|done| Write::Meta("vote", bytes, done)).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        Ok(self.lock().vote)
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: LogFlushed<Types>,
    ) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut records = Vec::new();
        let is_sent_early = {
            let mut state = self.lock();
            for entry in entries {
                let index = entry.get_log_id().index;
                records.push((index, encoded(&entry)?));
                state.bytes += size(&entry);
                if let Some(membership) = membership_of(&entry) {
                    state.membership = membership;
                }
                if let Some(old) = state.entries.insert(index, entry) {
                    state.bytes -= size(&old);
                }
            }
            self.needs_others(&state)
        };
        let last = records.last().map(|(index, _)| *index);
        let mut flush = self.flushes.begin(last, Some(callback));
        if is_sent_early {
            flush.tell_early();
        }
        if let Err(mpsc::error::SendError(Write::Append(_, flush))) =
            self.writes.send(Write::Append(records, flush))
        {
            flush.finish(Err("the thread of the store's log ended".into()));
        }
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        {
            let mut state = self.lock();
            state.truncations += 1;
            let removed = state.entries.split_off(&log_id.index);
            state.bytes -= removed.values().map(size).sum::<usize>();
            if state.membership.log_id().is_some_and(|it| it >= log_id) {
                state.membership = state.membership_of_entries().unwrap_or_default();
            }
        }
        self.write(|done| Write::Truncate(log_id.index, done))
            .await?;
        self.flushes.truncated(log_id.index);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let bytes = encoded(&log_id)?;
        // A received snapshot is written by another task. Nothing leaves the log before it is in
        // the file, or a loss of power in between would leave neither.
        let has_it = |saved: &SavedSnapshot| saved.last >= Some(log_id);
        let saved = self.saved.wait_for(|it| it.has_failed || has_it(it)).await;
        if !saved.is_ok_and(|saved| has_it(&saved)) {
            let lacks = std::io::Error::other("the snapshot was not written");
            return Err(StorageIoError::write(&lacks).into());
        }
        {
            let mut state = self.lock();
            state.purged = Some(log_id);
            if state
                .membership
                .log_id()
                .is_some_and(|it| it.index <= log_id.index)
            {
                // The snapshot's group counts, also where another leader's was in these entries.
                state.membership = Membership::default();
            }
            let kept = state.entries.split_off(&(log_id.index + 1));
            let removed = std::mem::replace(&mut state.entries, kept);
            state.bytes -= removed.values().map(size).sum::<usize>();
        }
        self.write(|done| Write::Purge(log_id.index, bytes, done))
            .await?;
        self.flushes.purged(log_id.index);
        Ok(())
    }
}

/// The file of a log.
pub(super) struct Disk {
    database: Database,
}

impl Disk {
    fn open(path: &Path, new: Option<u64>) -> Result<(Self, u64, State), OpenError> {
        if new.is_none() && !path.exists() {
            return Err(match path.parent().is_some_and(Path::exists) {
                true => OpenError::damaged("its log is missing"),
                false => OpenError::unusable("there is no store"),
            });
        }
        let mark = mark_of(path);
        if mark.exists() {
            return Err(OpenError::damaged(REPAIRED));
        }
        let opened = Self::check(Database::create(path), new)?;
        if opened.is_none() {
            // A voter that forgot its last vote could vote twice: whoever opens it again must know.
            std::fs::write(&mark, REPAIRED).map_err(OpenError::unusable)?;
        }
        opened.ok_or_else(|| OpenError::damaged(REPAIRED))
    }

    /// What a file has; `None` if redb had to repair it.
    pub(super) fn check(
        opened: Result<Database, DatabaseError>,
        new: Option<u64>,
    ) -> Result<Option<(Self, u64, State)>, OpenError> {
        let mut database = opened?;
        if !database.check_integrity()? {
            return Ok(None);
        }
        let disk = Self { database };
        let (id, state) = disk.load(new).map_err(OpenError::of_tables)?;
        Ok(Some((disk, id, state)))
    }

    fn load(&self, new: Option<u64>) -> Result<(u64, State), Box<dyn std::error::Error>> {
        let write = self.database.begin_write()?;
        let id: u64;
        {
            // Version 1 had numbers here.
            let mut meta = match write.open_table(META) {
                Ok(meta) => meta,
                Err(redb::TableError::TableTypeMismatch { .. }) => {
                    return Err("it is of format 1, this keel reads format 2: \
                                use the version that wrote it"
                        .into());
                }
                Err(error) => return Err(error.into()),
            };
            write.open_table(ENTRIES)?;
            let found = meta.get("format")?.map(|v| v.value().to_vec());
            match found {
                Some(found) => {
                    let found: u64 = encoding::decode("the format", &found)?;
                    if found != FORMAT {
                        return Err(format!(
                            "it is of format {found}, this keel reads format {FORMAT}: \
                             use the version that wrote it"
                        )
                        .into());
                    }
                }
                None => {
                    let new = new.ok_or_else(|| OpenError::damaged("its log is empty"))?;
                    meta.insert(
                        "format",
                        encoding::encode("the format", &FORMAT)?.as_slice(),
                    )?;
                    meta.insert("id", encoding::encode("an id", &new)?.as_slice())?;
                }
            }
            let record = meta.get("id")?;
            let record = record.ok_or_else(|| OpenError::damaged("it has no number"))?;
            id = encoding::decode("an id", record.value())?;
        }
        write.commit()?;
        let read = self.database.begin_read()?;
        let meta = read.open_table(META)?;
        let mut state = State {
            purged: value(&meta, "purged")?,
            vote: value(&meta, "vote")?.map(|vote| as_follower(vote, id)),
            ..State::default()
        };
        let entries = read.open_table(ENTRIES)?;
        tracing::debug!(entries = entries.len()?, "reading the store's log");
        let first = state.purged.map_or(0, |purged| purged.index + 1);
        for (expected, item) in (first..).zip(entries.iter()?) {
            let (index, record) = item?;
            if index.value() != expected {
                let missing = format!("entry {expected} of its log is missing");
                return Err(OpenError::damaged(missing).into());
            }
            let entry: Entry = encoding::decode("an entry of the log", record.value())?;
            state.bytes += size(&entry);
            state.entries.insert(index.value(), entry);
        }
        state.membership = state.membership_of_entries().unwrap_or_default();
        Ok((id, state))
    }

    /// Writes on a thread of its own until it is told to stop, or until a write fails.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub(super) fn write_on_thread(
        self,
        log: &Log,
        mut writes: mpsc::UnboundedReceiver<Write>,
    ) -> std::io::Result<Writer> {
        let write_all = move || {
            let mut goes_on = true;
            while goes_on && let Some(first) = writes.blocking_recv() {
                goes_on = self.write(queued(first, &mut writes)).finish();
            }
        };
        let thread = std::thread::Builder::new().name("keel-store".into());
        Ok(Writer {
            thread: Some(thread.spawn(write_all)?),
            writes: log.writes.clone(),
        })
    }

    /// Writes all of these, or nothing. Nobody is told before [`Written::finish`].
    pub(super) fn write(&self, batch: Vec<Write>) -> Written {
        let committing = AssertUnwindSafe(|| self.commit(&batch));
        let result = std::panic::catch_unwind(committing)
            .unwrap_or_else(|_| Err("redb panicked".into()))
            .map_err(|error| error.to_string());
        Written { batch, result }
    }

    fn commit(&self, batch: &[Write]) -> Result<(), Box<dyn std::error::Error>> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(redb::Durability::Immediate)?;
        {
            let mut entries = transaction.open_table(ENTRIES)?;
            let mut meta = transaction.open_table(META)?;
            for write in batch {
                match write {
                    Write::Append(records, _) => {
                        for (index, record) in records {
                            entries.insert(index, record.as_slice())?;
                        }
                    }
                    Write::Meta(name, value, _) => {
                        meta.insert(name, value.as_slice())?;
                    }
                    Write::Truncate(from, _) => entries.retain_in(*from.., |_, _| false)?,
                    Write::Purge(to, value, _) => {
                        meta.insert("purged", value.as_slice())?;
                        entries.retain_in(..=*to, |_, _| false)?;
                    }
                    Write::Stop => {}
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

/// A write, and all others that wait behind it.
pub(super) fn queued(first: Write, writes: &mut mpsc::UnboundedReceiver<Write>) -> Vec<Write> {
    let more = std::iter::from_fn(|| writes.try_recv().ok());
    std::iter::once(first).chain(more).collect()
}

/// Writes that are on disk, or failed.
#[must_use]
pub(super) struct Written {
    batch: Vec<Write>,
    result: Result<(), String>,
}

impl Written {
    /// Tells those who wait for them; whether further ones may follow.
    pub(super) fn finish(self) -> bool {
        if let Err(reason) = &self.result {
            tracing::error!(reason, "the store cannot write; it serves no more");
        }
        let mut goes_on = self.result.is_ok();
        for write in self.batch {
            match write {
                Write::Append(_, flush) => flush.finish(self.result.clone()),
                Write::Meta(_, _, done) | Write::Truncate(_, done) | Write::Purge(_, _, done) => {
                    let result = self.result.clone().map_err(std::io::Error::other);
                    drop(done.send(result));
                }
                Write::Stop => goes_on = false,
            }
        }
        goes_on
    }
}

/// The vote of a voter as it is on disk: a leader that is restarted is one no more. `openraft`
/// would let it lead on in its term, and give entries the numbers of others that it sent in that term
/// and lost. (Versions before this one wrote it as it was.)
fn as_follower(mut vote: Vote, id: u64) -> Vote {
    vote.committed &= vote.leader_id.node_id != id;
    vote
}

/// Says that the log in this file was damaged, and may lack its end.
fn mark_of(path: &Path) -> PathBuf {
    path.with_extension("damaged")
}

fn value<T: DeserializeOwned>(
    meta: &redb::ReadOnlyTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<Option<T>, Box<dyn std::error::Error>> {
    let Some(record) = meta.get(name)? else {
        return Ok(None);
    };
    Ok(Some(encoding::decode(
        "an entry of the log",
        record.value(),
    )?))
}

#[cfg(test)]
mod tests;
