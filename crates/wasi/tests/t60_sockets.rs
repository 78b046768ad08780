//! `sock_*` on connections that a carrier offers, and what of them moves.

mod common;
use common::*;
use keel_wasi::network::{
    BACKLOG_MAX, Connection, ConnectionId, Holder, NotDelivered, NotOffered, StreamRecord,
};
use keel_wasi::*;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const LISTENER: u32 = 3;

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], port))
}

fn id(number: u64) -> ConnectionId {
    ConnectionId { carrier: 7, number }
}

fn server() -> Guest {
    Guest::new(Config {
        listeners: 1,
        ..Config::default()
    })
}

/// A client, and its carrier.
struct Client {
    connection: Arc<Connection>,
    /// Bytes of it that it has sent.
    sent: u64,
    /// Bytes of the guest that it has received.
    received: u64,
}

impl Client {
    /// Connects to the guest's listener.
    fn new(guest: &Guest) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let network = guest.wasi.network();
        let offered = network.offer(id(number), 0, address(80), address(9));
        Self {
            connection: offered.unwrap(),
            sent: 0,
            received: 0,
        }
    }

    /// The same client, whose guest has moved.
    fn again(self, guest: &Guest) -> Self {
        let moved = guest.wasi.network().connection(self.connection.id());
        Self {
            connection: moved.unwrap(),
            ..self
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.connection.deliver(self.sent, bytes).unwrap();
        self.sent += bytes.len() as u64;
    }

    fn receive(&mut self, most: usize) -> Vec<u8> {
        let mut buffer = vec![0; most];
        let count = self.connection.sent_from(self.received, &mut buffer);
        buffer.truncate(count);
        self.received += count as u64;
        self.connection.acknowledge(self.received).unwrap();
        buffer
    }
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
    let guest = server();
    guest.flag.request();
    let args = [LISTENER.into(), 0, 0];
    assert_eq!(guest.outcome("sock_accept", &args), Outcome::Interrupted);
    let mut client = Client::new(&guest);
    let fd = guest.accept(0).unwrap();
    assert_eq!(fd, 4);
    assert_eq!(guest.fdstat(fd).unwrap().0, 6);
    assert_eq!(guest.stat(fd).unwrap().filetype, 6);
    assert_eq!(guest.try_read(fd, &[9]), Outcome::Interrupted);
    guest.flag.clear();

    client.send(b"hello");
    assert_eq!(guest.recv(fd, 4, 1), Ok(b"hell".to_vec()));
    assert_eq!(guest.recv(fd, 4, 0), Ok(b"hell".to_vec()));
    assert_eq!(guest.read(fd, 4), Ok(b"o".to_vec()));
    // All of it, or what there is when a request comes.
    client.send(b"1234");
    assert_eq!(guest.recv(fd, 4, 2), Ok(b"1234".to_vec()));
    client.send(b"56");
    guest.flag.request();
    assert_eq!(guest.recv(fd, 4, 2), Ok(b"56".to_vec()));
    guest.flag.clear();
    assert_eq!(guest.send(fd, b"abc", 0), Ok(3));
    assert_eq!(guest.write(fd, b"def"), Ok(3));
    assert_eq!(guest.write(fd, b""), Ok(0));
    assert_eq!(client.receive(4), b"abcd");
    assert_eq!(client.receive(4), b"ef");
    assert_eq!(guest.shutdown(fd, 0), Err(Errno::Inval));
    assert_eq!(guest.shutdown(fd, 2), Ok(()));
    assert!(client.connection.progress().ended);
    assert_eq!(guest.send(fd, b"x", 0), Err(Errno::Pipe));
    client.connection.deliver_end(client.sent).unwrap();
    assert_eq!(guest.recv(fd, 4, 0), Ok(vec![]));
    assert!(!client.connection.progress().closed);
    assert_eq!(guest.close(fd), Ok(()));
    assert!(client.connection.progress().closed);
}

