//! Volumes as users see them: files in them, and the cluster's volumes: making, listing, removing, and which
//! machine has which.
//!
//! `volume/NAME` in the store says where a volume is and who has it. A machine gets
//! its volumes in the transaction that makes its record, and gives them back in the
//! one that removes it; so a volume has one machine at a time, also one that has
//! ended: what that wrote last may be looked at before the next writes. Each time
//! the number of its holder rises, by which writers are ordered
//! (`keel_machine::cluster_volume`).
//!
//! - `cluster_volumes`: making, listing, removing, holders
//! - `files`: files in machines' volumes

mod cluster_volumes;
mod files;

pub(crate) use cluster_volumes::{create, give_back, inspect, list, remove, take};
pub(crate) use files::{FileCommand, PIECE_BYTES_MAX, VolumeFiles};
