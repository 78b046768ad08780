//! Standard streams, pipes and `poll_oneoff`, interrupted and repeated.

mod common;
use common::*;
use keel_wasi::*;
use rustix::pipe::fcntl_setpipe_size;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn host_write(fd: &rustix::fd::OwnedFd, bytes: &[u8]) {
    assert_eq!(rustix::io::write(fd, bytes), Ok(bytes.len()));
}

fn event(userdata: u64, kind: u8, nbytes: u64, hangup: bool) -> Event {
    Event {
        userdata,
        error: 0,
        kind,
        nbytes,
        hangup,
    }
}

#[test]
fn standard_streams() {
    let (out, err) = (
        Arc::new(MemorySink::default()),
        Arc::new(MemorySink::default()),
    );
    let guest = Guest::new(Config {
        stdin: Input::Bytes(b"hello world".to_vec()),
        stdout: Box::new(out.clone()),
        stderr: Box::new(err.clone()),
        ..Config::default()
    });
    assert_eq!(guest.read(0, 5), Ok(b"hello".to_vec()));
    assert_eq!(
        (guest.write(1, b"out"), guest.write(2, b"err")),
        (Ok(3), Ok(3))
    );
    assert_eq!(guest.write(1, b""), Ok(0));
    assert_eq!(
        (out.bytes(), err.bytes()),
        (b"out".to_vec(), b"err".to_vec())
    );
    assert_eq!(guest.fdstat(0).unwrap(), (0, 0, READ, READ));
    assert_eq!(guest.fdstat(1).unwrap(), (0, 0, WRITE, WRITE));
    let flags = guest.run("fd_fdstat_set_flags", &[0, NONBLOCK]);
    assert_eq!(flags, Err(Errno::Badf));
    let guest = guest.moved_with(Resources::default());
    assert_eq!(guest.read(0, 99), Ok(b" world".to_vec()));
    assert_eq!(guest.read(0, 99), Ok(vec![]));
    assert_eq!(Guest::new(Config::default()).read(0, 9), Ok(vec![]));
}

#[test]
fn terminals_are_character_devices() {
    let terminal = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR).unwrap();
    let guest = Guest::new(Config {
        stdout: Box::new(FdSink::duplicate(&terminal).unwrap()),
        stdin: Input::Fd(terminal),
        ..Config::default()
    });
    assert_eq!(guest.fdstat(0).unwrap().0, 2);
    assert_eq!(guest.fdstat(1).unwrap().0, 2);
    assert_eq!(guest.fdstat(2).unwrap().0, 0);
}

#[test]
fn reading_a_pipe_is_interrupted() {
    let (read, write) = pipe();
    let guest = Guest::new(Config {
        stdin: Input::Fd(read),
        ..Config::default()
    });
    guest.flag.request();
    assert_eq!(guest.try_read(0, &[8]), Outcome::Interrupted);
    // Ready data is taken, regardless of a request.
    host_write(&write, b"abc");
    assert_eq!(guest.read(0, 2), Ok(b"ab".to_vec()));
    assert_eq!(guest.read(0, 2), Ok(b"c".to_vec()));
    guest.flag.clear();

    // From another thread, whether it waits already or not yet.
    let (wasi, flag) = (guest.wasi.clone(), guest.flag.clone());
    let blocked = std::thread::spawn(move || {
        let mut thread = Guest::thread(wasi, 2);
        thread.flag = flag;
        thread.try_read(0, &[8])
    });
    guest.flag.request();
    assert_eq!(blocked.join().unwrap(), Outcome::Interrupted);

    // Repeated on another host, with that host's input.
    let (target_read, target_write) = pipe();
    let guest = guest.moved_with(Resources {
        stdin: Input::Fd(target_read),
        ..Resources::default()
    });
    host_write(&target_write, b"there");
    assert_eq!(guest.read(0, 9), Ok(b"there".to_vec()));
    drop(target_write);
    assert_eq!(guest.read(0, 9), Ok(vec![]));
}

