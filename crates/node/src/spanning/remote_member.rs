//! Members on any node: made here by a call, elsewhere by a request to the agent.

use super::handle::{SPAN_PATIENCE, Spanning, text};
use super::member::{join, ready};
use super::messages::{self, PartJoin, PartOffer, ReadyMember};
use crate::processes::COMPILE_PATIENCE;
use keel_cluster::NodeName;
use keel_machine::worker::control::{pack, unpack};
use std::sync::Arc;

/// The worker that a part gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WorkerKind {
    /// A process of its own.
    New,
    /// The worker of an arriving machine.
    Arriving,
}

pub(super) async fn ready_on(
    spanning: &Arc<Spanning>,
    node: &NodeName,
    offer: PartOffer,
    kind: WorkerKind,
) -> Result<ReadyMember, String> {
    if *node == spanning.context.name {
        return ready(spanning, node, offer).await;
    }
    let kind = match kind {
        WorkerKind::New => messages::PART,
        WorkerKind::Arriving => messages::ARRIVING_PART,
    };
    let payload = pack(&offer).map_err(|error| error.to_string())?;
    let answer = spanning
        .context
        .peers
        .call(node, kind, payload, COMPILE_PATIENCE)
        .await
        .map_err(text)?;
    unpack(&answer).map_err(|error| error.to_string())
}

pub(super) async fn join_on(
    spanning: &Arc<Spanning>,
    node: &NodeName,
    request: PartJoin,
    kind: WorkerKind,
) -> Result<(), String> {
    if *node == spanning.context.name {
        return join(spanning, request).await;
    }
    let kind = match kind {
        WorkerKind::New => messages::PART_JOIN,
        WorkerKind::Arriving => messages::ARRIVING_JOIN,
    };
    let payload = pack(&request).map_err(|error| error.to_string())?;
    let answer = spanning
        .context
        .peers
        .call(node, kind, payload, SPAN_PATIENCE)
        .await
        .map_err(text)?;
    unpack(&answer).map_err(|error| error.to_string())
}
