//! Standard input, output and error: where they come from and go to on the
//! host, passing through pipes and terminals without ever blocking for good.

use crate::abi::types::Errno;
use crate::abi::{Result, interrupted, types};
use crate::locked;
use crate::wait::{Interrupt, WaitEnd, ready_now, wait_for};
use rustix::event::PollFlags;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno as HostErrno;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Mutex;

/// What a [`Sink`] did with some bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SinkResult {
    /// So many bytes were taken, at least one unless none were given. This is
    /// an effect: the guest sees a short write and goes on from there.
    Written(usize),
    /// Nothing was taken; the call is repeated later.
    Interrupted,
    /// Nothing was taken; the guest sees this errno.
    Errno(Errno),
}

/// Where a guest's standard output or error goes.
pub trait Sink: Send + Sync {
    /// Takes some of `bytes` (at most 1 MiB, not empty). May block, but no
    /// longer than until `interrupt` is requested.
    fn write(&self, bytes: &[u8], interrupt: &dyn Interrupt) -> SinkResult;

    /// Whether the guest shall see a terminal.
    fn is_terminal(&self) -> bool {
        false
    }

    /// What `poll_oneoff` waits on for room; `None` if there is always room.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Pushes out what is still buffered.
    ///
    /// # Errors
    /// What the host says when it cannot be pushed out.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Passes through to a descriptor of the host.
#[derive(Debug)]
pub struct FdSink {
    fd: OwnedFd,
    kind: SinkKind,
    terminal: bool,
    // Between "there is room" and the write no other guest thread may take
    // the room, or the write would block.
    write_lock: Mutex<()>,
}

/// What keeps a write from blocking for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SinkKind {
    /// Nothing needs to: always ready.
    Regular,
    /// A pipe opened anew as non-blocking, which does not make it so for
    /// others who share the original.
    Nonblocking,
    /// Writing only what a poll has promised room for.
    PollGuarded,
}

/// A pipe that polls writable has room for this many bytes.
const PIPE_BYTES: usize = 4096;

impl FdSink {
    /// Writes to `fd` from now on.
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

    /// Writes to a duplicate of `fd`, which stays open when this is dropped.
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

/// Where a guest's standard input comes from.
#[derive(Debug, Default)]
pub enum Input {
    /// End of file at once.
    #[default]
    Empty,
    /// A descriptor of the host. It does not travel: a restore brings its own.
    Fd(OwnedFd),
    /// These bytes, then end of file. The rest travels in the snapshot.
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

/// What a sink said, as the result of a call.
pub(crate) fn sink_result(result: SinkResult) -> Result<types::Size> {
    match result {
        SinkResult::Written(count) => Ok(count.try_into()?),
        SinkResult::Interrupted => Err(interrupted()),
        SinkResult::Errno(errno) => Err(errno.into()),
    }
}
