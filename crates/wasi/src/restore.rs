//! Restoring a [`Snapshot`]: everything is validated before anything is opened, and files are
//! opened without creating, truncating or following links.

use crate::abi::types;
use crate::clock::{GuestClock, HostClock, SystemClock};
use crate::config::{Limits, Preopen, Source, check_preopen_names, check_strings};
use crate::descriptor::{
    Connection, Descriptor, Dropped, FileId, Kind, Listener, OpenDirectory, Place as DirPlace,
    Table,
};
use crate::directory::filetype_of;
use crate::error::Error;
use crate::listing::Entry;
use crate::network::{self, Network};
use crate::path::{Mode, open_file, open_node};
use crate::random::Random;
use crate::root::{Root, RootPlace, open_root};
use crate::snapshot::{
    DescriptorKind, DirectoryRecord, FileRecord, HostPlace, Place, SNAPSHOT_VERSION, Snapshot,
    StdinRecord, boot_id,
};
use crate::state::Wasi;
use crate::stream::{DiscardSink, Input, Sink, Stdin};
use crate::unlinked_open::OpenFiles;
use crate::volume::OpenNode;
use cap_std::fs::Dir;
use rustix::fs::FileType;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use types::{Fdflags, Rights};

/// Resources of the target host for a restore.
pub struct Resources {
    /// Location of each preopen, in the snapshot's order. The folder of a volume contains its
    /// files' bytes.
    pub preopens: Vec<Source>,
    /// Standard input, if the snapshot says [`StdinRecord::Host`].
    pub stdin: Input,
    /// Standard output.
    pub stdout: Box<dyn Sink>,
    /// Standard error.
    pub stderr: Box<dyn Sink>,
    pub clock: Arc<dyn HostClock>,
}

impl Default for Resources {
    /// No preopens, empty input, output forgotten, the system's clocks.
    fn default() -> Self {
        Self {
            preopens: Vec::new(),
            stdin: Input::Empty,
            stdout: Box::new(DiscardSink),
            stderr: Box::new(DiscardSink),
            clock: Arc::new(SystemClock),
        }
    }
}

/// Maximum number of guest threads that draw random numbers.
const RANDOM_STREAMS_MAX: usize = 1 << 20;

impl Wasi {
    /// Restores a captured state with this host's resources. The snapshot is untrusted:
    /// inconsistent data is refused.
    ///
    /// # Errors
    /// If the snapshot is of another version or corrupt, resources are missing, or an open file is
    /// missing or a different one.
    pub fn restore(mut snapshot: Snapshot, resources: Resources) -> Result<Wasi, Error> {
        check(&snapshot, &resources)?;
        let mut roots = Vec::with_capacity(snapshot.preopens.len());
        for (record, source) in snapshot.preopens.iter_mut().zip(resources.preopens) {
            let preopen = Preopen {
                source,
                guest: record.guest.clone(),
                read_only: record.read_only,
            };
            roots.push(open_root(&preopen, record.volume.take(), 0)?);
        }
        let limits = Limits {
            descriptors_max: snapshot.descriptors_max,
            subscriptions_max: snapshot.subscriptions_max,
            directory_entries_max: snapshot.directory_entries_max,
        }
        .clamped();
        let (network, connections) =
            Network::restore(snapshot.listeners, std::mem::take(&mut snapshot.network))?;
        let mut restorer = Restorer {
            roots: &roots,
            strict: strict_roots(&snapshot, &roots),
            files: OpenFiles::new(snapshot.machine, snapshot.hidden_next),
            network: &network,
            connections,
        };
        let mut table = Table::new(limits.descriptors_max);
        for record in snapshot.descriptors {
            let fd = record.fd;
            let kind = restorer.kind(fd, record.kind)?;
            let dropped = Dropped {
                base: rights(fd, record.dropped_base)?,
                inheriting: rights(fd, record.dropped_inheriting)?,
            };
            let descriptor = Arc::new(Descriptor::new(kind, dropped));
            if let Some(id) = descriptor.file_id() {
                restorer.files.opened(id);
            }
            if !table.insert(fd, descriptor) {
                return Err(damaged(fd, "appears twice or is beyond the limit"));
            }
        }
        if let Some(fd) = restorer.connections.keys().next() {
            return Err(damaged(*fd, "is no connection"));
        }
        let stdin = match snapshot.stdin {
            StdinRecord::Empty => Input::Empty,
            StdinRecord::Host => resources.stdin,
            StdinRecord::Bytes(bytes) => Input::Bytes(bytes),
        };
        let files = restorer.files;
        for root in &roots {
            if let RootPlace::Volume(volume) = &root.place {
                volume.drop_orphans();
            }
        }
        let (monotonic_ns, realtime_ns) = (snapshot.monotonic_ns, snapshot.realtime_ns);
        Ok(Wasi {
            args: snapshot.args,
            env: snapshot.env,
            roots,
            network,
            table: Mutex::new(table),
            files,
            stdin: Stdin::new(stdin),
            stdout: resources.stdout,
            stderr: resources.stderr,
            clock: GuestClock::resume(resources.clock, monotonic_ns, realtime_ns),
            random: Random::new(snapshot.seed, snapshot.random.into_iter().collect()),
            limits,
        })
    }
}

