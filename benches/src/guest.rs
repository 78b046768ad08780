//! Runs a program plain or as a machine, and collects its output.

use anyhow::{Context, Result, bail};
use keel_wasi::{
    Config, HostClock, Interrupt, Preopen, Sink, SinkResult, Source, SystemClock, Wasi,
};
use keel_wasm::runtime::{Engine, Limits, Machine, Options, Outcome, Program};
use rustix::time::{ClockId, clock_gettime};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

/// Arguments and directories of a guest.
#[derive(Debug, Clone, Default)]
pub(crate) struct Start {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// Host directories, each with its name for the guest.
    pub(crate) dirs: Vec<(PathBuf, String)>,
}

impl Start {
    pub(crate) fn args(args: &[&str]) -> Self {
        Start {
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Self::default()
        }
    }

    /// WASI state, and the buffer of its output.
    pub(crate) fn wasi(&self) -> Result<(Wasi, Output)> {
        let output = Output::default();
        let config = Config {
            args: self.args.clone(),
            env: self.env.clone(),
            preopens: self
                .dirs
                .iter()
                .map(|(host, guest)| Preopen {
                    source: Source::Host(host.clone()),
                    guest: guest.clone(),
                    read_only: true,
                })
                .collect(),
            stdout: Box::new(output.clone()),
            stderr: Box::new(output.clone()),
            seed: Some([7; 32]),
            clock: Arc::new(CpuClock {
                starter: std::thread::current().id(),
            }),
            ..Config::default()
        };
        Ok((Wasi::new(config)?, output))
    }
}

/// Gives a guest the processor time of the calling thread as its clock, so that other processes on
/// the host affect it little.
struct CpuClock {
    /// The first call comes before the guest starts: its time must not be ahead of the guest's.
    starter: ThreadId,
}

impl HostClock for CpuClock {
    fn monotonic_ns(&self) -> u64 {
        if std::thread::current().id() == self.starter {
            return 0;
        }
        let time = clock_gettime(ClockId::ThreadCPUTime);
        (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
    }

    fn realtime_ns(&self) -> u64 {
        SystemClock.realtime_ns()
    }
}

/// The output of a guest.
#[derive(Debug, Clone, Default)]
pub(crate) struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    pub(crate) fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(|error| error.into_inner());
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Sink for Output {
    fn write(&self, bytes: &[u8], _interrupt: &dyn Interrupt) -> SinkResult {
        self.0
            .lock()
            .unwrap_or_else(|error| error.into_inner())
            .extend_from_slice(bytes);
        SinkResult::Written(bytes.len())
    }
}

/// Runs a program to its end, on plain wasmtime.
pub(crate) fn plain(module: &[u8], start: &Start) -> Result<String> {
    let (wasi, output) = start.wasi()?;
    let engine = Engine::new(Options::default())?;
    let outcome = engine.run_uninstrumented(module, Arc::new(wasi), Limits::default())?;
    ended_well(&outcome, &output)
}

/// Runs a program to its end, as a machine.
pub(crate) fn machine(program: &Arc<Program>, start: &Start) -> Result<String> {
    let (wasi, output) = start.wasi()?;
    let machine = Machine::start(program.clone(), wasi, Limits::default())?;
    let outcome = machine.wait(None).context("the machine does not end")?;
    ended_well(&outcome, &output)
}

pub(crate) fn ended_well(outcome: &Outcome, output: &Output) -> Result<String> {
    match outcome {
        Outcome::Exit(0) => Ok(output.text()),
        other => bail!("{other:?}: {}", output.text()),
    }
}
