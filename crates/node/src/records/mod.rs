//! Typed views of the store: the record under each key, and the transactions that change them.
//!
//! - `machine`: machines, schedules, nodes, reservations
//! - `machine_command`: commands that the owner of a machine carries out
//! - `audit`: who asked for which change
//! - `alive`: the nodes that are alive, followed
//! - `placements`: the nodes of all machines, followed
//! - `in_sync_set`: the nodes that have a machine's newest checkpoint
//! - `zones`: the failure domains of nodes
//! - `free_memory`: free memory here for arriving machines

mod alive;
mod audit;
mod free_memory;
mod in_sync_set;
mod machine;
mod machine_command;
mod placements;
mod zones;

pub(crate) use alive::AliveNodes;
pub(crate) use audit::{AuditRecord, audit_log, begin_audit, end_audit};
pub(crate) use free_memory::{check_free_memory, free_bytes, free_bytes_for};
pub(crate) use in_sync_set::{
    HeldOutput, InSyncSet, encode as encode_in_sync_set, in_sync_set, in_sync_sets,
    replace_in_sync_set,
};
#[cfg(test)]
pub(crate) use machine::tests;
pub(crate) use machine::{
    NodeRecord, RecordError, Reservation, VersionedRecord, alive, all, all_or_none, encode,
    epochs_so_far, first_epoch, get, nodes, schedule, settled, update,
};
pub(crate) use machine_command::{MachineCommand, at_owner};
pub(crate) use placements::{Needs, PlacementChange, Placements, follow_arrivals};
pub(crate) use zones::{draining, zones};
