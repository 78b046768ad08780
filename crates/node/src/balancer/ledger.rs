//! The ledger of one node: decisions of its balancer, kept in a database of its own,
//! bounded. Writing has a thread of its own; nobody waits for it.
//!
//! What says something of a machine goes after it when it moves, so that its node can
//! explain where it has been when those nodes are gone. Lines that are known already
//! are not kept twice.

use super::ask::ask_node;
use super::database;
use crate::agent::Agent;
use crate::service::kind as node_kind;
use keel_balance::Name;
use keel_balance::ledger::Line;
use keel_cluster::{MachineName, NodeName};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

/// Lines by number, as JSON.
const LINES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("lines");
/// Lines that are kept; the oldest go.
const LINES_MAX: u64 = 50_000;
/// Lines that may wait to be written.
const QUEUE_MAX: usize = 1024;
/// Lines that are written together at most.
const BATCH_MAX: usize = 256;

/// Lines that go with a machine.
const ALONG_MAX: u32 = 64;
/// Newest lines of all among which those of a machine are looked for that leaves.
const ALONG_AMONG: u32 = 10_000;
/// Newest lines among which one that came along is looked for.
const LOOKED_THROUGH: usize = 2_000;
/// How long the node may take to keep its last line before it goes along.
const ALONG_AFTER: Duration = Duration::from_millis(300);

/// What of a ledger is wanted.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Wanted {
    /// Only what says something of this machine.
    pub(crate) machine: Option<String>,
    /// Not before this, in milliseconds since 1970-01-01 UTC.
    pub(crate) since_unix_ms: u64,
    /// Not after this; 0 is now.
    pub(crate) until_unix_ms: u64,
    /// The newest so many.
    pub(crate) limit: u32,
    /// Of the newest so many of all; 0 is all.
    #[serde(default)]
    pub(crate) among: u32,
}

impl Wanted {
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

/// A node's ledger.
#[derive(Clone)]
pub(crate) struct Ledger {
    database: Arc<Database>,
    queue: SyncSender<Line>,
    node: Name,
}

impl Ledger {
    /// Goes on with the one in a file. Its writer ends with the last handle.
    ///
    /// # Errors
    /// If the file cannot be used, in a sentence.
    pub(crate) fn open(path: &Path, node: &str) -> Result<Self, String> {
        let said = |error: redb::Error| format!("{}: {error}", path.display());
        let database = database::open(path, "the ledger")?;
        let mut next = last(&database).map_err(said)?.map_or(0, |last| last + 1);
        let database = Arc::new(database);
        let (queue, lines) = sync_channel::<Line>(QUEUE_MAX);
        let writing = database.clone();
        std::thread::Builder::new()
            .name("ledger".into())
            .spawn(move || {
                while let Ok(line) = lines.recv() {
                    let mut batch = vec![line];
                    batch.extend(lines.try_iter().take(BATCH_MAX));
                    if let Err(error) = write(&writing, &mut next, &batch) {
                        tracing::error!(%error, "decisions are not kept: is the disk full?");
                    }
                }
            })
            .map_err(|error| error.to_string())?;
        Ok(Ledger {
            database,
            queue,
            node: node.into(),
        })
    }

    /// Whose it is.
    pub(crate) fn node(&self) -> &Name {
        &self.node
    }

    /// Keeps a line. Never waits: what finds no room is logged instead.
    pub(crate) fn keep(&self, line: Line) {
        if let Err(error) = self.queue.try_send(line) {
            tracing::warn!(%error, "a decision is not kept");
        }
    }

    /// Keeps what another node told of a machine that came from there.
    ///
    /// # Errors
    /// The database's, in a sentence.
    pub(super) async fn take_along(&self, mut lines: Vec<Line>) -> Result<(), String> {
        // (Its own are here, or were too old to be kept.)
        lines.retain(|line| line.node != self.node);
        let database = self.database.clone();
        let known = tokio::task::spawn_blocking(move || known_of(&database, lines)).await;
        let unknown = known
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("the ledger cannot be read: {error}"))?;
        for line in unknown {
            self.keep(line);
        }
        Ok(())
    }

    /// The newest lines that are wanted, oldest first.
    ///
    /// # Errors
    /// The database's, in a sentence.
    pub(crate) async fn newest(&self, wanted: Wanted) -> Result<Vec<Line>, String> {
        let (database, own) = (self.database.clone(), self.node.clone());
        tokio::task::spawn_blocking(move || read(&database, &wanted, &own))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("the ledger cannot be read: {error}"))
    }
}

fn last(database: &Database) -> Result<Option<u64>, redb::Error> {
    let txn = database.begin_write()?;
    // (Makes the table where there is none yet.)
    let table = txn.open_table(LINES)?;
    let last = table.last()?.map(|(number, _)| number.value());
    drop(table);
    txn.commit()?;
    Ok(last)
}

fn write(database: &Database, next: &mut u64, batch: &[Line]) -> Result<(), redb::Error> {
    let txn = database.begin_write()?;
    {
        let mut table = txn.open_table(LINES)?;
        for line in batch {
            let Ok(json) = serde_json::to_vec(line) else {
                continue;
            };
            table.insert(*next, json.as_slice())?;
            *next += 1;
        }
        let oldest = next.saturating_sub(LINES_MAX);
        table.retain_in(..oldest, |_, _| false)?;
    }
    txn.commit()?;
    Ok(())
}

