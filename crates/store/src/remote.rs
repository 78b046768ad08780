//! The store of another node, over the network.
//!
//! Requests go to the voter that answered last; one that was certainly not executed is retried at
//! the next voter. A change whose connection is lost after it was sent is [`StoreError::Unknown`];
//! a read can be repeated.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use keel_net::rpc::StreamReceiver;
use keel_net::{BoxFuture, Bytes, NodeName, Peers, RpcError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::wire::{Answer, Entry, Follow, Listed, Outcome, Revised, Transaction};
use super::{
    Changes, KeyValue, LIST_BYTES_MAX, LIST_ENTRIES_MAX, LeaseId, Listing, Revision, Store,
    StoreError, Txn, TxnOutcome, Watch, model,
};
use crate::encoding::{decode, kind, payload};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// No effect: retry.
    Reads,
    /// The change may have been made.
    Changes,
}

/// The voters' store, accessed through the connection pool.
pub struct RemoteStore {
    peers: Arc<Peers>,
    voters: RwLock<Vec<NodeName>>,
    current: AtomicUsize,
    timeout: Duration,
}

impl RemoteStore {
    /// A store at `voters`, whose addresses `peers` knows. Each request takes at most `timeout` in
    /// total.
    pub fn new(peers: Arc<Peers>, voters: Vec<NodeName>, timeout: Duration) -> Self {
        Self {
            peers,
            voters: RwLock::new(voters),
            current: AtomicUsize::new(0),
            timeout,
        }
    }

    /// Replaces the voters.
    pub fn set_voters(&self, voters: Vec<NodeName>) {
        *self.voters.write().unwrap_or_else(PoisonError::into_inner) = voters;
    }

    fn voters(&self) -> Vec<NodeName> {
        let voters = self.voters.read().unwrap_or_else(PoisonError::into_inner);
        voters.clone()
    }

    /// Sends one request and reads its answer.
    async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        kind: u16,
        request: &Q,
        effect: Effect,
    ) -> Result<A, StoreError> {
        let request = encoded(request)?;
        let deadline = Instant::now() + self.timeout;
        let answer = self
            .try_voters(effect, |voter| {
                let request = request.clone();
                async move {
                    let rest = deadline.saturating_duration_since(Instant::now());
                    self.peers.call(&voter, kind, request, rest).await
                }
            })
            .await?;
        let answer: Answer<A> =
            decode("an answer of the store", &answer).map_err(|e| match effect {
                Effect::Reads => StoreError::unavailable(e),
                Effect::Changes => StoreError::Unknown {
                    reason: e.to_string(),
                },
            })?;
        Ok(answer?)
    }

    async fn open(
        &self,
        kind: u16,
        request: &impl Serialize,
    ) -> Result<StreamReceiver, StoreError> {
        let request = encoded(request)?;
        let opening = self.try_voters(Effect::Reads, |voter| {
            let request = request.clone();
            async move { self.peers.stream(&voter, kind, request).await }
        });
        match tokio::time::timeout(self.timeout, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(self.timeout_error()),
        }
    }

    fn timeout_error(&self) -> StoreError {
        let ms = self.timeout.as_millis();
        StoreError::unavailable(format!("no answer within {ms} ms"))
    }

    /// Tries the voters in turn, the last good one first, as long as a request
    /// was certainly not executed. One more try than there are voters: the
    /// first connection may have been lost without notice.
    async fn try_voters<T, F>(
        &self,
        effect: Effect,
        attempt: impl Fn(NodeName) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, RpcError>>,
    {
        let voters = self.voters();
        let first = self.current.load(Ordering::Relaxed);
        let mut missing = Vec::new();
        for turn in first..=first.saturating_add(voters.len()) {
            let Some(voter) = voters.get(turn % voters.len().max(1)) else {
                break;
            };
            match attempt(voter.clone()).await {
                Ok(answer) => {
                    self.current.store(turn % voters.len(), Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) if effect == Effect::Changes && !error.certainly_not_executed() => {
                    return Err(StoreError::Unknown {
                        reason: error.to_string(),
                    });
                }
                Err(error) => missing.push(error.to_string()),
            }
        }
        missing.dedup();
        match missing.is_empty() {
            true => Err(StoreError::unavailable("no voter of the store is known")),
            false => Err(StoreError::unavailable(missing.join("; "))),
        }
    }

    async fn read_list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let mut items = self.open(kind::LIST, &prefix).await?;
        let mut entries: Vec<KeyValue> = Vec::new();
        let mut bytes = 0;
        loop {
            match next::<Listed>(&mut items).await {
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
        }
    }
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

impl Store for RemoteStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>> {
        async move {
            model::check_key(key)?;
            let found: Option<Entry> = self.ask(kind::GET, &key, Effect::Reads).await?;
            Ok(found.map(KeyValue::from))
        }
        .boxed()
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        async move {
            match tokio::time::timeout(self.timeout, self.read_list(prefix)).await {
                Ok(listing) => listing,
                Err(_) => Err(self.timeout_error()),
            }
        }
        .boxed()
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        async move {
            model::check(&txn)?;
            let request = Transaction::from(txn);
            let outcome: Outcome = self.ask(kind::TXN, &request, Effect::Changes).await?;
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
            let mut items = self.open(kind::WATCH, &follow).await?;
            // The first item confirms the watch, or carries the error.
            match tokio::time::timeout(self.timeout, next::<Revised>(&mut items)).await {
                Ok(Some(begun)) => begun?,
                Ok(None) => return Err(StoreError::unavailable("the watch broke off")),
                Err(_) => return Err(self.timeout_error()),
            };
            let changes = futures::stream::unfold(Some(items), |items| async move {
                let mut items = items?;
                let item = match next::<Revised>(&mut items).await {
                    Some(item) => item.map(Changes::from),
                    None => Err(StoreError::unavailable("the watch broke off")),
                };
                let rest = item.is_ok().then_some(items);
                Some((item, rest))
            });
            Ok(Watch::new(changes.boxed()))
        }
        .boxed()
    }

    fn lease_grant(&self, ttl_ms: u64) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        async move {
            let lease: u64 = self
                .ask(kind::LEASE_GRANT, &ttl_ms, Effect::Changes)
                .await?;
            Ok(LeaseId(lease))
        }
        .boxed()
    }

    fn lease_renew(&self, lease: LeaseId) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.ask_owned(kind::LEASE_RENEW, lease.0).boxed()
    }

    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.ask_owned(kind::LEASE_REVOKE, lease.0).boxed()
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        async move { self.ask(kind::REVISION, &(), Effect::Reads).await }.boxed()
    }
}

impl RemoteStore {
    async fn ask_owned<A: DeserializeOwned>(&self, kind: u16, lease: u64) -> Result<A, StoreError> {
        self.ask(kind, &lease, Effect::Changes).await
    }
}

impl fmt::Debug for RemoteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteStore")
            .field("voters", &self.voters())
            .finish()
    }
}
