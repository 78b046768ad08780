//! Starts a machine again that has ended: the transaction that puts it back into its node's schedule.

use super::handle::Machines;
use super::host_files;
use super::queries::info;
use crate::error::CommandError;
use crate::events::Note;
use crate::failover;
use crate::records::{self, RecordError};
use keel_api::MachineInfo;
use keel_cluster::{MachineName, NodeName};
use keel_machine::moves::ownership;
use keel_store::TxnOutcome;
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use std::sync::Arc;

/// How often a transaction is made again that others were faster than.
const ATTEMPTS: usize = 5;

/// Starts a machine again, on the node where it ended. The answer does not wait until it runs.
///
/// # Errors
/// [`CommandError`] if it has not ended, or its node is not alive.
pub(crate) async fn start_again(
    machines: &Arc<Machines>,
    name: &MachineName,
) -> Result<MachineInfo, CommandError> {
    let context = &machines.context;
    for _ in 0..ATTEMPTS {
        let found = records::get(&*context.store, name).await?;
        let kind = context.kinds.of(&found.record.spec);
        let kind = kind.map_err(CommandError::Invalid)?;
        let from_checkpoints = kind.abilities().restarts_from_checkpoints;
        let again = ownership::start_again(&found, from_checkpoints, unix_ms());
        let again = again.map_err(|error| CommandError::Unavailable(error.to_string()))?;
        let Some(again) = again else {
            return Err(CommandError::Conflict(format!(
                "machine {name:?} is {}: only one that has ended is started",
                found.record.status.word()
            )));
        };
        let node = &again.record.owner;
        let alive = Key::Alive(node.clone()).to_string();
        if context.store.get(&alive).await?.is_none() {
            return Err(not_alive(node));
        }
        let spec = &again.record.spec;
        host_files::check_elsewhere(machines, node, spec).await?;
        // As for a new one.
        if let (Some(ha), Some(bytes)) = (&spec.ha, spec.balancing.memory_target_bytes) {
            failover::check_new(&machines.failover, name, node, ha, bytes).await?;
        }
        let claims = machines.rules.claim(name, node).await?;
        match context.store.txn(claims.add_to(again.txn)).await? {
            TxnOutcome::Committed { .. } => {
                let before = &found.record.status;
                context.events.record(Note::status(&again.record, before));
                return Ok(info(&context.kinds, &again.record, None));
            }
            TxnOutcome::Refused { failed: 1, .. } => {
                return Err(not_alive(node));
            }
            // The machine, or what a rule holds, was just changed.
            TxnOutcome::Refused { .. } => {}
        }
    }
    Err(RecordError::Contended(name.to_string()).into())
}

fn not_alive(node: &NodeName) -> CommandError {
    let node = node.as_str();
    CommandError::Unavailable(format!("its node {node:?} is not alive (see `keel nodes`)"))
}
