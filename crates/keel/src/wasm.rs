//! `keel wasm APP.wasm`: one program in the foreground, in this process, like `wasmtime run`. The
//! machine is the same as in a cluster.

use crate::program::Invocation;
use crate::volume::VolumeArg;
use crate::wasm_listeners::Listeners;
use anyhow::{Context, Result};
use keel_kind_wasm::span::{InProcess, PART_BYTES_MIN, PartLimits, SpanConfig};
use keel_wasi::volume::VolumeLimits;
use keel_wasi::{Config, FdSink, HostClock, Input, Preopen, Source, SystemClock, Wasi};
use keel_wasm::coherence::PartId;
use keel_wasm::runtime::parts::SpawnPolicy;
use keel_wasm::runtime::{Engine, Limits, Machine, Options, Outcome};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// How long a thread may take to a safepoint with `--shake`.
const PATIENCE: Duration = Duration::from_secs(10);

/// Size of a volume of `--copy`.
const COPY_BYTES: u64 = 1 << 40;

/// Exit code after a trap: that of an aborted process in a shell.
const TRAP_CODE: u8 = 134;

#[derive(clap::Args)]
#[command(override_usage = "keel wasm [OPTIONS] <MODULE> [ARGS]...")]
pub(crate) struct Args {
    #[command(flatten)]
    program: Invocation,
    /// Gives the program access to a directory; `::ro` makes it read-only.
    #[arg(long, value_name = "HOST[::GUEST[::ro]]")]
    dir: Vec<String>,
    /// Gives the program a volume: `tmp:SIZE:GUEST`, its own, removed at its end, or a directory,
    /// `HOST:GUEST[:ro]`.
    #[arg(long, value_name = "VOLUME", value_parser = crate::volume::parse)]
    volume: Vec<VolumeArg>,
    /// Gives the program a volume of its own with a copy of a directory; its changes are removed
    /// at its end.
    #[arg(long, value_name = "HOST[::GUEST]")]
    copy: Vec<String>,
    /// Sets an environment variable (without value: passes it on).
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Gives the program a listening TCP socket (descriptors from 3 on).
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<String>,
    /// Limit of each of its memories.
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse, default_value = "4G")]
    memory: u64,
    /// Limit of its threads.
    #[arg(long, value_name = "N", default_value_t = 256)]
    threads: u32,
    /// Limit of the CPU time of all its threads, in cores (0.01 and more).
    #[arg(long, value_name = "CORES", value_parser = crate::size::cores)]
    cpu_limit: Option<u32>,
    /// Captures and resumes a random thread, or all, this many times a second: through the
    /// serialised form, into fresh instances.
    #[arg(long, value_name = "RATE", conflicts_with = "plain")]
    shake: Option<f64>,
    /// Runs the program as this many parts, each with memory of its own and coherent pages, as on
    /// several nodes; new threads start on the part with the fewest. With `--shake` threads also
    /// move between parts. Not with `--cpu-limit`, which each part would apply on its own.
    #[arg(long, value_name = "N", conflicts_with_all = ["plain", "cpu_limit"], value_parser = clap::value_parser!(u8).range(1..=64))]
    parts: Option<u8>,
    /// The most memory that each part keeps, while others have room.
    #[arg(long, value_name = "SIZE", requires = "parts", value_parser = part_memory)]
    part_memory: Option<u64>,
    /// Seed of random numbers: the program's, and of `--shake`.
    #[arg(long)]
    seed: Option<u64>,
    /// Makes runs comparable bit by bit (NaNs, relaxed SIMD).
    #[arg(long)]
    deterministic: bool,
    /// Runs the module without instrumentation, for comparison.
    #[arg(long)]
    plain: bool,
    /// Disables the cache of compiled code.
    #[arg(long)]
    no_cache: bool,
}

