//! A whole machine: its threads, its memories, its WASI state.
//!
//! ```text
//!             freeze                 all at safepoints
//!   Running ─────────▶ Freezing ──────────────────────▶ Frozen
//!      ▲ ▲                │ too late                      │  thaw
//!      │ └────────────────┘◀──────────────────────────────┘
//!      │ thaw                      exit, trap, stop: from anywhere ─▶ Ended
//!   Frozen ◀── prepare (a machine that was captured elsewhere)
//! ```
//!
//! While it is frozen its [`Image`] and its memories are its complete state. A machine that is
//! thawed in place continues in the same instances.
//!
//! Independent of that, threads can be *held* at safepoints, for reasons that are released
//! separately ([`Hold`]). A held thread does not run; freezing and thawing do not affect a hold,
//! and freezing need not wait for a held thread.

mod execution;
mod placement;

use super::calls::AddressLocks;
use super::cpu_usage::{CpuUsage, ThreadClock};
use super::fiber::{FiberError, Trap};
use super::frame::{FrameError, ThreadState};
use super::governor::govern;
use super::hints::{Hints, NamedRange};
use super::host::Host;
use super::image::{Entry, Image};
use super::lock::locked;
use super::parts::{Inbox, Parts};
use super::program::{Program, ProgramError};
use super::signal::Signal;
use super::tables::{TableBudget, TableShare};
use super::wait::WaitQueues;
use crate::coherence::PartId;
use crate::instrument::meta::Meta;
use crate::memory::{GuestMemory, MemoryError};
use keel_wasi::Wasi;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// The entry point of a command.
const MAIN_EXPORT: &str = "_start";

/// Resource limits of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of each memory.
    pub memory_bytes: u64,
    /// Concurrent guest threads.
    pub threads_max: u32,
    /// CPU time per second of all its threads, in thousandths of a core (`cpu.limit`); not zero.
    pub cpu_millis: Option<u32>,
}

/// Why threads are held at safepoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// They exceeded their `cpu.limit`.
    CpuLimit,
    /// They dirty memory faster than a pre-copy move can copy.
    Slowdown,
    /// The machine may not run at present, for a reason that is not its own.
    NotAllowed,
}

