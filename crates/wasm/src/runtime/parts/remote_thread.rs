//! A thread that runs at a member, as its home sees it.

use super::Members;
use super::SpawnPolicy;
use super::message::{Answer, Call, Entering, Order, Report};
use crate::coherence::{PartId, PartSet};
use crate::runtime::fiber::{Fiber, Run, Stop, Trap};
use crate::runtime::frame::{ThreadState, Value};
use crate::runtime::governor::CoreTime;
use crate::runtime::host::{Host, HostOutcome, HostThread};
use crate::runtime::machine::{CpuUsage, locked};
use crate::runtime::program::Program;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// What a member said of one thread, and nobody has heard.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    inner: Mutex<InboxInner>,
    /// Where it is it goes on no more, once it stands.
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

    /// Nothing comes any more.
    pub(crate) fn close(&self) {
        locked(&self.inner).closed = true;
    }

    /// Whether the thread is to leave the part at which it is.
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
    /// Held while a memory is opened: one at a time.
    growth_lock: Mutex<()>,
    inner: Mutex<PartsInner>,
    changed: Condvar,
    /// It has members; changes only while the machine is frozen.
    spans: AtomicBool,
}

#[derive(Default)]
struct PartsInner {
    /// `None` while it is alone.
    link: Option<Arc<dyn Members>>,
    members: Vec<PartId>,
    spawning: SpawnPolicy,
    /// Cores that are free at each part, less what began there since that was told.
    free_cores: BTreeMap<PartId, f64>,
    /// What threads took where they are, and when it was looked at there.
    taken: BTreeMap<u32, (PartId, CpuUsage)>,
    /// Since when a member has not said what it was asked for that.
    times_requested: BTreeMap<PartId, Instant>,
    /// What is being opened: memory and bytes.
    growing: Option<(u32, u64)>,
    /// What came of it, by part.
    grown: BTreeMap<PartId, bool>,
    /// Nothing goes to these any more.
    leaving: PartSet,
    lost: bool,
}

impl Parts {
    /// From now on it has these members, or none.
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
        inner.taken.clear();
        inner.times_requested.clear();
        // (A member that was lost before it was set is lost.)
        inner.lost &= link.is_some();
        self.spans.store(link.is_some(), Ordering::Release);
        inner.link = link;
        self.changed.notify_all();
    }

    /// Whether all of its memory is here, as long as a call of the host lasts.
    pub(crate) fn is_alone(&self) -> bool {
        !self.spans.load(Ordering::Acquire)
    }

    pub(crate) fn members(&self) -> Vec<PartId> {
        locked(&self.inner).members.clone()
    }

    /// These are to leave: nothing goes to them any more. All others stay, also those that
    /// were to leave before.
    pub(crate) fn drain(&self, parts: PartSet) {
        locked(&self.inner).leaving = parts;
    }

    pub(crate) fn is_leaving(&self, part: PartId) -> bool {
        locked(&self.inner).leaving.contains(part)
    }

    /// Where a new thread begins, of the parts that have so many already; of equals at
    /// the home.
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

    /// How many cores are free at each part now.
    pub(crate) fn set_free_cores(&self, free_cores: BTreeMap<PartId, f64>) {
        locked(&self.inner).free_cores = free_cores;
    }

    /// What a part says of its threads.
    pub(crate) fn took(
        &self,
        part: PartId,
        at_ns: u64,
        threads: Vec<(u32, CoreTime, BTreeMap<PartId, u64>)>,
    ) {
        let mut inner = locked(&self.inner);
        inner.times_requested.remove(&part);
        inner.taken.retain(|_, (from, _)| *from != part);
        let took = threads.into_iter().map(|(tid, time, stalled_us)| {
            let took = CpuUsage {
                at_ns,
                time,
                stalled_us,
            };
            (tid, (part, took))
        });
        inner.taken.extend(took);
    }

    /// What a thread took where it is, when that was looked at last.
    pub(crate) fn taken(&self, tid: u32, part: PartId) -> Option<CpuUsage> {
        let inner = locked(&self.inner);
        let (from, took) = inner.taken.get(&tid)?;
        (*from == part).then(|| took.clone())
    }

    /// Asks all members what their threads took; the answers come in time.
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

    /// For how long members have not answered.
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

    /// Nobody answers any more: who waits for members goes on without.
    pub(crate) fn lose(&self) {
        locked(&self.inner).lost = true;
        self.changed.notify_all();
    }

    /// Makes a memory accessible so far at all members; false if one of them cannot.
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