/// Parses the memory limit of a part.
fn part_memory(text: &str) -> Result<u64, String> {
    let bytes = crate::size::parse(text)?;
    match bytes >= PART_BYTES_MIN {
        true => Ok(bytes),
        false => Err(format!(
            "a part keeps at least {} KiB",
            PART_BYTES_MIN >> 10
        )),
    }
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let bytes = args.program.read()?;
    let options = Options {
        deterministic: args.deterministic,
    };
    let limits = Limits {
        memory_bytes: args.memory,
        threads_max: args.threads,
        cpu_millis: args.cpu_limit,
    };
    // Content of its volumes, until it ends.
    let scratch = tempfile::tempdir().context("a folder for volumes")?;
    let name = args.program.module().display();
    let listeners = Listeners::bind(&args.listen)?;
    let wasi = Wasi::new(config(&args, listeners.count(), scratch.path())?)
        .with_context(|| format!("{name} cannot start"))?;
    copy(&args, &wasi)?;
    let engine = engine(&args, options)?;
    let outcome = if args.plain {
        let wasi = Arc::new(wasi);
        let carrier = listeners.serve(wasi.clone())?;
        let outcome = engine
            .run_uninstrumented(&bytes, wasi.clone(), limits)
            .with_context(|| format!("{name} cannot run"))?;
        wasi.finish();
        carrier.finish();
        outcome
    } else {
        let program = engine
            .load(&bytes)
            .with_context(|| format!("{name} cannot run"))?;
        let machine = Machine::ready_under(0, program, wasi, limits)
            .with_context(|| format!("{name} cannot start"))?;
        let parts = args
            .parts
            .map(|count| {
                let how = SpanConfig {
                    spawning: SpawnPolicy::Even,
                    patience: PATIENCE,
                    limits: PartLimits {
                        part_bytes: args.part_memory,
                        room_bytes: None,
                    },
                    stays_stopped: false,
                };
                InProcess::begin(&machine, count.into(), args.memory, how)
                    .with_context(|| format!("{name} cannot run as {count} parts"))
            })
            .transpose()?;
        let carrier = listeners.serve(machine.wasi().clone())?;
        machine.thaw()?;
        let outcome = match args.shake {
            Some(rate) => shaken(&machine, parts.as_ref(), rate, args.seed.unwrap_or(0))?,
            None => machine.wait(None).unwrap_or(Outcome::Stopped),
        };
        machine.wasi().finish();
        carrier.finish();
        if let Some(failure) = parts.and_then(|parts| parts.home().failure()) {
            anyhow::bail!("{name}: {failure}");
        }
        outcome
    };
    Ok(match outcome {
        Outcome::Exit(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Outcome::Trap(trap) => {
            eprintln!("keel: {name}: {trap}");
            ExitCode::from(TRAP_CODE)
        }
        Outcome::Stopped => ExitCode::from(1),
    })
}

fn engine(args: &Args, options: Options) -> Result<Engine> {
    let folder = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .map(|cache| cache.join("keel"));
    Ok(match folder {
        Some(folder) if !args.no_cache => match Engine::with_cache(options, &folder) {
            Ok(engine) => engine,
            Err(error) => {
                tracing::warn!(%error, "running without a cache");
                Engine::new(options)?
            }
        },
        _ => Engine::new(options)?,
    })
}

fn config(args: &Args, listeners: u32, scratch: &Path) -> Result<Config> {
    let mut config = Config {
        listeners,
        stdin: Input::Fd(std::io::stdin().as_fd().try_clone_to_owned()?),
        stdout: Box::new(FdSink::duplicate(std::io::stdout())?),
        stderr: Box::new(FdSink::duplicate(std::io::stderr())?),
        ..Config::default()
    };
    config.args = args.program.arguments()?;
    for variable in &args.env {
        config.env.push(match variable.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (
                variable.clone(),
                std::env::var(variable).map_err(|_| {
                    anyhow::anyhow!(
                        "--env {variable}: no such variable is set here (--env {variable}=VALUE sets it)"
                    )
                })?,
            ),
        });
    }
    for dir in &args.dir {
        config.preopens.push(preopen(dir));
    }
    for (number, volume) in args.volume.iter().enumerate() {
        let (source, guest, read_only) = match volume {
            VolumeArg::Host {
                host,
                guest,
                read_only,
            } => (Source::Host(host.clone()), guest, *read_only),
            VolumeArg::Tmp { bytes, guest } => {
                let folder = scratch.join(format!("volume-{number}"));
                (own(folder, *bytes), guest, false)
            }
            VolumeArg::Cluster { name, .. } => anyhow::bail!(
                "--volume cluster:{name}: only a cluster has such volumes (use `keel run`)"
            ),
        };
        config.preopens.push(Preopen {
            source,
            guest: guest.clone(),
            read_only,
        });
    }
    for (number, dir) in args.copy.iter().enumerate() {
        config.preopens.push(Preopen {
            source: own(scratch.join(format!("copy-{number}")), COPY_BYTES),
            ..preopen(dir)
        });
    }
    config.seed = args.seed.map(|seed| {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes
    });
    Ok(config)
}

fn preopen(text: &str) -> Preopen {
    let mut parts = text.split("::");
    let host = parts.next().unwrap_or_default();
    let guest = parts.next().unwrap_or(host);
    Preopen {
        source: Source::Host(host.into()),
        guest: guest.to_owned(),
        read_only: parts.next() == Some("ro"),
    }
}

fn own(folder: PathBuf, bytes: u64) -> Source {
    Source::Volume {
        folder,
        limits: VolumeLimits::of_bytes(bytes),
        stalls: Arc::default(),
    }
}

/// Copies directories into the volumes of `--copy`, which come last.
fn copy(args: &Args, wasi: &Wasi) -> Result<()> {
    let volumes = wasi.volumes();
    let first = volumes.len().saturating_sub(args.copy.len());
    for (dir, (_, volume)) in args.copy.iter().zip(&volumes[first..]) {
        if let Source::Host(host) = preopen(dir).source {
            volume
                .import(&host, SystemClock.realtime_ns())
                .with_context(|| format!("--copy {dir}"))?;
        }
    }
    Ok(())
}

/// Waits for the end, with random captures meanwhile.
fn shaken(machine: &Machine, parts: Option<&InProcess>, rate: f64, seed: u64) -> Result<Outcome> {
    anyhow::ensure!(
        rate.is_finite() && rate > 0.0,
        "--shake {rate}: the rate must be more than 0"
    );
    let pause = Duration::from_secs_f64((1.0 / rate).min(3600.0));
    let mut random = StdRng::seed_from_u64(seed);
    let (mut whole, mut moves) = (0u64, 0u64);
    let places = parts.map_or(1, |parts| 1 + parts.members().len());
    let outcome = loop {
        if let Some(outcome) = machine.wait(Some(pause)) {
            break outcome;
        }
        let threads = machine.threads();
        if threads.is_empty() {
            continue;
        }
        let thread = threads[random.random_range(0..threads.len())];
        let place = PartId::new(random.random_range(0..places));
        match (random.random_range(0..4), place) {
            // The program may be ending, or be in a long host call.
            (0, _) => whole += u64::from(machine.recapture_all(PATIENCE).is_ok()),
            (1 | 2, Some(place)) if places > 1 => {
                moves += u64::from(machine.move_thread(thread, place).is_ok());
            }
            _ => drop(machine.recapture(thread)),
        }
    };
    let moved = match places {
        1 => String::new(),
        _ => format!("; {moves} moves of threads between {places} parts"),
    };
    eprintln!(
        "keel: {} captures, {whole} of them of the whole machine{moved}",
        machine.captures()
    );
    Ok(outcome)
}
