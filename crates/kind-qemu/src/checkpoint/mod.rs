//! Making checkpoints of systems, and restoring systems from them. The stored form and the
//! repositories are those of every kind (`keel_machine::checkpoint`): blocks of RAM are its memories,
//! what was written to the machine's own disk are its blocks.
//!
//! - `create`: makes a checkpoint while the system runs
//! - `restore`: restores a system from a checkpoint
//! - `memory_copy`: takes QEMU's copy of the memory, while the system runs
//! - `ram_stream`: QEMU's stream of a guest's memory, in both directions
//! - `disk`: the machine's own disk, in both directions
//! - `state`: what a checkpoint has beside both
//!
//! `docs/systems.md` explains both.

mod create;
mod disk;
mod memory_copy;
mod ram_stream;
mod restore;
mod state;
#[cfg(test)]
mod tests;

pub(crate) use create::{Checkpointer, Destination};
pub(crate) use ram_stream::is_memory_stream;
pub(crate) use restore::restore;
pub(crate) use state::is_system_state;
