//! Checkpoints of machines with several parts.

use super::*;

/// A program that spans three parts, and its restored checkpoints, print the same as
/// alone; its pages stay where they are meanwhile.
#[test]
fn a_checkpoint_of_several_parts_is_consistent() {
    let programs: [(&str, &[&str]); 4] = [
        ("threads", &["3", "3000"]),
        ("mapreduce", &["4", "8", "6"]),
        ("render", &["4", "160", "100", "20"]),
        ("store", &["4", "10000"]),
    ];
    for (name, args) in programs {
        let alone = {
            let running = Running::start(name, args);
            assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Exit(0)));
            String::from_utf8(running.output.bytes()).unwrap()
        };
        let mut running = Running::ready(name, args);
        let how = SpanConfig {
            spawning: SpawnPolicy::Even,
            patience: LIMIT,
            limits: PartLimits {
                part_bytes: Some(4 << 20),
                room_bytes: None,
            },
            stays_stopped: false,
        };
        let apart = InProcess::begin(&running.machine, 3, 256 << 20, how).unwrap();
        let mut taken = Vec::new();
        let mut rng = SmallRng::seed_from_u64(3);
        while taken.len() < 4 {
            for tid in running.machine.threads() {
                let to = PartId::new(rng.random_range(0..3)).unwrap();
                // It may have ended.
                let _ = running.machine.move_thread(tid, to);
            }
            let never = AtomicBool::new(false);
            let pages = apart.home().pages().clone();
            let before = running.lines();
            match running.try_take_apart(Some(&pages), false, &never) {
                Ok(one) => taken.push((before, one, running.lines())),
                Err(CreateError::Machine(MachineError::Ended)) => break,
                Err(error) => panic!("{name}: {error}"),
            }
        }
        assert!(!taken.is_empty(), "{name} ended before there was any");
        assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Exit(0)));
        assert_eq!(apart.home().failure(), None);
        let whole = String::from_utf8(running.output.bytes()).unwrap();
        assert_eq!(whole, alone, "{name}");
        for (number, (before, one, after)) in taken.iter().enumerate() {
            // Each is relative to the previous one.
            let before_it = number.checked_sub(1).and_then(|number| taken.get(number));
            let parent = before_it.map(|(_, one, _)| one.manifest.id.clone());
            assert_eq!(one.manifest.parent, parent, "{name} {number}");
            let restored = running.restore(Some(&one.manifest.id)).unwrap();
            let text = running.finish(restored);
            assert!(alone.ends_with(&text), "{name} {number}: {text}");
            let printed = alone.lines().count() - text.lines().count();
            assert!(
                (*before..=*after).contains(&printed),
                "{name} {number}: {text}"
            );
        }
    }
}

/// For a machine with parts, too, only changed pages are stored again, at any part; all
/// pages if requested, or if other parts sent the previous cut.
#[test]
fn unchanged_pages_of_parts_are_not_stored_again() {
    // It writes 1 MB per second, of 16 MiB.
    let mut running = Running::ready("writer", &["16", "1", "60"]);
    let how = SpanConfig {
        spawning: SpawnPolicy::Here,
        patience: LIMIT,
        limits: PartLimits::default(),
        stays_stopped: false,
    };
    let mut apart = InProcess::begin(&running.machine, 3, 256 << 20, how).unwrap();
    running.wait_lines(2);
    let never = AtomicBool::new(false);
    let part = |number| PartId::new(number).unwrap();
    let to = |apart: &InProcess, range: std::ops::Range<u64>, to: usize| {
        let pages = apart.home().pages().clone();
        let mib = range.start << 20..range.end << 20;
        pages.move_object(0, mib, part(to), LIMIT).unwrap();
    };
    let mut taken = Vec::new();
    let mut take = |running: &mut Running, apart: &InProcess, full: bool| {
        let pages = apart.home().pages().clone();
        let one = running.try_take_apart(Some(&pages), full, &never).unwrap();
        let runs = one.manifest.runs.iter();
        let stored: u32 = runs.map(|run| run.pages).sum();
        let is_full = one.manifest.parent.is_none();
        taken.push(one);
        (is_full, stored)
    };
    to(&apart, 2..8, 1);
    to(&apart, 8..14, 2);
    let (is_full, all) = take(&mut running, &apart, false);
    assert!(is_full && all >= 4096, "{all}");
    let few = |(is_full, stored): (bool, u32)| !is_full && stored < all / 4;
    assert!(few(take(&mut running, &apart, false)));
    // The new holder does not know the previous content: the home does.
    to(&apart, 4..12, 1);
    to(&apart, 2..4, 0);
    assert!(few(take(&mut running, &apart, false)));
    running.wait_lines(running.lines() + 2);
    assert!(few(take(&mut running, &apart, false)));
    let full = take(&mut running, &apart, true);
    assert!(full.0 && full.1 >= all);
    // A part that sent some of the pages leaves.
    apart.remove_part(part(2), part(1), LIMIT).unwrap();
    assert!(few(take(&mut running, &apart, false)));
    // A checkpoint with three ancestors, and one whose parent is full.
    for one in [&taken[3], &taken[5]] {
        // It checks its memory with each write.
        let text = running.finish(running.restore(Some(&one.manifest.id)).unwrap());
        assert_eq!(text.lines().last(), Some("59"));
    }
}

