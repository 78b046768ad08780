//! The server side: accepts connections, checks membership, runs handlers.
//!
//! Membership is checked at accept, at each request and before each pushed item, so that a removed
//! node is refused immediately on existing connections.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::connection::Outgoing;
use super::{Handler, KIND_RESERVED, Options, PeerId, Reply, RpcError, STREAM_CREDIT_MAX, wire};
use crate::frame::{Frame, FrameReader};
use crate::name::NodeName;
use crate::pace::PacedStream;
use crate::tls::ServerTls;

/// Whether a node is currently a member of the cluster. Called often: it must be fast and must not
/// block.
pub type MemberCheck = Arc<dyn Fn(&NodeName) -> bool + Send + Sync>;

/// Longest payload of an anonymous peer, in bytes.
const ANONYMOUS_PAYLOAD_BYTES_MAX: u32 = 64 << 10;

/// A check that lets every holder of a valid certificate in.
pub fn everyone_is_member() -> MemberCheck {
    Arc::new(|_| true)
}

/// Serves requests on a listener.
pub struct Server;

/// A running server. Dropping it stops it, as [`ServerHandle::shutdown`] does,
/// without waiting.
pub struct ServerHandle {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    task: Option<JoinHandle<()>>,
}

/// Replaces the TLS configuration of a running server.
#[derive(Clone)]
pub struct ServerTlsSetter {
    shared: Arc<Shared>,
}

impl ServerTlsSetter {
    /// Uses `tls` for connections accepted from now on.
    pub fn set(&self, tls: ServerTls) {
        let mut current = write(&self.shared.tls);
        *current = (current.0 + 1, tls);
    }

    /// Closes the connections that an earlier configuration accepted.
    pub fn close_older(&self) {
        let current = read(&self.shared.tls).0;
        self.shared.least.send_replace(current);
    }
}

impl fmt::Debug for ServerTlsSetter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTlsSetter")
    }
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

struct Shared {
    /// The configuration, and how many there were before it.
    tls: RwLock<(u64, ServerTls)>,
    /// Connections that an earlier configuration than this one accepted are closed.
    least: watch::Sender<u64>,
    member: MemberCheck,
    handler: Arc<dyn Handler>,
    options: Options,
    connections: Arc<Semaphore>,
    anonymous: Arc<Semaphore>,
}

impl Server {
    /// Accepts connections on `listener` until the handle is dropped or shut
    /// down. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The listener's, when its own address cannot be read.
    pub fn serve(
        listener: TcpListener,
        tls: ServerTls,
        member: MemberCheck,
        handler: Arc<dyn Handler>,
        options: Options,
    ) -> io::Result<ServerHandle> {
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            tls: RwLock::new((0, tls)),
            least: watch::Sender::new(0),
            member,
            handler,
            connections: Arc::new(Semaphore::new(options.connections_max)),
            anonymous: Arc::new(Semaphore::new(options.anonymous_connections_max)),
            options,
        });
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(accept(listener, Arc::clone(&shared), stopped));
        Ok(ServerHandle {
            address,
            shared,
            stop,
            task: Some(task),
        })
    }

    /// Serves one connection that is authenticated already, until it ends.
    pub async fn serve_connection<S>(
        stream: S,
        peer: PeerId,
        member: MemberCheck,
        handler: Arc<dyn Handler>,
        options: Options,
    ) where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        connection(stream, peer, member, handler, options).await;
    }
}

impl ServerHandle {
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where its TLS configuration is replaced.
    pub fn tls_setter(&self) -> ServerTlsSetter {
        ServerTlsSetter {
            shared: self.shared.clone(),
        }
    }

    /// Stops accepting and closes every connection. Running handlers continue; their answers are
    /// dropped, so their callers get an unknown outcome.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        if let Some(task) = self.task.take() {
            task.await.ok();
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

impl fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerHandle({})", self.address)
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Usually out of descriptors: wait for some to be closed.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&shared.connections).try_acquire_owned() else {
            tracing::warn!(%address, "connection refused: too many are open");
            continue;
        };
        let shared = Arc::clone(&shared);
        let mut stopped = stopped.clone();
        connections.spawn(async move {
            tokio::select! {
                _ = stopped.wait_for(|stop| *stop) => {}
                () = greet_and_serve(stream, address, shared) => {}
            }
            drop(permit);
        });
    }
    while connections.join_next().await.is_some() {}
}

async fn greet_and_serve(stream: TcpStream, address: SocketAddr, shared: Arc<Shared>) {
    let (number, tls) = read(&shared.tls).clone();
    let mut least = shared.least.subscribe();
    tokio::select! {
        _ = least.wait_for(|least| number < *least) => {
            tracing::debug!(%address, "connection closed: its TLS configuration was replaced");
        }
        () = greet_and_serve_with(tls, stream, address, &shared) => {}
    }
}

