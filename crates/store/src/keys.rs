//! All keys of the store. No other module builds or parses keys.
//!
//! | key | value |
//! |---|---|
//! | `cluster` | id and incarnation |
//! | `migration` | the cluster whose store is being copied here, while there is no `cluster` yet |
//! | `epoch-base` | offset of a new machine's first epoch to the store's revision |
//! | `voters` | the nodes that hold the store, with addresses, and which of them leads |
//! | `voter-count` | how many voters are wanted: `auto`, 1, 3 or 5 |
//! | `authorities` | the authorities that nodes trust, and which of them signs |
//! | `gossip-keys` | the keys that seal datagrams between nodes, and which of them seals |
//! | `gossip-keys-known` | a node that knows those keys was removed from the cluster |
//! | `certificate/NODE` | when the node's certificate ends, who signed it, and whom the node trusts |
//! | `code/NODE` | programs whose compiled code the node has cached |
//! | `member/NODE` | membership of the node, and its address |
//! | `node/NODE` | the agent's report: labels, capacity |
//! | `alive/NODE` | the node's liveness, attached to its lease: deleted when the node fails |
//! | `machine/MACHINE` | spec, epoch, owner |
//! | `newest-checkpoint/MACHINE` | location of its newest checkpoint |
//! | `in-sync/MACHINE` | its checkpoint that survives the loss of its node, and the nodes that have it |
//! | `volume/VOLUME` | location of a cluster volume, its quota, and its machine |
//! | `schedule/NODE/MACHINE` | the node must run the machine; of one with parts, only its home's node has the entry |
//! | `reservation/NODE/MACHINE` | memory reserved at the node for an incoming machine |
//! | `lease/NAME` | holder of a singleton role of the cluster |
//! | `policy` | the balancing policy |
//! | `move-slot/NUMBER` | holder of one of the tokens for concurrent moves |
//! | `drain/NODE` | the node is being drained: nothing is placed there |
//! | `rules` | all placement rules |
//! | `rule/ID/DOMAIN` | holders of a placement rule's domain |
//! | `node-labels/NODE`, `machine-labels/MACHINE` | labels for placement rules |
//! | `image/IMAGE` | what has this name: a disk that systems begin with, by its hash |
//! | `token/ID` | a join token, hashed |
//! | `user-token/ID` | a user's token, hashed |
//! | `audit/TIME-NUMBER` | a request that was to change something, and whose it was |

use std::fmt;
use std::str::FromStr;

use keel_net::{MachineName, NodeName};
use thiserror::Error;

/// A key of the store. `Display` formats it, `FromStr` parses it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// `cluster`
    Cluster,
    /// `migration`
    Migration,
    /// `epoch-base`
    EpochBase,
    /// `voters`
    Voters,
    /// `voter-count`
    VoterCount,
    /// `authorities`
    Authorities,
    /// `gossip-keys`
    GossipKeys,
    /// `gossip-keys-known`
    GossipKeysKnown,
    /// `certificate/NODE`
    Certificate(NodeName),
    /// `member/NODE`
    Member(NodeName),
    /// `node/NODE`
    Node(NodeName),
    /// `alive/NODE`
    Alive(NodeName),
    /// `code/NODE`
    Code(NodeName),
    /// `machine/MACHINE`
    Machine(MachineName),
    /// `newest-checkpoint/MACHINE`
    Checkpoint(MachineName),
    /// `in-sync/MACHINE`: which nodes have its checkpoint.
    InSync(MachineName),
    /// `volume/VOLUME`; a volume's name has the form of a machine's.
    Volume(MachineName),
    /// `schedule/NODE/MACHINE`
    Schedule(NodeName, MachineName),
    /// `reservation/NODE/MACHINE`
    Reservation(NodeName, MachineName),
    /// `headroom/NODE`: memory that it keeps for failovers.
    Headroom(NodeName),
    /// `lease/NAME`; the role has the form of a name.
    Lease(MachineName),
    /// `policy`
    Policy,
    /// `move-slot/NUMBER`
    MoveSlot(u32),
    /// `drain/NODE`
    Drain(NodeName),
    /// `rules`
    Rules,
    /// `node-labels/NODE`
    NodeLabels(NodeName),
    /// `machine-labels/MACHINE`
    MachineLabels(MachineName),
    /// `rule/ID/DOMAIN`; both have the form of a name.
    Rule(MachineName, MachineName),
    /// `image/IMAGE`; an image's name has the form of a machine's.
    Image(MachineName),
    /// `token/ID`
    Token(TokenId),
    /// `user-token/ID`
    UserToken(TokenId),
    /// `audit/TIME-NUMBER`: milliseconds since 1970-01-01 UTC and a random number, in hex digits.
    Audit(u64, u64),
}

/// The public part of a token: 64 bits, printed as 16 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(pub u64);

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for TokenId {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        let id = u64::from_str_radix(text, 16).map(Self);
        id.ok()
            .filter(|id| id.to_string() == text)
            .ok_or_else(|| KeyError::new(text))
    }
}

