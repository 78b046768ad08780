//! Volumes: quotas, tracked changes while the guest writes, hostile records, and a host without
//! disk space.

mod common;
use common::*;
use keel_wasi::volume::{
    BLOCK_BYTES, Backed, Backing, BlockReader, BlockWriter, Fault, LocalBlocks, NodeBody,
    NodeRecord, Pending, Promise, Stalls, Usage, Volume, VolumeLimits, VolumeRecord,
};
use keel_wasi::*;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn source(folder: &Path, bytes_max: u64, inodes_max: u64) -> Source {
    Source::Volume {
        folder: folder.to_owned(),
        limits: VolumeLimits {
            bytes_max,
            inodes_max,
        },
        stalls: Arc::default(),
    }
}

fn config(source: Source) -> Config {
    Config {
        preopens: vec![Preopen {
            source,
            guest: "/".to_owned(),
            read_only: false,
        }],
        ..Config::default()
    }
}

fn usage(guest: &Guest) -> Usage {
    guest.wasi.volumes()[0].1.usage()
}

#[test]
fn bytes_have_a_quota() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(config(source(dir.path(), 1 << 20, 100)));
    let used = || usage(&guest).bytes;
    let a = guest.open("a", CREAT, RW).unwrap();
    assert_eq!(used(), 0);
    assert_eq!(guest.write(a, b"x"), Ok(1));
    assert_eq!(used(), 4096);
    guest.write(a, &[1; 5000]).unwrap();
    assert_eq!(used(), 8192);
    // Holes are free but for the blocks around them.
    let size = |fd: u32, size| guest.run("fd_filestat_set_size", &[fd.into(), size]);
    assert_eq!(size(a, 1 << 40), Ok(()));
    assert_eq!(used(), 65536);
    assert_eq!(size(a, (1 << 43) + 1), Err(Errno::Fbig));
    assert_eq!(guest.pwrite(a, b"x", 1 << 43), Err(Errno::Fbig));
    assert_eq!(guest.pwrite(a, b"xyz", (1 << 43) - 1), Ok(1));
    assert_eq!(used(), 2 * 65536);
    assert_eq!(guest.pread(a, 9, (1 << 43) - 3), Ok(vec![0, 0, b'x']));
    assert_eq!(size(a, 5001), Ok(()));
    assert_eq!(used(), 8192);
    assert_eq!(size(a, 0), Ok(()));
    assert_eq!(used(), 0);

    // What fits is written, then nothing.
    let b = guest.open("b", CREAT, RW).unwrap();
    guest.write(b, &[2; 300_000]).unwrap();
    guest.seek(a, 0, 0).unwrap();
    let rest = guest.write(a, &[3; 1 << 20]).unwrap();
    assert_eq!(u64::from(rest), (1 << 20) - 5 * 65536 + 65536 - 40960);
    assert_eq!(used(), 1 << 20);
    assert_eq!(guest.write(a, b"x"), Err(Errno::Nospc));
    assert_eq!(guest.pwrite(b, b"x", 310_000), Err(Errno::Nospc));
    // Over what is there already there is room.
    assert_eq!(guest.pwrite(b, &[4; 1000], 299_500), Ok(1000));
    assert_eq!(size(b, 327_680), Err(Errno::Nospc));
    assert_eq!(guest.stat(b).unwrap().size, 300_500);
    // A removed file counts as long as it is open.
    guest.unlink("a").unwrap();
    assert_eq!(guest.pwrite(b, b"x", 310_000), Err(Errno::Nospc));
    guest.close(a).unwrap();
    assert_eq!(guest.pwrite(b, b"x", 310_000), Ok(1));
    assert_eq!(used(), 4 * 65536 + 49152);
    guest.open("b", TRUNC, RW).unwrap();
    assert_eq!(used(), 0);
    assert_eq!(guest.wasi.volumes()[0].1.limits().bytes_max, 1 << 20);
}

