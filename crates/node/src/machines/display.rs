//! Viewers of machines' displays: bytes from any node to the machine's owner, its worker and back.
//!
//! ```text
//!   viewer ◀── WebSocket ──▶ any node ◀── VIEW, a stream ── owner ◀── VIEW, a stream ── worker ◀──▶ display
//!                                     ── VIEWER_INPUT ───▶       ── VIEWER_INPUT ───▶
//! ```
//!
//! A view belongs to one process of a machine: it ends when the machine moves, ends or begins anew, and
//! its viewer connects again, as with any display server that is restarted.

use super::handle::{Machines, starts};
use crate::error::CommandError;
use crate::processes::{OLDER, is_older};
use crate::records;
use keel_cluster::{MachineName, NodeName};
use keel_machine::worker::control::{kind, pack, unpack};
use keel_net::rpc::StreamReceiver;
use keel_net::{Bytes, Reply, RpcError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Request between agents: `(machine, viewer)` → stream of what the display sends. A random number
/// stands for the viewer.
pub(crate) const VIEW: u16 = 0x0334;
/// `(machine, viewer, bytes)` → `()`: what such a viewer sends, in order.
pub(crate) const VIEWER_INPUT: u16 = 0x0335;

/// How long a display may take for what a viewer sends, and a node for its answer to that.
const DISPLAY_PATIENCE: Duration = Duration::from_secs(10);
const OWNER_PATIENCE: Duration = Duration::from_secs(15);
/// Pieces of what a display sends on their way to another node.
const PIECES_AHEAD: usize = 4;

/// What a viewer sends to a display.
pub(crate) struct ViewerInput {
    machines: Arc<Machines>,
    owner: NodeName,
    machine: MachineName,
    viewer: u64,
}

impl ViewerInput {
    /// Sends it to the display. Each call waits for the one before.
    ///
    /// # Errors
    /// If the view has ended.
    pub(crate) async fn send(&mut self, bytes: Vec<u8>) -> Result<(), RpcError> {
        let (machines, viewer) = (&self.machines, self.viewer);
        let context = &machines.context;
        if self.owner == context.name {
            return machines
                .viewer_input_here(&self.machine, viewer, bytes)
                .await;
        }
        let input = pack(&(&self.machine, viewer, bytes))?;
        let sent = context
            .peers
            .call(&self.owner, VIEWER_INPUT, input, OWNER_PATIENCE);
        unpack(&sent.await?)
    }
}

impl Machines {
    /// Begins a view of a machine's display: what it sends (RFB, RFC 6143), and how to answer.
    ///
    /// # Errors
    /// [`CommandError`]: it has no display, or does not run.
    pub(crate) async fn view(
        self: &Arc<Self>,
        machine: MachineName,
    ) -> Result<(StreamReceiver, ViewerInput), CommandError> {
        let viewer = rand::random();
        let owner = records::get(&*self.context.store, &machine)
            .await?
            .record
            .owner;
        let output = match owner == self.context.name {
            true => self.view_here(&machine, viewer).await?,
            false => {
                let question = pack(&(&machine, viewer));
                let question =
                    question.map_err(|error| CommandError::Invalid(error.to_string()))?;
                let stream = self.context.peers.bulk_stream(&owner, VIEW, question).await;
                stream.map_err(|error| match error {
                    RpcError::Failed { reason, .. } => CommandError::Conflict(reason),
                    error => CommandError::Unavailable(error.to_string()),
                })?
            }
        };
        let input = ViewerInput {
            machines: self.clone(),
            owner,
            machine,
            viewer,
        };
        Ok((output, input))
    }

    async fn view_here(
        &self,
        machine: &MachineName,
        viewer: u64,
    ) -> Result<StreamReceiver, CommandError> {
        let record = records::get(&*self.context.store, machine).await?.record;
        if record.status.ended() {
            let word = record.word();
            return Err(CommandError::Conflict(format!(
                "machine {machine:?} does not run (it is {word})"
            )));
        }
        let later = |why: &str| CommandError::Unavailable(format!("machine {machine:?}: {why}"));
        let moves = "it starts or moves; try again";
        if record.owner != self.context.name || starts(&record.status) {
            return Err(later(moves));
        }
        let worker = self.processes.machines.get(machine);
        let worker = worker.ok_or_else(|| later(moves))?;
        let view = worker.stream(kind::VIEW, &(record.epoch, viewer)).await;
        view.map_err(|error| match error {
            RpcError::Refused { reason, .. } if is_older(&reason) => {
                CommandError::Conflict(format!("machine {machine:?}: {OLDER}"))
            }
            RpcError::Failed { reason, .. } => {
                CommandError::Conflict(format!("machine {machine:?}: {reason}"))
            }
            RpcError::NotSent { reason, .. }
            | RpcError::Refused { reason, .. }
            | RpcError::Unknown { reason, .. } => later(&reason),
        })
    }

    /// A view for a viewer at another node.
    ///
    /// # Errors
    /// As [`Self::view`].
    pub(crate) async fn view_for(
        &self,
        machine: &MachineName,
        viewer: u64,
    ) -> Result<Reply, CommandError> {
        let mut view = self.view_here(machine, viewer).await?;
        let (send, pieces) = mpsc::channel::<Bytes>(PIECES_AHEAD);
        tokio::spawn(async move {
            loop {
                let piece = tokio::select! {
                    piece = view.recv() => piece,
                    () = send.closed() => return,
                };
                let Some(Ok(piece)) = piece else { return };
                if send.send(piece).await.is_err() {
                    return;
                }
            }
        });
        Ok(Reply::Stream(pieces))
    }

    /// Passes on to a display of this node what a viewer sends.
    ///
    /// # Errors
    /// If the view has ended.
    pub(crate) async fn viewer_input_here(
        &self,
        machine: &MachineName,
        viewer: u64,
        bytes: Vec<u8>,
    ) -> Result<(), RpcError> {
        let worker = self.processes.machines.get(machine);
        let worker = worker.ok_or_else(|| RpcError::failed("it is not here any more"))?;
        worker
            .ask(kind::VIEWER_INPUT, &(viewer, bytes), DISPLAY_PATIENCE)
            .await
    }
}
