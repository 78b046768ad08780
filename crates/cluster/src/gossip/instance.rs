//! One run of a node's agent, which other nodes tell from earlier ones.

use foca::Identity;
use keel_net::NodeName;
use serde::{Deserialize, Serialize};

/// When an agent began, in an order that never falls: the store's revision at a write of its own,
/// and before that the incarnation of the cluster, as a store that was put back counts revisions
/// again.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Start {
    /// The cluster's, raised whenever its store is put back.
    pub incarnation: u32,
    /// The store's at a write that this run of the agent made.
    pub revision: u64,
}

/// A node's name in a form that is compared quickly, as that is done for each member and each
/// update: the first half of its BLAKE3 hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeKey(u128);

impl NodeKey {
    /// Of this node.
    pub fn of(node: &NodeName) -> Self {
        let hash = blake3::hash(node.as_str().as_bytes());
        let (half, _) = hash.as_bytes().split_at(16);
        NodeKey(
            half.iter()
                .fold(0, |key, byte| key << 8 | u128::from(*byte)),
        )
    }
}

/// One run of a node's agent, until it was declared down: then it goes on as the next one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Sent", into = "Sent")]
pub struct Instance {
    key: NodeKey,
    start: Start,
    /// How often it was declared down since, and went on.
    renewals: u32,
    node: NodeName,
}

/// An instance on its way.
#[derive(Serialize, Deserialize)]
struct Sent {
    node: NodeName,
    start: Start,
    renewals: u32,
}

impl From<Sent> for Instance {
    fn from(sent: Sent) -> Self {
        Instance {
            key: NodeKey::of(&sent.node),
            start: sent.start,
            renewals: sent.renewals,
            node: sent.node,
        }
    }
}

impl From<Instance> for Sent {
    fn from(instance: Instance) -> Self {
        Sent {
            node: instance.node,
            start: instance.start,
            renewals: instance.renewals,
        }
    }
}

impl Instance {
    /// The agent of `node` that began at `start`; the default where that is not known.
    pub fn new(node: NodeName, start: Start) -> Self {
        Instance {
            key: NodeKey::of(&node),
            start,
            renewals: 0,
            node,
        }
    }

    /// The node whose agent it is.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// How often it was declared down since, and went on.
    pub fn renewals(&self) -> u32 {
        self.renewals
    }

    /// When its agent began.
    pub fn start(&self) -> Start {
        self.start
    }
}

impl Identity for Instance {
    type Addr = NodeKey;

    fn renew(&self) -> Option<Self> {
        Some(Instance {
            renewals: self.renewals.checked_add(1)?,
            ..self.clone()
        })
    }

    fn addr(&self) -> NodeKey {
        self.key
    }

    fn win_addr_conflict(&self, other: &Self) -> bool {
        (self.start, self.renewals) > (other.start, other.renewals)
    }
}
