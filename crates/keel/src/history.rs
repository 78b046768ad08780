//! `keel history`: measured loads of nodes and machines, up to a month ago.

use crate::cluster::Reach;
use crate::output::{self, Format};
use crate::when;
use anyhow::{Result, bail};
use keel_api::{Client, HISTORY_DEFAULT, HISTORY_MAX, HistoryInfo, HistoryPoint, NodeInfo};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

/// The default span.
const SINCE: Duration = Duration::from_secs(6 * 3600);
/// Columns of a node's bar chart.
const LINE_POINTS: u32 = 48;
/// Symbols from no load to the highest.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The node (default: one line for each node).
    node: Option<String>,
    /// This machine, on whichever node it was.
    #[arg(long, value_name = "MACHINE", conflicts_with = "node")]
    machine: Option<String>,
    /// Start: a duration ago (10m, 2h, 7d) or a time (2026-01-31T12:00:00Z); default: six hours
    /// ago. Resolution: ten seconds for nodes in the last six hours, a minute in the last two
    /// days, ten minutes in the last 31 days.
    #[arg(long, value_name = "WHEN", value_parser = when::since)]
    since: Option<u64>,
    /// End.
    #[arg(long, value_name = "WHEN", value_parser = when::since)]
    until: Option<u64>,
    /// The most points.
    #[arg(long, value_name = "N", default_value_t = HISTORY_DEFAULT,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(HISTORY_MAX)))]
    points: u32,
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let client = reach.client()?;
    let of = match (&args.node, &args.machine) {
        (Some(node), _) => ["nodes", node],
        (None, Some(machine)) => ["machines", machine],
        (None, None) => return all(reach, &client, args).await,
    };
    let info = ask(&client, of, args, args.points).await?;
    match reach.format() {
        Format::Json => outln!("{}", serde_json::to_string_pretty(&info)?),
        _ if info.points.is_empty() => bail!(
            "there are no measurements of {} {} in that time",
            of[0].trim_end_matches('s'),
            of[1]
        ),
        _ => outln!("{}", table(&info.points, args.machine.is_some())),
    }
    crate::balance::tell_silent(&info.silent);
    Ok(ExitCode::SUCCESS)
}

async fn ask(
    client: &Client,
    [things, name]: [&str; 2],
    args: &Args,
    points: u32,
) -> Result<HistoryInfo> {
    let ago = SystemTime::now().checked_sub(SINCE);
    let since = args.since.unwrap_or(ago.map_or(0, when::unix_ms));
    let mut path = format!(
        "{}?since={since}&points={points}",
        keel_api::path([things, name, "history"])
    );
    if let Some(until) = args.until {
        if until < since {
            bail!("--until is before --since");
        }
        path += &format!("&until={until}");
    }
    Ok(client.get(&path).await?)
}

/// A line for each node.
async fn all(reach: &Reach, client: &Client, args: &Args) -> Result<ExitCode> {
    let nodes: Vec<NodeInfo> = client.get("/v1/nodes").await?;
    let mut known = Vec::new();
    for node in nodes {
        // A node that does not answer is left out of the table.
        match ask(client, ["nodes", &node.name], args, LINE_POINTS).await {
            Ok(info) => known.push((node.name, info.points)),
            Err(error) => eprintln!("keel: {}: {error:#}", node.name),
        }
    }
    let all = known.iter().flat_map(|(_, points)| points);
    let most = all.map(|it| it.load).fold(0.0, f64::max);
    let row = |(node, points): &(String, Vec<HistoryPoint>)| {
        let mut whole = points.iter();
        let Some(mut sum) = whole.next().copied() else {
            return vec![node.clone(), "no measurements".into()];
        };
        whole.for_each(|point| sum.add(point));
        vec![
            node.clone(),
            format!("{:.2}", sum.load),
            format!("{:.2}", sum.load_max),
            output::bytes(sum.memory_bytes),
            points.iter().map(|it| bar(it.load, most)).collect(),
        ]
    };
    match reach.format() {
        Format::Json => {
            let map: std::collections::BTreeMap<_, _> = known.into_iter().collect();
            outln!("{}", serde_json::to_string_pretty(&map)?);
        }
        Format::Name => known.iter().for_each(|(node, _)| outln!("{node}")),
        Format::Text => {
            let head = ["node", "load", "most", "memory", "load over time"];
            outln!("{}", output::table(&head, known.iter().map(row)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn bar(load: f64, most: f64) -> char {
    let share = if most > 0.0 { load / most } else { 0.0 };
    let number = (share * (BARS.len() - 1) as f64).round() as usize;
    BARS[number.min(BARS.len() - 1)]
}

fn table(points: &[HistoryPoint], of_machine: bool) -> String {
    let most = points.iter().map(|it| it.load).fold(0.0, f64::max);
    let mut head = vec![
        "from", "for", "load", "", "most", "cpu", "memory", "disk /s", "stalled",
    ];
    let more = ["waited", "working set"];
    head.extend(if of_machine {
        &more[..]
    } else {
        &["waited", "machines"]
    });
    let rows = points.iter().map(|point| {
        let mut row = vec![
            when::show(point.at_unix_ms).replace(".000Z", "Z"),
            humantime::format_duration(Duration::from_millis(point.lasts_ms)).to_string(),
            format!("{:.2}", point.load),
            bar(point.load, most).to_string(),
            format!("{:.2}", point.load_max),
            format!("{:.2}", point.cpu_cores),
            output::bytes(point.memory_bytes),
            output::bytes(point.io_bytes_per_s as u64),
            format!("{:.0} %", point.stalled * 100.0),
        ];
        if of_machine {
            row.push(format!("{:.2} cores", point.cpu_pressure));
            let working_set = point.working_set_bytes.map(output::bytes);
            row.push(working_set.unwrap_or_else(|| "-".into()));
        } else {
            row.push(format!("{:.0} %", point.cpu_pressure * 100.0));
            row.push(point.machines.to_string());
        }
        row
    });
    output::table(&head, rows)
}
