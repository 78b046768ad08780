//! Checkpoints: stored states of machines, from which they can be restored. This is their
//! stored form and their repositories; a machine's kind makes and restores them.
//!
//! - `id`: the ids of checkpoints
//! - `origin`: which checkpoint a machine is restored from
//! - `retention`: which checkpoints are kept
//! - `image`: files that a machine uses wherever it runs, in a repository
//! - `collection`: deletes what nothing needs
//! - `quota`: how many bytes a repository may have
//! - `format`: the stored form and its validation
//! - `packer`: collects bytes into packs
//! - `page_digests`: which pages changed, of memory whose writes are not tracked
//! - `predecessor`: the checkpoint that the next one continues
//! - `read`: reads checkpoints back
//! - `repository`: the objects of checkpoints, in a directory or an S3-compatible store
//!   ([`crate::object_storage`])
//! - `direct_io`: writing packs into a directory past the page cache, and reading them
//! - `compaction`: turns an incremental checkpoint into a full one within the store
//! - `layout`: the location of the newest copy of each page in a chain
//! - `restore_memory_size`: the memory that a restored machine needs
//!
//! Of a machine's own disk (of kind `qemu`) a checkpoint contains what was written to it, as blocks
//! of the volume [`OWN_DISK`]. Of `cluster:` volumes a checkpoint contains only names and sizes, in the image; a
//! snapshot under the checkpoint's name stays with the volume (`cluster_volume`).
//!
//! ```text
//!   machines/NAME/ID.manifest     description, locations of pages, threads and WASI state
//!   machines/NAME/ID.N.pack       pages in the order of copying; later copies supersede earlier ones
//!   machines/NAME/ID.vN.pack      blocks of files in the machine's own volumes, and of its own disk
//!   machines/NAME/ID.gG.…pack     the same, after compaction
//!   programs/HASH.wasm            the instrumented module, shared
//!   images/HASH/…                 an image that machines use wherever they run, shared
//!   quota.json                    how many bytes all of it may have, if that is limited
//! ```
//!
//! The manifest is written last, so a checkpoint exists as a whole or not at all; each
//! block of a pack and each manifest has a checksum, so truncation and corruption are
//! detected. An incremental checkpoint names its parent and contains only the pages
//! written since; after [`CHAIN_MAX`] of them a full one is made.

use crate::spec::Spec;
use keel_cluster::{Epoch, MachineName};
use std::time::Duration;

mod collection;
mod compaction;
mod direct_io;
mod format;
mod id;
mod image;
mod layout;
pub(crate) mod origin;
mod packer;
mod page_digests;
mod predecessor;
mod quota;
mod read;
mod repository;
mod restore_memory_size;
pub(crate) mod retention;

pub use collection::{Pruned, SharedPruned, UNFINISHED_MS};
pub use compaction::compact;
pub use direct_io::AlignedBuffer;
pub use format::{BLOCK_BYTES, BlockRun, FormatError, Manifest, OWN_DISK, Pack, Run};
pub use id::CheckpointId;
pub use image::{KeptImage, StoredImage, is_image_index};
pub use layout::{Block, Layout, LiveRange, PackAt};
pub use origin::{MemoryRestore, Origin};
pub use packer::{PackError, Packer, note_block, note_page};
pub use page_digests::{PageDigests, page_hash};
pub use predecessor::Predecessor;
pub use read::{BlockTarget, WritePages, read_pages, replay_blocks, restore_newest_intact};
pub use repository::{BlockSink, Candidates, Outline, PackName, Repository, RepositoryError};
pub use restore_memory_size::memory_bytes;
pub use retention::Retention;

/// The machine of a checkpoint.
#[derive(Debug, Clone)]
pub struct Subject {
    pub name: MachineName,
    pub spec: Spec,
    /// The epoch under which it runs.
    pub epoch: Epoch,
}

/// A checkpoint that was made.
#[derive(Debug, Clone)]
pub struct CreatedCheckpoint {
    pub manifest: Manifest,
    /// Downtime of the machine.
    pub pause: Duration,
    /// Total time.
    pub total: Duration,
}

/// Name of a cluster volume's snapshot for a checkpoint.
pub fn snapshot_name(machine: &MachineName, id: &CheckpointId) -> String {
    format!("{machine}.{id}")
}

/// The longest chain of checkpoints, including the full one.
pub const CHAIN_MAX: usize = 16;
