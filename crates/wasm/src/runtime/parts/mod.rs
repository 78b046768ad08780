//! Threads of one machine on several parts.
//!
//! ```text
//!            home                                          member
//!   OS thread `guest-7`: its own stages,      order      OS thread `guest-7`:
//!   safepoints, freezes, holds            ──────────▶    an instance, nothing else
//!        │ [`remote_thread::RemoteThread`]    ◀──────────       │
//!        ▼ in place of a fiber                report          ▼ host calls
//!   WASI, wait queues, new threads, growing  ◀───────────────┘
//! ```
//!
//! The home holds the whole state of a machine except running threads. Each thread has an OS thread
//! at the home for its whole life. While the thread runs at a member, this OS thread is its proxy:
//! it performs its host calls, receives its safepoint requests, and keeps its state while it is at
//! a safepoint. So freezing, holding, capturing and ending work unchanged for a machine that spans,
//! and a thread moves by being captured at one part and resumed at another.
//!
//! WASI calls carry their input, and return their output, so that no page moves for them
//! ([`keel_wasi::pack`]): the home only touches descriptors. A call that cannot be packed accesses
//! guest memory at the home like a guest thread: `crate::coherence` fetches the pages. Calls
//! without effect outside of their thread run locally: `sched_yield`, and the monotonic clock,
//! since messages between parts carry its time ([`keel_wasi::CausalClock`]).
//!
//! - `message`: messages between home and member
//! - `remote_thread`: the home's proxy of a thread at a member
//! - `member`: the member's side
//!
//! The transport of messages and pages is elsewhere.

mod member;
mod message;
mod remote_thread;

pub use member::{HomeLink, Member};
pub use message::{Answer, Call, Entering, MessageError, Order, Report};
pub(super) use remote_thread::{Inbox, Parts, RemoteThread};

use crate::coherence::PartId;
use std::collections::BTreeMap;

/// Placement of new threads of a machine with members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum SpawnPolicy {
    /// At the home.
    #[default]
    Here,
    /// At the part with the fewest of its threads.
    Even,
    /// At the part with the most free cores, as last reported; as `Even` before the first report.
    Room,
}

/// Transport from the home to its members.
pub trait Members: Send + Sync {
    /// Sends an order to a member without waiting. An unreachable member is lost, and the machine
    /// ends with it.
    fn order(&self, part: PartId, order: &Order);

    /// Microseconds that an OS thread of this process stalled on remote pages so far, by the part
    /// that supplied them.
    fn stalled_us(&self, os_thread: u32) -> BTreeMap<PartId, u64>;
}
