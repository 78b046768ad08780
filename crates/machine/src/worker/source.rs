//! Moving the machine away, for every kind: one attempt at a time, which another request
//! may give up in any phase before the commit.
//!
//! ```text
//!   copy ──converged──▶ idle ──freeze──▶ idle ──go──▶ told ──serve──▶ (post-copy only)
//!     │ given up, lost    │ given up       │ thaw: the machine stays, under an epoch that the
//!     └──────▶ runs ◀─────┴────────────────┘       agent got from the store
//! ```
//!
//! A session has one user at a time: the thread that copies takes it out of the state and
//! puts it back. To give up a session that is in use its connection is closed.

use super::control::{Copy, CopyEvent, Frozen, State, pack};
use super::{MoveError, SourceSession, Worker, publish_resumed, target};
use crate::failpoint;
use crate::link::LinkError;
use crate::moves::{TargetEvent, TargetState};
use keel_cluster::Epoch;
use keel_net::{Bytes, PinnedIdentity, RpcError};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long a freeze waits for the thread that has just reported convergence.
const HANDBACK_PATIENCE: Duration = Duration::from_secs(1);

/// Waits for what excludes a move, and connects to the target.
pub type ConnectToTarget<S> = Box<dyn FnOnce(&PinnedIdentity) -> Result<S, MoveError> + Send>;

/// An attempt that a kind has prepared.
pub struct Connect<S> {
    /// Ends the attempt early where closing its connection does not.
    pub give_up: Option<Arc<AtomicBool>>,
    pub connect: ConnectToTarget<S>,
}

impl<S> fmt::Debug for Connect<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connect")
            .field("give_up", &self.give_up)
            .finish_non_exhaustive()
    }
}

/// A session that is not in use by its move.
pub(super) enum SourceTask<S> {
    Idle(Box<S>),
    /// A thread works on it while the store commits.
    Working(JoinHandle<S>),
}

impl<S> fmt::Debug for SourceTask<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SourceTask::Idle(_) => "Idle",
            SourceTask::Working(_) => "Working",
        })
    }
}

impl<S: SourceSession> SourceTask<S> {
    fn idle(session: S) -> Self {
        SourceTask::Idle(Box::new(session))
    }

    /// Starts the work that can be done while the store commits, if there is any.
    ///
    /// # Errors
    /// If no thread can be started: the connection is lost then.
    fn after_freeze(mut session: S) -> std::io::Result<Self> {
        if !session.has_work_during_commit() {
            return Ok(Self::idle(session));
        }
        let thread = std::thread::Builder::new().name("commit-work".into());
        let work = move || {
            session.work_during_commit();
            session
        };
        Ok(SourceTask::Working(thread.spawn(work)?))
    }

    /// Waits until the session is idle.
    fn wait(self) -> S {
        match self {
            SourceTask::Idle(session) => *session,
            SourceTask::Working(thread) => thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        }
    }
}

/// Copies the machine to a target while it runs, and streams the progress. `prepare` is
/// called while nothing freezes or thaws the machine.
pub fn copy<W: Worker>(
    worker: &Arc<W>,
    copy: &Copy,
    prepare: impl FnOnce(&Arc<W>) -> Result<Connect<W::Session>, String>,
    events: &mpsc::Sender<Bytes>,
) {
    let mut tell = |event: CopyEvent| match pack(&event) {
        Ok(bytes) => events.blocking_send(bytes).is_ok(),
        Err(_) => false,
    };
    // Other changes of the machine take this lock and check whether it is moving.
    let freezing = worker.process().freezing();
    let prepared = match prepare(worker) {
        Ok(prepared) => prepared,
        Err(reason) => {
            tell(CopyEvent::Lost { reason });
            return;
        }
    };
    let Some((identity, attempt)) = begin_attempt(&**worker, copy, prepared.give_up.clone()) else {
        tell(CopyEvent::Lost {
            reason: "this worker has no machine to move".into(),
        });
        return;
    };
    drop(freezing);
    let aborted = |reason: &str| MoveError::from(LinkError::Aborted(reason.to_owned()));
    let connected = (prepared.connect)(&identity);
    let result = connected.and_then(|mut session| {
        let closer = session.closer()?;
        let is_current = worker.moves(|moves| {
            let is_current = moves.is_attempt(attempt);
            if is_current {
                moves.closer = Some(closer);
            }
            is_current
        });
        if !is_current {
            return Err(aborted("the move was given up"));
        }
        session.copy(&mut tell).map(|()| session)
    });
    let mut result = Some(result);
    let mut is_cancelled = false;
    let (given_up, failure) = loop {
        let settled = worker.moves(|moves| {
            let is_current = moves.is_attempt(attempt);
            if !is_current && !is_cancelled && matches!(result, Some(Ok(_))) {
                // What stands in the way of a thaw is undone while the machine counts as moving.
                return None;
            }
            if moves.attempt == attempt {
                moves.copying = false;
                // The request to give up left this to the copying thread.
                moves.moving_away &= !moves.given_up;
            }
            Some(match result.take()? {
                Ok(session) if is_current => {
                    moves.outgoing = Some(SourceTask::idle(session));
                    (None, None)
                }
                Ok(session) => (Some(session), None),
                Err(error) => {
                    if moves.attempt == attempt {
                        moves.moving_away = false;
                    }
                    (None, Some(error.to_string()))
                }
            })
        });
        if let Some(settled) = settled {
            break settled;
        }
        if let Some(Ok(session)) = &mut result {
            cancel_given_up(session);
        }
        is_cancelled = true;
    };
    if let Some(session) = given_up {
        abort_in_background(
            Some(SourceTask::idle(session)),
            "the move was given up".into(),
        );
    }
    if let Some(reason) = failure {
        tell(CopyEvent::Lost { reason });
    }
}

