//! Checkpoints of this node's machines: creates and lists them, and records the newest.

use super::usage::Usage;
use crate::context::Context;
use crate::error::CommandError;
use crate::events::Note;
use crate::images::{Images, StoredImages};
use crate::processes::Processes;
use crate::records::{self, MachineCommand, at_owner};
use keel_api::{CheckpointInfo, CheckpointRequest};
use keel_cluster::MachineName;
use keel_machine::checkpoint::{
    CheckpointId, MemoryRestore, Origin, Repository, RepositoryError, Retention,
};
use keel_machine::failpoint;
use keel_machine::spec::CheckpointPlan;
use keel_machine::worker::control::{Checkpoint, CheckpointReport, kind};
use keel_net::RpcError;
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use keel_store::{Compare, Txn};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long creating a checkpoint may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3600);

/// Bounds of the interval of scheduled checkpoints, in seconds.
const EVERY_S: std::ops::RangeInclusive<u64> = 1..=31 * 24 * 3600;

/// The default place of checkpoints: this node's folder.
pub(crate) fn place(context: &Context, given: Option<&str>) -> String {
    match given {
        Some(url) => url.to_owned(),
        None => context.dir.checkpoints().display().to_string(),
    }
}

pub(crate) async fn open(url: String) -> Result<Repository, CommandError> {
    opened(move || Repository::open(&url)).await
}

pub(crate) async fn opened(
    open: impl FnOnce() -> Result<Repository, RepositoryError> + Send + 'static,
) -> Result<Repository, CommandError> {
    tokio::task::spawn_blocking(open)
        .await
        .map_err(|error| CommandError::Unavailable(error.to_string()))?
        .map_err(|error| CommandError::Invalid(error.to_string()))
}

pub(crate) fn repository_error(error: &RepositoryError) -> CommandError {
    let text = error.to_string();
    match error {
        RepositoryError::Url { .. } => CommandError::Invalid(text),
        RepositoryError::None(_) => CommandError::NotFound(text),
        RepositoryError::Part { .. }
        | RepositoryError::Quota { .. }
        | RepositoryError::Image { .. }
        | RepositoryError::NoneIntact { .. } => CommandError::Conflict(text),
        RepositoryError::Store(_) => CommandError::Unavailable(text),
    }
}

/// Creates a checkpoint of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct CreateCheckpoint {
    pub(crate) machine: MachineName,
    pub(crate) request: CheckpointRequest,
}

impl MachineCommand for CreateCheckpoint {
    const KIND: u16 = 0x0327;
    const PATIENCE: Duration = PATIENCE;
    type Answer = CheckpointInfo;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// Checkpoints of this node's machines.
pub(crate) struct Checkpoints {
    pub(super) context: Arc<Context>,
    pub(super) processes: Arc<Processes>,
    pub(super) images: Arc<Images>,
    /// Workers whose machines have scheduled checkpoints.
    scheduled: Mutex<HashSet<u64>>,
    /// Machines whose output is being copied to here.
    pub(super) copied: Mutex<HashSet<MachineName>>,
    /// Images that are being fetched for machines that may go on here.
    pub(super) image_fetches: Arc<Mutex<BTreeSet<String>>>,
    /// How much is stored in places with a quota.
    pub(super) usage: Usage,
}

impl Checkpoints {
    pub(crate) fn new(
        context: Arc<Context>,
        processes: Arc<Processes>,
        images: Arc<Images>,
    ) -> Self {
        Checkpoints {
            context,
            processes,
            images,
            scheduled: Mutex::default(),
            copied: Mutex::default(),
            image_fetches: Arc::default(),
            usage: Usage::default(),
        }
    }

