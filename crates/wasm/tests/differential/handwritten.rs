//! Handwritten modules for cases that random ones seldom reach: great depth, long chains of tail
//! calls, bulk operations in many chunks, operands under loops.

use crate::captured::Shaken;
use crate::reference::Plain;
use crate::{Ended, trap_name};
use keel_wasi::{Config, Wasi};
use keel_wasm::runtime::frame::{Progress, ThreadState, Value};
use keel_wasm::runtime::{
    Engine, Fiber, Host, HostOutcome, HostThread, Limits, Machine, Options, Program, Run, Signal,
    Stop,
};
use std::sync::Arc;

pub(crate) fn engine() -> Engine {
    Engine::new(Options {
        deterministic: true,
    })
    .unwrap()
}

/// Performs the calls on both, captured at every safepoint, and compares all observable state.
pub(crate) fn same(wat: &str, calls: &[(&str, &[Value])]) {
    let bytes = wat::parse_str(wat).unwrap();
    for seed in 0..4 {
        let mut plain = Plain::new(&bytes).unwrap();
        let engine = match seed % 2 {
            0 => engine(),
            _ => engine().with_only_entries(),
        };
        let mut shaken = Shaken::new(&engine, &bytes, seed).unwrap().unwrap();
        for (name, args) in calls {
            let ended = plain.call(name, args);
            assert_eq!(ended, shaken.call(name, args), "{name}({args:?})");
            assert_eq!(
                plain.observe(),
                shaken.observe(&mut plain),
                "{name}({args:?})"
            );
        }
        assert!(shaken.captures > 0);
    }
}

