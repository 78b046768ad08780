//! Limits of captured threads: any number of references, bounded frames and tables, and the end
//! beyond the bounds.

use crate::handwritten::{Deep, PRINT, StepsAtPrint};
use crate::trap_name;
use keel_wasi::{Config, Wasi};
use keel_wasm::runtime::frame::{FRAME_BYTES_MAX, FRAMES_MAX, ThreadState, Value};
use keel_wasm::runtime::{
    Engine, Fiber, Limits, Machine, Options, Outcome, ProgramError, Run, Stop, TABLE_ENTRIES_MAX,
    TABLES_ENTRIES_MAX, TableBudget,
};
use std::sync::Arc;

/// Twenty copies of one reference in each of 4,000 frames: 80,000 entries.
#[test]
fn copies_of_a_reference_find_room_in_every_frame() {
    let copies = 20;
    let (mut locals, mut sum) = (String::new(), String::from("(call $down (local.get $m))"));
    for at in 0..copies {
        locals += &format!("(local.set $f{at} (ref.func $down))");
        sum = format!("(i32.add {sum} (i32.eqz (ref.is_null (local.get $f{at}))))");
    }
    let declared: String = (0..copies)
        .map(|at| format!("(local $f{at} funcref)"))
        .collect();
    let wat = format!(
        r#"(module {PRINT}
          (elem declare func $down)
          (func $down (export "run") (param $n i32) (result i32)
            (local $m i32) {declared} {locals}
            (if (i32.eqz (local.get $n)) (then (call $print) (return (i32.const 0))))
            (local.set $m (i32.sub (local.get $n) (i32.const 1)))
            {sum}))"#
    );
    let depth = 4000;
    let (values, frames) = Deep::new(&wat).run(depth, 3).unwrap();
    assert_eq!(values, [Value::I32(copies * depth)]);
    assert_eq!(frames, depth as usize + 1);
}

/// Infinite recursion with occasional captures: each capture empties the native stack, so that does
/// not end it. Frames with many values end it by their bytes, those with few by their number.
#[test]
fn captured_recursion_ends_as_one_that_was_not() {
    for (count, each) in [(0, 10_000), (200, 500)] {
        let (mut locals, mut sum) = (String::new(), String::from("(call $down (local.get $m))"));
        for at in 0..count {
            locals += &format!("(local.set $l{at} (i64.const {at}))");
            sum = format!("(i32.add {sum} (i32.wrap_i64 (local.get $l{at})))");
        }
        let declared: String = (0..count).map(|at| format!("(local $l{at} i64)")).collect();
        let wat = format!(
            r#"(module {PRINT}
              (func $down (export "run") (param $n i32) (result i32)
                (local $m i32) {declared} {locals}
                (if (i32.eqz (i32.rem_u (local.get $n) (i32.const {each})))
                  (then (call $print)))
                (local.set $m (i32.sub (local.get $n) (i32.const 1)))
                {sum}))"#
        );
        let mut deep = Deep::new(&wat);
        let mut run = deep.fiber.call("run", &[Value::I32(u32::MAX)]);
        let trap = loop {
            match run {
                Ok(Run::Captured) => {}
                Err(Stop::Trap(trap)) => break trap,
                other => panic!("{other:?}"),
            }
            let state = deep.fiber.state().unwrap();
            let bytes: usize = state.frames.iter().map(|frame| frame.payload.len()).sum();
            assert!(
                state.frames.len() <= FRAMES_MAX && bytes <= FRAME_BYTES_MAX,
                "{} frames, {bytes} bytes",
                state.frames.len()
            );
            deep.thread.signal.step(false);
            run = deep.fiber.resume();
        };
        assert_eq!(trap_name(&trap.message), "stack", "{trap}");
        assert!(trap.backtrace.len() < 1000);
    }
}

/// More than the save area holds, in one capture.
#[test]
fn what_cannot_be_saved_is_an_exhausted_stack() {
    let (mut locals, mut sum) = (String::new(), String::from("(call $down (local.get $m))"));
    for at in 0..1500 {
        locals += &format!("(local.set $l{at} (i64.const {at}))");
        sum = format!("(i32.add {sum} (i32.wrap_i64 (local.get $l{at})))");
    }
    let declared: String = (0..1500).map(|at| format!("(local $l{at} i64)")).collect();
    let wat = format!(
        r#"(module {PRINT}
          (func $down (export "run") (param $n i32) (result i32)
            (local $m i32) {declared} {locals}
            (if (i32.eqz (local.get $n)) (then (call $print) (return (i32.const 0))))
            (local.set $m (i32.sub (local.get $n) (i32.const 1)))
            {sum}))"#
    );
    assert!(Deep::new(&wat).run(500, 1).is_ok());
    match Deep::new(&wat).run(2000, 1) {
        Err(Stop::Trap(trap)) => assert_eq!(trap_name(&trap.message), "stack", "{trap}"),
        other => panic!("{:?}", other.map(|(_, frames)| frames)),
    }
}