/// Calls that wait are woken by what the carrier does.
#[test]
fn waiting_calls_are_woken() {
    let guest = server();
    let wasi = guest.wasi.clone();
    let carrier = std::thread::spawn(move || {
        let network = wasi.network();
        let connection = network.offer(id(1), 0, address(80), address(9)).unwrap();
        connection.deliver(0, b"question").unwrap();
        let mut buffer = vec![0; 1 << 20];
        let mut received = 0;
        while received < 1 << 20 {
            let count = connection.sent_from(received, &mut buffer[received as usize..]);
            received += count as u64;
            connection.acknowledge(received).unwrap();
            std::thread::yield_now();
        }
        connection.deliver_end(8).unwrap();
        buffer
    });
    let fd = guest.accept(0).unwrap();
    assert_eq!(guest.read(fd, 8), Ok(b"question".to_vec()));
    let answer: Vec<u8> = (0..1 << 20).map(|at: u32| (at >> 3) as u8).collect();
    let mut sent = 0;
    while sent < answer.len() {
        let end = answer.len().min(sent + 100_000);
        sent += guest.send(fd, &answer[sent..end], 0).unwrap() as usize;
    }
    assert_eq!(guest.read(fd, 8), Ok(vec![]));
    assert!(carrier.join().unwrap() == answer);
    assert_eq!(guest.wasi.network().connections().len(), 1);
}

#[test]
fn nonblocking_and_poll() {
    let guest = server();
    let set = |fd: u32, flags| guest.run("fd_fdstat_set_flags", &[fd.into(), flags]);
    set(LISTENER, NONBLOCK).unwrap();
    assert_eq!(guest.accept(0), Err(Errno::Again));
    assert_eq!(guest.fdstat(LISTENER).unwrap().1, NONBLOCK);
    guest.flag.request();
    let waiting = [Guest::fd_subscription(1, 1, LISTENER)];
    assert_eq!(guest.try_poll(&waiting), Outcome::Interrupted);
    guest.flag.clear();
    let mut client = Client::new(&guest);
    let incoming = guest.poll(&waiting).unwrap();
    assert_eq!((incoming[0].error, incoming[0].nbytes), (0, 1));
    let fd = guest.accept(NONBLOCK).unwrap();
    guest.flag.request();
    assert_eq!(guest.try_poll(&waiting), Outcome::Interrupted);
    let reading = [Guest::fd_subscription(1, 1, fd)];
    assert_eq!(guest.try_poll(&reading), Outcome::Interrupted);
    guest.flag.clear();
    assert_eq!(guest.recv(fd, 4, 0), Err(Errno::Again));
    client.send(b"xyz");
    let events = guest.poll(&reading).unwrap();
    assert_eq!((events[0].nbytes, events[0].hangup), (3, false));
    let writing = [Guest::fd_subscription(2, 2, fd)];
    let events = guest.poll(&writing).unwrap();
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
    assert_eq!(guest.try_poll(&writing), Outcome::Interrupted);
    guest.flag.clear();
    assert_eq!(client.receive(1).len(), 1);
    assert_eq!(guest.poll(&writing).unwrap()[0].userdata, 2);
    assert_eq!(guest.send(fd, b"ab", 0), Ok(1));
    // The end, after the bytes.
    client.connection.deliver_end(3).unwrap();
    assert_eq!(guest.recv(fd, 9, 0), Ok(b"xyz".to_vec()));
    let events = guest.poll(&reading).unwrap();
    assert_eq!((events[0].nbytes, events[0].hangup), (0, true));
}

