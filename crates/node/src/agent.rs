//! The composition root: creates a node, and builds its agent from its layers. Only the crate's
//! public interface imports this file.

use crate::balancer::{self, Inbox, Ledger, NodeBalancer, Recorder};
use crate::certificates;
use crate::checkpoints::{self, Checkpoints};
use crate::compilation::{self, Code};
use crate::context::{Context, Settings, SettingsError};
use crate::events::{Events, Note};
use crate::external_store::ExternalStore;
use crate::failover;
use crate::front::{self, Entry, Handles};
use crate::gossip::{self, NodeGossip};
use crate::identity::OwnIdentity;
use crate::images::{self, Images};
use crate::lease;
use crate::logs::Logs;
use crate::machines::{self, Machines, Restarts};
use crate::metrics::Metrics;
use crate::moves::{self, Moves};
use crate::node_record;
use crate::processes::{Arrivals, LeaseExtension, PlannedRestart, Processes, read_own_image_ahead};
use crate::records::{AliveNodes, Placements, follow_arrivals};
use crate::role::Role;
use crate::rules::{Rules, check_label};
use crate::spanning::{self, Spanning};
use crate::state_dir::StateDir;
use crate::supervisor::AgentEnd;
use crate::traces::Traces;
use crate::volumes::VolumeFiles;
use crate::voters::{self, VoterError, Voters};
use keel_api::{EventKind, LabelRequest};
use keel_balance::rules::Labels;
use keel_cluster::NodeName;
use keel_cluster::authority_keys;
use keel_cluster::identity::{CertificateAuthority, ClusterId, IdentityError, NodeIdentity};
use keel_cluster::join::JoinError;
use keel_cluster::members::{self, Member, MemberError, MemberSet};
use keel_cluster::tokens::JoinToken;
use keel_machine::cgroup::Slice;
use keel_machine::kind::Kinds;
use keel_net::rpc::ServerHandle;
use keel_net::{Options as RpcOptions, Peers, Server, TlsError, Traffic};
use keel_store::Store;
use keel_store::StoreError;
use keel_store::clock::unix_ms;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::unbounded_channel;

/// How long an agent takes at most to end in order.
const END_WITHIN: Duration = Duration::from_secs(5);

/// Options for creating a node.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// The state folder.
    pub state_dir: PathBuf,
    /// Its name.
    pub name: String,
    /// Address for other nodes; port 0 selects a free one.
    pub listen: SocketAddr,
    /// Address for users over TLS, if any.
    pub api: Option<SocketAddr>,
    /// A store outside of the cluster's nodes, if it is not to be in them.
    pub store: Option<ExternalStore>,
    /// Its first labels.
    pub labels: Labels,
}

/// What is to be different at the next start of a node.
#[derive(Debug, Clone, Default)]
pub struct NodeChange {
    /// Its address for other nodes. Port 0 keeps the port at an IP address that stays.
    pub listen: Option<SocketAddr>,
    /// Its address for users over TLS.
    pub api: Option<SocketAddr>,
    /// Labels that it gets, beside those that it has.
    pub labels: Labels,
}

/// Why a node cannot be created, or its agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A file or socket.
    #[error("{what}: {source}")]
    System {
        /// The file or socket.
        what: String,
        /// The cause.
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
    /// This node's copy of the store.
    #[error(transparent)]
    Voter(#[from] VoterError),
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
    /// The node's agent runs.
    #[error("a node runs in {0} already; end it with `keel down` first")]
    Runs(String),
    /// The settings file.
    #[error("{0} is damaged: {1}")]
    Settings(String, String),
    /// The ledger of the balancer's decisions, or the history of loads.
    #[error("{0}")]
    Database(String),
    /// Two metrics have one name, or a name is not valid.
    #[error("the metrics: {0}")]
    Metrics(prometheus::Error),
    /// The store outside of the cluster has another cluster.
    #[error(
        "the store at {0} has cluster {1} already: join that, or use another prefix \
         (etcd://HOST:PORT/PREFIX)"
    )]
    StoreInUse(String, String),
    /// A label that no node can have.
    #[error("{0}")]
    Label(String),
    /// A token.
    #[error("the join token is not valid: {0}")]
    Token(String),
}

