//! The network of one machine: its listeners, and connections whose bytes are plain data.
//!
//! A connection is two numbered streams of bytes. What was received and not yet read, and what was
//! sent and not yet acknowledged, belongs to the machine's state, so connections move with it.
//! Something outside, the *carrier*, has the clients' sockets: it offers connections, delivers
//! bytes, takes what the guest sends, and acknowledges it once it cannot be lost with the machine.
//! Offsets make repetition harmless, as sequence numbers do in TCP (RFC 9293, section 3.4).
//!
//! `connection.rs` is one connection, `readiness.rs` what guests wait on. What guests call is in
//! `socket.rs`.

mod connection;
mod readiness;

pub use connection::{Connection, ConnectionId, NotDelivered, Progress, StreamRecord};

use crate::error::Error;
use crate::lock::locked;
use connection::Shared;
use readiness::Readiness;
use rustix::fd::BorrowedFd;
use rustix::io::Errno as HostErrno;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

/// Connections that wait to be accepted, for each listener; Linux has 4096 (`somaxconn`).
pub const BACKLOG_MAX: usize = 1024;

/// Connections of a machine, with those that its guest closed and that still have bytes to send.
pub const CONNECTIONS_MAX: usize = 1 << 16;

/// Called with a connection when its guest accepted, read, sent, shut down or closed. It must not block.
pub type Changed = Arc<dyn Fn(ConnectionId) + Send + Sync>;

/// The network of one machine.
#[derive(Debug)]
pub struct Network {
    listeners: Vec<Arc<Backlog>>,
    connections: Mutex<BTreeMap<ConnectionId, Arc<Connection>>>,
    shared: Arc<Shared>,
}

/// Connections that a guest has not accepted yet.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    waiting: Mutex<VecDeque<Arc<Connection>>>,
    readiness: Readiness,
}

/// Where a recorded connection belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Holder {
    /// It waits to be accepted.
    Listener,
    /// The guest has it as this descriptor.
    Descriptor(u32),
    /// The guest closed it; its last bytes are not acknowledged yet.
    Closed,
}

/// The connections of a machine, as plain data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// In the order in which those of each listener are to be accepted.
    pub connections: Vec<(Holder, StreamRecord)>,
}

/// Why a connection was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotOffered {
    /// There is no such listener.
    #[error("the machine has no listener {0}")]
    NoListener(u32),
    /// Too many wait to be accepted, or exist.
    #[error("the machine has {0} connections that it has not accepted or closed")]
    Full(usize),
    /// The carrier gave two connections the same number.
    #[error("connection {0} exists already")]
    Exists(ConnectionId),
}

impl Backlog {
    /// The next connection, if one waits.
    pub(crate) fn accept(&self) -> Option<Arc<Connection>> {
        let mut waiting = locked(&self.waiting);
        let next = waiting.pop_front()?;
        self.readiness.set(!waiting.is_empty());
        drop(waiting);
        next.tell_carrier();
        Some(next)
    }

    /// A descriptor that is readable while a connection waits.
    ///
    /// # Errors
    /// The host's, where it has no descriptor left.
    pub(crate) fn ready_fd(&self) -> Result<BorrowedFd<'_>, HostErrno> {
        let waiting = locked(&self.waiting);
        self.readiness.fd(!waiting.is_empty())
    }

    pub(crate) fn is_ready(&self) -> bool {
        !locked(&self.waiting).is_empty()
    }
}

impl Network {
    pub(crate) fn new(listeners: u32) -> Self {
        Self {
            listeners: (0..listeners).map(|_| Arc::default()).collect(),
            connections: Mutex::default(),
            shared: Arc::default(),
        }
    }

    /// How many listeners the machine has, as its configuration said.
    pub fn listeners(&self) -> u32 {
        self.listeners.len() as u32
    }

    pub(crate) fn listener(&self, index: u32) -> Option<Arc<Backlog>> {
        self.listeners.get(index as usize).cloned()
    }

    /// Sets what is called when a guest changes a connection. Only the first call has an effect.
    pub fn set_changed(&self, changed: Changed) {
        self.shared.set_changed(changed);
    }

    /// A client's new connection, which waits to be accepted.
    ///
    /// # Errors
    /// [`NotOffered`]: it is to be refused, or offered later.
    pub fn offer(
        &self,
        id: ConnectionId,
        listener: u32,
        local: SocketAddr,
        peer: SocketAddr,
    ) -> Result<Arc<Connection>, NotOffered> {
        let backlog = self.listeners.get(listener as usize);
        let backlog = backlog.ok_or(NotOffered::NoListener(listener))?;
        let mut connections = locked(&self.connections);
        let mut waiting = locked(&backlog.waiting);
        if waiting.len() >= BACKLOG_MAX || connections.len() >= CONNECTIONS_MAX {
            return Err(NotOffered::Full(connections.len()));
        }
        if connections.contains_key(&id) {
            return Err(NotOffered::Exists(id));
        }
        let record = StreamRecord::new(id, listener, local, peer);
        let connection = Arc::new(Connection::new(record, self.shared.clone()));
        connections.insert(id, connection.clone());
        waiting.push_back(connection.clone());
        backlog.readiness.set(true);
        Ok(connection)
    }

