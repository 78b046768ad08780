//! Who owns a machine: the transactions that change its owner, and what its record
//! says to a node that does not know how such a transaction ended. All comparisons
//! of the commit rule are on this page.
//!
//! ```text
//!   (source, E, running) ──commit──▶ (target, E+1, arriving) ──go──▶ (target, E+1, running)
//!          │                                   │
//!          │ settle (the commit's              │ take back (the target does
//!          │ answer was lost)                  │ not run it and never will)
//!          ▼                                   ▼
//!   (source, E+1, running)             (source, E+2, running)
//! ```
//!
//! - The epoch names the life of a machine, too: its counter begins at the store's
//!   revision that created the record and each raise takes a transaction, so it never
//!   exceeds the store's revision, and a later machine of the same name begins above
//!   it ([`EpochBase`]). An equal epoch therefore means the same creation.
//! - A commit that may still be on its way is made impossible by any write of the
//!   record, since it compares the record's revision. A read decides nothing unless it
//!   finds such a write.
//! - The commit has won only where the record says so: the target owns it under E+1
//!   and it has not ended. Everything else that a source in doubt may find (ended,
//!   gone, another owner, another epoch) is not its business any more: its copy and
//!   the target's are dropped.
//!
//! Nothing here reads, writes or waits: the callers are the agents (`keel-node`) and
//! the simulation (`tests/move_simulation.rs`).

use crate::restart::{self, Restart};
use crate::spec::{Record, Status};
use keel_cluster::keys::Key;
use keel_cluster::store::{Compare, KeyValue, Revision, Txn};
use keel_cluster::{Epoch, MachineName, NodeName};
use serde::{Deserialize, Serialize};

/// A machine's record and the revision of its last change.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionedRecord {
    /// The record; the epoch of one that was just created counts from its revision.
    pub record: Record,
    /// The store's revision that put it.
    pub revision: Revision,
}

impl VersionedRecord {
    /// Reads an entry of the store.
    ///
    /// # Errors
    /// A sentence for a damaged record or one of another version.
    pub fn read(entry: &KeyValue) -> Result<Self, String> {
        let mut record = Record::decode(&entry.value)?;
        record.epoch = epoch_of(record.epoch, entry);
        Ok(VersionedRecord {
            record,
            revision: entry.modified,
        })
    }
}

/// The epoch of a record: whoever creates one cannot know the revision of its
/// creation, so the counter that it writes lacks that until the first change.
fn epoch_of(written: Epoch, entry: &KeyValue) -> Epoch {
    match entry.created == entry.modified {
        true => created_at(written, entry.created),
        false => written,
    }
}

/// The first epoch of a machine whose record was created at `revision` with the
/// epoch `written`.
pub fn created_at(written: Epoch, revision: Revision) -> Epoch {
    Epoch {
        counter: written.counter.saturating_add(revision),
        ..written
    }
}

/// The epoch that records are created with, at `epoch-base`: the cluster's incarnation,
/// and what is added to the store's revision. Both are raised where a machine is
/// restored from a checkpoint of another cluster, whose epochs were ahead of this
/// store's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochBase(Epoch);

impl EpochBase {
    /// As the record of a new machine is written.
    pub fn epoch(self) -> Epoch {
        self.0
    }

    /// The base in a cluster of this incarnation.
    #[must_use]
    pub fn at_least(self, incarnation: u32) -> Self {
        match incarnation > self.0.incarnation {
            true => EpochBase(Epoch {
                incarnation,
                counter: 0,
            }),
            false => self,
        }
    }

    /// The base with which a machine that ran under `ran` begins above that, in a
    /// store that has reached `revision`.
    #[must_use]
    pub fn above(self, ran: Epoch, revision: Revision) -> Self {
        let least = Epoch {
            counter: ran.counter.saturating_sub(revision),
            ..ran
        };
        EpochBase(self.0.max(least))
    }
}

/// Between whom a machine moves, and what its record said when the move began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// The machine.
    pub machine: MachineName,
    /// Who owned it.
    pub source: NodeName,
    /// Who is to own it.
    pub target: NodeName,
    /// Its epoch then.
    pub epoch: Epoch,
    /// The revision of its record then.
    pub revision: Revision,
}

/// What a source in doubt does next.
#[derive(Debug, Clone, PartialEq)]
pub enum Settlement {
    /// Make this write; its answer settles the doubt.
    Write {
        /// The transaction.
        txn: Txn,
        /// The record that it puts.
        record: Box<Record>,
    },
    /// An earlier attempt of that write was applied: the machine is the source's.
    Kept,
    /// The commit was applied.
    Won,
    /// Neither: the machine ended, was removed, or belongs to somebody else by now.
    Superseded {
        /// What the record says, for people.
        reason: String,
        /// Whether it ended as the source's own: its output is kept here.
        output_stays: bool,
    },
}

