//! `fd_*` on what a descriptor refers to: reading and writing with our own
//! offsets, seeking, attributes and times.

use crate::abi::{Result, types};
use crate::descriptor::{Data, Descriptor, Kind, OpenFile, Place};
use crate::directory::filetype_of_path;
use crate::lock::locked;
use crate::socket;
use crate::state::Wasi;
use crate::stream::sink_result;
use crate::volume::{OpenNode, WriteFault, wait_done};
use crate::wait::{Interrupt, retry};
use cap_std::fs::{Metadata, MetadataExt};
use rustix::event::PollFlags;
use rustix::fd::AsFd;
use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno as HostErrno;
use rustix::io::ReadWriteFlags;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use types::{Errno, Fdflags, Filestat, Filetype, Fstflags, Rights, Whence};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Position {
    /// At the descriptor's offset, which moves on.
    Current,
    /// Here; the descriptor's offset stays.
    At(u64),
}

/// A regular file, for functions that make sense only for these.
pub(crate) fn file_of(descriptor: &Descriptor) -> Result<&OpenFile> {
    match &descriptor.kind {
        Kind::File(file) => Ok(file),
        Kind::Stdin
        | Kind::Stdout
        | Kind::Stderr
        | Kind::Directory(_)
        | Kind::Listener(_)
        | Kind::Connection(_) => Err(Errno::Badf.into()),
    }
}

fn seekable(descriptor: &Descriptor) -> Result<&OpenFile> {
    match &descriptor.kind {
        Kind::File(file) if !file.is_stream => Ok(file),
        Kind::Directory(_) => Err(Errno::Badf.into()),
        Kind::File(_)
        | Kind::Stdin
        | Kind::Stdout
        | Kind::Stderr
        | Kind::Listener(_)
        | Kind::Connection(_) => Err(Errno::Spipe.into()),
    }
}

impl OpenFile {
    /// The host's pipe or device, if it is one.
    pub(crate) fn stream(&self) -> Option<&File> {
        match &self.data {
            Data::Host { file, .. } if self.is_stream => Some(file),
            Data::Host { .. } | Data::Volume(_) => None,
        }
    }
}

