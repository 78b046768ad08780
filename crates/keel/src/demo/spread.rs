//! The second step of the demo: a program with threads outgrows its node. A renderer is started on
//! one node, gets parts on the others by balancing, and its threads move there; a machine with
//! much memory evicts unused pages. The renderer's pictures are the same as those of a run on one
//! node.

use super::{HOT, RENDER, SharedScene, headline, look};
use anyhow::{Context, Result, ensure};
use keel_api::{LedgerInfo, ObjectInfo, PartsInfo};
use keel_balance::ledger::Decision;
use keel_testkit::{Guest, LocalCluster, wait_for};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

/// Width and height of a picture.
const SIZE: (&str, &str) = ("480", "320");
const WORKERS: &str = "6";
/// Pictures that are rendered again on one node.
const COMPARED: usize = 4;
/// MiB of the machine with much memory, and the limit of one part.
const MEMORY_MIB: &str = "48";
const PART_MIB: u64 = 24;

/// The result for both machines.
#[derive(Debug, Serialize)]
pub(super) struct Spread {
    /// Decisions about threads and memory, as text.
    pub(super) decisions: Vec<String>,
    /// Threads of each node in the end.
    pub(super) threads: BTreeMap<String, u32>,
    /// MiB of the other machine's memory on each node.
    pub(super) memory_mib: BTreeMap<String, u64>,
    /// Pictures that are the same when rendered on all nodes and on one.
    pub(super) pictures: usize,
    /// Milliseconds until both were spread.
    pub(super) took_ms: u64,
}

/// Lets a program spread over the nodes by balancing; returns the decisions and the result.
pub(super) async fn play(
    scene: &SharedScene,
    cluster: &LocalCluster,
    program: &Path,
    folder: &Path,
    nodes: &[&str],
) -> Result<Spread> {
    let home = *nodes.first().context("no node")?;
    cluster.set_policy("mode", "automatic").await?;
    // Twice the usual rate, for the audience.
    cluster.set_policy("sample_ms", "500").await?;
    headline(
        scene,
        &format!("starting a renderer with {WORKERS} threads on node {home}"),
    );
    let args = [WORKERS, SIZE.0, SIZE.1, "1000000"];
    let mut render = Guest::new("render", home, RENDER, &args);
    render.balancing.parts_max = u32::try_from(nodes.len()).ok();
    cluster.run(&render).await?;
    let args = [MEMORY_MIB, "1"];
    let mut hot = Guest::new("hot", home, HOT, &args);
    hot.balancing.parts_max = u32::try_from(nodes.len()).ok();
    hot.balancing.part_memory_bytes = Some(PART_MIB << 20);
    cluster.run(&hot).await?;
    let begun = Instant::now();
    headline(
        scene,
        "its threads move to free cores, and idle memory to nodes with room",
    );
    let spread = wait_for("both are spread over the nodes", || async {
        look(scene, cluster).await;
        let threads = threads(cluster, home, "render").await.ok()?;
        let memory = memory(cluster, home, "hot").await.ok()?;
        let everywhere = nodes.iter().all(|node| threads.contains_key(*node));
        let fits = memory.len() > 1 && memory.values().all(|mib| *mib <= PART_MIB + 1);
        (everywhere && fits).then_some((threads, memory))
    });
    let (threads, memory_mib) = spread.await?;
    let took_ms = begun.elapsed().as_millis() as u64;
    headline(
        scene,
        "rendering the same pictures on one node, for comparison",
    );
    let before = lines(cluster, home).await?.len();
    let drawn = wait_for("pictures by all nodes", || async {
        look(scene, cluster).await;
        let lines = lines(cluster, home).await.ok()?;
        (lines.len() > before + COMPARED).then_some(lines)
    });
    let drawn = drawn.await?;
    let first = drawn.len() - COMPARED;
    let alone = alone(program, folder, first).await?;
    let same = drawn[first..] == alone[..];
    ensure!(
        same,
        "pictures differ: {:?}, on one node {alone:?}",
        &drawn[first..]
    );
    let decisions = decisions(cluster, home).await?;
    if let Some(last) = decisions.last() {
        headline(scene, last);
    }
    cluster.set_policy("mode", "off").await?;
    cluster.set_policy("sample_ms", "1000").await?;
    for name in ["render", "hot"] {
        cluster.end(home, name).await?;
    }
    Ok(Spread {
        decisions,
        threads,
        memory_mib,
        pictures: COMPARED,
        took_ms,
    })
}

/// Number of threads on each node.
async fn threads(
    cluster: &LocalCluster,
    via: &str,
    machine: &str,
) -> Result<BTreeMap<String, u32>> {
    let path = keel_api::path(["machines", machine, "parts"]);
    let info: PartsInfo = cluster.client(via).get(&path).await?;
    let mut threads = BTreeMap::new();
    for part in info.parts.into_iter().filter(|part| part.threads > 0) {
        *threads.entry(part.node).or_default() += part.threads;
    }
    Ok(threads)
}

/// MiB of the machine on each node.
async fn memory(cluster: &LocalCluster, via: &str, machine: &str) -> Result<BTreeMap<String, u64>> {
    let path = keel_api::path(["machines", machine, "objects"]);
    let objects: Vec<ObjectInfo> = cluster.client(via).get(&path).await?;
    let mut bytes: BTreeMap<String, u64> = BTreeMap::new();
    for object in objects {
        *bytes.entry(object.node).or_default() += object.bytes;
    }
    Ok(bytes
        .into_iter()
        .map(|(node, it)| (node, it >> 20))
        .collect())
}

/// The complete lines of its output.
async fn lines(cluster: &LocalCluster, via: &str) -> Result<Vec<String>> {
    let output = cluster.output(via, "render").await?;
    let whole = output.rfind('\n').map_or("", |end| &output[..end]);
    Ok(whole.lines().map(str::to_owned).collect())
}

/// The same pictures, rendered by one process.
async fn alone(program: &Path, folder: &Path, first: usize) -> Result<Vec<String>> {
    let module = folder.join("render.wasm");
    tokio::fs::write(&module, RENDER).await?;
    let output = tokio::process::Command::new(program)
        .arg("wasm")
        .arg(&module)
        .args([WORKERS, SIZE.0, SIZE.1])
        .args([COMPARED.to_string(), first.to_string()])
        .output()
        .await
        .context("keel wasm")?;
    ensure!(
        output.status.success(),
        "keel wasm: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().map(str::to_owned).collect())
}

async fn decisions(cluster: &LocalCluster, via: &str) -> Result<Vec<String>> {
    let ledger: LedgerInfo = cluster.client(via).get("/v1/ledger?limit=1000").await?;
    let decisions = ledger.lines.iter().map(|line| &line.decision);
    Ok(decisions
        .filter(|it| matches!(it, Decision::FineGrained { .. }))
        .map(ToString::to_string)
        .collect())
}
