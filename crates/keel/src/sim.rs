//! `keel sim`: simulates the balancer in a cluster of simulated nodes. Needs no node. The
//! simulation is in the crate `keel_sim`; this file has its options and prints the results.

use crate::output::{self, Format};
use anyhow::{Context, Result, bail};
use keel_sim::html_report;
use keel_sim::replay::{ReplayOutcome, ReplaySummary, replay};
use keel_sim::run::{Report, run, run_recorded};
use keel_sim::scenario::Scenario;
use keel_sim::what_if::{Change, WhatIf};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// The most alternatives and moves in text output; JSON has all.
const MOVES_SHOWN: usize = 20;
const OTHERS_SHOWN: usize = 40;

/// The description of scenarios in `keel sim --help`.
const HELP: &str = "\
A scenario is TOML:

  about = \"a hot node cures itself\"
  seed = 7                       # says all of chance
  length_s = 300

  [policy]                       # what differs from the default
  strategy = \"level\"             # level, pack or spread

  [[nodes]]
  count = 3
  name = \"n{}\"                   # n1, n2, n3
  cores = 4
  memory_mib = 16384             # also: speed, io_mib_per_s, labels, power

  [[machines]]
  count = 12
  name = \"m{}\"
  on = \"n1\"                      # or place = \"spread\" | \"random\", labels = { ... }
  curve = { kind = \"steady\", cores = 1 }
                                 # steady, step, sawtooth, wave, bursts, noise, recorded;
                                 # or traces = { planetlab = \"FOLDER\", cores = 2 }
                                 # or traces = { csv = \"FILE\" }
  burns = true                   # also: memory_mib, dirty_mib_per_s, io_mib_per_s, balance

  [[events]]                     # node-dies, node-comes, machine-starts, machine-ends, policy,
  kind = \"node-dies\"             # clock-jumps, node-lies, node-mismeasures, node-late
  at_s = 120
  node = \"n3\"

  [expect]                       # levelled_by_s, moves_max, moves_min, no_move_after_s,
  levelled_by_s = 60             # unevenness_max, load_max, pressed_max, free_min, returns_max,
  moves_max = 10                 # failed_max, stranded_max, alerts_max, alerts_min,
                                 # overload_max, energy_kwh_max, untouched = [\"NODE\"]

Examples:
  keel sim hot.toml --html hot.html
  keel sim hot.toml --what-if remove-node=n3
  keel sim hot.toml --what-if policy.strategy=pack --what-if policy.fill_load=0.6
  keel sim -t cluster.data -U used.txt          # as hbal has them
  keel sim hot.toml --ledger hot.jsonl          # what was decided, and why
  keel sim --replay ledger.jsonl                # of that, or of keel ledger -o json

Exit code 0 when all is as expected; 1 when an expectation fails, a decision differs, or the \
input is wrong.";

#[derive(clap::Args)]
#[command(after_long_help = HELP)]
pub(crate) struct Args {
    /// The scenario, a TOML file (see below).
    #[arg(
        value_name = "SCENARIO",
        required_unless_present_any = ["text_data", "replay"]
    )]
    scenario: Option<PathBuf>,
    /// Nodes and machines of a file in the format of `hbal -t`, instead of the scenario's;
    /// simulates ten minutes if there is no scenario.
    #[arg(short = 't', long, value_name = "FILE")]
    text_data: Option<PathBuf>,
    /// The use of each instance of -t, in the format of `hbal -U`.
    #[arg(short = 'U', long, value_name = "FILE", requires = "text_data")]
    utilisation: Option<PathBuf>,
    /// Folder of PlanetLab traces, instead of those of the scenario.
    #[arg(long, value_name = "FOLDER", requires = "scenario")]
    planetlab: Option<PathBuf>,
    /// Table of loads, instead of those of the scenario: a first line `at_s,MACHINE,...`, then
    /// seconds and cores.
    #[arg(long, value_name = "FILE", requires = "scenario")]
    csv: Option<PathBuf>,
    /// A seed instead of the scenario's.
    #[arg(long, conflicts_with = "replay")]
    seed: Option<u64>,
    /// Runs the scenario again with a change, and shows both: remove-node=NAME, add-node=COUNT or
    /// policy.KEY=VALUE. Several are combined.
    #[arg(long, value_name = "CHANGE", conflicts_with = "replay")]
    what_if: Vec<Change>,
    /// Writes a page with the load of each node over time; with --what-if, for the changed run.
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    html: Option<PathBuf>,
    /// Writes all decisions of the run for --replay: JSON, one per line.
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    ledger: Option<PathBuf>,
    /// Repeats a ledger's decisions with the present code, and shows those that differ.
    #[arg(long, value_name = "LEDGER", conflicts_with_all = ["scenario", "text_data"])]
    replay: Option<PathBuf>,
}

