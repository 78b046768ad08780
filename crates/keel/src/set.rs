//! `keel set`: changes the limits, targets, restart policy, checkpoints or availability of a
//! machine while it runs.

use crate::cluster::Reach;
use crate::machines::{Balance, CheckpointsArgs, RestartWhen, SpawnWhere};
use crate::output;
use anyhow::Result;
use keel_api::{CheckpointChange, HighAvailabilityChange, MachineInfo, SetRequest};
use keel_machine::high_availability::HighAvailability;
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).arg("checkpoint_every"))]
pub(crate) struct Args {
    /// The machine.
    machine: String,
    /// Limit of each of its memories: within the maximum of its module, and not below the present
    /// size.
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse, group = "what")]
    memory: Option<u64>,
    /// Limit of the CPU time of all its threads, in cores (0.01 and more), or `none`.
    #[arg(long, value_name = "CORES", value_parser = cores_or_none, group = "what")]
    cpu: Option<u32>,
    /// When it is restarted after its end.
    #[arg(long, value_name = "WHEN", group = "what")]
    restart: Option<RestartWhen>,
    /// Which of its loads counts in balancing, or whether it is excluded.
    #[arg(long, value_name = "LOAD", group = "what")]
    balance: Option<Balance>,
    /// Its target CPU demand (cpu.target), in cores of the reference speed, or `none`.
    #[arg(long, value_name = "CORES", value_parser = cores_or_none, group = "what")]
    cpu_target: Option<u32>,
    /// Its target memory (memory.target), or `none`.
    #[arg(long, value_name = "SIZE", value_parser = size_or_none, group = "what")]
    memory_target: Option<u64>,
    /// Its target disk traffic (io.target), a second, or `none`.
    #[arg(long, value_name = "SIZE", value_parser = size_or_none, group = "what")]
    io_target: Option<u64>,
    /// The most parts that balancing may give it (2 to 64), or `none`. Present parts stay.
    #[arg(long, value_name = "COUNT", value_parser = count_or_none, group = "what")]
    max_parts: Option<u32>,
    /// Where threads start that it creates while it has parts.
    #[arg(long, value_name = "WHERE", group = "what")]
    spawn: Option<SpawnWhere>,
    /// The most memory that one of its parts keeps while others have room (part.memory), or
    /// `none`.
    #[arg(long, value_name = "SIZE", value_parser = size_or_none, group = "what")]
    part_memory: Option<u64>,
    #[command(flatten)]
    checkpoints: CheckpointsArgs,
    /// Ends its periodic checkpoints.
    #[arg(long, group = "what", conflicts_with = "checkpoint_every")]
    no_checkpoints: bool,
    /// Restarts it elsewhere from its newest checkpoint when its node fails (settings as for
    /// `keel run`).
    #[arg(long, value_name = "SETTINGS", num_args = 0..=1, require_equals = true,
          default_missing_value = "", value_parser = crate::high_availability::parse,
          group = "what", conflicts_with_all = ["checkpoint_every", "no_ha"])]
    ha: Option<HighAvailability>,
    /// Lets it wait for its node when that fails.
    #[arg(long, group = "what")]
    no_ha: bool,
}

/// A count; 0 for none.
fn count_or_none(text: &str) -> Result<u32, String> {
    match text {
        "none" => Ok(0),
        _ => text.parse().map_err(|error| format!("{error}")),
    }
}

/// Thousandths of a core; 0 for no limit.
fn cores_or_none(text: &str) -> Result<u32, String> {
    match text {
        "none" => Ok(0),
        text => crate::size::cores(text),
    }
}

/// Bytes; 0 for no target.
fn size_or_none(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(0),
        text => crate::size::parse(text),
    }
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let request = SetRequest {
        memory_bytes: args.memory,
        cpu_limit_millis: args.cpu,
        restart: args.restart.map(Into::into),
        checkpoints: match args.checkpoints.plan()? {
            Some(plan) => Some(CheckpointChange::Plan(plan)),
            None => args.no_checkpoints.then_some(CheckpointChange::None),
        },
        ha: match &args.ha {
            Some(ha) => Some(HighAvailabilityChange::On(ha.clone())),
            None => args.no_ha.then_some(HighAvailabilityChange::Off),
        },
        balance: args.balance.map(Into::into),
        cpu_target_millis: args.cpu_target,
        memory_target_bytes: args.memory_target,
        io_target_bytes_per_s: args.io_target,
        parts_max: args.max_parts,
        spawn: args.spawn.map(Into::into),
        part_memory_bytes: args.part_memory,
    };
    let path = keel_api::path(["machines", &args.machine, "set"]);
    let machine: MachineInfo = reach.client()?.post(&path, &request).await?;
    output::one(reach.format(), &machine, &machine.name, |machine| {
        let cpu = match machine.cpu_limit_millis {
            Some(millis) => format!("{} cores", f64::from(millis) / 1000.0),
            None => "no limit".to_owned(),
        };
        let balancing = machine.balancing.line();
        let balanced = balancing.map_or_else(String::new, |it| format!(", balanced {it}"));
        format!(
            "{}: memory {}, cpu {cpu}, restart {}{balanced}",
            machine.name,
            output::bytes(machine.memory_limit_bytes),
            machine.restart.word()
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
