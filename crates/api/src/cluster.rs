//! The cluster and its nodes, as they are reported. Loads of nodes are in `balance`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterInfo {
    /// Its id.
    pub cluster: String,
    /// The node that answered.
    pub node: String,
    /// Nodes that hold the store.
    pub voters: Vec<String>,
    /// Whether the store answers.
    pub store: String,
    /// The store's address, if it is outside of the nodes.
    #[serde(default)]
    pub external_store: Option<String>,
    /// Nodes, and how many of them are alive.
    pub nodes: u32,
    /// Nodes that renew their lease.
    pub nodes_alive: u32,
    /// Machines, ended ones included.
    pub machines: u32,
    /// Machines that run.
    pub machines_running: u32,
    /// Version of the node that answered.
    pub version: String,
    /// When that node's agent started, in milliseconds since 1970-01-01 UTC; 0 from a node of an
    /// older version.
    #[serde(default)]
    pub agent_started_unix_ms: u64,
}

/// An agent that ends, to be started again from the file that is installed then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentRestart {
    /// Its node.
    pub node: String,
    /// Version of the agent that ends.
    pub version: String,
    /// Machines of the node that run on.
    pub machines: Vec<String>,
}

/// What the loss of a node would mean for its machines with high availability.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeLoss {
    /// The node.
    pub node: String,
    /// Machines that would be restarted on other nodes.
    pub restarted: u32,
    /// Machines that would wait for it: no other node has their checkpoint, or room for them.
    pub waiting: Vec<String>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its address for other nodes.
    pub address: String,
    /// Whether it renews its lease.
    pub alive: bool,
    /// Whether it is being drained: no machine is placed there.
    #[serde(default)]
    pub draining: bool,
    /// Whether it holds the store.
    pub voter: bool,
    /// Processors.
    pub cpus: u32,
    /// Memory of the host, in bytes.
    pub memory_bytes: u64,
    /// Machines in its schedule.
    pub machines: u32,
    /// Deficiencies of its host, with their consequences.
    pub lacks: Vec<String>,
    /// The kinds of machines that its host executes, each with how; none until it is known.
    #[serde(default)]
    pub kinds: Vec<String>,
    /// Version of its agent.
    pub version: String,
    /// Whether it answers datagrams of gossip, as the asked node knows: `alive`, `suspected` or
    /// `down`; none if it was never heard.
    #[serde(default)]
    pub answers: Option<String>,
    /// Its load, as it told last, as a share of its capacity.
    #[serde(default)]
    pub load: Option<f64>,
    /// How long ago that was heard, in seconds.
    #[serde(default)]
    pub load_age_s: Option<f64>,
}

/// What was given up with a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GivenUp {
    /// Machines that fail because of it.
    pub machines: Vec<String>,
}

/// The store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StoreInfo {
    /// Number of its newest change.
    pub revision: u64,
    /// Its address, if it is outside of the cluster's nodes.
    #[serde(default)]
    pub external: Option<String>,
    /// The nodes that hold it; of a store outside of them, those that admit other nodes.
    pub voters: Vec<VoterInfo>,
    /// Counted up by each election of a leader.
    pub term: u64,
    /// How many voters are wanted: `auto`, `1`, `3` or `5`.
    pub wanted: String,
    /// How many voters may fail while the store answers.
    pub spare: u32,
}

/// A node that holds the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VoterInfo {
    pub node: String,
    /// Number of its copy: another one after it lost a copy; none until a leader wrote it.
    pub number: Option<u64>,
    /// Its address for other nodes.
    pub address: String,
    /// Whether it renews its lease.
    pub alive: bool,
    /// Whether its copy is closed although it is alive, as when its disk is full.
    #[serde(default)]
    pub closed: bool,
    /// Whether it answers for all.
    pub leads: bool,
}

/// How many nodes shall hold the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VotersRequest {
    /// `auto`, `1`, `3` or `5`.
    pub count: String,
}
