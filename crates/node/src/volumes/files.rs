//! Files in machines' volumes, for users: read and written in pieces, each of which goes to the
//! node that has the machine at that moment. So a copy continues while the machine moves, because
//! its own volumes move with it.
//!
//! This agent opens host directories, whether the machine runs or not; the worker opens the
//! machine's own volumes.

use crate::context::Context;
use crate::error::CommandError;
use crate::processes::{PROMPT, Processes};
use crate::records::{self, MachineCommand, at_owner};
use keel_cluster::MachineName;
use keel_machine::spec::{Record, Status, Volume, VolumeKind};
use keel_machine::worker::control::{FileDone, FileOp, FileRequest, kind};
use keel_machine::worker::files;
use keel_net::RpcError;
use keel_wasi::Files;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// The most bytes of one piece.
pub(crate) const PIECE_BYTES_MAX: usize = 1 << 20;
/// How long a piece waits for a machine that is moving.
const MOVE_PATIENCE: Duration = Duration::from_secs(60);
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// An operation on a file in a volume; paths are the guest's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FileCommand {
    pub(crate) machine: MachineName,
    pub(crate) op: FileOp,
}

impl MachineCommand for FileCommand {
    const KIND: u16 = 0x0328;
    const IS_BULK: bool = true;
    type Answer = FileDone;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// Files in the volumes of machines.
pub(crate) struct VolumeFiles {
    context: Arc<Context>,
    processes: Arc<Processes>,
}

impl VolumeFiles {
    pub(crate) fn new(context: Arc<Context>, processes: Arc<Processes>) -> Self {
        VolumeFiles { context, processes }
    }

    /// Carries out an operation on a file of a machine of any node; waits while it moves.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn act(&self, command: FileCommand) -> Result<FileDone, CommandError> {
        let deadline = tokio::time::Instant::now() + MOVE_PATIENCE;
        loop {
            let done = at_owner(&self.context, command.clone(), |it| self.act_here(it)).await?;
            match done {
                FileDone::Busy if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                FileDone::Busy => {
                    return Err(CommandError::Unavailable(format!(
                        "machine {:?} keeps moving, or is being checkpointed; try again",
                        command.machine
                    )));
                }
                done => return Ok(done),
            }
        }
    }

    /// Carries out an operation on a file of a machine that this node owns.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn act_here(&self, command: FileCommand) -> Result<FileDone, CommandError> {
        let FileCommand { machine, op } = command;
        let record = records::get(&*self.context.store, &machine).await?.record;
        if record.owner != self.context.name {
            return Ok(FileDone::Busy);
        }
        let (number, volume) = volume_of(&record, op.path())?;
        if volume.read_only && op.writes() {
            return Err(CommandError::Conflict(format!(
                "{} of machine {machine:?} is read-only",
                volume.guest
            )));
        }
        let op = op.map_paths(|path| inside(&volume.guest, path));
        let op = op.ok_or_else(|| {
            CommandError::Invalid("a file cannot be renamed from one volume to another".into())
        })?;
        let what = format!(
            "{}:{}/{}",
            machine,
            volume.guest.trim_end_matches('/'),
            op.path()
        );
        match &volume.kind {
            VolumeKind::Host { path } => {
                let path = path.clone();
                let done = tokio::task::spawn_blocking(move || {
                    let files = Files::of_host(std::path::Path::new(&path))?;
                    files::act(&files, op)
                });
                done.await
                    .map_err(|error| CommandError::Unavailable(error.to_string()))?
                    .map_err(|error| CommandError::Conflict(format!("{what}: {error}")))
            }
            VolumeKind::Tmp { .. } | VolumeKind::Cluster { .. } => {
                self.in_worker(&record, number, op, &what).await
            }
        }
    }

    async fn in_worker(
        &self,
        record: &Record,
        volume: u32,
        op: FileOp,
        what: &str,
    ) -> Result<FileDone, CommandError> {
        match record.status {
            Status::Running | Status::Filling { .. } => {}
            Status::Scheduled | Status::Arriving { .. } | Status::Restarting { .. } => {
                return Ok(FileDone::Busy);
            }
            Status::Exited { .. }
            | Status::Trapped { .. }
            | Status::Stopped
            | Status::Failed { .. } => {
                let kept = record.spec.volumes.get(volume as usize);
                let why = match kept.map(|volume| &volume.kind) {
                    Some(VolumeKind::Cluster { .. }) => "its volume can be reached while it runs",
                    _ => "the volume was its own and ended with it",
                };
                return Err(CommandError::Conflict(format!(
                    "{what}: machine {:?} has ended ({}): {why}",
                    record.name,
                    record.status.word()
                )));
            }
        }
        let Some(worker) = self.processes.machines.get(&record.name) else {
            return Ok(FileDone::Busy);
        };
        let request = FileRequest { volume, op };
        let done = worker.ask(kind::FILE, &request, 3 * PROMPT).await;
        done.map_err(|error| match error {
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
                CommandError::Conflict(format!("{what}: {reason}"))
            }
            other => CommandError::Unavailable(other.to_string()),
        })
    }
}

/// The volume that a guest's path is in: of several the innermost.
fn volume_of<'a>(record: &'a Record, path: &str) -> Result<(u32, &'a Volume), CommandError> {
    let volumes = (0u32..).zip(&record.spec.volumes);
    let found = volumes
        .filter(|(_, volume)| inside(&volume.guest, path).is_some())
        .max_by_key(|(_, volume)| volume.guest.trim_end_matches('/').len());
    found.ok_or_else(|| {
        let volumes: Vec<&str> = record
            .spec
            .volumes
            .iter()
            .map(|volume| volume.guest.as_str())
            .collect();
        CommandError::NotFound(format!(
            "{path} is in no volume of machine {:?} ({})",
            record.name,
            match volumes.is_empty() {
                true => "it has none".to_owned(),
                false => format!("it has {}", volumes.join(", ")),
            }
        ))
    })
}

/// The rest of a path within a directory; `None` if it is outside.
fn inside(directory: &str, path: &str) -> Option<String> {
    let rest = path.strip_prefix(directory.trim_end_matches('/'))?;
    if !rest.is_empty() && !rest.starts_with('/') {
        return None;
    }
    Some(rest.trim_start_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::inside;

    #[test]
    fn paths_are_within_whole_names() {
        let inside = |directory, path| inside(directory, path);
        assert_eq!(inside("/data", "/data/a/b").as_deref(), Some("a/b"));
        assert_eq!(inside("/data/", "/data//a").as_deref(), Some("a"));
        assert_eq!(inside("/data", "/data").as_deref(), Some(""));
        assert_eq!(inside("/", "/a").as_deref(), Some("a"));
        assert_eq!(inside("/data", "/database/a"), None);
        assert_eq!(inside("/data", "/dat"), None);
    }
}
