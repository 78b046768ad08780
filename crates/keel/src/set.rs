//! `keel set`: other limits, another restart policy, other checkpoints for a machine
//! while it runs.

use crate::cluster::Reach;
use crate::machines::{CheckpointsArgs, RestartWhen};
use crate::output;
use anyhow::Result;
use keel_api::{CheckpointChange, MachineInfo, SetRequest};
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).arg("checkpoint_every"))]
pub(crate) struct Args {
    /// The machine.
    machine: String,
    /// Limit of each of its memories: as far as its module allows it, and not less than they
    /// have.
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse, group = "what")]
    memory: Option<u64>,
    /// Limit of the CPU time of all its threads, in cores (0.01 and more), or `none`.
    #[arg(long, value_name = "CORES", value_parser = cores_or_none, group = "what")]
    cpu: Option<u32>,
    /// When it is started again after its end.
    #[arg(long, value_name = "WHEN", group = "what")]
    restart: Option<RestartWhen>,
    #[command(flatten)]
    checkpoints: CheckpointsArgs,
    /// Makes no more checkpoints by itself.
    #[arg(long, group = "what", conflicts_with = "checkpoint_every")]
    no_checkpoints: bool,
}

/// Thousandths of a core; 0 for no limit.
fn cores_or_none(text: &str) -> Result<u32, String> {
    match text {
        "none" => Ok(0),
        text => crate::size::cores(text),
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
    };
    let path = format!("/v1/machines/{}/set", args.machine);
    let machine: MachineInfo = reach.client()?.post(&path, &request).await?;
    output::one(reach.format(), &machine, &machine.name, |machine| {
        let cpu = match machine.cpu_limit_millis {
            Some(millis) => format!("{} cores", f64::from(millis) / 1000.0),
            None => "no limit".to_owned(),
        };
        format!(
            "{}: memory {}, cpu {cpu}, restart {}",
            machine.name,
            output::bytes(machine.memory_limit_bytes),
            machine.restart.word()
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
