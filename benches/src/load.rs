//! Load time of a module: cold, without any cache.

use crate::Options;
use crate::table::{Table, median};
use anyhow::{Context, Result};
use keel_wasm::runtime::Engine;
use std::time::Instant;
use wasm_encoder::{
    BlockType, CodeSection, ExportKind, ExportSection, Function, FunctionSection, Instruction as I,
    Module, TypeSection, ValType,
};

const ROUNDS: usize = 3;

pub(crate) fn bench(options: &Options) -> Result<()> {
    let mut modules = vec![("one function of 1 MiB".to_owned(), huge_function())];
    for path in options.python.iter().chain(&options.module) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let bytes = std::fs::read(path).with_context(|| format!("{}", path.display()))?;
        modules.push((name.into_owned(), bytes));
    }
    let mut table = Table::new(&[
        "module",
        "MB",
        "plain s",
        "load s",
        "ratio",
        "until it can be resumed s",
        "plain code MB",
        "code",
        "code with clones",
    ]);
    for (name, bytes) in &modules {
        table.row(measure(name, bytes)?);
    }
    table.print("Load (instrument and compile, cold) and machine code");
    Ok(())
}

fn measure(name: &str, bytes: &[u8]) -> Result<Vec<String>> {
    let (mut plain, mut load, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    let (mut plain_bytes, mut start_bytes, mut whole_bytes) = (0, 0, 0);
    for _ in 0..ROUNDS {
        let mut config = wasmtime::Config::new();
        config.wasm_threads(true).wasm_tail_call(true);
        let engine =
            wasmtime::Engine::new(&config).map_err(|error| anyhow::anyhow!("{error:#}"))?;
        let begun = Instant::now();
        let module =
            wasmtime::Module::new(&engine, bytes).map_err(|error| anyhow::anyhow!("{error:#}"))?;
        plain.push(begun.elapsed().as_secs_f64());
        plain_bytes = module.text().len();
        drop(module);

        let engine = Engine::new(keel_wasm::runtime::Options::default())?;
        let begun = Instant::now();
        let program = engine.load(bytes)?;
        load.push(begun.elapsed().as_secs_f64());
        start_bytes = program.code_bytes();
        let begun = Instant::now();
        program.prepare_resume()?;
        whole.push(begun.elapsed().as_secs_f64());
        whole_bytes = program.code_bytes();
    }
    let (plain, load, whole) = (median(plain), median(load), median(whole));
    eprintln!("{name}: plain {plain:.2} s, load {load:.2} s, then {whole:.2} s");
    Ok(vec![
        name.to_owned(),
        format!("{:.1}", bytes.len() as f64 / 1e6),
        format!("{plain:.2}"),
        format!("{load:.2}"),
        format!("{:.2}", load / plain),
        format!("{:.2}", load + whole),
        format!("{:.1}", plain_bytes as f64 / 1e6),
        format!("{:.2}", start_bytes as f64 / plain_bytes as f64),
        format!("{:.2}", whole_bytes as f64 / plain_bytes as f64),
    ])
}

/// A module with one function whose body is 1 MiB: arithmetic on forty locals,
/// branches, loops, calls.
fn huge_function() -> Vec<u8> {
    let mut types = TypeSection::new();
    types.ty().function([ValType::I32], [ValType::I32]);
    types.ty().function([], []);
    let mut functions = FunctionSection::new();
    functions.function(0).function(0).function(1);
    let mut exports = ExportSection::new();
    exports.export("_start", ExportKind::Func, 2);
    let mut small = Function::new([]);
    small
        .instruction(&I::Loop(BlockType::Empty))
        .instruction(&I::LocalGet(0))
        .instruction(&I::I32Const(1))
        .instruction(&I::I32ShrU)
        .instruction(&I::LocalTee(0))
        .instruction(&I::BrIf(0))
        .instruction(&I::End)
        .instruction(&I::LocalGet(0))
        .instruction(&I::End);
    let mut huge = Function::new([(40, ValType::I32)]);
    for at in 0u32.. {
        if huge.byte_len() >= 1 << 20 {
            break;
        }
        let (a, b) = (1 + at % 40, 1 + at * 7 % 40);
        huge.instruction(&I::LocalGet(a))
            .instruction(&I::LocalGet(b))
            .instruction(&I::I32Const(at as i32))
            .instruction(&I::I32Add)
            .instruction(&I::I32Mul)
            .instruction(&I::LocalSet(a));
        match at % 16 {
            3 => {
                huge.instruction(&I::LocalGet(b))
                    .instruction(&I::Call(0))
                    .instruction(&I::LocalSet(b));
            }
            7 => {
                huge.instruction(&I::LocalGet(a))
                    .instruction(&I::If(BlockType::Empty))
                    .instruction(&I::LocalGet(a))
                    .instruction(&I::LocalSet(b))
                    .instruction(&I::End);
            }
            11 => {
                huge.instruction(&I::Loop(BlockType::Empty))
                    .instruction(&I::LocalGet(a))
                    .instruction(&I::I32Const(1))
                    .instruction(&I::I32ShrU)
                    .instruction(&I::LocalTee(a))
                    .instruction(&I::BrIf(0))
                    .instruction(&I::End);
            }
            _ => {}
        }
    }
    huge.instruction(&I::LocalGet(1)).instruction(&I::End);
    let mut start = Function::new([]);
    start
        .instruction(&I::I32Const(5))
        .instruction(&I::Call(1))
        .instruction(&I::Drop)
        .instruction(&I::End);
    let mut code = CodeSection::new();
    code.function(&small).function(&huge).function(&start);
    let mut module = Module::new();
    module
        .section(&types)
        .section(&functions)
        .section(&exports)
        .section(&code);
    module.finish()
}
