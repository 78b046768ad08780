//! Which nodes hold the store: a pure decision. The leader's agent carries it out, one step at a
//! time (`crates/node/src/voters`).
//!
//! - 1, 3 or 5 voters, never 2 or 4: an even number fails as soon as the odd one below it and needs
//!   more answers. By themselves: 3 from 3 nodes on, 5 from 7 on; a group of 3 or 5 never shrinks
//!   because nodes are away.
//! - A voter that is away for [`REPLACE_AFTER`] is replaced by a node that is alive; one that was
//!   removed from the cluster, at once. One voter is replaced at a time, so a quorum of the old
//!   group and of the new one share a node that has everything.
//! - New voters come from zones (label `zone`) that have none, so one zone's loss leaves a quorum
//!   where the nodes permit it.

use keel_net::NodeName;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// How long a voter may be away before another node takes its place: longer than a restart, since
/// its copy has to be made anew.
pub const REPLACE_AFTER: Duration = Duration::from_secs(300);
/// How long a node must be alive before it becomes a voter.
pub const SETTLED_AFTER: Duration = Duration::from_secs(2);

/// Nodes from which on there are 3 voters, and 5.
const THREE_FROM: usize = 3;
const FIVE_FROM: usize = 7;

/// How many voters an operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum VoterCount {
    /// By the number of nodes.
    #[default]
    Auto,
    One,
    Three,
    Five,
}

impl fmt::Display for VoterCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            VoterCount::Auto => "auto",
            VoterCount::One => "1",
            VoterCount::Three => "3",
            VoterCount::Five => "5",
        })
    }
}

impl FromStr for VoterCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(VoterCount::Auto),
            "1" => Ok(VoterCount::One),
            "3" => Ok(VoterCount::Three),
            "5" => Ok(VoterCount::Five),
            other => Err(format!(
                "{other:?} is no number of voters: 1, 3, 5 or auto (an even number fails as soon \
                 as the odd one below it)"
            )),
        }
    }
}

impl TryFrom<String> for VoterCount {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<VoterCount> for String {
    fn from(count: VoterCount) -> String {
        count.to_string()
    }
}

/// What the leader knows of a member of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub is_alive: bool,
    /// How long it has been alive, or away.
    pub since: Duration,
    /// Its failure domain: the label `zone`.
    pub zone: Option<String>,
}

/// The voters to have next; `None` if they stay. `leader` is one of `voters` and stays.
/// `members` are all nodes of the cluster.
pub fn next_voters(
    voters: &BTreeSet<NodeName>,
    leader: &NodeName,
    members: &BTreeMap<NodeName, Candidate>,
    wanted: VoterCount,
) -> Option<BTreeSet<NodeName>> {
    let is_removed = |node: &&NodeName| !members.contains_key(*node);
    let size = match wanted {
        VoterCount::One => 1,
        VoterCount::Three => 3,
        VoterCount::Five => 5,
        VoterCount::Auto => {
            let by_nodes = match members.len() {
                n if n >= FIVE_FROM => 5,
                n if n >= THREE_FROM => 3,
                _ => 1,
            };
            match voters.iter().any(|node| is_removed(&node)) {
                true => by_nodes,
                false => by_nodes.max(voters.len()),
            }
        }
    };
    // As many as there are nodes, but an odd number.
    let size = match members.len() {
        0 => 1,
        n => size.min(n - 1 + n % 2),
    };
    let is_lost = |node: &&NodeName| {
        let member = members.get(*node);
        member.is_none_or(|it| !it.is_alive && it.since >= REPLACE_AFTER)
    };
    let mut next: BTreeSet<NodeName> = voters.clone();
    // Of a group that is too large, whoever serves it least goes; of one that is not, whoever is
    // lost, if another takes its place.
    while next.len() > size {
        let leaves = leaving(&next, leader, members)?;
        next.remove(&leaves);
    }
    if next.len() < size {
        while next.len() < size {
            next.insert(joining(&next, voters, members)?);
        }
    } else if next == *voters
        && let Some(lost) = next.iter().find(is_lost).cloned()
    {
        next.remove(&lost);
        next.insert(joining(&next, voters, members)?);
    }
    if next == *voters {
        return spread(voters, leader, members);
    }
    Some(next)
}

