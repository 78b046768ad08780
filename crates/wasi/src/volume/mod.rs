//! Volumes: file systems that move with their machine.
//!
//! Names, sizes and links are plain data in memory and part of the snapshot; each file's bytes are
//! a sparse file on the host, named by its inode number in the volume's folder. The guest accesses
//! them through this module only, so every write is tracked: [`Tracker`]s know the new blocks, for
//! moves and checkpoints.
//!
//! | file | what it holds |
//! |---|---|
//! | `tree.rs` | names, directories, links; path resolution |
//! | `content.rs` | a file's bytes, and the quota |
//! | `blocks.rs` | sets of blocks |
//! | `change_tracking.rs` | tracking of changes |
//! | `transfer.rs` | reading blocks, and writing them into another folder |
//! | `record.rs` | a volume as plain data, with validation |
//! | `stall.rs` | guests that wait for room on the host's disk |
//! | `backing.rs` | remote storage of bytes, fetched on demand |
//!
//! A volume is full for its guest (`nospc`) when its quota is used up, in bytes or in files. A full
//! disk of the *host* is invisible to the guest: the write waits, and is repeated when there is
//! space. The same applies to a [`Backing`] that does not respond.

mod backing;
mod blocks;
mod change_tracking;
mod content;
mod record;
mod stall;
mod transfer;
mod tree;

pub use backing::{Backed, Backing, Fault, LocalBlocks, Pending, Promise};
pub use blocks::BLOCK_BYTES;
pub use change_tracking::{Changes, Tracker};
pub use record::{NodeBody, NodeRecord, VolumeRecord};
pub use stall::{RETRY_AFTER, Stalls, is_disk_full};
pub use transfer::{BlockReader, BlockWriter};

use crate::listing::Entry;
use crate::lock::locked;
use change_tracking::Trackers;
use content::{Content, Quota, State};
use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use tree::{Body, Final, LINK_BYTES_MAX, Last, Times, Tree, Walked};

pub(crate) use backing::wait_done;
pub(crate) use tree::ROOT;

pub(crate) use content::WriteFault;

use crate::abi::types::{Filestat, Filetype};

/// Quota of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeLimits {
    /// Bytes of files, in blocks of 64 KiB (the last one of a file in units of 4 KiB). Zeros that
    /// were never written do not count.
    pub bytes_max: u64,
    pub inodes_max: u64,
}

impl VolumeLimits {
    /// Files per volume, at the least and at the most.
    const INODES_MIN: u64 = 1 << 10;
    /// All names are held in memory.
    pub const INODES_MAX: u64 = 1 << 18;

    /// The usual number of files for a volume of this size: one per 16 KiB, at least 1024, at most
    /// 262,144.
    pub fn of_bytes(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            inodes_max: (bytes_max >> 14).clamp(Self::INODES_MIN, Self::INODES_MAX),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that count against [`VolumeLimits::bytes_max`].
    pub bytes: u64,
    pub inodes: u64,
}

/// A file system of our own.
#[derive(Debug)]
pub struct Volume {
    folder: PathBuf,
    quota: Quota,
    tree: Mutex<Tree>,
    trackers: Trackers,
    stalls: Arc<Stalls>,
    backing: Option<Arc<dyn Backing>>,
    /// Read-locked during each change; never while waiting.
    change_lock: RwLock<()>,
    /// Counter of changes and possible changes.
    changes: AtomicU64,
}

/// Handle of an open file or directory; dropping it closes.
#[derive(Debug)]
pub(crate) struct OpenNode {
    pub(crate) volume: Arc<Volume>,
    pub(crate) inode: u64,
    /// `None` for a directory.
    content: Option<Arc<Content>>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenMode {
    pub(crate) follow: bool,
    pub(crate) write: bool,
    pub(crate) create: bool,
    pub(crate) exclusive: bool,
    pub(crate) truncate: bool,
}

type Result<T> = std::result::Result<T, Errno>;

impl Volume {
    /// Creates an empty volume whose bytes are stored in `folder`, which is created and must be
    /// empty. Guests that wait for space are reported to `stalls`.
    ///
    /// # Errors
    /// If the folder cannot be used.
    pub fn new(
        folder: &Path,
        limits: VolumeLimits,
        stalls: Arc<Stalls>,
        now_ns: u64,
    ) -> io::Result<Arc<Self>> {
        std::fs::create_dir_all(folder)?;
        if std::fs::read_dir(folder)?.next().is_some() {
            return Err(io::Error::other("the volume's folder is not empty"));
        }
        Ok(Arc::new(Self {
            folder: folder.to_owned(),
            quota: Quota::new(limits.bytes_max, 0),
            tree: Mutex::new(Tree::new(limits.inodes_max, now_ns)),
            trackers: Trackers::new(ROOT + 1),
            stalls,
            backing: None,
            change_lock: RwLock::default(),
            changes: AtomicU64::new(0),
        }))
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        locked(&self.tree)
    }

