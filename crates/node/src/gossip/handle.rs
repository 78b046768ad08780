//! What other layers ask of gossip, and tell it.

use keel_cluster::NodeName;
use keel_cluster::gossip::load::Heard;
use keel_cluster::gossip::{Gossip, Liveness, Load};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How old a load may be to be of use: nodes tell theirs more often.
const LOAD_AGE_MAX: Duration = Duration::from_secs(90);

/// What is known of a node by gossip.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Known {
    /// Whether it answers; `None` if it was never heard of.
    pub(crate) liveness: Option<Liveness>,
    /// Its load, and how long ago it was heard.
    pub(crate) load: Option<(Load, Duration)>,
}

/// This node's gossip.
pub(crate) struct NodeGossip {
    /// Origin of the state machine's time.
    begun: Instant,
    /// `None` until the store has answered.
    pub(super) machine: Mutex<Option<Gossip>>,
    /// This node's load.
    pub(super) measured: watch::Sender<Option<Load>>,
    /// Nodes that are better not asked just now.
    pub(super) doubted: watch::Sender<BTreeSet<NodeName>>,
    /// Whether the agent stops.
    pub(super) stopping: watch::Sender<bool>,
    pub(super) stopped: watch::Sender<bool>,
}

impl NodeGossip {
    pub(crate) fn new() -> Self {
        NodeGossip {
            begun: Instant::now(),
            machine: Mutex::default(),
            measured: watch::Sender::default(),
            doubted: watch::Sender::default(),
            stopping: watch::Sender::default(),
            stopped: watch::Sender::default(),
        }
    }

    /// What is known of all nodes that were heard of.
    pub(crate) fn known(&self) -> BTreeMap<NodeName, Known> {
        let now = self.now();
        let machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(machine) = &*machine else {
            return BTreeMap::new();
        };
        let mut known: BTreeMap<NodeName, Known> = BTreeMap::new();
        for (node, liveness) in machine.liveness() {
            known.entry(node).or_default().liveness = Some(liveness);
        }
        for (node, Heard { load, at, .. }) in machine.loads() {
            let age = now.saturating_sub(at);
            if age <= LOAD_AGE_MAX {
                known.entry(node).or_default().load = Some((load, age));
            }
        }
        known
    }

    /// Nodes that did not answer lately, though the store may say that they are alive.
    pub(crate) fn doubted(&self) -> watch::Receiver<BTreeSet<NodeName>> {
        self.doubted.subscribe()
    }

    /// Takes this node's load, of which others are told.
    pub(crate) fn measured(&self, load: Load) {
        self.measured.send_replace(Some(load));
    }

    /// Tells others that this node's agent stops, so that they need not find out.
    pub(crate) async fn stop(&self) {
        let mut stopped = self.stopped.subscribe();
        self.stopping.send_replace(true);
        // (An error: it never began.)
        let _ = tokio::time::timeout(Duration::from_secs(1), stopped.wait_for(|it| *it)).await;
    }

    /// The state machine's time.
    pub(super) fn now(&self) -> Duration {
        self.begun.elapsed()
    }
}
