//! The worker process: one machine, a socket for its agent, and the threads
//! that moves need.

use super::SOCKET;
use super::activity;
use super::control::{
    Checkpoint, Checkpointed, Copy, CopyEvent, CopyHome, FileDone, FileRequest, Frozen, LogChunk,
    ReadLog, Receive, Receiving, Report, Start, StartFrom, State, Succession, VolumeReport, kind,
    pack, unpack,
};
use super::files;
use super::filling::{Filler, Filling};
use super::incoming::{self, IncomingError};
use super::kept::Keepers;
use super::outgoing::{Leaving, Outgoing};
use super::spanning::Parts;
use super::volumes::{self, IncomingVolumes};
use crate::cgroup::{self, Group};
use crate::checkpoint::{self, Behind, Destination, Later, Origin, Rest, Subject, Taker, Vault};
use crate::failpoint;
use crate::link::{Link, LinkError, Message};
use crate::log::{Log, LogSink, StreamKind};
use crate::moves::predict::Activity;
use crate::moves::{FillReport, TargetCommand, TargetEvent, TargetMove, TargetState};
use crate::span::{MemberPart, PartId};
use crate::spec::{Spec, Status, VolumeKind};
use keel_cluster::clock::unix_ms;
use keel_cluster::{Epoch, MachineName};
use keel_net::rpc::everyone_is_member;
use keel_net::{
    BoxFuture, Bytes, Fingerprint, Handler, Options as RpcOptions, PeerId, PinnedIdentity, Reply,
    RpcError, Server,
};
use keel_wasi::volume::Stalls;
use keel_wasi::{Config, Files, Preopen, Resources, Wasi};
use keel_wasm::runtime::{Engine, Machine, Options, Outcome};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

