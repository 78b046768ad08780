//! A worker as one of several parts of a machine: the home, which has the machine, or a
//! member, which has nothing else. Or it is the worker to which the machine moves: a member
//! that takes the home's place once the move is committed.
//!
//! A member has no effects of its own: what its threads ask of the host the home does. So
//! it needs no lease and no decision of the store; when it is lost to the home, or the
//! home to it, it ends.

use super::control::{
    Join, MeetParts, MoveObject, MoveThread, ObjectReport, PartsReport, ReadyPart, Span, State,
    Succession, ThreadReport,
};
use super::outgoing::HomeParts;
use super::process::Worker;
use crate::checkpoint::{Later, VaultError};
use crate::failpoint;
use crate::moves::TargetEvent;
use crate::span::{
    Heat, Home, Keeps, MeetError, Meeting, MemberPart, Object, Pages, Place, SpanError,
    SpanningError, Spread,
};
use keel_cluster::{MachineName, NodeName};
use keel_net::RpcError;
use keel_wasm::coherence::{PartId, PartSet};
use keel_wasm::memory::{GuestMemory, MemoryError, PAGE_BYTES};
use keel_wasm::runtime::{Machine, NamedRange, Program};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Names that are told of a page of several objects, at most.
const NAMES_MAX: usize = 8;
/// How long a part may take to answer before it is said that it does not, and the pause
/// between two looks.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// How long parts may take to meet.
pub(super) const MEET_PATIENCE: Duration = Duration::from_secs(10);
/// How long a member waits to be told whom to meet: others may have to compile first.
const JOIN_PATIENCE: Duration = Duration::from_secs(1900);
/// How long threads may take to safepoints.
pub(super) const FREEZE_PATIENCE: Duration = Duration::from_secs(5);
/// How long threads and pages may take home.
pub(super) const HOME_PATIENCE: Duration = Duration::from_secs(120);
/// How long a piece of memory may take to another part.
const OBJECT_PATIENCE: Duration = Duration::from_secs(20);
/// What a member's process has for its last words.
const END_AFTER: Duration = Duration::from_millis(20);

/// What a worker knows of parts.
#[derive(Default)]
pub(super) struct Parts {
    /// Listens for the others.
    pub(super) meeting: Option<Meeting>,
    /// As the home.
    pub(super) home: Option<Arc<Home>>,
    /// The node of each part, at the home.
    pub(super) nodes: BTreeMap<PartId, NodeName>,
    /// What a member is to be.
    ready: Option<Ready>,
    /// As a member: of which machine, and which of its parts.
    pub(super) member: Option<(MachineName, PartId, Arc<MemberPart>)>,
}

/// Why the memory of a machine does not come.
#[derive(Debug, thiserror::Error)]
enum BringError {
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error(transparent)]
    Span(#[from] SpanError),
    #[error("it was ended while its memory came")]
    Ended,
}

/// What is said of a part that is lost.
fn lost(
    nodes: &BTreeMap<PartId, NodeName>,
    part: PartId,
    failure: &dyn std::fmt::Display,
) -> String {
    match nodes.get(&part) {
        Some(node) => format!("{failure} (node {node})"),
        None => failure.to_string(),
    }
}

struct Ready {
    machine: MachineName,
    program: Arc<Program>,
    memory_bytes: u64,
    room_bytes: Option<u64>,
    me: PartId,
}

impl Parts {
    /// How many the machine spans; 0 while it is alone.
    pub(super) fn count(&self) -> u32 {
        let members = self.home.as_ref().map(|home| home.members());
        members.map_or(0, |members| u32::from(members.len()) + 1)
    }

    /// Why what needs the whole machine cannot be done, if it spans.
    pub(super) fn refusal(&self) -> Option<String> {
        self.home.as_ref().map(|_| {
            let nodes: Vec<String> = self.nodes.values().map(ToString::to_string).collect();
            format!(
                "it has parts on {}; `keel unspan` brings them together first",
                nodes.join(", ")
            )
        })
    }

    /// The part of a machine that is here and is not its home.
    pub(super) fn member(&self) -> Option<PartId> {
        // (Until its process has taken note of its end: others may need it until then.)
        let (_, me, member) = self.member.as_ref()?;
        (!member.has_succeeded()).then_some(*me)
    }

