//! State of the machines layer.

use super::looks::Looks;
use super::single_tasks::SingleTasks;
use crate::balancer::NodeBalancer;
use crate::checkpoints::Checkpoints;
use crate::compilation::Code;
use crate::context::Context;
use crate::failover;
use crate::images::Images;
use crate::moves::Moves;
use crate::processes::Processes;
use crate::records::RecordError;
use crate::rules::Rules;
use crate::spanning::Spanning;
use keel_cluster::{Epoch, MachineName};
use keel_machine::spec::Status;
use std::sync::{Arc, OnceLock};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Machines to restart, each with its new epoch.
pub(crate) type Restarts = UnboundedReceiver<(MachineName, Epoch)>;

/// Machines of this node.
pub(crate) struct Machines {
    pub(super) context: Arc<Context>,
    pub(super) processes: Arc<Processes>,
    pub(super) images: Arc<Images>,
    pub(super) code: Arc<Code>,
    pub(super) rules: Arc<Rules>,
    pub(super) checkpoints: Arc<Checkpoints>,
    pub(super) spanning: Arc<Spanning>,
    pub(super) moves: Arc<Moves>,
    pub(super) balancer: Arc<NodeBalancer>,
    pub(super) failover: Arc<failover::Dependencies>,
    pub(super) looks: Looks,
    /// The tasks that keep in-sync sets of machines without checkpoints.
    pub(super) member_tasks: SingleTasks,
    /// No epoch was above this one when this agent began to follow its schedule. A machine to be
    /// started under an older epoch may already have been started by an earlier agent.
    pub(super) epochs_before: OnceLock<Epoch>,
    restarts: UnboundedSender<(MachineName, Epoch)>,
}

/// The lower layers.
pub(crate) struct Dependencies {
    pub(crate) context: Arc<Context>,
    pub(crate) processes: Arc<Processes>,
    pub(crate) images: Arc<Images>,
    pub(crate) code: Arc<Code>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) checkpoints: Arc<Checkpoints>,
    pub(crate) spanning: Arc<Spanning>,
    pub(crate) moves: Arc<Moves>,
    pub(crate) balancer: Arc<NodeBalancer>,
    pub(crate) failover: Arc<failover::Dependencies>,
}

impl Machines {
    pub(crate) fn new(below: Dependencies) -> (Self, Restarts) {
        let (restarts, receiver) = unbounded_channel();
        let machines = Machines {
            context: below.context,
            processes: below.processes,
            images: below.images,
            code: below.code,
            rules: below.rules,
            checkpoints: below.checkpoints,
            spanning: below.spanning,
            moves: below.moves,
            balancer: below.balancer,
            failover: below.failover,
            looks: Looks::default(),
            member_tasks: SingleTasks::default(),
            epochs_before: OnceLock::new(),
            restarts,
        };
        (machines, receiver)
    }

    /// Queues a restart if the end of a machine calls for one. To be called once no other
    /// operation on the machine is in progress.
    pub(super) fn queue_restart(
        &self,
        machine: &MachineName,
        end: Result<RestartDecision, RecordError>,
    ) -> Result<(), RecordError> {
        if let RestartDecision::Under(epoch) = end? {
            // The receiver ends with the agent.
            let _ = self.restarts.send((machine.clone(), epoch));
        }
        Ok(())
    }
}

/// Whether a machine restarts after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RestartDecision {
    /// Under this new epoch.
    Under(Epoch),
    No,
}

/// Whether a machine with this status is to be started where it is scheduled.
pub(super) fn starts(status: &Status) -> bool {
    matches!(status, Status::Scheduled | Status::Restarting { .. })
}
