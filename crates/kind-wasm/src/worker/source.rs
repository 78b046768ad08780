//! The source's side of a move: copies memory while the machine runs, freezes it, sends
//! the rest, and tells the target to resume. Blocking; runs on a thread of its own.

use super::cluster_volumes::ClusterVolumes;
use super::post_copy::{self, PageSet};
use super::residual_dirty_scan::{DirtyRanges, ResidualDirtyScan};
use super::stack_functions::{SampleError, StackFunctions};
use super::throttle::Throttle;
use super::volumes::{SourceVolumes, VolumeError};
use super::wasm_worker::WasmWorker;
use crate::control::HomeHandover;
use crate::span::{Home, HomeMigration, PartId, SpanError, SpanningError};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::cgroup::YieldPolicy;
use keel_machine::failpoint::{self, Injected};
use keel_machine::link::{
    CHUNK_BYTES, HELLO_VERSION, Hello, Link, LinkError, Message, Purpose, TargetEndpoint,
};
use keel_machine::log::Log;
use keel_machine::moves::convergence::{self, CopyDecision, best_rate};
use keel_machine::moves::{FillReport, Phase, Progress, Round};
use keel_machine::worker::control::{Copy, CopyEvent, Frozen};
use keel_machine::worker::{self, Connect, LogSource, MoveError};
use keel_net::PinnedIdentity;
use keel_wasm::memory::{DirtyTracker, MemoryError};
use keel_wasm::runtime::{Machine, MachineError, ProgramError};
use std::collections::BTreeMap;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of pages sent between two checks for starvation by other threads.
const PIECE_BYTES: u64 = 1 << 20;
/// Rounds of catching up just before the freeze, and the number of bytes at which they
/// end.
const CATCH_UP_ROUNDS_MAX: u32 = 4;
const CATCH_UP_BYTES: u64 = 256 << 10;
/// Time limits for moving a home's threads and pages elsewhere while the machine runs,
/// and for its last pages while it is stopped.
const DRAIN_PATIENCE: Duration = Duration::from_secs(120);
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);
/// Interval of keep-alive messages to the target meanwhile.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Time limit for threads to reach a safepoint.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);

