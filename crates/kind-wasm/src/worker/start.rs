//! Starting a machine: from its module, or from a checkpoint, whose memory may be read
//! later.

use super::cluster_volumes::ClusterVolumes;
use super::volumes;
use super::wasm_worker::WasmWorker;
use crate::checkpoint::{self, LazyRestore, RemainingMemory};
use crate::spec::WasmSpec;
use keel_cluster::Epoch;
use keel_machine::checkpoint::{Origin, Repository};
use keel_machine::log::{Log, LogSink, StreamKind};
use keel_machine::spec::{Spec, Status, VolumeKind};
use keel_machine::worker::control::{Start, StartFrom, StartPhase, State};
use keel_machine::worker::{volume_folder, write_notice, write_restored};
use keel_net::RpcError;
use keel_wasi::{Config, Preopen, Resources, Wasi};
use keel_wasm::runtime::{Machine, Program};
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::Handle;

impl WasmWorker {
    pub(super) fn start_machine(
        self: &Arc<Self>,
        start: Start,
        runtime: &Handle,
    ) -> Result<(), RpcError> {
        let phase = match &start.from {
            StartFrom::Beginning { .. } => StartPhase::Prepare,
            StartFrom::Checkpoint(_) => StartPhase::Restore,
        };
        self.inner().starting = Some((phase, Instant::now()));
        let (machine, log, cluster_volumes) = match &start.from {
            StartFrom::Beginning { .. } => self.begin(&start, runtime)?,
            StartFrom::Checkpoint(origin) => self.restore(origin, &start, runtime)?,
        };
        let mut inner = self.inner();
        inner.starting = None;
        inner.cluster_volumes = cluster_volumes;
        inner.name = Some(start.machine);
        inner.spec = Some(start.spec);
        self.process.set_log(log);
        inner.moves.epoch = start.epoch;
        inner.machine = Some(machine.clone());
        let epoch = start.epoch;
        let is_held = inner.spanning_restore.is_some() || is_held_at_start(&start.from);
        let next = match is_held {
            true => State::Held { epoch },
            false => State::Running { epoch },
        };
        drop(inner);
        self.process.lease().machine_changed(&**self);
        self.process.state.send_if_modified(|state| {
            // Damage may have been found already.
            let first = *state == State::Empty;
            if first {
                *state = next;
            }
            first
        });
        self.watch_end(machine)
    }

    /// Compiles what a machine that needs a lease is held with, before it runs.
    fn prepare_hold(&self, spec: &Spec, program: &Program) {
        if spec.ha.is_some()
            && let Err(error) = program.prepare_resume()
        {
            // It is killed, instead of held, when the lease ends.
            tracing::warn!(%error, "the machine cannot be held");
        }
    }

    /// Starts a machine from its module; it runs unless it is to have parts first.
    fn begin(
        self: &Arc<Self>,
        start: &Start,
        runtime: &Handle,
    ) -> Result<(Machine, Arc<Log>, ClusterVolumes), RpcError> {
        let spec = &start.spec;
        let own = WasmSpec::of(spec).map_err(RpcError::failed)?;
        let module = self.images.join(&own.module);
        let bytes = std::fs::read(&module)
            .map_err(|error| RpcError::failed(format!("{}: {error}", module.display())))?;
        let program = self.engine.load(&bytes).map_err(RpcError::failed)?;
        self.store_program(program.hash(), program.bytes())?;
        self.prepare_hold(spec, &program);
        let log = Arc::new(Log::open(self.process.folder(), 0).map_err(RpcError::failed)?);
        if let Some(notice) = &start.notice {
            write_notice(&log, &format!("{notice}; it starts from its beginning"));
        }
        // Remains of a lost worker, if the machine is restarted.
        volume_folder::remove(self.process.folder());
        let mut cluster_volumes = self.open_cluster_volumes(spec, &log, runtime)?;
        cluster_volumes
            .begin(start.epoch)
            .map_err(RpcError::failed)?;
        let wasi = Wasi::new(self.config(spec, &own, &log, &cluster_volumes)?)
            .map_err(RpcError::failed)?;
        cluster_volumes.attach(&wasi);
        self.limit_memory(program.meta().memories.len(), spec);
        let machine = Machine::ready_under(start.epoch.token(), program, wasi, own.limits(spec))
            .map_err(RpcError::failed)?;
        if !is_held_at_start(&start.from) {
            self.first_thaw(&machine).map_err(RpcError::failed)?;
        }
        Ok((machine, log, cluster_volumes))
    }

