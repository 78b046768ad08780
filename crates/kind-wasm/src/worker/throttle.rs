//! The throttling of a guest whose dirty rate is too high for its move: its threads are stopped at
//! safepoints for a share of the time. When to throttle is decided by
//! `keel_machine::moves::convergence`.

use keel_wasm::runtime::{Hold, Machine};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Period of throttling a guest, and the largest share of it, in percent, for which the
/// guest is stopped.
const SLOW_PERIOD: Duration = Duration::from_millis(4);
const SLOW_PERCENT_MAX: u32 = 97;

/// Throttles a guest: its threads are stopped at safepoints for a share of the time.
pub(super) struct Throttle {
    machine: Machine,
    shared: Arc<ThrottleState>,
    thread: Option<JoinHandle<Option<Instant>>>,
}

#[derive(Default)]
struct ThrottleState {
    /// Share of the time in which the guest is stopped, in percent; `None` ends the
    /// throttling.
    percent: Mutex<Option<u32>>,
    changed: Condvar,
}

impl ThrottleState {
    fn locked(&self) -> MutexGuard<'_, Option<u32>> {
        self.percent
            .lock()
            .unwrap_or_else(|error| error.into_inner())
    }

    /// Sleeps; `false` if the end was signalled.
    fn sleep(&self, time: Duration) -> bool {
        let (percent, _) = self
            .changed
            .wait_timeout_while(self.locked(), time, |percent| percent.is_some())
            .unwrap_or_else(|error| error.into_inner());
        percent.is_some()
    }

    /// Stops and releases the guest periodically until the end; returns since when it is
    /// stopped then.
    fn keep(&self, machine: &Machine) -> Option<Instant> {
        loop {
            let percent = (*self.locked())?;
            let begun = Instant::now();
            if let Err(error) = machine.hold(Hold::Slowdown, None) {
                tracing::warn!(%error, "cannot throttle the machine");
                return None;
            }
            if !self.sleep(SLOW_PERIOD * percent / 100) {
                return Some(begun);
            }
            machine.release(Hold::Slowdown);
            if !self.sleep(SLOW_PERIOD * (100 - percent) / 100) {
                return None;
            }
        }
    }
}

impl Throttle {
    pub(super) fn new(machine: Machine) -> Self {
        Throttle {
            machine,
            shared: Arc::default(),
            thread: None,
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.thread.is_some()
    }

    pub(super) fn more(&mut self) {
        {
            let mut percent = self.shared.locked();
            // 50, 75, 87, 93, 96, 97
            let now = percent.unwrap_or(0);
            *percent = Some((now + (100 - now) / 2).min(SLOW_PERCENT_MAX));
        }
        if self.thread.is_some() {
            return;
        }
        let (machine, pace) = (self.machine.clone(), self.shared.clone());
        self.thread = std::thread::Builder::new()
            .name("throttle".into())
            .spawn(move || pace.keep(&machine))
            .ok();
    }

    /// Ends the throttling; threads that are stopped stay so, and the time since then is
    /// returned.
    pub(super) fn stop(&mut self) -> Option<Instant> {
        *self.shared.locked() = None;
        self.shared.changed.notify_all();
        // The thread only sleeps, stops and releases.
        self.thread.take()?.join().unwrap_or_default()
    }

    pub(super) fn release(&self) {
        self.machine.release(Hold::Slowdown);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.stop();
        self.release();
    }
}
