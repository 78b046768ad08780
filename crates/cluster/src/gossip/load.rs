//! Loads that ride on gossip: each node tells its own when it changes, and all others keep the
//! newest of each. They are seconds old, so they say whom to ask, not what to decide.

use crate::gossip::instance::{NodeKey, Start};
use foca::{BroadcastHandler, Invalidates};
use keel_net::NodeName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The first byte of what rides on gossip: a load. Others are of later versions, and ignored.
const LOAD: u8 = 1;

/// A load that changed by this share of the node is told at once.
const LOAD_STEP: f32 = 0.05;
/// Free memory that changed by this share of itself is told at once.
const MEMORY_STEP: f64 = 0.1;
/// Pause between two loads that a node tells, at least, in a small cluster.
const TELL_EVERY_MIN: Duration = Duration::from_secs(2);
/// What each other node adds to it, so that all of them together do not tell more than gossip
/// carries.
const TELL_EVERY_PER_NODE: Duration = Duration::from_millis(10);
/// A load is told after this time even if it is the same.
const TELL_EVERY_MAX: Duration = Duration::from_secs(30);

/// Nodes whose loads are kept: more than a cluster has.
const NODES_MAX: usize = 20_000;

/// What a node tells of its load. Fields are added at the end only: older nodes ignore them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Demand as a share of the node's capacity; may exceed 1.
    pub load: f32,
    /// Memory that a new machine may use.
    pub memory_free_bytes: u64,
    /// Whether it is under pressure.
    pub is_pressed: bool,
}

impl Load {
    /// Whether `nodes` others should hear of `self` now, who heard of `told` this long ago.
    fn differs(&self, told: Option<(&Load, Duration)>, nodes: usize) -> bool {
        let Some((told, ago)) = told else {
            return true;
        };
        if ago >= TELL_EVERY_MAX {
            return true;
        }
        let memory = self.memory_free_bytes.abs_diff(told.memory_free_bytes) as f64;
        let differs = (self.load - told.load).abs() >= LOAD_STEP
            || memory >= told.memory_free_bytes as f64 * MEMORY_STEP
            || self.is_pressed != told.is_pressed;
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        differs && ago >= TELL_EVERY_MIN + TELL_EVERY_PER_NODE.saturating_mul(nodes)
    }
}

/// A node's load on its way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Told {
    node: NodeName,
    start: Start,
    /// Counts what the node tells since its start.
    number: u64,
    load: Load,
}

/// A node's load, as heard last.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heard {
    /// What the node told.
    pub load: Load,
    /// When it was heard, by this node's clock.
    pub at: Duration,
    order: (Start, u64),
}

/// The newest loads of all nodes; clones share them. [`foca`] asks it what to spread.
#[derive(Debug, Clone, Default)]
pub(super) struct Loads(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    /// This node, whose load no other one tells.
    own: Option<NodeName>,
    now: Duration,
    heard: BTreeMap<NodeName, Heard>,
}

impl Loads {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of a node that knows none yet.
    pub(super) fn of(own: NodeName) -> Self {
        let loads = Loads::default();
        loads.table().own = Some(own);
        loads
    }

    /// Says what time it is.
    pub(super) fn set_now(&self, now: Duration) {
        self.table().now = now;
    }

    /// All that was heard, this node's own included.
    pub(super) fn all(&self) -> BTreeMap<NodeName, Heard> {
        self.table().heard.clone()
    }

    /// Forgets nodes that are no members.
    pub(super) fn retain(&self, keep: impl Fn(&NodeName) -> bool) {
        self.table().heard.retain(|node, _| keep(node));
    }

    /// What this node tells `nodes` others now, if it is time.
    pub(super) fn own(
        &self,
        node: &NodeName,
        start: Start,
        load: Load,
        nodes: usize,
    ) -> Option<Vec<u8>> {
        let table = self.table();
        let told = table.heard.get(node).filter(|it| it.order.0 == start);
        let ago = told.map(|it| (&it.load, table.now.saturating_sub(it.at)));
        if !load.load.is_finite() || !load.differs(ago, nodes) {
            return None;
        }
        let told = Told {
            node: node.clone(),
            start,
            number: told.map_or(0, |it| it.order.1).checked_add(1)?,
            load,
        };
        postcard::to_extend(&told, vec![LOAD]).ok()
    }
}

/// Tells of the same node replace each other.
#[derive(Debug)]
pub(super) struct OfNode(NodeKey);

