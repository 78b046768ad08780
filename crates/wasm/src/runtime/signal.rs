//! How a guest thread is asked to come to a safepoint: one flag, seen by
//! running code (the request word), by waiting code (a condition variable) and
//! by blocking system calls (an eventfd that becomes readable).

use crate::memory::Control;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// One per guest thread; outlives the instances that the thread runs in.
#[derive(Debug)]
pub struct Signal {
    requested: AtomicBool,
    stepping: AtomicBool,
    wakeup: OwnedFd,
    control: Mutex<Option<Arc<Control>>>,
    wait: Mutex<()>,
    woken: Condvar,
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
        })
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
        let end = timeout.map(|timeout| std::time::Instant::now() + timeout);
        while !done() && !self.is_requested() {
            match end.map(|end| end.saturating_duration_since(std::time::Instant::now())) {
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