/// Stands for a thread that runs at a member: what [`crate::runtime::Fiber`] is to one
/// that runs here.
pub(crate) struct RemoteThread {
    part: PartId,
    link: Arc<dyn Members>,
    program: Arc<Program>,
    host: Arc<dyn Host>,
    thread: HostThread,
    inbox: Arc<Inbox>,
    /// Its state when it stands at a safepoint.
    state: ThreadState,
    /// The member has it in an instance.
    is_resident: bool,
    /// The member has nothing of it.
    has_left: bool,
    /// A fresh instance for when it comes home, made while it runs elsewhere.
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

    /// A fresh instance here, if there is one already.
    pub(crate) fn take_spare(&mut self) -> Option<Box<Fiber>> {
        self.spare.take()
    }

    /// As [`crate::runtime::Fiber::load`]; takes effect when it is resumed.
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

    /// Asks it to come to a safepoint, once, if somebody wants that.
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
            // (Where there is none to be had it is tried again when it is needed.)
            let spare = Fiber::new(program, host, self.thread.clone());
            self.spare = spare.ok().map(Box::new);
        }
        let mut asked = false;
        let signal = self.thread.signal.clone();
        loop {
            self.interrupt(&mut asked);
            let Some((from, report)) = self.inbox.take() else {
                if self.inbox.is_over() {
                    // The machine ends: it stands, wherever it is.
                    return Ok(Run::Captured);
                }
                match asked {
                    // It comes at once, unless it is in a call of the host.
                    true if spin_until(|| self.inbox.has_some()) => {}
                    true => signal.wait_for(|| self.inbox.has_some()),
                    false => signal.park(None, || self.inbox.has_some()),
                }
                continue;
            };
            if from != self.part {
                return Err(wrong("a thread is spoken of where it is not"));
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
                        _ => return Err(wrong("a call of what is not imported")),
                    };
                    // Before the answer, so that it leaves when it has that.
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
                        .map_err(|error| wrong(&error.to_string()))?;
                    if has_left {
                        (self.is_resident, self.has_left) = (false, true);
                    }
                    return Ok(Run::Captured);
                }
                Report::Finished { values, .. } => return Ok(Run::Finished(values)),
                Report::Stopped { stop, .. } => return Err(stop),
                Report::Opened { .. } | Report::Times { .. } | Report::Expecting { .. } => {
                    return Err(wrong("an answer that is no thread's"));
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

/// For how long what is about to come is looked for before it is slept for: being woken
/// takes longer than most of it.
const REPORT_SPIN: Duration = Duration::from_micros(300);

/// Looks a while; whether it has come.
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

/// A member says what it should not.
fn wrong(what: &str) -> Stop {
    Stop::Trap(Trap {
        message: format!("a part of the machine says what it should not: {what}"),
        backtrace: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hears all, and answers nothing.
    struct Silent;

    impl Members for Silent {
        fn order(&self, _part: PartId, _order: &Order) {}

        fn stalled_us(&self, _os_thread: u32) -> BTreeMap<PartId, u64> {
            BTreeMap::new()
        }
    }

    /// A member that is lost while the machine is about to have it answers no more, and
    /// nobody says so again.
    #[test]
    fn who_was_lost_before_is_not_waited_for() {
        let parts = Parts::default();
        let members = || vec![PartId::new(1).unwrap()];
        let set = |link: Option<Arc<dyn Members>>| parts.set(members(), link, SpawnPolicy::Here);
        assert!(parts.is_alone());
        parts.lose();
        set(Some(Arc::new(Silent)));
        assert!(!parts.is_alone());
        assert!(!parts.open(0, 1 << 16));
        // Alone again, and once more with others.
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
