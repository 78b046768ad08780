//! Connects a volume of `keel-wasi` in a worker with its writer: fetches blocks when the
//! guest needs them, commits changes, and reports the loss of the volume.
//!
//! A single task commits: after each sync of a program, otherwise about once a second. It
//! copies the changes at one instant, while nothing in the volume changes. Blocks that
//! could not be committed are recorded again.

use super::format::WriterEpoch;
use super::state::VolumeState;
use super::store::{VolumeError, VolumeStore};
use super::writer::{DirtyBlock, Writer};
use futures::{StreamExt, TryStreamExt};
use keel_net::Bytes;
use keel_wasi::volume::{
    BLOCK_BYTES, Backing, BlockReader, Fault, LocalBlocks, Pending, Promise, Stalls, Tracker,
    Volume, VolumeRecord, is_disk_full,
};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedMutexGuard, watch};

/// How long changes may stay uncommitted without a sync.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Pause after a failed request to the store.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Limit of uncommitted bytes; a program that writes faster than the store waits.
const DIRTY_BYTES_MAX: u64 = 16 << 20;
/// Blocks fetched concurrently, and read-ahead for sequential access.
const FETCHES_MAX: usize = 8;
const READ_AHEAD_BLOCKS: u64 = 15;
/// How long after a claim the machine may still be taken back by its source.
const TAKEN_BACK_WITHIN: Duration = Duration::from_secs(600);
/// Old segments deleted after a commit.
const TIDY_SEGMENTS: usize = 4;
/// How long a checkpoint waits for the store.
const HOLD_PATIENCE: Duration = Duration::from_secs(60);

type Ranges = Vec<(u64, Range<u64>)>;
type Result<T, E = VolumeError> = std::result::Result<T, E>;

/// Configuration of a backend.
pub struct BackendOptions {
    /// The volume's objects.
    pub store: VolumeStore,
    /// Runtime for its tasks.
    pub runtime: Handle,
    /// Informed while the end of the machine waits for the store.
    pub stalls: Arc<Stalls>,
    /// The volume's folder, which identifies it in `stalls`.
    pub folder: String,
    /// Called once with the reason when this machine loses the volume.
    pub lost: Box<dyn Fn(&str) + Send + Sync>,
    /// Called with a description of damage.
    pub damaged: Box<dyn Fn(&str) + Send + Sync>,
}

impl std::fmt::Debug for BackendOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeeperOptions")
            .field("store", &self.store)
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

/// Backend of one cluster volume for the machine of this process.
#[derive(Debug, Clone)]
pub struct VolumeBackend(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    options: BackendOptions,
    attached: OnceLock<Attached>,
    inner: Mutex<Inner>,
    standing: watch::Sender<ClaimState>,
    /// Whether the machine is frozen for a move: another machine may write the volume.
    paused: watch::Sender<bool>,
    wake: Notify,
    /// Held during each commit.
    writer: Arc<tokio::sync::Mutex<Option<Writer>>>,
}

#[derive(Debug)]
struct Attached {
    volume: Weak<Volume>,
    tracker: Tracker,
}

/// Whether the volume may be read and written.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ClaimState {
    /// The claim is pending; with the reason for the delay, if known.
    Opening(Option<String>),
    Claimed,
    /// The volume is lost.
    Lost(String),
}

#[derive(Debug, Default)]
struct Inner {
    /// The epoch under which it writes.
    epoch: Option<WriterEpoch>,
    /// The state committed last.
    known: Option<Arc<VolumeState>>,
    waiters: Vec<Promise>,
    /// Taken from the tracker and not committed yet.
    taken: Ranges,
    /// The volume's change count at the last commit.
    seen: Option<u64>,
    /// The last commit failed temporarily.
    unavailable: bool,
    /// File and block behind the last one fetched.
    last_fetch: (u64, u64),
    closed: bool,
}

/// Changes to commit, as of one instant.
#[derive(Debug)]
struct Capture {
    record: VolumeRecord,
    /// File, block, bytes.
    blocks: Vec<(u64, u64, Bytes)>,
    changes: u64,
}

