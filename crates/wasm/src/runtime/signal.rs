//! How a guest thread is asked to come to a safepoint: one flag, seen by
//! running code (the request word), by waiting code (a condition variable) and
//! by blocking system calls (an eventfd that becomes readable).

use crate::memory::Control;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// One per guest thread; outlives the instances that the thread runs in.
#[derive(Debug)]
pub struct Signal {
    requested: AtomicBool,
    stepping: AtomicBool,
    wakeup: OwnedFd,
    control: Mutex<Option<Arc<Control>>>,
    wait: Mutex<()>,
    woken: Condvar,
    /// When its code was entered and left last: nanoseconds since [`begun`].
    entered: AtomicU64,
    left: AtomicU64,
}

/// What times of this process are counted from.
fn begun() -> Instant {
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    *BEGUN.get_or_init(Instant::now)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
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

    /// Its code runs from now on.
    pub(super) fn note_entered(&self) {
        let now = u64::try_from(begun().elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.entered.store(now, Ordering::Relaxed);
    }

    pub(super) fn note_left(&self) {
        let now = u64::try_from(begun().elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.left.store(now, Ordering::Relaxed);
    }

    /// When its code was entered last and left last at a safepoint, in nanoseconds since
    /// some moment that is the same in all of this process; 0 for never. For measuring.
    pub fn ran(&self) -> (u64, u64) {
        let of = |time: &AtomicU64| time.load(Ordering::Relaxed);
        (of(&self.entered), of(&self.left))
    }

    /// Names the control memory of the instance that the thread now runs in.
    pub fn attach(&self, control: &Arc<Control>) {
        let mut current = locked(&self.control);
        control.set_request(self.leave());
        *current = Some(control.clone());
    }

    /// Asks the thread to come to a safepoint.
    pub fn request(&self) {
        let control = locked(&self.control);
        self.requested.store(true, Ordering::SeqCst);
        if let Some(control) = &*control {
            control.set_request(true);
        }
        // A full counter is readable all the same.
        let _ = rustix::io::write(&self.wakeup, &1u64.to_ne_bytes());
        drop(control);
        let _waiting = locked(&self.wait);
        self.woken.notify_all();
    }

    /// Takes the request back.
    pub fn clear(&self) {
        let control = locked(&self.control);
        self.requested.store(false, Ordering::SeqCst);
        if let Some(control) = &*control {
            control.set_request(self.is_stepping());
        }
        let _ = rustix::io::read(&self.wakeup, &mut [0; 8]);
    }

    /// While set, the thread leaves at every single safepoint: for testing
    /// every point of a program.
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

    /// Whether it is to leave at the next safepoint.
    pub(crate) fn leave(&self) -> bool {
        self.is_requested() || self.is_stepping()
    }

    /// Whether it is asked to.
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Blocks until `done` says so, the request comes, or `timeout` is over.
    /// Whoever makes `done` true calls [`Self::wake`] afterwards.
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

    /// Blocks until `done` says so, whatever is requested.
    pub(crate) fn wait_for(&self, done: impl Fn() -> bool) {
        let mut waiting = locked(&self.wait);
        while !done() {
            waiting = self
                .woken
                .wait(waiting)
                .unwrap_or_else(|error| error.into_inner());
        }
    }

    /// Lets [`Self::park`] look again.
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
