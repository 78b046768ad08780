//! Standard input, output and error of a guest, connected to pipes and terminals of the host
//! without blocking indefinitely.

use crate::abi::types::Errno;
use crate::abi::{Result, interrupted, types};
use crate::lock::locked;
use crate::wait::{Interrupt, WaitEnd, ready_now, wait_for};
use rustix::event::PollFlags;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno as HostErrno;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Mutex;

/// Result of a write to a [`Sink`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SinkResult {
    /// Bytes accepted, at least one unless none were given. This is an effect: the guest sees a
    /// short write and continues from there.
    Written(usize),
    /// Nothing was accepted; the call is repeated later.
    Interrupted,
    /// Nothing was accepted; the guest sees this errno.
    Errno(Errno),
}

/// Destination of a guest's standard output or error.
pub trait Sink: Send + Sync {
    /// Accepts some of `bytes` (at most 1 MiB, not empty). May block until `interrupt` is
    /// requested.
    fn write(&self, bytes: &[u8], interrupt: &dyn Interrupt) -> SinkResult;

    /// Whether the guest sees a terminal.
    fn is_terminal(&self) -> bool {
        false
    }

    /// Descriptor for `poll_oneoff` to wait for room; `None` if there is always room.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Flushes buffered bytes.
    ///
    /// # Errors
    /// The host's error.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes to a descriptor of the host.
#[derive(Debug)]
pub struct FdSink {
    fd: OwnedFd,
    kind: SinkKind,
    terminal: bool,
    // Between a poll for room and the write no other guest thread may use the room, or the write
    // would block.
    write_lock: Mutex<()>,
}

/// How an indefinitely blocking write is avoided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SinkKind {
    /// Not needed: always ready.
    Regular,
    /// A pipe reopened as non-blocking, which does not affect others who share the original.
    Nonblocking,
    /// Writes only as much as a poll has guaranteed room for.
    PollGuarded,
}

/// Room in a pipe that polls writable, in bytes.
const PIPE_BYTES: usize = 4096;

impl FdSink {
    /// A sink that writes to `fd`.
    ///
    /// # Errors
    /// If `fd` cannot be examined.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let mode = rustix::fs::fstat(&fd)?.st_mode;
        let terminal = rustix::termios::isatty(&fd);
        let (fd, kind) = match FileType::from_raw_mode(mode) {
            FileType::RegularFile => (fd, SinkKind::Regular),
            FileType::Fifo => match reopened(&fd) {
                Ok(reopened) => (reopened, SinkKind::Nonblocking),
                Err(_) => (fd, SinkKind::PollGuarded),
            },
            _ => (fd, SinkKind::PollGuarded),
        };
        Ok(Self {
            fd,
            kind,
            terminal,
            write_lock: Mutex::new(()),
        })
    }

    /// A sink that writes to a duplicate of `fd`, which stays open when this is dropped.
    ///
    /// # Errors
    /// If `fd` cannot be duplicated or examined.
    pub fn duplicate(fd: impl AsFd) -> io::Result<Self> {
        Self::new(fd.as_fd().try_clone_to_owned()?)
    }

    /// Writes at most as much as there is room for; `None` if there is none.
    fn write_room(&self, bytes: &[u8]) -> Result<Option<usize>, HostErrno> {
        let _guard = locked(&self.write_lock);
        let mut written = 0;
        while written < bytes.len() && ready_now(&self.fd, PollFlags::OUT)? {
            let end = match self.kind {
                SinkKind::Regular | SinkKind::Nonblocking => bytes.len(),
                SinkKind::PollGuarded => (written + PIPE_BYTES).min(bytes.len()),
            };
            match rustix::io::write(&self.fd, &bytes[written..end]) {
                Ok(0) => break,
                Ok(count) => written += count,
                Err(HostErrno::AGAIN | HostErrno::INTR) => break,
                Err(_) if written > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok((written > 0).then_some(written))
    }
}

/// The same pipe with flags of its own.
fn reopened(fd: &OwnedFd) -> Result<OwnedFd, HostErrno> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

impl Sink for FdSink {
    fn write(&self, bytes: &[u8], interrupt: &dyn Interrupt) -> SinkResult {
        if bytes.is_empty() {
            return SinkResult::Written(0);
        }
        loop {
            let result = if self.kind == SinkKind::Regular {
                rustix::io::write(&self.fd, bytes).map(Some)
            } else {
                match wait_for(self.fd.as_fd(), PollFlags::OUT, interrupt) {
                    Ok(()) => self.write_room(bytes),
                    Err(WaitEnd::Interrupted) => return SinkResult::Interrupted,
                    Err(WaitEnd::Host(errno)) => Err(errno),
                }
            };
            match result {
                Ok(Some(count)) => return SinkResult::Written(count),
                Ok(None) | Err(HostErrno::INTR) => {}
                Err(errno) => return SinkResult::Errno(crate::abi::errno_of(&errno.into())),
            }
        }
    }

    fn is_terminal(&self) -> bool {
        self.terminal
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        (self.kind != SinkKind::Regular).then(|| self.fd.as_fd())
    }
}

/// Keeps everything in memory, for tests.
#[derive(Debug, Default)]
pub struct MemorySink(Mutex<Vec<u8>>);

impl MemorySink {
    /// A copy of all bytes written so far.
    pub fn bytes(&self) -> Vec<u8> {
        locked(&self.0).clone()
    }
}

impl Sink for MemorySink {
    fn write(&self, bytes: &[u8], _interrupt: &dyn Interrupt) -> SinkResult {
        locked(&self.0).extend_from_slice(bytes);
        SinkResult::Written(bytes.len())
    }
}

/// Forgets everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiscardSink;

impl Sink for DiscardSink {
    fn write(&self, bytes: &[u8], _interrupt: &dyn Interrupt) -> SinkResult {
        SinkResult::Written(bytes.len())
    }
}

impl<S: Sink + ?Sized> Sink for std::sync::Arc<S> {
    fn write(&self, bytes: &[u8], interrupt: &dyn Interrupt) -> SinkResult {
        (**self).write(bytes, interrupt)
    }

    fn is_terminal(&self) -> bool {
        (**self).is_terminal()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).poll_fd()
    }

    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }
}

