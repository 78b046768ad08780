//! Convergence of pre-copy: whether another round is worthwhile, the machine should be
//! frozen, or the guest must be throttled first. Used by copying and by its prediction
//! ([`super::prediction`]).

use super::Round;
use std::time::Duration;

/// Rounds of copying after which the machine is frozen in any case.
const ROUNDS_MAX: usize = 40;
/// Default time limit for sending what is left while the machine is frozen.
pub const LAST_PAGES_BUDGET: Duration = Duration::from_millis(2);
/// The number of bytes that may always be left (a round costs more than sending them),
/// and the most that may be left with the default limit, however fast the link.
const LAST_BYTES_MIN: u64 = 1 << 20;
/// A slow link sends fewer: the time that sending what is left may always take.
const LAST_TIME_MIN: Duration = Duration::from_millis(10);
const LAST_BYTES_MAX: u64 = 4 << 20;
/// The first round from which a guest that writes faster than the link is throttled.
const SLOW_FROM_ROUND: usize = 4;

/// What follows a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyDecision {
    /// Another round.
    Round,
    /// Another round with stronger throttling: the last one made no progress.
    Slower,
    /// The machine is frozen and what is left is sent.
    Freeze,
}

/// The decision after these rounds, if `left` bytes were written since and what is left
/// at the freeze may take `budget` to send.
pub fn next(rounds: &[Round], left: u64, budget: Duration) -> CopyDecision {
    let bytes = rounds.last().map_or(u64::MAX, |round| round.bytes);
    let rate = best_rate(rounds);
    let within = (rate * budget.as_secs_f64()) as u64;
    let least = LAST_BYTES_MIN.min((rate * LAST_TIME_MIN.as_secs_f64()) as u64);
    let more = budget.as_secs_f64() / LAST_PAGES_BUDGET.as_secs_f64();
    let most = (LAST_BYTES_MAX as f64 * more.max(1.0)) as u64;
    let shrinks = left.saturating_mul(10) < bytes.saturating_mul(7);
    let small = left <= within.clamp(least, most)
        // More rounds of this size would not help.
        || left <= LAST_BYTES_MAX && !shrinks;
    if small || rounds.len() >= ROUNDS_MAX {
        CopyDecision::Freeze
    } else if rounds.len() >= SLOW_FROM_ROUND && !shrinks {
        // Only a round without progress counts: the guest writes as fast as the link
        // carries.
        CopyDecision::Slower
    } else {
        CopyDecision::Round
    }
}

/// The link's rate in bytes per second; short rounds are not representative.
pub fn best_rate(rounds: &[Round]) -> f64 {
    rounds
        .iter()
        .map(|round| round.bytes as f64 / (round.micros.max(1) as f64 / 1e6))
        .fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(of: &[(u64, u64)]) -> Vec<Round> {
        of.iter()
            .map(|&(bytes, micros)| Round { bytes, micros })
            .collect()
    }

    #[test]
    fn little_is_sent_while_frozen() {
        let once = rounds(&[(100 << 20, 100_000)]);
        // About 1 GB/s: 2 MB in the budget.
        assert_eq!(
            next(&once, 2 << 20, LAST_PAGES_BUDGET),
            CopyDecision::Freeze
        );
        assert_eq!(next(&once, 3 << 20, LAST_PAGES_BUDGET), CopyDecision::Round);
        // With a larger budget the machine is frozen earlier.
        let long = Duration::from_millis(20);
        assert_eq!(next(&once, 20 << 20, long), CopyDecision::Freeze);
        assert_eq!(next(&once, 30 << 20, long), CopyDecision::Round);
    }

    /// Over 100 Mbit/s a megabyte takes as long as a round trip around half of the world.
    #[test]
    fn little_is_sent_over_a_slow_link_too() {
        let slow = rounds(&[(64 << 20, 5_600_000), (5 << 20, 420_000)]);
        assert_eq!(
            next(&slow, 400 << 10, LAST_PAGES_BUDGET),
            CopyDecision::Round
        );
        assert_eq!(
            next(&slow, 100 << 10, LAST_PAGES_BUDGET),
            CopyDecision::Freeze
        );
        // No longer than it pays.
        let again = rounds(&[(64 << 20, 5_600_000), (200 << 10, 20_000)]);
        assert_eq!(
            next(&again, 180 << 10, LAST_PAGES_BUDGET),
            CopyDecision::Freeze
        );
    }

    #[test]
    fn fast_writers_are_throttled_late_and_not_for_ever() {
        let mut all = rounds(&[(100 << 20, 100_000)]);
        for round in 2..=40 {
            all.push(Round {
                bytes: 90 << 20,
                micros: 90_000,
            });
            let expected = match round {
                ..4 => CopyDecision::Round,
                40 => CopyDecision::Freeze,
                _ => CopyDecision::Slower,
            };
            assert_eq!(next(&all, 90 << 20, LAST_PAGES_BUDGET), expected, "{round}");
            // A larger budget makes this unnecessary.
            let long = Duration::from_millis(200);
            assert_eq!(next(&all, 90 << 20, long), CopyDecision::Freeze);
        }
        // A shrinking remainder causes no throttling.
        assert_eq!(
            next(&all[..10], 50 << 20, LAST_PAGES_BUDGET),
            CopyDecision::Round
        );
    }
}
