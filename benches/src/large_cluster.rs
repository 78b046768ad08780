//! What a cluster of 1,000 nodes with 20,000 machines costs the leader of its store: the store is
//! the real one, in the agents of three nodes; the other nodes are simulated by clients that do what
//! an agent does with the store: each has a connection and a lease of its own, renews it, and
//! follows what agents follow. Machines are records that such nodes own, and change as if machines
//! moved and made checkpoints.
//!
//! Clients, followers and leader share this computer. Each simulated node would have processors of
//! its own, so the clients get only what the agents leave; what they still take is missing
//! elsewhere: latencies are upper bounds.

use crate::Options;
use crate::metrics::Metrics;
use crate::signals;
use crate::table::{Table, percentile};
use anyhow::{Context, Result, ensure};
use keel_api::StoreInfo;
use keel_cluster::identity::NodeIdentity;
use keel_net::{NodeName, Peers};
use keel_store::keys;
use keel_store::{Backup, KeyValue, LeaseId, Store, StoreClient, Txn, TxnOutcome};
use keel_testkit::{Guest, LocalCluster};
use rand::RngExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

/// The nodes that hold the store.
const VOTERS: [&str; 3] = ["a", "b", "c"];
/// The node and the machine whose entries those of the others are made from: their names have the
/// length of all others', so that they can be replaced in encoded values.
const NODE: &str = "n0000";
const MACHINE: &str = "m00000";
const NODES: usize = 1_000;
const MACHINES: usize = 20_000;
/// Machines' records that change in a second: each machine moves once an hour, in three steps.
const RECORDS_PER_S: f64 = 17.0;
/// Checkpoints in a second: a tenth of the machines has high availability, with the default interval
/// of 10 s.
const CHECKPOINTS_PER_S: f64 = 200.0;
/// Entries that are written at once.
const BATCH: usize = 100;
/// Pause between the first connections of two nodes.
const NODE_EVERY: Duration = Duration::from_millis(10);
const SETTLE: Duration = Duration::from_secs(10);
const MEASURE: Duration = Duration::from_secs(60);
const TIMEOUT: Duration = Duration::from_secs(10);
/// Parts of a lease's time after which it is renewed.
const RENEWALS: u64 = 5;

/// The nice value of threads that run beside all others.
const LOWEST_PRIORITY: i32 = 19;

/// What the simulated nodes counted.
#[derive(Default)]
struct Counted {
    measures: AtomicBool,
    ends: AtomicBool,
    renewals: AtomicU64,
    /// Leases that ended, or could not be renewed in time.
    lost: AtomicU64,
    changes: AtomicU64,
    /// Watches that had to begin again.
    ended: AtomicU64,
    renewal_ms: Mutex<Vec<f64>>,
    txn_ms: Mutex<Vec<f64>>,
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    // The threads of the simulated nodes; not this one.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .on_thread_start(|| {
            let _ = rustix::process::nice(LOWEST_PRIORITY);
        })
        .build()?;
    runtime.block_on(signals::until(measure(options)))
}

