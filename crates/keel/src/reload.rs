//! `keel reload`: restarts the agent of a node from the file that is installed, while its machines
//! run on.

use crate::cluster::Reach;
use crate::output;
use anyhow::{Result, bail};
use keel_api::{AgentRestart, ClientError, ClusterInfo};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Duration;

/// The next agent may take this long; the node counts as alive until then.
const START_WITHIN: Duration = Duration::from_secs(60);
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// What was done.
#[derive(Serialize)]
struct Reloaded {
    node: String,
    /// Version of the agent before.
    before: String,
    /// Version of the agent now.
    version: String,
    /// Machines of the node that ran on.
    machines: Vec<String>,
}

pub(crate) async fn run(reach: &Reach) -> Result<ExitCode> {
    let client = reach.client()?;
    let before: ClusterInfo = client.get("/v1/status").await?;
    let restart: AgentRestart = client.post("/v1/agent/restart", &()).await?;
    let deadline = tokio::time::Instant::now() + START_WITHIN;
    let now = loop {
        match client.get::<ClusterInfo>("/v1/status").await {
            Ok(info) if info.agent_started_unix_ms != before.agent_started_unix_ms => break info,
            // The agent that ends answers until it has ended, and the next one when it is ready.
            Ok(_) | Err(ClientError::Connect { .. } | ClientError::Broken(_)) => {}
            Err(error) => tracing::debug!(%error, "the node does not answer yet"),
        }
        if tokio::time::Instant::now() > deadline {
            bail!(
                "the agent of node {} ended, and none has answered within {} s; its machines are \
                 restarted on other nodes unless one starts now. Its log says why (journalctl -u \
                 keel, or agent.log in its folder)",
                restart.node,
                START_WITHIN.as_secs()
            );
        }
        tokio::time::sleep(ASK_AGAIN_AFTER).await;
    };
    let done = Reloaded {
        node: restart.node,
        before: restart.version,
        version: now.version,
        machines: restart.machines,
    };
    output::one(reach.format(), &done, &done.node, |done| {
        let version = match done.before == done.version {
            true => format!("keel {}", done.version),
            false => format!("keel {}, before {}", done.version, done.before),
        };
        let machines = match done.machines.len() {
            1 => "1 machine".to_owned(),
            count => format!("{count} machines"),
        };
        format!(
            "node {} has a new agent ({version}); {machines} ran on",
            done.node
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
