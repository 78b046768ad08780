//! What agents cost while nothing is to be done: five nodes with ten idle machines each, the
//! balancer on, as the agents count it themselves in `/metrics`.

use crate::Options;
use crate::metrics::Metrics;
use crate::signals;
use crate::table::{Table, percentile};
use anyhow::Result;
use keel_testkit::{Guest, LocalCluster};
use std::time::Duration;

const NODES: [&str; 5] = ["a", "b", "c", "d", "e"];
/// Machines on each node.
const MACHINES: usize = 10;
/// Time for the balancer and the checkpoints of the start to come to rest.
const SETTLE: Duration = Duration::from_secs(20);
const MEASURE: Duration = Duration::from_secs(60);

pub(crate) fn bench(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let measured = runtime.block_on(signals::until(measure(options)))?;
    let mut table = Table::new(&["agents", "machines", "cores p50", "most", "MiB p50", "most"]);
    let (mut cores, mut mib): (Vec<f64>, Vec<f64>) = measured.into_iter().unzip();
    let mut row = vec![
        NODES.len().to_string(),
        (NODES.len() * MACHINES).to_string(),
    ];
    for share in [0.5, 1.0] {
        row.push(format!("{:.4}", percentile(&mut cores, share)));
    }
    for share in [0.5, 1.0] {
        row.push(format!("{:.1}", percentile(&mut mib, share)));
    }
    table.row(row);
    table.print("Agents at rest");
    Ok(())
}

/// Cores and MiB of each agent.
async fn measure(options: &Options) -> Result<Vec<(f64, f64)>> {
    let keel = options.program()?;
    let module = std::fs::read(options.guests.join("witness.wasm"))?;
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start_replicated(&keel, folder.path(), &NODES).await?;
    cluster.set_policy("mode", "automatic").await?;
    for (at, node) in NODES.into_iter().enumerate() {
        for number in 0..MACHINES {
            let name = format!("m{at}-{number}");
            let file = folder.path().join(&name).display().to_string();
            // A line each second.
            let args = [file.as_str(), "1", "1000000"];
            let guest = Guest {
                volume: Some(folder.path()),
                ..Guest::new(&name, node, &module, &args)
            };
            cluster.run(&guest).await?;
        }
    }
    tokio::time::sleep(SETTLE).await;
    let before = figures(&cluster).await?;
    tokio::time::sleep(MEASURE).await;
    let after = figures(&cluster).await?;
    let used = before.iter().zip(&after);
    Ok(used
        .map(|((before, _), (after, mib))| ((after - before) / MEASURE.as_secs_f64(), *mib))
        .collect())
}

/// CPU seconds and MiB of each agent.
async fn figures(cluster: &LocalCluster) -> Result<Vec<(f64, f64)>> {
    let mut figures = Vec::new();
    for node in NODES {
        let metrics = Metrics::of(cluster, node).await?;
        let mib = metrics.value("keel_agent_resident_memory_bytes")? / f64::from(1 << 20);
        figures.push((metrics.value("keel_agent_cpu_seconds_total")?, mib));
    }
    Ok(figures)
}
