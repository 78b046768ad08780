//! The voter's side of the store over the network.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use keel_net::{BoxFuture, Bytes, Handler, PeerId, Reply, RpcError};
use serde::Serialize;
use tokio::sync::mpsc;

use super::turns::Turns;
use super::wire::{Answer, Entry, Failure, Follow, Listed, Outcome, Revised, Transaction};
use crate::encoding::{WireError, decode, kind, payload};
use crate::interface::{Changes, LeaseId, Listing, Store, StoreError, Watch};

/// Bytes of entries gathered for one item of a list.
const LIST_ITEM_BYTES: usize = 1 << 20;
/// Watches that are told of changes at once, and the time that this takes at least: where there are
/// no more watches than that nobody waits, and thousand watches are told within some 50 ms. One
/// change may concern thousands of them; told as fast as possible they would take all cores from
/// what commits the next change, here and on other nodes. A watch that has its turn is told of all
/// that it has not read, so more changes do not make the delay longer.
const WATCHES_AT_ONCE: usize = 32;
const WATCH_TURN: Duration = Duration::from_millis(1);
/// Renewals that are answered at once. A heartbeat may confirm hundreds, and all that sending would
/// come before the answers to requests that arrive meanwhile.
const RENEWALS_AT_ONCE: usize = 8;
/// Changes of a watch that may wait to be sent.
const CHANGES_QUEUED: usize = 4;
/// Serves the store's requests from a [`Store`]. Only nodes are permitted.
#[derive(Clone)]
pub struct StoreHandler {
    store: Arc<dyn Store>,
    watches: Turns,
    renewals: Turns,
}

impl StoreHandler {
    /// Serves `store`.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            watches: Turns::new(WATCHES_AT_ONCE, Some(WATCH_TURN)),
            renewals: Turns::new(RENEWALS_AT_ONCE, None),
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
                let watch = store.watch(&follow.prefix, follow.from).await;
                let (items, stream) = mpsc::channel(CHANGES_QUEUED);
                tokio::spawn(send_changes(watch, items, self.watches.clone()));
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

async fn send_changes(watch: Result<Watch, StoreError>, to: mpsc::Sender<Bytes>, turns: Turns) {
    let mut watch = match watch {
        Ok(watch) => watch,
        Err(error) => {
            if let Ok(item) = item::<Revised>(Err(error)) {
                to.send(item).await.ok();
            }
            return;
        }
    };
    let begun = Revised {
        revision: 0,
        changes: Vec::new(),
    };
    let Ok(begun) = item(Ok(begun)) else { return };
    if to.send(begun).await.is_err() {
        return;
    }
    loop {
        let next = tokio::select! {
            () = to.closed() => return,
            next = watch.next() => next,
        };
        let Some(next) = next else { return };
        // Nobody waits for one that reads slowly.
        let Ok(place) = to.reserve().await else {
            return;
        };
        let sent = turns.take(|| send_all(next, place, &mut watch, &to)).await;
        if sent.is_none() {
            return;
        }
    }
}

/// Sends a change and those after it that are known, as far as there are places. `None` when there
/// is nothing more to send.
fn send_all<'a>(
    mut next: Result<Changes, StoreError>,
    mut place: mpsc::Permit<'a, Bytes>,
    watch: &mut Watch,
    to: &'a mpsc::Sender<Bytes>,
) -> Option<()> {
    loop {
        place.send(item(next.map(Revised::from)).ok()?);
        let Ok(another) = to.try_reserve() else {
            return Some(());
        };
        place = another;
        let Some(known) = watch.next().now_or_never() else {
            return Some(());
        };
        next = known?;
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::time::Instant;

    use super::*;

    /// More changes must not make the others wait for longer.
    #[tokio::test(start_paused = true)]
    async fn a_watch_is_told_in_one_turn_of_all_that_it_has_not_read() {
        let changes = (1..4).map(|revision| {
            let changes = Vec::new();
            Ok(Changes { revision, changes })
        });
        let changes = futures::stream::iter(changes).chain(futures::stream::pending());
        let (items, mut told) = mpsc::channel(CHANGES_QUEUED);
        let turns = Turns::new(1, Some(WATCH_TURN));
        let watch = Ok(Watch::new(changes.boxed()));
        let task = tokio::spawn(send_changes(watch, items, turns));
        let begun = Instant::now();
        let mut revisions = Vec::new();
        for _ in 0..4 {
            let item = told.recv().await.unwrap();
            let answer: Answer<Revised> = decode("changes", &item).unwrap();
            revisions.push(answer.unwrap().revision);
        }
        assert_eq!(revisions, [0, 1, 2, 3]);
        assert_eq!(begun.elapsed(), Duration::ZERO);
        drop(told);
        task.await.unwrap();
    }
}
