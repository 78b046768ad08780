//! The process around one machine, and what its agent says to it.
//!
//! - `control`: requests, answers and events between agent and worker
//! - `process`: the process itself
//! - `compile`: the process that compiles a program ahead
//! - `outgoing`: gives the machine away (source of a move)
//! - `incoming`: receives a machine (target of a move)
//! - `files`: what users do with files in volumes
//! - `volumes`: the machine's own volumes, in both directions
//! - `kept`: the keepers of its cluster volumes
//! - `spanning`: the worker as one of several parts
//! - `changing`: a part of a machine whose set of parts changes
//! - `looking`: what was written last by a machine that stands
//!
//! A worker outlives its agent: it is found again through the socket in its
//! folder. It never decides who owns the machine; it does what its agent, which
//! reads the store, tells it.

mod activity;
mod changing;
mod compile;
pub mod control;
pub mod files;
mod filling;
mod incoming;
mod kept;
mod log_transfer;
mod looking;
mod outgoing;
mod process;
mod spanning;
pub mod volumes;

pub use compile::compile;
pub use keel_wasm::runtime::program_of_code;
pub use process::run;

/// Name of the socket in a worker's folder.
pub const SOCKET: &str = "socket";
