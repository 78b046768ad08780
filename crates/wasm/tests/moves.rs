//! Whole machines that are captured and resumed elsewhere repeatedly while they run, and machines
//! that do not end by themselves.

mod common;

use common::{LIMIT, Running, guest, program};
use keel_wasi::network::{Connection, ConnectionId};
use keel_wasm::runtime::{Engine, Hold, MachineError, Options, Outcome};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Moves a machine until it ends; checks output and exit code. Returns the
/// number of moves.
fn moved(name: &str, args: &[&str], wanted: &str) -> u32 {
    let program = program(&guest(name));
    let mut running = Running::start(&program, args);
    let mut moves = 0;
    let outcome = loop {
        if let Some(outcome) = running.machine.wait(Some(Duration::from_millis(3))) {
            break outcome;
        }
        moves += u32::from(running.move_on());
    };
    assert_eq!(outcome, Outcome::Exit(0), "{}", running.text());
    assert_eq!(running.text(), wanted);
    moves
}

/// Its output without moves.
fn alone(name: &str, args: &[&str]) -> String {
    let running = Running::start(&program(&guest(name)), args);
    assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Exit(0)));
    running.text()
}

/// A program's code for resuming threads is that of the functions on their stacks, and no more is
/// compiled.
#[test]
fn only_functions_on_stacks_are_compiled_for_resuming() {
    let cache = tempfile::tempdir().unwrap();
    let compiled = || -> BTreeSet<u32> {
        let files = std::fs::read_dir(cache.path()).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        let numbers = names.filter_map(|name| {
            let stem = name.strip_suffix(".resume")?;
            stem.rsplit('.').next()?.parse().ok()
        });
        numbers.collect()
    };
    let engine = Engine::with_cache(Options::default(), cache.path()).unwrap();
    let program = engine.load(&guest("counter")).unwrap();
    let mut running = Running::start(&program, &["0", "1"]);
    assert_eq!(compiled(), BTreeSet::new());

    let points = running.machine.points_on_stacks(LIMIT).unwrap();
    let found = program.stack_code(&points).unwrap();
    assert!(!found.is_empty() && found.len() < program.meta().functions.len() / 2);
    program.prepare_stacks(&found).unwrap();
    let here = compiled();
    assert!(here.is_superset(&found), "{here:?} {found:?}");

    // The next freeze may find one or two others, which then are compiled when it goes on.
    let before = running.output.bytes().len();
    assert!(running.move_on());
    let begun = Instant::now();
    while running.output.bytes().len() == before {
        assert!(begun.elapsed() < LIMIT, "it stands still");
        std::thread::yield_now();
    }
    assert!(compiled().len() < program.meta().functions.len() / 2);
}

/// Threads spawned while a freeze times out still start.
#[test]
fn freezes_that_come_too_late_lose_no_thread() {
    let expected = alone("threads", &["2"]);
    let program = program(&guest("threads"));
    for _ in 0..5 {
        let running = Running::start(&program, &["2"]);
        let begun = Instant::now();
        let mut late = 0;
        let outcome = loop {
            if let Some(outcome) = running.machine.wait(Some(Duration::ZERO)) {
                break outcome;
            }
            match running.machine.freeze(Duration::ZERO) {
                Err(MachineError::FreezeTimeout(_)) => late += 1,
                Ok(()) => running.machine.thaw().unwrap(),
                Err(_) => {}
            }
            assert!(begun.elapsed() < LIMIT, "it stands still");
        };
        assert_eq!(outcome, Outcome::Exit(0));
        assert_eq!(running.text(), expected);
        assert!(late > 0);
    }
}

/// Held threads do not run, whatever other operations their machine undergoes.
#[test]
fn held_threads_stand_until_they_are_released() {
    let program = program(&guest("counter"));
    let mut running = Running::start(&program, &["0", "1"]);
    let length = |running: &Running| running.output.bytes().len();
    let goes_on = |running: &Running| {
        let (before, begun) = (length(running), Instant::now());
        while length(running) == before {
            assert!(begun.elapsed() < LIMIT, "it stands still");
            std::thread::yield_now();
        }
    };
    goes_on(&running);
    for _ in 0..10 {
        let machine = &running.machine;
        machine.hold(Hold::Slowdown, None).unwrap();
        machine.hold(Hold::CpuLimit, Some(&[0])).unwrap();
        // It is captured once the machine is frozen; thawing does not release it.
        machine.freeze(LIMIT).unwrap();
        let stood = length(&running);
        machine.thaw().unwrap();
        machine.release(Hold::CpuLimit);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(length(&running), stood);
        machine.release(Hold::Slowdown);
        goes_on(&running);
        // A machine moved while it is held continues at the target.
        running.machine.hold(Hold::Slowdown, None).unwrap();
        assert!(running.move_on());
        goes_on(&running);
    }
    // And it can be ended while it is held.
    running.machine.hold(Hold::Slowdown, None).unwrap();
    running.machine.stop();
    assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Stopped));
}

