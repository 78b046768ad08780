//! A machine with several parts: its threads on top of its pages, at the home and at a
//! member.
//!
//! ```text
//!            freeze, pages, thaw                      threads home, pages home,
//!   alone ───────────────────────▶ spans, [`Home`] ──────────────────────────▶ alone
//!                                  │  ▲  │            freeze, thaw
//!                a part comes, goes└──┘  │ a part is lost: it ends
//! ```
//!
//! Who starts parts and connects them is not here.

use super::pages::{BeginError, Listener, Notifier, Pages, PartConfig, SpanError};
use super::peer::PeerConnections;
use keel_wasm::coherence::{PartId, PartSet};
use keel_wasm::memory::{GuestMemory, MemoryError};
use keel_wasm::runtime::parts::{Member, Members, Order, Report, Spawning, ToHome};
use keel_wasm::runtime::{Machine, MachineError, Program, Signal, make_memories};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// Pages whose directory is at one place: 64 KiB, a page of WebAssembly. What is smaller has
/// its directory where the rest of its page has it.
const SEGMENT_PAGES: u32 = 16;
/// For how long a page stays where it came, at least: about as long as bringing it took.
const HOLD: Duration = Duration::from_micros(100);
/// Pause before it is looked again whether threads have come home.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Why a machine does not begin or cease to span. It goes on as it was, unless a part was
/// lost.
#[derive(Debug, thiserror::Error)]
pub enum SpanningError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its pages.
    #[error(transparent)]
    Begin(#[from] BeginError),
    /// A part.
    #[error(transparent)]
    Span(#[from] SpanError),
    /// No memory for a part.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Threads that do not come to a safepoint.
    #[error("{0} thread(s) did not come home in time")]
    Away(usize),
}

/// How it is to span.
#[derive(Debug, Clone, Copy)]
pub struct SpanConfig {
    /// Where threads begin that it starts.
    pub spawning: Spawning,
    /// How long its threads may take to a safepoint.
    pub patience: Duration,
    /// How much memory its parts keep.
    pub keeps: PartLimits,
    /// It stands, and stays so: who made it stand lets it go on.
    pub stands: bool,
}

/// How much of a machine's memory parts keep, at most, while others have room for the
/// rest; all that is there by default.
#[derive(Debug, Clone, Copy, Default)]
pub struct PartLimits {
    /// Each of them, in bytes.
    pub part_bytes: Option<u64>,
    /// The one that is told: what its host has room for, in bytes.
    pub room_bytes: Option<u64>,
}

/// Ends a machine that loses a part, and says what the parts say to it.
pub(super) struct HomeListener {
    machine: Machine,
    failure: Arc<Mutex<Option<SpanError>>>,
    /// The machine cannot do without its members any more.
    depends: Arc<AtomicBool>,
}

impl HomeListener {
    /// Of a machine that cannot do without its members; and where it says which it lost.
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
        // (What the home said last whose place this one has taken.)
        if from == PartId::HOME {
            return Ok(());
        }
        let report = Report::decode(note).map_err(|error| error.to_string())?;
        self.machine.hear(from, report);
        Ok(())
    }

    fn time(&self) -> u64 {
        self.machine.wasi().monotonic_ns()
    }

    fn saw(&self, guest_ns: u64) {
        self.machine.wasi().saw_monotonic(guest_ns);
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
            true => self.machine.lose(),
            false => self.machine.lose_members(),
        }
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}

pub(super) struct MemberChannel(Notifier);

impl MemberChannel {
    pub(super) fn new(teller: Notifier) -> Self {
        MemberChannel(teller)
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

    fn stood(&self, os_thread: u32) -> BTreeMap<PartId, u64> {
        self.0.stood_at(os_thread)
    }
}

/// A member's way; it is there as soon as the pages are, which tell what is said.
struct HomeChannel(Arc<OnceLock<Notifier>>);

impl ToHome for HomeChannel {
    fn report(&self, report: Report) {
        let is_answered = matches!(report, Report::Expecting { .. } | Report::Call { .. });
        self.0
            .wait()
            .note(PartId::HOME, &report.encode(), is_answered);
    }

