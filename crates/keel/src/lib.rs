//! The command line of Evenkeel, for any set of kinds of machines. `main.rs` is the executable, with
//! the kinds that it has.
//!
//! - `wasm`: `keel wasm`, one program in the foreground, without a cluster
//! - `up`: `keel up`, `keel join` and the processes behind them
//! - `machines`: `run`, `ps`, `logs`, `inspect`, `stop`, `kill`, `rm`, `move`
//! - `checkpoint`: `checkpoint`, `checkpoints`, `restore`, `clone`
//! - `cluster`: `status`, `nodes`, `schedule`, `token`
//! - `apply`: `keel apply`
//! - `cp`: `keel cp`
//! - `demo`: `keel demo`
//! - `describe`: `keel describe`
//! - `doctor`: `keel doctor`
//! - `down`: `keel down`
//! - `reload`: `keel reload`
//! - `events`: `keel events`
//! - `help`: the list of commands, in groups
//! - `image`: files that machines start from
//! - `import`: `keel import`
//! - `program`: a module and its arguments on a command line
//! - `set`: `keel set`
//! - `sim`: `keel sim`
//! - `output`: tables and JSON
//! - `volume`: volumes on command lines, and `keel volume`
//! - `size`: sizes on command lines
//! - `started`: waits until a machine runs
//! - `system`: what a machine of kind `qemu` is made of, on command lines and in machine files
//! - `vnc`: `keel vnc`
//! - `when`: times on command lines

#![warn(clippy::print_stdout)]

#[macro_use]
mod output;

mod apply;
mod audit;
mod balance;
mod ca;
mod checkpoint;
mod cloud_init;
mod cluster;
mod console;
mod contexts;
mod cp;
#[doc(hidden)]
pub mod decoders;
mod demo;
mod describe;
mod doctor;
mod down;
mod dry_run;
mod events;
mod exec;
mod fat;
mod guest_agent;
mod help;
mod high_availability;
mod history;
mod image;
mod import;
mod input;
mod leave;
mod machines;
mod network;
mod objects;
mod parts;
mod plan;
mod program;
mod reload;
mod rule;
mod set;
mod sim;
mod size;
mod started;
mod store;
mod system;
mod tokens;
mod up;
mod vnc;
mod volume;
mod wasm;
mod wasm_listeners;
mod when;

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use keel_machine::kind::Kinds;
use std::process::ExitCode;