    /// A connection that nobody carries any more, for a descriptor that had one.
    pub(crate) fn lost(
        &self,
        local: Option<SocketAddr>,
        peer: Option<SocketAddr>,
    ) -> Arc<Connection> {
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let id = ConnectionId {
            carrier: 0,
            number: 0,
        };
        let record = StreamRecord::new(id, 0, local.unwrap_or(unknown), peer.unwrap_or(unknown));
        let connection = Connection::new(record, self.shared.clone());
        connection.reset();
        Arc::new(connection)
    }

    pub fn connection(&self, id: ConnectionId) -> Option<Arc<Connection>> {
        locked(&self.connections).get(&id).cloned()
    }

    /// Whether somebody carries it: it is not one that was lost.
    pub(crate) fn has(&self, connection: &Arc<Connection>) -> bool {
        let carried = self.connection(connection.id());
        carried.is_some_and(|carried| Arc::ptr_eq(&carried, connection))
    }

    /// All connections that the carrier has not removed.
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        locked(&self.connections).values().cloned().collect()
    }

    /// Forgets a connection with which the carrier is done. If the guest has not closed it, it is
    /// reset: nobody is left who could carry its bytes.
    pub fn remove(&self, id: ConnectionId) {
        let removed = locked(&self.connections).remove(&id);
        let Some(connection) = removed else { return };
        if let Some(backlog) = self.listeners.get(connection.listener() as usize) {
            let mut waiting = locked(&backlog.waiting);
            waiting.retain(|waits| waits.id() != id);
            backlog.readiness.set(!waiting.is_empty());
        }
        connection.reset();
    }

    /// What travels with the machine. `descriptors`: the connections that the guest has open.
    pub(crate) fn record(&self, descriptors: &BTreeMap<ConnectionId, u32>) -> NetworkRecord {
        let connections = locked(&self.connections);
        let mut recorded = Vec::with_capacity(connections.len());
        let mut waiting = BTreeSet::new();
        for backlog in &self.listeners {
            for connection in locked(&backlog.waiting).iter() {
                waiting.insert(connection.id());
                recorded.push((Holder::Listener, connection.record()));
            }
        }
        let others = connections
            .values()
            .filter(|it| !waiting.contains(&it.id()));
        recorded.extend(others.map(|connection| {
            let holder = match descriptors.get(&connection.id()) {
                Some(&fd) => Holder::Descriptor(fd),
                None => Holder::Closed,
            };
            (holder, connection.record())
        }));
        NetworkRecord {
            connections: recorded,
        }
    }

    /// The network of a machine that was recorded, and the connections of its descriptors.
    ///
    /// # Errors
    /// If the record is damaged.
    pub(crate) fn restore(
        listeners: u32,
        record: NetworkRecord,
    ) -> Result<(Self, BTreeMap<u32, Arc<Connection>>), Error> {
        let network = Self::new(listeners);
        let mut open = BTreeMap::new();
        let damaged =
            |id: ConnectionId, what: &str| Error::Damaged(format!("connection {id} {what}"));
        if record.connections.len() > CONNECTIONS_MAX {
            return Err(Error::TooMany {
                what: "connections",
                size: record.connections.len(),
                max: CONNECTIONS_MAX,
            });
        }
        let mut connections = locked(&network.connections);
        for (holder, stream) in record.connections {
            let id = stream.id;
            stream.check().map_err(|what| damaged(id, what))?;
            let listener = network.listeners.get(stream.listener as usize);
            let listener = listener.ok_or_else(|| damaged(id, "has no listener"))?;
            let connection = Arc::new(Connection::new(stream, network.shared.clone()));
            match holder {
                Holder::Listener => {
                    let mut waiting = locked(&listener.waiting);
                    if waiting.len() >= BACKLOG_MAX {
                        return Err(damaged(id, "is one too many to be accepted"));
                    }
                    waiting.push_back(connection.clone());
                }
                Holder::Descriptor(fd) => {
                    if open.insert(fd, connection.clone()).is_some() {
                        return Err(damaged(id, "shares a descriptor"));
                    }
                }
                Holder::Closed => connection.close(),
            }
            if connections.insert(id, connection).is_some() {
                return Err(damaged(id, "appears twice"));
            }
        }
        drop(connections);
        Ok((network, open))
    }
}
