//! A machine that runs, and of which checkpoints are made.

use super::*;

pub(crate) struct Running {
    pub(crate) machine: Machine,
    pub(crate) output: Arc<MemorySink>,
    pub(crate) log: Log,
    pub(crate) engine: Engine,
    pub(crate) checkpointer: Checkpointer,
    /// The checkpoint that counts, wherever it is.
    pub(crate) after: Option<CheckpointId>,
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) folder: tempfile::TempDir,
}

pub(crate) fn guest(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../guests")
        .join(name)
        .with_extension("wasm");
    std::fs::read(path).unwrap()
}

/// With a volume of its own at `/own`.
pub(crate) fn spec() -> Spec {
    Spec {
        kind: WasmKind::kind_name(),
        kind_spec: WasmSpec {
            module: String::new(),
            args: vec!["guest".into()],
            env: Vec::new(),
            threads_max: 64,
        }
        .to_kind_spec()
        .unwrap(),
        volumes: vec![Volume {
            kind: VolumeKind::Tmp {
                bytes: VOLUME_BYTES,
                inodes: 1000,
            },
            guest: "/own".into(),
            read_only: false,
        }],
        memory_bytes: 256 << 20,
        cpu_limit_millis: None,
        output_bytes_per_s: 1 << 20,
        remove_at_end: false,
        restart: keel_machine::restart_policy::Restart::No,
        checkpoints: None,
        ha: None,
        balancing: Balancing::default(),
    }
}

pub(crate) fn volume(folder: PathBuf) -> Source {
    Source::Volume {
        folder,
        limits: VolumeLimits {
            bytes_max: VOLUME_BYTES,
            inodes_max: 1000,
        },
        stalls: Arc::default(),
    }
}

impl Running {
    pub(crate) fn start(name: &str, args: &[&str]) -> Self {
        let running = Running::ready(name, args);
        running.machine.thaw().unwrap();
        running
    }

    /// The machine is stopped at its beginning.
    pub(crate) fn ready(name: &str, args: &[&str]) -> Self {
        let engine = Engine::new(Options::default()).unwrap();
        let program = engine.load(&guest(name)).unwrap();
        // Otherwise a short program may end before the code is ready.
        program.prepare_resume().unwrap();
        let output = Arc::new(MemorySink::default());
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config {
            args: vec!["guest".into()],
            stdout: Box::new(output.clone()),
            preopens: vec![Preopen {
                source: volume(folder.path().join("own")),
                guest: "/own".into(),
                read_only: false,
            }],
            ..Config::default()
        };
        config.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        let wasi = Wasi::new(config).unwrap();
        Running {
            machine: Machine::ready_under(0, program, wasi, limits(&spec())).unwrap(),
            output,
            log: Log::open(&folder.path().join("log"), 0).unwrap(),
            engine,
            checkpointer: Checkpointer::default(),
            after: None,
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap(),
            folder,
        }
    }

    pub(crate) fn repository(&self) -> Repository {
        Repository::create(&self.place().display().to_string()).unwrap()
    }

    /// The folder for restored volumes.
    pub(crate) fn volumes(&self) -> PathBuf {
        self.folder.path().join("volumes")
    }

    pub(crate) fn place(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    pub(crate) fn take(&mut self, full: bool) -> CreatedCheckpoint {
        self.try_take(full, &AtomicBool::new(false)).unwrap()
    }

    pub(crate) fn try_take(
        &mut self,
        full: bool,
        give_up: &AtomicBool,
    ) -> Result<CreatedCheckpoint, CreateError> {
        self.try_take_apart(None, full, give_up)
    }

    /// For a machine with several parts.
    pub(crate) fn try_take_apart(
        &mut self,
        apart: Option<&Pages>,
        full: bool,
        give_up: &AtomicBool,
    ) -> Result<CreatedCheckpoint, CreateError> {
        let subject = Subject {
            name: "m".parse().unwrap(),
            spec: spec(),
            epoch: Epoch::default(),
        };
        let repository = self.repository();
        let destination = Destination {
            repository: &repository,
            runtime: self.runtime.handle(),
            full,
            after: self.after.clone(),
            give_up,
            cluster_volumes: Vec::new(),
        };
        self.checkpointer
            .take(&self.machine, apart, subject, &self.log, destination)
    }

    pub(crate) fn restore(&self, id: Option<&CheckpointId>) -> Result<Restored, RestoreError> {
        self.restore_as(id, MemoryRestore::Eager)
    }

    pub(crate) fn restore_as(
        &self,
        id: Option<&CheckpointId>,
        memory: MemoryRestore,
    ) -> Result<Restored, RestoreError> {
        let origin = Origin {
            repository: self.place().display().to_string(),
            machine: "m".parse().unwrap(),
            id: id.cloned(),
            is_clone: false,
            memory,
        };
        let limits = limits(&spec());
        restore(
            &origin,
            &self.repository(),
            &self.engine,
            limits,
            self.runtime.handle(),
            &self.volumes(),
        )
    }

    /// Resumes it; returns the output from there on.
    pub(crate) fn finish(&self, restored: Restored) -> String {
        let (machine, output, _) = self.prepare(restored);
        machine.thaw().unwrap();
        let outcome = machine.wait(Some(LIMIT));
        let text = String::from_utf8(output.bytes()).unwrap();
        assert_eq!(outcome, Some(Outcome::Exit(0)), "{text}");
        text
    }

    /// A machine that is stopped, its output, and its remaining memory.
    pub(crate) fn prepare(
        &self,
        restored: Restored,
    ) -> (Machine, Arc<MemorySink>, RemainingMemory) {
        let output = Arc::new(MemorySink::default());
        let resources = Resources {
            stdout: Box::new(output.clone()),
            preopens: vec![volume(self.volumes().join("0"))],
            ..Resources::default()
        };
        let wasi = Wasi::restore(restored.image.wasi.clone(), resources).unwrap();
        let limits = Limits::default();
        if let RemainingMemory::Lazy(behind) = &restored.rest {
            behind.begin(|result| result.unwrap()).unwrap();
        }
        let machine = Machine::prepare(
            restored.program,
            restored.image,
            restored.memories,
            wasi,
            limits,
        )
        .unwrap();
        (machine, output, restored.rest)
    }

    pub(crate) fn wait_lines(&self, count: usize) {
        let begun = Instant::now();
        while self.lines() < count {
            assert!(begun.elapsed() < LIMIT, "it makes no progress");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn lines(&self) -> usize {
        self.output
            .bytes()
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.machine.stop();
    }
}

/// Limits that the runtime enforces.
pub(crate) fn limits(spec: &Spec) -> keel_wasm::runtime::Limits {
    WasmSpec::of(spec).unwrap().limits(spec)
}
