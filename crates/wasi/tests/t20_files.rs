//! `fd_*` on files and directories.

mod common;
use common::*;
use keel_wasi::*;

both! {
    offsets
    several_buffers_and_large_transfers
    append
    open_modes
    attributes
    directories_are_no_files
    prestat
    numbers
    rights_can_only_be_dropped
    cookies
    too_many_entries
}

const SET: u64 = 0;
const CUR: u64 = 1;
const END: u64 = 2;

fn offsets(kind: Kind) {
    let (_sandbox, guest) = in_sandbox(kind);
    let fd = guest.open("f", CREAT | EXCL, RW).unwrap();
    assert_eq!(fd, 4);
    assert_eq!(guest.write(fd, b"0123456789"), Ok(10));
    assert_eq!(guest.tell(fd), Ok(10));
    assert_eq!(guest.read(fd, 5), Ok(vec![]));
    assert_eq!(guest.seek(fd, 2, SET), Ok(2));
    assert_eq!(guest.read(fd, 3), Ok(b"234".to_vec()));
    assert_eq!(guest.seek(fd, -1, CUR), Ok(4));
    assert_eq!(guest.seek(fd, -1, END), Ok(9));
    assert_eq!(guest.seek(fd, 5, END), Ok(15));
    assert_eq!(guest.write(fd, b"x"), Ok(1));
    assert_eq!(guest.pread(fd, 9, 9), Ok(b"9\0\0\0\0\0x".to_vec()));
    assert_eq!(guest.pwrite(fd, b"AB", 1), Ok(2));
    assert_eq!(guest.tell(fd), Ok(16));
    assert_eq!(guest.pread(fd, 4, 0), Ok(b"0AB3".to_vec()));
    assert_eq!(guest.pread(fd, 4, 100), Ok(vec![]));
    for (delta, whence) in [(-1, SET), (-17, CUR), (-17, END), (i64::MIN, SET)] {
        assert_eq!(guest.seek(fd, delta, whence), Err(Errno::Inval));
    }
    assert_eq!(guest.seek(fd, i64::MAX, SET), Ok(i64::MAX as u64));
    assert_eq!(guest.seek(fd, i64::MAX, CUR), Ok(u64::MAX - 1));
    assert_eq!(guest.seek(fd, 2, CUR), Err(Errno::Inval));
    assert_eq!(guest.read(fd, 1), Err(Errno::Inval));
    assert_eq!(guest.pwrite(fd, b"x", u64::MAX), Err(Errno::Inval));
}

fn several_buffers_and_large_transfers(kind: Kind) {
    let (_sandbox, guest) = in_sandbox(kind);
    let fd = guest.open("f", CREAT, RW).unwrap();
    guest.put(65536, b"abcdef");
    let [iovs, count] = guest.vectors(&[2, 0, 3, 1]);
    assert_eq!(guest.run32("fd_write", &[fd.into(), iovs, count]), Ok(6));
    guest.seek(fd, 0, SET).unwrap();
    guest.put(65536, &[0; 8]);
    let [iovs, count] = guest.vectors(&[1, 0, 4, 3]);
    assert_eq!(guest.run32("fd_read", &[fd.into(), iovs, count]), Ok(6));
    assert_eq!(guest.bytes(65536, 8), b"abcdef\0\0");
    let [iovs, count] = guest.vectors(&[0, 0]);
    assert_eq!(guest.run32("fd_read", &[fd.into(), iovs, count]), Ok(0));
    assert_eq!(guest.run32("fd_write", &[fd.into(), iovs, 0]), Ok(0));
    // At most 1 MiB in one call.
    let [iovs, count] = guest.vectors(&[1 << 20, 1 << 20]);
    assert_eq!(
        guest.run32("fd_write", &[fd.into(), iovs, count]),
        Ok(1 << 20)
    );
    guest.seek(fd, 0, SET).unwrap();
    let [iovs, count] = guest.vectors(&[3 << 20]);
    assert_eq!(
        guest.run32("fd_read", &[fd.into(), iovs, count]),
        Ok(1 << 20)
    );
}

