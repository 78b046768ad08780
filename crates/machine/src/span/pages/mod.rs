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
//! ([`super::spin`]).

use super::ahead::{LOOK_MAX, Streams};
use super::peer::{Ends, Heard, PeerError, Told};
use super::spin::Spin;
use super::wire::{self, PageBytes, Parcel};
use keel_wasm::coherence::{
    Access, Coherence, Command, Config, Event, Holders, Message, PageId, PartId, PartSet, Placement,
};
use keel_wasm::memory::{GuestMemory, MemoryError, PAGE_BYTES, Spanning, Unavailable};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::{BTreeMap, HashMap};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
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
/// Moves of pages that are asked for at once.
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
    Disagree(String),
    /// This host does not do what it is asked for.
    #[error("the machine's memory cannot be served: {0}")]
    Memory(String),
    /// A page did not come.
    #[error("page {} of memory {} did not come within {patience:?}", page.number, page.memory)]
    Late {
        /// Which.
        page: PageId,
        /// How long it was waited for.
        patience: Duration,
    },
    /// A part did not give up its pages.
    #[error("part {part} did not give up its pages within {patience:?}")]
    Slow {
        /// Which.
        part: PartId,
        /// How long it was waited for.
        patience: Duration,
    },
    /// It was ended.
    #[error("the part has ended")]
    Ended,
}

/// What a part is made of.
#[derive(Debug)]
pub struct Setup {
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
}

/// A piece of a machine's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// The machine's memory.
    pub memory: u32,
    /// Its bytes, whole pages.
    pub range: Range<u64>,
    /// Who has it: the only one, or the one that wrote it last.
    pub owner: PartId,
    /// Who else has copies to read.
    pub readers: PartSet,
    /// How often its pages changed hands so far.
    pub exchanges: u64,
}

/// What never changed hands is the home's, where it is anywhere.
fn objects_of<'a>(
    memory: u32,
    here: &[Range<u64>],
    placed: impl Iterator<Item = &'a Placement>,
) -> Vec<Object> {
    let home = |range: Range<u64>| Object {
        memory,
        range,
        owner: PartId::HOME,
        readers: PartSet::default(),
        exchanges: 0,
    };
    let mut objects = Vec::new();
    // What of `here` lies behind all placements so far.
    let mut from = 0;
    let rest = |from: u64, to: u64, objects: &mut Vec<Object>| {
        let parts = here
            .iter()
            .map(|range| range.start.max(from)..range.end.min(to));
        objects.extend(parts.filter(|range| !range.is_empty()).map(home));
    };
    for placement in placed {
        let start = u64::from(placement.first) * PAGE_BYTES;
        let end = start + u64::from(placement.pages) * PAGE_BYTES;
        rest(from, start, &mut objects);
        from = end;
        let (owner, readers) = match placement.holders {
            Holders::Owner(owner) => (owner, PartSet::default()),
            Holders::Readers { keeper, readers } => (keeper, readers.without(keeper)),
        };
        objects.push(Object {
            memory,
            range: start..end,
            owner,
            readers,
            exchanges: placement.exchanges,
        });
    }
    rest(from, u64::MAX, &mut objects);
    objects
}

