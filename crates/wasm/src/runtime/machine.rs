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
//! While it is frozen its [`Image`] and its memories are all of it. A machine
//! that is thawed in place goes on in the same instances.
//!
//! Apart from that, threads can be *held* at safepoints, for reasons of which
//! each is taken back by itself ([`Hold`]). A held thread does not run; whether
//! the machine is frozen or thawed meanwhile does not matter to it, and freezing
//! need not wait for it.

use super::calls::Turns;
use super::fiber::{Fiber, FiberError, Run, Stop, Trap};
use super::frame::{FrameError, ThreadState, Value};
use super::governor::{CoreTime, ThreadClock, govern};
use super::host::{Host, HostThread};
use super::image::{Entry, Image};
use super::names::{Named, Names};
use super::parts::{Away, Inbox, Members, Order, Parts, Report, Spawning};
use super::program::{Program, ProgramError, STACK_BYTES};
use super::signal::Signal;
use super::wait::WaitQueues;
use crate::coherence::{PartId, PartSet};
use crate::instrument::meta::{Meta, PREFIX};
use crate::memory::{GuestMemory, MemoryError};
use keel_wasi::Wasi;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The entry point of a command.
const MAIN_EXPORT: &str = "_start";
/// The entry point of a thread (wasi-threads).
const THREAD_EXPORT: &str = "wasi_thread_start";
/// Largest thread number that wasi-threads allows.
const TID_MAX: u32 = (1 << 29) - 1;

/// Bounds on what a machine may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of each memory.
    pub memory_bytes: u64,
    /// Guest threads at a time.
    pub threads_max: u32,
    /// CPU time a second that its threads may use together, in thousandths of
    /// a core (`cpu.limit`); not zero.
    pub cpu_millis: Option<u32>,
}

/// Why threads are held at safepoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// They used more than their `cpu.limit`.
    CpuLimit,
    /// They write faster than a move can copy.
    Slowdown,
}

