//! The state machine of a voter: applies committed entries to the model and publishes them to
//! readers and watches. Deterministic: no clock, no randomness; a lease lives until an entry ends
//! it. It is in memory; after a restart it begins with the newest snapshot and replays the log.

#![expect(
    clippy::result_large_err,
    reason = "openraft's traits return its errors"
)]

use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use openraft::storage::RaftStateMachine;
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder, Snapshot};

use super::deadlines::Deadlines;
use super::snapshot::{self, SnapshotFile};
use super::types::{
    Applied, Command, CommandOutcome, LogId, Membership, Proposal, SnapshotMeta, StorageError,
    StorageIoError, Types, disk_error,
};
use crate::interface::{Changes, KeyValue, LeaseId, TxnOutcome};
use crate::model::{Model, Verdict};
use crate::view::View;
use crate::wire::{Failure, Outcome};

pub(super) struct StateMachine {
    model: Model,
    applied: Option<LogId>,
    membership: Membership,
    view: Arc<View>,
    deadlines: Arc<Deadlines>,
    file: SnapshotFile,
    bytes: Arc<AtomicUsize>,
}

/// What a [`StateMachine`] shares with the rest of the store.
pub(super) struct Shared {
    pub(super) view: Arc<View>,
    pub(super) deadlines: Arc<Deadlines>,
    pub(super) file: SnapshotFile,
    /// Bytes of proposals applied since the newest snapshot.
    pub(super) bytes: Arc<AtomicUsize>,
}

impl StateMachine {
    pub(super) fn new(model: Model, meta: Option<SnapshotMeta>, shared: Shared) -> Self {
        let meta = meta.unwrap_or_default();
        Self {
            model,
            applied: meta.last_log_id,
            membership: meta.last_membership,
            view: shared.view,
            deadlines: shared.deadlines,
            file: shared.file,
            bytes: shared.bytes,
        }
    }

    /// All entries.
    pub(super) fn entries(&self) -> impl Iterator<Item = &KeyValue> {
        self.model.entries.values().map(AsRef::as_ref)
    }

    fn run(
        &mut self,
        proposal: &Proposal,
        changes: &mut Vec<Changes>,
    ) -> Result<Applied, StorageError> {
        self.bytes.fetch_add(proposal.bytes(), Ordering::Relaxed);
        // What this version cannot read it must not skip: the copies would differ.
        let commands = proposal.commands().map_err(disk_error)?;
        let outcomes = commands.into_iter().map(|command| match command {
            Command::Txn(txn) => {
                let verdict = self.model.apply(txn.into());
                let revision = self.model.revision;
                let outcome = verdict.map(|verdict| match verdict {
                    Verdict::Applied(changed) => {
                        changes.extend(changed);
                        TxnOutcome::Committed { revision }
                    }
                    Verdict::Refused { failed, current } => TxnOutcome::Refused {
                        failed,
                        revision,
                        current,
                    },
                });
                CommandOutcome::Txn(outcome.map(Outcome::from).map_err(Failure::from))
            }
            Command::Grant(ttl_ms) => {
                let lease = self.model.grant(ttl_ms);
                self.deadlines.add(lease, ttl_ms);
                CommandOutcome::Granted(lease.0)
            }
            Command::Revoke(lease) | Command::Expire(lease) => {
                self.deadlines.remove(LeaseId(lease));
                changes.extend(self.model.end(LeaseId(lease)).flatten());
                CommandOutcome::Ended
            }
        });
        Ok(Applied(outcomes.collect()))
    }
}

impl Drop for StateMachine {
    fn drop(&mut self) {
        self.view.end_watches();
    }
}

