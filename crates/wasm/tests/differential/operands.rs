//! More operands than a block may take, and more locals than a function.

use crate::handwritten::{engine, same};
use keel_wasm::instrument::InstrumentError;
use keel_wasm::runtime::ProgramError;
use keel_wasm::runtime::frame::Value;

/// 1,500 operands of two types below a call within a block, and below an indirect one that
/// gives two results.
#[test]
fn a_block_with_very_many_operands() {
    let count = 1500;
    let push: String = (0..count)
        .map(|at| match at % 2 {
            0 => format!("(i64.extend_i32_u (i32.add (local.get $n) (i32.const {at})))"),
            _ => format!("(f64.convert_i32_u (i32.mul (local.get $n) (i32.const {at})))"),
        })
        .collect();
    let sum: String = (0..count)
        .rev()
        .map(|at| match at % 2 {
            0 => "local.get $i i64.const 3 i64.mul i64.add local.set $i ",
            _ => "local.get $f f64.const 1.5 f64.div f64.add local.set $f ",
        })
        .collect();
    let wat = format!(
        r#"(module
          (type $pair (func (param i32) (result i64 i32)))
          (table funcref (elem $pair))
          (func $spin (param i32) (result i64) (local $k i32)
            (local.set $k (i32.const 3))
            (loop $l (br_if $l (local.tee $k (i32.sub (local.get $k) (i32.const 1)))))
            (i64.extend_i32_u (local.get 0)))
          (func $pair (type $pair) (call $spin (local.get 0)) (i32.const 9))
          (func (export "run") (param $n i32) (result i64 f64)
            (local $i i64) (local $f f64)
            (block
              {push}
              (call $spin (local.get $n)) (local.set $i)
              (call_indirect (type $pair) (local.get $n) (i32.const 0))
              (drop) (local.set $i (i64.add (local.get $i)))
              {sum})
            (local.get $i) (local.get $f)))"#
    );
    same(
        &wat,
        &[("run", &[Value::I32(5)]), ("run", &[Value::I32(77)])],
    );
}

/// Excess is refused with the place in the original module.
#[test]
fn too_many_locals_are_refused_by_their_place() {
    let locals = "(local i32)".repeat(49_990);
    let (push, drop) = ("(i32.const 1)".repeat(100), " drop".repeat(100));
    let wat = format!(
        r#"(module (import "spectest" "print" (func))
          (memory 1) (func (export "grow") (drop (memory.grow (i32.const 1))))
          (func $f (loop (br_if 0 (i32.const 0))))
          (func $many (export "run") {locals} {push} (call $f) {drop}))"#
    );
    let bytes = wat::parse_str(&wat).unwrap();
    let error = engine().load(&bytes).unwrap_err();
    let ProgramError::Instrument(InstrumentError::Unsupported { what, place }) = error else {
        panic!("{error}");
    };
    assert!(what.contains("49990 locals"), "{what}");
    let offset = place
        .strip_prefix("function 3, \"many\", at offset 0x")
        .unwrap();
    let offset = usize::from_str_radix(offset, 16).unwrap();
    assert!(offset > 0 && offset < bytes.len());
}
