//! Machines with parts on several nodes: the owner's agent has member workers made, lets
//! all parts meet, and says to the machine that it spans.
//!
//! ```text
//!   owner's agent                 each member's agent            its worker
//!       │─── PART ───────────────────▶│ fetches the module           │
//!       │                             │ starts it ──── PART_READY ──▶│ listens
//!       │◀──────────────── where ─────│◀─────────────────────────────│
//!       │ SPAN_READY: the home listens too
//!       │─── PART_JOIN, all at once, with SPAN to the home ─────────▶│ they meet
//! ```
//!
//! What was begun is undone where anything fails, and the machine goes on alone. Members
//! end by themselves with their home: an agent that dies leaves nothing to be settled.
//!
//! Which parts a machine has its home's worker knows; the store has its owner, as ever.

use crate::agent::Agent;
use crate::changing::{Changed, Comes, Spanning};
use crate::events::Note;
use crate::operate::{self, OperateError, Operation};
use crate::service::kind as node_kind;
use crate::workers::{COMPILE_PATIENCE, Leftovers, OLDER, PROMPT, Worker, is_older};
use futures::future::{join_all, try_join_all};
use keel_api::{
    EventKind, ObjectInfo, PartInfo, PartMemoryInfo, PartsInfo, SpanRequest, ThreadInfo,
};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::span::{Heat, HotPage, PARTS_MAX, PartId, PartSet, Place, Sharing, Spawning};
use keel_machine::spec::{Record, Spawn, Spec};
use keel_machine::worker::control::{
    Join, MeetParts, MoveObject, MoveThread, ObjectReport, PartWith, PartsReport, ReadyPart,
    Report, Span, State, kind, pack, unpack,
};
use keel_net::{Fingerprint, RpcError};
use keel_wasm::memory::PAGE_BYTES;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// How long parts may take to meet, and threads to safepoints.
pub(crate) const SPAN_PATIENCE: Duration = Duration::from_secs(40);
/// How long threads and pages may take home.
pub(crate) const UNSPAN_PATIENCE: Duration = Duration::from_secs(150);
/// How long all of it may take, compiling too.
pub(crate) const PATIENCE: Duration = COMPILE_PATIENCE;
/// Tries to let a machine have its parts where they were after a move, and the pause between two:
/// it may be arriving, or a part of its memory may still be to come.
const APART_TRIES: u32 = 60;
const APART_AGAIN: Duration = Duration::from_secs(1);
/// A node with less room for memory takes no part.
pub(crate) const ROOM_BYTES_MIN: u64 = 16 << 20;
/// How long a member's process is waited for at a time.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// What an owner asks of a member's node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartOffer {
    pub(crate) machine: MachineName,
    #[serde(with = "keel_machine::past::spec_for_others")]
    pub(crate) spec: Spec,
    pub(crate) program: Fingerprint,
    pub(crate) me: PartId,
    pub(crate) parts: PartSet,
    /// CPU features that must be here.
    pub(crate) features: Vec<String>,
    /// Parts of the machine that are to be here.
    pub(crate) sharing: u32,
}

/// A member that is ready to meet the others.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReadyMember {
    /// Its worker's name on its node.
    pub(crate) worker: MachineName,
    pub(crate) place: Place,
}

/// Which member is to meet whom; without `join` it ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartJoin {
    pub(crate) worker: MachineName,
    pub(crate) join: Option<Join>,
}

pub(crate) fn text(error: RpcError) -> String {
    match error {
        RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } if is_older(&reason) => {
            OLDER.into()
        }
        RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => reason,
        other => other.to_string(),
    }
}

// ── a member's node ─────────────────────────────────────────────────────

/// Whether this node's CPU has what a machine needs.
pub(crate) fn has_features(needed: &[String]) -> Result<(), String> {
    let here = crate::agent::cpu_features();
    let missing = needed.iter().filter(|it| !here.contains(it));
    let missing: Vec<&str> = missing.map(String::as_str).collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(format!("this node's CPU lacks {}", missing.join(", "))),
    }
}

/// What this node has room for, if that is less than the machine may have.
async fn room_for_part(agent: &Agent, offer: &PartOffer) -> Result<Option<u64>, String> {
    let room = crate::offer::room_bytes(agent, &offer.machine).await?;
    let room = room / u64::from(offer.sharing.max(1));
    match room < ROOM_BYTES_MIN {
        true => Err(format!(
            "it has room for {} MiB of memory, and a part begins with {} MiB",
            room >> 20,
            ROOM_BYTES_MIN >> 20
        )),
        false => Ok((room < offer.spec.memory_bytes).then_some(room)),
    }
}

fn ready_part(
    agent: &Agent,
    offer: PartOffer,
    program: std::path::PathBuf,
    room_bytes: Option<u64>,
) -> ReadyPart {
    ReadyPart {
        machine: offer.machine,
        room_bytes,
        spec: offer.spec,
        program,
        me: offer.me,
        meet: MeetParts {
            parts: offer.parts,
            address: agent.settings.listen.ip().to_string(),
        },
    }
}

/// Makes a member's worker.
pub(crate) async fn ready(
    agent: &Arc<Agent>,
    owner: &NodeName,
    offer: PartOffer,
) -> Result<ReadyMember, String> {
    has_features(&offer.features)?;
    let room_bytes = room_for_part(agent, &offer).await?;
    let program = crate::service::find_program(agent, owner, &offer.program).await?;
    let name = format!("part-{:016x}", rand::random::<u64>());
    let name = MachineName::new(&name).map_err(|error| error.to_string())?;
    let dir = agent.dir.of_parts();
    let started = agent.parts.start(&dir, &name, Leftovers::Remove).await;
    let worker = match started {
        Ok(worker) => worker,
        Err(error) => {
            agent.parts.forget(&dir, &name).await;
            return Err(error);
        }
    };
    let ready = ready_part(agent, offer, program, room_bytes);
    match worker.ask(kind::PART_READY, &ready, COMPILE_PATIENCE).await {
        Ok(place) => {
            clear_at_end(agent, &name, worker);
            Ok(ReadyMember {
                worker: name,
                place,
            })
        }
        Err(error) => {
            agent.parts.forget(&dir, &name).await;
            Err(text(error))
        }
    }
}

