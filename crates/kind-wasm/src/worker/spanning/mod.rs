//! A worker as one of several parts of a machine: the home, which has the machine, or a
//! member, which has only pages and threads. Or the worker to which the machine moves: a
//! member that becomes the home once the move is committed.
//!
//! A member has no external effects: the host calls of its threads are executed by the
//! home. So it needs neither a lease nor a decision of the store; when home and member
//! lose each other, the member ends.
//!
//! - `home`: the requests that a home handles
//! - `member`: preparing, joining and ending a member
//! - `objects`: the memory as objects
//!
//! The state of a part is in this file.

mod home;
mod member;
mod objects;

use super::source::SpanningSource;
use crate::control::ConnectParts;
use crate::span::{Home, MemberPart, MeshError, MeshListener, Pages, PartAddress, SpanError};
use keel_cluster::{MachineName, NodeName};
use keel_net::RpcError;
use keel_wasm::coherence::PartId;
use keel_wasm::runtime::Program;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Time limit for connecting the parts.
pub(super) const MEET_PATIENCE: Duration = Duration::from_secs(10);
/// Time limit for threads to reach a safepoint.
pub(super) const FREEZE_PATIENCE: Duration = Duration::from_secs(5);
/// Time limit for moving threads and pages home.
pub(super) const HOME_PATIENCE: Duration = Duration::from_secs(120);
/// Time limit for moving an object.
const OBJECT_PATIENCE: Duration = Duration::from_secs(20);

/// State of a worker as a part.
#[derive(Default)]
pub(super) struct SpanState {
    /// Listens for the other parts.
    pub(super) meeting: Option<MeshListener>,
    /// Set at the home.
    pub(super) home: Option<Arc<Home>>,
    /// At the home: the node of each part.
    pub(super) nodes: BTreeMap<PartId, NodeName>,
    /// A member that is prepared and has not joined.
    ready: Option<PendingMember>,
    /// At a member: the machine, its part, and the part's state.
    pub(super) member: Option<(MachineName, PartId, Arc<MemberPart>)>,
}

/// The message for the loss of a part.
fn lost(
    nodes: &BTreeMap<PartId, NodeName>,
    part: PartId,
    failure: &dyn std::fmt::Display,
) -> String {
    match nodes.get(&part) {
        Some(node) => format!("{failure} (node {node})"),
        None => failure.to_string(),
    }
}

struct PendingMember {
    machine: MachineName,
    program: Arc<Program>,
    memory_bytes: u64,
    room_bytes: Option<u64>,
    me: PartId,
}

impl SpanState {
    /// Number of parts that the machine spans; 0 while it has one part.
    pub(super) fn count(&self) -> u32 {
        let members = self.home.as_ref().map(|home| home.members());
        members.map_or(0, |members| u32::from(members.len()) + 1)
    }

    /// Why an operation on the whole machine is refused, if the machine spans.
    pub(super) fn refusal(&self) -> Option<String> {
        self.home.as_ref().map(|_| {
            let nodes: Vec<String> = self.nodes.values().map(ToString::to_string).collect();
            format!(
                "it has parts on {}; `keel unspan` first reduces it to one part",
                nodes.join(", ")
            )
        })
    }

    /// The part of a machine at this worker, unless it is the home.
    pub(super) fn member(&self) -> Option<PartId> {
        // Until its process has handled its end: others may need it until then.
        let (_, me, member) = self.member.as_ref()?;
        (!member.has_become_home()).then_some(*me)
    }

    pub(super) fn is_member(&self) -> bool {
        self.member().is_some()
    }

    /// The part of the arriving machine at this worker, if there is one.
    pub(super) fn arriving(&self) -> Option<Arc<MemberPart>> {
        let (_, _, member) = self.member.as_ref().filter(|_| self.is_member())?;
        (!member.pages().is_over()).then(|| member.clone())
    }

    /// The home that is to move, with its successor and the part to which its threads
    /// move meanwhile.
    pub(super) fn leaving(
        &self,
        to: Option<(PartId, PartId)>,
    ) -> Result<Option<SpanningSource>, String> {
        match (&self.home, to) {
            (None, None) => Ok(None),
            (Some(home), Some((successor, threads_to))) => Ok(Some(SpanningSource {
                give_up: Arc::default(),
                home: home.clone(),
                successor,
                threads_to,
                nodes: self.nodes.clone(),
                leaving: None,
            })),
            (Some(_), None) => Err(self.refusal().unwrap_or_default()),
            (None, Some(_)) => Err("it was reduced to one part meanwhile; try again".into()),
        }
    }

    /// The pages of a machine that spans.
    pub(super) fn pages(&self) -> Option<Arc<Pages>> {
        self.home.as_ref().map(|home| home.pages().clone())
    }

    /// Sets the memory limit of each part, in bytes.
    pub(super) fn limit(&self, part_bytes: Option<u64>) -> Result<(), SpanError> {
        match &self.home {
            Some(home) => home.pages().limit_parts(part_bytes),
            None => Ok(()),
        }
    }

    /// Ends the parts with the machine; returns why, if a part was lost.
    pub(super) fn end(&mut self) -> Option<String> {
        let home = self.home.take()?;
        let failure = home.failure();
        // A move in progress may still hold a reference.
        home.pages().die();
        let failure = failure?;
        Some(match &failure {
            SpanError::Lost { part, .. } => lost(&self.nodes, *part, &failure),
            _ => failure.to_string(),
        })
    }
}

pub(super) fn failed(error: impl std::fmt::Display) -> RpcError {
    RpcError::failed(error)
}

fn open(me: PartId, meet: &ConnectParts) -> Result<(MeshListener, PartAddress), MeshError> {
    MeshListener::open(me, meet.parts.without(me), &meet.address)
}