async fn measure(options: &Options) -> Result<()> {
    let keel = options.program()?;
    let folder = tempfile::tempdir()?;
    let mut cluster = LocalCluster::start_replicated(&keel, folder.path(), &VOTERS).await?;
    let module = std::fs::read(options.guests.join("witness.wasm"))?;
    let (state, backup) = example(&mut cluster, folder.path(), &module).await?;
    let store: StoreInfo = cluster.client(VOTERS[0]).get("/v1/store").await?;
    let identity = NodeIdentity::load(&state)?.context("the node has no identity")?;
    let connect = || connect(&identity, &store);
    let machines = fill(&*connect()?, &backup).await?;
    eprintln!("{} nodes, {MACHINES} machines are recorded", NODES);

    let counted = Arc::new(Counted::default());
    let mut tasks = JoinSet::new();
    for number in 1..=NODES {
        let client = connect()?;
        tasks.spawn(node(client, node_name(number), counted.clone()));
        tokio::time::sleep(NODE_EVERY).await;
    }
    // On a thread of their own: the answers must not wait here for what thousand nodes are told.
    let changing = {
        let machines = Arc::new(machines);
        let (records, checkpoints) = (connect()?, connect()?);
        let counted = counted.clone();
        std::thread::spawn(move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let of = |client, per_s, change| {
                changes(client, machines.clone(), counted.clone(), per_s, change)
            };
            runtime.block_on(async {
                tokio::try_join!(
                    of(records, RECORDS_PER_S, change_record),
                    of(checkpoints, CHECKPOINTS_PER_S, change_checkpoint as Change),
                )
            })?;
            Ok(())
        })
    };
    tokio::time::sleep(SETTLE).await;
    let leader = store.voters.iter().find(|voter| voter.leads);
    let leader = leader.context("nobody leads")?.node.clone();
    counted.measures.store(true, Ordering::Relaxed);
    let before = cpu(&cluster).await?;
    let begun = Instant::now();
    tokio::time::sleep(MEASURE).await;
    counted.measures.store(false, Ordering::Relaxed);
    let after = cpu(&cluster).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let now: StoreInfo = cluster.client(VOTERS[0]).get("/v1/store").await?;
    let leads = now.voters.iter().any(|it| it.leads && it.node == leader);
    ensure!(leads, "{leader} does not lead any more");
    counted.ends.store(true, Ordering::Relaxed);
    tasks.shutdown().await;
    let changed = tokio::task::spawn_blocking(|| changing.join()).await?;
    changed.map_err(|_| anyhow::anyhow!("the thread that changes records panicked"))??;

    let mut table = Table::new(&["agent", "role", "cores", "MiB"]);
    for ((before, after), name) in before.iter().zip(&after).zip(VOTERS) {
        let role = if name == leader { "leads" } else { "follows" };
        let cores = (after.0 - before.0) / seconds;
        let mib = format!("{:.0}", after.1);
        table.row(vec![name.into(), role.into(), format!("{cores:.3}"), mib]);
    }
    table.print("What a large cluster costs the agents that hold its store");
    let per_s = |count: &AtomicU64| count.load(Ordering::Relaxed) as f64 / seconds;
    let mut table = Table::new(&[
        "nodes",
        "machines",
        "watches",
        "renewals /s",
        "p50 ms",
        "p99 ms",
        "lost leases",
        "txns /s",
        "p50 ms",
        "p99 ms",
        "changes told /s",
        "watches ended",
    ]);
    let (mut renewal, mut txn) = (counted.renewal_ms.lock().await, counted.txn_ms.lock().await);
    table.row(vec![
        NODES.to_string(),
        MACHINES.to_string(),
        (NODES * followed(NODE).len()).to_string(),
        format!("{:.0}", per_s(&counted.renewals)),
        format!("{:.1}", percentile(&mut renewal, 0.5)),
        format!("{:.1}", percentile(&mut renewal, 0.99)),
        counted.lost.load(Ordering::Relaxed).to_string(),
        format!("{:.0}", txn.len() as f64 / seconds),
        format!("{:.1}", percentile(&mut txn, 0.5)),
        format!("{:.1}", percentile(&mut txn, 0.99)),
        format!("{:.0}", per_s(&counted.changes)),
        counted.ended.load(Ordering::Relaxed).to_string(),
    ]);
    table.print("Its requests, as the simulated nodes see them");
    Ok(())
}

/// CPU seconds and MiB of each agent.
async fn cpu(cluster: &LocalCluster) -> Result<Vec<(f64, f64)>> {
    let mut figures = Vec::new();
    for node in VOTERS {
        let metrics = Metrics::of(cluster, node).await?;
        let mib = metrics.value("keel_agent_resident_memory_bytes")? / f64::from(1 << 20);
        figures.push((metrics.value("keel_agent_cpu_seconds_total")?, mib));
    }
    Ok(figures)
}

