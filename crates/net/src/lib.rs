//! Framed, mutually authenticated TLS 1.3 connections between nodes.
//!
//! - [`name`]: validated node and machine names, and the DNS name a node's
//!   certificate carries.
//! - [`frame`]: the envelope of every message and its pure decoder.
//! - [`tls`]: server and client configurations, authenticated by the cluster
//!   CA, by a pinned fingerprint, or (to join) by the hash of the CA.
//! - [`pace`]: keeps bulk data from filling the links between sites.
//! - [`rpc`]: multiplexed requests, answers and pushed streams on one
//!   connection; a pool of connections by node name.
//! - [`traffic`]: bytes to and from each node.
//! - [`coarse_timer`]: timers of all parts of an agent that end together.
//!
//! Invariant: a request whose outcome is not known is never reported as
//! failed. [`rpc::RpcError::NotSent`] and [`rpc::RpcError::Refused`] mean
//! "certainly not executed"; [`rpc::RpcError::Unknown`] means "may have been".
#![deny(unsafe_code)]

pub mod bulk;
pub mod coarse_timer;
pub mod delay;
pub mod frame;
pub mod name;
pub mod pace;
pub mod rpc;
pub mod tls;
pub mod traffic;

pub use bulk::{BulkError, BulkStream};
pub use bytes::Bytes;
pub use futures::future::BoxFuture;
pub use name::{MachineName, NameError, NodeName};
pub use rpc::{Client, Handler, Options, Peers, Reply, RpcError, Server, ServerTlsSetter};
pub use tls::{ClientTls, Fingerprint, PeerId, PinnedIdentity, ServerTls, TlsError};
pub use traffic::Traffic;
