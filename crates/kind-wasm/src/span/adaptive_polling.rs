//! How long a thread polls before it sleeps: adaptive, as KVM polls before it halts a
//! virtual processor (Linux, Documentation/virt/kvm/halt-polling.rst). A wake-up costs
//! more than the rest of a remote access.

use std::time::{Duration, Instant};

/// The longest and the shortest polling time.
const LONGEST: Duration = Duration::from_micros(80);
const SHORTEST: Duration = Duration::from_micros(10);
/// The host's load is read again after this time.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Polling state of one thread.
#[derive(Debug)]
pub(super) struct AdaptivePoller {
    span: Duration,
    /// Since when there has been nothing to do.
    idle: Option<Instant>,
    load_read_at: Option<Instant>,
    /// A runnable thread lacks a processor.
    is_requested: bool,
    processors: usize,
}

impl Default for AdaptivePoller {
    fn default() -> Self {
        AdaptivePoller {
            span: SHORTEST,
            idle: None,
            load_read_at: None,
            is_requested: false,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

impl AdaptivePoller {
    /// There was work: the idle time starts again.
    pub(super) fn reset(&mut self) {
        if let Some(idle) = self.idle.take() {
            self.span = next(self.span, idle.elapsed());
        }
    }

    /// There is no work: whether to poll again rather than to sleep. `awaited` says that
    /// an answer is expected.
    pub(super) fn should_poll(&mut self, answer_expected: bool) -> bool {
        let now = Instant::now();
        let idle = *self.idle.get_or_insert(now);
        if now - idle >= self.span && !answer_expected {
            return false;
        }
        if self
            .load_read_at
            .is_none_or(|load_read_at| now - load_read_at > POLL_INTERVAL)
        {
            self.load_read_at = Some(now);
            let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
            self.is_requested = runnable(&load).is_none_or(|threads| threads > self.processors);
        }
        if !self.is_requested {
            std::thread::yield_now();
        }
        !self.is_requested
    }
}

/// Adapts the polling time to the length of an idle period: longer if slightly longer
/// polling would have caught its end, shorter if it was much longer.
fn next(span: Duration, took: Duration) -> Duration {
    if took <= span {
        span
    } else if took <= LONGEST {
        (span * 2).clamp(SHORTEST, LONGEST)
    } else {
        (span / 2).max(SHORTEST)
    }
}

/// Number of runnable threads in a line of `/proc/loadavg`.
fn runnable(load: &str) -> Option<usize> {
    let (runnable, _) = load.split_whitespace().nth(3)?.split_once('/')?;
    runnable.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_time_follows_idle_time() {
        let micros = Duration::from_micros;
        let mut span = SHORTEST;
        for _ in 0..5 {
            span = next(span, micros(70));
        }
        assert_eq!(span, LONGEST);
        assert_eq!(next(span, micros(20)), LONGEST);
        for _ in 0..5 {
            span = next(span, micros(5000));
        }
        assert_eq!(span, SHORTEST);
    }

    #[test]
    fn runnable_threads_are_read() {
        assert_eq!(runnable("1.64 0.90 1.19 3/81 32083\n"), Some(3));
        assert_eq!(runnable("1.64 0.90"), None);
        assert_eq!(runnable(""), None);
    }
}
