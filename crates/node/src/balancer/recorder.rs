//! Measurements of this node and its machines for a month, at decreasing resolution: by the minute
//! for two days, by ten minutes after that. Kept in a database of its own by a thread of its own,
//! so no caller waits for the disk.
//!
//! Samples are aggregated into buckets of each resolution; a complete bucket is written. The
//! newest measurements are in memory only, and lost with the agent.

use super::database;
use keel_api::HistoryPoint;
use keel_balance::load::{NodeSample, Weights};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Points by tier, series and start time (milliseconds since 1970-01-01 UTC), as postcard. Another
/// encoding needs another table name.
const POINTS: TableDefinition<'_, (u8, &str, u64), &[u8]> = TableDefinition::new("points-1");
/// The series of the node itself; a machine's series has its name.
const NODE: &str = "";
/// The most samples that wait.
const QUEUE_MAX: usize = 64;
/// Interval of writing complete buckets.
const WRITE_EVERY: Duration = Duration::from_secs(30);
/// Interval of deleting expired points.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// A resolution.
#[derive(Debug, Clone, Copy)]
struct Tier {
    bucket_ms: u64,
    kept_ms: u64,
    /// Whether it has series of machines, and not of the node alone.
    machines: bool,
}

const SECOND_MS: u64 = 1000;
const DAY_MS: u64 = 86_400 * SECOND_MS;
/// Finest first.
const TIERS: [Tier; 3] = [
    Tier {
        bucket_ms: 10 * SECOND_MS,
        kept_ms: DAY_MS / 4,
        machines: false,
    },
    Tier {
        bucket_ms: 60 * SECOND_MS,
        kept_ms: 2 * DAY_MS,
        machines: true,
    },
    Tier {
        bucket_ms: 600 * SECOND_MS,
        kept_ms: 31 * DAY_MS,
        machines: true,
    },
];

/// The series and time range of the history that a query is about.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct HistoryRange {
    /// The machine; `None` for the node.
    pub(crate) machine: Option<String>,
    /// Start, in milliseconds since 1970-01-01 UTC.
    pub(crate) since_unix_ms: u64,
    /// End.
    pub(crate) until_unix_ms: u64,
    /// The most points of the answer.
    pub(crate) points_max: u32,
}

/// A sample with its time.
struct Measured {
    at_unix_ms: u64,
    load: f64,
    sample: NodeSample,
    weights: Weights,
}

type Bucket = (u8, String);

/// Points that are not written: incomplete and complete ones.
#[derive(Default)]
struct Unwritten {
    open: HashMap<Bucket, HistoryPoint>,
    over: Vec<(Bucket, HistoryPoint)>,
}

/// A node's recorder.
#[derive(Clone)]
pub(crate) struct Recorder {
    database: Arc<Database>,
    unwritten: Arc<Mutex<Unwritten>>,
    queue: SyncSender<Measured>,
}

