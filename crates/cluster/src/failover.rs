//! Where machines with high availability have their checkpoints, and where they are restarted when
//! their node fails: pure decisions. Agents carry them out (`crates/node/src/failover`).
//!
//! - Copies of a checkpoint go to other failure domains (label `zone`) than the machine's node and
//!   than each other, where the nodes permit it; among equals to nodes that have an earlier
//!   checkpoint, of which only the difference is sent; among these by rendezvous hashing (Thaler
//!   and Ravishankar 1998), so that each node gets a like share and few change when nodes come and
//!   go.
//! - Machines are restarted by priority, and among equals the small ones first, as they return
//!   sooner. Each goes to the node with its checkpoint that has most room left; only where none of
//!   these has room, to another one, which has to fetch the checkpoint.

use keel_net::{MachineName, NodeName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The label of nodes that names their failure domain.
pub const ZONE: &str = "zone";

/// The failure domain in a node's labels, as the store has them (a JSON object); `None` if they
/// name none, or cannot be read.
pub fn zone_of(labels: &[u8]) -> Option<String> {
    let labels: BTreeMap<String, String> = serde_json::from_slice(labels).ok()?;
    labels.get(ZONE).cloned()
}

/// A node that may have copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaNode {
    pub node: NodeName,
    /// Its failure domain.
    pub zone: Option<String>,
    /// Whether it has an earlier checkpoint of the machine.
    pub has_earlier: bool,
}

/// Up to `wanted` of `candidates` for the checkpoints of a machine on a node of zone `home`, best
/// first.
pub fn choose_replicas(
    machine: &MachineName,
    home: Option<&str>,
    wanted: usize,
    candidates: &[ReplicaNode],
) -> Vec<NodeName> {
    let mut zones: BTreeSet<&str> = home.into_iter().collect();
    let mut left: Vec<&ReplicaNode> = candidates.iter().collect();
    let mut chosen = Vec::new();
    while chosen.len() < wanted {
        let best = left.iter().enumerate().min_by_key(|(_, it)| {
            let is_apart = it.zone.as_deref().is_some_and(|zone| !zones.contains(zone));
            (!is_apart, !it.has_earlier, rank(machine, &it.node))
        });
        let Some((at, _)) = best else { break };
        let best = left.swap_remove(at);
        zones.extend(best.zone.as_deref());
        chosen.push(best.node.clone());
    }
    chosen
}

/// Rank of a node for a machine: the same for all who ask, and as good as random.
fn rank(machine: &MachineName, node: &NodeName) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(machine.as_str().as_bytes());
    // No name has it.
    hasher.update(b"/");
    hasher.update(node.as_str().as_bytes());
    let hash = hasher.finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// A machine whose node failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Homeless {
    pub machine: MachineName,
    /// Higher ones first.
    pub priority: u32,
    /// What it needs.
    pub memory_bytes: u64,
    /// The nodes that have its checkpoint; `None` where every node reaches it.
    pub members: Option<BTreeSet<NodeName>>,
    /// Whether what the members have cannot be fetched from them.
    pub members_only: bool,
    /// The nodes on which rules do not allow it.
    pub forbidden: BTreeSet<NodeName>,
}

/// Where a machine is to be restarted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// On a node that has its checkpoint, or reaches it.
    On(NodeName),
    /// On a node that has to fetch its checkpoint from one that has it.
    Fetched(NodeName),
    /// Nowhere, until a node that has its checkpoint returns.
    NoMember,
    /// Nowhere, until a node has as much memory: this is the most that one has.
    NoRoom { most_bytes: u64 },
}

