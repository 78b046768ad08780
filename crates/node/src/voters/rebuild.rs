//! The store begun anew by this node alone, while its agent does not run: after the others were lost
//! for good, or from a backup.

use crate::context::{Settings, SettingsError};
use crate::state_dir::StateDir;
use keel_cluster::NodeName;
use keel_cluster::authority_keys;
use keel_cluster::identity::{IdentityError, NodeIdentity};
use keel_cluster::members::{self, MemberError, Voter, VoterList};
use keel_machine::moves::ownership;
use keel_store::keys::{self, CERTIFICATES, Key};
use keel_store::{
    Backup, BackupError, KeyValue, Listing, RaftStore, Revision, Store, StoreError, Txn,
};
use std::path::{Path, PathBuf};

/// Why the store cannot be begun anew here. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    #[error("{0} has no node; name its folder with --state-dir")]
    NoNode(PathBuf),
    #[error(
        "node {0} was no voter and cannot sign for the cluster: use the folder of one (`keel store \
         status` names them)"
    )]
    NoVoter(NodeName),
    #[error(
        "the cluster's store is at {0}: bring it back with etcd's own snapshots, then `keel recover`"
    )]
    External(String),
    #[error("the cluster's store is at {0} already")]
    IsExternal(String),
    #[error(
        "this node is not the only one that holds the store: {0} hold it. Say `keel store voters 1`, \
         wait until `keel store status` shows one voter, and stop that node (`keel down`)"
    )]
    NotAlone(String),
    #[error(
        "the store at {0} has cluster {1} already; use another prefix (etcd://HOST:PORT/PREFIX)"
    )]
    InUse(String, String),
    #[error(
        "the store at {0} has other entries under its prefix; use another prefix \
         (etcd://HOST:PORT/PREFIX)"
    )]
    NotEmpty(String),
    #[error("the store at {0} was changed by another `keel store migrate` meanwhile; try again")]
    Raced(String),
    #[error("a node runs in {0}: stop it first (`keel down`)")]
    Running(PathBuf),
    #[error("the record of machine {0:?}: {1}")]
    Record(String, String),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the node's settings: {0}")]
    Settings(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Members(#[from] MemberError),
    #[error("the backup: {0}")]
    Backup(#[from] BackupError),
}

impl From<SettingsError> for RebuildError {
    fn from(error: SettingsError) -> Self {
        RebuildError::Settings(error.to_string())
    }
}

/// Revisions of one incarnation of the cluster. A store that begins anew uses none that a former one
/// may have used since its content was copied: what was decided by those is refused, and watches list
/// everything again.
const REVISIONS: Revision = 1 << 28;

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilt {
    pub node: NodeName,
    /// The cluster's new incarnation.
    pub incarnation: u32,
    /// The newest change that is known.
    pub revision: Revision,
    /// Whether the store is outside of the nodes.
    pub is_external: bool,
    /// Nodes that had the store, too, and must never run with their copies again.
    pub others: Vec<NodeName>,
    /// Where the old copy is now.
    pub old: Option<PathBuf>,
}

/// Makes the node in a folder the only voter, with what its copy has. A store outside of the
/// cluster, which was restored to an earlier state, gets a higher incarnation.
///
/// # Errors
/// [`RebuildError`] if the folder is of no voter, or a process has its copy open. Nothing is changed
/// then.
pub async fn recover(state_dir: &Path) -> Result<Rebuilt, RebuildError> {
    let node = Node::open(state_dir)?;
    if let Some(external) = &node.settings.store {
        let store = external.connect().await?;
        let incarnation = members::raise_incarnation(&store, node.identity.cluster).await?;
        enter_incarnation(&store, incarnation).await?;
        let mut txn = Txn::new().delete(Key::Authorities).delete(Key::GossipKeys);
        for entry in store.list(CERTIFICATES).await?.entries {
            txn = txn.delete(entry.key);
        }
        store.txn(txn).await?;
        return Ok(Rebuilt {
            node: node.identity.node.clone(),
            incarnation,
            revision: store.revision().await?,
            is_external: true,
            others: Vec::new(),
            old: None,
        });
    }
    let copy = RaftStore::read_copy(&node.dir.store()).await?;
    node.begin(copy.content, 0).await
}

/// Makes the node in a folder the only voter, with the content of a backup.
///
/// # Errors
/// [`RebuildError`] if the folder is of no voter, or a process has its copy open. Nothing is changed
/// then.
pub async fn restore(state_dir: &Path, backup: &[u8]) -> Result<Rebuilt, RebuildError> {
    let node = Node::open(state_dir)?;
    if let Some(external) = &node.settings.store {
        return Err(RebuildError::External(external.address.clone()));
    }
    let mut known = 0;
    if node.dir.store().exists() {
        // Refused while an agent has it.
        RaftStore::check_unused(&node.dir.store()).await?;
        // A damaged copy is a reason for a restore. What it knew is not known then.
        if let Ok(copy) = RaftStore::read_copy(&node.dir.store()).await {
            known = members::incarnation_in(&copy.content.entries);
        }
    }
    let backup = Backup::decode(backup)?;
    let content = Listing {
        revision: backup.revision,
        entries: without_keys(backup.entries),
    };
    node.begin(content, known).await
}

/// Lets the machines of a store outside of the nodes go on in the cluster's new incarnation, while
/// agents may run.
async fn enter_incarnation(store: &dyn Store, incarnation: u32) -> Result<(), RebuildError> {
    for entry in store.list(keys::MACHINES).await?.entries {
        let mut found = Some(entry);
        while let Some(entry) = found {
            let mut entered = entry.clone();
            ownership::enter_incarnation([&mut entered], incarnation, entry.modified);
            let txn = Txn::new().when_modified_at(entry.key.clone(), entry.modified);
            let written = store.txn(txn.put(entry.key.clone(), entered.value)).await?;
            // It was changed by its node meanwhile, or removed.
            found = match written.is_committed() {
                true => None,
                false => store.get(&entry.key).await?,
            };
        }
    }
    Ok(())
}

/// A content without what nodes trusted at its time: the authority may have been replaced since, and
/// whom this node trusts now decides. The keys of gossip may be known to nodes that were removed
/// since.
fn without_keys(mut entries: Vec<KeyValue>) -> Vec<KeyValue> {
    let is_of_its_time = |key: &str| {
        matches!(
            key.parse(),
            Ok(Key::Authorities | Key::Certificate(_) | Key::GossipKeys | Key::GossipKeysKnown)
        )
    };
    entries.retain(|entry| !is_of_its_time(&entry.key));
    entries
}

/// A node's folder, while no agent runs there.
pub(super) struct Node {
    pub(super) dir: StateDir,
    pub(super) identity: NodeIdentity,
    pub(super) settings: Settings,
}

impl Node {
    /// Opens the folder of a node that can sign for the cluster.
    pub(super) fn open(state_dir: &Path) -> Result<Self, RebuildError> {
        let node = Self::open_any(state_dir)?;
        if authority_keys::load(node.dir.root())?.is_empty() {
            return Err(RebuildError::NoVoter(node.identity.node));
        }
        Ok(node)
    }

    pub(super) fn open_any(state_dir: &Path) -> Result<Self, RebuildError> {
        let none = || RebuildError::NoNode(state_dir.to_path_buf());
        if !StateDir::settings_in(state_dir).exists() {
            return Err(none());
        }
        let dir = StateDir::open(state_dir).map_err(|_| none())?;
        let identity = NodeIdentity::load(dir.root())?.ok_or_else(none)?;
        let settings = Settings::load(&dir.settings())?;
        Ok(Node {
            dir,
            identity,
            settings,
        })
    }

    /// Writes the settings, durably.
    pub(super) fn save_settings(&self) -> Result<(), RebuildError> {
        let path = self.dir.settings();
        let saved = self.settings.save(&path).and_then(|()| {
            std::fs::File::open(&path)?.sync_all()?;
            std::fs::File::open(self.dir.root())?.sync_all()
        });
        saved.map_err(|error| RebuildError::Settings(error.to_string()))
    }

    /// This node as a voter.
    pub(super) fn voter(&self) -> Voter {
        Voter {
            node: self.identity.node.clone(),
            address: self.settings.listen.to_string(),
        }
    }

    /// Begins the store anew, with one voter. `known` is an incarnation that the cluster had.
    async fn begin(mut self, mut content: Listing, known: u32) -> Result<Rebuilt, RebuildError> {
        let name = self.identity.node.clone();
        let voter = self.voter();
        let address = voter.address.clone();
        let others = others(&content, &name)?;
        let cluster = self.identity.cluster;
        let incarnation = members::begin_anew(&mut content.entries, cluster, &voter, known)?;
        let revision = content.revision;
        let first = (revision + REVISIONS).max(u64::from(incarnation) * REVISIONS);
        content.revision = first;
        ownership::enter_incarnation(&mut content.entries, incarnation, first);
        let voter = keel_store::Voter {
            node: name.to_string(),
            address: address.clone(),
        };
        let old = RaftStore::replace(&self.dir.store(), voter, content).await?;
        self.settings.voters = vec![(name.clone(), address)];
        self.save_settings()?;
        Ok(Rebuilt {
            node: name,
            incarnation,
            revision,
            is_external: false,
            others,
            old,
        })
    }
}

fn others(content: &Listing, name: &NodeName) -> Result<Vec<NodeName>, MemberError> {
    let key = Key::Voters.to_string();
    let entry = content.entries.iter().find(|entry| entry.key == key);
    let list = match entry {
        Some(entry) => members::read_voters(&entry.value)?,
        None => VoterList::default(),
    };
    let nodes = list.voters.into_iter().map(|voter| voter.node);
    Ok(nodes.filter(|node| node != name).collect())
}
