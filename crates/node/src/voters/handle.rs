//! The handle: this node's copy of the store, the way to the cluster's store, and the requests of
//! other voters.

use crate::context::Settings;
use crate::state_dir::StateDir;
use futures::FutureExt;
use keel_cluster::NodeName;
use keel_cluster::authority_keys::{self, AuthorityKeys};
use keel_cluster::certificates;
use keel_cluster::identity::{CertificateAuthority, ClusterId, NodeIdentity};
use keel_cluster::members::{self, MemberError, MemberSet, Voter};
use keel_cluster::service::ClusterService;
use keel_machine::worker::control::{pack, unpack};
use keel_net::{BoxFuture, Bytes, Handler, PeerId, Peers, Reply, RpcError};
use keel_store::clock::unix_ms;
use keel_store::decoders::Decoder;
use keel_store::{EtcdStore, IfAbsent, RaftOptions, RaftStore, Store, StoreClient, StoreError};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// The leader asks a node to hold a copy of the store.
pub(super) const BECOME_VOTER: u16 = 0x0340;

/// The leader asks a voter for the number of its copy.
pub(super) const COPY: u16 = 0x0341;

/// The node that cares for the cluster's authority asks another one to have its key, too.
pub(super) const TAKE_AUTHORITY: u16 = 0x0342;

/// A node tells another one where it listens.
pub(super) const ADDRESS: u16 = 0x0343;

/// A node asks another one who the voters are.
pub(super) const WHO_VOTES: u16 = 0x0344;

/// Time for a node to take the authority.
const TAKE_PATIENCE: Duration = Duration::from_secs(5);
/// How long the store of another node may take to answer.
const STORE_PATIENCE: Duration = Duration::from_secs(5);
/// How long a copy counts as closed after it stopped: longer than the leader's interval of asking,
/// and than it takes a full disk to refuse the next write.
const STOP_COUNTS: Duration = Duration::from_secs(12);

/// Why this node's copy of the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum VoterError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Members(#[from] MemberError),
    #[error(transparent)]
    Identity(#[from] keel_cluster::identity::IdentityError),
    #[error(transparent)]
    Certificates(#[from] keel_cluster::certificates::CertificateError),
    #[error(
        "the copy of the store in {0} is gone: `keel store restore` brings a backup back; to begin \
         another cluster, remove the whole folder"
    )]
    Lost(PathBuf),
    #[error(
        "the store at {0} has no cluster any more, which was begun there: restore it from etcd's \
         own snapshot, then run `keel recover`; to begin another cluster, remove the whole folder"
    )]
    Forgotten(String),
    #[error("an older copy of the store in {path}: {source}")]
    OldCopy {
        path: String,
        source: std::io::Error,
    },
}

#[derive(Serialize, Deserialize)]
pub(super) struct BecomeVoter {
    /// Its number in the group.
    pub(super) id: u64,
    /// The leader's term.
    pub(super) term: u64,
    pub(super) authority_pem: String,
    pub(super) authority_key_pem: String,
}

/// The cluster's authority, for another node that is to admit others.
#[derive(Serialize, Deserialize)]
pub(super) struct Authority {
    pub(super) certificate_pem: String,
    pub(super) key_pem: String,
}

/// Where a node listens.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ListensAt {
    /// Where connections to it go, `host:port`.
    pub(super) address: String,
}

/// Decoders of what voters are sent, for fuzzing.
pub(crate) fn decoders() -> Vec<Decoder> {
    vec![
        Decoder::of::<BecomeVoter>(),
        Decoder::of::<Authority>(),
        Decoder::of::<ListensAt>(),
        Decoder::of::<Vec<(NodeName, String)>>(),
        Decoder::of::<Option<u64>>(),
    ]
}

/// The way to the cluster's store.
pub(super) enum Engine {
    /// In the cluster's nodes.
    Embedded(Arc<StoreClient>),
    /// Outside of them, and its address.
    External(Arc<EtcdStore>, String),
}