/// Who hears what is not about pages. Called on the thread that serves them: it must not
/// wait for anything.
pub trait Listener: Send + Sync {
    /// A part says something about threads.
    ///
    /// # Errors
    /// Why it cannot say that: it is lost then.
    fn note(&self, from: PartId, note: &[u8]) -> Result<(), String>;

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

/// What comes beside an event.
#[derive(Debug)]
enum Beside {
    Nothing,
    /// The page that a message brings.
    Page(PageBytes),
    /// The OS thread that stands.
    Thread(u32),
}

/// An event, and what comes beside it.
type Happened = (Event, Beside);

struct State {
    coherence: Coherence,
    /// Pages that came and are not in place yet, and from whom.
    arrived: HashMap<PageId, (PartId, PageBytes)>,
    /// Since when somebody stands at a page: the first of them.
    since: HashMap<PageId, (Instant, Option<u32>)>,
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
    streams: Streams,
    /// Where pages in a row are put together.
    scratch: Vec<u8>,
    failure: Option<SpanError>,
}

/// So many bytes of it, whatever is in them.
fn scratch(scratch: &mut Vec<u8>, bytes: u64) -> &mut [u8] {
    let bytes = bytes as usize;
    if scratch.len() < bytes {
        scratch.resize(bytes, 0);
    }
    &mut scratch[..bytes]
}

struct Shared {
    me: PartId,
    memories: Vec<Spanning>,
    state: Mutex<State>,
    /// Pages have come, or something failed.
    changed: Condvar,
    /// Wakes the thread that serves.
    bell: OwnedFd,
    told: BTreeMap<PartId, Told>,
    /// Broken at the end, so that nobody waits on them.
    sockets: Vec<TcpStream>,
    begun: Instant,
    over: AtomicBool,
    /// Until when an answer is likely to come, in the time of `now`.
    awaited: AtomicU64,
    /// The machine goes on when it is over.
    is_alone: AtomicBool,
    buckets: [AtomicU64; BUCKETS],
    listener: Arc<dyn Listener>,
}

/// The pages of a part; see the module's documentation. Dropping it ends it: the guest's
/// threads must have left before.
pub struct Pages {
    shared: Arc<Shared>,
    parts: PartSet,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pages").finish_non_exhaustive()
    }
}

/// Tells other parts about threads. Keeps nothing alive: what is told when the part has
/// ended nobody hears.
#[derive(Clone)]
pub struct Teller(Weak<Shared>);

impl std::fmt::Debug for Teller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Teller").finish_non_exhaustive()
    }
}

impl Teller {
    /// Tells a part something; does not wait for it, nor for the answer that comes at once
    /// if it `is_answered`. What one thread says comes in that order.
    pub fn note(&self, to: PartId, note: &[u8], is_answered: bool) {
        let Some(shared) = self.0.upgrade() else {
            return;
        };
        let mut frames = Vec::new();
        let done = wire::encode_note(note, &mut frames);
        let done = done.map_err(|error| SpanError::Disagree(error.to_string()));
        let work = Work {
            frames: BTreeMap::from([(to, frames)]),
            ..Work::default()
        };
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

    fn over(&self, _reason: &SpanError) {}
}

/// Ends a part whose thread panics.
struct Guard<'a>(&'a Shared);