    fn stood(&self, os_thread: u32) -> BTreeMap<PartId, u64> {
        let teller = self.0.get();
        teller.map_or_else(BTreeMap::new, |teller| teller.stood_at(os_thread))
    }
}

/// A machine that spans, at its home. Dropping it ends the machine.
#[derive(Debug)]
pub struct Home {
    machine: Machine,
    pages: Arc<Pages>,
    members: Mutex<PartSet>,
    /// Those to which nothing goes any more.
    leaving: Mutex<PartSet>,
    /// Those that get no page any more that they ask for: they have no way back.
    pub(super) emptied: Mutex<PartSet>,
    spawning: Spawning,
    failure: Arc<Mutex<Option<SpanError>>>,
    stood: Duration,
}

impl Home {
    /// A machine spans from now on, and runs; `ends` has the connections to its members,
    /// which have begun ([`MemberPart::begin`]) or do so at the same time.
    ///
    /// # Errors
    /// [`SpanningError`]; it goes on alone then, or stands as it did.
    pub fn begin(
        machine: &Machine,
        ends: BTreeMap<PartId, PeerConnections>,
        how: SpanConfig,
    ) -> Result<Self, SpanningError> {
        let members: PartSet = ends.keys().copied().collect();
        let failure = Arc::default();
        let depends = Arc::new(AtomicBool::new(false));
        machine.freeze(how.patience)?;
        let goes_on = || match how.stands {
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
            room_bytes: how.keeps.room_bytes,
            ..setup(PartId::HOME, members, machine.memories())
        };
        let spans = Pages::begin(setup, ends, Arc::new(listener))
            .map_err(SpanningError::from)
            .and_then(|pages| {
                let way = Arc::new(MemberChannel(pages.teller()));
                let set = machine.set_members(members.iter().collect(), Some(way), how.spawning);
                depends.store(set.is_ok(), Ordering::Release);
                match (set, pages.failure()) {
                    (Ok(()), None) => {
                        // Nothing leaves before it depends on its members.
                        pages.limit_parts(how.keeps.part_bytes)?;
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
                let alone = machine.set_members(Vec::new(), None, Spawning::Here);
                if let Err(why) = alone.and_then(|()| goes_on()) {
                    tracing::warn!(%why, "the machine does not go on alone");
                }
                return Err(error);
            }
        };
        if let Err(error) = goes_on() {
            // (A thread that could not be launched, or it was ended: then it ends with this.)
            tracing::warn!(%error, "the machine spans");
        }
        Ok(Home {
            machine: machine.clone(),
            pages: Arc::new(pages),
            members: Mutex::new(members),
            leaving: Mutex::default(),
            emptied: Mutex::default(),
            spawning: how.spawning,
            failure,
            stood: begun.elapsed(),
        })
    }

    /// One that took another's place.
    pub(super) fn of(
        machine: &Machine,
        pages: Arc<Pages>,
        members: PartSet,
        spawning: Spawning,
        failure: Arc<Mutex<Option<SpanError>>>,
        stood: Duration,
    ) -> Self {
        Home {
            machine: machine.clone(),
            pages,
            members: Mutex::new(members),
            leaving: Mutex::default(),
            emptied: Mutex::default(),
            spawning,
            failure,
            stood,
        }
    }

    pub(super) fn spawning(&self) -> Spawning {
        self.spawning
    }

    /// How long it stood still to begin, or to take another home's place.
    pub fn stood(&self) -> Duration {
        self.stood
    }

    /// Its pages.
    pub fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    /// Its members.
    pub fn members(&self) -> PartSet {
        *locked(&self.members)
    }

    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Nothing goes to a member any more, or it may again.
    pub(super) fn let_leave(&self, part: PartId, leaves: bool) {
        let mut leaving = locked(&self.leaving);
        *leaving = match leaves {
            true => leaving.with(part),
            false => leaving.without(part),
        };
        self.machine.let_leave(*leaving);
    }

    /// It has these members from now on, of which each has memories as large as here. How
    /// long the machine stood still.
    ///
    /// # Errors
    /// [`SpanningError`]; it has those that it had, unless one was lost.
    pub(super) fn set_members(
        &self,
        members: PartSet,
        patience: Duration,
    ) -> Result<Duration, SpanningError> {
        self.machine.freeze(patience)?;
        let begun = Instant::now();
        let set = |members: PartSet| {
            let way = Arc::new(MemberChannel(self.pages.teller()));
            let members = members.iter().collect();
            self.machine.set_members(members, Some(way), self.spawning)
        };
        let result = set(members);
        match &result {
            Ok(()) => *locked(&self.members) = members,
            // (If that fails it is lost, and ends.)
            Err(_) => set(self.members()).unwrap_or_else(|error| {
                tracing::warn!(%error, "the machine does not have the members that it had");
            }),
        }
        if let Err(error) = self.machine.thaw() {
            // (A thread that could not be launched, or it was ended: then it ends with this.)
            tracing::warn!(%error, "the parts of the machine have changed");
        }
        Ok(result.map(|()| begun.elapsed())?)
    }

    /// Why the machine ended, if a part of it was lost.
    pub fn failure(&self) -> Option<SpanError> {
        self.failure
            .lock()
            .unwrap_or_else(|error| error.into_inner())
            .clone()
    }

    /// Brings threads and pages home while it runs, and lets it be alone again. How long
    /// it stood still.
    ///
    /// # Errors
    /// [`SpanningError`]. It still has its members; nothing goes to them any more, so it can
    /// only be tried again.
    pub fn alone(&self, patience: Duration) -> Result<Duration, SpanningError> {
        // All that there is comes here, whatever this part would keep, and nothing goes to
        // members any more, also if it fails.
        self.pages.keep_all();
        let begun = self.try_alone(patience)?;
        // First: members that end are no loss any more.
        self.pages.leave_alone();
        for part in self.members().iter() {
            self.pages.teller().note(part, &Order::End.encode(), false);
        }
        self.pages.finish();
        if let Err(error) = self.machine.thaw() {
            // (A thread that could not be launched; all others run.)
            tracing::warn!(%error, "the machine is alone again");
        }
        Ok(begun.elapsed())
    }

    /// Until it is frozen, and has nothing elsewhere; since when it stands.
    fn try_alone(&self, patience: Duration) -> Result<Instant, SpanningError> {
        let deadline = Instant::now() + patience;
        for part in self.members().iter() {
            self.let_leave(part, true);
        }
        self.bring_directories(patience)?;
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
        let alone = self.machine.set_members(Vec::new(), None, Spawning::Here);
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
            return Err("only the home says what threads do".into());
        }
        self.0
            .hear(Order::decode(note).map_err(|error| error.to_string())?);
        Ok(())
    }

    fn time(&self) -> u64 {
        self.0.clock().monotonic_ns()
    }

    fn saw(&self, guest_ns: u64) {
        self.0.clock().saw(guest_ns);
    }

    fn over(&self, _reason: &SpanError) {
        self.0.end();
    }
}

/// A part that is not the home. Dropping it ends it: then so does the machine.
#[derive(Debug)]
pub struct MemberPart {
    member: Member,
    pages: Arc<Pages>,
    is_home: AtomicBool,
}

impl MemberPart {
    /// Begins to serve. Each of its memories may grow to `limit_bytes`; the home says how
    /// large they are. `room_bytes` is what this host has room for, if that is less.
    ///
    /// # Errors
    /// [`SpanningError`]; nothing of it is left then.
    pub fn begin(
        program: Arc<Program>,
        limit_bytes: u64,
        room_bytes: Option<u64>,
        me: PartId,
        ends: BTreeMap<PartId, PeerConnections>,
    ) -> Result<Self, SpanningError> {
        program.prepare_resume().map_err(MachineError::from)?;
        let memories = make_memories(program.meta(), limit_bytes)?;
        let teller: Arc<OnceLock<Notifier>> = Arc::default();
        let way = HomeChannel(teller.clone());
        let member = Member::new(program, memories.clone(), Box::new(way));
        let members = ends.keys().copied().collect::<PartSet>().with(me);
        let setup = PartConfig {
            room_bytes,
            ..setup(me, members.without(PartId::HOME), &memories)
        };
        let pages = Pages::begin(setup, ends, Arc::new(MemberListener(member.clone())))
            .inspect_err(|_| member.end())?;
        // (Nobody else sets it.)
        let _ = teller.set(pages.teller());
        Ok(MemberPart {
            member,
            pages: Arc::new(pages),
            is_home: AtomicBool::new(false),
        })
    }

