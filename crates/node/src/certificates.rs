//! Keeps this node's certificate and the authorities that it trusts as the store says
//! ([`keel_cluster::certificates`]), and reports that; what users see of it.
//!
//! - A new certificate has a new key. It is on disk before it is used, and the old one is used until
//!   then.
//! - New connections use what is new at once; connections that were made before go on. Only when an
//!   authority is trusted no more, those of that time are closed, some seconds later: until then
//!   requests in flight are answered, and nodes connect anew by themselves.

use crate::context::Context;
use crate::error::CommandError;
use crate::records;
use crate::state_dir::StateDir;
use crate::voters::Voters;
use keel_api::{AuthorityChange, AuthorityInfo, CertificateInfo, TrustedAuthority};
use keel_cluster::authority_keys;
use keel_cluster::certificates::{
    self, Authorities, CertificateError, Missing, NODE_LIFETIME, RENEW, RenewRequest,
    RenewResponse, Report, Step, is_renewal_due,
};
use keel_cluster::identity::{IdentityError, NodeIdentity, make_csr};
use keel_cluster::members;
use keel_net::{Bytes, Handler, PeerId, Reply, ServerTlsSetter};
use keel_store::clock::unix_ms;
use keel_store::encoding;
use keel_store::keys::Key;
use keel_store::{Change, StoreError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Pause after a failure.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// Longest time between two looks at the end of the certificate.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// How long connections go on that trust an authority that is trusted no more.
const CLOSE_AFTER: Duration = Duration::from_secs(10);
/// Time for a node to sign.
const RENEW_PATIENCE: Duration = Duration::from_secs(5);

/// A node that was off for so long that its certificate has ended signs for itself if it has the
/// authority's key, so that a cluster that was off as a whole comes back. Another node can connect to
/// nobody then.
///
/// # Errors
/// [`IdentityError`] if a file cannot be read or written.
pub(crate) fn renew_at_start(
    dir: &StateDir,
    identity: NodeIdentity,
) -> Result<NodeIdentity, IdentityError> {
    if identity.ends_unix_s()? > unix_ms() / 1000 {
        return Ok(identity);
    }
    let trusted = identity.trusted()?;
    let keys = authority_keys::load(dir.root())?;
    let authority = keys.iter().find(|it| trusted.contains(&it.fingerprint()));
    let Some(authority) = authority else {
        tracing::error!(
            "the certificate of this node has ended, so others do not accept it: remove the node \
             (`keel node rm`) and let it join again in another folder, or set the clock right"
        );
        return Ok(identity);
    };
    tracing::warn!("the certificate of this node had ended; it is signed again");
    let renewed = identity.signed_by(authority, NODE_LIFETIME)?;
    renewed.save(dir.root())?;
    Ok(renewed)
}

/// Follows the store until the agent ends.
pub(crate) async fn keep(context: Arc<Context>, voters: Arc<Voters>, server: ServerTlsSetter) {
    tokio::spawn(follow(context.clone()));
    let mut record = context.identity.record();
    let mut keeper = Keeper {
        context,
        voters,
        server,
        reported: None,
        cleaned: None,
    };
    loop {
        let known = record.borrow_and_update().clone().flatten();
        let wait = match &known {
            // The leader writes one.
            None => LOOK_EVERY,
            Some((record, _)) => match keeper.apply(record).await {
                Ok(wait) => wait,
                Err(error) => {
                    tracing::warn!(%error, "this node's certificate cannot be kept up to date yet");
                    RETRY_AFTER
                }
            },
        };
        tokio::select! {
            changed = record.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Keeps the record of the authorities.
async fn follow(context: Arc<Context>) {
    loop {
        if let Err(error) = follow_once(&context).await {
            tracing::debug!(%error, "the cluster's authorities cannot be followed, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_once(context: &Context) -> Result<(), CertificateError> {
    let key = Key::Authorities.to_string();
    let listing = context.store.list(&key).await?;
    let first = listing.entries.first().map(certificates::decode);
    context.identity.set_record(first.transpose()?);
    let mut watch = context.store.watch(&key, listing.revision + 1).await?;
    while let Some(changes) = watch.next().await {
        for change in changes?.changes {
            match change {
                Change::Put(entry) => {
                    let record = certificates::decode(&entry)?;
                    context.identity.set_record(Some(record));
                }
                Change::Delete { .. } => context.identity.set_record(None),
            }
        }
    }
    Ok(())
}

struct Keeper {
    context: Arc<Context>,
    voters: Arc<Voters>,
    server: ServerTlsSetter,
    /// What was reported last.
    reported: Option<Report>,
    /// The number of finished replacements after which old keys were removed.
    cleaned: Option<u64>,
}

impl Keeper {
    /// Does what a record asks for; the time until the next look.
    async fn apply(&mut self, record: &Authorities) -> Result<Duration, CertificateError> {
        let identity = self.context.identity.current();
        let (before, wanted) = (identity.trusted()?, record.trusted()?);
        // Whoever cannot renew its certificate trusts its issuer, to be trusted itself.
        if before != wanted && wanted.contains(&identity.issuer()?) {
            let trusting = NodeIdentity {
                authorities_pem: record.trusted_pem.concat(),
                ..(*identity).clone()
            };
            self.use_identity(trusting).await?;
            tracing::info!(authorities = ?wanted, "this node trusts what the cluster trusts");
            if before.iter().any(|it| !wanted.contains(it)) {
                let server = self.server.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(CLOSE_AFTER).await;
                    server.close_older();
                });
            }
        }
        let identity = self.context.identity.current();
        let lifetime = record.node_lifetime();
        let due = |ends| is_renewal_due(ends, unix_ms() / 1000, lifetime);
        if identity.issuer()? != record.signer || due(identity.ends_unix_s()?) {
            self.renew(&identity).await?;
        }
        if !record.is_rotating() && self.cleaned != Some(record.finished) {
            let cleaned = self.voters.retain_keys().await;
            cleaned.map_err(StoreError::unavailable)?;
            self.cleaned = Some(record.finished);
        }
        let identity = self.context.identity.current();
        let report = Report {
            trusted: identity.trusted()?,
            issuer: identity.issuer()?,
            ends_unix_s: identity.ends_unix_s()?,
        };
        if self.reported.as_ref() != Some(&report) {
            certificates::report(&*self.context.store, &self.context.name, &report).await?;
            self.reported = Some(report.clone());
        }
        let due_unix_s = report.ends_unix_s.saturating_sub(lifetime.as_secs() / 3);
        let left = Duration::from_secs(due_unix_s.saturating_sub(unix_ms() / 1000) + 1);
        // A clock that is far away would renew again and again.
        Ok(left.clamp((lifetime / 100).min(LOOK_EVERY), LOOK_EVERY))
    }

    async fn renew(&self, identity: &NodeIdentity) -> Result<(), CertificateError> {
        let signing = make_csr(&self.context.name)?;
        let request = RenewRequest {
            csr_pem: signing.csr_pem.clone(),
        };
        let request = encoding::payload("a request for a certificate", &request)?;
        let answer = self.ask(request).await?;
        let response: RenewResponse =
            encoding::decode("the answer to a request for a certificate", &answer)?;
        let renewed = NodeIdentity::from_pem(
            identity.cluster,
            identity.node.clone(),
            response.certificate_pem,
            signing.key_pem,
            identity.authorities_pem.clone(),
        )?;
        renewed.verify()?;
        self.use_identity(renewed).await?;
        let ends_unix_s = self.context.identity.current().ends_unix_s()?;
        tracing::info!(ends_unix_s, "this node's certificate is renewed");
        Ok(())
    }

    /// Asks the nodes that admit others, one after the other, until one signs.
    async fn ask(&self, request: Bytes) -> Result<Bytes, CertificateError> {
        let voters = members::voters(&*self.context.store).await;
        let voters = voters.map_err(StoreError::unavailable)?.voters;
        let mut last = StoreError::unavailable("no node admits others");
        for voter in voters {
            let answered = match voter.node == self.context.name {
                true => self.ask_here(request.clone()).await,
                false => {
                    let peers = &self.context.peers;
                    let asked = peers.call(&voter.node, RENEW, request.clone(), RENEW_PATIENCE);
                    asked.await
                }
            };
            match answered {
                Ok(answer) => return Ok(answer),
                Err(error) => last = StoreError::unavailable(error),
            }
        }
        Err(last.into())
    }

    async fn ask_here(&self, request: Bytes) -> Result<Bytes, keel_net::RpcError> {
        let own = PeerId::Node(self.context.name.clone());
        match self.voters.call(own, RENEW, request).await? {
            Reply::One(answer) => Ok(answer),
            Reply::Stream(_) => Err(keel_net::RpcError::failed("not a certificate")),
        }
    }

    /// Stores an identity, and uses it from now on.
    async fn use_identity(&self, identity: NodeIdentity) -> Result<(), CertificateError> {
        let (server, client) = (identity.server_tls(), identity.client_tls());
        let tls =
            |error| CertificateError::Identity(keel_cluster::identity::IdentityError::Tls(error));
        let (server, client) = (server.map_err(tls)?, client.map_err(tls)?);
        let (root, saved) = (self.context.dir.root().to_path_buf(), identity.clone());
        let saving = tokio::task::spawn_blocking(move || saved.save(&root)).await;
        saving.map_err(StoreError::unavailable)??;
        self.context.identity.replace(identity)?;
        self.server.set(server);
        self.context.peers.set_tls(client);
        Ok(())
    }
}

impl From<CertificateError> for CommandError {
    fn from(error: CertificateError) -> Self {
        match error {
            CertificateError::IsRotating => CommandError::Conflict(error.to_string()),
            CertificateError::Lifetime => CommandError::Invalid(error.to_string()),
            _ => CommandError::Unavailable(error.to_string()),
        }
    }
}

/// Asks for the replacement of the cluster's authority.
///
/// # Errors
/// [`CommandError::Conflict`] if it is being replaced; [`CommandError::Unavailable`].
pub(crate) async fn rotate(context: &Context) -> Result<(), CommandError> {
    Ok(certificates::request_rotation(&*context.store).await?)
}

/// Sets how long certificates of nodes are valid.
///
/// # Errors
/// [`CommandError::Invalid`] for a time out of the bounds; [`CommandError::Unavailable`].
pub(crate) async fn set_lifetime(
    context: &Context,
    change: &AuthorityChange,
) -> Result<(), CommandError> {
    let lifetime = Duration::from_secs(change.lifetime_s);
    Ok(certificates::set_lifetime(&*context.store, lifetime).await?)
}

fn said(missing: Missing) -> &'static str {
    match missing {
        Missing::Report => "has not said yet whom it trusts",
        Missing::Trust => "does not trust the new authority yet",
        Missing::Certificate => "has no certificate of the new authority yet",
    }
}

/// The cluster's authorities, and the certificates of its nodes.
///
/// # Errors
/// [`CommandError::Unavailable`].
pub(crate) async fn info(context: &Context) -> Result<AuthorityInfo, CommandError> {
    let store = &*context.store;
    let (record, _) = certificates::read(store)
        .await?
        .ok_or(CertificateError::NotKnown)?;
    let members = context.members.all();
    let reports = certificates::reports(store, members.keys().cloned()).await?;
    let step = certificates::next_step(&record, &reports).map_err(CertificateError::Identity)?;
    let trusted = record.trusted().map_err(CertificateError::Identity)?;
    let mut authorities = Vec::new();
    for (pem, fingerprint) in record.trusted_pem.iter().zip(&trusted) {
        let ends_unix_s = certificates::pem_ends_unix_s(pem).map_err(CertificateError::Identity)?;
        authorities.push(TrustedAuthority {
            fingerprint: fingerprint.to_string(),
            signs: *fingerprint == record.signer,
            ends_unix_ms: ends_unix_s.saturating_mul(1000),
        });
    }
    let missing = match step {
        Step::Wait(missing) => missing
            .into_iter()
            .map(|(node, it)| (node, said(it)))
            .collect(),
        // Those that admit others must have the new authority's key.
        Step::Create | Step::Sign => {
            let alive = records::alive(store).await?;
            let voters = members::voters(store).await;
            let voters = voters.map_err(StoreError::unavailable)?.voters;
            let away = voters.into_iter().filter(|it| !alive.contains(&it.node));
            away.map(|it| (it.node, "does not have the new authority's key yet"))
                .collect()
        }
        Step::Nothing | Step::Drop => BTreeMap::new(),
    };
    let nodes = reports.iter().map(|(node, report)| CertificateInfo {
        node: node.to_string(),
        authority: report.as_ref().map(|it| it.issuer.to_string()),
        ends_unix_ms: report
            .as_ref()
            .map(|it| it.ends_unix_s.saturating_mul(1000)),
        missing: missing.get(node).map(|it| (*it).to_owned()),
    });
    Ok(AuthorityInfo {
        authorities,
        nodes: nodes.collect(),
        lifetime_s: record.node_lifetime_s,
        is_rotating: record.is_rotating(),
    })
}
