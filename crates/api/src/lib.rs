//! The HTTP API: its types, and a client. JSON over HTTP/1.1, on a Unix socket
//! of the node or over TLS with a token.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`ClusterInfo`] |
//! | `GET /v1/nodes` | list of [`NodeInfo`] |
//! | `GET /v1/machines`, `GET /v1/machines/NAME` | (list of) [`MachineInfo`] |
//! | `GET /v1/schedule/NODE` | list of machine names |
//! | `PUT /v1/modules` (the module) | [`Uploaded`] |
//! | `POST /v1/machines` [`RunRequest`] | [`MachineInfo`] |
//! | `POST /v1/machines/NAME/stop`, `/kill` | [`MachineInfo`] |
//! | `POST /v1/machines/NAME/move` [`MoveRequest`] | lines of [`MoveLine`] |
//! | `POST /v1/machines/NAME/dry-run` [`MoveRequest`] | [`DryRun`] |
//! | `POST /v1/machines/NAME/cancel-move` | `{}` |
//! | `POST /v1/machines/NAME/diff` [`RunRequest`] | [`MachineDiff`]; nothing is changed |
//! | `POST /v1/machines/NAME/set` [`SetRequest`] | [`MachineInfo`] |
//! | `DELETE /v1/machines/NAME` | `{}` |
//! | `GET /v1/machines/NAME/logs?from=N&follow=true` | the log, as `keel_machine::log` says |
//! | `GET /v1/machines/NAME/logs/offset?since=UNIX_MS` | [`LogOffset`] |
//! | `GET /v1/machines/NAME/files/stat?path=PATH` | [`FileStat`] |
//! | `GET /v1/machines/NAME/files?path=PATH&offset=N&length=N` | bytes, fewer at the end of the file |
//! | `PUT /v1/machines/NAME/files?path=PATH&offset=N&begin=true` (bytes; begins a file that must not be there) | `{}` |
//! | `DELETE /v1/machines/NAME/files?path=PATH` | `{}` |
//! | `POST /v1/machines/NAME/files/rename` [`RenameRequest`] | `{}` |
//! | `GET /v1/events?machine=NAME&since=UNIX_MS&limit=N&follow=true` | lines of [`EventLine`] |
//! | `GET /v1/balance` | [`BalanceInfo`] |
//! | `POST /v1/balance/policy` [`PolicyRequest`] | `{}` |
//! | `POST /v1/machines/NAME/confirm-move` | `{}`: a proposed move is made |
//! | `GET /v1/machines/NAME/why-not?to=NODE` | [`WhyNot`] |
//! | `GET /v1/nodes/NAME/history?since=UNIX_MS&until=UNIX_MS&points=N`, `GET /v1/machines/NAME/history?...` | [`HistoryInfo`] |
//! | `GET /v1/ledger?machine=NAME&since=UNIX_MS&until=UNIX_MS&limit=N` | [`LedgerInfo`] |
//! | `GET /v1/rules` | [`RulesInfo`] |
//! | `POST /v1/rules` (a rule) | `{}` |
//! | `DELETE /v1/rules/NAME` | `{}` |
//! | `POST /v1/labels` [`LabelRequest`] | all labels of that node or machine |
//! | `POST /v1/tokens` [`TokenRequest`] | [`Token`] |
//!
//! Errors are [`Problem`]s with status 4xx for what the user can mend and 5xx
//! for what they cannot.

#![forbid(unsafe_code)]

mod balance;
mod client;
mod event;
mod history;

pub use balance::{
    BalanceInfo, DrainInfo, DrainRequest, DrainState, LEDGER_DEFAULT, LEDGER_MAX, LabelRequest,
    LedgerInfo, LeftBehind, NodeLoad, PeerTraffic, PlanGoal, PlanInfo, PlanLine, PlanRequest,
    PlanStep, PlannedMachine, PolicyRequest, RulesInfo, WhyNot,
};
pub use client::{Client, ClientError, Lines, path};
pub use event::{EVENTS_DEFAULT, EVENTS_MAX, Event, EventKind, EventLine, Silence};
pub use history::{HISTORY_DEFAULT, HISTORY_MAX, HistoryInfo, HistoryPoint, history_in_points};

