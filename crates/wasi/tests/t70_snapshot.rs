//! Snapshots: their contents, refused ones, and hostile ones.

mod common;
use common::*;
use keel_wasi::*;

both! {
    files_are_opened_again_as_they_were
    a_snapshot_does_no_harm
    closed_preopens_and_renumbered_descriptors
    threads_and_hidden_files
}
use std::sync::Arc;

fn restore(guest: &Guest, dir: &std::path::Path) -> Result<Guest, String> {
    let snapshot = guest.wasi.snapshot().map_err(|error| error.to_string())?;
    let wasi = Wasi::restore(snapshot, resources(dir));
    wasi.map(Guest::with).map_err(|error| error.to_string())
}

fn files_are_opened_again_as_they_were(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    let made = guest
        .open_at(3, 0, "made", [CREAT | EXCL, RW, APPEND])
        .unwrap();
    guest.write(made, b"abc").unwrap();
    // Truncating and creating are not repeated.
    let truncated = guest.open("made", TRUNC, RW).unwrap();
    guest.write(truncated, b"0123456789").unwrap();
    guest.seek(truncated, 4, 0).unwrap();
    let reader = guest.open("made", 0, READ).unwrap();
    let only_created = guest.open("other", CREAT, READ).unwrap();
    let fdstats = |guest: &Guest| {
        [3, made, truncated, reader, only_created].map(|fd| guest.fdstat(fd).unwrap())
    };
    let before = fdstats(&guest);
    let guest = sandbox.moved(guest);
    assert_eq!(fdstats(&guest), before);
    assert_eq!(guest.read(truncated, 3), Ok(b"456".to_vec()));
    assert_eq!(guest.tell(made), Ok(3));
    guest.write(made, b"!").unwrap();
    assert_eq!(guest.tell(made), Ok(11));
    assert_eq!(guest.write(reader, b"x"), Err(Errno::Badf));
    assert_eq!(guest.run("fd_prestat_get", &[3, 0]), Ok(()));
    assert_eq!(guest.open("next", CREAT, RW), Ok(only_created + 1));
    assert_eq!(sandbox.read(&guest, "made"), b"0123456789!");
}

fn a_snapshot_does_no_harm(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    let fd = guest.open("f", CREAT, RW).unwrap();
    guest.write(fd, b"abc").unwrap();
    guest.unlink("f").unwrap();
    let first = guest.wasi.snapshot().unwrap();
    let mut second = guest.wasi.snapshot().unwrap();
    second.monotonic_ns = first.monotonic_ns;
    second.realtime_ns = first.realtime_ns;
    assert_eq!(first, second);
    assert_eq!(guest.pread(fd, 9, 0), Ok(b"abc".to_vec()));
    guest.close(fd).unwrap();
    assert_eq!(sandbox.names(&guest), [""; 0]);
}

fn closed_preopens_and_renumbered_descriptors(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    guest.mkdir("d").unwrap();
    let below = guest.open("d", DIRECTORY, 0).unwrap();
    let file = guest.open_at(below, 0, "f", [CREAT, RW, 0]).unwrap();
    guest.close(3).unwrap();
    guest.close(0).unwrap();
    guest
        .run("fd_renumber", &[file.into(), below.into()])
        .unwrap();
    let guest = sandbox.moved(guest);
    assert_eq!(guest.close(3), Err(Errno::Badf));
    assert_eq!(guest.read(0, 1), Err(Errno::Badf));
    assert_eq!(guest.write(below, b"x"), Ok(1));
    assert_eq!(guest.stat(file), Err(Errno::Badf));
}

