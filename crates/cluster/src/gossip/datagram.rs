//! The envelope of a datagram: who sent it, sealed with a key of the cluster. It is opened before
//! anything inside is decoded.
//!
//! ```text
//!  0         1    2      6             10         18     34       42       43         43+length
//!  ├ version ┼ 0 ─┼ key ─┼ incarnation ┼ revision ┼ salt ┼ number ┼ length ┼ node ────┼ sealed … ┤
//!                                                                                     big-endian
//! ```
//!
//! AES-256-GCM (NIST SP 800-38D), with the envelope as associated data. Each run of an agent draws a
//! salt, has a key of its own, derived from the cluster's by it (HKDF-SHA-256, RFC 5869), and numbers
//! its datagrams: so no nonce is used twice. A receiver takes each number once, in a window as of RFC
//! 4303 (appendix A2), and none of a run that it knows to be an earlier one. It forgets what only keys
//! vouched for that are of no use any more: who knew them may have forged it.

use crate::gossip::instance::Start;
use crate::gossip::keys::{GossipKeys, SecretKey};
use bytes::{Buf, BufMut};
use keel_net::NodeName;
use keel_net::name::NAME_BYTES_MAX;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use std::collections::BTreeMap;
use thiserror::Error;

/// The number of a key.
pub type KeyId = u32;

/// Version of the envelope and of what it holds.
pub const VERSION: u8 = 1;
/// Length of the envelope without the node's name, in bytes.
const HEADER_BYTES: usize = 43;
/// Length of the seal, in bytes.
const SEAL_BYTES: usize = 16;
/// The longest datagram, in bytes: it fits in an Ethernet frame also through a tunnel.
pub const DATAGRAM_BYTES_MAX: usize = 1400;
/// What fits in a datagram, in bytes.
pub const CONTENT_BYTES_MAX: usize =
    DATAGRAM_BYTES_MAX - HEADER_BYTES - NAME_BYTES_MAX - SEAL_BYTES;
/// Datagrams that may arrive after a later one and be taken.
const WINDOW: u64 = 128;

/// Why a datagram is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refused {
    /// It has no envelope.
    #[error("it is no datagram of a node")]
    Malformed,
    /// Another version wrote it.
    #[error("it has version {0}, this node reads version {VERSION}")]
    Version(u8),
    /// The sender is no member.
    #[error("{0} is no member")]
    NoMember(NodeName),
    /// The key is none of the cluster's, or not known here yet.
    #[error("its key {0} is not known")]
    Key(KeyId),
    /// It was received before, or it is of an earlier run of the sender.
    #[error("it was received before, or is too old")]
    Replayed,
    /// It was not sealed with the key that it names.
    #[error("its seal is broken")]
    Seal,
}

/// Random bytes of one run of an agent.
type RunSalt = [u8; 16];