/// A self-balancing cluster of virtual machines.
///
/// `keel demo` shows the main features. `keel up --name a` creates a cluster of one node, `keel
/// token join` and `keel join` add others, `keel run APP.wasm` starts a machine, and `keel move M
/// --to NODE` moves it while it runs.
#[derive(Parser)]
#[command(name = "keel", version, about, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    reach: cluster::Reach,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows three nodes on this computer; machines move, and a node dies.
    Demo(demo::Args),
    /// Runs one WebAssembly program in the foreground, without a cluster.
    Wasm(wasm::Args),
    /// Starts the node of this computer; creates a cluster if there is none yet.
    Up(up::UpArgs),
    /// Makes this computer a node of an existing cluster; starts the node.
    Join(up::JoinArgs),
    /// Stops the node of this computer; its machines continue, and the next `keel up` finds them.
    Down(down::Args),
    /// Restarts a node's agent from the file that is installed now: machines run on.
    ///
    /// For an upgrade: install the new file first. The node counts as alive meanwhile, for a minute at
    /// most, so that none of its machines is restarted elsewhere.
    Reload,
    /// Shows the state of the cluster.
    Status,
    /// Shows which nodes hold the store, says how many shall; backups.
    Store {
        #[command(subcommand)]
        what: Option<store::StoreCommand>,
    },
    /// Begins the store anew here when most voters are lost for good.
    Recover(store::RecoverArgs),
    /// Checks this computer: what a node has here, what it lacks, and the remedies.
    ///
    /// Needs no running node; a running one is queried too. Exit code 1 if a node does not work
    /// here.
    Doctor(doctor::Args),
    /// Lists the nodes.
    Nodes,
    /// Removes the node of this computer from its cluster, and stops it.
    ///
    /// It must have no machines in its schedule: `keel drain` moves them away first. Its folder is put
    /// aside, and the computer can join again.
    Leave,
    /// Removes nodes that are gone.
    Node {
        #[command(subcommand)]
        what: leave::NodeCommand,
    },
    /// Lists the machines in a node's schedule.
    Schedule {
        /// The node.
        node: String,
    },
    /// Creates, lists and removes tokens: for nodes to join, and for users.
    Token {
        #[command(subcommand)]
        what: tokens::TokenCommand,
    },
    /// Shows the certificate authority and the nodes' certificates; replaces the authority.
    Ca {
        #[command(subcommand)]
        what: Option<ca::CaCommand>,
    },
    /// Keeps a user's token and a server as a context for all commands.
    Login(contexts::LoginArgs),
    /// Lists and chooses the contexts of `keel login`.
    #[command(subcommand)]
    Context(contexts::ContextCommand),
    /// Lists who asked for which change, in the order of the store.
    Audit(audit::Args),
    /// Starts a machine.
    Run(Box<machines::RunArgs>),
    /// Makes machines equal to those of a file; leaves equal ones untouched.
    Apply(apply::Args),
    /// Translates machines of libvirt or Proxmox VE; prints a machine file.
    ///
    /// Needs no node. Each machine has its disks where they are now; all nodes where it may run must
    /// see them there. What a machine lacks here is named in comments.
    Import(import::Args),
    /// Lists machines.
    Ps {
        /// Ended ones too.
        #[arg(short, long)]
        all: bool,
    },
    /// Shows a machine's output.
    Logs(machines::LogArgs),
    /// Shows the details of a machine, with its moves.
    Inspect {
        /// The machine.
        machine: String,
    },
    /// Shows a machine on one page: its state, resources, permissions and recent history.
    Describe {
        /// The machine.
        machine: String,
    },
    /// Lists events of machines, moves, checkpoints and nodes.
    Events(events::Args),
    /// Copies a file from or to a volume of a machine; it may run and move meanwhile.
    Cp(cp::Args),
    /// Attaches this terminal to a machine's serial console; Ctrl-] leaves it. Types a file if the
    /// standard input is one.
    Console(console::Args),
    /// Shows a machine's display to VNC viewers, at an address here.
    Vnc(vnc::Args),
    /// Executes a command in a machine, by its guest agent; exits with the command's exit code.
    Exec(exec::Args),
    /// Changes limits, restart policy or checkpoints of a machine; it may run.
    Set(set::Args),
    /// Simulates a cluster and its balancer: the moves, and their result.
    ///
    /// Needs no node. The code of the agents runs with simulated nodes, machines and time; a seed
    /// determines all random values.
    Sim(sim::Args),
    /// Starts machines again that have ended: each begins anew, with its output and its own disk.
    Start {
        /// The machines.
        #[arg(required = true)]
        machines: Vec<String>,
    },
    /// Ends a machine.
    Stop {
        /// The machines.
        #[arg(required = true)]
        machines: Vec<String>,
    },
    /// Ends a machine's process at once.
    Kill {
        /// The machines.
        #[arg(required = true)]
        machines: Vec<String>,
    },
    /// Removes ended machines with their output.
    Rm {
        /// The machines.
        #[arg(required = true)]
        machines: Vec<String>,
        /// Stops those that run.
        #[arg(short, long)]
        force: bool,
    },
    /// Moves a running machine to another node; or one thread of it (M/thread/NUMBER), or an
    /// object of its memory (M/objects/RANGE), to another part.
    Move(machines::MoveArgs),
    /// Gives a running machine with threads parts on several nodes; if it has some, adds and
    /// removes parts to match.
    Span(parts::SpanArgs),
    /// Moves the threads and the memory of a machine back to its home.
    Unspan {
        /// The machine.
        machine: String,
    },
    /// Lists the parts of a machine.
    Parts(parts::PartsArgs),
    /// Lists the threads of a running machine: their nodes and states.
    Threads {
        /// The machine.
        machine: String,
    },
    /// Lists the memory of a machine with several parts: the node of each object, the threads that
    /// wait for it, and its unused pages.
    Objects(objects::ObjectsArgs),
    /// Moves threads and memory between parts at random; for tests.
    Shake(parts::ShakeArgs),
    /// Shows the loads of the nodes; shows and changes the balancer's policy.
    Balance(balance::BalanceArgs),
    /// Drains a node: its machines move to others, and no machine is placed there.
    Drain(plan::DrainArgs),
    /// Ends the drain of a node.
    Undrain {
        /// The node.
        node: String,
    },
    /// Explains the placement of a machine: the balancer's inputs, candidates and decision.
    Why(balance::WhyArgs),
    /// Explains why a machine does not move to a node, or that it would.
    WhyNot(balance::WhyNotArgs),
    /// Lists the balancer's decisions; also each change of its reason for not acting.
    Ledger(balance::LedgerArgs),
    /// Shows measured loads of nodes and machines, up to a month ago.
    History(history::Args),
    /// Lists, sets and removes placement rules.
    #[command(subcommand)]
    Rule(rule::RuleCommand),
    /// Labels a machine, or a node, for rules to select by.
    Label(rule::LabelArgs),
    /// Makes a checkpoint of a running machine; deletes some, and limits what a place has.
    Checkpoint(checkpoint::CheckpointArgs),
    /// Lists a machine's checkpoints.
    Checkpoints {
        /// The machine.
        machine: String,
        /// Their place: a directory or s3://bucket/prefix (default: the node's own folder).
        #[arg(long, value_name = "PLACE")]
        from: Option<String>,
    },
    /// Creates a machine from a checkpoint.
    Restore(checkpoint::RestoreArgs),
    /// Names images of disks, with which systems begin.
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Creates, lists and removes the cluster's volumes.
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Clones a running machine; the copy runs on independently.
    Clone(checkpoint::CloneArgs),
    /// Writes the manual: a page for each command.
    Man {
        /// Folder for the pages; it must exist.
        folder: std::path::PathBuf,
    },
    /// Prints a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Injects faults, for tests: on nodes that were started with KEEL_FAULT_INJECTION=1.
    #[command(subcommand, hide = true)]
    Debug(DebugCommand),
    /// Runs a node's agent (started by `keel up`).
    #[command(hide = true)]
    Agent(up::AgentArgs),
    /// Compiles a program into a node's cache (started by its agent).
    #[command(hide = true)]
    Compile(up::CompileArgs),
    /// Makes room for the start of a service whose machines run on (see the unit).
    #[command(hide = true)]
    ReleaseGroups,
    /// Runs one machine (started by an agent).
    #[command(hide = true)]
    Worker(up::WorkerArgs),
}

