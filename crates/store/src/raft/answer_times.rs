//! How long to wait for a voter's answer before it is asked again: a time that follows how long its
//! answers take, as TCP's retransmission time does (RFC 6298). What is too short for the distance
//! would be sent again and again and never be answered; what is too long holds back a voter that lost
//! one message.

use std::time::Duration;

/// The least time: a busy computer may answer late.
const ANSWER_MIN: Duration = Duration::from_millis(150);
/// The most.
pub(super) const ANSWER_MAX: Duration = Duration::from_millis(1000);

/// Of one voter.
#[derive(Debug, Default)]
pub(super) struct AnswerTimes {
    /// The smoothed time, and how much answers vary around it.
    smoothed: Option<(Duration, Duration)>,
    /// How often it did not answer in time since its last answer.
    late: u32,
}

impl AnswerTimes {
    /// How long to wait for the next answer: RFC 6298, sections 2 and 5.5.
    pub(super) fn patience(&self) -> Duration {
        let expected = self.smoothed.map_or(ANSWER_MIN, |(smoothed, varies)| {
            smoothed.saturating_add(varies.saturating_mul(4))
        });
        let doubled = 1u32.checked_shl(self.late).unwrap_or(u32::MAX);
        let expected = expected.max(ANSWER_MIN).saturating_mul(doubled);
        expected.min(ANSWER_MAX)
    }

    /// It answered after this time: RFC 6298, section 2.
    pub(super) fn answered(&mut self, took: Duration) {
        self.late = 0;
        self.smoothed = Some(match self.smoothed {
            None => (took, took / 2),
            Some((smoothed, varies)) => {
                let off = smoothed.abs_diff(took);
                ((smoothed * 7 + took) / 8, (varies * 3 + off) / 4)
            }
        });
    }

    /// It did not answer in time.
    pub(super) fn timed_out(&mut self) {
        self.late = (self.late + 1).min(16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn near_voters_have_the_least_time() {
        let mut times = AnswerTimes::default();
        assert_eq!(times.patience(), ms(150));
        for _ in 0..10 {
            times.answered(ms(2));
            assert_eq!(times.patience(), ms(150));
        }
    }

    /// The figures of RFC 6298 with α = 1/8, β = 1/4, K = 4.
    #[test]
    fn the_time_follows_the_distance() {
        let mut times = AnswerTimes::default();
        times.answered(ms(100));
        assert_eq!(times.patience(), ms(100 + 4 * 50));
        times.answered(ms(180));
        // Varies: 3/4 * 50 + 1/4 * 80 = 57.5; smoothed: 7/8 * 100 + 1/8 * 180 = 110.
        assert_eq!(times.patience(), ms(110 + 230));
        for _ in 0..100 {
            times.answered(ms(300));
        }
        assert!((ms(299)..ms(310)).contains(&times.patience()), "{times:?}");
    }

    #[test]
    fn a_silent_voter_is_waited_for_longer_each_time() {
        let mut times = AnswerTimes::default();
        for expected in [150, 300, 600, 1000, 1000] {
            assert_eq!(times.patience(), ms(expected));
            times.timed_out();
        }
        // It is 400 ms away; the first answer says so.
        times.answered(ms(400));
        assert_eq!(times.patience(), ms(1000).min(ms(400 + 4 * 200)));
        for _ in 0..100 {
            times.timed_out();
        }
        assert_eq!(times.patience(), ms(1000));
    }
}
