//! Carries out failovers, while this node has the role.

use super::role::Role;
use crate::context::Context;
use crate::events::Note;
use crate::host::needed_features;
use crate::records::{self, AliveNodes, Placements, RecordError};
use crate::rules::Rules;
use crate::spanning::FREE_MEMORY;
use futures::future::join_all;
use keel_api::EventKind;
use keel_cluster::failover::{Homeless, Placement, place};
use keel_cluster::{MachineName, NodeName};
use keel_machine::failpoint;
use keel_machine::moves::ownership::{self, Failover};
use keel_machine::spec::Record;
use keel_machine::worker::control::{pack, unpack};
use keel_net::RpcError;
use keel_store::TxnOutcome;
use keel_store::clock::unix_ms;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Interval at which the role is tried and machines that wait are looked at again, beside each
/// change of the nodes that are alive.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a node may take to report its free memory: machines wait for it.
const FREE_MEMORY_PATIENCE: Duration = Duration::from_millis(300);
/// After a loss of power of all nodes they return one after the other: an agent that has just
/// started gives the others time before it gives their machines away.
const AFTER_START: Duration = Duration::from_secs(5);

/// What failovers need of the layers below.
pub(crate) struct Dependencies {
    pub(crate) context: Arc<Context>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) placements: Arc<Placements>,
    pub(crate) alive: Arc<AliveNodes>,
}

/// Failovers of this cluster, as this node carries them out.
struct Actor {
    at: Dependencies,
    /// Why machines wait, as was told last.
    told: BTreeMap<MachineName, Placement>,
}

/// Carries out failovers until the agent ends.
pub(crate) async fn run(at: Dependencies) {
    let begun = Instant::now();
    let mut actor = Actor {
        at,
        told: BTreeMap::new(),
    };
    let mut role = Role::default();
    let mut changes = actor.at.alive.changes();
    loop {
        // (An error means that the agent ends.)
        let _ = tokio::time::timeout(LOOK_EVERY, changes.changed()).await;
        changes.mark_unchanged();
        match role.take(&actor.at.context).await {
            Ok(true) if begun.elapsed() >= AFTER_START => actor.look().await,
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "cannot take the role of failovers"),
        }
    }
}

impl Actor {
    /// Restarts what can be restarted elsewhere.
    async fn look(&mut self) {
        let alive = self.at.alive.now();
        if alive.is_empty() {
            // Not known yet.
            return;
        }
        let machines = self.at.placements.highly_available();
        let lost: Vec<MachineName> = machines
            .into_iter()
            .filter(|(_, placed)| !alive.contains(&placed.owner))
            .map(|(machine, _)| machine)
            .collect();
        self.told.retain(|machine, _| lost.contains(machine));
        if lost.is_empty() {
            return;
        }
        match self.homeless(&lost).await {
            Ok(homeless) => self.restart(homeless).await,
            Err(error) => tracing::warn!(%error, "cannot read the machines of nodes that failed"),
        }
    }

    async fn homeless(&self, lost: &[MachineName]) -> Result<Vec<Homeless>, RecordError> {
        let store = &*self.at.context.store;
        let mut homeless = Vec::with_capacity(lost.len());
        for machine in lost {
            let record = match records::get(store, machine).await {
                Ok(found) => found.record,
                Err(RecordError::NoMachine(_)) => continue,
                Err(error) => return Err(error),
            };
            let Some(ha) = &record.spec.ha else { continue };
            let set = records::in_sync_set(store, machine)
                .await?
                .map(|(set, _)| set);
            let (members, memory_bytes) = match (&ha.to, set) {
                (Some(_), set) => (None, set.map_or(0, |set| set.memory_bytes)),
                (None, Some(set)) => (Some(set.members), set.memory_bytes),
                // It has no checkpoint yet, and begins anew.
                (None, None) => (None, 0),
            };
            homeless.push(Homeless {
                machine: machine.clone(),
                priority: ha.priority,
                memory_bytes,
                members,
                forbidden: self.forbidden(machine),
            });
        }
        Ok(homeless)
    }

