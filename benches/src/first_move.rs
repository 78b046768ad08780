//! The first move of a large program, to a node that has neither its module nor its code, on a
//! computer of two processors: the time until the target accepts and until the program runs there,
//! beside the time in which plain wasmtime compiles the module under the same conditions; and the
//! program's speed meanwhile, as a share of its speed alone.

use crate::Options;
use crate::signals;
use crate::table::{Table, median};
use anyhow::{Context, Result, ensure};
use keel_machine::moves::Ending;
use keel_testkit::LocalCluster;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Argument of the process that compiles a module with plain wasmtime; its path follows.
pub(crate) const PLAIN_COMPILE: &str = "--plain-compile";
/// Nice value of Evenkeel's compilations relative to guests.
const COMPILE_NICE: i32 = 15;
const ROUNDS: usize = 3;
/// How long the program's speed alone is measured.
const ALONE: Duration = Duration::from_secs(6);
/// At the start of a program its speed is not yet that of later.
const WARM_UP: f64 = 0.5;

/// Programs print a line for a fixed amount of work: when it was done, in seconds since 1970-01-01.
const PYTHON: &str = "
import time
while True:
    x = 0
    for i in range(150000): x = x * 31 + i & 0xffff
    print(time.time(), flush=True)
";
const PHP: &str = "<?php
while (true) {
    $x = 0;
    for ($i = 0; $i < 400000; $i++) $x = ($x * 31 + $i) & 0xffff;
    printf(\"%.6f\\n\", microtime(true));
    flush();
}
";

struct Case {
    name: &'static str,
    module: PathBuf,
    /// Options of `keel run`, and arguments of the program.
    options: Vec<String>,
    args: Vec<String>,
}

/// One first move.
#[derive(Default)]
struct Figures {
    /// Seconds.
    plain: f64,
    accepted: f64,
    resumed: f64,
    downtime: f64,
    /// Shares of the speed alone.
    meanwhile: f64,
    beside_plain: f64,
    afterwards: f64,
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let script = folder.path().join("work.php");
    std::fs::write(&script, PHP)?;
    let mut cases = Vec::new();
    if let (Some(module), Some(root)) = (&options.python, &options.python_root) {
        cases.push(Case {
            name: "CPython 3.11",
            module: module.clone(),
            options: vec![format!("--dir={}::/::ro", root.canonicalize()?.display())],
            args: vec!["-c".into(), PYTHON.into()],
        });
    }
    if let Some(module) = &options.php {
        cases.push(Case {
            name: "PHP 8.2",
            module: module.clone(),
            options: vec![format!("--dir={}::/scripts::ro", folder.path().display())],
            args: vec!["-q".into(), "/scripts/work.php".into()],
        });
    }
    if cases.is_empty() {
        eprintln!("first-move: skipped, it needs --python with --python-root, or --php");
        return Ok(());
    }
    let keel = options.program()?;
    let mut table = Table::new(&[
        "program",
        "plain compiles s",
        "accepted s",
        "ratio",
        "runs there s",
        "ratio",
        "downtime ms",
        "speed meanwhile",
        "speed beside plain compile",
        "speed afterwards",
    ]);
    let runtime = tokio::runtime::Runtime::new()?;
    for case in &cases {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(runtime.block_on(signals::until(measure(&keel, case)))?);
        }
        let of = |figure: &dyn Fn(&Figures) -> f64| median(rounds.iter().map(figure).collect());
        table.row(vec![
            case.name.to_owned(),
            format!("{:.2}", of(&|it| it.plain)),
            format!("{:.2}", of(&|it| it.accepted)),
            format!("{:.2}", of(&|it| it.accepted / it.plain)),
            format!("{:.2}", of(&|it| it.resumed)),
            format!("{:.2}", of(&|it| it.resumed / it.plain)),
            format!("{:.1}", of(&|it| it.downtime * 1e3)),
            format!("{:.3}", of(&|it| it.meanwhile)),
            format!("{:.3}", of(&|it| it.beside_plain)),
            format!("{:.3}", of(&|it| it.afterwards)),
        ]);
    }
    table.print("The first move of a program, beside plain compilation with the same priority");
    Ok(())
}

