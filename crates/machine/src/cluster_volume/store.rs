//! The objects of one volume: putting, reading, listing, deleting. Async; for a
//! worker's own runtime, and for tasks of an agent that may wait.

use super::format::{ChunkRef, FormatError, Segment, WriterEpoch};
use super::state::VolumeState;
use crate::storage_location::{StorageLocation, StorageLocationError};
use futures::StreamExt;
use keel_cluster::MachineName;
use keel_cluster::clock::unix_ms;
use keel_net::Bytes;
use keel_wasi::volume::{VolumeLimits, VolumeRecord};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutPayload};
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// Segments that are read at a time.
const READ_AHEAD: usize = 8;
/// Attempts to read a log that is being compacted.
const LOAD_ATTEMPTS: u32 = 8;
/// How long one step of listing or deleting may take: longer than a request to an
/// S3-compatible store is repeated. A directory may hang for ever.
const STEP_PATIENCE: Duration = Duration::from_secs(60);
/// Segments behind the last one that a list showed: lists may be old.
const PROBES_MAX: u64 = 10_000;

/// Why something about a cluster volume was not done.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The place is none, or not seen here.
    #[error("volume {volume:?}: {source}")]
    Location {
        /// The volume.
        volume: MachineName,
        /// Why.
        source: StorageLocationError,
    },
    /// The store does not answer, or refuses.
    #[error("volume {volume:?}: its store {place} fails: {reason}")]
    Store {
        /// The volume.
        volume: MachineName,
        /// Its place.
        place: String,
        /// What the store says.
        reason: String,
    },
    /// There is nothing.
    #[error(
        "volume {volume:?} is not in {place}: what was there has vanished, or this node does not see the same place (put it back, or mount it)"
    )]
    Vanished {
        /// The volume.
        volume: MachineName,
        /// Its place.
        place: String,
    },
    /// Something stored is not what it should be.
    #[error("volume {volume:?} cannot be used: object {object} {reason}")]
    Damaged {
        /// The volume.
        volume: MachineName,
        /// Which object.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another one has it.
    #[error(
        "volume {volume:?} was claimed under epoch {by}, this machine's is {own}: it is not written any more"
    )]
    Fenced {
        /// The volume.
        volume: MachineName,
        /// The epoch of who asked.
        own: WriterEpoch,
        /// The newer one.
        by: WriterEpoch,
    },
    /// There is one already.
    #[error(
        "there is a volume {volume:?} in {place} already (use another name or place, or remove what is there)"
    )]
    Exists {
        /// The volume.
        volume: MachineName,
        /// The place.
        place: String,
    },
    /// It is being claimed by others all the time.
    #[error("volume {volume:?} is being claimed by others all the time; try again")]
    Contended {
        /// The volume.
        volume: MachineName,
    },
    /// No such snapshot.
    #[error(
        "volume {volume:?} has no snapshot {snapshot:?}: the checkpoint cannot be restored with it"
    )]
    NoSnapshot {
        /// The volume.
        volume: MachineName,
        /// The snapshot.
        snapshot: String,
    },
}

impl VolumeError {
    /// Whether trying again later may help.
    pub fn is_away(&self) -> bool {
        matches!(
            self,
            VolumeError::Location { .. }
                | VolumeError::Store { .. }
                | VolumeError::Vanished { .. }
                | VolumeError::Contended { .. }
        )
    }
}

/// What a conditional put found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Put {
    Done,
    Taken,
}

/// What a volume's log leads to.
#[derive(Debug, Clone)]
pub(super) struct Loaded {
    pub(super) head: Segment,
    pub(super) state: VolumeState,
    /// Segments since the last base, and their bytes with it.
    pub(super) segments: u64,
    pub(super) bytes: u64,
    /// Segments before that, oldest first: nobody needs them.
    pub(super) old: VecDeque<u64>,
}

/// What is in a volume's store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSummary {
    /// The last segment's number.
    pub head: u64,
    /// Who wrote it.
    pub writer: WriterEpoch,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub written_unix_ms: u64,
    /// Files, directories and links.
    pub inodes: u64,
    /// Bytes of all chunks that its files have.
    pub bytes: u64,
    /// Snapshots of checkpoints.
    pub snapshots: Vec<String>,
}

/// The objects of one volume.
#[derive(Debug, Clone)]
pub struct VolumeStore {
    name: MachineName,
    /// Tells it from others that had its name.
    id: [u8; 16],
    place: StorageLocation,
    /// For one step of listing or deleting.
    pub(super) patience: Duration,
}

impl VolumeStore {
    /// The volume of this name and id at a place.
    pub fn new(name: MachineName, id: [u8; 16], place: StorageLocation) -> Self {
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
        let place = StorageLocation::open(url).map_err(|source| VolumeError::Location {
            volume: name.clone(),
            source,
        })?;
        Ok(Self::new(name.clone(), id, place))
    }

