//! Creates a machine from a checkpoint.

use super::create::schedule;
use super::handle::Machines;
use super::spec_check::LIMITED_HAS_NO_PARTS;
use crate::checkpoints::{open, place, repository_error};
use crate::error::CommandError;
use crate::records::Needs;
use keel_api::{MachineInfo, RestoreRequest};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_kind_wasm::span::PARTS_MAX;
use keel_machine::checkpoint::{
    CheckpointId, Manifest, MemoryRestore, Origin, Repository, RepositoryError,
};
use keel_machine::spec::{Record, Status};
use keel_store::clock::unix_ms;
use std::sync::Arc;

/// The manifest of the requested checkpoint, or of the newest readable one.
async fn manifest(
    repository: &Repository,
    machine: &MachineName,
    id: Option<&CheckpointId>,
) -> Result<Manifest, RepositoryError> {
    if let Some(id) = id {
        return repository.manifest(machine, id).await;
    }
    let mut damaged = None;
    for id in repository.list(machine).await? {
        match repository.manifest(machine, &id).await {
            Ok(manifest) => return Ok(manifest),
            Err(error @ RepositoryError::Part { .. }) => damaged = damaged.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(damaged.unwrap_or_else(|| RepositoryError::None(machine.clone())))
}

/// Inserts a machine that is created from a checkpoint into a node's schedule.
pub(crate) async fn restore(
    machines: &Arc<Machines>,
    request: RestoreRequest,
) -> Result<MachineInfo, CommandError> {
    let bad = |what: String| CommandError::Invalid(what);
    let machine = MachineName::new(&request.machine).map_err(|error| bad(error.to_string()))?;
    let name = match &request.name {
        Some(name) => MachineName::new(name).map_err(|error| bad(error.to_string()))?,
        None => machine.clone(),
    };
    let known = |node: &String| {
        let node = NodeName::new(node).map_err(|error| bad(error.to_string()))?;
        match machines.context.members.contains(&node) {
            true => Ok(node),
            false => Err(CommandError::NotFound(format!(
                "there is no node {node:?} (see `keel nodes`)"
            ))),
        }
    };
    let mut parts: Vec<NodeName> = request.nodes.iter().map(known).collect::<Result<_, _>>()?;
    let node = match &request.on {
        Some(node) => known(node)?,
        None if parts.is_empty() || parts.contains(&machines.context.name) => {
            machines.context.name.clone()
        }
        None => parts[0].clone(),
    };
    // Each repeated name adds a part.
    if let Some(at) = parts.iter().position(|part| *part == node) {
        parts.remove(at);
    }
    if node != machines.context.name && request.from.is_none() {
        return Err(bad(format!(
            "the checkpoints in {}'s own folder are not seen by {node}: make them in a place that both see (`keel checkpoint {machine} --to PLACE`) and name it here with --from",
            machines.context.name
        )));
    }
    let id: Option<CheckpointId> = request
        .id
        .as_deref()
        .map(str::parse)
        .transpose()
        .map_err(bad)?;
    let repository = open(place(&machines.context, request.from.as_deref())).await?;
    let manifest = manifest(&repository, &machine, id.as_ref())
        .await
        .map_err(|error| repository_error(&error))?;
    let kinds = &machines.context.kinds;
    kinds.check(&manifest.spec).map_err(bad)?;
    let kind = kinds.of(&manifest.spec).map_err(bad)?;
    if !request.nodes.is_empty() && !kind.abilities().spans {
        return Err(bad(format!(
            "a machine of kind {} has no parts: name one node with --on",
            manifest.spec.kind
        )));
    }
    if request.warm && !kind.abilities().restores_lazily {
        return Err(bad(format!(
            "a machine of kind {} does not start warm: all of its memory comes first",
            manifest.spec.kind
        )));
    }
    let needs = Needs::of(kinds, &manifest.spec);
    if let Some(why) = machines.rules.cache.host_forbids(&needs, node.as_str()) {
        let why = format!("machine {machine} cannot run on {node}: {why}");
        return Err(CommandError::Conflict(why));
    }
    let is_clone = name != machine;
    if is_clone && let Some(unique) = kind.unique(&manifest.spec) {
        return Err(bad(format!(
            "a clone of machine {machine} would have {unique} as well, which is in the memory of its system: restore it under its own name"
        )));
    }
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
            return Err(bad(LIMITED_HAS_NO_PARTS.into()));
        }
        (false, false) => MemoryRestore::Spanning(parts),
    };
    // The epochs in its memory are older, also for a clone.
    let ran = manifest.epoch;
    let record = Record {
        name,
        spec: manifest.spec,
        owner: node,
        epoch: Epoch::default(),
        incarnation: 0,
        status: Status::Scheduled,
        since_unix_ms: unix_ms(),
        started_unix_ms: 0,
        stop_wanted: false,
        restarts: 0,
        failovers: 0,
        left_elsewhere: false,
        created_unix_ms: unix_ms(),
        paused: None,
        origin: Some(Origin {
            repository: repository.url().to_owned(),
            machine,
            id,
            is_clone,
            memory,
        }),
        reports: Vec::new(),
    };
    schedule(machines, record, Some(ran)).await
}