/// Compiles a module with plain wasmtime in this process, with the priority of Evenkeel's
/// compilations, and prints the seconds.
pub(crate) fn plain_compile(module: &Path) -> Result<()> {
    rustix::process::setsid()?;
    rustix::process::setpriority_process(None, COMPILE_NICE)?;
    // (The file does not exist where the kernel does not group by sessions.)
    let _ = std::fs::write("/proc/self/autogroup", COMPILE_NICE.to_string());
    let bytes = std::fs::read(module).with_context(|| format!("{}", module.display()))?;
    let engine = wasmtime::Engine::default();
    let begun = Instant::now();
    wasmtime::Module::new(&engine, bytes).map_err(|error| anyhow::anyhow!("{error:#}"))?;
    println!("{}", begun.elapsed().as_secs_f64());
    Ok(())
}

async fn measure(keel: &Path, case: &Case) -> Result<Figures> {
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start(keel, folder.path(), &["a"]).await?;
    start(keel, &cluster, case)?;
    wait_lines(&cluster, 1).await?;
    tokio::time::sleep(ALONE).await;
    let began = now();
    let plain = {
        let module = case.module.clone();
        tokio::task::spawn_blocking(move || {
            let program = std::env::current_exe()?;
            Command::new(program)
                .arg(PLAIN_COMPILE)
                .arg(module)
                .output()
        })
        .await??
    };
    let ended = now();
    let said = String::from_utf8_lossy(&plain.stderr);
    ensure!(plain.status.success(), "plain compilation: {said}");
    let plain: f64 = String::from_utf8_lossy(&plain.stdout).trim().parse()?;
    let lines = lines(&cluster).await?;
    let alone = rate(&lines, lines[0] + WARM_UP, began)?;
    let beside_plain = rate(&lines, began, ended)? / alone;
    drop(cluster);

    let folder = tempfile::tempdir()?;
    let mut cluster = LocalCluster::start(keel, folder.path(), &["a", "b"]).await?;
    // Or it would compile the program ahead of the move.
    cluster.power_off("b");
    start(keel, &cluster, case)?;
    wait_lines(&cluster, 1).await?;
    tokio::time::sleep(ALONE).await;
    cluster.power_on("b").await?;
    let began = now();
    let report = cluster.move_machine("a", NAME, "b").await?;
    let ended = now();
    ensure!(report.ending == Ending::Moved, "{}", report.line());
    eprintln!("{}", report.line());
    tokio::time::sleep(ALONE).await;
    let lines = self::lines(&cluster).await?;
    let compile_ended = began + (ended - began) - report.copy_micros as f64 / 1e6;
    let figures = Figures {
        plain,
        accepted: compile_ended - began,
        resumed: ended - began,
        downtime: report.downtime_micros as f64 / 1e6,
        meanwhile: rate(&lines, began, ended)? / alone,
        beside_plain,
        afterwards: rate(&lines, ended + WARM_UP, ended + ALONE.as_secs_f64())? / alone,
    };
    eprintln!(
        "{}: plain {:.2} s; accepted {:.2} s, runs there {:.2} s; speed {:.3}, beside plain \
         compilation {:.3}, afterwards {:.3}",
        case.name,
        figures.plain,
        figures.accepted,
        figures.resumed,
        figures.meanwhile,
        figures.beside_plain,
        figures.afterwards
    );
    Ok(figures)
}

const NAME: &str = "program";

/// Starts the program as a user does, because it needs directories under other names.
fn start(keel: &Path, cluster: &LocalCluster, case: &Case) -> Result<()> {
    let output = Command::new(keel)
        .arg("run")
        .arg("--state-dir")
        .arg(cluster.folder("a"))
        .args(["--name", NAME, "--detach"])
        .args(&case.options)
        .arg(&case.module)
        .args(&case.args)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "keel run: {said}");
    Ok(())
}

async fn wait_lines(cluster: &LocalCluster, count: usize) -> Result<()> {
    keel_testkit::wait_for("the program works", || async {
        let lines = lines(cluster).await.ok()?;
        (lines.len() >= count).then_some(())
    })
    .await
}

/// The times at which the program completed its pieces of work.
async fn lines(cluster: &LocalCluster) -> Result<Vec<f64>> {
    let text = cluster.output("a", NAME).await?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let times = whole.lines().map(|line| Ok(line.trim().parse()?));
    times.collect::<Result<_>>().with_context(|| text.clone())
}

/// Pieces of work per second between two times.
fn rate(lines: &[f64], from: f64, to: f64) -> Result<f64> {
    let inside: Vec<f64> = lines
        .iter()
        .copied()
        .filter(|at| (from..=to).contains(at))
        .collect();
    match inside[..] {
        [first, .., last] if inside.len() > 2 => Ok((inside.len() - 1) as f64 / (last - first)),
        _ => anyhow::bail!("{} pieces of work in {:.2} s", inside.len(), to - from),
    }
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}