/// The worker here to which a machine moves is to be a part of it first.
pub(crate) async fn ready_arriving(
    agent: &Arc<Agent>,
    owner: &NodeName,
    offer: PartOffer,
) -> Result<ReadyMember, String> {
    has_features(&offer.features)?;
    let room_bytes = room_for_part(agent, &offer).await?;
    let worker = arriving(agent, &offer.machine).await?;
    let program = crate::service::find_program(agent, owner, &offer.program).await?;
    let name = offer.machine.clone();
    let ready = ready_part(agent, offer, program, room_bytes);
    let place = worker.ask(kind::PART_READY, &ready, COMPILE_PATIENCE).await;
    Ok(ReadyMember {
        worker: name,
        place: place.map_err(text)?,
    })
}

/// It meets the others; where that is not wanted any more it goes on waiting for its source.
pub(crate) async fn join_arriving(agent: &Arc<Agent>, request: PartJoin) -> Result<(), String> {
    let Some(join) = &request.join else {
        return Ok(());
    };
    let worker = arriving(agent, &request.worker).await?;
    let joined: Result<(), RpcError> = worker.ask(kind::JOIN, join, SPAN_PATIENCE).await;
    joined.map_err(text)?;
    mark(agent, &request.worker, &worker);
    Ok(())
}

async fn arriving(agent: &Agent, machine: &MachineName) -> Result<Worker, String> {
    let none = || format!("machine {machine:?} does not arrive here");
    let worker = agent.workers.get(machine).ok_or_else(none)?;
    match worker.state().await {
        Ok(State::Receiving { .. }) => Ok(worker),
        Ok(_) => Err(none()),
        Err(error) => Err(text(error)),
    }
}

/// The part of a machine that a worker is to which it moves, or was to move.
///
/// # Errors
/// Where that is not known.
pub(crate) async fn part_of(worker: &Worker) -> Result<Option<PartId>, String> {
    match worker.ask(kind::IS_PART, &(), PROMPT).await.map_err(text) {
        // (One of an older version is none.)
        Err(why) if why == OLDER => Ok(None),
        answer => answer,
    }
}

/// As [`part_of`], of the worker here to which a machine was to move.
pub(crate) async fn arrived_part(
    agent: &Agent,
    machine: &MachineName,
) -> Result<Option<PartId>, String> {
    match agent.workers.get(machine) {
        Some(worker) => part_of(&worker).await,
        None => Ok(None),
    }
}

/// A member meets the others, or ends.
pub(crate) async fn join(agent: &Arc<Agent>, request: PartJoin) -> Result<(), String> {
    let dir = agent.dir.of_parts();
    let Some(join) = &request.join else {
        agent.parts.forget(&dir, &request.worker).await;
        return Ok(());
    };
    let worker = agent.parts.get(&request.worker);
    let worker = worker.ok_or("it has ended, or its node's agent is another one")?;
    match worker.ask(kind::JOIN, join, SPAN_PATIENCE).await {
        Ok(()) => Ok(()),
        Err(error) => {
            agent.parts.forget(&dir, &request.worker).await;
            Err(text(error))
        }
    }
}

/// Removes what is left of a member when its process has ended.
fn clear_at_end(agent: &Arc<Agent>, name: &MachineName, worker: Worker) {
    let (agent, name) = (agent.clone(), name.clone());
    tokio::spawn(async move {
        while !worker.gone_within(LOOK_AGAIN).await {}
        agent.parts.forget(&agent.dir.of_parts(), &name).await;
    });
}

/// Notes for the balancer that a machine spans, until its worker has ended.
fn mark(agent: &Arc<Agent>, machine: &MachineName, worker: &Worker) {
    if !agent.spanning().insert(machine.clone()) {
        return;
    }
    let (agent, machine, worker) = (agent.clone(), machine.clone(), worker.clone());
    tokio::spawn(async move {
        while !worker.gone_within(LOOK_AGAIN).await {}
        agent.spanning().remove(&machine);
    });
}

/// A machine runs here: where it spans the balancer knows, and what moves of its home that
/// failed have left is let go.
pub(crate) async fn runs_here(agent: &Arc<Agent>, machine: &MachineName, worker: &Worker) {
    if matches!(worker.report().await, Ok(report) if report.parts > 0) {
        mark(agent, machine, worker);
        let_successors_go(agent, machine).await;
    }
}

/// Finds the members that an earlier agent of this node made, and the machines that span.
pub(crate) async fn adopt(agent: &Arc<Agent>) {
    for machine in agent.workers.names() {
        let Some(worker) = agent.workers.get(&machine) else {
            continue;
        };
        if matches!(worker.report().await, Ok(report) if report.parts > 0) {
            mark(agent, &machine, &worker);
        }
    }
    let dir = agent.dir.of_parts();
    agent.parts.adopt(&dir).await;
    for name in agent.parts.names() {
        if let Some(worker) = agent.parts.get(&name) {
            clear_at_end(agent, &name, worker);
        }
    }
}

// ── the owner ───────────────────────────────────────────────────────────

/// A machine's worker here.
fn home(agent: &Agent, machine: &MachineName) -> Result<Worker, OperateError> {
    agent
        .workers
        .get(machine)
        .ok_or_else(|| OperateError::Conflict(format!("machine {machine:?} does not run")))
}