/// Age at which a machine is made ready for its first move: many programs end
/// sooner.
const PREPARE_AFTER: Duration = Duration::from_secs(1);
/// How much less a compiling thread gets than what moves a machine; a move that waits
/// for it is not to wait for guests as well.
const COMPILE_NICE: i32 = 5;
/// How long a move waits for a checkpoint to be given up.
const CHECKPOINT_PATIENCE: Duration = Duration::from_secs(15);
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
    pub(super) taker: Option<Taker>,
    /// Set while one is being made; ends it early.
    pub(super) taking: Option<Arc<AtomicBool>>,
    /// The parts of the machine, if it spans, or the one that this process is.
    pub(super) parts: Parts,
    identity: Option<PinnedIdentity>,
    outgoing: Option<Leaving>,
    /// From the first page sent until the machine goes on here.
    pub(super) giving_away: bool,
    /// A thread copies, or tells the target to go on: it has what is known of the move.
    copying: bool,
    going: bool,
    /// Ends the copying of a machine that spans.
    gives_up: Option<Arc<AtomicBool>>,
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
    succession: Option<(Arc<MemberPart>, Succession)>,
    /// Why what arrived was dropped, where this is a part of the machine, and stays one.
    pub(super) dropped_for: Option<String>,
    /// Brings the memory of a machine that arrived, while it runs.
    pub(super) filler: Option<Filler>,
    /// Brings that of a machine made of a checkpoint, while it runs.
    pub(super) behind: Option<Arc<Behind>>,
    /// All of that, where it is to come once the machine has parts.
    pub(super) later: Option<Later>,
    /// Set from the first page that is sent behind the machine on.
    serving: bool,
    post_copy: bool,
    /// Bytes that are still to be sent.
    unsent: Arc<AtomicU64>,
    /// How that went.
    fill: Option<FillReport>,
    /// Of its cluster volumes.
    keepers: Keepers,
    /// Why it had to be ended.
    pub(super) ended_for: Option<String>,
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
    failpoint::set_from_environment();
    cgroup::spend_worker();
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
        .start_handler(|_| {
            // (On Linux that of a thread.)
            if let Err(error) = rustix::process::nice(COMPILE_NICE) {
                tracing::debug!(%error, "compiling is as important as running");
            }
        })
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
            kind::PAUSES => Ok(Reply::Stream(follow(self.paused.subscribe()))),
            kind::IDENTITY => {
                let identity = PinnedIdentity::generate().map_err(RpcError::refused)?;
                let fingerprint = identity.fingerprint;
                self.inner().identity = Some(identity);
                // A move is being offered: the target compiles, and so can we.
                self.prepare_resume(Duration::ZERO);
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
            kind::PART_READY => {
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
            kind::BRING => {
                let bytes = blocking(move || self.bring_apart()).await?;
                Ok(pack(&bytes)?.into())
            }
            kind::MEET_NEW => {
                let meet = unpack(&payload)?;
                let place = blocking(move || self.meet_new(&meet)).await?;
                Ok(pack(&place)?.into())
            }
            kind::JOIN_NEW => {
                let join = unpack(&payload)?;
                let micros = blocking(move || self.join_new(join)).await?;
                Ok(pack(&micros)?.into())
            }
            kind::PART_WITH => {
                let part = unpack(&payload)?;
                let micros = blocking(move || self.part_with(part)).await?;
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
                failpoint::set(&name, order.map_err(RpcError::refused)?);
                Ok(pack(&())?.into())
            }
            other => Err(RpcError::refused(format!("no request of kind {other:#x}"))),
        }
    }

    fn start(self: &Arc<Self>, start: Start, runtime: &Handle) -> Result<(), RpcError> {
        if *self.state.borrow() != State::Empty {
            return Err(RpcError::refused("this worker has a machine already"));
        }
        let (machine, log, keepers) = match &start.from {
            StartFrom::Module(module) => self.begin(module, &start, runtime)?,
            StartFrom::Checkpoint(origin) => self.restore(origin, &start, runtime)?,
        };
        let mut inner = self.inner();
        inner.keepers = keepers;
        inner.name = Some(start.machine);
        inner.spec = Some(start.spec);
        inner.log = Some(log);
        inner.epoch = start.epoch;
        inner.machine = Some(machine.clone());
        let epoch = start.epoch;
        let next = match inner.later {
            Some(_) => State::Held { epoch },
            None => State::Running { epoch },
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
        self.prepare_resume(PREPARE_AFTER);
        self.watch_end(machine)
    }

    /// A machine at its beginning; it runs.
    fn begin(
        self: &Arc<Self>,
        module: &Path,
        start: &Start,
        runtime: &Handle,
    ) -> Result<(Machine, Arc<Log>, Keepers), RpcError> {
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
        let machine = Machine::start_under(start.epoch.token(), program, wasi, spec.limits())
            .map_err(RpcError::failed)?;
        Ok((machine, log, keepers))
    }

    /// A machine where its checkpoint was; it runs, if it is not to have parts first.
    fn restore(
        self: &Arc<Self>,
        origin: &Origin,
        start: &Start,
        runtime: &Handle,
    ) -> Result<(Machine, Arc<Log>, Keepers), RpcError> {
        let spec = &start.spec;
        let vault = Vault::open(&origin.vault).map_err(RpcError::failed)?;
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
            Rest::Nothing => false,
            Rest::Behind(behind) => self.bring(behind, start.epoch).map(|()| false)?,
            Rest::Later(later) => {
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
    fn bring(self: &Arc<Self>, behind: Behind, epoch: Epoch) -> Result<(), RpcError> {
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
    fn await_memory(&self) -> Result<(), String> {
        let behind = self.inner().behind.clone();
        behind.map_or(Ok(()), |behind| behind.wait())
    }

    // ── checkpoints ─────────────────────────────────────────────────────

    fn checkpoint(&self, request: &Checkpoint, runtime: &Handle) -> Result<Checkpointed, RpcError> {
        let vault = Vault::create(&request.vault).map_err(RpcError::failed)?;
        self.await_memory().map_err(RpcError::failed)?;
        let give_up = Arc::new(AtomicBool::new(false));
        let tracking = match self.tracking.try_lock() {
            Ok(tracking) => tracking,
            Err(std::sync::TryLockError::Poisoned(error)) => error.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) if self.inner().taking.is_some() => {
                return Err(RpcError::failed("a checkpoint of it is being made already"));
            }
            // It is only looked at, for a moment.
            Err(std::sync::TryLockError::WouldBlock) => self
                .tracking
                .lock()
                .unwrap_or_else(|error| error.into_inner()),
        };
        let (machine, log, subject, mut taker, keepers, apart) = {
            let mut inner = self.inner();
            if inner.giving_away {
                return Err(RpcError::failed("the machine is moving; try again"));
            }
            if inner.taking.is_some() {
                return Err(RpcError::failed("a checkpoint of it is being made already"));
            }
            if inner.filler.is_some() {
                return Err(RpcError::failed(
                    "a part of its memory is still to come; try again",
                ));
            }
            let running = matches!(*self.state.borrow(), State::Running { .. });
            match (&inner.machine, &inner.log, &inner.name, &inner.spec) {
                (Some(machine), Some(log), Some(name), Some(spec)) if running => {
                    let subject = Subject {
                        name: name.clone(),
                        spec: spec.clone(),
                        epoch: inner.epoch,
                    };
                    let parts = (machine.clone(), log.clone(), subject);
                    inner.taking = Some(give_up.clone());
                    let taker = inner.taker.take().unwrap_or_default();
                    let keepers = inner.keepers.clone();
                    let apart = inner.parts.pages();
                    (parts.0, parts.1, parts.2, taker, keepers, apart)
                }
                _ => return Err(RpcError::failed("no machine runs here")),
            }
        };
        let destination = Destination {
            vault: &vault,
            runtime,
            full: request.full,
            give_up: &give_up,
            keepers: keepers.all(),
        };
        // What a user is writing to its volumes ends first.
        drop(self.freezing.lock());
        let name = subject.name.clone();
        let taken = taker.take(&machine, apart.as_deref(), subject, &log, destination);
        {
            let mut inner = self.inner();
            inner.taking = None;
            // What is to move has its writes tracked for that from now on.
            if !give_up.load(Ordering::Relaxed) {
                inner.taker = Some(taker);
            }
        }
        // What is left is the store's business: a move need not wait for it.
        drop(tracking);
        let taken = taken.map_err(RpcError::failed)?;
        let deleted = match request.keep {
            all if all.is_all() => Ok(Vec::new()),
            some => vault.keep(runtime, &name, some, unix_ms()),
        };
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Ok(Checkpointed {
            stored_bytes: taken.manifest.stored_bytes(),
            id: taken.manifest.id,
            parent: taken.manifest.parent,
            pause_micros: micros(taken.pause),
            total_micros: micros(taken.total),
            deleted: match deleted {
                Ok(gone) => {
                    keepers.forget_checkpoints(&name, &gone);
                    gone.len() as u32
                }
                Err(error) => {
                    tracing::warn!(%error, "old checkpoints stay");
                    0
                }
            },
        })
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

    /// A move comes first: a checkpoint in the making is given up, and what is
    /// known for the next one is dropped. Nor is the machine looked at any more.
    fn end_checkpoints(&self) -> Result<(), String> {
        // (Nobody begins another one now.)
        self.without_checkpoint().map(drop)
    }

    /// Gives up a checkpoint in the making, and what is known for the next one; while this
    /// is held there is none.
    pub(super) fn without_checkpoint(&self) -> Result<MutexGuard<'_, ()>, String> {
        let deadline = Instant::now() + CHECKPOINT_PATIENCE;
        loop {
            if let Some(taking) = &self.inner().taking {
                taking.store(true, Ordering::Relaxed);
            }
            let tracking = match self.tracking.try_lock() {
                Ok(tracking) => Some(tracking),
                Err(std::sync::TryLockError::Poisoned(error)) => Some(error.into_inner()),
                Err(std::sync::TryLockError::WouldBlock) => None,
            };
            if let Some(tracking) = tracking {
                self.inner().taker = None;
                return Ok(tracking);
            }
            if Instant::now() > deadline {
                return Err(
                    "a checkpoint of it, or a part that goes, is still under way; try again".into(),
                );
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Compiles what its threads need to go on after a safepoint, in the
    /// background: its first move shall not wait for that.
    fn prepare_resume(&self, after: Duration) {
        let Some(machine) = self.inner().machine.clone() else {
            return;
        };
        let thread = std::thread::Builder::new()
            .name("prepare".into())
            .spawn(move || {
                if machine.program().can_resume() || machine.wait(Some(after)).is_some() {
                    return;
                }
                if let Err(error) = machine.program().prepare_resume() {
                    tracing::warn!(%error, "the machine cannot be moved");
                }
            });
        if let Err(error) = thread {
            tracing::warn!(%error, "the first move will have to compile");
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
        }
    }

    /// Does something with a file in one of the machine's own volumes.
    fn file(&self, request: FileRequest) -> Result<FileDone, RpcError> {
        // What is written while the machine stands still would be in no move and no
        // checkpoint, or in half of one: freezing waits for this, and this for that.
        let Some(machine) = self.inner().machine.clone() else {
            return Ok(FileDone::Later);
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
                return Ok(FileDone::Later);
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

    // ── giving the machine away ─────────────────────────────────────────

    /// As [`Self::copy`], of a machine that spans.
    fn copy_home(&self, copy: &CopyHome, events: &mpsc::Sender<Bytes>) {
        self.copy(&copy.copy, Some((copy.successor, copy.threads_to)), events);
    }

    fn copy(&self, copy: &Copy, to: Option<(PartId, PartId)>, events: &mpsc::Sender<Bytes>) {
        let mut tell = |event: CopyEvent| match pack(&event) {
            Ok(bytes) => events.blocking_send(bytes).is_ok(),
            Err(_) => false,
        };
        // (Whoever makes it span holds this, and looks whether it is given away.)
        let freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let parts = self.inner().parts.leaving(to);
        let parts = match parts {
            Ok(parts) => parts,
            Err(reason) => {
                tell(CopyEvent::Lost { reason });
                return;
            }
        };
        let gives_up = parts.as_ref().map(|it| it.gives_up.clone());
        let prepared = {
            let mut inner = self.inner();
            match (&inner.machine, &inner.log, &inner.name) {
                (Some(machine), Some(log), Some(name)) if inner.outgoing.is_none() => {
                    let keepers = inner.keepers.clone();
                    let parts = (
                        machine.clone(),
                        log.clone(),
                        name.clone(),
                        inner.epoch,
                        keepers,
                    );
                    let identity = inner.identity.take();
                    inner.giving_away = identity.is_some();
                    inner.copying = identity.is_some();
                    inner.given_up = false;
                    inner.gives_up = gives_up;
                    inner.attempt += 1;
                    inner.post_copy = copy.post_copy;
                    // What was known of an earlier move does not count.
                    inner.serving = false;
                    inner.fill = None;
                    inner.unsent = Arc::default();
                    identity.map(|identity| (identity, parts))
                }
                _ => None,
            }
        };
        let Some((identity, (machine, log, name, epoch, keepers))) = prepared else {
            tell(CopyEvent::Lost {
                reason: "this worker has no machine to give away".into(),
            });
            return;
        };
        drop(freezing);
        let attempt = self.inner().attempt;
        let aborted = |reason: &str| LinkError::Aborted(reason.to_owned());
        let result = self
            .end_checkpoints()
            .and_then(|()| self.await_memory())
            .map_err(|reason| aborted(&reason).into())
            .and_then(|()| Outgoing::connect(&name, epoch, machine, log, &identity, copy, parts));
        let result = result.and_then(|mut outgoing| {
            {
                let mut inner = self.inner();
                if !inner.is_attempt(attempt) {
                    return Err(aborted("the move was given up").into());
                }
                inner.closer = Some(outgoing.closer()?);
            }
            outgoing.copy(&keepers, &mut tell).map(|()| outgoing)
        });
        let mut result = result;
        let mut inner = self.inner();
        let current = inner.is_attempt(attempt);
        if !current && let Ok(outgoing) = &mut result {
            // Before anybody else changes its parts.
            drop(inner);
            if let Err(error) = outgoing.stay() {
                tracing::warn!(%error, "a machine whose home was to move has lost a part");
            }
            inner = self.inner();
        }
        if inner.attempt == attempt {
            inner.copying = false;
            // (Whoever gave it up left that to this thread.)
            inner.giving_away &= !inner.given_up;
        }
        match result {
            Ok(outgoing) if current => inner.outgoing = Some(outgoing.rests()),
            Ok(outgoing) => {
                drop(inner);
                abort_apart(Some(outgoing.rests()), "the move was given up".into());
            }
            Err(error) => {
                if inner.attempt == attempt {
                    inner.giving_away = false;
                }
                drop(inner);
                tell(CopyEvent::Lost {
                    reason: error.to_string(),
                });
            }
        }
    }

    fn freeze(&self) -> Result<Frozen, RpcError> {
        // `copy` says that it converged a moment before it puts this back.
        let deadline = Instant::now() + Duration::from_secs(1);
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let mut outgoing = loop {
            let mut inner = self.inner();
            if inner.given_up {
                return Err(RpcError::refused("the move was given up"));
            }
            if let Some(outgoing) = inner.outgoing.take() {
                drop(inner);
                break outgoing.wait();
            }
            drop(inner);
            if Instant::now() > deadline {
                return Err(RpcError::refused("nothing was copied"));
            }
            std::thread::yield_now();
        };
        let keepers = self.inner().keepers.clone();
        keepers.rest();
        let result = outgoing.freeze_and_send();
        let leaving = match &result {
            Ok(_) => Leaving::after_freeze(outgoing).map_err(RpcError::failed)?,
            Err(_) => outgoing.rests(),
        };
        self.inner().outgoing = Some(leaving);
        result.map_err(RpcError::failed)
    }

    /// Source: tells the target to go on. Target: goes on.
    fn go(self: &Arc<Self>, epoch: Epoch) -> Result<u64, RpcError> {
        let begun = Instant::now();
        // A machine that came by a move may be on its next: what it gives away
        // counts, not how it came.
        let outgoing = {
            let mut inner = self.inner();
            let outgoing = inner.outgoing.take();
            inner.going |= outgoing.is_some();
            outgoing
        };
        let Some(outgoing) = outgoing else {
            if self.inner().giving_away {
                // Said already, or being said: only the target knows.
                return Err(RpcError::unknown("the target is being told"));
            }
            if self.inner().target.is_none() {
                return Err(RpcError::refused("no move is under way"));
            }
            failpoint::pass("in.go").map_err(RpcError::unknown)?;
            let filler = self.inner().filler.clone();
            if let Some(filler) = filler {
                filler.wait_named();
            }
            return match self.step_target(TargetEvent::Go(epoch)) {
                commands if commands.is_empty() => {
                    Err(RpcError::refused("not ready, or an older epoch"))
                }
                _ => Ok(begun.elapsed().as_micros() as u64),
            };
        };
        let mut outgoing = outgoing.wait();
        let result = outgoing.go(epoch);
        {
            let mut inner = self.inner();
            inner.outgoing = Some(outgoing.rests());
            inner.going = false;
        }
        result.map_err(RpcError::unknown)?;
        let took = begun.elapsed().as_micros() as u64;
        // Whoever reads its output goes on there.
        if let Some(log) = &self.inner().log {
            log.close();
        }
        if self.inner().post_copy {
            // At once: threads there wait.
            self.serve()?;
        }
        Ok(took)
    }

    /// Source of a post-copy move: sends the rest, for as long as it takes.
    fn serve(self: &Arc<Self>) -> Result<(), RpcError> {
        let outgoing = {
            let mut inner = self.inner();
            if inner.serving {
                return Ok(());
            }
            let outgoing = inner
                .outgoing
                .take()
                .ok_or_else(|| RpcError::refused("no move is under way"))?;
            inner.serving = true;
            // Nothing gives this move up any more; and a connection ends only with
            // its last handle.
            inner.closer = None;
            outgoing
        };
        let worker = self.clone();
        let unsent = self.inner().unsent.clone();
        std::thread::Builder::new()
            .name("fill-push".into())
            .spawn(move || {
                // The agent ends this process when nobody needs it any more.
                let fill = outgoing.wait().serve(&unsent);
                worker.inner().fill = Some(fill);
            })
            .map(drop)
            .map_err(RpcError::failed)
    }

    fn thaw(&self, epoch: Epoch) -> Result<(), RpcError> {
        failpoint::pass("out.thaw").map_err(RpcError::unknown)?;
        self.give_up();
        let _freezing = self
            .freezing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let (machine, outgoing, taken_back) = {
            let mut inner = self.inner();
            if inner.going {
                return Err(RpcError::unknown("the target is being told"));
            }
            // Its own epoch, or the one after it, was never another's.
            let taken_back = epoch > inner.epoch.next();
            inner.epoch = epoch;
            let outgoing = inner.outgoing.take();
            (inner.machine.clone(), outgoing, taken_back)
        };
        if taken_back && let Some(log) = &self.inner().log {
            say(
                log,
                &format!(
                    "the target of its move was lost; it goes on here under epoch {epoch}, and what it may have done there is undone"
                ),
            );
        }
        let machine = machine.ok_or_else(|| RpcError::refused("no machine"))?;
        machine.set_epoch(epoch.token());
        let keepers = self.inner().keepers.clone();
        keepers.claim_under(epoch);
        let mut outgoing = outgoing;
        if let Some(outgoing) = &mut outgoing {
            let stays = outgoing.stay();
            if stays.is_err() {
                // (It ends, and moves nowhere.)
                self.inner().giving_away = false;
            }
            stays.map_err(RpcError::failed)?;
        }
        machine.thaw().map_err(RpcError::failed)?;
        let log = {
            let mut inner = self.inner();
            inner.giving_away = inner.copying;
            inner.log.clone()
        };
        goes_on(&self.state, log.as_deref(), State::Running { epoch });
        // It runs: saying goodbye may take its time.
        abort_apart(outgoing, "the machine stays at its source".into());
        Ok(())
    }

    /// Ends what is under way of a move from here, wherever it is.
    fn give_up(&self) {
        let mut inner = self.inner();
        inner.given_up = true;
        if let Some(gives_up) = &inner.gives_up {
            gives_up.store(true, Ordering::Release);
        }
        // Where the connection is another thread's, it is broken.
        if inner.outgoing.is_none()
            && let Some(closer) = inner.closer.take()
        {
            // It may be gone already.
            let _ = closer.shutdown(std::net::Shutdown::Both);
        }
    }

    fn abort(self: &Arc<Self>, reason: String) {
        let arriving = self.inner().target.as_ref().is_some_and(|target| {
            !matches!(
                target.state(),
                TargetState::Running { .. } | TargetState::Dropped
            )
        });
        if arriving {
            self.step_target(TargetEvent::Abort(reason));
            return;
        }
        self.give_up();
        let outgoing = {
            let mut inner = self.inner();
            // (A machine that was frozen for it is thawed first.)
            inner.giving_away = inner.copying;
            inner.outgoing.take()
        };
        abort_apart(outgoing, reason);
    }

    // ── receiving a machine ─────────────────────────────────────────────

    fn receive(
        self: &Arc<Self>,
        request: Receive,
        runtime: &Handle,
    ) -> Result<Receiving, RpcError> {
        if *self.state.borrow() != State::Empty {
            return Err(RpcError::refused("this worker has a machine already"));
        }
        self.bound(request.memory_pages.len(), &request.spec);
        Keepers::probe(&request.spec, runtime).map_err(RpcError::failed)?;
        let volumes = IncomingVolumes::new(&request.spec, &self.folder, request.volume_bytes)
            .map_err(RpcError::failed)?;
        let bytes = std::fs::read(&request.program)
            .map_err(|error| RpcError::failed(format!("{}: {error}", request.program.display())))?;
        let program = self
            .engine
            .load_instrumented(bytes)
            .map_err(RpcError::failed)?;
        let identity = PinnedIdentity::generate().map_err(RpcError::failed)?;
        let listener = std::net::TcpListener::bind((request.address.as_str(), 0))
            .map_err(|error| RpcError::failed(format!("{}: {error}", request.address)))?;
        let address = listener.local_addr().map_err(RpcError::failed)?;
        let receiving = Receiving {
            address: address.to_string(),
            fingerprint: identity.fingerprint,
        };
        let offered = request.offered;
        {
            let mut inner = self.inner();
            inner.name = Some(request.machine.clone());
            inner.spec = Some(request.spec.clone());
            inner.target = Some(TargetMove::new(offered));
        }
        failpoint::pass("in.listening").map_err(RpcError::failed)?;
        self.state.send_replace(State::Receiving { offered });
        let worker = self.clone();
        let runtime = runtime.clone();
        std::thread::Builder::new()
            .name("move-in".into())
            .spawn(move || {
                let restore = |snapshot, log: Arc<Log>, local| {
                    let keepers = worker.keepers(&request.spec, &log, &runtime)?;
                    let keepers = keepers.with_local(local);
                    let resources = worker.resources(&request.spec, &log, &keepers)?;
                    let wasi = Wasi::restore(snapshot, resources)?;
                    keepers.attach(&wasi);
                    worker.inner().keepers = keepers;
                    Ok(wasi)
                };
                let telling = worker.clone();
                let fill = move |filler: &Filler, listener, tls, hello| {
                    let worker = telling.clone();
                    filler.begin(listener, tls, hello, move |it| worker.filling(it))
                };
                let part = || worker.inner().parts.arriving();
                let arrived = incoming::receive(
                    &listener,
                    &identity,
                    &request,
                    program,
                    &worker.folder,
                    volumes,
                    &incoming::Surroundings {
                        restore: &restore,
                        fill: &fill,
                        part: &part,
                    },
                );
                worker.arrived(arrived, offered);
            })
            .map_err(RpcError::failed)?;
        Ok(receiving)
    }

    fn arrived(
        self: &Arc<Self>,
        arrived: Result<incoming::Arrived, IncomingError>,
        offered: Epoch,
    ) {
        let mut arrived = match arrived {
            Ok(arrived) => arrived,
            Err(error) => {
                self.step_target(TargetEvent::Failed(error.to_string()));
                return;
            }
        };
        let mut push = None;
        if let Some((filler, links)) = arrived.filler.take() {
            push = Some(links);
            self.inner().filler = Some(filler);
        }
        {
            let mut inner = self.inner();
            inner.machine = Some(arrived.machine.clone());
            inner.log = Some(arrived.log.clone());
            inner.succession = arrived.succession.take();
        }
        self.step_target(TargetEvent::StateArrived);
        let commands = self.step_target(TargetEvent::InstancesMade);
        if !commands.contains(&TargetCommand::SayPrepared) {
            return;
        }
        {
            // (It may have been dropped meanwhile.)
            let inner = self.inner();
            let target = inner.target.as_ref();
            if target.is_none_or(|target| target.state() != TargetState::Prepared) {
                return;
            }
            self.state.send_replace(State::Prepared {
                offered,
                source_lost: false,
            });
        }
        let said = arrived.say_prepared();
        let passed = failpoint::pass("in.prepared");
        if let Some(error) = said
            .err()
            .map(|it| it.to_string())
            .or(passed.err().map(|it| it.to_string()))
        {
            self.source_lost(error, offered);
            return;
        }
        self.await_word(&mut arrived.link, offered);
        // The rest of its memory comes the same way.
        let runs = matches!(*self.state.borrow(), State::Filling { .. });
        if let Some(push) = push.filter(|_| runs)
            && push.send(arrived.link).is_err()
        {
            tracing::warn!("nobody takes the rest of the memory");
        }
    }

    /// Shows how the rest of the memory comes.
    fn filling(&self, filling: Filling) {
        self.state.send_if_modified(|state| {
            let State::Filling { epoch, source_lost } = state else {
                return false;
            };
            let epoch = *epoch;
            let was_lost = *source_lost;
            let now = match filling {
                Filling::Done => State::Running { epoch },
                Filling::Comes | Filling::Waits => State::Filling {
                    epoch,
                    source_lost: filling == Filling::Waits,
                },
            };
            let changes = filling == Filling::Done || was_lost != (filling == Filling::Waits);
            *state = now;
            changes
        });
        if filling == Filling::Done {
            // (Its threads have ended, or are about to.)
            self.inner().filler = None;
        }
    }

    /// Hears the source out until it is gone.
    fn await_word(self: &Arc<Self>, link: &mut Link, offered: Epoch) {
        let filler = self.inner().filler.clone();
        let mut naming = filler.as_ref();
        loop {
            let event = match link.receive() {
                Ok(message) if message.names_pages() && naming.is_some() => {
                    match naming.map(|filler| incoming::hear_names(message, filler)) {
                        Some(Ok(true)) => naming = None,
                        Some(Err(error)) => {
                            return self.source_lost(error.to_string(), offered);
                        }
                        Some(Ok(false)) | None => {}
                    }
                    continue;
                }
                Ok(Message::Go(epoch)) => match failpoint::pass("in.go") {
                    Ok(()) => TargetEvent::Go(epoch),
                    Err(error) => return self.source_lost(error.to_string(), offered),
                },
                Ok(_) => TargetEvent::Abort("the source said something out of turn".into()),
                Err(LinkError::Aborted(reason)) => TargetEvent::Abort(reason),
                Err(error) => return self.source_lost(error.to_string(), offered),
            };
            let last = !matches!(event, TargetEvent::Go(_)) || self.inner().filler.is_some();
            // The source counts the time until it hears of it.
            self.step_target_and(event, &mut |epoch| {
                if let Err(error) = failpoint::pass("in.gone")
                    .map_err(|error| LinkError::Aborted(error.to_string()))
                    .and_then(|()| incoming::say_resumed(link, epoch))
                {
                    // The source asks again over the agents.
                    tracing::info!(%error, "the source did not hear that the machine runs");
                }
            });
            if last {
                return;
            }
        }
    }

    fn source_lost(self: &Arc<Self>, reason: String, offered: Epoch) {
        if let Some(filler) = &self.inner().filler {
            filler.names_lost();
        }
        let commands = self.step_target(TargetEvent::SourceLost(reason));
        if commands.contains(&TargetCommand::AskAgent) {
            self.state.send_replace(State::Prepared {
                offered,
                source_lost: true,
            });
        }
    }

    /// Steps the target's state machine and does what it says, but for
    /// speaking to the source.
    pub(super) fn step_target(self: &Arc<Self>, event: TargetEvent) -> Vec<TargetCommand> {
        self.step_target_and(event, &mut |_| {})
    }

    /// As [`Self::step_target`]; tells the source at once when the machine runs.
    fn step_target_and(
        self: &Arc<Self>,
        event: TargetEvent,
        say_resumed: &mut dyn FnMut(Epoch),
    ) -> Vec<TargetCommand> {
        // (Who is told to go a second time is answered when it has.)
        let _stepping = self
            .stepping
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let mut inner = self.inner();
        let Some(target) = &mut inner.target else {
            return Vec::new();
        };
        let commands = target.step(event);
        let state = target.state();
        let mut thawed = None;
        if let Some(TargetCommand::Thaw(epoch)) = commands.first()
            && let Some((part, succession)) = inner.succession.take()
        {
            let machine = inner.machine.clone();
            inner.epoch = *epoch;
            drop(inner);
            self.succeed(machine, &part, succession);
            inner = self.inner();
        }
        for command in &commands {
            match command {
                TargetCommand::Thaw(epoch) => {
                    inner.epoch = *epoch;
                    inner.keepers.claim_under(*epoch);
                    if let Some(filler) = &inner.filler {
                        filler.seal();
                    }
                    thawed = inner.machine.clone();
                    if let Some(machine) = &thawed {
                        machine.set_epoch(epoch.token());
                        // It stands ready; a guest that ended cannot be here.
                        if let Err(error) = machine.thaw() {
                            tracing::error!(%error, "an arrived machine does not go on");
                        }
                    }
                }
                TargetCommand::SayResumed(epoch) => say_resumed(*epoch),
                TargetCommand::Drop(reason) => {
                    if let Some(machine) = inner.machine.take() {
                        machine.stop();
                    }
                    inner.succession = None;
                    match inner.parts.is_member() {
                        // What of the machine is here it needs.
                        true => {
                            inner.dropped_for = Some(reason.clone());
                            self.state.send_if_modified(|state| match *state {
                                State::Prepared { offered, .. } => {
                                    *state = State::Receiving { offered };
                                    true
                                }
                                _ => false,
                            });
                        }
                        false => drop(self.state.send_replace(State::Dropped {
                            reason: reason.clone(),
                        })),
                    }
                }
                TargetCommand::Prepare | TargetCommand::SayPrepared | TargetCommand::AskAgent => {}
            }
        }
        if let Some(machine) = thawed {
            if let Some(filler) = &inner.filler {
                filler.go_on();
            }
            if let Err(error) = self.watch_end(machine) {
                tracing::error!(%error, "its end will not be noticed");
            }
        }
        if let TargetState::Running { epoch } = state
            && commands
                .iter()
                .any(|command| matches!(command, TargetCommand::Thaw(_)))
        {
            let state = match inner.filler.is_some() {
                true => State::Filling {
                    epoch,
                    source_lost: false,
                },
                false => State::Running { epoch },
            };
            goes_on(&self.state, inner.log.as_deref(), state);
        }
        commands
    }

    // ── output ──────────────────────────────────────────────────────────

    fn read_log(&self, read: &ReadLog, chunks: &mpsc::Sender<Bytes>) {
        let Some(log) = self.inner().log.clone() else {
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
                    return;
                }
                log.wait(offset, Duration::from_millis(500));
                continue;
            }
            at = offset + bytes.len() as u64;
            let sent = pack(&LogChunk { offset, bytes })
                .ok()
                .is_some_and(|bytes| chunks.blocking_send(bytes).is_ok());
            if !sent {
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

/// Tells the target that the move is given up, on a thread of its own: a target
/// that does not listen is waited for.
fn abort_apart(outgoing: Option<Leaving>, reason: String) {
    let Some(outgoing) = outgoing else { return };
    let thread = std::thread::Builder::new()
        .name("goodbye".into())
        .spawn(move || outgoing.wait().abort(&reason));
    if let Err(error) = thread {
        // The connection ends with it, which says the same.
        tracing::debug!(%error, "the target is not told why");
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

impl Worker {
    fn sinks(&self, spec: &Spec, log: &Arc<Log>) -> (Box<LogSink>, Box<LogSink>) {
        let sink = |stream| {
            let (log, stalls) = (log.clone(), self.stalls.clone());
            Box::new(LogSink::new(log, stream, spec.output_bytes_per_s, stalls))
        };
        (sink(StreamKind::Output), sink(StreamKind::Error))
    }

    fn config(&self, spec: &Spec, log: &Arc<Log>, keepers: &Keepers) -> Result<Config, RpcError> {
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

    fn resources(
        &self,
        spec: &Spec,
        log: &Arc<Log>,
        keepers: &Keepers,
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

    fn preopens(&self, spec: &Spec, keepers: &Keepers) -> Result<Vec<Preopen>, RpcError> {
        volumes::preopens(spec, &self.folder, &self.stalls, keepers).map_err(RpcError::failed)
    }
}

impl Worker {
    /// Keepers of the machine's cluster volumes, which have claimed nothing yet. One
    /// that loses its volume ends the machine.
    fn keepers(
        self: &Arc<Self>,
        spec: &Spec,
        log: &Arc<Log>,
        runtime: &Handle,
    ) -> Result<Keepers, RpcError> {
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
        Keepers::open(spec, &self.folder, &self.stalls, runtime, lost, damaged)
            .map_err(RpcError::failed)
    }
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