impl Hold {
    fn bit(self) -> u8 {
        match self {
            Hold::CpuLimit => 1,
            Hold::Slowdown => 2,
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

/// What a thread does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadInfo {
    /// Its number.
    pub tid: u32,
    /// The part at which it runs.
    pub part: PartId,
    /// The part that it moves to, if it does.
    pub moves_to: Option<PartId>,
    /// Whether it waits to be woken (`memory.atomic.wait`).
    pub waits: bool,
    /// What it took of cores where it is; `None` where that is not known.
    pub took: Option<Took>,
}

/// What a thread took of cores where it is. Only differences mean something, and only
/// while it stays there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Took {
    /// When that was looked at, in nanoseconds since its part began.
    pub at_ns: u64,
    /// What it took until then.
    pub time: CoreTime,
    /// Microseconds that it stood at pages, by the part that gave them.
    pub stood: BTreeMap<PartId, u64>,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// By itself, with this code.
    Exit(u32),
    /// By a guest's fault.
    Trap(Trap),
    /// It was told to.
    Stopped,
}

/// Why a machine does not start or resume.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No instance for a thread.
    #[error(transparent)]
    Fiber(#[from] FiberError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// What would let its threads go on cannot be compiled.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The module is no command.
    #[error(
        "the module exports no function \"_start\": it is a library, not a program (build it as a WASI command)"
    )]
    NoStart,
    /// A data segment lies outside its memory.
    #[error("out of bounds memory access: data segment {0} lies outside its memory")]
    Data(usize),
    /// What was captured does not fit.
    #[error(transparent)]
    Frames(#[from] FrameError),
    /// The image is damaged, or of another version or module.
    #[error("the captured machine cannot be used: {0}")]
    Image(String),
    /// Its WASI state cannot be kept or had again.
    #[error(transparent)]
    Wasi(#[from] keel_wasi::Error),
    /// The process has no thread or descriptor left.
    #[error("no resources for a guest thread: {0}")]
    System(#[from] std::io::Error),
    /// It is not frozen.
    #[error("the machine is not frozen")]
    NotFrozen,
    /// It ended.
    #[error("the machine has ended")]
    Ended,
    /// No such thread.
    #[error("the machine has no thread {0} (it may have ended)")]
    NoThread(u32),
    /// No such part.
    #[error("the machine has no part {0}")]
    NoPart(PartId),
    /// Its members lack memory, or are lost.
    #[error("a part of the machine cannot have its memory (is its node short of it?)")]
    Members,
    /// A member is to leave.
    #[error("part {0} is to leave: nothing goes there any more")]
    Leaving(PartId),
    /// It cannot do without a part yet.
    #[error("{0} thread(s) run at parts that it would not have any more")]
    Away(usize),
    /// A thread did not come to a safepoint in time; the machine goes on.
    #[error("{0} thread(s) did not come to a safepoint in time; the machine goes on")]
    Late(usize),
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
    /// Set while it stands at a safepoint; `None` inside for one that has not
    /// begun.
    parked: Option<Option<ThreadState>>,
    /// Whether an OS thread runs it.
    launched: bool,
    /// Whether it is to move into a fresh instance before it goes on: where `place`
    /// is now.
    rebuild: bool,
    /// The part that it is to run at.
    place: PartId,
    /// The part that it runs at, once it has begun.
    seat: Option<PartId>,
    /// What the part says where that is not the home.
    inbox: Arc<Inbox>,
    /// Until then it is not shaken again: a deep stack takes long to make anew,
    /// and a thread that got less time than that would not come on.
    rests_until: Option<Instant>,
    /// Reasons for which it is held ([`Hold`]).
    held: u8,
    /// Set by the OS thread that runs it.
    clock: Option<ThreadClock>,
}

pub(super) struct Threads {
    phase: Phase,
    pub(super) table: BTreeMap<u32, Thread>,
    next_tid: u32,
    outcome: Option<Outcome>,
    /// OS threads that still exist.
    launched: usize,
}

/// What its threads may use together.
struct CpuLimit {
    /// Thousandths of a core.
    millis: Option<u32>,
    /// Whether a governor runs; it ends when there is no limit any more.
    governed: bool,
}

pub(super) struct Shared {
    pub(super) program: Arc<Program>,
    pub(super) memories: Arc<[Arc<GuestMemory>]>,
    pub(super) wasi: Arc<Wasi>,
    threads_max: u32,
    cpu: Mutex<CpuLimit>,
    pub(super) threads: Mutex<Threads>,
    changed: Condvar,
    pub(super) waits: Mutex<WaitQueues>,
    pub(super) names: Mutex<Names>,
    pub(super) turns: Turns,
    pub(super) parts: Parts,
    begun: Instant,
    /// It has ended.
    pub(super) over: AtomicBool,
    captures: AtomicU64,
    /// What `evenkeel.epoch` answers.
    pub(super) epoch: AtomicU64,
}

/// A machine in this process.
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

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}

/// Makes the calling thread as unimportant as guests are.
pub(super) fn lower_priority(program: &Program) {
    if let Some(nice) = program.guest_nice()
        // (On Linux that of a thread.)
        && let Err(error) = rustix::process::setpriority_process(None, nice)
    {
        tracing::debug!(%error, "a guest is as important as what moves it");
    }
}

/// Makes a program's memories, zeroed.
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
    /// Starts a command from its beginning.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn start(program: Arc<Program>, wasi: Wasi, limits: Limits) -> Result<Self, MachineError> {
        Machine::start_under(0, program, wasi, limits)
    }

    /// As [`Self::start`]; the guest is told this epoch.
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

    /// As [`Self::start_under`], but it stands at its beginning: [`Self::thaw`] lets it
    /// go.
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
        locked(&machine.shared.threads).add(0, Entry::Main, Some(None), PartId::HOME)?;
        Ok(machine)
    }

    /// A machine without threads: memories are made and filled. Its exports can
    /// be called in a [`Fiber`] on [`Self::host`].
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn idle(program: Arc<Program>, wasi: Wasi, limits: Limits) -> Result<Self, MachineError> {
        let memories = make_memories(&program.meta, limits.memory_bytes)?;
        apply_data(&program.meta, &memories).map_err(MachineError::Data)?;
        let waits = WaitQueues::default();
        Ok(Machine::new(program, memories, wasi, limits, 1, waits))
    }

    /// What its threads' host calls lead to.
    pub fn host(&self) -> Arc<dyn Host> {
        Arc::new(self.shared.clone())
    }

    /// Brings a captured machine to where [`Self::thaw`] lets it go on:
    /// threads and instances are made, nothing runs. `memories` hold what the
    /// machine's memories held.
    ///
    /// # Errors
    /// [`MachineError`]; nothing of it is left then.
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
            threads.add(tid, entry, Some(state), PartId::HOME)?;
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
                cpu: Mutex::new(CpuLimit {
                    millis: None,
                    governed: false,
                }),
                threads: Mutex::new(Threads {
                    phase: Phase::Frozen,
                    table: BTreeMap::new(),
                    next_tid,
                    outcome: None,
                    launched: 0,
                }),
                changed: Condvar::new(),
                waits: Mutex::new(waits),
                names: Mutex::default(),
                turns: Turns::default(),
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

    /// Bounds the CPU time of its threads from now on, in thousandths of a core.
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
                tracing::warn!(%error, "no thread keeps the machine within its cpu.limit");
            }
        }
    }

    /// Bounds from now on what each of its memories may grow to.
    ///
    /// # Errors
    /// The bytes of the first memory that has more; nothing changes then.
    pub fn limit_memory(&self, bytes: u64) -> Result<(), u64> {
        let before: Vec<u64> = self
            .memories()
            .iter()
            .map(|memory| memory.limit_bytes())
            .collect();
        for (number, memory) in self.memories().iter().enumerate() {
            if let Err(size) = memory.set_limit(bytes) {
                for (memory, limit) in self.memories().iter().zip(before).take(number) {
                    // It has not grown beyond what it may meanwhile.
                    let restored = memory.set_limit(limit);
                    debug_assert!(restored.is_ok());
                }
                return Err(size);
            }
        }
        Ok(())
    }

    /// What the guest is told of its epoch from now on; 0 outside of a cluster.
    /// Set before it runs under that epoch.
    pub fn set_epoch(&self, epoch: u64) {
        self.shared.epoch.store(epoch, Ordering::Release);
    }

    /// Its program.
    pub fn program(&self) -> &Arc<Program> {
        &self.shared.program
    }

    /// Its memories.
    pub fn memories(&self) -> &Arc<[Arc<GuestMemory>]> {
        &self.shared.memories
    }

    /// Its WASI state.
    pub fn wasi(&self) -> &Arc<Wasi> {
        &self.shared.wasi
    }

    /// Threads captured so far.
    pub fn captures(&self) -> u64 {
        self.shared.captures.load(Ordering::Relaxed)
    }

    /// Numbers of its threads.
    pub fn threads(&self) -> Vec<u32> {
        locked(&self.shared.threads).table.keys().copied().collect()
    }

    /// Brings all threads to safepoints. A thread in a long host call has
    /// until `patience` is over; then the machine goes on as if not asked.
    /// The first freeze may have to compile first; the machine runs meanwhile.
    ///
    /// # Errors
    /// [`MachineError::Late`], [`MachineError::Ended`],
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
                shared.go_on(&mut threads)?;
                return Err(MachineError::Late(running));
            }
            threads = shared
                .changed
                .wait_timeout(threads, rest)
                .unwrap_or_else(|error| error.into_inner())
                .0;
        }
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

    /// What the guest calls pieces of its first memory.
    pub fn named(&self) -> BTreeMap<String, Named> {
        locked(&self.shared.names).objects().clone()
    }

    /// Which of them its threads like to be near.
    pub fn liked(&self) -> BTreeMap<u32, String> {
        locked(&self.shared.names).liked().clone()
    }

    /// Lets a frozen machine go on.
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
        Ok(self.shared.go_on(&mut threads)?)
    }

    /// Holds threads (all, or these) at their next safepoint until
    /// [`Self::release`]; does not wait for them. The first time it may have to
    /// compile; the machine runs meanwhile. Threads that are spawned later are
    /// not held.
    ///
    /// # Errors
    /// [`MachineError::Program`].
    pub fn hold(&self, why: Hold, tids: Option<&[u32]>) -> Result<(), MachineError> {
        self.shared.program.prepare_resume()?;
        let mut threads = locked(&self.shared.threads);
        for (tid, thread) in &mut threads.table {
            if tids.is_none_or(|tids| tids.contains(tid)) {
                thread.held |= why.bit();
                thread.signal.request();
            }
        }
        Ok(())
    }

    /// Takes [`Self::hold`] back for all threads.
    pub fn release(&self, why: Hold) {
        let mut threads = locked(&self.shared.threads);
        let running = threads.phase == Phase::Running;
        for thread in threads.table.values_mut() {
            let was = thread.held;
            thread.held &= !why.bit();
            if was != 0 && thread.held == 0 && running && !thread.rebuild {
                thread.signal.clear();
            }
        }
        self.shared.changed.notify_all();
    }

    /// The limit of its CPU time in thousandths of a core, and the nanoseconds
    /// that each thread ran so far. `None` once it ended, or has no limit any more:
    /// then nothing is governed.
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

    /// Ends it: no guest code runs after this returns, except a host call
    /// that is under way.
    pub fn stop(&self) {
        self.shared.end(Outcome::Stopped);
    }

    /// Waits until it ended and its threads are gone; `None` if it still runs
    /// after `timeout`.
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

    /// Moves one running thread through its serialised form into a fresh
    /// instance: for testing. False if there is no such thread, if the machine
    /// is not running, or if the thread ran no longer since the last time than
    /// that took.
    pub fn shake(&self, tid: u32) -> bool {
        let mut threads = locked(&self.shared.threads);
        if threads.phase != Phase::Running {
            return false;
        }
        let Some(thread) = threads.table.get_mut(&tid).filter(|thread| thread.rested()) else {
            return false;
        };
        thread.rebuild = true;
        thread.signal.request();
        true
    }

    /// From now on it has members too, which hear what they are to do through `way`;
    /// threads that it starts begin as `spawning` says. Its memories are
    /// the home's part of what `crate::coherence` keeps. Returns when those of the members
    /// are as large.
    ///
    /// # Errors
    /// [`MachineError::NotFrozen`]; [`MachineError::Away`] if threads are at members
    /// that it would not have any more.
    pub fn set_members(
        &self,
        members: Vec<PartId>,
        way: Option<Arc<dyn Members>>,
        spawning: Spawning,
    ) -> Result<(), MachineError> {
        let threads = locked(&self.shared.threads);
        if threads.phase != Phase::Frozen {
            return Err(MachineError::NotFrozen);
        }
        let here = |part: PartId| part == PartId::HOME || members.contains(&part);
        let stays =
            |thread: &&Thread| !here(thread.place) || !here(thread.seat.unwrap_or(thread.place));
        let away = threads.table.values().filter(stays);
        match away.count() {
            0 => self.shared.parts.set(members, way, spawning),
            count => return Err(MachineError::Away(count)),
        }
        drop(threads);
        // (A machine that was lost meanwhile ends.)
        for (number, memory) in (0..).zip(self.shared.memories.iter()) {
            if !self.shared.parts.open(number, memory.size_bytes()) {
                return Err(MachineError::Members);
            }
        }
        Ok(())
    }

    /// Takes note of what a member says.
    pub fn hear(&self, from: PartId, report: Report) {
        if let Report::Opened {
            memory,
            bytes,
            done,
        } = report
        {
            return self.shared.parts.opened(from, (memory, bytes), done);
        }
        if let Report::Times { at_ns, threads } = report {
            return self.shared.parts.took(from, at_ns, threads);
        }
        if let Report::Expecting { tid } = report {
            let threads = locked(&self.shared.threads);
            // (Unless it has left already.)
            if let Some(thread) = threads.table.get(&tid).filter(|thread| thread.rebuild) {
                thread.signal.request();
            }
            return;
        }
        let Some(tid) = report.tid() else { return };
        let heard = {
            let threads = locked(&self.shared.threads);
            let thread = threads.table.get(&tid);
            thread.map(|thread| (thread.inbox.clone(), thread.signal.clone()))
        };
        if let Some((inbox, signal)) = heard {
            inbox.put(from, report);
            signal.wake();
        }
    }

    /// Its members are lost before it came to depend on them: who waits for them goes on.
    pub fn lose_members(&self) {
        self.shared.parts.lose();
    }

    /// Ends it since a part of it is lost: nothing comes from members any more.
    pub fn lose(&self) {
        self.shared.end(Outcome::Stopped);
        self.shared.parts.lose();
        let threads = locked(&self.shared.threads);
        for thread in threads.table.values() {
            thread.inbox.close();
            thread.signal.wake();
        }
    }

    /// Moves a thread to another part, at its next safepoint; does not wait for it. The
    /// first time it may have to compile; the machine runs meanwhile.
    ///
    /// # Errors
    /// [`MachineError::NoThread`], [`MachineError::NoPart`], [`MachineError::Ended`],
    /// [`MachineError::Program`].
    pub fn move_thread(&self, tid: u32, to: PartId) -> Result<(), MachineError> {
        let shared = &self.shared;
        shared.program.prepare_resume()?;
        let mut threads = locked(&shared.threads);
        if threads.phase == Phase::Ended {
            return Err(MachineError::Ended);
        }
        if to != PartId::HOME {
            if shared.parts.is_leaving(to) {
                return Err(MachineError::Leaving(to));
            }
            if !shared.parts.members().contains(&to) {
                return Err(MachineError::NoPart(to));
            }
        }
        let thread = threads.table.get_mut(&tid);
        let thread = thread.ok_or(MachineError::NoThread(tid))?;
        if thread.place == to && thread.seat.is_none_or(|seat| seat == to) {
            return Ok(());
        }
        thread.place = to;
        thread.rebuild = true;
        let leaves = thread
            .seat
            .is_some_and(|seat| seat != PartId::HOME && seat != to);
        thread.inbox.set_leaves(leaves);
        let way = match to {
            PartId::HOME => None,
            _ => shared.parts.way(),
        };
        match way {
            // It goes on here until what it needs there is awake.
            Some(way) => {
                drop(threads);
                way.order(to, &Order::Expect { tid });
            }
            None => thread.signal.request(),
        }
        Ok(())
    }

    /// How a thread is asked to come to safepoints; of one that is away, its home's side.
    pub fn signal(&self, tid: u32) -> Option<Arc<Signal>> {
        let threads = locked(&self.shared.threads);
        threads.table.get(&tid).map(|thread| thread.signal.clone())
    }

    /// What each of its threads does.
    pub fn thread_infos(&self) -> Vec<ThreadInfo> {
        let way = self.shared.parts.way();
        let threads = locked(&self.shared.threads);
        let waits = locked(&self.shared.waits);
        let here_ns = u64::try_from(self.shared.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let infos = threads.table.iter().map(|(tid, thread)| {
            let part = thread.seat.unwrap_or(thread.place);
            ThreadInfo {
                tid: *tid,
                part,
                moves_to: (part != thread.place).then_some(thread.place),
                waits: waits.has(*tid),
                took: match part == PartId::HOME {
                    true => thread.clock.as_ref().and_then(|clock| {
                        let time = clock.took()?;
                        let stood = way.as_ref().map(|way| way.stood(clock.os_thread));
                        Some(Took {
                            at_ns: here_ns,
                            time,
                            stood: stood.unwrap_or_default(),
                        })
                    }),
                    false => self.shared.parts.taken(*tid, part),
                },
            }
        });
        infos.collect()
    }

    /// Asks all members what their threads took of cores; it is in [`Self::thread_infos`]
    /// when they have answered.
    pub fn ask_times(&self) {
        self.shared.parts.ask_times();
    }

    /// How many cores are free at each part: threads that it starts begin where most are
    /// ([`Spawning::Room`]).
    pub fn set_room(&self, room: BTreeMap<PartId, f64>) {
        self.shared.parts.set_room(room);
    }

    /// Nothing goes to these members any more, neither threads that it starts nor any that
    /// is moved; to all others it may.
    pub fn let_leave(&self, members: PartSet) {
        // (Who moves a thread holds this.)
        let _threads = locked(&self.shared.threads);
        self.shared.parts.let_leave(members);
    }

    /// Its threads, and the part at which each runs: one that moves is counted where it
    /// came from, until it has left.
    pub fn places(&self) -> BTreeMap<u32, PartId> {
        let threads = locked(&self.shared.threads);
        let places = threads.table.iter();
        places
            .map(|(tid, thread)| (*tid, thread.seat.unwrap_or(thread.place)))
            .collect()
    }

    /// Freezes it and moves every thread into a fresh instance, but those that
    /// [`Self::shake`] would leave alone: for testing.
    ///
    /// # Errors
    /// As [`Self::freeze`].
    pub fn shake_all(&self, patience: Duration) -> Result<(), MachineError> {
        self.freeze(patience)?;
        let image = self.image()?.encode()?;
        Image::decode(&image, &self.shared.program)?;
        for thread in locked(&self.shared.threads).table.values_mut() {
            let is_parked = thread.parked.as_ref().is_some_and(Option::is_some);
            thread.rebuild = is_parked && thread.rested();
        }
        self.thaw()
    }
}

