//! The specification of a machine by its user, and its record in the store.

use crate::checkpoint::origin::Origin;
use crate::checkpoint::retention::Retention;
use crate::high_availability::HighAvailability;
use crate::kind::{KindName, KindSpec};
use crate::moves::MoveReport;
use crate::restart_policy::Restart;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_store::encoding;
use serde::{Deserialize, Serialize};

/// Reports of moves in a record; older ones are dropped.
pub const REPORTS_MAX: usize = 16;

/// Where the files of a volume are stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeKind {
    /// In a directory of the host. Every node that runs the machine must see the same
    /// directory under this path.
    Host {
        /// Absolute path on the host.
        path: String,
    },
    /// With the machine: the volume moves along, is part of checkpoints, and ends with
    /// it.
    Tmp {
        /// Limit of the size of its files, in bytes.
        bytes: u64,
        /// Limit of the number of files, directories and links.
        inodes: u64,
    },
    /// Outside of nodes: the volume outlives the machine, which uses it exclusively.
    Cluster {
        /// Its name in the cluster.
        name: MachineName,
        /// Unique id of the volume.
        id: [u8; 16],
        /// The directory or store with its objects.
        place: String,
        /// Limit of the size of its files, in bytes.
        bytes: u64,
        /// Limit of the number of files, directories and links.
        inodes: u64,
        /// Number of this machine in the sequence of its holders.
        holding: u64,
    },
}

/// A directory that a machine can access.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub kind: VolumeKind,
    /// Its path for the guest.
    pub guest: String,
    pub read_only: bool,
}

/// The specification of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// What runs the machine, and understands `kind_spec`.
    pub kind: KindName,
    /// What only its kind understands: for `wasm`, the module and its arguments.
    pub kind_spec: KindSpec,
    /// Its directories.
    pub volumes: Vec<Volume>,
    /// Limit of each of its memories, in bytes.
    pub memory_bytes: u64,
    /// Limit of CPU time per second of all its threads, in thousandths of a core
    /// (`cpu.limit`).
    pub cpu_limit_millis: Option<u32>,
    /// Limit of its output rate, in bytes per second; output beyond it blocks the guest.
    pub output_bytes_per_s: u64,
    /// Whether the machine is removed when it ends.
    pub remove_at_end: bool,
    /// Restart policy.
    pub restart: Restart,
    /// Automatic checkpoints.
    pub checkpoints: Option<CheckpointPlan>,
    /// How it is kept available when its node fails; it then has no other automatic checkpoints.
    pub ha: Option<HighAvailability>,
    /// Settings for load balancing.
    pub balancing: Balancing,
}

/// A machine's settings for load balancing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct Balancing {
    /// The load that counts.
    pub by: BalanceBy,
    /// Promised CPU demand (`cpu.target`), in thousandths of a core of the reference
    /// speed.
    pub cpu_target_millis: Option<u32>,
    /// Promised memory use (`memory.target`), in bytes.
    pub memory_target_bytes: Option<u64>,
    /// Promised disk traffic (`io.target`), in bytes per second.
    pub io_target_bytes_per_s: Option<u64>,
    /// The most parts that balancing may create (`max_parts`), from 2 on; without it
    /// balancing creates none.
    pub parts_max: Option<u32>,
    /// Where new threads begin while it has parts.
    pub spawn: Spawn,
    /// Memory limit of a part (`part.memory`), in bytes, which applies while others have
    /// room; no limit if absent.
    pub part_memory_bytes: Option<u64>,
}

/// Where the new threads of a machine with parts begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = ThreadSpawn)]
#[serde(rename_all = "kebab-case")]
pub enum Spawn {
    /// On the nodes with most room; the machine gets parts when it overloads its node.
    #[default]
    Auto,
    /// At the home; balancing moves them later.
    Here,
    /// Where the machine has fewest threads; it has parts from the start.
    Spread,
}

impl Spawn {
    /// Its name for users.
    pub fn word(self) -> &'static str {
        match self {
            Spawn::Auto => "auto",
            Spawn::Here => "here",
            Spawn::Spread => "spread",
        }
    }
}

/// The load of a machine that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceBy {
    /// According to the cluster's policy.
    #[default]
    Policy,
    /// The measured load.
    Actual,
    /// The promised load; resources without a promise are measured.
    Target,
    /// The measured load, and balancing does not move the machine. Rules and drains do.
    Off,
}

impl BalanceBy {
    /// Its name for users.
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
    /// One line for users; `None` for the defaults.
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

/// Automatic checkpoints of a running machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CheckpointPlan {
    /// Interval in seconds.
    pub every_s: u64,
    /// URL of the repository; without it, the node's own folder.
    pub to: Option<String>,
    /// Which checkpoints are kept.
    pub retention: Retention,
}

