//! Restores a machine from a checkpoint. Blocking; runs on a thread of its own.
//!
//! If no checkpoint is named, the newest intact one is used: one with missing or damaged
//! parts is passed over, which the result reports.

use super::lazy_restore::LazyRestore;
use super::spanning_restore::SpanningRestore;
use super::volumes;
use keel_machine::checkpoint::{
    Block, CheckpointId, Layout, Manifest, MemoryRestore, Origin, PackName, Repository,
    RepositoryError,
};
use keel_machine::failpoint::{self, Injected};
use keel_wasm::memory::{GuestMemory, MemoryError, Unavailable};
use keel_wasm::runtime::{
    Engine, Image, Limits, MachineError, Program, ProgramError, make_memories,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::runtime::Handle;

/// Threads that read packs, at most.
const READERS_MAX: usize = 4;

/// Why a machine was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The store failed, or a part of the named checkpoint is missing or damaged.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// This host cannot run it before all of its memory is read.
    #[error("it cannot start warm here: {0} (without --warm it can)")]
    NotLazy(#[from] Unavailable),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Injected(#[from] Injected),
    /// Its own volumes cannot be created here.
    #[error("the machine's volumes cannot be made in {}: {source}", folder.display())]
    Volume {
        folder: PathBuf,
        source: std::io::Error,
    },
    /// All checkpoints are damaged.
    #[error("no checkpoint of machine {machine:?} is intact: {}", reasons.join("; "))]
    NoneWhole {
        machine: String,
        /// What is wrong with each, newest first.
        reasons: Vec<String>,
    },
    /// A memory exceeds the machine's limit.
    #[error(
        "checkpoint {id} has {pages} pages of 64 KiB in memory {memory}, the limit is {limit_bytes} bytes"
    )]
    TooLarge {
        id: CheckpointId,
        /// Number of the memory.
        memory: usize,
        /// Its size in 64 KiB pages.
        pages: u64,
        limit_bytes: u64,
    },
}

/// A restored machine.
pub struct Restored {
    pub program: Arc<Program>,
    /// Its threads and WASI state.
    pub image: Image,
    /// Its memories.
    pub memories: Arc<[Arc<GuestMemory>]>,
    pub manifest: Manifest,
    /// Why newer checkpoints were passed over.
    pub passed_over: Vec<String>,
    pub rest: RemainingMemory,
}

/// Memory that is still to be read.
#[derive(Debug)]
pub enum RemainingMemory {
    /// None.
    Complete,
    /// Read while the machine runs, after [`LazyRestore::begin`].
    Lazy(LazyRestore),
    /// All of it: read once the machine has parts, before it runs.
    Spanning(SpanningRestore),
}