impl Transfer {
    fn record_key(&self) -> Key {
        Key::Machine(self.machine.clone())
    }

    fn entry(&self, node: &NodeName) -> Key {
        Key::Schedule(node.clone(), self.machine.clone())
    }

    /// The epoch of the machine at its target.
    pub fn committed_epoch(&self) -> Epoch {
        self.epoch.next()
    }

    /// The transaction that makes the target the owner of `record`, without what
    /// placement rules demand. Its conditions, in this order: the record is as it was
    /// when the move began; the source is to run it; the target has room reserved for
    /// it; source and target are alive.
    ///
    /// # Errors
    /// If the record cannot be encoded.
    pub fn commit(&self, record: &Record, now_unix_ms: u64) -> Result<Txn, String> {
        let exists = |key: Key| Compare::Exists {
            key: key.to_string(),
        };
        let mut record = record.clone();
        record.owner = self.target.clone();
        record.epoch = self.committed_epoch();
        let from = self.source.clone();
        record.enter(Status::Arriving { from }, now_unix_ms);
        let reservation = Key::Reservation(self.target.clone(), self.machine.clone());
        Ok(Txn::new()
            .when_modified_at(self.record_key(), self.revision)
            .when(exists(self.entry(&self.source)))
            .when(exists(reservation.clone()))
            .when(exists(Key::Alive(self.source.clone())))
            .when(exists(Key::Alive(self.target.clone())))
            .delete(self.entry(&self.source))
            .put(self.entry(&self.target), Vec::new())
            .put(self.record_key(), record.encode()?)
            .delete(reservation))
    }

    /// What a source that does not know whether its commit was applied does, given
    /// the record that it finds (`None`: there is none). The write raises the epoch of
    /// the record *as found*, so it undoes nothing that others changed meanwhile.
    ///
    /// # Errors
    /// If the record cannot be encoded.
    pub fn settle(&self, found: Option<&VersionedRecord>) -> Result<Settlement, String> {
        let Some(VersionedRecord { record, revision }) = found else {
            return Ok(self.superseded(None));
        };
        let kept = self.epoch.next();
        let is_ours = record.owner == self.source && !record.status.ended();
        if is_ours && record.epoch == self.epoch {
            let mut record = record.clone();
            record.epoch = kept;
            let txn = Txn::new()
                .when_modified_at(self.record_key(), *revision)
                .put(self.record_key(), record.encode()?);
            let record = Box::new(record);
            return Ok(Settlement::Write { txn, record });
        }
        if is_ours && record.epoch == kept && record.status == Status::Running {
            return Ok(Settlement::Kept);
        }
        if self.has_won(record) {
            return Ok(Settlement::Won);
        }
        Ok(self.superseded(Some(record)))
    }

    /// Whether a record is what this move's commit made of it, or what the target did
    /// next, and the machine has not ended.
    pub fn has_won(&self, record: &Record) -> bool {
        record.owner == self.target
            && record.epoch == self.committed_epoch()
            && !record.status.ended()
    }

    /// What a source does whose target says that the machine does not run there and
    /// never will. Only what has not run there is taken back. [`Settlement::Won`] is
    /// not an answer.
    ///
    /// # Errors
    /// If the record cannot be encoded.
    pub fn take_back(
        &self,
        found: Option<&VersionedRecord>,
        now_unix_ms: u64,
    ) -> Result<Settlement, String> {
        let Some(VersionedRecord { record, revision }) = found else {
            return Ok(self.superseded(None));
        };
        let back = self.committed_epoch().next();
        if record.owner == self.source && record.epoch == back && record.status == Status::Running {
            return Ok(Settlement::Kept);
        }
        let from = self.source.clone();
        if !(self.has_won(record) && record.status == Status::Arriving { from }) {
            return Ok(self.superseded(Some(record)));
        }
        let mut record = record.clone();
        record.owner = self.source.clone();
        record.epoch = back;
        record.enter(Status::Running, now_unix_ms);
        let txn = Txn::new()
            .when_modified_at(self.record_key(), *revision)
            .put(self.record_key(), record.encode()?)
            .delete(self.entry(&self.target))
            .put(self.entry(&self.source), Vec::new());
        let record = Box::new(record);
        Ok(Settlement::Write { txn, record })
    }

