//! `sock_*` on listeners handed in and on accepted connections. The host's
//! sockets never block; waiting is done by poll.

use crate::abi::{Result, types};
use crate::descriptor::{Connection, Descriptor, Kind, Listener};
use crate::error::Error;
use crate::lock::locked;
use crate::state::Wasi;
use crate::wait::{Interrupt, retry};
use rustix::event::PollFlags;
use rustix::fd::AsFd;
use rustix::io::Errno as HostErrno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use types::{Errno, Fdflags, Riflags, Rights, Sdflags};

/// Takes over a listener of the host.
pub(crate) fn listener(listener: TcpListener, index: u32) -> Result<Listener, Error> {
    listener
        .set_nonblocking(true)
        .map_err(|source| Error::Host {
            what: format!("listener {index}"),
            source,
        })?;
    Ok(Listener {
        listener,
        index,
        nonblocking: AtomicBool::new(false),
    })
}

/// A connection, for functions that work on nothing else.
pub(crate) fn connection_of(descriptor: &Descriptor) -> Result<&Connection> {
    match &descriptor.kind {
        Kind::Connection(connection) => Ok(connection),
        Kind::Listener(_) => Err(Errno::Notconn.into()),
        Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::File(_) | Kind::Directory(_) => {
            Err(Errno::Notsock.into())
        }
    }
}

impl Wasi {
    /// `sock_accept`.
    pub(crate) fn accept(
        &self,
        descriptor: &Descriptor,
        flags: Fdflags,
        interrupt: &dyn Interrupt,
    ) -> Result<u32> {
        let listener = match &descriptor.kind {
            Kind::Listener(listener) => listener,
            Kind::Connection(_) => return Err(Errno::Inval.into()),
            Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::File(_) | Kind::Directory(_) => {
                return Err(Errno::Notsock.into());
            }
        };
        descriptor.require(Rights::SOCK_ACCEPT)?;
        if !(flags - Fdflags::NONBLOCK).is_empty() {
            return Err(Errno::Inval.into());
        }
        let mut dropped = descriptor.dropped();
        dropped.base = dropped.inheriting;
        let nonblocking = listener.nonblocking.load(Ordering::Relaxed);
        locked(&self.table).check_room()?;
        // The lock is held from looking for room to taking it: a connection
        // once accepted must not be dropped. Accepting does not block.
        let accept = || {
            let mut table = locked(&self.table);
            table.check_room().map_err(|_| HostErrno::MFILE)?;
            let (stream, peer) = rustix::net::acceptfrom_with(
                &listener.listener,
                SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            )?;
            let stream = TcpStream::from(stream);
            let kind = Kind::Connection(Connection {
                local: stream.local_addr().ok(),
                peer: peer.and_then(|address| SocketAddr::try_from(address).ok()),
                stream: Some(stream),
                nonblocking: AtomicBool::new(flags.contains(Fdflags::NONBLOCK)),
                shut: AtomicU8::new(0),
            });
            let descriptor = Arc::new(Descriptor::new(kind, dropped));
            table.push(descriptor).map_err(|_| HostErrno::MFILE)
        };
        let fd = listener.listener.as_fd();
        retry(fd, PollFlags::IN, nonblocking, interrupt, accept)
    }
}

/// Receives into `buffer`; 0 at the end of the stream. With `waitall` it goes
/// on until the buffer is full, the stream ends, or a request comes.
pub(crate) fn receive(
    connection: &Connection,
    buffer: &mut [u8],
    flags: Riflags,
    interrupt: &dyn Interrupt,
) -> Result<usize> {
    let stream = connection.stream.as_ref().ok_or(Errno::Connreset)?;
    if buffer.is_empty() {
        return Ok(0);
    }
    let mut host_flags = RecvFlags::empty();
    if flags.contains(Riflags::RECV_PEEK) {
        host_flags |= RecvFlags::PEEK;
    }
    let nonblocking = connection.nonblocking.load(Ordering::Relaxed);
    let fd = stream.as_fd();
    let peek = flags.contains(Riflags::RECV_PEEK);
    let wait_all = flags.contains(Riflags::RECV_WAITALL) && !peek && !nonblocking;
    let mut received = 0;
    loop {
        let rest = &mut buffer[received..];
        let result = retry(fd, PollFlags::IN, nonblocking, interrupt, || {
            rustix::net::recv(stream, &mut *rest, host_flags).map(|(count, _)| count)
        });
        match result {
            Ok(0) => return Ok(received),
            Ok(count) => received += count,
            // Received bytes are an effect, which must not be undone.
            Err(_) if received > 0 => return Ok(received),
            Err(error) => return Err(error),
        }
        if !wait_all || received == buffer.len() {
            return Ok(received);
        }
    }
}

/// Sends some of `bytes`.
pub(crate) fn send(
    connection: &Connection,
    bytes: &[u8],
    interrupt: &dyn Interrupt,
) -> Result<usize> {
    let stream = connection.stream.as_ref().ok_or(Errno::Connreset)?;
    if bytes.is_empty() {
        return Ok(0);
    }
    let nonblocking = connection.nonblocking.load(Ordering::Relaxed);
    let fd = stream.as_fd();
    retry(fd, PollFlags::OUT, nonblocking, interrupt, || {
        rustix::net::send(stream, bytes, SendFlags::NOSIGNAL)
    })
}

/// `sock_shutdown`.
pub(crate) fn shutdown(descriptor: &Descriptor, how: Sdflags) -> Result<()> {
    let connection = connection_of(descriptor)?;
    descriptor.require(Rights::SOCK_SHUTDOWN)?;
    let direction = match (how.contains(Sdflags::RD), how.contains(Sdflags::WR)) {
        (true, true) => Shutdown::Both,
        (true, false) => Shutdown::Read,
        (false, true) => Shutdown::Write,
        (false, false) => return Err(Errno::Inval.into()),
    };
    let stream = connection.stream.as_ref().ok_or(Errno::Notconn)?;
    stream.shutdown(direction)?;
    connection.shut.fetch_or(how.bits(), Ordering::Relaxed);
    Ok(())
}
