//! Compiled code on this node: which programs are ready to go on here, and which one
//! is compiled next.
//!
//! ```text
//!   a move waits ──────────▶ a process at once ┐
//!                                              ├─▶ ready ─▶ `code/NODE` in the store
//!   balancer ──▶ queue ──▶ one process at a time
//!                         (`keel compile`, yields to guests)
//! ```
//!
//! A machine can only arrive, or be captured, where the code is ready with which its
//! threads are resumed, and compiling that takes several times as long as starting the
//! program. So it is done before: on the node where a machine runs, and on those that
//! may receive it (`ahead`), one program at a time, in a process that gets only what
//! guests leave of the processors. A move that finds no code has it compiled at once, and
//! shows how far that is. Which nodes have which code is in the store
//! (`published`): the balancer counts what compiling costs, `keel inspect` shows it.
//!
//! Native code never travels: modules do.
//!
//! - `compilations`: which programs are ready, wait, are being compiled (pure)
//! - `service`: compiles what is asked for
//! - `process`: the process that compiles one program
//! - `publish`, `nodes_with_code`: which nodes have which code

mod compilations;
mod nodes_with_code;
mod process;
mod publish;
mod service;

pub(crate) use compilations::{Code, CodeState};
pub(crate) use service::{CODE, PROGRAM, program_here, run};
