//! Enforces a machine's `cpu.limit`: samples the CPU time of its threads every few milliseconds,
//! and holds the CPU-bound ones at a safepoint while the machine exceeds its share. Waiting threads
//! and the process's other threads are not held: a limited machine moves as fast as any.
//!
//! [`Budget`] (a token bucket) decides, [`govern`] acts. Holding is implemented by `machine`.

use super::machine::{Hold, Machine, Shared};
use std::sync::Weak;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(10);
/// Burst after idling, as time at the limit.
const BURST: Duration = Duration::from_millis(50);

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
}