/// Validation without opening anything.
fn check(snapshot: &Snapshot, resources: &Resources) -> Result<(), Error> {
    if snapshot.version != SNAPSHOT_VERSION {
        return Err(Error::Version {
            found: snapshot.version,
            supported: SNAPSHOT_VERSION,
        });
    }
    check_strings(&snapshot.args, &snapshot.env)?;
    check_preopen_names(snapshot.preopens.iter().map(|p| p.guest.as_str()))?;
    let (needed, given) = (snapshot.preopens.len(), resources.preopens.len());
    if needed != given {
        return Err(Error::Resources { needed, given });
    }
    for (record, source) in snapshot.preopens.iter().zip(&resources.preopens) {
        let is_volume = matches!(source, Source::Volume { .. } | Source::Backed { .. });
        if record.volume.is_some() != is_volume {
            return Err(Error::Damaged(format!(
                "preopen {:?} is of another kind",
                record.guest
            )));
        }
    }
    let descriptors_max = snapshot.descriptors_max.min(Limits::DESCRIPTORS_MAX) as usize;
    let bounds = [
        ("descriptors", snapshot.descriptors.len(), descriptors_max),
        ("random streams", snapshot.random.len(), RANDOM_STREAMS_MAX),
        ("listeners", snapshot.listeners as usize, descriptors_max),
    ];
    for (what, size, max) in bounds {
        if size > max {
            return Err(Error::TooMany { what, size, max });
        }
    }
    Ok(())
}

/// For each preopen, whether it is the source's own directory.
fn strict_roots(snapshot: &Snapshot, roots: &[Root]) -> Vec<bool> {
    let same_boot = !snapshot.boot_id.is_empty() && snapshot.boot_id == boot_id();
    let pairs = snapshot.preopens.iter().zip(roots);
    pairs
        .map(|(record, root)| {
            let id = FileId {
                device: record.device,
                inode: record.inode,
            };
            same_boot && matches!(root.place, RootPlace::Host { id: here, .. } if here == id)
        })
        .collect()
}

fn damaged(fd: u32, what: &str) -> Error {
    Error::Damaged(format!("descriptor {fd} {what}"))
}

fn rights(fd: u32, bits: u64) -> Result<Rights, Error> {
    Rights::from_bits(bits).ok_or_else(|| damaged(fd, "has unknown rights"))
}

/// Opens descriptors again.
struct Restorer<'r> {
    roots: &'r [Root],
    strict: Vec<bool>,
    files: OpenFiles,
    network: &'r Network,
    /// Those of descriptors that are not restored yet.
    connections: BTreeMap<u32, Arc<network::Connection>>,
}

