//! The cluster volumes of a machine in its worker, by their numbers in the spec.
//! `cluster_volume` implements their backends; this module sequences them with the
//! machine's life.

use crate::checkpoint::CheckpointId;
use crate::cluster_volume::{BackendOptions, VolumeBackend, VolumeError, VolumeStore, WriterEpoch};
use crate::spec::{Spec, VolumeKind};
use keel_cluster::{Epoch, MachineName};
use keel_wasi::Wasi;
use keel_wasi::volume::{Backed, LocalBlocks, Stalls, VolumeRecord};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// How long a move waits for a volume that is being claimed.
const CLAIM_PATIENCE: Duration = Duration::from_secs(10);

/// All cluster volumes of a machine.
#[derive(Debug, Clone, Default)]
pub(super) struct ClusterVolumes(Vec<ClusterVolume>);

#[derive(Debug, Clone)]
struct ClusterVolume {
    number: u32,
    /// Number of this machine in the sequence of the volume's holders.
    holding: u64,
    keeper: VolumeBackend,
    record: Option<VolumeRecord>,
    local: LocalBlocks,
}

impl ClusterVolumes {
    /// Opens the stores of a machine's volumes and checks that the volumes exist; nothing
    /// is claimed yet. Blocking.
    pub(super) fn open(
        spec: &Spec,
        worker: &Path,
        stalls: &Arc<Stalls>,
        runtime: &Handle,
        lost: impl Fn(&str) + Clone + Send + Sync + 'static,
        damaged: impl Fn(&str) + Clone + Send + Sync + 'static,
    ) -> Result<Self, VolumeError> {
        let mut all = Vec::new();
        for (number, kind) in spec.cluster_volumes() {
            let VolumeKind::Cluster {
                name,
                id,
                place,
                holding,
                ..
            } = kind
            else {
                continue;
            };
            let folder = super::volumes::folder(worker).join(number.to_string());
            let keeper = VolumeBackend::new(BackendOptions {
                store: VolumeStore::open(name, *id, place)?,
                runtime: runtime.clone(),
                stalls: stalls.clone(),
                folder: folder.to_string_lossy().into_owned(),
                lost: Box::new(lost.clone()),
                damaged: Box::new(damaged.clone()),
            });
            all.push(ClusterVolume {
                number,
                holding: *holding,
                keeper,
                record: None,
                local: LocalBlocks::default(),
            });
        }
        Ok(ClusterVolumes(all))
    }

    /// Fails on a node that cannot reach the volumes. Blocking.
    pub(super) fn probe(spec: &Spec, runtime: &Handle) -> Result<(), VolumeError> {
        for (_, kind) in spec.cluster_volumes() {
            if let VolumeKind::Cluster {
                name, id, place, ..
            } = kind
            {
                let store = VolumeStore::open(name, *id, place)?;
                runtime.block_on(store.summary()).map(drop)?;
            }
        }
        Ok(())
    }

    /// Claims all volumes for a machine that starts. Blocking.
    pub(super) fn begin(&mut self, epoch: Epoch) -> Result<(), VolumeError> {
        for kept in &mut self.0 {
            let epoch = WriterEpoch::of(epoch, kept.holding);
            kept.record = Some(kept.keeper.begin(epoch)?);
        }
        Ok(())
    }

    /// Claims all volumes for a machine restored from a checkpoint, and restores their
    /// snapshots. Blocking.
    pub(super) fn roll_back(
        &mut self,
        epoch: Epoch,
        machine: &MachineName,
        id: &CheckpointId,
    ) -> Result<(), VolumeError> {
        for kept in &mut self.0 {
            let epoch = WriterEpoch::of(epoch, kept.holding);
            let snapshot = crate::checkpoint::snapshot_name(machine, id);
            kept.record = Some(kept.keeper.roll_back(epoch, &snapshot)?);
        }
        Ok(())
    }

    /// Adds the blocks that arrived with a move.
    pub(super) fn with_local(mut self, local: Vec<(u32, LocalBlocks)>) -> Self {
        for (number, local) in local {
            let kept = self.0.iter_mut().find(|kept| kept.number == number);
            if let Some(kept) = kept {
                kept.local = local;
            }
        }
        self
    }

    /// Backing of a volume.
    pub(super) fn backed(&self, number: u32) -> Option<Backed> {
        let kept = self.0.iter().find(|kept| kept.number == number)?;
        Some(Backed {
            backing: Arc::new(kept.keeper.clone()),
            record: kept.record.clone(),
            local: kept.local.clone(),
        })
    }

    /// Starts to commit changes. Called before the guest runs.
    pub(super) fn attach(&self, wasi: &Wasi) {
        for (number, volume) in wasi.volumes() {
            let kept = self.0.iter().find(|kept| kept.number == number);
            if let Some(kept) = kept {
                kept.keeper.attach(&volume, &kept.local);
            }
        }
    }

    /// The machine goes on under another epoch.
    pub(super) fn claim_under(&self, epoch: Epoch) {
        for kept in &self.0 {
            let epoch = WriterEpoch::of(epoch, kept.holding);
            kept.keeper.claim_under(epoch);
        }
    }

    /// The machine is being frozen for a move.
    pub(super) fn rest(&self) {
        self.0.iter().for_each(|kept| kept.keeper.rest());
    }

    /// Waits until all volumes are claimed by this machine, before it moves. Blocking.
    pub(super) fn wait_claimed(&self) -> Result<(), String> {
        let mut all = self.0.iter();
        all.try_for_each(|kept| kept.keeper.wait_claimed(CLAIM_PATIENCE))
    }

    /// Blocks of a volume that are not known to be in a segment.
    pub(super) fn uncommitted(&self, number: u32) -> Vec<(u64, Range<u64>)> {
        let kept = self.0.iter().find(|kept| kept.number == number);
        kept.map_or_else(Vec::new, |kept| kept.keeper.uncommitted())
    }

    /// The backends of all volumes, for a checkpoint.
    pub(super) fn all(&self) -> Vec<VolumeBackend> {
        self.0.iter().map(|kept| kept.keeper.clone()).collect()
    }

    /// Commits all that the machine wrote before its end. Blocking.
    pub(super) fn finish(&self) {
        self.0.iter().for_each(|kept| kept.keeper.finish());
    }

    /// Deletes the snapshots of deleted checkpoints. Blocking.
    pub(super) fn forget_checkpoints(&self, machine: &MachineName, gone: &[CheckpointId]) {
        let names = gone
            .iter()
            .map(|id| crate::checkpoint::snapshot_name(machine, id));
        let names = names.collect::<Vec<_>>();
        for kept in &self.0 {
            if let Err(error) = kept.keeper.delete_snapshots(&names) {
                tracing::warn!(%error, "cannot delete snapshots of deleted checkpoints");
            }
        }
    }
}
