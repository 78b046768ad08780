//! Restores a system from a checkpoint. Blocking; runs on a thread of its own.
//!
//! The disk is made first, then QEMU is started as for a machine that arrives, and gets its stream
//! put together from the newest copy of each page, in whatever order packs are read.

use super::disk::{DiskError, RestoredDisk, Zeroes};
use super::ram_stream::{StreamError, Writer};
use super::state::SystemState;
use crate::migration::Incoming;
use crate::spec::QemuSpec;
use crate::vm::Vm;
use keel_machine::checkpoint::{
    CheckpointId, Layout, Manifest, Origin, Repository, RepositoryError, read_pages, replay_blocks,
    restore_newest_intact,
};
use keel_machine::failpoint::{self, Injected};
use keel_machine::worker::MoveError;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::runtime::Handle;

/// Bytes that are passed to QEMU at once.
const PIECE_BYTES: usize = 256 << 10;

/// Why a system was not restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    /// The store failed, or a part of the checkpoint is missing or damaged.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Disk(DiskError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("{0}")]
    Qemu(MoveError),
    #[error(transparent)]
    Injected(#[from] Injected),
}

impl From<DiskError> for RestoreError {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::Repository(error) => RestoreError::Repository(error),
            error => RestoreError::Disk(error),
        }
    }
}

impl RestoreError {
    /// Whether an older checkpoint may do.
    fn is_damage(&self) -> bool {
        matches!(self, RestoreError::Repository(RepositoryError::Part { .. }))
    }
}

/// A checkpoint whose disk has been made here, and whose memory is still to be read.
pub(crate) struct Restored {
    pub(crate) manifest: Manifest,
    /// Why newer checkpoints were passed over.
    pub(crate) passed_over: Vec<String>,
    chain: Vec<Manifest>,
    layout: Layout,
    state: SystemState,
}

/// Reads a checkpoint, and makes the disk of its machine in the folder of the worker. Memory is read
/// by [`Restored::load`]; it is looked at here only where another checkpoint could replace it.
///
/// # Errors
/// [`RestoreError`].
pub(crate) fn restore(
    origin: &Origin,
    own: &QemuSpec,
    repository: &Repository,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    let one = |id: &CheckpointId| restore_one(origin, id, own, repository, runtime, folder);
    let (restored, passed_over) =
        restore_newest_intact(origin, repository, runtime, one, RestoreError::is_damage)?;
    Ok(Restored {
        passed_over,
        ..restored
    })
}

fn restore_one(
    origin: &Origin,
    id: &CheckpointId,
    own: &QemuSpec,
    repository: &Repository,
    runtime: &Handle,
    folder: &Path,
) -> Result<Restored, RestoreError> {
    let chain = runtime.block_on(repository.chain(&origin.machine, id))?;
    failpoint::pass("restore.manifest")?;
    let part = |what: &str, reason: String| RepositoryError::Part {
        machine: origin.machine.clone(),
        id: id.clone(),
        part: what.to_owned(),
        reason,
    };
    let Some(manifest) = chain.last().cloned() else {
        return Err(RepositoryError::None(origin.machine.clone()).into());
    };
    let (state, zeroes) =
        SystemState::decode(&manifest.image).map_err(|reason| part("its devices", reason))?;
    if state.memory_pages() != manifest.memory_pages {
        let reason = "they have other memory than the manifest".to_owned();
        return Err(part("its devices", reason).into());
    }
    let layout = Layout::new(&chain).map_err(|reason| part("its chain", reason.to_owned()))?;
    restore_disk(&chain, own, &zeroes, repository, runtime, folder)?;
    if origin.id.is_none() {
        // It is read twice, for another checkpoint can replace a damaged one only now.
        read_pages(&layout, &chain, repository, runtime, &|_, _, _| {
            Ok::<_, RestoreError>(())
        })?;
    }
    failpoint::pass("restore.pages")?;
    Ok(Restored {
        manifest,
        passed_over: Vec::new(),
        chain,
        layout,
        state,
    })
}

fn restore_disk(
    chain: &[Manifest],
    own: &QemuSpec,
    zeroes: &Zeroes,
    repository: &Repository,
    runtime: &Handle,
    folder: &Path,
) -> Result<(), DiskError> {
    let Some(disk) = &own.root else {
        let is_empty = chain.iter().all(|it| it.block_runs.is_empty());
        return match is_empty && zeroes.is_empty() {
            true => Ok(()),
            false => Err(DiskError::Strange),
        };
    };
    let mut restored = RestoredDisk::begin(folder, disk)?;
    for manifest in chain {
        replay_blocks(manifest, repository, runtime, &mut restored)?;
    }
    restored.finish(zeroes)
}

impl Restored {
    /// Passes the system on to a QEMU that was started for it; it is there then, stopped.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(crate) fn load(
        &self,
        vm: &Arc<Vm>,
        repository: &Repository,
        runtime: &Handle,
    ) -> Result<(), RestoreError> {
        let mut incoming = Incoming::begin(vm).map_err(RestoreError::Qemu)?;
        {
            let output = BufWriter::with_capacity(PIECE_BYTES, ToQemu(&mut incoming));
            let writer = Mutex::new(Writer::begin(output, &self.state.head)?);
            let write = |block: usize, at: u64, pages: &[u8]| -> Result<(), RestoreError> {
                let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(writer.pages(block, at, pages)?)
            };
            read_pages(&self.layout, &self.chain, repository, runtime, &write)?;
            let writer = writer.into_inner().unwrap_or_else(PoisonError::into_inner);
            writer.finish(&self.state.devices)?;
        }
        incoming.finish().map_err(RestoreError::Qemu)
    }
}

/// QEMU, as something that is written to.
struct ToQemu<'a>(&'a mut Incoming);

impl Write for ToQemu<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.take(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