#[test]
fn files_have_a_quota() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(config(source(dir.path(), 1 << 20, 5)));
    guest.mkdir("d").unwrap();
    guest.symlink("d", "s").unwrap();
    let a = guest.open("a", CREAT, RW).unwrap();
    guest.open("b", CREAT, RW).unwrap();
    assert_eq!(usage(&guest).inodes, 5);
    assert_eq!(guest.open("c", CREAT, RW), Err(Errno::Nospc));
    assert_eq!(guest.mkdir("c"), Err(Errno::Nospc));
    assert_eq!(guest.symlink("d", "c"), Err(Errno::Nospc));
    assert!(guest.open("b", CREAT, RW).is_ok());
    // Names have one, too.
    for name in 0..6 {
        assert_eq!(guest.link(0, "a", &format!("d/{name}")), Ok(()));
    }
    assert_eq!(guest.link(0, "a", "d/6"), Err(Errno::Nospc));
    guest.rename("d/0", "d/7").unwrap();
    guest.unlink("b").unwrap();
    assert_eq!(guest.open("c", CREAT, RW), Err(Errno::Nospc));
    guest.rmdir("d").unwrap_err();
    guest.unlink("s").unwrap();
    assert!(guest.open("c", CREAT, RW).is_ok());
    let long = "x".repeat(256);
    assert_eq!(guest.mkdir(&long), Err(Errno::Nametoolong));
    assert_eq!(guest.stat_at(0, &long), Err(Errno::Nametoolong));
    assert_eq!(guest.stat(a).unwrap().nlink, 7);
}

#[test]
fn preopens_are_told_apart() {
    let dirs = [0; 3].map(|_| tempfile::tempdir().unwrap());
    let sources = [
        source(&dirs[0].path().join("made"), 1 << 20, 100),
        source(dirs[1].path(), 1 << 20, 100),
        Source::Host(dirs[2].path().to_owned()),
    ];
    let preopens = sources.into_iter().map(|source| Preopen {
        source,
        guest: "/".into(),
        read_only: false,
    });
    let guest = Guest::new(Config {
        preopens: preopens.collect(),
        ..Config::default()
    });
    let device = |fd| {
        guest.stat(fd).unwrap();
        guest.u64_at(0)
    };
    assert_ne!(device(3), device(4));
    assert_ne!(device(3), device(5));
    guest.put(4096, b"fg");
    for fd in 3..6 {
        guest.open_at(fd, 0, "f", [CREAT, RW, 0]).unwrap();
        for other in (3..6).filter(|other| *other != fd) {
            let rename = [fd.into(), 4096, 1, other.into(), 4097, 1];
            assert_eq!(guest.run("path_rename", &rename), Err(Errno::Xdev));
            let link = [fd.into(), 0, 4096, 1, other.into(), 4097, 1];
            assert_eq!(guest.run("path_link", &link), Err(Errno::Xdev));
        }
    }
    // A folder that is not empty belongs to another volume.
    let error = Wasi::new(config(source(dirs[2].path(), 1, 1)))
        .err()
        .unwrap();
    assert!(error.to_string().contains("not empty"), "{error}");
}

