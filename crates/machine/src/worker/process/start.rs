//! How a machine begins: anew, from a checkpoint, with memory that is brought later.

use super::super::cluster_volumes::ClusterVolumes;
use super::super::control::{Start, StartFrom, StartPhase, State};
use super::super::volumes;
use super::{Worker, say};
use crate::checkpoint::{self, LazyRestore, Origin, RemainingMemory, Repository};
use crate::log::{Log, LogSink, StreamKind};
use crate::spec::{Spec, Status, VolumeKind};
use keel_cluster::Epoch;
use keel_net::RpcError;
use keel_wasi::{Config, Preopen, Resources, Wasi};
use keel_wasm::runtime::Machine;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::Handle;

impl Worker {
    pub(super) fn start(self: &Arc<Self>, start: Start, runtime: &Handle) -> Result<(), RpcError> {
        if *self.state.borrow() != State::Empty {
            return Err(RpcError::refused("this worker has a machine already"));
        }
        let phase = match &start.from {
            StartFrom::Module(_) | StartFrom::HeldModule(_) => StartPhase::Prepare,
            StartFrom::Checkpoint(_) => StartPhase::Restore,
        };
        self.inner().starting = Some((phase, Instant::now()));
        let (machine, log, keepers) = match &start.from {
            StartFrom::Module(module) | StartFrom::HeldModule(module) => {
                self.begin(module, &start, runtime)?
            }
            StartFrom::Checkpoint(origin) => self.restore(origin, &start, runtime)?,
        };
        let mut inner = self.inner();
        inner.starting = None;
        inner.keepers = keepers;
        inner.name = Some(start.machine);
        inner.spec = Some(start.spec);
        inner.log = Some(log);
        inner.epoch = start.epoch;
        inner.machine = Some(machine.clone());
        let epoch = start.epoch;
        let is_held = inner.later.is_some() || matches!(start.from, StartFrom::HeldModule(_));
        let next = match is_held {
            true => State::Held { epoch },
            false => State::Running { epoch },
        };
        drop(inner);
        self.state.send_if_modified(|state| {
            // Damage may have been found already.
            let first = *state == State::Empty;
            if first {
                *state = next;
            }
            first
        });
        self.watch_end(machine)
    }

    /// A machine at its beginning; it runs, if it is not to have parts first.
    fn begin(
        self: &Arc<Self>,
        module: &Path,
        start: &Start,
        runtime: &Handle,
    ) -> Result<(Machine, Arc<Log>, ClusterVolumes), RpcError> {
        let spec = &start.spec;
        let bytes = std::fs::read(module)
            .map_err(|error| RpcError::failed(format!("{}: {error}", module.display())))?;
        let program = self.engine.load(&bytes).map_err(RpcError::failed)?;
        self.keep_program(program.hash(), program.bytes())?;
        let log = Arc::new(Log::open(&self.folder, 0).map_err(RpcError::failed)?);
        if let Some(notice) = &start.notice {
            say(&log, &format!("{notice}; it begins anew"));
        }
        // Those of a worker that was lost, if it is started again.
        volumes::remove(&self.folder);
        let mut keepers = self.keepers(spec, &log, runtime)?;
        keepers.begin(start.epoch).map_err(RpcError::failed)?;
        let wasi = Wasi::new(self.config(spec, &log, &keepers)?).map_err(RpcError::failed)?;
        keepers.attach(&wasi);
        self.bound(program.meta().memories.len(), spec);
        let machine = Machine::ready_under(start.epoch.token(), program, wasi, spec.limits())
            .map_err(RpcError::failed)?;
        if matches!(start.from, StartFrom::Module(_)) {
            machine.thaw().map_err(RpcError::failed)?;
        }
        Ok((machine, log, keepers))
    }

