//! Failover: machines with high availability whose node has failed are restarted on other nodes,
//! from their newest checkpoint.
//!
//! ```text
//!   lease of node a ends ─▶ alive/a is gone ─▶ the holder of the role: which machines, where to?
//!        │ (before that a's workers hold their      │ one transaction for each machine, if a is still
//!        │  machines, or the kernel kills them)     │ without a lease: a's entry out, the other's in,
//!        ▼                                          ▼ owner, epoch + 1
//!   nothing of them runs                      the other node's agent starts it from the checkpoint
//! ```
//!
//! - One node acts for all, the holder of the role `failover`.
//! - `candidates`: the machines, their checkpoints, and the room of the nodes
//! - `headroom`: what the loss of each node would mean, and memory that is kept for it
//! - `fence`: the operator's program that makes certain that a node is off
//! - `act`: carries out what `keel_cluster::failover` decides
//!
//! Two nodes that both believe that they hold the role do no harm: each action is a transaction
//! that compares all it depends on. The role is there so that machines are placed by priority and
//! with a view of the room that is left.
//!
//! Machines without high availability wait for their node. What fences the node that failed is in
//! `keel_machine::worker::Guard` and `processes::lease_extension`.

mod act;
mod candidates;
mod fence;
mod headroom;

pub(crate) use act::run;
pub(crate) use candidates::Dependencies;
pub(crate) use headroom::{check_new, losses};
