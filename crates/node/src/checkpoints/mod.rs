//! Checkpoints of this node's machines. Workers do the work; this layer decides where and when.
//! Repositories are opened and read in blocking tasks, so that a slow store delays nothing else.
//! The `machines` layer starts machines from checkpoints.
//!
//! - `handle`: creates and lists checkpoints, and records the newest
//! - `prune`: deletes what nothing needs, when an operator asks for it
//! - `quota`, `usage`: how much may be stored in a place, and is
//! - `replication`: those of machines with high availability, on several nodes
//! - `schedule`: periodic checkpoints, as machines' specs ask for

mod handle;
mod prune;
mod quota;
mod replication;
mod schedule;
mod usage;

pub(crate) use handle::{
    Checkpoints, CreateCheckpoint, PATIENCE, check_plan, open, opened, place, repository_error,
};
pub(crate) use replication::{
    COPIED_LOG, DISCARD, Discard, FETCH_CHECKPOINT, FetchCheckpoint, OBJECT, OBJECTS, Object, sweep,
};
