//! What a guest's `/` is in tests: a folder of the host, a volume of its own, or one whose bytes are
//! kept elsewhere.

use super::{Guest, Kind, READ};
use keel_wasi::volume::{
    BLOCK_BYTES, Backed, Backing, BlockReader, BlockWriter, LocalBlocks, NodeBody, Pending, Stalls,
    Tracker, Volume, VolumeLimits,
};
use keel_wasi::*;
use std::cell::RefCell;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Room in a sandbox's volume.
pub const VOLUME_BYTES: u64 = 64 << 20;

/// What a guest's `/` (descriptor 3) is.
pub struct Sandbox {
    pub kind: Kind,
    pub dir: tempfile::TempDir,
    /// Where a kept volume's bytes are.
    elsewhere: Arc<Elsewhere>,
    copying: RefCell<Option<Copying>>,
}

/// A backend that stores a volume's bytes in another folder.
#[derive(Debug)]
struct Elsewhere {
    folder: tempfile::TempDir,
    fetched: AtomicU64,
}

impl Backing for Elsewhere {
    fn fetch(&self, volume: &Arc<Volume>, inode: u64, blocks: Range<u64>) -> Pending {
        let (pending, promise) = Pending::new();
        let file = std::fs::File::open(self.folder.path().join(inode.to_string())).unwrap();
        let absent = volume.absent(inode, blocks.clone());
        assert_eq!(absent, blocks.collect::<Vec<_>>());
        for block in absent {
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            let count = file.read_at(&mut bytes, block * BLOCK_BYTES).unwrap();
            volume.fill(inode, block, &bytes[..count]).unwrap();
            self.fetched.fetch_add(1, Ordering::Relaxed);
        }
        promise.settle(Ok(()));
        pending
    }

    fn sync(&self) -> Pending {
        let (pending, promise) = Pending::new();
        promise.settle(Ok(()));
        pending
    }

    fn backpressure(&self) -> Option<Pending> {
        None
    }
}

/// A volume on its way into another folder, as in a move.
struct Copying {
    tracker: Tracker,
    reader: BlockReader,
    writer: BlockWriter,
    /// For a volume with a backend only whole blocks are copied, to the backend.
    is_kept: bool,
    folder: tempfile::TempDir,
}

impl Copying {
    fn keep(volume: Arc<Volume>, elsewhere: &Elsewhere) -> Self {
        Self {
            tracker: volume.track_changes(),
            reader: BlockReader::new(volume),
            writer: BlockWriter::new(elsewhere.folder.path()).unwrap(),
            is_kept: true,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn begin(volume: Arc<Volume>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            tracker: volume.track(),
            reader: BlockReader::new(volume),
            writer: BlockWriter::new(folder.path()).unwrap(),
            is_kept: false,
            folder,
        }
    }

    fn round(&mut self) {
        let mut changes = self.tracker.take();
        if self.is_kept {
            changes = changes.whole_blocks();
        }
        for &(inode, from) in &changes.cuts {
            self.writer.cut(inode, from).unwrap();
        }
        let mut buffer = vec![0; BLOCK_BYTES as usize];
        for (inode, piece) in changes.pieces() {
            let buffer = &mut buffer[..(piece.end - piece.start) as usize];
            let count = self.reader.read(inode, piece.start, buffer).unwrap();
            let written = self.writer.write(inode, piece.start, &buffer[..count]);
            written.unwrap();
        }
    }
}

pub fn volume_source(folder: &Path) -> Source {
    Source::Volume {
        folder: folder.to_owned(),
        limits: VolumeLimits::of_bytes(VOLUME_BYTES),
        stalls: Arc::new(Stalls::default()),
    }
}

impl Sandbox {
    /// Blocks fetched for a volume with a backend.
    pub fn fetched(&self) -> u64 {
        self.elsewhere.fetched.load(Ordering::Relaxed)
    }

