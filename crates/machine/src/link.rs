//! The connection between the two workers of a move: frames of
//! [`Class::BULK`] over TLS with certificates pinned by both sides, on plain
//! blocking sockets (each side has a thread of its own for it, away from any
//! async runtime).
//!
//! ```text
//!   source                                            target
//!     │ HELLO (machine, epoch, sizes)                   │
//!     │ SIZE, PAGES …, LOG …, ROUND_END ───────────────▶│ ROUND_DONE     (each round)
//!     │  freeze                                         │
//!     │ SIZE, PAGES …, LOG …, IMAGE …, IMAGE_END ──────▶│ PREPARED
//!     │  commit in the store                            │
//!     │ GO (epoch) ────────────────────────────────────▶│ RESUMED (epoch)
//!     │ ABORT (reason) at any time ────────────────────▶│
//! ```
//!
//! Versions: that of the frame is the envelope's; [`HELLO_VERSION`] is that of
//! the messages here. A peer of another version is refused by name.

use bytes::{Bytes, BytesMut};
use keel_cluster::{Epoch, MachineName};
use keel_net::frame::{Class, Decoder, Frame, FrameError};
use keel_net::{ClientTls, ServerTls};
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Version of these messages.
pub const HELLO_VERSION: u32 = 1;
/// Bytes of pages or output in one frame.
pub const CHUNK_BYTES: usize = 256 << 10;
/// Parts of a message longer than this are not copied before encryption.
const LONG_BYTES: usize = 4096;
/// The most bytes that a captured machine without its memory may have.
const IMAGE_BYTES_MAX: usize = 1 << 30;
/// How long a silent peer is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

const KIND_HELLO: u16 = 1;
const KIND_SIZE: u16 = 2;
const KIND_PAGES: u16 = 3;
const KIND_LOG: u16 = 4;
const KIND_ROUND_END: u16 = 5;
const KIND_ROUND_DONE: u16 = 6;
const KIND_IMAGE: u16 = 7;
const KIND_IMAGE_END: u16 = 8;
const KIND_PREPARED: u16 = 9;
const KIND_GO: u16 = 10;
const KIND_RESUMED: u16 = 11;
const KIND_ABORT: u16 = 12;

