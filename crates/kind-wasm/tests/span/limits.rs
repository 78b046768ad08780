//! Parts at their memory limits.

use super::*;

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