async fn greet_and_serve_with(
    tls: ServerTls,
    stream: TcpStream,
    address: SocketAddr,
    shared: &Shared,
) {
    stream.set_nodelay(true).ok();
    let limit = shared.options.connect_timeout;
    let stream = PacedStream::from(stream);
    let (stream, peer) = match tls.accept(stream, &address.to_string(), limit).await {
        Ok(accepted) => accepted,
        Err(error) => {
            tracing::info!(%address, %error, "connection refused");
            return;
        }
    };
    let mut options = shared.options.clone();
    let member = Arc::clone(&shared.member);
    let handler = Arc::clone(&shared.handler);
    if let PeerId::Node(node) = &peer {
        let stream = options.traffic.count(stream, node);
        connection(stream, peer, member, handler, options).await;
        return;
    }
    if peer != PeerId::Anonymous {
        connection(stream, peer, member, handler, options).await;
        return;
    }
    let Ok(_permit) = Arc::clone(&shared.anonymous).try_acquire_owned() else {
        tracing::warn!(%address, "anonymous connection refused: too many are open");
        return;
    };
    options.payload_bytes_max = ANONYMOUS_PAYLOAD_BYTES_MAX.min(options.payload_bytes_max);
    options.in_flight_max = 1;
    let lifetime = options.anonymous_lifetime;
    let serving = connection(stream, peer, member, handler, options);
    timeout(lifetime, serving).await.ok();
}

struct Connection {
    peer: PeerId,
    member: MemberCheck,
    handler: Arc<dyn Handler>,
    options: Options,
    queue: mpsc::Sender<Frame>,
    calls: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    requests: Mutex<HashMap<u64, Arc<Request>>>,
    /// Streams are cut: without an END, which would mean completion.
    closing: AtomicBool,
}

/// A request that is being answered: how the client steers its stream.
struct Request {
    credit: Semaphore,
    cancel: Notify,
}

async fn connection<S>(
    stream: S,
    peer: PeerId,
    member: MemberCheck,
    handler: Arc<dyn Handler>,
    options: Options,
) where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (reader, writer) = tokio::io::split(stream);
    let (queue, queue_rx) = mpsc::channel(options.queued_frames_max.max(1));
    // The client's signals have no counterpart here.
    let (_, signals) = mpsc::unbounded_channel();
    let outgoing = Outgoing {
        signals,
        queue: queue_rx,
        keepalive: None,
        write_timeout: options.dead_after,
        class: options.class(),
    };
    let connection = Arc::new(Connection {
        // Twice what a client takes: its permit is free as soon as it has the
        // answer, this side's a moment later.
        calls: Arc::new(Semaphore::new(options.in_flight_max * 2)),
        streams: Arc::new(Semaphore::new(options.streams_max * 2)),
        requests: Mutex::default(),
        closing: AtomicBool::new(false),
        peer,
        member,
        handler,
        options,
        queue,
    });
    let peer = connection.peer.clone();
    let reading = async {
        let reader = FrameReader::new(reader, connection.options.class());
        let reason = connection.read(reader).await;
        connection.stop_streams();
        // The writer ends when the last sender is dropped; what it still has,
        // a refusal for one, goes out first.
        drop(connection);
        reason
    };
    let writing = outgoing.write(writer, |_| true);
    tokio::pin!(reading, writing);
    let reason = tokio::select! {
        reason = &mut reading => {
            timeout(Duration::from_millis(500), writing).await.ok();
            reason
        }
        written = &mut writing => match written {
            Ok(()) => "closed by this side".to_owned(),
            Err(error) => error.to_string(),
        },
    };
    tracing::debug!(%peer, reason, "connection ended");
}

impl Connection {
    fn is_member(&self) -> bool {
        self.peer.node().is_none_or(|node| (self.member)(node))
    }