impl VolumeBackend {
    /// A backend without a claim.
    pub fn new(options: BackendOptions) -> Self {
        VolumeBackend(Arc::new(Shared {
            options,
            attached: OnceLock::new(),
            inner: Mutex::default(),
            standing: watch::Sender::new(ClaimState::Opening(None)),
            paused: watch::Sender::new(false),
            wake: Notify::new(),
            writer: Arc::default(),
        }))
    }

    /// Checks that the volume can be read from here. Blocking.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn probe(&self) -> Result<()> {
        let options = &self.0.options;
        options.runtime.block_on(options.store.load()).map(drop)
    }

    /// Claims the volume for a machine that starts; returns its content. Blocking.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn begin(&self, epoch: WriterEpoch) -> Result<VolumeRecord> {
        self.claim_now(epoch, None)
    }

    /// Claims the volume for a restored machine and resets it to a snapshot. Blocking.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn roll_back(&self, epoch: WriterEpoch, snapshot: &str) -> Result<VolumeRecord> {
        let options = &self.0.options;
        let state = options.runtime.block_on(options.store.snapshot(snapshot))?;
        self.claim_now(epoch, Some(Arc::new(state)))
    }

    fn claim_now(
        &self,
        epoch: WriterEpoch,
        wanted: Option<Arc<VolumeState>>,
    ) -> Result<VolumeRecord> {
        let shared = &self.0;
        shared.inner().epoch = Some(epoch);
        shared.options.runtime.block_on(async {
            let mut writer = shared.writer.lock().await;
            let claimed = Writer::claim(shared.options.store.clone(), epoch, wanted).await?;
            let record = claimed.state().record();
            shared.claimed(&claimed);
            *writer = Some(claimed);
            Ok(record)
        })
    }

    /// Attaches a volume, some of whose blocks are present and uncommitted. Called before
    /// the guest runs.
    pub fn attach(&self, volume: &Arc<Volume>, local: &LocalBlocks) {
        let tracker = volume.track_changes();
        tracker.note(&local.bytes());
        let attached = Attached {
            volume: Arc::downgrade(volume),
            tracker,
        };
        if self.0.attached.set(attached).is_ok() {
            let shared = self.0.clone();
            self.0
                .options
                .runtime
                .spawn(async move { shared.run().await });
        }
    }

    /// Claims the volume under another epoch of the machine, in the background. A volume
    /// that was claimed before gets its content of then.
    pub fn claim_under(&self, epoch: WriterEpoch) {
        let mut inner = self.0.inner();
        self.0.paused.send_replace(false);
        if inner.epoch == Some(epoch) {
            return;
        }
        inner.epoch = Some(epoch);
        drop(inner);
        self.0.standing.send_if_modified(|standing| {
            let changes = !matches!(standing, ClaimState::Lost(_));
            if changes {
                *standing = ClaimState::Opening(None);
            }
            changes
        });
        self.0.wake.notify_one();
    }

    /// Pauses for a move, when the machine is frozen: nothing is committed or deleted
    /// until the machine resumes here ([`Self::claim_under`]), and a claim by another
    /// machine does not end this one.
    pub fn pause(&self) {
        self.0.paused.send_replace(true);
    }

    /// Waits until the volume is claimed. Blocking.
    ///
    /// # Errors
    /// The reason why it is not.
    pub fn wait_claimed(&self, patience: Duration) -> Result<(), String> {
        let mut standing = self.0.standing.subscribe();
        let wait = async {
            let claimed = standing.wait_for(|standing| !matches!(standing, ClaimState::Opening(_)));
            let _ = tokio::time::timeout(patience, claimed).await;
        };
        self.0.options.runtime.block_on(wait);
        match &*self.0.standing.borrow() {
            ClaimState::Claimed => Ok(()),
            ClaimState::Lost(reason) => Err(reason.clone()),
            ClaimState::Opening(reason) => {
                let name = self.0.options.store.name();
                let reason = reason.as_deref().unwrap_or("its store does not answer");
                Err(format!(
                    "volume {name:?} is not claimed here yet ({reason}); try again"
                ))
            }
        }
    }

    /// Present whole blocks that are not known to be in a segment.
    pub fn uncommitted(&self) -> Ranges {
        let Some(attached) = self.0.attached.get() else {
            return Vec::new();
        };
        // In this order and under this lock: blocks being taken are in one of them.
        let inner = self.0.inner();
        let mut changes = attached.tracker.peek();
        changes.bytes.extend(inner.taken.iter().cloned());
        changes.whole_blocks().bytes
    }

    /// Commits all changes, however long that takes; must precede the report of the
    /// machine's end. Blocking.
    pub fn finish(&self) {
        let options = &self.0.options;
        loop {
            match options.runtime.block_on(self.0.flush()) {
                Ok(()) => break,
                Err(error) if error.is_temporary() => {
                    options.stalls.begin(&options.folder, &error.to_string());
                    std::thread::sleep(RETRY_AFTER);
                }
                Err(error) => {
                    self.0.declare_lost(&error);
                    break;
                }
            }
        }
        options.stalls.written(&options.folder);
        self.0.inner().closed = true;
        self.0.wake.notify_one();
    }

    /// For a checkpoint: commits all changes, and no further ones until the guard is
    /// dropped. Blocking.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn hold(&self) -> Result<CommitHold> {
        let options = &self.0.options;
        let held = async {
            self.0.flush().await?;
            Ok(self.0.writer.clone().lock_owned().await)
        };
        let held = async { tokio::time::timeout(HOLD_PATIENCE, held).await };
        match options.runtime.block_on(held) {
            Ok(Ok(writer)) => Ok(CommitHold {
                shared: self.0.clone(),
                writer,
                frozen: None,
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(options.store.silent()),
        }
    }

    /// Deletes snapshots of deleted checkpoints. Blocking.
    ///
    /// # Errors
    /// That of the store.
    pub fn delete_snapshots(&self, names: &[String]) -> Result<()> {
        let options = &self.0.options;
        options
            .runtime
            .block_on(options.store.delete_snapshots(names))
    }
}

