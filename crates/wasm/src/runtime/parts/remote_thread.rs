//! The home's proxy of a thread that runs at a member.

use super::Members;
use super::SpawnPolicy;
use super::message::{Answer, Call, Entering, Order, Report};
use crate::coherence::{PartId, PartSet};
use crate::runtime::cpu_usage::{CoreTime, CpuUsage};
use crate::runtime::fiber::{Fiber, Run, Stop, Trap};
use crate::runtime::frame::{ThreadState, Value};
use crate::runtime::host::{Host, HostOutcome, HostThread};
use crate::runtime::lock::locked;
use crate::runtime::program::Program;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Queue of a member's reports about one thread.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    inner: Mutex<InboxInner>,
    /// Whether it leaves its part when it is captured.
    leaves: AtomicBool,
}

#[derive(Debug, Default)]
struct InboxInner {
    reports: VecDeque<(PartId, Report)>,
    closed: bool,
}

impl Inbox {
    pub(crate) fn put(&self, from: PartId, report: Report) {
        locked(&self.inner).reports.push_back((from, report));
    }

    /// No further report arrives.
    pub(crate) fn close(&self) {
        locked(&self.inner).closed = true;
    }

    /// Sets whether the thread leaves its part.
    pub(crate) fn set_leaves(&self, leaves: bool) {
        self.leaves.store(leaves, Ordering::Release);
    }

    fn take(&self) -> Option<(PartId, Report)> {
        locked(&self.inner).reports.pop_front()
    }

    fn has_some(&self) -> bool {
        let inner = locked(&self.inner);
        inner.closed || !inner.reports.is_empty()
    }

    fn is_over(&self) -> bool {
        let inner = locked(&self.inner);
        inner.closed && inner.reports.is_empty()
    }
}

#[derive(Default)]
pub(crate) struct Parts {
    /// Serialises growth of memories.
    growth_lock: Mutex<()>,
    inner: Mutex<PartsInner>,
    changed: Condvar,
    /// Whether it has members; changes only while the machine is frozen.
    spans: AtomicBool,
}

#[derive(Default)]
struct PartsInner {
    /// `None` without members.
    link: Option<Arc<dyn Members>>,
    members: Vec<PartId>,
    spawning: SpawnPolicy,
    /// Free cores per part, less the demand of threads started there since the report.
    free_cores: BTreeMap<PartId, f64>,
    /// CPU usage of threads at their parts, with the time of measurement.
    cpu_usage: BTreeMap<u32, (PartId, CpuUsage)>,
    /// Time since which a member has not answered a request for times.
    times_requested: BTreeMap<PartId, Instant>,
    /// Growth in progress: memory and bytes.
    growing: Option<(u32, u64)>,
    /// Results of the growth, by part.
    grown: BTreeMap<PartId, bool>,
    /// Parts that receive no more threads.
    leaving: PartSet,
    lost: bool,
}

impl Parts {
    /// Sets the members, or none.
    pub(crate) fn set(
        &self,
        members: Vec<PartId>,
        link: Option<Arc<dyn Members>>,
        spawning: SpawnPolicy,
    ) {
        let mut inner = locked(&self.inner);
        let all: PartSet = members.iter().copied().collect();
        let leaving = inner.leaving.iter().filter(|part| all.contains(*part));
        inner.leaving = leaving.collect();
        inner.members = members;
        inner.spawning = spawning;
        inner.free_cores.clear();
        inner.cpu_usage.clear();
        inner.times_requested.clear();
        // (A member may have been lost before this call.)
        inner.lost &= link.is_some();
        self.spans.store(link.is_some(), Ordering::Release);
        inner.link = link;
        self.changed.notify_all();
    }

    /// Whether all of its memory is local, for the duration of a host call.
    pub(crate) fn is_alone(&self) -> bool {
        !self.spans.load(Ordering::Acquire)
    }

    pub(crate) fn members(&self) -> Vec<PartId> {
        locked(&self.inner).members.clone()
    }

    /// Sets the leaving parts, which receive no more threads; replaces the previous set.
    pub(crate) fn drain(&self, parts: PartSet) {
        locked(&self.inner).leaving = parts;
    }

    pub(crate) fn is_leaving(&self, part: PartId) -> bool {
        locked(&self.inner).leaving.contains(part)
    }

