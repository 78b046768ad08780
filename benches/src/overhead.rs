//! Run time of instrumented programs compared with plain wasmtime and Binaryen's Asyncify. Guests
//! measure their own time, so compiling does not count; the variants run alternately, and ratios
//! are medians over rounds.

use crate::Options;
use crate::guest::{self, Start};
use crate::polls::with_polls;
use crate::table::{Table, geomean, median};
use anyhow::{Context, Result, ensure};
use keel_wasm::runtime::{Engine, Program};
use std::path::Path;
use std::sync::Arc;

/// Names of the kernels, and a scale at which each takes about 0.3 s.
const KERNELS: &[(&str, u32)] = &[
    ("fib", 400),
    ("hashmap", 400),
    ("indirect", 240),
    ("interpreter", 400),
    ("json", 500),
    ("lz", 300),
    ("mandelbrot", 400),
    ("matmul", 120),
    ("nbody", 300),
    ("nqueens", 12000),
    ("quicksort", 80),
    ("sha256", 200),
    ("sieve", 250),
    ("spectral", 2500),
    ("strings", 1000),
];

/// WebAssembly features that `wasm-opt` may use and keep.
const FEATURES: &[&str] = &[
    "bulk-memory",
    "bulk-memory-opt",
    "multivalue",
    "mutable-globals",
    "nontrapping-float-to-int",
    "reference-types",
    "sign-ext",
];

/// Calls, dictionaries, sorting, strings, and the native code that they use.
const PYTHON: &str = r#"
import time, hashlib, json
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
begun = time.perf_counter_ns()
total = fib(22)
words = {}
for i in range(60000): words[i * 7919 % 5003] = words.get(i * 31 % 5003, 0) + i
rows = sorted(({"id": i * 37 % 1009, "name": str(i)} for i in range(6000)), key=lambda row: row["id"])
for _ in range(4): total += len(json.dumps(json.loads(json.dumps(rows))))
h = b"x"
for i in range(8000): h = hashlib.sha256(h).digest()
s = "".join(chr(97 + i % 26) for i in range(60000))
total += sum(s.count(c) for c in "abcdef") + len(s.replace("abc", "xy").split("z"))
print(time.perf_counter_ns() - begun, total + sum(words.values()) + h[0])
"#;

struct Variants {
    name: String,
    module: Vec<u8>,
    program: Arc<Program>,
    asyncify: Option<Vec<u8>>,
    start: Start,
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    let engine = Engine::new(keel_wasm::runtime::Options::default())?;
    let mut table = Table::new(&["program", "plain ms", "evenkeel", "asyncify"]);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for (name, scale) in KERNELS {
        if options
            .only
            .as_ref()
            .is_some_and(|only| !name.contains(only.as_str()))
        {
            continue;
        }
        let path = options.kernels.join(format!("{name}.wasm"));
        let start = Start::args(&[name, &scale.to_string()]);
        let variants = Variants::new(&engine, name, &path, options.wasm_opt.as_deref(), start)?;
        let ratios = measure(&variants, options.rounds, &mut table)?;
        ours.push(ratios.0);
        theirs.extend(ratios.1);
    }
    if let (Some(path), Some(root)) = (&options.python, &options.python_root) {
        let start = Start {
            args: ["python", "-c", PYTHON].map(str::to_owned).to_vec(),
            env: vec![("PYTHONHASHSEED".into(), "0".into())],
            dirs: vec![(root.clone(), "/".into())],
        };
        let wasm_opt = options
            .wasm_opt
            .as_deref()
            .filter(|_| options.python_asyncify);
        let variants = Variants::new(&engine, "CPython 3.11", path, wasm_opt, start)?;
        let ratios = measure(&variants, options.rounds.min(5), &mut table)?;
        ours.push(ratios.0);
        theirs.extend(ratios.1);
    }
    let mut summary = |name: &str, of: &dyn Fn(&[f64]) -> f64| {
        let cell = |ratios: &[f64]| match ratios {
            [] => "-".to_owned(),
            _ => format!("{:.3}", of(ratios)),
        };
        table.row(vec![name.into(), String::new(), cell(&ours), cell(&theirs)]);
    };
    summary("**geomean**", &geomean);
    summary("**worst**", &|ratios| {
        ratios.iter().copied().fold(0.0, f64::max)
    });
    table.print("Run time, as a ratio to plain wasmtime");
    Ok(())
}

impl Variants {
    fn new(
        engine: &Engine,
        name: &str,
        path: &Path,
        wasm_opt: Option<&Path>,
        start: Start,
    ) -> Result<Self> {
        let module = std::fs::read(path).with_context(|| format!("{}", path.display()))?;
        Ok(Variants {
            name: name.to_owned(),
            program: engine.load(&module)?,
            asyncify: wasm_opt.map(|tool| asyncify(tool, &module)).transpose()?,
            module,
            start,
        })
    }
}

/// The module after `wasm-opt --asyncify -O3`, with polls at the same places as ours, since most
/// loops could not be left otherwise.
fn asyncify(tool: &Path, module: &[u8]) -> Result<Vec<u8>> {
    let polled = tempfile::NamedTempFile::new()?;
    std::fs::write(polled.path(), with_polls(module)?)?;
    let out = tempfile::NamedTempFile::new()?;
    let status = std::process::Command::new(tool)
        .args(["--asyncify", "-O3"])
        .args(FEATURES.iter().map(|feature| format!("--enable-{feature}")))
        .arg(polled.path())
        .arg("-o")
        .arg(out.path())
        .stderr(std::process::Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", tool.display()))?;
    ensure!(status.success(), "{} failed: {status}", tool.display());
    Ok(std::fs::read(out.path())?)
}

/// Adds a row; returns the ratios of ours and of Asyncify.
fn measure(variants: &Variants, rounds: usize, table: &mut Table) -> Result<(f64, Option<f64>)> {
    let mut times = Vec::new();
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    let mut sums = Vec::new();
    let mut note = |text: String| -> Result<f64> {
        let mut words = text.split_whitespace();
        let took: f64 = words.next().context("it printed nothing")?.parse()?;
        sums.push(words.next().unwrap_or_default().to_owned());
        Ok(took)
    };
    for _ in 0..rounds {
        let plain = note(guest::plain(&variants.module, &variants.start)?)?;
        times.push(plain / 1e6);
        ours.push(note(guest::machine(&variants.program, &variants.start)?)? / plain);
        if let Some(module) = &variants.asyncify {
            theirs.push(note(guest::plain(module, &variants.start)?)? / plain);
        }
    }
    ensure!(
        sums.iter().all(|sum| *sum == sums[0]),
        "{}: the variants disagree: {sums:?}",
        variants.name
    );
    let (time, ours) = (median(times), median(ours));
    let theirs = (!theirs.is_empty()).then(|| median(theirs));
    table.row(vec![
        variants.name.clone(),
        format!("{time:.0}"),
        format!("{ours:.3}"),
        theirs.map_or("-".into(), |ratio| format!("{ratio:.3}")),
    ]);
    eprintln!(
        "{}: plain {time:.0} ms, evenkeel {ours:.3}, asyncify {theirs:?}",
        variants.name
    );
    Ok((ours, theirs))
}
