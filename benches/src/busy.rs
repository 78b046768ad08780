//! Nodes all of whose cores are busy, and whose agents are killed in turn: a machine with high
//! availability has to run on under its epoch, because nothing failed that it needs.

use crate::Options;
use crate::failover::{NODES, evidence, leader};
use crate::signals;
use crate::table::{Table, percentile};
use anyhow::{Context, Result, ensure};
use keel_machine::high_availability::{Fence, HighAvailability};
use keel_testkit::witness::Evidence;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Pause between two looks at a machine's file.
const LOOK_EVERY: Duration = Duration::from_millis(10);
const KILL_EVERY: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Figures {
    /// Seconds until a killed agent was back, as another node sees it.
    agents: Vec<f64>,
    /// How often another voter led the store after a kill.
    leaders: usize,
    machines: Vec<Machine>,
}

struct Machine {
    before: Evidence,
    after: Evidence,
    /// The longest time in which it wrote nothing, in seconds.
    pause: f64,
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    let keel = options.program()?;
    let cores = std::thread::available_parallelism()?.get();
    let _busy = Busy::start(&keel, &options.guests.join("spinner.wasm"), cores)?;
    let module = std::fs::read(options.guests.join("witness.wasm"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let measuring = measure(&keel, &module, options.minutes);
    let mut figures = runtime.block_on(signals::until(measuring))?;
    let mut table = Table::new(&[
        "agents killed",
        "back p50 s",
        "longest s",
        "other leader",
        "failovers",
        "rewinds",
        "machine's longest pause s",
    ]);
    let machines = &figures.machines;
    let failovers = machines.iter().map(|it| it.after.epochs - it.before.epochs);
    let rewinds = machines.iter().map(|it| it.after.rewinds);
    let pause = machines.iter().map(|it| it.pause).fold(0.0, f64::max);
    let (failovers, rewinds): (u64, u64) = (failovers.sum(), rewinds.sum());
    table.row(vec![
        figures.agents.len().to_string(),
        format!("{:.2}", percentile(&mut figures.agents, 0.5)),
        format!("{:.2}", percentile(&mut figures.agents, 1.0)),
        figures.leaders.to_string(),
        failovers.to_string(),
        rewinds.to_string(),
        format!("{pause:.2}"),
    ]);
    table.print(&format!(
        "All cores busy for {} minutes, and an agent killed in each",
        options.minutes
    ));
    ensure!(
        failovers == 0 && rewinds == 0,
        "a machine was begun elsewhere, although nothing failed that it needs"
    );
    Ok(())
}

/// Processes that use whole cores; killed on drop.
struct Busy(Vec<Child>);

impl Busy {
    fn start(keel: &Path, spinner: &Path, count: usize) -> Result<Self> {
        let mut busy = Busy(Vec::new());
        for _ in 0..count {
            let mut command = Command::new(keel);
            command.args(["wasm", "--plain"]).arg(spinner);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            busy.0.push(command.spawn().context("a busy process")?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

async fn measure(keel: &Path, module: &[u8], minutes: u64) -> Result<Figures> {
    let folder = tempfile::tempdir()?;
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared)?;
    let cluster = LocalCluster::start_replicated(keel, folder.path(), &NODES).await?;
    let mut files = Vec::new();
    for node in NODES {
        let name = format!("on-{node}");
        let file = shared.join(&name);
        let path = file.display().to_string();
        let args = [path.as_str(), "16", "2000"];
        let machine = Guest {
            volume: Some(&shared),
            ha: Some(HighAvailability {
                checkpoint_every_ms: 1000,
                fence: Fence::Timer,
                ..HighAvailability::default()
            }),
            ..Guest::new(&name, node, module, &args)
        };
        cluster.run(&machine).await?;
        wait_for("another node has the checkpoint", || async {
            let machine = cluster.inspect(node, &name).await.ok()?;
            (machine.in_sync.len() > 1).then_some(())
        })
        .await?;
        files.push(file);
    }
    let before: Vec<Evidence> = files.iter().map(|it| evidence(it)).collect::<Result<_>>()?;
    let over = Arc::new(AtomicBool::new(false));
    let pauses: Vec<_> = files
        .iter()
        .map(|file| tokio::spawn(longest_pause(file.clone(), over.clone())))
        .collect();
    let mut figures = Figures::default();
    for minute in 0..minutes {
        let killed = NODES[usize::try_from(minute)? % NODES.len()];
        let asked = NODES[usize::try_from(minute + 1)? % NODES.len()];
        let next = tokio::time::Instant::now() + KILL_EVERY;
        let led = leader(&cluster, asked).await?;
        let begun = Instant::now();
        cluster.kill_agent(killed)?;
        cluster.wait_alive(killed).await?;
        figures.agents.push(begun.elapsed().as_secs_f64());
        tokio::time::sleep_until(next).await;
        figures.leaders += usize::from(leader(&cluster, asked).await? != led);
        let found: Vec<Evidence> = files.iter().map(|it| evidence(it)).collect::<Result<_>>()?;
        let epochs: Vec<u64> = found.iter().map(|it| it.epochs).collect();
        eprintln!(
            "{minute}: the agent of {killed}: {:.2} s, epochs {epochs:?}",
            figures.agents[figures.agents.len() - 1]
        );
    }
    over.store(true, Ordering::Relaxed);
    for ((file, before), pause) in files.iter().zip(before).zip(pauses) {
        figures.machines.push(Machine {
            before,
            after: evidence(file)?,
            pause: pause.await?.as_secs_f64(),
        });
    }
    Ok(figures)
}

/// The longest time in which a file did not grow.
async fn longest_pause(file: PathBuf, over: Arc<AtomicBool>) -> Duration {
    let mut longest = Duration::ZERO;
    let (mut length, mut grown) = (0, Instant::now());
    while !over.load(Ordering::Relaxed) {
        tokio::time::sleep(LOOK_EVERY).await;
        longest = longest.max(grown.elapsed());
        let now = std::fs::metadata(&file).map_or(0, |it| it.len());
        if now != length {
            (length, grown) = (now, Instant::now());
        }
    }
    longest
}
