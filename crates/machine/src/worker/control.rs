//! Requests, answers and events between an agent and its workers, over `keel-net`'s RPC
//! on a Unix socket that only this user can reach.

use crate::cgroup::GroupUsage;
use crate::checkpoint::{CheckpointId, Origin, Retention};
use crate::moves::{FillReport, Progress, Round};
use crate::span::{HomeState, PartAddress, PartMemory};
use crate::spec::{Spec, Status};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_net::{Bytes, Fingerprint, RpcError};
use keel_store::encoding;
use keel_wasi::FileStat;
use keel_wasm::coherence::{PartId, PartSet};
use keel_wasm::runtime::CpuUsage;
use keel_wasm::runtime::parts::SpawnPolicy;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Kinds of requests.
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
    /// [`super::ConnectParts`] → [`crate::span::PartAddress`]: prepares the worker as the
    /// home.
    pub const SPAN_READY: u16 = 0x0420;
    /// [`super::PrepareMember`] → [`crate::span::PartAddress`]: prepares an empty worker
    /// as a member.
    pub const PREPARE_MEMBER: u16 = 0x0421;
    /// [`super::Span`] → `u64`, downtime in microseconds: the machine spans.
    pub const SPAN: u16 = 0x0422;
    /// [`super::Join`] → `()`: the member starts.
    pub const JOIN: u16 = 0x0423;
    /// `()` → `u64`, downtime in microseconds: the machine is reduced to one part.
    pub const UNSPAN: u16 = 0x0424;
    /// `()` → `u64`, bytes read: reads the memory of a held machine to its parts, and
    /// starts it.
    pub const RESTORE_SPANNING: u16 = 0x042a;
    /// [`super::ConnectNewPart`] → [`crate::span::PartAddress`]: a part, the home or a
    /// member, prepares to connect to a new one.
    pub const CONNECT_NEW_PART: u16 = 0x042b;
    /// [`super::AddPart`] → `u64`, downtime in microseconds: adds a part. The home is
    /// told last.
    pub const ADD_PART: u16 = 0x042c;
    /// [`super::RemovePart`] → `u64`, downtime in microseconds: the home removes a
    /// member.
    pub const REMOVE_PART: u16 = 0x042d;
    /// [`super::CopyHome`] → stream of [`super::CopyEvent`]: as [`COPY`], for a machine
    /// that spans, whose other parts stay.
    pub const COPY_HOME: u16 = 0x042e;
    /// `()` → `Option<PartId>`: the part at this worker, if the machine moves, or was to
    /// move, to it.
    pub const IS_PART: u16 = 0x042f;
    /// `()` → `()`: gives up a checkpoint in progress, because a move takes precedence.
    pub const END_CHECKPOINT: u16 = 0x0430;
    /// `()` → [`super::PartsReport`].
    pub const PARTS: u16 = 0x0425;
    /// [`super::MoveThread`] → `()`.
    pub const MOVE_THREAD: u16 = 0x0426;
    /// `()` → list of [`super::ObjectReport`].
    pub const OBJECTS: u16 = 0x0427;
    /// [`super::MoveObject`] → `u64`, bytes that have arrived.
    pub const MOVE_OBJECT: u16 = 0x0428;
    /// `()` → [`crate::span::Heat`].
    pub const HEAT: u16 = 0x0431;
    /// `BTreeMap<PartId, f64>`, idle cores of each part: new threads begin where most are
    /// idle.
    pub const ROOM: u16 = 0x0429;
    /// `()` → stream of `Option<String>`: why the machine waits for disk space, the
    /// present state first.
    pub const STALLS: u16 = 0x0410;
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
    /// The module as its author built it; the machine runs from its start.
    Module(PathBuf),
    /// A checkpoint.
    Checkpoint(Origin),
    /// As [`StartFrom::Module`], but the machine is held at its start until it has parts.
    HeldModule(PathBuf),
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
}

/// Receives a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Receive {
    pub machine: MachineName,
    pub spec: Spec,
    /// The instrumented module.
    pub program: PathBuf,
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

/// Moves the home of a machine that spans to one of its parts, which listens for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyHome {
    pub copy: Copy,
    /// The part that becomes the home.
    pub successor: PartId,
    /// The part that the home's threads move to meanwhile.
    pub threads_to: PartId,
}

/// State of a home for its successor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HomeHandover {
    pub home_state: HomeState,
    /// The node of each part that stays, and of the successor under the home's number.
    pub nodes: BTreeMap<PartId, NodeName>,
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
    /// First and last offset of the output.
    pub log: (u64, u64),
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

/// Reads output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReadLog {
    pub from: u64,
    /// Whether to wait for more until the machine ends or leaves.
    pub follow: bool,
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

/// The parts of a machine that starts to span.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConnectParts {
    /// All parts, including this one.
    pub parts: PartSet,
    /// Address to listen on (without port).
    pub address: String,
}

/// Prepares a member.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PrepareMember {
    pub machine: MachineName,
    pub spec: Spec,
    /// The instrumented module.
    pub program: PathBuf,
    /// The part that this worker becomes.
    pub me: PartId,
    /// All parts, and the address to listen on.
    pub meet: ConnectParts,
    /// Room of its host in bytes, if less than the machine's limit.
    pub room_bytes: Option<u64>,
}

/// Addresses of all parts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Join {
    pub epoch: Epoch,
    pub places: BTreeMap<PartId, PartAddress>,
}

/// Prepares the connection between a part and a new one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConnectNewPart {
    pub machine: MachineName,
    /// The part that is to connect.
    pub me: PartId,
    /// The new part.
    pub new: PartId,
    /// Address to listen on.
    pub address: String,
}

