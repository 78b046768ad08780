//! One program on two nodes of one core each, compared with one node of both cores, and with one
//! core: the share of two cores that remains when its threads are on different nodes.

use crate::table::{Table, median};
use crate::{Options, cores, signals};
use anyhow::{Context, Result, ensure};
use keel_api::SpanRequest;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::Path;
use std::time::{Duration, Instant};

/// Programs of two workers that write a line for each piece of work.
const PROGRAMS: [(&str, &[&str]); 7] = [
    ("render", &["2", "480", "320", "100000000"]),
    // Bands of whole pages.
    ("render", &["2", "512", "320", "100000000"]),
    ("render", &["2", "1280", "720", "100000000"]),
    ("matrix", &["2", "512", "100000000"]),
    ("matrix", &["2", "1024", "100000000"]),
    ("mapreduce", &["2", "32", "100000000"]),
    ("ep", &["2", "23", "100000000"]),
];
/// Nodes, and the cores of each.
const NODES: [(&str, &str); 3] = [("one", "0"), ("other", "1"), ("both", "0,1")];
/// Warm-up and least measured time: from the end of a piece to that of another.
const SETTLE: Duration = Duration::from_secs(3);
const WINDOW: Duration = Duration::from_secs(8);
/// Interval of checking for the end of a piece, and the longest time of one.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const PIECE_MAX: Duration = Duration::from_secs(30);

/// The placement of a program.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    OneCore,
    OneNode,
    TwoNodes,
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(signals::until(measure(options)))
}

async fn measure(options: &Options) -> Result<()> {
    let (keel, rounds) = (options.program()?, options.rounds);
    let folder = tempfile::tempdir()?;
    let names = NODES.map(|(name, _)| name);
    let cluster = LocalCluster::start(&keel, folder.path(), &names).await?;
    for (node, cores) in NODES {
        pin(&cluster.folder(node), cores)?;
    }
    let mut table = Table::new(&[
        "program",
        "one core, /s",
        "one node of two, /s",
        "two nodes of one, /s",
        "two nodes to one node",
    ]);
    let only = options.only.as_deref().unwrap_or_default();
    for (program, args) in PROGRAMS.iter().filter(|(name, _)| name.contains(only)) {
        let path = options.guests.join(program).with_extension("wasm");
        let module = std::fs::read(path).with_context(|| format!("the guest `{program}`"))?;
        let mut rates = [const { Vec::new() }; 3];
        for _ in 0..rounds {
            let places = [Place::OneCore, Place::OneNode, Place::TwoNodes];
            for (place, rates) in places.into_iter().zip(&mut rates) {
                rates.push(rate(&cluster, &module, args, place).await?);
            }
        }
        let ratios: Vec<f64> = rates[2].iter().zip(&rates[1]).map(|(b, a)| b / a).collect();
        let [core, node, nodes] = rates.map(median);
        table.row(vec![
            format!("{program} {}", args[1..args.len() - 1].join(" x ")),
            format!("{core:.2}"),
            format!("{node:.2}"),
            format!("{nodes:.2}"),
            format!("{:.2}", median(ratios)),
        ]);
    }
    table.print(&format!(
        "Pieces of work a second of programs with two workers ({rounds} rounds, by turns)"
    ));
    Ok(())
}

/// Pieces of work a second.
async fn rate(cluster: &LocalCluster, module: &[u8], args: &[&str], place: Place) -> Result<f64> {
    let node = if place == Place::OneNode {
        "both"
    } else {
        "one"
    };
    cluster.run(&Guest::new("job", node, module, args)).await?;
    let done = || async {
        let output = cluster.output("one", "job").await?;
        anyhow::Ok(output.lines().count())
    };
    wait_for("it works", || async {
        (done().await.ok()? > 1).then_some(())
    })
    .await?;
    let client = cluster.client("one");
    if place == Place::TwoNodes {
        let request = SpanRequest {
            nodes: vec!["one".into(), "other".into()],
            here: false,
        };
        client
            .post::<_, serde_json::Value>("/v1/machines/job/parts", &request)
            .await?;
        let to = serde_json::json!({ "to": "other" });
        client
            .post::<_, serde_json::Value>("/v1/machines/job/threads/2/move", &to)
            .await?;
    }
    tokio::time::sleep(SETTLE).await;
    let next = || async {
        let (since, before) = (Instant::now(), done().await?);
        loop {
            let now = done().await?;
            if now > before {
                return Ok((Instant::now(), now));
            }
            ensure!(since.elapsed() < PIECE_MAX, "it makes no progress");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let (begun, before) = next().await?;
    tokio::time::sleep(WINDOW).await;
    let (ended, after) = next().await?;
    cluster.end("one", "job").await?;
    Ok((after - before) as f64 / ended.duration_since(begun).as_secs_f64())
}

/// Binds all processes of a node to cores; child processes inherit the binding.
fn pin(state: &Path, which: &str) -> Result<()> {
    let state = state.display().to_string();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(command) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let mut words = command.split(|byte| *byte == 0);
        if !words.any(|word| word == state.as_bytes()) {
            continue;
        }
        cores::bind(&entry.file_name().to_string_lossy(), which)?;
    }
    Ok(())
}
