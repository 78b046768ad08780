//! The guest's clocks: the host's plus offsets that are part of the snapshot, so that they never
//! run backwards over a move.

use rustix::time::{ClockId, Timespec, clock_getres, clock_gettime};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

/// The clocks of a host. Tests provide a settable one.
pub trait HostClock: Send + Sync {
    /// Nanoseconds since a fixed instant of this host; never decreases.
    fn monotonic_ns(&self) -> u64;

    /// Nanoseconds since 1970-01-01 UTC.
    fn realtime_ns(&self) -> u64;

    /// Smallest step of both clocks, in nanoseconds.
    fn resolution_ns(&self) -> u64 {
        1
    }
}

/// `CLOCK_MONOTONIC` and `CLOCK_REALTIME`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl HostClock for SystemClock {
    fn monotonic_ns(&self) -> u64 {
        nanoseconds(clock_gettime(ClockId::Monotonic))
    }

    fn realtime_ns(&self) -> u64 {
        nanoseconds(clock_gettime(ClockId::Realtime))
    }

    fn resolution_ns(&self) -> u64 {
        nanoseconds(clock_getres(ClockId::Monotonic)).max(1)
    }
}

fn nanoseconds(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

/// The clocks as the guest sees them.
pub(crate) struct GuestClock {
    host: Arc<dyn HostClock>,
    monotonic_offset_ns: i128,
    realtime_offset_ns: i128,
    /// Additional advance caused by other parts.
    advance_ns: AtomicU64,
    // Two threads may read concurrently, and a test's clock may be inconsistent.
    monotonic_seen_ns: AtomicU64,
}

impl GuestClock {
    /// Monotonic starts at 0, realtime is the host's.
    pub(crate) fn start(host: Arc<dyn HostClock>) -> Self {
        Self::resume(host, 0, 0)
    }

    /// The monotonic clock continues from the given reading; so does the realtime clock if the
    /// host's is behind it.
    pub(crate) fn resume(host: Arc<dyn HostClock>, monotonic_ns: u64, realtime_ns: u64) -> Self {
        let behind = i128::from(realtime_ns) - i128::from(host.realtime_ns());
        Self {
            monotonic_offset_ns: i128::from(monotonic_ns) - i128::from(host.monotonic_ns()),
            realtime_offset_ns: behind.max(0),
            advance_ns: AtomicU64::new(0),
            monotonic_seen_ns: AtomicU64::new(monotonic_ns),
            host,
        }
    }

    pub(crate) fn monotonic_ns(&self) -> u64 {
        let now = self
            .base_ns()
            .saturating_add(self.advance_ns.load(Ordering::Relaxed));
        self.monotonic_seen_ns
            .fetch_max(now, Ordering::Relaxed)
            .max(now)
    }

    fn base_ns(&self) -> u64 {
        shifted(self.host.monotonic_ns(), self.monotonic_offset_ns)
    }

    /// Advances the clock to a time observed elsewhere, from which it continues.
    pub(crate) fn advance_to(&self, monotonic_ns: u64) {
        let ahead = monotonic_ns.saturating_sub(self.base_ns());
        self.advance_ns.fetch_max(ahead, Ordering::Relaxed);
    }

    pub(crate) fn realtime_ns(&self) -> u64 {
        shifted(self.host.realtime_ns(), self.realtime_offset_ns)
    }

    pub(crate) fn resolution_ns(&self) -> u64 {
        self.host.resolution_ns()
    }
}

/// The guest's monotonic clock at a part other than the home: the host's clock plus the largest
/// offset that messages of other parts imply. So no part reads a time before that of an event that
/// it knows of (a logical clock as of Lamport); without messages it runs with the host's clock.
#[derive(Debug)]
pub struct CausalClock<C = SystemClock> {
    host: C,
    /// Offset to the host's clock.
    ahead_ns: AtomicI64,
    is_set: AtomicBool,
}

impl<C: HostClock> CausalClock<C> {
    /// A clock without observations.
    pub fn new(host: C) -> Self {
        CausalClock {
            host,
            ahead_ns: AtomicI64::new(i64::MIN),
            is_set: AtomicBool::new(false),
        }
    }

    /// Advances the clock to a time observed at another part.
    pub fn advance_to(&self, guest_ns: u64) {
        let ahead = i128::from(guest_ns) - i128::from(self.host.monotonic_ns());
        let ahead = i64::try_from(ahead).unwrap_or(i64::MAX);
        self.ahead_ns.fetch_max(ahead, Ordering::AcqRel);
        self.is_set.store(true, Ordering::Release);
    }

    /// The guest's clock in nanoseconds; zero before the first observation.
    pub fn monotonic_ns(&self) -> u64 {
        match self.is_set.load(Ordering::Acquire) {
            true => {
                let ahead = self.ahead_ns.load(Ordering::Acquire);
                shifted(self.host.monotonic_ns(), ahead.into())
            }
            false => 0,
        }
    }

    /// As [`Self::monotonic_ns`], for a guest; `None` before the first observation.
    pub fn reading(&self) -> Option<u64> {
        self.is_set
            .load(Ordering::Acquire)
            .then(|| self.monotonic_ns())
    }
}

fn shifted(time_ns: u64, offset_ns: i128) -> u64 {
    let time = i128::from(time_ns) + offset_ns;
    u64::try_from(time.max(0)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(u64, u64);

    impl HostClock for Fixed {
        fn monotonic_ns(&self) -> u64 {
            self.0
        }

        fn realtime_ns(&self) -> u64 {
            self.1
        }
    }

    #[test]
    fn what_was_seen_is_not_in_the_future() {
        struct Runs(Arc<AtomicU64>);
        impl HostClock for Runs {
            fn monotonic_ns(&self) -> u64 {
                self.0.load(Ordering::Relaxed)
            }
            fn realtime_ns(&self) -> u64 {
                0
            }
        }
        let host = Arc::new(AtomicU64::new(500));
        let home = GuestClock::resume(Arc::new(Runs(host.clone())), 70, 0);
        home.advance_to(60);
        assert_eq!(home.monotonic_ns(), 70);
        home.advance_to(90);
        assert_eq!(home.monotonic_ns(), 90);
        // It continues from there immediately.
        host.store(510, Ordering::Relaxed);
        assert_eq!(home.monotonic_ns(), 100);
        home.advance_to(95);
        assert_eq!(home.monotonic_ns(), 100);
        let other = CausalClock::new(Fixed(1_000_000, 0));
        assert_eq!((other.reading(), other.monotonic_ns()), (None, 0));
        // (Its host has been up for longer than the guest.)
        for (guest_ns, now) in [(90, 90), (80, 90), (300, 300)] {
            other.advance_to(guest_ns);
            assert_eq!(other.reading(), Some(now));
        }
        other.advance_to(u64::MAX);
        assert!(other.monotonic_ns() > 1 << 62);
    }

    #[test]
    fn never_backwards() {
        let start = GuestClock::start(Arc::new(Fixed(500, 1000)));
        assert_eq!((start.monotonic_ns(), start.realtime_ns()), (0, 1000));
        // A target host that booted later and whose wall clock is behind.
        let behind = GuestClock::resume(Arc::new(Fixed(3, 900)), 70, 1000);
        assert_eq!((behind.monotonic_ns(), behind.realtime_ns()), (70, 1000));
        let ahead = GuestClock::resume(Arc::new(Fixed(9999, 5000)), 70, 1000);
        assert_eq!((ahead.monotonic_ns(), ahead.realtime_ns()), (70, 5000));
        let extreme = GuestClock::resume(Arc::new(Fixed(0, 0)), u64::MAX, u64::MAX);
        assert_eq!(extreme.realtime_ns(), u64::MAX);
    }
}
