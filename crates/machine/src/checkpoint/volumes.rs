//! A machine's own volumes in checkpoints: blocks of its files in packs of their
//! own, and in the manifest which ones they are.

use super::RestoreError;
use super::create::{CreateError, Packer};
use super::format::{BlockRun, Manifest};
use super::repository::{PackName, Repository};
use keel_wasi::Wasi;
use keel_wasi::volume::{BlockReader, BlockWriter, Changes, Tracker};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use tokio::runtime::Handle;

/// Knows what was written to a machine's volumes since its last checkpoint.
#[derive(Debug, Default)]
pub(super) struct VolumeTrackers(Vec<(u32, Tracker, BlockReader)>);

impl VolumeTrackers {
    /// Begins anew: all that is there counts as written. Volumes that are kept
    /// elsewhere have snapshots there.
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

    /// What was written since the last look, with the bytes that it has.
    pub(super) fn take(&self) -> (Vec<Changes>, u64) {
        let changes = self.0.iter().map(|(_, tracker, _)| tracker.take());
        let changes = changes.collect::<Vec<_>>();
        let bytes = changes.iter().map(Changes::bytes).sum();
        (changes, bytes)
    }

    /// Puts changes into packs; as [`Packer::add`], with `give_up` only full
    /// packs are stored on the way.
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
                let read = |buffer: &mut [u8]| reader.read(inode, offset, buffer);
                let bytes = packer.add_bytes(count, give_up, read)? as u64;
                note_block(runs, volume, inode, offset, bytes);
            }
        }
        Ok(())
    }
}

/// Notes bytes of a file that were put into a pack.
pub(super) fn note_block(runs: &mut Vec<BlockRun>, number: u32, file: u64, at: u64, length: u64) {
    if length == 0 {
        return;
    }
    match runs.last_mut() {
        Some(BlockRun::Blocks {
            volume,
            inode,
            offset,
            bytes,
        }) if *volume == number && *inode == file && *offset + *bytes == at => *bytes += length,
        _ => runs.push(BlockRun::Blocks {
            volume: number,
            inode: file,
            offset: at,
            bytes: length,
        }),
    }
}

/// Repeats in a folder what a checkpoint has of volumes.
pub(super) fn fill(
    manifest: &Manifest,
    vault: &Repository,
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
    let mut filling = VolumeReplay {
        runs: manifest.block_runs.iter(),
        now: None,
        writers,
        folder,
    };
    filling.cuts()?;
    for (number, pack) in manifest.block_packs.iter().enumerate() {
        vault.read_blocks(
            runtime,
            (manifest, PackName::Blocks(number)),
            pack,
            &mut |_| true,
            &mut |_, bytes| filling.add(bytes),
        )?;
    }
    Ok(())
}

/// Repeats what happened to files, as its bytes come.
struct VolumeReplay<'a> {
    runs: std::slice::Iter<'a, BlockRun>,
    /// What the next bytes are of: file, where, and how many of them.
    now: Option<(u32, u64, u64, u64)>,
    writers: HashMap<u32, BlockWriter>,
    folder: &'a Path,
}

impl VolumeReplay<'_> {
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

    /// Goes on to the next run that has bytes.
    fn cuts(&mut self) -> Result<(), RestoreError> {
        while let Some(run) = self.runs.next() {
            match *run {
                BlockRun::Cut {
                    volume,
                    inode,
                    bytes,
                } => {
                    let cut = self.writer(volume)?.cut(inode, bytes);
                    cut.map_err(|error| self.failed(error))?;
                }
                BlockRun::Blocks {
                    volume,
                    inode,
                    offset,
                    bytes,
                } => {
                    self.now = Some((volume, inode, offset, bytes));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, mut bytes: &[u8]) -> Result<(), RestoreError> {
        while !bytes.is_empty() {
            // (The manifest's check has made sure that it fits.)
            let Some((volume, inode, offset, left)) = self.now.take() else {
                return Ok(());
            };
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            let (piece, rest) = bytes.split_at(count);
            let written = self.writer(volume)?.write(inode, offset, piece);
            written.map_err(|error| self.failed(error))?;
            bytes = rest;
            let count = count as u64;
            if count < left {
                self.now = Some((volume, inode, offset + count, left - count));
            } else {
                self.cuts()?;
            }
        }
        Ok(())
    }
}
