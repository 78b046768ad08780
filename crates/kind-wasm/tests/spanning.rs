//! Machines with several parts in one process: guests whose threads run at several parts
//! and move between them produce the same output as alone; a failure at one part ends the
//! machine with an error that names the part.

use keel_kind_wasm::span::{InProcess, Pages, PartLimits, SpanConfig, SpanError};
use keel_wasi::{Config, HostClock, MemorySink, Resources, SystemClock, Wasi};
use keel_wasm::coherence::PartId;
use keel_wasm::memory::GuestMemory;
use keel_wasm::runtime::parts::SpawnPolicy;
use keel_wasm::runtime::{Engine, Image, Limits, Machine, MachineError, Options, Outcome, Program};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A longer duration counts as a hang.
const LONG: Duration = Duration::from_secs(60);
/// Time limit for an end that may or may not come.
const SOON: Duration = Duration::from_secs(5);
const MEMORY_BYTES: u64 = 256 << 20;

fn part(number: usize) -> PartId {
    PartId::new(number).unwrap()
}

fn engine() -> Engine {
    Engine::new(Options::default()).unwrap()
}

fn guest(name: &str) -> Arc<Program> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../guests/{name}.wasm"));
    engine().load(&std::fs::read(path).unwrap()).unwrap()
}

struct Running {
    machine: Machine,
    output: Arc<MemorySink>,
}

impl Running {
    /// The machine is stopped at its beginning.
    fn new(program: &Arc<Program>, args: &[&str]) -> Self {
        Running::by(program, args, Arc::new(SystemClock))
    }

    /// With a clock of its home.
    fn by(program: &Arc<Program>, args: &[&str], clock: Arc<dyn HostClock>) -> Self {
        let output = Arc::new(MemorySink::default());
        let mut config = Config {
            args: vec!["guest".into()],
            stdout: Box::new(output.clone()),
            clock,
            ..Config::default()
        };
        config.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        let limits = Limits {
            memory_bytes: MEMORY_BYTES,
            ..Limits::default()
        };
        let wasi = Wasi::new(config).unwrap();
        let machine = Machine::ready_under(0, program.clone(), wasi, limits).unwrap();
        Running { machine, output }
    }

    /// A machine that another part restores from an image.
    fn of(
        program: &Arc<Program>,
        image: Image,
        memories: Arc<[Arc<GuestMemory>]>,
        output: Arc<MemorySink>,
    ) -> Machine {
        let resources = Resources {
            stdout: Box::new(output),
            ..Resources::default()
        };
        let wasi = Wasi::restore(image.wasi.clone(), resources).unwrap();
        let limits = Limits {
            memory_bytes: MEMORY_BYTES,
            ..Limits::default()
        };
        Machine::prepare(program.clone(), image, memories, wasi, limits).unwrap()
    }

    /// Makes it span this many parts and starts it.
    fn span(&self, count: usize) -> InProcess {
        self.span_within(count, MEMORY_BYTES)
    }

    /// As [`Self::span`]; members have less memory than the home.
    fn span_within(&self, count: usize, member_bytes: u64) -> InProcess {
        let how = SpanConfig {
            spawning: SpawnPolicy::Even,
            patience: LONG,
            limits: PartLimits::default(),
            stays_stopped: false,
        };
        InProcess::begin(&self.machine, count, member_bytes, how).unwrap()
    }

    fn text(&self) -> String {
        String::from_utf8(self.output.bytes()).unwrap()
    }

    fn outcome(&self) -> Outcome {
        let outcome = self.machine.wait(Some(LONG));
        outcome.unwrap_or_else(|| panic!("it hangs after {:?}", self.text()))
    }
}

/// Moves a thread to a part, if there is a thread.
fn move_some_thread(running: &Running, rng: &mut SmallRng, to: PartId) {
    let threads = running.machine.threads();
    if !threads.is_empty() {
        let thread = threads[rng.random_range(0..threads.len())];
        // It may have ended.
        let _ = running.machine.move_thread(thread, to);
    }
}

/// Moves 64 KiB to a part, with their directory.
fn move_some_object(pages: &Pages, rng: &mut SmallRng, to: PartId) {
    let first = rng.random_range(0..64u64) << 16;
    // The memory or the part may not exist.
    let _ = pages.move_object(0, first..first + (1 << 16), to, LONG);
}