async fn ask<A: DeserializeOwned>(
    worker: &Worker,
    kind: u16,
    question: &impl Serialize,
    patience: Duration,
) -> Result<A, OperateError> {
    let answer = worker.ask(kind, question, patience).await;
    answer.map_err(|error| OperateError::Conflict(text(error)))
}

async fn report(worker: &Worker) -> Result<Report, OperateError> {
    let report = worker.report().await;
    report.map_err(|error| OperateError::Away(error.to_string()))
}

/// The nodes of the members: of all that are named but the owner's, once.
fn members(agent: &Agent, named: &[String]) -> Result<BTreeMap<PartId, NodeName>, OperateError> {
    let mut nodes = Vec::new();
    for name in named {
        let node = NodeName::new(name).map_err(|error| OperateError::Bad(error.to_string()))?;
        if !agent.members.contains(&node) {
            return Err(OperateError::Missing(format!(
                "there is no node {node:?} (see `keel nodes`)"
            )));
        }
        nodes.push(node);
    }
    // One of them is the home itself.
    if let Some(at) = nodes.iter().position(|node| *node == agent.name) {
        nodes.remove(at);
    }
    if nodes.is_empty() {
        return Err(OperateError::Bad(format!(
            "its home is on {}: name other nodes, or that one twice",
            agent.name
        )));
    }
    let count = nodes.len();
    let parts = (1..).map_while(PartId::new).zip(nodes);
    let members: BTreeMap<PartId, NodeName> = parts.collect();
    match members.len() == count {
        true => Ok(members),
        false => Err(OperateError::Bad(format!(
            "a machine has at most {PARTS_MAX} parts"
        ))),
    }
}

/// Lets a machine that runs here span nodes; of one that spans already parts come and go.
pub(crate) async fn span(
    agent: &Arc<Agent>,
    machine: &MachineName,
    request: &SpanRequest,
) -> Result<PartsInfo, OperateError> {
    let members = members(agent, &request.nodes)?;
    // A move, or other limits, would contradict it.
    let _setting = agent.setting.lock().await;
    if agent.moves().contains_key(machine) {
        return Err(OperateError::Conflict(format!(
            "machine {machine:?} is moving; try again when it is there"
        )));
    }
    let worker = home(agent, machine)?;
    let found = report(&worker).await?;
    if !matches!(found.state, State::Running { .. }) {
        return Err(OperateError::Conflict(format!(
            "machine {machine:?} does not run yet, or is still arriving"
        )));
    };
    let record = crate::record::get(&*agent.store, machine).await?.record;
    if found.parts > 0 && request.here {
        return Err(OperateError::Bad(format!(
            "machine {machine:?} has parts already: where threads begin is said when it gets the first (`keel unspan {machine}`)"
        )));
    }
    if found.parts > 0 {
        let nodes: Vec<NodeName> = members.into_values().collect();
        let stood = change(agent, machine, &record.spec, &worker, &found, &nodes).await?;
        let mut info = parts_of(agent, machine).await?;
        info.stood_micros = Some(stood);
        return Ok(info);
    }
    let stood = spread(agent, &record, &worker, &found, &members, request.here).await?;
    let mut info = parts_of(agent, machine).await?;
    info.stood_micros = Some(stood);
    Ok(info)
}

/// A machine that spans has parts on these nodes, and its home, and on no others.
/// Microseconds that it stood still.
async fn change(
    agent: &Arc<Agent>,
    machine: &MachineName,
    spec: &Spec,
    worker: &Worker,
    found: &Report,
    nodes: &[NodeName],
) -> Result<u64, OperateError> {
    let (State::Running { epoch }, Some(program)) = (&found.state, found.program) else {
        return Err(OperateError::Conflict("it has no module".into()));
    };
    let spanning = Spanning {
        agent,
        machine,
        spec,
        worker,
        program: Fingerprint(program),
        epoch: *epoch,
    };
    let mut changed = Changed::default();
    let done = spanning.change(nodes, &mut changed).await;
    let named = |nodes: &[NodeName]| {
        let nodes: Vec<&str> = nodes.iter().map(NodeName::as_str).collect();
        nodes.join(", ")
    };
    let what = match (&changed.came[..], &changed.went[..]) {
        ([], []) => return done.map(|()| 0),
        (came, []) => format!("has parts on {}, too", named(came)),
        ([], went) => format!("has no part on {} any more", named(went)),
        (came, went) => format!("has parts on {}, and none on {}", named(came), named(went)),
    };
    let stood = changed.stood as f64 / 1000.0;
    let what = format!("{what}; it stood still for {stood:.1} ms");
    let note = Note::machine(EventKind::MachineSpans, machine, what);
    agent.events.record(note.under(*epoch));
    done.map(|()| changed.stood)
}

/// A machine that is held gets parts on these nodes, further than its home.
pub(crate) async fn span_held(
    agent: &Arc<Agent>,
    record: &Record,
    worker: &Worker,
    nodes: &[NodeName],
) -> Result<(), OperateError> {
    let _setting = agent.setting.lock().await;
    let members = (1..).map_while(PartId::new).zip(nodes.iter().cloned());
    let members = members.collect();
    let found = report(worker).await?;
    spread(agent, record, worker, &found, &members, false).await?;
    Ok(())
}

