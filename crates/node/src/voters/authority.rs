//! Who admits nodes to a cluster with a store outside of it. With a store of their own the voters
//! do that; here three nodes have the cluster's authority, or five of many, and the first of them
//! that is alive replaces those that fail.

use super::handle::{VoterError, Voters};
use super::manage::NodeStates;
use keel_cluster::NodeName;
use keel_cluster::members::{self, MemberSet, Voter, VoterList};
use keel_cluster::voters::{Candidate, VoterCount, next_voters};
use keel_net::coarse_timer;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// How often the nodes with the authority look at each other.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Keeps the authority of a cluster with a store outside of it at enough nodes, until the process
/// ends.
pub(crate) async fn spread_authority(voters: Arc<Voters>, all: Arc<MemberSet>) {
    if voters.external().is_none() {
        return;
    }
    let mut states = NodeStates::default();
    loop {
        coarse_timer::sleep(LOOK_EVERY).await;
        if !voters.serves() {
            states = NodeStates::default();
            continue;
        }
        if let Err(error) = look(&voters, &all, &mut states).await {
            tracing::warn!(%error, "the cluster's authority cannot be given to another node yet");
        }
    }
}

/// The nodes that admit others, and what is known of all nodes, if it is this one that cares for the
/// authority: the first of them that is alive.
pub(super) async fn cared_for(
    voters: &Voters,
    all: &MemberSet,
    states: &mut NodeStates,
) -> Result<Option<(VoterList, BTreeMap<NodeName, Candidate>)>, VoterError> {
    let store = voters.client();
    let candidates = states.look(&*store, all).await?;
    let list = members::voters(&*store).await?;
    let is_alive = |voter: &&Voter| candidates.get(&voter.node).is_some_and(|it| it.is_alive);
    let first = list.voters.iter().find(is_alive).map(|first| &first.node);
    let cares = first == Some(&voters.name);
    Ok(cares.then_some((list, candidates)))
}

async fn look(voters: &Voters, all: &MemberSet, states: &mut NodeStates) -> Result<(), VoterError> {
    let store = voters.client();
    let Some((list, candidates)) = cared_for(voters, all, states).await? else {
        return Ok(());
    };
    let now: BTreeSet<NodeName> = list.voters.iter().map(|it| it.node.clone()).collect();
    let Some(next) = next_voters(&now, &voters.name, &candidates, VoterCount::Auto) else {
        return Ok(());
    };
    tracing::info!(?now, ?next, "changing the nodes that admit others");
    let _changing = voters.keys_changing.lock().await;
    for node in next.difference(&now) {
        for authority in voters.keys.all() {
            voters.give_key(node, &authority).await?;
        }
    }
    let members = all.all();
    let voter = |node: &NodeName| {
        let address = members.get(node)?.address.clone();
        let node = node.clone();
        Some(Voter { node, address })
    };
    let list = VoterList {
        voters: next.iter().filter_map(voter).collect(),
        ..VoterList::default()
    };
    Ok(members::set_voters(&*store, &list).await?)
}
