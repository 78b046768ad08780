//! What users want done, wherever the machine is: operations go to its owner.

use crate::agent::Agent;
use crate::balancer::IO_TARGET_MAX;
use crate::events::Note;
use crate::moving::MoveOrder;
use crate::output;
use crate::record::{self, RecordError};
use crate::rules::{self, ClaimError};
use crate::service::kind as node_kind;
use crate::workers::PROMPT;
use keel_api::{
    CheckpointInfo, CheckpointRequest, ClusterInfo, DryRun, EventKind, MachineInfo, MoveLine,
    NodeInfo, ObjectInfo, PartsInfo, RunRequest, SetRequest, SpanRequest, StartPhaseInfo, Token,
    TokenRequest, VolumeInfo, VolumeRequest,
};
use keel_cluster::clock::unix_ms;
use keel_cluster::keys::{self, Key};
use keel_cluster::store::{Compare, Txn, TxnOutcome};
use keel_cluster::tokens::{self, Role};
use keel_cluster::{Epoch, MachineName, NodeName, members};
use keel_machine::moves::ownership;
use keel_machine::restart::Restart;
use keel_machine::span::{PART_BYTES_MIN, PARTS_MAX};
use keel_machine::spec::{Record, Spec, Status, Volume, VolumeKind};
use keel_machine::worker::control::{
    FileDone, FileOp, Report, StartProgress, State, kind, pack, unpack,
};
use keel_net::Fingerprint;
use keel_net::RpcError;
use keel_wasi::volume::VolumeLimits;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// How long a list waits for what the worker of a machine says that starts.
const LIST_PATIENCE: Duration = Duration::from_millis(500);
/// Pause between looks at a machine that something else is done with.
const BUSY_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// How long that may hold up a removal.
const BUSY_PATIENCE: Duration = Duration::from_secs(1);
/// How long a stopped machine may take to end.
const STOP_PATIENCE: Duration = Duration::from_secs(15);
/// Largest limits that a machine may ask for.
const MEMORY_BYTES_MAX: u64 = 64 << 30;
const THREADS_MAX: u32 = 16_384;
/// Volumes of one machine, and the size of its own ones.
const VOLUMES_MAX: usize = 64;
const VOLUME_BYTES_MIN: u64 = 64 << 10;
const VOLUME_BYTES_MAX: u64 = 8 << 40;
/// The smallest and largest `cpu.limit`, in thousandths of a core.
const CPU_LIMIT_MILLIS_MIN: u32 = 10;
const CPU_LIMIT_MILLIS_MAX: u32 = 1_000_000;

/// Why a limit of CPU time and parts do not go together.
pub(crate) const LIMITED_HAS_NO_PARTS: &str =
    "a limit of its CPU time is kept on one node only: a machine with one has no parts (max parts)";

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum OperateError {
    /// The user can mend it.
    #[error("{0}")]
    Bad(String),
    /// There is no such thing.
    #[error("{0}")]
    Missing(String),
    /// It contradicts what is.
    #[error("{0}")]
    Conflict(String),
    /// Somebody does not answer.
    #[error("{0}")]
    Away(String),
}

impl From<RecordError> for OperateError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::NoMachine(_) => OperateError::Missing(error.to_string()),
            RecordError::Contended(_) | RecordError::Refused(_) => {
                OperateError::Conflict(error.to_string())
            }
            RecordError::Store(_) | RecordError::Damaged(_) => {
                OperateError::Away(error.to_string())
            }
        }
    }
}

impl From<ClaimError> for OperateError {
    fn from(error: ClaimError) -> Self {
        match error {
            ClaimError::Store(error) => error.into(),
            error @ (ClaimError::Broken(_) | ClaimError::Draining(_) | ClaimError::Damaged(_)) => {
                OperateError::Conflict(error.to_string())
            }
        }
    }
}

impl From<keel_cluster::StoreError> for OperateError {
    fn from(error: keel_cluster::StoreError) -> Self {
        OperateError::Away(error.to_string())
    }
}

