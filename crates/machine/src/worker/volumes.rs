//! A machine's own volumes on one node: where they are, how they are copied to
//! a target while the machine runs, and how a target takes them in.
//!
//! The bytes of volume `N` of the spec are in `volumes/N` of the worker's
//! folder. Names and sizes travel in the machine's image; until that is there,
//! a target only knows numbers of files.

use super::cluster_volumes::ClusterVolumes;
use crate::link::{Link, LinkError, Message};
use crate::spec::{Spec, VolumeKind};
use keel_net::Bytes;
use keel_wasi::volume::{
    BLOCK_BYTES, BlockReader, BlockWriter, Changes, LocalBlocks, Stalls, Tracker, VolumeLimits,
};
use keel_wasi::{Preopen, Source, Wasi};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Disk that a node keeps for itself.
const SPARE_BYTES: u64 = 256 << 20;

/// Why a machine's volumes could not be copied.
#[derive(Debug, thiserror::Error)]
pub(super) enum VolumeError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("a file of its volumes cannot be read: {0}")]
    Read(std::io::Error),
    #[error("its volumes cannot be kept here: {0}")]
    Write(std::io::Error),
    #[error("the machine has no volume {0} of its own, or of the cluster")]
    NoVolume(u32),
    #[error("{0}")]
    NotClaimed(String),
}

/// Rounds of catching up, and what is little enough.
const CATCH_UP_ROUNDS_MAX: u32 = 8;
const CATCH_UP_BYTES: u64 = 1 << 20;

/// Where a worker keeps its machine's volumes.
pub fn folder(worker: &Path) -> PathBuf {
    worker.join("volumes")
}

/// Bytes that may still be written in a folder's file system.
///
/// # Errors
/// The host's.
pub fn free_bytes(folder: &Path) -> std::io::Result<u64> {
    let found = rustix::fs::statvfs(folder)?;
    Ok((found.f_bavail.saturating_mul(found.f_frsize)).saturating_sub(SPARE_BYTES))
}

/// A machine's directories as they are in a worker's folder.
pub(super) fn preopens(
    spec: &Spec,
    worker: &Path,
    stalls: &Arc<Stalls>,
    keepers: &ClusterVolumes,
) -> Result<Vec<Preopen>, VolumeError> {
    let source = |number: u32, kind: &VolumeKind| {
        let folder = folder(worker).join(number.to_string());
        let stalls = stalls.clone();
        Ok(match kind {
            VolumeKind::Host { path } => Source::Host(path.into()),
            VolumeKind::Tmp { bytes, inodes } => Source::Volume {
                folder,
                limits: limits(*bytes, *inodes),
                stalls,
            },
            VolumeKind::Cluster { bytes, inodes, .. } => match keepers.backed(number) {
                Some(backed) => Source::Backed {
                    folder,
                    limits: limits(*bytes, *inodes),
                    stalls,
                    backed,
                },
                None => return Err(VolumeError::NoVolume(number)),
            },
        })
    };
    let volumes = (0..).zip(&spec.volumes);
    volumes
        .map(|(number, volume)| {
            Ok(Preopen {
                source: source(number, &volume.kind)?,
                guest: volume.guest.clone(),
                read_only: volume.read_only,
            })
        })
        .collect()
}

fn limits(bytes_max: u64, inodes_max: u64) -> VolumeLimits {
    VolumeLimits {
        bytes_max,
        inodes_max,
    }
}

/// Removes the bytes of what ended, if there are any.
pub fn remove(worker: &Path) {
    match std::fs::remove_dir_all(folder(worker)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, folder = %worker.display(), "volumes stay behind");
        }
        _ => {}
    }
}

// ── source of a move ────────────────────────────────────────────────────

/// Copies a machine's volumes to a target.
#[derive(Default)]
pub(super) struct SourceVolumes {
    volumes: Vec<SourceVolume>,
}

struct SourceVolume {
    number: u32,
    /// The target fetches blocks that it does not get: those that it gets must be
    /// whole.
    is_kept: bool,
    tracker: Tracker,
    reader: BlockReader,
    /// Noted, but not sent yet.
    pending: Changes,
}

