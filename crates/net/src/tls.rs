//! TLS 1.3 configurations, with the authentication of each side, and the identity in a verified
//! certificate.
//!
//! | configuration | server proves | client proves |
//! |---|---|---|
//! | [`ServerTls::node`], [`ClientTls::node`] | certificate of the cluster CA for the expected node | certificate of the cluster CA |
//! | [`ServerTls::node_or_anonymous`] | the same | the same, or nothing: [`PeerId::Anonymous`] |
//! | [`ClientTls::join`] | chain to the CA whose hash the join token carries | nothing |
//! | [`ServerTls::pinned`], [`ClientTls::pinned`] | certificate with the pinned fingerprint | certificate with the pinned fingerprint |
//!
//! The cryptography is rustls with ring, named explicitly: no process-wide
//! default is needed. Sessions are never resumed, so each connection is
//! verified afresh and a removed node cannot return on an old ticket.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::Resumption;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::name::NodeName;
use crate::pace::PacedStream;

mod verify;

pub use tokio_rustls::client::TlsStream as ClientStream;
pub use tokio_rustls::server::TlsStream as ServerStream;

/// The name that pinned certificates carry; it is not what authenticates them.
const PINNED_DNS: &str = "worker.pinned.keel";

/// The BLAKE3 hash of a certificate's DER bytes. Printed as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(*blake3::hash(certificate).as_bytes())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = TlsError;
    fn from_str(text: &str) -> Result<Self, TlsError> {
        blake3::Hash::from_hex(text)
            .map(|hash| Self(*hash.as_bytes()))
            .map_err(|_| TlsError::Credentials {
                what: "a fingerprint",
                reason: "it is not 64 hex digits".into(),
            })
    }
}

/// The authenticated peer of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PeerId {
    Node(NodeName),
    /// The worker with the agreed certificate.
    Pinned(Fingerprint),
    Anonymous,
}

impl PeerId {
    /// The node's name, if the peer is a node.
    pub fn node(&self) -> Option<&NodeName> {
        match self {
            PeerId::Node(node) => Some(node),
            PeerId::Pinned(_) | PeerId::Anonymous => None,
        }
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerId::Node(node) => write!(f, "node {node}"),
            PeerId::Pinned(fingerprint) => write!(f, "worker {fingerprint}"),
            PeerId::Anonymous => f.write_str("an anonymous peer"),
        }
    }
}

/// Why a TLS connection could not be prepared or made.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A certificate or key given to this node cannot be used.
    #[error("cannot use {what}: {reason}")]
    Credentials { what: &'static str, reason: String },
    /// No TCP connection.
    #[error("cannot connect to {peer} at {address}: {source} (is `keel up` running there?)")]
    Connect {
        peer: String,
        address: String,
        source: io::Error,
    },
    /// Connecting, or the handshake, took too long.
    #[error("{peer} at {address} did not complete the connection within {limit_ms} ms")]
    TimedOut {
        peer: String,
        address: String,
        /// The time allowed, in milliseconds.
        limit_ms: u128,
    },
    /// The two sides did not accept each other.
    #[error("no trust between this node and {peer} at {address}: {reason}")]
    Handshake {
        peer: String,
        address: String,
        /// What failed and what to do.
        reason: String,
    },
}

fn bad(what: &'static str, reason: impl fmt::Display) -> TlsError {
    TlsError::Credentials {
        what,
        reason: reason.to_string(),
    }
}

/// A node's certificate, its key, and the authorities it trusts.
#[derive(Debug)]
pub struct NodeCredentials {
    /// The node's certificate, followed by the CA's so that a joining node can
    /// compare its hash.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key of the first certificate.
    pub key: PrivateKeyDer<'static>,
    /// Certificates of the cluster's authorities: one, or two while the CA is
    /// being rotated.
    pub authorities: Vec<CertificateDer<'static>>,
}

