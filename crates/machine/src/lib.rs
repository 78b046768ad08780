//! Machines, their worker processes, and moves.
//!
//! - `spec`: the specification by the user, and the record in the store
//! - `moves`: moves as two pure state machines, and their reports
//! - `log`: a machine's output, addressed by offset, which survives moves
//! - `cgroup`: the control groups of workers
//! - `checkpoint`: stored states of machines
//! - `cluster_volume`: volumes that outlive their machines, stored outside nodes
//! - `clock`: whether this host's wall clock is synchronised
//! - `failpoint`: fault injection for tests
//! - `guest_memory`: the memory of machines as an agent sees it
//! - `link`: the connection between the two workers of a move
//! - `object_storage`: directories and object stores for checkpoints and volumes
//! - `restart_policy`: whether a machine that ended is restarted
//! - `span`: one part of a machine that spans several nodes
//! - `worker`: the process around one machine

#![deny(unsafe_code)]

pub mod cgroup;
pub mod checkpoint;
pub mod clock;
pub mod cluster_volume;
pub mod failpoint;
pub mod guest_memory;
pub mod link;
pub mod log;
pub mod moves;
pub mod object_storage;
pub mod restart_policy;
pub mod span;
pub mod spec;
pub mod worker;

/// What this host lacks for fast moves, and the consequence; `None` if nothing.
pub fn missing_for_moves() -> Option<String> {
    let probe = keel_wasm::memory::GuestMemory::new(1, Some(1), false, 1 << 16).ok()?;
    let tracker = keel_wasm::memory::DirtyTracker::start(std::sync::Arc::new(probe)).ok()?;
    let missing = tracker.missing()?;
    Some(format!(
        "{missing} Until then writes are found by hashing, which is slower."
    ))
}

/// What this host lacks for post-copy, and the remedy; `None` if nothing.
pub fn missing_for_post_copy() -> Option<String> {
    let probe = keel_wasm::memory::GuestMemory::new(1, Some(1), false, 1 << 16).ok()?;
    keel_wasm::memory::PageFaults::start(std::sync::Arc::new(probe), true)
        .err()
        .map(|missing| missing.to_string())
}

/// The largest accepted module, in bytes.
pub const MODULE_BYTES_MAX: usize = keel_wasm::instrument::MODULE_BYTES_MAX;
