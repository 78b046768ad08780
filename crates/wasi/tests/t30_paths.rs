//! `path_*`: results, and that nothing outside of a preopen is reachable.

mod common;
use common::*;
use keel_wasi::*;

both! {
    directories
    links
    renames
    no_way_out
    read_only
    trailing_slashes_and_odd_paths
}
use std::os::unix::fs::symlink;

fn directories(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    assert_eq!(guest.mkdir("d"), Ok(()));
    assert_eq!(guest.mkdir("d"), Err(Errno::Exist));
    assert_eq!(guest.mkdir("d/e/"), Ok(()));
    assert_eq!(guest.mkdir("x/y"), Err(Errno::Noent));
    assert_eq!(guest.mkdir(""), Err(Errno::Noent));
    guest.open("f", CREAT, RW).unwrap();
    assert_eq!(guest.mkdir("f/d"), Err(Errno::Notdir));
    assert_eq!(guest.rmdir("d"), Err(Errno::Notempty));
    assert_eq!(guest.rmdir("f"), Err(Errno::Notdir));
    assert_eq!(guest.rmdir("none"), Err(Errno::Noent));
    assert_eq!(guest.unlink("d"), Err(Errno::Isdir));
    assert_eq!(guest.unlink("f/"), Err(Errno::Notdir));
    assert_eq!(guest.unlink("none"), Err(Errno::Noent));
    assert_eq!(guest.rmdir("d/e/"), Ok(()));
    assert_eq!(guest.rmdir("d"), Ok(()));
    assert!(guest.rmdir(".").is_err());
    assert_eq!(
        guest.path("path_create_directory", 4, "d"),
        Err(Errno::Badf)
    );
    assert_eq!(
        guest.path("path_create_directory", 1, "d"),
        Err(Errno::Badf)
    );
    assert_eq!(sandbox.names(&guest), ["f"]);
}

fn links(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    let fd = guest.open("f", CREAT, RW).unwrap();
    guest.write(fd, b"abc").unwrap();
    assert_eq!(guest.symlink("f", "s"), Ok(()));
    assert_eq!(guest.symlink("f", "s"), Err(Errno::Exist));
    assert_eq!(guest.symlink("/f", "absolute"), Err(Errno::Perm));
    assert_eq!(guest.symlink("nowhere", "dangling"), Ok(()));
    assert_eq!(guest.symlink("loop", "loop"), Ok(()));
    assert_eq!(guest.readlink("s", 100), Ok(b"f".to_vec()));
    assert_eq!(guest.readlink("nowhere", 100), Err(Errno::Noent));
    assert_eq!(guest.readlink("dangling", 3), Ok(b"now".to_vec()));
    assert_eq!(guest.readlink("f", 100), Err(Errno::Inval));
    assert_eq!(guest.stat_at(0, "s").unwrap().filetype, 7);
    assert_eq!(guest.stat_at(FOLLOW, "s").unwrap().filetype, 4);
    assert_eq!(guest.stat_at(FOLLOW, "dangling"), Err(Errno::Noent));
    assert_eq!(guest.stat_at(FOLLOW, "loop"), Err(Errno::Loop));
    assert_eq!(guest.open("s", 0, READ), Err(Errno::Loop));
    assert_eq!(
        guest.open_at(3, FOLLOW, "loop", [0, READ, 0]),
        Err(Errno::Loop)
    );
    let followed = guest.open_at(3, FOLLOW, "s", [0, READ, 0]).unwrap();
    assert_eq!(guest.read(followed, 9), Ok(b"abc".to_vec()));
    guest.set_times_at(0, "s", [7, 7, 5]).unwrap();
    assert_eq!(guest.stat_at(0, "s").unwrap().mtim, 7);
    assert_ne!(guest.stat(fd).unwrap().mtim, 7);
    guest.set_times_at(FOLLOW, "s", [8, 8, 5]).unwrap();
    assert_eq!(guest.stat(fd).unwrap().mtim, 8);

    assert_eq!(guest.link(0, "f", "hard"), Ok(()));
    assert_eq!(guest.stat(fd).unwrap().nlink, 2);
    assert_eq!(guest.link(0, "f", "hard"), Err(Errno::Exist));
    assert_eq!(guest.link(0, "none", "l"), Err(Errno::Noent));
    assert_eq!(guest.link(0, "f", "l/"), Err(Errno::Noent));
    assert_eq!(guest.link(FOLLOW, "s", "l"), Err(Errno::Inval));
    assert_eq!(guest.link(0, "dangling", "l"), Ok(()));
    guest.mkdir("d").unwrap();
    assert_eq!(guest.link(0, "d", "l2"), Err(Errno::Perm));
    let all = ["d", "dangling", "f", "hard", "l", "loop", "s"];
    assert_eq!(sandbox.names(&guest), all);
}

