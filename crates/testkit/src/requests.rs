//! What tests ask of nodes, by their API, their command line, or their own socket.

use crate::{Guest, LocalCluster, wait_for};
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use keel_api::{Client, MoveLine, MoveRequest, NodeInfo, StoreInfo, Token, TokenRequest, Urgency};
use keel_kind_wasm::{WasmKind, WasmSpec};
use keel_machine::kind::KindSpec;
use keel_machine::moves::MoveReport;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

impl LocalCluster {
    /// Runs `keel` for a node, or in a folder of that name beside those of the nodes; whether it
    /// exited with 0, and all that it said.
    ///
    /// # Panics
    /// If the program cannot be run.
    pub fn keel(&self, node: &str, args: &[&str]) -> (bool, String) {
        let output = std::process::Command::new(&self.program)
            .arg("--state-dir")
            .arg(
                self.nodes
                    .get(node)
                    .map_or_else(|| self.beside().join(node), |known| known.folder.clone()),
            )
            .args(args)
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", self.program.display()));
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        (output.status.success(), said)
    }

    /// All nodes, as `ask` knows them.
    ///
    /// # Errors
    /// The node's answer.
    pub async fn nodes(&self, ask: &str) -> Result<Vec<NodeInfo>> {
        Ok(self.client(ask).get("/v1/nodes").await?)
    }

    /// A node, as `ask` knows it.
    ///
    /// # Errors
    /// The node's answer, and if there is none.
    pub async fn node(&self, ask: &str, name: &str) -> Result<NodeInfo> {
        let nodes = self.nodes(ask).await?;
        let found = nodes.into_iter().find(|node| node.name == name);
        found.with_context(|| format!("{ask} knows no node {name}"))
    }

    /// The node that leads the store, once one other than `not` does.
    ///
    /// # Errors
    /// If there is none in time.
    pub async fn leader(&self, ask: &str, not: Option<&str>) -> Result<String> {
        let client = self.client(ask);
        wait_for("a node leads the store", || async {
            let store: StoreInfo = client.get("/v1/store").await.ok()?;
            let leader = store.voters.into_iter().find(|voter| voter.leads)?;
            (Some(leader.node.as_str()) != not).then_some(leader.node)
        })
        .await
    }

    /// Lets another node join through `via`, in the folder beside it.
    ///
    /// # Errors
    /// The log of a node that did not start, or the answer of `via`.
    pub async fn join_via(&mut self, name: &str, via: &str) -> Result<()> {
        let request = TokenRequest::Join { ttl_s: 600 };
        let token: Token = self.client(via).post("/v1/tokens", &request).await?;
        let address = self.node(via, via).await?.address;
        self.join(&self.beside(), name, &address, &token.token)
            .await
    }

    /// The folder that has those of the nodes.
    fn beside(&self) -> PathBuf {
        let first = self.nodes.values().next();
        let folder = first.and_then(|node| node.folder.parent());
        folder.unwrap_or(Path::new(".")).to_owned()
    }

    /// Status and body of the answer of a node's own socket.
    ///
    /// # Errors
    /// If it does not answer, or not in HTTP.
    pub fn get_by_socket(&self, node: &str, path: &str) -> Result<(u16, String)> {
        let mut stream = UnixStream::connect(self.folder(node).join("api.socket"))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: node\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
        let status = head.split(' ').nth(1).context("no status")?;
        Ok((status.parse()?, body.to_owned()))
    }
}

/// Moves a machine, and waits for its report.
///
/// # Errors
/// As [`LocalCluster::move_machine`].
pub async fn move_by(client: &Client, machine: &str, to: &str) -> Result<MoveReport> {
    let request = MoveRequest {
        to: to.to_owned(),
        post_copy: false,
        checkpoint_to: None,
        urgency: Urgency::Normal,
        downtime_ms: None,
    };
    move_as(client, machine, &request).await
}

/// Moves a machine by a request, and waits for the report.
///
/// # Errors
/// As [`LocalCluster::move_machine`].
pub async fn move_as(client: &Client, machine: &str, request: &MoveRequest) -> Result<MoveReport> {
    let path = format!("/v1/machines/{machine}/move");
    let mut lines = client.post_stream(&path, request).await?;
    while let Some(line) = lines.line().await? {
        match line {
            MoveLine::Progress(_) => {}
            MoveLine::Report(report) => return Ok(*report),
            MoveLine::Error(error) => bail!(error),
        }
    }
    bail!("the move of {machine} brought no report")
}

/// Uploads the module of a WebAssembly program; returns its spec.
pub(crate) async fn program(client: &Client, guest: &Guest<'_>) -> Result<KindSpec> {
    let module = Bytes::copy_from_slice(guest.module);
    let uploaded = client.upload(&WasmKind::kind_name(), module).await?;
    let mut args = vec![guest.name.to_owned()];
    args.extend(guest.args.iter().map(|arg| (*arg).to_owned()));
    let own = WasmSpec {
        module: uploaded.hash,
        args,
        env: Vec::new(),
        threads_max: 64,
    };
    own.to_kind_spec().map_err(anyhow::Error::msg)
}