    pub(super) fn is_member(&self) -> bool {
        self.member().is_some()
    }

    /// The part of the machine that arrives here, if it has one here.
    pub(super) fn arriving(&self) -> Option<Arc<MemberPart>> {
        let (_, _, member) = self.member.as_ref().filter(|_| self.is_member())?;
        (!member.pages().is_over()).then(|| member.clone())
    }

    /// The home that is to move, of a machine that spans; to which part, and at which its
    /// threads are meanwhile.
    pub(super) fn leaving(
        &self,
        to: Option<(PartId, PartId)>,
    ) -> Result<Option<HomeParts>, String> {
        match (&self.home, to) {
            (None, None) => Ok(None),
            (Some(home), Some((successor, threads_to))) => Ok(Some(HomeParts {
                gives_up: Arc::default(),
                home: home.clone(),
                successor,
                threads_to,
                nodes: self.nodes.clone(),
                leaving: None,
            })),
            (Some(_), None) => Err(self.refusal().unwrap_or_default()),
            (None, Some(_)) => Err("it was brought together meanwhile; try again".into()),
        }
    }

    /// The pages of a machine that spans.
    pub(super) fn pages(&self) -> Option<Arc<Pages>> {
        self.home.as_ref().map(|home| home.pages().clone())
    }

    /// What each of them keeps at most from now on, in bytes.
    pub(super) fn limit(&self, part_bytes: Option<u64>) -> Result<(), SpanError> {
        match &self.home {
            Some(home) => home.pages().limit_parts(part_bytes),
            None => Ok(()),
        }
    }

    /// Ends it with the machine: why, if a part was lost.
    pub(super) fn end(&mut self) -> Option<String> {
        let home = self.home.take()?;
        let failure = home.failure();
        // (A move that has begun may still hold it.)
        home.pages().die();
        let failure = failure?;
        Some(match &failure {
            SpanError::Lost { part, .. } => lost(&self.nodes, *part, &failure),
            _ => failure.to_string(),
        })
    }
}

pub(super) fn failed(error: impl std::fmt::Display) -> RpcError {
    RpcError::failed(error)
}

impl Worker {
    /// The home is to meet members.
    pub(super) fn span_ready(&self, meet: &MeetParts) -> Result<Place, RpcError> {
        // What lets threads go on elsewhere is compiled before anybody waits for it.
        let machine = self.inner().machine.clone();
        if let Some(machine) = machine {
            machine.program().prepare_resume().map_err(failed)?;
        }
        let mut inner = self.inner();
        let state = self.state.borrow().clone();
        if !matches!(state, State::Running { .. } | State::Held { .. }) {
            return Err(failed("no machine runs here"));
        }
        if inner.giving_away {
            return Err(failed("the machine is moving; try again"));
        }
        if inner.filler.is_some() || inner.behind.is_some() {
            return Err(failed("a part of its memory is still to come; try again"));
        }
        if let Some(refusal) = inner.parts.refusal() {
            return Err(failed(refusal));
        }
        if inner
            .spec
            .as_ref()
            .is_some_and(|spec| spec.cpu_limit_millis.is_some())
        {
            return Err(failed(
                "it has a limit of its CPU time, which is kept on one node only (`keel set M --cpu none` takes it away)",
            ));
        }
        let (meeting, place) = open(PartId::HOME, meet).map_err(failed)?;
        inner.parts.meeting = Some(meeting);
        Ok(place)
    }