    fn requests(&self) -> MutexGuard<'_, HashMap<u64, Arc<Request>>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop_streams(&self) {
        self.closing.store(true, Ordering::SeqCst);
        for request in self.requests().values() {
            request.cancel.notify_one();
        }
    }

    /// Reads until the connection ends; returns the reason.
    async fn read<R: AsyncRead + Unpin>(self: &Arc<Self>, mut reader: FrameReader<R>) -> String {
        if !self.is_member() {
            let text = "it was removed from the cluster, or never joined; \
                        get a token with `keel token` and `keel join`";
            self.queue.send(wire::hello(false, text)).await.ok();
            return "not a member".into();
        }
        self.queue.send(wire::hello(true, "")).await.ok();
        loop {
            let frame = match timeout(self.options.dead_after, reader.read()).await {
                Ok(Ok(Some(frame))) => frame,
                Ok(Ok(None)) => return "closed by the peer".into(),
                Ok(Err(error)) => return error.to_string(),
                Err(_) => return "the peer is silent".into(),
            };
            if !self.is_member() {
                return "the peer was removed from the cluster".into();
            }
            if let Err(reason) = self.dispatch(frame) {
                return reason;
            }
        }
    }

    fn dispatch(self: &Arc<Self>, frame: Frame) -> Result<(), String> {
        match frame.kind {
            // A full queue is being written: the peer hears from us anyway.
            wire::PING => drop(self.queue.try_send(wire::signal(wire::PONG, 0))),
            wire::CANCEL => {
                if let Some(request) = self.requests().get(&frame.request) {
                    request.cancel.notify_one();
                }
            }
            wire::CREDIT => {
                let items: u32 = postcard::from_bytes(&frame.payload)
                    .map_err(|_| "an invalid credit".to_owned())?;
                let requests = self.requests();
                let Some(request) = requests.get(&frame.request) else {
                    return Ok(());
                };
                let credit = request.credit.available_permits() + items as usize;
                if credit > STREAM_CREDIT_MAX as usize {
                    return Err("more credit than allowed".into());
                }
                request.credit.add_permits(items as usize);
            }
            kind if kind < KIND_RESERVED => return self.start(frame),
            kind => return Err(format!("a frame of kind {kind:#06x}")),
        }
        Ok(())
    }

    fn start(self: &Arc<Self>, frame: Frame) -> Result<(), String> {
        let request = Arc::new(Request {
            credit: Semaphore::new(0),
            cancel: Notify::new(),
        });
        let Ok(permit) = Arc::clone(&self.calls).try_acquire_owned() else {
            let max = self.options.in_flight_max;
            let busy = RpcError::refused(format!("{max} requests of this connection run already"));
            // No room even for the refusal: the peer ignores its limit.
            return self
                .queue
                .try_send(wire::error(frame.request, busy))
                .map_err(|_| "far more requests than allowed".into());
        };
        match self.requests().entry(frame.request) {
            Entry::Occupied(_) => return Err("a request number that is in use".into()),
            Entry::Vacant(place) => drop(place.insert(Arc::clone(&request))),
        }
        let connection = Arc::clone(self);
        tokio::spawn(async move {
            connection.answer(frame, &request, permit).await;
        });
        Ok(())
    }

    async fn answer(&self, frame: Frame, request: &Request, mut permit: OwnedSemaphorePermit) {
        let number = frame.request;
        let last = match self.call(frame.kind, frame.payload).await {
            Ok(Reply::One(payload)) if payload.len() > self.options.payload_bytes_max as usize => {
                let length = payload.len();
                let max = self.options.payload_bytes_max;
                let reason = format!("the answer has {length} bytes, at most {max} are allowed");
                wire::error(number, RpcError::failed(reason))
            }
            Ok(Reply::One(payload)) => Frame {
                kind: wire::ANSWER,
                request: number,
                payload,
            },
            Ok(Reply::Stream(items)) => match Arc::clone(&self.streams).try_acquire_owned() {
                Ok(stream) => {
                    permit = stream;
                    self.push(number, request, items).await
                }
                Err(_) => {
                    let max = self.options.streams_max;
                    let reason = format!("{max} streams of this connection are open already");
                    wire::error(number, RpcError::refused(reason))
                }
            },
            Err(error) => wire::error(number, error),
        };
        // Gone from the table before the peer can learn that it is answered.
        self.requests().remove(&number);
        let unfinished = last.kind == wire::END && self.closing.load(Ordering::SeqCst);
        if !unfinished {
            self.queue.send(last).await.ok();
        }
        drop(permit);
    }

    async fn call(&self, kind: u16, payload: Bytes) -> Result<Reply, RpcError> {
        if !self.handler.permits(&self.peer, kind) {
            let peer = &self.peer;
            return Err(RpcError::refused(format!(
                "{peer} may not send requests of kind {kind:#06x}"
            )));
        }
        let calling = self.handler.call(self.peer.clone(), kind, payload);
        match AssertUnwindSafe(calling).catch_unwind().await {
            Ok(result) => result,
            Err(_) => Err(RpcError::unknown("the handler panicked; see its log")),
        }
    }

    /// Pushes `items` as far as the client's credit goes; returns the frame
    /// that ends the stream.
    async fn push(
        &self,
        number: u64,
        request: &Request,
        mut items: mpsc::Receiver<Bytes>,
    ) -> Frame {
        let begin = wire::signal(wire::BEGIN, number);
        let end = wire::signal(wire::END, number);
        if self.queue.send(begin).await.is_err() {
            return end;
        }
        loop {
            let next = async {
                let credit = request.credit.acquire().await.ok()?;
                credit.forget();
                items.recv().await
            };
            let item = tokio::select! {
                biased;
                () = request.cancel.notified() => return end,
                () = self.queue.closed() => return end,
                item = next => item,
            };
            let Some(payload) = item else {
                return end;
            };
            if !self.is_member() {
                return wire::error(number, RpcError::failed("removed from the cluster"));
            }
            let item = Frame {
                kind: wire::ITEM,
                request: number,
                payload,
            };
            if item.payload.len() > self.options.payload_bytes_max as usize {
                return wire::error(number, RpcError::failed("a stream item over the limit"));
            }
            if self.queue.send(item).await.is_err() {
                return end;
            }
        }
    }
}
