//! Arguments, environment, clocks, random numbers, exit, and bad arguments.

mod common;
use common::*;
use keel_wasi::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn strings(guest: &Guest, get: &str, sizes: &str) -> Vec<String> {
    guest.run(sizes, &[0, 4]).unwrap();
    let (count, bytes) = (guest.u32_at(0), guest.u32_at(4));
    guest.run(get, &[8192, 16384]).unwrap();
    let all = guest.bytes(16384, bytes as usize);
    let strings = (0..count).map(|index| {
        let at = guest.u32_at(8192 + u64::from(index) * 4) as usize - 16384;
        let end = all[at..].iter().position(|&byte| byte == 0).unwrap();
        String::from_utf8(all[at..at + end].to_vec()).unwrap()
    });
    strings.collect()
}

#[test]
fn arguments_and_environment() {
    let guest = Guest::new(Config {
        args: vec!["prog".into(), String::new(), "ü".into()],
        env: vec![("A".into(), "1=2".into()), ("B".into(), String::new())],
        ..Config::default()
    });
    let check = |guest: &Guest| {
        let args = strings(guest, "args_get", "args_sizes_get");
        assert_eq!(args, ["prog", "", "ü"]);
        let env = strings(guest, "environ_get", "environ_sizes_get");
        assert_eq!(env, ["A=1=2", "B="]);
    };
    check(&guest);
    check(&guest.moved_with(Resources::default()));
    let none = Guest::new(Config::default());
    assert!(strings(&none, "args_get", "args_sizes_get").is_empty());
}

#[test]
fn refused_configurations() {
    let bad = |config: Config| Wasi::new(config).unwrap_err().to_string();
    let nul = bad(Config {
        args: vec!["ok".into(), "a\0b".into()],
        ..Config::default()
    });
    assert_eq!(nul, "argument 1 contains a NUL byte: remove it");
    for (name, value) in [("A\0", ""), ("A", "\0"), ("", "x"), ("A=B", "")] {
        bad(Config {
            env: vec![(name.into(), value.into())],
            ..Config::default()
        });
    }
    let missing = bad(Config {
        preopens: vec![preopen("/does/not/exist".as_ref(), false)],
        ..Config::default()
    });
    assert!(missing.contains("/does/not/exist"), "{missing}");
    let (_dir, config) = sandbox();
    let limits = Limits {
        descriptors_max: 3,
        ..Limits::default()
    };
    bad(Config { limits, ..config });
}

#[test]
fn clocks() {
    let clock = Arc::new(Clock::default());
    clock.monotonic_ns.store(1000, Ordering::SeqCst);
    clock.realtime_ns.store(5000, Ordering::SeqCst);
    let guest = Guest::new(Config {
        clock: clock.clone(),
        ..Config::default()
    });
    assert_eq!((guest.time(0), guest.time(1)), (5000, 0));
    clock.monotonic_ns.store(1700, Ordering::SeqCst);
    clock.realtime_ns.store(5700, Ordering::SeqCst);
    assert_eq!((guest.time(0), guest.time(1)), (5700, 700));
    assert_eq!(guest.run64("clock_res_get", &[0]), Ok(1));
    for id in [2, 3] {
        assert_eq!(guest.run64("clock_time_get", &[id, 0]), Err(Errno::Badf));
        assert_eq!(guest.run64("clock_res_get", &[id]), Err(Errno::Badf));
    }
    assert_eq!(guest.run64("clock_time_get", &[4, 0]), Err(Errno::Inval));

    // The target booted just now and its wall clock is behind.
    let target = Arc::new(Clock::default());
    let guest = guest.moved_with(Resources {
        clock: target.clone(),
        ..Resources::default()
    });
    assert_eq!((guest.time(0), guest.time(1)), (5700, 700));
    target.monotonic_ns.store(11, Ordering::SeqCst);
    target.realtime_ns.store(11, Ordering::SeqCst);
    assert_eq!((guest.time(0), guest.time(1)), (5711, 711));

    let system = Guest::new(Config::default());
    let before = system.time(1);
    let system = system.moved_with(Resources::default());
    assert!(system.time(1) >= before);
}

#[test]
fn random_goes_on_over_a_move() {
    let config = || Config {
        seed: Some([9; 32]),
        ..Config::default()
    };
    let still = Guest::new(config());
    let expected = [still.random(7), still.random(100)];
    let moving = Guest::new(config());
    let first = moving.random(7);
    let moving = moving.moved_with(Resources::default());
    assert_eq!([first, moving.random(100)], expected);
    let mut other = Guest::new(config());
    other.tid = 2;
    assert_ne!(other.random(7), expected[0]);
    let (a, b) = (Guest::new(Config::default()), Guest::new(Config::default()));
    assert_ne!(a.random(32), b.random(32));
    assert_eq!(a.random(0), []);
}

