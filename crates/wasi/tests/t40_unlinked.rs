//! Files and directories removed, replaced or renamed while open, here and
//! over a move.

mod common;
use common::*;
use keel_wasi::*;

both! {
    unlinked_file_lives_until_closed
    the_last_of_several_descriptors_removes
    finish_removes_and_drop_does_not
    hard_links
    renamed_files_are_found
    replaced_file_lives_on
    removed_directories
}

fn unlinked_file_lives_until_closed(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    let fd = guest.open("f", CREAT, RW).unwrap();
    guest.write(fd, b"abc").unwrap();
    guest.unlink("f").unwrap();
    assert_eq!(guest.unlink("f"), Err(Errno::Noent));
    assert_eq!(guest.stat(fd).unwrap().nlink, 0);
    assert_eq!(guest.list(3), [""; 0]);
    assert_eq!(sandbox.hidden(&guest), 1);
    if kind == Kind::Host {
        cannot_be_named(&guest, &names(sandbox.dir.path())[0]);
    }
    // The name is free again.
    let other = guest.open("f", CREAT | EXCL, RW).unwrap();
    guest.write(other, b"new").unwrap();

    let guest = sandbox.moved(guest);
    assert_eq!(guest.tell(fd), Ok(3));
    guest.write(fd, b"def").unwrap();
    assert_eq!(guest.pread(fd, 9, 0), Ok(b"abcdef".to_vec()));
    assert_eq!(guest.pread(other, 9, 0), Ok(b"new".to_vec()));
    assert_eq!(guest.stat(fd).unwrap().nlink, 0);
    guest.close(fd).unwrap();
    assert_eq!(sandbox.names(&guest), ["f"]);
}

/// Neither visible nor accessible by its name.
fn cannot_be_named(guest: &Guest, name: &str) {
    assert_eq!(guest.open(name, 0, READ), Err(Errno::Noent));
    assert_eq!(guest.open(name, CREAT, RW), Err(Errno::Acces));
    assert_eq!(guest.stat_at(0, name), Err(Errno::Noent));
    assert_eq!(guest.unlink(name), Err(Errno::Noent));
    assert_eq!(guest.rename(name, "g"), Err(Errno::Noent));
    assert_eq!(guest.link(0, name, "g"), Err(Errno::Noent));
    assert_eq!(guest.symlink(name, "g"), Err(Errno::Acces));
    assert_eq!(guest.mkdir(".keel-unlinked-x"), Err(Errno::Acces));
}

fn the_last_of_several_descriptors_removes(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    let fds = [0; 3].map(|_| guest.open("f", CREAT, RW).unwrap());
    guest.unlink("f").unwrap();
    guest.close(fds[0]).unwrap();
    let guest = sandbox.moved(guest);
    assert_eq!(sandbox.hidden(&guest), 1);
    // Renumbering over it closes it, too.
    let args = [fds[1].into(), fds[2].into()];
    guest.run("fd_renumber", &args).unwrap();
    assert_eq!(sandbox.hidden(&guest), 1);
    guest.close(fds[2]).unwrap();
    assert_eq!(sandbox.names(&guest), [""; 0]);
}

fn finish_removes_and_drop_does_not(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    guest.open("f", CREAT, RW).unwrap();
    guest.unlink("f").unwrap();
    let guest = sandbox.moved(guest);
    assert_eq!(sandbox.hidden(&guest), 1);
    guest.wasi.finish();
    assert_eq!(sandbox.names(&guest), [""; 0]);
    assert_eq!(guest.list_error(), Errno::Badf);
}

impl Guest {
    fn list_error(&self) -> Errno {
        self.readdir(3, 100, 0).unwrap_err()
    }
}

fn hard_links(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    let a = guest.open("a", CREAT, RW).unwrap();
    guest.link(0, "a", "b").unwrap();
    let b = guest.open("b", 0, RW).unwrap();
    guest.write(a, b"x").unwrap();
    // Removing a name that is not open keeps nothing.
    guest.link(0, "a", "c").unwrap();
    guest.unlink("c").unwrap();
    assert_eq!(sandbox.hidden(&guest), 0);
    guest.unlink("a").unwrap();
    // Only a host's file is kept by a name.
    let kept = usize::from(kind == Kind::Host);
    assert_eq!(sandbox.hidden(&guest), kept);
    let guest = sandbox.moved(guest);
    assert_eq!(guest.read(b, 9), Ok(b"x".to_vec()));
    guest.close(b).unwrap();
    assert_eq!(sandbox.hidden(&guest), kept);
    guest.close(a).unwrap();
    assert_eq!(sandbox.names(&guest), ["b"]);
}