#[test]
fn a_copied_directory_is_checked_by_type() {
    let (sandbox, guest) = in_sandbox(Kind::Host);
    let fd = guest.open("f", CREAT, RW).unwrap();
    guest.seek(fd, 1, 0).unwrap();
    let copy = tempfile::tempdir().unwrap();
    let missing = restore(&guest, copy.path()).err().unwrap();
    assert!(
        missing.starts_with("descriptor 4: cannot open \"f\" in preopen \"/\" again"),
        "{missing}"
    );
    std::fs::create_dir(copy.path().join("f")).unwrap();
    restore(&guest, copy.path()).err().unwrap();
    std::fs::remove_dir(copy.path().join("f")).unwrap();
    // A link is not followed, not even one that stays inside.
    std::fs::write(copy.path().join("g"), "copy").unwrap();
    std::os::unix::fs::symlink("g", copy.path().join("f")).unwrap();
    restore(&guest, copy.path()).err().unwrap();
    std::fs::rename(copy.path().join("g"), copy.path().join("f")).unwrap();
    let moved = restore(&guest, copy.path()).unwrap();
    assert_eq!(moved.read(fd, 9), Ok(b"opy".to_vec()));

    // In the same directory it must be the same file.
    std::fs::write(sandbox.dir.path().join("new"), "").unwrap();
    let snapshot = guest.wasi.snapshot().unwrap();
    std::fs::rename(sandbox.dir.path().join("new"), sandbox.dir.path().join("f")).unwrap();
    let changed = Wasi::restore(snapshot, resources(sandbox.dir.path())).unwrap_err();
    assert!(matches!(changed, Error::Changed { fd: 4, .. }), "{changed}");
    // And now the source cannot be captured, as its file is gone.
    let gone = guest.wasi.snapshot().unwrap_err();
    assert!(matches!(gone, Error::Unreachable { fd: 4, .. }), "{gone}");
}

#[test]
fn two_preopens() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let named = |dir: &tempfile::TempDir, guest: &str| Preopen {
        guest: guest.to_owned(),
        ..preopen(dir.path(), false)
    };
    let guest = Guest::new(Config {
        preopens: vec![named(&a, "/a"), named(&b, "/b")],
        ..Config::default()
    });
    let fd = guest.open("f", CREAT, RW).unwrap();
    guest.write(fd, b"abc").unwrap();
    // Another process moves it from one to the other.
    std::fs::rename(a.path().join("f"), b.path().join("g")).unwrap();
    let guest = guest.moved_with(Resources {
        preopens: [&a, &b]
            .map(|dir| Source::Host(dir.path().to_owned()))
            .into(),
        ..Resources::default()
    });
    assert_eq!(guest.pread(fd, 9, 0), Ok(b"abc".to_vec()));
}

#[test]
fn resources_must_fit() {
    let (sandbox, guest) = in_sandbox(Kind::Host);
    let snapshot = guest.wasi.snapshot().unwrap();
    let error = Wasi::restore(snapshot.clone(), Resources::default()).unwrap_err();
    assert_eq!(error.to_string(), "the snapshot needs 1 preopens, 0 given");
    let mut resources = resources(sandbox.dir.path());
    resources.preopens.push(resources.preopens[0].clone());
    Wasi::restore(snapshot, resources).unwrap_err();
}

