//! What a user asks for, and what the store says of a machine.

use crate::checkpoint::{Origin, Retention};
use crate::moves::MoveReport;
use crate::past;
use crate::restart::Restart;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_wasm::runtime::Limits;
use serde::{Deserialize, Serialize};

/// Reports of moves that a record keeps; older ones are dropped.
pub const REPORTS_MAX: usize = 16;
/// Version of [`Record`]'s encoding.
const RECORD_VERSION: u8 = 7;

/// Where the files of a volume are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeKind {
    /// In a directory of the host. Every node that runs the machine must see
    /// the same directory under this path.
    Host {
        /// Absolute path on the host.
        path: String,
    },
    /// With the machine: it moves along, is in checkpoints, and ends with it.
    Tmp {
        /// Bytes that its files may take.
        bytes: u64,
        /// Files, directories and links that there may be.
        inodes: u64,
    },
    /// Kept by the cluster outside of nodes: it outlives the machine, which is the
    /// only one that has it.
    Cluster {
        /// Its name in the cluster.
        name: MachineName,
        /// Tells it from others that had its name.
        id: [u8; 16],
        /// The directory or store that it is in.
        place: String,
        /// Bytes that its files may take.
        bytes: u64,
        /// Files, directories and links that there may be.
        inodes: u64,
        /// The machine is its holder of this number.
        holding: u64,
    },
}

/// A directory that a machine may reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Where its files are.
    pub kind: VolumeKind,
    /// Its name for the guest.
    pub guest: String,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// What a user asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Hash (BLAKE3, hex) of the module as its author built it.
    pub module: String,
    /// The program's name and arguments.
    pub args: Vec<String>,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// Its directories.
    pub volumes: Vec<Volume>,
    /// Limit of each of its memories, in bytes.
    pub memory_bytes: u64,
    /// Limit of its threads.
    pub threads_max: u32,
    /// CPU time a second that its threads may use together, in thousandths of
    /// a core (`cpu.limit`).
    pub cpu_limit_millis: Option<u32>,
    /// Bytes of output a second that it may write; more waits.
    pub output_bytes_per_s: u64,
    /// Whether the machine is removed when it ends.
    pub remove_at_end: bool,
    /// When it is started again after its end.
    pub restart: Restart,
    /// Checkpoints that are made by themselves.
    pub checkpoints: Option<CheckpointPlan>,
    /// What balancing makes of it.
    pub balancing: Balancing,
}

/// What balancing makes of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Balancing {
    /// Which of its loads counts.
    pub by: BalanceBy,
    /// CPU demand that it promises (`cpu.target`), in thousandths of a core of the
    /// reference speed.
    pub cpu_target_millis: Option<u32>,
    /// Memory that it promises to occupy (`memory.target`), in bytes.
    pub memory_target_bytes: Option<u64>,
    /// Disk traffic that it promises (`io.target`), in bytes a second.
    pub io_target_bytes_per_s: Option<u64>,
    /// Parts that balancing may give it (`max_parts`), 2 to
    /// [`keel_wasm::coherence::PARTS_MAX`]; it spans no nodes by itself without.
    pub parts_max: Option<u32>,
    /// Where threads begin that it starts while it has parts.
    pub spawn: Spawn,
    /// Memory that one of its parts keeps at most (`part.memory`), in bytes, while others
    /// have room; all that is there without.
    pub part_memory_bytes: Option<u64>,
}

/// Where threads begin that a machine starts while it has parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spawn {
    /// Where the nodes' loads leave most room; it has parts from when its node is
    /// pressed by it.
    #[default]
    Auto,
    /// At the home; balancing moves them later.
    Here,
    /// Where the fewest of its threads are; it has parts from its beginning.
    Spread,
}

impl Spawn {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Spawn::Auto => "auto",
            Spawn::Here => "here",
            Spawn::Spread => "spread",
        }
    }
}

/// Which of a machine's loads counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceBy {
    /// As the cluster's policy says.
    #[default]
    Policy,
    /// What is measured.
    Actual,
    /// What it promises; what it promises nothing of is measured.
    Target,
    /// What is measured, and balancing leaves it where it is. Rules and drains do not.
    Off,
}

