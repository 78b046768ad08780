//! What a call returns to the runtime, and what is kept of an interrupted call until it is repeated.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Complete; the errno for the guest.
    Done(i32),
    /// Interrupted before its effect. To be repeated later, possibly on another host, with the same
    /// arguments and the same [`CallState`].
    Interrupted,
    /// The guest ended itself with this code.
    Exit(u32),
    /// The guest must trap, with this reason (for example a pointer out of bounds).
    Trap(String),
}

/// State of a call between an interruption and its repetition; plain data, part of the image. Empty
/// again once the call is complete.
#[derive(Serialize, Deserialize, Default, Clone, Debug, PartialEq)]
pub struct CallState {
    /// Start of the first attempt on the guest's monotonic clock, in nanoseconds: relative
    /// time-outs count from it.
    pub started_ns: Option<u64>,
    /// Bytes that `random_get` has already filled, or that `fd_write` or `fd_pwrite` has written
    /// and that are not yet durable.
    pub progress_bytes: u64,
}
