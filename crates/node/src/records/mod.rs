//! Typed views of the store: which record is under which key, and the transactions that
//! change them.
//!
//! - `machine`: machines, schedules, nodes, reservations
//! - `owner`: commands that the owner of a machine carries out
//! - `alive`: the nodes that are alive, followed
//! - `placements`: where all machines are, followed
//! - `room`: memory that is free here for machines that come

mod alive;
mod machine;
mod owner;
mod placements;
mod room;

pub(crate) use alive::AliveNodes;
#[cfg(test)]
pub(crate) use machine::tests;
pub(crate) use machine::{
    NodeRecord, RecordError, Reservation, VersionedRecord, alive, all, encode, epochs_so_far,
    first_epoch, get, nodes, schedule, settled, update,
};
pub(crate) use owner::{MachineCommand, at_owner};
pub(crate) use placements::{PlacementChange, Placements, follow_arrivals};
pub(crate) use room::{check_room, free_bytes, room_bytes};