/// Output of a guest with a single part.
fn alone(program: &Arc<Program>, args: &[&str]) -> String {
    let running = Running::new(program, args);
    running.machine.thaw().unwrap();
    assert_eq!(running.outcome(), Outcome::Exit(0));
    running.text()
}

/// Moves threads and captures all until the machine ends; returns the number of thread
/// moves.
fn shake(running: &Running, count: usize, seed: u64) -> u32 {
    let parts = running.span(count);
    let mut rng = SmallRng::seed_from_u64(seed);
    let (mut moves, begun) = (0, Instant::now());
    let outcome = loop {
        let pause = Duration::from_micros(rng.random_range(100..4000));
        if let Some(outcome) = running.machine.wait(Some(pause)) {
            break outcome;
        }
        assert!(begun.elapsed() < LONG, "it hangs: {:?}", running.text());
        let threads = running.machine.threads();
        if threads.is_empty() {
            continue;
        }
        let thread = threads[rng.random_range(0..threads.len())];
        match rng.random_range(0..8) {
            0 => drop(running.machine.recapture_all(LONG)),
            1 => drop(running.machine.recapture(thread)),
            _ => {
                let to = part(rng.random_range(0..count));
                moves += u32::from(running.machine.move_thread(thread, to).is_ok());
            }
        }
    };
    assert_eq!(parts.home().failure(), None);
    assert_eq!(outcome, Outcome::Exit(0), "{}", running.text());
    moves
}

/// A lock, condition variables, a barrier and counters, over parts between which threads
/// move.
#[test]
fn threads_move_and_compute_the_same() {
    let program = guest("threads");
    let args = ["8", "1500"];
    let expected = alone(&program, &args);
    let mut moves = 0;
    for (seed, count) in [(1, 2), (2, 3), (3, 5)] {
        let running = Running::new(&program, &args);
        moves += shake(&running, count, seed);
        assert_eq!(running.text(), expected, "seed {seed}, {count} parts");
    }
    assert!(moves > 20, "{moves}");
}

#[test]
fn zstd_compresses_the_same_on_three_parts() {
    let program = guest("zstd");
    let args = ["4", "3", "6144"];
    let expected = alone(&program, &args);
    let running = Running::new(&program, &args);
    assert!(shake(&running, 3, 7) > 5);
    assert_eq!(running.text(), expected);
}

/// It repeatedly spans and returns to one part while it runs: nothing is lost.
#[test]
fn it_spans_and_returns_to_one_part() {
    let program = guest("threads");
    let args = ["6", "30000"];
    let expected = alone(&program, &args);
    let running = Running::new(&program, &args);
    let mut changes = 0;
    let outcome = loop {
        let parts = running.span(2 + changes % 2);
        if let Some(outcome) = running.machine.wait(Some(Duration::from_millis(60))) {
            drop(parts);
            break outcome;
        }
        let stood = match parts.unspan(LONG) {
            Ok(stood) => stood,
            // It ended in the middle.
            Err(_) if running.machine.wait(Some(LONG)).is_some() => break running.outcome(),
            Err((_, error)) => panic!("{error}"),
        };
        assert!(stood < LONG);
        changes += 1;
        if let Some(outcome) = running.machine.wait(Some(Duration::from_millis(5))) {
            break outcome;
        }
        if running.machine.freeze(LONG).is_err() {
            break running.outcome();
        }
    };
    assert_eq!(outcome, Outcome::Exit(0), "{}", running.text());
    assert_eq!(running.text(), expected);
    assert!(changes >= 2, "{changes}");
}

