//! The worker process of a WebAssembly machine: what this kind does for the requests and
//! the moves of every kind (`keel_machine::worker`), and its own requests.
//!
//! - `wasm_worker`: the worker's state, and its side of the shared protocol
//! - `requests`: the requests that only this kind has
//! - `start`: starting the machine, from its module or a checkpoint
//! - `checkpoints`: making checkpoints, and giving them up for a move
//! - `source`: the source's side of a move
//! - `throttle`: slows down a guest whose dirty rate is too high for its move
//! - `target`: the target's side of a move
//! - `post_copy`: memory that follows a machine which runs at the target
//! - `residual_dirty_scan`: the pages that a frozen machine wrote last
//! - `stack_functions`: functions on the stacks of a machine that moves, compiled at the target
//! - `spanning`: the worker as one of several parts
//! - `membership`: changes of the set of parts
//! - `activity`: samples of the machine's writes
//! - `volumes`: the machine's own volumes, at the source and the target
//! - `cluster_volumes`: the machine's cluster volumes
//! - `compile`: the process that compiles a program in advance

mod activity;
mod checkpoints;
mod cluster_volumes;
mod compile;
mod membership;
mod post_copy;
mod requests;
mod residual_dirty_scan;
mod source;
mod spanning;
mod stack_functions;
mod start;
mod target;
mod throttle;
mod volumes;
mod wasm_worker;

pub(crate) use compile::compile;
pub(crate) use wasm_worker::run;
