//! The embedded engine of a single voter: memory for reads, redb for durability.
//!
//! ```text
//! callers ──commands──▶ writer thread: model ──commit + fsync──▶ file
//!    ▲                        │ then
//!    └──answers── publish ◀───┘        readers and watches see only the view
//! ```
//!
//! Async workers never wait for the disk. All commands queued while the writer was busy form one
//! commit (group commit); each transaction has its own revision. Every answer follows the fsync.
//!
//! If a commit fails, the contents of the disk are unknown: its transactions are answered with
//! [`StoreError::Unknown`], and the store refuses all requests until it is reopened.
//!
//! Leases: IDs and times to live are durable, renewals are not. After a restart every lease has its
//! full time again, since its holder may have renewed it just before. Deadlines are on
//! CLOCK_BOOTTIME. The watch history is not durable either: after a restart, watch from the current
//! revision on.

use std::collections::HashMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use keel_net::BoxFuture;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use super::model::{self, Model, Verdict};
use super::view::View;
use super::{
    Change, Changes, KeyValue, LEASE_TTL_MS_MAX, LEASE_TTL_MS_MIN, LeaseId, Listing, Revision,
    Store, StoreError, Txn, TxnOutcome, Watch,
};
use crate::clock::boottime;
use crate::encoding;

const ENTRIES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("entries");
const LEASES: TableDefinition<'_, u64, u64> = TableDefinition::new("leases");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// Version of the tables.
const FORMAT: u64 = 1;

/// Queued commands; further callers wait for room.
const QUEUED_COMMANDS_MAX: usize = 4096;
/// Commands in one commit.
const BATCH_COMMANDS_MAX: usize = 512;
/// Longest sleep of the writer: the host may have been suspended meanwhile.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Sizes of a [`RedbStore`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedbOptions {
    /// Revisions kept for watches. Default 20,000.
    pub history_revisions_max: usize,
    /// Bytes of keys and values kept for watches. Default 64 MiB.
    pub history_bytes_max: usize,
    /// Bytes of keys and values in the store, which are all in memory too.
    /// Default 1 GiB.
    pub store_bytes_max: u64,
}

impl Default for RedbOptions {
    fn default() -> Self {
        Self {
            history_revisions_max: 20_000,
            history_bytes_max: 64 << 20,
            store_bytes_max: 1 << 30,
        }
    }
}

/// The embedded store. Dropping it ends its thread after the commit in
/// progress and closes the file; queued requests are answered
/// [`StoreError::Unavailable`].
pub struct RedbStore {
    view: Arc<View>,
    deadlines: Arc<Deadlines>,
    room: Arc<Semaphore>,
    commands: std::sync::mpsc::Sender<Command>,
    published: watch::Receiver<()>,
    writer: Option<std::thread::JoinHandle<()>>,
    path: PathBuf,
}

struct Command {
    ask: Ask,
    _room: Option<OwnedSemaphorePermit>,
}

enum Ask {
    Txn(Txn, oneshot::Sender<Result<TxnOutcome, StoreError>>),
    Grant(u64, oneshot::Sender<Result<LeaseId, StoreError>>),
    Revoke(LeaseId, oneshot::Sender<Result<(), StoreError>>),
    Stop,
}

