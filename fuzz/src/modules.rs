//! Guest modules, and the state of their threads.

use crate::Target;
use keel_wasm::instrument::meta::{self, Meta};
use keel_wasm::instrument::{instrument, read_meta};
use keel_wasm::runtime::frame::{MAGIC, ThreadState};
use std::sync::LazyLock;
use wasm_encoder::{CustomSection, Module};

/// Modules with what instrumentation has to deal with.
const SAMPLES: [&str; 3] = [
    "(module)",
    r#"(module (memory 1) (func (export "_start") (local i32)
        (loop (br_if 0 (i32.lt_u (local.tee 0 (i32.add (local.get 0) (i32.const 1)))
            (i32.const 9))))))"#,
    r#"(module (type $t (func (param i64) (result f64)))
        (import "wasi_snapshot_preview1" "sched_yield" (func $y (result i32)))
        (table 2 funcref) (elem (i32.const 0) $f) (global $g (mut i32) (i32.const 3))
        (func $f (type $t) (drop (call $y)) (f64.const 1))
        (func (export "_start") (drop (call_indirect (type $t) (i64.const 1) (i32.const 0)))))"#,
];

fn samples() -> Vec<Vec<u8>> {
    SAMPLES
        .iter()
        .filter_map(|it| wat::parse_str(it).ok())
        .collect()
}

/// A user's module. What is accepted has metadata that is accepted.
pub(crate) const MODULE: Target = Target {
    name: "module",
    run: |data| {
        let Ok(instrumented) = instrument(data) else {
            return false;
        };
        assert!(
            read_meta(&instrumented).is_ok(),
            "its own metadata is refused"
        );
        true
    },
    seeds: samples,
};

/// The metadata of an instrumented module, which comes from another node.
pub(crate) const METADATA: Target = Target {
    name: "metadata",
    run: |data| {
        let mut module = Module::new();
        module.section(&CustomSection {
            name: meta::SECTION.into(),
            data: data.into(),
        });
        read_meta(&module.finish()).is_ok()
    },
    seeds: || {
        let instrumented = samples().into_iter().filter_map(|it| instrument(&it).ok());
        instrumented.filter_map(|it| own_section(&it)).collect()
    },
};

/// The content of the custom section with the metadata.
fn own_section(module: &[u8]) -> Option<Vec<u8>> {
    let payloads = wasmparser::Parser::new(0).parse_all(module);
    payloads.flatten().find_map(|payload| match payload {
        wasmparser::Payload::CustomSection(section) if section.name() == meta::SECTION => {
            Some(section.data().to_vec())
        }
        _ => None,
    })
}

static META: LazyLock<Option<Meta>> = LazyLock::new(|| {
    let module = samples().pop()?;
    read_meta(&instrument(&module).ok()?).ok()
});

/// The frames of a thread of a module, which come from another node.
pub(crate) const THREAD: Target = Target {
    name: "thread",
    run: |data| {
        let Some(meta) = &*META else {
            return false;
        };
        let module = [7; 32];
        let mut bytes = MAGIC.to_vec();
        bytes.extend(meta::VERSION.to_le_bytes());
        bytes.extend(module);
        bytes.extend(data);
        ThreadState::decode(&bytes, &module, meta).is_ok()
    },
    seeds: Vec::new,
};
