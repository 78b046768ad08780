//! The agent of one node: makes what runs here equal to this node's schedule
//! in the store, moves machines, and answers users.
//!
//! - `state_dir`: the folder that a node keeps
//! - `parent`: the tiny process that restarts the agent
//! - `agent`: the agent's parts and its start
//! - `lease`: keeps this node alive in the store
//! - `record`: machines and nodes in the store
//! - `workers`: the processes of this node's machines
//! - `reconcile`: schedule → workers, ends of machines → store
//! - `code`: compiled code: what is ready here, what is compiled next
//! - `offer`: target of a move
//! - `moving`: source of a move: feeds the state machine of `keel-machine`
//! - `service`: what other nodes ask
//! - `balancer`: measures this node, and balances it with others
//! - `rules`: where machines may be, in the store's transactions
//! - `set`: other limits for a machine that runs
//! - `operate`: what users ask, wherever the machine is
//! - `output`: what machines print, followed from node to node
//! - `keep`: checkpoints, and machines made of them
//! - `diff`: what would change of a machine
//! - `files`: files in machines' volumes, for users
//! - `volumes`: the cluster's volumes, and which machine has which
//! - `events`: what happened here, kept and told
//! - `http`: the API

#![forbid(unsafe_code)]

mod agent;
mod apart;
mod balancer;
mod changing;
mod code;
#[cfg(feature = "failpoints")]
mod debug;
mod diff;
mod dry_run;
mod events;
mod executable;
mod files;
mod http;
mod keep;
mod lanes;
mod lease;
mod moving;
mod offer;
mod operate;
mod output;
mod parent;
mod pauses;
mod reconcile;
mod record;
mod regular;
mod rules;
mod service;
mod set;
mod spanning;
mod state_dir;
mod volumes;
mod workers;

pub use agent::{Addresses, AgentError, AgentOptions, addresses, found, join, run};
pub use executable::{installed, own_image, own_image_for_others};
pub use parent::{PARENT_ENVIRONMENT, ParentError, Restart, supervise};
pub use state_dir::StateDir;
