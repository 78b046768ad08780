//! A member part: runs the threads that its home assigns, each in an instance and an OS thread of
//! its own; of the rest of the machine it only has pages.

use super::message::{Answer, Call, Entering, Order, Report};
use crate::coherence::PartId;
use crate::memory::GuestMemory;
use crate::runtime::cpu_usage::ThreadClock;
use crate::runtime::fiber::{Fiber, Run, Stop, Trap};
use crate::runtime::frame::{Progress, ThreadState};
use crate::runtime::host::{Host, HostOutcome, HostThread, ImportKind};
use crate::runtime::lock::locked;
use crate::runtime::program::{Program, STACK_BYTES, lower_priority};
use crate::runtime::signal::Signal;
use crate::runtime::tables::TableBudget;
use keel_wasi::{CausalClock, Function, SystemClock};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

/// Maximum number of threads of a member: that of a machine.
const THREADS_MAX: usize = 1 << 16;
/// Idle OS threads with fresh instances for arriving threads: creating both takes longer than all
/// other steps of a move.
const SPARE_THREADS: usize = 2;
/// Maximum number of idle OS threads kept after their guest threads left.
const SPARE_THREADS_MAX: usize = 8;

/// `clockid::monotonic` of WASI preview 1.
const MONOTONIC: u64 = 1;
/// Spin time of an OS thread that expects a guest thread.
const REQUEST_SPIN: Duration = Duration::from_micros(500);

/// A pending request of the home concerning one thread.
enum HomeRequest {
    /// A thread arrives soon, possibly in this OS thread.
    Expect(u32),
    Run(u32, Entering),
    Answer(Answer),
    Leave,
}

/// An OS thread that hosts guest threads.
struct HostedThread {
    signal: Arc<Signal>,
    requests: Mutex<VecDeque<HomeRequest>>,
    changed: Condvar,
    /// Whether the guest thread leaves when it is captured.
    leaves: AtomicBool,
    /// Set by the OS thread itself.
    clock: OnceLock<ThreadClock>,
}

impl HostedThread {
    fn put(&self, wish: HomeRequest) {
        locked(&self.requests).push_back(wish);
        self.changed.notify_all();
    }

    /// Spins for the next request, which is expected soon: waking the thread would take longer than
    /// the wait.
    fn spin_for_request(&self, over: &AtomicBool) {
        let begun = Instant::now();
        while begun.elapsed() < REQUEST_SPIN
            && !over.load(Ordering::Acquire)
            && locked(&self.requests).is_empty()
        {
            std::thread::yield_now();
        }
    }

    /// The next request; `None` when the machine has ended.
    fn next(&self, over: &AtomicBool) -> Option<HomeRequest> {
        let mut requests = locked(&self.requests);
        loop {
            if over.load(Ordering::Acquire) {
                return None;
            }
            match requests.pop_front() {
                Some(wish) => return Some(wish),
                None => {
                    requests = self
                        .changed
                        .wait(requests)
                        .unwrap_or_else(|error| error.into_inner());
                }
            }
        }
    }
}

/// Transport from a member to its home, and page fault statistics.
pub trait HomeLink: Send + Sync {
    /// Sends a report to the home without waiting.
    fn report(&self, report: Report);

    /// As [`super::Members::stalled_us`].
    fn stalled_us(&self, os_thread: u32) -> BTreeMap<PartId, u64>;
}

struct Shared {
    program: Arc<Program>,
    memories: Arc<[Arc<GuestMemory>]>,
    tables: Arc<TableBudget>,
    home: Box<dyn HomeLink>,
    hosted: Mutex<BTreeMap<u32, Arc<HostedThread>>>,
    /// All OS threads ever started.
    all: Mutex<Vec<Weak<HostedThread>>>,
    /// OS threads without a guest thread, with a fresh instance.
    idle: Mutex<Vec<Arc<HostedThread>>>,
    /// Number of live OS threads.
    launched: Mutex<usize>,
    left: Condvar,
    over: AtomicBool,
    begun: Instant,
    clock: CausalClock,
}

/// A part other than the home.
#[derive(Clone)]
pub struct Member(Arc<Shared>);

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member").finish_non_exhaustive()
    }
}

/// Forwards host calls of its threads to the home.
struct Calls(Arc<Shared>, Arc<HostedThread>);

