//! Receives a machine: pages, output, then threads and WASI state, from which
//! it makes a machine that stands ready. Blocking; has a thread of its own.

use super::control::{Receive, Succession};
use super::log_transfer::LogTarget;
use super::post_copy::Filler;
use super::volumes::{IncomingVolumes, VolumeError};
use crate::cgroup::Courtesy;
use crate::failpoint::{self, Injected};
use crate::link::{HELLO_BEFORE, Hello, ImageBytes, Link, LinkError, Message};
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

/// How long the source has to connect.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub(super) enum IncomingError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("the machine's output cannot be kept: {0}")]
    Log(#[from] std::io::Error),
    #[error(transparent)]
    Tls(#[from] keel_net::TlsError),
    #[error("its surroundings cannot be had here: {0}")]
    Wasi(#[from] keel_wasi::Error),
    #[error("{0}")]
    Keepers(#[from] keel_net::RpcError),
    #[error(transparent)]
    Faults(#[from] Unavailable),
    #[error("what brings its memory behind it does not start: {0}")]
    Fill(std::io::Error),
    #[error(transparent)]
    Injected(#[from] Injected),
    #[error(transparent)]
    Span(#[from] SpanError),
    #[error("what its home leaves cannot be read: {0}")]
    Legacy(#[from] postcard::Error),
    #[error("the source did not connect in time")]
    NobodyCame,
    #[error("the source says {0}, which was not agreed")]
    Other(String),
}

/// A machine that has arrived and stands ready, with the way to its source.
pub(super) struct Arrived {
    pub(super) machine: Machine,
    pub(super) log: Arc<Log>,
    pub(super) link: Link,
    /// In a post-copy move: what brings the rest of its memory, and who takes the
    /// connection over which it comes.
    pub(super) filler: Option<(Filler, Sender<Link>)>,
    /// Of one that spans: the part that is to be its home, and what that is told.
    pub(super) succession: Option<(Arc<MemberPart>, Succession)>,
}

/// What a move needs of the worker that it comes to.
pub(super) struct Surroundings<'a> {
    pub(super) restore: &'a Restore<'a>,
    pub(super) fill: &'a Fill<'a>,
    /// The part of the machine that is here, once its source has connected.
    pub(super) part: &'a dyn Fn() -> Option<Arc<MemberPart>>,
}

/// Begins to answer accesses to memory, with what tells the source's further
/// connections from others'.
pub(super) type Fill<'a> =
    dyn Fn(&Filler, TcpListener, ServerTls, Hello) -> std::io::Result<Sender<Link>> + 'a;

/// Makes WASI state out of a snapshot, with this node's resources, a log, and what
/// came of cluster volumes.
pub(super) type Restore<'a> = dyn Fn(
        keel_wasi::Snapshot,
        Arc<Log>,
        Vec<(u32, LocalBlocks)>,
    ) -> Result<keel_wasi::Wasi, IncomingError>
    + 'a;

/// Waits for the source and takes the machine in.
pub(super) fn receive(
    listener: &TcpListener,
    identity: &PinnedIdentity,
    request: &Receive,
    program: Arc<Program>,
    folder: &std::path::Path,
    mut volumes: IncomingVolumes,
    surroundings: &Surroundings<'_>,
) -> Result<Arrived, IncomingError> {
    let tls = ServerTls::pinned(identity, request.source)?;
    let (mut link, hello) = accept(listener, &tls, request, &program)?;
    failpoint::pass("in.greeted")?;
    let limits = request.spec.limits();
    let part = (surroundings.part)();
    let memories = match &part {
        // (What is in it came on other ways.)
        Some(part) => part.memories().clone(),
        None => make_memories(program.meta(), limits.memory_bytes)?,
    };
    let log = Arc::new(Log::open(folder, hello.log_base)?);
    let mut output = LogTarget::new(log.clone());
    let filler = match hello.post_copy {
        true => Some(Filler::new(memories.clone())?),
        false => None,
    };
    // Its threads are made before the machine stands still.
    let push = match &filler {
        Some(filler) => {
            let begin = |listener| (surroundings.fill)(filler, listener, tls, hello.clone());
            let begun = listener.try_clone().and_then(begin);
            Some(begun.map_err(IncomingError::Fill)?)
        }
        None => None,
    };
    let (mut image, mut succession) = (ImageBytes::default(), ImageBytes::default());
    // (A source of the version before does not say when its machine stands.)
    let begun = (hello.version > HELLO_BEFORE).then(Courtesy::begin);
    let courtesy = RefCell::new(begun.flatten());
    let mut write = |memory: u32, offset: u64, bytes: &[u8]| {
        if let Some(courtesy) = &mut *courtesy.borrow_mut() {
            courtesy.look();
        }
        let memory = memories
            .get(memory as usize)
            .filter(|_| part.is_none())
            .ok_or_else(|| LinkError::Message(format!("pages of memory {memory}")))?;
        Ok(memory.write(offset, bytes)?)
    };
    loop {
        match link.receive_pages(&mut write)? {
            Message::Stands => {
                courtesy.take();
            }
            Message::Size { memory, pages } => {
                let memory = memories
                    .get(memory as usize)
                    .filter(|_| part.is_none())
                    .ok_or_else(|| IncomingError::Other(format!("memory {memory}")))?;
                let missing = pages.saturating_sub(memory.size_bytes() >> 16);
                if memory.grow(missing).is_none() {
                    return Err(IncomingError::Other(format!(
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
                link.send(&Message::RoundDone)?;
                link.flush()?;
            }
            Message::Remote {
                memory,
                first_page,
                bits,
            } => match &filler {
                Some(filler) => filler.remote(memory, first_page, &bits)?,
                None => return Err(IncomingError::Other("memory that comes later".into())),
            },
            Message::Parts(bytes) if part.is_some() => succession.add(&bytes)?,
            Message::Image(bytes) => image.add(&bytes)?,
            Message::ImageEnd => match output.missing()? {
                Some(again) => {
                    link.send(&again)?;
                    link.flush()?;
                }
                None => break,
            },
            other => return Err(IncomingError::Other(format!("{other:?}"))),
        }
    }
    // What was reserved is here, or was not needed.
    let local = volumes.finish();
    failpoint::pass("in.image")?;
    let succession = match part {
        Some(part) => {
            let succession: Succession = postcard::from_bytes(&succession.take())?;
            part.can_succeed(&succession.legacy)?;
            Some((part, succession))
        }
        None => None,
    };
    let make = || -> Result<Machine, IncomingError> {
        let image = Image::decode(&image.take(), &program)?;
        let wasi = (surroundings.restore)(image.wasi.clone(), log.clone(), local)?;
        Ok(Machine::prepare(program, image, memories, wasi, limits)?)
    };
    let machine = make()?;
    if let Some(filler) = &filler
        && hello.version <= HELLO_BEFORE
    {
        while !hear_names(link.receive()?, filler)? {}
    }
    failpoint::pass("in.ready")?;
    Ok(Arrived {
        machine,
        log,
        link,
        filler: filler.zip(push),
        succession,
    })
}

/// Hears which pages were written last, while the machine stood already; true at the
/// end of them.
///
/// # Errors
/// [`LinkError::Message`] for anything else.
pub(super) fn hear_names(message: Message, filler: &Filler) -> Result<bool, LinkError> {
    match message {
        // (It cannot have grown since its threads stand.)
        Message::Size { .. } => {}
        Message::Remote {
            memory,
            first_page,
            bits,
        } => filler.remote(memory, first_page, &bits)?,
        Message::RoundEnd => {
            filler.all_named();
            return Ok(true);
        }
        other => return Err(LinkError::Message(format!("{other:?} out of turn"))),
    }
    Ok(false)
}

/// Waits for a peer that has the agreed certificate and says the agreed hello.
/// Others are turned away and do not end the move.
fn accept(
    listener: &TcpListener,
    tls: &ServerTls,
    request: &Receive,
    program: &Program,
) -> Result<(Link, Hello), IncomingError> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + CONNECT_PATIENCE;
    loop {
        match listener.accept() {
            Ok((socket, peer)) => {
                socket.set_nonblocking(false)?;
                match greet(socket, tls, request, program) {
                    Ok(link) => return Ok(link),
                    Err(error) => tracing::warn!(%peer, %error, "turned a peer away"),
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let rest = deadline.saturating_duration_since(Instant::now());
                if rest.is_zero() {
                    return Err(IncomingError::NobodyCame);
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
) -> Result<(Link, Hello), IncomingError> {
    let mut link = Link::accept(socket, tls)?;
    let Message::Hello(hello) = link.receive()? else {
        return Err(IncomingError::Other("no hello".into()));
    };
    if hello.machine != request.machine
        || hello.epoch != request.offered
        || hello.program != *program.hash()
    {
        return Err(IncomingError::Other(format!(
            "machine {} under epoch {}",
            hello.machine, hello.epoch
        )));
    }
    Ok((link, hello))
}

impl Arrived {
    /// Tells the source that all is ready.
    pub(super) fn say_prepared(&mut self) -> Result<(), LinkError> {
        self.link.send(&Message::Prepared)?;
        self.link.flush()?;
        self.link.be_patient()
    }
}

/// Tells the source that the machine runs here.
pub(super) fn say_resumed(link: &mut Link, epoch: Epoch) -> Result<(), LinkError> {
    link.send(&Message::Resumed(epoch))?;
    link.flush()
}
