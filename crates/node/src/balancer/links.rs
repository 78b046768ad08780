//! The networks to other nodes, as the balancer counts them: the round-trip time of the connection to
//! a node, and the rate of the last moves there.

use crate::context::Context;
use crate::moves::Moves;
use keel_balance::cost::Link;
use keel_cluster::NodeName;
use std::sync::Arc;

/// What was measured of each.
#[derive(Clone)]
pub(super) struct Links {
    context: Arc<Context>,
    moves: Arc<Moves>,
}

impl Links {
    pub(super) fn new(context: Arc<Context>, moves: Arc<Moves>) -> Self {
        Links { context, moves }
    }

    /// The network to a node; [`Link::NEAR`] if nothing was measured yet.
    pub(super) fn to(&self, peer: &str) -> Link {
        let Ok(peer) = NodeName::new(peer) else {
            return Link::NEAR;
        };
        match self.context.peers.round_trip(&peer) {
            Some(time) => Link::measured(time.as_secs_f64() * 1e3, self.moves.rate_to(&peer)),
            None => Link::NEAR,
        }
    }
}
