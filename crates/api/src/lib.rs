//! The HTTP API: its types, and a client. JSON over HTTP/1.1, on a Unix socket
//! of the node or over TLS with a token.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`ClusterInfo`] |
//! | `GET /v1/nodes` | list of [`NodeInfo`] |
//! | `GET /v1/machines`, `GET /v1/machines/NAME` | (list of) [`MachineInfo`] |
//! | `GET /v1/schedule/NODE` | list of machine names |
//! | `PUT /v1/images` (the file that machines start from: a module) | [`Uploaded`] |
//! | `POST /v1/machines` [`RunRequest`] | [`MachineInfo`] |
//! | `POST /v1/machines/NAME/stop`, `/kill` | [`MachineInfo`] |
//! | `POST /v1/machines/NAME/move` [`MoveRequest`] | lines of [`MoveLine`] |
//! | `POST /v1/machines/NAME/dry-run` [`MoveRequest`] | [`DryRun`] |
//! | `POST /v1/machines/NAME/cancel-move` | `{}` |
//! | `POST /v1/machines/NAME/diff` [`RunRequest`] | [`MachineDiff`]; nothing is changed |
//! | `POST /v1/machines/NAME/set` [`SetRequest`] | [`MachineInfo`] |
//! | `DELETE /v1/machines/NAME` | `{}` |
//! | `GET /v1/machines/NAME/logs?from=N&follow=true` | the log, in the format of `keel_machine::log` |
//! | `GET /v1/machines/NAME/logs/offset?since=UNIX_MS` | [`LogOffset`] |
//! | `GET /v1/machines/NAME/files/stat?path=PATH` | [`FileStat`] |
//! | `GET /v1/machines/NAME/files?path=PATH&offset=N&length=N` | bytes, fewer at the end of the file |
//! | `PUT /v1/machines/NAME/files?path=PATH&offset=N&begin=true` (bytes; `begin` creates a file that must not exist) | `{}` |
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
//! Errors are [`Problem`]s with status 4xx for causes that the user can remove and 5xx for others.

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
use keel_machine::kind::{KindName, KindSpec};
use keel_machine::moves::prediction::Prediction;
use keel_machine::moves::{MoveReport, Progress};
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{BalanceBy, Balancing, CheckpointPlan, Spawn};
pub use keel_wasi::FileStat;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// An error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The error, its object, and the remedy.
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
    /// Whether the store answers.
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
    /// Its address for other nodes.
    pub address: String,
    /// Whether it renews its lease.
    pub alive: bool,
    /// Whether it is being drained: no machine is placed there.
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
    /// Deficiencies of its host, with their consequences.
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
    /// Progress of its worker before it runs; only while it starts, once it has a worker.
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
    /// Its kind.
    pub kind: KindName,
    /// What it runs, in one line: for `wasm`, the program and its arguments.
    pub program: String,
    /// What only its kind understands, without secrets: for `wasm`, the module's hash, the
    /// arguments, the names of the variables in its environment, and the limit of threads.
    pub kind_spec: serde_json::Value,
    /// Nodes that have its compiled code, to which it can move at once. Only in the answer about
    /// one machine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ready_on: Vec<String>,
    /// Its volumes.
    #[serde(default)]
    pub volumes: Vec<VolumeInfo>,
    /// Limit of each memory in bytes.
    pub memory_limit_bytes: u64,
    /// Limit of its output, in bytes a second.
    #[serde(default)]
    pub output_bytes_per_s: u64,
    /// Whether it is removed when it ends.
    #[serde(default)]
    pub remove_at_end: bool,
    /// The checkpoint that it was created from, as text.
    #[serde(default)]
    pub created_from: Option<String>,
    /// Limit of its CPU time, in thousandths of a core.
    #[serde(default)]
    pub cpu_limit_millis: Option<u32>,
    /// When it is restarted after its end.
    #[serde(default)]
    pub restart: Restart,
    /// Periodic checkpoints.
    #[serde(default)]
    pub checkpoints: Option<CheckpointPlan>,
    /// Its balancing policy.
    #[serde(default)]
    pub balancing: Balancing,
    /// Restarts since it last ran for long.
    #[serde(default)]
    pub restarts: u32,
    /// Start of its present status, in milliseconds since 1970-01-01 UTC.
    #[serde(default)]
    pub since_unix_ms: u64,
    /// Its bytes of memory; only while it runs.
    pub memory_bytes: Option<u64>,
    /// Its threads; only while it runs.
    pub threads: Option<u32>,
    /// CPU time of its worker on this node, in microseconds.
    pub cpu_micros: Option<u64>,
    /// Process id of its worker.
    pub pid: Option<u32>,
    /// Bytes of output that it wrote on all nodes, including record headers; only while it runs.
    #[serde(default)]
    pub output_bytes: Option<u64>,
    /// The kernel's counters of its process; only while it runs, if it has a cgroup.
    #[serde(default)]
    pub cgroup: Option<GroupUsage>,
    /// Its last moves, oldest first.
    pub moves: Vec<MoveReport>,
}

