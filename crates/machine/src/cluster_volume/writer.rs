//! The one who writes to a volume: claims it, commits what changed, compacts the
//! log. Async, no threads, no clock but for what a segment says of its age.

use super::format::{ChunkRef, Segment, WriterEpoch};
use super::state::{BlockMap, Difference, VolumeState};
use super::store::{Put, VolumeError, VolumeStore};
use futures::{StreamExt, TryStreamExt};
use keel_cluster::clock::unix_ms;
use keel_net::Bytes;
use keel_wasi::volume::{NodeBody, VolumeRecord};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Chunks that are stored at a time.
const CHUNKS_IN_FLIGHT: usize = 16;
/// Attempts to claim against others that do so at the same time.
const CLAIM_ATTEMPTS: u32 = 32;
/// Segments after which a whole one is written, and how many times as long as the
/// whole they may become before.
const SEGMENTS_MAX: u64 = 128;
const GROWTH_MAX: u64 = 4;
const GROWTH_BYTES_MIN: u64 = 1 << 20;
/// Chunks that nobody needs and that are not worth a look at all.
const GARBAGE_MIN: u64 = 1024;
/// Chunks that are deleted before it is looked again whether it may.
const DELETED_AT_A_TIME: usize = 256;

/// A block that was written.
#[derive(Debug, Clone)]
pub struct DirtyBlock {
    inode: u64,
    block: u64,
    bytes: Bytes,
    hash: [u8; 32],
}

impl DirtyBlock {
    /// A block of a file, by their numbers, with its bytes up to the file's end.
    /// Hashes them, which takes its time where there are many.
    pub fn new(inode: u64, block: u64, bytes: Bytes) -> Self {
        DirtyBlock {
            inode,
            block,
            hash: *blake3::hash(&bytes).as_bytes(),
            bytes,
        }
    }
}

/// Chunks that were put for a segment.
type NewChunks = Vec<(ChunkRef, Bytes)>;

/// A segment whose put had no answer: it may be there or not.
#[derive(Debug)]
struct UncertainSegment {
    segment: Segment,
    state: Arc<VolumeState>,
    /// What it names and was put for it.
    chunks: NewChunks,
    /// It was put before.
    tried: bool,
}

/// Who writes to a volume.
#[derive(Debug)]
pub struct Writer {
    store: VolumeStore,
    epoch: WriterEpoch,
    /// The last segment; of its lists nothing is kept.
    head: Segment,
    state: Arc<VolumeState>,
    segments: u64,
    bytes: u64,
    in_doubt: Option<UncertainSegment>,
    /// Segments before the last whole one, oldest first.
    old: VecDeque<u64>,
    /// Chunks that blocks were since the last [`Self::collect`], about.
    garbage: u64,
    /// What was found when it was claimed: who had the volume before may get it back,
    /// and remembers that.
    found: Option<Arc<VolumeState>>,
}

impl Writer {
    /// Claims a volume: from now on nobody with an older epoch writes to it. It
    /// holds what its log leads to, or `wanted`.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] if somebody with a newer epoch was here, and the
    /// store's.
    pub async fn claim(
        store: VolumeStore,
        epoch: WriterEpoch,
        wanted: Option<Arc<VolumeState>>,
    ) -> Result<Self, VolumeError> {
        for _ in 0..CLAIM_ATTEMPTS {
            let loaded = store.load().await?;
            if loaded.head.writer > epoch {
                return Err(VolumeError::Fenced {
                    volume: store.name().clone(),
                    own: epoch,
                    by: loaded.head.writer,
                });
            }
            let found = Arc::new(loaded.state);
            let state = wanted.clone().unwrap_or_else(|| found.clone());
            let difference = found.difference(&state);
            let segment = following(&loaded.head, epoch, difference, false);
            let taken = match store.put_segment(&segment).await {
                Ok(Put::Done) => false,
                // Its answer may have been lost, and the put repeated.
                Ok(Put::Taken) => !store.has(&segment).await?,
                Err(error) => return Err(error),
            };
            // Where the head is not there any more, others have gone on, compacted the
            // log, and what was put is behind them.
            if taken || !store.has(&loaded.head).await? {
                continue;
            }
            return Ok(Writer {
                store,
                epoch,
                head: without_lists(segment),
                state,
                segments: loaded.segments + 1,
                bytes: loaded.bytes,
                in_doubt: None,
                old: loaded.old,
                garbage: 0,
                found: Some(found),
            });
        }
        Err(VolumeError::Contended {
            volume: store.name().clone(),
        })
    }

