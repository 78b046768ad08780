//! One connection: two numbered streams of bytes, one end of each with the guest, the other with
//! the carrier.

use super::{Changed, readiness::Readiness};
use crate::lock::locked;
use rustix::fd::BorrowedFd;
use rustix::io::Errno as HostErrno;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// Bytes in one direction of a connection that its receiver has not taken.
pub(super) const WINDOW: usize = 256 << 10;

/// Bytes that all connections of a machine hold together before each may hold [`SMALL_WINDOW`]
/// only. They move within the downtime.
const HELD_MAX: usize = 16 << 20;

/// What each connection may always hold, in bytes.
const SMALL_WINDOW: usize = 4 << 10;

/// Offsets that no connection reaches: at 100 Gbit/s it takes 11 years.
const OFFSET_MAX: u64 = 1 << 62;

/// An empty buffer larger than this is given back, in bytes: most connections are idle.
const IDLE_CAPACITY: usize = 16 << 10;

/// Identity of a connection: who carries it, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConnectionId {
    /// Differs between all carriers, and between two starts of one.
    pub carrier: u64,
    pub number: u64,
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:x}.{}", self.carrier, self.number)
    }
}

/// A connection as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamRecord {
    pub id: ConnectionId,
    /// Place of its listener in the configuration.
    pub listener: u32,
    /// The address that the client connected to.
    pub local: SocketAddr,
    /// The client's address.
    pub peer: SocketAddr,
    /// Whether it was reset: both directions are lost.
    pub reset: bool,
    /// Offset of the next byte that the guest reads.
    pub read: u64,
    /// The bytes from there on.
    pub incoming: VecDeque<u8>,
    /// Whether no byte comes after these.
    pub incoming_ended: bool,
    /// Whether the guest reads no more.
    pub reading_shut: bool,
    /// Offset of the first byte sent that is not acknowledged.
    pub acknowledged: u64,
    /// The bytes from there on.
    pub outgoing: VecDeque<u8>,
    /// Whether the guest sends no byte after these.
    pub outgoing_ended: bool,
    /// Whether the carrier acknowledged that end.
    pub end_acknowledged: bool,
}

impl StreamRecord {
    pub(super) fn new(
        id: ConnectionId,
        listener: u32,
        local: SocketAddr,
        peer: SocketAddr,
    ) -> Self {
        Self {
            id,
            listener,
            local,
            peer,
            reset: false,
            read: 0,
            incoming: VecDeque::new(),
            incoming_ended: false,
            reading_shut: false,
            acknowledged: 0,
            outgoing: VecDeque::new(),
            outgoing_ended: false,
            end_acknowledged: false,
        }
    }

    /// What is impossible in it.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.read.max(self.acknowledged) > OFFSET_MAX {
            return Err("has offsets that no connection reaches");
        }
        if self.incoming.len() > WINDOW || self.outgoing.len() > WINDOW {
            return Err("holds more than its window");
        }
        if self.end_acknowledged && !(self.outgoing_ended && self.outgoing.is_empty()) {
            return Err("has an acknowledged end before its last byte");
        }
        Ok(())
    }

    /// Offset after the last byte received.
    fn received(&self) -> u64 {
        self.read + self.incoming.len() as u64
    }

    /// Offset after the last byte sent.
    fn sent(&self) -> u64 {
        self.acknowledged + self.outgoing.len() as u64
    }

    fn at_end(&self) -> bool {
        self.reading_shut || (self.incoming_ended && self.incoming.is_empty())
    }
}

/// Why bytes were not taken; nothing of them was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotDelivered {
    /// Bytes before them are missing: the next one that is expected has this offset.
    #[error("the next byte of the connection is {0}")]
    Gap(u64),
    /// The stream ended at this offset.
    #[error("the connection's stream ended at {0}")]
    AfterEnd(u64),
    /// It was reset.
    #[error("the connection was reset")]
    Reset,
    /// They are more than [`Connection::room`].
    #[error("the connection has room for {0} bytes")]
    NoRoom(usize),
    /// What was never sent cannot be acknowledged: sent until this offset.
    #[error("the connection's guest has sent {0} bytes")]
    NotSent(u64),
}

