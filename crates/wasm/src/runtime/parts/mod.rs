//! Threads of one machine at several parts.
//!
//! ```text
//!            home                                          member
//!   OS thread `guest-7`: its own stages,      order      OS thread `guest-7`:
//!   safepoints, freezes, holds            ──────────▶    an instance, nothing else
//!        │ [`remote_thread::Away`] instead of a     ◀──────────       │
//!        ▼ fiber                             report          ▼ calls of the host
//!   WASI, wait queues, new threads, growing  ◀───────────────┘
//! ```
//!
//! The home has all of a machine but where its threads run. Each of them has an OS thread
//! there for its whole life. While it runs elsewhere this one stands for it: it makes its
//! calls of the host, is asked in its stead to come to a safepoint, and holds its state
//! when it stands at one. So whatever freezes, holds, captures or ends a machine does the
//! same with one that spans, and to move a thread is to capture it here and resume it
//! there.
//!
//! Calls of WASI travel with what they read, and come back with what they write, so that
//! no page has to ([`keel_wasi::pack`]): the home touches descriptors only. What cannot be
//! packed reads and writes the guest's memory at the home, as a thread of the guest would:
//! `crate::coherence` brings the pages. What nobody else can see happens where the thread
//! is: `sched_yield`, and the monotonic clock, since what parts say to each other carries
//! its time ([`keel_wasi::CausalClock`]).
//!
//! - `message`: what is said
//! - `away`: a thread that runs elsewhere, as the home sees it
//! - `member`: the other side
//!
//! What carries the messages and the pages is not here.

mod member;
mod message;
mod remote_thread;

pub use member::{HomeLink, Member};
pub use message::{Answer, Call, Entering, MessageError, Order, Report};
pub(super) use remote_thread::{Inbox, Parts, RemoteThread};

use crate::coherence::PartId;
use std::collections::BTreeMap;

/// Where threads begin that a machine starts while it has members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum SpawnPolicy {
    /// At the home.
    #[default]
    Here,
    /// Where the fewest of its threads are.
    Even,
    /// Where the most cores are free, as it was told last; before it was, as `Even`.
    Room,
}

/// The way from the home to its members.
pub trait Members: Send + Sync {
    /// Says something to a member; does not wait for it. Who cannot be told is lost, and
    /// the machine ends with it.
    fn order(&self, part: PartId, order: &Order);

    /// Microseconds that an OS thread of this process stood at pages so far, by the part
    /// that gave them.
    fn stalled_us(&self, os_thread: u32) -> BTreeMap<PartId, u64>;
}
