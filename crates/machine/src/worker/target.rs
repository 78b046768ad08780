//! The target's side of a move: receives pages, output, then threads and WASI state, and
//! builds a machine that is ready to resume. Blocking; runs on a thread of its own.

use super::control::{HomeHandover, Receive};
use super::log_transfer::LogTarget;
use super::post_copy::PostCopyTarget;
use super::stack_functions::Compilation;
use super::volumes::{TargetVolumes, VolumeError};
use crate::cgroup::YieldPolicy;
use crate::failpoint::{self, Injected};
use crate::link::{Hello, ImageBytes, Link, LinkError, Message};
use crate::log::Log;
use crate::span::{MemberPart, SpanError};
use keel_cluster::Epoch;
use keel_net::{PinnedIdentity, ServerTls};
use keel_wasi::volume::LocalBlocks;
use keel_wasm::memory::{MemoryError, Unavailable};
use keel_wasm::runtime::{Image, Machine, MachineError, Program, make_memories};
use std::cell::RefCell;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// Time limit for the source to connect.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);

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
    #[error(transparent)]
    Tls(#[from] keel_net::TlsError),
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
    #[error("the source did not connect in time")]
    Timeout,
    #[error("the source identifies itself as {0}, which was not agreed")]
    Other(String),
}

/// A machine that has arrived and is ready to resume, with the connection to its source.
pub(super) struct ReceivedMachine {
    pub(super) machine: Machine,
    pub(super) log: Arc<Log>,
    pub(super) link: Link,
    /// In a post-copy move: the receiver of the remaining pages, and the channel for its
    /// first connection.
    pub(super) post_copy_target: Option<(PostCopyTarget, Sender<Link>)>,
    /// For a machine that spans: the part that becomes its home, and the state for it.
    pub(super) handover: Option<(Arc<MemberPart>, HomeHandover)>,
}

/// What a move needs of the target's worker.
pub(super) struct TargetEnvironment<'a> {
    pub(super) restore: &'a RestoreWasi<'a>,
    pub(super) fill: &'a StartPostCopy<'a>,
    /// The part of the machine that is at this node, once the source has connected.
    pub(super) part: &'a dyn Fn() -> Option<Arc<MemberPart>>,
}

/// Starts to resolve accesses to memory; the hello authenticates further connections of
/// the source.
pub(super) type StartPostCopy<'a> =
    dyn Fn(&PostCopyTarget, TcpListener, ServerTls, Hello) -> std::io::Result<Sender<Link>> + 'a;

/// Restores WASI state from a snapshot, with this node's resources, a log, and the blocks
/// of cluster volumes that arrived.
pub(super) type RestoreWasi<'a> = dyn Fn(
        keel_wasi::Snapshot,
        Arc<Log>,
        Vec<(u32, LocalBlocks)>,
    ) -> Result<keel_wasi::Wasi, TargetError>
    + 'a;

/// Waits for the source and receives the machine.
pub(super) fn receive(
    listener: &TcpListener,
    identity: &PinnedIdentity,
    request: &Receive,
    program: Arc<Program>,
    folder: &std::path::Path,
    mut volumes: TargetVolumes,
    surroundings: &TargetEnvironment<'_>,
) -> Result<ReceivedMachine, TargetError> {
    let tls = ServerTls::pinned(identity, request.source)?;
    let (mut link, hello) = accept(listener, &tls, request, &program)?;
    failpoint::pass("in.greeted")?;
    let limits = request.spec.limits();
    let part = (surroundings.part)();
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
            let begin =
                |listener| (surroundings.fill)(post_copy_target, listener, tls, hello.clone());
            let begun = listener.try_clone().and_then(begin);
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
        Ok(memory.write(offset, bytes)?)
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
                    .ok_or_else(|| TargetError::Other(format!("memory {memory}")))?;
                let missing = pages.saturating_sub(memory.size_bytes() >> 16);
                if memory.grow(missing).is_none() {
                    return Err(TargetError::Other(format!(
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
                failpoint::pass("in.round")?;
                if let Some(again) = output.missing()? {
                    link.send(&again)?;
                }
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
                None => return Err(TargetError::Other("remaining memory out of turn".into())),
            },
            Message::Parts(bytes) if part.is_some() => handover.add(&bytes)?,
            Message::Image(bytes) => image.add(&bytes)?,
            Message::ImageEnd => match output.missing()? {
                Some(again) => {
                    link.send(&again)?;
                    link.flush()?;
                }
                None => break,
            },
            other => return Err(TargetError::Other(format!("{other:?}"))),
        }
    }
    // The reserved bytes were used, or were not needed.
    let local = volumes.finish();
    failpoint::pass("in.image")?;
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
        let wasi = (surroundings.restore)(image.wasi.clone(), log.clone(), local)?;
        Ok(Machine::prepare(program, image, memories, wasi, limits)?)
    };
    let machine = make()?;
    failpoint::pass("in.ready")?;
    Ok(ReceivedMachine {
        machine,
        log,
        link,
        post_copy_target: post_copy_target.zip(push),
        handover,
    })
}

