//! The processes of this node: one worker for each machine that runs, arrives or leaves here, and
//! one for each part of a machine whose home is on another node. This layer starts them, finds
//! those that an earlier agent started, and ends them. What they run is decided by the layers
//! above.
//!
//! - `handle`: the state of this layer
//! - `workers`: a table of workers; a worker's socket, process and folder
//! - `folder`: the folder of a worker on disk
//! - `exclusion`: operations in progress, by machine
//! - `image`: the executable that workers and agents are started from
//! - `lease_extension`: tells workers until when this node's lease holds
//! - `planned_restart`: restarts of this agent while its machines run on
//! - `failpoint_command`, `injections_for_new_workers`: failpoints in workers, present and future

mod exclusion;
mod failpoint_command;
mod folder;
mod handle;
mod image;
mod injections_for_new_workers;
mod lease_extension;
mod planned_restart;
mod workers;

pub(crate) use exclusion::MoveHandle;
pub(crate) use folder::Leftovers;
pub(crate) use handle::{Arrivals, Processes};
pub use image::{installed, own_image, own_image_for_others};
pub(crate) use image::{read_own_image_ahead, spawn};
pub(crate) use lease_extension::{LeaseExtension, extend_new, prove_guard};
pub(crate) use planned_restart::PlannedRestart;
pub(crate) use workers::{
    COMPILE_PATIENCE, OLDER, PROMPT, WorkerHandle, Workers, explained, is_older,
};
