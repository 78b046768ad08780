//! Keeps this node alive in the store: a lease with the key `alive/NODE`, renewed by a thread of
//! its own, independent of busy tasks. One node also records which nodes come and go.
//!
//! The holder counts the time of its lease from before it sent the renewal, so that it knows of the
//! end before anybody else acts on it ([`LeaseTerm`]).
//!
//! An agent that is about to be restarted on purpose attaches `alive/NODE` to a longer lease, the
//! *hold*. Its successor renews a lease of its own at once, but leaves the key as it is until no
//! worker relies on the hold any more:
//!
//! ```text
//!   agent      renews a lease        alive/NODE on that lease
//!     │ grant, attach ─────────────▶ alive/NODE on the hold, which says when it ends
//!   workers    may run until the hold's end
//!   successor  renews a lease        alive/NODE on the hold still
//!   workers    may run until the end of the successor's lease
//!     │ attach, revoke ────────────▶ alive/NODE on that lease
//! ```
//!
//! So the key is never gone while a worker may run, wherever the two agents end.

use crate::events::{Events, Note};
use crate::metrics::Metrics;
use crate::role::Role;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use keel_api::EventKind;
use keel_cluster::NodeName;
use keel_net::coarse_timer;
use keel_store::Store;
use keel_store::StoreError;
use keel_store::clock::{boot_id, boottime};
use keel_store::encoding::{decode, encode};
use keel_store::keys::{self, Key};
use keel_store::{Change, Compare, KeyValue, LeaseId, Revision, Txn, TxnOutcome};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

/// Renewals in the time of a lease, and so at most under way.
const RENEWALS: u32 = 5;
/// Pause after a failed renewal: the store may have a new leader any moment.
const RENEW_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// What the clocks of two hosts may differ by within the time of a lease, as a part of it: 1 %, a
/// hundred times what clock hardware does.
const DRIFT_PART: u32 = 100;
/// Pause after a failed store access.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How long a change of `alive/NODE` for a hold may take: no renewal is sent meanwhile.
const CHANGE_WITHIN: Duration = Duration::from_millis(600);
/// How long a node counts as alive while its agent is restarted on purpose.
const HOLD: Duration = Duration::from_secs(60);
/// Name of the value of `alive/NODE` in errors.
const HOLD_VALUE: &str = "the hold of a node whose agent is restarted";

/// A lease, and until when nobody else considers it as ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeaseTerm {
    pub(crate) lease: LeaseId,
    /// When it was asked for, on CLOCK_BOOTTIME.
    pub(crate) sent: Duration,
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
    /// For restarts on purpose.
    pub(crate) hold: HoldHandle,
}

/// Begins and ends the hold of this node.
#[derive(Debug, Clone)]
pub(crate) struct HoldHandle {
    requests: mpsc::UnboundedSender<Request>,
    /// Whether the hold of an earlier agent is in force.
    in_force: watch::Receiver<bool>,
}

#[derive(Debug)]
enum Request {
    Begin(oneshot::Sender<Result<LeaseTerm, StoreError>>),
    End(oneshot::Sender<Result<(), StoreError>>),
}

impl HoldHandle {
    /// Lets the node count as alive for a minute without renewals, which end. The term has the
    /// present lease and the hold's deadline. The caller must end this process then.
    ///
    /// # Errors
    /// The store's; renewals go on then.
    pub(crate) async fn begin(&self) -> Result<LeaseTerm, StoreError> {
        self.ask(Request::Begin).await
    }

    /// Waits until it is known that the hold of an earlier agent is in force.
    pub(crate) async fn wait_in_force(&self) {
        let mut in_force = self.in_force.clone();
        if in_force.wait_for(|in_force| *in_force).await.is_err() {
            // The process ends.
            std::future::pending().await
        }
    }

    pub(crate) fn is_in_force(&self) -> bool {
        *self.in_force.borrow()
    }

