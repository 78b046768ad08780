//! The descriptor table, the kinds of descriptors, and their rights.
//!
//! A descriptor's number can be closed while another thread still uses the object, hence the `Arc`.
//! The table's lock is only held for lookups and changes of numbers, never during disk or network
//! operations.

use crate::abi::{Result, types};
use crate::listing::Listing;
use crate::lock::locked;
use crate::network::{self, Backlog};
use crate::volume::OpenNode;
use cap_std::fs::Dir;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use types::{Errno, Fdflags, Filetype, Rights};

/// Identity of a file on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl FileId {
    pub(crate) fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    pub(crate) fn of_path(metadata: &cap_std::fs::Metadata) -> Self {
        use cap_std::fs::MetadataExt;
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// Where a file is that a guest has open.
#[derive(Debug)]
pub(crate) enum Data {
    /// In a directory of the host.
    Host { file: File, id: FileId },
    /// In a volume of our own.
    Volume(OpenNode),
}

/// An open file that is not a directory.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) data: Data,
    /// The preopen that it was opened under.
    pub(crate) root: u32,
    pub(crate) filetype: Filetype,
    /// Pipes and devices have no offset and may block.
    pub(crate) is_stream: bool,
    pub(crate) read_only_root: bool,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// Access mode on the host (creating needs writing).
    pub(crate) host_read: bool,
    pub(crate) host_write: bool,
    /// The flags `sync`, `dsync` and `rsync`; fixed when opened.
    pub(crate) sync: Fdflags,
    pub(crate) append: AtomicBool,
    pub(crate) nonblocking: AtomicBool,
    /// Held during a read or write at the offset, so that two threads never read or overwrite the
    /// same bytes.
    pub(crate) offset: Mutex<u64>,
}

/// Where a directory is that a guest has open.
#[derive(Debug)]
pub(crate) enum Place {
    /// On the host.
    Host { dir: Dir, id: FileId },
    /// In a volume of our own.
    Volume(OpenNode),
}

#[derive(Debug)]
pub(crate) struct OpenDirectory {
    pub(crate) place: Place,
    /// The preopen that it is or was opened under.
    pub(crate) root: u32,
    /// The guest's name, if this is a preopen itself.
    pub(crate) preopened_as: Option<String>,
    pub(crate) read_only: bool,
    pub(crate) listing: Mutex<Option<Listing>>,
}

#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) backlog: Arc<Backlog>,
    /// Its index among the listeners of the configuration.
    pub(crate) index: u32,
    pub(crate) nonblocking: AtomicBool,
}

/// A connection that was accepted.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) connection: Arc<network::Connection>,
    pub(crate) nonblocking: AtomicBool,
}

#[derive(Debug)]
pub(crate) enum Kind {
    Stdin,
    Stdout,
    Stderr,
    File(OpenFile),
    Directory(OpenDirectory),
    Listener(Listener),
    Connection(Connection),
}

/// Dropped rights. All other rights that the open mode does not exclude are granted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dropped {
    pub(crate) base: Rights,
    pub(crate) inheriting: Rights,
}

