//! `keel demo`: three nodes as real processes on loopback. The load of a hot node is balanced, a
//! program spreads over all nodes, machines move among them under load, and the node that began the
//! cluster is switched off: the others have the store, too. The demo ends with a check that no output was lost: every numbered line once and in order.
//!
//! - `hot_node`: balancing a hot node
//! - `spread`: a program with threads over three nodes
//! - `view`: the display on a terminal

mod hot_node;
mod spread;
mod view;

use anyhow::{Context, Result, bail, ensure};
use keel_api::{MachineInfo, NodeInfo};
use keel_machine::moves::{Ending, MoveReport};
use keel_testkit::{Guest, LocalCluster, check_numbered};
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The longest that `--once` may take.
const ONCE_MAX: Duration = Duration::from_secs(110);
/// Rounds of moving all machines to the next node.
const ROUNDS: usize = 3;

const COUNTER: &[u8] = include_bytes!("../../../guests/counter.wasm");
const THREADS: &[u8] = include_bytes!("../../../guests/threads.wasm");
const SPINNER: &[u8] = include_bytes!("../../../guests/spinner.wasm");
const RENDER: &[u8] = include_bytes!("../../../guests/render.wasm");
const HOT: &[u8] = include_bytes!("../../../guests/hot.wasm");
const WRITER: &[u8] = include_bytes!("../../../guests/writer.wasm");

const NODES: [&str; 3] = ["a", "b", "c"];
/// It begins the cluster and holds the store first; it is switched off.
const FIRST_NODE: &str = "a";
/// The node that is asked.
const ASKED_NODE: &str = "b";
/// The machine that starts when the first node is off.
const LATE: &str = "late";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Runs once without a terminal, bounded to two minutes; fails unless every
    /// line was seen once and in order.
    #[arg(long)]
    once: bool,
}

/// A machine of the demo.
struct Part {
    name: &'static str,
    node: &'static str,
    module: &'static [u8],
    args: &'static [&'static str],
    /// Whether its output is numbered lines.
    numbered: bool,
}

const PARTS: [Part; 4] = [
    Part {
        name: "counter",
        node: "a",
        module: COUNTER,
        args: &["1000000", "5"],
        numbered: true,
    },
    Part {
        name: "writer",
        node: "b",
        module: WRITER,
        args: &["32", "50"],
        numbered: true,
    },
    Part {
        name: "spinner",
        node: "c",
        module: SPINNER,
        args: &["1000000"],
        numbered: true,
    },
    Part {
        name: "threads",
        node: "a",
        module: THREADS,
        args: &["4", "2000000000"],
        numbered: false,
    },
];

/// The summary at the end of the demo.
#[derive(Debug, Serialize)]
struct Summary {
    /// Whether no output was lost.
    ok: bool,
    /// The nodes.
    nodes: Vec<String>,
    /// The node that was switched off.
    switched_off: String,
    /// Errors that were found.
    problems: Vec<String>,
    /// How the load of the hot node was balanced.
    hot_node: hot_node::HotNodeReport,
    /// How a program spread over all nodes.
    spread: spread::Spread,
    /// Machines and their output.
    machines: Vec<MachineSummary>,
    /// All moves.
    moves: Vec<MoveReport>,
    /// Milliseconds from start to end.
    took_ms: u64,
}

#[derive(Debug, Serialize)]
struct MachineSummary {
    name: String,
    node: String,
    status: String,
    /// Numbered lines, each seen once and in order.
    lines: Option<u64>,
    /// Lines printed after the node was switched off.
    lines_after: Option<u64>,
}

/// The state that the display shows.
#[derive(Debug, Default, Clone)]
struct Scene {
    headline: String,
    nodes: Vec<NodeInfo>,
    machines: Vec<MachineInfo>,
    last_lines: Vec<(String, String)>,
    moves: Vec<MoveReport>,
}

type SharedScene = Arc<Mutex<Scene>>;

fn with_scene<R>(scene: &SharedScene, change: impl FnOnce(&mut Scene) -> R) -> R {
    change(&mut scene.lock().unwrap_or_else(|error| error.into_inner()))
}

