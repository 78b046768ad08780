//! A thread that runs at a member, as its home sees it.

use super::Members;
use super::Spawning;
use super::message::{Answer, Call, Entering, Order, Report};
use crate::coherence::{PartId, PartSet};
use crate::runtime::fiber::{Fiber, Run, Stop, Trap};
use crate::runtime::frame::{ThreadState, Value};
use crate::runtime::governor::CoreTime;
use crate::runtime::host::{Host, HostOutcome, HostThread};
use crate::runtime::machine::{Took, locked};
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

/// The parts of a machine.
#[derive(Default)]
pub(crate) struct Parts {
    /// Held while a memory is opened: one at a time.
    opens: Mutex<()>,
    inner: Mutex<PartsInner>,
    changed: Condvar,
    /// It has members; changes only while the machine is frozen.
    spans: AtomicBool,
}

#[derive(Default)]
struct PartsInner {
    /// `None` while it is alone.
    way: Option<Arc<dyn Members>>,
    members: Vec<PartId>,
    /// Where new threads begin.
    spawning: Spawning,
    /// Cores that are free at each part, less what began there since that was told.
    room: BTreeMap<PartId, f64>,
    /// What threads took where they are, and when it was looked at there.
    taken: BTreeMap<u32, (PartId, Took)>,
    /// Since when a member has not said what it was asked for that.
    asked: BTreeMap<PartId, Instant>,
    /// What is being opened: memory and bytes.
    opening: Option<(u32, u64)>,
    /// What came of it, by part.
    opened: BTreeMap<PartId, bool>,
    /// Nothing goes to these any more.
    leaving: PartSet,
    lost: bool,
}

