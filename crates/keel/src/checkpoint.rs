//! `keel checkpoint`, `checkpoint prune`, `checkpoint quota`, `checkpoints`, `restore`, `clone`.

use crate::cluster::Reach;
use crate::output::{self, Format};
use crate::started::started;
use anyhow::Result;

use keel_api::{
    CheckpointInfo, CheckpointRequest, MachineInfo, PruneInfo, PruneRequest, QuotaInfo,
    QuotaRequest, RestoreRequest,
};
use std::process::ExitCode;
use std::time::Duration;

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct CheckpointArgs {
    #[command(subcommand)]
    command: Option<CheckpointCommand>,
    /// The machine.
    #[arg(required = true)]
    machine: Option<String>,
    /// The place of the checkpoint: a directory or s3://bucket/prefix (default: the node's own
    /// folder).
    #[arg(long, value_name = "PLACE")]
    to: Option<String>,
    /// Stores all pages, not only those written since the last checkpoint.
    #[arg(long)]
    full: bool,
    /// Keeps this many checkpoints and deletes older ones.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Deletes checkpoints older than this (examples: 12h, 7d); with --keep, a checkpoint stays if
    /// either keeps it.
    #[arg(long, value_name = "TIME", value_parser = crate::when::duration)]
    keep_for: Option<Duration>,
}

#[derive(clap::Subcommand)]
enum CheckpointCommand {
    /// Deletes checkpoints that are not to be kept, and what writers left that were killed.
    ///
    /// The newest checkpoint of each machine stays, and whatever those that stay need. Parts of
    /// checkpoints that were never completed, and programs that none needs, are deleted a day after
    /// they were written.
    Prune(PruneArgs),
    /// Shows and sets how many bytes the checkpoints in a place may have.
    ///
    /// While they have as many, no other checkpoint is created there. Counted once a minute.
    Quota(QuotaArgs),
}

#[derive(clap::Args)]
struct QuotaArgs {
    /// The place: a directory or s3://bucket/prefix (default: the node's own folder).
    #[arg(long, value_name = "PLACE")]
    from: Option<String>,
    /// Sets it (examples: 500G, 2T).
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    set: Option<u64>,
    /// Removes it.
    #[arg(long, conflicts_with = "set")]
    none: bool,
}

#[derive(clap::Args)]
struct PruneArgs {
    /// Only the checkpoints of this machine, which may be gone (default: all in the place).
    machine: Option<String>,
    /// The place: a directory or s3://bucket/prefix (default: the node's own folder).
    #[arg(long, value_name = "PLACE")]
    from: Option<String>,
    /// Keeps this many checkpoints of each machine (default: all, if --keep-for is not given either).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Keeps checkpoints that are younger than this (examples: 12h, 7d).
    #[arg(long, value_name = "TIME", value_parser = crate::when::duration)]
    keep_for: Option<Duration>,
    /// Only says what would be deleted.
    #[arg(long)]
    dry_run: bool,
}

#[derive(clap::Args)]
pub(crate) struct RestoreArgs {
    /// The machine of the checkpoint.
    machine: String,
    /// Id of the checkpoint (default: the newest complete one).
    #[arg(long, value_name = "CHECKPOINT")]
    id: Option<String>,
    /// Its place: a directory or s3://bucket/prefix (default: the node's own folder).
    #[arg(long, value_name = "PLACE")]
    from: Option<String>,
    /// Name of the new machine (default: that of the old one).
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
    /// Node to start it on (default: the one that is asked).
    #[arg(long, value_name = "NODE")]
    on: Option<String>,
    /// Runs it before its memory is read: starts sooner, but damage is detected only later, and
    /// ends the machine.
    #[arg(long)]
    warm: bool,
    /// Nodes of its parts, which get the memory that does not fit into one node before it runs
    /// (default: chosen if it is larger than its node).
    #[arg(
        long,
        value_name = "NODES",
        value_delimiter = ',',
        conflicts_with = "warm"
    )]
    nodes: Vec<String>,
    /// Returns at once, while its memory is being read; `keel inspect` shows the result.
    #[arg(short, long)]
    detach: bool,
}

