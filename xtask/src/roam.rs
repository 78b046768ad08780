//! Third-party programs that are moved among three nodes while they run: CPython and Ruby with
//! scripts that hash for long, zstd with four workers. Their output must equal that of a run
//! without moves.

use crate::big;
use crate::command::{self, Finished};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// Time limit of a node's first answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time limit of a program beyond its own time: the first moves compile it.
const COMPILING: Duration = Duration::from_secs(300);

/// Three nodes on loopback; ended on drop.
struct Cluster {
    keel: PathBuf,
    folder: tempfile::TempDir,
    parents: Vec<Child>,
}

impl Cluster {
    fn start(keel: &Path) -> Result<Self> {
        let mut cluster = Cluster {
            keel: keel.to_owned(),
            folder: tempfile::tempdir()?,
            parents: Vec::new(),
        };
        for (number, name) in NODES.iter().enumerate() {
            let mut command = cluster.command(name);
            if number == 0 {
                command.args(["up", "--name", name]);
            } else {
                let via = cluster.ask(&["nodes", "-o", "json"])?;
                let nodes: serde_json::Value = serde_json::from_str(&via)?;
                let via = nodes[0]["address"]
                    .as_str()
                    .context("no address")?
                    .to_owned();
                let token = cluster.ask(&["token", "join", "-o", "name"])?;
                command.args(["join", &via, "--name", name, "--token", token.trim()]);
            }
            command.args(["--listen", "127.0.0.1:0"]);
            let log = std::fs::File::create(cluster.folder.path().join(format!("{name}.log")))?;
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log);
            cluster.parents.push(command.spawn()?);
            let deadline = Instant::now() + PATIENCE;
            while cluster.alive() <= number {
                ensure!(Instant::now() < deadline, "node {name} does not answer");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(cluster)
    }

    fn alive(&self) -> usize {
        let answer = self.ask(&["nodes", "-o", "json"]).unwrap_or_default();
        let nodes: Vec<serde_json::Value> = serde_json::from_str(&answer).unwrap_or_default();
        let alive = |node: &&serde_json::Value| node["alive"].as_bool() == Some(true);
        nodes.iter().filter(alive).count()
    }

    fn command(&self, node: &str) -> Command {
        let mut command = Command::new(&self.keel);
        command.env("KEEL_STATE_DIR", self.folder.path().join(node));
        command
    }

    /// Runs a command at the first node.
    fn ask(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(NODES[0]);
        command.args(arguments);
        let finished = command::finish(&mut command, COMPILING)?;
        ensure!(
            finished.code == Some(0),
            "keel {}: {}",
            arguments.join(" "),
            finished.stderr
        );
        Ok(String::from_utf8_lossy(&finished.stdout).into_owned())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for parent in &mut self.parents {
            // The parent ends its agent; machines have ended.
            let _ = Command::new("kill")
                .args(["-TERM", &parent.id().to_string()])
                .status();
            let _ = parent.wait();
        }
    }
}

pub(crate) fn run(
    seconds: u32,
    moves: u32,
    only: Option<&str>,
    package: Option<PathBuf>,
) -> Result<()> {
    let keel = command::keel()?;
    let cluster = Cluster::start(&keel)?;
    let others = big::programs(seconds, package)?;
    let mut programs: Vec<(String, Vec<String>)> = others
        .iter()
        .map(|program| (program.name.to_owned(), program.arguments("script")))
        .collect();
    let zstd = command::root()
        .join("guests/zstd.wasm")
        .display()
        .to_string();
    // About a third of a second for each round of 4 MiB at level 12.
    let rounds = (seconds * 3).to_string();
    let zstd = [zstd.as_str(), "4", "12", "4096", &rounds].map(str::to_owned);
    programs.push(("zstd, 4 workers".into(), zstd.to_vec()));
    println!(
        "{:<18} {:>8} {:>8} {:>6} {:>24}  output",
        "program", "alone s", "moved s", "moves", "downtime ms p50, max"
    );
    let mut unlike = 0;
    for (number, (name, arguments)) in programs.iter().enumerate() {
        if only.is_some_and(|only| !name.contains(only)) {
            continue;
        }
        let machine = format!("m{number}");
        let roamed =
            roam(&cluster, &machine, arguments, seconds, moves).with_context(|| name.clone())?;
        println!("{name:<18} {}", roamed.line());
        unlike += u32::from(!roamed.equal);
    }
    ensure!(
        unlike == 0,
        "{unlike} programs have a different output when moved"
    );
    Ok(())
}

/// The result of one program.
struct Roamed {
    alone: Duration,
    moved: Duration,
    /// Downtime of each move in microseconds, ascending.
    downtimes_micros: Vec<u64>,
    equal: bool,
}

impl Roamed {
    fn line(&self) -> String {
        let ms = |at: usize| {
            self.downtimes_micros
                .get(at)
                .map_or(0.0, |us| *us as f64 / 1000.0)
        };
        let count = self.downtimes_micros.len();
        format!(
            "{:>8.1} {:>8.1} {count:>6} {:>24}  {}",
            self.alone.as_secs_f64(),
            self.moved.as_secs_f64(),
            format!("{:.1}, {:.1}", ms(count / 2), ms(count.saturating_sub(1))),
            if self.equal { "equal" } else { "DIFFERS" }
        )
    }
}

/// Moves the program to every node once, so that all have compiled it.
fn warm(cluster: &Cluster, arguments: &[String]) -> Result<()> {
    let run = ["run", "-d", "--name", "warm", "--on", NODES[0]];
    let all: Vec<&str> = run
        .into_iter()
        .chain(arguments.iter().map(String::as_str))
        .collect();
    cluster.ask(&all)?;
    for to in [NODES[1], NODES[2], NODES[0]] {
        let deadline = Instant::now() + COMPILING;
        // Refused until it has started.
        while let Err(error) = cluster.ask(&["move", "warm", "--to", to]) {
            ensure!(Instant::now() < deadline, "{error}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }
    cluster.ask(&["kill", "warm"])?;
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = cluster.ask(&["rm", "warm"]) {
        ensure!(Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Runs a program alone and on the cluster, with moves throughout.
fn roam(
    cluster: &Cluster,
    machine: &str,
    arguments: &[String],
    seconds: u32,
    moves: u32,
) -> Result<Roamed> {
    let limit = COMPILING + Duration::from_secs(u64::from(seconds) * 20);
    let mut alone = Command::new(&cluster.keel);
    alone
        .args(["wasm", "--seed", "7", "--plain"])
        .args(arguments);
    let alone = command::finish(&mut alone, limit)?;
    ensure!(alone.code == Some(0), "alone: {}", alone.stderr);
    warm(cluster, arguments)?;
    let mut command = cluster.command(NODES[0]);
    command
        .args(["run", "--name", machine, "--on", NODES[0]])
        .args(arguments);
    let (finished, downtimes_micros) =
        std::thread::scope(|scope| -> Result<(Finished, Vec<u64>)> {
            let running = scope.spawn(|| command::finish(&mut command, limit));
            let mut downtimes_micros = Vec::new();
            // Spread over the program's run time.
            let pause = Duration::from_secs(seconds.into()) / (moves * 2).max(1);
            let mut failed = None;
            while !running.is_finished() && (downtimes_micros.len() as u32) < moves {
                std::thread::sleep(pause);
                let to = NODES[(downtimes_micros.len() + 1) % NODES.len()];
                match cluster.ask(&["move", machine, "--to", to, "-o", "json"]) {
                    Ok(report) => {
                        let report: serde_json::Value = serde_json::from_str(&report)?;
                        downtimes_micros
                            .push(report["downtime_micros"].as_u64().unwrap_or_default());
                        failed = None;
                    }
                    // It may not have started yet, or have just ended.
                    Err(error) => failed = Some(error),
                }
            }
            let finished = running.join().map_err(|_| anyhow::anyhow!("the run"))??;
            if let Some(error) = failed.filter(|_| (downtimes_micros.len() as u32) < moves) {
                eprintln!("{machine}: after {} moves: {error}", downtimes_micros.len());
            }
            Ok((finished, downtimes_micros))
        })?;
    ensure!(
        downtimes_micros.len() as u32 == moves,
        "it ended after {} moves of {moves}: raise --seconds",
        downtimes_micros.len()
    );
    let mut downtimes_micros = downtimes_micros;
    downtimes_micros.sort_unstable();
    Ok(Roamed {
        alone: alone.took,
        moved: finished.took,
        downtimes_micros,
        equal: alone.stdout == finished.stdout && finished.code == Some(0),
    })
}
