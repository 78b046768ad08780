//! Renewal of nodes' certificates, and replacement of the cluster's authority while all nodes go
//! on.
//!
//! ```text
//!   requested        trust                       sign                      done
//!   ─────────▶ nodes trust the old and ──▶ the new one signs, ──▶ nodes trust the new
//!              the new authority           nodes renew            one alone
//!           every voter has its key,    every node has a
//!           every node trusts it        certificate of it
//! ```
//!
//! `authorities` in the store has the state ([`Authorities`]); each node follows it and reports what
//! it did at `certificate/NODE` ([`Report`]). [`next_step`] decides when the next state begins: only
//! when every member has followed, so that at any moment any two nodes trust each other. A node that
//! is away holds it up until it is back or removed.

use std::collections::BTreeMap;
use std::time::Duration;

use keel_net::{Fingerprint, NodeName};
use keel_store::encoding::{self, WireError};
use keel_store::keys::{CERTIFICATES, Key};
use keel_store::{Compare, KeyValue, Revision, Store, StoreError, Txn, TxnOutcome};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::authority_keys::AuthorityKeys;
use crate::identity::{CSR_BYTES_MAX, IdentityError, NodeIdentity, ends_unix_s};

/// How long a node's certificate is valid if nothing else is set: a year.
pub const NODE_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Bounds of the lifetime that may be set.
pub const NODE_LIFETIME_MIN: Duration = Duration::from_secs(60);
pub const NODE_LIFETIME_MAX: Duration = Duration::from_secs(3652 * 24 * 3600);

/// A node asks an admitting node for a certificate of the authority that signs now.
pub const RENEW: u16 = 0x0201;

/// Name of the value of `authorities` in errors.
const RECORD: &str = "the cluster's authorities";

/// Why certificates and authorities cannot be read or changed.
#[derive(Debug, Error)]
pub enum CertificateError {
    #[error("the cluster's authority is being replaced already; `keel ca` says what it waits for")]
    IsRotating,
    #[error("certificates can be valid for {} s to {} s", NODE_LIFETIME_MIN.as_secs(), NODE_LIFETIME_MAX.as_secs())]
    Lifetime,
    #[error("the cluster's authority is not known yet; try again in a moment")]
    NotKnown,
    #[error("this node does not have the key of the authority {0} yet")]
    NoKey(Fingerprint),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// The authorities of the cluster: the value of `authorities`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authorities {
    /// Certificates (PEM) of those that nodes trust: one; while it is replaced the old one, then the
    /// new one.
    pub trusted_pem: Vec<String>,
    /// The one that signs.
    pub signer: Fingerprint,
    /// How long a node's certificate is valid, in seconds.
    pub node_lifetime_s: u64,
    /// How often a replacement was asked for, and how often one was finished.
    pub requested: u64,
    pub finished: u64,
}

impl Authorities {
    /// The first record of a cluster, or of a store that was put back: nodes trust what `identity`
    /// trusts, and its issuer signs. If those are two, one is being replaced.
    ///
    /// # Errors
    /// [`IdentityError`] if a certificate of it cannot be read.
    pub fn first(identity: &NodeIdentity) -> Result<Self, IdentityError> {
        let trusted_pem = identity.trusted_pem()?;
        Ok(Self {
            signer: identity.issuer()?,
            requested: u64::from(trusted_pem.len() > 1),
            trusted_pem,
            node_lifetime_s: NODE_LIFETIME.as_secs(),
            finished: 0,
        })
    }

    /// Fingerprints of those that nodes trust.
    ///
    /// # Errors
    /// [`IdentityError`] if a certificate cannot be read.
    pub fn trusted(&self) -> Result<Vec<Fingerprint>, IdentityError> {
        self.trusted_pem.iter().map(|it| fingerprint(it)).collect()
    }

    pub fn node_lifetime(&self) -> Duration {
        Duration::from_secs(self.node_lifetime_s)
    }

    pub fn is_rotating(&self) -> bool {
        self.requested != self.finished
    }
}

/// The fingerprint of a certificate in PEM.
///
/// # Errors
/// [`IdentityError`] if it cannot be read.
pub fn fingerprint(certificate_pem: &str) -> Result<Fingerprint, IdentityError> {
    Ok(Fingerprint::of(&certificate(certificate_pem)?))
}

