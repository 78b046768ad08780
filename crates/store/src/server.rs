//! The voter's side of the store over the network.

use std::fmt;
use std::sync::Arc;

use futures::FutureExt;
use keel_net::{BoxFuture, Bytes, Handler, PeerId, Reply, RpcError};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};

use super::watches::{BATCH_REVISIONS, Watches};
use super::wire::{Answer, Entry, Failure, Follow, Listed, Outcome, Transaction};
use crate::encoding::{WireError, decode, kind, payload};
use crate::interface::{LeaseId, Listing, Store, StoreError};

/// Bytes of entries gathered for one item of a list.
const LIST_ITEM_BYTES: usize = 1 << 20;
/// Renewals that are answered at once. One heartbeat may confirm hundreds of them: all that sending
/// would come before the answers to requests that arrive meanwhile.
const AT_ONCE: usize = 8;

/// Serves the store's requests from a [`Store`]. Only nodes are permitted.
#[derive(Clone)]
pub struct StoreHandler {
    store: Arc<dyn Store>,
    watches: Watches,
    renewals: Turns,
}

/// Lets some tasks of many send what they have, while the others wait.
#[derive(Clone)]
struct Turns(Arc<Semaphore>);

impl Turns {
    fn new() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }

    /// Calls `send` when it is the caller's turn. Returns when other tasks had theirs: those that
    /// write what was sent.
    async fn take<T>(&self, send: impl FnOnce() -> T) -> T {
        let turn = self.0.acquire().await;
        let sent = send();
        tokio::task::yield_now().await;
        drop(turn);
        sent
    }
}

impl StoreHandler {
    /// Serves `store`.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            watches: Watches::new(&store),
            renewals: Turns::new(),
            store,
        }
    }

    /// Whether requests of `kind` are the store's.
    pub fn handles(kind: u16) -> bool {
        (kind::GET..=kind::REVISION).contains(&kind)
    }

    /// Answers one request.
    ///
    /// # Errors
    /// [`RpcError::Refused`] if the request cannot be decoded. The store's own errors are part of
    /// the answer.
    pub async fn answer(&self, kind: u16, request: &[u8]) -> Result<Reply, RpcError> {
        let store = &self.store;
        match kind {
            kind::GET => {
                let key: String = read("a get", request)?;
                one(store.get(&key).await.map(|found| found.map(Entry::from)))
            }
            kind::LIST => {
                let prefix: String = read("a list", request)?;
                let listing = store.list(&prefix).await;
                let (items, stream) = mpsc::channel(4);
                tokio::spawn(send_list(listing, items));
                Ok(Reply::Stream(stream))
            }
            kind::TXN => {
                let txn: Transaction = read("a transaction", request)?;
                one(store.txn(txn.into()).await.map(Outcome::from))
            }
            kind::WATCH => {
                let follow: Follow = read("a watch", request)?;
                let (items, stream) = mpsc::channel(BATCH_REVISIONS);
                let watches = self.watches.clone();
                tokio::spawn(watches.send(follow.prefix, follow.from, items));
                Ok(Reply::Stream(stream))
            }
            kind::LEASE_GRANT => {
                let ttl_ms: u64 = read("a lease request", request)?;
                one(store.lease_grant(ttl_ms).await.map(|lease| lease.0))
            }
            kind::LEASE_RENEW => {
                let lease: u64 = read("a lease renewal", request)?;
                let renewed = store.lease_renew(LeaseId(lease)).await;
                self.renewals.take(|| one(renewed)).await
            }
            kind::LEASE_REVOKE => {
                let lease: u64 = read("the end of a lease", request)?;
                one(store.lease_revoke(LeaseId(lease)).await)
            }
            kind::REVISION => one(store.revision().await),
            other => Err(RpcError::refused(format!(
                "kind {other:#06x} is not a request to the store"
            ))),
        }
    }
}

impl Handler for StoreHandler {
    fn permits(&self, peer: &PeerId, _: u16) -> bool {
        matches!(peer, PeerId::Node(_))
    }

    fn call(&self, _: PeerId, kind: u16, payload: Bytes) -> BoxFuture<'_, Result<Reply, RpcError>> {
        async move { self.answer(kind, &payload).await }.boxed()
    }
}

impl fmt::Debug for StoreHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreHandler")
    }
}

fn read<T: serde::de::DeserializeOwned>(what: &'static str, request: &[u8]) -> Result<T, RpcError> {
    decode(what, request).map_err(RpcError::refused)
}

fn one<T: Serialize>(result: Result<T, StoreError>) -> Result<Reply, RpcError> {
    // The change may be committed by now, so an answer that cannot be encoded is not a refusal.
    let payload = item(result).map_err(RpcError::unknown)?;
    Ok(Reply::One(payload))
}

fn item<T: Serialize>(result: Result<T, StoreError>) -> Result<Bytes, WireError> {
    let answer: Answer<T> = result.map_err(Failure::from);
    payload("an answer of the store", &answer)
}

async fn send_list(listing: Result<Listing, StoreError>, to: mpsc::Sender<Bytes>) {
    let listing = match listing {
        Ok(listing) => listing,
        Err(error) => {
            if let Ok(item) = item::<Listed>(Err(error)) {
                to.send(item).await.ok();
            }
            return;
        }
    };
    let mut some: Vec<Entry> = Vec::new();
    let mut bytes = 0;
    for entry in listing.entries {
        bytes += entry.key.len() + entry.value.len();
        some.push(entry.into());
        if bytes < LIST_ITEM_BYTES {
            continue;
        }
        bytes = 0;
        let full = Listed::Some(std::mem::take(&mut some));
        let Ok(item) = item(Ok(full)) else { return };
        if to.send(item).await.is_err() {
            return;
        }
    }
    for last in [Listed::Some(some), Listed::End(listing.revision)] {
        let Ok(item) = item(Ok(last)) else { return };
        if to.send(item).await.is_err() {
            return;
        }
    }
}