impl AgentError {
    /// Whether another start would fail in the same way, until somebody changes something.
    pub fn is_final(&self) -> bool {
        match self {
            AgentError::Voter(error) => matches!(
                error,
                VoterError::Store(StoreError::Damaged { .. })
                    | VoterError::Lost(_)
                    | VoterError::Forgotten(_)
            ),
            AgentError::NoNode(_) | AgentError::Settings(..) => true,
            _ => false,
        }
    }
}

fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> AgentError {
    let what = what.into();
    move |source| AgentError::System { what, source }
}

/// Creates the first node of a new cluster. Nothing runs yet.
///
/// # Errors
/// [`AgentError`].
pub async fn found(options: &AgentOptions) -> Result<(), AgentError> {
    let (dir, name, listen) = prepare(options)?;
    if let Some(external) = &options.store {
        let store = external.connect().await?;
        match members::cluster_of(&store).await {
            Err(MemberError::NoCluster) => {}
            Err(error) => return Err(error.into()),
            Ok((cluster, _)) => {
                let address = external.address.clone();
                return Err(AgentError::StoreInUse(address, cluster.to_string()));
            }
        }
    }
    let authority = CertificateAuthority::create(ClusterId::random())?;
    let identity = NodeIdentity::first(&authority, &name)?;
    authority_keys::save(dir.root(), &[Arc::new(authority)])?;
    write_settings(
        &dir,
        &Settings {
            listen,
            api: options.api,
            voters: vec![(name, listen.to_string())],
            store: options.store.clone(),
            address_is_new: false,
            labels: options.labels.clone(),
        },
    )?;
    // Last, because this write turns the folder into a node's.
    identity.save(dir.root())?;
    Ok(())
}

/// Creates a node of an existing cluster, through the node at `via`. Nothing runs yet.
///
/// # Errors
/// [`AgentError`].
pub async fn join(options: &AgentOptions, via: &str, token: &str) -> Result<(), AgentError> {
    let (dir, name, listen) = prepare(options)?;
    let token: JoinToken = token
        .trim()
        .parse()
        .map_err(|error| AgentError::Token(format!("{error}")))?;
    // Whoever cannot use the store uses up no token.
    let store = match &options.store {
        Some(external) => Some(external.connect().await?),
        None => None,
    };
    let address = options.store.as_ref().map(|it| it.address.as_str());
    let (identity, voters) =
        keel_cluster::join::join(via, &token, &name, &listen.to_string(), address).await?;
    if let Some(store) = store {
        let (cluster, _) = members::cluster_of(&store).await?;
        if cluster != identity.cluster {
            return Err(MemberError::OtherCluster(cluster).into());
        }
    }
    write_settings(
        &dir,
        &Settings {
            listen,
            api: options.api,
            voters: voters
                .into_iter()
                .map(|voter| (voter.node, voter.address))
                .collect(),
            store: options.store.clone(),
            address_is_new: false,
            labels: options.labels.clone(),
        },
    )?;
    identity.save(dir.root())?;
    Ok(())
}

fn prepare(options: &AgentOptions) -> Result<(StateDir, NodeName, SocketAddr), AgentError> {
    let name = NodeName::new(&options.name)?;
    check_labels(&options.labels)?;
    let shown = options.state_dir.display().to_string();
    let dir = StateDir::open(&options.state_dir).map_err(system(shown.clone()))?;
    if let Some(identity) = NodeIdentity::load(dir.root())? {
        let node = identity.node.to_string();
        return Err(AgentError::Taken(shown, node));
    }
    let listen = with_port(options.listen)?;
    Ok((dir, name, listen))
}

/// The address, with a free port where it has none.
fn with_port(mut listen: SocketAddr) -> Result<SocketAddr, AgentError> {
    if listen.port() == 0 {
        let probe = std::net::TcpListener::bind(listen)
            .and_then(|listener| listener.local_addr())
            .map_err(system(listen.to_string()))?;
        listen.set_port(probe.port());
    }
    Ok(listen)
}

