//! `keel span`, `unspan`, `parts`, `threads`, `shake`, and `keel move` of a thread or an object.

use crate::cluster::Reach;
use crate::output;
use anyhow::{Result, bail};
use bytes::Bytes;
use hyper::Method;
use keel_api::{
    Client, ClientError, MachineInfo, ObjectInfo, ObjectMoved, PartMemoryInfo, PartsInfo,
    SpanRequest, ThreadInfo, ThreadMove,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Interval of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How long a thread may take to a safepoint and to its new part.
const MOVE_PATIENCE: Duration = Duration::from_secs(10);
/// Pauses between checks of its arrival.
const LOOK_AGAIN_MIN: Duration = Duration::from_millis(1);
const LOOK_AGAIN_MAX: Duration = Duration::from_millis(50);

#[derive(clap::Args)]
pub(crate) struct SpanArgs {
    /// The machine.
    machine: String,
    /// Nodes that get a part; its own node has the home.
    #[arg(long, value_name = "NODES", value_delimiter = ',', required = true)]
    nodes: Vec<String>,
    /// Threads that it creates start at the home, not on the part with the fewest.
    #[arg(long)]
    here: bool,
}

#[derive(clap::Args)]
pub(crate) struct PartsArgs {
    /// The machine.
    machine: String,
    /// Continues, and shows the present state each second.
    #[arg(long)]
    watch: bool,
}

fn path(machine: &str) -> String {
    keel_api::path(["machines", machine, "parts"])
}

fn show_parts(reach: &Reach, info: &PartsInfo) -> Result<()> {
    output::list(
        reach.format(),
        &info.parts,
        &["part", "node", "threads", "memory", "keeps", "gave", "role"],
        |part| part.part.to_string(),
        |part| {
            // Unknown, or without a limit.
            let of_memory = |get: &dyn Fn(&PartMemoryInfo) -> Option<u64>| {
                let bytes = part.memory.as_ref().and_then(get);
                bytes.map_or_else(|| "-".into(), output::bytes)
            };
            vec![
                part.part.to_string(),
                part.node.clone(),
                part.threads.to_string(),
                of_memory(&|it| Some(it.resident_bytes)),
                of_memory(&|it| it.limit_bytes),
                of_memory(&|it| Some(it.given_bytes + it.dropped_bytes)),
                match (part.part, part.silent_s()) {
                    (0, _) => "home".into(),
                    (_, Some(seconds)) => format!("member, silent for {seconds} s"),
                    (_, None) => "member".into(),
                },
            ]
        },
    )
}

fn downtime(info: &PartsInfo) -> String {
    match info.downtime_micros {
        Some(micros) => format!("; downtime {:.1} ms", micros as f64 / 1000.0),
        None => String::new(),
    }
}

pub(crate) async fn span(reach: &Reach, args: &SpanArgs) -> Result<ExitCode> {
    let request = SpanRequest {
        nodes: args.nodes.clone(),
        here: args.here,
    };
    let info: PartsInfo = reach.client()?.post(&path(&args.machine), &request).await?;
    output::one(reach.format(), &info, &args.machine, |info| {
        let nodes: Vec<&str> = info.parts.iter().map(|part| part.node.as_str()).collect();
        format!(
            "{} spans {}{}",
            args.machine,
            nodes.join(", "),
            downtime(info)
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn unspan(reach: &Reach, machine: &str) -> Result<ExitCode> {
    let client = reach.client()?;
    let info: PartsInfo = client
        .call(Method::DELETE, &path(machine), Bytes::new())
        .await?;
    output::one(reach.format(), &info, machine, |info| {
        let node = info.parts.first().map_or("?", |part| part.node.as_str());
        format!("{machine} is on {node} alone{}", downtime(info))
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn parts(reach: &Reach, args: &PartsArgs) -> Result<ExitCode> {
    let client = reach.client()?;
    loop {
        let info: PartsInfo = client.get(&path(&args.machine)).await?;
        if args.watch && std::io::stdout().is_terminal() {
            // Moves the cursor home, and clears the rest.
            out!("\x1b[H\x1b[2J");
        }
        show_parts(reach, &info)?;
        if !args.watch {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

pub(crate) async fn threads(reach: &Reach, machine: &str) -> Result<ExitCode> {
    let info: PartsInfo = reach.client()?.get(&path(machine)).await?;
    output::list(
        reach.format(),
        &info.threads,
        &[
            "thread",
            "node",
            "part",
            "state",
            "cpu there",
            "waited for",
            "likes",
        ],
        |thread| thread.tid.to_string(),
        |thread| {
            vec![
                thread.tid.to_string(),
                thread.node.clone(),
                thread.part.to_string(),
                thread.state.clone(),
                match thread.cpu_micros {
                    Some(micros) => format!("{:.2} s", micros as f64 / 1e6),
                    None => "-".into(),
                },
                page_waits(thread),
                thread.likes.clone().unwrap_or_else(|| "-".into()),
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}

/// How long it waited for pages, by the nodes that sent them.
fn page_waits(thread: &ThreadInfo) -> String {
    let from = thread.stalled_micros.iter();
    let from: Vec<String> = from
        .map(|(node, micros)| format!("{node} {:.2} s", *micros as f64 / 1e6))
        .collect();
    match from.is_empty() {
        true => "-".into(),
        false => from.join(", "),
    }
}

/// The object of a move.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Grain<'a> {
    /// The whole machine.
    Machine,
    /// `M/thread/T`: one thread.
    Thread(&'a str, u32),
    /// `M/objects/RANGE`, `M/objects/NAME`: an object of its memory.
    Object(&'a str, &'a str),
}

/// Parses the name in `keel move`.
pub(crate) fn grain_of(name: &str) -> Result<Grain<'_>> {
    let Some((machine, rest)) = name.split_once('/') else {
        return Ok(Grain::Machine);
    };
    match rest.split_once('/') {
        Some(("thread", tid)) => match tid.parse() {
            Ok(tid) => Ok(Grain::Thread(machine, tid)),
            Err(_) => {
                bail!("{name}: {tid:?} is no number of a thread (see `keel threads {machine}`)")
            }
        },
        Some(("objects", object))
            if keel_api::object_range(object).is_some()
                || keel_wasm::runtime::is_object_name(object) =>
        {
            Ok(Grain::Object(machine, object))
        }
        Some(("objects", object)) => bail!(
            "{name}: {object:?} is neither a range of memory, as 0x10000-0x20000 is, nor a name that programs give (see `keel objects {machine}`)"
        ),
        _ => bail!(
            "{name}: a machine, one thread of it as {machine}/thread/NUMBER, or a piece of its memory as {machine}/objects/RANGE or {machine}/objects/NAME can be moved"
        ),
    }
}

async fn order_object(
    client: &Client,
    machine: &str,
    range: &str,
    to: &str,
) -> Result<ObjectMoved, ClientError> {
    let order = ThreadMove { to: to.to_owned() };
    let path = keel_api::path(["machines", machine, "objects", range, "move"]);
    client.post(&path, &order).await
}

/// Moves an object, and waits until it has arrived.
pub(crate) async fn move_object(
    client: &Client,
    machine: &str,
    range: &str,
    to: &str,
) -> Result<ExitCode> {
    let begun = Instant::now();
    let moved = order_object(client, machine, range, to).await?;
    outln!(
        "{} of {machine} moved to {to} in {:.1} ms",
        output::bytes(moved.bytes),
        begun.elapsed().as_secs_f64() * 1000.0
    );
    Ok(ExitCode::SUCCESS)
}

#[derive(clap::Args)]
pub(crate) struct ShakeArgs {
    /// The machine; it must have parts on several nodes.
    machine: String,
    /// Duration (default: until the machine ends).
    #[arg(long = "for", value_name = "TIME", value_parser = crate::when::duration)]
    time: Option<Duration>,
    /// Moves a second.
    #[arg(long, value_name = "RATE", default_value_t = 20.0)]
    rate: f64,
    /// Seed of the random moves.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// The most pages of an object that is moved at once.
const SHAKEN_BYTES: u64 = 64 << 12;

/// Moves threads and objects of a machine at random, as a test that their placement does not
/// affect the result.
pub(crate) async fn shake(reach: &Reach, args: &ShakeArgs) -> Result<ExitCode> {
    anyhow::ensure!(
        args.rate.is_finite() && args.rate > 0.0,
        "--rate {}: it must be more than 0",
        args.rate
    );
    let (client, machine) = (reach.client()?, &args.machine);
    let pause = Duration::from_secs_f64((1.0 / args.rate).min(3600.0));
    let mut random = StdRng::seed_from_u64(args.seed);
    let begun = Instant::now();
    let (mut threads, mut objects) = (0_u64, 0_u64);
    let first: PartsInfo = client.get(&path(machine)).await?;
    anyhow::ensure!(
        first.parts.len() > 1,
        "{machine} is on one node: `keel span {machine} --nodes ...` first"
    );
    while args.time.is_none_or(|time| begun.elapsed() < time) {
        tokio::time::sleep(pause).await;
        let Ok(info) = client.get::<PartsInfo>(&path(machine)).await else {
            let after: MachineInfo = client.get(&keel_api::path(["machines", machine])).await?;
            let is_well = ["exited (0)", "stopped", "running", "arriving"];
            anyhow::ensure!(
                is_well.iter().any(|it| after.status.starts_with(it)),
                "{machine} is {} after {threads} moves of threads and {objects} of memory: {}",
                after.status,
                after.message.as_deref().unwrap_or("no reason is known")
            );
            break;
        };
        let (Some(thread), Some(part)) = (
            info.threads.choose(&mut random),
            info.parts.choose(&mut random),
        ) else {
            break;
        };
        // A thread that has just ended, or is moving, is no error.
        if random.random_bool(0.5) {
            let order = ThreadMove {
                to: part.node.clone(),
            };
            let path = keel_api::path([
                "machines",
                machine,
                "threads",
                &thread.tid.to_string(),
                "move",
            ]);
            threads += u64::from(client.post::<_, PartsInfo>(&path, &order).await.is_ok());
            continue;
        }
        let path = keel_api::path(["machines", machine, "objects"]);
        let Ok(all) = client.get::<Vec<ObjectInfo>>(&path).await else {
            continue;
        };
        let range = all.choose(&mut random).map(|object| object.range.as_str());
        let Some((memory, start, bytes)) = range.and_then(keel_api::object_range) else {
            continue;
        };
        let name = keel_api::object_range_name(memory, start, bytes.min(SHAKEN_BYTES));
        let moved = order_object(&client, machine, &name, &part.node).await;
        objects += u64::from(moved.is_ok());
    }
    outln!(
        "{threads} moves of threads and {objects} of memory in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}

/// Moves a thread, and waits until it has arrived.
pub(crate) async fn move_thread(
    client: &Client,
    machine: &str,
    tid: u32,
    to: &str,
) -> Result<ExitCode> {
    let order = ThreadMove { to: to.to_owned() };
    let order_path = keel_api::path(["machines", machine, "threads", &tid.to_string(), "move"]);
    let mut info: PartsInfo = client.post(&order_path, &order).await?;
    let begun = Instant::now();
    let mut pause = LOOK_AGAIN_MIN;
    loop {
        let Some(thread) = info.threads.iter().find(|thread| thread.tid == tid) else {
            outln!("thread {tid} of {machine} has ended");
            return Ok(ExitCode::SUCCESS);
        };
        if thread.state != "moving" {
            outln!("thread {tid} of {machine} runs on {}", thread.node);
            return Ok(ExitCode::SUCCESS);
        }
        if begun.elapsed() > MOVE_PATIENCE {
            let concerned = info
                .parts
                .iter()
                .filter(|part| part.node == thread.node || part.node == to);
            let silent = concerned
                .filter_map(|part| Some((&part.node, part.silent_s()?)))
                .max_by_key(|(_, seconds)| *seconds);
            if let Some((node, seconds)) = silent {
                bail!(
                    "thread {tid} of {machine} is still on {}: the part on {node} has not answered for {seconds} s, its process is stopped or {node} is overloaded; it moves when that is over",
                    thread.node
                );
            }
            bail!(
                "thread {tid} of {machine} is still on {}: it is in a long host call; it moves when the call ends",
                thread.node
            );
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_AGAIN_MAX);
        info = client.get(&path(machine)).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_is_named_by_its_machine() {
        assert_eq!(grain_of("lines").unwrap(), Grain::Machine);
        assert_eq!(grain_of("m/thread/7").unwrap(), Grain::Thread("m", 7));
        let object = "m/objects/0x1000-0x3000";
        assert_eq!(
            grain_of(object).unwrap(),
            Grain::Object("m", "0x1000-0x3000")
        );
        let named = grain_of("m/objects/cache.1").unwrap();
        assert_eq!(named, Grain::Object("m", "cache.1"));
        for wrong in [
            "m/thread",
            "m/thread/x",
            "m/7",
            "m/thread/-1",
            "m/objects/a b",
            "m/objects/0x3000-0x1000",
        ] {
            let error = grain_of(wrong).unwrap_err().to_string();
            assert!(error.starts_with(wrong), "{error}");
        }
    }
}
