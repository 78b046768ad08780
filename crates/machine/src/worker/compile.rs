//! The process that compiles one program into the node's cache, so that its threads can
//! be resumed there: `keel compile`. It prints how far it is, in percent, a line each time
//! that this changed.
//!
//! A small program is compiled at once, as cheap as it is: on a node whose guests want
//! more than its processors have, its first move would wait for seconds otherwise. What
//! takes longer gets only what guests leave of the processors, until a line on standard
//! input says that a move waits for it.

use crate::cgroup::{CompilePriority, expose_worker_to_oom, set_compile_priority};
use keel_wasm::runtime::{Engine, Options};
use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Pause between two lines.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// What takes longer is not small.
const SMALL_MAX: Duration = Duration::from_millis(500);

/// Whether a move waits, and whether all is done.
#[derive(Debug, Default)]
struct State {
    wanted: AtomicBool,
    /// It lets guests go first.
    yields: AtomicBool,
    done: AtomicBool,
}

/// Compiles the instrumented module `program` into the folder `cache`, unless its code
/// is there already. `wanted`: a move waits for it from the beginning.
///
/// # Errors
/// If the module cannot be read or compiled, or the cache cannot be used.
pub fn compile(cache: &Path, program: &Path, wanted: bool) -> Result<(), String> {
    // Nobody's machine is lost with it: the kernel is to take its memory first.
    expose_worker_to_oom();
    set_compile_priority(CompilePriority::First);
    let engine = Engine::with_cache(Options::default(), cache).map_err(|e| e.to_string())?;
    let bytes =
        std::fs::read(program).map_err(|error| format!("{}: {error}", program.display()))?;
    let state: &'static State = Box::leak(Box::default());
    state.wanted.store(wanted, Ordering::Release);
    // (It waits for its input as long as the process lives.)
    std::thread::spawn(|| hear(state));
    std::thread::scope(|scope| {
        scope.spawn(|| accompany(&engine, state));
        let compiled = engine.load_instrumented(bytes);
        state.done.store(true, Ordering::Release);
        compiled.map(drop).map_err(|error| error.to_string())
    })
}

/// Goes forward once a move waits; ends with the agent, whose successor compiles anew
/// and shall not wait for the lock of this one.
fn hear(state: &State) {
    let mut input = std::io::stdin().lock();
    let mut line = String::new();
    while matches!(input.read_line(&mut line), Ok(1..)) {
        state.wanted.store(true, Ordering::SeqCst);
        if state.yields.load(Ordering::SeqCst) {
            set_compile_priority(CompilePriority::Wanted);
        }
    }
    if !state.done.load(Ordering::Acquire) {
        std::process::exit(1);
    }
}

/// Prints how far the engine is, and lets guests go first after a while, until it is
/// done.
fn accompany(engine: &Engine, state: &State) {
    let (begun, mut told) = (Instant::now(), None);
    while !state.done.load(Ordering::Acquire) {
        if !state.yields.load(Ordering::Acquire) && begun.elapsed() > SMALL_MAX {
            state.yields.store(true, Ordering::SeqCst);
            if !state.wanted.load(Ordering::SeqCst) {
                set_compile_priority(CompilePriority::Background);
            }
            // The word may have come just now.
            if state.wanted.load(Ordering::SeqCst) {
                set_compile_priority(CompilePriority::Wanted);
            }
        }
        let percent = engine.compile_progress().map(|it| it.percent());
        if percent.is_some() && percent != told {
            told = percent;
            let line = format!("{}\n", percent.unwrap_or_default());
            if std::io::stdout().write_all(line.as_bytes()).is_err() {
                // The agent is gone; what is compiled is of use to the next one.
                return;
            }
        }
        std::thread::sleep(TELL_EVERY);
    }
}
