//! The process around one machine, and its protocol with its agent.
//!
//! - `control`: requests, answers and events between agent and worker
//! - `process`: the process itself
//! - `compile`: the process that compiles a program in advance
//! - `source`: the source's side of a move
//! - `target`: the target's side of a move
//! - `files`: operations of users on files in volumes
//! - `volumes`: the machine's own volumes, at the source and the target
//! - `cluster_volumes`: the machine's cluster volumes
//! - `spanning`: the worker as one of several parts
//! - `membership`: changes of the set of parts
//! - `stack_functions`: functions on the stacks of a machine that moves, compiled at the target
//! - `residual_dirty_scan`: the pages that a frozen machine wrote last
//!
//! A worker outlives its agent, which finds it again through the socket in its folder. It
//! never decides who owns the machine; it obeys its agent, which reads the store.

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
mod stack_functions;
mod target;
pub mod volumes;

pub use compile::compile;
pub use keel_wasm::runtime::program_of_code;
pub use process::run;

/// Name of the socket in a worker's folder.
pub const SOCKET: &str = "socket";
