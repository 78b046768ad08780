//! WebAssembly machines: programs that can be captured while they run, kept as
//! plain data, and resumed elsewhere.
//!
//! - [`mod@instrument`]: rewrites a module so that its threads can be captured
//! - [`memory`]: the bytes of a machine's memory, and which were written
//! - [`runtime`]: runs instrumented modules, captures and resumes their threads

pub mod coherence;
pub mod instrument;
pub mod memory;
pub mod runtime;
