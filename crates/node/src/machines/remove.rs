//! Removes an ended machine: its record, output and worker.

use super::handle::Machines;
use crate::error::CommandError;
use crate::events::Note;
use crate::records::{self, MachineCommand, RecordError, at_owner};
use crate::volumes;
use keel_api::EventKind;
use keel_cluster::MachineName;
use keel_store::keys::Key;
use keel_store::{Txn, TxnOutcome};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// Pause between checks of a machine with another operation in progress.
const BUSY_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// The longest wait of a removal for such an operation.
const BUSY_PATIENCE: Duration = Duration::from_secs(1);

/// Removes an ended machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RemoveMachine {
    pub(crate) machine: MachineName,
}

impl MachineCommand for RemoveMachine {
    const KIND: u16 = 0x032d;
    type Answer = ();

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

impl Machines {
    /// Removes an ended machine of any node.
    ///
    /// # Errors
    /// [`CommandError`] if it has not ended.
    pub(crate) async fn remove(
        self: &Arc<Self>,
        command: RemoveMachine,
    ) -> Result<(), CommandError> {
        let found = records::get(&*self.context.store, &command.machine).await?;
        // Nobody else can, once its node left the cluster.
        if !self.context.members.contains(&found.record.owner) {
            return self.remove_here(command).await;
        }
        at_owner(&self.context, command, |it| self.remove_here(it)).await
    }

    pub(crate) async fn remove_here(
        self: &Arc<Self>,
        command: RemoveMachine,
    ) -> Result<(), CommandError> {
        let machine = &command.machine;
        let found = records::get(&*self.context.store, machine).await?;
        if !found.record.status.ended() {
            return Err(CommandError::Conflict(format!(
                "machine {machine:?} is {}; stop it first (`keel stop {machine}`)",
                found.record.status.word()
            )));
        }
        Ok(remove_ended(self, machine).await?)
    }
}

/// Removes an ended machine that this node owned: record, output, worker.
pub(super) async fn remove_ended(
    machines: &Arc<Machines>,
    machine: &MachineName,
) -> Result<(), RecordError> {
    // A new machine of that name may be started here as soon as the record is gone, so it waits
    // until the folder is gone too. A pending restart that was cancelled does not hold it up.
    let deadline = tokio::time::Instant::now() + BUSY_PATIENCE;
    let mut guarded = machines.processes.exclusion.busy().insert(machine.clone());
    while !guarded && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(BUSY_AGAIN_AFTER).await;
        guarded = machines.processes.exclusion.busy().insert(machine.clone());
    }
    let removed = remove_guarded(machines, machine).await;
    if guarded {
        machines.processes.exclusion.busy().remove(machine);
    }
    removed
}

async fn remove_guarded(
    machines: &Arc<Machines>,
    machine: &MachineName,
) -> Result<(), RecordError> {
    let found = records::get(&*machines.context.store, machine).await?;
    if !found.record.status.ended() {
        return Err(RecordError::Refused(format!(
            "machine {machine:?} is {}",
            found.record.status.word()
        )));
    }
    let key = Key::Machine(machine.clone());
    let txn = Txn::new()
        .when_modified_at(key.clone(), found.revision)
        .delete(key)
        .delete(Key::Checkpoint(machine.clone()))
        .delete(Key::InSync(machine.clone()));
    let spec = &found.record.spec;
    let txn = volumes::give_back(&*machines.context.store, machine, spec, txn).await?;
    let worker = machines.processes.machines.get(machine);
    match machines.context.store.txn(txn).await? {
        TxnOutcome::Committed { .. } => {
            machines
                .processes
                .machines
                .forget_exactly(&machines.context.dir, machine, worker.as_ref())
                .await;
            let text = "was removed with its output";
            let removed = Note::machine(EventKind::MachineRemoved, machine, text);
            machines
                .context
                .events
                .record(removed.under(found.record.epoch));
            Ok(())
        }
        TxnOutcome::Refused { .. } => Err(RecordError::Contended(machine.to_string())),
    }
}
