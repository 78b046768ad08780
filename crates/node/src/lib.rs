//! The agent of one node: makes the running machines equal to this node's schedule in the store,
//! moves machines, balances them, and serves users.
//!
//! In layers; a file imports its own folder and the layers below, never a neighbour's
//! inside (`cargo xtask lint` checks it):
//!
//! - `agent`: creates a node, and builds its agent from the layers
//! - `front`: HTTP and rpc: requests to handles
//! - `machines`: the life of this node's machines
//! - `failover`: restarts the machines of nodes that fail, for the whole cluster
//! - `balancer`: measures this node, and balances it with others
//! - `moves`: moves of whole machines, as source and as target
//! - `spanning`: machines with parts on several nodes
//! - `checkpoints`, `volumes`, `logs`, `rules`, `compilation`: checkpoints, volumes, output, placement
//!   rules and compiled code of machines
//! - `images`: program images: modules by hash
//! - `processes`: the worker processes of this node
//! - `records`: typed views of the store
//! - `cluster_info`, `cluster_events`: the cluster and its events in the form that users see
//! - `certificates`: keeps this node's certificate, and whom it trusts
//! - `voters`: this node's copy of the store, and who else has one
//! - `context`: shared by all layers
//! - `external_store`, `lease`, `role`: a store outside of the nodes, this node's lease, and what one
//!   node does for all
//! - `error`, `events`, `host`, `identity`, `metrics`, `state_dir`, `supervisor`, `traces`: the
//!   lowest layer

#![forbid(unsafe_code)]

mod agent;
mod balancer;
mod certificates;
mod checkpoints;
mod cluster_events;
mod cluster_info;
mod compilation;
mod context;
mod error;
mod events;
mod external_store;
mod failover;
mod front;
mod gossip;
mod host;
mod identity;
mod images;
mod lease;
mod logs;
mod machines;
mod metrics;
mod moves;
mod node_record;
mod processes;
mod proof_file;
mod records;
mod role;
mod rules;
mod spanning;
mod state_dir;
mod supervisor;
mod traces;
mod volumes;
mod voters;

pub use agent::{
    Addresses, AgentError, AgentOptions, NodeChange, addresses, change_node, found, join, run,
};
pub use external_store::ExternalStore;
pub use processes::{installed, own_image, own_image_for_others};
pub use state_dir::StateDir;
pub use supervisor::{AgentEnd, PARENT_ENVIRONMENT, ParentError, REFUSED_CODE, Restart, supervise};
pub use voters::{RebuildError, Rebuilt, VoterError, follow_store, migrate, recover, restore};

/// Decoders of what other nodes send, and of the records in the store, for fuzzing.
#[doc(hidden)]
pub fn decoders() -> Vec<keel_store::decoders::Decoder> {
    front::decoders()
}
