//! Gives up the machines of a node that an operator declared dead, so that it can be removed. Nobody
//! can find out whether a node that does not answer is dead, so nothing does this by itself: machines
//! without high availability wait for their node otherwise.

use super::handle::Machines;
use crate::error::CommandError;
use crate::events::Note;
use crate::records::{self, RecordError};
use keel_api::EventKind;
use keel_cluster::{MachineName, NodeName};
use keel_machine::moves::ownership::{self, GivenUp};
use keel_store::clock::unix_ms;
use keel_store::keys::{self, Key};
use keel_store::{Txn, TxnOutcome};
use std::time::Duration;
use tokio::time::Instant;

/// How long machines with high availability have to be restarted elsewhere before they are given up,
/// too: several times as long as that takes.
const FAILOVER_PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two looks at them.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Attempts for a machine whose record others change meanwhile.
const ATTEMPTS_MAX: usize = 20;

impl Machines {
    /// Gives up the machines of a node: their names.
    ///
    /// # Errors
    /// [`CommandError::NotFound`] if there is no such node; [`CommandError::Conflict`] if it is alive,
    /// or another node holds a copy of a machine that was on its way there;
    /// [`CommandError::Unavailable`]. Some machines may have been given up then.
    pub(crate) async fn give_up(&self, node: &NodeName) -> Result<Vec<MachineName>, CommandError> {
        let context = &self.context;
        let store = &*context.store;
        if !context.members.contains(node) {
            let what = format!("there is no node {node:?} (see `keel nodes`)");
            return Err(CommandError::NotFound(what));
        }
        if records::alive(store).await?.contains(node) {
            let what = format!("node {node} is alive: its machines are not given up");
            return Err(CommandError::Conflict(what));
        }
        self.wait_for_failovers(node).await?;
        let mut given_up = Vec::new();
        for machine in records::schedule(store, node).await? {
            if self.give_up_one(node, &machine).await? {
                given_up.push(machine);
            }
        }
        // What was to arrive there cannot any more: its commit needs the reservation.
        for entry in store.list(&keys::reservations_of(node)).await?.entries {
            let txn = Txn::new().when_absent(Key::Alive(node.clone()));
            store.txn(txn.delete(entry.key)).await?;
        }
        Ok(given_up)
    }

    /// Waits until the node has no machine with high availability any more, or for long enough.
    async fn wait_for_failovers(&self, node: &NodeName) -> Result<(), CommandError> {
        let store = &*self.context.store;
        let deadline = Instant::now() + FAILOVER_PATIENCE;
        loop {
            let mut waits = false;
            for machine in records::schedule(store, node).await? {
                match records::get(store, &machine).await {
                    Ok(found) => waits |= found.record.spec.ha.is_some(),
                    Err(RecordError::NoMachine(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if !waits || Instant::now() >= deadline {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Whether it was the node's, and is given up.
    async fn give_up_one(
        &self,
        node: &NodeName,
        machine: &MachineName,
    ) -> Result<bool, CommandError> {
        let store = &*self.context.store;
        let is_member = |node: &NodeName| self.context.members.contains(node);
        let reason = format!(
            "its node {node} was declared dead; with a checkpoint in a place that another node sees, \
             `keel rm {machine}` and `keel restore {machine} --from PLACE` start it again"
        );
        for _ in 0..ATTEMPTS_MAX {
            let found = match records::get(store, machine).await {
                Ok(found) => found,
                Err(RecordError::NoMachine(_)) => {
                    let entry = Key::Schedule(node.clone(), machine.clone());
                    let txn = Txn::new().when_absent(Key::Machine(machine.clone()));
                    store.txn(txn.delete(entry)).await?;
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            };
            let given = ownership::give_up(&found, node, is_member, reason.clone(), unix_ms());
            let (record, txn) = match given.map_err(CommandError::Unavailable)? {
                GivenUp::NotIts(txn) => (None, txn),
                GivenUp::Failed { record, txn } => (Some(record), txn),
                GivenUp::HeldBy(other) => {
                    let what = format!(
                        "machine {machine:?} was on its way from {other}, which still holds it: it takes it back \
                         once it is there"
                    );
                    return Err(CommandError::Conflict(what));
                }
            };
            match store.txn(txn).await? {
                TxnOutcome::Committed { .. } => {
                    if let Some(record) = &record {
                        let text = format!("its node {node} was declared dead");
                        let told = Note::machine(EventKind::MachineFailed, machine, text);
                        self.context.events.record(told.under(record.epoch));
                    }
                    return Ok(record.is_some());
                }
                TxnOutcome::Refused { failed: 1, .. } => {
                    let what = format!("node {node} is alive: its machines are not given up");
                    return Err(CommandError::Conflict(what));
                }
                TxnOutcome::Refused { .. } => {}
            }
        }
        Err(RecordError::Contended(machine.to_string()).into())
    }
}
