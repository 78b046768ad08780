//! Requests, answers and events between an agent and its workers, over
//! `keel-net`'s rpc on a Unix socket that only this user can reach.

use crate::cgroup::GroupUsage;
use crate::checkpoint::{CheckpointId, Origin, Retention};
use crate::moves::{FillReport, Progress, Round};
use crate::span::{HomeState, PartAddress, PartMemory};
use crate::spec::{Spec, Status};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_net::{Bytes, Fingerprint, RpcError};
use keel_wasi::FileStat;
use keel_wasm::coherence::{PartId, PartSet};
use keel_wasm::runtime::Took;
use keel_wasm::runtime::parts::Spawning;
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
    /// `u64`, milliseconds since 1970-01-01 UTC → `u64`: where the output begins that
    /// was written then or later.
    pub const LOG_SINCE: u16 = 0x0413;
    /// [`super::FileRequest`] → [`super::FileDone`].
    pub const FILE: u16 = 0x0414;
    /// `(name, order)` → `()`: an order for a failpoint, or none.
    #[cfg(feature = "failpoints")]
    pub const FAILPOINT: u16 = 0x04ff;
    /// [`super::Checkpoint`] → [`super::CheckpointReport`].
    pub const CHECKPOINT: u16 = 0x040e;
    /// `()` → [`crate::moves::prediction::Activity`]: what it does with its memory.
    pub const ACTIVITY: u16 = 0x0415;
    /// [`super::Spec`] → `()`: other limits of memory and CPU from now on, and what
    /// else of the spec matters here. Nothing changes where it is refused.
    pub const SET: u16 = 0x0412;
    /// [`super::ConnectParts`] → [`crate::span::PartAddress`]: the worker is to be the home.
    pub const SPAN_READY: u16 = 0x0420;
    /// [`super::PrepareMember`] → [`crate::span::PartAddress`]: an empty worker is to be a member.
    pub const PREPARE_MEMBER: u16 = 0x0421;
    /// [`super::Span`] → `u64`, microseconds that the machine stood still: it spans.
    pub const SPAN: u16 = 0x0422;
    /// [`super::Join`] → `()`: the member begins.
    pub const JOIN: u16 = 0x0423;
    /// `()` → `u64`, microseconds that the machine stood still: it is alone again.
    pub const UNSPAN: u16 = 0x0424;
    /// `()` → `u64`, bytes that came: the memory of a machine that is held comes to its
    /// parts, and it runs.
    pub const RESTORE_SPANNING: u16 = 0x042a;
    /// [`super::ConnectNewPart`] → [`crate::span::PartAddress`]: a part, the home or a member, is to meet
    /// one more.
    pub const CONNECT_NEW_PART: u16 = 0x042b;
    /// [`super::AddPart`] → `u64`, microseconds that the machine stood still: it is one of
    /// them. The home is the last that is told.
    pub const ADD_PART: u16 = 0x042c;
    /// [`super::RemovePart`] → `u64`, microseconds that the machine stood still: a member is
    /// none any more. Of the home.
    pub const REMOVE_PART: u16 = 0x042d;
    /// [`super::CopyHome`] → stream of [`super::CopyEvent`]: as [`COPY`], of a machine that
    /// spans, whose other parts stay.
    pub const COPY_HOME: u16 = 0x042e;
    /// `()` → `Option<PartId>`: the part of a machine that this worker is to which it moves,
    /// or was to move.
    pub const IS_PART: u16 = 0x042f;
    /// `()` → `()`: gives up a checkpoint in the making; a move comes first.
    pub const END_CHECKPOINT: u16 = 0x0430;
    /// `()` → [`super::PartsReport`].
    pub const PARTS: u16 = 0x0425;
    /// [`super::MoveThread`] → `()`.
    pub const MOVE_THREAD: u16 = 0x0426;
    /// `()` → list of [`super::ObjectReport`].
    pub const OBJECTS: u16 = 0x0427;
    /// [`super::MoveObject`] → `u64`, bytes that have been there.
    pub const MOVE_OBJECT: u16 = 0x0428;
    /// `()` → [`crate::span::Heat`].
    pub const HEAT: u16 = 0x0431;
    /// `BTreeMap<PartId, f64>`, cores that are free at each part: threads that it starts
    /// begin where most are.
    pub const ROOM: u16 = 0x0429;
    /// `()` → stream of `Option<String>`: where the machine waits for room on
    /// a disk, the present state first.
    pub const STALLS: u16 = 0x0410;
}

