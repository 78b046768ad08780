//! Places a new machine without a requested node on the least loaded of a few nodes: this one,
//! those that are the lightest by what gossip told, and others drawn at random. Asking a few is
//! nearly as good as asking all (Mitzenmacher, "The Power of Two Choices in Randomized Load
//! Balancing", TPDS 2001), and as fast in a cluster of thousands. What gossip told is some seconds
//! old, so it says whom to ask; their answers decide.

use super::handle::NodeBalancer;
use super::ledger::LedgerFilter;
use super::peers::{LOAD, ask_node};
use super::queries::load;
use crate::gossip::Known;
use crate::records::Needs;
use keel_api::NodeLoad;
use keel_balance::Name;
use keel_balance::policy::Mode;
use keel_balance::select::NodeState;
use keel_cluster::NodeName;
use rand::Rng;
use rand::seq::IteratorRandom;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Number of other nodes that are asked.
const ASKED: usize = 5;
/// Number of them that are asked because they seem light.
const LIGHT: usize = 3;
/// How long a node may take to answer before it is ignored.
const PATIENCE: Duration = Duration::from_millis(500);
/// The least difference in load for which another node is preferred to this one.
const NEARER: f64 = 0.1;

impl NodeBalancer {
    /// The node for a new machine without a requested node.
    pub(crate) async fn choose_node(
        self: &Arc<Self>,
        machine: &str,
        needs: &Needs,
        memory_bytes: u64,
    ) -> NodeName {
        choose(self, machine, needs, memory_bytes).await
    }
}

/// The node for a new machine with this memory limit: this one if it may be here and balancing is
/// off, or no other node is clearly less loaded.
async fn choose(
    handle: &Arc<NodeBalancer>,
    machine: &str,
    needs: &Needs,
    memory_bytes: u64,
) -> NodeName {
    let here = handle.context.name.clone();
    let (machine, needs) = (Name::from(machine), needs.clone());
    let peers = handle.query(move |balancer, _, rules| {
        let may = |node: &Name| {
            rules.forbids(&machine, node).is_none() && rules.host_forbids(&needs, node).is_none()
        };
        let others: Vec<Name> = rules.nodes().iter().filter(|it| may(it)).cloned().collect();
        (balancer.policy().0.mode, others)
    });
    let Ok((mode, allowed)) = peers.await else {
        return here;
    };
    let may_stay = allowed.iter().any(|it| **it == *here.as_str());
    if mode == Mode::Off && may_stay {
        return here;
    }
    let others = allowed.iter().filter(|it| ***it != *here.as_str());
    let others = others.filter_map(|it| NodeName::new(it).ok());
    let doubted = handle.gossip.doubted().borrow().clone();
    let others = others.filter(|it| !doubted.contains(it)).collect();
    let known = handle.gossip.known();
    let asked = whom_to_ask(others, &known, memory_bytes, &mut rand::rng());
    // Where it cannot be here, a node of which nothing is known is better.
    let unmeasured = asked.first().filter(|_| !may_stay).cloned();
    let mut answers = JoinSet::new();
    for node in asked {
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
    let own = match may_stay {
        true => load(handle)
            .await
            .ok()
            .and_then(|it| with_newest(handle, it)),
        false => None,
    };
    let chosen = lightest(may_stay, own.as_ref(), &sides, memory_bytes);
    chosen.or(unmeasured).unwrap_or(here)
}

/// The nodes to ask: the lightest by what is known of them, and others at random.
fn whom_to_ask(
    mut others: Vec<NodeName>,
    known: &BTreeMap<NodeName, Known>,
    memory_bytes: u64,
    rng: &mut impl Rng,
) -> Vec<NodeName> {
    let weight = |node: &NodeName| {
        let load = known.get(node).and_then(|known| known.load);
        load.map(|(load, _)| (load.memory_free_bytes < memory_bytes, load.load))
    };
    others.sort_by(|one, other| match (weight(one), weight(other)) {
        (Some(one), Some(other)) => one.0.cmp(&other.0).then(one.1.total_cmp(&other.1)),
        (one, other) => one.is_none().cmp(&other.is_none()),
    });
    let light = others.iter().take(LIGHT);
    let light = light.take_while(|it| weight(it).is_some()).count();
    let rest = others.split_off(light);
    let drawn = rest.into_iter().sample(rng, ASKED - light);
    others.into_iter().chain(drawn).collect()
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
    use keel_cluster::gossip::Load;

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
    fn those_that_seem_light_are_asked_and_some_others() {
        let name = |number: usize| -> NodeName { format!("n{number}").parse().expect("a name") };
        let load = |load, memory_free_bytes| Known {
            liveness: None,
            load: Some((
                Load {
                    load,
                    memory_free_bytes,
                    is_pressed: false,
                },
                Duration::ZERO,
            )),
        };
        // (n9 is light and full; nothing is known of n0 to n3.)
        let mut known: BTreeMap<_, _> = (4..9)
            .map(|number| (name(number), load(number as f32, 100)))
            .collect();
        known.insert(name(9), load(0.0, 10));
        let mut rng = rand::rng();
        let mut seen = BTreeMap::new();
        for _ in 0..200 {
            let asked = whom_to_ask((0..10).map(name).collect(), &known, 50, &mut rng);
            assert_eq!(asked.len(), ASKED);
            assert_eq!(asked[..3], [name(4), name(5), name(6)]);
            for node in asked {
                *seen.entry(node).or_insert(0) += 1;
            }
        }
        assert_eq!(seen.len(), 10, "the others have their turn: {seen:?}");
        assert!(
            seen.values().all(|times| *times <= 200),
            "nobody is asked twice"
        );
        let all = whom_to_ask((0..3).map(name).collect(), &known, 50, &mut rng);
        assert_eq!(all.len(), 3);
        let light = whom_to_ask(vec![name(9), name(8)], &known, 50, &mut rng);
        assert_eq!(light, [name(8), name(9)]);
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
