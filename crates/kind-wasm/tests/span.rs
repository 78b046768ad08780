//! Parts of a machine in one process, with real memories, faults and connections. The
//! threads access memory as guests do, through the mapping.

#![allow(unsafe_code)]

use keel_cluster::Epoch;
use keel_kind_wasm::span::{
    Cut, CutPiece, Hello, PART_BYTES_MIN, Pages, PartConfig, PeerConnections, SpanError,
};
use keel_net::{ClientTls, PinnedIdentity, ServerTls};
use keel_wasm::coherence::{PartId, PartSet};
use keel_wasm::memory::{GuestMemory, PAGE_BYTES};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, RwLock};
use std::time::{Duration, Instant};

/// A longer duration counts as a hang.
const LONG: Duration = Duration::from_secs(10);

fn part(number: usize) -> PartId {
    PartId::new(number).unwrap()
}

struct Part {
    memories: Arc<[Arc<GuestMemory>]>,
    pages: Pages,
}

impl Part {
    /// A word of its memory, as a guest accesses it.
    fn word(&self, at: u64) -> &AtomicU64 {
        assert!(at.is_multiple_of(8));
        // SAFETY: aligned and within the memory (cells are checked), which is used by
        // atomic operations only.
        unsafe { AtomicU64::from_ptr(self.memories[0].cells()[at as usize].get().cast()) }
    }

    fn host_read(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.pages.read(0, at, &mut bytes, LONG).unwrap();
        u64::from_le_bytes(bytes)
    }
}

/// A pair of connected sockets.
fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (dialled, listener.accept().unwrap().0)
}

/// Parts with memories of this many pages of 4 KiB; the first part has `first` in its
/// memory.
fn parts(count: usize, pages: u64, hold: Duration, first: &[u8]) -> Vec<Part> {
    parts_on(&vec![None; count], pages, hold, first)
}