/// When a certificate in PEM ends, in seconds since 1970-01-01 UTC.
///
/// # Errors
/// [`IdentityError`] if it cannot be read.
pub fn pem_ends_unix_s(certificate_pem: &str) -> Result<u64, IdentityError> {
    ends_unix_s(&certificate(certificate_pem)?)
}

fn certificate(pem: &str) -> Result<CertificateDer<'static>, IdentityError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| crate::identity::bad("reading the certificate of an authority", e))
}

/// What a node did: the value of `certificate/NODE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The authorities that it trusts.
    pub trusted: Vec<Fingerprint>,
    /// The authority that signed its certificate.
    pub issuer: Fingerprint,
    /// When its certificate ends, in seconds since 1970-01-01 UTC.
    pub ends_unix_s: u64,
}

/// Whether a certificate is to be renewed: it ends in less than a third of its lifetime, or later
/// than one that is signed now, as those of older versions do.
pub fn is_renewal_due(ends_unix_s: u64, now_unix_s: u64, lifetime: Duration) -> bool {
    let left = ends_unix_s.saturating_sub(now_unix_s);
    left < lifetime.as_secs() / 3 || left > lifetime.as_secs() + lifetime.as_secs() / 3
}

/// What is to be done about the authorities, or what is waited for.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    Nothing,
    /// Make the new authority and give its key to all voters.
    Create,
    /// The new authority signs.
    Sign,
    /// The old authority is trusted no more.
    Drop,
    Wait(BTreeMap<NodeName, Missing>),
}

/// What a node did not do yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// It never reported.
    Report,
    /// It does not trust the new authority.
    Trust,
    /// Its certificate is of the old one.
    Certificate,
}

/// The next step for members that reported what they did (`None` if they did not).
///
/// # Errors
/// [`IdentityError`] if a certificate of the record cannot be read.
pub fn next_step(
    record: &Authorities,
    members: &BTreeMap<NodeName, Option<Report>>,
) -> Result<Step, IdentityError> {
    if !record.is_rotating() {
        return Ok(Step::Nothing);
    }
    let trusted = record.trusted()?;
    let silent = members.iter().filter(|(_, report)| report.is_none());
    let silent: BTreeMap<NodeName, Missing> = silent
        .map(|(node, _)| (node.clone(), Missing::Report))
        .collect();
    let [_, next] = trusted[..] else {
        // Nodes of older versions neither report nor follow.
        return Ok(match silent.is_empty() {
            true => Step::Create,
            false => Step::Wait(silent),
        });
    };
    let signs = record.signer == next;
    let lacks = |report: &Option<Report>| match report {
        None => Some(Missing::Report),
        Some(report) if !report.trusted.contains(&next) => Some(Missing::Trust),
        Some(report) if signs && report.issuer != next => Some(Missing::Certificate),
        Some(_) => None,
    };
    let missing: BTreeMap<NodeName, Missing> = members
        .iter()
        .filter_map(|(node, report)| Some((node.clone(), lacks(report)?)))
        .collect();
    Ok(match (missing.is_empty(), signs) {
        (false, _) => Step::Wait(missing),
        (true, false) => Step::Sign,
        (true, true) => Step::Drop,
    })
}

/// The record, and its revision; `None` in a cluster that has none yet.
///
/// # Errors
/// [`CertificateError`].
pub async fn read(store: &dyn Store) -> Result<Option<(Authorities, Revision)>, CertificateError> {
    let entry = store.get(&Key::Authorities.to_string()).await?;
    entry.as_ref().map(decode).transpose()
}

/// The record of an entry, and its revision.
///
/// # Errors
/// [`CertificateError::Wire`].
pub fn decode(entry: &KeyValue) -> Result<(Authorities, Revision), CertificateError> {
    let record = encoding::decode(RECORD, &entry.value)?;
    Ok((record, entry.modified))
}

