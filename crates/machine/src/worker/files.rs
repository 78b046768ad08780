//! What users do with files in volumes, a piece at a time.

use super::control::{FileDone, FileOp};
use keel_wasi::Files;

/// Does it in one of a machine's volumes; paths are relative to that.
///
/// # Errors
/// The file system's.
pub fn act(files: &Files, op: FileOp) -> std::io::Result<FileDone> {
    match op {
        FileOp::Stat { path } => files.stat(&path).map(FileDone::Stat),
        FileOp::Read {
            path,
            offset,
            bytes_max,
        } => files
            .read_at(&path, offset, bytes_max as usize)
            .map(FileDone::Bytes),
        FileOp::Write {
            path,
            offset,
            bytes,
            begin,
        } => files
            .write_at(&path, offset, &bytes, begin)
            .map(|()| FileDone::Nothing),
        FileOp::Rename { from, to } => files.rename(&from, &to).map(|()| FileDone::Nothing),
        FileOp::Remove { path } => files.remove(&path).map(|()| FileDone::Nothing),
    }
}

/// Lets blocks come that a write needs, as far as they can: what holds others up
/// while it is written must not wait for them then.
pub(super) fn fetch_for(files: &Files, op: &FileOp) {
    if let FileOp::Write {
        path,
        offset,
        bytes,
        begin: false,
    } = op
        && let Err(error) = files.read_at(path, *offset, bytes.len())
    {
        tracing::debug!(%error, path, "what is written over is not here");
    }
}
