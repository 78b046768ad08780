//! What a Linux that idles costs beside its QEMU: what its agent takes more for each one, as the
//! agent counts it, and what its worker takes, as the kernel does.

use super::{spec_of, upload};
use crate::metrics::Metrics;
use crate::table::{Table, percentile};
use anyhow::{Context, Result, ensure};
use keel_kind_qemu::QemuKind;
use keel_testkit::linux_system::LinuxSystem;
use keel_testkit::{Guest, LocalCluster};
use procfs::process::Process;
use std::path::Path;
use std::time::Duration;

const SYSTEMS: usize = 10;
const MEMORY_BYTES: u64 = 128 << 20;
/// Until a node, or its systems, have come to rest.
const SETTLE: Duration = Duration::from_secs(20);
const MEASURE: Duration = Duration::from_secs(60);
const MIB: f64 = (1 << 20) as f64;

/// What a process has used: CPU seconds, and MiB of its own.
#[derive(Clone, Copy)]
struct Used {
    cpu_s: f64,
    mib: f64,
}

pub(super) async fn bench(keel: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(linux) = LinuxSystem::make(folder.path())? else {
        return Ok(());
    };
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, &linux.kernel)?;
    let cluster = LocalCluster::start(keel, folder.path(), &["a"]).await?;
    cluster.set_policy("mode", "automatic").await?;
    let mut spec = spec_of(&cluster, &kernel).await?;
    let booted = spec.kernel.as_mut().context("a kernel")?;
    booted.initrd = Some(upload(&cluster, linux.initrd).await?);
    booted.append = LinuxSystem::append("", "keel.idle");
    let own = spec.to_kind_spec().map_err(anyhow::Error::msg)?;

    let (alone, _) = measure(&cluster, &[]).await?;
    let names: Vec<String> = (0..SYSTEMS).map(|number| format!("s{number}")).collect();
    for name in &names {
        let guest = Guest {
            memory_bytes: MEMORY_BYTES,
            kind: Some((QemuKind::kind_name(), own.clone())),
            ..Guest::new(name, "a", &[], &[])
        };
        cluster.run(&guest).await?;
    }
    let (with, workers) = measure(&cluster, &names).await?;
    let systems = SYSTEMS as f64;
    let mut table = Table::new(&["", "share of a core", "MiB"]);
    let mut row = |name: &str, cores: f64, mib: f64| {
        table.row(vec![
            name.to_owned(),
            format!("{:.3} %", cores * 100.0),
            format!("{mib:.1}"),
        ]);
    };
    row("the agent without systems", alone.cpu_s, alone.mib);
    row(
        "the agent, more for each system",
        (with.cpu_s - alone.cpu_s) / systems,
        (with.mib - alone.mib) / systems,
    );
    let (mut cores, mut mib): (Vec<f64>, Vec<f64>) =
        workers.iter().map(|used| (used.cpu_s, used.mib)).unzip();
    row(
        "its worker (p50)",
        percentile(&mut cores, 0.5),
        percentile(&mut mib, 0.5),
    );
    table.print(&format!("{SYSTEMS} Linux systems that idle"));
    Ok(())
}

/// What the agent and workers use at rest, in cores and MiB.
async fn measure(cluster: &LocalCluster, names: &[String]) -> Result<(Used, Vec<Used>)> {
    tokio::time::sleep(SETTLE).await;
    let agent = async || {
        let metrics = Metrics::of(cluster, "a").await?;
        anyhow::Ok(Used {
            cpu_s: metrics.value("keel_agent_cpu_seconds_total")?,
            mib: metrics.value("keel_agent_resident_memory_bytes")? / MIB,
        })
    };
    let workers = || {
        let workers = names.iter().map(|name| worker(cluster, name));
        workers.collect::<Result<Vec<Used>>>()
    };
    let before = (agent().await?, workers()?);
    tokio::time::sleep(MEASURE).await;
    let after = (agent().await?, workers()?);
    let rate = |before: Used, after: Used| Used {
        cpu_s: (after.cpu_s - before.cpu_s) / MEASURE.as_secs_f64(),
        mib: after.mib,
    };
    let workers = before.1.into_iter().zip(after.1);
    Ok((
        rate(before.0, after.0),
        workers.map(|(before, after)| rate(before, after)).collect(),
    ))
}

/// What a machine's worker has used, without its QEMU and what it shares with other processes.
fn worker(cluster: &LocalCluster, name: &str) -> Result<Used> {
    let pids = cluster.worker_pids("a", name);
    ensure!(pids.len() == 1, "{name} has workers {pids:?}");
    let process = Process::new(pids[0])?;
    let stat = process.stat()?;
    let ticks = stat.utime + stat.stime;
    let rollup = process.smaps_rollup()?;
    let own = |name: &str| {
        let maps = rollup.memory_map_rollup.iter();
        maps.filter_map(|map| map.extension.map.get(name))
            .sum::<u64>()
    };
    Ok(Used {
        cpu_s: ticks as f64 / procfs::ticks_per_second() as f64,
        mib: (own("Private_Clean") + own("Private_Dirty")) as f64 / MIB,
    })
}
