//! Runs a machine before the pages of its checkpoint are in memory: a page is read when a
//! thread first accesses it, and the others in the background.
//!
//! ```text
//!   guest thread ── accesses ─▶ fault ──▶ its MiB: read, verified, mapped ──▶ resumes
//!                                 all other MiBs, in order, meanwhile ──▶ complete
//! ```
//!
//! Each MiB is verified by its checksum before a page of it becomes visible. Failed
//! requests to the store are repeated for as long as it takes: threads that need a page
//! wait. Damage is found while the machine runs, so the caller must be able to end the
//! machine then: [`LazyRestore::begin`] reports it.

use keel_machine::checkpoint::{
    Block, Layout, Manifest, Pack, PackName, Repository, RepositoryError,
};
use keel_net::Bytes;
use keel_wasm::memory::{FaultKind, GuestMemory, MemoryError, PAGE_BYTES, PageFaults, Unavailable};
use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use tokio::runtime::Handle;

/// Threads that resolve faults of one memory: each reads one MiB at a time.
const FAULT_THREADS: usize = 2;
/// Interval at which they check whether all pages are read.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Pause before a failed request is repeated.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// Why a pack cannot be read.
#[derive(Debug, thiserror::Error)]
enum PackError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Pages of a machine's memory that are still to be read.
pub struct LazyRestore {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for LazyRestore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Behind").finish_non_exhaustive()
    }
}

struct Shared {
    repository: Repository,
    runtime: Handle,
    chain: Vec<Manifest>,
    /// Name of the mark in the store that protects the chain from deletion.
    reading: String,
    layout: Layout,
    faults: Vec<PageFaults>,
    /// Blocks that a thread reads or has read.
    claimed: Mutex<HashSet<Block>>,
    /// Number of blocks that are not read.
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
        repository: Repository,
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
                repository,
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

    /// Starts to read the pages. `tell` receives the result once: after an error pages
    /// are missing, and threads may wait for them for ever.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn begin(
        &self,
        tell: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> std::io::Result<()> {
        for memory in 0..self.shared.faults.len() {
            for _ in 0..FAULT_THREADS {
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
                shared.release();
                tell(result);
            })
            .map(drop)
    }

    /// Waits until all pages are read.
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

    /// Resolves the faults of one memory.
    fn answer(&self, memory: usize) {
        let faults = &self.faults[memory];
        while !self.is_done() {
            let fault = match faults.wait(POLL_INTERVAL) {
                Ok(Some(fault)) if fault.kind == FaultKind::Missing => fault,
                Ok(_) => continue,
                Err(error) => return self.end(Err(error.to_string())),
            };
            let brought = match self.layout.find(memory, fault.page / PAGE_BYTES) {
                None => faults.provide_zeros(fault.page, PAGE_BYTES).map(drop),
                // The thread that reads the block installs this page, too.
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

    /// Reads one block; `None` once the restore has ended.
    fn fetch(&self, block: Block) -> Option<Bytes> {
        let (manifest, piece, pack) = self.manifest_of(block);
        while !self.is_done() {
            let read = self.repository.block(manifest, piece, pack, block.number);
            match self.runtime.block_on(read) {
                Ok(bytes) => return Some(bytes),
                Err(error) => self.failed(error),
            }
        }
        None
    }

    /// Reads all blocks of a pack that no thread has read yet.
    fn read(&self, number: usize) {
        let at = self.layout.packs()[number];
        let manifest = &self.chain[at.checkpoint];
        while !self.is_done() {
            let reading = Cell::new(None);
            let result = self.repository.read_blocks::<PackError>(
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

    /// Waits for a moment if a retry may help.
    fn failed(&self, error: RepositoryError) {
        let RepositoryError::Store(error) = &error else {
            return self.end(Err(error.to_string()));
        };
        // A truncated part stays invalid, however often it is read.
        let machine = self.chain.last().map(|manifest| &manifest.machine);
        if let Some(machine) = machine {
            let chain: Vec<_> = self.chain.iter().map(Manifest::outline).collect();
            let checked = self.repository.check_parts(machine, &chain);
            if let Err(part @ RepositoryError::Part { .. }) = self.runtime.block_on(checked) {
                return self.end(Err(part.to_string()));
            }
        }
        tracing::warn!(%error, "cannot read pages of a checkpoint; retrying");
        std::thread::sleep(RETRY_DELAY);
    }

    /// Installs the newest pages of a block.
    fn provide(&self, block: Block, bytes: &[u8]) -> Result<(), MemoryError> {
        for piece in self.layout.pieces(block) {
            let faults = &self.faults[piece.memory];
            let bytes = &bytes[piece.within];
            if faults.provide(piece.offset, bytes)? {
                continue;
            }
            // Pages installed before a failure may have been changed by the guest.
            for (page, bytes) in (0..).zip(bytes.chunks(PAGE_BYTES as usize)) {
                faults.provide(piece.offset + page * PAGE_BYTES, bytes)?;
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.end(Ok(()));
        }
        Ok(())
    }

    /// Removes the mark that protects the checkpoint from deletion.
    fn release(&self) {
        if let Some(manifest) = self.chain.last() {
            let ended = self.repository.end_reading(manifest, &self.reading);
            if let Err(error) = self.runtime.block_on(ended) {
                tracing::debug!(%error, "cannot remove the read mark of a checkpoint: it is kept for an hour");
            }
        }
    }

    /// Only the first result is kept.
    fn end(&self, result: Result<(), String>) {
        if self.done.swap(true, Ordering::AcqRel) {
            return;
        }
        if result.is_ok() {
            // All other pages are zero, which the kernel provides.
            for faults in &self.faults {
                if let Err(error) = faults.stop() {
                    tracing::debug!(%error, "cannot release the memory from fault handling before the last thread ends");
                }
            }
        }
        // After this wait the caller may track writes at once.
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
