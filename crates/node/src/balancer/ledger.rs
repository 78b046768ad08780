//! The ledger of one node: decisions of its balancer, kept in a database of its own, bounded. A
//! separate thread writes it, so no caller waits for the disk, and reads include the lines that
//! are not written yet.
//!
//! When a machine moves, its lines are sent after it, so that its node can explain its history
//! after the loss of earlier nodes. Lines that are already in the ledger are not stored twice.

use super::database;
use keel_balance::Name;
use keel_balance::ledger::Line;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Lines by number, as JSON.
const LINES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("lines");
/// The most lines; the oldest are deleted.
const LINES_MAX: u64 = 50_000;
/// The most lines that wait to be written.
const UNWRITTEN_MAX: usize = 1024;
/// The most lines of one write.
const BATCH_MAX: usize = 256;

/// The most lines that are sent with a machine.
pub(super) const ALONG_MAX: u32 = 64;
/// Number of newest lines that are searched for those of a departing machine.
pub(super) const ALONG_AMONG: u32 = 10_000;
/// Number of newest lines that are searched for duplicates of received ones.
const LOOKED_THROUGH: usize = 2_000;

/// The lines of a ledger that a query is about.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct LedgerFilter {
    /// Only lines about this machine.
    pub(crate) machine: Option<String>,
    /// Earliest time, in milliseconds since 1970-01-01 UTC.
    pub(crate) since_unix_ms: u64,
    /// Latest time; 0 is now.
    pub(crate) until_unix_ms: u64,
    /// The most lines of the answer, newest first.
    pub(crate) limit: u32,
    /// The most lines that are searched, newest first; 0 is all.
    #[serde(default)]
    pub(crate) among: u32,
}

impl LedgerFilter {
    fn fits(&self, line: &Line) -> bool {
        let until = self.until_unix_ms;
        if line.at_unix_ms < self.since_unix_ms || (until != 0 && line.at_unix_ms > until) {
            return false;
        }
        self.machine.as_deref().is_none_or(|machine| {
            line.decision.machine().map(|it| &**it) == Some(machine)
                || line.decision.considered(machine).is_some()
        })
    }
}

/// Lines that wait to be written, oldest first, and the number of the next line. A line is removed
/// when it is written.
#[derive(Default)]
struct Unwritten {
    lines: VecDeque<(u64, Line)>,
    next: u64,
}

/// A node's ledger.
#[derive(Clone)]
pub(crate) struct Ledger {
    database: Arc<Database>,
    unwritten: Arc<Mutex<Unwritten>>,
    /// Wakes the writer. One pending signal is enough.
    bell: SyncSender<()>,
    node: Name,
}