fn renames(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    guest.open("f", CREAT, RW).unwrap();
    guest.open("g", CREAT, RW).unwrap();
    guest.mkdir("d").unwrap();
    guest.mkdir("full").unwrap();
    guest.mkdir("full/x").unwrap();
    let guest = sandbox.reopened(guest);
    assert_eq!(guest.rename("none", "x"), Err(Errno::Noent));
    assert_eq!(guest.rename("f", "d"), Err(Errno::Isdir));
    assert_eq!(guest.rename("d", "f"), Err(Errno::Notdir));
    assert_eq!(guest.rename("d", "full"), Err(Errno::Notempty));
    assert_eq!(guest.rename("full", "full/x/y"), Err(Errno::Inval));
    for (source, target) in [("f/", "x"), ("f", "x/"), ("f", "g/"), ("f/", "g")] {
        assert_eq!(guest.rename(source, target), Err(Errno::Notdir));
    }
    assert_eq!(guest.rename("f", "x/y"), Err(Errno::Noent));
    assert_eq!(guest.rename("f", "g"), Ok(()));
    assert_eq!(guest.rename("full", "d/"), Ok(()));
    assert_eq!(guest.rename("g", "g"), Ok(()));
    assert_eq!(sandbox.names(&guest), ["d", "g"]);
}

fn no_way_out(kind: Kind) {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, "secret").unwrap();
    let inside = outside.path().join("inside");
    std::fs::create_dir_all(inside.join("d")).unwrap();
    std::fs::write(inside.join("f"), "").unwrap();
    // Links made by the host, not the guest.
    symlink(&secret, inside.join("absolute")).unwrap();
    symlink("../secret", inside.join("relative")).unwrap();
    symlink("..", inside.join("up")).unwrap();
    symlink("../up/secret", inside.join("d/deep")).unwrap();
    let config = |source| Config {
        preopens: vec![Preopen {
            source,
            ..preopen(&inside, false)
        }],
        ..Config::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let guest = match kind {
        Kind::Host => Guest::new(config(Source::Host(inside.clone()))),
        Kind::Own | Kind::Kept => {
            let guest = Guest::new(config(volume_source(folder.path())));
            let (_, volume) = guest.wasi.volumes().remove(0);
            volume.import(&inside, 1).unwrap();
            guest
        }
    };
    let absolute = secret.to_str().unwrap().to_owned();
    let ways = [
        "../secret",
        "d/../../secret",
        "up/secret",
        "relative",
        "absolute",
        "d/deep",
        &absolute,
        "/",
        "..",
        "d/../..",
        "up",
        "up/.",
    ];
    for way in ways {
        for rights in [READ, WRITE] {
            for oflags in [0, CREAT, TRUNC, DIRECTORY, CREAT | TRUNC] {
                for follow in [0, FOLLOW] {
                    let opened = guest.open_at(3, follow, way, [oflags, rights, 0]);
                    assert!(opened.is_err(), "{way} {oflags}");
                }
            }
        }
        assert!(guest.stat_at(FOLLOW, way).is_err(), "{way}");
        assert!(guest.set_times_at(FOLLOW, way, [0, 0, 1]).is_err());
    }
    for way in ["../new", "up/new", "d/../../new", "/tmp/keel-new"] {
        assert!(guest.mkdir(way).is_err(), "{way}");
        assert!(guest.symlink("f", way).is_err(), "{way}");
        assert!(guest.link(0, "f", way).is_err(), "{way}");
        assert!(guest.rename("f", way).is_err(), "{way}");
        assert!(guest.open(way, CREAT, RW).is_err(), "{way}");
    }
    for way in ["../secret", "up/secret", "d/../../secret", &absolute] {
        assert_eq!(guest.unlink(way), Err(Errno::Perm), "{way}");
        assert_eq!(guest.rename(way, "mine"), Err(Errno::Perm), "{way}");
        assert_eq!(guest.link(0, way, "mine"), Err(Errno::Perm), "{way}");
        assert_eq!(guest.readlink(way, 9), Err(Errno::Perm), "{way}");
    }
    assert_eq!(guest.rmdir("../inside"), Err(Errno::Perm));
    // A directory opened below is a sandbox of its own.
    let below = guest.open("d", DIRECTORY, 0).unwrap();
    assert_eq!(
        guest.open_at(below, 0, "../f", [0, READ, 0]),
        Err(Errno::Perm)
    );
    // A guest's link may point to any relative path, without effect.
    guest.symlink("../secret", "made").unwrap();
    assert_eq!(
        guest.open_at(3, FOLLOW, "made", [0, READ, 0]),
        Err(Errno::Perm)
    );
    assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
    assert_eq!(names(outside.path()), ["inside", "secret"]);
}

