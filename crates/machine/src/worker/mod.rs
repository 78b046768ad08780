//! The process around one machine, and what its agent says to it.
//!
//! - `control`: requests, answers and events between agent and worker
//! - `process`: the process itself
//! - `compile`: the process that compiles a program ahead
//! - `source`: gives the machine away (source of a move)
//! - `target`: receives a machine (target of a move)
//! - `files`: what users do with files in volumes
//! - `volumes`: the machine's own volumes, in both directions
//! - `cluster_volumes`: the keepers of its cluster volumes
//! - `spanning`: the worker as one of several parts
//! - `membership`: a part of a machine whose set of parts changes
//! - `residual_dirty_scan`: what was written last by a machine that stands
//!
//! A worker outlives its agent: it is found again through the socket in its
//! folder. It never decides who owns the machine; it does what its agent, which
//! reads the store, tells it.

mod activity;
mod cluster_volumes;
mod compile;
pub mod control;
pub mod files;
mod log_transfer;
mod membership;
mod post_copy;
mod process;
mod residual_dirty_scan;
mod source;
mod spanning;
mod target;
pub mod volumes;

pub use compile::compile;
pub use keel_wasm::runtime::program_of_code;
pub use process::run;

/// Name of the socket in a worker's folder.
pub const SOCKET: &str = "socket";
