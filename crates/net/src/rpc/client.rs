//! The requesting side of a connection.
//!
//! A request's slot goes `queued ──bytes handed over──▶ sent ──answer──▶ gone`.
//! Giving up (time-out, dropped future, lost connection) means
//! [`RpcError::NotSent`] in `queued` and [`RpcError::Unknown`] in `sent`. A
//! sent request that was given up keeps its slot until its answer comes, so
//! this side never has more in flight than the peer allows.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::Outgoing;
use super::round_trip::RoundTrips;
use super::{ConnectError, KIND_RESERVED, Options, RpcError, wire};
use crate::frame::{Frame, FrameError, FrameReader};
use crate::name::NodeName;
use crate::tls::{self, ClientTls};

/// One connection to a peer; clones share it. It is closed when the last clone
/// and the last open stream are dropped.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

/// Tells a connection from others without keeping it open.
pub(super) struct WeakClient {
    inner: Weak<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Frame>,
    calls: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    options: Options,
}

struct Shared {
    peer: String,
    state: Mutex<State>,
    /// Unbounded, but at most one cancel per stream and one credit per
    /// received item ever go in.
    signals: mpsc::UnboundedSender<Frame>,
    round_trips: Arc<RoundTrips>,
}

#[derive(Default)]
struct State {
    lost: Option<String>,
    request_next: u64,
    slots: HashMap<u64, Slot>,
}

struct Slot {
    sent: bool,
    waiter: Waiter,
    _permit: OwnedSemaphorePermit,
}

enum Waiter {
    Answer(oneshot::Sender<Result<Bytes, RpcError>>),
    Begin(oneshot::Sender<Result<Opened, RpcError>>),
    Items(mpsc::Sender<Bytes>, StreamEnd),
    Abandoned,
}

/// Set once: how the stream ended. Unset while it is open.
type StreamEnd = Arc<OnceLock<Result<(), RpcError>>>;

struct Opened {
    items: mpsc::Receiver<Bytes>,
    end: StreamEnd,
}

impl Client {
    /// Connects to the node `expected` at `address` (`host:port`).
    ///
    /// # Errors
    /// [`ConnectError`], which names the peer, the address and what to do.
    pub async fn connect(
        address: &str,
        tls: &ClientTls,
        expected: &NodeName,
        options: Options,
    ) -> Result<Client, ConnectError> {
        Self::connect_to(address, tls, Some(expected), options).await
    }