impl Data {
    pub(crate) fn size(&self) -> Result<u64> {
        match self {
            Self::Host { file, .. } => Ok(file.metadata()?.len()),
            Self::Volume(node) => Ok(node.size()),
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, WriteFault> {
        match self {
            Self::Host { file, .. } => file.read_at(buffer, offset).map_err(WriteFault::from),
            Self::Volume(node) => node.read_at(buffer, offset),
        }
    }

    /// `fd_sync` and `fd_datasync`.
    pub(crate) fn sync(&self, data_only: bool, interrupt: &dyn Interrupt) -> Result<()> {
        match self {
            Self::Host { file, .. } if data_only => Ok(file.sync_data()?),
            Self::Host { file, .. } => Ok(file.sync_all()?),
            Self::Volume(node) => {
                node.sync(data_only)?;
                make_durable(node, interrupt)
            }
        }
    }
}

/// Waits until written bytes are durable at the backend, if there is one.
fn make_durable(node: &OpenNode, interrupt: &dyn Interrupt) -> Result<()> {
    wait_done(&node.volume, interrupt, || node.make_durable())
}

/// Runs an operation on a file of a volume, and repeats it after fetching blocks that it needs. No
/// lock that other threads need is held meanwhile.
fn retry_after_fetch<T>(
    node: &OpenNode,
    interrupt: &dyn Interrupt,
    mut work: impl FnMut() -> Result<T, WriteFault>,
) -> Result<T> {
    let folder = node.volume.folder().to_string_lossy();
    loop {
        match work() {
            Ok(value) => {
                node.volume.stalls().written(&folder);
                return Ok(value);
            }
            Err(WriteFault::Errno(errno)) => return Err(errno.into()),
            Err(WriteFault::HostFull) => node.volume.stalls().wait(&folder, interrupt)?,
            Err(WriteFault::Absent(blocks)) => {
                wait_done(&node.volume, interrupt, || node.fetch(blocks.clone()))?;
            }
        }
    }
}

impl OpenFile {
    /// Waits until a write with `sync` or `dsync` is durable, if the host's disk does not suffice.
    pub(crate) fn wait_durable(&self, interrupt: &dyn Interrupt) -> Result<()> {
        match &self.data {
            Data::Volume(node) if !self.sync.is_empty() => make_durable(node, interrupt),
            Data::Volume(_) | Data::Host { .. } => Ok(()),
        }
    }
}

impl Wasi {
    /// `fd_read` and `fd_pread`: fills the start of `buffer`.
    pub(crate) fn read(
        &self,
        descriptor: &Descriptor,
        buffer: &mut [u8],
        position: Position,
        interrupt: &dyn Interrupt,
    ) -> Result<usize> {
        descriptor.require(Rights::FD_READ)?;
        if let Position::At(_) = position {
            descriptor.require(Rights::FD_SEEK)?;
        }
        match (&descriptor.kind, position) {
            (Kind::File(file), _) => read_file(file, buffer, position, interrupt),
            (Kind::Stdin | Kind::Connection(_), Position::At(_)) => Err(Errno::Spipe.into()),
            (Kind::Stdin, Position::Current) if buffer.is_empty() => Ok(0),
            (Kind::Stdin, Position::Current) => self.stdin.read(buffer, interrupt),
            (Kind::Connection(connection), Position::Current) => {
                socket::receive(connection, buffer, types::Riflags::empty(), interrupt)
            }
            (Kind::Stdout | Kind::Stderr | Kind::Directory(_) | Kind::Listener(_), _) => {
                Err(Errno::Badf.into())
            }
        }
    }

    /// `fd_write` and `fd_pwrite`.
    pub(crate) fn write(
        &self,
        descriptor: &Descriptor,
        bytes: &[u8],
        position: Position,
        interrupt: &dyn Interrupt,
    ) -> Result<types::Size> {
        descriptor.require(Rights::FD_WRITE)?;
        if let Position::At(_) = position {
            descriptor.require(Rights::FD_SEEK)?;
        }
        match (&descriptor.kind, position) {
            (Kind::File(file), _) => {
                let count = match &file.data {
                    Data::Host { file: host, .. } => {
                        write_file(file, host, bytes, position, interrupt)?
                    }
                    Data::Volume(node) => {
                        self.write_volume(file, node, bytes, position, interrupt)?
                    }
                };
                Ok(count.try_into()?)
            }
            (Kind::Stdout | Kind::Stderr | Kind::Connection(_), Position::At(_)) => {
                Err(Errno::Spipe.into())
            }
            (Kind::Stdout | Kind::Stderr, Position::Current) if bytes.is_empty() => Ok(0),
            (Kind::Stdout, Position::Current) => sink_result(self.stdout.write(bytes, interrupt)),
            (Kind::Stderr, Position::Current) => sink_result(self.stderr.write(bytes, interrupt)),
            (Kind::Connection(connection), Position::Current) => {
                Ok(socket::send(connection, bytes, interrupt)?.try_into()?)
            }
            (Kind::Stdin | Kind::Directory(_) | Kind::Listener(_), _) => Err(Errno::Badf.into()),
        }
    }

    pub(crate) fn filetype(&self, kind: &Kind) -> Filetype {
        let terminal = match kind {
            Kind::Stdin => self.stdin.is_terminal(),
            Kind::Stdout => self.stdout.is_terminal(),
            Kind::Stderr => self.stderr.is_terminal(),
            Kind::File(file) => return file.filetype,
            Kind::Directory(_) => return Filetype::Directory,
            Kind::Listener(_) | Kind::Connection(_) => return Filetype::SocketStream,
        };
        if terminal {
            Filetype::CharacterDevice
        } else {
            Filetype::Unknown
        }
    }

    /// `fd_filestat_get`. A hidden file has one link less than on the host.
    pub(crate) fn filestat(&self, descriptor: &Descriptor) -> Result<Filestat> {
        descriptor.require(Rights::FD_FILESTAT_GET)?;
        let metadata = match &descriptor.kind {
            Kind::File(OpenFile { data, root, .. }) => match data {
                Data::Host { file, .. } => Metadata::from_file(file)?,
                Data::Volume(node) => return volume_stat(node, *root),
            },
            Kind::Directory(directory) => match &directory.place {
                Place::Host { dir, .. } => dir.dir_metadata()?,
                Place::Volume(node) => return volume_stat(node, directory.root),
            },
            kind @ (Kind::Stdin
            | Kind::Stdout
            | Kind::Stderr
            | Kind::Listener(_)
            | Kind::Connection(_)) => {
                return Ok(Filestat {
                    dev: 0,
                    ino: 0,
                    filetype: self.filetype(kind),
                    nlink: 0,
                    size: 0,
                    atim: 0,
                    mtim: 0,
                    ctim: 0,
                });
            }
        };
        let mut stat = filestat_of(&metadata);
        if self.files.is_hidden(descriptor) {
            stat.nlink = stat.nlink.saturating_sub(1);
        }
        Ok(stat)
    }

    /// Writes to a file of a volume. If the host has no space, it waits and retries; no lock that
    /// other threads need is held meanwhile.
    fn write_volume(
        &self,
        file: &OpenFile,
        node: &OpenNode,
        bytes: &[u8],
        position: Position,
        interrupt: &dyn Interrupt,
    ) -> Result<usize> {
        if !file.writable {
            return Err(Errno::Badf.into());
        }
        if let Some(backing) = node.volume.backing() {
            wait_done(&node.volume, interrupt, || backing.backpressure())?;
        }
        retry_after_fetch(node, interrupt, || {
            self.write_volume_once(file, node, bytes, position)
        })
    }

    fn write_volume_once(
        &self,
        file: &OpenFile,
        node: &OpenNode,
        bytes: &[u8],
        position: Position,
    ) -> Result<usize, WriteFault> {
        let append = file.append.load(Ordering::Relaxed);
        let now = self.clock.realtime_ns();
        let count = match position {
            // As on Linux, a file in append mode ignores the position.
            Position::At(offset) => node.write_at(bytes, (!append).then_some(offset), now)?.1,
            Position::Current => {
                let mut offset = locked(&file.offset);
                let at = (!append).then_some(*offset);
                let (at, count) = node.write_at(bytes, at, now)?;
                *offset = at + count as u64;
                count
            }
        };
        if !file.sync.is_empty() {
            let data_only = !file.sync.intersects(Fdflags::SYNC | Fdflags::RSYNC);
            node.sync(data_only)?;
        }
        Ok(count)
    }

    /// `fd_filestat_set_size`.
    pub(crate) fn set_size(
        &self,
        descriptor: &Descriptor,
        size: u64,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let file = file_of(descriptor)?;
        descriptor.require(Rights::FD_FILESTAT_SET_SIZE)?;
        if file.read_only_root {
            return Err(Errno::Perm.into());
        }
        match &file.data {
            Data::Host { file, .. } => Ok(file.set_len(size)?),
            Data::Volume(_) if !file.host_write => Err(Errno::Inval.into()),
            Data::Volume(node) => retry_after_fetch(node, interrupt, || {
                node.set_size(size, self.clock.realtime_ns())
            }),
        }
    }

    /// `fd_filestat_set_times`.
    pub(crate) fn set_times(&self, descriptor: &Descriptor, times: &Timestamps) -> Result<()> {
        let (fd, node, read_only) = match &descriptor.kind {
            Kind::File(file) => match &file.data {
                Data::Host { file: host, .. } => (Some(host.as_fd()), None, file.read_only_root),
                Data::Volume(node) => (None, Some(node), file.read_only_root),
            },
            Kind::Directory(directory) => match &directory.place {
                Place::Host { dir, .. } => (Some(dir.as_fd()), None, directory.read_only),
                Place::Volume(node) => (None, Some(node), directory.read_only),
            },
            Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::Listener(_) | Kind::Connection(_) => {
                return Err(Errno::Badf.into());
            }
        };
        descriptor.require(Rights::FD_FILESTAT_SET_TIMES)?;
        if read_only {
            return Err(Errno::Perm.into());
        }
        if let Some(fd) = fd {
            rustix::fs::futimens(fd, times)?;
        }
        if let Some(node) = node {
            let now = self.clock.realtime_ns();
            node.volume.set_times(node.inode, times, now)?;
        }
        Ok(())
    }
}

/// The device number of volumes, without the preopen's number.
const VOLUME_DEVICE: u64 = 0x6b65_656c_0000_0000;

/// The device number by which guests distinguish preopens.
pub(crate) fn volume_device(root: u32) -> u64 {
    VOLUME_DEVICE + u64::from(root)
}

fn volume_stat(node: &OpenNode, root: u32) -> Result<Filestat> {
    Ok(Filestat {
        dev: volume_device(root),
        ..node.volume.filestat(node.inode)?
    })
}

fn read_file(
    file: &OpenFile,
    buffer: &mut [u8],
    position: Position,
    interrupt: &dyn Interrupt,
) -> Result<usize> {
    if !file.readable {
        return Err(Errno::Badf.into());
    }
    if let Some(stream) = file.stream() {
        if let Position::At(offset) = position {
            return Ok(stream.read_at(buffer, offset)?);
        }
        let nonblocking = file.nonblocking.load(Ordering::Relaxed);
        return retry(
            stream.as_fd(),
            PollFlags::IN,
            nonblocking,
            interrupt,
            || rustix::io::read(stream, &mut *buffer),
        );
    }
    let mut read = || match position {
        Position::At(offset) => file.data.read_at(buffer, offset),
        Position::Current => {
            let mut offset = locked(&file.offset);
            let count = file.data.read_at(buffer, *offset)?;
            let after = offset.checked_add(count as u64);
            *offset = after.ok_or(WriteFault::Errno(HostErrno::OVERFLOW))?;
            Ok(count)
        }
    };
    match &file.data {
        Data::Volume(node) => retry_after_fetch(node, interrupt, read),
        Data::Host { .. } => match read() {
            Ok(count) => Ok(count),
            Err(WriteFault::Errno(errno)) => Err(errno.into()),
            Err(WriteFault::HostFull | WriteFault::Absent(_)) => Err(Errno::Io.into()),
        },
    }
}

fn write_file(
    file: &OpenFile,
    host: &File,
    bytes: &[u8],
    position: Position,
    interrupt: &dyn Interrupt,
) -> Result<usize> {
    if !file.writable {
        return Err(Errno::Badf.into());
    }
    if file.is_stream {
        if let Position::At(_) = position {
            return Err(Errno::Spipe.into());
        }
        let nonblocking = file.nonblocking.load(Ordering::Relaxed);
        return retry(host.as_fd(), PollFlags::OUT, nonblocking, interrupt, || {
            rustix::io::write(host, bytes)
        });
    }
    let append = file.append.load(Ordering::Relaxed);
    match position {
        // As on Linux, a file in append mode ignores the position.
        Position::At(_) if append => {
            let _turn = locked(&file.offset);
            Ok(append_bytes(host, bytes)?)
        }
        Position::At(offset) => Ok(host.write_at(bytes, offset)?),
        Position::Current => {
            let mut offset = locked(&file.offset);
            if append {
                let count = append_bytes(host, bytes)?;
                *offset = host.metadata()?.len();
                return Ok(count);
            }
            let count = host.write_at(bytes, *offset)?;
            *offset = offset.checked_add(count as u64).ok_or(Errno::Overflow)?;
            Ok(count)
        }
    }
}

/// Writes at the present end of the file.
fn append_bytes(file: &File, bytes: &[u8]) -> io::Result<usize> {
    let vector = [IoSlice::new(bytes)];
    match rustix::io::pwritev2(file, &vector, 0, ReadWriteFlags::APPEND) {
        Err(HostErrno::NOSYS | HostErrno::OPNOTSUPP) => {
            file.write_at(bytes, file.metadata()?.len())
        }
        result => Ok(result?),
    }
}

/// `fd_seek`.
pub(crate) fn seek(descriptor: &Descriptor, delta: i64, whence: Whence) -> Result<u64> {
    let file = seekable(descriptor)?;
    let only_tells = delta == 0 && whence == Whence::Cur;
    descriptor.require(if only_tells {
        Rights::FD_TELL
    } else {
        Rights::FD_SEEK
    })?;
    let mut offset = locked(&file.offset);
    let base = match whence {
        Whence::Set => 0,
        Whence::Cur => *offset,
        Whence::End => file.data.size()?,
    };
    let target = base.checked_add_signed(delta).ok_or(Errno::Inval)?;
    *offset = target;
    Ok(target)
}

/// `fd_tell`.
pub(crate) fn tell(descriptor: &Descriptor) -> Result<u64> {
    let file = seekable(descriptor)?;
    descriptor.require(Rights::FD_TELL)?;
    Ok(*locked(&file.offset))
}

/// `fd_fdstat_set_flags`: `append` and `nonblock` can change; those about
/// syncing must stay as they are.
pub(crate) fn set_flags(descriptor: &Descriptor, flags: Fdflags) -> Result<()> {
    let syncing = Fdflags::DSYNC | Fdflags::SYNC | Fdflags::RSYNC;
    let nonblocking = flags.contains(Fdflags::NONBLOCK);
    let (fixed, target) = match &descriptor.kind {
        Kind::File(file) => (file.sync, &file.nonblocking),
        Kind::Listener(listener) => (Fdflags::empty(), &listener.nonblocking),
        Kind::Connection(connection) => (Fdflags::empty(), &connection.nonblocking),
        Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::Directory(_) => {
            return Err(Errno::Badf.into());
        }
    };
    descriptor.require(Rights::FD_FDSTAT_SET_FLAGS)?;
    let asked = flags & syncing;
    if !asked.is_empty() && asked != fixed {
        return Err(Errno::Inval.into());
    }
    target.store(nonblocking, Ordering::Relaxed);
    if let Kind::File(file) = &descriptor.kind {
        let append = flags.contains(Fdflags::APPEND);
        file.append.store(append, Ordering::Relaxed);
    }
    Ok(())
}

/// `fd_advise`.
pub(crate) fn advise(
    descriptor: &Descriptor,
    offset: u64,
    length: u64,
    advice: types::Advice,
) -> Result<()> {
    let file = file_of(descriptor)?;
    descriptor.require(Rights::FD_ADVISE)?;
    let advice = match advice {
        types::Advice::Normal => rustix::fs::Advice::Normal,
        types::Advice::Sequential => rustix::fs::Advice::Sequential,
        types::Advice::Random => rustix::fs::Advice::Random,
        types::Advice::Willneed => rustix::fs::Advice::WillNeed,
        types::Advice::Dontneed => rustix::fs::Advice::DontNeed,
        types::Advice::Noreuse => rustix::fs::Advice::NoReuse,
    };
    match &file.data {
        Data::Host { file, .. } => {
            let length = std::num::NonZeroU64::new(length);
            Ok(rustix::fs::fadvise(file, offset, length, advice)?)
        }
        Data::Volume(_) if i64::try_from(length).is_err() => Err(Errno::Inval.into()),
        // Ignored for a backing file.
        Data::Volume(_) => Ok(()),
    }
}

/// Access and modification times to set, checked.
pub(crate) fn timestamps(
    access_ns: u64,
    modification_ns: u64,
    flags: Fstflags,
) -> Result<Timestamps> {
    let one = |set: bool, now: bool, time_ns: u64| -> Result<Timespec> {
        let special = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
        match (set, now) {
            (true, true) => Err(Errno::Inval.into()),
            (true, false) => Ok(Timespec {
                tv_sec: i64::try_from(time_ns / 1_000_000_000)?,
                tv_nsec: (time_ns % 1_000_000_000) as _,
            }),
            (false, true) => Ok(special(UTIME_NOW)),
            (false, false) => Ok(special(UTIME_OMIT)),
        }
    };
    Ok(Timestamps {
        last_access: one(
            flags.contains(Fstflags::ATIM),
            flags.contains(Fstflags::ATIM_NOW),
            access_ns,
        )?,
        last_modification: one(
            flags.contains(Fstflags::MTIM),
            flags.contains(Fstflags::MTIM_NOW),
            modification_ns,
        )?,
    })
}

pub(crate) fn filestat_of(metadata: &Metadata) -> Filestat {
    Filestat {
        dev: metadata.dev(),
        ino: metadata.ino(),
        filetype: filetype_of_path(metadata),
        nlink: metadata.nlink(),
        size: metadata.len(),
        atim: nanoseconds(metadata.atime(), metadata.atime_nsec()),
        mtim: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
        ctim: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
    }
}

/// Times before 1970 become 0, as preview 1 cannot represent them.
fn nanoseconds(seconds: i64, rest: i64) -> u64 {
    let time = i128::from(seconds) * 1_000_000_000 + i128::from(rest);
    u64::try_from(time.max(0)).unwrap_or(u64::MAX)
}