    /// Ends the hold of an earlier agent: from now on the node is alive as long as the present
    /// lease. No worker may rely on the hold any more.
    ///
    /// # Errors
    /// The store's; the hold may be in force still.
    pub(crate) async fn end(&self) -> Result<(), StoreError> {
        self.ask(Request::End).await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Request,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let over = || StoreError::unavailable("the thread that renews the lease has ended");
        let request = request(answer);
        self.requests.send(request).map_err(|_| over())?;
        answered.await.map_err(|_| over())?
    }
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
    let (in_force, in_force_receiver) = watch::channel(false);
    let (requests, requested) = mpsc::unbounded_channel();
    let origin = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let keeper = Keeper {
        // How long a node counts as alive without a renewal.
        ttl: Duration::from_millis(store.node_lease_ms()),
        store,
        node,
        told: Told {
            events,
            metrics,
            current,
            term,
            in_force,
        },
        hold: None,
        is_late: false,
    };
    std::thread::Builder::new()
        .name("lease".into())
        .spawn(move || {
            // Without the privilege it renews at normal priority.
            let _ = rustix::process::nice(-5);
            coarse_timer::set_origin(origin);
            // A task costs less than what the thread itself waits for: that wakes the thread once
            // more each time.
            let keeping = runtime.spawn(keeper.run(requested));
            let _ = runtime.block_on(keeping);
        })?;
    Ok(NodeLease {
        current: current_receiver,
        term: term_receiver,
        hold: HoldHandle {
            requests,
            in_force: in_force_receiver,
        },
    })
}

/// Who is told of the lease.
struct Told {
    events: Events,
    metrics: Metrics,
    current: watch::Sender<Option<LeaseId>>,
    term: watch::Sender<Option<LeaseTerm>>,
    in_force: watch::Sender<bool>,
}

impl Told {
    fn event(&self, kind: EventKind, text: String) {
        self.events.record(Note::node(kind, text));
    }
}

/// The value of `alive/NODE` during a hold; it is empty otherwise.
#[derive(Debug, Serialize, Deserialize)]
struct HoldRecord {
    /// The deadline is on this boot's clock: after another one no worker is left.
    boot_id: String,
    /// On CLOCK_BOOTTIME. Until then workers may run.
    deadline_micros: u64,
}

/// A hold of an earlier agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hold {
    /// When the key was attached to it.
    revision: Revision,
    lease: LeaseId,
    deadline: Duration,
}

impl Hold {
    /// The one that an entry of `alive/NODE` says, if workers may rely on it at `now`.
    fn of(entry: &KeyValue, now: Duration, boot_id: &str) -> Option<Self> {
        if entry.value.is_empty() {
            return None;
        }
        let deadline = match decode::<HoldRecord>(HOLD_VALUE, &entry.value) {
            Ok(record) if record.boot_id != boot_id => return None,
            Ok(record) => Duration::from_micros(record.deadline_micros),
            // Of a newer version, whose workers may run for as long as its lease.
            Err(_) => now + HOLD,
        };
        let hold = entry.lease.map(|lease| Self {
            revision: entry.modified,
            lease,
            deadline,
        });
        hold.filter(|hold| now < hold.deadline)
    }
}

fn no_lease() -> StoreError {
    StoreError::unavailable("this node has no lease at the moment")
}

fn slow() -> StoreError {
    let within = CHANGE_WITHIN.as_millis();
    StoreError::unavailable(format!("it did not answer within {within} ms"))
}

/// When a lease ends for its holder that was asked for at `sent`.
fn end_of(sent: Duration, ttl: Duration) -> Duration {
    sent + ttl - ttl / DRIFT_PART
}

/// When a renewal is planned after the one of `now`, which was `planned` earlier, or later if it repeats
/// one that failed. What one is late by, the next is not.
fn next_planned(planned: Instant, now: Instant, period: Duration) -> Instant {
    (planned + period).clamp(now + period / 2, now + period)
}

/// The thread that renews.
struct Keeper {
    store: Arc<dyn Store>,
    node: NodeName,
    ttl: Duration,
    told: Told,
    /// `alive/NODE` is attached to this, not to the present lease.
    hold: Option<Hold>,
    is_late: bool,
}