/// A text that is not a key of the store.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{key:?} is not the name of anything in the store")]
pub struct KeyError {
    /// The text, cut to 80 characters.
    pub key: String,
}

impl KeyError {
    fn new(key: &str) -> Self {
        Self {
            key: key.chars().take(80).collect(),
        }
    }
}

/// Prefix of all members.
pub const MEMBERS: &str = "member/";
/// Prefix of the audit log.
pub const AUDIT: &str = "audit/";
/// Prefix of the reports of nodes about their certificates.
pub const CERTIFICATES: &str = "certificate/";
/// Prefix of all nodes.
pub const NODES: &str = "node/";
/// Prefix of the nodes whose lease runs.
pub const ALIVE: &str = "alive/";
/// Prefix of the nodes' caches of compiled code.
pub const CODE: &str = "code/";
/// Prefix of all machines.
pub const MACHINES: &str = "machine/";
/// Prefix of machines' newest checkpoints.
pub const CHECKPOINTS: &str = "newest-checkpoint/";
/// Prefix of the nodes that have machines' checkpoints.
pub const IN_SYNC: &str = "in-sync/";
/// Prefix of all volumes of the cluster.
pub const VOLUMES: &str = "volume/";
/// Prefix of all nodes' schedules.
pub const SCHEDULES: &str = "schedule/";
/// Prefix of all nodes' reservations.
pub const RESERVATIONS: &str = "reservation/";
/// Prefix of the memory that nodes keep for failovers.
pub const HEADROOM: &str = "headroom/";
/// Prefix of all roles.
pub const LEASES: &str = "lease/";
/// Prefix of all tokens for moves.
pub const MOVE_SLOTS: &str = "move-slot/";
/// Prefix of the drained nodes.
pub const DRAINS: &str = "drain/";
/// Prefix of all nodes' labels.
pub const NODE_LABELS: &str = "node-labels/";
/// Prefix of all machines' labels.
pub const MACHINE_LABELS: &str = "machine-labels/";
/// Prefix of all domains of all rules.
pub const RULES: &str = "rule/";
/// Prefix of all images that have a name.
pub const IMAGES: &str = "image/";
/// Prefix of all join tokens.
pub const TOKENS: &str = "token/";
/// Prefix of all users' tokens.
pub const USER_TOKENS: &str = "user-token/";

/// Prefix of the schedule of one node.
pub fn schedule_of(node: &NodeName) -> String {
    format!("{SCHEDULES}{node}/")
}

/// Prefix of the reservations at one node.
pub fn reservations_of(node: &NodeName) -> String {
    format!("{RESERVATIONS}{node}/")
}

/// Prefix of the domains of one rule.
pub fn domains_of(rule: &MachineName) -> String {
    format!("{RULES}{rule}/")
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Cluster => f.write_str("cluster"),
            Key::EpochBase => f.write_str("epoch-base"),
            Key::Voters => f.write_str("voters"),
            Key::VoterCount => f.write_str("voter-count"),
            Key::Authorities => f.write_str("authorities"),
            Key::GossipKeys => f.write_str("gossip-keys"),
            Key::GossipKeysKnown => f.write_str("gossip-keys-known"),
            Key::Migration => f.write_str("migration"),
            Key::Certificate(node) => write!(f, "{CERTIFICATES}{node}"),
            Key::Member(node) => write!(f, "{MEMBERS}{node}"),
            Key::Node(node) => write!(f, "{NODES}{node}"),
            Key::Code(node) => write!(f, "{CODE}{node}"),
            Key::Alive(node) => write!(f, "{ALIVE}{node}"),
            Key::Machine(machine) => write!(f, "{MACHINES}{machine}"),
            Key::Checkpoint(machine) => write!(f, "{CHECKPOINTS}{machine}"),
            Key::InSync(machine) => write!(f, "{IN_SYNC}{machine}"),
            Key::Volume(volume) => write!(f, "{VOLUMES}{volume}"),
            Key::Schedule(node, machine) => write!(f, "{SCHEDULES}{node}/{machine}"),
            Key::Reservation(node, machine) => write!(f, "{RESERVATIONS}{node}/{machine}"),
            Key::Headroom(node) => write!(f, "{HEADROOM}{node}"),
            Key::Lease(role) => write!(f, "{LEASES}{role}"),
            Key::Policy => f.write_str("policy"),
            Key::MoveSlot(number) => write!(f, "{MOVE_SLOTS}{number}"),
            Key::Drain(node) => write!(f, "{DRAINS}{node}"),
            Key::Rules => f.write_str("rules"),
            Key::NodeLabels(node) => write!(f, "{NODE_LABELS}{node}"),
            Key::MachineLabels(machine) => write!(f, "{MACHINE_LABELS}{machine}"),
            Key::Rule(rule, domain) => write!(f, "{RULES}{rule}/{domain}"),
            Key::Image(image) => write!(f, "{IMAGES}{image}"),
            Key::Token(id) => write!(f, "{TOKENS}{id}"),
            Key::UserToken(id) => write!(f, "{USER_TOKENS}{id}"),
            Key::Audit(at, number) => write!(f, "{AUDIT}{at:016x}-{number:016x}"),
        }
    }
}

