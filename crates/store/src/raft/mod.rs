//! The embedded engine: the Raft consensus algorithm (`openraft`) over redb, with 1, 3 or 5
//! voters.
//!
//! ```text
//!  requests ──▶ leader.rs: one entry per group of commands, barriers ◀── lease_ends.rs
//!                  │ openraft ◀── election.rs: when to ask for votes
//!                  ├──▶ log.rs: memory + redb, fsync ─ flushes.rs ─▶ network.rs ─▶ other voters
//!                  └──▶ state_machine.rs: model ─▶ view ─▶ readers, watches
//!                          └──▶ snapshot.rs: a file, replaced as a whole
//! ```
//!
//! Only the leader answers requests; another voter names it ([`StoreError::NotLeader`]). A change
//! is answered after a quorum has it on disk. Watches of a voter end when it ceases to lead; they
//! go on at the next leader from the revision after the last seen, since every voter keeps the
//! recent changes.
//!
//! If the log cannot be written, the content of the disk is unknown: pending changes are answered
//! [`StoreError::Unknown`], and this voter stops until it is opened again. The others go on.
//!
//! All of it runs on a thread of its own at raised priority: a busy agent loses no leadership.
//! Which nodes are voters is decided elsewhere; [`RaftStore::add_learner`] and
//! [`RaftStore::set_voters`] carry it out.

mod answer_times;
mod deadlines;
mod decoders;
mod election;
mod flushes;
mod leader;
mod lease_ends;
mod log;
mod network;
mod open_error;
mod options;
mod rebuild;
#[cfg(test)]
mod simulation;
mod snapshot;
mod start;
mod state_machine;
mod thread;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use keel_net::{BoxFuture, Peers, Reply, RpcError};
use openraft::ChangeMembers;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use self::leader::{CHANGE_PATIENCE, Request, Serving, txn_outcome};
use self::lease_ends::AgentService;
use self::log::{Opened, Writer};
use self::network::AgentConnections;
use self::open_error::OpenError;
use self::snapshot::SnapshotFile;
use self::start::{Host, Loaded, Tasks, load, start};
use self::thread::StoreThread;
use self::types::{Command, CommandOutcome};
use crate::clock::Clock;
use crate::interface::{
    KeyValue, LeaseId, Listing, Revision, Store, StoreError, Txn, TxnOutcome, Watch,
};
use crate::model;

pub(crate) use self::decoders::decoders;
pub use self::options::{IfAbsent, RaftOptions};
pub use self::rebuild::Copy;
pub use self::types::Voter;

/// Time for a learner to catch up.
const LEARNER_PATIENCE: Duration = Duration::from_secs(60);

/// State of a voter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftStatus {
    /// This voter's number in the group.
    pub id: u64,
    pub term: u64,
    /// Number of the leader, if known.
    pub leader: Option<u64>,
    /// Of a group that is being changed, those that it shall have.
    pub voters: BTreeMap<u64, Voter>,
    /// Whether a change of the group was begun and not ended: until then both groups have to agree.
    pub is_changing: bool,
    pub learners: BTreeMap<u64, Voter>,
    /// Index of the last entry of the log that is applied here.
    pub applied: u64,
    /// How often this voter heard no leader and asked whether others would vote for it.
    pub pre_votes: u64,
}

/// One voter of the embedded store. Dropping it stops it and closes its files; queued requests are
/// answered [`StoreError::Unavailable`] or [`StoreError::Unknown`].
pub struct RaftStore {
    tasks: Tasks,
    folder: PathBuf,
    file: SnapshotFile,
    // In this order: tasks, then what writes the log.
    thread: Option<StoreThread>,
    writer: Option<Writer>,
}