/// Sixty tables, of which each grows to a million entries as long as that succeeds: the guest
/// exits with how many did.
fn growing_tables() -> Vec<u8> {
    let tables: String = (0..60)
        .map(|at| format!("(table $t{at} 0 funcref)"))
        .collect();
    let grows: String = (0..60)
        .map(|at| {
            format!(
                "(global.set $done (i32.add (global.get $done) (i32.ne (i32.const -1)
                  (table.grow $t{at} (ref.null func) (i32.const {TABLE_ENTRIES_MAX})))))"
            )
        })
        .collect();
    wat::parse_str(format!(
        r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
          {tables} (memory (export "memory") 1)
          (global $done (mut i32) (i32.const 0))
          (func (export "_start") {grows} (call $exit (global.get $done))))"#
    ))
    .unwrap()
}

#[test]
fn all_tables_of_a_machine_end_at_one_limit() {
    let engine = Engine::new(Options::default()).unwrap();
    let module = growing_tables();
    let most = (TABLES_ENTRIES_MAX / TABLE_ENTRIES_MAX) as u32;
    let wasi = || Wasi::new(Config::default()).unwrap();
    let plain = engine.run_uninstrumented(&module, Arc::new(wasi()), Limits::default());
    assert_eq!(plain.unwrap(), Outcome::Exit(most));
    let program = engine.load(&module).unwrap();
    let machine = Machine::start(program, wasi(), Limits::default()).unwrap();
    // (The directory of functions takes a few entries.)
    assert_eq!(machine.wait(None), Some(Outcome::Exit(most - 1)));
}

#[test]
fn tables_too_large_at_the_beginning_are_refused_by_name() {
    let engine = Engine::new(Options::default()).unwrap();
    let all = format!("(table {TABLE_ENTRIES_MAX} funcref)").repeat(60);
    for tables in [
        &all,
        "(table 1048577 funcref)",
        "(table i64 0xffffffffff funcref)",
    ] {
        let module = format!(r#"(module {tables} (func (export "_start")))"#);
        let module = wat::parse_str(module).unwrap();
        let wasi = Arc::new(Wasi::new(Config::default()).unwrap());
        let errors = [
            engine.load(&module).unwrap_err(),
            engine
                .run_uninstrumented(&module, wasi, Limits::default())
                .unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, ProgramError::Tables { .. }), "{error}");
            assert!(error.to_string().contains("entries"), "{error}");
        }
    }
}

/// The table growth of a thread counts once while it switches to another instance, and not after
/// its end.
#[test]
fn a_captured_thread_keeps_its_share_of_entries() {
    let wat = format!(
        r#"(module {PRINT}
          (table $t 1 funcref)
          (func (export "run") (param $n i32) (result i32 i32 i32)
            (table.grow $t (ref.null func) (i32.const 2000))
            (call $print)
            (loop $l (br_if $l (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
            (table.grow $t (ref.null func) (i32.const 1001))
            (table.grow $t (ref.null func) (i32.const 900))))"#
    );
    let mut deep = Deep::new(&wat);
    let budget = Arc::new(TableBudget::of(3000));
    deep.thread.tables = budget.clone();
    let host = || Arc::new(StepsAtPrint);
    deep.fiber = Fiber::new(deep.program.clone(), host(), deep.thread.clone()).unwrap();
    let (values, _) = deep.run(20, 10).unwrap();
    let results = [1, u32::MAX, 2001].map(Value::I32);
    assert_eq!(values, results);
    drop(deep);
    assert_eq!(budget.used(), 0);
}

/// An impossible state is refused.
#[test]
fn states_with_too_much_are_refused() {
    let wat = format!(
        r#"(module {PRINT} (func $f (export "run") (param i32) (result i32)
          (call $print) (loop $l (br_if $l (local.tee 0 (i32.sub (local.get 0) (i32.const 1)))))
          (local.get 0)))"#
    );
    let mut deep = Deep::new(&wat);
    assert!(matches!(
        deep.fiber.call("run", &[Value::I32(100)]),
        Ok(Run::Captured)
    ));
    let mut state: ThreadState = deep.fiber.state().unwrap();
    let meta = deep.program.meta();
    state.check(meta).unwrap();
    let frame = state.frames[0].clone();
    state.frames = vec![frame; FRAMES_MAX + 1];
    let error = state.check(meta).unwrap_err();
    assert!(error.to_string().contains("frames"), "{error}");
}