impl CheckpointPlan {
    /// One line for users.
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

/// A time in seconds, in the largest unit that is exact.
fn time(s: u64) -> String {
    for (unit, seconds) in [("d", 86_400), ("h", 3600), ("m", 60)] {
        if s != 0 && s.is_multiple_of(seconds) {
            return format!("{}{unit}", s / seconds);
        }
    }
    format!("{s}s")
}

/// State of a machine's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// In its owner's schedule, not running yet.
    Scheduled,
    /// Running on its owner.
    Running,
    /// Ended by itself with an exit code.
    Exited { code: u32 },
    /// Ended by a trap.
    Trapped {
        /// The trap, with the guest's backtrace.
        message: String,
    },
    /// Ended by a command.
    Stopped,
    /// It could not start, or its worker was lost.
    Failed {
        /// The cause and the remedy.
        reason: String,
    },
    /// The commit of a move made this node its owner, but it is not known to run there
    /// yet: the source keeps its frozen copy and may take it back.
    Arriving {
        /// The source.
        from: NodeName,
    },
    /// Running on its owner, while part of its memory is still at the source of its last
    /// move: if the source is lost, so is all that the machine did since its checkpoint.
    Filling {
        /// The source.
        from: NodeName,
    },
    /// It ended by itself and will be restarted.
    Restarting {
        reason: String,
        /// Milliseconds since 1970-01-01 UTC.
        at_unix_ms: u64,
        /// Whether it is restored from its newest checkpoint, if there is one.
        from_checkpoint: bool,
        /// Whether it ran on another node until then, which failed.
        #[serde(default)]
        elsewhere: bool,
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

    /// The cause of the end, as a sentence; `None` if it has not ended.
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

/// The record of a machine in the store, at `machine/NAME`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub name: MachineName,
    pub spec: Spec,
    /// The node that runs it, or ran it last.
    pub owner: NodeName,
    /// Incremented by each change of owner.
    pub epoch: Epoch,
    /// The cluster's incarnation when its store began anew with this record: the next epoch is in
    /// it, above all that were given since the content of the store was copied.
    #[serde(default)]
    pub incarnation: u32,
    pub status: Status,
    /// Time of the last status change, in milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: u64,
    /// Start of the present run, across moves, in milliseconds since 1970-01-01 UTC; 0
    /// before it ran.
    pub started_unix_ms: u64,
    /// Whether a user wants it to end: it is not restarted then.
    pub stop_wanted: bool,
    /// Whether what its last life left is on another node: its owner was given it when that node
    /// failed, and has not run it since.
    #[serde(default)]
    pub left_elsewhere: bool,
    /// Restarts since the last stable run.
    pub restarts: u32,
    /// How often it was given to another node because its own failed.
    #[serde(default)]
    pub failovers: u32,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// Why it waits for disk space, if it does.
    pub paused: Option<String>,
    /// The checkpoint that it was restored from.
    pub origin: Option<Origin>,
    /// Its last moves, oldest first.
    pub reports: Vec<MoveReport>,
}

impl Spec {
    /// Numbers of the machine's own volumes.
    pub fn own_volumes(&self) -> Vec<u32> {
        let own = |(number, volume): (u32, &Volume)| match volume.kind {
            VolumeKind::Host { .. } | VolumeKind::Cluster { .. } => None,
            VolumeKind::Tmp { .. } => Some(number),
        };
        (0..).zip(&self.volumes).filter_map(own).collect()
    }

    /// Its cluster volumes, with their numbers.
    pub fn cluster_volumes(&self) -> Vec<(u32, &VolumeKind)> {
        let kinds = (0..).zip(self.volumes.iter().map(|volume| &volume.kind));
        kinds
            .filter(|(_, kind)| matches!(kind, VolumeKind::Cluster { .. }))
            .collect()
    }
}

impl Record {
    /// The epoch that the next change of its owner, or its next life, has.
    pub fn next_epoch(&self) -> Epoch {
        self.epoch.in_incarnation(self.incarnation)
    }

    /// One word for tables.
    pub fn word(&self) -> String {
        match (&self.status, &self.paused) {
            (Status::Running, Some(_)) => "paused".into(),
            (status, _) => status.word(),
        }
    }

    /// The stored form.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        encoding::encode("a machine's record", self).map_err(|error| error.to_string())
    }

    /// Decodes the stored form;
    /// [`VersionedRecord::read`](crate::moves::ownership::VersionedRecord::read) also
    /// provides its epoch.
    ///
    /// # Errors
    /// A message for a damaged record or one of another version.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        encoding::decode("a machine's record", bytes).map_err(|error| error.to_string())
    }

    /// Sets the status.
    pub fn enter(&mut self, status: Status, now_unix_ms: u64) {
        let begins = matches!(
            status,
            Status::Running | Status::Arriving { .. } | Status::Filling { .. }
        );
        // (An older agent that gave it to another node does not say so itself.)
        let elsewhere = matches!(
            self.status,
            Status::Restarting {
                elsewhere: true,
                ..
            }
        );
        self.left_elsewhere = (self.left_elsewhere || elsewhere) && !begins;
        self.status = status;
        // The former worker waited for disk space.
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

/// A spec within a form that does not name its fields, as the body of a checkpoint's
/// manifest: as CBOR, so that a field can be added to specs.
pub(crate) mod as_cbor {
    use super::Spec;
    use keel_store::encoding;
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(spec: &Spec, to: S) -> Result<S::Ok, S::Error> {
        let bytes = encoding::to_cbor(spec, Vec::new()).map_err(S::Error::custom)?;
        serde_bytes::serialize(&bytes, to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Spec, D::Error> {
        let bytes: Vec<u8> = serde_bytes::deserialize(from)?;
        encoding::from_cbor(&bytes).map_err(D::Error::custom)
    }
}
