//! Moves of whole machines: away from this node (the source feeds events to the state machine of
//! [`keel_machine::moves`] and carries out its commands) and to it.
//!
//! - `handle`, `commands`: the state of this layer, and the commands of users
//! - `queue`: which moves away from here copy at a time
//! - `begin`: begins a move, or recovers one
//! - `source`, `ownership_change`: the source, step by step, and its commit
//! - `offer`: the messages from a source to a target
//! - `admission`: how a target checks and accepts an offer
//! - `settle_arrival`: how a target settles an arrival
//! - `recovery`: moves whose agent has died
//! - `directory_proofs`: that both nodes see the same directories
//! - `dry_run`, `dry_run_history`: predictions of moves
//! - `trace`: what a trace says of a move

mod admission;
mod begin;
mod commands;
mod directory_proofs;
mod dry_run;
mod dry_run_history;
mod handle;
mod offer;
mod ownership_change;
mod queue;
mod recovery;
mod settle_arrival;
mod source;
mod trace;

pub(crate) use admission::{accept, drop_reservation, would_accept};
pub(crate) use begin::begin;
pub(crate) use commands::{CancelMove, DryRunCommand};
pub(crate) use handle::{Dependencies, MoveOrder, Moves};
pub(crate) use offer::{ARRIVAL, HELD, MOVE, OFFER, Offer, TRIAL, WITHDRAW, WOULD_ACCEPT};
pub(crate) use ownership_change::RACED;
pub(crate) use recovery::{is_behind, resume_after_move, settle_after_move, withdraw_old_offers};
pub(crate) use settle_arrival::{arrival, holds_copy, settle};
