//! Two guests make the same random calls, one of them is captured and
//! restored in between: nothing that they see may differ.

mod common;
use common::*;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

const PATHS: &[&str] = &[
    "a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "d/", "a/", "s", "s/a", "../x", "d/../a", "/a",
    "", ".", "..", "d/.", "d//a", "none/a", "a/b",
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
    match rng.random_range(0..24) {
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
        _ => Seen::Bytes(Ok(guest.random(offset))),
    }
}

#[test]
fn moves_are_not_seen() {
    for seed in 0..60 {
        let (still_dir, still) = in_sandbox();
        let (moving_dir, mut moving) = in_sandbox();
        let mut calls = ChaCha8Rng::seed_from_u64(seed);
        let mut moves = ChaCha8Rng::seed_from_u64(!seed);
        for call in 0..200 {
            let call_seed = calls.random();
            let same = || ChaCha8Rng::seed_from_u64(call_seed);
            let expected = step(&still, &mut same(), 12);
            if moves.random_ratio(1, 4) {
                moving = moving.moved(moving_dir.path());
            }
            let seen = step(&moving, &mut same(), 12);
            assert_eq!(seen, expected, "seed {seed}, call {call}");
        }
        still.wasi.finish();
        moving.wasi.finish();
        let left = names(moving_dir.path());
        assert_eq!(left, names(still_dir.path()), "seed {seed}");
        let hidden = left.iter().filter(|name| name.starts_with('.'));
        assert_eq!(hidden.count(), 0, "seed {seed}");
    }
}