impl Restorer<'_> {
    fn kind(&mut self, fd: u32, kind: DescriptorKind) -> Result<Kind, Error> {
        Ok(match kind {
            DescriptorKind::Stdin => Kind::Stdin,
            DescriptorKind::Stdout => Kind::Stdout,
            DescriptorKind::Stderr => Kind::Stderr,
            DescriptorKind::File(record) => self.file(fd, &record)?,
            DescriptorKind::Directory(record) => self.directory(fd, record)?,
            DescriptorKind::Listener(record) => {
                let backlog = self.network.listener(record.index);
                Kind::Listener(Listener {
                    backlog: backlog.ok_or_else(|| damaged(fd, "has no listener"))?,
                    index: record.index,
                    nonblocking: AtomicBool::new(record.nonblocking),
                })
            }
            DescriptorKind::Connection(record) => {
                let connection = self.connections.remove(&fd);
                Kind::Connection(Connection {
                    connection: connection
                        .unwrap_or_else(|| self.network.lost(record.local, record.peer)),
                    nonblocking: AtomicBool::new(record.nonblocking),
                })
            }
        })
    }

    fn file(&self, fd: u32, record: &FileRecord) -> Result<Kind, Error> {
        let flags =
            Fdflags::from_bits(record.flags).ok_or_else(|| damaged(fd, "has unknown flags"))?;
        let mode = Mode {
            read: record.host_read,
            write: record.host_write,
            sync: flags & (Fdflags::SYNC | Fdflags::DSYNC | Fdflags::RSYNC),
            follow: false,
        };
        let root = self.root(fd, &record.place)?;
        let open_at_all = mode.read || mode.write;
        let more_than_open = (record.readable && !mode.read) || (record.writable && !mode.write);
        if !open_at_all || more_than_open || (mode.write && root.read_only) {
            return Err(damaged(fd, "has an impossible open mode"));
        }
        let access = (record.readable, record.writable, flags);
        let mut file = match &record.place {
            Place::Volume { preopen, inode } => {
                let node = self.open_inode(fd, root, *inode)?;
                let regular = record.filetype == types::Filetype::RegularFile as u8;
                if node.is_directory() || !regular {
                    return Err(damaged(fd, "is not a file in its volume"));
                }
                open_node(node, (*preopen, root.read_only), mode, access)
            }
            Place::Host(place) => {
                let (file, metadata) = self.open_host(fd, place, mode)?;
                let filetype = filetype_of(FileType::from_raw_mode(metadata.mode())) as u8;
                let same_type = filetype == record.filetype;
                self.check_same(fd, place, FileId::of(&metadata), same_type)?;
                self.files.register_hidden(&place.path);
                let origin = (place.preopen, root.read_only);
                open_file(file, &metadata, origin, mode, access)
            }
        };
        file.offset = Mutex::new(record.offset);
        Ok(Kind::File(file))
    }

    fn directory(&self, fd: u32, record: DirectoryRecord) -> Result<Kind, Error> {
        let root = self.root(fd, &record.place)?;
        let (preopen, is_root) = match &record.place {
            Place::Host(place) => (place.preopen, place.path.is_empty()),
            Place::Volume { preopen, inode } => (*preopen, *inode == crate::volume::ROOT),
        };
        if record.preopened && !is_root {
            return Err(damaged(fd, "is a preopen below a preopen"));
        }
        let place = match &record.place {
            Place::Host(place) => {
                let mode = Mode {
                    read: true,
                    write: false,
                    sync: Fdflags::empty(),
                    follow: false,
                };
                let (file, metadata) = self.open_host(fd, place, mode)?;
                let id = FileId::of(&metadata);
                self.check_same(fd, place, id, metadata.is_dir())?;
                self.files.register_hidden(&place.path);
                let dir = Dir::from_std_file(file);
                DirPlace::Host { dir, id }
            }
            Place::Volume { inode, .. } => {
                let node = self.open_inode(fd, root, *inode)?;
                if !node.is_directory() {
                    return Err(damaged(fd, "is not a directory in its volume"));
                }
                DirPlace::Volume(node)
            }
        };
        let listing = record.listing.map(|entries| {
            let entries = entries.into_iter().map(|entry| Entry {
                name: entry.name,
                inode: entry.inode,
                filetype: entry.filetype,
            });
            entries.collect()
        });
        Ok(Kind::Directory(OpenDirectory {
            place,
            root: preopen,
            preopened_as: record.preopened.then(|| root.guest.clone()),
            read_only: root.read_only,
            listing: Mutex::new(listing),
        }))
    }

    fn root(&self, fd: u32, place: &Place) -> Result<&Root, Error> {
        let preopen = match place {
            Place::Volume { preopen, .. } => *preopen,
            Place::Host(place) => {
                let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
                if !place.path.is_empty() && !place.path.split('/').all(plain) {
                    return Err(damaged(fd, "has a path that is not plain"));
                }
                place.preopen
            }
        };
        self.roots
            .get(preopen as usize)
            .ok_or_else(|| damaged(fd, "is in a preopen that does not exist"))
    }

    fn open_inode(&self, fd: u32, root: &Root, inode: u64) -> Result<OpenNode, Error> {
        let RootPlace::Volume(volume) = &root.place else {
            return Err(damaged(fd, "is in a missing volume"));
        };
        volume
            .open_inode(inode)
            .map_err(|_| damaged(fd, "is not in its volume"))
    }

    fn open_host(
        &self,
        fd: u32,
        place: &HostPlace,
        mode: Mode,
    ) -> Result<(std::fs::File, std::fs::Metadata), Error> {
        let path = if place.path.is_empty() {
            "."
        } else {
            &place.path
        };
        let root = self.roots.get(place.preopen as usize);
        let Some(RootPlace::Host { dir, .. }) = root.map(|root| &root.place) else {
            return Err(damaged(fd, "is not in a volume"));
        };
        let opened = dir.open_with(path, &mode.options()).and_then(|file| {
            let file = file.into_std();
            let metadata = file.metadata()?;
            Ok((file, metadata))
        });
        opened.map_err(|source| self.reopen(fd, place, source))
    }

    fn reopen(&self, fd: u32, place: &HostPlace, source: std::io::Error) -> Error {
        Error::Reopen {
            fd,
            guest: self.guest(place),
            path: place.path.clone(),
            source,
        }
    }

    fn guest(&self, place: &HostPlace) -> String {
        let root = self.roots.get(place.preopen as usize);
        root.map(|root| root.guest.clone()).unwrap_or_default()
    }

    fn check_same(
        &self,
        fd: u32,
        place: &HostPlace,
        id: FileId,
        same_type: bool,
    ) -> Result<(), Error> {
        let recorded = FileId {
            device: place.device,
            inode: place.inode,
        };
        let strict = self.strict.get(place.preopen as usize).copied();
        let difference = if !same_type {
            "type"
        } else if strict == Some(true) && recorded != id {
            "device or inode number"
        } else {
            return Ok(());
        };
        Err(Error::Changed {
            fd,
            guest: self.guest(place),
            path: place.path.clone(),
            difference,
        })
    }
}
