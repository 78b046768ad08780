//! Commands on machines.

use crate::cluster::Reach;
use crate::output::{self, Format};
use crate::parts::{self, Grain, grain_of};
use crate::program::Invocation;
use crate::started::started;
use crate::system::{self, SystemArgs};
use crate::volume::VolumeArg;
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use hyper::Method;
use keel_api::{
    Client, ClientError, LogOffset, MachineInfo, MoveLine, MoveRequest, RunRequest, Urgency,
    VolumeRequest,
};
use keel_kind_qemu::QemuKind;
use keel_kind_wasm::{WasmKind, WasmSpec};
use keel_machine::checkpoint::Retention;
use keel_machine::high_availability::HighAvailability;
use keel_machine::log::{StreamKind, offset_behind, split_records};
use keel_machine::moves::{Ending, Phase};
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{BalanceBy, Balancing, CheckpointPlan, Spawn};
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// The default number of periodic checkpoints that are kept of a machine.
const CHECKPOINTS_KEPT: u32 = 16;

/// Options of periodic checkpoints.
#[derive(clap::Args)]
pub(crate) struct CheckpointsArgs {
    /// Makes a checkpoint after each interval (examples: 30s, 10m, 1d).
    #[arg(long, value_name = "TIME", value_parser = crate::when::duration)]
    checkpoint_every: Option<Duration>,
    /// Their place: a directory that all nodes see or s3://bucket/prefix (default: the node's own
    /// folder, which is lost with the node).
    #[arg(long, value_name = "PLACE", requires = "checkpoint_every")]
    checkpoint_to: Option<String>,
    /// How many are kept (default: 16).
    #[arg(long, value_name = "N", requires = "checkpoint_every",
          value_parser = clap::value_parser!(u32).range(1..))]
    checkpoint_keep: Option<u32>,
    /// How long they are kept (examples: 12h, 7d); with the number, a checkpoint stays if either
    /// keeps it.
    #[arg(long, value_name = "TIME", requires = "checkpoint_every",
          value_parser = crate::when::duration)]
    checkpoint_keep_for: Option<Duration>,
}

impl CheckpointsArgs {
    pub(crate) fn plan(&self) -> Result<Option<CheckpointPlan>> {
        let Some(every) = self.checkpoint_every else {
            return Ok(None);
        };
        let to = self.checkpoint_to.as_deref();
        checkpoint_plan(every, to, self.checkpoint_keep, self.checkpoint_keep_for).map(Some)
    }
}

#[derive(clap::Args)]
pub(crate) struct BalancingArgs {
    /// Which of its loads counts in balancing, measured or target; or whether it is excluded from
    /// balancing.
    #[arg(long, value_name = "LOAD", default_value = "policy")]
    balance: Balance,
    /// Its target CPU demand (cpu.target), in cores of the reference speed.
    #[arg(long, value_name = "CORES", value_parser = crate::size::cores)]
    cpu_target: Option<u32>,
    /// Its target memory (memory.target).
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    memory_target: Option<u64>,
    /// Its target disk traffic (io.target), a second.
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    io_target: Option<u64>,
    /// The most parts that balancing may give it, each on a node of its own, if it overloads a
    /// node (2 to 64; default: none).
    #[arg(long, value_name = "COUNT")]
    max_parts: Option<u32>,
    /// Where threads start that it creates while it has parts.
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "auto",
        requires = "max_parts"
    )]
    spawn: SpawnWhere,
    /// The most memory that one of its parts keeps while others have room (part.memory).
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse, requires = "max_parts")]
    part_memory: Option<u64>,
}

