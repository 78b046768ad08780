//! What protected output costs (`ha` with `protect = "output"`): the time from when a machine prints
//! a line to when a reader sees it, and how much of its work it still does, at several intervals of
//! checkpoints; without protection beside it.

use crate::Options;
use crate::metrics::Metrics;
use crate::signals;
use crate::table::{Table, percentile};
use anyhow::{Context, Result, ensure};
use keel_machine::high_availability::{HighAvailability, Protect};
use keel_machine::log::{StreamKind, split_records};
use keel_testkit::{Guest, LocalCluster};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const NODES: [&str; 3] = ["a", "b", "c"];
/// Of the machine's memory.
const MIB: &str = "64";
/// Written between two lines, in KiB.
const KIB: &str = "64";
/// Time before it is measured.
const SETTLE: Duration = Duration::from_secs(3);
const MEASURE: Duration = Duration::from_secs(10);
/// The longest that a guest may be stopped for a checkpoint; a bound of the nodes' histogram.
const SHORT_S: &str = "0.005";

/// A machine that is kept available in some way.
struct Way {
    name: &'static str,
    ha: Option<HighAvailability>,
}

fn ways() -> Vec<Way> {
    let of = |checkpoint_every_ms, protect| {
        Some(HighAvailability {
            checkpoint_every_ms,
            protect,
            ..HighAvailability::default()
        })
    };
    let way = |name, ha| Way { name, ha };
    vec![
        way("no high availability", None),
        way("checkpoint 1 s", of(1000, Protect::None)),
        way("protected, 100 ms", of(100, Protect::Output)),
        way("protected, 50 ms", of(50, Protect::Output)),
        way("protected, 25 ms", of(25, Protect::Output)),
        way("protected, 10 ms", of(10, Protect::Output)),
    ]
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let mut table = Table::new(&[
        "machine of 64 MiB",
        "checkpoints/s",
        "paused at most 5 ms",
        "line seen after, ms p50",
        "p99",
        "most",
        "lines/s without a pause",
        "share",
    ]);
    let mut free = None;
    for way in ways() {
        let figures = runtime.block_on(signals::until(measure(options, &way)))?;
        let free = *free.get_or_insert(figures.lines_per_s);
        let mut delays = figures.delays_ms;
        let mut row = vec![
            way.name.to_owned(),
            format!("{:.1}", figures.checkpoints_per_s),
            match figures.paused {
                0.0 => "-".to_owned(),
                paused => format!("{:.1} %", figures.paused_shortly / paused * 100.0),
            },
        ];
        for share in [0.5, 0.99, 1.0] {
            row.push(format!("{:.1}", percentile(&mut delays, share)));
        }
        row.push(format!("{:.0}", figures.lines_per_s));
        row.push(format!("{:.2}", figures.lines_per_s / free));
        table.row(row);
    }
    table.print("Protected output");
    Ok(())
}

struct Figures {
    checkpoints_per_s: f64,
    /// Pauses for checkpoints, and those of at most [`SHORT_S`].
    paused: f64,
    paused_shortly: f64,
    delays_ms: Vec<f64>,
    lines_per_s: f64,
}

async fn measure(options: &Options, way: &Way) -> Result<Figures> {
    let keel = options.program()?;
    let module = std::fs::read(options.guests.join("stamp.wasm"))?;
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start_replicated(&keel, folder.path(), &NODES).await?;
    // A line each millisecond, and then as many as it can.
    let mut seen = Vec::new();
    let (mut paused, mut paused_shortly) = (0.0, 0.0);
    for pause_us in ["1000", "0"] {
        let args = [pause_us, KIB, MIB];
        let name = format!("m{pause_us}");
        let guest = Guest {
            ha: way.ha.clone(),
            ..Guest::new(&name, "c", &module, &args)
        };
        cluster.run(&guest).await?;
        tokio::time::sleep(SETTLE).await;
        let before = checkpoints(&cluster).await?;
        let lines = follow(&cluster, &name).await?;
        let after = checkpoints(&cluster).await?;
        let made = after.0 - before.0;
        paused += made;
        paused_shortly += after.1 - before.1;
        seen.push((lines, made / MEASURE.as_secs_f64()));
        let kill = format!("/v1/machines/{name}/kill");
        let _: keel_api::Nothing = cluster.client("a").post(&kill, &()).await?;
    }
    let (fast, _) = seen.pop().context("two")?;
    let (paced, checkpoints_per_s) = seen.pop().context("two")?;
    ensure!(!fast.is_empty() && !paced.is_empty(), "no line was seen");
    Ok(Figures {
        checkpoints_per_s,
        paused,
        paused_shortly,
        delays_ms: paced.iter().map(|line| line.delay_ms).collect(),
        lines_per_s: fast.len() as f64 / MEASURE.as_secs_f64(),
    })
}

struct Line {
    /// From when it was printed to when it was seen.
    delay_ms: f64,
}

/// Follows the output for a while, from now on.
async fn follow(cluster: &LocalCluster, machine: &str) -> Result<Vec<Line>> {
    let mut stream = cluster
        .client("a")
        .get_stream(&format!("/v1/machines/{machine}/logs?follow=true"))
        .await?;
    let (mut bytes, mut text, mut lines) = (Vec::new(), Vec::new(), Vec::new());
    let begun = Instant::now();
    let from = micros_now()?;
    while begun.elapsed() < MEASURE {
        let chunk = tokio::time::timeout(Duration::from_secs(20), stream.chunk()).await??;
        let chunk = chunk.context("the output ended")?;
        let now = micros_now()?;
        bytes.extend_from_slice(&chunk);
        for (kind, record) in split_records(&mut bytes) {
            if kind == StreamKind::Output {
                text.extend(record);
            }
        }
        let Some(end) = text.iter().rposition(|byte| *byte == b'\n') else {
            continue;
        };
        let whole: Vec<u8> = text.drain(..=end).collect();
        for line in std::str::from_utf8(&whole)?.lines() {
            let printed = line.split_whitespace().nth(1).context("a time")?;
            let printed: u64 = printed.parse()?;
            // What was printed before is old.
            if printed >= from {
                let delay_ms = now.saturating_sub(printed) as f64 / 1000.0;
                lines.push(Line { delay_ms });
            }
        }
    }
    Ok(lines)
}

fn micros_now() -> Result<u64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(u64::try_from(since.as_micros())?)
}

/// Checkpoints that all nodes have made, and those for which a machine paused at most [`SHORT_S`].
async fn checkpoints(cluster: &LocalCluster) -> Result<(f64, f64)> {
    let (mut all, mut short) = (0.0, 0.0);
    for node in NODES {
        let metrics = Metrics::of(cluster, node).await?;
        all += metrics.value("keel_checkpoint_pause_seconds_count")?;
        let bucket = format!("keel_checkpoint_pause_seconds_bucket{{le=\"{SHORT_S}\"}}");
        short += metrics.value(&bucket)?;
    }
    Ok((all, short))
}