    /// Its name.
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

    /// That there is nothing where it should be.
    pub(super) fn vanished(&self) -> VolumeError {
        VolumeError::Vanished {
            volume: self.name.clone(),
            place: self.place.url().to_owned(),
        }
    }

    /// That it does not answer in time.
    pub(super) fn silent(&self) -> VolumeError {
        VolumeError::Store {
            volume: self.name.clone(),
            place: self.place.url().to_owned(),
            reason: "it does not answer".into(),
        }
    }

    /// That what is to be stored cannot be read here.
    pub(super) fn unreadable(&self, error: &std::io::Error) -> VolumeError {
        VolumeError::Damaged {
            volume: self.name.clone(),
            object: "in this node's folder".into(),
            reason: format!("cannot be read: {error}"),
        }
    }

    /// That a block which has data was never stored.
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

    /// `None` if there is none.
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
            return Err(self.damaged(path, "is of another volume that had its name"));
        }
        Ok(segment)
    }

    // ── making and removing ─────────────────────────────────────────────

    /// Makes an empty volume.
    ///
    /// # Errors
    /// [`VolumeError::Exists`] and the store's.
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
        // What a volume that was compacted has is not its first segment.
        if !self.numbers().await?.is_empty() {
            return Err(exists());
        }
        match self.put_segment(&first).await? {
            Put::Done => Ok(()),
            Put::Taken => Err(exists()),
        }
    }

    /// Deletes all of it: the log first, without which the rest is nothing.
    ///
    /// # Errors
    /// The store's; what is left can be deleted by asking again.
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

    /// A segment; `None` if there is none.
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

    /// Puts a segment where none is.
    pub(super) async fn put_segment(&self, segment: &Segment) -> Result<Put, VolumeError> {
        let path = self.segment_path(segment.number);
        let bytes = segment
            .encode()
            .map_err(|error| self.damaged(&path, error))?;
        self.create_object(&path, bytes).await
    }

    /// Whether just this segment is in its place.
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

    /// The number of a segment that is missing, if one is: it may have been
    /// compacted away just now.
    async fn try_load(&self) -> Result<Result<Loaded, u64>, VolumeError> {
        let numbers = self.numbers().await?;
        let Some(last) = numbers.last().copied() else {
            return Err(self.vanished());
        };
        let mut found = Vec::new();
        // Newest first, until there is a whole one.
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

    /// Stores a chunk, unless it is there.
    pub(super) async fn put_chunk(
        &self,
        chunk: &ChunkRef,
        bytes: Bytes,
    ) -> Result<(), VolumeError> {
        let path = self.chunk_path(chunk);
        self.create_object(&path, bytes).await.map(drop)
    }

    /// Whether it is a directory, which may be gone, or another, from one moment to the
    /// next (a file system that is unmounted).
    pub(super) fn can_vanish(&self) -> bool {
        matches!(self.place.file(&self.path(&["log"])), Ok(Some(_)))
    }

    /// Stores those of the chunks that are not there; whether there were any.
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

    /// Reads a chunk and checks it; `None` if there is none.
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

    /// That a chunk which is needed is not there.
    pub(super) fn missing_chunk(&self, chunk: &ChunkRef) -> VolumeError {
        self.damaged(&self.chunk_path(chunk), "is missing")
    }

    /// All chunks but these and those that a snapshot has, of this writer and those
    /// before it: whoever came after it may need what it stored itself.
    pub(super) async fn unused_chunks(
        &self,
        mut used: BTreeSet<ChunkRef>,
        writer: WriterEpoch,
    ) -> Result<Vec<Path>, VolumeError> {
        // Before the snapshots: one that is made meanwhile has nothing that is not in
        // use now, or newer than this list.
        let mut listed = self.list(&["chunks"]).await?;
        for snapshot in self.snapshots().await? {
            // One that was deleted meanwhile needs nothing.
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
    /// The store's.
    pub async fn snapshots(&self) -> Result<Vec<String>, VolumeError> {
        let listed = self.list(&["snapshots"]).await?;
        let names = listed.iter().filter_map(Path::filename);
        Ok(names.map(str::to_owned).collect())
    }

    /// Keeps all of a volume under a name.
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
            return Err(self.damaged(&path, "is no snapshot"));
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

    /// What the volume was when a snapshot was made.
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

    /// Deletes snapshots; those that are not there count as deleted.
    ///
    /// # Errors
    /// The store's.
    pub async fn delete_snapshots(&self, names: &[String]) -> Result<(), VolumeError> {
        let paths = names.iter().map(|name| self.snapshot_path(name));
        self.delete(paths.collect()).await
    }

    /// What is there.
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