#[test]
fn errors() {
    let (_dir, config) = sandbox();
    let guest = Guest::new(Config {
        listeners: 1,
        limits: Limits {
            descriptors_max: 6,
            ..Limits::default()
        },
        ..config
    });
    // The listener comes before the preopen.
    assert_eq!(guest.run("fd_prestat_get", &[4, 0]), Ok(()));
    assert_eq!(guest.run("fd_prestat_get", &[3, 0]), Err(Errno::Badf));
    let _client = Client::new(&guest);
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
fn offers_are_bounded_and_numbers_used_once() {
    let guest = server();
    let network = guest.wasi.network();
    let offer = |number, listener| {
        let offered = network.offer(id(number), listener, address(80), address(9));
        offered.map(drop)
    };
    assert_eq!(offer(0, 1), Err(NotOffered::NoListener(1)));
    for number in 0..BACKLOG_MAX as u64 {
        assert_eq!(offer(number, 0), Ok(()));
    }
    assert_eq!(offer(5000, 0), Err(NotOffered::Full(BACKLOG_MAX)));
    guest.accept(0).unwrap();
    assert_eq!(offer(1, 0), Err(NotOffered::Exists(id(1))));
    assert_eq!(offer(5000, 0), Ok(()));
    // Who gave up waiting is not accepted.
    for number in 1..BACKLOG_MAX as u64 {
        network.remove(id(number));
    }
    let fd = guest.accept(NONBLOCK).unwrap();
    assert_eq!(guest.recv(fd, 1, 0), Err(Errno::Again));
    network.remove(id(5000));
    assert_eq!(guest.recv(fd, 1, 0), Err(Errno::Connreset));
}

/// Offsets say what is new: repetition changes nothing, and a gap is refused.
#[test]
fn bytes_arrive_once_however_often_they_are_sent() {
    let guest = server();
    let client = Client::new(&guest);
    let fd = guest.accept(NONBLOCK).unwrap();
    let connection = &client.connection;
    assert_eq!(connection.deliver(1, b"b"), Err(NotDelivered::Gap(0)));
    connection.deliver(0, b"abc").unwrap();
    connection.deliver(0, b"abc").unwrap();
    connection.deliver(1, b"bcde").unwrap();
    assert_eq!(guest.recv(fd, 9, 0), Ok(b"abcde".to_vec()));
    connection.deliver(3, b"de").unwrap();
    assert_eq!(guest.recv(fd, 9, 0), Err(Errno::Again));
    assert_eq!(connection.deliver_end(6), Err(NotDelivered::Gap(5)));
    assert_eq!(connection.deliver_end(4), Err(NotDelivered::AfterEnd(4)));
    connection.deliver_end(5).unwrap();
    connection.deliver_end(5).unwrap();
    assert_eq!(connection.deliver(5, b"f"), Err(NotDelivered::AfterEnd(5)));
    assert_eq!(guest.recv(fd, 9, 0), Ok(vec![]));
    guest.send(fd, b"12345", 0).unwrap();
    let mut buffer = [0; 9];
    assert_eq!(connection.sent_from(0, &mut buffer), 5);
    connection.acknowledge(3).unwrap();
    connection.acknowledge(2).unwrap();
    assert_eq!(connection.acknowledge(6), Err(NotDelivered::NotSent(5)));
    assert_eq!(connection.acknowledge_end(), Err(NotDelivered::NotSent(5)));
    assert_eq!(connection.sent_from(2, &mut buffer), 0);
    assert_eq!(connection.sent_from(4, &mut buffer), 1);
    assert_eq!(connection.sent_from(9, &mut buffer), 0);
    guest.close(fd).unwrap();
    connection.acknowledge_end().unwrap();
    assert_eq!(connection.progress().acknowledged, 5);
}

/// The guest reads nothing: the carrier may not deliver for ever. Together, all connections hold
/// a bounded number of bytes.
#[test]
fn what_is_not_read_is_bounded() {
    let guest = Guest::new(Config {
        listeners: 1,
        limits: Limits {
            descriptors_max: 1000,
            ..Limits::default()
        },
        ..Config::default()
    });
    let mut held = 0;
    let mut clients = Vec::new();
    for _ in 0..500 {
        let mut client = Client::new(&guest);
        let room = client.connection.room();
        client.send(&vec![1; room]);
        assert!(client.connection.room() <= room);
        held += room;
        clients.push(client);
    }
    // 16 MiB, a window, and 4 KiB for each.
    assert!(held <= (16 << 20) + (256 << 10) + 500 * (4 << 10), "{held}");
    let refused = clients[0]
        .connection
        .deliver(clients[0].sent, &[1; 1 << 20]);
    assert_eq!(refused, Err(NotDelivered::NoRoom(0)));
    // What nobody will read is not kept.
    let fd = guest.accept(0).unwrap();
    guest.shutdown(fd, 1).unwrap();
    for _ in 0..100 {
        let room = clients[0].connection.room();
        clients[0].send(&vec![1; room]);
    }
    assert_eq!(guest.recv(fd, 1, 0), Ok(vec![]));
}

/// The carrier is told what its guest did.
#[test]
fn the_carrier_is_told() {
    let guest = server();
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    guest.wasi.network().set_changed(Arc::new(move |id| {
        tell.lock().unwrap().push(id);
    }));
    let mut client = Client::new(&guest);
    let told = || std::mem::take(&mut *told.lock().unwrap());
    let this = client.connection.id();
    assert_eq!(told(), []);
    let fd = guest.accept(0).unwrap();
    assert_eq!(told(), [this]);
    client.send(b"abc");
    assert_eq!(told(), []);
    guest.recv(fd, 1, 1).unwrap();
    assert_eq!(told(), []);
    guest.recv(fd, 1, 0).unwrap();
    assert_eq!(told(), [this]);
    guest.send(fd, b"x", 0).unwrap();
    assert_eq!(told(), [this]);
    guest.shutdown(fd, 2).unwrap();
    guest.close(fd).unwrap();
    assert_eq!(told(), [this, this]);
    assert_eq!(client.receive(9), b"x");
}

/// Unread and unsent bytes, connections that nobody accepted, and last bytes of closed ones move.
#[test]
fn a_move_keeps_connections() {
    let guest = server();
    let mut open = Client::new(&guest);
    let closed = Client::new(&guest);
    let fd = guest.accept(NONBLOCK).unwrap();
    let other = guest.accept(0).unwrap();
    let mut waiting = Client::new(&guest);
    open.send(b"question");
    assert_eq!(guest.recv(fd, 5, 0), Ok(b"quest".to_vec()));
    guest.send(fd, b"answer", 0).unwrap();
    assert_eq!(open.receive(2), b"an");
    guest.send(other, b"last", 0).unwrap();
    guest.close(other).unwrap();
    waiting.send(b"early");
    let snapshot = guest.wasi.snapshot().unwrap();
    let holders = snapshot.network.connections.iter().map(|(it, _)| *it);
    let expected = [Holder::Listener, Holder::Descriptor(fd), Holder::Closed];
    assert_eq!(holders.collect::<Vec<_>>(), expected);

    let guest = guest.moved_with(Resources::default());
    let (mut open, mut closed, waiting) = (
        open.again(&guest),
        closed.again(&guest),
        waiting.again(&guest),
    );
    assert_eq!(guest.fdstat(fd).unwrap().1, NONBLOCK);
    assert_eq!(guest.recv(fd, 9, 0), Ok(b"ion".to_vec()));
    assert_eq!(open.receive(9), b"swer");
    open.send(b"!");
    assert_eq!(guest.recv(fd, 9, 0), Ok(b"!".to_vec()));
    assert_eq!(closed.receive(9), b"last");
    assert!(closed.connection.progress().ended);
    let accepted = guest.accept(0).unwrap();
    assert_eq!(guest.recv(accepted, 9, 0), Ok(b"early".to_vec()));
    assert_eq!(waiting.connection.peer(), address(9));

    // Nobody carries it on: it is reset, and stays so.
    guest.wasi.network().remove(open.connection.id());
    let guest = guest.moved_with(Resources::default());
    assert_eq!(guest.recv(fd, 1, 0), Err(Errno::Connreset));
    assert_eq!(guest.send(fd, b"x", 0), Err(Errno::Connreset));
    assert_eq!(guest.read(fd, 1), Err(Errno::Connreset));
    assert_eq!(guest.shutdown(fd, 3), Err(Errno::Notconn));
    let subscriptions = [1, 2].map(|kind| Guest::fd_subscription(9, kind, fd));
    let events = guest.poll(&subscriptions).unwrap();
    assert!(events.iter().all(|event| event.error == 0 && event.hangup));
    assert_eq!(events.len(), 2);
}

/// A guest that echoes, a carrier that repeats and loses, and moves at any time: each byte comes
/// back once, in order.
#[test]
fn random_moves_lose_and_double_nothing() {
    for seed in 0..60 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut guest = server();
        let mut client = Client::new(&guest);
        let fd = guest.accept(NONBLOCK).unwrap();
        let question: Vec<u8> = (0..random.random_range(1..400_000))
            .map(|_| random.random())
            .collect();
        let (mut answer, mut kept): (Vec<u8>, Vec<u8>) = Default::default();
        while answer.len() < question.len() {
            match random.random_range(0..8) {
                0 => {
                    guest = guest.moved_with(Resources::default());
                    client = client.again(&guest);
                }
                1..=3 => {
                    // From anywhere before the end of what arrived.
                    let received = client.connection.progress().received as usize;
                    let from = random.random_range(received.saturating_sub(1000)..=received);
                    let most = client.connection.room() + received - from;
                    let end = question.len().min(from + random.random_range(0..=most));
                    let bytes = &question[from..end.max(from)];
                    client.connection.deliver(from as u64, bytes).unwrap();
                }
                4 | 5 => {
                    if kept.is_empty() {
                        let length = random.random_range(1..60_000);
                        kept = guest.recv(fd, length, 0).unwrap_or_default();
                    }
                    if let Ok(sent) = guest.send(fd, &kept, 0) {
                        kept.drain(..sent as usize);
                    }
                }
                _ => {
                    // Some bytes are received, but the acknowledgement is lost.
                    let mut buffer = vec![0; random.random_range(1..50_000)];
                    let from = client.connection.progress().acknowledged;
                    let count = client.connection.sent_from(from, &mut buffer);
                    if random.random_bool(0.7) {
                        answer.extend(&buffer[..count]);
                        client.connection.acknowledge(from + count as u64).unwrap();
                    }
                }
            }
        }
        assert!(answer == question, "seed {seed}");
    }
}