/// The envelope.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Header {
    key: KeyId,
    start: Start,
    salt: RunSalt,
    number: u64,
    node: NodeName,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let name = self.node.as_str().as_bytes();
        let mut bytes = Vec::with_capacity(DATAGRAM_BYTES_MAX);
        bytes.put_u8(VERSION);
        bytes.put_u8(0);
        bytes.put_u32(self.key);
        bytes.put_u32(self.start.incarnation);
        bytes.put_u64(self.start.revision);
        bytes.put_slice(&self.salt);
        bytes.put_u64(self.number);
        // A name has at most 63 bytes.
        bytes.put_u8(name.len() as u8);
        bytes.put_slice(name);
        bytes
    }

    /// The envelope of a datagram, and its length.
    fn decode(datagram: &[u8]) -> Result<(Self, usize), Refused> {
        let mut bytes = datagram;
        let version = bytes.try_get_u8().map_err(|_| Refused::Malformed)?;
        if version != VERSION {
            return Err(Refused::Version(version));
        }
        if datagram.len() > DATAGRAM_BYTES_MAX {
            return Err(Refused::Malformed);
        }
        let header = Self::decode_rest(&mut bytes).ok_or(Refused::Malformed)?;
        Ok((header, datagram.len() - bytes.len()))
    }

    fn decode_rest(bytes: &mut &[u8]) -> Option<Self> {
        let reserved = bytes.try_get_u8().ok()?;
        let key = bytes.try_get_u32().ok()?;
        let incarnation = bytes.try_get_u32().ok()?;
        let revision = bytes.try_get_u64().ok()?;
        let mut salt = RunSalt::default();
        bytes.try_copy_to_slice(&mut salt).ok()?;
        let number = bytes.try_get_u64().ok()?;
        let length = usize::from(bytes.try_get_u8().ok()?);
        let (name, rest) = bytes.split_at_checked(length)?;
        *bytes = rest;
        let node = std::str::from_utf8(name).ok()?.parse().ok()?;
        (reserved == 0 && rest.len() >= SEAL_BYTES).then_some(Header {
            key,
            start: Start {
                incarnation,
                revision,
            },
            salt,
            number,
            node,
        })
    }
}

