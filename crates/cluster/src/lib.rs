//! What makes nodes one cluster: who they are, and what they agree on.
//!
//! - [`epoch`]: the number that an owner changes by.
//! - [`keys`]: every name under which something is kept in the store.
//! - [`store`]: the linearizable store: the trait, its embedded engine, and
//!   the same trait over the network.
//! - [`identity`]: the cluster's certificate authority and the nodes'
//!   certificates.
//! - [`tokens`]: join tokens and users' tokens.
//! - [`members`]: who is a member now.
//! - [`join`]: how a node becomes a member.
//! - [`service`]: the requests that a voter answers over `keel-net`.
//! - [`wire`]: the versioned envelope of every payload and record.
//! - [`clock`]: the clock that leases are measured by.
//! - [`state_file`]: files written whole or not at all.
//!
//! Invariants: wall clocks decide nothing but the expiry of tokens. An outcome
//! that is not known is never reported as a failure. A private key never
//! leaves the node it was made on, except the CA's, between voters.
#![forbid(unsafe_code)]

pub mod clock;
pub mod epoch;
pub mod identity;
pub mod join;
pub mod keys;
pub mod members;
pub mod service;
pub mod state_file;
pub mod store;
pub mod tokens;
pub mod wire;

pub use epoch::Epoch;
pub use keel_net::{MachineName, NodeName};
pub use store::{RedbStore, RemoteStore, Store, StoreError};
