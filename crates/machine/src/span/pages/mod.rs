//! A part's pages: what the protocol of coherence decides is done to memory and said to
//! the other parts.
//!
//! ```text
//!   faults of memories ─┐
//!   other parts ────────┼─▶ one thread ─┐                       ┌─▶ install, allow, protect …
//!   time ───────────────┘               ├─▶ `Coherence` (lock) ─┤
//!   the host's own accesses ────────────┘                       └─▶ frames, written after it
//! ```
//!
//! What is done to memory is done under the lock, in the order that the protocol wants
//! for each page; pages in a row are done at once. What is said is said after it: the
//! protocol needs no order there.
//!
//! One thread serves faults and hears all parts, since to wake a thread costs more than
//! all that it does for a page; so it does not sleep at once when nothing is left to do
//! ([`super::adaptive_polling`]).
//!
//! - `fault_service`: that thread
//! - `effects`: what follows from events is done to memory, and said
//! - `host_access`: the host's own accesses
//! - `evictor`: how much a part keeps, and that no more is there
//! - `peers`: the other parts, which come and go
//! - `quiescence`: nothing is on its way
//! - `consistent_cut`: the memory of the whole as it is at one instant
//! - `home_migration`: another part becomes the home
//! - `objects`: the memory of the whole in pieces, and how they move

mod access_scan;
mod consistent_cut;
mod effects;
mod evictor;
mod fault_service;
mod home_migration;
mod host_access;
mod objects;
mod peers;
mod quiescence;

pub use consistent_cut::{Cut, CutMessage, CutPages, CutPiece, UnchangedPages};
pub use evictor::{PART_BYTES_MIN, PartMemory};
pub(super) use home_migration::DrainedHome;
pub(super) use objects::{Answer, Question};
pub use objects::{Heat, Object};
pub(super) use quiescence::QuiescenceMessage;

use super::eviction::EvictionPolicy;
use super::false_sharing::FaultHistory;
use super::idle_pages::IdlePages;
use super::peer::{PeerConnections, PeerError};
use super::prefetch::StreamPrefetcher;
use super::wire::{self, PageBytes, PeerMessage};
use consistent_cut::{CutState, CutStatus};
use effects::{Effects, EventContext};
use evictor::Limits;
use host_access::{page_of, pieces};
use keel_wasm::coherence::{Access, Coherence, Config, Event, PageId, PartId, PartSet, Traffic};
use keel_wasm::memory::{GuestMemory, MemoryError, PAGE_BYTES, Spanning, Unavailable};
use peers::Peers;
use quiescence::QuiescenceState;
use roaring::RoaringBitmap;
use rustc_hash::FxHashMap;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PAGE: usize = PAGE_BYTES as usize;
/// How long it sleeps at most.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// How often the host asks again for a page, unless something comes.
const ASK_AGAIN: Duration = Duration::from_millis(5);
/// For how long the answer to a note is looked for without sleeping.
const ANSWER_MICROS: u64 = 300;
/// Faults that are taken note of at once.
const FAULTS_MAX: usize = 64;
/// Moves of pages, or directories, that are asked for at once.
const MOVES_MAX: usize = 128;
/// OS threads of which it is counted what they waited for.
const WAITED_MAX: usize = 8192;
/// Powers of two of microseconds that latencies are told in: up to a minute.
const BUCKETS: usize = 27;

