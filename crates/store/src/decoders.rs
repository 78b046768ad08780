//! Decoders of messages and records, by the names of their types, for fuzzing: the fuzz targets
//! begin with the frozen messages of these names. Nothing else uses them.

use serde::de::DeserializeOwned;

use crate::encoding::from_cbor;
use crate::frozen_messages::name_of;
use crate::wire::{Answer, Entry, Follow, Listed, Outcome, Revised, Transaction};
use crate::{etcd, model, raft};

/// A decoder.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// Name of its type, as [`name_of`] says it.
    pub name: String,
    /// Tries bytes; whether they were accepted.
    pub decode: fn(&[u8]) -> bool,
}

impl Decoder {
    /// That of a type, from CBOR.
    pub fn of<T: DeserializeOwned>() -> Self {
        Self {
            name: name_of::<T>(),
            decode: |bytes| from_cbor::<T>(bytes).is_ok(),
        }
    }
}

/// Those of the store: what clients ask, what voters ask each other, what their files have, and what
/// an etcd answers.
pub fn decoders() -> Vec<Decoder> {
    let transaction = Decoder {
        name: name_of::<Transaction>(),
        decode: |bytes| {
            let read = from_cbor::<Transaction>(bytes);
            read.is_ok_and(|txn| model::check(&txn.into()).is_ok())
        },
    };
    let mut all = vec![
        transaction,
        Decoder::of::<Follow>(),
        Decoder::of::<String>(),
        Decoder::of::<u64>(),
        Decoder::of::<Answer<Option<Entry>>>(),
        Decoder::of::<Answer<Listed>>(),
        Decoder::of::<Answer<Outcome>>(),
        Decoder::of::<Answer<Revised>>(),
        Decoder::of::<Answer<u64>>(),
        Decoder::of::<Answer<()>>(),
    ];
    all.extend(raft::decoders());
    all.extend(etcd::decoders());
    all
}