impl Host for Calls {
    fn call(
        &self,
        import: u32,
        args: &[u64],
        progress: &mut Progress,
        thread: &HostThread,
    ) -> HostOutcome {
        let function = match self.0.program.kinds.get(import as usize) {
            // No other thread can observe it.
            Some(ImportKind::Wasi(Function::SchedYield)) => {
                std::thread::yield_now();
                return HostOutcome::Done(vec![0]);
            }
            Some(ImportKind::Wasi(function)) => Some(*function),
            _ => None,
        };
        if function == Some(Function::ClockTimeGet)
            && let Some(done) = self.read_clock(args, thread)
        {
            return done;
        }
        let cells = thread.memories.first();
        let cells = cells.map_or(&[][..], |memory| memory.cells());
        let mut memory = wiggle::GuestMemory::Shared(cells);
        let packed = function.and_then(|function| keel_wasi::pack(function, args, &memory));
        let (call, targets) = match packed {
            Some((packed, targets)) => (Call::Packed(packed), Some(targets)),
            None => (Call::Bare(args.to_vec()), None),
        };
        self.0.home.report(Report::Call {
            tid: thread.tid,
            import,
            call,
            progress: std::mem::take(progress),
        });
        let answer = loop {
            match self.1.next(&self.0.over) {
                Some(HomeRequest::Expect(tid)) => self.0.home.report(Report::Expecting { tid }),
                answer => break answer,
            }
        };
        match answer {
            Some(HomeRequest::Answer(Answer::Done { results, output })) => {
                let filled = match targets {
                    Some(targets) => targets.fill(&output, &mut memory),
                    None => Ok(()),
                };
                match filled {
                    Ok(()) => HostOutcome::Done(results),
                    Err(what) => HostOutcome::Trap(what),
                }
            }
            Some(HomeRequest::Answer(Answer::Interrupted(rest))) => {
                *progress = rest;
                HostOutcome::Interrupted
            }
            Some(HomeRequest::Answer(Answer::Exit(code))) => HostOutcome::Exit(code),
            Some(HomeRequest::Answer(Answer::Trap(message))) => HostOutcome::Trap(message),
            Some(HomeRequest::Leave) => {
                // The thread leaves after it has left guest code.
                locked(&self.1.requests).push_front(HomeRequest::Leave);
                HostOutcome::Trap("the machine's home has given the thread up".into())
            }
            Some(HomeRequest::Run(..) | HomeRequest::Expect(_)) => {
                HostOutcome::Trap("the machine's home does not answer what it is asked".into())
            }
            None => HostOutcome::Trap("the machine has ended".into()),
        }
    }
}

impl Calls {
    /// Reads the monotonic clock locally; `None` for other clocks or on errors, which the home
    /// reports.
    fn read_clock(&self, args: &[u64], thread: &HostThread) -> Option<HostOutcome> {
        let [MONOTONIC, _precision, at] = args else {
            return None;
        };
        let memory = thread.memories.first()?;
        let is_resident = at.is_multiple_of(8) && at.checked_add(8)? <= memory.size_bytes();
        let now = self.0.clock.reading().filter(|_| is_resident)?;
        let mut memory = wiggle::GuestMemory::Shared(memory.cells());
        let at = wiggle::GuestPtr::<u64>::new(u32::try_from(*at).ok()?);
        memory.write(at, now).ok()?;
        Some(HostOutcome::Done(vec![0]))
    }
}

impl Member {
    /// A member without threads. Its memories are as large as the home's. Orders of the home are
    /// passed to [`Self::receive`].
    pub fn new(
        program: Arc<Program>,
        memories: Arc<[Arc<GuestMemory>]>,
        home: Box<dyn HomeLink>,
    ) -> Self {
        let member = Member(Arc::new(Shared {
            program,
            memories,
            tables: Arc::default(),
            home,
            hosted: Mutex::default(),
            all: Mutex::default(),
            idle: Mutex::default(),
            launched: Mutex::default(),
            left: Condvar::new(),
            over: AtomicBool::new(false),
            begun: Instant::now(),
            clock: CausalClock::new(SystemClock),
        }));
        for _ in 0..SPARE_THREADS {
            // (If OS threads are exhausted, the first arriving guest thread reports it.)
            if let Ok(hosted_thread) = member.launch() {
                locked(&member.0.idle).push(hosted_thread);
            }
        }
        member
    }

    /// The guest's monotonic clock at this part.
    pub fn clock(&self) -> &CausalClock {
        &self.0.clock
    }

    pub fn memories(&self) -> &Arc<[Arc<GuestMemory>]> {
        &self.0.memories
    }

    pub fn threads(&self) -> Vec<u32> {
        locked(&self.0.hosted).keys().copied().collect()
    }

