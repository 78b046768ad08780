//! Cluster simulator for the balancer: the same state machines that agents run, with simulated
//! nodes, machines, messages and time.
//!
//! - [`curve`]: demand of a machine over time
//! - [`world`]: the discrete-event simulation: nodes, messages, moves and faults; the seed
//!   determines all random choices
//! - [`scenario`]: scenario files
//! - [`traces`]: readers of recorded clusters and loads
//! - [`run`]: runs a scenario
//! - [`report`]: result of a run
//! - [`expect`]: expectations of a scenario
//! - [`what_if`]: changes of a scenario, for comparison
//! - [`html_report`]: loads over time as an HTML page
//! - [`replay`]: replay of recorded decisions
//! - [`energy`]: power models of nodes
//! - [`bad_input`]: errors in input files
//!
//! A seed reproduces a run exactly.

#![forbid(unsafe_code)]

pub mod bad_input;
pub mod curve;
pub mod energy;
pub mod expect;
pub mod html_report;
pub mod replay;
pub mod report;
pub mod run;
pub mod scenario;
pub mod traces;
pub mod what_if;
pub mod world;