fn noted(tracker: &Tracker, whole_blocks: bool) -> Changes {
    match whole_blocks {
        true => tracker.take().whole_blocks(),
        false => tracker.take(),
    }
}

impl SourceVolumes {
    /// Begins to note what is written. All that is there counts, but of cluster
    /// volumes only what is in no segment for certain.
    pub(super) fn start(wasi: &Wasi, keepers: &ClusterVolumes) -> Self {
        let volumes = wasi.volumes().into_iter();
        SourceVolumes {
            volumes: volumes
                .map(|(number, volume)| {
                    let is_kept = volume.backing().is_some();
                    let tracker = match is_kept {
                        // In this order: what is written meanwhile is in both.
                        true => {
                            let tracker = volume.track_changes();
                            tracker.note(&keepers.uncommitted(number));
                            tracker
                        }
                        false => volume.track(),
                    };
                    SourceVolume {
                        number,
                        is_kept,
                        pending: noted(&tracker, is_kept),
                        tracker,
                        reader: BlockReader::new(volume),
                    }
                })
                .collect(),
        }
    }

    /// Notes what was written since the last look; bytes that are to be sent.
    pub(super) fn look(&mut self) -> u64 {
        let mut bytes = 0;
        for volume in &mut self.volumes {
            // What was not sent yet stays before what came later.
            if volume.pending == Changes::default() {
                volume.pending = noted(&volume.tracker, volume.is_kept);
            }
            bytes += volume.pending.bytes();
        }
        bytes
    }

    /// Sends what was noted; how many bytes.
    pub(super) fn send(&mut self, link: &mut Link) -> Result<u64, VolumeError> {
        let mut sent = 0;
        let mut buffer = vec![0; BLOCK_BYTES as usize];
        for volume in &mut self.volumes {
            let number = volume.number;
            let changes = std::mem::take(&mut volume.pending);
            for &(inode, bytes) in &changes.cuts {
                link.send(&Message::Cut {
                    volume: number,
                    inode,
                    bytes,
                })?;
            }
            for (inode, piece) in changes.pieces() {
                let offset = piece.start;
                let buffer = &mut buffer[..(piece.end - offset) as usize];
                let read = volume.reader.read(inode, offset, buffer);
                let count = read.map_err(VolumeError::Read)?;
                if count == 0 {
                    continue;
                }
                sent += count as u64;
                link.send(&Message::Block {
                    volume: number,
                    inode,
                    offset,
                    bytes: Bytes::copy_from_slice(&buffer[..count]),
                })?;
            }
        }
        Ok(sent)
    }

    /// Sends what is written until that is little, or does not become less.
    pub(super) fn catch_up(&mut self, link: &mut Link) -> Result<(), VolumeError> {
        let mut before = u64::MAX;
        for _ in 0..CATCH_UP_ROUNDS_MAX {
            let bytes = self.send_all(link)?;
            link.flush()?;
            if bytes <= CATCH_UP_BYTES || bytes > before / 2 {
                break;
            }
            before = bytes;
        }
        Ok(())
    }

    /// Sends what was written since the last look too.
    pub(super) fn send_all(&mut self, link: &mut Link) -> Result<u64, VolumeError> {
        let mut sent = self.send(link)?;
        self.look();
        sent += self.send(link)?;
        Ok(sent)
    }
}

// ── target of a move ────────────────────────────────────────────────────

/// Room on the disk for what is to arrive: a file that becomes smaller as it
/// does.
#[derive(Debug)]
struct DiskReservation {
    file: File,
    path: PathBuf,
    bytes: u64,
    /// What was given back and is not used yet.
    given: u64,
}

/// Given back at a time: each time costs a system call.
const RESERVATION_STEP_BYTES: u64 = 16 << 20;

