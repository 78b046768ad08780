//! The objects of one volume: put, read, list, delete. Async; for a worker's own runtime,
//! and for tasks of an agent that may wait.

use super::format::{ChunkRef, FormatError, Segment, WriterEpoch};
use super::state::VolumeState;
use crate::object_storage::{ObjectStorage, StorageLocationError};
use futures::StreamExt;
use keel_cluster::MachineName;
use keel_net::Bytes;
use keel_store::clock::unix_ms;
use keel_wasi::volume::{VolumeLimits, VolumeRecord};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutPayload};
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// Segments read concurrently.
const READ_AHEAD: usize = 8;
/// Attempts to read a log that is being compacted.
const LOAD_ATTEMPTS: u32 = 8;
/// Time limit for one step of listing or deleting: longer than the retries of a request
/// to an S3-compatible store. Access to a directory may hang for ever.
const STEP_PATIENCE: Duration = Duration::from_secs(60);
/// Segments probed behind the last one of a listing, which may be outdated.
const PROBES_MAX: u64 = 10_000;

/// Why an operation on a cluster volume failed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The location is invalid or not accessible from this node.
    #[error("volume {volume:?}: {source}")]
    Location {
        volume: MachineName,
        source: StorageLocationError,
    },
    /// The store does not answer, or refuses.
    #[error("volume {volume:?}: its store {place} fails: {reason}")]
    Store {
        volume: MachineName,
        place: String,
        /// The store's error.
        reason: String,
    },
    /// The volume's objects are missing.
    #[error(
        "volume {volume:?} is not in {place}: what was there has vanished, or this node does not see the same place (put it back, or mount it)"
    )]
    Vanished { volume: MachineName, place: String },
    /// A stored object is invalid.
    #[error("volume {volume:?} cannot be used: object {object} {reason}")]
    Damaged {
        volume: MachineName,
        /// Name of the object.
        object: String,
        reason: String,
    },
    /// A newer writer has claimed the volume.
    #[error(
        "volume {volume:?} was claimed under epoch {by}, this machine's is {own}: it is not written any more"
    )]
    Fenced {
        volume: MachineName,
        /// The epoch of this writer.
        own: WriterEpoch,
        /// The newer epoch.
        by: WriterEpoch,
    },
    /// A volume with this name exists.
    #[error(
        "there is a volume {volume:?} in {place} already (use another name or place, or remove what is there)"
    )]
    Exists { volume: MachineName, place: String },
    /// Other writers claim it continuously.
    #[error("volume {volume:?} is being claimed by others all the time; try again")]
    Contended { volume: MachineName },
    /// The snapshot does not exist.
    #[error(
        "volume {volume:?} has no snapshot {snapshot:?}: the checkpoint cannot be restored with it"
    )]
    NoSnapshot {
        volume: MachineName,
        snapshot: String,
    },
}

impl VolumeError {
    /// Whether a later retry may succeed.
    pub fn is_temporary(&self) -> bool {
        matches!(
            self,
            VolumeError::Location { .. }
                | VolumeError::Store { .. }
                | VolumeError::Vanished { .. }
                | VolumeError::Contended { .. }
        )
    }
}

/// Result of a conditional put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Put {
    Done,
    Taken,
}

/// The state that a volume's log leads to.
#[derive(Debug, Clone)]
pub(super) struct Loaded {
    pub(super) head: Segment,
    pub(super) state: VolumeState,
    /// Number of segments since the last base, and their size in bytes with it.
    pub(super) segments: u64,
    pub(super) bytes: u64,
    /// Unused segments before that, oldest first.
    pub(super) old: VecDeque<u64>,
}

/// A summary of a volume's store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSummary {
    /// Number of the last segment.
    pub head: u64,
    /// Writer of the last segment.
    pub writer: WriterEpoch,
    /// Time of the last segment, in milliseconds since 1970-01-01 UTC.
    pub written_unix_ms: u64,
    /// Number of files, directories and links.
    pub inodes: u64,
    /// Bytes of all chunks of its files.
    pub bytes: u64,
    /// Snapshots of checkpoints.
    pub snapshots: Vec<String>,
}