impl BalancingArgs {
    fn balancing(&self) -> Balancing {
        Balancing {
            by: self.balance.into(),
            cpu_target_millis: self.cpu_target,
            memory_target_bytes: self.memory_target,
            io_target_bytes_per_s: self.io_target,
            parts_max: self.max_parts,
            spawn: self.spawn.into(),
            part_memory_bytes: self.part_memory,
        }
    }
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum SpawnWhere {
    /// On the node with most free capacity; it gets parts once it overloads its node.
    Auto,
    /// At its home; balancing moves them later.
    Here,
    /// On the node with the fewest of its threads; it has parts from the beginning.
    Spread,
}

impl From<SpawnWhere> for Spawn {
    fn from(spawn: SpawnWhere) -> Self {
        match spawn {
            SpawnWhere::Auto => Spawn::Auto,
            SpawnWhere::Here => Spawn::Here,
            SpawnWhere::Spread => Spawn::Spread,
        }
    }
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum Balance {
    /// By the cluster's policy.
    Policy,
    /// The measured load.
    Actual,
    /// The target load; values without a target are measured.
    Target,
    /// Balancing does not move it; rules and drains do.
    Off,
}

impl From<Balance> for BalanceBy {
    fn from(balance: Balance) -> Self {
        match balance {
            Balance::Policy => BalanceBy::Policy,
            Balance::Actual => BalanceBy::Actual,
            Balance::Target => BalanceBy::Target,
            Balance::Off => BalanceBy::Off,
        }
    }
}

/// The schedule of periodic checkpoints, with defaults.
pub(crate) fn checkpoint_plan(
    every: Duration,
    to: Option<&str>,
    keep: Option<u32>,
    keep_for: Option<Duration>,
) -> Result<CheckpointPlan> {
    let mut retention = Retention {
        newest: keep,
        for_s: keep_for.map(|time| time.as_secs()),
    };
    if retention.is_all() {
        retention.newest = Some(CHECKPOINTS_KEPT);
    }
    Ok(CheckpointPlan {
        every_s: every.as_secs(),
        to: to.map(crate::checkpoint::place).transpose()?,
        retention,
    })
}
/// Default limits of a machine.
pub(crate) const MEMORY_DEFAULT: &str = "4G";
pub(crate) const THREADS_DEFAULT: u32 = 256;
pub(crate) const OUTPUT_RATE_DEFAULT: &str = "16M";

#[derive(clap::Args)]
#[command(override_usage = "keel run [OPTIONS] <MODULE> [ARGS]...
       keel run [OPTIONS] --kind qemu --image <FILE> | --kernel <FILE> | --disk <PATH>")]
pub(crate) struct RunArgs {
    /// The program, a WASI preview 1 core module with or without threads, and its arguments.
    /// Options before it are keel's, those after it are the program's.
    #[arg(trailing_var_arg = true, num_args = 1.., value_names = ["MODULE", "ARGS"],
          required_unless_present_any = ["kind", "image", "kernel", "disk"])]
    program: Vec<OsString>,
    #[command(flatten)]
    system: SystemArgs,
    /// Name of the machine (default: generated).
    #[arg(long)]
    name: Option<String>,
    /// Node to start it on (default: the one that is asked).
    #[arg(long, value_name = "NODE")]
    on: Option<String>,
    /// Waits until it runs, prints the name and leaves it running.
    #[arg(short, long)]
    detach: bool,
    /// Removes it when it ends.
    #[arg(long)]
    rm: bool,
    /// When it is restarted after its end. After the loss of its worker it continues from its
    /// newest checkpoint; `keel stop` and `keel kill` end it for good.
    #[arg(long, value_name = "WHEN", default_value = "no", conflicts_with = "rm")]
    restart: RestartWhen,
    #[command(flatten)]
    checkpoints: CheckpointsArgs,
    /// Restarts it elsewhere from its newest checkpoint when its node fails. Settings (defaults):
    /// checkpoint=10s, priority=5 (0 to 100, higher first), replicas=1 (other nodes with its
    /// checkpoint) or to=PLACE (that all nodes see), protect=none (output: nothing that was read
    /// of its output is undone; checkpoint=100ms then), fence=none (timer, hook: for `--dir`).
    #[arg(long, value_name = "SETTINGS", num_args = 0..=1, require_equals = true,
          default_missing_value = "", value_parser = crate::high_availability::parse,
          conflicts_with = "checkpoint_every")]
    ha: Option<HighAvailability>,
    #[command(flatten)]
    balancing: BalancingArgs,
    /// Lets it reach a directory that all nodes see; `::ro` makes it read-only.
    #[arg(long, value_name = "HOST[::GUEST[::ro]]")]
    dir: Vec<String>,
    /// Gives it a volume: `tmp:SIZE:GUEST`, its own, which moves and ends with it;
    /// `cluster:NAME:GUEST[:ro]`, one of the cluster's (`keel volume`), which outlives it; or a
    /// directory that all nodes see, `HOST:GUEST[:ro]`.
    #[arg(long, value_name = "VOLUME", value_parser = crate::volume::parse)]
    volume: Vec<VolumeArg>,
    /// Sets an environment variable.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Limit of each of its memories (default: 4G); of a whole system, its memory (default: 1G).
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    memory: Option<u64>,
    /// Limit of its threads.
    #[arg(long, value_name = "N", default_value_t = THREADS_DEFAULT)]
    threads: u32,
    /// Limit of the CPU time of all its threads, in cores (0.01 and more).
    #[arg(long, value_name = "CORES", value_parser = crate::size::cores)]
    cpu_limit: Option<u32>,
    /// Limit of its output, a second.
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse, default_value = OUTPUT_RATE_DEFAULT)]
    output_rate: u64,
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum RestartWhen {
    /// Never.
    No,
    /// When it trapped, exited with another code than 0, or its worker was lost.
    OnFailure,
    /// Whenever it ended by itself.
    Always,
}

