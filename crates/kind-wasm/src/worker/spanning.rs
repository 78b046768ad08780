//! A worker as one of several parts of a machine: the home, which has the machine, or a
//! member, which has only pages and threads. Or the worker to which the machine moves: a
//! member that becomes the home once the move is committed.
//!
//! A member has no external effects: the host calls of its threads are executed by the
//! home. So it needs neither a lease nor a decision of the store; when home and member
//! lose each other, the member ends.

use super::process::WasmWorker;
use super::source::SpanningSource;
use crate::checkpoint::SpanningRestore;
use crate::control::{
    ConnectParts, HomeHandover, Join, MoveObject, MoveThread, ObjectReport, PartsReport,
    PrepareMember, Span, ThreadReport,
};
use crate::span::{
    Heat, Home, MemberPart, MeshError, MeshListener, Object, Pages, PartAddress, PartLimits,
    SpanConfig, SpanError, SpanningError,
};
use keel_cluster::{MachineName, NodeName};
use keel_machine::checkpoint::RepositoryError;
use keel_machine::failpoint;
use keel_machine::moves::TargetEvent;
use keel_machine::worker::control::State;
use keel_machine::worker::step_target;
use keel_net::RpcError;
use keel_wasm::coherence::{PartId, PartSet};
use keel_wasm::memory::{GuestMemory, MemoryError, PAGE_BYTES};
use keel_wasm::runtime::{Machine, NamedRange, Program};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Names reported for a page of several objects, at most.
const NAMES_MAX: usize = 8;
/// How long a part may take to answer before it is reported as silent, and the polling
/// interval.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Time limit for connecting the parts.
pub(super) const MEET_PATIENCE: Duration = Duration::from_secs(10);
/// How long a member waits for the addresses of the others, which may have to compile
/// first.
const JOIN_PATIENCE: Duration = Duration::from_secs(1900);
/// Time limit for threads to reach a safepoint.
pub(super) const FREEZE_PATIENCE: Duration = Duration::from_secs(5);
/// Time limit for moving threads and pages home.
pub(super) const HOME_PATIENCE: Duration = Duration::from_secs(120);
/// Time limit for moving an object.
const OBJECT_PATIENCE: Duration = Duration::from_secs(20);
/// Delay before a member's process exits, so that its last messages are sent.
const END_AFTER: Duration = Duration::from_millis(20);

/// State of a worker as a part.
#[derive(Default)]
pub(super) struct SpanState {
    /// Listens for the other parts.
    pub(super) meeting: Option<MeshListener>,
    /// Set at the home.
    pub(super) home: Option<Arc<Home>>,
    /// At the home: the node of each part.
    pub(super) nodes: BTreeMap<PartId, NodeName>,
    /// A member that is prepared and has not joined.
    ready: Option<PendingMember>,
    /// At a member: the machine, its part, and the part's state.
    pub(super) member: Option<(MachineName, PartId, Arc<MemberPart>)>,
}