impl MachineInfo {
    /// Whether it is scheduled to run: it has not ended.
    pub fn is_live(&self) -> bool {
        matches!(
            self.status.as_str(),
            // A node of the previous version reports a starting machine as `scheduled`.
            "starting" | "scheduled" | "running" | "paused" | "arriving" | "filling" | "restarting"
        )
    }

    /// Whether it has still to run for the first time.
    pub fn is_starting(&self) -> bool {
        matches!(self.status.as_str(), "starting" | "scheduled")
    }

    /// Its status, with the progress of its start: `starting (compile 40 %)`.
    pub fn status_line(&self) -> String {
        match &self.phase {
            Some(phase) => format!("{} ({})", self.status, phase.line()),
            None => self.status.clone(),
        }
    }
}

/// Progress of a machine's start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartPhaseInfo {
    /// `prepare`, `compile` or `restore`.
    pub name: String,
    /// Progress, 0 to 100, if it is known.
    pub percent: Option<u8>,
    /// Milliseconds since it began.
    pub elapsed_ms: u64,
}

impl StartPhaseInfo {
    /// As text: `compile 40 %`, `restore 3 s`.
    pub fn line(&self) -> String {
        match self.percent {
            Some(percent) => format!("{} {percent} %", self.name),
            None => format!("{} {} s", self.name, self.elapsed_ms / 1000),
        }
    }
}

/// An image that the cluster stores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uploaded {
    /// Its hash (BLAKE3, hex).
    pub hash: String,
}

/// A volume for a machine.
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
    /// The machine's own, which moves and ends with it.
    Tmp {
        /// The most bytes of its files.
        bytes: u64,
        /// The most files, directories and links; by default the usual number for its size.
        #[serde(default)]
        inodes: Option<u64>,
        /// Its name for the guest.
        guest: String,
    },
    /// One of the cluster's, which outlives the machine. It has one holder at a time.
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

/// A volume of the cluster to create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreateRequest {
    /// Its name.
    pub name: String,
    /// Its place: a directory that all nodes see, or `s3://bucket/prefix`.
    pub at: String,
    /// The most bytes of its files.
    pub bytes: u64,
    /// The most files, directories and links; by default the usual number for its size.
    #[serde(default)]
    pub inodes: Option<u64>,
}

/// A volume of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterVolumeInfo {
    /// Its name.
    pub name: String,
    /// Its place.
    pub at: String,
    /// The most bytes of its files.
    pub bytes_max: u64,
    /// The most files, directories and links.
    pub inodes_max: u64,
    /// The machine that holds it.
    pub machine: Option<String>,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// Whether it is being removed.
    pub removing: bool,
    /// The content of its place, if it was requested and can be read.
    pub content: Option<VolumeContent>,
    /// Why its content cannot be read.
    pub damage: Option<String>,
}

