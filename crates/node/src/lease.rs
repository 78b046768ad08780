//! Keeps this node alive in the store: a lease with the key `alive/NODE`, renewed by a thread of
//! its own, independent of busy tasks. One node also records which nodes come and go.
//!
//! The holder counts the time of its lease from before it sent the renewal, so that it knows of the
//! end before anybody else acts on it ([`LeaseTerm`]).

use crate::events::{Events, Note};
use crate::metrics::Metrics;
use crate::role::Role;
use keel_api::EventKind;
use keel_cluster::NodeName;
use keel_store::Store;
use keel_store::StoreError;
use keel_store::clock::boottime;
use keel_store::keys::{self, Key};
use keel_store::{Change, LeaseId, Txn};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Renewals in the time of a lease.
const RENEWALS: u32 = 5;
/// Pause after a failed renewal: the store may have a new leader any moment.
const RENEW_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// What the clocks of two hosts may differ by within the time of a lease, as a part of it: 1 %, a
/// hundred times what clock hardware does.
const DRIFT_PART: u32 = 100;
/// Pause after a failed store access.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A lease, and until when nobody else considers it as ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeaseTerm {
    pub(crate) lease: LeaseId,
    /// When it ends, on CLOCK_BOOTTIME.
    pub(crate) deadline: Duration,
}

/// What this node knows of its lease.
#[derive(Debug, Clone)]
pub(crate) struct NodeLease {
    /// The present lease, or `None` while there is none.
    pub(crate) current: watch::Receiver<Option<LeaseId>>,
    /// Changes with each renewal.
    pub(crate) term: watch::Receiver<Option<LeaseTerm>>,
}

/// Renews until the process ends.
pub(crate) fn keep(
    store: Arc<dyn Store>,
    node: NodeName,
    events: Events,
    metrics: Metrics,
) -> std::io::Result<NodeLease> {
    let (current, current_receiver) = watch::channel(None);
    let (term, term_receiver) = watch::channel(None);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::Builder::new()
        .name("lease".into())
        .spawn(move || {
            // Without the privilege it renews at normal priority.
            let _ = rustix::process::nice(-5);
            let told = Told {
                events,
                metrics,
                current,
                term,
            };
            runtime.block_on(renew_for_ever(&*store, &node, &told));
        })?;
    Ok(NodeLease {
        current: current_receiver,
        term: term_receiver,
    })
}

/// Who is told of the lease.
struct Told {
    events: Events,
    metrics: Metrics,
    current: watch::Sender<Option<LeaseId>>,
    term: watch::Sender<Option<LeaseTerm>>,
}

async fn renew_for_ever(store: &dyn Store, node: &NodeName, told: &Told) {
    let Told {
        events,
        metrics,
        current,
        term,
    } = told;
    let tell = |kind, text: String| events.record(Note::node(kind, text));
    // How long a node counts as alive without a renewal.
    let ttl = Duration::from_millis(store.node_lease_ms());
    let mut late = false;
    loop {
        let begun = tokio::time::Instant::now();
        let sent = boottime();
        let lease = *current.borrow();
        let result = match lease {
            Some(lease) => store.lease_renew(lease).await.map(|_| lease),
            None => match take(store, node).await {
                Ok(lease) => {
                    current.send_replace(Some(lease));
                    late = false;
                    tell(EventKind::LeaseTaken, "this node counts as alive".into());
                    Ok(lease)
                }
                Err(error) => Err(error),
            },
        };
        let rest = match result {
            Ok(lease) => {
                let deadline = sent + ttl - ttl / DRIFT_PART;
                term.send_replace(Some(LeaseTerm { lease, deadline }));
                metrics.lease_renewed(begun.elapsed());
                if late {
                    late = false;
                    tell(EventKind::LeaseRenewed, "the lease is renewed again".into());
                }
                (ttl / RENEWALS).saturating_sub(begun.elapsed())
            }
            Err(StoreError::NoSuchLease { .. }) => {
                current.send_replace(None);
                let text = "the lease ended: this node counted as dead";
                tell(EventKind::LeaseLost, text.into());
                continue;
            }
            Err(error) => {
                if !late {
                    late = true;
                    let text = format!("the lease was not renewed: {error}");
                    tell(EventKind::LeaseLate, text);
                    tracing::warn!(%error, "this node's lease was not renewed");
                }
                RENEW_AGAIN_AFTER
            }
        };
        tokio::time::sleep(rest).await;
    }
}

async fn take(store: &dyn Store, node: &NodeName) -> Result<LeaseId, StoreError> {
    let lease = store.lease_grant(store.node_lease_ms()).await?;
    let txn = Txn::new().put_leased(Key::Alive(node.clone()), Vec::new(), lease);
    store.txn(txn).await?;
    Ok(lease)
}

/// Records which nodes gain and lose their lease, until the process ends. The node with the role
/// does it for all: otherwise every node would record the same.
pub(crate) async fn tell_of_nodes(store: Arc<dyn Store>, events: Events, mut role: Role) {
    let mut alive = None;
    loop {
        while !role.is_held() {
            alive = None;
            role.changed().await;
        }
        tokio::select! {
            followed = follow_nodes(&*store, &events, &mut alive) => {
                if let Err(error) = followed {
                    tracing::warn!(%error, "cannot follow which nodes are alive");
                }
                tokio::time::sleep(RETRY_AFTER).await;
            }
            () = role.changed() => {}
        }
    }
}

/// `alive` is the known state, empty at first.
async fn follow_nodes(
    store: &dyn Store,
    events: &Events,
    alive: &mut Option<BTreeSet<NodeName>>,
) -> Result<(), StoreError> {
    let node_of = |key: &str| match key.parse() {
        Ok(Key::Alive(node)) => Some(node),
        _ => None,
    };
    let listing = store.list(keys::ALIVE).await?;
    let now: BTreeSet<NodeName> = listing
        .entries
        .iter()
        .filter_map(|entry| node_of(&entry.key))
        .collect();
    let known = alive.get_or_insert_with(|| now.clone());
    for node in now.symmetric_difference(&known.clone()) {
        tell_of_node(events, known, node, now.contains(node));
    }
    let mut watch = store.watch(keys::ALIVE, listing.revision + 1).await?;
    while let Some(changes) = watch.next().await {
        for change in changes?.changes {
            if let Some(node) = node_of(change.key()) {
                tell_of_node(events, known, &node, matches!(change, Change::Put(_)));
            }
        }
    }
    Ok(())
}

fn tell_of_node(events: &Events, known: &mut BTreeSet<NodeName>, node: &NodeName, alive: bool) {
    let (changed, kind, text) = if alive {
        let text = format!("node {node} renews its lease");
        (known.insert(node.clone()), EventKind::NodeAlive, text)
    } else {
        let text = format!("node {node} no longer renews its lease");
        (known.remove(node), EventKind::NodeAway, text)
    };
    if changed {
        events.record(Note::node(kind, text).with("of", node));
    }
}
