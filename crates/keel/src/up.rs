//! `keel up` and `keel join`: a node on this computer. The command is the small parent process;
//! the agent and the workers are processes of their own.

use crate::cluster::Reach;
use crate::rule;
use anyhow::{Context, Result, bail};
use keel_machine::kind::{KindName, Kinds, WorkerFolders};
use keel_node::{AgentEnd, AgentError, AgentOptions, ExternalStore, NodeChange, REFUSED_CODE};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::process::Stdio;
use std::time::Duration;

/// How long a node may take to answer, with `--detach`.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long its agents may end early, with `--detach`, before nobody starts another.
const START_WITHIN: Duration = Duration::from_secs(10);

/// Default address of a node.
pub(crate) const DEFAULT_LISTEN: &str = "127.0.0.1:7070";

#[derive(clap::Args)]
pub(crate) struct UpArgs {
    /// Name of the node; required for a new node.
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    place: Place,
    /// Gives up if all agents of this time ended early (seconds).
    #[arg(long, hide = true)]
    start_within: Option<u64>,
}

#[derive(clap::Args)]
pub(crate) struct JoinArgs {
    /// Any node of the cluster.
    via: String,
    /// Token created by `keel token join`.
    #[arg(long)]
    token: String,
    /// Name of the new node.
    #[arg(long)]
    name: String,
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
struct Place {
    /// Address for other nodes; port 0 selects a free one [default for a new node: 127.0.0.1:7070].
    ///
    /// A node that exists gets another address by it, and tells the others.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Address for users over TLS (default: only the local socket).
    #[arg(long, value_name = "ADDRESS:PORT")]
    api: Option<SocketAddr>,
    /// A label of the node, e.g. zone=a: its failure domain. Can be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = rule::parse_label)]
    labels: Vec<(String, String)>,
    /// Returns once the node answers, and leaves it in the background.
    #[arg(short, long)]
    detach: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// A store outside of the cluster's nodes; the same for all of them.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "A store outside of the nodes")]
pub(crate) struct StoreArgs {
    /// An etcd for the cluster's state, e.g. etcd://h1:2379,h2:2379/site-1.
    ///
    /// For clusters that outgrow the store in their own nodes. etcd 3.4 or newer, started with
    /// --max-txn-ops 512 --max-request-bytes 4194304. The part after the slash is a prefix of all
    /// keys, so that several clusters can use one etcd. All nodes need the option when they are
    /// created, or when the store was moved (`keel store migrate`).
    #[arg(long, value_name = "ADDRESS")]
    store: Option<String>,
    /// Authority of etcd's certificates (PEM): encrypts.
    #[arg(long, value_name = "FILE", requires = "store")]
    store_ca: Option<PathBuf>,
    /// This node's certificate for etcd (PEM).
    #[arg(long, value_name = "FILE", requires_all = ["store_key", "store_ca"])]
    store_cert: Option<PathBuf>,
    /// The certificate's key (PEM).
    #[arg(long, value_name = "FILE", requires = "store_cert")]
    store_key: Option<PathBuf>,
    /// User of etcd.
    #[arg(long, value_name = "NAME", requires_all = ["store_password_file", "store"])]
    store_user: Option<String>,
    /// The user's password is in this file.
    #[arg(long, value_name = "FILE", requires = "store_user")]
    store_password_file: Option<PathBuf>,
}

impl StoreArgs {
    pub(crate) fn external(&self) -> Result<Option<ExternalStore>> {
        let Some(address) = self.store.clone() else {
            return Ok(None);
        };
        // The agent has another working directory.
        let absolute = |file: &PathBuf| {
            std::path::absolute(file).with_context(|| format!("{}", file.display()))
        };
        Ok(Some(ExternalStore {
            address,
            authority: self.store_ca.as_ref().map(absolute).transpose()?,
            client: match (&self.store_cert, &self.store_key) {
                (Some(certificate), Some(key)) => Some((absolute(certificate)?, absolute(key)?)),
                _ => None,
            },
            user: match (&self.store_user, &self.store_password_file) {
                (Some(user), Some(file)) => Some((user.clone(), absolute(file)?)),
                _ => None,
            },
        }))
    }
}

#[derive(clap::Args)]
pub(crate) struct AgentArgs {
    /// The node's folder.
    #[arg(long)]
    folder: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct WorkerArgs {
    /// The kind of its machine.
    #[arg(long)]
    kind: KindName,
    /// The machine's folder.
    #[arg(long)]
    folder: PathBuf,
    /// Compiled code.
    #[arg(long)]
    cache: PathBuf,
    /// What machines start from.
    #[arg(long)]
    images: PathBuf,
    /// Instrumented modules.
    #[arg(long)]
    programs: PathBuf,
}

fn options(reach: &Reach, name: &str, place: &Place) -> Result<AgentOptions> {
    Ok(AgentOptions {
        state_dir: reach.state_dir(),
        name: name.to_owned(),
        listen: match place.listen {
            Some(listen) => listen,
            None => DEFAULT_LISTEN.parse()?,
        },
        api: place.api,
        store: place.store.external()?,
        labels: place.labels.iter().cloned().collect(),
    })
}

pub(crate) async fn up(reach: &Reach, args: &UpArgs) -> Result<ExitCode> {
    if let Some(store) = args.place.store.external()?
        && keel_node::addresses(&reach.state_dir())?.is_some()
    {
        // A store that was moved meanwhile.
        let old = keel_node::follow_store(&reach.state_dir(), &store).await?;
        if let Some(old) = old {
            let old = old.display();
            eprintln!(
                "the store is at {} now; the old copy is in {old}",
                store.address
            );
        }
    }
    if let Some(name) = &args.name {
        match keel_node::found(&options(reach, name, &args.place)?).await {
            Ok(()) => eprintln!("created a cluster with node {name}"),
            // Restarting an existing node under its own name is no error.
            Err(AgentError::Taken(_, existing)) if existing == *name => {}
            Err(error) => return Err(error.into()),
        }
    }
    let folder = reach.state_dir();
    let change = NodeChange {
        listen: args.place.listen,
        api: args.place.api,
        labels: args.place.labels.iter().cloned().collect(),
    };
    let old = keel_node::addresses(&folder)?;
    if old.is_some() && keel_node::change_node(&folder, &change)? {
        let now = keel_node::addresses(&folder)?;
        if let Some(now) = now.filter(|now| old.as_ref() != Some(now)) {
            eprintln!("the node listens at {} now", now.listen);
        }
    }
    let within = args.start_within.map(Duration::from_secs);
    start(&folder, args.place.detach, within).await
}

pub(crate) async fn join(reach: &Reach, args: &JoinArgs) -> Result<ExitCode> {
    keel_node::join(
        &options(reach, &args.name, &args.place)?,
        &args.via,
        &args.token,
    )
    .await
    .with_context(|| format!("joining through {}", args.via))?;
    eprintln!("joined the cluster as node {}", args.name);
    start(&reach.state_dir(), args.place.detach, None).await
}

async fn start(folder: &Path, detach: bool, within: Option<Duration>) -> Result<ExitCode> {
    if keel_node::addresses(folder)?.is_none() {
        bail!(AgentError::NoNode(folder.display().to_string()));
    }
    let installed = keel_node::installed().context("the path of this program is not known")?;
    if detach {
        return start_in_background(&installed, folder).await;
    }
    keel_node::supervise(folder, &installed, within, |program| {
        let mut command = tokio::process::Command::new(program);
        command
            .arg0(&installed)
            .arg("agent")
            .arg("--folder")
            .arg(folder);
        command
    })
    .await?;
    Ok(ExitCode::SUCCESS)
}

async fn start_in_background(installed: &Path, folder: &Path) -> Result<ExitCode> {
    let socket = folder.join("api.socket");
    // The socket of an earlier agent would be mistaken for an answer.
    if socket.exists() && std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        bail!("a node runs in {} already", folder.display());
    }
    let log_path = folder.join("agent.log");
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .with_context(|| format!("{} has no node yet (keel up --name NAME)", folder.display()))?;
    let log_begin = log.metadata()?.len();
    let mut command = std::process::Command::new(keel_node::own_image());
    std::os::unix::process::CommandExt::arg0(&mut command, installed);
    command
        .arg("--state-dir")
        .arg(folder)
        .arg("up")
        .arg("--start-within")
        .arg(START_WITHIN.as_secs().to_string())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut parent = command
        .spawn()
        .context("the node's process cannot be started")?;
    let client = keel_api::Client::socket(socket);
    let deadline = tokio::time::Instant::now() + START_PATIENCE;
    loop {
        if client
            .get::<keel_api::ClusterInfo>("/v1/status")
            .await
            .is_ok()
        {
            outln!("{}", parent.id());
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(status) = parent.try_wait()? {
            let (reason, log) = (last_error(&log_path, log_begin), log_path.display());
            bail!("the node ended ({status}){reason}; see {log}");
        }
        if tokio::time::Instant::now() > deadline {
            let (process, log) = (parent.id(), log_path.display());
            let reason = last_error(&log_path, log_begin);
            bail!(
                "the node does not answer yet{reason}; process {process} goes on with its start \
                 (`kill {process}` ends it); see {log}"
            );
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The last error that an agent printed from `begin` on in its log, to be said after something.
fn last_error(log: &Path, begin: u64) -> String {
    let mut new = Vec::new();
    let read = std::fs::File::open(log).and_then(|mut log| {
        log.seek(SeekFrom::Start(begin))?;
        log.read_to_end(&mut new)
    });
    // What cannot be read is not said.
    drop(read);
    let new = String::from_utf8_lossy(&new);
    // Its supervisor's own words name no reason.
    let error = new
        .lines()
        .filter_map(|line| line.strip_prefix("keel: "))
        .rfind(|line| !line.contains("above"));
    error.map_or_else(String::new, |error| format!(": {error}"))
}

pub(crate) async fn agent(args: &AgentArgs, kinds: Kinds) -> Result<ExitCode> {
    let end = match keel_node::run(&args.folder, kinds).await {
        Err(error) if error.is_final() => {
            eprintln!("keel: {error}");
            return Ok(ExitCode::from(REFUSED_CODE));
        }
        end => end?,
    };
    if end == AgentEnd::Restart {
        // Without waiting for tasks that block: the next agent's time is limited.
        std::process::exit(end.exit_code().into());
    }
    Ok(ExitCode::from(end.exit_code()))
}

#[derive(clap::Args)]
pub(crate) struct CompileArgs {
    /// The kind of machine that runs it.
    #[arg(long)]
    kind: KindName,
    /// Compiled code.
    #[arg(long)]
    cache: PathBuf,
    /// The instrumented module.
    #[arg(long)]
    program: PathBuf,
    /// Whether a move waits for it.
    #[arg(long)]
    wanted: bool,
}

pub(crate) fn compile(args: &CompileArgs, kinds: &Kinds) -> Result<ExitCode> {
    let compiled = kinds
        .get(&args.kind)
        .and_then(|kind| kind.compile(&args.cache, &args.program, args.wanted));
    match compiled {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => bail!(error),
    }
}

pub(crate) fn worker(args: WorkerArgs, kinds: &Kinds) -> Result<ExitCode> {
    let folders = WorkerFolders {
        folder: args.folder,
        cache: args.cache,
        images: args.images,
        programs: args.programs,
    };
    let ended = kinds
        .get(&args.kind)
        .and_then(|kind| kind.run_worker(&folders));
    match ended {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => bail!(error),
    }
}
