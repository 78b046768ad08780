//! Proof that source and target see the same host directories: a file with random content in each.

use keel_machine::spec::{Spec, VolumeKind};

/// Files that prove to the target that it sees the same directories.
pub(super) struct Proofs(Vec<Option<(std::path::PathBuf, String, String)>>);

impl Proofs {
    pub(super) async fn make(spec: &Spec) -> Result<Self, String> {
        let volumes = spec.volumes.clone();
        tokio::task::spawn_blocking(move || {
            let mut proofs = Vec::new();
            for volume in &volumes {
                let VolumeKind::Host { path: host } = &volume.kind else {
                    proofs.push(None);
                    continue;
                };
                if volume.read_only {
                    proofs.push(None);
                    continue;
                }
                let name = format!(".keel-unlinked-proof-{:016x}", rand::random::<u64>());
                let content = format!("{:032x}", rand::random::<u128>());
                let path = std::path::Path::new(host).join(&name);
                std::fs::write(&path, &content)
                    .map_err(|error| format!("volume {host}: {error}"))?;
                proofs.push(Some((path, name, content)));
            }
            Ok(Proofs(proofs))
        })
        .await
        .map_err(|error| error.to_string())?
    }

    pub(super) fn list(&self) -> Vec<Option<(String, String)>> {
        self.0
            .iter()
            .map(|proof| {
                proof
                    .as_ref()
                    .map(|(_, name, content)| (name.clone(), content.clone()))
            })
            .collect()
    }

    pub(super) async fn remove(self) {
        let removed = tokio::task::spawn_blocking(move || {
            for (path, _, _) in self.0.into_iter().flatten() {
                if let Err(error) = std::fs::remove_file(&path) {
                    tracing::warn!(%error, path = %path.display(), "cannot remove a proof file");
                }
            }
        });
        // A panic in the task removes nothing; the file names identify the leftovers.
        let _ = removed.await;
    }
}