#[derive(Subcommand)]
enum DebugCommand {
    /// Lists the failpoints, or sets one on the node that is asked.
    Failpoint {
        /// Its name.
        name: Option<String>,
        /// kill, stop, error or delay(MILLISECONDS); `@N` for the N-th pass, `*` for all (default:
        /// clears the failpoint).
        order: Option<String>,
    },
}

async fn debug(reach: &cluster::Reach, command: DebugCommand) -> anyhow::Result<ExitCode> {
    let DebugCommand::Failpoint { name, order } = command;
    let Some(name) = name else {
        for failpoint in keel_machine::failpoint::ALL {
            outln!("{:<18} {}", failpoint.name, failpoint.when);
        }
        return Ok(ExitCode::SUCCESS);
    };
    let request = keel_api::FailpointRequest { name, order };
    let _: serde_json::Value = reach
        .client()?
        .post("/v1/debug/failpoint", &request)
        .await?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the command that this process was started for. `kinds` are the kinds of machines that its
/// nodes run.
pub fn run(kinds: Kinds) -> ExitCode {
    let matches = help::grouped(Cli::command()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    // A process that was started by a link to its image would be listed by the link's name. An
    // error leaves it so.
    let _ = rustix::thread::set_name(c"keel");
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("KEEL_LOG")
                // What `openraft` says of nodes that are away is said by the agent, once.
                .unwrap_or_else(|_| "warn,openraft=off".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        // The default hook panics if stderr cannot be written: on a full disk a log line would end
        // the thread that wrote it.
        .log_internal_errors(false)
        .init();
    match dispatch(cli, kinds) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("keel: {}", sentence(&error));
            ExitCode::from(1)
        }
    }
}

/// An error with its causes. Many errors include the text of their cause, which is not repeated.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(cause.as_str()) {
            text = format!("{text}: {cause}");
        }
    }
    text.trim_end().to_owned()
}

