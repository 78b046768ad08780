//! Voters of one store in one process, each with a server of its own on loopback, for tests and
//! measurements of the store alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use keel_cluster::identity::{CertificateAuthority, ClusterId, NodeIdentity};
use keel_net::rpc::{ServerHandle, everyone_is_member};
use keel_net::{
    BoxFuture, Bytes, Handler, NodeName, Options, PeerId, Peers, Reply, RpcError, Server,
};
use keel_store::{IfAbsent, RaftOptions, RaftStore, StoreClient, StoreHandler, Voter};
use tempfile::TempDir;
use tokio::net::TcpListener;

/// One voter: its files outlive it.
pub struct Member {
    pub name: NodeName,
    address: String,
    pub folder: PathBuf,
    pub peers: Arc<Peers>,
    identity: NodeIdentity,
    running: Option<(Arc<RaftStore>, ServerHandle, Arc<AtomicBool>)>,
}

/// A group of voters, and everybody's way to each other.
pub struct Group {
    pub members: BTreeMap<u64, Member>,
    pub options: RaftOptions,
    authority: CertificateAuthority,
    directory: TempDir,
}

struct Requests {
    store: Arc<RaftStore>,
    handler: StoreHandler,
    cut_off: Arc<AtomicBool>,
}

impl Handler for Requests {
    fn call(&self, _: PeerId, kind: u16, payload: Bytes) -> BoxFuture<'_, Result<Reply, RpcError>> {
        Box::pin(async move {
            if RaftStore::handles(kind) && self.cut_off.load(Ordering::Relaxed) {
                // As a lost packet; not for long, because it holds the store.
                tokio::time::sleep(Duration::from_secs(2)).await;
                return Err(RpcError::refused("cut off"));
            }
            match RaftStore::handles(kind) {
                true => self.store.answer(kind, &payload).await,
                false => self.handler.answer(kind, &payload).await,
            }
        })
    }
}

impl Group {
    /// A store of one voter.
    pub async fn of_one(options: RaftOptions) -> Result<Self> {
        let mut group = Self {
            members: BTreeMap::new(),
            options,
            authority: CertificateAuthority::create(ClusterId::random())?,
            directory: tempfile::tempdir()?,
        };
        group.prepare(1).await?;
        let first = group.members[&1].voter();
        group.start(1, IfAbsent::Found(first)).await?;
        Ok(group)
    }

    /// A store of three voters.
    pub async fn of_three(options: RaftOptions) -> Result<Self> {
        let mut group = Self::of_one(options).await?;
        group.grow_to_three().await?;
        Ok(group)
    }

    pub async fn grow_to_three(&mut self) -> Result<()> {
        for id in [2, 3] {
            self.prepare(id).await?;
            self.start(id, IfAbsent::Join(id)).await?;
        }
        let leader = self.store(1);
        for id in [2, 3] {
            leader.add_learner(id, self.members[&id].voter()).await?;
        }
        leader.set_voters(BTreeSet::from([1, 2, 3])).await?;
        Ok(())
    }

    /// Makes a member without a store yet.
    pub async fn prepare(&mut self, id: u64) -> Result<()> {
        let name = NodeName::new(&format!("n{id}"))?;
        let identity = NodeIdentity::first(&self.authority, &name)?;
        let peers = Peers::new(identity.client_tls()?, Options::default());
        let address = {
            let probe = TcpListener::bind("127.0.0.1:0").await?;
            probe.local_addr()?.to_string()
        };
        let member = Member {
            name,
            address,
            folder: self.directory.path().join(format!("n{id}")),
            peers: Arc::new(peers),
            identity,
            running: None,
        };
        self.members.insert(id, member);
        Ok(())
    }

    /// Starts a member's store and server.
    pub async fn start(&mut self, id: u64, if_absent: IfAbsent) -> Result<()> {
        let options = self.options.clone();
        let member = self.members.get_mut(&id).context("no such member")?;
        let peers = Some(member.peers.clone());
        let store = RaftStore::open(&member.folder, if_absent, peers, options).await?;
        let store = Arc::new(store);
        let cut_off = Arc::new(AtomicBool::new(false));
        let requests = Requests {
            store: store.clone(),
            handler: StoreHandler::new(store.clone()),
            cut_off: cut_off.clone(),
        };
        let server = Server::serve(
            TcpListener::bind(&member.address).await?,
            member.identity.server_tls()?,
            everyone_is_member(),
            Arc::new(requests),
            Options::default(),
        )?;
        member.running = Some((store, server, cut_off));
        Ok(())
    }

    /// Ends a member at once; its files stay.
    pub async fn stop(&mut self, id: u64) {
        let member = self.members.get_mut(&id);
        if let Some((store, server, cut_off)) = member.and_then(|member| member.running.take()) {
            drop(cut_off);
            server.shutdown().await;
            let stopping = tokio::task::spawn_blocking(move || {
                let begun = Instant::now();
                let mut store = store;
                // Requests that are being answered hold it, too.
                while begun.elapsed() < Duration::from_secs(40) {
                    match Arc::try_unwrap(store) {
                        Ok(store) => return drop(store),
                        Err(shared) => store = shared,
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                panic!("the store of n{id} is still in use");
            });
            stopping.await.expect("stopping a store");
        }
    }

    /// Cuts a member off from all others, or joins it again. Clients still reach it: it must notice
    /// that it may not answer them.
    pub fn cut_off(&self, id: u64, is_cut: bool) {
        let member = &self.members[&id];
        for other in self.members.values() {
            let address = match is_cut {
                true => "127.0.0.1:1",
                false => &other.address,
            };
            member.peers.set_address(&other.name, address);
        }
        if let Some((_, _, cut_off)) = &member.running {
            cut_off.store(is_cut, Ordering::Relaxed);
        }
    }

    pub fn store(&self, id: u64) -> Arc<RaftStore> {
        let (store, ..) = self.members[&id].running.as_ref().expect("it runs");
        store.clone()
    }

    /// A client's way to the voters.
    pub fn client(&self) -> Result<Arc<StoreClient>> {
        self.client_of(self.members.keys().copied())
    }

    /// A client that knows only some voters.
    pub fn client_of(&self, ids: impl Iterator<Item = u64>) -> Result<Arc<StoreClient>> {
        let name = NodeName::new("client")?;
        let identity = NodeIdentity::first(&self.authority, &name)?;
        let peers = Peers::new(identity.client_tls()?, Options::default());
        for member in self.members.values() {
            peers.set_address(&member.name, &member.address);
        }
        let names = ids.map(|id| self.members[&id].name.clone());
        let timeout = Duration::from_secs(10);
        Ok(Arc::new(StoreClient::new(
            Arc::new(peers),
            names.collect(),
            timeout,
        )))
    }

    /// The member that leads and is not `not`, as soon as there is one.
    pub async fn leader(&self, not: Option<u64>) -> Result<u64> {
        let begun = Instant::now();
        loop {
            let running = self.members.iter().filter_map(|(id, member)| {
                let (store, ..) = member.running.as_ref()?;
                (store.is_serving() && Some(*id) != not).then_some(*id)
            });
            if let Some(id) = running.into_iter().next() {
                return Ok(id);
            }
            if begun.elapsed() > Duration::from_secs(60) {
                let running = self.members.values().filter_map(|m| m.running.as_ref());
                let states: Vec<_> = running.map(|(store, ..)| store.status()).collect();
                bail!("no voter leads within a minute: {states:#?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Member {
    pub fn voter(&self) -> Voter {
        Voter {
            node: self.name.to_string(),
            address: self.address.clone(),
        }
    }
}
