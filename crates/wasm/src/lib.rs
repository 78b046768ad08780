//! WebAssembly machines: programs that can be captured while they run, stored as plain data, and
//! resumed elsewhere.
//!
//! - [`mod@instrument`]: rewrites a module so that its threads can be captured
//! - [`memory`]: the memory of a machine, dirty tracking, and page faults
//! - [`runtime`]: runs instrumented modules, captures and resumes their threads

pub mod coherence;
pub mod instrument;
pub mod memory;
pub mod runtime;
