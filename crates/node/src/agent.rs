//! The agent's parts, how a node comes to be, and how its agent starts.

use crate::balancer::{self, Ledger, Recorder};
use crate::code::{self, Code};
use crate::dry_run::History;
use crate::events::{Events, Note};
use crate::lanes::Lanes;
use crate::record::NodeRecord;
use crate::state_dir::StateDir;
use crate::workers::Workers;
use crate::{http, lease, moving, offer, reconcile, service};
use keel_api::EventKind;
use keel_cluster::clock::unix_ms;
use keel_cluster::identity::{CertificateAuthority, ClusterId, IdentityError, NodeIdentity};
use keel_cluster::join::JoinError;
use keel_cluster::keys::Key;
use keel_cluster::members::{self, MemberError, MemberSet, Voter};
use keel_cluster::service::ClusterService;
use keel_cluster::store::{LeaseId, RedbOptions, RedbStore, RemoteStore, Txn};
use keel_cluster::tokens::JoinToken;
use keel_cluster::{Epoch, MachineName, NodeName, Store, StoreError};
use keel_machine::cgroup::Slice;
use keel_net::{Options as RpcOptions, Peers, Server, TlsError, Traffic};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tokio::sync::watch;

/// How long the store of another node may take to answer.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// How a node is to be made.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// The folder that it keeps.
    pub state_dir: PathBuf,
    /// Its name.
    pub name: String,
    /// Where other nodes reach it; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where users reach it over TLS, if at all.
    pub api: Option<SocketAddr>,
}

/// Why a node does not come to be, or its agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A file or socket.
    #[error("{what}: {source}")]
    System {
        /// Which.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// The name.
    #[error(transparent)]
    Name(#[from] keel_net::NameError),
    /// Keys and certificates.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The list of members.
    #[error(transparent)]
    Members(#[from] MemberError),
    /// Joining.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The folder has a node already.
    #[error("{0} belongs to node {1:?} of a cluster already; use another --state-dir")]
    Taken(String, String),
    /// The folder has no node.
    #[error("{0} has no node yet: `keel up --name NAME` makes a cluster, `keel join` joins one")]
    NoNode(String),
    /// The settings file.
    #[error("{0} is damaged: {1}")]
    Settings(String, String),
    /// The ledger of the balancer's decisions.
    #[error("the ledger of the balancer cannot be opened: {0}")]
    Ledger(String),
    /// A token.
    #[error("the join token is not valid: {0}")]
    Token(String),
}

fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> AgentError {
    let what = what.into();
    move |source| AgentError::System { what, source }
}

/// What the agent keeps about itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) listen: SocketAddr,
    pub(crate) api: Option<SocketAddr>,
    /// Nodes that hold the store: name and address.
    pub(crate) voters: Vec<(NodeName, String)>,
}

/// A running agent.
pub(crate) struct Agent {
    pub(crate) name: NodeName,
    pub(crate) cluster: ClusterId,
    pub(crate) dir: StateDir,
    pub(crate) settings: Settings,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) members: Arc<MemberSet>,
    pub(crate) workers: Arc<Workers>,
    /// Parts of machines that have their homes elsewhere.
    pub(crate) parts: Arc<Workers>,
    pub(crate) lease: watch::Receiver<Option<LeaseId>>,
    /// No epoch was above this one when this agent began to follow its schedule: what is
    /// to be started under an older one, an earlier agent may have started.
    pub(crate) epochs_before: OnceLock<Epoch>,
    pub(crate) identity: NodeIdentity,
    /// What happened here.
    pub(crate) events: Events,
    /// Moves away from here.
    pub(crate) moves: Mutex<HashMap<MachineName, moving::Handle>>,
    /// Machines that are arriving, or being started.
    pub(crate) busy: Mutex<HashSet<MachineName>>,
    /// Which moves away from here copy at a time.
    pub(crate) lanes: Arc<Lanes>,
    /// Compiled code here and elsewhere.
    pub(crate) code: Arc<Code>,
    /// Held while room for an arriving machine is looked for and reserved.
    pub(crate) reserving: tokio::sync::Mutex<()>,
    /// How moves away from here went.
    pub(crate) history: Mutex<History>,
    /// Machines of this node with parts elsewhere.
    pub(crate) spanning: Mutex<HashSet<MachineName>>,
    /// Held while a machine's limits are changed.
    pub(crate) setting: tokio::sync::Mutex<()>,
    /// Workers whose machines are kept regularly.
    pub(crate) kept_regularly: Mutex<HashSet<u64>>,
    /// What balances this node.
    pub(crate) balancer: balancer::Handle,
    /// Bytes to and from other nodes.
    pub(crate) traffic: Traffic,
}