fn lock(unwritten: &Mutex<Unwritten>) -> MutexGuard<'_, Unwritten> {
    unwritten.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    /// Opens the ledger in a file. Its writer ends with the last handle.
    ///
    /// # Errors
    /// If the file cannot be used, in a sentence.
    pub(crate) fn open(path: &Path, node: &str) -> Result<Self, String> {
        let (database, last) = database::open(path, "the ledger", last)?;
        let next = last.map_or(0, |last| last + 1);
        let database = Arc::new(database);
        let lines = VecDeque::new();
        let unwritten = Arc::new(Mutex::new(Unwritten { lines, next }));
        let (bell, rung) = sync_channel(1);
        let (writing, of_writer) = (database.clone(), unwritten.clone());
        std::thread::Builder::new()
            .name("ledger".into())
            .spawn(move || {
                while let Ok(()) = rung.recv() {
                    write_all(&writing, &of_writer);
                }
            })
            .map_err(|error| error.to_string())?;
        Ok(Ledger {
            database,
            unwritten,
            bell,
            node: node.into(),
        })
    }

    /// The node of this ledger.
    pub(crate) fn node(&self) -> &Name {
        &self.node
    }

    /// Appends a line. Never waits: if the queue is full, the line is logged instead.
    pub(crate) fn keep(&self, line: Line) {
        let mut unwritten = lock(&self.unwritten);
        if unwritten.lines.len() >= UNWRITTEN_MAX {
            drop(unwritten);
            tracing::warn!(decision = %line.decision, "a decision is lost: the disk is slow");
            return;
        }
        let number = unwritten.next;
        unwritten.next += 1;
        unwritten.lines.push_back((number, line));
        drop(unwritten);
        // If the channel is full, the writer has a pending signal and will see this line.
        let _ = self.bell.try_send(());
    }

    /// Appends the lines that another node sent with a machine.
    ///
    /// # Errors
    /// The database's, in a sentence.
    pub(super) async fn take_along(&self, mut lines: Vec<Line>) -> Result<(), String> {
        // Lines of this node are here already, or were deleted for their age.
        lines.retain(|line| line.node != self.node);
        let ledger = self.clone();
        let known = tokio::task::spawn_blocking(move || ledger.unknown_of(lines)).await;
        let unknown = known
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("the ledger cannot be read: {error}"))?;
        for line in unknown {
            self.keep(line);
        }
        Ok(())
    }

    /// The newest matching lines, oldest first.
    ///
    /// # Errors
    /// The database's, in a sentence.
    pub(crate) async fn newest(&self, filter: LedgerFilter) -> Result<Vec<Line>, String> {
        let ledger = self.clone();
        tokio::task::spawn_blocking(move || ledger.read(&filter))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("the ledger cannot be read: {error}"))
    }

    /// The received lines that are not here yet. Only the newest [`LOOKED_THROUGH`] are compared;
    /// readers merge equal lines.
    fn unknown_of(&self, mut lines: Vec<Line>) -> Result<Vec<Line>, redb::Error> {
        lines.truncate(ALONG_MAX as usize);
        self.look_back(LOOKED_THROUGH, |here| {
            lines.retain(|line| *line != here);
            !lines.is_empty()
        })?;
        Ok(lines)
    }

    fn read(&self, filter: &LedgerFilter) -> Result<Vec<Line>, redb::Error> {
        let mut found = Vec::new();
        let among = match filter.among {
            0 => usize::MAX,
            among => among as usize,
        };
        self.look_back(among, |line| {
            // Received lines are older than their position suggests.
            if line.at_unix_ms < filter.since_unix_ms && line.node == self.node {
                return false;
            }
            if filter.fits(&line) {
                found.push(line);
            }
            found.len() < filter.limit as usize
        })?;
        found.reverse();
        Ok(found)
    }

    /// Passes the given number of newest lines, newest first, to a callback until it stops the
    /// scan.
    fn look_back(
        &self,
        among: usize,
        mut continues: impl FnMut(Line) -> bool,
    ) -> Result<(), redb::Error> {
        // Before the database: a line that is written meanwhile appears in both, under the same
        // number.
        let unwritten: Vec<(u64, Line)> = lock(&self.unwritten).lines.iter().cloned().collect();
        let written_before = unwritten.first().map_or(u64::MAX, |(number, _)| *number);
        let mut left = among;
        for (_, line) in unwritten.into_iter().rev() {
            if left == 0 || !continues(line) {
                return Ok(());
            }
            left -= 1;
        }
        let txn = self.database.begin_read()?;
        let table = txn.open_table(LINES)?;
        for entry in table.range(..written_before)?.rev().take(left) {
            let (_, json) = entry?;
            // Lines of a newer version are skipped.
            let Ok(line) = serde_json::from_slice::<Line>(json.value()) else {
                continue;
            };
            if !continues(line) {
                break;
            }
        }
        Ok(())
    }
}

fn last(database: &Database) -> Result<Option<u64>, redb::Error> {
    let txn = database.begin_write()?;
    // Creates the table if there is none yet.
    let table = txn.open_table(LINES)?;
    let last = table.last()?.map(|(number, _)| number.value());
    drop(table);
    txn.commit()?;
    Ok(last)
}

/// Writes all waiting lines. Those that cannot be written are lost.
fn write_all(database: &Database, unwritten: &Mutex<Unwritten>) {
    loop {
        let batch: Vec<(u64, Line)> = {
            let unwritten = lock(unwritten);
            unwritten.lines.iter().take(BATCH_MAX).cloned().collect()
        };
        if batch.is_empty() {
            return;
        }
        if let Err(error) = write(database, &batch) {
            tracing::error!(%error, "cannot write decisions: is the disk full?");
        }
        lock(unwritten).lines.drain(..batch.len());
    }
}

