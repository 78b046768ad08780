//! State of the processes layer.

use super::exclusion::Exclusion;
use super::workers::Workers;
use keel_cluster::MachineName;
use keel_machine::cgroup::Slice;
use std::sync::Arc;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The processes of this node.
pub(crate) struct Processes {
    /// Workers of machines whose home is here, or arrives here.
    pub(crate) machines: Arc<Workers>,
    /// Workers of parts whose home is elsewhere.
    pub(crate) members: Arc<Workers>,
    /// Operations in progress on the machines here.
    pub(crate) exclusion: Exclusion,
    arrivals: UnboundedSender<MachineName>,
}

/// Machines whose worker here has accepted a move, in order.
pub(crate) type Arrivals = UnboundedReceiver<MachineName>;

impl Processes {
    pub(crate) fn new(slice: Slice) -> (Self, Arrivals) {
        let slice = Arc::new(slice);
        let (arrivals, receiver) = unbounded_channel();
        let processes = Processes {
            machines: Arc::new(Workers::new(slice.clone())),
            members: Arc::new(Workers::new(slice)),
            exclusion: Exclusion::default(),
            arrivals,
        };
        (processes, receiver)
    }

    /// Announces a worker that waits for an arriving machine, so that its states are followed.
    pub(crate) fn announce_arrival(&self, machine: &MachineName) {
        // The receiver ends with the agent.
        let _ = self.arrivals.send(machine.clone());
    }
}
