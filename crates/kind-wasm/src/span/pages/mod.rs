//! A part's pages: applies the decisions of the coherence protocol to memory and sends
//! its messages to the other parts.
//!
//! ```text
//!   faults of memories ─┐
//!   other parts ────────┼─▶ one thread ─┐                       ┌─▶ install, allow, protect …
//!   time ───────────────┘               ├─▶ `Coherence` (lock) ─┤
//!   accesses by the host ───────────────┘                       └─▶ frames, written after it
//! ```
//!
//! Memory is changed under the lock, in the order that the protocol requires for each
//! page; a run of pages is changed by one call. Messages are sent after the lock is
//! released: the protocol requires no order there.
//!
//! One thread serves faults and reads all connections, because waking a second thread
//! costs more than handling a page. It polls for a while before it sleeps
//! ([`super::adaptive_polling`]).
//!
//! - `fault_service`: that thread
//! - `effects`: applies the results of events to memory and sends messages
//! - `page_runs`: runs of adjacent pages with the same operation
//! - `host_access`: accesses by the host
//! - `evictor`: keeps a part's memory within its limit
//! - `peers`: the other parts, which join and leave
//! - `quiescence`: waits until no message is in flight
//! - `consistent_cut`: the machine's memory at one instant
//! - `home_migration`: moves the home to another part
//! - `objects`: the machine's memory as objects, and moving them

mod access_scan;
mod consistent_cut;
mod effects;
mod evictor;
mod fault_service;
mod home_migration;
mod host_access;
mod objects;
mod page_runs;
mod peers;
mod quiescence;

pub use consistent_cut::Cut;
pub use evictor::PART_BYTES_MIN;
pub(super) use home_migration::DrainedHome;
pub use objects::{Heat, Object};

use super::eviction::EvictionPolicy;
use super::false_sharing::FaultHistory;
use super::idle_pages::IdlePages;
use super::messages::Answer;
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
/// The longest sleep of the serving thread.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// How often a host access requests its page again, unless something arrives earlier.
const REQUEST_INTERVAL: Duration = Duration::from_millis(5);
/// How long the serving thread polls for the answer to a note.
const ANSWER_POLL_MICROS: u64 = 300;
/// How long the reason of an end may take to be sent to the other parts.
const GOODBYE_PATIENCE: Duration = Duration::from_millis(100);
/// Faults read from one memory in one pass.
const FAULTS_MAX: usize = 64;
/// Moves of pages or directories requested in one step.
const MOVES_MAX: usize = 128;
/// OS threads whose waiting times are recorded, at most.
const WAITED_MAX: usize = 8192;
/// Buckets of the latency histogram, by powers of two of microseconds: up to a minute.
const BUCKETS: usize = 27;

/// Why a part cannot go on. Its machine ends, because its memory is no longer complete.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// Another part is unreachable or has ended.
    #[error("part {part} is lost: {reason}")]
    Lost { part: PartId, reason: String },
    /// Parts disagree about the state of a page, or a message violates the protocol.
    #[error("the parts of the machine disagree: {0}")]
    Inconsistent(String),
    /// A system call on the machine's memory failed.
    #[error("the machine's memory cannot be served: {0}")]
    Memory(String),
    /// A page did not arrive in time.
    #[error("page {} of memory {} did not arrive within {patience:.0?}", page.number, page.memory)]
    Late { page: PageId, patience: Duration },
    /// A part did not answer a query in time.
    #[error("part {part} did not answer within {patience:.0?}; try again")]
    NoAnswer { part: PartId, patience: Duration },
    /// A part did not send its pages away in time.
    #[error("part {part} did not move its pages away within {patience:.0?}")]
    Slow { part: PartId, patience: Duration },
    /// A part cannot leave: no other part has room for its pages.
    #[error(
        "part {part} cannot leave: no other part has room for its {} MiB (add nodes, or raise the part memory)",
        bytes >> 20
    )]
    Full {
        part: PartId,
        /// Resident bytes of that part.
        bytes: u64,
    },
    /// Messages were still in flight at the deadline, so there is no consistent cut.
    #[error("pages of the machine were still in transit after {patience:.0?}; try again")]
    NotQuiescent { patience: Duration },
    /// A cut is in progress already, parts are leaving, or this part is not the home.
    #[error(
        "a checkpoint of its memory is in progress, its parts are leaving, or this is not its home"
    )]
    CutUnavailable,
    /// The guest changed more pages before they were stored than may be buffered.
    #[error("it writes faster than its memory can be stored")]
    CutTooSlow,
    /// Restored memory exceeds the room of all parts.
    #[error(
        "no part has room for more of its memory: this part has {} MiB of at most {} MiB (add nodes, or raise the part memory)",
        resident_bytes >> 20,
        room_bytes >> 20
    )]
    NoRoom {
        /// Bytes at the part that receives the memory.
        resident_bytes: u64,
        /// Bytes for which its host has room.
        room_bytes: u64,
    },
    #[error("the part has ended")]
    Ended,
}

