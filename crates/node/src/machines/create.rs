//! Creates a machine: the transaction that inserts it into a node's schedule.

use super::handle::Machines;
use super::host_files;
use super::queries::info;
use super::spec_check::spec;
use crate::error::CommandError;
use crate::events::Note;
use crate::failover;
use crate::records::{self, Needs};
use crate::volumes;
use keel_api::{MachineInfo, RunRequest};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::kind::NodeFeatures;
use keel_machine::moves::ownership;
use keel_machine::spec::{Record, Status, Volume, VolumeKind};
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use keel_store::{Compare, Txn, TxnOutcome};
use std::sync::Arc;

/// Inserts a new machine into a node's schedule.
pub(crate) async fn run(
    machines: &Arc<Machines>,
    request: RunRequest,
) -> Result<MachineInfo, CommandError> {
    let bad = |what: String| CommandError::Invalid(what);
    let name = match &request.name {
        Some(name) => MachineName::new(name).map_err(|error| bad(error.to_string()))?,
        None => MachineName::new(&format!("m-{:08x}", rand::random::<u32>()))
            .map_err(|error| bad(error.to_string()))?,
    };
    let kinds = &machines.context.kinds;
    let mut spec = spec(kinds, &request)?;
    let kind = kinds.of(&spec).map_err(bad)?;
    let offers = machines.rules.cache.offers_for(name.as_str(), &spec.kind);
    let offers: Vec<NodeFeatures<'_>> = offers
        .iter()
        .map(|(node, features)| NodeFeatures { node, features })
        .collect();
    let on = request.on.as_deref();
    kind.complete(&mut spec, &offers, on).map_err(bad)?;
    let needs = Needs::of(kinds, &spec);
    let of_host = |volume: &Volume| matches!(volume.kind, VolumeKind::Host { .. });
    let node = match &request.on {
        Some(node) => NodeName::new(node).map_err(|error| bad(error.to_string()))?,
        // A host directory refers to the host on which the request names it.
        None if spec.volumes.iter().any(of_host) => machines.context.name.clone(),
        None => {
            let promised = request.balancing.memory_target_bytes;
            let memory_bytes = promised.unwrap_or(request.memory_bytes);
            machines
                .balancer
                .choose_node(name.as_str(), &needs, memory_bytes)
                .await
        }
    };
    if !machines.context.members.contains(&node) {
        return Err(CommandError::NotFound(format!(
            "there is no node {node:?} (see `keel nodes`)"
        )));
    }
    for image in kind.images(&spec).map_err(bad)? {
        machines.images.find_image(&image).await?;
    }
    host_files::check_elsewhere(machines, &node, &spec).await?;
    // What it will need is known only if it promises to keep to that.
    if let (Some(ha), Some(bytes)) = (&spec.ha, request.balancing.memory_target_bytes) {
        failover::check_new(&machines.failover, &name, &node, ha, bytes).await?;
    }
    let record = Record {
        name: name.clone(),
        spec,
        owner: node.clone(),
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
        origin: None,
        reports: Vec::new(),
    };
    schedule(machines, record, None).await
}

/// Inserts a new machine into its owner's schedule. Its epochs start above every epoch that its
/// name ever had and above the epoch of its checkpoint.
pub(crate) async fn schedule(
    machines: &Arc<Machines>,
    mut record: Record,
    ran: Option<Epoch>,
) -> Result<MachineInfo, CommandError> {
    let (name, node) = (record.name.clone(), record.owner.clone());
    let alive = Key::Alive(node.clone());
    let claims = machines.rules.claim(&name, &node).await?;
    let txn = Txn::new()
        .when_absent(Key::Machine(name.clone()))
        .when(Compare::Exists {
            key: alive.to_string(),
        });
    let txn = records::first_epoch(&*machines.context.store, &mut record, ran, txn).await?;
    let txn = volumes::take(&machines.context, &mut record, txn).await?;
    let before = txn.compare.len();
    let txn = claims
        .add_to(txn)
        .put(Key::Machine(name.clone()), records::encode(&record)?)
        .put(Key::Schedule(node.clone(), name.clone()), Vec::new());
    match machines.context.store.txn(txn).await? {
        TxnOutcome::Committed { revision } => {
            record.epoch = ownership::created_at(record.epoch, revision);
            machines
                .context
                .events
                .record(Note::status(&record, &record.status));
            Ok(info(&machines.context.kinds, &record, None))
        }
        TxnOutcome::Refused { failed: 0, .. } => Err(CommandError::Conflict(format!(
            "the name {name:?} is in use (`keel rm {name}` frees it once the machine has ended)"
        ))),
        TxnOutcome::Refused { failed: 1, .. } => Err(CommandError::Unavailable(format!(
            "node {node:?} is not alive (see `keel nodes`)"
        ))),
        TxnOutcome::Refused { failed: 2, .. } => Err(CommandError::Conflict(
            "a machine of another cluster was restored at the same time; try again".into(),
        )),
        TxnOutcome::Refused { failed, .. } => {
            Err(CommandError::Conflict(match claims.raced(failed, before) {
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
