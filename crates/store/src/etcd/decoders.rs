//! Decoders of what an etcd answers, for fuzzing.

use prost::Message;

use super::messages as pb;
use crate::decoder::Decoder;

fn of<T: Message + Default>(name: &str) -> Decoder {
    Decoder {
        name: format!("etcd {name}"),
        decode: |bytes| T::decode(bytes).is_ok(),
    }
}

pub(crate) fn decoders() -> Vec<Decoder> {
    vec![
        of::<pb::RangeResponse>("range"),
        of::<pb::TxnResponse>("txn"),
        of::<pb::WatchResponse>("watch"),
        of::<pb::LeaseGrantResponse>("lease grant"),
        of::<pb::LeaseResponse>("lease"),
        of::<pb::AuthenticateResponse>("authenticate"),
    ]
}