/// Decides for all machines of failed nodes, in the order in which they are restarted. `free` are
/// the nodes that are there, with the memory in bytes that they have for machines: 0 where they
/// take none.
pub fn place(
    mut machines: Vec<Homeless>,
    free: &BTreeMap<NodeName, u64>,
) -> Vec<(MachineName, Placement)> {
    machines.sort_by(|a, b| {
        let of = |it: &Homeless| (std::cmp::Reverse(it.priority), it.memory_bytes);
        of(a).cmp(&of(b)).then_with(|| a.machine.cmp(&b.machine))
    });
    let mut free = free.clone();
    machines
        .into_iter()
        .map(|it| {
            let placement = place_one(&it, &mut free);
            (it.machine, placement)
        })
        .collect()
}

/// Memory in bytes that a node keeps free for machines that the loss of another node would bring
/// there, by the node that is lost. What arrives otherwise does not get it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Headroom(pub BTreeMap<NodeName, u64>);

impl Headroom {
    /// What is kept from a machine of this memory that comes from a node: the most that the loss of
    /// any node would bring. The loss of its source would not bring the machine, once it is here.
    pub fn kept_from(&self, source: Option<&NodeName>, memory_bytes: u64) -> u64 {
        let kept = self
            .0
            .iter()
            .map(|(lost, bytes)| match Some(lost) == source {
                true => bytes.saturating_sub(memory_bytes),
                false => *bytes,
            });
        kept.max().unwrap_or(0)
    }

    /// Whether it says about the same as another one: within a twentieth, or 16 MiB.
    pub fn is_like(&self, other: &Self) -> bool {
        let nodes: BTreeSet<&NodeName> = self.0.keys().chain(other.0.keys()).collect();
        nodes.into_iter().all(|node| {
            let of = |it: &Self| it.0.get(node).copied().unwrap_or(0);
            let (one, two) = (of(self), of(other));
            one.abs_diff(two) <= (one.max(two) / 20).max(16 << 20)
        })
    }
}

/// The headroom of each node for the loss of any one other: where the machines of a lost node would
/// be placed, with their memory in bytes.
pub fn headroom<'a>(
    losses: impl IntoIterator<Item = (&'a NodeName, &'a [(u64, Placement)])>,
) -> BTreeMap<NodeName, Headroom> {
    let mut all: BTreeMap<NodeName, Headroom> = BTreeMap::new();
    for (lost, machines) in losses {
        for (bytes, placement) in machines {
            if let Placement::On(target) | Placement::Fetched(target) = placement {
                let of = all.entry(target.clone()).or_default();
                *of.0.entry(lost.clone()).or_default() += bytes;
            }
        }
    }
    all
}

