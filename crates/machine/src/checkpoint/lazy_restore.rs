//! A machine that runs before the pages of its checkpoint are in memory: a page
//! is read when a thread first touches it, the others behind it.
//!
//! ```text
//!   guest thread ── touches ──▶ fault ──▶ its MiB: read, checked, shown ──▶ goes on
//!                                 all other MiBs, in order, meanwhile ──▶ done: as if it
//!                                                                         had never been
//! ```
//!
//! Of each MiB the checksum is right before a page of it is seen. A store that
//! does not answer is asked again for as long as it takes: threads that need a
//! page wait. Damage is found while the machine runs already, so whoever starts
//! a machine so must be able to end it then: [`LazyRestore::begin`] tells.

use super::format::{Manifest, Pack};
use super::layout::{Block, Layout};
use super::repository::{PackName, Repository, RepositoryError};
use keel_net::Bytes;
use keel_wasm::memory::{FaultKind, GuestMemory, MemoryError, PAGE_BYTES, PageFaults, Unavailable};
use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use tokio::runtime::Handle;

/// Threads that answer accesses to one memory: each reads one MiB at a time.
const ANSWERING: usize = 2;
/// How long they wait before they look whether all is done.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Pause before a store that did not answer is asked again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Why a pack is not read.
#[derive(Debug, thiserror::Error)]
enum PackError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What is still to come of a machine's memory.
pub struct LazyRestore {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for LazyRestore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Behind").finish_non_exhaustive()
    }
}

struct Shared {
    vault: Repository,
    runtime: Handle,
    chain: Vec<Manifest>,
    /// Says in the store that the chain is being read.
    reading: String,
    layout: Layout,
    faults: Vec<PageFaults>,
    /// Blocks that somebody reads, or has read.
    claimed: Mutex<HashSet<Block>>,
    /// Blocks that are not there yet.
    left: AtomicUsize,
    ended: Mutex<Option<Result<(), String>>>,
    changed: Condvar,
    done: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}

impl LazyRestore {
    /// From now on accesses to these memories wait until [`Self::begin`].
    pub(super) fn new(
        vault: Repository,
        runtime: Handle,
        chain: Vec<Manifest>,
        reading: String,
        layout: Layout,
        memories: &[Arc<GuestMemory>],
    ) -> Result<Self, Unavailable> {
        let faults = memories
            .iter()
            .map(|memory| PageFaults::start(memory.clone(), false))
            .collect::<Result<_, _>>()?;
        let packs = 0..layout.packs().len();
        let blocks = packs.map(|pack| layout.blocks(pack).count()).sum();
        Ok(LazyRestore {
            shared: Arc::new(Shared {
                left: AtomicUsize::new(blocks),
                vault,
                runtime,
                chain,
                reading,
                layout,
                faults,
                claimed: Mutex::default(),
                ended: Mutex::default(),
                changed: Condvar::new(),
                done: AtomicBool::new(false),
            }),
        })
    }

    /// Brings the pages from now on. `tell` hears once how that ended: with an
    /// error pages are lost, and threads may wait for them for ever.
    ///
    /// # Errors
    /// Where the host has no more threads.
    pub fn begin(
        &self,
        tell: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> std::io::Result<()> {
        for memory in 0..self.shared.faults.len() {
            for _ in 0..ANSWERING {
                let shared = self.shared.clone();
                std::thread::Builder::new()
                    .name("warm-faults".into())
                    .spawn(move || shared.answer(memory))?;
            }
        }
        let shared = self.shared.clone();
        std::thread::Builder::new()
            .name("warm-read".into())
            .spawn(move || {
                if shared.left.load(Ordering::Acquire) == 0 {
                    shared.end(Ok(()));
                }
                for pack in 0..shared.layout.packs().len() {
                    shared.read(pack);
                }
                let result = shared.wait();
                shared.let_go();
                tell(result);
            })
            .map(drop)
    }

    /// Waits until all is there.
    ///
    /// # Errors
    /// What is damaged; the machine cannot go on.
    pub fn wait(&self) -> Result<(), String> {
        self.shared.wait()
    }
}

impl Shared {
    fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Answers the accesses to one memory.
    fn answer(&self, memory: usize) {
        let faults = &self.faults[memory];
        while !self.is_done() {
            let fault = match faults.wait(LOOK_EVERY) {
                Ok(Some(fault)) if fault.kind == FaultKind::Missing => fault,
                Ok(_) => continue,
                Err(error) => return self.end(Err(error.to_string())),
            };
            let brought = match self.layout.find(memory, fault.page / PAGE_BYTES) {
                None => faults.provide_zeros(fault.page, PAGE_BYTES).map(drop),
                // Whoever reads it already brings this page too.
                Some(block) if !self.claim(block) => continue,
                Some(block) => match self.fetch(block) {
                    Some(bytes) => self.provide(block, &bytes),
                    None => continue,
                },
            };
            if let Err(error) = brought {
                return self.end(Err(error.to_string()));
            }
        }
    }

