//! Makes a checkpoint while the machine runs: copies memory to the store in rounds,
//! freezes the machine to copy the pages written last, and resumes it before those are
//! stored. Blocking; runs on a thread of its own.

use super::volumes::VolumeTrackers;
use crate::span::{Cut, CutPiece, Pages, SpanError, agrees, split_unchanged};
use keel_machine::checkpoint::{
    BlockRun, CheckpointId, CreatedCheckpoint, Manifest, PackError, PackName, Packer, PageDigests,
    Predecessor, Repository, RepositoryError, Run, Subject, note_page, snapshot_name,
};
use keel_machine::cluster_volume::{CommitHold, UnfinishedSnapshots, VolumeBackend, VolumeError};
use keel_machine::failpoint::{self, Injected};
use keel_machine::log::Log;
use keel_net::Bytes;
use keel_store::clock::unix_ms;
use keel_wasi::volume::Changes;
use keel_wasm::memory::{DirtyTracker, GuestMemory, MemoryError, PAGE_BYTES};
use keel_wasm::runtime::{Machine, MachineError, ProgramError};
use roaring::RoaringBitmap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Bytes per read of a memory.
const READ_BYTES: u64 = 256 << 10;
/// Bytes left at which the machine is frozen: copying this much takes about 2 ms.
const LAST_BYTES: u64 = 4 << 20;
/// Rounds of catching up just before the freeze, and the number of bytes at which they
/// end.
const CATCH_UP_ROUNDS_MAX: u32 = 8;
const CATCH_UP_BYTES: u64 = 256 << 10;
/// Rounds after which the machine is frozen in any case.
const ROUNDS_MAX: u32 = 8;
/// Time limit for threads to reach a safepoint.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);

/// Time limit for messages in flight between parts, while the machine is frozen, and
/// later for pauses between the pages of the cut.
const CUT_PATIENCE: Duration = Duration::from_secs(2);

/// Time limit for parts to protect their pages, while the machine runs.
const PREPARE_PATIENCE: Duration = Duration::from_secs(10);

