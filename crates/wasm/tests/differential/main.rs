//! Random modules on unmodified wasmtime, compared with the same modules instrumented and captured
//! at *every* safepoint, through the serialised form and often into a fresh instance. Results,
//! traps, globals, tables and memories must be equal after each call.
//!
//! `KEEL_DIFFERENTIAL_MODULES` sets how many modules each test makes (more than
//! the default for a long run), `KEEL_DIFFERENTIAL_SEED` the first seed: to
//! repeat a failure, set both (1 module).

mod captured;
mod depth;
mod handwritten;
mod operands;
mod reference;

use captured::Shaken;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use reference::Plain;
use std::collections::BTreeMap;
use wasm_encoder::HeapType;
use wasm_encoder::reencode::{self, Reencode};
use wasm_smith::{Config, Module};

use keel_wasm::runtime::frame::Value;
use keel_wasm::runtime::{Engine, Options};

/// Fuel for calls and loops of a module.
const FUEL: u32 = 3000;
/// Calls of each exported function.
const CALLS: u32 = 2;

/// Observable state of a module between two calls.
#[derive(Debug, PartialEq, Eq, Default)]
struct Observed {
    /// Mutable globals by index.
    globals: Vec<(u32, Value)>,
    /// Size in pages and hash of each memory.
    memories: Vec<(u64, [u8; 32])>,
    /// Tables that code changes, by index.
    tables: Vec<(u32, Vec<u32>)>,
}

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Returned(Vec<Value>),
    Trapped(&'static str),
}

/// Why the comparison of a module ends.
#[derive(Debug)]
enum Unlike {
    /// One of them exhausted its stack: frame sizes differ.
    Depth,
}

#[derive(Debug, Default)]
struct Tally {
    modules: u32,
    refused: BTreeMap<String, u32>,
    unborn: u32,
    calls: u32,
    traps: u32,
    deep: u32,
    captures: u64,
}

fn base() -> Config {
    Config {
        export_everything: true,
        allow_start_export: true,
        exceptions_enabled: false,
        gc_enabled: false,
        compact_imports_enabled: false,
        custom_page_sizes_enabled: false,
        wide_arithmetic_enabled: false,
        threads_enabled: false,
        memory64_enabled: false,
        relaxed_simd_enabled: false,
        simd_enabled: false,
        reference_types_enabled: false,
        max_imports: 0,
        min_funcs: 3,
        max_funcs: 12,
        max_instructions: 150,
        max_memory32_bytes: 1 << 20,
        max_memory64_bytes: 1 << 20,
        memory_max_size_required: true,
        table_max_size_required: true,
        max_table_elements: 200,
        max_type_size: 100,
        ..Config::default()
    }
}

/// The same memory operations as plain traps have, under one name.
fn trap_name(message: &str) -> &'static str {
    const NAMES: [(&str, &str); 14] = [
        ("out of bounds memory access", "memory"),
        ("out of bounds table access", "table"),
        ("undefined element", "table"),
        ("uninitialized element", "null"),
        ("indirect call type mismatch", "type"),
        ("integer divide by zero", "zero"),
        ("integer overflow", "overflow"),
        ("invalid conversion to integer", "conversion"),
        ("unreachable", "unreachable"),
        ("call stack exhausted", "stack"),
        ("unaligned", "alignment"),
        ("misaligned", "alignment"),
        ("wait on non-shared memory", "unshared"),
        ("atomic wait", "unshared"),
    ];
    NAMES
        .iter()
        .find(|(words, _)| message.contains(words))
        .map_or_else(|| panic!("an unknown trap: {message}"), |(_, name)| name)
}

fn argument(random: &mut StdRng, ty: &wasmtime::ValType) -> Value {
    let edge = [0, 1, 2, 7, 65_535, 65_536, u64::MAX, 1 << 31, 1 << 63];
    let bits = match random.random_range(0..3) {
        0 => random.next_u64(),
        1 => random.random_range(0..300),
        _ => edge[random.random_range(0..edge.len())],
    };
    match ty {
        wasmtime::ValType::I32 => Value::I32(bits as u32),
        wasmtime::ValType::I64 => Value::I64(bits),
        wasmtime::ValType::F32 => Value::F32((bits as i64 as f32).to_bits()),
        wasmtime::ValType::F64 => Value::F64((bits as i64 as f64).to_bits()),
        wasmtime::ValType::V128 => {
            Value::V128(u128::from(bits) << 64 | u128::from(random.next_u64()))
        }
        _ => Value::FuncRef(0),
    }
}

