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

use rustix::fs::Advice;
use std::ffi::OsStr;
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tokio::process::{Child, Command};

/// Bytes that are read ahead at a time: Linux may read no more than a disk's readahead for each request.
const READ_AHEAD: usize = 128 << 10;

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

/// Starts a process. The thread that does it waits until that runs its program: none of the runtime.
///
/// # Errors
/// The kernel's.
pub(crate) async fn spawn(mut command: Command) -> std::io::Result<Child> {
    let spawned = tokio::task::spawn_blocking(move || command.spawn()).await;
    spawned.map_err(std::io::Error::other).flatten()
}

/// Has the kernel read this process's image, so that the first use of some of its code seldom waits for a
/// disk. The kernel may take pages back that were never used. Blocks.
pub(crate) fn read_own_image_ahead() {
    let read = || {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let file = std::fs::File::open(own_image())?;
        for (offset, length) in parts_of(&maps, file.metadata()?.ino()) {
            for at in (offset..offset + length).step_by(READ_AHEAD) {
                let bytes = NonZeroU64::new(READ_AHEAD as u64);
                rustix::fs::fadvise(&file, at, bytes, Advice::WillNeed)?;
            }
        }
        std::io::Result::Ok(())
    };
    if let Err(error) = read() {
        tracing::debug!(%error, "cannot read the program ahead");
    }
}

/// Offsets and lengths of the parts of a file that are mapped, from the content of `/proc/PID/maps`
/// (proc_pid_maps(5)) and the number of its inode.
fn parts_of(maps: &str, inode: u64) -> Vec<(u64, u64)> {
    let part = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (begin, end) = words.next()?.split_once('-')?;
        let offset = words.nth(1)?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let of: u64 = words.nth(1)?.parse().ok()?;
        let length = number(end)?.checked_sub(number(begin)?)?;
        (of == inode).then_some((number(offset)?, length))
    };
    maps.lines().filter_map(part).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_program_are_found() {
        let maps = "\
55d0c8000000-55d0c8a00000 r--p 00000000 fe:00 4711                       /usr/bin/keel (deleted)
55d0c8a00000-55d0cc000000 r-xp 00a00000 fe:00 4711                       /usr/bin/keel (deleted)
7f1200000000-7f1200021000 rw-p 00000000 00:00 0
7f1210000000-7f1210028000 r--p 00000000 fe:00 12                         /usr/lib/libc.so.6
";
        let parts = parts_of(maps, 4711);
        assert_eq!(parts, [(0, 0xa0_0000), (0xa0_0000, 0x360_0000)]);
    }
}