#[test]
fn damaged_snapshots_are_refused() {
    let (sandbox, guest) = in_sandbox(Kind::Host);
    guest.open("f", CREAT, RW).unwrap();
    guest.mkdir("d").unwrap();
    guest.open("d", DIRECTORY, 0).unwrap();
    let good = guest.wasi.snapshot().unwrap();
    assert!(Wasi::restore(good.clone(), resources(sandbox.dir.path())).is_ok());
    type Damage = fn(&mut Snapshot);
    fn file(snapshot: &mut Snapshot) -> &mut FileRecord {
        match &mut snapshot.descriptors[4].kind {
            DescriptorKind::File(file) => file,
            other => panic!("{other:?}"),
        }
    }
    fn directory(snapshot: &mut Snapshot) -> &mut DirectoryRecord {
        match &mut snapshot.descriptors[5].kind {
            DescriptorKind::Directory(directory) => directory,
            other => panic!("{other:?}"),
        }
    }
    fn place(file: &mut FileRecord) -> &mut HostPlace {
        match &mut file.place {
            Place::Host(place) => place,
            other => panic!("{other:?}"),
        }
    }
    fn directory_place(snapshot: &mut Snapshot) -> &mut HostPlace {
        match &mut directory(snapshot).place {
            Place::Host(place) => place,
            other => panic!("{other:?}"),
        }
    }
    let damages: &[Damage] = &[
        |s| s.version = 1,
        |s| s.args = vec!["\0".into()],
        |s| s.env = vec![("=".into(), String::new())],
        |s| s.preopens[0].guest = "\0".into(),
        |s| s.descriptors_max = 5,
        |s| s.listeners = s.descriptors_max + 1,
        |s| s.descriptors.push(s.descriptors[0].clone()),
        |s| s.descriptors[0].dropped_base = u64::MAX,
        |s| s.descriptors[0].dropped_inheriting = 1 << 40,
        |s| s.random = vec![(0, 0); (1 << 20) + 1],
        |s| place(file(s)).preopen = 1,
        |s| place(file(s)).path = "../f".into(),
        |s| place(file(s)).path = "/f".into(),
        |s| place(file(s)).path = "d/../f".into(),
        |s| place(file(s)).path = "f\0".into(),
        |s| place(file(s)).path = String::new(),
        |s| place(file(s)).path = "d".into(),
        |s| file(s).flags = 1 << 9,
        |s| file(s).filetype = 77,
        |s| file(s).host_read = false,
        |s| place(file(s)).inode += 1,
        |s| {
            file(s).host_read = false;
            file(s).host_write = false;
            file(s).readable = false;
            file(s).writable = false;
        },
        |s| s.preopens[0].read_only = true,
        |s| directory_place(s).path = "f".into(),
        |s| directory(s).preopened = true,
        |s| {
            s.descriptors[0].kind = DescriptorKind::Listener(ListenerRecord {
                index: 0,
                nonblocking: false,
            });
        },
    ];
    for (index, damage) in damages.iter().enumerate() {
        let mut snapshot = good.clone();
        damage(&mut snapshot);
        let restored = Wasi::restore(snapshot, resources(sandbox.dir.path()));
        assert!(restored.is_err(), "damage {index}");
    }
    // Extremes that are legal must not panic.
    let mut snapshot = good.clone();
    snapshot.monotonic_ns = u64::MAX;
    snapshot.realtime_ns = u64::MAX;
    snapshot.hidden_next = u64::MAX;
    snapshot.random = vec![(1, u64::MAX), (1, 5)];
    file(&mut snapshot).offset = u64::MAX;
    let guest = Guest::with(Wasi::restore(snapshot, resources(sandbox.dir.path())).unwrap());
    assert_eq!(guest.time(1), u64::MAX);
    guest.random(100);
    assert_eq!(guest.read(4, 1), Err(Errno::Inval));
    guest.unlink("f").unwrap();
    // Bytes cut off or flipped decode to an error or to something checked.
    let bytes = postcard::to_allocvec(&good).unwrap();
    for index in 0..bytes.len() {
        assert!(postcard::from_bytes::<Snapshot>(&bytes[..index]).is_err());
        let mut flipped = bytes.clone();
        flipped[index] ^= 1 << (index % 8);
        if let Ok(snapshot) = postcard::from_bytes(&flipped) {
            let _ = Wasi::restore(snapshot, resources(sandbox.dir.path()));
        }
    }
}

/// Threads open, write, replace and remove the same names; afterwards
/// everything open can be captured, and nothing hidden is left.
fn threads_and_hidden_files(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    let threads = (0..4_u32).map(|tid| {
        let wasi = Arc::clone(&guest.wasi);
        std::thread::spawn(move || {
            let guest = Guest::thread(wasi, tid);
            let mut kept = Vec::new();
            for round in 0..60_u32 {
                let name = format!("f{}", (round + tid) % 3);
                let fd = guest.open(&name, CREAT, RW).unwrap();
                guest.write(fd, &tid.to_le_bytes()).unwrap();
                match round % 3 {
                    0 => drop(guest.unlink(&name)),
                    1 => drop(guest.rename(&name, "f0")),
                    _ => {}
                }
                if round % 4 == 0 {
                    kept.push(fd);
                } else {
                    guest.close(fd).unwrap();
                }
            }
            kept
        })
    });
    let threads = threads.collect::<Vec<_>>();
    let kept = threads
        .into_iter()
        .flat_map(|thread| thread.join().unwrap());
    let kept = kept.collect::<Vec<_>>();
    let guest = sandbox.moved(guest);
    for fd in kept {
        assert!(guest.pread(fd, 4, 0).unwrap().len() == 4);
        guest.close(fd).unwrap();
    }
    assert_eq!(sandbox.hidden(&guest), 0);
    let left = sandbox.names(&guest);
    assert!(left.iter().all(|name| !name.starts_with('.')), "{left:?}");
}