/// The group with one more zone, if there is a node of a zone without a voter, and a zone with more
/// than one. Only while all voters are alive: the change must not wait for one.
fn spread(
    voters: &BTreeSet<NodeName>,
    leader: &NodeName,
    members: &BTreeMap<NodeName, Candidate>,
) -> Option<BTreeSet<NodeName>> {
    let zone = |node: &NodeName| members.get(node).and_then(|it| it.zone.as_deref());
    let is_alive = |node: &NodeName| members.get(node).is_some_and(|it| it.is_alive);
    if !voters.iter().all(is_alive) {
        return None;
    }
    let shares = |node: &&NodeName| {
        zone(node).is_some() && voters.iter().filter(|it| zone(it) == zone(node)).count() > 1
    };
    let leaves = voters
        .iter()
        .rev()
        .filter(|node| *node != leader)
        .find(shares)?;
    let mut next = voters.clone();
    next.remove(leaves);
    let joins = joining(&next, voters, members)?;
    let is_new = zone(&joins).is_some_and(|new| next.iter().all(|it| zone(it) != Some(new)));
    next.insert(joins);
    is_new.then_some(next)
}

/// The voter that a group can do without: one that was removed, else one that is away, else one
/// whose zone has another.
fn leaving(
    voters: &BTreeSet<NodeName>,
    leader: &NodeName,
    members: &BTreeMap<NodeName, Candidate>,
) -> Option<NodeName> {
    let zone = |node: &NodeName| members.get(node).and_then(|it| it.zone.as_ref());
    let others = voters.iter().filter(|node| *node != leader);
    let rank = |node: &&NodeName| {
        let member = members.get(*node);
        let shares = voters.iter().filter(|it| zone(it) == zone(node)).count() > 1;
        match member {
            None => 0,
            Some(it) if !it.is_alive => 1,
            Some(_) if shares => 2,
            Some(_) => 3,
        }
    };
    others.rev().min_by_key(rank).cloned()
}

