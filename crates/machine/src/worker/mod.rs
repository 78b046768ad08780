//! The process around one machine, of any kind, and its protocol with its agent.
//!
//! - `control`: requests, answers and events between agent and worker
//! - `process`: what the process of every kind has: its socket, its output, its states
//! - `requests`: decodes requests, calls the kind, encodes answers
//! - `source`: moving the machine away, one attempt at a time
//! - `target`: receiving a machine, until the store has decided
//! - `lease`: keeps a machine from running when its node's lease has ended
//! - `log_transfer`: the machine's output during a move
//! - `viewers`: who sees the machine's display
//! - `files`: operations of users on files in volumes
//! - `volume_folder`: where the machine's own volumes are stored
//!
//! ```text
//!   agent ── requests ──▶ Process ── calls ──▶ Worker (of a kind: its machine, its memory)
//!                            │                    ▲
//!                            └─ source, target ───┘ copy, freeze, resume, thaw, drop
//! ```
//!
//! A kind implements [`Worker`] and, for moves, [`SourceSession`]. What a move means (one
//! attempt at a time, what may be given up until when, under which epoch the machine
//! resumes and where) is here and the same for all kinds; how memory gets to the target is
//! the kind's.
//!
//! A worker outlives its agent, which finds it again through the socket in its folder. It
//! never decides who owns the machine; it obeys its agent, which reads the store.

pub mod control;
pub mod files;
mod lease;
mod log_transfer;
mod process;
mod requests;
mod source;
mod target;
mod viewers;
pub mod volume_folder;

pub use lease::Guard;
pub use log_transfer::{LogSource, LogTarget};
pub use process::{PostCopyStatus, Process, publish_resumed, run, write_notice, write_restored};
pub use requests::blocking;
pub use source::{Connect, ConnectToTarget, copy};
pub use target::{Accepted, Receiver, step_target};

use self::control::{
    Checkpoint, CheckpointReport, ConsoleInput, Copy, CopyEvent, Execute, ExecutionEnd, FileDone,
    FileRequest, Frozen, GuestMemory, GuestSystem, Receive, Report, Start, State,
};
use self::source::SourceTask;
use crate::link::{Link, LinkError, Message};
use crate::moves::prediction::Activity;
use crate::moves::{FillReport, TargetMove};
use crate::spec::Spec;
use keel_cluster::Epoch;
use keel_net::{BoxFuture, Bytes, PinnedIdentity, Reply, RpcError};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use tokio::runtime::Handle;

/// The error of a kind whose machines have no processes ([`Abilities::executes`]).
///
/// [`Abilities::executes`]: crate::kind::Abilities::executes
const NO_PROCESSES: &str = "no command can be executed in a machine of its kind";

/// Name of the socket in a worker's folder.
pub const SOCKET: &str = "socket";

/// Why a step of a move failed. The machine runs on at its source, unless it ended.
pub type MoveError = Box<dyn std::error::Error + Send + Sync>;

/// One attempt to move a machine away, of a kind: its connection to the target, and what it
/// has sent. Blocking; used by one thread at a time.
pub trait SourceSession: Send + Sized + 'static {
    /// A handle that closes the connection from another thread.
    ///
    /// # Errors
    /// If the socket cannot be duplicated.
    fn closer(&self) -> Result<TcpStream, MoveError>;

    /// Copies what can be copied while the machine runs, until little is left. `tell`
    /// returns false once nobody listens.
    ///
    /// # Errors
    /// [`MoveError`].
    fn copy(&mut self, tell: &mut dyn FnMut(CopyEvent) -> bool) -> Result<(), MoveError>;

    /// Freezes the machine and sends the rest; returns when the target is ready to resume
    /// it.
    ///
    /// # Errors
    /// [`MoveError`]; the machine may be frozen or not. If it has ended, the text says
    /// "has ended": the agent then records the end.
    fn freeze_and_send(&mut self) -> Result<Frozen, MoveError>;

    /// Whether there is work that can be done while the store commits.
    fn has_work_during_commit(&self) -> bool {
        false
    }

    /// Does that work; [`Self::go`] reports its failure.
    fn work_during_commit(&mut self) {}

    /// Tells the target that the commit was applied; returns when the machine runs there.
    ///
    /// # Errors
    /// [`MoveError`]: whether it runs there is unknown.
    fn go(&mut self, epoch: Epoch) -> Result<(), MoveError>;

    /// Sends what the target still lacks, for as long as it takes (post-copy).
    fn serve(self, unsent: &AtomicU64) -> FillReport;

    /// Undoes what stands in the way of a thaw. Asked again after an error.
    ///
    /// # Errors
    /// If the machine cannot run on here: it has ended then, or may yet be able to.
    fn cancel(&mut self) -> Result<(), MoveError>;

    /// Gives the move up. Does not thaw the machine.
    fn abort(self, reason: &str);
}