/// Parts join and leave while it runs, with threads and pages: nothing is lost.
#[test]
fn parts_join_and_leave_while_it_runs() {
    let (threads, mapreduce) = (["8", "40000"], ["4", "8", "60"]);
    for (name, args, seed) in [("threads", &threads[..], 1), ("mapreduce", &mapreduce, 2)] {
        let program = guest(name);
        let expected = alone(&program, args);
        let running = Running::new(&program, args);
        let mut parts = running.span(2);
        let mut rng = SmallRng::seed_from_u64(seed);
        let (mut came, mut went) = (0, 0);
        // Objects move concurrently.
        let is_over = Arc::new(AtomicBool::new(false));
        let moving = {
            let (pages, is_over) = (parts.home().pages().clone(), is_over.clone());
            std::thread::spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed + 10);
                while !is_over.load(Ordering::Relaxed) && pages.failure().is_none() {
                    let others: Vec<PartId> = pages.others().with(PartId::HOME).iter().collect();
                    let to = others[rng.random_range(0..others.len())];
                    move_some_object(&pages, &mut rng, to);
                    std::thread::sleep(Duration::from_micros(rng.random_range(0..2000)));
                }
            })
        };
        let outcome = loop {
            let pause = Duration::from_micros(rng.random_range(100..6000));
            if let Some(outcome) = running.machine.wait(Some(pause)) {
                break outcome;
            }
            let members: Vec<PartId> = parts.home().members().iter().collect();
            let to = match rng.random_range(0..=members.len()) {
                0 => PartId::HOME,
                at => members[at - 1],
            };
            let changed = match rng.random_range(0..10) {
                0 if members.len() < 4 => parts.join().map(|_| came += 1),
                1 if !members.is_empty() => {
                    let part = members[rng.random_range(0..members.len())];
                    let to = if to == part { PartId::HOME } else { to };
                    parts.remove_part(part, to, LONG).map(|_| went += 1)
                }
                _ => {
                    move_some_thread(&running, &mut rng, to);
                    Ok(())
                }
            };
            match changed {
                Ok(()) => {}
                // It ended in the middle.
                Err(_) if running.machine.wait(Some(LONG)).is_some() => break running.outcome(),
                Err(error) => panic!("{name}: {error}"),
            }
        };
        is_over.store(true, Ordering::Relaxed);
        moving.join().unwrap();
        assert_eq!(parts.home().failure(), None);
        assert_eq!(outcome, Outcome::Exit(0), "{name}: {}", running.text());
        assert_eq!(running.text(), expected, "{name}");
        assert!(came > 2 && went > 2, "{name}: {came} came, {went} went");
    }
}

/// Its home moves repeatedly, with threads and pages at all parts: nothing is lost. Some
/// of the moves are cancelled after all pages have left.
#[test]
fn the_home_moves_while_it_runs() {
    let (threads, mapreduce) = (["8", "8000"], ["4", "8", "30"]);
    let store = ["6", "40000"];
    for (name, args, seed) in [
        ("threads", &threads[..], 1),
        ("mapreduce", &mapreduce, 2),
        ("store", &store, 3),
    ] {
        let program = guest(name);
        let expected = alone(&program, args);
        let mut running = Running::new(&program, args);
        let mut parts = running.span(3);
        let mut rng = SmallRng::seed_from_u64(seed);
        let (mut moved, mut stayed) = (0, 0);
        let outcome = loop {
            let pause = Duration::from_micros(rng.random_range(100..6000));
            if let Some(outcome) = running.machine.wait(Some(pause)) {
                break outcome;
            }
            let members: Vec<PartId> = parts.home().members().iter().collect();
            let to = match rng.random_range(0..=members.len()) {
                0 => PartId::HOME,
                at => members[at - 1],
            };
            let changed = match rng.random_range(0..8) {
                0 | 1 => {
                    let goes = rng.random_bool(0.7);
                    let output = running.output.clone();
                    let make = |image, memories| Running::of(&program, image, memories, output);
                    parts.move_home(make, goes).map(|machine| {
                        running.machine = machine;
                        match goes {
                            true => moved += 1,
                            false => stayed += 1,
                        }
                    })
                }
                2 if members.len() > 2 => {
                    let part = members[rng.random_range(0..members.len())];
                    let to = if to == part { PartId::HOME } else { to };
                    parts.remove_part(part, to, LONG).map(drop)
                }
                _ => {
                    move_some_object(parts.home().pages(), &mut rng, to);
                    move_some_thread(&running, &mut rng, to);
                    Ok(())
                }
            };
            match changed {
                Ok(()) => {}
                // It ended in the middle.
                Err(_) if running.machine.wait(Some(SOON)).is_some() => break running.outcome(),
                Err(error) => {
                    let members = parts.members().iter();
                    let members = members.map(|(part, member)| (*part, member.pages().failure()));
                    let members: Vec<_> = members.collect();
                    panic!("{name}: {error} ({moved} moved, {stayed} stayed, {members:?})");
                }
            }
        };
        assert_eq!(parts.home().failure(), None, "{name}");
        assert_eq!(outcome, Outcome::Exit(0), "{name}: {}", running.text());
        assert_eq!(running.text(), expected, "{name}");
        assert!(moved > 2, "{name}: {moved} moved, {stayed} stayed");
    }
}

