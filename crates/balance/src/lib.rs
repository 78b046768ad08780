//! The decision logic of the balancer as a pure state machine: load samples come in, moves and the
//! reasons for them come out. It has no clock, no randomness of its own and no network; a node's
//! agent drives it, and so does the simulator.
//!
//! - [`load`]: load factors, and the validation of numbers that a peer reports
//! - [`policy`]: the balancing policy of a cluster
//! - [`window`]: the sliding window of load samples, and when a difference has lasted
//! - [`cost`]: the cost and the gain of a move, each with a confidence interval
//! - [`select`]: selection of the machine to move, with a verdict for each candidate
//! - [`fine_grained`]: placement of the threads and the memory of one machine
//! - [`memory_reclaim`]: memory that systems give back to their node
//! - [`round`]: one node's side of the decentralised rounds
//! - [`plan`]: an ordered plan of moves for the whole cluster
//! - [`rules`]: placement rules
//! - [`ledger`]: decisions as they are stored and displayed
//!
//! Carrying out a move, the store and the measurement belong to the node.

#![forbid(unsafe_code)]

pub mod cost;
pub mod fine_grained;
pub mod ledger;
pub mod load;
pub mod memory_reclaim;
pub mod plan;
pub mod policy;
pub mod round;
pub mod rules;
pub mod select;
pub mod window;

/// Name of a node, a machine or a rule. The constructor of the name has validated it.
pub type Name = std::sync::Arc<str>;
