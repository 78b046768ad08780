//! Proof that source and target see the same host directories: a file with random content in each.

use crate::proof_file::ProofFile;
use keel_machine::spec::{Spec, VolumeKind};

/// Files that prove to the target that it sees the same directories.
pub(super) struct Proofs(Vec<Option<ProofFile>>);

impl Proofs {
    pub(super) async fn make(spec: &Spec) -> Result<Self, String> {
        let volumes = spec.volumes.clone();
        tokio::task::spawn_blocking(move || {
            let proofs = volumes.iter().map(|volume| match &volume.kind {
                VolumeKind::Host { path } if !volume.read_only => {
                    let written = ProofFile::write(path.as_ref());
                    let written = written.map_err(|error| format!("volume {path}: {error}"));
                    written.map(Some)
                }
                _ => Ok(None),
            });
            Ok(Proofs(proofs.collect::<Result<_, String>>()?))
        })
        .await
        .map_err(|error| error.to_string())?
    }

    /// One for each volume that has one.
    pub(super) fn list(&self) -> Vec<Option<(String, String)>> {
        let proofs = self.0.iter().map(Option::as_ref);
        proofs.map(|file| Some(file?.proof.parts())).collect()
    }

    pub(super) async fn remove(self) {
        let removed = tokio::task::spawn_blocking(move || {
            self.0.into_iter().flatten().for_each(ProofFile::remove);
        });
        // A panic in the task removes nothing; the file names identify the leftovers.
        let _ = removed.await;
    }
}
