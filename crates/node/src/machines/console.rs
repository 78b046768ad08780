//! What users type into the consoles of machines: each piece goes to the machine's owner, and on to
//! the next one if the machine moves. It is typed in order, and never twice; docs/systems.md says what
//! can get lost.

use super::handle::Machines;
use crate::error::CommandError;
use crate::processes::is_older;
use crate::records::{self, MachineCommand, at_owner};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use keel_cluster::MachineName;
use keel_machine::worker::control::{ConsoleInput, kind};
use keel_net::RpcError;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long the owner of a machine, and its worker, may take for a piece.
const OWNER_PATIENCE: Duration = Duration::from_secs(15);
const WORKER_PATIENCE: Duration = Duration::from_secs(10);
/// How long a machine may take nothing: moves, and agents that are restarted, take less.
const TAKES_NOTHING_PATIENCE: Duration = Duration::from_secs(60);
/// Pause after it has taken nothing.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Bytes of one piece: a serial line has taken them long before an owner must have answered.
const PIECE_BYTES: usize = 1024;

/// Types into a machine's console.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TypeIn {
    pub(crate) machine: MachineName,
    pub(crate) input: ConsoleInput,
}

impl MachineCommand for TypeIn {
    const KIND: u16 = 0x0333;
    const PATIENCE: Duration = OWNER_PATIENCE;
    /// How many bytes the machine has taken: none while it is stopped, or does not run there.
    type Answer = u64;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

impl Machines {
    /// Types what comes into a machine's console, wherever the machine is, until nothing more does.
    ///
    /// # Errors
    /// [`CommandError`]: it has no console, takes nothing for a minute, or perhaps took a piece.
    pub(crate) async fn type_in<E: std::fmt::Display>(
        &self,
        machine: MachineName,
        mut input: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<(), CommandError> {
        // So that its user learns at once that nothing can be typed.
        self.type_piece(&machine, &[]).await?;
        while let Some(bytes) = input.next().await {
            let bytes = bytes.map_err(|error| {
                CommandError::Invalid(format!("the input was not sent whole: {error}"))
            })?;
            for piece in bytes.chunks(PIECE_BYTES) {
                self.type_whole(&machine, piece).await?;
            }
        }
        Ok(())
    }

    async fn type_whole(&self, machine: &MachineName, piece: &[u8]) -> Result<(), CommandError> {
        let mut rest = piece;
        let mut last = Instant::now();
        while !rest.is_empty() {
            let count = self.type_piece(machine, rest).await?;
            let taken = usize::try_from(count).unwrap_or(usize::MAX);
            rest = rest.get(taken..).unwrap_or_default();
            if taken > 0 {
                last = Instant::now();
            } else if last.elapsed() > TAKES_NOTHING_PATIENCE {
                return Err(CommandError::Unavailable(format!(
                    "machine {machine:?} takes no input: the last {} bytes were not typed",
                    rest.len()
                )));
            } else {
                sleep(AGAIN_AFTER).await;
            }
        }
        Ok(())
    }

    async fn type_piece(&self, machine: &MachineName, bytes: &[u8]) -> Result<u64, CommandError> {
        let command = TypeIn {
            machine: machine.clone(),
            input: ConsoleInput {
                bytes: bytes.to_vec(),
            },
        };
        at_owner(&self.context, command, |it| self.type_in_here(it)).await
    }

    pub(crate) async fn type_in_here(&self, command: TypeIn) -> Result<u64, CommandError> {
        let machine = &command.machine;
        let record = records::get(&*self.context.store, machine).await?.record;
        let kind = self.context.kinds.of(&record.spec);
        let abilities = kind.map_err(CommandError::Conflict)?.abilities();
        if !abilities.has_console {
            return Err(CommandError::Conflict(format!(
                "machine {machine:?} is of kind {}, whose machines have no console",
                record.spec.kind
            )));
        }
        if record.status.ended() {
            let word = record.word();
            return Err(CommandError::Conflict(format!(
                "machine {machine:?} does not run (it is {word})"
            )));
        }
        // It may be on its way here, or from here.
        let Some(worker) = self.processes.machines.get(machine) else {
            return Ok(0);
        };
        let typed = worker.ask(kind::TYPE_IN, &command.input, WORKER_PATIENCE);
        typed.await.or_else(|error| match error {
            RpcError::Refused { reason, .. } if is_older(&reason) => {
                Err(CommandError::Conflict(format!(
                    "machine {machine:?} was started by a version of keel without consoles: run it again"
                )))
            }
            RpcError::NotSent { .. } => Ok(0),
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
                Err(CommandError::Conflict(format!("machine {machine:?}: {reason}")))
            }
            RpcError::Unknown { reason, .. } => Err(CommandError::Unavailable(format!(
                "machine {machine:?}: the last {} bytes may have been typed, or not: {reason}",
                command.input.bytes.len()
            ))),
        })
    }
}