/// Of lines that came with a machine, those that are not here yet. Further back than
/// the newest [`LOOKED_THROUGH`] nobody looks: whoever reads takes equal lines for one.
fn known_of(database: &Database, mut lines: Vec<Line>) -> Result<Vec<Line>, redb::Error> {
    lines.truncate(ALONG_MAX as usize);
    let txn = database.begin_read()?;
    let table = txn.open_table(LINES)?;
    for entry in table.iter()?.rev().take(LOOKED_THROUGH) {
        let (_, json) = entry?;
        let Ok(here) = serde_json::from_slice::<Line>(json.value()) else {
            continue;
        };
        lines.retain(|line| *line != here);
    }
    Ok(lines)
}

/// Sends what this node's ledger says of a machine after it, in the background; what
/// does not arrive is still here.
pub(crate) fn send_along(agent: &Arc<Agent>, machine: &MachineName, target: &NodeName) {
    let (agent, machine, target) = (agent.clone(), machine.clone(), target.clone());
    tokio::spawn(async move {
        // The line that says why it went may not be written yet.
        tokio::time::sleep(ALONG_AFTER).await;
        let wanted = Wanted {
            machine: Some(machine.to_string()),
            limit: ALONG_MAX,
            among: ALONG_AMONG,
            ..Wanted::default()
        };
        let sent: Result<(), String> = async {
            let lines = agent.balancer.ledger().newest(wanted).await?;
            if lines.is_empty() {
                return Ok(());
            }
            let json = serde_json::to_vec(&lines).map_err(|error| error.to_string())?;
            let taken: Result<(), _> =
                ask_node(&agent, &target, node_kind::LEDGER_ALONG, &json).await;
            taken.map_err(|error| error.to_string())
        }
        .await;
        if let Err(error) = sent {
            tracing::debug!(%machine, %target, error, "the ledger did not go along");
        }
    });
}

fn read(database: &Database, wanted: &Wanted, own: &Name) -> Result<Vec<Line>, redb::Error> {
    let txn = database.begin_read()?;
    let table = txn.open_table(LINES)?;
    let mut found = Vec::new();
    let among = match wanted.among {
        0 => usize::MAX,
        among => among as usize,
    };
    for entry in table.iter()?.rev().take(among) {
        let (_, json) = entry?;
        // What a newer version wrote is not read.
        let Ok(line) = serde_json::from_slice::<Line>(json.value()) else {
            continue;
        };
        // Those that came with a machine are older than their place here.
        if line.at_unix_ms < wanted.since_unix_ms && line.node == *own {
            break;
        }
        if wanted.fits(&line) {
            found.push(line);
        }
        if found.len() >= wanted.limit as usize {
            break;
        }
    }
    found.reverse();
    Ok(found)
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

    fn wanted(machine: Option<&str>) -> Wanted {
        Wanted {
            machine: machine.map(str::to_owned),
            limit: 100,
            ..Wanted::default()
        }
    }

    async fn until_found(ledger: &Ledger, wanted: &Wanted, count: usize) -> Vec<Line> {
        for _ in 0..200 {
            let found = ledger.newest(wanted.clone()).await.unwrap();
            if found.len() == count {
                return found;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("no {count} lines in two seconds");
    }

    #[tokio::test]
    async fn what_is_kept_is_found_by_machine_and_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.redb");
        let ledger = Ledger::open(&path, "a").unwrap();
        for at in 1..=4 {
            ledger.keep(line(at, if at % 2 == 0 { "even" } else { "odd" }));
        }
        let all = until_found(&ledger, &wanted(None), 4).await;
        assert!(all.is_sorted_by_key(|line| line.at_unix_ms));
        let even = until_found(&ledger, &wanted(Some("even")), 2).await;
        assert_eq!(even[1], line(4, "even"));
        let between = Wanted {
            since_unix_ms: 2,
            until_unix_ms: 3,
            ..wanted(None)
        };
        assert_eq!(ledger.newest(between).await.unwrap().len(), 2);
        drop(ledger);
        // The writer lets the file go after its last handle.
        let reopened = loop {
            match Ledger::open(&path, "a") {
                Ok(ledger) => break ledger,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
            }
        };
        reopened.keep(line(5, "odd"));
        until_found(&reopened, &wanted(Some("odd")), 3).await;
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
        until_found(&ledger, &wanted(None), 1).await;
        for _ in 0..3 {
            ledger
                .take_along(vec![line(10, "m"), line(20, "m")])
                .await
                .unwrap();
            until_found(&ledger, &wanted(Some("m")), 3).await;
        }
        ledger.take_along(vec![own.clone()]).await.unwrap();
        // An own line that is newer than what came does not hide it, nor the reverse.
        let since = Wanted {
            since_unix_ms: 20,
            ..wanted(None)
        };
        let found = ledger.newest(since).await.unwrap();
        assert_eq!(found, [own, line(20, "m")]);
    }

    #[test]
    fn the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::create(folder.path().join("x")).unwrap();
        let mut next = LINES_MAX - 2;
        let batch: Vec<Line> = (0..6).map(|at| line(at, "m")).collect();
        write(&database, &mut next, &batch).unwrap();
        let found = read(&database, &wanted(None), &"a".into()).unwrap();
        let kept: Vec<u64> = found.iter().map(|line| line.at_unix_ms).collect();
        assert_eq!(kept, [0, 1, 2, 3, 4, 5]);
        next = 2 * LINES_MAX + 1;
        write(&database, &mut next, &batch[..1]).unwrap();
        let found = read(&database, &wanted(None), &"a".into()).unwrap();
        let kept: Vec<u64> = found.iter().map(|line| line.at_unix_ms).collect();
        assert_eq!(kept, [4, 5, 0], "those before the newest 50,000 went");
    }
}
