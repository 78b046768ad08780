//! `path_*`. Everything is resolved by `cap-std` within the descriptor's
//! directory; absolute paths, `..` and links out of it end in `perm`.

use crate::abi::{Result, types};
use crate::descriptor::{Descriptor, Dropped, FileId, Kind, OpenDirectory, OpenFile};
use crate::directory::filetype_of;
use crate::file::filestat_of;
use crate::hidden::names_hidden;
use crate::{Wasi, locked};
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

/// A directory that paths start from.
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

/// What `path_open` is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) follow: bool,
    pub(crate) oflags: Oflags,
    pub(crate) rights: Rights,
    pub(crate) fdflags: Fdflags,
}

/// How the host opens a file; also what a restore repeats, hence without
/// creating and truncating.
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
    /// A directory that is still there, a path that names nothing hidden.
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
        if names_hidden(path) {
            return Err(if creates { Errno::Acces } else { Errno::Noent }.into());
        }
        if creates && self.files.is_hidden(descriptor) {
            return Err(Errno::Noent.into());
        }
        Ok(directory)
    }

    /// As `resolve`, for removing: what is hidden does not exist.
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
        let mut options = mode.options();
        options.truncate(truncates);
        if request.oflags.contains(Oflags::EXCL) {
            options.create_new(creates);
        } else {
            options.create(creates);
        }
        let _namespace = self.files.shared();
        locked(&self.table).check_room()?;
        let file = directory.dir.open_with(path, &options)?.into_std();
        let metadata = file.metadata()?;
        if wants_directory && !metadata.is_dir() {
            return Err(Errno::Notdir.into());
        }
        let kind = if metadata.is_dir() {
            Kind::Directory(OpenDirectory {
                id: FileId::of(&metadata),
                dir: Dir::from_std_file(file),
                root: directory.root,
                preopened_as: None,
                read_only: directory.read_only,
                listing: Mutex::default(),
            })
        } else {
            let root = (directory.root, directory.read_only);
            let flags = (readable, writable, request.fdflags);
            Kind::File(open_file(file, &metadata, root, mode, flags))
        };
        let inherited = at.dropped().inheriting;
        let dropped = Dropped {
            base: inherited,
            inheriting: inherited,
        };
        self.add(Arc::new(Descriptor::new(kind, dropped)))
    }

    /// Puts an opened file in the table; the caller holds `files.shared()`.
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
        Ok(directory.dir.create_dir(path)?)
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
        let metadata = if flags.contains(Lookupflags::SYMLINK_FOLLOW) {
            directory.dir.metadata(path)?
        } else {
            directory.dir.symlink_metadata(path)?
        };
        Ok(filestat_of(&metadata))
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
        if flags.contains(Lookupflags::SYMLINK_FOLLOW) {
            directory.dir.set_times(path, access, modification)?;
        } else {
            directory
                .dir
                .set_symlink_times(path, access, modification)?;
        }
        Ok(())
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
        Ok(source_dir
            .dir
            .hard_link(source_path, &target_dir.dir, target_path)?)
    }

    /// `path_readlink`.
    pub(crate) fn read_link(&self, at: &Descriptor, path: &str) -> Result<Vec<u8>> {
        let directory = self.resolve(at, path, false)?;
        at.require(Rights::PATH_READLINK)?;
        let target = directory.dir.read_link(path)?.into_os_string();
        let target = target.into_string().map_err(|_| Errno::Ilseq)?;
        Ok(target.into_bytes())
    }

    /// `path_remove_directory`.
    pub(crate) fn remove_directory_at(&self, at: &Descriptor, path: &str) -> Result<()> {
        let directory = self.resolve_removed(at, path)?;
        at.require(Rights::PATH_REMOVE_DIRECTORY)?;
        self.remove_directory(directory, path)
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
        self.rename(source_dir, source_path, target_dir, target_path)
    }

    /// `path_symlink`.
    pub(crate) fn symlink(&self, contents: &str, at: &Descriptor, path: &str) -> Result<()> {
        let directory = self.resolve(at, path, true)?;
        at.require(Rights::PATH_SYMLINK)?;
        if names_hidden(contents) {
            return Err(Errno::Acces.into());
        }
        Ok(directory.dir.symlink(contents, path)?)
    }

    /// `path_unlink_file`.
    pub(crate) fn unlink(&self, at: &Descriptor, path: &str) -> Result<()> {
        let directory = self.resolve_removed(at, path)?;
        at.require(Rights::PATH_UNLINK_FILE)?;
        self.remove_file(directory, path)
    }
}

/// Refuses what the directory may not do or not pass on.
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

/// An opened file, fresh at offset 0. `flags` are (readable, writable,
/// fdflags).
pub(crate) fn open_file(
    file: File,
    metadata: &std::fs::Metadata,
    (root, read_only_root): (u32, bool),
    mode: Mode,
    (readable, writable, fdflags): (bool, bool, Fdflags),
) -> OpenFile {
    let filetype = FileType::from_raw_mode(metadata.mode());
    OpenFile {
        id: FileId::of(metadata),
        root,
        filetype: filetype_of(filetype),
        is_stream: !matches!(filetype, FileType::RegularFile | FileType::BlockDevice),
        read_only_root,
        readable,
        writable,
        host_read: mode.read,
        host_write: mode.write,
        sync: mode.sync,
        append: AtomicBool::new(fdflags.contains(Fdflags::APPEND)),
        nonblocking: AtomicBool::new(fdflags.contains(Fdflags::NONBLOCK)),
        offset: Mutex::new(0),
        file,
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
