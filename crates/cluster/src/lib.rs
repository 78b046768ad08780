//! Identity and membership of the nodes of a cluster.
//!
//! - [`authority_keys`]: the keys of the authority, on nodes that admit others.
//! - [`certificates`]: renewal of certificates, and replacement of the authority.
//! - [`epoch`]: the version of a machine's ownership.
//! - [`gossip`]: who answers, and what load each node has.
//! - [`failover`]: where checkpoints are copied to, and where machines are restarted.
//! - [`identity`]: the cluster's certificate authority and the nodes'
//!   certificates.
//! - [`tokens`]: join tokens and users' tokens.
//! - [`members`]: current membership.
//! - [`join`]: how a node becomes a member.
//! - [`service`]: the requests that a voter answers over `keel-net`.
//! - [`state_file`]: atomically written files.
//!
//! Invariants: wall clocks only affect the expiry of tokens and certificates. An unknown outcome is never reported
//! as a failure. A private key never leaves the node on which it was created, except the CA's,
//! between voters.
#![forbid(unsafe_code)]

pub mod authority_keys;
pub mod certificates;
#[doc(hidden)]
pub mod decoders;
pub mod epoch;
pub mod failover;
pub mod gossip;
pub mod identity;
pub mod join;
pub mod members;
pub mod service;
pub mod state_file;
pub mod tokens;
pub mod voters;

pub use epoch::Epoch;
pub use keel_net::{MachineName, NodeName};
