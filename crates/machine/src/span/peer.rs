//! The connections to another part: one on which it is told, one on which it is heard.
//!
//! Who decides must not wait for who reads slowly: two parts that wait to be read by
//! each other would wait for ever. So a frame is written at once only where the socket
//! has room for it; else it is left to a thread that may wait.

use super::wire::{self, FrameReader, PeerMessage, VERSION, WireError};
use crate::link::keep_alive;
use keel_net::{BulkError, BulkStream, ClientTls, ServerTls};
use keel_wasm::coherence::PartId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

pub use super::wire::Hello;

/// Bytes that are written at a time where there is a backlog.
const BATCH_BYTES: usize = 256 << 10;
/// As many bytes are written at once where there is room: a frame with a page, and some
/// without.
const AT_ONCE_BYTES: usize = 8 << 10;
/// Bytes of a record of TLS that has pages of many: more of them follow.
const LONG_BYTES: usize = 12 << 10;
/// Bytes of which all is taken note of at once.
const TOGETHER_BYTES: usize = 256 << 10;
/// For so long what was said may be unheard: about as long as it takes to see that a part
/// which is not spoken to is not there.
const UNHEARD_MS: u32 = 12_000;
/// How long a part may take to say who it is.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);

/// Why a part is not heard any more.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The connection.
    #[error(transparent)]
    Bulk(#[from] BulkError),
    /// What came on it.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The socket.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// It is another one.
    #[error("{found:?} came where {expected:?} was expected")]
    Stranger {
        /// Whom the agents agreed on.
        expected: Box<Hello>,
        /// Who it says it is.
        found: Box<Hello>,
    },
}

/// Both connections to another part, greeted.
#[derive(Debug)]
pub struct PeerConnections {
    pub(super) out: BulkStream,
    pub(super) heard: BulkStream,
    pub(super) unpacker: FrameReader,
}

impl PeerConnections {
    /// Dials (`out`) and is dialled (`heard`); `hello` is what this part says, its
    /// mirror image what the other has to say.
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
            // What is not acknowledged would be sent again for a quarter of an hour, and
            // nobody asks meanwhile whether the other side is there.
            rustix::net::sockopt::set_tcp_user_timeout(socket, UNHEARD_MS)
                .map_err(std::io::Error::from)?;
            socket.set_read_timeout(Some(HELLO_PATIENCE))?;
            socket.set_write_timeout(Some(HELLO_PATIENCE))?;
        }
        let mut out = BulkStream::client(out, client)?;
        let mut heard = BulkStream::server(heard, server)?;
        let mut unpacker = FrameReader::default();
        // Each waits for the other's handshake: both at once.
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

/// The connection on which another part is heard. Reading never waits.
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
        // What came with the hello.
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

    /// Room for what comes next.
    pub(super) fn keep(&mut self, parcels: Vec<PeerMessage>) {
        self.parcels = parcels;
    }

    pub(super) fn socket(&self) -> &TcpStream {
        self.stream.socket()
    }

    /// What has come: of many pages, as many as are there, so that they are put in place
    /// and answered at once.
    ///
    /// # Errors
    /// [`PeerError`]: the part is lost.
    pub(super) fn read(&mut self) -> Result<&mut Vec<PeerMessage>, PeerError> {
        let (mut last, mut all) = (0, 0);
        // Until something is whole, or nothing is left: what the stream has decrypted
        // already wakes nobody.
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
                // What came before it is heard first: it may say who is to blame.
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
    /// Some were taken out, and are not written yet: what comes after them must wait.
    writing: bool,
    /// Nothing more comes: when all is written the other side is told so.
    finished: bool,
    closed: bool,
}

impl Backlog {
    fn is_empty(&self) -> bool {
        self.frames.is_empty() && !self.writing
    }
}

/// The connection on which another part is told.
#[derive(Debug)]
pub(super) struct Outbound {
    out: Mutex<BulkStream>,
    backlog: Mutex<Backlog>,
    changed: Condvar,
    /// Bytes of the backlog, with what is being written of it.
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

    /// Bytes that it was told and that are not written yet.
    pub(super) fn unwritten_bytes(&self) -> usize {
        self.unwritten.load(Ordering::Relaxed)
    }

    /// Tells it frames; at once, if they are few and that is possible without waiting.
    /// What one thread tells comes in that order.
    ///
    /// # Errors
    /// [`BulkError`]: the part is lost.
    pub(super) fn tell(&self, frame: Vec<u8>) -> Result<(), BulkError> {
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

    /// Writes what could not be written at once, until it is closed.
    ///
    /// # Errors
    /// [`BulkError`]: the part is lost.
    pub(super) fn write_backlog(&self) -> Result<(), BulkError> {
        loop {
            let frames = {
                let mut backlog = locked(&self.backlog);
                backlog.writing = false;
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
                    // It may have ended.
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
                    true => wire::was_said(std::mem::replace(&mut batch, frame)),
                    false => {
                        batch.extend_from_slice(&frame);
                        wire::was_said(frame);
                    }
                }
            }
            out.write(&batch)?;
            self.unwritten.fetch_sub(batch.len(), Ordering::Relaxed);
            wire::was_said(batch);
        }
    }

    /// Ends the writing when what is left is written.
    pub(super) fn finish(&self) {
        locked(&self.backlog).finished = true;
        self.changed.notify_all();
    }

    /// Ends the writing; what is left is not written.
    pub(super) fn close(&self) {
        locked(&self.backlog).closed = true;
        self.changed.notify_all();
    }
}

/// Whether a frame with a page can be written without waiting: the kernel says so while
/// a third of the socket's buffer is free.
fn has_room(socket: &TcpStream) -> bool {
    let mut ready = [PollFd::new(socket, PollFlags::OUT)];
    let at_once = Timespec::default();
    poll(&mut ready, Some(&at_once)).is_ok_and(|ready| ready > 0)
}