impl BalanceBy {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            BalanceBy::Policy => "policy",
            BalanceBy::Actual => "actual",
            BalanceBy::Target => "target",
            BalanceBy::Off => "off",
        }
    }
}

impl Balancing {
    /// In words; `None` if nothing was said.
    pub fn line(&self) -> Option<String> {
        let mut parts = Vec::new();
        if self.by != BalanceBy::Policy {
            parts.push(format!("by {}", self.by.word()));
        }
        if let Some(millis) = self.cpu_target_millis {
            parts.push(format!("cpu.target {}", f64::from(millis) / 1e3));
        }
        if let Some(bytes) = self.memory_target_bytes {
            parts.push(format!("memory.target {bytes} bytes"));
        }
        if let Some(rate) = self.io_target_bytes_per_s {
            parts.push(format!("io.target {rate} bytes/s"));
        }
        if let Some(most) = self.parts_max {
            parts.push(format!("up to {most} parts"));
        }
        if self.spawn != Spawn::Auto {
            parts.push(format!("threads begin {}", self.spawn.word()));
        }
        if let Some(bytes) = self.part_memory_bytes {
            parts.push(format!("part.memory {bytes} bytes"));
        }
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// Checkpoints that are made by themselves, while a machine runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointPlan {
    /// Seconds from one to the next.
    pub every_s: u64,
    /// Where they are kept; the folder of the node where it is then, without.
    pub to: Option<String>,
    /// Which are kept.
    pub retention: Retention,
}

impl CheckpointPlan {
    /// In words.
    pub fn line(&self) -> String {
        let mut kept = Vec::new();
        if let Some(newest) = self.retention.newest {
            kept.push(format!("the newest {newest}"));
        }
        if let Some(for_s) = self.retention.for_s {
            kept.push(format!("those of the last {}", time(for_s)));
        }
        if kept.is_empty() {
            kept.push("all".into());
        }
        format!(
            "every {}, to {}; kept: {}",
            time(self.every_s),
            self.to.as_deref().unwrap_or("the node's own folder"),
            kept.join(" and ")
        )
    }
}

/// A time in seconds, as people write it where that is exact.
fn time(s: u64) -> String {
    for (unit, seconds) in [("d", 86_400), ("h", 3600), ("m", 60)] {
        if s != 0 && s.is_multiple_of(seconds) {
            return format!("{}{unit}", s / seconds);
        }
    }
    format!("{s}s")
}

/// Where a machine is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// In its owner's schedule, not running yet.
    Scheduled,
    /// Running on its owner.
    Running,
    /// Ended by itself with a code.
    Exited {
        /// The program's exit code.
        code: u32,
    },
    /// Ended by a guest's fault.
    Trapped {
        /// What happened, with the guest's backtrace.
        message: String,
    },
    /// Ended by a command.
    Stopped,
    /// It could not start, or its worker was lost.
    Failed {
        /// Why, and what to do.
        reason: String,
    },
    /// Its owner by the commit of a move, but not known to run there yet: the
    /// source keeps its frozen copy, and may take it back.
    Arriving {
        /// The source.
        from: NodeName,
    },
    /// Running on its owner, while a part of its memory is still at the source of
    /// its last move: if that is lost, so is what it did since its checkpoint.
    Filling {
        /// The source.
        from: NodeName,
    },
    /// It ended by itself, and is to be started again.
    Restarting {
        /// How it ended.
        reason: String,
        /// Milliseconds since 1970-01-01 UTC.
        at_unix_ms: u64,
        /// Whether it goes on from its newest checkpoint, if there is one.
        from_checkpoint: bool,
    },
}

impl Status {
    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        !matches!(
            self,
            Status::Scheduled
                | Status::Running
                | Status::Arriving { .. }
                | Status::Filling { .. }
                | Status::Restarting { .. }
        )
    }

    /// How it ended, in a sentence; `None` if it has not.
    pub fn end(&self) -> Option<String> {
        match self {
            Status::Exited { code } => Some(format!("it exited with code {code}")),
            Status::Trapped { message } => Some(format!("it trapped: {message}")),
            Status::Stopped => Some("it was stopped".into()),
            Status::Failed { reason } => Some(reason.clone()),
            Status::Scheduled
            | Status::Running
            | Status::Arriving { .. }
            | Status::Filling { .. }
            | Status::Restarting { .. } => None,
        }
    }

    /// One word for tables.
    pub fn word(&self) -> String {
        match self {
            Status::Scheduled => "scheduled".into(),
            Status::Running => "running".into(),
            Status::Exited { code } => format!("exited ({code})"),
            Status::Trapped { .. } => "trapped".into(),
            Status::Stopped => "stopped".into(),
            Status::Failed { .. } => "failed".into(),
            Status::Arriving { .. } => "arriving".into(),
            Status::Filling { .. } => "filling".into(),
            Status::Restarting { .. } => "restarting".into(),
        }
    }
}

