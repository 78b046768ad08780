//! Connects the command line to a node; commands about the cluster.

use crate::contexts;
use crate::output::{self, Format};
use anyhow::{Context, Result};
use keel_api::{Client, ClusterInfo, NodeInfo, NodeLoss};
use std::path::PathBuf;
use std::process::ExitCode;

/// Options for reaching a node and printing answers.
#[derive(clap::Args)]
pub(crate) struct Reach {
    /// Folder of the node on this computer.
    #[arg(long, global = true, env = "KEEL_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Address of a remote node's API (with --token and --authority).
    #[arg(long, global = true, env = "KEEL_SERVER", value_name = "HOST:PORT")]
    server: Option<String>,
    /// Token for --server.
    #[arg(long, global = true, env = "KEEL_TOKEN", hide_env_values = true)]
    user_token: Option<String>,
    /// Fingerprint of the cluster's authority for --server.
    #[arg(long, global = true, env = "KEEL_AUTHORITY", value_name = "HEX")]
    authority: Option<String>,
    /// A context of `keel login`, or local for the node of this computer.
    #[arg(long, global = true, env = "KEEL_CONTEXT", value_name = "NAME")]
    context: Option<String>,
    /// Output format.
    #[arg(
        short,
        long,
        global = true,
        value_name = "FORMAT",
        default_value = "text"
    )]
    output: Format,
}

impl Reach {
    /// The folder of the node on this computer.
    pub(crate) fn state_dir(&self) -> PathBuf {
        if let Some(dir) = &self.state_dir {
            return dir.clone();
        }
        if rustix::process::geteuid().is_root() {
            return "/var/lib/keel".into();
        }
        std::env::home_dir()
            .unwrap_or_default()
            .join(".local/state/keel")
    }

    pub(crate) fn format(&self) -> Format {
        self.output
    }

    pub(crate) fn json(&self) -> bool {
        self.output == Format::Json
    }

    /// Whether a remote node is asked.
    pub(crate) fn is_remote(&self) -> bool {
        self.server.is_some() || matches!(self.chosen(), Ok(Some(_)))
    }

    /// The cluster that is meant where no server is named; `None` for the node of this computer.
    fn chosen(&self) -> Result<Option<contexts::Context>> {
        match (&self.context, &self.state_dir) {
            (None, Some(_)) => Ok(None),
            (name, _) => contexts::chosen(name.as_deref()),
        }
    }

    pub(crate) fn user_token(&self) -> Option<String> {
        self.user_token.clone()
    }

    pub(crate) fn authority(&self) -> Option<String> {
        self.authority.clone()
    }

    pub(crate) fn client(&self) -> Result<Client> {
        let Some(server) = &self.server else {
            return match self.chosen()? {
                Some(context) => contexts::client(&context),
                None => Ok(Client::socket(self.state_dir().join("api.socket"))),
            };
        };
        let token = self
            .user_token
            .as_ref()
            .context("--server needs --user-token (make one with `keel token user`)")?;
        let authority = self
            .authority
            .as_ref()
            .context("--server needs --authority (printed with the token)")?
            .parse()
            .context("--authority")?;
        Ok(Client::tls(server, token, authority)?)
    }
}

pub(crate) async fn status(reach: &Reach) -> Result<ExitCode> {
    let client = reach.client()?;
    let info: ClusterInfo = client.get("/v1/status").await?;
    // (A node of an older version does not know.)
    let losses: Vec<NodeLoss> = client.get("/v1/failover").await.unwrap_or_default();
    output::one(reach.format(), &info, &info.cluster, |info| {
        format!(
            "cluster {}\nnode {} (keel {})\nstore {}: {}\nnodes {} alive of {}\nmachines {} running of {}{}{}",
            info.cluster,
            info.node,
            info.version,
            match &info.external_store {
                Some(address) => format!("at {address}"),
                None => format!("on {}", info.voters.join(", ")),
            },
            info.store,
            info.nodes_alive,
            info.nodes,
            info.machines_running,
            info.machines,
            if info.voters.len() == 1 && info.nodes > 1 {
                "\nno failover: the store has one voter"
            } else {
                ""
            },
            losses.iter().map(loss).collect::<String>(),
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A line on what the loss of a node would mean.
fn loss(loss: &NodeLoss) -> String {
    let restarted = format!(
        "\nloss of {}: {} restarted elsewhere",
        loss.node, loss.restarted
    );
    match loss.waiting.is_empty() {
        true => restarted,
        false => format!(
            "{restarted}, {} without room or checkpoint on another node: {}",
            loss.waiting.len(),
            loss.waiting.join(", ")
        ),
    }
}

pub(crate) async fn nodes(reach: &Reach) -> Result<ExitCode> {
    let nodes: Vec<NodeInfo> = reach.client()?.get("/v1/nodes").await?;
    output::list(
        reach.format(),
        &nodes,
        &[
            "name", "state", "address", "cpus", "memory", "load", "machines", "kinds", "lacks",
        ],
        |node| node.name.clone(),
        |node| {
            vec![
                node.name.clone(),
                format!(
                    "{}{}{}{}",
                    if node.alive { "alive" } else { "away" },
                    silence(node),
                    if node.draining { ", drained" } else { "" },
                    if node.voter { ", store" } else { "" }
                ),
                node.address.clone(),
                node.cpus.to_string(),
                output::bytes(node.memory_bytes),
                node.load
                    .map_or_else(String::new, |load| format!("{load:.2}")),
                node.machines.to_string(),
                node.kinds.join(", "),
                node.lacks.join("; "),
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}

/// What gossip says of a node that the store says is alive.
fn silence(node: &NodeInfo) -> &'static str {
    match node.answers.as_deref() {
        Some("suspected" | "down") if node.alive => ", silent",
        _ => "",
    }
}

pub(crate) async fn schedule(reach: &Reach, node: &str) -> Result<ExitCode> {
    let machines: Vec<String> = reach
        .client()?
        .get(&keel_api::path(["schedule", node]))
        .await?;
    output::list(
        reach.format(),
        &machines,
        &["machine"],
        Clone::clone,
        |machine| vec![machine.clone()],
    )?;
    Ok(ExitCode::SUCCESS)
}
