//! Makes a machine of a checkpoint. Blocking; has a thread of its own.
//!
//! Without a checkpoint being named, the newest that is whole is taken: one
//! whose part is missing or damaged is passed over, and the answer says so.

use super::format::{CheckpointId, Manifest, MemoryRestore, Origin};
use super::layout::{Block, Layout};
use super::lazy_restore::LazyRestore;
use super::repository::{PackName, Repository, RepositoryError};
use super::spanning_restore::SpanningRestore;
use super::volumes;
use crate::failpoint::{self, Injected};
use keel_wasm::memory::{GuestMemory, MemoryError, Unavailable};
use keel_wasm::runtime::{
    Engine, Image, Limits, MachineError, Program, ProgramError, make_memories,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::runtime::Handle;

/// Threads that read packs, at most.
const READING_MAX: usize = 4;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The store, or a part of the one checkpoint that was asked for.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// Its program.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It cannot run before all of its memory is there.
    #[error("it cannot start warm here: {0} (without --warm it can)")]
    NotLazy(#[from] Unavailable),
    /// Its threads.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A test wanted it to fail.
    #[error(transparent)]
    Injected(#[from] Injected),
    /// Its own volumes cannot be made here.
    #[error("the machine's volumes cannot be made in {}: {source}", folder.display())]
    Volume {
        /// Where they were to be.
        folder: PathBuf,
        /// What the host says.
        source: std::io::Error,
    },
    /// All are damaged.
    #[error("no checkpoint of machine {machine:?} is whole: {}", reasons.join("; "))]
    NoneWhole {
        /// The machine.
        machine: String,
        /// What is wrong with each, newest first.
        reasons: Vec<String>,
    },
    /// It is larger than its limit allows.
    #[error(
        "checkpoint {id} has {pages} pages of 64 KiB in memory {memory}, the limit is {limit_bytes} bytes"
    )]
    TooLarge {
        /// The checkpoint.
        id: CheckpointId,
        /// The memory.
        memory: usize,
        /// Its pages.
        pages: u64,
        /// What it may have.
        limit_bytes: u64,
    },
}

/// What a machine is made of.
pub struct Restored {
    /// Its program.
    pub program: Arc<Program>,
    /// Its threads and WASI state.
    pub image: Image,
    /// Its memories, filled.
    pub memories: Arc<[Arc<GuestMemory>]>,
    /// The checkpoint.
    pub manifest: Manifest,
    /// Why newer checkpoints were passed over.
    pub passed_over: Vec<String>,
    /// What of its memory is still to come.
    pub rest: RemainingMemory,
}

/// What of a machine's memory is still to come.
#[derive(Debug)]
pub enum RemainingMemory {
    /// Nothing.
    Complete,
    /// It comes while the machine runs: begin it first.
    Lazy(LazyRestore),
    /// All: it comes when the machine has parts, before it runs.
    Spanning(SpanningRestore),
}