/// Threads write, cut and remove while rounds are copied; after the last round
/// the copy is the same.
#[test]
fn rounds_miss_nothing() {
    for seed in 0..8 {
        let dirs = [0; 2].map(|_| tempfile::tempdir().unwrap());
        let guest = Guest::new(config(source(dirs[0].path(), 64 << 20, 1000)));
        let (_, volume) = guest.wasi.volumes().remove(0);
        let tracker = volume.track();
        let mut writer = BlockWriter::new(dirs[1].path()).unwrap();
        let mut reader = BlockReader::new(volume.clone());
        let mut round = || {
            let changes = tracker.take();
            for &(inode, from) in &changes.cuts {
                writer.cut(inode, from).unwrap();
            }
            let mut buffer = vec![0; BLOCK_BYTES as usize];
            for (inode, piece) in changes.pieces() {
                let buffer = &mut buffer[..(piece.end - piece.start) as usize];
                let count = reader.read(inode, piece.start, buffer).unwrap();
                writer.write(inode, piece.start, &buffer[..count]).unwrap();
            }
            changes.bytes()
        };
        std::thread::scope(|scope| {
            let threads = (0..3_u64).map(|tid| {
                let wasi = guest.wasi.clone();
                scope.spawn(move || {
                    let guest = Guest::thread(wasi, tid as u32);
                    let mut random = ChaCha8Rng::seed_from_u64(seed * 10 + tid);
                    for _ in 0..400 {
                        let name = format!("f{}", random.random_range(0..4));
                        let fd = guest.open(&name, CREAT, RW).unwrap();
                        let at = random.random_range(0..500_000);
                        let bytes = vec![random.random(); random.random_range(0..90_000)];
                        match random.random_range(0..10) {
                            0 => drop(guest.unlink(&name)),
                            1 => drop(guest.rename(&name, "f0")),
                            2 | 3 => guest.run("fd_filestat_set_size", &[fd.into(), at]).unwrap(),
                            _ => drop(guest.pwrite(fd, &bytes, at).unwrap()),
                        }
                        guest.close(fd).unwrap();
                    }
                })
            });
            let threads = threads.collect::<Vec<_>>();
            while threads.iter().any(|thread| !thread.is_finished()) {
                round();
            }
        });
        round();
        assert_eq!(round(), 0);
        let resources = Resources {
            preopens: vec![source(dirs[1].path(), 64 << 20, 1000)],
            ..Resources::default()
        };
        let snapshot = guest.wasi.snapshot().unwrap();
        let copy = Guest::with(Wasi::restore(snapshot, resources).unwrap());
        assert_eq!(usage(&copy), usage(&guest));
        assert_eq!(copy.list(3), guest.list(3));
        for name in guest.list(3) {
            let read = |guest: &Guest| {
                let fd = guest.open(&name, 0, READ).unwrap();
                let bytes = guest.pread(fd, 1 << 20, 0).unwrap();
                guest.close(fd).unwrap();
                bytes
            };
            assert!(read(&copy) == read(&guest), "seed {seed}, {name}");
        }
        // Nothing is left of what was removed.
        let mut inodes = Vec::new();
        for node in copy.wasi.snapshot().unwrap().preopens[0]
            .volume
            .iter()
            .flat_map(|volume| &volume.nodes)
        {
            inodes.push(node.inode.to_string());
        }
        let files = names(dirs[1].path());
        assert!(files.iter().all(|file| inodes.contains(file)), "{files:?}");
    }
}

fn record(snapshot: &mut Snapshot) -> &mut VolumeRecord {
    snapshot.preopens[0].volume.as_mut().unwrap()
}

fn entries(record: &mut VolumeRecord, node: usize) -> &mut Vec<(String, u64)> {
    match &mut record.nodes[node].body {
        NodeBody::Directory { entries, .. } => entries,
        other => panic!("{other:?}"),
    }
}

fn file(record: &mut VolumeRecord, node: usize) -> (&mut u64, &mut Vec<(u64, u64)>) {
    match &mut record.nodes[node].body {
        NodeBody::File { size, blocks } => (size, blocks),
        other => panic!("{other:?}"),
    }
}

