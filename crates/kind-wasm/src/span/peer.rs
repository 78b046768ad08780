//! The connections to another part: one outbound, one inbound.
//!
//! The serving thread must not wait for a slow reader: two parts that wait for each other
//! would deadlock. So a frame is written at once only if the socket has room for it;
//! otherwise a writer thread takes it.

use super::wire::{self, FrameReader, PeerMessage, VERSION, WireError};
use keel_machine::link::keep_alive;
use keel_net::{BulkError, BulkStream, ClientTls, ServerTls};
use keel_wasm::coherence::PartId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub use super::wire::Hello;

/// Bytes per write of a backlog.
const BATCH_BYTES: usize = 256 << 10;
/// The largest frame that is written at once: one with a page, and some without.
const AT_ONCE_BYTES: usize = 8 << 10;
/// A TLS record of this size belongs to a series of pages: more records follow.
const LONG_BYTES: usize = 12 << 10;
/// Bytes processed together, at most.
const TOGETHER_BYTES: usize = 256 << 10;
/// How long sent data may stay unacknowledged: about as long as keep-alive takes to
/// detect an unreachable part on an idle connection.
const UNHEARD_MS: u32 = 12_000;
/// Time limit for the hello message.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);

/// Why a connection to a part failed.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error(transparent)]
    Bulk(#[from] BulkError),
    /// An invalid message.
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A different part connected.
    #[error("{found:?} connected where {expected:?} was expected")]
    Stranger {
        /// The part that the agents agreed on.
        expected: Box<Hello>,
        /// The part that connected.
        found: Box<Hello>,
    },
}

/// Both connections to another part, after the handshake.
#[derive(Debug)]
pub struct PeerConnections {
    pub(super) out: BulkStream,
    pub(super) heard: BulkStream,
    pub(super) unpacker: FrameReader,
}

impl PeerConnections {
    /// Performs the handshake on the dialled (`out`) and the accepted (`heard`)
    /// connection; the peer must answer `hello` with its mirror image.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn greet(
        (out, client): (TcpStream, &ClientTls),
        (heard, server): (TcpStream, &ServerTls),
        hello: &Hello,
    ) -> Result<Self, PeerError> {
        for socket in [&out, &heard] {
            socket.set_nodelay(true)?;
            keep_alive(socket)?;
            // TCP would retransmit for a quarter of an hour, and keep-alive does not
            // probe meanwhile.
            rustix::net::sockopt::set_tcp_user_timeout(socket, UNHEARD_MS)
                .map_err(std::io::Error::from)?;
            socket.set_read_timeout(Some(HELLO_PATIENCE))?;
            socket.set_write_timeout(Some(HELLO_PATIENCE))?;
        }
        let mut out = BulkStream::client(out, client)?;
        let mut heard = BulkStream::server(heard, server)?;
        let mut unpacker = FrameReader::default();
        // Each side waits for the other's handshake, so both run in parallel.
        let frame = wire::encode_hello(hello)?;
        let found = std::thread::scope(|scope| {
            let saying = scope.spawn(|| out.write(&frame));
            let mut found = None;
            while found.is_none() {
                heard.read(&mut |bytes| {
                    found = unpacker.feed_hello(bytes)?;
                    Ok::<_, PeerError>(bytes.len())
                })?;
            }
            saying
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok::<_, PeerError>(found)
        })?;
        let expected = Hello {
            version: VERSION,
            from: hello.to,
            to: hello.from,
            ..hello.clone()
        };
        match found {
            Some(found) if found == expected => {}
            Some(found) => {
                let (expected, found) = (Box::new(expected), Box::new(found));
                return Err(PeerError::Stranger { expected, found });
            }
            None => return Err(WireError::Nameless.into()),
        }
        for socket in [out.socket(), heard.socket()] {
            socket.set_read_timeout(None)?;
            socket.set_write_timeout(None)?;
        }
        Ok(PeerConnections {
            out,
            heard,
            unpacker,
        })
    }
}

/// The inbound connection of another part. Reading never blocks.
pub(super) struct Inbound {
    part: PartId,
    stream: BulkStream,
    unpacker: FrameReader,
    parcels: Vec<PeerMessage>,
}

