//! `cpu.limit`. Alone in its process: it counts the CPU time of all guest
//! threads there.

mod common;

use common::{LIMIT, Running, guest, program};
use keel_wasm::runtime::{Limits, Outcome};
use std::time::{Duration, Instant};

/// CPU time that this process's guest threads used so far.
fn guest_cpu() -> Duration {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
        if name.starts_with("guest-") {
            let text = std::fs::read_to_string(task.join("schedstat")).unwrap_or_default();
            sum += text
                .split_whitespace()
                .next()
                .map_or(0, |ns| ns.parse::<u64>().unwrap());
        }
    }
    Duration::from_nanos(sum)
}

/// One tenth of a core, also while it is moved: it goes on, and never above.
#[test]
fn a_limited_machine_uses_no_more_than_its_share() {
    let limits = Limits {
        cpu_millis: Some(100),
        ..Limits::default()
    };
    let program = program(&guest("spinner"));
    program.prepare_resume().unwrap();
    let mut running = Running::start_within(&program, &["1000000"], limits);
    let begun = Instant::now();
    let check = || {
        let used = guest_cpu();
        // A busy host can only lower it, but for the governor being late; what
        // was saved up and one tick come on top.
        let allowed = begun.elapsed() / 10 + Duration::from_millis(250);
        assert!(used <= allowed, "{used:?} of {allowed:?}");
        used
    };
    for _ in 0..2 {
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(400));
            check();
        }
        // It goes on, slowly.
        let before = check();
        while check() == before {
            assert!(begun.elapsed() < LIMIT, "it stands still");
            std::thread::sleep(Duration::from_millis(10));
        }
        // A moved thread is another to the kernel.
        assert!(running.move_on());
    }
    running.machine.stop();
    assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Stopped));
}
