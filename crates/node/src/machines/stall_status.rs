//! Records in the store which machines of this node wait for disk space or for the backend of a
//! volume. Such a machine is paused, and users must see why.

use super::handle::Machines;
use crate::processes::WorkerHandle;
use crate::records::{self, RecordError};
use keel_cluster::MachineName;
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{kind, unpack};
use std::sync::Arc;
use std::time::Duration;

/// Pause after a failed store access, or while the machine moves.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Follows a worker until it ends.
pub(crate) fn watch(machines: &Arc<Machines>, machine: &MachineName, worker: &WorkerHandle) {
    let (machines, machine, worker) = (machines.clone(), machine.clone(), worker.clone());
    tokio::spawn(async move {
        let Ok(mut pauses) = worker.stream(kind::STALLS, &()).await else {
            return;
        };
        let mut next = pauses.recv().await;
        while let Some(Ok(bytes)) = next.take() {
            let Ok(full) = unpack::<Option<String>>(&bytes) else {
                return;
            };
            // The newest state counts, also over one that is not written yet.
            tokio::select! {
                () = write(&machines, &machine, full) => next = pauses.recv().await,
                newer = pauses.recv() => next = newer,
            }
        }
    });
}

/// Writes the state; retries until the store accepts it.
async fn write(machines: &Arc<Machines>, machine: &MachineName, full: Option<String>) {
    let paused = full.map(|path| {
        // A worker reports the full folder by its path, or another reason in a sentence.
        if !path.starts_with('/') {
            return format!("{path}: the machine continues by itself when the cause is removed");
        }
        format!(
            "the disk of {} is full ({path}): it continues by itself when there is room; \
             or move it away (`keel move {machine} --to NODE`)",
            machines.context.name
        )
    });
    loop {
        // A write to the record would make the commit of its move impossible.
        if machines.processes.exclusion.is_moving(machine) {
            tokio::time::sleep(RETRY_AFTER).await;
            continue;
        }
        let change = |record: &mut Record| {
            let mine = record.owner == machines.context.name && record.status == Status::Running;
            let differs = mine && record.paused != paused;
            if differs {
                record.paused.clone_from(&paused);
            }
            differs
        };
        match records::update(&*machines.context.store, machine, change, |txn, _| txn).await {
            // Its start is still in progress.
            Ok(record)
                if record.owner == machines.context.name
                    && paused.is_some()
                    && !record.status.ended()
                    && record.status != Status::Running =>
            {
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Ok(_) | Err(RecordError::NoMachine(_)) => return,
            Err(error) => {
                tracing::warn!(%machine, %error, "cannot record yet that the machine waits");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}