/// Where a worker is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// It has no machine yet.
    Empty,
    /// Its machine runs under an epoch.
    Running {
        /// The epoch.
        epoch: Epoch,
    },
    /// Its machine runs, and a part of its memory is still to come (post-copy).
    Filling {
        /// The epoch.
        epoch: Epoch,
        /// Whether the source is not connected.
        source_lost: bool,
    },
    /// A machine that ran under this epoch elsewhere arrives.
    Receiving {
        /// The epoch that it was offered under.
        offered: Epoch,
    },
    /// It has arrived; the word to go is awaited.
    Prepared {
        /// The epoch that it was offered under.
        offered: Epoch,
        /// Whether the source can no longer say how it goes on: only the store
        /// can.
        source_lost: bool,
    },
    /// The machine ended.
    Ended {
        /// The epoch under which it ran.
        epoch: Epoch,
        /// How.
        status: Status,
    },
    /// What arrived was dropped.
    Dropped {
        /// Why.
        reason: String,
    },
    /// Its machine is made, and its memory is to come when it has parts.
    Held {
        /// The epoch.
        epoch: Epoch,
    },
}

/// What is told to users of a worker that does not do what they ask.
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
            State::Prepared { .. } => f.write_str("it has arrived, and does not go on yet"),
            State::Ended { .. } => f.write_str("it has ended"),
            State::Dropped { reason } => write!(f, "it was dropped: {reason}"),
            State::Held { .. } => f.write_str("it gets parts, and does not run yet"),
        }
    }
}

/// Starts a machine from its beginning.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    /// Its name.
    pub machine: MachineName,
    /// What was asked for.
    #[serde(with = "crate::past::spec_for_others")]
    pub spec: Spec,
    /// What it is made of.
    pub from: StartFrom,
    /// Under this epoch.
    pub epoch: Epoch,
    /// What is said of it in its output first.
    pub notice: Option<String>,
}

/// What a machine is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum StartFrom {
    /// The module as its author built it, from its beginning.
    Module(PathBuf),
    /// A checkpoint.
    Checkpoint(Origin),
    /// As [`StartFrom::Module`], but it stands at its beginning, for it is to have parts
    /// first.
    HeldModule(PathBuf),
}

/// Makes a checkpoint of the machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Checkpoint {
    /// URL of the vault.
    pub vault: String,
    /// Whether all of it is stored, whatever was stored before.
    pub full: bool,
    /// Which checkpoints of the machine are kept then.
    pub keep: Retention,
}

/// A checkpoint that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// Its name.
    pub id: CheckpointId,
    /// The one that it stands on.
    pub parent: Option<CheckpointId>,
    /// Bytes of pages in it.
    pub stored_bytes: u64,
    /// How long the machine stood still, in microseconds.
    pub pause_micros: u64,
    /// How long all of it took, in microseconds.
    pub total_micros: u64,
    /// Older ones that were deleted.
    pub deleted: u32,
}

/// Receives a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Receive {
    /// Its name.
    pub machine: MachineName,
    /// What was asked for.
    #[serde(with = "crate::past::spec_for_others")]
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
    /// Whether memory comes after the machine (post-copy).
    pub post_copy: bool,
    /// Bytes that its own volumes take at present.
    pub volume_bytes: u64,
}

/// Where a worker waits for the source.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MoveEndpoint {
    /// `address:port`.
    pub address: String,
    /// Its certificate.
    pub fingerprint: Fingerprint,
}

/// Gives the machine to a target.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Copy {
    /// Where the target's worker listens.
    pub target: MoveEndpoint,
    /// Whether memory comes after the machine (post-copy).
    pub post_copy: bool,
    /// How long sending what is left may take while it stands still, in
    /// microseconds.
    pub budget_micros: u64,
}

/// The home of a machine that spans is to move: to one of its parts, which listens for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyHome {
    /// As of any machine.
    pub copy: Copy,
    /// The part that succeeds it.
    pub successor: PartId,
    /// The part at which the home's threads are meanwhile.
    pub threads_to: PartId,
}

/// What the home of a machine that spans leaves to its successor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HomeHandover {
    /// To the part.
    pub legacy: HomeState,
    /// The node of each part that stays, and of the successor under the home's number.
    pub nodes: BTreeMap<PartId, NodeName>,
}

/// How copying goes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum CopyEvent {
    /// It goes on.
    Progress(Progress),
    /// What is left is small enough.
    Converged {
        /// The rounds that it took.
        rounds: Vec<Round>,
        /// Whether the guest was slowed down.
        slowed: bool,
    },
    /// It cannot go on; the machine runs here.
    Lost {
        /// Why.
        reason: String,
    },
}

