//! The round-trip time of a connection, from its pings: the least of the last few. A queue on the way
//! and a busy peer only lengthen one (as for the propagation delay in Cardwell et al., "BBR:
//! Congestion-Based Congestion Control", ACM Queue 2016).

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Round trips of which the least counts.
const KEPT: usize = 8;
/// Pings without an answer that are remembered; the connection is lost before there are more.
const UNANSWERED_MAX: usize = 64;

#[derive(Debug, Default)]
pub(super) struct RoundTrips(Mutex<Times>);

#[derive(Debug, Default)]
struct Times {
    /// When pings were sent that are not answered yet, oldest first.
    sent: VecDeque<Instant>,
    /// The latest last.
    last: VecDeque<Duration>,
}

impl RoundTrips {
    /// A ping is sent.
    pub(super) fn sent(&self) {
        let mut times = self.lock();
        if times.sent.len() < UNANSWERED_MAX {
            times.sent.push_back(Instant::now());
        }
    }

    /// A ping was answered; the oldest one, as frames keep their order.
    pub(super) fn answered(&self) {
        let mut times = self.lock();
        let Some(sent) = times.sent.pop_front() else {
            return;
        };
        if times.last.len() == KEPT {
            times.last.pop_front();
        }
        times.last.push_back(sent.elapsed());
    }

    /// The least of the last; `None` before the first.
    pub(super) fn least(&self) -> Option<Duration> {
        self.lock().last.iter().min().copied()
    }

    fn lock(&self) -> MutexGuard<'_, Times> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_least_of_the_last_counts() {
        let times = RoundTrips::default();
        let round = async |ms| {
            times.sent();
            tokio::time::advance(Duration::from_millis(ms)).await;
            times.answered();
        };
        assert_eq!(times.least(), None);
        // An answer to nothing.
        times.answered();
        for ms in [80, 50, 70] {
            round(ms).await;
        }
        assert_eq!(times.least(), Some(Duration::from_millis(50)));
        // The way has become longer.
        for _ in 0..KEPT {
            round(90).await;
        }
        assert_eq!(times.least(), Some(Duration::from_millis(90)));
    }

    #[tokio::test(start_paused = true)]
    async fn pings_on_the_way_are_told_apart() {
        let times = RoundTrips::default();
        for _ in 0..3 {
            times.sent();
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        for _ in 0..3 {
            times.answered();
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        assert_eq!(times.least(), Some(Duration::from_millis(300)));
    }
}
