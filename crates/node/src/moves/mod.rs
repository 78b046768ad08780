//! Moves of whole machines: away from this node (the source feeds the state machine of
//! [`keel_machine::moves`] with what happens, and carries out its commands) and to it.
//!
//! - `handle`, `commands`: the part's state, and what users ask of it
//! - `queue`: which moves away from here copy at a time
//! - `begin`: how a move begins, or is taken up
//! - `source`: the source, step by step
//! - `offer`: what a source asks of a target
//! - `admission`: whether a target accepts
//! - `arrival`: how a target settles what came of it
//! - `recovery`: moves whose agent has died
//! - `directory_proofs`: that both nodes see the same directories
//! - `dry_run`, `dry_run_history`: what a move would be like

mod admission;
mod arrival;
mod begin;
mod commands;
mod directory_proofs;
mod dry_run;
mod dry_run_history;
mod handle;
mod offer;
mod queue;
mod recovery;
mod source;

pub(crate) use admission::{accept, drop_reservation, would_accept};
pub(crate) use arrival::{arrival, holds_copy, settle};
pub(crate) use begin::begin;
pub(crate) use commands::{CancelMove, DryRunCommand};
pub(crate) use handle::{Below, MoveOrder, Moves};
pub(crate) use offer::{ARRIVAL, HELD, MOVE, OFFER, Offer, TRIAL, WITHDRAW, WOULD_ACCEPT};
pub(crate) use recovery::{resume_after_move, withdraw_old_offers};
pub(crate) use source::RACED;