fn append(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    let open = || guest.open_at(3, 0, "f", [CREAT, RW, APPEND]).unwrap();
    let (a, b) = (open(), open());
    guest.write(a, b"one").unwrap();
    guest.write(b, b"two").unwrap();
    assert_eq!((guest.tell(a), guest.tell(b)), (Ok(3), Ok(6)));
    guest.seek(a, 0, SET).unwrap();
    guest.write(a, b"3").unwrap();
    // As on Linux, even a positioned write appends.
    guest.pwrite(a, b"4", 0).unwrap();
    assert_eq!(guest.tell(a), Ok(7));
    let read = || sandbox.read(&guest, "f");
    assert_eq!(read(), b"onetwo34");
    assert_eq!(guest.fdstat(a).unwrap().1, APPEND);
    let set = |flags| guest.run("fd_fdstat_set_flags", &[a.into(), flags]);
    assert_eq!(set(NONBLOCK), Ok(()));
    assert_eq!(guest.fdstat(a).unwrap().1, NONBLOCK);
    guest.pwrite(a, b"O", 0).unwrap();
    assert_eq!(read(), b"Onetwo34");
    assert_eq!(set(SYNC), Err(Errno::Inval));
    let synced = guest.open_at(3, 0, "f", [0, RW, SYNC]).unwrap();
    assert_eq!(guest.fdstat(synced).unwrap().1, SYNC);
    let set = |flags| guest.run("fd_fdstat_set_flags", &[synced.into(), flags]);
    assert_eq!((set(SYNC | APPEND), set(2)), (Ok(()), Err(Errno::Inval)));
}

fn open_modes(kind: Kind) {
    let (_sandbox, guest) = in_sandbox(kind);
    let full = guest.open("f", CREAT, RW).unwrap();
    guest.write(full, b"abc").unwrap();
    let reader = guest.open("f", 0, READ).unwrap();
    assert_eq!(guest.write(reader, b"x"), Err(Errno::Badf));
    assert_eq!(guest.pwrite(reader, b"x", 0), Err(Errno::Badf));
    let size = |fd: u32, size| guest.run("fd_filestat_set_size", &[fd.into(), size]);
    assert_eq!(size(reader, 0), Err(Errno::Inval));
    let writer = guest.open("f", 0, WRITE).unwrap();
    assert_eq!(guest.read(writer, 1), Err(Errno::Badf));
    assert_eq!(guest.pread(writer, 1, 0), Err(Errno::Badf));
    let (reads, writes) = (
        guest.fdstat(reader).unwrap().2,
        guest.fdstat(writer).unwrap().2,
    );
    assert_eq!((reads & RW, writes & RW), (READ, WRITE));
    assert_eq!(size(writer, 5), Ok(()));
    assert_eq!(guest.read(reader, 9), Ok(b"abc\0\0".to_vec()));
    assert_eq!(guest.open("f", CREAT | EXCL, RW), Err(Errno::Exist));
    guest.open("f", TRUNC, RW).unwrap();
    assert_eq!(guest.stat(full).unwrap().size, 0);
    assert_eq!(guest.open("none", 0, READ), Err(Errno::Noent));
    assert_eq!(guest.open("", 0, READ), Err(Errno::Noent));
    assert_eq!(guest.open("f/", 0, READ), Err(Errno::Notdir));
    assert_eq!(guest.open("f", DIRECTORY, READ), Err(Errno::Notdir));
    assert_eq!(guest.open("f", DIRECTORY | CREAT, RW), Err(Errno::Inval));
    assert_eq!(
        guest.open_at(full, 0, "x", [0, READ, 0]),
        Err(Errno::Notdir)
    );
    assert_eq!(guest.open_at(0, 0, "x", [0, READ, 0]), Err(Errno::Badf));
    guest.mkdir("d").unwrap();
    assert_eq!(guest.open("d", 0, WRITE), Err(Errno::Isdir));
    assert_eq!(guest.open("d", DIRECTORY, RW), Err(Errno::Isdir));
    assert_eq!(guest.open("d", CREAT, READ), Err(Errno::Isdir));
    assert!(guest.open("d/", DIRECTORY, 0).is_ok());
}

