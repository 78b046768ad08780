//! Carries out failovers, while this node has the role.

use super::candidates::{Dependencies, free_memory, homeless};
use crate::events::Note;
use crate::records::{self, RecordError, Reservation};
use crate::role::{JUST_STARTED, Role};
use keel_api::EventKind;
use keel_cluster::failover::{Homeless, Placement, place};
use keel_cluster::gossip::Liveness;
use keel_cluster::{MachineName, NodeName};
use keel_machine::failpoint;
use keel_machine::moves::ownership::{self, Failover};
use keel_machine::spec::Record;
use keel_store::TxnOutcome;
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Interval at which machines that wait are looked at again, beside each change of the nodes that
/// are alive.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long the source of a move has to take a machine back that was arriving at a node that
/// failed: its copy is newer than any checkpoint. It may have dropped it.
const TAKE_BACK_PATIENCE: Duration = Duration::from_secs(2);

/// Failovers of this cluster, as this node carries them out.
struct Actor {
    at: Arc<Dependencies>,
    /// Why machines wait, as was told last.
    told: BTreeMap<MachineName, Placement>,
    /// Nodes that answered this agent, or others that told it so, after it had started.
    heard: BTreeSet<NodeName>,
    /// Since when machines are without their node.
    lost_since: BTreeMap<MachineName, Instant>,
}

/// Carries out failovers until the agent ends.
///
/// After a loss of power of all nodes they return one after the other: an agent that has just
/// started gives those that it has not heard that time before it gives their machines away. (That
/// they have a lease does not suffice: a new leader of the store gives all leases that there were
/// their full time.)
pub(crate) async fn run(at: Arc<Dependencies>, mut role: Role) {
    let begun = Instant::now();
    let mut actor = Actor {
        at,
        told: BTreeMap::new(),
        heard: BTreeSet::new(),
        lost_since: BTreeMap::new(),
    };
    let mut changes = actor.at.alive.changes();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            // (An error means that the agent ends.)
            _ = changes.changed() => {}
            () = role.changed() => {}
        }
        changes.mark_unchanged();
        let has_just_started = begun.elapsed() < JUST_STARTED;
        if has_just_started {
            actor.hear();
        }
        if role.is_held() {
            actor.look(has_just_started).await;
        }
    }
}

impl Actor {
    /// Takes note of the nodes that answer.
    fn hear(&mut self) {
        let known = self.at.gossip.known().into_iter();
        let answer = known.filter(|(_, known)| known.liveness == Some(Liveness::Alive));
        self.heard.extend(answer.map(|(node, _)| node));
    }

    /// Restarts what can be restarted elsewhere.
    async fn look(&mut self, has_just_started: bool) {
        let alive = self.at.alive.now();
        if alive.is_empty() {
            // Not known yet.
            return;
        }
        let machines = self.at.placements.highly_available();
        let lost: Vec<MachineName> = machines
            .into_iter()
            .filter(|(_, placed)| !alive.contains(&placed.owner))
            .filter(|(_, placed)| !has_just_started || self.heard.contains(&placed.owner))
            .map(|(machine, _)| machine)
            .collect();
        self.told.retain(|machine, _| lost.contains(machine));
        self.lost_since.retain(|machine, _| lost.contains(machine));
        for machine in &lost {
            self.lost_since
                .entry(machine.clone())
                .or_insert_with(Instant::now);
        }
        if lost.is_empty() {
            return;
        }
        match homeless(&self.at, &lost).await {
            Ok(homeless) => self.restart(homeless).await,
            Err(error) => tracing::warn!(%error, "cannot read the machines of nodes that failed"),
        }
    }

    async fn restart(&mut self, homeless: Vec<Homeless>) {
        let Some(first) = homeless.first().map(|it| it.machine.clone()) else {
            return;
        };
        let free = free_memory(&self.at, &first).await;
        let needs: BTreeMap<MachineName, u64> = homeless
            .iter()
            .map(|it| (it.machine.clone(), it.memory_bytes))
            .collect();
        for (machine, placement) in place(homeless, &free) {
            match &placement {
                Placement::On(target) | Placement::Fetched(target) => {
                    let bytes = needs.get(&machine).copied().unwrap_or(0);
                    match self.give(&machine, target, bytes).await {
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

    /// Gives a machine of a node without a lease to another node. Returns the node that failed and
    /// the new record; `None` if that is not needed any more.
    async fn give(
        &self,
        machine: &MachineName,
        target: &NodeName,
        memory_bytes: u64,
    ) -> Result<Option<(NodeName, Record)>, String> {
        let text = |error: RecordError| error.to_string();
        let context = &self.at.context;
        let found = records::get(&*context.store, machine).await.map_err(text)?;
        let alive = self.at.alive.now();
        if alive.contains(&found.record.owner) {
            return Ok(None);
        }
        let lost = self.lost_since.get(machine);
        let waits = lost.is_some_and(|since| since.elapsed() < TAKE_BACK_PATIENCE);
        let holds_copy = |node: &NodeName| waits && alive.contains(node);
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
        let reserved = Reservation {
            source: failed.clone(),
            bytes: memory_bytes,
        };
        let reserved = keel_store::encoding::encode("a reservation", &reserved)
            .map_err(|error| error.to_string())?;
        let txn = match record.status.ended() {
            true => txn,
            false => txn.put(Key::Reservation(target.clone(), machine.clone()), reserved),
        };
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
