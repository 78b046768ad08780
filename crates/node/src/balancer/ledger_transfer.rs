//! Sends a machine's ledger lines after it when it moves.

use super::handle::NodeBalancer;
use super::ledger::{ALONG_AMONG, ALONG_MAX, LedgerFilter};
use super::peers::{LEDGER_TRANSFER, ask_node};
use keel_cluster::{MachineName, NodeName};
use keel_machine::moves::{Ending, MoveReport};
use std::sync::Arc;
use tokio::sync::broadcast::{self, error::RecvError};

/// Sends the lines of each machine that moves away to its new node, until the agent ends.
pub(super) async fn send_ledger_lines(
    handle: Arc<NodeBalancer>,
    mut ended: broadcast::Receiver<Arc<MoveReport>>,
) {
    loop {
        match ended.recv().await {
            Ok(report) if report.ending == Ending::Moved => {
                send_along(&handle, &report.machine, &report.target);
            }
            // Lines of missed moves stay here.
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// Sends this node's ledger lines of a machine after it, in the background. The lines also stay
/// here.
pub(super) fn send_along(handle: &Arc<NodeBalancer>, machine: &MachineName, target: &NodeName) {
    let (handle, machine, target) = (handle.clone(), machine.clone(), target.clone());
    tokio::spawn(async move {
        let filter = LedgerFilter {
            machine: Some(machine.to_string()),
            limit: ALONG_MAX,
            among: ALONG_AMONG,
            ..LedgerFilter::default()
        };
        let sent: Result<(), String> = async {
            let lines = handle.ledger.newest(filter).await?;
            if lines.is_empty() {
                return Ok(());
            }
            let taken: Result<(), _> =
                ask_node(&handle, &target, LEDGER_TRANSFER, &lines, async { Ok(()) }).await;
            taken.map_err(|error| error.to_string())
        }
        .await;
        if let Err(error) = sent {
            tracing::debug!(%machine, %target, error, "cannot send the machine's ledger lines");
        }
    });
}
