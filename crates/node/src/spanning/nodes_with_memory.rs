//! Nodes that have room for a part of a machine.

use super::handle::Spanning;
use super::messages::FREE_MEMORY;
use crate::host::{check_features, needed_features};
use crate::records;
use futures::future::join_all;
use keel_cluster::{MachineName, NodeName};
use keel_machine::worker::control::{pack, unpack};
use std::sync::Arc;
use std::time::Duration;

/// How long a node may take to report its free memory.
const FREE_MEMORY_PATIENCE: Duration = Duration::from_secs(5);

/// Free bytes here for a part of a machine that needs these CPU features.
///
/// # Errors
/// Why no part is possible, in a sentence.
pub(crate) async fn free_memory_here(
    spanning: &Spanning,
    machine: &MachineName,
    features: &[String],
) -> Result<u64, String> {
    check_features(features)?;
    records::free_bytes_for(&spanning.context, machine).await
}

/// The other nodes that may hold a part and that answer, with their free bytes.
pub(crate) async fn nodes_with_memory(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
) -> Vec<(NodeName, u64)> {
    let all = spanning.context.members.all();
    let others = all
        .keys()
        .filter(|node| **node != spanning.context.name)
        .cloned();
    let asked = others.map(|node| async move {
        if let Some(why) = spanning
            .rules
            .cache
            .forbids(machine.as_str(), node.as_str())
        {
            tracing::debug!(%machine, %node, why, "the node cannot hold a part");
            return None;
        }
        let question = (machine.clone(), needed_features());
        let payload = pack(&question).ok()?;
        let answer = spanning
            .context
            .peers
            .call(&node, FREE_MEMORY, payload, FREE_MEMORY_PATIENCE)
            .await;
        let answer = answer.inspect_err(|error| tracing::debug!(%node, %error, "its room"));
        let room: u64 = unpack(&answer.ok()?).ok()?;
        Some((node, room))
    });
    join_all(asked).await.into_iter().flatten().collect()
}
