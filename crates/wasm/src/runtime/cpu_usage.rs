//! CPU time of threads as the kernel counts it, and the usage of a guest thread at its part.

use crate::coherence::PartId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// CPU time of one OS thread of this process.
#[derive(Debug)]
pub(crate) struct ThreadClock {
    pub(crate) os_thread: u32,
    schedstat: File,
    stat: File,
}

impl ThreadClock {
    /// The clock of the calling thread; `None` where /proc has no `schedstat`.
    pub(crate) fn of_this_thread() -> Option<Self> {
        let clock = ThreadClock {
            os_thread: rustix::thread::gettid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs(),
            schedstat: File::open("/proc/thread-self/schedstat").ok()?,
            stat: File::open("/proc/thread-self/stat").ok()?,
        };
        clock.run_ns().map(|_| clock)
    }

    /// Run time so far, in nanoseconds.
    pub(super) fn run_ns(&self) -> Option<u64> {
        let mut buffer = [0; 64];
        numbers(&self.schedstat, &mut buffer)?.next()?
    }

    /// CPU time so far.
    pub(crate) fn cpu_time(&self) -> Option<CoreTime> {
        let mut buffer = [0; 64];
        let mut numbers = numbers(&self.schedstat, &mut buffer)?;
        let mut next = || numbers.next().flatten();
        let (run_ns, waited_ns, turns) = (next()?, next()?, next()?);
        let mut buffer = [0; 64];
        let count = self.stat.read_at(&mut buffer, 0).ok()?;
        // The state follows the name, which is in parentheses.
        let text = buffer.get(..count)?;
        let name_end = text.iter().rposition(|byte| *byte == b')')?;
        Some(CoreTime {
            run_ns,
            waited_ns,
            turns,
            is_runnable: text.get(name_end + 2) == Some(&b'R'),
        })
    }
}

fn numbers<'a>(
    file: &File,
    buffer: &'a mut [u8],
) -> Option<impl Iterator<Item = Option<u64>> + 'a> {
    let count = file.read_at(buffer, 0).ok()?;
    let text = std::str::from_utf8(buffer.get(..count)?).ok()?;
    Some(text.split_ascii_whitespace().map(|word| word.parse().ok()))
}

/// CPU time since the start of the OS thread, which may have hosted other guest threads before:
/// only differences are meaningful.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreTime {
    /// Run time, in nanoseconds.
    pub run_ns: u64,
    /// Completed waits for a core, in nanoseconds.
    pub waited_ns: u64,
    pub turns: u64,
    /// Whether it is running or runnable.
    pub is_runnable: bool,
}

/// CPU usage of a thread at its part. Only differences are meaningful, and only while the thread
/// stays there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuUsage {
    /// Time of measurement, in nanoseconds since its part started.
    pub at_ns: u64,
    pub time: CoreTime,
    /// Microseconds stalled on remote pages, by the part that supplied them.
    #[serde(rename = "stood")]
    pub stalled_us: BTreeMap<PartId, u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_threads_clock_runs_with_it() {
        let clock = ThreadClock::of_this_thread().expect("schedstat");
        let begun = Instant::now();
        let mut sum = 0u64;
        while begun.elapsed() < Duration::from_millis(50) {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(clock.run_ns().expect("schedstat") > 0);
    }
}
