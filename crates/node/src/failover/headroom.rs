//! Whether the cluster has room for the loss of any one node (N+1): what would become of the
//! machines of each node, by the rule that decides when it fails. The node that acts for all tells
//! each node how much memory to keep free for that (`headroom/NODE`); what is placed there otherwise
//! does not get it (`records::check_free_memory`).

use super::candidates::{Dependencies, forbidden, free_memory, one_homeless};
use crate::error::CommandError;
use crate::records::{self, RecordError};
use crate::role::Role;
use keel_api::NodeLoss;
use keel_cluster::failover::{Headroom, Homeless, Placement, headroom, place};
use keel_cluster::{MachineName, NodeName};
use keel_machine::high_availability::HighAvailability;
use keel_net::coarse_timer;
use keel_store::encoding;
use keel_store::keys::{HEADROOM, Key};
use keel_store::{StoreError, Txn};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// How often the headroom of all nodes is determined.
const KEEP_EVERY: Duration = Duration::from_secs(10);

/// What the loss of a node would mean for its machines, in the order in which they would be
/// restarted, with their memory in bytes.
struct Loss(Vec<(MachineName, u64, Placement)>);

/// The machines with high availability of each node, as a failover would see them now.
struct Expected {
    of_nodes: BTreeMap<NodeName, Vec<Homeless>>,
    /// The free memory of the nodes that answer.
    free: BTreeMap<NodeName, u64>,
}

impl Expected {
    async fn now(at: &Dependencies) -> Result<Self, RecordError> {
        let mut of_nodes: BTreeMap<NodeName, Vec<Homeless>> = BTreeMap::new();
        let machines = at.placements.highly_available();
        let Some(some) = machines.first().map(|(machine, _)| machine.clone()) else {
            let free = BTreeMap::new();
            return Ok(Expected { of_nodes, free });
        };
        let sets = records::in_sync_sets(&*at.context.store);
        let (sets, free) = tokio::join!(sets, free_memory(at, &some));
        let mut sets = sets?;
        for (machine, placed) in machines {
            let Some(ha) = &placed.ha else { continue };
            let set = sets.remove(&machine);
            let was_restored = placed.was_restored;
            let homeless = one_homeless(at, &machine, &placed.needs.kind, ha, set, was_restored);
            of_nodes.entry(placed.owner).or_default().push(homeless);
        }
        Ok(Expected { of_nodes, free })
    }

    fn loss(&self, node: &NodeName, machines: Vec<Homeless>) -> Loss {
        let mut others = self.free.clone();
        others.remove(node);
        let bytes: BTreeMap<MachineName, u64> = machines
            .iter()
            .map(|it| (it.machine.clone(), it.memory_bytes))
            .collect();
        let placed = place(machines, &others).into_iter();
        Loss(
            placed
                .map(|(machine, placement)| {
                    let bytes = bytes.get(&machine).copied().unwrap_or(0);
                    (machine, bytes, placement)
                })
                .collect(),
        )
    }

    fn losses(&self) -> BTreeMap<NodeName, Loss> {
        let each = self.of_nodes.iter();
        each.map(|(node, machines)| (node.clone(), self.loss(node, machines.clone())))
            .collect()
    }
}

impl Loss {
    /// Machines that would have nowhere to go.
    fn waiting(&self) -> impl Iterator<Item = &MachineName> {
        let all = self.0.iter();
        all.filter(|(.., placement)| {
            matches!(placement, Placement::NoMember | Placement::NoRoom { .. })
        })
        .map(|(machine, ..)| machine)
    }
}

/// What the loss of each node that has machines with high availability would mean now.
///
/// # Errors
/// [`CommandError`] if the store does not answer.
pub(crate) async fn losses(at: &Dependencies) -> Result<Vec<NodeLoss>, CommandError> {
    let losses = Expected::now(at).await?.losses();
    let info = losses.into_iter().map(|(node, loss)| {
        let waiting: Vec<String> = loss.waiting().map(ToString::to_string).collect();
        NodeLoss {
            node: node.to_string(),
            restarted: u32::try_from(loss.0.len() - waiting.len()).unwrap_or(u32::MAX),
            waiting,
        }
    });
    Ok(info.collect())
}

