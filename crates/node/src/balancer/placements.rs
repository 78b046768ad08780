//! Where all machines are, as the store says: followed, never asked for. What changes
//! is told to the balancer as events.

use crate::agent::Agent;
use keel_balance::Name;
use keel_balance::round::Event;
use keel_balance::select::Spreadable;
use keel_cluster::keys::{self, Key};
use keel_cluster::store::{Change, KeyValue};
use keel_cluster::{Epoch, MachineName, NodeName, StoreError};
use keel_machine::moves::ownership::VersionedRecord;
use keel_machine::spec::{BalanceBy, Balancing, Record, Spawn, Status};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// Pause before the store is followed anew.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// What balancing needs to know of a machine.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) owner: NodeName,
    /// Hash of its module as its author built it; empty where it has none.
    pub(super) module: String,
    /// Raised by each change of owner, and by each restart.
    pub(super) epoch: Epoch,
    /// Whether it is to run.
    pub(super) live: bool,
    /// Whether it runs, and can be moved.
    pub(super) movable: bool,
    /// Limit of its CPU time, in cores.
    pub(super) cores_max: Option<f64>,
    /// What balancing makes of it.
    pub(super) balancing: Balancing,
}

impl Placed {
    fn of(record: &Record) -> Self {
        Placed {
            owner: record.owner.clone(),
            module: record.spec.module.clone(),
            epoch: record.epoch,
            live: !record.status.ended(),
            movable: record.status == Status::Running && record.paused.is_none(),
            cores_max: record
                .spec
                .cpu_limit_millis
                .map(|millis| f64::from(millis) / 1e3),
            balancing: record.spec.balancing,
        }
    }
}

/// All machines.
#[derive(Debug, Default)]
pub(super) struct Placements(Mutex<HashMap<MachineName, Placed>>);

impl Placements {
    fn table(&self) -> MutexGuard<'_, HashMap<MachineName, Placed>> {
        self.0.lock().unwrap_or_else(|error| error.into_inner())
    }

    /// What is known of one.
    pub(super) fn get(&self, machine: &str) -> Option<Placed> {
        self.table().get(machine).cloned()
    }

    /// Machines that are to run: name, node, module.
    pub(super) fn programs(&self) -> Vec<(MachineName, NodeName, String)> {
        let table = self.table();
        let live = table.iter().filter(|(_, placed)| placed.live);
        live.map(|(machine, it)| (machine.clone(), it.owner.clone(), it.module.clone()))
            .collect()
    }

    /// Machines that are to run, with their nodes.
    pub(super) fn live(&self) -> Vec<(Name, Name)> {
        let table = self.table();
        let live = table.iter().filter(|(_, placed)| placed.live);
        live.map(|(machine, placed)| (machine.as_str().into(), placed.owner.as_str().into()))
            .collect()
    }

    /// Machines whose spec says that they are not to be balanced.
    pub(super) fn opted_out(&self) -> BTreeSet<Name> {
        let table = self.table();
        let out = table
            .iter()
            .filter(|(_, placed)| placed.balancing.by == BalanceBy::Off);
        out.map(|(machine, _)| machine.as_str().into()).collect()
    }

    /// Machines that balancing may give parts.
    pub(super) fn spreadable(&self) -> BTreeMap<Name, Spreadable> {
        let table = self.table();
        let may = table.iter().filter_map(|(machine, placed)| {
            let balancing = &placed.balancing;
            let may = balancing.by != BalanceBy::Off && balancing.parts_max.is_some();
            let spreadable = Spreadable {
                is_decided: false,
                from_beginning: balancing.spawn == Spawn::Spread,
                part_memory_bytes: balancing.part_memory_bytes,
            };
            may.then(|| (machine.as_str().into(), spreadable))
        });
        may.collect()
    }

    /// Takes what the store says; what that is for this node's balancer.
    fn take(&self, here: &NodeName, entry: &KeyValue) -> Option<Event> {
        let Ok(Key::Machine(machine)) = entry.key.parse() else {
            return None;
        };
        let record = VersionedRecord::read(entry).ok()?.record;
        let placed = Placed::of(&record);
        let owner = placed.owner.clone();
        let before = self.table().insert(machine.clone(), placed);
        let before = before.filter(|before| before.live)?.owner;
        let machine = machine.as_str().into();
        if before != owner && owner == *here {
            let from = before.as_str().into();
            return Some(Event::Arrived { machine, from });
        }
        (before != owner && before == *here).then_some(Event::Left { machine })
    }
}

/// Follows the store for ever.
pub(super) async fn follow(
    agent: Arc<Agent>,
    placements: Arc<Placements>,
    events: UnboundedSender<Event>,
) {
    loop {
        if let Err(error) = follow_once(&agent, &placements, &events).await {
            tracing::warn!(%error, "where machines are cannot be followed, trying again");
        }
        if events.is_closed() {
            return;
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_once(
    agent: &Agent,
    placements: &Placements,
    events: &UnboundedSender<Event>,
) -> Result<(), StoreError> {
    let listing = agent.store.list(keys::MACHINES).await?;
    let known: Vec<String> = listing.entries.iter().map(|it| it.key.clone()).collect();
    placements
        .table()
        .retain(|machine, _| known.contains(&Key::Machine(machine.clone()).to_string()));
    for entry in &listing.entries {
        // Moves of a time in which nobody looked are found here.
        if let Some(event) = placements.take(&agent.name, entry) {
            let _ = events.send(event);
        }
    }
    let from = listing.revision + 1;
    let mut watch = agent.store.watch(keys::MACHINES, from).await?;
    while let Some(changes) = watch.next().await {
        for change in changes?.changes {
            match change {
                Change::Put(entry) => {
                    if let Some(event) = placements.take(&agent.name, &entry) {
                        // The balancer ends with the agent.
                        let _ = events.send(event);
                    }
                }
                Change::Delete { key } => {
                    if let Ok(Key::Machine(machine)) = key.parse() {
                        placements.table().remove(&machine);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Tells the balancer which machines began to come, and which will not: room that is
/// reserved here, and given up again.
pub(super) async fn follow_arrivals(agent: Arc<Agent>, events: UnboundedSender<Event>) {
    loop {
        if let Err(error) = follow_arrivals_once(&agent, &events).await {
            tracing::warn!(%error, "arrivals cannot be followed, trying again");
        }
        if events.is_closed() {
            return;
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_arrivals_once(
    agent: &Agent,
    events: &UnboundedSender<Event>,
) -> Result<(), StoreError> {
    let prefix = keys::reservations_of(&agent.name);
    let listing = agent.store.list(&prefix).await?;
    let mut watch = agent.store.watch(&prefix, listing.revision + 1).await?;
    while let Some(changes) = watch.next().await {
        for change in changes?.changes {
            let Ok(Key::Reservation(_, machine)) = change.key().parse() else {
                continue;
            };
            let name = machine.as_str().into();
            let event = match change {
                Change::Put(_) => Event::Arriving { machine: name },
                // The commit takes it away too: then the machine is this node's.
                Change::Delete { .. } => {
                    let record = crate::record::get(&*agent.store, &machine).await;
                    if record.is_ok_and(|found| found.record.owner == agent.name) {
                        continue;
                    }
                    Event::ArrivalFailed { machine: name }
                }
            };
            let _ = events.send(event);
        }
    }
    Ok(())
}
