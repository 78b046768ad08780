//! Ownership of machines: the transactions that change the owner, and what a record means
//! to a node that does not know the outcome of such a transaction. All comparisons of the
//! commit rule are in this file.
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
//! - The epoch also identifies the machine's life: its counter begins at the store's
//!   revision that created the record, and each increment takes a transaction, so it
//!   never exceeds the store's revision, and a later machine of the same name begins
//!   above it ([`EpochBase`]). An equal epoch therefore means the same creation.
//! - A store that begins anew from a copy may have forgotten epochs that were given. So each
//!   record names the incarnation of its store, and the next epoch is the first one of that
//!   ([`enter_incarnation`]). "E+1" above is the epoch that follows E in this sense; a
//!   machine that runs keeps its epoch until then.
//! - Any write of the record invalidates a commit in flight, because the commit compares
//!   the record's revision. A read decides nothing unless it finds such a write.
//! - The commit was applied only if the record says so: the target owns the machine under
//!   E+1, and it has not ended. In any other state (ended, removed, another owner,
//!   another epoch) the move no longer concerns the machine: the copies at source and
//!   target are dropped.
//!
//! This module performs no I/O and does not wait: the callers are the agents
//! (`keel-node`) and the simulation (`tests/move_simulation.rs`).

use crate::restart_policy::{self, Restart};
use crate::spec::{Record, Status};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_store::encoding;
use keel_store::keys::Key;
use keel_store::{Compare, KeyValue, Revision, Txn};
use serde::{Deserialize, Serialize};

/// Name of the value of a schedule entry in errors.
const ANNOUNCED: &str = "the epoch in an entry of a schedule";

/// A machine's record with the revision of its last change.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionedRecord {
    /// The record; the epoch of a new record is derived from its revision.
    pub record: Record,
    /// The store's revision of the last write.
    pub revision: Revision,
}

impl VersionedRecord {
    /// Decodes an entry of the store.
    ///
    /// # Errors
    /// A message for a damaged record or one of another version.
    pub fn read(entry: &KeyValue) -> Result<Self, String> {
        let mut record = Record::decode(&entry.value)?;
        record.epoch = epoch_of(record.epoch, entry);
        Ok(VersionedRecord {
            record,
            revision: entry.modified,
        })
    }
}

/// The epoch of a record: its creator cannot know the revision of the creation, so the
/// stored counter lacks it until the first change.
fn epoch_of(written: Epoch, entry: &KeyValue) -> Epoch {
    match entry.created == entry.modified {
        true => created_at(written, entry.created),
        false => written,
    }
}

/// The first epoch of a machine whose record was created at `revision` with the epoch
/// `written`.
pub fn created_at(written: Epoch, revision: Revision) -> Epoch {
    Epoch {
        counter: written.counter.saturating_add(revision),
        ..written
    }
}

/// Lets the machines of a store that begins anew go on in the cluster's new incarnation: their next
/// epochs are above all that were given after its content was copied. `revision` is the store's
/// first one, above all that the content names: a transaction that compares the record of the former
/// store is refused. A damaged record stays as it is.
pub fn enter_incarnation<'a>(
    entries: impl IntoIterator<Item = &'a mut KeyValue>,
    incarnation: u32,
    revision: Revision,
) {
    for entry in entries {
        if !matches!(entry.key.parse(), Ok(Key::Machine(_))) {
            continue;
        }
        let entered = VersionedRecord::read(entry).and_then(|found| {
            let record = Record {
                incarnation,
                ..found.record
            };
            record.encode()
        });
        match entered {
            Ok(value) => {
                entry.value = value;
                entry.modified = revision;
            }
            Err(error) => tracing::error!(key = entry.key, error, "its epochs may be given twice"),
        }
    }
}

/// The epoch of new records, stored at `epoch-base`: the cluster's incarnation, and an
/// offset to the store's revision. Both are raised when a machine is restored from a
/// checkpoint of another cluster, whose epochs were ahead of this store's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochBase(Epoch);

impl EpochBase {
    /// The epoch that the record of a new machine is written with.
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

