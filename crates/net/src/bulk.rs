//! TLS over a blocking socket for bulk data: moves and checkpoints.
//!
//! Made for throughput: what is read comes in large pieces from the socket and
//! is handed over where it was decrypted; what is written becomes as few system
//! calls as there are calls of [`BulkStream::write`]. rustls's own stream reads
//! 4 KiB at a time and copies each byte twice more, which on loopback halved
//! the rate of a move.
//!
//! Calls block: not for async tasks. Protocols on top are elsewhere.

use crate::pace::Pace;
use crate::{ClientTls, ServerTls};
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus, WriteTraffic,
};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::time::Duration;

/// Bytes asked of the socket at once, at most.
const INPUT_BYTES: usize = 256 << 10;
/// The most bytes of one TLS record.
const RECORD_BYTES_MAX: usize = 18 << 10;
/// Plain bytes of one record, and what TLS adds to each (header, tag, type).
const FRAGMENT_BYTES: usize = 16 << 10;
const RECORD_OVERHEAD_BYTES: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum BulkError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// No progress within the socket's time-out.
    #[error("the other side was silent for {0:?}")]
    Silent(Duration),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// The other side closed the connection.
    #[error("the other side closed the connection")]
    Closed,
}

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

enum Next {
    /// Call again.
    Again,
    /// Send encoded bytes.
    Transmit,
    /// Read from the socket: the handshake continues, or all received bytes are decrypted.
    Read,
    /// Nothing: the bytes to write are encrypted.
    Written,
}

pub struct BulkStream {
    connection: Connection,
    socket: TcpStream,
    pace: Pace,
    input: Vec<u8>,
    /// The part of `input` that is not decrypted yet.
    filled: Range<usize>,
    output: Output,
    /// Decrypted bytes that were not taken yet.
    rest: Vec<u8>,
}

/// Encrypted bytes not sent yet: the first `used` bytes.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    used: usize,
}

impl std::fmt::Debug for BulkStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BulkStream")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

impl BulkStream {
    /// The client's end; the handshake is made by the first use. The server's
    /// name is not looked at: `tls` pins its certificate.
    ///
    /// # Errors
    /// [`BulkError::Tls`].
    pub fn client(socket: TcpStream, tls: &ClientTls) -> Result<Self, BulkError> {
        let name = ServerName::try_from("worker.keel")
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let connection = UnbufferedClientConnection::new(tls.config().clone(), name)?;
        Ok(Self::new(Connection::Client(connection), socket))
    }

    /// The server's end; the handshake is made by the first use.
    ///
    /// # Errors
    /// [`BulkError::Tls`].
    pub fn server(socket: TcpStream, tls: &ServerTls) -> Result<Self, BulkError> {
        let connection = UnbufferedServerConnection::new(tls.config().clone())?;
        Ok(Self::new(Connection::Server(connection), socket))
    }

    fn new(connection: Connection, socket: TcpStream) -> Self {
        BulkStream {
            connection,
            socket,
            pace: Pace::default(),
            input: vec![0; INPUT_BYTES],
            filled: 0..0,
            output: Output::default(),
            rest: Vec::new(),
        }
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Encrypts and sends all of `bytes`.
    ///
    /// # Errors
    /// [`BulkError`]; part of the bytes may have been sent.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), BulkError> {
        if bytes.is_empty() {
            return Ok(());
        }
        loop {
            // Bytes received meanwhile are buffered for the next read.
            let mut came = Vec::new();
            let next = self.step(Some(bytes), &mut |plain| came.extend_from_slice(plain));
            self.rest.append(&mut came);
            match next? {
                Next::Again => {}
                Next::Transmit => self.send_output()?,
                Next::Read => self.fill()?,
                Next::Written => return self.send_output(),
            }
        }
    }