/// Restores a checkpoint. Files of the machine's own volumes go into folders in `folder`,
/// by volume number; existing content is removed first.
///
/// # Errors
/// [`RestoreError`]; nothing is left then.
pub fn restore(
    origin: &Origin,
    repository: &Repository,
    engine: &Engine,
    limits: Limits,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    if let Some(id) = &origin.id {
        return restore_with_retry(origin, id, repository, engine, limits, runtime, folder);
    }
    let candidates = runtime.block_on(repository.list(&origin.machine))?;
    if candidates.is_empty() {
        return Err(RepositoryError::None(origin.machine.clone()).into());
    }
    let mut passed_over = Vec::new();
    for id in &candidates {
        match restore_with_retry(origin, id, repository, engine, limits, runtime, folder) {
            Ok(restored) => {
                return Ok(Restored {
                    passed_over,
                    ..restored
                });
            }
            Err(RestoreError::Repository(error @ RepositoryError::Part { .. })) => {
                tracing::warn!(%error, "using an older checkpoint");
                passed_over.push(error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    Err(RestoreError::NoneWhole {
        machine: origin.machine.to_string(),
        reasons: passed_over,
    })
}

/// As [`restore_one`]; repeated if the checkpoint was compacted meanwhile.
fn restore_with_retry(
    origin: &Origin,
    id: &CheckpointId,
    repository: &Repository,
    engine: &Engine,
    limits: Limits,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    let generation = || {
        let manifest = runtime.block_on(repository.manifest(&origin.machine, id));
        manifest.ok().map(|manifest| manifest.generation)
    };
    loop {
        let before = generation();
        match restore_one(origin, id, repository, engine, limits, runtime, folder) {
            Err(RestoreError::Repository(RepositoryError::Part { .. }))
                if generation() != before => {}
            other => return other,
        }
    }
}

fn restore_one(
    origin: &Origin,
    id: &CheckpointId,
    repository: &Repository,
    engine: &Engine,
    limits: Limits,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    let machine = &origin.machine;
    let chain = runtime.block_on(repository.chain(machine, id))?;
    failpoint::pass("restore.manifest")?;
    let part = |what: &str, reason: String| RepositoryError::Part {
        machine: machine.clone(),
        id: id.clone(),
        part: what.to_owned(),
        reason,
    };
    let Some(newest) = chain.last() else {
        return Err(RepositoryError::None(machine.clone()).into());
    };
    let bytes = runtime.block_on(repository.program(newest))?;
    let program = engine.load_instrumented(bytes.to_vec())?;
    let memories = make_memories(program.meta(), limits.memory_bytes)?;
    if memories.len() != newest.memory_pages.len() {
        return Err(part(
            "its manifest",
            "it has other memories than its program".into(),
        )
        .into());
    }
    for (number, (memory, pages)) in memories.iter().zip(&newest.memory_pages).enumerate() {
        let missing = pages.saturating_sub(memory.size_bytes() >> 16);
        if memory.grow(missing).is_none() {
            return Err(RestoreError::TooLarge {
                id: id.clone(),
                memory: number,
                pages: *pages,
                limit_bytes: memory.limit_bytes(),
            });
        }
    }
    match std::fs::remove_dir_all(folder) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            let folder = folder.to_owned();
            return Err(RestoreError::Volume { folder, source });
        }
        _ => {}
    }
    let layout = Layout::new(&chain).map_err(|why| part("its chain", why.to_owned()))?;
    for manifest in &chain {
        volumes::restore_files(manifest, repository, folder, runtime)?;
    }
    match &origin.memory {
        MemoryRestore::Eager => {
            let write = |memory: usize, offset, bytes: &[u8]| -> Result<(), RestoreError> {
                Ok(memories[memory].write(offset, bytes)?)
            };
            read_pages(&layout, &chain, repository, runtime, &write)?;
        }
        // Another checkpoint can replace a damaged one only before this one is used: it
        // is read twice.
        MemoryRestore::Spanning(_) if origin.id.is_none() => {
            read_pages(&layout, &chain, repository, runtime, &|_, _, _| {
                Ok::<_, RestoreError>(())
            })?;
        }
        MemoryRestore::Spanning(_) | MemoryRestore::Lazy => {}
    }
    failpoint::pass("restore.pages")?;
    let mut image = Image::decode(&newest.image, &program)
        .map_err(|error| part("its threads", error.to_string()))?;
    if origin.is_clone {
        image.wasi.seed = rand::random();
        image.wasi.machine = rand::random();
        image.wasi.random.clear();
    }
    let manifest = newest.clone();
    let rest = if origin.memory == MemoryRestore::Eager {
        RemainingMemory::Complete
    } else {
        // From now on it is not deleted. Missing parts are found now, damaged ones only
        // when they are read.
        let reading = runtime.block_on(repository.begin_reading(newest))?;
        let outlines: Vec<_> = chain.iter().map(Manifest::outline).collect();
        let checked = runtime.block_on(repository.check_parts(machine, &outlines));
        if let Err(error) = checked {
            // Otherwise it is kept for an hour.
            let _ = runtime.block_on(repository.end_reading(newest, &reading));
            return Err(error.into());
        }
        let (repository, runtime) = (repository.clone(), runtime.clone());
        match &origin.memory {
            MemoryRestore::Lazy => RemainingMemory::Lazy(LazyRestore::new(
                repository, runtime, chain, reading, layout, &memories,
            )?),
            _ => RemainingMemory::Spanning(SpanningRestore {
                repository,
                runtime,
                chain,
                reading,
                layout,
            }),
        }
    };
    Ok(Restored {
        program,
        image,
        memories,
        manifest,
        passed_over: Vec::new(),
        rest,
    })
}

/// Receives restored pages: number of the memory, offset, and bytes.
pub(super) type Write<'a, E> = dyn Fn(usize, u64, &[u8]) -> Result<(), E> + Sync + 'a;

/// Reads the pages of a chain, several packs at a time, each page once.
pub(super) fn read_pages<E: From<RepositoryError> + Send>(
    layout: &Layout,
    chain: &[Manifest],
    repository: &Repository,
    runtime: &Handle,
    write: &Write<'_, E>,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let read = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(at) = layout.packs().get(number) else {
                return;
            };
            let manifest = &chain[at.checkpoint];
            let block = |of_pack| Block {
                pack: number,
                number: of_pack,
            };
            let result = repository.read_blocks::<E>(
                runtime,
                (manifest, PackName::Pages(at.number)),
                &manifest.packs[at.number],
                &mut |of_pack| !layout.pieces(block(of_pack)).is_empty(),
                &mut |of_pack, bytes| {
                    for piece in layout.pieces(block(of_pack)) {
                        write(piece.memory, piece.offset, &bytes[piece.within])?;
                    }
                    Ok(())
                },
            );
            if let Err(error) = result {
                next.store(layout.packs().len(), Ordering::Relaxed);
                failure
                    .lock()
                    .unwrap_or_else(|error| error.into_inner())
                    .get_or_insert(error);
                return;
            }
        }
    };
    // Threads mostly wait for the store, however few processors there are.
    std::thread::scope(|scope| {
        for _ in 1..READERS_MAX.min(layout.packs().len()) {
            scope.spawn(read);
        }
        read();
    });
    match failure
        .into_inner()
        .unwrap_or_else(|error| error.into_inner())
    {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