    /// What was committed last.
    pub fn state(&self) -> &Arc<VolumeState> {
        &self.state
    }

    /// The last segment's number.
    pub fn head(&self) -> u64 {
        self.head.number
    }

    /// Under which epoch it writes.
    pub fn epoch(&self) -> WriterEpoch {
        self.epoch
    }

    /// The volume's objects.
    pub fn store(&self) -> &VolumeStore {
        &self.store
    }

    /// Commits names and bytes of one instant. After an error the same blocks are
    /// to be given again, or newer ones.
    ///
    /// # Errors
    /// [`VolumeError`]; what is in the store is what it was before, or what was to
    /// be.
    pub async fn commit(
        &mut self,
        record: VolumeRecord,
        dirty: Vec<DirtyBlock>,
    ) -> Result<(), VolumeError> {
        self.settle().await?;
        if dirty.is_empty() && self.is_as(&record) {
            return Ok(());
        }
        // In a directory that was taken away a put would make it anew, and a log
        // without a beginning in it.
        if !self.store.has(&self.head).await? {
            return Err(self.gone().await);
        }
        let (map, chunks) = self.store_blocks(&record, dirty).await?;
        let state = VolumeState::new(record, map);
        let difference = self.state.difference(&state);
        if difference.is_empty(&self.state) {
            return Ok(());
        }
        self.append(difference, Arc::new(state), chunks, false)
            .await?;
        if self.is_long() {
            self.compact().await?;
        }
        Ok(())
    }

    fn is_as(&self, record: &VolumeRecord) -> bool {
        let nodes = self.state.nodes.values();
        self.state.next_inode == record.next_inode && nodes.eq(record.nodes.iter())
    }

    /// Why the last segment is not there any more.
    async fn gone(&self) -> VolumeError {
        // Who came after this one may have compacted it away.
        match self.store.load().await {
            Ok(loaded) if loaded.head.writer > self.epoch => self.fenced(loaded.head.writer),
            Ok(_) => self.store.vanished(),
            Err(error @ VolumeError::Damaged { .. }) => match self.has_put().await {
                true => self.store.vanished(),
                false => error,
            },
            Err(error) => error,
        }
    }

    /// Whether the segment in doubt is there. Where the one before it is not, this
    /// writer made the place anew by putting it: the log is elsewhere, not damaged.
    async fn has_put(&self) -> bool {
        match &self.in_doubt {
            Some(doubt) => matches!(self.store.has(&doubt.segment).await, Ok(true)),
            None => false,
        }
    }

    fn fenced(&self, by: WriterEpoch) -> VolumeError {
        VolumeError::Fenced {
            volume: self.store.name().clone(),
            own: self.epoch,
            by,
        }
    }