/// Why a part cannot go on: its machine ends then, as the memory of the whole is not to
/// be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// Another part is not there any more.
    #[error("part {part} is lost: {reason}")]
    Lost {
        /// Which.
        part: PartId,
        /// How it is known.
        reason: String,
    },
    /// Parts disagree about a page.
    #[error("the parts of the machine disagree: {0}")]
    Inconsistent(String),
    /// This host does not do what it is asked for.
    #[error("the machine's memory cannot be served: {0}")]
    Memory(String),
    /// A page did not come.
    #[error("page {} of memory {} did not come within {patience:.0?}", page.number, page.memory)]
    Late {
        /// Which.
        page: PageId,
        /// How long it was waited for.
        patience: Duration,
    },
    /// A part does not say what it is asked.
    #[error("part {part} did not say where pages are within {patience:.0?}; try again")]
    NoAnswer {
        /// Which.
        part: PartId,
        /// How long it was waited for.
        patience: Duration,
    },
    /// A part did not give up its pages.
    #[error("part {part} did not give up its pages within {patience:.0?}")]
    Slow {
        /// Which.
        part: PartId,
        /// How long it was waited for.
        patience: Duration,
    },
    /// A part is to go, and nobody has room for what it has.
    #[error(
        "part {part} cannot go: no other part has room for the {} MiB that it has; more nodes, or a larger part memory, would have it",
        bytes >> 20
    )]
    Full {
        /// Which.
        part: PartId,
        /// What it has.
        bytes: u64,
    },
    /// The memory of the whole is not to be had as it was at one instant.
    #[error("pages of the machine were still on their way after {patience:.0?}; try again")]
    NotQuiescent {
        /// How long it was waited for.
        patience: Duration,
    },
    /// It is taken already, or this part cannot.
    #[error("its memory is being kept already, its parts leave, or this is not its home")]
    CutUnavailable,
    /// What changes before it is kept is too much to be held meanwhile.
    #[error("it writes faster than its memory can be stored")]
    CutTooSlow,
    /// What is brought is more than all parts have room for.
    #[error(
        "no part has room for more of its memory: {} MiB are here, where {} MiB may be; more nodes, or a larger part memory, would have it",
        resident_bytes >> 20,
        room_bytes >> 20
    )]
    NoRoom {
        /// What is at the part that it is brought to.
        resident_bytes: u64,
        /// What its host has room for.
        room_bytes: u64,
    },
    /// It was ended.
    #[error("the part has ended")]
    Ended,
}

/// What a part is made of.
#[derive(Debug)]
pub struct PartConfig {
    /// This part.
    pub me: PartId,
    /// All parts.
    pub parts: PartSet,
    /// The one that has all pages now.
    pub origin: PartId,
    /// This part's memories; those of the origin hold what the machine's memories hold,
    /// those of others nothing. They have the same size at all parts: one that grows has
    /// grown at all of them before anybody uses what is new.
    pub memories: Arc<[Arc<GuestMemory>]>,
    /// Pages whose directory is at one place.
    pub segment_pages: u32,
    /// For how long a page stays where it came, at least.
    pub hold: Duration,
    /// What the rest of that is drawn from.
    pub seed: u64,
    /// Bytes for which this host has room; `None`: for all. It counts from the beginning,
    /// at the origin from when limits are told ([`Pages::limit_parts`]).
    pub room_bytes: Option<u64>,
}

/// Who hears what is not about pages. Called on the thread that serves them: it must not
/// wait for anything.
pub trait Listener: Send + Sync {
    /// A part says something about threads.
    ///
    /// # Errors
    /// Why it cannot say that: it is lost then.
    fn note(&self, from: PartId, note: &[u8]) -> Result<(), String>;

    /// The guest's monotonic clock here, in nanoseconds: not behind what was [`Self::saw`].
    fn time(&self) -> u64;

    /// What is heard next has happened when the guest's clock was there. Called before
    /// anything else of it.
    fn saw(&self, guest_ns: u64);

    /// The part cannot go on, or was ended. Threads of the guest must have no effect any
    /// more after this; those that stand at pages go on, and find anything in them.
    fn over(&self, reason: &SpanError);
}

/// How long threads stood at pages that came from other parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Latency {
    /// By powers of two: the first is below 1 µs, the next below 2 µs, and so on.
    pub buckets: [u64; BUCKETS],
}

