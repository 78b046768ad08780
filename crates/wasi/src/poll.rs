//! `poll_oneoff`: clocks, files (always ready), streams and sockets in one wait. A subscription
//! that cannot be waited for produces an event with an error, not an error of the call.

use crate::abi::{Result, interrupted, types};
use crate::descriptor::{Descriptor, Kind};
use crate::lock::locked;
use crate::outcome::CallState;
use crate::state::Wasi;
use crate::wait::{Interrupt, Waited, wait};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno as HostErrno;
use std::sync::Arc;
use types::{
    Clockid, Errno, Event, EventFdReadwrite, Eventrwflags, Eventtype, Rights, Subclockflags,
    Subscription, SubscriptionClock, SubscriptionU,
};

enum Watch {
    Monotonic { deadline_ns: u64 },
    Realtime { deadline_ns: u64 },
    Descriptor(Arc<Descriptor>, Direction),
    Failed(Eventtype, Errno),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

impl Direction {
    fn event_type(self) -> Eventtype {
        match self {
            Self::Read => Eventtype::FdRead,
            Self::Write => Eventtype::FdWrite,
        }
    }

    fn poll_flags(self) -> PollFlags {
        match self {
            Self::Read => PollFlags::IN,
            Self::Write => PollFlags::OUT,
        }
    }
}

impl Wasi {
    /// Waits for the first of `subscriptions`; returns all that are due.
    pub(crate) fn poll(
        &self,
        subscriptions: &[Subscription],
        state: &mut CallState,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<Event>> {
        let started_ns = *state
            .started_ns
            .get_or_insert_with(|| self.clock.monotonic_ns());
        let watches = subscriptions
            .iter()
            .map(|subscription| self.watch(&subscription.u, started_ns))
            .collect::<Vec<_>>();
        let mut waited = Vec::new();
        let mut places = vec![None; watches.len()];
        for (place, watch) in places.iter_mut().zip(&watches) {
            if let Some((fd, flags)) = self.waits_on(watch) {
                *place = Some(waited.len());
                waited.push(PollFd::from_borrowed_fd(fd, flags));
            }
        }
        let ready_at_once = watches.iter().any(|watch| match watch {
            Watch::Failed(..) => true,
            Watch::Descriptor(..) => self.waits_on(watch).is_none(),
            Watch::Monotonic { .. } | Watch::Realtime { .. } => false,
        });
        loop {
            let left = if ready_at_once {
                Some(0)
            } else {
                watches.iter().filter_map(|watch| self.left_ns(watch)).min()
            };
            let (outcome, ready) = wait(&waited, left, interrupt.wakeup())?;
            let events = subscriptions
                .iter()
                .zip(watches.iter().zip(&places))
                .filter_map(|(subscription, (watch, place))| {
                    let flags = place.map(|place| ready[place]);
                    self.event(subscription.userdata, watch, flags)
                })
                .collect::<Vec<_>>();
            if !events.is_empty() {
                return Ok(events);
            }
            if outcome == Waited::Interrupted {
                return Err(interrupted());
            }
        }
    }

    fn watch(&self, subscription: &SubscriptionU, started_ns: u64) -> Watch {
        let (fd, direction) = match subscription {
            SubscriptionU::Clock(clock) => return watch_clock(clock, started_ns),
            SubscriptionU::FdRead(what) => (what.file_descriptor, Direction::Read),
            SubscriptionU::FdWrite(what) => (what.file_descriptor, Direction::Write),
        };
        let failed = |errno| Watch::Failed(direction.event_type(), errno);
        let Ok(descriptor) = locked(&self.table).get(fd.into()) else {
            return failed(Errno::Badf);
        };
        if descriptor.require(Rights::POLL_FD_READWRITE).is_err() {
            return failed(Errno::Notcapable);
        }
        let fits = match &descriptor.kind {
            Kind::Stdin | Kind::Listener(_) => direction == Direction::Read,
            Kind::Stdout | Kind::Stderr => direction == Direction::Write,
            Kind::Directory(_) => false,
            Kind::File(_) | Kind::Connection(_) => true,
        };
        if !fits {
            return failed(Errno::Badf);
        }
        if socket_fd(&descriptor, direction).is_some_and(|fd| fd.is_err()) {
            return failed(Errno::Nfile);
        }
        Watch::Descriptor(descriptor, direction)
    }

    /// The host descriptor to wait on; `None` for what is always ready.
    fn waits_on<'w>(&'w self, watch: &'w Watch) -> Option<(BorrowedFd<'w>, PollFlags)> {
        let Watch::Descriptor(descriptor, direction) = watch else {
            return None;
        };
        let fd = match &descriptor.kind {
            Kind::Stdin => self.stdin.poll_fd(),
            Kind::Stdout => self.stdout.poll_fd(),
            Kind::Stderr => self.stderr.poll_fd(),
            Kind::File(file) => file.stream().map(AsFd::as_fd),
            Kind::Listener(_) | Kind::Connection(_) => {
                let fd = socket_fd(descriptor, *direction)?.ok()?;
                return Some((fd, PollFlags::IN));
            }
            Kind::Directory(_) => None,
        };
        Some((fd?, direction.poll_flags()))
    }

