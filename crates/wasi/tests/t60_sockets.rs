//! `sock_*` on a listener handed in.

mod common;
use common::*;
use keel_wasi::*;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

const LISTENER: u32 = 3;

fn listening() -> (SocketAddr, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (listener.local_addr().unwrap(), listener)
}

fn server() -> (SocketAddr, Guest) {
    let (address, listener) = listening();
    let guest = Guest::new(Config {
        listeners: vec![listener],
        ..Config::default()
    });
    (address, guest)
}

impl Guest {
    fn accept(&self, flags: u64) -> Ret<u32> {
        self.run32("sock_accept", &[LISTENER.into(), flags])
    }

    fn recv(&self, fd: u32, length: u32, flags: u64) -> Ret<Vec<u8>> {
        let [iovs, count] = self.vectors(&[length]);
        self.run("sock_recv", &[fd.into(), iovs, count, flags, 0, 8])?;
        assert_eq!(self.bytes(8, 2), [0, 0]);
        Ok(self.bytes(65536, self.u32_at(0) as usize))
    }

    fn send(&self, fd: u32, bytes: &[u8], flags: u64) -> Ret<u32> {
        self.put(65536, bytes);
        let [iovs, count] = self.vectors(&[bytes.len() as u32]);
        self.run32("sock_send", &[fd.into(), iovs, count, flags])
    }

    fn shutdown(&self, fd: u32, how: u64) -> Ret<()> {
        self.run("sock_shutdown", &[fd.into(), how])
    }
}

#[test]
fn a_connection() {
    let (address, guest) = server();
    guest.flag.request();
    let args = [LISTENER.into(), 0, 0];
    assert_eq!(guest.outcome("sock_accept", &args), Outcome::Interrupted);
    let mut client = TcpStream::connect(address).unwrap();
    let fd = guest.accept(0).unwrap();
    assert_eq!(fd, 4);
    assert_eq!(guest.fdstat(fd).unwrap().0, 6);
    assert_eq!(guest.stat(fd).unwrap().filetype, 6);
    assert_eq!(guest.try_read(fd, &[9]), Outcome::Interrupted);
    guest.flag.clear();

    client.write_all(b"hello").unwrap();
    assert_eq!(guest.recv(fd, 4, 1), Ok(b"hell".to_vec()));
    assert_eq!(guest.recv(fd, 4, 0), Ok(b"hell".to_vec()));
    assert_eq!(guest.read(fd, 4), Ok(b"o".to_vec()));
    // All of it, or what there is when a request comes.
    client.write_all(b"1234").unwrap();
    assert_eq!(guest.recv(fd, 4, 2), Ok(b"1234".to_vec()));
    client.write_all(b"56").unwrap();
    guest.flag.request();
    assert_eq!(guest.recv(fd, 4, 2), Ok(b"56".to_vec()));
    guest.flag.clear();
    assert_eq!(guest.send(fd, b"abc", 0), Ok(3));
    assert_eq!(guest.write(fd, b"def"), Ok(3));
    assert_eq!(guest.write(fd, b""), Ok(0));
    let mut buffer = [0; 6];
    client.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"abcdef");
    assert_eq!(guest.shutdown(fd, 0), Err(Errno::Inval));
    assert_eq!(guest.shutdown(fd, 2), Ok(()));
    assert_eq!(client.read(&mut buffer).unwrap(), 0);
    assert_eq!(guest.send(fd, b"x", 0), Err(Errno::Pipe));
    drop(client);
    assert_eq!(guest.recv(fd, 4, 0), Ok(vec![]));
    assert_eq!(guest.close(fd), Ok(()));
}

#[test]
fn nonblocking_and_poll() {
    let (address, guest) = server();
    let set = |fd: u32, flags| guest.run("fd_fdstat_set_flags", &[fd.into(), flags]);
    set(LISTENER, NONBLOCK).unwrap();
    assert_eq!(guest.accept(0), Err(Errno::Again));
    assert_eq!(guest.fdstat(LISTENER).unwrap().1, NONBLOCK);
    let mut client = TcpStream::connect(address).unwrap();
    let incoming = guest
        .poll(&[Guest::fd_subscription(1, 1, LISTENER)])
        .unwrap();
    assert_eq!((incoming[0].error, incoming[0].nbytes), (0, 1));
    let fd = guest.accept(NONBLOCK).unwrap();
    assert_eq!(guest.recv(fd, 4, 0), Err(Errno::Again));
    client.write_all(b"xyz").unwrap();
    let events = guest.poll(&[Guest::fd_subscription(1, 1, fd)]).unwrap();
    assert_eq!((events[0].nbytes, events[0].hangup), (3, false));
    let events = guest.poll(&[Guest::fd_subscription(2, 2, fd)]).unwrap();
    assert_eq!((events[0].userdata, events[0].error), (2, 0));
    let listener = guest
        .poll(&[Guest::fd_subscription(1, 2, LISTENER)])
        .unwrap();
    assert_eq!(listener[0].error, Errno::Badf as u16);
    // Fill the connection until it would block.
    let mut sent = 0;
    let errno = loop {
        match guest.send(fd, &[0; 65536], 0) {
            Ok(count) => sent += count,
            Err(errno) => break errno,
        }
    };
    assert_eq!(errno, Errno::Again);
    assert!(sent > 0);
    set(fd, 0).unwrap();
    guest.flag.request();
    let [iovs, count] = guest.vectors(&[9]);
    let args = [fd.into(), iovs, count, 0, 0];
    assert_eq!(guest.outcome("sock_send", &args), Outcome::Interrupted);
}

