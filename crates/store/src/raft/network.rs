//! The voters' requests to each other, over the agents' connections: TLS, both sides
//! authenticated, members only. What carries them is a [`Transport`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use keel_net::{BoxFuture, Bytes, NodeName, Peers, Reply, RpcError};
use openraft::error::{
    Infallible, InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable,
};
use openraft::network::{RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::answer_times::AnswerTimes;
use super::flushes::Flushes;
use super::types::{LogId, Raft, Types, Voter};
use crate::encoding::{decode, kind, payload};

type Failed<E> = RPCError<u64, Voter, E>;

/// Carries requests to the nodes of other voters.
pub(super) trait Transport: Send + Sync {
    /// Sends a request; its answer within `patience`. Polled on the store's thread.
    ///
    /// # Errors
    /// [`RpcError::NotSent`] if the node certainly did not get it.
    fn call(
        &self,
        voter: &Voter,
        kind: u16,
        request: Bytes,
        patience: Duration,
    ) -> BoxFuture<'static, Result<Bytes, RpcError>>;
}

/// The connections of the agent. Those for entries and heartbeats live on the store's thread, where
/// they wait for nothing else that the agent does. Votes go over those of the agent, which are there
/// already: a voter that becomes the leader has no others yet.
pub(super) struct AgentConnections {
    peers: Arc<Peers>,
    /// The agent's runtime. Its connections are shared with the rest of the agent and outlive this
    /// store, so their tasks must not run on the store's own runtime.
    runtime: Handle,
}

impl AgentConnections {
    /// To be called on the agent's runtime.
    pub(super) fn new(peers: Arc<Peers>) -> Self {
        Self {
            peers,
            runtime: Handle::current(),
        }
    }
}

impl Transport for AgentConnections {
    fn call(
        &self,
        voter: &Voter,
        kind: u16,
        request: Bytes,
        patience: Duration,
    ) -> BoxFuture<'static, Result<Bytes, RpcError>> {
        let peer = voter.to_string();
        let not_sent = move |reason: String| RpcError::NotSent { peer, reason };
        let node = match NodeName::new(&voter.node) {
            Ok(node) => node,
            Err(error) => return Box::pin(async move { Err(not_sent(error.to_string())) }),
        };
        if self.peers.address(&node).is_none() {
            self.peers.set_address(&node, &voter.address);
        }
        let peers = self.peers.clone();
        if kind == kind::RAFT_APPEND {
            return Box::pin(
                async move { peers.urgent_call(&node, kind, request, patience).await },
            );
        }
        let calling = async move {
            match kind {
                kind::RAFT_SNAPSHOT => peers.bulk_call(&node, kind, request, patience).await,
                _ => peers.call(&node, kind, request, patience).await,
            }
        };
        let calling = self.runtime.spawn(calling);
        Box::pin(async move {
            let answer = calling.await;
            answer.map_err(|error| not_sent(error.to_string()))?
        })
    }
}

/// The ways to the other voters. Without a [`Transport`] there are none, and the store has one
/// voter.
#[derive(Clone)]
pub(super) struct Network {
    transport: Option<Arc<dyn Transport>>,
    /// What is on this voter's disk.
    flushes: Flushes,
    /// Of each voter.
    times: Arc<Mutex<HashMap<u64, Arc<Mutex<AnswerTimes>>>>>,
}

impl Network {
    pub(super) fn new(transport: Option<Arc<dyn Transport>>, flushes: Flushes) -> Self {
        Self {
            transport,
            flushes,
            times: Arc::default(),
        }
    }

    fn to(&self, target: u64, voter: &Voter) -> Connection {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        Connection {
            transport: self.transport.clone(),
            flushes: self.flushes.clone(),
            target,
            voter: voter.clone(),
            times: times.entry(target).or_default().clone(),
        }
    }

    /// Whether another voter would vote for this one, whose log ends with `last`. One that does not
    /// answer in time would not.
    pub(super) async fn pre_vote(
        &self,
        target: u64,
        voter: &Voter,
        last: Option<LogId>,
        patience: Duration,
    ) -> bool {
        let connection = self.to(target, voter);
        let asked: Result<bool, Failed<Infallible>> =
            connection.send(kind::RAFT_PRE_VOTE, &last, patience).await;
        asked.unwrap_or(false)
    }
}

/// The way to one voter.
pub(super) struct Connection {
    transport: Option<Arc<dyn Transport>>,
    flushes: Flushes,
    target: u64,
    voter: Voter,
    times: Arc<Mutex<AnswerTimes>>,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, voter: &Voter) -> Connection {
        self.to(target, voter)
    }
}