impl Latency {
    /// All of them.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

struct State {
    coherence: Coherence,
    /// Pages that came and are not in place yet, and from whom.
    arrived: FxHashMap<PageId, (PartId, PageBytes)>,
    /// Since when somebody stands at a page: the first of them.
    since: FxHashMap<PageId, (Instant, Option<u32>)>,
    /// Microseconds that OS threads stood at pages, by the part that gave them.
    stood_at: HashMap<u32, BTreeMap<PartId, u64>>,
    /// How many of the host's own accesses wait for what.
    waiting: HashMap<(PageId, Access), u32>,
    /// For how many of them the page is here and pinned.
    granted: HashMap<(PageId, Access), u32>,
    /// Parts that have given up all pages, since they were asked to.
    emptied: PartSet,
    due: Option<u64>,
    /// What is gone through in order.
    streams: StreamPrefetcher,
    /// What follows pages at which somebody stands, and is to be asked for next.
    ahead: VecDeque<(PageId, Access)>,
    /// What threads waited for.
    standing: FaultHistory,
    /// What may have to leave, while there is a limit.
    keep: Option<EvictionPolicy>,
    /// Of each memory pages that threads stood at that were here: until they go on there may
    /// be no such page, as far as the kernel says.
    woken: Vec<RoaringBitmap>,
    /// What is to be read as it was at an instant, while there is such a thing.
    cutting: Option<CutState>,
    /// It is waited for that nothing is on its way, or so it is; and how often it was.
    settling: Option<QuiescenceState>,
    settled: u64,
    traffic: Traffic,
    /// What was asked of whom, with what it answered; and how often.
    asked: BTreeMap<u64, (PartId, Option<Answer>)>,
    questions: u64,
    /// No directory moves: parts go.
    directories_stay: bool,
    /// At the home: one did, and they were not all brought since.
    directories_moved: bool,
    /// Pages that have nothing in them, in a row.
    zeros: Vec<u8>,
    failure: Option<SpanError>,
}

impl State {
    /// Whether this part may do that with a page now.
    fn is_here(&self, page: PageId, access: Access) -> bool {
        self.coherence.access(page).is_some_and(|has| has >= access)
    }

    /// Whether a page is on its way here, or about to be.
    fn is_asked(&self, page: PageId) -> bool {
        self.coherence.is_wanted(page) || self.ahead.iter().any(|(ahead, _)| *ahead == page)
    }
}

struct Shared {
    /// This part, by its number; the home's once it succeeded it.
    me: AtomicU8,
    memories: Vec<Spanning>,
    /// Pages whose directory is at one place.
    segment_pages: u32,
    state: Mutex<State>,
    /// Pages have come, or something failed.
    changed: Condvar,
    /// Wakes the thread that serves.
    bell: OwnedFd,
    others: Peers,
    begun: Instant,
    over: AtomicBool,
    limits: Limits,
    /// What nobody uses of what is here.
    idle: Mutex<IdlePages>,
    cuts: CutStatus,
    /// It is waited for that nothing is on its way.
    is_settling: AtomicBool,
    /// Another part has become the home, and not all may know: nothing moves by itself.
    is_succeeding: AtomicBool,
    /// Until when an answer is likely to come, in the time of `now`.
    awaited: AtomicU64,
    /// The machine goes on when it is over.
    is_alone: AtomicBool,
    /// Who was lost meanwhile; such a loss is noted with this held.
    missed: Mutex<Option<SpanError>>,
    /// Steps that were taken, under the lock, and of which not all is said that follows.
    unsaid: AtomicU32,
    buckets: [AtomicU64; BUCKETS],
    listener: RwLock<Arc<dyn Listener>>,
}

/// The pages of a part; see the module's documentation. Dropping it ends it: the guest's
/// threads must have left before.
pub struct Pages {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pages").finish_non_exhaustive()
    }
}

/// Tells other parts about threads. Keeps nothing alive: what is told when the part has
/// ended nobody hears.
#[derive(Clone)]
pub struct Notifier(Weak<Shared>);

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Teller").finish_non_exhaustive()
    }
}

impl Notifier {
    /// Tells a part something; does not wait for it, nor for the answer that comes at once
    /// if it `is_answered`. What one thread says comes in that order.
    pub fn note(&self, to: PartId, note: &[u8], is_answered: bool) {
        let Some(shared) = self.0.upgrade() else {
            return;
        };
        let mut work = Effects::default();
        let done = work.put_note(to, note);
        if is_answered {
            // Whoever hears the answer is awake by then: being woken takes longer than it.
            let until = shared.now() + ANSWER_MICROS;
            if shared.awaited.swap(until, Ordering::AcqRel) < shared.now() {
                shared.ring();
            }
        }
        shared.say(done, work);
    }