/// What the store says of a machine, at `machine/NAME`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: MachineName,
    /// What was asked for.
    pub spec: Spec,
    /// The node that runs it, or ran it last.
    pub owner: NodeName,
    /// Raised by each change of owner.
    pub epoch: Epoch,
    /// Where it is in its life.
    pub status: Status,
    /// Since when it is there, in milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: u64,
    /// Since when it has run without an end, over all moves, in milliseconds since
    /// 1970-01-01 UTC; 0 before it ran.
    pub started_unix_ms: u64,
    /// Whether a user wants it to end: it is not started again then.
    pub stop_wanted: bool,
    /// Restarts since it last ran for long.
    pub restarts: u32,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// Why it waits although it runs: where room on a disk is missing.
    pub paused: Option<String>,
    /// The checkpoint that it is made of, where it is.
    pub origin: Option<Origin>,
    /// Its last moves, oldest first.
    pub reports: Vec<MoveReport>,
}

impl Spec {
    /// Numbers of the volumes that are the machine's own.
    pub fn own_volumes(&self) -> Vec<u32> {
        let own = |(number, volume): (u32, &Volume)| match volume.kind {
            VolumeKind::Host { .. } | VolumeKind::Cluster { .. } => None,
            VolumeKind::Tmp { .. } => Some(number),
        };
        (0..).zip(&self.volumes).filter_map(own).collect()
    }

    /// The cluster's volumes that it has, with their numbers.
    pub fn cluster_volumes(&self) -> Vec<(u32, &VolumeKind)> {
        let kinds = (0..).zip(self.volumes.iter().map(|volume| &volume.kind));
        kinds
            .filter(|(_, kind)| matches!(kind, VolumeKind::Cluster { .. }))
            .collect()
    }

    /// What its runtime enforces.
    pub fn limits(&self) -> Limits {
        Limits {
            memory_bytes: self.memory_bytes,
            threads_max: self.threads_max,
            cpu_millis: self.cpu_limit_millis,
        }
    }
}

impl Record {
    /// One word for tables.
    pub fn word(&self) -> String {
        match (&self.status, &self.paused) {
            (Status::Running, Some(_)) => "paused".into(),
            (status, _) => status.word(),
        }
    }

    /// The form in which it is stored.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        postcard::to_extend(self, vec![RECORD_VERSION]).map_err(|error| error.to_string())
    }

    /// Reads the stored form; [`VersionedRecord::read`](crate::moves::ownership::VersionedRecord::read) gives
    /// its epoch, too.
    ///
    /// # Errors
    /// A sentence for a damaged record or one of another version.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        match bytes.split_first() {
            Some((&RECORD_VERSION, body)) => postcard::from_bytes(body)
                .map_err(|error| format!("a machine's record is damaged: {error}")),
            Some((&past::VERSION, body)) => past::decode(body)
                .map_err(|error| format!("a machine's record is damaged: {error}")),
            Some((version, _)) => Err(format!(
                "a machine's record is of version {version}, this reads versions {} and {RECORD_VERSION}: upgrade one version at a time",
                past::VERSION
            )),
            None => Err("a machine's record is empty".into()),
        }
    }

    /// Takes a status, from now on.
    pub fn enter(&mut self, status: Status, now_unix_ms: u64) {
        self.status = status;
        // Where it waited for room was another worker's matter.
        self.paused = None;
        self.since_unix_ms = now_unix_ms;
    }

    /// Adds a report, and drops the oldest beyond [`REPORTS_MAX`].
    pub fn add_report(&mut self, report: MoveReport) {
        self.reports.push(report);
        let excess = self.reports.len().saturating_sub(REPORTS_MAX);
        self.reports.drain(..excess);
    }
}