#[test]
fn branches_and_operands() {
    same(
        r#"(module
          (memory (export "memory") 1)
          (global $g (export "g") (mut i64) (i64.const 7))
          (type $pair (func (param i32 i64) (result i64 i32)))
          (table $t (export "t") 4 funcref)
          (elem (i32.const 0) $swap $twice)
          (func $swap (export "swap") (type $pair) (local.get 1) (local.get 0))
          (func $twice (export "twice") (type $pair)
            (call $swap (i32.add (local.get 0) (local.get 0)) (i64.add (local.get 1) (local.get 1))))
          (func (export "loops") (param $n i32) (result i64 i32)
            (i64.const 3)
            (f64.const 0.5)
            (i32.const 0) (i64.const 1)
            (loop $l (param i32 i64) (result i32 i64)
              (local.set $n (i32.sub (local.get $n) (i32.const 1)))
              (call_indirect (type $pair) (i32.and (local.get $n) (i32.const 1)))
              (i32.add (i32.const 5))
              (call $swap (i64.extend_i32_u))
              (i64.add) (global.get $g) (i64.xor) (global.set $g)
              (i32.const 2) (global.get $g)
              (br_if $l (i32.gt_s (local.get $n) (i32.const 0))))
            (i64.add (i64.extend_i32_u (i32.const 9)))
            (global.set $g)
            (drop) (i64.trunc_sat_f64_s) (i64.add)
            (i32.wrap_i64 (global.get $g)))
          (func (export "table") (param $n i32) (result i32)
            (local $sum i32) (local $f funcref)
            (loop $l
              (block $d (block $c (block $b (block $a
                (br_table $a $b $c $l $d (i32.rem_u (local.tee $n (i32.sub (local.get $n) (i32.const 1))) (i32.const 7))))
                (local.set $f (table.get $t (i32.const 1))) (br $d))
                (table.set $t (i32.const 3) (local.get $f)) (br $d))
                (local.set $sum (i32.add (local.get $sum) (ref.is_null (table.get $t (i32.const 3))))))
              (local.set $sum (i32.add (local.get $sum) (local.get $n)))
              (br_if $l (i32.gt_s (local.get $n) (i32.const 0))))
            (local.get $sum))
          (func (export "if") (param $n i32) (result v128)
            (local $v v128)
            (loop $l
              (local.set $v
                (i32x4.add (local.get $v)
                  (if (result v128) (i32.and (local.get $n) (i32.const 1))
                    (then (loop (result v128) (v128.const i32x4 1 2 3 4)))
                    (else (i32x4.splat (memory.grow (i32.const 0)))))))
              (br_if $l (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
            (local.get $v)))"#
            .replace("(call $swap (i64.extend_i32_u))", "(i64.extend_i32_u)")
            .as_str(),
        &[
            ("loops", &[Value::I32(9)]),
            ("table", &[Value::I32(100)]),
            ("if", &[Value::I32(40)]),
            ("loops", &[Value::I32(1)]),
        ],
    );
}

/// Bulk operations are cut in chunks of 64 KiB; each cut is a safepoint.
fn bulk(index: &str) {
    let wat = r#"(module
      (memory (export "memory") INDEX 16 20)
      (memory (export "other") 8 8)
      (data $d "DATA")
      (func (export "seed")
        (local $i INDEX)
        (loop $l
          (i64.store (local.get $i) (i64.mul (WIDEN (local.get $i)) (i64.const 0x9e3779b97f4a7c15)))
          (br_if $l (INDEX.lt_u (local.tee $i (INDEX.add (local.get $i) (INDEX.const 8))) (INDEX.const 1048576)))))
      (func (export "copy") (param INDEX INDEX INDEX) (memory.copy (local.get 0) (local.get 1) (local.get 2)))
      (func (export "across") (param INDEX i32 i32) (memory.copy 0 1 (local.get 0) (local.get 1) (local.get 2)))
      (func (export "back") (param i32 INDEX i32) (memory.copy 1 0 (local.get 0) (local.get 1) (local.get 2)))
      (func (export "fill") (param INDEX i32 INDEX) (memory.fill (local.get 0) (local.get 1) (local.get 2)))
      (func (export "init") (param INDEX i32 i32) (memory.init $d (local.get 0) (local.get 1) (local.get 2)))
      (func (export "drop") (data.drop $d)))"#
        .replace("INDEX", index)
        .replace(
            "WIDEN",
            if index == "i64" { "i64.add (i64.const 0)" } else { "i64.extend_i32_u" },
        )
        .replace("DATA", &"0123456789abcdefghijklmnopq".repeat(10_000));
    let at = |value: u64| match index {
        "i64" => Value::I64(value),
        _ => Value::I32(value as u32),
    };
    let n = Value::I32;
    let kib = |value: u64| at(value << 10);
    same(
        &wat,
        &[
            ("seed", &[]),
            // Overlapping both ways, near and far, and exact multiples.
            ("copy", &[kib(10), kib(11), kib(500)]),
            ("copy", &[kib(11), kib(10), kib(500)]),
            ("copy", &[at(1), at(0), kib(256)]),
            ("copy", &[at(0), at(1), kib(256)]),
            ("copy", &[kib(100), kib(300), at((256 << 10) + 1)]),
            ("copy", &[kib(300), kib(100), at((256 << 10) - 1)]),
            ("copy", &[kib(64), kib(64), kib(128)]),
            ("copy", &[kib(0), kib(512), kib(64)]),
            ("back", &[n(3), kib(17), n(500 << 10)]),
            ("across", &[kib(400), n(5), n(300 << 10)]),
            ("fill", &[at(77), n(0x1234), kib(333)]),
            ("init", &[kib(200), n(5), n(260_000)]),
            // Outside: before any effect.
            ("copy", &[kib(900), kib(0), kib(200)]),
            ("copy", &[kib(0), kib(900), kib(200)]),
            ("across", &[kib(0), n(400 << 10), n(200 << 10)]),
            ("back", &[n(400 << 10), kib(0), n(200 << 10)]),
            ("fill", &[kib(900), n(1), kib(125)]),
            ("init", &[kib(0), n(100_000), n(200_000)]),
            ("copy", &[at(u64::MAX), at(u64::MAX), at(u64::MAX)]),
            ("fill", &[kib(1024), n(1), at(0)]),
            ("fill", &[at((1 << 20) + 1), n(1), at(0)]),
            ("drop", &[]),
            ("init", &[kib(0), n(0), n(70_000)]),
            ("init", &[kib(0), n(0), n(0)]),
        ],
    );
}

#[test]
fn bulk_operations_on_32_bit_memories() {
    bulk("i32");
}

#[test]
fn bulk_operations_on_64_bit_memories() {
    bulk("i64");
}

/// A fiber whose guest marks, by `print`, the point from which it is captured.
pub(crate) struct Deep {
    pub(crate) program: Arc<Program>,
    pub(crate) thread: HostThread,
    pub(crate) fiber: Fiber,
}

/// Starts stepping when the guest prints.
pub(crate) struct StepsAtPrint;

impl Host for StepsAtPrint {
    fn call(&self, _: u32, _: &[u64], _: &mut Progress, thread: &HostThread) -> HostOutcome {
        thread.signal.step(true);
        HostOutcome::Done(Vec::new())
    }
}

impl Deep {
    pub(crate) fn new(wat: &str) -> Self {
        let program = engine().load(&wat::parse_str(wat).unwrap()).unwrap();
        let wasi = Wasi::new(Config::default()).unwrap();
        let machine = Machine::idle(program.clone(), wasi, Limits::default()).unwrap();
        let thread = HostThread {
            tid: 0,
            signal: Arc::new(Signal::new().unwrap()),
            memories: machine.memories().clone(),
            tables: Arc::default(),
        };
        let fiber = Fiber::new(program.clone(), Arc::new(StepsAtPrint), thread.clone()).unwrap();
        Deep {
            program,
            thread,
            fiber,
        }
    }

    /// Calls `run`; captures it up to `captures` times, each time into a fresh
    /// instance. Returns the results and the most frames seen.
    pub(crate) fn run(&mut self, arg: u32, captures: u32) -> Result<(Vec<Value>, usize), Stop> {
        let mut run = self.fiber.call("run", &[Value::I32(arg)])?;
        let (mut count, mut frames) = (0, 0);
        loop {
            if let Run::Finished(values) = run {
                assert!(count > 0, "it was never captured");
                return Ok((values, frames));
            }
            count += 1;
            let state = self.fiber.state()?;
            frames = frames.max(state.frames.len());
            let hash = self.program.hash();
            let bytes = state.encode(hash);
            let again = ThreadState::decode(&bytes, hash, self.program.meta()).unwrap();
            if count == captures {
                self.thread.signal.step(false);
            }
            let host = Arc::new(StepsAtPrint);
            self.fiber = Fiber::new(self.program.clone(), host, self.thread.clone()).unwrap();
            self.fiber.load(again)?;
            run = self.fiber.resume()?;
        }
    }
}

pub(crate) const PRINT: &str = r#"(import "spectest" "print" (func $print))"#;

#[test]
fn deep_recursion_is_captured_at_its_bottom() {
    let wat = format!(
        r#"(module {PRINT}
          (func $down (export "run") (param $n i32) (result i32)
            (local $a i64) (local $v v128)
            (local.set $a (i64.mul (i64.extend_i32_u (local.get $n)) (i64.const 3)))
            (local.set $v (i64x2.splat (local.get $a)))
            (if (i32.eqz (local.get $n)) (then (call $print) (return (i32.const 1))))
            (i32.add
              (call $down (i32.sub (local.get $n) (i32.const 1)))
              (i32.add (i32.wrap_i64 (local.get $a))
                (i32.wrap_i64 (i64x2.extract_lane 1 (local.get $v)))))))"#
    );
    let depth = 5000_u32;
    let (values, frames) = Deep::new(&wat).run(depth, 100).unwrap();
    let sum = (1..=u64::from(depth)).map(|n| 6 * n).sum::<u64>() + 1;
    assert_eq!(values, [Value::I32(sum as u32)]);
    assert_eq!(frames, depth as usize + 1);
}