    /// Passes decrypted bytes to `take` once, which returns how many it took; the rest is passed
    /// again. Blocks until there are some.
    ///
    /// # Errors
    /// [`BulkError`], or that of `take`.
    pub fn read<E: From<BulkError>>(
        &mut self,
        take: &mut dyn FnMut(&[u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        if !self.rest.is_empty() {
            let taken = take(&self.rest)?;
            self.rest.drain(..taken.min(self.rest.len()));
            return Ok(());
        }
        loop {
            let mut taken = None;
            let mut rest = Vec::new();
            let next = self.step(None, &mut |plain| {
                let from = match taken {
                    None => match taken.insert(take(plain)) {
                        Ok(count) => plain.len().min(*count),
                        Err(_) => return,
                    },
                    Some(_) => 0,
                };
                rest.extend_from_slice(&plain[from..]);
            });
            self.rest = rest;
            if let Some(taken) = taken {
                return taken.map(|_| ());
            }
            match next? {
                Next::Again => {}
                Next::Transmit => self.send_output()?,
                Next::Read | Next::Written => self.fill()?,
            }
        }
    }

    /// One step of the connection: encrypts `plain` once the handshake is made,
    /// gives what was decrypted to `take`.
    fn step(
        &mut self,
        plain: Option<&[u8]>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<Next, BulkError> {
        let next = self.process(plain, take);
        if let Err(BulkError::Tls(_)) = &next {
            self.send_alert();
        }
        next
    }

    fn process(
        &mut self,
        plain: Option<&[u8]>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<Next, BulkError> {
        let input = &mut self.input[self.filled.clone()];
        let (discard, next) = match &mut self.connection {
            Connection::Client(connection) => handle(
                connection.process_tls_records(input),
                plain,
                &mut self.output,
                take,
            ),
            Connection::Server(connection) => handle(
                connection.process_tls_records(input),
                plain,
                &mut self.output,
                take,
            ),
        };
        self.filled.start = (self.filled.start + discard).min(self.filled.end);
        next
    }

    /// Sends an alert to the peer, if possible.
    fn send_alert(&mut self) {
        // The alert, then the word to send it.
        for _ in 0..2 {
            let _ = self.process(None, &mut |_| {});
        }
        let _ = self.send_output();
    }

    fn send_output(&mut self) -> Result<(), BulkError> {
        let output = &self.output.bytes[..self.output.used];
        self.output.used = 0;
        self.pace.adjust(&self.socket, output.len());
        (&self.socket)
            .write_all(output)
            .map_err(|error| self.io(error))
    }

    fn fill(&mut self) -> Result<(), BulkError> {
        if self.filled.is_empty() {
            self.filled = 0..0;
        }
        if self.input.len() - self.filled.end < RECORD_BYTES_MAX {
            let length = self.filled.len();
            self.input.copy_within(self.filled.clone(), 0);
            self.filled = 0..length;
        }
        loop {
            match (&self.socket).read(&mut self.input[self.filled.end..]) {
                Ok(0) => return Err(BulkError::Closed),
                Ok(count) => {
                    self.filled.end += count;
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.io(error)),
            }
        }
    }

    fn io(&self, error: std::io::Error) -> BulkError {
        match (error.kind(), self.socket.read_timeout()) {
            (ErrorKind::WouldBlock | ErrorKind::TimedOut, Ok(Some(time))) => {
                BulkError::Silent(time)
            }
            _ => error.into(),
        }
    }
}

/// Does what the connection wants; how many bytes of its input are used up.
fn handle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    plain: Option<&[u8]>,
    output: &mut Output,
    take: &mut dyn FnMut(&[u8]),
) -> (usize, Result<Next, BulkError>) {
    let mut discard = status.discard;
    let next = match status.state {
        Err(error) => Err(error.into()),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                None => break Ok(Next::Again),
                Some(Err(error)) => break Err(error.into()),
                Some(Ok(record)) => {
                    discard += record.discard;
                    take(record.payload);
                }
            }
        },
        Ok(ConnectionState::EncodeTlsData(mut data)) => output.encode(&mut data),
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Next::Transmit)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Next::Read),
        Ok(ConnectionState::WriteTraffic(mut traffic)) => match plain {
            None => Ok(Next::Read),
            Some(plain) => output.encrypt(&mut traffic, plain),
        },
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(BulkError::Closed),
        // Early data is never offered.
        Ok(other) => Err(rustls::Error::General(format!("{other:?} is out of turn")).into()),
    };
    (discard, next)
}

impl Output {
    fn encode<Data>(&mut self, data: &mut EncodeTlsData<'_, Data>) -> Result<Next, BulkError> {
        loop {
            match data.encode(&mut self.bytes[self.used..]) {
                Ok(count) => {
                    self.used += count;
                    return Ok(Next::Again);
                }
                Err(EncodeError::InsufficientSize(size)) => {
                    self.bytes.resize(self.used + size.required_size, 0);
                }
                Err(EncodeError::AlreadyEncoded) => return Ok(Next::Again),
            }
        }
    }