/// State of moves in a worker. The kind keeps it under the lock of its own state, so that
/// an operation sees both at one instant.
#[derive(Debug)]
pub struct MoveState<S> {
    /// The epoch under which the machine runs here, or ran last.
    pub epoch: Epoch,
    /// Certificate for the next move.
    identity: Option<PinnedIdentity>,
    outgoing: Option<SourceTask<S>>,
    /// From the first page sent until the machine resumes here.
    moving_away: bool,
    /// A thread copies, or tells the target to resume, and owns the session of the move.
    copying: bool,
    going: bool,
    /// Ends the copying early, where the connection does not.
    give_up: Option<Arc<AtomicBool>>,
    /// Counts the attempts to move the machine: a late thread of an earlier attempt must
    /// not affect the next one.
    attempt: u64,
    /// The move was given up: a freeze that starts or is in progress must not leave the
    /// machine frozen.
    given_up: bool,
    /// Closes the connection that a copying thread uses.
    closer: Option<TcpStream>,
    target: Option<TargetMove>,
    /// Set once the source sends pages of a machine that runs at the target.
    serving: bool,
    post_copy: bool,
    /// Bytes that are still to be sent.
    unsent: Arc<AtomicU64>,
    /// The report of post-copy.
    fill: Option<FillReport>,
}

impl<S> Default for MoveState<S> {
    fn default() -> Self {
        MoveState {
            epoch: Epoch::default(),
            identity: None,
            outgoing: None,
            moving_away: false,
            copying: false,
            going: false,
            give_up: None,
            attempt: 0,
            given_up: false,
            closer: None,
            target: None,
            serving: false,
            post_copy: false,
            unsent: Arc::default(),
            fill: None,
        }
    }
}

impl<S> MoveState<S> {
    /// Whether the machine is moving away from here; it may be frozen.
    pub fn is_moving_away(&self) -> bool {
        self.moving_away
    }

    /// Whether an attempt to move the machine is the present one.
    fn is_attempt(&self, attempt: u64) -> bool {
        self.attempt == attempt && !self.given_up
    }
}