    /// Connects to any peer that `tls` accepts: a pinned worker, or any node of the cluster of a
    /// join token.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect_unnamed(
        address: &str,
        tls: &ClientTls,
        options: Options,
    ) -> Result<Client, ConnectError> {
        Self::connect_to(address, tls, None, options).await
    }

    async fn connect_to(
        address: &str,
        tls: &ClientTls,
        expected: Option<&NodeName>,
        options: Options,
    ) -> Result<Client, ConnectError> {
        let stream = tls
            .connect(address, expected, options.connect_timeout)
            .await?;
        let label = tls::peer_label(expected);
        match expected {
            Some(node) => {
                let stream = options.traffic.count(stream, node);
                Self::over(stream, &label, address, options).await
            }
            None => Self::over(stream, &label, address, options).await,
        }
    }

    /// Speaks over a stream that is authenticated already. `peer` and
    /// `address` serve the errors. Waits for the peer's greeting.
    ///
    /// # Errors
    /// [`ConnectError::NotAccepted`], [`ConnectError::NoGreeting`].
    pub async fn over<S>(
        stream: S,
        peer: &str,
        address: &str,
        options: Options,
    ) -> Result<Client, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = tokio::io::split(stream);
        let mut reader = FrameReader::new(reader, options.class());
        greeting(&mut reader, peer, address, options.connect_timeout).await?;
        let (queue, queue_rx) = mpsc::channel(options.queued_frames_max);
        let (signals, signals_rx) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            peer: format!("{peer} at {address}"),
            state: Mutex::default(),
            signals,
            round_trips: Arc::default(),
        });
        let outgoing = Outgoing {
            signals: signals_rx,
            queue: queue_rx,
            keepalive: Some((options.keepalive, shared.round_trips.clone())),
            write_timeout: options.dead_after,
            class: options.class(),
        };
        let connection = run(
            Arc::clone(&shared),
            reader,
            writer,
            outgoing,
            options.clone(),
        );
        tokio::spawn(connection);
        Ok(Client {
            inner: Arc::new(Inner {
                shared,
                queue,
                calls: Arc::new(Semaphore::new(options.in_flight_max)),
                streams: Arc::new(Semaphore::new(options.streams_max)),
                options,
            }),
        })
    }

    /// Name and address of the peer, for messages.
    pub fn peer(&self) -> &str {
        &self.inner.shared.peer
    }

    /// Whether the connection is lost; a lost one never recovers. One whose runtime has ended is.
    pub fn is_lost(&self) -> bool {
        self.inner.shared.lock().lost.is_some()
    }

    /// Clones of this handle and open streams, with this one: 1 if there is no other.
    pub(super) fn handles(&self) -> usize {
        Arc::strong_count(&self.inner)
    }

    /// Requests so far.
    pub(super) fn requests(&self) -> u64 {
        self.inner.shared.lock().request_next
    }

    /// Whether this is a handle of the same connection as `other`.
    pub(super) fn is_same(&self, other: &WeakClient) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.inner), other.inner.as_ptr())
    }

    /// A handle that does not keep the connection open.
    pub(super) fn downgrade(&self) -> WeakClient {
        WeakClient {
            inner: Arc::downgrade(&self.inner),
        }
    }

    /// The round-trip time of the connection, from its pings: the least of the last few. `None` until
    /// the first was answered.
    pub fn round_trip(&self) -> Option<Duration> {
        self.inner.shared.round_trips.least()
    }

    /// Sends a request and waits for its answer, at most `timeout` in all.
    ///
    /// # Errors
    /// [`RpcError`]: by its variant, what is known of the execution.
    pub async fn call(
        &self,
        kind: u16,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, RpcError> {
        let deadline = deadline(timeout);
        let (answer, answered) = oneshot::channel();
        let waiter = Waiter::Answer(answer);
        let pending = self
            .send(kind, payload, waiter, &self.inner.calls, deadline)
            .await?;
        pending.wait(answered, timeout, deadline).await
    }

    /// Sends a request that is answered by a stream, and waits until the peer
    /// has begun it (as long as [`Options::dead_after`]).
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn stream(&self, kind: u16, payload: Bytes) -> Result<StreamReceiver, RpcError> {
        let limit = self.inner.options.dead_after;
        let deadline = deadline(limit);
        let (begin, begun) = oneshot::channel();
        let waiter = Waiter::Begin(begin);
        let pending = self
            .send(kind, payload, waiter, &self.inner.streams, deadline)
            .await?;
        let request = pending.request;
        let opened = pending.wait(begun, limit, deadline).await?;
        Ok(StreamReceiver {
            inner: Arc::clone(&self.inner),
            request,
            items: opened.items,
            end: opened.end,
            uncredited: 0,
        })
    }

    async fn send(
        &self,
        kind: u16,
        payload: Bytes,
        waiter: Waiter,
        permits: &Arc<Semaphore>,
        deadline: Instant,
    ) -> Result<Pending, RpcError> {
        let inner = &self.inner;
        let not_sent = |reason: String| RpcError::NotSent {
            peer: inner.shared.peer.clone(),
            reason,
        };
        if kind == 0 || kind >= KIND_RESERVED {
            return Err(not_sent(format!("{kind:#06x} is not a kind of request")));
        }
        let max = inner.options.payload_bytes_max;
        if payload.len() > max as usize {
            let length = payload.len();
            return Err(not_sent(format!(
                "the request has {length} bytes, at most {max} are allowed"
            )));
        }
        let waiting = async {
            let permit = Arc::clone(permits).acquire_owned().await.ok()?;
            Some((permit, inner.queue.reserve().await.ok()?))
        };
        let (permit, place) = match timeout_at(deadline, waiting).await {
            Ok(Some(places)) => places,
            Ok(None) => return Err(not_sent(inner.shared.reason_lost())),
            Err(_) => return Err(not_sent("too many requests are queued before it".into())),
        };
        let mut state = inner.shared.lock();
        if let Some(reason) = &state.lost {
            return Err(not_sent(reason.clone()));
        }
        state.request_next += 1;
        let request = state.request_next;
        let slot = Slot {
            sent: false,
            waiter,
            _permit: permit,
        };
        state.slots.insert(request, slot);
        drop(state);
        place.send(Frame {
            kind,
            request,
            payload,
        });
        Ok(Pending {
            inner: Arc::clone(inner),
            request,
        })
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("peer", &self.peer())
            .field("lost", &self.is_lost())
            .finish()
    }
}