use keel_machine::cgroup::GroupUsage;
use keel_machine::moves::prediction::Prediction;
use keel_machine::moves::{MoveReport, Progress};
use keel_machine::restart::Restart;
use keel_machine::spec::{BalanceBy, Balancing, CheckpointPlan, Spawn};
pub use keel_wasi::FileStat;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// An error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What happened, to which object, and what to do next.
    pub error: String,
}

/// The cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Its id.
    pub cluster: String,
    /// The node that answered.
    pub node: String,
    /// Nodes that hold the store.
    pub voters: Vec<String>,
    /// Whether the store answered just now.
    pub store: String,
    /// Nodes, and how many of them are alive.
    pub nodes: u32,
    /// Nodes that renew their lease.
    pub nodes_alive: u32,
    /// Machines, ended ones included.
    pub machines: u32,
    /// Machines that run.
    pub machines_running: u32,
    /// Version of the node that answered.
    pub version: String,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Where other nodes reach it.
    pub address: String,
    /// Whether it renews its lease.
    pub alive: bool,
    /// Whether it is being emptied: nothing is placed there.
    #[serde(default)]
    pub draining: bool,
    /// Whether it holds the store.
    pub voter: bool,
    /// Processors.
    pub cpus: u32,
    /// Memory of the host, in bytes.
    pub memory_bytes: u64,
    /// Machines in its schedule.
    pub machines: u32,
    /// What its host lacks, and what follows.
    pub lacks: Vec<String>,
    /// Version of its agent.
    pub version: String,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Its name.
    pub name: String,
    /// Its owner: the node that runs it, or ran it last.
    pub node: String,
    /// `starting`, `running`, `paused` (it waits for room on a disk, or a store),
    /// `arriving`, `exited (N)`, `trapped`, `stopped`, `failed`.
    pub status: String,
    /// What its worker does before it runs; only while it starts, once it has a worker.
    #[serde(default)]
    pub phase: Option<StartPhaseInfo>,
    /// When it first ran, in milliseconds since 1970-01-01 UTC; 0 if it never did.
    #[serde(default)]
    pub started_unix_ms: u64,
    /// Exit code, once it exited.
    pub exit_code: Option<u32>,
    /// Why it trapped, failed or is paused.
    pub message: Option<String>,
    /// Raised by each change of owner.
    pub epoch: String,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// Hash of its module.
    pub module: String,
    /// Nodes that have its compiled code: it can go there at once. Only where one machine
    /// is asked about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ready_on: Vec<String>,
    /// Program name and arguments.
    pub args: Vec<String>,
    /// Names of the variables in its environment.
    #[serde(default)]
    pub env_names: Vec<String>,
    /// Directories that it may reach.
    #[serde(default)]
    pub volumes: Vec<VolumeInfo>,
    /// Limit of each memory in bytes.
    pub memory_limit_bytes: u64,
    /// Limit of its threads.
    #[serde(default)]
    pub threads_max: u32,
    /// Limit of its output, in bytes a second.
    #[serde(default)]
    pub output_bytes_per_s: u64,
    /// Whether it is removed when it ends.
    #[serde(default)]
    pub remove_at_end: bool,
    /// The checkpoint that it was made of, in words.
    #[serde(default)]
    pub created_from: Option<String>,
    /// Limit of its CPU time, in thousandths of a core.
    #[serde(default)]
    pub cpu_limit_millis: Option<u32>,
    /// When it is started again after its end.
    #[serde(default)]
    pub restart: Restart,
    /// Checkpoints that are made by themselves.
    #[serde(default)]
    pub checkpoints: Option<CheckpointPlan>,
    /// What balancing makes of it.
    #[serde(default)]
    pub balancing: Balancing,
    /// Restarts since it last ran for long.
    #[serde(default)]
    pub restarts: u32,
    /// Since when it has its status, in milliseconds since 1970-01-01 UTC.
    #[serde(default)]
    pub since_unix_ms: u64,
    /// Bytes of memory that it has; only while it runs.
    pub memory_bytes: Option<u64>,
    /// Threads that it has; only while it runs.
    pub threads: Option<u32>,
    /// CPU time of its worker on this node, in microseconds.
    pub cpu_micros: Option<u64>,
    /// Its worker's process.
    pub pid: Option<u32>,
    /// Bytes of output that it wrote (with 5 for each piece, and times in between),
    /// wherever it was;
    /// only while it runs.
    #[serde(default)]
    pub output_bytes: Option<u64>,
    /// What the kernel counts of its process; only while it runs, where it has a
    /// cgroup.
    #[serde(default)]
    pub cgroup: Option<GroupUsage>,
    /// Its last moves, oldest first.
    pub moves: Vec<MoveReport>,
}

