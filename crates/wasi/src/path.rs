//! `path_*`. Everything is resolved by `cap-std` within the descriptor's
//! directory; absolute paths, `..` and links out of it end in `perm`.

use crate::abi::{Result, types};
use crate::descriptor::{Data, Descriptor, Dropped, FileId, Kind, OpenDirectory, OpenFile, Place};
use crate::directory::filetype_of;
use crate::file::{filestat_of, volume_device};
use crate::lock::locked;
use crate::state::Wasi;
use crate::unlinked_open::names_hidden;
use crate::volume::{OpenMode, OpenNode};
use cap_fs_ext::{
    DirExt, FollowSymlinks, OpenOptionsFollowExt, OpenOptionsSyncExt, SystemTimeSpec,
};
use cap_std::fs::{Dir, OpenOptions};
use cap_std::time::{Duration, SystemTime};
use rustix::fs::{FileType, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use types::{Errno, Fdflags, Filestat, Lookupflags, Oflags, Rights};

/// A directory as the base of paths.
pub(crate) fn directory_of(descriptor: &Descriptor) -> Result<&OpenDirectory> {
    match &descriptor.kind {
        Kind::Directory(directory) => Ok(directory),
        Kind::Stdin
        | Kind::Stdout
        | Kind::Stderr
        | Kind::File(_)
        | Kind::Listener(_)
        | Kind::Connection(_) => Err(Errno::Badf.into()),
    }
}

/// Arguments of `path_open`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) follow: bool,
    pub(crate) oflags: Oflags,
    pub(crate) rights: Rights,
    pub(crate) fdflags: Fdflags,
}

/// Open mode on the host; a restore repeats it, hence without creating and truncating.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) sync: Fdflags,
    pub(crate) follow: bool,
}

impl Mode {
    pub(crate) fn options(self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(self.read).write(self.write);
        options.follow(if self.follow {
            FollowSymlinks::Yes
        } else {
            FollowSymlinks::No
        });
        // Opening a pipe must not block; regular files do not care.
        options.nonblock(true);
        options.sync(self.sync.contains(Fdflags::SYNC));
        options.dsync(self.sync.contains(Fdflags::DSYNC));
        options.rsync(self.sync.contains(Fdflags::RSYNC));
        options
    }
}

