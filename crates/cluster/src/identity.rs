//! The cluster's certificate authority and the nodes' certificates.
//!
//! A node creates its own key and sends a signing request; the authority takes only the public key
//! from it, and sets the node's name itself. Nodes renew their certificates long before they end
//! ([`crate::certificates`]); they are valid since ever, so that no clock that was set back makes
//! one invalid. A node is removed by removing its membership, see [`crate::members`].
//!
//! ```text
//! STATE/identity/cluster    the cluster's id
//!               /ca.pem     the certificates of the authorities that it trusts
//!               /node.pem   this node's certificate and its private key
//!               /node.key   the key again, for older versions
//!               /ca.key     the authority's keys, on voters only: see [`crate::authority_keys`]
//! ```

use std::fmt;
use std::path::Path;
use std::time::Duration;

use keel_net::tls::{NodeCredentials, node_of};
use keel_net::{ClientTls, Fingerprint, NodeName, ServerTls, TlsError};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use time::OffsetDateTime;

use crate::certificates::NODE_LIFETIME;
use crate::state_file::{self, StateFileError};

/// Maximum size of a signing request, in bytes.
pub const CSR_BYTES_MAX: usize = 16 << 10;

/// How long an authority's certificate is valid: ten years.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(3652 * 24 * 3600);

pub(crate) const CLUSTER_FILE: &str = "cluster";
pub(crate) const CA_CERT_FILE: &str = "ca.pem";
const NODE_CERT_FILE: &str = "node.pem";
const NODE_KEY_FILE: &str = "node.key";

/// Why an identity cannot be created, read or stored.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// The text is not a cluster id.
    #[error("{0:?} is not a cluster id: it is 32 hex digits")]
    ClusterId(String),
    /// Making or reading a key or certificate failed.
    #[error("{what}: {reason}")]
    Certificate { what: &'static str, reason: String },
    /// The certificate is for another node.
    #[error("the certificate is for {found}, not for node {expected}")]
    OtherNode {
        /// The node it should be for.
        expected: NodeName,
        found: String,
    },
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A file of the state directory.
    #[error(transparent)]
    File(#[from] StateFileError),
}

pub(crate) fn bad(what: &'static str, reason: impl fmt::Display) -> IdentityError {
    IdentityError::Certificate {
        what,
        reason: reason.to_string(),
    }
}

/// The identity of a cluster: 128 random bits, printed as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ClusterId(pub u128);

impl ClusterId {
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterId({self})")
    }
}

impl std::str::FromStr for ClusterId {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let id = u128::from_str_radix(text, 16).map(Self);
        id.ok()
            .filter(|id| id.to_string() == text)
            .ok_or_else(|| IdentityError::ClusterId(text.chars().take(80).collect()))
    }
}

