//! A machine's own volumes in checkpoints: file blocks in packs of their own, described
//! in the manifest.

use super::RestoreError;
use super::create::CreateError;
use keel_machine::checkpoint::{
    BlockRun, BlockTarget, Manifest, Packer, Repository, note_block, replay_blocks,
};
use keel_wasi::Wasi;
use keel_wasi::volume::{BlockReader, BlockWriter, Changes, Tracker};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use tokio::runtime::Handle;

/// Tracks writes to a machine's volumes since its last checkpoint.
#[derive(Debug, Default)]
pub(super) struct VolumeTrackers(Vec<(u32, Tracker, BlockReader)>);

impl VolumeTrackers {
    /// Starts anew: all present blocks count as written. Cluster volumes have snapshots
    /// of their own.
    pub(super) fn start(wasi: &Wasi) -> Self {
        let volumes = wasi.volumes().into_iter();
        let volumes = volumes.filter(|(_, volume)| volume.backing().is_none());
        VolumeTrackers(
            volumes
                .map(|(number, volume)| (number, volume.track(), BlockReader::new(volume)))
                .collect(),
        )
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Changes since the last call, with the number of their bytes.
    pub(super) fn take(&self) -> (Vec<Changes>, u64) {
        let changes = self.0.iter().map(|(_, tracker, _)| tracker.take());
        let changes = changes.collect::<Vec<_>>();
        let bytes = changes.iter().map(Changes::bytes).sum();
        (changes, bytes)
    }

    /// Adds changes to packs; as [`Packer::add`], only full packs are stored, and only
    /// with `give_up`.
    pub(super) fn add(
        &mut self,
        changes: Vec<Changes>,
        packer: &mut Packer,
        runs: &mut Vec<BlockRun>,
        give_up: Option<&AtomicBool>,
    ) -> Result<(), CreateError> {
        for ((volume, _, reader), changes) in self.0.iter_mut().zip(changes) {
            let volume = *volume;
            for &(inode, bytes) in &changes.cuts {
                runs.push(BlockRun::Cut {
                    volume,
                    inode,
                    bytes,
                });
            }
            for (inode, piece) in changes.pieces() {
                let (offset, count) = (piece.start, (piece.end - piece.start) as usize);
                let read = |buffer: &mut [u8]| -> Result<usize, CreateError> {
                    Ok(reader.read(inode, offset, buffer)?)
                };
                let bytes = packer.add_bytes(count, give_up, read)? as u64;
                note_block(runs, volume, inode, offset, bytes);
            }
        }
        Ok(())
    }
}

/// Restores the files of volumes into a folder.
pub(super) fn restore_files(
    manifest: &Manifest,
    repository: &Repository,
    folder: &Path,
    runtime: &Handle,
) -> Result<(), RestoreError> {
    let mut writers: HashMap<u32, BlockWriter> = HashMap::new();
    let disk = |source: std::io::Error| RestoreError::Volume {
        folder: folder.to_owned(),
        source,
    };
    for number in manifest.spec.own_volumes() {
        let writer = BlockWriter::new(&folder.join(number.to_string())).map_err(disk)?;
        writers.insert(number, writer);
    }
    let mut target = Volumes { writers, folder };
    replay_blocks(manifest, repository, runtime, &mut target)
}

/// The volumes of a machine that is restored.
struct Volumes<'a> {
    writers: HashMap<u32, BlockWriter>,
    folder: &'a Path,
}

impl Volumes<'_> {
    fn failed(&self, source: std::io::Error) -> RestoreError {
        RestoreError::Volume {
            folder: self.folder.to_owned(),
            source,
        }
    }

    fn writer(&mut self, volume: u32) -> Result<&mut BlockWriter, RestoreError> {
        let missing = self.failed(std::io::Error::other(format!(
            "there is no volume {volume}"
        )));
        self.writers.get_mut(&volume).ok_or(missing)
    }
}

impl BlockTarget for Volumes<'_> {
    type Error = RestoreError;

    fn cut(&mut self, volume: u32, inode: u64, bytes: u64) -> Result<(), RestoreError> {
        let cut = self.writer(volume)?.cut(inode, bytes);
        cut.map_err(|error| self.failed(error))
    }

    fn write(
        &mut self,
        volume: u32,
        inode: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), RestoreError> {
        let written = self.writer(volume)?.write(inode, offset, bytes);
        written.map_err(|error| self.failed(error))
    }
}
