//! Commands of users for moves; carried out by the machine's owner.

use super::begin::begin;
use super::dry_run::dry_run;
use super::handle::{MoveOrder, Moves};
use super::offer::MOVE;
use crate::error::CommandError;
use crate::events::Note;
use crate::records::{self, MachineCommand, at_owner};
use keel_api::{DryRun, EventKind, MoveLine};
use keel_cluster::{MachineName, NodeName};
use keel_machine::worker::control::{pack, unpack};
use keel_net::RpcError;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Cancels a machine's move.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct CancelMove {
    pub(crate) machine: MachineName,
}

impl MachineCommand for CancelMove {
    const KIND: u16 = 0x032a;
    type Answer = ();

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// Predicts a move.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DryRunCommand {
    pub(crate) machine: MachineName,
    pub(crate) target: NodeName,
    /// The longest downtime for sending the residual dirty pages, in microseconds.
    pub(crate) budget_micros: Option<u64>,
}

impl MachineCommand for DryRunCommand {
    const KIND: u16 = 0x032b;
    type Answer = DryRun;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

impl Moves {
    /// Cancels the move of a machine. The move may complete all the same.
    ///
    /// # Errors
    /// [`CommandError`] if it is not moving.
    pub(crate) async fn cancel(&self, command: CancelMove) -> Result<(), CommandError> {
        at_owner(&self.context, command, |it| self.cancel_here(it)).await
    }

    pub(crate) async fn cancel_here(&self, command: CancelMove) -> Result<(), CommandError> {
        let machine = &command.machine;
        let handle = self.processes.exclusion.moves().get(machine).cloned();
        let Some(handle) = handle else {
            return Err(CommandError::Conflict(format!(
                "machine {machine:?} is not moving"
            )));
        };
        handle.cancel("it was cancelled");
        let text = "its move is being cancelled";
        let asked = Note::machine(EventKind::MoveCancelled, machine, text);
        self.context.events.record(asked);
        Ok(())
    }

    /// Predicts a move; nothing is reserved or changed.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn dry_run(
        self: &Arc<Self>,
        command: DryRunCommand,
    ) -> Result<DryRun, CommandError> {
        at_owner(&self.context, command, |it| self.dry_run_here(it)).await
    }

    pub(crate) async fn dry_run_here(
        self: &Arc<Self>,
        command: DryRunCommand,
    ) -> Result<DryRun, CommandError> {
        let budget = command.budget_micros.map(Duration::from_micros);
        dry_run(self, &command.machine, &command.target, budget).await
    }

    /// Moves a machine, wherever it is.
    pub(crate) async fn move_machine(
        self: &Arc<Self>,
        order: &MoveOrder,
    ) -> Result<mpsc::Receiver<MoveLine>, CommandError> {
        let machine = &order.machine;
        let owner = records::get(&*self.context.store, machine)
            .await?
            .record
            .owner;
        if owner == self.context.name {
            return begin(self, machine, order)
                .await
                .map_err(CommandError::Conflict);
        }
        let payload = pack(order).map_err(|error| CommandError::Invalid(error.to_string()))?;
        let mut stream = self
            .context
            .peers
            .stream(&owner, MOVE, payload)
            .await
            .map_err(|error| match error {
                RpcError::Failed { reason, .. } => CommandError::Conflict(reason),
                other => CommandError::Unavailable(other.to_string()),
            })?;
        let (send, lines) = mpsc::channel(64);
        tokio::spawn(async move {
            while let Some(item) = stream.recv().await {
                let line = item
                    .and_then(|bytes| unpack(&bytes))
                    .unwrap_or_else(|error: RpcError| MoveLine::Error(error.to_string()));
                if send.send(line).await.is_err() {
                    return;
                }
            }
        });
        Ok(lines)
    }
}