/// Before the machine's parts can change.
fn cancel_given_up<S: SourceSession>(session: &mut S) {
    if let Err(error) = session.cancel() {
        tracing::warn!(%error, "a machine was lost during its move");
    }
}

/// Marks the machine as moving away; `None` if it cannot begin.
fn begin_attempt<W: Worker>(
    worker: &W,
    copy: &Copy,
    give_up: Option<Arc<AtomicBool>>,
) -> Option<(PinnedIdentity, u64)> {
    worker.moves(|moves| {
        if moves.outgoing.is_some() {
            return None;
        }
        let identity = moves.identity.take();
        moves.moving_away = identity.is_some();
        moves.copying = identity.is_some();
        moves.given_up = false;
        moves.give_up = give_up;
        moves.attempt += 1;
        moves.post_copy = copy.post_copy;
        // State of an earlier move does not count.
        moves.serving = false;
        moves.fill = None;
        moves.unsent = Arc::default();
        identity.map(|identity| (identity, moves.attempt))
    })
}

/// Freezes the machine and sends the rest; returns when the target is ready.
pub(super) fn freeze<W: Worker>(worker: &W) -> Result<Frozen, RpcError> {
    // `copy` reports convergence a moment before it puts the session back.
    let deadline = Instant::now() + HANDBACK_PATIENCE;
    let _freezing = worker.process().freezing();
    let mut session = loop {
        let outgoing = worker.moves(|moves| match moves.given_up {
            true => Err(RpcError::refused("the move was given up")),
            false => Ok(moves.outgoing.take()),
        })?;
        if let Some(outgoing) = outgoing {
            break outgoing.wait();
        }
        if Instant::now() > deadline {
            return Err(RpcError::refused("nothing was copied"));
        }
        std::thread::yield_now();
    };
    let result = session.freeze_and_send();
    let outgoing = match &result {
        Ok(_) => SourceTask::after_freeze(session).map_err(RpcError::failed)?,
        Err(_) => SourceTask::idle(session),
    };
    worker.moves(|moves| moves.outgoing = Some(outgoing));
    result.map_err(RpcError::failed)
}

/// At the source: tells the target to resume. At the target: resumes. Returns the time in
/// microseconds until the machine runs.
pub(super) fn go<W: Worker>(worker: &Arc<W>, epoch: Epoch) -> Result<u64, RpcError> {
    let begun = Instant::now();
    // A machine that arrived by a move may be in its next move already: the outgoing one
    // counts.
    let outgoing = worker.moves(|moves| {
        let outgoing = moves.outgoing.take();
        moves.going |= outgoing.is_some();
        outgoing
    });
    let Some(outgoing) = outgoing else {
        return resume_at_target(worker, epoch, begun);
    };
    let mut session = outgoing.wait();
    let result = session.go(epoch);
    worker.moves(|moves| {
        moves.outgoing = Some(SourceTask::idle(session));
        moves.going = false;
    });
    result.map_err(RpcError::unknown)?;
    let took = micros(begun.elapsed());
    // Readers of its output continue at the target.
    if let Some(log) = worker.process().log() {
        log.close();
    }
    if worker.moves(|moves| moves.post_copy) {
        // At once: threads wait there.
        serve(worker)?;
    }
    Ok(took)
}

