//! Time of a thread from a request to a safepoint, and time of capturing it there.
//!
//! - *asked to off the stack*: from the request until all frames are saved and the thread's native
//!   stack is empty
//! - *capture*: from then until the thread is serialised (frames, globals, tables; encoded)
//! - *step*: enters a frame, runs to the next safepoint, leaves it and collects the frames: an
//!   upper bound for leaving
//! - *freeze*: `Machine::freeze`, from the request until the machine's thread is parked

use crate::Options;
use crate::guest::Start;
use crate::table::{Table, micros, percentile};
use anyhow::{Context, Result, bail};
use keel_wasm::runtime::{Engine, Fiber, HostThread, Limits, Machine, Program, Run, Signal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Guests that run until they are dropped: file, arguments, description.
const GUESTS: &[(&str, &[&str], &str)] = &[
    ("deep", &["deep", "0"], "tight loop, 1 frame"),
    ("deep", &["deep", "40"], "tight loop, 40 frames"),
    ("fib", &["fib", "100000000"], "recursion"),
    ("interpreter", &["interpreter", "25000"], "byte code"),
    ("sieve", &["sieve", "100000000"], "sieve, memset"),
    ("strings", &["strings", "100000000"], "qsort, malloc"),
];

const SLEEPERS: &[(&str, &[&str], &str)] = &[("sleeper", &["sleeper"], "blocked in `poll_oneoff`")];

#[derive(Default)]
struct Times {
    leave: Vec<f64>,
    capture: Vec<f64>,
    step: Vec<f64>,
    freeze: Vec<f64>,
    frames: usize,
    bytes: usize,
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    let engine = Engine::new(keel_wasm::runtime::Options::default())?;
    let mut table = Table::new(&[
        "guest",
        "frames",
        "bytes",
        "to safepoint p50",
        "p99",
        "capture p50",
        "p99",
        "step p50",
        "freeze p50",
        "p99",
    ]);
    for (blocked, guests) in [(false, GUESTS), (true, SLEEPERS)] {
        for (name, args, what) in guests {
            let path = options.kernels.join(format!("{name}.wasm"));
            let module = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
            let program = engine.load(&module)?;
            program.prepare_resume()?;
            let start = Start::args(args);
            let mut times = capture(&program, &start, options.captures, blocked)?;
            freeze(&program, &start, options.captures, &mut times)?;
            let mut cell =
                |values: fn(&mut Times) -> &mut Vec<f64>, share: f64| match values(&mut times)
                    .as_mut_slice()
                {
                    [] => "-".to_owned(),
                    values => format!("{:.1} µs", percentile(values, share)),
                };
            let cells = vec![
                cell(|times| &mut times.leave, 0.5),
                cell(|times| &mut times.leave, 0.99),
                cell(|times| &mut times.capture, 0.5),
                cell(|times| &mut times.capture, 0.99),
                cell(|times| &mut times.step, 0.5),
                cell(|times| &mut times.freeze, 0.5),
                cell(|times| &mut times.freeze, 0.99),
            ];
            let mut row = vec![
                (*what).to_owned(),
                times.frames.to_string(),
                times.bytes.to_string(),
            ];
            row.extend(cells);
            eprintln!("{row:?}");
            table.row(row);
        }
    }
    table.print("Reaching a safepoint and capturing a thread");
    Ok(())
}

/// Time of the last request; `None` while there is none.
type Asked = Mutex<Option<Instant>>;

fn capture(program: &Arc<Program>, start: &Start, captures: usize, blocked: bool) -> Result<Times> {
    let (wasi, _) = start.wasi()?;
    let machine = Machine::idle(program.clone(), wasi, Limits::default())?;
    let signal = Arc::new(Signal::new()?);
    let thread = HostThread {
        tid: 0,
        signal: signal.clone(),
        memories: machine.memories().clone(),
        tables: Arc::default(),
    };
    let mut fiber = Fiber::new(program.clone(), machine.host(), thread)?;
    let asked: Arc<Asked> = Arc::default();
    let over = Arc::new(AtomicBool::new(false));
    let asker = {
        let (signal, asked, over) = (signal.clone(), asked.clone(), over.clone());
        std::thread::spawn(move || ask(&signal, &asked, &over))
    };
    let mut times = Times::default();
    let mut run = fiber.call("_start", &[]);
    for number in 0..captures + 100 {
        match run {
            Ok(Run::Captured) => {}
            other => bail!("the guest ended: {other:?}"),
        }
        let left = Instant::now();
        let state = fiber.state().map_err(|stop| anyhow::anyhow!("{stop:?}"))?;
        let bytes = state.encode(program.hash());
        let done = Instant::now();
        let begun = asked
            .lock()
            .unwrap_or_else(|error| error.into_inner())
            .take();
        if let Some(begun) = begun
            && number >= 100
        {
            times.leave.push(micros(left - begun));
            times.capture.push(micros(done - left));
            times.frames = state.frames.len();
            times.bytes = bytes.len();
        }
        signal.clear();
        run = fiber.resume();
    }
    over.store(true, Ordering::Relaxed);
    let _ = asker.join();
    if !blocked {
        signal.clear();
        signal.step(true);
        for _ in 0..captures {
            let begun = Instant::now();
            let run = fiber.resume();
            times.step.push(micros(begun.elapsed()));
            if !matches!(run, Ok(Run::Captured)) {
                bail!("the guest ended: {run:?}");
            }
        }
    }
    Ok(times)
}

/// Sends requests at irregular intervals, each after the last one is served.
fn ask(signal: &Signal, asked: &Asked, over: &AtomicBool) {
    let mut random = 88_172_645_463_325_252_u64;
    while !over.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_micros(100 + random % 900));
        let mut slot = asked.lock().unwrap_or_else(|error| error.into_inner());
        if slot.is_none() {
            *slot = Some(Instant::now());
            drop(slot);
            signal.request();
        }
    }
    // Releases a pending wait.
    signal.request();
}

fn freeze(program: &Arc<Program>, start: &Start, captures: usize, times: &mut Times) -> Result<()> {
    let (wasi, _) = start.wasi()?;
    let machine = Machine::start(program.clone(), wasi, Limits::default())?;
    std::thread::sleep(Duration::from_millis(20));
    for number in 0..captures {
        std::thread::sleep(Duration::from_micros(150 + (number as u64 * 7919) % 700));
        let begun = Instant::now();
        machine.freeze(Duration::from_secs(10))?;
        times.freeze.push(micros(begun.elapsed()));
        machine.thaw()?;
    }
    machine.stop();
    Ok(())
}
