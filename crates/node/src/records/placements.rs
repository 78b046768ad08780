//! The nodes of all machines: a watch on the store, so that reads are local.

use super::machine::get;
use crate::context::Context;
use keel_balance::Name;
use keel_balance::select::Spreadable;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::high_availability::HighAvailability;
use keel_machine::kind::{Features, KindName, Kinds};
use keel_machine::moves::ownership::VersionedRecord;
use keel_machine::spec::{BalanceBy, Balancing, Record, Spawn, Spec, Status};
use keel_store::StoreError;
use keel_store::keys::{self, Key};
use keel_store::{Change, KeyValue};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// Pause before the watch is restarted.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// What a machine needs of its host, whatever else it runs beside.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Needs {
    pub(crate) kind: KindName,
    pub(crate) features: Arc<Features>,
}

impl Needs {
    /// Those of a machine with this spec.
    pub(crate) fn of(kinds: &Kinds, spec: &Spec) -> Self {
        // A kind that this node lacks runs elsewhere only.
        let kind = kinds.of(spec).ok();
        let features = kind.map(|kind| kind.features_needed(spec));
        Needs {
            kind: spec.kind.clone(),
            features: Arc::new(features.unwrap_or_default()),
        }
    }
}

/// A machine as the balancer needs it.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub(crate) owner: NodeName,
    pub(crate) needs: Needs,
    /// Hash of the program's image, if it is compiled before it runs.
    pub(crate) compiled_image: Option<String>,
    /// Raised by each change of owner, and by each restart.
    pub(crate) epoch: Epoch,
    /// Whether it is scheduled to run.
    pub(crate) live: bool,
    /// Whether it runs, and can be moved.
    pub(crate) movable: bool,
    /// Limit of its CPU time, in cores.
    pub(crate) cores_max: Option<f64>,
    /// Its balancing policy.
    pub(crate) balancing: Balancing,
    /// How it is kept available when its node fails.
    pub(crate) ha: Option<HighAvailability>,
    /// Whether it began from a checkpoint, perhaps one that only its node has.
    pub(crate) was_restored: bool,
}

impl Placed {
    fn of(kinds: &Kinds, record: &Record) -> Self {
        let kind = kinds.of(&record.spec).ok();
        let compiled = kind.filter(|kind| kind.abilities().compiles);
        Placed {
            owner: record.owner.clone(),
            needs: Needs::of(kinds, &record.spec),
            compiled_image: compiled
                .and_then(|kind| kind.images(&record.spec).ok()?.into_iter().next()),
            epoch: record.epoch,
            live: !record.status.ended(),
            movable: record.status == Status::Running && record.paused.is_none(),
            cores_max: record
                .spec
                .cpu_limit_millis
                .map(|millis| f64::from(millis) / 1e3),
            balancing: record.spec.balancing,
            ha: record.spec.ha.clone(),
            was_restored: record.origin.is_some(),
        }
    }
}

/// A change of the machines of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PlacementChange {
    /// A machine belongs to this node now.
    Arrived {
        machine: MachineName,
        source: NodeName,
    },
    /// A machine belongs to another node now.
    Left { machine: MachineName },
    /// Room is reserved here for a machine.
    Arriving { machine: MachineName },
    /// The reservation is gone, and the machine does not belong to this node.
    ArrivalFailed { machine: MachineName },
}

/// All machines.
#[derive(Debug, Default)]
pub(crate) struct Placements {
    table: Mutex<HashMap<MachineName, Placed>>,
    /// What machines need: many need the same, which is kept once.
    needs: Mutex<BTreeSet<Needs>>,
}

/// The most distinct needs that are kept although no machine may have them any more.
const NEEDS_MAX: usize = 64;

impl Placements {
    fn table(&self) -> MutexGuard<'_, HashMap<MachineName, Placed>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same needs, which share their memory with equal ones.
    fn shared(&self, needs: Needs) -> Needs {
        let mut all = self.needs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.get(&needs) {
            return known.clone();
        }
        if all.len() >= NEEDS_MAX {
            all.retain(|known| Arc::strong_count(&known.features) > 1);
        }
        all.insert(needs.clone());
        needs
    }

    /// One machine.
    pub(crate) fn get(&self, machine: &str) -> Option<Placed> {
        self.table().get(machine).cloned()
    }

    /// Machines that are scheduled to run, and whose programs are compiled before.
    pub(crate) fn compiled(&self) -> Vec<(MachineName, Placed)> {
        self.live_with(|placed| placed.compiled_image.is_some())
    }

    /// Machines with high availability that are scheduled to run.
    pub(crate) fn highly_available(&self) -> Vec<(MachineName, Placed)> {
        self.live_with(|placed| placed.ha.is_some())
    }