impl Drop for Guard<'_> {
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
        setup: Setup,
        ends: BTreeMap<PartId, Ends>,
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
        let mut sockets = Vec::new();
        let (mut told, mut hearing) = (BTreeMap::new(), Vec::new());
        for (part, ends) in ends {
            for stream in [&ends.out, &ends.heard] {
                sockets.push(stream.socket().try_clone()?);
            }
            told.insert(part, Told::new(ends.out));
            hearing.push(Heard::new(part, ends.heard, ends.unpacker)?);
        }
        let shared = Arc::new(Shared {
            me: setup.me,
            memories: memories?,
            state: Mutex::new(State {
                coherence: Coherence::new(config),
                arrived: HashMap::new(),
                since: HashMap::new(),
                stood_at: HashMap::new(),
                waiting: HashMap::new(),
                granted: HashMap::new(),
                emptied: PartSet::default(),
                due: None,
                streams: Streams::default(),
                scratch: Vec::new(),
                failure: None,
            }),
            changed: Condvar::new(),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(std::io::Error::from)?,
            told,
            sockets,
            begun: Instant::now(),
            over: AtomicBool::new(false),
            awaited: AtomicU64::new(0),
            is_alone: AtomicBool::new(false),
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            listener,
        });
        let mut pages = Pages {
            shared: shared.clone(),
            parts: setup.parts,
            threads: Vec::new(),
        };
        for part in shared.told.keys().copied() {
            pages.spawn("span-tell", move |shared| {
                let written = shared.told.get(&part).map(Told::write_backlog);
                if let Some(Err(error)) = written {
                    shared.lost(part, error.to_string());
                }
            })?;
        }
        pages.spawn("span-serve", move |shared| shared.serve(hearing))?;
        Ok(pages)
    }

    fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce(&Shared) + Send + 'static,
    ) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(name.into());
        self.threads.push(thread.spawn(move || {
            // Whoever waits for this thread would wait for ever.
            let guard = Guard(&shared);
            run(&shared);
            std::mem::forget(guard);
        })?);
        Ok(())
    }

    /// What other parts are told through.
    pub fn teller(&self) -> Teller {
        Teller(Arc::downgrade(&self.shared))
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
        let mut work = Work::default();
        let event = (Event::Empty { part, to }, Beside::Nothing);
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
            state = self
                .shared
                .changed
                .wait_timeout(state, SLEEP_MAX)
                .unwrap_or_else(|error| error.into_inner())
                .0;
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

    /// The memory of the machine in pieces, in rising order, each of which the same parts
    /// hold; only of the part that was the origin and is the directory of all.
    ///
    /// # Errors
    /// [`SpanError::Memory`].
    pub fn objects(&self) -> Result<Vec<Object>, SpanError> {
        let placements = locked(&self.shared.state).coherence.placements();
        let mut objects = Vec::new();
        for (number, memory) in (0..).zip(&self.shared.memories) {
            let here = memory.memory().populated();
            let here = here.map_err(|error| SpanError::Memory(error.to_string()))?;
            let placed = placements.iter().filter(|it| it.memory == number);
            objects.extend(objects_of(number, &here, placed));
        }
        Ok(objects)
    }

    /// Has whole pages brought to a part, and waits until each of them has been there;
    /// how many bytes have.
    ///
    /// # Errors
    /// As [`Self::move_pages`]; [`SpanError::Slow`] if not even one has been there in time.
    pub fn move_object(
        &self,
        memory: u32,
        range: Range<u64>,
        to: PartId,
        patience: Duration,
    ) -> Result<u64, SpanError> {
        self.move_pages(memory, range.clone(), to)?;
        let deadline = Instant::now().checked_add(patience);
        let (first, last) = (range.start / PAGE_BYTES, range.end.div_ceil(PAGE_BYTES));
        let mut missing: Vec<u32> = (first..last).filter_map(|it| it.try_into().ok()).collect();
        let wanted = missing.len() as u64;
        loop {
            {
                let state = locked(&self.shared.state);
                if let Some(failure) = &state.failure {
                    return Err(failure.clone());
                }
                missing.retain(|number| {
                    let page = PageId {
                        memory,
                        number: *number,
                    };
                    // (It may be elsewhere again: then it was there.)
                    state.coherence.is_going(page, to)
                });
            }
            let there = wanted - missing.len() as u64;
            let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            match (missing.is_empty() || late, there) {
                (true, 0) if wanted > 0 => return Err(SpanError::Slow { part: to, patience }),
                (true, there) => return Ok(there * PAGE_BYTES),
                (false, _) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Has whole pages brought to a part: of an object, or of what is too much here. Does
    /// not wait for it.
    ///
    /// # Errors
    /// [`SpanError::Memory`] for a range that the memory does not have, or no such part.
    pub fn move_pages(&self, memory: u32, range: Range<u64>, to: PartId) -> Result<(), SpanError> {
        let size = self.shared.memory(memory)?.memory().size_bytes();
        if range.end > size || range.start > range.end {
            return Err(SpanError::Memory(format!(
                "bytes {}..{} are outside a memory of {size}",
                range.start, range.end
            )));
        }
        if !self.parts.contains(to) {
            return Err(SpanError::Memory(format!("there is no part {to}")));
        }
        let (first, last) = (range.start / PAGE_BYTES, range.end.div_ceil(PAGE_BYTES));
        let mut events = Vec::new();
        for number in first..last {
            let page = page_of(memory, number * PAGE_BYTES)?;
            events.push((Event::Move { page, to }, Beside::Nothing));
            if events.len() == MOVES_MAX || number + 1 == last {
                self.shared.step(std::mem::take(&mut events));
            }
        }
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.shared.end(SpanError::Ended);
        for thread in self.threads.drain(..) {
            // Whoever panicked said so.
            let _ = thread.join();
        }
    }
}

/// Parts of a range that lie in one page each: where, and where of the buffer.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = offset.saturating_add(done as u64);
        let left = PAGE - (at % PAGE_BYTES) as usize;
        let end = length.min(done + left);
        Some((at, std::mem::replace(&mut done, end)..end))
    })
}