/// All parts are made and meet, or nothing of it stays. Microseconds that the machine
/// stood still.
async fn spread(
    agent: &Arc<Agent>,
    record: &Record,
    worker: &Worker,
    found: &Report,
    members: &BTreeMap<PartId, NodeName>,
    here: bool,
) -> Result<u64, OperateError> {
    let (machine, spec) = (&record.name, &record.spec);
    let (State::Running { epoch } | State::Held { epoch }) = found.state else {
        return Err(OperateError::Conflict(format!(
            "machine {machine:?} does not run any more"
        )));
    };
    let program = found.program.map(Fingerprint);
    let program = program.ok_or_else(|| OperateError::Conflict("it has no module".into()))?;
    // What its parts are to keep is not in what its worker was started with.
    crate::set::tell_spec(worker, record).await;
    let spawning = match spec.balancing.spawn {
        _ if here => Spawning::Here,
        Spawn::Here => Spawning::Here,
        Spawn::Spread => Spawning::Even,
        Spawn::Auto => Spawning::Room,
    };
    let parts: PartSet = members
        .keys()
        .copied()
        .collect::<PartSet>()
        .with(PartId::HOME);
    // Parts on one node share what it has room for.
    let sharing = |node: &NodeName| {
        let members = members.values().filter(|it| *it == node).count();
        members as u32 + u32::from(*node == agent.name)
    };
    let offer = |me: PartId, node: &NodeName| PartOffer {
        sharing: sharing(node),
        machine: machine.clone(),
        spec: spec.clone(),
        program,
        me,
        parts,
        features: crate::moving::needed_features(),
    };
    let offers = members.iter().map(|(part, node)| {
        let offer = offer(*part, node);
        async move {
            let ready = ready_on(agent, node, offer, Comes::Anew).await;
            let ready = ready.map_err(|why| format!("no part on {node}: {why}"));
            ready.map(|ready| (*part, ready))
        }
    });
    let offered = join_all(offers).await;
    let mut ready: BTreeMap<PartId, ReadyMember> = BTreeMap::new();
    let mut refused = None;
    for outcome in offered {
        match outcome {
            Ok((part, member)) => drop(ready.insert(part, member)),
            Err(why) => refused = refused.or(Some(why)),
        }
    }
    let spans = match refused {
        Some(why) => Err(Unmet::certain(OperateError::Conflict(why))),
        None => {
            // (Of one that is held nothing is there yet, however large it is.)
            let has_bytes = match found.state {
                State::Held { .. } => 0,
                _ => found.memory_bytes,
            };
            let own = own_room(agent, machine, spec, has_bytes, sharing(&agent.name)).await;
            let how = How {
                spawning,
                room_bytes: own,
            };
            meet(agent, worker, epoch, members, &ready, how).await
        }
    };
    let stood = match spans {
        Ok(stood) => stood,
        Err(Unmet { error, in_doubt }) => {
            // It may have begun, with only its answer lost or late: it is alone before its
            // members are ended. (Never where it said that it did not begin: what it spans
            // then is another's doing.)
            // (One that is held is ended by whoever began it: it must not run as it is.)
            let is_held = matches!(found.state, State::Held { .. });
            if in_doubt && !is_held {
                let alone = worker
                    .ask::<_, u64>(kind::UNSPAN, &(), UNSPAN_PATIENCE)
                    .await;
                if let Err(RpcError::Failed { reason, .. }) = &alone {
                    tracing::debug!(reason, "it did not begin to span");
                }
            }
            let ends = members.iter().filter_map(|(part, node)| {
                let member = ready.get(part)?;
                let request = PartJoin {
                    worker: member.worker.clone(),
                    join: None,
                };
                Some(join_on(agent, node, request, Comes::Anew))
            });
            // (Who cannot be told ends by itself, since it meets nobody in time.)
            join_all(ends).await;
            return Err(error);
        }
    };
    let nodes: Vec<&str> = members.values().map(NodeName::as_str).collect();
    let what = format!(
        "spans {} and {}; it stood still for {:.1} ms",
        agent.name,
        nodes.join(", "),
        stood as f64 / 1000.0
    );
    mark(agent, machine, worker);
    let note = Note::machine(EventKind::MachineSpans, machine, what);
    agent.events.record(note.under(epoch));
    Ok(stood)
}

/// Why parts did not meet.
struct Unmet {
    error: OperateError,
    /// Whether the machine may span all the same: nobody said that it does not.
    in_doubt: bool,
}

impl Unmet {
    fn certain(error: OperateError) -> Unmet {
        Unmet {
            error,
            in_doubt: false,
        }
    }
}

/// How a home is to span.
struct How {
    spawning: Spawning,
    room_bytes: Option<u64>,
}

/// What the home can keep here: what it has, and what is free beside; `None` if that is
/// all that the machine may have, or not known.
async fn own_room(
    agent: &Agent,
    machine: &MachineName,
    spec: &Spec,
    has_bytes: u64,
    sharing: u32,
) -> Option<u64> {
    let free = crate::offer::room_bytes(agent, machine).await;
    let free = free
        .inspect_err(|error| tracing::warn!(%machine, error, "its home keeps all that comes"))
        .ok()?;
    home_room(has_bytes, free, sharing, spec.memory_bytes)
}

/// What the home of a machine that may have `most` bytes can keep, where that is less.
fn home_room(has_bytes: u64, free: u64, sharing: u32, most: u64) -> Option<u64> {
    let room = has_bytes.saturating_add(free / u64::from(sharing.max(1)));
    (room < most).then_some(room)
}