/// The machine is frozen and all of it is at the target, ready to go on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Frozen {
    /// Threads to safepoints, in microseconds.
    pub freeze_micros: u64,
    /// The last pages.
    pub last_pages_micros: u64,
    /// Bytes of them.
    pub last_bytes: u64,
    /// Threads and WASI state, sent and made ready.
    pub state_micros: u64,
    /// Bytes sent in all.
    pub bytes: u64,
}

/// What a worker says of its machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Where it is.
    pub state: State,
    /// The worker's process.
    pub pid: u32,
    /// Whether it is giving its machine away: it may be frozen.
    pub giving_away: bool,
    /// Whether memory comes after the machine that it gives away.
    pub post_copy: bool,
    /// Bytes that are still to be sent behind it.
    pub unsent_bytes: u64,
    /// How that went, once the target has everything.
    pub fill: Option<FillReport>,
    /// Hash of the instrumented module; its file is in the agent's folder.
    pub program: Option<[u8; 32]>,
    /// Guest threads.
    pub threads: u32,
    /// Bytes of memory that the guest has.
    pub memory_bytes: u64,
    /// Size of each memory in 64 KiB pages.
    pub memory_pages: Vec<u64>,
    /// CPU time of the worker, in microseconds.
    pub cpu_micros: u64,
    /// First and last offset of the output.
    pub log: (u64, u64),
    /// The machine's own volumes.
    pub volumes: Vec<VolumeReport>,
    /// Where it waits for room on a disk.
    pub paused: Option<String>,
    /// What the kernel counts of the worker, if it has a cgroup.
    pub group: Option<GroupUsage>,
    /// Parts that the machine spans; 0 while it is alone.
    pub parts: u32,
    /// What is still to be done before the machine runs, or can be received; nothing
    /// from then on.
    pub start: Option<StartProgress>,
}

/// How far a worker is before its machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartProgress {
    /// What it does now.
    pub phase: StartPhase,
    /// Since this phase began.
    pub elapsed_ms: u64,
    /// How much of the phase is done, 0 to 100, where that is known: of compiling, the
    /// share of functions.
    pub percent: Option<u8>,
}

/// What is done before a machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartPhase {
    /// Its module is read and instrumented, its volumes and memories are made.
    Prepare,
    /// Its module is compiled.
    Compile,
    /// It is read from a checkpoint.
    Restore,
}

impl StartPhase {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            StartPhase::Prepare => "prepare",
            StartPhase::Compile => "compile",
            StartPhase::Restore => "restore",
        }
    }
}

/// What one of a machine's own volumes holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Its number in the spec.
    pub number: u32,
    /// Bytes of its files.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
}

/// Something to do with a file in a volume, in one piece.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileOp {
    /// What a path is.
    Stat {
        /// The path.
        path: String,
    },
    /// Reads bytes; fewer than asked for at the end of the file.
    Read {
        /// The file.
        path: String,
        /// From here.
        offset: u64,
        /// So many.
        bytes_max: u32,
    },
    /// Writes bytes.
    Write {
        /// The file.
        path: String,
        /// To here.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
        /// Whether the file is made, which then must not be there.
        begin: bool,
    },
    /// Gives a file another name in the same volume.
    Rename {
        /// Its name.
        from: String,
        /// Its new one; a file that has it is replaced.
        to: String,
    },
    /// Removes a file.
    Remove {
        /// The file.
        path: String,
    },
}

impl FileOp {
    /// The path that it is about.
    pub fn path(&self) -> &str {
        match self {
            FileOp::Stat { path }
            | FileOp::Read { path, .. }
            | FileOp::Write { path, .. }
            | FileOp::Remove { path } => path,
            FileOp::Rename { from, .. } => from,
        }
    }

    /// Whether it changes anything.
    pub fn writes(&self) -> bool {
        match self {
            FileOp::Stat { .. } | FileOp::Read { .. } => false,
            FileOp::Write { .. } | FileOp::Rename { .. } | FileOp::Remove { .. } => true,
        }
    }

    /// The same with other paths; `None` where one has none.
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

/// The same, in one of a machine's own volumes; paths are relative to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRequest {
    /// Number of the volume in the spec.
    pub volume: u32,
    /// What to do.
    pub op: FileOp,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileDone {
    /// It is done.
    Nothing,
    /// What the path is.
    Stat(FileStat),
    /// The bytes.
    Bytes(Vec<u8>),
    /// Nothing was done: the machine is moving, or being kept.
    Busy,
}

/// Reads output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReadLog {
    /// From this offset.
    pub from: u64,
    /// Whether to wait for more until the machine ends or leaves.
    pub follow: bool,
}