    pub(super) fn scheduled(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.scheduled
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a checkpoint of a machine of any node.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn create(
        &self,
        command: CreateCheckpoint,
    ) -> Result<CheckpointInfo, CommandError> {
        at_owner(&self.context, command, |it| async move {
            self.create_here(&it.machine, it.request).await
        })
        .await
    }

    /// Creates a checkpoint of a machine that runs here.
    pub(crate) async fn create_here(
        &self,
        machine: &MachineName,
        request: CheckpointRequest,
    ) -> Result<CheckpointInfo, CommandError> {
        let result = self.make(machine, request).await;
        self.context
            .events
            .record(Note::checkpoint(machine, &result));
        result
    }

    async fn make(
        &self,
        machine: &MachineName,
        request: CheckpointRequest,
    ) -> Result<CheckpointInfo, CommandError> {
        let repository = place(&self.context, request.to.as_deref());
        // An invalid place is reported before any work is done.
        let url = repository.clone();
        let checked = opened(move || Repository::create(&url)).await?;
        let retention = Retention {
            newest: request.keep,
            for_s: request.keep_for_s,
        };
        check_retention(retention)?;
        let worker = self.processes.machines.get(machine).ok_or_else(|| {
            CommandError::Conflict(format!(
                "machine {machine:?} does not run: there is nothing to checkpoint"
            ))
        })?;
        self.check_quota(&checked).await?;
        let found = records::get(&*self.context.store, machine).await?;
        let spec = &found.record.spec;
        // Before there is a checkpoint that needs them. Its own folder is where they are already.
        let images = match request.to {
            Some(_) => self.images.store_in(&checked, spec).await?,
            None => StoredImages::default(),
        };
        self.usage.stored(checked.url(), images.bytes);
        let question = Checkpoint {
            repository: repository.clone(),
            full: request.full,
            keep: retention,
            after: None,
        };
        let injected = |error: failpoint::Injected| CommandError::Unavailable(error.to_string());
        failpoint::pass_async("checkpoint.agent.asked")
            .await
            .map_err(injected)?;
        let taken: Result<CheckpointReport, RpcError> =
            worker.ask(kind::CHECKPOINT, &question, PATIENCE).await;
        let taken = taken.map_err(|error| match error {
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
                CommandError::Conflict(format!("no checkpoint of machine {machine:?}: {reason}"))
            }
            other => CommandError::Unavailable(other.to_string()),
        })?;
        failpoint::pass_async("checkpoint.agent.taken")
            .await
            .map_err(injected)?;
        self.context.metrics.checkpoint_made(taken.pause_micros);
        self.usage.stored(checked.url(), taken.stored_bytes);
        let again = self.images.store_again(&checked, spec, images).await;
        if let Err(error) = again {
            tracing::warn!(%machine, %error, "its images may be missing beside its checkpoint");
        }
        self.note_newest(machine, &repository).await;
        Ok(CheckpointInfo {
            machine: machine.to_string(),
            id: taken.id.to_string(),
            repository,
            parent: taken.parent.map(|id| id.to_string()),
            created_unix_ms: unix_ms(),
            stored_bytes: taken.stored_bytes,
            pause_micros: Some(taken.pause_micros),
            total_micros: Some(taken.total_micros),
            deleted: taken.deleted,
            damage: None,
        })
    }

    /// When a machine's newest checkpoint in a place was created, in milliseconds since 1970-01-01
    /// UTC; `None` without any.
    pub(crate) async fn newest_ms(&self, machine: &MachineName, to: Option<&str>) -> Option<u64> {
        let repository = open(place(&self.context, to)).await.ok()?;
        let all = repository.list(machine).await.ok()?;
        all.first().map(CheckpointId::unix_ms)
    }

    /// Records where a machine's newest checkpoint is: the machine restarts from it if it is lost.
    async fn note_newest(&self, machine: &MachineName, repository: &str) {
        let origin = Origin {
            repository: repository.to_owned(),
            machine: machine.clone(),
            id: None,
            is_clone: false,
            memory: MemoryRestore::Eager,
        };
        let written = match keel_store::encoding::encode("where a checkpoint is", &origin) {
            Ok(value) => {
                let txn = Txn::new()
                    .when(Compare::Exists {
                        key: Key::Machine(machine.clone()).to_string(),
                    })
                    .put(Key::Checkpoint(machine.clone()), value);
                self.context
                    .store
                    .txn(txn)
                    .await
                    .map(drop)
                    .map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = written {
            tracing::warn!(%machine, error, "cannot record the place of the newest checkpoint");
        }
    }

    /// The place of a machine's newest checkpoint, if it has any.
    pub(crate) async fn newest(&self, machine: &MachineName) -> Result<Option<Origin>, String> {
        let key = Key::Checkpoint(machine.clone()).to_string();
        match self.context.store.get(&key).await {
            Ok(Some(entry)) => keel_store::encoding::decode("where a checkpoint is", &entry.value)
                .map(Some)
                .map_err(|error| error.to_string()),
            Ok(None) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// A machine's checkpoints, newest first; unreadable ones are listed with the error.
    pub(crate) async fn list(
        &self,
        machine: &MachineName,
        from: Option<&str>,
    ) -> Result<Vec<CheckpointInfo>, CommandError> {
        let repository = open(place(&self.context, from)).await?;
        let ids = repository
            .list(machine)
            .await
            .map_err(|error| repository_error(&error))?;
        let mut found = Vec::with_capacity(ids.len());
        for id in ids {
            let mut info = CheckpointInfo {
                machine: machine.to_string(),
                id: id.to_string(),
                repository: repository.url().to_owned(),
                parent: None,
                created_unix_ms: 0,
                stored_bytes: 0,
                pause_micros: None,
                total_micros: None,
                deleted: 0,
                damage: None,
            };
            match repository.manifest(machine, &id).await {
                Ok(manifest) => {
                    info.created_unix_ms = manifest.created_unix_ms;
                    info.stored_bytes = manifest.stored_bytes();
                    info.parent = manifest.parent.map(|id| id.to_string());
                }
                Err(error) => info.damage = Some(error.to_string()),
            }
            found.push(info);
        }
        Ok(found)
    }
}

pub(super) fn check_retention(retention: Retention) -> Result<(), CommandError> {
    if retention.newest == Some(0) {
        return Err(CommandError::Invalid(
            "keeping no checkpoint at all: 1 is the least".into(),
        ));
    }
    Ok(())
}

/// Checks a schedule of checkpoints.
pub(crate) fn check_plan(plan: &CheckpointPlan) -> Result<(), CommandError> {
    if !EVERY_S.contains(&plan.every_s) {
        return Err(CommandError::Invalid(format!(
            "a checkpoint every {} seconds: {} to {} are possible",
            plan.every_s,
            EVERY_S.start(),
            EVERY_S.end()
        )));
    }
    check_retention(plan.retention)
}
