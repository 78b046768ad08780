//! Operations of users on files in volumes, in pieces.

use super::control::{FileDone, FileOp};
use keel_wasi::Files;

/// Performs an operation in one of a machine's volumes; paths are relative to it.
///
/// # Errors
/// That of the file system.
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

/// Fetches the blocks that a write needs, as far as possible: the write itself holds
/// locks and must not wait for them.
pub fn prefetch_blocks(files: &Files, op: &FileOp) {
    if let FileOp::Write {
        path,
        offset,
        bytes,
        begin: false,
    } = op
        && let Err(error) = files.read_at(path, *offset, bytes.len())
    {
        tracing::debug!(%error, path, "cannot fetch a block before a write");
    }
}
