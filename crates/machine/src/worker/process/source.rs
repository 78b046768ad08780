//! Moving the machine away: copying, freezing, handing over, or thawing.

use super::super::control::{Copy, CopyEvent, CopyHome, Frozen, State, pack};
use super::super::source::{SourceSession, SourceTask};
use super::{Worker, publish_resumed, write_notice};
use crate::failpoint;
use crate::link::LinkError;
use crate::moves::{TargetEvent, TargetState};
use crate::span::PartId;
use keel_cluster::Epoch;
use keel_net::{Bytes, RpcError};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

impl Worker {
    /// As [`Self::copy`], for a machine that spans.
    pub(super) fn copy_home(&self, copy: &CopyHome, events: &mpsc::Sender<Bytes>) {
        self.copy(&copy.copy, Some((copy.successor, copy.threads_to)), events);
    }

    pub(super) fn copy(
        &self,
        copy: &Copy,
        to: Option<(PartId, PartId)>,
        events: &mpsc::Sender<Bytes>,
    ) {
        let mut tell = |event: CopyEvent| match pack(&event) {
            Ok(bytes) => events.blocking_send(bytes).is_ok(),
            Err(_) => false,
        };
        // Making the machine span takes this lock and checks whether it is moving.
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
        let give_up = parts.as_ref().map(|it| it.give_up.clone());
        let prepared = {
            let mut inner = self.inner();
            match (&inner.machine, &inner.log, &inner.name) {
                (Some(machine), Some(log), Some(name)) if inner.outgoing.is_none() => {
                    let cluster_volumes = inner.cluster_volumes.clone();
                    let parts = (
                        machine.clone(),
                        log.clone(),
                        name.clone(),
                        inner.epoch,
                        cluster_volumes,
                    );
                    let identity = inner.identity.take();
                    inner.moving_away = identity.is_some();
                    inner.copying = identity.is_some();
                    inner.given_up = false;
                    inner.give_up = give_up;
                    inner.attempt += 1;
                    inner.post_copy = copy.post_copy;
                    // State of an earlier move does not count.
                    inner.serving = false;
                    inner.fill = None;
                    inner.unsent = Arc::default();
                    identity.map(|identity| (identity, parts))
                }
                _ => None,
            }
        };
        let Some((identity, (machine, log, name, epoch, cluster_volumes))) = prepared else {
            tell(CopyEvent::Lost {
                reason: "this worker has no machine to move".into(),
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
            .and_then(|()| {
                SourceSession::connect(&name, epoch, machine, log, &identity, copy, parts)
            });
        let result = result.and_then(|mut outgoing| {
            {
                let mut inner = self.inner();
                if !inner.is_attempt(attempt) {
                    return Err(aborted("the move was given up").into());
                }
                inner.closer = Some(outgoing.closer()?);
            }
            outgoing
                .copy(&cluster_volumes, &mut tell)
                .map(|()| outgoing)
        });
        let mut result = result;
        let mut inner = self.inner();
        let current = inner.is_attempt(attempt);
        if !current && let Ok(outgoing) = &mut result {
            // Before its parts can change.
            drop(inner);
            if let Err(error) = outgoing.cancel() {
                tracing::warn!(%error, "a machine lost a part during the move of its home");
            }
            inner = self.inner();
        }
        if inner.attempt == attempt {
            inner.copying = false;
            // The request to give up left this to the copying thread.
            inner.moving_away &= !inner.given_up;
        }
        match result {
            Ok(outgoing) if current => inner.outgoing = Some(outgoing.into_idle()),
            Ok(outgoing) => {
                drop(inner);
                abort_in_background(Some(outgoing.into_idle()), "the move was given up".into());
            }
            Err(error) => {
                if inner.attempt == attempt {
                    inner.moving_away = false;
                }
                drop(inner);
                tell(CopyEvent::Lost {
                    reason: error.to_string(),
                });
            }
        }
    }

    pub(super) fn freeze(&self) -> Result<Frozen, RpcError> {
        // `copy` reports convergence a moment before it puts the session back.
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
        let cluster_volumes = self.inner().cluster_volumes.clone();
        cluster_volumes.pause();
        let result = outgoing.freeze_and_send();
        let leaving = match &result {
            Ok(_) => SourceTask::after_freeze(outgoing).map_err(RpcError::failed)?,
            Err(_) => outgoing.into_idle(),
        };
        self.inner().outgoing = Some(leaving);
        result.map_err(RpcError::failed)
    }

    /// At the source: tells the target to resume. At the target: resumes.
    pub(super) fn go(self: &Arc<Self>, epoch: Epoch) -> Result<u64, RpcError> {
        let begun = Instant::now();
        // A machine that arrived by a move may be in its next move already: the outgoing
        // one counts.
        let outgoing = {
            let mut inner = self.inner();
            let outgoing = inner.outgoing.take();
            inner.going |= outgoing.is_some();
            outgoing
        };
        let Some(outgoing) = outgoing else {
            if self.inner().moving_away {
                // Already told, or being told: only the target knows.
                return Err(RpcError::unknown("the target is being told"));
            }
            if self.inner().target.is_none() {
                return Err(RpcError::refused("no move is in progress"));
            }
            failpoint::pass("in.go").map_err(RpcError::unknown)?;
            let post_copy_target = self.inner().post_copy_target.clone();
            if let Some(post_copy_target) = post_copy_target {
                post_copy_target.wait_named();
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
            inner.outgoing = Some(outgoing.into_idle());
            inner.going = false;
        }
        result.map_err(RpcError::unknown)?;
        let took = begun.elapsed().as_micros() as u64;
        // Readers of its output continue at the target.
        if let Some(log) = &self.inner().log {
            log.close();
        }
        if self.inner().post_copy {
            // At once: threads wait there.
            self.serve()?;
        }
        Ok(took)
    }

    /// At the source of a post-copy move: sends the remaining pages, for as long as it
    /// takes.
    pub(super) fn serve(self: &Arc<Self>) -> Result<(), RpcError> {
        let outgoing = {
            let mut inner = self.inner();
            if inner.serving {
                return Ok(());
            }
            let outgoing = inner
                .outgoing
                .take()
                .ok_or_else(|| RpcError::refused("no move is in progress"))?;
            inner.serving = true;
            // This move cannot be given up any more; and a connection closes only with
            // its last handle.
            inner.closer = None;
            outgoing
        };
        let worker = self.clone();
        let unsent = self.inner().unsent.clone();
        std::thread::Builder::new()
            .name("fill-push".into())
            .spawn(move || {
                // The agent ends this process when it is not needed any more.
                let fill = outgoing.wait().serve(&unsent);
                worker.inner().fill = Some(fill);
            })
            .map(drop)
            .map_err(RpcError::failed)
    }

    pub(super) fn thaw(&self, epoch: Epoch) -> Result<(), RpcError> {
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
            // Only this node can have used its own epoch and the one after it.
            let taken_back = epoch > inner.epoch.next();
            inner.epoch = epoch;
            let outgoing = inner.outgoing.take();
            (inner.machine.clone(), outgoing, taken_back)
        };
        if taken_back && let Some(log) = &self.inner().log {
            write_notice(
                log,
                &format!(
                    "the target of its move was lost; it resumes here under epoch {epoch}, and what it may have done there is discarded"
                ),
            );
        }
        let machine = machine.ok_or_else(|| RpcError::refused("no machine"))?;
        machine.set_epoch(epoch.token());
        let cluster_volumes = self.inner().cluster_volumes.clone();
        cluster_volumes.claim_under(epoch);
        let mut outgoing = outgoing;
        if let Some(outgoing) = &mut outgoing {
            let stays = outgoing.cancel();
            if stays.is_err() {
                // It ends, and does not move.
                self.inner().moving_away = false;
            }
            stays.map_err(RpcError::failed)?;
        }
        machine.thaw().map_err(RpcError::failed)?;
        let log = {
            let mut inner = self.inner();
            inner.moving_away = inner.copying;
            inner.log.clone()
        };
        publish_resumed(&self.state, log.as_deref(), State::Running { epoch });
        // The machine runs: notifying the target may take its time.
        abort_in_background(outgoing, "the machine stays at its source".into());
        Ok(())
    }

    /// Gives up the move that is in progress, in any phase.
    fn give_up(&self) {
        let mut inner = self.inner();
        inner.given_up = true;
        if let Some(give_up) = &inner.give_up {
            give_up.store(true, Ordering::Release);
        }
        // A connection that another thread uses is closed.
        if inner.outgoing.is_none()
            && let Some(closer) = inner.closer.take()
        {
            // The socket may be closed already.
            let _ = closer.shutdown(std::net::Shutdown::Both);
        }
    }

    pub(super) fn abort(self: &Arc<Self>, reason: String) {
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
            // A machine that was frozen for the move is thawed first.
            inner.moving_away = inner.copying;
            inner.outgoing.take()
        };
        abort_in_background(outgoing, reason);
    }
}

/// Tells the target that the move is given up, on a thread of its own, because an
/// unresponsive target blocks it.
fn abort_in_background(outgoing: Option<SourceTask>, reason: String) {
    let Some(outgoing) = outgoing else { return };
    let thread = std::thread::Builder::new()
        .name("goodbye".into())
        .spawn(move || outgoing.wait().abort(&reason));
    if let Err(error) = thread {
        // The connection closes, which tells the target as well.
        tracing::debug!(%error, "cannot tell the target why the move was given up");
    }
}