    pub fn usage(&self) -> Usage {
        Usage {
            bytes: self.quota.used(),
            inodes: self.tree().inodes(),
        }
    }

    pub fn limits(&self) -> VolumeLimits {
        VolumeLimits {
            bytes_max: self.quota.bytes_max,
            inodes_max: self.tree().inodes_max,
        }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn stalls(&self) -> &Arc<Stalls> {
        &self.stalls
    }

    /// Starts tracking; existing data counts as changed.
    pub fn track(&self) -> Tracker {
        // In this order, a concurrent write is recorded twice rather than never.
        let tracker = self.trackers.add();
        for (inode, node) in self.tree().nodes() {
            if let Body::File(content) = &node.body {
                let state = content.state();
                for run in state.present.runs() {
                    tracker.seed(inode, run.start * BLOCK_BYTES..run.end * BLOCK_BYTES);
                }
            }
        }
        tracker
    }

    /// As [`Self::track`], but existing data does not count.
    pub fn track_changes(&self) -> Tracker {
        self.trackers.add()
    }

    /// Its backend, if its bytes are stored remotely.
    pub fn backing(&self) -> Option<&Arc<dyn Backing>> {
        self.backing.as_ref()
    }

    /// Runs `work` while no change is possible. It must not wait for anything but the host's disk,
    /// and must not change the volume.
    pub fn block_changes<T>(&self, work: impl FnOnce() -> T) -> T {
        let _guard = self
            .change_lock
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        work()
    }

    fn changing(&self) -> RwLockReadGuard<'_, ()> {
        let guard = self
            .change_lock
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        self.changes.fetch_add(1, Ordering::Relaxed);
        guard
    }

    /// A counter that differs after each change.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Stores a fetched block in the folder, unless it was overwritten or truncated meanwhile.
    /// `bytes` are at most [`BLOCK_BYTES`]; missing bytes at the end are zeros.
    ///
    /// # Errors
    /// The host's.
    pub fn fill(&self, inode: u64, block: u64, bytes: &[u8]) -> io::Result<()> {
        match self.content(inode) {
            Some(content) => content.fill(block, bytes),
            None => Ok(()),
        }
    }

    /// The blocks in this range that are not in the folder.
    pub fn absent(&self, inode: u64, blocks: Range<u64>) -> Vec<u64> {
        let Some(content) = self.content(inode) else {
            return Vec::new();
        };
        let state = content.state();
        blocks
            .filter(|block| state.remote.contains(*block))
            .collect()
    }

    /// A file's content; `None` for other nodes and removed ones.
    pub(crate) fn content(&self, inode: u64) -> Option<Arc<Content>> {
        match &self.tree().node(inode).ok()?.body {
            Body::File(content) => Some(content.clone()),
            Body::Directory { .. } | Body::Link { .. } => None,
        }
    }

    /// Removes an unreferenced node; the tree's lock is not held during disk operations.
    fn drop_unused(&self, inode: u64) {
        let content = self.tree().drop_unused(inode);
        let Some(content) = content else { return };
        self.quota.release(content.state().cost());
        self.trackers.cut(inode, 0);
        content.close();
        match std::fs::remove_file(content.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %content.path().display(), %error, "removed file stays");
            }
            _ => {}
        }
    }

