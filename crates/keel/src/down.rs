//! `keel down`: stops the node that `keel up` started on this computer. The parent gets a signal
//! to end, which ends its agent in order; workers are processes of their own and stay.

use crate::cluster::Reach;
use crate::output::Format;
use anyhow::{Context, Result, bail};
use keel_api::{Client, ClusterInfo, MachineInfo};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long the node may take to list its machines.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long a parent may take to restart an agent that has just died.
const FIND_WITHIN: Duration = Duration::from_secs(3);
/// How long a node may take to end.
const END_WITHIN: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Stops the node's machines first (without it they continue, and the next `keel up` finds
    /// them).
    #[arg(long)]
    machines: bool,
}

/// The plan of the command, and then its result.
#[derive(Serialize)]
struct Line<'a> {
    /// `stopping`, then `down`.
    state: &'static str,
    /// The node; none if it does not answer.
    node: Option<&'a str>,
    /// Machines of the node that are stopped.
    machines_stopped: &'a [String],
    /// Machines of the node that continue to run.
    machines_running_on: &'a [String],
    /// Whether no node can run, move or stop machines until this one is started again.
    store: bool,
}

/// A running node.
pub(crate) struct Node {
    /// The parent, whose signal ends the agent in order; the agent itself if it has no parent.
    parent: OwnedFd,
    agent: OwnedFd,
    /// Whether systemd started it, and would again.
    pub(crate) service: bool,
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let folder = reach.state_dir();
    let socket = folder.join("api.socket");
    anyhow::ensure!(
        !reach.is_remote(),
        "`keel down` stops the node of this computer: leave --server, and name its folder with --state-dir"
    );
    let node = find(&socket).await?;
    if node.service {
        bail!(
            "the node in {} is run by systemd, which would start it again: `systemctl stop keel` stops it",
            folder.display()
        );
    }
    let client = Client::socket(socket);
    let asked = tokio::time::timeout(ANSWER_WITHIN, machines_of(&client)).await;
    let known = asked.unwrap_or_else(|_| bail!("it does not answer within {ANSWER_WITHIN:?}"));
    let (name, machines, store) = match &known {
        Ok((info, machines)) => (
            Some(info.node.as_str()),
            &machines[..],
            info.voters == [info.node.clone()],
        ),
        Err(error) if args.machines => {
            bail!("the node's machines cannot be stopped, so it is not stopped either: {error:#}")
        }
        Err(error) => {
            eprintln!("keel: cannot list the machines that continue to run: {error:#}");
            (None, &[][..], false)
        }
    };
    let (stopped, running_on) = match args.machines {
        true => (machines, &[][..]),
        false => (&[][..], machines),
    };
    let mut line = Line {
        state: "stopping",
        node: name,
        machines_stopped: stopped,
        machines_running_on: running_on,
        store,
    };
    tell(reach.format(), &line)?;
    for machine in stopped {
        let path = keel_api::path(["machines", machine, "stop"]);
        let _: serde_json::Value = client.post(&path, &()).await.with_context(|| {
            format!("machine {machine} is not stopped, so the node is not either")
        })?;
    }
    end(node, &folder).await?;
    line.state = "down";
    tell(reach.format(), &line)?;
    Ok(ExitCode::SUCCESS)
}

/// The node's state, and its machines that are scheduled to run.
async fn machines_of(client: &Client) -> Result<(ClusterInfo, Vec<String>)> {
    let info: ClusterInfo = client.get("/v1/status").await?;
    let machines: Vec<MachineInfo> = client.get("/v1/machines").await?;
    let ours = machines
        .into_iter()
        .filter(|machine| machine.node == info.node && machine.is_live());
    let names = ours.map(|machine| machine.name).collect();
    Ok((info, names))
}

fn tell(format: Format, line: &Line<'_>) -> Result<()> {
    let node = line.node.unwrap_or("the node");
    match (format, line.state) {
        (Format::Json, _) => outln!("{}", serde_json::to_string(line)?),
        (Format::Name, "down") => outln!("{node}"),
        (Format::Name, _) => {}
        (Format::Text, "down") => outln!("{node} is down (`keel up` starts it again)"),
        (Format::Text, _) => {
            outln!("stopping {node}");
            if !line.machines_stopped.is_empty() {
                outln!("stopping machines: {}", line.machines_stopped.join(", "));
            }
            if !line.machines_running_on.is_empty() {
                outln!(
                    "machines continue to run, and the next `keel up` finds them: {}",
                    line.machines_running_on.join(", ")
                );
            }
            if line.store {
                outln!(
                    "it keeps the store: until it is up again, no node can run, move or stop machines"
                );
            }
        }
    }
    Ok(())
}