    fn encrypt<Data>(
        &mut self,
        traffic: &mut WriteTraffic<'_, Data>,
        plain: &[u8],
    ) -> Result<Next, BulkError> {
        let records = plain.len() / FRAGMENT_BYTES + 1;
        let wanted = self.used + plain.len() + records * RECORD_OVERHEAD_BYTES;
        if self.bytes.len() < wanted {
            self.bytes.resize(wanted, 0);
        }
        let count = traffic
            .encrypt(plain, &mut self.bytes[self.used..])
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        self.used += count;
        Ok(Next::Written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PinnedIdentity;
    use std::net::TcpListener;

    fn pair(expected: &PinnedIdentity, actual: &PinnedIdentity) -> (BulkStream, BulkStream) {
        let source = PinnedIdentity::generate().unwrap();
        let server = ServerTls::pinned(actual, source.fingerprint).unwrap();
        let client = ClientTls::pinned(&source, expected.fingerprint).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        for socket in [&socket, &accepted] {
            socket
                .set_read_timeout(Some(Duration::from_millis(500)))
                .unwrap();
        }
        (
            BulkStream::client(socket, &client).unwrap(),
            BulkStream::server(accepted, &server).unwrap(),
        )
    }

    /// Reads until `count` bytes are there, in pieces of at most `piece`.
    fn read_all(stream: &mut BulkStream, count: usize, piece: usize) -> Vec<u8> {
        let mut got = Vec::new();
        while got.len() < count {
            stream
                .read(&mut |bytes| {
                    let taken = bytes.len().min(piece);
                    got.extend_from_slice(&bytes[..taken]);
                    Ok::<_, BulkError>(taken)
                })
                .unwrap();
        }
        got
    }

    #[test]
    fn bytes_arrive_in_order_whatever_the_sizes() {
        let identity = PinnedIdentity::generate().unwrap();
        for piece in [1000, 16 << 10, usize::MAX] {
            let (mut source, mut target) = pair(&identity, &identity);
            let bytes: Vec<u8> = (0..3_000_000u32).map(|at| (at * 7 / 5) as u8).collect();
            let sent = bytes.clone();
            let writing = std::thread::spawn(move || {
                let mut at = 0;
                let mut size = 1;
                while at < sent.len() {
                    let end = sent.len().min(at + size);
                    source.write(&sent[at..end]).unwrap();
                    at = end;
                    size = size * 3 % 400_009;
                }
                assert_eq!(read_all(&mut source, 4, 1), b"done");
            });
            assert!(read_all(&mut target, bytes.len(), piece) == bytes);
            target.write(b"done").unwrap();
            writing.join().unwrap();
        }
    }

    #[test]
    fn both_may_write_at_once() {
        let identity = PinnedIdentity::generate().unwrap();
        let (mut source, mut target) = pair(&identity, &identity);
        let run = |stream: &mut BulkStream| {
            for round in 0..50u8 {
                stream.write(&[round; 1000]).unwrap();
            }
            let got = read_all(stream, 50_000, 777);
            assert!(
                got.chunks(1000)
                    .enumerate()
                    .all(|(round, bytes)| bytes == [round as u8; 1000])
            );
        };
        std::thread::scope(|scope| {
            scope.spawn(|| run(&mut source));
            run(&mut target);
        });
    }

    #[test]
    fn a_foreign_certificate_is_refused_by_the_client_and_told() {
        let (expected, actual) = (
            PinnedIdentity::generate().unwrap(),
            PinnedIdentity::generate().unwrap(),
        );
        let (mut source, mut target) = pair(&expected, &actual);
        let serving = std::thread::spawn(move || {
            target
                .read(&mut |bytes| Ok::<_, BulkError>(bytes.len()))
                .unwrap_err()
        });
        let error = source.write(b"x").unwrap_err();
        assert!(matches!(error, BulkError::Tls(_)), "{error}");
        // An alert came, not just the end.
        let error = serving.join().unwrap();
        assert!(matches!(error, BulkError::Tls(_)), "{error}");
    }

    #[test]
    fn silence_and_the_end_are_told_apart() {
        let identity = PinnedIdentity::generate().unwrap();
        let (mut source, mut target) = pair(&identity, &identity);
        let take = &mut |bytes: &[u8]| Ok::<_, BulkError>(bytes.len());
        std::thread::scope(|scope| {
            scope.spawn(|| source.write(b"x").unwrap());
            target.read(take).unwrap();
        });
        let error = target.read(take).unwrap_err();
        assert!(matches!(error, BulkError::Silent(_)), "{error}");
        drop(source);
        let error = target.read(take).unwrap_err();
        assert!(matches!(error, BulkError::Closed), "{error}");
    }

    #[test]
    fn bytes_that_are_no_tls_are_refused() {
        let identity = PinnedIdentity::generate().unwrap();
        for garbage in [
            &b"GET / HTTP/1.0\r\n\r\n"[..],
            &[0; 70_000],
            &[22, 3, 3, 255, 255, 1, 2],
        ] {
            let (source, mut target) = pair(&identity, &identity);
            (&source.socket).write_all(garbage).unwrap();
            drop(source);
            let error = target
                .read(&mut |bytes| Ok::<_, BulkError>(bytes.len()))
                .unwrap_err();
            assert!(
                matches!(error, BulkError::Tls(_) | BulkError::Closed),
                "{error}"
            );
        }
    }
}
