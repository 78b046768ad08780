//! Checkpoints of the machine: taken, and given up where a move wants it.

use super::super::control::{Checkpoint, CheckpointReport, State};
use super::Worker;
use crate::checkpoint::{Destination, Repository, Subject};
use keel_cluster::clock::unix_ms;
use keel_net::RpcError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// How long a move waits for a checkpoint to be given up.
const CHECKPOINT_PATIENCE: Duration = Duration::from_secs(15);

impl Worker {
    pub(super) fn checkpoint(
        &self,
        request: &Checkpoint,
        runtime: &Handle,
    ) -> Result<CheckpointReport, RpcError> {
        let vault = Repository::create(&request.vault).map_err(RpcError::failed)?;
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
        Ok(CheckpointReport {
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
}

impl Worker {
    /// A move comes first: a checkpoint in the making is given up, and what is
    /// known for the next one is dropped. Nor is the machine looked at any more.
    pub(super) fn end_checkpoints(&self) -> Result<(), String> {
        // (Nobody begins another one now.)
        self.without_checkpoint().map(drop)
    }

    /// Gives up a checkpoint in the making, and what is known for the next one; while this
    /// is held there is none.
    pub(in super::super) fn without_checkpoint(&self) -> Result<MutexGuard<'_, ()>, String> {
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
}
