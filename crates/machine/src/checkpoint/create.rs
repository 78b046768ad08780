//! Makes a checkpoint while the machine runs: copies memory to the store round
//! by round, freezes the machine for what was written last, and lets it go on
//! before any of that is stored. Blocking; has a thread of its own.

use super::CHAIN_MAX;
use super::folder::AlignedBuffer;
use super::format::{BLOCK_BYTES, BlockRun, CheckpointId, Manifest, Pack, Run};
use super::repository::{Outline, PackName, Repository, RepositoryError};
use super::volumes::VolumeTrackers;
use crate::cluster_volume::{CommitHold, UnfinishedSnapshots, VolumeBackend, VolumeError};
use crate::failpoint::{self, Injected};
use crate::log::Log;
use crate::span::{Cut, CutPiece, PageDigests, Pages, SpanError, split_unchanged};
use crate::spec::Spec;
use keel_cluster::clock::unix_ms;
use keel_cluster::{Epoch, MachineName};
use keel_net::Bytes;
use keel_wasi::volume::Changes;
use keel_wasm::memory::{DirtyTracker, GuestMemory, MemoryError, PAGE_BYTES};
use keel_wasm::runtime::{Machine, MachineError, ProgramError};
use roaring::RoaringBitmap;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// Bytes of one stored piece.
const PACK_BYTES: usize = 16 << 20;
/// Pieces that are being stored at a time.
const IN_FLIGHT_MAX: usize = 4;
/// Bytes of one read of a memory.
const READ_BYTES: u64 = 256 << 10;
/// What may be left when the machine is frozen: copying so much takes about
/// 2 ms.
const LAST_BYTES: u64 = 4 << 20;
/// Room that is made ready for all that is copied after the last storing.
const LAST_ROOM_BYTES: usize = 16 << 20;
/// Rounds of catching up just before the freeze, and what is little enough.
const CATCH_UP_ROUNDS_MAX: u32 = 8;
const CATCH_UP_BYTES: u64 = 256 << 10;
/// Rounds after which it is frozen whatever is left.
const ROUNDS_MAX: u32 = 8;
/// How long threads may take to their safepoints.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);

/// How long what is on its way between parts may take to arrive, while the machine is
/// frozen; and, later, for how long nothing may come of what there was then.
const CUT_PATIENCE: Duration = Duration::from_secs(2);

