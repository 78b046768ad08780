//! The cluster's store: linearizable keys, transactions that compare and swap,
//! watches without gaps, leases.
//!
//! [`Store`] is what everything else sees. Behind it: [`RaftStore`], one voter of the embedded
//! engine; [`StoreClient`], the way to the voter that leads. Both pass one conformance suite
//! (`tests/t20_store.rs`), with one voter and with three.
//!
//! Each transaction that changes something gets one [`Revision`], counted up
//! by one. A transaction whose compares do not all hold changes nothing.
//!
//! A transaction's outcome is one of four: committed, refused, certainly not
//! executed ([`StoreError::Unavailable`] and the named errors), or not known
//! ([`StoreError::Unknown`]). Whoever gets the last must settle it by a *write*
//! that excludes the transaction, never by a read: the transaction may still
//! be on its way.
//!
//! `docs/store.md` explains records, ownership and leases.
//!
//! - `interface`: [`Store`], and what it is asked and answers
//! - [`keys`]: all keys
//! - [`encoding`]: the envelope of records and requests
//! - [`frozen_messages`]: messages of an earlier version, read by this one in tests
//! - [`clock`]: the clock that leases are measured by
//! - `raft`, `model`, `view`: the embedded engine
//! - `etcd`: the external engine
//! - `backup`: the file of a backup
//! - `client`, `server`, `wire`: the way to the leader, over the network or here
//! - `watches`: how the leader tells thousands of watches of one change
//! - `decoder`, [`decoders`]: all that bytes from elsewhere are decoded by, for fuzzing

#![forbid(unsafe_code)]

mod backup;
mod client;
pub mod clock;
#[doc(hidden)]
mod decoder;
pub mod decoders;
pub mod encoding;
mod etcd;
pub mod frozen_messages;
mod interface;
pub mod keys;
mod model;
mod raft;
mod server;
mod view;
mod watches;
mod wire;

pub use backup::{Backup, BackupError};
pub use client::StoreClient;
pub use etcd::{EtcdOptions, EtcdStore, EtcdTls};
pub use interface::{
    Change, Changes, Compare, KEY_BYTES_MAX, KeyValue, LEASE_KEYS_MAX, LEASE_TTL_MS_MAX,
    LEASE_TTL_MS_MIN, LIST_BYTES_MAX, LIST_ENTRIES_MAX, LeaseId, Listing, Op, Revision, Store,
    StoreError, TXN_BYTES_MAX, TXN_PARTS_MAX, Txn, TxnOutcome, VALUE_BYTES_MAX, Watch,
};
pub use raft::{Copy, IfAbsent, RaftOptions, RaftStatus, RaftStore, Voter};
pub use server::StoreHandler;