impl MachineInfo {
    /// Whether it is to run: it has not ended.
    pub fn is_live(&self) -> bool {
        matches!(
            self.status.as_str(),
            // (`scheduled`: so a node of the version before calls one that starts.)
            "starting" | "scheduled" | "running" | "paused" | "arriving" | "filling" | "restarting"
        )
    }

    /// Whether it is still to run for the first time.
    pub fn is_starting(&self) -> bool {
        matches!(self.status.as_str(), "starting" | "scheduled")
    }

    /// Its status, and what is done before it runs: `starting (compile 40 %)`.
    pub fn status_line(&self) -> String {
        match &self.phase {
            Some(phase) => format!("{} ({})", self.status, phase.line()),
            None => self.status.clone(),
        }
    }
}

/// What is done before a machine runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartPhaseInfo {
    /// `prepare`, `compile` or `restore`.
    pub name: String,
    /// How much of it is done, 0 to 100, where that is known.
    pub percent: Option<u8>,
    /// Since it began.
    pub elapsed_ms: u64,
}

impl StartPhaseInfo {
    /// In words: `compile 40 %`, `restore 3 s`.
    pub fn line(&self) -> String {
        match self.percent {
            Some(percent) => format!("{} {percent} %", self.name),
            None => format!("{} {} s", self.name, self.elapsed_ms / 1000),
        }
    }
}

/// A module that the cluster keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uploaded {
    /// Its hash (BLAKE3, hex).
    pub module: String,
}

/// A directory for a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum VolumeRequest {
    /// A directory of the host, which every node that runs the machine sees.
    Host {
        /// Absolute path on the host.
        host: String,
        /// Its name for the guest.
        guest: String,
        /// Whether the guest may only read.
        #[serde(default)]
        read_only: bool,
    },
    /// The machine's own: it moves along and ends with the machine.
    Tmp {
        /// Bytes that its files may take.
        bytes: u64,
        /// Files, directories and links that there may be; as many as volumes
        /// of that size usually have, without.
        #[serde(default)]
        inodes: Option<u64>,
        /// Its name for the guest.
        guest: String,
    },
    /// One of the cluster's, which outlives the machine. It has one machine at a
    /// time.
    Cluster {
        /// Its name in the cluster.
        name: String,
        /// Its name for the guest.
        guest: String,
        /// Whether the guest may only read.
        #[serde(default)]
        read_only: bool,
    },
}

/// A volume of the cluster to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreateRequest {
    /// Its name.
    pub name: String,
    /// Where it is kept: a directory that all nodes see, or `s3://bucket/prefix`.
    pub at: String,
    /// Bytes that its files may take.
    pub bytes: u64,
    /// Files, directories and links that there may be; as many as volumes of that
    /// size usually have, without.
    #[serde(default)]
    pub inodes: Option<u64>,
}

/// A volume of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterVolumeInfo {
    /// Its name.
    pub name: String,
    /// Where it is kept.
    pub at: String,
    /// Bytes that its files may take.
    pub bytes_max: u64,
    /// Files, directories and links that there may be.
    pub inodes_max: u64,
    /// The machine that has it.
    pub machine: Option<String>,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// Whether it is being removed.
    pub removing: bool,
    /// What is in its place, where that was asked for and can be read.
    pub content: Option<VolumeContent>,
    /// Why its content cannot be read.
    pub damage: Option<String>,
}