/// Configuration of a part.
#[derive(Debug)]
pub struct PartConfig {
    pub me: PartId,
    pub parts: PartSet,
    /// The part that holds all pages at the start.
    pub origin: PartId,
    /// This part's memories. Those of the origin hold the machine's content, those of
    /// other parts are empty. Their sizes are equal at all parts: a memory grows at every
    /// part before the new range is used.
    pub memories: Arc<[Arc<GuestMemory>]>,
    /// Pages per directory segment.
    pub segment_pages: u32,
    /// The least time that a page stays after it arrived.
    pub hold: Duration,
    /// Seed of the random part of the hold time.
    pub seed: u64,
    /// Bytes for which this host has room; `None` means no bound. It applies from the
    /// start, but at the origin only once limits are announced ([`Pages::limit_parts`]).
    pub room_bytes: Option<u64>,
}

/// Receives what does not concern pages. Called on the serving thread, so implementations
/// must not block.
pub trait Listener: Send + Sync {
    /// A note about threads from another part.
    ///
    /// # Errors
    /// The reason why the note is invalid; the sender counts as lost then.
    fn note(&self, from: PartId, note: &[u8]) -> Result<(), String>;

    /// The guest's monotonic clock at this part, in nanoseconds; never less than a value
    /// passed to [`Self::saw`].
    fn time(&self) -> u64;

    /// The messages that follow were sent at this guest time. Called before any of them
    /// is processed.
    fn saw(&self, guest_ns: u64);

    /// The part cannot go on, or was ended. The guest's threads must have no further
    /// effect; threads that wait for pages resume with undefined content.
    fn over(&self, reason: &SpanError);
}

/// Latencies of accesses that waited for pages of other parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Latency {
    /// Counts by powers of two: the first bucket is below 1 µs, the next below 2 µs, and
    /// so on.
    pub buckets: [u64; BUCKETS],
}

impl Latency {
    /// Number of all accesses.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

struct State {
    coherence: Coherence,
    /// Pages that arrived and are not installed yet, with their sender.
    arrived: FxHashMap<PageId, (PartId, PageBytes)>,
    /// When the first thread began to wait for a page.
    since: FxHashMap<PageId, (Instant, Option<u32>)>,
    /// Microseconds that each OS thread waited, by the part that sent the page.
    wait_micros: HashMap<u32, BTreeMap<PartId, u64>>,
    /// Host accesses that wait, by page and access.
    waiting: HashMap<(PageId, Access), u32>,
    /// Host accesses whose page is present and pinned.
    granted: HashMap<(PageId, Access), u32>,
    /// Parts that have sent away all pages since they were asked to.
    emptied: PartSet,
    due: Option<u64>,
    streams: StreamPrefetcher,
    /// Pages behind a faulting page that are to be prefetched next.
    prefetches: VecDeque<(PageId, Access)>,
    fault_history: FaultHistory,
    /// Candidates for eviction, while there is a limit.
    eviction: Option<EvictionPolicy>,
    /// For each memory, present pages whose waiting threads were woken: until they run,
    /// the kernel may not have mapped such a page.
    woken: Vec<RoaringBitmap>,
    /// State of the cut in progress.
    cut_state: Option<CutState>,
    /// State of the quiescence in progress, and how many there have been.
    quiescence: Option<QuiescenceState>,
    quiescence_count: u64,
    traffic: Traffic,
    /// Queries in flight with their answers, and how many there have been.
    queries: BTreeMap<u64, (PartId, Option<Answer>)>,
    query_count: u64,
    /// Directories are pinned because parts leave.
    directories_pinned: bool,
    /// At the home: a directory has moved since all were last collected.
    directories_moved: bool,
    /// A buffer of zeros that stands for zero pages.
    zeros: Vec<u8>,
    failure: Option<SpanError>,
}

impl State {
    /// Whether this part holds a page with at least this access.
    fn is_here(&self, page: PageId, access: Access) -> bool {
        self.coherence.access(page).is_some_and(|has| has >= access)
    }

