//! Enforces a machine's `cpu.limit`: samples the CPU time of its threads every few milliseconds,
//! and holds the CPU-bound ones at a safepoint while the machine exceeds its share. Waiting threads
//! and the process's other threads are not held: a limited machine moves as fast as any.
//!
//! [`Budget`] (a token bucket) decides, [`govern`] acts. Holding is implemented by `machine`.

use super::machine::{Hold, Machine, Shared};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Weak;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(10);
/// Burst after idling, as time at the limit.
const BURST: Duration = Duration::from_millis(50);

/// CPU time of one OS thread of this process.
#[derive(Debug)]
pub(crate) struct ThreadClock {
    pub(crate) os_thread: u32,
    schedstat: File,
    stat: File,
}

impl ThreadClock {
    /// The clock of the calling thread; `None` where /proc has no `schedstat`.
    pub(crate) fn of_this_thread() -> Option<Self> {
        let clock = ThreadClock {
            os_thread: rustix::thread::gettid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs(),
            schedstat: File::open("/proc/thread-self/schedstat").ok()?,
            stat: File::open("/proc/thread-self/stat").ok()?,
        };
        clock.run_ns().map(|_| clock)
    }

    /// Run time so far, in nanoseconds.
    pub(super) fn run_ns(&self) -> Option<u64> {
        let mut buffer = [0; 64];
        numbers(&self.schedstat, &mut buffer)?.next()?
    }

    /// CPU time so far.
    pub(crate) fn cpu_time(&self) -> Option<CoreTime> {
        let mut buffer = [0; 64];
        let mut numbers = numbers(&self.schedstat, &mut buffer)?;
        let mut next = || numbers.next().flatten();
        let (run_ns, waited_ns, turns) = (next()?, next()?, next()?);
        let mut buffer = [0; 64];
        let count = self.stat.read_at(&mut buffer, 0).ok()?;
        // The state follows the name, which is in parentheses.
        let text = buffer.get(..count)?;
        let name_end = text.iter().rposition(|byte| *byte == b')')?;
        Some(CoreTime {
            run_ns,
            waited_ns,
            turns,
            is_runnable: text.get(name_end + 2) == Some(&b'R'),
        })
    }
}

fn numbers<'a>(
    file: &File,
    buffer: &'a mut [u8],
) -> Option<impl Iterator<Item = Option<u64>> + 'a> {
    let count = file.read_at(buffer, 0).ok()?;
    let text = std::str::from_utf8(buffer.get(..count)?).ok()?;
    Some(text.split_ascii_whitespace().map(|word| word.parse().ok()))
}

/// CPU time since the start of the OS thread, which may have hosted other guest threads before:
/// only differences are meaningful.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreTime {
    /// Run time, in nanoseconds.
    pub run_ns: u64,
    /// Completed waits for a core, in nanoseconds.
    pub waited_ns: u64,
    pub turns: u64,
    /// Whether it is running or runnable.
    pub is_runnable: bool,
}

/// Token bucket of a machine.
#[derive(Debug, Default)]
struct Budget {
    /// Nanoseconds of CPU time available; negative above the share.
    tokens: i64,
    holding: bool,
}

/// Action of the governor.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Nothing,
    /// Hold these threads.
    Hold(Vec<u32>),
    /// Release all threads.
    Release,
}

impl Budget {
    /// `used` is the run time of each thread in the last `elapsed_ns`; the limit is in thousandths
    /// of a core.
    fn tick(&mut self, elapsed_ns: u64, limit_millis: u32, used: &[(u32, u64)]) -> Verdict {
        let share = |ns: u64| {
            let ns = u128::from(ns) * u128::from(limit_millis) / 1000;
            i64::try_from(ns).unwrap_or(i64::MAX)
        };
        let spent: u64 = used.iter().map(|(_, ns)| ns).sum();
        let spent = i64::try_from(spent).unwrap_or(i64::MAX);
        self.tokens = self
            .tokens
            .saturating_add(share(elapsed_ns))
            .saturating_sub(spent)
            .min(share(BURST.as_nanos() as u64));
        if self.tokens < 0 {
            self.holding = true;
            let burners = used.iter().filter(|(_, ns)| *ns > 0);
            Verdict::Hold(burners.map(|(tid, _)| *tid).collect())
        } else if std::mem::take(&mut self.holding) {
            Verdict::Release
        } else {
            Verdict::Nothing
        }
    }
}

