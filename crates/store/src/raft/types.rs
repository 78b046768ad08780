//! What goes through the log: proposals, their outcomes, and who a voter is.

use keel_net::Bytes;
use openraft::impls::{Entry, OneshotResponder, TokioRuntime};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Cursor;

use crate::encoding::{self, WireError};
use crate::interface::StoreError;
use crate::wire::{Answer, Outcome, Transaction};

openraft::declare_raft_types!(
    /// The types of `openraft`.
    pub(super) Types:
        D = Proposal,
        R = Applied,
        NodeId = u64,
        Node = Voter,
        Entry = Entry<Types>,
        SnapshotData = Cursor<Vec<u8>>,
        Responder = OneshotResponder<Types>,
        AsyncRuntime = TokioRuntime,
);

pub(super) type Raft = openraft::Raft<Types>;
pub(super) type LogId = openraft::LogId<u64>;
pub(super) type Vote = openraft::Vote<u64>;
pub(super) type Membership = openraft::StoredMembership<u64, Voter>;
pub(super) type StorageError = openraft::StorageError<u64>;
pub(super) type StorageIoError = openraft::StorageIOError<u64>;
pub(super) type SnapshotMeta = openraft::SnapshotMeta<u64, Voter>;

/// A node that has a copy of the store. Its number in the group of voters is never used again:
/// a node that lost its copy comes back under another one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voter {
    pub node: String,
    /// Where it is, `host:port`.
    pub address: String,
}

impl fmt::Display for Voter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.node, self.address)
    }
}

/// One change of the store.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Command {
    Txn(Transaction),
    /// Makes a lease of so many milliseconds.
    Grant(u64),
    /// A holder gives its lease back.
    Revoke(u64),
    /// The leader found that the lease's time is over.
    Expire(u64),
}

/// The commands of one entry of the log, encoded once for disk and network.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Proposal(Bytes);

impl Proposal {
    pub(super) fn new(commands: &[Command]) -> Result<Self, WireError> {
        encoding::payload("a proposal", &commands).map(Proposal)
    }

    pub(super) fn commands(&self) -> Result<Vec<Command>, WireError> {
        encoding::decode("a proposal", &self.0)
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proposal({} bytes)", self.0.len())
    }
}

/// Outcomes of a proposal's commands, in their order; none for an entry without commands.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Applied(pub(super) Vec<CommandOutcome>);

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum CommandOutcome {
    Txn(Answer<Outcome>),
    Granted(u64),
    Ended,
}

/// An error of this node's disk, for `openraft`, which stops then.
pub(super) fn disk_error(error: impl std::error::Error + 'static) -> StorageError {
    StorageIoError::write(&error).into()
}

/// The error of a store that stopped.
pub(super) fn stopped(reason: impl fmt::Display) -> StoreError {
    StoreError::unavailable(format!("this node's copy of the store stopped: {reason}"))
}
