//! The worker process: one machine, a socket for its agent, and the threads that moves
//! need.
//!
//! - `start`: starting the machine
//! - `checkpoints`: making checkpoints
//! - `source`: moving the machine away
//! - `target`: receiving the machine

mod checkpoints;
mod source;
mod start;
mod target;

use super::SOCKET;
use super::activity;
use super::cluster_volumes::ClusterVolumes;
use super::control::{
    Checkpoint, Copy, CopyHome, FileDone, FileRequest, HomeHandover, LogChunk, Positional, ReadLog,
    Receive, Report, Start, StartPhase, StartProgress, State, VolumeReport, kind, pack, unpack,
};
use super::files;
use super::post_copy::PostCopyTarget;
use super::source::SourceTask;
use super::spanning::SpanState;
use super::volumes;
use crate::cgroup::{self, Group};
use crate::checkpoint::{Checkpointer, LazyRestore, SpanningRestore};
use crate::log::{Log, StreamKind};
use crate::moves::prediction::Activity;
use crate::moves::{FillReport, TargetMove};
use crate::span::MemberPart;
use crate::spec::{Spec, Status};
use keel_cluster::{Epoch, MachineName};
use keel_net::rpc::everyone_is_member;
use keel_net::{
    BoxFuture, Bytes, Fingerprint, Handler, Options as RpcOptions, PeerId, PinnedIdentity, Reply,
    RpcError, Server,
};
use keel_wasi::Files;
use keel_wasi::volume::Stalls;
use keel_wasm::runtime::{Engine, Machine, Options, Outcome};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

/// Time for the answer to a worker's last request to be sent, and for entries in a store
/// to be removed.
const FORGET_AFTER: Duration = Duration::from_millis(20);
const RELEASE_TIMEOUT: Duration = Duration::from_millis(300);
/// Bytes of output in one answer.
const LOG_CHUNK_BYTES: usize = 64 << 10;

pub(super) struct Worker {
    /// Held while the machine is being frozen and sent, or thawed.
    pub(super) freezing: Mutex<()>,
    /// Held while the machine's writes are tracked, except by a move.
    pub(super) tracking: Mutex<()>,
    /// Held during a step of the target's state machine.
    stepping: Mutex<()>,
    folder: PathBuf,
    programs: PathBuf,
    pub(super) engine: Engine,
    inner: Mutex<Inner>,
    pub(super) state: watch::Sender<State>,
    stalls: Arc<Stalls>,
    /// Why the machine waits for disk space, if it does.
    paused: watch::Sender<Option<String>>,
    /// The cgroup of this process, if it has its own.
    group: Option<Group>,
}

#[derive(Default)]
pub(super) struct Inner {
    pub(super) name: Option<MachineName>,
    pub(super) machine: Option<Machine>,
    log: Option<Arc<Log>>,
    pub(super) epoch: Epoch,
    pub(super) spec: Option<Spec>,
    /// Makes checkpoints; absent while it does.
    pub(super) checkpointer: Option<Checkpointer>,
    /// Set while a checkpoint is made; ends it early.
    pub(super) give_up_checkpoint: Option<Arc<AtomicBool>>,
    /// The parts of the machine, or the part that this process is.
    pub(super) parts: SpanState,
    identity: Option<PinnedIdentity>,
    outgoing: Option<SourceTask>,
    /// From the first page sent until the machine resumes here.
    pub(super) moving_away: bool,
    /// A thread copies, or tells the target to resume, and owns the session of the move.
    copying: bool,
    going: bool,
    /// Ends the copying of a machine that spans.
    give_up: Option<Arc<AtomicBool>>,
    /// Counts the attempts to move the machine: a late thread of an earlier attempt must
    /// not affect the next one.
    attempt: u64,
    /// The move was given up: a freeze that starts or is in progress must not leave the
    /// machine frozen.
    given_up: bool,
    /// Closes the connection that a copying thread uses.
    closer: Option<std::net::TcpStream>,
    target: Option<TargetMove>,
    /// For a machine that spans and is ready here: the part that becomes its home.
    handover: Option<(Arc<MemberPart>, HomeHandover)>,
    /// Why a received machine was dropped, where this process remains a part of it.
    pub(super) dropped_for: Option<String>,
    /// Receives the memory of a machine that arrived, while it runs.
    pub(super) post_copy_target: Option<PostCopyTarget>,
    /// Reads the memory of a restored machine, while it runs.
    pub(super) lazy_restore: Option<Arc<LazyRestore>>,
    /// The memory of a restored machine, to be read once it has parts.
    pub(super) spanning_restore: Option<SpanningRestore>,
    /// Set once the source sends pages of a machine that runs at the target.
    serving: bool,
    post_copy: bool,
    /// Bytes that are still to be sent.
    unsent: Arc<AtomicU64>,
    /// The report of post-copy.
    fill: Option<FillReport>,
    cluster_volumes: ClusterVolumes,
    /// Why it had to be ended.
    pub(super) ended_for: Option<String>,
    /// The present phase of the start, and since when.
    starting: Option<(StartPhase, Instant)>,
}

