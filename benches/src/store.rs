//! Transactions of the store beside those of etcd, on the same disk and in turns: clients that each
//! replace a value of their own under the condition that nobody else did. The embedded store's
//! voters run in this process and speak TLS; etcd's members are processes and do not.

use crate::Options;
use crate::signals;
use crate::table::{Table, percentile};
use anyhow::{Context, Result, ensure};
use keel_store::{EtcdOptions, EtcdStore, RaftOptions, Store, Txn, TxnOutcome};
use keel_testkit::{Etcd, Group};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of a value; a machine's record has about as many.
const VALUE_BYTES: usize = 512;
/// Clients at once.
const CLIENTS: [usize; 4] = [1, 8, 64, 256];
/// Connections that they share.
const CONNECTIONS: usize = 8;
/// Time of one measurement.
const SECONDS: f64 = 4.0;

/// Transactions of one engine with a number of clients.
#[derive(Default)]
struct Figures {
    per_s: Vec<f64>,
    ms: Vec<f64>,
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let mut table = Table::new(&[
        "voters",
        "clients",
        "ours /s",
        "p50 ms",
        "p99 ms",
        "etcd /s",
        "p50 ms",
        "p99 ms",
        "throughput",
    ]);
    for voters in [1, 3] {
        let measured = measure(voters, options.store_rounds);
        let rows = runtime.block_on(signals::until(measured))?;
        for (clients, mut ours, mut etcd) in rows {
            let per_s = percentile(&mut ours.per_s, 0.5);
            let peer = percentile(&mut etcd.per_s, 0.5);
            let mut row = vec![voters.to_string(), clients.to_string()];
            for (per_s, figures) in [(per_s, &mut ours), (peer, &mut etcd)] {
                row.push(format!("{per_s:.0}"));
                for share in [0.5, 0.99] {
                    row.push(format!("{:.2}", percentile(&mut figures.ms, share)));
                }
            }
            row.push(format!("{:.2}", per_s / peer));
            table.row(row);
        }
    }
    table.print("Transactions of the store beside etcd");
    Ok(())
}

async fn measure(voters: usize, rounds: usize) -> Result<Vec<(usize, Figures, Figures)>> {
    let group = match voters {
        1 => Group::of_one(RaftOptions::default()).await?,
        _ => Group::of_three(RaftOptions::default()).await?,
    };
    let etcd = Etcd::start(voters)?.context("no etcd here (apt-get install etcd-server)")?;
    let options = EtcdOptions::from_address(&etcd.address("bench"));
    let options = options.map_err(anyhow::Error::msg)?;
    let mut ours: Vec<Arc<dyn Store>> = Vec::new();
    let mut theirs: Vec<Arc<dyn Store>> = Vec::new();
    for _ in 0..CONNECTIONS {
        ours.push(group.client()?);
        theirs.push(Arc::new(EtcdStore::connect(&options).await?));
    }
    let mut rows = Vec::new();
    for clients in CLIENTS {
        let mut figures = (Figures::default(), Figures::default());
        for round in 0..rounds {
            let mut turns = [(&ours, &mut figures.0), (&theirs, &mut figures.1)];
            if round % 2 == 1 {
                turns.reverse();
            }
            for (stores, figures) in turns {
                run(stores, clients, figures).await?;
            }
        }
        rows.push((clients, figures.0, figures.1));
    }
    Ok(rows)
}

async fn run(stores: &[Arc<dyn Store>], clients: usize, figures: &mut Figures) -> Result<()> {
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..clients {
        let store = stores[client % stores.len()].clone();
        tasks.spawn(replace(store, format!("bench/{client}"), begun));
    }
    let mut done = 0;
    while let Some(times) = tasks.join_next().await {
        let times = times??;
        done += times.len();
        figures
            .ms
            .extend(times.iter().map(|time| time.as_secs_f64() * 1e3));
    }
    figures
        .per_s
        .push(done as f64 / begun.elapsed().as_secs_f64());
    Ok(())
}

/// The time of each transaction of one client.
async fn replace(store: Arc<dyn Store>, key: String, begun: Instant) -> Result<Vec<Duration>> {
    let mut revision = store.get(&key).await?.map(|entry| entry.modified);
    let mut times = Vec::new();
    while begun.elapsed().as_secs_f64() < SECONDS {
        let txn = match revision {
            None => Txn::new().when_absent(key.clone()),
            Some(revision) => Txn::new().when_modified_at(key.clone(), revision),
        };
        let sent = Instant::now();
        let outcome = store
            .txn(txn.put(key.clone(), vec![7; VALUE_BYTES]))
            .await?;
        times.push(sent.elapsed());
        match outcome {
            TxnOutcome::Committed { revision: at } => revision = Some(at),
            refused => ensure!(false, "{key} is another's: {refused:?}"),
        }
    }
    Ok(times)
}
