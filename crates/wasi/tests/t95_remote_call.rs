//! Remote calls: all other tests again, with each call packed if possible; and the calls that are
//! not packed.

#![allow(clippy::duplicate_mod, reason = "each file of tests brings its own")]

mod common;

#[path = "t20_files.rs"]
mod files;
#[path = "t30_paths.rs"]
mod paths;
#[path = "t10_process.rs"]
mod process;
#[path = "t80_random_moves.rs"]
mod random_moves;
#[path = "t70_snapshot.rs"]
mod snapshot;
#[path = "t60_sockets.rs"]
mod sockets;
#[path = "t50_streams.rs"]
mod streams;
#[path = "t40_unlinked.rs"]
mod unlinked;
#[path = "t90_volumes.rs"]
mod volumes;

use common::Guest;
use keel_wasi::{CallState, Config, Function, Outcome, PackedCall, pack};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// A function whose calls mostly return data, and possible arguments.
fn usual(guest: &Guest) -> Vec<(Function, Vec<u64>)> {
    let iovecs: Vec<u8> = [200_u32, 10, 300, 20]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    guest.put(64, &iovecs);
    guest.put(128, b"name");
    vec![
        (Function::ClockTimeGet, vec![1, 0, 8]),
        (Function::FdWrite, vec![1, 64, 2, 8]),
        (Function::FdRead, vec![0, 64, 2, 8]),
        (Function::RandomGet, vec![512, 100]),
        (Function::PathOpen, vec![3, 0, 128, 4, 1, 64, 64, 0, 8]),
        (Function::PollOneoff, vec![1024, 2048, 1, 8]),
    ]
}

#[test]
fn what_cannot_be_packed_is_not() {
    let guest = Guest::new(Config::default());
    let can = |function: Function, args: &[u64]| pack(function, args, &guest.memory()).is_some();
    for (function, args) in usual(&guest) {
        assert!(can(function, &args), "{}", function.name());
        assert!(!can(function, &args[1..]), "{}", function.name());
    }
    let end = common::MEMORY_BYTES as u64;
    // A result outside of memory, or not aligned.
    for at in [end - 4, end, 0xffff_fffc, 9] {
        assert!(!can(Function::ClockTimeGet, &[1, 0, at]), "{at}");
    }
    assert!(can(Function::ClockTimeGet, &[1, 0, end - 8]));
    // Buffers.
    assert!(!can(Function::FdWrite, &[1, 65, 2, 8]));
    assert!(!can(Function::FdWrite, &[1, end - 8, 2, 8]));
    assert!(!can(Function::FdWrite, &[1, 64, 1025, 8]));
    assert!(!can(Function::FdRead, &[0, 64, u64::from(u32::MAX), 8]));
    assert!(!can(Function::RandomGet, &[end - 99, 100]));
    // More than one call moves.
    assert!(!can(Function::RandomGet, &[0, (1 << 20) + 1]));
    assert!(can(Function::RandomGet, &[0, 1 << 20]));
    // Nothing to pack, and what is not known before.
    assert!(!can(Function::SchedYield, &[]));
    assert!(!can(Function::ArgsGet, &[0, 64]));
}

/// A packed call is untrusted.
#[test]
fn hostile_calls_touch_nothing_else() {
    let guest = Guest::new(Config::default());
    let mut random = SmallRng::seed_from_u64(7);
    let calls = usual(&guest);
    // Nothing waits.
    guest.flag.request();
    for round in 0..20_000 {
        let (function, args) = &calls[round % calls.len()];
        let (packed, targets) = pack(*function, args, &guest.memory()).expect("it can be");
        let mut bytes = postcard::to_stdvec(&packed).expect("it is written");
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..bytes.len());
            bytes[at] = random.random();
        }
        let Ok(changed) = postcard::from_bytes::<PackedCall>(&bytes) else {
            continue;
        };
        let mut state = CallState::default();
        let (outcome, output) =
            guest
                .wasi
                .call_packed(*function, &changed, &mut state, guest.tid, &*guest.flag);
        assert!(output.len() <= 4 << 20, "{outcome:?}");
        // Output with wrong destinations is refused.
        let longer = [output, vec![1; 1 << 21]].concat();
        assert!(targets.fill(&longer, &mut guest.memory()).is_err());
        assert!(targets.fill(&[1], &mut guest.memory()).is_err() || args.len() == 2);
        assert_ne!(outcome, Outcome::Exit(0));
    }
}
