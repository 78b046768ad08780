//! The target's side of a move: receives pages, output, then threads and WASI state, and
//! builds a machine that is ready to resume. Blocking; runs on a thread of its own.

use super::cluster_volumes::ClusterVolumes;
use super::post_copy::PostCopyTarget;
use super::stack_functions::Compilation;
use super::volumes::{TargetVolumes, VolumeError};
use super::wasm_worker::WasmWorker;
use crate::control::HomeHandover;
use crate::span::{MemberPart, SpanError};
use crate::spec::WasmSpec;
use keel_cluster::Epoch;
use keel_machine::cgroup::YieldPolicy;
use keel_machine::failpoint::{self, Injected};
use keel_machine::link::{Hello, ImageBytes, Link, LinkError, Message};
use keel_machine::log::Log;
use keel_machine::worker::control::{Receive, State};
use keel_machine::worker::{Accepted, LogTarget, MoveError, PostCopyStatus, Receiver};
use keel_net::{RpcError, ServerTls};
use keel_wasi::Wasi;
use keel_wasi::volume::LocalBlocks;
use keel_wasm::memory::{MemoryError, Unavailable};
use keel_wasm::runtime::{Image, Limits, Machine, MachineError, Program, make_memories};
use std::cell::RefCell;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use tokio::runtime::Handle;

