//! The life cycle of a thread: launched, run stage by stage, parked at safepoints, rebuilt in
//! another instance, and ended; and the end of the machine caused by one of its threads.

use super::super::cpu_usage::ThreadClock;
use super::super::fiber::{Fiber, Run, Stop, Trap};
use super::super::frame::{ThreadState, Value};
use super::super::host::HostThread;
use super::super::image::Entry;
use super::super::lock::locked;
use super::super::parts::RemoteThread;
use super::super::program::{STACK_BYTES, lower_priority};
use super::super::signal::Signal;
use super::super::tables::TableShare;
use super::{MAIN_EXPORT, Outcome, Phase, Shared, Threads};
use crate::coherence::PartId;
use crate::instrument::meta::PREFIX;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// The entry point of a thread (wasi-threads).
const THREAD_EXPORT: &str = "wasi_thread_start";
/// Largest thread ID that wasi-threads allows.
const TID_MAX: u32 = (1 << 29) - 1;

/// Executor of a thread's code.
enum Executor {
    Local(Box<Fiber>),
    Remote(Box<RemoteThread>),
}

impl Executor {
    fn call(&mut self, export: &str, args: &[Value]) -> Result<Run, Stop> {
        match self {
            Executor::Local(fiber) => fiber.call(export, args),
            Executor::Remote(away) => away.call(export, args),
        }
    }

    fn resume(&mut self) -> Result<Run, Stop> {
        match self {
            Executor::Local(fiber) => fiber.resume(),
            Executor::Remote(away) => away.resume(),
        }
    }

    fn state(&mut self) -> Result<ThreadState, Stop> {
        match self {
            Executor::Local(fiber) => fiber.state(),
            Executor::Remote(away) => Ok(away.state()),
        }
    }

    fn retire(&mut self) {
        if let Executor::Local(fiber) = self {
            fiber.retire();
        }
    }

    fn is_here(&self) -> bool {
        matches!(self, Executor::Local(_))
    }

    fn take_spare(&mut self) -> Option<Box<Fiber>> {
        match self {
            Executor::Local(_) => None,
            Executor::Remote(away) => away.take_spare(),
        }
    }

    fn load(&mut self, state: ThreadState) -> Result<(), Stop> {
        match self {
            Executor::Local(fiber) => fiber.load(state),
            Executor::Remote(away) => {
                away.load(state);
                Ok(())
            }
        }
    }
}

/// Next step of a thread after a safepoint.
enum Next {
    GoOn,
    Rebuild,
    Leave,
}

impl Shared {
    /// Resumes threads, and launches those spawned meanwhile; an error belongs to one that could
    /// not be launched, the others run.
    pub(super) fn resume_threads(self: &Arc<Self>, threads: &mut Threads) -> std::io::Result<()> {
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

    pub(super) fn launch(self: &Arc<Self>, threads: &mut Threads, tid: u32) -> std::io::Result<()> {
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

    /// The executor of a thread at its assigned part; `spare` is used if that is local.
    fn executor(
        self: &Arc<Self>,
        tid: u32,
        signal: &Arc<Signal>,
        spare: Option<Box<Fiber>>,
    ) -> Result<Executor, Stop> {
        let thread = HostThread {
            tid,
            signal: signal.clone(),
            memories: self.memories.clone(),
            tables: self.tables.clone(),
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
        if let (Some((part, inbox)), Some(link)) = (away, self.parts.link()) {
            let away = RemoteThread::new(part, link, program, host, thread, inbox);
            return Ok(Executor::Remote(Box::new(away)));
        }
        if let Some(spare) = spare {
            return Ok(Executor::Local(spare));
        }
        let fiber = Fiber::new(program, host, thread).map_err(|error| {
            Stop::Trap(Trap {
                message: error.to_string(),
                backtrace: Vec::new(),
            })
        })?;
        Ok(Executor::Local(Box::new(fiber)))
    }

    /// Runs a guest thread from launch to end in this process.
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

    /// True when all its entry functions returned, false when the thread disappears.
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
        let mut fiber = self.executor(tid, signal, None)?;
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
                    match self.wait_while_frozen(tid, signal, None) {
                        Next::Leave => return Ok(false),
                        Next::GoOn => break,
                        // It starts at another part.
                        Next::Rebuild => {
                            fiber = self.executor(tid, signal, None)?;
                            fiber.load(state.clone())?;
                        }
                    }
                }
                fiber.resume()?
            }
            None => {
                loop {
                    match self.wait_while_frozen(tid, signal, None) {
                        Next::Leave => return Ok(false),
                        Next::GoOn => break,
                        Next::Rebuild => fiber = self.executor(tid, signal, None)?,
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
                    match self.wait_while_frozen(tid, signal, Some(&state)) {
                        Next::Leave => return Ok(false),
                        Next::GoOn => {}
                        Next::Rebuild => {
                            let begun = Instant::now();
                            let was_here = fiber.is_here();
                            let spare = fiber.take_spare();
                            fiber.retire();
                            fiber = self.executor(tid, signal, spare)?;
                            if was_here && fiber.is_here() {
                                // As for a thread from another host.
                                state = self.serialize_roundtrip(&state)?;
                            }
                            fiber.load(state)?;
                            if let Some(thread) = locked(&self.threads).table.get_mut(&tid) {
                                thread.recapture_after = Some(Instant::now() + begun.elapsed());
                            }
                        }
                    }
                    fiber.resume()?
                }
            };
        }
    }

    fn serialize_roundtrip(&self, state: &ThreadState) -> Result<ThreadState, Stop> {
        let hash = self.program.hash();
        let read = ThreadState::decode(&state.encode(hash), hash, &self.program.meta);
        read.map_err(|error| {
            Stop::Trap(Trap {
                message: error.to_string(),
                backtrace: Vec::new(),
            })
        })
    }

    /// At a safepoint: waits while the machine is frozen or the thread is held.
    fn wait_while_frozen(&self, tid: u32, signal: &Signal, state: Option<&ThreadState>) -> Next {
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

    /// Ends all threads. The first outcome wins.
    pub(super) fn end(&self, outcome: Outcome) {
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

    fn placement_for_new(&self, threads: &Threads) -> PartId {
        let mut counts = BTreeMap::new();
        for thread in threads.table.values() {
            *counts.entry(thread.place).or_insert(0) += 1;
        }
        self.parts.placement_for_new(&counts)
    }

    pub(in crate::runtime) fn spawn(self: &Arc<Self>, arg: u32) -> i32 {
        let mut threads = locked(&self.threads);
        if threads.table.len() >= self.threads_max as usize || threads.phase == Phase::Ended {
            return -1;
        }
        let mut tables = TableShare::new(self.tables.clone());
        if !tables.try_take(self.program.table_entries) {
            tracing::warn!("no table entries left for another guest thread");
            return -1;
        }
        let mut tid = threads.next_tid;
        while threads.table.contains_key(&tid) || tid == 0 || tid > TID_MAX {
            tid = if tid >= TID_MAX { 1 } else { tid + 1 };
        }
        threads.next_tid = tid + 1;
        // During a freeze the new thread stays an entry that has not started; thawing launches it.
        let frozen = threads.phase != Phase::Running;
        let place = self.placement_for_new(&threads);
        let entry = Entry::Spawned { arg };
        let added = threads.add(tid, entry, frozen.then_some(None), place, tables);
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