impl NodeCredentials {
    /// Reads PEM texts.
    ///
    /// # Errors
    /// [`TlsError::Credentials`] naming the text that cannot be read.
    pub fn from_pem(certificate: &str, key: &str, authorities: &str) -> Result<Self, TlsError> {
        let read = |what: &'static str, pem: &str| {
            CertificateDer::pem_slice_iter(pem.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| bad(what, e))
        };
        let authorities = read("the certificate of the cluster CA", authorities)?;
        if authorities.is_empty() {
            return Err(bad("the certificate of the cluster CA", "it is empty"));
        }
        let mut chain = read("the certificate of this node", certificate)?;
        if chain.is_empty() {
            return Err(bad("the certificate of this node", "it is empty"));
        }
        for authority in &authorities {
            if !chain.contains(authority) {
                chain.push(authority.clone());
            }
        }
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|e| bad("the private key of this node", e))?;
        Ok(Self {
            chain,
            key,
            authorities,
        })
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in &self.authorities {
            roots
                .add(authority.clone())
                .map_err(|e| bad("the certificate of the cluster CA", e))?;
        }
        Ok(Arc::new(roots))
    }
}

/// A self-signed certificate of one worker, trusted by its fingerprint alone.
#[derive(Debug)]
pub struct PinnedIdentity {
    pub cert: CertificateDer<'static>,
    pub key: PrivatePkcs8KeyDer<'static>,
    /// The fingerprint to pin.
    pub fingerprint: Fingerprint,
}

impl PinnedIdentity {
    /// Makes a new key and certificate.
    ///
    /// # Errors
    /// [`TlsError::Credentials`] when the random source or the signing fails.
    pub fn generate() -> Result<Self, TlsError> {
        let made = rcgen::generate_simple_self_signed([PINNED_DNS.to_owned()])
            .map_err(|e| bad("a new worker certificate", e))?;
        let cert = made.cert.der().clone();
        Ok(Self {
            fingerprint: Fingerprint::of(&cert),
            cert,
            key: PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()),
        })
    }

    fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone_key())
    }
}

/// How an accepted peer is identified. Part of the configuration, so a pinned peer never passes for
/// a node by the contents of its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    Cluster,
    Pinned,
}

/// The server's side of TLS: a configuration and how to name its peers.
#[derive(Debug, Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    trust: Trust,
}

#[derive(Debug, Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn server_builder() -> Result<rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>, TlsError>
{
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| bad("TLS 1.3", e))
}

fn client_builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, TlsError>
{
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| bad("TLS 1.3", e))
}

impl ServerTls {
    /// Accepts members of the cluster only.
    ///
    /// # Errors
    /// [`TlsError::Credentials`].
    pub fn node(credentials: &NodeCredentials) -> Result<Self, TlsError> {
        Self::cluster(credentials, false)
    }

    /// Accepts members of the cluster, and anonymous peers: those may send
    /// only what [`crate::rpc::Handler::permits`] grants them.
    ///
    /// # Errors
    /// [`TlsError::Credentials`].
    pub fn node_or_anonymous(credentials: &NodeCredentials) -> Result<Self, TlsError> {
        Self::cluster(credentials, true)
    }

    fn cluster(credentials: &NodeCredentials, anonymous: bool) -> Result<Self, TlsError> {
        let roots = credentials.roots()?;
        let mut verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
        if anonymous {
            verifier = verifier.allow_unauthenticated();
        }
        let verifier = verifier
            .build()
            .map_err(|e| bad("the certificate of the cluster CA", e))?;
        let config = server_builder()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(credentials.chain.clone(), credentials.key.clone_key())
            .map_err(|e| bad("the certificate of this node", e))?;
        Ok(Self::new(config, Trust::Cluster))
    }

    /// Accepts only the holder of the certificate with the fingerprint `peer`.
    ///
    /// # Errors
    /// [`TlsError::Credentials`].
    pub fn pinned(identity: &PinnedIdentity, peer: Fingerprint) -> Result<Self, TlsError> {
        let config = server_builder()?
            .with_client_cert_verifier(Arc::new(verify::Pinned::new(peer, provider())))
            .with_single_cert(vec![identity.cert.clone()], identity.key())
            .map_err(|e| bad("the worker's certificate", e))?;
        Ok(Self::new(config, Trust::Pinned))
    }