/// A node with a machine, which is off again: its folder, and all entries of the store.
async fn example(
    cluster: &mut LocalCluster,
    folder: &Path,
    module: &[u8],
) -> Result<(std::path::PathBuf, Backup)> {
    cluster.join_via(NODE, VOTERS[0]).await?;
    let file = folder.join(MACHINE).display().to_string();
    let args = [file.as_str(), "1", "1000000"];
    let guest = Guest {
        volume: Some(folder),
        ..Guest::new(MACHINE, NODE, module, &args)
    };
    cluster.run(&guest).await?;
    let mut answer = cluster
        .client(VOTERS[0])
        .get_stream("/v1/store/backup")
        .await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        bytes.extend_from_slice(&chunk);
    }
    cluster.power_off(NODE);
    Ok((cluster.folder(NODE), Backup::decode(&bytes)?))
}

fn connect(identity: &NodeIdentity, store: &StoreInfo) -> Result<Arc<StoreClient>> {
    let peers = Peers::new(identity.client_tls()?, keel_net::Options::default());
    let mut names = Vec::new();
    for voter in &store.voters {
        let name = NodeName::new(&voter.node)?;
        peers.set_address(&name, &voter.address);
        names.push(name);
    }
    Ok(Arc::new(StoreClient::new(Arc::new(peers), names, TIMEOUT)))
}

fn node_name(number: usize) -> String {
    format!("n{number:04}")
}

fn machine_name(number: usize) -> String {
    format!("m{number:05}")
}

/// Records all nodes and machines, as copies of the example's entries; returns the machines'.
async fn fill(store: &dyn Store, backup: &Backup) -> Result<Vec<KeyValue>> {
    let of = |prefix: &str| {
        let mine = backup
            .entries
            .iter()
            .filter(|it| it.key.starts_with(prefix));
        let named = |key: &str| key.split('/').any(|part| part == NODE || part == MACHINE);
        mine.filter(|it| named(&it.key))
            .cloned()
            .collect::<Vec<KeyValue>>()
    };
    let of_node = [of(keys::MEMBERS), of(keys::NODES)].concat();
    let of_machine = [of(keys::MACHINES), of(keys::SCHEDULES)].concat();
    ensure!(
        of_node.len() == 2 && of_machine.len() == 2,
        "a node and a machine have other entries than was expected"
    );
    let copied = |entry: &KeyValue, node: &str, machine: &str| {
        let key = entry.key.replace(NODE, node).replace(MACHINE, machine);
        let value = replaced(&entry.value, NODE.as_bytes(), node.as_bytes());
        let value = replaced(&value, MACHINE.as_bytes(), machine.as_bytes());
        (key, value)
    };
    let mut entries = Vec::new();
    for number in 1..=NODES {
        let name = node_name(number);
        entries.extend(of_node.iter().map(|entry| copied(entry, &name, MACHINE)));
    }
    for number in 1..=MACHINES {
        let node = node_name(1 + number % NODES);
        let name = machine_name(number);
        entries.extend(of_machine.iter().map(|entry| copied(entry, &node, &name)));
    }
    for batch in entries.chunks(BATCH) {
        let txn = batch.iter().fold(Txn::new(), |txn, (key, value)| {
            txn.put(key.clone(), value.clone())
        });
        store.txn(txn).await?;
    }
    let listing = store.list(keys::MACHINES).await?;
    let example = format!("{}{MACHINE}", keys::MACHINES);
    let mut machines = listing.entries;
    machines.retain(|entry| entry.key != example);
    ensure!(machines.len() == MACHINES, "{} machines", machines.len());
    Ok(machines)
}

/// A value with another name of the same length.
fn replaced(value: &[u8], name: &[u8], other: &[u8]) -> Vec<u8> {
    let mut value = value.to_vec();
    let mut at = 0;
    while at + name.len() <= value.len() {
        if value[at..].starts_with(name) {
            value[at..at + name.len()].copy_from_slice(other);
        }
        at += 1;
    }
    value
}

/// What an agent follows in the store.
fn followed(node: &str) -> Vec<String> {
    let schedule = format!("{}{node}/", keys::SCHEDULES);
    let mut all = vec![schedule.clone(), schedule];
    let prefixes = [
        keys::ALIVE,
        keys::MACHINES,
        keys::CODE,
        keys::NODE_LABELS,
        keys::MACHINE_LABELS,
        keys::DRAINS,
        "voters",
        "authorities",
        "policy",
        "rules",
        "gossip-keys",
        // Roles that another node has.
        "lease/failover",
        "lease/node-events",
        "lease/gossip-keys",
    ];
    all.extend(prefixes.map(str::to_owned));
    all
}

