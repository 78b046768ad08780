//! Places a new machine without a requested node on the least loaded of a few nodes: this one, and
//! others drawn at random. Asking a few is nearly as good as asking all (Mitzenmacher, "The Power
//! of Two Choices in Randomized Load Balancing", TPDS 2001), and as fast in a cluster of
//! thousands.

use super::handle::NodeBalancer;
use super::ledger::LedgerFilter;
use super::peers::{LOAD, ask_node};
use super::queries::load;
use keel_api::NodeLoad;
use keel_balance::Name;
use keel_balance::policy::Mode;
use keel_balance::select::NodeState;
use keel_cluster::NodeName;
use rand::seq::IteratorRandom;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Number of other nodes that are asked.
const ASKED: usize = 5;
/// How long a node may take to answer before it is ignored.
const PATIENCE: Duration = Duration::from_millis(500);
/// The least difference in load for which another node is preferred to this one.
const NEARER: f64 = 0.1;

impl NodeBalancer {
    /// The node for a new machine without a requested node.
    pub(crate) async fn choose_node(
        self: &Arc<Self>,
        machine: &str,
        memory_bytes: u64,
    ) -> NodeName {
        choose(self, machine, memory_bytes).await
    }
}

/// The node for a new machine with this memory limit: this one if balancing is off, or no other
/// node is clearly less loaded.
async fn choose(handle: &Arc<NodeBalancer>, machine: &str, memory_bytes: u64) -> NodeName {
    let here = handle.context.name.clone();
    let machine: Name = machine.into();
    let peers = handle.query(move |balancer, _, rules| {
        let may = |node: &Name| rules.forbids(&machine, node).is_none();
        let others: Vec<Name> = rules.nodes().iter().filter(|it| may(it)).cloned().collect();
        (balancer.policy().0.mode, others)
    });
    let Ok((mode, allowed)) = peers.await else {
        return here;
    };
    if mode == Mode::Off {
        return here;
    }
    let others = allowed.iter().filter(|it| ***it != *here.as_str());
    let asked = others.sample(&mut rand::rng(), ASKED);
    let mut answers = JoinSet::new();
    for node in asked.into_iter().filter_map(|it| NodeName::new(it).ok()) {
        let handle = handle.clone();
        answers.spawn(async move {
            let all = LedgerFilter::default();
            let told = ask_node(&handle, &node, LOAD, &all, load(&handle));
            let told: NodeLoad = tokio::time::timeout(PATIENCE, told).await.ok()?.ok()?;
            let side = with_newest(&handle, told)?;
            Some((node, side))
        });
    }
    let mut sides: Vec<(NodeName, NodeState)> = Vec::new();
    while let Some(joined) = answers.join_next().await {
        sides.extend(joined.ok().flatten());
    }
    let may_stay = allowed.iter().any(|it| **it == *here.as_str());
    let own = match may_stay {
        true => load(handle)
            .await
            .ok()
            .and_then(|it| with_newest(handle, it)),
        false => None,
    };
    lightest(may_stay, own.as_ref(), &sides, memory_bytes).unwrap_or(here)
}

/// A node's reported state, with the machines that were placed there since: for each machine that
/// it has not measured, the promised load, or one core.
fn with_newest(handle: &NodeBalancer, told: NodeLoad) -> Option<NodeState> {
    let mut side = told.side?;
    let sample = told.sample?;
    let measured = |machine: &Name| sample.machines.iter().any(|it| it.name == *machine);
    let live = handle.placements.live();
    let newest = live
        .iter()
        .filter(|(machine, owner)| **owner == *told.node && !measured(machine));
    let promises = |(machine, _): &(Name, Name)| {
        let placed = handle.placements.get(machine);
        let millis = placed.and_then(|placed| placed.balancing.cpu_target_millis);
        millis.map_or(1.0, |millis| f64::from(millis) / 1e3)
    };
    side.load += newest.map(promises).sum::<f64>() / side.capacity.power();
    Some(side)
}

/// The least loaded of the other nodes, if it is preferred.
fn lightest(
    may_stay: bool,
    own: Option<&NodeState>,
    others: &[(NodeName, NodeState)],
    memory_bytes: u64,
) -> Option<NodeName> {
    // If none has room for the whole limit, the least loaded one is as good.
    let has_room = |side: &NodeState| side.memory_free_bytes >= memory_bytes;
    let key = |side: &NodeState| (!has_room(side), side.load);
    let least = others.iter().min_by(|(_, one), (_, other)| {
        let (one, other) = (key(one), key(other));
        one.0.cmp(&other.0).then(one.1.total_cmp(&other.1))
    });
    let (node, side) = least?;
    let taken = match own {
        // The node has not measured for long enough.
        None => !may_stay,
        Some(own) => match (has_room(own), has_room(side)) {
            (false, true) => true,
            (true, false) => false,
            _ => side.load + NEARER < own.load,
        },
    };
    taken.then(|| node.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_balance::load::Capacity;

    fn side(load: f64, free: u64) -> NodeState {
        NodeState {
            capacity: Capacity {
                cores: 1.0,
                speed: 1.0,
                memory_bytes: 1000,
                io_bytes_per_s: 1e9,
            },
            load,
            memory_free_bytes: free,
            pressed: false,
            free: false,
        }
    }

    #[test]
    fn the_lightest_with_room_is_taken_and_else_the_nearest() {
        let name = |text: &str| NodeName::new(text).unwrap();
        let others = |b: (f64, u64), c: (f64, u64)| {
            vec![(name("b"), side(b.0, b.1)), (name("c"), side(c.0, c.1))]
        };
        let chosen = |own: Option<(f64, u64)>, others: &[(NodeName, NodeState)]| {
            let own = own.map(|(load, free)| side(load, free));
            lightest(true, own.as_ref(), others, 100).map(|it| it.to_string())
        };
        let level = others((0.5, 200), (0.45, 200));
        assert_eq!(chosen(Some((0.5, 200)), &level), None);
        assert_eq!(chosen(Some((0.6, 200)), &level).as_deref(), Some("c"));
        // Room takes precedence.
        assert_eq!(chosen(Some((0.1, 50)), &level).as_deref(), Some("c"));
        let full = others((0.5, 200), (0.1, 50));
        assert_eq!(chosen(Some((0.9, 200)), &full).as_deref(), Some("b"));
        assert_eq!(
            chosen(Some((0.9, 50)), &others((0.5, 50), (0.6, 50))).as_deref(),
            Some("b")
        );
        assert_eq!(
            chosen(Some((0.9, 200)), &others((0.1, 50), (0.2, 50))),
            None
        );
        // The load of this node is unknown, or no other node answers.
        assert_eq!(chosen(None, &level), None);
        assert_eq!(chosen(Some((0.9, 200)), &[]), None);
        // A rule, or a drain, forbids this node.
        let away = lightest(false, None, &level, 100);
        assert_eq!(away, Some(name("c")));
    }
}