    /// The base with which a machine that ran under `ran` begins above that epoch, in a
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

/// Source and target of a move, and the record's state at its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    pub machine: MachineName,
    /// The owner at the start.
    pub source: NodeName,
    /// The future owner.
    pub target: NodeName,
    /// The epoch at the start.
    pub epoch: Epoch,
    /// The epoch of the machine at its target ([`Record::next_epoch`] at the start).
    pub committed: Epoch,
    /// The record's revision at the start.
    pub revision: Revision,
    /// Whether the target has everything at the commit, and may resume the machine as soon as its node
    /// sees the commit ([`announced`]).
    pub is_complete: bool,
}

/// The next step of a source whose commit has an unknown outcome.
#[derive(Debug, Clone, PartialEq)]
pub enum Settlement {
    /// Perform this write; its result decides.
    Write {
        txn: Txn,
        /// The record that it puts.
        record: Box<Record>,
    },
    /// An earlier attempt of that write was applied: the source owns the machine, under this epoch.
    Kept(Epoch),
    /// The commit was applied.
    Won,
    /// Neither: the machine ended, was removed, or has another owner.
    Superseded {
        /// The record's state, for users.
        reason: String,
        /// Whether it ended while the source owned it: its output stays here.
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

    /// The transaction that makes the target the owner of `record`, without conditions of
    /// placement rules. Its conditions, in this order: the record is unchanged since the
    /// start of the move; the source is scheduled to run the machine; the target has
    /// reserved room for it; source and target are alive.
    ///
    /// # Errors
    /// If the record cannot be encoded.
    pub fn commit(&self, record: &Record, now_unix_ms: u64) -> Result<Txn, String> {
        let exists = |key: Key| Compare::Exists {
            key: key.to_string(),
        };
        let mut record = record.clone();
        record.owner = self.target.clone();
        record.epoch = self.committed;
        let from = self.source.clone();
        record.enter(Status::Arriving { from }, now_unix_ms);
        let reservation = Key::Reservation(self.target.clone(), self.machine.clone());
        let entry = match self.is_complete {
            true => encoding::encode(ANNOUNCED, &self.committed),
            false => Ok(Vec::new()),
        };
        let entry = entry.map_err(|error| error.to_string())?;
        Ok(Txn::new()
            .when_modified_at(self.record_key(), self.revision)
            .when(exists(self.entry(&self.source)))
            .when(exists(reservation.clone()))
            .when(exists(Key::Alive(self.source.clone())))
            .when(exists(Key::Alive(self.target.clone())))
            .delete(self.entry(&self.source))
            .put(self.entry(&self.target), entry)
            .put(self.record_key(), record.encode()?)
            .delete(reservation))
    }

    /// The next step of a source that does not know whether its commit was applied, given
    /// the present record (`None` if it was removed). The write raises the epoch of the
    /// *present* record, so it does not undo concurrent changes.
    ///
    /// # Errors
    /// If the record cannot be encoded.
    pub fn settle(&self, found: Option<&VersionedRecord>) -> Result<Settlement, String> {
        let Some(VersionedRecord { record, revision }) = found else {
            return Ok(self.superseded(None));
        };
        let is_ours = record.owner == self.source && !record.status.ended();
        if is_ours && record.epoch == self.epoch {
            let mut record = record.clone();
            record.epoch = record.next_epoch();
            let txn = Txn::new()
                .when_modified_at(self.record_key(), *revision)
                .put(self.record_key(), record.encode()?);
            let record = Box::new(record);
            return Ok(Settlement::Write { txn, record });
        }
        if is_ours && record.epoch.follows(self.epoch) && record.status == Status::Running {
            return Ok(Settlement::Kept(record.epoch));
        }
        if self.has_won(record) {
            return Ok(Settlement::Won);
        }
        Ok(self.superseded(Some(record)))
    }

    /// Whether a record is the result of this move's commit, or of the target's changes
    /// after it, and the machine has not ended.
    pub fn has_won(&self, record: &Record) -> bool {
        record.owner == self.target && record.epoch == self.committed && !record.status.ended()
    }

    /// The next step of a source whose target reports that the machine does not run there
    /// and never will, or cannot run it for lack of a lease. Only a machine that has not run there is taken back. Never
    /// [`Settlement::Won`].
    ///
    /// # Errors
    /// If the record cannot be encoded.
    pub fn take_back(
        &self,
        found: Option<&VersionedRecord>,
        target: Target,
        now_unix_ms: u64,
    ) -> Result<Settlement, String> {
        let Some(VersionedRecord { record, revision }) = found else {
            return Ok(self.superseded(None));
        };
        let is_back = record.owner == self.source && record.epoch.follows(self.committed);
        if is_back && record.status == Status::Running {
            return Ok(Settlement::Kept(record.epoch));
        }
        let from = self.source.clone();
        if !(self.has_won(record) && record.status == Status::Arriving { from }) {
            return Ok(self.superseded(Some(record)));
        }
        let mut record = record.clone();
        record.owner = self.source.clone();
        record.epoch = record.next_epoch();
        record.enter(Status::Running, now_unix_ms);
        let mut txn = Txn::new().when_modified_at(self.record_key(), *revision);
        if target == Target::Fenced {
            txn = txn.when_absent(Key::Alive(self.target.clone()));
        }
        let txn = txn
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

/// Why a machine whose commit was applied does not run at the target of its move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The target's agent says that its copy is gone.
    Without,
    /// The target's node has no lease, and the machine needs one: compared when it is taken back.
    Fenced,
}

/// What happens to a copy that has arrived at `node` and waits for the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeDecision {
    /// The commit of its move was applied: it resumes under this epoch.
    Resume(Epoch),
    /// The commit was not applied, and the present record excludes that it will be.
    Drop,
    /// The record is unchanged, and the commit may still be applied.
    Undecided,
}

/// Decides about a copy that was offered to `node` under the epoch `offered`, given the
/// present record.
pub fn may_resume(node: &NodeName, offered: Epoch, found: Option<&Record>) -> ResumeDecision {
    let Some(record) = found else {
        return ResumeDecision::Drop;
    };
    let arrives = matches!(record.status, Status::Arriving { .. });
    if record.owner == *node && record.epoch.follows(offered) && arrives {
        return ResumeDecision::Resume(record.epoch);
    }
    match record.epoch == offered && !record.status.ended() {
        true => ResumeDecision::Undecided,
        false => ResumeDecision::Drop,
    }
}

/// The epoch under which the commit of a move gave a machine to a node, from the entry of that node's
/// schedule, for a copy that arrived there under the epoch `offered`. `None` if the entry is of
/// something else. It proves what the source's word proves, that the commit was applied, and comes
/// sooner where the source is farther away from the store than its target.
pub fn announced(offered: Epoch, entry: &[u8]) -> Option<Epoch> {
    if entry.is_empty() {
        return None;
    }
    let epoch: Epoch = encoding::decode(ANNOUNCED, entry).ok()?;
    epoch.follows(offered).then_some(epoch)
}

/// The status of a machine that runs on `node` under `epoch`; `None` if the record
/// belongs to another machine or life, or has that status. `filling`: part of its memory
/// is still at the source of its move.
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

/// Effect of the end of a machine's life on its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndEffect {
    /// The record was changed and must be written.
    Changed,
    /// An earlier attempt wrote it: the machine will be restarted.
    RestartsAlready,
    /// The record belongs to another life, or has this end.
    None,
}

