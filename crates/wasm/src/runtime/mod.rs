//! Runs instrumented modules: threads that can be captured and resumed.
//!
//! - `program`: from module bytes to compiled code
//! - `resume_code`: the code in which captured threads are resumed
//! - `cache`: authenticated cache files
//! - `imports`: import validation before compilation
//! - `compile_progress`: number of compiled functions
//! - `host`: host functions behind the imports
//! - `fiber`: one thread and its instance; the unwind and resume loop
//! - `frame`: a captured thread, and its format
//! - `machine`: all threads, memories and WASI state; freezing, thawing, holding
//! - `image`: a frozen machine as plain data
//! - `calls`: implementation of a machine's host calls
//! - `hints`: placement hints of the guest
//! - `cpu_usage`: CPU time of threads
//! - `governor`: enforces `cpu.limit`
//! - `parts`: threads of one machine on several parts
//! - `tables`: limits of tables
//! - `uninstrumented`: the original module on plain wasmtime, for comparison
//! - `wait`: `memory.atomic.wait` and `notify`
//! - `lock`: locks a mutex
//! - `signal`: safepoint requests to a thread

mod cache;
mod calls;
mod compile_progress;
mod cpu_usage;
mod fiber;
pub mod frame;
mod governor;
mod hints;
mod host;
mod image;
mod imports;
mod lock;
mod machine;
pub mod parts;
mod program;
mod resume_code;
mod signal;
mod tables;
mod uninstrumented;
mod wait;

pub use crate::instrument::meta::TABLE_ENTRIES_MAX;
pub use compile_progress::CompileProgress;
pub use cpu_usage::{CoreTime, CpuUsage};
pub use fiber::{Fiber, FiberError, Run, Stop, Trap};
pub use hints::{NamedRange, is_object_name};
pub use host::{Host, HostOutcome, HostThread, ImportKind};
pub use image::Image;
pub use machine::{Hold, Limits, Machine, MachineError, Outcome, ThreadInfo, make_memories};
pub use program::{Engine, Options, Program, ProgramError, STACK_BYTES, program_of_code};
pub use signal::Signal;
pub use tables::{TABLES_ENTRIES_MAX, TableBudget};
pub use wait::WaitQueues;
