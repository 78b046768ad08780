//! A pool with one connection per node, created on first use and again after a loss.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::{Client, Options, RpcError, StreamReceiver};
use crate::name::NodeName;
use crate::tls::ClientTls;

/// Connections by node name. [`Peers::set_address`] sets addresses.
pub struct Peers {
    tls: Mutex<ClientTls>,
    options: Options,
    peers: Mutex<HashMap<NodeName, Arc<Peer>>>,
}

struct Peer {
    address: String,
    /// Held while connecting, so that callers share one attempt.
    link: tokio::sync::Mutex<Link>,
}

enum Link {
    None,
    Up(Client),
    Failed { at: Instant, reason: String },
}

impl Peers {
    pub fn new(tls: ClientTls, options: Options) -> Self {
        Self {
            tls: Mutex::new(tls),
            options,
            peers: Mutex::default(),
        }
    }

    /// Sets the address of `node` (`host:port`). A new address drops the old connection; its
    /// requests in flight end.
    pub fn set_address(&self, node: &NodeName, address: &str) {
        let mut peers = self.lock();
        if peers.get(node).is_some_and(|peer| peer.address == address) {
            return;
        }
        let peer = Peer {
            address: address.into(),
            link: tokio::sync::Mutex::new(Link::None),
        };
        peers.insert(node.clone(), Arc::new(peer));
    }

    /// The address of `node`, if known.
    pub fn address(&self, node: &NodeName) -> Option<String> {
        Some(self.lock().get(node)?.address.clone())
    }

    /// Removes `node` and its connection.
    pub fn remove(&self, node: &NodeName) {
        self.lock().remove(node);
    }

    /// Uses `tls` for connections made from now on, also to nodes that are connected already: what
    /// those are asked meanwhile is answered on the old connection, which ends with its last answer.
    pub fn set_tls(&self, tls: ClientTls) {
        *self.tls.lock().unwrap_or_else(PoisonError::into_inner) = tls;
        for peer in self.lock().values_mut() {
            *peer = Arc::new(Peer {
                address: peer.address.clone(),
                link: tokio::sync::Mutex::new(Link::None),
            });
        }
    }

    /// The connection to `node`, created if missing.
    ///
    /// # Errors
    /// [`RpcError::NotSent`] when its address is not known or it cannot be
    /// reached; for [`Options::retry_after`] the same error without a new
    /// attempt.
    pub async fn client(&self, node: &NodeName) -> Result<Client, RpcError> {
        let Some(peer) = self.lock().get(node).cloned() else {
            return Err(RpcError::NotSent {
                peer: format!("node {node}"),
                reason: "its address is not known; is it in `keel nodes`?".into(),
            });
        };
        let not_sent = |reason: String| RpcError::NotSent {
            peer: format!("node {node} at {}", peer.address),
            reason,
        };
        let mut link = peer.link.lock().await;
        match &*link {
            Link::Up(client) if !client.is_lost() => return Ok(client.clone()),
            Link::Failed { at, reason } if at.elapsed() < self.options.retry_after => {
                return Err(not_sent(reason.clone()));
            }
            Link::Up(_) | Link::Failed { .. } | Link::None => {}
        }
        let tls = self
            .tls
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match Client::connect(&peer.address, &tls, node, self.options.clone()).await {
            Ok(client) => {
                *link = Link::Up(client.clone());
                Ok(client)
            }
            Err(error) => {
                let reason = error.to_string();
                *link = Link::Failed {
                    at: Instant::now(),
                    reason: reason.clone(),
                };
                Err(not_sent(reason))
            }
        }
    }

    /// Sends a request to `node`, connecting if needed; `timeout` covers both.
    ///
    /// # Errors
    /// As [`Client::call`] and [`Peers::client`].
    pub async fn call(
        &self,
        node: &NodeName,
        kind: u16,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, RpcError> {
        let started = Instant::now();
        let client = match tokio::time::timeout(timeout, self.client(node)).await {
            Ok(client) => client?,
            Err(_) => {
                return Err(RpcError::NotSent {
                    peer: format!("node {node}"),
                    reason: format!("no connection within {} ms", timeout.as_millis()),
                });
            }
        };
        let rest = timeout.saturating_sub(started.elapsed());
        client.call(kind, payload, rest).await
    }

    /// Opens a stream from `node`, connecting if needed.
    ///
    /// # Errors
    /// As [`Client::stream`] and [`Peers::client`].
    pub async fn stream(
        &self,
        node: &NodeName,
        kind: u16,
        payload: Bytes,
    ) -> Result<StreamReceiver, RpcError> {
        self.client(node).await?.stream(kind, payload).await
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeName, Arc<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peers = self.lock();
        f.debug_map()
            .entries(peers.iter().map(|(node, peer)| (node, &peer.address)))
            .finish()
    }
}
