//! What a worker does about its node's lease. The machine of a node whose lease has ended may be
//! restarted on another node; so it stops in time, whatever its agent does, and whether or not this
//! process is given any processor time.
//!
//! ```text
//!   agent ── deadline ──▶ Guard ── arms ──▶ timer of the kernel: SIGKILL at the deadline
//!                           │
//!                           ├── 200 ms before the deadline: the machine is held at safepoints;
//!                           │   once nothing of it runs, the timer is disarmed
//!                           └── a later deadline: the timer is armed, the machine is released
//! ```
//!
//! Only machines with high availability are guarded ([`Guard::require`]); all others run on
//! without the store. Deadlines are on CLOCK_BOOTTIME, which no one sets. The agent sends one only
//! while it knows that the machine belongs to its node; a worker that has none holds its machine.
//!
//! A machine that holding does not make harmless (its process keeps locks that another node needs)
//! keeps the timer. If it came without one, because its start took longer than the lease, it gets one
//! after some seconds.
//!
//! A held machine is not lost: a node that is cut off for a moment goes on where it stopped, unless
//! the machine was restarted elsewhere meanwhile. Then its agent ends this process.

use super::Worker;
use keel_store::clock::boottime;
use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How long before its deadline a machine is held.
const HOLD_BEFORE: Duration = Duration::from_millis(200);
/// Pause before it is checked again whether a machine that is being held still runs.
const HELD_AGAIN_AFTER: Duration = Duration::from_millis(2);
/// How long a machine that is held without a timer may take until nothing of it runs.
const STILL_WITHIN: Duration = Duration::from_secs(5);
/// Longest pause of the guard; it is woken earlier by each change.
const REST: Duration = Duration::from_secs(3600);

/// Keeps a machine from running without a lease.
#[derive(Debug, Default)]
pub struct Guard {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lease: Lease,
    timer: Option<ProcessTimer>,
    /// When the deadline was sent, on CLOCK_BOOTTIME.
    sent: Duration,
    /// Whether the thread of the guard runs.
    is_watched: bool,
}

/// A timer of this process.
#[derive(Debug)]
struct ProcessTimer(Timer);

// SAFETY: a timer is named by an id that counts for the whole process (timer_create(2)), and the
// calls that use it are not bound to the thread that created it.
#[allow(unsafe_code)]
unsafe impl Send for ProcessTimer {}

/// The decisions, apart from their effects.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Lease {
    is_required: bool,
    /// When the lease ends, on CLOCK_BOOTTIME; `None` before the agent sent one.
    deadline: Option<Duration>,
    /// Whether the machine is held.
    is_held: bool,
    /// Whether nothing of it runs.
    is_still: bool,
    /// Whether it was resumed where [`Worker::hold_for_lease`] does not find it yet.
    is_hidden: bool,
    /// Whether the kernel kills the process at the deadline.
    is_armed: bool,
    /// Since when it is held without a timer although it is not still.
    unarmed_since: Option<Duration>,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Hold the machine; once nothing of it runs, disarm the timer.
    Hold,
    /// Let the kernel kill the process at once.
    Kill,
    /// Arm the timer for the deadline, then release the machine.
    Release(Duration),
    /// The lease does not matter any more: release the machine, disarm the timer.
    End,
    /// Nothing until this much later.
    Wait(Duration),
}

impl Lease {
    fn has_lapsed(&self, now: Duration) -> bool {
        let valid = |deadline: Duration| now + HOLD_BEFORE < deadline;
        self.is_required && !self.deadline.is_some_and(valid)
    }

    /// To be called once it was tried to hold the machine: whether nothing of it runs now.
    fn held(&mut self, is_still: bool, now: Duration) {
        self.is_still = is_still && !self.is_hidden;
        self.unarmed_since = match self.is_still || self.is_armed {
            true => None,
            false => self.unarmed_since.or(Some(now)),
        };
    }

    fn step(&self, now: Duration) -> Step {
        if !self.is_required {
            return match self.is_held || self.is_armed {
                true => Step::End,
                false => Step::Wait(REST),
            };
        }
        match self.deadline {
            Some(deadline) if !self.has_lapsed(now) => match self.is_held || !self.is_armed {
                true => Step::Release(deadline),
                false => Step::Wait(deadline.saturating_sub(HOLD_BEFORE + now)),
            },
            _ if self
                .unarmed_since
                .is_some_and(|since| now >= since + STILL_WITHIN) =>
            {
                Step::Kill
            }
            _ if !self.is_held || !self.is_still || self.is_armed => Step::Hold,
            _ => Step::Wait(REST),
        }
    }
}

