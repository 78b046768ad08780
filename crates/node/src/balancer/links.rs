//! The networks to other nodes, as the balancer counts them: the round-trip time of the connection to
//! a node, and the rate of the last moves there.

use crate::context::Context;
use crate::moves::Moves;
use crate::rules::RuleSnapshot;
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

    /// The network to a node. Where nothing was measured yet, it is as far as their labels say.
    pub(super) fn to(&self, peer: &str, rules: &RuleSnapshot) -> Link {
        let measured = NodeName::new(peer).ok().and_then(|peer| {
            let time = self.context.peers.round_trip(&peer)?;
            let rate = self.moves.rate_to(&peer);
            Some(Link::measured(time.as_secs_f64() * 1e3, rate))
        });
        measured.unwrap_or_else(|| match rules.are_apart(self.context.name.as_str(), peer) {
            true => Link::FAR,
            false => Link::NEAR,
        })
    }
}