    /// Nanoseconds until a clock is due; `None` for other subscriptions.
    fn left_ns(&self, watch: &Watch) -> Option<u64> {
        match watch {
            Watch::Monotonic { deadline_ns } => {
                Some(deadline_ns.saturating_sub(self.clock.monotonic_ns()))
            }
            Watch::Realtime { deadline_ns } => {
                Some(deadline_ns.saturating_sub(self.clock.realtime_ns()))
            }
            Watch::Descriptor(..) | Watch::Failed(..) => None,
        }
    }

    /// The event, if `watch` is due. `flags` are poll's results.
    fn event(&self, userdata: u64, watch: &Watch, flags: Option<PollFlags>) -> Option<Event> {
        let (type_, error, nbytes, hangup) = match watch {
            Watch::Failed(type_, errno) => (*type_, *errno, 0, false),
            Watch::Monotonic { .. } | Watch::Realtime { .. } => {
                if self.left_ns(watch) != Some(0) {
                    return None;
                }
                (Eventtype::Clock, Errno::Success, 0, false)
            }
            Watch::Descriptor(descriptor, direction) => {
                if flags.is_some_and(|flags| flags.is_empty()) {
                    return None;
                }
                let (nbytes, hangup) = self.ready_bytes(descriptor, *direction, flags)?;
                (direction.event_type(), Errno::Success, nbytes, hangup)
            }
        };
        let mut rw_flags = Eventrwflags::empty();
        rw_flags.set(Eventrwflags::FD_READWRITE_HANGUP, hangup);
        Some(Event {
            userdata,
            error,
            type_,
            fd_readwrite: EventFdReadwrite {
                nbytes,
                flags: rw_flags,
            },
        })
    }

    /// How many bytes a ready descriptor has (at least 1 for writing), and whether it is at its
    /// end; `None` if another thread was faster, and it is not ready any more.
    fn ready_bytes(
        &self,
        descriptor: &Descriptor,
        direction: Direction,
        flags: Option<PollFlags>,
    ) -> Option<(u64, bool)> {
        let ended = |flags: PollFlags| flags.intersects(PollFlags::HUP | PollFlags::ERR);
        let hung_up = flags.is_some_and(ended);
        if direction == Direction::Write {
            return match &descriptor.kind {
                Kind::Connection(open) => Some((1, open.connection.ready_to_write()?)),
                _ => Some((1, hung_up)),
            };
        }
        Some(match &descriptor.kind {
            Kind::Stdin => {
                let bytes = self.stdin.available_bytes();
                (bytes, bytes == 0)
            }
            Kind::File(file) => match file.stream() {
                Some(stream) => {
                    let bytes = rustix::io::ioctl_fionread(stream).unwrap_or(1);
                    (bytes, bytes == 0 && hung_up)
                }
                None => {
                    let size = file.data.size().unwrap_or(0);
                    let bytes = size.saturating_sub(*locked(&file.offset));
                    (bytes, bytes == 0)
                }
            },
            Kind::Connection(open) => open.connection.ready_to_read()?,
            Kind::Listener(listener) => {
                if !listener.backlog.is_ready() {
                    return None;
                }
                (1, false)
            }
            Kind::Stdout | Kind::Stderr | Kind::Directory(_) => (0, false),
        })
    }
}

/// What is readable while a socket is ready; `None` for other descriptors.
fn socket_fd(
    descriptor: &Descriptor,
    direction: Direction,
) -> Option<Result<BorrowedFd<'_>, HostErrno>> {
    match (&descriptor.kind, direction) {
        (Kind::Listener(listener), _) => Some(listener.backlog.ready_fd()),
        (Kind::Connection(open), Direction::Read) => Some(open.connection.readable_fd()),
        (Kind::Connection(open), Direction::Write) => Some(open.connection.writable_fd()),
        _ => None,
    }
}

fn watch_clock(clock: &SubscriptionClock, started_ns: u64) -> Watch {
    let absolute = clock
        .flags
        .contains(Subclockflags::SUBSCRIPTION_CLOCK_ABSTIME);
    let timeout = clock.timeout;
    match (clock.id, absolute) {
        (Clockid::Monotonic, true) => Watch::Monotonic {
            deadline_ns: timeout,
        },
        (Clockid::Realtime, true) => Watch::Realtime {
            deadline_ns: timeout,
        },
        // A relative time-out is not affected by setting the clock.
        (Clockid::Monotonic | Clockid::Realtime, false) => Watch::Monotonic {
            deadline_ns: started_ns.saturating_add(timeout),
        },
        (Clockid::ProcessCputimeId | Clockid::ThreadCputimeId, _) => {
            Watch::Failed(Eventtype::Clock, Errno::Inval)
        }
    }
}