    fn claim(&self, block: Block) -> bool {
        locked(&self.claimed).insert(block)
    }

    fn manifest_of(&self, block: Block) -> (&Manifest, PackName, &Pack) {
        let at = self.layout.packs()[block.pack];
        let manifest = &self.chain[at.checkpoint];
        (
            manifest,
            PackName::Pages(at.number),
            &manifest.packs[at.number],
        )
    }

    /// Reads one block; `None` once nothing more is to be brought.
    fn fetch(&self, block: Block) -> Option<Bytes> {
        let (manifest, piece, pack) = self.manifest_of(block);
        while !self.is_done() {
            let read = self.vault.block(manifest, piece, pack, block.number);
            match self.runtime.block_on(read) {
                Ok(bytes) => return Some(bytes),
                Err(error) => self.failed(error),
            }
        }
        None
    }

    /// Reads all of a pack that nobody has read yet.
    fn read(&self, number: usize) {
        let at = self.layout.packs()[number];
        let manifest = &self.chain[at.checkpoint];
        while !self.is_done() {
            let reading = Cell::new(None);
            let result = self.vault.read_blocks::<PackError>(
                &self.runtime,
                (manifest, PackName::Pages(at.number)),
                &manifest.packs[at.number],
                &mut |of_pack| {
                    let block = Block {
                        pack: number,
                        number: of_pack,
                    };
                    let mine = !self.is_done() && self.claim(block);
                    if mine {
                        reading.set(Some(block));
                    }
                    mine
                },
                &mut |_, bytes| {
                    reading
                        .take()
                        .map_or(Ok(()), |block| self.provide(block, bytes))
                        .map_err(PackError::from)
                },
            );
            if let Some(block) = reading.take() {
                locked(&self.claimed).remove(&block);
            }
            match result {
                Ok(()) => return,
                Err(PackError::Repository(error)) => self.failed(error),
                Err(PackError::Memory(error)) => self.end(Err(error.to_string())),
            }
        }
    }

    /// Waits a moment where another try may help.
    fn failed(&self, error: RepositoryError) {
        let RepositoryError::Store(error) = &error else {
            return self.end(Err(error.to_string()));
        };
        // A part that was cut since is no part any more, however often it is read.
        let machine = self.chain.last().map(|manifest| &manifest.machine);
        if let Some(machine) = machine {
            let chain: Vec<_> = self.chain.iter().map(Manifest::outline).collect();
            let checked = self.vault.check_parts(machine, &chain);
            if let Err(part @ RepositoryError::Part { .. }) = self.runtime.block_on(checked) {
                return self.end(Err(part.to_string()));
            }
        }
        tracing::warn!(%error, "pages of a checkpoint do not come; trying again");
        std::thread::sleep(RETRY_AFTER);
    }

    /// Puts what counts of a block in place.
    fn provide(&self, block: Block, bytes: &[u8]) -> Result<(), MemoryError> {
        for piece in self.layout.pieces(block) {
            let faults = &self.faults[piece.memory];
            let bytes = &bytes[piece.within];
            if faults.provide(piece.offset, bytes)? {
                continue;
            }
            // A part of it came before a failure: the guest may have changed it.
            for (page, bytes) in (0..).zip(bytes.chunks(PAGE_BYTES as usize)) {
                faults.provide(piece.offset + page * PAGE_BYTES, bytes)?;
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.end(Ok(()));
        }
        Ok(())
    }

    /// What is read need not be kept any longer for this.
    fn let_go(&self) {
        if let Some(manifest) = self.chain.last() {
            let ended = self.vault.end_reading(manifest, &self.reading);
            if let Err(error) = self.runtime.block_on(ended) {
                tracing::debug!(%error, "a checkpoint is kept for an hour that was read");
            }
        }
    }

    /// The first end counts.
    fn end(&self, result: Result<(), String>) {
        if self.done.swap(true, Ordering::AcqRel) {
            return;
        }
        if result.is_ok() {
            // The rest is zero, as the kernel has it anyway.
            for faults in &self.faults {
                if let Err(error) = faults.stop() {
                    tracing::debug!(%error, "first accesses wait until the last thread is gone");
                }
            }
        }
        // Whoever waits for this may track writes at once.
        *locked(&self.ended) = Some(result);
        self.changed.notify_all();
    }

    fn wait(&self) -> Result<(), String> {
        let mut ended = locked(&self.ended);
        loop {
            if let Some(result) = &*ended {
                return result.clone();
            }
            ended = self
                .changed
                .wait(ended)
                .unwrap_or_else(|error| error.into_inner());
        }
    }
}