/// Enforces a machine's limit until it ends; runs in its own thread.
pub(super) fn govern(shared: Weak<Shared>) {
    let mut budget = Budget::default();
    let mut before: Vec<(u32, u64)> = Vec::new();
    let mut last = Instant::now();
    loop {
        std::thread::sleep(TICK);
        let Some(machine) = shared.upgrade().map(Machine::of) else {
            return;
        };
        let Some((limit, now)) = machine.usage() else {
            return;
        };
        let elapsed = last.elapsed();
        last = Instant::now();
        let used: Vec<(u32, u64)> = now
            .iter()
            .map(|(tid, ns)| {
                let earlier = before.iter().find(|(old, _)| old == tid);
                (*tid, ns.saturating_sub(earlier.map_or(0, |(_, ns)| *ns)))
            })
            .collect();
        before = now;
        let elapsed = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        match budget.tick(elapsed, limit, &used) {
            Verdict::Nothing => {}
            Verdict::Release => machine.release(Hold::CpuLimit),
            Verdict::Hold(tids) => {
                // The first hold compiles; the threads run meanwhile.
                if let Err(error) = machine.hold(Hold::CpuLimit, Some(&tids)) {
                    tracing::warn!(%error, "cpu.limit cannot be enforced");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn within_the_limit_nobody_is_held() {
        let mut budget = Budget::default();
        for _ in 0..1000 {
            assert_eq!(budget.tick(10 * MS, 500, &[(0, 5 * MS)]), Verdict::Nothing);
        }
    }

    #[test]
    fn only_burners_are_held_and_only_as_long_as_needed() {
        let mut budget = Budget::default();
        let used = [(0, 10 * MS), (1, 0), (2, 10 * MS)];
        assert_eq!(budget.tick(10 * MS, 1000, &used), Verdict::Hold(vec![0, 2]));
        assert_eq!(budget.tick(10 * MS, 1000, &[(0, 0)]), Verdict::Release);
        assert_eq!(budget.tick(10 * MS, 1000, &[(0, 0)]), Verdict::Nothing);
    }

    #[test]
    fn what_it_runs_is_its_share_over_time() {
        for limit in [50u32, 250, 900, 1500] {
            let (mut budget, mut held, mut ran) = (Budget::default(), false, 0);
            for _ in 0..10_000 {
                // Two CPU-bound threads.
                let each = if held { 0 } else { 10 * MS };
                ran += 2 * each;
                match budget.tick(10 * MS, limit, &[(0, each), (1, each)]) {
                    Verdict::Hold(_) => held = true,
                    Verdict::Release => held = false,
                    Verdict::Nothing => {}
                }
            }
            let share = ran as f64 / (10_000 * 10 * MS) as f64 * 1000.0;
            assert!((share - f64::from(limit)).abs() < 5.0, "{limit}: {share}");
        }
    }

    #[test]
    fn rest_is_not_saved_up_for_long() {
        let mut budget = Budget::default();
        for _ in 0..1000 {
            budget.tick(10 * MS, 100, &[]);
        }
        assert_eq!(budget.tokens, 5 * MS as i64);
    }

    #[test]
    fn a_threads_clock_runs_with_it() {
        let clock = ThreadClock::of_this_thread().expect("schedstat");
        let begun = Instant::now();
        let mut sum = 0u64;
        while begun.elapsed() < Duration::from_millis(50) {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(clock.run_ns().expect("schedstat") > 0);
    }
}
