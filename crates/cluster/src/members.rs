//! Current membership of the cluster: the keys `member/NODE`.
//!
//! A certificate does not suffice for admission. [`MemberSet`] follows the store, and is consulted
//! at each accept and request, so a removed node is refused immediately. The agent writes
//! `node/NODE`; only joining and removing write `member/NODE`, so a removed node cannot re-register
//! itself.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use keel_net::rpc::MemberCheck;
use keel_net::{Fingerprint, NodeName};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;

use crate::identity::ClusterId;
use keel_store::decoders::Decoder;
use keel_store::encoding::{self, WireError};
use keel_store::keys::{Key, MEMBERS, reservations_of, schedule_of};
use keel_store::{Change, Compare, KeyValue, Store, StoreError, Txn, TxnOutcome};

/// Longest address, in bytes.
pub const ADDRESS_BYTES_MAX: usize = 300;

/// Time between attempts to reach the store again.
const RETRY_AFTER: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub node: NodeName,
    /// Its address for other nodes, `host:port`.
    pub address: String,
    /// When it joined, in milliseconds since 1970.
    pub joined_unix_ms: u64,
    /// The hash of the signing request it joined with.
    pub key: Fingerprint,
}

/// A voter of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voter {
    pub node: NodeName,
    /// Where it is, `host:port`.
    pub address: String,
}

/// The voters of the store, as their leader wrote them last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoterList {
    pub voters: Vec<Voter>,
    /// The one that leads.
    pub leader: Option<NodeName>,
    /// The term of its leadership: counted up by each election.
    pub term: u64,
    /// Their numbers in the group, in the order of `voters`. A node that lost its copy gets another
    /// one.
    #[serde(default)]
    pub numbers: Vec<u64>,
    /// Those that are alive and do not have their copies open: a disk may be full.
    #[serde(default)]
    pub closed: Vec<NodeName>,
}

#[derive(Serialize, Deserialize)]
struct MemberRecord {
    address: String,
    joined_unix_ms: u64,
    key: Fingerprint,
}

#[derive(Serialize, Deserialize)]
struct ClusterRecord {
    id: ClusterId,
    incarnation: u32,
}

/// Decoders of the records here, for fuzzing.
pub(crate) fn decoders() -> Vec<Decoder> {
    vec![
        Decoder::of::<MemberRecord>(),
        Decoder::of::<ClusterRecord>(),
    ]
}

/// Why membership cannot be read or changed.
#[derive(Debug, Error)]
pub enum MemberError {
    /// The store belongs to another cluster.
    #[error("this store is of cluster {0} already")]
    OtherCluster(ClusterId),
    #[error("this store has no cluster yet; make one with `keel up`")]
    NoCluster,
    /// The node is to run machines.
    #[error("node {node} still has machines ({first} …); `keel drain {node}` first")]
    HasMachines {
        node: NodeName,
        /// The key of one of its schedule's entries.
        first: String,
    },
    #[error("node {0} is not a member of this cluster")]
    NotAMember(NodeName),
    #[error("{0:?} is not an address: write host:port")]
    Address(String),
    /// An error of the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Record(#[from] WireError),
}

/// Whether `address` has the form `host:port`, short enough.
///
/// # Errors
/// [`MemberError::Address`].
pub fn check_address(address: &str) -> Result<(), MemberError> {
    let port = address.rsplit_once(':').and_then(|(host, port)| {
        let plain = !host.is_empty() && !host.chars().any(|c| c.is_whitespace() || c.is_control());
        port.parse::<u16>().ok().filter(|port| plain && *port != 0)
    });
    match port {
        Some(_) if address.len() <= ADDRESS_BYTES_MAX => Ok(()),
        _ => Err(MemberError::Address(address.chars().take(80).collect())),
    }
}

pub(crate) fn member_record(
    address: &str,
    joined_unix_ms: u64,
    csr_pem: &str,
) -> Result<Vec<u8>, WireError> {
    let record = MemberRecord {
        address: address.into(),
        joined_unix_ms,
        key: Fingerprint(*blake3::hash(csr_pem.as_bytes()).as_bytes()),
    };
    encoding::encode("a member's record", &record)
}

