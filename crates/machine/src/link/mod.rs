//! The connection between the two workers of a move: frames of [`Class::BULK`] over TLS
//! with certificates pinned by both sides, on blocking sockets (each side has a thread of
//! its own for it, outside any async runtime).
//!
//! ```text
//!   source                                            target
//!     │ HELLO (machine, epoch, sizes)                   │
//!     │ FUNCTIONS at any time before the freeze         │ compiles them, so that threads can resume
//!     │ SIZE, PAGES …, CUT …, BLOCK …, LOG …, ROUND_END ▶│ ROUND_DONE, or COMPILING (each round)
//!     │  freeze                                         │
//!     │ FROZEN, the same, IMAGE …, IMAGE_END ──────────▶│ PREPARED
//!     │  commit in the store                            │
//!     │◀─ LOG_RESEND before ROUND_DONE or PREPARED: see `worker::log_transfer`
//!     │ GO (epoch) ────────────────────────────────────▶│ RESUMED (epoch)
//!     │ ABORT (reason) at any time ────────────────────▶│
//!     │ REMOTE before IMAGE and before GO, and the messages after RESUMED, in a post-copy
//!     │ move: see `worker::post_copy`
//! ```
//!
//! Received pages are written to their memory as they are decrypted, without a buffer;
//! sent data is collected into whole TLS records, because scattered pages would otherwise
//! cost a record, a system call and a packet each.
//!
//! Versions: that of the frame is the envelope's; [`HELLO_VERSION`] is that of the
//! messages here. A peer of another version is refused with an error that names it.
//!
//! - `endpoint`: where the source connects to the target
//! - `message`: the messages and their encoding
//!
//! The connection is in this file.

mod endpoint;
mod message;

pub use endpoint::TargetEndpoint;
pub use message::{FUNCTIONS_MAX, HELLO_VERSION, Hello, Message, Purpose};

