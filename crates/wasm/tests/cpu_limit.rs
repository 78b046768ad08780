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
    let mut last = Duration::ZERO;
    for round in 0..6 {
        std::thread::sleep(Duration::from_millis(400));
        let used = guest_cpu();
        // A busy host can only lower it; what was saved up and one tick come
        // on top. A moved thread is another to the kernel.
        let allowed = begun.elapsed() / 10 + Duration::from_millis(60);
        assert!(used <= allowed, "{used:?} of {allowed:?}");
        if round == 2 {
            assert!(running.move_on());
            last = Duration::ZERO;
        } else {
            assert!(used > last, "it stands still");
            last = used;
        }
    }
    running.machine.stop();
    assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Stopped));
}
