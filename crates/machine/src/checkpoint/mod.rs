//! Checkpoints: stored states of machines, from which they can be restored.
//!
//! - `id`: the ids of checkpoints
//! - `origin`: which checkpoint a machine is restored from
//! - `retention`: which checkpoints are kept
//! - `format`: the stored form and its validation
//! - `repository`: storage in a directory or an S3-compatible store
//! - `folder`: writing and reading packs in a directory
//! - `create`: makes a checkpoint while the machine runs
//! - `restore`: restores a machine from a checkpoint
//! - `compaction`: turns an incremental checkpoint into a full one within the store
//! - `layout`: the location of the newest copy of each page in a chain
//! - `lazy_restore`: runs a machine before its pages are read
//! - `spanning_restore`: reads the pages of a machine once it has parts
//! - `volumes`: the machine's own volumes in both directions
//!
//! Of `cluster:` volumes a checkpoint contains only names and sizes, in the image; a
//! snapshot under the checkpoint's name stays with the volume (`cluster_volume`).
//!
//! ```text
//!   machines/NAME/ID.manifest     description, locations of pages, threads and WASI state
//!   machines/NAME/ID.N.pack       pages in the order of copying; later copies supersede earlier ones
//!   machines/NAME/ID.vN.pack      blocks of files in the machine's own volumes
//!   machines/NAME/ID.gG.…pack     the same, after compaction
//!   programs/HASH.wasm            the instrumented module, shared
//! ```
//!
//! The manifest is written last, so a checkpoint exists as a whole or not at all; each
//! block of a pack and each manifest has a checksum, so truncation and corruption are
//! detected. An incremental checkpoint names its parent and contains only the pages
//! written since; after [`CHAIN_MAX`] of them a full one is made.
//!
//! Architecture Invariant: the machine is stopped only while its last pages are copied
//! *within memory*; it waits for no store meanwhile.

mod compaction;
mod create;
mod folder;
mod format;
mod id;
mod layout;
mod lazy_restore;
pub(crate) mod origin;
mod repository;
mod restore;
pub(crate) mod retention;
mod spanning_restore;
mod volumes;

pub use compaction::compact;
pub use create::{Checkpointer, CreateError, CreatedCheckpoint, Destination, Subject};
pub use format::{BlockRun, FormatError, Manifest, Pack, Run};
pub use id::CheckpointId;
pub use lazy_restore::LazyRestore;
pub use origin::{MemoryRestore, Origin};
pub use repository::{BlockSink, Candidates, Outline, PackName, Repository, RepositoryError};
pub use restore::{RemainingMemory, RestoreError, Restored, memory_bytes, restore};
pub use retention::Retention;
pub use spanning_restore::SpanningRestore;

/// Name of a cluster volume's snapshot for a checkpoint.
pub fn snapshot_name(machine: &keel_cluster::MachineName, id: &CheckpointId) -> String {
    format!("{machine}.{id}")
}

/// The longest chain of checkpoints, including the full one.
pub const CHAIN_MAX: usize = 16;