#[derive(clap::Args)]
pub(crate) struct CloneArgs {
    /// The machine.
    machine: String,
    /// Name of the copy.
    #[arg(long = "as", value_name = "NAME")]
    name: String,
    /// Node to start it on (default: the one that is asked).
    #[arg(long, value_name = "NODE")]
    on: Option<String>,
    /// The place of the intermediate checkpoint, visible to both nodes.
    #[arg(long, value_name = "PLACE")]
    through: Option<String>,
    /// Returns before the copy runs; `keel inspect` shows the result.
    #[arg(short, long)]
    detach: bool,
}

/// A user's place as an absolute one for the node.
pub(crate) fn place(text: &str) -> Result<String> {
    if text.contains("://") {
        return Ok(text.to_owned());
    }
    Ok(std::path::absolute(text)?.display().to_string())
}

fn optional(text: Option<&String>) -> Result<Option<String>> {
    text.map(|text| place(text)).transpose()
}

async fn make(reach: &Reach, machine: &str, request: &CheckpointRequest) -> Result<CheckpointInfo> {
    let path = keel_api::path(["machines", machine, "checkpoints"]);
    Ok(reach.client()?.post(&path, request).await?)
}

async fn prune(reach: &Reach, args: &PruneArgs) -> Result<ExitCode> {
    let request = PruneRequest {
        machine: args.machine.clone(),
        from: optional(args.from.as_ref())?,
        keep: args.keep,
        keep_for_s: args.keep_for.map(|time| time.as_secs()),
        dry_run: args.dry_run,
    };
    let info: PruneInfo = reach
        .client()?
        .post("/v1/checkpoints/prune", &request)
        .await?;
    output::one(reach.format(), &info, &info.repository, |info| {
        pruned_text(info, args.dry_run)
    })?;
    if let Some(message) = &info.message {
        eprintln!("keel: {message}");
    }
    Ok(ExitCode::SUCCESS)
}

