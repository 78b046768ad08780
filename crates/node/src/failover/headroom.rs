//! Whether the cluster has room for the loss of any one node (N+1): what would become of the
//! machines of each node, by the rule that decides when it fails.

use super::candidates::{Dependencies, free_memory, homeless};
use crate::error::CommandError;
use keel_api::NodeLoss;
use keel_cluster::failover::{Placement, place};
use keel_cluster::{MachineName, NodeName};
use std::collections::BTreeMap;

/// What the loss of each node that has machines with high availability would mean now.
///
/// # Errors
/// [`CommandError`] if the store does not answer.
pub(crate) async fn losses(at: &Dependencies) -> Result<Vec<NodeLoss>, CommandError> {
    let mut of_nodes: BTreeMap<NodeName, Vec<MachineName>> = BTreeMap::new();
    for (machine, placed) in at.placements.highly_available() {
        of_nodes.entry(placed.owner).or_default().push(machine);
    }
    let Some(some) = of_nodes.values().flatten().next().cloned() else {
        return Ok(Vec::new());
    };
    let free = free_memory(at, &some).await;
    let mut losses = Vec::with_capacity(of_nodes.len());
    for (node, machines) in of_nodes {
        let mut others = free.clone();
        others.remove(&node);
        let mut loss = NodeLoss {
            node: node.to_string(),
            restarted: 0,
            waiting: Vec::new(),
        };
        for (machine, placement) in place(homeless(at, &machines).await?, &others) {
            match placement {
                Placement::On(_) | Placement::Fetched(_) => loss.restarted += 1,
                Placement::NoMember | Placement::NoRoom { .. } => {
                    loss.waiting.push(machine.to_string());
                }
            }
        }
        losses.push(loss);
    }
    Ok(losses)
}