/// A guard that suspends the commits of a volume.
#[derive(Debug)]
pub struct CommitHold {
    shared: Arc<Shared>,
    writer: OwnedMutexGuard<Option<Writer>>,
    frozen: Option<Frozen>,
}

/// The changes of a volume as of a freeze.
#[derive(Debug)]
pub struct Frozen(Capture);

impl CommitHold {
    /// Copies the uncommitted changes; the machine is frozen.
    ///
    /// # Errors
    /// That of the host.
    pub fn freeze(&mut self) -> std::io::Result<()> {
        self.frozen = self.shared.capture()?.map(Frozen);
        Ok(())
    }

    /// Commits the copied changes and stores the state as a snapshot. Blocking.
    ///
    /// # Errors
    /// [`VolumeError`]; nothing is lost.
    pub fn keep(mut self, snapshot: &str) -> Result<()> {
        let shared = self.shared.clone();
        let frozen = self.frozen.take();
        let kept = async {
            if let Some(Frozen(captured)) = frozen {
                shared.commit(&mut self.writer, captured).await?;
            }
            match &*self.writer {
                Some(writer) => writer.snapshot(snapshot).await,
                None => Err(shared.options.store.silent()),
            }
        };
        shared.options.runtime.block_on(kept)
    }
}

impl Drop for CommitHold {
    fn drop(&mut self) {
        if self.frozen.take().is_some() {
            self.shared.restore_taken();
        }
    }
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|error| error.into_inner())
    }

    fn volume(&self) -> Option<Arc<Volume>> {
        self.attached.get()?.volume.upgrade()
    }

    fn claimed(&self, writer: &Writer) {
        self.inner().known = Some(writer.state().clone());
        self.standing.send_replace(ClaimState::Claimed);
    }

    // ── committing ──────────────────────────────────────────────────────

    /// Commits changes until the volume is dropped.
    async fn run(&self) {
        let mut claimed: Option<(WriterEpoch, Instant)> = None;
        loop {
            // An earlier wake-up counts.
            let _ = tokio::time::timeout(COMMIT_EVERY, self.wake.notified()).await;
            let Some(volume) = self.volume() else { return };
            let (waiters, idle) = {
                let mut inner = self.inner();
                if inner.closed {
                    return;
                }
                // The volume is not claimed, or may be claimed by another machine.
                if inner.epoch.is_none() || self.is_paused() {
                    continue;
                }
                let waiters = std::mem::take(&mut inner.waiters);
                let same = inner.seen == Some(volume.changes()) && inner.taken.is_empty();
                let idle = waiters.is_empty() && same && !self.has_changes();
                (waiters, idle)
            };
            drop(volume);
            if matches!(*self.standing.borrow(), ClaimState::Lost(_)) {
                waiters
                    .into_iter()
                    .for_each(|it| it.settle(Err(Fault::Lost)));
                continue;
            }
            if idle && *self.standing.borrow() == ClaimState::Claimed {
                continue;
            }
            let outcome = self.flush().await;
            self.inner().unavailable = matches!(&outcome, Err(error) if error.is_temporary());
            let fault = match &outcome {
                Ok(()) => Ok(()),
                Err(error) if error.is_temporary() => Err(Fault::Unavailable(error.to_string())),
                Err(error) => {
                    self.declare_lost(error);
                    Err(Fault::Lost)
                }
            };
            waiters.into_iter().for_each(|it| it.settle(fault.clone()));
            if let Err(error) = outcome {
                tracing::warn!(%error, "cannot commit a volume");
                tokio::time::sleep(RETRY_AFTER).await;
                continue;
            }
            // Cleaning up delays nothing; and objects that another writer may have must
            // not be deleted.
            let mut paused = self.paused.subscribe();
            tokio::select! {
                biased;
                _ = paused.wait_for(|paused| *paused) => {}
                () = self.tidy(&mut claimed) => {}
            }
        }
    }

    fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    fn has_changes(&self) -> bool {
        let attached = self.attached.get();
        attached.is_some_and(|attached| attached.tracker.noted_bytes() > 0)
    }

    /// Claims the volume if necessary, and commits the changes.
    async fn flush(&self) -> Result<()> {
        let mut writer = self.writer.lock().await;
        if let Err(error) = self.ensure_claimed(&mut writer).await {
            self.standing.send_if_modified(|standing| {
                let opening = matches!(standing, ClaimState::Opening(_));
                if opening {
                    *standing = ClaimState::Opening(Some(error.to_string()));
                }
                opening
            });
            return Err(error);
        }
        // Copying reads files, which must not block a runtime thread.
        let captured = tokio::task::block_in_place(|| self.capture());
        let captured = captured.map_err(|error| self.options.store.unreadable(&error))?;
        match captured {
            Some(captured) => self.commit(&mut writer, captured).await,
            None => Ok(()),
        }
    }

    async fn ensure_claimed(&self, writer: &mut Option<Writer>) -> Result<()> {
        let Some(epoch) = self.inner().epoch else {
            return Err(self.options.store.silent());
        };
        if writer
            .as_ref()
            .is_some_and(|writer| writer.epoch() == epoch)
        {
            return Ok(());
        }
        let wanted = writer.as_ref().map(|writer| writer.state().clone());
        let claimed = Writer::claim(self.options.store.clone(), epoch, wanted).await?;
        // Another epoch may have been requested meanwhile.
        if self.inner().epoch == Some(epoch) {
            self.claimed(&claimed);
        }
        *writer = Some(claimed);
        Ok(())
    }

    /// Takes the changes to commit, as of one instant.
    fn capture(&self) -> std::io::Result<Option<Capture>> {
        let (Some(attached), Some(volume)) = (self.attached.get(), self.volume()) else {
            return Ok(None);
        };
        let captured = volume.block_changes(|| {
            let changes = volume.changes();
            let runs = {
                let mut inner = self.inner();
                let mut taken = attached.tracker.take();
                // Changes of failed commits are included.
                taken.bytes.append(&mut inner.taken);
                let taken = taken.whole_blocks();
                inner.taken.clone_from(&taken.bytes);
                taken
            };
            let mut reader = BlockReader::new(volume.clone());
            let mut buffer = vec![0; BLOCK_BYTES as usize];
            let mut blocks = Vec::new();
            for (inode, piece) in runs.pieces() {
                let count = reader.read(inode, piece.start, &mut buffer)?;
                if count > 0 {
                    let bytes = Bytes::copy_from_slice(&buffer[..count]);
                    blocks.push((inode, piece.start / BLOCK_BYTES, bytes));
                }
            }
            Ok(Capture {
                record: volume.record(),
                blocks,
                changes,
            })
        });
        if captured.is_err() {
            self.restore_taken();
        }
        captured.map(Some)
    }

    /// Records the changes of a failed commit again.
    fn restore_taken(&self) {
        if let Some(attached) = self.attached.get() {
            let mut inner = self.inner();
            attached.tracker.note(&inner.taken);
            inner.taken.clear();
        }
    }

    async fn commit(&self, writer: &mut Option<Writer>, captured: Capture) -> Result<()> {
        let Capture {
            record,
            blocks,
            changes,
        } = captured;
        // Hashing must not block a runtime thread either.
        let dirty = tokio::task::block_in_place(|| {
            let dirty = blocks.into_iter();
            let dirty = dirty.map(|(inode, block, bytes)| DirtyBlock::new(inode, block, bytes));
            dirty.collect()
        });
        let committed = match writer {
            Some(writer) => writer.commit(record, dirty).await,
            None => Err(self.options.store.silent()),
        };
        if let Some(writer) = writer {
            // Also after a commit that failed later.
            self.inner().known = Some(writer.state().clone());
        }
        match committed {
            Ok(()) => {
                let mut inner = self.inner();
                inner.taken.clear();
                inner.seen = Some(changes);
                Ok(())
            }
            Err(error) => {
                self.restore_taken();
                Err(error)
            }
        }
    }

    /// Deletes unused objects in batches. `claimed` keeps the time of the claim.
    async fn tidy(&self, claimed: &mut Option<(WriterEpoch, Instant)>) {
        let mut writer = self.writer.lock().await;
        let epoch = self.inner().epoch;
        let Some(writer) = writer.as_mut().filter(|it| Some(it.epoch()) == epoch) else {
            return;
        };
        if let Err(error) = writer.tidy(TIDY_SEGMENTS).await {
            tracing::warn!(%error, "cannot delete unused segments");
        }
        let now = Instant::now();
        match claimed {
            Some((epoch, since)) if *epoch == writer.epoch() => {
                if now - *since > TAKEN_BACK_WITHIN {
                    writer.forget_claimed_content();
                }
            }
            _ => *claimed = Some((writer.epoch(), now)),
        }
        if !writer.needs_collection() {
            return;
        }
        match writer.collect().await {
            Ok(count) => tracing::debug!(count, "deleted unused chunks"),
            Err(error) => tracing::warn!(%error, "cannot delete unused chunks"),
        }
    }

    /// Declares the volume lost.
    fn declare_lost(&self, error: &VolumeError) {
        if self.is_paused() {
            return;
        }
        let reason = error.to_string();
        let first = self.standing.send_if_modified(|standing| {
            let first = !matches!(standing, ClaimState::Lost(_));
            if first {
                *standing = ClaimState::Lost(reason.clone());
            }
            first
        });
        if first {
            tracing::error!(reason, "a machine lost a volume");
            (self.options.lost)(&reason);
        }
    }

    // ── fetching ────────────────────────────────────────────────────────

    async fn fetch(
        &self,
        volume: &Arc<Volume>,
        inode: u64,
        blocks: Range<u64>,
    ) -> Result<(), Fault> {
        let mut standing = self.standing.subscribe();
        // After a move the claim may take a moment.
        let known = standing
            .wait_for(|standing| !matches!(standing, ClaimState::Opening(None)))
            .await
            .map(|standing| standing.clone());
        match known {
            Ok(ClaimState::Claimed) => {}
            Ok(ClaimState::Opening(Some(reason))) => return Err(Fault::Unavailable(reason)),
            Ok(ClaimState::Opening(None) | ClaimState::Lost(_)) | Err(_) => {
                return Err(Fault::Lost);
            }
        }
        let fetched = futures::stream::iter(volume.absent(inode, blocks))
            .map(|block| self.fetch_one(volume, inode, block))
            .buffer_unordered(FETCHES_MAX)
            .try_collect::<Vec<()>>();
        match fetched.await {
            Ok(_) => Ok(()),
            Err(FetchError::Disk(error)) if is_disk_full(&error) => Err(Fault::DiskFull),
            Err(FetchError::Disk(error)) => {
                let name = self.options.store.name();
                (self.options.damaged)(&format!("volume {name:?} has no room here: {error}"));
                Err(Fault::Lost)
            }
            Err(FetchError::Volume(error)) if error.is_temporary() => {
                Err(Fault::Unavailable(error.to_string()))
            }
            Err(FetchError::Volume(error)) => {
                (self.options.damaged)(&error.to_string());
                Err(Fault::Lost)
            }
        }
    }

    async fn fetch_one(
        &self,
        volume: &Arc<Volume>,
        inode: u64,
        block: u64,
    ) -> Result<(), FetchError> {
        let mut before = None;
        loop {
            let known = self.inner().known.clone();
            let chunk = known.and_then(|known| known.chunk(inode, block));
            if let Some(chunk) = chunk
                && before != Some(chunk)
            {
                before = Some(chunk);
                if let Some(bytes) = self.options.store.chunk(&chunk).await? {
                    let filled = tokio::task::block_in_place(|| volume.fill(inode, block, &bytes));
                    return filled.map_err(FetchError::Disk);
                }
            }
            // Blocks that were overwritten or truncated meanwhile are not needed.
            if volume.absent(inode, block..block + 1).is_empty() {
                return Ok(());
            }
            let known = self.inner().known.clone();
            let now = known.and_then(|known| known.chunk(inode, block));
            match now {
                Some(now) if before != Some(now) => {}
                Some(now) => return Err(self.options.store.missing_chunk(&now).into()),
                None => return Err(self.options.store.missing_block(inode, block).into()),
            }
        }
    }
}

