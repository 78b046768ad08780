//! Clusters of real processes on this computer, for tests and for the demo.
//!
//! All processes run on loopback, in one folder; only processes with that folder on their command
//! line are signalled.

#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
pub use etcd::{Certificates, ETCD_LIMITS, Etcd};
use hyper::Method;
use keel_api::{Client, ClusterInfo, MachineInfo, StoreInfo, Token, TokenRequest, VotersRequest};
use keel_kind_wasm::WasmKind;
use keel_machine::log::{StreamKind, split_records};
use keel_machine::moves::MoveReport;
pub use machine::Guest;
use network::Network;
use quota::Quotas;
use requests::program;
pub use requests::{move_as, move_by};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
pub use voters::{Group, Member};
use wall_clock::WallClocks;

pub mod bare_system;
pub mod disk;
pub mod drill;
mod etcd;
pub mod far_link;
pub mod linux_system;
mod logs;
mod machine;
pub mod nemesis;
pub mod network;
mod power;
pub mod quota;
pub mod reader;
mod requests;
mod voters;
pub mod wall_clock;
pub mod witness;

/// File in which nodes of a cluster record the failpoints that they pass.
pub const FAILPOINT_LOG: &str = "failpoints.log";

/// Time limit of every operation.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A prebuilt guest module of the workspace, by its name.
///
/// # Panics
/// If there is none.
pub fn guest(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../guests/{name}.wasm"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Polls until `done` returns a value.
///
/// # Errors
/// If it returns none within [`PATIENCE`], naming `what`.
pub async fn wait_for<T, F>(what: &str, mut done: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = done().await {
            return Ok(value);
        }
        ensure!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A node's processes.
struct Node {
    folder: PathBuf,
    parent: Option<Child>,
}

/// A cluster. All its processes are killed on drop.
pub struct LocalCluster {
    program: PathBuf,
    network: Option<Network>,
    clocks: Option<WallClocks>,
    quotas: Option<Quotas>,
    nodes: BTreeMap<String, Node>,
    /// How many of them shall hold the store.
    voters: &'static str,
    /// Options that say where the store is, if it is outside of the nodes.
    store: Vec<String>,
    /// Address of the first node's API for users over TLS.
    api: Option<String>,
    /// Variables of all nodes.
    environment: Vec<(String, String)>,
}

impl std::fmt::Debug for LocalCluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalCluster")
            .field("nodes", &self.nodes.keys())
            .finish_non_exhaustive()
    }
}

impl LocalCluster {
    /// Starts a cluster of these nodes, the first of which holds the store. `program` is the
    /// `keel` binary.
    ///
    /// # Errors
    /// The log of a node that did not start.
    pub async fn start(program: &Path, folder: &Path, names: &[&str]) -> Result<Self> {
        Self::start_in(program, folder, names, None).await
    }

    /// As [`Self::start`], with a CPU quota for each node, and balancing by the default policy.
    /// Other clusters do not balance, so that machines stay where a test starts them.
    ///
    /// # Errors
    /// The log of a node that did not start, or that quotas are not available.
    pub async fn start_balancing(
        program: &Path,
        folder: &Path,
        nodes: &[(&str, f64)],
    ) -> Result<Self> {
        Self::start_balancing_in(program, folder, nodes, None).await
    }

    /// As [`Self::start_balancing`], in network namespaces, or on loopback if there is no network.
    ///
    /// # Errors
    /// As [`Self::start_balancing`].
    pub async fn start_balancing_in(
        program: &Path,
        folder: &Path,
        nodes: &[(&str, f64)],
        network: Option<Network>,
    ) -> Result<Self> {
        let names: Vec<&str> = nodes.iter().map(|(name, _)| *name).collect();
        let mut cluster = LocalCluster::empty(program, network);
        cluster.quotas = Some(Quotas::new(nodes)?);
        cluster.start_nodes(folder, &names).await?;
        Ok(cluster)
    }

    fn empty(program: &Path, network: Option<Network>) -> Self {
        LocalCluster {
            program: program.to_owned(),
            network,
            clocks: None,
            quotas: None,
            nodes: BTreeMap::new(),
            voters: "1",
            store: Vec::new(),
            api: None,
            environment: Vec::new(),
        }
    }

