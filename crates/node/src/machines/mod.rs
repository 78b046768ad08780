//! Machines of this node: their life from the transaction that creates them to the one that
//! removes them. This part stands above moves and the balancer, because starting a machine
//! asks where to place it, and ending one waits for its move.
//!
//! - `handle`: the part's state
//! - `create`, `restore`, `spec_check`: new machines, and what they may ask for
//! - `reconcile`: schedule → processes
//! - `start`, `spanning_start`: a worker gets its machine, on one node or several
//! - `watch`, `arrivals`, `ends`: states of workers → records
//! - `stop`, `remove`, `set`: what users change
//! - `queries`, `diff`: what users see
//! - `stall_status`: machines that wait for a disk or a volume's store

mod arrivals;
mod create;
mod diff;
mod ends;
mod handle;
mod queries;
mod reconcile;
mod remove;
mod restore;
mod set;
mod spanning_start;
mod spec_check;
mod stall_status;
mod start;
mod stop;
mod watch;

pub(crate) use create::run;
pub(crate) use diff::diff;
pub(crate) use handle::{Below, Machines, Restarts};
pub(crate) use queries::ReportQuery;
pub(crate) use reconcile::{follow_restarts, follow_schedule};
pub(crate) use remove::RemoveMachine;
pub(crate) use restore::restore;
pub(crate) use set::SetMachine;
pub(crate) use stop::StopMachine;
pub(crate) use watch::watch_worker;