/// Why the memory of a restored machine was not read.
#[derive(Debug, thiserror::Error)]
enum SpanningRestoreError {
    #[error(transparent)]
    Vault(#[from] RepositoryError),
    #[error(transparent)]
    Span(#[from] SpanError),
    #[error("it was ended while its memory was read")]
    Ended,
}

/// The message for the loss of a part.
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

struct PendingMember {
    machine: MachineName,
    program: Arc<Program>,
    memory_bytes: u64,
    room_bytes: Option<u64>,
    me: PartId,
}

impl SpanState {
    /// Number of parts that the machine spans; 0 while it has one part.
    pub(super) fn count(&self) -> u32 {
        let members = self.home.as_ref().map(|home| home.members());
        members.map_or(0, |members| u32::from(members.len()) + 1)
    }

    /// Why an operation on the whole machine is refused, if the machine spans.
    pub(super) fn refusal(&self) -> Option<String> {
        self.home.as_ref().map(|_| {
            let nodes: Vec<String> = self.nodes.values().map(ToString::to_string).collect();
            format!(
                "it has parts on {}; `keel unspan` first reduces it to one part",
                nodes.join(", ")
            )
        })
    }

    /// The part of a machine at this worker, unless it is the home.
    pub(super) fn member(&self) -> Option<PartId> {
        // Until its process has handled its end: others may need it until then.
        let (_, me, member) = self.member.as_ref()?;
        (!member.has_become_home()).then_some(*me)
    }

    pub(super) fn is_member(&self) -> bool {
        self.member().is_some()
    }

    /// The part of the arriving machine at this worker, if there is one.
    pub(super) fn arriving(&self) -> Option<Arc<MemberPart>> {
        let (_, _, member) = self.member.as_ref().filter(|_| self.is_member())?;
        (!member.pages().is_over()).then(|| member.clone())
    }

    /// The home that is to move, with its successor and the part to which its threads
    /// move meanwhile.
    pub(super) fn leaving(
        &self,
        to: Option<(PartId, PartId)>,
    ) -> Result<Option<SpanningSource>, String> {
        match (&self.home, to) {
            (None, None) => Ok(None),
            (Some(home), Some((successor, threads_to))) => Ok(Some(SpanningSource {
                give_up: Arc::default(),
                home: home.clone(),
                successor,
                threads_to,
                nodes: self.nodes.clone(),
                leaving: None,
            })),
            (Some(_), None) => Err(self.refusal().unwrap_or_default()),
            (None, Some(_)) => Err("it was reduced to one part meanwhile; try again".into()),
        }
    }

    /// The pages of a machine that spans.
    pub(super) fn pages(&self) -> Option<Arc<Pages>> {
        self.home.as_ref().map(|home| home.pages().clone())
    }

    /// Sets the memory limit of each part, in bytes.
    pub(super) fn limit(&self, part_bytes: Option<u64>) -> Result<(), SpanError> {
        match &self.home {
            Some(home) => home.pages().limit_parts(part_bytes),
            None => Ok(()),
        }
    }

    /// Ends the parts with the machine; returns why, if a part was lost.
    pub(super) fn end(&mut self) -> Option<String> {
        let home = self.home.take()?;
        let failure = home.failure();
        // A move in progress may still hold a reference.
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

impl WasmWorker {
    /// Prepares the home to connect to members.
    pub(super) fn prepare_home(&self, meet: &ConnectParts) -> Result<PartAddress, RpcError> {
        // The code that threads need to resume elsewhere is compiled before anything
        // waits for it.
        let machine = self.inner().machine.clone();
        if let Some(machine) = machine {
            machine.program().prepare_resume().map_err(failed)?;
        }
        let mut inner = self.inner();
        let state = self.process.state.borrow().clone();
        if !matches!(state, State::Running { .. } | State::Held { .. }) {
            return Err(failed("no machine runs here"));
        }
        if inner.moves.is_moving_away() {
            return Err(failed("the machine is moving; try again"));
        }
        if inner.post_copy_target.is_some() || inner.lazy_restore.is_some() {
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
                "it has a limit of its CPU time, which applies on one node only (`keel set M --cpu none` removes it)",
            ));
        }
        let (meeting, place) = open(PartId::HOME, meet).map_err(failed)?;
        inner.parts.meeting = Some(meeting);
        Ok(place)
    }

    /// Makes the machine span. Returns the downtime in microseconds.
    pub(super) fn span(&self, span: Span) -> Result<u64, RpcError> {
        // Excludes moves and checkpoints meanwhile.
        let _freezing = self.process.freezing();
        let tracking = self.tracking.try_lock();
        let Ok(_tracking) = tracking else {
            return Err(failed("a checkpoint of it is being made; try again"));
        };
        let (meeting, machine, name, epoch, part_bytes, stands) = {
            let mut inner = self.inner();
            if inner.moves.is_moving_away() || inner.give_up_checkpoint.is_some() {
                return Err(failed(
                    "the machine is moving, or a checkpoint is being made; try again",
                ));
            }
            // The trackers belong to the other mode of memory.
            inner.checkpointer = None;
            let meeting = inner.parts.meeting.take();
            match (meeting, &inner.machine, &inner.name) {
                (Some(meeting), Some(machine), Some(name)) => {
                    let spec = inner.spec.as_ref();
                    let part_bytes = spec.and_then(|it| it.balancing.part_memory_bytes);
                    let (machine, name) = (machine.clone(), name.clone());
                    let stands = matches!(*self.process.state.borrow(), State::Held { .. });
                    (
                        meeting,
                        machine,
                        name,
                        inner.moves.epoch,
                        part_bytes,
                        stands,
                    )
                }
                _ => return Err(failed("no connections were prepared")),
            }
        };
        if epoch != span.join.epoch {
            return Err(failed("the machine changed meanwhile; try again"));
        }
        let ends = meeting
            .meet(&name, epoch, &span.join.places, MEET_PATIENCE)
            .map_err(failed)?;
        let how = SpanConfig {
            spawning: span.spawning,
            patience: FREEZE_PATIENCE,
            limits: PartLimits {
                part_bytes,
                room_bytes: span.room_bytes,
            },
            stays_stopped: stands,
        };
        let home = Home::begin(&machine, ends, how).map_err(failed)?;
        let stood = home.downtime();
        {
            let mut inner = self.inner();
            inner.parts.nodes = span.nodes;
            inner.parts.home = Some(Arc::new(home));
        }
        self.end_orphaned_members(&machine)?;
        Ok(u64::try_from(stood.as_micros()).unwrap_or(u64::MAX))
    }

    /// Reads the memory of a held machine, now that it has parts, if it comes from a
    /// checkpoint; returns the bytes read. The machine runs afterwards.
    pub(super) fn restore_to_parts(&self) -> Result<u64, RpcError> {
        if !matches!(*self.process.state.borrow(), State::Held { .. }) {
            return Err(failed("it is not held"));
        }
        let (spanning_restore, machine) = {
            let mut inner = self.inner();
            (inner.spanning_restore.take(), inner.machine.clone())
        };
        let machine = machine.ok_or_else(|| failed("no machine is held here"))?;
        let bytes = match spanning_restore {
            Some(spanning_restore) => self.read_memory(&machine, spanning_restore)?,
            None => 0,
        };
        failpoint::pass("apart.brought").map_err(failed)?;
        machine.thaw().map_err(failed)?;
        self.process.state.send_if_modified(|state| match *state {
            State::Held { epoch } => {
                *state = State::Running { epoch };
                true
            }
            // It ended because a part was lost.
            _ => false,
        });
        Ok(bytes)
    }

    fn read_memory(
        &self,
        machine: &Machine,
        spanning_restore: SpanningRestore,
    ) -> Result<u64, RpcError> {
        let pages = self.pages()?;
        let nodes = self.inner().parts.nodes.clone();
        let write = |memory: usize, offset, bytes: &[u8]| -> Result<(), SpanningRestoreError> {
            // It may have been stopped.
            if machine.wait(Some(Duration::ZERO)).is_some() && pages.failure().is_none() {
                return Err(SpanningRestoreError::Ended);
            }
            pages.await_room()?;
            // A program has few memories.
            Ok(pages.write(memory as u32, offset, bytes, OBJECT_PATIENCE)?)
        };
        let brought = spanning_restore.read_pages(&write);
        let bytes = spanning_restore.bytes();
        spanning_restore.release();
        brought.map_err(|error| match &error {
            SpanningRestoreError::Span(SpanError::Lost { part, .. }) => {
                failed(lost(&nodes, *part, &error))
            }
            _ => failed(error),
        })?;
        Ok(bytes)
    }

    /// Reduces the machine to one part. Returns the downtime in microseconds. A
    /// checkpoint in progress is given up, as for a move.
    pub(super) fn unspan(&self) -> Result<u64, RpcError> {
        // In the order in which a checkpoint locks both.
        let _tracking = self.without_checkpoint().map_err(failed)?;
        let _freezing = self.process.freezing();
        // The machine would run without its memory.
        if matches!(*self.process.state.borrow(), State::Held { .. }) {
            return Err(failed("its memory is still to come; try again"));
        }
        self.check_not_moving()?;
        let (home, machine) = {
            let inner = self.inner();
            (inner.parts.home.clone(), inner.machine.clone())
        };
        let (Some(home), Some(machine)) = (home, machine) else {
            return Err(failed("the machine is on one node already"));
        };
        match home.unspan(HOME_PATIENCE) {
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
                self.end_orphaned_members(&machine)?;
                Err(self.failed_naming_silent(error))
            }
        }
    }

    /// As [`failed`], and names the parts that do not answer: they are the probable
    /// cause.
    fn failed_naming_silent(&self, error: impl std::fmt::Display) -> RpcError {
        let (machine, nodes) = {
            let inner = self.inner();
            (inner.machine.clone(), inner.parts.nodes.clone())
        };
        let Some(machine) = machine else {
            return failed(error);
        };
        machine.request_cpu_times();
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut silent = machine.unresponsive_members();
        while !silent.is_empty() && Instant::now() < deadline {
            std::thread::sleep(POLL_INTERVAL);
            silent = machine.unresponsive_members();
        }
        let silent = silent.keys().filter_map(|part| nodes.get(part));
        let silent: Vec<String> = silent.map(|node| format!("the part on {node}")).collect();
        match silent.is_empty() {
            true => failed(error),
            false => failed(format!(
                "{} does not answer, its process is stopped or its node is overloaded: {error}",
                silent.join(" and ")
            )),
        }
    }

    /// Ends the members of a machine that ended while it was made to span: its end found
    /// no members to end.
    pub(super) fn end_orphaned_members(&self, machine: &Machine) -> Result<(), RpcError> {
        if machine.wait(Some(Duration::ZERO)).is_none() {
            return Ok(());
        }
        let mut parts = std::mem::take(&mut self.inner().parts);
        let why = parts.end();
        Err(failed(
            why.unwrap_or_else(|| "the machine has ended".into()),
        ))
    }

    /// Reports parts and threads of the machine.
    pub(super) fn parts(&self) -> Result<PartsReport, RpcError> {
        let inner = self.inner();
        let machine = inner.machine.as_ref();
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        let threads = machine.thread_infos().into_iter();
        let liked = machine.preferences();
        // For the next report.
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
                // Less than a day and a millisecond.
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

    /// Sets the idle cores of each part: new threads begin where most are idle.
    pub(super) fn room(&self, room: BTreeMap<PartId, f64>) -> Result<(), RpcError> {
        let machine = self.inner().machine.clone();
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        machine.set_free_cores(room);
        Ok(())
    }

    /// Starts to move a thread to another part; does not wait.
    pub(super) fn move_thread(&self, thread: MoveThread) -> Result<(), RpcError> {
        let machine = self.inner().machine.clone();
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        machine.move_thread(thread.tid, thread.to).map_err(failed)
    }

    /// The machine's memory as objects, by holders and by the guest's names.
    pub(super) fn objects(&self) -> Result<Vec<ObjectReport>, RpcError> {
        let (machine, pages) = {
            let inner = self.inner();
            (inner.machine.clone(), inner.parts.pages())
        };
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        let objects = match pages {
            Some(pages) => pages
                .objects()
                .map_err(|error| self.failed_naming_silent(error))?,
            None => objects_on_one_node(machine.memories()).map_err(failed)?,
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
                    // Distributed over the object's pages, because it is known only in
                    // total.
                    exchanges: (u128::from(object.exchanges) * u128::from(bytes)
                        / u128::from(all.max(1))) as u64,
                    directory: object.directory,
                });
            }
        }
        Ok(reports)
    }

    /// Recent use of its memory; empty while it has one part.
    pub(super) fn heat(&self) -> Result<Heat, RpcError> {
        let pages = self.inner().parts.pages();
        let heat = pages.map(|pages| pages.heat()).transpose();
        heat.map(Option::unwrap_or_default).map_err(failed)
    }

    /// Moves an object to a part; returns the bytes that have arrived.
    pub(super) fn move_object(&self, object: MoveObject) -> Result<u64, RpcError> {
        let end = object.start.checked_add(object.bytes);
        let end = end.ok_or_else(|| failed("the range is outside of any memory"))?;
        self.pages()?
            .move_object(object.memory, object.start..end, object.to, OBJECT_PATIENCE)
            .map_err(|error| self.failed_naming_silent(error))
    }

    fn pages(&self) -> Result<Arc<Pages>, RpcError> {
        let pages = self.inner().parts.pages();
        pages.ok_or_else(|| failed("the machine is on one node (`keel span`)"))
    }

    /// Prepares an empty worker as a member: compiles the program and listens for the
    /// other parts.
    pub(super) fn prepare_member(
        self: &Arc<Self>,
        ready: &PrepareMember,
    ) -> Result<PartAddress, RpcError> {
        // Or the machine moves to this worker.
        let arrives = {
            let inner = self.inner();
            let is_free = inner.machine.is_none() && inner.parts.member.is_none();
            is_free && inner.name.as_ref() == Some(&ready.machine)
        };
        match &*self.process.state.borrow() {
            State::Empty => {}
            State::Receiving { .. } if arrives => {}
            _ => return Err(RpcError::refused("this worker has a machine already")),
        }
        let bytes = std::fs::read(&ready.program)
            .map_err(|error| failed(format!("{}: {error}", ready.program.display())))?;
        let program = self.engine.load_instrumented(bytes).map_err(failed)?;
        self.limit_memory(program.meta().memories.len(), &ready.spec);
        let (meeting, place) = open(ready.me, &ready.meet).map_err(failed)?;
        let mut inner = self.inner();
        inner.parts.meeting = Some(meeting);
        inner.parts.ready = Some(PendingMember {
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
        // The requester may be gone, and no other process knows of this part.
        let worker = self.clone();
        std::thread::Builder::new()
            .name("unwanted".into())
            .spawn(move || {
                std::thread::sleep(JOIN_PATIENCE);
                if worker.inner().parts.ready.is_some() {
                    tracing::warn!("this part was not told to join");
                    std::process::exit(1);
                }
            })
            .map_err(failed)?;
        Ok(place)
    }

    /// Connects the member to the others and starts it. Its process ends with it.
    pub(super) fn join(self: &Arc<Self>, join: &Join) -> Result<(), RpcError> {
        let (meeting, ready) = {
            let mut inner = self.inner();
            match (inner.parts.meeting.take(), inner.parts.ready.take()) {
                (Some(meeting), Some(ready)) => (meeting, ready),
                _ => return Err(RpcError::refused("this worker is not prepared as a part")),
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
                if member.has_become_home() {
                    return;
                }
                if *worker.process.state.borrow() == State::Empty {
                    std::thread::sleep(END_AFTER);
                    std::process::exit(0);
                }
                worker.end_removed_part();
            })
            .map(drop)
            .map_err(failed)
    }

    /// The machine that was to move here has removed its part at this worker.
    fn end_removed_part(self: &Arc<Self>) {
        let dropped_for = {
            let mut inner = self.inner();
            inner.parts.member = None;
            inner.dropped_for.take()
        };
        match dropped_for {
            Some(reason) => drop(self.process.state.send_replace(State::Dropped { reason })),
            None => {
                let reason = "the machine's part here was removed".to_owned();
                step_target(self, TargetEvent::Abort(reason));
            }
        }
    }

    /// Makes this part the home: the commit was applied. If this fails, the machine has
    /// lost a part and ended.
    pub(super) fn become_home(
        &self,
        machine: Option<Machine>,
        part: &MemberPart,
        handover: HomeHandover,
    ) {
        let Some(machine) = machine else { return };
        let home_state = &handover.home_state;
        let succeeded = failpoint::pass("home.succeeds")
            .map_err(|injected| injected.to_string())
            .and_then(|()| {
                // This cannot be undone, so slow parts are waited for.
                let home = part.become_home(&machine, home_state, HOME_PATIENCE);
                home.map_err(|error| error.to_string())
            });
        let mut inner = self.inner();
        match succeeded {
            Ok(home) => {
                inner.parts.home = Some(Arc::new(home));
                inner.parts.nodes = handover.nodes;
                inner.parts.member = None;
            }
            Err(reason) => {
                tracing::error!(reason, "the home of a machine did not arrive");
                inner.ended_for = Some(format!("it was lost when its home moved: {reason}"));
                drop(inner);
                part.end();
                machine.stop();
            }
        }
    }
}

fn open(me: PartId, meet: &ConnectParts) -> Result<(MeshListener, PartAddress), MeshError> {
    MeshListener::open(me, meet.parts.without(me), &meet.address)
}

/// The memory of a machine with one part, as objects.
fn objects_on_one_node(memories: &[Arc<GuestMemory>]) -> Result<Vec<Object>, MemoryError> {
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

/// Page ranges of named objects in rising order, split where one begins or ends, each
/// with its names: a page with several objects has the names of all.
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
    // The same objects, by their ends.
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

/// Splits a range where names begin and end.
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
    fn ranges_are_split_where_names_begin_and_end() {
        let piece = |start: u64, bytes: u64| NamedRange { start, bytes };
        let page = |number: u64| number * PAGE_BYTES;
        let named = BTreeMap::from([
            ("a".to_owned(), piece(page(2) + 7, 10)),
            // The second begins in the page of the first and contains a third.
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

    /// The maximum number of nested objects: the names of a page are limited to the
    /// innermost.
    #[test]
    fn names_of_nested_objects_are_limited() {
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