/// What an owner is asked to do with a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Operation {
    Stop {
        machine: MachineName,
        kill: bool,
    },
    Remove {
        machine: MachineName,
    },
    CancelMove {
        machine: MachineName,
    },
    Report {
        machine: MachineName,
    },
    Checkpoint {
        machine: MachineName,
        request: CheckpointRequest,
    },
    DryRun {
        machine: MachineName,
        target: NodeName,
        /// How long sending what is left may take, in microseconds.
        budget_micros: Option<u64>,
    },
    Set {
        machine: MachineName,
        request: SetRequest,
    },
    /// Something with a file in a volume; paths are the guest's.
    File {
        machine: MachineName,
        op: FileOp,
    },
    /// Parts on other nodes.
    Span {
        machine: MachineName,
        request: SpanRequest,
    },
    /// None any more.
    Unspan {
        machine: MachineName,
    },
    /// Which there are.
    Parts {
        machine: MachineName,
    },
    /// Its memory, by who holds it.
    Objects {
        machine: MachineName,
    },
    /// A piece of it goes to another part.
    MoveObject {
        machine: MachineName,
        name: String,
        to: String,
    },
    /// A thread goes to another one.
    MoveThread {
        machine: MachineName,
        tid: u32,
        to: String,
    },
    /// Where the output begins that was written at a time or later.
    LogSince {
        machine: MachineName,
        since_unix_ms: u64,
    },
}

impl Operation {
    fn machine(&self) -> &MachineName {
        match self {
            Operation::Stop { machine, .. }
            | Operation::Remove { machine }
            | Operation::CancelMove { machine }
            | Operation::Checkpoint { machine, .. }
            | Operation::DryRun { machine, .. }
            | Operation::Set { machine, .. }
            | Operation::LogSince { machine, .. }
            | Operation::Span { machine, .. }
            | Operation::Unspan { machine }
            | Operation::Parts { machine }
            | Operation::Objects { machine }
            | Operation::MoveObject { machine, .. }
            | Operation::MoveThread { machine, .. }
            | Operation::File { machine, .. }
            | Operation::Report { machine } => machine,
        }
    }
}

/// What an owner answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Done {
    Nothing,
    Report(Report),
    Checkpoint(CheckpointInfo),
    DryRun(Box<DryRun>),
    Offset(u64),
    File(FileDone),
    Parts(PartsInfo),
    Objects(Vec<ObjectInfo>),
}

type Answer = Result<Done, OperateError>;

/// Does what was asked on a machine that this node owns.
pub(crate) async fn here(agent: &Arc<Agent>, operation: Operation) -> Answer {
    match operation {
        Operation::Stop { machine, kill } => {
            stop(agent, &machine, kill).await?;
            Ok(Done::Nothing)
        }
        Operation::Remove { machine } => {
            let found = record::get(&*agent.store, &machine).await?;
            if !found.record.status.ended() {
                return Err(OperateError::Conflict(format!(
                    "machine {machine:?} is {}; stop it first (`keel stop {machine}`)",
                    found.record.status.word()
                )));
            }
            remove_here(agent, &machine).await?;
            Ok(Done::Nothing)
        }
        Operation::CancelMove { machine } => match agent.moves().get(&machine) {
            Some(handle) => {
                handle.cancel("it was cancelled");
                let text = "its move is to be cancelled";
                let asked = Note::machine(EventKind::MoveCancelled, &machine, text);
                agent.events.record(asked);
                Ok(Done::Nothing)
            }
            None => Err(OperateError::Conflict(format!(
                "machine {machine:?} is not moving"
            ))),
        },
        Operation::Report { machine } => match agent.workers.get(&machine) {
            Some(worker) => Ok(worker.report().await.map_or(Done::Nothing, Done::Report)),
            None => Ok(Done::Nothing),
        },
        Operation::Checkpoint { machine, request } => {
            crate::keep::checkpoint(agent, &machine, request)
                .await
                .map(Done::Checkpoint)
        }
        Operation::DryRun {
            machine,
            target,
            budget_micros,
        } => {
            let budget = budget_micros.map(Duration::from_micros);
            crate::dry_run::dry_run(agent, &machine, &target, budget)
                .await
                .map(|it| Done::DryRun(Box::new(it)))
        }
        Operation::Set { machine, request } => {
            crate::set::set(agent, &machine, &request).await?;
            Ok(Done::Nothing)
        }
        Operation::File { machine, op } => crate::files::here(agent, &machine, op)
            .await
            .map(Done::File),
        Operation::Span { machine, request } => {
            let spans = crate::spanning::span(agent, &machine, &request).await;
            spans.map(Done::Parts)
        }
        Operation::Unspan { machine } => crate::spanning::unspan(agent, &machine)
            .await
            .map(Done::Offset),
        Operation::Parts { machine } => crate::spanning::parts_of(agent, &machine)
            .await
            .map(Done::Parts),
        Operation::Objects { machine } => crate::spanning::objects(agent, &machine)
            .await
            .map(Done::Objects),
        Operation::MoveObject { machine, name, to } => {
            crate::spanning::move_object(agent, &machine, &name, &to)
                .await
                .map(Done::Offset)
        }
        Operation::MoveThread { machine, tid, to } => {
            crate::spanning::move_thread(agent, &machine, tid, &to).await?;
            Ok(Done::Nothing)
        }
        Operation::LogSince {
            machine,
            since_unix_ms,
        } => output::since(agent, &machine, since_unix_ms)
            .await
            .map(Done::Offset),
    }
}