fn resume_at_target<W: Worker>(
    worker: &Arc<W>,
    epoch: Epoch,
    begun: Instant,
) -> Result<u64, RpcError> {
    let (moving_away, has_target) =
        worker.moves(|moves| (moves.moving_away, moves.target.is_some()));
    if moving_away {
        // Already told, or being told: only the target knows.
        return Err(RpcError::unknown("the target is being told"));
    }
    if !has_target {
        return Err(RpcError::refused("no move is in progress"));
    }
    failpoint::pass("target.go").map_err(RpcError::unknown)?;
    worker.before_resume();
    match target::step_target(worker, TargetEvent::Go(epoch)) {
        commands if commands.is_empty() => Err(RpcError::refused("not ready, or an older epoch")),
        _ => Ok(micros(begun.elapsed())),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// At the source of a post-copy move: sends the rest, for as long as it takes.
pub(super) fn serve<W: Worker>(worker: &Arc<W>) -> Result<(), RpcError> {
    let begun = worker.moves(|moves| {
        if moves.serving {
            return Ok(None);
        }
        let outgoing = moves
            .outgoing
            .take()
            .ok_or_else(|| RpcError::refused("no move is in progress"))?;
        moves.serving = true;
        // This move cannot be given up any more; and a connection closes only with its
        // last handle.
        moves.closer = None;
        Ok(Some((outgoing, moves.unsent.clone())))
    })?;
    let Some((outgoing, unsent)) = begun else {
        return Ok(());
    };
    let worker = worker.clone();
    std::thread::Builder::new()
        .name("fill-push".into())
        .spawn(move || {
            // The agent ends this process when it is not needed any more.
            let fill = outgoing.wait().serve(&unsent);
            worker.moves(|moves| moves.fill = Some(fill));
        })
        .map(drop)
        .map_err(RpcError::failed)
}

/// The machine stays at its source, under an epoch that the agent got from the store. Asked again,
/// it changes nothing.
pub(super) fn thaw<W: Worker>(worker: &W, epoch: Epoch) -> Result<(), RpcError> {
    failpoint::pass("source.thaw").map_err(RpcError::unknown)?;
    give_up(worker);
    let _freezing = worker.process().freezing();
    let (outgoing, is_stopped, is_taken_back) = worker.moves(|moves| {
        if moves.going {
            return Err(RpcError::unknown("the target is being told"));
        }
        // Only this node can have used its own epoch and the one after it.
        let is_taken_back = epoch != moves.epoch && !epoch.follows(moves.epoch);
        moves.epoch = epoch;
        // While it is copied it runs, and whoever stops its threads for a moment resumes them.
        let is_stopped = moves.moving_away && !moves.copying;
        Ok((moves.outgoing.take(), is_stopped, is_taken_back))
    })?;
    if is_taken_back {
        worker.process().notice(&format!(
            "the target of its move was lost; it resumes here under epoch {epoch}, and what it may have done there is discarded"
        ));
    }
    worker.stay_under(epoch);
    // A session that works during the commit has nothing to cancel.
    let mut outgoing = outgoing;
    if let Some(SourceTask::Idle(session)) = &mut outgoing
        && let Err(error) = session.cancel()
    {
        // It has ended; or its agent asks again.
        worker.moves(|moves| moves.outgoing = outgoing);
        return Err(RpcError::failed(error));
    }
    if is_stopped {
        worker.thaw()?;
    }
    worker.moves(|moves| moves.moving_away = moves.copying);
    let log = worker.process().log();
    let state = State::Running { epoch };
    publish_resumed(&worker.process().state, log.as_deref(), state);
    // The machine runs: notifying the target may take its time.
    abort_in_background(outgoing, "the machine stays at its source".into());
    Ok(())
}

/// Gives up the move that is in progress, in any phase.
fn give_up<W: Worker>(worker: &W) {
    worker.moves(|moves| {
        moves.given_up = true;
        if let Some(give_up) = &moves.give_up {
            give_up.store(true, Ordering::Release);
        }
        // A connection that another thread uses is closed.
        if moves.outgoing.is_none()
            && let Some(closer) = moves.closer.take()
        {
            // The socket may be closed already.
            let _ = closer.shutdown(std::net::Shutdown::Both);
        }
    });
}

/// Gives up a move, at its source or at its target.
pub(super) fn abort<W: Worker>(worker: &Arc<W>, reason: String) {
    let is_arriving = worker.moves(|moves| {
        moves.target.as_ref().is_some_and(|target| {
            !matches!(
                target.state(),
                TargetState::Running { .. } | TargetState::Dropped
            )
        })
    });
    if is_arriving {
        target::step_target(worker, TargetEvent::Abort(reason));
        return;
    }
    give_up(&**worker);
    let mut outgoing = worker.moves(|moves| moves.outgoing.take());
    // While the machine counts as moving.
    if let Some(SourceTask::Idle(session)) = &mut outgoing {
        cancel_given_up(&mut **session);
    }
    // A machine that was frozen for the move is thawed first.
    worker.moves(|moves| moves.moving_away = moves.copying);
    abort_in_background(outgoing, reason);
}

/// Tells the target that the move is given up, on a thread of its own, because an
/// unresponsive target blocks it.
fn abort_in_background<S: SourceSession>(outgoing: Option<SourceTask<S>>, reason: String) {
    let Some(outgoing) = outgoing else { return };
    let thread = std::thread::Builder::new()
        .name("goodbye".into())
        .spawn(move || outgoing.wait().abort(&reason));
    if let Err(error) = thread {
        // The connection closes, which tells the target as well.
        tracing::debug!(%error, "cannot tell the target why the move was given up");
    }
}