/// The stored content of a volume of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeContent {
    /// Bytes of its files.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
    /// Number of the last segment of its log.
    pub segment: u64,
    /// Epoch of the writer of that segment.
    pub writer: String,
    /// Time of that segment, in milliseconds since 1970-01-01 UTC.
    pub written_unix_ms: u64,
    /// Snapshots kept for checkpoints: MACHINE.CHECKPOINT.
    pub snapshots: Vec<String>,
}

/// A machine's volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its name for the guest.
    pub guest: String,
    /// `tmp`, `cluster:NAME`, or the path on the host.
    pub kind: String,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// The most bytes of its files.
    pub bytes_max: Option<u64>,
    /// Present bytes of its files; only while it runs.
    pub bytes: Option<u64>,
    /// Files, directories and links; only while it runs.
    pub inodes: Option<u64>,
}

/// A machine to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Its name; generated if absent.
    #[serde(default)]
    pub name: Option<String>,
    /// The node to start it on; the one that is asked if absent.
    #[serde(default)]
    pub on: Option<String>,
    /// Its kind: `wasm`.
    pub kind: KindName,
    /// What only its kind understands: for `wasm`, the hash of an uploaded module
    /// (`module`), `args`, `env` and `threads_max`. Other fields are refused by name.
    pub kind_spec: KindSpec,
    /// Its volumes.
    #[serde(default)]
    pub volumes: Vec<VolumeRequest>,
    /// Limit of each of its memories, in bytes.
    pub memory_bytes: u64,
    /// Limit of its CPU time (`cpu.limit`), in thousandths of a core.
    #[serde(default)]
    pub cpu_limit_millis: Option<u32>,
    /// Bytes of output a second.
    pub output_bytes_per_s: u64,
    /// Whether it is removed when it ends.
    #[serde(default)]
    pub remove_at_end: bool,
    /// When it is restarted after its end.
    #[serde(default)]
    pub restart: Restart,
    /// Periodic checkpoints.
    #[serde(default)]
    pub checkpoints: Option<CheckpointPlan>,
    /// Its balancing policy.
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

/// The differences between a machine and a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDiff {
    /// The node that runs it, or ran it last; none if there is no such machine.
    pub node: Option<String>,
    /// Whether it is scheduled to run: it has not ended.
    pub live: bool,
    /// The differences; its node is not compared.
    pub changes: Vec<FieldChange>,
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldChange {
    /// An option of `keel run`, with a name if it has several values.
    pub field: String,
    /// The present value.
    pub old: String,
    /// The requested value.
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

/// A position in a machine's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOffset {
    /// The value of `from` in a request for the log.
    pub offset: u64,
}

/// Changes of a machine while it runs; absent fields stay.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// Limit of each of its memories, in bytes.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Limit of its CPU time (`cpu.limit`), in thousandths of a core; 0 for none.
    #[serde(default)]
    pub cpu_limit_millis: Option<u32>,
    /// When it is restarted after its end.
    #[serde(default)]
    pub restart: Option<Restart>,
    /// Periodic checkpoints.
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
    /// The most parts that balancing may give it (`max_parts`); 0 for none.
    #[serde(default)]
    pub parts_max: Option<u32>,
    /// Where threads start that it creates while it has parts.
    #[serde(default)]
    pub spawn: Option<Spawn>,
    /// `part.memory`, in bytes; 0 for none.
    #[serde(default)]
    pub part_memory_bytes: Option<u64>,
}

/// A change of the periodic checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointChange {
    /// No more are made; existing ones stay.
    None,
    /// They follow this schedule.
    Plan(CheckpointPlan),
}

/// Sets or clears a failpoint; only nodes that were built for tests support it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailpointRequest {
    /// Its name.
    pub name: String,
    /// `kill`, `stop`, `error` or `delay(MILLISECONDS)`, with an optional suffix `@N` or `*`;
    /// clears the failpoint if absent.
    #[serde(default)]
    pub order: Option<String>,
}

/// An answer without content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nothing {}

