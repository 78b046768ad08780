//! Simulated clusters around the balancer's own code: the same state machines that
//! the agents run, with nodes, machines, messages and time that are numbers.
//!
//! - [`curve`]: what a machine demands as time goes on
//! - [`world`]: nodes, messages, moves and failures; a seed says all of chance
//! - [`scenario`]: files that say what is simulated
//! - [`traces`]: clusters and loads that others recorded
//! - [`run`]: runs a scenario and says what came of it
//! - [`expect`]: what was expected of it
//! - [`what_if`]: changes of a scenario, to compare with
//! - [`html_report`]: loads over time, as a page
//! - [`replay`]: decisions that were made, decided again
//! - [`energy`]: what power nodes take
//! - [`bad_input`]: what is wrong with a file
//!
//! A run is repeated exactly by its seed.

#![forbid(unsafe_code)]

pub mod bad_input;
pub mod curve;
pub mod energy;
pub mod expect;
pub mod html_report;
pub mod replay;
pub mod run;
pub mod scenario;
pub mod traces;
pub mod what_if;
pub mod world;
