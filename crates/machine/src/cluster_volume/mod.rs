//! `cluster:` volumes: files that outlive their machine, kept outside of nodes, in
//! a directory that all of them see or in an S3-compatible store.
//!
//! - `format`: what is stored, and how it is checked when it is read
//! - `state`: what a volume holds, and the difference between two states
//! - `store`: the objects of one volume
//! - `writer`: the one who writes: claims, commits, compacts
//! - `backend`: between a volume of `keel-wasi` and its writer, in a worker
//! - `unfinished`: snapshots of checkpoints that fail
//!
//! ```text
//!   NAME-ID/log/NUMBER               a segment: names, sizes and which chunk each
//!                                    changed block now is, of one instant
//!   NAME-ID/chunks/HH/HASH-WRITER    bytes of blocks, by what they are
//!   NAME-ID/snapshots/MACHINE.ID     all of a volume at a checkpoint's instant
//! ```
//!
//! The id is the volume's own: who still works on one that was removed, and made
//! again under its name, touches nothing of its successor.
//!
//! A segment is put only where none is (a conditional put), so of two that write
//! the same number one fails. Each carries its writer's [`WriterEpoch`]. A new
//! owner *claims* the volume with a segment of its own; from then on the next one
//! of the old owner fails: it is fenced, and its machine ends. Who reads a newer
//! epoch than its own does not claim.
//!
//! ```text
//!   Opening ──claim──▶ Claimed ──commit──▶ Claimed
//!      ▲                  │ a segment of another's is there
//!      └── new epoch ─────┴──────────────▶ Fenced
//! ```
//!
//! What a program wrote before it synced is in the store when the call returns;
//! the rest follows within about a second. A segment holds names and bytes of one
//! instant, so what a crash leaves is what the volume was at some instant at or
//! after the last sync.
//!
//! A chunk's name has its writer's epoch behind the hash, and a writer deletes none
//! that is newer than itself. Without that one which was fenced while it deletes what
//! nobody needs could delete a chunk that its successor stored, or found there and
//! relied on.
//!
//! Architecture Invariant: a machine stands still for no store: not in a move,
//! whose target gets the blocks that are in no segment yet from the source, nor in
//! a checkpoint, which copies them within memory.

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

/// The most bytes of a cluster volume: its map of blocks lies in memory, 64 MiB
/// for as much.
pub const VOLUME_BYTES_MAX: u64 = 64 << 30;
