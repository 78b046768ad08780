//! Between a volume of `keel-wasi` in a worker and its writer: brings blocks when
//! the guest needs them, commits what it wrote, and says when it may not any more.
//!
//! One task commits: whenever a program syncs, else about each second. What it
//! commits it copies at one instant, while nothing in the volume changes. Blocks
//! that it took and could not commit are noted again.

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

/// How long what was written may stay uncommitted where nobody syncs.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Pause after the store did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Written and not committed; a program that is faster than its store waits.
const DIRTY_BYTES_MAX: u64 = 16 << 20;
/// Blocks that are fetched at a time, and ahead of one that reads in order.
const FETCHES_MAX: usize = 8;
const READ_AHEAD_BLOCKS: u64 = 15;
/// How long after a claim a machine may still be taken back to where it came from.
const TAKEN_BACK_WITHIN: Duration = Duration::from_secs(600);
/// Old segments that are deleted after a commit.
const TIDY_SEGMENTS: usize = 4;
/// How long a checkpoint waits for the store.
const HOLD_PATIENCE: Duration = Duration::from_secs(60);

type Ranges = Vec<(u64, Range<u64>)>;
type Result<T, E = VolumeError> = std::result::Result<T, E>;

/// What a keeper needs, and whom it tells.
pub struct BackendOptions {
    /// The volume's objects.
    pub store: VolumeStore,
    /// Where its tasks run.
    pub runtime: Handle,
    /// Is told while the machine's end waits for the store.
    pub stalls: Arc<Stalls>,
    /// The folder of the volume, by which `stalls` knows it.
    pub folder: String,
    /// Is told once why the volume is lost to this machine.
    pub lost: Box<dyn Fn(&str) + Send + Sync>,
    /// Is told of what is damaged.
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

/// Keeps one cluster volume for the machine of this process.
#[derive(Debug, Clone)]
pub struct VolumeBackend(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    options: BackendOptions,
    attached: OnceLock<Attached>,
    inner: Mutex<Inner>,
    standing: watch::Sender<ClaimState>,
    /// The machine is frozen to be given away: it may be another's to write.
    resting: watch::Sender<bool>,
    wake: Notify,
    /// Held over each commit.
    writer: Arc<tokio::sync::Mutex<Option<Writer>>>,
}

#[derive(Debug)]
struct Attached {
    volume: Weak<Volume>,
    tracker: Tracker,
}

/// Whether it may read and write.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ClaimState {
    /// It is to claim the volume, or tries; why it has not yet, if that is known.
    Opening(Option<String>),
    Claimed,
    /// Not any more.
    Lost(String),
}

#[derive(Debug, Default)]
struct Inner {
    /// Under which it writes.
    epoch: Option<WriterEpoch>,
    /// What was committed last.
    known: Option<Arc<VolumeState>>,
    waiters: Vec<Promise>,
    /// Taken from the tracker and not committed yet.
    taken: Ranges,
    /// Changes of the volume when it was committed last.
    seen: Option<u64>,
    /// The last commit failed for now.
    away: bool,
    /// File and block after the last one that was fetched.
    last_fetch: (u64, u64),
    closed: bool,
}

/// All that is to be committed, of one instant.
#[derive(Debug)]
struct Capture {
    record: VolumeRecord,
    /// File, block, bytes.
    blocks: Vec<(u64, u64, Bytes)>,
    changes: u64,
}

impl VolumeBackend {
    /// A keeper that has claimed nothing yet.
    pub fn new(options: BackendOptions) -> Self {
        VolumeBackend(Arc::new(Shared {
            options,
            attached: OnceLock::new(),
            inner: Mutex::default(),
            standing: watch::Sender::new(ClaimState::Opening(None)),
            resting: watch::Sender::new(false),
            wake: Notify::new(),
            writer: Arc::default(),
        }))
    }