impl RedbStore {
    /// Opens or creates the store in the file `path`.
    ///
    /// # Errors
    /// [`StoreError::Open`] if the file is corrupt, not a store, of another version, or open
    /// already.
    pub fn open(path: &Path, options: RedbOptions) -> Result<Self, StoreError> {
        let fail = |reason: String| StoreError::Open {
            path: path.display().to_string(),
            reason,
        };
        // redb panics on some forms of corruption.
        let opening = AssertUnwindSafe(|| Disk::open(path));
        let (disk, mut model) = std::panic::catch_unwind(opening)
            .unwrap_or_else(|_| Err("the file is damaged; restore a backup".into()))
            .map_err(fail)?;
        model.bytes_max = options.store_bytes_max;
        let deadlines = Arc::new(Deadlines::default());
        let now = boottime();
        for (lease, held) in &model.leases {
            deadlines.set(*lease, held.ttl_ms, now);
        }
        let view = Arc::new(View::new(
            model.revision,
            model.entries.clone(),
            options.history_revisions_max,
            options.history_bytes_max,
        ));
        let (commands, received) = std::sync::mpsc::channel();
        let (publish, published) = watch::channel(());
        let writer = Writer {
            disk,
            model,
            view: Arc::clone(&view),
            deadlines: Arc::clone(&deadlines),
            publish,
        };
        let writer = std::thread::Builder::new()
            .name("keel-store".into())
            .spawn(move || {
                let view = Arc::clone(&writer.view);
                let running = AssertUnwindSafe(|| writer.run(&received));
                if std::panic::catch_unwind(running).is_err() {
                    view.fail("its thread panicked; restart the agent");
                }
            })
            .map_err(|e| fail(format!("no thread for it: {e}")))?;
        Ok(Self {
            view,
            deadlines,
            room: Arc::new(Semaphore::new(QUEUED_COMMANDS_MAX)),
            commands,
            published,
            writer: Some(writer),
            path: path.into(),
        })
    }

    async fn ask<T>(
        &self,
        ask: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Ask,
    ) -> Result<T, StoreError> {
        let closed = || StoreError::unavailable("the store is closed");
        let room = Arc::clone(&self.room);
        let room = room.acquire_owned().await.map_err(|_| closed())?;
        let (answer, answered) = oneshot::channel();
        let command = Command {
            ask: ask(answer),
            _room: Some(room),
        };
        self.commands.send(command).map_err(|_| closed())?;
        answered.await.unwrap_or_else(|_| {
            Err(StoreError::Unknown {
                reason: "the store's thread ended".into(),
            })
        })
    }
}

impl Drop for RedbStore {
    fn drop(&mut self) {
        let stop = Command {
            ask: Ask::Stop,
            _room: None,
        };
        self.commands.send(stop).ok();
        if let Some(writer) = self.writer.take() {
            writer.join().ok();
        }
    }
}

impl fmt::Debug for RedbStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedbStore({})", self.path.display())
    }
}

impl Store for RedbStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>> {
        async move {
            model::check_key(key)?;
            self.view.get(key)
        }
        .boxed()
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        async move { self.view.list(prefix) }.boxed()
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        async move {
            model::check(&txn)?;
            self.ask(|answer| Ask::Txn(txn, answer)).await
        }
        .boxed()
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        from_revision: Revision,
    ) -> BoxFuture<'a, Result<Watch, StoreError>> {
        let published = self.published.clone();
        async move { self.view.watch(prefix, from_revision, published) }.boxed()
    }

    fn lease_grant(&self, ttl_ms: u64) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        async move {
            if !(LEASE_TTL_MS_MIN..=LEASE_TTL_MS_MAX).contains(&ttl_ms) {
                let reason = format!(
                    "a lease has {LEASE_TTL_MS_MIN} to {LEASE_TTL_MS_MAX} ms, not {ttl_ms}"
                );
                return Err(StoreError::Invalid { reason });
            }
            self.ask(|answer| Ask::Grant(ttl_ms, answer)).await
        }
        .boxed()
    }

    fn lease_renew(&self, lease: LeaseId) -> BoxFuture<'_, Result<u64, StoreError>> {
        async move {
            // A failed store must not extend leases.
            self.view.revision()?;
            self.deadlines
                .renew(lease)
                .ok_or(StoreError::NoSuchLease { lease })
        }
        .boxed()
    }

    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        async move { self.ask(|answer| Ask::Revoke(lease, answer)).await }.boxed()
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        async move { self.view.revision() }.boxed()
    }
}

/// Deadline of each lease. A lease past its deadline has ended for everyone, whether its keys are
/// deleted yet or not.
#[derive(Default)]
struct Deadlines {
    leases: Mutex<HashMap<LeaseId, Deadline>>,
}

struct Deadline {
    ttl_ms: u64,
    at: Duration,
}

