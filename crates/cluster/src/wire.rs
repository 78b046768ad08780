//! The envelope of every payload on the wire and every record in the store:
//! one version byte, then postcard.
//!
//! Policy: fields are never reordered or removed within a version; a changed
//! type raises [`VERSION`], and the older one is then read by a type of its
//! own or refused by name, as here. Lengths are bounded by the frame and the
//! store's limits; trailing bytes are an error.
//!
//! The kinds of request that this crate answers are numbered here.

use keel_net::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Version of all payloads and records of this crate.
pub const VERSION: u8 = 1;

/// Kinds of request, as `keel-net` numbers them; `0x0100..0x0300` are this
/// crate's.
pub mod kind {
    pub const GET: u16 = 0x0101;
    /// Read all keys with a prefix; answered by a stream.
    pub const LIST: u16 = 0x0102;
    /// Run a transaction.
    pub const TXN: u16 = 0x0103;
    /// Follow a prefix; answered by a stream.
    pub const WATCH: u16 = 0x0104;
    /// Make a lease.
    pub const LEASE_GRANT: u16 = 0x0105;
    /// Renew a lease.
    pub const LEASE_RENEW: u16 = 0x0106;
    /// End a lease.
    pub const LEASE_REVOKE: u16 = 0x0107;
    pub const REVISION: u16 = 0x0108;
    /// Become a member: the only request for anonymous peers.
    pub const JOIN: u16 = 0x0200;
}

/// Bytes that cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// Another version of this crate wrote them.
    #[error("{what} has version {found}, this node reads version {VERSION}: upgrade the older one")]
    Version { what: &'static str, found: u8 },
    #[error("{what} cannot be read: {reason}")]
    Damaged { what: &'static str, reason: String },
}

/// `value` in its envelope.
///
/// # Errors
/// [`WireError::Damaged`] for a type that postcard cannot write (a sequence of
/// unknown length); none of this crate's is.
pub fn encode<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, WireError> {
    postcard::to_extend(value, vec![VERSION]).map_err(|e| WireError::Damaged {
        what,
        reason: e.to_string(),
    })
}

/// As [`encode`], into a payload.
///
/// # Errors
/// As [`encode`].
pub fn payload<T: Serialize>(what: &'static str, value: &T) -> Result<Bytes, WireError> {
    encode(what, value).map(Bytes::from)
}

/// Reads what [`encode`] wrote. `what` names it in the error.
///
/// # Errors
/// [`WireError`].
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, WireError> {
    let damaged = |reason: String| WireError::Damaged { what, reason };
    match bytes.split_first() {
        None => Err(damaged("it is empty".into())),
        Some((&VERSION, rest)) => match postcard::take_from_bytes(rest) {
            Ok((value, [])) => Ok(value),
            Ok((_, rest)) => Err(damaged(format!("{} bytes too many", rest.len()))),
            Err(error) => Err(damaged(error.to_string())),
        },
        Some((&found, _)) => Err(WireError::Version { what, found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_is_read_and_others_are_refused_by_name() -> Result<(), WireError> {
        let bytes = encode("a pair", &(7u32, "x".to_owned()))?;
        assert_eq!(bytes, [1, 7, 1, b'x']);
        assert_eq!(
            decode::<(u32, String)>("a pair", &bytes)?,
            (7, "x".to_owned())
        );
        let error = decode::<(u32, String)>("a pair", &[2, 7, 1, b'x']);
        assert_eq!(
            error.map_err(|e| e.to_string()),
            Err("a pair has version 2, this node reads version 1: upgrade the older one".into())
        );
        Ok(())
    }

    #[test]
    fn empty_short_and_long_bytes_are_refused() {
        for bytes in [&[][..], &[1], &[1, 7], &[1, 7, 1], &[1, 7, 1, b'x', 0]] {
            assert!(
                decode::<(u32, String)>("a pair", bytes).is_err(),
                "{bytes:?}"
            );
        }
    }
}