/// Replaces the record if its revision is `before` still (`None`: if there is none); whether that
/// was so. What is not known is settled by the next look.
///
/// # Errors
/// [`CertificateError`].
pub async fn write(
    store: &dyn Store,
    record: &Authorities,
    before: Option<Revision>,
) -> Result<bool, CertificateError> {
    let key = Key::Authorities;
    let txn = match before {
        Some(revision) => Txn::new().when_modified_at(key.clone(), revision),
        None => Txn::new().when_absent(key.clone()),
    };
    let value = encoding::encode(RECORD, record)?;
    Ok(store.txn(txn.put(key, value)).await?.is_committed())
}

/// Asks for the replacement of the authority.
///
/// # Errors
/// [`CertificateError::IsRotating`], [`CertificateError::NotKnown`] and the store's.
pub async fn request_rotation(store: &dyn Store) -> Result<(), CertificateError> {
    change(store, |record| {
        if record.is_rotating() {
            return Err(CertificateError::IsRotating);
        }
        record.requested += 1;
        Ok(())
    })
    .await
}

/// Sets how long certificates of nodes are valid from now on. Nodes renew theirs.
///
/// # Errors
/// [`CertificateError::Lifetime`], [`CertificateError::NotKnown`] and the store's.
pub async fn set_lifetime(store: &dyn Store, lifetime: Duration) -> Result<(), CertificateError> {
    if !(NODE_LIFETIME_MIN..=NODE_LIFETIME_MAX).contains(&lifetime) {
        return Err(CertificateError::Lifetime);
    }
    change(store, |record| {
        record.node_lifetime_s = lifetime.as_secs();
        Ok(())
    })
    .await
}

async fn change(
    store: &dyn Store,
    change: impl Fn(&mut Authorities) -> Result<(), CertificateError>,
) -> Result<(), CertificateError> {
    loop {
        let (mut record, revision) = read(store).await?.ok_or(CertificateError::NotKnown)?;
        change(&mut record)?;
        if write(store, &record, Some(revision)).await? {
            return Ok(());
        }
    }
}

/// What the members reported; `None` of those that did not.
///
/// # Errors
/// [`CertificateError`].
pub async fn reports(
    store: &dyn Store,
    members: impl Iterator<Item = NodeName>,
) -> Result<BTreeMap<NodeName, Option<Report>>, CertificateError> {
    let mut reports: BTreeMap<_, _> = members.map(|node| (node, None)).collect();
    for entry in store.list(CERTIFICATES).await?.entries {
        if let Ok(Key::Certificate(node)) = entry.key.parse()
            && let Some(report) = reports.get_mut(&node)
        {
            *report = Some(encoding::decode("a node's certificate", &entry.value)?);
        }
    }
    Ok(reports)
}

/// Writes what this node did, while it is a member.
///
/// # Errors
/// [`CertificateError`].
pub async fn report(
    store: &dyn Store,
    node: &NodeName,
    report: &Report,
) -> Result<(), CertificateError> {
    let value = encoding::encode("a node's certificate", report)?;
    let member = Key::Member(node.clone()).to_string();
    let txn = Txn::new().when(Compare::Exists { key: member });
    let txn = txn.put(Key::Certificate(node.clone()), value);
    match store.txn(txn).await? {
        TxnOutcome::Committed { .. } | TxnOutcome::Refused { .. } => Ok(()),
    }
}

/// The request of a node for a new certificate.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RenewRequest {
    /// The signing request for the node's new key, PEM.
    pub csr_pem: String,
}

/// The answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RenewResponse {
    pub certificate_pem: String,
}