    /// Microseconds that an OS thread stood at pages so far, by the part that gave them.
    pub fn stood_at(&self, os_thread: u32) -> BTreeMap<PartId, u64> {
        let shared = self.0.upgrade();
        let stood_at = shared.and_then(|shared| {
            let state = locked(&shared.state);
            state.stood_at.get(&os_thread).cloned()
        });
        stood_at.unwrap_or_default()
    }
}

/// A part that has pages and no threads.
impl Listener for () {
    fn note(&self, _from: PartId, _note: &[u8]) -> Result<(), String> {
        Err("it speaks of threads to a part without any".into())
    }

    fn time(&self) -> u64 {
        0
    }

    fn saw(&self, _guest_ns: u64) {}

    fn over(&self, _reason: &SpanError) {}
}

/// Ends a part whose thread panics.
struct PanicGuard<'a>(&'a Shared);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        let what = "a thread that serves it has panicked";
        self.0.end(SpanError::Memory(what.into()));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}

/// Why a part does not begin.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// The kernel lacks something.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// It is no part as it was told.
    #[error("a part of a machine cannot begin: {0}")]
    Setup(&'static str),
    /// Another part says what it should not.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// Memory cannot be looked at.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// There are no threads or descriptors left.
    #[error("no resources for a part of a machine: {0}")]
    System(#[from] std::io::Error),
}

impl Pages {
    /// Begins to serve: from now on the guest may run on these memories. `ends` has the
    /// connections to all others.
    ///
    /// # Errors
    /// [`BeginError`]; nothing of it is left then.
    pub fn begin(
        setup: PartConfig,
        ends: BTreeMap<PartId, PeerConnections>,
        listener: Arc<dyn Listener>,
    ) -> Result<Self, BeginError> {
        let others: PartSet = ends.keys().copied().collect();
        if !setup.parts.contains(setup.me) || setup.parts.without(setup.me) != others {
            return Err(BeginError::Setup("it lacks connections to other parts"));
        }
        if !setup.parts.contains(setup.origin) || !setup.parts.contains(PartId::HOME) {
            return Err(BeginError::Setup("its home is none of the parts"));
        }
        for memory in setup.memories.iter().filter(|_| setup.me != setup.origin) {
            if memory.populated_from(0)?.is_some() {
                return Err(BeginError::Setup("there are pages that nobody gave it"));
            }
        }
        let memories: Result<Vec<Spanning>, Unavailable> = setup
            .memories
            .iter()
            .map(|memory| Spanning::start(memory.clone()))
            .collect();
        let config = Config {
            me: setup.me,
            parts: setup.parts,
            origin: setup.origin,
            segment_pages: setup.segment_pages,
            hold_micros: u64::try_from(setup.hold.as_micros()).unwrap_or(u64::MAX >> 1),
            seed: setup.seed,
        };
        let (others, mut hearing) = (Peers::default(), Vec::new());
        for (part, ends) in ends {
            hearing.push(others.add(part, ends)?);
        }
        let shared = Arc::new(Shared {
            me: AtomicU8::new(setup.me.number() as u8),
            memories: memories?,
            segment_pages: setup.segment_pages,
            state: Mutex::new(State {
                coherence: Coherence::new(config),
                arrived: FxHashMap::default(),
                since: FxHashMap::default(),
                stood_at: HashMap::new(),
                waiting: HashMap::new(),
                granted: HashMap::new(),
                emptied: PartSet::default(),
                due: None,
                streams: StreamPrefetcher::default(),
                ahead: VecDeque::new(),
                standing: FaultHistory::default(),
                keep: None,
                woken: vec![RoaringBitmap::new(); setup.memories.len()],
                cutting: None,
                settling: None,
                settled: 0,
                traffic: Traffic::default(),
                asked: BTreeMap::new(),
                questions: 0,
                directories_stay: false,
                directories_moved: false,
                zeros: Vec::new(),
                failure: None,
            }),
            changed: Condvar::new(),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(std::io::Error::from)?,
            others,
            begun: Instant::now(),
            over: AtomicBool::new(false),
            limits: Limits::new(setup.room_bytes),
            idle: Mutex::default(),
            cuts: CutStatus::default(),
            is_settling: AtomicBool::new(false),
            is_succeeding: AtomicBool::new(false),
            awaited: AtomicU64::new(0),
            is_alone: AtomicBool::new(false),
            missed: Mutex::default(),
            unsaid: AtomicU32::new(0),
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            listener: RwLock::new(listener),
        });
        let pages = Pages {
            shared: shared.clone(),
            threads: Mutex::default(),
        };
        for part in shared.others.parts().iter() {
            pages.spawn_tell(part)?;
        }
        pages.spawn("span-keep", Shared::keep_within)?;
        if setup.me != PartId::HOME {
            pages.spawn("span-cut", Shared::give_cuts)?;
        }
        // (The last: who waits for it to end may be whom it waits for.)
        pages.spawn("span-serve", move |shared| shared.serve(hearing))?;
        if setup.me != setup.origin {
            pages.shared.limits.set(None);
            // (The home waits for a word of who joins.)
            let mut work = Effects::default();
            let said = work.to(PartId::HOME).map(drop);
            pages.shared.say(said, work);
        }
        Ok(pages)
    }

    /// A thread that writes to a part what cannot be written at once.
    fn spawn_tell(&self, part: PartId) -> std::io::Result<()> {
        let Some(told) = self.shared.others.told(part) else {
            return Ok(());
        };
        self.spawn("span-tell", move |shared| {
            if let Err(error) = told.write_backlog() {
                shared.lost_by(&told, error.to_string());
            }
        })
    }

    fn spawn(&self, name: &str, run: impl FnOnce(&Shared) + Send + 'static) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || {
            // Whoever waits for this thread would wait for ever.
            let guard = PanicGuard(&shared);
            run(&shared);
            std::mem::forget(guard);
        })?;
        let mut threads = locked(&self.threads);
        // (Those that wrote to parts that are gone.)
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// What other parts are told through.
    pub fn teller(&self) -> Notifier {
        Notifier(Arc::downgrade(&self.shared))
    }

    /// Has all pages of a part brought to this one, which must be the directory of all;
    /// the part's threads must have left. Returns when that is done.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::Slow`] if it takes longer.
    pub fn empty(&self, part: PartId, to: PartId, patience: Duration) -> Result<(), SpanError> {
        let deadline = Instant::now().checked_add(patience);
        let mut state = locked(&self.shared.state);
        state.emptied = state.emptied.without(part);
        let mut work = Effects::default();
        let event = (Event::Empty { part, to }, EventContext::Nothing);
        let done = self.shared.step_in(&mut state, vec![event], &mut work);
        drop(state);
        self.shared.say(done, work);
        let mut state = locked(&self.shared.state);
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.emptied.contains(part) {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(SpanError::Slow { part, patience });
            }
            state = self.shared.wait_changed(state, SLEEP_MAX);
        }
    }

    /// Why it cannot go on, if that is so.
    pub fn failure(&self) -> Option<SpanError> {
        locked(&self.shared.state).failure.clone()
    }

    /// What of the machine's pages this part may do what with.
    pub fn access(&self, page: PageId) -> Option<Access> {
        locked(&self.shared.state).coherence.access(page)
    }

    /// Whether nothing is under way, as far as this part knows.
    pub fn is_quiet(&self) -> bool {
        locked(&self.shared.state).coherence.is_quiet()
    }

    /// How long accesses waited so far.
    pub fn latency(&self) -> Latency {
        Latency {
            buckets: std::array::from_fn(|at| self.shared.buckets[at].load(Ordering::Relaxed)),
        }
    }

    /// The host copies bytes out, page by page: what is elsewhere is fetched.
    ///
    /// # Errors
    /// [`SpanError`]; part of the buffer may be filled then.
    pub fn read(
        &self,
        memory: u32,
        offset: u64,
        buffer: &mut [u8],
        patience: Duration,
    ) -> Result<(), SpanError> {
        let of = self.shared.memory(memory)?;
        for (at, range) in pieces(offset, buffer.len()) {
            let piece = &mut buffer[range];
            let page = page_of(memory, at)?;
            self.shared
                .with_page(page, Access::Read, patience, || of.memory().read(at, piece))?;
        }
        Ok(())
    }

    /// The host copies bytes in, page by page.
    ///
    /// # Errors
    /// [`SpanError`]; part of it may be written then.
    pub fn write(
        &self,
        memory: u32,
        offset: u64,
        bytes: &[u8],
        patience: Duration,
    ) -> Result<(), SpanError> {
        let of = self.shared.memory(memory)?;
        for (at, range) in pieces(offset, bytes.len()) {
            let piece = &bytes[range];
            let page = page_of(memory, at)?;
            self.shared.with_page(page, Access::Write, patience, || {
                of.memory().write(at, piece)
            })?;
        }
        Ok(())
    }

    /// From now on nobody is told that it is over: the machine does not need other parts
    /// any more, as all pages are here.
    pub fn leave_alone(&self) {
        self.shared.is_alone.store(true, Ordering::Release);
    }

    /// Ends it where the machine goes on without other parts, as [`Self::leave_alone`].
    pub fn finish(&self) {
        self.leave_alone();
        self.shared.end(SpanError::Ended);
    }

    /// Ends it at once: others lose it.
    pub fn die(&self) {
        self.shared.end(SpanError::Ended);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.shared.end(SpanError::Ended);
        for thread in locked(&self.threads).drain(..) {
            // Whoever panicked said so.
            let _ = thread.join();
        }
    }
}

