//! Machines: requests to start and change them, and what is reported about them. Their moves, parts,
//! checkpoints and volumes have files of their own.

use crate::volume::{VolumeInfo, VolumeRequest};
use keel_machine::cgroup::GroupUsage;
use keel_machine::high_availability::{Fence, HighAvailability, Protect};
use keel_machine::kind::{KindName, KindSpec};
use keel_machine::moves::MoveReport;
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{BalanceBy, Balancing, CheckpointPlan, Spawn};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
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
    #[schema(value_type = String)]
    pub kind: KindName,
    /// What it runs, in one line: for `wasm`, the program and its arguments.
    pub program: String,
    /// What only its kind understands, without secrets: for `wasm`, the module's hash, the
    /// arguments, the names of the variables in its environment, and the limit of threads.
    #[schema(value_type = Object)]
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
    /// How it is kept available when its node fails.
    #[serde(default)]
    pub ha: Option<HighAvailability>,
    /// The nodes that have the checkpoint from which it would be restarted.
    #[serde(default)]
    pub in_sync: Vec<String>,
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
    /// What the programs in its system could use without swap space, in bytes; `None` if the system
    /// does not tell.
    #[serde(default)]
    pub memory_available_bytes: Option<u64>,
    /// What its system has given back to its node as it was asked to, in bytes; `None` if it cannot.
    #[serde(default)]
    pub memory_given_back_bytes: Option<u64>,
    /// Its threads; only while it runs.
    pub threads: Option<u32>,
    /// CPU time of its worker on this node, in microseconds.
    pub cpu_micros: Option<u64>,
    /// Process id of its worker.
    pub pid: Option<u32>,
    /// Bytes of output that it wrote on all nodes, including record headers; only while it runs.
    #[serde(default)]
    pub output_bytes: Option<u64>,
    /// Bytes of output that wait until a checkpoint that covers them is on another node; only while
    /// it runs.
    #[serde(default)]
    pub held_output_bytes: Option<u64>,
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Uploaded {
    /// Its hash (BLAKE3, hex).
    pub hash: String,
}

/// A machine to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Its name; generated if absent.
    #[serde(default)]
    pub name: Option<String>,
    /// The node to start it on; the one that is asked if absent.
    #[serde(default)]
    pub on: Option<String>,
    /// Its kind: `wasm`.
    #[schema(value_type = String)]
    pub kind: KindName,
    /// What only its kind understands: for `wasm`, the hash of an uploaded module
    /// (`module`), `args`, `env` and `threads_max`. Other fields are refused by name.
    #[schema(value_type = Object)]
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
    /// How it is kept available when its node fails.
    #[serde(default, deserialize_with = "strict_ha")]
    #[schema(value_type = Option<StrictHighAvailability>)]
    pub ha: Option<HighAvailability>,
    /// Its balancing policy.
    #[serde(default, deserialize_with = "strict_balancing")]
    #[schema(value_type = StrictBalancing)]
    pub balancing: Balancing,
}

/// What keeps a machine available, as a user requests it. Unknown settings are refused.
#[derive(Deserialize, ToSchema)]
#[schema(as = HighAvailabilityRequest)]
#[serde(deny_unknown_fields)]
struct StrictHighAvailability {
    /// Interval of its checkpoints in milliseconds.
    checkpoint_every_ms: Option<u64>,
    /// Machines with a higher one are restarted first.
    priority: Option<u32>,
    /// How many other nodes have its newest checkpoint.
    replicas: Option<u32>,
    /// URL of a repository that all nodes reach, for its checkpoints.
    to: Option<String>,
    /// What a failure must not undo.
    #[serde(default)]
    protect: Protect,
    /// How a node that cannot be reached is kept from acting on `host:` volumes.
    #[serde(default)]
    fence: Fence,
}

impl From<StrictHighAvailability> for HighAvailability {
    fn from(strict: StrictHighAvailability) -> Self {
        let default = HighAvailability::default();
        HighAvailability {
            checkpoint_every_ms: strict
                .checkpoint_every_ms
                .unwrap_or(strict.protect.every_ms_default()),
            priority: strict.priority.unwrap_or(default.priority),
            replicas: strict.replicas.unwrap_or(default.replicas),
            to: strict.to,
            protect: strict.protect,
            fence: strict.fence,
        }
    }
}

fn strict_ha<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> Result<Option<HighAvailability>, D::Error> {
    let strict = Option::<StrictHighAvailability>::deserialize(from)?;
    Ok(strict.map(HighAvailability::from))
}

/// Settings of balancing, as a user requests them. Unknown ones are refused. (Those of a record may
/// be of a newer node, and are ignored where they are not known.)
#[derive(Deserialize, Serialize, Default, ToSchema)]
#[schema(as = BalancingRequest)]
#[serde(deny_unknown_fields, default)]
struct StrictBalancing {
    /// The load that counts.
    by: BalanceBy,
    /// `cpu.target`, in thousandths of a core of the reference speed.
    cpu_target_millis: Option<u32>,
    /// `memory.target`, in bytes.
    memory_target_bytes: Option<u64>,
    /// `io.target`, in bytes per second.
    io_target_bytes_per_s: Option<u64>,
    /// The most parts that balancing may create (`max_parts`).
    parts_max: Option<u32>,
    /// Where new threads begin while it has parts.
    spawn: Spawn,
    /// Memory limit of a part (`part.memory`), in bytes.
    part_memory_bytes: Option<u64>,
}

fn strict_balancing<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Balancing, D::Error> {
    let strict = StrictBalancing::deserialize(from)?;
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineDiff {
    /// The node that runs it, or ran it last; none if there is no such machine.
    pub node: Option<String>,
    /// Whether it is scheduled to run: it has not ended.
    pub live: bool,
    /// The differences; its node is not compared.
    pub changes: Vec<FieldChange>,
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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

/// A position in a machine's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogOffset {
    /// The value of `from` in a request for the log.
    pub offset: u64,
}

/// Changes of a machine while it runs; absent fields stay.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
    /// How it is kept available when its node fails.
    #[serde(default)]
    #[schema(value_type = Option<StrictHighAvailabilityChange>)]
    pub ha: Option<HighAvailabilityChange>,
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

/// A change of what keeps a machine available.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", from = "StrictHighAvailabilityChange")]
pub enum HighAvailabilityChange {
    /// It waits for its node when that fails.
    Off,
    /// It is restarted elsewhere, with these settings.
    On(HighAvailability),
}

/// A change of what keeps a machine available, as a user requests it.
#[derive(Deserialize, ToSchema)]
#[schema(as = HighAvailabilityChange)]
#[serde(rename_all = "kebab-case")]
enum StrictHighAvailabilityChange {
    /// It waits for its node when that fails.
    Off,
    /// It is restarted elsewhere, with these settings.
    On(StrictHighAvailability),
}

impl From<StrictHighAvailabilityChange> for HighAvailabilityChange {
    fn from(strict: StrictHighAvailabilityChange) -> Self {
        match strict {
            StrictHighAvailabilityChange::Off => HighAvailabilityChange::Off,
            StrictHighAvailabilityChange::On(settings) => {
                HighAvailabilityChange::On(settings.into())
            }
        }
    }
}

/// A change of the periodic checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointChange {
    /// No more are made; existing ones stay.
    None,
    /// They follow this schedule.
    Plan(CheckpointPlan),
}
