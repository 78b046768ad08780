//! Timers for what is done again and again and need not be exact. They end at common times, so that a
//! process with many wakes a few times a second and not once for each (timer coalescing, as
//! `round_jiffies_relative` of Linux). Where a delay shows, as in a retry, tokio's own are right.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::time::Instant;

/// The shortest time between two of the common times.
const TICK: Duration = Duration::from_millis(250);

/// About `duration` from now: it is rounded so that the end is a multiple of a quarter of a second, of
/// half a second, of 1, 2, 4 seconds and so on, the longest of them that is not above `duration`. A
/// period of such a length is kept. What is below a quarter is exact.
pub fn after(duration: Duration) -> Instant {
    // Processes of one host that were started one by one wake one by one, too.
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let now = Instant::now();
    nearest(*FIRST.get_or_init(|| now), now, duration)
}

/// Waits for [about](after) `duration`.
pub async fn sleep(duration: Duration) {
    tokio::time::sleep_until(after(duration)).await;
}

fn nearest(first: Instant, now: Instant, duration: Duration) -> Instant {
    let far = Duration::from_secs(365 * 24 * 3600);
    let duration = duration.min(far);
    let exact = now + duration;
    // (With a clock of its own, as in tests, a runtime may be before the first one.)
    let Some(since_first) = exact.checked_duration_since(first) else {
        return exact;
    };
    let ticks = duration.as_nanos() / TICK.as_nanos();
    let Some(power) = ticks.checked_ilog2() else {
        return exact;
    };
    let step = TICK * (1 << power);
    let over = (since_first.as_nanos() % step.as_nanos()) as u64;
    let over = Duration::from_nanos(over);
    match over < step / 2 {
        true => exact - over,
        false => exact + (step - over),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn different_sleeps_end_together() {
        let first = Instant::now();
        let end = |begun_ms, ms| nearest(first, first + begun_ms * MS, ms * MS) - first;
        assert_eq!(end(0, 500), 500 * MS);
        assert_eq!(end(70, 400), 500 * MS);
        assert_eq!(end(249, 500), 500 * MS);
        assert_eq!(end(251, 500), 1_000 * MS);
        assert_eq!(end(7_777, 2_000), 10_000 * MS);
        assert_eq!(end(7_777, 3_999), 12_000 * MS);
        assert_eq!(end(7_777, 4_000), 12_000 * MS);
    }

    #[test]
    fn a_period_stays_what_it_is() {
        let first = Instant::now();
        for period_ms in [250, 500, 1_000, 2_000, 8_000] {
            let begun = nearest(first, first + 3_333 * MS, period_ms * MS);
            let mut now = begun;
            for round in 1..=100 {
                // Each wake is a little late.
                now = nearest(first, now + 7 * MS, period_ms * MS);
                assert_eq!(now - begun, round * period_ms * MS, "{period_ms}");
            }
        }
    }

    #[test]
    fn what_is_shorter_is_exact() {
        let first = Instant::now();
        let now = first + 10 * MS;
        assert_eq!(nearest(first, now, 249 * MS), now + 249 * MS);
        assert_eq!(nearest(first, now, Duration::ZERO), now);
    }

    #[test]
    fn one_never_ends_before_it_begins() {
        let first = Instant::now();
        for begun in 0..5_000 {
            let now = first + begun * MS;
            for ms in [250, 499, 500, 1_999, 2_000] {
                let waits = nearest(first, now, ms * MS) - now;
                assert!(
                    waits >= ms * MS / 2 && waits <= 3 * ms * MS / 2,
                    "{begun}, {ms}"
                );
            }
        }
        // A runtime whose clock is behind, and a time that never comes.
        assert_eq!(nearest(first + MS, first, MS / 2), first + MS / 2);
        assert!(nearest(first, first, Duration::MAX) > first);
        assert_eq!(nearest(first + 900 * MS, first, 300 * MS), first + 300 * MS);
    }
}