fn offset(page: PageId) -> u64 {
    u64::from(page.number) * PAGE_BYTES
}

impl Shared {
    fn me(&self) -> PartId {
        let number = self.me.load(Ordering::Acquire);
        // (It was made of one.)
        PartId::new(number.into()).unwrap_or(PartId::HOME)
    }

    fn listener(&self) -> Arc<dyn Listener> {
        let listener = self.listener.read();
        listener.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether nothing may move by itself just now.
    fn must_rest(&self, state: &State) -> bool {
        state.settling.is_some() || self.is_succeeding.load(Ordering::Acquire)
    }

    /// Waits until something has come, or for so long.
    fn wait_changed<'a>(
        &self,
        state: MutexGuard<'a, State>,
        most: Duration,
    ) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn memory(&self, number: u32) -> Result<&Spanning, SpanError> {
        self.memories
            .get(number as usize)
            .ok_or_else(|| SpanError::Memory(format!("there is no memory {number}")))
    }

    /// Whether a memory can have a page, now or when it has grown.
    fn has(&self, page: PageId) -> bool {
        let memory = self.memories.get(page.memory as usize);
        memory.is_some_and(|memory| offset(page) < memory.memory().limit_bytes())
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// The first reason counts.
    fn end(&self, reason: SpanError) {
        if self.over.swap(true, Ordering::AcqRel) {
            return;
        }
        let reason = locked(&self.state).failure.get_or_insert(reason).clone();
        // Before anybody goes on with what is not the machine's memory.
        if !self.is_alone.load(Ordering::Acquire) {
            self.listener().over(&reason);
        }
        for memory in &self.memories {
            if let Err(error) = memory.stop() {
                tracing::error!(%error, "threads may stand at pages that never come");
            }
        }
        self.changed.notify_all();
        self.cuts.changed.notify_all();
        self.ring();
        self.limits.ring();
        self.say_goodbye(&reason);
        self.others.close();
    }

    /// Tells the others why it cannot go on, where that is possible without waiting: else
    /// each of them would name the part that it lost first.
    fn say_goodbye(&self, reason: &SpanError) {
        let goodbye = match reason {
            SpanError::Ended => return,
            // It was about to join: its end is no loss, and it knows nobody's.
            _ if self.me() != PartId::HOME && !self.limits.are_told() => return,
            SpanError::Lost { part, reason } => PeerMessage::Goodbye {
                part: *part,
                reason: reason.clone(),
            },
            own => PeerMessage::Goodbye {
                part: self.me(),
                reason: own.to_string(),
            },
        };
        let mut frame = Vec::new();
        if wire::encode(&goodbye, &mut frame).is_ok() {
            for told in self.others.all_told() {
                // (One of them is lost itself.)
                let _ = told.tell(frame.clone());
            }
        }
    }

    /// Wakes the thread that serves.
    fn ring(&self) {
        // (It cannot fail but for being full: then it rings already.)
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}
