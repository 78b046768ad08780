//! What machines of every kind share: their records, their moves, and the processes around
//! them. A kind of machine is a crate of its own above this one (see [`kind`]).
//!
//! - `kind`: what a kind of machine implements, and the registry of kinds
//! - `spec`: the specification by the user, and the record in the store
//! - `worker`: the process around one machine, and its protocol with its agent
//! - `moves`: moves as two pure state machines, and their reports
//! - `link`: the connection between the two workers of a move
//! - `log`: a machine's output, addressed by offset, which survives moves
//! - `cgroup`: the control groups of workers
//! - `checkpoint`: stored states of machines, and their repositories
//! - `cluster_volume`: volumes that outlive their machines, stored outside nodes
//! - `clock_sync`: whether this host's wall clock is synchronised
//! - `failpoint`: fault injection for tests
//! - `high_availability`: what keeps a machine available when its node fails
//! - `object_storage`: directories and object stores for checkpoints and volumes
//! - `restart_policy`: whether a machine that ended is restarted

#![deny(unsafe_code)]

pub mod cgroup;
pub mod checkpoint;
pub mod clock_sync;
pub mod cluster_volume;
pub mod failpoint;
pub mod high_availability;
pub mod kernel_file;
pub mod kind;
pub mod link;
pub mod log;
pub mod moves;
pub mod object_storage;
pub mod restart_policy;
pub mod spec;
pub mod worker;

/// Bytes of a page, the unit in which memory is sent and stored.
pub const PAGE_BYTES: u64 = 4096;
