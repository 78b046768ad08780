//! Manifests as the previous version wrote them; the current version reads them too.

use super::format::{BlockRun, Manifest, Pack, Run};
use super::id::CheckpointId;
use crate::past::PastSpec;
use keel_cluster::{Epoch, MachineName};
use serde::Deserialize;

/// The version of these manifests.
pub(super) const VERSION: u32 = 5;

/// Decodes a manifest's body.
pub(super) fn decode(body: &[u8]) -> Result<Manifest, postcard::Error> {
    postcard::from_bytes::<PastManifest>(body).map(Manifest::from)
}

#[derive(Deserialize)]
struct PastManifest {
    id: CheckpointId,
    machine: MachineName,
    parent: Option<CheckpointId>,
    generation: u32,
    epoch: Epoch,
    created_unix_ms: u64,
    spec: PastSpec,
    program: [u8; 32],
    log_end: u64,
    memory_pages: Vec<u64>,
    runs: Vec<Run>,
    packs: Vec<Pack>,
    block_runs: Vec<BlockRun>,
    block_packs: Vec<Pack>,
    image: Vec<u8>,
}

impl From<PastManifest> for Manifest {
    fn from(past: PastManifest) -> Self {
        Manifest {
            id: past.id,
            machine: past.machine,
            parent: past.parent,
            generation: past.generation,
            epoch: past.epoch,
            created_unix_ms: past.created_unix_ms,
            spec: past.spec.into(),
            program: past.program,
            log_end: past.log_end,
            memory_pages: past.memory_pages,
            runs: past.runs,
            packs: past.packs,
            block_runs: past.block_runs,
            block_packs: past.block_packs,
            image: past.image,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::past::tests::{bytes, promised};

    /// A manifest as a node of that version wrote it.
    const CHECKPOINT: &str = "\
         4b434b5005000000d60000000000000016303030303030303030303030372d39343136623338630165000000\
         0007403033313066303962626565643065653365316338616534353233626432303136613231313939613932\
         353939376333383261663365343965656539626538383705096469736b2e7761736d042f746d700132013002\
         3230000101808080048008042f746d70008080808010800201dc0b80808008000001d80401072f6261636b75\
         7001030002019003000105030303030303030303030303030303030303030303030303030303030303030309\
         0101000000000301020349cd33252d95c5d1ca37d87fb42c4ecc318eac1bfb8cfd98cf3aa0350ef2eac5\
         ";

    #[test]
    fn a_checkpoint_of_the_version_before_is_read() {
        let written = bytes(CHECKPOINT);
        let manifest = Manifest::decode(&written).unwrap();
        assert_eq!(manifest.machine.as_ref(), "e");
        assert_eq!(manifest.spec.checkpoints.as_ref().unwrap().every_s, 600);
        assert_eq!(manifest.spec.balancing, promised());
        assert_eq!(manifest.image, [1, 2, 3]);
        let anew = manifest.encode().unwrap();
        assert_ne!(anew[4..8], written[4..8]);
        assert_eq!(Manifest::decode(&anew).unwrap(), manifest);
        for end in 0..written.len() {
            assert!(Manifest::decode(&written[..end]).is_err(), "{end}");
        }
    }
}