/// What a kind does in its worker process. Methods block unless they say otherwise; they
/// are called outside the async runtime.
pub trait Worker: Send + Sync + Sized + 'static {
    /// One attempt to move the machine away.
    type Session: SourceSession;

    /// What the process of every kind has.
    fn process(&self) -> &Process;

    /// Accesses the state of moves, under the lock of the kind's own state.
    fn moves<R>(&self, access: impl FnOnce(&mut MoveState<Self::Session>) -> R) -> R;

    /// Starts a machine; the process is empty.
    ///
    /// # Errors
    /// Why it did not start.
    fn start(self: &Arc<Self>, start: Start, runtime: &Handle) -> Result<(), RpcError>;

    /// Adds to a report what only the kind knows.
    fn describe(&self, report: &mut Report);

    /// Ends the machine. Does not block.
    fn stop(&self);

    /// Changes the limits of the running machine. Nothing changes if it is refused.
    ///
    /// # Errors
    /// Why it is refused.
    fn set(&self, spec: Spec) -> Result<(), RpcError>;

    /// Releases what outlives the process, before it is ended.
    fn release(&self) {}

    /// A move is being offered: prepares what its freeze would wait for. Does not block.
    fn prepare_move(&self) {}

    /// Prepares an attempt to move the machine, while nothing freezes or thaws it.
    ///
    /// # Errors
    /// Why it cannot move.
    fn begin_move(self: &Arc<Self>, copy: &Copy) -> Result<Connect<Self::Session>, String>;

    /// The machine stays here, under an epoch that may be newer. It is frozen, or runs if
    /// it was not frozen yet.
    fn stay_under(&self, epoch: Epoch);

    /// Resumes the frozen machine at its source.
    ///
    /// # Errors
    /// If it cannot run on.
    fn thaw(&self) -> Result<(), RpcError>;

    /// Stops the machine's threads where they are, until [`Self::release_for_lease`]. Does not wait
    /// for them: true once nothing of the machine runs here, so that nothing of it has an effect.
    /// Called again until then.
    fn hold_for_lease(&self) -> bool;

    /// Lets the machine's threads run on.
    fn release_for_lease(&self);

    /// Prepares to receive a machine; the process is empty. The result is called on a
    /// thread of its own.
    ///
    /// # Errors
    /// Why it cannot be received here.
    fn begin_receive(
        self: &Arc<Self>,
        request: Receive,
        runtime: &Handle,
    ) -> Result<Receiver, RpcError>;

    /// The agent asks the arrived machine to resume: waits for what must precede.
    fn before_resume(&self) {}

    /// A message of the source to a machine that has arrived and does not run yet: true if
    /// it was the kind's.
    ///
    /// # Errors
    /// If the move cannot go on by this connection.
    fn source_message(&self, _message: &Message) -> Result<bool, LinkError> {
        Ok(false)
    }

    /// Whether the source sends more once the machine runs here (post-copy).
    fn expects_more(&self) -> bool {
        false
    }

    /// The source is done with this connection; the machine may run here.
    fn after_source(&self, _link: Link) {}

    /// The source is disconnected before the machine runs here.
    fn source_lost(&self) {}

    /// Resumes a machine that arrived, under its new epoch.
    ///
    /// # Errors
    /// Why it does not run here and never has: what has arrived is dropped, and the machine goes on
    /// where it came from. One that may have run for a moment ends instead.
    fn resume(self: &Arc<Self>, epoch: Epoch) -> Result<(), String>;

    /// The machine runs here and its source knows: the state to publish.
    fn resumed(self: &Arc<Self>, epoch: Epoch) -> State;

    /// Drops what has arrived.
    fn drop_received(&self, reason: &str);

    /// Makes a checkpoint.
    ///
    /// # Errors
    /// Why none was made. The machine runs on.
    fn checkpoint(
        &self,
        request: &Checkpoint,
        runtime: &Handle,
    ) -> Result<CheckpointReport, RpcError>;

    /// Gives up a checkpoint in progress, because a move takes precedence.
    ///
    /// # Errors
    /// If it goes on.
    fn end_checkpoint(&self) -> Result<(), RpcError> {
        Ok(())
    }

    /// Samples the machine's writes for a moment.
    ///
    /// # Errors
    /// Why they cannot be sampled now.
    fn activity(&self) -> Result<Activity, RpcError>;

    /// A new viewer's connection to the machine's display, if that runs here under this epoch. What
    /// goes over it is the protocol of RFC 6143 (RFB), of which the machine is the server.
    ///
    /// # Errors
    /// If it has none, or does not run here.
    fn connect_viewer(&self, _epoch: Epoch) -> Result<UnixStream, RpcError> {
        Err(RpcError::failed("machines of its kind have no display"))
    }

    /// The machine's memory, if it can give some back to its node.
    ///
    /// # Errors
    /// If that cannot be told now.
    fn memory(&self) -> Result<Option<GuestMemory>, RpcError> {
        Ok(None)
    }

    /// Asks the machine to have given back so many bytes of memory.
    ///
    /// # Errors
    /// If it cannot be asked now, or has nothing to give back.
    fn give_back(&self, _bytes: u64) -> Result<(), RpcError> {
        Err(RpcError::failed("it has no memory to give back"))
    }

    /// Performs a user's operation on a file in one of the machine's own volumes.
    ///
    /// # Errors
    /// Why it was not done.
    fn file(&self, _request: FileRequest) -> Result<FileDone, RpcError> {
        Err(RpcError::failed("the machine has no such volume"))
    }

    /// Starts a process in the machine; returns its number there.
    ///
    /// # Errors
    /// Why none was started, or that it is unknown whether one was.
    fn execute(&self, _process: &Execute) -> Result<i64, RpcError> {
        Err(RpcError::failed(NO_PROCESSES))
    }

    /// What the machine's guest agent tells of the system in it.
    ///
    /// # Errors
    /// If it has none, or none that answers.
    fn system(&self) -> Result<GuestSystem, RpcError> {
        Err(RpcError::failed("machines of its kind have no guest agent"))
    }

    /// How such a process ended; `None` while it runs.
    ///
    /// # Errors
    /// Why that is not known.
    fn executed(&self, _process: i64) -> Result<Option<ExecutionEnd>, RpcError> {
        Err(RpcError::failed(NO_PROCESSES))
    }

    /// Types into the machine's console what it takes within a few seconds; returns how many bytes
    /// of the session that were, `None` if it is not known here: to be asked again. A machine that is
    /// stopped, or has another epoch, takes none.
    ///
    /// # Errors
    /// Why nothing more can be typed.
    fn type_in(&self, _epoch: Epoch, _input: &ConsoleInput) -> Result<Option<u64>, RpcError> {
        Err(RpcError::failed("a machine of its kind has no console"))
    }

    /// Answers a request that only this kind has. Runs on the async runtime.
    fn answer(
        self: Arc<Self>,
        kind: u16,
        _payload: Bytes,
    ) -> BoxFuture<'static, Result<Reply, RpcError>> {
        Box::pin(async move { Err(RpcError::refused(format!("no request of kind {kind:#x}"))) })
    }
}
