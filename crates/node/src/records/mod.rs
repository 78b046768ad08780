//! Typed views of the store: the record under each key, and the transactions that change them.
//!
//! - `machine`: machines, schedules, nodes, reservations
//! - `machine_command`: commands that the owner of a machine carries out
//! - `alive`: the nodes that are alive, followed
//! - `placements`: the nodes of all machines, followed
//! - `room`: free memory here for arriving machines

mod alive;
mod machine;
mod machine_command;
mod placements;
mod room;

pub(crate) use alive::AliveNodes;
#[cfg(test)]
pub(crate) use machine::tests;
pub(crate) use machine::{
    NodeRecord, RecordError, Reservation, VersionedRecord, alive, all, encode, epochs_so_far,
    first_epoch, get, nodes, schedule, settled, update,
};
pub(crate) use machine_command::{MachineCommand, at_owner};
pub(crate) use placements::{PlacementChange, Placements, follow_arrivals};
pub(crate) use room::{check_room, free_bytes, room_bytes};
