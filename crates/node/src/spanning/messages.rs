//! Messages between the node of a machine's owner and the nodes of its members.

use keel_cluster::MachineName;
use keel_machine::span::{PartAddress, PartId, PartSet};
use keel_machine::spec::Spec;
use keel_machine::worker::control::Join;
use keel_net::Fingerprint;
use serde::{Deserialize, Serialize};

/// [`PartOffer`] → [`ReadyMember`].
pub(crate) const PART: u16 = 0x0314;
/// [`PartJoin`] → `()`.
pub(crate) const PART_JOIN: u16 = 0x0315;
/// `(machine, CPU features that a part of it needs)` → `u64`: bytes of memory that are free
/// for it.
pub(crate) const ROOM: u16 = 0x0316;
/// [`keel_machine::worker::control::ConnectNewPart`] → [`PartAddress`].
pub(crate) const CONNECT_NEW_PART: u16 = 0x0317;
/// [`keel_machine::worker::control::AddPart`] → `u64`.
pub(crate) const ADD_PART: u16 = 0x0318;
/// As [`PART`], of the worker to which the machine moves.
pub(crate) const ARRIVING_PART: u16 = 0x0319;
/// As [`PART_JOIN`], of that worker.
pub(crate) const ARRIVING_JOIN: u16 = 0x031a;
/// [`MachineName`] → `Option<PartId>`: the part of it that the worker is here to which it
/// was to move.
pub(crate) const ARRIVED_PART: u16 = 0x031b;

/// What an owner asks of a member's node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartOffer {
    pub(crate) machine: MachineName,
    pub(crate) spec: Spec,
    pub(crate) program: Fingerprint,
    pub(crate) me: PartId,
    pub(crate) parts: PartSet,
    /// CPU features that must be here.
    pub(crate) features: Vec<String>,
    /// Parts of the machine that are to be here.
    pub(crate) sharing: u32,
}

/// A member that is ready to meet the others.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReadyMember {
    /// Its worker's name on its node.
    pub(crate) worker: MachineName,
    pub(crate) place: PartAddress,
}

/// Which member is to meet whom; without `join` it ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartJoin {
    pub(crate) worker: MachineName,
    pub(crate) join: Option<Join>,
}