impl Hold {
    fn bit(self) -> u8 {
        match self {
            Hold::CpuLimit => 1,
            Hold::Slowdown => 2,
            Hold::NotAllowed => 4,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            memory_bytes: 4 << 30,
            threads_max: 256,
            cpu_millis: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadInfo {
    pub tid: u32,
    /// The part at which it runs.
    pub part: PartId,
    /// The target part of a pending move.
    pub moves_to: Option<PartId>,
    /// Whether it is blocked in `memory.atomic.wait`.
    pub waits: bool,
    /// CPU usage at its part, if known.
    pub cpu_usage: Option<CpuUsage>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with this code.
    Exit(u32),
    /// By a guest's fault.
    Trap(Trap),
    Stopped,
}

/// Why a machine cannot start, resume or change.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// An instance cannot be created.
    #[error(transparent)]
    Fiber(#[from] FiberError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The code for resuming cannot be compiled.
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(
        "the module exports no function \"_start\": it is a library, not a program (build it as a WASI command)"
    )]
    NoStart,
    /// A data segment lies outside its memory.
    #[error("out of bounds memory access: data segment {0} lies outside its memory")]
    Data(usize),
    /// The captured state does not fit.
    #[error(transparent)]
    Frames(#[from] FrameError),
    /// The image is corrupt, or of another version or module.
    #[error("the captured machine cannot be used: {0}")]
    Image(String),
    /// Its WASI state cannot be stored or restored.
    #[error(transparent)]
    Wasi(#[from] keel_wasi::Error),
    /// The process is out of threads or descriptors.
    #[error("no resources for a guest thread: {0}")]
    System(#[from] std::io::Error),
    #[error("the machine is not frozen")]
    NotFrozen,
    #[error("the machine has ended")]
    Ended,
    #[error("the machine has no thread {0} (it may have ended)")]
    NoThread(u32),
    #[error("the machine has no part {0}")]
    NoPart(PartId),
    /// Its members lack memory, or are lost.
    #[error("a part of the machine cannot allocate its memory (is its node out of memory?)")]
    Members,
    #[error("part {0} is leaving: no thread can move there")]
    Leaving(PartId),
    /// Threads still run at a part that is to be removed.
    #[error("{0} thread(s) still run at parts that would be removed")]
    ThreadsAtMember(usize),
    /// Threads did not reach a safepoint in time; the machine continues.
    #[error("{0} thread(s) did not reach a safepoint in time; the machine continues")]
    FreezeTimeout(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Freezing,
    Frozen,
    Ended,
}

pub(super) struct Thread {
    entry: Entry,
    pub(super) signal: Arc<Signal>,
    /// Set while it is at a safepoint; the inner `None` means that it has not started.
    parked: Option<Option<ThreadState>>,
    /// Whether an OS thread runs it.
    launched: bool,
    /// Whether it moves into a fresh instance at `place` before it continues.
    rebuild: bool,
    /// The assigned part.
    place: PartId,
    /// The current part, once it has started.
    seat: Option<PartId>,
    /// Reports of its part, unless that is the home.
    inbox: Arc<Inbox>,
    /// Earliest time of the next recapture: rebuilding a deep stack takes long, and a thread with
    /// less time than that between two recaptures would starve.
    recapture_after: Option<Instant>,
    /// Bit set of holds ([`Hold`]).
    held: u8,
    /// Set by its OS thread.
    clock: Option<ThreadClock>,
    /// Initial table entries of its instance.
    _tables: TableShare,
}

pub(super) struct Threads {
    phase: Phase,
    pub(super) table: BTreeMap<u32, Thread>,
    next_tid: u32,
    /// Holds of all threads, also of those that are spawned later.
    held: u8,
    outcome: Option<Outcome>,
    /// Number of live OS threads.
    launched: usize,
}

/// CPU limit of its threads together.
struct CpuLimit {
    /// Thousandths of a core.
    millis: Option<u32>,
    /// Whether a governor runs; it ends when the limit is removed.
    governed: bool,
}

pub(super) struct Shared {
    pub(super) program: Arc<Program>,
    pub(super) memories: Arc<[Arc<GuestMemory>]>,
    pub(super) wasi: Arc<Wasi>,
    threads_max: u32,
    pub(super) tables: Arc<TableBudget>,
    cpu: Mutex<CpuLimit>,
    pub(super) threads: Mutex<Threads>,
    changed: Condvar,
    pub(super) waits: Mutex<WaitQueues>,
    pub(super) names: Mutex<Hints>,
    pub(super) address_locks: AddressLocks,
    pub(super) parts: Parts,
    begun: Instant,
    pub(super) over: AtomicBool,
    captures: AtomicU64,
    /// Value of `evenkeel.epoch`.
    pub(super) epoch: AtomicU64,
}

#[derive(Clone)]
pub struct Machine {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("program", &self.shared.program)
            .finish_non_exhaustive()
    }
}

/// Creates a program's memories, zeroed.
///
/// # Errors
/// [`MemoryError`].
pub fn make_memories(
    meta: &Meta,
    limit_bytes: u64,
) -> Result<Arc<[Arc<GuestMemory>]>, MemoryError> {
    meta.memories
        .iter()
        .map(|memory| {
            GuestMemory::new(
                memory.minimum_pages,
                memory.maximum_pages,
                memory.memory64,
                limit_bytes,
            )
            .map(Arc::new)
        })
        .collect()
}

/// Writes a program's active data segments, in order.
///
/// # Errors
/// The number of the first segment that lies outside its memory.
fn apply_data(meta: &Meta, memories: &[Arc<GuestMemory>]) -> Result<(), usize> {
    for (number, segment) in meta.data.iter().enumerate() {
        memories
            .get(segment.memory as usize)
            .and_then(|memory| memory.write(segment.offset, &segment.bytes).ok())
            .ok_or(number)?;
    }
    Ok(())
}

impl Machine {
    /// Starts a command at its entry point.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn start(program: Arc<Program>, wasi: Wasi, limits: Limits) -> Result<Self, MachineError> {
        Machine::start_under(0, program, wasi, limits)
    }

    /// As [`Self::start`], with this epoch for the guest.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn start_under(
        epoch: u64,
        program: Arc<Program>,
        wasi: Wasi,
        limits: Limits,
    ) -> Result<Self, MachineError> {
        let machine = Machine::ready_under(epoch, program, wasi, limits)?;
        machine.thaw()?;
        Ok(machine)
    }

    /// As [`Self::start_under`], but frozen at its start until [`Self::thaw`].
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn ready_under(
        epoch: u64,
        program: Arc<Program>,
        wasi: Wasi,
        limits: Limits,
    ) -> Result<Self, MachineError> {
        if !program.exports_function(MAIN_EXPORT) {
            return Err(MachineError::NoStart);
        }
        let machine = Machine::idle(program, wasi, limits)?;
        machine.set_epoch(epoch);
        let tables = machine.shared.tables_of_thread();
        locked(&machine.shared.threads).add(0, Entry::Main, Some(None), PartId::HOME, tables)?;
        Ok(machine)
    }

    /// A machine without threads: memories are created and initialised. Its exports can be called
    /// in a [`Fiber`](super::fiber::Fiber) on [`Self::host`].
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn idle(program: Arc<Program>, wasi: Wasi, limits: Limits) -> Result<Self, MachineError> {
        let memories = make_memories(&program.meta, limits.memory_bytes)?;
        apply_data(&program.meta, &memories).map_err(MachineError::Data)?;
        let waits = WaitQueues::default();
        Ok(Machine::new(program, memories, wasi, limits, 1, waits))
    }

    /// The implementation of its threads' host calls.
    pub fn host(&self) -> Arc<dyn Host> {
        Arc::new(self.shared.clone())
    }

    /// Prepares a captured machine for [`Self::thaw`]: threads and instances are created, nothing
    /// runs. `memories` must have the captured contents.
    ///
    /// # Errors
    /// [`MachineError`]; nothing remains then.
    pub fn prepare(
        program: Arc<Program>,
        image: Image,
        memories: Arc<[Arc<GuestMemory>]>,
        wasi: Wasi,
        limits: Limits,
    ) -> Result<Self, MachineError> {
        let machine = Machine::new(program, memories, wasi, limits, image.next_tid, image.waits);
        *locked(&machine.shared.names) = image.names;
        let mut threads = locked(&machine.shared.threads);
        for (tid, (entry, state)) in image.threads {
            let tables = machine.shared.tables_of_thread();
            threads.add(tid, entry, Some(state), PartId::HOME, tables)?;
        }
        let tids: Vec<u32> = threads.table.keys().copied().collect();
        for tid in tids {
            if let Err(error) = machine.shared.launch(&mut threads, tid) {
                threads.phase = Phase::Ended;
                machine.shared.changed.notify_all();
                return Err(error.into());
            }
        }
        drop(threads);
        Ok(machine)
    }

    pub(super) fn of(shared: Arc<Shared>) -> Self {
        Machine { shared }
    }

    fn new(
        program: Arc<Program>,
        memories: Arc<[Arc<GuestMemory>]>,
        wasi: Wasi,
        limits: Limits,
        next_tid: u32,
        waits: WaitQueues,
    ) -> Self {
        let machine = Machine {
            shared: Arc::new(Shared {
                program,
                memories,
                wasi: Arc::new(wasi),
                threads_max: limits.threads_max,
                tables: Arc::default(),
                cpu: Mutex::new(CpuLimit {
                    millis: None,
                    governed: false,
                }),
                threads: Mutex::new(Threads {
                    phase: Phase::Frozen,
                    table: BTreeMap::new(),
                    next_tid,
                    held: 0,
                    outcome: None,
                    launched: 0,
                }),
                changed: Condvar::new(),
                waits: Mutex::new(waits),
                names: Mutex::default(),
                address_locks: AddressLocks::default(),
                parts: Parts::default(),
                begun: Instant::now(),
                over: AtomicBool::new(false),
                captures: AtomicU64::new(0),
                epoch: AtomicU64::new(0),
            }),
        };
        machine.limit_cpu(limits.cpu_millis);
        machine
    }

    /// Sets the CPU limit of its threads, in thousandths of a core.
    pub fn limit_cpu(&self, millis: Option<u32>) {
        let mut cpu = locked(&self.shared.cpu);
        cpu.millis = millis;
        if millis.is_none() || cpu.governed {
            return;
        }
        let shared = Arc::downgrade(&self.shared);
        let governor = std::thread::Builder::new()
            .name("governor".into())
            .spawn(move || govern(shared));
        match governor {
            Ok(_) => cpu.governed = true,
            Err(error) => {
                tracing::warn!(%error, "no thread for enforcing cpu.limit");
            }
        }
    }

    /// Sets the size limit of each of its memories.
    ///
    /// # Errors
    /// The size of the first memory above the limit; nothing changes then.
    pub fn limit_memory(&self, bytes: u64) -> Result<(), u64> {
        let before: Vec<u64> = self
            .memories()
            .iter()
            .map(|memory| memory.limit_bytes())
            .collect();
        for (number, memory) in self.memories().iter().enumerate() {
            if let Err(size) = memory.set_limit(bytes) {
                for (memory, limit) in self.memories().iter().zip(before).take(number) {
                    // It has not exceeded the old limit meanwhile.
                    let restored = memory.set_limit(limit);
                    debug_assert!(restored.is_ok());
                }
                return Err(size);
            }
        }
        Ok(())
    }

    /// Sets the epoch that the guest sees; 0 outside of a cluster. Must be set before it runs in
    /// that epoch.
    pub fn set_epoch(&self, epoch: u64) {
        self.shared.epoch.store(epoch, Ordering::Release);
    }

    pub fn program(&self) -> &Arc<Program> {
        &self.shared.program
    }

    pub fn memories(&self) -> &Arc<[Arc<GuestMemory>]> {
        &self.shared.memories
    }

    pub fn wasi(&self) -> &Arc<Wasi> {
        &self.shared.wasi
    }

    pub fn captures(&self) -> u64 {
        self.shared.captures.load(Ordering::Relaxed)
    }

    pub fn threads(&self) -> Vec<u32> {
        locked(&self.shared.threads).table.keys().copied().collect()
    }

    /// Brings all threads to safepoints. A thread in a long host call has until `patience` expires;
    /// then the machine continues as if not asked. The first freeze may have to compile first; the
    /// machine runs meanwhile.
    ///
    /// # Errors
    /// [`MachineError::FreezeTimeout`], [`MachineError::Ended`],
    /// [`MachineError::Program`]; freezing a frozen machine is fine.
    pub fn freeze(&self, patience: Duration) -> Result<(), MachineError> {
        let shared = &self.shared;
        shared.program.prepare_resume()?;
        let deadline = Instant::now() + patience;
        let mut threads = locked(&shared.threads);
        loop {
            match threads.phase {
                Phase::Ended => return Err(MachineError::Ended),
                Phase::Frozen => return Ok(()),
                Phase::Running => {
                    threads.phase = Phase::Freezing;
                    for thread in threads.table.values() {
                        thread.signal.request();
                    }
                }
                Phase::Freezing => {}
            }
            let running = threads.running();
            if running == 0 {
                threads.phase = Phase::Frozen;
                return Ok(());
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                shared.resume_threads(&mut threads)?;
                return Err(MachineError::FreezeTimeout(running));
            }
            threads = shared
                .changed
                .wait_timeout(threads, rest)
                .unwrap_or_else(|error| error.into_inner())
                .0;
        }
    }

    /// The points of the frames on the stacks of its threads: what must be compiled to resume them
    /// ([`Program::stack_code`]). Freezes the machine for some microseconds.
    ///
    /// # Errors
    /// As [`Self::freeze`] and [`Self::thaw`].
    pub fn points_on_stacks(&self, patience: Duration) -> Result<BTreeSet<u32>, MachineError> {
        self.freeze(patience)?;
        let found = {
            let threads = locked(&self.shared.threads);
            let parked = threads.table.values().filter_map(|it| it.parked.as_ref());
            let states = parked.flatten();
            let frames = states.flat_map(|state| &state.frames);
            frames.map(|frame| frame.point).collect()
        };
        self.thaw()?;
        Ok(found)
    }

    /// The frozen machine as plain data, without its memories.
    ///
    /// # Errors
    /// [`MachineError::NotFrozen`], [`MachineError::Wasi`].
    pub fn image(&self) -> Result<Image, MachineError> {
        let shared = &self.shared;
        let threads = locked(&shared.threads);
        if threads.phase != Phase::Frozen {
            return Err(MachineError::NotFrozen);
        }
        Ok(Image {
            module: *shared.program.hash(),
            threads: threads
                .table
                .iter()
                .map(|(tid, thread)| (*tid, (thread.entry, thread.parked.clone().flatten())))
                .collect(),
            next_tid: threads.next_tid,
            waits: locked(&shared.waits).clone(),
            memory_pages: shared
                .memories
                .iter()
                .map(|memory| memory.size_bytes() >> 16)
                .collect(),
            wasi: shared.wasi.snapshot()?,
            names: locked(&shared.names).clone(),
        })
    }

    /// Named ranges of its first memory.
    pub fn named(&self) -> BTreeMap<String, NamedRange> {
        locked(&self.shared.names).objects().clone()
    }

    /// Named ranges to which its threads have declared an affinity.
    pub fn preferences(&self) -> BTreeMap<u32, String> {
        locked(&self.shared.names).preferences().clone()
    }

    /// Resumes a frozen machine.
    ///
    /// # Errors
    /// [`MachineError::NotFrozen`], [`MachineError::Ended`], or no OS thread
    /// for a guest thread that was spawned meanwhile.
    pub fn thaw(&self) -> Result<(), MachineError> {
        let mut threads = locked(&self.shared.threads);
        match threads.phase {
            Phase::Ended => return Err(MachineError::Ended),
            Phase::Running => return Ok(()),
            Phase::Freezing => return Err(MachineError::NotFrozen),
            Phase::Frozen => {}
        }
        Ok(self.shared.resume_threads(&mut threads)?)
    }

    /// Holds threads (these; or all, also those that are spawned later) at their next safepoint until
    /// [`Self::release`]; does not wait for them. The first hold may have to compile; the machine
    /// runs meanwhile.
    ///
    /// # Errors
    /// [`MachineError::Program`].
    pub fn hold(&self, why: Hold, tids: Option<&[u32]>) -> Result<(), MachineError> {
        self.shared.program.prepare_resume()?;
        let mut threads = locked(&self.shared.threads);
        if tids.is_none() {
            threads.held |= why.bit();
        }
        for (tid, thread) in &mut threads.table {
            if tids.is_none_or(|tids| tids.contains(tid)) {
                thread.held |= why.bit();
                thread.signal.request();
            }
        }
        Ok(())
    }

    /// Releases [`Self::hold`] for all threads.
    pub fn release(&self, why: Hold) {
        let mut threads = locked(&self.shared.threads);
        let running = threads.phase == Phase::Running;
        threads.held &= !why.bit();
        for thread in threads.table.values_mut() {
            let was = thread.held;
            thread.held &= !why.bit();
            if was != 0 && thread.held == 0 && running && !thread.rebuild {
                thread.signal.clear();
            }
        }
        self.shared.changed.notify_all();
    }

    /// Whether none of its threads runs, here or at another part: each is at a safepoint, and no host
    /// call of it is in progress.
    pub fn stands_still(&self) -> bool {
        let threads = locked(&self.shared.threads);
        threads.phase == Phase::Ended && threads.launched == 0 || threads.running() == 0
    }

    /// Its CPU limit in thousandths of a core, and the run time of each thread in nanoseconds.
    /// `None` once it has ended or has no limit: the governor stops then.
    pub(super) fn usage(&self) -> Option<(u32, Vec<(u32, u64)>)> {
        let limit = {
            let mut cpu = locked(&self.shared.cpu);
            cpu.governed = cpu.millis.is_some();
            cpu.millis
        };
        let Some(limit) = limit else {
            self.release(Hold::CpuLimit);
            return None;
        };
        let threads = locked(&self.shared.threads);
        if threads.phase == Phase::Ended {
            return None;
        }
        let used = threads
            .table
            .iter()
            .filter_map(|(tid, thread)| Some((*tid, thread.clock.as_ref()?.run_ns()?)))
            .collect();
        Some((limit, used))
    }

    /// Ends it: no guest code runs after this returns, except for a host call in progress.
    pub fn stop(&self) {
        self.shared.end(Outcome::Stopped);
    }

    /// Waits until it has ended and its threads are gone; `None` on time-out.
    pub fn wait(&self, timeout: Option<Duration>) -> Option<Outcome> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut threads = locked(&self.shared.threads);
        loop {
            if threads.phase == Phase::Ended && threads.launched == 0 {
                return threads.outcome.clone();
            }
            let changed = &self.shared.changed;
            threads = match deadline {
                None => changed
                    .wait(threads)
                    .unwrap_or_else(|error| error.into_inner()),
                Some(deadline) => {
                    let rest = deadline.saturating_duration_since(Instant::now());
                    if rest.is_zero() {
                        return None;
                    }
                    changed
                        .wait_timeout(threads, rest)
                        .unwrap_or_else(|error| error.into_inner())
                        .0
                }
            };
        }
    }
}

impl Shared {
    /// Initial table entries of a thread known to exist: the first one, or a captured one.
    fn tables_of_thread(&self) -> TableShare {
        let mut share = TableShare::new(self.tables.clone());
        share.take(self.program.table_entries);
        share
    }
}

impl Thread {
    fn rested(&self) -> bool {
        self.recapture_after
            .is_none_or(|until| Instant::now() >= until)
    }
}

impl Threads {
    fn add(
        &mut self,
        tid: u32,
        entry: Entry,
        parked: Option<Option<ThreadState>>,
        place: PartId,
        tables: TableShare,
    ) -> std::io::Result<()> {
        let signal = Arc::new(Signal::new()?);
        if self.held != 0 {
            signal.request();
        }
        self.table.insert(
            tid,
            Thread {
                entry,
                signal,
                parked,
                launched: false,
                rebuild: false,
                place,
                seat: None,
                inbox: Arc::default(),
                recapture_after: None,
                held: self.held,
                clock: None,
                _tables: tables,
            },
        );
        Ok(())
    }

    /// Number of threads that are not at a safepoint.
    fn running(&self) -> usize {
        self.table
            .values()
            .filter(|thread| thread.parked.is_none())
            .count()
    }
}
