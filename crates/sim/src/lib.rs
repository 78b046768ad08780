//! Simulated clusters around the balancer's own code: the same state machines that
//! the agents run, with nodes, machines, messages and time that are numbers.
//!
//! - [`curve`]: what a machine demands as time goes on
//! - [`world`]: nodes, messages, moves and failures; a seed says all of chance
//!
//! A run is repeated exactly by its seed.

#![forbid(unsafe_code)]

pub mod curve;
pub mod world;