/// How long parts may take to protect what there is, while the machine runs.
const PREPARE_PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no checkpoint. The machine runs on.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The store.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The machine ended, or a thread was late.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its own volumes.
    #[error("a file of its volumes cannot be read: {0}")]
    Volume(#[from] std::io::Error),
    /// Its parts.
    #[error(transparent)]
    Span(#[from] SpanError),
    /// A cluster volume.
    #[error(transparent)]
    ClusterVolume(#[from] VolumeError),
    /// It cannot be frozen.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// Something more important came.
    #[error("the checkpoint was given up: the machine is to move, or to be brought together")]
    GivenUp,
    /// A test wanted it to fail.
    #[error(transparent)]
    Injected(#[from] Injected),
    /// A task of this process died.
    #[error("storing was cut off")]
    CutOff,
}

/// A checkpoint that was made.
#[derive(Debug, Clone)]
pub struct CreatedCheckpoint {
    /// What was stored.
    pub manifest: Manifest,
    /// How long the machine stood still.
    pub pause: Duration,
    /// How long all of it took.
    pub total: Duration,
}

/// Whose checkpoint it is.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The machine's name.
    pub name: MachineName,
    /// What was asked for.
    pub spec: Spec,
    /// The epoch under which it runs.
    pub epoch: Epoch,
}

/// Where a checkpoint goes, and how.
#[derive(Debug)]
pub struct Destination<'a> {
    /// The store.
    pub vault: &'a Repository,
    /// Where its requests run.
    pub runtime: &'a Handle,
    /// Whether a full one is wanted in any case.
    pub full: bool,
    /// Set by others to end it early.
    pub give_up: &'a AtomicBool,
    /// Those of its cluster volumes.
    pub keepers: Vec<VolumeBackend>,
}

/// Makes the checkpoints of one machine, and knows what was written since the
/// last one.
#[derive(Debug, Default)]
pub struct Checkpointer {
    trackers: Vec<DirtyTracker>,
    /// For each of them, what was found already and is in no checkpoint.
    seen: Vec<Vec<Range<u64>>>,
    volumes: VolumeTrackers,
    last: Option<PreviousCheckpoint>,
    /// Of a machine with several parts: the cut that the last one is of, and what was in it.
    last_cut: Option<(u64, PageDigests)>,
}

/// What there was when the machine stood.
struct Snapshot {
    image: Vec<u8>,
    /// The memory of one with several parts, which is still to be read.
    cut: Option<Cut>,
    /// End of its output.
    log_end: u64,
    /// Sizes of its memories.
    memory_pages: Vec<u64>,
    /// For how long it stood.
    pause: Duration,
}

/// What is collected on the way.
struct Collector {
    pages: Packer,
    runs: Vec<Run>,
    blocks: Packer,
    block_runs: Vec<BlockRun>,
}

#[derive(Debug)]
struct PreviousCheckpoint {
    vault: String,
    id: CheckpointId,
    /// Its chain, the full one first.
    chain: Vec<Outline>,
}

impl PreviousCheckpoint {
    /// Itself, if all that a further one would stand on is still there, by names
    /// and sizes: somebody may have deleted it.
    async fn if_whole(
        self,
        vault: &Repository,
        machine: &MachineName,
    ) -> Result<Option<Self>, RepositoryError> {
        if vault.check_parts(machine, &self.chain).await.is_ok() {
            return Ok(Some(self));
        }
        // It may have been made a full one since, and be whole all the same.
        let chain = match vault.chain(machine, &self.id).await {
            Ok(chain) => {
                let chain: Vec<Outline> = chain.iter().map(Manifest::outline).collect();
                vault.check_parts(machine, &chain).await.map(|()| chain)
            }
            Err(error) => Err(error),
        };
        match chain {
            Ok(chain) => Ok(Some(PreviousCheckpoint { chain, ..self })),
            Err(error @ RepositoryError::Part { .. }) => {
                tracing::warn!(%error, "the next checkpoint is a full one");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Ranges in order, none of which overlaps another.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

impl Checkpointer {
    /// Whether it knows what was written since a checkpoint.
    pub fn tracks(&self) -> bool {
        !self.trackers.is_empty()
    }

    /// What was written since it was looked at last, for each memory. It counts
    /// for the next checkpoint all the same.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn peek(&mut self) -> Result<Vec<Vec<Range<u64>>>, MemoryError> {
        self.seen.resize(self.trackers.len(), Vec::new());
        let mut found = Vec::with_capacity(self.trackers.len());
        for (tracker, seen) in self.trackers.iter_mut().zip(&mut self.seen) {
            let written = tracker.take()?;
            seen.extend(written.iter().cloned());
            *seen = merged(std::mem::take(seen));
            found.push(written);
        }
        Ok(found)
    }

    /// Makes a checkpoint: a full one, if it is the first there, or wanted, or
    /// the chain has become long. The memory of a machine with several parts (`apart`, its
    /// pages) is read where it is, after it was frozen; nobody tracks writes of it, so its
    /// pages are compared with what they were, where they are.
    ///
    /// # Errors
    /// [`CreateError`]; the machine runs on, and nothing counts that was stored.
    pub fn take(
        &mut self,
        machine: &Machine,
        apart: Option<&Pages>,
        subject: Subject,
        log: &Log,
        destination: Destination<'_>,
    ) -> Result<CreatedCheckpoint, CreateError> {
        let Destination {
            vault,
            runtime,
            full,
            give_up,
            keepers,
        } = destination;
        let begun = Instant::now();
        let last_cut = self.last_cut.take();
        let parent = self
            .last
            .take()
            .filter(|last| last.vault == vault.url() && last.chain.len() < CHAIN_MAX)
            .filter(|_| !full && apart.is_some() == last_cut.is_some());
        let parent = match parent {
            Some(parent) => runtime.block_on(parent.if_whole(vault, &subject.name))?,
            None => None,
        };
        let (since, mut known) = match last_cut.filter(|_| parent.is_some()) {
            Some((number, known)) => (Some(number), known),
            None => (None, PageDigests::default()),
        };
        machine.program().prepare_resume()?;
        // Later ones are greater, whatever the clocks of the nodes say that made them.
        let newest = runtime.block_on(vault.list(&subject.name))?;
        let newest = newest
            .iter()
            .chain(parent.as_ref().map(|last| &last.id))
            .max();
        let after = newest.map_or(0, |newest| newest.unix_ms() + 1);
        let id = CheckpointId::new(unix_ms().max(after));
        let packer = |piece: fn(usize) -> PackName| {
            let name = subject.name.clone();
            Packer::new(vault.clone(), name, (id.clone(), 0), runtime.clone(), piece)
        };
        let mut collected = Collector {
            pages: packer(PackName::Pages),
            runs: Vec::new(),
            blocks: packer(PackName::Blocks),
            block_runs: Vec::new(),
        };
        let mut held = Vec::new();
        let Snapshot {
            image,
            cut,
            log_end,
            memory_pages,
            pause,
        } = self.copy(
            (machine, apart.map(|pages| (pages, since))),
            log,
            parent.is_some(),
            &mut collected,
            (&keepers, &mut held),
            give_up,
        )?;
        let created_unix_ms = unix_ms();
        // First: while they are held nothing of them is committed.
        let snapshot = super::snapshot_name(&subject.name, &id);
        let snapshots = UnfinishedSnapshots::new(keepers, snapshot.clone());
        for volume in held {
            volume.keep(&snapshot)?;
        }
        let cut_number = match cut {
            // (It ends with that: parts need not keep anything for it while it is stored.)
            Some(cut) => {
                collected.add_cut(&cut, &mut known, since.is_some(), give_up)?;
                Some(cut.number())
            }
            None => None,
        };
        failpoint::pass("take.packs")?;
        let packs = collected.pages.finish()?;
        let block_packs = collected.blocks.finish()?;
        let program = *machine.program().hash();
        let bytes = Bytes::copy_from_slice(machine.program().bytes());
        runtime.block_on(vault.put_program(&program, bytes))?;
        let manifest = Manifest {
            id: id.clone(),
            machine: subject.name,
            parent: parent.as_ref().map(|last| last.id.clone()),
            generation: 0,
            epoch: subject.epoch,
            created_unix_ms,
            spec: subject.spec,
            program,
            log_end,
            memory_pages,
            runs: collected.runs,
            packs,
            block_runs: collected.block_runs,
            block_packs,
            image,
        };
        failpoint::pass("take.manifest")?;
        // If that has no answer, the checkpoint may be there all the same.
        snapshots.done();
        runtime.block_on(vault.put_manifest(&manifest))?;
        failpoint::pass("take.stored")?;
        let mut chain = parent.map_or_else(Vec::new, |last| last.chain);
        chain.push(manifest.outline());
        let last = PreviousCheckpoint {
            vault: vault.url().to_owned(),
            id,
            chain,
        };
        self.last = Some(last);
        self.last_cut = cut_number.map(|number| (number, known));
        Ok(CreatedCheckpoint {
            manifest,
            pause,
            total: begun.elapsed(),
        })
    }

    /// Copies until little is left, then freezes for the rest.
    fn copy(
        &mut self,
        (machine, apart): (&Machine, Option<(&Pages, Option<u64>)>),
        log: &Log,
        incremental: bool,
        collected: &mut Collector,
        (keepers, held): (&[VolumeBackend], &mut Vec<CommitHold>),
        give_up: &AtomicBool,
    ) -> Result<Snapshot, CreateError> {
        // Memory with several owners is read from the cut, and in the other mode.
        let memories: &[Arc<GuestMemory>] = match apart {
            Some(_) => &[],
            None => machine.memories(),
        };
        if !incremental {
            // What was known of an earlier checkpoint no longer counts.
            self.trackers.clear();
            self.seen.clear();
            for memory in memories {
                self.trackers.push(DirtyTracker::start(memory.clone())?);
            }
            self.volumes = VolumeTrackers::start(machine.wasi());
        }
        let mut ranges: Vec<Vec<Range<u64>>> = Vec::new();
        self.seen.resize(self.trackers.len(), Vec::new());
        let trackers = self.trackers.iter_mut().zip(&mut self.seen);
        for (memory, (tracker, seen)) in memories.iter().zip(trackers) {
            ranges.push(if incremental {
                let mut written = std::mem::take(seen);
                written.extend(tracker.take()?);
                merged(written)
            } else {
                memory.populated()?
            });
        }
        let mut before = u64::MAX;
        let (mut blocks, _) = self.volumes.take();
        for round in 0.. {
            collected.add_pages(memories, &ranges, Some(give_up))?;
            self.add_blocks(blocks, collected, Some(give_up))?;
            failpoint::pass("take.round")?;
            let mut left;
            (blocks, left) = self.volumes.take();
            for (tracker, ranges) in self.trackers.iter_mut().zip(&mut ranges) {
                *ranges = tracker.take()?;
                left += bytes_of(ranges);
            }
            // Half of it again would not be worth a round.
            if left <= LAST_BYTES || round >= ROUNDS_MAX || left > before / 2 {
                break;
            }
            before = left;
        }
        // All that was copied is stored first: hashing and storing would take
        // the processors from the guest and from the last copying. From then on
        // nothing is stored and no store is waited for; rounds within memory
        // catch up with what was written meanwhile.
        collected.add_pages(memories, &ranges, Some(give_up))?;
        self.add_blocks(blocks, collected, Some(give_up))?;
        collected.pages.settle()?;
        if !self.volumes.is_empty() {
            collected.blocks.settle()?;
        }
        let cut = match apart {
            Some((pages, since)) => Some(pages.prepare_cut(since, PREPARE_PATIENCE)?),
            None => None,
        };
        for keeper in keepers {
            held.push(keeper.hold()?);
        }
        for _ in 0..CATCH_UP_ROUNDS_MAX {
            let (blocks, mut left) = self.volumes.take();
            for (tracker, ranges) in self.trackers.iter_mut().zip(&mut ranges) {
                *ranges = tracker.take()?;
                left += bytes_of(ranges);
            }
            collected.add_pages(memories, &ranges, None)?;
            self.add_blocks(blocks, collected, None)?;
            if left <= CATCH_UP_BYTES {
                break;
            }
        }
        let begun = Instant::now();
        machine.freeze(FREEZE_PATIENCE)?;
        let marked = cut.as_ref().map_or(Ok(()), |cut| cut.mark(CUT_PATIENCE));
        let frozen = match marked {
            Ok(()) => self.last_pages(machine, memories, collected, held),
            Err(error) => Err(error.into()),
        };
        let log_end = log.end();
        let thawed = machine.thaw();
        let pause = begun.elapsed();
        let image = frozen?;
        thawed?;
        Ok(Snapshot {
            memory_pages: image.memory_pages.clone(),
            image: image.encode()?,
            cut,
            log_end,
            pause,
        })
    }

    fn last_pages(
        &mut self,
        machine: &Machine,
        memories: &[Arc<GuestMemory>],
        collected: &mut Collector,
        held: &mut [CommitHold],
    ) -> Result<keel_wasm::runtime::Image, CreateError> {
        let mut ranges = Vec::new();
        for tracker in &mut self.trackers {
            ranges.push(tracker.take_at_once()?);
        }
        collected.add_pages(memories, &ranges, None)?;
        let (blocks, _) = self.volumes.take();
        self.add_blocks(blocks, collected, None)?;
        for volume in held {
            volume.freeze()?;
        }
        failpoint::pass("take.frozen")?;
        Ok(machine.image()?)
    }

    fn add_blocks(
        &mut self,
        blocks: Vec<Changes>,
        collected: &mut Collector,
        give_up: Option<&AtomicBool>,
    ) -> Result<(), CreateError> {
        let (packer, runs) = (&mut collected.blocks, &mut collected.block_runs);
        self.volumes.add(blocks, packer, runs, give_up)
    }
}

fn bytes_of(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// Collects bytes into packs and stores them meanwhile.
pub(super) struct Packer {
    vault: Repository,
    machine: MachineName,
    /// The checkpoint and its generation.
    of: (CheckpointId, u32),
    runtime: Handle,
    piece: fn(usize) -> PackName,
    buffer: Buffer,
    /// Buffers of packs that are stored: fresh ones would cost a page fault for
    /// each of their pages.
    spare: Spare,
    packs: Vec<Pack>,
    storing: VecDeque<JoinHandle<Result<(), RepositoryError>>>,
    /// Packs begun so far.
    count: usize,
}

type Spare = Arc<Mutex<Vec<AlignedBuffer>>>;

/// A pack in the making.
#[derive(Default)]
struct Buffer {
    /// As long as it ever was: what is behind `used` counts no more.
    bytes: AlignedBuffer,
    used: usize,
    /// Checksums of the blocks that are full, as far as there was time for them.
    hashed: Vec<[u8; 32]>,
}

impl Buffer {
    /// Room for so many more.
    fn room(&mut self, count: usize) -> &mut [u8] {
        let end = self.used + count;
        // (A pack that is long already becomes longer in large steps.)
        if self.bytes.len() < end {
            let length = end.max(PACK_BYTES).next_multiple_of(PACK_BYTES);
            self.bytes.grow(length, self.used);
        }
        &mut self.bytes[self.used..end]
    }

    /// Hashes full blocks, which are still in the processor's cache then.
    fn hash_full(&mut self) {
        while (self.hashed.len() + 1) * BLOCK_BYTES <= self.used {
            let at = self.hashed.len() * BLOCK_BYTES;
            let block = &self.bytes[at..at + BLOCK_BYTES];
            self.hashed.push(*blake3::hash(block).as_bytes());
        }
    }

    /// What describes it; all of it is hashed.
    fn describe(&mut self) -> Pack {
        self.hash_full();
        let rest = self.hashed.len() * BLOCK_BYTES;
        if rest < self.used {
            let block = &self.bytes[rest..self.used];
            self.hashed.push(*blake3::hash(block).as_bytes());
        }
        Pack {
            bytes: self.used as u64,
            blocks: std::mem::take(&mut self.hashed),
        }
    }
}

/// A pack's bytes while they are stored; its buffer is used again then.
struct LentBuffer {
    buffer: AlignedBuffer,
    used: usize,
    spare: Spare,
}

impl AsRef<[u8]> for LentBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.used]
    }
}

impl Drop for LentBuffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut spare = self.spare.lock().unwrap_or_else(|error| error.into_inner());
        spare.push(buffer);
    }
}

