//! Requests, answers and events between an agent and its workers, over `keel-net`'s RPC
//! on a Unix socket that only this user can reach. These are the requests to workers of
//! every kind of machine; a kind may have more (`keel_kind_wasm::control`).

use crate::cgroup::GroupUsage;
use crate::checkpoint::{CheckpointId, CreatedCheckpoint, Origin, Retention};
use crate::link::{Hello, TargetEndpoint};
use crate::log::Log;
use crate::moves::{FillReport, Progress, Round};
use crate::spec::{Spec, Status};
use keel_cluster::{Epoch, MachineName};
use keel_net::{Bytes, Fingerprint, PinnedIdentity, RpcError, TlsError};
use keel_store::encoding;
use keel_wasi::FileStat;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Kinds of requests. 0x0420 to 0x043f belong to the kinds of machines.
pub mod kind {
    /// [`super::Start`] → `()`.
    pub const START: u16 = 0x0401;
    /// [`super::Receive`] → [`super::MoveEndpoint`].
    pub const RECEIVE: u16 = 0x0402;
    /// `()` → [`super::Report`].
    pub const REPORT: u16 = 0x0403;
    /// `()` → stream of [`super::State`], the present one first.
    pub const STATES: u16 = 0x0404;
    /// `()` → [`keel_net::Fingerprint`] of the certificate for the next move.
    pub const IDENTITY: u16 = 0x0405;
    /// [`super::Copy`] → stream of [`super::CopyEvent`].
    pub const COPY: u16 = 0x0406;
    /// `()` → [`super::Frozen`].
    pub const FREEZE: u16 = 0x0407;
    /// [`keel_cluster::Epoch`] → microseconds until the answer.
    pub const GO: u16 = 0x0408;
    /// [`keel_cluster::Epoch`] → `()`.
    pub const THAW: u16 = 0x0409;
    /// `String` → `()`: gives the move up.
    pub const ABORT: u16 = 0x040a;
    /// `()` → `()`: sends the memory that the target lacks (post-copy).
    pub const SERVE: u16 = 0x0411;
    /// `()` → `()`: ends the machine.
    pub const STOP: u16 = 0x040b;
    /// `()` → `()`: ends the worker.
    pub const FORGET: u16 = 0x040c;
    /// [`super::ReadLog`] → stream of [`super::LogChunk`].
    pub const LOG: u16 = 0x040d;
    /// `u64`, milliseconds since 1970-01-01 UTC → `u64`: offset of the first output
    /// written at that time or later.
    pub const LOG_SINCE: u16 = 0x0413;
    /// [`super::Execute`] → `i64`: starts a process in the machine; its number there.
    pub const EXECUTE: u16 = 0x0418;
    /// `i64` → `Option<`[`super::ExecutionEnd`]`>`: how such a process ended, if it has.
    pub const EXECUTED: u16 = 0x0419;
    /// `(`[`keel_cluster::Epoch`]`, `[`super::ConsoleInput`]`)` → `Option<u64>`: types it into the
    /// machine's console under this epoch; how much of its session was typed, if known here.
    pub const TYPE_IN: u16 = 0x041A;
    /// `()` → [`super::GuestSystem`].
    pub const SYSTEM: u16 = 0x041F;
    /// `(`[`keel_cluster::Epoch`]`, u64)` → stream of bytes: connects a viewer of this number with the
    /// display that the machine has under this epoch (RFB, RFC 6143).
    pub const VIEW: u16 = 0x041D;
    /// `(u64, Vec<u8>)` → `()`: what such a viewer sends, in order.
    pub const VIEWER_INPUT: u16 = 0x041E;
    /// `()` → `Option<`[`super::GuestMemory`]`>`: none if the machine has nothing to give back.
    pub const MEMORY: u16 = 0x041B;
    /// `u64` → `()`: how many bytes of memory the machine is to have given back to its node.
    pub const GIVE_BACK: u16 = 0x041C;
    /// `u64` → `()`: shows output up to this offset, which was held back.
    pub const SHOW_OUTPUT: u16 = 0x0417;
    /// [`super::FileRequest`] → [`super::FileDone`].
    pub const FILE: u16 = 0x0414;
    /// `(name, order)` → `()`: sets an injection at a failpoint, or removes it.
    pub const FAILPOINT: u16 = 0x04ff;
    /// [`super::Checkpoint`] → [`super::CheckpointReport`].
    pub const CHECKPOINT: u16 = 0x040e;
    /// `()` → [`crate::moves::prediction::Activity`]: samples the machine's use of
    /// memory.
    pub const ACTIVITY: u16 = 0x0415;
    /// [`super::Spec`] → `()`: changes the limits of memory and CPU, and other settings
    /// that matter to a worker. Nothing changes if it is refused.
    pub const SET: u16 = 0x0412;
    /// [`super::LeaseDeadline`] → `()`: the node's lease goes on, and the machine is the node's.
    pub const LEASE: u16 = 0x0416;
    /// `()` → `()`: gives up a checkpoint in progress, because a move takes precedence.
    pub const END_CHECKPOINT: u16 = 0x0430;
    /// `()` → stream of `Option<String>`: why the machine waits for disk space, the
    /// present state first.
    pub const STALLS: u16 = 0x0410;
}