async fn stop(agent: &Arc<Agent>, machine: &MachineName, kill: bool) -> Result<(), OperateError> {
    // A move in progress is ended first: what is stopped must not go on
    // elsewhere.
    let handle = agent.moves().get(machine).cloned();
    if let Some(handle) = handle {
        handle.cancel("the machine is being stopped");
        handle.over().await;
    }
    let found = record::get(&*agent.store, machine).await?;
    if found.record.owner != agent.name {
        return Err(OperateError::Conflict(format!(
            "machine {machine:?} just moved to {}; try again",
            found.record.owner
        )));
    }
    if found.record.status.ended() {
        return Ok(());
    }
    let how = if kill { "kill" } else { "stop" };
    agent.events.record(
        Note::machine(EventKind::StopAsked, machine, format!("is to end ({how})"))
            .under(found.record.epoch)
            .with("how", how),
    );
    // First: whatever becomes of it, it is not started again.
    let marked = mark_stopped(agent, machine).await?;
    if marked.status.ended() {
        if matches!(found.record.status, Status::Restarting { .. }) {
            let stopped = Note::status(&marked, &found.record.status);
            agent.events.record(stopped);
        }
        return Ok(());
    }
    let asked: Result<(), RpcError> = match agent.workers.get(machine) {
        Some(worker) if kill => {
            // What follows is seen as a lost worker.
            worker.kill().await;
            Ok(())
        }
        Some(worker) => worker.ask(kind::STOP, &(), PROMPT).await,
        // Whoever starts it just now sees that it is not wanted any more.
        None => Ok(()),
    };
    // (One that just came to its own end does not answer any more: its record says.)
    let deadline = tokio::time::Instant::now() + STOP_PATIENCE;
    loop {
        match record::get(&*agent.store, machine).await {
            Ok(found) if found.record.status.ended() => return Ok(()),
            Err(RecordError::NoMachine(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        if tokio::time::Instant::now() > deadline {
            let why = asked
                .err()
                .map_or_else(String::new, |error| format!(" ({error})"));
            return Err(OperateError::Away(format!(
                "machine {machine:?} does not end{why}; `keel kill {machine}` ends its process"
            )));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Writes that a user wants a machine to end. One that waits for its restart has
/// ended with that.
async fn mark_stopped(agent: &Arc<Agent>, machine: &MachineName) -> Result<Record, OperateError> {
    let entry = Key::Schedule(agent.name.clone(), machine.clone()).to_string();
    let starting = agent.busy().contains(machine) && agent.workers.get(machine).is_some();
    let mark = |record: &mut Record| {
        // It may have moved away meanwhile: then it is another node's to stop.
        let mine = record.owner == agent.name;
        let changes = mine && !record.stop_wanted && !record.status.ended();
        if changes {
            record.stop_wanted = true;
            if matches!(record.status, Status::Restarting { .. }) && !starting {
                record.enter(Status::Stopped, unix_ms());
            }
        }
        changes
    };
    let marked = record::update(&*agent.store, machine, mark, |txn, record| {
        match record.status.ended() {
            true => txn.delete(entry.clone()),
            false => txn,
        }
    })
    .await?;
    Ok(marked)
}

/// Removes an ended machine that this node owned: record, output, worker.
pub(crate) async fn remove_here(
    agent: &Arc<Agent>,
    machine: &MachineName,
) -> Result<(), RecordError> {
    // A new machine of that name may be started here as soon as the record is gone: it
    // waits until the folder is gone, too. (What sleeps until a restart that was called
    // off makes it wait by itself.)
    let deadline = tokio::time::Instant::now() + BUSY_PATIENCE;
    let mut guarded = agent.busy().insert(machine.clone());
    while !guarded && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(BUSY_AGAIN_AFTER).await;
        guarded = agent.busy().insert(machine.clone());
    }
    let removed = remove_guarded(agent, machine).await;
    if guarded {
        agent.busy().remove(machine);
    }
    removed
}

async fn remove_guarded(agent: &Arc<Agent>, machine: &MachineName) -> Result<(), RecordError> {
    let found = record::get(&*agent.store, machine).await?;
    if !found.record.status.ended() {
        return Err(RecordError::Refused(format!(
            "machine {machine:?} is {}",
            found.record.status.word()
        )));
    }
    let key = Key::Machine(machine.clone());
    let txn = Txn::new()
        .when_modified_at(key.clone(), found.revision)
        .delete(key)
        .delete(Key::Checkpoint(machine.clone()));
    let spec = &found.record.spec;
    let txn = crate::volumes::give_back(&*agent.store, machine, spec, txn).await?;
    let worker = agent.workers.get(machine);
    match agent.store.txn(txn).await? {
        TxnOutcome::Committed { .. } => {
            agent
                .workers
                .forget_exactly(&agent.dir, machine, worker.as_ref())
                .await;
            let text = "was removed with its output";
            let removed = Note::machine(EventKind::MachineRemoved, machine, text);
            agent.events.record(removed.under(found.record.epoch));
            Ok(())
        }
        TxnOutcome::Refused { .. } => Err(RecordError::Contended(machine.to_string())),
    }
}

/// Does what was asked wherever the machine is.
pub(crate) async fn anywhere(agent: &Arc<Agent>, operation: Operation) -> Answer {
    let owner = record::get(&*agent.store, operation.machine())
        .await?
        .record
        .owner;
    if owner == agent.name {
        return here(agent, operation).await;
    }
    let patience = match &operation {
        Operation::Checkpoint { .. } => crate::keep::PATIENCE,
        Operation::Span { .. } | Operation::Unspan { .. } => crate::spanning::PATIENCE,
        _ => 2 * STOP_PATIENCE,
    };
    let payload = pack(&operation).map_err(|error| OperateError::Bad(error.to_string()))?;
    let answer = agent
        .peers
        .call(&owner, node_kind::OPERATE, payload, patience)
        .await
        .map_err(|error| OperateError::Away(error.to_string()))?;
    unpack(&answer).map_err(|error| OperateError::Away(error.to_string()))?
}

/// Moves a machine, wherever it is.
pub(crate) async fn move_anywhere(
    agent: &Arc<Agent>,
    order: &MoveOrder,
) -> Result<mpsc::Receiver<MoveLine>, OperateError> {
    let machine = &order.machine;
    let owner = record::get(&*agent.store, machine).await?.record.owner;
    if owner == agent.name {
        return crate::moving::begin(agent, machine, order)
            .await
            .map_err(OperateError::Conflict);
    }
    let payload = pack(order).map_err(|error| OperateError::Bad(error.to_string()))?;
    let mut stream = agent
        .peers
        .stream(&owner, node_kind::MOVE, payload)
        .await
        .map_err(|error| match error {
            RpcError::Failed { reason, .. } => OperateError::Conflict(reason),
            other => OperateError::Away(other.to_string()),
        })?;
    let (send, lines) = mpsc::channel(64);
    tokio::spawn(async move {
        while let Some(item) = stream.recv().await {
            let line = item
                .and_then(|bytes| unpack(&bytes))
                .unwrap_or_else(|error: RpcError| MoveLine::Error(error.to_string()));
            if send.send(line).await.is_err() {
                return;
            }
        }
    });
    Ok(lines)
}

// ── starting and listing ────────────────────────────────────────────────

/// Puts a new machine into a node's schedule.
pub(crate) async fn run(
    agent: &Arc<Agent>,
    request: RunRequest,
) -> Result<MachineInfo, OperateError> {
    let bad = |what: String| OperateError::Bad(what);
    let name = match &request.name {
        Some(name) => MachineName::new(name).map_err(|error| bad(error.to_string()))?,
        None => MachineName::new(&format!("m-{:08x}", rand::random::<u32>()))
            .map_err(|error| bad(error.to_string()))?,
    };
    let spec = spec(&request)?;
    let of_host = |volume: &Volume| matches!(volume.kind, VolumeKind::Host { .. });
    let node = match &request.on {
        Some(node) => NodeName::new(node).map_err(|error| bad(error.to_string()))?,
        // A directory of a host is meant of the host where it is named.
        None if spec.volumes.iter().any(of_host) => agent.name.clone(),
        None => {
            let promised = request.balancing.memory_target_bytes;
            let memory_bytes = promised.unwrap_or(request.memory_bytes);
            crate::balancer::choose_node(agent, name.as_str(), memory_bytes).await
        }
    };
    if !agent.members.contains(&node) {
        return Err(OperateError::Missing(format!(
            "there is no node {node:?} (see `keel nodes`)"
        )));
    }
    crate::service::find_module(agent, &spec.module)
        .await
        .map_err(OperateError::Missing)?;
    let record = Record {
        name: name.clone(),
        spec,
        owner: node.clone(),
        epoch: Epoch::default(),
        status: Status::Scheduled,
        since_unix_ms: unix_ms(),
        started_unix_ms: 0,
        stop_wanted: false,
        restarts: 0,
        created_unix_ms: unix_ms(),
        paused: None,
        origin: None,
        reports: Vec::new(),
    };
    schedule(agent, record, None).await
}

/// Puts a new machine into its owner's schedule; its epochs begin above all that its
/// name ever had, and above the one under which it ran when its checkpoint was made.
pub(crate) async fn schedule(
    agent: &Arc<Agent>,
    mut record: Record,
    ran: Option<Epoch>,
) -> Result<MachineInfo, OperateError> {
    let (name, node) = (record.name.clone(), record.owner.clone());
    let alive = Key::Alive(node.clone());
    let claims = rules::claim(agent, &name, &node).await?;
    let txn = Txn::new()
        .when_absent(Key::Machine(name.clone()))
        .when(Compare::Exists {
            key: alive.to_string(),
        });
    let txn = record::first_epoch(&*agent.store, &mut record, ran, txn).await?;
    let txn = crate::volumes::take(agent, &mut record, txn).await?;
    let before = txn.compare.len();
    let txn = claims
        .add_to(txn)
        .put(Key::Machine(name.clone()), record::encode(&record)?)
        .put(Key::Schedule(node.clone(), name.clone()), Vec::new());
    match agent.store.txn(txn).await? {
        TxnOutcome::Committed { revision } => {
            record.epoch = ownership::created_at(record.epoch, revision);
            agent.events.record(Note::status(&record, &record.status));
            Ok(info(&record, None))
        }
        TxnOutcome::Refused { failed: 0, .. } => Err(OperateError::Conflict(format!(
            "the name {name:?} is in use (`keel rm {name}` frees it once the machine has ended)"
        ))),
        TxnOutcome::Refused { failed: 1, .. } => Err(OperateError::Away(format!(
            "node {node:?} is not alive (see `keel nodes`)"
        ))),
        TxnOutcome::Refused { failed: 2, .. } => Err(OperateError::Conflict(
            "a machine of another cluster was restored at the same time; try again".into(),
        )),
        TxnOutcome::Refused { failed, .. } => {
            Err(OperateError::Conflict(match claims.raced(failed, before) {
                Some(rule) => {
                    format!("others changed what rule {rule:?} holds at the same time; try again")
                }
                None => {
                    "a volume of it was just taken by another machine (see `keel volume ls`)".into()
                }
            }))
        }
    }
}

/// The spec that a request asks for, checked.
pub(crate) fn spec(request: &RunRequest) -> Result<Spec, OperateError> {
    let bad = |what: String| Err(OperateError::Bad(what));
    check_memory("limit", request.memory_bytes)?;
    if request.threads_max == 0 || request.threads_max > THREADS_MAX {
        return bad(format!(
            "a limit of {} threads: 1 to {THREADS_MAX} are possible",
            request.threads_max
        ));
    }
    if let Some(millis) = request.cpu_limit_millis {
        check_cpu("limit", millis)?;
    }
    if let Some(millis) = request.balancing.cpu_target_millis {
        check_cpu("target", millis)?;
    }
    if let Some(bytes) = request.balancing.memory_target_bytes {
        check_memory("target", bytes)?;
    }
    if let Some(rate) = request.balancing.io_target_bytes_per_s {
        check_io_target(rate)?;
    }
    if let Some(most) = request.balancing.parts_max {
        check_parts(most)?;
        if request.cpu_limit_millis.is_some() {
            return bad(LIMITED_HAS_NO_PARTS.into());
        }
    }
    if let Some(bytes) = request.balancing.part_memory_bytes {
        check_part_memory(bytes)?;
    }
    if request.args.is_empty() {
        return bad("no program name: the first argument is missing".into());
    }
    if request.remove_at_end && request.restart != Restart::No {
        return bad(format!(
            "a machine that is removed when it ends cannot be restarted too (restart = {:?})",
            request.restart.word()
        ));
    }
    if let Some(plan) = &request.checkpoints {
        crate::keep::check_plan(plan)?;
    }
    let volumes = volumes(&request.volumes)?;
    Ok(Spec {
        module: request.module.clone(),
        args: request.args.clone(),
        env: request.env.clone(),
        volumes,
        memory_bytes: request.memory_bytes,
        threads_max: request.threads_max,
        cpu_limit_millis: request.cpu_limit_millis,
        output_bytes_per_s: request.output_bytes_per_s,
        remove_at_end: request.remove_at_end,
        restart: request.restart,
        checkpoints: request.checkpoints.clone(),
        balancing: request.balancing,
    })
}

/// Whether a machine may ask for such a limit of each of its memories.
pub(crate) fn check_memory(what: &str, bytes: u64) -> Result<(), OperateError> {
    if (1 << 16..=MEMORY_BYTES_MAX).contains(&bytes) {
        return Ok(());
    }
    Err(OperateError::Bad(format!(
        "a memory {what} of {bytes} bytes: 64 KiB to 64 GiB are possible"
    )))
}

/// Whether parts of a machine may be asked to keep so much.
pub(crate) fn check_part_memory(bytes: u64) -> Result<(), OperateError> {
    if (PART_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) {
        return Ok(());
    }
    Err(OperateError::Bad(format!(
        "parts that keep {bytes} bytes each: 1 MiB to 64 GiB are possible"
    )))
}

/// Whether a machine may ask for such a `cpu.limit`.
pub(crate) fn check_cpu(what: &str, millis: u32) -> Result<(), OperateError> {
    if (CPU_LIMIT_MILLIS_MIN..=CPU_LIMIT_MILLIS_MAX).contains(&millis) {
        return Ok(());
    }
    Err(OperateError::Bad(format!(
        "a cpu {what} of {millis} thousandths of a core: {CPU_LIMIT_MILLIS_MIN} to {CPU_LIMIT_MILLIS_MAX} are possible"
    )))
}

/// Whether a machine may have so many parts.
pub(crate) fn check_parts(most: u32) -> Result<(), OperateError> {
    if (2..=PARTS_MAX as u32).contains(&most) {
        return Ok(());
    }
    Err(OperateError::Bad(format!(
        "a limit of {most} parts: 2 to {PARTS_MAX} are possible"
    )))
}

/// Whether a machine may promise so much disk traffic.
pub(crate) fn check_io_target(rate: u64) -> Result<(), OperateError> {
    if (1..=IO_TARGET_MAX).contains(&rate) {
        return Ok(());
    }
    Err(OperateError::Bad(format!(
        "an io target of {rate} bytes a second: 1 byte to 1 TiB are possible"
    )))
}

/// The volumes that a machine asks for, checked.
fn volumes(requests: &[VolumeRequest]) -> Result<Vec<Volume>, OperateError> {
    let bad = |what: String| Err(OperateError::Bad(what));
    if requests.len() > VOLUMES_MAX {
        return bad(format!("more than {VOLUMES_MAX} volumes"));
    }
    let mut volumes: Vec<Volume> = Vec::with_capacity(requests.len());
    for request in requests {
        let volume = match request {
            VolumeRequest::Host {
                host,
                guest,
                read_only,
            } => {
                if !host.starts_with('/') {
                    return bad(format!("volume {host:?}: the path must be absolute"));
                }
                Volume {
                    kind: VolumeKind::Host { path: host.clone() },
                    guest: guest.clone(),
                    read_only: *read_only,
                }
            }
            VolumeRequest::Tmp {
                bytes,
                inodes,
                guest,
            } => {
                let usual = VolumeLimits::of_bytes(*bytes);
                let inodes = inodes.unwrap_or(usual.inodes_max);
                if !(VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(bytes) {
                    return bad(format!(
                        "volume {guest:?} of {bytes} bytes: 64 KiB to 8 TiB are possible"
                    ));
                }
                if !(1..=VolumeLimits::INODES_MAX).contains(&inodes) {
                    return bad(format!(
                        "volume {guest:?} for {inodes} files: 1 to {} are possible",
                        VolumeLimits::INODES_MAX
                    ));
                }
                Volume {
                    kind: VolumeKind::Tmp {
                        bytes: *bytes,
                        inodes,
                    },
                    guest: guest.clone(),
                    read_only: false,
                }
            }
            // The rest is filled in when the machine gets it.
            VolumeRequest::Cluster {
                name,
                guest,
                read_only,
            } => Volume {
                kind: VolumeKind::Cluster {
                    name: MachineName::new(name)
                        .map_err(|error| OperateError::Bad(format!("volume: {error}")))?,
                    id: [0; 16],
                    place: String::new(),
                    bytes: 0,
                    inodes: 0,
                    holding: 0,
                },
                guest: guest.clone(),
                read_only: *read_only,
            },
        };
        if volumes.iter().any(|other| other.guest == volume.guest) {
            return bad(format!("two volumes are named {:?}", volume.guest));
        }
        volumes.push(volume);
    }
    Ok(volumes)
}

/// What a machine's volumes are, and hold while it runs.
fn volume_infos(record: &Record, report: Option<&Report>) -> Vec<VolumeInfo> {
    let held = |number: u32| {
        let volumes = report.map_or(&[][..], |report| &report.volumes);
        volumes.iter().find(|volume| volume.number == number)
    };
    let info = |(number, volume): (u32, &Volume)| VolumeInfo {
        guest: volume.guest.clone(),
        read_only: volume.read_only,
        kind: match &volume.kind {
            VolumeKind::Host { path } => path.clone(),
            VolumeKind::Tmp { .. } => "tmp".into(),
            VolumeKind::Cluster { name, .. } => format!("cluster:{name}"),
        },
        bytes_max: match volume.kind {
            VolumeKind::Tmp { bytes, .. } | VolumeKind::Cluster { bytes, .. } => Some(bytes),
            VolumeKind::Host { .. } => None,
        },
        bytes: held(number).map(|held| held.bytes),
        inodes: held(number).map(|held| held.inodes),
    };
    (0..).zip(&record.spec.volumes).map(info).collect()
}

/// A machine as users see it.
pub(crate) fn info(record: &Record, report: Option<&Report>) -> MachineInfo {
    let running = report
        .filter(|report| matches!(report.state, State::Running { .. } | State::Filling { .. }));
    MachineInfo {
        name: record.name.to_string(),
        node: record.owner.to_string(),
        status: match record.status {
            // As its user sees it: what an agent has to do first is no difference.
            Status::Scheduled => "starting".into(),
            _ => record.word(),
        },
        phase: report.and_then(|report| report.start).map(phase),
        started_unix_ms: record.started_unix_ms,
        exit_code: match record.status {
            Status::Exited { code } => Some(code),
            _ => None,
        },
        message: match &record.status {
            Status::Trapped { message } => Some(message.clone()),
            Status::Failed { reason } | Status::Restarting { reason, .. } => Some(reason.clone()),
            Status::Running => record.paused.clone(),
            _ => None,
        },
        epoch: record.epoch.to_string(),
        created_unix_ms: record.created_unix_ms,
        module: record.spec.module.clone(),
        ready_on: Vec::new(),
        args: record.spec.args.clone(),
        env_names: record
            .spec
            .env
            .iter()
            .map(|(name, _)| name.clone())
            .collect(),
        volumes: volume_infos(record, running),
        memory_limit_bytes: record.spec.memory_bytes,
        threads_max: record.spec.threads_max,
        output_bytes_per_s: record.spec.output_bytes_per_s,
        remove_at_end: record.spec.remove_at_end,
        made_of: record.origin.as_ref().map(Note::origin),
        cpu_limit_millis: record.spec.cpu_limit_millis,
        restart: record.spec.restart,
        checkpoints: record.spec.checkpoints.clone(),
        balancing: record.spec.balancing,
        restarts: record.restarts,
        since_unix_ms: record.since_unix_ms,
        memory_bytes: running.map(|report| report.memory_bytes),
        threads: running.map(|report| report.threads),
        cpu_micros: running.map(|report| report.cpu_micros),
        pid: running.map(|report| report.pid),
        output_bytes: running.map(|report| report.log.1),
        cgroup: running.and_then(|report| report.group.clone()),
        moves: record.reports.clone(),
    }
}

fn phase(start: StartProgress) -> StartPhaseInfo {
    StartPhaseInfo {
        name: start.phase.word().into(),
        percent: start.percent,
        elapsed_ms: start.elapsed_ms,
    }
}

pub(crate) async fn inspect(
    agent: &Arc<Agent>,
    machine: &MachineName,
) -> Result<MachineInfo, OperateError> {
    let record = record::get(&*agent.store, machine).await?.record;
    let report = report(agent, machine).await;
    let mut info = info(&record, report.as_ref());
    if let Some(program) = report.and_then(|report| report.program) {
        let nodes = agent.code.published.nodes_with(&Fingerprint(program));
        info.ready_on = nodes.iter().map(ToString::to_string).collect();
    }
    Ok(info)
}

/// What a machine's worker says; what its node does not say just now is left out.
async fn report(agent: &Arc<Agent>, machine: &MachineName) -> Option<Report> {
    let machine = machine.clone();
    match anywhere(agent, Operation::Report { machine }).await {
        Ok(Done::Report(report)) => Some(report),
        _ => None,
    }
}

/// All machines; of those that start, what their workers do.
pub(crate) async fn list(agent: &Arc<Agent>) -> Result<Vec<MachineInfo>, OperateError> {
    let records = record::all(&*agent.store).await?;
    let infos = records.iter().map(|record| async move {
        let starts = matches!(record.status, Status::Scheduled | Status::Restarting { .. });
        let asked = report(agent, &record.name);
        let report = match starts {
            true => tokio::time::timeout(LIST_PATIENCE, asked).await,
            false => Ok(None),
        };
        info(record, report.ok().flatten().as_ref())
    });
    Ok(futures::future::join_all(infos).await)
}

pub(crate) async fn nodes(agent: &Arc<Agent>) -> Result<Vec<NodeInfo>, OperateError> {
    let store = &*agent.store;
    let alive = record::alive(store).await?;
    let drains = store.list(keys::DRAINS).await?.entries;
    let records = record::nodes(store).await?;
    let voters = members::voters(store)
        .await
        .map_err(|error| OperateError::Away(error.to_string()))?;
    let mut nodes = Vec::new();
    for (name, member) in agent.members.all().iter() {
        let record = records.iter().find(|(node, _)| node == name);
        let record = record.map(|(_, record)| record);
        nodes.push(NodeInfo {
            name: name.to_string(),
            address: member.address.clone(),
            alive: alive.contains(name),
            draining: drains
                .iter()
                .any(|it| it.key == Key::Drain(name.clone()).to_string()),
            voter: voters.iter().any(|voter| voter.node == *name),
            cpus: record.map_or(0, |record| record.cpus),
            memory_bytes: record.map_or(0, |record| record.memory_bytes),
            machines: record::schedule(store, name).await?.len() as u32,
            lacks: record.map_or_else(Vec::new, |record| record.lacks.clone()),
            version: record.map_or_else(String::new, |record| record.version.clone()),
        });
    }
    Ok(nodes)
}

pub(crate) async fn status(agent: &Arc<Agent>) -> Result<ClusterInfo, OperateError> {
    let nodes = nodes(agent).await?;
    let machines = record::all(&*agent.store).await?;
    Ok(ClusterInfo {
        cluster: agent.cluster.to_string(),
        node: agent.name.to_string(),
        voters: nodes
            .iter()
            .filter(|node| node.voter)
            .map(|node| node.name.clone())
            .collect(),
        store: format!("answers, revision {}", agent.store.revision().await?),
        nodes: nodes.len() as u32,
        nodes_alive: nodes.iter().filter(|node| node.alive).count() as u32,
        machines: machines.len() as u32,
        machines_running: machines
            .iter()
            .filter(|record| matches!(record.status, Status::Running | Status::Filling { .. }))
            .count() as u32,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

pub(crate) async fn make_token(
    agent: &Arc<Agent>,
    request: TokenRequest,
) -> Result<Token, OperateError> {
    let store = &*agent.store;
    let authority = agent
        .identity
        .authority()
        .map_err(|error| OperateError::Away(error.to_string()))?;
    let bad = |error: tokens::TokenError| OperateError::Bad(error.to_string());
    let token = match request {
        TokenRequest::Join { ttl_s } => {
            let ttl_ms = ttl_s.saturating_mul(1000);
            tokens::create_join_token(store, authority, ttl_ms, unix_ms())
                .await
                .map_err(bad)?
                .to_string()
        }
        TokenRequest::User { name, role } => {
            let role: Role = role.parse().map_err(|_| {
                OperateError::Bad(format!("{role:?} is no role: viewer, operator or admin"))
            })?;
            tokens::create_user_token(store, &name, role, None)
                .await
                .map_err(bad)?
                .to_string()
        }
    };
    Ok(Token {
        token,
        authority: authority.to_string(),
    })
}
