//! The state of a worker, and what its agent asks of every kind of machine
//! (`keel_machine::worker::Worker`). Requests that only this kind has are in `requests`.

use super::activity;
use super::cluster_volumes::ClusterVolumes;
use super::post_copy::PostCopyTarget;
use super::source::SourceSession;
use super::spanning::SpanState;
use crate::checkpoint::{Checkpointer, LazyRestore, SpanningRestore};
use crate::control::HomeHandover;
use crate::span::MemberPart;
use crate::spec::{THREADS_MAX, WasmSpec};
use keel_cluster::{Epoch, MachineName};
use keel_machine::cgroup;
use keel_machine::kind::WorkerFolders;
use keel_machine::link::{Link, LinkError, Message};
use keel_machine::log::StreamKind;
use keel_machine::moves::prediction::Activity;
use keel_machine::spec::{Spec, Status};
use keel_machine::worker::control::{
    Checkpoint, CheckpointReport, Copy, FileDone, FileRequest, Receive, Report, Start, StartPhase,
    StartProgress, State, VolumeReport,
};
use keel_machine::worker::{Connect, MoveState, Process, Receiver, Worker};
use keel_machine::worker::{files, volume_folder};
use keel_net::{BoxFuture, Bytes, Fingerprint, Reply, RpcError};
use keel_wasi::Files;
use keel_wasi::volume::Stalls;
use keel_wasm::runtime::{Engine, Hold, Machine, MachineError, Options, Outcome};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use tokio::runtime::Handle;

/// The worker process of one machine.
pub(super) struct WasmWorker {
    pub(super) process: Process,
    /// Held while the machine's writes are tracked, except by a move.
    pub(super) tracking: Mutex<()>,
    pub(super) images: PathBuf,
    programs: PathBuf,
    pub(super) engine: Engine,
    inner: Mutex<WorkerState>,
    pub(super) stalls: Arc<Stalls>,
}

/// What changes during the worker's life, behind one lock.
#[derive(Default)]
pub(super) struct WorkerState {
    pub(super) name: Option<MachineName>,
    pub(super) machine: Option<Machine>,
    pub(super) spec: Option<Spec>,
    pub(super) moves: MoveState<SourceSession>,
    /// Makes checkpoints; absent while it does.
    pub(super) checkpointer: Option<Checkpointer>,
    /// Set while a checkpoint is made; ends it early.
    pub(super) give_up_checkpoint: Option<Arc<AtomicBool>>,
    /// The parts of the machine, or the part that this process is.
    pub(super) parts: SpanState,
    /// For a machine that spans and is ready here: the part that becomes its home.
    pub(super) handover: Option<(Arc<MemberPart>, HomeHandover)>,
    /// Why a received machine was dropped, where this process remains a part of it.
    pub(super) dropped_for: Option<String>,
    /// Receives the memory of a machine that arrived, while it runs.
    pub(super) post_copy_target: Option<PostCopyTarget>,
    /// Where the connection of a post-copy move goes once the machine runs.
    pub(super) post_copy_links: Option<Sender<Link>>,
    /// Whether the source has named all pages that are still to come.
    pub(super) all_named: bool,
    /// Reads the memory of a restored machine, while it runs.
    pub(super) lazy_restore: Option<Arc<LazyRestore>>,
    /// The memory of a restored machine, to be read once it has parts.
    pub(super) spanning_restore: Option<SpanningRestore>,
    pub(super) cluster_volumes: ClusterVolumes,
    /// Why it had to be ended.
    pub(super) ended_for: Option<String>,
    /// The present phase of the start, and since when.
    pub(super) starting: Option<(StartPhase, Instant)>,
}