impl Deadlines {
    fn lock(&self) -> MutexGuard<'_, HashMap<LeaseId, Deadline>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, lease: LeaseId, ttl_ms: u64, now: Duration) {
        let at = now + Duration::from_millis(ttl_ms);
        self.lock().insert(lease, Deadline { ttl_ms, at });
    }

    fn renew(&self, lease: LeaseId) -> Option<u64> {
        let mut leases = self.lock();
        let now = boottime();
        let deadline = leases.get_mut(&lease).filter(|d| d.at > now)?;
        deadline.at = now + Duration::from_millis(deadline.ttl_ms);
        Some(deadline.ttl_ms)
    }

    fn is_alive(&self, lease: LeaseId) -> bool {
        self.lock().get(&lease).is_some_and(|d| d.at > boottime())
    }

    fn remove(&self, lease: LeaseId) {
        self.lock().remove(&lease);
    }

    /// Removes ended leases; they can no longer be renewed.
    fn take_ended(&self) -> Vec<LeaseId> {
        let mut leases = self.lock();
        let now = boottime();
        let mut ended: Vec<LeaseId> = leases
            .extract_if(|_, deadline| deadline.at <= now)
            .map(|(lease, _)| lease)
            .collect();
        ended.sort();
        ended
    }

    /// Time until the next deadline, at most [`WAIT_MAX`].
    fn wait(&self) -> Duration {
        let next = self.lock().values().map(|d| d.at).min();
        let wait = next.map(|at| at.saturating_sub(boottime()));
        wait.map_or(WAIT_MAX, |wait| wait.min(WAIT_MAX))
    }
}

/// The writer thread.
struct Writer {
    disk: Disk,
    model: Model,
    view: Arc<View>,
    deadlines: Arc<Deadlines>,
    /// Dropped with the writer: that ends the watches.
    publish: watch::Sender<()>,
}

/// The changes of one commit, and the callers to answer afterwards.
#[derive(Default)]
struct Batch {
    changes: Vec<Changes>,
    leases: Vec<(LeaseId, Option<u64>)>,
    answers: Vec<Answer>,
}

enum Answer {
    Txn(
        oneshot::Sender<Result<TxnOutcome, StoreError>>,
        Result<TxnOutcome, StoreError>,
    ),
    Grant(oneshot::Sender<Result<LeaseId, StoreError>>, LeaseId, u64),
    Revoke(oneshot::Sender<Result<(), StoreError>>),
}