    /// Whether the volume can be read from here. Blocking.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn probe(&self) -> Result<()> {
        let options = &self.0.options;
        options.runtime.block_on(options.store.load()).map(drop)
    }

    /// Claims the volume for a machine that begins; what it holds. Blocking.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn begin(&self, epoch: WriterEpoch) -> Result<VolumeRecord> {
        self.claim_now(epoch, None)
    }

    /// Claims the volume for a machine that is made of a checkpoint, and makes it
    /// what it was then. Blocking.
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

    /// Begins to keep a volume, of which these blocks are here and not committed.
    /// Before the guest runs.
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

    /// The machine goes on under another epoch: claims the volume under it, in the
    /// background. Where it was claimed before, it is made what it was then.
    pub fn claim_under(&self, epoch: WriterEpoch) {
        let mut inner = self.0.inner();
        self.0.resting.send_replace(false);
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

    /// The machine is being frozen to be given away: nothing is committed nor deleted
    /// until it goes on here ([`Self::claim_under`]), and that somebody else has
    /// claimed the volume is no reason to end it.
    pub fn rest(&self) {
        self.0.resting.send_replace(true);
    }

    /// Waits until the volume is claimed. Blocking.
    ///
    /// # Errors
    /// Why it is not.
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

    /// Whole blocks that are here and in no segment for certain.
    pub fn uncommitted(&self) -> Ranges {
        let Some(attached) = self.0.attached.get() else {
            return Vec::new();
        };
        // In this order, and under this lock: what is being taken is in one of them.
        let inner = self.0.inner();
        let mut changes = attached.tracker.peek();
        changes.bytes.extend(inner.taken.iter().cloned());
        changes.whole_blocks().bytes
    }

    /// Commits all that the machine wrote, however long that takes; its end must not
    /// be told before. Blocking.
    pub fn finish(&self) {
        let options = &self.0.options;
        loop {
            match options.runtime.block_on(self.0.flush()) {
                Ok(()) => break,
                Err(error) if error.is_away() => {
                    options.stalls.begin(&options.folder, &error.to_string());
                    std::thread::sleep(RETRY_AFTER);
                }
                Err(error) => {
                    self.0.lose(&error);
                    break;
                }
            }
        }
        options.stalls.written(&options.folder);
        self.0.inner().closed = true;
        self.0.wake.notify_one();
    }

    /// For a checkpoint: commits what there is, and nothing more until the answer is
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

    /// Deletes snapshots of checkpoints that are gone. Blocking.
    ///
    /// # Errors
    /// The store's.
    pub fn delete_snapshots(&self, names: &[String]) -> Result<()> {
        let options = &self.0.options;
        options
            .runtime
            .block_on(options.store.delete_snapshots(names))
    }
}

/// A volume that is not committed meanwhile.
#[derive(Debug)]
pub struct CommitHold {
    shared: Arc<Shared>,
    writer: OwnedMutexGuard<Option<Writer>>,
    frozen: Option<Frozen>,
}

/// What a volume was while its machine stood still.
#[derive(Debug)]
pub struct Frozen(Capture);

impl CommitHold {
    /// Copies what is not committed yet; the machine stands still.
    ///
    /// # Errors
    /// The host's.
    pub fn freeze(&mut self) -> std::io::Result<()> {
        self.frozen = self.shared.capture()?.map(Frozen);
        Ok(())
    }

    /// Commits what was copied, and keeps the volume as it was then under a name.
    /// Blocking.
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
            self.shared.untake();
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

