//! Commands of users for the parts, threads and memory of a machine; carried out by its owner.

use super::handle::{PATIENCE, Spanning};
use super::parts::{move_object, move_thread, objects, parts_of};
use super::span::{span, unspan};
use crate::error::CommandError;
use crate::records;
use crate::records::{MachineCommand, at_owner};
use keel_api::{ObjectInfo, PartsInfo, SpanRequest};
use keel_cluster::MachineName;
use keel_machine::worker::control::Positional;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// Creates parts of a machine on other nodes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SpanCommand {
    pub(crate) machine: MachineName,
    pub(crate) request: SpanRequest,
}

impl MachineCommand for SpanCommand {
    const KIND: u16 = 0x0320;
    const PATIENCE: Duration = PATIENCE;
    type Answer = PartsInfo;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// Removes all parts of a machine but its home; the answer is the downtime in microseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct UnspanCommand {
    pub(crate) machine: MachineName,
}

impl MachineCommand for UnspanCommand {
    const KIND: u16 = 0x0321;
    const PATIENCE: Duration = PATIENCE;
    type Answer = u64;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// Asks for the parts and threads of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartsQuery {
    pub(crate) machine: MachineName,
}

impl MachineCommand for PartsQuery {
    const KIND: u16 = 0x0322;
    type Answer = PartsInfo;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// Asks for the memory of a machine, by the part that holds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ObjectsQuery {
    pub(crate) machine: MachineName,
}

impl MachineCommand for ObjectsQuery {
    const KIND: u16 = 0x0323;
    type Answer = Positional<Vec<ObjectInfo>>;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// Moves a range of a machine's memory, or a named object, to the part on a node; the answer is
/// its size in bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MoveObjectCommand {
    pub(crate) machine: MachineName,
    pub(crate) name: String,
    pub(crate) to: String,
}

impl MachineCommand for MoveObjectCommand {
    const KIND: u16 = 0x0324;
    type Answer = u64;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// Moves a thread of a machine to the part on a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MoveThreadCommand {
    pub(crate) machine: MachineName,
    pub(crate) tid: u32,
    pub(crate) to: String,
}

impl MachineCommand for MoveThreadCommand {
    const KIND: u16 = 0x0325;
    type Answer = ();

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

impl Spanning {
    /// Creates parts of a machine on other nodes.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn span(
        self: &Arc<Self>,
        command: SpanCommand,
    ) -> Result<PartsInfo, CommandError> {
        at_owner(&self.context, command, |it| self.span_here(it)).await
    }

    pub(crate) async fn span_here(
        self: &Arc<Self>,
        command: SpanCommand,
    ) -> Result<PartsInfo, CommandError> {
        self.check_spans(&command.machine).await?;
        span(self, &command.machine, &command.request).await
    }

    /// Merges a machine's parts into its home; returns the downtime in microseconds.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn unspan(
        self: &Arc<Self>,
        command: UnspanCommand,
    ) -> Result<u64, CommandError> {
        at_owner(&self.context, command, |it| self.unspan_here(it)).await
    }

    pub(crate) async fn unspan_here(
        self: &Arc<Self>,
        command: UnspanCommand,
    ) -> Result<u64, CommandError> {
        self.check_spans(&command.machine).await?;
        unspan(self, &command.machine).await
    }

    /// The parts and threads of a machine.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn parts(
        self: &Arc<Self>,
        query: PartsQuery,
    ) -> Result<PartsInfo, CommandError> {
        at_owner(&self.context, query, |it| self.parts_here(it)).await
    }

    pub(crate) async fn parts_here(
        self: &Arc<Self>,
        query: PartsQuery,
    ) -> Result<PartsInfo, CommandError> {
        self.check_spans(&query.machine).await?;
        parts_of(self, &query.machine).await
    }

    /// The memory of a machine, by the part that holds it.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn objects(
        self: &Arc<Self>,
        query: ObjectsQuery,
    ) -> Result<Vec<ObjectInfo>, CommandError> {
        let answer = at_owner(&self.context, query, |it| self.objects_here(it)).await;
        answer.map(|Positional(objects)| objects)
    }

    pub(crate) async fn objects_here(
        self: &Arc<Self>,
        query: ObjectsQuery,
    ) -> Result<Positional<Vec<ObjectInfo>>, CommandError> {
        self.check_spans(&query.machine).await?;
        objects(self, &query.machine).await.map(Positional)
    }

    /// Moves memory to the part on a node; returns its bytes.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn move_object(
        self: &Arc<Self>,
        command: MoveObjectCommand,
    ) -> Result<u64, CommandError> {
        at_owner(&self.context, command, |it| self.move_object_here(it)).await
    }

    pub(crate) async fn move_object_here(
        self: &Arc<Self>,
        command: MoveObjectCommand,
    ) -> Result<u64, CommandError> {
        self.check_spans(&command.machine).await?;
        move_object(self, &command.machine, &command.name, &command.to).await
    }

    /// Moves a thread to the part on a node.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn move_thread(
        self: &Arc<Self>,
        command: MoveThreadCommand,
    ) -> Result<(), CommandError> {
        at_owner(&self.context, command, |it| self.move_thread_here(it)).await
    }

    pub(crate) async fn move_thread_here(
        self: &Arc<Self>,
        command: MoveThreadCommand,
    ) -> Result<(), CommandError> {
        self.check_spans(&command.machine).await?;
        move_thread(self, &command.machine, command.tid, &command.to).await
    }

    /// Fails for a machine of a kind that has no parts.
    async fn check_spans(&self, machine: &MachineName) -> Result<(), CommandError> {
        let record = records::get(&*self.context.store, machine).await?.record;
        let kind = self.context.kinds.of(&record.spec);
        match kind.map_err(CommandError::Conflict)?.abilities().spans {
            true => Ok(()),
            false => Err(CommandError::Conflict(format!(
                "machine {machine:?} is of kind {}, whose machines have no parts, threads and objects that move",
                record.spec.kind
            ))),
        }
    }
}