impl Recorder {
    /// Opens the history in a file. Its writer ends with the last handle.
    ///
    /// # Errors
    /// If the file cannot be used, in a sentence.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        // Creates the table if there is none yet.
        let table = |database: &Database| write(database, &[]);
        let (database, ()) = database::open(path, "the history of loads", table)?;
        let database = Arc::new(database);
        let unwritten = Arc::new(Mutex::new(Unwritten::default()));
        let (queue, samples) = sync_channel::<Measured>(QUEUE_MAX);
        let (of_thread, buckets) = (database.clone(), unwritten.clone());
        std::thread::Builder::new()
            .name("history".into())
            .spawn(move || {
                let mut written = Instant::now();
                let mut pruned: Option<Instant> = None;
                loop {
                    match samples.recv_timeout(WRITE_EVERY) {
                        Ok(measured) => lock(&buckets).add(&measured),
                        Err(RecvTimeoutError::Timeout) => {}
                        Err(RecvTimeoutError::Disconnected) => break,
                    }
                    if written.elapsed() >= WRITE_EVERY {
                        written = Instant::now();
                        keep(&of_thread, &buckets);
                    }
                    if pruned.is_none_or(|at| at.elapsed() >= PRUNE_EVERY) {
                        pruned = Some(Instant::now());
                        let now_unix_ms = keel_store::clock::unix_ms();
                        if let Err(error) = prune(&of_thread, now_unix_ms) {
                            tracing::warn!(%error, "cannot delete expired loads");
                        }
                    }
                }
                let mut last = lock(&buckets);
                let open: Vec<_> = last.open.drain().collect();
                last.over.extend(open);
                drop(last);
                keep(&of_thread, &buckets);
            })
            .map_err(|error| error.to_string())?;
        Ok(Recorder {
            database,
            unwritten,
            queue,
        })
    }

    /// Records a sample. Never waits: a sample that finds the queue full is lost.
    pub(super) fn take(&self, at_unix_ms: u64, load: f64, sample: &NodeSample, weights: Weights) {
        let measured = Measured {
            at_unix_ms,
            load,
            sample: sample.clone(),
            weights,
        };
        if self.queue.try_send(measured).is_err() {
            tracing::debug!("a sample of the history is lost: the disk is slow");
        }
    }

    /// The points of a range, oldest first, at the finest resolution that covers all of it.
    ///
    /// # Errors
    /// The database's, in a sentence.
    pub(crate) async fn of(&self, range: HistoryRange) -> Result<Vec<HistoryPoint>, String> {
        let recorder = self.clone();
        tokio::task::spawn_blocking(move || recorder.read(&range, keel_store::clock::unix_ms()))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("the history of loads cannot be read: {error}"))
    }

    fn read(
        &self,
        range: &HistoryRange,
        now_unix_ms: u64,
    ) -> Result<Vec<HistoryPoint>, redb::Error> {
        let series = range.machine.as_deref().unwrap_or(NODE);
        let tier = tier_of(range, now_unix_ms);
        let bucket_ms = TIERS[usize::from(tier)].bucket_ms;
        let first = range.since_unix_ms / bucket_ms * bucket_ms;
        let mut points = Vec::new();
        let txn = self.database.begin_read()?;
        let table = txn.open_table(POINTS)?;
        for entry in table.range((tier, series, first)..=(tier, series, range.until_unix_ms))? {
            let (_, bytes) = entry?;
            points.extend(postcard::from_bytes::<HistoryPoint>(bytes.value()));
        }
        let unwritten = lock(&self.unwritten);
        let open = unwritten.open.iter();
        let over = unwritten.over.iter().map(|(bucket, point)| (bucket, point));
        for ((of_tier, of_series), point) in over.chain(open) {
            let within = (first..=range.until_unix_ms).contains(&point.at_unix_ms);
            if *of_tier == tier && of_series == series && within {
                points.push(*point);
            }
        }
        drop(unwritten);
        Ok(keel_api::history_in_points(points, range.points_max))
    }
}

/// The finest tier that covers the start of a range for the series.
fn tier_of(range: &HistoryRange, now_unix_ms: u64) -> u8 {
    let ago_ms = now_unix_ms.saturating_sub(range.since_unix_ms);
    let has = |tier: &Tier| {
        tier.kept_ms + tier.bucket_ms >= ago_ms && (tier.machines || range.machine.is_none())
    };
    let number = TIERS.iter().position(has).unwrap_or(TIERS.len() - 1);
    u8::try_from(number).unwrap_or(0)
}