#[test]
fn a_full_pipe_gives_short_writes_and_interruptions() {
    let (read, write) = pipe();
    assert_eq!(fcntl_setpipe_size(&write, 8192), Ok(8192));
    let guest = Guest::new(Config {
        stdout: Box::new(FdSink::new(write).unwrap()),
        ..Config::default()
    });
    guest.flag.request();
    assert_eq!(guest.write(1, &[1; 10_000]), Ok(8192));
    let [iovs, count] = guest.vectors(&[1]);
    let full = |guest: &Guest| guest.outcome("fd_write", &[1, iovs, count, 0]);
    assert_eq!(full(&guest), Outcome::Interrupted);
    let poll = [Guest::fd_subscription(7, 2, 1)];
    assert_eq!(guest.try_poll(&poll), Outcome::Interrupted);
    let mut buffer = [0; 4096];
    assert_eq!(rustix::io::read(&read, &mut buffer), Ok(4096));
    assert_eq!(guest.poll(&poll), Ok(vec![event(7, 2, 1, false)]));
    assert_eq!(guest.write(1, &[2; 5000]), Ok(4096));
    drop(read);
    assert_eq!(guest.write(1, b"x"), Err(Errno::Pipe));
}

/// A stream socket cannot be opened anew: small pieces, each promised room.
#[test]
fn output_to_a_socket() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let guest = Guest::new(Config {
        stdout: Box::new(FdSink::new(ours.into()).unwrap()),
        ..Config::default()
    });
    guest.flag.request();
    let [iovs, count] = guest.vectors(&[1 << 20]);
    let mut written = 0;
    while guest.outcome("fd_write", &[1, iovs, count, 0]) == Outcome::Done(0) {
        written += guest.u32_at(0);
    }
    assert_eq!(written % 4096, 0);
    assert!(written > 0);
    drop(theirs);
    assert_eq!(guest.write(1, b"x"), Err(Errno::Pipe));
}

#[test]
fn output_to_a_file() {
    let file = tempfile::tempfile().unwrap();
    let guest = Guest::new(Config {
        stdout: Box::new(FdSink::duplicate(&file).unwrap()),
        ..Config::default()
    });
    assert_eq!(guest.write(1, &[7; 1 << 20]), Ok(1 << 20));
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
}

#[test]
fn fifos_block_and_are_interrupted() {
    let (sandbox, guest) = in_sandbox(Kind::Host);
    let path = sandbox.dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let reader = guest.open("fifo", 0, READ).unwrap();
    guest.flag.request();
    assert_eq!(guest.try_read(reader, &[4]), Outcome::Interrupted);
    assert_eq!(guest.seek(reader, 0, 0), Err(Errno::Spipe));
    assert_eq!(guest.pread(reader, 1, 0), Err(Errno::Spipe));
    let guest = sandbox.moved(guest);
    let writer = guest.open("fifo", 0, WRITE).unwrap();
    assert_eq!(guest.write(writer, b"abc"), Ok(3));
    assert_eq!(guest.pwrite(writer, b"abc", 0), Err(Errno::Spipe));
    let poll = [Guest::fd_subscription(1, 1, reader)];
    assert_eq!(guest.poll(&poll), Ok(vec![event(1, 1, 3, false)]));
    assert_eq!(guest.read(reader, 9), Ok(b"abc".to_vec()));
    let set = |flags| guest.run("fd_fdstat_set_flags", &[reader.into(), flags]);
    set(NONBLOCK).unwrap();
    assert_eq!(guest.read(reader, 9), Err(Errno::Again));
    set(0).unwrap();
    guest.close(writer).unwrap();
    assert_eq!(guest.poll(&poll), Ok(vec![event(1, 1, 0, true)]));
    assert_eq!(guest.read(reader, 9), Ok(vec![]));
}

