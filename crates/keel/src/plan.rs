//! `keel balance --plan`, `keel drain`, `keel undrain`: moves of many machines that are computed,
//! shown, and then carried out.

use crate::cluster::Reach;
use crate::input;
use crate::output::{self, Format};
use crate::when;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use keel_api::{
    Client, DrainInfo, DrainRequest, DrainState, LeftBehind, PlanGoal, PlanInfo, PlanLine,
    PlanRequest, PlanStep, Silence,
};
use keel_balance::ledger::Outcome;
use std::collections::BTreeSet;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

/// Interval of polling a drain.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// The most polls without an answer.
const UNANSWERED_MAX: u32 = 20;
/// How long a node may take to report its progress; and after a deadline.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
const LATE_AFTER: Duration = Duration::from_secs(4);

/// The objective of a plan.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Objective {
    /// Equal loads on all nodes.
    Level,
    /// As few nodes as the load needs.
    Pack,
}

#[derive(clap::Args)]
pub(crate) struct PlanArgs {
    /// Computes moves for all nodes at once, shows them, and carries them out once confirmed.
    #[arg(long)]
    plan: bool,
    /// The objective of the plan.
    #[arg(long, requires = "plan", value_enum, default_value = "level")]
    objective: Objective,
    /// The most machines: those whose moves reduce the unevenness most. (Intermediate stops at a
    /// third node are not counted.)
    #[arg(long, value_name = "N", requires = "plan")]
    moves: Option<usize>,
    /// Only shows the plan.
    #[arg(long, requires = "plan")]
    dry_run: bool,
    /// Carries out the moves without asking.
    #[arg(long, requires = "plan", conflicts_with = "dry_run")]
    yes: bool,
    /// Reads a plan that was shown with `-o json` from a file, instead of computing one: exactly
    /// that plan is carried out, or none of it if the cluster has changed since.
    #[arg(long, value_name = "FILE", requires = "plan", conflicts_with_all = ["objective", "moves"])]
    from: Option<PathBuf>,
}

impl PlanArgs {
    pub(crate) fn is_wanted(&self) -> bool {
        self.plan
    }
}

#[derive(clap::Args)]
pub(crate) struct DrainArgs {
    /// The node.
    node: String,
    /// The deadline (30s, 10m): close to it, moves become urgent and may have a longer downtime;
    /// after it, the remaining machines stay. No machine is ever ended.
    #[arg(long, value_name = "DURATION", value_parser = when::duration)]
    deadline: Option<Duration>,
    /// Only shows what would move, the durations, and what cannot move.
    #[arg(long)]
    dry_run: bool,
    /// Does not wait for the end.
    #[arg(short, long, conflicts_with = "dry_run")]
    detach: bool,
}