/// Write tracking ends when a machine gets parts, and restarts when it returns to one
/// part: no checkpoint is relative to one made with parts.
#[test]
fn a_full_checkpoint_follows_the_return_to_one_part() {
    let mut running = Running::ready("writer", &["16", "40", "60"]);
    let how = SpanConfig {
        spawning: SpawnPolicy::Here,
        patience: LIMIT,
        limits: PartLimits::default(),
        stays_stopped: false,
    };
    let apart = InProcess::begin(&running.machine, 2, 256 << 20, how).unwrap();
    running.wait_lines(2);
    let never = AtomicBool::new(false);
    let pages = apart.home().pages().clone();
    let first = running.try_take_apart(Some(&pages), false, &never).unwrap();
    drop(pages);
    apart.unspan(LIMIT).unwrap();
    running.wait_lines(running.lines() + 2);
    let second = running.take(false);
    running.wait_lines(running.lines() + 2);
    let third = running.take(false);
    assert_eq!(second.manifest.parent, None);
    assert_eq!(third.manifest.parent, Some(second.manifest.id.clone()));
    for taken in [first, second, third] {
        // It checks its memory with each write.
        let text = running.finish(running.restore(Some(&taken.manifest.id)).unwrap());
        assert_eq!(text.lines().last(), Some("59"));
    }
}

#[derive(Debug)]
enum BringError {
    Repository(RepositoryError),
    Span(SpanError),
}

impl From<RepositoryError> for BringError {
    fn from(error: RepositoryError) -> Self {
        BringError::Repository(error)
    }
}

/// Memory of 24 MiB is restored to parts with limits of 8 MiB, and no part ever has more
/// than that and what is in flight. With too few parts the restore fails.
#[test]
fn memory_larger_than_a_part_is_restored_to_several() {
    const MOST: u64 = 8 << 20;
    let mut running = Running::start("writer", &["24", "40", "60"]);
    running.wait_lines(2);
    let id = running.take(false).manifest.id;
    let alone = running.finish(running.restore(Some(&id)).unwrap());
    running.machine.stop();
    let how = SpanConfig {
        spawning: SpawnPolicy::Here,
        patience: LIMIT,
        limits: PartLimits {
            part_bytes: Some(MOST),
            room_bytes: Some(MOST),
        },
        stays_stopped: true,
    };
    let begin = |id: Option<&CheckpointId>, parts, how| {
        let comes = MemoryRestore::Spanning(vec!["b".parse().unwrap()]);
        let restored = running.restore_as(id, comes).unwrap();
        let (machine, output, rest) = running.prepare(restored);
        let RemainingMemory::Spanning(later) = rest else {
            panic!("its memory is there");
        };
        assert!(later.bytes() >= 24 << 20);
        let apart = InProcess::begin(&machine, parts, 256 << 20, how).unwrap();
        (machine, output, later, apart)
    };
    let bring = |later: &SpanningRestore, pages: &Pages| {
        let most = AtomicU64::new(0);
        let write = |memory: usize, at, bytes: &[u8]| -> Result<(), BringError> {
            pages.await_room().map_err(BringError::Span)?;
            let written = pages.write(memory as u32, at, bytes, LIMIT);
            let here = pages.memory_of_parts()[&PartId::HOME].resident_bytes;
            most.fetch_max(here, Ordering::Relaxed);
            written.map_err(BringError::Span)
        };
        later.read_pages(&write).map(|()| most.into_inner())
    };
    // Without a name, the newest intact checkpoint is read beforehand; a named one is
    // not. The limit of the other parts does not apply, either.
    let only_here = SpanConfig {
        limits: PartLimits {
            part_bytes: None,
            ..how.limits
        },
        ..how
    };
    for (named, how) in [(None, how), (Some(&id), only_here)] {
        let (machine, output, later, apart) = begin(named, 4, how);
        let pages = apart.home().pages();
        let most = bring(&later, pages).unwrap();
        later.release();
        // Four threads read one MiB each.
        assert!(most <= MOST + (5 << 20), "{most} bytes");
        machine.thaw().unwrap();
        assert_eq!(machine.wait(Some(LIMIT)), Some(Outcome::Exit(0)));
        assert_eq!(String::from_utf8(output.bytes()).unwrap(), alone);
        assert!(pages.memory_of_parts()[&PartId::HOME].given_bytes >= 14 << 20);
        assert_eq!(apart.home().failure(), None);
    }
    let (_machine, _, later, apart) = begin(Some(&id), 2, how);
    let error = bring(&later, apart.home().pages()).unwrap_err();
    assert!(
        matches!(error, BringError::Span(SpanError::NoRoom { .. })),
        "{error:?}"
    );
    later.release();
    drop(apart);
    // Damage is found before the machine runs.
    let pack = files(&running.place().join("machines/m"), ".0.pack").remove(0);
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let (machine, output, later, apart) = begin(Some(&id), 4, how);
    let error = bring(&later, apart.home().pages()).unwrap_err();
    assert!(
        matches!(error, BringError::Repository(RepositoryError::Part { .. })),
        "{error:?}"
    );
    machine.stop();
    assert!(output.bytes().is_empty());
    let comes = MemoryRestore::Spanning(vec!["b".parse().unwrap()]);
    let error = running.restore_as(None, comes).err().unwrap();
    assert!(
        matches!(
            error,
            RestoreError::Repository(RepositoryError::NoneIntact { .. })
        ),
        "{error}"
    );
    // It is not being read any more.
    later.release();
    let reading = files(&running.place().join("machines/m"), ".reading");
    assert!(reading.is_empty(), "{reading:?}");
}
