//! Machines with parts on several nodes: the owner's agent has member workers made, lets
//! all parts meet, and says to the machine that it spans.
//!
//! ```text
//!   owner's agent                 each member's agent            its worker
//!       │─── PART ───────────────────▶│ fetches the module           │
//!       │                             │ starts it ──── PART_READY ──▶│ listens
//!       │◀──────────────── where ─────│◀─────────────────────────────│
//!       │ SPAN_READY: the home listens too
//!       │─── PART_JOIN, all at once, with SPAN to the home ─────────▶│ they meet
//! ```
//!
//! What was begun is undone where anything fails, and the machine goes on alone. Members
//! end by themselves with their home: an agent that dies leaves nothing to be settled.
//!
//! Which parts a machine has its home's worker knows; the store has its owner, as ever.
//!
//! - `member`: a member's node
//! - `owner`: has parts made, and brought together
//! - `homes`: the home moves
//! - `grains`: threads and memory, told of and moved

mod grains;
mod homes;
mod member;
mod owner;

pub(crate) use grains::{
    heat_of, hot_in, idle_in, move_object, move_thread, object_to, objects, objects_report,
    parts_of, parts_report, tell_room, thread_to,
};
pub(crate) use homes::{Apart, Successor, apart_again, let_successors_go, successor};
pub(crate) use member::{
    adopt, arrived_part, has_features, join, join_arriving, part_of, ready, ready_arriving,
    runs_here,
};
pub(crate) use owner::{join_on, ready_on, span, span_held, unspan};

use crate::agent::Agent;
use crate::operate::OperateError;
use crate::rules::{self, ClaimError};
use crate::workers::{COMPILE_PATIENCE, OLDER, Worker, is_older};
use keel_cluster::{MachineName, NodeName};
use keel_machine::span::{PartAddress, PartId, PartSet};
use keel_machine::spec::Spec;
use keel_machine::worker::control::{Join, Report};
use keel_net::{Fingerprint, RpcError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long parts may take to meet, and threads to safepoints.
pub(crate) const SPAN_PATIENCE: Duration = Duration::from_secs(40);
/// How long threads and pages may take home.
pub(crate) const UNSPAN_PATIENCE: Duration = Duration::from_secs(150);
/// How long all of it may take, compiling too.
pub(crate) const PATIENCE: Duration = COMPILE_PATIENCE;
/// A node with less room for memory takes no part.
pub(crate) const ROOM_BYTES_MIN: u64 = 16 << 20;

/// What an owner asks of a member's node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartOffer {
    pub(crate) machine: MachineName,
    #[serde(with = "keel_machine::past::spec_for_others")]
    pub(crate) spec: Spec,
    pub(crate) program: Fingerprint,
    pub(crate) me: PartId,
    pub(crate) parts: PartSet,
    /// CPU features that must be here.
    pub(crate) features: Vec<String>,
    /// Parts of the machine that are to be here.
    pub(crate) sharing: u32,
}

/// A member that is ready to meet the others.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReadyMember {
    /// Its worker's name on its node.
    pub(crate) worker: MachineName,
    pub(crate) place: PartAddress,
}

/// Which member is to meet whom; without `join` it ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartJoin {
    pub(crate) worker: MachineName,
    pub(crate) join: Option<Join>,
}

pub(crate) fn text(error: RpcError) -> String {
    match error {
        RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } if is_older(&reason) => {
            OLDER.into()
        }
        RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => reason,
        other => other.to_string(),
    }
}

/// Whether a machine may have a part on a node, by rules and drains as the store has them:
/// as for whole machines that a person moves. (Parts are not in the store: grains see to
/// those that may not be there any more.)
async fn may_be_on(
    agent: &Agent,
    machine: &MachineName,
    node: &NodeName,
) -> Result<(), OperateError> {
    match rules::claim(agent, machine, node).await {
        Ok(_) => Ok(()),
        Err(ClaimError::Store(error)) => Err(error.into()),
        Err(error) => Err(OperateError::Conflict(format!(
            "machine {machine:?} may have no part on {node}: {error}"
        ))),
    }
}

/// A machine's worker here.
fn home(agent: &Agent, machine: &MachineName) -> Result<Worker, OperateError> {
    agent.workers.get(machine).ok_or_else(|| {
        OperateError::Conflict(format!(
            "machine {machine:?} does not run (`keel describe {machine}` says why)"
        ))
    })
}

async fn ask<A: DeserializeOwned>(
    worker: &Worker,
    kind: u16,
    question: &impl Serialize,
    patience: Duration,
) -> Result<A, OperateError> {
    let answer = worker.ask(kind, question, patience).await;
    answer.map_err(|error| OperateError::Conflict(text(error)))
}

async fn report(worker: &Worker) -> Result<Report, OperateError> {
    let report = worker.report().await;
    report.map_err(|error| OperateError::Away(error.to_string()))
}