/// The admitting node's part: signs for `node`, which has proved who it is.
///
/// # Errors
/// [`CertificateError::NoKey`] if another node has to be asked; the store's.
pub async fn renew(
    store: &dyn Store,
    keys: &AuthorityKeys,
    node: &NodeName,
    request: &RenewRequest,
) -> Result<RenewResponse, CertificateError> {
    if request.csr_pem.len() > CSR_BYTES_MAX {
        let reason = format!("it has {} bytes", request.csr_pem.len());
        let what = "a signing request";
        return Err(WireError::Damaged { what, reason }.into());
    }
    let (record, _) = read(store).await?.ok_or(CertificateError::NotKnown)?;
    let authority = keys
        .get(record.signer)
        .ok_or(CertificateError::NoKey(record.signer))?;
    let certificate_pem = authority.sign(&request.csr_pem, node, record.node_lifetime())?;
    tracing::info!(%node, authority = %record.signer, "the node's certificate is renewed");
    Ok(RenewResponse { certificate_pem })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{CertificateAuthority, ClusterId, make_csr};
    use rustls::pki_types::UnixTime;

    fn authority() -> CertificateAuthority {
        CertificateAuthority::create(ClusterId::random()).unwrap()
    }

    #[test]
    fn each_step_waits_for_every_member() {
        let (old, new) = (authority(), authority());
        let (a, b): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let identity = NodeIdentity::first(&old, &a).unwrap();
        let mut record = Authorities::first(&identity).unwrap();
        let report = |trusted: &[&CertificateAuthority], issuer: &CertificateAuthority| {
            Some(Report {
                trusted: trusted.iter().map(|it| it.fingerprint()).collect(),
                issuer: issuer.fingerprint(),
                ends_unix_s: 0,
            })
        };
        let before = report(&[&old], &old);
        let trusts = report(&[&old, &new], &old);
        let renewed = report(&[&old, &new], &new);
        let step = |record: &Authorities, of_a: &Option<Report>, of_b: &Option<Report>| {
            let members = [(a.clone(), of_a.clone()), (b.clone(), of_b.clone())];
            next_step(record, &members.into()).unwrap()
        };
        let waits = |missing| Step::Wait([(b.clone(), missing)].into());

        assert_eq!(step(&record, &before, &None), Step::Nothing);
        record.requested = 1;
        assert_eq!(step(&record, &before, &None), waits(Missing::Report));
        assert_eq!(step(&record, &before, &before), Step::Create);
        record.trusted_pem.push(new.certificate_pem().into());
        assert_eq!(step(&record, &trusts, &None), waits(Missing::Report));
        assert_eq!(step(&record, &trusts, &before), waits(Missing::Trust));
        assert_eq!(step(&record, &trusts, &trusts), Step::Sign);
        record.signer = new.fingerprint();
        // A node that joined meanwhile.
        assert_eq!(step(&record, &renewed, &before), waits(Missing::Trust));
        assert_eq!(
            step(&record, &renewed, &trusts),
            waits(Missing::Certificate)
        );
        assert_eq!(step(&record, &renewed, &renewed), Step::Drop);
        record.trusted_pem.remove(0);
        record.finished = 1;
        assert_eq!(step(&record, &renewed, &renewed), Step::Nothing);
    }

    /// A certificate that has ended is not valid, and its issuer is known all the same: whoever has
    /// the authority's key signs again.
    #[test]
    fn what_has_ended_is_signed_again() {
        let authority = authority();
        let a: NodeName = "a".parse().unwrap();
        let csr = make_csr(&a).unwrap();
        let ended = authority.sign(&csr.csr_pem, &a, Duration::ZERO).unwrap();
        let ended = NodeIdentity::from_pem(
            authority.cluster(),
            a,
            ended,
            csr.key_pem,
            authority.certificate_pem().into(),
        )
        .unwrap();
        let ends = Duration::from_secs(ended.ends_unix_s().unwrap());
        let at = |time| ended.verify_at(UnixTime::since_unix_epoch(time));
        at(ends).unwrap();
        assert!(at(ends + Duration::from_secs(1)).is_err());
        assert_eq!(ended.issuer().unwrap(), authority.fingerprint());
        let again = ended.signed_by(&authority, NODE_LIFETIME).unwrap();
        again.verify().unwrap();
        assert_ne!(again.key_pem, ended.key_pem);
        let other = CertificateAuthority::create(authority.cluster()).unwrap();
        assert!(
            ended.signed_by(&other, NODE_LIFETIME).is_err(),
            "not trusted"
        );
    }

    #[test]
    fn certificates_are_renewed_in_the_last_third_of_their_lives() {
        let lifetime = Duration::from_secs(300);
        let due = |left: u64| is_renewal_due(1_000_000 + left, 1_000_000, lifetime);
        assert!(due(0) && due(99) && !due(100) && !due(300));
        assert!(is_renewal_due(7, 1_000_000, lifetime), "it has ended");
        // One that ends in 4096, or of a longer lifetime that was set before.
        assert!(!due(400) && due(401) && due(1 << 36));
    }
}