    /// The machine spans from now on. Microseconds that it stood still.
    pub(super) fn span(&self, span: Span) -> Result<u64, RpcError> {
        // Neither a move nor a checkpoint begins meanwhile.
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let tracking = self.tracking.try_lock();
        let Ok(_tracking) = tracking else {
            return Err(failed("a checkpoint of it is being made; try again"));
        };
        let (meeting, machine, name, epoch, part_bytes, stands) = {
            let mut inner = self.inner();
            if inner.giving_away || inner.taking.is_some() {
                return Err(failed("the machine is moving, or being kept; try again"));
            }
            // What is known of its writes was known of a memory in the other mode.
            inner.taker = None;
            let meeting = inner.parts.meeting.take();
            match (meeting, &inner.machine, &inner.name) {
                (Some(meeting), Some(machine), Some(name)) => {
                    let spec = inner.spec.as_ref();
                    let part_bytes = spec.and_then(|it| it.balancing.part_memory_bytes);
                    let (machine, name) = (machine.clone(), name.clone());
                    let stands = matches!(*self.state.borrow(), State::Held { .. });
                    (meeting, machine, name, inner.epoch, part_bytes, stands)
                }
                _ => return Err(failed("it is not to meet anybody")),
            }
        };
        if epoch != span.join.epoch {
            return Err(failed("the machine changed meanwhile; try again"));
        }
        let ends = meeting
            .meet(&name, epoch, &span.join.places, MEET_PATIENCE)
            .map_err(failed)?;
        let how = Spread {
            spawning: span.spawning,
            patience: FREEZE_PATIENCE,
            keeps: Keeps {
                part_bytes,
                room_bytes: span.room_bytes,
            },
            stands,
        };
        let home = Home::begin(&machine, ends, how).map_err(failed)?;
        let stood = home.stood();
        {
            let mut inner = self.inner();
            inner.parts.nodes = span.nodes;
            inner.parts.home = Some(Arc::new(home));
        }
        self.end_parts_of_ended(&machine)?;
        Ok(u64::try_from(stood.as_micros()).unwrap_or(u64::MAX))
    }

    /// The memory of a machine that is held comes, now that it has parts, if it is to have
    /// some from a checkpoint; bytes that came. It runs then.
    pub(super) fn bring_apart(&self) -> Result<u64, RpcError> {
        if !matches!(*self.state.borrow(), State::Held { .. }) {
            return Err(failed("it is not held"));
        }
        let (later, machine) = {
            let mut inner = self.inner();
            (inner.later.take(), inner.machine.clone())
        };
        let machine = machine.ok_or_else(|| failed("no machine is held here"))?;
        let bytes = match later {
            Some(later) => self.bring_later(&machine, later)?,
            None => 0,
        };
        failpoint::pass("apart.brought").map_err(failed)?;
        machine.thaw().map_err(failed)?;
        self.state.send_if_modified(|state| match *state {
            State::Held { epoch } => {
                *state = State::Running { epoch };
                true
            }
            // (It ended, as a part was lost.)
            _ => false,
        });
        Ok(bytes)
    }

    fn bring_later(&self, machine: &Machine, later: Later) -> Result<u64, RpcError> {
        let pages = self.pages()?;
        let nodes = self.inner().parts.nodes.clone();
        let write = |memory: usize, offset, bytes: &[u8]| -> Result<(), BringError> {
            // It may have been stopped.
            if machine.wait(Some(Duration::ZERO)).is_some() && pages.failure().is_none() {
                return Err(BringError::Ended);
            }
            pages.await_room()?;
            // (A program has few memories.)
            Ok(pages.write(memory as u32, offset, bytes, OBJECT_PATIENCE)?)
        };
        let brought = later.bring(&write);
        let bytes = later.bytes();
        later.let_go();
        brought.map_err(|error| match &error {
            BringError::Span(SpanError::Lost { part, .. }) => failed(lost(&nodes, *part, &error)),
            _ => failed(error),
        })?;
        Ok(bytes)
    }

    /// The machine is alone again. Microseconds that it stood still. A checkpoint in the
    /// making is given up, as for a move.
    pub(super) fn unspan(&self) -> Result<u64, RpcError> {
        // (In the order in which a checkpoint takes both.)
        let _tracking = self.without_checkpoint().map_err(failed)?;
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        // It would run without it.
        if matches!(*self.state.borrow(), State::Held { .. }) {
            return Err(failed("its memory is still to come; try again"));
        }
        self.stays()?;
        let (home, machine) = {
            let inner = self.inner();
            (inner.parts.home.clone(), inner.machine.clone())
        };
        let (Some(home), Some(machine)) = (home, machine) else {
            return Err(failed("the machine is on one node already"));
        };
        match home.alone(HOME_PATIENCE) {
            Ok(stood) => {
                let ended = {
                    let parts = &mut self.inner().parts;
                    parts.nodes.clear();
                    parts.home.take()
                };
                drop(ended);
                Ok(u64::try_from(stood.as_micros()).unwrap_or(u64::MAX))
            }
            Err(error) => {
                self.end_parts_of_ended(&machine)?;
                Err(self.failed_of_silent(error))
            }
        }
    }