/// Runs a worker until its agent ends it.
///
/// # Errors
/// If its folders or socket cannot be used.
pub(crate) fn run(folders: &WorkerFolders) -> Result<(), String> {
    keel_machine::worker::run(&folders.folder, |process| {
        let programs = &folders.programs;
        std::fs::create_dir_all(programs)
            .map_err(|error| format!("{}: {error}", programs.display()))?;
        // Compilation uses all processors but yields to running guests.
        rayon::ThreadPoolBuilder::new()
            .thread_name(|number| format!("compile-{number}"))
            .start_handler(|_| cgroup::yield_compile_thread())
            .build_global()
            .map_err(|error| format!("no threads to compile: {error}"))?;
        let engine = Engine::with_cache(Options::default(), &folders.cache)
            .map_err(|error| format!("the engine: {error}"))?;
        let engine = match cgroup::guest_nice() {
            Some(nice) => engine.with_guest_nice(nice),
            None => engine,
        };
        let stalled = process.paused.clone();
        Ok(WasmWorker {
            stalls: Arc::new(Stalls::new(move |full| {
                stalled.send_replace(full);
            })),
            process,
            tracking: Mutex::default(),
            images: folders.images.clone(),
            programs: programs.clone(),
            engine,
            inner: Mutex::default(),
        })
    })
}

impl Worker for WasmWorker {
    type Session = SourceSession;

    fn process(&self) -> &Process {
        &self.process
    }

    fn moves<R>(&self, access: impl FnOnce(&mut MoveState<SourceSession>) -> R) -> R {
        access(&mut self.inner().moves)
    }

    fn start(self: &Arc<Self>, start: Start, runtime: &Handle) -> Result<(), RpcError> {
        self.start_machine(start, runtime)
    }

    fn describe(&self, report: &mut Report) {
        let machine = {
            let inner = self.inner();
            report.parts = inner.parts.count();
            report.start = self.start_progress(&inner);
            inner.machine.clone()
        };
        // Without the lock: a machine that writes to a slow disk answers late, and whoever holds it
        // for its lease needs the lock.
        if let Some(machine) = &machine {
            let memories = machine.memories().iter();
            report.program = Some(*machine.program().hash());
            report.threads = machine.threads().len() as u32;
            report.memory_pages = memories.map(|memory| memory.size_bytes() >> 16).collect();
            report.memory_bytes = report.memory_pages.iter().sum::<u64>() << 16;
            report.volumes = volume_reports(machine);
        }
    }

    fn stop(&self) {
        let machine = self.inner().machine.clone();
        if let Some(machine) = machine {
            machine.stop();
        }
    }

    fn set(&self, spec: Spec) -> Result<(), RpcError> {
        self.set_limits(spec)
    }

    fn release(&self) {
        // The checkpoint is not read any more.
        let spanning_restore = self.inner().spanning_restore.take();
        if let Some(spanning_restore) = spanning_restore {
            spanning_restore.release();
        }
    }

    fn prepare_move(&self) {
        self.prepare_resume();
    }

    fn begin_move(self: &Arc<Self>, copy: &Copy) -> Result<Connect<SourceSession>, String> {
        self.begin_session(copy, None)
    }

    fn stay_under(&self, epoch: Epoch) {
        let (machine, cluster_volumes) = {
            let inner = self.inner();
            (inner.machine.clone(), inner.cluster_volumes.clone())
        };
        if let Some(machine) = machine {
            machine.set_epoch(epoch.token());
        }
        cluster_volumes.claim_under(epoch);
    }

    fn thaw(&self) -> Result<(), RpcError> {
        let machine = self.inner().machine.clone();
        let machine = machine.ok_or_else(|| RpcError::refused("no machine"))?;
        machine.thaw().map_err(RpcError::failed)
    }

    fn hold_for_lease(&self) -> bool {
        let machine = self.inner().machine.clone();
        machine.is_none_or(|machine| {
            hold_without_lease(&machine);
            machine.stands_still()
        })
    }

    fn release_for_lease(&self) {
        let machine = self.inner().machine.clone();
        if let Some(machine) = machine {
            machine.release(Hold::NotAllowed);
        }
    }