impl Engine {
    fn store(&self) -> Arc<dyn Store> {
        match self {
            Engine::Embedded(client) => client.clone(),
            Engine::External(store, _) => store.clone(),
        }
    }
}

/// What this node serves to others.
#[derive(Default)]
struct Own {
    /// Its copy of the store.
    store: Option<Arc<RaftStore>>,
    /// Requests to that, and of nodes that want to join.
    service: Option<ClusterService>,
}

/// This node's part in the store.
pub(crate) struct Voters {
    pub(super) dir: StateDir,
    pub(super) name: NodeName,
    pub(super) cluster: ClusterId,
    /// The authorities whose keys this node has.
    pub(super) keys: Arc<AuthorityKeys>,
    pub(super) peers: Arc<Peers>,
    /// As this node knows them.
    pub(super) members: Arc<MemberSet>,
    pub(super) engine: Engine,
    settings: Mutex<Settings>,
    /// Held while the settings are changed and written.
    saving: tokio::sync::Mutex<()>,
    own: RwLock<Own>,
    /// Held while another node is given keys and begins to admit others, and while an authority is
    /// made or begins to sign: whoever admits others has all keys.
    pub(super) keys_changing: tokio::sync::Mutex<()>,
    /// Held while a copy is opened or removed.
    changing: tokio::sync::Mutex<()>,
    /// When the leader last asked this node to become a voter.
    asked: Mutex<Option<Instant>>,
    /// This node's copy is damaged: the leader gives it another one.
    is_damaged: AtomicBool,
    /// When this node's copy last stopped.
    stopped_at: Mutex<Option<Instant>>,
}

impl Voters {
    /// Opens this node's copy if it has one; the first node begins the cluster's store.
    ///
    /// # Errors
    /// [`VoterError`] if the only copy is gone or cannot be opened.
    pub(crate) async fn open(
        dir: StateDir,
        identity: &NodeIdentity,
        settings: Settings,
        peers: Arc<Peers>,
        members: Arc<MemberSet>,
    ) -> Result<Arc<Self>, VoterError> {
        for (voter, address) in &settings.voters {
            peers.set_address(voter, address);
        }
        let engine = match &settings.store {
            Some(external) => {
                let store = Arc::new(external.reach().await);
                Engine::External(store, external.address.clone())
            }
            None => {
                let names = settings.voters.iter().map(|(node, _)| node.clone());
                let client = StoreClient::new(peers.clone(), names.collect(), STORE_PATIENCE);
                Engine::Embedded(Arc::new(client))
            }
        };
        let keys = AuthorityKeys::new(authority_keys::load(dir.root())?);
        if !keys.is_empty() {
            // An older version wrote less.
            authority_keys::save(dir.root(), &keys.all())?;
        }
        let voters = Arc::new(Self {
            dir,
            keys,
            name: identity.node.clone(),
            cluster: identity.cluster,
            peers,
            members,
            engine,
            settings: Mutex::new(settings),
            saving: tokio::sync::Mutex::default(),
            own: RwLock::default(),
            keys_changing: tokio::sync::Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            asked: Mutex::default(),
            is_damaged: AtomicBool::new(false),
            stopped_at: Mutex::default(),
        });
        if matches!(voters.engine, Engine::External(..)) {
            voters.admit();
            return Ok(voters);
        }
        if !voters.keys.is_empty() {
            let first = voters.voter();
            let is_alone = voters
                .settings()
                .voters
                .iter()
                .all(|(node, _)| *node == voters.name);
            let if_absent = match (voters.dir.store().exists(), is_alone) {
                (true, _) => IfAbsent::Refuse,
                // Once in a node's life: an empty store would forget everything.
                (false, true) if voters.dir.founded().exists() => {
                    return Err(VoterError::Lost(voters.dir.store()));
                }
                (false, true) => IfAbsent::Found(first),
                // It lost its copy: the leader asks it to become a voter again.
                (false, false) => return Ok(voters),
            };
            match voters.start(if_absent).await {
                // The others go on; it is tried again, or gets another copy.
                Err(error) if !is_alone => voters.tell_closed(&error),
                started => started?,
            }
        }
        Ok(voters)
    }

