//! Requests, answers and pushed streams, multiplexed over one connection.
//!
//! ```text
//! client                                   server
//!   │ ──────────── TLS handshake ────────────▶ │
//!   │ ◀─ HELLO {accepted, text} ────────────── │   "welcome" or why not
//!   │ ── application kind, request n ────────▶ │
//!   │ ◀─ ANSWER n  |  ERROR n {code, text} ─── │
//!   │ ── application kind, request m ────────▶ │
//!   │ ◀─ BEGIN m ───────────────────────────── │   a watch
//!   │ ── CREDIT m {items} ───────────────────▶ │   the client paces it
//!   │ ◀─ ITEM m, ITEM m, … END m ───────────── │
//!   │ ── CANCEL m ───────────────────────────▶ │   and may end it
//!   │ ── PING ───────────────────────────────▶ │   when keepalive is due
//!   │ ◀─ PONG ──────────────────────────────── │
//! ```
//!
//! Application kinds are `1..0xff00`; the connection's own are above. The
//! version is that of [`crate::frame::Class::CONTROL`].
//!
//! Bounds: requests and streams in flight per connection, queued frames, items
//! per stream without credit, payload length, connections, anonymous
//! connections. A request beyond the server's bound is refused, not executed.
//!
//! [`RpcError`] distinguishes errors by what is known about execution. A request in this side's
//! queue can be withdrawn; once its bytes are handed to the stream its outcome is unknown until the
//! answer arrives.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::frame::Class;
use crate::tls::TlsError;
use crate::traffic::Traffic;

mod client;
mod connection;
mod peers;
mod round_trip;
mod server;
mod wire;

/// Whether the payload of one of the connection's own frames can be read, for fuzzing.
#[doc(hidden)]
pub fn is_own_payload(payload: &[u8]) -> bool {
    wire::is_own(payload)
}

pub use crate::tls::PeerId;
pub use client::{Client, StreamReceiver};
pub use peers::Peers;
pub use server::{MemberCheck, Server, ServerHandle, ServerTlsSetter, everyone_is_member};

/// First of the kinds that belong to the connection itself; requests use
/// `1..KIND_RESERVED`.
pub const KIND_RESERVED: u16 = 0xff00;

/// Most items of one stream that may be ahead of its consumer.
const STREAM_CREDIT_MAX: u32 = 1 << 16;

/// A request that brought no answer, by what is known of its execution.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RpcError {
    /// The request did not leave this side: certainly not executed.
    #[error("not sent to {peer}: {reason}")]
    NotSent {
        /// Name and address of the peer.
        peer: String,
        reason: String,
    },
    /// The peer got the request and refused it before doing anything:
    /// certainly not executed.
    #[error("refused by {peer}: {reason}")]
    Refused {
        /// Name and address of the peer.
        peer: String,
        reason: String,
    },
    /// The peer executed the request and reports that it failed.
    #[error("failed at {peer}: {reason}")]
    Failed {
        /// Name and address of the peer.
        peer: String,
        reason: String,
    },
    /// The request was sent and no answer came: it may or may not have been
    /// executed. Never to be treated as a failure.
    #[error("outcome unknown at {peer}: {reason}")]
    Unknown {
        /// Name and address of the peer.
        peer: String,
        reason: String,
    },
}

impl RpcError {
    /// A handler's answer: not executed, because of `reason`.
    pub fn refused(reason: impl fmt::Display) -> Self {
        RpcError::Refused {
            peer: String::new(),
            reason: reason.to_string(),
        }
    }

    /// A handler's answer: executed, and it failed because of `reason`.
    pub fn failed(reason: impl fmt::Display) -> Self {
        RpcError::Failed {
            peer: String::new(),
            reason: reason.to_string(),
        }
    }

    /// A handler's answer: it cannot tell whether the request took effect.
    pub fn unknown(reason: impl fmt::Display) -> Self {
        RpcError::Unknown {
            peer: String::new(),
            reason: reason.to_string(),
        }
    }

    /// Whether the request was certainly not executed, and may be repeated or sent elsewhere.
    pub fn certainly_not_executed(&self) -> bool {
        match self {
            RpcError::NotSent { .. } | RpcError::Refused { .. } => true,
            RpcError::Failed { .. } | RpcError::Unknown { .. } => false,
        }
    }
}