    /// Threads that are here.
    pub fn threads(&self) -> Vec<u32> {
        self.member.threads()
    }

    /// How a thread that is here is asked to come to safepoints.
    pub fn signal(&self, tid: u32) -> Option<Arc<Signal>> {
        self.member.signal(tid)
    }

    /// Its pages.
    pub fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    pub(super) fn member(&self) -> &Member {
        &self.member
    }

    /// It has none of a member's threads any more, and is the machine's home.
    pub(super) fn is_home_now(&self) {
        self.is_home.store(true, Ordering::Release);
        self.member.end();
    }

    /// Whether it has become the machine's home, and is no member any more.
    pub fn has_succeeded(&self) -> bool {
        self.is_home.load(Ordering::Acquire)
    }

    /// Ends it at once, whatever its threads do: then so does the machine.
    pub fn die(self) {
        self.end();
    }

    /// As [`Self::die`]; what is left of it goes with the last who has it.
    pub fn end(&self) {
        self.member.end();
        self.pages.die();
    }

    /// Waits until the machine has ended, or is alone again, and no thread is here.
    pub fn wait(&self) {
        self.member.wait();
    }
}

impl Drop for MemberPart {
    fn drop(&mut self) {
        // Threads leave before the pages do.
        self.member.end();
        self.member.wait();
    }
}