/// When the lease of a node ends, for the machines that must not run without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseDeadline {
    /// On CLOCK_BOOTTIME, in microseconds.
    pub at_micros: u64,
    /// When the agent asked for the lease, on the same clock: an earlier one never replaces a later
    /// one. 0 from an agent of an older version, whose deadlines count in the order of arrival.
    #[serde(default)]
    pub sent_micros: u64,
}

/// State of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// It has no machine yet.
    Empty,
    /// Its machine runs under an epoch.
    Running { epoch: Epoch },
    /// Its machine runs, and part of its memory has not arrived (post-copy).
    Filling {
        epoch: Epoch,
        /// Whether the source is disconnected.
        source_lost: bool,
    },
    /// A machine that ran elsewhere is arriving.
    Receiving {
        /// The epoch of the offer.
        offered: Epoch,
    },
    /// The machine has arrived and waits for the commit.
    Prepared {
        /// The epoch of the offer.
        offered: Epoch,
        /// Whether the source is disconnected, so that only the store knows the outcome.
        source_lost: bool,
    },
    /// The machine ended.
    Ended {
        /// The epoch under which it ran.
        epoch: Epoch,
        status: Status,
    },
    /// What had arrived was dropped.
    Dropped { reason: String },
    /// Its machine is created, and its memory is read once it has parts.
    Held { epoch: Epoch },
}

/// The message for users of a worker that refuses a request.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Empty => f.write_str("its worker has no machine yet"),
            State::Running { epoch } => write!(f, "it runs under epoch {epoch}"),
            State::Filling {
                source_lost: false, ..
            } => f.write_str("some of its memory is still to come"),
            State::Filling { .. } => {
                f.write_str("some of its memory is still to come, from a node that is lost")
            }
            State::Receiving { .. } => f.write_str("it is still arriving"),
            State::Prepared { .. } => f.write_str("it has arrived, and does not run yet"),
            State::Ended { .. } => f.write_str("it has ended"),
            State::Dropped { reason } => write!(f, "it was dropped: {reason}"),
            State::Held { .. } => f.write_str("its parts are being created, it does not run yet"),
        }
    }
}

/// Starts a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    pub machine: MachineName,
    pub spec: Spec,
    pub from: StartFrom,
    pub epoch: Epoch,
    /// A first line for the machine's output, if any.
    pub notice: Option<String>,
}

/// The origin of a machine's state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum StartFrom {
    /// The machine runs from its beginning.
    Beginning {
        /// Whether it is held at its beginning until it has parts.
        is_held: bool,
    },
    /// A checkpoint.
    Checkpoint(Origin),
}

/// Makes a checkpoint of the machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Checkpoint {
    /// URL of the repository.
    pub repository: String,
    /// Whether to store all of it, whatever was stored before.
    pub full: bool,
    /// Which checkpoints of the machine are kept afterwards.
    #[serde(default)]
    pub keep: Retention,
    /// Ids increase through the machine's life, on whichever node it is and whatever clocks show: the
    /// new one is above this.
    #[serde(default)]
    pub after: Option<CheckpointId>,
}

/// A checkpoint that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointReport {
    pub id: CheckpointId,
    pub parent: Option<CheckpointId>,
    /// Bytes of pages in it.
    pub stored_bytes: u64,
    /// Downtime in microseconds.
    pub pause_micros: u64,
    /// Total time in microseconds.
    pub total_micros: u64,
    /// Number of older checkpoints deleted.
    pub deleted: u32,
    /// Where the machine's output ended at that instant.
    pub log_end: u64,
    /// Whether all output behind that is held back.
    #[serde(default)]
    pub holds_output: bool,
}