fn renamed_files_are_found(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    guest.mkdir("d").unwrap();
    guest.mkdir("d/e").unwrap();
    let file = guest.open("d/e/f", CREAT, RW).unwrap();
    let inner = guest.open("d/e", DIRECTORY, 0).unwrap();
    guest.write(file, b"abc").unwrap();
    guest.rename("d/e/f", "d/e/g").unwrap();
    guest.rename("d", "moved").unwrap();
    let guest = sandbox.moved(guest);
    assert_eq!(guest.pread(file, 9, 0), Ok(b"abc".to_vec()));
    assert_eq!(guest.list(inner), ["g"]);
    assert_eq!(guest.unlink("moved/e/g"), Ok(()));
    guest.rename("moved/e", "e").unwrap();
    let guest = sandbox.moved(guest);
    assert_eq!(guest.pread(file, 9, 0), Ok(b"abc".to_vec()));
    guest.close(file).unwrap();
    let below = guest.open("e", DIRECTORY, 0).unwrap();
    assert_eq!(guest.list(below), [""; 0]);
    assert_eq!(sandbox.hidden(&guest), 0);
}

fn replaced_file_lives_on(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    let old = guest.open("config", CREAT, RW).unwrap();
    guest.write(old, b"old").unwrap();
    let new = guest.open("tmp", CREAT, RW).unwrap();
    guest.write(new, b"new").unwrap();
    guest.rename("tmp", "config").unwrap();
    assert_eq!(guest.list(3), ["config"]);
    let guest = sandbox.moved(guest);
    assert_eq!(guest.pread(old, 9, 0), Ok(b"old".to_vec()));
    assert_eq!(guest.pread(new, 9, 0), Ok(b"new".to_vec()));
    assert_eq!(sandbox.read(&guest, "config"), b"new");
    guest.close(old).unwrap();
    assert_eq!(sandbox.names(&guest), ["config"]);
    // Onto itself by another name nothing happens.
    guest.link(0, "config", "twin").unwrap();
    guest.rename("twin", "config").unwrap();
    assert_eq!(sandbox.names(&guest), ["config", "twin"]);
}

fn removed_directories(kind: Kind) {
    let (sandbox, guest) = in_sandbox(kind);
    guest.mkdir("d").unwrap();
    let file = guest.open("d/f", CREAT, RW).unwrap();
    let open = guest.open("d", DIRECTORY, 0).unwrap();
    assert_eq!(guest.rmdir("d"), Err(Errno::Notempty));
    guest.unlink("d/f").unwrap();
    // Only a hidden file is left: it moves up.
    assert_eq!(guest.rmdir("d/"), Ok(()));
    assert_eq!(guest.list(3), [""; 0]);
    assert_eq!(sandbox.hidden(&guest), 2);
    let guest = sandbox.moved(guest);
    assert_eq!(guest.list(open), [""; 0]);
    assert_eq!(
        guest.open_at(open, 0, "n", [CREAT, RW, 0]),
        Err(Errno::Noent)
    );
    assert_eq!(
        guest.path("path_create_directory", open, "n"),
        Err(Errno::Noent)
    );
    assert_eq!(guest.write(file, b"x"), Ok(1));
    guest.close(open).unwrap();
    guest.close(file).unwrap();
    assert_eq!(sandbox.names(&guest), [""; 0]);

    // Not open itself, and one that is replaced.
    guest.mkdir("d").unwrap();
    let file = guest.open("d/f", CREAT, RW).unwrap();
    guest.unlink("d/f").unwrap();
    guest.rmdir("d").unwrap();
    guest.close(file).unwrap();
    guest.mkdir("old").unwrap();
    guest.mkdir("new").unwrap();
    let old = guest.open("old", DIRECTORY, 0).unwrap();
    guest.mkdir("old/x").unwrap();
    assert_eq!(guest.rename("new", "old"), Err(Errno::Notempty));
    guest.rmdir("old/x").unwrap();
    guest.rename("new", "old").unwrap();
    let guest = sandbox.moved(guest);
    assert_ne!(
        guest.stat(old).unwrap().ino,
        guest.stat_at(0, "old").unwrap().ino
    );
    guest.close(old).unwrap();
    assert_eq!(sandbox.names(&guest), ["old"]);
}

#[test]
fn another_machine_is_not_touched() {
    let (sandbox, guest) = in_sandbox(Kind::Host);
    guest.mkdir("d").unwrap();
    std::fs::write(sandbox.dir.path().join("d/.keel-unlinked-0-0"), "").unwrap();
    assert_eq!(guest.rmdir("d"), Err(Errno::Notempty));
    let fd = guest.open("d", DIRECTORY, 0).unwrap();
    assert_eq!(guest.list(fd), [""; 0]);
    assert_eq!(guest.rmdir("d"), Err(Errno::Notempty));
}