    /// Stores what is new; the chunks of all blocks, and those that are new.
    async fn store_blocks(
        &self,
        record: &VolumeRecord,
        dirty: Vec<DirtyBlock>,
    ) -> Result<(BTreeMap<u64, BlockMap>, NewChunks), VolumeError> {
        let mut new: BTreeMap<(u64, u64), ChunkRef> = BTreeMap::new();
        let mut to_store: BTreeMap<ChunkRef, Bytes> = BTreeMap::new();
        for block in dirty.into_iter().filter(|block| !block.bytes.is_empty()) {
            let chunk = ChunkRef {
                hash: block.hash,
                bytes: block.bytes.len() as u32,
                writer: self.epoch,
            };
            let place = (block.inode, block.block);
            match self.state.chunk(block.inode, block.block) {
                Some(old) if old.hash == chunk.hash => drop(new.insert(place, old)),
                _ => {
                    new.insert(place, chunk);
                    to_store.insert(chunk, block.bytes);
                }
            }
        }
        futures::stream::iter(to_store.clone())
            .map(|(chunk, bytes)| async move { self.store.put_chunk(&chunk, bytes).await })
            .buffer_unordered(CHUNKS_IN_FLIGHT)
            .try_collect::<Vec<()>>()
            .await?;
        let mut map: BTreeMap<u64, BlockMap> = BTreeMap::new();
        for node in &record.nodes {
            let NodeBody::File { blocks, .. } = &node.body else {
                continue;
            };
            let mut chunks = BlockMap::new();
            for block in blocks
                .iter()
                .flat_map(|(first, count)| *first..first + count)
            {
                let chunk = new.get(&(node.inode, block)).copied();
                let chunk = chunk.or_else(|| self.state.chunk(node.inode, block));
                // Whoever says that a block has data has given it now or before.
                let chunk = chunk.ok_or_else(|| VolumeError::Damaged {
                    volume: self.store.name().clone(),
                    object: format!("block {block} of file {}", node.inode),
                    reason: "was never stored (this is a defect: report it)".into(),
                })?;
                chunks.insert(block, chunk);
            }
            if !chunks.is_empty() {
                map.insert(node.inode, chunks);
            }
        }
        Ok((map, to_store.into_iter().collect()))
    }

    async fn append(
        &mut self,
        difference: Difference,
        state: Arc<VolumeState>,
        chunks: NewChunks,
        is_base: bool,
    ) -> Result<(), VolumeError> {
        let segment = following(&self.head, self.epoch, difference, is_base);
        self.in_doubt = Some(UncertainSegment {
            segment,
            state,
            chunks,
            tried: false,
        });
        self.settle().await
    }

    /// Puts the segment that is in doubt, unless it or another is there.
    async fn settle(&mut self) -> Result<(), VolumeError> {
        let Some(doubt) = &mut self.in_doubt else {
            return Ok(());
        };
        // Some of them may have been put where the place vanished, and be gone with what
        // that made.
        if std::mem::replace(&mut doubt.tried, true) {
            self.store.complete(&doubt.chunks).await?;
        }
        let Some(doubt) = &self.in_doubt else {
            return Ok(());
        };
        let segment = &doubt.segment;
        if self.store.put_segment(segment).await? == Put::Taken {
            match self.store.segment(segment.number).await? {
                Some(there) if there.nonce == segment.nonce => {}
                Some(there) => return Err(self.fenced(there.writer)),
                None => return Err(self.gone().await),
            }
        }
        // What was put where the segment before it is not does not count: the rest of
        // the log is elsewhere, or others have gone on and deleted what they do not
        // need, also one of this number.
        if !self.store.has(&self.head).await? {
            return Err(self.gone().await);
        }
        // A directory may have vanished, and be back already.
        if self.store.can_vanish()
            && self.store.complete(&doubt.chunks).await?
            && !self.store.has(&self.head).await?
        {
            return Err(self.gone().await);
        }
        let Some(UncertainSegment { segment, state, .. }) = self.in_doubt.take() else {
            return Ok(());
        };
        let bytes = segment.encode().map_or(0, |bytes| bytes.len() as u64);
        match segment.is_base {
            true => {
                let first = segment.number - self.segments;
                self.old.extend(first..segment.number);
                (self.segments, self.bytes) = (1, bytes);
            }
            false => (self.segments, self.bytes) = (self.segments + 1, self.bytes + bytes),
        }
        self.garbage += replaced(&self.state, &segment);
        self.head = without_lists(segment);
        self.state = state;
        Ok(())
    }

    fn is_long(&self) -> bool {
        // About what a whole one would have.
        let chunks: usize = self.state.map.values().map(BlockMap::len).sum();
        let whole = (chunks * 48 + self.state.nodes.len() * 64) as u64;
        self.segments >= SEGMENTS_MAX || self.bytes > GROWTH_BYTES_MIN + whole * GROWTH_MAX
    }

