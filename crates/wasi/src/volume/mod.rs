//! Volumes of our own: file systems that a machine takes along.
//!
//! Names, sizes and links are plain data in memory and travel in the snapshot;
//! each file's bytes are a sparse file on the host, named by its inode number in
//! a folder that the volume was given. The guest reaches them through this
//! module only, so every write is noticed: [`Tracker`]s know which blocks are
//! new, for moves and checkpoints.
//!
//! | file | what it holds |
//! |---|---|
//! | `tree.rs` | names, directories, links; how paths are resolved |
//! | `content.rs` | a file's bytes, and the quota |
//! | `blocks.rs` | sets of blocks |
//! | `track.rs` | what was written since the last look |
//! | `transfer.rs` | reading blocks here, writing them in another folder |
//! | `record.rs` | a volume as plain data, checked when it is read |
//! | `stall.rs` | guests that wait for room on the host's disk |
//! | `backing.rs` | bytes that are kept elsewhere, and fetched when they are read |
//!
//! A volume is full for its guest (`nospc`) when its quota is used up, in bytes
//! or in files. That the *host's* disk is full is none of the guest's business:
//! the write waits, and is repeated when there is room. So it is with a volume
//! that has a [`Backing`] which does not answer.

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

use crate::directory::Entry;
use crate::locked;
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

/// How large a volume may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeLimits {
    /// Bytes of files, counted in blocks of 64 KiB (the last one of a file in
    /// 4 KiB). Zeros that were never written do not count.
    pub bytes_max: u64,
    pub inodes_max: u64,
}

impl VolumeLimits {
    /// Files per volume, at the least and at the most.
    const INODES_MIN: u64 = 1 << 10;
    /// All their names lie in memory.
    pub const INODES_MAX: u64 = 1 << 18;

    /// As many files as a volume of so many bytes usually has: one for 16 KiB,
    /// at least 1024, at most 262,144.
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
    /// Read-held over each change; never while anything is waited for.
    change_lock: RwLock<()>,
    /// Changes so far, and what may have been one.
    changes: AtomicU64,
}

/// What an open file or directory holds on to; dropping it closes.
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
    /// A volume without files, whose bytes go into `folder`, which is made and
    /// must be empty. Guests that wait for room are told to `stalls`.
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

    /// Notes changes from now on; what is there counts as changed.
    pub fn track(&self) -> Tracker {
        // In this order: what is written meanwhile is noted twice, not never.
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

    /// As [`Self::track`], but only what changes from now on counts.
    pub fn track_changes(&self) -> Tracker {
        self.trackers.add()
    }

    /// Who keeps its bytes, if they are kept elsewhere.
    pub fn backing(&self) -> Option<&Arc<dyn Backing>> {
        self.backing.as_ref()
    }

    /// Does something while nothing in the volume changes. It must not wait for
    /// anything but the host's disk, and not change the volume.
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

    /// A number that is another one after each change.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Puts a block that was fetched into the folder, unless it was overwritten or
    /// cut away meanwhile. `bytes` are at most [`BLOCK_BYTES`]; what is missing at
    /// the end is zeros.
    ///
    /// # Errors
    /// The host's.
    pub fn fill(&self, inode: u64, block: u64, bytes: &[u8]) -> io::Result<()> {
        match self.content(inode) {
            Some(content) => content.fill(block, bytes),
            None => Ok(()),
        }
    }

    /// Blocks of these that are not in the folder.
    pub fn absent(&self, inode: u64, blocks: Range<u64>) -> Vec<u64> {
        let Some(content) = self.content(inode) else {
            return Vec::new();
        };
        let state = content.state();
        blocks
            .filter(|block| state.remote.contains(*block))
            .collect()
    }

    /// A file's content; `None` for anything else, or if it is gone.
    pub(crate) fn content(&self, inode: u64) -> Option<Arc<Content>> {
        match &self.tree().node(inode).ok()?.body {
            Body::File(content) => Some(content.clone()),
            Body::Directory { .. } | Body::Link { .. } => None,
        }
    }

    /// Removes a node that nothing needs any more; the tree's lock is not held
    /// while the disk works.
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
            // Only one that was put in from outside.
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
        // As `cap-std`: of a single name what is behind it does not count.
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

/// What `ls` shows as the size of a directory.
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
        // The preopen's number is filled in by whoever knows it.
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

    /// Asks for blocks that a read or write found absent.
    pub(crate) fn fetch(&self, blocks: Range<u64>) -> Option<Pending> {
        let backing = self.volume.backing.as_ref()?;
        Some(backing.fetch(&self.volume, self.inode, blocks))
    }

    /// Writes some bytes at an offset, or at the end; where and how many.
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
            // Whole blocks are kept elsewhere: this one has other bytes now.
            if volume.backing.is_some() && !from.is_multiple_of(BLOCK_BYTES) {
                volume.trackers.written(inode, from - 1..from);
            }
        };
        self.file()?.set_size(size, &volume.quota, now, &cut)
    }

    /// Pushes written bytes to the host's disk; of a volume that is kept elsewhere
    /// nothing is on it that must stay.
    pub(crate) fn sync(&self, data_only: bool) -> Result<()> {
        match self.volume.backing {
            Some(_) => self.file().map(drop),
            None => self.file()?.sync(data_only),
        }
    }

    /// Asks for all that was written to be made safe, where that is not the disk's
    /// business.
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
        // Between the two somebody may have opened it again; it is then opened
        // on the host again, too.
        if let Some(content) = &self.content {
            content.close();
        }
        self.volume.drop_unused(self.inode);
    }
}