    /// A machine where its checkpoint was; it runs, if it is not to have parts first.
    fn restore(
        self: &Arc<Self>,
        origin: &Origin,
        start: &Start,
        runtime: &Handle,
    ) -> Result<(Machine, Arc<Log>, ClusterVolumes), RpcError> {
        let spec = &start.spec;
        let vault = Repository::open(&origin.vault).map_err(RpcError::failed)?;
        let folder = volumes::folder(&self.folder);
        let (engine, limits) = (&self.engine, spec.limits());
        let restored = checkpoint::restore(origin, &vault, engine, limits, runtime, &folder)
            .map_err(RpcError::failed)?;
        let program = restored.program;
        self.bound(program.meta().memories.len(), spec);
        self.keep_program(program.hash(), program.bytes())?;
        let manifest = &restored.manifest;
        // A clone's output is its own.
        let base = if origin.is_clone { 0 } else { manifest.log_end };
        let log = Arc::new(Log::open(&self.folder, base).map_err(RpcError::failed)?);
        if let Some(notice) = &start.notice {
            say(&log, notice);
        }
        for why in &restored.passed_over {
            say(&log, &format!("passed over: {why}"));
        }
        say(
            &log,
            &format!(
                "restored from checkpoint {} of machine {}; what it did after that is undone",
                manifest.id, manifest.machine
            ),
        );
        let mut keepers = self.keepers(spec, &log, runtime)?;
        keepers
            .roll_back(start.epoch, &manifest.machine, &manifest.id)
            .map_err(RpcError::failed)?;
        for volume in &spec.volumes {
            let guest = &volume.guest;
            match &volume.kind {
                VolumeKind::Host { path } if !volume.read_only => say(
                    &log,
                    &format!("files in {guest} are as {path} has them now"),
                ),
                VolumeKind::Cluster { name, .. } => say(
                    &log,
                    &format!("volume {name} in {guest} is what it was at that checkpoint again"),
                ),
                VolumeKind::Host { .. } | VolumeKind::Tmp { .. } => {}
            }
        }
        let resources = self.resources(spec, &log, &keepers)?;
        let wasi =
            Wasi::restore(restored.image.wasi.clone(), resources).map_err(RpcError::failed)?;
        keepers.attach(&wasi);
        let stands = match restored.rest {
            RemainingMemory::Complete => false,
            RemainingMemory::Lazy(behind) => self.bring(behind, start.epoch).map(|()| false)?,
            RemainingMemory::Spanning(later) => {
                self.inner().later = Some(later);
                true
            }
        };
        let machine = Machine::prepare(
            program,
            restored.image,
            restored.memories,
            wasi,
            spec.limits(),
        )
        .map_err(RpcError::failed)?;
        machine.set_epoch(start.epoch.token());
        if !stands {
            machine.thaw().map_err(RpcError::failed)?;
        }
        Ok((machine, log, keepers))
    }

    /// Lets the memory of a machine come while it runs. What is damaged is found
    /// only then, and is the machine's end.
    fn bring(self: &Arc<Self>, behind: LazyRestore, epoch: Epoch) -> Result<(), RpcError> {
        let behind = Arc::new(behind);
        self.inner().behind = Some(behind.clone());
        let worker = self.clone();
        behind
            .begin(move |result| {
                let Err(reason) = result else {
                    worker.inner().behind = None;
                    return;
                };
                tracing::error!(reason, "the machine cannot go on");
                let log = worker.inner().log.clone();
                if let Some(log) = &log {
                    say(log, &format!("it cannot go on: {reason}"));
                }
                let status = Status::Failed { reason };
                worker.state.send_replace(State::Ended { epoch, status });
            })
            .map_err(RpcError::failed)
    }

    /// Waits until all of its memory is here.
    pub(super) fn await_memory(&self) -> Result<(), String> {
        let behind = self.inner().behind.clone();
        behind.map_or(Ok(()), |behind| behind.wait())
    }
}

impl Worker {
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
        log: &Arc<Log>,
        keepers: &ClusterVolumes,
    ) -> Result<Config, RpcError> {
        let (stdout, stderr) = self.sinks(spec, log);
        Ok(Config {
            args: spec.args.clone(),
            env: spec.env.clone(),
            preopens: self.preopens(spec, keepers)?,
            stdout,
            stderr,
            ..Config::default()
        })
    }

    pub(super) fn resources(
        &self,
        spec: &Spec,
        log: &Arc<Log>,
        keepers: &ClusterVolumes,
    ) -> Result<Resources, RpcError> {
        let (stdout, stderr) = self.sinks(spec, log);
        let preopens = self.preopens(spec, keepers)?;
        Ok(Resources {
            preopens: preopens.into_iter().map(|preopen| preopen.source).collect(),
            stdout,
            stderr,
            ..Resources::default()
        })
    }

    fn preopens(&self, spec: &Spec, keepers: &ClusterVolumes) -> Result<Vec<Preopen>, RpcError> {
        volumes::preopens(spec, &self.folder, &self.stalls, keepers).map_err(RpcError::failed)
    }
}

impl Worker {
    /// Keepers of the machine's cluster volumes, which have claimed nothing yet. One
    /// that loses its volume ends the machine.
    pub(super) fn keepers(
        self: &Arc<Self>,
        spec: &Spec,
        log: &Arc<Log>,
        runtime: &Handle,
    ) -> Result<ClusterVolumes, RpcError> {
        let (worker, output) = (Arc::downgrade(self), log.clone());
        let lost = move |reason: &str| {
            say(&output, &format!("the machine is ended: {reason}"));
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
        let damaged = move |what: &str| say(&output, what);
        ClusterVolumes::open(spec, &self.folder, &self.stalls, runtime, lost, damaged)
            .map_err(RpcError::failed)
    }
}