    /// As [`failed`], with which parts do not answer, if any: most likely it is that.
    fn failed_of_silent(&self, error: impl std::fmt::Display) -> RpcError {
        let (machine, nodes) = {
            let inner = self.inner();
            (inner.machine.clone(), inner.parts.nodes.clone())
        };
        let Some(machine) = machine else {
            return failed(error);
        };
        machine.request_cpu_times();
        let deadline = Instant::now() + ANSWER_WITHIN;
        let mut silent = machine.unresponsive_members();
        while !silent.is_empty() && Instant::now() < deadline {
            std::thread::sleep(LOOK_AGAIN);
            silent = machine.unresponsive_members();
        }
        let silent = silent.keys().filter_map(|part| nodes.get(part));
        let silent: Vec<String> = silent.map(|node| format!("the part on {node}")).collect();
        match silent.is_empty() {
            true => failed(error),
            false => failed(format!(
                "{} does not answer, its process stands still or its node has too much to do: {error}",
                silent.join(" and ")
            )),
        }
    }

    /// Ends the members of a machine that ended while it came to have them: whoever ended
    /// the others with it found none.
    pub(super) fn end_parts_of_ended(&self, machine: &Machine) -> Result<(), RpcError> {
        if machine.wait(Some(Duration::ZERO)).is_none() {
            return Ok(());
        }
        let mut parts = std::mem::take(&mut self.inner().parts);
        let why = parts.end();
        Err(failed(
            why.unwrap_or_else(|| "the machine has ended".into()),
        ))
    }

    /// What parts and threads the machine has.
    pub(super) fn parts(&self) -> Result<PartsReport, RpcError> {
        let inner = self.inner();
        let machine = inner.machine.as_ref();
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        let threads = machine.thread_infos().into_iter();
        let liked = machine.preferences();
        // (For the next time.)
        machine.request_cpu_times();
        Ok(PartsReport {
            nodes: inner.parts.nodes.clone(),
            threads: threads
                .map(|thread| ThreadReport {
                    tid: thread.tid,
                    part: thread.part,
                    moves_to: thread.moves_to,
                    waits: thread.waits,
                    took: thread.cpu_usage,
                    likes: liked.get(&thread.tid).cloned(),
                })
                .collect(),
            memory: match &inner.parts.home {
                Some(home) => home.pages().memory_of_parts(),
                None => BTreeMap::new(),
            },
            silent_ms: {
                let silent = machine.unresponsive_members().into_iter();
                // (Less than a day, and a millisecond.)
                silent
                    .map(|(part, since)| (part, since.as_millis() as u64))
                    .collect()
            },
            waits: match &inner.parts.home {
                Some(home) => home.pages().latency().buckets.to_vec(),
                None => Vec::new(),
            },
        })
    }

    /// Cores that are free at each part: threads that it starts begin where most are.
    pub(super) fn room(&self, room: BTreeMap<PartId, f64>) -> Result<(), RpcError> {
        let machine = self.inner().machine.clone();
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        machine.set_free_cores(room);
        Ok(())
    }

    /// A thread goes on at another part; does not wait for it.
    pub(super) fn move_thread(&self, thread: MoveThread) -> Result<(), RpcError> {
        let machine = self.inner().machine.clone();
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        machine.move_thread(thread.tid, thread.to).map_err(failed)
    }

