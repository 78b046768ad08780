//! Proof that two nodes see the same directory: a file with random content that one writes and the
//! other reads. What is to be the same, and what follows if it is not, is left to those who ask.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A proof, as another node gets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Proof {
    name: String,
    content: String,
}

impl Proof {
    /// From what [`Self::parts`] gave.
    pub(crate) fn of((name, content): (String, String)) -> Self {
        Proof { name, content }
    }

    /// Its name and its content.
    pub(crate) fn parts(&self) -> (String, String) {
        (self.name.clone(), self.content.clone())
    }

    /// Whether `folder` here is the one that it is in. Blocks.
    pub(crate) fn is_in(&self, folder: &Path) -> bool {
        // A name without slashes: no path outside the folder is read.
        let read = || std::fs::read_to_string(folder.join(&self.name)).ok();
        !self.name.contains('/') && read().as_ref() == Some(&self.content)
    }
}

/// A proof in a directory of this node. Methods block.
#[derive(Debug)]
pub(crate) struct ProofFile {
    pub(crate) proof: Proof,
    path: PathBuf,
}

impl ProofFile {
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn write(folder: &Path) -> std::io::Result<Self> {
        let name = format!(".keel-unlinked-proof-{:016x}", rand::random::<u64>());
        let content = format!("{:032x}", rand::random::<u128>());
        let path = folder.join(&name);
        std::fs::write(&path, &content)?;
        let proof = Proof { name, content };
        Ok(ProofFile { proof, path })
    }

    /// Removes it. One that cannot be removed is told by its name.
    pub(crate) fn remove(self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "cannot remove a proof file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_in_its_directory_only() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = ProofFile::write(one.path()).unwrap();
        let proof = file.proof.clone();
        assert!(proof.is_in(one.path()));
        assert!(!proof.is_in(other.path()));
        // Of that name, but another one's.
        std::fs::write(other.path().join(&proof.name), "other").unwrap();
        assert!(!proof.is_in(other.path()));
        let outside = Proof::of((format!("../{}", proof.name), proof.content.clone()));
        let folder = one.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        assert!(!outside.is_in(&folder));
        file.remove();
        assert!(!proof.is_in(one.path()));
    }
}
