//! Gives the machine away: copies memory while the machine runs, freezes it,
//! sends the rest, and tells the target to go on. Blocking; has a thread of its
//! own.

use super::control::{Copy, CopyEvent, Frozen};
use crate::link::{CHUNK_BYTES, HELLO_VERSION, Hello, Link, LinkError, Message};
use crate::log::Log;
use crate::moves::{Phase, Progress, Round};
use keel_cluster::{Epoch, MachineName};
use keel_net::{ClientTls, PinnedIdentity};
use keel_wasm::memory::{DirtyTracker, MemoryError, PAGE_BYTES};
use keel_wasm::runtime::{Machine, MachineError, ProgramError};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Rounds of copying after which the machine is frozen whatever is left.
const ROUNDS_MAX: usize = 40;
/// What is left may take this long to send while the machine stands still.
const LAST_PAGES_BUDGET: Duration = Duration::from_millis(2);
/// This little may always be left (a round costs more than sending it), and at
/// the most this much, however fast the link.
const LAST_BYTES_MIN: u64 = 1 << 20;
const LAST_BYTES_MAX: u64 = 4 << 20;
/// Rounds of catching up just before the freeze, and what is little enough.
const CATCH_UP_ROUNDS_MAX: u32 = 4;
const CATCH_UP_BYTES: u64 = 256 << 10;
/// From this round on a guest that writes faster than can be copied is slowed.
const SLOW_FROM_ROUND: usize = 4;
/// How long threads may take to their safepoints.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);
/// Period of slowing a guest down.
const SLOW_PERIOD: Duration = Duration::from_millis(4);

