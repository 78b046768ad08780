//! `sock_*` on listeners and on the connections accepted from them ([`crate::network`]).

use crate::abi::{Result, types};
use crate::descriptor::{Connection, Descriptor, Kind};
use crate::lock::locked;
use crate::state::Wasi;
use crate::wait::{Interrupt, wait_for};
use rustix::event::PollFlags;
use rustix::fd::BorrowedFd;
use rustix::io::Errno as HostErrno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use types::{Errno, Fdflags, Riflags, Rights, Sdflags};

/// Repeats `operation` until it does not say `AGAIN`, waiting until `ready` is readable in between.
/// With `nonblocking` it is tried just once.
fn retry<'f, T>(
    ready: impl Fn() -> Result<BorrowedFd<'f>, HostErrno>,
    nonblocking: bool,
    interrupt: &dyn Interrupt,
    mut operation: impl FnMut() -> Result<T, HostErrno>,
) -> Result<T> {
    loop {
        match operation() {
            Err(HostErrno::AGAIN) if !nonblocking => {}
            result => return Ok(result?),
        }
        wait_for(ready()?, PollFlags::IN, interrupt)?;
    }
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
        // The lock is held from looking for room to taking it: a connection once accepted must not
        // be dropped. Accepting does not block.
        let accept = || {
            let mut table = locked(&self.table);
            table.check_room().map_err(|_| HostErrno::MFILE)?;
            let connection = listener.backlog.accept().ok_or(HostErrno::AGAIN)?;
            let kind = Kind::Connection(Connection {
                connection,
                nonblocking: AtomicBool::new(flags.contains(Fdflags::NONBLOCK)),
            });
            let descriptor = Arc::new(Descriptor::new(kind, dropped));
            table.push(descriptor).map_err(|_| HostErrno::MFILE)
        };
        retry(
            || listener.backlog.ready_fd(),
            nonblocking,
            interrupt,
            accept,
        )
    }
}

/// Receives into `buffer`; 0 at the end of the stream. With `waitall` it goes
/// on until the buffer is full, the stream ends, or a request comes.
pub(crate) fn receive(
    open: &Connection,
    buffer: &mut [u8],
    flags: Riflags,
    interrupt: &dyn Interrupt,
) -> Result<usize> {
    let connection = &open.connection;
    if buffer.is_empty() {
        return Ok(0);
    }
    let nonblocking = open.nonblocking.load(Ordering::Relaxed);
    let peek = flags.contains(Riflags::RECV_PEEK);
    let wait_all = flags.contains(Riflags::RECV_WAITALL) && !peek && !nonblocking;
    let mut received = 0;
    loop {
        let rest = &mut buffer[received..];
        let result = retry(
            || connection.readable_fd(),
            nonblocking,
            interrupt,
            || connection.receive(rest, peek),
        );
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
pub(crate) fn send(open: &Connection, bytes: &[u8], interrupt: &dyn Interrupt) -> Result<usize> {
    if bytes.is_empty() {
        return Ok(0);
    }
    let connection = &open.connection;
    retry(
        || connection.writable_fd(),
        open.nonblocking.load(Ordering::Relaxed),
        interrupt,
        || connection.send(bytes),
    )
}

/// `sock_shutdown`.
pub(crate) fn shutdown(descriptor: &Descriptor, how: Sdflags) -> Result<()> {
    let open = connection_of(descriptor)?;
    descriptor.require(Rights::SOCK_SHUTDOWN)?;
    if how.is_empty() {
        return Err(Errno::Inval.into());
    }
    let (reading, writing) = (how.contains(Sdflags::RD), how.contains(Sdflags::WR));
    open.connection.shut_down(reading, writing)?;
    Ok(())
}
