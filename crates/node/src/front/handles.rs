//! The handles to which requests are passed.

use crate::balancer::NodeBalancer;
use crate::checkpoints::Checkpoints;
use crate::compilation::Code;
use crate::context::Context;
use crate::failover;
use crate::gossip::NodeGossip;
use crate::images::Images;
use crate::logs::Logs;
use crate::machines::Machines;
use crate::moves::Moves;
use crate::processes::{PlannedRestart, Processes};
use crate::rules::Rules;
use crate::spanning::Spanning;
use crate::volumes::VolumeFiles;
use crate::voters::Voters;
use std::sync::Arc;

/// A handle of each layer.
pub(crate) struct Handles {
    pub(crate) context: Arc<Context>,
    pub(crate) gossip: Arc<NodeGossip>,
    pub(crate) voters: Arc<Voters>,
    pub(crate) processes: Arc<Processes>,
    pub(crate) images: Arc<Images>,
    pub(crate) code: Arc<Code>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) checkpoints: Arc<Checkpoints>,
    pub(crate) logs: Arc<Logs>,
    pub(crate) files: Arc<VolumeFiles>,
    pub(crate) spanning: Arc<Spanning>,
    pub(crate) moves: Arc<Moves>,
    pub(crate) balancer: Arc<NodeBalancer>,
    pub(crate) machines: Arc<Machines>,
    pub(crate) failover: Arc<failover::Dependencies>,
    pub(crate) restart: Arc<PlannedRestart>,
}
