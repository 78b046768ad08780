//! The cluster volumes of a machine in its worker, by their numbers in the spec.
//! `cluster_volume` implements their backends; this module sequences them with the
//! machine's life.

use keel_cluster::{Epoch, MachineName};
use keel_machine::checkpoint::CheckpointId;
use keel_machine::cluster_volume::{
    BackendOptions, VolumeBackend, VolumeError, VolumeStore, WriterEpoch,
};
use keel_machine::spec::{Spec, VolumeKind};
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
    backend: VolumeBackend,
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
            let folder =
                keel_machine::worker::volume_folder::folder(worker).join(number.to_string());
            let backend = VolumeBackend::new(BackendOptions {
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
                backend,
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
        for entry in &mut self.0 {
            let epoch = WriterEpoch::of(epoch, entry.holding);
            entry.record = Some(entry.backend.begin(epoch)?);
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
        for entry in &mut self.0 {
            let epoch = WriterEpoch::of(epoch, entry.holding);
            let snapshot = keel_machine::checkpoint::snapshot_name(machine, id);
            entry.record = Some(entry.backend.roll_back(epoch, &snapshot)?);
        }
        Ok(())
    }

    /// Adds the blocks that arrived with a move.
    pub(super) fn with_local(mut self, local: Vec<(u32, LocalBlocks)>) -> Self {
        for (number, local) in local {
            let entry = self.0.iter_mut().find(|entry| entry.number == number);
            if let Some(entry) = entry {
                entry.local = local;
            }
        }
        self
    }

    /// Backing of a volume.
    pub(super) fn backed(&self, number: u32) -> Option<Backed> {
        let entry = self.0.iter().find(|entry| entry.number == number)?;
        Some(Backed {
            backing: Arc::new(entry.backend.clone()),
            record: entry.record.clone(),
            local: entry.local.clone(),
        })
    }

    /// Starts to commit changes. Called before the guest runs.
    pub(super) fn attach(&self, wasi: &Wasi) {
        for (number, volume) in wasi.volumes() {
            let entry = self.0.iter().find(|entry| entry.number == number);
            if let Some(entry) = entry {
                entry.backend.attach(&volume, &entry.local);
            }
        }
    }

    /// The machine goes on under another epoch.
    pub(super) fn claim_under(&self, epoch: Epoch) {
        for entry in &self.0 {
            let epoch = WriterEpoch::of(epoch, entry.holding);
            entry.backend.claim_under(epoch);
        }
    }

    /// The machine is being frozen for a move.
    pub(super) fn pause(&self) {
        self.0.iter().for_each(|entry| entry.backend.pause());
    }

    /// Waits until all volumes are claimed by this machine, before it moves. Blocking.
    pub(super) fn wait_claimed(&self) -> Result<(), String> {
        let mut all = self.0.iter();
        all.try_for_each(|entry| entry.backend.wait_claimed(CLAIM_PATIENCE))
    }

    /// Blocks of a volume that are not known to be in a segment.
    pub(super) fn uncommitted(&self, number: u32) -> Vec<(u64, Range<u64>)> {
        let entry = self.0.iter().find(|entry| entry.number == number);
        entry.map_or_else(Vec::new, |entry| entry.backend.uncommitted())
    }

    /// The backends of all volumes, for a checkpoint.
    pub(super) fn all(&self) -> Vec<VolumeBackend> {
        self.0.iter().map(|entry| entry.backend.clone()).collect()
    }

    /// Commits all that the machine wrote before its end. Blocking.
    pub(super) fn finish(&self) {
        self.0.iter().for_each(|entry| entry.backend.finish());
    }

    /// Deletes the snapshots of deleted checkpoints. Blocking.
    pub(super) fn forget_checkpoints(&self, machine: &MachineName, gone: &[CheckpointId]) {
        let names = gone
            .iter()
            .map(|id| keel_machine::checkpoint::snapshot_name(machine, id));
        let names = names.collect::<Vec<_>>();
        for entry in &self.0 {
            if let Err(error) = entry.backend.delete_snapshots(&names) {
                tracing::warn!(%error, "cannot delete snapshots of deleted checkpoints");
            }
        }
    }
}