fn deadline(timeout: Duration) -> Instant {
    let far = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + timeout.min(far)
}

/// A request in its slot; dropping it gives the request up.
struct Pending {
    inner: Arc<Inner>,
    request: u64,
}

impl Pending {
    async fn wait<T>(
        self,
        answer: oneshot::Receiver<Result<T, RpcError>>,
        limit: Duration,
        deadline: Instant,
    ) -> Result<T, RpcError> {
        let shared = &self.inner.shared;
        let unknown = |reason: String| RpcError::Unknown {
            peer: shared.peer.clone(),
            reason,
        };
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(unknown("the answer was lost".into())),
            Err(_) => {
                let ms = limit.as_millis();
                match shared.withdraw(self.request) {
                    true => Err(RpcError::NotSent {
                        peer: shared.peer.clone(),
                        reason: format!("the connection took no request within {ms} ms"),
                    }),
                    false => Err(unknown(format!("no answer within {ms} ms"))),
                }
            }
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut state = self.inner.shared.lock();
        let Some(slot) = state.slots.get_mut(&self.request) else {
            return;
        };
        match &slot.waiter {
            // Opened, but its receiver went down with the caller.
            Waiter::Items(items, _) if items.is_closed() => {
                slot.waiter = Waiter::Abandoned;
                self.inner.shared.cancel(self.request);
            }
            // Opened and handed on.
            Waiter::Items(..) => {}
            Waiter::Answer(_) | Waiter::Begin(_) | Waiter::Abandoned if !slot.sent => {
                state.slots.remove(&self.request);
            }
            Waiter::Answer(_) | Waiter::Begin(_) | Waiter::Abandoned => {
                slot.waiter = Waiter::Abandoned;
            }
        }
    }
}

/// Items pushed by the peer, in order.
pub struct StreamReceiver {
    inner: Arc<Inner>,
    request: u64,
    items: mpsc::Receiver<Bytes>,
    end: StreamEnd,
    uncredited: u32,
}

impl StreamReceiver {
    /// The next item; `None` after the peer ended the stream; an error once
    /// when the connection was lost, and then the same again. Cancel-safe.
    ///
    /// # Errors
    /// [`RpcError::Unknown`] when the connection was lost.
    pub async fn recv(&mut self) -> Option<Result<Bytes, RpcError>> {
        let Some(item) = self.items.recv().await else {
            return match self.end.get() {
                Some(Ok(())) => None,
                Some(Err(error)) => Some(Err(error.clone())),
                None => Some(Err(RpcError::Unknown {
                    peer: self.inner.shared.peer.clone(),
                    reason: "the stream broke off".into(),
                })),
            };
        };
        self.uncredited += 1;
        if self.uncredited > self.inner.options.stream_items_ahead() / 2 {
            let credit = wire::credit(self.request, self.uncredited);
            self.uncredited = 0;
            self.inner.shared.signals.send(credit).ok();
        }
        Some(Ok(item))
    }
}

impl Drop for StreamReceiver {
    fn drop(&mut self) {
        let mut state = self.inner.shared.lock();
        if let Some(slot) = state.slots.get_mut(&self.request) {
            slot.waiter = Waiter::Abandoned;
            self.inner.shared.cancel(self.request);
        }
    }
}

