//! Imports of modules: checked first; snapshot 0 of WASI; and the cache for `--plain`.

use keel_wasi::{Config, MemorySink, Preopen, Source, Wasi};
use keel_wasm::runtime::{Engine, Limits, Machine, Options, Outcome, ProgramError};
use std::path::Path;
use std::sync::Arc;

fn engine() -> Engine {
    Engine::new(Options::default()).unwrap()
}

/// Unknown imports, in a module that neither can be instrumented nor compiled: what is wrong
/// with its code is found later.
#[test]
fn imports_are_checked_before_anything_is_compiled() {
    let module = wat::parse_str(
        r#"(module
            (import "env" "launch" (func (param i32)))
            (import "wasi_unstable" "sock_accept" (func (param i32 i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "fd_close" (func (param i64) (result i32)))
            (tag (param i32))
            (func (export "_start") (throw 0 (i32.const 1))))"#,
    )
    .unwrap();
    let all = "env.launch, wasi_unstable.sock_accept, wasi_snapshot_preview1.fd_close";
    let named = |error: ProgramError| match error {
        ProgramError::UnknownImports(names) => assert_eq!(names, all),
        other => panic!("{other}"),
    };
    named(engine().load(&module).unwrap_err());
    let wasi = Arc::new(Wasi::new(Config::default()).unwrap());
    named(
        engine()
            .run_uninstrumented(&module, wasi, Limits::default())
            .unwrap_err(),
    );
}

/// What only the runtime may import.
#[test]
fn a_guest_does_not_import_what_the_runtime_adds() {
    let module = wat::parse_str(
        r#"(module
            (import "keel" "grow:0" (func (param i32) (result i32)))
            (memory 1)
            (func (export "_start")))"#,
    )
    .unwrap();
    let error = engine().load(&module).unwrap_err();
    assert!(matches!(error, ProgramError::UnknownImports(_)), "{error}");
}

