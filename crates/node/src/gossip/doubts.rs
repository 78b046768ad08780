//! Which nodes are better not asked just now.

use keel_cluster::NodeName;
use keel_cluster::gossip::Liveness;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a node that does not answer is avoided while the store says that it is alive. Its lease
/// ends sooner if it is gone; otherwise only datagrams do not pass.
const DOUBT_MAX: Duration = Duration::from_secs(10);

/// Since when which nodes do not answer.
#[derive(Debug, Default)]
pub(super) struct Doubts(BTreeMap<NodeName, Duration>);

impl Doubts {
    /// The nodes to avoid at `now`.
    pub(super) fn update(
        &mut self,
        liveness: &BTreeMap<NodeName, Liveness>,
        now: Duration,
    ) -> BTreeSet<NodeName> {
        let answers = |node: &NodeName| {
            liveness
                .get(node)
                .is_none_or(|liveness| *liveness == Liveness::Alive)
        };
        self.0.retain(|node, _| !answers(node));
        for node in liveness.keys().filter(|node| !answers(node)) {
            self.0.entry(node.clone()).or_insert(now);
        }
        let recent = self.0.iter();
        let recent = recent.filter(|(_, since)| now.saturating_sub(**since) < DOUBT_MAX);
        recent.map(|(node, _)| node.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubt_counts_for_a_while_only() {
        let node: NodeName = "b".parse().expect("a name");
        let mut doubts = Doubts::default();
        let mut doubted = |liveness, at| {
            let liveness = BTreeMap::from([(node.clone(), liveness)]);
            !doubts.update(&liveness, Duration::from_secs(at)).is_empty()
        };
        assert!(!doubted(Liveness::Alive, 0));
        assert!(doubted(Liveness::Suspected, 1) && doubted(Liveness::Down, 10));
        assert!(!doubted(Liveness::Down, 11) && !doubted(Liveness::Down, 500));
        assert!(!doubted(Liveness::Alive, 501) && doubted(Liveness::Suspected, 502));
        assert!(
            doubts
                .update(&BTreeMap::new(), Duration::from_secs(503))
                .is_empty()
        );
    }
}