    fn kept_source(&self, folder: &Path) -> Source {
        Source::Backed {
            folder: folder.to_owned(),
            limits: VolumeLimits::of_bytes(VOLUME_BYTES),
            stalls: Arc::new(Stalls::default()),
            backed: Backed {
                backing: self.elsewhere.clone(),
                record: None,
                local: LocalBlocks::default(),
            },
        }
    }

    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            dir: tempfile::tempdir().unwrap(),
            elsewhere: Arc::new(Elsewhere {
                folder: tempfile::tempdir().unwrap(),
                fetched: AtomicU64::new(0),
            }),
            copying: RefCell::new(None),
        }
    }

    /// A guest in it, which finds what `prepare` puts there.
    pub fn guest_with(
        &self,
        read_only: bool,
        limits: Limits,
        prepare: impl FnOnce(&Path),
    ) -> Guest {
        let prepared = tempfile::tempdir().unwrap();
        let source = match self.kind {
            Kind::Host => {
                prepare(self.dir.path());
                Source::Host(self.dir.path().to_owned())
            }
            Kind::Own => {
                prepare(prepared.path());
                volume_source(self.dir.path())
            }
            Kind::Kept => {
                prepare(prepared.path());
                self.kept_source(self.dir.path())
            }
        };
        let guest = Guest::new(Config {
            preopens: vec![Preopen {
                source,
                guest: "/".to_owned(),
                read_only,
            }],
            seed: Some([3; 32]),
            limits,
            ..Config::default()
        });
        if self.kind != Kind::Host {
            let (_, volume) = guest.wasi.volumes().remove(0);
            if self.kind == Kind::Kept {
                self.watch(&guest);
            }
            volume.import(prepared.path(), 1).unwrap();
            if self.kind == Kind::Own {
                self.watch(&guest);
            }
        }
        guest
    }

    fn watch(&self, guest: &Guest) {
        let volume = guest.wasi.volumes().pop();
        let copying = volume.map(|(_, volume)| match self.kind {
            Kind::Kept => Copying::keep(volume, &self.elsewhere),
            Kind::Host | Kind::Own => Copying::begin(volume),
        });
        self.copying.replace(copying);
    }

    /// Copies changes, as a move does while the guest runs.
    pub fn round(&self) {
        if let Some(copying) = &mut *self.copying.borrow_mut() {
            copying.round();
        }
    }

    /// Captures, serialises and resumes: with the same directory, or with the copy of the volume.
    pub fn moved(&self, guest: Guest) -> Guest {
        let snapshot = guest.wasi.snapshot().unwrap();
        self.moved_as(guest, &snapshot)
    }

    /// The same guest without any descriptor but the first four.
    pub fn reopened(&self, guest: Guest) -> Guest {
        let mut snapshot = guest.wasi.snapshot().unwrap();
        snapshot.descriptors.truncate(4);
        self.moved_as(guest, &snapshot)
    }

    fn moved_as(&self, guest: Guest, snapshot: &Snapshot) -> Guest {
        self.round();
        let copied = self.copying.take();
        let source = match &copied {
            None => Source::Host(self.dir.path().to_owned()),
            Some(copying) if copying.is_kept => self.kept_source(copying.folder.path()),
            Some(copying) => volume_source(copying.folder.path()),
        };
        let moved = guest.moved_as(
            snapshot,
            Resources {
                preopens: vec![source],
                ..Resources::default()
            },
        );
        self.watch(&moved);
        // The volume's folder must outlive it.
        if let Some(copying) = copied {
            let _ = copying.folder.keep();
        }
        moved
    }

    /// Names in the root, hidden ones too.
    pub fn names(&self, guest: &Guest) -> Vec<String> {
        match self.kind {
            Kind::Host => names(self.dir.path()),
            Kind::Own | Kind::Kept => {
                let snapshot = guest.wasi.snapshot().unwrap();
                let volume = snapshot.preopens[0].volume.as_ref().unwrap();
                match &volume.nodes[0].body {
                    NodeBody::Directory { entries, .. } => {
                        entries.iter().map(|(name, _)| name.clone()).collect()
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    /// All bytes of a file.
    pub fn read(&self, guest: &Guest, name: &str) -> Vec<u8> {
        match self.kind {
            Kind::Host => std::fs::read(self.dir.path().join(name)).unwrap(),
            Kind::Own | Kind::Kept => {
                let fd = guest.open(name, 0, READ).unwrap();
                let size = guest.stat(fd).unwrap().size;
                let bytes = guest.pread(fd, size as u32, 0).unwrap();
                guest.close(fd).unwrap();
                bytes
            }
        }
    }

    /// Files that are kept only because they are open.
    pub fn hidden(&self, guest: &Guest) -> usize {
        match self.kind {
            Kind::Host => {
                let names = names(self.dir.path()).into_iter();
                names
                    .filter(|name| name.starts_with(".keel-unlinked-"))
                    .count()
            }
            Kind::Own | Kind::Kept => {
                let snapshot = guest.wasi.snapshot().unwrap();
                let volume = snapshot.preopens[0].volume.as_ref().unwrap();
                let named = |inode: u64| {
                    volume.nodes.iter().any(|node| match &node.body {
                        NodeBody::Directory { entries, .. } => {
                            entries.iter().any(|(_, entry)| *entry == inode)
                        }
                        _ => inode == 1,
                    })
                };
                let nodes = volume.nodes.iter();
                nodes
                    .filter(|node| node.inode != 1 && !named(node.inode))
                    .count()
            }
        }
    }
}

/// A host directory and a config that preopens it as `/` (descriptor 3).
pub fn sandbox() -> (tempfile::TempDir, Config) {
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        preopens: vec![preopen(dir.path(), false)],
        seed: Some([3; 32]),
        ..Config::default()
    };
    (dir, config)
}

pub fn preopen(host: &Path, read_only: bool) -> Preopen {
    Preopen {
        source: Source::Host(host.to_owned()),
        guest: "/".to_owned(),
        read_only,
    }
}

pub fn in_sandbox(kind: Kind) -> (Sandbox, Guest) {
    let sandbox = Sandbox::new(kind);
    let guest = sandbox.guest_with(false, Limits::default(), |_| {});
    (sandbox, guest)
}

pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