impl RaftStore {
    /// Opens the voter's copy in `folder`. Without `peers` it has no other voters.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if the files are no store any more; [`StoreError::Open`] if they are
    /// of another version, open already, or absent and to be refused then.
    pub async fn open(
        folder: &Path,
        if_absent: IfAbsent,
        peers: Option<Arc<Peers>>,
        options: RaftOptions,
    ) -> Result<Self, StoreError> {
        let path = folder.to_path_buf();
        let fail = move |reason: String| StoreError::Open {
            path: path.display().to_string(),
            reason,
        };
        let new = match &if_absent {
            IfAbsent::Refuse => None,
            IfAbsent::Found(_) => Some(1),
            IfAbsent::Join(id) => Some(*id),
        };
        let (path, bytes_max) = (folder.to_path_buf(), options.store_bytes_max);
        let loading = tokio::task::spawn_blocking(move || load(&path, new, bytes_max)).await;
        let loaded = loading.unwrap_or_else(|_| Err(OpenError::unusable("it panicked")));
        let Loaded {
            opened,
            file,
            model,
            meta,
        } = loaded.map_err(|error| error.at(folder))?;
        let Opened {
            log,
            disk,
            writes,
            id,
            ..
        } = opened;
        let no_thread = |error: std::io::Error| fail(format!("no thread for it: {error}"));
        let writer = disk.write_on_thread(&log, writes).map_err(no_thread)?;
        let thread = StoreThread::start().map_err(no_thread)?;
        let connections = peers.map(|peers| Arc::new(AgentConnections::new(peers)) as _);
        let host = Host {
            transport: connections,
            service: Arc::new(AgentService(Handle::current())),
            clock: Clock::Boottime,
            random: rand::make_rng(),
        };
        let starting = start(log, id, (file.clone(), model, meta), host, options);
        let tasks = match thread.run(starting).await {
            Some(Ok(tasks)) => tasks,
            Some(Err(error)) => return Err(close(thread, &file, writer, fail(error))),
            None => return Err(close(thread, &file, writer, fail("it panicked".into()))),
        };
        let store = Self {
            tasks,
            folder: folder.into(),
            file,
            thread: Some(thread),
            writer: Some(writer),
        };
        store.begin(if_absent).await.map_err(&fail)?;
        Ok(store)
    }

    /// Opens or begins a store of one voter without a network, for tools and tests.
    ///
    /// # Errors
    /// As [`RaftStore::open`].
    pub async fn open_alone(folder: &Path) -> Result<Self, StoreError> {
        let first = IfAbsent::Found(Voter::default());
        Self::open(folder, first, None, RaftOptions::default()).await
    }

    /// Reads the copy in `folder`, on which no voter runs, and keeps voters from it meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Damaged`]; [`StoreError::Open`] if there is none, or a process has it open.
    pub async fn read_copy(folder: &Path) -> Result<Copy, StoreError> {
        rebuild::read(folder, RaftOptions::default().store_bytes_max).await
    }

    /// Whether no voter runs on the copy in `folder`.
    ///
    /// # Errors
    /// [`StoreError::Open`] if one does. A damaged copy is unused.
    pub async fn check_unused(folder: &Path) -> Result<(), StoreError> {
        rebuild::check_unused(folder).await
    }

    /// Puts a store of one voter with this content in the place of the copy in `folder`, on which
    /// no voter runs; where the old copy is now. Voters of the old group that still exist must
    /// never run again with their copies.
    ///
    /// # Errors
    /// [`StoreError::Open`]; then the old copy stays.
    pub async fn replace(
        folder: &Path,
        voter: Voter,
        content: Listing,
    ) -> Result<Option<PathBuf>, StoreError> {
        rebuild::replace(folder, voter, content).await
    }

    /// Begins the store if it is new. A sole voter leads when this returns.
    async fn begin(&self, if_absent: IfAbsent) -> Result<(), String> {
        let raft = &self.tasks.leader.raft;
        let is_begun = raft.is_initialized().await.map_err(|e| e.to_string())?;
        if let IfAbsent::Found(first) = if_absent
            && !is_begun
        {
            let first = BTreeMap::from([(self.tasks.leader.id, first)]);
            raft.initialize(first).await.map_err(|e| e.to_string())?;
        }
        let id = self.tasks.leader.id;
        let is_sole = raft.with_raft_state(move |state| {
            let voters = state.membership_state.effective().voter_ids();
            voters.eq([id])
        });
        if is_sole.await.map_err(|error| error.to_string())? {
            raft.trigger().elect().await.map_err(|e| e.to_string())?;
            let mut serving = self.tasks.leader.serving.subscribe();
            let serves = serving.wait_for(|now| !matches!(now, Serving::No { .. }));
            match tokio::time::timeout(CHANGE_PATIENCE, serves).await {
                Ok(Ok(now)) => now.check().map(drop).map_err(|error| error.to_string())?,
                _ => return Err("its only voter is not elected".into()),
            }
        }
        Ok(())
    }

    /// This voter's number in the group.
    pub fn id(&self) -> u64 {
        self.tasks.leader.id
    }