fn write_settings(dir: &StateDir, settings: &Settings) -> Result<(), AgentError> {
    let path = dir.settings();
    settings
        .save(&path)
        .map_err(system(path.display().to_string()))
}

fn read_settings(path: &Path) -> Result<Settings, AgentError> {
    let shown = path.display().to_string();
    Settings::load(path).map_err(|error| match error {
        SettingsError::File(source) => AgentError::System {
            what: shown,
            source,
        },
        SettingsError::Damaged(error) => AgentError::Settings(shown, error.to_string()),
    })
}

/// The addresses on which a node listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// For other nodes.
    pub listen: SocketAddr,
    /// For users over TLS, if any.
    pub api: Option<SocketAddr>,
}

/// The addresses of the node in a folder; `None` if the folder has no node. Creates nothing, and
/// needs no running agent.
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

fn check_labels(labels: &Labels) -> Result<(), AgentError> {
    for (label, value) in labels {
        check_label(label, value).map_err(|error| AgentError::Label(error.to_string()))?;
    }
    Ok(())
}

/// Changes the node in a folder, from its next start on. True if something is different.
///
/// # Errors
/// [`AgentError::Runs`] if its agent runs, [`AgentError::Label`], and those of its settings.
pub fn change_node(state_dir: &Path, change: &NodeChange) -> Result<bool, AgentError> {
    let NodeChange {
        listen,
        api,
        labels,
    } = change;
    check_labels(labels)?;
    let dir = StateDir::open(state_dir).map_err(system(state_dir.display().to_string()))?;
    let old = read_settings(&dir.settings())?;
    let stays =
        |new: SocketAddr, old: SocketAddr| new == old || new.port() == 0 && new.ip() == old.ip();
    let mut settings = old.clone();
    settings.labels.extend(labels.clone());
    if let Some(listen) = listen.filter(|new| !stays(*new, old.listen)) {
        settings.listen = with_port(listen)?;
        settings.address_is_new = true;
        let before = old.listen.to_string();
        for (_, address) in &mut settings.voters {
            if *address == before {
                *address = settings.listen.to_string();
            }
        }
    }
    settings.api = api.or(old.api);
    if settings == old {
        return Ok(false);
    }
    // It would write its own settings again.
    if std::os::unix::net::UnixStream::connect(dir.api_socket()).is_ok() {
        return Err(AgentError::Runs(dir.root().display().to_string()));
    }
    write_settings(&dir, &settings)?;
    Ok(true)
}

/// Runs the agent of the node in a folder until it gets a signal to stop, or is asked to restart.
/// `kinds` are the kinds of machines that it runs.
///
/// # Errors
/// [`AgentError`] if it cannot start.
pub async fn run(state_dir: &Path, kinds: Kinds) -> Result<AgentEnd, AgentError> {
    keel_machine::cgroup::lock_agent_memory();
    tokio::task::spawn_blocking(read_own_image_ahead);
    let shown = state_dir.display().to_string();
    let dir = StateDir::open(state_dir).map_err(system(shown.clone()))?;
    let identity = NodeIdentity::load(dir.root())?.ok_or(AgentError::NoNode(shown))?;
    let identity = certificates::renew_at_start(&dir, identity)?;
    let settings = read_settings(&dir.settings())?;
    let metrics = Metrics::new().map_err(AgentError::Metrics)?;
    let events = Events::open(&dir.events(), &identity.node, metrics.clone())
        .map_err(system(dir.events().display().to_string()))?;
    let ledger =
        Ledger::open(&dir.ledger(), identity.node.as_str()).map_err(AgentError::Database)?;
    let recorder = Recorder::open(&dir.loads()).map_err(AgentError::Database)?;
    let traffic = Traffic::default();
    let options = RpcOptions {
        traffic: traffic.clone(),
        ..RpcOptions::default()
    };
    let peers = Arc::new(Peers::new(identity.client_tls()?, options.clone()));
    let listener = tokio::net::TcpListener::bind(settings.listen)
        .await
        .map_err(system(format!("listening on {}", settings.listen)))?;
    let members = MemberSet::new(known_members(&dir));
    let voters = Voters::open(
        dir.clone(),
        &identity,
        settings.clone(),
        peers.clone(),
        members.clone(),
    )
    .await?;
    // Before the store answers: other voters may wait for this one.
    let entry = Arc::new(Entry::new(voters.clone(), peers.clone()));
    let server = Server::serve(
        listener,
        identity.server_tls()?,
        members.check(),
        entry.clone(),
        options,
    )
    .map_err(system(format!("listening on {}", settings.listen)))?;
    tokio::spawn(voters::reopen(voters.clone()));
    voters.begin_cluster().await?;
    tokio::spawn(voters::tell_address(voters.clone()));
    let store = voters.client();
    let search = tokio::spawn(voters::find_voters(voters.clone()));
    follow_members(&store, &members).await;
    search.abort();
    let node = identity.node.clone();
    let lease = lease::keep(store.clone(), node, events.clone(), metrics.clone())
        .map_err(system("the thread that renews the lease"))?;
    let slice = make_slice(&dir);
    let traces = Traces::from_environment(&identity.node, identity.cluster);
    let context = Arc::new(Context {
        name: identity.node.clone(),
        cluster: identity.cluster,
        dir,
        kinds,
        settings,
        store,
        peers,
        members,
        lease: lease.current,
        lease_term: lease.term,
        hold: lease.hold,
        started_unix_ms: unix_ms(),
        identity: OwnIdentity::new(identity)?,
        events,
        metrics,
        traces,
        traffic,
    });
    tokio::spawn(certificates::keep(
        context.clone(),
        voters.clone(),
        server.tls_setter(),
    ));
    let parts = Parts::build(context, slice, ledger, recorder, voters);
    serve(parts, server, &entry).await
}

