//! Machines of kind `wasm`: WebAssembly programs, whose threads are captured at safepoints
//! and whose memory this process maps. Nothing has to be installed for them.
//!
//! - `kind`: what an agent asks of this kind
//! - `spec`: the part of a spec that only this kind understands
//! - `control`: requests to workers that only this kind has: parts, threads, objects
//! - `worker`: the process around one machine: its start, its moves
//! - `span`: one part of a machine that spans several nodes
//! - `checkpoint`: making checkpoints, and restoring machines from them
//!
//! What machines of every kind share is in `keel_machine`; the WebAssembly engine, of use
//! without a cluster, is `keel_wasm`.

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod control;
mod kind;
pub mod span;
mod spec;
mod worker;

pub use kind::WasmKind;
pub use spec::{THREADS_MAX, WasmSpec};

// Pages are counted alike in the engine, on the wire and in checkpoints.
const _: () = assert!(keel_machine::PAGE_BYTES == keel_wasm::memory::PAGE_BYTES);