#[test]
fn damaged_connections_are_refused() {
    let guest = server();
    let _open = Client::new(&guest);
    let _waiting = Client::new(&guest);
    guest.accept(0).unwrap();
    let good = guest.wasi.snapshot().unwrap();
    assert!(Wasi::restore(good.clone(), Resources::default()).is_ok());
    fn first(snapshot: &mut Snapshot) -> &mut StreamRecord {
        &mut snapshot.network.connections[0].1
    }
    type Damage = fn(&mut Snapshot);
    let damages: &[Damage] = &[
        |s| first(s).listener = 1,
        |s| first(s).id = s.network.connections[1].1.id,
        |s| first(s).incoming = vec![0; (256 << 10) + 1].into(),
        |s| first(s).outgoing = vec![0; (256 << 10) + 1].into(),
        |s| first(s).end_acknowledged = true,
        |s| {
            first(s).read = u64::MAX;
            first(s).incoming = vec![0].into();
        },
        |s| {
            first(s).acknowledged = u64::MAX;
            first(s).outgoing = vec![0].into();
        },
        // Of a descriptor that another has, that is none, and that is something else.
        |s| s.network.connections[0].0 = Holder::Descriptor(4),
        |s| s.network.connections[0].0 = Holder::Descriptor(9),
        |s| s.network.connections[0].0 = Holder::Descriptor(3),
    ];
    for (number, damage) in damages.iter().enumerate() {
        let mut snapshot = good.clone();
        damage(&mut snapshot);
        let refused = Wasi::restore(snapshot, Resources::default());
        assert!(refused.is_err(), "damage {number}");
    }
}
