//! State of the spanning layer, and its shared functions.

use crate::context::Context;
use crate::error::CommandError;
use crate::images::Images;
use crate::processes::{COMPILE_PATIENCE, OLDER, Processes, WorkerHandle, is_older};
use crate::rules::{ClaimError, Rules};
use keel_cluster::{MachineName, NodeName};
use keel_machine::worker::control::Report;
use keel_net::RpcError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Time limit for connecting the parts and for threads to reach safepoints.
pub(crate) const SPAN_PATIENCE: Duration = Duration::from_secs(40);
/// Time limit for moving threads and pages home.
pub(crate) const UNSPAN_PATIENCE: Duration = Duration::from_secs(150);
/// Time limit of the whole operation, including compiling.
pub(crate) const PATIENCE: Duration = COMPILE_PATIENCE;
/// The least free memory of a node that gets a part.
pub(crate) const ROOM_BYTES_MIN: u64 = 16 << 20;

/// Machines of this node with parts elsewhere, and parts here of machines elsewhere.
pub(crate) struct Spanning {
    pub(super) context: Arc<Context>,
    pub(super) processes: Arc<Processes>,
    pub(super) images: Arc<Images>,
    pub(super) rules: Arc<Rules>,
    /// Machines of this node with parts elsewhere.
    marked: Mutex<HashSet<MachineName>>,
}

impl Spanning {
    pub(crate) fn new(
        context: Arc<Context>,
        processes: Arc<Processes>,
        images: Arc<Images>,
        rules: Arc<Rules>,
    ) -> Self {
        Spanning {
            context,
            processes,
            images,
            rules,
            marked: Mutex::default(),
        }
    }

    /// Machines of this node with parts elsewhere.
    pub(crate) fn marked(&self) -> MutexGuard<'_, HashSet<MachineName>> {
        self.marked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn text(error: RpcError) -> String {
    match error {
        RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } if is_older(&reason) => {
            OLDER.into()
        }
        RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => reason,
        other => other.to_string(),
    }
}

/// Whether rules and drains in the store allow a part of a machine on a node: the same conditions
/// as for a user's move. The store does not record parts; the fine-grained balancer removes those
/// that are no longer allowed.
pub(super) async fn may_be_on(
    spanning: &Spanning,
    machine: &MachineName,
    node: &NodeName,
) -> Result<(), CommandError> {
    match spanning.rules.claim(machine, node).await {
        Ok(_) => Ok(()),
        Err(ClaimError::Store(error)) => Err(error.into()),
        Err(error) => Err(CommandError::Conflict(format!(
            "machine {machine:?} may have no part on {node}: {error}"
        ))),
    }
}

/// The worker of a machine here.
pub(super) fn home(
    spanning: &Spanning,
    machine: &MachineName,
) -> Result<WorkerHandle, CommandError> {
    spanning.processes.machines.get(machine).ok_or_else(|| {
        CommandError::Conflict(format!(
            "machine {machine:?} does not run (`keel describe {machine}` says why)"
        ))
    })
}

pub(super) async fn ask<A: DeserializeOwned>(
    worker: &WorkerHandle,
    kind: u16,
    question: &impl Serialize,
    patience: Duration,
) -> Result<A, CommandError> {
    let answer = worker.ask(kind, question, patience).await;
    answer.map_err(|error| CommandError::Conflict(text(error)))
}

pub(super) async fn report(worker: &WorkerHandle) -> Result<Report, CommandError> {
    let report = worker.report().await;
    report.map_err(|error| CommandError::Unavailable(error.to_string()))
}