/// The cluster's authority: its certificate and the key that signs nodes'.
pub struct CertificateAuthority {
    cluster: ClusterId,
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl CertificateAuthority {
    /// Makes the authority of a new cluster.
    ///
    /// # Errors
    /// [`IdentityError::Certificate`] when the random source or signing fails.
    pub fn create(cluster: ClusterId) -> Result<Self, IdentityError> {
        let what = "making the cluster CA";
        let key = KeyPair::generate().map_err(|e| bad(what, e))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(format!("keel cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_after = end(AUTHORITY_LIFETIME);
        let certificate = params.self_signed(&key).map_err(|e| bad(what, e))?;
        Self::from_pem(cluster, &certificate.pem(), &key.serialize_pem())
    }

    /// Reads the authority's certificate and key.
    ///
    /// # Errors
    /// [`IdentityError::Certificate`] when either cannot be read or they do
    /// not belong together.
    pub fn from_pem(
        cluster: ClusterId,
        certificate_pem: &str,
        key_pem: &str,
    ) -> Result<Self, IdentityError> {
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|e| bad("reading the certificate of the cluster CA", e))?;
        let key =
            KeyPair::from_pem(key_pem).map_err(|e| bad("reading the key of the cluster CA", e))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|e| bad("reading the certificate of the cluster CA", e))?;
        let authority = Self {
            cluster,
            certificate_pem: certificate_pem.into(),
            certificate,
            issuer,
        };
        authority.self_test()?;
        Ok(authority)
    }

    /// Signs a certificate and verifies it with TLS: shows that key and certificate match before a
    /// node relies on them.
    fn self_test(&self) -> Result<(), IdentityError> {
        let what = "checking the key of the cluster CA";
        let node = NodeName::new("probe").map_err(|e| bad(what, e))?;
        let csr = make_csr(&node)?;
        let identity = NodeIdentity::from_pem(
            self.cluster,
            node,
            self.sign(&csr.csr_pem, &csr.node, Duration::from_secs(3600))?,
            csr.key_pem,
            self.certificate_pem.clone(),
        )?;
        identity.verify()
    }

    /// The cluster it is the authority of.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Its private key. Its holder can impersonate any node.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// The hash of its certificate, which join tokens carry.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// Signs a certificate for `node`, valid from now on for `lifetime`, with the public key of a
    /// signing request (PEM); everything else in the request is ignored.
    ///
    /// # Errors
    /// [`IdentityError::Certificate`] when the request is too long, cannot be
    /// read, or is not signed by its own key.
    pub fn sign(
        &self,
        csr_pem: &str,
        node: &NodeName,
        lifetime: Duration,
    ) -> Result<String, IdentityError> {
        let what = "signing a node's certificate";
        if csr_pem.len() > CSR_BYTES_MAX {
            return Err(bad(what, "the signing request is too long"));
        }
        let csr = CertificateSigningRequestParams::from_pem(csr_pem).map_err(|e| bad(what, e))?;
        let mut params = CertificateParams::new(vec![node.dns()]).map_err(|e| bad(what, e))?;
        params.distinguished_name = common_name(format!("keel node {node}"));
        let uri = format!("keel://{}/node/{node}", self.cluster);
        let uri = uri.try_into().map_err(|e| bad(what, e))?;
        params.subject_alt_names.push(SanType::URI(uri));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        params.not_after = end(lifetime);
        let certificate = params
            .signed_by(&csr.public_key, &self.issuer)
            .map_err(|e| bad(what, e))?;
        Ok(certificate.pem())
    }
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CertificateAuthority({})", self.cluster)
    }
}

/// A section of a PEM file.
pub(crate) fn encode(section: &pem::Pem) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(section, config)
}

/// The time after `lifetime`.
fn end(lifetime: Duration) -> OffsetDateTime {
    // The last second that a certificate can name.
    const LATEST_UNIX_S: i64 = 253_402_300_799;
    let end =
        OffsetDateTime::now_utc().checked_add(lifetime.try_into().unwrap_or(time::Duration::MAX));
    let latest = OffsetDateTime::from_unix_timestamp(LATEST_UNIX_S);
    end.unwrap_or_else(|| latest.unwrap_or(OffsetDateTime::UNIX_EPOCH))
}

/// When a certificate ends, in seconds since 1970-01-01 UTC.
///
/// # Errors
/// [`IdentityError::Certificate`] if it cannot be read.
pub fn ends_unix_s(certificate: &CertificateDer<'_>) -> Result<u64, IdentityError> {
    let what = "reading the end of a certificate";
    let (_, certificate) =
        x509_parser::parse_x509_certificate(certificate).map_err(|e| bad(what, e))?;
    Ok(u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0))
}

fn common_name(name: String) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// A new key of a node and the request to have it signed.
pub struct SigningRequest {
    pub node: NodeName,
    /// The private key; it stays here.
    pub key_pem: String,
    pub csr_pem: String,
}

impl fmt::Debug for SigningRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningRequest({})", self.node)
    }
}

/// Makes a key for `node` and the request to have it signed.
///
/// # Errors
/// [`IdentityError::Certificate`] when the random source or signing fails.
pub fn make_csr(node: &NodeName) -> Result<SigningRequest, IdentityError> {
    let what = "making a node's key";
    let key = KeyPair::generate().map_err(|e| bad(what, e))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(format!("keel node {node}"));
    let csr = params.serialize_request(&key).map_err(|e| bad(what, e))?;
    Ok(SigningRequest {
        node: node.clone(),
        key_pem: key.serialize_pem(),
        csr_pem: csr.pem().map_err(|e| bad(what, e))?,
    })
}

/// Identity of this process as a node of its cluster.
#[derive(Clone)]
pub struct NodeIdentity {
    pub cluster: ClusterId,
    pub node: NodeName,
    pub certificate_pem: String,
    pub key_pem: String,
    /// Certificates of the authorities it trusts: one, or two while the CA is
    /// rotated.
    pub authorities_pem: String,
}

