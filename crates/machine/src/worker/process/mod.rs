//! The worker process: one machine, a socket for its agent, and the threads
//! that moves need.
//!
//! - `start`: how the machine begins
//! - `checkpoints`: they are taken
//! - `source`: it is given away
//! - `target`: it comes from another worker

mod checkpoints;
mod source;
mod start;
mod target;

use super::SOCKET;
use super::activity;
use super::cluster_volumes::ClusterVolumes;
use super::control::{
    Checkpoint, Copy, CopyHome, FileDone, FileRequest, HomeHandover, LogChunk, ReadLog, Receive,
    Report, Start, StartPhase, StartProgress, State, VolumeReport, kind, pack, unpack,
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

/// What the answer to a worker's last request has, and what it leaves in a store.
const FORGET_AFTER: Duration = Duration::from_millis(20);
const LET_GO_WITHIN: Duration = Duration::from_millis(300);
/// Bytes of output in one answer.
const LOG_CHUNK_BYTES: usize = 64 << 10;

pub(super) struct Worker {
    /// Held while the machine is being frozen and sent, or thawed.
    pub(super) freezing: Mutex<()>,
    /// Held by whoever tracks the machine's writes, but for a move.
    pub(super) tracking: Mutex<()>,
    /// Held while what arrives takes a step.
    stepping: Mutex<()>,
    folder: PathBuf,
    programs: PathBuf,
    pub(super) engine: Engine,
    inner: Mutex<Inner>,
    pub(super) state: watch::Sender<State>,
    stalls: Arc<Stalls>,
    /// Where the machine waits for room on a disk.
    paused: watch::Sender<Option<String>>,
    /// The cgroup that this process is in, if it has one of its own.
    group: Option<Group>,
}

#[derive(Default)]
pub(super) struct Inner {
    pub(super) name: Option<MachineName>,
    pub(super) machine: Option<Machine>,
    log: Option<Arc<Log>>,
    pub(super) epoch: Epoch,
    pub(super) spec: Option<Spec>,
    /// Makes checkpoints; not here while it does.
    pub(super) taker: Option<Checkpointer>,
    /// Set while one is being made; ends it early.
    pub(super) taking: Option<Arc<AtomicBool>>,
    /// The parts of the machine, if it spans, or the one that this process is.
    pub(super) parts: SpanState,
    identity: Option<PinnedIdentity>,
    outgoing: Option<SourceTask>,
    /// From the first page sent until the machine goes on here.
    pub(super) giving_away: bool,
    /// A thread copies, or tells the target to go on: it has what is known of the move.
    copying: bool,
    going: bool,
    /// Ends the copying of a machine that spans.
    give_up: Option<Arc<AtomicBool>>,
    /// Counts what was begun of giving the machine away: a thread of an attempt that
    /// was given up may wake late, and must leave the next one alone.
    attempt: u64,
    /// The move was given up: a freeze that comes, or is under way, must not
    /// leave the machine frozen.
    given_up: bool,
    /// Breaks the connection of a copy that another thread is busy with.
    closer: Option<std::net::TcpStream>,
    target: Option<TargetMove>,
    /// Of a machine that spans and stands ready here: the part that is to be its home.
    succession: Option<(Arc<MemberPart>, HomeHandover)>,
    /// Why what arrived was dropped, where this is a part of the machine, and stays one.
    pub(super) dropped_for: Option<String>,
    /// Brings the memory of a machine that arrived, while it runs.
    pub(super) filler: Option<PostCopyTarget>,
    /// Brings that of a machine made of a checkpoint, while it runs.
    pub(super) behind: Option<Arc<LazyRestore>>,
    /// All of that, where it is to come once the machine has parts.
    pub(super) later: Option<SpanningRestore>,
    /// Set from the first page that is sent behind the machine on.
    serving: bool,
    post_copy: bool,
    /// Bytes that are still to be sent.
    unsent: Arc<AtomicU64>,
    /// How that went.
    fill: Option<FillReport>,
    /// Of its cluster volumes.
    keepers: ClusterVolumes,
    /// Why it had to be ended.
    pub(super) ended_for: Option<String>,
    /// What is done before the machine runs, and since when.
    starting: Option<(StartPhase, Instant)>,
}

impl Inner {
    /// Whether an attempt to give the machine away is the one under way.
    fn is_attempt(&self, attempt: u64) -> bool {
        self.attempt == attempt && !self.given_up
    }
}

/// Runs a worker until its agent ends it. `folder` holds its socket and
/// output, `cache` the node's compiled code, `programs` its instrumented
/// modules.
///
/// # Errors
/// If its folder or socket cannot be used.
pub fn run(folder: &Path, cache: &Path, programs: &Path) -> Result<(), String> {
    #[cfg(feature = "failpoints")]
    crate::failpoint::set_from_environment();
    cgroup::expose_worker_to_oom();
    // First: what is allocated from here on is counted there.
    let group = Group::load(folder).filter(|group| {
        let joined = group.join();
        if let Err(error) = &joined {
            tracing::warn!(error, "this worker is in no cgroup of its own");
        }
        joined.is_ok()
    });
    std::fs::create_dir_all(programs)
        .map_err(|error| format!("{}: {error}", programs.display()))?;
    // Compiling uses all processors; running guests come first.
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
    // A socket that exists answers: it is put in place once it listens.
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
            // The socket lies in a folder that only this user can enter.
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

/// Runs something that may block away from the runtime.
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
                let place = blocking(move || self.span_ready(&meet)).await?;
                Ok(pack(&place)?.into())
            }
            kind::PREPARE_MEMBER => {
                let ready = unpack(&payload)?;
                let place = blocking(move || self.part_ready(&ready)).await?;
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
                let bytes = blocking(move || self.bring_apart()).await?;
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
                Ok(pack(&objects)?.into())
            }
            kind::HEAT => {
                let heat = blocking(move || self.heat()).await?;
                Ok(pack(&heat)?.into())
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
                // (A checkpoint that is not read any more.)
                let later = self.inner().later.take();
                let let_go = later.map(|later| tokio::task::spawn_blocking(|| later.let_go()));
                // The answer goes out first; nothing here is worth keeping.
                tokio::spawn(async {
                    tokio::time::sleep(FORGET_AFTER).await;
                    if let Some(let_go) = let_go {
                        let _ = tokio::time::timeout(LET_GO_WITHIN, let_go).await;
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
            #[cfg(feature = "failpoints")]
            kind::FAILPOINT => {
                let (name, order): (String, Option<String>) = unpack(&payload)?;
                let order = order.map(|order| order.parse()).transpose();
                crate::failpoint::set(&name, order.map_err(RpcError::refused)?);
                Ok(pack(&())?.into())
            }
            other => Err(RpcError::refused(format!("no request of kind {other:#x}"))),
        }
    }

    /// Looks for a moment at what the machine writes.
    fn activity(&self) -> Result<Activity, RpcError> {
        let busy = |why| Err(RpcError::failed(format!("{why}; try again")));
        let Ok(_tracking) = self.tracking.try_lock() else {
            return busy("a checkpoint of it is being made");
        };
        let (machine, mut taker) = {
            let mut inner = self.inner();
            if inner.giving_away {
                return busy("the machine is moving");
            }
            if inner.parts.count() > 0 {
                return Err(RpcError::failed(
                    "of a machine with parts only its home moves, and how long that takes is not foretold",
                ));
            }
            if inner.filler.is_some() || inner.behind.is_some() {
                return busy("a part of its memory is still to come");
            }
            if matches!(*self.state.borrow(), State::Held { .. }) {
                return busy("its memory is still to come");
            }
            let machine = inner.machine.clone();
            let machine = machine.ok_or_else(|| RpcError::failed("no machine runs here"))?;
            (machine, inner.taker.take())
        };
        let volumes = volume_reports(&machine);
        let volume_bytes = volumes.iter().map(|volume| volume.bytes).sum();
        let sampled = activity::sample(machine.memories(), taker.as_mut(), volume_bytes);
        let mut inner = self.inner();
        // A move that began meanwhile has its own.
        if !inner.giving_away {
            inner.taker = taker;
        }
        sampled.map_err(RpcError::failed)
    }

    /// Loads what its threads need to go on after a safepoint, or compiles it where the
    /// agent has not had that done: a freeze shall not wait for it.
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
            tracing::warn!(%error, "the first move will have to load its code");
        }
    }

    /// Keeps an instrumented module where other nodes can get it.
    fn keep_program(&self, hash: &[u8; 32], bytes: &[u8]) -> Result<(), RpcError> {
        let path = self.programs.join(format!("{}.wasm", Fingerprint(*hash)));
        if path.exists() {
            return Ok(());
        }
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        std::fs::write(&temporary, bytes)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(|error| RpcError::failed(format!("{}: {error}", path.display())))
    }

    /// Tells the agent when the machine ends.
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
                // (Its members end with it; taken out first, as ending them takes a moment.)
                let mut parts = std::mem::take(&mut worker.inner().parts);
                let lost = parts.end();
                machine.wasi().finish();
                // Who takes its volumes next finds all that it wrote.
                let keepers = worker.inner().keepers.clone();
                keepers.finish();
                volumes::remove(&worker.folder);
                let log = worker.inner().log.clone();
                let status = match outcome {
                    Outcome::Exit(code) => Status::Exited { code },
                    Outcome::Trap(trap) => {
                        if let Some(log) = &log {
                            let text = format!("keel: {trap}\n");
                            if let Err(error) = log.append(StreamKind::Error, text.as_bytes()) {
                                tracing::warn!(%error, "a trap is not in the output");
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
            giving_away: inner.giving_away,
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

    /// What is still to be done before the machine runs; also what the target of a move
    /// compiles before it can receive the machine.
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

    /// Does something with a file in one of the machine's own volumes.
    fn file(&self, request: FileRequest) -> Result<FileDone, RpcError> {
        // What is written while the machine stands still would be in no move and no
        // checkpoint, or in half of one: freezing waits for this, and this for that.
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
            // It may have to wait for blocks that are elsewhere, and holds up nobody.
            return files::act(&files, request.op).map_err(RpcError::failed);
        }
        files::fetch_for(&files, &request.op);
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        {
            let inner = self.inner();
            if inner.giving_away || inner.taking.is_some() || inner.machine.is_none() {
                return Ok(FileDone::Busy);
            }
        }
        files::act(&files, request.op).map_err(RpcError::failed)
    }

    /// Takes other limits for the machine that runs here.
    fn set(&self, spec: Spec) -> Result<(), RpcError> {
        // A move has told its target what the machine may have.
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let (machine, before) = {
            let inner = self.inner();
            match (&inner.machine, &inner.spec) {
                _ if inner.giving_away => return Err(RpcError::failed("it is moving")),
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
        // The kernel's bound is never below the machine's own.
        if spec.memory_bytes > before.memory_bytes {
            self.bound(memories, &spec);
        }
        if let Err(size) = machine.limit_memory(spec.memory_bytes) {
            return Err(RpcError::failed(format!(
                "a memory of it has {size} bytes already, and memory does not shrink: {} bytes are too few",
                spec.memory_bytes
            )));
        }
        machine.limit_cpu(spec.cpu_limit_millis);
        self.bound(memories, &spec);
        let part_bytes = spec.balancing.part_memory_bytes;
        let mut inner = self.inner();
        inner.spec = Some(spec);
        inner.parts.limit(part_bytes).map_err(RpcError::failed)
    }

    /// Bounds this process's cgroup for a machine of so many memories.
    pub(super) fn bound(&self, memories: usize, spec: &Spec) {
        let Some(group) = &self.group else { return };
        let limit = cgroup::memory_limit_bytes(memories, spec.memory_bytes, spec.threads_max);
        if let Err(error) = group.limit_memory(limit) {
            tracing::warn!(error, "this worker's memory is not bounded");
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
            // It has not begun. That nobody hears this does not matter here or below.
            let _ = send(read.from, Vec::new());
            return;
        };
        let mut at = read.from;
        loop {
            let (offset, bytes) = match log.read(at, LOG_CHUNK_BYTES) {
                Ok(read) => read,
                Err(error) => {
                    tracing::warn!(%error, "output cannot be read");
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

/// Says something in a machine's error output, among what it says itself.
fn say(log: &Log, text: &str) {
    if let Err(error) = log.append(StreamKind::Error, format!("keel: {text}\n").as_bytes()) {
        tracing::warn!(%error, "a notice is not in the output");
    }
}

/// What a value is, and becomes.
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

/// A machine was let go, and is shown so, unless it has ended since: whoever watches for that
/// may have been faster than who let it go.
fn goes_on(shown: &watch::Sender<State>, log: Option<&Log>, state: State) {
    // (Of one that was about to leave it was closed.)
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
mod machines_that_go_on {
    use super::*;

    #[test]
    fn what_has_ended_is_not_shown_to_run() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 0).unwrap();
        let epoch = Epoch::default();
        let running = State::Running { epoch };
        // As it is while it stands for a move; the target was told.
        let shown = watch::Sender::new(running.clone());
        log.close();
        goes_on(&shown, Some(&log), running.clone());
        assert_eq!(*shown.borrow(), running);
        assert!(!log.is_closed());
        // It runs, and ends before who let it go says that it does.
        let status = Status::Exited { code: 0 };
        let ended = State::Ended { epoch, status };
        shown.send_replace(ended.clone());
        log.close();
        goes_on(&shown, Some(&log), running);
        assert_eq!(*shown.borrow(), ended);
        assert!(log.is_closed());
    }
}
