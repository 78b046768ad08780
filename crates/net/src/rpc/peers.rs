//! A pool with up to three connections per node, created on first use and again after a loss: one for
//! control; one for bulk data, so that a request never waits behind what is copied; and one for urgent
//! requests, whose callers have runtimes of their own: what the log of the store and the lease of a
//! node need. All but the one for control are closed when they were not used for some time.
//!
//! A connection lives on the runtime of the task that asked for it first, and is lost when that ends.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::client::WeakClient;
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
    control: Way,
    urgent: Way,
    bulk: Way,
}

/// What a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Control,
    Urgent,
    Bulk,
}

/// Held while connecting, so that callers share one attempt.
type Way = Arc<tokio::sync::Mutex<Link>>;

/// Time for an urgent connection to be made. What is lost on the way is sent again sooner by the next
/// attempt than by TCP.
const URGENT_CONNECT_PATIENCE: Duration = Duration::from_millis(1500);

impl Peer {
    fn new(address: &str) -> Arc<Self> {
        Arc::new(Peer {
            address: address.into(),
            control: Way::default(),
            urgent: Way::default(),
            bulk: Way::default(),
        })
    }

    fn way(&self, sort: Sort) -> &Way {
        match sort {
            Sort::Control => &self.control,
            Sort::Urgent => &self.urgent,
            Sort::Bulk => &self.bulk,
        }
    }

    /// Closes a connection once nobody has used it for a time. Ends with that, or once it is
    /// lost; a peer that was replaced or removed goes with its connections.
    async fn close_when_idle(peer: Weak<Self>, sort: Sort, watched: WeakClient, after: Duration) {
        // Of the last look at which nobody but the pool held it.
        let mut requests = None;
        loop {
            tokio::time::sleep(after).await;
            let Some(peer) = peer.upgrade() else { return };
            let mut link = peer.way(sort).lock().await;
            let now = match &*link {
                Link::Up(client) if client.is_same(&watched) && !client.is_lost() => {
                    (client.handles() == 1).then(|| client.requests())
                }
                Link::Up(_) | Link::Failed { .. } | Link::None => return,
            };
            if now.is_some() && now == requests {
                *link = Link::None;
                return;
            }
            requests = now;
        }
    }
}

