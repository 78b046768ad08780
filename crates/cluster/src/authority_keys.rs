//! The keys of the cluster's authority on a node that admits others: one, or two while the
//! authority is replaced.
//!
//! ```text
//! STATE/identity/ca.key    for each authority its private key and its certificate
//! ```
//!
//! Older versions wrote the key alone, and read the first one; its certificate is the first of
//! `ca.pem` then. It is written anew at the start.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use crate::identity::{
    CA_CERT_FILE, CLUSTER_FILE, CertificateAuthority, ClusterId, IdentityError, bad, encode,
};
use crate::state_file;
use keel_net::Fingerprint;

const FILE: &str = "ca.key";
const KEY: &str = "PRIVATE KEY";
const WHAT: &str = "reading the keys of the cluster CA";

/// The authorities whose keys this node has. The first is the one that signs unless the store says
/// otherwise.
pub struct AuthorityKeys {
    all: RwLock<Vec<Arc<CertificateAuthority>>>,
}

impl AuthorityKeys {
    pub fn new(authorities: Vec<CertificateAuthority>) -> Arc<Self> {
        let all = authorities.into_iter().map(Arc::new).collect();
        Arc::new(Self {
            all: RwLock::new(all),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<Arc<CertificateAuthority>>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn all(&self) -> Vec<Arc<CertificateAuthority>> {
        self.read().clone()
    }

    pub fn is_empty(&self) -> bool {
        self.read().is_empty()
    }

    pub fn first(&self) -> Option<Arc<CertificateAuthority>> {
        self.read().first().cloned()
    }

    /// The authority with this certificate.
    pub fn get(&self, certificate: Fingerprint) -> Option<Arc<CertificateAuthority>> {
        let all = self.read();
        let mut found = all.iter().filter(|it| it.fingerprint() == certificate);
        found.next().cloned()
    }

    /// Replaces all of them.
    pub fn set(&self, authorities: Vec<Arc<CertificateAuthority>>) {
        *self.all.write().unwrap_or_else(PoisonError::into_inner) = authorities;
    }

    /// These and another one, which is added if it is not there.
    pub fn with(&self, authority: CertificateAuthority) -> Vec<Arc<CertificateAuthority>> {
        let mut all = self.all();
        if self.get(authority.fingerprint()).is_none() {
            all.push(Arc::new(authority));
        }
        all
    }
}

impl fmt::Debug for AuthorityKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuthorityKeys({})", self.read().len())
    }
}

/// Stores keys in `directory`, beside the node's own identity: all of them or none.
///
/// # Errors
/// [`IdentityError::File`].
pub fn save(
    directory: &Path,
    authorities: &[Arc<CertificateAuthority>],
) -> Result<(), IdentityError> {
    let pairs = authorities
        .iter()
        .map(|it| it.key_pem() + it.certificate_pem());
    let text: String = pairs.collect();
    Ok(state_file::write(&directory.join(FILE), text.as_bytes())?)
}

/// Removes the keys from a node that is no longer a voter.
///
/// # Errors
/// The file system's.
pub fn remove(directory: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(directory.join(FILE)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Reads what [`save`] wrote; nothing if this node has no authority's key.
///
/// # Errors
/// [`IdentityError`].
pub fn load(directory: &Path) -> Result<Vec<CertificateAuthority>, IdentityError> {
    let path = directory.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let cluster = state_file::read(&directory.join(CLUSTER_FILE))?;
    let cluster: ClusterId = cluster.trim().parse()?;
    let text = state_file::read(&path)?;
    let sections = pem::parse_many(&text).map_err(|e| bad(WHAT, e))?;
    if sections.iter().all(|section| section.tag() == KEY) {
        let certificate = state_file::read(&directory.join(CA_CERT_FILE))?;
        let certificate = pem::parse(certificate).map_err(|e| bad(WHAT, e))?;
        let authority = CertificateAuthority::from_pem(cluster, &encode(&certificate), &text);
        return Ok(match authority {
            Ok(authority) => vec![authority],
            // The authority was replaced while this node was away: it is given the key again.
            Err(error) => {
                tracing::warn!(%error, "the key of the cluster's authority is not of use any more");
                Vec::new()
            }
        });
    }
    let mut authorities = Vec::new();
    for pair in sections.chunks(2) {
        let [key, certificate] = pair else {
            return Err(bad(WHAT, "the last one has no certificate"));
        };
        let [key, certificate] = [key, certificate].map(encode);
        authorities.push(CertificateAuthority::from_pem(cluster, &certificate, &key)?);
    }
    Ok(authorities)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_kept_and_those_of_an_older_version_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let cluster = ClusterId::random();
        state_file::write(
            &folder.path().join(CLUSTER_FILE),
            cluster.to_string().as_bytes(),
        )
        .unwrap();
        assert!(load(folder.path()).unwrap().is_empty());
        let made = || CertificateAuthority::create(cluster).unwrap();
        let keys = AuthorityKeys::new(vec![made()]);
        let next = made();
        let fingerprint = next.fingerprint();
        let both = keys.with(next);
        assert_eq!(both.len(), 2);
        save(folder.path(), &both).unwrap();
        let read = AuthorityKeys::new(load(folder.path()).unwrap());
        let fingerprints = |keys: &[Arc<CertificateAuthority>]| -> Vec<_> {
            keys.iter().map(|it| it.fingerprint()).collect()
        };
        assert_eq!(fingerprints(&read.all()), fingerprints(&both));
        assert!(read.get(fingerprint).is_some());

        let old = made();
        let certificate = folder.path().join(CA_CERT_FILE);
        state_file::write(&certificate, old.certificate_pem().as_bytes()).unwrap();
        state_file::write(&folder.path().join(FILE), old.key_pem().as_bytes()).unwrap();
        let read = load(folder.path()).unwrap();
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].fingerprint(), old.fingerprint());
        // Halves of pairs, and keys of other certificates, are refused.
        let text = made().certificate_pem().to_owned() + &old.key_pem();
        state_file::write(&folder.path().join(FILE), text.as_bytes()).unwrap();
        assert!(load(folder.path()).is_err());
        let text = made().key_pem() + old.certificate_pem();
        state_file::write(&folder.path().join(FILE), text.as_bytes()).unwrap();
        assert!(load(folder.path()).is_err());
        remove(folder.path()).unwrap();
        remove(folder.path()).unwrap();
        assert!(load(folder.path()).unwrap().is_empty());
    }
}
