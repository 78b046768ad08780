//! Gossip between all nodes over datagrams: who answers, and what load each node has. It needs
//! neither the store nor a leader, and costs a node about the same however many nodes there are.
//!
//! ```text
//!            probe unanswered,          not refuted
//!            directly and through       in time
//!            others
//!   alive ───────────────▶ suspected ───────────────▶ down
//!     ▲                       │                         │
//!     └─── it answers, with a higher incarnation ◀──────┘ it renews itself
//! ```
//!
//! The protocol is SWIM with suspicion and updates that ride on probes (Das, Gupta, Motivala:
//! "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol", DSN 2002),
//! by the crate `foca`, which has no I/O and no clock and so can be simulated whole.
//!
//! - [`datagram`]: sealed envelopes, and what is refused before anything is decoded.
//! - [`keys`]: the keys that seal them, and their replacement.
//! - [`instance`]: one run of a node's agent.
//! - [`load`]: the loads that ride along.
//! - [`membership`]: the state machine.
//!
//! **Gossip only suspects.** A node's machines belong to others only once its lease has ended; who
//! is a member, and at which address, is the store's word. What gossip says is for choices that any
//! outcome leaves correct: whom to ask first, and what users see.

pub mod datagram;
pub mod instance;
pub mod keys;
pub mod load;
pub mod membership;

pub use instance::{Instance, Start};
pub use load::Load;
pub use membership::{Event, Gossip, Liveness, Outgoing};