/// Why the machine could not be given away. It runs on here, unless it ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutgoingError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error("its output cannot be read: {0}")]
    Log(#[from] std::io::Error),
    #[error(transparent)]
    Tls(#[from] keel_net::TlsError),
}

/// One attempt to give a machine away.
pub(super) struct Outgoing {
    machine: Machine,
    log: Arc<Log>,
    link: Link,
    trackers: Vec<DirtyTracker>,
    log_sent: u64,
    slowed: bool,
    buffer: Vec<u8>,
}

impl Outgoing {
    /// Connects to the target.
    pub(super) fn connect(
        name: &MachineName,
        epoch: Epoch,
        machine: Machine,
        log: Arc<Log>,
        identity: &PinnedIdentity,
        copy: &Copy,
    ) -> Result<Self, OutgoingError> {
        let tls = ClientTls::pinned(identity, copy.target.fingerprint)?;
        let mut link = Link::connect(&copy.target.address, &tls)?;
        link.send(&Message::Hello(Hello {
            version: HELLO_VERSION,
            machine: name.clone(),
            epoch,
            program: *machine.program().hash(),
            log_base: log.base(),
        }))?;
        Ok(Outgoing {
            log_sent: log.base(),
            machine,
            log,
            link,
            trackers: Vec::new(),
            slowed: false,
            buffer: vec![0; CHUNK_BYTES],
        })
    }

    /// A handle that breaks the connection from another thread.
    pub(super) fn closer(&self) -> Result<std::net::TcpStream, OutgoingError> {
        Ok(self.link.closer()?)
    }

    /// Copies memory until little is left.
    pub(super) fn copy(
        &mut self,
        tell: &mut dyn FnMut(CopyEvent) -> bool,
    ) -> Result<(), OutgoingError> {
        // Threads must be able to go on here if the move fails; what that
        // needs is compiled now, while they run.
        self.machine.program().prepare_resume()?;
        let memories = self.machine.memories().clone();
        for memory in memories.iter() {
            let tracker = DirtyTracker::start(memory.clone())?;
            if let Some(missing) = tracker.missing() {
                tracing::warn!(%missing);
            }
            self.trackers.push(tracker);
        }
        let mut ranges: Vec<Vec<Range<u64>>> = Vec::new();
        for memory in memories.iter() {
            ranges.push(memory.populated()?);
        }
        let mut rounds: Vec<Round> = Vec::new();
        let mut slowdown = Slowdown::new(self.machine.clone());
        loop {
            let begun = Instant::now();
            let first = rounds.is_empty();
            let bytes = self.send_ranges(&ranges, first)?;
            self.send_log()?;
            self.link.send(&Message::RoundEnd)?;
            self.link.flush()?;
            match self.link.receive()? {
                Message::RoundDone => {}
                other => return Err(unexpected(&other)),
            }
            let took = begun.elapsed();
            rounds.push(Round {
                bytes,
                micros: micros(took),
            });
            let mut left = 0;
            for (tracker, ranges) in self.trackers.iter_mut().zip(&mut ranges) {
                *ranges = tracker.take()?;
                left += ranges
                    .iter()
                    .map(|range| range.end - range.start)
                    .sum::<u64>();
            }
            let rate = best_rate(&rounds);
            let goes_on = tell(CopyEvent::Progress(Progress {
                phase: Phase::Copy,
                round: rounds.len() as u32,
                sent_bytes: self.link.sent_bytes(),
                remaining_bytes: left,
                bytes_per_s: rate as u64,
                downtime_micros: 0,
            }));
            if !goes_on {
                return Err(LinkError::Aborted("nobody waits for it".into()).into());
            }
            let budget = (rate * LAST_PAGES_BUDGET.as_secs_f64()) as u64;
            let small = left <= budget.clamp(LAST_BYTES_MIN, LAST_BYTES_MAX);
            if small || rounds.len() >= ROUNDS_MAX {
                // What was found dirty is sent with the rest.
                self.send_ranges(&ranges, false)?;
                break;
            }
            // Only a round in which no progress was made counts: the guest
            // writes as fast as the link carries.
            if rounds.len() >= SLOW_FROM_ROUND && left * 10 >= bytes * 7 {
                slowdown.more();
                self.slowed = true;
            }
        }
        slowdown.end();
        tell(CopyEvent::Converged {
            rounds,
            slowed: self.slowed,
        });
        Ok(())
    }

    /// Freezes the machine and sends all that the target lacks; returns when
    /// the target is ready to go on.
    pub(super) fn freeze_and_send(&mut self) -> Result<Frozen, OutgoingError> {
        self.catch_up()?;
        let begun = Instant::now();
        self.machine.freeze(FREEZE_PATIENCE)?;
        let frozen = Instant::now();
        let mut last_bytes = 0;
        for number in 0..self.trackers.len() {
            let ranges = self.trackers[number].take()?;
            last_bytes += self.send_memory(number as u32, &ranges, false)?;
        }
        self.send_log()?;
        let pages_sent = Instant::now();
        let image = self.machine.image()?.encode()?;
        for piece in image.chunks(CHUNK_BYTES) {
            self.link.send(&Message::Image(piece.to_vec().into()))?;
        }
        self.link.send(&Message::ImageEnd)?;
        self.link.flush()?;
        match self.link.receive()? {
            Message::Prepared => {}
            other => return Err(unexpected(&other)),
        }
        // From here on the store decides, however long that takes.
        self.link.be_patient()?;
        Ok(Frozen {
            freeze_micros: micros(frozen - begun),
            last_pages_micros: micros(pages_sent - frozen),
            last_bytes,
            state_micros: micros(pages_sent.elapsed()),
            bytes: self.link.sent_bytes(),
        })
    }

    /// Sends what was written since the last round, which was before the store
    /// was asked: every millisecond of that is pages less to send while frozen.
    fn catch_up(&mut self) -> Result<(), OutgoingError> {
        for _ in 0..CATCH_UP_ROUNDS_MAX {
            let mut ranges = Vec::with_capacity(self.trackers.len());
            for tracker in &mut self.trackers {
                ranges.push(tracker.take()?);
            }
            let bytes = self.send_ranges(&ranges, false)?;
            self.link.flush()?;
            if bytes <= CATCH_UP_BYTES {
                break;
            }
        }
        Ok(())
    }

    /// Tells the target that the commit won; returns when the machine runs
    /// there.
    pub(super) fn go(&mut self, epoch: Epoch) -> Result<(), OutgoingError> {
        self.link.send(&Message::Go(epoch))?;
        self.link.flush()?;
        match self.link.receive()? {
            Message::Resumed(_) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Gives up. The machine is not thawed here.
    pub(super) fn abort(mut self, reason: &str) {
        // The target finds out in any case, when the connection ends.
        let _ = self.link.send(&Message::Abort(reason.to_owned()));
        let _ = self.link.flush();
    }

    fn send_ranges(
        &mut self,
        ranges: &[Vec<Range<u64>>],
        skip_zero: bool,
    ) -> Result<u64, OutgoingError> {
        let mut bytes = 0;
        for (number, ranges) in ranges.iter().enumerate() {
            bytes += self.send_memory(number as u32, ranges, skip_zero)?;
        }
        Ok(bytes)
    }

    fn send_memory(
        &mut self,
        number: u32,
        ranges: &[Range<u64>],
        skip_zero: bool,
    ) -> Result<u64, OutgoingError> {
        let memory = self.machine.memories()[number as usize].clone();
        self.link.send(&Message::Size {
            memory: number,
            pages: memory.size_bytes() >> 16,
        })?;
        let mut sent = 0;
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let count = (range.end - at).min(CHUNK_BYTES as u64);
                let bytes = &mut self.buffer[..count as usize];
                memory.read(at, bytes)?;
                if skip_zero {
                    sent += send_nonzero(&mut self.link, number, at, bytes)?;
                } else {
                    self.link.send_pages(number, at, bytes)?;
                    sent += count;
                }
                at += count;
            }
        }
        Ok(sent)
    }

    fn send_log(&mut self) -> Result<(), OutgoingError> {
        loop {
            let (offset, bytes) = self.log.read(self.log_sent, CHUNK_BYTES)?;
            if bytes.is_empty() {
                return Ok(());
            }
            self.log_sent = offset + bytes.len() as u64;
            self.link.send(&Message::Log {
                offset,
                bytes: bytes.into(),
            })?;
        }
    }
}

fn unexpected(message: &Message) -> OutgoingError {
    LinkError::Message(format!("{message:?} out of turn")).into()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The link's rate, in bytes a second: short rounds say little about it.
fn best_rate(rounds: &[Round]) -> f64 {
    rounds
        .iter()
        .map(|round| round.bytes as f64 / (round.micros.max(1) as f64 / 1e6))
        .fold(0.0, f64::max)
}

/// Sends the runs of pages that are not zero: the target's memory is.
fn send_nonzero(
    link: &mut Link,
    memory: u32,
    offset: u64,
    bytes: &[u8],
) -> Result<u64, OutgoingError> {
    let page = PAGE_BYTES as usize;
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut sent = 0;
    let mut start = None;
    let pages = bytes.len().div_ceil(page);
    for number in 0..=pages {
        let full = bytes
            .get(number * page..bytes.len().min((number + 1) * page))
            .is_some_and(|page| !page.is_empty() && !is_zero(page));
        match (start, full) {
            (None, true) => start = Some(number * page),
            (Some(from), false) => {
                let run = &bytes[from..(number * page).min(bytes.len())];
                link.send_pages(memory, offset + from as u64, run)?;
                sent += run.len() as u64;
                start = None;
            }
            _ => {}
        }
    }
    Ok(sent)
}

/// Slows a guest down: its threads stand at safepoints for a share of the time.
struct Slowdown {
    machine: Machine,
    /// Share of the time, in percent.
    percent: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Slowdown {
    fn new(machine: Machine) -> Self {
        Slowdown {
            machine,
            percent: Arc::new(AtomicU32::new(0)),
            stop: Arc::new(AtomicBool::new(false)),
            thread: None,
        }
    }

    fn more(&mut self) {
        let percent = self.percent.load(Ordering::Relaxed);
        // 0, 50, 75, 87, 93, 96 …
        self.percent
            .store(percent + (100 - percent) / 2, Ordering::Relaxed);
        if self.thread.is_some() {
            return;
        }
        let (machine, percent, stop) = (
            self.machine.clone(),
            self.percent.clone(),
            self.stop.clone(),
        );
        self.thread = std::thread::Builder::new()
            .name("slowdown".into())
            .spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let share = percent.load(Ordering::Relaxed).min(97);
                    if machine.freeze(Duration::from_millis(200)).is_ok() {
                        std::thread::sleep(SLOW_PERIOD * share / 100);
                        // It may have ended meanwhile.
                        let _ = machine.thaw();
                    }
                    std::thread::sleep(SLOW_PERIOD * (100 - share) / 100);
                }
            })
            .ok();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It only sleeps and freezes; a panic in it has thawed nothing, so
            // thaw once more.
            let _ = thread.join();
            let _ = self.machine.thaw();
        }
    }
}

impl Drop for Slowdown {
    fn drop(&mut self) {
        self.end();
    }
}
