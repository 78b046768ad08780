//! Checkpoints of this node's machines, and machines made of checkpoints.
//!
//! The work is the workers'; here it is decided where and as what. Vaults are
//! opened and read in tasks that may wait: a slow store holds up nobody else.

use crate::agent::Agent;
use crate::events::Note;
use crate::operate::{self, OperateError};
use keel_api::{CheckpointInfo, CheckpointRequest, MachineInfo, RestoreRequest};
use keel_cluster::clock::unix_ms;
use keel_cluster::keys::Key;
use keel_cluster::store::{Compare, Txn};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::checkpoint::{
    CheckpointId, Manifest, MemoryRestore, Origin, Repository, RepositoryError, Retention,
};
use keel_machine::failpoint;
use keel_machine::span::PARTS_MAX;
use keel_machine::spec::{CheckpointPlan, Record, Status};
use keel_machine::worker::control::{Checkpoint, CheckpointReport, kind};
use keel_net::RpcError;
use std::sync::Arc;
use std::time::Duration;

/// How long making a checkpoint may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3600);

/// Seconds between checkpoints that are made by themselves.
const EVERY_S: std::ops::RangeInclusive<u64> = 1..=31 * 24 * 3600;

/// Where checkpoints are, if nothing else is said: with this node.
fn place(agent: &Agent, given: Option<&str>) -> String {
    match given {
        Some(url) => url.to_owned(),
        None => agent.dir.checkpoints().display().to_string(),
    }
}

async fn open(url: String) -> Result<Repository, OperateError> {
    opened(move || Repository::open(&url)).await
}

pub(crate) async fn opened(
    open: impl FnOnce() -> Result<Repository, RepositoryError> + Send + 'static,
) -> Result<Repository, OperateError> {
    tokio::task::spawn_blocking(open)
        .await
        .map_err(|error| OperateError::Away(error.to_string()))?
        .map_err(|error| OperateError::Bad(error.to_string()))
}

fn vault_error(error: &RepositoryError) -> OperateError {
    let text = error.to_string();
    match error {
        RepositoryError::Url { .. } => OperateError::Bad(text),
        RepositoryError::None(_) => OperateError::Missing(text),
        RepositoryError::Part { .. } => OperateError::Conflict(text),
        RepositoryError::Store(_) => OperateError::Away(text),
    }
}

/// Makes a checkpoint of a machine that runs here.
pub(crate) async fn checkpoint(
    agent: &Arc<Agent>,
    machine: &MachineName,
    request: CheckpointRequest,
) -> Result<CheckpointInfo, OperateError> {
    let result = make(agent, machine, request).await;
    agent.events.record(Note::checkpoint(machine, &result));
    result
}

async fn make(
    agent: &Arc<Agent>,
    machine: &MachineName,
    request: CheckpointRequest,
) -> Result<CheckpointInfo, OperateError> {
    let vault = place(agent, request.to.as_deref());
    // A place that cannot be is named before anything is begun.
    let url = vault.clone();
    opened(move || Repository::create(&url)).await?;
    let retention = Retention {
        newest: request.keep,
        for_s: request.keep_for_s,
    };
    check_retention(retention)?;
    let worker = agent.workers.get(machine).ok_or_else(|| {
        OperateError::Conflict(format!(
            "machine {machine:?} does not run: there is nothing to checkpoint"
        ))
    })?;
    let question = Checkpoint {
        repository: vault.clone(),
        full: request.full,
        keep: retention,
    };
    let injected = |error: failpoint::Injected| OperateError::Away(error.to_string());
    failpoint::pass_async("keep.asked")
        .await
        .map_err(injected)?;
    let taken: Result<CheckpointReport, RpcError> =
        worker.ask(kind::CHECKPOINT, &question, PATIENCE).await;
    let taken = taken.map_err(|error| match error {
        RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
            OperateError::Conflict(format!("no checkpoint of machine {machine:?}: {reason}"))
        }
        other => OperateError::Away(other.to_string()),
    })?;
    failpoint::pass_async("keep.taken")
        .await
        .map_err(injected)?;
    note_newest(agent, machine, &vault).await;
    Ok(CheckpointInfo {
        machine: machine.to_string(),
        id: taken.id.to_string(),
        vault,
        parent: taken.parent.map(|id| id.to_string()),
        created_unix_ms: unix_ms(),
        stored_bytes: taken.stored_bytes,
        pause_micros: Some(taken.pause_micros),
        total_micros: Some(taken.total_micros),
        deleted: taken.deleted,
        damage: None,
    })
}