    fn new(mut config: ServerConfig, trust: Trust) -> Self {
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Self {
            config: Arc::new(config),
            trust,
        }
    }

    /// The rustls configuration, for servers of other protocols.
    pub fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// Makes the handshake on an accepted connection and names the peer.
    /// `address` only serves the error.
    ///
    /// # Errors
    /// [`TlsError::Handshake`], [`TlsError::TimedOut`].
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        address: &str,
        limit: Duration,
    ) -> Result<(ServerStream<S>, PeerId), TlsError> {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(&self.config));
        let stream = match tokio::time::timeout(limit, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(handshake("the caller", address, &error)),
            Err(_) => {
                return Err(TlsError::TimedOut {
                    peer: "the caller".into(),
                    address: address.into(),
                    limit_ms: limit.as_millis(),
                });
            }
        };
        let certificate = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|c| c.first());
        let peer = self
            .peer_id(certificate)
            .map_err(|reason| TlsError::Handshake {
                peer: "the caller".into(),
                address: address.into(),
                reason,
            })?;
        Ok((stream, peer))
    }

    /// Identifies the holder of a verified certificate.
    fn peer_id(&self, certificate: Option<&CertificateDer<'_>>) -> Result<PeerId, String> {
        match (self.trust, certificate) {
            (Trust::Cluster, None) => Ok(PeerId::Anonymous),
            (Trust::Cluster, Some(certificate)) => node_of(certificate)
                .map(PeerId::Node)
                .ok_or_else(|| "its certificate names no node of this cluster".into()),
            (Trust::Pinned, Some(certificate)) => Ok(PeerId::Pinned(Fingerprint::of(certificate))),
            (Trust::Pinned, None) => Err("it presented no certificate".into()),
        }
    }
}

/// The node named in a certificate: the single DNS name `NAME.node.keel`. Only meaningful after
/// verification.
pub fn node_of(certificate: &CertificateDer<'_>) -> Option<NodeName> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    let mut names = certificate.valid_dns_names();
    let node = NodeName::from_dns(names.next()?)?;
    names.next().is_none().then_some(node)
}

impl ClientTls {
    /// Connects as a node of the cluster, to nodes of the cluster.
    ///
    /// # Errors
    /// [`TlsError::Credentials`].
    pub fn node(credentials: &NodeCredentials) -> Result<Self, TlsError> {
        let verifier =
            WebPkiServerVerifier::builder_with_provider(credentials.roots()?, provider())
                .build()
                .map_err(|e| bad("the certificate of the cluster CA", e))?;
        let config = client_builder()?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(credentials.chain.clone(), credentials.key.clone_key())
            .map_err(|e| bad("the certificate of this node", e))?;
        Ok(Self::new(config))
    }

