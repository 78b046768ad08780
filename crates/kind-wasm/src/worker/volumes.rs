//! A machine's own volumes on one node: where they are stored, and how a move copies them
//! while the machine runs.
//!
//! Their bytes are in the worker's folder (`volume_folder`). Names and sizes travel in the machine's image; before it arrives, a target knows only the
//! numbers of files.

use super::cluster_volumes::ClusterVolumes;
use keel_machine::link::{Link, LinkError, Message};
use keel_machine::spec::{Spec, VolumeKind};
use keel_machine::worker::volume_folder::{folder, free_bytes, no_room};
use keel_net::Bytes;
use keel_wasi::volume::{
    BLOCK_BYTES, BlockReader, BlockWriter, Changes, LocalBlocks, Stalls, Tracker, VolumeLimits,
};
use keel_wasi::{Preopen, Source, Wasi};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a machine's volumes could not be copied.
#[derive(Debug, thiserror::Error)]
pub(super) enum VolumeError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("a file of its volumes cannot be read: {0}")]
    Read(std::io::Error),
    #[error("its volumes cannot be stored here: {0}")]
    Write(std::io::Error),
    #[error("the machine has no volume {0} of its own, or of the cluster")]
    NoVolume(u32),
    #[error("{0}")]
    NotClaimed(String),
}

/// Rounds of catching up, and the number of bytes at which they end.
const CATCH_UP_ROUNDS_MAX: u32 = 8;
const CATCH_UP_BYTES: u64 = 1 << 20;

/// The directories of a machine in a worker's folder.
pub(super) fn preopens(
    spec: &Spec,
    worker: &Path,
    stalls: &Arc<Stalls>,
    cluster_volumes: &ClusterVolumes,
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
            VolumeKind::Cluster { bytes, inodes, .. } => match cluster_volumes.backed(number) {
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

// ── source of a move ────────────────────────────────────────────────────

/// Copies a machine's volumes to a target.
#[derive(Default)]
pub(super) struct SourceVolumes {
    volumes: Vec<SourceVolume>,
}

struct SourceVolume {
    number: u32,
    /// The target requests blocks that it lacks, so those that it receives must be whole.
    is_kept: bool,
    tracker: Tracker,
    reader: BlockReader,
    /// Recorded and not sent yet.
    pending: Changes,
}

fn noted(tracker: &Tracker, whole_blocks: bool) -> Changes {
    match whole_blocks {
        true => tracker.take().whole_blocks(),
        false => tracker.take(),
    }
}

impl SourceVolumes {
    /// Starts to record changes. All present blocks count as changed, but of cluster
    /// volumes only those not known to be in a segment.
    pub(super) fn start(wasi: &Wasi, cluster_volumes: &ClusterVolumes) -> Self {
        let volumes = wasi.volumes().into_iter();
        SourceVolumes {
            volumes: volumes
                .map(|(number, volume)| {
                    let is_kept = volume.backing().is_some();
                    let tracker = match is_kept {
                        // In this order: changes made meanwhile appear in both.
                        true => {
                            let tracker = volume.track_changes();
                            tracker.note(&cluster_volumes.uncommitted(number));
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

    /// Records the changes since the last call; returns the bytes to send.
    pub(super) fn record_changes(&mut self) -> u64 {
        let mut bytes = 0;
        for volume in &mut self.volumes {
            // Unsent changes precede later ones.
            if volume.pending == Changes::default() {
                volume.pending = noted(&volume.tracker, volume.is_kept);
            }
            bytes += volume.pending.bytes();
        }
        bytes
    }

    /// Sends the recorded changes; returns the number of bytes.
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

    /// Sends changes until few are left or their number no longer shrinks.
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

    /// Also sends the changes since the last record.
    pub(super) fn send_all(&mut self, link: &mut Link) -> Result<u64, VolumeError> {
        let mut sent = self.send(link)?;
        self.record_changes();
        sent += self.send(link)?;
        Ok(sent)
    }
}

// ── target of a move ────────────────────────────────────────────────────

/// Reserved disk space for what arrives: a file that shrinks meanwhile.
#[derive(Debug)]
struct DiskReservation {
    file: File,
    path: PathBuf,
    bytes: u64,
    /// Released and not used yet.
    given: u64,
}

/// Released by one system call.
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
            // The file system cannot reserve space: the check of free space must suffice.
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

    /// Ensures room for this many bytes.
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
            tracing::warn!(%error, path = %self.path.display(), "cannot release reserved disk space");
        }
    }
}

/// Receives a machine's volumes.
#[derive(Debug)]
pub(super) struct TargetVolumes {
    /// By volume number; none for directories of the host.
    writers: Vec<Option<BlockWriter>>,
    /// Blocks of cluster volumes that arrived, by volume number.
    local: BTreeMap<u32, LocalBlocks>,
    ballast: Option<DiskReservation>,
}

impl TargetVolumes {
    /// Creates the folders and reserves `bytes`.
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

    /// Completes the transfer; returns the blocks of cluster volumes that arrived.
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