/// How far both directions are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Offset after the last byte delivered.
    pub received: u64,
    /// Offset of the first byte that the carrier has not acknowledged.
    pub acknowledged: u64,
    /// Offset after the last byte that the guest sent.
    pub sent: u64,
    /// Whether the guest sends no byte after that.
    pub ended: bool,
    /// Whether the guest will read no more.
    pub reading_shut: bool,
    /// Whether the guest closed it.
    pub closed: bool,
    /// Whether it was reset.
    pub reset: bool,
}

/// What all connections of a machine share.
#[derive(Default)]
pub(super) struct Shared {
    changed: OnceLock<Changed>,
    /// Bytes in all buffers.
    held: AtomicUsize,
}

impl Shared {
    pub(super) fn set_changed(&self, changed: Changed) {
        drop(self.changed.set(changed));
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Shared")
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

/// One connection of a machine.
#[derive(Debug)]
pub struct Connection {
    id: ConnectionId,
    listener: u32,
    local: SocketAddr,
    peer: SocketAddr,
    stream: Mutex<Stream>,
    readable: Readiness,
    writable: Readiness,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Stream {
    record: StreamRecord,
    /// Whether the guest closed it.
    closed: bool,
}

impl Stream {
    fn is_readable(&self) -> bool {
        let record = &self.record;
        record.reset || !record.incoming.is_empty() || record.at_end()
    }

    /// Bytes that the guest may send now.
    fn room_to_send(&self, shared: &Shared) -> usize {
        window(shared).saturating_sub(self.record.outgoing.len())
    }

    fn is_writable(&self, shared: &Shared) -> bool {
        let record = &self.record;
        record.reset || record.outgoing_ended || self.room_to_send(shared) > 0
    }
}

fn window(shared: &Shared) -> usize {
    if shared.held.load(Ordering::Relaxed) < HELD_MAX {
        WINDOW
    } else {
        SMALL_WINDOW
    }
}

/// Removes the first `count` bytes.
fn remove(bytes: &mut VecDeque<u8>, count: usize) {
    bytes.drain(..count);
    if bytes.is_empty() && bytes.capacity() > IDLE_CAPACITY {
        *bytes = VecDeque::new();
    }
}

/// Copies the first bytes of `bytes`; returns how many.
fn copy(bytes: &VecDeque<u8>, from: usize, buffer: &mut [u8]) -> usize {
    let (first, second) = bytes.as_slices();
    let mut copied = 0;
    let mut skip = from;
    for part in [first, second] {
        let rest = part.get(skip..).unwrap_or_default();
        skip = skip.saturating_sub(part.len());
        let count = rest.len().min(buffer.len() - copied);
        buffer[copied..copied + count].copy_from_slice(&rest[..count]);
        copied += count;
    }
    copied
}

impl Connection {
    pub(super) fn new(record: StreamRecord, shared: Arc<Shared>) -> Self {
        let held = record.incoming.len() + record.outgoing.len();
        shared.held.fetch_add(held, Ordering::Relaxed);
        Self {
            id: record.id,
            listener: record.listener,
            local: record.local,
            peer: record.peer,
            stream: Mutex::new(Stream {
                record,
                closed: false,
            }),
            readable: Readiness::default(),
            writable: Readiness::default(),
            shared,
        }
    }

    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// Place of its listener in the configuration.
    pub fn listener(&self) -> u32 {
        self.listener
    }

    /// The address that the client connected to.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// The client's address.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    pub(super) fn record(&self) -> StreamRecord {
        locked(&self.stream).record.clone()
    }

    /// Changes the stream, and tells those who wait on it.
    fn change<T>(&self, change: impl FnOnce(&mut Stream) -> T) -> T {
        let mut stream = locked(&self.stream);
        let held = |stream: &Stream| stream.record.incoming.len() + stream.record.outgoing.len();
        let before = held(&stream);
        let result = change(&mut stream);
        let after = held(&stream);
        if after > before {
            self.shared
                .held
                .fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.shared
                .held
                .fetch_sub(before - after, Ordering::Relaxed);
        }
        self.readable.set(stream.is_readable());
        self.writable.set(stream.is_writable(&self.shared));
        result
    }

    pub(super) fn tell_carrier(&self) {
        if let Some(changed) = self.shared.changed.get() {
            changed(self.id);
        }
    }
}

/// The carrier's side.
impl Connection {
    pub fn progress(&self) -> Progress {
        let stream = locked(&self.stream);
        let record = &stream.record;
        Progress {
            received: record.received(),
            acknowledged: record.acknowledged,
            sent: record.sent(),
            ended: record.outgoing_ended,
            reading_shut: record.reading_shut,
            closed: stream.closed,
            reset: record.reset,
        }
    }

    /// How many bytes may be delivered now.
    pub fn room(&self) -> usize {
        let stream = locked(&self.stream);
        let record = &stream.record;
        if record.reset || record.incoming_ended {
            return 0;
        }
        // What is read by nobody is not kept.
        if record.reading_shut || stream.closed {
            return WINDOW;
        }
        window(&self.shared).saturating_sub(record.incoming.len())
    }

    /// Delivers the client's bytes from `offset` on; those that were delivered before are skipped.
    ///
    /// # Errors
    /// [`NotDelivered`]: none of them was taken.
    pub fn deliver(&self, offset: u64, bytes: &[u8]) -> Result<(), NotDelivered> {
        self.change(|stream| {
            let received = stream.record.received();
            let known = received.checked_sub(offset);
            let known = known.ok_or(NotDelivered::Gap(received))?;
            let known = usize::try_from(known).unwrap_or(usize::MAX);
            let new = bytes.get(known..).unwrap_or_default();
            if stream.record.reset {
                return Err(NotDelivered::Reset);
            }
            if new.is_empty() {
                return Ok(());
            }
            if stream.record.incoming_ended {
                return Err(NotDelivered::AfterEnd(received));
            }
            if stream.record.reading_shut || stream.closed {
                stream.record.read += new.len() as u64;
                return Ok(());
            }
            let room = WINDOW.saturating_sub(stream.record.incoming.len());
            if new.len() > room {
                return Err(NotDelivered::NoRoom(room));
            }
            stream.record.incoming.extend(new);
            Ok(())
        })
    }

    /// The client sends no byte from `offset` on.
    ///
    /// # Errors
    /// [`NotDelivered`]: bytes before are missing, or came after.
    pub fn deliver_end(&self, offset: u64) -> Result<(), NotDelivered> {
        self.change(|stream| {
            let received = stream.record.received();
            if stream.record.reset {
                return Err(NotDelivered::Reset);
            }
            match received.cmp(&offset) {
                std::cmp::Ordering::Less => Err(NotDelivered::Gap(received)),
                std::cmp::Ordering::Greater => Err(NotDelivered::AfterEnd(offset)),
                std::cmp::Ordering::Equal => {
                    stream.record.incoming_ended = true;
                    Ok(())
                }
            }
        })
    }

    /// Copies bytes that the guest sent, from `offset` on; returns how many. Bytes that were
    /// acknowledged are gone.
    pub fn sent_from(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let stream = locked(&self.stream);
        let record = &stream.record;
        let Some(skip) = offset.checked_sub(record.acknowledged) else {
            return 0;
        };
        copy(
            &record.outgoing,
            usize::try_from(skip).unwrap_or(usize::MAX),
            buffer,
        )
    }

    /// The carrier has all bytes before `offset`: they need not be kept.
    ///
    /// # Errors
    /// [`NotDelivered::NotSent`] if the guest has not sent that many.
    pub fn acknowledge(&self, offset: u64) -> Result<(), NotDelivered> {
        self.change(|stream| {
            let record = &mut stream.record;
            if offset > record.sent() {
                return Err(NotDelivered::NotSent(record.sent()));
            }
            let count = offset.saturating_sub(record.acknowledged) as usize;
            remove(&mut record.outgoing, count);
            record.acknowledged += count as u64;
            Ok(())
        })
    }

    /// The carrier knows that the guest sends no more; all bytes before are acknowledged by that.
    ///
    /// # Errors
    /// [`NotDelivered::NotSent`] if the guest has not ended it.
    pub fn acknowledge_end(&self) -> Result<(), NotDelivered> {
        self.change(|stream| {
            let record = &mut stream.record;
            if !record.outgoing_ended {
                return Err(NotDelivered::NotSent(record.sent()));
            }
            record.acknowledged = record.sent();
            record.outgoing = VecDeque::new();
            record.end_acknowledged = true;
            Ok(())
        })
    }

    /// The client, or the way to it, is gone.
    pub fn reset(&self) {
        self.change(|stream| {
            let record = &mut stream.record;
            // Offsets stay what they are.
            record.read = record.received();
            record.incoming = VecDeque::new();
            record.outgoing = VecDeque::new();
            record.reset = true;
        });
    }
}

/// The guest's side.
impl Connection {
    /// Receives into `buffer`, or only looks; 0 at the end of the stream.
    ///
    /// # Errors
    /// `AGAIN` if there is nothing yet, `CONNRESET`.
    pub(crate) fn receive(&self, buffer: &mut [u8], peek: bool) -> Result<usize, HostErrno> {
        let count = self.change(|stream| {
            let record = &mut stream.record;
            if record.reset {
                return Err(HostErrno::CONNRESET);
            }
            let count = copy(&record.incoming, 0, buffer);
            if count == 0 && !record.at_end() {
                return Err(HostErrno::AGAIN);
            }
            if !peek {
                remove(&mut record.incoming, count);
                record.read += count as u64;
            }
            Ok(count)
        })?;
        if count > 0 && !peek {
            self.tell_carrier();
        }
        Ok(count)
    }

    /// Sends some of `bytes`, at least one.
    ///
    /// # Errors
    /// `AGAIN` if there is no room, `CONNRESET`, and `PIPE` after the guest's own end.
    pub(crate) fn send(&self, bytes: &[u8]) -> Result<usize, HostErrno> {
        let count = self.change(|stream| {
            if stream.record.reset {
                return Err(HostErrno::CONNRESET);
            }
            if stream.record.outgoing_ended {
                return Err(HostErrno::PIPE);
            }
            let count = stream.room_to_send(&self.shared).min(bytes.len());
            if count == 0 {
                return Err(HostErrno::AGAIN);
            }
            stream.record.outgoing.extend(&bytes[..count]);
            Ok(count)
        })?;
        self.tell_carrier();
        Ok(count)
    }

    /// `shutdown`: of reading, of writing.
    ///
    /// # Errors
    /// `NOTCONN` if it was reset.
    pub(crate) fn shut_down(&self, reading: bool, writing: bool) -> Result<(), HostErrno> {
        self.change(|stream| {
            let record = &mut stream.record;
            if record.reset {
                return Err(HostErrno::NOTCONN);
            }
            if reading {
                record.read = record.received();
                record.incoming = VecDeque::new();
                record.reading_shut = true;
            }
            record.outgoing_ended |= writing;
            Ok(())
        })?;
        self.tell_carrier();
        Ok(())
    }

    /// The guest has no descriptor of it any more. What it sent is still carried.
    pub(crate) fn close(&self) {
        self.change(|stream| {
            let record = &mut stream.record;
            record.read = record.received();
            record.incoming = VecDeque::new();
            record.outgoing_ended = true;
            stream.closed = true;
        });
        self.tell_carrier();
    }

    /// Bytes that can be read, and whether the stream is at its end; `None` if neither.
    pub(crate) fn ready_to_read(&self) -> Option<(u64, bool)> {
        let stream = locked(&self.stream);
        let bytes = stream.record.incoming.len() as u64;
        stream.is_readable().then_some((bytes, bytes == 0))
    }

    /// Whether it is closed for writing; `None` if it is not, and has no room.
    pub(crate) fn ready_to_write(&self) -> Option<bool> {
        let stream = locked(&self.stream);
        let ended = stream.record.reset || stream.record.outgoing_ended;
        stream.is_writable(&self.shared).then_some(ended)
    }

    /// A descriptor that is readable while a byte, an end or an error can be received.
    ///
    /// # Errors
    /// The host's, where it has no descriptor left.
    pub(crate) fn readable_fd(&self) -> Result<BorrowedFd<'_>, HostErrno> {
        let stream = locked(&self.stream);
        self.readable.fd(stream.is_readable())
    }

    /// A descriptor that is readable while there is room to send, or an error.
    ///
    /// # Errors
    /// The host's, where it has no descriptor left.
    pub(crate) fn writable_fd(&self) -> Result<BorrowedFd<'_>, HostErrno> {
        let stream = locked(&self.stream);
        self.writable.fd(stream.is_writable(&self.shared))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let stream = self.stream.get_mut().unwrap_or_else(|it| it.into_inner());
        let held = stream.record.incoming.len() + stream.record.outgoing.len();
        self.shared.held.fetch_sub(held, Ordering::Relaxed);
    }
}