    /// The nodes on which rules do not allow a machine.
    fn forbidden(&self, machine: &MachineName) -> BTreeSet<NodeName> {
        let nodes = self.at.alive.now().into_iter();
        let forbids =
            |node: &NodeName| self.at.rules.cache.forbids(machine.as_str(), node.as_str());
        nodes.filter(|node| forbids(node).is_some()).collect()
    }

    async fn restart(&mut self, homeless: Vec<Homeless>) {
        let Some(first) = homeless.first().map(|it| it.machine.clone()) else {
            return;
        };
        let free = self.free_memory(&first).await;
        for (machine, placement) in place(homeless, &free) {
            match &placement {
                Placement::On(target) | Placement::Fetched(target) => {
                    match self.give(&machine, target).await {
                        Ok(Some((failed, record))) => self.tell_given(&failed, &record, &placement),
                        Ok(None) => {}
                        Err(reason) => {
                            tracing::warn!(%machine, %target, reason, "a failover is tried again");
                        }
                    }
                }
                Placement::NoMember | Placement::NoRoom { .. } => {
                    self.tell_waits(machine, placement)
                }
            }
        }
    }

    /// The free memory of the nodes that answer; none at nodes that are being drained.
    async fn free_memory(&self, machine: &MachineName) -> BTreeMap<NodeName, u64> {
        let context = &self.at.context;
        let asked = self.at.alive.now().into_iter().map(|node| async move {
            if self.at.rules.cache.drain_of(node.as_str()).is_some() {
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

    /// Gives a machine of a node without a lease to another node. Returns the node that failed and
    /// the new record; `None` if that is not needed any more.
    async fn give(
        &self,
        machine: &MachineName,
        target: &NodeName,
    ) -> Result<Option<(NodeName, Record)>, String> {
        let text = |error: RecordError| error.to_string();
        let context = &self.at.context;
        let found = records::get(&*context.store, machine).await.map_err(text)?;
        let alive = self.at.alive.now();
        if alive.contains(&found.record.owner) {
            return Ok(None);
        }
        let holds_copy = |node: &NodeName| alive.contains(node);
        let Some(given) = ownership::fail_over(&found, target, holds_copy, unix_ms())? else {
            return Ok(None);
        };
        let claims = self.at.rules.claim(machine, target).await;
        let claims = claims.map_err(|error| error.to_string())?;
        failpoint::pass_async("failover.give")
            .await
            .map_err(|injected| injected.to_string())?;
        let Failover {
            failed,
            record,
            txn,
        } = given;
        match context.store.txn(claims.add_to(txn)).await {
            Ok(TxnOutcome::Committed { .. }) => Ok(Some((failed, record))),
            // The node is back, or another node did it.
            Ok(TxnOutcome::Refused { failed: 0 | 1, .. }) => Ok(None),
            Ok(TxnOutcome::Refused { .. }) => {
                Err("the target, or a rule, changed meanwhile".into())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    fn tell_given(&mut self, failed: &NodeName, record: &Record, placement: &Placement) {
        self.told.remove(&record.name);
        let target = &record.owner;
        let why = match placement {
            Placement::Fetched(_) => "which has room, and fetches its checkpoint",
            _ => "which has its checkpoint, and of those with it most memory",
        };
        let text = match record.status.ended() {
            true => format!("its node {failed} failed while it was being stopped"),
            false => format!("its node {failed} failed; it is restarted on {target}, {why}"),
        };
        tracing::warn!(machine = %record.name, "{text}");
        let told = Note::machine(EventKind::MachineFailedOver, &record.name, text)
            .with("from", failed)
            .with("to", target);
        self.at.context.events.record(told.under(record.epoch));
    }

    fn tell_waits(&mut self, machine: MachineName, placement: Placement) {
        if self.told.get(&machine) == Some(&placement) {
            return;
        }
        let text = match &placement {
            Placement::NoRoom { most_bytes } => format!(
                "its node failed, and no node that it may run on has room for it ({} MiB are the most that one has)",
                most_bytes >> 20
            ),
            _ => "its node failed, and of the nodes that have its checkpoint none is there"
                .to_owned(),
        };
        let told = Note::machine(EventKind::FailoverWaits, &machine, text);
        self.at.context.events.record(told);
        self.told.insert(machine, placement);
    }
}