/// Source of a guest's standard input.
#[derive(Debug, Default)]
pub enum Input {
    /// End of file at once.
    #[default]
    Empty,
    /// A descriptor of the host. It is not part of a snapshot: a restore provides its own.
    Fd(OwnedFd),
    /// These bytes, then end of file. Unread bytes are part of the snapshot.
    Bytes(Vec<u8>),
}

/// Standard input in use.
#[derive(Debug)]
pub(crate) enum Stdin {
    Empty,
    Fd {
        fd: OwnedFd,
        terminal: bool,
        read_lock: Mutex<()>,
    },
    /// Bytes not yet read.
    Bytes(Mutex<VecDeque<u8>>),
}

impl Stdin {
    pub(crate) fn new(input: Input) -> Self {
        match input {
            Input::Empty => Self::Empty,
            Input::Fd(fd) => Self::Fd {
                terminal: rustix::termios::isatty(&fd),
                read_lock: Mutex::new(()),
                fd,
            },
            Input::Bytes(bytes) => Self::Bytes(Mutex::new(bytes.into())),
        }
    }

    pub(crate) fn is_terminal(&self) -> bool {
        matches!(self, Self::Fd { terminal: true, .. })
    }

    /// Reads into `buffer` (not empty), waiting for the first byte; 0 at the
    /// end of file.
    pub(crate) fn read(&self, buffer: &mut [u8], interrupt: &dyn Interrupt) -> Result<usize> {
        match self {
            Self::Empty => Ok(0),
            Self::Bytes(bytes) => Ok(locked(bytes).read(buffer)?),
            Self::Fd { fd, read_lock, .. } => loop {
                wait_for(fd.as_fd(), PollFlags::IN, interrupt)?;
                let _guard = locked(read_lock);
                if !ready_now(fd, PollFlags::IN)? {
                    continue;
                }
                match rustix::io::read(fd, &mut *buffer) {
                    Ok(count) => return Ok(count),
                    Err(HostErrno::INTR | HostErrno::AGAIN) => {}
                    Err(errno) => return Err(errno.into()),
                }
            },
        }
    }

    /// The descriptor to wait on; `None` if reading never blocks.
    pub(crate) fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Fd { fd, .. } => Some(fd.as_fd()),
            Self::Empty | Self::Bytes(_) => None,
        }
    }

    /// How many bytes can be read at once without waiting.
    pub(crate) fn available_bytes(&self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Fd { fd, .. } => rustix::io::ioctl_fionread(fd).unwrap_or(1),
            Self::Bytes(bytes) => locked(bytes).len() as u64,
        }
    }
}

/// Converts a sink's result to the result of a call.
pub(crate) fn sink_result(result: SinkResult) -> Result<types::Size> {
    match result {
        SinkResult::Written(count) => Ok(count.try_into()?),
        SinkResult::Interrupted => Err(interrupted()),
        SinkResult::Errno(errno) => Err(errno.into()),
    }
}