    /// Its memory in pieces, by who holds them and what the guest calls them.
    pub(super) fn objects(&self) -> Result<Vec<ObjectReport>, RpcError> {
        let (machine, pages) = {
            let inner = self.inner();
            (inner.machine.clone(), inner.parts.pages())
        };
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        let objects = match pages {
            Some(pages) => pages
                .objects()
                .map_err(|error| self.failed_of_silent(error))?,
            None => alone(machine.memories()).map_err(failed)?,
        };
        let named = machine.named();
        let named = named_pages(&named);
        let mut reports = Vec::new();
        for object in objects {
            let of = if object.memory == 0 { &named[..] } else { &[] };
            let all = object.range.end - object.range.start;
            for (range, name) in split(&object.range, of) {
                let bytes = range.end - range.start;
                reports.push(ObjectReport {
                    name: name.map(str::to_owned),
                    memory: object.memory,
                    start: range.start,
                    bytes,
                    owner: object.owner,
                    readers: object.readers,
                    // (Of a piece it is not known: as if all of it were as hot.)
                    exchanges: (u128::from(object.exchanges) * u128::from(bytes)
                        / u128::from(all.max(1))) as u64,
                    directory: object.directory,
                });
            }
        }
        Ok(reports)
    }

    /// How its memory was used of late; nothing is known while it is alone.
    pub(super) fn heat(&self) -> Result<Heat, RpcError> {
        let pages = self.inner().parts.pages();
        let heat = pages.map(|pages| pages.heat()).transpose();
        heat.map(Option::unwrap_or_default).map_err(failed)
    }

    /// Brings a piece of memory to a part; bytes that have been there.
    pub(super) fn move_object(&self, object: MoveObject) -> Result<u64, RpcError> {
        let end = object.start.checked_add(object.bytes);
        let end = end.ok_or_else(|| failed("that is outside of any memory"))?;
        self.pages()?
            .move_object(object.memory, object.start..end, object.to, OBJECT_PATIENCE)
            .map_err(|error| self.failed_of_silent(error))
    }

    fn pages(&self) -> Result<Arc<Pages>, RpcError> {
        let pages = self.inner().parts.pages();
        pages.ok_or_else(|| failed("the machine is on one node (`keel span`)"))
    }

    /// An empty worker is to be a member: compiles, and listens for the others.
    pub(super) fn part_ready(self: &Arc<Self>, ready: &ReadyPart) -> Result<Place, RpcError> {
        // (Or it is the one to which the machine moves.)
        let arrives = {
            let inner = self.inner();
            let is_free = inner.machine.is_none() && inner.parts.member.is_none();
            is_free && inner.name.as_ref() == Some(&ready.machine)
        };
        match &*self.state.borrow() {
            State::Empty => {}
            State::Receiving { .. } if arrives => {}
            _ => return Err(RpcError::refused("this worker has a machine already")),
        }
        let bytes = std::fs::read(&ready.program)
            .map_err(|error| failed(format!("{}: {error}", ready.program.display())))?;
        let program = self.engine.load_instrumented(bytes).map_err(failed)?;
        self.bound(program.meta().memories.len(), &ready.spec);
        let (meeting, place) = open(ready.me, &ready.meet).map_err(failed)?;
        let mut inner = self.inner();
        inner.parts.meeting = Some(meeting);
        inner.parts.ready = Some(Ready {
            machine: ready.machine.clone(),
            program,
            memory_bytes: ready.spec.memory_bytes,
            room_bytes: ready.room_bytes,
            me: ready.me,
        });
        drop(inner);
        if arrives {
            return Ok(place);
        }
        // Whoever wanted it may be gone, and nobody else knows of it.
        let worker = self.clone();
        std::thread::Builder::new()
            .name("unwanted".into())
            .spawn(move || {
                std::thread::sleep(JOIN_PATIENCE);
                if worker.inner().parts.ready.is_some() {
                    tracing::warn!("nobody let this part join");
                    std::process::exit(1);
                }
            })
            .map_err(failed)?;
        Ok(place)
    }