impl Collector {
    /// Adds pages. With `give_up` it stores full packs, and waits where the store
    /// is behind; without, it does neither: the last pack becomes longer.
    fn add_pages(
        &mut self,
        memories: &[Arc<GuestMemory>],
        ranges: &[Vec<Range<u64>>],
        give_up: Option<&AtomicBool>,
    ) -> Result<(), CreateError> {
        for ((number, memory), ranges) in (0u32..).zip(memories).zip(ranges) {
            for range in ranges {
                let mut at = range.start;
                while at < range.end {
                    let count = (range.end - at).min(READ_BYTES);
                    self.pages.add_bytes(count as usize, give_up, |buffer| {
                        memory.read(at, buffer).map(|()| buffer.len())
                    })?;
                    note_page(&mut self.runs, number, at, count);
                    at += count;
                }
            }
        }
        Ok(())
    }
}

impl Collector {
    /// Adds all pages of a cut, or those that are not as they were known to be, and stores
    /// full packs meanwhile.
    fn add_cut(
        &mut self,
        cut: &Cut,
        known: &mut PageDigests,
        incremental: bool,
        give_up: &AtomicBool,
    ) -> Result<(), CreateError> {
        // By memory.
        let mut there: Vec<RoaringBitmap> = Vec::new();
        let mut are_there = |memory: u32, first: u32, pages: u32| {
            let memory = memory as usize;
            if there.len() <= memory {
                there.resize_with(memory + 1, RoaringBitmap::new);
            }
            let new = there[memory].insert_range(first..first + pages);
            match !incremental || new == u64::from(pages) {
                true => Ok(()),
                false => Err(disagree("parts give a page twice")),
            }
        };
        while let Some(piece) = cut.next(CUT_PATIENCE)? {
            if give_up.load(Ordering::Relaxed) {
                return Err(CreateError::GivenUp);
            }
            let pieces = match piece {
                CutPiece::Unchanged(same) => vec![CutPiece::Unchanged(same)],
                CutPiece::Pages(pages) => split_unchanged(&pages, |memory, number, hash| {
                    known.put(memory, number, hash) == Some(hash)
                }),
            };
            for piece in pieces {
                match piece {
                    CutPiece::Unchanged(same) => {
                        if !known.agrees(&same) {
                            let what = "a part says that pages are as they were, and they were not";
                            return Err(disagree(what));
                        }
                        are_there(same.memory, same.first, same.pages)?;
                    }
                    CutPiece::Pages(pages) => {
                        let (at, bytes) = (u64::from(pages.first) * PAGE_BYTES, &pages.bytes);
                        self.pages.add(bytes, give_up)?;
                        let bytes = bytes.len() as u64;
                        note_page(&mut self.runs, pages.memory, at, bytes);
                        let count = (bytes / PAGE_BYTES) as u32;
                        are_there(pages.memory, pages.first, count)?;
                    }
                }
            }
        }
        // What was there and is not any more is zero.
        let is_gone = |memory: u32, number: u32| {
            let there = there.get(memory as usize);
            !there.is_some_and(|there| there.contains(number))
        };
        let gone = match incremental {
            true => known.which(is_gone),
            false => Vec::new(),
        };
        for (memory, number) in gone {
            self.pages.add(&[0; PAGE_BYTES as usize], give_up)?;
            let at = u64::from(number) * PAGE_BYTES;
            note_page(&mut self.runs, memory, at, PAGE_BYTES);
            known.forget(memory, number);
        }
        Ok(())
    }
}

