//! Replacement of the cluster's authority: makes the new one, gives its key to all nodes that admit
//! others, and begins each state once all members have followed ([`keel_cluster::certificates`]).
//! The leader does it; with a store outside of the cluster, the node that cares for the authority.
//! Whoever takes over goes on from what the store says.

use super::authority::cared_for;
use super::handle::{VoterError, Voters};
use super::manage::NodeStates;
use crate::identity::AuthoritiesRecord;
use keel_cluster::NodeName;
use keel_cluster::certificates::{self, Authorities, CertificateError, Step};
use keel_cluster::identity::CertificateAuthority;
use keel_cluster::members::{self, MemberSet};
use keel_net::Fingerprint;
use keel_store::{Store, StoreError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How often it is looked whether the members have followed.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Writes the first record, and replaces the authority when that is asked for, until the process
/// ends.
pub(crate) async fn rotate_authority(
    voters: Arc<Voters>,
    all: Arc<MemberSet>,
    mut record: watch::Receiver<AuthoritiesRecord>,
) {
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
                if let Err(error) = look(&voters, &all).await {
                    tracing::warn!(%error, "the cluster's authority cannot be replaced yet");
                }
            }
            Err(error) => tracing::debug!(%error, "it is not known who cares for the authority"),
        }
        tokio::time::sleep(LOOK_EVERY).await;
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

/// One step, if it is due.
async fn look(voters: &Voters, all: &MemberSet) -> Result<(), VoterError> {
    let store = voters.client();
    let Some((mut record, revision)) = certificates::read(&*store).await? else {
        let Some(authority) = voters.keys.first() else {
            return Ok(());
        };
        let record = Authorities::first(authority.certificate_pem())?;
        certificates::write(&*store, &record, None).await?;
        return Ok(());
    };
    let members = all.all();
    let reports = certificates::reports(&*store, members.keys().cloned()).await?;
    let signer = match certificates::next_step(&record, &reports)? {
        Step::Nothing => return Ok(()),
        Step::Wait(missing) => {
            tracing::debug!(?missing, "nodes have not followed the authority yet");
            return Ok(());
        }
        Step::Create => {
            let authority = next_authority(voters, &record)?;
            let next = authority.fingerprint();
            record.trusted_pem.push(authority.certificate_pem().into());
            voters.add_key(authority).await?;
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

/// The new authority: one that was made before its record was written, or another one.
fn next_authority(
    voters: &Voters,
    record: &Authorities,
) -> Result<CertificateAuthority, VoterError> {
    let trusted = record.trusted()?;
    let keys = voters.keys.all();
    match keys.iter().find(|it| !trusted.contains(&it.fingerprint())) {
        Some(made) => {
            let (certificate, key) = (made.certificate_pem(), made.key_pem());
            Ok(CertificateAuthority::from_pem(
                made.cluster(),
                certificate,
                &key,
            )?)
        }
        None => Ok(CertificateAuthority::create(voters.cluster)?),
    }
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
    for voter in members::voters(store).await?.voters {
        let node: &NodeName = &voter.node;
        if *node != voters.name {
            voters.give_key(node, &authority).await?;
        }
    }
    Ok(())
}