/// The key of one run of a node's agent.
fn derive(
    key: &SecretKey,
    node: &NodeName,
    start: Start,
    salt: &RunSalt,
) -> Result<LessSafeKey, Refused> {
    let context = [
        b"keel gossip 1 ".as_slice(),
        &start.incarnation.to_be_bytes(),
        &start.revision.to_be_bytes(),
        node.as_str().as_bytes(),
    ];
    let derived = Salt::new(HKDF_SHA256, salt).extract(&key.secret);
    let derived = derived.expand(&context, &AES_256_GCM);
    let unbound: UnboundKey = derived.map_err(|_| Refused::Key(key.id))?.into();
    Ok(LessSafeKey::new(unbound))
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[NONCE_LEN - 8..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Seals what this node sends.
#[derive(Debug)]
pub struct Sealer {
    node: NodeName,
    start: Start,
    salt: RunSalt,
    number: u64,
    /// The cluster's, and the one that is derived from it.
    key: Option<(SecretKey, LessSafeKey)>,
}

impl Sealer {
    /// For the run of `node`'s agent that began at `start`, which no other one has.
    pub fn new(node: NodeName, start: Start) -> Self {
        Sealer {
            node,
            start,
            salt: rand::random(),
            number: 0,
            key: None,
        }
    }

    /// Uses these keys from now on.
    pub fn set_keys(&mut self, keys: &GossipKeys) {
        let sealing = keys.keys.iter().find(|key| key.id == keys.sealing);
        if self.key.as_ref().map(|(key, _)| key) == sealing {
            return;
        }
        self.key = sealing.and_then(|key| {
            let derived = derive(key, &self.node, self.start, &self.salt).ok()?;
            Some((key.clone(), derived))
        });
    }

    /// A datagram with this content. `None` before there are keys, or if it is too long.
    pub fn seal(&mut self, content: &[u8]) -> Option<Vec<u8>> {
        let (secret, key) = self.key.as_ref()?;
        if content.len() > CONTENT_BYTES_MAX {
            return None;
        }
        // Never falls, also when the key is replaced: receivers count on.
        self.number = self.number.checked_add(1)?;
        let header = Header {
            key: secret.id,
            start: self.start,
            salt: self.salt,
            number: self.number,
            node: self.node.clone(),
        };
        let mut datagram = header.encode();
        let mut sealed = content.to_vec();
        let envelope = Aad::from(&datagram[..]);
        key.seal_in_place_append_tag(nonce(self.number), envelope, &mut sealed)
            .ok()?;
        datagram.append(&mut sealed);
        Some(datagram)
    }
}

/// What was received from one node.
#[derive(Debug)]
struct Sender {
    start: Start,
    salt: RunSalt,
    window: Window,
    keys: Vec<(KeyId, LessSafeKey)>,
}

/// Opens what other nodes send.
#[derive(Debug, Default)]
pub struct Opener {
    keys: Vec<SecretKey>,
    senders: BTreeMap<NodeName, Sender>,
}

impl Opener {
    /// Uses these keys from now on.
    pub fn set_keys(&mut self, keys: &GossipKeys) {
        let before = std::mem::replace(&mut self.keys, keys.keys.clone());
        let is_kept = |id| {
            self.keys
                .iter()
                .any(|key| key.id == id && before.contains(key))
        };
        self.senders.retain(|_, sender| {
            sender.keys.retain(|(id, _)| is_kept(*id));
            !sender.keys.is_empty()
        });
    }

    /// Forgets nodes that are no members.
    pub fn retain(&mut self, keep: impl Fn(&NodeName) -> bool) {
        self.senders.retain(|node, _| keep(node));
    }

    /// The content of a datagram, and who sent it.
    ///
    /// # Errors
    /// [`Refused`]; nothing of it counts as received.
    pub fn open<'a>(
        &mut self,
        datagram: &'a mut [u8],
        is_member: impl Fn(&NodeName) -> bool,
    ) -> Result<(NodeName, &'a [u8]), Refused> {
        let (header, length) = Header::decode(datagram)?;
        if !is_member(&header.node) {
            return Err(Refused::NoMember(header.node));
        }
        let secret = self.keys.iter().find(|key| key.id == header.key);
        let secret = secret.ok_or(Refused::Key(header.key))?;
        let known = self.senders.get(&header.node);
        let same_run = known.filter(|it| (it.start, it.salt) == (header.start, header.salt));
        if known.is_some_and(|sender| sender.start > header.start)
            || same_run.is_some_and(|sender| !sender.window.takes(header.number))
        {
            return Err(Refused::Replayed);
        }
        let known = same_run.and_then(|it| it.keys.iter().find(|(id, _)| *id == header.key));
        let derived = match known {
            Some(_) => None,
            None => Some(derive(secret, &header.node, header.start, &header.salt)?),
        };
        let key = known.map(|(_, key)| key).or(derived.as_ref());
        let key = key.ok_or(Refused::Key(header.key))?;
        let (envelope, sealed) = datagram.split_at_mut(length);
        let content = key
            .open_in_place(nonce(header.number), Aad::from(&*envelope), sealed)
            .map_err(|_| Refused::Seal)?;
        // From here on it is a member's word.
        let new = || Sender {
            start: header.start,
            salt: header.salt,
            window: Window::default(),
            keys: Vec::new(),
        };
        let sender = self
            .senders
            .entry(header.node.clone())
            .and_modify(|sender| {
                if (sender.start, sender.salt) != (header.start, header.salt) {
                    *sender = new();
                }
            })
            .or_insert_with(new);
        sender.window.take(header.number);
        if let Some(derived) = derived {
            sender.keys.push((header.key, derived));
        }
        Ok((header.node, content))
    }
}

/// The numbers that were received: the highest, and which of those just below it (RFC 4303,
/// appendix A2).
#[derive(Debug, Default)]
struct Window {
    highest: u64,
    /// Bit `n` is set if `highest - n` was received.
    received: u128,
}

impl Window {
    /// Whether a number was not received yet, and is recent enough to know.
    fn takes(&self, number: u64) -> bool {
        match self.highest.checked_sub(number) {
            None => true,
            Some(below) => below < WINDOW && self.received >> below & 1 == 0,
        }
    }

    /// Marks a number as received.
    fn take(&mut self, number: u64) {
        match number.checked_sub(self.highest) {
            Some(above) => {
                let moved = u32::try_from(above).ok();
                let moved = moved.and_then(|above| self.received.checked_shl(above));
                self.received = moved.unwrap_or(0) | 1;
                self.highest = number;
            }
            None if self.highest - number < WINDOW => {
                self.received |= 1 << (self.highest - number);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn name(text: &str) -> NodeName {
        text.parse().expect("a name")
    }

    fn start(revision: u64) -> Start {
        Start {
            incarnation: 1,
            revision,
        }
    }

    fn pair(keys: &GossipKeys) -> (Sealer, Opener) {
        let mut sealer = Sealer::new(name("a"), start(7));
        let mut opener = Opener::default();
        sealer.set_keys(keys);
        opener.set_keys(keys);
        (sealer, opener)
    }

    fn open(opener: &mut Opener, datagram: &[u8]) -> Result<Vec<u8>, Refused> {
        let mut datagram = datagram.to_vec();
        let opened = opener.open(&mut datagram, |_| true);
        opened.map(|(_, content)| content.to_vec())
    }

    #[test]
    fn a_datagram_is_opened_once() {
        let (mut sealer, mut opener) = pair(&GossipKeys::first(0));
        let first = sealer.seal(b"one").expect("sealed");
        let second = sealer.seal(b"two").expect("sealed");
        assert_eq!(open(&mut opener, &second), Ok(b"two".to_vec()));
        assert_eq!(open(&mut opener, &first), Ok(b"one".to_vec()));
        assert_eq!(open(&mut opener, &first), Err(Refused::Replayed));
        assert_eq!(open(&mut opener, &second), Err(Refused::Replayed));
        let longest = vec![7; CONTENT_BYTES_MAX];
        let sealed = sealer.seal(&longest).expect("it fits");
        assert_eq!(open(&mut opener, &sealed), Ok(longest));
        assert_eq!(sealer.seal(&[7; CONTENT_BYTES_MAX + 1]), None);
    }

    #[test]
    fn whoever_has_no_key_is_not_heard() {
        let keys = GossipKeys::first(0);
        let (mut sealer, mut opener) = pair(&keys);
        let mut datagram = sealer.seal(b"hello").expect("sealed");
        let mut of_stranger = datagram.clone();
        let refused = opener.open(&mut of_stranger, |node| node.as_str() != "a");
        assert_eq!(refused.err(), Some(Refused::NoMember(name("a"))));
        let other = GossipKeys {
            keys: vec![SecretKey {
                secret: [0; 32],
                ..keys.keys[0].clone()
            }],
            ..keys.clone()
        };
        let (mut forger, _) = pair(&other);
        let forged = forger.seal(b"hello").expect("sealed");
        assert_eq!(open(&mut opener, &forged), Err(Refused::Seal));
        let (mut stranger, _) = pair(&GossipKeys::first(0));
        let strange = stranger.seal(b"hello").expect("sealed");
        assert!(matches!(open(&mut opener, &strange), Err(Refused::Key(_))));
        datagram[0] = 9;
        assert_eq!(open(&mut opener, &datagram), Err(Refused::Version(9)));
        assert_eq!(open(&mut opener, &[]), Err(Refused::Malformed));
        assert_eq!(Sealer::new(name("a"), start(7)).seal(b"x"), None);
    }

    #[test]
    fn an_earlier_run_of_the_sender_is_not_heard_any_more() {
        let keys = GossipKeys::first(0);
        let (mut before, mut opener) = pair(&keys);
        let old = before.seal(b"old").expect("sealed");
        let mut after = Sealer::new(name("a"), start(8));
        after.set_keys(&keys);
        let new = after.seal(b"new").expect("sealed");
        // A forged start does not end the true run.
        let mut forged = old.clone();
        forged[17] = 9;
        assert_eq!(open(&mut opener, &forged), Err(Refused::Seal));
        assert_eq!(open(&mut opener, &old), Ok(b"old".to_vec()));
        assert_eq!(open(&mut opener, &new), Ok(b"new".to_vec()));
        let old = before.seal(b"old").expect("sealed");
        assert_eq!(open(&mut opener, &old), Err(Refused::Replayed));
        // Two runs of one start: a store that was put back counts revisions again.
        let mut twin = Sealer::new(name("a"), start(8));
        twin.set_keys(&keys);
        let first = twin.seal(b"new").expect("sealed");
        assert_ne!(first, new, "the same nonce under another key");
        assert_eq!(open(&mut opener, &first), Ok(b"new".to_vec()));
        opener.retain(|_| false);
        assert_eq!(open(&mut opener, &old), Ok(b"old".to_vec()));
    }

    #[test]
    fn keys_are_replaced_while_datagrams_arrive() {
        let mut keys = GossipKeys::first(0);
        let (mut sealer, mut opener) = pair(&keys);
        let mut last = Vec::new();
        for step in 0..6 {
            keys.step(step);
            // The sender knows the step earlier than the receiver, then later.
            sealer.set_keys(&keys);
            let early = sealer.seal(b"early").expect("sealed");
            assert_eq!(open(&mut opener, &early), Ok(b"early".to_vec()));
            opener.set_keys(&keys);
            last = sealer.seal(b"late").expect("sealed");
            assert_eq!(open(&mut opener, &last), Ok(b"late".to_vec()));
        }
        for step in 0..3 {
            keys.step(step);
        }
        opener.set_keys(&keys);
        assert!(matches!(open(&mut opener, &last), Err(Refused::Key(_))));
        // Whoever knew the old key forges what would silence the node.
        let mut forger = Sealer::new(name("a"), start(u64::MAX));
        forger.set_keys(&keys);
        let forged = forger.seal(b"forged").expect("sealed");
        assert!(open(&mut opener, &forged).is_ok());
        sealer.set_keys(&keys);
        let true_one = sealer.seal(b"true").expect("sealed");
        assert_eq!(open(&mut opener, &true_one), Err(Refused::Replayed));
        for step in 0..3 {
            keys.step(step);
            opener.set_keys(&keys);
        }
        sealer.set_keys(&keys);
        let true_one = sealer.seal(b"true").expect("sealed");
        assert_eq!(open(&mut opener, &true_one), Ok(b"true".to_vec()));
        // A store that was put back makes another key of the same number.
        keys.keys[0].secret = [7; 32];
        sealer.set_keys(&keys);
        let other = sealer.seal(b"other").expect("sealed");
        opener.set_keys(&keys);
        assert_eq!(open(&mut opener, &other), Ok(b"other".to_vec()));
    }

    #[test]
    fn every_byte_is_covered_by_the_seal() {
        let (mut sealer, mut opener) = pair(&GossipKeys::first(0));
        let datagram = sealer.seal(b"hello").expect("sealed");
        for at in 0..datagram.len() {
            let mut changed = datagram.clone();
            changed[at] ^= 1;
            assert!(open(&mut opener, &changed).is_err(), "byte {at}");
            let cut = datagram[..at].to_vec();
            assert!(open(&mut opener, &cut).is_err(), "{at} bytes");
        }
        assert!(open(&mut opener, &datagram).is_ok());
    }

    proptest! {
        #[test]
        fn bytes_of_anyone_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
            let (_, mut opener) = pair(&GossipKeys::first(0));
            prop_assert!(open(&mut opener, &bytes).is_err());
            let mut datagram = bytes;
            if let Some(first) = datagram.first_mut() {
                *first = VERSION;
            }
            prop_assert!(open(&mut opener, &datagram).is_err());
        }

        /// The rule: each number once, unless it is too far below the highest.
        #[test]
        fn a_window_takes_each_number_once(numbers in prop::collection::vec(0_u64..600, 1..300)) {
            let mut window = Window::default();
            let mut received = BTreeSet::new();
            for number in numbers {
                let highest = received.last().copied().unwrap_or(0);
                let recent = number + 128 > highest;
                prop_assert_eq!(window.takes(number), recent && !received.contains(&number));
                if window.takes(number) {
                    window.take(number);
                    received.insert(number);
                }
            }
        }
    }
}