/// All parts meet; microseconds that the machine stood still.
async fn meet(
    agent: &Arc<Agent>,
    worker: &Worker,
    epoch: Epoch,
    members: &BTreeMap<PartId, NodeName>,
    ready: &BTreeMap<PartId, ReadyMember>,
    how: How,
) -> Result<u64, Unmet> {
    let parts = members
        .keys()
        .copied()
        .collect::<PartSet>()
        .with(PartId::HOME);
    let address = agent.settings.listen.ip().to_string();
    let own: Place = ask(
        worker,
        kind::SPAN_READY,
        &MeetParts { parts, address },
        COMPILE_PATIENCE,
    )
    .await
    .map_err(Unmet::certain)?;
    let mut places: BTreeMap<PartId, Place> = ready
        .iter()
        .map(|(part, it)| (*part, it.place.clone()))
        .collect();
    places.insert(PartId::HOME, own);
    let join = Join { epoch, places };
    let mut nodes = members.clone();
    nodes.insert(PartId::HOME, agent.name.clone());
    let span = Span {
        join: join.clone(),
        nodes,
        spawning: how.spawning,
        room_bytes: how.room_bytes,
    };
    let joins = ready.iter().filter_map(|(part, member)| {
        let node = members.get(part)?;
        let request = PartJoin {
            worker: member.worker.clone(),
            join: Some(join.clone()),
        };
        Some(async move {
            let joined = join_on(agent, node, request, Comes::Anew).await;
            joined.map_err(|why| OperateError::Conflict(format!("no part on {node}: {why}")))
        })
    });
    let (stood, joined) = tokio::join!(
        worker.ask::<_, u64>(kind::SPAN, &span, SPAN_PATIENCE),
        try_join_all(joins)
    );
    // Where the home spans all have joined, whatever became of their answers. Else whoever
    // did not join is why it did not begin.
    match (stood, joined) {
        (Ok(stood), _) => Ok(stood),
        (Err(error), joined) => {
            let answered = matches!(error, RpcError::Failed { .. } | RpcError::Refused { .. });
            let why = OperateError::Conflict(text(error));
            Err(Unmet {
                error: joined.err().unwrap_or(why),
                in_doubt: !answered,
            })
        }
    }
}

pub(crate) async fn ready_on(
    agent: &Arc<Agent>,
    node: &NodeName,
    offer: PartOffer,
    comes: Comes,
) -> Result<ReadyMember, String> {
    if *node == agent.name {
        return ready(agent, node, offer).await;
    }
    let kind = match comes {
        Comes::Anew => node_kind::PART,
        Comes::Arriving => node_kind::ARRIVING_PART,
    };
    let payload = pack(&offer).map_err(|error| error.to_string())?;
    let answer = agent
        .peers
        .call(node, kind, payload, COMPILE_PATIENCE)
        .await
        .map_err(text)?;
    unpack(&answer).map_err(|error| error.to_string())
}

pub(crate) async fn join_on(
    agent: &Arc<Agent>,
    node: &NodeName,
    request: PartJoin,
    comes: Comes,
) -> Result<(), String> {
    if *node == agent.name {
        return join(agent, request).await;
    }
    let kind = match comes {
        Comes::Anew => node_kind::PART_JOIN,
        Comes::Arriving => node_kind::ARRIVING_JOIN,
    };
    let payload = pack(&request).map_err(|error| error.to_string())?;
    let answer = agent
        .peers
        .call(node, kind, payload, SPAN_PATIENCE)
        .await
        .map_err(text)?;
    unpack(&answer).map_err(|error| error.to_string())
}

/// Why a machine cannot be brought together here, if what its other parts have is more than
/// there is room for: nothing bounds what comes then, and its process would be ended for it.
async fn too_large(
    agent: &Agent,
    machine: &MachineName,
    worker: &Worker,
) -> Result<Option<String>, OperateError> {
    let room = crate::offer::room_bytes(agent, machine).await;
    let room = room.map_err(OperateError::Away)?;
    let others = |parts: &PartsReport| {
        let others = parts
            .memory
            .iter()
            .filter(|(part, _)| **part != PartId::HOME);
        others.map(|(_, memory)| memory.resident_bytes).sum::<u64>()
    };
    let mut wanted = others(&parts_report(worker).await?);
    if wanted > room {
        // Of pages that several have, copies do not count.
        let objects = objects_report(worker).await?.into_iter();
        let away = objects.filter(|object| object.owner != PartId::HOME);
        wanted = away.map(|object| object.bytes).sum();
    }
    Ok(does_not_fit(machine, &agent.name, wanted, room))
}

fn does_not_fit(machine: &MachineName, node: &NodeName, wanted: u64, room: u64) -> Option<String> {
    (wanted > room).then(|| {
        format!(
            "machine {machine:?} is larger than its node: its other parts have {} MiB, and {node} has room for {}; `keel checkpoint {machine} --to PLACE` keeps it as it is, and `keel restore {machine} --from PLACE --nodes ...` lets it begin on other nodes",
            wanted >> 20,
            room >> 20
        )
    })
}

/// Brings a machine's threads and pages home.
pub(crate) async fn unspan(agent: &Arc<Agent>, machine: &MachineName) -> Result<u64, OperateError> {
    let worker = home(agent, machine)?;
    if let Some(why) = too_large(agent, machine, &worker).await? {
        return Err(OperateError::Conflict(why));
    }
    let stood: u64 = ask(&worker, kind::UNSPAN, &(), UNSPAN_PATIENCE).await?;
    agent.spanning().remove(machine);
    let what = format!(
        "is on {} alone; it stood still for {:.1} ms",
        agent.name,
        stood as f64 / 1000.0
    );
    agent
        .events
        .record(Note::machine(EventKind::MachineAlone, machine, what));
    Ok(stood)
}

/// Where a machine's parts and threads were before its home moved.
#[derive(Debug, Clone)]
pub(crate) struct Apart {
    /// The node of each part, its home's first.
    nodes: Vec<NodeName>,
    /// Threads that were not at the home, and their nodes.
    threads: Vec<(u32, NodeName)>,
}

/// The part by which a machine's home moves.
pub(crate) struct Successor {
    /// Which.
    pub(crate) part: PartId,
    /// At which part the home's threads are meanwhile.
    pub(crate) threads_to: PartId,
    /// Where all was before.
    pub(crate) before: Apart,
}