/// The deepest recursion that code reaches without a capture can be captured.
#[test]
fn the_deepest_recursion_is_captured() {
    let wat = format!(
        r#"(module {PRINT}
          (func $down (export "run") (param $n i32) (result i32)
            (if (i32.eqz (local.get $n)) (then (call $print) (return (i32.const 0))))
            (i32.add (call $down (i32.sub (local.get $n) (i32.const 1))) (i32.const 1))))"#
    );
    let reaches = |depth: u32| match Deep::new(&wat).run(depth, 3) {
        Ok((values, _)) => {
            assert_eq!(values, [Value::I32(depth)]);
            true
        }
        Err(Stop::Trap(trap)) => {
            assert_eq!(trap_name(&trap.message), "stack", "{depth}: {trap}");
            false
        }
        Err(other) => panic!("{other:?}"),
    };
    let (mut below, mut above) = (1000, 1 << 20);
    assert!(reaches(below) && !reaches(above));
    while above - below > 50 {
        let middle = (below + above) / 2;
        *(if reaches(middle) {
            &mut below
        } else {
            &mut above
        }) = middle;
    }
    println!("{below} frames");
}

/// Many values per frame that the engine need not keep on its stack.
#[test]
fn deep_recursion_with_many_locals() {
    let count = 900;
    let mut locals = String::new();
    let mut sum = String::from("(call $down (i32.sub (local.get $n) (i32.const 1)))");
    for at in 0..count {
        locals += &format!("(local.set $l{at} (i64.const {at}))");
        sum = format!("(i32.add {sum} (i32.wrap_i64 (local.get $l{at})))");
    }
    let declared: String = (0..count).map(|at| format!("(local $l{at} i64)")).collect();
    let wat = format!(
        r#"(module {PRINT}
          (func $down (export "run") (param $n i32) (result i32)
            {declared} {locals}
            (if (i32.eqz (local.get $n)) (then (call $print) (return (i32.const 0))))
            {sum}))"#
    );
    for depth in [1000_u32, 30_000, 60_000] {
        match Deep::new(&wat).run(depth, 1) {
            Ok((values, frames)) => {
                let each: u32 = (0..count).sum();
                assert_eq!(values, [Value::I32(each.wrapping_mul(depth))]);
                assert_eq!(frames, depth as usize + 1);
            }
            Err(Stop::Trap(trap)) => {
                assert_eq!(trap_name(&trap.message), "stack", "{depth}: {trap}")
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

/// References in every frame: more than fit the references table at once.
#[test]
fn deep_recursion_with_references() {
    let wat = format!(
        r#"(module {PRINT}
          (table 1 funcref)
          (elem declare func $down)
          (func $down (export "run") (param $n i32) (result i32)
            (local $f funcref) (local $g funcref) (local $h funcref)
            (local.set $f (ref.func $down))
            (if (i32.and (local.get $n) (i32.const 1)) (then (local.set $g (local.get $f))))
            (local.set $h (table.get (i32.const 0)))
            (if (i32.eqz (local.get $n)) (then (call $print) (return (i32.const 0))))
            (i32.add (call $down (i32.sub (local.get $n) (i32.const 1)))
              (i32.add (ref.is_null (local.get $f))
                (i32.add (ref.is_null (local.get $g)) (ref.is_null (local.get $h)))))))"#
    );
    for depth in [1000_u32, 12_000, 20_000, 25_000, 30_000] {
        match Deep::new(&wat).run(depth, 1) {
            Ok((values, _)) => assert_eq!(values, [Value::I32(depth + depth / 2)]),
            Err(Stop::Trap(trap)) => {
                assert_eq!(trap_name(&trap.message), "stack", "{depth}: {trap}")
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

/// Chains of tail calls keep one frame, however they are captured.
#[test]
fn long_chains_of_tail_calls() {
    let wat = format!(
        r#"(module {PRINT}
          (type $step (func (param i32 i64) (result i64)))
          (table funcref (elem $even $odd $plain))
          (func $plain (type $step) (i64.add (local.get 1) (i64.const 1)))
          (func $even (type $step)
            (if (i32.eqz (local.get 0)) (then (return_call $plain (local.get 0) (local.get 1))))
            (return_call_indirect (type $step)
              (i32.sub (local.get 0) (i32.const 1)) (i64.add (local.get 1) (i64.const 2)) (i32.const 1)))
          (func $odd (type $step)
            (return_call $even
              (i32.sub (local.get 0) (i32.const 1)) (i64.mul (local.get 1) (i64.const 3))))
          (func (export "run") (param $n i32) (result i64)
            (call $print)
            (call $even (local.get $n) (i64.const 1))))"#
    );
    let steps = 2_000_000_u32;
    let (values, frames) = Deep::new(&wat).run(steps, 3000).unwrap();
    let mut wanted = 1_u64;
    for _ in 0..steps / 2 {
        wanted = wanted.wrapping_add(2).wrapping_mul(3);
    }
    assert_eq!(values, [Value::I64(wanted.wrapping_add(1))]);
    assert!(frames <= 2, "{frames}");
}

/// Consecutive and nested loops, with operands below them and in the arms of `if`s: a resumed
/// thread continues in the loop's own version, and from one to the next. Also with so many that
/// each version contains only its own code, or the clone contains the loops.
#[test]
fn loops_beside_and_within_loops() {
    let beside = |count: u32| -> String {
        let one = |at: u32| {
            format!(
                "(local.set $i (i32.const {}))
                 (if (i32.and (local.get $n) (i32.const 1))
                   (then (loop $l
                     (local.set $sum (i32.add (i32.mul (local.get $sum) (i32.const 3)) (local.get $i)))
                     (br_if $l (local.tee $i (i32.sub (local.get $i) (i32.const 1))))))
                   (else (loop $l
                     (local.set $sum (i32.xor (local.get $sum) (call $f (local.get $i))))
                     (br_if $l (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))))",
                2 + at % 3
            )
        };
        (0..count).map(one).collect()
    };
    let within = |depth: u32| -> String {
        let begin = |at: u32| {
            format!(
                "(local.set $c{at} (i32.const 2))
                 (local.set $sum (i32.add (local.get $sum) (block $b{at} (result i32)
                   (i32.const {at})
                   (loop $l{at} (param i32) (result i32)
                     (i32.add (i32.const 1))"
            )
        };
        let end = |at: u32| {
            format!(
                "(local.set $sum (i32.add (local.get $sum) (i32.const {at})))
                 (br_if $b{at} (i32.eq (i32.rem_u (local.get $sum) (i32.const 97)) (i32.const 5)))
                 (br_if $l{at} (local.tee $c{at} (i32.sub (local.get $c{at}) (i32.const 1))))
                 ))))"
            )
        };
        let begins: String = (0..depth).map(begin).collect();
        begins + &(0..depth).rev().map(end).collect::<String>()
    };
    for (count, depth) in [(3, 3), (40, 6), (400, 9)] {
        let counters: String = (0..depth).map(|at| format!("(local $c{at} i32)")).collect();
        let wat = format!(
            r#"(module
              (func $f (param i32) (result i32)
                (if (i32.eqz (local.get 0)) (then (return (i32.const 7))))
                (i32.add (i32.const 1) (call $f (i32.sub (local.get 0) (i32.const 1)))))
              (func (export "run") (param $n i32) (result i32)
                (local $i i32) (local $sum i32) {counters}
                (i32.add (local.get $n) (block (result i32)
                  (local.set $sum (local.get $n))
                  {} {}
                  (local.get $sum)))))"#,
            beside(count),
            within(depth)
        );
        same(
            &wat,
            &[("run", &[Value::I32(1)]), ("run", &[Value::I32(6)])],
        );
    }
    // The code size of nested loops is bounded.
    let deep = |depth: u32| {
        let counters: String = (0..depth).map(|at| format!("(local $c{at} i32)")).collect();
        let wat = format!(
            r#"(module (func (export "run") (param $n i32) (result i32)
                (local $sum i32) {counters} {} (local.get $sum)))"#,
            within(depth)
        );
        let bytes = wat::parse_str(&wat).unwrap();
        let whole = keel_wasm::instrument::instrument(&bytes).unwrap();
        (bytes.len(), whole.len())
    };
    let (bytes, whole) = deep(100);
    assert!(whole < 200 * bytes + (1 << 20), "{whole} of {bytes}");
}

/// The leftovers of a trapped call do not affect the next one.
#[test]
fn a_trap_leaves_nothing_behind() {
    same(
        r#"(module
          (global $g (export "g") (mut i32) (i32.const 0))
          (func $inner (param i32) (result i32)
            (loop $l
              (global.set $g (i32.add (global.get $g) (i32.const 1)))
              (br_if $l (i32.lt_u (global.get $g) (i32.const 50))))
            (i32.div_u (i32.const 100) (local.get 0)))
          (func $outer (export "run") (param i32) (result i32)
            (global.set $g (i32.const 0))
            (i32.add (call $inner (local.get 0)) (i32.const 1))))"#,
        &[
            ("run", &[Value::I32(0)]),
            ("run", &[Value::I32(5)]),
            ("run", &[Value::I32(0)]),
            ("run", &[Value::I32(7)]),
        ],
    );
}

/// As [`bulk`], on tables: chunks of 8192 entries.
fn bulk_on_tables(index: &str) {
    let items = vec!["$f $g $h"; 7000].join(" ");
    let wat = format!(
        r#"(module
          (table $t (export "t") {index} 60000 funcref)
          (table $u (export "u") {index} 30000 funcref)
          (elem $e func {items})
          (func $f (export "f")) (func $g (export "g")) (func $h (export "h"))
          (func $pick (param i32) (result funcref)
            (if (result funcref) (local.get 0) (then (ref.func $g)) (else (ref.null func))))
          (func (export "fill") (param {index} i32 {index})
            (table.fill $t (local.get 0) (call $pick (local.get 1)) (local.get 2)))
          (func (export "copy") (param {index} {index} {index})
            (table.copy $t $t (local.get 0) (local.get 1) (local.get 2)))
          (func (export "across") (param {index} {index} {index})
            (table.copy $u $t (local.get 0) (local.get 1) (local.get 2)))
          (func (export "init") (param {index} i32 i32)
            (table.init $t $e (local.get 0) (local.get 1) (local.get 2)))
          (func (export "drop") (elem.drop $e)))"#
    );
    let at = |value: i64| match index {
        "i64" => Value::I64(value as u64),
        _ => Value::I32(value as u32),
    };
    let word = |value: u32| Value::I32(value);
    let three = |a, b, c| vec![at(a), at(b), at(c)];
    let filled = |a, value, c| vec![at(a), word(value), at(c)];
    let calls: Vec<(&str, Vec<Value>)> = vec![
        ("init", vec![at(100), word(7), word(20_900)]),
        ("fill", filled(40_000, 1, 20_000)),
        ("fill", filled(40_001, 1, 20_000)),
        ("fill", filled(45_000, 0, 8192)),
        ("fill", filled(-1, 0, 8192)),
        ("copy", three(5000, 100, 30_000)),
        ("copy", three(100, 9000, 30_000)),
        ("copy", three(40_000, 30_000, 20_001)),
        ("copy", three(3, 3, 50_000)),
        ("across", three(10, 4000, 29_990)),
        ("across", three(11, 4000, 29_990)),
        ("init", vec![at(0), word(2), word(21_000)]),
        ("init", vec![at(0), word(0), word(21_000)]),
        ("drop", vec![]),
        ("init", vec![at(0), word(0), word(9000)]),
        ("init", vec![at(0), word(0), word(0)]),
    ];
    let calls: Vec<(&str, &[Value])> = calls
        .iter()
        .map(|(name, args)| (*name, &args[..]))
        .collect();
    same(&wat, &calls);
}

#[test]
fn bulk_operations_on_32_bit_tables() {
    bulk_on_tables("i32");
}

#[test]
fn bulk_operations_on_64_bit_tables() {
    bulk_on_tables("i64");
}

/// A table cannot exceed the host's limit.
#[test]
fn a_table_ends_at_its_limit() {
    let wat = r#"(module
      (table $t (export "t") 1 funcref)
      (func (export "grow") (param i32) (result i32)
        (loop) (table.grow $t (ref.null func) (local.get 0))))"#;
    let bytes = wat::parse_str(wat).unwrap();
    let mut shaken = Shaken::new(&engine(), &bytes, 0).unwrap().unwrap();
    let mut grow = |by: u32| shaken.call("grow", &[Value::I32(by)]);
    let failed = Ended::Returned(vec![Value::I32(u32::MAX)]);
    assert_eq!(grow(1 << 30), failed);
    assert_eq!(grow(1000), Ended::Returned(vec![Value::I32(1)]));
    assert_eq!(grow(1 << 20), failed);
    let bytes = wat::parse_str("(module (table 5000000 funcref))").unwrap();
    assert!(Shaken::new(&engine(), &bytes, 0).is_err());
}