/// Makes the first node of a new cluster; nothing runs yet.
///
/// # Errors
/// [`AgentError`].
pub fn found(options: &AgentOptions) -> Result<(), AgentError> {
    let (dir, name, listen) = prepare(options)?;
    let authority = CertificateAuthority::create(ClusterId::random())?;
    let identity = NodeIdentity::first(&authority, &name)?;
    authority.save(dir.root())?;
    write_settings(
        &dir,
        &Settings {
            listen,
            api: options.api,
            voters: vec![(name, listen.to_string())],
        },
    )?;
    // Last, since it makes the folder a node's.
    identity.save(dir.root())?;
    Ok(())
}

/// Makes a node of an existing cluster, through the node at `via`; nothing runs
/// yet.
///
/// # Errors
/// [`AgentError`].
pub async fn join(options: &AgentOptions, via: &str, token: &str) -> Result<(), AgentError> {
    let (dir, name, listen) = prepare(options)?;
    let token: JoinToken = token
        .trim()
        .parse()
        .map_err(|error| AgentError::Token(format!("{error}")))?;
    let (identity, voters) =
        keel_cluster::join::join(via, &token, &name, &listen.to_string()).await?;
    write_settings(
        &dir,
        &Settings {
            listen,
            api: options.api,
            voters: voters
                .into_iter()
                .map(|voter| (voter.node, voter.address))
                .collect(),
        },
    )?;
    identity.save(dir.root())?;
    Ok(())
}

fn prepare(options: &AgentOptions) -> Result<(StateDir, NodeName, SocketAddr), AgentError> {
    let name = NodeName::new(&options.name)?;
    let shown = options.state_dir.display().to_string();
    let dir = StateDir::open(&options.state_dir).map_err(system(shown.clone()))?;
    if let Some(identity) = NodeIdentity::load(dir.root())? {
        return Err(AgentError::Taken(shown, identity.node.to_string()));
    }
    let mut listen = options.listen;
    if listen.port() == 0 {
        let probe = std::net::TcpListener::bind(listen)
            .and_then(|listener| listener.local_addr())
            .map_err(system(listen.to_string()))?;
        listen.set_port(probe.port());
    }
    Ok((dir, name, listen))
}

fn write_settings(dir: &StateDir, settings: &Settings) -> Result<(), AgentError> {
    let path = dir.settings();
    let shown = path.display().to_string();
    let text = serde_json::to_vec_pretty(settings)
        .map_err(|error| AgentError::Settings(shown.clone(), error.to_string()))?;
    crate::state_dir::write_whole(&path, &text).map_err(system(shown))
}

fn read_settings(path: &Path) -> Result<Settings, AgentError> {
    let shown = path.display().to_string();
    let text = std::fs::read(path).map_err(system(shown.clone()))?;
    serde_json::from_slice(&text).map_err(|error| AgentError::Settings(shown, error.to_string()))
}

/// Where a node listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// For other nodes.
    pub listen: SocketAddr,
    /// For users over TLS, if at all.
    pub api: Option<SocketAddr>,
}