/// Some output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogChunk {
    /// Offset of its first byte.
    pub offset: u64,
    /// Bytes of the log; records may be cut. None say that this was all there is: a stream
    /// that ends without broke off.
    pub bytes: Vec<u8>,
}

/// The parts that a machine is to have.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConnectParts {
    /// All, this one too.
    pub parts: PartSet,
    /// Address to listen on (without port).
    pub address: String,
}

/// What a member is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PrepareMember {
    /// The machine.
    pub machine: MachineName,
    /// What was asked for.
    #[serde(with = "crate::past::spec_for_others")]
    pub spec: Spec,
    /// The instrumented module.
    pub program: PathBuf,
    /// Which of its parts.
    pub me: PartId,
    /// All, and where to listen.
    pub meet: ConnectParts,
    /// What its host has room for, in bytes, if that is less than the machine may have.
    pub room_bytes: Option<u64>,
}

/// Who meets whom.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Join {
    /// Under this epoch.
    pub epoch: Epoch,
    /// Where each part is.
    pub places: BTreeMap<PartId, PartAddress>,
}

/// A part of a machine is to meet one more.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConnectNewPart {
    /// The machine.
    pub machine: MachineName,
    /// Who is to meet it.
    pub me: PartId,
    /// The one that comes.
    pub new: PartId,
    /// Where this one listens.
    pub address: String,
}

/// One more part is to be one of those that another one knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddPart {
    /// The machine.
    pub machine: MachineName,
    /// Who is to know it.
    pub me: PartId,
    /// The one that comes.
    pub new: PartId,
    /// Who meets whom.
    pub join: Join,
    /// Its node.
    pub node: NodeName,
}

/// A member is to be none any more.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct RemovePart {
    /// Which.
    pub part: PartId,
    /// Where its threads go on.
    pub threads_to: PartId,
}

/// The home begins to span.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Span {
    /// Who meets whom.
    pub join: Join,
    /// The node of each part.
    pub nodes: BTreeMap<PartId, NodeName>,
    /// Where threads begin that it starts.
    pub spawning: Spawning,
    /// What the home's host has room for, in bytes, if that is less than the machine may
    /// have.
    pub room_bytes: Option<u64>,
}

/// Where a thread is to go on.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct MoveThread {
    /// Which.
    pub tid: u32,
    /// The part.
    pub to: PartId,
}

/// A set of pages that is to be at another part.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct MoveObject {
    /// The machine's memory.
    pub memory: u32,
    /// Its first byte.
    pub start: u64,
    /// How many.
    pub bytes: u64,
    /// The part.
    pub to: PartId,
}

/// A piece of a machine's memory that the same parts hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectReport {
    /// What the guest calls it, if it does: names of several objects that have these pages
    /// with commas between them, the largest first.
    pub name: Option<String>,
    /// The machine's memory.
    pub memory: u32,
    /// Its first byte.
    pub start: u64,
    /// How many.
    pub bytes: u64,
    /// Who has it, or wrote it last.
    pub owner: PartId,
    /// Who else has copies to read.
    pub readers: PartSet,
    /// How often its pages changed hands so far.
    pub exchanges: u64,
    /// The part that knows who has it.
    pub directory: PartId,
}

impl ObjectReport {
    /// Whether it is, or belongs to, the object of that name.
    pub fn has_name(&self, name: &str) -> bool {
        let names = self.name.iter().flat_map(|names| names.split(','));
        names.into_iter().any(|it| it == name)
    }
}

/// What parts a machine has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartsReport {
    /// The node of each part; none while it is alone.
    pub nodes: BTreeMap<PartId, NodeName>,
    /// Its threads.
    pub threads: Vec<ThreadReport>,
    /// How often threads at the home waited for pages, by powers of two of microseconds.
    pub waits: Vec<u64>,
    /// What each part has of its memory, as it told last.
    pub memory: BTreeMap<PartId, PartMemory>,
    /// For how many milliseconds parts have not answered what the home asked.
    #[serde(default)]
    pub silent_ms: BTreeMap<PartId, u64>,
}

/// One thread of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadReport {
    /// Its number; the main one has 0.
    pub tid: u32,
    /// The part that it runs at.
    pub part: PartId,
    /// Where it goes next, if it moves.
    pub moves_to: Option<PartId>,
    /// It waits to be woken by another one.
    pub waits: bool,
    /// What it took of cores where it is, when that was looked at last.
    pub took: Option<Took>,
    /// The object that it likes to be near.
    pub likes: Option<String>,
}

/// Bytes that added fields have at the most when they are left out.
const ADDED_BYTES_MAX: usize = 64;

