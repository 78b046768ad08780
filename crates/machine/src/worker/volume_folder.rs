//! Where a worker stores its machine's own volumes: the bytes of volume `N` of the spec are
//! in `volumes/N` of the worker's folder.

use std::path::{Path, PathBuf};

/// Disk space that is not given to volumes.
const SPARE_BYTES: u64 = 256 << 20;

/// Where a worker stores its machine's volumes.
pub fn folder(worker: &Path) -> PathBuf {
    worker.join("volumes")
}

/// Bytes available in a folder's file system.
///
/// # Errors
/// That of the host.
pub fn free_bytes(folder: &Path) -> std::io::Result<u64> {
    let found = rustix::fs::statvfs(folder)?;
    Ok((found.f_bavail.saturating_mul(found.f_frsize)).saturating_sub(SPARE_BYTES))
}

/// Removes the bytes of a machine that ended, if there are any.
pub fn remove(worker: &Path) {
    match std::fs::remove_dir_all(folder(worker)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, folder = %worker.display(), "cannot remove volumes");
        }
        _ => {}
    }
}

/// The message for a node with too little disk space.
pub fn no_room(wanted: u64, free: u64, folder: &Path) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    format!(
        "its volumes and its own disk need {:.2} GiB, {:.2} GiB are free in {}",
        gib(wanted),
        gib(free),
        folder.display()
    )
}