    /// Writes what a new cluster's store begins with.
    ///
    /// # Errors
    /// [`VoterError`] if the store belongs to another cluster, or does not answer.
    pub(crate) async fn begin_cluster(&self) -> Result<(), VoterError> {
        let store = match &self.engine {
            Engine::Embedded(_) => match self.store() {
                Some(store) if store.status().voters.len() == 1 && store.is_serving() => {
                    store as Arc<dyn Store>
                }
                _ => return Ok(()),
            },
            Engine::External(store, address) => {
                let begins = {
                    let settings = self.settings();
                    let own = settings.voters.iter().all(|(node, _)| *node == self.name);
                    own && self.service().is_some()
                };
                match members::cluster_of(&**store).await {
                    Ok((found, _)) if found != self.cluster => {
                        return Err(MemberError::OtherCluster(found).into());
                    }
                    Ok(_) => return Ok(()),
                    // An empty store would forget everything.
                    Err(MemberError::NoCluster) if !begins || self.dir.founded().exists() => {
                        return Err(VoterError::Forgotten(address.clone()));
                    }
                    Err(MemberError::NoCluster) => store.clone(),
                    Err(error) => return Err(error.into()),
                }
            }
        };
        let first = Voter {
            node: self.name.clone(),
            address: self.settings().listen.to_string(),
        };
        members::found(&*store, self.cluster, &first, unix_ms()).await?;
        let founded = self.dir.founded();
        let marked =
            tokio::task::spawn_blocking(move || crate::state_dir::write_whole(&founded, b""));
        if let Ok(Err(error)) = marked.await {
            tracing::warn!(%error, "cannot note that the cluster's store was begun");
        }
        Ok(())
    }

    /// Admits nodes to a cluster with a store outside of it from now on, if this node has its
    /// authority.
    fn admit(&self) {
        let Engine::External(store, address) = &self.engine else {
            return;
        };
        let service =
            || ClusterService::external(store.clone(), address.clone(), self.keys.clone());
        self.own
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .service = (!self.keys.is_empty()).then(service);
    }

    /// The address of a store outside of the cluster's nodes.
    pub(crate) fn external(&self) -> Option<&str> {
        match &self.engine {
            Engine::Embedded(_) => None,
            Engine::External(_, address) => Some(address),
        }
    }