    fn begin_receive(
        self: &Arc<Self>,
        request: Receive,
        runtime: &Handle,
    ) -> Result<Receiver, RpcError> {
        self.prepare_target(request, runtime)
    }

    fn before_resume(&self) {
        let post_copy_target = self.inner().post_copy_target.clone();
        if let Some(post_copy_target) = post_copy_target {
            post_copy_target.wait_named();
        }
    }

    fn source_message(&self, message: &Message) -> Result<bool, LinkError> {
        self.handle_names(message)
    }

    fn expects_more(&self) -> bool {
        self.inner().post_copy_target.is_some()
    }

    fn after_source(&self, link: Link) {
        self.hand_to_post_copy(link);
    }

    fn source_lost(&self) {
        let post_copy_target = self.inner().post_copy_target.clone();
        if let Some(post_copy_target) = post_copy_target {
            post_copy_target.names_lost();
        }
    }

    fn resume(self: &Arc<Self>, epoch: Epoch) -> Result<(), String> {
        self.resume_received(epoch);
        Ok(())
    }

    fn resumed(self: &Arc<Self>, epoch: Epoch) -> State {
        self.after_resume(epoch)
    }

    fn drop_received(&self, reason: &str) {
        self.drop_machine(reason);
    }

    fn checkpoint(
        &self,
        request: &Checkpoint,
        runtime: &Handle,
    ) -> Result<CheckpointReport, RpcError> {
        self.make_checkpoint(request, runtime)
    }

    fn end_checkpoint(&self) -> Result<(), RpcError> {
        self.end_checkpoints().map_err(RpcError::failed)
    }

    fn activity(&self) -> Result<Activity, RpcError> {
        self.sample_activity()
    }

    fn file(&self, request: FileRequest) -> Result<FileDone, RpcError> {
        self.act_on_file(request)
    }

    fn answer(
        self: Arc<Self>,
        kind: u16,
        payload: Bytes,
    ) -> BoxFuture<'static, Result<Reply, RpcError>> {
        Box::pin(super::requests::answer(self, kind, payload))
    }
}