/// A checkpoint to create.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// URL of the place; the node's own folder if absent.
    #[serde(default)]
    pub to: Option<String>,
    /// Whether all pages are stored, including those of earlier checkpoints.
    #[serde(default)]
    pub full: bool,
    /// How many checkpoints of the machine are kept there; all if absent.
    #[serde(default)]
    pub keep: Option<u32>,
    /// Newer checkpoints than this are kept too, in seconds.
    #[serde(default)]
    pub keep_for_s: Option<u64>,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// The machine.
    pub machine: String,
    /// Its id; later ones are greater.
    pub id: String,
    /// Its place.
    pub vault: String,
    /// The checkpoint that it is an increment of.
    pub parent: Option<String>,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// Bytes of pages in it.
    pub stored_bytes: u64,
    /// Downtime in microseconds; only when it is made.
    pub pause_micros: Option<u64>,
    /// Duration in microseconds; only when it is made.
    pub total_micros: Option<u64>,
    /// Older ones that were deleted.
    pub deleted: u32,
    /// Why it cannot be used.
    pub damage: Option<String>,
}

/// A machine to create from a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// The machine of the checkpoint.
    pub machine: String,
    /// Its id; the newest complete one if absent.
    #[serde(default)]
    pub id: Option<String>,
    /// URL of the place; the node's own folder if absent.
    #[serde(default)]
    pub from: Option<String>,
    /// A new name creates a different machine.
    #[serde(default)]
    pub name: Option<String>,
    /// The node to start it on; the one that is asked if absent.
    #[serde(default)]
    pub on: Option<String>,
    /// Whether it runs before its memory is read: it starts sooner, but damage is detected only
    /// later, and ends it.
    #[serde(default)]
    pub warm: bool,
    /// Nodes of the parts that get its memory before it runs, as in [`SpanRequest::nodes`]; chosen
    /// if absent and it is larger than its node.
    #[serde(default)]
    pub nodes: Vec<String>,
}

/// The parts that a machine is to have; parts of a spanning machine are added and removed to
/// match.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpanRequest {
    /// Their nodes. The first occurrence of the owner is the home; each further one is a part.
    pub nodes: Vec<String>,
    /// Whether its new threads start at the home, not on the part with the fewest.
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
    /// Number of waits of the home's threads for pages of other parts, by powers of two of
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
    /// Its memory, as last reported; `None` if it has not reported yet, or the machine is on one
    /// node.
    #[serde(default)]
    pub memory: Option<PartMemoryInfo>,
    /// For how many milliseconds it has not answered its home, if it does not answer.
    #[serde(default)]
    pub silent_ms: Option<u64>,
}

impl PartInfo {
    /// Milliseconds without an answer after which a part counts as silent; below, its node may
    /// just be busy.
    pub const SILENT_MS: u64 = 2000;

    /// For how many seconds it has been silent, if it is.
    pub fn silent_s(&self) -> Option<u64> {
        let silent = self.silent_ms.filter(|ms| *ms >= Self::SILENT_MS);
        silent.map(|ms| ms / 1000)
    }
}

/// A part's share of a machine's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartMemoryInfo {
    /// Bytes that are present, including copies of pages of other parts.
    pub resident_bytes: u64,
    /// The most bytes that it keeps, while others have room.
    pub limit_bytes: Option<u64>,
    /// Total bytes that it has evicted for this limit.
    pub given_bytes: u64,
    /// Bytes of copies that it has dropped for the same reason.
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
    /// Microseconds that it waited for pages of other nodes, by the node that sent them.
    #[serde(default)]
    pub stalled_micros: BTreeMap<String, u64>,
    /// The object that it prefers to be near, if it has named one (`guests/evenkeel.h`).
    #[serde(default)]
    pub likes: Option<String>,
}