    /// Those of the machines that are scheduled to run.
    fn live_with(&self, is_wanted: impl Fn(&Placed) -> bool) -> Vec<(MachineName, Placed)> {
        let table = self.table();
        let found = table
            .iter()
            .filter(|(_, placed)| placed.live && is_wanted(placed));
        found
            .map(|(machine, placed)| (machine.clone(), placed.clone()))
            .collect()
    }

    /// Machines that are scheduled to run, with their nodes.
    pub(crate) fn live(&self) -> Vec<(Name, Name)> {
        let table = self.table();
        let live = table.iter().filter(|(_, placed)| placed.live);
        live.map(|(machine, placed)| (machine.as_str().into(), placed.owner.as_str().into()))
            .collect()
    }

    /// Machines whose spec excludes them from balancing.
    pub(crate) fn opted_out(&self) -> BTreeSet<Name> {
        let table = self.table();
        let out = table
            .iter()
            .filter(|(_, placed)| placed.balancing.by == BalanceBy::Off);
        out.map(|(machine, _)| machine.as_str().into()).collect()
    }

    /// Machines to which balancing may give parts.
    pub(crate) fn spreadable(&self) -> BTreeMap<Name, Spreadable> {
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

    /// Follows the store until the agent ends.
    pub(crate) fn follow(
        self: Arc<Self>,
        context: Arc<Context>,
        changes: UnboundedSender<PlacementChange>,
    ) -> impl Future<Output = ()> {
        follow_all(context, self, changes)
    }

    /// Applies an entry of the store; returns the change for this node, if any.
    fn take(&self, kinds: &Kinds, here: &NodeName, entry: &KeyValue) -> Option<PlacementChange> {
        let Ok(Key::Machine(machine)) = entry.key.parse() else {
            return None;
        };
        let record = VersionedRecord::read(entry).ok()?.record;
        let mut placed = Placed::of(kinds, &record);
        placed.needs = self.shared(placed.needs);
        let owner = placed.owner.clone();
        let before = self.table().insert(machine.clone(), placed);
        let before = before.filter(|before| before.live)?.owner;
        if before != owner && owner == *here {
            let source = before;
            return Some(PlacementChange::Arrived { machine, source });
        }
        (before != owner && before == *here).then_some(PlacementChange::Left { machine })
    }
}

/// Follows the store until the receiver is dropped.
async fn follow_all(
    context: Arc<Context>,
    placements: Arc<Placements>,
    changes: UnboundedSender<PlacementChange>,
) {
    loop {
        if let Err(error) = follow_once(&context, &placements, &changes).await {
            tracing::warn!(%error, "cannot follow the placement of machines, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_once(
    context: &Context,
    placements: &Placements,
    changes: &UnboundedSender<PlacementChange>,
) -> Result<(), StoreError> {
    let listing = context.store.list(keys::MACHINES).await?;
    let known: Vec<String> = listing.entries.iter().map(|it| it.key.clone()).collect();
    placements
        .table()
        .retain(|machine, _| known.contains(&Key::Machine(machine.clone()).to_string()));
    for entry in &listing.entries {
        // Moves during an interruption of the watch are detected here.
        if let Some(change) = placements.take(&context.kinds, &context.name, entry) {
            let _ = changes.send(change);
        }
    }
    let from = listing.revision + 1;
    let mut watch = context.store.watch(keys::MACHINES, from).await?;
    while let Some(batch) = watch.next().await {
        for change in batch?.changes {
            match change {
                Change::Put(entry) => {
                    if let Some(change) = placements.take(&context.kinds, &context.name, &entry) {
                        // The balancer ends with the context.
                        let _ = changes.send(change);
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

/// Reports arrivals that begin or are abandoned: room that is reserved here, and released again.
pub(crate) async fn follow_arrivals(
    context: Arc<Context>,
    changes: UnboundedSender<PlacementChange>,
) {
    loop {
        if let Err(error) = follow_arrivals_once(&context, &changes).await {
            tracing::warn!(%error, "cannot follow arrivals, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_arrivals_once(
    context: &Context,
    changes: &UnboundedSender<PlacementChange>,
) -> Result<(), StoreError> {
    let prefix = keys::reservations_of(&context.name);
    let listing = context.store.list(&prefix).await?;
    let mut watch = context.store.watch(&prefix, listing.revision + 1).await?;
    while let Some(batch) = watch.next().await {
        for change in batch?.changes {
            let Ok(Key::Reservation(_, machine)) = change.key().parse() else {
                continue;
            };
            let change = match change {
                Change::Put(_) => PlacementChange::Arriving { machine },
                // The commit deletes it too: then the machine belongs to this node.
                Change::Delete { .. } => {
                    let record = get(&*context.store, &machine).await;
                    if record.is_ok_and(|found| found.record.owner == context.name) {
                        continue;
                    }
                    PlacementChange::ArrivalFailed { machine }
                }
            };
            let _ = changes.send(change);
        }
    }
    Ok(())
}