fn dispatch(cli: Cli, kinds: Kinds) -> anyhow::Result<ExitCode> {
    // Commands that run guests have no async runtime of their own.
    match cli.command {
        Command::Wasm(args) => return wasm::run(args),
        Command::Worker(args) => return up::worker(args, &kinds),
        Command::Compile(args) => return up::compile(&args, &kinds),
        Command::Sim(args) => return sim::sim(&args, cli.reach.format()),
        Command::ReleaseGroups => {
            // The agent uses this name.
            let folder = cli.reach.state_dir();
            let folder = folder
                .canonicalize()
                .with_context(|| folder.display().to_string())?;
            keel_machine::cgroup::Slice::release(&folder);
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man { folder } => {
            clap_mangen::generate_to(Cli::command(), &folder)
                .with_context(|| format!("no pages in {}", folder.display()))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "keel", &mut std::io::stdout());
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let origin = tokio::time::Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .on_thread_start(move || keel_net::coarse_timer::set_origin(origin))
        // A second one would be woken for each message, to find that there is nothing left to do.
        .worker_threads(1)
        .enable_all()
        .build()?;
    keel_net::coarse_timer::set_origin(origin);
    runtime.block_on(with_runtime(cli, kinds))
}

async fn with_runtime(cli: Cli, kinds: Kinds) -> anyhow::Result<ExitCode> {
    let reach = cli.reach;
    match cli.command {
        Command::Demo(args) => demo::run(&args, reach.json()).await,
        Command::Up(args) => up::up(&reach, &args).await,
        Command::Join(args) => up::join(&reach, &args).await,
        Command::Down(args) => down::run(&reach, &args).await,
        Command::Reload => reload::run(&reach).await,
        Command::Agent(args) => up::agent(&args, kinds).await,
        Command::Status => cluster::status(&reach).await,
        Command::Store { what } => store::run(&reach, what).await,
        Command::Recover(args) => store::recover(&reach, &args).await,
        Command::Doctor(args) => doctor::run(&reach, &args).await,
        Command::Nodes => cluster::nodes(&reach).await,
        Command::Leave => leave::leave(&reach).await,
        Command::Node { what } => leave::node(&reach, what).await,
        Command::Schedule { node } => cluster::schedule(&reach, &node).await,
        Command::Token { what } => tokens::run(&reach, what).await,
        Command::Ca { what } => ca::run(&reach, what).await,
        Command::Login(args) => contexts::login(&reach, &args).await,
        Command::Context(what) => contexts::run(&reach, what),
        Command::Audit(args) => audit::run(&reach, &args).await,
        Command::Run(args) => machines::run(&reach, &args).await,
        Command::Apply(args) => apply::run(&reach, &args).await,
        Command::Import(args) => import::run(&args),
        Command::Ps { all } => machines::ps(&reach, all).await,
        Command::Logs(args) => machines::logs(&reach, &args).await,
        Command::Inspect { machine } => machines::inspect(&reach, &machine).await,
        Command::Describe { machine } => describe::run(&reach, &machine).await,
        Command::Events(args) => events::run(&reach, &args).await,
        Command::Cp(args) => cp::run(&reach, &args).await,
        Command::Console(args) => console::run(&reach, &args).await,
        Command::Vnc(args) => vnc::run(&reach, &args).await,
        Command::Exec(args) => Ok(exec::run(&reach, &args).await.unwrap_or_else(|error| {
            eprintln!("keel: {}", sentence(&error));
            ExitCode::from(exec::UNKNOWN_EXIT)
        })),
        Command::Set(args) => set::run(&reach, &args).await,
        Command::Start { machines } => machines::tell(&reach, &machines, "start").await,
        Command::Stop { machines } => machines::tell(&reach, &machines, "stop").await,
        Command::Kill { machines } => machines::tell(&reach, &machines, "kill").await,
        Command::Rm { machines, force } => machines::rm(&reach, &machines, force).await,
        Command::Move(args) => machines::move_machine(&reach, &args).await,
        Command::Span(args) => parts::span(&reach, &args).await,
        Command::Unspan { machine } => parts::unspan(&reach, &machine).await,
        Command::Parts(args) => parts::parts(&reach, &args).await,
        Command::Threads { machine } => parts::threads(&reach, &machine).await,
        Command::Objects(args) => objects::run(&reach, &args).await,
        Command::Shake(args) => parts::shake(&reach, &args).await,
        Command::Balance(args) => balance::balance(&reach, &args).await,
        Command::Drain(args) => plan::drain(&reach, &args).await,
        Command::Undrain { node } => plan::undrain(&reach, &node).await,
        Command::Why(args) => balance::why(&reach, &args).await,
        Command::WhyNot(args) => balance::why_not(&reach, &args).await,
        Command::Ledger(args) => balance::ledger(&reach, &args).await,
        Command::History(args) => history::run(&reach, &args).await,
        Command::Rule(command) => rule::run(&reach, command).await,
        Command::Label(args) => rule::label(&reach, &args).await,
        Command::Checkpoint(args) => checkpoint::checkpoint(&reach, &args).await,
        Command::Checkpoints { machine, from } => checkpoint::list(&reach, &machine, from).await,
        Command::Restore(args) => checkpoint::restore(&reach, &args).await,
        Command::Image(command) => image::run(&reach, command).await,
        Command::Volume(command) => volume::run(&reach, command).await,
        Command::Clone(args) => checkpoint::clone(&reach, &args).await,
        Command::Debug(command) => debug(&reach, command).await,
        // Dispatched earlier, without a runtime.
        Command::Wasm(_)
        | Command::Sim(_)
        | Command::Worker(_)
        | Command::Compile(_)
        | Command::ReleaseGroups
        | Command::Man { .. }
        | Command::Completions { .. } => Ok(ExitCode::SUCCESS),
    }
}