/// As [`parts`], on hosts with room for these numbers of bytes.
fn parts_on(rooms: &[Option<u64>], pages: u64, hold: Duration, first: &[u8]) -> Vec<Part> {
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
fn on<'a, T: Send>(
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

fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

const HOLD: Duration = Duration::from_micros(100);

#[test]
fn writes_are_visible_at_other_parts() {
    let first: Vec<u8> = (0..8 * PAGE_BYTES).map(|at| (at / 512) as u8).collect();
    let parts = parts(3, 32, HOLD, &first);
    for number in [1, 2, 0] {
        for page in 0..8u64 {
            let expected = u64::from_le_bytes([(page * 8) as u8; 8]);
            let word = parts[number].word(page * PAGE_BYTES);
            assert_eq!(word.load(Ordering::SeqCst), expected);
        }
        // Pages that were never written are zero at all parts.
        assert_eq!(
            parts[number].word(20 * PAGE_BYTES).load(Ordering::SeqCst),
            0
        );
    }
    for round in 1..20u64 {
        let (writer, at) = (round as usize % 3, round * 3 % 32 * PAGE_BYTES + 64);
        parts[writer].word(at).store(round, Ordering::SeqCst);
        for part in &parts {
            assert_eq!(part.word(at).load(Ordering::SeqCst), round);
            assert_eq!(part.host_read(at), round);
        }
    }
    assert!(parts[1].pages.latency().count() >= 10);
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}

/// Concurrent additions by all parts: none is lost.
#[test]
fn no_addition_is_lost() {
    let parts = parts(3, 16, HOLD, &[]);
    let add = |part: &Part| {
        for round in 0..600u64 {
            for page in 0..3 {
                part.word(page * PAGE_BYTES + 8 * (round % 5))
                    .fetch_add(1, Ordering::SeqCst);
            }
        }
    };
    on(parts.iter().chain(&parts), add);
    for part in &parts {
        for page in 0..3 {
            let sum: u64 = (0..5)
                .map(|at| part.word(page * PAGE_BYTES + 8 * at).load(Ordering::SeqCst))
                .sum();
            assert_eq!(sum, 6 * 600);
        }
    }
}

type Step = fn(&AtomicU64, &AtomicU64) -> (u64, u64);
/// Its name, its threads with their parts, and the forbidden outcomes.
type Litmus = (&'static str, Vec<(usize, Step)>, fn(&[(u64, u64)]) -> bool);

/// Litmus tests on real processors: outcomes that no interleaving produces do not occur
/// (store buffering, message passing, load buffering, IRIW).
#[test]
fn litmus() {
    const ROUNDS: u32 = 150;
    let parts = parts(3, 64, Duration::from_micros(20), &[]);
    let tests: [Litmus; 4] = [
        (
            "store buffering",
            vec![
                (1, |x, y| {
                    (x.swap(1, Ordering::SeqCst), y.load(Ordering::SeqCst))
                }),
                (2, |x, y| {
                    (y.swap(1, Ordering::SeqCst), x.load(Ordering::SeqCst))
                }),
            ],
            |seen| seen[0].1 == 0 && seen[1].1 == 0,
        ),
        (
            "message passing",
            vec![
                (1, |x, y| {
                    x.store(1, Ordering::SeqCst);
                    y.store(1, Ordering::SeqCst);
                    (0, 0)
                }),
                (2, |x, y| {
                    (y.load(Ordering::SeqCst), x.load(Ordering::SeqCst))
                }),
            ],
            |seen| seen[1] == (1, 0),
        ),
        (
            "load buffering",
            vec![
                (0, |x, y| {
                    let seen = x.load(Ordering::SeqCst);
                    y.store(1, Ordering::SeqCst);
                    (seen, 0)
                }),
                (1, |x, y| {
                    let seen = y.load(Ordering::SeqCst);
                    x.store(1, Ordering::SeqCst);
                    (seen, 0)
                }),
            ],
            |seen| seen[0].0 == 1 && seen[1].0 == 1,
        ),
        (
            "IRIW",
            vec![
                (0, |x, _| (x.swap(1, Ordering::SeqCst), 0)),
                (1, |_, y| (y.swap(1, Ordering::SeqCst), 0)),
                (2, |x, y| {
                    (x.load(Ordering::SeqCst), y.load(Ordering::SeqCst))
                }),
                (1, |x, y| {
                    let second = y.load(Ordering::SeqCst);
                    (x.load(Ordering::SeqCst), second)
                }),
            ],
            |seen| seen[2] == (1, 0) && seen[3] == (0, 1),
        ),
    ];
    for (name, threads, forbidden) in &tests {
        let mut outcomes = BTreeSet::new();
        for round in 0..ROUNDS {
            let (x, y) = (u64::from(round % 3) * PAGE_BYTES, 8 * PAGE_BYTES + 128);
            // Both zero, and at changing parts.
            parts[round as usize % 3].word(x).store(0, Ordering::SeqCst);
            parts[round as usize / 3 % 3]
                .word(y)
                .store(0, Ordering::SeqCst);
            let together = Barrier::new(threads.len());
            let seen: Vec<(u64, u64)> = std::thread::scope(|scope| {
                let running: Vec<_> = threads
                    .iter()
                    .map(|(at, step)| {
                        let (part, together) = (&parts[*at], &together);
                        scope.spawn(move || {
                            together.wait();
                            step(part.word(x), part.word(y))
                        })
                    })
                    .collect();
                running.into_iter().map(|it| it.join().unwrap()).collect()
            });
            assert!(!forbidden(&seen), "{name}, round {round}: {seen:?}");
            outcomes.insert(seen);
        }
        println!("{name}: {} outcomes", outcomes.len());
    }
}

/// Unaligned accesses at a page boundary by two parts, each of which needs both pages at
/// once.
#[test]
fn unaligned_accesses_of_two_parts_terminate() {
    let parts = parts(2, 16, HOLD, &[]);
    let at = (PAGE_BYTES - 4) as usize;
    let exchange = |part: &Part| {
        let cells = &part.memories[0].cells()[at..at + 8];
        for _ in 0..300 {
            // SAFETY: eight bytes within the memory; the other part's thread touches its
            // own mapping only.
            unsafe {
                let bytes = cells.as_ptr().cast_mut().cast::<u64>();
                let value = std::ptr::read_unaligned(bytes);
                std::ptr::write_unaligned(bytes, value.wrapping_add(1));
            }
        }
    };
    let begun = Instant::now();
    on(&parts, exchange);
    assert!(begun.elapsed() < LONG);
    // Additions are not atomic: the result is not the sum, but the same at both.
    let low = |part: &Part| part.word((PAGE_BYTES - 8) & !7).load(Ordering::SeqCst);
    assert_eq!(low(&parts[0]), low(&parts[1]));
}

/// Random accesses by all parts, guests and hosts, while pages move; each word is written
/// by one thread only, which checks what it reads there.
#[test]
fn threads_read_their_own_writes_while_pages_move() {
    let parts = parts(4, 64, Duration::from_micros(30), &[]);
    let number = AtomicU32::new(0);
    let run = |part: &Part| {
        let me = u64::from(number.fetch_add(1, Ordering::Relaxed));
        let mut rng = SmallRng::seed_from_u64(me);
        let mut mine = [0u64; 64];
        for round in 1..400u64 {
            let page = rng.random_range(0..64u64);
            // No two threads use the same words.
            let at = page * PAGE_BYTES + me * 16;
            match rng.random_range(0..6) {
                0..2 => {
                    part.word(at).store(round, Ordering::Relaxed);
                    mine[page as usize] = round;
                }
                2 => {
                    let bytes = round.to_le_bytes();
                    part.pages.write(0, at, &bytes, LONG).unwrap();
                    mine[page as usize] = round;
                }
                3 => assert_eq!(part.host_read(at), mine[page as usize]),
                4 => {
                    let to = PartId::new(rng.random_range(0..4)).unwrap();
                    let range = page * PAGE_BYTES..(page + 2).min(64) * PAGE_BYTES;
                    part.pages.move_pages(0, range, to).unwrap();
                }
                _ => assert_eq!(part.word(at).load(Ordering::Relaxed), mine[page as usize]),
            }
        }
        (me, mine)
    };
    let all = on(parts.iter().chain(&parts), run);
    until("all moves end", || {
        parts.iter().all(|part| part.pages.is_quiescent())
    });
    for (me, mine) in all {
        for (page, value) in mine.iter().enumerate() {
            let at = page as u64 * PAGE_BYTES + me * 16;
            assert_eq!(
                parts[me as usize % 4].word(at).load(Ordering::SeqCst),
                *value
            );
        }
    }
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}

/// A set of pages that moves is then at its target, and nowhere else.
#[test]
fn pages_move_as_a_set() {
    let bytes: Vec<u8> = (0..256 * PAGE_BYTES).map(|at| (at * 7 / 3) as u8).collect();
    let parts = parts(2, 256, Duration::ZERO, &bytes);
    let resident = |part: &Part| -> u64 {
        let ranges = part.memories[0].populated().unwrap();
        ranges.iter().map(|range| range.end - range.start).sum()
    };
    assert_eq!(resident(&parts[0]), 256 * PAGE_BYTES);
    let range = 16 * PAGE_BYTES..200 * PAGE_BYTES;
    parts[0]
        .pages
        .move_pages(0, range.clone(), part(1))
        .unwrap();
    until("the pages have arrived", || {
        resident(&parts[1]) == range.end - range.start && parts[0].pages.is_quiescent()
    });
    assert_eq!(
        resident(&parts[0]),
        256 * PAGE_BYTES - (range.end - range.start)
    );
    let mut seen = vec![0; bytes.len()];
    parts[1].pages.read(0, 0, &mut seen, LONG).unwrap();
    assert!(seen == bytes);
    let outside = parts[0].pages.move_pages(0, 0..1 << 40, part(1));
    assert!(matches!(outside, Err(SpanError::Memory(_))), "{outside:?}");
}

/// Writers and movers of pages run between cuts: none of them holds `stand` while a cut
/// is made.
struct Traffic<'a> {
    parts: &'a [Part],
    pages: u64,
    /// The values written, word by word: for each page one word of each part and one of
    /// the host.
    written: Vec<AtomicU64>,
    stand: RwLock<()>,
    is_over: AtomicBool,
    /// The last cut that was read completely, and its words.
    last: Mutex<Option<(u64, Vec<u64>)>>,
    /// Pages of cuts that were unchanged since the previous one.
    same: AtomicU64,
}

impl<'a> Traffic<'a> {
    fn new(parts: &'a [Part], pages: u64) -> Self {
        let words = pages * (parts.len() as u64 + 1);
        Traffic {
            parts,
            pages,
            written: (0..words).map(|_| AtomicU64::new(0)).collect(),
            stand: RwLock::new(()),
            is_over: AtomicBool::new(false),
            last: Mutex::default(),
            same: AtomicU64::new(0),
        }
    }

    fn wrote(&self, page: u64, word: usize) -> &AtomicU64 {
        &self.written[page as usize * (self.parts.len() + 1) + word]
    }

    fn until_over(&self, seed: u64, step: impl Fn(&mut SmallRng)) {
        let mut rng = SmallRng::seed_from_u64(seed);
        while !self.is_over.load(Ordering::Relaxed) {
            let _runs = self.stand.read().unwrap();
            step(&mut rng);
        }
    }

    /// A thread at a part, as a guest's.
    fn write(&self, number: usize) {
        self.until_over(number as u64, |rng| {
            let page = rng.random_range(0..self.pages);
            let word = self.parts[number].word(page * PAGE_BYTES + 8 * number as u64);
            word.fetch_add(1, Ordering::SeqCst);
            self.wrote(page, number).fetch_add(1, Ordering::SeqCst);
        });
    }

    /// The host of the home.
    fn write_for_host(&self) {
        let number = self.parts.len();
        self.until_over(77, |rng| {
            let page = rng.random_range(0..self.pages);
            let wrote = self.wrote(page, number);
            let next = wrote.load(Ordering::SeqCst) + 1;
            let at = page * PAGE_BYTES + 8 * number as u64;
            let home = &self.parts[0].pages;
            home.write(0, at, &next.to_le_bytes(), LONG).unwrap();
            wrote.store(next, Ordering::SeqCst);
        });
    }

    /// The balancer, which also runs during cuts.
    fn move_sets(&self) {
        let mut rng = SmallRng::seed_from_u64(99);
        while !self.is_over.load(Ordering::Relaxed) {
            let first = rng.random_range(0..self.pages);
            let last = (first + rng.random_range(1..40)).min(self.pages);
            let to = part(rng.random_range(0..self.parts.len()));
            let from = rng.random_range(0..self.parts.len());
            let range = first * PAGE_BYTES..last * PAGE_BYTES;
            let pages = &self.parts[from].pages;
            match from {
                // With their directories, for whole segments.
                0 => drop(pages.move_object(0, range, to, LONG).unwrap()),
                _ => pages.move_pages(0, range, to).unwrap(),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes a cut; returns it with the expected words in order.
    fn cut(&self) -> (Cut, Vec<u64>) {
        let since = self
            .last
            .lock()
            .unwrap()
            .as_ref()
            .map(|(number, _)| *number);
        let cut = self.parts[0].pages.prepare_cut(since, LONG).unwrap();
        let _all_stand = self.stand.write().unwrap();
        cut.mark(LONG).unwrap();
        let written = self.written.iter();
        (cut, written.map(|it| it.load(Ordering::SeqCst)).collect())
    }

    /// The words of a cut, which has each page at most once; the next cut is relative to
    /// this one.
    fn words_of(&self, cut: &Cut) -> Vec<u64> {
        let count = self.parts.len() + 1;
        let mut words = vec![0; self.written.len()];
        let mut seen = BTreeSet::new();
        let before = self.last.lock().unwrap().take();
        while let Some(piece) = cut.next(LONG).unwrap() {
            let pages = match piece {
                CutPiece::Pages(pages) => pages,
                CutPiece::Unchanged(same) => {
                    let (_, before) = before.as_ref().expect("an earlier cut");
                    for page in same.first as usize..(same.first + same.pages) as usize {
                        assert!(seen.insert(page), "page {page} comes twice");
                        let of = page * count..(page + 1) * count;
                        words[of.clone()].copy_from_slice(&before[of]);
                        self.same.fetch_add(1, Ordering::Relaxed);
                    }
                    continue;
                }
            };
            let rows = pages.bytes.chunks_exact(PAGE_BYTES as usize);
            for (page, bytes) in (pages.first as usize..).zip(rows) {
                assert!(seen.insert(page), "page {page} comes twice");
                for (word, bytes) in bytes.chunks_exact(8).take(count).enumerate() {
                    words[page * count + word] = u64::from_le_bytes(bytes.try_into().unwrap());
                }
            }
        }
        *self.last.lock().unwrap() = Some((cut.number(), words.clone()));
        words
    }

    /// For the duration of `run`.
    fn during(&self, run: impl FnOnce()) {
        std::thread::scope(|scope| {
            for number in 0..self.parts.len() {
                scope.spawn(move || self.write(number));
            }
            scope.spawn(|| self.write_for_host());
            scope.spawn(|| self.move_sets());
            // Also on panic.
            struct Over<'a>(&'a AtomicBool);
            impl Drop for Over<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            let _over = Over(&self.is_over);
            run();
        });
    }
}

/// A cut has the state of one instant, whatever is written, moved and evicted while it is
/// read; no thread waits for the reader.
#[test]
fn a_cut_is_of_one_instant() {
    // Half of them are not accessed at first.
    let all = [
        (1, 64, None),
        (3, 96, None),
        (3, 1024, Some(PART_BYTES_MIN)),
    ];
    for (count, pages, limit) in all {
        let parts = parts(
            count,
            pages,
            HOLD,
            &vec![0; (pages * PAGE_BYTES / 2) as usize],
        );
        parts[0].pages.limit_parts(limit).unwrap();
        let traffic = Traffic::new(&parts, pages);
        traffic.during(|| {
            for round in 0..12 {
                std::thread::sleep(Duration::from_millis(5));
                if round % 4 == 3 {
                    // All pages are sent again.
                    traffic.last.lock().unwrap().take();
                }
                let (cut, expected) = traffic.cut();
                if round % 3 == 1 {
                    // Some pages change before they are read.
                    std::thread::sleep(Duration::from_millis(20));
                }
                let found = traffic.words_of(&cut);
                let wrong = found
                    .iter()
                    .zip(&expected)
                    .position(|(found, word)| found != word);
                assert_eq!(wrong, None, "{count} parts, round {round}");
            }
        });
        let same = traffic.same.load(Ordering::Relaxed);
        assert!(count == 1 || same > 0, "{count} parts, {pages} pages");
        let wrote = |it: &AtomicU64| it.load(Ordering::SeqCst) > 0;
        assert!(traffic.written.iter().any(wrote));
        let last: Vec<u64> = traffic
            .written
            .iter()
            .map(|it| it.load(Ordering::SeqCst))
            .collect();
        for (at, expected) in last.iter().enumerate() {
            let (page, word) = ((at / (count + 1)) as u64, (at % (count + 1)) as u64);
            assert_eq!(parts[0].host_read(page * PAGE_BYTES + 8 * word), *expected);
        }
    }
}

/// A large object moves in pieces: only some of it is in flight, and the rest is not sent
/// after a timeout.
#[test]
fn a_large_object_moves_in_pieces() {
    let pages = 16_384;
    let parts = parts(2, pages, HOLD, &vec![5; (pages * PAGE_BYTES) as usize]);
    let home = &parts[0].pages;
    let whole = 0..pages * PAGE_BYTES;
    let moved = home.move_object(0, whole.clone(), part(1), Duration::from_millis(2));
    // If even the first pages take longer, an error is returned.
    let moved = moved.unwrap_or_default();
    until("all pages have arrived", || home.is_quiescent());
    let there = || -> u64 {
        let objects = home.objects().unwrap().into_iter();
        let there = objects.filter(|it| it.owner == part(1));
        there.map(|it| it.range.end - it.range.start).sum()
    };
    let came = there();
    assert!(moved <= came && came < whole.end, "{moved}, {came}");
    let moved = home.move_object(0, whole.clone(), part(1), LONG).unwrap();
    assert_eq!(moved, whole.end);
    assert_eq!(there(), whole.end);
}

/// The directory of whole segments moves with an object, and all parts know; queries
/// about their pages are answered correctly by any part.
#[test]
fn directories_move_with_objects() {
    let pages = 128;
    let parts = parts(3, pages, HOLD, &vec![5; (pages * PAGE_BYTES) as usize]);
    let home = &parts[0].pages;
    let at = |pages: Range<u64>| pages.start * PAGE_BYTES..pages.end * PAGE_BYTES;
    let known = |of: &Part| -> Vec<(u32, usize)> {
        let directories = of.pages.directories().into_iter();
        directories
            .map(|(segment, at)| (segment.number, at.number()))
            .collect()
    };
    let until_known = |expected: &[(u32, usize)]| {
        for (number, of) in parts.iter().enumerate() {
            until(&format!("part {number} knows {expected:?}"), || {
                known(of) == expected
            });
        }
    };
    // Segments have 16 pages here; the first and the last are incomplete.
    let moved = home.move_object(0, at(8..72), part(1), LONG).unwrap();
    assert_eq!(moved, 64 * PAGE_BYTES);
    until_known(&[(1, 1), (2, 1), (3, 1)]);
    let told = |pages: &Pages| -> Vec<(Range<u64>, usize, usize)> {
        let objects = pages.objects().unwrap().into_iter();
        objects
            .map(|it| {
                let pages = it.range.start / PAGE_BYTES..it.range.end / PAGE_BYTES;
                (pages, it.owner.number(), it.directory.number())
            })
            .collect()
    };
    let expected = [
        (0..8, 0, 0),
        (8..16, 1, 0),
        (16..64, 1, 1),
        (64..72, 1, 0),
        (72..128, 0, 0),
    ];
    assert_eq!(told(home), expected);
    // The home moves pages on from one part to another, and back.
    home.move_object(0, at(32..48), part(2), LONG).unwrap();
    until_known(&[(1, 1), (2, 2), (3, 1)]);
    home.move_object(0, at(48..64), part(0), LONG).unwrap();
    until_known(&[(1, 1), (2, 2)]);
    assert_eq!(
        told(home)[2..5],
        [(16..32, 1, 1), (32..48, 2, 2), (48..64, 0, 0)]
    );
    // Concurrent additions: nothing is lost while they move.
    let over = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let adding: Vec<_> = parts
            .iter()
            .map(|of| {
                scope.spawn(move || {
                    for round in 0..2000u64 {
                        let page = round * 37 % pages;
                        of.word(page * PAGE_BYTES + 8)
                            .fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let mut rng = SmallRng::seed_from_u64(4);
            while !over.load(Ordering::Relaxed) {
                let first = rng.random_range(0..pages / 16) * 16;
                let to = part(rng.random_range(0..3));
                home.move_object(0, at(first..first + 16), to, LONG)
                    .unwrap();
            }
        });
        let failed: Vec<_> = adding
            .into_iter()
            .filter_map(|it| it.join().err())
            .collect();
        over.store(true, Ordering::Relaxed);
        assert!(failed.is_empty());
    });
    let words = (0..pages).map(|page| parts[0].host_read(page * PAGE_BYTES + 8));
    let first = u64::from_le_bytes([5; 8]);
    let sum: u64 = words.map(|word| word.wrapping_sub(first)).sum();
    assert_eq!(sum, 3 * 2000);
    // Directories move home and are pinned there; then a part can leave.
    assert!(home.pin_directories(true));
    home.collect_directories(LONG).unwrap();
    until_known(&[]);
    home.move_object(0, at(0..64), part(1), LONG).unwrap();
    assert_eq!(told(home)[0], (0..64, 1, 0));
    home.empty(part(2), part(0), LONG).unwrap();
    home.pin_directories(false);
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}

/// An abandoned cut leaves no page protected; there is one cut at a time, at the home;
/// after an error the next cut succeeds.
#[test]
fn cuts_can_be_dropped_at_any_time() {
    let pages = 512;
    let parts = parts(3, pages, HOLD, &vec![5; (pages * PAGE_BYTES) as usize]);
    let range = 0..200 * PAGE_BYTES;
    parts[0].pages.move_object(0, range, part(1), LONG).unwrap();
    let home = &parts[0].pages;
    assert_eq!(
        parts[1].pages.prepare_cut(None, LONG).unwrap_err(),
        SpanError::CutUnavailable
    );
    // No page counts as unchanged since a cut that was not read completely or never
    // existed; since the previous cut, all pages without writes do.
    let mut since = Some(77);
    for (taken, same) in [
        (0, 0),
        (3, 0),
        (usize::MAX, 0),
        (usize::MAX, pages as u32),
        (0, 0),
    ] {
        let cut = home.prepare_cut(since, LONG).unwrap();
        assert_eq!(
            home.prepare_cut(None, LONG).unwrap_err(),
            SpanError::CutUnavailable
        );
        cut.mark(LONG).unwrap();
        let (mut count, mut are_same) = (0, 0);
        while count < taken
            && let Some(piece) = cut.next(LONG).unwrap()
        {
            count += 1;
            if let CutPiece::Unchanged(same) = piece {
                are_same += same.pages;
            }
        }
        assert_eq!(are_same, same, "{taken}");
        since = Some(cut.number());
        drop(cut);
        if taken == usize::MAX && same == 0 {
            continue;
        }
        for part in &parts {
            for page in 0..pages {
                part.word(page * PAGE_BYTES + 64)
                    .fetch_add(1, Ordering::SeqCst);
            }
        }
    }
    // Never marked.
    drop(home.prepare_cut(None, LONG).unwrap());
    let traffic = Traffic::new(&parts, pages);
    for page in 0..pages {
        for word in 0..4 {
            parts[0]
                .word(page * PAGE_BYTES + 8 * word)
                .store(0, Ordering::SeqCst);
        }
    }
    let (cut, expected) = traffic.cut();
    assert!(traffic.words_of(&cut) == expected);
    drop(cut);
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}

/// There is no cut while a requested page is withheld; the error is returned in time,
/// threads go on, and the next cut succeeds.
#[test]
fn a_cut_needs_quiescence() {
    let hold = Duration::from_secs(2);
    let parts = parts(3, 16, hold, &[]);
    let late = Duration::from_millis(50);
    parts[1].word(0).store(1, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| parts[2].word(0).fetch_add(1, Ordering::SeqCst));
        std::thread::sleep(late);
        let begun = Instant::now();
        let cut = parts[0].pages.prepare_cut(None, LONG).unwrap();
        assert_eq!(
            cut.mark(late).unwrap_err(),
            SpanError::NotQuiescent { patience: late }
        );
        drop(cut);
        assert!(begun.elapsed() < hold, "{:?}", begun.elapsed());
        assert_eq!(waits.join().unwrap(), 1);
    });
    let cut = parts[0].pages.prepare_cut(None, LONG).unwrap();
    cut.mark(LONG).unwrap();
    let mut words = Vec::new();
    while let Some(CutPiece::Pages(pages)) = cut.next(LONG).unwrap() {
        words.push((
            pages.first,
            u64::from_le_bytes(pages.bytes[..8].try_into().unwrap()),
        ));
    }
    assert_eq!(words, [(0, 2)]);
}

/// Reading a cut ends when the machine ends or loses a part.
#[test]
fn a_lost_part_ends_a_cut() {
    let pages = 512;
    let mut parts = parts(3, pages, HOLD, &vec![5; (pages * PAGE_BYTES) as usize]);
    let range = 0..pages * PAGE_BYTES;
    parts[0].pages.move_object(0, range, part(2), LONG).unwrap();
    let cut = parts[0].pages.prepare_cut(None, LONG).unwrap();
    cut.mark(LONG).unwrap();
    drop(parts.pop());
    let failure = loop {
        match cut.next(LONG) {
            Ok(Some(_)) => {}
            Ok(None) => panic!("more had been asked for"),
            Err(failure) => break failure,
        }
    };
    assert!(matches!(failure, SpanError::Lost { .. }), "{failure:?}");
}

/// The loss of a part ends the others within a moment, with a reason; no host access
/// waits for ever.
#[test]
fn a_lost_part_ends_the_others_by_name() {
    let mut parts = parts(3, 16, HOLD, &[]);
    parts[2].word(0).store(7, Ordering::SeqCst);
    let lost = parts.pop().unwrap();
    // One host accesses memory all the time.
    std::thread::scope(|scope| {
        let asking = &parts[1];
        let asked = scope.spawn(move || {
            let begun = Instant::now();
            loop {
                let mut bytes = [0; 8];
                match asking.pages.read(0, 0, &mut bytes, LONG) {
                    Ok(()) => assert_eq!(bytes[0], 7),
                    Err(error) => return (error, begun.elapsed()),
                }
                let written = asking.pages.write(0, 64, &[1], LONG);
                if let Err(error) = written {
                    return (error, begun.elapsed());
                }
                // The page must be fetched each time.
                let back = asking.pages.move_pages(0, 0..1, part(2));
                back.unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(5));
        // Its guest does not run any more, as after the end of a process.
        drop(lost);
        let (error, took) = asked.join().unwrap();
        assert!(matches!(error, SpanError::Lost { .. }), "{error:?}");
        assert!(took < LONG / 2, "{took:?}");
    });
    for other in &parts {
        until("the loss is noticed", || other.pages.failure().is_some());
        let failure = other.pages.failure();
        // Or the loss of the part that noticed it first.
        assert!(
            matches!(failure, Some(SpanError::Lost { .. })),
            "{failure:?}"
        );
        let mut bytes = [0];
        let read = other.pages.read(0, 0, &mut bytes, LONG);
        assert_eq!(read, Err(failure.unwrap()));
    }
}

#[test]
fn strangers_are_refused() {
    let (mine, other) = (
        PinnedIdentity::generate().unwrap(),
        PinnedIdentity::generate().unwrap(),
    );
    let hello = |epoch: u64, from: usize, to: usize| {
        let epoch = Epoch {
            counter: epoch,
            ..Epoch::default()
        };
        Hello::new("m".parse().unwrap(), epoch, part(from), part(to))
    };
    // Another epoch, or another part than agreed on.
    for theirs in [hello(6, 1, 0), hello(5, 2, 0), hello(5, 1, 2)] {
        let (a, b) = connected();
        let (c, d) = connected();
        let mine_says = hello(5, 0, 1);
        std::thread::scope(|scope| {
            let (mine, other) = (&mine, &other);
            scope.spawn(move || {
                let client = ClientTls::pinned(other, mine.fingerprint).unwrap();
                let server = ServerTls::pinned(other, mine.fingerprint).unwrap();
                // Both sides may refuse.
                let _ = PeerConnections::greet((c, &client), (b, &server), &theirs);
            });
            let client = ClientTls::pinned(mine, other.fingerprint).unwrap();
            let server = ServerTls::pinned(mine, other.fingerprint).unwrap();
            let greeted = PeerConnections::greet((a, &client), (d, &server), &mine_says);
            let error = greeted.expect_err("a stranger").to_string();
            assert!(error.contains("where"), "{error}");
        });
    }
}

/// Resident bytes of each of these parts.
fn residents(parts: &[Part]) -> Vec<u64> {
    let of = |part: &Part| part.memories[0].resident_bytes().unwrap();
    parts.iter().map(of).collect()
}

/// Requests all pages to the first part; whether they are there: pages that were being
/// evicted may move elsewhere once more.
fn all_is_back(parts: &[Part], pages: u64) -> bool {
    let range = 0..pages * PAGE_BYTES;
    parts[1].pages.move_pages(0, range, part(0)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    residents(parts)[0] == pages * PAGE_BYTES
}

/// Memory beyond the limit is evicted, whoever brought it there, and nothing is lost.
#[test]
fn a_part_evicts_beyond_its_limit() {
    const PAGES: u64 = 1024;
    let limit = 3 * PART_BYTES_MIN / 2;
    let bytes: Vec<u8> = (0..PAGES * PAGE_BYTES)
        .map(|at| (at * 7 / 3) as u8)
        .collect();
    let parts = parts(3, PAGES, HOLD, &bytes);
    assert_eq!(residents(&parts)[0], PAGES * PAGE_BYTES);
    parts[0].pages.limit_parts(Some(limit)).unwrap();
    until("no part exceeds its limit", || {
        residents(&parts).iter().all(|bytes| *bytes <= limit)
    });
    // Memory is reported at least once a second.
    until("memory is reported", || {
        let told = parts[0].pages.memory_of_parts();
        let all = told.len() == 3 && told.values().all(|it| it.limit_bytes == Some(limit));
        all && told[&part(0)].given_bytes >= PAGES * PAGE_BYTES - limit
    });
    let fits = |part: &Part| {
        until("it fits", || {
            part.memories[0].resident_bytes().unwrap() <= limit
        });
    };
    // All pages are read at each part: copies arrive and are dropped again.
    for reader in &parts {
        for page in 0..PAGES {
            let expected = u64::from_le_bytes(
                bytes[(page * PAGE_BYTES) as usize..][..8]
                    .try_into()
                    .unwrap(),
            );
            let word = reader.word(page * PAGE_BYTES);
            assert_eq!(word.load(Ordering::SeqCst), expected, "page {page}");
        }
        fits(reader);
    }
    until("copies were dropped", || {
        let told = parts[0].pages.memory_of_parts();
        told.values().map(|it| it.dropped_bytes).sum::<u64>() > limit
    });
    // And written.
    for (number, writer) in parts.iter().enumerate() {
        for page in 0..PAGES {
            writer
                .word(page * PAGE_BYTES + 8 * number as u64)
                .store(page, Ordering::SeqCst);
        }
        fits(writer);
    }
    for number in 0..3 {
        for page in 0..PAGES {
            assert_eq!(parts[1].host_read(page * PAGE_BYTES + 8 * number), page);
        }
    }
    // Without a limit all pages return and stay.
    parts[0].pages.limit_parts(None).unwrap();
    until("all is back", || all_is_back(&parts, PAGES));
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}

/// A part knows which of its pages are not accessed: those present from the start and
/// those that arrived; it forgets pages that it evicts.
#[test]
fn idle_memory_is_reported() {
    const PAGES: u64 = 2048;
    let parts = parts(2, PAGES, HOLD, &vec![1; (PAGES * PAGE_BYTES) as usize]);
    let half = PAGES * PAGE_BYTES / 2;
    parts[0]
        .pages
        .move_pages(0, half..2 * half, part(1))
        .unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Each accesses the first quarter of its pages.
        for (number, user) in parts.iter().enumerate() {
            let first = number as u64 * half;
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    for page in 0..PAGES / 8 {
                        let word = user.word(first + page * PAGE_BYTES);
                        word.fetch_add(1, Ordering::Relaxed);
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        }
        let idle = |number: u64| {
            let idle = parts[0].pages.heat().unwrap().idle;
            let of = idle
                .get(&part(number as usize))
                .cloned()
                .unwrap_or_default();
            of.iter()
                .map(|it| (it.memory, it.start, it.bytes))
                .collect::<Vec<_>>()
        };
        let rests = |number: u64| vec![(0, number * half + half / 4, half / 4 * 3)];
        // Not before half a minute: earlier accesses are unknown.
        assert_eq!((idle(0), idle(1)), (Vec::new(), Vec::new()));
        let deadline = Instant::now() + 6 * LONG;
        while !(0..2).all(|number| idle(number) == rests(number)) {
            assert!(Instant::now() < deadline, "{:?}, {:?}", idle(0), idle(1));
            std::thread::sleep(Duration::from_millis(100));
        }
        parts[0]
            .pages
            .move_pages(0, half..2 * half, PartId::HOME)
            .unwrap();
        until("it is known of what is here only", || idle(1).is_empty());
        over.store(true, Ordering::Relaxed);
    });
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}

/// A host's room acts as a limit, but at the home only after it announces limits: until
/// then members may fail, and the home goes on alone.
#[test]
fn room_of_a_host_is_a_limit() {
    const PAGES: u64 = 1024;
    let room = 3 * PART_BYTES_MIN / 2;
    let bytes = vec![7; (PAGES * PAGE_BYTES) as usize];
    let parts = parts_on(&[Some(room), None, Some(room)], PAGES, HOLD, &bytes);
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(residents(&parts), [PAGES * PAGE_BYTES, 0, 0]);
    parts[0].pages.limit_parts(None).unwrap();
    until("it fits", || residents(&parts)[0] <= room);
    // All pages to a part that has room for some of them.
    for page in 0..PAGES {
        parts[2]
            .word(page * PAGE_BYTES)
            .fetch_add(1, Ordering::SeqCst);
    }
    until("it fits there, too", || {
        let now = residents(&parts);
        now[0] <= room && now[2] <= room && now[1] >= PAGES * PAGE_BYTES - 2 * room
    });
    for page in 0..PAGES {
        let found = parts[1].host_read(page * PAGE_BYTES);
        assert_eq!(found, u64::from_le_bytes([7; 8]) + 1);
    }
    // An end is near: from now on all pages stay.
    parts[0].pages.keep_all();
    parts[0].pages.limit_parts(Some(room)).unwrap();
    until("all is back", || all_is_back(&parts, PAGES));
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(residents(&parts)[0], PAGES * PAGE_BYTES);
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}

/// Without room at other parts all pages stay, and the machine goes on; no page moves
/// back and forth.
#[test]
fn without_room_elsewhere_pages_stay() {
    const PAGES: u64 = 1024;
    let parts = parts(3, PAGES, HOLD, &vec![9; (PAGES * PAGE_BYTES) as usize]);
    parts[0].pages.limit_parts(Some(PART_BYTES_MIN)).unwrap();
    let given = || -> u64 {
        let told = parts[0].pages.memory_of_parts();
        told.values().map(|it| it.given_bytes).sum()
    };
    until("others are full", || {
        residents(&parts)[1..]
            .iter()
            .all(|bytes| *bytes >= PART_BYTES_MIN * 15 / 16)
            && parts.iter().all(|part| part.pages.is_quiescent())
    });
    // Counts are reported once a second.
    std::thread::sleep(Duration::from_millis(1500));
    let before = given();
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(given(), before);
    assert_eq!(residents(&parts).iter().sum::<u64>(), PAGES * PAGE_BYTES);
    // A thread that accesses all pages makes progress, too.
    let sums = on([&parts[1]], |part| {
        (0..PAGES)
            .map(|page| part.word(page * PAGE_BYTES).load(Ordering::SeqCst) & 1)
            .sum::<u64>()
    });
    assert_eq!(sums, [PAGES]);
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}

/// Random accesses by all parts, guests and hosts, while each part evicts its excess.
#[test]
fn threads_read_their_own_writes_while_parts_are_full() {
    const PAGES: u64 = 900;
    let parts = parts(4, PAGES, Duration::from_micros(30), &[]);
    parts[0].pages.limit_parts(Some(PART_BYTES_MIN)).unwrap();
    let number = AtomicU32::new(0);
    let run = |part: &Part| {
        let me = u64::from(number.fetch_add(1, Ordering::Relaxed));
        let mut rng = SmallRng::seed_from_u64(77 + me);
        let mut mine = vec![0u64; PAGES as usize];
        for round in 1..3000u64 {
            let page = rng.random_range(0..PAGES);
            let at = page * PAGE_BYTES + me * 16;
            match rng.random_range(0..4) {
                0..2 => {
                    part.word(at).store(round, Ordering::Relaxed);
                    mine[page as usize] = round;
                }
                2 => {
                    part.pages.write(0, at, &round.to_le_bytes(), LONG).unwrap();
                    mine[page as usize] = round;
                }
                _ => assert_eq!(part.word(at).load(Ordering::Relaxed), mine[page as usize]),
            }
        }
        (me, mine)
    };
    let all = on(parts.iter().chain(&parts), run);
    for (me, mine) in all {
        for (page, value) in mine.iter().enumerate() {
            assert_eq!(
                parts[2].host_read(page as u64 * PAGE_BYTES + me * 16),
                *value
            );
        }
    }
    until("all gave something away", || {
        let told = parts[0].pages.memory_of_parts();
        told.values().all(|it| it.given_bytes > 0)
    });
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}