/// The end of a part that is joining, or of which others have not heard, is not a loss;
/// joining under a number in use, or removing an unknown part, is refused.
#[test]
fn the_end_of_a_joining_part_is_no_loss() {
    let program = guest("spinner");
    let running = Running::new(&program, &["1000000", "100000"]);
    let mut parts = running.span(2);
    let refused = parts.remove_part(part(2), PartId::HOME, LONG);
    assert!(refused.is_err(), "{refused:?}");
    let refused = parts.remove_part(part(1), part(1), LONG);
    assert!(refused.is_err(), "{refused:?}");
    for _ in 0..3 {
        let (new, _) = parts.join().unwrap();
        assert_eq!(new, part(2));
        assert_eq!(parts.members().len(), 2);
        running
            .machine
            .move_thread(running.machine.threads()[0], new)
            .unwrap();
        parts.remove_part(new, part(1), LONG).unwrap();
        let refused = running
            .machine
            .move_thread(running.machine.threads()[0], new);
        assert!(
            matches!(refused, Err(MachineError::NoPart(_))),
            "{refused:?}"
        );
    }
    parts.kill_joining_member().unwrap();
    let knows_it = || parts.members()[&part(1)].pages().others().contains(part(2));
    let begun = Instant::now();
    while knows_it() {
        assert!(begun.elapsed() < LONG, "it is not forgotten");
        std::thread::yield_now();
    }
    assert_eq!(parts.home().failure(), None);
    assert!(running.machine.wait(Some(Duration::ZERO)).is_none());
    let (new, _) = parts.join().unwrap();
    assert_eq!(new, part(2));
    parts.kill_last_member();
    assert!(running.machine.wait(Some(LONG)).is_some());
    let failure = parts.home().failure();
    assert!(
        matches!(&failure, Some(SpanError::Lost { part, .. }) if part.number() == 2),
        "{failure:?}"
    );
}

/// Returning to one part can be retried after a timeout; until then nothing moves to the
/// members, and the machine runs.
#[test]
fn returning_to_one_part_can_be_retried() {
    let program = guest("threads");
    let args = ["6", "30000"];
    let expected = alone(&program, &args);
    let running = Running::new(&program, &args);
    let parts = running.span(3);
    let away = || {
        let places = running.machine.thread_locations();
        places.values().any(|place| *place != PartId::HOME)
    };
    let begun = Instant::now();
    while !away() {
        assert!(begun.elapsed() < LONG, "no thread begins elsewhere");
        std::thread::sleep(Duration::from_millis(1));
    }
    let (parts, error) = parts.unspan(Duration::ZERO).unwrap_err();
    assert!(
        error.to_string().contains("did not move home in time"),
        "{error}"
    );
    let refused = running.machine.move_thread(0, part(1));
    assert!(
        matches!(refused, Err(MachineError::Leaving(_))),
        "{refused:?}"
    );
    assert_eq!(parts.home().failure(), None);
    if let Err((_, error)) = parts.unspan(LONG) {
        panic!("{error}");
    }
    assert!(!away());
    assert_eq!(running.outcome(), Outcome::Exit(0), "{}", running.text());
    assert_eq!(running.text(), expected);
}

