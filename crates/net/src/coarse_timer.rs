//! Timers for what is done again and again and need not be exact. They end at common times, so that a
//! process with many wakes a few times a second and not once for each (timer coalescing, as
//! `round_jiffies_relative` of Linux). Where a delay shows, as in a retry, tokio's own are right.
//!
//! The common times are the beginnings of slots of the runtime's timer wheel (Varghese and Lauck,
//! 1987), which are 64 ms long there, then 4.096 s. A timer that ends within a slot wakes its thread
//! once at the beginning of it, too, to find that nothing is to do yet.

use std::cell::Cell;
use std::sync::OnceLock;
use std::time::Duration;

use tokio::time::Instant;

/// The shortest time between two of the common times.
const TICK: Duration = Duration::from_millis(256);
/// Slots of tokio's timer wheel.
const SLOT: Duration = Duration::from_millis(64);
/// Durations that are as much shorter, as a part of them, count as one of the powers of two.
const SHORTER_PART: u32 = 32;

thread_local! {
    static ORIGIN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Says that this thread belongs to a runtime that was made right after `origin`.
pub fn set_origin(origin: Instant) {
    ORIGIN.set(Some(origin));
}

/// When the runtime of this thread was made, if [that was said](set_origin).
pub fn origin() -> Option<Instant> {
    ORIGIN.get()
}

/// About `duration` from now: it is rounded so that the end is a multiple of 256 ms, 512 ms, 1.024 s and
/// so on since the runtime was made, the longest of them that is not above `duration`. Of a quarter
/// of a second, half of one, 1, 2 seconds and so on these are the nearest. What is shorter is exact.
pub fn after(duration: Duration) -> Instant {
    // Processes of one host that were started one by one wake one by one, too.
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let now = Instant::now();
    let first = origin().unwrap_or_else(|| *FIRST.get_or_init(|| now));
    nearest(first, now, duration)
}

/// `end`, or up to 64 ms later: the beginning of the next slot of this runtime's timer wheel. For what
/// must not be early, as a time limit, or as late as [`after`] may be.
pub fn not_before(end: Instant) -> Instant {
    origin().map_or(end, |origin| slot_from(origin, end))
}

/// Waits for `duration`, and up to 64 ms more: see [`not_before`].
pub async fn sleep_at_least(duration: Duration) {
    tokio::time::sleep_until(not_before(Instant::now() + duration)).await;
}

/// The beginning of the first slot at `end` or after it.
fn slot_from(origin: Instant, end: Instant) -> Instant {
    let Some(since_origin) = end.checked_duration_since(origin) else {
        return end;
    };
    let over = (since_origin.as_nanos() % SLOT.as_nanos()) as u64;
    match over {
        0 => end,
        over => end + (SLOT - Duration::from_nanos(over)),
    }
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
    let ticks = (duration + duration / SHORTER_PART).as_nanos() / TICK.as_nanos();
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
        assert_eq!(end(0, 500), 512 * MS);
        assert_eq!(end(70, 400), 512 * MS);
        assert_eq!(end(267, 500), 512 * MS);
        assert_eq!(end(269, 500), 1_024 * MS);
        assert_eq!(end(7_777, 2_000), 10_240 * MS);
        assert_eq!(end(7_777, 3_900), 12_288 * MS);
        assert_eq!(end(7_777, 4_000), 12_288 * MS);
    }

    #[test]
    fn a_period_stays_what_it_is() {
        let first = Instant::now();
        let periods = [
            (250, 256),
            (500, 512),
            (1_000, 1_024),
            (8_000, 8_192),
            (512, 512),
        ];
        for (asked_ms, period_ms) in periods {
            let begun = nearest(first, first + 3_333 * MS, asked_ms * MS);
            let mut now = begun;
            for round in 1..=100 {
                // Each wake is a little late.
                now = nearest(first, now + 7 * MS, asked_ms * MS);
                assert_eq!(now - begun, round * period_ms * MS, "{period_ms}");
            }
        }
    }

    /// Of a runtime for which it is said, since that was made; else for all threads together.
    #[test]
    fn timers_end_at_slots_of_their_runtime() {
        let origin = Instant::now();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .on_thread_start(move || set_origin(origin))
            .build()
            .unwrap();
        let ends = runtime.spawn(async { [250, 600, 2_000].map(|ms| after(ms * MS)) });
        for end in runtime.block_on(ends).unwrap() {
            assert_eq!((end - origin).as_nanos() % TICK.as_nanos(), 0);
        }
        assert_eq!(super::origin(), None);
    }

    #[test]
    fn a_time_limit_is_never_early() {
        let origin = Instant::now();
        let end = |ms: u32| slot_from(origin, origin + ms * MS) - origin;
        assert_eq!(end(0), Duration::ZERO);
        assert_eq!(end(1), 64 * MS);
        assert_eq!(end(64), 64 * MS);
        assert_eq!(end(65), 128 * MS);
        assert_eq!(end(4_097), 4_160 * MS);
        assert_eq!(slot_from(origin + MS, origin), origin);
    }

    #[test]
    fn what_is_shorter_is_exact() {
        let first = Instant::now();
        let now = first + 10 * MS;
        assert_eq!(nearest(first, now, 248 * MS), now + 248 * MS);
        assert_eq!(nearest(first, now, Duration::ZERO), now);
    }

    #[test]
    fn one_never_ends_before_it_begins() {
        let first = Instant::now();
        for begun in 0..5_000 {
            let now = first + begun * MS;
            for ms in [250, 499, 500, 1_999, 2_000] {
                let waits = nearest(first, now, ms * MS) - now;
                // Half of a step earlier or later, which may be a little longer than what was asked for.
                assert!(
                    waits * 32 >= ms * MS * 15 && waits * 32 <= ms * MS * 49,
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
