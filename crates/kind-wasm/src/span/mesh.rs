//! Connects all parts with each other: each part listens on one port per other part,
//! publishes the addresses and its certificate, and then dials every other part and is
//! dialled by it.

use super::peer::{Hello, PeerConnections, PeerError};
use keel_cluster::{Epoch, MachineName};
use keel_net::{ClientTls, Fingerprint, PinnedIdentity, ServerTls, TlsError};
use keel_wasm::coherence::{PartId, PartSet};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Why parts are not connected.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    #[error("no certificate for a part: {0}")]
    Tls(#[from] TlsError),
    #[error("a part cannot listen on {address}: {source}")]
    Listen {
        address: String,
        source: std::io::Error,
    },
    #[error("cannot connect to part {part} at {address}: {source}")]
    Dial {
        part: PartId,
        address: String,
        source: std::io::Error,
    },
    /// The other part did not dial in time.
    #[error("part {part} did not connect within {patience:?}")]
    Timeout { part: PartId, patience: Duration },
    /// No address of this part was given.
    #[error("no address of part {0} is known")]
    Unknown(PartId),
    /// The handshake failed.
    #[error("part {part}: {source}")]
    Peer { part: PartId, source: PeerError },
}

/// Addresses of a part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartAddress {
    /// Fingerprint of its certificate.
    pub fingerprint: Fingerprint,
    /// `address:port` for each other part.
    pub addresses: BTreeMap<PartId, String>,
}

/// A part that listens for the others.
#[derive(Debug)]
pub struct MeshListener {
    me: PartId,
    identity: PinnedIdentity,
    listeners: BTreeMap<PartId, TcpListener>,
}

impl MeshListener {
    /// Listens on an address (without port); returns the published addresses, too.
    ///
    /// # Errors
    /// Connects to all others, which do the same at this time.
    pub fn open(
        me: PartId,
        others: PartSet,
        address: &str,
    ) -> Result<(Self, PartAddress), MeshError> {
        let identity = PinnedIdentity::generate()?;
        let fail = |source| MeshError::Listen {
            address: address.to_owned(),
            source,
        };
        let (mut listeners, mut addresses) = (BTreeMap::new(), BTreeMap::new());
        for other in others.iter() {
            let listener = TcpListener::bind((address, 0)).map_err(fail)?;
            listener.set_nonblocking(true).map_err(fail)?;
            let bound = listener.local_addr().map_err(fail)?;
            addresses.insert(other, bound.to_string());
            listeners.insert(other, listener);
        }
        let place = PartAddress {
            fingerprint: identity.fingerprint,
            addresses,
        };
        let meeting = MeshListener {
            me,
            identity,
            listeners,
        };
        Ok((meeting, place))
    }

    /// [`MeshError`] of the first connection that failed.
    ///
    /// # Errors
    /// In parallel, because each waits for the other.
    pub fn meet(
        self,
        machine: &MachineName,
        epoch: Epoch,
        places: &BTreeMap<PartId, PartAddress>,
        patience: Duration,
    ) -> Result<BTreeMap<PartId, PeerConnections>, MeshError> {
        let MeshListener {
            me,
            identity,
            listeners,
        } = self;
        std::thread::scope(|scope| {
            let identity = &identity;
            let meeting: Vec<_> = listeners
                .into_iter()
                .map(|(other, listener)| {
                    scope.spawn(move || {
                        let place = places.get(&other).ok_or(MeshError::Unknown(other))?;
                        let address = place.addresses.get(&me).ok_or(MeshError::Unknown(other))?;
                        let out = dial(other, address, patience)?;
                        let heard = accept(other, &listener, patience)?;
                        let client = ClientTls::pinned(identity, place.fingerprint)?;
                        let server = ServerTls::pinned(identity, place.fingerprint)?;
                        let hello = Hello::new(machine.clone(), epoch, me, other);
                        let ends = PeerConnections::greet((out, &client), (heard, &server), &hello)
                            .map_err(|source| MeshError::Peer {
                                part: other,
                                source,
                            })?;
                        Ok((other, ends))
                    })
                })
                .collect();
            meeting
                .into_iter()
                .map(|met| {
                    met.join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        })
    }
}

fn dial(part: PartId, address: &str, patience: Duration) -> Result<TcpStream, MeshError> {
    let fail = |source| MeshError::Dial {
        part,
        address: address.to_owned(),
        source,
    };
    let mut found = address.to_socket_addrs().map_err(fail)?;
    let socket = found
        .next()
        .ok_or_else(|| fail(std::io::ErrorKind::NotFound.into()))?;
    TcpStream::connect_timeout(&socket, patience).map_err(fail)
}

fn accept(
    part: PartId,
    listener: &TcpListener,
    patience: Duration,
) -> Result<TcpStream, MeshError> {
    let timeout = Timespec {
        tv_sec: patience.as_secs() as i64,
        tv_nsec: patience.subsec_nanos().into(),
    };
    let mut ready = [PollFd::new(listener, PollFlags::IN)];
    let came = matches!(poll(&mut ready, Some(&timeout)), Ok(1..));
    let stream = came.then(|| listener.accept().ok()).flatten();
    let (stream, _) = stream.ok_or(MeshError::Timeout { part, patience })?;
    // Some systems pass on the listener's mode.
    stream
        .set_nonblocking(false)
        .map_err(|error| MeshError::Peer {
            part,
            source: error.into(),
        })?;
    Ok(stream)
}