impl Wasi {
    /// Resolves a directory that still exists and a path without hidden names.
    fn resolve<'d>(
        &self,
        descriptor: &'d Descriptor,
        path: &str,
        creates: bool,
    ) -> Result<&'d OpenDirectory> {
        let directory = directory_of(descriptor)?;
        if creates && directory.read_only {
            return Err(Errno::Perm.into());
        }
        // Volumes have no hidden names.
        if let Place::Volume(_) = directory.place {
            return Ok(directory);
        }
        if names_hidden(path) {
            return Err(if creates { Errno::Acces } else { Errno::Noent }.into());
        }
        if creates && self.files.is_hidden(descriptor) {
            return Err(Errno::Noent.into());
        }
        Ok(directory)
    }

    /// As `resolve`, for removal: hidden files do not exist.
    fn resolve_removed<'d>(
        &self,
        descriptor: &'d Descriptor,
        path: &str,
    ) -> Result<&'d OpenDirectory> {
        let directory = self.resolve(descriptor, path, false)?;
        if directory.read_only {
            return Err(Errno::Perm.into());
        }
        Ok(directory)
    }

    /// `path_open`.
    pub(crate) fn open(&self, at: &Descriptor, path: &str, request: Request) -> Result<u32> {
        let directory = match &at.kind {
            Kind::Directory(directory) => directory,
            Kind::File(_) => return Err(Errno::Notdir.into()),
            Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::Listener(_) | Kind::Connection(_) => {
                return Err(Errno::Badf.into());
            }
        };
        let creates = request.oflags.contains(Oflags::CREAT);
        let truncates = request.oflags.contains(Oflags::TRUNC);
        check_open_rights(at, request)?;
        let wants_directory = request.oflags.contains(Oflags::DIRECTORY);
        if wants_directory && request.oflags != Oflags::DIRECTORY {
            return Err(Errno::Inval.into());
        }
        let readable =
            request.rights.contains(Rights::FD_READ) || !request.rights.contains(Rights::FD_WRITE);
        let writable = request.rights.contains(Rights::FD_WRITE);
        let mode = Mode {
            read: readable,
            write: writable || creates || truncates,
            sync: request.fdflags & (Fdflags::SYNC | Fdflags::DSYNC | Fdflags::RSYNC),
            follow: request.follow,
        };
        if directory.read_only && mode.write {
            return Err(Errno::Perm.into());
        }
        self.resolve(at, path, creates)?;
        let _namespace = self.files.shared();
        locked(&self.table).check_room()?;
        let place = match &directory.place {
            Place::Host { dir, .. } => open_host(dir, path, mode, request.oflags)?,
            Place::Volume(node) => {
                let how = OpenMode {
                    follow: mode.follow,
                    write: mode.write,
                    create: creates,
                    exclusive: request.oflags.contains(Oflags::EXCL),
                    truncate: truncates,
                };
                let now = self.clock.realtime_ns();
                OpenedPlace::Volume(node.volume.open(node.inode, path, how, now)?)
            }
        };
        if wants_directory && !place.is_directory() {
            return Err(Errno::Notdir.into());
        }
        let kind = if place.is_directory() {
            Kind::Directory(OpenDirectory {
                place: place.into_directory(),
                root: directory.root,
                preopened_as: None,
                read_only: directory.read_only,
                listing: Mutex::default(),
            })
        } else {
            let root = (directory.root, directory.read_only);
            let flags = (readable, writable, request.fdflags);
            Kind::File(place.into_file(root, mode, flags))
        };
        let inherited = at.dropped().inheriting;
        let dropped = Dropped {
            base: inherited,
            inheriting: inherited,
        };
        self.add(Arc::new(Descriptor::new(kind, dropped)))
    }

    /// Inserts an opened file into the table; the caller holds `files.shared()`.
    fn add(&self, descriptor: Arc<Descriptor>) -> Result<u32> {
        let fd = locked(&self.table).push(descriptor.clone())?;
        if let Some(id) = descriptor.file_id() {
            self.files.opened(id);
        }
        Ok(fd)
    }

    /// `path_create_directory`.
    pub(crate) fn create_directory(&self, at: &Descriptor, path: &str) -> Result<()> {
        let directory = directory_of(at)?;
        at.require(Rights::PATH_CREATE_DIRECTORY)?;
        self.resolve(at, path, true)?;
        match &directory.place {
            Place::Host { dir, .. } => Ok(dir.create_dir(path)?),
            Place::Volume(node) => {
                let now = self.clock.realtime_ns();
                Ok(node.volume.create_directory(node.inode, path, now)?)
            }
        }
    }

    /// `path_filestat_get`.
    pub(crate) fn filestat_at(
        &self,
        at: &Descriptor,
        flags: Lookupflags,
        path: &str,
    ) -> Result<Filestat> {
        let directory = self.resolve(at, path, false)?;
        at.require(Rights::PATH_FILESTAT_GET)?;
        let follow = flags.contains(Lookupflags::SYMLINK_FOLLOW);
        match &directory.place {
            Place::Host { dir, .. } if follow => Ok(filestat_of(&dir.metadata(path)?)),
            Place::Host { dir, .. } => Ok(filestat_of(&dir.symlink_metadata(path)?)),
            Place::Volume(node) => Ok(Filestat {
                dev: volume_device(directory.root),
                ..node.volume.filestat_at(node.inode, path, follow)?
            }),
        }
    }

    /// `path_filestat_set_times`.
    pub(crate) fn set_times_at(
        &self,
        at: &Descriptor,
        flags: Lookupflags,
        path: &str,
        times: &Timestamps,
    ) -> Result<()> {
        let directory = self.resolve_removed(at, path)?;
        at.require(Rights::PATH_FILESTAT_SET_TIMES)?;
        let access = time_spec(times.last_access)?;
        let modification = time_spec(times.last_modification)?;
        let follow = flags.contains(Lookupflags::SYMLINK_FOLLOW);
        match &directory.place {
            Place::Host { dir, .. } if follow => Ok(dir.set_times(path, access, modification)?),
            Place::Host { dir, .. } => Ok(dir.set_symlink_times(path, access, modification)?),
            Place::Volume(node) => {
                let now = self.clock.realtime_ns();
                let volume = &node.volume;
                Ok(volume.set_times_at(node.inode, path, follow, times, now)?)
            }
        }
    }

    /// `path_link`.
    pub(crate) fn link(
        &self,
        (source, source_flags, source_path): (&Descriptor, Lookupflags, &str),
        (target, target_path): (&Descriptor, &str),
    ) -> Result<()> {
        let source_dir = self.resolve_removed(source, source_path)?;
        let target_dir = self.resolve(target, target_path, true)?;
        source.require(Rights::PATH_LINK_SOURCE)?;
        target.require(Rights::PATH_LINK_TARGET)?;
        if source_flags.contains(Lookupflags::SYMLINK_FOLLOW) {
            return Err(Errno::Inval.into());
        }
        let _namespace = self.files.shared();
        match (&source_dir.place, &target_dir.place) {
            (Place::Host { dir: source, .. }, Place::Host { dir: target, .. }) => {
                Ok(source.hard_link(source_path, target, target_path)?)
            }
            (Place::Volume(source), Place::Volume(target)) if source.is_same_volume(target) => {
                let now = self.clock.realtime_ns();
                let (from, to) = ((source.inode, source_path), (target.inode, target_path));
                Ok(source.volume.link(from, to, now)?)
            }
            _ => Err(Errno::Xdev.into()),
        }
    }

    /// `path_readlink`.
    pub(crate) fn read_link(&self, at: &Descriptor, path: &str) -> Result<Vec<u8>> {
        let directory = self.resolve(at, path, false)?;
        at.require(Rights::PATH_READLINK)?;
        let target = match &directory.place {
            Place::Host { dir, .. } => {
                let target = dir.read_link(path)?.into_os_string();
                target.into_string().map_err(|_| Errno::Ilseq)?
            }
            Place::Volume(node) => node.volume.read_link(node.inode, path)?,
        };
        Ok(target.into_bytes())
    }

    /// `path_remove_directory`.
    pub(crate) fn remove_directory_at(&self, at: &Descriptor, path: &str) -> Result<()> {
        let directory = self.resolve_removed(at, path)?;
        at.require(Rights::PATH_REMOVE_DIRECTORY)?;
        match &directory.place {
            Place::Host { dir, .. } => self.remove_directory(dir, path),
            Place::Volume(node) => {
                let now = self.clock.realtime_ns();
                Ok(node.volume.remove_directory(node.inode, path, now)?)
            }
        }
    }

    /// `path_rename`.
    pub(crate) fn rename_at(
        &self,
        (source, source_path): (&Descriptor, &str),
        (target, target_path): (&Descriptor, &str),
    ) -> Result<()> {
        let source_dir = self.resolve_removed(source, source_path)?;
        let target_dir = self.resolve(target, target_path, true)?;
        source.require(Rights::PATH_RENAME_SOURCE)?;
        target.require(Rights::PATH_RENAME_TARGET)?;
        match (&source_dir.place, &target_dir.place) {
            (Place::Host { dir: source, .. }, Place::Host { dir: target, .. }) => {
                self.rename(source, source_path, target, target_path)
            }
            (Place::Volume(source), Place::Volume(target)) if source.is_same_volume(target) => {
                let now = self.clock.realtime_ns();
                let (from, to) = ((source.inode, source_path), (target.inode, target_path));
                Ok(source.volume.rename(from, to, now)?)
            }
            _ => Err(Errno::Xdev.into()),
        }
    }

    /// `path_symlink`.
    pub(crate) fn symlink(&self, contents: &str, at: &Descriptor, path: &str) -> Result<()> {
        let directory = self.resolve(at, path, true)?;
        at.require(Rights::PATH_SYMLINK)?;
        match &directory.place {
            Place::Host { .. } if names_hidden(contents) => Err(Errno::Acces.into()),
            Place::Host { dir, .. } => Ok(dir.symlink(contents, path)?),
            Place::Volume(node) => {
                let now = self.clock.realtime_ns();
                Ok(node.volume.symlink(contents, node.inode, path, now)?)
            }
        }
    }

    /// `path_unlink_file`.
    pub(crate) fn unlink(&self, at: &Descriptor, path: &str) -> Result<()> {
        let directory = self.resolve_removed(at, path)?;
        at.require(Rights::PATH_UNLINK_FILE)?;
        match &directory.place {
            Place::Host { dir, .. } => self.remove_file(dir, path),
            Place::Volume(node) => {
                let now = self.clock.realtime_ns();
                Ok(node.volume.remove_file(node.inode, path, now)?)
            }
        }
    }
}