fn write(database: &Database, batch: &[(u64, Line)]) -> Result<(), redb::Error> {
    let txn = database.begin_write()?;
    {
        let mut table = txn.open_table(LINES)?;
        for (number, line) in batch {
            let Ok(json) = serde_json::to_vec(line) else {
                continue;
            };
            table.insert(*number, json.as_slice())?;
        }
        if let Some((newest, _)) = batch.last() {
            let oldest = (newest + 1).saturating_sub(LINES_MAX);
            table.retain_in(..oldest, |_, _| false)?;
        }
    }
    txn.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_balance::ledger::{Decision, Outcome};

    fn line(at_unix_ms: u64, machine: &str) -> Line {
        Line {
            at_unix_ms,
            node: "a".into(),
            policy: None,
            model: None,
            decision: Decision::Ended {
                machine: machine.into(),
                target: "b".into(),
                outcome: Outcome::Capped,
                load: None,
            },
        }
    }

    fn filter(machine: Option<&str>) -> LedgerFilter {
        LedgerFilter {
            machine: machine.map(str::to_owned),
            limit: 100,
            ..LedgerFilter::default()
        }
    }

    #[tokio::test]
    async fn what_is_kept_is_found_by_machine_and_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.redb");
        let ledger = Ledger::open(&path, "a").unwrap();
        for at in 1..=4 {
            ledger.keep(line(at, if at % 2 == 0 { "even" } else { "odd" }));
        }
        let all = ledger.newest(filter(None)).await.unwrap();
        assert_eq!(all.len(), 4);
        assert!(all.is_sorted_by_key(|line| line.at_unix_ms));
        let even = ledger.newest(filter(Some("even"))).await.unwrap();
        assert_eq!(even, [line(2, "even"), line(4, "even")]);
        let between = LedgerFilter {
            since_unix_ms: 2,
            until_unix_ms: 3,
            ..filter(None)
        };
        assert_eq!(ledger.newest(between).await.unwrap().len(), 2);
        drop(ledger);
        // The writer closes the file after its last handle.
        let reopened = loop {
            match Ledger::open(&path, "a") {
                Ok(ledger) => break ledger,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
            }
        };
        reopened.keep(line(5, "odd"));
        let odd = reopened.newest(filter(Some("odd"))).await.unwrap();
        assert_eq!(odd.len(), 3, "{odd:?}");
    }

    #[tokio::test]
    async fn what_came_with_a_machine_is_kept_once_and_found_by_its_time() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&folder.path().join("ledger.redb"), "b").unwrap();
        let own = Line {
            node: "b".into(),
            ..line(50, "m")
        };
        ledger.keep(own.clone());
        for _ in 0..3 {
            ledger
                .take_along(vec![line(10, "m"), line(20, "m")])
                .await
                .unwrap();
            let found = ledger.newest(filter(Some("m"))).await.unwrap();
            assert_eq!(found.len(), 3, "{found:?}");
        }
        ledger.take_along(vec![own.clone()]).await.unwrap();
        // A newer line of this node does not hide a received one, nor the reverse.
        let since = LedgerFilter {
            since_unix_ms: 20,
            ..filter(None)
        };
        let found = ledger.newest(since).await.unwrap();
        assert_eq!(found, [own, line(20, "m")]);
    }

    /// A slow disk hides no line, and no line appears twice once it is written.
    #[tokio::test]
    async fn what_is_not_written_yet_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&folder.path().join("ledger.redb"), "a").unwrap();
        let all: Vec<Line> = (0..40).map(|at| line(at, "m")).collect();
        // The writer waits while this transaction is open.
        let busy = ledger.database.begin_write().unwrap();
        for line in &all[..20] {
            ledger.keep(line.clone());
        }
        assert_eq!(ledger.newest(filter(None)).await.unwrap(), all[..20]);
        let some = LedgerFilter {
            limit: 3,
            ..filter(None)
        };
        assert_eq!(ledger.newest(some).await.unwrap(), all[17..20]);
        busy.abort().unwrap();
        for until in 20..=40 {
            assert_eq!(ledger.newest(filter(None)).await.unwrap(), all[..until]);
            if let Some(next) = all.get(until) {
                ledger.keep(next.clone());
            }
        }
        let path = folder.path().join("ledger.redb");
        drop(ledger);
        let reopened = loop {
            match Ledger::open(&path, "a") {
                Ok(ledger) => break ledger,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
            }
        };
        assert_eq!(reopened.newest(filter(None)).await.unwrap(), all);
    }

    #[test]
    fn more_than_may_wait_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&folder.path().join("ledger.redb"), "a").unwrap();
        let busy = ledger.database.begin_write().unwrap();
        for at in 0..UNWRITTEN_MAX as u64 + 3 {
            ledger.keep(line(at, "m"));
        }
        let few = LedgerFilter {
            limit: 1,
            ..filter(None)
        };
        let newest = ledger.read(&few).unwrap();
        assert_eq!(newest[0].at_unix_ms, UNWRITTEN_MAX as u64 - 1);
        drop(busy);
    }

    #[test]
    fn the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&folder.path().join("x"), "a").unwrap();
        let write_from = |first: u64, lines: u64| {
            let batch: Vec<(u64, Line)> =
                (0..lines).map(|at| (first + at, line(at, "m"))).collect();
            write(&ledger.database, &batch).unwrap();
            let found = ledger.read(&filter(None)).unwrap();
            found.iter().map(|line| line.at_unix_ms).collect::<Vec<_>>()
        };
        assert_eq!(write_from(LINES_MAX - 2, 6), [0, 1, 2, 3, 4, 5]);
        let kept = write_from(2 * LINES_MAX + 1, 1);
        assert_eq!(kept, [4, 5, 0], "those before the newest 50,000 went");
    }
}
