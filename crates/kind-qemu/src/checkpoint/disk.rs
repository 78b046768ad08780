//! A machine's own disk in checkpoints.
//!
//! ```text
//!   guest ──▶ root.qcow2 ── blockdev-backup ──▶ checkpoint.qcow2 ──▶ packs
//!                 │ (from the moment of the checkpoint: before the guest
//!                 │  writes something, what was there is copied)
//!                image
//! ```
//!
//! QEMU copies the machine's layer into another one while the guest runs: all of it, or, by a bitmap,
//! what was written since the checkpoint before. The image below is not copied. What reads as zeroes
//! is not stored but known, of the whole disk, in the state of each checkpoint: a disk whose files
//! were removed may have many zeroes, over an image that has something there.

use super::create::CreateError;
use crate::block_job::BACKUP;
use crate::root_disk::{self, ROOT};
use crate::spec::{DiskFormat, RootDisk};
use crate::vm::Vm;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, Mapping};
use keel_machine::checkpoint::{
    BlockRun, BlockTarget, OWN_DISK, Packer, RepositoryError, note_block,
};
use roaring::RoaringBitmap;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The name of the copy in the worker's folder.
const FILE: &str = "checkpoint.qcow2";
/// QEMU's name for what was written since the last checkpoint.
const BITMAP: &str = "checkpoint";
/// How often a copy is asked whether it is to end early.
const POLL: Duration = Duration::from_millis(100);
/// The unit in which zeroes are known, in bytes: a cluster of a layer.
const CLUSTER_BYTES: u64 = 64 << 10;
/// Bytes that are read from a copy at once.
const READ_BYTES: u64 = 1 << 20;

/// Bytes that were written to the disk since the last checkpoint; `None` if that is not known.
fn written_bytes(vm: &Vm) -> Result<Option<u64>, CreateError> {
    let nodes: Vec<Value> = vm.qmp()?.query("query-named-block-nodes")?;
    let root = nodes.iter().find(|node| node["node-name"] == ROOT);
    let bitmaps = root.and_then(|root| root["dirty-bitmaps"].as_array());
    let bitmap = bitmaps.and_then(|all| all.iter().find(|it| it["name"] == BITMAP));
    Ok(bitmap.map(|bitmap| bitmap["count"].as_u64().unwrap_or(0)))
}

/// The most bytes that a copy of the disk takes: what the layer occupies, or what was written since
/// the last checkpoint.
///
/// # Errors
/// If QEMU does not say it.
pub(super) fn copied_bytes(vm: &Vm, is_incremental: bool) -> Result<u64, CreateError> {
    let all = root_disk::occupied_bytes(vm.folder());
    match is_incremental {
        true => Ok(written_bytes(vm)?.unwrap_or(all)),
        false => Ok(all),
    }
}

/// Which clusters of a disk read as zeroes.
pub(super) type Zeroes = RoaringBitmap;

/// The copy of a disk for a checkpoint. It is removed at the end.
pub(super) struct DiskBackup<'a> {
    vm: &'a Vm,
    path: PathBuf,
    disk: &'a RootDisk,
    is_incremental: bool,
}

impl<'a> DiskBackup<'a> {
    /// Prepares it.
    ///
    /// # Errors
    /// If there is no room, or QEMU refuses.
    pub(super) fn prepare(
        vm: &'a Vm,
        disk: &'a RootDisk,
        is_incremental: bool,
    ) -> Result<Self, CreateError> {
        // Of an earlier checkpoint.
        BACKUP.cancel(vm)?;
        let path = vm.folder().join(FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        root_disk::make(&path, disk)?;
        let backup = DiskBackup {
            vm,
            path,
            disk,
            is_incremental,
        };
        vm.forget_job(BACKUP.id);
        vm.qmp()?.execute(
            "blockdev-add",
            json!({
                "driver": DiskFormat::Qcow2.word(),
                "node-name": BACKUP.target,
                "file": { "driver": "file", "filename": FILE },
            }),
        )?;
        Ok(backup)
    }

    /// Writes what the page cache of this node has of the disk: QEMU does when it stops the guest, which
    /// stands still for as long as that takes.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn flush(&self) -> Result<(), CreateError> {
        let layer = std::fs::File::open(root_disk::path(self.vm.folder()))?;
        Ok(layer.sync_data()?)
    }