    /// The member meets the others and begins. Its process ends with it.
    pub(super) fn join(self: &Arc<Self>, join: &Join) -> Result<(), RpcError> {
        let (meeting, ready) = {
            let mut inner = self.inner();
            match (inner.parts.meeting.take(), inner.parts.ready.take()) {
                (Some(meeting), Some(ready)) => (meeting, ready),
                _ => return Err(RpcError::refused("this worker is to be no part")),
            }
        };
        let begun = meeting
            .meet(&ready.machine, join.epoch, &join.places, MEET_PATIENCE)
            .map_err(failed)
            .and_then(|ends| {
                let (limit, room) = (ready.memory_bytes, ready.room_bytes);
                MemberPart::begin(ready.program, limit, room, ready.me, ends)
                    .map_err(|error: SpanningError| failed(error))
            });
        let member = Arc::new(begun?);
        let (machine, me) = (ready.machine, ready.me);
        self.inner().parts.member = Some((machine, me, member.clone()));
        let worker = self.clone();
        std::thread::Builder::new()
            .name("end".into())
            .spawn(move || {
                member.wait();
                if member.has_succeeded() {
                    return;
                }
                if *worker.state.borrow() == State::Empty {
                    std::thread::sleep(END_AFTER);
                    std::process::exit(0);
                }
                worker.is_no_part();
            })
            .map(drop)
            .map_err(failed)
    }

    /// The part of a machine that was to move here is none any more.
    fn is_no_part(self: &Arc<Self>) {
        let dropped_for = {
            let mut inner = self.inner();
            inner.parts.member = None;
            inner.dropped_for.take()
        };
        match dropped_for {
            Some(reason) => drop(self.state.send_replace(State::Dropped { reason })),
            None => {
                let reason = "the machine has no part here any more".to_owned();
                self.step_target(TargetEvent::Abort(reason));
            }
        }
    }

    /// This part takes the home's place: the commit won. Where that fails the machine has
    /// lost a part, and ended.
    pub(super) fn succeed(
        &self,
        machine: Option<Machine>,
        part: &MemberPart,
        succession: Succession,
    ) {
        let Some(machine) = machine else { return };
        let legacy = &succession.legacy;
        let succeeded = failpoint::pass("home.succeeds")
            .map_err(|injected| injected.to_string())
            .and_then(|()| {
                // (There is no way back: who is there and slow is waited for.)
                let home = part.succeed(&machine, legacy, HOME_PATIENCE);
                home.map_err(|error| error.to_string())
            });
        let mut inner = self.inner();
        match succeeded {
            Ok(home) => {
                inner.parts.home = Some(Arc::new(home));
                inner.parts.nodes = succession.nodes;
                inner.parts.member = None;
            }
            Err(reason) => {
                tracing::error!(reason, "the home of a machine did not come");
                inner.ended_for = Some(format!("its home moved, and lost it: {reason}"));
                drop(inner);
                part.end();
                machine.stop();
            }
        }
    }
}

fn open(me: PartId, meet: &MeetParts) -> Result<(Meeting, Place), MeetError> {
    Meeting::open(me, meet.parts.without(me), &meet.address)
}

/// The memory of a machine on one node.
fn alone(memories: &[Arc<GuestMemory>]) -> Result<Vec<Object>, MemoryError> {
    let mut objects = Vec::new();
    for (number, memory) in (0..).zip(memories) {
        let here = memory.populated()?.into_iter();
        objects.extend(here.map(|range| Object {
            memory: number,
            range,
            owner: PartId::HOME,
            readers: PartSet::default(),
            exchanges: 0,
            directory: PartId::HOME,
        }));
    }
    Ok(objects)
}

/// The pages of named pieces in rising order, cut where one begins or ends, with the names
/// that they have: what lies in others is named after them.
fn named_pages(named: &BTreeMap<String, NamedRange>) -> Vec<(Range<u64>, String)> {
    let mut begins: Vec<_> = named
        .iter()
        .map(|(name, piece)| {
            let start = piece.start / PAGE_BYTES * PAGE_BYTES;
            let end = piece.start.saturating_add(piece.bytes);
            (
                start,
                Reverse(end.next_multiple_of(PAGE_BYTES)),
                name.as_str(),
            )
        })
        .collect();
    begins.sort_unstable();
    let bounds = begins.iter().flat_map(|(start, end, _)| [*start, end.0]);
    let bounds: BTreeSet<u64> = bounds.collect();
    let mut begins = begins.into_iter().peekable();
    let mut here: BTreeSet<(u64, Reverse<u64>, &str)> = BTreeSet::new();
    // The same, by where they end.
    let mut ends = BTreeSet::new();
    let mut pages: Vec<(Range<u64>, String)> = Vec::new();
    for (start, end) in bounds.iter().zip(bounds.iter().skip(1)) {
        while let Some((_, ended)) = ends.first().filter(|(end, _)| end <= start).copied() {
            ends.pop_first();
            here.remove(&ended);
        }
        while let Some(begun) = begins.next_if(|it| it.0 == *start) {
            here.insert(begun);
            ends.insert((begun.1.0, begun));
        }
        let mut names: Vec<&str> = here.iter().rev().map(|it| it.2).take(NAMES_MAX).collect();
        names.reverse();
        if !names.is_empty() {
            pages.push((*start..*end, names.join(",")));
        }
    }
    pages
}

