//! Checkpoints of machines with high availability, in folders of nodes: each is made in the folder
//! of the machine's node, and then other nodes fetch what they lack of it. The machine is stopped
//! for neither.
//!
//! ```text
//!   owner                                              other nodes
//!     │ makes the checkpoint in its own folder
//!     │── FETCH_CHECKPOINT: the names of all objects ──▶│ is it the machine's owner? (store)
//!     │◀──────────────── OBJECT: each that is lacking ──│ written, fsync, renamed
//!     │◀─────────────────────────────── it has all ─────│
//!     │ compare-and-swap: the in-sync set names the new checkpoint, and who has it
//!     │── DISCARD: what is still needed ───────────────▶│ deletes the rest
//! ```
//!
//! - `objects`: the files of a machine's checkpoints in a node's folder
//! - `owner`: the owner's part
//! - `damage`: a damaged copy is put aside, so that it is fetched again
//! - `output`: the machine's output up to the checkpoint, which is fetched along with it
//! - `replica`: the part of the other nodes; also a node that restarts a machine and lacks its
//!   checkpoint
//!
//! **Invariant:** the in-sync set names only nodes that have its checkpoint durably, and nothing
//! that it names is deleted before the set names another one.

mod damage;
mod objects;
mod output;
mod owner;
mod replica;

pub(crate) use objects::Object;
pub(crate) use output::COPIED_LOG;
pub(super) use owner::Unreplicated;
pub(crate) use replica::{
    DISCARD, Discard, FETCH_CHECKPOINT, FetchCheckpoint, OBJECT, OBJECTS, sweep,
};