impl Inner {
    /// Whether an attempt to move the machine is the present one.
    fn is_attempt(&self, attempt: u64) -> bool {
        self.attempt == attempt && !self.given_up
    }
}

/// Runs a worker until its agent ends it. `folder` has its socket and output, `cache` the
/// node's compiled code, `programs` its instrumented modules.
///
/// # Errors
/// If its folder or socket cannot be used.
pub fn run(folder: &Path, cache: &Path, programs: &Path) -> Result<(), String> {
    crate::failpoint::set_from_environment();
    cgroup::expose_worker_to_oom();
    // First, so that all further allocations are counted in the cgroup.
    let group = Group::load(folder).filter(|group| {
        let joined = group.join();
        if let Err(error) = &joined {
            tracing::warn!(error, "this worker has no cgroup of its own");
        }
        joined.is_ok()
    });
    std::fs::create_dir_all(programs)
        .map_err(|error| format!("{}: {error}", programs.display()))?;
    // Compilation uses all processors but yields to running guests.
    rayon::ThreadPoolBuilder::new()
        .thread_name(|number| format!("compile-{number}"))
        .start_handler(|_| cgroup::yield_compile_thread())
        .build_global()
        .map_err(|error| format!("no threads to compile: {error}"))?;
    let engine = Engine::with_cache(Options::default(), cache)
        .map_err(|error| format!("the engine: {error}"))?;
    let engine = match cgroup::guest_nice() {
        Some(nice) => engine.with_guest_nice(nice),
        None => engine,
    };
    let paused = watch::Sender::new(None);
    let stalled = paused.clone();
    let worker = Arc::new(Worker {
        stalls: Arc::new(Stalls::new(move |full| {
            stalled.send_replace(full);
        })),
        paused,
        group,
        freezing: Mutex::default(),
        tracking: Mutex::default(),
        stepping: Mutex::default(),
        folder: folder.to_owned(),
        programs: programs.to_owned(),
        engine,
        inner: Mutex::default(),
        state: watch::Sender::new(State::Empty),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| format!("no runtime: {error}"))?;
    runtime.block_on(serve(worker))
}

async fn serve(worker: Arc<Worker>) -> Result<(), String> {
    let path = worker.folder.join(SOCKET);
    let temporary = worker.folder.join("socket.new");
    // A socket that exists accepts connections: it is renamed into place once it listens.
    let _ = std::fs::remove_file(&temporary);
    let listener = tokio::net::UnixListener::bind(&temporary)
        .and_then(|listener| std::fs::rename(&temporary, &path).map(|()| listener))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let handler = Arc::new(Service(worker));
    loop {
        let (stream, _) = listener
            .accept()
            .await
            .map_err(|error| format!("{}: {error}", path.display()))?;
        tokio::spawn(Server::serve_connection(
            stream,
            // Only this user can enter the socket's folder.
            PeerId::Pinned(Fingerprint([0; 32])),
            everyone_is_member(),
            handler.clone(),
            RpcOptions::default(),
        ));
    }
}

struct Service(Arc<Worker>);

impl Handler for Service {
    fn call(
        &self,
        _peer: PeerId,
        kind: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>> {
        let worker = self.0.clone();
        Box::pin(async move { worker.answer(kind, payload).await })
    }
}

/// Runs a blocking function outside of the runtime.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RpcError> + Send + 'static,
) -> Result<T, RpcError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(RpcError::unknown)?
}

