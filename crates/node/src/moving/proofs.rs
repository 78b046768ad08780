//! What a target must have that no offer can say: the features of the processor, and the
//! same directories.

use crate::agent::cpu_features;
use keel_machine::spec::{Spec, VolumeKind};

/// CPU features that a target must have: guests see none of them, since every
/// node compiles for itself, so the baseline of the architecture is enough.
pub(crate) fn needed_features() -> Vec<String> {
    let baseline = ["sse2", "ssse3", "sse4_1", "sse4_2"];
    let here = cpu_features();
    baseline
        .iter()
        .filter(|feature| here.iter().any(|mine| mine == **feature))
        .map(|feature| (*feature).to_owned())
        .collect()
}

/// Files that prove to the target that it sees the same directories.
pub(crate) struct Proofs(Vec<Option<(std::path::PathBuf, String, String)>>);

impl Proofs {
    pub(crate) async fn make(spec: &Spec) -> Result<Self, String> {
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

    pub(crate) async fn remove(self) {
        let removed = tokio::task::spawn_blocking(move || {
            for (path, _, _) in self.0.into_iter().flatten() {
                if let Err(error) = std::fs::remove_file(&path) {
                    tracing::warn!(%error, path = %path.display(), "a proof stays behind");
                }
            }
        });
        // A panic in it has removed nothing; the names tell what they are.
        let _ = removed.await;
    }
}