impl NodeIdentity {
    /// Assembles and verifies an identity.
    ///
    /// # Errors
    /// [`IdentityError::OtherNode`] when the certificate is for another node,
    /// [`IdentityError::Tls`] when a part cannot be read.
    pub fn from_pem(
        cluster: ClusterId,
        node: NodeName,
        certificate_pem: String,
        key_pem: String,
        authorities_pem: String,
    ) -> Result<Self, IdentityError> {
        let identity = Self {
            cluster,
            node,
            certificate_pem,
            key_pem,
            authorities_pem,
        };
        let credentials = identity.credentials()?;
        let found = credentials.chain.first().and_then(node_of);
        if found.as_ref() != Some(&identity.node) {
            return Err(IdentityError::OtherNode {
                expected: identity.node,
                found: found.map_or_else(|| "no node".into(), |node| format!("node {node}")),
            });
        }
        Ok(identity)
    }

    /// The identity of a cluster's first node.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn first(authority: &CertificateAuthority, node: &NodeName) -> Result<Self, IdentityError> {
        let csr = make_csr(node)?;
        Self::from_pem(
            authority.cluster(),
            node.clone(),
            authority.sign(&csr.csr_pem, node, NODE_LIFETIME)?,
            csr.key_pem,
            authority.certificate_pem().into(),
        )
    }

    /// Credentials for TLS.
    ///
    /// # Errors
    /// [`TlsError::Credentials`].
    pub fn credentials(&self) -> Result<NodeCredentials, TlsError> {
        NodeCredentials::from_pem(&self.certificate_pem, &self.key_pem, &self.authorities_pem)
    }

    /// The server's side of TLS; anonymous peers may connect, to join.
    ///
    /// # Errors
    /// [`TlsError::Credentials`].
    pub fn server_tls(&self) -> Result<ServerTls, TlsError> {
        ServerTls::node_or_anonymous(&self.credentials()?)
    }

    /// The client's side of TLS, to other nodes.
    ///
    /// # Errors
    /// [`TlsError::Credentials`].
    pub fn client_tls(&self) -> Result<ClientTls, TlsError> {
        ClientTls::node(&self.credentials()?)
    }

    /// Fingerprints of the authorities that it trusts.
    ///
    /// # Errors
    /// [`IdentityError`] when the stored certificates cannot be read.
    pub fn trusted(&self) -> Result<Vec<Fingerprint>, IdentityError> {
        let credentials = self.credentials()?;
        Ok(credentials
            .authorities
            .iter()
            .map(Fingerprint::of)
            .collect())
    }

    /// Fingerprint of the authority that signed its certificate.
    ///
    /// # Errors
    /// [`IdentityError`] when it trusts none that did, or a certificate cannot be read.
    pub fn issuer(&self) -> Result<Fingerprint, IdentityError> {
        let credentials = self.credentials()?;
        // When it was valid: one that has ended was signed all the same.
        let within = Duration::from_secs(self.ends_unix_s()?.saturating_sub(1));
        let within = UnixTime::since_unix_epoch(within);
        let signed = |authority: &&CertificateDer<'static>| {
            let own = std::slice::from_ref(*authority);
            verify_signed(&credentials, own, within).is_ok()
        };
        let issuer = credentials.authorities.iter().find(signed);
        issuer.map(Fingerprint::of).ok_or_else(|| {
            bad(
                "the certificate of this node",
                "no authority that it trusts signed it",
            )
        })
    }

    /// The certificates of the authorities that it trusts, each in PEM.
    ///
    /// # Errors
    /// [`IdentityError`] when they cannot be read.
    pub fn trusted_pem(&self) -> Result<Vec<String>, IdentityError> {
        let what = "the authorities of this node";
        let sections = pem::parse_many(&self.authorities_pem).map_err(|e| bad(what, e))?;
        Ok(sections.iter().map(encode).collect())
    }

    /// The same with a new key and a certificate that `authority` signs, for a node that has the
    /// authority's key itself.
    ///
    /// # Errors
    /// [`IdentityError`] when it does not trust that authority.
    pub fn signed_by(
        &self,
        authority: &CertificateAuthority,
        lifetime: Duration,
    ) -> Result<Self, IdentityError> {
        let csr = make_csr(&self.node)?;
        let signed = Self::from_pem(
            self.cluster,
            self.node.clone(),
            authority.sign(&csr.csr_pem, &self.node, lifetime)?,
            csr.key_pem,
            self.authorities_pem.clone(),
        )?;
        signed.verify()?;
        Ok(signed)
    }

    /// When its certificate ends, in seconds since 1970-01-01 UTC.
    ///
    /// # Errors
    /// [`IdentityError`] when it cannot be read.
    pub fn ends_unix_s(&self) -> Result<u64, IdentityError> {
        let what = "the certificate of this node";
        let credentials = self.credentials()?;
        let certificate = credentials.chain.first();
        ends_unix_s(certificate.ok_or_else(|| bad(what, "there is none"))?)
    }

    /// Verifies the certificate against the authorities and the key against
    /// the certificate.
    ///
    /// # Errors
    /// [`IdentityError::Certificate`], [`IdentityError::Tls`].
    pub fn verify(&self) -> Result<(), IdentityError> {
        self.verify_at(UnixTime::now())
    }

    /// As [`Self::verify`], at a given time.
    pub(crate) fn verify_at(&self, at: UnixTime) -> Result<(), IdentityError> {
        let credentials = self.credentials()?;
        verify_signed(&credentials, &credentials.authorities, at)?;
        // Compares the certificate's public key with the private one.
        self.server_tls()?;
        Ok(())
    }

    /// Keeps the identity in `directory`, with mode 0600. The certificate comes last, in one file
    /// with its key: with it the identity is complete.
    ///
    /// # Errors
    /// [`IdentityError::File`].
    pub fn save(&self, directory: &Path) -> Result<(), IdentityError> {
        let write =
            |name: &str, text: &str| state_file::write(&directory.join(name), text.as_bytes());
        write(CLUSTER_FILE, &self.cluster.to_string())?;
        write(CA_CERT_FILE, &self.authorities_pem)?;
        write(
            NODE_CERT_FILE,
            &format!("{}{}", self.certificate_pem, self.key_pem),
        )?;
        write(NODE_KEY_FILE, &self.key_pem)?;
        Ok(())
    }

    /// Reads what [`NodeIdentity::save`] wrote. `None` if the directory has no
    /// identity (yet).
    ///
    /// # Errors
    /// [`IdentityError`], naming the file.
    pub fn load(directory: &Path) -> Result<Option<Self>, IdentityError> {
        let certificate = directory.join(NODE_CERT_FILE);
        if !certificate.exists() {
            return Ok(None);
        }
        let read = |name: &str| state_file::read(&directory.join(name));
        let text = state_file::read(&certificate)?;
        let what = "reading the node's certificate";
        let sections = pem::parse_many(&text).map_err(|e| bad(what, e))?;
        let of = |is: fn(&str) -> bool| -> String {
            let sections = sections.iter().filter(|section| is(section.tag()));
            sections.map(encode).collect()
        };
        let certificate_pem = of(|tag| tag == "CERTIFICATE");
        let key_pem = match of(|tag| tag.ends_with("PRIVATE KEY")) {
            // An older version wrote it.
            none if none.is_empty() => read(NODE_KEY_FILE)?,
            key_pem => {
                // For older versions, if it was not written any more.
                if read(NODE_KEY_FILE).ok().as_ref() != Some(&key_pem) {
                    state_file::write(&directory.join(NODE_KEY_FILE), key_pem.as_bytes())?;
                }
                key_pem
            }
        };
        let parsed =
            CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(|e| bad(what, e))?;
        let node = node_of(&parsed).ok_or_else(|| bad(what, "it names no node"))?;
        let identity = Self::from_pem(
            read(CLUSTER_FILE)?.trim().parse()?,
            node,
            certificate_pem,
            key_pem,
            read(CA_CERT_FILE)?,
        )?;
        Ok(Some(identity))
    }
}

/// Verifies that one of some authorities signed a node's certificate.
fn verify_signed(
    credentials: &NodeCredentials,
    authorities: &[CertificateDer<'static>],
    at: UnixTime,
) -> Result<(), IdentityError> {
    let what = "verifying the node's certificate";
    let mut roots = rustls::RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).map_err(|e| bad(what, e))?;
    }
    let certificate = credentials.chain.first();
    let certificate = certificate.ok_or_else(|| bad(what, "there is none"))?;
    let certificate =
        rustls::server::ParsedCertificate::try_from(certificate).map_err(|e| bad(what, e))?;
    rustls::client::verify_server_cert_signed_by_trust_anchor(
        &certificate,
        &roots,
        &[],
        at,
        rustls::crypto::ring::default_provider()
            .signature_verification_algorithms
            .all,
    )
    .map_err(|e| bad(what, format!("not signed by the cluster CA: {e}")))
}

impl fmt::Debug for NodeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeIdentity({} of {})", self.node, self.cluster)
    }
}