impl Parts {
    /// From now on it has these members, or none.
    pub(crate) fn set(
        &self,
        members: Vec<PartId>,
        way: Option<Arc<dyn Members>>,
        spawning: Spawning,
    ) {
        let mut inner = locked(&self.inner);
        let all: PartSet = members.iter().copied().collect();
        let leaving = inner.leaving.iter().filter(|part| all.contains(*part));
        inner.leaving = leaving.collect();
        inner.members = members;
        inner.spawning = spawning;
        inner.room.clear();
        inner.taken.clear();
        inner.asked.clear();
        // (A member that was lost before it was set is lost.)
        inner.lost &= way.is_some();
        self.spans.store(way.is_some(), Ordering::Release);
        inner.way = way;
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
    pub(crate) fn let_leave(&self, parts: PartSet) {
        locked(&self.inner).leaving = parts;
    }

    pub(crate) fn is_leaving(&self, part: PartId) -> bool {
        locked(&self.inner).leaving.contains(part)
    }

    /// Where a new thread begins, of the parts that have so many already; of equals at
    /// the home.
    pub(crate) fn place_for_new(&self, counts: &BTreeMap<PartId, usize>) -> PartId {
        let mut inner = locked(&self.inner);
        let spawning = match inner.way {
            Some(_) => inner.spawning,
            None => Spawning::Here,
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
            Spawning::Here => None,
            Spawning::Room if !inner.room.is_empty() => {
                let room = |part: &PartId| inner.room.get(part).copied().unwrap_or(f64::MIN);
                let most = parts.iter().copied().max_by(|one, other| {
                    let by_room = room(one).total_cmp(&room(other));
                    by_room.then(other.cmp(one))
                });
                if let Some(room) = most.and_then(|part| inner.room.get_mut(&part)) {
                    *room -= 1.0;
                }
                most
            }
            Spawning::Even | Spawning::Room => fewest(),
        };
        place.unwrap_or(PartId::HOME)
    }

    /// How many cores are free at each part now.
    pub(crate) fn set_room(&self, room: BTreeMap<PartId, f64>) {
        locked(&self.inner).room = room;
    }

    /// What a part says of its threads.
    pub(crate) fn took(
        &self,
        part: PartId,
        at_ns: u64,
        threads: Vec<(u32, CoreTime, BTreeMap<PartId, u64>)>,
    ) {
        let mut inner = locked(&self.inner);
        inner.asked.remove(&part);
        inner.taken.retain(|_, (from, _)| *from != part);
        let took = threads.into_iter().map(|(tid, time, stood)| {
            let took = Took { at_ns, time, stood };
            (tid, (part, took))
        });
        inner.taken.extend(took);
    }

    /// What a thread took where it is, when that was looked at last.
    pub(crate) fn taken(&self, tid: u32, part: PartId) -> Option<Took> {
        let inner = locked(&self.inner);
        let (from, took) = inner.taken.get(&tid)?;
        (*from == part).then(|| took.clone())
    }

    /// Asks all members what their threads took; the answers come in time.
    pub(crate) fn ask_times(&self) {
        let mut inner = locked(&self.inner);
        let (way, members) = (inner.way.clone(), inner.members.clone());
        if way.is_some() {
            for part in &members {
                inner.asked.entry(*part).or_insert_with(Instant::now);
            }
        }
        drop(inner);
        for part in members {
            if let Some(way) = &way {
                way.order(part, &Order::Times);
            }
        }
    }

    /// For how long members have not answered.
    pub(crate) fn silent(&self) -> BTreeMap<PartId, Duration> {
        let inner = locked(&self.inner);
        let members = inner.members.iter();
        let asked = members.filter_map(|part| Some((*part, inner.asked.get(part)?.elapsed())));
        asked.collect()
    }

    pub(crate) fn way(&self) -> Option<Arc<dyn Members>> {
        locked(&self.inner).way.clone()
    }

    /// Nobody answers any more: who waits for members goes on without.
    pub(crate) fn lose(&self) {
        locked(&self.inner).lost = true;
        self.changed.notify_all();
    }

    /// Makes a memory accessible so far at all members; false if one of them cannot.
    pub(crate) fn open(&self, memory: u32, bytes: u64) -> bool {
        let _alone = locked(&self.opens);
        let mut inner = locked(&self.inner);
        let (Some(way), members) = (inner.way.clone(), inner.members.clone()) else {
            return true;
        };
        inner.opened.clear();
        inner.opening = Some((memory, bytes));
        drop(inner);
        for part in &members {
            way.order(*part, &Order::Open { memory, bytes });
        }
        let mut inner = locked(&self.inner);
        while !inner.lost && inner.opened.len() < members.len() {
            inner = self
                .changed
                .wait(inner)
                .unwrap_or_else(|error| error.into_inner());
        }
        !inner.lost && inner.opened.values().all(|done| *done)
    }

    pub(crate) fn opened(&self, part: PartId, what: (u32, u64), done: bool) {
        let mut inner = locked(&self.inner);
        if inner.opening == Some(what) {
            inner.opened.insert(part, done);
        }
        self.changed.notify_all();
    }
}

/// Stands for a thread that runs at a member: what [`crate::runtime::Fiber`] is to one
/// that runs here.
pub(crate) struct Away {
    part: PartId,
    way: Arc<dyn Members>,
    program: Arc<Program>,
    host: Arc<dyn Host>,
    thread: HostThread,
    inbox: Arc<Inbox>,
    /// Its state when it stands at a safepoint.
    state: ThreadState,
    /// The member has it in an instance.
    is_there: bool,
    /// The member has nothing of it.
    has_left: bool,
    /// A fresh instance for when it comes home, made while it runs elsewhere.
    spare: Option<Box<Fiber>>,
}

impl Away {
    pub(crate) fn new(
        part: PartId,
        way: Arc<dyn Members>,
        program: Arc<Program>,
        host: Arc<dyn Host>,
        thread: HostThread,
        inbox: Arc<Inbox>,
    ) -> Self {
        Away {
            part,
            way,
            program,
            host,
            thread,
            inbox,
            state: ThreadState::default(),
            is_there: false,
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
        self.is_there = false;
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
        let state = (!self.is_there).then(|| self.state.encode(self.program.hash()));
        self.run(Entering::Resume { state })
    }

    fn order(&self, order: &Order) {
        self.way.order(self.part, order);
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
        self.is_there = true;
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
                    true if look_for(|| self.inbox.has_some()) => {}
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
                        (self.is_there, self.has_left) = (false, true);
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

impl Drop for Away {
    fn drop(&mut self) {
        let tid = self.thread.tid;
        if !self.has_left {
            self.order(&Order::Leave { tid });
        }
    }
}

/// For how long what is about to come is looked for before it is slept for: being woken
/// takes longer than most of it.
const LOOK_FOR: Duration = Duration::from_micros(300);

/// Looks a while; whether it has come.
fn look_for(has_come: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < LOOK_FOR {
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

        fn stood(&self, _os_thread: u32) -> BTreeMap<PartId, u64> {
            BTreeMap::new()
        }
    }

    /// A member that is lost while the machine is about to have it answers no more, and
    /// nobody says so again.
    #[test]
    fn who_was_lost_before_is_not_waited_for() {
        let parts = Parts::default();
        let members = || vec![PartId::new(1).unwrap()];
        let set = |way: Option<Arc<dyn Members>>| parts.set(members(), way, Spawning::Here);
        assert!(parts.is_alone());
        parts.lose();
        set(Some(Arc::new(Silent)));
        assert!(!parts.is_alone());
        assert!(!parts.open(0, 1 << 16));
        // Alone again, and once more with others.
        parts.set(Vec::new(), None, Spawning::Here);
        assert!(parts.is_alone() && parts.open(0, 1 << 16));
        set(Some(Arc::new(Silent)));
        std::thread::scope(|scope| {
            let opening = scope.spawn(|| parts.open(0, 1 << 17));
            while locked(&parts.inner).opening != Some((0, 1 << 17)) {
                std::thread::yield_now();
            }
            parts.opened(PartId::new(1).unwrap(), (0, 1 << 17), true);
            assert!(opening.join().unwrap());
        });
    }
}
