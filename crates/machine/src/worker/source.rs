//! Gives the machine away: copies memory while the machine runs, freezes it,
//! sends the rest, and tells the target to go on. Blocking; has a thread of its
//! own.

use super::cluster_volumes::Keepers;
use super::control::{Copy, CopyEvent, Frozen, Succession};
use super::log_transfer::LogSource;
use super::post_copy::{self, PageSet};
use super::residual_dirty_scan::{Looking, Written};
use super::volumes::{OutgoingVolumes, VolumeError};
use crate::cgroup::Courtesy;
use crate::failpoint::{self, Injected};
use crate::link::{CHUNK_BYTES, HELLO_VERSION, Hello, Link, LinkError, Message, Purpose};
use crate::log::Log;
use crate::moves::convergence::{self, Next, best_rate};
use crate::moves::{FillReport, Phase, Progress, Round};
use crate::span::{Home, HomeMigration, PartId, SpanError, SpanningError};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_net::{ClientTls, PinnedIdentity};
use keel_wasm::memory::{DirtyTracker, MemoryError};
use keel_wasm::runtime::{Hold, Machine, MachineError, ProgramError};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of pages between two looks at what else wants the processors.
const PIECE_BYTES: u64 = 1 << 20;
/// Rounds of catching up just before the freeze, and what is little enough.
const CATCH_UP_ROUNDS_MAX: u32 = 4;
const CATCH_UP_BYTES: u64 = 256 << 10;
/// How long the threads and pages of a home may take elsewhere while the machine runs, and
/// its last pages while it stands.
const WAY_PATIENCE: Duration = Duration::from_secs(120);
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);
/// How often the target hears meanwhile that there is more to come.
const STILL_THERE: Duration = Duration::from_secs(2);
/// How long threads may take to their safepoints.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);
/// Period of slowing a guest down, and the largest share of it, in percent, in
/// which the guest stands.
const SLOW_PERIOD: Duration = Duration::from_millis(4);
const SLOW_PERCENT_MAX: u32 = 97;

