//! Decoders of messages and records, by the names of their types, for fuzzing: the fuzz targets
//! begin with the frozen messages of these names. Nothing else uses them.

pub use crate::decoder::Decoder;
use crate::encoding::from_cbor;
use crate::frozen_messages::name_of;
use crate::wire::{Answer, Entry, Follow, Listed, Outcome, Revised, Transaction};
use crate::{etcd, model, raft};

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