/// Where the node in a folder listens; `None` if the folder has no node. Makes
/// nothing, and needs no running agent.
///
/// # Errors
/// [`AgentError`] if its settings cannot be read.
pub fn addresses(state_dir: &Path) -> Result<Option<Addresses>, AgentError> {
    match read_settings(&StateDir::settings_in(state_dir)) {
        Ok(settings) => Ok(Some(Addresses {
            listen: settings.listen,
            api: settings.api,
        })),
        Err(AgentError::System { source, .. })
            if matches!(
                source.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Runs the agent of the node in a folder until it is told to stop.
///
/// # Errors
/// [`AgentError`] if it cannot start.
pub async fn run(state_dir: &Path) -> Result<(), AgentError> {
    let shown = state_dir.display().to_string();
    let dir = StateDir::open(state_dir).map_err(system(shown.clone()))?;
    let identity = NodeIdentity::load(dir.root())?.ok_or(AgentError::NoNode(shown))?;
    let settings = read_settings(&dir.settings())?;
    let events = Events::open(&dir.events(), &identity.node)
        .map_err(system(dir.events().display().to_string()))?;
    let ledger = Ledger::open(&dir.ledger(), identity.node.as_str()).map_err(AgentError::Ledger)?;
    let recorder = Recorder::open(&dir.loads()).map_err(AgentError::Ledger)?;
    let (balancer, inbox) = balancer::prepare(ledger, recorder);
    let authority = CertificateAuthority::load(dir.root())?.map(Arc::new);
    let traffic = Traffic::default();
    let options = RpcOptions {
        traffic: traffic.clone(),
        ..RpcOptions::default()
    };
    let peers = Arc::new(Peers::new(identity.client_tls()?, options));
    for (voter, address) in &settings.voters {
        peers.set_address(voter, address);
    }
    let (store, cluster): (Arc<dyn Store>, _) = match authority {
        Some(authority) => {
            let store: Arc<dyn Store> =
                Arc::new(RedbStore::open(&dir.store(), RedbOptions::default())?);
            let voter = Voter {
                node: identity.node.clone(),
                address: settings.listen.to_string(),
            };
            members::found(store.as_ref(), identity.cluster, &voter, unix_ms()).await?;
            let service = ClusterService::new(store.clone(), authority);
            (store, Some(service))
        }
        None => {
            let voters = settings.voters.iter().map(|(node, _)| node.clone());
            let store = RemoteStore::new(peers.clone(), voters.collect(), STORE_PATIENCE);
            (Arc::new(store), None)
        }
    };
    let members = follow_members(&store).await;
    let lease = lease::keep(store.clone(), identity.node.clone(), events.clone())
        .map_err(system("the thread that renews the lease"))?;
    let slice = Arc::new(make_slice(&dir));
    let agent = Arc::new(Agent {
        name: identity.node.clone(),
        cluster: identity.cluster,
        workers: Arc::new(Workers::new(slice.clone())),
        parts: Arc::new(Workers::new(slice)),
        dir,
        settings,
        store,
        peers,
        members,
        lease,
        epochs_before: OnceLock::new(),
        code: Arc::new(Code::new()),
        identity,
        events,
        moves: Mutex::default(),
        busy: Mutex::default(),
        lanes: Arc::default(),
        history: Mutex::default(),
        spanning: Mutex::default(),
        setting: tokio::sync::Mutex::default(),
        kept_regularly: Mutex::default(),
        reserving: tokio::sync::Mutex::default(),
        balancer,
        traffic,
    });
    serve(agent, cluster, inbox).await
}

/// Where this node's workers get their cgroups.
fn make_slice(dir: &StateDir) -> Slice {
    // What started this process, where that is `keel up` and not a shell.
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    let program = |process: &str| std::fs::read_link(format!("/proc/{process}/exe")).ok();
    let named = std::env::var(crate::parent::PARENT_ENVIRONMENT).ok();
    let parent = parent.filter(|parent| {
        // (One of the version before does not say so.)
        let own = program("self");
        named.as_deref() == Some(&parent.to_string())
            || own.is_some() && own == program(&parent.to_string())
    });
    let slice = Slice::prepare(dir.root(), parent);
    if let Some(missing) = slice.missing() {
        tracing::warn!("{missing}");
    }
    slice
}

/// The members, as soon as the store answers.
async fn follow_members(store: &Arc<dyn Store>) -> Arc<MemberSet> {
    loop {
        match MemberSet::follow(store.clone()).await {
            Ok((members, _task)) => return members,
            Err(error) => {
                tracing::warn!(%error, "the store does not answer yet");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

async fn serve(
    agent: Arc<Agent>,
    cluster: Option<ClusterService>,
    inbox: balancer::Inbox,
) -> Result<(), AgentError> {
    tokio::spawn(follow_addresses(agent.clone()));
    let address = agent.settings.listen;
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .map_err(system(format!("listening on {address}")))?;
    // Before anybody can ask what runs here.
    agent.workers.adopt(&agent.dir).await;
    crate::spanning::adopt(&agent).await;
    tell_start(&agent);
    if cluster.is_some() {
        let (store, events) = (agent.store.clone(), agent.events.clone());
        tokio::spawn(lease::tell_of_nodes(store, events));
    }
    let server = Server::serve(
        listener,
        agent.identity.server_tls()?,
        agent.members.check(),
        Arc::new(service::Service::new(agent.clone(), cluster)),
        RpcOptions {
            traffic: agent.traffic.clone(),
            ..RpcOptions::default()
        },
    )
    .map_err(system(format!("listening on {address}")))?;
    for machine in agent.workers.names() {
        reconcile::watch_worker(&agent, &machine);
        let agent = agent.clone();
        tokio::spawn(async move { reconcile::resume_after_move(&agent, &machine).await });
    }
    tokio::spawn(offer::withdraw_old(agent.clone()));
    tokio::spawn(publish(agent.clone()));
    tokio::spawn(reconcile::follow_schedule(agent.clone()));
    tokio::spawn(code::run(agent.clone()));
    balancer::start(&agent, inbox);
    http::serve(agent.clone())
        .await
        .map_err(system("the API"))?;
    server.shutdown().await;
    let stopped = Note::node(EventKind::NodeStopped, "the agent was told to stop");
    agent.events.record(stopped);
    agent.events.flush().await;
    agent.workers.slice().remove_if_empty();
    Ok(())
}

fn tell_start(agent: &Agent) {
    let version = env!("CARGO_PKG_VERSION");
    let text = format!("the agent started (keel {version})");
    let started = Note::node(EventKind::NodeStarted, text).with("version", version);
    agent.events.record(started);
    for machine in agent.workers.names() {
        let text = "its process was found when the agent started";
        let found = Note::machine(EventKind::MachineFound, &machine, text);
        agent.events.record(found);
    }
}

/// Keeps the addresses of all members known.
async fn follow_addresses(agent: Arc<Agent>) {
    let mut changes = agent.members.changes();
    loop {
        for (node, member) in agent.members.all().iter() {
            agent.peers.set_address(node, &member.address);
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Writes what this node is into the store, until it is there.
async fn publish(agent: Arc<Agent>) {
    let record = describe(&agent);
    let Ok(value) = keel_cluster::wire::encode("a node's record", &record) else {
        return;
    };
    loop {
        let txn = Txn::new().put(Key::Node(agent.name.clone()), value.clone());
        match agent.store.txn(txn).await {
            Ok(_) => return,
            Err(error) => {
                tracing::warn!(%error, "this node is not in the store yet");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

fn describe(agent: &Agent) -> NodeRecord {
    let mut lacks = Vec::new();
    if let Some(missing) = keel_machine::missing_for_moves() {
        lacks.push(missing);
    }
    lacks.extend(agent.workers.slice().missing());
    NodeRecord {
        address: agent.settings.listen.to_string(),
        cpus: std::thread::available_parallelism().map_or(1, |count| count.get() as u32),
        memory_bytes: memory_bytes(),
        features: cpu_features(),
        lacks,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// Memory of the host, in bytes; 0 where `/proc` does not say.
pub(crate) fn memory_bytes() -> u64 {
    meminfo("MemTotal:")
}

/// Memory that could be had now, in bytes.
pub(crate) fn memory_available_bytes() -> u64 {
    meminfo("MemAvailable:")
}

fn meminfo(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}

/// What the CPU can do, as the kernel names it.
pub(crate) fn cpu_features() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("flags"))
        .and_then(|rest| rest.split_once(':'))
        .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

impl Agent {
    pub(crate) fn busy(&self) -> std::sync::MutexGuard<'_, HashSet<MachineName>> {
        self.busy.lock().unwrap_or_else(|error| error.into_inner())
    }

    pub(crate) fn spanning(&self) -> std::sync::MutexGuard<'_, HashSet<MachineName>> {
        self.spanning
            .lock()
            .unwrap_or_else(|error| error.into_inner())
    }

    pub(crate) fn kept_regularly(&self) -> std::sync::MutexGuard<'_, HashSet<u64>> {
        self.kept_regularly
            .lock()
            .unwrap_or_else(|error| error.into_inner())
    }

    pub(crate) fn moves(&self) -> std::sync::MutexGuard<'_, HashMap<MachineName, moving::Handle>> {
        self.moves.lock().unwrap_or_else(|error| error.into_inner())
    }
}
