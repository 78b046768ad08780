//! The process that compiles a program into the node's cache: `keel compile`. It prints its
//! progress in percent, a line per change.
//!
//! A small program is compiled at once, because it is cheap: on a node with more runnable
//! guests than processors, its first move would otherwise wait for seconds. A large one, or
//! one that takes longer, yields to guests. A line on standard input says that a move waits: if the
//! compilation takes long even so, it gets a larger share, and functions whose clones take
//! long to compile are left to the move, which names those that it needs.

use keel_machine::cgroup::{CompilePriority, expose_worker_to_oom, set_compile_priority};
use keel_wasm::runtime::{Engine, Options};
use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Interval of progress lines.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// The longest compilation of a small program, and the size of its module in bytes: a larger one
/// takes longer on any processor, and yields from its beginning.
const SMALL_MAX: Duration = Duration::from_millis(500);
const SMALL_BYTES_MAX: usize = 2 << 20;
/// How long a move waits for a compilation that yields to guests as much as one that nothing waits
/// for.
const YIELD_MAX: Duration = Duration::from_secs(30);

/// State shared with the threads that read input and print progress.
#[derive(Debug, Default)]
struct State {
    /// Whether its module is small.
    is_small: bool,
    wanted: AtomicBool,
    /// The program can run here; only clones are still compiled.
    runs: AtomicBool,
    done: AtomicBool,
}

/// Compiles the instrumented module `program` into the folder `cache`, unless its code is
/// there already. `wanted`: a move waits for it from the start.
///
/// # Errors
/// If the module cannot be read or compiled, or the cache cannot be used.
pub(crate) fn compile(cache: &Path, program: &Path, wanted: bool) -> Result<(), String> {
    // No machine is lost with this process, so the kernel should kill it first when
    // memory runs out.
    expose_worker_to_oom();
    let size = std::fs::metadata(program).map_or(0, |it| it.len());
    let is_small = usize::try_from(size).is_ok_and(|size| size <= SMALL_BYTES_MAX);
    set_compile_priority(priority(is_small, Duration::ZERO, None));
    let engine = Engine::with_cache(Options::default(), cache).map_err(|e| e.to_string())?;
    let bytes =
        std::fs::read(program).map_err(|error| format!("{}: {error}", program.display()))?;
    let state: &'static State = Box::leak(Box::new(State {
        is_small,
        ..State::default()
    }));
    state.wanted.store(wanted, Ordering::Release);
    // The thread waits for input until the process ends.
    std::thread::spawn(|| read_requests(state));
    std::thread::scope(|scope| {
        scope.spawn(|| report_progress(&engine, state));
        let compiled = engine.load_instrumented(bytes).and_then(|program| {
            state.runs.store(true, Ordering::SeqCst);
            match state.wanted.load(Ordering::SeqCst) {
                true => Ok(()),
                false => program.prepare_resume(),
            }
        });
        state.done.store(true, Ordering::Release);
        compiled.map_err(|error| error.to_string())
    })
}

/// Notes that a move waits; it need not wait for clones. Exits with the agent, whose successor
/// compiles anew and must not wait for this process's lock.
fn read_requests(state: &State) {
    let mut input = std::io::stdin().lock();
    let mut line = String::new();
    while matches!(input.read_line(&mut line), Ok(1..)) {
        state.wanted.store(true, Ordering::SeqCst);
        if state.runs.load(Ordering::SeqCst) {
            std::process::exit(0);
        }
    }
    if !state.done.load(Ordering::Acquire) {
        std::process::exit(1);
    }
}

/// Prints progress, and yields to guests after a while, until the compilation is
/// complete.
fn report_progress(engine: &Engine, state: &State) {
    let (begun, mut printed) = (Instant::now(), None);
    let mut current = priority(state.is_small, Duration::ZERO, None);
    let mut wanted_since: Option<Instant> = None;
    while !state.done.load(Ordering::Acquire) {
        if wanted_since.is_none() && state.wanted.load(Ordering::Acquire) {
            wanted_since = Some(Instant::now());
        }
        let waited = wanted_since.map(|since| since.elapsed());
        let now = priority(state.is_small, begun.elapsed(), waited);
        if now != current {
            set_compile_priority(now);
            current = now;
        }
        let percent = engine.compile_progress().map(|it| it.percent());
        if percent.is_some() && percent != printed {
            printed = percent;
            let line = format!("{}\n", percent.unwrap_or_default());
            if std::io::stdout().write_all(line.as_bytes()).is_err() {
                // The agent is gone; its successor can use the compiled code.
                return;
            }
        }
        std::thread::sleep(TELL_EVERY);
    }
}

/// The priority of a compilation that has taken `elapsed`, and for which a move has waited.
fn priority(is_small: bool, elapsed: Duration, waited: Option<Duration>) -> CompilePriority {
    match waited {
        _ if is_small && elapsed <= SMALL_MAX => CompilePriority::First,
        Some(waited) if waited > YIELD_MAX => CompilePriority::Overdue,
        _ => CompilePriority::Background,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A large program must not take processors from guests at its beginning either.
    #[test]
    fn only_small_programs_are_compiled_before_guests() {
        let (start, later) = (Duration::ZERO, SMALL_MAX * 2);
        assert_eq!(priority(true, start, None), CompilePriority::First);
        assert_eq!(priority(false, start, None), CompilePriority::Background);
        assert_eq!(
            priority(false, start, Some(start)),
            CompilePriority::Background
        );
        assert_eq!(
            priority(true, later, Some(later)),
            CompilePriority::Background
        );
        let overdue = Some(YIELD_MAX * 2);
        assert_eq!(priority(false, later, overdue), CompilePriority::Overdue);
    }
}