#[derive(Default)]
enum Link {
    #[default]
    None,
    Up(Client),
    Failed {
        at: Instant,
        reason: String,
    },
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
        peers.insert(node.clone(), Peer::new(address));
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
            *peer = Peer::new(&peer.address);
        }
    }

    /// `node` has sent something: it is there, so what could not be reached a moment ago is tried
    /// again at once.
    pub fn heard_from(&self, node: &NodeName) {
        let Some(peer) = self.lock().get(node).cloned() else {
            return;
        };
        for sort in [Sort::Control, Sort::Urgent, Sort::Bulk] {
            // (It is held while connecting.)
            if let Ok(mut link) = peer.way(sort).try_lock()
                && matches!(*link, Link::Failed { .. })
            {
                *link = Link::None;
            }
        }
    }

    /// The connection to `node`, created if missing.
    ///
    /// # Errors
    /// [`RpcError::NotSent`] when its address is not known or it cannot be
    /// reached; for [`Options::retry_after`] the same error without a new
    /// attempt, unless it is [heard from](Self::heard_from).
    pub async fn client(&self, node: &NodeName) -> Result<Client, RpcError> {
        self.client_for(node, Sort::Control).await
    }

    async fn client_for(&self, node: &NodeName, sort: Sort) -> Result<Client, RpcError> {
        let Some(peer) = self.lock().get(node).cloned() else {
            return Err(RpcError::NotSent {
                peer: format!("node {node}"),
                reason: "its address is not known; is it in `keel nodes`?".into(),
            });
        };
        let link = peer.way(sort).clone().lock_owned().await;
        match &*link {
            Link::Up(client) if !client.is_lost() => return Ok(client.clone()),
            Link::Failed { at, reason } if at.elapsed() < self.options.retry_after => {
                return Err(not_sent(node, &peer, reason.clone()));
            }
            Link::Up(_) | Link::Failed { .. } | Link::None => {}
        }
        let options = self.options.clone();
        let tls = self
            .tls
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if sort != Sort::Urgent {
            return connect(peer, node, sort, link, (tls, options)).await;
        }
        // Whoever waits for an urgent connection may give up sooner than one can be made, and so would the
        // next one.
        let node = node.clone();
        let (name, address) = (node.clone(), peer.clone());
        let connecting = async move {
            let connecting = connect(peer, &node, sort, link, (tls, options));
            tokio::time::timeout(URGENT_CONNECT_PATIENCE, connecting).await
        };
        match tokio::spawn(connecting).await {
            Ok(Ok(connected)) => connected,
            Ok(Err(error)) => Err(not_sent(&name, &address, error.to_string())),
            Err(error) => Err(not_sent(&name, &address, error.to_string())),
        }
    }

    /// The round-trip time to `node`, if there is a connection that has measured it.
    pub fn round_trip(&self, node: &NodeName) -> Option<Duration> {
        let peer = self.lock().get(node).cloned()?;
        // (It is held while connecting.)
        let link = peer.control.try_lock().ok()?;
        match &*link {
            Link::Up(client) if !client.is_lost() => client.round_trip(),
            Link::Up(_) | Link::Failed { .. } | Link::None => None,
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
        self.call_over(Sort::Control, (node, kind, payload), timeout)
            .await
    }

    /// As [`call`](Self::call), over a connection for urgent requests alone, which needs nothing of the
    /// runtime that carries the others.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub async fn urgent_call(
        &self,
        node: &NodeName,
        kind: u16,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, RpcError> {
        self.call_over(Sort::Urgent, (node, kind, payload), timeout)
            .await
    }

    /// As [`call`](Self::call), for a request or an answer with much data.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub async fn bulk_call(
        &self,
        node: &NodeName,
        kind: u16,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, RpcError> {
        self.call_over(Sort::Bulk, (node, kind, payload), timeout)
            .await
    }

    async fn call_over(
        &self,
        sort: Sort,
        (node, kind, payload): (&NodeName, u16, Bytes),
        timeout: Duration,
    ) -> Result<Bytes, RpcError> {
        let started = Instant::now();
        let client = match tokio::time::timeout(timeout, self.client_for(node, sort)).await {
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

    /// As [`stream`](Self::stream), for one with much data.
    ///
    /// # Errors
    /// As [`stream`](Self::stream).
    pub async fn bulk_stream(
        &self,
        node: &NodeName,
        kind: u16,
        payload: Bytes,
    ) -> Result<StreamReceiver, RpcError> {
        let client = self.client_for(node, Sort::Bulk).await?;
        client.stream(kind, payload).await
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeName, Arc<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a connection; `link` is held meanwhile.
async fn connect(
    peer: Arc<Peer>,
    node: &NodeName,
    sort: Sort,
    mut link: OwnedMutexGuard<Link>,
    (tls, options): (ClientTls, Options),
) -> Result<Client, RpcError> {
    let idle = options.idle_after;
    match Client::connect(&peer.address, &tls, node, options).await {
        Ok(client) => {
            *link = Link::Up(client.clone());
            if sort != Sort::Control {
                let (weak, watched) = (Arc::downgrade(&peer), client.downgrade());
                tokio::spawn(Peer::close_when_idle(weak, sort, watched, idle));
            }
            Ok(client)
        }
        Err(error) => {
            let reason = error.to_string();
            *link = Link::Failed {
                at: Instant::now(),
                reason: reason.clone(),
            };
            Err(not_sent(node, &peer, reason))
        }
    }
}

fn not_sent(node: &NodeName, peer: &Peer, reason: String) -> RpcError {
    RpcError::NotSent {
        peer: format!("node {node} at {}", peer.address),
        reason,
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
