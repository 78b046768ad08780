//! Programs that serve clients at `keel wasm --listen`.

use crate::keel_wasm::{Finished, MODES, finish, guest, keel};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// Clients that wait at once: more than the program's listener holds, less than that and the host's.
const CROWD: usize = 1100;

/// A program that echoes what `connections` clients send, one after the other, and its address.
struct Server {
    address: String,
    end: std::thread::JoinHandle<Finished>,
}

impl Server {
    fn start(options: &[&str], connections: usize) -> Self {
        // An address that no other test listens at.
        let [a, b]: [u8; 2] = rand::random();
        let address = format!("127.{}.{b}.78:7080", a.max(1));
        let mut command = keel();
        command.args(options).args(["--listen", &address]);
        command.arg(guest("echo")).arg(connections.to_string());
        Self {
            address,
            end: std::thread::spawn(move || finish(&mut command)),
        }
    }

    /// A client, once the program is there.
    fn client(&self) -> TcpStream {
        let begun = Instant::now();
        loop {
            match TcpStream::connect(&self.address) {
                Ok(client) => {
                    client.set_read_timeout(Some(LIMIT)).unwrap();
                    return client;
                }
                Err(_) if begun.elapsed() < LIMIT => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn finished(self) -> Finished {
        self.end.join().unwrap()
    }
}

fn pattern(length: u32) -> Vec<u8> {
    (0..length)
        .map(|at| (at.wrapping_mul(at) >> 7) as u8)
        .collect()
}

/// Sends all, ends its direction, and returns what comes back.
fn echoed(mut client: TcpStream, bytes: &[u8]) -> Vec<u8> {
    let mut writer = client.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            writer.write_all(bytes).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        back
    })
}

#[test]
fn clients_are_served_in_every_mode() {
    let sent = pattern(3_000_000);
    for mode in MODES {
        let server = Server::start(mode, 3);
        for _ in 0..3 {
            assert!(echoed(server.client(), &sent) == sent, "{mode:?}");
        }
        let finished = server.finished();
        assert_eq!(finished.code, Some(0), "{mode:?}: {finished:?}");
        assert_eq!(finished.stdout, "3000000 bytes\n".repeat(3));
        assert_eq!(finished.stderr, "", "{mode:?}");
        assert_eq!(finished.captures > 0, mode.contains(&"--shake"));
    }
}

/// A client that is gone is an end, or a failed write, for its program, which does not hang.
#[test]
fn a_client_that_goes_away_is_noticed() {
    let server = Server::start(&[], 1);
    let mut rude = server.client();
    rude.write_all(&pattern(300_000)).unwrap();
    rude.read_exact(&mut [0; 1000]).unwrap();
    // What came and was not read makes this a reset.
    drop(rude);
    let finished = server.finished();
    assert!(matches!(finished.code, Some(0 | 4)), "{finished:?}");
}

/// The last bytes of a program that has ended reach a client that is slow to read; those whom it
/// never accepted are turned away.
#[test]
fn what_a_program_sent_outlives_it() {
    let server = Server::start(&[], 1);
    let mut client = server.client();
    let mut waiting = server.client();
    let sent = pattern(200_000);
    client.write_all(&sent).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    // The program ends only now, and is gone when this client sees its end.
    assert!(!matches!(waiting.read(&mut [0]), Ok(1..)));
    let mut back = Vec::new();
    client.read_to_end(&mut back).unwrap();
    assert!(back == sent);
    assert_eq!(server.finished().code, Some(0));
}

/// Clients beyond what a program's listener holds wait, and are served in their turn.
#[test]
fn a_crowd_waits_for_its_turn() {
    let server = Server::start(&[], CROWD);
    let mut crowd: Vec<_> = (0..CROWD).map(|_| server.client()).collect();
    for (number, client) in crowd.iter_mut().enumerate() {
        client.write_all(&number.to_le_bytes()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
    }
    for (number, mut client) in crowd.into_iter().enumerate() {
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        assert_eq!(back, number.to_le_bytes());
    }
    let finished = server.finished();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_eq!(finished.stdout, "8 bytes\n".repeat(CROWD));
}