    /// Connects without a certificate to any node whose chain ends in the CA
    /// with the fingerprint `authority`: what a joining node knows of the
    /// cluster.
    ///
    /// # Errors
    /// [`TlsError::Credentials`].
    pub fn join(authority: Fingerprint) -> Result<Self, TlsError> {
        let config = client_builder()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verify::AuthorityHash::new(
                authority,
                provider(),
            )))
            .with_no_client_auth();
        Ok(Self::new(config))
    }

    /// Connects only to the holder of the certificate with the fingerprint
    /// `peer`.
    ///
    /// # Errors
    /// [`TlsError::Credentials`].
    pub fn pinned(identity: &PinnedIdentity, peer: Fingerprint) -> Result<Self, TlsError> {
        let config = client_builder()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verify::Pinned::new(peer, provider())))
            .with_client_auth_cert(vec![identity.cert.clone()], identity.key())
            .map_err(|e| bad("the worker's certificate", e))?;
        Ok(Self::new(config))
    }

    fn new(mut config: ClientConfig) -> Self {
        config.resumption = Resumption::disabled();
        Self {
            config: Arc::new(config),
        }
    }

    /// The rustls configuration, for clients of other protocols.
    pub fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }

    /// Connects to `address` (`host:port`) and makes the handshake. `expected`
    /// is the node that must answer; without it (pinned, join) the
    /// configuration's own check decides alone.
    ///
    /// TLS 1.3 lets the client finish first: when the server refuses *this*
    /// side's certificate, that shows at the first read.
    ///
    /// # Errors
    /// [`TlsError::Connect`], [`TlsError::Handshake`], [`TlsError::TimedOut`].
    pub async fn connect(
        &self,
        address: &str,
        expected: Option<&NodeName>,
        limit: Duration,
    ) -> Result<ClientStream<PacedStream>, TlsError> {
        let peer = peer_label(expected);
        let connecting = async {
            let stream = TcpStream::connect(address)
                .await
                .map_err(|source| TlsError::Connect {
                    peer: peer.clone(),
                    address: address.into(),
                    source,
                })?;
            stream.set_nodelay(true).ok();
            self.over(stream.into(), address, expected).await
        };
        match tokio::time::timeout(limit, connecting).await {
            Ok(result) => result,
            Err(_) => Err(TlsError::TimedOut {
                peer: peer.clone(),
                address: address.into(),
                limit_ms: limit.as_millis(),
            }),
        }
    }

    /// Makes the handshake over a stream that is connected already.
    ///
    /// # Errors
    /// [`TlsError::Handshake`].
    pub async fn over<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        address: &str,
        expected: Option<&NodeName>,
    ) -> Result<ClientStream<S>, TlsError> {
        let dns = expected.map_or_else(|| PINNED_DNS.to_owned(), NodeName::dns);
        let name = ServerName::try_from(dns).map_err(|e| bad("the node name", e))?;
        tokio_rustls::TlsConnector::from(Arc::clone(&self.config))
            .connect(name, stream)
            .await
            .map_err(|error| handshake(&peer_label(expected), address, &error))
    }
}

pub(crate) fn peer_label(expected: Option<&NodeName>) -> String {
    expected.map_or_else(|| "the peer".into(), |node| format!("node {node}"))
}

pub(crate) fn handshake(peer: &str, address: &str, error: &io::Error) -> TlsError {
    TlsError::Handshake {
        peer: peer.into(),
        address: address.into(),
        reason: explain(error),
    }
}

/// Explanation of a TLS failure for users.
pub(crate) fn explain(error: &io::Error) -> String {
    use rustls::AlertDescription as Alert;
    use rustls::CertificateError as Cert;
    use rustls::Error as Tls;

    let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<Tls>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                "the connection was closed during the handshake".into()
            }
            _ => error.to_string(),
        };
    };
    match tls {
        Tls::InvalidCertificate(Cert::UnknownIssuer | Cert::BadSignature) => {
            "its certificate is of another cluster (not signed by this cluster's CA); \
             check the address, or remove the node's state and `keel join` it again"
                .into()
        }
        Tls::InvalidCertificate(Cert::NotValidForNameContext { presented, .. }) => format!(
            "another node answered there ({}); check the address in `keel nodes`",
            presented.join(", ")
        ),
        Tls::InvalidCertificate(Cert::NotValidForName) => {
            "another node answered there; check the address in `keel nodes`".into()
        }
        Tls::InvalidCertificate(Cert::Other(other)) => other.to_string(),
        Tls::NoCertificatesPresented => "it presented no certificate".into(),
        Tls::AlertReceived(
            alert @ (Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::DecryptError
            | Alert::CertificateUnknown
            | Alert::CertificateRequired
            | Alert::AccessDenied),
        ) => format!(
            "it does not accept this side's certificate ({alert:?}): \
             is this node a member of the same cluster?"
        ),
        Tls::AlertReceived(Alert::ProtocolVersion) | Tls::PeerIncompatible(_) => {
            "it does not speak TLS 1.3".into()
        }
        Tls::InvalidMessage(_) => "it does not speak TLS; check the port".into(),
        other => other.to_string(),
    }
}
