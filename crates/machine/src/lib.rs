//! Machines, the worker processes that they run in, and how they move.
//!
//! - `spec`: what a user asks for, and what the store says of a machine
//! - `moves`: the move as two pure state machines, and its report
//! - `log`: a machine's output, by offset, so that it survives moves
//! - `link`: the connection between the two workers of a move
//! - `worker`: the process around one machine

#![forbid(unsafe_code)]

pub mod link;
pub mod log;
pub mod moves;
pub mod spec;
pub mod worker;