/// Why the machine could not be given away. It runs on here, unless it ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutgoingError {
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
    #[error("its output cannot be read, or there is no thread for its move: {0}")]
    Log(#[from] std::io::Error),
    #[error(transparent)]
    Tls(#[from] keel_net::TlsError),
    #[error(transparent)]
    Spanning(#[from] SpanningError),
    #[error("what its home leaves cannot be written down: {0}")]
    HomeState(#[from] postcard::Error),
    #[error(transparent)]
    Injected(#[from] Injected),
}

/// The home of a machine that spans, whose other parts stay where they are.
pub(super) struct HomeParts {
    pub(super) home: Arc<Home>,
    pub(super) successor: PartId,
    pub(super) threads_to: PartId,
    /// The node of each part.
    pub(super) nodes: BTreeMap<PartId, NodeName>,
    /// Set when nobody wants it to move any more.
    pub(super) gives_up: Arc<AtomicBool>,
    /// Since its threads and pages leave.
    pub(super) leaving: Option<HomeMigration>,
}

impl HomeParts {
    /// The machine does not move: it may be thawed.
    ///
    /// # Errors
    /// [`SpanError`], if a part was lost.
    fn stay(&mut self) -> Result<(), SpanError> {
        match self.leaving.take() {
            Some(mut leaving) => leaving.stay(),
            None => Ok(()),
        }
    }

    /// Whether what is left of it can leave while the machine stands.
    fn check(&self) -> Result<(), SpanningError> {
        self.leaving.as_ref().map_or(Ok(()), HomeMigration::check)
    }

    /// What the successor has to know.
    fn succession(&mut self) -> Result<Vec<u8>, OutgoingError> {
        let leaving = self.leaving.as_mut();
        let leaving = leaving.ok_or(LinkError::Aborted("its home stays".into()))?;
        let legacy = leaving.leave(LEAVE_PATIENCE)?;
        let mut nodes = self.nodes.clone();
        if let Some(node) = nodes.remove(&self.successor) {
            nodes.insert(PartId::HOME, node);
        }
        Ok(postcard::to_stdvec(&Succession { legacy, nodes })?)
    }
}

impl Drop for HomeParts {
    fn drop(&mut self) {
        if let Err(error) = self.stay() {
            tracing::warn!(%error, "a machine whose home was to move has lost a part");
        }
    }
}

/// How the target's worker is reached.
pub(super) struct Way {
    address: String,
    tls: ClientTls,
    hello: Hello,
}

impl Way {
    /// Connects, and says what for.
    pub(super) fn connect(&self, purpose: Purpose) -> Result<Link, LinkError> {
        let mut link = Link::connect(&self.address, &self.tls)?;
        let hello = Hello {
            purpose,
            ..self.hello.clone()
        };
        link.send(&Message::Hello(hello))?;
        link.flush()?;
        Ok(link)
    }
}

/// One attempt to give a machine away.
pub(super) struct Outgoing {
    machine: Machine,
    log: LogSource,
    link: Link,
    way: Way,
    trackers: Vec<DirtyTracker>,
    /// Of a machine that spans.
    parts: Option<HomeParts>,
    volumes: OutgoingVolumes,
    slowdown: Slowdown,
    /// For each memory, pages that were found written and not sent.
    unsent: Vec<PageSet>,
    /// In a post-copy move: what finds the last of them, since the machine stands.
    looking: Option<Looking>,
    /// What found them, whose end takes a while.
    looked: Option<Looking>,
    /// What became of naming them.
    named: Result<(), OutgoingError>,
    /// While it copies.
    courtesy: Option<Courtesy>,
    /// What is left at the freeze may take this long to send.
    budget: Duration,
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
        parts: Option<HomeParts>,
    ) -> Result<Self, OutgoingError> {
        failpoint::pass("out.connect")?;
        let tls = ClientTls::pinned(identity, copy.target.fingerprint)?;
        let way = Way {
            address: copy.target.address.clone(),
            tls,
            hello: Hello {
                version: HELLO_VERSION,
                machine: name.clone(),
                epoch,
                program: *machine.program().hash(),
                log_base: log.base(),
                post_copy: copy.post_copy,
                purpose: Purpose::Move,
            },
        };
        let link = way.connect(Purpose::Move)?;
        Ok(Outgoing {
            way,
            slowdown: Slowdown::new(machine.clone()),
            unsent: vec![PageSet::default(); machine.memories().len()],
            looking: None,
            looked: None,
            named: Ok(()),
            courtesy: None,
            machine,
            log: LogSource::new(log),
            link,
            trackers: Vec::new(),
            parts,
            volumes: OutgoingVolumes::default(),
            budget: Duration::from_micros(copy.budget_micros),
        })
    }

    /// A handle that breaks the connection from another thread.
    pub(super) fn closer(&self) -> Result<std::net::TcpStream, OutgoingError> {
        Ok(self.link.closer()?)
    }

    /// Copies memory until little is left; of cluster volumes what is in no segment.
    pub(super) fn copy(
        &mut self,
        keepers: &Keepers,
        tell: &mut dyn FnMut(CopyEvent) -> bool,
    ) -> Result<(), OutgoingError> {
        keepers.wait_claimed().map_err(VolumeError::NotClaimed)?;
        // Threads must be able to go on here if the move fails; what that
        // needs is compiled now, while they run.
        self.machine.program().prepare_resume()?;
        failpoint::pass("out.hello")?;
        // (Of one that spans all memory stays with its parts.)
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
        self.volumes = OutgoingVolumes::start(self.machine.wasi(), keepers);
        self.courtesy = Courtesy::begin();
        self.make_way(tell)?;
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
            self.send_log()?;
            self.link.send(&Message::RoundEnd)?;
            self.link.flush()?;
            failpoint::pass("out.round")?;
            match self.answer()? {
                Message::RoundDone => {}
                other => return Err(unexpected(&other)),
            }
            let took = begun.elapsed();
            rounds.push(Round {
                bytes,
                micros: micros(took),
            });
            let mut left = self.volumes.look();
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
                return Err(LinkError::Aborted("nobody waits for it".into()).into());
            }
            if self.way.hello.post_copy {
                // One round; what was written since comes behind the machine.
                // Files do not: nobody waits for a block that is not there.
                self.volumes.catch_up(&mut self.link)?;
                for (set, ranges) in self.unsent.iter_mut().zip(&ranges) {
                    ranges.iter().for_each(|range| set.add_bytes(range));
                }
                break;
            }
            match convergence::next(&rounds, left, self.budget) {
                Next::Freeze => {
                    // What was found dirty is sent with the rest.
                    self.send_ranges(&ranges, false)?;
                    self.volumes.send(&mut self.link)?;
                    break;
                }
                Next::Slower => self.slowdown.more(),
                Next::Round => {}
            }
        }
        self.courtesy = None;
        failpoint::pass("out.converged")?;
        tell(CopyEvent::Converged {
            rounds,
            slowed: self.slowdown.is_on(),
        });
        Ok(())
    }

    /// Of a machine that spans: the home's threads and pages leave while it runs.
    fn make_way(&mut self, tell: &mut dyn FnMut(CopyEvent) -> bool) -> Result<(), OutgoingError> {
        let (Some(parts), link) = (&mut self.parts, &mut self.link) else {
            return Ok(());
        };
        let mut told = Instant::now();
        let mut lost = None;
        let gives_up = parts.gives_up.clone();
        let mut goes_on = |left: u64| {
            if gives_up.load(Ordering::Acquire) {
                lost = Some(LinkError::Aborted("the move was given up".into()).into());
                return false;
            }
            if told.elapsed() < STILL_THERE {
                return true;
            }
            told = Instant::now();
            // (The target waits for a word, and not for ever.)
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
            WAY_PATIENCE,
            &mut goes_on,
        );
        if let Some(lost) = lost {
            return Err(lost);
        }
        parts.leaving = Some(leaving?);
        Ok(failpoint::pass("home.way")?)
    }

    /// The machine does not move, and may be thawed: its home stays.
    ///
    /// # Errors
    /// [`SpanError`], if it lost a part: then it has ended.
    pub(super) fn stay(&mut self) -> Result<(), SpanError> {
        match &mut self.parts {
            Some(parts) => parts.stay(),
            None => Ok(()),
        }
    }

    /// Freezes the machine and sends all that the target lacks; returns when
    /// the target is ready to go on.
    pub(super) fn freeze_and_send(&mut self) -> Result<Frozen, OutgoingError> {
        let post_copy = self.way.hello.post_copy;
        match post_copy {
            true => {
                self.volumes.catch_up(&mut self.link)?;
                // Named while it runs; what is written from now on is little.
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
        // A guest that had to be slowed down is kept slow up to here; if it
        // stands still just now, its downtime has begun.
        let begun = self.slowdown.stop().unwrap_or_else(Instant::now);
        self.link.be_quick()?;
        failpoint::pass("out.freeze")?;
        self.machine.freeze(FREEZE_PATIENCE)?;
        self.slowdown.release();
        failpoint::pass("out.frozen")?;
        let frozen = Instant::now();
        self.link.send(&Message::Stands)?;
        let mut last_bytes = 0;
        if let Some(parts) = &mut self.parts {
            let succession = parts.succession()?;
            failpoint::pass("home.left")?;
            last_bytes += succession.len() as u64;
            for piece in succession.chunks(CHUNK_BYTES) {
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
        failpoint::pass("out.image")?;
        if post_copy {
            // Pages are only named, and before it goes on there: they are looked for
            // while the target makes the machine of its state and the store commits.
            let mut looking = Looking::begin(std::mem::take(&mut self.trackers));
            while !self.link.has_input()? && looking.look() {
                // The target's thread may be on this very processor.
                std::thread::yield_now();
            }
            self.looking = Some(looking);
        }
        loop {
            match self.link.receive()? {
                Message::Prepared => break,
                Message::LogAgain { offset } => {
                    self.log.again(offset);
                    self.send_log()?;
                    self.link.send(&Message::ImageEnd)?;
                    self.link.flush()?;
                }
                other => return Err(unexpected(&other)),
            }
        }
        failpoint::pass("out.prepared")?;
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

    /// Sends what the target needs beside memory; when it began to send threads
    /// and WASI state.
    fn send_state(&mut self, last_bytes: &mut u64) -> Result<Instant, OutgoingError> {
        *last_bytes += self.volumes.send_all(&mut self.link)?;
        self.send_log()?;
        let pages_sent = Instant::now();
        failpoint::pass("out.last-pages")?;
        let image = self.machine.image()?.encode()?;
        for piece in image.chunks(CHUNK_BYTES) {
            self.link.send(&Message::Image(piece.to_vec().into()))?;
        }
        self.link.send(&Message::ImageEnd)?;
        self.link.flush()?;
        Ok(pages_sent)
    }

    /// Sends what was written since the last round, which was before the store
    /// was asked: every millisecond of that is pages less to send while frozen.
    fn catch_up(&mut self) -> Result<(), OutgoingError> {
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

    /// Tells the target that the commit won; returns when the machine runs
    /// there.
    pub(super) fn go(&mut self, epoch: Epoch) -> Result<(), OutgoingError> {
        let told = self.tell(epoch);
        // The target may be told by its agent, and then waits for what else is said
        // here, while this side waits to hear which pages are wanted.
        if told.is_err()
            && self.way.hello.post_copy
            && let Ok(closer) = self.link.closer()
        {
            // It may be closed already.
            let _ = closer.shutdown(std::net::Shutdown::Both);
        }
        told
    }

    fn tell(&mut self, epoch: Epoch) -> Result<(), OutgoingError> {
        failpoint::pass("out.go")?;
        if self.way.hello.post_copy {
            failpoint::pass("fill.name")?;
            std::mem::replace(&mut self.named, Ok(()))?;
        }
        self.link.send(&Message::Go(epoch))?;
        self.link.flush()?;
        match self.link.receive()? {
            Message::Resumed(_) => Ok(failpoint::pass("out.gone")?),
            other => Err(unexpected(&other)),
        }
    }

    /// Nothing is sent through it for now.
    pub(super) fn rests(self) -> Leaving {
        Leaving::Rests(Box::new(self))
    }

    /// Whether there are pages to be named, which may take a while.
    pub(super) fn has_names(&self) -> bool {
        self.looking.is_some()
    }

    /// Finds what was written last and names it, while the store commits; how that
    /// ended is said by [`Self::go`].
    pub(super) fn name(&mut self) {
        let Some(mut looking) = self.looking.take() else {
            return;
        };
        let looked = looking.end();
        self.looked = Some(looking);
        match looked {
            Ok(written) => self.named = self.send_names(written),
            // If the target gets it, it takes every page for written.
            Err(error) => {
                tracing::warn!(%error, "what was written last is not known: all of it is sent");
            }
        }
    }

    fn send_names(&mut self, written: Written) -> Result<(), OutgoingError> {
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

    /// Says which pages the target does not get yet.
    fn keep_pages(&mut self, number: u32, ranges: &[Range<u64>]) -> Result<(), OutgoingError> {
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

    /// Sends all pages that were kept, for as long as it takes.
    pub(super) fn serve(self, unsent: &std::sync::atomic::AtomicU64) -> FillReport {
        post_copy::serve(&self.way, self.machine.memories(), Some(self.link), unsent)
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
        let read = |at: u64, bytes: &mut [u8]| memory.read(at, bytes);
        let mut sent = 0;
        for range in ranges {
            for start in (range.start..range.end).step_by(PIECE_BYTES as usize) {
                let piece = start..range.end.min(start + PIECE_BYTES);
                sent += self.link.send_pages(number, piece, skip_zero, &read)?;
                if let Some(courtesy) = &mut self.courtesy {
                    courtesy.look();
                }
            }
        }
        Ok(sent)
    }

    fn send_log(&mut self) -> Result<(), OutgoingError> {
        while let Some(message) = self.log.next()? {
            self.link.send(&message)?;
        }
        Ok(())
    }

    /// What the target says to a round; what it lacks of the output is in the next.
    fn answer(&mut self) -> Result<Message, OutgoingError> {
        loop {
            match self.link.receive()? {
                Message::LogAgain { offset } => self.log.again(offset),
                other => return Ok(other),
            }
        }
    }
}

fn unexpected(message: &Message) -> OutgoingError {
    LinkError::Message(format!("{message:?} out of turn")).into()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// An [`Outgoing`] that is not spoken through just now.
pub(super) enum Leaving {
    /// Nothing is sent.
    Rests(Box<Outgoing>),
    /// A thread names pages.
    Names(JoinHandle<Outgoing>),
}

impl Leaving {
    /// Names what was written last, if that is still to be done.
    ///
    /// # Errors
    /// Where there is no thread for it: the connection is lost then.
    pub(super) fn after_freeze(mut outgoing: Outgoing) -> std::io::Result<Self> {
        if !outgoing.has_names() {
            return Ok(outgoing.rests());
        }
        let thread = std::thread::Builder::new().name("name".into());
        let name = move || {
            outgoing.name();
            outgoing
        };
        Ok(Leaving::Names(thread.spawn(name)?))
    }

    /// The machine does not move, and may be thawed.
    ///
    /// # Errors
    /// [`SpanError`], if it lost a part: then it has ended.
    pub(super) fn stay(&mut self) -> Result<(), SpanError> {
        match self {
            Leaving::Rests(outgoing) => outgoing.stay(),
            // (Memory that comes after it only what is on one node has.)
            Leaving::Names(_) => Ok(()),
        }
    }

    /// It, once it is not spoken through.
    pub(super) fn wait(self) -> Outgoing {
        match self {
            Leaving::Rests(outgoing) => *outgoing,
            Leaving::Names(thread) => thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        }
    }
}

/// Slows a guest down: its threads stand at safepoints for a share of the time.
struct Slowdown {
    machine: Machine,
    shared: Arc<Pace>,
    thread: Option<JoinHandle<Option<Instant>>>,
}

#[derive(Default)]
struct Pace {
    /// Share of the time in which it stands, in percent; `None` at the end.
    percent: Mutex<Option<u32>>,
    changed: Condvar,
}

impl Pace {
    fn locked(&self) -> MutexGuard<'_, Option<u32>> {
        self.percent
            .lock()
            .unwrap_or_else(|error| error.into_inner())
    }

    /// Sleeps; `false` if it was woken since the end has come.
    fn sleep(&self, time: Duration) -> bool {
        let (percent, _) = self
            .changed
            .wait_timeout_while(self.locked(), time, |percent| percent.is_some())
            .unwrap_or_else(|error| error.into_inner());
        percent.is_some()
    }

    /// Holds and releases until the end; since when it is held then.
    fn keep(&self, machine: &Machine) -> Option<Instant> {
        loop {
            let percent = (*self.locked())?;
            let begun = Instant::now();
            if let Err(error) = machine.hold(Hold::Slowdown, None) {
                tracing::warn!(%error, "the machine cannot be slowed down");
                return None;
            }
            if !self.sleep(SLOW_PERIOD * percent / 100) {
                return Some(begun);
            }
            machine.release(Hold::Slowdown);
            if !self.sleep(SLOW_PERIOD * (100 - percent) / 100) {
                return None;
            }
        }
    }
}

impl Slowdown {
    fn new(machine: Machine) -> Self {
        Slowdown {
            machine,
            shared: Arc::default(),
            thread: None,
        }
    }

    fn is_on(&self) -> bool {
        self.thread.is_some()
    }

    fn more(&mut self) {
        {
            let mut percent = self.shared.locked();
            // 50, 75, 87, 93, 96, 97
            let now = percent.unwrap_or(0);
            *percent = Some((now + (100 - now) / 2).min(SLOW_PERCENT_MAX));
        }
        if self.thread.is_some() {
            return;
        }
        let (machine, pace) = (self.machine.clone(), self.shared.clone());
        self.thread = std::thread::Builder::new()
            .name("slowdown".into())
            .spawn(move || pace.keep(&machine))
            .ok();
    }

    /// Ends; threads that are held just now stay so, and the answer is since
    /// when.
    fn stop(&mut self) -> Option<Instant> {
        *self.shared.locked() = None;
        self.shared.changed.notify_all();
        // It only sleeps, holds and releases.
        self.thread.take()?.join().unwrap_or_default()
    }

    fn release(&self) {
        self.machine.release(Hold::Slowdown);
    }
}

impl Drop for Slowdown {
    fn drop(&mut self) {
        self.stop();
        self.release();
    }
}
