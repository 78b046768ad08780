//! A machine's own volumes in checkpoints: blocks of its files in packs of their
//! own, and in the manifest which ones they are.

use super::format::{BlockRun, Manifest};
use super::take::{Packer, TakeError};
use super::vault::{Piece, Vault};
use super::{RestoreError, VaultError};
use futures::StreamExt;
use keel_wasi::Wasi;
use keel_wasi::volume::{BlockReader, BlockWriter, Changes, Tracker};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use tokio::runtime::Handle;

/// Packs that are read at a time.
const READ_AHEAD: usize = 3;

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
    ) -> Result<(), TakeError> {
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
                note(runs, volume, inode, offset, bytes);
            }
        }
        Ok(())
    }
}

/// Notes bytes that were put into a pack.
fn note(runs: &mut Vec<BlockRun>, number: u32, file: u64, at: u64, length: u64) {
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
    vault: &Vault,
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
    let absent = |volume: u32| {
        disk(std::io::Error::other(format!(
            "there is no volume {volume}"
        )))
    };
    let mut packs = futures::stream::iter(manifest.block_packs.iter().enumerate())
        .map(|(number, pack)| {
            let piece = Piece::Blocks(number);
            vault.pack(&manifest.machine, &manifest.id, piece, pack)
        })
        .buffered(READ_AHEAD);
    let mut rest = keel_net::Bytes::new();
    for run in &manifest.block_runs {
        match *run {
            BlockRun::Cut {
                volume,
                inode,
                bytes,
            } => {
                let writer = writers.get_mut(&volume).ok_or_else(|| absent(volume))?;
                writer.cut(inode, bytes).map_err(disk)?;
            }
            BlockRun::Blocks {
                volume,
                inode,
                offset,
                bytes,
            } => {
                let writer = writers.get_mut(&volume).ok_or_else(|| absent(volume))?;
                let (mut at, end) = (offset, offset + bytes);
                while at < end {
                    if rest.is_empty() {
                        rest = match runtime.block_on(packs.next()) {
                            Some(bytes) => bytes?,
                            // (The manifest's check has made sure that it fits.)
                            None => return Err(VaultError::None(manifest.machine.clone()).into()),
                        };
                    }
                    let count = usize::try_from(end - at).unwrap_or(usize::MAX);
                    let piece = rest.split_to(count.min(rest.len()));
                    writer.write(inode, at, &piece).map_err(disk)?;
                    at += piece.len() as u64;
                }
            }
        }
    }
    Ok(())
}
