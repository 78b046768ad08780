//! Who sends when many tasks have something to send at once: some of them, while the others wait
//! in the order in which they came. What is sent is not its matter.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

/// Lets some tasks of many send what they have, while the others wait.
#[derive(Clone)]
pub(crate) struct Turns {
    places: Arc<Semaphore>,
    lasts: Option<Duration>,
}

impl Turns {
    /// Turns of `at_once` tasks at a time. Each lasts for a time at least, or, where none is given,
    /// until other tasks ran: those that write what was sent.
    pub(crate) fn new(at_once: usize, lasts: Option<Duration>) -> Self {
        Self {
            places: Arc::new(Semaphore::new(at_once)),
            lasts,
        }
    }

    /// Calls `send` when it is the caller's turn, and returns when the turn is over. It is over at
    /// once if others have turns left.
    pub(crate) async fn take<T>(&self, send: impl FnOnce() -> T) -> T {
        let turn = self.places.acquire().await;
        let sent = send();
        match self.lasts {
            Some(lasts) if self.places.available_permits() == 0 => {
                tokio::time::sleep(lasts).await;
            }
            _ => tokio::task::yield_now().await,
        }
        drop(turn);
        sent
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use tokio::time::Instant;

    const LASTS: Duration = Duration::from_millis(1);

    /// Simulated milliseconds until all of some tasks had a turn, and how often one sent.
    async fn until_all_sent(tasks: usize, turns: Turns) -> (u128, usize) {
        let begun = Instant::now();
        let sent = Arc::new(AtomicUsize::new(0));
        let all = (0..tasks).map(|_| {
            let (turns, sent) = (turns.clone(), sent.clone());
            async move { turns.take(|| sent.fetch_add(1, Ordering::Relaxed)).await }
        });
        futures::future::join_all(all).await;
        (begun.elapsed().as_millis(), sent.load(Ordering::Relaxed))
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_do_not_wait_and_many_take_turns() {
        assert_eq!(until_all_sent(7, Turns::new(8, Some(LASTS))).await, (0, 7));
        let (took, sent) = until_all_sent(800, Turns::new(8, Some(LASTS))).await;
        assert_eq!(sent, 800);
        // Timers have a millisecond's resolution, so a turn may take two.
        assert!((90..=200).contains(&took), "{took} ms");
        assert_eq!(until_all_sent(800, Turns::new(8, None)).await, (0, 800));
    }
}