#[test]
fn damaged_volumes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(config(source(dir.path(), 1 << 20, 10)));
    // 1 root, 2 d, 3 d/e, 4 f, 5 s
    guest.mkdir("d").unwrap();
    guest.mkdir("d/e").unwrap();
    let fd = guest.open("f", CREAT, RW).unwrap();
    guest.pwrite(fd, &[1; 9], 70_000).unwrap();
    guest.symlink("f", "s").unwrap();
    let good = guest.wasi.snapshot().unwrap();
    let resources = || Resources {
        preopens: vec![source(dir.path(), 1 << 20, 10)],
        ..Resources::default()
    };
    let copy = Wasi::restore(good.clone(), resources()).unwrap();
    let mut again = copy.snapshot().unwrap();
    again.monotonic_ns = good.monotonic_ns;
    again.realtime_ns = good.realtime_ns;
    assert_eq!(again, good);
    type Damage = fn(&mut VolumeRecord);
    let damages: &[Damage] = &[
        |r| r.next_inode = 5,
        |r| r.nodes[0].inode = 0,
        |r| r.nodes[0].inode = 7,
        |r| r.nodes.clear(),
        |r| r.nodes.push(r.nodes[4].clone()),
        |r| drop(r.nodes.remove(3)),
        |r| drop(r.nodes.remove(2)),
        |r| drop(entries(r, 0).remove(0)),
        |r| entries(r, 0)[0].0 = "..".into(),
        |r| entries(r, 0)[0].0 = "a/b".into(),
        |r| entries(r, 0)[0].0 = "a\0".into(),
        |r| entries(r, 0)[0].0 = String::new(),
        |r| entries(r, 0)[0].0 = "a".repeat(256),
        |r| entries(r, 0).swap(0, 1),
        |r| entries(r, 0)[1].1 = 2,
        |r| entries(r, 0)[1].1 = 1,
        |r| entries(r, 0)[1].1 = 99,
        |r| entries(r, 0)[0].1 = 3,
        // Within itself, out of sight.
        |r| {
            entries(r, 0).remove(0);
            entries(r, 2).push(("d".into(), 2));
            r.nodes[1].body = NodeBody::Directory {
                parent: 3,
                entries: vec![("e".into(), 3)],
            };
        },
        |r| *file(r, 3).0 = u64::MAX,
        |r| *file(r, 3).0 = 65536,
        |r| file(r, 3).1.push((0, 1)),
        |r| file(r, 3).1[0] = (1, 0),
        |r| file(r, 3).1[0] = (u64::MAX, 2),
        |r| {
            *file(r, 3).0 = 1 << 43;
            *file(r, 3).1 = vec![(0, 300)];
        },
        |r| {
            r.nodes[4].body = NodeBody::Link {
                contents: String::new(),
            };
        },
        |r| {
            r.nodes[4].body = NodeBody::Link {
                contents: "a".repeat(4096),
            };
        },
        |r| {
            let more = (10..16).map(|inode| NodeRecord {
                inode,
                ..r.nodes[4].clone()
            });
            let more = more.collect::<Vec<_>>();
            r.nodes.extend(more);
            r.next_inode = 100;
        },
        |r| r.nodes[0].body = r.nodes[4].body.clone(),
    ];
    for (index, damage) in damages.iter().enumerate() {
        let mut snapshot = good.clone();
        damage(record(&mut snapshot));
        let error = Wasi::restore(snapshot, resources()).err();
        let damaged = matches!(error, Some(Error::Damaged(_)));
        assert!(damaged, "damage {index}: {error:?}");
    }
    // Of another kind, or descriptors of what is not there.
    let mut other = good.clone();
    other.preopens[0].volume = None;
    assert!(Wasi::restore(other, resources()).is_err());
    let hosts = Resources {
        preopens: vec![Source::Host(dir.path().to_owned())],
        ..Resources::default()
    };
    assert!(Wasi::restore(good.clone(), hosts).is_err());
    for inode in [0, 1, 2, 5, 77] {
        let mut other = good.clone();
        match &mut other.descriptors[4].kind {
            DescriptorKind::File(file) => file.place = Place::Volume { preopen: 0, inode },
            kind => panic!("{kind:?}"),
        }
        assert!(Wasi::restore(other, resources()).is_err(), "{inode}");
    }
    // Unreferenced nodes are removed.
    let mut orphan = good.clone();
    entries(record(&mut orphan), 0).remove(1);
    orphan.descriptors.truncate(4);
    let orphan = Wasi::restore(orphan, resources()).unwrap();
    assert_eq!(orphan.volumes()[0].1.usage().inodes, 4);
    // Bytes cut off or flipped end in an error or in something checked.
    let bytes = postcard::to_allocvec(&good).unwrap();
    for index in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[index] ^= 1 << (index % 8);
        if let Ok(snapshot) = postcard::from_bytes(&flipped)
            && let Ok(wasi) = Wasi::restore(snapshot, resources())
        {
            let guest = Guest::with(wasi);
            let _ = guest.readdir(3, 1000, 0);
            let _ = guest.open("d/e/x", CREAT, RW);
            let _ = guest.wasi.snapshot();
        }
    }
}

