//! The same module instrumented, and captured at every safepoint.

use crate::reference::Plain;
use crate::{Ended, Observed, trap_name};
use keel_wasi::{Config, Wasi};
use keel_wasm::instrument::InstrumentError;
use keel_wasm::runtime::frame::{ThreadState, Value};
use keel_wasm::runtime::{
    Engine, Fiber, FiberError, HostThread, Limits, Machine, MachineError, Program, ProgramError,
    Run, Signal, Stop,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::sync::Arc;

/// After this number of captures a call continues without.
const CAPTURES_MAX: u64 = 300;

pub(crate) struct Shaken {
    program: Arc<Program>,
    machine: Machine,
    thread: HostThread,
    fiber: Fiber,
    random: StdRng,
    pub(crate) captures: u64,
}

impl Shaken {
    /// `Err` with an unsupported feature of the module; inside, the trap of the instantiation.
    pub(crate) fn new(
        engine: &Engine,
        bytes: &[u8],
        seed: u64,
    ) -> Result<Result<Self, String>, String> {
        let program = match engine.load(bytes) {
            Ok(program) => program,
            Err(ProgramError::Instrument(InstrumentError::Unsupported { what, .. })) => {
                return Err(what);
            }
            Err(error @ ProgramError::Tables { .. }) => return Err(error.to_string()),
            Err(error) => panic!("refused: {error}"),
        };
        Ok(Self::start(program, seed))
    }

    fn start(program: Arc<Program>, seed: u64) -> Result<Self, String> {
        let wasi = Wasi::new(Config::default()).unwrap();
        let machine = match Machine::idle(program.clone(), wasi, Limits::default()) {
            Ok(machine) => machine,
            Err(error @ MachineError::Data(_)) => return Err(error.to_string()),
            Err(error) => panic!("{error}"),
        };
        let thread = HostThread {
            tid: 0,
            signal: Arc::new(Signal::new().unwrap()),
            memories: machine.memories().clone(),
            tables: Arc::default(),
        };
        let fiber = match Fiber::new(program.clone(), machine.host(), thread.clone()) {
            Ok(fiber) => fiber,
            Err(FiberError::Engine(error)) => return Err(format!("{error:#}")),
            Err(error) => panic!("{error}"),
        };
        let mut shaken = Shaken {
            program,
            machine,
            thread,
            fiber,
            random: StdRng::seed_from_u64(seed),
            captures: 0,
        };
        if shaken.program.meta().start.is_some()
            && let Err(Stop::Trap(trap)) = shaken.run("keel:start", &[])
        {
            return Err(trap.message);
        }
        Ok(shaken)
    }

    pub(crate) fn call(&mut self, name: &str, args: &[Value]) -> Ended {
        match self.run(name, args) {
            Ok(values) => Ended::Returned(
                values
                    .into_iter()
                    .map(|value| self.original(value))
                    .collect(),
            ),
            Err(Stop::Trap(trap)) => Ended::Trapped(trap_name(&trap.message)),
            Err(Stop::Exit(code)) => panic!("exit {code}"),
        }
    }

    /// A reference in the numbering of the original module: the instrumenter adds imports.
    fn original(&self, value: Value) -> Value {
        let added = self.program.meta().imports.len() as u32;
        match value {
            Value::FuncRef(index) if index != 0 => Value::FuncRef(index - added),
            other => other,
        }
    }

    fn run(&mut self, name: &str, args: &[Value]) -> Result<Vec<Value>, Stop> {
        self.thread.signal.step(true);
        let begun = self.captures;
        let mut run = self.fiber.call(name, args)?;
        loop {
            match run {
                Run::Finished(values) => return Ok(values),
                Run::Captured => {
                    self.captures += 1;
                    let state = self.fiber.state()?;
                    let hash = self.program.hash();
                    let bytes = state.encode(hash);
                    let again = ThreadState::decode(&bytes, hash, self.program.meta());
                    let again = again.unwrap_or_else(|error| {
                        panic!(
                            "{error}: {}",
                            format!("{state:?}").chars().take(600).collect::<String>()
                        )
                    });
                    assert_eq!(state, again);
                    if self.random.random_range(0..3) == 0 {
                        self.fiber = Fiber::new(
                            self.program.clone(),
                            self.machine.host(),
                            self.thread.clone(),
                        )
                        .unwrap();
                        self.fiber.load(again)?;
                    }
                    if self.captures - begun > CAPTURES_MAX {
                        self.thread.signal.step(false);
                    }
                    run = self.fiber.resume()?;
                }
            }
        }
    }

    /// The state that `plain` exposes, in this instance.
    pub(crate) fn observe(&mut self, plain: &mut Plain) -> Observed {
        let theirs = plain.observe();
        let state = self.fiber.state().unwrap();
        let meta = self.program.meta();
        let global = |index: u32| {
            let name = format!("keel:g{index}");
            let at = meta.globals.iter().position(|global| global.export == name);
            self.original(state.globals[at.unwrap()])
        };
        let mut observed = Observed::default();
        for (index, _) in &theirs.globals {
            observed.globals.push((*index, global(*index)));
        }
        for memory in self.machine.memories().iter() {
            let mut bytes = vec![0; memory.size_bytes() as usize];
            memory.read(0, &mut bytes).unwrap();
            let pages = memory.size_bytes() >> 16;
            observed
                .memories
                .push((pages, *blake3::hash(&bytes).as_bytes()));
        }
        for (index, entries) in theirs.tables {
            let at = meta.tables.iter().position(|(table, _)| *table == index);
            // A table that code does not change is not part of the state.
            let entries = at.map_or(entries, |at| {
                let references = state.tables[at].iter().map(|index| Value::FuncRef(*index));
                references
                    .map(|value| self.original(value).bits() as u32)
                    .collect()
            });
            observed.tables.push((index, entries));
        }
        observed
    }
}