    /// The part for a new thread, given the number of threads per part; ties go to the home.
    pub(crate) fn placement_for_new(&self, counts: &BTreeMap<PartId, usize>) -> PartId {
        let mut inner = locked(&self.inner);
        let spawning = match inner.link {
            Some(_) => inner.spawning,
            None => SpawnPolicy::Here,
        };
        let stays = |part: &PartId| !inner.leaving.contains(*part);
        let parts: Vec<PartId> = std::iter::once(PartId::HOME)
            .chain(inner.members.iter().copied().filter(stays))
            .collect();
        let count = |part: &PartId| counts.get(part).copied().unwrap_or(0);
        let fewest = || {
            parts
                .iter()
                .copied()
                .min_by_key(|part| (count(part), *part))
        };
        let place = match spawning {
            SpawnPolicy::Here => None,
            SpawnPolicy::Room if !inner.free_cores.is_empty() => {
                let free_cores =
                    |part: &PartId| inner.free_cores.get(part).copied().unwrap_or(f64::MIN);
                let most = parts.iter().copied().max_by(|one, other| {
                    let by_room = free_cores(one).total_cmp(&free_cores(other));
                    by_room.then(other.cmp(one))
                });
                if let Some(free_cores) = most.and_then(|part| inner.free_cores.get_mut(&part)) {
                    *free_cores -= 1.0;
                }
                most
            }
            SpawnPolicy::Even | SpawnPolicy::Room => fewest(),
        };
        place.unwrap_or(PartId::HOME)
    }

    /// Sets the free cores per part.
    pub(crate) fn set_free_cores(&self, free_cores: BTreeMap<PartId, f64>) {
        locked(&self.inner).free_cores = free_cores;
    }

    /// Records a part's report of CPU times.
    pub(crate) fn record_cpu_times(
        &self,
        part: PartId,
        at_ns: u64,
        threads: Vec<(u32, CoreTime, BTreeMap<PartId, u64>)>,
    ) {
        let mut inner = locked(&self.inner);
        inner.times_requested.remove(&part);
        inner.cpu_usage.retain(|_, (from, _)| *from != part);
        let usage = threads.into_iter().map(|(tid, time, stalled_us)| {
            let usage = CpuUsage {
                at_ns,
                time,
                stalled_us,
            };
            (tid, (part, usage))
        });
        inner.cpu_usage.extend(usage);
    }

    /// Last known CPU usage of a thread at a part.
    pub(crate) fn cpu_usage(&self, tid: u32, part: PartId) -> Option<CpuUsage> {
        let inner = locked(&self.inner);
        let (from, usage) = inner.cpu_usage.get(&tid)?;
        (*from == part).then(|| usage.clone())
    }

    /// Requests CPU times from all members; the reports arrive asynchronously.
    pub(crate) fn request_cpu_times(&self) {
        let mut inner = locked(&self.inner);
        let (link, members) = (inner.link.clone(), inner.members.clone());
        if link.is_some() {
            for part in &members {
                inner
                    .times_requested
                    .entry(*part)
                    .or_insert_with(Instant::now);
            }
        }
        drop(inner);
        for part in members {
            if let Some(link) = &link {
                link.order(part, &Order::Times);
            }
        }
    }

    /// Time for which members have not answered.
    pub(crate) fn unresponsive(&self) -> BTreeMap<PartId, Duration> {
        let inner = locked(&self.inner);
        let members = inner.members.iter();
        let asked =
            members.filter_map(|part| Some((*part, inner.times_requested.get(part)?.elapsed())));
        asked.collect()
    }

    pub(crate) fn link(&self) -> Option<Arc<dyn Members>> {
        locked(&self.inner).link.clone()
    }

    /// The members are lost: pending waits end.
    pub(crate) fn part_lost(&self) {
        locked(&self.inner).lost = true;
        self.changed.notify_all();
    }

