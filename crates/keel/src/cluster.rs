//! Connects the command line to a node; commands about the cluster.

use crate::output::{self, Format};
use anyhow::{Context, Result};
use keel_api::{Client, ClusterInfo, NodeInfo, StoreInfo, Token, TokenRequest, VotersRequest};
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
        self.server.is_some()
    }

    pub(crate) fn client(&self) -> Result<Client> {
        let Some(server) = &self.server else {
            return Ok(Client::socket(self.state_dir().join("api.socket")));
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
    let info: ClusterInfo = reach.client()?.get("/v1/status").await?;
    output::one(reach.format(), &info, &info.cluster, |info| {
        format!(
            "cluster {}\nnode {} (keel {})\nstore on {}: {}\nnodes {} alive of {}\nmachines {} running of {}{}",
            info.cluster,
            info.node,
            info.version,
            info.voters.join(", "),
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
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What is asked of the store.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum StoreCommand {
    /// Shows the voters, and which of them leads.
    Status,
    /// Says how many nodes shall hold the store: 1, 3, 5, or auto.
    ///
    /// `auto`: 3 from 3 nodes on, 5 from 7 on. With 3 voters the store survives the loss of one,
    /// with 5 of two. The leader carries it out while everything goes on.
    Voters {
        /// 1, 3, 5 or auto.
        count: String,
    },
}

pub(crate) async fn store(reach: &Reach, what: Option<StoreCommand>) -> Result<ExitCode> {
    let client = reach.client()?;
    let info: StoreInfo = match what {
        None | Some(StoreCommand::Status) => client.get("/v1/store").await?,
        Some(StoreCommand::Voters { count }) => {
            let request = VotersRequest { count };
            client.post("/v1/store/voters", &request).await?
        }
    };
    let name = info.revision.to_string();
    output::one(reach.format(), &info, &name, |info| {
        let voters = info.voters.iter().map(|voter| {
            format!(
                "  {} at {}{}{}",
                voter.node,
                voter.address,
                if voter.leads { ", leads" } else { "" },
                if voter.alive { "" } else { ", away" },
            )
        });
        let voters: Vec<String> = voters.collect();
        format!(
            "revision {}, term {}\nvoters ({} wanted):\n{}\nmay fail: {}",
            info.revision,
            info.term,
            info.wanted,
            voters.join("\n"),
            match info.spare {
                0 => "none; the store answers only while all that are left do".to_owned(),
                spare => format!("{spare}"),
            },
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn nodes(reach: &Reach) -> Result<ExitCode> {
    let nodes: Vec<NodeInfo> = reach.client()?.get("/v1/nodes").await?;
    output::list(
        reach.format(),
        &nodes,
        &[
            "name", "state", "address", "cpus", "memory", "machines", "lacks",
        ],
        |node| node.name.clone(),
        |node| {
            vec![
                node.name.clone(),
                format!(
                    "{}{}{}",
                    if node.alive { "alive" } else { "away" },
                    if node.draining { ", drained" } else { "" },
                    if node.voter { ", store" } else { "" }
                ),
                node.address.clone(),
                node.cpus.to_string(),
                output::bytes(node.memory_bytes),
                node.machines.to_string(),
                node.lacks.join("; "),
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
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

#[derive(clap::Subcommand)]
pub(crate) enum TokenKind {
    /// Lets one node join, once.
    Join {
        /// Minutes until it expires.
        #[arg(long, default_value_t = 60)]
        minutes: u64,
    },
    /// Lets a user in over TLS.
    User {
        /// Who it is for.
        name: String,
        /// `viewer`, `operator` or `admin`.
        #[arg(long, default_value = "viewer")]
        role: String,
    },
}

pub(crate) async fn token(reach: &Reach, what: TokenKind) -> Result<ExitCode> {
    let (request, for_user) = match what {
        TokenKind::Join { minutes } => (
            TokenRequest::Join {
                ttl_s: minutes.saturating_mul(60),
            },
            false,
        ),
        TokenKind::User { name, role } => (TokenRequest::User { name, role }, true),
    };
    let token: Token = reach.client()?.post("/v1/tokens", &request).await?;
    output::one(reach.format(), &token, &token.token, |token| {
        if for_user {
            format!("{}\nauthority {}", token.token, token.authority)
        } else {
            token.token.clone()
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
