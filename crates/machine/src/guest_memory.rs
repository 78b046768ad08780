//! The memory of machines as an agent sees it: by pages, and in a worker's process. Agents
//! know machines by this crate only, and no engine.

pub use keel_wasm::memory::{GuestMemory, PAGE_BYTES, bytes_of_process};