/// Where the disk has room for a MiB only. The test runs itself there, since
/// only a namespace of its own lets it mount one.
#[test]
fn a_full_disk_is_waited_for() {
    const VARIABLE: &str = "KEEL_TEST_SMALL_DISK";
    let Some(dir) = std::env::var_os(VARIABLE) else {
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "mount -t tmpfs -o size=1m none \"${VARIABLE}\" && exec \"$0\" --exact a_full_disk_is_waited_for"
        );
        let status = std::process::Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
            .arg(std::env::current_exe().unwrap())
            .env(VARIABLE, dir.path())
            .status();
        assert!(status.unwrap().success(), "see above (unshare is needed)");
        return;
    };
    let dir = Path::new(&dir);
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    let stalls = Arc::new(Stalls::new(move |full| tell.lock().unwrap().push(full)));
    let data = dir.join("volume");
    let limits = VolumeLimits::of_bytes(1 << 30);
    let guest = Guest::new(config(Source::Volume {
        folder: data.clone(),
        limits,
        stalls: stalls.clone(),
    }));
    let fd = guest.open("f", CREAT, RW).unwrap();
    let ballast = dir.join("ballast");
    std::fs::write(&ballast, vec![1; 600 << 10]).unwrap();
    // The disk takes some of it, which is an effect.
    let block = (0..300_000).map(|at| (at % 251) as u8).collect::<Vec<_>>();
    let mut done = guest.write(fd, &block).unwrap() as usize;
    assert_eq!(stalls.full(), None);
    // The rest waits, and leaves when it is asked to.
    let [iovs, count] = guest.vectors(&[(600_000 - done) as u32]);
    guest.flag.request();
    let started = Instant::now();
    loop {
        let rest = block.iter().cycle().skip(done).take(600_000 - done);
        guest.put(65536, &rest.copied().collect::<Vec<_>>());
        match guest.outcome("fd_write", &[fd.into(), iovs, count, 0]) {
            Outcome::Done(0) => done += guest.u32_at(0) as usize,
            Outcome::Interrupted => break,
            other => panic!("{other:?}"),
        }
        assert!(started.elapsed() < Duration::from_secs(60) && done < 600_000);
    }
    guest.flag.clear();
    let path = Some(data.display().to_string());
    assert_eq!(
        (stalls.full(), guest.tell(fd)),
        (path.clone(), Ok(done as u64))
    );
    assert_eq!(*told.lock().unwrap(), [path]);
    // All else goes on.
    assert_eq!(guest.pread(fd, 3, 0), Ok(vec![0, 1, 2]));
    guest.mkdir("d").unwrap();
    let used = usage(&guest).bytes;
    // Space becomes available while the call is repeated: it completes normally.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(700));
            std::fs::remove_file(&ballast).unwrap();
        });
        while done < 600_000 {
            let rest = block.iter().cycle().skip(done).take(600_000 - done);
            done += guest.write(fd, &rest.copied().collect::<Vec<_>>()).unwrap() as usize;
        }
    });
    assert_eq!(
        (stalls.full(), told.lock().unwrap().pop()),
        (None, Some(None))
    );
    assert!(usage(&guest).bytes > used);
    let all = block.iter().cycle().take(600_000).copied();
    assert!(guest.pread(fd, 600_000, 0).unwrap() == all.collect::<Vec<_>>());
}

/// A backend controlled by the test.
#[derive(Debug, Default)]
struct Slow {
    asked: Mutex<Vec<Promise>>,
    behind: std::sync::atomic::AtomicBool,
}

impl Slow {
    fn ask(&self) -> Pending {
        let (pending, promise) = Pending::new();
        self.asked.lock().unwrap().push(promise);
        pending
    }

