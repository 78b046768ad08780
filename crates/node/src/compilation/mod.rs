//! Compiled code on this node: the programs whose machines can arrive here at once, and the order of
//! compilations.
//!
//! ```text
//!   a move waits ──────────▶ a process at once ┐
//!                                              ├─▶ ready ─▶ `code/NODE` in the store
//!   balancer ──▶ queue ──▶ one process at a time
//!                         (`keel compile`, yields to guests)
//! ```
//!
//! A machine can only arrive if its program is compiled. That takes seconds for a large program, so
//! it is done ahead of use: on the nodes that may receive the machine, one program at a time, in a
//! process that gets only the processor time that guests leave. A move that finds no code has it
//! compiled at once, and shows the progress. What the threads of a machine need besides depends on
//! their stacks, and is compiled while its memory is copied (`keel_kind_wasm`'s
//! `worker::stack_functions`). The store has the nodes with their code: the balancer counts the cost
//! of compiling, and `keel inspect` shows it.
//!
//! Native code is never sent between nodes; modules are.
//!
//! - `compilations`: programs that are ready, wait, or are being compiled; pure
//! - `service`: carries out compilations
//! - `process`: the process that compiles one program
//! - `publish`, `nodes_with_code`: the code of all nodes

mod compilations;
mod nodes_with_code;
mod process;
mod publish;
mod service;

pub(crate) use compilations::{Code, CodeState};
pub(crate) use service::{CODE, PROGRAM, program_here, run};
