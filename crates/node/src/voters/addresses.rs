//! Voters that are not where this node knows them to be. The store says who the voters are and where
//! each member listens; but a node that knows none of their addresses cannot read it.
//!
//! - A node that was given another address tells all members itself, and the store: it may be the
//!   only voter.
//! - A node that does not reach the store, because it was away for long, asks other members.
//!
//! What is learned so only says where to connect: that the node there is who it should be is proven
//! by its certificate, and what the voters are is read from the store afterwards.

use super::handle::{ADDRESS, Engine, ListensAt, Voters, WHO_VOTES};
use futures::StreamExt;
use keel_cluster::NodeName;
use keel_cluster::members::{self, MemberError};
use keel_machine::worker::control::{pack, unpack};
use keel_net::{Bytes, PeerId, RpcError, coarse_timer};
use rand::seq::SliceRandom;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Time for a node to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two attempts to tell those who did not answer.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// Nodes that are told at a time.
const TOLD_AT_ONCE: usize = 8;
/// Pause between two questions to others while the store is not reached.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// Nodes that are asked then.
const ASKED: usize = 3;

/// Tells all members, and the store, where this node listens, if that is new; returns when all know.
pub(crate) async fn tell_address(voters: Arc<Voters>) {
    let settings = voters.settings();
    if !settings.address_is_new {
        return;
    }
    let address = settings.listen.to_string();
    let Ok(request) = pack(&ListensAt {
        address: address.clone(),
    }) else {
        return;
    };
    let mut told = BTreeSet::from([voters.name.clone()]);
    let mut is_recorded = false;
    loop {
        let members = voters.members.all();
        let untold: Vec<NodeName> = members
            .keys()
            .filter(|it| !told.contains(*it))
            .cloned()
            .collect();
        let calls = untold.into_iter().map(|node| {
            let (voters, request) = (&voters, request.clone());
            async move {
                let answer = voters.peers.call(&node, ADDRESS, request, PATIENCE).await;
                // An older version does not know the request, and reads the store.
                let is_told = matches!(answer, Ok(_) | Err(RpcError::Refused { .. }));
                is_told.then_some(node)
            }
        });
        let now: Vec<Option<NodeName>> = futures::stream::iter(calls)
            .buffer_unordered(TOLD_AT_ONCE)
            .collect()
            .await;
        told.extend(now.into_iter().flatten());
        if !is_recorded {
            match members::set_address(&*voters.client(), &voters.name, &address).await {
                Ok(()) => is_recorded = true,
                // It was removed, and will be told so.
                Err(MemberError::NotAMember(_)) => return,
                Err(error) => tracing::warn!(%error, "the store has not noted this node's address"),
            }
        }
        let members = voters.members.all();
        if is_recorded && !members.is_empty() && members.keys().all(|it| told.contains(it)) {
            break;
        }
        coarse_timer::sleep(TELL_EVERY).await;
    }
    let all_know = |settings: &mut crate::context::Settings| settings.address_is_new = false;
    voters.change_settings(all_know).await;
}

/// Asks other members who the voters are, every few seconds, until it is aborted.
pub(crate) async fn find_voters(voters: Arc<Voters>) {
    loop {
        coarse_timer::sleep(ASK_EVERY).await;
        voters.ask_who_votes().await;
    }
}

impl Voters {
    /// Notes where another node listens.
    ///
    /// # Errors
    /// [`RpcError::Refused`] if that is no address, or a user says it.
    pub(super) async fn learn_address(
        &self,
        from: &PeerId,
        request: ListensAt,
    ) -> Result<(), RpcError> {
        let node = from.node();
        let node = node.ok_or_else(|| RpcError::refused("only nodes have an address"))?;
        let ListensAt { address } = request;
        members::check_address(&address).map_err(RpcError::refused)?;
        tracing::info!(%node, address, "this node listens at another address now");
        self.peers.set_address(node, &address);
        let note = |settings: &mut crate::context::Settings| {
            let known = settings.voters.iter_mut();
            for (_, old) in known.filter(|(voter, _)| voter == node) {
                old.clone_from(&address);
            }
        };
        self.change_settings(note).await;
        Ok(())
    }

    /// Asks some other members who the voters are, and tries those that this node does not know.
    pub(super) async fn ask_who_votes(&self) {
        let Engine::Embedded(client) = &self.engine else {
            return;
        };
        let members = self.members.all();
        let mut others: Vec<&NodeName> = members.keys().filter(|it| **it != self.name).collect();
        others.shuffle(&mut rand::rng());
        for node in others.into_iter().take(ASKED) {
            let Some(voters) = self.voters_known_by(node).await else {
                continue;
            };
            let mut known = self.settings().voters;
            for (voter, address) in voters {
                if voter == self.name || known.contains(&(voter.clone(), address.clone())) {
                    continue;
                }
                if self.answers_at(&voter, &address).await {
                    tracing::info!(%voter, address, "{node} knows this voter");
                    known.retain(|(it, _)| *it != voter);
                    known.push((voter, address));
                }
            }
            // Also those that were known before: only who has the store knows which are right.
            client.set_voters(known.iter().map(|(voter, _)| voter.clone()).collect());
            self.change_settings(|settings| settings.voters = known)
                .await;
        }
    }

    async fn voters_known_by(&self, node: &NodeName) -> Option<Vec<(NodeName, String)>> {
        let asked = self.peers.call(node, WHO_VOTES, Bytes::new(), PATIENCE);
        unpack(&asked.await.ok()?).ok()
    }

    /// Whether a node answers at an address, which is kept then.
    async fn answers_at(&self, node: &NodeName, address: &str) -> bool {
        if members::check_address(address).is_err() {
            return false;
        }
        let old = self.peers.address(node);
        self.peers.set_address(node, address);
        let answers = self.voters_known_by(node).await.is_some();
        if !answers && let Some(old) = old {
            self.peers.set_address(node, &old);
        }
        answers
    }
}