fn lock(unwritten: &Mutex<Unwritten>) -> MutexGuard<'_, Unwritten> {
    unwritten.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Unwritten {
    fn add(&mut self, measured: &Measured) {
        let sample = &measured.sample;
        let all = |of: fn(&keel_balance::load::MachineSample) -> f64| -> f64 {
            sample.machines.iter().map(of).sum()
        };
        let machines_bytes: u64 = sample
            .machines
            .iter()
            .map(|it| it.factors.memory_bytes)
            .sum();
        let at_unix_ms = measured.at_unix_ms;
        let node = HistoryPoint {
            at_unix_ms,
            load: measured.load,
            load_max: measured.load,
            cpu_cores: all(|it| it.factors.cpu_cores) + sample.base.cpu_cores,
            memory_bytes: machines_bytes.saturating_add(sample.base.memory_bytes),
            io_bytes_per_s: all(|it| it.factors.io_bytes_per_s) + sample.base.io_bytes_per_s,
            cpu_pressure: sample.cpu_pressure,
            stalled: sample.stall_pressure,
            machines: u32::try_from(sample.machines.len()).unwrap_or(u32::MAX),
            ..HistoryPoint::ONE
        };
        let all = (0u8..).zip(&TIERS);
        for (number, tier) in all {
            self.add_to(number, tier, NODE, node);
            if !tier.machines {
                continue;
            }
            for machine in &sample.machines {
                let factors = &machine.factors;
                let load = factors.weigh(&sample.capacity, &measured.weights);
                let point = HistoryPoint {
                    at_unix_ms,
                    load,
                    load_max: load,
                    cpu_cores: factors.cpu_cores,
                    memory_bytes: factors.memory_bytes,
                    working_set_bytes: machine.usage.working_set_bytes,
                    io_bytes_per_s: factors.io_bytes_per_s,
                    cpu_pressure: machine.usage.cpu_waited_cores,
                    stalled: factors.stalled,
                    machines: 1,
                    ..HistoryPoint::ONE
                };
                self.add_to(number, tier, &machine.name, point);
            }
        }
        // A machine that has left or ended has no more samples.
        let old = |((tier, _), point): &(Bucket, HistoryPoint)| {
            let bucket_ms = TIERS[usize::from(*tier)].bucket_ms;
            point.at_unix_ms + bucket_ms <= at_unix_ms
        };
        let over = self
            .open
            .iter()
            .map(|(bucket, point)| (bucket.clone(), *point));
        let over: Vec<_> = over.filter(old).collect();
        for (bucket, _) in &over {
            self.open.remove(bucket);
        }
        self.over.extend(over);
    }

    fn add_to(&mut self, number: u8, tier: &Tier, series: &str, mut point: HistoryPoint) {
        point.at_unix_ms = point.at_unix_ms / tier.bucket_ms * tier.bucket_ms;
        point.lasts_ms = tier.bucket_ms;
        let bucket = (number, series.to_owned());
        match self.open.get_mut(&bucket) {
            Some(open) if open.at_unix_ms == point.at_unix_ms => open.add(&point),
            // Also if a clock was set back.
            _ => {
                let before = self.open.insert(bucket.clone(), point);
                self.over.extend(before.map(|it| (bucket, it)));
            }
        }
    }
}

/// Writes complete buckets; those that cannot be written are lost.
fn keep(database: &Database, unwritten: &Mutex<Unwritten>) {
    let over = std::mem::take(&mut lock(unwritten).over);
    if over.is_empty() {
        return;
    }
    if let Err(error) = write(database, &over) {
        tracing::error!(%error, "cannot write measured loads: is the disk full?");
    }
}

fn write(database: &Database, over: &[(Bucket, HistoryPoint)]) -> Result<(), redb::Error> {
    let txn = database.begin_write()?;
    {
        let mut table = txn.open_table(POINTS)?;
        for ((tier, series), point) in over {
            let key = (*tier, series.as_str(), point.at_unix_ms);
            // Continues the point of a machine that returned, or of an agent that was restarted.
            let before = table.get(key)?;
            let before =
                before.and_then(|it| postcard::from_bytes::<HistoryPoint>(it.value()).ok());
            let mut whole = *point;
            if let Some(before) = before {
                whole.add(&before);
            }
            let Ok(bytes) = postcard::to_stdvec(&whole) else {
                continue;
            };
            table.insert(key, bytes.as_slice())?;
        }
    }
    txn.commit()?;
    Ok(())
}