    /// Grows a memory at all members; false if one of them cannot.
    pub(crate) fn open(&self, memory: u32, bytes: u64) -> bool {
        let _alone = locked(&self.growth_lock);
        let mut inner = locked(&self.inner);
        let (Some(link), members) = (inner.link.clone(), inner.members.clone()) else {
            return true;
        };
        inner.grown.clear();
        inner.growing = Some((memory, bytes));
        drop(inner);
        for part in &members {
            link.order(*part, &Order::Open { memory, bytes });
        }
        let mut inner = locked(&self.inner);
        while !inner.lost && inner.grown.len() < members.len() {
            inner = self
                .changed
                .wait(inner)
                .unwrap_or_else(|error| error.into_inner());
        }
        !inner.lost && inner.grown.values().all(|done| *done)
    }

    pub(crate) fn grown(&self, part: PartId, what: (u32, u64), done: bool) {
        let mut inner = locked(&self.inner);
        if inner.growing == Some(what) {
            inner.grown.insert(part, done);
        }
        self.changed.notify_all();
    }
}

/// The proxy of a thread at a member: the counterpart of [`crate::runtime::Fiber`] for local
/// threads.
pub(crate) struct RemoteThread {
    part: PartId,
    link: Arc<dyn Members>,
    program: Arc<Program>,
    host: Arc<dyn Host>,
    thread: HostThread,
    inbox: Arc<Inbox>,
    /// Its state while it is at a safepoint.
    state: ThreadState,
    /// Whether the member has it in an instance.
    is_resident: bool,
    /// Whether the member has dropped its state.
    has_left: bool,
    /// A fresh instance for its return, created while it runs remotely.
    spare: Option<Box<Fiber>>,
}

impl RemoteThread {
    pub(crate) fn new(
        part: PartId,
        link: Arc<dyn Members>,
        program: Arc<Program>,
        host: Arc<dyn Host>,
        thread: HostThread,
        inbox: Arc<Inbox>,
    ) -> Self {
        RemoteThread {
            part,
            link,
            program,
            host,
            thread,
            inbox,
            state: ThreadState::default(),
            is_resident: false,
            has_left: true,
            spare: None,
        }
    }

    /// Takes the local spare instance, if there is one.
    pub(crate) fn take_spare(&mut self) -> Option<Box<Fiber>> {
        self.spare.take()
    }

    /// As [`crate::runtime::Fiber::load`]; takes effect at the next resume.
    pub(crate) fn load(&mut self, state: ThreadState) {
        self.state = state;
        self.is_resident = false;
    }

    /// As [`crate::runtime::Fiber::state`].
    pub(crate) fn state(&self) -> ThreadState {
        self.state.clone()
    }

    /// As [`crate::runtime::Fiber::call`].
    pub(crate) fn call(&mut self, export: &str, args: &[Value]) -> Result<Run, Stop> {
        self.run(Entering::Call {
            export: export.to_owned(),
            args: args.to_vec(),
        })
    }

    /// As [`crate::runtime::Fiber::resume`].
    pub(crate) fn resume(&mut self) -> Result<Run, Stop> {
        if self.thread.signal.is_requested() {
            return Ok(Run::Captured);
        }
        let state = (!self.is_resident).then(|| self.state.encode(self.program.hash()));
        self.run(Entering::Resume { state })
    }

    fn order(&self, order: &Order) {
        self.link.order(self.part, order);
    }

    /// Requests a safepoint once, if one is pending.
    fn interrupt(&self, asked: &mut bool) {
        if !*asked && self.thread.signal.is_requested() {
            let (tid, leaves) = (self.thread.tid, self.inbox.leaves.load(Ordering::Acquire));
            *asked = true;
            self.order(&Order::Interrupt { tid, leaves });
        }
    }