/// Refuses a new machine with high availability that promises to need so much memory, if the loss of
/// its node would leave a machine without room that has some now, or itself.
///
/// # Errors
/// [`CommandError::Conflict`], with the machine; [`CommandError`] if the store does not answer.
pub(crate) async fn check_new(
    at: &Dependencies,
    machine: &MachineName,
    node: &NodeName,
    ha: &HighAvailability,
    memory_bytes: u64,
) -> Result<(), CommandError> {
    let expected = Expected::now(at).await?;
    let own = expected.of_nodes.get(node).cloned().unwrap_or_default();
    let new = Homeless {
        machine: machine.clone(),
        priority: ha.priority,
        memory_bytes,
        members: None,
        members_only: false,
        forbidden: forbidden(at, machine),
    };
    let before = expected.loss(node, own.clone());
    let after = expected.loss(node, [own, vec![new]].concat());
    let waited: BTreeSet<&MachineName> = before.waiting().collect();
    // Where there is no other node, there is nothing to keep.
    let is_alone = expected.free.keys().all(|other| other == node);
    match after.waiting().find(|it| !waited.contains(it)) {
        Some(homeless) if !is_alone => Err(CommandError::Conflict(format!(
            "with it, no node would have room for machine {homeless:?} if node {node} failed: it \
             promises to need {} MiB (memory.target); free memory, add a node, or promise less",
            memory_bytes >> 20
        ))),
        _ => Ok(()),
    }
}

/// Tells nodes how much memory to keep free, while this node has the role, until the agent ends.
pub(super) async fn keep(at: Arc<Dependencies>, mut role: Role) {
    let mut keeper = Keeper::default();
    loop {
        tokio::select! {
            () = coarse_timer::sleep(KEEP_EVERY) => {}
            () = role.changed() => {}
        }
        if !role.is_held() {
            // Another node acts for all.
            keeper.told = None;
            continue;
        }
        if let Err(error) = keeper.write(&at).await {
            tracing::warn!(%error, "nodes are not told how much memory to keep for failovers");
            keeper.told = None;
        }
    }
}

#[derive(Default)]
struct Keeper {
    /// What the store has; `None` until it is read.
    told: Option<BTreeMap<NodeName, Headroom>>,
}

impl Keeper {
    /// Writes what has changed.
    async fn write(&mut self, at: &Dependencies) -> Result<(), RecordError> {
        let store = &*at.context.store;
        let told = match &mut self.told {
            Some(told) => told,
            None => self.told.insert(read(store).await?),
        };
        let losses = Expected::now(at).await?.losses();
        let placed: BTreeMap<NodeName, Vec<(u64, Placement)>> = losses
            .into_iter()
            .map(|(node, loss)| {
                let machines = loss.0.into_iter();
                let machines = machines.map(|(_, bytes, placement)| (bytes, placement));
                (node, machines.collect())
            })
            .collect();
        let now = headroom(placed.iter().map(|(node, machines)| (node, &machines[..])));
        let nodes: BTreeSet<NodeName> = now.keys().chain(told.keys()).cloned().collect();
        for node in nodes {
            let wanted = now.get(&node).cloned().unwrap_or_default();
            let known = told.get(&node).cloned().unwrap_or_default();
            if wanted.is_like(&known) && (wanted.0.is_empty() == known.0.is_empty()) {
                continue;
            }
            let key = Key::Headroom(node.clone());
            let txn = match wanted.0.is_empty() {
                true => Txn::new().delete(key),
                false => {
                    let value = encoding::encode("a headroom", &wanted);
                    let value = value.map_err(|error| RecordError::Damaged(error.to_string()))?;
                    Txn::new().put(key, value)
                }
            };
            store.txn(txn).await?;
            told.insert(node, wanted);
        }
        Ok(())
    }
}

async fn read(store: &dyn keel_store::Store) -> Result<BTreeMap<NodeName, Headroom>, StoreError> {
    let entries = store.list(HEADROOM).await?.entries.into_iter();
    let read = entries.filter_map(|entry| {
        let Ok(Key::Headroom(node)) = entry.key.parse() else {
            return None;
        };
        // What cannot be read is written anew.
        let headroom = encoding::decode("a headroom", &entry.value).unwrap_or_default();
        Some((node, headroom))
    });
    Ok(read.collect())
}
