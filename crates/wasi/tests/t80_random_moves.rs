//! Two guests perform the same random calls, one of them is captured and restored in between: their
//! observations must be equal.

mod common;
use common::*;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

both! {
    moves_are_not_seen
}

const PATHS: &[&str] = &[
    "a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "d/", "a/", "s", "s/a", "../x", "d/../a", "/a",
    "", ".", "..", "d/.", "d//a", "none/a", "a/b", "s/", "s/.", "d/..", "d/../", "a/.", "./a",
    "d/e/..", "s/../a", "/", "a/..",
];

#[derive(Debug, PartialEq)]
enum Seen {
    Nothing(Ret<()>),
    Number(Ret<u64>),
    Bytes(Ret<Vec<u8>>),
    Stat(Ret<(u8, u64, u64)>),
    Flags(Ret<(u8, u64, u64, u64)>),
    Names(Vec<String>),
}

fn shape(stat: Stat) -> (u8, u64, u64) {
    let size = if stat.filetype == 4 { stat.size } else { 0 };
    let links = if stat.filetype == 4 { stat.nlink } else { 0 };
    (stat.filetype, links, size)
}

/// One call, chosen by `rng` alone, so that both guests make the same.
fn step(guest: &Guest, rng: &mut ChaCha8Rng, open: u32) -> Seen {
    let mut path = || PATHS[rng.random_range(0..PATHS.len())];
    let (source, target) = (path(), path());
    let fd = rng.random_range(3..=open);
    let follow = rng.random_range(0..2);
    let offset = rng.random_range(0..30);
    let oflags = [0, 1, 1, 1, 2, 5, 8, 9][rng.random_range(0..8)];
    let rights = [READ, WRITE, RW, RW][rng.random_range(0..4)];
    let fdflags = [0, 0, APPEND, NONBLOCK][rng.random_range(0..4)];
    let number = |result: Ret<u32>| Seen::Number(result.map(u64::from));
    // Over several blocks, back and forth.
    let far = rng.random_range(0..300_000);
    match rng.random_range(0..32) {
        0..5 => number(guest.open_at(3, follow, source, [oflags, rights, fdflags])),
        5 if fd > 3 => Seen::Nothing(guest.close(fd)),
        6 => Seen::Nothing(guest.mkdir(source)),
        7 => Seen::Nothing(guest.rmdir(source)),
        8 | 9 => Seen::Nothing(guest.unlink(source)),
        10 | 11 => Seen::Nothing(guest.rename(source, target)),
        12 => Seen::Nothing(guest.link(0, source, target)),
        13 => Seen::Nothing(guest.symlink(source, target)),
        14 => Seen::Stat(guest.stat_at(follow, source).map(shape)),
        15 => Seen::Stat(guest.stat(fd).map(shape)),
        16 => Seen::Bytes(guest.read(fd, 9)),
        17 | 18 => number(guest.write(fd, b"0123456789")),
        19 => Seen::Bytes(guest.pread(fd, 9, offset)),
        20 => Seen::Number(guest.seek(fd, offset as i64, 0)),
        21 => Seen::Flags(guest.fdstat(fd)),
        22 => Seen::Names(guest.list(3)),
        23 => Seen::Nothing(guest.run("fd_filestat_set_size", &[fd.into(), far])),
        24 | 25 => number(guest.pwrite(fd, &vec![far as u8; far as usize / 3], far)),
        26 => Seen::Bytes(guest.pread(fd, 200_000, far)),
        27 => number(guest.open_at(fd, follow, source, [oflags, rights, fdflags])),
        28 => Seen::Nothing(guest.set_times_at(follow, source, [7, 9, 5])),
        29 => Seen::Bytes(guest.readlink(source, 99)),
        30 => Seen::Nothing(guest.path("path_remove_directory", fd, source)),
        31 => Seen::Nothing(guest.path("path_create_directory", fd, source)),
        _ => Seen::Bytes(Ok(guest.random(offset))),
    }
}

/// A guest of this kind and one of that make the same calls. How many blocks were
/// fetched for the latter.
fn compare(still: Kind, moving: Kind, seeds: std::ops::Range<u64>, moves_in: u32) -> u64 {
    let mut fetched = 0;
    for seed in seeds {
        let (still_dir, still) = in_sandbox(still);
        let (moving_dir, mut moving) = in_sandbox(moving);
        let mut calls = ChaCha8Rng::seed_from_u64(seed);
        let mut moves = ChaCha8Rng::seed_from_u64(!seed);
        for call in 0..200 {
            let call_seed = calls.random();
            let same = || ChaCha8Rng::seed_from_u64(call_seed);
            let expected = step(&still, &mut same(), 12);
            match moves.random_range(0..moves_in) {
                0 => moving = moving_dir.moved(moving),
                1 => moving_dir.round(),
                _ => {}
            }
            let seen = step(&moving, &mut same(), 12);
            // A hidden name of a host's file counts as a link of it.
            let same = match (&seen, &expected) {
                (Seen::Stat(Ok(seen)), Seen::Stat(Ok(expected)))
                    if still_dir.kind != moving_dir.kind =>
                {
                    (seen.0, seen.2) == (expected.0, expected.2)
                }
                _ => seen == expected,
            };
            assert!(same, "seed {seed}, call {call}: {seen:?}, not {expected:?}");
        }
        still.wasi.finish();
        moving.wasi.finish();
        let left = moving_dir.names(&moving);
        assert_eq!(left, still_dir.names(&still), "seed {seed}");
        let hidden = left.iter().filter(|name| name.starts_with('.'));
        assert_eq!(hidden.count(), 0, "seed {seed}");
        assert_eq!(moving_dir.hidden(&moving), 0, "seed {seed}");
        fetched += moving_dir.fetched();
    }
    fetched
}

fn moves_are_not_seen(kind: Kind) {
    compare(kind, kind, 0..60, 4);
}

/// All results are as with a directory of the host.
#[test]
fn volumes_are_as_directories() {
    compare(Kind::Host, Kind::Own, 1000..1300, 20);
}

/// Also where each block is fetched when it is needed, and only then.
#[test]
fn volumes_that_are_kept_elsewhere_are_as_directories() {
    let fetched = compare(Kind::Host, Kind::Kept, 2000..2300, 8);
    assert!(fetched > 200, "{fetched} blocks were fetched");
}
