//! Makes a machine of a checkpoint. Blocking; has a thread of its own.
//!
//! Without a checkpoint being named, the newest that is whole is taken: one
//! whose part is missing or damaged is passed over, and the answer says so.

use super::format::{CheckpointId, Manifest, Origin, Run};
use super::vault::{Piece, Vault, VaultError};
use super::volumes;
use crate::failpoint::{self, Injected};
use futures::StreamExt;
use keel_wasm::memory::{GuestMemory, MemoryError, PAGE_BYTES};
use keel_wasm::runtime::{
    Engine, Image, Limits, MachineError, Program, ProgramError, make_memories,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::runtime::Handle;

/// Packs that are read at a time.
const READ_AHEAD: usize = 3;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The store, or a part of the one checkpoint that was asked for.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// Its program.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
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
}

/// Reads a checkpoint. The bytes of the machine's own volumes go into folders
/// in `folder`, by the volumes' numbers; what is there is removed first.
///
/// # Errors
/// [`RestoreError`]; nothing is left then.
pub fn restore(
    origin: &Origin,
    vault: &Vault,
    engine: &Engine,
    limits: Limits,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    if let Some(id) = &origin.id {
        return restore_one(origin, id, vault, engine, limits, runtime, folder);
    }
    let candidates = runtime.block_on(vault.list(&origin.machine))?;
    if candidates.is_empty() {
        return Err(VaultError::None(origin.machine.clone()).into());
    }
    let mut passed_over = Vec::new();
    for id in &candidates {
        match restore_one(origin, id, vault, engine, limits, runtime, folder) {
            Ok(restored) => {
                return Ok(Restored {
                    passed_over,
                    ..restored
                });
            }
            Err(RestoreError::Vault(error @ VaultError::Part { .. })) => {
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

fn restore_one(
    origin: &Origin,
    id: &CheckpointId,
    vault: &Vault,
    engine: &Engine,
    limits: Limits,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    let machine = &origin.machine;
    let mut chain = runtime.block_on(vault.chain(machine, id))?;
    failpoint::pass("restore.manifest")?;
    let part = |what: &str, reason: String| VaultError::Part {
        machine: machine.clone(),
        id: id.clone(),
        part: what.to_owned(),
        reason,
    };
    let Some(newest) = chain.last() else {
        return Err(VaultError::None(machine.clone()).into());
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
    for manifest in &chain {
        fill(manifest, vault, &memories, runtime)?;
        volumes::fill(manifest, vault, folder, runtime)?;
    }
    failpoint::pass("restore.pages")?;
    let mut image = Image::decode(&newest.image, &program)
        .map_err(|error| part("its threads", error.to_string()))?;
    if origin.is_clone {
        image.wasi.seed = rand::random();
        image.wasi.machine = rand::random();
        image.wasi.random.clear();
    }
    let Some(manifest) = chain.pop() else {
        return Err(VaultError::None(machine.clone()).into());
    };
    Ok(Restored {
        program,
        image,
        memories,
        manifest,
        passed_over: Vec::new(),
    })
}

/// Writes the pages of one checkpoint.
fn fill(
    manifest: &Manifest,
    vault: &Vault,
    memories: &[Arc<GuestMemory>],
    runtime: &Handle,
) -> Result<(), RestoreError> {
    let mut packs = futures::stream::iter(manifest.packs.iter().enumerate())
        .map(|(number, pack)| {
            let piece = Piece::Pages(number);
            vault.pack(&manifest.machine, &manifest.id, piece, pack)
        })
        .buffered(READ_AHEAD);
    let mut runs = manifest.runs.iter().copied();
    let mut run: Option<Run> = None;
    while let Some(bytes) = runtime.block_on(packs.next()) {
        let bytes = bytes?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let Some(now) = run.take().or_else(|| runs.next()) else {
                break;
            };
            // (The manifest's check has made sure that all of it fits.)
            let wanted = now.pages as usize * PAGE_BYTES as usize;
            let (piece, after) = rest.split_at(wanted.min(rest.len()));
            let pages = (piece.len() / PAGE_BYTES as usize) as u32;
            if let Some(memory) = memories.get(now.memory as usize) {
                memory.write(u64::from(now.first) * PAGE_BYTES, piece)?;
            }
            if pages < now.pages {
                run = Some(Run {
                    first: now.first + pages,
                    pages: now.pages - pages,
                    ..now
                });
            }
            rest = after;
        }
    }
    Ok(())
}
