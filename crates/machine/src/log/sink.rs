//! A guest's output on its way to the log: at a limited rate, and waiting while the disk is full
//! or too much is held back.

use super::{Log, RECORD_BYTES_MAX, StreamKind};
use keel_wasi::volume::{Stalls, is_disk_full};
use keel_wasi::{Interrupt, Sink, SinkResult};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The most output that is held back: a guest that prints more waits. Less than the log keeps.
const HELD_BYTES_MAX: u64 = 16 << 20;
/// How long such a guest waits before it looks again.
const HELD_PAUSE: Duration = Duration::from_millis(10);

/// Limits output to a number of bytes per second, with a burst of one second's worth.
#[derive(Debug)]
pub struct OutputRate {
    bytes_per_s: f64,
    allowance: f64,
    since: Instant,
}

impl OutputRate {
    /// At least 1 byte per second.
    pub fn new(bytes_per_s: u64) -> Self {
        let bytes_per_s = bytes_per_s.max(1) as f64;
        OutputRate {
            bytes_per_s,
            allowance: bytes_per_s,
            since: Instant::now(),
        }
    }

    /// Time until further bytes may be written, at most a second; `None` if they may be now.
    pub fn delay(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let earned = now.duration_since(self.since).as_secs_f64() * self.bytes_per_s;
        self.allowance = (self.allowance + earned).min(self.bytes_per_s);
        self.since = now;
        let lacks = -self.allowance / self.bytes_per_s;
        (self.allowance <= 0.0).then(|| Duration::from_secs_f64(lacks.clamp(0.001, 1.0)))
    }

    /// So many bytes were written.
    pub fn wrote(&mut self, count: usize) {
        self.allowance -= count as f64;
    }
}

/// How long a guest waits before it prints more, because much output is held back; `None` if it
/// need not wait.
pub fn delay_of_held_output(log: &Log) -> Option<Duration> {
    (log.held_bytes() >= HELD_BYTES_MAX).then_some(HELD_PAUSE)
}

/// A guest's standard output or error, written to a log.
#[derive(Debug)]
pub struct LogSink {
    log: Arc<Log>,
    stream: StreamKind,
    rate: Mutex<OutputRate>,
    stalls: Arc<Stalls>,
}

impl LogSink {
    /// Writes to `log` at most `bytes_per_s`. If the disk is full the guest waits, which
    /// is reported to `stalls`.
    pub fn new(log: Arc<Log>, stream: StreamKind, bytes_per_s: u64, stalls: Arc<Stalls>) -> Self {
        LogSink {
            log,
            stream,
            rate: Mutex::new(OutputRate::new(bytes_per_s)),
            stalls,
        }
    }

    /// Appends what the rate permits; returns the number of bytes, or the time to wait.
    fn write_some(&self, bytes: &[u8]) -> std::io::Result<Result<usize, Duration>> {
        let mut rate = self.rate.lock().unwrap_or_else(|error| error.into_inner());
        if let Some(delay) = delay_of_held_output(&self.log).or_else(|| rate.delay()) {
            return Ok(Err(delay));
        }
        let count = bytes.len().min(RECORD_BYTES_MAX);
        self.log.append(self.stream, &bytes[..count])?;
        rate.wrote(count);
        Ok(Ok(count))
    }
}

impl Sink for LogSink {
    fn write(&self, bytes: &[u8], interrupt: &dyn Interrupt) -> SinkResult {
        loop {
            let delay = match self.write_some(bytes) {
                Ok(Ok(count)) => {
                    self.stalls.written(self.log.place());
                    return SinkResult::Written(count);
                }
                Ok(Err(delay)) => delay,
                Err(error) if is_disk_full(&error) => {
                    if self.stalls.wait_briefly(self.log.place(), interrupt) {
                        continue;
                    }
                    return SinkResult::Interrupted;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot write output");
                    return SinkResult::Errno(keel_wasi::Errno::Io);
                }
            };
            if interrupt.requested() {
                return SinkResult::Interrupted;
            }
            let wakeup = interrupt.wakeup();
            let mut wait = [rustix::event::PollFd::new(
                &wakeup,
                rustix::event::PollFlags::IN,
            )];
            let timeout = rustix::event::Timespec {
                tv_sec: delay.as_secs() as i64,
                tv_nsec: delay.subsec_nanos().into(),
            };
            // After any wake-up the loop checks again.
            let _ = rustix::event::poll(&mut wait, Some(&timeout));
        }
    }
}