    /// Handles an order of the home without waiting for its effects.
    pub fn receive(&self, order: Order) {
        let shared = &self.0;
        match order {
            Order::Run { tid, entering } => match self.hosted_thread(tid) {
                Ok(hosted_thread) => {
                    // It is captured; earlier requests are void.
                    hosted_thread.signal.clear();
                    hosted_thread.leaves.store(false, Ordering::Release);
                    hosted_thread.put(HomeRequest::Run(tid, entering));
                }
                Err(error) => shared.home.report(Report::Stopped {
                    tid,
                    stop: trap(format!("no OS thread for a guest thread: {error}")),
                }),
            },
            Order::Expect { tid } => {
                // (The next one to be taken.)
                let next = locked(&shared.idle).last().cloned();
                match next {
                    Some(hosted_thread) => hosted_thread.put(HomeRequest::Expect(tid)),
                    None => shared.home.report(Report::Expecting { tid }),
                }
            }
            Order::Interrupt { tid, leaves } => {
                if let Some(hosted_thread) = locked(&shared.hosted).get(&tid) {
                    hosted_thread.leaves.store(leaves, Ordering::Release);
                    hosted_thread.signal.request();
                }
            }
            Order::Answer { tid, answer } => {
                if let Some(hosted_thread) = locked(&shared.hosted).get(&tid) {
                    hosted_thread.put(HomeRequest::Answer(answer));
                }
            }
            Order::Leave { tid } => {
                if let Some(hosted_thread) = locked(&shared.hosted).remove(&tid) {
                    // (It is captured, or no report of it is expected.)
                    hosted_thread.signal.request();
                    hosted_thread.put(HomeRequest::Leave);
                }
            }
            Order::Open { memory, bytes } => {
                let grown = shared
                    .memories
                    .get(memory as usize)
                    .map(|it| it.open_to(bytes));
                let done = match grown {
                    Some(Ok(())) => true,
                    Some(Err(error)) => {
                        tracing::warn!(%error, memory, bytes, "guest memory cannot grow");
                        false
                    }
                    None => false,
                };
                shared.home.report(Report::Opened {
                    memory,
                    bytes,
                    done,
                });
            }
            Order::Times => {
                let hosted = locked(&shared.hosted);
                let threads = hosted.iter().filter_map(|(tid, hosted_thread)| {
                    let clock = hosted_thread.clock.get()?;
                    let stalled_us = shared.home.stalled_us(clock.os_thread);
                    Some((*tid, clock.cpu_time()?, stalled_us))
                });
                let threads = threads.collect();
                drop(hosted);
                let at_ns = shared.begun.elapsed().as_nanos();
                let at_ns = u64::try_from(at_ns).unwrap_or(u64::MAX);
                shared.home.report(Report::Times { at_ns, threads });
            }
            Order::End => self.end(),
        }
    }

    /// Ends the member: each thread leaves at its next safepoint, and host calls have no effect.
    pub fn end(&self) {
        self.0.over.store(true, Ordering::Release);
        let all: Vec<_> = locked(&self.0.all)
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for hosted_thread in &all {
            hosted_thread.signal.request();
            let _waiting = locked(&hosted_thread.requests);
            hosted_thread.changed.notify_all();
        }
    }

    /// Waits until all threads have ended.
    pub fn wait(&self) {
        let mut launched = locked(&self.0.launched);
        while !self.0.over.load(Ordering::Acquire) || *launched > 0 {
            launched = self
                .0
                .left
                .wait_timeout(launched, std::time::Duration::from_millis(100))
                .unwrap_or_else(|error| error.into_inner())
                .0;
        }
    }

    fn hosted_thread(&self, tid: u32) -> std::io::Result<Arc<HostedThread>> {
        let mut hosted = locked(&self.0.hosted);
        if let Some(hosted_thread) = hosted.get(&tid) {
            return Ok(hosted_thread.clone());
        }
        if hosted.len() >= THREADS_MAX {
            return Err(std::io::Error::other("too many threads"));
        }
        let warm = locked(&self.0.idle).pop();
        let hosted_thread = match warm {
            Some(hosted_thread) => hosted_thread,
            None => self.launch()?,
        };
        hosted.insert(tid, hosted_thread.clone());
        Ok(hosted_thread)
    }

    fn launch(&self) -> std::io::Result<Arc<HostedThread>> {
        let hosted_thread = Arc::new(HostedThread {
            signal: Arc::new(Signal::new()?),
            requests: Mutex::default(),
            changed: Condvar::new(),
            leaves: AtomicBool::new(false),
            clock: OnceLock::new(),
        });
        let (shared, guest) = (self.0.clone(), hosted_thread.clone());
        *locked(&self.0.launched) += 1;
        let spawned = std::thread::Builder::new()
            // (Same naming scheme as at homes: the node's accounting relies on it.)
            .name("guest-away".into())
            .stack_size(STACK_BYTES + (1 << 20))
            .spawn(move || {
                lower_priority(&shared.program);
                if let Some(clock) = ThreadClock::of_this_thread() {
                    // (Set only here.)
                    let _ = guest.clock.set(clock);
                }
                shared.serve(&guest);
                shared.gone();
            });
        match spawned {
            Ok(_) => {
                let mut all = locked(&self.0.all);
                all.retain(|hosted_thread| hosted_thread.strong_count() > 0);
                all.push(Arc::downgrade(&hosted_thread));
                Ok(hosted_thread)
            }
            Err(error) => {
                self.0.gone();
                Err(error)
            }
        }
    }