impl From<RestartWhen> for Restart {
    fn from(when: RestartWhen) -> Self {
        match when {
            RestartWhen::No => Restart::No,
            RestartWhen::OnFailure => Restart::OnFailure,
            RestartWhen::Always => Restart::Always,
        }
    }
}

#[derive(clap::Args)]
pub(crate) struct LogArgs {
    /// The machine.
    machine: String,
    /// Follows the output until the machine ends, across moves.
    #[arg(short, long)]
    follow: bool,
    /// Only output since: a duration ago (10m, 2h, 1d) or a UTC time (2026-01-31T12:00:00Z,
    /// 2026-01-31).
    #[arg(long, value_name = "TIME", value_parser = crate::when::since)]
    since: Option<u64>,
}

#[derive(clap::Args)]
pub(crate) struct MoveArgs {
    /// The machine, or one thread of it (M/thread/NUMBER, see `keel threads`), or an object of its
    /// memory (M/objects/RANGE, see `keel objects`).
    machine: String,
    /// The node to move it to.
    #[arg(long, value_name = "NODE", required_unless_present = "cancel")]
    to: Option<String>,
    /// Moves by post-copy: the machine resumes first and part of its memory follows. The downtime
    /// is shorter, but if the source is lost before all memory has arrived, a program restarts
    /// from the checkpoint that is made first, and a whole system has to boot again.
    #[arg(long)]
    post_copy: bool,
    /// The place of that checkpoint: a directory that all nodes see, or s3://bucket/prefix
    /// (default: the node's own folder).
    #[arg(long, value_name = "PLACE", requires = "post_copy")]
    checkpoint_to: Option<String>,
    /// Priority among the moves that wait for the node's links.
    #[arg(long, value_name = "HOW", default_value = "normal")]
    urgency: HowUrgent,
    /// The longest downtime, in milliseconds: a higher limit reduces the throttling of a machine
    /// with a high dirty rate.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    downtime: Option<u32>,
    /// Predicts the move, and whether the target would accept the machine; changes nothing.
    #[arg(long)]
    dry_run: bool,
    /// Cancels the move in progress.
    #[arg(long, conflicts_with_all = ["to", "dry_run"])]
    cancel: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum HowUrgent {
    /// After the others.
    Low,
    /// In turn.
    Normal,
    /// Before the others.
    High,
}

/// Starts a machine; returns its name.
pub(crate) async fn start(client: &Client, args: &RunArgs) -> Result<MachineInfo> {
    let (kind, kind_spec, memory_default) = match args.system.system(!args.program.is_empty())? {
        Some(system) => {
            ensure!(
                args.env.is_empty(),
                "--env is for programs: a system has no environment"
            );
            let (own, files) = system.read(client, args.name.as_deref(), None).await?;
            for file in files {
                file.upload(client, &QemuKind::kind_name()).await?;
            }
            let own = own.to_kind_spec();
            (QemuKind::kind_name(), own, system::MEMORY_DEFAULT)
        }
        None => (
            WasmKind::kind_name(),
            program(client, args).await?.to_kind_spec(),
            MEMORY_DEFAULT,
        ),
    };
    let memory_default = crate::size::parse(memory_default).map_err(anyhow::Error::msg)?;
    let mut volumes = Vec::new();
    for dir in &args.dir {
        volumes.push(directory(dir)?);
    }
    for volume in &args.volume {
        volumes.push(request(volume)?);
    }
    let request = RunRequest {
        name: args.name.clone(),
        on: args.on.clone(),
        kind,
        kind_spec: kind_spec.map_err(anyhow::Error::msg)?,
        volumes,
        memory_bytes: args.memory.unwrap_or(memory_default),
        cpu_limit_millis: args.cpu_limit,
        output_bytes_per_s: args.output_rate,
        remove_at_end: args.rm,
        restart: args.restart.into(),
        checkpoints: args.checkpoints.plan()?,
        ha: args.ha.clone(),
        balancing: args.balancing.balancing(),
    };
    Ok(client.post("/v1/machines", &request).await?)
}

/// What a program is made of. Uploads its module.
async fn program(client: &Client, args: &RunArgs) -> Result<WasmSpec> {
    let program = Invocation::new(args.program.clone());
    let module = program.read()?;
    let uploaded = client
        .upload(&WasmKind::kind_name(), Bytes::from(module))
        .await
        .with_context(|| format!("module {}", program.module().display()))?;
    let mut env = Vec::new();
    for variable in &args.env {
        let (name, value) = variable
            .split_once('=')
            .with_context(|| format!("--env {variable}: NAME=VALUE is expected"))?;
        env.push((name.to_owned(), value.to_owned()));
    }
    Ok(WasmSpec {
        module: uploaded.hash,
        args: program.arguments()?,
        env,
        threads_max: args.threads,
    })
}

/// The request for a volume that a command or a file names.
pub(crate) fn request(volume: &VolumeArg) -> Result<VolumeRequest> {
    Ok(match volume {
        VolumeArg::Host {
            host,
            guest,
            read_only,
        } => {
            let absolute = host.canonicalize();
            let absolute = absolute
                .with_context(|| format!("--volume: cannot open directory {}", host.display()))?;
            VolumeRequest::Host {
                host: absolute.to_string_lossy().into_owned(),
                guest: guest.clone(),
                read_only: *read_only,
            }
        }
        VolumeArg::Tmp { bytes, guest } => VolumeRequest::Tmp {
            bytes: *bytes,
            inodes: None,
            guest: guest.clone(),
        },
        VolumeArg::Cluster {
            name,
            guest,
            read_only,
        } => VolumeRequest::Cluster {
            name: name.clone(),
            guest: guest.clone(),
            read_only: *read_only,
        },
    })
}

fn directory(text: &str) -> Result<VolumeRequest> {
    let mut parts = text.split("::");
    let host = parts.next().unwrap_or_default();
    let absolute = std::path::Path::new(host)
        .canonicalize()
        .with_context(|| format!("--dir: cannot open directory {host}"))?;
    Ok(VolumeRequest::Host {
        host: absolute.to_string_lossy().into_owned(),
        guest: parts.next().unwrap_or(host).to_owned(),
        read_only: parts.next() == Some("ro"),
    })
}

pub(crate) async fn run(reach: &Reach, args: &RunArgs) -> Result<ExitCode> {
    let client = reach.client()?;
    let mut machine = start(&client, args).await?;
    if args.detach {
        machine = started(&client, machine, reach.format() == Format::Text).await?;
        output::one(reach.format(), &machine, &machine.name, |machine| {
            machine.name.clone()
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    follow(&client, &machine.name, 0, true).await?;
    let path = keel_api::path(["machines", &machine.name]);
    let code = exit_code(&client.get::<MachineInfo>(&path).await?);
    if args.rm {
        // Its node would do so a little later; this frees the name at once. It may be gone
        // already.
        let _ = client
            .call::<serde_json::Value>(Method::DELETE, &path, Bytes::new())
            .await;
    }
    Ok(code)
}

fn exit_code(machine: &MachineInfo) -> ExitCode {
    match (machine.exit_code, &machine.message) {
        (Some(code), _) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        (None, Some(message)) => {
            eprintln!("keel: machine {}: {message}", machine.name);
            ExitCode::from(if machine.status == "trapped" { 134 } else { 1 })
        }
        (None, None) => ExitCode::from(1),
    }
}

/// Pauses before the output of a machine that left its node is requested again.
const FOLLOW_AGAIN_MIN: Duration = Duration::from_millis(1);
const FOLLOW_AGAIN_MAX: Duration = Duration::from_millis(100);

/// How often in a row the output of an ended machine may end early: each time its node was
/// searched for a while.
const BROKEN_MAX: u32 = 3;

/// Prints a machine's output from an offset on, and waits for its end if `follow` is set.
pub(crate) async fn follow(
    client: &Client,
    machine: &str,
    mut offset: u64,
    follow: bool,
) -> Result<()> {
    let mut rest = Vec::new();
    let mut first = true;
    let mut pause = FOLLOW_AGAIN_MIN;
    let mut broken = 0;
    loop {
        let path = format!(
            "{}?from={offset}&follow={follow}",
            keel_api::path(["machines", machine, "logs"])
        );
        let mut stream = match client.get_stream(&path).await {
            Ok(stream) => stream,
            Err(error) if first => return Err(error.into()),
            // It was removed, with the missing output.
            Err(error @ ClientError::Problem { status: 404, .. }) => return Err(error.into()),
            // The node is restarting.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        first = false;
        let ended = loop {
            match stream.chunk().await {
                Ok(Some(bytes)) => {
                    offset += bytes.len() as u64;
                    rest.extend_from_slice(&bytes);
                    // Some may be kept nowhere any more.
                    offset = offset_behind(&rest).unwrap_or(offset);
                    print(&mut rest)?;
                    pause = FOLLOW_AGAIN_MIN;
                    broken = 0;
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let path = keel_api::path(["machines", machine]);
        let is_live = follow && {
            let info = client.get::<MachineInfo>(&path).await;
            info.is_ok_and(|info| info.is_live())
        };
        match ended {
            Ok(()) if !is_live => return Ok(()),
            // It moves, and continues elsewhere in a moment.
            Ok(()) => {}
            Err(_) if is_live => broken = 0,
            Err(error) => {
                broken += 1;
                if !follow || broken >= BROKEN_MAX {
                    bail!(
                        "the output of {machine:?} ended early after {offset} bytes: {error}; \
                         `keel logs {machine}` reads it again"
                    );
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(FOLLOW_AGAIN_MAX);
    }
}

fn print(records: &mut Vec<u8>) -> Result<()> {
    for (stream, text) in split_records(records) {
        match stream {
            StreamKind::Output => {
                let mut out = std::io::stdout().lock();
                out.write_all(&text)?;
                out.flush()?;
            }
            StreamKind::Error => std::io::stderr().lock().write_all(&text)?,
        }
    }
    Ok(())
}

pub(crate) async fn logs(reach: &Reach, args: &LogArgs) -> Result<ExitCode> {
    let (client, machine) = (reach.client()?, &args.machine);
    let from = match args.since {
        Some(since) => {
            let path = format!(
                "{}?since={since}",
                keel_api::path(["machines", machine, "logs", "offset"])
            );
            client.get::<LogOffset>(&path).await?.offset
        }
        None => 0,
    };
    follow(&client, machine, from, args.follow).await?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn ps(reach: &Reach, all: bool) -> Result<ExitCode> {
    let mut machines: Vec<MachineInfo> = reach.client()?.get("/v1/machines").await?;
    if !all {
        machines.retain(MachineInfo::is_live);
    }
    output::list(
        reach.format(),
        &machines,
        &["name", "node", "status", "epoch", "age", "moves", "program"],
        |machine| machine.name.clone(),
        |machine| {
            vec![
                machine.name.clone(),
                machine.node.clone(),
                machine.status_line(),
                machine.epoch.clone(),
                output::ago(machine.created_unix_ms),
                machine
                    .moves
                    .iter()
                    .filter(|report| report.ending == Ending::Moved)
                    .count()
                    .to_string(),
                machine.program.clone(),
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn inspect(reach: &Reach, name: &str) -> Result<ExitCode> {
    let machine: MachineInfo = reach
        .client()?
        .get(&keel_api::path(["machines", name]))
        .await?;
    output::one(reach.format(), &machine, name, describe)?;
    Ok(ExitCode::SUCCESS)
}

fn describe(machine: &MachineInfo) -> String {
    let mut lines = vec![
        format!(
            "{} on {}, {}",
            machine.name,
            machine.node,
            machine.status_line()
        ),
        format!("epoch {}", machine.epoch),
        format!("program {}", machine.program),
        format!("kind {}", machine.kind),
    ];
    lines.extend(output::fields(&machine.kind_spec).map(|(name, value)| format!("{name} {value}")));
    if machine.is_live() {
        lines.push(match machine.ready_on.is_empty() {
            true => "compiled on no node yet".into(),
            false => format!("compiled on {}", machine.ready_on.join(", ")),
        });
    }
    if let (Some(bytes), Some(threads), Some(cpu), Some(pid)) = (
        machine.memory_bytes,
        machine.threads,
        machine.cpu_micros,
        machine.pid,
    ) {
        lines.push(format!(
            "memory {} of {}, {threads} thread(s), {:.1} s of CPU here, process {pid}",
            output::bytes(bytes),
            output::bytes(machine.memory_limit_bytes),
            cpu as f64 / 1e6,
        ));
    }
    if let Some(group) = &machine.cgroup {
        lines.push(format!("kernel: {}", crate::describe::kernel(group)));
    }
    if let Some(limit) = machine.cpu_limit_millis {
        lines.push(format!("cpu limit {} core(s)", f64::from(limit) / 1000.0));
    }
    if let Some(balancing) = machine.balancing.line() {
        lines.push(format!("balanced {balancing}"));
    }
    if machine.restart != Restart::No {
        lines.push(format!(
            "restart {}, {} so far",
            machine.restart.word(),
            machine.restarts
        ));
    }
    for volume in &machine.volumes {
        lines.push(format!("directory {}", crate::volume::line(volume)));
    }
    lines.extend(machine.message.clone());
    for report in &machine.moves {
        lines.push(format!("move: {}", report.line()));
    }
    lines.join("\n")
}

/// Tells each machine to start or to end; prints their names.
pub(crate) async fn tell(reach: &Reach, machines: &[String], what: &str) -> Result<ExitCode> {
    let client = reach.client()?;
    for machine in machines {
        let _: serde_json::Value = client
            .post(&keel_api::path(["machines", machine, what]), &())
            .await?;
        outln!("{machine}");
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn rm(reach: &Reach, machines: &[String], force: bool) -> Result<ExitCode> {
    let client = reach.client()?;
    for machine in machines {
        if force {
            let _: serde_json::Value = client
                .post(&keel_api::path(["machines", machine, "stop"]), &())
                .await?;
        }
        let removed = client
            .call::<serde_json::Value>(
                Method::DELETE,
                &keel_api::path(["machines", machine]),
                Bytes::new(),
            )
            .await;
        match removed {
            Ok(_) => {}
            // A machine with `--rm` may be gone already.
            Err(error) if force && error.to_string().contains("there is no machine") => {}
            Err(error) => return Err(error.into()),
        }
        outln!("{machine}");
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn move_machine(reach: &Reach, args: &MoveArgs) -> Result<ExitCode> {
    let client = reach.client()?;
    let grain = grain_of(&args.machine)?;
    anyhow::ensure!(
        grain == Grain::Machine || !(args.dry_run || args.cancel || args.post_copy),
        "--dry-run, --cancel and --post-copy are for moves of whole machines"
    );
    match (grain, args.to.as_deref()) {
        (Grain::Thread(machine, tid), Some(to)) => {
            return parts::move_thread(&client, machine, tid, to).await;
        }
        (Grain::Object(machine, range), Some(to)) => {
            return parts::move_object(&client, machine, range, to).await;
        }
        _ => {}
    }
    let path = keel_api::path(["machines", &args.machine]);
    let Some(to) = &args.to else {
        let _: serde_json::Value = client.post(&format!("{path}/cancel-move"), &()).await?;
        return Ok(ExitCode::SUCCESS);
    };
    let request = MoveRequest {
        to: to.clone(),
        post_copy: args.post_copy,
        checkpoint_to: args.checkpoint_to.clone(),
        urgency: match args.urgency {
            HowUrgent::Low => Urgency::Low,
            HowUrgent::Normal => Urgency::Normal,
            HowUrgent::High => Urgency::High,
        },
        downtime_ms: args.downtime,
    };
    if args.dry_run {
        return crate::dry_run::dry_run(reach, &args.machine, &request).await;
    }
    let mut lines = client
        .post_stream(&format!("{path}/move"), &request)
        .await?;
    let bar = (reach.format() == Format::Text)
        .then(|| indicatif::ProgressBar::new_spinner().with_message(format!("asking {to}")));
    if let Some(bar) = &bar {
        bar.enable_steady_tick(Duration::from_millis(100));
    }
    while let Some(line) = lines.line::<MoveLine>().await? {
        match line {
            MoveLine::Progress(progress) => {
                if let (Some(bar), Some(percent)) = (&bar, progress.percent) {
                    bar.set_message(format!("compiling its program: {percent} %"));
                } else if let Some(bar) = &bar {
                    bar.set_message(format!(
                        "{} round {}: {} sent, {} left, {}/s",
                        match progress.phase {
                            Phase::Copy => "copying",
                            Phase::Wait => "waiting for other moves,",
                            Phase::Fill => "runs there, the rest of its memory follows",
                            _ => "moving",
                        },
                        progress.round,
                        output::bytes(progress.sent_bytes),
                        output::bytes(progress.remaining_bytes),
                        output::bytes(progress.bytes_per_s),
                    ));
                }
            }
            MoveLine::Report(report) => {
                if let Some(bar) = &bar {
                    bar.finish_and_clear();
                }
                output::one(reach.format(), &report, &args.machine, |report| {
                    report.line()
                })?;
                return Ok(match report.ending {
                    Ending::Moved => ExitCode::SUCCESS,
                    Ending::Stayed { .. } => ExitCode::from(1),
                });
            }
            MoveLine::Error(error) => bail!(error),
        }
    }
    bail!(
        "the node that moves {} no longer answers; `keel inspect {}` shows where it is",
        args.machine,
        args.machine
    )
}