/// Runs `keel sim`.
pub(crate) fn sim(args: &Args, format: Format) -> Result<ExitCode> {
    if let Some(ledger) = &args.replay {
        return replayed(&replay(ledger)?, format);
    }
    let scenario = scenario(args)?;
    let begun = Instant::now();
    let nothing = WhatIf::default();
    let plain = match &args.ledger {
        None => run(&scenario, &nothing, &mut progress())?,
        Some(place) => {
            let (report, lines) = run_recorded(&scenario, &nothing, &mut progress())?;
            let mut text = String::new();
            for line in lines {
                text += &serde_json::to_string(&line)?;
                text.push('\n');
            }
            std::fs::write(place, text).with_context(|| place.display().to_string())?;
            report
        }
    };
    let what_if = WhatIf {
        changes: args.what_if.clone(),
    };
    let other = if what_if.changes.is_empty() {
        None
    } else {
        Some(run(&scenario, &what_if, &mut progress())?)
    };
    let took = begun.elapsed();
    if let Some(place) = &args.html {
        let title = title(&scenario.path);
        let page = html_report::page(&title, other.as_ref().unwrap_or(&plain));
        std::fs::write(place, page).with_context(|| place.display().to_string())?;
    }
    match (format, &other) {
        (Format::Json, None) => outln!("{}", serde_json::to_string_pretty(&plain)?),
        (Format::Json, Some(other)) => {
            let both = serde_json::json!({ "as_it_is": plain, "what_if": other });
            outln!("{}", serde_json::to_string_pretty(&both)?);
        }
        (Format::Name, _) => bail!("a simulation has no names (-o text or -o json)"),
        (Format::Text, _) => {
            if !scenario.about.is_empty() {
                outln!("{}\n", scenario.about);
            }
            outln!("{}", figures(&plain, other.as_ref()));
            tell_moves(&plain);
            tell_expectations(&plain);
            outln!("\nsimulated in {:.1} s", took.as_secs_f64());
        }
    }
    if plain.met() {
        return Ok(ExitCode::SUCCESS);
    }
    for it in plain.expectations.iter().filter(|it| !it.met) {
        eprintln!(
            "keel: {} not met: expected {}, found {}",
            it.expectation, it.expected, it.found
        );
    }
    Ok(ExitCode::from(1))
}

fn scenario(args: &Args) -> Result<Scenario> {
    let mut scenario = match (&args.scenario, &args.text_data) {
        (Some(place), None) => Scenario::read(place)?,
        (None, Some(data)) => Scenario::from_ganeti(data.clone(), args.utilisation.clone()),
        (Some(place), Some(data)) => {
            let mut scenario = Scenario::read(place)?;
            scenario.use_ganeti(data, args.utilisation.as_deref());
            scenario
        }
        (None, None) => bail!("there is no scenario (`keel sim --help`)"),
    };
    if let Some(folder) = &args.planetlab {
        scenario.use_planetlab(folder)?;
    }
    if let Some(file) = &args.csv {
        scenario.use_csv(file)?;
    }
    if let Some(seed) = args.seed {
        scenario.seed = seed;
    }
    Ok(scenario)
}

fn title(place: &Path) -> String {
    let name = place.file_stem().unwrap_or_default();
    format!("keel sim: {}", name.to_string_lossy())
}

/// Shows the progress on a terminal.
fn progress() -> impl FnMut(f64) {
    let shown = std::io::stderr().is_terminal();
    let mut last = Instant::now();
    move |done: f64| {
        if shown && (last.elapsed().as_millis() >= 200 || done >= 1.0) {
            last = Instant::now();
            let mut stderr = std::io::stderr();
            // Progress is optional: a failed write is ignored.
            let _ = write!(stderr, "\r{:3.0} %\r", done * 100.0);
            let _ = stderr.flush();
        }
    }
}

