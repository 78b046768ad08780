//! Machines of this node: their life from the transaction that creates them to the one that
//! removes them. This layer is above moves and the balancer, because starting a machine asks for
//! its placement, and ending one waits for its move.
//!
//! - `handle`: the state of this layer
//! - `create`, `restore`, `spec_check`: new machines, and the limits of their specs; `start_again`:
//!   those that have ended
//! - `reconcile`: schedule → processes
//! - `start`, `spanning_start`: start a machine in a worker, on one node or several
//! - `worker_monitor`, `record_running`, `termination`: states of workers → records
//! - `stop`, `remove`, `set`: commands of users
//! - `execute`, `console`, `display`: commands of users in machines, what they type there, and what they
//!   see there; `guest_system`: what is in them
//! - `queries`, `diff`: queries of users
//! - `host_files`: the nodes that can begin a machine anew that does not restart from checkpoints;
//!   `looks`: looks at files whose server may hang; `single_tasks`: one task for each worker
//! - `stall_status`: machines that wait for a disk or a volume's backend

mod console;
mod create;
mod diff;
mod display;
mod execute;
mod give_up;
mod guest_system;
mod handle;
mod host_files;
mod looks;
mod queries;
mod reconcile;
mod record_running;
mod remove;
mod restore;
mod set;
mod single_tasks;
mod spanning_start;
mod spec_check;
mod stall_status;
mod start;
mod start_again;
mod stop;
mod termination;
mod worker_monitor;

pub(crate) use console::TypeIn;
pub(crate) use create::run;
pub(crate) use diff::diff;
pub(crate) use display::{VIEW, VIEWER_INPUT, ViewerInput};
pub(crate) use execute::{ProcessQuery, StartProcess};
pub(crate) use guest_system::SystemQuery;
pub(crate) use handle::{Dependencies, Machines, Restarts};
pub(crate) use host_files::{SEEN_BY, SEES, Sees, seen_by, sees};
pub(crate) use queries::ReportQuery;
pub(crate) use reconcile::{follow_restarts, follow_schedule};
pub(crate) use remove::RemoveMachine;
pub(crate) use restore::restore;
pub(crate) use set::SetMachine;
pub(crate) use start_again::start_again;
pub(crate) use stop::StopMachine;
pub(crate) use worker_monitor::watch_worker;