/// Of a machine that spans: where it moves, its worker becomes one more part, to take the
/// home's place. `None` of one that is on one node.
pub(crate) async fn successor(
    agent: &Arc<Agent>,
    record: &Record,
    worker: &Worker,
    target: &NodeName,
) -> Result<Option<Successor>, OperateError> {
    let found = report(worker).await?;
    if found.parts == 0 {
        return Ok(None);
    }
    // (What others began of its parts is done first.)
    let _setting = agent.setting.lock().await;
    let report = parts_report(worker).await?;
    let members = report
        .nodes
        .iter()
        .filter(|(part, _)| **part != PartId::HOME);
    let threads = |part: PartId| report.threads.iter().filter(|it| it.part == part).count();
    // Best where they go in the end.
    let threads_to = members.min_by_key(|(part, node)| (*node != target, threads(**part)));
    let threads_to = threads_to.map(|(part, _)| *part);
    let threads_to =
        threads_to.ok_or_else(|| OperateError::Conflict("it has no other part".into()))?;
    let node = |part: &PartId| report.nodes.get(part).cloned();
    let away = report.threads.iter().filter(|it| it.part != PartId::HOME);
    let before = Apart {
        nodes: report.nodes.values().cloned().collect(),
        threads: away
            .filter_map(|thread| Some((thread.tid, node(&thread.part)?)))
            .collect(),
    };
    let program = found.program.map(Fingerprint);
    let spanning = Spanning {
        agent,
        machine: &record.name,
        spec: &record.spec,
        worker,
        program: program.ok_or_else(|| OperateError::Conflict("it has no module".into()))?,
        epoch: record.epoch,
    };
    // (Nothing of it may be kept while its home changes: a move comes first.)
    let _: () = ask(worker, kind::END_CHECKPOINT, &(), COMPILE_PATIENCE).await?;
    let (part, _) = spanning.add(target, Comes::Arriving).await?;
    Ok(Some(Successor {
        part,
        threads_to,
        before,
    }))
}

/// Parts with what was to be the home of a machine that stays here: also after an agent that
/// has died since. It needs nothing of them, and they would take part for ever.
pub(crate) async fn let_successors_go(agent: &Arc<Agent>, machine: &MachineName) {
    for _ in 0..APART_TRIES {
        match try_let_go(agent, machine).await {
            Ok(()) => return,
            Err(error) => tracing::debug!(%machine, %error, "it has a part too many"),
        }
        tokio::time::sleep(APART_AGAIN).await;
    }
}

async fn try_let_go(agent: &Arc<Agent>, machine: &MachineName) -> Result<(), OperateError> {
    let Some(worker) = agent.workers.get(machine) else {
        return Ok(());
    };
    if agent.moves().contains_key(machine) {
        return Err(OperateError::Conflict("it is moving again".into()));
    }
    let nodes = parts_report(&worker).await?.nodes;
    let others: BTreeSet<&NodeName> = nodes.values().filter(|it| **it != agent.name).collect();
    for node in others {
        let payload = pack(machine).map_err(|error| OperateError::Away(error.to_string()))?;
        let peers = &agent.peers;
        let answer = peers.call(node, node_kind::ARRIVED_PART, payload, PROMPT);
        let part: Option<PartId> = match answer.await.map_err(text) {
            Ok(answer) => unpack(&answer).map_err(|error| OperateError::Away(error.to_string()))?,
            // (Then nothing of the kind is there.)
            Err(why) if why == OLDER => None,
            Err(why) => return Err(OperateError::Away(why)),
        };
        let Some(part) = part.filter(|part| nodes.get(part) == Some(node)) else {
            continue;
        };
        let _setting = agent.setting.lock().await;
        if agent.moves().contains_key(machine) {
            return Err(OperateError::Conflict("it is moving again".into()));
        }
        let with = PartWith {
            part,
            threads_to: PartId::HOME,
        };
        let _: u64 = ask(&worker, kind::PART_WITH, &with, UNSPAN_PATIENCE).await?;
    }
    Ok(())
}

