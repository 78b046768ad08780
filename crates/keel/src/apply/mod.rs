//! `keel apply`: makes machines equal to those of a file. Applied again, it changes nothing.
//!
//! The whole file is read, and all machines are compared, before any change: if one change is
//! impossible, all are refused.
//!
//! - `file`: the file

mod file;

use crate::cluster::Reach;
use crate::image::ImageFile;
use crate::input;
use crate::output::Format;
use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use file::Wanted;
use hyper::Method;
use keel_api::{
    CheckpointChange, Client, ClientError, FieldChange, HighAvailabilityChange, MachineDiff,
    MachineInfo, Nothing, RunRequest, SetRequest, VolumeRequest,
};
use keel_machine::restart_policy::Restart;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Whether a text is that of a machine file, for fuzzing.
pub(crate) fn is_file(text: &str) -> bool {
    file::read(std::path::Path::new("machines.toml"), text).is_ok()
}

/// How long the removal of a replaced machine may take, beside the time that its system may take to
/// shut down.
const REMOVE_PATIENCE: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file: a table [machine.NAME] for each machine, with `module` and any options of `keel
    /// run` (args, env, volume, memory, threads, cpu-limit, output-rate, restart, rm, on, ha,
    /// checkpoint-every, -to, -keep, -keep-for); for a whole system with `kind = "qemu"` (kernel,
    /// initrd, append, image, disk-size, disk, net, cpu, cpu-model, guest-agent, install-guest-agent,
    /// balloon, display, shutdown, user-data, network-config, ssh-key). An interface keeps the address that it has.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Only shows the changes.
    #[arg(long)]
    diff: bool,
    /// Stops and restarts machines where a change needs that: their memory, own volumes and own disks
    /// are lost.
    #[arg(long)]
    replace: bool,
}

/// The action for a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Action {
    Create,
    Change,
    Replace,
    Unchanged,
}

/// A machine of the file, with the existing one.
#[derive(Serialize)]
struct Plan {
    machine: String,
    action: Action,
    changes: Vec<FieldChange>,
    /// Whether the action was carried out.
    done: bool,
    #[serde(skip)]
    wanted: RunRequest,
    /// What it starts from.
    #[serde(skip)]
    files: Vec<ImageFile>,
    /// How long the present one may take to shut down.
    #[serde(skip)]
    shutdown: Duration,
    #[serde(skip)]
    found: MachineDiff,
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let shown = args.file.display();
    let text = input::read_text(&args.file).with_context(|| format!("cannot read {shown}"))?;
    let wanted = file::read(&args.file, &text).map_err(|error| anyhow!(error))?;
    let client = reach.client()?;
    let present: Vec<MachineInfo> = client.get("/v1/machines").await?;
    let mut plans = Vec::new();
    for wanted in wanted {
        plans.push(plan(&client, wanted, &present).await?);
    }
    for plan in &plans {
        warn(plan);
    }
    if !args.diff {
        if !args.replace {
            refuse_replacing(&plans)?;
        }
        // What a machine does not start from is refused before another one is changed.
        for plan in plans.iter().filter(|plan| plan.action != Action::Unchanged) {
            for file in &plan.files {
                file.upload(&client, &plan.wanted.kind).await?;
            }
        }
        for plan in &mut plans {
            carry_out(&client, plan)
                .await
                .with_context(|| format!("machine {:?}", plan.machine))?;
            plan.done = true;
        }
    }
    match reach.format() {
        Format::Json => outln!("{}", serde_json::to_string_pretty(&plans)?),
        Format::Name => {
            for plan in plans.iter().filter(|plan| plan.action != Action::Unchanged) {
                outln!("{}", plan.machine);
            }
        }
        Format::Text => out!("{}", page(&plans)),
    }
    Ok(ExitCode::SUCCESS)
}

async fn plan(client: &Client, wanted: Wanted, present: &[MachineInfo]) -> Result<Plan> {
    let Wanted { body, mut request } = wanted;
    let machine = request.name.clone().unwrap_or_default();
    let of = || format!("machine {machine:?}");
    let before = present.iter().find(|it| it.name == machine);
    let (own, files) = body.read(client, &machine, before).await.with_context(of)?;
    request.kind_spec = own;
    // The node validates the name.
    let path = keel_api::path(["machines", &machine, "diff"]);
    let found: MachineDiff = client.post(&path, &request).await.with_context(of)?;
    let action = match (&found.node, &found.changes[..]) {
        (None, _) => Action::Create,
        (Some(_), []) => Action::Unchanged,
        (Some(_), changes) if changes.iter().all(|change| change.live) => Action::Change,
        (Some(_), _) => Action::Replace,
    };
    Ok(Plan {
        machine,
        action,
        changes: found.changes.clone(),
        done: false,
        wanted: request,
        files,
        shutdown: before.map_or(Duration::ZERO, file::shutdown),
        found,
    })
}

