//! Snapshots: the whole state machine as of one entry of the log, as a file of the voter and as
//! what a voter that is far behind gets.
//!
//! The file has a magic number, the BLAKE3 hash of the rest, the metadata and the state. It is
//! replaced as a whole, so after a crash it is the older one or the newer one. A file that does
//! not match its hash is refused, never overwritten.
//!
//! To make one must not hold up the log: it is encoded at a low priority, and written in pieces that
//! are flushed one by one, so that no flush of the log waits behind all of it. Voters make theirs at
//! different times (start.rs).

use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use keel_net::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use super::open_error::OpenError;
use super::types::{LogId, Membership, SnapshotMeta};
use crate::encoding::{self, WireError};
use crate::interface::{KeyValue, LeaseId};
use crate::model::{Lease, Model};
use crate::wire::Entry;

const MAGIC: &[u8; 8] = b"keelsnp1";
/// Bytes of a file that are flushed at once.
const FLUSH_BYTES: usize = 1 << 20;
/// Nice value of the thread that makes a snapshot, and of those that somebody waits for.
const NICE: i32 = 10;
const NICE_AWAITED: i32 = 0;

/// The state machine's content.
#[derive(Serialize, Deserialize)]
struct Content {
    revision: u64,
    lease_next: u64,
    /// Number and time to live, in milliseconds.
    leases: Vec<(u64, u64)>,
    entries: Vec<Entry>,
}

/// Encodes a model.
pub(super) fn encode(model: &Model) -> Result<Vec<u8>, WireError> {
    let leases = model.leases.iter();
    let mut leases: Vec<(u64, u64)> = leases.map(|(id, held)| (id.0, held.ttl_ms)).collect();
    leases.sort_unstable();
    let content = Content {
        revision: model.revision,
        lease_next: model.lease_next,
        leases,
        entries: model
            .entries
            .values()
            .map(|entry| Entry::from(KeyValue::clone(entry)))
            .collect(),
    };
    encoding::encode("a snapshot of the store", &content)
}

/// The model that [`encode`] wrote.
pub(super) fn decode(bytes: &[u8], bytes_max: u64) -> Result<Model, WireError> {
    let content: Content = encoding::decode("a snapshot of the store", bytes)?;
    let mut model = Model {
        revision: content.revision,
        lease_next: content.lease_next,
        bytes_max,
        ..Model::default()
    };
    for (id, ttl_ms) in content.leases {
        let held = Lease {
            ttl_ms,
            ..Lease::default()
        };
        model.leases.insert(LeaseId(id), held);
    }
    for entry in content.entries {
        model.load(entry.into());
    }
    Ok(model)
}

/// A snapshot as read from its file.
pub(super) struct Saved {
    pub(super) meta: SnapshotMeta,
    pub(super) state: Cursor<Vec<u8>>,
}

/// What the file of the newest snapshot has.
#[derive(Debug, Default)]
pub(super) struct SavedSnapshot {
    /// The last entry in it.
    pub(super) last: Option<LogId>,
    /// The group as of that entry.
    pub(super) membership: Membership,
    /// A newer one could not be written.
    pub(super) has_failed: bool,
}

impl SavedSnapshot {
    fn contains(&mut self, meta: &SnapshotMeta) {
        self.last = meta.last_log_id;
        self.membership = meta.last_membership.clone();
    }
}

/// Where a snapshot is kept.
pub(super) trait SnapshotPlace: std::fmt::Debug + Send + Sync {
    /// Replaces what is there by the concatenation of `pieces`, as a whole and durably.
    fn replace(&self, pieces: &[&[u8]]) -> std::io::Result<()>;

    /// What is there, if anything.
    fn read(&self) -> std::io::Result<Option<Vec<u8>>>;

    /// From now on nothing is replaced, also by work that goes on: another may own what is there.
    fn close(&self) {}

    /// Does what reads or writes there, without holding up an async worker; at a low priority where
    /// nobody waits for it.
    fn run(&self, is_awaited: bool, work: Box<dyn FnOnce() + Send>) -> BoxFuture<'static, ()>;
}