fn attributes(kind: Kind) {
    let (_sandbox, guest) = in_sandbox(kind);
    let fd = guest.open("f", CREAT, RW).unwrap();
    let times =
        |a: u64, m: u64, flags: u64| guest.run("fd_filestat_set_times", &[fd.into(), a, m, flags]);
    assert_eq!(times(1_000_000_007, 2_000_000_009, 1 | 4), Ok(()));
    let stat = guest.stat(fd).unwrap();
    assert_eq!((stat.atim, stat.mtim), (1_000_000_007, 2_000_000_009));
    assert_eq!(times(0, 0, 8), Ok(()));
    assert!(guest.stat(fd).unwrap().mtim > 2_000_000_009);
    assert_eq!(guest.stat(fd).unwrap().atim, 1_000_000_007);
    assert_eq!(times(0, 0, 1 | 2), Err(Errno::Inval));
    assert_eq!(times(0, 0, 4 | 8), Err(Errno::Inval));
    assert_eq!(guest.set_times_at(0, "f", [5, 6, 1 | 4]), Ok(()));
    let stat = guest.stat_at(0, "f").unwrap();
    assert_eq!((stat.atim, stat.mtim, stat.nlink), (5, 6, 1));
    assert_eq!(stat, guest.stat(fd).unwrap());
    assert_eq!(guest.set_times_at(0, "f", [0, 0, 3]), Err(Errno::Inval));
    assert_eq!(guest.set_times_at(0, "x", [0, 0, 1]), Err(Errno::Noent));

    // Directories have times, too; standard streams have none.
    let set = |fd: u64| guest.run("fd_filestat_set_times", &[fd, 5, 6, 5]);
    assert_eq!((set(3), set(1)), (Ok(()), Err(Errno::Badf)));
    assert_eq!(guest.stat(3).unwrap().mtim, 6);

    for name in ["fd_sync", "fd_datasync"] {
        assert_eq!(guest.run(name, &[fd.into()]), Ok(()));
        assert_eq!(guest.run(name, &[3]), Err(Errno::Badf));
        assert_eq!(guest.run(name, &[1]), Err(Errno::Badf));
    }
    for advice in 0..6 {
        assert_eq!(guest.run("fd_advise", &[fd.into(), 0, 0, advice]), Ok(()));
    }
    assert_eq!(guest.run("fd_advise", &[3, 0, 0, 0]), Err(Errno::Badf));
    let allocate = |fd: u32| guest.run("fd_allocate", &[fd.into(), 0, 1]);
    assert_eq!(
        (allocate(fd), allocate(3)),
        (Err(Errno::Notsup), Err(Errno::Badf))
    );
    assert_eq!(guest.stat(0).unwrap().ino, 0);
    assert_eq!(guest.stat(3).unwrap().filetype, 3);
}

fn directories_are_no_files(kind: Kind) {
    let (_sandbox, guest) = in_sandbox(kind);
    assert_eq!(guest.read(3, 1), Err(Errno::Badf));
    assert_eq!(guest.write(3, b"x"), Err(Errno::Badf));
    assert_eq!(guest.pread(3, 1, 0), Err(Errno::Badf));
    assert_eq!(guest.pwrite(3, b"x", 0), Err(Errno::Badf));
    assert_eq!(guest.seek(3, 0, SET), Err(Errno::Badf));
    assert_eq!(guest.tell(3), Err(Errno::Badf));
    let flags = guest.run("fd_fdstat_set_flags", &[3, APPEND]);
    assert_eq!(flags, Err(Errno::Badf));
    let size = guest.run("fd_filestat_set_size", &[3, 0]);
    assert_eq!(size, Err(Errno::Badf));
    for fd in 0..3 {
        assert_eq!(guest.seek(fd, 0, SET), Err(Errno::Spipe));
        assert_eq!(guest.tell(fd), Err(Errno::Spipe));
    }
    assert_eq!(guest.pread(0, 1, 0), Err(Errno::Spipe));
    assert_eq!(guest.pwrite(1, b"x", 0), Err(Errno::Spipe));
    assert_eq!(guest.write(0, b"x"), Err(Errno::Badf));
    assert_eq!(guest.read(1, 1), Err(Errno::Badf));
    let file = guest.open("f", CREAT, RW).unwrap();
    assert_eq!(guest.readdir(file, 100, 0), Err(Errno::Badf));
}

