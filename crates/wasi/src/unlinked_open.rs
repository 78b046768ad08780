//! Files and directories that a guest removed while it has them open.
//!
//! The next host of the machine must be able to reopen them, so they are not removed but renamed
//! within their directory to `.keel-unlinked-MACHINE-N`, a name that is invisible and inaccessible
//! to guests, and are removed when the last descriptor is closed.
//!
//! The kernel reports the present path of an open file (`/proc/self/fd`), which follows every
//! rename of the file and of its parent directories.
//!
//! `namespace` is held shared over "open and insert into the table" and over "remove from the table
//! and clean up", exclusively over removing and renaming: so no file is removed between its opening
//! and its insertion into the table.

use crate::abi::{Result, types};
use crate::descriptor::{Data, Descriptor, FileId, Kind, Place};
use crate::directory::entries;
use crate::lock::locked;
use crate::root::{Root, RootPlace};
use crate::state::Wasi;
use cap_std::fs::Dir;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::fs::RenameFlags;
use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use types::Errno;

/// Prefix of all hidden names of all machines.
pub(crate) const PREFIX: &str = ".keel-unlinked-";

/// Whether a directory entry is hidden from guests.
pub(crate) fn is_hidden_name(name: &[u8]) -> bool {
    name.starts_with(PREFIX.as_bytes())
}

/// Whether a path contains a hidden name.
pub(crate) fn names_hidden(path: &str) -> bool {
    path.split('/').any(|part| is_hidden_name(part.as_bytes()))
}

/// Open and hidden files.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    namespace: RwLock<()>,
    /// Number of descriptors per open file.
    counts: Mutex<HashMap<FileId, u32>>,
    /// Names hidden by this machine, without directories.
    names: Mutex<HashSet<String>>,
    machine: u64,
    next: AtomicU64,
}

impl OpenFiles {
    pub(crate) fn new(machine: u64, next: u64) -> Self {
        Self {
            namespace: RwLock::new(()),
            counts: Mutex::default(),
            names: Mutex::default(),
            machine,
            next: AtomicU64::new(next),
        }
    }

    pub(crate) fn shared(&self) -> RwLockReadGuard<'_, ()> {
        self.namespace
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.namespace
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn machine(&self) -> u64 {
        self.machine
    }

    pub(crate) fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    pub(crate) fn opened(&self, id: FileId) {
        let mut counts = locked(&self.counts);
        let count = counts.entry(id).or_insert(0);
        *count = count.saturating_add(1);
    }

    fn closed(&self, id: FileId) {
        let mut counts = locked(&self.counts);
        if let Some(count) = counts.get_mut(&id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&id);
            }
        }
    }

    pub(crate) fn is_open(&self, id: FileId) -> bool {
        locked(&self.counts).contains_key(&id)
    }

    /// Registers a hidden name, if it belongs to this machine.
    pub(crate) fn register_hidden(&self, path: &str) {
        let name = path.rsplit('/').next().unwrap_or(path);
        if name.starts_with(&format!("{PREFIX}{:016x}-", self.machine)) {
            locked(&self.names).insert(name.to_owned());
        }
    }

    fn new_name(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{PREFIX}{:016x}-{number}", self.machine)
    }

    /// The hidden path of an open file; `None` if it is not hidden.
    fn hidden_path(&self, descriptor: &Descriptor) -> Option<PathBuf> {
        let names = locked(&self.names);
        if names.is_empty() {
            return None;
        }
        let path = host_path(file_fd(descriptor)?).ok()?;
        let name = path.file_name()?.to_str()?;
        names.contains(name).then_some(path)
    }

    /// Whether the guest has removed the file that `descriptor` has open.
    pub(crate) fn is_hidden(&self, descriptor: &Descriptor) -> bool {
        self.hidden_path(descriptor).is_some()
    }
}

/// The host descriptor of a host's file or directory.
pub(crate) fn file_fd(descriptor: &Descriptor) -> Option<BorrowedFd<'_>> {
    match &descriptor.kind {
        Kind::File(file) => match &file.data {
            Data::Host { file, .. } => Some(file.as_fd()),
            Data::Volume(_) => None,
        },
        Kind::Directory(directory) => match &directory.place {
            Place::Host { dir, .. } => Some(dir.as_fd()),
            Place::Volume(_) => None,
        },
        Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::Listener(_) | Kind::Connection(_) => None,
    }
}