/// A range of a machine's memory that the same parts hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectInfo {
    /// Its range ([`object_range_name`]).
    pub range: String,
    /// Its name in the program, if any (`guests/evenkeel.h`); the names of several objects with
    /// these pages are separated by commas, the largest first.
    pub name: Option<String>,
    /// Bytes, whole pages of 4 KiB.
    pub bytes: u64,
    /// The part that holds it, or wrote it last.
    pub part: u32,
    /// That part's node.
    pub node: String,
    /// Nodes of parts that have copies to read.
    pub readers: Vec<String>,
    /// Number of transfers of its pages between parts.
    pub exchanges: u64,
    /// Number of waits of threads for its pages in the last half minute to minute, for pages with
    /// more than one wait.
    #[serde(default)]
    pub waits: u64,
    /// Of those pages, those that parts used alternately, with one of them writing.
    #[serde(default)]
    pub shared_pages: u32,
    /// Of these, those with false sharing: several parts wrote different bytes from those that the
    /// others used, as far as it is observed. In separate pages there would be no waits.
    #[serde(default)]
    pub falsely_shared_pages: u32,
    /// Bytes that the part which holds it did not use for half a minute, by scanned regions of 64
    /// KiB or more.
    #[serde(default)]
    pub idle_bytes: u64,
    /// Node of the part that has its directory, which moves with whole 64 KiB.
    pub directory: String,
}

/// The result of an object move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectMoved {
    /// Bytes that have moved: other parts may have fetched some of them back.
    pub bytes: u64,
}

/// The name of a range of a machine's memory: `0x10000-0x20000` from its first byte to the one
/// after its last; `1:0x0-0x1000` of another memory than the first.
pub fn object_range_name(memory: u32, start: u64, bytes: u64) -> String {
    let range = format!("{start:#x}-{:#x}", start.saturating_add(bytes));
    match memory {
        0 => range,
        other => format!("{other}:{range}"),
    }
}

/// Parses a name of [`object_range_name`] into memory, first byte and bytes; `None` if it is
/// invalid or empty.
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

/// The target of a thread or an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThreadMove {
    /// A node on which the machine has a part.
    pub to: String,
}

/// A move of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// The target node.
    pub to: String,
    /// Whether the move is post-copy: the downtime is shorter, but the machine does not survive
    /// the loss of its source before all memory has arrived. A checkpoint is made first.
    #[serde(default)]
    pub post_copy: bool,
    /// The place of that checkpoint; the node's own folder if absent.
    #[serde(default)]
    pub checkpoint_to: Option<String>,
    /// Priority among the moves that wait for this node's links.
    #[serde(default)]
    pub urgency: Urgency,
    /// The longest downtime, in milliseconds: a higher limit reduces the throttling of a machine
    /// with a high dirty rate.
    #[serde(default)]
    pub downtime_ms: Option<u32>,
}

impl MoveRequest {
    /// The part of the downtime limit for sending the residual dirty pages, in microseconds:
    /// freezing and the commit need the rest.
    pub fn budget_micros(&self) -> Option<u64> {
        const BESIDE_MS: u32 = 3;
        let ms = self.downtime_ms?.saturating_sub(BESIDE_MS).max(1);
        Some(u64::from(ms) * 1000)
    }
}

/// The prediction of a move; nothing is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DryRun {
    /// The machine.
    pub machine: String,
    /// Its node.
    pub source: String,
    /// The target.
    pub target: String,
    /// Why the target would refuse it.
    pub refusal: Option<String>,
    /// Bytes of memory that it has touched.
    pub memory_bytes: u64,
    /// Bytes in its own volumes.
    pub volume_bytes: u64,
    /// By pre-copy.
    pub pre_copy: Prediction,
    /// By post-copy.
    pub post_copy: Prediction,
}

/// Priority of a move in the queue.
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
    /// Progress.
    Progress(Progress),
    /// The move has ended.
    Report(Box<MoveReport>),
    /// The move could not start.
    Error(String),
}

/// A token to create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum TokenRequest {
    /// Lets one node join.
    Join {
        /// Seconds until it expires.
        ttl_s: u64,
    },
    /// Admits a user.
    User {
        /// Who it is for.
        name: String,
        /// `viewer`, `operator` or `admin`.
        role: String,
    },
}

/// A created token. It is shown once.
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