    /// Begins to copy what the disk of a stopped guest has now.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub(super) fn begin(&self) -> Result<(), CreateError> {
        let action = |name: &str, data: Value| json!({ "type": name, "data": data });
        let bitmap = json!({ "node": ROOT, "name": BITMAP });
        let mut copy = json!({
            "job-id": BACKUP.id,
            "device": ROOT,
            "target": BACKUP.target,
            "filter-node-name": BACKUP.filter,
            "sync": "top",
        });
        let mut actions = Vec::new();
        match self.is_incremental {
            true => {
                copy["sync"] = "bitmap".into();
                copy["bitmap"] = BITMAP.into();
                // If the checkpoint fails later, the next one is a full one.
                copy["bitmap-mode"] = "always".into();
            }
            // (One that was removed in a transaction keeps its name until that ends.)
            false => actions.push(match written_bytes(self.vm)? {
                Some(_) => action("block-dirty-bitmap-clear", bitmap),
                None => action("block-dirty-bitmap-add", bitmap),
            }),
        }
        actions.push(action("blockdev-backup", copy));
        let all = json!({ "actions": actions });
        Ok(self.vm.qmp()?.execute("transaction", all)?)
    }

    /// Waits until all is copied.
    ///
    /// # Errors
    /// If it was not, or `give_up` is set.
    pub(super) fn wait(&self, give_up: &AtomicBool) -> Result<(), CreateError> {
        loop {
            match self.vm.job_end_within(BACKUP.id, POLL) {
                Some(Ok(())) => break,
                Some(Err(reason)) => return Err(CreateError::Disk(reason)),
                None if give_up.load(Ordering::Relaxed) => return Err(CreateError::GivenUp),
                None if self.vm.has_ended() => return Err(CreateError::Ended),
                None => {}
            }
        }
        let node = json!({ "node-name": BACKUP.target });
        Ok(self.vm.qmp()?.execute("blockdev-del", node)?)
    }

    /// Adds what was copied to packs; `zeroes` are those of the disk at the checkpoint before, and
    /// then those of this one.
    ///
    /// # Errors
    /// If it cannot be read or stored, or `give_up` is set.
    pub(super) fn add(
        &self,
        blocks: &mut Packer,
        runs: &mut Vec<BlockRun>,
        zeroes: &mut Zeroes,
        give_up: &AtomicBool,
    ) -> Result<(), CreateError> {
        let copy = FormatAccess::new(Qcow2::<File>::open_path(&self.path, false)?);
        add_layer(&copy, self.disk.bytes, zeroes, |offset, count| {
            blocks.add_bytes(count as usize, Some(give_up), |buffer| {
                copy.read(&mut *buffer, offset)?;
                Ok::<_, CreateError>(buffer.len())
            })?;
            note_block(runs, OWN_DISK, 0, offset, count);
            Ok(())
        })
    }
}

/// Passes on where a layer has data, piece by piece, and updates which clusters are zeroes.
fn add_layer(
    layer: &FormatAccess<File>,
    bytes: u64,
    zeroes: &mut Zeroes,
    mut add: impl FnMut(u64, u64) -> Result<(), CreateError>,
) -> Result<(), CreateError> {
    let mut at = 0;
    while at < bytes {
        let (mapping, length) = layer.get_mapping(at, bytes - at)?;
        let end = at + length;
        match mapping {
            _ if length == 0 => return Err(CreateError::Disk("its copy ends too early".into())),
            Mapping::Zero {
                explicit: false, ..
            } => {}
            Mapping::Zero { .. } => {
                zeroes.insert_range(clusters(at, length)?);
            }
            Mapping::Raw { .. } | Mapping::Special { .. } => {
                zeroes.remove_range(clusters(at, length)?);
                while at < end {
                    let count = (end - at).min(READ_BYTES);
                    add(at, count)?;
                    at += count;
                }
            }
            _ => return Err(CreateError::Disk("its copy is too small".into())),
        }
        at = end;
    }
    Ok(())
}