    fn run(&mut self, entering: Entering) -> Result<Run, Stop> {
        let tid = self.thread.tid;
        self.is_resident = true;
        self.has_left = false;
        self.order(&Order::Run { tid, entering });
        if self.spare.is_none() {
            let (program, host) = (self.program.clone(), self.host.clone());
            // (On failure it is created when needed.)
            let spare = Fiber::new(program, host, self.thread.clone());
            self.spare = spare.ok().map(Box::new);
        }
        let mut asked = false;
        let signal = self.thread.signal.clone();
        loop {
            self.interrupt(&mut asked);
            let Some((from, report)) = self.inbox.take() else {
                if self.inbox.is_over() {
                    // The machine ends: the thread stays where it is.
                    return Ok(Run::Captured);
                }
                match asked {
                    // It arrives immediately, unless the thread is in a host call.
                    true if spin_until(|| self.inbox.has_some()) => {}
                    true => signal.wait_for(|| self.inbox.has_some()),
                    false => signal.park(None, || self.inbox.has_some()),
                }
                continue;
            };
            if from != self.part {
                return Err(protocol_error("a report about a thread that is elsewhere"));
            }
            match report {
                Report::Call {
                    import,
                    call,
                    mut progress,
                    ..
                } => {
                    let wanted = self.program.meta.imports.get(import as usize);
                    let is_right =
                        |args: usize| wanted.is_some_and(|import| import.params.len() == args);
                    let (outcome, output) = match &call {
                        Call::Bare(args) if is_right(args.len()) => {
                            let thread = &self.thread;
                            let outcome = self.host.call(import, args, &mut progress, thread);
                            (outcome, Vec::new())
                        }
                        Call::Packed(call) if wanted.is_some() => {
                            let thread = &self.thread;
                            self.host.call_packed(import, call, &mut progress, thread)
                        }
                        _ => return Err(protocol_error("a call of an unknown import")),
                    };
                    // Sent before the answer, so that the thread leaves when it receives it.
                    self.interrupt(&mut asked);
                    let answer = match outcome {
                        HostOutcome::Done(results) => Answer::Done { results, output },
                        HostOutcome::Interrupted => Answer::Interrupted(progress),
                        HostOutcome::Exit(code) => Answer::Exit(code),
                        HostOutcome::Trap(message) => Answer::Trap(message),
                    };
                    self.order(&Order::Answer { tid, answer });
                }
                Report::Captured {
                    state, has_left, ..
                } => {
                    let meta = &self.program.meta;
                    self.state = ThreadState::decode(&state, self.program.hash(), meta)
                        .map_err(|error| protocol_error(&error.to_string()))?;
                    if has_left {
                        (self.is_resident, self.has_left) = (false, true);
                    }
                    return Ok(Run::Captured);
                }
                Report::Finished { values, .. } => return Ok(Run::Finished(values)),
                Report::Stopped { stop, .. } => return Err(stop),
                Report::Opened { .. } | Report::Times { .. } | Report::Expecting { .. } => {
                    return Err(protocol_error("an answer for an unknown thread"));
                }
            }
        }
    }
}

impl Drop for RemoteThread {
    fn drop(&mut self) {
        let tid = self.thread.tid;
        if !self.has_left {
            self.order(&Order::Leave { tid });
        }
    }
}

/// Spin time before blocking for a report: waking a thread takes longer than most reports.
const REPORT_SPIN: Duration = Duration::from_micros(300);

/// Spins for a while; whether the condition became true.
fn spin_until(has_come: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < REPORT_SPIN {
        if has_come() {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

/// A member violated the protocol.
fn protocol_error(what: &str) -> Stop {
    Stop::Trap(Trap {
        message: format!("a part of the machine violated the protocol: {what}"),
        backtrace: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Receives everything and never answers.
    struct Silent;

    impl Members for Silent {
        fn order(&self, _part: PartId, _order: &Order) {}

        fn stalled_us(&self, _os_thread: u32) -> BTreeMap<PartId, u64> {
            BTreeMap::new()
        }
    }

    /// A member that is lost while it joins never answers, and is not reported again.
    #[test]
    fn who_was_lost_before_is_not_waited_for() {
        let parts = Parts::default();
        let members = || vec![PartId::new(1).unwrap()];
        let set = |link: Option<Arc<dyn Members>>| parts.set(members(), link, SpawnPolicy::Here);
        assert!(parts.is_alone());
        parts.part_lost();
        set(Some(Arc::new(Silent)));
        assert!(!parts.is_alone());
        assert!(!parts.open(0, 1 << 16));
        // Without members, and again with members.
        parts.set(Vec::new(), None, SpawnPolicy::Here);
        assert!(parts.is_alone() && parts.open(0, 1 << 16));
        set(Some(Arc::new(Silent)));
        std::thread::scope(|scope| {
            let growing = scope.spawn(|| parts.open(0, 1 << 17));
            while locked(&parts.inner).growing != Some((0, 1 << 17)) {
                std::thread::yield_now();
            }
            parts.grown(PartId::new(1).unwrap(), (0, 1 << 17), true);
            assert!(growing.join().unwrap());
        });
    }
}