/// Records that the life of the machine on `node` under `epoch` has ended with `status`:
/// it has ended or, according to its restart policy, will be restarted under the next
/// epoch. Idempotent.
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
    if restarting && record.epoch.follows(epoch) {
        return EndEffect::RestartsAlready;
    }
    if record.epoch != epoch {
        return EndEffect::None;
    }
    let lived_ms = match record.status {
        Status::Scheduled | Status::Restarting { .. } => 0,
        // Moves do not start a new life.
        _ => now_unix_ms.saturating_sub(record.started_unix_ms),
    };
    // A machine whose memory had not all arrived was put at risk by its user, not by its
    // program; it is restored from the checkpoint before its move.
    let policy = match (&record.status, status, record.spec.restart) {
        (Status::Filling { .. }, Status::Failed { .. }, Restart::No) => Restart::OnFailure,
        // Its process was lost, and not by its program.
        (_, Status::Failed { .. }, Restart::No) if record.spec.ha.is_some() => Restart::OnFailure,
        (_, _, policy) => policy,
    };
    let plan = match record.stop_wanted {
        true => None,
        false => restart_policy::decide(policy, status, record.restarts, lived_ms),
    };
    let Some(plan) = plan else {
        // A machine that was killed after a stop command was ended by that command.
        let killed = record.stop_wanted && matches!(status, Status::Failed { .. });
        let status = match killed {
            true => Status::Stopped,
            false => status.clone(),
        };
        record.enter(status, now_unix_ms);
        return EndEffect::Changed;
    };
    record.epoch = record.next_epoch();
    record.restarts = plan.restarts;
    let at_unix_ms = now_unix_ms.saturating_add(plan.delay.as_millis() as u64);
    // A failed attempt leaves it as it was: what this node has of it is of an earlier time, and a
    // life that was to begin anew does.
    let (elsewhere, begins_anew) = match record.status {
        Status::Restarting {
            elsewhere,
            from_checkpoint,
            ..
        } => (elsewhere, !from_checkpoint),
        _ => (false, false),
    };
    let restarting = Status::Restarting {
        reason: status.end().unwrap_or_default(),
        at_unix_ms,
        from_checkpoint: plan.from_checkpoint && !begins_anew,
        elsewhere,
    };
    record.enter(restarting, now_unix_ms);
    EndEffect::Changed
}