impl CheckpointReport {
    /// Of a checkpoint that was made; `deleted` older ones were deleted then.
    pub fn new(created: CreatedCheckpoint, log: &Log, deleted: u32) -> Self {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let manifest = created.manifest;
        CheckpointReport {
            stored_bytes: manifest.stored_bytes(),
            log_end: manifest.log_end,
            holds_output: log.held_from().is_some_and(|from| from <= manifest.log_end),
            id: manifest.id,
            parent: manifest.parent,
            pause_micros: micros(created.pause),
            total_micros: micros(created.total),
            deleted,
        }
    }
}

/// Receives a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Receive {
    pub machine: MachineName,
    pub spec: Spec,
    /// The program that runs (for `wasm`, the instrumented module), if its kind has one
    /// beside the machine's state.
    pub program: Option<PathBuf>,
    /// Its hash.
    pub program_hash: Option<[u8; 32]>,
    /// The epoch under which it runs at the source.
    pub offered: Epoch,
    /// Certificate of the source's worker.
    pub source: Fingerprint,
    /// Address to listen on (without port).
    pub address: String,
    /// Present size of each memory, in 64 KiB pages.
    pub memory_pages: Vec<u64>,
    /// Whether this is a post-copy move.
    pub post_copy: bool,
    /// Present size of its own volumes, in bytes.
    pub volume_bytes: u64,
}

/// Where a worker listens for the source.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MoveEndpoint {
    /// `address:port`.
    pub address: String,
    /// Its certificate.
    pub fingerprint: Fingerprint,
}

impl MoveEndpoint {
    /// The same, to connect to it.
    ///
    /// # Errors
    /// As [`TargetEndpoint::new`].
    pub fn target(
        &self,
        identity: &PinnedIdentity,
        hello: Hello,
    ) -> Result<TargetEndpoint, TlsError> {
        TargetEndpoint::new(self.address.clone(), self.fingerprint, identity, hello)
    }
}

/// Copies the machine to a target.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Copy {
    /// The endpoint of the target's worker.
    pub target: MoveEndpoint,
    /// Whether this is a post-copy move.
    pub post_copy: bool,
    /// Time limit for sending what is left at the freeze, in microseconds.
    pub budget_micros: u64,
}

/// An event during copying.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum CopyEvent {
    Progress(Progress),
    /// Few bytes are left.
    Converged {
        /// The rounds so far.
        rounds: Vec<Round>,
        /// Whether the guest was throttled.
        slowed: bool,
    },
    /// Copying failed; the machine runs here.
    Lost {
        reason: String,
    },
}

/// The machine is frozen, and the target is ready to resume it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Frozen {
    /// Time until all threads reached safepoints, in microseconds.
    pub freeze_micros: u64,
    /// Time for the last pages, in microseconds.
    pub last_pages_micros: u64,
    /// Bytes of the last pages.
    pub last_bytes: u64,
    /// Time for sending and restoring threads and WASI state, in microseconds.
    pub state_micros: u64,
    /// Bytes sent in total.
    pub bytes: u64,
}

/// The memory of a machine that can give some back to its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    /// What it was started with, in bytes.
    pub memory_bytes: u64,
    /// What its programs could use without swap space, in bytes; `None` if it has not told, or not
    /// since it gave something back or got it again.
    pub available_bytes: Option<u64>,
    /// What is not used for anything, in bytes; `None` likewise.
    pub free_bytes: Option<u64>,
    /// Whether it has told nothing new for long.
    pub is_silent: bool,
    /// What it has given back, in bytes.
    pub given_back_bytes: u64,
    /// What it was last asked to have given back, in bytes.
    pub asked_bytes: u64,
}

/// A worker's report on its machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub state: State,
    /// Process id of the worker.
    pub pid: u32,
    /// Whether the machine is moving away; it may be frozen.
    pub moving_away: bool,
    /// Whether that move is a post-copy move.
    pub post_copy: bool,
    /// Bytes that post-copy has yet to send.
    pub unsent_bytes: u64,
    /// The report of post-copy, once the target has everything.
    pub fill: Option<FillReport>,
    /// Hash of the instrumented module, which is stored in the agent's folder.
    pub program: Option<[u8; 32]>,
    /// Number of guest threads.
    pub threads: u32,
    /// Size of the guest's memories, in bytes.
    pub memory_bytes: u64,
    /// Size of each memory in 64 KiB pages.
    pub memory_pages: Vec<u64>,
    /// CPU time of the worker, in microseconds.
    pub cpu_micros: u64,
    /// First and last offset of the output that is shown.
    pub log: (u64, u64),
    /// Bytes of output that are held back.
    #[serde(default)]
    pub held_bytes: u64,
    /// The machine's own volumes.
    pub volumes: Vec<VolumeReport>,
    /// Why it waits for disk space, if it does.
    pub paused: Option<String>,
    /// Kernel counters of the worker's cgroup, if it has one.
    pub group: Option<GroupUsage>,
    /// Number of parts that the machine spans; 0 while it has one part.
    pub parts: u32,
    /// What remains to be done before the machine runs or can be received; `None`
    /// afterwards.
    pub start: Option<StartProgress>,
    /// Its memory as it was when that was asked for last, if it can give some back.
    #[serde(default)]
    pub guest_memory: Option<GuestMemory>,
}

