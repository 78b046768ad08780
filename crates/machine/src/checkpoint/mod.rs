//! Checkpoints: machines kept in time, as moves keep them in space.
//!
//! - `format`: what is stored, and how it is checked when it is read
//! - `repository`: where it is stored: a directory or an S3-compatible store
//! - `folder`: how packs are written to a directory, and read
//! - `create`: makes one while the machine runs
//! - `restore`: makes a machine of one
//! - `compaction`: makes an incremental one full, within the store
//! - `layout`: which page of which one counts
//! - `lazy_restore`: lets the machine run before its pages are read
//! - `spanning_restore`: brings its pages once it has parts
//! - `volumes`: the machine's own volumes in both
//!
//! Of `cluster:` volumes a checkpoint only has the names and sizes, in the image:
//! a snapshot under the checkpoint's name stays with the volume (`cluster_volume`).
//!
//! ```text
//!   machines/NAME/ID.manifest     what it is, which pages are where, threads and WASI state
//!   machines/NAME/ID.N.pack       pages, as they came; later ones count
//!   machines/NAME/ID.vN.pack      blocks of files in the machine's own volumes
//!   machines/NAME/ID.gG.…pack     the same, after it was made a full one
//!   programs/HASH.wasm            the instrumented module, once for all
//! ```
//!
//! The manifest is written last, so a checkpoint is there as a whole or not at
//! all; each block of a pack and each manifest has a checksum, so what was torn
//! or changed later is found. An incremental checkpoint names its parent and has
//! only the pages that were written since; after [`CHAIN_MAX`] of them comes a
//! full one.
//!
//! Architecture Invariant: the machine stands still only while its last pages
//! are copied *within memory*; no store is waited for meanwhile.

mod compaction;
mod create;
mod folder;
mod format;
mod layout;
mod lazy_restore;
mod repository;
mod restore;
mod spanning_restore;
mod volumes;

pub use compaction::compact;
pub use create::{Checkpointer, CreateError, CreatedCheckpoint, Destination, Subject};
pub use format::{BlockRun, CheckpointId, FormatError, Manifest, MemoryRestore, Origin, Pack, Run};
pub use lazy_restore::LazyRestore;
pub use repository::{
    BlockSink, Candidates, Outline, PackName, Repository, RepositoryError, Retention,
};
pub use restore::{RemainingMemory, RestoreError, Restored, memory_bytes, restore};
pub use spanning_restore::SpanningRestore;

/// The name that a cluster volume's snapshot for a checkpoint has.
pub fn snapshot_name(machine: &keel_cluster::MachineName, id: &CheckpointId) -> String {
    format!("{machine}.{id}")
}

/// Checkpoints that may stand on one another, the full one counted.
pub const CHAIN_MAX: usize = 16;