/// A machine that has ended, and is started again.
#[derive(Debug, Clone, PartialEq)]
pub struct StartedAgain {
    /// Its new record.
    pub record: Record,
    /// Writes the record, if nothing that it depends on has changed. The first compare is the
    /// machine's record, the second the lease of its node.
    pub txn: Txn,
}

/// Starts a machine that has ended: it begins anew, under a newer epoch, on the node where it ended,
/// with what is there of it. `None` if it has not ended. The checkpoints of its earlier lives are of
/// no use to this one, if its kind has any (`has_checkpoints`).
///
/// # Errors
/// If the record cannot be encoded.
pub fn start_again(
    found: &VersionedRecord,
    has_checkpoints: bool,
    now_unix_ms: u64,
) -> Result<Option<StartedAgain>, String> {
    let mut record = found.record.clone();
    if !record.status.ended() {
        return Ok(None);
    }
    record.epoch = record.next_epoch();
    record.restarts = 0;
    record.stop_wanted = false;
    let restarting = Status::Restarting {
        reason: "it was started again".into(),
        // At once, whatever the clock of its node says.
        at_unix_ms: 0,
        from_checkpoint: false,
        elsewhere: record.left_elsewhere,
    };
    record.enter(restarting, now_unix_ms);
    let (machine, node) = (record.name.clone(), record.owner.clone());
    let key = Key::Machine(machine.clone());
    let mut txn = Txn::new()
        .when_modified_at(key.clone(), found.revision)
        .when(Compare::Exists {
            key: Key::Alive(node.clone()).to_string(),
        })
        .put(key, record.encode()?)
        .put(Key::Schedule(node, machine.clone()), Vec::new());
    if has_checkpoints {
        let newest = Key::Checkpoint(machine.clone());
        txn = txn.delete(newest).delete(Key::InSync(machine));
    }
    Ok(Some(StartedAgain { record, txn }))
}

/// A machine that is given to another node because its own failed.
#[derive(Debug, Clone, PartialEq)]
pub struct Failover {
    /// The node that failed.
    pub failed: NodeName,
    /// Its new record.
    pub record: Record,
    /// Writes the record, if nothing that it depends on has changed. The first compare is the
    /// machine's record, the second the lease of the node that failed.
    pub txn: Txn,
}

