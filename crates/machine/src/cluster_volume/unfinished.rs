//! Snapshots of cluster volumes for a checkpoint in progress, which `checkpoint`
//! completes.

use super::backend::VolumeBackend;

/// Deletes the snapshots of a checkpoint when dropped, unless the checkpoint was
/// completed: otherwise they would stay for ever and keep chunks that are not needed.
#[derive(Debug)]
#[must_use]
pub struct UnfinishedSnapshots {
    backends: Vec<VolumeBackend>,
    name: String,
}

impl UnfinishedSnapshots {
    /// For these volumes, whose snapshots have the same name.
    pub fn new(backends: Vec<VolumeBackend>, name: String) -> Self {
        UnfinishedSnapshots { backends, name }
    }

    /// The checkpoint may exist from now on: the snapshots stay.
    pub fn done(mut self) {
        self.backends.clear();
    }
}

impl Drop for UnfinishedSnapshots {
    /// Blocking.
    fn drop(&mut self) {
        for backend in &self.backends {
            if let Err(error) = backend.delete_snapshots(std::slice::from_ref(&self.name)) {
                tracing::warn!(%error, self.name, "cannot delete the snapshot of a failed checkpoint");
            }
        }
    }
}
