//! Which machines run here, or may come here as far as rules say: their programs are
//! compiled before anybody waits for them.

use super::bounds::Snapshot;
use crate::agent::Agent;
use keel_balance::Name;
use keel_cluster::clock::unix_ms;
use keel_cluster::{MachineName, NodeName};
use std::collections::BTreeSet;

/// A machine that runs here or may come here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Eligible {
    pub(crate) name: MachineName,
    pub(crate) owner: NodeName,
    /// Hash of its module as its author built it; empty where it has none.
    pub(crate) module: String,
}

/// The machines that run here first, then those that no rule keeps from coming here.
pub(crate) fn may_run_here(agent: &Agent) -> Vec<Eligible> {
    let (handle, here) = (&agent.balancer, Name::from(agent.name.as_str()));
    let nodes: Vec<Name> = agent
        .members
        .all()
        .keys()
        .map(|node| node.as_str().into())
        .collect();
    let snapshot = Snapshot::new(
        &handle.rules,
        &handle.placements,
        &nodes,
        (BTreeSet::new(), &handle.spreading),
        agent.code.clone(),
        unix_ms(),
    );
    let mut found: Vec<Eligible> = handle
        .placements
        .programs()
        .into_iter()
        .map(|(name, owner, module)| Eligible {
            name,
            owner,
            module,
        })
        .filter(|it| {
            it.owner == agent.name || snapshot.forbids(&it.name.as_str().into(), &here).is_none()
        })
        .collect();
    found.sort_by_key(|it| it.owner != agent.name);
    found
}
