//! Three sites with a voter each, 100 ms of round trip and 100 Mbit/s apart: how long a machine of
//! 64 MiB that writes 1 MB/s stands still when it moves from one to the next, how long the store
//! takes for the commit, and that no delay is taken for a failure. Downtime is counted in round
//! trips: how long the program wrote nothing, less its own pause. (The move's report has half a round
//! trip more, as its source hears of the end of it.) The published peer is Drafter (Loophole Labs; machines of Firecracker that move between
//! clouds), about 500 ms between continents.

use crate::Options;
use crate::failover::{NODES, evidence, leader};
use crate::metrics::Metrics;
use crate::signals;
use crate::table::{Table, percentile};
use anyhow::{Result, ensure};
use keel_machine::high_availability::{Fence, HighAvailability};
use keel_machine::moves::{Ending, MoveReport};
use keel_testkit::far_link::Distance;
use keel_testkit::network::Network;
use keel_testkit::{Guest, LocalCluster};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const NAME: &str = "witness";
/// Of the witness's memory.
const MIB: &str = "64";
/// Between two of its lines, for each of which it writes 16 pages.
const PAUSE: Duration = Duration::from_micros(65_536);
/// Time for the first lines after a move.
const SETTLE: Duration = Duration::from_secs(2);
/// From a site to the middle of the network.
const TO_MIDDLE: Duration = Duration::from_millis(25);
const ROUND_TRIP: Duration = Duration::from_millis(100);
/// 100 Mbit/s.
const RATE: u64 = 12_500_000;

/// A move, and how long its machine stood still.
type Measured = (MoveReport, Duration);

/// Moves by whether the source leads the store.
#[derive(Default)]
struct Figures {
    leads: Vec<Measured>,
    follows: Vec<Measured>,
}

/// The longest time in which the witness wrote nothing, looked at every millisecond.
struct Silence(Arc<AtomicU64>);

impl Silence {
    fn of(file: PathBuf) -> Self {
        let longest = Arc::new(AtomicU64::new(0));
        let known = Arc::downgrade(&longest);
        std::thread::spawn(move || {
            let (mut length, mut since) = (0, Instant::now());
            while let Some(longest) = known.upgrade() {
                let now = std::fs::metadata(&file).map_or(0, |it| it.len());
                if now != length {
                    let micros = since.elapsed().as_micros() as u64;
                    longest.fetch_max(micros, Ordering::Relaxed);
                    (length, since) = (now, Instant::now());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self(longest)
    }

    /// The longest since the last call, less the program's own pause.
    fn take(&self) -> Duration {
        let micros = self.0.swap(0, Ordering::Relaxed);
        Duration::from_micros(micros.saturating_sub(PAUSE.as_micros() as u64))
    }
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    let keel = options.program()?;
    let module = std::fs::read(options.guests.join("witness.wasm"))?;
    let mut network = match Network::new(&NODES) {
        Ok(network) => network,
        Err(error) => {
            println!("skipped: sites far apart need network namespaces ({error})");
            return Ok(());
        }
    };
    let distance = Distance {
        delay: TO_MIDDLE,
        rate: RATE,
    };
    for node in NODES {
        network.distance(node, distance)?;
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let measured = signals::until(measure(&keel, &module, network, options.moves));
    let figures = runtime.block_on(measured)?;
    let mut table = Table::new(&[
        "the source",
        "moves",
        "stood still p50 ms",
        "longest ms",
        "p50 in round trips",
        "reported p50 ms",
        "commit p50 in round trips",
        "whole move p50 s",
    ]);
    for (name, reports) in [
        ("leads the store", figures.leads),
        ("does not", figures.follows),
    ] {
        let of = |micros: fn(&MoveReport) -> u64| -> Vec<f64> {
            reports
                .iter()
                .map(|it| micros(&it.0) as f64 / 1e6)
                .collect()
        };
        let mut still: Vec<f64> = reports.iter().map(|it| it.1.as_secs_f64()).collect();
        let half = percentile(&mut still, 0.5);
        let in_trips = |seconds: f64| format!("{:.2}", seconds / ROUND_TRIP.as_secs_f64());
        table.row(vec![
            name.to_owned(),
            reports.len().to_string(),
            format!("{:.0}", half * 1e3),
            format!("{:.0}", percentile(&mut still, 1.0) * 1e3),
            in_trips(half),
            format!(
                "{:.0}",
                percentile(&mut of(|it| it.downtime_micros), 0.5) * 1e3
            ),
            in_trips(percentile(&mut of(|it| it.commit_micros), 0.5)),
            format!("{:.1}", percentile(&mut of(|it| it.total_micros), 0.5)),
        ]);
    }
    table.print("Moves of 64 MiB between sites 100 ms and 100 Mbit/s apart");
    Ok(())
}

async fn measure(keel: &Path, module: &[u8], network: Network, moves: usize) -> Result<Figures> {
    let folder = tempfile::tempdir()?;
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared)?;
    let file = shared.join(NAME);
    let network = Some(network);
    let cluster =
        LocalCluster::start_to_be_broken(keel, folder.path(), &NODES, network, None).await?;
    let path = file.display().to_string();
    let pause = PAUSE.as_micros().to_string();
    let args = [path.as_str(), MIB, &pause];
    cluster
        .run(&Guest {
            volume: Some(&shared),
            ha: Some(HighAvailability {
                checkpoint_every_ms: 10_000,
                fence: Fence::Timer,
                ..HighAvailability::default()
            }),
            ..Guest::new(NAME, "a", module, &args)
        })
        .await?;
    let silence = Silence::of(file.clone());
    let mut figures = Figures::default();
    for number in 0..moves {
        let (from, to) = (NODES[number % 3], NODES[(number + 1) % 3]);
        let leads = leader(&cluster, from).await? == from;
        silence.take();
        let report = cluster.move_machine(from, NAME, to).await?;
        ensure!(report.ending == Ending::Moved, "{}", report.line());
        tokio::time::sleep(SETTLE).await;
        let still = silence.take();
        eprintln!(
            "{}; it stood still for {} ms",
            report.line(),
            still.as_millis()
        );
        match leads {
            true => figures.leads.push((report, still)),
            false => figures.follows.push((report, still)),
        }
    }
    let machine = cluster.inspect("a", NAME).await?;
    let found = evidence(&file)?;
    let failed = u64::from(machine.restarts) + found.rewinds;
    ensure!(failed == 0, "a delay was taken for a failure: {machine:?}");
    let leader = leader(&cluster, "a").await?;
    let metrics = Metrics::of(&cluster, &leader).await?;
    let renewals = metrics.value("keel_lease_renewal_seconds_count")?;
    let renewal = metrics.value("keel_lease_renewal_seconds_sum")? / renewals;
    eprintln!(
        "{} lines under {} epochs, no failover; the leader renews its lease in {:.0} ms",
        found.lines,
        found.epochs,
        renewal * 1e3
    );
    Ok(figures)
}
