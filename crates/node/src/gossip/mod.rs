//! This node's part in gossip ([`keel_cluster::gossip`]): its socket, its keys, and what others are
//! told of its load.
//!
//! ```text
//!   store ── keys, members ──▶ ┌────────┐ ◀── datagrams ──▶ other nodes
//!   balancer ── load ────────▶ │ socket │
//!                              └────────┘ ── who is doubted, loads ──▶ balancer, placement, users
//! ```
//!
//! The datagrams have the address and the number of the port that the node's other connections
//! have, by UDP. Where UDP does not pass between nodes, nothing is heard, nobody is doubted, and all
//! else works as it does with it.
//!
//! - `doubts`: who is better not asked just now
//! - `handle`: what other layers ask and tell
//! - `keys`: follows the keys, and replaces them on one node for all
//! - `socket`: the task that feeds the state machine

mod doubts;
mod handle;
mod keys;
mod socket;

use crate::context::Context;
use crate::role::Role;
pub(crate) use handle::{Known, NodeGossip};
use keel_cluster::gossip::Start;
use std::sync::Arc;

/// Takes part until the agent ends. `start` is this run's; `role` is that of who replaces the keys.
pub(crate) async fn run(gossip: Arc<NodeGossip>, context: Arc<Context>, start: Start, role: Role) {
    let followed = keys::follow(context.clone());
    tokio::spawn(keys::replace(context.clone(), role, followed.clone()));
    socket::run(&gossip, &context, start, followed).await;
    gossip.stopped.send_replace(true);
}