fn prestat(kind: Kind) {
    let (_sandbox, guest) = in_sandbox(kind);
    guest.run("fd_prestat_get", &[3, 0]).unwrap();
    assert_eq!((guest.bytes(0, 1)[0], guest.u32_at(4)), (0, 1));
    let name = |fd: u64, room| guest.run("fd_prestat_dir_name", &[fd, 8192, room]);
    assert_eq!(name(3, 9), Ok(()));
    assert_eq!(guest.bytes(8192, 2), b"/\0");
    assert_eq!(name(3, 0), Err(Errno::Nametoolong));
    let dir = guest.open(".", DIRECTORY, 0).unwrap();
    for fd in [0, dir.into()] {
        assert_eq!(guest.run("fd_prestat_get", &[fd, 0]), Err(Errno::Badf));
        assert_eq!(name(fd, 9), Err(Errno::Notdir));
    }
}

fn numbers(kind: Kind) {
    let limits = Limits {
        descriptors_max: 7,
        ..Limits::default()
    };
    let sandbox = Sandbox::new(kind);
    let guest = sandbox.guest_with(false, limits, |_| {});
    let open = || guest.open("f", CREAT, RW);
    assert_eq!([open(), open(), open()], [Ok(4), Ok(5), Ok(6)]);
    assert_eq!(open(), Err(Errno::Mfile));
    guest.write(4, b"four").unwrap();
    let renumber = |from: u64, to: u64| guest.run("fd_renumber", &[from, to]);
    assert_eq!(renumber(4, 6), Ok(()));
    assert_eq!(guest.tell(6), Ok(4));
    assert_eq!(guest.close(4), Err(Errno::Badf));
    assert_eq!(renumber(6, 4), Err(Errno::Badf));
    assert_eq!(renumber(4, 6), Err(Errno::Badf));
    assert_eq!(renumber(6, 6), Ok(()));
    assert_eq!(open(), Ok(4));
    assert_eq!(open(), Err(Errno::Mfile));
    // Preopens and standard streams behave alike.
    assert_eq!(renumber(4, 3), Ok(()));
    assert_eq!(guest.run("fd_prestat_get", &[3, 0]), Err(Errno::Badf));
    assert_eq!(guest.close(1), Ok(()));
    assert_eq!(guest.write(1, b"x"), Err(Errno::Badf));
}