fn disagree(what: &str) -> CreateError {
    SpanError::Inconsistent(what.into()).into()
}

/// Notes pages that were put into a pack.
pub(super) fn note_page(runs: &mut Vec<Run>, memory: u32, at: u64, bytes: u64) {
    // Memories have at most 64 GiB, which is 2^24 pages.
    let (first, pages) = ((at / PAGE_BYTES) as u32, (bytes / PAGE_BYTES) as u32);
    match runs.last_mut() {
        Some(run) if run.memory == memory && run.first + run.pages == first => {
            run.pages += pages;
        }
        _ => runs.push(Run {
            memory,
            first,
            pages,
        }),
    }
}

impl Packer {
    /// Without anything in it.
    pub(super) fn new(
        vault: Repository,
        machine: MachineName,
        of: (CheckpointId, u32),
        runtime: Handle,
        piece: fn(usize) -> PackName,
    ) -> Self {
        Packer {
            vault,
            machine,
            of,
            runtime,
            piece,
            buffer: Buffer::default(),
            spare: Spare::default(),
            packs: Vec::new(),
            storing: VecDeque::new(),
            count: 0,
        }
    }

    /// Adds bytes, and stores full packs.
    pub(super) fn add(&mut self, bytes: &[u8], give_up: &AtomicBool) -> Result<(), CreateError> {
        let copy = |buffer: &mut [u8]| -> Result<usize, CreateError> {
            buffer.copy_from_slice(bytes);
            Ok(bytes.len())
        };
        self.add_bytes(bytes.len(), Some(give_up), copy).map(drop)
    }