/// Makes a plan and, once confirmed, carries it out.
pub(crate) async fn balance(reach: &Reach, args: &PlanArgs) -> Result<ExitCode> {
    let client = reach.client()?;
    let goal = match args.objective {
        Objective::Level => PlanGoal::Level {
            moves_max: args.moves,
        },
        Objective::Pack if args.moves.is_some() => {
            bail!(
                "--moves is for --objective level: a node that is not empty in the end is no gain"
            )
        }
        Objective::Pack => PlanGoal::Pack,
    };
    let plan: PlanInfo = match &args.from {
        Some(file) => read(file)?,
        None => client.post("/v1/plan", &goal).await?,
    };
    let text = reach.format() == Format::Text;
    if !text && !args.yes {
        outln!("{}", serde_json::to_string_pretty(&plan)?);
        return Ok(ExitCode::SUCCESS);
    }
    if text {
        show(&plan);
    }
    if plan.steps.is_empty() || args.dry_run || !(args.yes || confirmed()?) {
        return Ok(ExitCode::SUCCESS);
    }
    let request = PlanRequest {
        id: plan.id,
        steps: plan.steps,
        machines: plan.machines,
    };
    let mut lines = client.post_stream("/v1/plan/run", &request).await?;
    let mut stayed = 0;
    while let Some(line) = lines.line::<PlanLine>().await? {
        if !text {
            outln!("{}", serde_json::to_string(&line)?);
        }
        match line {
            PlanLine::Begun(_) => {}
            PlanLine::Ended { step, outcome } => {
                if !matches!(outcome, Outcome::Moved { .. }) {
                    stayed += 1;
                }
                if text {
                    outln!("{} {} → {}: {outcome}", step.machine, step.from, step.to);
                }
            }
        }
    }
    if stayed > 0 {
        bail!("{stayed} of the plan's moves were not made (keel balance --plan makes a new plan)");
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn parse(text: &[u8]) -> Result<PlanInfo> {
    Ok(serde_json::from_slice(text)?)
}

/// A plan in a file.
fn read(file: &Path) -> Result<PlanInfo> {
    let name = file.display();
    let text = input::read_text(file).with_context(|| format!("cannot read plan {name}"))?;
    parse(text.as_bytes())
        .with_context(|| format!("{name} is not a plan as `keel -o json balance --plan` prints it"))
}

/// Asks the user at the terminal.
fn confirmed() -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        eprintln!("nothing was moved: add --yes to make these moves");
        return Ok(false);
    }
    eprint!("make these moves? [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn show(plan: &PlanInfo) {
    if plan.steps.is_empty() {
        outln!("no move would help");
    } else {
        let head = [
            "wave", "machine", "from", "to", "sends", "takes", "downtime",
        ];
        outln!("{}", output::table(&head, plan.steps.iter().map(row)));
        outln!(
            "\nplan {}: {} moves, {} in all; about {}",
            plan.id,
            plan.steps.len(),
            output::bytes(plan.steps.iter().map(|step| step.bytes).sum()),
            length(plan.duration_ms)
        );
        if !matches!(plan.goal, PlanGoal::Drain { .. }) {
            outln!("unevenness {:.3}, then {:.3}", plan.before, plan.after);
        }
    }
    tell_left(&plan.left);
    tell_silent(&plan.silent);
}

fn row(step: &PlanStep) -> Vec<String> {
    let downtime = &step.downtime_ms;
    vec![
        (step.wave + 1).to_string(),
        step.machine.clone(),
        step.from.clone(),
        format!("{}{}", step.to, if step.hop { " (on the way)" } else { "" }),
        output::bytes(step.bytes),
        length(step.duration_ms.mid),
        format!("{:.1} to {:.1} ms", downtime.low, downtime.high),
    ]
}

fn length(ms: f64) -> String {
    match ms {
        ..1000.0 => format!("{ms:.0} ms"),
        ..120_000.0 => format!("{:.1} s", ms / 1e3),
        _ => format!("{:.0} min", ms / 60e3),
    }
}

fn tell_left(left: &[LeftBehind]) {
    for it in left {
        outln!("{} stays on {}: {}", it.machine, it.node, it.reason);
    }
}

fn tell_silent(silent: &[Silence]) {
    for it in silent {
        eprintln!("{} did not answer: {}", it.node, it.reason);
    }
}

/// Drains a node, and waits for the end.
pub(crate) async fn drain(reach: &Reach, args: &DrainArgs) -> Result<ExitCode> {
    let client = reach.client()?;
    let node = &args.node;
    if args.dry_run {
        let goal = PlanGoal::Drain { node: node.clone() };
        let plan: PlanInfo = client.post("/v1/plan", &goal).await?;
        match reach.format() {
            Format::Text => {
                show(&plan);
                let path = keel_api::path(["nodes", node, "drain"]);
                let info: DrainInfo = client.get(&path).await?;
                if info.parts > 0 {
                    outln!("{}", parts_leave(info.parts));
                }
            }
            _ => outln!("{}", serde_json::to_string_pretty(&plan)?),
        }
        return Ok(ExitCode::from(u8::from(!plan.left.is_empty())));
    }
    let deadline_ms = match args.deadline {
        Some(deadline) => Some(u64::try_from(deadline.as_millis()).context("such a deadline")?),
        None => None,
    };
    let path = keel_api::path(["nodes", node, "drain"]);
    let request = DrainRequest { deadline_ms };
    let _: serde_json::Value = client.post(&path, &request).await?;
    if args.detach {
        if reach.format() == Format::Text {
            outln!("{node} is being drained (keel undrain {node} ends the drain)");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let info = wait(reach, &client, &path, args).await?;
    if reach.format() != Format::Text {
        outln!("{}", serde_json::to_string_pretty(&info)?);
    }
    match info.state {
        DrainState::Empty => {
            if reach.format() == Format::Text {
                let since = info.since_unix_ms.unwrap_or_default();
                outln!(
                    "{node} is empty after {}: {} moves; keel undrain {node} ends the drain",
                    length(when::unix_ms(SystemTime::now()).saturating_sub(since) as f64),
                    info.moved
                );
            }
            Ok(ExitCode::SUCCESS)
        }
        DrainState::Open => bail!("{node} was opened again (keel undrain) before it was empty"),
        _ => {
            if reach.format() == Format::Text {
                tell_left(&info.left);
            }
            bail!(
                "the time is over and {} are still on {node}; they continue there, and no machine is placed there (keel drain {node} continues, keel undrain {node} ends the drain)",
                match (info.machines, info.parts) {
                    (machines, 0) => format!("{machines} machines"),
                    (0, parts) => format!("{parts} parts of machines"),
                    (machines, parts) => format!("{machines} machines and {parts} parts of others"),
                }
            )
        }
    }
}

fn parts_leave(parts: u32) -> String {
    match parts {
        1 => "a part of a machine leaves, with its threads and memory".into(),
        parts => format!("{parts} parts of machines leave, with their threads and memory"),
    }
}

/// Waits for the end of a drain; prints its progress.
async fn wait(reach: &Reach, client: &Client, path: &str, args: &DrainArgs) -> Result<DrainInfo> {
    let mut told: BTreeSet<String> = BTreeSet::new();
    let mut unanswered = 0;
    let deadline = args.deadline.and_then(|it| Instant::now().checked_add(it));
    loop {
        // The node itself reports the end of the time, if it can.
        let rest = deadline.map(|at| at.saturating_duration_since(Instant::now()) + LATE_AFTER);
        let patience = rest.unwrap_or(ANSWER_WITHIN).min(ANSWER_WITHIN);
        let answer = tokio::time::timeout(patience, client.get(path)).await;
        let late = deadline.is_some_and(|at| Instant::now() > at + LATE_AFTER / 2);
        let info: DrainInfo = match answer {
            Ok(Ok(info)) => info,
            Err(_) | Ok(Err(_)) if late => bail!(
                "the time is over, and {} does not answer: the remaining machines are not known (keel drain {0} continues, keel undrain {0} ends the drain)",
                args.node
            ),
            // It may not have received the drain yet, or be busy.
            Ok(Err(error)) if unanswered >= UNANSWERED_MAX => return Err(error.into()),
            Err(_) if unanswered >= UNANSWERED_MAX => bail!("{} does not answer", args.node),
            Err(_) | Ok(Err(_)) => {
                unanswered += 1;
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
        };
        unanswered = 0;
        if reach.format() == Format::Text {
            for step in &info.moving {
                let line = format!("{} moves to {}", step.machine, step.to);
                if told.insert(line.clone()) {
                    outln!("{line}");
                }
            }
            if info.parts > 0 && told.insert(String::new()) {
                outln!("{}", parts_leave(info.parts));
            }
            for it in &info.left {
                let line = format!("{} stays: {}", it.machine, it.reason);
                if told.insert(line.clone()) {
                    outln!("{line}");
                }
            }
        }
        match info.state {
            DrainState::Draining | DrainState::Stuck => tokio::time::sleep(LOOK_EVERY).await,
            DrainState::Open | DrainState::Empty | DrainState::Late => return Ok(info),
        }
    }
}

/// Ends the drain of a node.
pub(crate) async fn undrain(reach: &Reach, node: &str) -> Result<ExitCode> {
    let path = keel_api::path(["nodes", node, "drain"]);
    let client = reach.client()?;
    let _: serde_json::Value = client
        .call(hyper::Method::DELETE, &path, Bytes::new())
        .await?;
    if reach.format() == Format::Text {
        outln!("{node} accepts machines again");
    }
    Ok(ExitCode::SUCCESS)
}
