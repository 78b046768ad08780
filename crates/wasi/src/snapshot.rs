//! The WASI state of a machine as plain data.
//!
//! These types are the stored and transmitted format; internal types differ. Changes require a new
//! [`SNAPSHOT_VERSION`].

use crate::abi::types;
use crate::descriptor::{
    Connection, Data, Descriptor, Kind, OpenDirectory, OpenFile, Place as DirPlace,
};
use crate::error::Error;
use crate::lock::locked;
use crate::network::NetworkRecord;
use crate::root::{Root, RootPlace};
use crate::state::Wasi;
use crate::stream::Stdin;
use crate::unlinked_open::{self, file_fd};
use crate::volume::VolumeRecord;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;

/// The version that this program writes and reads.
pub const SNAPSHOT_VERSION: u32 = 2;

/// The WASI state of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// [`SNAPSHOT_VERSION`] of the writer.
    pub version: u32,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Distinguishes this machine's hidden files from those of others.
    pub machine: u64,
    /// The number of the next hidden file.
    pub hidden_next: u64,
    /// Boot ID of the source host; empty if unknown. On the same boot, device and inode numbers
    /// must still match.
    pub boot_id: String,
    pub monotonic_ns: u64,
    pub realtime_ns: u64,
    /// The seed of `random_get`.
    pub seed: [u8; 32],
    /// Guest thread and number of 32-bit words that it has drawn.
    pub random: Vec<(u32, u64)>,
    /// The preopens of the configuration, including closed ones.
    pub preopens: Vec<PreopenRecord>,
    /// Number of listeners of the configuration.
    pub listeners: u32,
    /// Standard input.
    pub stdin: StdinRecord,
    /// [`crate::Limits::descriptors_max`].
    pub descriptors_max: u32,
    /// [`crate::Limits::subscriptions_max`].
    pub subscriptions_max: u32,
    /// [`crate::Limits::directory_entries_max`].
    pub directory_entries_max: u32,
    pub descriptors: Vec<DescriptorRecord>,
    /// Listeners' and connections' bytes. Not encoded with the rest, which programs without
    /// connections in their machines can read; the writer of the whole appends it.
    #[serde(skip)]
    pub network: NetworkRecord,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreopenRecord {
    pub guest: String,
    /// Whether the guest may change nothing in it.
    pub read_only: bool,
    /// Its contents, if it is a volume.
    pub volume: Option<VolumeRecord>,
    /// Device number on the source host; 0 for a volume.
    pub device: u64,
    /// Inode number on the source host; 0 for a volume.
    pub inode: u64,
}