impl Thread {
    fn rested(&self) -> bool {
        self.rests_until.is_none_or(|until| Instant::now() >= until)
    }
}

impl Threads {
    fn add(
        &mut self,
        tid: u32,
        entry: Entry,
        parked: Option<Option<ThreadState>>,
        place: PartId,
    ) -> std::io::Result<()> {
        let signal = Arc::new(Signal::new()?);
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
                rests_until: None,
                held: 0,
                clock: None,
            },
        );
        Ok(())
    }

    /// Threads that are not at a safepoint.
    fn running(&self) -> usize {
        self.table
            .values()
            .filter(|thread| thread.parked.is_none())
            .count()
    }
}

/// What a thread's code runs in.
enum Seat {
    /// An instance of this process.
    Here(Box<Fiber>),
    /// One of another part.
    Away(Box<Away>),
}

impl Seat {
    fn call(&mut self, export: &str, args: &[Value]) -> Result<Run, Stop> {
        match self {
            Seat::Here(fiber) => fiber.call(export, args),
            Seat::Away(away) => away.call(export, args),
        }
    }

    fn resume(&mut self) -> Result<Run, Stop> {
        match self {
            Seat::Here(fiber) => fiber.resume(),
            Seat::Away(away) => away.resume(),
        }
    }

    fn state(&mut self) -> Result<ThreadState, Stop> {
        match self {
            Seat::Here(fiber) => fiber.state(),
            Seat::Away(away) => Ok(away.state()),
        }
    }

