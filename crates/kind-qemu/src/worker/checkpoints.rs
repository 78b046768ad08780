//! Making checkpoints of the machine, giving them up for a move, and beginning from one.

use super::qemu_worker::QemuWorker;
use crate::checkpoint::{self, Checkpointer, Destination};
use crate::guest::Guest;
use crate::process::VmEnd;
use crate::spec::QemuSpec;
use keel_machine::checkpoint::{Origin, Repository, Subject};
use keel_machine::log::Log;
use keel_machine::worker::control::{Checkpoint, CheckpointReport, Start, State};
use keel_machine::worker::write_restored;
use keel_net::RpcError;
use keel_store::clock::unix_ms;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// How long a move waits for a checkpoint to be given up.
const GIVE_UP_PATIENCE: Duration = Duration::from_secs(15);
/// How often it looks.
const GIVE_UP_POLL: Duration = Duration::from_millis(5);

/// The checkpoints of a worker's machine.
#[derive(Default)]
pub(super) struct Checkpoints {
    /// Locked while one is made.
    checkpointer: Mutex<Checkpointer>,
    /// Ends it early.
    give_up: AtomicBool,
}

impl Checkpoints {
    /// `None` while one is made.
    fn try_lock(&self) -> Option<MutexGuard<'_, Checkpointer>> {
        match self.checkpointer.try_lock() {
            Ok(checkpointer) => Some(checkpointer),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether one is made now.
    pub(super) fn are_made(&self) -> bool {
        self.try_lock().is_none()
    }

    /// Gives up the one that is made, if there is one: a move takes precedence. The next one is full.
    ///
    /// # Errors
    /// If it does not end.
    pub(super) fn end(&self) -> Result<(), String> {
        let deadline = Instant::now() + GIVE_UP_PATIENCE;
        loop {
            self.give_up.store(true, Ordering::Relaxed);
            if let Some(mut checkpointer) = self.try_lock() {
                *checkpointer = Checkpointer::default();
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err("a checkpoint of it is being made; try again".into());
            }
            std::thread::sleep(GIVE_UP_POLL);
        }
    }
}

impl QemuWorker {
    pub(super) fn make_checkpoint(
        &self,
        request: &Checkpoint,
        runtime: &Handle,
    ) -> Result<CheckpointReport, RpcError> {
        let repository = Repository::create(&request.repository).map_err(RpcError::failed)?;
        let Some(mut checkpointer) = self.checkpoints.try_lock() else {
            return Err(RpcError::failed("a checkpoint of it is being made already"));
        };
        self.checkpoints.give_up.store(false, Ordering::Relaxed);
        if let Some(why) = &*self.process.paused.borrow() {
            return Err(RpcError::failed(format!("it stands still: {why}")));
        }
        let (guest, subject) = {
            let inner = self.inner();
            if inner.moves.is_moving_away() {
                return Err(RpcError::failed("the machine is moving; try again"));
            }
            let running = matches!(*self.process.state.borrow(), State::Running { .. });
            match (&inner.guest, &inner.name, &inner.spec) {
                (Some(guest), Some(name), Some(spec)) if running => {
                    let subject = Subject {
                        name: name.clone(),
                        spec: spec.clone(),
                        epoch: inner.moves.epoch,
                    };
                    (guest.clone(), subject)
                }
                _ => return Err(RpcError::failed("no machine runs here")),
            }
        };
        let own = QemuSpec::of(&subject.spec).map_err(RpcError::failed)?;
        own.check_checkpoints().map_err(RpcError::failed)?;
        self.stop_giving_back()?;
        let name = subject.name.clone();
        let destination = Destination {
            repository: &repository,
            runtime,
            full: request.full,
            after: request.after.clone(),
            give_up: &self.checkpoints.give_up,
        };
        let taken = checkpointer.take(&guest, subject, &destination);
        // The rest concerns only the store: a move need not wait for it.
        drop(checkpointer);
        let taken = taken.map_err(RpcError::failed)?;
        let deleted = match request.keep {
            all if all.is_all() => Ok(Vec::new()),
            some => repository.apply_retention(runtime, &name, some, unix_ms()),
        };
        let deleted = deleted.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot delete old checkpoints");
            Vec::new()
        });
        Ok(CheckpointReport::new(
            taken,
            &guest.log,
            deleted.len() as u32,
        ))
    }

    /// Begins from a checkpoint: the guest is there then, and does not run yet.
    pub(super) fn restore(
        self: &Arc<Self>,
        origin: &Origin,
        start: &Start,
        runtime: &Handle,
    ) -> Result<Guest, RpcError> {
        let repository = Repository::open(&origin.repository).map_err(RpcError::failed)?;
        let (own, folder) = (QemuSpec::of(&start.spec), self.process.folder());
        let own = own.map_err(RpcError::failed)?;
        let restored = checkpoint::restore(origin, &own, &repository, runtime, folder)
            .map_err(RpcError::failed)?;
        let manifest = &restored.manifest;
        // A clone has its own output.
        let base = if origin.is_clone { 0 } else { manifest.log_end };
        let log = Arc::new(Log::open(folder, base).map_err(RpcError::failed)?);
        let guest = self.launch(&start.machine, &start.spec, log.clone(), true);
        let guest = guest.map_err(RpcError::failed)?;
        if let Err(error) = restored.load(&guest.vm, &repository, runtime) {
            guest.vm.kill(VmEnd::Discarded);
            guest.vm.wait();
            guest.console.close();
            return Err(RpcError::failed(error));
        }
        let notice = start.notice.as_deref();
        write_restored(&log, notice, &restored.passed_over, manifest);
        Ok(guest)
    }
}
