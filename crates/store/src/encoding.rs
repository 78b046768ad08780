//! The envelope of every record in the store and of every payload about it: one version
//! byte, then CBOR (RFC 8949).
//!
//! CBOR names the fields, so a field can be added without a new version: a reader that does
//! not know it ignores it, and one that misses it takes its default (`#[serde(default)]`,
//! or none for an `Option`). A field whose meaning changes gets another name; only a change
//! of the envelope raises [`VERSION`], and other versions are refused by name. Lengths are
//! bounded by the frame and the store's limits; trailing bytes are an error.
//!
//! The kinds of request that this crate answers are numbered here.

use crate::frozen_messages;
use keel_net::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Version of all payloads and records of this crate.
pub const VERSION: u8 = 1;

/// Kinds of request, as `keel-net` numbers them; `0x0100..0x0200` are this
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
    /// A leader's entries, or its heartbeat, for another voter.
    pub const RAFT_APPEND: u16 = 0x0110;
    /// A candidate asks for a vote.
    pub const RAFT_VOTE: u16 = 0x0111;
    /// A piece of a snapshot for a voter that is far behind.
    pub const RAFT_SNAPSHOT: u16 = 0x0112;
    /// Whether another voter would vote for this one.
    pub const RAFT_PRE_VOTE: u16 = 0x0113;
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

/// CBOR without an envelope.
///
/// # Errors
/// A sentence, for a type that cannot be written.
pub fn to_cbor<T: Serialize>(value: &T, into: Vec<u8>) -> Result<Vec<u8>, String> {
    let mut bytes = into;
    ciborium::into_writer(value, &mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Reads CBOR without an envelope, to its last byte.
///
/// # Errors
/// A sentence, for bytes that are no such value.
pub fn from_cbor<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    frozen_messages::observe::<T>(bytes);
    let mut rest = bytes;
    let value = ciborium::from_reader(&mut rest).map_err(|error| match error {
        ciborium::de::Error::Io(_) => "it is cut off".to_owned(),
        other => other.to_string(),
    })?;
    match rest.len() {
        0 => Ok(value),
        left => Err(format!("{left} bytes too many")),
    }
}

/// `value` in its envelope.
///
/// # Errors
/// [`WireError::Damaged`] for a type that cannot be written; none of this crate's is.
pub fn encode<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, WireError> {
    to_cbor(value, vec![VERSION]).map_err(|reason| WireError::Damaged { what, reason })
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
    match bytes.split_first() {
        None => Err(WireError::Damaged {
            what,
            reason: "it is empty".into(),
        }),
        Some((&VERSION, body)) => {
            from_cbor(body).map_err(|reason| WireError::Damaged { what, reason })
        }
        Some((&found, _)) => Err(WireError::Version { what, found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[test]
    fn version_1_is_read_and_others_are_refused_by_name() -> Result<(), WireError> {
        let bytes = encode("a pair", &(7u32, "x".to_owned()))?;
        assert_eq!(bytes, [1, 0x82, 7, 0x61, b'x']);
        assert_eq!(
            decode::<(u32, String)>("a pair", &bytes)?,
            (7, "x".to_owned())
        );
        let error = decode::<(u32, String)>("a pair", &[2, 0x82, 7, 0x61, b'x']);
        assert_eq!(
            error.map_err(|e| e.to_string()),
            Err("a pair has version 2, this node reads version 1: upgrade the older one".into())
        );
        Ok(())
    }

    #[test]
    fn empty_short_and_long_bytes_are_refused() {
        let whole = [1, 0x82, 7, 0x61, b'x', 0];
        for end in (0..whole.len() - 1).chain([whole.len()]) {
            let bytes = &whole[..end];
            assert!(
                decode::<(u32, String)>("a pair", bytes).is_err(),
                "{bytes:?}"
            );
        }
    }

    /// A field is added, and later another one is taken away: older and newer writers are
    /// read by each other.
    #[test]
    fn fields_come_and_go() -> Result<(), WireError> {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Older {
            name: String,
            port: u16,
        }
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Newer {
            name: String,
            zone: Option<String>,
            #[serde(default)]
            weight: u32,
        }
        let older = Older {
            name: "a".into(),
            port: 7,
        };
        let newer: Newer = decode("a node", &encode("a node", &older)?)?;
        assert_eq!(
            (newer.name.as_str(), newer.zone, newer.weight),
            ("a", None, 0)
        );
        let missing = decode::<Older>("a node", &encode("a node", &("a",))?);
        assert!(missing.is_err());
        Ok(())
    }

    #[test]
    fn any_bytes_are_read_or_refused() -> Result<(), WireError> {
        let value = vec![("key".to_owned(), Some(3u64)), (String::new(), None)];
        let bytes = encode("a list", &value)?;
        for at in 0..bytes.len() {
            for byte in 0..=u8::MAX {
                let mut changed = bytes.clone();
                changed[at] = byte;
                drop(decode::<Vec<(String, Option<u64>)>>("a list", &changed));
            }
        }
        Ok(())
    }
}
