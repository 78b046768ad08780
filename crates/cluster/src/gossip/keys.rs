//! The keys that seal datagrams, as the store has them, and their replacement.
//!
//! ```text
//!           due                  every node               every node
//!           ────▶ two keys, the  has had time ──▶ the new has had time ──▶ one key
//!                 old one seals  to learn of it   seals   to learn of it
//! ```
//!
//! A key is replaced after [`KEY_LIFETIME`], and when a node was removed from the cluster, which
//! knows it. A node that hears of neither step for [`SPREAD_WITHIN`] is cut off from the store, has
//! no lease, and may well count as down until it reads the store again.

use crate::gossip::datagram::KeyId;
use crate::members::{MemberError, read_voters};
use keel_store::encoding::{self, WireError};
use keel_store::keys::Key;
use keel_store::{Revision, Store, StoreError, Txn};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;
use thiserror::Error;

/// How long a key is used.
pub const KEY_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How long a step of a replacement stands before the next one, so that all nodes have read it.
pub const SPREAD_WITHIN: Duration = Duration::from_secs(30);

/// Name of the value of `gossip-keys` in errors.
const RECORD: &str = "the keys of gossip";

/// Why the keys cannot be read or changed.
#[derive(Debug, Error)]
pub enum KeysError {
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The record of the keys is damaged, or of another version.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The list of voters cannot be read.
    #[error(transparent)]
    Members(#[from] MemberError),
}

/// One key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretKey {
    /// Its number, of which a cluster uses each once.
    pub id: KeyId,
    /// 256 random bits.
    pub secret: [u8; 32],
    /// When it was made, in milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({})", self.id)
    }
}

impl SecretKey {
    fn random(id: KeyId, now_unix_ms: u64) -> Self {
        SecretKey {
            id,
            secret: rand::random(),
            created_unix_ms: now_unix_ms,
        }
    }
}

/// The keys that open datagrams: the value of `gossip-keys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GossipKeys {
    /// The number of the key that seals.
    pub sealing: KeyId,
    /// All keys, the newest last; never empty.
    pub keys: Vec<SecretKey>,
}

impl GossipKeys {
    /// The keys of a cluster that had none.
    pub fn first(now_unix_ms: u64) -> Self {
        // Not 1: a cluster whose store was put back had others.
        let id = rand::random();
        GossipKeys {
            sealing: id,
            keys: vec![SecretKey::random(id, now_unix_ms)],
        }
    }

    /// Whether a replacement is under way.
    pub fn is_rotating(&self) -> bool {
        self.keys.len() > 1
    }

    /// Whether the key is to be replaced by its age. A clock that was set back replaces it early.
    pub fn is_old(&self, now_unix_ms: u64) -> bool {
        let lifetime = u64::try_from(KEY_LIFETIME.as_millis()).unwrap_or(u64::MAX);
        self.keys.last().is_none_or(|key| {
            now_unix_ms < key.created_unix_ms || now_unix_ms - key.created_unix_ms > lifetime
        })
    }

    /// The next step of a replacement, which this begins if none is under way.
    pub fn step(&mut self, now_unix_ms: u64) {
        let Some(newest) = self.keys.last() else {
            *self = Self::first(now_unix_ms);
            return;
        };
        let id = newest.id;
        if self.sealing != id {
            self.sealing = id;
        } else if self.is_rotating() {
            self.keys.retain(|key| key.id == id);
        } else {
            let next = SecretKey::random(id.wrapping_add(1), now_unix_ms);
            self.keys.push(next);
        }
    }
}

/// The keys, and the revision of their record.
///
/// # Errors
/// [`KeysError`].
pub async fn read(store: &dyn Store) -> Result<Option<(GossipKeys, Revision)>, KeysError> {
    let Some(entry) = store.get(&Key::GossipKeys.to_string()).await? else {
        return Ok(None);
    };
    Ok(Some((decode(&entry.value)?, entry.modified)))
}