    /// How long ago the leader asked this node to become a voter.
    pub(super) fn asked_since(&self) -> Option<Duration> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.map(|at| at.elapsed())
    }

    fn voter(&self) -> keel_store::Voter {
        keel_store::Voter {
            node: self.name.to_string(),
            address: self.settings().listen.to_string(),
        }
    }

    async fn start(&self, if_absent: IfAbsent) -> Result<(), VoterError> {
        let peers = Some(self.peers.clone());
        let folder = self.dir.store();
        let opened = RaftStore::open(&folder, if_absent, peers, RaftOptions::default()).await;
        let is_damaged = matches!(opened, Err(StoreError::Damaged { .. }));
        self.is_damaged.store(is_damaged, Ordering::Relaxed);
        let store = Arc::new(opened?);
        let Engine::Embedded(client) = &self.engine else {
            return Ok(());
        };
        let service = ClusterService::new(store.clone(), client.clone(), self.keys.clone());
        client.set_local(Some((self.name.clone(), store.clone())));
        *self.own.write().unwrap_or_else(PoisonError::into_inner) = Own {
            store: Some(store),
            service: Some(service),
        };
        Ok(())
    }

    /// Says why this voter of several has no copy of the store.
    pub(super) fn tell_closed(&self, error: &VoterError) {
        match error {
            VoterError::Store(StoreError::Damaged { path, reason }) => tracing::error!(
                reason,
                "this node's copy of the store in {path} is damaged: it waits for another one"
            ),
            error => tracing::error!(%error, "this node's copy of the store cannot be opened yet"),
        }
    }

    /// Whether this node's copy of the store is damaged, so that it can never be opened.
    pub(super) fn is_damaged(&self) -> bool {
        self.is_damaged.load(Ordering::Relaxed)
    }

    /// Says that this node's copy stopped, and is to be opened again.
    pub(super) fn tell_stopped(&self, reason: &str) {
        tracing::warn!(
            reason,
            "this node's copy of the store stopped; opening it again"
        );
        let mut stopped_at = self
            .stopped_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *stopped_at = Some(Instant::now());
    }

    /// Whether this node has a copy of the store that cannot be relied on now, and is to be opened
    /// again: also one that stopped a moment ago, since a full disk can be read.
    fn is_closed(&self) -> bool {
        let Some(store) = self.store() else {
            return self.dir.store().exists() && !self.is_damaged();
        };
        let stopped_at = *self
            .stopped_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        store.stopped().is_some() || stopped_at.is_some_and(|at| at.elapsed() < STOP_COUNTS)
    }

    /// The cluster's store.
    pub(crate) fn client(&self) -> Arc<dyn Store> {
        self.engine.store()
    }

    /// This node's own copy.
    pub(crate) fn store(&self) -> Option<Arc<RaftStore>> {
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        own.store.clone()
    }

    /// Whether this node leads the store.
    pub(crate) fn leads(&self) -> bool {
        self.store().is_some_and(|store| store.is_serving())
    }

    fn service(&self) -> Option<ClusterService> {
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        own.service.clone()
    }

    /// Whether this node has a copy of the store, or admits nodes.
    pub(super) fn serves(&self) -> bool {
        self.service().is_some()
    }

    pub(crate) fn settings(&self) -> Settings {
        let settings = self.settings.lock();
        settings.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the settings, and writes them for the next start.
    pub(crate) async fn change_settings(&self, change: impl FnOnce(&mut Settings)) {
        let _saving = self.saving.lock().await;
        let (old, new) = {
            let settings = self.settings.lock();
            let mut settings = settings.unwrap_or_else(PoisonError::into_inner);
            let old = settings.clone();
            change(&mut settings);
            (old, settings.clone())
        };
        if old == new {
            return;
        }
        let path = self.dir.settings();
        let saving = tokio::task::spawn_blocking(move || new.save(&path)).await;
        if let Ok(Err(error)) = saving {
            tracing::warn!(%error, "this node's settings are not kept for its next start");
        }
    }

    /// Whether requests of `kind` belong here.
    pub(crate) fn handles(kind: u16) -> bool {
        matches!(
            kind,
            BECOME_VOTER | COPY | TAKE_AUTHORITY | ADDRESS | WHO_VOTES
        ) || ClusterService::handles(kind)
    }

    /// Keeps the key of an authority of the cluster; with a store outside of the cluster, admits
    /// nodes. Idempotent.
    async fn take_authority(&self, from: &PeerId, request: Authority) -> Result<(), RpcError> {
        let is_voter = |node: &NodeName| self.settings().voters.iter().any(|(it, _)| it == node);
        if !from.node().is_some_and(is_voter) {
            return Err(RpcError::refused(
                "only nodes that admit others have its key",
            ));
        }
        let _changing = self.changing.lock().await;
        if self.external().is_none() && self.store().is_none() {
            return Err(RpcError::refused(
                "this cluster's voters have its authority",
            ));
        }
        let Authority {
            certificate_pem,
            key_pem,
        } = request;
        self.keep_authority(&certificate_pem, &key_pem).await?;
        tracing::info!("this node has the key of an authority of the cluster");
        self.admit();
        Ok(())
    }

    async fn keep_authority(&self, certificate_pem: &str, key_pem: &str) -> Result<(), RpcError> {
        let authority = CertificateAuthority::from_pem(self.cluster, certificate_pem, key_pem);
        let authority = authority.map_err(RpcError::refused)?;
        let kept = self.set_keys(self.keys.with(authority)).await;
        kept.map_err(RpcError::failed)
    }

    /// Replaces the keys of authorities that this node has.
    async fn set_keys(&self, keys: Vec<Arc<CertificateAuthority>>) -> Result<(), VoterError> {
        let (root, saved) = (self.dir.root().to_path_buf(), keys.clone());
        blocking(move || authority_keys::save(&root, &saved)).await??;
        self.keys.set(keys);
        Ok(())
    }

    /// Adds the key of a new authority.
    pub(super) async fn add_key(
        &self,
        authority: CertificateAuthority,
    ) -> Result<Arc<CertificateAuthority>, VoterError> {
        let _changing = self.changing.lock().await;
        let added = authority.fingerprint();
        self.set_keys(self.keys.with(authority)).await?;
        let added = self.keys.get(added);
        added.ok_or_else(|| StoreError::unavailable("the new key was removed").into())
    }

    /// Removes the keys of authorities that nodes do not trust any more, unless one is being
    /// replaced.
    pub(crate) async fn retain_keys(&self) -> Result<(), VoterError> {
        if self.keys.is_empty() {
            return Ok(());
        }
        let _changing = self.changing.lock().await;
        // As it is now: the key of a replacement that began since must stay.
        let Some((record, _)) = certificates::read(&*self.client()).await? else {
            return Ok(());
        };
        if record.is_rotating() {
            return Ok(());
        }
        let trusted = record.trusted()?;
        let is_trusted = |it: &Arc<CertificateAuthority>| trusted.contains(&it.fingerprint());
        if self.keys.all().iter().all(is_trusted) {
            return Ok(());
        }
        let mut keys = self.keys.all();
        keys.retain(is_trusted);
        // Without any it could not even be found out which one is missing.
        match keys.is_empty() {
            true => Ok(()),
            false => self.set_keys(keys).await,
        }
    }

    /// Lets another node have the key of an authority.
    pub(super) async fn give_key(
        &self,
        node: &NodeName,
        authority: &CertificateAuthority,
    ) -> Result<(), VoterError> {
        let unavailable = |reason: String| VoterError::Store(StoreError::unavailable(reason));
        let authority = Authority {
            certificate_pem: authority.certificate_pem().to_owned(),
            key_pem: authority.key_pem(),
        };
        let payload = pack(&authority).map_err(|error| unavailable(error.to_string()))?;
        let asked = self
            .peers
            .call(node, TAKE_AUTHORITY, payload, TAKE_PATIENCE)
            .await;
        asked.map_err(|error| unavailable(error.to_string()))?;
        Ok(())
    }

    /// Becomes the voter that the leader asks for. Idempotent.
    async fn become_voter(&self, request: BecomeVoter) -> Result<(), RpcError> {
        if let Some(address) = self.external() {
            let reason = format!("this cluster's store is at {address}");
            return Err(RpcError::refused(reason));
        }
        let _changing = self.changing.lock().await;
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        let may_open = self.dir.store().exists() && !self.is_damaged();
        if self.store().is_none() && may_open && !self.keys.is_empty() {
            // It was closed because its disk could not be written. What cannot be opened is lost:
            // the leader gives the next copy another number.
            if let Err(error) = self.start(IfAbsent::Refuse).await {
                self.tell_closed(&error);
            }
        }
        if let Some(store) = self.store() {
            if store.id() == request.id {
                return Ok(());
            }
            // The leader numbers anew only nodes that are not in the group; an earlier leader may
            // not know that this one is.
            let status = store.status();
            if status.voters.contains_key(&status.id) && request.term < status.term {
                return Err(RpcError::refused(format!(
                    "this node is voter {} of term {}, the request is of term {}",
                    status.id, status.term, request.term
                )));
            }
            drop(store);
            self.close().await.map_err(RpcError::failed)?;
        }
        self.keep_authority(&request.authority_pem, &request.authority_key_pem)
            .await?;
        self.remove_copy().await.map_err(RpcError::failed)?;
        tracing::info!(id = request.id, "this node becomes a voter of the store");
        let starting = self.start(IfAbsent::Join(request.id)).await;
        starting.map_err(RpcError::failed)
    }

    /// Opens the copy again after its disk could not be written.
    pub(super) async fn reopen(&self) -> Result<(), VoterError> {
        let _changing = self.changing.lock().await;
        self.close().await?;
        match self.keys.is_empty() {
            false => self.start(IfAbsent::Refuse).await,
            true => Ok(()),
        }
    }

    /// Stops being a voter and removes the copy and the authority's key.
    pub(super) async fn retire(&self) -> Result<(), VoterError> {
        let _changing = self.changing.lock().await;
        tracing::info!("this node is no longer a voter of the store");
        self.close().await?;
        self.remove_copy().await?;
        let root = self.dir.root().to_path_buf();
        let removing = blocking(move || authority_keys::remove(&root)).await?;
        self.keys.set(Vec::new());
        removing.map_err(|source| VoterError::OldCopy {
            path: self.dir.root().display().to_string(),
            source,
        })
    }

    async fn close(&self) -> Result<(), VoterError> {
        if let Engine::Embedded(client) = &self.engine {
            client.set_local(None);
        }
        let own = {
            let mut own = self.own.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *own)
        };
        drop(own.service);
        let Some(store) = own.store else {
            return Ok(());
        };
        // Requests that are being answered hold it; it must be closed before another one opens.
        let mut store = store;
        for _ in 0..1000 {
            match Arc::try_unwrap(store) {
                Ok(unused) => {
                    tokio::task::spawn_blocking(move || drop(unused)).await.ok();
                    return Ok(());
                }
                Err(used) => store = used,
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(StoreError::unavailable("this node's copy of the store is still in use").into())
    }

    /// Removes this node's copy. A damaged one is kept beside it, for who wants to know why.
    async fn remove_copy(&self) -> Result<(), VoterError> {
        let folder = self.dir.store();
        let removed = match self.is_damaged() {
            true => {
                let aside = folder.with_extension(format!("{}.damaged", unix_ms()));
                tokio::fs::rename(&folder, &aside).await
            }
            false => tokio::fs::remove_dir_all(&folder).await,
        };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(VoterError::OldCopy {
                    path: folder.display().to_string(),
                    source: error,
                })
            }
            _ => Ok(()),
        }
    }
}