use crate::PAGE_BYTES;
use keel_net::frame::{Class, Decoder, FrameError, HEADER_BYTES, Header};
use keel_net::{BulkError, BulkStream, ClientTls, ServerTls};
use message::{KIND_PAGES, number};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::ErrorKind;
use std::net::{TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Duration;

/// Time limit for the target to accept a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of pages or output in one frame.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Bytes collected before they are encrypted and sent.
const BATCH_BYTES: usize = 128 << 10;
/// Header of the payload of pages: memory and offset.
const PAGES_HEAD_BYTES: usize = 16;
/// The largest image of a machine without its memory.
const IMAGE_BYTES_MAX: usize = 1 << 30;
/// Time limit for a silent peer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Idle time before the peer's host is probed, and the number of failed probes.
const KEEPALIVE: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;
/// The time limit while the machine is frozen.
const FROZEN_PATIENCE: Duration = Duration::from_secs(3);

/// Why a connection between workers ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the connection to the other worker: {0}")]
    Io(#[from] std::io::Error),
    /// TLS, or the transport below it.
    #[error("the connection to the other worker: {0}")]
    Bulk(#[from] BulkError),
    /// Bytes that are not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame that is not a valid message.
    #[error("the other worker sent something unreadable: {0}")]
    Message(String),
    /// Pages cannot be read or written at this side.
    #[error(transparent)]
    Memory(Box<dyn std::error::Error + Send + Sync>),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    Aborted(String),
}

impl LinkError {
    /// Pages cannot be read or written at this side.
    pub fn memory(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        LinkError::Memory(Box::new(error))
    }
}

/// Fills a buffer with the content of a memory at an offset.
pub type ReadPages<'a> = dyn Fn(u64, &mut [u8]) -> Result<(), LinkError> + 'a;
/// Receives content of a memory: its number, the offset, and the bytes.
pub type WritePages<'a> = dyn FnMut(u32, u64, &[u8]) -> Result<(), LinkError> + 'a;

/// Pages of which a part has arrived.
#[derive(Debug)]
struct PartialPages {
    memory: u32,
    /// Byte range that has not arrived.
    range: Range<u64>,
}

/// One end of the connection.
pub struct Link {
    stream: BulkStream,
    /// Data to send.
    out: Vec<u8>,
    /// Buffer for pages on their way into `out`.
    scratch: Vec<u8>,
    parser: Parser,
    sent_bytes: u64,
}

/// Splits received data into messages, and pages into pieces.
#[derive(Debug, Default)]
struct Parser {
    /// The beginning of a frame, up to the content of pages.
    input: Vec<u8>,
    arriving: Option<PartialPages>,
}

impl Parser {
    /// Consumes data up to the end of the first message; returns the number of bytes, and
    /// the message.
    fn feed(
        &mut self,
        bytes: &[u8],
        write: &mut WritePages<'_>,
    ) -> Result<(usize, Option<Message>), LinkError> {
        let mut at = 0;
        loop {
            if let Some(message) = self.parse()? {
                return Ok((at, Some(message)));
            }
            let bytes = &bytes[at..];
            if bytes.is_empty() {
                return Ok((at, None));
            }
            let taken = match &mut self.arriving {
                Some(arriving) => {
                    let left = arriving.range.end - arriving.range.start;
                    let taken = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    write(arriving.memory, arriving.range.start, &bytes[..taken])?;
                    arriving.range.start += taken as u64;
                    if arriving.range.is_empty() {
                        self.arriving = None;
                    }
                    taken
                }
                None => {
                    let taken = bytes
                        .len()
                        .min(self.wanted()?.saturating_sub(self.input.len()));
                    self.input.extend_from_slice(&bytes[..taken]);
                    taken
                }
            };
            at += taken;
        }
    }

    /// Number of bytes that [`Self::parse`] needs of the present frame.
    fn wanted(&self) -> Result<usize, LinkError> {
        Ok(match Decoder::new(Class::BULK).header(&self.input)? {
            None => HEADER_BYTES,
            Some(header) if header.kind == KIND_PAGES => HEADER_BYTES + PAGES_HEAD_BYTES,
            Some(header) => HEADER_BYTES + header.payload_bytes,
        })
    }

    /// The message, if it is complete. The header of pages sets `self.arriving`.
    fn parse(&mut self) -> Result<Option<Message>, LinkError> {
        let Some(header) = Decoder::new(Class::BULK).header(&self.input)? else {
            return Ok(None);
        };
        if self.input.len() < self.wanted()? {
            return Ok(None);
        }
        let payload = &self.input[HEADER_BYTES..];
        if header.kind != KIND_PAGES {
            let message = Message::decode(header.kind, payload)?;
            self.input.clear();
            return Ok(Some(message));
        }
        let memory = number(payload, 0)?;
        let start = number(payload, 8)?;
        let range = u32::try_from(memory)
            .ok()
            .zip(header.payload_bytes.checked_sub(PAGES_HEAD_BYTES))
            .and_then(|(memory, bytes)| {
                let end = start.checked_add(bytes as u64)?;
                (end > start).then_some((memory, start..end))
            });
        let Some((memory, range)) = range else {
            return Err(LinkError::Message(format!(
                "pages at {start} of memory {memory}, {} bytes",
                header.payload_bytes
            )));
        };
        self.arriving = Some(PartialPages { memory, range });
        self.input.clear();
        Ok(None)
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("sent_bytes", &self.sent_bytes)
            .finish_non_exhaustive()
    }
}

/// As [`Link::use_frozen_timeout`], for a link that another thread uses: `socket` is its
/// [`Link::closer`].
///
/// # Errors
/// That of the socket.
pub fn use_frozen_timeout(socket: &TcpStream) -> std::io::Result<()> {
    socket.set_read_timeout(Some(FROZEN_PATIENCE))?;
    socket.set_write_timeout(Some(FROZEN_PATIENCE))
}

/// Lets the kernel detect an unreachable host.
pub fn keep_alive(socket: impl AsFd + Copy) -> std::io::Result<()> {
    rustix::net::sockopt::set_socket_keepalive(socket, true)?;
    rustix::net::sockopt::set_tcp_keepidle(socket, KEEPALIVE)?;
    rustix::net::sockopt::set_tcp_keepintvl(socket, KEEPALIVE)?;
    rustix::net::sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    Ok(())
}

fn prepare(socket: &TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    // A target that is ready waits without limit.
    keep_alive(socket)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))
}