/// The beginning of a module with threads: host calls, a memory, and a main function that
/// starts four threads and waits until each has counted itself at 0.
fn written(thread: &str, after: &str) -> Arc<Program> {
    let text = format!(
        r#"(module
        (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (import "wasi_snapshot_preview1" "fd_write"
            (func $write (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "random_get"
            (func $random (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "clock_time_get"
            (func $clock (param i32 i64 i32) (result i32)))
        (memory (export "memory") 2 4000 shared)
        (func $done
            (drop (i32.atomic.rmw.add (i32.const 0) (i32.const 1)))
            (drop (memory.atomic.notify (i32.const 0) (i32.const 1))))
        (func (export "wasi_thread_start") (param $tid i32) (param $arg i32)
            (local $i i32) (local $at i32) (local $now i64) (local $last i64)
            {thread})
        (func (export "_start") (local $n i32) (local $i i32) (local $at i32)
            (loop $more
                (if (i32.lt_s (call $spawn (local.get $n)) (i32.const 1))
                    (then unreachable))
                (local.set $n (i32.add (local.get $n) (i32.const 1)))
                (br_if $more (i32.lt_u (local.get $n) (i32.const 4))))
            (loop $wait
                (local.set $n (i32.atomic.load (i32.const 0)))
                (if (i32.lt_u (local.get $n) (i32.const 4)) (then
                    (drop (memory.atomic.wait32
                        (i32.const 0) (local.get $n) (i64.const -1)))
                    (br $wait))))
            {after}))"#
    );
    engine().load(&wat::parse_str(text).unwrap()).unwrap()
}

/// Four threads grow the memory concurrently, and each writes its number into its new
/// page: all pages are distinct, and all parts see all of them.
#[test]
fn memory_grows_at_all_parts_at_once() {
    let program = written(
        "(loop $more
            (local.set $at (memory.grow (i32.const 1)))
            (if (i32.eq (local.get $at) (i32.const -1)) (then unreachable))
            (if (i32.ge_u (local.get $at) (memory.size)) (then unreachable))
            (local.set $at (i32.shl (local.get $at) (i32.const 16)))
            (drop (i32.atomic.rmw.add (local.get $at)
                (i32.add (local.get $arg) (i32.const 1))))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $more (i32.lt_u (local.get $i) (i32.const 50))))
         (call $done)",
        "(if (i32.ne (memory.size) (i32.const 202)) (then (call $exit (i32.const 4))))
         (local.set $i (i32.const 2))
         (local.set $n (i32.const 0))
         (loop $more
            (local.set $at (i32.load (i32.shl (local.get $i) (i32.const 16))))
            (if (i32.or (i32.eqz (local.get $at)) (i32.gt_u (local.get $at) (i32.const 4)))
                (then (call $exit (i32.const 5))))
            (local.set $n (i32.add (local.get $n) (local.get $at)))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $more (i32.lt_u (local.get $i) (i32.const 202))))
         (if (i32.ne (local.get $n) (i32.const 500)) (then (call $exit (i32.const 6))))",
    );
    for count in [1, 3, 5] {
        let running = Running::new(&program, &[]);
        let parts = running.span(count);
        assert_eq!(running.outcome(), Outcome::Exit(0), "{count} parts");
        assert_eq!(parts.home().failure(), None);
    }
}

/// Memory that a member has no room for does not grow and cannot be accessed.
#[test]
fn memory_grows_at_all_parts_or_not_at_all() {
    let program = written(
        "(if (i32.ne (memory.grow (i32.const 100)) (i32.const -1)) (then unreachable))
         (call $done)",
        "(if (i32.ne (memory.size) (i32.const 2)) (then (call $exit (i32.const 4))))
         (if (i32.ne (memory.grow (i32.const 1)) (i32.const 2)) (then (call $exit (i32.const 5))))
         (if (i32.load (i32.const 131072)) (then (call $exit (i32.const 6))))
         (i32.store (i32.const 3145728) (i32.const 1))",
    );
    for count in [2, 3] {
        let running = Running::new(&program, &[]);
        let parts = running.span_within(count, 1 << 20);
        match running.outcome() {
            Outcome::Trap(trap) => {
                let message = "out of bounds memory access";
                assert!(trap.message.contains(message), "{trap}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(parts.home().failure(), None);
    }
}

/// Output of threads at members appears once, complete and in the order in which they
/// take turns.
#[test]
fn output_of_members_is_in_order() {
    // At 64 + 16 * arg: the iovec, and the bytes.
    let program = written(
        "(local.set $at (i32.add (i32.const 64) (i32.shl (local.get $arg) (i32.const 4))))
         (i32.store (local.get $at) (i32.add (local.get $at) (i32.const 12)))
         (i32.store offset=4 (local.get $at) (i32.const 2))
         (i32.store8 offset=12 (local.get $at) (i32.add (local.get $arg) (i32.const 97)))
         (i32.store8 offset=13 (local.get $at) (i32.const 10))
         (loop $more
            (loop $turn
                (local.set $i (i32.atomic.load (i32.const 4)))
                (if (i32.ne (i32.and (local.get $i) (i32.const 3)) (local.get $arg)) (then
                    (drop (memory.atomic.wait32
                        (i32.const 4) (local.get $i) (i64.const 2000000)))
                    (br $turn))))
            (if (call $write (i32.const 1) (local.get $at) (i32.const 1)
                    (i32.add (local.get $at) (i32.const 8)))
                (then unreachable))
            (i32.atomic.store (i32.const 4) (i32.add (local.get $i) (i32.const 1)))
            (drop (memory.atomic.notify (i32.const 4) (i32.const 4)))
            (br_if $more (i32.lt_u (local.get $i) (i32.const 196))))
         (call $done)",
        "",
    );
    let running = Running::new(&program, &[]);
    let parts = running.span(4);
    assert_eq!(running.outcome(), Outcome::Exit(0));
    assert_eq!(parts.home().failure(), None);
    assert_eq!(running.text(), "a\nb\nc\nd\n".repeat(50));
}

/// Data that host calls of threads at members read and write travels with the calls: its
/// pages stay.
#[test]
fn pages_stay_where_calls_are_made() {
    // Each thread has 16 KiB of its own; each call writes 2 KiB of it or fills 4 KiB.
    const CALLS: u32 = 300;
    let program = written(
        &format!(
            "(local.set $at (i32.shl (i32.add (local.get $arg) (i32.const 1)) (i32.const 14)))
             (i32.store (local.get $at) (i32.add (local.get $at) (i32.const 4096)))
             (i32.store offset=4 (local.get $at) (i32.const 2048))
             (memory.fill (i32.add (local.get $at) (i32.const 4096)) (i32.const 46)
                (i32.const 2048))
             (loop $more
                (if (call $write (i32.const 1) (local.get $at) (i32.const 1)
                        (i32.add (local.get $at) (i32.const 8)))
                    (then unreachable))
                (if (i32.ne (i32.load offset=8 (local.get $at)) (i32.const 2048))
                    (then unreachable))
                (i32.store offset=8192 (local.get $at) (i32.const 0))
                (if (call $random (i32.add (local.get $at) (i32.const 8192))
                        (i32.const 4096))
                    (then unreachable))
                (if (i32.eqz (i32.load offset=8192 (local.get $at))) (then unreachable))
                (local.set $i (i32.add (local.get $i) (i32.const 1)))
                (br_if $more (i32.lt_u (local.get $i) (i32.const {CALLS}))))
             (call $done)"
        ),
        "",
    );
    let running = Running::new(&program, &[]);
    let parts = running.span(3);
    assert_eq!(running.outcome(), Outcome::Exit(0));
    assert_eq!(running.text(), ".".repeat(4 * 2048 * CALLS as usize));
    // Otherwise each call of two or three threads would wait for several pages.
    let waited = parts.home().pages().latency().count();
    assert!(
        waited < u64::from(CALLS),
        "the home waited for {waited} pages"
    );
}

/// A thread never reads a time before one that it knows to have been read, at any part:
/// moving threads exchange their times through memory.
#[test]
fn time_is_monotonic_across_parts() {
    // At 64: the latest time read by any thread. At 128 + 64 * arg: the buffer of each
    // thread.
    let program = written(
        "(local.set $at (i32.add (i32.const 128) (i32.shl (local.get $arg) (i32.const 6))))
         (loop $more
            (local.set $last (i64.atomic.load (i32.const 64)))
            (if (call $clock (i32.const 1) (i64.const 1) (local.get $at))
                (then unreachable))
            (local.set $now (i64.load (local.get $at)))
            (if (i64.lt_u (local.get $now) (local.get $last)) (then (call $exit (i32.const 7))))
            (drop (i64.atomic.rmw.cmpxchg (i32.const 64) (local.get $last) (local.get $now)))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $more (i32.lt_u (local.get $i) (i32.const 60000))))
         (call $done)",
        "",
    );
    let running = Running::new(&program, &[]);
    let parts = running.span(4);
    let mut random = SmallRng::seed_from_u64(5);
    let begun = Instant::now();
    while running
        .machine
        .wait(Some(Duration::from_millis(2)))
        .is_none()
    {
        assert!(begun.elapsed() < LONG);
        let tids = running.machine.threads();
        let tid = tids[random.random_range(0..tids.len())];
        // It may have ended.
        let _ = running
            .machine
            .move_thread(tid, part(random.random_range(0..4)));
    }
    assert_eq!(running.outcome(), Outcome::Exit(0));
    assert_eq!(parts.home().failure(), None);
}

/// A thread at a member reads the monotonic clock without the home; other clocks are read
/// by the home.
#[test]
fn clocks_are_read_where_threads_are() {
    struct ConstantClock;
    impl HostClock for ConstantClock {
        fn monotonic_ns(&self) -> u64 {
            77
        }
        fn realtime_ns(&self) -> u64 {
            1 << 60
        }
    }
    let program = written(
        "(local.set $at (i32.add (i32.const 128) (i32.shl (local.get $arg) (i32.const 6))))
         (if (i32.ne (call $clock (i32.const 2) (i64.const 1) (local.get $at)) (i32.const 8))
            (then (call $exit (i32.const 3))))
         (if (call $clock (i32.const 0) (i64.const 1) (local.get $at)) (then unreachable))
         (if (i64.lt_u (i64.load (local.get $at)) (i64.const 0x1000000000000000))
            (then (call $exit (i32.const 5))))
         (if (call $clock (i32.const 1) (i64.const 1) (local.get $at)) (then unreachable))
         (local.set $last (i64.load (local.get $at)))
         (loop $more
            (if (call $clock (i32.const 1) (i64.const 1) (local.get $at))
                (then unreachable))
            (br_if $more (i64.lt_u (i64.load (local.get $at))
                (i64.add (local.get $last) (i64.const 20000000)))))
         (call $done)",
        "",
    );
    let running = Running::by(&program, &[], Arc::new(ConstantClock));
    // One part per thread: at the home a thread would loop for ever.
    let parts = running.span(5);
    assert_eq!(running.outcome(), Outcome::Exit(0));
    assert_eq!(parts.home().failure(), None);
}

/// A trap or an exit at a member ends the machine.
#[test]
fn traps_and_exits_at_members_end_the_machine() {
    let last = |what: &str| {
        let burn = "(loop $on (br $on))";
        written(
            &format!("(if (i32.eq (local.get $arg) (i32.const 1)) (then {what})) {burn}"),
            "",
        )
    };
    let running = Running::new(&last("(drop (i32.load (i32.const -8)))"), &[]);
    let parts = running.span(3);
    let outcome = running.outcome();
    let Outcome::Trap(trap) = &outcome else {
        panic!("{outcome:?}");
    };
    assert!(trap.message.contains("out of bounds"), "{trap}");
    assert_eq!(parts.home().failure(), None);
    let running = Running::new(&last("(call $exit (i32.const 7))"), &[]);
    let _parts = running.span(3);
    assert_eq!(running.outcome(), Outcome::Exit(7));
}

/// Threads that compute at three parts reach safepoints, are captured and stopped.
#[test]
fn threads_elsewhere_are_frozen_and_stopped() {
    let program = written("(loop $on (br $on))", "");
    let running = Running::new(&program, &[]);
    let parts = running.span(3);
    let machine = &running.machine;
    while machine.thread_locations().len() < 5 {
        std::thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..20 {
        machine.freeze(LONG).unwrap();
        assert_eq!(machine.image().unwrap().threads(), 5);
        machine.thaw().unwrap();
    }
    let places = machine.thread_locations();
    for number in 0..3 {
        let here = places.values().filter(|place| **place == part(number));
        assert!(here.count() >= 1, "{places:?}");
    }
    let error = machine.move_thread(77, part(1)).unwrap_err();
    assert!(matches!(error, MachineError::NoThread(77)), "{error}");
    let error = machine.move_thread(1, part(9)).unwrap_err();
    assert!(matches!(error, MachineError::NoPart(_)), "{error}");
    machine.stop();
    assert_eq!(running.outcome(), Outcome::Stopped);
    drop(parts);
}

/// A part is lost while threads compute, wait and fault on its pages: the machine ends,
/// and its error names the part.
#[test]
fn a_lost_part_ends_the_machine_by_name() {
    let program = written(
        "(block $burns
            (br_if $burns (i32.eq (local.get $arg) (i32.const 1)))
            (if (i32.eq (local.get $arg) (i32.const 2)) (then
                (drop (memory.atomic.wait32 (i32.const 64) (i32.const 0) (i64.const -1))))))
         (loop $on
            (drop (i32.atomic.rmw.add (i32.const 70000) (i32.const 1)))
            (br $on))",
        "",
    );
    let running = Running::new(&program, &[]);
    let mut parts = running.span(3);
    while running.machine.thread_locations().len() < 5 {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Not the next thread: it would be told.
    parts.kill_last_member();
    assert_eq!(running.outcome(), Outcome::Stopped);
    let failure = parts.home().failure().expect("a reason");
    assert!(
        matches!(&failure, SpanError::Lost { part: lost, .. } if *lost == part(2)),
        "{failure}"
    );
}