/// What is kept of a volume of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeContent {
    /// Bytes of its files.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
    /// Number of the last segment of its log.
    pub segment: u64,
    /// Epoch of who wrote that.
    pub writer: String,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub written_unix_ms: u64,
    /// What is kept of it for checkpoints: MACHINE.CHECKPOINT.
    pub snapshots: Vec<String>,
}

/// A machine's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its name for the guest.
    pub guest: String,
    /// `tmp`, `cluster:NAME`, or the path on the host.
    pub kind: String,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// Bytes that its files may take.
    pub bytes_max: Option<u64>,
    /// Bytes that they take; only while it runs.
    pub bytes: Option<u64>,
    /// Files, directories and links; only while it runs.
    pub inodes: Option<u64>,
}

/// A machine to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Its name; one is made up without.
    #[serde(default)]
    pub name: Option<String>,
    /// The node to start it on; the one that is asked, without.
    #[serde(default)]
    pub on: Option<String>,
    /// Hash of an uploaded module.
    pub module: String,
    /// The program's name and arguments.
    pub args: Vec<String>,
    /// Its environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Its directories.
    #[serde(default)]
    pub volumes: Vec<VolumeRequest>,
    /// Limit of each of its memories, in bytes.
    pub memory_bytes: u64,
    /// Limit of its threads.
    pub threads_max: u32,
    /// Limit of its CPU time (`cpu.limit`), in thousandths of a core.
    #[serde(default)]
    pub cpu_limit_millis: Option<u32>,
    /// Bytes of output a second.
    pub output_bytes_per_s: u64,
    /// Whether it is removed when it ends.
    #[serde(default)]
    pub remove_at_end: bool,
    /// When it is started again after its end.
    #[serde(default)]
    pub restart: Restart,
    /// Checkpoints that are made by themselves.
    #[serde(default)]
    pub checkpoints: Option<CheckpointPlan>,
    /// What balancing makes of it.
    #[serde(default, deserialize_with = "strict_balancing")]
    pub balancing: Balancing,
}

/// Settings of a user: one that is not known is refused. (Those of a record may be of a
/// newer node, and are ignored where they are not known.)
fn strict_balancing<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Balancing, D::Error> {
    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    struct Strict {
        by: BalanceBy,
        cpu_target_millis: Option<u32>,
        memory_target_bytes: Option<u64>,
        io_target_bytes_per_s: Option<u64>,
        parts_max: Option<u32>,
        spawn: Spawn,
        part_memory_bytes: Option<u64>,
    }
    let strict = Strict::deserialize(from)?;
    Ok(Balancing {
        by: strict.by,
        cpu_target_millis: strict.cpu_target_millis,
        memory_target_bytes: strict.memory_target_bytes,
        io_target_bytes_per_s: strict.io_target_bytes_per_s,
        parts_max: strict.parts_max,
        spawn: strict.spawn,
        part_memory_bytes: strict.part_memory_bytes,
    })
}

/// What would change of a machine if it were as a request says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDiff {
    /// The node that runs it, or ran it last; none if there is no such machine.
    pub node: Option<String>,
    /// Whether it is to run: it has not ended.
    pub live: bool,
    /// What differs; not that it was moved.
    pub changes: Vec<FieldChange>,
}

/// One thing that would change of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldChange {
    /// What: an option of `keel run`, with a name behind it where there are several.
    pub field: String,
    /// As it is.
    pub old: String,
    /// As it would be.
    pub new: String,
    /// Whether it can be changed while the machine runs (`set`).
    pub live: bool,
}

/// Another name for a file in a machine's volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenameRequest {
    /// Its path for the guest.
    pub from: String,
    /// Its new one, in the same volume; a file that has it is replaced.
    pub to: String,
}

/// A place in a machine's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOffset {
    /// What `from` of a request for the log says to begin there.
    pub offset: u64,
}