/// Adds a new part to those that a part knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddPart {
    pub machine: MachineName,
    /// The part that is told.
    pub me: PartId,
    /// The new part.
    pub new: PartId,
    /// Addresses of both.
    pub join: Join,
    /// Node of the new part.
    pub node: NodeName,
}

/// Removes a member.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct RemovePart {
    pub part: PartId,
    /// The part to which its threads move.
    pub threads_to: PartId,
}

/// Makes the home's machine span.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Span {
    /// Addresses of all parts.
    pub join: Join,
    /// The node of each part.
    pub nodes: BTreeMap<PartId, NodeName>,
    /// Where new threads begin.
    pub spawning: SpawnPolicy,
    /// Room of the home's host in bytes, if less than the machine's limit.
    pub room_bytes: Option<u64>,
}

/// Moves a thread.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct MoveThread {
    pub tid: u32,
    pub to: PartId,
}

/// Moves a range of pages.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct MoveObject {
    pub memory: u32,
    /// Offset of its first byte.
    pub start: u64,
    pub bytes: u64,
    pub to: PartId,
}

/// A range of a machine's memory that the same parts hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectReport {
    /// Its name, if the guest gave it one: names of several objects on the same pages are
    /// separated by commas, the largest object first.
    pub name: Option<String>,
    pub memory: u32,
    /// Offset of its first byte.
    pub start: u64,
    pub bytes: u64,
    /// The exclusive holder, or the last writer.
    pub owner: PartId,
    /// Other parts with read copies.
    pub readers: PartSet,
    /// Number of ownership changes of its pages so far.
    pub exchanges: u64,
    /// The part that has its directory.
    pub directory: PartId,
}

impl ObjectReport {
    /// Whether it is, or belongs to, the object of that name.
    pub fn has_name(&self, name: &str) -> bool {
        let names = self.name.iter().flat_map(|names| names.split(','));
        names.into_iter().any(|it| it == name)
    }
}

/// Parts and threads of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartsReport {
    /// The node of each part; empty while it has one part.
    pub nodes: BTreeMap<PartId, NodeName>,
    pub threads: Vec<ThreadReport>,
    /// Waits of threads at the home for pages, by powers of two of microseconds.
    pub waits: Vec<u64>,
    /// Memory of each part, as reported last.
    pub memory: BTreeMap<PartId, PartMemory>,
    /// For how many milliseconds parts have not answered the home.
    #[serde(default)]
    pub silent_ms: BTreeMap<PartId, u64>,
}

/// A thread of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadReport {
    /// Its number; the main thread has 0.
    pub tid: u32,
    /// The part at which it runs.
    pub part: PartId,
    /// The part to which it is moving.
    pub moves_to: Option<PartId>,
    /// Whether it waits to be woken by another thread.
    pub waits: bool,
    /// Its use of cores at its part, as measured last.
    pub took: Option<CpuUsage>,
    /// The object that it prefers to be close to.
    pub likes: Option<String>,
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

    /// The state of a home comes from another node: any bytes are decoded or refused.
    #[test]
    fn any_bytes_are_decoded_or_refused() {
        use keel_wasm::coherence::{HeldRun, Holders, Holdings};
        let part = |number| PartId::new(number).unwrap();
        let held = |first, pages| HeldRun {
            memory: 0,
            first,
            pages,
            holders: Holders::Owner(part(1)),
        };
        let succession = HomeHandover {
            home_state: HomeState {
                successor: part(2),
                members: [part(1), part(3)].into_iter().collect(),
                memory_bytes: vec![1 << 20],
                held: Holdings {
                    rows: vec![held(0, 3), held(9, 1)],
                    exchanges: vec![1, 300, 7, 2],
                },
                threads: vec![crate::span::ThreadLocation {
                    tid: 4,
                    at: part(1),
                    goes_on: part(3),
                }],
                spawning: SpawnPolicy::Even,
                part_bytes: Some(20 << 20),
            },
            nodes: BTreeMap::from([(part(0), NodeName::new("a").unwrap())]),
        };
        let bytes = postcard::to_stdvec(&succession).unwrap();
        let again: HomeHandover = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(again.home_state, succession.home_state);
        let mut refused = 0;
        for end in 0..bytes.len() {
            refused += u32::from(postcard::from_bytes::<HomeHandover>(&bytes[..end]).is_err());
        }
        assert_eq!(refused as usize, bytes.len());
        for at in 0..bytes.len() {
            for value in 0..=u8::MAX {
                let mut other = bytes.clone();
                other[at] = value;
                // The result may be a different valid state.
                drop(postcard::from_bytes::<HomeHandover>(&other));
            }
        }
    }

    /// Fifty thousand pieces of memory fit into one message.
    #[test]
    fn rows_take_few_bytes() {
        let piece = |number: u64| ObjectReport {
            memory: 0,
            start: number << 16,
            bytes: 65536,
            owner: PartId::HOME,
            readers: PartSet::default(),
            exchanges: 0,
            directory: PartId::HOME,
            name: None,
        };
        let pieces: Vec<ObjectReport> = (0..50_000).map(piece).collect();
        let message = pack(&Positional(pieces)).unwrap();
        assert!(message.len() < 1 << 20, "{}", message.len());
        let Positional::<Vec<ObjectReport>>(again) = unpack(&message).unwrap();
        assert_eq!(again.len(), 50_000);
        assert!(unpack::<Positional<Vec<ObjectReport>>>(&message.slice(..9999)).is_err());
    }

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