impl Link {
    /// Connects to the target's worker.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn connect(address: &str, tls: &ClientTls) -> Result<Self, LinkError> {
        let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
        let socket = address.to_socket_addrs()?.find_map(|address| {
            TcpStream::connect_timeout(&address, CONNECT_PATIENCE)
                .inspect_err(|error| last = error.kind().into())
                .ok()
        });
        let socket = socket.ok_or(last)?;
        prepare(&socket)?;
        Ok(Link::over(BulkStream::client(socket, tls)?))
    }

    /// Accepts a connection of the source's worker.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn accept(socket: TcpStream, tls: &ServerTls) -> Result<Self, LinkError> {
        prepare(&socket)?;
        Ok(Link::over(BulkStream::server(socket, tls)?))
    }

    fn over(stream: BulkStream) -> Self {
        Link {
            stream,
            out: Vec::with_capacity(BATCH_BYTES + CHUNK_BYTES + 64),
            scratch: vec![0; CHUNK_BYTES],
            parser: Parser::default(),
            sent_bytes: 0,
        }
    }

    /// Bytes sent so far, before encryption.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Queues a message for sending: see [`Self::flush`].
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        let (kind, payload) = message.encode()?;
        self.begin(kind, payload.len())?;
        self.out.extend_from_slice(&payload);
        self.write_batch()
    }

    /// Queues pages for sending. `read` fills a buffer with the content at an offset.
    /// Zero pages are omitted if `skip_zero`. Returns the number of bytes sent.
    ///
    /// # Errors
    /// [`LinkError`], or that of `read`.
    pub fn send_pages(
        &mut self,
        memory: u32,
        range: Range<u64>,
        skip_zero: bool,
        read: &ReadPages<'_>,
    ) -> Result<u64, LinkError> {
        let mut sent = 0;
        let mut at = range.start;
        while at < range.end {
            let count = (range.end - at).min(CHUNK_BYTES as u64) as usize;
            let bytes = &mut self.scratch[..count];
            read(at, bytes)?;
            let runs = if skip_zero && has_zero_page(bytes) {
                runs_not_zero(bytes)
            } else {
                std::iter::once(0..count).collect()
            };
            for run in runs {
                self.begin(KIND_PAGES, PAGES_HEAD_BYTES + run.len())?;
                self.out.extend(u64::from(memory).to_le_bytes());
                self.out.extend((at + run.start as u64).to_le_bytes());
                sent += run.len() as u64;
                self.out.extend_from_slice(&self.scratch[run]);
            }
            self.write_batch()?;
            at += count as u64;
        }
        Ok(sent)
    }

    fn begin(&mut self, kind: u16, payload_bytes: usize) -> Result<(), LinkError> {
        let header = Header {
            kind,
            request: 0,
            payload_bytes,
        };
        Ok(header.encode(&Class::BULK, &mut self.out)?)
    }

    fn write_batch(&mut self) -> Result<(), LinkError> {
        if self.out.len() >= BATCH_BYTES {
            self.write_out()?;
        }
        Ok(())
    }

    fn write_out(&mut self) -> Result<(), LinkError> {
        let written = self.stream.write(&self.out);
        self.sent_bytes += self.out.len() as u64;
        // After an error too: truncated data must not be sent again.
        self.out.clear();
        written.map_err(|error| self.reason_of(error))
    }

    /// Why a write failed: who gives up says so and closes the connection, which may be noticed by
    /// a write before that is read.
    fn reason_of(&mut self, error: BulkError) -> LinkError {
        let is_closed = |error: &std::io::Error| {
            matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            )
        };
        if !matches!(&error, BulkError::Io(error) if is_closed(error)) {
            return error.into();
        }
        // What was sent before is still read; then the connection ends, so this does not wait.
        loop {
            match self.receive() {
                Ok(_) => {}
                Err(LinkError::Aborted(reason)) => return LinkError::Aborted(reason),
                Err(_) => return error.into(),
            }
        }
    }

    /// Sends all queued data.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn flush(&mut self) -> Result<(), LinkError> {
        keel_net::delay::wait_blocking();
        self.write_out()
    }

    /// Waits for a message where no pages are expected. The peer's `Abort` is an error.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn receive(&mut self) -> Result<Message, LinkError> {
        self.receive_pages(&mut |_, _, _| {
            Err(LinkError::Message("pages that were not requested".into()))
        })
    }

    /// Whether received data is pending.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn has_input(&self) -> Result<bool, LinkError> {
        let mut socket = [PollFd::new(self.stream.socket(), PollFlags::IN)];
        let at_once = Timespec::default();
        let ready = poll(&mut socket, Some(&at_once)).map_err(std::io::Error::from)?;
        Ok(ready > 0)
    }

    /// Waits for a message and passes pages that precede it to `write`, in pieces: the
    /// memory's number, the offset, the bytes.
    ///
    /// # Errors
    /// [`LinkError`], or that of `write`.
    pub fn receive_pages(&mut self, write: &mut WritePages<'_>) -> Result<Message, LinkError> {
        let mut message = None;
        while message.is_none() {
            let parser = &mut self.parser;
            self.stream.read(&mut |bytes| {
                let (taken, found) = parser.feed(bytes, write)?;
                message = found;
                Ok::<_, LinkError>(taken)
            })?;
        }
        match message {
            Some(Message::Abort(reason)) => Err(LinkError::Aborted(reason)),
            Some(message) => Ok(message),
            None => Err(LinkError::Bulk(BulkError::Closed)),
        }
    }

    /// Sets the shorter time limit for a silent peer while the machine is frozen.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn use_frozen_timeout(&self) -> Result<(), LinkError> {
        Ok(use_frozen_timeout(self.stream.socket())?)
    }

    /// Removes the time limit of reads: the store decides when the move continues.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn wait_without_timeout(&self) -> Result<(), LinkError> {
        self.stream.socket().set_read_timeout(None)?;
        Ok(())
    }

    /// A handle that closes the connection from another thread.
    ///
    /// # Errors
    /// [`LinkError::Io`] if no descriptor is available.
    pub fn closer(&self) -> Result<TcpStream, LinkError> {
        Ok(self.stream.socket().try_clone()?)
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

fn has_zero_page(bytes: &[u8]) -> bool {
    bytes.chunks(PAGE_BYTES as usize).any(is_zero)
}

/// Runs of pages that are not zero.
fn runs_not_zero(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    for page in bytes.chunks(PAGE_BYTES as usize) {
        let end = at + page.len();
        match runs.last_mut() {
            _ if is_zero(page) => {}
            Some(run) if run.end == at => run.end = end,
            _ => runs.push(at..end),
        }
        at = end;
    }
    runs
}

/// Assembles the pieces of an image, up to a limit.
#[derive(Debug, Default)]
pub struct ImageBytes(Vec<u8>);

impl ImageBytes {
    /// Adds a piece.
    ///
    /// # Errors
    /// [`LinkError::Message`] beyond the limit (1 GiB).
    pub fn add(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        if self.0.len() + bytes.len() > IMAGE_BYTES_MAX {
            return Err(LinkError::Message(
                "the captured machine is too large".into(),
            ));
        }
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    /// The image.
    pub fn take(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use keel_cluster::Epoch;
    use keel_net::PinnedIdentity;

    fn pair() -> (Link, Link) {
        let (source, target) = (
            PinnedIdentity::generate().unwrap(),
            PinnedIdentity::generate().unwrap(),
        );
        let server = ServerTls::pinned(&target, source.fingerprint).unwrap();
        let client = ClientTls::pinned(&source, target.fingerprint).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let accepting = std::thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            Link::accept(socket, &server).unwrap()
        });
        let source = Link::connect(&address, &client).unwrap();
        (source, accepting.join().unwrap())
    }

    #[test]
    fn messages_arrive_unchanged() {
        let (mut source, mut target) = pair();
        let epoch = Epoch {
            incarnation: 1,
            counter: 9,
        };
        let messages = [
            Message::Hello(Hello {
                version: HELLO_VERSION,
                machine: "web-1".parse().unwrap(),
                epoch,
                program: Some([7; 32]),
                log_base: 12,
                post_copy: true,
                purpose: Purpose::Pull,
            }),
            Message::Size {
                memory: 1,
                pages: 1 << 40,
            },
            Message::LogBegins { offset: 1 << 40 },
            Message::LogResend { offset: 12 },
            Message::Log {
                offset: 5,
                bytes: Bytes::from_static(b"hello"),
            },
            Message::Block {
                volume: 3,
                inode: 1 << 40,
                offset: 65536,
                bytes: Bytes::from_static(b"abc"),
            },
            Message::Cut {
                volume: u32::MAX,
                inode: 7,
                bytes: 0,
            },
            Message::Functions([0, 7, u32::MAX].into()),
            Message::Compiling,
            Message::RoundEnd,
            Message::Frozen,
            Message::Parts(Bytes::from_static(b"parts")),
            Message::Image(Bytes::from_static(b"x")),
            Message::ImageEnd,
            Message::Go(epoch),
        ];
        let sent = messages.clone();
        let sending = std::thread::spawn(move || {
            for message in &sent {
                source.send(message).unwrap();
            }
            source.flush().unwrap();
            assert_eq!(source.receive().unwrap(), Message::Prepared);
        });
        for message in &messages {
            assert_eq!(&target.receive().unwrap(), message);
        }
        target.send(&Message::Prepared).unwrap();
        target.flush().unwrap();
        sending.join().unwrap();
        assert!(target.receive().is_err());
    }

    #[test]
    fn pages_arrive_whole_and_zero_pages_are_omitted() {
        const PAGE: usize = PAGE_BYTES as usize;
        let (mut source, mut target) = pair();
        // Pages 0, 5 and 6 are zero; the others have distinct bytes.
        let mut memory = vec![0u8; 100 * PAGE + 10];
        for (at, byte) in memory.iter_mut().enumerate() {
            if ![0, 5, 6].contains(&(at / PAGE)) {
                *byte = (at % 251) as u8 + 1;
            }
        }
        let sent = memory.clone();
        let sending = std::thread::spawn(move || {
            let read = |at: u64, buffer: &mut [u8]| {
                buffer.copy_from_slice(&sent[at as usize..at as usize + buffer.len()]);
                Ok(())
            };
            let all = 0..sent.len() as u64;
            let bytes = source.send_pages(7, all.clone(), true, &read).unwrap();
            assert_eq!(bytes, all.end - 3 * PAGE_BYTES);
            source.send(&Message::RoundEnd).unwrap();
            // Scattered pages, including zero pages.
            for page in [3u64, 5, 90] {
                let range = page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
                assert_eq!(
                    source.send_pages(7, range, false, &read).unwrap(),
                    PAGE_BYTES
                );
            }
            source.send(&Message::RoundEnd).unwrap();
            source.flush().unwrap();
        });
        let mut got = vec![0u8; memory.len()];
        let mut count = 0;
        for expected in [memory.len() - 3 * PAGE, 3 * PAGE] {
            count = 0;
            let mut write = |memory: u32, at: u64, bytes: &[u8]| {
                assert_eq!(memory, 7);
                got[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
                count += bytes.len();
                Ok(())
            };
            assert_eq!(target.receive_pages(&mut write).unwrap(), Message::RoundEnd);
            assert_eq!(count, expected);
        }
        assert_eq!(count, 3 * PAGE);
        assert!(got == memory);
        sending.join().unwrap();
    }

    #[test]
    fn invalid_pages_are_refused() {
        let absurd: [(&[u64], usize); 4] = [
            (&[u64::MAX, 0, 1], 24),
            (&[0, u64::MAX - 5, 1], 24),
            // Empty, and not even a header.
            (&[0, 0], 16),
            (&[0, 0], 3),
        ];
        for (words, bytes) in absurd {
            let (mut source, mut target) = pair();
            source.begin(KIND_PAGES, bytes).unwrap();
            for word in words {
                source.out.extend(u64::to_le_bytes(*word));
            }
            let sending = std::thread::spawn(move || {
                source.flush().unwrap();
                source
            });
            let error = target.receive_pages(&mut |_, _, _| Ok(())).unwrap_err();
            assert!(matches!(error, LinkError::Message(_)), "{error}");
            drop(sending.join().unwrap());
        }
    }

    #[test]
    fn an_abort_is_an_error_with_its_reason() {
        let (mut source, mut target) = pair();
        let sending = std::thread::spawn(move || {
            source.send(&Message::Abort("no room".into())).unwrap();
            source.flush().unwrap();
            source
        });
        let error = target.receive().unwrap_err().to_string();
        assert!(error.contains("no room"), "{error}");
        drop(sending.join().unwrap());
    }

    #[test]
    fn the_reason_is_told_although_a_write_fails_first() {
        let (mut source, mut target) = pair();
        let refusing = std::thread::spawn(move || {
            // The handshake is made, and more arrives than is read.
            target.receive().unwrap();
            target.send(&Message::RoundDone).unwrap();
            target.send(&Message::Abort("no room".into())).unwrap();
            target.flush().unwrap();
        });
        source.send(&Message::RoundEnd).unwrap();
        source.flush().unwrap();
        let error = loop {
            let pages = |_, bytes: &mut [u8]| {
                bytes.fill(1);
                Ok(())
            };
            if let Err(error) = source.send_pages(0, 0..1 << 20, false, &pages) {
                break error.to_string();
            }
        };
        refusing.join().unwrap();
        assert!(error.contains("no room"), "{error}");
    }
}