impl Inbound {
    pub(super) fn new(
        part: PartId,
        stream: BulkStream,
        mut unpacker: FrameReader,
    ) -> Result<Self, PeerError> {
        stream.socket().set_nonblocking(true)?;
        let mut parcels = Vec::new();
        // Data that arrived with the hello.
        unpacker.feed(&[], &mut parcels)?;
        Ok(Inbound {
            part,
            stream,
            unpacker,
            parcels,
        })
    }

    pub(super) fn part(&self) -> PartId {
        self.part
    }

    /// The part has another number from now on.
    pub(super) fn is_now(&mut self, part: PartId) {
        self.part = part;
    }

    /// Returns the buffer of messages for reuse.
    pub(super) fn keep(&mut self, parcels: Vec<PeerMessage>) {
        self.parcels = parcels;
    }

    pub(super) fn socket(&self) -> &TcpStream {
        self.stream.socket()
    }

    /// Messages that have arrived. For a series of pages, all that are available, so that
    /// they are installed and answered together.
    ///
    /// # Errors
    /// [`PeerError`]: the part is lost.
    pub(super) fn read(&mut self) -> Result<&mut Vec<PeerMessage>, PeerError> {
        let (mut last, mut all) = (0, 0);
        // Until a message is complete or no data is left: no socket becomes readable for
        // data that is decrypted already.
        while self.parcels.is_empty() || last >= LONG_BYTES && all < TOGETHER_BYTES {
            let (unpacker, parcels) = (&mut self.unpacker, &mut self.parcels);
            let read = self.stream.read(&mut |bytes| {
                unpacker.feed(bytes, parcels)?;
                last = bytes.len();
                all += bytes.len();
                Ok::<_, PeerError>(bytes.len())
            });
            match read {
                Ok(()) => {}
                Err(PeerError::Bulk(BulkError::Io(error)))
                    if error.kind() == std::io::ErrorKind::WouldBlock =>
                {
                    break;
                }
                // Earlier messages are processed first: they may name the part that is to
                // blame.
                Err(_) if !self.parcels.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(&mut self.parcels)
    }
}

#[derive(Debug, Default)]
struct Backlog {
    frames: Vec<Vec<u8>>,
    /// Frames were taken out and are not written yet: later frames must wait.
    writing: bool,
    /// No further frames: the connection is shut down after the last one.
    finished: bool,
    closed: bool,
}

impl Backlog {
    fn is_empty(&self) -> bool {
        self.frames.is_empty() && !self.writing
    }
}

/// The outbound connection to another part.
#[derive(Debug)]
pub(super) struct Outbound {
    out: Mutex<BulkStream>,
    backlog: Mutex<Backlog>,
    changed: Condvar,
    /// Bytes of the backlog, with those being written.
    unwritten: AtomicUsize,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}

impl Outbound {
    pub(super) fn new(out: BulkStream) -> Self {
        Outbound {
            out: Mutex::new(out),
            backlog: Mutex::default(),
            changed: Condvar::new(),
            unwritten: AtomicUsize::new(0),
        }
    }

    /// Bytes sent to the part that are not written yet.
    pub(super) fn unwritten_bytes(&self) -> usize {
        self.unwritten.load(Ordering::Relaxed)
    }

    /// Sends frames; at once if they are short and the socket has room. Frames of one
    /// thread stay in order.
    ///
    /// # Errors
    /// [`BulkError`]: the part is lost.
    pub(super) fn send(&self, frame: Vec<u8>) -> Result<(), BulkError> {
        if frame.len() <= AT_ONCE_BYTES
            && let Ok(mut out) = self.out.try_lock()
            && locked(&self.backlog).is_empty()
            && has_room(out.socket())
        {
            return out.write(&frame);
        }
        self.unwritten.fetch_add(frame.len(), Ordering::Relaxed);
        locked(&self.backlog).frames.push(frame);
        self.changed.notify_one();
        Ok(())
    }

    /// Writes the backlog until the connection is closed.
    ///
    /// # Errors
    /// [`BulkError`]: the part is lost.
    pub(super) fn write_backlog(&self) -> Result<(), BulkError> {
        self.write_until_closed().inspect_err(|_| {
            // Nobody waits for the rest.
            *locked(&self.backlog) = Backlog {
                closed: true,
                ..Backlog::default()
            };
            self.changed.notify_all();
        })
    }

    fn write_until_closed(&self) -> Result<(), BulkError> {
        loop {
            let frames = {
                let mut backlog = locked(&self.backlog);
                backlog.writing = false;
                self.changed.notify_all();
                while backlog.frames.is_empty() && !backlog.closed && !backlog.finished {
                    backlog = self
                        .changed
                        .wait(backlog)
                        .unwrap_or_else(|error| error.into_inner());
                }
                if backlog.closed {
                    return Ok(());
                }
                if backlog.frames.is_empty() {
                    drop(backlog);
                    // The peer may have closed it.
                    let _ = locked(&self.out).socket().shutdown(Shutdown::Write);
                    return Ok(());
                }
                backlog.writing = true;
                std::mem::take(&mut backlog.frames)
            };
            let mut out = locked(&self.out);
            let mut batch = Vec::new();
            for frame in frames {
                if !batch.is_empty() && batch.len() + frame.len() > BATCH_BYTES {
                    out.write(&batch)?;
                    self.unwritten.fetch_sub(batch.len(), Ordering::Relaxed);
                    batch.clear();
                }
                match batch.is_empty() {
                    true => wire::recycle(std::mem::replace(&mut batch, frame)),
                    false => {
                        batch.extend_from_slice(&frame);
                        wire::recycle(frame);
                    }
                }
            }
            out.write(&batch)?;
            self.unwritten.fetch_sub(batch.len(), Ordering::Relaxed);
            wire::recycle(batch);
        }
    }

    /// Waits until the backlog is written; false if that is not before `deadline`.
    pub(super) fn wait_written(&self, deadline: Instant) -> bool {
        let rest = deadline.saturating_duration_since(Instant::now());
        let backlog = locked(&self.backlog);
        let waited = self
            .changed
            .wait_timeout_while(backlog, rest, |backlog| !backlog.is_empty());
        let (backlog, _) = waited.unwrap_or_else(|error| error.into_inner());
        backlog.is_empty()
    }

    /// Closes the connection after the backlog is written.
    pub(super) fn finish(&self) {
        locked(&self.backlog).finished = true;
        self.changed.notify_all();
    }

    /// Closes the connection and discards the backlog.
    pub(super) fn close(&self) {
        locked(&self.backlog).closed = true;
        self.changed.notify_all();
    }
}

/// Whether a frame with a page can be written without blocking: the kernel reports this
/// while a third of the socket's buffer is free.
fn has_room(socket: &TcpStream) -> bool {
    let mut ready = [PollFd::new(socket, PollFlags::OUT)];
    let at_once = Timespec::default();
    poll(&mut ready, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_net::PinnedIdentity;
    use std::net::TcpListener;
    use std::sync::Arc;

    /// What is sent while another thread writes is waited for: the last words of a part are not
    /// lost with its connections.
    #[test]
    fn what_cannot_be_written_at_once_is_waited_for() {
        let [ours, theirs] = [(), ()].map(|()| PinnedIdentity::generate().unwrap());
        let server = ServerTls::pinned(&theirs, ours.fingerprint).unwrap();
        let client = ClientTls::pinned(&ours, theirs.fingerprint).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let out = BulkStream::client(socket, &client).unwrap();
        let heard = std::thread::spawn(move || {
            let mut stream = BulkStream::server(accepted, &server).unwrap();
            let mut heard = Vec::new();
            let read = stream.read(&mut |bytes| {
                heard.extend_from_slice(bytes);
                Ok::<_, BulkError>(bytes.len())
            });
            read.map(|()| heard)
        });
        let outbound = Arc::new(Outbound::new(out));
        let writes = {
            let outbound = outbound.clone();
            std::thread::spawn(move || outbound.write_backlog())
        };
        let busy = locked(&outbound.out);
        outbound.send(b"the last words".to_vec()).unwrap();
        assert!(!outbound.wait_written(Instant::now()));
        drop(busy);
        assert!(outbound.wait_written(Instant::now() + Duration::from_secs(20)));
        outbound.close();
        writes.join().unwrap().unwrap();
        assert_eq!(heard.join().unwrap().unwrap(), b"the last words");
    }
}