/// Why no checkpoint was made. The machine runs on.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The machine ended, or a thread did not reach a safepoint.
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("a file of its volumes cannot be read: {0}")]
    Volume(#[from] std::io::Error),
    #[error(transparent)]
    Span(#[from] SpanError),
    #[error(transparent)]
    ClusterVolume(#[from] VolumeError),
    /// It cannot be frozen.
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Buffer(PackError),
    /// A move or another operation takes precedence.
    #[error("the checkpoint was given up: the machine is to move, or to be reduced to one part")]
    GivenUp,
    #[error(transparent)]
    Injected(#[from] Injected),
    /// A task of this process panicked.
    #[error("storing was interrupted")]
    Interrupted,
}

impl From<PackError> for CreateError {
    fn from(error: PackError) -> Self {
        match error {
            PackError::Repository(error) => CreateError::Repository(error),
            PackError::Memory(_) => CreateError::Buffer(error),
            PackError::GivenUp => CreateError::GivenUp,
            PackError::Interrupted => CreateError::Interrupted,
        }
    }
}

/// Where and how a checkpoint is stored.
#[derive(Debug)]
pub struct Destination<'a> {
    pub repository: &'a Repository,
    /// Runtime for the store's requests.
    pub runtime: &'a Handle,
    /// Whether a full checkpoint is made in any case.
    pub full: bool,
    /// The checkpoint that counts for the machine now, wherever it is: ids increase from it.
    pub after: Option<CheckpointId>,
    /// Set by others to end it early.
    pub give_up: &'a AtomicBool,
    /// Backends of the machine's cluster volumes.
    pub cluster_volumes: Vec<VolumeBackend>,
}

/// Makes the checkpoints of one machine, and tracks its writes in between.
#[derive(Debug, Default)]
pub struct Checkpointer {
    trackers: Vec<DirtyTracker>,
    /// For each tracker, dirty ranges that were found and are in no checkpoint.
    seen: Vec<Vec<Range<u64>>>,
    volumes: VolumeTrackers,
    last: Option<Predecessor>,
    /// For a machine with several parts: number and page digests of the cut behind the
    /// last checkpoint.
    last_cut: Option<(u64, PageDigests)>,
}

/// The machine's state at the freeze.
struct Snapshot {
    image: Vec<u8>,
    /// The memory of a machine with several parts, which is still to be read.
    cut: Option<Cut>,
    /// End of its output.
    log_end: u64,
    /// Sizes of its memories.
    memory_pages: Vec<u64>,
    /// Downtime.
    pause: Duration,
}

/// What a checkpoint collects.
struct Collector {
    pages: Packer,
    runs: Vec<Run>,
    blocks: Packer,
    block_runs: Vec<BlockRun>,
}

/// Sorts ranges and joins those that overlap.
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
    /// Whether writes since a checkpoint are tracked.
    pub fn tracks(&self) -> bool {
        !self.trackers.is_empty()
    }

    /// Ranges written since the last call, for each memory. They still count for the next
    /// checkpoint.
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

    /// Makes a checkpoint: a full one if it is the first, requested, or the chain is
    /// long. The memory of a machine with several parts (`spanning_pages`) is read at
    /// its parts after the freeze; its writes are not tracked, so parts compare its pages
    /// with their digests.
    ///
    /// # Errors
    /// [`CreateError`]; the machine runs on, and stored packs are void.
    pub fn take(
        &mut self,
        machine: &Machine,
        spanning_pages: Option<&Pages>,
        subject: Subject,
        log: &Log,
        destination: Destination<'_>,
    ) -> Result<CreatedCheckpoint, CreateError> {
        let Destination {
            repository,
            runtime,
            full,
            after,
            give_up,
            cluster_volumes,
        } = destination;
        let begun = Instant::now();
        let last_cut = self.last_cut.take();
        let parent = self
            .last
            .take()
            .filter(|last| last.is_continued_in(repository))
            .filter(|_| !full && spanning_pages.is_some() == last_cut.is_some());
        let parent = match parent {
            Some(parent) => runtime.block_on(parent.if_intact(repository, &subject.name))?,
            None => None,
        };
        let (since, mut known) = match last_cut.filter(|_| parent.is_some()) {
            Some((number, known)) => (Some(number), known),
            None => (None, PageDigests::default()),
        };
        machine.program().prepare_resume()?;
        let id = Predecessor::next_id(repository, &subject.name, parent.as_ref(), after.as_ref());
        let id = runtime.block_on(id)?;
        let packer = |piece: fn(usize) -> PackName| {
            let name = subject.name.clone();
            Packer::new(
                repository.clone(),
                name,
                (id.clone(), 0),
                runtime.clone(),
                piece,
            )
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
            (machine, spanning_pages.map(|pages| (pages, since))),
            log,
            parent.is_some(),
            &mut collected,
            (&cluster_volumes, &mut held),
            give_up,
        )?;
        let created_unix_ms = unix_ms();
        // First: while they are held their changes are not committed.
        let snapshot = snapshot_name(&subject.name, &id);
        let snapshots = UnfinishedSnapshots::new(cluster_volumes, snapshot.clone());
        for volume in held {
            volume.keep(&snapshot)?;
        }
        let cut_number = match cut {
            // The cut ends here: parts need not keep pages while the rest is stored.
            Some(cut) => {
                collected.add_cut(&cut, &mut known, since.is_some(), give_up)?;
                Some(cut.number())
            }
            None => None,
        };
        failpoint::pass("checkpoint.worker.packs")?;
        let packs = collected.pages.finish()?;
        let block_packs = collected.blocks.finish()?;
        let program = *machine.program().hash();
        let bytes = Bytes::copy_from_slice(machine.program().bytes());
        runtime.block_on(repository.put_program(&program, bytes))?;
        let manifest = Manifest {
            id: id.clone(),
            machine: subject.name,
            parent: parent.as_ref().map(|last| last.id().clone()),
            generation: 0,
            epoch: subject.epoch,
            created_unix_ms,
            spec: subject.spec,
            program: Some(program),
            log_end,
            memory_pages,
            runs: collected.runs,
            packs,
            block_runs: collected.block_runs,
            block_packs,
            image,
        };
        failpoint::pass("checkpoint.worker.manifest")?;
        // If storing the manifest has no answer, the checkpoint may exist nevertheless.
        snapshots.done();
        runtime.block_on(repository.put_manifest(&manifest))?;
        failpoint::pass("checkpoint.worker.stored")?;
        self.last = Some(Predecessor::new(repository, parent, &manifest));
        self.last_cut = cut_number.map(|number| (number, known));
        Ok(CreatedCheckpoint {
            manifest,
            pause,
            total: begun.elapsed(),
        })
    }

    /// Copies until little is left, then freezes and copies the rest.
    fn copy(
        &mut self,
        (machine, spanning_pages): (&Machine, Option<(&Pages, Option<u64>)>),
        log: &Log,
        incremental: bool,
        collected: &mut Collector,
        (cluster_volumes, held): (&[VolumeBackend], &mut Vec<CommitHold>),
        give_up: &AtomicBool,
    ) -> Result<Snapshot, CreateError> {
        // Memory with several owners is read from the cut, and is in the other mode.
        let memories: &[Arc<GuestMemory>] = match spanning_pages {
            Some(_) => &[],
            None => machine.memories(),
        };
        if !incremental {
            // Trackers of an earlier checkpoint are void.
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
            failpoint::pass("checkpoint.worker.round")?;
            let mut left;
            (blocks, left) = self.volumes.take();
            for (tracker, ranges) in self.trackers.iter_mut().zip(&mut ranges) {
                *ranges = tracker.take()?;
                left += bytes_of(ranges);
            }
            // Halving it again would not be worth a round.
            if left <= LAST_BYTES || round >= ROUNDS_MAX || left > before / 2 {
                break;
            }
            before = left;
        }
        // All copied data is stored first: hashing and storing would compete with the
        // guest and the last copying for processors. From then on nothing is stored;
        // rounds within memory catch up with what was written meanwhile.
        collected.add_pages(memories, &ranges, Some(give_up))?;
        self.add_blocks(blocks, collected, Some(give_up))?;
        collected.pages.settle()?;
        if !self.volumes.is_empty() {
            collected.blocks.settle()?;
        }
        let cut = match spanning_pages {
            Some((pages, since)) => Some(pages.prepare_cut(since, PREPARE_PATIENCE)?),
            None => None,
        };
        for keeper in cluster_volumes {
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
        failpoint::pass("checkpoint.worker.frozen")?;
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

impl Collector {
    /// Adds pages. With `give_up`, full packs are stored, and the call waits for a slow
    /// store; without, neither happens, and the last pack grows.
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
                        memory.read(at, buffer)?;
                        Ok::<_, CreateError>(buffer.len())
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
    /// Adds the pages of a cut, except unchanged ones, and stores full packs meanwhile.
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
                false => Err(disagree("parts sent a page twice")),
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
                        if !agrees(known, &same) {
                            let what = "a part reported unchanged pages with other content";
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
        // Pages that no longer exist are zero.
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