fn host_path(fd: BorrowedFd<'_>) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// The location of an open file: the preopen and the path under it (empty for the preopen's own
/// directory). `prefer` is tried first.
///
/// # Errors
/// `NotFound` with the path on this host if it is under none of `roots`.
pub(crate) fn locate(
    roots: &[Root],
    fd: BorrowedFd<'_>,
    id: FileId,
    prefer: u32,
) -> io::Result<(u32, PathBuf)> {
    let path = host_path(fd)?;
    let first = roots.iter().enumerate().skip(prefer as usize).take(1);
    for (index, root) in first.chain(roots.iter().enumerate()) {
        let RootPlace::Host { dir, .. } = &root.place else {
            continue;
        };
        let Ok(below) = path.strip_prefix(host_path(dir.as_fd())?) else {
            continue;
        };
        let found = if below.as_os_str().is_empty() {
            dir.dir_metadata()
        } else {
            dir.symlink_metadata(below)
        };
        if found.is_ok_and(|metadata| FileId::of_path(&metadata) == id) {
            let index = u32::try_from(index).map_err(io::Error::other)?;
            return Ok((index, below.to_owned()));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        path.display().to_string(),
    ))
}

/// Splits a path into directory and last name, without trailing slashes; `None` if the last
/// component is not a name.
fn parent_and_name(path: &str) -> Option<(&str, &str)> {
    let path = path.trim_end_matches('/');
    let (parent, name) = match path.rfind('/') {
        Some(at) => (path[..at].trim_end_matches('/'), &path[at + 1..]),
        None => (".", path),
    };
    let absolute = parent.is_empty();
    (!absolute && !matches!(name, "" | "." | "..")).then_some((parent, name))
}

impl Wasi {
    /// `unlink` of anything but a directory.
    pub(crate) fn remove_file(&self, at: &Dir, path: &str) -> Result<()> {
        let _namespace = self.files.exclusive();
        let keep = || -> Option<FileId> {
            if path.ends_with('/') {
                return None;
            }
            let metadata = at.symlink_metadata(path).ok()?;
            let id = FileId::of_path(&metadata);
            (!metadata.is_dir() && self.files.is_open(id)).then_some(id)
        };
        let (Some(id), Some((parent, name))) = (keep(), parent_and_name(path)) else {
            return Ok(at.remove_file(path)?);
        };
        let parent = at.open_dir(parent)?;
        let hidden = self.files.new_name();
        parent.rename(name, &parent, &hidden)?;
        self.keep_or_remove(&parent, &hidden, id)
    }

    /// `rmdir`.
    pub(crate) fn remove_directory(&self, at: &Dir, path: &str) -> Result<()> {
        let _namespace = self.files.exclusive();
        let Some((parent, name)) = parent_and_name(path) else {
            return Ok(at.remove_dir(path)?);
        };
        let parent = at.open_dir(parent)?;
        // Not of the path: a trailing slash would follow a link.
        let metadata = parent.symlink_metadata(name)?;
        let id = FileId::of_path(&metadata);
        if metadata.is_dir() && self.files.is_open(id) {
            self.move_hidden_up(&parent, name)?;
            let hidden = self.files.new_name();
            parent.rename(name, &parent, &hidden)?;
            return self.keep_or_remove(&parent, &hidden, id);
        }
        match parent.remove_dir(name) {
            Err(error) if error.raw_os_error() == Some(NOTEMPTY) => {
                self.move_hidden_up(&parent, name)?;
                Ok(parent.remove_dir(name)?)
            }
            other => Ok(other?),
        }
    }

    /// `rename`; an open file at the new path is kept.
    pub(crate) fn rename(
        &self,
        source: &Dir,
        source_path: &str,
        target: &Dir,
        target_path: &str,
    ) -> Result<()> {
        let _namespace = self.files.exclusive();
        let plain = || source.rename(source_path, target, target_path);
        let (Some((source_parent, source_name)), Some((target_parent, target_name))) =
            (parent_and_name(source_path), parent_and_name(target_path))
        else {
            return Ok(plain()?);
        };
        let source_dir = source.open_dir(source_parent)?;
        let target_dir = target.open_dir(target_parent)?;
        let Ok(moved) = source_dir.symlink_metadata(source_name) else {
            return Ok(plain()?);
        };
        // cap-std ignores a trailing slash of the target.
        let slashes = source_path.ends_with('/') || target_path.ends_with('/');
        if slashes && !moved.is_dir() {
            return Err(Errno::Notdir.into());
        }
        let Ok(victim) = target_dir.symlink_metadata(target_name) else {
            return Ok(plain()?);
        };
        let id = FileId::of_path(&victim);
        if !self.files.is_open(id)
            || id == FileId::of_path(&moved)
            || moved.is_dir() != victim.is_dir()
        {
            return Ok(plain()?);
        }
        if victim.is_dir() {
            self.move_hidden_up(&target_dir, target_name)?;
        }
        let hidden = self.files.new_name();
        replace(&source_dir, source_name, &target_dir, target_name, &hidden)?;
        self.keep_or_remove(&target_dir, &hidden, id)
    }

    /// Keeps a hidden file if a descriptor has it open by that name (and not by another hard link),
    /// else removes it.
    fn keep_or_remove(&self, parent: &Dir, hidden: &str, id: FileId) -> Result<()> {
        let open = locked(&self.table)
            .iter()
            .filter(|(_, descriptor)| descriptor.file_id() == Some(id))
            .map(|(_, descriptor)| descriptor.clone())
            .collect::<Vec<_>>();
        locked(&self.files.names).insert(hidden.to_owned());
        let here = |descriptor: &std::sync::Arc<Descriptor>| {
            let path = self.files.hidden_path(descriptor);
            path.is_some_and(|path| path.ends_with(hidden))
        };
        if open.iter().any(here) {
            return Ok(());
        }
        locked(&self.files.names).remove(hidden);
        if parent.symlink_metadata(hidden)?.is_dir() {
            parent.remove_dir(hidden)?;
        } else {
            parent.remove_file(hidden)?;
        }
        Ok(())
    }

    /// Moves this machine's hidden files in a directory up to its parent.
    ///
    /// # Errors
    /// `notempty` if anything else is in it.
    fn move_hidden_up(&self, parent: &Dir, name: &str) -> Result<()> {
        let dir = parent.open_dir(name)?;
        let mut moved = Vec::new();
        for entry in entries(&dir)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let name = str::from_utf8(name).map_err(|_| Errno::Notempty)?;
            if !locked(&self.files.names).contains(name) {
                return Err(Errno::Notempty.into());
            }
            moved.push(name.to_owned());
        }
        for name in moved {
            // Names are unique in the machine, so it is free in the parent.
            dir.rename(&name, parent, &name)?;
        }
        Ok(())
    }

    /// Releases a descriptor that was removed from the table under `files.shared()`, and removes
    /// its file if it was the last one of a hidden file.
    pub(crate) fn release(&self, descriptor: &Descriptor) {
        if let Kind::Connection(open) = &descriptor.kind {
            open.connection.close();
        }
        let Some(id) = descriptor.file_id() else {
            return;
        };
        self.files.closed(id);
        let Some(path) = self.files.hidden_path(descriptor) else {
            return;
        };
        let others = locked(&self.table)
            .iter()
            .filter(|(_, other)| other.file_id() == Some(id))
            .map(|(_, other)| other.clone())
            .collect::<Vec<_>>();
        let same = |other: &std::sync::Arc<Descriptor>| {
            self.files.hidden_path(other).as_deref() == Some(&*path)
        };
        if others.iter().any(same) {
            return;
        }
        if let Err(error) = self.remove_hidden(descriptor, id, &path) {
            tracing::warn!(path = %path.display(), %error, "hidden file not removed");
        }
    }

    fn remove_hidden(&self, descriptor: &Descriptor, id: FileId, path: &Path) -> io::Result<()> {
        let Some(fd) = file_fd(descriptor) else {
            return Ok(());
        };
        let removed = match locate(&self.roots, fd, id, 0) {
            Ok((root, below)) => {
                let RootPlace::Host { dir: root, .. } = &self.roots[root as usize].place else {
                    return Ok(());
                };
                if matches!(descriptor.kind, Kind::Directory(_)) {
                    root.remove_dir(&below)
                } else {
                    root.remove_file(&below)
                }
            }
            // Another thread was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            locked(&self.files.names).remove(name);
        }
        removed
    }
}

