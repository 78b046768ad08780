//! Making checkpoints of the machine, and giving them up for a move.

use super::wasm_worker::WasmWorker;
use crate::checkpoint::Destination;
use keel_machine::checkpoint::{Repository, Subject};
use keel_machine::worker::control::{Checkpoint, CheckpointReport, State};
use keel_net::RpcError;
use keel_store::clock::unix_ms;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// How long a move waits for a checkpoint to be given up.
const CHECKPOINT_PATIENCE: Duration = Duration::from_secs(15);

impl WasmWorker {
    pub(super) fn make_checkpoint(
        &self,
        request: &Checkpoint,
        runtime: &Handle,
    ) -> Result<CheckpointReport, RpcError> {
        let repository = Repository::create(&request.repository).map_err(RpcError::failed)?;
        self.await_memory().map_err(RpcError::failed)?;
        let give_up = Arc::new(AtomicBool::new(false));
        let tracking = match self.tracking.try_lock() {
            Ok(tracking) => tracking,
            Err(std::sync::TryLockError::Poisoned(error)) => error.into_inner(),
            Err(std::sync::TryLockError::WouldBlock)
                if self.inner().give_up_checkpoint.is_some() =>
            {
                return Err(RpcError::failed("a checkpoint of it is being made already"));
            }
            // The machine is being sampled, for a moment.
            Err(std::sync::TryLockError::WouldBlock) => self
                .tracking
                .lock()
                .unwrap_or_else(|error| error.into_inner()),
        };
        let (machine, log, subject, mut checkpointer, cluster_volumes, spanning_pages) = {
            let mut inner = self.inner();
            if inner.moves.is_moving_away() {
                return Err(RpcError::failed("the machine is moving; try again"));
            }
            if inner.give_up_checkpoint.is_some() {
                return Err(RpcError::failed("a checkpoint of it is being made already"));
            }
            if inner.post_copy_target.is_some() {
                return Err(RpcError::failed(
                    "a part of its memory is still to come; try again",
                ));
            }
            let running = matches!(*self.process.state.borrow(), State::Running { .. });
            match (&inner.machine, self.process.log(), &inner.name, &inner.spec) {
                (Some(machine), Some(log), Some(name), Some(spec)) if running => {
                    let subject = Subject {
                        name: name.clone(),
                        spec: spec.clone(),
                        epoch: inner.moves.epoch,
                    };
                    let parts = (machine.clone(), log, subject);
                    inner.give_up_checkpoint = Some(give_up.clone());
                    let checkpointer = inner.checkpointer.take().unwrap_or_default();
                    let cluster_volumes = inner.cluster_volumes.clone();
                    let spanning_pages = inner.parts.pages();
                    (
                        parts.0,
                        parts.1,
                        parts.2,
                        checkpointer,
                        cluster_volumes,
                        spanning_pages,
                    )
                }
                _ => return Err(RpcError::failed("no machine runs here")),
            }
        };
        let destination = Destination {
            repository: &repository,
            runtime,
            full: request.full,
            after: request.after.clone(),
            give_up: &give_up,
            cluster_volumes: cluster_volumes.all(),
        };
        // Operations of users on its volumes end first.
        drop(self.process.freezing());
        let name = subject.name.clone();
        let taken = checkpointer.take(
            &machine,
            spanning_pages.as_deref(),
            subject,
            &log,
            destination,
        );
        {
            let mut inner = self.inner();
            inner.give_up_checkpoint = None;
            // A move tracks the machine's writes from now on.
            if !give_up.load(Ordering::Relaxed) {
                inner.checkpointer = Some(checkpointer);
            }
        }
        // The rest concerns only the store: a move need not wait for it.
        drop(tracking);
        let taken = taken.map_err(RpcError::failed)?;
        let deleted = match request.keep {
            all if all.is_all() => Ok(Vec::new()),
            some => repository.apply_retention(runtime, &name, some, unix_ms()),
        };
        let deleted = match deleted {
            Ok(gone) => {
                cluster_volumes.forget_checkpoints(&name, &gone);
                gone.len() as u32
            }
            Err(error) => {
                tracing::warn!(%error, "cannot delete old checkpoints");
                0
            }
        };
        Ok(CheckpointReport::new(taken, &log, deleted))
    }
}

impl WasmWorker {
    /// Gives up a checkpoint in progress and drops its trackers, because a move takes
    /// precedence. Sampling ends, too.
    pub(super) fn end_checkpoints(&self) -> Result<(), String> {
        // No other checkpoint can start now.
        self.without_checkpoint().map(drop)
    }

    /// Gives up a checkpoint in progress and drops its trackers; none starts while the
    /// guard is held.
    pub(super) fn without_checkpoint(&self) -> Result<MutexGuard<'_, ()>, String> {
        let deadline = Instant::now() + CHECKPOINT_PATIENCE;
        loop {
            if let Some(give_up_checkpoint) = &self.inner().give_up_checkpoint {
                give_up_checkpoint.store(true, Ordering::Relaxed);
            }
            let tracking = match self.tracking.try_lock() {
                Ok(tracking) => Some(tracking),
                Err(std::sync::TryLockError::Poisoned(error)) => Some(error.into_inner()),
                Err(std::sync::TryLockError::WouldBlock) => None,
            };
            if let Some(tracking) = tracking {
                self.inner().checkpointer = None;
                return Ok(tracking);
            }
            if Instant::now() > deadline {
                return Err(
                    "a checkpoint of it is being made, or a part is being removed; try again"
                        .into(),
                );
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