fn place_one(machine: &Homeless, free: &mut BTreeMap<NodeName, u64>) -> Placement {
    let is_member = |node: &NodeName| {
        let members = machine.members.as_ref();
        members.is_none_or(|members| members.contains(node))
    };
    if machine.members.is_some() && !free.keys().any(is_member) {
        return Placement::NoMember;
    }
    let is_allowed = |node: &NodeName| {
        !machine.forbidden.contains(node) && (!machine.members_only || is_member(node))
    };
    // Of equals the first by name: the same for all who ask.
    let best = free
        .iter()
        .filter(|(node, bytes)| **bytes > 0 && is_allowed(node))
        .filter(|(_, bytes)| **bytes >= machine.memory_bytes)
        .map(|(node, bytes)| (is_member(node), *bytes, std::cmp::Reverse(node.clone())))
        .max();
    let Some((has_checkpoint, _, std::cmp::Reverse(node))) = best else {
        let allowed = free.iter().filter(|(node, _)| is_allowed(node));
        let most_bytes = allowed.map(|(_, bytes)| *bytes).max().unwrap_or(0);
        return Placement::NoRoom { most_bytes };
    };
    if let Some(bytes) = free.get_mut(&node) {
        *bytes -= machine.memory_bytes;
    }
    match has_checkpoint {
        true => Placement::On(node),
        false => Placement::Fetched(node),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeName {
        name.parse().unwrap()
    }

    fn machine(name: &str) -> MachineName {
        name.parse().unwrap()
    }

    /// `a@z`: node a in zone z; `+a`: it has an earlier checkpoint.
    fn candidates(text: &str) -> Vec<ReplicaNode> {
        let of = |word: &str| {
            let (has_earlier, rest) = match word.strip_prefix('+') {
                Some(rest) => (true, rest),
                None => (false, word),
            };
            let (name, zone) = match rest.split_once('@') {
                Some((name, zone)) => (name, Some(zone.to_owned())),
                None => (rest, None),
            };
            ReplicaNode {
                node: node(name),
                zone,
                has_earlier,
            }
        };
        text.split_whitespace().map(of).collect()
    }

    fn chosen(home: Option<&str>, wanted: usize, text: &str) -> Vec<String> {
        let chosen = choose_replicas(&machine("m"), home, wanted, &candidates(text));
        chosen.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn copies_are_in_other_failure_domains() {
        assert_eq!(chosen(Some("x"), 1, "a@x b@x c@y"), ["c"]);
        // Before what has an earlier one.
        assert_eq!(chosen(Some("x"), 1, "+a@x b@x c@y"), ["c"]);
        let both = chosen(Some("x"), 2, "a@y b@y c@z");
        assert!(both.contains(&"c".to_owned()), "{both:?}");
        // Not refused where there is only one.
        assert_eq!(chosen(Some("x"), 1, "a@x"), ["a"]);
        assert_eq!(chosen(None, 3, "a b").len(), 2);
    }

    #[test]
    fn of_equals_the_one_that_has_an_earlier_checkpoint() {
        for has in ["a", "b", "c", "d"] {
            let text = ["a", "b", "c", "d"].map(|it| match it == has {
                true => format!("+{it}"),
                false => it.to_owned(),
            });
            assert_eq!(chosen(None, 1, &text.join(" ")), [has]);
        }
    }

    #[test]
    fn each_node_gets_a_like_share_and_few_change_when_one_goes() {
        let nodes = candidates("a b c d e");
        let of = |number: u32, nodes: &[ReplicaNode]| {
            choose_replicas(&machine(&format!("m-{number}")), None, 1, nodes)[0].clone()
        };
        let mut shares: BTreeMap<NodeName, u32> = BTreeMap::new();
        let mut changed = 0;
        for number in 0..1000 {
            let before = of(number, &nodes);
            let after = of(number, &nodes[..4]);
            changed += u32::from(before != after);
            *shares.entry(before).or_default() += 1;
        }
        assert!(
            shares.values().all(|share| (140..260).contains(share)),
            "{shares:?}"
        );
        assert_eq!(changed, shares[&node("e")]);
    }

    fn homeless(name: &str, priority: u32, memory_bytes: u64, members: &[&str]) -> Homeless {
        Homeless {
            machine: machine(name),
            priority,
            memory_bytes,
            members: Some(members.iter().map(|name| node(name)).collect()),
            members_only: false,
            forbidden: BTreeSet::new(),
        }
    }

    fn free(nodes: &[(&str, u64)]) -> BTreeMap<NodeName, u64> {
        nodes
            .iter()
            .map(|(name, bytes)| (node(name), *bytes))
            .collect()
    }

    #[test]
    fn by_priority_and_then_the_small_ones() {
        let all = vec![
            homeless("low", 1, 10, &["a"]),
            homeless("big", 5, 30, &["a"]),
            homeless("small", 5, 10, &["a"]),
            homeless("high", 9, 60, &["a"]),
        ];
        let placed = place(all, &free(&[("a", 100)]));
        let order: Vec<&str> = placed.iter().map(|(machine, _)| machine.as_str()).collect();
        assert_eq!(order, ["high", "small", "big", "low"]);
        let on_a = Placement::On(node("a"));
        assert!(placed[..3].iter().all(|(_, placement)| *placement == on_a));
        // Exactly nothing is left for the last one.
        assert_eq!(placed[3].1, Placement::NoRoom { most_bytes: 0 });
    }

    #[test]
    fn where_its_checkpoint_is_and_most_is_free() {
        let free = free(&[("a", 50), ("b", 70), ("c", 90)]);
        let of = |memory, members: &[&str]| {
            place(vec![homeless("m", 5, memory, members)], &free)[0]
                .1
                .clone()
        };
        assert_eq!(of(10, &["a", "b"]), Placement::On(node("b")));
        assert_eq!(of(80, &["a", "b"]), Placement::Fetched(node("c")));
        assert_eq!(of(91, &["a"]), Placement::NoRoom { most_bytes: 90 });
        assert_eq!(of(10, &["d"]), Placement::NoMember);
        // What the members have can only be there.
        let bound = |memory| Homeless {
            members_only: true,
            ..homeless("m", 5, memory, &["a", "b"])
        };
        let placed = |memory| place(vec![bound(memory)], &free)[0].1.clone();
        assert_eq!(placed(10), Placement::On(node("b")));
        assert_eq!(placed(80), Placement::NoRoom { most_bytes: 70 });
        let everywhere = Homeless {
            members: None,
            ..homeless("m", 5, 10, &[])
        };
        assert_eq!(
            place(vec![everywhere], &free)[0].1,
            Placement::On(node("c"))
        );
    }

    #[test]
    fn rules_and_drains_are_kept() {
        let mut machine = homeless("m", 5, 10, &["a", "b"]);
        machine.forbidden = BTreeSet::from([node("a")]);
        let placed = |free| place(vec![machine.clone()], &free)[0].1.clone();
        let on_b = Placement::On(node("b"));
        assert_eq!(placed(free(&[("a", 90), ("b", 50)])), on_b);
        // A node that is drained sends its checkpoint to where the machine may run.
        let fetched = Placement::Fetched(node("c"));
        assert_eq!(placed(free(&[("a", 90), ("b", 0), ("c", 20)])), fetched);
        let no_room = Placement::NoRoom { most_bytes: 5 };
        assert_eq!(placed(free(&[("a", 90), ("b", 5)])), no_room);
    }

    #[test]
    fn a_node_keeps_the_most_that_one_loss_would_bring() {
        let on = |bytes, target: &str| (bytes, Placement::On(node(target)));
        let fetched = (7, Placement::Fetched(node("c")));
        let (a, b) = (node("a"), node("b"));
        let of_a = [on(10, "c"), on(20, "c"), on(5, "b"), fetched];
        let of_b = [on(30, "c"), (9, Placement::NoMember)];
        let all = headroom([(&a, &of_a[..]), (&b, &of_b[..])]);
        let kept = |node: &NodeName, source, bytes| {
            all.get(node).map_or(0, |it| it.kept_from(source, bytes))
        };
        assert_eq!(kept(&node("c"), None, 0), 37);
        assert_eq!(kept(&b, None, 0), 5);
        assert_eq!(kept(&a, None, 0), 0);
        // One of those 37 comes: the loss of b counts then.
        assert_eq!(kept(&node("c"), Some(&a), 10), 30);
        assert_eq!(kept(&node("c"), Some(&a), 3), 34);
        assert_eq!(kept(&node("c"), Some(&b), 30), 37);
        let of = |bytes| Headroom(BTreeMap::from([(node("a"), bytes)]));
        assert!(of(0).is_like(&Headroom::default()));
        assert!(of(1 << 30).is_like(&of((1 << 30) + (50 << 20))));
        assert!(!of(1 << 30).is_like(&of((1 << 30) + (60 << 20))));
        assert!(!of(17 << 20).is_like(&Headroom::default()));
    }

    /// What one takes is not there for the next.
    #[test]
    fn machines_are_spread_by_what_is_left() {
        let all = (0..4).map(|number| homeless(&format!("m-{number}"), 5, 40, &["a", "b"]));
        let placed = place(all.collect(), &free(&[("a", 80), ("b", 80)]));
        let on = |name| {
            let there = Placement::On(node(name));
            placed
                .iter()
                .filter(|(_, placement)| *placement == there)
                .count()
        };
        assert_eq!((on("a"), on("b")), (2, 2));
    }
}