/// `memory.atomic.notify` finds a wrong address as the engine does: alignment
/// first.
#[test]
fn misaligned_and_outside() {
    let ended = |name: &str, at: u32| {
        let bytes = wat::parse_str(
            r#"(module (memory (export "memory") 1 1 shared)
              (func (export "notify") (param i32) (result i32)
                (loop) (memory.atomic.notify offset=2 (local.get 0) (i32.const 1)))
              (func (export "wait") (param i32) (result i32)
                (loop) (memory.atomic.wait64 offset=4 (local.get 0) (i64.const 1) (i64.const 0))))"#,
        )
        .unwrap();
        let mut plain = Plain::new(&bytes).unwrap();
        let mut shaken = Shaken::new(&engine(), &bytes, 0).unwrap().unwrap();
        let (left, right) = (
            plain.call(name, &[Value::I32(at)]),
            shaken.call(name, &[Value::I32(at)]),
        );
        assert_eq!(left, right, "{name}({at})");
        left
    };
    for at in [
        0,
        1,
        2,
        3,
        4,
        65_530,
        65_532,
        65_534,
        65_535,
        u32::MAX,
        u32::MAX - 1,
    ] {
        ended("notify", at);
        ended("wait", at);
    }
    assert_eq!(ended("notify", 65_535), Ended::Trapped("alignment"));
}