impl WasmWorker {
    pub(super) fn inner(&self) -> MutexGuard<'_, WorkerState> {
        self.inner.lock().unwrap_or_else(|error| error.into_inner())
    }

    /// Lets a machine run for the first time here, unless it needs a lease and there is none.
    pub(super) fn first_thaw(&self, machine: &Machine) -> Result<(), MachineError> {
        let lease = self.process.lease();
        lease.resume(|| hold_without_lease(machine), || machine.thaw())
    }

    /// Samples the machine's writes for a moment.
    fn sample_activity(&self) -> Result<Activity, RpcError> {
        let busy = |why| Err(RpcError::failed(format!("{why}; try again")));
        let Ok(_tracking) = self.tracking.try_lock() else {
            return busy("a checkpoint of it is being made");
        };
        let (machine, mut checkpointer) = {
            let mut inner = self.inner();
            if inner.moves.is_moving_away() {
                return busy("the machine is moving");
            }
            if inner.parts.count() > 0 {
                return Err(RpcError::failed(
                    "of a machine with parts only its home moves, and its duration is not predicted",
                ));
            }
            if inner.post_copy_target.is_some() || inner.lazy_restore.is_some() {
                return busy("a part of its memory is still to come");
            }
            if matches!(*self.process.state.borrow(), State::Held { .. }) {
                return busy("its memory is still to come");
            }
            let machine = inner.machine.clone();
            let machine = machine.ok_or_else(|| RpcError::failed("no machine runs here"))?;
            (machine, inner.checkpointer.take())
        };
        let volumes = volume_reports(&machine);
        let volume_bytes = volumes.iter().map(|volume| volume.bytes).sum();
        let sampled = activity::sample(machine.memories(), checkpointer.as_mut(), volume_bytes);
        let mut inner = self.inner();
        // A move that began meanwhile has its own trackers.
        if !inner.moves.is_moving_away() {
            inner.checkpointer = checkpointer;
        }
        sampled.map_err(RpcError::failed)
    }

    /// Loads the code that threads need to resume after a safepoint, or compiles it if
    /// the agent has not: a freeze must not wait for it.
    pub(super) fn prepare_resume(&self) {
        let Some(machine) = self.inner().machine.clone() else {
            return;
        };
        let thread = std::thread::Builder::new()
            .name("prepare".into())
            .spawn(move || {
                if let Err(error) = machine.program().prepare_resume() {
                    tracing::warn!(%error, "the machine cannot be moved");
                }
            });
        if let Err(error) = thread {
            tracing::warn!(%error, "its code is not loaded: the first move will load it");
        }
    }

    /// Stores an instrumented module where other nodes can fetch it.
    pub(super) fn store_program(&self, hash: &[u8; 32], bytes: &[u8]) -> Result<(), RpcError> {
        let path = self.programs.join(format!("{}.wasm", Fingerprint(*hash)));
        if path.exists() {
            return Ok(());
        }
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        std::fs::write(&temporary, bytes)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(|error| RpcError::failed(format!("{}: {error}", path.display())))
    }

    /// Reports the end of the machine to the agent.
    pub(super) fn watch_end(self: &Arc<Self>, machine: Machine) -> Result<(), RpcError> {
        let worker = self.clone();
        std::thread::Builder::new()
            .name("end".into())
            .spawn(move || {
                let Some(outcome) = machine.wait(None) else {
                    return;
                };
                let epoch = {
                    let inner = worker.inner();
                    if inner.machine.is_none() {
                        return;
                    }
                    inner.moves.epoch
                };
                // Members end with the machine; taken out first, because ending them
                // takes a moment.
                let mut parts = std::mem::take(&mut worker.inner().parts);
                let lost = parts.end();
                machine.wasi().finish();
                // The next holder of its volumes must find all that it wrote.
                let cluster_volumes = worker.inner().cluster_volumes.clone();
                cluster_volumes.finish();
                volume_folder::remove(worker.process.folder());
                let log = worker.process.log();
                let status = match outcome {
                    Outcome::Exit(code) => Status::Exited { code },
                    Outcome::Trap(trap) => {
                        if let Some(log) = &log {
                            let text = format!("keel: {trap}\n");
                            if let Err(error) = log.append(StreamKind::Error, text.as_bytes()) {
                                tracing::warn!(%error, "cannot write a trap to the output");
                            }
                        }
                        Status::Trapped {
                            message: trap.to_string(),
                        }
                    }
                    Outcome::Stopped => match worker.inner().ended_for.take().or(lost) {
                        Some(reason) => Status::Failed { reason },
                        None => Status::Stopped,
                    },
                };
                worker
                    .process
                    .state
                    .send_replace(State::Ended { epoch, status });
                if let Some(log) = log {
                    log.close();
                }
            })
            .map(drop)
            .map_err(RpcError::failed)
    }

    /// The phase before the machine runs; also the compilation at the target of a move
    /// before it can receive the machine.
    fn start_progress(&self, inner: &WorkerState) -> Option<StartProgress> {
        if inner.machine.is_some() {
            return None;
        }
        if let Some(compile) = self.engine.compile_progress() {
            return Some(StartProgress {
                phase: StartPhase::Compile,
                elapsed_ms: compile.elapsed.as_millis() as u64,
                percent: Some(compile.percent()),
            });
        }
        let (phase, begun) = inner.starting?;
        Some(StartProgress {
            phase,
            elapsed_ms: begun.elapsed().as_millis() as u64,
            percent: None,
        })
    }

    /// Performs a user's operation on a file in one of the machine's own volumes.
    fn act_on_file(&self, request: FileRequest) -> Result<FileDone, RpcError> {
        // A write while the machine is frozen would be missing in moves and checkpoints,
        // or partly included: operations and freezing exclude each other.
        let Some(machine) = self.inner().machine.clone() else {
            return Ok(FileDone::Busy);
        };
        let volumes = machine.wasi().volumes().into_iter();
        let mut volumes = volumes.filter(|(number, _)| *number == request.volume);
        let (_, volume) = volumes
            .next()
            .ok_or_else(|| RpcError::failed("the machine has no such volume"))?;
        let files = Files::Volume(volume);
        if !request.op.writes() {
            // Waits for missing blocks without holding locks.
            return files::act(&files, request.op).map_err(RpcError::failed);
        }
        files::prefetch_blocks(&files, &request.op);
        let _freezing = self.process.freezing();
        {
            let inner = self.inner();
            if inner.moves.is_moving_away()
                || inner.give_up_checkpoint.is_some()
                || inner.machine.is_none()
            {
                return Ok(FileDone::Busy);
            }
        }
        files::act(&files, request.op).map_err(RpcError::failed)
    }

    /// Changes the limits of the running machine.
    fn set_limits(&self, spec: Spec) -> Result<(), RpcError> {
        // A move has told its target the machine's limits.
        let _freezing = self.process.freezing();
        let (machine, before) = {
            let inner = self.inner();
            match (&inner.machine, &inner.spec) {
                _ if inner.moves.is_moving_away() => return Err(RpcError::failed("it is moving")),
                (_, Some(before))
                    if inner.parts.count() > 0
                        && (spec.memory_bytes != before.memory_bytes
                            || spec.cpu_limit_millis.is_some()) =>
                {
                    let refusal = inner.parts.refusal();
                    return Err(RpcError::failed(refusal.unwrap_or_default()));
                }
                (Some(machine), Some(spec)) => (machine.clone(), spec.clone()),
                _ => return Err(RpcError::failed("no machine runs here")),
            }
        };
        let memories = machine.memories().len();
        // The cgroup's limit is never below the machine's own.
        if spec.memory_bytes > before.memory_bytes {
            self.limit_memory(memories, &spec);
        }
        if let Err(size) = machine.limit_memory(spec.memory_bytes) {
            return Err(RpcError::failed(format!(
                "a memory of it has {size} bytes already, and memory does not shrink: {} bytes are too few",
                spec.memory_bytes
            )));
        }
        machine.limit_cpu(spec.cpu_limit_millis);
        self.limit_memory(memories, &spec);
        let part_bytes = spec.balancing.part_memory_bytes;
        let mut inner = self.inner();
        inner.spec = Some(spec);
        inner.parts.limit(part_bytes).map_err(RpcError::failed)
    }

    /// Sets the memory limit of this process's cgroup for a machine with this number of
    /// memories.
    pub(super) fn limit_memory(&self, memories: usize, spec: &Spec) {
        let Some(group) = self.process.group() else {
            return;
        };
        let threads_max = WasmSpec::of(spec).map_or(THREADS_MAX, |own| own.threads_max);
        let limit = cgroup::memory_limit_bytes(memories, spec.memory_bytes, threads_max);
        if let Err(error) = group.limit_memory(limit) {
            tracing::warn!(error, "cannot limit the memory of this worker");
        }
    }
}

/// Holds all threads of a machine that has no lease.
fn hold_without_lease(machine: &Machine) {
    if let Err(error) = machine.hold(Hold::NotAllowed, None) {
        // The timer of the lease ends the process.
        tracing::error!(%error, "the machine cannot be held");
    }
}

fn volume_reports(machine: &Machine) -> Vec<VolumeReport> {
    let volumes = machine.wasi().volumes().into_iter();
    volumes
        .map(|(number, volume)| {
            let usage = volume.usage();
            VolumeReport {
                number,
                bytes: usage.bytes,
                inodes: usage.inodes,
            }
        })
        .collect()
}
