//! The first step of the demo: the load of a hot node is balanced. Busy machines are started on
//! one node, without any request to move them.

use super::{SPINNER, SharedScene, headline, look};
use anyhow::{Context, Result};
use keel_api::{LedgerInfo, MachineInfo};
use keel_balance::ledger::Decision;
use keel_testkit::{Guest, LocalCluster};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Instant;

/// Number of busy machines.
const BURNERS: usize = 6;
/// The largest difference between machine counts of balanced nodes: one machine cannot be split.
const APART_MAX: usize = 2;

/// The result of balancing the hot node.
#[derive(Debug, Serialize)]
pub(super) struct HotNodeReport {
    /// The balancer's decisions, as text.
    pub(super) decisions: Vec<String>,
    /// Machines of each node in the end.
    pub(super) machines: BTreeMap<String, usize>,
    /// Milliseconds from the last machine's start until the nodes were balanced.
    pub(super) took_ms: u64,
}

/// Lets the cluster balance itself; returns the decisions and the result.
pub(super) async fn play(
    scene: &SharedScene,
    cluster: &LocalCluster,
    nodes: &[&str],
) -> Result<HotNodeReport> {
    let hot = *nodes.first().context("no node")?;
    cluster.set_policy("mode", "automatic").await?;
    headline(
        scene,
        &format!("starting {BURNERS} busy machines on node {hot}"),
    );
    for number in 0..BURNERS {
        let name = format!("burn-{number}");
        cluster
            .run(&Guest::new(&name, hot, SPINNER, &["0", "20000000"]))
            .await?;
    }
    let begun = Instant::now();
    headline(scene, "the nodes balance their loads by themselves");
    let level = keel_testkit::wait_for("the nodes are balanced", || async {
        look(scene, cluster).await;
        let counts = counts(cluster, hot, nodes).await.ok()?;
        let most = counts.values().max()?;
        let least = counts.values().min()?;
        (most - least <= APART_MAX && *least > 0).then_some(counts)
    });
    let machines = level.await?;
    let took_ms = begun.elapsed().as_millis() as u64;
    let decisions = decisions(cluster, hot).await?;
    if let Some(last) = decisions.last() {
        headline(scene, last);
    }
    cluster.set_policy("mode", "off").await?;
    headline(scene, "removing the busy machines");
    for number in 0..BURNERS {
        cluster.end(hot, &format!("burn-{number}")).await?;
    }
    Ok(HotNodeReport {
        decisions,
        machines,
        took_ms,
    })
}

async fn counts(
    cluster: &LocalCluster,
    via: &str,
    nodes: &[&str],
) -> Result<BTreeMap<String, usize>> {
    let machines: Vec<MachineInfo> = cluster.client(via).get("/v1/machines").await?;
    let mut counts: BTreeMap<String, usize> =
        nodes.iter().map(|node| ((*node).to_owned(), 0)).collect();
    for machine in machines {
        *counts.entry(machine.node).or_default() += 1;
    }
    Ok(counts)
}

async fn decisions(cluster: &LocalCluster, via: &str) -> Result<Vec<String>> {
    let ledger: LedgerInfo = cluster.client(via).get("/v1/ledger?limit=1000").await?;
    let decisions = ledger.lines.iter().map(|line| &line.decision);
    Ok(decisions
        .filter(|it| matches!(it, Decision::Move { .. }))
        .map(ToString::to_string)
        .collect())
}