/// Reads the value of `gossip-keys`.
///
/// # Errors
/// [`KeysError::Wire`] if another version wrote it, or it is damaged.
pub fn decode(value: &[u8]) -> Result<GossipKeys, KeysError> {
    let keys: GossipKeys = encoding::decode(RECORD, value)?;
    if keys.keys.iter().any(|key| key.id == keys.sealing) {
        return Ok(keys);
    }
    Err(KeysError::Wire(WireError::Damaged {
        what: RECORD,
        reason: "the key that seals is missing".into(),
    }))
}

/// Writes the keys if their record is still that of `revision`; whether it did. With `is_answered`
/// it takes note that the removal of nodes is answered by a replacement.
///
/// # Errors
/// [`KeysError`].
pub async fn write(
    store: &dyn Store,
    keys: &GossipKeys,
    revision: Option<Revision>,
    is_answered: bool,
) -> Result<bool, KeysError> {
    let value = encoding::encode(RECORD, keys)?;
    let mut txn = match revision {
        Some(revision) => Txn::new().when_modified_at(Key::GossipKeys, revision),
        None => Txn::new().when_absent(Key::GossipKeys),
    };
    txn = txn.put(Key::GossipKeys, value);
    if is_answered {
        txn = txn.delete(Key::GossipKeysKnown);
    }
    Ok(store.txn(txn).await?.is_committed())
}

/// Who knows the newest key, though it is no member any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Outsider {
    /// All who know it are members.
    #[default]
    None,
    /// A node that was removed, and still gets what the store gets: a newer key, too.
    Voter,
    /// A node that was removed.
    Removed,
}

/// Who knows the newest key, though it is no member any more.
///
/// # Errors
/// [`KeysError`].
pub async fn outsider(store: &dyn Store) -> Result<Outsider, KeysError> {
    let Some(entry) = store.get(&Key::GossipKeysKnown.to_string()).await? else {
        return Ok(Outsider::None);
    };
    let voters = store.get(&Key::Voters.to_string()).await?;
    let voters = voters.map(|entry| read_voters(&entry.value)).transpose();
    let voters = voters?;
    let is_voter = |node: &[u8]| {
        let all = voters.iter().flat_map(|list| &list.voters);
        all.into_iter()
            .any(|voter| voter.node.as_str().as_bytes() == node)
    };
    Ok(match is_voter(&entry.value) {
        true => Outsider::Voter,
        false => Outsider::Removed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_the_keys_of_a_step_can_talk_to_those_of_the_next() {
        let mut keys = GossipKeys::first(0);
        let first = keys.sealing;
        let opens = |keys: &GossipKeys, id| keys.keys.iter().any(|key| key.id == id);
        for step in 0..9 {
            let before = keys.clone();
            keys.step(step);
            assert!(opens(&keys, before.sealing) && opens(&before, keys.sealing));
            let newest = keys.keys.last().expect("a key");
            assert!(opens(&keys, keys.sealing) && keys.keys.len() <= 2);
            assert_eq!(keys.is_rotating(), (step + 1) % 3 != 0, "{step}");
            assert!(newest.created_unix_ms <= step);
        }
        assert_eq!(keys.sealing, first.wrapping_add(3));
        assert_eq!(
            format!("{:?}", keys.keys[0]),
            format!("SecretKey({})", keys.sealing)
        );
    }

    #[test]
    fn a_key_is_old_after_a_day_or_when_the_clock_was_set_back() {
        let keys = GossipKeys::first(1000);
        let day = 24 * 3600 * 1000;
        assert!(!keys.is_old(1000) && !keys.is_old(1000 + day));
        assert!(keys.is_old(1001 + day) && keys.is_old(999));
    }

    #[test]
    fn a_record_whose_sealing_key_is_missing_is_refused() {
        let mut keys = GossipKeys::first(1000);
        let encode = |keys: &GossipKeys| encoding::encode(RECORD, keys).expect("it can be written");
        assert_eq!(decode(&encode(&keys)).expect("valid"), keys);
        keys.sealing = keys.sealing.wrapping_add(1);
        assert!(decode(&encode(&keys)).is_err());
        assert!(decode(b"").is_err());
    }
}