    fn answer(&self, outcome: Result<(), Fault>) {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        assert!(!asked.is_empty());
        asked.into_iter().for_each(|it| it.settle(outcome.clone()));
    }
}

impl Backing for Slow {
    fn fetch(&self, _: &Arc<Volume>, _: u64, _: std::ops::Range<u64>) -> Pending {
        self.ask()
    }

    fn sync(&self) -> Pending {
        self.ask()
    }

    fn backpressure(&self) -> Option<Pending> {
        let behind = self.behind.load(std::sync::atomic::Ordering::Relaxed);
        behind.then(|| self.ask())
    }
}

/// Calls that wait for a backend can be interrupted, are repeated without a second effect, and
/// report the reason of their wait.
#[test]
fn a_slow_backing_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let slow = Arc::new(Slow::default());
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    let stalls = Arc::new(Stalls::new(move |full| tell.lock().unwrap().push(full)));
    let guest = Guest::new(config(Source::Backed {
        folder: dir.path().join("volume"),
        limits: VolumeLimits::of_bytes(1 << 20),
        stalls: stalls.clone(),
        backed: Backed {
            backing: slow.clone(),
            record: None,
            local: LocalBlocks::default(),
        },
    }));
    // In append mode a second write would be seen.
    let fd = guest
        .open_at(3, 0, "f", [CREAT, RW, APPEND | SYNC])
        .unwrap();
    guest.put(65536, b"abc");
    let [iovs, count] = guest.vectors(&[3]);
    let write = || guest.outcome("fd_write", &[fd.into(), iovs, count, 0]);
    guest.flag.request();
    for _ in 0..3 {
        assert_eq!(write(), Outcome::Interrupted);
    }
    guest.flag.clear();
    // (Another call of this guest would make it a new one.)
    let node = guest.wasi.volumes()[0].1.record().nodes.pop().unwrap();
    assert!(
        matches!(node.body, NodeBody::File { size: 3, .. }),
        "{node:?}"
    );
    let answered = |outcome: Result<(), Fault>, call: &dyn Fn() -> Outcome| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while slow.asked.lock().unwrap().is_empty() {
                    std::thread::yield_now();
                }
                slow.answer(outcome);
            });
            call()
        })
    };
    slow.asked.lock().unwrap().clear();
    assert_eq!(answered(Ok(()), &write), Outcome::Done(0));
    assert_eq!((guest.u32_at(0), guest.stat(fd).unwrap().size), (3, 3));
    // Lost: an I/O error. Unavailable: paused, with retries.
    let sync = || guest.outcome("fd_sync", &[fd.into()]);
    let lost = answered(Err(Fault::Lost), &sync);
    assert_eq!(lost, Outcome::Done(Errno::Io as i32));
    assert_eq!(*told.lock().unwrap(), []);
    guest.flag.request();
    let away = Err(Fault::Unavailable("the store is away".into()));
    assert_eq!(sync(), Outcome::Interrupted);
    guest.flag.clear();
    slow.asked.lock().unwrap().clear();
    let repeated = std::thread::scope(|scope| {
        scope.spawn(|| {
            for outcome in [away, Ok(())] {
                while slow.asked.lock().unwrap().is_empty() {
                    std::thread::yield_now();
                }
                if outcome.is_ok() {
                    assert_eq!(stalls.full().as_deref(), Some("the store is away"));
                }
                slow.answer(outcome);
            }
        });
        sync()
    });
    assert_eq!((repeated, stalls.full()), (Outcome::Done(0), None));
    let heard = [Some("the store is away".to_owned()), None];
    assert_eq!(*told.lock().unwrap(), heard);
    // A writer that outpaces the backend waits before the write.
    slow.behind
        .store(true, std::sync::atomic::Ordering::Relaxed);
    guest.flag.request();
    assert_eq!(write(), Outcome::Interrupted);
    guest.flag.clear();
    assert_eq!(guest.stat(fd).unwrap().size, 3);
}