fn member(key: &str, value: &[u8]) -> Option<Result<Member, WireError>> {
    let Ok(Key::Member(node)) = key.parse() else {
        return None;
    };
    let record = encoding::decode::<MemberRecord>("a member's record", value);
    Some(record.map(|record| Member {
        node,
        address: record.address,
        joined_unix_ms: record.joined_unix_ms,
        key: record.key,
    }))
}

/// Initialises an empty store: cluster ID, first voter and member. Idempotent for the same cluster.
///
/// # Errors
/// [`MemberError::OtherCluster`] when the store has one already.
pub async fn found(
    store: &dyn Store,
    cluster: ClusterId,
    first: &Voter,
    now_unix_ms: u64,
) -> Result<(), MemberError> {
    check_address(&first.address)?;
    let record = ClusterRecord {
        id: cluster,
        incarnation: 1,
    };
    let txn = Txn::new()
        .when_absent(Key::Cluster)
        // Another cluster's store is being moved here.
        .when_absent(Key::Migration)
        .put(
            Key::Cluster,
            encoding::encode("the cluster's record", &record)?,
        )
        .put(
            Key::Voters,
            encoding::encode(
                "the list of voters",
                &VoterList {
                    voters: vec![first.clone()],
                    ..VoterList::default()
                },
            )?,
        )
        .put(
            Key::Member(first.node.clone()),
            member_record(&first.address, now_unix_ms, "")?,
        );
    match store.txn(txn).await? {
        TxnOutcome::Committed { .. } => Ok(()),
        TxnOutcome::Refused { .. } => match cluster_of(store).await? {
            (found, _) if found == cluster => Ok(()),
            (found, _) => Err(MemberError::OtherCluster(found)),
        },
    }
}

/// The cluster's id and incarnation.
///
/// # Errors
/// [`MemberError::NoCluster`] and the store's.
pub async fn cluster_of(store: &dyn Store) -> Result<(ClusterId, u32), MemberError> {
    let entry = store.get(&Key::Cluster.to_string()).await?;
    let entry = entry.ok_or(MemberError::NoCluster)?;
    let record: ClusterRecord = encoding::decode("the cluster's record", &entry.value)?;
    Ok((record.id, record.incarnation))
}

/// The store's voters.
///
/// # Errors
/// [`MemberError::NoCluster`] and the store's.
pub async fn voters(store: &dyn Store) -> Result<VoterList, MemberError> {
    let entry = store.get(&Key::Voters.to_string()).await?;
    let entry = entry.ok_or(MemberError::NoCluster)?;
    read_voters(&entry.value)
}

/// Reads the value of the key `voters`.
///
/// # Errors
/// [`MemberError::Record`] if another version wrote it, or it is damaged.
pub fn read_voters(value: &[u8]) -> Result<VoterList, MemberError> {
    Ok(encoding::decode("the list of voters", value)?)
}

/// Writes the list of voters, if it is another one.
///
/// # Errors
/// [`MemberError::NoCluster`] and the store's.
pub async fn set_voters(store: &dyn Store, list: &VoterList) -> Result<(), MemberError> {
    if voters(store).await? == *list {
        return Ok(());
    }
    let value = encoding::encode("the list of voters", list)?;
    let key = Key::Voters.to_string();
    let txn = Txn::new().when(Compare::Exists { key: key.clone() });
    store.txn(txn.put(key, value)).await?;
    Ok(())
}

/// Raises the incarnation of a cluster whose store was put back to an earlier state, so that all new
/// epochs are above all old ones. The new incarnation.
///
/// # Errors
/// [`MemberError::NoCluster`], [`MemberError::OtherCluster`] and the store's.
pub async fn raise_incarnation(store: &dyn Store, cluster: ClusterId) -> Result<u32, MemberError> {
    loop {
        let entry = store.get(&Key::Cluster.to_string()).await?;
        let entry = entry.ok_or(MemberError::NoCluster)?;
        let mut record: ClusterRecord = encoding::decode("the cluster's record", &entry.value)?;
        if record.id != cluster {
            return Err(MemberError::OtherCluster(record.id));
        }
        record.incarnation += 1;
        let value = encoding::encode("the cluster's record", &record)?;
        let txn = Txn::new().when_modified_at(Key::Cluster, entry.modified);
        if store
            .txn(txn.put(Key::Cluster, value))
            .await?
            .is_committed()
        {
            return Ok(record.incarnation);
        }
    }
}

