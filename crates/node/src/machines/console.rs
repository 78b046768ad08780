//! What users type into the consoles of machines: each piece goes to the machine's owner, and on to
//! the next one if the machine moves.
//!
//! It is typed in order, and never twice. Where the answer to a piece is lost, the piece is sent
//! again, and the worker types only what it has not: it counts the bytes of each session. A worker
//! that does not know the session, as at the target of a move meanwhile, refuses such a piece.

use super::handle::{Machines, starts};
use crate::error::CommandError;
use crate::processes::explained;
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
    /// When the machine began to run into which the session has typed, in milliseconds since
    /// 1970-01-01 UTC; `None` at the beginning.
    pub(crate) started_unix_ms: Option<u64>,
    pub(crate) input: ConsoleInput,
}

/// How far a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Typed {
    /// Bytes that were typed.
    offset: u64,
    /// When the machine began to run.
    started_unix_ms: u64,
}

impl MachineCommand for TypeIn {
    const KIND: u16 = 0x0333;
    const PATIENCE: Duration = OWNER_PATIENCE;
    /// `None` if that is not known now: the machine starts, or is on its way.
    type Answer = Option<Typed>;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

impl Machines {
    /// Types what comes into a machine's console, wherever the machine is, until nothing more does.
    ///
    /// # Errors
    /// [`CommandError`]: it has no console, has ended or begun anew, or takes nothing for a minute.
    pub(crate) async fn type_in<E: std::fmt::Display>(
        &self,
        machine: MachineName,
        mut input: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<(), CommandError> {
        let mut session = Session {
            machines: self,
            machine,
            number: rand::random(),
            started_unix_ms: None,
            typed: 0,
            is_repeated: false,
        };
        // So that its user learns at once that nothing can be typed.
        session.type_whole(&[]).await?;
        while let Some(bytes) = input.next().await {
            let bytes = bytes.map_err(|error| {
                CommandError::Invalid(format!("the input was not sent whole: {error}"))
            })?;
            for piece in bytes.chunks(PIECE_BYTES) {
                session.type_whole(piece).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn type_in_here(
        &self,
        command: TypeIn,
    ) -> Result<Option<Typed>, CommandError> {
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
        // When it began is known once it runs.
        if record.owner != self.context.name || starts(&record.status) {
            return Ok(None);
        }
        let started_unix_ms = record.started_unix_ms;
        if command
            .started_unix_ms
            .is_some_and(|it| it != started_unix_ms)
        {
            return Err(CommandError::Conflict(format!(
                "machine {machine:?} has begun anew"
            )));
        }
        // It may be on its way here, or from here.
        let Some(worker) = self.processes.machines.get(machine) else {
            return Ok(None);
        };
        let request = (record.epoch, command.input);
        let typed = worker.ask(kind::TYPE_IN, &request, WORKER_PATIENCE).await;
        let typed: Option<u64> = typed.or_else(|error| match error {
            RpcError::NotSent { .. } => Ok(None),
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
                let reason = explained(reason);
                Err(CommandError::Conflict(format!(
                    "machine {machine:?}: {reason}"
                )))
            }
            RpcError::Unknown { reason, .. } => Err(CommandError::Unavailable(format!(
                "machine {machine:?}: {reason}"
            ))),
        })?;
        Ok(typed.map(|offset| Typed {
            offset,
            started_unix_ms,
        }))
    }
}

/// One user's typing into one life of a machine.
struct Session<'a> {
    machines: &'a Machines,
    machine: MachineName,
    number: u64,
    started_unix_ms: Option<u64>,
    /// Bytes that were typed.
    typed: u64,
    /// Whether the last answer was lost.
    is_repeated: bool,
}

impl Session<'_> {
    /// Types a piece.
    ///
    /// # Errors
    /// [`CommandError`] if not all of it was typed, or that is not known.
    async fn type_whole(&mut self, piece: &[u8]) -> Result<(), CommandError> {
        let begin = self.typed;
        let mut last = Instant::now();
        loop {
            let done = usize::try_from(self.typed.saturating_sub(begin)).unwrap_or(usize::MAX);
            let rest = piece.get(done..).unwrap_or_default();
            let reason = match self.type_some(rest).await {
                Ok(Some(count)) if count >= rest.len() as u64 => return Ok(()),
                Ok(Some(1..)) => {
                    last = Instant::now();
                    continue;
                }
                Ok(_) => "it takes no input".to_owned(),
                // A node or a process was restarted, or the machine is moving.
                Err(CommandError::Unavailable(reason)) => {
                    self.is_repeated = true;
                    reason
                }
                Err(error) => return Err(error),
            };
            if last.elapsed() > TAKES_NOTHING_PATIENCE {
                let (count, machine) = (rest.len(), &self.machine);
                let outcome = match self.is_repeated {
                    true => "may have been typed, or not",
                    false => "were not typed",
                };
                return Err(CommandError::Unavailable(format!(
                    "machine {machine:?}: the last {count} bytes {outcome}: {reason}"
                )));
            }
            sleep(AGAIN_AFTER).await;
        }
    }

    /// Types what the machine takes now; returns how many more bytes were typed than was known,
    /// `None` if that is not known.
    async fn type_some(&mut self, bytes: &[u8]) -> Result<Option<u64>, CommandError> {
        let command = TypeIn {
            machine: self.machine.clone(),
            started_unix_ms: self.started_unix_ms,
            input: ConsoleInput {
                session: self.number,
                offset: self.typed,
                is_repeated: self.is_repeated,
                bytes: bytes.to_vec(),
            },
        };
        let here = |it| self.machines.type_in_here(it);
        let Some(typed) = at_owner(&self.machines.context, command, here).await? else {
            return Ok(None);
        };
        let end = self.typed + bytes.len() as u64;
        let more = typed.offset.min(end).saturating_sub(self.typed);
        self.typed += more;
        self.started_unix_ms = Some(typed.started_unix_ms);
        self.is_repeated = false;
        Ok(Some(more))
    }
}
