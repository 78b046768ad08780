//! When copying has caught up with a machine: whether another round is worth its
//! while, or it is time to freeze, or the guest must be slowed down first. Used by
//! whoever copies, and by whoever foretells how that will go ([`super::prediction`]).

use super::Round;
use std::time::Duration;

/// Rounds of copying after which the machine is frozen whatever is left.
const ROUNDS_MAX: usize = 40;
/// What is left may take this long to send while the machine stands still, if
/// nobody says how long it may stand still.
pub const LAST_PAGES_BUDGET: Duration = Duration::from_millis(2);
/// This little may always be left (a round costs more than sending it), and at
/// the most this much, however fast the link, with that budget.
const LAST_BYTES_MIN: u64 = 1 << 20;
const LAST_BYTES_MAX: u64 = 4 << 20;
/// From this round on a guest that writes faster than can be copied is slowed.
const SLOW_FROM_ROUND: usize = 4;

/// What follows a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyDecision {
    /// Another one.
    Round,
    /// Another one, with the guest slowed down further: the last brought nothing.
    Slower,
    /// What is left is sent, and the machine frozen.
    Freeze,
}

/// What follows these rounds, if `left` bytes were written since, and what is
/// left at the freeze may take `budget` to send.
pub fn next(rounds: &[Round], left: u64, budget: Duration) -> CopyDecision {
    let bytes = rounds.last().map_or(u64::MAX, |round| round.bytes);
    let within = (best_rate(rounds) * budget.as_secs_f64()) as u64;
    let more = budget.as_secs_f64() / LAST_PAGES_BUDGET.as_secs_f64();
    let most = (LAST_BYTES_MAX as f64 * more.max(1.0)) as u64;
    let shrinks = left.saturating_mul(10) < bytes.saturating_mul(7);
    let small = left <= within.clamp(LAST_BYTES_MIN, most)
        // More rounds of this size would not help.
        || left <= LAST_BYTES_MAX && !shrinks;
    if small || rounds.len() >= ROUNDS_MAX {
        CopyDecision::Freeze
    } else if rounds.len() >= SLOW_FROM_ROUND && !shrinks {
        // Only a round in which no progress was made counts: the guest writes as
        // fast as the link carries.
        CopyDecision::Slower
    } else {
        CopyDecision::Round
    }
}

/// The link's rate, in bytes a second: short rounds say little about it.
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
    fn little_is_sent_while_it_stands() {
        let once = rounds(&[(100 << 20, 100_000)]);
        // About 1 GB/s: 2 MB in the budget.
        assert_eq!(
            next(&once, 2 << 20, LAST_PAGES_BUDGET),
            CopyDecision::Freeze
        );
        assert_eq!(next(&once, 3 << 20, LAST_PAGES_BUDGET), CopyDecision::Round);
        // Who may stand still for longer is frozen sooner.
        let long = Duration::from_millis(20);
        assert_eq!(next(&once, 20 << 20, long), CopyDecision::Freeze);
        assert_eq!(next(&once, 30 << 20, long), CopyDecision::Round);
    }

    #[test]
    fn who_writes_too_fast_is_slowed_late_and_not_for_ever() {
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
            // A longer stand needs none of that.
            let long = Duration::from_millis(200);
            assert_eq!(next(&all, 90 << 20, long), CopyDecision::Freeze);
        }
        // One that shrinks is not slowed.
        assert_eq!(
            next(&all[..10], 50 << 20, LAST_PAGES_BUDGET),
            CopyDecision::Round
        );
    }
}
