//! Restarts of this agent on purpose, as for an upgrade: its machines run on, however long the next
//! agent takes to start within a minute. See `crate::lease` for the hold that makes it safe.

use super::lease_extension::LeaseExtension;
use crate::error::CommandError;
use crate::events::Note;
use keel_api::{AgentRestart, EventKind};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Pause before workers that did not answer are asked again.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// Lets the answer to the request reach whoever asked, before the process ends.
const ANSWER_WITHIN: Duration = Duration::from_millis(200);

/// Restarts of this agent.
pub(crate) struct PlannedRestart {
    extension: Arc<LeaseExtension>,
    /// Whether this agent would be started again if it ended now.
    has_parent: fn() -> bool,
    is_wanted: watch::Sender<bool>,
}

impl PlannedRestart {
    pub(crate) fn new(extension: Arc<LeaseExtension>, has_parent: fn() -> bool) -> Self {
        Self {
            extension,
            has_parent,
            is_wanted: watch::Sender::new(false),
        }
    }

    /// Prepares the end of this process: the node counts as alive without it for a minute, and its
    /// workers know.
    ///
    /// # Errors
    /// [`CommandError`] if nobody would start the next agent, or the store does not answer; the agent
    /// goes on then.
    pub(crate) async fn begin(&self) -> Result<AgentRestart, CommandError> {
        let context = &self.extension.context;
        let node = &context.name;
        if !(self.has_parent)() {
            return Err(CommandError::Conflict(format!(
                "the agent of node {node} has no parent (`keel up`) that would start it again"
            )));
        }
        let term = context.hold.begin().await?;
        let held = self.extension.extend_known(term).await;
        let text = "the agent restarts, as it was asked to";
        let note = Note::node(EventKind::AgentRestarts, text).with("machines", held.len());
        context.events.record(note);
        let is_wanted = self.is_wanted.clone();
        tokio::spawn(async move {
            tokio::time::sleep(ANSWER_WITHIN).await;
            is_wanted.send_replace(true);
        });
        let names = self.extension.processes.machines.names();
        Ok(AgentRestart {
            node: node.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machines: names.iter().map(ToString::to_string).collect(),
        })
    }

    /// Waits until this process is to end, and to be started again.
    pub(crate) async fn wanted(&self) {
        let mut is_wanted = self.is_wanted.subscribe();
        if is_wanted.wait_for(|wanted| *wanted).await.is_err() {
            // The sender is as old as this.
            std::future::pending().await
        }
    }

    /// Lets the node's present lease count again, whenever the hold of an earlier agent is in force,
    /// as soon as no worker relies on that. Until the agent ends.
    pub(crate) async fn end_holds(self: Arc<Self>) {
        let hold = &self.extension.context.hold;
        loop {
            hold.wait_in_force().await;
            while hold.is_in_force() {
                if self.extension.extend_all().await {
                    match hold.end().await {
                        Ok(()) => break,
                        Err(error) => tracing::debug!(%error, "the hold of this node goes on"),
                    }
                }
                tokio::time::sleep(ASK_AGAIN_AFTER).await;
            }
        }
    }
}