/// Handles a message that names pages written last, after the freeze; true at the last
/// one.
///
/// # Errors
/// [`LinkError::Message`] for any other message.
pub(super) fn handle_page_names(
    message: Message,
    post_copy_target: &PostCopyTarget,
) -> Result<bool, LinkError> {
    match message {
        // Memory cannot have grown after the freeze.
        Message::Size { .. } => {}
        Message::Remote {
            memory,
            first_page,
            bits,
        } => post_copy_target.remote(memory, first_page, &bits)?,
        Message::RoundEnd => {
            post_copy_target.all_named();
            return Ok(true);
        }
        other => return Err(LinkError::Message(format!("{other:?} out of turn"))),
    }
    Ok(false)
}

/// Waits for a peer with the agreed certificate and hello. Other peers are rejected and
/// do not end the move.
fn accept(
    listener: &TcpListener,
    tls: &ServerTls,
    request: &Receive,
    program: &Program,
) -> Result<(Link, Hello), TargetError> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + CONNECT_PATIENCE;
    loop {
        match listener.accept() {
            Ok((socket, peer)) => {
                socket.set_nonblocking(false)?;
                match greet(socket, tls, request, program) {
                    Ok(link) => return Ok(link),
                    Err(error) => tracing::warn!(%peer, %error, "rejected a peer"),
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let rest = deadline.saturating_duration_since(Instant::now());
                if rest.is_zero() {
                    return Err(TargetError::Timeout);
                }
                let mut wait = [rustix::event::PollFd::new(
                    listener,
                    rustix::event::PollFlags::IN,
                )];
                let timeout = rustix::event::Timespec {
                    tv_sec: rest.as_secs() as i64,
                    tv_nsec: rest.subsec_nanos().into(),
                };
                rustix::event::poll(&mut wait, Some(&timeout)).map_err(std::io::Error::from)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn greet(
    socket: std::net::TcpStream,
    tls: &ServerTls,
    request: &Receive,
    program: &Program,
) -> Result<(Link, Hello), TargetError> {
    let mut link = Link::accept(socket, tls)?;
    let Message::Hello(hello) = link.receive()? else {
        return Err(TargetError::Other("no hello".into()));
    };
    if hello.machine != request.machine
        || hello.epoch != request.offered
        || hello.program != *program.hash()
    {
        return Err(TargetError::Other(format!(
            "machine {} under epoch {}",
            hello.machine, hello.epoch
        )));
    }
    Ok((link, hello))
}

impl ReceivedMachine {
    /// Tells the source that the machine is ready.
    pub(super) fn send_prepared(&mut self) -> Result<(), LinkError> {
        self.link.send(&Message::Prepared)?;
        self.link.flush()?;
        self.link.wait_without_timeout()
    }
}

/// Tells the source that the machine runs here.
pub(super) fn send_resumed(link: &mut Link, epoch: Epoch) -> Result<(), LinkError> {
    link.send(&Message::Resumed(epoch))?;
    link.flush()
}