/// A renewal that was sent, and its answer.
struct Renewal {
    lease: LeaseId,
    /// On CLOCK_BOOTTIME.
    sent: Duration,
    took: Duration,
    answer: Result<(), StoreError>,
}

async fn renew(store: Arc<dyn Store>, lease: LeaseId) -> Renewal {
    let (sent, begun) = (boottime(), Instant::now());
    let answer = store.lease_renew(lease).await;
    Renewal {
        lease,
        sent,
        took: begun.elapsed(),
        answer: answer.map(drop),
    }
}

impl Keeper {
    /// Sends a renewal when it is time, whether the last one was answered or not: the answer of another
    /// site may take longer than the time between two.
    async fn run(mut self, mut requests: mpsc::UnboundedReceiver<Request>) {
        let mut renewals = FuturesUnordered::new();
        let period = self.ttl / RENEWALS;
        let mut due = Instant::now();
        let mut planned = due;
        loop {
            let has_room = renewals.len() < RENEWALS as usize;
            let soon = tokio::select! {
                () = tokio::time::sleep_until(due), if has_room => {
                    planned = next_planned(planned, Instant::now(), period);
                    due = coarse_timer::not_before(planned);
                    let known = *self.told.current.borrow();
                    match known {
                        Some(lease) => {
                            renewals.push(renew(self.store.clone(), lease));
                            None
                        }
                        None => {
                            // Of a lease that ended.
                            renewals.clear();
                            let begun = Instant::now();
                            let taken = self.take().await;
                            self.tell(taken, begun.elapsed())
                        }
                    }
                }
                Some(renewal) = renewals.next() => {
                    let took = renewal.took;
                    let renewed = self.renewed(renewal).await;
                    self.tell(renewed, took)
                }
                Some(request) = requests.recv() => {
                    self.answer(request).await;
                    None
                }
            };
            if let Some(soon) = soon {
                due = due.min(Instant::now() + soon);
            }
        }
    }

    /// Tells how the lease was renewed or taken; when to try again if it was not.
    fn tell(&mut self, outcome: Result<(), StoreError>, took: Duration) -> Option<Duration> {
        match outcome {
            Ok(()) => {
                self.told.metrics.lease_renewed(took);
                if self.is_late {
                    self.is_late = false;
                    let text = "the lease is renewed again".into();
                    self.told.event(EventKind::LeaseRenewed, text);
                }
                None
            }
            Err(StoreError::NoSuchLease { .. }) => {
                self.forget();
                let text = "the lease ended: this node counted as dead";
                self.told.event(EventKind::LeaseLost, text.into());
                Some(Duration::ZERO)
            }
            Err(error) => {
                if !self.is_late {
                    self.is_late = true;
                    let text = format!("the lease was not renewed: {error}");
                    self.told.event(EventKind::LeaseLate, text);
                    tracing::warn!(%error, "this node's lease was not renewed");
                }
                Some(RENEW_AGAIN_AFTER)
            }
        }
    }

    async fn answer(&mut self, request: Request) {
        match request {
            Request::Begin(answer) => {
                let changed = tokio::time::timeout(CHANGE_WITHIN, self.begin_hold()).await;
                let begun = changed.unwrap_or_else(|_| Err(slow()));
                let is_held = begun.is_ok();
                match answer.send(begun) {
                    // The deadline of another renewal would be an earlier one.
                    Ok(()) if is_held => std::future::pending().await,
                    // It may be in force; or it is, and nobody ends this process. It goes on as a
                    // successor would: what is stored decides, once a write has settled it.
                    Ok(()) | Err(_) => self.forget(),
                }
            }
            Request::End(answer) => {
                let changed = tokio::time::timeout(CHANGE_WITHIN, self.end_hold()).await;
                let ended = changed.unwrap_or_else(|_| Err(slow()));
                if ended.is_err() {
                    self.forget();
                }
                drop(answer.send(ended));
            }
        }
    }

