//! Snapshots of cluster volumes for a checkpoint that is not there yet. What makes
//! it one is `checkpoint`'s business.

use super::backend::VolumeBackend;

/// Deletes the snapshots of a checkpoint when it is dropped, unless that was made:
/// without it nobody would ever ask for them, and they keep chunks that nobody needs.
#[derive(Debug)]
#[must_use]
pub struct UnfinishedSnapshots {
    keepers: Vec<VolumeBackend>,
    name: String,
}

impl UnfinishedSnapshots {
    /// Of these volumes, by the name that they all have.
    pub fn new(keepers: Vec<VolumeBackend>, name: String) -> Self {
        UnfinishedSnapshots { keepers, name }
    }

    /// From now on the checkpoint may be there: they stay.
    pub fn done(mut self) {
        self.keepers.clear();
    }
}

impl Drop for UnfinishedSnapshots {
    /// Blocking.
    fn drop(&mut self) {
        for keeper in &self.keepers {
            if let Err(error) = keeper.delete_snapshots(std::slice::from_ref(&self.name)) {
                tracing::warn!(%error, self.name, "the snapshot of a failed checkpoint stays");
            }
        }
    }
}