impl State {
    /// Lets the kernel kill this process at a time on CLOCK_BOOTTIME.
    fn arm(&mut self, at: Duration) -> Result<(), nix::Error> {
        let timer = match &mut self.timer {
            Some(timer) => timer,
            none => {
                let kill = SigEvent::new(SigevNotify::SigevSignal {
                    signal: Signal::SIGKILL,
                    si_value: 0,
                });
                none.insert(ProcessTimer(Timer::new(ClockId::CLOCK_BOOTTIME, kill)?))
            }
        };
        let once = Expiration::OneShot(TimeSpec::from_duration(at));
        timer.0.set(once, TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
        self.lease.is_armed = true;
        Ok(())
    }

    fn disarm(&mut self) {
        // Dropping a timer deletes it.
        self.timer = None;
        self.lease.is_armed = false;
    }
}

impl Guard {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether the machine needs a lease. From the call on it is held until the agent sends a
    /// deadline.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn require<W: Worker>(
        &self,
        worker: &Arc<W>,
        is_required: bool,
    ) -> Result<(), String> {
        if is_required {
            // A machine that must be held at once cannot wait for what that needs.
            worker.prepare_move();
        }
        let mut state = self.state();
        state.lease.is_required = is_required;
        if is_required && !state.is_watched {
            let worker = Arc::downgrade(worker);
            std::thread::Builder::new()
                .name("lease".into())
                .spawn(move || watch(&worker))
                .map_err(|error| format!("no thread that watches the lease: {error}"))?;
            state.is_watched = true;
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The node's lease holds until `deadline` on CLOCK_BOOTTIME, as its agent asked at `sent`
    /// ([`LeaseDeadline`]). No effect if a deadline that was asked for later is known.
    ///
    /// [`LeaseDeadline`]: super::control::LeaseDeadline
    ///
    /// # Errors
    /// If the kernel has no timer for this process: the machine stays held then. If the deadline is
    /// over already, and a later one that is not was known: that one stays.
    pub(super) fn extend(&self, deadline: Duration, sent: Duration) -> Result<(), String> {
        let mut state = self.state();
        if !sent.is_zero() {
            if sent < state.sent {
                return Ok(());
            }
            let is_over = deadline <= boottime() + HOLD_BEFORE;
            if is_over && state.lease.deadline.is_some_and(|known| deadline < known) {
                return Err("the deadline is over: it arrived late".into());
            }
            state.sent = sent;
        }
        if state.lease.is_required && state.lease.is_armed {
            // At once: the deadline that was armed before may be near.
            let armed = state.arm(deadline);
            armed.map_err(|error| format!("no timer for the end of the lease: {error}"))?;
        }
        state.lease.deadline = Some(deadline);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Runs `resume` so that the machine does not run where it has no lease: `hold` is called first
    /// where that is so. [`Self::machine_changed`] must follow.
    pub fn resume<T>(&self, hold: impl FnOnce(), resume: impl FnOnce() -> T) -> T {
        let mut state = self.state();
        let lease = state.lease;
        let may_run = lease.is_armed && !lease.is_held && !lease.has_lapsed(boottime());
        if lease.is_required && !may_run {
            hold();
        }
        // Until it is found, the timer stays armed.
        state.lease.is_hidden = true;
        resume()
    }

    /// To be called after a machine was put where [`Worker::hold_for_lease`] finds it: brings it
    /// into the state that the lease demands.
    pub fn machine_changed<W: Worker>(&self, worker: &W) {
        let mut state = self.state();
        state.lease.is_hidden = false;
        if !state.lease.is_required {
            return;
        }
        // The thread arms the timer before the machine runs on.
        state.lease.is_held |= !state.lease.is_armed;
        match state.lease.is_held {
            true => {
                let is_still = worker.hold_for_lease();
                state.lease.held(is_still, boottime());
            }
            false => worker.release_for_lease(),
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// Watches the deadline until the worker ends.
fn watch<W: Worker>(worker: &Weak<W>) {
    while let Some(worker) = worker.upgrade() {
        let guard = worker.process().lease();
        let mut state = guard.state();
        let rest = match state.lease.step(boottime()) {
            Step::Wait(rest) => rest,
            Step::Hold => {
                if !state.lease.is_held {
                    tracing::warn!("this node's lease ends: the machine is held");
                }
                state.lease.is_held = true;
                state.lease.is_still = false;
                drop(state);
                // Without the lock: a deadline that arrives meanwhile must be armed at once.
                let is_still = worker.hold_for_lease();
                state = guard.state();
                state.lease.held(is_still, boottime());
                if state.lease.is_still && state.lease.has_lapsed(boottime()) {
                    state.disarm();
                    continue;
                }
                HELD_AGAIN_AFTER
            }
            Step::Kill => {
                tracing::warn!("the machine cannot be held without a lease: it ends");
                if let Err(error) = state.arm(boottime()) {
                    tracing::error!(%error, "no timer that ends it");
                }
                REST
            }
            Step::Release(deadline) => match state.arm(deadline) {
                Ok(()) => {
                    state.lease.is_held = false;
                    state.lease.unarmed_since = None;
                    worker.release_for_lease();
                    continue;
                }
                Err(error) => {
                    tracing::error!(%error, "no timer for the end of the lease: the machine is held");
                    REST
                }
            },
            Step::End => {
                state.disarm();
                state.lease.is_held = false;
                worker.release_for_lease();
                continue;
            }
        };
        drop(
            guard
                .changed
                .wait_timeout(state, rest)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn required(deadline: Option<u64>, is_held: bool, is_armed: bool) -> Lease {
        Lease {
            is_required: true,
            deadline: deadline.map(ms),
            is_held,
            is_still: is_held,
            is_hidden: false,
            is_armed,
            unarmed_since: None,
        }
    }

    /// A request of an agent that has ended may be read after those of the next one.
    #[test]
    fn an_earlier_deadline_never_replaces_a_later_one() {
        let (guard, now) = (Guard::default(), boottime());
        let told = |deadline, sent| {
            let told = guard.extend(now + ms(deadline), ms(sent));
            let left = guard.state().lease.deadline.map(|it| it - now);
            (told.is_ok(), left)
        };
        assert_eq!(told(60_000, 5), (true, Some(ms(60_000))));
        assert_eq!(told(11_500, 7), (true, Some(ms(11_500))));
        assert_eq!(told(60_000, 6), (true, Some(ms(11_500))));
        assert_eq!(told(11_800, 7), (true, Some(ms(11_800))));
        // It would kill a machine that runs under the known one.
        assert_eq!(told(100, 8), (false, Some(ms(11_800))));
        // Of an agent that does not say when: in the order of arrival.
        assert_eq!(told(11_600, 0), (true, Some(ms(11_600))));
    }

    #[test]
    fn a_machine_without_a_deadline_is_held() {
        assert_eq!(required(None, false, false).step(ms(5)), Step::Hold);
        assert_eq!(required(None, true, false).step(ms(5)), Step::Wait(REST));
    }

    #[test]
    fn it_runs_until_200_ms_before_the_deadline() {
        let lease = required(Some(1500), false, true);
        assert_eq!(lease.step(ms(300)), Step::Wait(ms(1000)));
        assert_eq!(lease.step(ms(1299)), Step::Wait(ms(1)));
        assert_eq!(lease.step(ms(1300)), Step::Hold);
        assert_eq!(lease.step(ms(9999)), Step::Hold);
    }

    /// The timer stays armed until nothing of the machine runs.
    #[test]
    fn holding_goes_on_until_the_timer_is_disarmed() {
        assert_eq!(required(Some(1500), true, true).step(ms(1400)), Step::Hold);
        let mut lease = required(Some(1500), true, false);
        assert_eq!(lease.step(ms(1400)), Step::Wait(REST));
        // A machine that came meanwhile does not stand still yet.
        lease.is_still = false;
        assert_eq!(lease.step(ms(1400)), Step::Hold);
    }

    /// Its start took longer than the lease, and its process keeps locks while it is held.
    #[test]
    fn a_machine_that_is_not_still_without_a_timer_ends() {
        let mut lease = required(Some(1500), true, false);
        lease.held(false, ms(2000));
        lease.held(false, ms(3000));
        assert_eq!(lease.step(ms(6999)), Step::Hold);
        assert_eq!(lease.step(ms(7000)), Step::Kill);
        let renewed = Lease {
            deadline: Some(ms(9000)),
            ..lease
        };
        assert_eq!(renewed.step(ms(7000)), Step::Release(ms(9000)));
        lease.held(true, ms(7000));
        assert_eq!(lease.step(ms(9999)), Step::Wait(REST));
        // With a timer the kernel ends it at the deadline.
        let mut armed = required(Some(1500), true, true);
        armed.held(false, ms(1400));
        assert_eq!(armed.step(ms(6999)), Step::Hold);
    }

    #[test]
    fn a_later_deadline_releases_it() {
        let lease = required(Some(3000), true, false);
        assert_eq!(lease.step(ms(1600)), Step::Release(ms(3000)));
        // Also one that was never held runs only with an armed timer.
        let lease = required(Some(3000), false, false);
        assert_eq!(lease.step(ms(1600)), Step::Release(ms(3000)));
    }

    #[test]
    fn a_machine_that_needs_no_lease_is_not_held() {
        let mut lease = required(None, true, true);
        lease.is_required = false;
        assert_eq!(lease.step(ms(5)), Step::End);
        assert_eq!(Lease::default().step(ms(5)), Step::Wait(REST));
    }

    /// Also a process that gets no processor time is killed: that is what the kernel's timer is
    /// for.
    #[test]
    fn the_kernel_kills_a_stopped_process_at_the_deadline() {
        const CHILD: &str = "KEEL_TEST_LEASE_CHILD";
        if std::env::var_os(CHILD).is_some() {
            let mut state = State::default();
            state.arm(boottime() + ms(300)).unwrap();
            println!("armed");
            loop {
                std::thread::park();
            }
        }
        use std::io::BufRead;
        use std::os::unix::process::ExitStatusExt;
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("worker::lease::tests::the_kernel_kills_a_stopped_process_at_the_deadline")
            .env(CHILD, "1")
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let output = std::io::BufReader::new(child.stdout.take().unwrap());
        let armed = output
            .lines()
            .map_while(Result::ok)
            .any(|line| line.contains("armed"));
        assert!(armed);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
    }
}
