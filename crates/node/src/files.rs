//! Files in machines' volumes, for users: read and written in pieces, each of which
//! is asked of the machine's node of that moment. So a copy goes on while the
//! machine moves, with what was written of a volume of its own already there.
//!
//! Directories of the host are this agent's to open, whether the machine runs or
//! not; volumes of a machine's own are its worker's.

use crate::agent::Agent;
use crate::operate::{self, Done, OperateError, Operation};
use crate::record;
use crate::workers::PROMPT;
use keel_cluster::MachineName;
use keel_machine::spec::{Record, Status, Volume, VolumeKind};
use keel_machine::worker::control::{FileDone, FileOp, FileRequest, kind};
use keel_machine::worker::files;
use keel_net::RpcError;
use keel_wasi::Files;
use std::sync::Arc;
use std::time::Duration;

/// Bytes in one piece, at the most.
pub(crate) const PIECE_BYTES_MAX: usize = 1 << 20;
/// How long a piece waits for a machine that is moving.
const MOVE_PATIENCE: Duration = Duration::from_secs(60);
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Does something with a file wherever the machine is; waits for its move.
pub(crate) async fn anywhere(
    agent: &Arc<Agent>,
    machine: &MachineName,
    op: FileOp,
) -> Result<FileDone, OperateError> {
    let deadline = tokio::time::Instant::now() + MOVE_PATIENCE;
    loop {
        let operation = Operation::File {
            machine: machine.clone(),
            op: op.clone(),
        };
        match operate::anywhere(agent, operation).await? {
            Done::File(FileDone::Busy) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Done::File(FileDone::Busy) => {
                return Err(OperateError::Away(format!(
                    "machine {machine:?} is moving, or being kept, all the time; try again"
                )));
            }
            Done::File(done) => return Ok(done),
            _ => {
                return Err(OperateError::Away(
                    "the node answered something else".into(),
                ));
            }
        }
    }
}

/// Does something with a file of a machine that this node owns.
pub(crate) async fn here(
    agent: &Arc<Agent>,
    machine: &MachineName,
    op: FileOp,
) -> Result<FileDone, OperateError> {
    let record = record::get(&*agent.store, machine).await?.record;
    if record.owner != agent.name {
        return Ok(FileDone::Busy);
    }
    let (number, volume) = volume_of(&record, op.path())?;
    if volume.read_only && op.writes() {
        return Err(OperateError::Conflict(format!(
            "{} of machine {machine:?} is read-only",
            volume.guest
        )));
    }
    let op = op.map_paths(|path| inside(&volume.guest, path));
    let op = op.ok_or_else(|| {
        OperateError::Bad("a file cannot be renamed from one volume to another".into())
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
                .map_err(|error| OperateError::Away(error.to_string()))?
                .map_err(|error| OperateError::Conflict(format!("{what}: {error}")))
        }
        VolumeKind::Tmp { .. } | VolumeKind::Cluster { .. } => {
            in_worker(agent, &record, number, op, &what).await
        }
    }
}

async fn in_worker(
    agent: &Arc<Agent>,
    record: &Record,
    volume: u32,
    op: FileOp,
    what: &str,
) -> Result<FileDone, OperateError> {
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
            return Err(OperateError::Conflict(format!(
                "{what}: machine {:?} has ended ({}): {why}",
                record.name,
                record.status.word()
            )));
        }
    }
    let Some(worker) = agent.workers.get(&record.name) else {
        return Ok(FileDone::Busy);
    };
    let request = FileRequest { volume, op };
    let done = worker.ask(kind::FILE, &request, 3 * PROMPT).await;
    done.map_err(|error| match error {
        RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
            OperateError::Conflict(format!("{what}: {reason}"))
        }
        other => OperateError::Away(other.to_string()),
    })
}

/// The volume that a guest's path is in: of several the innermost.
fn volume_of<'a>(record: &'a Record, path: &str) -> Result<(u32, &'a Volume), OperateError> {
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
        OperateError::Missing(format!(
            "{path} is in no volume of machine {:?} ({})",
            record.name,
            match volumes.is_empty() {
                true => "it has none".to_owned(),
                false => format!("it has {}", volumes.join(", ")),
            }
        ))
    })
}

/// What is left of a path within a directory; `None` if it is not in it.
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
