//! Interruptible waiting: every blocking call polls its descriptor together with the wake-up
//! descriptor of its thread.

use crate::abi::{Result, interrupted};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno as HostErrno;

/// Notifies a blocking call that its thread must come to a safepoint or stop.
pub trait Interrupt {
    /// Whether a request is pending.
    fn requested(&self) -> bool;

    /// A descriptor that is readable (level-triggered) while requested.
    fn wakeup(&self) -> BorrowedFd<'_>;
}

/// How a wait without an error ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    Ready,
    TimedOut,
    Interrupted,
}

const SECONDS_MAX: u64 = 24 * 3600;

/// Polls `fds` and the wake-up descriptor, at most `timeout_ns` (a longer one
/// than a day ends as `TimedOut` after a day: callers look at their clock).
/// Readiness wins over an interruption, so that no progress is thrown away.
/// With it come the events of each of `fds`.
pub(crate) fn wait(
    fds: &[PollFd<'_>],
    timeout_ns: Option<u64>,
    wakeup: BorrowedFd<'_>,
) -> Result<(Waited, Vec<PollFlags>), HostErrno> {
    let timeout = timeout_ns.map(|ns| Timespec {
        tv_sec: (ns / 1_000_000_000).min(SECONDS_MAX) as i64,
        tv_nsec: (ns % 1_000_000_000) as i64,
    });
    let mut polled = Vec::with_capacity(fds.len() + 1);
    polled.extend(fds.iter().cloned());
    polled.push(PollFd::from_borrowed_fd(wakeup, PollFlags::IN));
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) => {}
        // A signal is not an error: poll again.
        Err(HostErrno::INTR) => return Ok((Waited::TimedOut, vec![PollFlags::empty(); fds.len()])),
        Err(errno) => return Err(errno),
    }
    let mut events = polled.iter().map(PollFd::revents).collect::<Vec<_>>();
    let woken = events.pop().is_some_and(|events| !events.is_empty());
    let waited = if events.iter().any(|events| !events.is_empty()) {
        Waited::Ready
    } else if woken {
        Waited::Interrupted
    } else {
        Waited::TimedOut
    };
    Ok((waited, events))
}

/// Waits until `fd` has one of `events` (or an error or hang-up).
pub(crate) fn wait_for(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    interrupt: &dyn Interrupt,
) -> Result<(), WaitEnd> {
    loop {
        let fds = [PollFd::from_borrowed_fd(fd, events)];
        match wait(&fds, None, interrupt.wakeup()).map(|(waited, _)| waited) {
            Ok(Waited::Ready) => return Ok(()),
            Ok(Waited::Interrupted) => return Err(WaitEnd::Interrupted),
            Ok(Waited::TimedOut) => {}
            Err(errno) => return Err(WaitEnd::Host(errno)),
        }
    }
}

/// Why a wait for one descriptor ended without it being ready.
#[derive(Debug)]
pub(crate) enum WaitEnd {
    Interrupted,
    Host(HostErrno),
}

impl From<WaitEnd> for crate::abi::types::Error {
    fn from(end: WaitEnd) -> Self {
        match end {
            WaitEnd::Interrupted => interrupted(),
            WaitEnd::Host(errno) => errno.into(),
        }
    }
}

/// Whether `fd` has one of `events` now.
pub(crate) fn ready_now(fd: impl AsFd, events: PollFlags) -> Result<bool, HostErrno> {
    let mut fds = [PollFd::new(&fd, events)];
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut fds, Some(&zero)) {
        Ok(ready) => Ok(ready > 0),
        Err(HostErrno::INTR) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Repeats `operation` on a non-blocking descriptor until it does not say
/// `again`, waiting in between. With `nonblocking` it is tried just once.
pub(crate) fn retry<T>(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    nonblocking: bool,
    interrupt: &dyn Interrupt,
    mut operation: impl FnMut() -> Result<T, HostErrno>,
) -> Result<T> {
    loop {
        if !nonblocking {
            wait_for(fd, events, interrupt)?;
        }
        match operation() {
            Ok(value) => return Ok(value),
            Err(HostErrno::INTR) => {}
            Err(HostErrno::AGAIN) if !nonblocking => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
