//! `keel balance`, `keel why`, `keel why-not`, `keel ledger`: loads, decisions of the balancer,
//! and their reasons.

use crate::cluster::Reach;
use crate::output::{self, Format};
use crate::plan::{self, PlanArgs};
use crate::when;
use anyhow::{Context, Result, bail};
use keel_api::{
    BalanceInfo, Client, LEDGER_DEFAULT, LEDGER_MAX, LedgerInfo, MachineInfo, NodeLoad,
    PolicyRequest, Silence, WhyNot,
};
use keel_balance::ledger::{Decision, Line};
use keel_balance::policy::Policy;
use keel_balance::select::{Considered, NodeState, Verdict};
use std::process::ExitCode;

/// Machines that an explanation names besides the requested one.
const OTHERS_SHOWN: usize = 8;
/// The most decisions about threads and memory that are shown.
const GRAINS_SHOWN: usize = 12;

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BalanceArgs {
    #[command(flatten)]
    plan: PlanArgs,
    #[command(subcommand)]
    what: Option<BalanceCommand>,
}

#[derive(clap::Subcommand)]
enum BalanceCommand {
    /// Shows the policy, or changes it: mode=suggest margin=0.2 weights.memory=0.5.
    ///
    /// `keel balance policy` lists all fields with their values. `mode` is off, suggest,
    /// confirm or automatic; `strategy` is level, pack or spread.
    Policy {
        /// Fields to change, as FIELD=VALUE.
        #[arg(value_name = "FIELD=VALUE")]
        changes: Vec<String>,
    },
    /// Confirms a move that the balancer proposed (mode `confirm`).
    Confirm {
        /// The machines.
        #[arg(required = true)]
        machines: Vec<String>,
    },
}

#[derive(clap::Args)]
pub(crate) struct WhyArgs {
    /// The machine.
    machine: String,
    /// Explains an earlier placement: a duration ago (10m) or a time.
    #[arg(long, value_name = "WHEN", value_parser = when::since)]
    at: Option<u64>,
}

#[derive(clap::Args)]
pub(crate) struct WhyNotArgs {
    /// The machine.
    machine: String,
    /// The node to which it does not move.
    #[arg(long, value_name = "NODE")]
    to: String,
}

#[derive(clap::Args)]
pub(crate) struct LedgerArgs {
    /// Only decisions about this machine.
    machine: Option<String>,
    /// Only decisions since: a duration ago (10m, 2h, 1d) or a time (2026-01-31T12:00:00Z).
    #[arg(long, value_name = "WHEN", value_parser = when::since)]
    since: Option<u64>,
    /// The most decisions, newest first.
    #[arg(long, value_name = "N", default_value_t = LEDGER_DEFAULT,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(LEDGER_MAX)))]
    limit: u32,
}