fn page_of(memory: u32, offset: u64) -> Result<PageId, SpanError> {
    match u32::try_from(offset / PAGE_BYTES) {
        Ok(number) => Ok(PageId { memory, number }),
        Err(_) => Err(SpanError::Memory(format!("there is no byte {offset}"))),
    }
}

fn offset(page: PageId) -> u64 {
    u64::from(page.number) * PAGE_BYTES
}

/// What is to be done to a page.
#[derive(Debug)]
enum Deed {
    Protect,
    Send(PartId, Message),
    Discard,
    /// With what is allowed, and from whom it came.
    Install(Access, PageBytes, PartId),
    Allow,
    Wake,
}

impl Deed {
    const SEND: u8 = 1;
    const INSTALL: u8 = 3;

    /// Of one page they are done in this order.
    fn rank(&self) -> u8 {
        match self {
            Deed::Protect => 0,
            Deed::Send(..) => Deed::SEND,
            Deed::Discard => 2,
            Deed::Install(..) => Deed::INSTALL,
            Deed::Allow => 4,
            Deed::Wake => 5,
        }
    }
}

/// What follows from events.
#[derive(Debug, Default)]
struct Work {
    deeds: BTreeMap<PageId, Vec<Deed>>,
    /// What is said, to whom: whole frames.
    frames: BTreeMap<PartId, Vec<u8>>,
    /// There is a new time to wait for.
    is_due: bool,
}

/// Pages in a row with which the same is done.
struct Row<'a> {
    memory: u32,
    first: u32,
    deeds: Vec<&'a Deed>,
}

impl Row<'_> {
    fn offset(&self) -> u64 {
        u64::from(self.first) * PAGE_BYTES
    }

    fn bytes(&self) -> u64 {
        self.deeds.len() as u64 * PAGE_BYTES
    }
}

/// Of pages in rising order.
fn runs<'a>(pages: impl Iterator<Item = (PageId, &'a Deed)>) -> Vec<Row<'a>> {
    let mut rows: Vec<Row<'a>> = Vec::new();
    for (page, deed) in pages {
        match rows.last_mut() {
            Some(row)
                if row.memory == page.memory
                    && row.first + row.deeds.len() as u32 == page.number =>
            {
                row.deeds.push(deed);
            }
            _ => rows.push(Row {
                memory: page.memory,
                first: page.number,
                deeds: vec![deed],
            }),
        }
    }
    rows
}