fn read_only(kind: Kind) {
    let sandbox = Sandbox::new(kind);
    let mut guest = sandbox.guest_with(true, Limits::default(), |dir| {
        std::fs::write(dir.join("f"), "abc").unwrap();
        std::fs::create_dir(dir.join("d")).unwrap();
    });
    for _ in 0..2 {
        let fd = guest.open("f", 0, READ).unwrap();
        assert_eq!(guest.read(fd, 9), Ok(b"abc".to_vec()));
        let times = guest.run("fd_filestat_set_times", &[fd.into(), 0, 0, 1]);
        let size = guest.run("fd_filestat_set_size", &[fd.into(), 0]);
        let refused = [
            guest.open("f", 0, WRITE).map(drop),
            guest.open("f", TRUNC, READ).map(drop),
            guest.open("n", CREAT, READ).map(drop),
            guest.mkdir("n"),
            guest.rmdir("d"),
            guest.unlink("f"),
            guest.rename("f", "g"),
            guest.link(0, "f", "g"),
            guest.symlink("f", "g"),
            guest.set_times_at(0, "f", [0, 0, 1]),
            times,
            size,
        ];
        assert_eq!(refused, [Err(Errno::Perm); 12]);
        let below = guest.open("d", DIRECTORY, 0).unwrap();
        let created = guest.open_at(below, 0, "n", [CREAT, RW, 0]);
        assert_eq!(created, Err(Errno::Perm));
        guest = sandbox.moved(guest);
    }
    assert_eq!(sandbox.names(&guest), ["d", "f"]);
}

/// Expectations of the public wasi-testsuite not covered above.
fn trailing_slashes_and_odd_paths(kind: Kind) {
    let (_sandbox, guest) = in_sandbox(kind);
    assert_eq!(guest.symlink("source", "target/"), Err(Errno::Noent));
    guest.mkdir("target").unwrap();
    assert_eq!(guest.symlink("source", "target/"), Err(Errno::Exist));
    assert_eq!(guest.unlink("target/"), Err(Errno::Isdir));
    guest.rename("target/", "source").unwrap();
    guest.rename("source", "target/").unwrap();
    guest.rename("target/", "target2/").unwrap();
    guest.rmdir("target2").unwrap();
    guest.open("target", CREAT, RW).unwrap();
    assert_eq!(guest.symlink("source", "target/"), Err(Errno::Notdir));
    assert_eq!(guest.rmdir("target/"), Err(Errno::Notdir));

    guest.mkdir("dir").unwrap();
    guest.mkdir("dir/nested").unwrap();
    guest.open("dir/nested/file", CREAT, RW).unwrap();
    let winding = "dir/.//nested/../../dir/nested/../nested///./file";
    assert!(guest.open(winding, 0, 0).is_ok());
    assert_eq!(guest.open("dir/nested/file\0", 0, 0), Err(Errno::Inval));
    assert_eq!(guest.open("dir/nested/file///", 0, 0), Err(Errno::Notdir));
    assert!(guest.open("dir/nested///", 0, 0).is_ok());
    let outside = "dir/nested/../../../dir/nested/file";
    assert_eq!(guest.open(outside, 0, 0), Err(Errno::Perm));

    guest.symlink("dir", "link").unwrap();
    let opened = guest.open("link", DIRECTORY, 0);
    assert!(
        matches!(opened, Err(Errno::Loop | Errno::Notdir)),
        "{opened:?}"
    );
    assert!(guest.open_at(3, FOLLOW, "link", [DIRECTORY, 0, 0]).is_ok());
    // A slash follows the link; removing must not take the link for it.
    assert_eq!(guest.rmdir("link/"), Err(Errno::Notdir));
    assert_eq!(guest.rmdir("link"), Err(Errno::Notdir));
    guest.symlink("target", "file-link").unwrap();
    let opened = guest.open_at(3, FOLLOW, "file-link", [DIRECTORY, 0, 0]);
    assert_eq!(opened, Err(Errno::Notdir));
    assert!(guest.open(".", 0, 0).is_ok());
    assert_eq!(guest.open(".", DIRECTORY, RW), Err(Errno::Isdir));
}