/// What is to change of a machine, while it runs; what is left out stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// Limit of each of its memories, in bytes.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Limit of its CPU time (`cpu.limit`), in thousandths of a core; 0 for none.
    #[serde(default)]
    pub cpu_limit_millis: Option<u32>,
    /// When it is started again after its end.
    #[serde(default)]
    pub restart: Option<Restart>,
    /// Checkpoints that are made by themselves.
    #[serde(default)]
    pub checkpoints: Option<CheckpointChange>,
    /// Which of its loads counts.
    #[serde(default)]
    pub balance: Option<BalanceBy>,
    /// `cpu.target`, in thousandths of a core of the reference speed; 0 for none.
    #[serde(default)]
    pub cpu_target_millis: Option<u32>,
    /// `memory.target`, in bytes; 0 for none.
    #[serde(default)]
    pub memory_target_bytes: Option<u64>,
    /// `io.target`, in bytes a second; 0 for none.
    #[serde(default)]
    pub io_target_bytes_per_s: Option<u64>,
    /// Parts that balancing may give it (`max_parts`); 0 for none.
    #[serde(default)]
    pub parts_max: Option<u32>,
    /// Where threads begin that it starts while it has parts.
    #[serde(default)]
    pub spawn: Option<Spawn>,
    /// `part.memory`, in bytes; 0 for none.
    #[serde(default)]
    pub part_memory_bytes: Option<u64>,
}

/// What is to become of the checkpoints that are made by themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointChange {
    /// No more are made; those that there are stay.
    None,
    /// They are made so.
    Plan(CheckpointPlan),
}

/// An order for a failpoint; only nodes that were built for tests take it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailpointRequest {
    /// Its name.
    pub name: String,
    /// `kill`, `stop`, `error` or `delay(MILLISECONDS)`, `@N` or `*` behind it;
    /// takes an order back without.
    #[serde(default)]
    pub order: Option<String>,
}

/// An answer without content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nothing {}

/// A checkpoint to make.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// URL of the place; the node's own folder without.
    #[serde(default)]
    pub to: Option<String>,
    /// Whether all of it is stored, whatever was stored before.
    #[serde(default)]
    pub full: bool,
    /// How many checkpoints of the machine are kept there; all without.
    #[serde(default)]
    pub keep: Option<u32>,
    /// Checkpoints that are not older are kept too, in seconds.
    #[serde(default)]
    pub keep_for_s: Option<u64>,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// The machine.
    pub machine: String,
    /// Its name; later ones are greater.
    pub id: String,
    /// Where it is.
    pub vault: String,
    /// The checkpoint that it stands on.
    pub parent: Option<String>,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// Bytes of pages in it.
    pub stored_bytes: u64,
    /// Downtime in microseconds; only when it is made.
    pub pause_micros: Option<u64>,
    /// How long all of it took, in microseconds; only when it is made.
    pub total_micros: Option<u64>,
    /// Older ones that were deleted.
    pub deleted: u32,
    /// Why it cannot be used.
    pub damage: Option<String>,
}

/// A machine to make of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// The machine that the checkpoint was made of.
    pub machine: String,
    /// Which; the newest that is whole without.
    #[serde(default)]
    pub id: Option<String>,
    /// URL of the place; the node's own folder without.
    #[serde(default)]
    pub from: Option<String>,
    /// Another name: the machine is then another one.
    #[serde(default)]
    pub name: Option<String>,
    /// The node to start it on; the one that is asked, without.
    #[serde(default)]
    pub on: Option<String>,
    /// Whether it runs before its memory is read: sooner, but damage is found only
    /// then, and ends it.
    #[serde(default)]
    pub warm: bool,
    /// Nodes of the parts that its memory comes to before it runs, as in
    /// [`SpanRequest::nodes`]; without, they are chosen where it is larger than its node.
    #[serde(default)]
    pub nodes: Vec<String>,
}

/// Parts that a machine is to have; of one that has some, those come and go that differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpanRequest {
    /// Their nodes. One that is the owner's is the home; further times it is named it has
    /// further parts.
    pub nodes: Vec<String>,
    /// Threads that it starts begin at the home, not where the fewest are.
    #[serde(default)]
    pub here: bool,
}