impl Worker {
    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|error| error.into_inner())
    }

    async fn answer(self: Arc<Self>, kind: u16, payload: Bytes) -> Result<Reply, RpcError> {
        match kind {
            kind::START => {
                let start: Start = unpack(&payload)?;
                let runtime = Handle::current();
                blocking(move || self.start(start, &runtime)).await?;
                Ok(pack(&())?.into())
            }
            kind::RECEIVE => {
                let request: Receive = unpack(&payload)?;
                let runtime = Handle::current();
                let receiving = blocking(move || self.receive(request, &runtime)).await?;
                Ok(pack(&receiving)?.into())
            }
            kind::REPORT => {
                let report = blocking(move || Ok(self.report())).await?;
                Ok(pack(&report)?.into())
            }
            kind::STATES => Ok(Reply::Stream(follow(self.state.subscribe()))),
            kind::STALLS => Ok(Reply::Stream(follow(self.paused.subscribe()))),
            kind::IDENTITY => {
                let identity = PinnedIdentity::generate().map_err(RpcError::refused)?;
                let fingerprint = identity.fingerprint;
                self.inner().identity = Some(identity);
                // A move is being offered.
                self.prepare_resume();
                Ok(pack(&fingerprint)?.into())
            }
            kind::COPY => {
                let copy: Copy = unpack(&payload)?;
                let (send, events) = mpsc::channel(64);
                std::thread::Builder::new()
                    .name("move-out".into())
                    .spawn(move || self.copy(&copy, None, &send))
                    .map_err(RpcError::refused)?;
                Ok(Reply::Stream(events))
            }
            kind::COPY_HOME => {
                let copy: CopyHome = unpack(&payload)?;
                let (send, events) = mpsc::channel(64);
                std::thread::Builder::new()
                    .name("move-out".into())
                    .spawn(move || self.copy_home(&copy, &send))
                    .map_err(RpcError::refused)?;
                Ok(Reply::Stream(events))
            }
            kind::END_CHECKPOINT => {
                blocking(move || {
                    self.without_checkpoint()
                        .map(drop)
                        .map_err(RpcError::failed)
                })
                .await?;
                Ok(pack(&())?.into())
            }
            kind::IS_PART => Ok(pack(&self.inner().parts.member())?.into()),
            kind::FREEZE => {
                let frozen = blocking(move || self.freeze()).await?;
                Ok(pack(&frozen)?.into())
            }
            kind::GO => {
                let epoch: Epoch = unpack(&payload)?;
                let micros = blocking(move || self.go(epoch)).await?;
                Ok(pack(&micros)?.into())
            }
            kind::THAW => {
                let epoch: Epoch = unpack(&payload)?;
                blocking(move || self.thaw(epoch)).await?;
                Ok(pack(&())?.into())
            }
            kind::ABORT => {
                let reason: String = unpack(&payload)?;
                blocking(move || {
                    self.abort(reason);
                    Ok(())
                })
                .await?;
                Ok(pack(&())?.into())
            }
            kind::SERVE => {
                self.serve()?;
                Ok(pack(&())?.into())
            }
            kind::STOP => {
                if let Some(machine) = &self.inner().machine {
                    machine.stop();
                }
                Ok(pack(&())?.into())
            }
            kind::SPAN_READY => {
                let meet = unpack(&payload)?;
                let place = blocking(move || self.prepare_home(&meet)).await?;
                Ok(pack(&place)?.into())
            }
            kind::PREPARE_MEMBER => {
                let ready = unpack(&payload)?;
                let place = blocking(move || self.prepare_member(&ready)).await?;
                Ok(pack(&place)?.into())
            }
            kind::SPAN => {
                let span = unpack(&payload)?;
                let micros = blocking(move || self.span(span)).await?;
                Ok(pack(&micros)?.into())
            }
            kind::JOIN => {
                let join = unpack(&payload)?;
                blocking(move || self.join(&join)).await?;
                Ok(pack(&())?.into())
            }
            kind::UNSPAN => {
                let micros = blocking(move || self.unspan()).await?;
                Ok(pack(&micros)?.into())
            }
            kind::RESTORE_SPANNING => {
                let bytes = blocking(move || self.restore_to_parts()).await?;
                Ok(pack(&bytes)?.into())
            }
            kind::CONNECT_NEW_PART => {
                let meet = unpack(&payload)?;
                let place = blocking(move || self.connect_new_part(&meet)).await?;
                Ok(pack(&place)?.into())
            }
            kind::ADD_PART => {
                let join = unpack(&payload)?;
                let micros = blocking(move || self.add_part(join)).await?;
                Ok(pack(&micros)?.into())
            }
            kind::REMOVE_PART => {
                let part = unpack(&payload)?;
                let micros = blocking(move || self.remove_part(part)).await?;
                Ok(pack(&micros)?.into())
            }
            kind::PARTS => {
                let parts = blocking(move || self.parts()).await?;
                Ok(pack(&parts)?.into())
            }
            kind::MOVE_THREAD => {
                let thread = unpack(&payload)?;
                blocking(move || self.move_thread(thread)).await?;
                Ok(pack(&())?.into())
            }
            kind::ROOM => {
                let room = unpack(&payload)?;
                blocking(move || self.room(room)).await?;
                Ok(pack(&())?.into())
            }
            kind::OBJECTS => {
                let objects = blocking(move || self.objects()).await?;
                Ok(pack(&Positional(objects))?.into())
            }
            kind::HEAT => {
                let heat = blocking(move || self.heat()).await?;
                Ok(pack(&Positional(heat))?.into())
            }
            kind::MOVE_OBJECT => {
                let object = unpack(&payload)?;
                let bytes = blocking(move || self.move_object(object)).await?;
                Ok(pack(&bytes)?.into())
            }
            kind::SET => {
                let spec: Spec = unpack(&payload)?;
                blocking(move || self.set(spec)).await?;
                Ok(pack(&())?.into())
            }
            kind::FILE => {
                let request: FileRequest = unpack(&payload)?;
                let done = blocking(move || self.file(request)).await?;
                Ok(pack(&done)?.into())
            }
            kind::FORGET => {
                // The checkpoint is not read any more.
                let spanning_restore = self.inner().spanning_restore.take();
                let release = spanning_restore.map(|spanning_restore| {
                    tokio::task::spawn_blocking(|| spanning_restore.release())
                });
                // The answer is sent first; nothing here needs to be saved.
                tokio::spawn(async {
                    tokio::time::sleep(FORGET_AFTER).await;
                    if let Some(release) = release {
                        let _ = tokio::time::timeout(RELEASE_TIMEOUT, release).await;
                    }
                    std::process::exit(0);
                });
                Ok(pack(&())?.into())
            }
            kind::CHECKPOINT => {
                let request: Checkpoint = unpack(&payload)?;
                let runtime = Handle::current();
                let taken = blocking(move || self.checkpoint(&request, &runtime)).await?;
                Ok(pack(&taken)?.into())
            }
            kind::ACTIVITY => {
                let activity = blocking(move || self.activity()).await?;
                Ok(pack(&activity)?.into())
            }
            kind::LOG => {
                let read: ReadLog = unpack(&payload)?;
                let (send, chunks) = mpsc::channel(16);
                std::thread::Builder::new()
                    .name("log".into())
                    .spawn(move || self.read_log(&read, &send))
                    .map_err(RpcError::refused)?;
                Ok(Reply::Stream(chunks))
            }
            kind::LOG_SINCE => {
                let since: u64 = unpack(&payload)?;
                let log = self.inner().log.clone();
                let log = log.ok_or_else(|| RpcError::failed("it has no output here yet"))?;
                let offset = blocking(move || {
                    let offset = log.offset_since(since);
                    offset.map_err(|error| RpcError::failed(format!("{}: {error}", log.place())))
                });
                Ok(pack(&offset.await?)?.into())
            }
            kind::FAILPOINT => {
                let (name, order): (String, Option<String>) = unpack(&payload)?;
                let order = order.map(|order| order.parse()).transpose();
                crate::failpoint::set(&name, order.map_err(RpcError::refused)?);
                Ok(pack(&())?.into())
            }
            other => Err(RpcError::refused(format!("no request of kind {other:#x}"))),
        }
    }

    /// Samples the machine's writes for a moment.
    fn activity(&self) -> Result<Activity, RpcError> {
        let busy = |why| Err(RpcError::failed(format!("{why}; try again")));
        let Ok(_tracking) = self.tracking.try_lock() else {
            return busy("a checkpoint of it is being made");
        };
        let (machine, mut checkpointer) = {
            let mut inner = self.inner();
            if inner.moving_away {
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
            if matches!(*self.state.borrow(), State::Held { .. }) {
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
        if !inner.moving_away {
            inner.checkpointer = checkpointer;
        }
        sampled.map_err(RpcError::failed)
    }

    /// Loads the code that threads need to resume after a safepoint, or compiles it if
    /// the agent has not: a freeze must not wait for it.
    fn prepare_resume(&self) {
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
    fn store_program(&self, hash: &[u8; 32], bytes: &[u8]) -> Result<(), RpcError> {
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
    fn watch_end(self: &Arc<Self>, machine: Machine) -> Result<(), RpcError> {
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
                    inner.epoch
                };
                // Members end with the machine; taken out first, because ending them
                // takes a moment.
                let mut parts = std::mem::take(&mut worker.inner().parts);
                let lost = parts.end();
                machine.wasi().finish();
                // The next holder of its volumes must find all that it wrote.
                let cluster_volumes = worker.inner().cluster_volumes.clone();
                cluster_volumes.finish();
                volumes::remove(&worker.folder);
                let log = worker.inner().log.clone();
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
                worker.state.send_replace(State::Ended { epoch, status });
                if let Some(log) = log {
                    log.close();
                }
            })
            .map(drop)
            .map_err(RpcError::failed)
    }

    fn report(&self) -> Report {
        let inner = self.inner();
        let machine = inner.machine.as_ref();
        let pages: Vec<u64> = machine.map_or_else(Vec::new, |machine| {
            machine
                .memories()
                .iter()
                .map(|memory| memory.size_bytes() >> 16)
                .collect()
        });
        let log = inner.log.as_ref();
        Report {
            state: self.state.borrow().clone(),
            pid: std::process::id(),
            moving_away: inner.moving_away,
            post_copy: inner.post_copy,
            unsent_bytes: inner.unsent.load(Ordering::Relaxed),
            fill: inner.fill.clone(),
            program: machine.map(|machine| *machine.program().hash()),
            threads: machine.map_or(0, |machine| machine.threads().len() as u32),
            memory_bytes: pages.iter().sum::<u64>() << 16,
            memory_pages: pages,
            cpu_micros: cpu_micros(),
            log: log.map_or((0, 0), |log| (log.base(), log.end())),
            volumes: machine.map_or_else(Vec::new, volume_reports),
            paused: self.paused.borrow().clone(),
            group: self.group.as_ref().map(Group::usage),
            parts: inner.parts.count(),
            start: self.start_progress(&inner),
        }
    }

    /// The phase before the machine runs; also the compilation at the target of a move
    /// before it can receive the machine.
    fn start_progress(&self, inner: &Inner) -> Option<StartProgress> {
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
    fn file(&self, request: FileRequest) -> Result<FileDone, RpcError> {
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
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        {
            let inner = self.inner();
            if inner.moving_away || inner.give_up_checkpoint.is_some() || inner.machine.is_none() {
                return Ok(FileDone::Busy);
            }
        }
        files::act(&files, request.op).map_err(RpcError::failed)
    }

    /// Changes the limits of the running machine.
    fn set(&self, spec: Spec) -> Result<(), RpcError> {
        // A move has told its target the machine's limits.
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let (machine, before) = {
            let inner = self.inner();
            match (&inner.machine, &inner.spec) {
                _ if inner.moving_away => return Err(RpcError::failed("it is moving")),
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
        let Some(group) = &self.group else { return };
        let limit = cgroup::memory_limit_bytes(memories, spec.memory_bytes, spec.threads_max);
        if let Err(error) = group.limit_memory(limit) {
            tracing::warn!(error, "cannot limit the memory of this worker");
        }
    }

    // ── output ──────────────────────────────────────────────────────────

    fn read_log(&self, read: &ReadLog, chunks: &mpsc::Sender<Bytes>) {
        let send = |offset: u64, bytes: Vec<u8>| {
            pack(&LogChunk { offset, bytes })
                .ok()
                .is_some_and(|bytes| chunks.blocking_send(bytes).is_ok())
        };
        let Some(log) = self.inner().log.clone() else {
            // The log does not exist yet. A missing receiver does not matter here or
            // below.
            let _ = send(read.from, Vec::new());
            return;
        };
        let mut at = read.from;
        loop {
            let (offset, bytes) = match log.read(at, LOG_CHUNK_BYTES) {
                Ok(read) => read,
                Err(error) => {
                    tracing::warn!(%error, "cannot read output");
                    return;
                }
            };
            if bytes.is_empty() {
                let over = log.is_closed()
                    || matches!(
                        *self.state.borrow(),
                        State::Ended { .. } | State::Dropped { .. }
                    );
                if !read.follow || over || chunks.is_closed() {
                    let _ = send(at, Vec::new());
                    return;
                }
                log.wait(offset, Duration::from_millis(500));
                continue;
            }
            at = offset + bytes.len() as u64;
            if !send(offset, bytes) {
                return;
            }
        }
    }
}

/// Writes a notice of the system to a machine's error output.
fn write_notice(log: &Log, text: &str) {
    if let Err(error) = log.append(StreamKind::Error, format!("keel: {text}\n").as_bytes()) {
        tracing::warn!(%error, "cannot write a notice to the output");
    }
}

/// Streams the present and all later values.
fn follow<T>(mut values: watch::Receiver<T>) -> mpsc::Receiver<Bytes>
where
    T: Clone + Serialize + Send + Sync + 'static,
{
    let (send, receive) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let value = values.borrow_and_update().clone();
            let Ok(bytes) = pack(&value) else { return };
            if send.send(bytes).await.is_err() || values.changed().await.is_err() {
                return;
            }
        }
    });
    receive
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

/// CPU time of this process so far.
fn cpu_micros() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0) / 1000;
    seconds.saturating_mul(1_000_000).saturating_add(rest)
}