#[test]
fn poll_kinds() {
    let (_dir, config) = sandbox();
    let (read, write) = pipe();
    let guest = Guest::new(Config {
        stdin: Input::Fd(read),
        ..config
    });
    let file = guest.open("f", CREAT, RW).unwrap();
    guest.write(file, b"abcdef").unwrap();
    guest.seek(file, 2, 0).unwrap();
    assert_eq!(guest.poll(&[]), Err(Errno::Inval));

    // What is ready now, and no other.
    let events = guest.poll(&[
        Guest::clock_subscription(1, 1, 0, false),
        Guest::clock_subscription(2, 1, u64::MAX, false),
        Guest::clock_subscription(3, 0, 1, true),
        Guest::clock_subscription(4, 0, u64::MAX, true),
        Guest::fd_subscription(5, 1, 0),
        Guest::fd_subscription(6, 2, 1),
        Guest::fd_subscription(7, 1, file),
        Guest::fd_subscription(8, 2, file),
    ]);
    let expected = vec![
        event(1, 0, 0, false),
        event(3, 0, 0, false),
        event(6, 2, 1, false),
        event(7, 1, 4, false),
        event(8, 2, 1, false),
    ];
    assert_eq!(events, Ok(expected));
    guest.seek(file, 0, 2).unwrap();
    let at_end = guest.poll(&[Guest::fd_subscription(7, 1, file)]);
    assert_eq!(at_end, Ok(vec![event(7, 1, 0, true)]));
    host_write(&write, b"xyz");
    let stdin = [Guest::fd_subscription(5, 1, 0)];
    assert_eq!(guest.poll(&stdin), Ok(vec![event(5, 1, 3, false)]));
    guest.read(0, 9).unwrap();
    drop(write);
    assert_eq!(guest.poll(&stdin), Ok(vec![event(5, 1, 0, true)]));

    // Errors are events.
    let events = guest
        .poll(&[
            Guest::fd_subscription(1, 1, 99),
            Guest::fd_subscription(2, 1, 3),
            Guest::fd_subscription(3, 2, 0),
            Guest::fd_subscription(4, 1, 1),
            Guest::clock_subscription(5, 2, 1, false),
            Guest::clock_subscription(6, 3, 1, true),
        ])
        .unwrap();
    let errors = events.iter().map(|event| event.error).collect::<Vec<_>>();
    let (badf, inval) = (Errno::Badf as u16, Errno::Inval as u16);
    assert_eq!(errors, [badf, badf, badf, badf, inval, inval]);
    let (_, _, base, inheriting) = guest.fdstat(file).unwrap();
    let args = [file.into(), base & !(1 << 27), inheriting];
    guest.run("fd_fdstat_set_rights", &args).unwrap();
    let events = guest.poll(&[Guest::fd_subscription(1, 1, file)]).unwrap();
    assert_eq!(events[0].error, Errno::Notcapable as u16);

    // A real, short wait.
    let before = guest.time(1);
    guest
        .poll(&[Guest::clock_subscription(1, 1, 2_000_000, false)])
        .unwrap();
    assert!(guest.time(1) - before >= 2_000_000);
    let many = vec![Guest::clock_subscription(1, 1, 0, false); 8193];
    guest.put(600_000, &many.concat());
    let result = guest.run("poll_oneoff", &[600_000, 600_000, 8193, 0]);
    assert_eq!(result, Err(Errno::Nomem));
    // Events may overwrite the subscriptions.
    let result = guest.run("poll_oneoff", &[600_000, 600_000, 100, 0]);
    assert_eq!((result, guest.u32_at(0)), (Ok(()), 100));
}

#[test]
fn time_outs_go_on_with_the_rest() {
    let source = Arc::new(Clock::default());
    source.monotonic_ns.store(500, Ordering::SeqCst);
    source.realtime_ns.store(10_000, Ordering::SeqCst);
    let guest = Guest::new(Config {
        clock: source.clone(),
        ..Config::default()
    });
    let hour = 3_600_000_000_000;
    let poll = [
        Guest::clock_subscription(1, 1, hour, false),
        Guest::clock_subscription(2, 0, hour + 1, false),
        Guest::clock_subscription(3, 0, 2 * hour, true),
    ];
    guest.flag.request();
    assert_eq!(guest.try_poll(&poll), Outcome::Interrupted);
    assert_eq!(guest.state.borrow().started_ns, Some(0));
    source.monotonic_ns.store(500 + hour - 10, Ordering::SeqCst);
    assert_eq!(guest.try_poll(&poll), Outcome::Interrupted);

    let target = Arc::new(Clock::default());
    target.realtime_ns.store(10_000, Ordering::SeqCst);
    let guest = guest.moved_with(Resources {
        clock: target.clone(),
        ..Resources::default()
    });
    guest.flag.request();
    target.monotonic_ns.store(9, Ordering::SeqCst);
    assert_eq!(guest.try_poll(&poll), Outcome::Interrupted);
    target.monotonic_ns.store(10, Ordering::SeqCst);
    assert_eq!(guest.poll(&poll), Ok(vec![event(1, 0, 0, false)]));
    // The next call starts anew.
    assert_eq!(*guest.state.borrow(), CallState::default());
    assert_eq!(guest.try_poll(&poll), Outcome::Interrupted);
    target.realtime_ns.store(2 * hour, Ordering::SeqCst);
    assert_eq!(guest.poll(&poll), Ok(vec![event(3, 0, 0, false)]));
}
