//! What the guest agent of a machine tells of the system in it: asked when a user wants to know, not kept.

use super::handle::Machines;
use crate::error::CommandError;
use crate::processes::explained;
use crate::records::{self, MachineCommand, at_owner};
use keel_api::{FileSystemInfo, InterfaceInfo, SystemInfo};
use keel_cluster::MachineName;
use keel_machine::worker::control::{GuestSystem, kind};
use keel_net::RpcError;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long a worker may take, which asks its guest agent several things, and the owner of a machine
/// for its answer.
const WORKER_PATIENCE: Duration = Duration::from_secs(30);
const OWNER_PATIENCE: Duration = Duration::from_secs(35);

/// Asks for the system in a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SystemQuery {
    pub(crate) machine: MachineName,
}

impl MachineCommand for SystemQuery {
    const KIND: u16 = 0x0336;
    const PATIENCE: Duration = OWNER_PATIENCE;
    type Answer = GuestSystem;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

impl Machines {
    /// What the guest agent of a machine tells of its system.
    ///
    /// # Errors
    /// [`CommandError`]: it has none, or none that answers.
    pub(crate) async fn system(&self, query: SystemQuery) -> Result<SystemInfo, CommandError> {
        let told = at_owner(&self.context, query, |it| self.system_here(it)).await;
        told.map(shown)
    }

    pub(crate) async fn system_here(
        &self,
        query: SystemQuery,
    ) -> Result<GuestSystem, CommandError> {
        let machine = &query.machine;
        let record = records::get(&*self.context.store, machine).await?.record;
        let Some(worker) = self.processes.machines.get(machine) else {
            let word = record.word();
            return Err(CommandError::Conflict(format!(
                "machine {machine:?} does not run here now (it is {word})"
            )));
        };
        let told = worker.ask(kind::SYSTEM, &(), WORKER_PATIENCE).await;
        told.map_err(|error| match error {
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
                CommandError::Conflict(format!("machine {machine:?}: {}", explained(reason)))
            }
            RpcError::NotSent { reason, .. } | RpcError::Unknown { reason, .. } => {
                CommandError::Unavailable(format!("machine {machine:?}: {reason}"))
            }
        })
    }
}

fn shown(system: GuestSystem) -> SystemInfo {
    let interfaces = system.interfaces.into_iter();
    let file_systems = system.file_systems.into_iter();
    SystemInfo {
        host_name: system.host_name,
        name: system.name,
        kernel: system.kernel,
        interfaces: interfaces
            .map(|(name, addresses)| InterfaceInfo { name, addresses })
            .collect(),
        load: system.load.map(Vec::from).unwrap_or_default(),
        file_systems: file_systems
            .map(|it| FileSystemInfo {
                mount_point: it.mount_point,
                used_bytes: it.used_bytes,
                total_bytes: it.total_bytes,
            })
            .collect(),
    }
}
