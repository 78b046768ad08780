//! Who admits nodes to a cluster with a store outside of it. With a store of their own the voters
//! do that; here three nodes have the cluster's authority, or five of many, and the first of them
//! that is alive replaces those that fail.

use super::handle::{Authority, TAKE_AUTHORITY, VoterError, Voters};
use super::manage::NodeStates;
use keel_cluster::NodeName;
use keel_cluster::members::{self, MemberSet, Voter, VoterList};
use keel_cluster::voters::{VoterCount, next_voters};
use keel_machine::worker::control::pack;
use keel_store::StoreError;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// How often the nodes with the authority look at each other.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Time for a node to take the authority.
const TAKE_PATIENCE: Duration = Duration::from_secs(5);

/// Keeps the authority of a cluster with a store outside of it at enough nodes, until the process
/// ends.
pub(crate) async fn spread_authority(voters: Arc<Voters>, all: Arc<MemberSet>) {
    if voters.external().is_none() {
        return;
    }
    let mut states = NodeStates::default();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if !voters.serves() {
            states = NodeStates::default();
            continue;
        }
        if let Err(error) = look(&voters, &all, &mut states).await {
            tracing::warn!(%error, "the cluster's authority cannot be given to another node yet");
        }
    }
}

async fn look(voters: &Voters, all: &MemberSet, states: &mut NodeStates) -> Result<(), VoterError> {
    let store = voters.client();
    let candidates = states.look(&*store, all).await?;
    let list = members::voters(&*store).await?;
    let is_alive = |voter: &&Voter| candidates.get(&voter.node).is_some_and(|it| it.is_alive);
    if list.voters.iter().find(is_alive).map(|first| &first.node) != Some(&voters.name) {
        return Ok(());
    }
    let now: BTreeSet<NodeName> = list.voters.iter().map(|it| it.node.clone()).collect();
    let Some(next) = next_voters(&now, &voters.name, &candidates, VoterCount::Auto) else {
        return Ok(());
    };
    let Some(authority) = voters.authority().await? else {
        return Ok(());
    };
    tracing::info!(?now, ?next, "changing the nodes that admit others");
    let authority = Authority {
        certificate_pem: authority.certificate_pem().to_owned(),
        key_pem: authority.key_pem(),
    };
    for node in next.difference(&now) {
        let unavailable = |reason: String| VoterError::Store(StoreError::unavailable(reason));
        let payload = pack(&authority).map_err(|error| unavailable(error.to_string()))?;
        let asked = voters
            .peers
            .call(node, TAKE_AUTHORITY, payload, TAKE_PATIENCE)
            .await;
        asked.map_err(|error| unavailable(error.to_string()))?;
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
