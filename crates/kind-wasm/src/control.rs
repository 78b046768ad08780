//! Requests to the worker of a machine that spans, or is about to, and their answers;
//! beside those to workers of every kind (`keel_machine::worker::control`).

use crate::span::{HomeState, PartAddress, PartMemory};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::spec::Spec;
use keel_machine::worker::control::Copy;
use keel_wasm::coherence::{PartId, PartSet};
use keel_wasm::runtime::CpuUsage;
use keel_wasm::runtime::parts::SpawnPolicy;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Kinds of requests.
pub mod kind {
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
    /// [`super::CopyHome`] → stream of [`CopyEvent`](keel_machine::worker::control::CopyEvent): as [`keel_machine::worker::control::kind::COPY`], for a machine
    /// that spans, whose other parts stay.
    pub const COPY_HOME: u16 = 0x042e;
    /// `()` → `Option<PartId>`: the part at this worker, if the machine moves, or was to
    /// move, to it.
    pub const IS_PART: u16 = 0x042f;
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

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::worker::control::{Positional, pack, unpack};

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
}