fn check_retention(retention: Retention) -> Result<(), OperateError> {
    if retention.newest == Some(0) {
        return Err(OperateError::Bad(
            "keeping no checkpoint at all: 1 is the least".into(),
        ));
    }
    Ok(())
}

/// Whether checkpoints can be made so by themselves.
pub(crate) fn check_plan(plan: &CheckpointPlan) -> Result<(), OperateError> {
    if !EVERY_S.contains(&plan.every_s) {
        return Err(OperateError::Bad(format!(
            "a checkpoint every {} seconds: {} to {} are possible",
            plan.every_s,
            EVERY_S.start(),
            EVERY_S.end()
        )));
    }
    check_retention(plan.retention)
}

/// When a machine's newest checkpoint in a place was made, in milliseconds since
/// 1970-01-01 UTC; `None` without any.
pub(crate) async fn newest_ms(
    agent: &Agent,
    machine: &MachineName,
    to: Option<&str>,
) -> Option<u64> {
    let vault = open(place(agent, to)).await.ok()?;
    let all = vault.list(machine).await.ok()?;
    all.first().map(CheckpointId::unix_ms)
}

/// Writes down where a machine's newest checkpoint is: that is what it goes on
/// from when it is lost.
async fn note_newest(agent: &Agent, machine: &MachineName, vault: &str) {
    let origin = Origin {
        repository: vault.to_owned(),
        machine: machine.clone(),
        id: None,
        is_clone: false,
        memory: MemoryRestore::Eager,
    };
    let written = match keel_cluster::wire::encode("where a checkpoint is", &origin) {
        Ok(value) => {
            let txn = Txn::new()
                .when(Compare::Exists {
                    key: Key::Machine(machine.clone()).to_string(),
                })
                .put(Key::Kept(machine.clone()), value);
            agent
                .store
                .txn(txn)
                .await
                .map(drop)
                .map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = written {
        tracing::warn!(%machine, error, "where its newest checkpoint is, is not in the store");
    }
}

/// Where a machine's newest checkpoint is, if there is any.
pub(crate) async fn newest(agent: &Agent, machine: &MachineName) -> Result<Option<Origin>, String> {
    let key = Key::Kept(machine.clone()).to_string();
    match agent.store.get(&key).await {
        Ok(Some(entry)) => keel_cluster::wire::decode("where a checkpoint is", &entry.value)
            .map(Some)
            .map_err(|error| error.to_string()),
        Ok(None) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// A machine's checkpoints, newest first; what cannot be read is listed with
/// what is wrong.
pub(crate) async fn list(
    agent: &Agent,
    machine: &MachineName,
    from: Option<&str>,
) -> Result<Vec<CheckpointInfo>, OperateError> {
    let vault = open(place(agent, from)).await?;
    let ids = vault
        .list(machine)
        .await
        .map_err(|error| vault_error(&error))?;
    let mut found = Vec::with_capacity(ids.len());
    for id in ids {
        let mut info = CheckpointInfo {
            machine: machine.to_string(),
            id: id.to_string(),
            vault: vault.url().to_owned(),
            parent: None,
            created_unix_ms: 0,
            stored_bytes: 0,
            pause_micros: None,
            total_micros: None,
            deleted: 0,
            damage: None,
        };
        match vault.manifest(machine, &id).await {
            Ok(manifest) => {
                info.created_unix_ms = manifest.created_unix_ms;
                info.stored_bytes = manifest.stored_bytes();
                info.parent = manifest.parent.map(|id| id.to_string());
            }
            Err(error) => info.damage = Some(error.to_string()),
        }
        found.push(info);
    }
    Ok(found)
}

/// The manifest that says what the machine was: of the one that was asked for,
/// or of the newest that can be read.
async fn manifest(
    vault: &Repository,
    machine: &MachineName,
    id: Option<&CheckpointId>,
) -> Result<Manifest, RepositoryError> {
    if let Some(id) = id {
        return vault.manifest(machine, id).await;
    }
    let mut damaged = None;
    for id in vault.list(machine).await? {
        match vault.manifest(machine, &id).await {
            Ok(manifest) => return Ok(manifest),
            Err(error @ RepositoryError::Part { .. }) => damaged = damaged.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(damaged.unwrap_or_else(|| RepositoryError::None(machine.clone())))
}

/// Puts a machine that is made of a checkpoint into a node's schedule.
pub(crate) async fn restore(
    agent: &Arc<Agent>,
    request: RestoreRequest,
) -> Result<MachineInfo, OperateError> {
    let bad = |what: String| OperateError::Bad(what);
    let machine = MachineName::new(&request.machine).map_err(|error| bad(error.to_string()))?;
    let name = match &request.name {
        Some(name) => MachineName::new(name).map_err(|error| bad(error.to_string()))?,
        None => machine.clone(),
    };
    let known = |node: &String| {
        let node = NodeName::new(node).map_err(|error| bad(error.to_string()))?;
        match agent.members.contains(&node) {
            true => Ok(node),
            false => Err(OperateError::Missing(format!(
                "there is no node {node:?} (see `keel nodes`)"
            ))),
        }
    };
    let mut parts: Vec<NodeName> = request.nodes.iter().map(known).collect::<Result<_, _>>()?;
    let node = match &request.on {
        Some(node) => known(node)?,
        None if parts.is_empty() || parts.contains(&agent.name) => agent.name.clone(),
        None => parts[0].clone(),
    };
    // Named further times it has further parts.
    if let Some(at) = parts.iter().position(|part| *part == node) {
        parts.remove(at);
    }
    if node != agent.name && request.from.is_none() {
        return Err(bad(format!(
            "the checkpoints in {}'s own folder are not seen by {node}: make them in a place that both see (`keel checkpoint {machine} --to PLACE`) and name it here with --from",
            agent.name
        )));
    }
    let id: Option<CheckpointId> = request
        .id
        .as_deref()
        .map(str::parse)
        .transpose()
        .map_err(bad)?;
    let vault = open(place(agent, request.from.as_deref())).await?;
    let manifest = manifest(&vault, &machine, id.as_ref())
        .await
        .map_err(|error| vault_error(&error))?;
    let memory = match (request.nodes.is_empty(), request.warm) {
        (true, false) => MemoryRestore::Eager,
        (true, true) => MemoryRestore::Lazy,
        (false, true) => {
            let why = "with parts from its beginning it does not start warm: all of its memory comes to them first";
            return Err(bad(why.into()));
        }
        (false, false) if parts.is_empty() => {
            let why = format!("all of it would be on {node}: name other nodes, or that one twice");
            return Err(bad(why));
        }
        (false, false) if parts.len() >= PARTS_MAX => {
            return Err(bad(format!("a machine has at most {PARTS_MAX} parts")));
        }
        (false, false) if manifest.spec.cpu_limit_millis.is_some() => {
            return Err(bad(operate::LIMITED_HAS_NO_PARTS.into()));
        }
        (false, false) => MemoryRestore::Spanning(parts),
    };
    let is_clone = name != machine;
    // (What it holds in memory of its epochs is older, also where it is a clone.)
    let ran = manifest.epoch;
    let record = Record {
        name,
        spec: manifest.spec,
        owner: node,
        epoch: Epoch::default(),
        status: Status::Scheduled,
        since_unix_ms: unix_ms(),
        started_unix_ms: 0,
        stop_wanted: false,
        restarts: 0,
        created_unix_ms: unix_ms(),
        paused: None,
        origin: Some(Origin {
            repository: vault.url().to_owned(),
            machine,
            id,
            is_clone,
            memory,
        }),
        reports: Vec::new(),
    };
    operate::schedule(agent, record, Some(ran)).await
}
