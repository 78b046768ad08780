//! Plans for whole clusters compared with Ganeti's `hbal` (Debian `ganeti-htools`): the same
//! skewed clusters, written in its text format, scored by its own measure.
//!
//! The clusters: nodes of 64 GiB, 16 cores and 1 TB; instances of 1/2 to 4 GiB, 1 to 4 virtual
//! CPUs of which they use about half, on shared disks, most of them on the first nodes. Each run
//! checks that our unevenness is hbal's score: hbal also scores our results.
//!
//! Besides the most even plan, the table has the one with the fewest moves that is still more even
//! than hbal's, and the result of the masterless rounds (strategy `spread`, simulated): they use
//! loads of two nodes at a time, and not this score.

use crate::table::Table;
use anyhow::{Context, Result, bail, ensure};
use keel_balance::plan::{
    Amounts, Goal, Plan, Problem, RESOURCES, Site, Workload, plan, unevenness,
};
use keel_balance::policy::Strategy;
use keel_balance::rules::Labels;
use keel_sim::scenario::{Cluster, Scenario};
use keel_sim::world::World;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Nodes, instances, and whether hbal ends in time with this number.
const SIZES: [(usize, usize, bool); 5] = [
    (15, 150, true),
    (20, 80, true),
    (50, 500, true),
    (200, 2_000, false),
    (1_000, 20_000, false),
];
/// Time limit of hbal.
const HBAL_MAX: Duration = Duration::from_secs(300);
const MEMORY_MIB: f64 = 65_536.0;
const OWN_MIB: f64 = 1_024.0;
const DISK_MIB: f64 = 1_000_000.0;
const CORES: f64 = 16.0;

/// The output of hbal.
struct Said {
    moves: usize,
    before: f64,
    after: f64,
    took: Duration,
}

pub(crate) fn bench() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut table = Table::new(&[
        "nodes / machines",
        "",
        "score before",
        "score after",
        "moves",
        "GB moved",
        "s",
    ]);
    for (nodes, machines, ends) in SIZES {
        let problem = cluster(nodes, machines, 1);
        let name = format!("{nodes} / {machines}");
        let begun = Instant::now();
        let ours = plan(&problem, &Goal::Level { moves_max: None });
        let took = begun.elapsed();
        ensure!(ours.left.is_empty(), "{:?}", ours.left);
        let mut row = vec![name.clone(), "keel".into()];
        row.extend(numbers(
            ours.before,
            ours.after,
            ours.steps.len(),
            ours.bytes,
            took,
        ));
        table.row(row);
        let files = folder.path().join(name.replace(" / ", "-"));
        write(&files, &problem, None)?;
        if let Some(row) = rounds(&files, &problem)? {
            table.row([vec![name.clone(), "keel, rounds".into()], row].concat());
        }
        if ends {
            let said = hbal(&files, &[])?;
            check_score(said.before, ours.before)?;
            if let Some((fewest, took)) = fewest(&problem, &said) {
                let mut row = vec![name.clone(), "keel, fewest moves".into()];
                row.extend(numbers(
                    fewest.before,
                    fewest.after,
                    fewest.steps.len(),
                    fewest.bytes,
                    took,
                ));
                table.row(row);
            }
            let mut row = vec![name, "hbal".into()];
            row.extend(numbers(
                said.before,
                said.after,
                said.moves,
                f64::NAN,
                said.took,
            ));
            table.row(row);
            let mut at: Vec<usize> = problem.loads.iter().map(|load| load.site).collect();
            for step in &ours.steps {
                at[step.load] = step.to;
            }
            let end = files.with_extension("end");
            write(&end, &problem, Some(&at))?;
            check_score(hbal(&end, &["-l", "0"])?.before, ours.after)?;
        }
    }
    table.print("Plans for whole clusters");
    Ok(())
}

/// The plan with the fewest moves that is more even than hbal's.
fn fewest(problem: &Problem, said: &Said) -> Option<(Plan, Duration)> {
    let of = |moves_max: usize| {
        let goal = Goal::Level {
            moves_max: Some(moves_max),
        };
        let begun = Instant::now();
        (plan(problem, &goal), begun.elapsed())
    };
    let more_level = |(plan, _): &(Plan, Duration)| plan.after < said.after;
    let all = (0..=said.moves).rev().map(of);
    all.take_while(more_level).last()
}

/// Simulated seconds of the rounds.
const ROUNDS_S: u64 = 3_600;

/// The result of the rounds; `None` if simulating them by the second takes too long.
fn rounds(files: &Path, problem: &Problem) -> Result<Option<Vec<String>>> {
    if problem.sites.len() > 200 {
        return Ok(None);
    }
    let utilisation = files.with_extension("u");
    let mut scenario = Scenario::from_ganeti(files.to_owned(), Some(utilisation));
    scenario.policy.strategy = Strategy::Spread;
    let begun = Instant::now();
    let cluster = Cluster::of(&scenario)?;
    let mut world = World::new(cluster.settings, &cluster.nodes, &cluster.machines);
    world.discard_decisions();
    world.run_until(ROUNDS_S * 1000);
    let took = begun.elapsed();
    let mut end = problem.clone();
    for site in 0..end.sites.len() {
        for &machine in world.machines_of(site) {
            end.loads[machine].site = site;
        }
    }
    let bytes = world.moves().iter().map(|it| it.bytes).sum();
    Ok(Some(numbers(
        unevenness(problem),
        unevenness(&end),
        world.moves().len(),
        bytes,
        took,
    )))
}