    fn is_here(&self) -> bool {
        matches!(self, Seat::Here(_))
    }

    fn take_spare(&mut self) -> Option<Box<Fiber>> {
        match self {
            Seat::Here(_) => None,
            Seat::Away(away) => away.take_spare(),
        }
    }

    fn load(&mut self, state: ThreadState) -> Result<(), Stop> {
        match self {
            Seat::Here(fiber) => fiber.load(state),
            Seat::Away(away) => {
                away.load(state);
                Ok(())
            }
        }
    }
}

/// What a thread does after it came to a safepoint.
enum Next {
    GoOn,
    Rebuild,
    Leave,
}

impl Shared {
    /// Lets threads go on, and launches those that were spawned meanwhile; an
    /// error is that of one which could not be, the others run.
    fn go_on(self: &Arc<Self>, threads: &mut Threads) -> std::io::Result<()> {
        threads.phase = Phase::Running;
        for thread in threads.table.values_mut() {
            if !thread.rebuild && thread.held == 0 {
                thread.signal.clear();
            }
        }
        self.changed.notify_all();
        let spawned: Vec<u32> = threads
            .table
            .iter()
            .filter(|(_, thread)| !thread.launched)
            .map(|(tid, _)| *tid)
            .collect();
        let mut result = Ok(());
        for tid in spawned {
            if let Err(error) = self.launch(threads, tid) {
                result = Err(error);
            }
        }
        result
    }