/// Encodes a message.
///
/// # Errors
/// [`RpcError::Refused`] if it cannot be encoded.
pub fn pack<T: Serialize>(value: &T) -> Result<Bytes, RpcError> {
    postcard::to_stdvec(value)
        .map(Bytes::from)
        .map_err(RpcError::refused)
}

/// Decodes a message, also one of the version before this: a worker lives on when its
/// agent is upgraded. Fields are only ever added at a message's end, and such as are
/// nothing, 0 or false when they are left out: those that an older writer did not
/// know are so then, those that a newer one added are not read.
///
/// # Errors
/// [`RpcError::Refused`] if it is none.
pub fn unpack<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, RpcError> {
    let decoded = match postcard::from_bytes(bytes) {
        Err(postcard::Error::DeserializeUnexpectedEnd) => {
            let mut longer = bytes.to_vec();
            longer.resize(bytes.len() + ADDED_BYTES_MAX, 0);
            postcard::from_bytes(&longer)
        }
        decoded => decoded,
    };
    decoded.map_err(|error| RpcError::refused(format!("unreadable message: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, serde::Deserialize, Debug, PartialEq)]
    struct Before {
        number: u64,
        text: String,
    }

    #[derive(Serialize, serde::Deserialize, Debug, PartialEq)]
    struct After {
        number: u64,
        text: String,
        more: Option<GroupUsage>,
        list: Vec<u32>,
        flag: bool,
    }

    /// What a home leaves comes from another node: whatever it is, it is read or refused.
    #[test]
    fn any_bytes_may_be_a_succession() {
        use keel_wasm::coherence::{Held, Holders, Holdings};
        let part = |number| PartId::new(number).unwrap();
        let held = |first, pages| Held {
            memory: 0,
            first,
            pages,
            holders: Holders::Owner(part(1)),
        };
        let succession = HomeHandover {
            legacy: HomeState {
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
                spawning: Spawning::Even,
                part_bytes: Some(20 << 20),
            },
            nodes: BTreeMap::from([(part(0), NodeName::new("a").unwrap())]),
        };
        let bytes = postcard::to_stdvec(&succession).unwrap();
        let again: HomeHandover = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(again.legacy, succession.legacy);
        let mut refused = 0;
        for end in 0..bytes.len() {
            refused += u32::from(postcard::from_bytes::<HomeHandover>(&bytes[..end]).is_err());
        }
        assert_eq!(refused as usize, bytes.len());
        for at in 0..bytes.len() {
            for value in 0..=u8::MAX {
                let mut other = bytes.clone();
                other[at] = value;
                // (It may be another one.)
                drop(postcard::from_bytes::<HomeHandover>(&other));
            }
        }
    }

    #[test]
    fn messages_of_the_version_before_are_read_and_of_the_next() {
        let before = Before {
            number: 7,
            text: "x".into(),
        };
        let after: After = unpack(&pack(&before).unwrap()).unwrap();
        let expected = After {
            number: 7,
            text: "x".into(),
            more: None,
            list: Vec::new(),
            flag: false,
        };
        assert_eq!(after, expected);
        let after = After {
            list: vec![1, 2],
            flag: true,
            ..expected
        };
        assert_eq!(unpack::<Before>(&pack(&after).unwrap()).unwrap(), before);
        // What says that more comes than can be left out is none.
        assert!(unpack::<Before>(&Bytes::from_static(&[7, 200, 200, 3])).is_err());
        assert!(unpack::<Before>(&Bytes::from_static(&[0xff; 12])).is_err());
    }

    /// What workers of the version before say and are told.
    #[test]
    fn workers_of_the_version_before_are_understood() {
        #[derive(Serialize)]
        struct OldCheckpoint {
            vault: String,
            full: bool,
            keep: Option<u32>,
        }
        #[derive(serde::Deserialize)]
        struct OldCopy {
            target: MoveEndpoint,
            post_copy: bool,
        }
        let old = OldCheckpoint {
            vault: "/kept".into(),
            full: true,
            keep: Some(3),
        };
        let new: Checkpoint = unpack(&pack(&old).unwrap()).unwrap();
        assert_eq!((new.keep.newest, new.keep.for_s), (Some(3), None));
        let copy = Copy {
            target: MoveEndpoint {
                address: "127.0.0.1:1".into(),
                fingerprint: Fingerprint([7; 32]),
            },
            post_copy: true,
            budget_micros: 2000,
        };
        let old: OldCopy = unpack(&pack(&copy).unwrap()).unwrap();
        assert_eq!(old.target.address, "127.0.0.1:1");
        assert!(old.post_copy);
    }
}