/// Endless, so that it can be moved any number of times.
#[test]
fn counter() {
    let program = program(&guest("counter"));
    let mut running = Running::start(&program, &["0", "1"]);
    for _ in 0..20 {
        let length = running.output.bytes().len();
        let begun = Instant::now();
        while running.output.bytes().len() == length {
            assert!(begun.elapsed() < LIMIT, "it stands still");
            std::thread::yield_now();
        }
        assert!(running.move_on());
    }
    running.machine.stop();
    running.machine.wait(Some(LIMIT)).unwrap();
    let text = running.text();
    for (number, line) in text.lines().enumerate() {
        assert_eq!(line, number.to_string());
    }
    assert!(text.lines().count() >= 3);
}

#[test]
fn spinner() {
    let args = ["3", "10000000"];
    assert!(moved("spinner", &args, &alone("spinner", &args)) >= 3);
}

#[test]
fn writer() {
    let wanted: String = (0..5).map(|line| format!("{line}\n")).collect();
    assert!(moved("writer", &["24", "200", "5"], &wanted) >= 3);
}

#[test]
fn threads() {
    let args = ["6", "60000"];
    assert!(moved("threads", &args, &alone("threads", &args)) >= 3);
}

#[test]
fn zstd() {
    let args = ["4", "5", "4096", "8"];
    assert!(moved("zstd", &args, &alone("zstd", &args)) >= 3);
}

#[test]
fn files() {
    let program = program(&guest("files"));
    let folder = tempfile::tempdir().unwrap();
    let mut running = Running::start_in(&program, &["/data", "400"], Some(folder.path()));
    let mut moves = 0;
    let outcome = loop {
        if let Some(outcome) = running.machine.wait(Some(Duration::from_millis(1))) {
            break outcome;
        }
        moves += u32::from(running.move_on());
    };
    running.machine.wasi().finish();
    assert_eq!(outcome, Outcome::Exit(0), "{}", running.text());
    assert!(running.text().contains("in each, sum"));
    let left: Vec<_> = folder.path().read_dir().unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(moves >= 3, "{moves}");
}

#[test]
fn a_spinning_machine_freezes_and_stops() {
    let running = Running::start(&program(&guest("hostile")), &["spin"]);
    for _ in 0..50 {
        running.machine.freeze(LIMIT).unwrap();
        running.machine.thaw().unwrap();
    }
    running.machine.stop();
    assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Stopped));
    assert!(matches!(
        running.machine.freeze(LIMIT),
        Err(MachineError::Ended)
    ));
    assert!(matches!(running.machine.thaw(), Err(MachineError::Ended)));
}

/// A trap in one thread ends all, with the names of that thread's functions.
#[test]
fn a_trap_ends_all_threads() {
    let module = wat::parse_str(
        r#"(module
          (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
          (import "env" "memory" (memory 1 1 shared))
          (func (export "_start")
            (drop (call $spawn (i32.const 0)))
            (drop (call $spawn (i32.const 1)))
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1))))
          (func $bad (param i32) (drop (i32.div_u (i32.const 1) (local.get 0))))
          (func (export "wasi_thread_start") (param i32 i32)
            (if (local.get 1) (then (loop $l (br $l))))
            (call $bad (local.get 1))))"#,
    )
    .unwrap();
    let running = Running::start(&program(&module), &[]);
    let Some(Outcome::Trap(trap)) = running.machine.wait(Some(LIMIT)) else {
        panic!("no trap");
    };
    assert!(trap.message.contains("integer divide by zero"), "{trap}");
    assert_eq!(trap.backtrace[0], "bad");
    assert_eq!(trap.backtrace.len(), 2, "{trap}");
}

/// Functions without names are called by the index that their author knows.
#[test]
fn a_backtrace_has_the_authors_indices() {
    let module = wat::parse_str(
        r#"(module
          (memory 1)
          (func (drop (memory.grow (i32.const 0))))
          (func (param i32) (drop (i32.div_u (i32.const 1) (local.get 0))))
          (func (export "_start") (call 0) (call 1 (i32.const 0))))"#,
    )
    .unwrap();
    let running = Running::start(&program(&module), &[]);
    let Some(Outcome::Trap(trap)) = running.machine.wait(Some(LIMIT)) else {
        panic!("no trap");
    };
    assert_eq!(trap.backtrace, ["function 1", "function 2"]);
}