    /// Adds up to `count` bytes that `read` puts into a buffer; how many it put.
    pub(super) fn add_bytes<E>(
        &mut self,
        count: usize,
        give_up: Option<&AtomicBool>,
        read: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<usize, CreateError>
    where
        CreateError: From<E>,
    {
        if give_up.is_some_and(|give_up| give_up.load(Ordering::Relaxed)) {
            return Err(CreateError::GivenUp);
        }
        if self.buffer.bytes.is_empty() {
            self.buffer.bytes = self.spare_buffer();
        }
        let added = read(self.buffer.room(count))?;
        self.buffer.used += added;
        if give_up.is_some() {
            self.buffer.hash_full();
            if self.buffer.used >= PACK_BYTES {
                self.store_pack();
                self.wait_below(IN_FLIGHT_MAX)?;
            }
        }
        Ok(added)
    }

    fn spare_buffer(&self) -> AlignedBuffer {
        let mut spare = self.spare.lock().unwrap_or_else(|error| error.into_inner());
        spare.pop().unwrap_or_default()
    }

    /// Stores what there is, and makes room for the last pages, so that nothing
    /// is allocated for them.
    fn settle(&mut self) -> Result<(), CreateError> {
        self.store_pack();
        self.wait_below(1)?;
        self.buffer.bytes = self.spare_buffer();
        self.buffer.bytes.grow(LAST_ROOM_BYTES, 0);
        // The host gives room only when it is written to.
        self.buffer.bytes[..LAST_ROOM_BYTES].fill(0);
        Ok(())
    }

    fn store_pack(&mut self) {
        if self.buffer.used == 0 {
            return;
        }
        self.packs.push(self.buffer.describe());
        let Buffer { bytes, used, .. } = std::mem::take(&mut self.buffer);
        let lent = Bytes::from_owner(LentBuffer {
            buffer: bytes,
            used,
            spare: self.spare.clone(),
        });
        let piece = (self.piece)(self.count);
        self.count += 1;
        let (vault, machine) = (self.vault.clone(), self.machine.clone());
        let (id, generation) = self.of.clone();
        let store = async move {
            vault
                .put_pack(&machine, (&id, generation), piece, lent)
                .await
        };
        self.storing.push_back(self.runtime.spawn(store));
    }

    fn wait_below(&mut self, limit: usize) -> Result<(), CreateError> {
        while self.storing.len() >= limit.max(1) {
            let Some(task) = self.storing.pop_front() else {
                break;
            };
            let stored = self.runtime.block_on(task);
            stored.map_err(|_| CreateError::CutOff)??;
        }
        Ok(())
    }

    /// Stores the rest; all of it is stored then.
    pub(super) fn finish(mut self) -> Result<Vec<Pack>, CreateError> {
        self.store_pack();
        self.wait_below(1)?;
        Ok(std::mem::take(&mut self.packs))
    }
}

impl Drop for Packer {
    fn drop(&mut self) {
        // Of a checkpoint that was given up nothing more need be stored.
        for task in &self.storing {
            task.abort();
        }
    }
}