    fn key(&self) -> String {
        Key::Alive(self.node.clone()).to_string()
    }

    /// A renewal was answered.
    async fn renewed(&mut self, renewal: Renewal) -> Result<(), StoreError> {
        // One of a lease that is no longer the present one says nothing.
        if *self.told.current.borrow() != Some(renewal.lease) {
            return Ok(());
        }
        renewal.answer?;
        if self.hold.is_some() {
            self.check_hold().await?;
        }
        self.set_term(renewal.lease, renewal.sent);
        Ok(())
    }

    /// Says until when a lease holds that was asked for at `sent`.
    fn set_term(&self, lease: LeaseId, sent: Duration) {
        let mut deadline = end_of(sent, self.ttl);
        if let Some(hold) = self.hold {
            // Until then the node is alive whatever becomes of its lease, and no longer.
            deadline = deadline.min(hold.deadline);
        }
        let term = LeaseTerm {
            lease,
            sent,
            deadline,
        };
        self.told.term.send_if_modified(|known| {
            // Answers may come in another order than their requests were sent.
            let is_newer = known.is_none_or(|known| known.lease != lease || known.sent < sent);
            if is_newer {
                *known = Some(term);
            }
            is_newer
        });
    }

    /// Takes a lease, and attaches `alive/NODE` to it unless workers rely on a hold. The key is
    /// written in either case: a change whose answer was lost cannot be made any more then.
    async fn take(&mut self) -> Result<(), StoreError> {
        let key = self.key();
        let found = self.store.get(&key).await?;
        let sent = boottime();
        let lease = self.store.lease_grant(self.store.node_lease_ms()).await?;
        let hold = found
            .as_ref()
            .and_then(|entry| Hold::of(entry, boottime(), &boot_id()));
        let txn = match &found {
            Some(entry) => Txn::new().when_modified_at(key.clone(), entry.modified),
            None => Txn::new().when_absent(key.clone()),
        };
        let txn = match (found, hold) {
            (Some(entry), Some(hold)) => txn.put_leased(key.clone(), entry.value, hold.lease),
            _ => txn.put_leased(key.clone(), Vec::new(), lease),
        };
        match self.store.txn(txn).await? {
            TxnOutcome::Committed { revision } => {
                self.set_hold(hold.map(|hold| Hold { revision, ..hold }));
                self.set_term(lease, sent);
                self.told.current.send_replace(Some(lease));
                self.is_late = false;
                let text = "this node counts as alive".into();
                self.told.event(EventKind::LeaseTaken, text);
                Ok(())
            }
            TxnOutcome::Refused { .. } => Err(StoreError::unavailable(format!("{key} changed"))),
        }
    }

    /// No lease is known any more: one is taken, and `alive/NODE` read, at the next renewal.
    fn forget(&mut self) {
        self.told.current.send_replace(None);
        self.set_hold(None);
    }

    fn set_hold(&mut self, hold: Option<Hold>) {
        self.hold = hold;
        self.told.in_force.send_replace(hold.is_some());
    }

    /// The node is not alive by its lease yet. If the hold ended, its machines may be another
    /// node's: that counts as the loss of the lease.
    async fn check_hold(&mut self) -> Result<(), StoreError> {
        let found = self.store.get(&self.key()).await?;
        let revision = self.hold.map(|hold| hold.revision);
        if found.map(|entry| entry.modified) != revision {
            self.forget();
            return Err(StoreError::unavailable("the hold of this node ended"));
        }
        Ok(())
    }