/// Lets a machine whose home moved, or was to, have parts where it had them, wherever its
/// home is now, in the background: it runs meanwhile, and where that cannot be it is said.
pub(crate) fn apart_again(agent: &Arc<Agent>, machine: &MachineName, before: Apart) {
    let (agent, machine) = (agent.clone(), machine.clone());
    tokio::spawn(async move {
        let mut last = String::new();
        for _ in 0..APART_TRIES {
            match try_apart(&agent, &machine, &before).await {
                Ok(()) => return,
                // It ended, or somebody else let it span.
                Err(OperateError::Missing(_)) => return,
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(APART_AGAIN).await;
        }
        let what = format!("its parts are not where they were before it moved: {last}");
        tracing::warn!(%machine, what, "spanning");
        agent
            .events
            .record(Note::machine(EventKind::MachineSpans, &machine, what));
    });
}

/// Threads go where they were.
async fn send_back(agent: &Arc<Agent>, machine: &MachineName, before: &Apart, nodes: &[String]) {
    for (tid, node) in &before.threads {
        if !nodes.iter().any(|it| *it == node.as_str()) {
            continue;
        }
        let thread = Operation::MoveThread {
            machine: machine.clone(),
            tid: *tid,
            to: node.to_string(),
        };
        // (One that has ended meanwhile.)
        if let Err(error) = operate::anywhere(agent, thread).await {
            tracing::debug!(%machine, tid, %error, "a thread stays at its home");
        }
    }
}

async fn try_apart(
    agent: &Arc<Agent>,
    machine: &MachineName,
    before: &Apart,
) -> Result<(), OperateError> {
    let record = crate::record::get(&*agent.store, machine).await?.record;
    if record.status.ended() {
        return Err(OperateError::Missing("it has ended".into()));
    }
    // A home that went where no part was takes its old home's place.
    let stays = before.nodes.contains(&record.owner);
    let nodes = before.nodes.iter().skip(usize::from(!stays));
    let mut wanted = Vec::new();
    for node in nodes {
        if crate::balancer::forbidden(agent, machine, node)
            .await
            .is_none()
        {
            wanted.push(node.to_string());
        }
    }
    if wanted.iter().all(|node| *node == record.owner.as_str()) {
        return Err(OperateError::Missing("no part may be anywhere else".into()));
    }
    let span = Operation::Span {
        machine: machine.clone(),
        request: SpanRequest {
            nodes: wanted.clone(),
            here: false,
        },
    };
    operate::anywhere(agent, span).await?;
    send_back(agent, machine, before, &wanted).await;
    Ok(())
}

/// What parts and threads it has.
pub(crate) async fn parts_of(
    agent: &Arc<Agent>,
    machine: &MachineName,
) -> Result<PartsInfo, OperateError> {
    let worker = home(agent, machine)?;
    Ok(info(&parts_report(&worker).await?, &agent.name))
}

fn info(report: &PartsReport, home: &NodeName) -> PartsInfo {
    let mut nodes = report.nodes.clone();
    nodes.entry(PartId::HOME).or_insert_with(|| home.clone());
    let node = |part: PartId| nodes.get(&part).map_or("?", NodeName::as_str).to_owned();
    let parts = nodes.iter().map(|(part, node)| {
        let threads = report.threads.iter().filter(|it| it.part == *part);
        PartInfo {
            part: part.number() as u32,
            node: node.to_string(),
            threads: threads.count() as u32,
            memory: report.memory.get(part).map(|memory| PartMemoryInfo {
                resident_bytes: memory.resident_bytes,
                limit_bytes: memory.limit_bytes,
                given_bytes: memory.given_bytes,
                dropped_bytes: memory.dropped_bytes,
            }),
        }
    });
    let threads = report.threads.iter().map(|thread| ThreadInfo {
        tid: thread.tid,
        part: thread.part.number() as u32,
        node: node(thread.part),
        state: match (thread.moves_to, thread.waits) {
            (Some(_), _) => "moving",
            (None, true) => "waiting",
            (None, false) => "running",
        }
        .into(),
        cpu_micros: thread.took.as_ref().map(|took| took.time.run_ns / 1000),
        stood_micros: {
            let mut by_node: BTreeMap<String, u64> = BTreeMap::new();
            let stood = thread.took.iter().flat_map(|took| &took.stood);
            for (from, micros) in stood {
                *by_node.entry(node(*from)).or_default() += micros;
            }
            by_node
        },
        likes: thread.likes.clone(),
    });
    PartsInfo {
        parts: parts.collect(),
        threads: threads.collect(),
        waits: report.waits.clone(),
        stood_micros: None,
    }
}

/// Its memory in pieces, by who holds them.
pub(crate) async fn objects(
    agent: &Arc<Agent>,
    machine: &MachineName,
) -> Result<Vec<ObjectInfo>, OperateError> {
    let worker = home(agent, machine)?;
    let report = parts_report(&worker).await?;
    let objects = objects_report(&worker).await?;
    // (A worker from before an upgrade does not know it.)
    let heat = heat_of(&worker).await.unwrap_or_else(|error| {
        tracing::debug!(%machine, %error, "how its memory is used");
        Heat::default()
    });
    let node = |part: PartId| match report.nodes.get(&part) {
        Some(node) => node.to_string(),
        // (It is on one node.)
        None => agent.name.to_string(),
    };
    let info = |object: ObjectReport| {
        let hot = hot_in(&heat, &object);
        let idle = idle_in(&heat, &object);
        let count = |of: fn(Sharing) -> bool| {
            let pages = hot.iter().filter(|page| of(page.sharing));
            pages.count() as u32
        };
        ObjectInfo {
            range: keel_api::object_range_name(object.memory, object.start, object.bytes),
            waits: hot.iter().map(|page| page.waits).sum(),
            shared_pages: count(|sharing| sharing != Sharing::Nothing),
            falsely_shared_pages: count(|sharing| sharing == Sharing::PageOnly),
            idle_bytes: idle.iter().map(|range| range.end - range.start).sum(),
            name: object.name,
            bytes: object.bytes,
            part: object.owner.number() as u32,
            node: node(object.owner),
            readers: object.readers.iter().map(node).collect(),
            exchanges: object.exchanges,
            directory: node(object.directory),
        }
    };
    Ok(objects.into_iter().map(info).collect())
}

/// Brings a piece of memory, or an object by its name, to the part on a node; bytes that
/// have been there.
pub(crate) async fn move_object(
    agent: &Arc<Agent>,
    machine: &MachineName,
    name: &str,
    to: &str,
) -> Result<u64, OperateError> {
    let worker = home(agent, machine)?;
    let report = parts_report(&worker).await?;
    let to = part_on(&info(&report, &agent.name), machine, to)?;
    if let Some((memory, start, bytes)) = keel_api::object_range(name) {
        let object = MoveObject {
            memory,
            start,
            bytes,
            to,
        };
        return whole_object_to(&worker, object).await;
    }
    let objects = objects_report(&worker).await?.into_iter();
    let pieces: Vec<ObjectReport> = objects
        .filter(|object| object.name.as_deref() == Some(name))
        .collect();
    if pieces.is_empty() {
        return Err(OperateError::Missing(format!(
            "the program {machine:?} calls nothing {name:?}, and it is no range: FIRST-END in hexadecimal bytes, as 0x10000-0x20000 (see `keel objects {machine}`)"
        )));
    }
    let mut moved = 0;
    for piece in pieces {
        let object = MoveObject {
            memory: piece.memory,
            start: piece.start,
            bytes: piece.bytes,
            to,
        };
        moved += whole_object_to(&worker, object).await?;
    }
    Ok(moved)
}

/// As its worker tells of it: parts, and what each thread takes.
pub(crate) async fn parts_report(worker: &Worker) -> Result<PartsReport, OperateError> {
    ask(worker, kind::PARTS, &(), PROMPT).await
}

/// Pages that threads waited for, in a piece of memory.
pub(crate) fn hot_in<'a>(heat: &'a Heat, object: &ObjectReport) -> &'a [HotPage] {
    let end = object.start.saturating_add(object.bytes);
    let before = |at: u64| {
        let is_before = |page: &HotPage| (page.memory, page.start()) < (object.memory, at);
        heat.hot.partition_point(is_before)
    };
    let within = before(object.start)..before(end);
    heat.hot.get(within).unwrap_or_default()
}

