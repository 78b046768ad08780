//! Failover: a node with a machine of 64 MiB is switched off again and again, whether or not it
//! leads the store. How long the machine writes nothing, and how long the store answers nothing:
//! both as seen from outside, by a file that all nodes see and by linearizable reads at a node that
//! stays.

use crate::Options;
use crate::signals;
use crate::table::{Table, percentile};
use anyhow::{Context, Result, ensure};
use keel_api::{MachineInfo, StoreInfo};
use keel_machine::high_availability::{Fence, HighAvailability};
use keel_machine::moves::Ending;
use keel_testkit::witness::{Evidence, examine};
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub(crate) const NODES: [&str; 3] = ["a", "b", "c"];
const NAME: &str = "witness";
/// Of the witness's memory.
const MIB: &str = "64";
/// Pause between two looks at the file, and between two reads of the store.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Lines between two failures.
const LINES: u64 = 200;
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Figures {
    /// Seconds in which the machine wrote nothing, for each failure.
    machine: Vec<f64>,
    /// Seconds in which the store answered nothing.
    store: Vec<f64>,
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    let keel = options.program()?;
    let module = std::fs::read(options.guests.join("witness.wasm"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let (led, others) =
        runtime.block_on(signals::until(measure(&keel, &module, options.failures)))?;
    let mut table = Table::new(&[
        "the node that fails",
        "failures",
        "machine p50 s",
        "p95 s",
        "longest s",
        "store p50 s",
        "p95 s",
        "longest s",
    ]);
    let all = Figures {
        machine: [&led.machine[..], &others.machine].concat(),
        store: [&led.store[..], &others.store].concat(),
    };
    for (name, mut of) in [
        ("leads the store", led),
        ("does not", others),
        ("either", all),
    ] {
        let mut row = vec![name.to_owned(), of.machine.len().to_string()];
        for values in [&mut of.machine, &mut of.store] {
            for share in [0.5, 0.95, 1.0] {
                row.push(format!("{:.2}", percentile(values, share)));
            }
        }
        table.row(row);
    }
    table.print("Failover of a machine of 64 MiB, and of the store");
    Ok(())
}

pub(crate) fn evidence(file: &Path) -> Result<Evidence> {
    examine(&std::fs::read_to_string(file).unwrap_or_default())
}

/// Waits until the witness has written `lines` lines under `epochs` epochs.
async fn written(file: &Path, epochs: u64, lines: u64) -> Result<Evidence> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = evidence(file)?;
        if found.epochs >= epochs && found.lines >= lines {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "the witness does not write");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The figures of failures of the store's leader, and of others.
async fn measure(keel: &Path, module: &[u8], failures: usize) -> Result<(Figures, Figures)> {
    let folder = tempfile::tempdir()?;
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared)?;
    let file = shared.join(NAME);
    let mut cluster = LocalCluster::start_replicated(keel, folder.path(), &NODES).await?;
    let path = file.display().to_string();
    let args = [path.as_str(), MIB, "1000"];
    cluster
        .run(&Guest {
            volume: Some(&shared),
            ha: Some(HighAvailability {
                checkpoint_every_ms: 1000,
                fence: Fence::Timer,
                ..HighAvailability::default()
            }),
            ..Guest::new(NAME, "c", module, &args)
        })
        .await?;
    let (mut led, mut others) = (Figures::default(), Figures::default());
    let mut stays = "a";
    for number in 0..failures {
        let mut machine = settled(&cluster, stays).await?;
        let leader = leader(&cluster, stays).await?;
        // Every second time it is the leader that fails.
        if number % 2 == 0 && machine.node != leader {
            let report = cluster.move_machine(stays, NAME, &leader).await?;
            ensure!(report.ending == Ending::Moved, "{}", report.line());
            machine = settled(&cluster, stays).await?;
        }
        let node = machine.node.clone();
        let before = evidence(&file)?;
        let before = written(&file, before.epochs, before.lines + LINES).await?;
        stays = NODES.into_iter().find(|it| *it != node).unwrap_or("a");
        let reads = StoreReads::begin(&cluster, stays);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let begun = Instant::now();
        cluster.power_off(&node);
        written(&file, before.epochs + 1, before.lines).await?;
        let machine = begun.elapsed().as_secs_f64();
        let store = reads.end(begun).await?.as_secs_f64();
        let is_leader = leader == node;
        let of = if is_leader { &mut led } else { &mut others };
        of.machine.push(machine);
        of.store.push(store);
        eprintln!(
            "{number}: {node} off{}: machine {machine:.2} s, store {store:.2} s",
            if is_leader {
                ", which led the store"
            } else {
                ""
            }
        );
        cluster.power_on(&node).await?;
    }
    let found = evidence(&file)?;
    eprintln!(
        "{} lines under {} epochs, {} rewinds, {} lines repeated",
        found.lines, found.epochs, found.rewinds, found.repeated
    );
    Ok((led, others))
}

/// Waits until the machine runs and another node has its checkpoint, and the store three voters.
async fn settled(cluster: &LocalCluster, ask: &str) -> Result<MachineInfo> {
    wait_for("another node has the checkpoint", || async {
        let machine = cluster.inspect(ask, NAME).await.ok()?;
        let is_safe = machine.in_sync.len() > 1 && machine.in_sync.contains(&machine.node);
        let nodes: Vec<keel_api::NodeInfo> = cluster.client(ask).get("/v1/nodes").await.ok()?;
        let are_alive = nodes.iter().all(|node| node.alive);
        (is_safe && are_alive && machine.status == "running").then_some(machine)
    })
    .await
}

pub(crate) async fn leader(cluster: &LocalCluster, ask: &str) -> Result<String> {
    let store: StoreInfo = cluster.client(ask).get("/v1/store").await?;
    let leader = store.voters.into_iter().find(|voter| voter.leads);
    Ok(leader.context("the store has no leader")?.node)
}

/// Linearizable reads at a node, one after the other.
struct StoreReads {
    over: Arc<AtomicBool>,
    /// When each was answered.
    answers: tokio::task::JoinHandle<Vec<Instant>>,
}

impl StoreReads {
    fn begin(cluster: &LocalCluster, node: &str) -> Self {
        let client = cluster.client(node);
        let over = Arc::new(AtomicBool::new(false));
        let until = over.clone();
        let answers = tokio::spawn(async move {
            let mut answers = Vec::new();
            while !until.load(Ordering::Relaxed) {
                let read: Result<Vec<String>, _> =
                    client
                        .get("/v1/volumes")
                        .await
                        .map(|volumes: Vec<serde_json::Value>| {
                            volumes.iter().map(ToString::to_string).collect()
                        });
                if read.is_ok() {
                    answers.push(Instant::now());
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
            answers
        });
        StoreReads { over, answers }
    }

    /// The longest time without an answer from a moment on.
    async fn end(self, from: Instant) -> Result<Duration> {
        self.over.store(true, Ordering::Relaxed);
        let answers = self.answers.await?;
        let after: Vec<Instant> = answers.into_iter().filter(|at| *at > from).collect();
        ensure!(!after.is_empty(), "the store did not answer again");
        let gaps =
            std::iter::once(after[0] - from).chain(after.windows(2).map(|pair| pair[1] - pair[0]));
        Ok(gaps.max().unwrap_or_default())
    }
}