pub(crate) async fn run(args: &Args, json: bool) -> Result<ExitCode> {
    let scene = SharedScene::default();
    let interactive = !args.once && !json && std::io::IsTerminal::is_terminal(&std::io::stdout());
    let folder = tempfile::Builder::new()
        .prefix("keel-demo-")
        .tempdir()
        .context("a folder for the demo")?;
    // The file may be replaced while the demo runs.
    let program = keel_node::own_image_for_others();
    let screen = interactive
        .then(|| view::Screen::start(scene.clone()))
        .transpose()?;
    let played = tokio::select! {
        played = tokio::time::timeout(ONCE_MAX, play(&scene, &program, folder.path())) => {
            played.unwrap_or_else(|_| bail!("not done after {ONCE_MAX:?}"))
        }
        () = view::quit(screen.as_ref()) => bail!("quit"),
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
    };
    drop(screen);
    // If stdout is closed, the demo ends here.
    drop(folder);
    let summary = played?;
    if json {
        outln!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print_summary(&summary);
    }
    Ok(if summary.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}

fn print_summary(summary: &Summary) {
    for decision in &summary.hot_node.decisions {
        outln!("{decision}");
    }
    let spread = summary.hot_node.machines.iter();
    let spread: Vec<String> = spread
        .map(|(node, count)| format!("{node}: {count}"))
        .collect();
    outln!(
        "node {} was balanced in {:.1} s by {} automatic moves; machines now {}",
        summary.nodes.first().map_or("", String::as_str),
        summary.hot_node.took_ms as f64 / 1000.0,
        summary.hot_node.decisions.len(),
        spread.join(", ")
    );
    for decision in &summary.spread.decisions {
        outln!("{decision}");
    }
    fn on<C: std::fmt::Display>(counts: &BTreeMap<String, C>) -> String {
        let counts = counts
            .iter()
            .map(|(node, count)| format!("{node}: {count}"));
        counts.collect::<Vec<_>>().join(", ")
    }
    outln!(
        "a renderer spread over the nodes in {:.1} s (threads {}), a machine moved memory to other nodes (MiB {}); {} pictures are the same as on one node",
        summary.spread.took_ms as f64 / 1000.0,
        on(&summary.spread.threads),
        on(&summary.spread.memory_mib),
        summary.spread.pictures
    );
    for report in &summary.moves {
        outln!("{}", report.line());
    }
    for machine in &summary.machines {
        let lines = match (machine.lines, machine.lines_after) {
            (Some(lines), Some(after)) => format!(
                ": {lines} lines, each once and in order, {after} of them after node {} was switched off, which had begun the cluster",
                summary.switched_off
            ),
            _ => String::new(),
        };
        outln!(
            "{} runs on {} ({}){lines}",
            machine.name,
            machine.node,
            machine.status
        );
    }
    for problem in &summary.problems {
        outln!("PROBLEM: {problem}");
    }
    outln!(
        "{} in {:.1} s",
        if summary.ok {
            "no output was lost"
        } else {
            "output was lost"
        },
        summary.took_ms as f64 / 1000.0
    );
}

async fn play(
    scene: &SharedScene,
    program: &std::path::Path,
    folder: &std::path::Path,
) -> Result<Summary> {
    let begun = Instant::now();
    headline(scene, "starting three nodes");
    let mut cluster = LocalCluster::start_replicated(program, folder, &NODES).await?;
    let hot_node = hot_node::play(scene, &cluster, &NODES).await?;
    let spread = spread::play(scene, &cluster, program, folder, &NODES).await?;
    headline(
        scene,
        "starting machines (their modules are compiled once per node)",
    );
    for part in &PARTS {
        let started = cluster
            .run(&Guest::new(part.name, part.node, part.module, part.args))
            .await?;
        ensure!(
            started.status == "running",
            "machine {} is {}: {}",
            part.name,
            started.status,
            started.message.unwrap_or_default()
        );
    }
    look(scene, &cluster).await;
    let mut moves = Vec::new();
    for round in 0..ROUNDS {
        for (number, part) in PARTS.iter().enumerate() {
            let at = NODES
                .iter()
                .position(|node| *node == part.node)
                .unwrap_or(0);
            let target = NODES[(at + round + 1) % NODES.len()];
            headline(scene, &format!("moving {} to {target}", part.name));
            let via = NODES[(number + round) % NODES.len()];
            moves.push(move_one(scene, &cluster, via, part.name, target).await?);
        }
    }
    headline(scene, &format!("draining node {FIRST_NODE}"));
    for part in &PARTS {
        let info = cluster.inspect(ASKED_NODE, part.name).await?;
        if info.node == FIRST_NODE {
            moves.push(move_one(scene, &cluster, ASKED_NODE, part.name, ASKED_NODE).await?);
        }
    }
    headline(
        scene,
        &format!("switching node {FIRST_NODE} off, which began the cluster"),
    );
    cluster.power_off(FIRST_NODE);
    let before = lines_of_all(&cluster).await?;
    settle(scene, &cluster, &before).await?;
    headline(scene, "moving a machine, and starting another, without it");
    let moved = &PARTS[0];
    let at = cluster.inspect(ASKED_NODE, moved.name).await?.node;
    let target = NODES.iter().find(|it| **it != FIRST_NODE && **it != at);
    let target = target.context("three nodes less one are two")?;
    moves.push(move_one(scene, &cluster, ASKED_NODE, moved.name, target).await?);
    let late = Guest::new(LATE, ASKED_NODE, moved.module, moved.args);
    cluster.run(&late).await?;
    keel_testkit::wait_for("it prints", || async {
        let output = cluster.output(ASKED_NODE, LATE).await.ok()?;
        (!output.is_empty()).then_some(())
    })
    .await?;
    let summary = sum_up(&cluster, (hot_node, spread), moves, &before, begun).await;
    look(scene, &cluster).await;
    headline(scene, "done");
    summary
}

fn headline(scene: &SharedScene, text: &str) {
    with_scene(scene, |scene| scene.headline = text.to_owned());
}

async fn look(scene: &SharedScene, cluster: &LocalCluster) {
    let client = cluster.client(ASKED_NODE);
    let nodes = client.get::<Vec<NodeInfo>>("/v1/nodes").await;
    let machines = client.get::<Vec<MachineInfo>>("/v1/machines").await;
    let mut last_lines = Vec::new();
    for part in &PARTS {
        if let Ok(output) = cluster.output(ASKED_NODE, part.name).await {
            let last = output.lines().last().unwrap_or_default().to_owned();
            last_lines.push((part.name.to_owned(), last));
        }
    }
    with_scene(scene, |scene| {
        scene.nodes = nodes.unwrap_or_default();
        scene.machines = machines.unwrap_or_default();
        scene.last_lines = last_lines;
    });
}

async fn move_one(
    scene: &SharedScene,
    cluster: &LocalCluster,
    via: &str,
    machine: &str,
    target: &str,
) -> Result<MoveReport> {
    let report = cluster.move_machine(via, machine, target).await?;
    with_scene(scene, |scene| scene.moves.push(report.clone()));
    look(scene, cluster).await;
    Ok(report)
}

async fn lines_of_all(cluster: &LocalCluster) -> Result<Vec<u64>> {
    let mut lines = Vec::new();
    for part in &PARTS {
        let output = cluster.output(ASKED_NODE, part.name).await?;
        lines.push(output.lines().count() as u64);
    }
    Ok(lines)
}

/// Waits for more output of every machine that prints.
async fn settle(scene: &SharedScene, cluster: &LocalCluster, before: &[u64]) -> Result<()> {
    keel_testkit::wait_for("all machines continue", || async {
        look(scene, cluster).await;
        let now = lines_of_all(cluster).await.ok()?;
        PARTS
            .iter()
            .zip(before)
            .zip(&now)
            .all(|((part, before), now)| !part.numbered || *now > before + 2)
            .then_some(())
    })
    .await
}

async fn sum_up(
    cluster: &LocalCluster,
    (hot_node, spread): (hot_node::HotNodeReport, spread::Spread),
    moves: Vec<MoveReport>,
    before: &[u64],
    begun: Instant,
) -> Result<Summary> {
    let mut problems = Vec::new();
    for report in &moves {
        if let Ending::Stayed { reason } = &report.ending {
            problems.push(format!("{} did not move: {reason}", report.machine));
        }
    }
    let mut machines = Vec::new();
    for (part, before) in PARTS.iter().zip(before) {
        let info = cluster.inspect(ASKED_NODE, part.name).await?;
        if !info.is_live() {
            problems.push(format!(
                "{} is {}: {}",
                part.name,
                info.status,
                info.message.clone().unwrap_or_default()
            ));
        }
        let mut lines = None;
        if part.numbered {
            let output = cluster.output(ASKED_NODE, part.name).await?;
            match check_numbered(&output, 0) {
                Ok(count) => lines = Some(count),
                Err(error) => problems.push(format!("{}: {error}", part.name)),
            }
        }
        machines.push(MachineSummary {
            name: part.name.to_owned(),
            node: info.node,
            status: info.status,
            lines,
            lines_after: lines.map(|lines| lines.saturating_sub(*before)),
        });
    }
    Ok(Summary {
        ok: problems.is_empty(),
        nodes: NODES.iter().map(|node| (*node).to_owned()).collect(),
        switched_off: FIRST_NODE.to_owned(),
        problems,
        hot_node,
        spread,
        machines,
        moves,
        took_ms: begun.elapsed().as_millis() as u64,
    })
}