/// Compares one module. `Err` only for what ends the comparison in good order.
fn compare(
    bytes: &[u8],
    engine: &Engine,
    random: &mut StdRng,
    tally: &mut Tally,
) -> Result<(), Unlike> {
    let born = match Shaken::new(engine, bytes, random.next_u64()) {
        Ok(born) => born,
        Err(what) => {
            *tally.refused.entry(what).or_default() += 1;
            return Ok(());
        }
    };
    tally.modules += 1;
    let plain = Plain::new(bytes);
    let (mut plain, mut shaken) = match (plain, born) {
        (Ok(plain), Ok(shaken)) => (plain, shaken),
        (Err(left), Err(right)) => {
            assert_eq!(trap_name(&left), trap_name(&right), "instantiation");
            tally.unborn += 1;
            return Ok(());
        }
        (left, right) => panic!(
            "instantiation: plain {:?}, instrumented {:?}",
            left.err(),
            right.err()
        ),
    };
    assert_eq!(
        plain.observe(),
        shaken.observe(&mut plain),
        "after the start"
    );
    for (name, params) in plain.functions() {
        for _ in 0..CALLS {
            let args: Vec<Value> = params.iter().map(|ty| argument(random, ty)).collect();
            let left = plain.call(&name, &args);
            let right = shaken.call(&name, &args);
            tally.calls += 1;
            let deep = |ended: &Ended| *ended == Ended::Trapped("stack");
            if deep(&left) || deep(&right) {
                return Err(Unlike::Depth);
            }
            tally.traps += u32::from(matches!(left, Ended::Trapped(_)));
            assert_eq!(left, right, "{name}({args:?})");
            assert_eq!(
                plain.observe(),
                shaken.observe(&mut plain),
                "after {name}({args:?})"
            );
        }
    }
    tally.captures += shaken.captures;
    Ok(())
}

/// The same module with functions in the place of external references, which
/// machines do not have.
fn functions_only(bytes: &[u8]) -> Vec<u8> {
    struct FunctionsOnly;
    impl Reencode for FunctionsOnly {
        type Error = std::convert::Infallible;

        fn heap_type(
            &mut self,
            ty: wasmparser::HeapType,
        ) -> Result<HeapType, reencode::Error<Self::Error>> {
            Ok(match reencode::utils::heap_type(self, ty)? {
                HeapType::EXTERN => HeapType::FUNC,
                other => other,
            })
        }
    }
    let mut module = wasm_encoder::Module::new();
    let parser = wasmparser::Parser::new(0);
    FunctionsOnly
        .parse_core_module(&mut module, parser, bytes)
        .unwrap();
    module.finish()
}

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text}")),
        Err(_) => default,
    }
}

fn check(modules: u64, config: fn() -> Config) {
    check_with(modules, config, |engine| engine);
}

/// The same, resumed by entry modules alone.
fn check_entries(modules: u64, config: fn() -> Config) {
    check_with(modules, config, Engine::with_only_entries);
}

fn check_with(modules: u64, config: fn() -> Config, engine: fn(Engine) -> Engine) {
    let modules = number("KEEL_DIFFERENTIAL_MODULES", modules);
    let first = number("KEEL_DIFFERENTIAL_SEED", 0);
    let options = Options {
        deterministic: true,
    };
    let engine = engine(Engine::new(options).unwrap());
    let mut tally = Tally::default();
    for seed in first..first + modules {
        let mut random = StdRng::seed_from_u64(seed);
        let mut input = vec![0; 1 << random.random_range(9..14)];
        random.fill_bytes(&mut input);
        let mut input = arbitrary::Unstructured::new(&input);
        let mut config = config();
        // Without, most calls would end in a trap.
        config.disallow_traps = seed % 3 != 0;
        let Ok(mut module) = Module::new(config, &mut input) else {
            continue;
        };
        if module.ensure_termination(FUEL).is_err() {
            continue;
        }
        let bytes = functions_only(&module.to_bytes());
        if reference::waits(&bytes) {
            continue;
        }
        let compared = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            compare(&bytes, &engine, &mut random, &mut tally)
        }));
        match compared {
            Ok(Ok(())) => {}
            Ok(Err(Unlike::Depth)) => tally.deep += 1,
            Err(_) => {
                let path = std::env::temp_dir().join(format!("differential-{seed}.wasm"));
                std::fs::write(&path, &bytes).unwrap();
                panic!("seed {seed}: the module is in {}", path.display());
            }
        }
    }
    println!("{tally:?}");
    if modules >= 100 {
        assert!(u64::from(tally.modules) * 2 > modules, "{tally:?}");
        assert!(tally.captures > modules, "{tally:?}");
        assert!(tally.deep * 20 < tally.modules, "{tally:?}");
    }
}

#[test]
fn core() {
    check(900, base);
}

fn with_references() -> Config {
    Config {
        reference_types_enabled: true,
        max_tables: 4,
        max_element_segments: 8,
        ..base()
    }
}

fn with_large_functions() -> Config {
    Config {
        max_instructions: 3000,
        max_funcs: 4,
        max_values: 30,
        max_nesting_depth: 30,
        simd_enabled: true,
        reference_types_enabled: true,
        ..base()
    }
}

#[test]
fn references_and_tables() {
    check(1500, with_references);
}

#[test]
fn vectors() {
    check(700, || Config {
        simd_enabled: true,
        relaxed_simd_enabled: true,
        ..base()
    });
}

#[test]
fn several_wide_memories() {
    check(900, || Config {
        max_memories: 3,
        min_memories: 1,
        memory64_enabled: true,
        ..base()
    });
}

#[test]
fn shared_memories() {
    check(900, || Config {
        threads_enabled: true,
        min_memories: 1,
        max_memories: 2,
        ..base()
    });
}

#[test]
fn large_functions() {
    check(250, with_large_functions);
}

#[test]
fn functions_resumed_by_entries() {
    check_entries(200, base);
    check_entries(200, with_references);
    check_entries(40, with_large_functions);
}