pub(crate) async fn balance(reach: &Reach, args: &BalanceArgs) -> Result<ExitCode> {
    if args.plan.is_wanted() {
        return plan::balance(reach, &args.plan).await;
    }
    let client = reach.client()?;
    match &args.what {
        None => show(reach, &client).await,
        Some(BalanceCommand::Policy { changes }) => policy(reach, &client, changes).await,
        Some(BalanceCommand::Confirm { machines }) => {
            for machine in machines {
                let path = keel_api::path(["machines", machine, "confirm-move"]);
                let _: serde_json::Value = client.post(&path, &()).await?;
                outln!("{machine}: the move begins");
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn show(reach: &Reach, client: &Client) -> Result<ExitCode> {
    let info: BalanceInfo = client.get("/v1/balance").await?;
    match reach.format() {
        Format::Json => outln!("{}", serde_json::to_string_pretty(&info)?),
        Format::Name => {
            for node in &info.nodes {
                outln!("{}", node.node);
            }
        }
        Format::Text => {
            let policy = &info.policy;
            outln!(
                "mode {}, strategy {} (keel balance policy)\n",
                word(&policy.mode),
                word(&policy.strategy)
            );
            let head = [
                "node", "load", "pressed", "cores", "speed", "demand", "memory", "machines",
            ];
            outln!("{}", output::table(&head, info.nodes.iter().map(load_row)));
            for node in &info.nodes {
                for (machine, target) in &node.proposals {
                    outln!(
                        "\nproposed: {machine} from {} to {target} (keel balance confirm {machine})",
                        node.node
                    );
                }
            }
            tell_silent(&info.silent);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The serialised name of an enum value.
fn word<T: serde::Serialize>(value: &T) -> String {
    let json = serde_json::to_string(value).unwrap_or_default();
    json.trim_matches('"').to_owned()
}

fn load_row(node: &NodeLoad) -> Vec<String> {
    let (Some(side), Some(sample)) = (&node.side, &node.sample) else {
        return vec![node.node.clone(), "measuring".into()];
    };
    let machines = sample.machines.iter();
    let demand: f64 = machines.map(|it| it.factors.cpu_cores).sum();
    vec![
        node.node.clone(),
        format!("{:.2}", side.load),
        if side.pressed { "yes" } else { "no" }.into(),
        format!("{:.2}", side.capacity.cores),
        format!("{:.2}", side.capacity.speed),
        format!("{:.2} cores", demand + sample.base.cpu_cores),
        format!(
            "{} of {} free",
            output::bytes(side.memory_free_bytes),
            output::bytes(side.capacity.memory_bytes)
        ),
        sample.machines.len().to_string(),
    ]
}

async fn policy(reach: &Reach, client: &Client, changes: &[String]) -> Result<ExitCode> {
    let info: BalanceInfo = client.get("/v1/balance").await?;
    let mut policy = info.policy;
    if !changes.is_empty() {
        policy = changed(&policy, changes)?;
        let request = PolicyRequest {
            policy: policy.clone(),
            from: info.revision,
        };
        let _: serde_json::Value = client.post("/v1/balance/policy", &request).await?;
    }
    match reach.format() {
        Format::Json => outln!("{}", serde_json::to_string_pretty(&policy)?),
        _ => out!("{}", toml::to_string(&policy)?),
    }
    Ok(ExitCode::SUCCESS)
}

/// The policy with the fields of `FIELD=VALUE` arguments replaced.
fn changed(policy: &Policy, changes: &[String]) -> Result<Policy> {
    let mut table = toml::Table::try_from(policy)?;
    for change in changes {
        let (field, value) = change
            .split_once('=')
            .with_context(|| format!("{change:?} is no FIELD=VALUE (example: margin=0.2)"))?;
        let (inner, name) = match field.split_once('.') {
            Some((outer, name)) => {
                let inner = table.get_mut(outer).and_then(toml::Value::as_table_mut);
                (inner.with_context(|| unknown(policy, field))?, name)
            }
            None => (&mut table, field),
        };
        inner.insert(name.to_owned(), read_value(value));
    }
    let policy: Policy = table.try_into().map_err(|error: toml::de::Error| {
        let names = changes.iter().filter_map(|it| Some(it.split_once('=')?.0));
        let fields: Vec<&str> = names.collect();
        let hint = fields
            .iter()
            .find(|field| !known_fields(policy).contains(&(**field).to_owned()))
            .map_or(String::new(), |field| {
                format!("; {}", unknown(policy, field))
            });
        anyhow::anyhow!("{}{hint}", error.message())
    })?;
    policy.check()?;
    Ok(policy)
}

fn read_value(text: &str) -> toml::Value {
    if let Ok(count) = text.parse::<i64>() {
        // An integer is valid where any number is.
        return toml::Value::Integer(count);
    }
    text.parse::<f64>()
        .map_or_else(|_| toml::Value::String(text.to_owned()), toml::Value::Float)
}

fn known_fields(policy: &Policy) -> Vec<String> {
    let Ok(table) = toml::Table::try_from(policy) else {
        return Vec::new();
    };
    let mut fields = vec!["moves_at_once_max".to_owned()];
    for (name, value) in &table {
        match value.as_table() {
            Some(inner) => fields.extend(inner.keys().map(|it| format!("{name}.{it}"))),
            None => fields.push(name.clone()),
        }
    }
    fields
}

fn unknown(policy: &Policy, field: &str) -> String {
    let fields = known_fields(policy);
    let nearest = fields
        .iter()
        .max_by(|one, other| {
            strsim::jaro_winkler(field, one).total_cmp(&strsim::jaro_winkler(field, other))
        })
        .map_or("mode", String::as_str);
    format!("the policy has no field {field:?}; did you mean {nearest:?}?")
}

pub(crate) async fn ledger(reach: &Reach, args: &LedgerArgs) -> Result<ExitCode> {
    let machine = args.machine.as_deref();
    let told = ask(&reach.client()?, machine, args.since, None, args.limit).await?;
    match reach.format() {
        // One per line: `keel sim --replay` reads them.
        Format::Json => {
            for line in &told.lines {
                outln!("{}", serde_json::to_string(line)?);
            }
        }
        Format::Name | Format::Text => {
            for line in &told.lines {
                outln!("{}", sentence(line));
            }
        }
    }
    tell_silent(&told.silent);
    Ok(ExitCode::SUCCESS)
}

async fn ask(
    client: &Client,
    machine: Option<&str>,
    since: Option<u64>,
    until: Option<u64>,
    limit: u32,
) -> Result<LedgerInfo> {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("limit", &limit.to_string());
    query.append_pair("since", &since.unwrap_or(0).to_string());
    query.append_pair("until", &until.unwrap_or(0).to_string());
    if let Some(machine) = machine {
        query.append_pair("machine", machine);
    }
    let path = format!("/v1/ledger?{}", query.finish());
    Ok(client.get(&path).await?)
}

fn sentence(line: &Line) -> String {
    format!(
        "{}  {:<8} {}",
        when::show(line.at_unix_ms),
        line.node,
        line.decision
    )
}

/// Explains the placement of a machine: the decision that moved it there, or why there was none.
pub(crate) async fn why(reach: &Reach, args: &WhyArgs) -> Result<ExitCode> {
    let client = reach.client()?;
    let machine = &args.machine;
    let told = ask(&client, Some(machine), None, args.at, LEDGER_MAX).await?;
    if reach.json() {
        outln!("{}", serde_json::to_string_pretty(&told)?);
        return Ok(ExitCode::SUCCESS);
    }
    let info: Result<MachineInfo, _> = client.get(&keel_api::path(["machines", machine])).await;
    match (&info, args.at) {
        (Ok(info), None) => outln!("{machine} is on {} ({})", info.node, info.status),
        (Err(error), _) if told.lines.is_empty() => bail!("{error}"),
        _ => {}
    }
    let moves_it = |decision: &Decision| match decision {
        Decision::Move { machine: it, .. }
        | Decision::Planned { machine: it, .. }
        | Decision::Repair {
            machine: it,
            target: Some(_),
            ..
        } => **it == **machine,
        _ => false,
    };
    let mut lines = told.lines.iter().rev();
    let decided = lines.find(|line| moves_it(&line.decision));
    match decided {
        Some(line) => {
            outln!("\n{}", sentence(line));
            let detail = detail(&line.decision, machine);
            if !detail.is_empty() {
                outln!("{detail}");
            }
            let ended = told.lines.iter().find(|later| {
                later.at_unix_ms >= line.at_unix_ms
                    && matches!(&later.decision, Decision::Ended { machine: it, .. } if **it == **machine)
            });
            if let Some(ended) = ended {
                outln!("{}", sentence(ended));
            }
        }
        None => outln!(
            "\nneither the balancer nor a plan has moved it; its placement is by users and restarts (keel events {machine})"
        ),
    }
    let stays = told.lines.iter().rev().find(|line| {
        matches!(&line.decision, Decision::NoMove { .. })
            && decided.is_none_or(|decided| decided.at_unix_ms < line.at_unix_ms)
    });
    if let Some(line) = stays {
        outln!("\nit has stayed since then; the last change of the reason:");
        outln!("{}", sentence(line));
        if let Some(considered) = line.decision.considered(machine) {
            outln!("  {}", considered_line(considered));
        }
    }
    let grains: Vec<&Line> = told
        .lines
        .iter()
        .filter(|line| match &line.decision {
            Decision::FineGrained { machine: it, .. }
            | Decision::FineGrainedEnded { machine: it, .. } => **it == **machine,
            _ => false,
        })
        .collect();
    if !grains.is_empty() {
        outln!("\nlast decisions about its threads and memory:");
        for line in grains
            .iter()
            .skip(grains.len().saturating_sub(GRAINS_SHOWN))
        {
            outln!("{}", sentence(line));
        }
        let weighed = grains.iter().rev().find_map(|line| match &line.decision {
            Decision::FineGrained { choice, .. } => Some(&choice.alternatives),
            _ => None,
        });
        for it in weighed.into_iter().flatten().take(OTHERS_SHOWN) {
            outln!("    {}: {}", it.option, it.finding);
        }
    }
    tell_silent(&told.silent);
    Ok(ExitCode::SUCCESS)
}

fn detail(decision: &Decision, machine: &str) -> String {
    let Decision::Move { considered, .. } = decision else {
        return String::new();
    };
    let mut lines: Vec<String> = Vec::new();
    for it in considered.iter().take(OTHERS_SHOWN + 1) {
        let mark = if &*it.machine == machine { "→" } else { " " };
        lines.push(format!("  {mark} {}", considered_line(it)));
    }
    if considered.len() > OTHERS_SHOWN + 1 {
        lines.push(format!(
            "    and {} more",
            considered.len() - OTHERS_SHOWN - 1
        ));
    }
    lines.join("\n")
}

fn considered_line(it: &Considered) -> String {
    format!(
        "{}: weighs {:.2} here, {:.2} there; {}",
        it.machine, it.here, it.there, it.verdict
    )
}

pub(crate) async fn why_not(reach: &Reach, args: &WhyNotArgs) -> Result<ExitCode> {
    let query = form_urlencoded::Serializer::new(String::new())
        .append_pair("to", &args.to)
        .finish();
    let path = format!(
        "{}?{query}",
        keel_api::path(["machines", &args.machine, "why-not"])
    );
    let why: WhyNot = reach.client()?.get(&path).await?;
    output::one(reach.format(), &why, &args.machine, why_not_text)?;
    Ok(ExitCode::SUCCESS)
}

fn why_not_text(why: &WhyNot) -> String {
    let explained = &why.explained;
    let load = |side: &NodeState| {
        format!(
            "{:.2}{}",
            side.load,
            if side.pressed { ", pressed" } else { "" }
        )
    };
    let mut lines = vec![format!(
        "{}: load {}; {}: load {}",
        why.node,
        load(&explained.here),
        why.to,
        load(&explained.there)
    )];
    let found = explained
        .considered
        .iter()
        .find(|it| *it.machine == *why.machine);
    match (&explained.no_move, found) {
        (Some(stay), _) => lines.push(format!(
            "no machine moves from {} to {}: {stay}",
            why.node, why.to
        )),
        (None, Some(it)) if it.verdict == Verdict::Chosen => lines.push(format!(
            "{} would move to {} in the next round of these two nodes",
            why.machine, why.to
        )),
        (None, _) => {}
    }
    match found {
        Some(it) => lines.push(considered_line(it)),
        None => lines.push(format!(
            "{} has not been measured there yet; try again in some seconds",
            why.machine
        )),
    }
    lines.join("\n")
}

pub(crate) fn tell_silent(silent: &[Silence]) {
    for silence in silent {
        eprintln!(
            "keel: node {} does not answer ({}): its information is missing",
            silence.node, silence.reason
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_balance::policy::Mode;

    fn change(changes: &[&str]) -> Result<Policy> {
        let changes: Vec<String> = changes.iter().map(|it| (*it).to_owned()).collect();
        changed(&Policy::default(), &changes)
    }

    #[test]
    fn fields_are_changed_one_by_one() {
        let policy = change(&["mode=off", "margin=1", "weights.memory=0.5"]).unwrap();
        assert_eq!((policy.mode, policy.margin), (Mode::Off, 1.0));
        assert_eq!(policy.weights.memory, 0.5);
        assert_eq!(policy.weights.cpu, 1.0);
        let policy = change(&["moves_at_once_max=3"]).unwrap();
        assert_eq!(policy.moves_at_once_max, Some(3));
    }

    #[test]
    fn mistakes_are_named_with_the_nearest_field() {
        for (bad, said) in [
            ("margn=0.2", "\"margin\""),
            ("weights.memry=1", "\"weights.memory\""),
            ("mode=sugest", "suggest"),
            ("margin", "FIELD=VALUE"),
            ("margin=-1", "balance.margin is -1"),
            ("window_samples=2", "from 5 to 120"),
        ] {
            let error = change(&[bad]).unwrap_err().to_string();
            assert!(error.contains(said), "{bad}: {error}");
        }
    }
}
