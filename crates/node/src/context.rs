//! The context that every layer gets: identity, store, other nodes, events and folders. It has no
//! behaviour of its own; layers keep their own state.

use crate::events::Events;
use crate::state_dir::StateDir;
use keel_cluster::NodeName;
use keel_cluster::identity::{ClusterId, NodeIdentity};
use keel_cluster::members::MemberSet;
use keel_machine::kind::Kinds;
use keel_net::{Peers, Traffic};
use keel_store::LeaseId;
use keel_store::Store;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::watch;

/// The settings of a node, in its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) listen: SocketAddr,
    pub(crate) api: Option<SocketAddr>,
    /// Nodes with the store: name and address.
    pub(crate) voters: Vec<(NodeName, String)>,
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
    pub(crate) identity: NodeIdentity,
    /// Events of this node, for users.
    pub(crate) events: Events,
    /// Bytes sent to and received from other nodes.
    pub(crate) traffic: Traffic,
}

impl Context {
    /// The address at which workers of this node listen for those of others.
    pub(crate) fn worker_address(&self) -> String {
        self.settings.listen.ip().to_string()
    }
}