/// The node that serves a group most: alive, from a zone that has no voter.
fn joining(
    next: &BTreeSet<NodeName>,
    voters: &BTreeSet<NodeName>,
    members: &BTreeMap<NodeName, Candidate>,
) -> Option<NodeName> {
    let zones: BTreeSet<&str> = next
        .iter()
        .filter_map(|node| members.get(node)?.zone.as_deref())
        .collect();
    let settled = members.iter().filter(|(node, it)| {
        let is_new = !next.contains(*node) && !voters.contains(*node);
        is_new && it.is_alive && it.since >= SETTLED_AFTER
    });
    let in_new_zone = |it: &Candidate| it.zone.as_deref().is_some_and(|zone| !zones.contains(zone));
    settled
        .min_by_key(|(node, it)| (!in_new_zone(it), (*node).clone()))
        .map(|(node, _)| node.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeName {
        NodeName::new(text).unwrap()
    }

    fn names(text: &str) -> BTreeSet<NodeName> {
        text.split_whitespace().map(name).collect()
    }

    /// `a`: alive, `a@z`: in zone z, `-a`: away for a second, `--a`: away for ten minutes,
    /// `+a`: alive for an instant.
    fn members(text: &str) -> BTreeMap<NodeName, Candidate> {
        let member = |word: &str| {
            let (state, rest) = match word.strip_prefix("--") {
                Some(rest) => ((false, 600), rest),
                None => match (word.strip_prefix('-'), word.strip_prefix('+')) {
                    (Some(rest), _) => ((false, 1), rest),
                    (_, Some(rest)) => ((true, 0), rest),
                    _ => ((true, 600), word),
                },
            };
            let (node, zone) = match rest.split_once('@') {
                Some((node, zone)) => (node, Some(zone.to_owned())),
                None => (rest, None),
            };
            let candidate = Candidate {
                is_alive: state.0,
                since: Duration::from_secs(state.1),
                zone,
            };
            (name(node), candidate)
        };
        text.split_whitespace().map(member).collect()
    }

    fn next(voters: &str, of: &str, wanted: VoterCount) -> Option<String> {
        let voters = names(voters);
        let leader = voters.first().unwrap().clone();
        let next = next_voters(&voters, &leader, &members(of), wanted)?;
        assert!(next.len() % 2 == 1, "{next:?}");
        assert!(next.contains(&leader), "{next:?}");
        let next: Vec<String> = next.iter().map(NodeName::to_string).collect();
        Some(next.join(" "))
    }

    #[test]
    fn groups_grow_with_the_cluster() {
        use VoterCount::Auto;
        assert_eq!(next("a", "a", Auto), None);
        assert_eq!(next("a", "a b", Auto), None);
        assert_eq!(next("a", "a b c", Auto).as_deref(), Some("a b c"));
        assert_eq!(next("a", "a b -c", Auto), None, "two are never enough");
        assert_eq!(next("a", "a b +c", Auto), None, "c may go again");
        assert_eq!(next("a", "a b c d -e", Auto).as_deref(), Some("a b c"));
        assert_eq!(next("a b c", "a b c d e f", Auto), None);
        assert_eq!(
            next("a b c", "a b c d e f g", Auto).as_deref(),
            Some("a b c d e")
        );
    }

    #[test]
    fn groups_shrink_only_when_somebody_says_so() {
        use VoterCount::{Auto, Five, One, Three};
        assert_eq!(next("a b c", "a -b --c", Auto), None);
        assert_eq!(next("a b c d e", "a b c d e", Auto), None);
        assert_eq!(next("a b c", "a b c", One).as_deref(), Some("a"));
        assert_eq!(
            next("a b c d e", "a b -c d e", Three).as_deref(),
            Some("a b d")
        );
        assert_eq!(next("a", "a b c d", Five).as_deref(), Some("a b c"));
        // Nodes were removed from the cluster: two are left.
        assert_eq!(next("a b c", "a b", Auto).as_deref(), Some("a"));
    }

    #[test]
    fn lost_voters_are_replaced_one_at_a_time() {
        use VoterCount::Auto;
        assert_eq!(next("a b c", "a b -c d", Auto), None, "it may come back");
        assert_eq!(next("a b c", "a b --c d", Auto).as_deref(), Some("a b d"));
        assert_eq!(next("a b c", "a b d", Auto).as_deref(), Some("a b d"));
        assert_eq!(next("a b c", "a b --c -d", Auto), None, "nobody can");
        assert_eq!(
            next("a b c", "a --b --c d e", Auto).as_deref(),
            Some("a c d")
        );
    }

    #[test]
    fn voters_come_from_different_zones() {
        use VoterCount::{Auto, Three};
        let nodes = "a@1 b@1 c@1 d@2 e@3 f@3";
        assert_eq!(next("a", nodes, Auto).as_deref(), Some("a d e"));
        assert_eq!(
            next("a b d", "a@1 --b@1 c@1 d@2 e@3", Auto).as_deref(),
            Some("a d e")
        );
        assert_eq!(
            next("a b c d e", "a@1 b@2 c@2 d@3 e@3", Three).as_deref(),
            Some("a b d")
        );
    }

    #[test]
    fn a_group_spreads_over_zones_that_come_later() {
        use VoterCount::{Auto, Three};
        let next = |voters: &str, of: &str| next(voters, of, Auto);
        let two_zones = next("a b c", "a@1 b@1 c@1 d@2 e@2");
        assert_eq!(two_zones.as_deref(), Some("a b d"));
        assert_eq!(
            next("a b d", "a@1 b@1 c@1 d@2 e@2"),
            None,
            "there are no more"
        );
        let third = next("a b d", "a@1 b@1 d@2 e@3");
        assert_eq!(third.as_deref(), Some("a d e"));
        // Whoever leads stays; a node without a zone may be anywhere.
        assert_eq!(next("a b c", "a@1 b@2 c@3 d@4"), None);
        assert_eq!(next("a b c", "a@1 b c d@2"), None);
        assert_eq!(next("a b c", "a@1 b@1 c@1 d"), None);
        // Not while one is away, and not with one that has just come.
        assert_eq!(next("a b c", "a@1 b@1 -c@1 d@2"), None);
        assert_eq!(next("a b c", "a@1 b@1 c@1 +d@2"), None);
        let of = "a@1 b@1 c@1 d@2 e@3";
        assert_eq!(super::tests::next("a", of, Three).as_deref(), Some("a d e"));
    }

    #[test]
    fn steps_end_and_lose_no_quorum() {
        // Whatever the state, repeated steps come to rest, and each keeps a quorum of the group
        // before it unless an operator asked for a smaller one.
        let states = ["", "-", "--", "+"];
        for code in 0..2 * 4usize.pow(6) {
            let (zoned, mut rest) = (code % 2 == 1, code / 2);
            let zone = |at: usize| match zoned {
                true => format!("@{}", at % 4),
                false => String::new(),
            };
            let mut text = format!("a{}", zone(0));
            for (at, node) in ["b", "c", "d", "e", "f", "g"].into_iter().enumerate() {
                text += &format!(" {}{node}{}", states[rest % 4], zone(at / 2));
                rest /= 4;
            }
            let of = members(&text);
            for begin in ["a", "a b c", "a b c d e"] {
                let mut voters = names(begin);
                for step in 0.. {
                    assert!(step < 12, "{text}: no end");
                    let next = next_voters(&voters, &name("a"), &of, VoterCount::Auto);
                    let Some(next) = next else { break };
                    assert!(next.len() >= voters.len(), "{text}: {voters:?} {next:?}");
                    let gone = voters.difference(&next).count();
                    assert!(gone <= 1, "{text}: {voters:?} {next:?}");
                    voters = next;
                }
            }
        }
    }

    #[test]
    fn counts_are_checked() {
        for good in ["auto", "1", "3", "5"] {
            assert_eq!(good.parse::<VoterCount>().unwrap().to_string(), good);
        }
        for bad in ["", "0", "2", "4", "7", "AUTO", "-1"] {
            assert!(bad.parse::<VoterCount>().is_err(), "{bad}");
        }
    }
}
