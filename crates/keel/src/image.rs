//! Files that machines start from: read or made on this computer, and uploaded to the node that is
//! asked.

use anyhow::{Context, Result};
use bytes::Bytes;
use keel_api::Client;
use keel_machine::kind::KindName;
use std::path::Path;

/// One that is whole.
pub(crate) struct ImageFile {
    /// Its path, or what it is.
    what: String,
    bytes: Bytes,
}

impl ImageFile {
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let read = std::fs::read(path);
        let bytes = read.with_context(|| format!("cannot read {}", path.display()))?;
        Ok(ImageFile::made(&path.display().to_string(), bytes))
    }

    /// One that was made here, of which errors say what it is.
    pub(crate) fn made(what: &str, bytes: Vec<u8>) -> Self {
        ImageFile {
            what: what.to_owned(),
            bytes: bytes.into(),
        }
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The name by which nodes know it: its hash (BLAKE3, hex).
    pub(crate) fn hash(&self) -> String {
        blake3::hash(&self.bytes).to_hex().to_string()
    }

    /// # Errors
    /// If machines of this kind do not start from it, or the node does not answer.
    pub(crate) async fn upload(&self, client: &Client, kind: &KindName) -> Result<()> {
        let uploaded = client.upload(kind, self.bytes.clone()).await;
        uploaded.with_context(|| self.what.clone())?;
        Ok(())
    }
}