/// The members as this node knew them last; empty where that is not known.
fn known_members(dir: &StateDir) -> Vec<Member> {
    let read = std::fs::read(dir.members()).map_err(|error| error.to_string());
    let read = read.and_then(|text| serde_json::from_slice(&text).map_err(|e| e.to_string()));
    read.unwrap_or_else(|error| {
        tracing::debug!(error, "no list of members from the last start");
        Vec::new()
    })
}

/// The layers of an agent, and the inputs of their tasks.
struct Parts {
    handles: Arc<Handles>,
    placements: Arc<Placements>,
    extension: Arc<LeaseExtension>,
    alive: Arc<AliveNodes>,
    gossip: Arc<NodeGossip>,
    arrivals: Arrivals,
    inbox: Inbox,
    restarts: Restarts,
}

impl Parts {
    /// Builds the layers from the bottom up: each gets the handles of the lower ones.
    fn build(
        context: Arc<Context>,
        slice: Slice,
        ledger: Ledger,
        recorder: Recorder,
        voters: Arc<Voters>,
    ) -> Self {
        let (processes, arrivals) = Processes::new(slice);
        let processes = Arc::new(processes);
        let placements: Arc<Placements> = Arc::default();
        let alive = Arc::new(AliveNodes::new());
        let gossip = Arc::new(NodeGossip::new());
        let images = Arc::new(Images::new(context.clone()));
        let code = Arc::new(Code::new());
        let rules = Arc::new(Rules::new(
            context.clone(),
            placements.clone(),
            alive.clone(),
        ));
        let checkpoints = Arc::new(Checkpoints::new(
            context.clone(),
            processes.clone(),
            images.clone(),
        ));
        let spanning = Arc::new(Spanning::new(
            context.clone(),
            processes.clone(),
            images.clone(),
            rules.clone(),
        ));
        let moves = Arc::new(Moves::new(moves::Dependencies {
            context: context.clone(),
            processes: processes.clone(),
            images: images.clone(),
            code: code.clone(),
            rules: rules.clone(),
            checkpoints: checkpoints.clone(),
            spanning: spanning.clone(),
        }));
        let (balancer, inbox) = NodeBalancer::new(balancer::Dependencies {
            context: context.clone(),
            processes: processes.clone(),
            code: code.clone(),
            rules: rules.clone(),
            spanning: spanning.clone(),
            moves: moves.clone(),
            placements: placements.clone(),
            alive: alive.clone(),
            gossip: gossip.clone(),
            ledger,
            recorder,
        });
        let balancer = Arc::new(balancer);
        let failover = Arc::new(failover::Dependencies {
            context: context.clone(),
            rules: rules.clone(),
            placements: placements.clone(),
            alive: alive.clone(),
            gossip: gossip.clone(),
        });
        let (machines, restarts) = Machines::new(machines::Dependencies {
            context: context.clone(),
            processes: processes.clone(),
            images: images.clone(),
            code: code.clone(),
            rules: rules.clone(),
            checkpoints: checkpoints.clone(),
            spanning: spanning.clone(),
            moves: moves.clone(),
            balancer: balancer.clone(),
            failover: failover.clone(),
        });
        let extension = Arc::new(LeaseExtension::new(
            context.clone(),
            processes.clone(),
            placements.clone(),
        ));
        let handles = Handles {
            failover,
            restart: Arc::new(PlannedRestart::new(extension.clone(), || {
                parent().is_some()
            })),
            logs: Arc::new(Logs::new(context.clone(), processes.clone())),
            files: Arc::new(VolumeFiles::new(context.clone(), processes.clone())),
            context,
            gossip: gossip.clone(),
            voters,
            processes,
            images,
            code,
            rules,
            checkpoints,
            spanning,
            moves,
            balancer,
            machines: Arc::new(machines),
        };
        Parts {
            handles: Arc::new(handles),
            placements,
            extension,
            alive,
            gossip,
            arrivals,
            inbox,
            restarts,
        }
    }
}

