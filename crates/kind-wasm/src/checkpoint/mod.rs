//! Making checkpoints of machines, and restoring machines from them. The stored form and
//! the repositories are those of every kind (`keel_machine::checkpoint`).
//!
//! - `create`: makes a checkpoint while the machine runs
//! - `restore`: restores a machine from a checkpoint
//! - `lazy_restore`: runs a machine before its pages are read
//! - `spanning_restore`: reads the pages of a machine once it has parts
//! - `volumes`: the machine's own volumes in both directions
//!
//! Architecture Invariant: the machine is stopped only while its last pages are copied
//! *within memory*; it waits for no store meanwhile.
//!
//! `docs/checkpoints.md` explains both.

mod create;
mod lazy_restore;
mod restore;
mod spanning_restore;
mod volumes;

pub use create::{Checkpointer, CreateError, Destination};
pub use lazy_restore::LazyRestore;
pub use restore::{RemainingMemory, RestoreError, Restored, restore};
pub use spanning_restore::SpanningRestore;