/// The objects of one volume.
#[derive(Debug, Clone)]
pub struct VolumeStore {
    name: MachineName,
    /// Id of the volume.
    id: [u8; 16],
    place: ObjectStorage,
    /// Time limit for one step of listing or deleting.
    pub(super) patience: Duration,
}

impl VolumeStore {
    /// The volume of this name and id at a location.
    pub fn new(name: MachineName, id: [u8; 16], place: ObjectStorage) -> Self {
        VolumeStore {
            name,
            id,
            place,
            patience: STEP_PATIENCE,
        }
    }

    /// As [`Self::new`], at a URL. Blocking.
    ///
    /// # Errors
    /// [`VolumeError::Location`].
    pub fn open(name: &MachineName, id: [u8; 16], url: &str) -> Result<Self, VolumeError> {
        let place = ObjectStorage::open(url).map_err(|source| VolumeError::Location {
            volume: name.clone(),
            source,
        })?;
        Ok(Self::new(name.clone(), id, place))
    }

    pub fn name(&self) -> &MachineName {
        &self.name
    }

    fn path(&self, parts: &[&str]) -> Path {
        let folder = format!("{}-{:032x}", self.name, u128::from_be_bytes(self.id));
        let mut all = vec![folder.as_str()];
        all.extend(parts);
        self.place.path(&all)
    }

    fn segment_path(&self, number: u64) -> Path {
        self.path(&["log", &format!("{number:020}")])
    }

    fn chunk_path(&self, chunk: &ChunkRef) -> Path {
        let (folder, name) = chunk.place();
        self.path(&["chunks", &folder, &name])
    }

    fn snapshot_path(&self, snapshot: &str) -> Path {
        self.path(&["snapshots", snapshot])
    }

    fn failed(&self, error: &object_store::Error) -> VolumeError {
        VolumeError::Store {
            volume: self.name.clone(),
            place: self.place.url().to_owned(),
            reason: error.to_string(),
        }
    }

    fn damaged(&self, object: &Path, reason: impl ToString) -> VolumeError {
        VolumeError::Damaged {
            volume: self.name.clone(),
            object: object.to_string(),
            reason: reason.to_string(),
        }
    }

    /// The error for missing objects.
    pub(super) fn vanished(&self) -> VolumeError {
        VolumeError::Vanished {
            volume: self.name.clone(),
            place: self.place.url().to_owned(),
        }
    }

    /// The error for a time limit exceeded.
    pub(super) fn silent(&self) -> VolumeError {
        VolumeError::Store {
            volume: self.name.clone(),
            place: self.place.url().to_owned(),
            reason: "it does not answer".into(),
        }
    }

    /// The error for local data that cannot be read.
    pub(super) fn unreadable(&self, error: &std::io::Error) -> VolumeError {
        VolumeError::Damaged {
            volume: self.name.clone(),
            object: "in this node's folder".into(),
            reason: format!("cannot be read: {error}"),
        }
    }

    /// The error for a block with data that was never stored.
    pub(super) fn missing_block(&self, inode: u64, block: u64) -> VolumeError {
        VolumeError::Damaged {
            volume: self.name.clone(),
            object: format!("block {block} of file {inode}"),
            reason: "is in no segment".into(),
        }
    }

    async fn create_object(&self, path: &Path, bytes: Bytes) -> Result<Put, VolumeError> {
        let store = self.place.store();
        let put = store.put_opts(path, PutPayload::from(bytes), PutMode::Create.into());
        match put.await {
            Ok(_) => Ok(Put::Done),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(Put::Taken),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// `None` if it does not exist.
    async fn read(&self, path: &Path) -> Result<Option<Bytes>, VolumeError> {
        match self.place.read(path).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(&error)),
        }
    }

    fn decode(&self, path: &Path, bytes: &[u8]) -> Result<Segment, VolumeError> {
        let segment =
            Segment::decode(bytes).map_err(|error: FormatError| self.damaged(path, error))?;
        if segment.volume != self.id {
            return Err(self.damaged(path, "belongs to another volume of its name"));
        }
        Ok(segment)
    }

    // ── making and removing ─────────────────────────────────────────────