/// Reads a checkpoint. The bytes of the machine's own volumes go into folders
/// in `folder`, by the volumes' numbers; what is there is removed first.
///
/// # Errors
/// [`RestoreError`]; nothing is left then.
pub fn restore(
    origin: &Origin,
    vault: &Repository,
    engine: &Engine,
    limits: Limits,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    if let Some(id) = &origin.id {
        return restore_steady(origin, id, vault, engine, limits, runtime, folder);
    }
    let candidates = runtime.block_on(vault.list(&origin.machine))?;
    if candidates.is_empty() {
        return Err(RepositoryError::None(origin.machine.clone()).into());
    }
    let mut passed_over = Vec::new();
    for id in &candidates {
        match restore_steady(origin, id, vault, engine, limits, runtime, folder) {
            Ok(restored) => {
                return Ok(Restored {
                    passed_over,
                    ..restored
                });
            }
            Err(RestoreError::Repository(error @ RepositoryError::Part { .. })) => {
                tracing::warn!(%error, "trying an older checkpoint");
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

/// As [`restore_one`]; again, if it was made a full one meanwhile.
fn restore_steady(
    origin: &Origin,
    id: &CheckpointId,
    vault: &Repository,
    engine: &Engine,
    limits: Limits,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    let generation = || {
        let manifest = runtime.block_on(vault.manifest(&origin.machine, id));
        manifest.ok().map(|manifest| manifest.generation)
    };
    loop {
        let before = generation();
        match restore_one(origin, id, vault, engine, limits, runtime, folder) {
            Err(RestoreError::Repository(RepositoryError::Part { .. }))
                if generation() != before => {}
            other => return other,
        }
    }
}

fn restore_one(
    origin: &Origin,
    id: &CheckpointId,
    vault: &Repository,
    engine: &Engine,
    limits: Limits,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    let machine = &origin.machine;
    let chain = runtime.block_on(vault.chain(machine, id))?;
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
    let bytes = runtime.block_on(vault.program(newest))?;
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
        volumes::fill(manifest, vault, folder, runtime)?;
    }
    match &origin.memory {
        MemoryRestore::Eager => {
            let write = |memory: usize, offset, bytes: &[u8]| -> Result<(), RestoreError> {
                Ok(memories[memory].write(offset, bytes)?)
            };
            bring(&layout, &chain, vault, runtime, &write)?;
        }
        // Another one can be taken only as long as nothing is made of this: it is read
        // twice.
        MemoryRestore::Spanning(_) if origin.id.is_none() => {
            bring(&layout, &chain, vault, runtime, &|_, _, _| {
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
        // From now on nobody deletes it. What is missing is found now; what is
        // damaged, only when it is read.
        let reading = runtime.block_on(vault.begin_reading(newest))?;
        let outlines: Vec<_> = chain.iter().map(Manifest::outline).collect();
        let checked = runtime.block_on(vault.check_parts(machine, &outlines));
        if let Err(error) = checked {
            // It is kept for an hour otherwise.
            let _ = runtime.block_on(vault.end_reading(newest, &reading));
            return Err(error.into());
        }
        let (vault, runtime) = (vault.clone(), runtime.clone());
        match &origin.memory {
            MemoryRestore::Lazy => RemainingMemory::Lazy(LazyRestore::new(
                vault, runtime, chain, reading, layout, &memories,
            )?),
            _ => RemainingMemory::Spanning(SpanningRestore {
                vault,
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

/// Bytes of memory that a machine made of a checkpoint has: of the one that is named, or
/// of the newest whose manifests can be read. Where all of its memories together are no
/// larger than `most`, just that.
///
/// # Errors
/// [`RepositoryError`].
pub async fn memory_bytes(
    vault: &Repository,
    origin: &Origin,
    most: u64,
) -> Result<u64, RepositoryError> {
    let candidates = match &origin.id {
        Some(id) => vec![id.clone()],
        None => vault.list(&origin.machine).await?,
    };
    let mut damaged = None;
    for id in &candidates {
        let part = |reason: &str| RepositoryError::Part {
            machine: origin.machine.clone(),
            id: id.clone(),
            part: "its chain".into(),
            reason: reason.to_owned(),
        };
        let bytes = async {
            let newest = vault.manifest(&origin.machine, id).await?;
            let pages = newest.memory_pages.iter();
            let all = pages.fold(0u64, |all, pages| all.saturating_add(pages << 16));
            if all <= most {
                return Ok(all);
            }
            let chain = vault.chain(&origin.machine, id).await?;
            Layout::new(&chain).map_err(part).map(|it| it.bytes())
        };
        match bytes.await {
            Ok(bytes) => return Ok(bytes),
            Err(error @ RepositoryError::Part { .. }) => damaged = damaged.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(damaged.unwrap_or_else(|| RepositoryError::None(origin.machine.clone())))
}

/// Takes what is brought: number of the memory, where, and the bytes.
pub(super) type Write<'a, E> = dyn Fn(usize, u64, &[u8]) -> Result<(), E> + Sync + 'a;

/// Brings the pages of a chain, several packs at a time, each page once.
pub(super) fn bring<E: From<RepositoryError> + Send>(
    layout: &Layout,
    chain: &[Manifest],
    vault: &Repository,
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
            let result = vault.read_blocks::<E>(
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
    // They wait for the store most of the time, however few processors there are.
    std::thread::scope(|scope| {
        for _ in 1..READING_MAX.min(layout.packs().len()) {
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