/// The parts of a machine, and its threads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartsInfo {
    /// All parts; the home has number 0 and is the only one of a machine on one node.
    pub parts: Vec<PartInfo>,
    /// Its threads.
    pub threads: Vec<ThreadInfo>,
    /// How often threads at the home waited for pages of other parts, by powers of two of
    /// microseconds: below 1, below 2, below 4, …
    #[serde(default)]
    pub waits: Vec<u64>,
    /// Downtime of the change, in microseconds; only after a change.
    #[serde(default)]
    pub downtime_micros: Option<u64>,
}

/// A part of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartInfo {
    /// Its number.
    pub part: u32,
    /// Its node.
    pub node: String,
    /// Threads that run there.
    pub threads: u32,
    /// What it has of the memory, as it told last; not known where it told nothing yet, or
    /// the machine is on one node.
    #[serde(default)]
    pub memory: Option<PartMemoryInfo>,
    /// For how long it has not answered what its home asked, in milliseconds, if it has not.
    #[serde(default)]
    pub silent_ms: Option<u64>,
}

impl PartInfo {
    /// Milliseconds without an answer from which on a part is said to be silent: before,
    /// its node may just be busy.
    pub const SILENT_MS: u64 = 2000;

    /// For how many seconds it is silent, if it is.
    pub fn silent_s(&self) -> Option<u64> {
        let silent = self.silent_ms.filter(|ms| *ms >= Self::SILENT_MS);
        silent.map(|ms| ms / 1000)
    }
}

/// What a part has of a machine's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartMemoryInfo {
    /// Bytes that are there, with copies of what others have.
    pub resident_bytes: u64,
    /// What it keeps at most, while others have room.
    pub limit_bytes: Option<u64>,
    /// Bytes that it gave away so far because they were too much.
    pub given_bytes: u64,
    /// Bytes of copies that it dropped for the same reason.
    pub dropped_bytes: u64,
}

/// A thread of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadInfo {
    /// Its number; the main one has 0.
    pub tid: u32,
    /// The part that it runs at.
    pub part: u32,
    /// The part's node.
    pub node: String,
    /// `running`, `waiting` (to be woken by another thread), `moving`.
    pub state: String,
    /// CPU time that it used at the part where it is, in microseconds.
    pub cpu_micros: Option<u64>,
    /// Microseconds that it stood at pages of other nodes, by the node that gave them.
    #[serde(default)]
    pub stalled_micros: BTreeMap<String, u64>,
    /// The object that it likes to be near, if it said so (`guests/evenkeel.h`).
    #[serde(default)]
    pub likes: Option<String>,
}

/// A piece of a machine's memory that the same parts hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectInfo {
    /// Its range ([`object_range_name`]).
    pub range: String,
    /// What the program calls it, if it does (`guests/evenkeel.h`); names of several objects
    /// that have these pages with commas between them, the largest first.
    pub name: Option<String>,
    /// Bytes, whole pages of 4 KiB.
    pub bytes: u64,
    /// The part that has it, or wrote it last.
    pub part: u32,
    /// That part's node.
    pub node: String,
    /// Nodes of parts that have copies to read.
    pub readers: Vec<String>,
    /// How often its pages changed hands so far: how hot it is between parts.
    pub exchanges: u64,
    /// How often threads waited for its pages in the last half minute to minute, of pages
    /// that they waited for more than once.
    #[serde(default)]
    pub waits: u64,
    /// Of those pages, those that parts used in turns, one of them writing.
    #[serde(default)]
    pub shared_pages: u32,
    /// Of these, those that several parts wrote, each other bytes than those that another one
    /// used, as far as is seen: false sharing. What does not share a page would not wait.
    #[serde(default)]
    pub falsely_shared_pages: u32,
    /// Bytes of it that the part that has it did not use for half a minute, by the regions of
    /// 64 KiB or more that are looked at.
    #[serde(default)]
    pub idle_bytes: u64,
    /// Node of the part that knows who has it, and is asked for it: it moves along with
    /// whole 64 KiB.
    pub directory: String,
}

/// What came of the move of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectMoved {
    /// Bytes that have been there: others may have fetched some of them back.
    pub bytes: u64,
}