impl Drop for DiskBackup<'_> {
    fn drop(&mut self) {
        // QEMU may have it open yet, and writes then into a file without a name.
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, "the copy of a disk for a checkpoint cannot be removed");
        }
    }
}

/// The clusters of a range of a disk.
fn clusters(at: u64, length: u64) -> Result<std::ops::Range<u32>, CreateError> {
    let number = |bytes: u64| u32::try_from(bytes / CLUSTER_BYTES);
    let range = || Ok(number(at)?..number((at + length).next_multiple_of(CLUSTER_BYTES))?);
    let range: Result<_, std::num::TryFromIntError> = range();
    match at.is_multiple_of(CLUSTER_BYTES) {
        true => range.map_err(|_| CreateError::Disk("it is too large".into())),
        false => Err(CreateError::Disk(
            "its copy has clusters of another size".into(),
        )),
    }
}

/// A disk that is restored: a new layer, which gets its name once it is whole.
pub(super) struct RestoredDisk {
    new: PathBuf,
    layer: FormatAccess<File>,
    bytes: u64,
}

/// Why it is not.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("the machine's disk cannot be written: {0}")]
    Io(#[from] io::Error),
    #[error("it has blocks that are not its disk's")]
    Strange,
}

impl RestoredDisk {
    /// Begins with an empty layer in the folder of the worker.
    ///
    /// # Errors
    /// If it cannot be made.
    pub(super) fn begin(folder: &Path, disk: &RootDisk) -> Result<Self, DiskError> {
        let new = root_disk::path(folder).with_extension("restored");
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        root_disk::make(&new, disk)?;
        let layer = FormatAccess::new(Qcow2::<File>::open_path(&new, true)?);
        let bytes = disk.bytes;
        Ok(RestoredDisk { new, layer, bytes })
    }

    /// Writes the zeroes, and gives the layer its name.
    ///
    /// # Errors
    /// If that is not possible.
    pub(super) fn finish(self, zeroes: &Zeroes) -> Result<(), DiskError> {
        let mut ranges = zeroes.iter().peekable();
        while let Some(first) = ranges.next() {
            let mut last = first;
            while let Some(next) = ranges.next_if(|next| *next == last + 1) {
                last = next;
            }
            let at = u64::from(first) * CLUSTER_BYTES;
            let end = (u64::from(last) + 1) * CLUSTER_BYTES;
            let length = end.min(self.bytes).checked_sub(at);
            let length = length.filter(|it| *it > 0).ok_or(DiskError::Strange)?;
            self.layer.write_zeroes(at, length)?;
        }
        self.layer.flush()?;
        self.layer.sync()?;
        drop(self.layer);
        let path = self.new.with_file_name(root_disk::FILE);
        Ok(root_disk::rename(&self.new, &path)?)
    }
}

impl BlockTarget for RestoredDisk {
    type Error = DiskError;

    fn cut(&mut self, _volume: u32, _inode: u64, _bytes: u64) -> Result<(), DiskError> {
        Err(DiskError::Strange)
    }