/// Cuts a range where names begin and end.
fn split<'a>(
    range: &Range<u64>,
    named: &'a [(Range<u64>, String)],
) -> Vec<(Range<u64>, Option<&'a str>)> {
    let (mut at, mut pieces) = (range.start, Vec::new());
    let first = named.partition_point(|(piece, _)| piece.end <= range.start);
    let mut rest = named.iter().skip(first);
    while let Some((piece, name)) = rest.next().filter(|(piece, _)| piece.start < range.end) {
        let (start, end) = (piece.start.max(at), piece.end.min(range.end));
        if start >= end {
            continue;
        }
        if at < start {
            pieces.push((at..start, None));
        }
        pieces.push((start..end, Some(name.as_str())));
        at = end;
    }
    if at < range.end {
        pieces.push((at..range.end, None));
    }
    pieces
}

#[cfg(test)]
mod names_of_objects {
    use super::*;

    #[test]
    fn memory_is_cut_where_names_begin_and_end() {
        let piece = |start: u64, bytes: u64| NamedRange { start, bytes };
        let page = |number: u64| number * PAGE_BYTES;
        let named = BTreeMap::from([
            ("a".to_owned(), piece(page(2) + 7, 10)),
            // It begins in the page of the first, and within it lies another one.
            ("b".to_owned(), piece(page(2) + 100, page(3))),
            ("c".to_owned(), piece(page(4), 1)),
            ("d".to_owned(), piece(page(8), page(2))),
        ]);
        let named = named_pages(&named);
        let told: Vec<_> = named
            .iter()
            .map(|(range, names)| {
                let pages = range.start / PAGE_BYTES..range.end / PAGE_BYTES;
                (pages, names.as_str())
            })
            .collect();
        assert_eq!(
            told,
            [
                (2..3, "b,a"),
                (3..4, "b"),
                (4..5, "b,c"),
                (5..6, "b"),
                (8..10, "d")
            ]
        );
        let cut = |first: u64, last: u64| -> Vec<(u64, u64, &str)> {
            let pieces = split(&(page(first)..page(last)), &named);
            let pieces = pieces.into_iter().map(|(range, name)| {
                let (first, last) = (range.start / PAGE_BYTES, range.end / PAGE_BYTES);
                (first, last, name.unwrap_or("-"))
            });
            pieces.collect()
        };
        assert_eq!(cut(0, 2), [(0, 2, "-")]);
        assert_eq!(cut(4, 5), [(4, 5, "b,c")]);
        assert_eq!(
            cut(0, 9),
            [
                (0, 2, "-"),
                (2, 3, "b,a"),
                (3, 4, "b"),
                (4, 5, "b,c"),
                (5, 6, "b"),
                (6, 8, "-"),
                (8, 9, "d")
            ]
        );
        assert_eq!(cut(9, 12), [(9, 10, "d"), (10, 12, "-")]);
    }

    /// As many as there can be, each in the one before: no more names than so many are told
    /// of a page, the innermost.
    #[test]
    fn pages_in_very_many_pieces_have_few_names() {
        let piece = |number: u64| NamedRange {
            start: number * PAGE_BYTES,
            bytes: (8192 - 2 * number) * PAGE_BYTES,
        };
        let named = (0..4096).map(|number| (format!("n{number:04}"), piece(number)));
        let named = named_pages(&named.collect());
        assert_eq!(named.len(), 8191);
        assert_eq!(named[0].1, "n0000");
        assert_eq!(
            named[4095].1,
            "n4088,n4089,n4090,n4091,n4092,n4093,n4094,n4095"
        );
    }
}
