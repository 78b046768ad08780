//! Volumes: files in them, and the cluster's volumes with their holders.
//!
//! `volume/NAME` in the store holds the place of a volume and its holder. A machine acquires its
//! volumes in the transaction that creates its record, and releases them in the one that removes
//! it. So a volume has one holder at a time, also one that has ended: its last writes can be read
//! before the next holder writes. Each acquisition raises the holder number, which orders writers
//! (`keel_machine::cluster_volume`).
//!
//! - `cluster_volumes`: creates, lists and removes volumes; holders
//! - `files`: files in machines' volumes

mod cluster_volumes;
mod files;

pub(crate) use cluster_volumes::{
    create, delete_snapshots, give_back, inspect, list, remove, take,
};
pub(crate) use files::{FileCommand, PIECE_BYTES_MAX, VolumeFiles};