    /// State of this voter.
    pub fn status(&self) -> RaftStatus {
        let metrics = self.tasks.leader.raft.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let groups = membership.get_joint_config();
        let voters = groups.last().cloned().unwrap_or_default();
        let is_changing = groups.len() > 1;
        let (voters, learners) = membership
            .nodes()
            .map(|(id, voter)| (*id, voter.clone()))
            .partition(|(id, _)| voters.contains(id));
        RaftStatus {
            id: metrics.id,
            term: metrics.current_term,
            leader: metrics.current_leader,
            voters,
            is_changing,
            learners,
            applied: metrics.last_applied.map_or(0, |applied| applied.index),
            pre_votes: self.tasks.election.pre_votes(),
        }
    }

    /// Whether this voter answers requests: it leads, and a quorum follows.
    pub fn is_serving(&self) -> bool {
        matches!(*self.tasks.leader.serving.borrow(), Serving::Yes { .. })
    }

    /// Why this voter stopped, if it did: its disk could not be written; or it led, and a voter that
    /// needs a snapshot from it has just voted for another one (a fault of `openraft` 0.9.25). It is
    /// dropped and opened again to go on.
    pub fn stopped(&self) -> Option<String> {
        match &*self.tasks.leader.serving.borrow() {
            Serving::Stopped(reason) => Some(reason.clone()),
            Serving::No { .. } | Serving::Yes { .. } => None,
        }
    }

    /// A number that no voter had before, for the next one. Only the leader knows it.
    ///
    /// # Errors
    /// [`StoreError::NotLeader`] if another voter leads, or no quorum answers.
    pub async fn next_id(&self) -> Result<u64, StoreError> {
        self.tasks.leader.barrier().await?;
        let metrics = self.tasks.leader.raft.metrics();
        let metrics = metrics.borrow();
        let last = metrics.last_log_index.unwrap_or(0);
        let nodes = metrics.membership_config.membership().nodes();
        let highest = nodes.map(|(id, _)| *id).max().unwrap_or(0);
        // A voter's number is at least the index of the entry that adds it, so no later one has
        // it; and above those of the group, whose log may have begun anew.
        Ok((last + 2).max(highest + 1))
    }

    /// Adds a copy that has no vote yet, and waits until it has everything.
    ///
    /// # Errors
    /// [`StoreError::NotLeader`]; [`StoreError::Unavailable`] if it does not catch up. The learner
    /// stays then, and the call can be repeated.
    pub async fn add_learner(&self, id: u64, voter: Voter) -> Result<(), StoreError> {
        self.tasks.leader.serving.borrow().check()?;
        let adding = self.tasks.leader.raft.add_learner(id, voter, true);
        match tokio::time::timeout(LEARNER_PATIENCE, adding).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(StoreError::unavailable(error)),
            Err(_) => Err(StoreError::unavailable(format!(
                "voter {id} did not catch up within {} s",
                LEARNER_PATIENCE.as_secs()
            ))),
        }
    }

    /// Makes these the voters; all others leave the group. Each is a voter or a learner already.
    /// Requests are answered meanwhile.
    ///
    /// # Errors
    /// [`StoreError::NotLeader`]; [`StoreError::Unknown`] if the change may go on without this
    /// call: look at [`RaftStore::status`] and repeat it.
    pub async fn set_voters(&self, voters: BTreeSet<u64>) -> Result<(), StoreError> {
        self.tasks.leader.serving.borrow().check()?;
        self.change_group(ChangeMembers::ReplaceAllVoters(voters))
            .await
    }

    /// Says at which addresses nodes of the group are now.
    ///
    /// # Errors
    /// As [`RaftStore::set_voters`].
    pub async fn set_addresses(&self, nodes: BTreeMap<u64, Voter>) -> Result<(), StoreError> {
        self.tasks.leader.serving.borrow().check()?;
        self.change_group(ChangeMembers::SetNodes(nodes)).await
    }

    async fn change_group(&self, changes: ChangeMembers<u64, Voter>) -> Result<(), StoreError> {
        let changing = self.tasks.leader.raft.change_membership(changes, false);
        match tokio::time::timeout(LEARNER_PATIENCE, changing).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(StoreError::Unknown {
                reason: error.to_string(),
            }),
            Err(_) => Err(StoreError::Unknown {
                reason: "the voters did not agree in time".into(),
            }),
        }
    }

    /// Removes learners that did not become voters.
    ///
    /// # Errors
    /// As [`RaftStore::set_voters`].
    pub async fn remove_learners(&self, learners: BTreeSet<u64>) -> Result<(), StoreError> {
        self.tasks.leader.serving.borrow().check()?;
        let changes = ChangeMembers::RemoveNodes(learners);
        self.change_group(changes).await
    }

    /// Answers a request of another voter. `kind` is one of [`RaftStore::handles`].
    ///
    /// # Errors
    /// [`RpcError::Refused`] if it cannot be decoded or is for another voter.
    pub async fn answer(&self, kind: u16, request: &[u8]) -> Result<Reply, RpcError> {
        let (id, raft) = (self.tasks.leader.id, &self.tasks.leader.raft);
        if kind == crate::encoding::kind::RAFT_PRE_VOTE {
            let last = network::read(id, request)?;
            return network::one(&self.tasks.election.agrees(last, self.is_serving()).await);
        }
        network::answer(raft, id, kind, request).await
    }

    /// Whether requests of `kind` are of other voters.
    pub fn handles(kind: u16) -> bool {
        use crate::encoding::kind;
        (kind::RAFT_APPEND..=kind::RAFT_PRE_VOTE).contains(&kind)
    }

    async fn change(&self, command: Command, bytes: usize) -> Result<CommandOutcome, StoreError> {
        self.tasks.leader.serving.borrow().check()?;
        let (answer, answered) = oneshot::channel();
        let request = Request {
            command,
            bytes,
            answer,
        };
        let sent = self.tasks.requests.send(request).await;
        sent.map_err(|_| StoreError::unavailable("the store is closed"))?;
        let unknown = |reason: &str| {
            Err(StoreError::Unknown {
                reason: reason.into(),
            })
        };
        match tokio::time::timeout(CHANGE_PATIENCE, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => unknown("the store was closed"),
            Err(_) => unknown("the voters did not agree in time"),
        }
    }
}

