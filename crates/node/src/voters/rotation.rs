//! Replacement of the cluster's authority: makes the new one, gives its key to all nodes that admit
//! others, and begins each state once all members have followed ([`keel_cluster::certificates`]).
//! The leader does it; with a store outside of the cluster, the node that cares for the authority.
//! Whoever takes over goes on from what the store says.

use super::authority::cared_for;
use super::handle::{VoterError, Voters};
use super::manage::NodeStates;
use crate::context::Context;
use keel_cluster::NodeName;
use keel_cluster::certificates::{self, Authorities, CertificateError, Step};
use keel_cluster::identity::CertificateAuthority;
use keel_cluster::members::{self, MemberSet};
use keel_net::{Fingerprint, coarse_timer};
use keel_store::{Store, StoreError};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked whether the members have followed.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Writes the first record, and replaces the authority when that is asked for, until the process
/// ends.
pub(crate) async fn rotate_authority(context: Arc<Context>, voters: Arc<Voters>) {
    let all = context.members.clone();
    let mut record = context.identity.record();
    let mut made = None;
    loop {
        let known = record.borrow_and_update().clone();
        let to_do = match &known {
            None => false,
            Some(None) => true,
            Some(Some((record, _))) => record.is_rotating(),
        };
        if !to_do {
            if record.changed().await.is_err() {
                return;
            }
            continue;
        }
        match cares(&voters, &all).await {
            Ok(false) => {}
            Ok(true) => {
                if let Err(error) = look(&context, &voters, &mut made).await {
                    tracing::warn!(%error, "the cluster's authority cannot be replaced yet");
                }
            }
            Err(error) => tracing::debug!(%error, "it is not known who cares for the authority"),
        }
        coarse_timer::sleep(LOOK_EVERY).await;
    }
}

async fn cares(voters: &Voters, all: &MemberSet) -> Result<bool, VoterError> {
    match voters.external() {
        None => Ok(voters.leads()),
        Some(_) if !voters.serves() => Ok(false),
        Some(_) => {
            let cared = cared_for(voters, all, &mut NodeStates::default()).await?;
            Ok(cared.is_some())
        }
    }
}

/// An authority that was made for a replacement, by its number. Others that this node has and the
/// record does not are of earlier ones, and never used again.
type Made = Option<(u64, Fingerprint)>;

/// One step, if it is due.
async fn look(context: &Context, voters: &Voters, made: &mut Made) -> Result<(), VoterError> {
    // Nobody begins to admit others meanwhile, who would lack the new key.
    let _changing = voters.keys_changing.lock().await;
    let store = voters.client();
    let Some((mut record, revision)) = certificates::read(&*store).await? else {
        let record = Authorities::first(&context.identity.current())?;
        if voters.keys.get(record.signer).is_some() {
            certificates::write(&*store, &record, None).await?;
        }
        return Ok(());
    };
    let members = members::members(&*store).await?;
    let members = members.into_iter().map(|member| member.node);
    let reports = certificates::reports(&*store, members).await?;
    let signer = match certificates::next_step(&record, &reports)? {
        Step::Nothing => return Ok(()),
        Step::Wait(missing) => {
            tracing::debug!(?missing, "nodes have not followed the authority yet");
            return Ok(());
        }
        Step::Create => {
            let known = made.filter(|(number, _)| *number == record.requested);
            let authority = match known.and_then(|(_, known)| voters.keys.get(known)) {
                Some(authority) => authority,
                None => {
                    voters
                        .add_key(CertificateAuthority::create(voters.cluster)?)
                        .await?
                }
            };
            let next = authority.fingerprint();
            *made = Some((record.requested, next));
            record.trusted_pem.push(authority.certificate_pem().into());
            // Before anybody hears of it: this node may be gone then.
            give_to_all(voters, &*store, next).await?;
            tracing::info!("a new authority of the cluster is made; nodes are to trust it");
            certificates::write(&*store, &record, Some(revision)).await?;
            return Ok(());
        }
        Step::Sign => {
            let trusted = record.trusted()?;
            let next = trusted.last().copied().ok_or(CertificateError::NotKnown)?;
            // Others may have been given the part meanwhile: each of them may be asked.
            give_to_all(voters, &*store, next).await?;
            tracing::info!(authority = %next, "the new authority of the cluster signs");
            next
        }
        Step::Drop => {
            record.trusted_pem.drain(..1);
            record.finished = record.requested;
            tracing::info!(authority = %record.signer, "the old authority is trusted no more");
            record.signer
        }
    };
    record.signer = signer;
    certificates::write(&*store, &record, Some(revision)).await?;
    Ok(())
}

/// Gives the new authority's key to all nodes that admit others.
async fn give_to_all(
    voters: &Voters,
    store: &dyn Store,
    next: Fingerprint,
) -> Result<(), VoterError> {
    let unavailable = |reason: String| VoterError::Store(StoreError::unavailable(reason));
    let authority = voters.keys.get(next);
    let authority = authority
        .ok_or_else(|| unavailable("this node lacks the key of the new authority".into()))?;
    // The list in the store may be behind the group.
    let nodes: BTreeSet<NodeName> = match voters.store() {
        Some(store) => {
            let voters = store.status().voters.into_values();
            voters.filter_map(|voter| voter.node.parse().ok()).collect()
        }
        None => {
            let voters = members::voters(store).await?.voters.into_iter();
            voters.map(|voter| voter.node).collect()
        }
    };
    for node in nodes.iter().filter(|node| **node != voters.name) {
        voters.give_key(node, &authority).await?;
    }
    Ok(())
}