/// A file, next to which there is room for its successor.
#[derive(Debug)]
struct FilePlace {
    path: PathBuf,
    /// Held while the file is replaced by one that is complete.
    is_closed: Mutex<bool>,
}

impl SnapshotPlace for FilePlace {
    fn replace(&self, pieces: &[&[u8]]) -> std::io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let new = self.path.with_extension("new");
        // One that somebody still writes, who was closed, is not the same file then.
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = std::fs::File::create_new(&new)?;
        for piece in pieces.iter().flat_map(|piece| piece.chunks(FLUSH_BYTES)) {
            file.write_all(piece)?;
            if piece.len() == FLUSH_BYTES {
                file.sync_data()?;
            }
        }
        file.sync_all()?;
        let is_closed = self.is_closed.lock();
        if *is_closed.unwrap_or_else(PoisonError::into_inner) {
            return Err(std::io::Error::other("the store was closed"));
        }
        std::fs::rename(&new, &self.path)?;
        std::fs::File::open(folder)?.sync_all()
    }

    fn read(&self) -> std::io::Result<Option<Vec<u8>>> {
        match std::fs::read(&self.path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn close(&self) {
        let is_closed = self.is_closed.lock();
        *is_closed.unwrap_or_else(PoisonError::into_inner) = true;
    }

    fn run(&self, is_awaited: bool, work: Box<dyn FnOnce() + Send>) -> BoxFuture<'static, ()> {
        let nice = if is_awaited { NICE_AWAITED } else { NICE };
        let thread = std::thread::Builder::new().name("snapshot".into());
        let started = thread.spawn(move || {
            // It has the priority of the thread that starts it, which is high.
            if let Err(error) = rustix::process::setpriority_process(None, nice) {
                tracing::warn!(%error, "cannot set the priority of a thread for a snapshot");
            }
            work();
        });
        if let Err(error) = started {
            tracing::error!(%error, "no thread for a snapshot");
        }
        // The work says when it is done.
        Box::pin(std::future::ready(()))
    }
}

/// The file of the newest snapshot. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct SnapshotFile {
    place: Arc<dyn SnapshotPlace>,
    saved: Arc<watch::Sender<SavedSnapshot>>,
    /// Held while the file is written: one that is built and one that is received may meet.
    writing: Arc<Mutex<()>>,
}