    // ── opening ─────────────────────────────────────────────────────────

    pub(crate) fn open_root(self: &Arc<Self>) -> Result<OpenNode> {
        self.open_inode(ROOT)
    }

    /// A node by its number, open.
    pub(crate) fn open_inode(self: &Arc<Self>, inode: u64) -> Result<OpenNode> {
        let mut tree = self.tree();
        self.opened(&mut tree, inode)
    }

    fn opened(self: &Arc<Self>, tree: &mut Tree, inode: u64) -> Result<OpenNode> {
        let node = tree.node_mut(inode)?;
        let content = match &node.body {
            Body::File(content) => Some(content.clone()),
            Body::Directory { .. } => None,
            Body::Link { .. } => return Err(Errno::LOOP),
        };
        node.open += 1;
        Ok(OpenNode {
            volume: self.clone(),
            inode,
            content,
        })
    }

    pub(crate) fn open(
        self: &Arc<Self>,
        start: u64,
        path: &str,
        how: OpenMode,
        now: u64,
    ) -> Result<OpenNode> {
        let last = match (how.create, how.follow && !how.exclusive) {
            (true, true) => Final::MakeFollow,
            (true, false) => Final::MakeKeep,
            (false, _) if how.follow => Final::Follow,
            (false, _) => Final::Keep,
        };
        let node = {
            let _change = self.changing();
            let mut tree = self.tree();
            let inode = match tree.walk(start, path, last)? {
                Walked::Missing { directory, name } => {
                    tree.check_new(directory, &name)?;
                    tree.check_room(0)?;
                    let inode = self.trackers.take_inode();
                    let state = State {
                        size: 0,
                        present: blocks::BlockSet::default(),
                        remote: blocks::BlockSet::default(),
                        times: Times::at(now),
                    };
                    let content = Arc::new(Content::new(&self.folder, inode, state));
                    tree.put(inode, Body::File(content));
                    tree.enter(directory, name, inode, now);
                    return self.opened(&mut tree, inode);
                }
                Walked::Found(inode) => inode,
            };
            if how.create && how.exclusive {
                return Err(Errno::EXIST);
            }
            if tree.is_directory(inode) && (how.create || how.write) {
                return Err(Errno::ISDIR);
            }
            self.opened(&mut tree, inode)?
        };
        if how.truncate && node.content.is_some() {
            match node.set_size(0, now) {
                Ok(()) => {}
                Err(WriteFault::Errno(errno)) => return Err(errno),
                // Emptying a file needs neither.
                Err(WriteFault::HostFull | WriteFault::Absent(_)) => return Err(Errno::IO),
            }
        }
        Ok(node)
    }

    // ── names ───────────────────────────────────────────────────────────

    pub(crate) fn create_directory(&self, start: u64, path: &str, now: u64) -> Result<()> {
        let _change = self.changing();
        let mut tree = self.tree();
        let (directory, last) = tree.split_trimmed(start, path)?;
        let Last::Name(name) = last else {
            return Err(Errno::EXIST);
        };
        tree.check_new(directory, &name)?;
        tree.check_room(0)?;
        let body = Body::Directory {
            parent: directory,
            entries: BTreeMap::new(),
            times: Times::at(now),
        };
        let inode = self.trackers.take_inode();
        tree.put(inode, body);
        tree.enter(directory, name, inode, now);
        Ok(())
    }

    pub(crate) fn symlink(&self, contents: &str, start: u64, path: &str, now: u64) -> Result<()> {
        if contents.starts_with('/') {
            return Err(Errno::PERM);
        }
        self.make_link(contents, start, path, now)
    }