impl RaftStateMachine<Types> for StateMachine {
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, Membership), StorageError> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Applied>, StorageError>
    where
        I: IntoIterator<Item = openraft::Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut changes = Vec::new();
        let mut all = Vec::new();
        for entry in entries {
            self.applied = Some(entry.log_id);
            all.push(match entry.payload {
                EntryPayload::Blank => Applied::default(),
                EntryPayload::Normal(proposal) => self.run(&proposal, &mut changes)?,
                EntryPayload::Membership(membership) => {
                    self.membership = Membership::new(Some(entry.log_id), membership);
                    Applied::default()
                }
            });
        }
        if !changes.is_empty() {
            self.view.publish(changes);
        }
        Ok(all)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            model: self.model.clone(),
            applied: self.applied,
            membership: self.membership.clone(),
            file: self.file.clone(),
            bytes: self.bytes.clone(),
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError> {
        let saved = meta.clone();
        let bytes_max = self.model.bytes_max;
        let install = move |file: &SnapshotFile| {
            let state = snapshot.into_inner();
            let model = snapshot::decode(&state, bytes_max).map_err(std::io::Error::other)?;
            file.save(&saved, &state)?;
            Ok(model)
        };
        let model = self.file.run(true, install).await.map_err(failed)?;
        self.model = model;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.bytes.store(0, Ordering::Relaxed);
        let leases = self.model.leases.iter();
        self.deadlines
            .replace(leases.map(|(id, held)| (*id, held.ttl_ms)));
        self.view
            .replace(self.model.revision, self.model.entries.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, StorageError> {
        let load = |file: &SnapshotFile| file.load().map_err(std::io::Error::other);
        let found = self.file.run(true, load).await.map_err(failed)?;
        Ok(found.map(|saved| Snapshot {
            meta: saved.meta,
            snapshot: Box::new(saved.state),
        }))
    }
}

/// Makes a snapshot of one instant, beside the state machine, which goes on.
pub(super) struct Builder {
    model: Model,
    applied: Option<LogId>,
    membership: Membership,
    file: SnapshotFile,
    bytes: Arc<AtomicUsize>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, StorageError> {
        let index = self.applied.map_or(0, |applied| applied.index);
        let meta = SnapshotMeta {
            last_log_id: self.applied,
            last_membership: self.membership.clone(),
            snapshot_id: format!("{index}-{}", self.model.revision),
        };
        self.bytes.store(0, Ordering::Relaxed);
        let (model, saved) = (std::mem::take(&mut self.model), meta.clone());
        let build = move |file: &SnapshotFile| {
            let state = snapshot::encode(&model).map_err(std::io::Error::other)?;
            file.save(&saved, &state)?;
            Ok(state)
        };
        let state = self.file.run(false, build).await.map_err(failed)?;
        Ok(Snapshot {
            meta,
            snapshot: Box::new(Cursor::new(state)),
        })
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the argument of `Result::map_err`"
)]
fn failed(error: std::io::Error) -> StorageError {
    StorageIoError::write_snapshot(None, &error).into()
}

#[cfg(test)]
mod tests {
    use openraft::{CommittedLeaderId, Entry};

    use super::*;
    use crate::interface::Txn;

    fn machine(folder: &std::path::Path) -> (StateMachine, Arc<View>) {
        let model = Model {
            bytes_max: 1 << 20,
            ..Model::default()
        };
        let view = Arc::new(View::new(0, model.entries.clone(), 10, 1 << 20));
        let shared = Shared {
            view: view.clone(),
            deadlines: Arc::default(),
            file: SnapshotFile::new(folder.join("snapshot")),
            bytes: Arc::default(),
        };
        (StateMachine::new(model, None, shared), view)
    }

    /// A voter that was far behind has all of a snapshot at once: its readers see it, its leases count,
    /// and what it passes on says how far it reaches.
    #[tokio::test]
    async fn a_snapshot_that_is_installed_counts_at_once() {
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let (mut ahead, _) = machine(folders[0].path());
        let put = Txn::new().put("a/1".to_owned(), b"x".to_vec());
        let commands = [Command::Txn(put.into()), Command::Grant(1_500)];
        let entry = Entry {
            log_id: LogId::new(CommittedLeaderId::new(3, 1), 7),
            payload: EntryPayload::Normal(Proposal::new(&commands).unwrap()),
        };
        ahead.apply([entry]).await.unwrap();
        let sent = ahead.get_snapshot_builder().await.build_snapshot().await;
        let Snapshot { meta, snapshot } = sent.unwrap();

        let (mut behind, view) = machine(folders[1].path());
        behind.install_snapshot(&meta, snapshot).await.unwrap();
        assert_eq!(
            behind.applied_state().await.unwrap(),
            ahead.applied_state().await.unwrap()
        );
        assert_eq!(view.revision().unwrap(), ahead.model.revision);
        assert_eq!(view.get("a/1").unwrap().unwrap().value, b"x");
        assert_eq!(behind.model.leases.len(), 1);
        let kept = behind.get_current_snapshot().await.unwrap().unwrap();
        assert_eq!(kept.meta, meta);
        let passed_on = behind.get_snapshot_builder().await.build_snapshot().await;
        assert_eq!(passed_on.unwrap().meta.last_log_id, meta.last_log_id);
    }
}