/// The process that started this one and starts it again when it ends, if that is `keel up` and not
/// a shell.
fn parent() -> Option<u32> {
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    let program = |process: &str| std::fs::read_link(format!("/proc/{process}/exe")).ok();
    let named = std::env::var(crate::supervisor::PARENT_ENVIRONMENT).ok();
    parent.filter(|parent| {
        // A parent of an older version does not provide it.
        let own = program("self");
        named.as_deref() == Some(&parent.to_string())
            || own.is_some() && own == program(&parent.to_string())
    })
}

/// The parent of the cgroups of this node's workers.
fn make_slice(dir: &StateDir) -> Slice {
    let slice = Slice::prepare(dir.root(), parent());
    if let Some(missing) = slice.missing() {
        tracing::warn!("{missing}");
    }
    slice
}

/// Fills the set of members as soon as the store answers, and keeps it up to date.
async fn follow_members(store: &Arc<dyn Store>, members: &Arc<MemberSet>) {
    while let Err(error) = members.follow_store(store.clone()).await {
        tracing::warn!(%error, "the store does not answer yet");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn serve(parts: Parts, server: ServerHandle, entry: &Entry) -> Result<AgentEnd, AgentError> {
    let Parts {
        handles: at,
        placements,
        extension,
        alive,
        gossip,
        mut arrivals,
        inbox,
        restarts,
    } = parts;
    let context = at.context.clone();
    tokio::spawn(follow_addresses(context.clone()));
    // Before any request can ask for running machines.
    at.processes.machines.adopt(&context.dir).await;
    spanning::adopt(&at.spanning).await;
    tell_start(&at);
    entry.open(front::Service::new(at.clone()));
    tokio::spawn(voters::follow(at.voters.clone()));
    let started = tokio::time::Instant::now();
    let role = |name| {
        let (store, node) = (context.store.clone(), context.name.clone());
        Role::seek(name, store, node, context.lease.clone(), started)
    };
    tokio::spawn(voters::manage(at.voters.clone(), context.members.clone()));
    tokio::spawn(voters::spread_authority(
        at.voters.clone(),
        context.members.clone(),
    ));
    tokio::spawn(voters::rotate_authority(context.clone(), at.voters.clone()));
    let (store, events) = (context.store.clone(), context.events.clone());
    tokio::spawn(lease::tell_of_nodes(store, events, role("node-events")));
    let (changes, placement_changes) = unbounded_channel();
    tokio::spawn(placements.clone().follow(context.clone(), changes.clone()));
    tokio::spawn(follow_arrivals(context.clone(), changes));
    tokio::spawn(extension.follow());
    tokio::spawn(at.restart.clone().end_holds());
    tokio::spawn(failover::run(at.failover.clone(), role("failover")));
    tokio::spawn(checkpoints::sweep(at.checkpoints.clone()));
    tokio::spawn(images::keep(at.images.clone(), alive.clone()));
    tokio::spawn(images::remove_unused(at.images.clone()));
    let followed = context.clone();
    tokio::spawn(async move { alive.follow(&followed).await });
    at.rules.cache.follow();
    for machine in at.processes.machines.names() {
        machines::watch_worker(&at.machines, &machine);
        let moves = at.moves.clone();
        tokio::spawn(async move { moves::resume_after_move(&moves, &machine).await });
    }
    let watched = at.machines.clone();
    tokio::spawn(async move {
        while let Some(machine) = arrivals.recv().await {
            machines::watch_worker(&watched, &machine);
        }
    });
    tokio::spawn(moves::withdraw_old_offers(at.moves.clone()));
    let published = node_record::publish(context.clone(), at.processes.clone());
    let (taking_part, of_keys) = (gossip.clone(), role("gossip-keys"));
    let own = context.clone();
    let (rules, voters) = (at.rules.clone(), at.voters.clone());
    tokio::spawn(async move {
        let start = published.await;
        tokio::spawn(give_labels(own.name.clone(), rules, voters));
        if let Some(start) = start {
            gossip::run(taking_part, own, start, of_keys).await;
        }
    });
    tokio::spawn(machines::follow_restarts(at.machines.clone(), restarts));
    tokio::spawn(machines::follow_schedule(at.machines.clone()));
    tokio::spawn(compilation::run(
        context.clone(),
        at.images.clone(),
        at.code.clone(),
    ));
    balancer::start(&at.balancer, inbox, placement_changes);
    let end = front::serve(at.clone()).await.map_err(system("the API"))?;
    let orderly = async {
        server.shutdown().await;
        if end == AgentEnd::Stopped {
            gossip.stop().await;
            let stopped = Note::node(EventKind::NodeStopped, "the agent was told to stop");
            context.events.record(stopped);
            at.processes.machines.slice().remove_if_empty();
        }
        context.events.flush().await;
    };
    // A disk that stands still keeps nobody from starting the next agent.
    if tokio::time::timeout(END_WITHIN, orderly).await.is_err() {
        tracing::warn!("the agent ends without having written all of its events");
    }
    Ok(end)
}

fn tell_start(at: &Handles) {
    let version = env!("CARGO_PKG_VERSION");
    let text = format!("the agent started (keel {version})");
    let started = Note::node(EventKind::NodeStarted, text).with("version", version);
    at.context.events.record(started);
    for machine in at.processes.machines.names() {
        let text = "its process was found when the agent started";
        let found = Note::machine(EventKind::MachineFound, &machine, text);
        at.context.events.record(found);
    }
}

/// Keeps the addresses of all members up to date, and the list for the next start.
async fn follow_addresses(context: Arc<Context>) {
    let mut changes = context.members.changes();
    loop {
        let members: Vec<Member> = context.members.all().values().cloned().collect();
        let path = context.dir.members();
        let saving = tokio::task::spawn_blocking(move || {
            let text = serde_json::to_vec_pretty(&members)?;
            crate::state_dir::write_whole(&path, &text)
        });
        if let Ok(Err(error)) = saving.await {
            tracing::warn!(%error, "the list of members is not kept for the next start");
        }
        for (node, member) in context.members.all().iter() {
            context.peers.set_address(node, &member.address);
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Gives this node the labels that it was started with; retries until it has them.
async fn give_labels(node: NodeName, rules: Arc<Rules>, voters: Arc<Voters>) {
    let labels = voters.settings().labels;
    if labels.is_empty() {
        return;
    }
    let request = LabelRequest {
        node: true,
        name: node.to_string(),
        labels: labels.clone(),
    };
    while let Err(error) = rules.label(&request).await {
        tracing::warn!(%error, "this node does not have the labels yet that it was started with");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let given = |settings: &mut Settings| settings.labels.retain(|it, _| !labels.contains_key(it));
    voters.change_settings(given).await;
}