/// Warns of state that a checkpoint does not restore.
fn warn(plan: &Plan) {
    if plan.action == Action::Unchanged || plan.wanted.restart == Restart::No {
        return;
    }
    for volume in &plan.wanted.volumes {
        if let VolumeRequest::Host {
            host,
            guest,
            read_only: false,
        } = volume
        {
            eprintln!(
                "keel: warning: machine {:?} restarts from its newest checkpoint when its process is lost; its files in {guest} are not rolled back, they are as {host} has them then",
                plan.machine
            );
        }
    }
}

fn refuse_replacing(plans: &[Plan]) -> Result<()> {
    let mut lines = Vec::new();
    for plan in plans.iter().filter(|plan| plan.action == Action::Replace) {
        for change in plan.changes.iter().filter(|change| !change.live) {
            lines.push(format!("  {}: {}", plan.machine, line(change)));
        }
    }
    if lines.is_empty() {
        return Ok(());
    }
    bail!(
        "these changes need a restart of machines, which loses their memory, own volumes and own disks (--replace allows it); nothing was changed:\n{}",
        lines.join("\n")
    )
}

async fn carry_out(client: &Client, plan: &Plan) -> Result<()> {
    match plan.action {
        Action::Unchanged => Ok(()),
        Action::Create => create(client, plan, plan.wanted.on.clone()).await,
        Action::Change => {
            let wanted = &plan.wanted;
            let changes = |field| plan.changes.iter().any(|change| change.field == field);
            let request = SetRequest {
                memory_bytes: changes("memory").then_some(wanted.memory_bytes),
                // 0 means none.
                cpu_limit_millis: changes("cpu-limit")
                    .then(|| wanted.cpu_limit_millis.unwrap_or(0)),
                restart: changes("restart").then_some(wanted.restart),
                checkpoints: changes("checkpoints").then(|| match &wanted.checkpoints {
                    Some(plan) => CheckpointChange::Plan(plan.clone()),
                    None => CheckpointChange::None,
                }),
                ha: changes("ha").then(|| match &wanted.ha {
                    Some(ha) => HighAvailabilityChange::On(ha.clone()),
                    None => HighAvailabilityChange::Off,
                }),
                balance: changes("balance").then_some(wanted.balancing.by),
                cpu_target_millis: changes("cpu-target")
                    .then(|| wanted.balancing.cpu_target_millis.unwrap_or(0)),
                memory_target_bytes: changes("memory-target")
                    .then(|| wanted.balancing.memory_target_bytes.unwrap_or(0)),
                io_target_bytes_per_s: changes("io-target")
                    .then(|| wanted.balancing.io_target_bytes_per_s.unwrap_or(0)),
                parts_max: changes("max-parts").then(|| wanted.balancing.parts_max.unwrap_or(0)),
                spawn: changes("spawn").then_some(wanted.balancing.spawn),
                part_memory_bytes: changes("part-memory")
                    .then(|| wanted.balancing.part_memory_bytes.unwrap_or(0)),
            };
            let path = keel_api::path(["machines", &plan.machine, "set"]);
            let _: MachineInfo = client.post(&path, &request).await?;
            Ok(())
        }
        Action::Replace => {
            remove(client, plan).await?;
            let node = plan.wanted.on.clone().or_else(|| plan.found.node.clone());
            create(client, plan, node).await
        }
    }
}

async fn create(client: &Client, plan: &Plan, on: Option<String>) -> Result<()> {
    let request = RunRequest {
        on,
        ..plan.wanted.clone()
    };
    let _: MachineInfo = client.post("/v1/machines", &request).await?;
    Ok(())
}

/// Stops and removes a machine; one that removes itself at its end may be gone already.
async fn remove(client: &Client, plan: &Plan) -> Result<()> {
    let path = keel_api::path(["machines", &plan.machine]);
    if plan.found.live {
        match client
            .post::<_, Nothing>(&format!("{path}/stop"), &())
            .await
        {
            // It has been told, and takes its time.
            Ok(_) | Err(ClientError::Problem { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let deadline = tokio::time::Instant::now() + REMOVE_PATIENCE + plan.shutdown;
    loop {
        let removed = client
            .call::<Nothing>(Method::DELETE, &path, Bytes::new())
            .await;
        let machines: Vec<MachineInfo> = client.get("/v1/machines").await?;
        if machines.iter().all(|machine| machine.name != plan.machine) {
            return Ok(());
        }
        if tokio::time::Instant::now() > deadline {
            removed?;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn line(change: &FieldChange) -> String {
    format!("{} {} → {}", change.field, change.old, change.new)
}

fn page(plans: &[Plan]) -> String {
    let mut text = String::new();
    for plan in plans {
        let word = match (plan.action, plan.done) {
            (Action::Unchanged, _) => "unchanged",
            (Action::Create, false) => "create",
            (Action::Create, true) => "created",
            (Action::Change, false) => "change",
            (Action::Change, true) => "changed",
            (Action::Replace, false) => "replace",
            (Action::Replace, true) => "replaced",
        };
        text += &format!("{word:<10}{}\n", plan.machine);
        for change in &plan.changes {
            text += &format!("{:<10}  {}\n", "", line(change));
        }
    }
    text
}