/// Refuses rights that the directory lacks or must not pass on.
fn check_open_rights(at: &Descriptor, request: Request) -> Result<()> {
    at.require(Rights::PATH_OPEN)?;
    if request.oflags.contains(Oflags::CREAT) {
        at.require(Rights::PATH_CREATE_FILE)?;
    }
    if request.oflags.contains(Oflags::TRUNC) {
        at.require(Rights::PATH_FILESTAT_SET_SIZE)?;
    }
    if at.dropped().inheriting.intersects(request.rights) {
        return Err(Errno::Notcapable.into());
    }
    Ok(())
}

/// Result of opening.
enum OpenedPlace {
    Host(File, std::fs::Metadata),
    Volume(OpenNode),
}

fn open_host(dir: &Dir, path: &str, mode: Mode, oflags: Oflags) -> Result<OpenedPlace> {
    let mut options = mode.options();
    options.truncate(oflags.contains(Oflags::TRUNC));
    let creates = oflags.contains(Oflags::CREAT);
    if oflags.contains(Oflags::EXCL) {
        options.create_new(creates);
    } else {
        options.create(creates);
    }
    let file = dir.open_with(path, &options)?.into_std();
    let metadata = file.metadata()?;
    Ok(OpenedPlace::Host(file, metadata))
}

