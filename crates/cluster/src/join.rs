//! How a node becomes a member.
//!
//! ```text
//! joining node                                   voter
//!   │ makes its key; reads CA hash from the token  │
//!   │ ── TLS: is the chain's CA the token's? ────▶ │  (no client certificate)
//!   │ ── JoinRequest {token, csr, name, address} ▶ │
//!   │                        token good, name free │
//!   │            one transaction: token used, member/NAME put
//!   │ ◀─ JoinResponse {certificate, CA, voters} ── │
//!   │ verifies all of it, keeps it, done           │
//! ```
//!
//! The transaction compares the token's revision, so a token admits one node even if two nodes send
//! it concurrently. A node whose answer was lost repeats the same request and gets its certificate.

use keel_net::rpc::ConnectError;
use keel_net::{Client, ClientTls, NodeName, Options, RpcError, TlsError};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use thiserror::Error;

use crate::authority_keys::AuthorityKeys;
use crate::certificates::{self, CertificateError, NODE_LIFETIME};
use crate::identity::{
    CSR_BYTES_MAX, ClusterId, IdentityError, NodeIdentity, SigningRequest, make_csr,
};
use crate::members::{self, MemberError, Voter, check_address, member_record};
use crate::tokens::{self, JoinToken, Secret, TokenError};
use keel_store::encoding::{self, WireError};
use keel_store::keys::{Key, TokenId};
use keel_store::{Store, StoreError, Txn, TxnOutcome};

/// Become a member: the only request for anonymous peers. (`0x0200..0x0300` are this crate's
/// kinds of request.)
pub const JOIN: u16 = 0x0200;
/// How often an admission is begun anew because the authorities changed meanwhile.
const ATTEMPTS_MAX: u32 = 4;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JoinRequest {
    /// Number of the join token.
    pub token: u64,
    pub secret: Secret,
    /// The signing request for the node's key, PEM.
    pub csr_pem: String,
    pub node: NodeName,
    /// Where other nodes reach it, `host:port`.
    pub address: String,
    /// The store outside of the cluster that it was told of.
    pub store: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JoinResponse {
    pub cluster: ClusterId,
    /// The node's certificate, PEM.
    pub certificate_pem: String,
    /// The certificates of the authorities that nodes trust, PEM.
    pub authority_pem: String,
    /// The voters of the store.
    pub voters: Vec<Voter>,
}

/// Why a node did not become a member.
#[derive(Debug, Error)]
pub enum JoinError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("the cluster has a node {0} already; choose another name, or `keel leave` there first")]
    NameTaken(NodeName),
    #[error("this cluster's store is at {0}: join with `--store {0}` and what its etcd asks for")]
    StoreMissing(String),
    #[error("this cluster has its store in its own nodes: join without --store")]
    StoreNotExternal,
    #[error(
        "this node cannot admit others at the moment: the cluster's authority is being replaced; \
         try again, or through another node"
    )]
    NoAuthority,
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// Another node used the same token concurrently.
    #[error("the token was used at the same moment; get a new one with `keel token`")]
    Raced,
    /// Membership.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// Keys and certificates.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The store. After [`StoreError::Unknown`], send the same request again.
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The voter's answer. After [`RpcError::Unknown`], send the same request
    /// again.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// A request or answer cannot be decoded.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// The voter's part: checks the request, admits the node, signs with one of `keys`. `external` is
/// the address of a store outside of the cluster.
///
/// # Errors
/// [`JoinError`]; but for [`StoreError::Unknown`], the token is not used up.
pub async fn accept_join(
    store: &dyn Store,
    external: Option<&str>,
    keys: &AuthorityKeys,
    request: &JoinRequest,
    now_unix_ms: u64,
) -> Result<JoinResponse, JoinError> {
    check_address(&request.address)?;
    match (external, &request.store) {
        (Some(address), None) => return Err(JoinError::StoreMissing(address.to_owned())),
        (None, Some(_)) => return Err(JoinError::StoreNotExternal),
        // It has checked that it finds the cluster there.
        (Some(_), Some(_)) | (None, None) => {}
    }
    if request.csr_pem.len() > CSR_BYTES_MAX {
        return Err(WireError::Damaged {
            what: "a signing request",
            reason: format!("it has {} bytes", request.csr_pem.len()),
        }
        .into());
    }
    for _ in 0..ATTEMPTS_MAX {
        if let Some(response) = admit(store, keys, request, now_unix_ms).await? {
            return Ok(response);
        }
    }
    Err(JoinError::NoAuthority)
}

