//! The context that every layer gets: identity, store, other nodes, events and folders. It has no
//! behaviour of its own; layers keep their own state.

use crate::events::Events;
use crate::external_store::ExternalStore;
use crate::identity::OwnIdentity;
use crate::lease::{HoldHandle, LeaseTerm};
use crate::metrics::Metrics;
use crate::state_dir::{StateDir, write_whole};
use crate::traces::Traces;
use keel_balance::rules::Labels;
use keel_cluster::NodeName;
use keel_cluster::identity::ClusterId;
use keel_cluster::members::MemberSet;
use keel_machine::kind::Kinds;
use keel_net::{Peers, Traffic};
use keel_store::LeaseId;
use keel_store::Store;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

/// The settings of a node, in its folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) listen: SocketAddr,
    pub(crate) api: Option<SocketAddr>,
    /// Nodes with the store: name and address. With a store outside of the cluster, those that
    /// admit others.
    pub(crate) voters: Vec<(NodeName, String)>,
    /// A store outside of the cluster's nodes.
    #[serde(default)]
    pub(crate) store: Option<ExternalStore>,
    /// This node was given another address, and some of the others may not know it yet.
    #[serde(default)]
    pub(crate) address_is_new: bool,
    /// Labels that it is given when it starts.
    #[serde(default)]
    pub(crate) labels: Labels,
}

/// Why the settings cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error(transparent)]
    File(#[from] std::io::Error),
    #[error("it is damaged: {0}")]
    Damaged(#[from] serde_json::Error),
}

impl Settings {
    /// Writes them to a file, whole or not at all.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn save(&self, path: &Path) -> std::io::Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        write_whole(path, &text)
    }

    /// Reads what [`Settings::save`] wrote.
    ///
    /// # Errors
    /// [`SettingsError`] if the file cannot be read, or is not JSON of this form.
    pub(crate) fn load(path: &Path) -> Result<Self, SettingsError> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }
}

/// This node, and its connections to others.
pub(crate) struct Context {
    pub(crate) name: NodeName,
    pub(crate) cluster: ClusterId,
    pub(crate) dir: StateDir,
    /// The kinds of machines that this node runs.
    pub(crate) kinds: Kinds,
    pub(crate) settings: Settings,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) members: Arc<MemberSet>,
    /// This node's lease in the store, while it has one.
    pub(crate) lease: watch::Receiver<Option<LeaseId>>,
    /// The same, with its deadline, at each renewal.
    pub(crate) lease_term: watch::Receiver<Option<LeaseTerm>>,
    /// Keeps this node alive while its agent is restarted.
    pub(crate) hold: HoldHandle,
    pub(crate) identity: OwnIdentity,
    /// When this agent started, in milliseconds since 1970-01-01 UTC.
    pub(crate) started_unix_ms: u64,
    /// Events of this node, for users.
    pub(crate) events: Events,
    /// What this agent counts, for Prometheus.
    pub(crate) metrics: Metrics,
    /// What this agent tells a collector of traces.
    pub(crate) traces: Traces,
    /// Bytes sent to and received from other nodes.
    pub(crate) traffic: Traffic,
}

impl Context {
    /// The address at which workers of this node listen for those of others.
    pub(crate) fn worker_address(&self) -> String {
        self.settings.listen.ip().to_string()
    }
}
