//! The cluster's store, wherever its leader is: at this node or over the network.
//!
//! Requests go to the voter that answered last; one that does not lead names the leader. What was
//! certainly not executed is retried at the next voter until the time of the request is over, so a
//! change of the leader is a pause and no error. A change whose connection is lost after it was
//! sent is [`StoreError::Unknown`]; reads and renewals can be repeated.
//!
//! Renewals go over the connections for urgent requests, on the runtime of whoever renews, so that
//! a lease does not end because other tasks of the node stand still.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use keel_net::rpc::StreamReceiver;
use keel_net::{BoxFuture, Bytes, NodeName, Peers, RpcError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::wire::{Answer, Entry, Follow, Listed, Outcome, Revised, Transaction};
use crate::encoding::{decode, kind, payload};
use crate::interface::{
    Changes, KeyValue, LIST_BYTES_MAX, LIST_ENTRIES_MAX, LeaseId, Listing, Revision, Store,
    StoreError, Txn, TxnOutcome, Watch,
};
use crate::model;
use crate::raft::RaftStore;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// None, or the same when it is repeated: retry.
    Repeatable,
    /// A lease gets its full time again. The same when it is repeated, and useless when late.
    Renewal,
    /// The change may have been made.
    Changes,
}

/// Pause before the voters are tried again.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// Time for one voter to answer what can be repeated: it may be stopped, with its connections
/// open.
const VOTER_PATIENCE: Duration = Duration::from_millis(1500);

/// Time for one voter to answer a renewal before the next one is asked too, and for all of them
/// together: a quarter and two thirds of the shortest lease that nodes depend on. A leader answers
/// with its next heartbeat, which other sites may confirm after 100 ms; much later if what is copied
/// fills the links between them.
const RENEWAL_VOTER_PATIENCE: Duration = Duration::from_millis(400);
const RENEWAL_PATIENCE: Duration = Duration::from_millis(1000);

/// The voters' store, accessed through the connection pool, or directly if this node leads.
pub struct StoreClient {
    peers: Arc<Peers>,
    voters: RwLock<Vec<NodeName>>,
    /// This node's own voter, and its name.
    local: RwLock<Option<(NodeName, Arc<RaftStore>)>>,
    /// Index of the voter that is asked first.
    current: AtomicUsize,
    timeout: Duration,
}

impl StoreClient {
    /// A store at `voters`, whose addresses `peers` knows. Each request takes at most `timeout` in
    /// total.
    pub fn new(peers: Arc<Peers>, voters: Vec<NodeName>, timeout: Duration) -> Self {
        Self {
            peers,
            voters: RwLock::new(voters),
            local: RwLock::default(),
            current: AtomicUsize::new(0),
            timeout,
        }
    }

    /// Replaces the voters.
    pub fn set_voters(&self, voters: Vec<NodeName>) {
        *self.voters.write().unwrap_or_else(PoisonError::into_inner) = voters;
    }

    /// Says that this node, `node`, has a voter itself, or no longer.
    pub fn set_local(&self, local: Option<(NodeName, Arc<RaftStore>)>) {
        *self.local.write().unwrap_or_else(PoisonError::into_inner) = local;
    }

    /// This node's own voter.
    pub fn local(&self) -> Option<Arc<RaftStore>> {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        local.as_ref().map(|(_, store)| store.clone())
    }

    /// This node's own voter, if it leads.
    fn leading(&self) -> Option<Arc<RaftStore>> {
        self.local().filter(|store| store.is_serving())
    }

    /// The other voters.
    fn voters(&self) -> Vec<NodeName> {
        let own = {
            let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
            local.as_ref().map(|(node, _)| node.clone())
        };
        let voters = self.voters.read().unwrap_or_else(PoisonError::into_inner);
        let others = voters.iter().filter(|voter| Some(*voter) != own.as_ref());
        others.cloned().collect()
    }

    /// Asks until the request is answered, its fate is unknown, or its time is over.
    async fn ask<Q, A, F>(
        &self,
        kind: u16,
        request: &Q,
        effect: Effect,
        locally: impl Fn(Arc<RaftStore>) -> F,
    ) -> Result<A, StoreError>
    where
        Q: Serialize,
        A: DeserializeOwned,
        F: Future<Output = Result<A, StoreError>>,
    {
        let request = encoded(request)?;
        self.try_voters(effect, locally, |voter, rest| {
            let request = request.clone();
            async move {
                let answer = match effect {
                    Effect::Renewal => self.peers.urgent_call(&voter, kind, request, rest).await?,
                    Effect::Repeatable | Effect::Changes => {
                        self.peers.call(&voter, kind, request, rest).await?
                    }
                };
                Ok(decode::<Answer<A>>("an answer of the store", &answer)
                    .map_err(|e| match effect {
                        Effect::Repeatable | Effect::Renewal => StoreError::unavailable(e),
                        Effect::Changes => StoreError::Unknown {
                            reason: e.to_string(),
                        },
                    })
                    .and_then(|answer| answer.map_err(StoreError::from)))
            }
        })
        .await
    }