    /// Whether a page is requested or about to be requested.
    fn is_asked(&self, page: PageId) -> bool {
        self.coherence.is_requested(page) || self.prefetches.iter().any(|(ahead, _)| *ahead == page)
    }
}

struct Shared {
    /// This part's number; it becomes the home's after a home migration.
    me: AtomicU8,
    memories: Vec<Spanning>,
    /// Pages per directory segment.
    segment_pages: u32,
    state: Mutex<State>,
    /// Signalled when pages arrive or the part fails.
    changed: Condvar,
    /// Wakes the serving thread.
    wake_signal: OwnedFd,
    peers: Peers,
    begun: Instant,
    over: AtomicBool,
    limits: Limits,
    idle: Mutex<IdlePages>,
    cuts: CutStatus,
    /// A quiescence is in progress.
    is_quiescing: AtomicBool,
    /// Another part has become the home and not all parts may know: no background move
    /// starts.
    is_changing_home: AtomicBool,
    /// Until when an answer is expected, on the clock of `now`.
    answer_expected_until: AtomicU64,
    /// The machine goes on without this part when the part ends.
    is_alone: AtomicBool,
    /// A part that was lost in that state; held while such a loss is recorded.
    ignored_loss: Mutex<Option<SpanError>>,
    /// Steps applied under the lock whose messages are not all sent.
    unsent_steps: AtomicU32,
    buckets: [AtomicU64; BUCKETS],
    listener: RwLock<Arc<dyn Listener>>,
}

/// The pages of a part; see the module's documentation. Dropping it ends the part: the
/// guest's threads must have left before.
pub struct Pages {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pages").finish_non_exhaustive()
    }
}

/// Sends notes about threads to other parts. It keeps no part alive: notes sent after the
/// part has ended are discarded.
#[derive(Clone)]
pub struct Notifier(Weak<Shared>);

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Teller").finish_non_exhaustive()
    }
}

impl Notifier {
    /// Sends a note and waits neither for its delivery nor for the immediate answer that
    /// `is_answered` announces. Notes of one thread are delivered in order.
    pub fn note(&self, to: PartId, note: &[u8], is_answered: bool) {
        let Some(shared) = self.0.upgrade() else {
            return;
        };
        let mut work = Effects::default();
        let done = work.put_note(to, note);
        if is_answered {
            // The serving thread polls for the answer: waking it would take longer than
            // the answer.
            let until = shared.now() + ANSWER_POLL_MICROS;
            if shared.answer_expected_until.swap(until, Ordering::AcqRel) < shared.now() {
                shared.wake();
            }
        }
        shared.dispatch(done, work);
    }

    /// Microseconds that an OS thread has waited for pages, by the part that sent them.
    pub fn wait_micros(&self, os_thread: u32) -> BTreeMap<PartId, u64> {
        let shared = self.0.upgrade();
        let wait_micros = shared.and_then(|shared| {
            let state = locked(&shared.state);
            state.wait_micros.get(&os_thread).cloned()
        });
        wait_micros.unwrap_or_default()
    }
}

