//! What failovers decide with: the machines, who has their checkpoints, and the room of the nodes.

use crate::context::Context;
use crate::gossip::NodeGossip;
use crate::host::needed_features;
use crate::records::{self, AliveNodes, InSyncSet, Placements, RecordError};
use crate::rules::Rules;
use crate::spanning::FREE_MEMORY;
use futures::future::join_all;
use keel_cluster::failover::Homeless;
use keel_cluster::{MachineName, NodeName};
use keel_machine::high_availability::HighAvailability;
use keel_machine::kind::KindName;
use keel_machine::worker::control::{pack, unpack};
use keel_net::RpcError;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// How long a node may take to report its free memory: machines wait for it.
const FREE_MEMORY_PATIENCE: Duration = Duration::from_millis(300);

/// What failovers need of the layers below.
pub(crate) struct Dependencies {
    pub(crate) context: Arc<Context>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) placements: Arc<Placements>,
    pub(crate) alive: Arc<AliveNodes>,
    pub(crate) gossip: Arc<NodeGossip>,
}

/// Those of `machines` that have high availability, as failovers see them.
///
/// # Errors
/// [`RecordError`] if the store does not answer.
pub(super) async fn homeless(
    at: &Dependencies,
    machines: &[MachineName],
) -> Result<Vec<Homeless>, RecordError> {
    let store = &*at.context.store;
    let mut homeless = Vec::with_capacity(machines.len());
    for machine in machines {
        let record = match records::get(store, machine).await {
            Ok(found) => found.record,
            Err(RecordError::NoMachine(_)) => continue,
            Err(error @ RecordError::Store(_)) => return Err(error),
            // The others need not wait for it.
            Err(error) => {
                tracing::error!(%machine, %error, "it cannot be restarted elsewhere");
                continue;
            }
        };
        let Some(ha) = &record.spec.ha else { continue };
        let set = match records::in_sync_set(store, machine).await {
            Ok(set) => set.map(|(set, _)| set),
            Err(error @ RecordError::Store(_)) => return Err(error),
            Err(error) => {
                tracing::error!(%machine, %error, "it cannot be restarted elsewhere");
                continue;
            }
        };
        let (kind, was_restored) = (&record.spec.kind, record.origin.is_some());
        homeless.push(one_homeless(at, machine, kind, ha, set, was_restored));
    }
    Ok(homeless)
}

/// A machine with its in-sync set, as failovers see it. `was_restored`: it began from a checkpoint.
pub(super) fn one_homeless(
    at: &Dependencies,
    machine: &MachineName,
    kind: &KindName,
    ha: &HighAvailability,
    set: Option<InSyncSet>,
    was_restored: bool,
) -> Homeless {
    let kind = at.context.kinds.get(kind);
    let abilities = kind.map(|kind| kind.abilities()).unwrap_or_default();
    // What they lack cannot be fetched.
    let lacks = |set: &InSyncSet| set.checkpoint.is_none() || abilities.keeps_images;
    let members_only = set.as_ref().is_some_and(lacks);
    let (members, memory_bytes) = match set {
        Some(set) if ha.to.is_some() => (None, set.memory_bytes),
        Some(set) => (Some(set.members), set.memory_bytes),
        // Its checkpoint is perhaps in a folder of its node; or it is not known yet who has what it
        // needs.
        None if was_restored || !abilities.restarts_from_checkpoints => (Some(BTreeSet::new()), 0),
        // It has no checkpoint yet, and begins anew.
        None => (None, 0),
    };
    Homeless {
        machine: machine.clone(),
        priority: ha.priority,
        memory_bytes,
        members,
        members_only,
        forbidden: forbidden(at, machine),
    }
}

/// The nodes on which rules do not allow a machine.
pub(super) fn forbidden(at: &Dependencies, machine: &MachineName) -> BTreeSet<NodeName> {
    let nodes = at.alive.now().into_iter();
    let forbids = |node: &NodeName| at.rules.cache.forbids(machine.as_str(), node.as_str());
    nodes.filter(|node| forbids(node).is_some()).collect()
}

/// The free memory of the nodes that answer; none at nodes that are being drained.
pub(super) async fn free_memory(
    at: &Dependencies,
    machine: &MachineName,
) -> BTreeMap<NodeName, u64> {
    let context = &at.context;
    let asked = at.alive.now().into_iter().map(|node| async move {
        if at.rules.cache.drain_of(node.as_str()).is_some() {
            return Some((node, 0));
        }
        if node == context.name {
            let free = records::free_bytes_for(context, machine).await.ok()?;
            return Some((node, free));
        }
        let payload = pack(&(machine.clone(), needed_features())).ok()?;
        let answer = context
            .peers
            .call(&node, FREE_MEMORY, payload, FREE_MEMORY_PATIENCE)
            .await;
        let free = answer.and_then(|answer| unpack(&answer));
        let free = free.inspect_err(|error: &RpcError| {
            tracing::debug!(%node, %error, "the node is given no machine now");
        });
        Some((node, free.ok()?))
    });
    join_all(asked).await.into_iter().flatten().collect()
}