/// The processes of the node that listens at a socket.
pub(crate) async fn find(socket: &Path) -> Result<Node> {
    let missing = || {
        let folder = socket.parent().unwrap_or(socket).display();
        format!("no node runs in {folder} (`keel up` starts one; --state-dir names another folder)")
    };
    anyhow::ensure!(socket.exists(), missing());
    let deadline = Instant::now() + FIND_WITHIN;
    let stream = loop {
        match tokio::net::UnixStream::connect(socket).await {
            Ok(stream) => break stream,
            Err(_) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(_) => bail!(missing()),
        }
    };
    let peer = stream
        .peer_cred()
        .context("the process of the node's socket")?;
    let agent = peer
        .pid()
        .and_then(Pid::from_raw)
        .context("the kernel does not report the process of the node's socket")?;
    let open = |pid: Pid| {
        pidfd_open(pid, PidfdFlags::empty())
            .with_context(|| format!("process {} of the node", pid.as_raw_nonzero()))
    };
    let parent = parent_of(agent);
    Ok(Node {
        agent: open(agent)?,
        parent: open(parent.unwrap_or(agent))?,
        service: parent.is_some_and(is_service),
    })
}

/// The process that started an agent and restarts it at its end, if there is one.
fn parent_of(agent: Pid) -> Option<Pid> {
    let named = keel_node::PARENT_ENVIRONMENT;
    let named = variable(agent, named)?
        .parse()
        .ok()
        .and_then(Pid::from_raw)?;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.as_raw_nonzero())).ok()?;
    // PID (NAME) STATE PARENT; the name may contain any character.
    let fields = stat.rsplit_once(')')?.1;
    let parent = fields.split_whitespace().nth(1)?.parse().ok();
    let parent = parent.and_then(Pid::from_raw)?;
    (parent == named).then_some(parent)
}

/// Whether systemd started a process itself, and would restart it.
fn is_service(parent: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", parent.as_raw_nonzero()));
    let of_init = stat.is_ok_and(|stat| {
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        fields.split_whitespace().nth(1) == Some("1")
    });
    of_init
        && variable(parent, "SYSTEMD_EXEC_PID")
            .is_some_and(|pid| pid == parent.as_raw_nonzero().to_string())
}

/// A variable in a process's initial environment.
fn variable(process: Pid, name: &str) -> Option<String> {
    let all = std::fs::read(format!("/proc/{}/environ", process.as_raw_nonzero())).ok()?;
    let mut all = all.split(|byte| *byte == 0);
    all.find_map(|variable| {
        let text = std::str::from_utf8(variable).ok()?;
        text.strip_prefix(name)?
            .strip_prefix('=')
            .map(str::to_owned)
    })
}

/// Signals a node to end, and waits until it has.
pub(crate) async fn end(node: Node, folder: &Path) -> Result<()> {
    // An error means that it has ended already.
    let _ = pidfd_send_signal(&node.parent, Signal::TERM);
    let ended = tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + END_WITHIN;
        [node.parent, node.agent]
            .iter()
            .all(|process| is_gone_by(process, deadline))
    });
    anyhow::ensure!(
        ended.await.context("waiting for the node's end")?,
        "the node in {} was told to stop and still runs after {END_WITHIN:?}; its log: {}",
        folder.display(),
        folder.join("agent.log").display()
    );
    Ok(())
}

fn is_gone_by(process: &OwnedFd, deadline: Instant) -> bool {
    let rest = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec {
        tv_sec: rest.as_secs() as i64,
        tv_nsec: rest.subsec_nanos().into(),
    };
    // The handle of an ended process is readable.
    let mut ended = [PollFd::new(process, PollFlags::IN)];
    matches!(poll(&mut ended, Some(&timeout)), Ok(1..))
}