/// Deletes points older than the retention of their tier.
fn prune(database: &Database, now_unix_ms: u64) -> Result<(), redb::Error> {
    let txn = database.begin_write()?;
    let mut table = txn.open_table(POINTS)?;
    table.retain(|(tier, _, at), _| {
        let tier = TIERS.get(usize::from(tier));
        tier.is_some_and(|tier| at + tier.kept_ms + 2 * tier.bucket_ms >= now_unix_ms)
    })?;
    drop(table);
    txn.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_balance::load::{Capacity, Factors, MachineSample, Usage};

    fn measured(at_unix_ms: u64, cores: f64) -> Measured {
        Measured {
            at_unix_ms,
            load: cores,
            sample: NodeSample {
                capacity: Capacity {
                    cores: 1.0,
                    speed: 1.0,
                    memory_bytes: 1 << 30,
                    io_bytes_per_s: 1e9,
                },
                base: Factors::default(),
                machines: vec![MachineSample {
                    name: "m".into(),
                    factors: Factors {
                        cpu_cores: cores,
                        memory_bytes: 1 << 20,
                        ..Factors::default()
                    },
                    lasted_ms: 0,
                    usage: Usage {
                        working_set_bytes: Some(4096),
                        ..Usage::default()
                    },
                }],
                cpu_pressure: 0.5,
                stall_pressure: 0.0,
            },
            weights: Weights::default(),
        }
    }

    fn range(machine: Option<&str>, since: u64, until: u64) -> HistoryRange {
        HistoryRange {
            machine: machine.map(str::to_owned),
            since_unix_ms: since,
            until_unix_ms: until,
            points_max: 1000,
        }
    }

    #[test]
    fn a_month_is_known_ever_less_finely_and_then_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let recorder = Recorder::open(&folder.path().join("loads.redb")).unwrap();
        let begun = 100 * DAY_MS;
        // One day, one sample every ten seconds: a core in the first half of each minute.
        for at in (0..DAY_MS).step_by(10_000) {
            let cores = if at % 60_000 < 30_000 { 1.0 } else { 0.0 };
            let mut unwritten = lock(&recorder.unwritten);
            unwritten.add(&measured(begun + at, cores));
            drop(unwritten);
            if at % 3_600_000 == 0 {
                keep(&recorder.database, &recorder.unwritten);
            }
        }
        let end = begun + DAY_MS;
        let hour = 3_600_000;
        // A query for the whole range of a tier arrives a little later than its start.
        let all = range(None, end - DAY_MS / 4, end);
        let fine = recorder.read(&all, end + 300).unwrap();
        assert_eq!(fine[0].lasts_ms, 30_000, "2160 points of 10 s in 720");
        let fine = recorder.read(&range(None, end - hour, end), end).unwrap();
        assert_eq!(fine.len(), 360);
        assert_eq!((fine[0].load, fine[3].load), (1.0, 0.0));
        let by_minute = recorder.read(&range(None, begun, end), end).unwrap();
        assert_eq!(by_minute.len(), 720, "1440 minutes in 1000 points at most");
        let minute = &by_minute[7];
        assert!((minute.load - 0.5).abs() < 1e-9 && minute.load_max == 1.0);
        // Machines have no series in seconds.
        let machine = recorder.read(&range(Some("m"), end - hour, end), end);
        let machine = machine.unwrap();
        assert_eq!((machine.len(), machine[0].samples), (60, 6));
        assert_eq!(machine[0].working_set_bytes, Some(4096));
        assert_eq!(
            recorder.read(&range(Some("x"), begun, end), end).unwrap(),
            []
        );

        keep(&recorder.database, &recorder.unwritten);
        prune(&recorder.database, end + 20 * DAY_MS).unwrap();
        let later = end + 20 * DAY_MS;
        let coarse = recorder.read(&range(None, begun, end), later).unwrap();
        assert!((143..=144).contains(&coarse.len()), "{}", coarse.len());
        assert_eq!(coarse[0].lasts_ms, 600_000);
        prune(&recorder.database, end + 40 * DAY_MS).unwrap();
        let all = recorder.read(&range(None, begun, end), end).unwrap();
        assert!(all.len() <= 2, "what is not written yet: {}", all.len());
    }

    #[test]
    fn it_goes_on_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loads.redb");
        // Expired points are deleted at the start.
        let at = keel_store::clock::unix_ms() / 60_000 * 60_000;
        for turn in 0..2u64 {
            let recorder = loop {
                // The writer closes the file after its last handle.
                match Recorder::open(&path) {
                    Ok(recorder) => break recorder,
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            };
            let one = measured(at + turn * 2_000, 1.0 + turn as f64);
            recorder.take(one.at_unix_ms, one.load, &one.sample, one.weights);
            drop(recorder);
        }
        let recorder = loop {
            match Recorder::open(&path) {
                Ok(recorder) => break recorder,
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let read = recorder.read(&range(None, at, at + 10_000), at + 10_000);
        let read = read.unwrap();
        assert_eq!((read.len(), read[0].samples, read[0].load), (1, 2, 1.5));
    }
}
