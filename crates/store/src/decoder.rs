//! What a decoder is to the fuzz targets. Which there are is in `decoders`.

use serde::de::DeserializeOwned;

use crate::encoding::from_cbor;
use crate::frozen_messages::name_of;

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
