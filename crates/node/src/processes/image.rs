//! The executable that a process of this node is started from.
//!
//! A package upgrade, or a build, replaces the file that a running process was started from. Two
//! rules follow:
//!
//! - A worker is started from its agent's own image, which the kernel keeps as long
//!   as the agent runs, whatever becomes of the file: the protocol between the two
//!   is of one version, and a missing file does not stop machines from starting.
//! - An agent is started from the file that is installed *now*, so that ending the
//!   agent is all that an upgrade takes. Where that file is missing, or cannot be
//!   executed (the upgrade is under way), the parent's own image is used instead.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What the kernel appends to the path of an executable that was deleted.
const DELETED: &[u8] = b" (deleted)";

/// The image of the calling process: a link that the kernel resolves after the fork to the running
/// file itself, even if its path names another file or none.
pub fn own_image() -> &'static Path {
    Path::new("/proc/self/exe")
}

/// [`own_image`] of this process under a path that other processes of this user can execute too;
/// valid while this process runs.
pub fn own_image_for_others() -> PathBuf {
    format!("/proc/{}/exe", std::process::id()).into()
}

/// The path that this process was started from. The file may be another version by now, or
/// missing.
///
/// # Errors
/// If the kernel does not provide it (no `/proc`).
pub fn installed() -> std::io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let bytes = path.as_os_str().as_bytes();
    Ok(match bytes.strip_suffix(DELETED) {
        Some(stripped) if !path.exists() => OsStr::from_bytes(stripped).into(),
        _ => path,
    })
}