#[derive(Debug, thiserror::Error)]
pub(super) enum TargetError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("the machine's output cannot be written: {0}")]
    Log(#[from] std::io::Error),
    #[error("its environment cannot be created here: {0}")]
    Wasi(#[from] keel_wasi::Error),
    #[error("{0}")]
    ClusterVolumes(#[from] keel_net::RpcError),
    #[error(transparent)]
    Faults(#[from] Unavailable),
    #[error("the code for resuming its threads cannot be compiled: {0}")]
    StartCompile(std::io::Error),
    #[error("post-copy cannot start: {0}")]
    StartPostCopy(std::io::Error),
    #[error(transparent)]
    Injected(#[from] Injected),
    #[error(transparent)]
    Span(#[from] SpanError),
    #[error("the state of its home cannot be decoded: {0}")]
    HomeState(#[from] postcard::Error),
    #[error("the source sent {0}, which was not agreed")]
    Unexpected(String),
}

/// A machine that has arrived and is ready to resume.
struct ReceivedMachine {
    machine: Machine,
    log: Arc<Log>,
    /// In a post-copy move: the receiver of the remaining pages, and the channel for its
    /// first connection.
    post_copy_target: Option<(PostCopyTarget, Sender<Link>)>,
    /// For a machine that spans: the part that becomes its home, and the state for it.
    handover: Option<(Arc<MemberPart>, HomeHandover)>,
}

/// What a move needs of the target's worker.
struct TargetEnvironment<'a> {
    program: Arc<Program>,
    limits: Limits,
    /// The worker's.
    folder: &'a Path,
    volumes: TargetVolumes,
    restore: &'a RestoreWasi<'a>,
    fill: &'a StartPostCopy<'a>,
    /// The part of the machine that is at this node, if there is one.
    part: Option<Arc<MemberPart>>,
}

/// Starts to resolve accesses to memory; the hello authenticates further connections of
/// the source.
type StartPostCopy<'a> =
    dyn Fn(&PostCopyTarget, TcpListener, ServerTls, Hello) -> std::io::Result<Sender<Link>> + 'a;

/// Restores WASI state from a snapshot, with this node's resources, a log, and the blocks
/// of cluster volumes that arrived.
type RestoreWasi<'a> = dyn Fn(
        keel_wasi::Snapshot,
        Arc<Log>,
        Vec<(u32, LocalBlocks)>,
    ) -> Result<keel_wasi::Wasi, TargetError>
    + 'a;

/// Receives the machine from a source that has connected.
fn receive(
    link: &mut Link,
    accepted: Accepted,
    environment: TargetEnvironment<'_>,
) -> Result<ReceivedMachine, TargetError> {
    let Accepted {
        hello,
        listener,
        tls,
    } = accepted;
    let TargetEnvironment {
        program,
        limits,
        folder,
        mut volumes,
        restore,
        fill,
        part,
    } = environment;
    let memories = match &part {
        // Its content arrived by other connections.
        Some(part) => part.memories().clone(),
        None => make_memories(program.meta(), limits.memory_bytes)?,
    };
    let log = Arc::new(Log::open(folder, hello.log_base)?);
    let mut output = LogTarget::new(log.clone());
    let post_copy_target = match hello.post_copy {
        true => Some(PostCopyTarget::new(memories.clone())?),
        false => None,
    };
    // Its threads are started before the machine is stopped.
    let push = match &post_copy_target {
        Some(post_copy_target) => {
            let begun = fill(post_copy_target, listener, tls, hello.clone());
            Some(begun.map_err(TargetError::StartPostCopy)?)
        }
        None => None,
    };
    let (mut image, mut handover) = (ImageBytes::default(), ImageBytes::default());
    let yielding = RefCell::new(YieldPolicy::begin());
    let mut compilation = Compilation::new(program.clone());
    let mut write = |memory: u32, offset: u64, bytes: &[u8]| {
        if let Some(yielding) = &mut *yielding.borrow_mut() {
            yielding.check();
        }
        let memory = memories
            .get(memory as usize)
            .filter(|_| part.is_none())
            .ok_or_else(|| LinkError::Message(format!("unexpected pages of memory {memory}")))?;
        memory.write(offset, bytes).map_err(LinkError::memory)
    };
    loop {
        match link.receive_pages(&mut write)? {
            Message::Frozen => {
                yielding.take();
            }
            Message::Size { memory, pages } => {
                let memory = memories
                    .get(memory as usize)
                    .filter(|_| part.is_none())
                    .ok_or_else(|| TargetError::Unexpected(format!("memory {memory}")))?;
                let missing = pages.saturating_sub(memory.size_bytes() >> 16);
                if memory.grow(missing).is_none() {
                    return Err(TargetError::Unexpected(format!(
                        "{pages} pages of memory (the limit is {} bytes)",
                        memory.limit_bytes()
                    )));
                }
            }
            Message::Block {
                volume,
                inode,
                offset,
                bytes,
            } => volumes.block(volume, inode, offset, &bytes)?,
            Message::Cut {
                volume,
                inode,
                bytes,
            } => volumes.cut(volume, inode, bytes)?,
            Message::Log { offset, bytes } => output.take(offset, &bytes)?,
            Message::LogBegins { offset } => output.begins(offset)?,
            Message::RoundEnd => {
                failpoint::pass("target.round")?;
                output.request_missing(link)?;
                link.send(&match compilation.is_complete() {
                    true => Message::RoundDone,
                    false => Message::Compiling,
                })?;
                link.flush()?;
            }
            Message::Functions(functions) => {
                compilation
                    .add(functions)
                    .map_err(TargetError::StartCompile)?;
            }
            Message::Remote {
                memory,
                first_page,
                bits,
            } => match &post_copy_target {
                Some(post_copy_target) => post_copy_target.remote(memory, first_page, &bits)?,
                None => {
                    return Err(TargetError::Unexpected(
                        "remaining memory out of turn".into(),
                    ));
                }
            },
            Message::Parts(bytes) if part.is_some() => handover.add(&bytes)?,
            Message::Image(bytes) => image.add(&bytes)?,
            Message::ImageEnd => match output.request_missing(link)? {
                true => link.flush()?,
                false => break,
            },
            other => return Err(TargetError::Unexpected(format!("{other:?}"))),
        }
    }
    // The reserved bytes were used, or were not needed.
    let local = volumes.finish();
    failpoint::pass("target.image")?;
    let handover = match part {
        Some(part) => {
            let handover: HomeHandover = postcard::from_bytes(&handover.take())?;
            part.check_successor(&handover.home_state)?;
            Some((part, handover))
        }
        None => None,
    };
    let make = || -> Result<Machine, TargetError> {
        let image = Image::decode(&image.take(), &program)?;
        let wasi = restore(image.wasi.clone(), log.clone(), local)?;
        Ok(Machine::prepare(program, image, memories, wasi, limits)?)
    };
    let machine = make()?;
    failpoint::pass("target.ready")?;
    Ok(ReceivedMachine {
        machine,
        log,
        post_copy_target: post_copy_target.zip(push),
        handover,
    })
}

/// Handles a message that names pages written last, after the freeze; true at the last
/// one.
///
/// # Errors
/// [`LinkError::Message`] for any other message.
fn handle_page_names(
    message: &Message,
    post_copy_target: &PostCopyTarget,
) -> Result<bool, LinkError> {
    match message {
        // Memory cannot have grown after the freeze.
        Message::Size { .. } => {}
        Message::Remote {
            memory,
            first_page,
            bits,
        } => post_copy_target.remote(*memory, *first_page, bits)?,
        Message::RoundEnd => {
            post_copy_target.all_named();
            return Ok(true);
        }
        other => return Err(LinkError::Message(format!("{other:?} out of turn"))),
    }
    Ok(false)
}

impl WasmWorker {
    /// Prepares to receive a machine: its volumes, its program, and the limit of its memory.
    pub(super) fn prepare_target(
        self: &Arc<Self>,
        request: Receive,
        runtime: &Handle,
    ) -> Result<Receiver, RpcError> {
        let limits = WasmSpec::of(&request.spec)
            .map_err(RpcError::failed)?
            .limits(&request.spec);
        self.limit_memory(request.memory_pages.len(), &request.spec);
        ClusterVolumes::probe(&request.spec, runtime).map_err(RpcError::failed)?;
        let volumes =
            TargetVolumes::new(&request.spec, self.process.folder(), request.volume_bytes)
                .map_err(RpcError::failed)?;
        let program = request.program.as_ref();
        let program = program.ok_or_else(|| RpcError::failed("the offer names no program"))?;
        let bytes = std::fs::read(program)
            .map_err(|error| RpcError::failed(format!("{}: {error}", program.display())))?;
        let program = self
            .engine
            .load_instrumented(bytes)
            .map_err(RpcError::failed)?;
        if request.program_hash != Some(*program.hash()) {
            return Err(RpcError::failed(
                "the program here is not the one that was offered: its file is damaged",
            ));
        }
        {
            let mut inner = self.inner();
            inner.name = Some(request.machine.clone());
            inner.spec = Some(request.spec.clone());
        }
        let worker = self.clone();
        let runtime = runtime.clone();
        Ok(Box::new(move |link, accepted| {
            let restore = |snapshot, log: Arc<Log>, local| {
                let cluster_volumes = worker.open_cluster_volumes(&request.spec, &log, &runtime)?;
                let cluster_volumes = cluster_volumes.with_local(local);
                let resources = worker.resources(&request.spec, &log, &cluster_volumes)?;
                let wasi = Wasi::restore(snapshot, resources)?;
                cluster_volumes.attach(&wasi);
                worker.inner().cluster_volumes = cluster_volumes;
                Ok(wasi)
            };
            let telling = worker.clone();
            let fill = move |post_copy_target: &PostCopyTarget, listener, tls, hello| {
                let worker = telling.clone();
                post_copy_target.begin(listener, tls, hello, move |it| worker.publish_post_copy(it))
            };
            let part = worker.inner().parts.arriving();
            let environment = TargetEnvironment {
                program,
                limits,
                folder: worker.process.folder(),
                volumes,
                restore: &restore,
                fill: &fill,
                part,
            };
            let arrived = receive(link, accepted, environment).map_err(MoveError::from)?;
            worker.keep_received(arrived);
            Ok(())
        }))
    }

    /// Keeps a machine that has arrived until the store has decided.
    fn keep_received(&self, arrived: ReceivedMachine) {
        self.process.set_log(arrived.log);
        let mut inner = self.inner();
        if let Some((post_copy_target, links)) = arrived.post_copy_target {
            inner.post_copy_target = Some(post_copy_target);
            inner.post_copy_links = Some(links);
        }
        inner.machine = Some(arrived.machine);
        inner.handover = arrived.handover;
    }

    /// Publishes the progress of post-copy.
    fn publish_post_copy(&self, filling: PostCopyStatus) {
        self.process.publish_post_copy(filling);
        if filling == PostCopyStatus::Done {
            // Its threads have ended or are about to.
            self.inner().post_copy_target = None;
        }
    }

    /// Handles a message that names pages written last, if the source still names them.
    pub(super) fn handle_names(&self, message: &Message) -> Result<bool, LinkError> {
        let post_copy_target = {
            let inner = self.inner();
            let is_naming = !inner.all_named && message.names_pages();
            inner.post_copy_target.clone().filter(|_| is_naming)
        };
        let Some(post_copy_target) = post_copy_target else {
            return Ok(false);
        };
        if handle_page_names(message, &post_copy_target)? {
            self.inner().all_named = true;
        }
        Ok(true)
    }

    /// The remaining memory of a machine that runs here arrives by its move's connection.
    pub(super) fn hand_to_post_copy(&self, link: Link) {
        let links = self.inner().post_copy_links.take();
        let runs = matches!(*self.process.state.borrow(), State::Filling { .. });
        if let Some(links) = links.filter(|_| runs)
            && links.send(link).is_err()
        {
            tracing::warn!("no receiver for the remaining memory");
        }
    }

    /// Resumes a machine that arrived.
    pub(super) fn resume_received(&self, epoch: Epoch) {
        let (machine, handover) = {
            let mut inner = self.inner();
            (inner.machine.clone(), inner.handover.take())
        };
        if let Some((part, handover)) = handover {
            self.become_home(machine, &part, handover);
        }
        let inner = self.inner();
        inner.cluster_volumes.claim_under(epoch);
        if let Some(post_copy_target) = &inner.post_copy_target {
            post_copy_target.seal();
        }
        let machine = inner.machine.clone();
        drop(inner);
        if let Some(machine) = machine {
            machine.set_epoch(epoch.token());
            // The machine is ready; its guest cannot have ended.
            if let Err(error) = self.first_thaw(&machine) {
                tracing::error!(%error, "cannot resume a machine that arrived");
            }
            self.process.lease().machine_changed(self);
        }
    }

    /// The machine runs here, and its source knows.
    pub(super) fn after_resume(self: &Arc<Self>, epoch: Epoch) -> State {
        let (machine, post_copy_target) = {
            let inner = self.inner();
            (inner.machine.clone(), inner.post_copy_target.clone())
        };
        if let Some(post_copy_target) = &post_copy_target {
            post_copy_target.start_running();
        }
        if let Some(machine) = machine
            && let Err(error) = self.watch_end(machine)
        {
            tracing::error!(%error, "cannot watch for its end");
        }
        match post_copy_target {
            Some(_) => State::Filling {
                epoch,
                source_lost: false,
            },
            None => State::Running { epoch },
        }
    }

    /// Drops what has arrived.
    pub(super) fn drop_machine(&self, reason: &str) {
        let mut inner = self.inner();
        if let Some(machine) = inner.machine.take() {
            machine.stop();
        }
        inner.handover = None;
        if !inner.parts.is_member() {
            let reason = reason.to_owned();
            self.process.state.send_replace(State::Dropped { reason });
            return;
        }
        // Needed while a part of the machine is at this worker.
        inner.dropped_for = Some(reason.to_owned());
        self.process.state.send_if_modified(|state| match *state {
            State::Prepared { offered, .. } => {
                *state = State::Receiving { offered };
                true
            }
            _ => false,
        });
    }
}