impl SnapshotFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self::at(Arc::new(FilePlace {
            path,
            is_closed: Mutex::default(),
        }))
    }

    pub(super) fn at(place: Arc<dyn SnapshotPlace>) -> Self {
        Self {
            place,
            saved: Arc::default(),
            writing: Arc::default(),
        }
    }

    /// From now on the file is another's: what is still being made is not put there.
    pub(super) fn close(&self) {
        self.place.close();
    }

    /// What the file has: earlier entries may leave the log.
    pub(super) fn saved(&self) -> watch::Receiver<SavedSnapshot> {
        self.saved.subscribe()
    }

    /// Replaces the snapshot, unless the file has a newer one.
    ///
    /// # Errors
    /// The file system's; then the older one stays.
    pub(super) fn save(&self, meta: &SnapshotMeta, state: &[u8]) -> std::io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let last = meta.last_log_id;
        if self.saved.borrow().last > last {
            return Ok(());
        }
        let written = self.write(meta, state);
        self.saved.send_modify(|saved| match written {
            Ok(()) => saved.contains(meta),
            Err(_) => saved.has_failed = true,
        });
        written
    }

    fn write(&self, meta: &SnapshotMeta, state: &[u8]) -> std::io::Result<()> {
        let meta =
            encoding::encode("the head of a snapshot", meta).map_err(std::io::Error::other)?;
        let meta_bytes = (meta.len() as u64).to_le_bytes();
        let mut hash = blake3::Hasher::new();
        hash.update(&meta_bytes).update(&meta).update(state);
        let hash = hash.finalize();
        self.place
            .replace(&[MAGIC, hash.as_bytes(), &meta_bytes, &meta, state])
    }

    /// Does what reads or writes the file, without holding up an async worker; at a low priority
    /// where nobody waits for it.
    ///
    /// # Errors
    /// That of `work`, or that there is no thread for it.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        is_awaited: bool,
        work: impl FnOnce(&Self) -> std::io::Result<T> + Send + 'static,
    ) -> std::io::Result<T> {
        let (done, result) = oneshot::channel();
        let file = self.clone();
        let work = move || drop(done.send(work(&file)));
        self.place.run(is_awaited, Box::new(work)).await;
        let gone = |_| Err(std::io::Error::other("its thread is gone; see the log"));
        result.await.unwrap_or_else(gone)
    }

    /// The snapshot, if there is one.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub(super) fn load(&self) -> Result<Option<Saved>, OpenError> {
        let read = self.place.read().map_err(OpenError::unusable)?;
        let Some(bytes) = read else {
            return Ok(None);
        };
        let damaged = || OpenError::damaged("its snapshot is damaged");
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(damaged)?;
        let (hash, rest) = rest.split_at_checked(32).ok_or_else(damaged)?;
        if blake3::hash(rest).as_bytes() != hash {
            return Err(damaged());
        }
        let (meta_bytes, rest) = rest.split_first_chunk::<8>().ok_or_else(damaged)?;
        let meta_bytes = usize::try_from(u64::from_le_bytes(*meta_bytes)).map_err(|_| damaged())?;
        let (meta, state) = rest.split_at_checked(meta_bytes).ok_or_else(damaged)?;
        let meta: SnapshotMeta = encoding::decode("the head of a snapshot", meta)?;
        self.saved.send_if_modified(|saved| {
            let is_newer = saved.last < meta.last_log_id;
            if is_newer {
                saved.contains(&meta);
            }
            is_newer
        });
        let state = Cursor::new(state.to_vec());
        Ok(Some(Saved { meta, state }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(index: u64) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: Some(LogId::new(openraft::CommittedLeaderId::new(1, 1), index)),
            ..SnapshotMeta::default()
        }
    }

    /// A store is closed and opened again while a snapshot of its earlier life is still written.
    #[test]
    fn a_file_that_was_closed_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("snapshot");
        let (earlier, later) = (SnapshotFile::new(path.clone()), SnapshotFile::new(path));
        let state = encode(&Model::default()).unwrap();
        earlier.save(&meta(5), &state).unwrap();
        earlier.close();
        later.save(&meta(9), &state).unwrap();
        let refused = earlier.save(&meta(7), &state).unwrap_err();
        assert_eq!(refused.to_string(), "the store was closed");
        let found = later.load().unwrap().unwrap();
        assert_eq!(found.meta.last_log_id, meta(9).last_log_id);
    }

    /// One that is built takes long; one that is received meanwhile may be of a later entry, and the log
    /// before that is gone.
    #[test]
    fn an_older_snapshot_does_not_replace_a_newer_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = SnapshotFile::new(folder.path().join("snapshot"));
        let state = encode(&Model::default()).unwrap();
        file.save(&meta(9), &state).unwrap();
        file.save(&meta(7), &state).unwrap();
        let newest = meta(9).last_log_id;
        assert_eq!(file.load().unwrap().unwrap().meta.last_log_id, newest);
        assert_eq!(file.saved().borrow().last, newest);
        file.save(&meta(12), &state).unwrap();
        let newest = meta(12).last_log_id;
        assert_eq!(file.load().unwrap().unwrap().meta.last_log_id, newest);
    }

    #[test]
    fn what_is_longer_than_a_flush_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let file = SnapshotFile::new(folder.path().join("snapshot"));
        for bytes in [
            FLUSH_BYTES - 1,
            FLUSH_BYTES,
            2 * FLUSH_BYTES,
            2 * FLUSH_BYTES + 1,
        ] {
            let state: Vec<u8> = (0..bytes).map(|at| at as u8 ^ (at >> 8) as u8).collect();
            file.save(&meta(bytes as u64), &state).unwrap();
            assert_eq!(file.load().unwrap().unwrap().state.into_inner(), state);
        }
    }
}