    async fn begin_hold(&mut self) -> Result<LeaseTerm, StoreError> {
        let lease = self.told.current.borrow().ok_or_else(no_lease)?;
        let key = self.key();
        let sent = boottime();
        let millis = u64::try_from(HOLD.as_millis()).unwrap_or(u64::MAX);
        let held = self.store.lease_grant(millis).await?;
        let deadline = end_of(sent, HOLD);
        let record = HoldRecord {
            boot_id: boot_id(),
            deadline_micros: u64::try_from(deadline.as_micros()).unwrap_or(u64::MAX),
        };
        let value = encode(HOLD_VALUE, &record).map_err(|error| StoreError::Invalid {
            reason: error.to_string(),
        })?;
        let txn = match self.hold {
            Some(hold) => Txn::new().when_modified_at(key.clone(), hold.revision),
            None => Txn::new().when(Compare::Attached {
                key: key.clone(),
                lease,
            }),
        };
        let txn = txn.put_leased(key, value, held);
        match self.store.txn(txn).await? {
            TxnOutcome::Committed { .. } => Ok(LeaseTerm {
                lease,
                sent,
                deadline,
            }),
            TxnOutcome::Refused { .. } => Err(no_lease()),
        }
    }

    async fn end_hold(&mut self) -> Result<(), StoreError> {
        let lease = self.told.current.borrow().ok_or_else(no_lease)?;
        let Some(hold) = self.hold else {
            return Ok(());
        };
        let key = self.key();
        let txn = Txn::new()
            .when_modified_at(key.clone(), hold.revision)
            .put_leased(key, Vec::new(), lease);
        match self.store.txn(txn).await? {
            TxnOutcome::Committed { .. } => self.set_hold(None),
            TxnOutcome::Refused { .. } => return Err(no_lease()),
        }
        // It has no key any more, and ends by itself if it is not revoked.
        let (store, held) = (self.store.clone(), hold.lease);
        tokio::spawn(async move { store.lease_revoke(held).await });
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn entry(value: Vec<u8>, lease: Option<u64>) -> KeyValue {
        KeyValue {
            key: "alive/a".into(),
            value,
            created: 3,
            modified: 7,
            lease: lease.map(LeaseId),
        }
    }

    fn held(boot_id: &str, until: Duration) -> Vec<u8> {
        let record = HoldRecord {
            boot_id: boot_id.into(),
            deadline_micros: until.as_micros() as u64,
        };
        encode(HOLD_VALUE, &record).unwrap()
    }

    #[test]
    fn renewals_that_are_late_each_time_come_as_often_as_planned() {
        let (period, slot) = (Duration::from_millis(300), Duration::from_millis(64));
        let begun = Instant::now();
        let (mut now, mut planned) = (begun, begun);
        for _ in 0..1_000 {
            planned = next_planned(planned, now, period);
            let slots = planned
                .duration_since(begun)
                .as_nanos()
                .div_ceil(slot.as_nanos());
            let next = begun + slot * slots as u32;
            assert!(next.duration_since(now) <= period + slot);
            now = next;
        }
        let late = now.duration_since(begun + period * 1_000);
        assert!(late < slot, "{late:?} late after all of them");
        // One that failed is repeated early, and one is late by much: no two follow at once.
        let early = next_planned(now + period, now, period);
        assert_eq!(early, now + period);
        let late = next_planned(now, now + 9 * period, period);
        assert_eq!(late, now + 9 * period + period / 2);
    }

    #[test]
    fn a_hold_counts_until_its_end_and_in_its_boot() {
        let until = seconds(100);
        let of = |value, now, boot| Hold::of(&entry(value, Some(5)), now, boot);
        let expected = Hold {
            revision: 7,
            lease: LeaseId(5),
            deadline: until,
        };
        assert_eq!(of(held("x", until), seconds(99), "x"), Some(expected));
        assert_eq!(of(held("x", until), seconds(100), "x"), None);
        assert_eq!(of(held("x", until), seconds(99), "y"), None);
        assert_eq!(of(Vec::new(), seconds(99), "x"), None);
        assert_eq!(
            Hold::of(&entry(held("x", until), None), seconds(99), "x"),
            None
        );
    }

    /// Workers of a newer version may rely on one that cannot be read.
    #[test]
    fn a_hold_of_another_form_counts() {
        let now = seconds(50);
        let hold = Hold::of(&entry(vec![200, 1, 2], Some(5)), now, "x").unwrap();
        assert_eq!(hold.deadline, now + HOLD);
    }
}