    fn launch(self: &Arc<Self>, threads: &mut Threads, tid: u32) -> std::io::Result<()> {
        let Some(thread) = threads.table.get_mut(&tid) else {
            return Ok(());
        };
        let shared = self.clone();
        let (entry, signal) = (thread.entry, thread.signal.clone());
        std::thread::Builder::new()
            .name(format!("guest-{tid}"))
            .stack_size(STACK_BYTES + (1 << 20))
            .spawn(move || {
                lower_priority(&shared.program);
                shared.run(tid, entry, signal);
                let mut threads = locked(&shared.threads);
                threads.launched -= 1;
                shared.changed.notify_all();
            })?;
        thread.launched = true;
        threads.launched += 1;
        Ok(())
    }

    /// What a thread runs in: where it is to be now; `spare` if that is here.
    fn seat(
        self: &Arc<Self>,
        tid: u32,
        signal: &Arc<Signal>,
        spare: Option<Box<Fiber>>,
    ) -> Result<Seat, Stop> {
        let thread = HostThread {
            tid,
            signal: signal.clone(),
            memories: self.memories.clone(),
        };
        let host = Arc::new(self.clone());
        let program = self.program.clone();
        let away = {
            let mut threads = locked(&self.threads);
            let thread = threads.table.get_mut(&tid);
            thread.and_then(|thread| {
                thread.seat = Some(thread.place);
                thread.inbox.set_leaves(false);
                (thread.place != PartId::HOME).then(|| (thread.place, thread.inbox.clone()))
            })
        };
        if let (Some((part, inbox)), Some(way)) = (away, self.parts.way()) {
            let away = Away::new(part, way, program, host, thread, inbox);
            return Ok(Seat::Away(Box::new(away)));
        }
        if let Some(spare) = spare {
            return Ok(Seat::Here(spare));
        }
        let fiber = Fiber::new(program, host, thread).map_err(|error| {
            Stop::Trap(Trap {
                message: error.to_string(),
                backtrace: Vec::new(),
            })
        })?;
        Ok(Seat::Here(Box::new(fiber)))
    }