const NOTEMPTY: i32 = rustix::io::Errno::NOTEMPTY.raw_os_error();

/// Replaces `target`, which becomes `hidden`, by `source`. With an exchange `target` always exists;
/// a file system without exchange has a moment without it, invisible to guests.
fn replace(
    source_dir: &Dir,
    source: &str,
    target_dir: &Dir,
    target: &str,
    hidden: &str,
) -> io::Result<()> {
    let exchange = rustix::fs::renameat_with(
        source_dir,
        source,
        target_dir,
        target,
        RenameFlags::EXCHANGE,
    );
    if exchange.is_ok() {
        return source_dir.rename(source, target_dir, hidden);
    }
    target_dir.rename(target, target_dir, hidden)?;
    let renamed = source_dir.rename(source, target_dir, target);
    if renamed.is_err() {
        target_dir.rename(hidden, target_dir, target)?;
    }
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents() {
        assert_eq!(parent_and_name("a"), Some((".", "a")));
        assert_eq!(parent_and_name("a/b//"), Some(("a", "b")));
        assert_eq!(parent_and_name("../b"), Some(("..", "b")));
        for none in ["", ".", "a/..", "/", "/a", "a/."] {
            assert_eq!(parent_and_name(none), None, "{none}");
        }
    }

    #[test]
    fn hidden_names() {
        assert!(names_hidden("a/.keel-unlinked-0-1/b"));
        assert!(!names_hidden("a/x.keel-unlinked-0-1"));
    }
}