impl fmt::Debug for StreamReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "StreamReceiver({} of {})",
            self.request, self.inner.shared.peer
        )
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each critical section leaves the state whole at every step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reason_lost(&self) -> String {
        let state = self.lock();
        state
            .lost
            .clone()
            .unwrap_or_else(|| "the connection is closing".into())
    }

    /// Asks the peer to end a stream; its slot stays until the peer did.
    fn cancel(&self, request: u64) {
        let cancel = wire::signal(wire::CANCEL, request);
        self.signals.send(cancel).ok();
    }

    /// Takes a request back if its bytes were not handed over yet.
    fn withdraw(&self, request: u64) -> bool {
        let mut state = self.lock();
        let queued = state.slots.get(&request).is_some_and(|slot| !slot.sent);
        if queued {
            state.slots.remove(&request);
        }
        queued
    }

    /// Called by the writer for each queued request: false if withdrawn.
    fn mark_sent(&self, request: u64) -> bool {
        match self.lock().slots.get_mut(&request) {
            Some(slot) => {
                slot.sent = true;
                true
            }
            None => false,
        }
    }

    /// Ends every request and stream; no new one is taken afterwards.
    fn lose(&self, reason: String) {
        let slots = {
            let mut state = self.lock();
            state.lost = Some(reason.clone());
            std::mem::take(&mut state.slots)
        };
        for slot in slots.into_values() {
            let (peer, reason) = (self.peer.clone(), reason.clone());
            let error = match slot.sent {
                true => RpcError::Unknown { peer, reason },
                false => RpcError::NotSent { peer, reason },
            };
            match slot.waiter {
                Waiter::Answer(answer) => drop(answer.send(Err(error))),
                Waiter::Begin(begin) => drop(begin.send(Err(error))),
                Waiter::Items(_, end) => drop(end.set(Err(error))),
                Waiter::Abandoned => {}
            }
        }
    }
}

async fn greeting<R: AsyncRead + Unpin>(
    reader: &mut FrameReader<R>,
    peer: &str,
    address: &str,
    limit: Duration,
) -> Result<(), ConnectError> {
    let none = |reason: String| ConnectError::NoGreeting {
        peer: peer.into(),
        address: address.into(),
        reason,
    };
    let frame = match timeout(limit, reader.read()).await {
        Ok(Ok(Some(frame))) => frame,
        Ok(Ok(None)) => return Err(none("it closed the connection".into())),
        Ok(Err(FrameError::Io(error))) => return Err(tls::handshake(peer, address, &error).into()),
        Ok(Err(error)) => return Err(none(error.to_string())),
        Err(_) => return Err(none(format!("nothing within {} ms", limit.as_millis()))),
    };
    if frame.kind != wire::HELLO {
        return Err(none(format!("a frame of kind {:#06x}", frame.kind)));
    }
    match postcard::from_bytes::<wire::Hello>(&frame.payload) {
        Ok(hello) if hello.accepted => Ok(()),
        Ok(hello) => Err(ConnectError::NotAccepted {
            peer: peer.into(),
            address: address.into(),
            reason: hello.text,
        }),
        Err(_) => Err(none("its greeting cannot be read".into())),
    }
}

async fn run<S: AsyncRead + AsyncWrite>(
    shared: Arc<Shared>,
    reader: FrameReader<ReadHalf<S>>,
    writer: tokio::io::WriteHalf<S>,
    outgoing: Outgoing,
    options: Options,
) {
    // Of a runtime that ends it is dropped.
    let mut ended = Ended {
        shared: shared.clone(),
        reason: "its runtime has ended".into(),
    };
    ended.reason = tokio::select! {
        reason = read(&shared, reader, &options) => reason,
        written = outgoing.write(writer, |frame| shared.mark_sent(frame.request)) => match written {
            Ok(()) => "the connection was closed by this side".into(),
            Err(error) => format!("the connection was lost: {}", io_text(&error)),
        },
    };
}

/// Tells all that wait, when it is dropped, that the connection has ended.
struct Ended {
    shared: Arc<Shared>,
    reason: String,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let reason = std::mem::take(&mut self.reason);
        tracing::debug!(peer = self.shared.peer, reason, "connection ended");
        self.shared.lose(reason);
    }
}

async fn read<R: AsyncRead + Unpin>(
    shared: &Shared,
    mut reader: FrameReader<R>,
    options: &Options,
) -> String {
    loop {
        let frame = match timeout(options.dead_after, reader.read()).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return "the peer closed the connection".into(),
            Ok(Err(error)) => return format!("the connection was lost: {}", io_text(&error)),
            Err(_) => {
                let ms = options.dead_after.as_millis();
                return format!("the peer was silent for {ms} ms");
            }
        };
        if let Err(reason) = dispatch(shared, frame, options) {
            return format!("the peer broke the protocol: {reason}");
        }
    }
}