async fn quota(reach: &Reach, args: &QuotaArgs) -> Result<ExitCode> {
    let client = reach.client()?;
    let from = optional(args.from.as_ref())?;
    let info: QuotaInfo = match args.set.is_some() || args.none {
        true => {
            let bytes = args.set;
            let request = QuotaRequest { from, bytes };
            client.post("/v1/checkpoints/quota", &request).await?
        }
        false => {
            let path = "/v1/checkpoints/quota".to_owned();
            client.get(&with_place(path, from.as_deref())).await?
        }
    };
    output::one(reach.format(), &info, &info.repository, |info| {
        let used = output::bytes(info.used_bytes);
        match info.quota_bytes {
            Some(quota) => format!(
                "{used} of {} used in {}",
                output::bytes(quota),
                info.repository
            ),
            None => format!("{used} used in {}, without a quota", info.repository),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn pruned_text(info: &PruneInfo, dry_run: bool) -> String {
    let done = if dry_run { "to be deleted" } else { "deleted" };
    let mut lines = Vec::new();
    for machine in &info.machines {
        let (count, bytes) = (machine.checkpoints.len(), output::bytes(machine.bytes));
        let what = match count {
            0 => "parts of unfinished checkpoints".to_owned(),
            1 => "1 checkpoint".to_owned(),
            count => format!("{count} checkpoints"),
        };
        lines.push(format!("{}: {what} ({bytes}) {done}", machine.machine));
    }
    for (count, what, bytes) in [
        (info.programs, "programs", info.program_bytes),
        (info.images, "images", info.image_bytes),
    ] {
        if count > 0 {
            lines.push(format!("{count} {what} ({}) {done}", output::bytes(bytes)));
        }
    }
    if lines.is_empty() {
        lines.push(format!("nothing {done} in {}", info.repository));
    }
    lines.join("\n")
}

pub(crate) async fn checkpoint(reach: &Reach, args: &CheckpointArgs) -> Result<ExitCode> {
    match &args.command {
        Some(CheckpointCommand::Prune(args)) => return prune(reach, args).await,
        Some(CheckpointCommand::Quota(args)) => return quota(reach, args).await,
        None => {}
    }
    let machine = args.machine.as_deref().unwrap_or_default();
    let request = CheckpointRequest {
        to: optional(args.to.as_ref())?,
        full: args.full,
        keep: args.keep,
        keep_for_s: args.keep_for.map(|time| time.as_secs()),
    };
    let info = make(reach, machine, &request).await?;
    output::one(reach.format(), &info, &info.id, |info| {
        let ms = |micros: Option<u64>| micros.unwrap_or_default() as f64 / 1000.0;
        let kind = match &info.parent {
            Some(parent) => format!("{} since {parent}", output::bytes(info.stored_bytes)),
            None => format!("{}, full", output::bytes(info.stored_bytes)),
        };
        let deleted = match info.deleted {
            0 => String::new(),
            count => format!("; {count} older deleted"),
        };
        format!(
            "{} ({kind}) in {:.0} ms, downtime {:.1} ms{deleted}",
            info.id,
            ms(info.total_micros),
            ms(info.pause_micros)
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A path with the place of checkpoints as its parameter.
fn with_place(mut path: String, from: Option<&str>) -> String {
    if let Some(from) = from {
        path += "?from=";
        path.extend(form_urlencoded::byte_serialize(from.as_bytes()));
    }
    path
}

pub(crate) async fn list(reach: &Reach, machine: &str, from: Option<String>) -> Result<ExitCode> {
    let path = keel_api::path(["machines", machine, "checkpoints"]);
    let path = with_place(path, optional(from.as_ref())?.as_deref());
    let found: Vec<CheckpointInfo> = reach.client()?.get(&path).await?;
    output::list(
        reach.format(),
        &found,
        &["checkpoint", "age", "bytes", "since", "state"],
        |info| info.id.clone(),
        |info| {
            let age = match info.created_unix_ms {
                0 => "-".to_owned(),
                created => output::ago(created),
            };
            vec![
                info.id.clone(),
                age,
                output::bytes(info.stored_bytes),
                info.parent.clone().unwrap_or_else(|| "(full)".into()),
                info.damage.clone().unwrap_or_else(|| "whole".into()),
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}

async fn make_machine(reach: &Reach, request: &RestoreRequest, detach: bool) -> Result<ExitCode> {
    let client = reach.client()?;
    let mut machine: MachineInfo = client.post("/v1/restore", request).await?;
    if !detach {
        machine = started(&client, machine, reach.format() == Format::Text).await?;
    }
    output::one(reach.format(), &machine, &machine.name, |machine| {
        machine.name.clone()
    })?;
    if let ("paused", Some(message)) = (machine.status.as_str(), &machine.message) {
        eprintln!("keel: machine {} is paused: {message}", machine.name);
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn restore(reach: &Reach, args: &RestoreArgs) -> Result<ExitCode> {
    let request = RestoreRequest {
        machine: args.machine.clone(),
        id: args.id.clone(),
        from: optional(args.from.as_ref())?,
        name: args.name.clone(),
        on: args.on.clone(),
        warm: args.warm,
        nodes: args.nodes.clone(),
    };
    make_machine(reach, &request, args.detach).await
}

pub(crate) async fn clone(reach: &Reach, args: &CloneArgs) -> Result<ExitCode> {
    anyhow::ensure!(
        args.name != args.machine,
        "--as {}: a copy needs a name of its own",
        args.name
    );
    let through = optional(args.through.as_ref())?;
    let taken = make(
        reach,
        &args.machine,
        &CheckpointRequest {
            to: through.clone(),
            ..CheckpointRequest::default()
        },
    )
    .await?;
    let request = RestoreRequest {
        machine: args.machine.clone(),
        id: Some(taken.id),
        from: through,
        name: Some(args.name.clone()),
        on: args.on.clone(),
        warm: false,
        nodes: Vec::new(),
    };
    make_machine(reach, &request, args.detach).await
}