/// Runs what waits for the disk apart from the async workers.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| StoreError::unavailable(format!("a task of the agent ended: {error}")))
}

impl Handler for Voters {
    fn permits(&self, peer: &PeerId, kind: u16) -> bool {
        match self.service() {
            Some(service) if ClusterService::handles(kind) => service.permits(peer, kind),
            _ => matches!(peer, PeerId::Node(_)),
        }
    }

    fn call(
        &self,
        peer: PeerId,
        kind: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>> {
        async move {
            if kind == BECOME_VOTER {
                self.become_voter(unpack(&payload)?).await?;
                return Ok(pack(&())?.into());
            }
            if kind == TAKE_AUTHORITY {
                self.take_authority(&peer, unpack(&payload)?).await?;
                return Ok(pack(&())?.into());
            }
            if kind == ADDRESS {
                self.learn_address(&peer, unpack(&payload)?).await?;
                return Ok(pack(&())?.into());
            }
            if kind == WHO_VOTES {
                return Ok(pack(&self.settings().voters)?.into());
            }
            if kind == COPY {
                if self.is_closed() {
                    return Err(RpcError::refused("this node's copy is closed"));
                }
                let id = self.store().map(|store| store.id());
                return Ok(pack(&id)?.into());
            }
            match self.service() {
                Some(service) => service.call(peer, kind, payload).await,
                None => Err(RpcError::refused(match self.external() {
                    Some(_) => "this node does not admit others; `keel status` names those that do",
                    None => "this node has no copy of the store",
                })),
            }
        }
        .boxed()
    }
}