    /// Commits whenever there is something, until the volume is gone.
    async fn run(&self) {
        let mut claimed: Option<(WriterEpoch, Instant)> = None;
        loop {
            // (A permit that was given before counts.)
            let _ = tokio::time::timeout(COMMIT_EVERY, self.wake.notified()).await;
            let Some(volume) = self.volume() else { return };
            let (waiters, idle) = {
                let mut inner = self.inner();
                if inner.closed {
                    return;
                }
                // Nobody's yet, or maybe not any more.
                if inner.epoch.is_none() || self.is_resting() {
                    continue;
                }
                let waiters = std::mem::take(&mut inner.waiters);
                let same = inner.seen == Some(volume.changes()) && inner.taken.is_empty();
                let idle = waiters.is_empty() && same && !self.has_noted();
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
            self.inner().away = matches!(&outcome, Err(error) if error.is_away());
            let fault = match &outcome {
                Ok(()) => Ok(()),
                Err(error) if error.is_away() => Err(Fault::Away(error.to_string())),
                Err(error) => {
                    self.lose(error);
                    Err(Fault::Lost)
                }
            };
            waiters.into_iter().for_each(|it| it.settle(fault.clone()));
            if let Err(error) = outcome {
                tracing::warn!(%error, "a volume is not committed");
                tokio::time::sleep(RETRY_AFTER).await;
                continue;
            }
            // Nobody waits for that; and what somebody else may have now is not this
            // one's to delete.
            let mut resting = self.resting.subscribe();
            tokio::select! {
                biased;
                _ = resting.wait_for(|resting| *resting) => {}
                () = self.tidy(&mut claimed) => {}
            }
        }
    }

    fn is_resting(&self) -> bool {
        *self.resting.borrow()
    }

    fn has_noted(&self) -> bool {
        let attached = self.attached.get();
        attached.is_some_and(|attached| attached.tracker.noted_bytes() > 0)
    }

    /// Claims the volume where that is to be done, and commits what there is.
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
        // Copying reads files: not on a thread that others need.
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
        // It may be another one's turn already.
        if self.inner().epoch == Some(epoch) {
            self.claimed(&claimed);
        }
        *writer = Some(claimed);
        Ok(())
    }

    /// Takes what is to be committed, as it is at one instant.
    fn capture(&self) -> std::io::Result<Option<Capture>> {
        let (Some(attached), Some(volume)) = (self.attached.get(), self.volume()) else {
            return Ok(None);
        };
        let captured = volume.hold_still(|| {
            let changes = volume.changes();
            let runs = {
                let mut inner = self.inner();
                let mut taken = attached.tracker.take();
                // What was taken in vain before comes again.
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
            self.untake();
        }
        captured.map(Some)
    }

    /// Notes again what was taken.
    fn untake(&self) {
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
        // Neither is hashing for such a thread.
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
            // Of a commit that failed later, too.
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
                self.untake();
                Err(error)
            }
        }
    }

    /// Deletes what nobody needs, some at a time. Remembers since when the volume is
    /// claimed.
    async fn tidy(&self, claimed: &mut Option<(WriterEpoch, Instant)>) {
        let mut writer = self.writer.lock().await;
        let epoch = self.inner().epoch;
        let Some(writer) = writer.as_mut().filter(|it| Some(it.epoch()) == epoch) else {
            return;
        };
        if let Err(error) = writer.tidy(TIDY_SEGMENTS).await {
            tracing::warn!(%error, "segments that nobody needs stay");
        }
        let now = Instant::now();
        match claimed {
            Some((epoch, since)) if *epoch == writer.epoch() => {
                if now - *since > TAKEN_BACK_WITHIN {
                    writer.forget_found();
                }
            }
            _ => *claimed = Some((writer.epoch(), now)),
        }
        if !writer.is_littered() {
            return;
        }
        match writer.collect().await {
            Ok(count) => tracing::debug!(count, "chunks that nobody needs are deleted"),
            Err(error) => tracing::warn!(%error, "chunks that nobody needs stay"),
        }
    }

    /// Nothing can be done with the volume any more.
    fn lose(&self, error: &VolumeError) {
        if self.is_resting() {
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
            tracing::error!(reason, "a volume is lost to its machine");
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
        // After a move it may take a moment.
        let known = standing
            .wait_for(|standing| !matches!(standing, ClaimState::Opening(None)))
            .await
            .map(|standing| standing.clone());
        match known {
            Ok(ClaimState::Claimed) => {}
            Ok(ClaimState::Opening(Some(reason))) => return Err(Fault::Away(reason)),
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
            Err(FetchError::Volume(error)) if error.is_away() => {
                Err(Fault::Away(error.to_string()))
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
            // Overwritten or cut away meanwhile, it is not needed any more.
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

    fn behind(&self) -> Option<Pending> {
        let attached = self.0.attached.get()?;
        let lost = matches!(*self.0.standing.borrow(), ClaimState::Lost(_));
        let full = attached.tracker.noted_bytes() > DIRTY_BYTES_MAX;
        (lost || full || self.0.inner().away).then(|| self.sync())
    }
}

#[cfg(test)]
mod tests;
