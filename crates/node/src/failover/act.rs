//! Carries out failovers, while this node has the role.

use super::candidates::{Dependencies, free_memory, homeless};
use super::fence::{Fenced, Fences, program};
use super::headroom;
use crate::events::Note;
use crate::records::{self, RecordError, Reservation};
use crate::role::{JUST_STARTED, Role};
use keel_api::EventKind;
use keel_cluster::failover::{Homeless, Placement, place};
use keel_cluster::gossip::Liveness;
use keel_cluster::{MachineName, NodeName};
use keel_machine::failpoint;
use keel_machine::high_availability::Fence;
use keel_machine::moves::ownership::{self, Failover};
use keel_machine::spec::Record;
use keel_net::coarse_timer;
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
    told: BTreeMap<MachineName, Waits>,
    /// What the operator's program did to nodes that failed.
    fences: Fences,
    /// Nodes that answered this agent, or others that told it so, after it had started.
    heard: BTreeSet<NodeName>,
    /// Since when machines are without their node.
    lost_since: BTreeMap<MachineName, Instant>,
}

/// Why a machine of a node that failed waits.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Waits {
    /// For a node that has its checkpoint.
    NoMember,
    /// For memory: this is the most that a node has.
    NoRoom { most_bytes: u64 },
    /// For the fencing program, which failed.
    NotFenced { node: NodeName, reason: String },
}

/// What became of a machine that a node was chosen for.
enum Given {
    To {
        failed: NodeName,
        record: Box<Record>,
    },
    /// That is not needed any more.
    NotNeeded,
    /// Its node may still run.
    Waits(Option<Waits>),
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
        fences: Fences::default(),
        heard: BTreeSet::new(),
        lost_since: BTreeMap::new(),
    };
    // By itself: nodes that do not answer must not delay failovers.
    tokio::spawn(headroom::keep(actor.at.clone(), role.clone()));
    let mut changes = actor.at.alive.changes();
    loop {
        tokio::select! {
            () = coarse_timer::sleep(LOOK_EVERY) => {}
            // (An error means that the agent ends.)
            _ = changes.changed() => {}
            () = role.changed() => {}
        }
        changes.mark_unchanged();
        let has_just_started = begun.elapsed() < JUST_STARTED;
        if has_just_started {
            actor.hear();
        }
        if !role.is_held() {
            continue;
        }
        actor.look(has_just_started).await;
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
        self.fences.forget(&alive);
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
                        Ok(Given::To { failed, record }) => {
                            self.tell_given(&failed, &record, &placement);
                        }
                        Ok(Given::NotNeeded | Given::Waits(None)) => {}
                        Ok(Given::Waits(Some(why))) => self.tell_waits(machine, why),
                        Err(reason) => {
                            tracing::warn!(%machine, %target, reason, "a failover is tried again");
                        }
                    }
                }
                Placement::NoMember => self.tell_waits(machine, Waits::NoMember),
                Placement::NoRoom { most_bytes } => {
                    let most_bytes = *most_bytes;
                    self.tell_waits(machine, Waits::NoRoom { most_bytes });
                }
            }
        }
    }

    /// Gives a machine of a node without a lease to another node.
    async fn give(
        &mut self,
        machine: &MachineName,
        target: &NodeName,
        memory_bytes: u64,
    ) -> Result<Given, String> {
        let text = |error: RecordError| error.to_string();
        let context = self.at.context.clone();
        let found = records::get(&*context.store, machine).await.map_err(text)?;
        let alive = self.at.alive.now();
        if alive.contains(&found.record.owner) {
            return Ok(Given::NotNeeded);
        }
        let ha = found.record.spec.ha.as_ref();
        if ha.is_some_and(|ha| ha.fence == Fence::Hook) {
            let node = &found.record.owner;
            let program = program(context.dir.root());
            match self.fences.fence(&program, node).await {
                Fenced::Yes => {}
                Fenced::Pending => return Ok(Given::Waits(None)),
                Fenced::Failed(reason) => {
                    let node = node.clone();
                    return Ok(Given::Waits(Some(Waits::NotFenced { node, reason })));
                }
            }
        }
        let lost = self.lost_since.get(machine);
        let waits = lost.is_some_and(|since| since.elapsed() < TAKE_BACK_PATIENCE);
        let holds_copy = |node: &NodeName| waits && alive.contains(node);
        let Some(given) = ownership::fail_over(&found, target, holds_copy, unix_ms())? else {
            return Ok(Given::NotNeeded);
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
            Ok(TxnOutcome::Committed { .. }) => Ok(Given::To {
                failed,
                record: Box::new(record),
            }),
            // The node is back, or another node did it.
            Ok(TxnOutcome::Refused { failed: 0 | 1, .. }) => Ok(Given::NotNeeded),
            Ok(TxnOutcome::Refused { .. }) => {
                Err("the target, or a rule, changed meanwhile".into())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    fn tell_given(&mut self, failed: &NodeName, record: &Record, placement: &Placement) {
        self.told.remove(&record.name);
        let target = &record.owner;
        let kinds = &self.at.context.kinds;
        let from_checkpoint = kinds.fails_over_from_checkpoint(&record.spec);
        let why = match placement {
            Placement::Fetched(_) => "which has room, and fetches its checkpoint",
            _ if from_checkpoint => "which has its checkpoint, and of those with it most memory",
            _ => "which has its images and disks, and of those with them most memory",
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

    fn tell_waits(&mut self, machine: MachineName, why: Waits) {
        if self.told.get(&machine) == Some(&why) {
            return;
        }
        let text = match &why {
            Waits::NotFenced { node, reason } => format!(
                "its node {node} failed, and it is not certain that nothing runs there: {reason}"
            ),
            Waits::NoRoom { most_bytes } => format!(
                "its node failed, and no node that it may run on has room for it ({} MiB are the most that one has)",
                most_bytes >> 20
            ),
            Waits::NoMember => {
                "its node failed, and no node is there that is known to have its checkpoint, or its disks"
                    .to_owned()
            }
        };
        let told = Note::machine(EventKind::FailoverWaits, &machine, text);
        self.at.context.events.record(told);
        self.told.insert(machine, why);
    }
}