/// Rest of standard input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StdinRecord {
    /// Nothing.
    Empty,
    /// A descriptor of the host; the target provides another.
    Host,
    /// These bytes.
    Bytes(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorRecord {
    pub fd: u32,
    /// Base rights given up, as preview 1's `rights` bits.
    pub dropped_base: u64,
    /// Inheriting rights given up.
    pub dropped_inheriting: u64,
    pub kind: DescriptorKind,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DescriptorKind {
    /// Standard input.
    Stdin,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    File(FileRecord),
    Directory(DirectoryRecord),
    Listener(ListenerRecord),
    /// A connection; without bytes in [`Snapshot::network`] it is reset.
    Connection(ConnectionRecord),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// In a directory of the host.
    Host(HostPlace),
    /// In a volume of our own.
    Volume { preopen: u32, inode: u64 },
}

/// Where an open file of the host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPlace {
    pub preopen: u32,
    /// Path under it, without `..` or links; empty for the preopen itself.
    pub path: String,
    /// Device number on the source host.
    pub device: u64,
    /// Inode number on the source host.
    pub inode: u64,
}

/// An open file, pipe or device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    pub place: Place,
    /// Preview 1's `filetype`.
    pub filetype: u8,
    /// Whether the guest may read.
    pub readable: bool,
    /// Whether the guest may write.
    pub writable: bool,
    /// Whether the host's file is open for reading.
    pub host_read: bool,
    /// Whether the host's file is open for writing.
    pub host_write: bool,
    /// Preview 1's `fdflags` bits.
    pub flags: u16,
    /// Where the next read or write goes, in bytes.
    pub offset: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryRecord {
    pub place: Place,
    /// Whether this is a preopen itself.
    pub preopened: bool,
    /// The listing that cookies refer to.
    pub listing: Option<Vec<EntryRecord>>,
}

/// An entry of a directory's listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryRecord {
    pub name: String,
    pub inode: u64,
    /// Preview 1's `filetype`.
    pub filetype: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerRecord {
    /// Its place among the listeners of the configuration.
    pub index: u32,
    /// Whether `sock_accept` fails rather than waits.
    pub nonblocking: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionRecord {
    /// Our address.
    pub local: Option<SocketAddr>,
    pub peer: Option<SocketAddr>,
    /// Whether calls fail rather than wait.
    pub nonblocking: bool,
    /// Always 0: what was shut down is in [`Snapshot::network`].
    pub shut: u8,
    /// Always empty: bytes are in [`Snapshot::network`].
    pub received: Vec<u8>,
}

impl Wasi {
    /// Writes the state down. All guest threads must be stopped outside of
    /// calls; the machine is unharmed and may go on.
    ///
    /// # Errors
    /// If an open file cannot be found by another host, naming it.
    pub fn snapshot(&self) -> Result<Snapshot, Error> {
        let open = locked(&self.table)
            .iter()
            .map(|(fd, descriptor)| (fd, descriptor.clone()))
            .collect::<Vec<_>>();
        let mut descriptors = Vec::with_capacity(open.len());
        let mut connections = BTreeMap::new();
        for (fd, descriptor) in open {
            let dropped = descriptor.dropped();
            if let Kind::Connection(open) = &descriptor.kind
                && self.network.has(&open.connection)
            {
                connections.insert(open.connection.id(), fd);
            }
            descriptors.push(DescriptorRecord {
                fd,
                dropped_base: dropped.base.bits(),
                dropped_inheriting: dropped.inheriting.bits(),
                kind: self.record_kind(fd, &descriptor)?,
            });
        }
        Ok(Snapshot {
            version: SNAPSHOT_VERSION,
            args: self.args.clone(),
            env: self.env.clone(),
            machine: self.files.machine(),
            hidden_next: self.files.next(),
            boot_id: boot_id(),
            monotonic_ns: self.clock.monotonic_ns(),
            realtime_ns: self.clock.realtime_ns(),
            seed: self.random.seed(),
            random: self.random.drawn().into_iter().collect(),
            preopens: self.roots.iter().map(record_root).collect(),
            listeners: self.network.listeners(),
            stdin: match &self.stdin {
                Stdin::Empty => StdinRecord::Empty,
                Stdin::Fd { .. } => StdinRecord::Host,
                Stdin::Bytes(bytes) => StdinRecord::Bytes(locked(bytes).clone().into()),
            },
            descriptors_max: self.limits.descriptors_max,
            subscriptions_max: self.limits.subscriptions_max,
            directory_entries_max: self.limits.directory_entries_max,
            descriptors,
            network: self.network.record(&connections),
        })
    }

    fn record_kind(&self, fd: u32, descriptor: &Descriptor) -> Result<DescriptorKind, Error> {
        Ok(match &descriptor.kind {
            Kind::Stdin => DescriptorKind::Stdin,
            Kind::Stdout => DescriptorKind::Stdout,
            Kind::Stderr => DescriptorKind::Stderr,
            Kind::File(file) => {
                let place = match &file.data {
                    Data::Host { .. } => self.place(fd, descriptor, file.root)?,
                    Data::Volume(node) => Place::Volume {
                        preopen: file.root,
                        inode: node.inode,
                    },
                };
                DescriptorKind::File(record_file(file, place, descriptor.flags()))
            }
            Kind::Directory(directory) => {
                let place = match &directory.place {
                    DirPlace::Host { .. } => self.place(fd, descriptor, directory.root)?,
                    DirPlace::Volume(node) => Place::Volume {
                        preopen: directory.root,
                        inode: node.inode,
                    },
                };
                DescriptorKind::Directory(record_directory(directory, place))
            }
            Kind::Listener(listener) => DescriptorKind::Listener(ListenerRecord {
                index: listener.index,
                nonblocking: listener.nonblocking.load(Ordering::Relaxed),
            }),
            Kind::Connection(connection) => {
                DescriptorKind::Connection(record_connection(connection))
            }
        })
    }

    fn place(&self, fd: u32, descriptor: &Descriptor, root: u32) -> Result<Place, Error> {
        let (Some(host_fd), Some(id)) = (file_fd(descriptor), descriptor.file_id()) else {
            return Err(Error::Damaged(format!("descriptor {fd} is not a file")));
        };
        let located = unlinked_open::locate(&self.roots, host_fd, id, root);
        let (preopen, path) = located.map_err(|source| match source.raw_os_error() {
            None => Error::Unreachable {
                fd,
                path: source.to_string(),
            },
            Some(_) => Error::Locate { fd, source },
        })?;
        let path = path.into_os_string().into_string();
        Ok(Place::Host(HostPlace {
            preopen,
            path: path.map_err(|path| Error::NotUtf8 {
                fd,
                path: path.to_string_lossy().into_owned(),
            })?,
            device: id.device,
            inode: id.inode,
        }))
    }
}

fn record_root(root: &Root) -> PreopenRecord {
    let (volume, device, inode) = match &root.place {
        RootPlace::Host { id, .. } => (None, id.device, id.inode),
        RootPlace::Volume(volume) => (Some(volume.record()), 0, 0),
    };
    PreopenRecord {
        guest: root.guest.clone(),
        read_only: root.read_only,
        volume,
        device,
        inode,
    }
}

fn record_file(file: &OpenFile, place: Place, flags: types::Fdflags) -> FileRecord {
    FileRecord {
        place,
        filetype: file.filetype as u8,
        readable: file.readable,
        writable: file.writable,
        host_read: file.host_read,
        host_write: file.host_write,
        flags: flags.bits(),
        offset: *locked(&file.offset),
    }
}

fn record_directory(directory: &OpenDirectory, place: Place) -> DirectoryRecord {
    let listing = locked(&directory.listing);
    let entries = listing.as_ref().map(|listing| {
        let entries = listing.iter().map(|entry| EntryRecord {
            name: entry.name.clone(),
            inode: entry.inode,
            filetype: entry.filetype,
        });
        entries.collect()
    });
    DirectoryRecord {
        place,
        preopened: directory.preopened_as.is_some(),
        listing: entries,
    }
}

fn record_connection(connection: &Connection) -> ConnectionRecord {
    ConnectionRecord {
        local: Some(connection.connection.local()),
        peer: Some(connection.connection.peer()),
        nonblocking: connection.nonblocking.load(Ordering::Relaxed),
        shut: 0,
        received: Vec::new(),
    }
}

/// Identifies this boot of this host; empty if unknown.
pub(crate) fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}
