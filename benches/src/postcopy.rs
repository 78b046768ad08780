//! Post-copy: the downtime of a machine of 1 GiB, compared with pre-copy of the same machine
//! alternately; the time until all of its memory has arrived; and its speed after the move.

use crate::signals;
use crate::table::{Table, median, percentile};
use anyhow::{Context, Result, ensure};
use keel_api::{MoveRequest, Urgency};
use keel_machine::moves::{Ending, MoveReport};
use keel_testkit::{Guest, LocalCluster, move_as, wait_for};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// The interval in which the machine's speed is measured before a move, and again from a second
/// after it.
const WINDOW: Duration = Duration::from_millis(1000);
/// Time limit of the machine's first output.
const FIRST_PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn bench(keel: &Path, guests: &Path, moves: usize) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(signals::until(measure(keel, guests, moves)))
}

fn request(to: &str, place: Option<&Path>) -> MoveRequest {
    MoveRequest {
        to: to.into(),
        post_copy: place.is_some(),
        checkpoint_to: place.map(|place| place.display().to_string()),
        urgency: Urgency::Normal,
        downtime_ms: None,
    }
}

async fn measure(keel: &Path, guests: &Path, moves: usize) -> Result<()> {
    let module = |name: &str| {
        let path = guests.join(name).with_extension("wasm");
        std::fs::read(path).with_context(|| format!("the guest `{name}`"))
    };
    let folder = tempfile::tempdir()?;
    let place = folder.path().join("kept");
    let cluster = LocalCluster::start(keel, folder.path(), &["a", "b"]).await?;
    let client = cluster.client("a");
    let writer = module("writer")?;
    cluster
        .run(&Guest::new("busy", "a", &writer, &["1024", "200"]))
        .await?;
    wait_for("the guest has its memory", || async {
        let lines = cluster.output("a", "busy").await.ok()?.lines().count();
        (lines > 2).then_some(())
    })
    .await?;
    let (mut after, mut before) = (Vec::new(), Vec::new());
    for round in 0..2 * moves {
        let post_copy = round % 2 == 0;
        let to = ["b", "a"][round % 2];
        let report = move_as(&client, "busy", &request(to, post_copy.then_some(&place))).await?;
        ensure!(report.ending == Ending::Moved, "{}", report.line());
        eprintln!("{}", report.line());
        match post_copy {
            true => after.push(report),
            false => before.push(report),
        }
        // The time of the fallback checkpoint must not affect the next move.
        let _ = std::fs::remove_dir_all(&place);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    client
        .post::<_, serde_json::Value>("/v1/machines/busy/kill", &())
        .await?;
    print(&after, &before);
    speed(keel, folder.path(), &cluster, &module("hot")?, moves).await
}

fn print(after: &[MoveReport], before: &[MoveReport]) {
    type Phase = fn(&MoveReport) -> u64;
    let phases: [(&str, Phase); 6] = [
        ("downtime", |report| report.downtime_micros),
        ("freeze", |report| report.freeze_micros),
        ("last pages", |report| report.last_pages_micros),
        ("state, and naming pages", |report| report.state_micros),
        ("commit", |report| report.commit_micros),
        ("resume", |report| report.resume_micros),
    ];
    let mut table = Table::new(&["phase", "post-copy p50 ms", "p90", "pre-copy p50 ms", "p90"]);
    for (name, value) in phases {
        let mut row = vec![name.to_owned()];
        for reports in [after, before] {
            let mut values: Vec<f64> = reports.iter().map(|it| value(it) as f64 / 1e3).collect();
            row.push(format!("{:.2}", percentile(&mut values, 0.5)));
            row.push(format!("{:.2}", percentile(&mut values, 0.9)));
        }
        table.row(row);
    }
    table.print(&format!(
        "Moves of 1 GiB that writes 200 MB/s ({} of each)",
        after.len()
    ));
    let fills = after.iter().filter_map(|report| report.fill.as_ref());
    let all: Vec<f64> = fills.map(|fill| fill.micros as f64 / 1e3).collect();
    println!("\nall memory arrived after {:.0} ms p50", median(all));
}

/// Speed of a hot loop over 64 MiB of 1 GiB, one second after it resumed by post-copy, as a share
/// of its speed before.
async fn speed(
    keel: &Path,
    folder: &Path,
    cluster: &LocalCluster,
    module: &[u8],
    moves: usize,
) -> Result<()> {
    cluster
        .run(&Guest::new("hot", "a", module, &["1024", "64"]))
        .await?;
    let mut logs = Command::new(keel)
        .arg("--state-dir")
        .arg(folder.join("a"))
        .args(["logs", "--follow", "hot"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let (send, told) = channel();
    let mut output = BufReader::new(logs.stdout.take().context("its output")?);
    std::thread::spawn(move || {
        let mut line = String::new();
        while output.read_line(&mut line).is_ok_and(|count| count > 0) {
            let written = line.trim().split(' ').nth(1).and_then(|it| it.parse().ok());
            if let Some(written) = written
                && send.send((Instant::now(), written)).is_err()
            {
                return;
            }
            line.clear();
        }
    });
    // It touches all of its memory first.
    told.recv_timeout(FIRST_PATIENCE)
        .context("the guest `hot` printed nothing")?;
    let client = cluster.client("a");
    let place = folder.join("kept");
    let mut shares = Vec::new();
    for round in 0..moves {
        let quiet = rate(&told, Duration::from_millis(500))?;
        let to = ["b", "a"][round % 2];
        let report = move_as(&client, "hot", &request(to, Some(&place))).await?;
        ensure!(report.ending == Ending::Moved, "{}", report.line());
        // The report arrives when all memory has: waits for the rest of the second.
        let filled = report.fill.as_ref().map_or(0, |fill| fill.micros);
        let wait = Duration::from_secs(1).saturating_sub(Duration::from_micros(filled));
        let again = rate(&told, wait)?;
        shares.push(again / quiet);
        let _ = std::fs::remove_dir_all(&place);
    }
    // Its state is not needed.
    let _ = logs.kill();
    let _ = logs.wait();
    println!(
        "\nspeed of a hot loop over 64 MiB, a second after it resumed: {:.0} % p50, {:.0} % at the least",
        100.0 * percentile(&mut shares, 0.5),
        100.0 * percentile(&mut shares, 0.0)
    );
    Ok(())
}

/// MiB a second that it writes, in an interval that begins after a wait.
fn rate(told: &Receiver<(Instant, u64)>, wait: Duration) -> Result<f64> {
    std::thread::sleep(wait);
    let begun = Instant::now();
    std::thread::sleep(WINDOW);
    let marks: Vec<(Instant, u64)> = told.try_iter().filter(|(at, _)| *at >= begun).collect();
    let (first, last) = marks
        .first()
        .zip(marks.last())
        .context("it printed nothing")?;
    Ok((last.1 - first.1) as f64 / (last.0 - first.0).as_secs_f64())
}