enum FetchError {
    Volume(VolumeError),
    Disk(std::io::Error),
}

impl From<VolumeError> for FetchError {
    fn from(error: VolumeError) -> Self {
        FetchError::Volume(error)
    }
}

impl Backing for VolumeBackend {
    fn fetch(&self, volume: &Arc<Volume>, inode: u64, blocks: Range<u64>) -> Pending {
        let (pending, promise) = Pending::new();
        let blocks = {
            let mut inner = self.0.inner();
            let in_order = inner.last_fetch == (inode, blocks.start);
            let ahead = if in_order { READ_AHEAD_BLOCKS } else { 0 };
            let blocks = blocks.start..blocks.end.saturating_add(ahead);
            inner.last_fetch = (inode, blocks.end);
            blocks
        };
        let (shared, volume) = (self.0.clone(), volume.clone());
        self.0.options.runtime.spawn(async move {
            let outcome = shared.fetch(&volume, inode, blocks).await;
            promise.settle(outcome);
        });
        pending
    }

    fn sync(&self) -> Pending {
        let (pending, promise) = Pending::new();
        let lost = matches!(*self.0.standing.borrow(), ClaimState::Lost(_));
        if lost {
            promise.settle(Err(Fault::Lost));
        } else {
            self.0.inner().waiters.push(promise);
            self.0.wake.notify_one();
        }
        pending
    }

    fn backpressure(&self) -> Option<Pending> {
        let attached = self.0.attached.get()?;
        let lost = matches!(*self.0.standing.borrow(), ClaimState::Lost(_));
        let full = attached.tracker.noted_bytes() > DIRTY_BYTES_MAX;
        (lost || full || self.0.inner().unavailable).then(|| self.sync())
    }
}

#[cfg(test)]
mod tests;