#[test]
fn errors() {
    let (_dir, config) = sandbox();
    let (address, listener) = listening();
    let guest = Guest::new(Config {
        listeners: vec![listener],
        limits: Limits {
            descriptors_max: 6,
            ..Limits::default()
        },
        ..config
    });
    // The listener comes before the preopen.
    assert_eq!(guest.run("fd_prestat_get", &[4, 0]), Ok(()));
    assert_eq!(guest.run("fd_prestat_get", &[3, 0]), Err(Errno::Badf));
    let _client = TcpStream::connect(address).unwrap();
    let fd = guest.accept(0).unwrap();
    assert_eq!(guest.accept(0), Err(Errno::Mfile));
    let on = |name: &str, fd: u64| {
        let mut args = vec![0; Function::by_name(name).unwrap().params().len()];
        args[0] = fd;
        guest.run(name, &args)
    };
    for name in ["sock_accept", "sock_recv", "sock_send", "sock_shutdown"] {
        for fd in [0, 1, 4] {
            assert_eq!(on(name, fd), Err(Errno::Notsock), "{name} {fd}");
        }
    }
    assert_eq!(on("sock_accept", fd.into()), Err(Errno::Inval));
    assert_eq!(on("sock_recv", LISTENER.into()), Err(Errno::Notconn));
    assert_eq!(guest.shutdown(LISTENER, 3), Err(Errno::Notconn));
    assert_eq!(guest.send(fd, b"x", 1), Err(Errno::Inval));
    assert_eq!(guest.accept(APPEND), Err(Errno::Inval));
    assert_eq!(guest.read(LISTENER, 1), Err(Errno::Badf));
    assert_eq!(guest.write(LISTENER, b"x"), Err(Errno::Badf));
    assert_eq!(guest.pread(fd, 1, 0), Err(Errno::Spipe));
    assert_eq!(guest.pwrite(fd, b"x", 0), Err(Errno::Spipe));
    assert_eq!(guest.seek(fd, 0, 0), Err(Errno::Spipe));
    let (_, _, base, inheriting) = guest.fdstat(fd).unwrap();
    let args = [fd.into(), base & !RW & !(1 << 28), inheriting];
    guest.run("fd_fdstat_set_rights", &args).unwrap();
    assert_eq!(guest.recv(fd, 1, 0), Err(Errno::Notcapable));
    assert_eq!(guest.send(fd, b"x", 0), Err(Errno::Notcapable));
    assert_eq!(guest.shutdown(fd, 1), Err(Errno::Notcapable));
}

#[test]
fn a_move_keeps_listeners_and_resets_connections() {
    let (address, guest) = server();
    let client = TcpStream::connect(address).unwrap();
    let fd = guest.accept(NONBLOCK).unwrap();
    let snapshot = guest.wasi.snapshot().unwrap();
    let record = match &snapshot.descriptors[4].kind {
        DescriptorKind::Connection(record) => record.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(record.peer, Some(client.local_addr().unwrap()));
    assert_eq!(record.local, Some(address));
    let (target, listener) = listening();
    let guest = guest.moved_with(Resources {
        listeners: vec![listener],
        ..Resources::default()
    });
    assert_eq!(guest.recv(fd, 1, 0), Err(Errno::Connreset));
    assert_eq!(guest.send(fd, b"x", 0), Err(Errno::Connreset));
    assert_eq!(guest.read(fd, 1), Err(Errno::Connreset));
    assert_eq!(guest.shutdown(fd, 3), Err(Errno::Notconn));
    assert_eq!(guest.fdstat(fd).unwrap().1, NONBLOCK);
    let subscriptions = [1, 2].map(|kind| Guest::fd_subscription(9, kind, fd));
    let events = guest.poll(&subscriptions).unwrap();
    assert!(events.iter().all(|event| event.error == 0 && event.hangup));
    assert_eq!(events.len(), 2);
    let _client = TcpStream::connect(target).unwrap();
    assert_eq!(guest.accept(0), Ok(5));
}
