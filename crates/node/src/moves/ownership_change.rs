//! The part of a move's source that changes the owner: freezes the machine, commits, and
//! settles an unknown outcome by writes of its own.

use super::offer::passed;
use super::source::{Driver, RETRY_AFTER, micros};
use crate::records::{self, RecordError};
use keel_machine::moves::SourceEvent;
use keel_machine::moves::ownership::{Settlement, Target, Transfer, VersionedRecord};
use keel_machine::worker::control::{Frozen, kind};
use keel_net::RpcError;
use keel_store::clock::unix_ms;
use keel_store::{Revision, StoreError, TxnOutcome};
use std::time::{Duration, Instant};

/// Prefix of the reason of a commit that lost against another placement.
pub(crate) const RACED: &str = "raced with another change of what a rule holds:";

/// How long freezing and sending the residual dirty pages may take.
const FREEZE_PATIENCE: Duration = Duration::from_secs(60);

impl Driver {
    pub(super) async fn freeze(&mut self) -> SourceEvent {
        let interrupted = self.interrupted.borrow().clone();
        if let Some(event) = interrupted {
            return event;
        }
        if let Err(reason) = passed("move.freeze").await {
            return SourceEvent::FreezeLate(reason);
        }
        match self
            .worker
            .ask::<_, Frozen>(kind::FREEZE, &(), FREEZE_PATIENCE)
            .await
        {
            Ok(frozen) => {
                self.report.freeze_micros = frozen.freeze_micros;
                self.report.last_pages_micros = frozen.last_pages_micros;
                self.report.last_bytes = frozen.last_bytes;
                self.report.state_micros = frozen.state_micros;
                self.report.bytes = frozen.bytes;
                self.prepared = Some(Instant::now());
                // The remaining steps use little of the link.
                self.place = None;
                SourceEvent::Prepared
            }
            Err(RpcError::Failed { reason, .. }) if reason.contains("has ended") => {
                SourceEvent::MachineEnded
            }
            Err(RpcError::Failed { reason, .. }) => SourceEvent::FreezeLate(reason),
            Err(error) => SourceEvent::PeerLost(error.to_string()),
        }
    }

    /// The state with which the move began. It never comes from a newer record, or a repeated
    /// write would be compared with its own result.
    pub(super) fn transfer(&self) -> Transfer {
        Transfer {
            machine: self.record.name.clone(),
            source: self.moves.context.name.clone(),
            target: self.target.clone(),
            epoch: self.record.epoch,
            committed: self.committed,
            revision: self.revision,
            is_complete: !self.post_copy && !self.spans,
        }
    }

    /// Commits in one transaction: the two schedule entries, the owner, the epoch and the
    /// reservation.
    pub(super) async fn commit(&mut self) -> SourceEvent {
        let begun = Instant::now();
        let txn = match self.transfer().commit(&self.record, unix_ms()) {
            Ok(txn) => txn,
            Err(error) => return SourceEvent::CommitRefused(error),
        };
        let before = txn.compare.len();
        let txn = self.claims.add_to(txn);
        if let Err(reason) = passed("move.commit").await {
            return SourceEvent::CommitRefused(reason);
        }
        let outcome = self.moves.context.store.txn(txn).await;
        self.report.commit_micros = micros(begun);
        if passed("move.committed").await.is_err() {
            return SourceEvent::CommitUnknown;
        }
        match outcome {
            Ok(TxnOutcome::Committed { .. }) => SourceEvent::CommitWon,
            Ok(TxnOutcome::Refused { failed, .. })
                if let Some(rule) = self.claims.raced(failed, before) =>
            {
                SourceEvent::CommitRefused(format!("{RACED} {rule:?}"))
            }
            Ok(TxnOutcome::Refused { failed, .. }) => SourceEvent::CommitRefused(
                match failed {
                    0 | 1 => "the machine was changed by others meanwhile",
                    2 => "the target gave its reservation up",
                    3 => "this node's lease ended",
                    _ => "the target's lease ended",
                }
                .to_owned(),
            ),
            Err(StoreError::Unknown { .. }) => SourceEvent::CommitUnknown,
            Err(error) => SourceEvent::CommitRefused(error.to_string()),
        }
    }

    /// A write of the source's own that makes a pending commit impossible.
    pub(super) async fn settle(&mut self) -> SourceEvent {
        if let Err(reason) = passed("move.settle").await {
            return self.later(&reason).await;
        }
        let event = match self.found().await {
            Ok(found) => self.own_write(self.transfer().settle(found.as_ref())).await,
            Err(error) => self.later(&error).await,
        };
        match passed("move.settled").await {
            Ok(()) => event,
            Err(reason) => self.later(&reason).await,
        }
    }