fn numbers(before: f64, after: f64, moves: usize, bytes: f64, took: Duration) -> Vec<String> {
    vec![
        format!("{before:.2}"),
        format!("{after:.3}"),
        moves.to_string(),
        if bytes.is_nan() {
            String::new()
        } else {
            format!("{:.0}", bytes / 1e9)
        },
        format!("{:.3}", took.as_secs_f64()),
    ]
}

fn check_score(theirs: f64, ours: f64) -> Result<()> {
    ensure!(
        (theirs - ours).abs() <= 0.02 * ours.max(0.5),
        "hbal's score is {theirs}, ours is {ours}"
    );
    Ok(())
}

/// Shares of memory, disk and virtual CPUs, and the reported use of instances.
fn cluster(nodes: usize, machines: usize, seed: u64) -> Problem {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut free = vec![MEMORY_MIB - 2.0 * OWN_MIB; nodes];
    let pick = |rng: &mut SmallRng, of: &[f64]| of[rng.random_range(0..of.len())];
    let loads = (0..machines)
        .map(|number| {
            let memory = pick(&mut rng, &[512.0, 1024.0, 2048.0, 4096.0]);
            let disk = pick(&mut rng, &[5_000.0, 10_000.0, 20_000.0]);
            let cpus = pick(&mut rng, &[1.0, 2.0, 4.0]);
            let site = loop {
                // The least of three random numbers: most are on the first nodes.
                let tries = (0..3).map(|_| rng.random_range(0..nodes));
                let site = tries.min().unwrap_or(0);
                if free[site] >= memory {
                    break site;
                }
            };
            free[site] -= memory;
            let used = cpus * rng.random_range(0.2..0.8);
            Workload {
                name: format!("i{number}").as_str().into(),
                labels: Labels::new(),
                site,
                demand: [memory, disk, cpus, used, 1.0, 1.0, 1.0],
                fixed: false,
                bytes: memory * f64::from(1 << 20),
            }
        })
        .collect();
    let mut base: Amounts = [0.0; RESOURCES];
    base[0] = OWN_MIB;
    Problem {
        sites: (0..nodes)
            .map(|number| Site {
                name: format!("n{number}").as_str().into(),
                labels: Labels::new(),
                capacity: [MEMORY_MIB, DISK_MIB, CORES, 1.0, 1.0, 1.0, 1.0],
                base,
                open: true,
            })
            .collect(),
        loads,
        weights: [1.0; RESOURCES],
        hard: [true, true, false, false, false, false, false],
        rules: Vec::new(),
        // The gain of one machine for the whole decreases with the number of nodes.
        gain_min: (1.0 / nodes as f64).min(0.01),
        at_once: (1, 1),
    }
}

/// The files of `-t` and `-U`, described in `man htools`.
fn write(path: &Path, problem: &Problem, at: Option<&[usize]>) -> Result<()> {
    let site_of = |number: usize| at.map_or(problem.loads[number].site, |at| at[number]);
    let mut used = vec![[0.0; RESOURCES]; problem.sites.len()];
    for (number, load) in problem.loads.iter().enumerate() {
        for (used, amount) in used[site_of(number)].iter_mut().zip(&load.demand) {
            *used += amount;
        }
    }
    let mut text = String::from("default|uuid-1|preferred||\n\n");
    for (site, used) in problem.sites.iter().zip(&used) {
        writeln!(
            text,
            "{}|{MEMORY_MIB:.0}|{OWN_MIB:.0}|{:.0}|{DISK_MIB:.0}|{:.0}|{CORES:.0}|N|uuid-1|1||N|1|1|1.0",
            site.name,
            MEMORY_MIB - OWN_MIB - used[0],
            DISK_MIB - used[1]
        )?;
    }
    text.push('\n');
    let mut utilisation = String::new();
    for (number, load) in problem.loads.iter().enumerate() {
        writeln!(
            text,
            "{}|{:.0}|{:.0}|{:.0}|running|Y|{}||ext||1",
            load.name,
            load.demand[0],
            load.demand[1],
            load.demand[2],
            problem.sites[site_of(number)].name
        )?;
        writeln!(utilisation, "{} {:.6} 1 1 1", load.name, load.demand[3])?;
    }
    text.push_str("\n\n");
    std::fs::write(path, text)?;
    std::fs::write(path.with_extension("u"), utilisation)?;
    Ok(())
}

fn hbal(path: &Path, more: &[&str]) -> Result<Said> {
    let begun = Instant::now();
    let output = Command::new("timeout")
        .arg(HBAL_MAX.as_secs().to_string())
        .args(["hbal", "-t"])
        .arg(path)
        .arg("-U")
        .arg(path.with_extension("u"))
        .args(more)
        .output()?;
    let took = begun.elapsed();
    let text = String::from_utf8_lossy(&output.stdout);
    if text.trim().is_empty() {
        bail!(
            "hbal printed nothing (apt-get install ganeti-htools): {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let after = |begin: &str| {
        let rest = text.split(begin).nth(1)?;
        let word = rest
            .split([' ', '\n', ',', ')'])
            .find(|word| !word.is_empty())?;
        word.parse::<f64>().ok()
    };
    let before = after("Initial score:").or_else(|| after("initial score"));
    let before = before.with_context(|| format!("hbal printed: {text}"))?;
    Ok(Said {
        moves: after("Solution length=").unwrap_or(0.0) as usize,
        before,
        after: after("score improved from")
            .and_then(|_| after(&format!("{before:.8} to ")))
            .unwrap_or(before),
        took,
    })
}