    /// The signal of a thread at this member.
    pub fn signal(&self, tid: u32) -> Option<Arc<Signal>> {
        let hosted = locked(&self.0.hosted);
        hosted
            .get(&tid)
            .map(|hosted_thread| hosted_thread.signal.clone())
    }
}

impl Shared {
    fn gone(&self) {
        *locked(&self.launched) -= 1;
        self.left.notify_all();
    }

    /// Hosts guest threads, one after the other.
    fn serve(self: &Arc<Self>, hosted_thread: &Arc<HostedThread>) {
        let mut fiber = None;
        loop {
            if fiber.is_none() {
                // An arriving thread finds the instance ready, or reports the error.
                fiber = self.fiber(0, hosted_thread).ok();
            }
            let (tid, entering) = match hosted_thread.next(&self.over) {
                Some(HomeRequest::Run(tid, entering)) => (tid, entering),
                Some(HomeRequest::Expect(tid)) => {
                    self.home.report(Report::Expecting { tid });
                    hosted_thread.spin_for_request(&self.over);
                    continue;
                }
                Some(HomeRequest::Answer(_)) => continue,
                None => return,
                Some(HomeRequest::Leave) => {
                    if !self.rest(hosted_thread, &mut fiber) {
                        return;
                    }
                    continue;
                }
            };
            let mut report = match self.run(tid, hosted_thread, &mut fiber, entering) {
                Ok(report) => report,
                Err(stop) => Report::Stopped { tid, stop },
            };
            let mut leaves = false;
            if let Report::Captured { has_left, .. } = &mut report {
                leaves = hosted_thread.leaves.swap(false, Ordering::AcqRel);
                *has_left = leaves;
            }
            if leaves {
                // Before the report: it may return immediately.
                locked(&self.hosted).remove(&tid);
            }
            self.home.report(report);
            if leaves && !self.rest(hosted_thread, &mut fiber) {
                return;
            }
        }
    }

    /// Waits for another guest thread, with a fresh instance; false if enough OS threads are idle.
    fn rest(
        self: &Arc<Self>,
        hosted_thread: &Arc<HostedThread>,
        fiber: &mut Option<Fiber>,
    ) -> bool {
        *fiber = self.fiber(0, hosted_thread).ok();
        hosted_thread.signal.clear();
        let mut idle = locked(&self.idle);
        let is_wanted = idle.len() < SPARE_THREADS_MAX;
        if is_wanted {
            idle.push(hosted_thread.clone());
        }
        is_wanted
    }

    fn run(
        self: &Arc<Self>,
        tid: u32,
        hosted_thread: &Arc<HostedThread>,
        fiber: &mut Option<Fiber>,
        entering: Entering,
    ) -> Result<Report, Stop> {
        let hash = self.program.hash();
        // A state is loaded into an instance without executed code.
        let is_fresh = fiber.as_ref().is_some_and(Fiber::is_fresh);
        if matches!(entering, Entering::Resume { state: Some(_) }) && !is_fresh {
            *fiber = None;
        }
        let fiber = match fiber {
            Some(fiber) => fiber,
            none => none.insert(self.fiber(tid, hosted_thread)?),
        };
        fiber.give_to(tid);
        let run = match entering {
            Entering::Call { export, args } => fiber.call(&export, &args)?,
            Entering::Resume { state } => {
                if let Some(state) = state {
                    let state = ThreadState::decode(&state, hash, &self.program.meta);
                    fiber.load(state.map_err(|error| trap(error.to_string()))?)?;
                }
                fiber.resume()?
            }
        };
        Ok(match run {
            Run::Finished(values) => Report::Finished { tid, values },
            Run::Captured => Report::Captured {
                tid,
                has_left: false,
                state: fiber.state()?.encode(hash),
            },
        })
    }

    fn fiber(self: &Arc<Self>, tid: u32, hosted_thread: &Arc<HostedThread>) -> Result<Fiber, Stop> {
        let thread = HostThread {
            tid,
            signal: hosted_thread.signal.clone(),
            memories: self.memories.clone(),
            tables: self.tables.clone(),
        };
        let host = Calls(self.clone(), hosted_thread.clone());
        Fiber::new(self.program.clone(), Arc::new(host), thread)
            .map_err(|error| trap(error.to_string()))
    }
}

fn trap(message: String) -> Stop {
    Stop::Trap(Trap {
        message,
        backtrace: Vec::new(),
    })
}