    /// A guest thread's whole life in this process.
    fn run(self: &Arc<Self>, tid: u32, entry: Entry, signal: Arc<Signal>) {
        match self.run_stages(tid, entry, &signal) {
            Ok(true) if tid == 0 => self.end(Outcome::Exit(0)),
            Ok(true) => {
                let mut threads = locked(&self.threads);
                threads.table.remove(&tid);
                locked(&self.names).forget(tid);
                self.changed.notify_all();
            }
            Ok(false) => {}
            Err(Stop::Exit(code)) => self.end(Outcome::Exit(code)),
            Err(Stop::Trap(trap)) => self.end(Outcome::Trap(trap)),
        }
    }

    /// True when all its functions returned, false when it is to disappear.
    fn run_stages(
        self: &Arc<Self>,
        tid: u32,
        entry: Entry,
        signal: &Arc<Signal>,
    ) -> Result<bool, Stop> {
        let mut stages = Vec::new();
        if self.program.meta.start.is_some() {
            stages.push((format!("{PREFIX}start"), Vec::new()));
        }
        stages.push(match entry {
            Entry::Main => (MAIN_EXPORT.to_owned(), Vec::new()),
            Entry::Spawned { arg } => (
                THREAD_EXPORT.to_owned(),
                vec![Value::I32(tid), Value::I32(arg)],
            ),
        });
        let mut fiber = self.seat(tid, signal, None)?;
        let mut stage = 0;
        if let Some(thread) = locked(&self.threads).table.get_mut(&tid) {
            thread.clock = ThreadClock::of_this_thread();
        }
        let state = locked(&self.threads)
            .table
            .get(&tid)
            .and_then(|thread| thread.parked.clone())
            .flatten();
        let mut run = match state {
            Some(state) => {
                stage = state.stage as usize;
                fiber.load(state.clone())?;
                loop {
                    match self.pause(tid, signal, None) {
                        Next::Leave => return Ok(false),
                        Next::GoOn => break,
                        // It is to begin elsewhere.
                        Next::Rebuild => {
                            fiber = self.seat(tid, signal, None)?;
                            fiber.load(state.clone())?;
                        }
                    }
                }
                fiber.resume()?
            }
            None => {
                loop {
                    match self.pause(tid, signal, None) {
                        Next::Leave => return Ok(false),
                        Next::GoOn => break,
                        Next::Rebuild => fiber = self.seat(tid, signal, None)?,
                    }
                }
                fiber.call(&stages[0].0, &stages[0].1)?
            }
        };
        loop {
            run = match run {
                Run::Finished(_) => {
                    stage += 1;
                    let Some((export, args)) = stages.get(stage) else {
                        return Ok(true);
                    };
                    fiber.call(export, args)?
                }
                Run::Captured => {
                    let mut state = fiber.state()?;
                    state.stage = stage as u32;
                    self.captures.fetch_add(1, Ordering::Relaxed);
                    match self.pause(tid, signal, Some(&state)) {
                        Next::Leave => return Ok(false),
                        Next::GoOn => {}
                        Next::Rebuild => {
                            let begun = Instant::now();
                            let was_here = fiber.is_here();
                            let spare = fiber.take_spare();
                            fiber = self.seat(tid, signal, spare)?;
                            if was_here && fiber.is_here() {
                                // As one that comes from elsewhere.
                                state = self.written_and_read(&state)?;
                            }
                            fiber.load(state)?;
                            if let Some(thread) = locked(&self.threads).table.get_mut(&tid) {
                                thread.rests_until = Some(Instant::now() + begun.elapsed());
                            }
                        }
                    }
                    fiber.resume()?
                }
            };
        }
    }

