//! Progress of compilation: functions that Cranelift has finished, as reported to its profiler, out
//! of those of the module.
//!
//! Wasmtime has no hook for this. Cranelift reports the start and end of its passes to a per-thread
//! profiler; the profiler here reads no clock and only counts, which is negligible beside the
//! compilation of a function (milliseconds).

use cranelift_codegen::timing::{Pass, Profiler, set_thread_profiler};
use std::any::Any;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, Once};
use std::time::{Duration, Instant};

/// Functions that this process compiled.
static FINISHED: AtomicU64 = AtomicU64::new(0);
static UNDER_WAY: Mutex<Option<UnderWay>> = Mutex::new(None);
static PROFILERS: Once = Once::new();

/// Modules being compiled, from the start of the first until none is.
struct UnderWay {
    modules: u32,
    functions: u64,
    finished_before: u64,
    begun: Instant,
}

fn under_way() -> MutexGuard<'static, Option<UnderWay>> {
    UNDER_WAY.lock().unwrap_or_else(|error| error.into_inner())
}

/// Progress of all modules that this process compiles concurrently: a worker compiles one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompileProgress {
    /// Compiled functions, at most `functions`.
    pub done: u64,
    /// Functions that there are.
    pub functions: u64,
    /// Since compiling began.
    pub elapsed: Duration,
}

impl CompileProgress {
    /// The current progress; `None` while nothing is compiled.
    pub fn now() -> Option<Self> {
        let under_way = under_way();
        let it = under_way.as_ref()?;
        let finished = FINISHED.load(Ordering::Relaxed);
        Some(CompileProgress {
            done: (finished - it.finished_before).min(it.functions),
            functions: it.functions,
            elapsed: it.begun.elapsed(),
        })
    }

    /// Percentage of compiled functions, 0 to 100.
    pub fn percent(&self) -> u8 {
        let percent = (self.done * 100).checked_div(self.functions);
        percent.map_or(100, |percent| percent.min(100) as u8)
    }
}

/// Enables counting during its lifetime.
pub(super) struct Compiling(());

impl Compiling {
    /// For a module with this number of functions.
    pub(super) fn begin(functions: u64) -> Self {
        PROFILERS.call_once(|| {
            rayon::broadcast(|_| {
                set_thread_profiler(Box::<Counter>::default());
            });
        });
        // (Without parallel work, compilation runs on this thread.)
        set_thread_profiler(Box::<Counter>::default());
        let mut under_way = under_way();
        let it = under_way.get_or_insert_with(|| UnderWay {
            modules: 0,
            functions: 0,
            finished_before: FINISHED.load(Ordering::Relaxed),
            begun: Instant::now(),
        });
        it.modules += 1;
        it.functions += functions;
        Compiling(())
    }
}

impl Drop for Compiling {
    fn drop(&mut self) {
        let mut under_way = under_way();
        if let Some(it) = &mut *under_way {
            it.modules -= 1;
            if it.modules == 0 {
                *under_way = None;
            }
        }
    }
}

/// Number of functions that a module defines; 0 if it cannot be parsed.
pub(super) fn functions(module: &[u8]) -> u64 {
    let payloads = wasmparser::Parser::new(0).parse_all(module);
    for payload in payloads.map_while(Result::ok) {
        if let wasmparser::Payload::CodeSectionStart { count, .. } = payload {
            return count.into();
        }
    }
    0
}

/// Counts the compiled functions of a thread without trampolines between host and guest, which are
/// not translated from WebAssembly.
#[derive(Default)]
struct Counter {
    is_translated: Rc<Cell<bool>>,
}

impl Profiler for Counter {
    fn start_pass(&self, pass: Pass) -> Box<dyn Any> {
        match pass {
            Pass::wasm_translate_function => self.is_translated.set(true),
            Pass::compile if self.is_translated.get() => {
                return Box::new(Function(self.is_translated.clone()));
            }
            _ => {}
        }
        // (Zero-sized: no allocation.)
        Box::new(())
    }
}

/// A function in compilation; complete when dropped.
struct Function(Rc<Cell<bool>>);

impl Drop for Function {
    fn drop(&mut self) {
        self.0.set(false);
        FINISHED.fetch_add(1, Ordering::Relaxed);
    }
}