    fn make_link(&self, contents: &str, start: u64, path: &str, now: u64) -> Result<()> {
        let _change = self.changing();
        let mut tree = self.tree();
        let (directory, last) = tree.split(start, path)?;
        if contents.contains('\0') {
            return Err(Errno::INVAL);
        }
        if contents.is_empty() {
            return Err(Errno::NOENT);
        }
        if contents.len() > LINK_BYTES_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let Last::Name(name) = last else {
            return Err(Errno::EXIST);
        };
        tree.check_new(directory, &name)?;
        tree.check_room(contents.len())?;
        let body = Body::Link {
            contents: contents.to_owned(),
            times: Times::at(now),
        };
        let inode = self.trackers.take_inode();
        tree.put(inode, body);
        tree.enter(directory, name, inode, now);
        Ok(())
    }

    pub(crate) fn read_link(&self, start: u64, path: &str) -> Result<String> {
        let tree = self.tree();
        let (directory, last) = tree.split(start, path)?;
        let Last::Name(name) = last else {
            return Err(Errno::INVAL);
        };
        let inode = tree.lookup(directory, &name)?.ok_or(Errno::NOENT)?;
        match &tree.node(inode)?.body {
            // Such a link was imported from the host.
            Body::Link { contents, .. } if contents.starts_with('/') => Err(Errno::PERM),
            Body::Link { contents, .. } => Ok(contents.clone()),
            Body::File(_) | Body::Directory { .. } => Err(Errno::INVAL),
        }
    }

    pub(crate) fn link(
        &self,
        (source_start, source): (u64, &str),
        (target_start, target): (u64, &str),
        now: u64,
    ) -> Result<()> {
        let _change = self.changing();
        let mut tree = self.tree();
        let (source_dir, source) = tree.split(source_start, source)?;
        let (target_dir, target) = tree.split(target_start, target)?;
        let inode = match source {
            Last::Dot => source_dir,
            Last::Name(name) => tree.lookup(source_dir, &name)?.ok_or(Errno::NOENT)?,
        };
        let Last::Name(name) = target else {
            return Err(Errno::EXIST);
        };
        tree.check_new(target_dir, &name)?;
        tree.check_linkable(inode)?;
        tree.enter(target_dir, name, inode, now);
        Ok(())
    }

    pub(crate) fn remove_file(&self, start: u64, path: &str, now: u64) -> Result<()> {
        let _change = self.changing();
        let removed = {
            let mut tree = self.tree();
            let (directory, last) = tree.split(start, path)?;
            let Last::Name(name) = last else {
                return Err(Errno::ISDIR);
            };
            let inode = tree.lookup(directory, &name)?.ok_or(Errno::NOENT)?;
            if tree.is_directory(inode) {
                return Err(Errno::ISDIR);
            }
            tree.leave(directory, &name, now)
        };
        removed
            .into_iter()
            .for_each(|inode| self.drop_unused(inode));
        Ok(())
    }

    pub(crate) fn remove_directory(&self, start: u64, path: &str, now: u64) -> Result<()> {
        let _change = self.changing();
        let removed = {
            let mut tree = self.tree();
            let (directory, last) = tree.split_trimmed(start, path)?;
            let Last::Name(name) = last else {
                return Err(Errno::INVAL);
            };
            let inode = tree.lookup(directory, &name)?.ok_or(Errno::NOENT)?;
            if !tree.entries(inode)?.is_empty() {
                return Err(Errno::NOTEMPTY);
            }
            tree.leave(directory, &name, now)
        };
        removed
            .into_iter()
            .for_each(|inode| self.drop_unused(inode));
        Ok(())
    }

    pub(crate) fn rename(
        &self,
        (source_start, source): (u64, &str),
        (target_start, target): (u64, &str),
        now: u64,
    ) -> Result<()> {
        let _change = self.changing();
        let replaced = {
            let mut tree = self.tree();
            let source_split = tree.split_trimmed(source_start, source)?;
            let target_split = tree.split_trimmed(target_start, target)?;
            let slashes = source.ends_with('/') || target.ends_with('/');
            tree.rename(source_split, target_split, slashes, now)?
        };
        replaced
            .into_iter()
            .for_each(|inode| self.drop_unused(inode));
        Ok(())
    }