/// Calls of snapshot 0, each checked by the guest itself; it exits with the number of the
/// first that is wrong.
const SNAPSHOT_0: &str = r#"(module
    (import "wasi_unstable" "path_open"
      (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
    (import "wasi_unstable" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (import "wasi_unstable" "fd_seek" (func $seek (param i32 i64 i32 i32) (result i32)))
    (import "wasi_unstable" "fd_filestat_get" (func $stat (param i32 i32) (result i32)))
    (import "wasi_unstable" "path_filestat_get"
      (func $stat_at (param i32 i32 i32 i32 i32) (result i32)))
    (import "wasi_unstable" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
    (import "wasi_unstable" "proc_exit" (func $exit (param i32)))
    (memory (export "memory") 1)
    (data (i32.const 256) "name")
    (data (i32.const 300) "0123456789")
    (global $number (mut i32) (i32.const 0))
    (func $check (param i32)
      (global.set $number (i32.add (global.get $number) (i32.const 1)))
      (if (i32.eqz (local.get 0)) (then (call $exit (global.get $number)))))
    (func $seeks (param $offset i64) (param $whence i32) (result i64)
      (call $check (i32.eqz
        (call $seek (i32.const 4) (local.get $offset) (local.get $whence) (i32.const 8))))
      (i64.load (i32.const 8)))
    (func (export "_start")
      ;; 1, 2: a file of 10 bytes, descriptor 4
      (call $check (i32.eqz (call $open (i32.const 3) (i32.const 0) (i32.const 256) (i32.const 4)
        (i32.const 1) (i64.const 0x1fffffff) (i64.const 0x1fffffff) (i32.const 0) (i32.const 0))))
      (i32.store (i32.const 16) (i32.const 300))
      (i32.store (i32.const 20) (i32.const 10))
      (call $check (i32.eqz
        (call $write (i32.load (i32.const 0)) (i32.const 16) (i32.const 1) (i32.const 8))))
      ;; 3 to 8: current 0, end 1, start 2
      (call $check (i64.eq (call $seeks (i64.const -3) (i32.const 0)) (i64.const 7)))
      (call $check (i64.eq (call $seeks (i64.const -1) (i32.const 1)) (i64.const 9)))
      (call $check (i64.eq (call $seeks (i64.const 2) (i32.const 2)) (i64.const 2)))
      ;; 9: there is no other
      (call $check (i32.eq
        (call $seek (i32.const 4) (i64.const 0) (i32.const 3) (i32.const 8)) (i32.const 28)))
      ;; 10 to 13: 56 bytes, the links in 32 bits, the size behind them, and no more is written
      (i64.store (i32.const 568) (i64.const 77))
      (call $check (i32.eqz (call $stat (i32.const 4) (i32.const 512))))
      (call $check (i32.eq (i32.load (i32.const 532)) (i32.const 1)))
      (call $check (i64.eq (i64.load (i32.const 536)) (i64.const 10)))
      (call $check (i64.eq (i64.load (i32.const 568)) (i64.const 77)))
      ;; 14 to 16: the same by its path
      (i64.store (i32.const 668) (i64.const 77))
      (call $check (i32.eqz (call $stat_at
        (i32.const 3) (i32.const 0) (i32.const 256) (i32.const 4) (i32.const 640))))
      (call $check (i64.eq (i64.load (i32.const 664)) (i64.const 10)))
      (call $check (i32.eq (i32.load8_u (i32.const 656)) (i32.const 4)))
      ;; 17 to 20: a clock and a file that is always ready, each subscription of 56 bytes
      (i64.store (i32.const 1024) (i64.const 7))
      (i64.store (i32.const 1040) (i64.const -1))
      (i32.store (i32.const 1048) (i32.const 1))
      (i64.store (i32.const 1056) (i64.const 3600000000000))
      (i64.store (i32.const 1080) (i64.const 9))
      (i32.store8 (i32.const 1088) (i32.const 1))
      (i32.store (i32.const 1096) (i32.const 4))
      (call $check (i32.eqz
        (call $poll (i32.const 1024) (i32.const 2048) (i32.const 2) (i32.const 8))))
      (call $check (i32.eq (i32.load (i32.const 8)) (i32.const 1)))
      (call $check (i64.eq (i64.load (i32.const 2048)) (i64.const 9)))
      ;; the clock alone, a millisecond
      (i64.store (i32.const 1056) (i64.const 1000000))
      (call $check (i32.eqz
        (call $poll (i32.const 1024) (i32.const 2048) (i32.const 1) (i32.const 8))))
      (call $check (i64.eq (i64.load (i32.const 2048)) (i64.const 7)))))"#;

fn wasi(folder: &Path) -> Wasi {
    let mut config = Config {
        stdout: Box::new(Arc::new(MemorySink::default())),
        ..Config::default()
    };
    config.preopens.push(Preopen {
        source: Source::Host(folder.to_owned()),
        guest: "/".into(),
        read_only: false,
    });
    Wasi::new(config).unwrap()
}

#[test]
fn snapshot_0_of_wasi_is_served() {
    let module = wat::parse_str(SNAPSHOT_0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let program = engine().load(&module).unwrap();
    let machine = Machine::start(program, wasi(folder.path()), Limits::default()).unwrap();
    assert_eq!(machine.wait(None), Some(Outcome::Exit(0)));
    let folder = tempfile::tempdir().unwrap();
    let plain = engine()
        .run_uninstrumented(&module, Arc::new(wasi(folder.path())), Limits::default())
        .unwrap();
    assert_eq!(plain, Outcome::Exit(0));
}

/// A second run compiles nothing: it uses the cache, or its own code where the cache was tampered
/// with.
#[test]
fn the_plain_module_is_compiled_once() {
    let module = wat::parse_str(r#"(module (func (export "_start")))"#).unwrap();
    let cache = tempfile::tempdir().unwrap();
    let run = || {
        let engine = Engine::with_cache(Options::default(), cache.path()).unwrap();
        let wasi = Arc::new(Wasi::new(Config::default()).unwrap());
        let outcome = engine.run_uninstrumented(&module, wasi, Limits::default());
        assert_eq!(outcome.unwrap(), Outcome::Exit(0));
    };
    let kept = || {
        let files = std::fs::read_dir(cache.path()).unwrap();
        let mut files = files.map(|file| file.unwrap().path());
        let path = files.find(|path| path.extension().is_some_and(|it| it == "plain"));
        path.expect("kept code")
    };
    run();
    let written = || std::fs::metadata(kept()).unwrap().modified().unwrap();
    let first = written();
    run();
    assert_eq!(written(), first);
    let mut bytes = std::fs::read(kept()).unwrap();
    bytes[100] ^= 1;
    std::fs::write(kept(), bytes).unwrap();
    run();
    let bytes = std::fs::read(kept()).unwrap();
    run();
    assert_eq!(std::fs::read(kept()).unwrap(), bytes);
}