/// How a range of a machine's memory is named: `0x10000-0x20000` from its first byte to
/// the one behind its last; `1:0x0-0x1000` of another memory than the first.
pub fn object_range_name(memory: u32, start: u64, bytes: u64) -> String {
    let range = format!("{start:#x}-{:#x}", start.saturating_add(bytes));
    match memory {
        0 => range,
        other => format!("{other}:{range}"),
    }
}

/// Memory, first byte and bytes of a range as [`object_range_name`] names it; `None` if it is
/// none, or empty.
pub fn object_range(name: &str) -> Option<(u32, u64, u64)> {
    let (memory, range) = match name.split_once(':') {
        Some((memory, range)) => (memory.parse().ok()?, range),
        None => (0, name),
    };
    let (start, end) = range.split_once('-')?;
    let byte = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let (start, end) = (byte(start)?, byte(end)?);
    let bytes = end.checked_sub(start).filter(|bytes| *bytes > 0)?;
    Some((memory, start, bytes))
}

/// Where a thread, or an object, is to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThreadMove {
    /// A node on which the machine has a part.
    pub to: String,
}

/// A move to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// The target node.
    pub to: String,
    /// Whether the machine goes first, and a part of its memory after it
    /// (post-copy): it stands still for less, but does not survive the loss of its
    /// source before all is there. A checkpoint is made first.
    #[serde(default)]
    pub post_copy: bool,
    /// Where that checkpoint goes; the node's own folder without.
    #[serde(default)]
    pub checkpoint_to: Option<String>,
    /// Which of the moves that wait for this node's links is next.
    #[serde(default)]
    pub urgency: Urgency,
    /// How long the machine may stand still, in milliseconds: with more than the
    /// usual few, a fast writer is slowed down less, or not at all, before.
    #[serde(default)]
    pub downtime_ms: Option<u32>,
}

impl MoveRequest {
    /// How long sending what is left may take then, in microseconds: freezing and
    /// the commit need some of the time.
    pub fn budget_micros(&self) -> Option<u64> {
        const BESIDE_MS: u32 = 3;
        let ms = self.downtime_ms?.saturating_sub(BESIDE_MS).max(1);
        Some(u64::from(ms) * 1000)
    }
}

/// What a move would be like; nothing was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DryRun {
    /// The machine.
    pub machine: String,
    /// Where it is.
    pub source: String,
    /// Where it would go.
    pub target: String,
    /// Why the target would not take it.
    pub refusal: Option<String>,
    /// Bytes of memory that it ever touched.
    pub memory_bytes: u64,
    /// Bytes in its own volumes.
    pub volume_bytes: u64,
    /// With memory first.
    pub pre_copy: Prediction,
    /// With the machine first.
    pub post_copy: Prediction,
}

/// How soon a move shall begin where many wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Urgency {
    /// After the others.
    Low,
    /// In turn.
    #[default]
    Normal,
    /// Before the others.
    High,
}

/// One line of a move's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveLine {
    /// It goes on.
    Progress(Progress),
    /// It is over.
    Report(Box<MoveReport>),
    /// It could not even begin.
    Error(String),
}

/// A token to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum TokenRequest {
    /// Lets one node join.
    Join {
        /// Seconds until it expires.
        ttl_s: u64,
    },
    /// Lets a user in.
    User {
        /// Who it is for.
        name: String,
        /// `viewer`, `operator` or `admin`.
        role: String,
    },
}

/// A token that was made. It is shown once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The token.
    pub token: String,
    /// Fingerprint of the cluster's certificate authority, for checking the
    /// server.
    pub authority: String,
}

#[cfg(test)]
mod object_tests {
    use super::*;

    #[test]
    fn ranges_of_memory_have_names() {
        for (memory, start, bytes) in [(0, 0x1_0000, 4096), (3, 0, 1), (0, 1 << 40, 1 << 20)] {
            let name = object_range_name(memory, start, bytes);
            assert_eq!(object_range(&name), Some((memory, start, bytes)), "{name}");
        }
        for wrong in [
            "",
            "0x0",
            "0-10",
            "0x10-0x10",
            "0x20-0x10",
            "x:0x0-0x1",
            "cache",
        ] {
            assert_eq!(object_range(wrong), None, "{wrong}");
        }
    }
}