    fn written_and_read(&self, state: &ThreadState) -> Result<ThreadState, Stop> {
        let hash = self.program.hash();
        let read = ThreadState::decode(&state.encode(hash), hash, &self.program.meta);
        read.map_err(|error| {
            Stop::Trap(Trap {
                message: error.to_string(),
                backtrace: Vec::new(),
            })
        })
    }

    /// At a safepoint: waits while the machine is frozen.
    fn pause(&self, tid: u32, signal: &Signal, state: Option<&ThreadState>) -> Next {
        let mut threads = locked(&self.threads);
        loop {
            let phase = threads.phase;
            let Some(thread) = threads.table.get_mut(&tid) else {
                return Next::Leave;
            };
            match phase {
                Phase::Ended => return Next::Leave,
                Phase::Running if thread.held == 0 => {
                    thread.parked = None;
                    signal.clear();
                    return if std::mem::take(&mut thread.rebuild) {
                        Next::Rebuild
                    } else {
                        Next::GoOn
                    };
                }
                Phase::Running | Phase::Freezing | Phase::Frozen => {
                    if thread.parked.is_none() {
                        thread.parked = Some(state.cloned());
                        self.changed.notify_all();
                    }
                }
            }
            threads = self
                .changed
                .wait(threads)
                .unwrap_or_else(|error| error.into_inner());
        }
    }

