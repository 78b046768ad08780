//! Messages between the node of a machine's owner and the nodes of its members.

use keel_cluster::MachineName;
use keel_kind_wasm::control::Join;
use keel_kind_wasm::span::{PartAddress, PartId, PartSet};
use keel_machine::spec::Spec;
use keel_net::Fingerprint;
use serde::{Deserialize, Serialize};

/// [`PartOffer`] → [`ReadyMember`].
pub(crate) const PART: u16 = 0x0314;
/// [`PartJoin`] → `()`.
pub(crate) const PART_JOIN: u16 = 0x0315;
/// `(machine, CPU features that a part of it needs)` → `u64`: free bytes of memory for a part.
pub(crate) const FREE_MEMORY: u16 = 0x0316;
/// [`keel_kind_wasm::control::ConnectNewPart`] → [`PartAddress`].
pub(crate) const CONNECT_NEW_PART: u16 = 0x0317;
/// [`keel_kind_wasm::control::AddPart`] → `u64`.
pub(crate) const ADD_PART: u16 = 0x0318;
/// As [`PART`], for the worker of an arriving machine.
pub(crate) const ARRIVING_PART: u16 = 0x0319;
/// As [`PART_JOIN`], for that worker.
pub(crate) const ARRIVING_JOIN: u16 = 0x031a;
/// [`MachineName`] → `Option<PartId>`: the part number of the arriving worker here.
pub(crate) const ARRIVED_PART: u16 = 0x031b;

/// An owner's request for a part on a member's node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartOffer {
    pub(crate) machine: MachineName,
    pub(crate) spec: Spec,
    pub(crate) program: Fingerprint,
    pub(crate) me: PartId,
    pub(crate) parts: PartSet,
    /// CPU features that the node must have.
    pub(crate) features: Vec<String>,
    /// Number of parts of the machine on this node.
    pub(crate) sharing: u32,
}

/// A member that is ready to connect to the others.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReadyMember {
    /// The name of its worker on its node.
    pub(crate) worker: MachineName,
    pub(crate) place: PartAddress,
}

/// The addresses that a member connects to; without `join` it ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartJoin {
    pub(crate) worker: MachineName,
    pub(crate) join: Option<Join>,
}