fn close(
    thread: StoreThread,
    file: &SnapshotFile,
    writer: Writer,
    error: StoreError,
) -> StoreError {
    file.close();
    // With it the log can be opened by another.
    drop(writer);
    drop(thread);
    error
}

impl Drop for RaftStore {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let raft = self.tasks.leader.raft.clone();
        thread.run_last(async move {
            raft.shutdown().await.ok();
        });
        self.tasks.leader.view.fail("the store was closed");
        self.file.close();
        drop(self.writer.take());
        drop(thread);
    }
}

impl fmt::Debug for RaftStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RaftStore({})", self.folder.display())
    }
}

impl Store for RaftStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>> {
        async move {
            model::check_key(key)?;
            self.tasks.leader.barrier().await?;
            self.tasks.leader.view.get(key)
        }
        .boxed()
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        async move {
            self.tasks.leader.barrier().await?;
            self.tasks.leader.view.list(prefix)
        }
        .boxed()
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        async move {
            let bytes = model::check(&txn)?;
            let outcome = self.change(Command::Txn(txn.into()), bytes).await?;
            txn_outcome(outcome)
        }
        .boxed()
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        from_revision: Revision,
    ) -> BoxFuture<'a, Result<Watch, StoreError>> {
        async move {
            self.tasks.leader.barrier().await?;
            let term = self.tasks.leader.serving.borrow().check()?;
            let view = &self.tasks.leader.view;
            let changes = view.watch(prefix, from_revision)?;
            let mut serving = self.tasks.leader.serving.subscribe();
            let ceased = async move {
                let ceased = serving.wait_for(|now| *now != Serving::Yes { term }).await;
                match ceased {
                    Ok(now) => now.check().err(),
                    Err(_) => None,
                }
                .unwrap_or_else(|| StoreError::unavailable("this node no longer leads the store"))
            };
            Ok(changes.until(ceased))
        }
        .boxed()
    }

    fn lease_grant(&self, ttl_ms: u64) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        async move {
            model::check_ttl(ttl_ms)?;
            match self.change(Command::Grant(ttl_ms), 16).await? {
                CommandOutcome::Granted(lease) => Ok(LeaseId(lease)),
                other => Err(StoreError::Unknown {
                    reason: format!("not a lease: {other:?}"),
                }),
            }
        }
        .boxed()
    }

    fn lease_renew(&self, lease: LeaseId) -> BoxFuture<'_, Result<u64, StoreError>> {
        async move {
            let leader = &self.tasks.leader;
            let renewal = leader.deadlines.renewal(lease);
            // A leader that was replaced must not extend leases.
            leader.renewal_barrier().await?;
            let renewed = renewal.confirmed();
            renewed.ok_or(StoreError::NoSuchLease { lease })
        }
        .boxed()
    }

    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        async move { self.change(Command::Revoke(lease.0), 16).await.map(drop) }.boxed()
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        async move {
            self.tasks.leader.barrier().await?;
            self.tasks.leader.view.revision()
        }
        .boxed()
    }
}
