//! Checkpoints of this node's machines. The work is the workers'; here it is decided where
//! and when. Repositories are opened and read in tasks that may wait: a slow store holds
//! up nothing else. Machines made of checkpoints are started by `machines`.
//!
//! - `handle`: making and listing checkpoints, and which is the newest
//! - `schedule`: checkpoints that a machine's spec asks for

mod handle;
mod schedule;

pub(crate) use handle::{
    Checkpoints, CreateCheckpoint, PATIENCE, check_plan, open, opened, place, vault_error,
};