/// Changes the content of a store that one voter begins anew with: a higher incarnation, so that
/// all new epochs are above all old ones, and this voter alone. The new incarnation, which is also
/// above `known`: the content may be older than another one that was begun anew.
///
/// # Errors
/// [`MemberError::OtherCluster`], [`MemberError::NoCluster`], [`MemberError::NotAMember`] if the
/// voter is none.
pub fn begin_anew(
    entries: &mut [KeyValue],
    cluster: ClusterId,
    voter: &Voter,
    known: u32,
) -> Result<u32, MemberError> {
    let member = Key::Member(voter.node.clone()).to_string();
    if !entries.iter().any(|entry| entry.key == member) {
        return Err(MemberError::NotAMember(voter.node.clone()));
    }
    let mut incarnation = None;
    for entry in entries {
        match entry.key.parse() {
            Ok(Key::Cluster) => {
                let mut record: ClusterRecord =
                    encoding::decode("the cluster's record", &entry.value)?;
                if record.id != cluster {
                    return Err(MemberError::OtherCluster(record.id));
                }
                record.incarnation = record.incarnation.max(known) + 1;
                incarnation = Some(record.incarnation);
                entry.value = encoding::encode("the cluster's record", &record)?;
            }
            Ok(Key::Voters) => {
                let list = VoterList {
                    voters: vec![voter.clone()],
                    ..VoterList::default()
                };
                entry.value = encoding::encode("the list of voters", &list)?;
            }
            _ => {}
        }
    }
    incarnation.ok_or(MemberError::NoCluster)
}

/// The incarnation that the content of a store says; 0 if it says none.
pub fn incarnation_in(entries: &[KeyValue]) -> u32 {
    let key = Key::Cluster.to_string();
    let entry = entries.iter().find(|entry| entry.key == key);
    let record = entry.and_then(|entry| {
        let read = encoding::decode::<ClusterRecord>("the cluster's record", &entry.value);
        read.ok()
    });
    record.map_or(0, |record| record.incarnation)
}

/// All members, by name.
///
/// # Errors
/// The store's, or a record that cannot be read.
pub async fn members(store: &dyn Store) -> Result<Vec<Member>, MemberError> {
    let entries = store.list(MEMBERS).await?.entries;
    let found = entries.iter().filter_map(|e| member(&e.key, &e.value));
    Ok(found.collect::<Result<_, _>>()?)
}

/// Changes a member's address.
///
/// # Errors
/// [`MemberError::NotAMember`], [`MemberError::Address`] and the store's.
pub async fn set_address(
    store: &dyn Store,
    node: &NodeName,
    address: &str,
) -> Result<(), MemberError> {
    check_address(address)?;
    let key = Key::Member(node.clone()).to_string();
    loop {
        let absent = || MemberError::NotAMember(node.clone());
        let entry = store.get(&key).await?.ok_or_else(absent)?;
        let mut record: MemberRecord = encoding::decode("a member's record", &entry.value)?;
        if record.address == address {
            return Ok(());
        }
        record.address = address.into();
        let txn = Txn::new()
            .when_modified_at(key.clone(), entry.modified)
            .put(key.clone(), encoding::encode("a member's record", &record)?);
        // Refused because of a concurrent change: retry.
        if store.txn(txn).await?.is_committed() {
            return Ok(());
        }
    }
}

/// Removes a node from the cluster. It must have no machines in its schedule, and none may be on
/// their way to it.
///
/// # Errors
/// [`MemberError::HasMachines`], [`MemberError::NotAMember`] and the store's.
pub async fn remove(store: &dyn Store, node: &NodeName) -> Result<(), MemberError> {
    let key = Key::Member(node.clone()).to_string();
    let txn = Txn::new()
        .when(Compare::Exists { key: key.clone() })
        .when(Compare::NoneUnder {
            prefix: schedule_of(node),
        })
        .when(Compare::NoneUnder {
            prefix: reservations_of(node),
        })
        .delete(key)
        .delete(Key::Node(node.clone()))
        .delete(Key::NodeLabels(node.clone()))
        .delete(Key::Code(node.clone()))
        .delete(Key::Drain(node.clone()))
        .delete(Key::Headroom(node.clone()))
        .delete(Key::Certificate(node.clone()))
        .delete(Key::Alive(node.clone()))
        // They are replaced for that reason.
        .put(Key::GossipKeysKnown, node.as_str());
    match store.txn(txn).await? {
        TxnOutcome::Committed { .. } => Ok(()),
        TxnOutcome::Refused {
            current: Some(entry),
            ..
        } => Err(MemberError::HasMachines {
            node: node.clone(),
            first: entry.key,
        }),
        TxnOutcome::Refused { current: None, .. } => Err(MemberError::NotAMember(node.clone())),
    }
}