fn io_text(error: &FrameError) -> String {
    match error {
        FrameError::Io(error) => tls::explain(error),
        other => other.to_string(),
    }
}

/// Hands one received frame to whom it belongs; an error is a broken protocol.
fn dispatch(shared: &Shared, frame: Frame, options: &Options) -> Result<(), String> {
    if frame.kind == wire::PONG {
        shared.round_trips.answered();
        return Ok(());
    }
    let mut state = shared.lock();
    let Some(slot) = state.slots.get_mut(&frame.request) else {
        let kind = frame.kind;
        return Err(format!("kind {kind:#06x} without a request"));
    };
    match frame.kind {
        wire::ITEM => push(slot, frame.payload),
        wire::BEGIN => begin(shared, slot, frame.request, options),
        wire::ANSWER | wire::ERROR | wire::END => {
            let slot = state.slots.remove(&frame.request);
            drop(state);
            match slot {
                Some(slot) => finish(shared, slot.waiter, frame.kind, frame.payload),
                None => Ok(()),
            }
        }
        kind => Err(format!("a frame of kind {kind:#06x}")),
    }
}

fn push(slot: &Slot, item: Bytes) -> Result<(), String> {
    match &slot.waiter {
        Waiter::Items(items, _) => match items.try_send(item) {
            Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
            Err(TrySendError::Full(_)) => Err("more stream items than it had credit for".into()),
        },
        Waiter::Abandoned => Ok(()),
        Waiter::Answer(_) | Waiter::Begin(_) => Err("an item before its stream".into()),
    }
}

fn begin(shared: &Shared, slot: &mut Slot, request: u64, options: &Options) -> Result<(), String> {
    let (sender, items) = mpsc::channel(options.stream_items_ahead() as usize);
    let end = StreamEnd::default();
    let opened = Opened {
        items,
        end: Arc::clone(&end),
    };
    match std::mem::replace(&mut slot.waiter, Waiter::Abandoned) {
        Waiter::Begin(begin) => {
            slot.waiter = Waiter::Items(sender, end);
            if begin.send(Ok(opened)).is_err() {
                slot.waiter = Waiter::Abandoned;
                shared.cancel(request);
            } else {
                let credit = wire::credit(request, options.stream_items_ahead());
                shared.signals.send(credit).ok();
            }
        }
        Waiter::Abandoned => shared.cancel(request),
        Waiter::Answer(answer) => {
            answer.send(Err(protocol_violation(shared))).ok();
            shared.cancel(request);
        }
        Waiter::Items(..) => return Err("a stream that begins twice".into()),
    }
    Ok(())
}

fn finish(shared: &Shared, waiter: Waiter, kind: u16, payload: Bytes) -> Result<(), String> {
    let error = |payload: &[u8]| wire::read_error(payload, &shared.peer);
    match (waiter, kind) {
        (Waiter::Abandoned, _) => {}
        (Waiter::Answer(answer), wire::ANSWER) => drop(answer.send(Ok(payload))),
        (Waiter::Answer(answer), wire::ERROR) => drop(answer.send(Err(error(&payload)))),
        (Waiter::Begin(begin), wire::ANSWER) => drop(begin.send(Err(protocol_violation(shared)))),
        (Waiter::Begin(begin), wire::ERROR) => drop(begin.send(Err(error(&payload)))),
        (Waiter::Items(_, end), wire::END) => drop(end.set(Ok(()))),
        (Waiter::Items(_, end), wire::ERROR) => drop(end.set(Err(error(&payload)))),
        (Waiter::Answer(_) | Waiter::Begin(_) | Waiter::Items(..), kind) => {
            // Dropping the waiter tells the caller that the answer was lost.
            return Err(format!("kind {kind:#06x} out of order"));
        }
    }
    Ok(())
}

fn protocol_violation(shared: &Shared) -> RpcError {
    RpcError::Failed {
        peer: shared.peer.clone(),
        reason: "it answered with a stream instead of a single answer, or the reverse".into(),
    }
}
