//! The balancer of this node: feeds measurements, requests and answers to the state machine of
//! `keel-balance`, and carries out its commands.
//!
//! ```text
//!   meter thread ──┐
//!   store's watches┼─▶ events ─▶ Balancer::step ─▶ asks, replies ─▶ other nodes
//!   other nodes ───┘                            └▶ moves ─▶ `moves`
//!                                               └▶ decisions ─▶ ledger thread
//! ```
//!
//! - `handle`: the state of the balancer
//! - `task`: events in, commands out
//! - `actions`, `move_tokens`: its moves, and the limit of concurrent ones
//! - `meter`, `process_counters`, `speed`, `dirty_rate`, `dirty_rate_sampler`: measure this node
//! - `constraints`, `links`: constraints from rules and specs, and the networks to other nodes
//! - `declared_load`: machines whose target load counts
//! - `policy`: the policy in the store
//! - `ledger`, `ledger_transfer`, `recorder`, `database`: records of decisions and loads
//! - `peers`, `answers`, `queries`: requests between balancers, and queries of users
//! - `placement`: where new machines start
//! - `memory_reclaim`: memory that systems give back to this node
//! - `compile_ahead`: compiles programs before they are needed here
//! - `plan`, `plan_confirmation`: plans for all nodes, and their execution
//! - `drain`, `drain_progress`: drains this node
//! - `fine_grained`, `spreading`: threads and memory of machines that may have parts elsewhere
//!
//! `docs/balancing.md` explains load, rounds, plans and drains.

mod actions;
mod answers;
mod compile_ahead;
mod constraints;
mod database;
mod declared_load;
mod dirty_rate;
mod dirty_rate_sampler;
mod drain;
mod drain_progress;
mod fine_grained;
mod handle;
mod ledger;
mod ledger_transfer;
mod links;
mod memory_reclaim;
mod meter;
mod move_tokens;
mod peers;
mod placement;
mod plan;
mod plan_confirmation;
mod policy;
mod process_counters;
mod queries;
mod recorder;
mod rest;
mod speed;
mod spreading;
mod task;

pub(crate) use answers::answer;
pub(crate) use declared_load::IO_TARGET_MAX;
pub(crate) use drain::{begin as begin_drain, end as end_drain, info as drain_info};
pub(crate) use handle::{Dependencies, Inbox, NodeBalancer};
pub(crate) use ledger::{Ledger, LedgerFilter};
pub(crate) use peers::{BALANCE, CONFIRM, DRAIN, HISTORY, LEDGER, LEDGER_TRANSFER, LOAD, WHY_NOT};
pub(crate) use plan::{carry_out as carry_out_plan, make as make_plan};
pub(crate) use queries::{change_policy, confirm, gather_ledger, gather_loads, history, why_not};
pub(crate) use recorder::{HistoryRange, Recorder};
pub(crate) use task::start;