/// The members as last read from the store, also while it is unreachable.
#[derive(Debug)]
pub struct MemberSet {
    members: RwLock<Arc<BTreeMap<NodeName, Member>>>,
    changed: watch::Sender<()>,
}

impl MemberSet {
    /// A set that initially contains `members`.
    pub fn new(members: Vec<Member>) -> Arc<Self> {
        let members = members.into_iter().map(|m| (m.node.clone(), m)).collect();
        Arc::new(Self {
            members: RwLock::new(Arc::new(members)),
            changed: watch::Sender::new(()),
        })
    }

    /// Reads the members and follows the store until the returned task is
    /// aborted or the last other owner of the set is gone.
    ///
    /// # Errors
    /// The store's, when the members cannot be read at first.
    pub async fn follow(
        store: Arc<dyn Store>,
    ) -> Result<(Arc<Self>, tokio::task::JoinHandle<()>), MemberError> {
        let set = Self::new(Vec::new());
        let task = set.follow_store(store).await?;
        Ok((set, task))
    }

    /// As [`MemberSet::follow`], for a set that has what was known before.
    ///
    /// # Errors
    /// The store's, when the members cannot be read at first.
    pub async fn follow_store(
        self: &Arc<Self>,
        store: Arc<dyn Store>,
    ) -> Result<tokio::task::JoinHandle<()>, MemberError> {
        let all = members(store.as_ref()).await?;
        self.set(all.into_iter().map(|m| (m.node.clone(), m)).collect());
        let weak = Arc::downgrade(self);
        Ok(tokio::spawn(async move {
            loop {
                let Some(set) = weak.upgrade() else { return };
                let Err(error) = set.follow_once(store.as_ref()).await else {
                    return;
                };
                tracing::warn!(%error, "the list of members cannot be followed, trying again");
                drop(set);
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }))
    }

    /// Lists and then follows changes; ends with an error, or when this is the only owner of the
    /// set.
    async fn follow_once(self: &Arc<Self>, store: &dyn Store) -> Result<(), MemberError> {
        let listing = store.list(MEMBERS).await?;
        let found = listing.entries.iter();
        let found = found.filter_map(|e| member(&e.key, &e.value));
        let all = found.collect::<Result<Vec<_>, _>>()?;
        self.set(all.into_iter().map(|m| (m.node.clone(), m)).collect());
        let mut watch = store.watch(MEMBERS, listing.revision + 1).await?;
        loop {
            let next = tokio::time::timeout(Duration::from_secs(1), watch.next()).await;
            let Ok(next) = next else {
                match Arc::strong_count(self) {
                    1 => return Ok(()),
                    _ => continue,
                }
            };
            let changes = next.ok_or_else(|| StoreError::unavailable("the watch ended"))??;
            let mut all = self.all().as_ref().clone();
            for change in changes.changes {
                match change {
                    Change::Put(entry) => {
                        if let Some(member) = member(&entry.key, &entry.value).transpose()? {
                            all.insert(member.node.clone(), member);
                        }
                    }
                    Change::Delete { key } => {
                        if let Ok(Key::Member(node)) = key.parse() {
                            all.remove(&node);
                        }
                    }
                }
            }
            self.set(all);
        }
    }

    fn set(&self, members: BTreeMap<NodeName, Member>) {
        *self.members.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(members);
        self.changed.send_replace(());
    }

    /// All members, by name.
    pub fn all(&self) -> Arc<BTreeMap<NodeName, Member>> {
        Arc::clone(&self.members.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether `node` is one.
    pub fn contains(&self, node: &NodeName) -> bool {
        self.all().contains_key(node)
    }

    /// Ticks after each change.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The membership check for a server; it keeps the set alive.
    pub fn check(self: &Arc<Self>) -> MemberCheck {
        let set = Arc::clone(self);
        Arc::new(move |node| set.contains(node))
    }
}