/// Gives the machine of a node without a lease to another node, which restarts it from its newest
/// checkpoint under a newer epoch. `None` if it stays where it is: it has ended, it does not ask
/// for it, or the source of its move still holds a copy (`holds_copy`) and takes it back.
///
/// # Errors
/// If the record cannot be encoded.
pub fn fail_over(
    found: &VersionedRecord,
    target: &NodeName,
    holds_copy: impl FnOnce(&NodeName) -> bool,
    now_unix_ms: u64,
) -> Result<Option<Failover>, String> {
    let mut record = found.record.clone();
    if record.status.ended() || record.spec.ha.is_none() || record.owner == *target {
        return Ok(None);
    }
    if let Status::Arriving { from } = &record.status
        && holds_copy(from)
    {
        return Ok(None);
    }
    let failed = std::mem::replace(&mut record.owner, target.clone());
    // Not the next one: with that and the same target it would look like the commit of a move, whose
    // source would let the copy there resume.
    record.epoch = found.record.next_epoch().next();
    record.failovers = record.failovers.saturating_add(1);
    record.left_elsewhere = true;
    // One that ended by itself begins anew.
    let from_checkpoint = !matches!(
        record.status,
        Status::Restarting {
            from_checkpoint: false,
            ..
        }
    );
    let status = match record.stop_wanted {
        // It was to end anyway.
        true => Status::Stopped,
        false => Status::Restarting {
            reason: format!("its node {failed} failed"),
            at_unix_ms: now_unix_ms,
            from_checkpoint,
            elsewhere: true,
        },
    };
    record.enter(status, now_unix_ms);
    let machine = record.name.clone();
    let key = Key::Machine(machine.clone());
    let mut txn = Txn::new()
        .when_modified_at(key.clone(), found.revision)
        .when_absent(Key::Alive(failed.clone()))
        .when(Compare::Exists {
            key: Key::Alive(target.clone()).to_string(),
        })
        .put(key, record.encode()?)
        .delete(Key::Schedule(failed.clone(), machine.clone()))
        // It may have been arriving there.
        .delete(Key::Reservation(failed.clone(), machine.clone()));
    if !record.status.ended() {
        txn = txn.put(Key::Schedule(target.clone(), machine), Vec::new());
    }
    Ok(Some(Failover {
        failed,
        record,
        txn,
    }))
}

/// What is given up with a node.
#[derive(Debug, Clone, PartialEq)]
pub enum GivenUp {
    /// It is not the node's, or has ended. The transaction removes its entry of the schedule.
    NotIts(Txn),
    /// It fails.
    Failed {
        /// Its new record.
        record: Box<Record>,
        /// Writes the record, if nothing that it depends on has changed.
        txn: Txn,
    },
    /// This other node holds a newer copy of it, and takes it back once it is there.
    HeldBy(NodeName),
}

/// Gives up a machine in the schedule of a node that somebody declared dead: it fails under a newer
/// epoch, so that whatever receives its output refuses what the node may still send. `is_member`
/// says whether a node is one of the cluster's.
///
/// # Errors
/// If the record cannot be encoded.
pub fn give_up(
    found: &VersionedRecord,
    node: &NodeName,
    is_member: impl FnOnce(&NodeName) -> bool,
    reason: String,
    now_unix_ms: u64,
) -> Result<GivenUp, String> {
    let mut record = found.record.clone();
    let key = Key::Machine(record.name.clone());
    let txn = Txn::new()
        .when_modified_at(key.clone(), found.revision)
        .when_absent(Key::Alive(node.clone()))
        .delete(Key::Schedule(node.clone(), record.name.clone()));
    if record.owner != *node || record.status.ended() {
        return Ok(GivenUp::NotIts(txn));
    }
    if let Status::Arriving { from } = &record.status
        && from != node
        && is_member(from)
    {
        return Ok(GivenUp::HeldBy(from.clone()));
    }
    // (Not the next one, as in `fail_over`.)
    record.epoch = record.next_epoch().next();
    record.enter(Status::Failed { reason }, now_unix_ms);
    let txn = txn.put(key, record.encode()?);
    Ok(GivenUp::Failed {
        record: Box::new(record),
        txn,
    })
}