/// What the part that has a piece of memory does not use of it.
pub(crate) fn idle_in(heat: &Heat, object: &ObjectReport) -> Vec<Range<u64>> {
    let end = object.start.saturating_add(object.bytes);
    let all = heat.idle.get(&object.owner).map_or(&[][..], Vec::as_slice);
    let first = all.partition_point(|range| {
        (range.memory, range.start.saturating_add(range.bytes)) <= (object.memory, object.start)
    });
    let behind = all[first..].iter();
    let within = behind.take_while(|range| range.memory == object.memory && range.start < end);
    within
        .map(|range| {
            let until = range.start.saturating_add(range.bytes);
            range.start.max(object.start)..until.min(end)
        })
        .filter(|range| range.start < range.end)
        .collect()
}

/// How its memory was used of late.
pub(crate) async fn heat_of(worker: &Worker) -> Result<Heat, OperateError> {
    ask(worker, kind::HEAT, &(), PROMPT).await
}

/// Its memory in pieces, as its worker tells of it.
pub(crate) async fn objects_report(worker: &Worker) -> Result<Vec<ObjectReport>, OperateError> {
    ask(worker, kind::OBJECTS, &(), PROMPT).await
}

/// Lets a thread go to a part.
pub(crate) async fn thread_to(worker: &Worker, thread: MoveThread) -> Result<(), OperateError> {
    ask(worker, kind::MOVE_THREAD, &thread, COMPILE_PATIENCE).await
}

/// As [`object_to`], however long it takes while more and more of it is there.
async fn whole_object_to(worker: &Worker, object: MoveObject) -> Result<u64, OperateError> {
    let (start, bytes) = (object.start / PAGE_BYTES * PAGE_BYTES, object.bytes);
    let end = object.start.saturating_add(bytes);
    let mut done = 0;
    loop {
        let from = start.saturating_add(done);
        let rest = MoveObject {
            start: from,
            bytes: end.saturating_sub(from),
            ..object
        };
        done += match object_to(worker, rest).await {
            Ok(moved) => moved,
            Err(error) if done == 0 => return Err(error),
            Err(error) => {
                return Err(OperateError::Conflict(format!(
                    "{done} of {bytes} bytes are there, the rest is not: {error}"
                )));
            }
        };
        if start.saturating_add(done) >= end {
            return Ok(done);
        }
    }
}

/// Brings a piece of memory to a part; bytes from its first on that have been there, before
/// it takes too long.
pub(crate) async fn object_to(worker: &Worker, object: MoveObject) -> Result<u64, OperateError> {
    ask(worker, kind::MOVE_OBJECT, &object, SPAN_PATIENCE).await
}

/// Says how many cores are free at each part: new threads begin where most are.
pub(crate) async fn tell_room(
    worker: &Worker,
    room: &BTreeMap<PartId, f64>,
) -> Result<(), OperateError> {
    ask(worker, kind::ROOM, room, PROMPT).await
}

/// The part of a machine on a node; of several the one with the fewest threads.
fn part_on(found: &PartsInfo, machine: &MachineName, node: &str) -> Result<PartId, OperateError> {
    let there = found.parts.iter().filter(|part| part.node == node);
    let part = there.min_by_key(|part| part.threads);
    let part = part.and_then(|part| PartId::new(part.part as usize));
    part.ok_or_else(|| {
        OperateError::Missing(format!(
            "machine {machine:?} has no part on {node:?} (`keel parts {machine}` lists them, `keel span` makes them)"
        ))
    })
}

/// Moves a thread to the part on a node.
pub(crate) async fn move_thread(
    agent: &Arc<Agent>,
    machine: &MachineName,
    tid: u32,
    to: &str,
) -> Result<(), OperateError> {
    let worker = home(agent, machine)?;
    let report = parts_report(&worker).await?;
    let part = part_on(&info(&report, &agent.name), machine, to)?;
    if !report.threads.iter().any(|thread| thread.tid == tid) {
        return Err(OperateError::Missing(format!(
            "machine {machine:?} has no thread {tid} (see `keel threads {machine}`)"
        )));
    }
    thread_to(&worker, MoveThread { tid, to: part }).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_keeps_what_it_has_and_its_share_of_what_is_free() {
        const GIB: u64 = 1 << 30;
        assert_eq!(home_room(GIB, 8 * GIB, 1, 64 * GIB), Some(9 * GIB));
        assert_eq!(home_room(0, 8 * GIB, 2, 64 * GIB), Some(4 * GIB));
        assert_eq!(home_room(0, 8 * GIB, 1, 8 * GIB), None);
    }

    #[test]
    fn what_does_not_fit_is_not_brought_together_and_what_to_do_is_said() {
        let machine: MachineName = "big".parse().unwrap();
        let node = NodeName::new("a").unwrap();
        assert_eq!(does_not_fit(&machine, &node, 5 << 20, 5 << 20), None);
        let why = does_not_fit(&machine, &node, 700 << 20, 100 << 20).unwrap();
        for part in [
            "700 MiB",
            "a has room for 100",
            "keel checkpoint big",
            "--nodes",
        ] {
            assert!(why.contains(part), "{why}");
        }
    }
}