/// One attempt to admit the node; `None` if the cluster's authorities changed meanwhile.
async fn admit(
    store: &dyn Store,
    keys: &AuthorityKeys,
    request: &JoinRequest,
    now_unix_ms: u64,
) -> Result<Option<JoinResponse>, JoinError> {
    let redemption = tokens::redeem(
        store,
        TokenId(request.token),
        request.secret,
        &request.node,
        &request.csr_pem,
        now_unix_ms,
    )
    .await?;
    // All steps that can fail come before the token is used up.
    let authorities = certificates::read(store).await?;
    let authority = match &authorities {
        Some((record, _)) => keys.get(record.signer),
        None => keys.first(),
    };
    let authority = authority.ok_or(JoinError::NoAuthority)?;
    let (lifetime, authorities_pem) = match &authorities {
        Some((record, _)) => (record.node_lifetime(), record.trusted_pem.concat()),
        None => (NODE_LIFETIME, authority.certificate_pem().to_owned()),
    };
    let response = JoinResponse {
        cluster: authority.cluster(),
        certificate_pem: authority.sign(&request.csr_pem, &request.node, lifetime)?,
        authority_pem: authorities_pem,
        voters: members::voters(store).await?.voters,
    };
    let member = Key::Member(request.node.clone());
    let Some(token_use) = redemption.token_use else {
        // Admitted before; unless the node was removed since.
        let still = store.get(&member.to_string()).await?;
        return match still {
            Some(_) => Ok(Some(response)),
            None => Err(TokenError::Used(request.node.clone()).into()),
        };
    };
    let record = member_record(&request.address, now_unix_ms, &request.csr_pem)?;
    let txn = Txn::new()
        .when_modified_at(token_use.key.clone(), token_use.modified)
        .when_absent(member.clone())
        .put(token_use.key, token_use.record)
        .put(member, record);
    // It trusts what it was told, so that must be what is in force when it becomes a member.
    let txn = match authorities {
        Some((_, revision)) => txn.when_modified_at(Key::Authorities, revision),
        None => txn.when_absent(Key::Authorities),
    };
    match store.txn(txn).await? {
        TxnOutcome::Committed { .. } => {
            tracing::info!(node = %request.node, address = request.address, "node joined");
            Ok(Some(response))
        }
        TxnOutcome::Refused { failed: 0, .. } => Err(JoinError::Raced),
        TxnOutcome::Refused { failed: 1, .. } => Err(JoinError::NameTaken(request.node.clone())),
        TxnOutcome::Refused { .. } => Ok(None),
    }
}

/// The joining node's part of [`join`] before anything is sent.
///
/// # Errors
/// [`JoinError::Identity`], [`JoinError::Member`] for the address.
pub fn prepare(
    token: &JoinToken,
    node: &NodeName,
    address: &str,
    store: Option<&str>,
) -> Result<(SigningRequest, JoinRequest), JoinError> {
    check_address(address)?;
    let signing = make_csr(node)?;
    let request = JoinRequest {
        token: token.id.0,
        secret: token.secret,
        csr_pem: signing.csr_pem.clone(),
        node: node.clone(),
        address: address.into(),
        store: store.map(str::to_owned),
    };
    Ok((signing, request))
}

/// The joining node's part after the answer: verifies it.
///
/// # Errors
/// [`JoinError::Identity`] when the certificate does not fit.
pub fn conclude(
    signing: SigningRequest,
    response: &JoinResponse,
) -> Result<NodeIdentity, JoinError> {
    let identity = NodeIdentity::from_pem(
        response.cluster,
        signing.node,
        response.certificate_pem.clone(),
        signing.key_pem,
        response.authority_pem.clone(),
    )?;
    identity.verify()?;
    Ok(identity)
}

/// Joins the cluster through the node at `via` (`host:port`), under the name
/// `node`, to be reached at `address`, with a `store` outside of the cluster if that has one.
/// Nothing is kept: save the identity.
/// When the answer is lost, asks again with the same request, up to three
/// times.
///
/// # Errors
/// [`JoinError`].
pub async fn join(
    via: &str,
    token: &JoinToken,
    node: &NodeName,
    address: &str,
    store: Option<&str>,
) -> Result<(NodeIdentity, Vec<Voter>), JoinError> {
    let (signing, request) = prepare(token, node, address, store)?;
    let request = encoding::payload("a join request", &request)?;
    let tls = ClientTls::join(token.authority)?;
    let mut attempts = 0;
    let answer = loop {
        attempts += 1;
        let client = Client::connect_unnamed(via, &tls, Options::default()).await?;
        let limit = Duration::from_secs(15);
        match client.call(JOIN, request.clone(), limit).await {
            Err(RpcError::Unknown { .. }) if attempts < 3 => continue,
            answered => break answered?,
        }
    };
    let response: JoinResponse = encoding::decode("the answer to a join request", &answer)?;
    let identity = conclude(signing, &response)?;
    Ok((identity, response.voters))
}
