//! Load time of a module without any cache: instrumenting it, which only the node where it starts
//! does, and compiling what a node needs in order to receive a machine: the hot module, and the code
//! for resuming the functions that stand on the stacks of a running program. Compared with plain
//! wasmtime in the same run.

use crate::Options;
use crate::guest::Start;
use crate::table::{Table, median};
use anyhow::{Context, Result};
use keel_wasm::instrument;
use keel_wasm::runtime::{Engine, Limits, Machine};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use wasm_encoder::{
    BlockType, CodeSection, ExportKind, ExportSection, Function, FunctionSection, Instruction as I,
    Module, TypeSection, ValType,
};

const ROUNDS: usize = 3;
/// A program whose stack has the functions of the byte code's interpreter, of its calls, and of a
/// library.
const PYTHON: &str = "
import json, re
def deep(n): return n if n == 0 else deep(n - 1) + sum(map(len, re.findall('a', 'banana' * n)))
while True: json.loads(json.dumps([deep(n) for n in range(30)]), object_hook=dict)
";
/// When stacks are read after the start, and how often.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(300);
const SAMPLES: u32 = 3;

pub(crate) fn bench(options: &Options) -> Result<()> {
    let mut modules = vec![("one function of 1 MiB".to_owned(), huge_function(), None)];
    let python = options.python.iter().zip(&options.python_root);
    let python = python.map(|(path, root)| {
        let start = Start {
            args: ["python", "-c", PYTHON].map(str::to_owned).to_vec(),
            env: Vec::new(),
            dirs: vec![(root.clone(), "/".into())],
        };
        (path, Some(start))
    });
    for (path, start) in python.chain(options.module.iter().map(|path| (path, None))) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let bytes = std::fs::read(path).with_context(|| format!("{}", path.display()))?;
        modules.push((name.into_owned(), bytes, start));
    }
    let mut table = Table::new(&[
        "module",
        "MB",
        "plain s",
        "instrument s",
        "hot code s",
        "functions on stacks",
        "their clones s",
        "ratio",
        "plain code MB",
        "hot code",
    ]);
    for (name, bytes, start) in &modules {
        table.row(measure(name, bytes, start.as_ref())?);
    }
    table.print("Load without a cache (ratio: hot code and clones to plain) and machine code");
    Ok(())
}

fn measure(name: &str, bytes: &[u8], start: Option<&Start>) -> Result<Vec<String>> {
    let (mut plain, mut hot, mut clones) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ratios, mut plain_bytes, mut hot_bytes) = (Vec::new(), 0, 0);
    let begun = Instant::now();
    let instrumented = instrument::instrument(bytes)?;
    let instrument = begun.elapsed().as_secs_f64();
    let points = match start {
        Some(start) => on_stacks(&instrumented, start)?,
        None => BTreeSet::new(),
    };
    let mut functions = 0;
    for _ in 0..ROUNDS {
        let mut config = wasmtime::Config::new();
        config.wasm_threads(true).wasm_tail_call(true);
        let engine =
            wasmtime::Engine::new(&config).map_err(|error| anyhow::anyhow!("{error:#}"))?;
        let begun = Instant::now();
        let module =
            wasmtime::Module::new(&engine, bytes).map_err(|error| anyhow::anyhow!("{error:#}"))?;
        let plain_took = begun.elapsed().as_secs_f64();
        plain_bytes = module.text().len();
        drop(module);

        let engine = Engine::new(keel_wasm::runtime::Options::default())?;
        let instrumented = instrumented.clone();
        let begun = Instant::now();
        let program = engine.load_instrumented(instrumented)?;
        let hot_took = begun.elapsed().as_secs_f64();
        hot_bytes = program.code_bytes();
        let stacks = program.stack_code(&points)?;
        program.prepare_stacks(&stacks)?;
        let took = begun.elapsed().as_secs_f64();
        functions = stacks
            .range(..program.meta().functions.len() as u32)
            .count();
        plain.push(plain_took);
        hot.push(hot_took);
        clones.push(took - hot_took);
        ratios.push(took / plain_took);
    }
    let (plain, hot, ratio) = (median(plain), median(hot), median(ratios));
    eprintln!("{name}: plain {plain:.2} s, hot {hot:.2} s, ratio {ratio:.2}");
    Ok(vec![
        name.to_owned(),
        format!("{:.1}", bytes.len() as f64 / 1e6),
        format!("{plain:.2}"),
        format!("{instrument:.2}"),
        format!("{hot:.2}"),
        match start {
            Some(_) => functions.to_string(),
            None => "-".to_owned(),
        },
        match start {
            Some(_) => format!("{:.2}", median(clones)),
            None => "-".to_owned(),
        },
        format!("{ratio:.2}"),
        format!("{:.1}", plain_bytes as f64 / 1e6),
        format!("{:.2}", hot_bytes as f64 / plain_bytes as f64),
    ])
}

/// The points on the stacks of a program that runs, sampled as a move samples them.
fn on_stacks(instrumented: &[u8], start: &Start) -> Result<BTreeSet<u32>> {
    let engine = Engine::new(keel_wasm::runtime::Options::default())?;
    let program = engine.load_instrumented(instrumented.to_vec())?;
    let (wasi, output) = start.wasi()?;
    let machine = Machine::start(program, wasi, Limits::default())?;
    let mut points = BTreeSet::new();
    for _ in 0..SAMPLES {
        std::thread::sleep(SAMPLE_INTERVAL);
        anyhow::ensure!(
            machine.wait(Some(Duration::ZERO)).is_none(),
            "it ended: {}",
            output.text()
        );
        points.extend(machine.points_on_stacks(Duration::from_secs(1))?);
    }
    machine.stop();
    Ok(points)
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