    /// As [`Self::start`], in network namespaces, or on loopback if there is no network.
    ///
    /// # Errors
    /// The log of a node that did not start.
    pub async fn start_in(
        program: &Path,
        folder: &Path,
        names: &[&str],
        network: Option<Network>,
    ) -> Result<Self> {
        let cluster = LocalCluster::empty(program, network);
        cluster.begin(folder, names).await
    }

    async fn begin(mut self, folder: &Path, names: &[&str]) -> Result<Self> {
        self.start_nodes(folder, names).await?;
        self.set_policy("mode", "off").await?;
        Ok(self)
    }

    /// As [`Self::start`], with as many copies of the store as the cluster makes by itself.
    /// Other clusters keep one, at their first node, so that tests know what fails with which
    /// node.
    ///
    /// # Errors
    /// The log of a node that did not start; or there are not three copies in time.
    pub async fn start_replicated(program: &Path, folder: &Path, names: &[&str]) -> Result<Self> {
        Self::start_to_be_broken(program, folder, names, None, None).await
    }

    /// As [`Self::start_replicated`], with links that can be cut, and clocks that can be set.
    ///
    /// # Errors
    /// As [`Self::start_replicated`].
    pub async fn start_to_be_broken(
        program: &Path,
        folder: &Path,
        names: &[&str],
        network: Option<Network>,
        clocks: Option<WallClocks>,
    ) -> Result<Self> {
        let mut cluster = LocalCluster::empty(program, network);
        cluster.clocks = clocks;
        cluster.voters = "auto";
        let cluster = cluster.begin(folder, names).await?;
        cluster.wait_voters(names[0], 3).await?;
        Ok(cluster)
    }

    /// As [`Self::start`], with an API for users over TLS at the first node, at `api`.
    ///
    /// # Errors
    /// The log of a node that did not start.
    pub async fn start_with_api(
        program: &Path,
        folder: &Path,
        names: &[&str],
        api: &str,
    ) -> Result<Self> {
        let mut cluster = LocalCluster::empty(program, None);
        cluster.api = Some(api.to_owned());
        cluster.begin(folder, names).await
    }

    /// As [`Self::start`], with these variables in the environment of all nodes.
    ///
    /// # Errors
    /// The log of a node that did not start.
    pub async fn start_with_environment(
        program: &Path,
        folder: &Path,
        names: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let mut cluster = LocalCluster::empty(program, None);
        cluster.set_environment(environment);
        cluster.begin(folder, names).await
    }

    /// Sets the environment of nodes that are started from now on.
    pub fn set_environment(&mut self, environment: &[(&str, &str)]) {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.environment = environment.iter().map(owned).collect();
    }

    /// As [`Self::start`], with the store outside of the nodes: these are the options of `keel up`
    /// and `keel join` that say where.
    ///
    /// # Errors
    /// The log of a node that did not start.
    pub async fn start_with_store(
        program: &Path,
        folder: &Path,
        names: &[&str],
        store: &[&str],
    ) -> Result<Self> {
        let mut cluster = LocalCluster::empty(program, None);
        cluster.voters = "auto";
        cluster.store = store.iter().map(|it| (*it).to_owned()).collect();
        cluster.begin(folder, names).await
    }

    /// Starts another node, which joins at an address with a token.
    ///
    /// # Errors
    /// The log of a node that did not start.
    pub async fn join(&mut self, folder: &Path, name: &str, via: &str, token: &str) -> Result<()> {
        let state = folder.join(name);
        std::fs::create_dir_all(&state)?;
        let mut command = self.command(name, &state)?;
        command.args(["join", via, "--name", name, "--token", token]);
        self.place(&mut command, name, "127.0.0.1:0")?;
        self.spawn(name, state, command).await
    }

    /// Where a new node listens: at `local` if the nodes have no network; and its store.
    fn place(&self, command: &mut Command, name: &str, local: &str) -> Result<()> {
        let listen = match &self.network {
            Some(network) => network.address(name)?,
            None => local.to_owned(),
        };
        command.args(["--listen", &listen]).args(&self.store);
        Ok(())
    }