    /// A directory's entries in order of their names, without `.` and `..`.
    pub(crate) fn list(&self, inode: u64, entries_max: usize) -> Result<Vec<Entry>> {
        let tree = self.tree();
        let entries = tree.entries(inode)?;
        if entries.len() > entries_max {
            return Err(Errno::NOMEM);
        }
        let entry = |(name, inode): (&String, &u64)| {
            Ok(Entry {
                name: name.clone(),
                inode: *inode,
                filetype: filetype(&tree.node(*inode)?.body) as u8,
            })
        };
        entries.iter().map(entry).collect()
    }

    // ── attributes ──────────────────────────────────────────────────────

    pub(crate) fn filestat_at(&self, start: u64, path: &str, follow: bool) -> Result<Filestat> {
        let tree = self.tree();
        // As in `cap-std`: a trailing slash after a single name is ignored.
        let inode = match single_name(path) {
            Some(name) if !follow => tree.lookup(start, name)?.ok_or(Errno::NOENT)?,
            _ => tree.find(start, path, follow)?,
        };
        filestat(&tree, inode)
    }

    pub(crate) fn filestat(&self, inode: u64) -> Result<Filestat> {
        filestat(&self.tree(), inode)
    }

    pub(crate) fn set_times_at(
        &self,
        start: u64,
        path: &str,
        follow: bool,
        times: &Timestamps,
        now: u64,
    ) -> Result<()> {
        let _change = self.changing();
        let mut tree = self.tree();
        let inode = if follow {
            tree.find(start, path, true)?
        } else {
            match tree.split(start, path)? {
                (directory, Last::Dot) => directory,
                (directory, Last::Name(name)) => {
                    tree.lookup(directory, &name)?.ok_or(Errno::NOENT)?
                }
            }
        };
        set_times(&mut tree, inode, times, now)
    }

    pub(crate) fn set_times(&self, inode: u64, times: &Timestamps, now: u64) -> Result<()> {
        let _change = self.changing();
        set_times(&mut self.tree(), inode, times, now)
    }
}

/// The one name that a path consists of.
fn single_name(path: &str) -> Option<&str> {
    if path.starts_with('/') || path == "." || path.starts_with("./") {
        return None;
    }
    let mut parts = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".");
    let name = parts.next().filter(|name| *name != "..")?;
    parts.next().is_none().then_some(name)
}

fn filetype(body: &Body) -> Filetype {
    match body {
        Body::File(_) => Filetype::RegularFile,
        Body::Directory { .. } => Filetype::Directory,
        Body::Link { .. } => Filetype::SymbolicLink,
    }
}

/// Reported size of a directory.
const DIRECTORY_BYTES: u64 = 4096;

fn filestat(tree: &Tree, inode: u64) -> Result<Filestat> {
    let node = tree.node(inode)?;
    let (nlink, size, times) = match &node.body {
        Body::File(content) => {
            let state = content.state();
            (node.links, state.size, state.times)
        }
        Body::Directory { times, .. } => {
            let links = match node.links {
                0 => 0,
                _ => 2 + tree.directories_in(inode),
            };
            (links, DIRECTORY_BYTES, *times)
        }
        Body::Link { contents, times } => (node.links, contents.len() as u64, *times),
    };
    Ok(Filestat {
        // The caller fills in the preopen's number.
        dev: 0,
        ino: inode,
        filetype: filetype(&node.body),
        nlink,
        size,
        atim: times.access,
        mtim: times.modification,
        ctim: times.change,
    })
}

fn set_times(tree: &mut Tree, inode: u64, wanted: &Timestamps, now: u64) -> Result<()> {
    let set = |times: &mut Times| -> Result<()> {
        for (time, wanted) in [
            (&mut times.access, wanted.last_access),
            (&mut times.modification, wanted.last_modification),
        ] {
            if let Some(wanted) = nanoseconds(wanted, now)? {
                *time = wanted;
            }
        }
        times.change = now;
        Ok(())
    };
    match &mut tree.node_mut(inode)?.body {
        Body::File(content) => set(&mut content.state().times),
        Body::Directory { times, .. } | Body::Link { times, .. } => set(times),
    }
}