/// What the source says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`HELLO_VERSION`].
    pub version: u32,
    /// The machine that moves.
    pub machine: MachineName,
    /// The epoch under which the source runs it.
    pub epoch: Epoch,
    /// Hash of its instrumented module.
    pub program: [u8; 32],
    /// Offset of the first byte of output that the source still has.
    pub log_base: u64,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The source's first.
    Hello(Hello),
    /// A memory's size in 64 KiB pages.
    Size {
        /// Number of the memory.
        memory: u32,
        /// Its size.
        pages: u64,
    },
    /// Bytes of a memory.
    Pages {
        /// Number of the memory.
        memory: u32,
        /// Where they belong.
        offset: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// Bytes of the output.
    Log {
        /// Where they belong.
        offset: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// All of a round was sent.
    RoundEnd,
    /// All of a round is in place.
    RoundDone,
    /// A piece of the captured machine.
    Image(Bytes),
    /// That was the last piece.
    ImageEnd,
    /// The target is ready.
    Prepared,
    /// The commit won.
    Go(Epoch),
    /// The machine runs at the target.
    Resumed(Epoch),
    /// The sender gives the move up.
    Abort(String),
}

/// Why a connection between workers ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket.
    #[error("the connection to the other worker: {0}")]
    Io(#[from] std::io::Error),
    /// TLS.
    #[error("TLS with the other worker: {0}")]
    Tls(#[from] rustls::Error),
    /// Bytes that are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame that is no message.
    #[error("the other worker sent something unreadable: {0}")]
    Message(String),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    Aborted(String),
    /// The other side closed the connection.
    #[error("the other worker closed the connection")]
    Closed,
}

fn number(bytes: &Bytes, at: usize) -> Result<u64, LinkError> {
    bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_le_bytes)
        .ok_or_else(|| LinkError::Message("a message is too short".into()))
}

fn plain<'a, T: Deserialize<'a>>(bytes: &'a Bytes) -> Result<T, LinkError> {
    postcard::from_bytes(bytes).map_err(|error| LinkError::Message(error.to_string()))
}

impl Message {
    /// Reads one from a frame.
    ///
    /// # Errors
    /// [`LinkError::Message`].
    pub fn decode(frame: &Frame) -> Result<Self, LinkError> {
        let payload = &frame.payload;
        Ok(match frame.kind {
            KIND_HELLO => {
                let (version, _) = postcard::take_from_bytes::<u32>(payload)
                    .map_err(|error| LinkError::Message(error.to_string()))?;
                if version != HELLO_VERSION {
                    return Err(LinkError::Message(format!(
                        "the source speaks version {version} of moves, this node {HELLO_VERSION}: upgrade the older one"
                    )));
                }
                Message::Hello(plain(payload)?)
            }
            KIND_SIZE => Message::Size {
                memory: number(payload, 0)? as u32,
                pages: number(payload, 8)?,
            },
            KIND_PAGES => Message::Pages {
                memory: number(payload, 0)? as u32,
                offset: number(payload, 8)?,
                bytes: payload.slice(payload.len().min(16)..),
            },
            KIND_LOG => Message::Log {
                offset: number(payload, 0)?,
                bytes: payload.slice(8..),
            },
            KIND_ROUND_END => Message::RoundEnd,
            KIND_ROUND_DONE => Message::RoundDone,
            KIND_IMAGE => Message::Image(payload.clone()),
            KIND_IMAGE_END => Message::ImageEnd,
            KIND_PREPARED => Message::Prepared,
            KIND_GO => Message::Go(plain(payload)?),
            KIND_RESUMED => Message::Resumed(plain(payload)?),
            KIND_ABORT => Message::Abort(String::from_utf8_lossy(payload).into_owned()),
            other => return Err(LinkError::Message(format!("a message of kind {other}"))),
        })
    }

    fn encode(&self) -> Result<(u16, Vec<u8>), LinkError> {
        let pack = |value: &Epoch| {
            postcard::to_stdvec(value).map_err(|error| LinkError::Message(error.to_string()))
        };
        Ok(match self {
            Message::Hello(hello) => (
                KIND_HELLO,
                postcard::to_stdvec(hello)
                    .map_err(|error| LinkError::Message(error.to_string()))?,
            ),
            Message::Size { memory, pages } => {
                let mut bytes = u64::from(*memory).to_le_bytes().to_vec();
                bytes.extend(pages.to_le_bytes());
                (KIND_SIZE, bytes)
            }
            Message::Pages {
                memory,
                offset,
                bytes,
            } => {
                let mut out = u64::from(*memory).to_le_bytes().to_vec();
                out.extend(offset.to_le_bytes());
                out.extend(bytes);
                (KIND_PAGES, out)
            }
            Message::Log { offset, bytes } => {
                let mut out = offset.to_le_bytes().to_vec();
                out.extend(bytes);
                (KIND_LOG, out)
            }
            Message::RoundEnd => (KIND_ROUND_END, Vec::new()),
            Message::RoundDone => (KIND_ROUND_DONE, Vec::new()),
            Message::Image(bytes) => (KIND_IMAGE, bytes.to_vec()),
            Message::ImageEnd => (KIND_IMAGE_END, Vec::new()),
            Message::Prepared => (KIND_PREPARED, Vec::new()),
            Message::Go(epoch) => (KIND_GO, pack(epoch)?),
            Message::Resumed(epoch) => (KIND_RESUMED, pack(epoch)?),
            Message::Abort(reason) => (KIND_ABORT, reason.as_bytes().to_vec()),
        })
    }
}

enum Stream {
    Client(Box<StreamOwned<ClientConnection, TcpStream>>),
    Server(Box<StreamOwned<ServerConnection, TcpStream>>),
}

/// One end of the connection.
pub struct Link {
    stream: Stream,
    out: BytesMut,
    input: BytesMut,
    /// Where bytes arrive before they are appended to `input`.
    scratch: Vec<u8>,
    sent_bytes: u64,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("sent_bytes", &self.sent_bytes)
            .finish_non_exhaustive()
    }
}

fn prepare(socket: &TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))
}