    /// Waits until a number of nodes hold the store, as a node says; which of them leads.
    ///
    /// # Errors
    /// If it takes too long.
    pub async fn wait_voters(&self, node: &str, count: usize) -> Result<String> {
        let client = self.client(node);
        wait_for(&format!("{count} voters"), || async {
            let store: StoreInfo = client.get("/v1/store").await.ok()?;
            let leader = store.voters.iter().find(|voter| voter.leads)?;
            (store.voters.len() == count).then(|| leader.node.clone())
        })
        .await
    }

    async fn start_nodes(&mut self, folder: &Path, names: &[&str]) -> Result<()> {
        // An address for this cluster: other clusters, or connections, could otherwise take a port
        // that is free during a restart of an agent.
        let [a, b, c]: [u8; 3] = rand::random();
        let own = std::net::Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254));
        for (number, name) in names.iter().enumerate() {
            let state = folder.join(name);
            std::fs::create_dir_all(&state)?;
            let mut command = self.command(name, &state)?;
            if number == 0 {
                command.args(["up", "--name", name]);
                if let Some(api) = &self.api {
                    command.args(["--api", api]);
                }
            } else {
                let first = self.client(names[0]);
                let nodes: Vec<keel_api::NodeInfo> = first.get("/v1/nodes").await?;
                let via = nodes.iter().find(|node| node.name == names[0]);
                let via = via.context("no first node")?.address.clone();
                let token: Token = first
                    .post("/v1/tokens", &TokenRequest::Join { ttl_s: 60 })
                    .await?;
                command.args(["join", &via, "--name", name, "--token", &token.token]);
            }
            self.place(&mut command, name, &format!("{own}:0"))?;
            self.spawn(name, state, command).await?;
            if number == 0 && self.voters != "auto" {
                let count = self.voters.to_owned();
                let request = VotersRequest { count };
                let _: StoreInfo = self.client(name).post("/v1/store/voters", &request).await?;
            }
        }
        Ok(())
    }

    /// Changes a field of the balancer's policy.
    ///
    /// # Errors
    /// The first node's answer.
    pub async fn set_policy(&self, field: &str, value: &str) -> Result<()> {
        let first = self.nodes.keys().next().context("no node")?;
        let state = self.folder(first);
        let change = format!("{field}={value}");
        let changed = tokio::process::Command::new(&self.program)
            .arg("--state-dir")
            .arg(state)
            .args(["balance", "policy", &change])
            .output()
            .await?;
        let said = String::from_utf8_lossy(&changed.stderr);
        anyhow::ensure!(changed.status.success(), "{change}: {said}");
        Ok(())
    }

    /// The network of the nodes, if they have namespaces.
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// The nodes' clocks, if they can be set.
    pub fn clocks(&self) -> Option<&WallClocks> {
        self.clocks.as_ref()
    }

    fn command(&self, node: &str, state: &Path) -> Result<Command> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(state.join("agent.log"))?;
        let mut command = match &self.network {
            Some(network) => network.command(node, &self.program),
            None => Command::new(&self.program),
        };
        if let Some(quotas) = &self.quotas {
            command = quotas.command(node, command);
        }
        if let Some(clocks) = &self.clocks {
            clocks.give(node, &mut command)?;
        }
        command
            .env(keel_machine::failpoint::ENABLE_ENVIRONMENT, "1")
            .env("KEEL_FAILPOINT_LOG", state.join(FAILPOINT_LOG))
            .envs(self.environment.iter().cloned())
            .arg("--state-dir")
            .arg(state)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // The caller handles Ctrl-C at the terminal.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        Ok(command)
    }

    async fn spawn(&mut self, name: &str, folder: PathBuf, command: Command) -> Result<()> {
        self.launch(name, folder, command)?;
        self.wait_answers(name).await
    }

    fn launch(&mut self, name: &str, folder: PathBuf, mut command: Command) -> Result<()> {
        let parent = command
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let node = Node {
            folder,
            parent: Some(parent),
        };
        self.nodes.insert(name.to_owned(), node);
        Ok(())
    }

    async fn wait_answers(&self, name: &str) -> Result<()> {
        let folder = self.folder(name);
        let client = self.client(name);
        let alive = wait_for(&format!("node {name} answers"), || async {
            let info: ClusterInfo = client.get("/v1/status").await.ok()?;
            (info.nodes_alive as usize >= 1).then_some(())
        })
        .await;
        if let Err(error) = alive {
            let log = std::fs::read_to_string(folder.join("agent.log")).unwrap_or_default();
            bail!("{error}; its log: {log}");
        }
        self.wait_alive(name).await
    }

    /// Waits until a node renews its lease and appears in its own list.
    ///
    /// # Errors
    /// If it does not.
    pub async fn wait_alive(&self, name: &str) -> Result<()> {
        let client = self.client(name);
        wait_for(&format!("node {name} is alive"), || async {
            let nodes: Vec<keel_api::NodeInfo> = client.get("/v1/nodes").await.ok()?;
            let node = nodes.iter().find(|node| node.name == name)?;
            (node.alive && node.cpus > 0).then_some(())
        })
        .await
    }

    /// A client of a node's own socket.
    pub fn client(&self, name: &str) -> Client {
        let folder = self.nodes.get(name).map(|node| node.folder.clone());
        Client::socket(folder.unwrap_or_default().join("api.socket"))
    }

    /// A node's folder.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.nodes
            .get(name)
            .map(|node| node.folder.clone())
            .unwrap_or_default()
    }

    /// Starts a machine and waits until it runs, or has ended.
    ///
    /// # Errors
    /// The node's answer.
    pub async fn run(&self, guest: &Guest<'_>) -> Result<MachineInfo> {
        let client = self.client(guest.node);
        let (kind, kind_spec) = match &guest.kind {
            Some(kind) => kind.clone(),
            None => (WasmKind::kind_name(), program(&client, guest).await?),
        };
        let request = guest.request((kind, kind_spec));
        let _: MachineInfo = client.post("/v1/machines", &request).await?;
        wait_for(&format!("machine {} starts", guest.name), || async {
            let info = self.inspect(guest.node, guest.name).await.ok()?;
            (!info.is_starting()).then_some(info)
        })
        .await
    }

    /// A node's information about a machine.
    ///
    /// # Errors
    /// The node's answer.
    pub async fn inspect(&self, node: &str, machine: &str) -> Result<MachineInfo> {
        let path = format!("/v1/machines/{machine}");
        Ok(self.client(node).get(&path).await?)
    }

    /// Stops a machine and removes it.
    ///
    /// # Errors
    /// The node's answer, or if it does not end.
    pub async fn end(&self, node: &str, machine: &str) -> Result<()> {
        let client = self.client(node);
        let path = format!("/v1/machines/{machine}");
        let _: serde::de::IgnoredAny = client.post(&format!("{path}/stop"), &()).await?;
        self.wait_end(node, machine).await?;
        self.remove(node, machine).await
    }

    /// Removes a machine that has ended.
    ///
    /// # Errors
    /// The node's answer.
    pub async fn remove(&self, node: &str, machine: &str) -> Result<()> {
        let (client, path) = (self.client(node), format!("/v1/machines/{machine}"));
        let gone = client.call(Method::DELETE, &path, Bytes::new());
        let _: serde::de::IgnoredAny = gone.await?;
        Ok(())
    }

    /// Waits until a machine has ended.
    ///
    /// # Errors
    /// If it does not.
    pub async fn wait_end(&self, node: &str, machine: &str) -> Result<MachineInfo> {
        wait_for(&format!("machine {machine} ends"), || async {
            let info = self.inspect(node, machine).await.ok()?;
            (!info.is_live()).then_some(info)
        })
        .await
    }

    /// Moves a machine, by a request to the node `via`.
    ///
    /// # Errors
    /// The node's answer. A failed move whose machine stayed returns a report.
    pub async fn move_machine(&self, via: &str, machine: &str, to: &str) -> Result<MoveReport> {
        move_by(&self.client(via), machine, to).await
    }

    /// A machine's standard output so far.
    ///
    /// # Errors
    /// The node's answer.
    pub async fn output(&self, node: &str, machine: &str) -> Result<String> {
        self.printed(node, machine, StreamKind::Output).await
    }

    /// A machine's error output so far, with the notices of the system.
    ///
    /// # Errors
    /// The node's answer.
    pub async fn error_output(&self, node: &str, machine: &str) -> Result<String> {
        self.printed(node, machine, StreamKind::Error).await
    }

    async fn printed(&self, node: &str, machine: &str, to: StreamKind) -> Result<String> {
        let path = format!("/v1/machines/{machine}/logs");
        let mut stream = self.client(node).get_stream(&path).await?;
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.chunk().await? {
            bytes.extend_from_slice(&chunk);
        }
        let text: Vec<u8> = split_records(&mut bytes)
            .into_iter()
            .filter(|(kind, _)| *kind == to)
            .flat_map(|(_, text)| text)
            .collect();
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Kills a node's agent only; its parent restarts it.
    ///
    /// # Errors
    /// If there is no agent.
    pub fn kill_agent(&self, name: &str) -> Result<()> {
        let killed = self.signal(name, Signal::KILL, &|line| {
            line.iter().any(|word| word == "agent")
        });
        ensure!(killed > 0, "node {name} has no agent");
        Ok(())
    }

    /// Stops a node's agent by SIGSTOP, or continues it.
    ///
    /// # Errors
    /// If there is no agent.
    pub fn stop_agent(&self, name: &str, stop: bool) -> Result<()> {
        let signal = if stop { Signal::STOP } else { Signal::CONT };
        let signalled = self.signal(name, signal, &|line| {
            line.iter().any(|word| word == "agent")
        });
        ensure!(signalled > 0, "node {name} has no agent");
        Ok(())
    }

    /// Stops a machine's process by SIGSTOP, or continues it.
    ///
    /// # Errors
    /// If there is no process.
    pub fn stop_worker(&self, name: &str, machine: &str, stop: bool) -> Result<()> {
        let signal = if stop { Signal::STOP } else { Signal::CONT };
        let folder = self.folder(name).join("workers").join(machine);
        let folder = folder.display().to_string();
        let signalled = self.signal(name, signal, &|line| line.contains(&folder));
        ensure!(
            signalled > 0,
            "machine {machine} has no worker on node {name}"
        );
        Ok(())
    }

    /// Kills the processes of one machine on a node.
    ///
    /// # Errors
    /// If there are no processes.
    pub fn kill_worker(&self, name: &str, machine: &str) -> Result<()> {
        let folder = self.folder(name).join("workers").join(machine);
        let folder = folder.display().to_string();
        let killed = self.signal(name, Signal::KILL, &|line| line.contains(&folder));
        ensure!(killed > 0, "machine {machine} has no worker on node {name}");
        Ok(())
    }

    /// Sets a failpoint on a node; `None` clears it.
    ///
    /// # Errors
    /// The node's answer.
    pub async fn failpoint(&self, node: &str, name: &str, order: Option<&str>) -> Result<()> {
        let request = keel_api::FailpointRequest {
            name: name.to_owned(),
            order: order.map(str::to_owned),
        };
        let _: keel_api::Nothing = self
            .client(node)
            .post("/v1/debug/failpoint", &request)
            .await?;
        Ok(())
    }

    /// Failpoints that acted on a node so far, in order.
    pub fn failpoints_passed(&self, node: &str) -> Vec<String> {
        let path = self.folder(node).join(FAILPOINT_LOG);
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Continues all stopped processes of a node.
    pub fn wake(&self, name: &str) {
        self.signal(name, Signal::CONT, &|_| true);
    }

    /// The number of worker processes of a machine on a node.
    pub fn workers_of(&self, name: &str, machine: &str) -> usize {
        self.worker_pids(name, machine).len()
    }

    /// Worker processes of a machine on a node.
    pub fn worker_pids(&self, name: &str, machine: &str) -> Vec<i32> {
        let folder = self.folder(name).join("workers").join(machine);
        let folder = folder.display().to_string();
        let all = processes().into_iter();
        let of_machine = all.filter(|(_, line)| line.contains(&folder));
        of_machine
            .map(|(pid, _)| pid.as_raw_nonzero().get())
            .collect()
    }

    /// Kills the processes on a node that are parts of machines with another home; returns their
    /// number.
    pub fn kill_parts(&self, name: &str) -> usize {
        let folder = self.folder(name).join("parts").display().to_string();
        self.signal(name, Signal::KILL, &|line| {
            line.iter().any(|word| word.starts_with(&folder))
        })
    }

    /// Stops those processes by SIGSTOP, or continues them; returns their number.
    pub fn stop_parts(&self, name: &str, stop: bool) -> usize {
        let signal = if stop { Signal::STOP } else { Signal::CONT };
        let folder = self.folder(name).join("parts").display().to_string();
        self.signal(name, signal, &|line| {
            line.iter().any(|word| word.starts_with(&folder))
        })
    }

    /// Bytes of guests' memory in a node's processes, as the kernel counts it.
    pub fn memory_of(&self, name: &str) -> u64 {
        let folder = format!("{}/", self.folder(name).display());
        let ours = processes().into_iter().filter(|(_, line)| {
            line.iter().any(|word| word.starts_with(&folder))
                && line.iter().any(|it| it == "worker")
        });
        ours.filter_map(|(pid, _)| {
            let process = format!("/proc/{}", pid.as_raw_nonzero());
            keel_wasm::memory::bytes_of_process(Path::new(&process))
        })
        .sum()
    }

    /// Number of those processes on a node.
    pub fn parts_of(&self, name: &str) -> usize {
        self.part_pids(name).len()
    }

    /// Their process ids.
    pub fn part_pids(&self, name: &str) -> Vec<i32> {
        let folder = self.folder(name).join("parts").display().to_string();
        let is_part = |line: &Vec<String>| line.iter().any(|word| word.starts_with(&folder));
        let parts = processes().into_iter().filter(|(_, line)| is_part(line));
        parts.map(|(pid, _)| pid.as_raw_nonzero().get()).collect()
    }

    /// The process id of a node's agent.
    ///
    /// # Errors
    /// If there is none.
    pub fn agent_pid(&self, name: &str) -> Result<i32> {
        let folder = self.folder(name).display().to_string();
        let mut agents = processes()
            .into_iter()
            .filter(|(_, line)| line.contains(&folder) && line.iter().any(|word| word == "agent"));
        let found = agents.next().map(|(pid, _)| pid.as_raw_nonzero().get());
        found.with_context(|| format!("node {name} has no agent"))
    }

    /// Signals the processes of a node whose command line matches; returns their number.
    fn signal(&self, name: &str, signal: Signal, fits: &dyn Fn(&[String]) -> bool) -> usize {
        let Some(node) = self.nodes.get(name) else {
            return 0;
        };
        let folder = node.folder.display().to_string();
        let below = format!("{folder}/");
        let mut count = 0;
        for (pid, line) in processes() {
            let ours = line
                .iter()
                .any(|word| *word == folder || word.starts_with(&below));
            if ours && fits(&line) && kill_process(pid, signal).is_ok() {
                count += 1;
            }
        }
        count
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for name in names {
            self.power_off(&name);
            if std::thread::panicking() {
                logs::print(&name, &self.folder(&name));
            }
            if let Ok(folder) = self.folder(&name).canonicalize() {
                keel_machine::cgroup::Slice::remove_all(&folder);
            }
        }
    }
}

/// All processes with their command lines; zombies have none.
fn processes() -> Vec<(Pid, Vec<String>)> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let words = line
                .split(|byte| *byte == 0)
                .filter(|word| !word.is_empty())
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect::<Vec<_>>();
            (!words.is_empty()).then_some((Pid::from_raw(pid)?, words))
        })
        .collect()
}

/// Checks that a text has the lines `first`, `first + 1`, … each once and in order, each beginning
/// with its number; returns the number after the last.
///
/// # Errors
/// The first wrong line. An incomplete last line is allowed.
pub fn check_numbered(text: &str, first: u64) -> Result<u64> {
    let mut next = first;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for line in whole.lines() {
        let number = line
            .split_whitespace()
            .next()
            .and_then(|word| word.parse::<u64>().ok());
        ensure!(number == Some(next), "line {next} is {line:?}");
        next += 1;
    }
    Ok(next)
}