impl Invalidates for OfNode {
    fn invalidates(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<T> BroadcastHandler<T> for Loads {
    type Key = OfNode;
    type Error = Infallible;

    fn receive_item(
        &mut self,
        data: &[u8],
        sender: Option<&T>,
    ) -> Result<Option<OfNode>, Infallible> {
        let Some((&LOAD, told)) = data.split_first() else {
            return Ok(None);
        };
        // Bytes that follow are fields of a later version.
        let Ok((told, _)) = postcard::take_from_bytes::<Told>(told) else {
            return Ok(None);
        };
        if !told.load.load.is_finite() {
            return Ok(None);
        }
        let mut table = self.table();
        let order = (told.start, told.number);
        let is_own = table.own.as_ref() == Some(&told.node);
        let known = table.heard.get(&told.node);
        // Tells are passed on for seconds. A newer one that stays silent for longer was forged.
        let is_newer = known.is_none_or(|known| {
            known.order < order || table.now.saturating_sub(known.at) > 2 * TELL_EVERY_MAX
        });
        let is_full = known.is_none() && table.heard.len() >= NODES_MAX;
        if !is_newer || is_full || is_own && sender.is_some() {
            return Ok(None);
        }
        let heard = Heard {
            load: told.load,
            at: table.now,
            order,
        };
        let of = OfNode(NodeKey::of(&told.node));
        table.heard.insert(told.node, heard);
        Ok(Some(of))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(load: f32) -> Load {
        Load {
            load,
            memory_free_bytes: 1000,
            is_pressed: false,
        }
    }

    fn receive(loads: &mut Loads, data: &[u8]) -> bool {
        let taken = BroadcastHandler::<()>::receive_item(loads, data, None);
        taken.is_ok_and(|taken| taken.is_some())
    }

    #[test]
    fn a_node_tells_what_changed_and_not_too_often() {
        let told = load(0.5);
        let seconds = Duration::from_secs;
        assert!(load(0.5).differs(None, 0));
        assert!(!load(0.54).differs(Some((&told, seconds(29))), 0));
        assert!(load(0.54).differs(Some((&told, seconds(30))), 0));
        assert!(load(0.56).differs(Some((&told, seconds(2))), 0));
        assert!(!load(0.56).differs(Some((&told, seconds(1))), 0));
        assert!(!load(0.56).differs(Some((&told, seconds(11))), 1000));
        assert!(load(0.56).differs(Some((&told, seconds(12))), 1000));
        let memory = |memory_free_bytes| Load {
            memory_free_bytes,
            ..told
        };
        assert!(!memory(950).differs(Some((&told, seconds(2))), 0));
        assert!(memory(890).differs(Some((&told, seconds(2))), 0));
        let pressed = Load {
            is_pressed: true,
            ..told
        };
        assert!(pressed.differs(Some((&told, seconds(2))), 0));
    }

    #[test]
    fn the_newest_load_of_a_node_is_kept() {
        let node: NodeName = "b".parse().expect("a name");
        let start = |revision| Start {
            incarnation: 1,
            revision,
        };
        let (mut from, mut to) = (Loads::default(), Loads::default());
        let mut tell = |start, value, at| {
            from.set_now(Duration::from_secs(at));
            let data = from.own(&node, start, load(value), 0).expect("it is time");
            assert!(receive(&mut from, &data), "its own");
            data
        };
        let (first, second) = (tell(start(5), 0.1, 0), tell(start(5), 0.2, 9));
        let restarted = tell(start(6), 0.3, 10);
        let value = |loads: &Loads| loads.all()[&node].load.load;
        assert!(receive(&mut to, &second));
        assert!(!receive(&mut to, &first) && !receive(&mut to, &second));
        assert_eq!(value(&to), 0.2);
        assert!(receive(&mut to, &restarted) && !receive(&mut to, &second));
        assert_eq!(value(&to), 0.3);
        to.retain(|_| false);
        assert!(to.all().is_empty());
    }

    /// Whoever knows a key can tell anything of anybody, and must not silence them for long.
    #[test]
    fn forged_tells_do_not_last() {
        let forged = |node: &str| {
            let told = Told {
                node: node.parse().expect("a name"),
                start: Start {
                    incarnation: u32::MAX,
                    revision: u64::MAX,
                },
                number: u64::MAX,
                load: load(9.0),
            };
            postcard::to_extend(&told, vec![LOAD]).expect("encoded")
        };
        let (own, other): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let mut loads = Loads::of(own.clone());
        let take = |loads: &mut Loads, data: &[u8]| {
            let taken = loads.receive_item(data, Some(&()));
            taken.is_ok_and(|taken| taken.is_some())
        };
        assert!(!take(&mut loads, &forged("a")) && take(&mut loads, &forged("b")));
        assert!(loads.own(&own, Start::default(), load(0.5), 0).is_some());
        let of_b = Loads::of(other.clone());
        let truth = of_b
            .own(&other, Start::default(), load(0.5), 0)
            .expect("told");
        assert!(!take(&mut loads, &truth));
        loads.set_now(Duration::from_secs(61));
        assert!(take(&mut loads, &truth));
        assert_eq!(loads.all()[&other].load.load, 0.5);
    }

    #[test]
    fn what_is_of_another_version_or_damaged_is_not_spread() {
        let node: NodeName = "b".parse().expect("a name");
        let mut loads = Loads::default();
        let data = loads
            .own(&node, Start::default(), load(0.5), 0)
            .expect("told");
        let mut later = data.clone();
        later.extend([1, 2, 3]);
        let mut other = data.clone();
        other[0] = 2;
        assert!(!receive(&mut loads, &other) && !receive(&mut loads, &[]));
        assert!(!receive(&mut loads, &data[..data.len() - 1]));
        assert!(receive(&mut loads, &later));
        assert_eq!(loads.own(&node, Start::default(), load(f32::NAN), 0), None);
    }
}
