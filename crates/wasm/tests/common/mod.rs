//! Machines running the guests of `guests/`, and moving them within this process: as plain data,
//! into fresh memories and instances.

#![allow(dead_code, reason = "not every test file uses all of it")]

use keel_wasi::{Config, MemorySink, Preopen, Resources, Source, Wasi};
use keel_wasm::runtime::{Engine, Image, Limits, Machine, Options, Program, make_memories};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Time after which a test counts as hanging.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn guest(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../guests")
        .join(name)
        .with_extension("wasm");
    std::fs::read(path).unwrap()
}

pub(crate) fn program(bytes: &[u8]) -> Arc<Program> {
    let program = Engine::new(Options::default())
        .unwrap()
        .load(bytes)
        .unwrap();
    // Else a short program may end before it is ready for its first move.
    program.prepare_resume().unwrap();
    program
}

/// A machine whose output is kept.
pub(crate) struct Running {
    pub(crate) machine: Machine,
    pub(crate) output: Arc<MemorySink>,
    folder: Option<PathBuf>,
    limits: Limits,
}

impl Running {
    pub(crate) fn start(program: &Arc<Program>, args: &[&str]) -> Self {
        Self::start_as(program, args, Config::default(), Limits::default())
    }

    /// With a listening socket.
    pub(crate) fn start_listening(program: &Arc<Program>, args: &[&str]) -> Self {
        let config = Config {
            listeners: 1,
            ..Config::default()
        };
        Self::start_as(program, args, config, Limits::default())
    }

    pub(crate) fn start_within(program: &Arc<Program>, args: &[&str], limits: Limits) -> Self {
        Self::start_as(program, args, Config::default(), limits)
    }

    /// With a folder as the guest's `/data`.
    pub(crate) fn start_in(program: &Arc<Program>, args: &[&str], folder: Option<&Path>) -> Self {
        let mut config = Config::default();
        config.preopens.extend(folder.map(|folder| Preopen {
            source: Source::Host(folder.to_owned()),
            guest: "/data".into(),
            read_only: false,
        }));
        let mut running = Self::start_as(program, args, config, Limits::default());
        running.folder = folder.map(Path::to_owned);
        running
    }

    fn start_as(program: &Arc<Program>, args: &[&str], mut config: Config, limits: Limits) -> Self {
        let output = Arc::new(MemorySink::default());
        config.args.push("guest".into());
        config.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        config.stdout = Box::new(output.clone());
        let wasi = Wasi::new(config).unwrap();
        Running {
            machine: Machine::start(program.clone(), wasi, limits).unwrap(),
            output,
            limits,
            folder: None,
        }
    }

    /// Freezes it, creates another from its image and a copy of its memories, and resumes that.
    /// False if it has ended.
    pub(crate) fn move_on(&mut self) -> bool {
        if self.machine.freeze(LIMIT).is_err() {
            return false;
        }
        let bytes = self.machine.image().unwrap().encode().unwrap();
        let program = self.machine.program().clone();
        let image = Image::decode(&bytes, &program).unwrap();
        let memories = make_memories(program.meta(), 4 << 30).unwrap();
        for (from, to) in self.machine.memories().iter().zip(memories.iter()) {
            let missing = (from.size_bytes() - to.size_bytes()) >> 16;
            to.grow(missing).unwrap();
            let mut bytes = vec![0; from.size_bytes() as usize];
            from.read(0, &mut bytes).unwrap();
            to.write(0, &bytes).unwrap();
        }
        let resources = Resources {
            preopens: self.folder.iter().cloned().map(Source::Host).collect(),
            stdout: Box::new(self.output.clone()),
            ..Resources::default()
        };
        let wasi = Wasi::restore(image.wasi.clone(), resources).unwrap();
        let moved = Machine::prepare(program, image, memories, wasi, self.limits).unwrap();
        self.machine.stop();
        self.machine.wait(Some(LIMIT)).unwrap();
        moved.thaw().unwrap();
        self.machine = moved;
        true
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.output.bytes()).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.machine.stop();
    }
}
