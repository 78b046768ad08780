//! Machines with parts on several nodes: the owner's agent has member workers started, connects
//! all parts, and starts the spanning of the machine.
//!
//! ```text
//!   owner's agent                 each member's agent            its worker
//!       │─── PART ───────────────────▶│ fetches the module           │
//!       │                             │ starts it ──── PART_READY ──▶│ listens
//!       │◀────────────── address ─────│◀─────────────────────────────│
//!       │ SPAN_READY: the home listens too
//!       │─── PART_JOIN, all at once, with SPAN to the home ─────────▶│ all connect
//! ```
//!
//! A failure undoes every completed step, and the machine continues on its home alone. Members end
//! by themselves with their home, so the death of an agent leaves nothing to settle.
//!
//! The home's worker holds the set of parts; the store holds the owner only.
//!
//! - `handle`, `commands`: the state of this layer, and the commands of users
//! - `messages`: messages between an owner's and a member's node
//! - `member`: starts and ends a member on its node
//! - `remote_member`: the same on any node
//! - `parts`: reports and moves of parts, threads and memory
//! - `membership`: adds and removes parts while the machine runs
//! - `span`: creates the parts, and merges them again
//! - `home_migration`: migrates the home
//! - `nodes_with_memory`: nodes that have room for a part

mod commands;
mod handle;
mod home_migration;
mod member;
mod membership;
mod messages;
mod nodes_with_memory;
mod parts;
mod remote_member;
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
    ADD_PART, ARRIVED_PART, ARRIVING_JOIN, ARRIVING_PART, CONNECT_NEW_PART, FREE_MEMORY, PART,
    PART_JOIN,
};
pub(crate) use nodes_with_memory::{free_memory_here, nodes_with_memory};
pub(crate) use parts::{
    heat_of, hot_in, idle_in, object_to, objects_report, parts_report, tell_room, thread_to,
};
pub(crate) use span::{span, span_held, unspan};