/// A time to set; `None` to leave it as it is.
fn nanoseconds(time: Timespec, now: u64) -> Result<Option<u64>> {
    match time.tv_nsec {
        UTIME_OMIT => Ok(None),
        UTIME_NOW => Ok(Some(now)),
        rest => {
            let seconds = u64::try_from(time.tv_sec).ok();
            let rest = u64::try_from(rest).ok();
            let time = seconds
                .and_then(|seconds| seconds.checked_mul(1_000_000_000))
                .zip(rest)
                .and_then(|(seconds, rest)| seconds.checked_add(rest));
            time.map(Some).ok_or(Errno::OVERFLOW)
        }
    }
}

impl OpenNode {
    fn file(&self) -> Result<&Arc<Content>> {
        self.content.as_ref().ok_or(Errno::ISDIR)
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.content.is_none()
    }

    /// Whether both are in the same volume.
    pub(crate) fn is_same_volume(&self, other: &OpenNode) -> bool {
        Arc::ptr_eq(&self.volume, &other.volume)
    }

    pub(crate) fn size(&self) -> u64 {
        let content = self.content.as_ref();
        content.map_or(0, |content| content.state().size)
    }

    pub(crate) fn read_at(
        &self,
        buffer: &mut [u8],
        offset: u64,
    ) -> std::result::Result<usize, WriteFault> {
        self.file()?.read_at(buffer, offset)
    }

    /// Fetches blocks that a read or write found absent.
    pub(crate) fn fetch(&self, blocks: Range<u64>) -> Option<Pending> {
        let backing = self.volume.backing.as_ref()?;
        Some(backing.fetch(&self.volume, self.inode, blocks))
    }

    /// Writes some bytes at an offset, or at the end; returns where and how many.
    pub(crate) fn write_at(
        &self,
        bytes: &[u8],
        offset: Option<u64>,
        now: u64,
    ) -> std::result::Result<(u64, usize), WriteFault> {
        let (inode, volume) = (self.inode, &self.volume);
        let _change = volume.changing();
        let written = |bytes| volume.trackers.written(inode, bytes);
        self.file()?
            .write_at(bytes, offset, &volume.quota, now, &written)
    }

    pub(crate) fn set_size(&self, size: u64, now: u64) -> std::result::Result<(), WriteFault> {
        let (inode, volume) = (self.inode, &self.volume);
        let _change = volume.changing();
        let cut = |from: u64| {
            volume.trackers.cut(inode, from);
            // The backend stores whole blocks: this one changes as a whole.
            if volume.backing.is_some() && !from.is_multiple_of(BLOCK_BYTES) {
                volume.trackers.written(inode, from - 1..from);
            }
        };
        self.file()?.set_size(size, &volume.quota, now, &cut)
    }

    /// Flushes written bytes to the host's disk; a volume with a backend needs nothing on it.
    pub(crate) fn sync(&self, data_only: bool) -> Result<()> {
        match self.volume.backing {
            Some(_) => self.file().map(drop),
            None => self.file()?.sync(data_only),
        }
    }

    /// Requests durability of all writes, where that is the backend's task.
    pub(crate) fn make_durable(&self) -> Option<Pending> {
        self.volume.backing.as_ref().map(|backing| backing.sync())
    }
}

impl Drop for OpenNode {
    fn drop(&mut self) {
        let _change = self.volume.changing();
        let last = match self.volume.tree().node_mut(self.inode) {
            Ok(node) => {
                node.open = node.open.saturating_sub(1);
                node.open == 0
            }
            Err(_) => false,
        };
        if !last {
            return;
        }
        // It may have been opened again meanwhile; then it is also open on the host again.
        if let Some(content) = &self.content {
            content.close();
        }
        self.volume.drop_unused(self.inode);
    }
}