impl DiskReservation {
    fn new(folder: &Path, bytes: u64) -> Result<Option<Self>, String> {
        if bytes == 0 {
            return Ok(None);
        }
        let named = |error: std::io::Error| format!("{}: {error}", folder.display());
        std::fs::create_dir_all(folder).map_err(named)?;
        let free = free_bytes(folder).map_err(named)?;
        if bytes > free {
            return Err(no_room(bytes, free, folder));
        }
        let path = folder.join("reserved");
        let file = File::create(&path).map_err(named)?;
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&file, flags, 0, bytes) {
            Ok(()) => {}
            // A file system that cannot reserve: the look at it must do.
            Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => {
                let _ = std::fs::remove_file(&path);
                return Err(named(error.into()));
            }
        }
        Ok(Some(DiskReservation {
            file,
            path,
            bytes,
            given: 0,
        }))
    }

    /// Makes sure that there is room for so many bytes.
    fn give(&mut self, bytes: u64) -> std::io::Result<()> {
        if self.given < bytes && self.bytes > 0 {
            let step = RESERVATION_STEP_BYTES.max(bytes).min(self.bytes);
            self.bytes -= step;
            self.given += step;
            self.file.set_len(self.bytes)?;
        }
        self.given = self.given.saturating_sub(bytes);
        Ok(())
    }
}

impl Drop for DiskReservation {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "reserved room stays");
        }
    }
}

/// A sentence for a node that has too little room.
pub fn no_room(wanted: u64, free: u64, folder: &Path) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    format!(
        "its volumes need {:.2} GiB of disk, {:.2} GiB are free in {}",
        gib(wanted),
        gib(free),
        folder.display()
    )
}

/// Takes in a machine's volumes.
#[derive(Debug)]
pub(super) struct TargetVolumes {
    /// By their numbers; none for directories of the host.
    writers: Vec<Option<BlockWriter>>,
    /// What came of cluster volumes, by their numbers.
    local: BTreeMap<u32, LocalBlocks>,
    ballast: Option<DiskReservation>,
}

impl TargetVolumes {
    /// Makes the folders, and reserves room for `bytes`.
    pub(super) fn new(spec: &Spec, worker: &Path, bytes: u64) -> Result<Self, String> {
        let folder = folder(worker);
        let ballast = DiskReservation::new(&folder, bytes)?;
        let mut writers = Vec::with_capacity(spec.volumes.len());
        for (number, volume) in spec.volumes.iter().enumerate() {
            writers.push(match volume.kind {
                VolumeKind::Host { .. } => None,
                VolumeKind::Tmp { .. } | VolumeKind::Cluster { .. } => Some(
                    BlockWriter::new(&folder.join(number.to_string()))
                        .map_err(|error| format!("{}: {error}", folder.display()))?,
                ),
            });
        }
        let local = spec.cluster_volumes().into_iter();
        let local = local.map(|(number, _)| (number, LocalBlocks::default()));
        Ok(TargetVolumes {
            writers,
            local: local.collect(),
            ballast,
        })
    }

    /// All has come: of cluster volumes, which blocks.
    pub(super) fn finish(self) -> Vec<(u32, LocalBlocks)> {
        self.local.into_iter().collect()
    }

    fn writer(&mut self, volume: u32) -> Result<&mut BlockWriter, VolumeError> {
        self.writers
            .get_mut(volume as usize)
            .and_then(Option::as_mut)
            .ok_or(VolumeError::NoVolume(volume))
    }

    pub(super) fn block(
        &mut self,
        volume: u32,
        inode: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), VolumeError> {
        if let Some(ballast) = &mut self.ballast {
            let given = ballast.give(bytes.len() as u64);
            given.map_err(VolumeError::Write)?;
        }
        let written = self.writer(volume)?.write(inode, offset, bytes);
        written.map_err(VolumeError::Write)?;
        if let Some(local) = self.local.get_mut(&volume) {
            local.insert(inode, offset..offset + bytes.len() as u64);
        }
        Ok(())
    }

    pub(super) fn cut(&mut self, volume: u32, inode: u64, bytes: u64) -> Result<(), VolumeError> {
        let cut = self.writer(volume)?.cut(inode, bytes);
        cut.map_err(VolumeError::Write)?;
        if let Some(local) = self.local.get_mut(&volume) {
            local.cut(inode, bytes);
        }
        Ok(())
    }
}