    /// Restores a machine from a checkpoint; it runs unless it is to have parts first.
    fn restore(
        self: &Arc<Self>,
        origin: &Origin,
        start: &Start,
        runtime: &Handle,
    ) -> Result<(Machine, Arc<Log>, ClusterVolumes), RpcError> {
        let spec = &start.spec;
        let repository = Repository::open(&origin.repository).map_err(RpcError::failed)?;
        let folder = volume_folder::folder(self.process.folder());
        let own = WasmSpec::of(spec).map_err(RpcError::failed)?;
        let (engine, limits) = (&self.engine, own.limits(spec));
        let restored = checkpoint::restore(origin, &repository, engine, limits, runtime, &folder)
            .map_err(RpcError::failed)?;
        let program = restored.program;
        self.limit_memory(program.meta().memories.len(), spec);
        self.store_program(program.hash(), program.bytes())?;
        self.prepare_hold(spec, &program);
        let manifest = &restored.manifest;
        // A clone has its own output.
        let base = if origin.is_clone { 0 } else { manifest.log_end };
        let log = Arc::new(Log::open(self.process.folder(), base).map_err(RpcError::failed)?);
        let notice = start.notice.as_deref();
        write_restored(&log, notice, &restored.passed_over, manifest);
        let mut cluster_volumes = self.open_cluster_volumes(spec, &log, runtime)?;
        cluster_volumes
            .roll_back(start.epoch, &manifest.machine, &manifest.id)
            .map_err(RpcError::failed)?;
        for volume in &spec.volumes {
            let guest = &volume.guest;
            match &volume.kind {
                VolumeKind::Host { path } if !volume.read_only => write_notice(
                    &log,
                    &format!("files in {guest} have the present content of {path}"),
                ),
                VolumeKind::Cluster { name, .. } => write_notice(
                    &log,
                    &format!("volume {name} in {guest} has its content of that checkpoint"),
                ),
                VolumeKind::Host { .. } | VolumeKind::Tmp { .. } => {}
            }
        }
        let resources = self.resources(spec, &log, &cluster_volumes)?;
        let wasi =
            Wasi::restore(restored.image.wasi.clone(), resources).map_err(RpcError::failed)?;
        cluster_volumes.attach(&wasi);
        let stands = match restored.rest {
            RemainingMemory::Complete => false,
            RemainingMemory::Lazy(lazy_restore) => self
                .restore_lazily(lazy_restore, start.epoch)
                .map(|()| false)?,
            RemainingMemory::Spanning(spanning_restore) => {
                self.inner().spanning_restore = Some(spanning_restore);
                true
            }
        };
        let machine = Machine::prepare(program, restored.image, restored.memories, wasi, limits)
            .map_err(RpcError::failed)?;
        machine.set_epoch(start.epoch.token());
        if !stands {
            self.first_thaw(&machine).map_err(RpcError::failed)?;
        }
        Ok((machine, log, cluster_volumes))
    }

    /// Reads the memory of a machine while it runs. Damage is found only then, and ends
    /// the machine.
    fn restore_lazily(
        self: &Arc<Self>,
        lazy_restore: LazyRestore,
        epoch: Epoch,
    ) -> Result<(), RpcError> {
        let lazy_restore = Arc::new(lazy_restore);
        self.inner().lazy_restore = Some(lazy_restore.clone());
        let worker = self.clone();
        lazy_restore
            .begin(move |result| {
                let Err(reason) = result else {
                    worker.inner().lazy_restore = None;
                    return;
                };
                tracing::error!(reason, "the machine failed");
                let log = worker.process.log();
                if let Some(log) = &log {
                    write_notice(log, &format!("it failed: {reason}"));
                }
                let status = Status::Failed { reason };
                worker
                    .process
                    .state
                    .send_replace(State::Ended { epoch, status });
            })
            .map_err(RpcError::failed)
    }

    /// Waits until all memory has been read.
    pub(super) fn await_memory(&self) -> Result<(), String> {
        let lazy_restore = self.inner().lazy_restore.clone();
        lazy_restore.map_or(Ok(()), |lazy_restore| lazy_restore.wait())
    }
}

fn is_held_at_start(from: &StartFrom) -> bool {
    matches!(from, StartFrom::Beginning { is_held: true, .. })
}

impl WasmWorker {
    fn sinks(&self, spec: &Spec, log: &Arc<Log>) -> (Box<LogSink>, Box<LogSink>) {
        let sink = |stream| {
            let (log, stalls) = (log.clone(), self.stalls.clone());
            Box::new(LogSink::new(log, stream, spec.output_bytes_per_s, stalls))
        };
        (sink(StreamKind::Output), sink(StreamKind::Error))
    }

    fn config(
        &self,
        spec: &Spec,
        own: &WasmSpec,
        log: &Arc<Log>,
        cluster_volumes: &ClusterVolumes,
    ) -> Result<Config, RpcError> {
        let (stdout, stderr) = self.sinks(spec, log);
        Ok(Config {
            args: own.args.clone(),
            env: own.env.clone(),
            preopens: self.preopens(spec, cluster_volumes)?,
            stdout,
            stderr,
            ..Config::default()
        })
    }

    pub(super) fn resources(
        &self,
        spec: &Spec,
        log: &Arc<Log>,
        cluster_volumes: &ClusterVolumes,
    ) -> Result<Resources, RpcError> {
        let (stdout, stderr) = self.sinks(spec, log);
        let preopens = self.preopens(spec, cluster_volumes)?;
        Ok(Resources {
            preopens: preopens.into_iter().map(|preopen| preopen.source).collect(),
            stdout,
            stderr,
            ..Resources::default()
        })
    }

    fn preopens(
        &self,
        spec: &Spec,
        cluster_volumes: &ClusterVolumes,
    ) -> Result<Vec<Preopen>, RpcError> {
        volumes::preopens(spec, self.process.folder(), &self.stalls, cluster_volumes)
            .map_err(RpcError::failed)
    }
}

impl WasmWorker {
    /// Backends of the machine's cluster volumes, with no claims yet. The loss of a
    /// volume ends the machine.
    pub(super) fn open_cluster_volumes(
        self: &Arc<Self>,
        spec: &Spec,
        log: &Arc<Log>,
        runtime: &Handle,
    ) -> Result<ClusterVolumes, RpcError> {
        let (worker, output) = (Arc::downgrade(self), log.clone());
        let lost = move |reason: &str| {
            write_notice(&output, &format!("the machine is ended: {reason}"));
            let Some(worker) = worker.upgrade() else {
                return;
            };
            let machine = {
                let mut inner = worker.inner();
                inner.ended_for = Some(reason.to_owned());
                inner.machine.clone()
            };
            if let Some(machine) = machine {
                machine.stop();
            }
        };
        let output = log.clone();
        let damaged = move |what: &str| write_notice(&output, what);
        ClusterVolumes::open(
            spec,
            self.process.folder(),
            &self.stalls,
            runtime,
            lost,
            damaged,
        )
        .map_err(RpcError::failed)
    }
}