/// Threads that wait, sleep and spin come to safepoints at once.
#[test]
fn a_machine_freezes_whatever_its_threads_do() {
    let module = wat::parse_str(
        r#"(module
          (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
          (import "wasi_snapshot_preview1" "poll_oneoff"
            (func $poll (param i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_read"
            (func $read (param i32 i32 i32 i32) (result i32)))
          (import "env" "memory" (memory 4 4 shared))
          (func (export "_start")
            (local $i i32)
            (loop $l
              (drop (call $spawn (local.get $i)))
              (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 8))))
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1))))
          (func (export "wasi_thread_start") (param i32 i32)
            (block $d (block $c (block $b (block $a
              (br_table $a $b $c $d (i32.and (local.get 1) (i32.const 3))))
              (loop $l (br $l)))
              (loop $l
                (drop (memory.atomic.wait32 (i32.const 4) (i32.const 0) (i64.const 1000000)))
                (br $l)))
              (loop $l
                (memory.fill (i32.const 65536) (local.get 0) (i32.const 196608))
                (br $l)))
            ;; clock subscription: an hour
            (i32.store8 offset=8 (i32.const 1024) (i32.const 0))
            (i32.store offset=16 (i32.const 1024) (i32.const 1))
            (i64.store offset=24 (i32.const 1024) (i64.const 3600000000000))
            (loop $l
              (drop (call $poll (i32.const 1024) (i32.const 2048) (i32.const 1) (i32.const 4096)))
              (br $l))))"#,
    )
    .unwrap();
    let mut running = Running::start(&program(&module), &[]);
    while running.machine.threads().len() < 9 {
        std::thread::yield_now();
    }
    let begun = Instant::now();
    for _ in 0..20 {
        assert!(running.move_on());
    }
    assert_eq!(running.machine.threads().len(), 9);
    assert!(begun.elapsed() < LIMIT);
}

/// A machine whose clients are served meanwhile: they hold still while it is captured for a move.
type Served = Mutex<Running>;

/// Sends `bytes` to a guest that echoes, and returns what it gives back.
fn echoed(served: &Served, number: u64, bytes: &[u8]) -> Vec<u8> {
    let id = ConnectionId { carrier: 1, number };
    let with = |act: &mut dyn FnMut(&Connection)| {
        let running = served.lock().unwrap();
        let connection = running.machine.wasi().network().connection(id);
        act(&connection.unwrap());
    };
    let address = SocketAddr::from(([127, 0, 0, 1], 80));
    {
        let running = served.lock().unwrap();
        let network = running.machine.wasi().network();
        network.offer(id, 0, address, address).unwrap();
    }
    let (mut sent, mut back) = (0, Vec::new());
    let mut buffer = vec![0; 50_000];
    let begun = Instant::now();
    let mut ended = false;
    while !ended {
        with(&mut |connection| {
            let end = bytes.len().min(sent + connection.room().min(30_000));
            connection.deliver(sent as u64, &bytes[sent..end]).unwrap();
            sent = end;
            if sent == bytes.len() {
                connection.deliver_end(sent as u64).unwrap();
            }
            let count = connection.sent_from(back.len() as u64, &mut buffer);
            back.extend(&buffer[..count]);
            connection.acknowledge(back.len() as u64).unwrap();
            let progress = connection.progress();
            ended = progress.ended && progress.sent == back.len() as u64;
        });
        assert!(begun.elapsed() < LIMIT);
        std::thread::yield_now();
    }
    back
}

fn pattern(length: u32) -> Vec<u8> {
    (0..length)
        .map(|at| (at.wrapping_mul(at) >> 7) as u8)
        .collect()
}

/// Connections stay with the machine while its thread is captured.
#[test]
fn echo_is_shaken() {
    let program = program(&guest("echo"));
    let served = Mutex::new(Running::start_listening(&program, &["3"]));
    let machine = served.lock().unwrap().machine.clone();
    let shaker = {
        let machine = machine.clone();
        std::thread::spawn(move || {
            while machine.wait(Some(Duration::from_micros(200))).is_none() {
                machine.recapture(0);
            }
        })
    };
    let sent = pattern(3_000_000);
    for number in 0..3 {
        assert!(echoed(&served, number, &sent) == sent);
    }
    assert_eq!(machine.wait(Some(LIMIT)), Some(Outcome::Exit(0)));
    shaker.join().unwrap();
    let running = served.into_inner().unwrap();
    assert_eq!(running.text(), "3000000 bytes\n".repeat(3));
    assert!(machine.captures() > 10);
}

/// Bytes in both directions, and clients that wait, move with their machine.
#[test]
fn connections_move_with_their_machine() {
    let program = program(&guest("echo"));
    let served = Mutex::new(Running::start_listening(&program, &["4"]));
    let sent = pattern(1_500_000);
    let mut moves = 0;
    std::thread::scope(|scope| {
        // All at once, and the guest serves one after the other.
        let clients = [0, 1, 2, 3].map(|number| {
            let (served, sent) = (&served, &sent);
            scope.spawn(move || assert!(echoed(served, number, sent) == *sent))
        });
        while !clients.iter().all(|client| client.is_finished()) {
            moves += u32::from(served.lock().unwrap().move_on());
            std::thread::yield_now();
        }
    });
    let running = served.into_inner().unwrap();
    assert_eq!(running.machine.wait(Some(LIMIT)), Some(Outcome::Exit(0)));
    assert_eq!(running.text(), "1500000 bytes\n".repeat(4));
    assert!(moves > 10, "{moves} moves");
}