type Figure = (&'static str, fn(&Report) -> String);

const FIGURES: [Figure; 23] = [
    ("nodes", |it| it.end.alive.to_string()),
    ("machines", |it| it.end.machines.to_string()),
    ("moves", |it| it.moves.len().to_string()),
    ("bytes moved", |it| output::bytes(it.moved_bytes as u64)),
    ("moves failed", |it| it.failed.to_string()),
    ("moves put off (cap)", |it| it.capped.to_string()),
    ("moves stopped by rules", |it| it.raced.to_string()),
    ("moves for rules", |it| it.repairs.to_string()),
    ("machines that violate a rule", |it| {
        it.broken.len().to_string()
    }),
    ("came back within the cool-down", |it| {
        it.returns.to_string()
    }),
    ("last move", |it| {
        let last = it.moves.last();
        last.map_or("-".into(), |last| format!("{:.1} s", last.at_s))
    }),
    ("rounds", |it| it.rounds.to_string()),
    ("unevenness, at first", |it| {
        format!("{:.3}", it.start.unevenness)
    }),
    ("unevenness, at the end", |it| {
        format!("{:.3}", it.end.unevenness)
    }),
    ("loads at first", |it| {
        format!("{:.2} to {:.2}", it.start.load_min, it.start.load_max)
    }),
    ("loads at the end", |it| {
        format!("{:.2} to {:.2}", it.end.load_min, it.end.load_max)
    }),
    ("pressed nodes, at first / end", |it| {
        format!("{} / {}", it.start.pressed, it.end.pressed)
    }),
    ("free nodes, at first / end", |it| {
        format!("{} / {}", it.start.free, it.end.free)
    }),
    ("active nodes, mean", |it| format!("{:.1}", it.active_mean)),
    ("time overloaded (SLATAH)", |it| {
        format!("{:.2} %", it.overload_share * 100.0)
    }),
    ("demand unmet", |it| {
        format!("{:.3} %", it.unmet_share * 100.0)
    }),
    ("energy", |it| {
        it.energy_kwh
            .map_or("-".into(), |kwh| format!("{kwh:.2} kWh"))
    }),
    ("alerts", |it| it.alerts.to_string()),
];

fn figures(plain: &Report, other: Option<&Report>) -> String {
    let rows = FIGURES.iter().map(|(name, figure)| {
        let mut row = vec![(*name).to_owned(), figure(plain)];
        row.extend(other.map(figure));
        row
    });
    match other {
        None => output::table(&["figure", "value"], rows),
        Some(_) => output::table(&["figure", "as it is", "what if"], rows),
    }
}

fn tell_moves(report: &Report) {
    if report.moves.is_empty() {
        return;
    }
    let rows = report.moves.iter().take(MOVES_SHOWN).map(|it| {
        vec![
            format!("{:.1} s", it.at_s),
            it.machine.clone(),
            it.source.clone(),
            it.target.clone(),
        ]
    });
    outln!(
        "\n{}",
        output::table(&["moved at", "machine", "from", "to"], rows)
    );
    if let Some(more) = report.moves.len().checked_sub(MOVES_SHOWN + 1) {
        outln!("and {} more (-o json has all)", more + 1);
    }
    for alert in &report.alerts_quoted {
        outln!("alert at {alert}");
    }
}

fn tell_expectations(report: &Report) {
    if report.expectations.is_empty() {
        return;
    }
    let rows = report.expectations.iter().map(|it| {
        let met = if it.met { "met" } else { "NOT MET" };
        vec![
            it.expectation.clone(),
            it.expected.clone(),
            it.found.clone(),
            met.to_owned(),
        ]
    });
    let head = ["expectation", "expected", "found", ""];
    outln!("\n{}", output::table(&head, rows));
}

fn replayed(replayed: &ReplaySummary, format: Format) -> Result<ExitCode> {
    match format {
        Format::Json => outln!("{}", serde_json::to_string_pretty(replayed)?),
        Format::Name => bail!("a replay has no names (-o text or -o json)"),
        Format::Text => {
            outln!(
                "{} lines: {} decided the same, {} differently, {} with too little recorded, {} that \
                 are no decisions of numbers",
                replayed.lines,
                replayed.same,
                replayed.differ,
                replayed.unknown,
                replayed.no_decision
            );
            for it in replayed.others.iter().take(OTHERS_SHOWN) {
                let today = match &it.outcome {
                    ReplayOutcome::Differs(today) => format!("today: {today}"),
                    ReplayOutcome::Unknown(what) => format!("not recorded: {what}"),
                    ReplayOutcome::Same | ReplayOutcome::NoDecision => continue,
                };
                outln!("line {}, {}: {}\n    {today}", it.line, it.node, it.was);
            }
            if let Some(more) = replayed.others.len().checked_sub(OTHERS_SHOWN + 1) {
                outln!("and {} more (-o json has all)", more + 1);
            }
        }
    }
    Ok(ExitCode::from(u8::from(replayed.differ > 0)))
}
