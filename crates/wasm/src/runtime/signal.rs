//! Safepoint requests to a guest thread: one flag, seen by running code (the request word), by
//! waiting code (a condition variable) and by blocking system calls (a readable eventfd).

use super::lock::locked;
use crate::memory::Control;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// One per guest thread; outlives its instances.
#[derive(Debug)]
pub struct Signal {
    requested: AtomicBool,
    stepping: AtomicBool,
    wakeup: OwnedFd,
    control: Mutex<Option<Arc<Control>>>,
    wait: Mutex<()>,
    woken: Condvar,
    /// Times of the last entry to and exit from guest code, in nanoseconds since [`begun`].
    entered: AtomicU64,
    left: AtomicU64,
}

/// Reference time of this process.
fn begun() -> Instant {
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    *BEGUN.get_or_init(Instant::now)
}

impl Signal {
    /// A signal without a request.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Signal {
            requested: AtomicBool::new(false),
            stepping: AtomicBool::new(false),
            wakeup: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            control: Mutex::new(None),
            wait: Mutex::new(()),
            woken: Condvar::new(),
            entered: AtomicU64::new(0),
            left: AtomicU64::new(0),
        })
    }

    /// Records the entry to guest code.
    pub(super) fn note_entered(&self) {
        let now = u64::try_from(begun().elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.entered.store(now, Ordering::Relaxed);
    }

    pub(super) fn note_left(&self) {
        let now = u64::try_from(begun().elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.left.store(now, Ordering::Relaxed);
    }

    /// Times of the last entry to guest code and of the last exit at a safepoint, in nanoseconds
    /// since a fixed moment of this process; 0 for never. For benchmarks.
    pub fn ran(&self) -> (u64, u64) {
        let of = |time: &AtomicU64| time.load(Ordering::Relaxed);
        (of(&self.entered), of(&self.left))
    }

    /// Sets the control memory of the thread's current instance.
    pub fn attach(&self, control: &Arc<Control>) {
        let mut current = locked(&self.control);
        control.set_request(self.leave());
        *current = Some(control.clone());
    }

    /// Requests a safepoint.
    pub fn request(&self) {
        let control = locked(&self.control);
        self.requested.store(true, Ordering::SeqCst);
        if let Some(control) = &*control {
            control.set_request(true);
        }
        // The eventfd is readable also with a full counter.
        let _ = rustix::io::write(&self.wakeup, &1u64.to_ne_bytes());
        drop(control);
        let _waiting = locked(&self.wait);
        self.woken.notify_all();
    }

    /// Cancels the request.
    pub fn clear(&self) {
        let control = locked(&self.control);
        self.requested.store(false, Ordering::SeqCst);
        if let Some(control) = &*control {
            control.set_request(self.is_stepping());
        }
        let _ = rustix::io::read(&self.wakeup, &mut [0; 8]);
    }

    /// While set, the thread leaves at every safepoint, for tests.
    pub fn step(&self, stepping: bool) {
        let control = locked(&self.control);
        self.stepping.store(stepping, Ordering::SeqCst);
        if let Some(control) = &*control {
            control.set_request(self.leave());
        }
    }

    /// Whether it leaves at every safepoint.
    pub fn is_stepping(&self) -> bool {
        self.stepping.load(Ordering::SeqCst)
    }

    /// Whether it leaves at the next safepoint.
    pub(crate) fn leave(&self) -> bool {
        self.is_requested() || self.is_stepping()
    }

    /// Whether a safepoint is requested.
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Blocks until `done` returns true, a safepoint is requested, or `timeout` expires. Code that
    /// makes `done` true must call [`Self::wake`] afterwards.
    pub fn park(&self, timeout: Option<Duration>, done: impl Fn() -> bool) {
        let mut waiting = locked(&self.wait);
        let end = timeout.map(|timeout| Instant::now() + timeout);
        while !done() && !self.is_requested() {
            match end.map(|end| end.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return,
                Some(rest) => {
                    waiting = self
                        .woken
                        .wait_timeout(waiting, rest)
                        .unwrap_or_else(|error| error.into_inner())
                        .0;
                }
                None => {
                    waiting = self
                        .woken
                        .wait(waiting)
                        .unwrap_or_else(|error| error.into_inner());
                }
            }
        }
    }

    /// Blocks until `done` returns true, regardless of requests.
    pub(crate) fn wait_for(&self, done: impl Fn() -> bool) {
        let mut waiting = locked(&self.wait);
        while !done() {
            waiting = self
                .woken
                .wait(waiting)
                .unwrap_or_else(|error| error.into_inner());
        }
    }

    /// Makes [`Self::park`] check its condition again.
    pub fn wake(&self) {
        let _waiting = locked(&self.wait);
        self.woken.notify_all();
    }
}

impl keel_wasi::Interrupt for Signal {
    fn requested(&self) -> bool {
        self.is_requested()
    }

    fn wakeup(&self) -> BorrowedFd<'_> {
        self.wakeup.as_fd()
    }
}