    /// Ends all threads. The first reason counts.
    fn end(&self, outcome: Outcome) {
        let mut threads = locked(&self.threads);
        if threads.phase == Phase::Ended {
            return;
        }
        threads.phase = Phase::Ended;
        threads.outcome = Some(outcome);
        self.over.store(true, Ordering::Release);
        for thread in threads.table.values() {
            thread.signal.request();
        }
        self.changed.notify_all();
    }

    /// Where a new thread begins.
    fn place_for_new(&self, threads: &Threads) -> PartId {
        let mut counts = BTreeMap::new();
        for thread in threads.table.values() {
            *counts.entry(thread.place).or_insert(0) += 1;
        }
        self.parts.place_for_new(&counts)
    }

    pub(super) fn spawn(self: &Arc<Self>, arg: u32) -> i32 {
        let mut threads = locked(&self.threads);
        if threads.table.len() >= self.threads_max as usize || threads.phase == Phase::Ended {
            return -1;
        }
        let mut tid = threads.next_tid;
        while threads.table.contains_key(&tid) || tid == 0 || tid > TID_MAX {
            tid = if tid >= TID_MAX { 1 } else { tid + 1 };
        }
        threads.next_tid = tid + 1;
        // While the machine is being frozen it stays an entry that has not
        // begun; thawing launches it.
        let frozen = threads.phase != Phase::Running;
        let place = self.place_for_new(&threads);
        let entry = Entry::Spawned { arg };
        let added = threads.add(tid, entry, frozen.then_some(None), place);
        let launched = added.and_then(|()| {
            if frozen {
                Ok(())
            } else {
                self.launch(&mut threads, tid)
            }
        });
        match launched {
            Ok(()) => tid as i32,
            Err(error) => {
                tracing::warn!(%error, tid, "no OS thread for a guest thread");
                threads.table.remove(&tid);
                -1
            }
        }
    }
}