/// Listener of a part that has pages and no threads.
impl Listener for () {
    fn note(&self, _from: PartId, _note: &[u8]) -> Result<(), String> {
        Err("a note about threads was sent to a part that has none".into())
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
        let what = "a thread of the part has panicked";
        self.0.end(SpanError::Memory(what.into()));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}

/// Why a part does not start.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// The kernel lacks a feature.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// The configuration is inconsistent.
    #[error("a part of a machine cannot start: {0}")]
    Setup(&'static str),
    /// A connection to another part failed.
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("no resources for a part of a machine: {0}")]
    System(#[from] std::io::Error),
}

impl Pages {
    /// Starts to serve faults: from now on the guest may run on these memories. `ends`
    /// has the connections to all other parts.
    ///
    /// # Errors
    /// [`BeginError`]; all resources are released then.
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
            return Err(BeginError::Setup("the parts lack the home or the origin"));
        }
        for memory in setup.memories.iter().filter(|_| setup.me != setup.origin) {
            if memory.populated_from(0)?.is_some() {
                return Err(BeginError::Setup("its memories are not empty"));
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
                wait_micros: HashMap::new(),
                waiting: HashMap::new(),
                granted: HashMap::new(),
                emptied: PartSet::default(),
                due: None,
                streams: StreamPrefetcher::default(),
                prefetches: VecDeque::new(),
                fault_history: FaultHistory::default(),
                eviction: None,
                woken: vec![RoaringBitmap::new(); setup.memories.len()],
                cut_state: None,
                quiescence: None,
                quiescence_count: 0,
                traffic: Traffic::default(),
                queries: BTreeMap::new(),
                query_count: 0,
                directories_pinned: false,
                directories_moved: false,
                zeros: Vec::new(),
                failure: None,
            }),
            changed: Condvar::new(),
            wake_signal: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(std::io::Error::from)?,
            peers: others,
            begun: Instant::now(),
            over: AtomicBool::new(false),
            limits: Limits::new(setup.room_bytes),
            idle: Mutex::default(),
            cuts: CutStatus::default(),
            is_quiescing: AtomicBool::new(false),
            is_changing_home: AtomicBool::new(false),
            answer_expected_until: AtomicU64::new(0),
            is_alone: AtomicBool::new(false),
            ignored_loss: Mutex::default(),
            unsent_steps: AtomicU32::new(0),
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            listener: RwLock::new(listener),
        });
        let pages = Pages {
            shared: shared.clone(),
            threads: Mutex::default(),
        };
        for part in shared.peers.parts().iter() {
            pages.spawn_writer(part)?;
        }
        pages.spawn("span-evict", Shared::run_evictor)?;
        if setup.me != PartId::HOME {
            pages.spawn("span-cut", Shared::send_cuts)?;
        }
        // Spawned last: a part that waits for this one to end may be one that this one
        // waits for.
        pages.spawn("span-serve", move |shared| shared.serve(hearing))?;
        if setup.me != setup.origin {
            pages.shared.limits.set(None);
            // The home waits for a first message of a joining part.
            let mut work = Effects::default();
            let messages = work.to(PartId::HOME).map(drop);
            pages.shared.dispatch(messages, work);
        }
        Ok(pages)
    }

    /// Spawns the thread that writes what a part's socket could not take at once.
    fn spawn_writer(&self, part: PartId) -> std::io::Result<()> {
        let Some(outbound) = self.shared.peers.outbound(part) else {
            return Ok(());
        };
        self.spawn("span-tell", move |shared| {
            if let Err(error) = outbound.write_backlog() {
                shared.outbound_lost(&outbound, error.to_string());
            }
        })
    }

    fn spawn(&self, name: &str, run: impl FnOnce(&Shared) + Send + 'static) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || {
            // A panic of this thread would leave its waiters blocked for ever.
            let guard = PanicGuard(&shared);
            run(&shared);
            std::mem::forget(guard);
        })?;
        let mut threads = locked(&self.threads);
        // Threads that wrote to parts which have left.
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// A handle that sends notes to other parts.
    pub fn notifier(&self) -> Notifier {
        Notifier(Arc::downgrade(&self.shared))
    }

    /// Brings all pages of a part here, and returns when that is done. This part must be
    /// the directory of all pages, and the other part's threads must have left.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::Slow`] at the deadline.
    pub fn empty(&self, part: PartId, to: PartId, patience: Duration) -> Result<(), SpanError> {
        let deadline = Instant::now().checked_add(patience);
        let mut state = locked(&self.shared.state);
        state.emptied = state.emptied.without(part);
        let mut work = Effects::default();
        let event = (Event::Evacuate { part, to }, EventContext::Nothing);
        let done = self.shared.step_locked(&mut state, vec![event], &mut work);
        drop(state);
        self.shared.dispatch(done, work);
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

    /// Why the part cannot go on; `None` while it can.
    pub fn failure(&self) -> Option<SpanError> {
        locked(&self.shared.state).failure.clone()
    }

    /// The access that this part has to a page.
    pub fn access(&self, page: PageId) -> Option<Access> {
        locked(&self.shared.state).coherence.access(page)
    }

    /// Whether no transaction is in progress, as far as this part knows.
    pub fn is_quiescent(&self) -> bool {
        locked(&self.shared.state).coherence.is_quiescent()
    }

    /// Latencies of accesses so far.
    pub fn latency(&self) -> Latency {
        Latency {
            buckets: std::array::from_fn(|at| self.shared.buckets[at].load(Ordering::Relaxed)),
        }
    }

    /// Copies bytes out for the host, page by page; pages that are elsewhere are fetched.
    ///
    /// # Errors
    /// [`SpanError`]; the buffer may be partly filled then.
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

    /// Copies bytes in for the host, page by page.
    ///
    /// # Errors
    /// [`SpanError`]; the bytes may be partly written then.
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

    /// From now on the listener is not told when this part ends: all pages are here, and
    /// the machine needs no other part.
    pub fn detach(&self) {
        self.shared.is_alone.store(true, Ordering::Release);
    }

    /// Ends a part without which the machine goes on, as after [`Self::detach`].
    pub fn finish(&self) {
        self.detach();
        self.shared.end(SpanError::Ended);
    }

    /// Ends the part at once: the other parts lose it.
    pub fn die(&self) {
        self.shared.end(SpanError::Ended);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.shared.end(SpanError::Ended);
        for thread in locked(&self.threads).drain(..) {
            // The panic has been reported by its thread.
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
        // The number came from a `PartId`.
        PartId::new(number.into()).unwrap_or(PartId::HOME)
    }

    fn listener(&self) -> Arc<dyn Listener> {
        let listener = self.listener.read();
        listener.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether background moves must not start now.
    fn is_paused(&self, state: &State) -> bool {
        state.quiescence.is_some() || self.is_changing_home.load(Ordering::Acquire)
    }

    /// Waits until something arrives, for at most this long.
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

    /// Whether a memory can contain a page, now or after it grows.
    fn has(&self, page: PageId) -> bool {
        let memory = self.memories.get(page.memory as usize);
        memory.is_some_and(|memory| offset(page) < memory.memory().limit_bytes())
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Ends the part; only the first reason is kept.
    fn end(&self, reason: SpanError) {
        if self.over.swap(true, Ordering::AcqRel) {
            return;
        }
        let reason = locked(&self.state).failure.get_or_insert(reason).clone();
        // Before woken threads read content that is not the machine's memory.
        if !self.is_alone.load(Ordering::Acquire) {
            self.listener().over(&reason);
        }
        for memory in &self.memories {
            if let Err(error) = memory.stop() {
                tracing::error!(%error, "cannot release threads that wait for pages");
            }
        }
        self.changed.notify_all();
        self.cuts.changed.notify_all();
        self.wake();
        self.limits.wake();
        self.say_goodbye(&reason);
        self.peers.close();
    }

    /// Sends the reason to the other parts, within a moment: otherwise each would report the part
    /// that it happened to lose first.
    fn say_goodbye(&self, reason: &SpanError) {
        let blamed = match reason {
            SpanError::Lost { part, .. } => Some(*part),
            _ => None,
        };
        let goodbye = match reason {
            SpanError::Ended => return,
            // A part that was about to join: its end is not a loss for the others, and it
            // knows of none.
            _ if self.me() != PartId::HOME && !self.limits.is_announced() => return,
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
        if wire::encode(&goodbye, &mut frame).is_err() {
            return;
        }
        for outbound in self.peers.all_outbound() {
            // One of them may be lost itself.
            let _ = outbound.send(frame.clone());
        }
        let deadline = Instant::now() + GOODBYE_PATIENCE;
        let others = self.peers.parts().iter().filter(|it| Some(*it) != blamed);
        for outbound in others.filter_map(|part| self.peers.outbound(part)) {
            // A part that does not read learns of it when the connection closes.
            let _ = outbound.wait_written(deadline);
        }
    }

    /// Wakes the serving thread.
    fn wake(&self) {
        // The write fails only when the counter is full: then a wake-up is pending
        // already.
        let _ = rustix::io::write(&self.wake_signal, &1u64.to_ne_bytes());
    }
}