impl Default for Dropped {
    fn default() -> Self {
        Self {
            base: Rights::empty(),
            inheriting: Rights::empty(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Descriptor {
    pub(crate) kind: Kind,
    dropped: Mutex<Dropped>,
}

impl Descriptor {
    pub(crate) fn new(kind: Kind, dropped: Dropped) -> Self {
        Self {
            kind,
            dropped: Mutex::new(dropped),
        }
    }

    /// Identity of the host's file behind it; `None` for other descriptors.
    pub(crate) fn file_id(&self) -> Option<FileId> {
        match &self.kind {
            Kind::File(OpenFile {
                data: Data::Host { id, .. },
                ..
            })
            | Kind::Directory(OpenDirectory {
                place: Place::Host { id, .. },
                ..
            }) => Some(*id),
            Kind::File(_) | Kind::Directory(_) => None,
            Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::Listener(_) | Kind::Connection(_) => {
                None
            }
        }
    }

    pub(crate) fn dropped(&self) -> Dropped {
        *locked(&self.dropped)
    }

    /// Refuses dropped rights.
    pub(crate) fn require(&self, rights: Rights) -> Result<()> {
        if self.dropped().base.intersects(rights) {
            return Err(Errno::Notcapable.into());
        }
        Ok(())
    }

    /// The rights as the guest sees them: (base, inheriting).
    pub(crate) fn rights(&self) -> (Rights, Rights) {
        let (base, inheriting) = initial_rights(&self.kind);
        let dropped = self.dropped();
        (base - dropped.base, inheriting - dropped.inheriting)
    }

    /// Drops all rights except these, which must be present.
    pub(crate) fn keep_rights(&self, base: Rights, inheriting: Rights) -> Result<()> {
        let (all_base, all_inheriting) = initial_rights(&self.kind);
        let mut dropped = locked(&self.dropped);
        if !(all_base - dropped.base).contains(base)
            || !(all_inheriting - dropped.inheriting).contains(inheriting)
        {
            return Err(Errno::Notcapable.into());
        }
        dropped.base = all_base - base;
        dropped.inheriting = all_inheriting - inheriting;
        Ok(())
    }

    pub(crate) fn flags(&self) -> Fdflags {
        let mut flags = Fdflags::empty();
        match &self.kind {
            Kind::File(file) => {
                flags |= file.sync;
                flags.set(Fdflags::APPEND, file.append.load(Ordering::Relaxed));
                flags.set(Fdflags::NONBLOCK, file.nonblocking.load(Ordering::Relaxed));
            }
            Kind::Listener(Listener { nonblocking, .. })
            | Kind::Connection(Connection { nonblocking, .. }) => {
                flags.set(Fdflags::NONBLOCK, nonblocking.load(Ordering::Relaxed));
            }
            Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::Directory(_) => {}
        }
        flags
    }
}

/// The rights of a fresh descriptor, as wasmtime 48 reports them.
fn initial_rights(kind: &Kind) -> (Rights, Rights) {
    match kind {
        Kind::Stdin => (Rights::FD_READ, Rights::FD_READ),
        Kind::Stdout | Kind::Stderr => (Rights::FD_WRITE, Rights::FD_WRITE),
        Kind::File(file) => {
            let mut rights = Rights::all();
            if !file.readable {
                rights -= Rights::FD_READ | Rights::FD_READDIR;
            }
            if !file.writable {
                rights -= Rights::FD_WRITE;
            }
            (rights, rights)
        }
        Kind::Directory(OpenDirectory {
            preopened_as: Some(_),
            ..
        }) => (preopen_base(), preopen_base() | preopen_files()),
        Kind::Directory(_) => {
            let rights = Rights::all()
                - Rights::FD_SEEK
                - Rights::FD_FILESTAT_SET_SIZE
                - Rights::PATH_FILESTAT_SET_SIZE
                - Rights::FD_WRITE;
            (rights, rights | preopen_files())
        }
        Kind::Listener(_) => {
            let base = socket_common() | Rights::SOCK_ACCEPT;
            (base, socket_common() | connection_rights())
        }
        Kind::Connection(_) => {
            let rights = socket_common() | connection_rights();
            (rights, rights)
        }
    }
}

fn preopen_base() -> Rights {
    Rights::PATH_CREATE_DIRECTORY
        | Rights::PATH_CREATE_FILE
        | Rights::PATH_LINK_SOURCE
        | Rights::PATH_LINK_TARGET
        | Rights::PATH_OPEN
        | Rights::FD_READDIR
        | Rights::PATH_READLINK
        | Rights::PATH_RENAME_SOURCE
        | Rights::PATH_RENAME_TARGET
        | Rights::PATH_SYMLINK
        | Rights::PATH_REMOVE_DIRECTORY
        | Rights::PATH_UNLINK_FILE
        | Rights::PATH_FILESTAT_GET
        | Rights::PATH_FILESTAT_SET_TIMES
        | Rights::FD_FILESTAT_GET
        | Rights::FD_FILESTAT_SET_TIMES
}

fn preopen_files() -> Rights {
    Rights::FD_DATASYNC
        | Rights::FD_READ
        | Rights::FD_SEEK
        | Rights::FD_FDSTAT_SET_FLAGS
        | Rights::FD_SYNC
        | Rights::FD_TELL
        | Rights::FD_WRITE
        | Rights::FD_ADVISE
        | Rights::FD_ALLOCATE
        | Rights::FD_FILESTAT_SET_SIZE
        | Rights::POLL_FD_READWRITE
}

fn socket_common() -> Rights {
    Rights::FD_FDSTAT_SET_FLAGS | Rights::FD_FILESTAT_GET | Rights::POLL_FD_READWRITE
}

fn connection_rights() -> Rights {
    Rights::FD_READ | Rights::FD_WRITE | Rights::SOCK_SHUTDOWN
}

/// Numbers to descriptors.
#[derive(Debug)]
pub(crate) struct Table {
    entries: BTreeMap<u32, Arc<Descriptor>>,
    descriptors_max: u32,
}

impl Table {
    pub(crate) fn new(descriptors_max: u32) -> Self {
        Self {
            entries: BTreeMap::new(),
            descriptors_max,
        }
    }

    /// # Errors
    /// `badf` if nothing has this number.
    pub(crate) fn get(&self, fd: u32) -> Result<Arc<Descriptor>> {
        Ok(self.entries.get(&fd).cloned().ok_or(Errno::Badf)?)
    }

    /// # Errors
    /// `mfile` if the limit is reached. Ask before an effect.
    pub(crate) fn check_room(&self) -> Result<()> {
        if self.entries.len() >= self.descriptors_max as usize {
            return Err(Errno::Mfile.into());
        }
        Ok(())
    }

    /// Gives `descriptor` the lowest free number.
    ///
    /// # Errors
    /// `mfile` if the limit is reached.
    pub(crate) fn push(&mut self, descriptor: Arc<Descriptor>) -> Result<u32> {
        self.check_room()?;
        let mut free = 0;
        for &fd in self.entries.keys() {
            if fd != free {
                break;
            }
            free += 1;
        }
        self.entries.insert(free, descriptor);
        Ok(free)
    }

    /// Inserts `descriptor` at a number; false if the number is taken or the limit reached.
    pub(crate) fn insert(&mut self, fd: u32, descriptor: Arc<Descriptor>) -> bool {
        if self.check_room().is_err() || self.entries.contains_key(&fd) {
            return false;
        }
        self.entries.insert(fd, descriptor);
        true
    }

    pub(crate) fn remove(&mut self, fd: u32) -> Result<Arc<Descriptor>> {
        Ok(self.entries.remove(&fd).ok_or(Errno::Badf)?)
    }

    /// Moves `from` to `to`, which must exist; returns the replaced descriptor.
    pub(crate) fn renumber(&mut self, from: u32, to: u32) -> Result<Option<Arc<Descriptor>>> {
        if !self.entries.contains_key(&to) {
            return Err(Errno::Badf.into());
        }
        let moved = self.get(from)?;
        if from == to {
            return Ok(None);
        }
        self.entries.remove(&from);
        Ok(self.entries.insert(to, moved))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Arc<Descriptor>)> {
        self.entries.iter().map(|(&fd, entry)| (fd, entry))
    }
}
