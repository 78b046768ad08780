//! `keel span`, `unspan`, `parts`, `threads`, and `keel move M/thread/T`.

use crate::cluster::Reach;
use crate::output;
use anyhow::{Result, bail};
use bytes::Bytes;
use hyper::Method;
use keel_api::{Client, PartsInfo, SpanRequest, ThreadMove};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Pause between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How long a thread may take to a safepoint and to its new part.
const MOVE_PATIENCE: Duration = Duration::from_secs(10);
/// Pauses between looks whether it is there.
const LOOK_AGAIN_MIN: Duration = Duration::from_millis(1);
const LOOK_AGAIN_MAX: Duration = Duration::from_millis(50);

#[derive(clap::Args)]
pub(crate) struct SpanArgs {
    /// The machine.
    machine: String,
    /// Nodes that are to have a part; its own one has the home.
    #[arg(long, value_name = "NODES", value_delimiter = ',', required = true)]
    nodes: Vec<String>,
    /// Threads that it starts begin at the home, not where the fewest are.
    #[arg(long)]
    here: bool,
}

#[derive(clap::Args)]
pub(crate) struct PartsArgs {
    /// The machine.
    machine: String,
    /// Goes on, and shows each second how it is then.
    #[arg(long)]
    watch: bool,
}

fn path(machine: &str) -> String {
    format!("/v1/machines/{machine}/parts")
}

fn show_parts(reach: &Reach, info: &PartsInfo) -> Result<()> {
    output::list(
        reach.format(),
        &info.parts,
        &["part", "node", "threads", "role"],
        |part| part.part.to_string(),
        |part| {
            vec![
                part.part.to_string(),
                part.node.clone(),
                part.threads.to_string(),
                if part.part == 0 { "home" } else { "member" }.into(),
            ]
        },
    )
}

fn stood(info: &PartsInfo) -> String {
    match info.stood_micros {
        Some(micros) => format!("; it stood still for {:.1} ms", micros as f64 / 1000.0),
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
        format!("{} spans {}{}", args.machine, nodes.join(", "), stood(info))
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
        format!("{machine} is on {node} alone{}", stood(info))
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn parts(reach: &Reach, args: &PartsArgs) -> Result<ExitCode> {
    let client = reach.client()?;
    loop {
        let info: PartsInfo = client.get(&path(&args.machine)).await?;
        if args.watch && std::io::stdout().is_terminal() {
            // Home, and the rest cleared.
            print!("\x1b[H\x1b[2J");
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
        &["thread", "node", "part", "state", "cpu at home"],
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
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}

/// The machine and the thread that `M/thread/T` names; `None` for a machine's name.
pub(crate) fn thread_of(name: &str) -> Result<Option<(&str, u32)>> {
    let Some((machine, rest)) = name.split_once('/') else {
        return Ok(None);
    };
    match rest.split_once('/') {
        Some(("thread", tid)) => match tid.parse() {
            Ok(tid) => Ok(Some((machine, tid))),
            Err(_) => {
                bail!("{name}: {tid:?} is no number of a thread (see `keel threads {machine}`)")
            }
        },
        _ => {
            bail!("{name}: a machine, or one thread of it as {machine}/thread/NUMBER, can be moved")
        }
    }
}

/// Moves a thread, and waits until it is there.
pub(crate) async fn move_thread(
    client: &Client,
    machine: &str,
    tid: u32,
    to: &str,
) -> Result<ExitCode> {
    let order = ThreadMove { to: to.to_owned() };
    let order_path = format!("/v1/machines/{machine}/threads/{tid}/move");
    let mut info: PartsInfo = client.post(&order_path, &order).await?;
    let begun = Instant::now();
    let mut pause = LOOK_AGAIN_MIN;
    loop {
        let Some(thread) = info.threads.iter().find(|thread| thread.tid == tid) else {
            println!("thread {tid} of {machine} has ended");
            return Ok(ExitCode::SUCCESS);
        };
        if thread.state != "moving" {
            println!("thread {tid} of {machine} runs on {}", thread.node);
            return Ok(ExitCode::SUCCESS);
        }
        if begun.elapsed() > MOVE_PATIENCE {
            bail!(
                "thread {tid} of {machine} is still on {}: it is in a long call of the host; it moves when that is over",
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
    fn threads_are_named_by_their_machine() {
        assert_eq!(thread_of("lines").unwrap(), None);
        assert_eq!(thread_of("lines/thread/7").unwrap(), Some(("lines", 7)));
        for wrong in [
            "lines/thread",
            "lines/thread/x",
            "lines/7",
            "lines/thread/-1",
        ] {
            let error = thread_of(wrong).unwrap_err().to_string();
            assert!(error.contains("thread"), "{error}");
        }
    }
}
