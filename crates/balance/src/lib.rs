//! The balancer's decisions, without the balancer: loads come in, moves and the
//! reasons for them come out. No clock, no randomness of its own, no network; a
//! node's agent feeds it, and so does the simulator.
//!
//! - [`load`]: what a load is, and what of a peer's numbers is believed
//! - [`policy`]: what the cluster wants of its balancer
//! - [`window`]: what the load was in the last seconds, and when it is calm enough
//! - [`cost`]: what a move is worth and what it takes, each with an interval
//! - [`select`]: which machine goes, and why not the others
//! - [`fine_grained`]: threads and memory of one machine
//! - [`round`]: one node's side of the masterless rounds
//! - [`plan`]: moves for the whole cluster at once, in order
//! - [`rules`]: where machines may be
//! - [`ledger`]: decisions as they are kept and told
//!
//! Moving itself, the store, and measuring are the node's business.

#![forbid(unsafe_code)]

pub mod cost;
pub mod fine_grained;
pub mod ledger;
pub mod load;
pub mod plan;
pub mod policy;
pub mod round;
pub mod rules;
pub mod select;
pub mod window;

/// Name of a node, a machine or a rule. Whoever makes one has checked it.
pub type Name = std::sync::Arc<str>;
