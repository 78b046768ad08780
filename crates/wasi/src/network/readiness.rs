//! What a blocking call or `poll_oneoff` waits on: a descriptor of the host that is readable while
//! a condition holds.

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno as HostErrno;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// A condition, as a descriptor. The descriptor is made when somebody first waits: most connections
/// of a busy server never need one. The owner's lock is held in all calls.
#[derive(Debug, Default)]
pub(super) struct Readiness {
    fd: OnceLock<OwnedFd>,
    /// Whether the descriptor is readable.
    raised: AtomicBool,
}

impl Readiness {
    /// Says whether the condition holds.
    pub(super) fn set(&self, holds: bool) {
        let Some(fd) = self.fd.get() else { return };
        if self.raised.load(Ordering::Relaxed) == holds {
            return;
        }
        // An eventfd refuses to be raised only at its largest value, and to be lowered only at 0.
        let done = if holds {
            rustix::io::write(fd, &1_u64.to_ne_bytes())
        } else {
            rustix::io::read(fd, &mut [0; 8])
        };
        if done.is_ok() {
            self.raised.store(holds, Ordering::Relaxed);
        }
    }

    /// The descriptor, readable if the condition holds now.
    ///
    /// # Errors
    /// The host's, where it has no descriptor left.
    pub(super) fn fd(&self, holds: bool) -> Result<BorrowedFd<'_>, HostErrno> {
        let fd = match self.fd.get() {
            Some(fd) => fd,
            None => {
                let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                self.fd.get_or_init(|| made)
            }
        };
        self.set(holds);
        Ok(fd.as_fd())
    }
}
