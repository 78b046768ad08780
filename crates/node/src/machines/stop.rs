//! Ends a machine: by an orderly shutdown, or by killing its process.

use super::handle::Machines;
use crate::error::CommandError;
use crate::events::Note;
use crate::processes::PROMPT;
use crate::records::{self, MachineCommand, RecordError, at_owner};
use keel_api::EventKind;
use keel_cluster::MachineName;
use keel_machine::kind::Kind;
use keel_machine::spec::{Record, Spec, Status};
use keel_machine::worker::control::kind;
use keel_net::RpcError;
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// How long a stopped machine may take to end, beside [`Kind::shutdown_time`].
const STOP_PATIENCE: Duration = Duration::from_secs(15);

/// Stops a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StopMachine {
    pub(crate) machine: MachineName,
    /// Whether its process is killed.
    pub(crate) kill: bool,
}

impl MachineCommand for StopMachine {
    const KIND: u16 = 0x032c;
    type Answer = ();

    fn machine(&self) -> &MachineName {
        &self.machine
    }

    fn extra_patience(kind: &dyn Kind, spec: &Spec) -> Duration {
        kind.shutdown_time(spec)
    }
}

impl Machines {
    /// Ends a machine of any node.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn stop(self: &Arc<Self>, command: StopMachine) -> Result<(), CommandError> {
        at_owner(&self.context, command, |it| self.stop_here(it)).await
    }

    pub(crate) async fn stop_here(
        self: &Arc<Self>,
        command: StopMachine,
    ) -> Result<(), CommandError> {
        stop(self, &command.machine, command.kill).await
    }
}

async fn stop(
    machines: &Arc<Machines>,
    machine: &MachineName,
    kill: bool,
) -> Result<(), CommandError> {
    // A move in progress is cancelled first: a stopped machine must not resume elsewhere.
    let handle = machines.processes.exclusion.moves().get(machine).cloned();
    if let Some(handle) = handle {
        handle.cancel("the machine is being stopped");
        handle.over().await;
    }
    let found = records::get(&*machines.context.store, machine).await?;
    if found.record.owner != machines.context.name {
        return Err(CommandError::Conflict(format!(
            "machine {machine:?} just moved to {}; try again",
            found.record.owner
        )));
    }
    if found.record.status.ended() {
        return Ok(());
    }
    let how = if kill { "kill" } else { "stop" };
    machines.context.events.record(
        Note::machine(EventKind::StopAsked, machine, format!("is to end ({how})"))
            .under(found.record.epoch)
            .with("how", how),
    );
    // First, so that it is not restarted, whatever happens next.
    let marked = mark_stopped(machines, machine).await?;
    if marked.status.ended() {
        if matches!(found.record.status, Status::Restarting { .. }) {
            let stopped = Note::status(&marked, &found.record.status);
            machines.context.events.record(stopped);
        }
        return Ok(());
    }
    let asked: Result<(), RpcError> = match machines.processes.machines.get(machine) {
        Some(worker) if kill => {
            // The watch handles the rest as a lost worker.
            worker.kill().await;
            Ok(())
        }
        Some(worker) => worker.ask(kind::STOP, &(), PROMPT).await,
        // A concurrent start sees that the machine is stopped.
        None => Ok(()),
    };
    // A machine that has just ended does not answer; its record has the result.
    let kind = machines.context.kinds.of(&found.record.spec);
    let shutdown = kind.map_or(Duration::ZERO, |kind| {
        kind.shutdown_time(&found.record.spec)
    });
    let deadline = tokio::time::Instant::now() + STOP_PATIENCE + shutdown;
    loop {
        match records::get(&*machines.context.store, machine).await {
            Ok(found) if found.record.status.ended() => return Ok(()),
            Err(RecordError::NoMachine(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        if tokio::time::Instant::now() > deadline {
            let why = asked
                .err()
                .map_or_else(String::new, |error| format!(" ({error})"));
            return Err(CommandError::Unavailable(format!(
                "machine {machine:?} does not end{why}; `keel kill {machine}` ends its process"
            )));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Records that a user wants a machine to end. A machine that waits for its restart ends with this
/// write.
async fn mark_stopped(
    machines: &Arc<Machines>,
    machine: &MachineName,
) -> Result<Record, CommandError> {
    let entry = Key::Schedule(machines.context.name.clone(), machine.clone()).to_string();
    let starting = machines.processes.exclusion.busy().contains(machine)
        && machines.processes.machines.get(machine).is_some();
    let mark = |record: &mut Record| {
        // If it has moved away, the other node stops it.
        let mine = record.owner == machines.context.name;
        let changes = mine && !record.stop_wanted && !record.status.ended();
        if changes {
            record.stop_wanted = true;
            if matches!(record.status, Status::Restarting { .. }) && !starting {
                record.enter(Status::Stopped, unix_ms());
            }
        }
        changes
    };
    let marked = records::update(
        &*machines.context.store,
        machine,
        mark,
        |txn, record| match record.status.ended() {
            true => txn.delete(entry.clone()),
            false => txn,
        },
    )
    .await?;
    Ok(marked)
}