/// Progress of a worker before its machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartProgress {
    pub phase: StartPhase,
    /// Time since this phase began.
    pub elapsed_ms: u64,
    /// Progress of the phase, 0 to 100, if known: when compiling, the share of functions.
    pub percent: Option<u8>,
}

/// A phase before a machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartPhase {
    /// The module is read and instrumented, volumes and memories are created.
    Prepare,
    /// The module is compiled.
    Compile,
    /// The machine is restored from a checkpoint.
    Restore,
}

impl StartPhase {
    /// Its name for users.
    pub fn word(self) -> &'static str {
        match self {
            StartPhase::Prepare => "prepare",
            StartPhase::Compile => "compile",
            StartPhase::Restore => "restore",
        }
    }
}

/// Use of one of a machine's own volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Its number in the spec.
    pub number: u32,
    /// Bytes of its files.
    pub bytes: u64,
    /// Number of files, directories and links.
    pub inodes: u64,
}

/// An operation on a file in a volume, one piece of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileOp {
    /// Attributes of a path.
    Stat { path: String },
    /// Reads bytes; fewer than requested at the end of the file.
    Read {
        path: String,
        offset: u64,
        bytes_max: u32,
    },
    /// Writes bytes.
    Write {
        path: String,
        offset: u64,
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
        /// Whether to create the file, which must not exist.
        begin: bool,
    },
    /// Renames a file within the volume.
    Rename {
        from: String,
        /// The new path; an existing file is replaced.
        to: String,
    },
    /// Removes a file.
    Remove { path: String },
}

impl FileOp {
    /// The path it applies to.
    pub fn path(&self) -> &str {
        match self {
            FileOp::Stat { path }
            | FileOp::Read { path, .. }
            | FileOp::Write { path, .. }
            | FileOp::Remove { path } => path,
            FileOp::Rename { from, .. } => from,
        }
    }

    /// Whether it changes the volume.
    pub fn writes(&self) -> bool {
        match self {
            FileOp::Stat { .. } | FileOp::Read { .. } => false,
            FileOp::Write { .. } | FileOp::Rename { .. } | FileOp::Remove { .. } => true,
        }
    }

    /// The same operation with mapped paths; `None` where a path cannot be mapped.
    pub fn map_paths(mut self, other: impl Fn(&str) -> Option<String>) -> Option<Self> {
        match &mut self {
            FileOp::Stat { path }
            | FileOp::Read { path, .. }
            | FileOp::Write { path, .. }
            | FileOp::Remove { path } => *path = other(path)?,
            FileOp::Rename { from, to } => {
                *from = other(from)?;
                *to = other(to)?;
            }
        }
        Some(self)
    }
}

/// An operation in one of a machine's own volumes; paths are relative to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRequest {
    /// Number of the volume in the spec.
    pub volume: u32,
    pub op: FileOp,
}

/// Result of an operation on a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileDone {
    /// The operation succeeded.
    Nothing,
    Stat(FileStat),
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Nothing was done: the machine is moving, or a checkpoint is being made.
    Busy,
}

/// A process to start in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Execute {
    /// A program, by its path there or by a name that is searched for there.
    pub command: String,
    pub arguments: Vec<String>,
    /// Its environment as `NAME=VALUE`; that of whoever starts it there if empty.
    pub environment: Vec<String>,
    /// Its standard input.
    #[serde(with = "serde_bytes")]
    pub input: Vec<u8>,
}

/// How a process in a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutionEnd {
    /// Its exit code, if it ended by itself.
    pub exit_code: Option<i32>,
    /// The number of the signal that ended it, if one did.
    pub signal: Option<i32>,
    /// Its standard output.
    #[serde(with = "serde_bytes")]
    pub output: Vec<u8>,
    /// Its standard error output.
    #[serde(with = "serde_bytes")]
    pub error_output: Vec<u8>,
    /// Whether it printed more than that.
    pub is_cut: bool,
}

