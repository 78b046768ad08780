//! `cluster:` volumes: files that outlive their machine, stored outside of nodes, in a
//! shared directory or in an S3-compatible store.
//!
//! - `format`: the stored form and its validation
//! - `state`: the content of a volume, and the difference between two states
//! - `store`: the objects of one volume
//! - `writer`: the writer of a volume: claims, commits, compacts
//! - `backend`: connects a volume of `keel-wasi` with its writer, in a worker
//! - `unfinished`: snapshots of checkpoints in progress
//!
//! ```text
//!   NAME-ID/log/NUMBER               a segment: names, sizes and the chunk of each
//!                                    changed block, as of one instant
//!   NAME-ID/chunks/HH/HASH-WRITER    bytes of blocks, by content hash
//!   NAME-ID/snapshots/MACHINE.ID     the whole volume as of a checkpoint
//! ```
//!
//! The id is unique: a process that still uses a volume that was removed and created
//! again under its name does not touch the new one.
//!
//! A segment is stored by a conditional put, so of two writers of the same number one
//! fails. Each segment carries its writer's [`WriterEpoch`]. A new owner *claims* the
//! volume with a segment of its own; the next segment of the former owner fails: that
//! owner is fenced, and its machine ends. A writer that reads a newer epoch than its own
//! does not claim.
//!
//! ```text
//!   Opening ──claim──▶ Claimed ──commit──▶ Claimed
//!      ▲                  │ another writer's segment exists
//!      └── new epoch ─────┴──────────────▶ Fenced
//! ```
//!
//! Data written before a sync is in the store when the call returns; the rest follows
//! within about a second. A segment holds names and bytes of one instant, so after a
//! crash the volume has its state of some instant at or after the last sync.
//!
//! A chunk's name contains its hash and its writer's epoch, and a writer deletes no chunk
//! of a newer writer. Otherwise a fenced writer that collects garbage could delete a
//! chunk that its successor stored, or found and relied on.
//!
//! Architecture Invariant: a machine is never stopped while it waits for a store: not in
//! a move, whose target receives uncommitted blocks from the source, nor in a checkpoint,
//! which copies them within memory.
//!
//! `docs/volumes.md` explains all kinds of volumes.

mod backend;
mod format;
mod state;
mod store;
mod unfinished;
mod writer;

pub use backend::{BackendOptions, CommitHold, Frozen, VolumeBackend};
pub use format::{ChunkRef, FileBlocks, FormatError, Segment, WriterEpoch};
pub use state::VolumeState;
pub use store::{VolumeError, VolumeStore, VolumeSummary};
pub use unfinished::UnfinishedSnapshots;
pub use writer::{DirtyBlock, Writer};

/// The maximum size of a cluster volume: the block map of a volume of this size takes 64
/// MiB of memory.
pub const VOLUME_BYTES_MAX: u64 = 64 << 30;