#[derive(Debug)]
pub enum Reply {
    One(Bytes),
    /// Payloads pushed until the sender is dropped or the client ends it (the
    /// receiver is then dropped).
    Stream(mpsc::Receiver<Bytes>),
}

impl From<Bytes> for Reply {
    fn from(payload: Bytes) -> Self {
        Reply::One(payload)
    }
}

/// Serves the requests of all connections of a [`Server`].
pub trait Handler: Send + Sync + 'static {
    /// Whether `peer` may send requests of `kind`; asked before the payload is
    /// looked at. By default anonymous peers may send nothing.
    fn permits(&self, peer: &PeerId, kind: u16) -> bool {
        let _ = kind;
        *peer != PeerId::Anonymous
    }

    /// Answers one request. Many run at once; a panic is answered as
    /// [`RpcError::Unknown`]. The future is not dropped when the connection is
    /// lost.
    fn call(
        &self,
        peer: PeerId,
        kind: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>>;
}

/// Limits and times of connections, for either side. `payload_bytes_max` must
/// be the same on both; of the others the tighter one acts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Longest payload, in bytes. Default 4 MiB.
    pub payload_bytes_max: u32,
    /// Requests in flight per connection. Default 256.
    pub in_flight_max: usize,
    /// Streams open per connection. Default 256.
    pub streams_max: usize,
    /// Frames queued for writing per connection. Default 64.
    pub queued_frames_max: usize,
    /// Items of one stream that may wait for this side's consumer, 1 to
    /// 65,536; set by the client alone. Default 32.
    pub stream_items_ahead_max: u32,
    /// Connections a server accepts. Default 4096.
    pub connections_max: usize,
    /// Anonymous connections a server accepts; their payloads are limited to
    /// 64 KiB. Default 32.
    pub anonymous_connections_max: usize,
    /// How long an anonymous connection may last. Default 30 s.
    pub anonymous_lifetime: Duration,
    /// How often the client sends a ping. Default 4 s: each wakes both sides, on all connections of an
    /// agent that rests.
    pub keepalive: Duration,
    /// Silence after which either side gives the connection up. Default 10 s.
    pub dead_after: Duration,
    /// Time for connecting, handshake and greeting. Default 5 s.
    pub connect_timeout: Duration,
    /// After a failed attempt, the time in which [`Peers`] answers with the
    /// same error without another attempt. Default 200 ms.
    pub retry_after: Duration,
    /// How long a connection of [`Peers`] for bulk data or urgent requests stays when nobody uses it:
    /// once to twice this time. Default 30 s.
    pub idle_after: Duration,
    /// Where bytes to and from nodes are counted.
    pub traffic: Traffic,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            payload_bytes_max: Class::CONTROL.payload_bytes_max,
            in_flight_max: 256,
            streams_max: 256,
            queued_frames_max: 64,
            stream_items_ahead_max: 32,
            connections_max: 4096,
            anonymous_connections_max: 32,
            anonymous_lifetime: Duration::from_secs(30),
            keepalive: Duration::from_secs(4),
            dead_after: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            retry_after: Duration::from_millis(200),
            idle_after: Duration::from_secs(30),
            traffic: Traffic::default(),
        }
    }
}

impl Options {
    fn stream_items_ahead(&self) -> u32 {
        self.stream_items_ahead_max.clamp(1, STREAM_CREDIT_MAX)
    }

    fn class(&self) -> Class {
        Class::CONTROL.with_payload_max(self.payload_bytes_max)
    }
}

/// Why there is no connection to a peer. Nothing was executed.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The peer is reached and trusted, but does not let this node in.
    #[error("{peer} at {address} does not accept this node: {reason}")]
    NotAccepted {
        peer: String,
        address: String,
        reason: String,
    },
    /// The connection failed before the greeting.
    #[error("{peer} at {address} did not greet: {reason}")]
    NoGreeting {
        peer: String,
        address: String,
        reason: String,
    },
}

/// Encoding of an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Code {
    Refused,
    Failed,
    Unknown,
}