impl Shared {
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
            self.listener.over(&reason);
        }
        for memory in &self.memories {
            if let Err(error) = memory.stop() {
                tracing::error!(%error, "threads may stand at pages that never come");
            }
        }
        self.changed.notify_all();
        self.ring();
        self.say_goodbye(&reason);
        for told in self.told.values() {
            told.close();
        }
        for socket in &self.sockets {
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Tells the others why it cannot go on, where that is possible without waiting: else
    /// each of them would name the part that it lost first.
    fn say_goodbye(&self, reason: &SpanError) {
        let goodbye = match reason {
            SpanError::Ended => return,
            SpanError::Lost { part, reason } => Parcel::Goodbye {
                part: *part,
                reason: reason.clone(),
            },
            own => Parcel::Goodbye {
                part: self.me,
                reason: own.to_string(),
            },
        };
        let mut frame = Vec::new();
        if wire::encode(&goodbye, &mut frame).is_ok() {
            for told in self.told.values() {
                // (One of them is lost itself.)
                let _ = told.tell(frame.clone());
            }
        }
    }

    fn lost(&self, part: PartId, reason: String) {
        if !self.over.load(Ordering::Acquire) {
            self.end(SpanError::Lost { part, reason });
        }
    }

    /// Wakes the thread that serves.
    fn ring(&self) {
        // (It cannot fail but for being full: then it rings already.)
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Serves faults, and hears all others, until the end.
    fn serve(&self, mut hearing: Vec<Heard>) {
        let mut spin = Spin::default();
        let mut events = Vec::new();
        while !self.over.load(Ordering::Acquire) {
            if let Err(error) = self.take_faults(&mut events) {
                return self.end(SpanError::Memory(error.to_string()));
            }
            let mut noted = false;
            for heard in &mut hearing {
                let from = heard.part();
                match heard.read() {
                    Ok(parcels) => {
                        for parcel in parcels.drain(..) {
                            match parcel {
                                Parcel::Message(message) => {
                                    let event = Event::Message { from, message };
                                    events.push((event, Beside::Nothing));
                                }
                                Parcel::Page(message, bytes) => {
                                    let event = Event::Message { from, message };
                                    events.push((event, Beside::Page(bytes)));
                                }
                                Parcel::Goodbye { part, reason } => {
                                    return self.lost(part, reason);
                                }
                                Parcel::Note(note) => {
                                    noted = true;
                                    if let Err(reason) = self.listener.note(from, &note) {
                                        return self.lost(from, reason);
                                    }
                                }
                            }
                        }
                    }
                    Err(error) => return self.lost(from, error.to_string()),
                }
            }
            let due = locked(&self.state).due;
            if due.is_some_and(|due| due <= self.now()) {
                locked(&self.state).due = None;
                events.push((Event::Tick, Beside::Nothing));
            }
            if !events.is_empty() {
                self.step(std::mem::take(&mut events));
                spin.worked();
            } else if noted {
                // (Most likely it was that which is waited for.)
                self.awaited.store(0, Ordering::Release);
                // More may have been decrypted with it, for which no socket wakes anybody.
                spin.worked();
            } else if !spin.again(self.awaited.load(Ordering::Acquire) > self.now())
                && let Err(error) = self.sleep(&hearing, due)
            {
                return self.end(SpanError::Memory(error.to_string()));
            }
        }
    }

    fn take_faults(&self, events: &mut Vec<Happened>) -> Result<(), MemoryError> {
        for (number, memory) in (0..).zip(&self.memories) {
            for _ in 0..FAULTS_MAX {
                let Some(touch) = memory.next()? else {
                    break;
                };
                let page = PageId {
                    memory: number,
                    // (A memory of 64 GiB has 16 million.)
                    number: (touch.page / PAGE_BYTES) as u32,
                };
                let access = match touch.write {
                    true => Access::Write,
                    false => Access::Read,
                };
                let stands = Beside::Thread(touch.thread);
                events.push((Event::Fault { page, access }, stands));
            }
        }
        Ok(())
    }

    /// Sleeps until there is something to do.
    fn sleep(&self, hearing: &[Heard], due: Option<u64>) -> std::io::Result<()> {
        let mut wait: Vec<PollFd<'_>> = vec![PollFd::new(&self.bell, PollFlags::IN)];
        let faults = self.memories.iter().map(Spanning::descriptor);
        wait.extend(faults.map(|fault| PollFd::from_borrowed_fd(fault, PollFlags::IN)));
        wait.extend(
            hearing
                .iter()
                .map(|it| PollFd::new(it.socket(), PollFlags::IN)),
        );
        let rest = due.map_or(SLEEP_MAX, |due| {
            Duration::from_micros(due.saturating_sub(self.now())).min(SLEEP_MAX)
        });
        let timeout = Timespec {
            tv_sec: rest.as_secs() as i64,
            tv_nsec: rest.subsec_nanos().into(),
        };
        match poll(&mut wait, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut rung = [0; 8];
        // (Mostly it did not ring.)
        let _ = rustix::io::read(&self.bell, &mut rung);
        Ok(())
    }

    /// Takes note of events, and does what follows.
    fn step(&self, events: Vec<Happened>) {
        let mut work = Work::default();
        let done = {
            let mut state = locked(&self.state);
            self.step_in(&mut state, events, &mut work)
        };
        self.say(done, work);
    }

    /// Says what is to be said after a step, or how it failed.
    fn say(&self, done: Result<(), SpanError>, work: Work) {
        for (to, frames) in work.frames {
            if let Some(Err(error)) = self.told.get(&to).map(|told| told.tell(frames)) {
                self.lost(to, error.to_string());
            }
        }
        if work.is_due {
            self.ring();
        }
        if let Err(error) = done
            && !self.over.load(Ordering::Acquire)
        {
            tracing::error!(%error, "a part of a machine cannot go on");
            self.end(error);
        }
    }

    /// As [`Self::step`], under the lock. After an error nothing is said any more: what was
    /// to be done before it is said may not have been done.
    fn step_in(
        &self,
        state: &mut State,
        events: Vec<Happened>,
        work: &mut Work,
    ) -> Result<(), SpanError> {
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        let done = self.try_step(state, events, work);
        if let Err(error) = &done {
            work.frames.clear();
            state.failure = Some(error.clone());
        }
        done
    }

    fn try_step(
        &self,
        state: &mut State,
        events: Vec<Happened>,
        work: &mut Work,
    ) -> Result<(), SpanError> {
        for (event, beside) in events {
            if let Event::Message { message, .. } = &event
                && let Some(page) = message.pages().find(|page| !self.has(*page))
            {
                return Err(SpanError::Disagree(format!("there is no {page:?} here")));
            }
            match (&event, beside) {
                (Event::Fault { page, .. }, beside) => {
                    let thread = match beside {
                        Beside::Thread(thread) => Some(thread),
                        _ => None,
                    };
                    let since = state.since.entry(*page);
                    since.or_insert_with(|| (Instant::now(), thread));
                }
                (
                    Event::Message {
                        from,
                        message: Message::Data { page, .. },
                    },
                    Beside::Page(bytes),
                ) => {
                    state.arrived.insert(*page, (*from, bytes));
                }
                _ => {}
            }
            let stood = match &event {
                Event::Fault { page, access } => Some((*page, *access)),
                _ => None,
            };
            let now = self.now();
            for command in state.coherence.step(event, now) {
                self.note(state, command, work)?;
            }
            if let Some((page, access)) = stood {
                self.ask_ahead(state, page, access, work)?;
            }
        }
        self.finish(state, work)
    }

    /// Asks for what follows a page at which a thread stands, where memory is gone
    /// through in order.
    fn ask_ahead(
        &self,
        state: &mut State,
        page: PageId,
        access: Access,
        work: &mut Work,
    ) -> Result<(), SpanError> {
        let mut wanted = state.streams.stands(page, access);
        if wanted == 0 {
            return Ok(());
        }
        let size = self.memory(page.memory)?.memory().size_bytes();
        let mut until = page.number;
        for number in page.number.saturating_add(1)..=page.number.saturating_add(LOOK_MAX) {
            let next = PageId { number, ..page };
            if wanted == 0 || offset(next) >= size {
                break;
            }
            until = number;
            if state
                .coherence
                .access(next)
                .is_some_and(|has| has >= access)
            {
                continue;
            }
            wanted -= 1;
            let now = self.now();
            let event = Event::Fault { page: next, access };
            for command in state.coherence.step(event, now) {
                self.note(state, command, work)?;
            }
        }
        state.streams.asked(page, access, until);
        Ok(())
    }

    /// Notes what is to be done; does what was noted before where the order counts: of
    /// one page.
    fn note(&self, state: &mut State, command: Command, work: &mut Work) -> Result<(), SpanError> {
        let wrong = |error: wire::WireError| SpanError::Disagree(error.to_string());
        let (page, deed) = match command {
            Command::Send { to, message } => {
                let parcel = Parcel::Message(message);
                let frames = work.frames.entry(to).or_default();
                return wire::encode(&parcel, frames).map_err(wrong);
            }
            Command::TickAt { micros } => {
                let sooner = state.due.is_none_or(|due| micros < due);
                if sooner {
                    state.due = Some(micros);
                    work.is_due = true;
                }
                return Ok(());
            }
            Command::Emptied { part } => {
                state.emptied = state.emptied.with(part);
                self.changed.notify_all();
                return Ok(());
            }
            Command::Fail { reason } => return Err(SpanError::Disagree(reason)),
            Command::SendPage { to, page, message } => (page, Deed::Send(to, message)),
            Command::Install { page, access } => {
                let Some((from, bytes)) = state.arrived.remove(&page) else {
                    let what = format!("{page:?} is to be used, and has not come");
                    return Err(SpanError::Disagree(what));
                };
                (page, Deed::Install(access, bytes, from))
            }
            Command::Allow { page } => {
                state.arrived.remove(&page);
                (page, Deed::Allow)
            }
            Command::Wake { page } => {
                state.arrived.remove(&page);
                (page, Deed::Wake)
            }
            Command::Protect { page } => (page, Deed::Protect),
            Command::Discard { page } => (page, Deed::Discard),
        };
        if matches!(deed, Deed::Install(..) | Deed::Allow | Deed::Wake) {
            self.grant(state, page);
        }
        let deeds = work.deeds.entry(page).or_default();
        // In one step a page is protected, sent and discarded, or something is done with
        // it that lets somebody go on. Rarely both.
        if deeds.last().is_some_and(|last| last.rank() >= deed.rank()) {
            self.finish(state, work)?;
        }
        work.deeds.entry(page).or_default().push(deed);
        Ok(())
    }

    /// Does what was noted, pages in a row at once.
    fn finish(&self, state: &mut State, work: &mut Work) -> Result<(), SpanError> {
        let failed = |error: MemoryError| SpanError::Memory(error.to_string());
        let deeds = std::mem::take(&mut work.deeds);
        let with = |rank: u8| {
            deeds.iter().flat_map(move |(page, deeds)| {
                let deeds = deeds.iter().filter(move |deed| deed.rank() == rank);
                deeds.map(|deed| (*page, deed))
            })
        };
        for run in runs(with(Deed::Protect.rank())) {
            let memory = self.memory(run.memory)?;
            memory.protect(run.offset(), run.bytes()).map_err(failed)?;
        }
        for run in runs(with(Deed::SEND)) {
            let memory = self.memory(run.memory)?.memory();
            let bytes = scratch(&mut state.scratch, run.bytes());
            memory.read(run.offset(), bytes).map_err(failed)?;
            for (deed, page) in run.deeds.iter().zip(bytes.chunks_exact(PAGE)) {
                if let Deed::Send(to, message) = deed {
                    let frames = work.frames.entry(*to).or_default();
                    wire::encode_page(message, page, frames)
                        .map_err(|error| SpanError::Disagree(error.to_string()))?;
                }
            }
        }
        for run in runs(with(Deed::Discard.rank())) {
            let memory = self.memory(run.memory)?;
            memory.discard(run.offset(), run.bytes()).map_err(failed)?;
        }
        for access in [Access::Read, Access::Write] {
            let those = with(Deed::INSTALL)
                .filter(|(_, deed)| matches!(deed, Deed::Install(with, ..) if *with == access));
            for run in runs(those) {
                let bytes = scratch(&mut state.scratch, run.bytes());
                let pages = bytes.chunks_mut(PAGE).zip(run.deeds.iter().copied());
                for (room, deed) in pages {
                    match deed {
                        Deed::Install(_, PageBytes::Bytes(page), _) => room.copy_from_slice(page),
                        _ => room.fill(0),
                    }
                }
                let memory = self.memory(run.memory)?;
                let write = access == Access::Write;
                memory.install(run.offset(), bytes, write).map_err(failed)?;
            }
        }
        for run in runs(with(Deed::Allow.rank())) {
            let memory = self.memory(run.memory)?;
            memory.allow(run.offset(), run.bytes()).map_err(failed)?;
        }
        for run in runs(with(Deed::Wake.rank())) {
            let memory = self.memory(run.memory)?;
            memory.wake(run.offset(), run.bytes()).map_err(failed)?;
        }
        for (page, deeds) in &deeds {
            for deed in deeds {
                match deed {
                    Deed::Install(_, _, from) => self.came(state, *page, Some(*from)),
                    Deed::Allow => self.came(state, *page, None),
                    Deed::Wake => {
                        state.since.remove(page);
                        self.changed.notify_all();
                    }
                    Deed::Protect | Deed::Send(..) | Deed::Discard => {}
                }
            }
        }
        Ok(())
    }

    /// A page is there: who waits for it goes on.
    fn came(&self, state: &mut State, page: PageId, from: Option<PartId>) {
        self.changed.notify_all();
        let Some((since, thread)) = state.since.remove(&page) else {
            return;
        };
        let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let (Some(thread), Some(from)) = (thread, from) {
            // (Of threads that ended nobody asks; there are not many of them.)
            if state.stood_at.len() >= WAITED_MAX {
                state.stood_at.clear();
            }
            let of = state.stood_at.entry(thread).or_default();
            let of = of.entry(from).or_default();
            *of = of.saturating_add(micros);
        }
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }

    /// Pins a page that has come for the host's accesses that wait for it: until their
    /// threads run it may have left again otherwise, over and over.
    fn grant(&self, state: &mut State, page: PageId) {
        let has = state.coherence.access(page);
        if state.coherence.is_put_off(page) {
            return;
        }
        for access in [Access::Read, Access::Write] {
            if has.is_none_or(|has| has < access) {
                continue;
            }
            let Some(count) = state.waiting.remove(&(page, access)) else {
                continue;
            };
            for _ in 0..count {
                // (Pinning is followed by nothing.)
                state.coherence.step(Event::Pin { page }, self.now());
            }
            *state.granted.entry((page, access)).or_default() += count;
        }
    }

    /// Does something while a page is here and stays.
    fn with_page(
        &self,
        page: PageId,
        access: Access,
        patience: Duration,
        run: impl FnOnce() -> Result<(), MemoryError>,
    ) -> Result<(), SpanError> {
        self.pin(page, access, patience)?;
        let result = run();
        self.step(vec![(Event::Unpin { page }, Beside::Nothing)]);
        result.map_err(|error| SpanError::Memory(error.to_string()))
    }

    fn pin(&self, page: PageId, access: Access, patience: Duration) -> Result<(), SpanError> {
        // (Nobody waits for longer than the clock goes.)
        let deadline = Instant::now().checked_add(patience);
        let key = (page, access);
        let mut state = locked(&self.state);
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        let has = state.coherence.access(page);
        if has.is_some_and(|has| has >= access) && !state.coherence.is_put_off(page) {
            state.coherence.step(Event::Pin { page }, self.now());
            return Ok(());
        }
        *state.waiting.entry(key).or_default() += 1;
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if take_one(&mut state.granted, key) {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                take_one(&mut state.waiting, key);
                return Err(SpanError::Late { page, patience });
            }
            // Asked again each time: what was asked for may have come and gone.
            let mut work = Work::default();
            let event = (Event::Fault { page, access }, Beside::Nothing);
            let done = self.step_in(&mut state, vec![event], &mut work);
            drop(state);
            self.say(done, work);
            state = locked(&self.state);
            if state.failure.is_none() && !state.granted.contains_key(&key) {
                state = self
                    .changed
                    .wait_timeout(state, ASK_AGAIN.min(patience))
                    .unwrap_or_else(|error| error.into_inner())
                    .0;
            }
        }
    }
}

/// Takes one away; false if there is none.
fn take_one(counts: &mut HashMap<(PageId, Access), u32>, key: (PageId, Access)) -> bool {
    let Some(count) = counts.get_mut(&key) else {
        return false;
    };
    *count -= 1;
    if *count == 0 {
        counts.remove(&key);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_piece_by_piece() {
        let part = |number| PartId::new(number).unwrap();
        let at = |page: u64| page * PAGE_BYTES;
        let placed = [
            Placement {
                memory: 0,
                first: 2,
                pages: 2,
                holders: Holders::Owner(part(1)),
                exchanges: 5,
            },
            Placement {
                memory: 0,
                first: 9,
                pages: 1,
                holders: Holders::Readers {
                    keeper: part(0),
                    readers: [part(0), part(2)].into_iter().collect(),
                },
                exchanges: 1,
            },
        ];
        // (Pages that another part has are not here.)
        let here = [at(0)..at(2), at(4)..at(6), at(9)..at(12)];
        let objects = objects_of(0, &here, placed.iter());
        let told: Vec<_> = objects
            .iter()
            .map(|it| {
                let pages = it.range.start / PAGE_BYTES..it.range.end / PAGE_BYTES;
                (pages, it.owner.number(), it.readers.len(), it.exchanges)
            })
            .collect();
        let expected = [
            (0..2, 0, 0, 0),
            (2..4, 1, 0, 5),
            (4..6, 0, 0, 0),
            (9..10, 0, 1, 1),
            (10..12, 0, 0, 0),
        ];
        assert_eq!(told, expected);
        assert_eq!(objects_of(0, &[], [].iter()), []);
    }
}