    /// Creates an empty volume.
    ///
    /// # Errors
    /// [`VolumeError::Exists`] and those of the store.
    pub async fn create(&self, limits: VolumeLimits) -> Result<(), VolumeError> {
        let now = unix_ms();
        let root = VolumeRecord::empty(now.saturating_mul(1_000_000));
        let whole = VolumeState::new(root, Default::default()).whole();
        let first = Segment {
            volume: self.id,
            number: 1,
            writer: WriterEpoch::default(),
            nonce: rand::random(),
            written_unix_ms: now,
            is_base: true,
            bytes_max: limits.bytes_max,
            inodes_max: limits.inodes_max,
            next_inode: whole.next_inode,
            nodes: whole.nodes,
            removed: whole.removed,
            blocks: whole.blocks,
        };
        let exists = || VolumeError::Exists {
            volume: self.name.clone(),
            place: self.place.url().to_owned(),
        };
        // The log of a compacted volume does not begin with its first segment.
        if !self.numbers().await?.is_empty() {
            return Err(exists());
        }
        match self.put_segment(&first).await? {
            Put::Done => Ok(()),
            Put::Taken => Err(exists()),
        }
    }

    /// Deletes the volume: the log first, without which all other objects are void.
    ///
    /// # Errors
    /// Those of the store; the rest can be deleted by another call.
    pub async fn destroy(&self) -> Result<(), VolumeError> {
        for folder in ["log", "snapshots", "chunks"] {
            let objects = self.list(&[folder]).await?;
            self.delete(objects).await?;
        }
        Ok(())
    }

    async fn list(&self, folder: &[&str]) -> Result<Vec<Path>, VolumeError> {
        let mut listed = self.place.store().list(Some(&self.path(folder)));
        let mut found = Vec::new();
        while let Some(object) = self.in_time(listed.next()).await? {
            found.push(object.map_err(|error| self.failed(&error))?.location);
        }
        Ok(found)
    }

    async fn in_time<T>(&self, step: impl Future<Output = T>) -> Result<T, VolumeError> {
        let step = tokio::time::timeout(self.patience, step).await;
        step.map_err(|_| self.silent())
    }

    pub(super) async fn delete(&self, objects: Vec<Path>) -> Result<(), VolumeError> {
        let store = self.place.store();
        let objects = futures::stream::iter(objects.into_iter().map(Ok)).boxed();
        let mut deleted = store.delete_stream(objects);
        while let Some(outcome) = self.in_time(deleted.next()).await? {
            match outcome {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(self.failed(&error)),
            }
        }
        Ok(())
    }

    // ── the log ─────────────────────────────────────────────────────────

    async fn numbers(&self) -> Result<BTreeSet<u64>, VolumeError> {
        let listed = self.list(&["log"]).await?;
        let number = |path: &Path| path.filename()?.parse().ok();
        Ok(listed.iter().filter_map(number).collect())
    }

    /// A segment; `None` if it does not exist.
    pub(super) async fn segment(&self, number: u64) -> Result<Option<Segment>, VolumeError> {
        Ok(self
            .sized_segment(number)
            .await?
            .map(|(segment, _)| segment))
    }

    async fn sized_segment(&self, number: u64) -> Result<Option<(Segment, u64)>, VolumeError> {
        let path = self.segment_path(number);
        let Some(bytes) = self.read(&path).await? else {
            return Ok(None);
        };
        let segment = self.decode(&path, &bytes)?;
        if segment.number != number {
            return Err(self.damaged(&path, format!("is segment {}", segment.number)));
        }
        Ok(Some((segment, bytes.len() as u64)))
    }

    /// Puts a segment where none exists.
    pub(super) async fn put_segment(&self, segment: &Segment) -> Result<Put, VolumeError> {
        let path = self.segment_path(segment.number);
        let bytes = segment
            .encode()
            .map_err(|error| self.damaged(&path, error))?;
        self.create_object(&path, bytes).await
    }

    /// Whether exactly this segment is stored.
    pub(super) async fn has(&self, segment: &Segment) -> Result<bool, VolumeError> {
        let there = self.segment(segment.number).await?;
        Ok(there.is_some_and(|there| there.nonce == segment.nonce))
    }