/// What a node's agent does with the store.
async fn node(client: Arc<StoreClient>, name: String, counted: Arc<Counted>) -> Result<()> {
    let ttl_ms = client.node_lease_ms();
    let mut lease = attach(&*client, &name, ttl_ms).await?;
    let mut watches = JoinSet::new();
    let revision = client.revision().await?;
    for prefix in followed(&name) {
        watches.spawn(follow(client.clone(), prefix, revision, counted.clone()));
    }
    let mut ticks = tokio::time::interval(Duration::from_millis(ttl_ms / RENEWALS));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let sent = Instant::now();
        let renewed = client.lease_renew(lease).await;
        let took = sent.elapsed();
        if counted.measures.load(Ordering::Relaxed) {
            counted.renewals.fetch_add(1, Ordering::Relaxed);
            let mut all = counted.renewal_ms.lock().await;
            all.push(took.as_secs_f64() * 1e3);
            let lease_time = Duration::from_millis(ttl_ms - ttl_ms / RENEWALS);
            if renewed.is_err() || took > lease_time {
                counted.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        if renewed.is_err() {
            lease = attach(&*client, &name, ttl_ms).await?;
        }
    }
}

async fn attach(store: &dyn Store, name: &str, ttl_ms: u64) -> Result<LeaseId> {
    let lease = store.lease_grant(ttl_ms).await?;
    let alive = format!("{}{name}", keys::ALIVE);
    store.txn(Txn::new().put_leased(alive, name, lease)).await?;
    Ok(lease)
}

async fn follow(
    client: Arc<StoreClient>,
    prefix: String,
    mut revision: u64,
    counted: Arc<Counted>,
) -> Result<()> {
    loop {
        let mut watch = client.watch(&prefix, revision + 1).await?;
        while let Some(Ok(changes)) = watch.next().await {
            if counted.measures.load(Ordering::Relaxed) {
                let many = changes.changes.len() as u64;
                counted.changes.fetch_add(many, Ordering::Relaxed);
            }
        }
        counted.ended.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(TIMEOUT / 10).await;
        revision = client.revision().await?;
    }
}

type Change = fn(&KeyValue) -> (String, Vec<u8>);

/// A machine's record is written again, as when it moves.
fn change_record(machine: &KeyValue) -> (String, Vec<u8>) {
    (machine.key.clone(), machine.value.clone())
}

/// A machine has another checkpoint that survives the loss of its node.
fn change_checkpoint(machine: &KeyValue) -> (String, Vec<u8>) {
    let name = machine.key.trim_start_matches(keys::MACHINES);
    (format!("{}{name}", keys::IN_SYNC), vec![7; 200])
}

/// Changes something of random machines, at a rate, each in a transaction of its own.
async fn changes(
    client: Arc<StoreClient>,
    machines: Arc<Vec<KeyValue>>,
    counted: Arc<Counted>,
    per_s: f64,
    change: Change,
) -> Result<()> {
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / per_s));
    let mut running = JoinSet::new();
    while !counted.ends.load(Ordering::Relaxed) {
        ticks.tick().await;
        while running.try_join_next().is_some() {}
        let number = rand::rng().random_range(0..machines.len());
        let (key, value) = change(&machines[number]);
        let (client, counted) = (client.clone(), counted.clone());
        running.spawn(async move {
            let sent = Instant::now();
            let outcome = client.txn(Txn::new().put(key, value)).await;
            if counted.measures.load(Ordering::Relaxed) {
                let mut all = counted.txn_ms.lock().await;
                match outcome {
                    Ok(TxnOutcome::Committed { .. }) => {
                        all.push(sent.elapsed().as_secs_f64() * 1e3);
                    }
                    _ => all.push(f64::INFINITY),
                }
            }
        });
    }
    Ok(())
}