    fn superseded(&self, record: Option<&Record>) -> Settlement {
        let machine = &self.machine;
        let (reason, output_stays) = match record {
            None => (format!("machine {machine:?} was removed"), false),
            Some(record) => {
                let (owner, epoch) = (&record.owner, record.epoch);
                let status = record.status.word();
                (
                    format!(
                        "machine {machine:?} is {status} on {owner} under epoch {epoch} by now"
                    ),
                    *owner == self.source,
                )
            }
        };
        Settlement::Superseded {
            reason,
            output_stays,
        }
    }
}

/// What becomes of a copy that has arrived at `node` and waits for the word to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrivalVerdict {
    /// The commit of its move has won: it goes on under this epoch.
    Goes(Epoch),
    /// That commit has not won, and what the record says now excludes that it will.
    Never,
    /// The record is as it was before the commit, which may still come.
    Open,
}

/// Judges a copy that was offered to `node` under the epoch `offered`, by the record
/// that the store has.
pub fn arrival(node: &NodeName, offered: Epoch, found: Option<&Record>) -> ArrivalVerdict {
    let Some(record) = found else {
        return ArrivalVerdict::Never;
    };
    let arrives = matches!(record.status, Status::Arriving { .. });
    if record.owner == *node && record.epoch == offered.next() && arrives {
        return ArrivalVerdict::Goes(record.epoch);
    }
    match record.epoch == offered && !record.status.ended() {
        true => ArrivalVerdict::Open,
        false => ArrivalVerdict::Never,
    }
}

/// The status that a machine takes which runs on `node` under `epoch`; `None` where
/// the record is not that machine's, or says so already. With `filling`, a part of its
/// memory is still at the source of its move.
pub fn running(record: &Record, node: &NodeName, epoch: Epoch, filling: bool) -> Option<Status> {
    if record.owner != *node || record.epoch != epoch {
        return None;
    }
    match &record.status {
        Status::Arriving { from } if filling => Some(Status::Filling { from: from.clone() }),
        Status::Scheduled | Status::Restarting { .. } | Status::Arriving { .. } => {
            Some(Status::Running)
        }
        Status::Filling { .. } if !filling => Some(Status::Running),
        _ => None,
    }
}

/// What the end of a machine's life makes of its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndEffect {
    /// The record was changed: it is to be written.
    Changed,
    /// An earlier attempt wrote it: the machine is to be started again.
    RestartsAlready,
    /// The record is not that life's any more, or says its end already.
    None,
}

/// Writes into a record that the life of the machine that ran on `node` under `epoch`
/// has ended with `status`: it has ended, or, where its policy says so, is to be
/// started again under the next epoch. Done twice, it changes nothing the second time.
pub fn end(
    record: &mut Record,
    node: &NodeName,
    epoch: Epoch,
    status: &Status,
    now_unix_ms: u64,
) -> EndEffect {
    if record.owner != *node || record.status.ended() {
        return EndEffect::None;
    }
    let restarting = matches!(record.status, Status::Restarting { .. });
    if restarting && record.epoch == epoch.next() {
        return EndEffect::RestartsAlready;
    }
    if record.epoch != epoch {
        return EndEffect::None;
    }
    let lived_ms = match record.status {
        Status::Scheduled | Status::Restarting { .. } => 0,
        // Moves do not count: it is the same life.
        _ => now_unix_ms.saturating_sub(record.started_unix_ms),
    };
    // A machine whose memory was not all here was put at risk by its user, not by its
    // program; the checkpoint before its move is what it goes on from.
    let policy = match (&record.status, status, record.spec.restart) {
        (Status::Filling { .. }, Status::Failed { .. }, Restart::No) => Restart::OnFailure,
        (_, _, policy) => policy,
    };
    let plan = match record.stop_wanted {
        true => None,
        false => restart::decide(policy, status, record.restarts, lived_ms),
    };
    let Some(plan) = plan else {
        // One that was killed has ended by a command too.
        let killed = record.stop_wanted && matches!(status, Status::Failed { .. });
        let status = match killed {
            true => Status::Stopped,
            false => status.clone(),
        };
        record.enter(status, now_unix_ms);
        return EndEffect::Changed;
    };
    record.epoch = record.epoch.next();
    record.restarts = plan.restarts;
    let at_unix_ms = now_unix_ms.saturating_add(plan.delay.as_millis() as u64);
    let restarting = Status::Restarting {
        reason: status.end().unwrap_or_default(),
        at_unix_ms,
        from_checkpoint: plan.from_checkpoint,
    };
    record.enter(restarting, now_unix_ms);
    EndEffect::Changed
}
