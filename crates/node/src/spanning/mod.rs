//! Machines with parts on several nodes: the owner's agent has member workers made, lets
//! all parts meet, and says to the machine that it spans.
//!
//! ```text
//!   owner's agent                 each member's agent            its worker
//!       │─── PART ───────────────────▶│ fetches the module           │
//!       │                             │ starts it ──── PART_READY ──▶│ listens
//!       │◀──────────────── where ─────│◀─────────────────────────────│
//!       │ SPAN_READY: the home listens too
//!       │─── PART_JOIN, all at once, with SPAN to the home ─────────▶│ they meet
//! ```
//!
//! What was begun is undone where anything fails, and the machine goes on alone. Members
//! end by themselves with their home: an agent that dies leaves nothing to be settled.
//!
//! Which parts a machine has its home's worker knows; the store has its owner, as ever.
//!
//! - `handle`, `commands`: the part's state, and what users ask of it
//! - `messages`: messages between an owner's and a member's node
//! - `member`: a member's node
//! - `remote_member`: the same of any node
//! - `parts`: parts, threads and memory: reports of them, and their moves
//! - `membership`: parts that come and go while the machine runs
//! - `span`: parts are made, and brought together
//! - `home_migration`: the home moves
//! - `rooms`: nodes that have room for a part

mod commands;
mod handle;
mod home_migration;
mod member;
mod membership;
mod messages;
mod parts;
mod remote_member;
mod rooms;
mod span;

pub(crate) use commands::{
    MoveObjectCommand, MoveThreadCommand, ObjectsQuery, PartsQuery, SpanCommand, UnspanCommand,
};
pub(crate) use handle::{ROOM_BYTES_MIN, Spanning};
pub(crate) use home_migration::{
    Placement, Successor, machine_runs, release_successors, restore_placement, successor,
};
pub(crate) use member::{adopt, arrived_part, join, join_arriving, part_of, ready, ready_arriving};
pub(crate) use membership::{join_new, meet_new};
pub(crate) use messages::{
    ADD_PART, ARRIVED_PART, ARRIVING_JOIN, ARRIVING_PART, CONNECT_NEW_PART, PART, PART_JOIN, ROOM,
};
pub(crate) use parts::{
    heat_of, hot_in, idle_in, object_to, objects_report, parts_report, tell_room, thread_to,
};
pub(crate) use rooms::{room_here, rooms};
pub(crate) use span::{span, span_held, unspan};
