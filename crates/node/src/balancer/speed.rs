//! The speed of a core of this node relative to the cluster's reference core: the same small
//! calculation everywhere, in CPU time of its thread. The result is the median of nine runs,
//! pinned to one core, so that neither migrations between cores nor single interrupts matter.

use keel_balance::load::SPEED_RANGE;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of the calculation on the reference core.
const REFERENCE_NANOS: f64 = 8.0e6;
/// Iterations of the calculation.
const TURNS: u64 = 2_000_000;
const RUNS: usize = 9;
/// The highest ratio of the slowest to the fastest run; above it the host is too busy to measure.
const SPREAD_MAX: f64 = 1.5;

/// The speed factor; `None` if the host is too busy to measure. Takes about a tenth of a second of
/// one core.
pub(super) fn calibrate() -> Option<f64> {
    let everywhere = sched_getaffinity(None).ok();
    let mut here = CpuSet::new();
    here.set(sched_getcpu());
    // If pinning is not allowed, the spread of the runs shows whether they are usable.
    let pinned = sched_setaffinity(None, &here).is_ok();
    let mut runs: Vec<f64> = (0..RUNS).map(|_| run()).collect();
    if pinned && let Some(everywhere) = everywhere {
        // The earlier affinity was allowed.
        let _ = sched_setaffinity(None, &everywhere);
    }
    runs.sort_by(f64::total_cmp);
    factor(&runs)
}

/// The factor from the times of all runs, in ascending order.
fn factor(runs: &[f64]) -> Option<f64> {
    let (fastest, slowest) = (runs.first()?, runs.last()?);
    if slowest / fastest > SPREAD_MAX {
        return None;
    }
    let (least, most) = SPEED_RANGE;
    Some((REFERENCE_NANOS / runs[runs.len() / 2]).clamp(least, most))
}

/// Nanoseconds for which this thread ran.
fn ran_nanos() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// One run: alternating integer and floating-point operations, each dependent on the one before.
fn run() -> f64 {
    let begun = ran_nanos();
    let (mut bits, mut sum) = (0x9e37_79b9_7f4a_7c15_u64, 1.0f64);
    for turn in 0..TURNS {
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        sum = sum * 0.999_999 + (bits & 0xff) as f64 * 1e-3 + turn as f64 * 1e-9;
    }
    std::hint::black_box((bits, sum));
    ran_nanos() - begun
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_counts_and_disagreement_says_nothing() {
        assert_eq!(factor(&[8.0e6, 8.0e6, 8.8e6]), Some(1.0));
        assert_eq!(factor(&[4.0e6, 4.0e6, 5.0e6]), Some(2.0));
        assert_eq!(factor(&[1.0e6, 1.0e6, 1.0e6]), Some(4.0));
        assert_eq!(factor(&[1e9, 1e9, 1e9]), Some(0.25));
        assert_eq!(factor(&[4.0e6, 8.0e6, 8.0e6]), None);
        assert_eq!(factor(&[]), None);
        assert!(run() > 0.0);
    }
}