    /// Takes the machine back from a target that does not run it.
    pub(super) async fn take_back(&mut self) -> SourceEvent {
        if let Err(reason) = passed("move.take-back").await {
            return self.later(&reason).await;
        }
        let event = match self.found().await {
            Ok(found) => {
                let target = Target::Without;
                let next = self.transfer().take_back(found.as_ref(), target, unix_ms());
                self.own_write(next).await
            }
            Err(error) => self.later(&error).await,
        };
        match passed("move.taken-back").await {
            Ok(()) => event,
            Err(reason) => self.later(&reason).await,
        }
    }

    /// What became of a machine whose target does not answer, if it needs a lease and the target's
    /// node has none: it cannot run there, and is taken back. `None` if that is not so, or not
    /// known.
    /// `in_doubt` becomes the revision of the record that such a write compared, if its answer was
    /// lost.
    pub(super) async fn take_back_from_failed(
        &self,
        in_doubt: &mut Option<Revision>,
    ) -> Option<SourceEvent> {
        self.record.spec.ha.as_ref()?;
        let store = &*self.moves.context.store;
        let alive = records::alive(store).await.ok()?;
        if alive.contains(&self.target) {
            return None;
        }
        let found = self.found().await.ok()?;
        let transfer = self.transfer();
        let next = transfer.take_back(found.as_ref(), Target::Fenced, unix_ms());
        match next.ok()? {
            Settlement::Write { txn, .. } => match store.txn(txn).await {
                // The next step finds this write.
                Ok(TxnOutcome::Committed { .. }) => Some(SourceEvent::TargetNotRunning),
                // The target has a lease again, or the record has changed: it is looked at again.
                Ok(TxnOutcome::Refused { .. }) => None,
                Err(error) => {
                    if !error.certainly_not_executed() {
                        *in_doubt = found.map(|found| found.revision);
                    }
                    None
                }
            },
            Settlement::Superseded { .. }
                if found.is_some_and(|found| transfer.has_won(&found.record)) =>
            {
                Some(SourceEvent::TargetResumed)
            }
            Settlement::Kept(_) | Settlement::Won | Settlement::Superseded { .. } => {
                Some(SourceEvent::TargetNotRunning)
            }
        }
    }

    /// What became of a machine that resumed at its target, where a write that takes it back may
    /// still be applied. Only a later change of the record that it compared excludes that; until
    /// then it is not known (`None`), and the copy here is kept.
    pub(super) async fn settled_after(&self, in_doubt: Revision) -> Option<SourceEvent> {
        let found = self.found().await.ok()?;
        match found {
            Some(found) if found.revision == in_doubt => None,
            Some(found) if self.transfer().has_won(&found.record) => {
                Some(SourceEvent::TargetResumed)
            }
            // It was taken back, or is another node's: the next step sees which.
            Some(_) | None => Some(SourceEvent::TargetNotRunning),
        }
    }

    /// The machine's current record; `None` if it has none any more.
    pub(super) async fn found(&self) -> Result<Option<VersionedRecord>, String> {
        match records::get(&*self.moves.context.store, &self.record.name).await {
            Ok(found) => Ok(Some(found)),
            Err(RecordError::NoMachine(_)) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Makes the write that a settlement requires. A refusal or a lost answer settles nothing: the
    /// record is read again.
    pub(super) async fn own_write(&self, next: Result<Settlement, String>) -> SourceEvent {
        match next {
            Ok(Settlement::Write { txn, record }) => {
                match self.moves.context.store.txn(txn).await {
                    Ok(TxnOutcome::Committed { .. }) => SourceEvent::OwnWriteWon {
                        epoch: record.epoch,
                    },
                    Ok(TxnOutcome::Refused { .. }) => SourceEvent::OwnWriteUnknown,
                    Err(error) => self.later(&error.to_string()).await,
                }
            }
            Ok(Settlement::Kept(epoch)) => SourceEvent::OwnWriteWon { epoch },
            Ok(Settlement::Won) => SourceEvent::CommitWon,
            Ok(Settlement::Superseded {
                reason,
                output_stays,
            }) => SourceEvent::Superseded {
                reason,
                output_stays,
            },
            Err(error) => self.later(&error).await,
        }
    }

    pub(super) async fn later(&self, error: &str) -> SourceEvent {
        tracing::warn!(machine = %self.record.name, error, "the owner is not settled yet");
        tokio::time::sleep(RETRY_AFTER).await;
        SourceEvent::OwnWriteUnknown
    }
}
