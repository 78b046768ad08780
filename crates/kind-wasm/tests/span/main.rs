//! Parts of a machine in one process, with real memories, faults and connections. The
//! threads access memory as guests do, through the mapping.

#![allow(unsafe_code)]

mod connected;
mod cuts;
mod limits;

use connected::*;

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
