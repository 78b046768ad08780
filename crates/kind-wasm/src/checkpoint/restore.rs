//! Restores a machine from a checkpoint. Blocking; runs on a thread of its own.
//!
//! If no checkpoint is named, the newest intact one is used: one with missing or damaged
//! parts is passed over, which the result reports.

use super::lazy_restore::LazyRestore;
use super::spanning_restore::SpanningRestore;
use super::volumes;
use keel_machine::checkpoint::{
    CheckpointId, Layout, Manifest, MemoryRestore, Origin, Repository, RepositoryError, read_pages,
    restore_newest_intact,
};
use keel_machine::failpoint::{self, Injected};
use keel_wasm::memory::{GuestMemory, MemoryError, Unavailable};
use keel_wasm::runtime::{
    Engine, Image, Limits, MachineError, Program, ProgramError, make_memories,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::runtime::Handle;

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
    let one =
        |id: &CheckpointId| restore_one(origin, id, repository, engine, limits, runtime, folder);
    let is_damaged = |error: &RestoreError| {
        matches!(
            error,
            RestoreError::Repository(RepositoryError::Part { .. })
        )
    };
    let (restored, passed_over) =
        restore_newest_intact(origin, repository, runtime, one, is_damaged)?;
    Ok(Restored {
        passed_over,
        ..restored
    })
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
