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

/// A proof in a directory of this node, until this is dropped.
#[derive(Debug)]
pub(crate) struct ProofFile {
    pub(crate) proof: Proof,
    /// None once it was removed.
    path: Option<PathBuf>,
}

impl ProofFile {
    /// Writes a new one, which is unlike all others. Waits for the file server.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn write(folder: &Path) -> std::io::Result<Self> {
        let name = format!(".keel-unlinked-proof-{:016x}", rand::random::<u64>());
        let content = format!("{:032x}", rand::random::<u128>());
        let path = folder.join(&name);
        let proof = Proof { name, content };
        // On a full disk it is there, and empty.
        let file = ProofFile {
            proof,
            path: Some(path.clone()),
        };
        std::fs::write(path, &file.proof.content)?;
        Ok(file)
    }

    /// Removes it. One that cannot be removed is told by its name. Blocks.
    pub(crate) fn remove(mut self) {
        if let Some(path) = self.path.take() {
            remove(&path);
        }
    }
}

impl Drop for ProofFile {
    /// Wherever it is dropped, nobody waits for the disk.
    fn drop(&mut self) {
        let Some(path) = self.path.take() else { return };
        let thread = std::thread::Builder::new().name("proof-file".into());
        if let Err(error) = thread.spawn(move || remove(&path)) {
            tracing::warn!(%error, "a proof file stays");
        }
    }
}

fn remove(path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "cannot remove a proof file");
        }
        _ => {}
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

    #[test]
    fn one_that_is_dropped_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let file = ProofFile::write(folder.path()).unwrap();
        let path = folder.path().join(&file.proof.name);
        drop(file);
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while path.exists() {
            assert!(std::time::Instant::now() < until);
            std::thread::yield_now();
        }
    }
}