impl Writer {
    fn run(mut self, commands: &std::sync::mpsc::Receiver<Command>) {
        loop {
            let mut asks = match commands.recv_timeout(self.deadlines.wait()) {
                Ok(command) => vec![command.ask],
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            while asks.len() < BATCH_COMMANDS_MAX
                && let Ok(command) = commands.try_recv()
            {
                asks.push(command.ask);
            }
            let mut batch = Batch::default();
            for lease in self.deadlines.take_ended() {
                tracing::info!(%lease, "lease ended");
                self.end_lease(lease, &mut batch);
            }
            let mut stop = false;
            for ask in asks {
                match ask {
                    Ask::Stop => stop = true,
                    ask if stop => refuse(ask, "the store is closed"),
                    ask => self.decide(ask, &mut batch),
                }
            }
            if let Err(reason) = self.disk.commit(&self.model, &batch) {
                self.fail(reason, batch, commands);
                return;
            }
            self.finish(batch);
            if stop {
                self.view.fail("the store is closed");
                return;
            }
        }
    }

    fn decide(&mut self, ask: Ask, batch: &mut Batch) {
        match ask {
            Ask::Txn(txn, answer) => {
                let deadlines = &self.deadlines;
                let verdict = self.model.apply(txn, |lease| deadlines.is_alive(lease));
                let revision = self.model.revision;
                let outcome = verdict.map(|verdict| match verdict {
                    Verdict::Applied(changes) => {
                        batch.changes.extend(changes);
                        TxnOutcome::Committed { revision }
                    }
                    Verdict::Refused { failed, current } => TxnOutcome::Refused {
                        failed,
                        revision,
                        current,
                    },
                });
                batch.answers.push(Answer::Txn(answer, outcome));
            }
            Ask::Grant(ttl_ms, answer) => {
                let lease = self.model.grant(ttl_ms);
                batch.leases.push((lease, Some(ttl_ms)));
                batch.answers.push(Answer::Grant(answer, lease, ttl_ms));
            }
            Ask::Revoke(lease, answer) => {
                self.deadlines.remove(lease);
                self.end_lease(lease, batch);
                batch.answers.push(Answer::Revoke(answer));
            }
            Ask::Stop => {}
        }
    }

    fn end_lease(&mut self, lease: LeaseId, batch: &mut Batch) {
        if let Some(changes) = self.model.end(lease) {
            batch.changes.extend(changes);
            batch.leases.push((lease, None));
        }
    }

    /// After the commit: publishes the view, answers the callers, and finally wakes the watches: a
    /// frozen machine may be waiting for the answer. A caller that is gone is ignored.
    fn finish(&self, batch: Batch) {
        let changed = !batch.changes.is_empty();
        if changed {
            self.view.publish(batch.changes);
        }
        for answer in batch.answers {
            match answer {
                Answer::Txn(to, outcome) => drop(to.send(outcome)),
                Answer::Grant(to, lease, ttl_ms) => {
                    // Its time starts with the answer.
                    self.deadlines.set(lease, ttl_ms, boottime());
                    drop(to.send(Ok(lease)));
                }
                Answer::Revoke(to) => drop(to.send(Ok(()))),
            }
        }
        if changed {
            self.publish.send_replace(());
        }
    }

    /// The commit failed: its transactions may be on the disk or not.
    fn fail(&self, reason: String, batch: Batch, commands: &std::sync::mpsc::Receiver<Command>) {
        tracing::error!(reason, "the store cannot write; it serves no more");
        let reason =
            format!("it cannot write: {reason}; free or repair the disk, restart the agent");
        self.view.fail(&reason);
        let unknown = || StoreError::Unknown {
            reason: reason.clone(),
        };
        for answer in batch.answers {
            match answer {
                Answer::Txn(to, Ok(TxnOutcome::Committed { .. })) => {
                    drop(to.send(Err(unknown())));
                }
                Answer::Txn(to, Ok(TxnOutcome::Refused { .. })) => {
                    drop(to.send(Err(StoreError::unavailable(&reason))));
                }
                Answer::Txn(to, Err(error)) => drop(to.send(Err(error))),
                Answer::Grant(to, ..) => drop(to.send(Err(unknown()))),
                Answer::Revoke(to) => drop(to.send(Err(unknown()))),
            }
        }
        // Answers every request with the error until the store is dropped.
        while let Ok(command) = commands.recv() {
            match command.ask {
                Ask::Stop => return,
                ask => refuse(ask, &reason),
            }
        }
    }
}

fn refuse(ask: Ask, reason: &str) {
    let error = StoreError::unavailable(reason);
    match ask {
        Ask::Txn(_, answer) => drop(answer.send(Err(error))),
        Ask::Grant(_, answer) => drop(answer.send(Err(error))),
        Ask::Revoke(_, answer) => drop(answer.send(Err(error))),
        Ask::Stop => {}
    }
}

/// The stored value of an entry, in the envelope of [`crate::encoding`].
#[derive(Serialize, Deserialize)]
struct Record {
    value: Vec<u8>,
    created: Revision,
    modified: Revision,
    lease: Option<u64>,
}

struct Disk {
    database: Database,
}

impl Disk {
    fn open(path: &Path) -> Result<(Self, Model), String> {
        let mut database = Database::create(path).map_err(explain)?;
        // The whole store fits in memory, so checking all of it is quick.
        match database.check_integrity() {
            Ok(true) => {}
            Ok(false) => {
                return Err(
                    "the file was damaged and is repaired now, but its last changes may be lost; \
                     restore a backup, or start again to accept that"
                        .into(),
                );
            }
            Err(error) => return Err(explain(error)),
        }
        let disk = Self { database };
        let model = disk.load().map_err(|e| match e {
            LoadError::Redb(error) => error.to_string(),
            LoadError::Reason(reason) => reason,
        })?;
        Ok((disk, model))
    }