/// What the guest agent of a machine tells of the system in it, as far as it knows it. Texts are the
/// guest's: whatever it says, they have no control characters, and are not long.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestSystem {
    pub host_name: Option<String>,
    /// Its name and version, as `Debian GNU/Linux 12 (bookworm)`.
    pub name: Option<String>,
    /// The release of its kernel.
    pub kernel: Option<String>,
    /// The names of its network interfaces, each with its addresses as `10.0.0.5/24`.
    pub interfaces: Vec<(String, Vec<String>)>,
    /// Processes that run or wait for a processor or a disk, on average over 1, 5 and 15 minutes.
    pub load: Option<[f64; 3]>,
    pub file_systems: Vec<GuestFileSystem>,
}

/// A file system that is mounted in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFileSystem {
    /// The directory in the machine at which it is mounted.
    pub mount_point: String,
    pub used_bytes: u64,
    /// What its users may use, in bytes.
    pub total_bytes: u64,
}

/// A piece of what is typed into a machine's console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleInput {
    /// Whose it is: each session types in an order of its own.
    pub session: u64,
    /// Bytes of the session before this piece.
    pub offset: u64,
    /// Whether it is not known if the piece was sent before: only a worker that knows the session
    /// types it.
    pub is_repeated: bool,
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// Reads output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReadLog {
    pub from: u64,
    /// Whether to wait for more until the machine ends or leaves.
    pub follow: bool,
    /// Whether to read output that is held back, too.
    #[serde(default)]
    pub whole: bool,
}

/// A piece of output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogChunk {
    /// Offset of its first byte.
    pub offset: u64,
    /// Bytes of the log; records may be cut. An empty piece marks the end; a stream
    /// without it was interrupted.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// A value within a message that is encoded by position, by postcard: of many rows of one
/// type the names of fields would be most of the bytes, and a message is bounded. Such a
/// type does not change without another kind of request.
#[derive(Debug, Clone, PartialEq)]
pub struct Positional<T>(pub T);

impl<T: Serialize> Serialize for Positional<T> {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let bytes = postcard::to_stdvec(&self.0).map_err(serde::ser::Error::custom)?;
        serde_bytes::serialize(&bytes, to)
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Positional<T> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let bytes: Vec<u8> = serde_bytes::deserialize(from)?;
        let value = postcard::from_bytes(&bytes).map_err(serde::de::Error::custom)?;
        Ok(Positional(value))
    }
}

/// Encodes a message as CBOR: fields are named, so an agent and a worker, or two agents, of
/// neighbouring versions understand each other. A field that is added has a default.
///
/// # Errors
/// [`RpcError::Refused`] if it cannot be encoded.
pub fn pack<T: Serialize>(value: &T) -> Result<Bytes, RpcError> {
    encoding::to_cbor(value, Vec::new())
        .map(Bytes::from)
        .map_err(RpcError::refused)
}

/// Decodes a message of [`pack`].
///
/// # Errors
/// [`RpcError::Refused`] if it is none.
pub fn unpack<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, RpcError> {
    encoding::from_cbor(bytes)
        .map_err(|error| RpcError::refused(format!("unreadable message: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages of workers of another version, in both directions.
    #[test]
    fn messages_of_neighbouring_versions_are_decoded() {
        #[derive(Serialize)]
        struct OlderCheckpoint {
            repository: String,
            full: bool,
        }
        #[derive(Deserialize)]
        struct OlderCopy {
            target: MoveEndpoint,
            post_copy: bool,
        }
        let older = OlderCheckpoint {
            repository: "/kept".into(),
            full: true,
        };
        let newer: Checkpoint = unpack(&pack(&older).unwrap()).unwrap();
        assert_eq!((newer.keep.newest, newer.keep.for_s), (None, None));
        assert_eq!(newer.after, None);
        let copy = Copy {
            target: MoveEndpoint {
                address: "127.0.0.1:1".into(),
                fingerprint: Fingerprint([7; 32]),
            },
            post_copy: true,
            budget_micros: 2000,
        };
        let older: OlderCopy = unpack(&pack(&copy).unwrap()).unwrap();
        assert_eq!(older.target.address, "127.0.0.1:1");
        assert!(older.post_copy);
        for bytes in [&[][..], &[0xff; 12], &[0xbf, 0x61]] {
            assert!(unpack::<Copy>(&Bytes::copy_from_slice(bytes)).is_err());
        }
    }
}