impl Connection {
    fn times(&self) -> MutexGuard<'_, AnswerTimes> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for what `openraft` of the other voter answers.
    async fn ask<Q: Serialize, A: DeserializeOwned, E>(
        &self,
        kind: u16,
        request: &Q,
        timeout: Duration,
    ) -> Result<A, Failed<E>>
    where
        E: std::error::Error + DeserializeOwned,
    {
        let answer: Result<A, E> = self.send(kind, request, timeout).await?;
        answer.map_err(|error| Failed::RemoteError(RemoteError::new(self.target, error)))
    }

    async fn send<Q: Serialize, A: DeserializeOwned, E: std::error::Error>(
        &self,
        kind: u16,
        request: &Q,
        timeout: Duration,
    ) -> Result<A, Failed<E>> {
        let Some(transport) = &self.transport else {
            let error = std::io::Error::other("this store has one voter");
            return Err(unreachable(error));
        };
        let request = payload("a voter's request", &(self.target, request))
            .map_err(|error| Failed::<E>::Network(NetworkError::new(&error)))?;
        let answer = transport.call(&self.voter, kind, request, timeout).await;
        // What was not sent is repeated after a pause; anything else at once.
        let answer = answer.map_err(|error| match error {
            RpcError::NotSent { .. } => Failed::<E>::Unreachable(Unreachable::new(&error)),
            _ => Failed::<E>::Network(NetworkError::new(&error)),
        })?;
        decode("a voter's answer", &answer)
            .map_err(|error| Failed::<E>::Network(NetworkError::new(&error)))
    }
}

impl RaftNetwork<Types> for Connection {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failed<RaftError<u64>>> {
        self.flushes.prompt().await.map_err(unreachable)?;
        let last = request.entries.last().map(|entry| entry.log_id);
        let last = last.or(request.prev_log_id).map(|it| it.index);
        let patience = self.times().patience().min(option.hard_ttl());
        let asked = Instant::now();
        let answer = self.ask(kind::RAFT_APPEND, &request, patience).await;
        let took = asked.elapsed();
        match &answer {
            Ok(_) | Err(Failed::RemoteError(_)) => self.times().answered(took),
            Err(_) if took >= patience => self.times().timed_out(),
            Err(_) => {}
        }
        if let Ok(AppendEntriesResponse::Success | AppendEntriesResponse::PartialSuccess(_)) =
            answer
        {
            // What the other voter has counts once this one has it, too.
            self.flushes.reached(last).await.map_err(unreachable)?;
        }
        answer
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<Types>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failed<RaftError<u64, InstallSnapshotError>>> {
        self.ask(kind::RAFT_SNAPSHOT, &request, option.hard_ttl())
            .await
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, Failed<RaftError<u64>>> {
        self.ask(kind::RAFT_VOTE, &request, option.hard_ttl()).await
    }
}

/// The error after which `openraft` pauses.
fn unreachable<E: std::error::Error>(error: std::io::Error) -> Failed<E> {
    Failed::Unreachable(Unreachable::new(&error))
}

/// Answers another voter's request at the voter `id`.
///
/// # Errors
/// [`RpcError::Refused`] if it cannot be decoded, or is for another voter: this node lost its copy
/// and came back under another number.
pub(super) async fn answer(
    raft: &Raft,
    id: u64,
    kind: u16,
    request: &[u8],
) -> Result<Reply, RpcError> {
    match kind {
        kind::RAFT_APPEND => one(&raft.append_entries(read(id, request)?).await),
        kind::RAFT_VOTE => one(&raft.vote(read(id, request)?).await),
        kind::RAFT_SNAPSHOT => one(&raft.install_snapshot(read(id, request)?).await),
        other => Err(RpcError::refused(format!(
            "kind {other:#06x} is not a request of a voter"
        ))),
    }
}

/// A request for the voter `id`, decoded.
pub(super) fn read<T: DeserializeOwned>(id: u64, request: &[u8]) -> Result<T, RpcError> {
    let (target, request): (u64, T) =
        decode("a voter's request", request).map_err(RpcError::refused)?;
    match target == id {
        true => Ok(request),
        false => Err(RpcError::refused(format!(
            "it is for voter {target}, this is voter {id}"
        ))),
    }
}

pub(super) fn one(answer: &impl Serialize) -> Result<Reply, RpcError> {
    let answer: Bytes = payload("a voter's answer", answer).map_err(RpcError::unknown)?;
    Ok(Reply::One(answer))
}