/// Why the machine was not moved. It runs on here, unless it ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error("its output cannot be read, or no thread can be started for its move: {0}")]
    Log(#[from] std::io::Error),
    #[error(transparent)]
    Tls(#[from] keel_net::TlsError),
    #[error(transparent)]
    Spanning(#[from] SpanningError),
    #[error("the state of its home cannot be encoded: {0}")]
    HomeState(#[from] postcard::Error),
    #[error(transparent)]
    Stacks(#[from] SampleError),
    #[error(transparent)]
    Injected(#[from] Injected),
}

/// The home of a machine that spans, whose other parts stay where they are.
pub(super) struct SpanningSource {
    pub(super) home: Arc<Home>,
    pub(super) successor: PartId,
    pub(super) threads_to: PartId,
    /// The node of each part.
    pub(super) nodes: BTreeMap<PartId, NodeName>,
    /// Set to give the move up.
    pub(super) give_up: Arc<AtomicBool>,
    /// Set once its threads and pages are leaving.
    pub(super) leaving: Option<HomeMigration>,
}

impl SpanningSource {
    /// Cancels the home migration: the machine may be thawed.
    ///
    /// # Errors
    /// [`SpanError`] if a part was lost.
    fn cancel(&mut self) -> Result<(), SpanError> {
        match self.leaving.take() {
            Some(mut leaving) => leaving.cancel(),
            None => Ok(()),
        }
    }

    /// Whether the remaining pages can move while the machine is stopped.
    fn check(&self) -> Result<(), SpanningError> {
        self.leaving.as_ref().map_or(Ok(()), HomeMigration::check)
    }

    /// The encoded state for the successor.
    fn handover(&mut self) -> Result<Vec<u8>, SourceError> {
        let leaving = self.leaving.as_mut();
        let leaving = leaving.ok_or(LinkError::Aborted("its home does not move".into()))?;
        let home_state = leaving.leave(LEAVE_PATIENCE)?;
        let mut nodes = self.nodes.clone();
        if let Some(node) = nodes.remove(&self.successor) {
            nodes.insert(PartId::HOME, node);
        }
        Ok(postcard::to_stdvec(&HomeHandover { home_state, nodes })?)
    }
}

impl Drop for SpanningSource {
    fn drop(&mut self) {
        if let Err(error) = self.cancel() {
            tracing::warn!(%error, "a machine lost a part during the move of its home");
        }
    }
}

/// The machine of a move.
struct Subject {
    name: MachineName,
    /// The epoch under which it runs here.
    epoch: Epoch,
    machine: Machine,
    log: Arc<Log>,
    cluster_volumes: ClusterVolumes,
}

/// One attempt to move the machine away.
pub(super) struct SourceSession {
    machine: Machine,
    log: LogSource,
    link: Link,
    way: TargetEndpoint,
    trackers: Vec<DirtyTracker>,
    /// For a machine that spans.
    parts: Option<SpanningSource>,
    cluster_volumes: ClusterVolumes,
    volumes: SourceVolumes,
    functions: StackFunctions,
    throttle: Throttle,
    /// For each memory, dirty pages that were found and not sent.
    unsent: Vec<PageSet>,
    /// In a post-copy move: the scan for the last dirty pages, once the machine is
    /// stopped.
    scan: Option<ResidualDirtyScan>,
    /// The finished scan, which takes a while to drop.
    finished_scan: Option<ResidualDirtyScan>,
    /// Result of naming pages.
    named: Result<(), SourceError>,
    /// While memory is copied.
    yielding: Option<YieldPolicy>,
    /// Time limit for sending what is left at the freeze.
    budget: Duration,
}

impl SourceSession {
    /// Connects to the target.
    fn connect(
        subject: Subject,
        identity: &PinnedIdentity,
        copy: &Copy,
        parts: Option<SpanningSource>,
    ) -> Result<Self, SourceError> {
        let Subject {
            name,
            epoch,
            machine,
            log,
            cluster_volumes,
        } = subject;
        failpoint::pass("source.connect")?;
        let hello = Hello {
            version: HELLO_VERSION,
            machine: name,
            epoch,
            program: Some(*machine.program().hash()),
            log_base: log.base(),
            post_copy: copy.post_copy,
            purpose: Purpose::Move,
        };
        let way = copy.target.target(identity, hello)?;
        let link = way.connect(Purpose::Move)?;
        Ok(SourceSession {
            way,
            throttle: Throttle::new(machine.clone()),
            unsent: vec![PageSet::default(); machine.memories().len()],
            scan: None,
            finished_scan: None,
            named: Ok(()),
            yielding: None,
            machine,
            log: LogSource::new(log),
            link,
            trackers: Vec::new(),
            parts,
            cluster_volumes,
            volumes: SourceVolumes::default(),
            functions: StackFunctions::default(),
            budget: Duration::from_micros(copy.budget_micros),
        })
    }

    /// Copies memory until little is left; of cluster volumes, the blocks that are in no
    /// segment.
    fn copy_memory(&mut self, tell: &mut dyn FnMut(CopyEvent) -> bool) -> Result<(), SourceError> {
        self.cluster_volumes
            .wait_claimed()
            .map_err(VolumeError::NotClaimed)?;
        // Threads must be able to resume here if the move fails; what takes long to
        // compile for that is compiled now, while they run.
        self.machine.program().prepare_resume()?;
        failpoint::pass("source.hello")?;
        // Memory of a machine that spans stays with its parts.
        let memories = match self.parts {
            Some(_) => Arc::default(),
            None => self.machine.memories().clone(),
        };
        for memory in memories.iter() {
            let tracker = DirtyTracker::start(memory.clone())?;
            if let Some(missing) = tracker.missing() {
                tracing::warn!(%missing, "writes are found by hashing, which is slower");
            }
            self.trackers.push(tracker);
        }
        self.volumes = SourceVolumes::start(self.machine.wasi(), &self.cluster_volumes);
        self.yielding = YieldPolicy::begin();
        self.name_functions()?;
        self.drain_home(tell)?;
        let mut ranges: Vec<Vec<Range<u64>>> = Vec::new();
        for memory in memories.iter() {
            ranges.push(memory.populated()?);
        }
        let mut rounds: Vec<Round> = Vec::new();
        loop {
            let begun = Instant::now();
            let first = rounds.is_empty();
            let mut bytes = self.send_ranges(&ranges, first)?;
            bytes += self.volumes.send(&mut self.link)?;
            self.log.send(&mut self.link)?;
            self.link.send(&Message::RoundEnd)?;
            self.link.flush()?;
            failpoint::pass("source.round")?;
            let is_compiling = self.end_of_round()?;
            // (A round in which the target waited for code says nothing about the rate.)
            if !is_compiling || first {
                let micros = micros(begun.elapsed());
                rounds.push(Round { bytes, micros });
            }
            self.name_functions()?;
            let mut left = self.volumes.record_changes();
            for (tracker, ranges) in self.trackers.iter_mut().zip(&mut ranges) {
                *ranges = tracker.take()?;
                left += ranges
                    .iter()
                    .map(|range| range.end - range.start)
                    .sum::<u64>();
            }
            let goes_on = tell(CopyEvent::Progress(Progress {
                round: rounds.len() as u32,
                sent_bytes: self.link.sent_bytes(),
                remaining_bytes: left,
                bytes_per_s: best_rate(&rounds) as u64,
                ..Progress::of(Phase::Copy)
            }));
            if !goes_on {
                return Err(LinkError::Aborted("the caller is gone".into()).into());
            }
            if is_compiling && !self.way.hello().post_copy {
                continue;
            }
            if self.way.hello().post_copy {
                self.wait_for_code(is_compiling)?;
                // A single round; pages written since are sent by post-copy. Blocks of
                // files are not: the target cannot request a missing block.
                self.volumes.catch_up(&mut self.link)?;
                for (set, ranges) in self.unsent.iter_mut().zip(&ranges) {
                    ranges.iter().for_each(|range| set.add_bytes(range));
                }
                break;
            }
            match convergence::next(&rounds, left, self.budget) {
                CopyDecision::Freeze => {
                    // Dirty pages that were found are sent with the rest.
                    self.send_ranges(&ranges, false)?;
                    self.volumes.send(&mut self.link)?;
                    break;
                }
                CopyDecision::Slower => self.throttle.more(),
                CopyDecision::Round => {}
            }
        }
        self.yielding = None;
        failpoint::pass("source.converged")?;
        tell(CopyEvent::Converged {
            rounds,
            slowed: self.throttle.is_on(),
        });
        Ok(())
    }

    /// Names the functions that the target must compile. Threads of a machine that spans stay with
    /// its parts.
    fn name_functions(&mut self) -> Result<(), SourceError> {
        match self.parts {
            Some(_) => Ok(()),
            None => Ok(self.functions.name(&self.machine, &mut self.link)?),
        }
    }

    /// The target's answer to the end of a round: whether it still compiles functions.
    fn end_of_round(&mut self) -> Result<bool, SourceError> {
        match self.log.round_answer(&mut self.link)? {
            Message::RoundDone => Ok(false),
            Message::Compiling => Ok(true),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until the target has compiled the functions that were named.
    fn wait_for_code(&mut self, mut is_compiling: bool) -> Result<(), SourceError> {
        while is_compiling {
            self.link.send(&Message::RoundEnd)?;
            self.link.flush()?;
            is_compiling = self.end_of_round()?;
        }
        Ok(())
    }

    /// Moves the threads and pages of a home to other parts while the machine runs.
    fn drain_home(&mut self, tell: &mut dyn FnMut(CopyEvent) -> bool) -> Result<(), SourceError> {
        let (Some(parts), link) = (&mut self.parts, &mut self.link) else {
            return Ok(());
        };
        let mut told = Instant::now();
        let mut lost = None;
        let give_up = parts.give_up.clone();
        let mut goes_on = |left: u64| {
            if give_up.load(Ordering::Acquire) {
                lost = Some(LinkError::Aborted("the move was given up".into()).into());
                return false;
            }
            if told.elapsed() < KEEPALIVE_INTERVAL {
                return true;
            }
            told = Instant::now();
            // The target waits for a message, but not for ever.
            let heard = link
                .send(&Message::RoundEnd)
                .and_then(|()| link.flush())
                .and_then(|()| link.receive());
            match heard {
                Ok(Message::RoundDone) => {}
                Ok(other) => lost = Some(unexpected(&other)),
                Err(error) => lost = Some(error.into()),
            }
            lost.is_none()
                && tell(CopyEvent::Progress(Progress {
                    sent_bytes: link.sent_bytes(),
                    remaining_bytes: left,
                    ..Progress::of(Phase::Copy)
                }))
        };
        let leaving = HomeMigration::begin(
            parts.home.clone(),
            parts.successor,
            parts.threads_to,
            DRAIN_PATIENCE,
            &mut goes_on,
        );
        if let Some(lost) = lost {
            return Err(lost);
        }
        parts.leaving = Some(leaving?);
        Ok(failpoint::pass("home.way")?)
    }

    /// Freezes the machine and sends all that the target lacks; returns when the target
    /// is ready to resume it.
    fn send_rest(&mut self) -> Result<Frozen, SourceError> {
        let post_copy = self.way.hello().post_copy;
        match post_copy {
            true => {
                self.volumes.catch_up(&mut self.link)?;
                // NamedRange while the machine runs, so that few pages are left to name.
                for number in 0..self.trackers.len() {
                    let ranges = self.trackers[number].take()?;
                    self.keep_pages(number as u32, &ranges)?;
                }
                self.link.flush()?;
            }
            false => self.catch_up()?,
        }
        if let Some(parts) = &self.parts {
            parts.check()?;
        }
        // A throttled guest stays throttled until here; if it is stopped just now, its
        // downtime has begun.
        let begun = self.throttle.stop().unwrap_or_else(Instant::now);
        self.link.use_frozen_timeout()?;
        failpoint::pass("source.freeze")?;
        self.machine.freeze(FREEZE_PATIENCE)?;
        self.throttle.release();
        failpoint::pass("source.frozen")?;
        let frozen = Instant::now();
        self.link.send(&Message::Frozen)?;
        let mut last_bytes = 0;
        if let Some(parts) = &mut self.parts {
            let handover = parts.handover()?;
            failpoint::pass("home.left")?;
            last_bytes += handover.len() as u64;
            for piece in handover.chunks(CHUNK_BYTES) {
                self.link.send(&Message::Parts(piece.to_vec().into()))?;
            }
        }
        if !post_copy {
            for number in 0..self.trackers.len() {
                let ranges = self.trackers[number].take_at_once()?;
                last_bytes += self.send_memory(number as u32, &ranges, false)?;
            }
        }
        let pages_sent = self.send_state(&mut last_bytes)?;
        failpoint::pass("source.image")?;
        if post_copy {
            // In post-copy, dirty pages are only named, before the machine resumes at the
            // target: the scan runs while the target builds the machine and the store
            // commits.
            let mut scan = ResidualDirtyScan::begin(std::mem::take(&mut self.trackers));
            while !self.link.has_input()? && scan.scan_piece() {
                // The target's thread may need this processor.
                std::thread::yield_now();
            }
            self.scan = Some(scan);
        }
        self.log.wait_prepared(&mut self.link)?;
        failpoint::pass("source.prepared")?;
        // From here on the store decides, however long that takes.
        self.link.wait_without_timeout()?;
        Ok(Frozen {
            freeze_micros: micros(frozen - begun),
            last_pages_micros: micros(pages_sent - frozen),
            last_bytes,
            state_micros: micros(pages_sent.elapsed()),
            bytes: self.link.sent_bytes(),
        })
    }

    /// Sends everything but memory; returns when the transfer of threads and WASI state
    /// began.
    fn send_state(&mut self, last_bytes: &mut u64) -> Result<Instant, SourceError> {
        *last_bytes += self.volumes.send_all(&mut self.link)?;
        self.log.send(&mut self.link)?;
        let pages_sent = Instant::now();
        failpoint::pass("source.last-pages")?;
        let image = self.machine.image()?.encode()?;
        for piece in image.chunks(CHUNK_BYTES) {
            self.link.send(&Message::Image(piece.to_vec().into()))?;
        }
        self.link.send(&Message::ImageEnd)?;
        self.link.flush()?;
        Ok(pages_sent)
    }

    /// Sends pages written since the last round, which preceded the store's check: every
    /// millisecond of that means fewer pages to send while frozen.
    fn catch_up(&mut self) -> Result<(), SourceError> {
        for _ in 0..CATCH_UP_ROUNDS_MAX {
            let mut ranges = Vec::with_capacity(self.trackers.len());
            for tracker in &mut self.trackers {
                ranges.push(tracker.take()?);
            }
            let mut bytes = self.send_ranges(&ranges, false)?;
            bytes += self.volumes.send_all(&mut self.link)?;
            self.link.flush()?;
            if bytes <= CATCH_UP_BYTES {
                break;
            }
        }
        Ok(())
    }

    fn tell(&mut self, epoch: Epoch) -> Result<(), SourceError> {
        failpoint::pass("source.go")?;
        if self.way.hello().post_copy {
            failpoint::pass("post-copy.name")?;
            std::mem::replace(&mut self.named, Ok(()))?;
        }
        self.link.send(&Message::Go(epoch))?;
        self.link.flush()?;
        match self.link.receive()? {
            Message::Resumed(_) => Ok(failpoint::pass("source.gone")?),
            other => Err(unexpected(&other)),
        }
    }

    fn send_names(&mut self, written: DirtyRanges) -> Result<(), SourceError> {
        let mut by_memory = vec![Vec::new(); self.unsent.len()];
        for (number, ranges) in written {
            by_memory[number].extend(ranges);
        }
        for (number, ranges) in (0..).zip(by_memory) {
            self.keep_pages(number, &ranges)?;
        }
        self.link.send(&Message::RoundEnd)?;
        Ok(self.link.flush()?)
    }

    /// Names the pages that the target does not get yet.
    fn keep_pages(&mut self, number: u32, ranges: &[Range<u64>]) -> Result<(), SourceError> {
        let memory = self.machine.memories()[number as usize].clone();
        self.link.send(&Message::Size {
            memory: number,
            pages: memory.size_bytes() >> 16,
        })?;
        let mut set = std::mem::take(&mut self.unsent[number as usize]);
        for range in ranges {
            set.add_bytes(range);
        }
        for message in set.messages(number) {
            self.link.send(&message)?;
        }
        Ok(())
    }

    fn send_ranges(
        &mut self,
        ranges: &[Vec<Range<u64>>],
        skip_zero: bool,
    ) -> Result<u64, SourceError> {
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
    ) -> Result<u64, SourceError> {
        let memory = self.machine.memories()[number as usize].clone();
        self.link.send(&Message::Size {
            memory: number,
            pages: memory.size_bytes() >> 16,
        })?;
        let read = |at: u64, bytes: &mut [u8]| memory.read(at, bytes).map_err(LinkError::memory);
        let mut sent = 0;
        for range in ranges {
            for start in (range.start..range.end).step_by(PIECE_BYTES as usize) {
                let piece = start..range.end.min(start + PIECE_BYTES);
                sent += self.link.send_pages(number, piece, skip_zero, &read)?;
                if let Some(yielding) = &mut self.yielding {
                    yielding.check();
                }
            }
        }
        Ok(sent)
    }
}

impl worker::SourceSession for SourceSession {
    fn closer(&self) -> Result<TcpStream, MoveError> {
        Ok(self.link.closer()?)
    }

    fn copy(&mut self, tell: &mut dyn FnMut(CopyEvent) -> bool) -> Result<(), MoveError> {
        Ok(self.copy_memory(tell)?)
    }

    fn freeze_and_send(&mut self) -> Result<Frozen, MoveError> {
        self.cluster_volumes.pause();
        Ok(self.send_rest()?)
    }

    /// Whether there are pages to name, which may take a while.
    fn has_work_during_commit(&self) -> bool {
        self.scan.is_some()
    }

    /// Finds the pages written last and names them.
    fn work_during_commit(&mut self) {
        let Some(mut scan) = self.scan.take() else {
            return;
        };
        let finished_scan = scan.end();
        self.finished_scan = Some(scan);
        match finished_scan {
            Ok(written) => self.named = self.send_names(written),
            // If the target receives the go message, it treats every page as written.
            Err(error) => {
                tracing::warn!(%error, "cannot determine the pages written last: all are sent");
            }
        }
    }

    fn go(&mut self, epoch: Epoch) -> Result<(), MoveError> {
        let told = self.tell(epoch);
        // The target may have been told by its agent; it then waits for further messages
        // on this connection, while this side waits for page requests.
        if told.is_err()
            && self.way.hello().post_copy
            && let Ok(closer) = self.link.closer()
        {
            // The socket may be closed already.
            let _ = closer.shutdown(std::net::Shutdown::Both);
        }
        Ok(told?)
    }

    fn serve(self, unsent: &AtomicU64) -> FillReport {
        post_copy::serve(&self.way, self.machine.memories(), Some(self.link), unsent)
    }

    /// Cancels the move of a home, whose threads and pages were leaving.
    fn cancel(&mut self) -> Result<(), MoveError> {
        match &mut self.parts {
            Some(parts) => Ok(parts.cancel()?),
            None => Ok(()),
        }
    }

    fn abort(mut self, reason: &str) {
        // The target notices in any case when the connection closes.
        let _ = self.link.send(&Message::Abort(reason.to_owned()));
        let _ = self.link.flush();
    }
}

impl WasmWorker {
    /// Prepares an attempt to move the machine; of one that spans, its home: to a part, and
    /// its threads to another one meanwhile.
    pub(super) fn begin_session(
        self: &Arc<Self>,
        copy: &Copy,
        to: Option<(PartId, PartId)>,
    ) -> Result<Connect<SourceSession>, String> {
        let log = self.process.log();
        let (parts, subject) = {
            let inner = self.inner();
            let parts = inner.parts.leaving(to)?;
            match (&inner.machine, log, &inner.name) {
                (Some(machine), Some(log), Some(name)) => {
                    let subject = Subject {
                        name: name.clone(),
                        epoch: inner.moves.epoch,
                        machine: machine.clone(),
                        log,
                        cluster_volumes: inner.cluster_volumes.clone(),
                    };
                    (parts, subject)
                }
                _ => return Err("this worker has no machine to move".into()),
            }
        };
        let (worker, copy) = (self.clone(), copy.clone());
        Ok(Connect {
            give_up: parts.as_ref().map(|it| it.give_up.clone()),
            connect: Box::new(move |identity| {
                let aborted = |reason| MoveError::from(LinkError::Aborted(reason));
                worker.end_checkpoints().map_err(aborted)?;
                worker.await_memory().map_err(aborted)?;
                Ok(SourceSession::connect(subject, identity, &copy, parts)?)
            }),
        })
    }
}

fn unexpected(message: &Message) -> SourceError {
    LinkError::Message(format!("{message:?} out of turn")).into()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
