//! Parts in this process, connected by TCP.

use super::*;

pub(crate) fn part(number: usize) -> PartId {
    PartId::new(number).unwrap()
}

pub(crate) struct Part {
    pub(crate) memories: Arc<[Arc<GuestMemory>]>,
    pub(crate) pages: Pages,
}

impl Part {
    /// A word of its memory, as a guest accesses it.
    pub(crate) fn word(&self, at: u64) -> &AtomicU64 {
        assert!(at.is_multiple_of(8));
        // SAFETY: aligned and within the memory (cells are checked), which is used by
        // atomic operations only.
        unsafe { AtomicU64::from_ptr(self.memories[0].cells()[at as usize].get().cast()) }
    }

    pub(crate) fn host_read(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.pages.read(0, at, &mut bytes, LONG).unwrap();
        u64::from_le_bytes(bytes)
    }
}

/// A pair of connected sockets.
pub(crate) fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (dialled, listener.accept().unwrap().0)
}

/// Parts with memories of this many pages of 4 KiB; the first part has `first` in its
/// memory.
pub(crate) fn parts(count: usize, pages: u64, hold: Duration, first: &[u8]) -> Vec<Part> {
    parts_on(&vec![None; count], pages, hold, first)
}

/// As [`parts`], on hosts with room for these numbers of bytes.
pub(crate) fn parts_on(
    rooms: &[Option<u64>],
    pages: u64,
    hold: Duration,
    first: &[u8],
) -> Vec<Part> {
    let count = rooms.len();
    let identities: Vec<_> = (0..count)
        .map(|_| PinnedIdentity::generate().unwrap())
        .collect();
    // For each pair of parts: the dialled and the accepted socket.
    let mut dialled = BTreeMap::new();
    let mut heard = BTreeMap::new();
    for from in 0..count {
        for to in (0..count).filter(|to| *to != from) {
            let (a, b) = connected();
            dialled.insert((from, to), a);
            heard.insert((from, to), b);
        }
    }
    let all: PartSet = (0..count).map(part).collect();
    let greet = |me: usize, mut sockets: Vec<(usize, TcpStream, TcpStream)>| {
        std::thread::scope(|scope| {
            // In parallel, because each waits for the other.
            let greeting: Vec<_> = sockets
                .drain(..)
                .map(|(other, out, heard)| {
                    let identity = &identities[me];
                    let pinned = identities[other].fingerprint;
                    scope.spawn(move || {
                        let client = ClientTls::pinned(identity, pinned).unwrap();
                        let server = ServerTls::pinned(identity, pinned).unwrap();
                        let machine = "m".parse().unwrap();
                        let hello = Hello::new(machine, Epoch::default(), part(me), part(other));
                        let ends = PeerConnections::greet((out, &client), (heard, &server), &hello);
                        (part(other), ends.unwrap())
                    })
                })
                .collect();
            let ends = greeting.into_iter().map(|it| it.join().unwrap());
            ends.collect::<BTreeMap<_, _>>()
        })
    };
    let sockets: Vec<Vec<_>> = (0..count)
        .map(|me| {
            let others = (0..count).filter(|other| *other != me);
            others
                .map(|other| {
                    let out = dialled.remove(&(me, other)).unwrap();
                    let heard = heard.remove(&(other, me)).unwrap();
                    (other, out, heard)
                })
                .collect()
        })
        .collect();
    let ends: Vec<_> = std::thread::scope(|scope| {
        let greet = &greet;
        let greeting: Vec<_> = sockets
            .into_iter()
            .enumerate()
            .map(|(me, sockets)| scope.spawn(move || greet(me, sockets)))
            .collect();
        greeting.into_iter().map(|it| it.join().unwrap()).collect()
    });
    let wasm_pages = (pages * PAGE_BYTES).div_ceil(64 << 10);
    ends.into_iter()
        .enumerate()
        .map(|(me, ends)| {
            let memory = GuestMemory::new(wasm_pages, Some(wasm_pages), false, 1 << 30).unwrap();
            if me == 0 && !first.is_empty() {
                memory.write(0, first).unwrap();
            }
            let memories: Arc<[Arc<GuestMemory>]> = Arc::new([Arc::new(memory)]);
            let setup = PartConfig {
                me: part(me),
                parts: all,
                origin: PartId::HOME,
                memories: memories.clone(),
                segment_pages: 16,
                hold,
                seed: 5 + me as u64,
                room_bytes: rooms[me],
            };
            let pages = Pages::begin(setup, ends, Arc::new(())).unwrap();
            Part { memories, pages }
        })
        .collect()
}

/// Runs a thread on each of these parts; returns their results.
pub(crate) fn on<'a, T: Send>(
    parts: impl IntoIterator<Item = &'a Part>,
    run: impl Fn(&Part) -> T + Sync,
) -> Vec<T> {
    let run = &run;
    std::thread::scope(|scope| {
        let parts = parts.into_iter();
        let running: Vec<_> = parts.map(|part| scope.spawn(move || run(part))).collect();
        running.into_iter().map(|it| it.join().unwrap()).collect()
    })
}

pub(crate) fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
