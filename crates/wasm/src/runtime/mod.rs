//! Runs instrumented modules: threads that can be captured and resumed.
//!
//! - `program`: from bytes to compiled code
//! - `cache`: sealed files by name
//! - `imports`: what a module imports, before it is compiled
//! - `compile_progress`: how many functions are compiled
//! - `host`: what imports lead to
//! - `fiber`: one thread and its instance; the unwind and resume loop
//! - `frame`: a thread as plain data, and its format
//! - `machine`: all threads, memories and WASI state; freezing, thawing, holding
//! - `image`: a frozen machine as plain data
//! - `calls`: what a machine's host calls do
//! - `names`: what a guest says of its memory and threads
//! - `governor`: keeps a machine within its `cpu.limit`
//! - `parts`: threads of one machine at several parts
//! - `tables`: how many entries tables may have
//! - `plain`: the untouched module on plain wasmtime, for comparing
//! - `wait`: `memory.atomic.wait` and `notify`
//! - `signal`: how a thread is asked to come to a safepoint

mod cache;
mod calls;
mod compile_progress;
mod fiber;
pub mod frame;
mod governor;
mod hints;
mod host;
mod image;
mod imports;
mod machine;
pub mod parts;
mod program;
mod signal;
mod tables;
mod uninstrumented;
mod wait;

pub use crate::instrument::meta::TABLE_ENTRIES_MAX;
pub use compile_progress::CompileProgress;
pub use fiber::{Fiber, FiberError, Run, Stop, Trap};
pub use governor::CoreTime;
pub use hints::{NamedRange, is_object_name};
pub use host::{Host, HostOutcome, HostThread, ImportKind};
pub use image::Image;
pub use machine::{
    CpuUsage, Hold, Limits, Machine, MachineError, Outcome, ThreadInfo, make_memories,
};
pub use program::{Engine, Options, Program, ProgramError, STACK_BYTES, program_of_code};
pub use signal::Signal;
pub use tables::{TABLES_ENTRIES_MAX, TableBudget};
pub use wait::WaitQueues;
