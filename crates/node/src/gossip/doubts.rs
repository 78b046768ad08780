//! Which nodes are better not asked just now.

use keel_cluster::NodeName;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a node that does not answer is avoided while the store says that it is alive. Its lease
/// ends sooner if it is gone; otherwise only datagrams do not pass.
const DOUBT_MAX: Duration = Duration::from_secs(10);

/// Since when which nodes do not answer.
#[derive(Debug, Default)]
pub(super) struct Doubts(BTreeMap<NodeName, Duration>);

impl Doubts {
    /// The nodes to avoid at `now`, of those that do not answer.
    pub(super) fn update(
        &mut self,
        silent: BTreeSet<NodeName>,
        now: Duration,
    ) -> BTreeSet<NodeName> {
        self.0.retain(|node, _| silent.contains(node));
        for node in silent {
            self.0.entry(node).or_insert(now);
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
        let mut doubted = |is_silent: bool, at| {
            let silent = is_silent.then(|| node.clone()).into_iter().collect();
            !doubts.update(silent, Duration::from_secs(at)).is_empty()
        };
        assert!(!doubted(false, 0));
        assert!(doubted(true, 1) && doubted(true, 10));
        assert!(!doubted(true, 11) && !doubted(true, 500));
        assert!(!doubted(false, 501) && doubted(true, 502));
        assert!(!doubted(false, 503));
    }
}
