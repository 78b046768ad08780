//! Backups: all entries of one revision in a file.
//!
//! What belongs to a lease is not in it: leases do not survive. The file has a magic number, the
//! BLAKE3 hash of the rest, and the content in the envelope of [`crate::encoding`].

use crate::encoding;
use crate::interface::{KeyValue, Revision};
use crate::wire::Entry;
use serde::{Deserialize, Serialize};
use thiserror::Error;

const MAGIC: &[u8; 8] = b"keelbak1";

/// Why bytes are no backup.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BackupError {
    #[error("it is not a backup of a store")]
    NotABackup,
    #[error("it is damaged: its content does not match its hash; use another backup")]
    Damaged,
    #[error(transparent)]
    Content(#[from] encoding::WireError),
}

/// The content of a store at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// The cluster's id, as people see it.
    pub cluster: String,
    pub revision: Revision,
    /// When it was made, in milliseconds since 1970.
    pub created_unix_ms: u64,
    pub entries: Vec<KeyValue>,
}

#[derive(Serialize, Deserialize)]
struct Content {
    cluster: String,
    revision: Revision,
    created_unix_ms: u64,
    entries: Vec<Entry>,
}

impl Backup {
    /// The bytes of a file.
    ///
    /// # Errors
    /// [`BackupError::Content`] for entries that cannot be written; there are none.
    pub fn encode(&self) -> Result<Vec<u8>, BackupError> {
        let lasting = self.entries.iter().filter(|entry| entry.lease.is_none());
        let content = Content {
            cluster: self.cluster.clone(),
            revision: self.revision,
            created_unix_ms: self.created_unix_ms,
            entries: lasting.cloned().map(Entry::from).collect(),
        };
        let content = encoding::encode("a backup", &content)?;
        let hash = blake3::hash(&content);
        Ok([MAGIC.as_slice(), hash.as_bytes(), &content].concat())
    }

    /// Reads what [`Backup::encode`] wrote.
    ///
    /// # Errors
    /// [`BackupError`] for bytes that are another file's, damaged, or of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self, BackupError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(BackupError::NotABackup)?;
        let (hash, content) = rest.split_at_checked(32).ok_or(BackupError::Damaged)?;
        if blake3::hash(content).as_bytes() != hash {
            return Err(BackupError::Damaged);
        }
        let content: Content = encoding::decode("a backup", content)?;
        Ok(Backup {
            cluster: content.cluster,
            revision: content.revision,
            created_unix_ms: content.created_unix_ms,
            entries: content.entries.into_iter().map(KeyValue::from).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LeaseId;

    fn entry(key: &str, lease: Option<u64>) -> KeyValue {
        KeyValue {
            key: key.into(),
            value: vec![7; 300],
            created: 3,
            modified: 9,
            lease: lease.map(LeaseId),
        }
    }

    #[test]
    fn a_backup_has_all_that_lasts_and_damage_is_found() {
        let backup = Backup {
            cluster: "c".into(),
            revision: 12,
            created_unix_ms: 1,
            entries: vec![entry("alive/a", Some(4)), entry("member/a", None)],
        };
        let bytes = backup.encode().unwrap();
        let read = Backup::decode(&bytes).unwrap();
        assert_eq!(read.entries, [entry("member/a", None)]);
        assert_eq!(read.revision, 12);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(Backup::decode(&damaged).is_err(), "byte {at}");
            assert!(Backup::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
