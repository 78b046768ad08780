//! For how long a thread looks again before it sleeps: adaptive, as KVM polls before it
//! halts a virtual processor (Linux, Documentation/virt/kvm/halt-polling.rst). Being woken
//! costs more than a remote access otherwise takes.

use std::time::{Duration, Instant};

/// The longest, and the shortest that is not none.
const LONGEST: Duration = Duration::from_micros(80);
const SHORTEST: Duration = Duration::from_micros(10);
/// For so long it is not asked again how busy the host is.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How a thread waits for more to do.
#[derive(Debug)]
pub(super) struct AdaptivePoller {
    span: Duration,
    /// Since when there was nothing to do.
    idle: Option<Instant>,
    looked: Option<Instant>,
    /// Somebody wants the processor that this takes.
    is_wanted: bool,
    processors: usize,
}

impl Default for AdaptivePoller {
    fn default() -> Self {
        AdaptivePoller {
            span: SHORTEST,
            idle: None,
            looked: None,
            is_wanted: false,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

impl AdaptivePoller {
    /// There was something to do.
    pub(super) fn worked(&mut self) {
        if let Some(idle) = self.idle.take() {
            self.span = next(self.span, idle.elapsed());
        }
    }

    /// There is nothing to do: whether to look again rather than to sleep. `awaited` says
    /// that something is about to come.
    pub(super) fn again(&mut self, awaited: bool) -> bool {
        let now = Instant::now();
        let idle = *self.idle.get_or_insert(now);
        if now - idle >= self.span && !awaited {
            return false;
        }
        if self.looked.is_none_or(|looked| now - looked > LOOK_AGAIN) {
            self.looked = Some(now);
            let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
            self.is_wanted = runnable(&load).is_none_or(|threads| threads > self.processors);
        }
        if !self.is_wanted {
            std::thread::yield_now();
        }
        !self.is_wanted
    }
}

/// The next span, after it took so long until there was something to do: longer if
/// looking a little longer would have met it, shorter if it was far off.
fn next(span: Duration, took: Duration) -> Duration {
    if took <= span {
        span
    } else if took <= LONGEST {
        (span * 2).clamp(SHORTEST, LONGEST)
    } else {
        (span / 2).max(SHORTEST)
    }
}

/// Threads that run or want to, of a line of `/proc/loadavg`.
fn runnable(load: &str) -> Option<usize> {
    let (runnable, _) = load.split_whitespace().nth(3)?.split_once('/')?;
    runnable.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_as_long_as_that_is_of_use() {
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
    fn who_runs_is_read() {
        assert_eq!(runnable("1.64 0.90 1.19 3/81 32083\n"), Some(3));
        assert_eq!(runnable("1.64 0.90"), None);
        assert_eq!(runnable(""), None);
    }
}
