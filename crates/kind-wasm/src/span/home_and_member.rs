//! A machine with several parts, seen from its home ([`Home`]) and from a member
//! ([`MemberPart`]): its threads on top of its pages.
//!
//! ```text
//!            freeze, pages, thaw                      threads and pages home,
//!   one part ───────────────────────▶ spans, [`Home`] ──────────────────────────▶ one part
//!                                  │  ▲  │            freeze, thaw
//!                a part joins, leaves└──┘  │ a part is lost: the machine ends
//! ```
//!
//! Starting parts and connecting them happens elsewhere.

use super::pages::{BeginError, Listener, Notifier, Pages, PartConfig, SpanError};
use super::peer::PeerConnections;
use keel_wasm::coherence::{PartId, PartSet};
use keel_wasm::memory::{GuestMemory, MemoryError};
use keel_wasm::runtime::parts::{HomeLink, Member, Members, Order, Report, SpawnPolicy};
use keel_wasm::runtime::{Machine, MachineError, Program, Signal, make_memories};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// Pages per directory segment: 64 KiB, a page of WebAssembly.
const SEGMENT_PAGES: u32 = 16;
/// The least time that a page stays where it arrived: about the time of the transfer.
const HOLD: Duration = Duration::from_micros(100);
/// Polling interval while threads move home.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Why a machine does not start or stop to span. It goes on as before, unless a part was
/// lost.
#[derive(Debug, thiserror::Error)]
pub enum SpanningError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Begin(#[from] BeginError),
    #[error(transparent)]
    Span(#[from] SpanError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Threads did not reach a safepoint in time.
    #[error("{0} thread(s) did not move home in time")]
    Away(usize),
}

/// How a machine spans.
#[derive(Debug, Clone, Copy)]
pub struct SpanConfig {
    /// Where new threads begin.
    pub spawning: SpawnPolicy,
    /// Time limit for threads to reach a safepoint.
    pub patience: Duration,
    /// Memory limits of its parts.
    pub limits: PartLimits,
    /// The machine is stopped and stays so; the caller resumes it.
    pub stays_stopped: bool,
}

/// Memory limits of a machine's parts, which apply while other parts have room; none by
/// default.
#[derive(Debug, Clone, Copy, Default)]
pub struct PartLimits {
    /// Limit of each part, in bytes.
    pub part_bytes: Option<u64>,
    /// Room of this part's host, in bytes.
    pub room_bytes: Option<u64>,
}

/// Ends a machine that loses a part, and forwards the notes of members to it.
pub(super) struct HomeListener {
    machine: Machine,
    failure: Arc<Mutex<Option<SpanError>>>,
    /// The machine depends on its members.
    depends: Arc<AtomicBool>,
}

impl HomeListener {
    /// For a machine that depends on its members; returns the place where a loss is
    /// recorded, too.
    pub(super) fn depending(machine: &Machine) -> (Self, Arc<Mutex<Option<SpanError>>>) {
        let failure = Arc::default();
        let listener = HomeListener {
            machine: machine.clone(),
            failure: Arc::clone(&failure),
            depends: Arc::new(AtomicBool::new(true)),
        };
        (listener, failure)
    }
}

impl Listener for HomeListener {
    fn note(&self, from: PartId, note: &[u8]) -> Result<(), String> {
        // A late message of the former home, whose place this part has taken.
        if from == PartId::HOME {
            return Ok(());
        }
        let report = Report::decode(note).map_err(|error| error.to_string())?;
        self.machine.receive(from, report);
        Ok(())
    }

    fn time(&self) -> u64 {
        self.machine.wasi().monotonic_ns()
    }

    fn saw(&self, guest_ns: u64) {
        self.machine.wasi().advance_monotonic_to(guest_ns);
    }

    fn over(&self, reason: &SpanError) {
        if *reason != SpanError::Ended {
            let mut failure = self
                .failure
                .lock()
                .unwrap_or_else(|error| error.into_inner());
            failure.get_or_insert_with(|| reason.clone());
        }
        match self.depends.load(Ordering::Acquire) {
            true => self.machine.part_lost(),
            false => self.machine.members_lost(),
        }
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}

pub(super) struct MemberChannel(Notifier);

impl MemberChannel {
    pub(super) fn new(notifier: Notifier) -> Self {
        MemberChannel(notifier)
    }
}

impl Members for MemberChannel {
    fn order(&self, part: PartId, order: &Order) {
        let is_answered = matches!(
            order,
            Order::Expect { .. } | Order::Interrupt { .. } | Order::Open { .. }
        );
        self.0.note(part, &order.encode(), is_answered);
    }

    fn stalled_us(&self, os_thread: u32) -> BTreeMap<PartId, u64> {
        self.0.wait_micros(os_thread)
    }
}

/// A member's channel to the home; set once the pages exist that send its notes.
struct HomeChannel(Arc<OnceLock<Notifier>>);

impl HomeLink for HomeChannel {
    fn report(&self, report: Report) {
        let is_answered = matches!(report, Report::Expecting { .. } | Report::Call { .. });
        self.0
            .wait()
            .note(PartId::HOME, &report.encode(), is_answered);
    }

    fn stalled_us(&self, os_thread: u32) -> BTreeMap<PartId, u64> {
        let notifier = self.0.get();
        notifier.map_or_else(BTreeMap::new, |notifier| notifier.wait_micros(os_thread))
    }
}

/// A machine that spans, at its home. Dropping it ends the machine.
#[derive(Debug)]
pub struct Home {
    machine: Machine,
    pages: Arc<Pages>,
    members: Mutex<PartSet>,
    /// Members to which no threads or pages move any more.
    leaving: Mutex<PartSet>,
    /// Members whose requests for pages are no longer served: this cannot be undone.
    pub(super) emptied: Mutex<PartSet>,
    spawning: SpawnPolicy,
    failure: Arc<Mutex<Option<SpanError>>>,
    downtime: Duration,
}

impl Home {
    /// Makes a machine span; it runs afterwards. `ends` has the connections to its
    /// members, which have started ([`MemberPart::begin`]) or do so at the same time.
    ///
    /// # Errors
    /// [`SpanningError`]; the machine then goes on in one part, or stays stopped as
    /// before.
    pub fn begin(
        machine: &Machine,
        ends: BTreeMap<PartId, PeerConnections>,
        how: SpanConfig,
    ) -> Result<Self, SpanningError> {
        let members: PartSet = ends.keys().copied().collect();
        let failure = Arc::default();
        let depends = Arc::new(AtomicBool::new(false));
        machine.freeze(how.patience)?;
        let goes_on = || match how.stays_stopped {
            true => Ok(()),
            false => machine.thaw(),
        };
        let begun = Instant::now();
        let listener = HomeListener {
            machine: machine.clone(),
            failure: Arc::clone(&failure),
            depends: depends.clone(),
        };
        let setup = PartConfig {
            room_bytes: how.limits.room_bytes,
            ..setup(PartId::HOME, members, machine.memories())
        };
        let spans = Pages::begin(setup, ends, Arc::new(listener))
            .map_err(SpanningError::from)
            .and_then(|pages| {
                let way = Arc::new(MemberChannel(pages.notifier()));
                let set = machine.set_members(members.iter().collect(), Some(way), how.spawning);
                depends.store(set.is_ok(), Ordering::Release);
                match (set, pages.failure()) {
                    (Ok(()), None) => {
                        // No page leaves before the machine depends on its members.
                        pages.limit_parts(how.limits.part_bytes)?;
                        Ok(pages)
                    }
                    (set, lost) => {
                        depends.store(false, Ordering::Release);
                        pages.finish();
                        Err(match (set, lost) {
                            (_, Some(lost)) => lost.into(),
                            (Err(error), None) => error.into(),
                            (Ok(()), None) => SpanError::Ended.into(),
                        })
                    }
                }
            });
        let pages = match spans {
            Ok(pages) => pages,
            Err(error) => {
                let alone = machine.set_members(Vec::new(), None, SpawnPolicy::Here);
                if let Err(why) = alone.and_then(|()| goes_on()) {
                    tracing::warn!(%why, "cannot resume the machine in one part");
                }
                return Err(error);
            }
        };
        if let Err(error) = goes_on() {
            // A thread could not be started, or the machine was ended: then it ends with
            // this error.
            tracing::warn!(%error, "cannot resume the machine that spans");
        }
        Ok(Home {
            machine: machine.clone(),
            pages: Arc::new(pages),
            members: Mutex::new(members),
            leaving: Mutex::default(),
            emptied: Mutex::default(),
            spawning: how.spawning,
            failure,
            downtime: begun.elapsed(),
        })
    }

    /// For a part that took over the home.
    pub(super) fn of(
        machine: &Machine,
        pages: Arc<Pages>,
        members: PartSet,
        spawning: SpawnPolicy,
        failure: Arc<Mutex<Option<SpanError>>>,
        downtime: Duration,
    ) -> Self {
        Home {
            machine: machine.clone(),
            pages,
            members: Mutex::new(members),
            leaving: Mutex::default(),
            emptied: Mutex::default(),
            spawning,
            failure,
            downtime,
        }
    }

    pub(super) fn spawning(&self) -> SpawnPolicy {
        self.spawning
    }

    /// Downtime of the start, or of the takeover.
    pub fn downtime(&self) -> Duration {
        self.downtime
    }

    pub fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    pub fn members(&self) -> PartSet {
        *locked(&self.members)
    }

    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Stops or resumes moving threads and pages to a member.
    pub(super) fn set_leaving(&self, part: PartId, leaves: bool) {
        let mut leaving = locked(&self.leaving);
        *leaving = match leaves {
            true => leaving.with(part),
            false => leaving.without(part),
        };
        self.machine.drain_members(*leaving);
    }

    /// Sets the members, whose memories must be as large as here. Returns the downtime.
    ///
    /// # Errors
    /// [`SpanningError`]; the members are then as before, unless one was lost.
    pub(super) fn set_members(
        &self,
        members: PartSet,
        patience: Duration,
    ) -> Result<Duration, SpanningError> {
        self.machine.freeze(patience)?;
        let begun = Instant::now();
        let set = |members: PartSet| {
            let way = Arc::new(MemberChannel(self.pages.notifier()));
            let members = members.iter().collect();
            self.machine.set_members(members, Some(way), self.spawning)
        };
        let result = set(members);
        match &result {
            Ok(()) => *locked(&self.members) = members,
            // If this fails, the machine is lost and ends.
            Err(_) => set(self.members()).unwrap_or_else(|error| {
                tracing::warn!(%error, "cannot restore the members of the machine");
            }),
        }
        if let Err(error) = self.machine.thaw() {
            // A thread could not be started, or the machine was ended: then it ends with
            // this error.
            tracing::warn!(%error, "cannot resume after a change of parts");
        }
        Ok(result.map(|()| begun.elapsed())?)
    }

    /// Why the machine ended, if a part was lost.
    pub fn failure(&self) -> Option<SpanError> {
        self.failure
            .lock()
            .unwrap_or_else(|error| error.into_inner())
            .clone()
    }

    /// Brings threads and pages home while the machine runs, and reduces it to one part.
    /// Returns the downtime.
    ///
    /// # Errors
    /// [`SpanningError`]. The members remain, but nothing moves to them any more, so this
    /// can only be tried again.
    pub fn unspan(&self, patience: Duration) -> Result<Duration, SpanningError> {
        // All pages move here, whatever the limit, and nothing moves to members any more,
        // even on failure.
        self.pages.keep_all();
        let begun = self.try_unspan(patience)?;
        // First, so that the end of members is not a loss.
        self.pages.detach();
        for part in self.members().iter() {
            self.pages
                .notifier()
                .note(part, &Order::End.encode(), false);
        }
        self.pages.finish();
        if let Err(error) = self.machine.thaw() {
            // A thread could not be started; all others run.
            tracing::warn!(%error, "cannot resume the machine in one part");
        }
        Ok(begun.elapsed())
    }

    /// Freezes the machine once nothing is left at members; returns since when it is
    /// stopped.
    fn try_unspan(&self, patience: Duration) -> Result<Instant, SpanningError> {
        let deadline = Instant::now() + patience;
        for part in self.members().iter() {
            self.set_leaving(part, true);
        }
        self.collect_directories(patience)?;
        self.send_threads(
            |part| part != PartId::HOME,
            PartId::HOME,
            deadline,
            &mut || true,
        )?;
        for part in self.members().iter() {
            let rest = deadline.saturating_duration_since(Instant::now());
            self.empty(part, rest)?;
        }
        self.machine.freeze(patience)?;
        let begun = Instant::now();
        let alone = self
            .machine
            .set_members(Vec::new(), None, SpawnPolicy::Here);
        if let Err(error) = alone {
            self.machine.thaw()?;
            return Err(error.into());
        }
        Ok(begun)
    }
}

fn setup(me: PartId, members: PartSet, memories: &Arc<[Arc<GuestMemory>]>) -> PartConfig {
    PartConfig {
        me,
        parts: members.with(PartId::HOME),
        origin: PartId::HOME,
        memories: memories.clone(),
        segment_pages: SEGMENT_PAGES,
        hold: HOLD,
        seed: me.number() as u64 + 1,
        room_bytes: None,
    }
}

struct MemberListener(Member);

impl Listener for MemberListener {
    fn note(&self, from: PartId, note: &[u8]) -> Result<(), String> {
        if from != PartId::HOME {
            return Err("only the home may send orders to threads".into());
        }
        self.0
            .receive(Order::decode(note).map_err(|error| error.to_string())?);
        Ok(())
    }

    fn time(&self) -> u64 {
        self.0.clock().monotonic_ns()
    }

    fn saw(&self, guest_ns: u64) {
        self.0.clock().advance_to(guest_ns);
    }

    fn over(&self, _reason: &SpanError) {
        self.0.end();
    }
}

/// A part other than the home. Dropping it ends the part and with it the machine.
#[derive(Debug)]
pub struct MemberPart {
    member: Member,
    pages: Arc<Pages>,
    is_home: AtomicBool,
}

impl MemberPart {
    /// Starts to serve. Each memory may grow to `limit_bytes`; the home determines the
    /// present sizes. `room_bytes` is the room of this host, if that is less.
    ///
    /// # Errors
    /// [`SpanningError`]; all resources are released then.
    pub fn begin(
        program: Arc<Program>,
        limit_bytes: u64,
        room_bytes: Option<u64>,
        me: PartId,
        ends: BTreeMap<PartId, PeerConnections>,
    ) -> Result<Self, SpanningError> {
        program.prepare_resume().map_err(MachineError::from)?;
        let memories = make_memories(program.meta(), limit_bytes)?;
        let notifier: Arc<OnceLock<Notifier>> = Arc::default();
        let way = HomeChannel(notifier.clone());
        let member = Member::new(program, memories.clone(), Box::new(way));
        let members = ends.keys().copied().collect::<PartSet>().with(me);
        let setup = PartConfig {
            room_bytes,
            ..setup(me, members.without(PartId::HOME), &memories)
        };
        let pages = Pages::begin(setup, ends, Arc::new(MemberListener(member.clone())))
            .inspect_err(|_| member.end())?;
        // Set only here.
        let _ = notifier.set(pages.notifier());
        Ok(MemberPart {
            member,
            pages: Arc::new(pages),
            is_home: AtomicBool::new(false),
        })
    }

    /// Threads at this part.
    pub fn threads(&self) -> Vec<u32> {
        self.member.threads()
    }

    /// The signal that brings a thread of this part to a safepoint.
    pub fn signal(&self, tid: u32) -> Option<Arc<Signal>> {
        self.member.signal(tid)
    }

    pub fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    pub(super) fn member(&self) -> &Member {
        &self.member
    }

    /// This part has no threads as a member any more and is the home.
    pub(super) fn is_home_now(&self) {
        self.is_home.store(true, Ordering::Release);
        self.member.end();
    }

    /// Whether it has become the home and is no longer a member.
    pub fn has_become_home(&self) -> bool {
        self.is_home.load(Ordering::Acquire)
    }

    /// Ends the part at once, whatever its threads do, and with it the machine.
    pub fn die(self) {
        self.end();
    }

    /// As [`Self::die`]; memory is freed with the last reference.
    pub fn end(&self) {
        self.member.end();
        self.pages.die();
    }

    /// Waits until the machine has ended or has one part again, and no thread is here.
    pub fn wait(&self) {
        self.member.wait();
    }
}

impl Drop for MemberPart {
    fn drop(&mut self) {
        // Threads must leave before the pages are dropped.
        self.member.end();
        self.member.wait();
    }
}