impl OpenedPlace {
    fn is_directory(&self) -> bool {
        match self {
            Self::Host(_, metadata) => metadata.is_dir(),
            Self::Volume(node) => node.is_directory(),
        }
    }

    fn into_directory(self) -> Place {
        match self {
            Self::Host(file, metadata) => Place::Host {
                id: FileId::of(&metadata),
                dir: Dir::from_std_file(file),
            },
            Self::Volume(node) => Place::Volume(node),
        }
    }

    fn into_file(self, root: (u32, bool), mode: Mode, flags: (bool, bool, Fdflags)) -> OpenFile {
        match self {
            Self::Host(file, metadata) => open_file(file, &metadata, root, mode, flags),
            Self::Volume(node) => open_node(node, root, mode, flags),
        }
    }
}

/// A freshly opened host file at offset 0. `flags` are (readable, writable, fdflags).
pub(crate) fn open_file(
    file: File,
    metadata: &std::fs::Metadata,
    root: (u32, bool),
    mode: Mode,
    flags: (bool, bool, Fdflags),
) -> OpenFile {
    let filetype = FileType::from_raw_mode(metadata.mode());
    let id = FileId::of(metadata);
    OpenFile {
        filetype: filetype_of(filetype),
        is_stream: !matches!(filetype, FileType::RegularFile | FileType::BlockDevice),
        ..opened(Data::Host { file, id }, root, mode, flags)
    }
}

/// A freshly opened volume file at offset 0.
pub(crate) fn open_node(
    node: OpenNode,
    root: (u32, bool),
    mode: Mode,
    flags: (bool, bool, Fdflags),
) -> OpenFile {
    opened(Data::Volume(node), root, mode, flags)
}

fn opened(
    data: Data,
    (root, read_only_root): (u32, bool),
    mode: Mode,
    (readable, writable, fdflags): (bool, bool, Fdflags),
) -> OpenFile {
    OpenFile {
        data,
        root,
        filetype: types::Filetype::RegularFile,
        is_stream: false,
        read_only_root,
        readable,
        writable,
        host_read: mode.read,
        host_write: mode.write,
        sync: mode.sync,
        append: AtomicBool::new(fdflags.contains(Fdflags::APPEND)),
        nonblocking: AtomicBool::new(fdflags.contains(Fdflags::NONBLOCK)),
        offset: Mutex::new(0),
    }
}

fn time_spec(time: Timespec) -> Result<Option<SystemTimeSpec>> {
    if time.tv_nsec == UTIME_OMIT {
        return Ok(None);
    }
    if time.tv_nsec == UTIME_NOW {
        return Ok(Some(SystemTimeSpec::SymbolicNow));
    }
    let since = Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?);
    let absolute = SystemTime::from_std(std::time::SystemTime::UNIX_EPOCH)
        .checked_add(since)
        .ok_or(Errno::Overflow)?;
    Ok(Some(SystemTimeSpec::Absolute(absolute)))
}
