//! How fast a core of this node is beside the cluster's reference core: the same small
//! calculation everywhere, in time that its thread ran. The median of nine runs,
//! pinned to one core, so that neither a move between cores nor one interrupt decides.

use keel_balance::load::SPEED_RANGE;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds that the calculation takes the reference core.
const REFERENCE_NANOS: f64 = 8.0e6;
/// Turns of the calculation.
const TURNS: u64 = 2_000_000;
const RUNS: usize = 9;
/// The slowest run beside the fastest above which the host was too busy to tell.
const SPREAD_MAX: f64 = 1.5;

/// The speed factor; `None` while too much else runs to tell. Takes about a tenth of
/// a second of one core.
pub(super) fn calibrate() -> Option<f64> {
    let everywhere = sched_getaffinity(None).ok();
    let mut here = CpuSet::new();
    here.set(sched_getcpu());
    // Where it may not be pinned the runs show by themselves whether they agree.
    let pinned = sched_setaffinity(None, &here).is_ok();
    let mut runs: Vec<f64> = (0..RUNS).map(|_| run()).collect();
    if pinned && let Some(everywhere) = everywhere {
        // It was allowed before.
        let _ = sched_setaffinity(None, &everywhere);
    }
    runs.sort_by(f64::total_cmp);
    factor(&runs)
}

/// From the times of all runs, least first.
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

/// One run: integers and floating point in turns, each waiting for the one before.
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