    /// Writes the whole volume as the next segment; those before are for
    /// [`Self::tidy`].
    ///
    /// # Errors
    /// [`VolumeError`].
    pub async fn compact(&mut self) -> Result<(), VolumeError> {
        self.settle().await?;
        let (whole, state) = (self.state.whole(), self.state.clone());
        self.append(whole, state, NewChunks::new(), true).await
    }

    /// Deletes some of the segments that nobody needs, one after the other and oldest
    /// first: who finds the one before its own may rely on that.
    ///
    /// # Errors
    /// The store's.
    pub async fn tidy(&mut self, most: usize) -> Result<(), VolumeError> {
        for _ in 0..most {
            let Some(number) = self.old.front().copied() else {
                break;
            };
            self.store.delete_segment(number).await?;
            self.old.pop_front();
        }
        Ok(())
    }

    /// Who had the volume before will not get it back.
    pub fn forget_found(&mut self) {
        self.found = None;
    }

    /// Whether there are about as many chunks that nobody needs as others.
    pub fn is_littered(&self) -> bool {
        let chunks: usize = self.state.map.values().map(BlockMap::len).sum();
        self.garbage > GARBAGE_MIN.max(chunks as u64)
    }

    /// Deletes chunks that neither the volume nor a snapshot has, nor what was found
    /// when it was claimed, but none that a newer writer stored; how many.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] if somebody with a newer epoch was here, and the
    /// store's; some may be deleted.
    pub async fn collect(&mut self) -> Result<u64, VolumeError> {
        self.settle().await?;
        let found = self.found.iter().flat_map(|found| found.chunks());
        let used = self.state.chunks().chain(found).collect();
        let unused = self.store.unused_chunks(used, self.epoch).await?;
        // After the list: what it has of others they stored after their claim.
        for some in unused.chunks(DELETED_AT_A_TIME) {
            self.check_unfenced().await?;
            self.store.delete(some.to_vec()).await?;
        }
        self.garbage = 0;
        Ok(unused.len() as u64)
    }

    /// Refuses if the log went on without this writer, or is gone. Nothing of its own
    /// is in doubt.
    async fn check_unfenced(&self) -> Result<(), VolumeError> {
        if let Some(next) = self.store.segment(self.head.number + 1).await? {
            return Err(self.fenced(next.writer));
        }
        match self.store.has(&self.head).await? {
            true => Ok(()),
            false => Err(self.gone().await),
        }
    }

    /// Keeps all that was committed under a name.
    ///
    /// # Errors
    /// The store's.
    pub async fn snapshot(&self, name: &str) -> Result<(), VolumeError> {
        let whole = following(&self.head, self.epoch, self.state.whole(), true);
        self.store.put_snapshot(name, &whole).await
    }
}

/// The segment after `head`.
fn following(head: &Segment, writer: WriterEpoch, what: Difference, is_base: bool) -> Segment {
    Segment {
        volume: head.volume,
        number: head.number + 1,
        writer,
        nonce: rand::random(),
        written_unix_ms: unix_ms(),
        is_base,
        bytes_max: head.bytes_max,
        inodes_max: head.inodes_max,
        next_inode: what.next_inode,
        nodes: what.nodes,
        removed: what.removed,
        blocks: what.blocks,
    }
}

/// How many chunks of a state blocks are not any more after a segment.
fn replaced(state: &VolumeState, segment: &Segment) -> u64 {
    if segment.is_base {
        return 0;
    }
    let removed = segment.removed.iter();
    let removed = removed.filter_map(|inode| state.map.get(inode).map(BlockMap::len));
    let changed = segment.blocks.iter().flat_map(|file| {
        let blocks = file.blocks.iter();
        blocks.filter(|(block, _)| state.chunk(file.inode, *block).is_some())
    });
    (removed.sum::<usize>() + changed.count()) as u64
}

fn without_lists(segment: Segment) -> Segment {
    Segment {
        nodes: Vec::new(),
        removed: Vec::new(),
        blocks: Vec::new(),
        ..segment
    }
}