/// Publishes the state of a machine that was resumed, unless it has ended since: the
/// thread that watches for the end may have been faster.
fn publish_resumed(shown: &watch::Sender<State>, log: Option<&Log>, state: State) {
    // The log was closed for the move.
    if let Some(log) = log {
        log.open_again();
    }
    let goes_on = shown.send_if_modified(|now| {
        let goes_on = !matches!(now, State::Ended { .. });
        if goes_on {
            *now = state;
        }
        goes_on
    });
    if let Some(log) = log.filter(|_| !goes_on) {
        log.close();
    }
}

#[cfg(test)]
mod resumed_machines {
    use super::*;

    #[test]
    fn ended_machines_are_not_published_as_running() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 0).unwrap();
        let epoch = Epoch::default();
        let running = State::Running { epoch };
        // State during a move; the target was told.
        let shown = watch::Sender::new(running.clone());
        log.close();
        publish_resumed(&shown, Some(&log), running.clone());
        assert_eq!(*shown.borrow(), running);
        assert!(!log.is_closed());
        // The machine runs and ends before its state is published.
        let status = Status::Exited { code: 0 };
        let ended = State::Ended { epoch, status };
        shown.send_replace(ended.clone());
        log.close();
        publish_resumed(&shown, Some(&log), running);
        assert_eq!(*shown.borrow(), ended);
        assert!(log.is_closed());
    }
}