#[test]
fn random_is_interrupted_between_pieces() {
    let config = || Config {
        seed: Some([1; 32]),
        ..Config::default()
    };
    const COUNT: u64 = 3 << 20;
    let expected = Guest::new(config()).random(COUNT);
    let guest = Guest::new(config());
    guest.flag.request();
    let args = [65536, COUNT];
    let mut interruptions = 0;
    while guest.outcome("random_get", &args) == Outcome::Interrupted {
        interruptions += 1;
    }
    assert_eq!(interruptions, 2);
    assert_eq!(guest.bytes(65536, COUNT as usize), expected);
    assert_eq!(*guest.state.borrow(), CallState::default());
}

#[test]
fn process() {
    let guest = Guest::new(Config::default());
    for code in [0, 7, 126, u32::MAX] {
        let outcome = guest.outcome("proc_exit", &[code.into()]);
        assert_eq!(outcome, Outcome::Exit(code));
    }
    assert_eq!(guest.run("proc_raise", &[6]), Err(Errno::Notsup));
    assert_eq!(guest.run("sched_yield", &[]), Ok(()));
}

#[test]
fn bad_pointers_trap_and_bad_values_fail() {
    let (_dir, guest) = in_sandbox(Kind::Host);
    let file = guest.open("f", CREAT, RW).unwrap();
    let end = MEMORY_BYTES as u64;
    let traps: &[(&str, &[u64])] = &[
        ("fd_read", &[file.into(), end - 4, 1, 0]),
        ("fd_read", &[file.into(), 1025, 1, 0]),
        ("fd_read", &[file.into(), u32::MAX as u64 - 7, 4, 0]),
        ("clock_time_get", &[0, 0, end]),
        ("clock_time_get", &[0, 0, 4]),
        ("random_get", &[end - 1, 2]),
        ("random_get", &[0, u32::MAX.into()]),
        ("path_unlink_file", &[3, end, 1]),
        ("poll_oneoff", &[end - 8, 0, 1, 0]),
        ("fd_readdir", &[3, end - 8, 9, 0, 0]),
    ];
    for (name, args) in traps {
        let outcome = guest.outcome(name, args);
        assert!(matches!(outcome, Outcome::Trap(_)), "{name}: {outcome:?}");
    }
    // A range outside of memory is found before anything is written.
    guest.write(file, b"abc").unwrap();
    guest.put(1024, &[0, 0, 1, 0, 3, 0, 0, 0]);
    guest.put(1032, &[0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0]);
    let outcome = guest.outcome("fd_write", &[file.into(), 1024, 2, 0]);
    assert!(matches!(outcome, Outcome::Trap(_)));
    assert_eq!(guest.stat(file).unwrap().size, 3);

    let fails: &[(&str, &[u64], Errno)] = &[
        ("fd_seek", &[file.into(), 0, 3, 0], Errno::Inval),
        ("fd_advise", &[file.into(), 0, 0, 6], Errno::Inval),
        ("fd_fdstat_set_flags", &[file.into(), 32], Errno::Inval),
        ("fd_fdstat_set_flags", &[file.into(), 1 << 20], Errno::Inval),
        ("proc_raise", &[31], Errno::Inval),
        ("path_filestat_get", &[3, 2, 0, 0, 0], Errno::Inval),
        ("path_unlink_file", &[3, 8192, 4096], Errno::Nametoolong),
    ];
    for (name, args, errno) in fails {
        assert_eq!(guest.run(name, args), Err(*errno), "{name}");
    }
    guest.put(8192, &[0xff]);
    assert_eq!(
        guest.run("path_unlink_file", &[3, 8192, 1]),
        Err(Errno::Ilseq)
    );
    let short = guest.outcome("fd_close", &[]);
    assert!(matches!(short, Outcome::Trap(_)));
}

/// With a descriptor that does not exist, every function that takes one says
/// so, whatever the other arguments.
#[test]
fn every_descriptor_is_checked() {
    let guest = Guest::new(Config::default());
    for function in Function::all() {
        let name = function.name();
        if !(name.starts_with("fd_") || name.starts_with("path_") || name.starts_with("sock_")) {
            continue;
        }
        let mut args = vec![0; function.params().len()];
        args[if name == "path_symlink" { 2 } else { 0 }] = 99;
        assert_eq!(guest.run(name, &args), Err(Errno::Badf), "{name}");
    }
}