    fn load(&self) -> Result<Model, LoadError> {
        let write = self.database.begin_write()?;
        {
            let mut meta = write.open_table(META)?;
            write.open_table(ENTRIES)?;
            write.open_table(LEASES)?;
            let format = meta.get("format")?.map(|v| v.value());
            match format {
                Some(FORMAT) => {}
                None => {
                    meta.insert("format", FORMAT)?;
                }
                Some(found) => {
                    return Err(LoadError::Reason(format!(
                        "it has format {found}, this keel reads format {FORMAT}: \
                         use the version that wrote it"
                    )));
                }
            }
        }
        write.commit()?;
        let read = self.database.begin_read()?;
        let mut model = Model::default();
        let meta = read.open_table(META)?;
        let number =
            |name: &str| -> Result<u64, LoadError> { Ok(meta.get(name)?.map_or(0, |v| v.value())) };
        model.revision = number("revision")?;
        model.lease_next = number("lease_next")?;
        for item in read.open_table(LEASES)?.iter()? {
            let (lease, ttl_ms) = item?;
            let held = model::Lease {
                ttl_ms: ttl_ms.value(),
                ..Default::default()
            };
            model.leases.insert(LeaseId(lease.value()), held);
        }
        for item in read.open_table(ENTRIES)?.iter()? {
            let (key, record) = item?;
            let record: Record = encoding::decode("an entry of the store", record.value())
                .map_err(|e| LoadError::Reason(e.to_string()))?;
            model.load(KeyValue {
                key: key.value().into(),
                value: record.value,
                created: record.created,
                modified: record.modified,
                lease: record.lease.map(LeaseId),
            });
        }
        Ok(model)
    }

    /// Makes a batch durable. After an error its outcome is unknown.
    fn commit(&self, model: &Model, batch: &Batch) -> Result<(), String> {
        if batch.changes.is_empty() && batch.leases.is_empty() {
            return Ok(());
        }
        self.write(model, batch).map_err(|e| match e {
            LoadError::Redb(error) => error.to_string(),
            LoadError::Reason(reason) => reason,
        })
    }

    fn write(&self, model: &Model, batch: &Batch) -> Result<(), LoadError> {
        let mut write = self.database.begin_write()?;
        write.set_durability(redb::Durability::Immediate)?;
        {
            let mut entries = write.open_table(ENTRIES)?;
            let changes = batch.changes.iter().flat_map(|all| &all.changes);
            for change in changes {
                match change {
                    Change::Put(entry) => {
                        entries.insert(entry.key.as_str(), record(entry)?.as_slice())?;
                    }
                    Change::Delete { key } => {
                        entries.remove(key.as_str())?;
                    }
                }
            }
            let mut leases = write.open_table(LEASES)?;
            for (lease, ttl_ms) in &batch.leases {
                match ttl_ms {
                    Some(ttl_ms) => leases.insert(lease.0, ttl_ms)?,
                    None => leases.remove(lease.0)?,
                };
            }
            let mut meta = write.open_table(META)?;
            meta.insert("revision", model.revision)?;
            meta.insert("lease_next", model.lease_next)?;
        }
        write.commit()?;
        Ok(())
    }
}

fn record(entry: &KeyValue) -> Result<Vec<u8>, LoadError> {
    let record = Record {
        value: entry.value.clone(),
        created: entry.created,
        modified: entry.modified,
        lease: entry.lease.map(|lease| lease.0),
    };
    encoding::encode("an entry of the store", &record).map_err(|e| LoadError::Reason(e.to_string()))
}

fn explain(error: DatabaseError) -> String {
    match error {
        DatabaseError::DatabaseAlreadyOpen => {
            "another process has it open; is a second `keel up` running with this state directory?"
                .into()
        }
        DatabaseError::Storage(redb::StorageError::Io(error))
            if error.kind() == std::io::ErrorKind::InvalidData =>
        {
            "it is not a store, or its beginning is damaged; restore a backup".into()
        }
        DatabaseError::Storage(redb::StorageError::Corrupted(what)) => {
            format!("it is damaged ({what}); restore a backup")
        }
        other => other.to_string(),
    }
}

/// Why the tables could not be read or written.
enum LoadError {
    Redb(redb::Error),
    Reason(String),
}

impl<E: Into<redb::Error>> From<E> for LoadError {
    fn from(error: E) -> Self {
        LoadError::Redb(error.into())
    }
}
