//! The writer of a volume: claims it, commits changes, compacts the log. Async, without
//! threads, and without a clock except for the age of segments.

use super::format::{ChunkRef, Segment, WriterEpoch};
use super::state::{BlockMap, Difference, VolumeState};
use super::store::{Put, VolumeError, VolumeStore};
use futures::{StreamExt, TryStreamExt};
use keel_net::Bytes;
use keel_store::clock::unix_ms;
use keel_wasi::volume::{NodeBody, VolumeRecord};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Chunks stored concurrently.
const CHUNKS_IN_FLIGHT: usize = 16;
/// Attempts to claim against concurrent claims.
const CLAIM_ATTEMPTS: u32 = 32;
/// Segments after which a base is written, and the factor by which they may exceed its
/// size before.
const SEGMENTS_MAX: u64 = 128;
const GROWTH_MAX: u64 = 4;
const GROWTH_BYTES_MIN: u64 = 1 << 20;
/// Unused chunks below which collection is not worthwhile.
const GARBAGE_MIN: u64 = 1024;
/// Chunks deleted between two checks that this writer is not fenced.
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
    /// A block of a file, by their numbers, with its bytes up to the file's end. Hashes
    /// the bytes, which takes a while for many blocks.
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

/// A segment whose put had no answer: it may exist or not.
#[derive(Debug)]
struct UncertainSegment {
    segment: Segment,
    state: Arc<VolumeState>,
    /// Chunks that it refers to and that were put for it.
    chunks: NewChunks,
    /// It was put before.
    tried: bool,
}

/// The writer of a volume.
#[derive(Debug)]
pub struct Writer {
    store: VolumeStore,
    epoch: WriterEpoch,
    /// The last segment, without its lists.
    head: Segment,
    state: Arc<VolumeState>,
    segments: u64,
    bytes: u64,
    in_doubt: Option<UncertainSegment>,
    /// Segments before the last base, oldest first.
    old: VecDeque<u64>,
    /// Approximate number of chunks replaced since the last [`Self::collect`].
    garbage: u64,
    /// The content at the time of the claim: the former owner may get the volume back and
    /// remembers this content.
    found: Option<Arc<VolumeState>>,
}

impl Writer {
    /// Claims a volume: from now on no writer with an older epoch can commit. Its content
    /// is that of its log, or `wanted`.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] if a writer with a newer epoch was found, and those of the
    /// store.
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
                // The answer may have been lost, and the put repeated.
                Ok(Put::Taken) => !store.has(&segment).await?,
                Err(error) => return Err(error),
            };
            // If the head is missing, other writers have advanced and compacted the log,
            // and the put is behind them.
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

    /// The content committed last.
    pub fn state(&self) -> &Arc<VolumeState> {
        &self.state
    }

    /// Number of the last segment.
    pub fn head(&self) -> u64 {
        self.head.number
    }

    /// The epoch under which it writes.
    pub fn epoch(&self) -> WriterEpoch {
        self.epoch
    }

    /// The volume's objects.
    pub fn store(&self) -> &VolumeStore {
        &self.store
    }

    /// Commits names and bytes of one instant. After an error the same or newer blocks
    /// must be passed again.
    ///
    /// # Errors
    /// [`VolumeError`]; the stored content is the former or the new one.
    pub async fn commit(
        &mut self,
        record: VolumeRecord,
        dirty: Vec<DirtyBlock>,
    ) -> Result<(), VolumeError> {
        self.settle().await?;
        if dirty.is_empty() && self.is_as(&record) {
            return Ok(());
        }
        // If a directory was removed, a put would create it anew, with a log without a
        // beginning.
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

    /// Why the last segment is missing.
    async fn gone(&self) -> VolumeError {
        // A later writer may have compacted it.
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

    /// Whether the uncertain segment is stored. If its predecessor is missing, the put of
    /// this writer created the location anew: the log is elsewhere, not damaged.
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

    /// Stores new chunks; returns the chunks of all blocks, and the new ones.
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
                // A block with data is dirty now or was committed before.
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

    /// Puts the uncertain segment, unless it or another one is stored.
    async fn settle(&mut self) -> Result<(), VolumeError> {
        let Some(doubt) = &mut self.in_doubt else {
            return Ok(());
        };
        // Some chunks may have been put where the location disappeared, and have
        // disappeared with what the put created.
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
        // A put without its predecessor does not count: the rest of the log is elsewhere,
        // or other writers have advanced and deleted unused segments, including this
        // number.
        if !self.store.has(&self.head).await? {
            return Err(self.gone().await);
        }
        // A directory may have disappeared and reappeared.
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
        // Estimated size of a base.
        let chunks: usize = self.state.map.values().map(BlockMap::len).sum();
        let whole = (chunks * 48 + self.state.nodes.len() * 64) as u64;
        self.segments >= SEGMENTS_MAX || self.bytes > GROWTH_BYTES_MIN + whole * GROWTH_MAX
    }

    /// Writes the whole volume as the next segment; earlier segments are left to
    /// [`Self::tidy`].
    ///
    /// # Errors
    /// [`VolumeError`].
    pub async fn compact(&mut self) -> Result<(), VolumeError> {
        self.settle().await?;
        let (whole, state) = (self.state.whole(), self.state.clone());
        self.append(whole, state, NewChunks::new(), true).await
    }

    /// Deletes some unused segments one by one, oldest first: the predecessor of a
    /// segment may be relied on.
    ///
    /// # Errors
    /// Those of the store.
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

    /// The former owner will not get the volume back.
    pub fn forget_claimed_content(&mut self) {
        self.found = None;
    }

    /// Whether there are about as many unused chunks as used ones.
    pub fn needs_collection(&self) -> bool {
        let chunks: usize = self.state.map.values().map(BlockMap::len).sum();
        self.garbage > GARBAGE_MIN.max(chunks as u64)
    }

    /// Deletes chunks that are neither in the volume, nor in a snapshot, nor in the
    /// content at the time of the claim, but none of a newer writer; returns their
    /// number.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] if a writer with a newer epoch was found, and those of the
    /// store; some chunks may be deleted.
    pub async fn collect(&mut self) -> Result<u64, VolumeError> {
        self.settle().await?;
        let found = self.found.iter().flat_map(|found| found.chunks());
        let used = self.state.chunks().chain(found).collect();
        let unused = self.store.unused_chunks(used, self.epoch).await?;
        // After the listing: later claims store the chunks they need themselves.
        for some in unused.chunks(DELETED_AT_A_TIME) {
            self.check_unfenced().await?;
            self.store.delete(some.to_vec()).await?;
        }
        self.garbage = 0;
        Ok(unused.len() as u64)
    }

    /// Fails if the log advanced without this writer, or is missing. No own segment is
    /// uncertain.
    async fn check_unfenced(&self) -> Result<(), VolumeError> {
        if let Some(next) = self.store.segment(self.head.number + 1).await? {
            return Err(self.fenced(next.writer));
        }
        match self.store.has(&self.head).await? {
            true => Ok(()),
            false => Err(self.gone().await),
        }
    }

    /// Stores the committed content under a name.
    ///
    /// # Errors
    /// Those of the store.
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

/// The number of chunks of a state that a segment replaces.
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