    fn write(
        &mut self,
        volume: u32,
        inode: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), DiskError> {
        let end = offset.checked_add(bytes.len() as u64);
        if volume != OWN_DISK || inode != 0 || end.is_none_or(|end| end > self.bytes) {
            return Err(DiskError::Strange);
        }
        Ok(self.layer.write(bytes, offset)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: usize = CLUSTER_BYTES as usize;
    /// Ends in the middle of a cluster.
    const BYTES: u64 = 100 * CLUSTER_BYTES + 512;

    fn layer(folder: &Path, name: &str) -> FormatAccess<File> {
        let path = folder.join(name);
        let disk = RootDisk {
            image: "aa".into(),
            format: DiskFormat::Raw,
            bytes: BYTES,
        };
        if !path.exists() {
            root_disk::make(&path, &disk).unwrap();
        }
        FormatAccess::new(Qcow2::<File>::open_path(&path, true).unwrap())
    }

    /// Where a layer has data.
    fn data(layer: &FormatAccess<File>, zeroes: &mut Zeroes) -> Vec<(u64, u64)> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        let add = |at, count| {
            found.push((at, count));
            Ok(())
        };
        add_layer(layer, BYTES, zeroes, add).unwrap();
        found
    }

    #[test]
    fn data_and_zeroes_of_a_layer_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let mut zeroes = Zeroes::from_iter([7, 8, 50]);
        let full = layer(folder.path(), "full");
        full.write(&[1; 3 * CLUSTER][..], 6 * CLUSTER_BYTES)
            .unwrap();
        full.write_zeroes(20 * CLUSTER_BYTES, 5 * CLUSTER_BYTES)
            .unwrap();
        full.write_zeroes(100 * CLUSTER_BYTES, 512).unwrap();
        let found = data(&full, &mut zeroes);
        assert_eq!(found, [(6 * CLUSTER_BYTES, 3 * CLUSTER_BYTES)]);
        // What the layer says nothing about is as it was.
        let expected = [20, 21, 22, 23, 24, 50, 100];
        assert_eq!(zeroes, Zeroes::from_iter(expected));
    }

    #[test]
    fn a_disk_is_restored_with_its_zeroes() {
        let folder = tempfile::tempdir().unwrap();
        let disk = RootDisk {
            image: "aa".into(),
            format: DiskFormat::Raw,
            bytes: BYTES,
        };
        let mut restored = RestoredDisk::begin(folder.path(), &disk).unwrap();
        restored
            .write(OWN_DISK, 0, 5 * CLUSTER_BYTES, &[3; 2 * CLUSTER])
            .unwrap();
        // It was written again, and removed later.
        restored
            .write(OWN_DISK, 0, 6 * CLUSTER_BYTES, &[4; CLUSTER])
            .unwrap();
        restored
            .write(OWN_DISK, 0, 9 * CLUSTER_BYTES, &[5; CLUSTER])
            .unwrap();
        for (volume, inode, at) in [(0, 0, 0), (OWN_DISK, 1, 0), (OWN_DISK, 0, BYTES)] {
            let strange = restored.write(volume, inode, at, &[1]);
            assert!(matches!(strange, Err(DiskError::Strange)), "{strange:?}");
        }
        assert!(restored.cut(OWN_DISK, 0, 0).is_err());
        assert!(!root_disk::path(folder.path()).exists());
        restored.finish(&Zeroes::from_iter([9, 40, 100])).unwrap();
        let layer = layer(folder.path(), root_disk::FILE);
        let mut zeroes = Zeroes::new();
        let found = data(&layer, &mut zeroes);
        assert_eq!(found, [(5 * CLUSTER_BYTES, 2 * CLUSTER_BYTES)]);
        assert_eq!(zeroes, Zeroes::from_iter([9, 40, 100]));
        let mut bytes = vec![0; 2 * CLUSTER];
        layer.read(&mut bytes, 5 * CLUSTER_BYTES).unwrap();
        assert!(bytes[..CLUSTER].iter().all(|byte| *byte == 3));
        assert!(bytes[CLUSTER..].iter().all(|byte| *byte == 4));
    }

    #[test]
    fn zeroes_outside_of_a_disk_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let disk = RootDisk {
            image: "aa".into(),
            format: DiskFormat::Raw,
            bytes: BYTES,
        };
        let restored = RestoredDisk::begin(folder.path(), &disk).unwrap();
        let strange = restored.finish(&Zeroes::from_iter([101]));
        assert!(matches!(strange, Err(DiskError::Strange)), "{strange:?}");
        assert!(!root_disk::path(folder.path()).exists());
    }
}