    /// The first item of a stream of a voter, and the stream. `within` is the time for that item,
    /// which confirms the stream or carries the error.
    async fn open<T: DeserializeOwned>(
        &self,
        voter: NodeName,
        kind: u16,
        request: Bytes,
        within: Duration,
    ) -> Result<Result<(T, StreamReceiver), StoreError>, RpcError> {
        let opening = async {
            let mut items = self.peers.stream(&voter, kind, request).await?;
            let first = next::<T>(&mut items).await;
            let first = first.unwrap_or_else(|| Err(StoreError::unavailable("it broke off")));
            Ok(first.map(|first| (first, items)))
        };
        let slow = || RpcError::NotSent {
            peer: format!("node {voter}"),
            reason: format!("no answer within {} ms", within.as_millis()),
        };
        tokio::time::timeout(within, opening)
            .await
            .unwrap_or_else(|_| Err(slow()))
    }

    /// Tries this node's voter if it leads, else the others in turn, the last good one first, as
    /// long as the request was certainly not executed.
    async fn try_voters<T, F, L>(
        &self,
        effect: Effect,
        locally: impl Fn(Arc<RaftStore>) -> L,
        attempt: impl Fn(NodeName, Duration) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<Result<T, StoreError>, RpcError>>,
        L: Future<Output = Result<T, StoreError>>,
    {
        let timeout = match effect {
            Effect::Renewal => self.timeout.min(RENEWAL_PATIENCE),
            Effect::Repeatable | Effect::Changes => self.timeout,
        };
        let deadline = Instant::now() + timeout;
        let mut missing = Vec::new();
        // Renewals whose voters have not answered in time; they may still.
        let mut late = FuturesUnordered::new();
        loop {
            if let Some(store) = self.leading() {
                match locally(store).await {
                    Err(StoreError::NotLeader { .. }) => {}
                    answered => return answered,
                }
            }
            let voters = self.voters();
            missing.clear();
            let mut turn = self.current.load(Ordering::Relaxed);
            // One more try than there are voters: the first connection may have been lost without
            // notice.
            for _ in 0..=voters.len() {
                let Some(voter) = voters.get(turn % voters.len().max(1)) else {
                    break;
                };
                let rest = deadline.saturating_duration_since(Instant::now());
                let patience = match effect {
                    Effect::Repeatable if voters.len() > 1 => rest.min(VOTER_PATIENCE),
                    Effect::Renewal if voters.len() > 1 => rest.min(RENEWAL_VOTER_PATIENCE),
                    _ => rest,
                };
                let (asked, answer) = match effect {
                    Effect::Renewal => {
                        let asked = turn;
                        let answer = attempt(voter.clone(), rest);
                        late.push(answer.map(move |answer| (asked, answer)));
                        let first = tokio::time::timeout(patience, late.next()).await;
                        first.ok().flatten().unwrap_or_else(|| {
                            let reason = format!("no answer within {} ms", patience.as_millis());
                            let peer = format!("node {voter}");
                            (turn, Err(RpcError::NotSent { peer, reason }))
                        })
                    }
                    Effect::Repeatable | Effect::Changes => {
                        (turn, attempt(voter.clone(), patience).await)
                    }
                };
                match answer {
                    Ok(Err(StoreError::NotLeader { leader })) => {
                        let known = leader.as_ref().and_then(|leader| {
                            voters.iter().position(|voter| voter.as_str() == leader)
                        });
                        missing.push(format!("{voter} does not lead the store"));
                        turn = known.unwrap_or(turn + 1);
                    }
                    Ok(answer) => {
                        self.current.store(asked % voters.len(), Ordering::Relaxed);
                        return answer;
                    }
                    Err(error) if effect == Effect::Changes && !error.certainly_not_executed() => {
                        return Err(StoreError::Unknown {
                            reason: error.to_string(),
                        });
                    }
                    Err(error) => {
                        missing.push(error.to_string());
                        turn += 1;
                    }
                }
                if Instant::now() >= deadline {
                    break;
                }
            }
            let local_may_lead = self.local().is_some();
            if Instant::now() + RETRY_AFTER >= deadline || (voters.len() < 2 && !local_may_lead) {
                break;
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
        missing.dedup();
        match missing.is_empty() {
            true => Err(StoreError::unavailable("no voter of the store is known")),
            false => Err(StoreError::unavailable(missing.join("; "))),
        }
    }

    fn timeout_error(&self) -> StoreError {
        let ms = self.timeout.as_millis();
        StoreError::unavailable(format!("no answer within {ms} ms"))
    }

    /// The rest of a list that began.
    async fn read_list(first: Listed, items: &mut StreamReceiver) -> Result<Listing, StoreError> {
        let mut entries: Vec<KeyValue> = Vec::new();
        let mut bytes = 0;
        let mut item = Some(Ok(first));
        loop {
            match item {
                Some(Ok(Listed::Some(some))) => {
                    for entry in some.into_iter().map(KeyValue::from) {
                        bytes += entry.key.len() + entry.value.len();
                        entries.push(entry);
                    }
                    model::limit("entries in a list", entries.len(), LIST_ENTRIES_MAX)?;
                    model::limit("bytes in a list", bytes, LIST_BYTES_MAX)?;
                }
                Some(Ok(Listed::End(revision))) => return Ok(Listing { revision, entries }),
                Some(Err(error)) => return Err(error),
                None => return Err(StoreError::unavailable("the list broke off")),
            }
            item = next(items).await;
        }
    }
}

/// The changes of a watch that a voter confirmed.
fn watched(items: StreamReceiver) -> Watch {
    let changes = futures::stream::unfold(Some(items), |items| async move {
        let mut items = items?;
        let item = match next::<Revised>(&mut items).await {
            Some(item) => item.map(Changes::from),
            None => Err(StoreError::unavailable("the watch broke off")),
        };
        let rest = item.is_ok().then_some(items);
        Some((item, rest))
    });
    Watch::new(changes.boxed())
}

fn encoded(request: &impl Serialize) -> Result<Bytes, StoreError> {
    payload("a request to the store", request).map_err(|e| StoreError::Invalid {
        reason: e.to_string(),
    })
}

/// The next item of a stream of the store.
async fn next<T: DeserializeOwned>(items: &mut StreamReceiver) -> Option<Result<T, StoreError>> {
    Some(match items.recv().await? {
        Ok(item) => match decode::<Answer<T>>("an answer of the store", &item) {
            Ok(answer) => answer.map_err(StoreError::from),
            Err(error) => Err(StoreError::unavailable(error)),
        },
        Err(error) => Err(StoreError::unavailable(error)),
    })
}

impl Store for StoreClient {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>> {
        async move {
            model::check_key(key)?;
            let locally =
                |store: Arc<RaftStore>| async move { Ok(store.get(key).await?.map(Entry::from)) };
            let found: Option<Entry> = self
                .ask(kind::GET, &key, Effect::Repeatable, locally)
                .await?;
            Ok(found.map(KeyValue::from))
        }
        .boxed()
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        async move {
            let request = encoded(&prefix)?;
            let locally = |store: Arc<RaftStore>| async move { store.list(prefix).await };
            let reading = self.try_voters(Effect::Repeatable, locally, |voter, within| {
                let request = request.clone();
                async move {
                    let opened = self.open(voter, kind::LIST, request, within).await?;
                    Ok(match opened {
                        Ok((first, mut items)) => Self::read_list(first, &mut items).await,
                        Err(error) => Err(error),
                    })
                }
            });
            match tokio::time::timeout(self.timeout, reading).await {
                Ok(listing) => listing,
                Err(_) => Err(self.timeout_error()),
            }
        }
        .boxed()
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        async move {
            model::check(&txn)?;
            let request = Transaction::from(txn.clone());
            let locally = |store: Arc<RaftStore>| {
                let txn = txn.clone();
                async move { Ok(Outcome::from(store.txn(txn).await?)) }
            };
            let outcome: Outcome = self
                .ask(kind::TXN, &request, Effect::Changes, locally)
                .await?;
            Ok(outcome.into())
        }
        .boxed()
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        from_revision: Revision,
    ) -> BoxFuture<'a, Result<Watch, StoreError>> {
        async move {
            let follow = Follow {
                prefix: prefix.into(),
                from: from_revision,
            };
            let request = encoded(&follow)?;
            let locally =
                |store: Arc<RaftStore>| async move { store.watch(prefix, from_revision).await };
            self.try_voters(Effect::Repeatable, locally, |voter, within| {
                let request = request.clone();
                async move {
                    let opened = self.open::<Revised>(voter, kind::WATCH, request, within);
                    Ok(opened.await?.map(|(_, items)| watched(items)))
                }
            })
            .await
        }
        .boxed()
    }

    fn lease_grant(&self, ttl_ms: u64) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        async move {
            let locally =
                |store: Arc<RaftStore>| async move { Ok(store.lease_grant(ttl_ms).await?.0) };
            let lease: u64 = self
                .ask(kind::LEASE_GRANT, &ttl_ms, Effect::Changes, locally)
                .await?;
            Ok(LeaseId(lease))
        }
        .boxed()
    }

    fn lease_renew(&self, lease: LeaseId) -> BoxFuture<'_, Result<u64, StoreError>> {
        let locally = move |store: Arc<RaftStore>| async move { store.lease_renew(lease).await };
        async move {
            self.ask(kind::LEASE_RENEW, &lease.0, Effect::Renewal, locally)
                .await
        }
        .boxed()
    }

    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        let locally = move |store: Arc<RaftStore>| async move { store.lease_revoke(lease).await };
        async move {
            self.ask(kind::LEASE_REVOKE, &lease.0, Effect::Repeatable, locally)
                .await
        }
        .boxed()
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        let locally = |store: Arc<RaftStore>| async move { store.revision().await };
        async move {
            self.ask(kind::REVISION, &(), Effect::Repeatable, locally)
                .await
        }
        .boxed()
    }
}

impl fmt::Debug for StoreClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreClient")
            .field("voters", &self.voters())
            .finish()
    }
}