    /// Reads the log from its last base on.
    pub(super) async fn load(&self) -> Result<Loaded, VolumeError> {
        let mut gap = None;
        for _ in 0..LOAD_ATTEMPTS {
            match self.try_load().await? {
                Ok(loaded) => return Ok(loaded),
                Err(number) => gap = Some(number),
            }
        }
        match gap {
            Some(number) => Err(self.damaged(&self.segment_path(number), "is missing")),
            None => Err(self.vanished()),
        }
    }

    /// Returns the number of a missing segment, if any: it may have been compacted just
    /// now.
    async fn try_load(&self) -> Result<Result<Loaded, u64>, VolumeError> {
        let numbers = self.numbers().await?;
        let Some(last) = numbers.last().copied() else {
            return Err(self.vanished());
        };
        let mut found = Vec::new();
        // Newest first, until a base is found.
        let mut segments = futures::stream::iter((1..=last).rev())
            .map(|number| async move { (number, self.sized_segment(number).await) })
            .buffered(READ_AHEAD);
        while let Some((number, segment)) = segments.next().await {
            let Some(segment) = segment? else {
                return Ok(Err(number));
            };
            let is_base = segment.0.is_base;
            found.push(segment);
            if is_base {
                break;
            }
        }
        drop(segments);
        found.reverse();
        for number in last + 1..last.saturating_add(PROBES_MAX) {
            match self.sized_segment(number).await? {
                Some(segment) => found.push(segment),
                None => break,
            }
        }
        let mut state = VolumeState::default();
        let (mut segments, mut bytes) = (0, 0);
        for (segment, size) in &found {
            if segment.is_base {
                (segments, bytes) = (0, 0);
            }
            state.apply(segment);
            segments += 1;
            bytes += size;
        }
        let Some((head, _)) = found.pop() else {
            return Err(self.vanished());
        };
        let first = head.number + 1 - segments;
        let old = numbers.range(..first).copied().collect();
        let limits = VolumeLimits {
            bytes_max: head.bytes_max,
            inodes_max: head.inodes_max,
        };
        state
            .check(limits)
            .map_err(|reason| self.damaged(&self.segment_path(head.number), reason))?;
        Ok(Ok(Loaded {
            head,
            state,
            segments,
            bytes,
            old,
        }))
    }