impl Link {
    /// Connects to the target's worker.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn connect(address: &str, tls: &ClientTls) -> Result<Self, LinkError> {
        let socket = TcpStream::connect(address)?;
        prepare(&socket)?;
        // The name is not looked at: the certificate is pinned.
        let name = rustls::pki_types::ServerName::try_from("worker.keel")
            .map_err(|error| LinkError::Message(error.to_string()))?;
        let connection = ClientConnection::new(tls.config().clone(), name)?;
        Ok(Link::over(Stream::Client(Box::new(StreamOwned::new(
            connection, socket,
        )))))
    }

    /// Takes over a connection that the source's worker made.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn accept(socket: TcpStream, tls: &ServerTls) -> Result<Self, LinkError> {
        prepare(&socket)?;
        let connection = ServerConnection::new(tls.config().clone())?;
        Ok(Link::over(Stream::Server(Box::new(StreamOwned::new(
            connection, socket,
        )))))
    }

    fn over(mut stream: Stream) -> Self {
        match &mut stream {
            Stream::Client(stream) => stream.conn.set_buffer_limit(Some(1 << 20)),
            Stream::Server(stream) => stream.conn.set_buffer_limit(Some(1 << 20)),
        }
        Link {
            stream,
            out: BytesMut::with_capacity(CHUNK_BYTES + 64),
            input: BytesMut::with_capacity(2 * CHUNK_BYTES),
            scratch: vec![0; 64 << 10],
            sent_bytes: 0,
        }
    }

    /// Bytes sent so far, before encryption.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        let (kind, payload) = message.encode()?;
        self.write(kind, &[&payload])
    }

    /// Sends pages without an allocation for each.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn send_pages(&mut self, memory: u32, offset: u64, bytes: &[u8]) -> Result<(), LinkError> {
        let memory = u64::from(memory).to_le_bytes();
        self.write(KIND_PAGES, &[&memory, &offset.to_le_bytes(), bytes])
    }

    fn write(&mut self, kind: u16, parts: &[&[u8]]) -> Result<(), LinkError> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.out.clear();
        // The envelope of an empty frame, then the true length.
        Frame {
            kind,
            request: 0,
            payload: Bytes::new(),
        }
        .encode(&Class::BULK, &mut self.out)?;
        if length > Class::BULK.payload_bytes_max as usize {
            return Err(LinkError::Message(format!("a message of {length} bytes")));
        }
        let at = self.out.len() - 4;
        self.out[at..].copy_from_slice(&(length as u32).to_le_bytes());
        // What is long goes to TLS from where it lies.
        let (long, short) = match parts.split_last() {
            Some((last, rest)) if last.len() > LONG_BYTES => (*last, rest),
            _ => (&[][..], parts),
        };
        for part in short {
            self.out.extend_from_slice(part);
        }
        for bytes in [&self.out[..], long] {
            match &mut self.stream {
                Stream::Client(stream) => stream.write_all(bytes)?,
                Stream::Server(stream) => stream.write_all(bytes)?,
            }
        }
        self.sent_bytes += (self.out.len() + long.len()) as u64;
        Ok(())
    }

    /// Pushes out what is buffered.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn flush(&mut self) -> Result<(), LinkError> {
        match &mut self.stream {
            Stream::Client(stream) => stream.flush()?,
            Stream::Server(stream) => stream.flush()?,
        }
        Ok(())
    }

    /// Waits for a message. The peer's `Abort` is an error.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn receive(&mut self) -> Result<Message, LinkError> {
        loop {
            if let Some(frame) = Decoder::new(Class::BULK).decode(&mut self.input)? {
                return match Message::decode(&frame)? {
                    Message::Abort(reason) => Err(LinkError::Aborted(reason)),
                    message => Ok(message),
                };
            }
            let read = match &mut self.stream {
                Stream::Client(stream) => stream.read(&mut self.scratch),
                Stream::Server(stream) => stream.read(&mut self.scratch),
            };
            match read {
                Ok(0) => return Err(LinkError::Closed),
                Ok(count) => self.input.extend_from_slice(&self.scratch[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Lets reads and writes wait without limit: the rest of the move is up to
    /// the store.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn be_patient(&self) -> Result<(), LinkError> {
        let socket = match &self.stream {
            Stream::Client(stream) => &stream.sock,
            Stream::Server(stream) => &stream.sock,
        };
        socket.set_read_timeout(None)?;
        Ok(())
    }

    /// A handle that ends the connection from another thread.
    ///
    /// # Errors
    /// [`LinkError::Io`] without a descriptor left.
    pub fn closer(&self) -> Result<TcpStream, LinkError> {
        let socket = match &self.stream {
            Stream::Client(stream) => &stream.sock,
            Stream::Server(stream) => &stream.sock,
        };
        Ok(socket.try_clone()?)
    }
}

/// Collects the pieces of an image, up to a limit.
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

    /// All of it.
    pub fn take(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn messages_arrive_as_they_were_sent() {
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
                program: [7; 32],
                log_base: 12,
            }),
            Message::Size {
                memory: 1,
                pages: 1 << 40,
            },
            Message::Pages {
                memory: 0,
                offset: 4096,
                bytes: Bytes::from(vec![3; CHUNK_BYTES]),
            },
            Message::Log {
                offset: 5,
                bytes: Bytes::from_static(b"hello"),
            },
            Message::RoundEnd,
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
        sending.join().unwrap();
        assert!(target.receive().is_err());
    }

    #[test]
    fn an_abort_is_an_error_with_its_reason() {
        let (mut source, mut target) = pair();
        let sending = std::thread::spawn(move || {
            source.send(&Message::Abort("no room".into())).unwrap();
            source
        });
        let error = target.receive().unwrap_err().to_string();
        assert!(error.contains("no room"), "{error}");
        drop(sending.join().unwrap());
    }

    #[test]
    fn random_payloads_never_panic() {
        use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
        for seed in 0..20_000 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut payload = vec![0; random.random_range(0..64)];
            random.fill_bytes(&mut payload);
            let frame = Frame {
                kind: random.random_range(0..16),
                request: 0,
                payload: payload.into(),
            };
            // Either it is a message, or an error says why not.
            let _ = Message::decode(&frame);
        }
    }
}