impl From<Key> for String {
    fn from(key: Key) -> String {
        key.to_string()
    }
}

impl FromStr for Key {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        parse(text).ok_or_else(|| KeyError::new(text))
    }
}

fn parse(text: &str) -> Option<Key> {
    let mut parts = text.split('/');
    let kind = parts.next()?;
    let first = parts.next();
    let second = parts.next();
    if parts.next().is_some() {
        return None;
    }
    Some(match (kind, first, second) {
        ("cluster", None, None) => Key::Cluster,
        ("epoch-base", None, None) => Key::EpochBase,
        ("voters", None, None) => Key::Voters,
        ("voter-count", None, None) => Key::VoterCount,
        ("authorities", None, None) => Key::Authorities,
        ("gossip-keys", None, None) => Key::GossipKeys,
        ("gossip-keys-known", None, None) => Key::GossipKeysKnown,
        ("migration", None, None) => Key::Migration,
        ("certificate", Some(node), None) => Key::Certificate(node.parse().ok()?),
        ("member", Some(node), None) => Key::Member(node.parse().ok()?),
        ("node", Some(node), None) => Key::Node(node.parse().ok()?),
        ("code", Some(node), None) => Key::Code(node.parse().ok()?),
        ("alive", Some(node), None) => Key::Alive(node.parse().ok()?),
        ("machine", Some(machine), None) => Key::Machine(machine.parse().ok()?),
        ("newest-checkpoint", Some(machine), None) => Key::Checkpoint(machine.parse().ok()?),
        ("in-sync", Some(machine), None) => Key::InSync(machine.parse().ok()?),
        ("volume", Some(volume), None) => Key::Volume(volume.parse().ok()?),
        ("schedule", Some(node), Some(machine)) => {
            Key::Schedule(node.parse().ok()?, machine.parse().ok()?)
        }
        ("reservation", Some(node), Some(machine)) => {
            Key::Reservation(node.parse().ok()?, machine.parse().ok()?)
        }
        ("headroom", Some(node), None) => Key::Headroom(node.parse().ok()?),
        ("lease", Some(role), None) => Key::Lease(role.parse().ok()?),
        ("policy", None, None) => Key::Policy,
        ("move-slot", Some(number), None) => Key::MoveSlot(number.parse().ok()?),
        ("drain", Some(node), None) => Key::Drain(node.parse().ok()?),
        ("rules", None, None) => Key::Rules,
        ("node-labels", Some(node), None) => Key::NodeLabels(node.parse().ok()?),
        ("machine-labels", Some(machine), None) => Key::MachineLabels(machine.parse().ok()?),
        ("rule", Some(rule), Some(domain)) => Key::Rule(rule.parse().ok()?, domain.parse().ok()?),
        ("image", Some(image), None) => Key::Image(image.parse().ok()?),
        ("token", Some(id), None) => Key::Token(id.parse().ok()?),
        ("user-token", Some(id), None) => Key::UserToken(id.parse().ok()?),
        ("audit", Some(entry), None) => {
            let (at, number) = entry.split_once('-')?;
            let read = |digits| u64::from_str_radix(digits, 16).ok();
            Key::Audit(read(at)?, read(number)?)
        }
        _ => return None,
    })
    // Keys are canonical: upper-case digits, for example, are refused.
    .filter(|key| key.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_both_ways() {
        for text in [
            "cluster",
            "epoch-base",
            "voters",
            "voter-count",
            "authorities",
            "gossip-keys",
            "gossip-keys-known",
            "certificate/a",
            "member/a",
            "node/a-1",
            "alive/a",
            "code/a",
            "machine/web-3",
            "newest-checkpoint/web-3",
            "in-sync/web-3",
            "volume/data",
            "schedule/a/web-3",
            "reservation/a/web-3",
            "headroom/a",
            "lease/balancer",
            "policy",
            "move-slot/17",
            "rules",
            "node-labels/a",
            "machine-labels/web-3",
            "rule/spread/rack-1",
            "image/debian",
            "token/00000000000000ff",
            "user-token/00000000000000ff",
            "audit/0000019a00000000-00000000000000ff",
        ] {
            assert_eq!(
                text.parse::<Key>().map(|k| k.to_string()).as_deref(),
                Ok(text)
            );
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "node",
            "node/",
            "node/A",
            "node/a/b",
            "schedule/a",
            "schedule/a/b/c",
            "token/ff",
            "token/00000000000000FF",
            "image/Debian",
            "other/a",
            "cluster/",
            "policy/a",
            "move-slot/01",
            "move-slot/-1",
            "audit/1-2",
            "audit/0000019a00000000",
        ] {
            assert!(text.parse::<Key>().is_err(), "{text}");
        }
    }

    #[test]
    fn prefixes_end_where_names_do() -> Result<(), keel_net::NameError> {
        let node = NodeName::new("a")?;
        let key = Key::Schedule(NodeName::new("ab")?, MachineName::new("m")?).to_string();
        assert!(!key.starts_with(&schedule_of(&node)));
        Ok(())
    }
}