fn rights_can_only_be_dropped(kind: Kind) {
    let (_sandbox, guest) = in_sandbox(kind);
    let fd = guest.open("f", CREAT, RW).unwrap();
    let set = |fd: u32, base, inheriting| {
        guest.run("fd_fdstat_set_rights", &[fd.into(), base, inheriting])
    };
    let (_, _, base, inheriting) = guest.fdstat(fd).unwrap();
    assert_eq!(set(fd, base & !RW, inheriting), Ok(()));
    assert_eq!(guest.read(fd, 1), Err(Errno::Notcapable));
    assert_eq!(guest.write(fd, b"x"), Err(Errno::Notcapable));
    assert_eq!(guest.tell(fd), Ok(0));
    assert_eq!(set(fd, base, inheriting), Err(Errno::Notcapable));
    assert_eq!(guest.fdstat(fd).unwrap().2, base & !RW);

    // Rights that a directory must not pass on are missing in files opened through it.
    let (_, _, base, inheriting) = guest.fdstat(3).unwrap();
    assert_eq!(set(3, base, inheriting & !WRITE), Ok(()));
    assert_eq!(guest.open("f", 0, WRITE), Err(Errno::Notcapable));
    assert!(guest.open("f", 0, READ).is_ok());
    type Action = fn(&Guest) -> Ret<()>;
    let one_by_one: &[(u32, Action)] = &[
        (9, |g| g.mkdir("d")),
        (10, |g| g.open("n", CREAT, READ).map(drop)),
        (11, |g| g.link(0, "f", "l")),
        (12, |g| g.link(0, "f", "l")),
        (13, |g| g.open("f", 0, READ).map(drop)),
        (14, |g| g.readdir(3, 100, 0).map(drop)),
        (15, |g| g.readlink("f", 9).map(drop)),
        (16, |g| g.rename("f", "g")),
        (17, |g| g.rename("f", "g")),
        (18, |g| g.stat_at(0, "f").map(drop)),
        (20, |g| g.set_times_at(0, "f", [0, 0, 1])),
        (21, |g| g.stat(3).map(drop)),
        (24, |g| g.symlink("f", "s")),
        (25, |g| g.rmdir("d")),
        (26, |g| g.unlink("f")),
    ];
    for (bit, action) in one_by_one {
        let sandbox = Sandbox::new(kind);
        let guest = sandbox.guest_with(false, Limits::default(), |dir| {
            std::fs::write(dir.join("f"), "").unwrap();
        });
        let (_, _, base, inheriting) = guest.fdstat(3).unwrap();
        assert_ne!(base & (1 << bit), 0, "{bit}");
        let args = [3, base & !(1 << bit), inheriting];
        guest.run("fd_fdstat_set_rights", &args).unwrap();
        // They stay dropped over a move.
        let guest = sandbox.moved(guest);
        assert_eq!(action(&guest), Err(Errno::Notcapable), "{bit}");
        assert_eq!(sandbox.names(&guest), ["f"]);
    }
}

fn cookies(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    guest.mkdir("d").unwrap();
    let fd = guest.open("d", DIRECTORY, 0).unwrap();
    assert_eq!(guest.list(fd), [""; 0]);
    for index in 0..10 {
        guest.open(&format!("d/f{index}"), CREAT, RW).unwrap();
    }
    let (used, entries) = guest.readdir(fd, 1 << 16, 0).unwrap();
    assert_eq!(entries.len(), 12);
    assert_eq!(entries[0], (".".into(), 1));
    assert_eq!(entries[11], ("f9".into(), 12));
    assert_eq!(guest.readdir(fd, 1 << 16, 12), Ok((0, vec![])));
    assert_eq!(guest.readdir(fd, 1 << 16, u64::MAX), Ok((0, vec![])));
    assert_eq!(guest.readdir(fd, 0, 0), Ok((0, vec![])));
    // A buffer too small is filled up with a part of an entry.
    assert_eq!(guest.readdir(fd, 30, 0), Ok((30, vec![entries[0].clone()])));
    assert_eq!(guest.readdir(fd, 10, 2), Ok((10, vec![])));
    assert_eq!(guest.readdir(fd, used.into(), 0).unwrap().0, used);

    // Entries come and go, and the machine moves, between two reads.
    let (_, first) = guest.readdir(fd, 200, 0).unwrap();
    let next = first.last().unwrap().1;
    guest.unlink("d/f0").unwrap();
    guest.open("d/a", CREAT, RW).unwrap();
    let guest = sandbox.moved(guest);
    let (_, rest) = guest.readdir(fd, 1 << 16, next).unwrap();
    assert_eq!([first, rest].concat(), entries);
    assert_eq!(guest.list(fd).len(), 10);
    assert_eq!(guest.list(fd)[0], "a");
    let ino = guest.stat_at(0, "d/a").unwrap().ino;
    guest.readdir(fd, 1 << 16, 2).unwrap();
    assert_eq!(guest.u64_at(65536 + 8), ino);
}

fn too_many_entries(kind: Kind) {
    let limits = Limits {
        directory_entries_max: 1,
        ..Limits::default()
    };
    let sandbox = Sandbox::new(kind);
    let guest = sandbox.guest_with(false, limits, |dir| {
        std::fs::write(dir.join("a"), "").unwrap();
        std::fs::write(dir.join("b"), "").unwrap();
    });
    assert_eq!(guest.readdir(3, 100, 0), Err(Errno::Nomem));
}