    /// Deletes a segment.
    pub(super) async fn delete_segment(&self, number: u64) -> Result<(), VolumeError> {
        match self.place.store().delete(&self.segment_path(number)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed(&error)),
        }
    }

    // ── chunks ──────────────────────────────────────────────────────────

    /// Stores a chunk, unless it exists.
    pub(super) async fn put_chunk(
        &self,
        chunk: &ChunkRef,
        bytes: Bytes,
    ) -> Result<(), VolumeError> {
        let path = self.chunk_path(chunk);
        self.create_object(&path, bytes).await.map(drop)
    }

    /// Whether it is a directory, which may disappear or be replaced at any moment, for
    /// example when a file system is unmounted.
    pub(super) fn can_vanish(&self) -> bool {
        matches!(self.place.file(&self.path(&["log"])), Ok(Some(_)))
    }

    /// Stores the chunks that are missing; whether there were any.
    pub(super) async fn complete(&self, chunks: &[(ChunkRef, Bytes)]) -> Result<bool, VolumeError> {
        let mut any = false;
        for (chunk, bytes) in chunks {
            match self.place.store().head(&self.chunk_path(chunk)).await {
                Ok(_) => {}
                Err(object_store::Error::NotFound { .. }) => {
                    self.put_chunk(chunk, bytes.clone()).await?;
                    any = true;
                }
                Err(error) => return Err(self.failed(&error)),
            }
        }
        Ok(any)
    }

    /// Reads a chunk and verifies it; `None` if it does not exist.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub async fn chunk(&self, chunk: &ChunkRef) -> Result<Option<Bytes>, VolumeError> {
        let path = self.chunk_path(chunk);
        match self.read(&path).await? {
            Some(bytes) if chunk.describes(&bytes) => Ok(Some(bytes)),
            Some(_) => Err(self.damaged(&path, "is damaged: its checksum is wrong")),
            None => Ok(None),
        }
    }

    /// The error for a missing chunk.
    pub(super) fn missing_chunk(&self, chunk: &ChunkRef) -> VolumeError {
        self.damaged(&self.chunk_path(chunk), "is missing")
    }

    /// Chunks of this writer and earlier ones that are neither in `used` nor in a
    /// snapshot: later writers may need chunks of their own.
    pub(super) async fn unused_chunks(
        &self,
        mut used: BTreeSet<ChunkRef>,
        writer: WriterEpoch,
    ) -> Result<Vec<Path>, VolumeError> {
        // Listed before the snapshots: a snapshot created meanwhile only has chunks that
        // are in use now or newer than this listing.
        let mut listed = self.list(&["chunks"]).await?;
        for snapshot in self.snapshots().await? {
            // A snapshot deleted meanwhile needs no chunks.
            if let Some(state) = self.read_snapshot(&snapshot).await? {
                used.extend(state.chunks());
            }
        }
        let used: BTreeSet<Path> = used.iter().map(|chunk| self.chunk_path(chunk)).collect();
        listed.retain(|path| {
            let by = path.filename().and_then(ChunkRef::writer_of);
            by.is_some_and(|by| by <= writer) && !used.contains(path)
        });
        Ok(listed)
    }

    // ── snapshots ───────────────────────────────────────────────────────

    /// Names of all snapshots.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn snapshots(&self) -> Result<Vec<String>, VolumeError> {
        let listed = self.list(&["snapshots"]).await?;
        let names = listed.iter().filter_map(Path::filename);
        Ok(names.map(str::to_owned).collect())
    }

    /// Stores the whole volume under a name.
    pub(super) async fn put_snapshot(
        &self,
        snapshot: &str,
        whole: &Segment,
    ) -> Result<(), VolumeError> {
        let path = self.snapshot_path(snapshot);
        let bytes = whole.encode().map_err(|error| self.damaged(&path, error))?;
        let store = self.place.store();
        let put = store.put(&path, PutPayload::from(bytes));
        put.await.map(drop).map_err(|error| self.failed(&error))
    }

    async fn read_snapshot(&self, snapshot: &str) -> Result<Option<VolumeState>, VolumeError> {
        let path = self.snapshot_path(snapshot);
        let Some(bytes) = self.read(&path).await? else {
            return Ok(None);
        };
        let segment = self.decode(&path, &bytes)?;
        if !segment.is_base {
            return Err(self.damaged(&path, "is not a snapshot"));
        }
        let mut state = VolumeState::default();
        state.apply(&segment);
        let limits = VolumeLimits {
            bytes_max: segment.bytes_max,
            inodes_max: segment.inodes_max,
        };
        let checked = state.check(limits);
        checked.map_err(|reason| self.damaged(&path, reason))?;
        Ok(Some(state))
    }

    /// The content of the volume in a snapshot.
    ///
    /// # Errors
    /// [`VolumeError::NoSnapshot`] and others.
    pub async fn snapshot(&self, snapshot: &str) -> Result<VolumeState, VolumeError> {
        let found = self.read_snapshot(snapshot).await?;
        found.ok_or_else(|| VolumeError::NoSnapshot {
            volume: self.name.clone(),
            snapshot: snapshot.to_owned(),
        })
    }

    /// Deletes snapshots; missing ones count as deleted.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn delete_snapshots(&self, names: &[String]) -> Result<(), VolumeError> {
        let paths = names.iter().map(|name| self.snapshot_path(name));
        self.delete(paths.collect()).await
    }

    /// A summary of the stored objects.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub async fn summary(&self) -> Result<VolumeSummary, VolumeError> {
        let loaded = self.load().await?;
        let bytes = loaded.state.chunks().map(|chunk| u64::from(chunk.bytes));
        Ok(VolumeSummary {
            head: loaded.head.number,
            writer: loaded.head.writer,
            written_unix_ms: loaded.head.written_unix_ms,
            inodes: loaded.state.nodes.len() as u64,
            bytes: bytes.sum(),
            snapshots: self.snapshots().await?,
        })
    }
}
