//! The leader's part: when it serves, what it proposes, and when leases end.
//!
//! ```text
//!         elected, own entry applied, barrier passed, every lease its full time
//!   Follower ───────────────────────────────────────────────────▶ Serving(term)
//!      ▲                                                               │
//!      └── another is elected, or no quorum answered for QUORUM_PATIENCE ◀┘
//! ```
//!
//! - *Proposals*: all commands that queued up while earlier ones were written form one entry of
//!   the log (group commit). A proposal whose fate is not known is answered
//!   [`StoreError::Unknown`].
//! - *Barrier*: a read or a renewal is answered after a quorum confirmed, since its arrival, that
//!   this node still leads (Raft thesis, section 6.4). One round answers all that wait. Reads
//!   begin one, renewals wait for it: not for long while one is under way, which takes long where
//!   voters are far apart. A sole voter needs none.
//! - *Heartbeats*: a round tells the voters that this node leads, so rounds take the place of
//!   `openraft`'s heartbeats, which would be as many messages again. One begins at the latest
//!   [`HEARTBEAT`] after the last, answered or not: what voters hear does not depend on how far away
//!   they are.
//! - *Leases*: the ends of leases are proposed with the next entry, before its commands
//!   (`lease_ends.rs` finds them).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use keel_net::coarse_timer;
use openraft::raft::ClientWriteResponse;
use openraft::{RaftMetrics, ServerState};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::deadlines::Deadlines;
use super::log::Log;
use super::types::{Command, CommandOutcome, Proposal, Raft, Types, Voter, stopped};
use crate::clock::Clock;
use crate::interface::{LeaseId, StoreError, TxnOutcome};
use crate::view::View;

/// Commands in one entry of the log.
const BATCH_COMMANDS_MAX: usize = 512;
/// Bytes of commands in one entry, unless one command alone has more.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Entries that are being written and replicated at once: the leader's disk works on one while the
/// followers' work on another.
const PROPOSALS_MAX: usize = 2;
/// Longest time a change may take; a disk may stand still for seconds. After it, its outcome is
/// unknown.
pub(super) const CHANGE_PATIENCE: Duration = Duration::from_secs(30);
/// How often a leader looks at its quorum and its clock: together with its heartbeats.
pub(super) const TICK: Duration = HEARTBEAT;
/// How often a voter that does not lead looks at its disk; all else is told to it.
const FOLLOWER_TICK: Duration = Duration::from_millis(1024);
/// Longest time between the beginnings of two rounds of confirmation, and so the time that a renewal
/// may wait for one: less than the time between two renewals of a node.
/// (Of a length that wakes the thread once, see [`coarse_timer`].)
pub(super) const HEARTBEAT: Duration = Duration::from_millis(256);
/// Shortest time between the beginnings of two rounds while one is under way: reads from far away
/// come in fewer rounds.
const ROUND_EVERY: Duration = Duration::from_millis(20);
/// Shortest time between the beginnings of two rounds for a renewal that came while one was under way.
/// Such rounds take as long as a round trip, and the renewal and its answer take another one, which
/// leaves less of a lease to wait in.
const RENEWAL_ROUND_EVERY: Duration = Duration::from_millis(64);
/// How often `openraft` is asked for heartbeats while no voter lacks anything: it sends them to
/// learners too, and sends again what was lost.
const RESEND_EVERY: Duration = Duration::from_secs(2);
/// A leader that got no answer from a quorum for so long stops serving.
const QUORUM_PATIENCE: Duration = Duration::from_millis(1000);
/// Time for one confirmation by a quorum.
const BARRIER_PATIENCE: Duration = Duration::from_millis(800);
/// Pause before a quorum is asked again; twice as long after each time, up to [`HEARTBEAT`].
const RETRY_AFTER: Duration = Duration::from_millis(10);
/// Bytes of proposals after which a snapshot is made.
const SNAPSHOT_BYTES: usize = 32 << 20;

/// Whether this voter answers requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Serving {
    No {
        /// The node that leads, if known.
        leader: Option<String>,
    },
    Yes {
        term: u64,
    },
    Stopped(String),
}

impl Serving {
    pub(super) fn check(&self) -> Result<u64, StoreError> {
        match self {
            Serving::Yes { term } => Ok(*term),
            Serving::No { leader } => Err(StoreError::NotLeader {
                leader: leader.clone(),
            }),
            Serving::Stopped(reason) => Err(stopped(reason)),
        }
    }
}

/// One request to change the store, and where its answer goes.
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) bytes: usize,
    pub(super) answer: oneshot::Sender<Result<CommandOutcome, StoreError>>,
}

/// Where the answer to a barrier goes.
type Confirmed = oneshot::Sender<Result<(), StoreError>>;

/// Barriers that wait for a round of confirmation.
pub(super) struct Barriers {
    /// Those for which one begins at once.
    urgent: mpsc::UnboundedReceiver<Confirmed>,
    /// Those that wait for the next one.
    renewals: mpsc::UnboundedReceiver<Confirmed>,
}

/// What the tasks of a leader share.
pub(super) struct Leader {
    pub(super) id: u64,
    pub(super) raft: Raft,
    pub(super) log: Log,
    pub(super) view: Arc<View>,
    pub(super) deadlines: Arc<Deadlines>,
    pub(super) serving: watch::Sender<Serving>,
    /// Whether this node was elected; it may not serve yet.
    leads: watch::Sender<bool>,
    barriers: mpsc::UnboundedSender<Confirmed>,
    renewals: mpsc::UnboundedSender<Confirmed>,
    /// Leases [have ended](Deadlines::take_ended).
    pub(super) lease_over: Notify,
    /// Bytes of proposals applied since the newest snapshot.
    pub(super) unsaved: Arc<AtomicUsize>,
    clock: Clock,
    /// Periods are counted from here.
    origin: Instant,
    /// When a quorum last confirmed this leader, in milliseconds of the clock.
    confirmed_ms: AtomicU64,
}

impl Leader {
    pub(super) fn new(
        id: u64,
        raft: Raft,
        log: Log,
        view: Arc<View>,
        deadlines: Arc<Deadlines>,
        unsaved: Arc<AtomicUsize>,
        clock: Clock,
    ) -> (Arc<Self>, Barriers) {
        let (barriers, urgent) = mpsc::unbounded_channel();
        let (renewals, waiting) = mpsc::unbounded_channel();
        let leader = Self {
            id,
            raft,
            log,
            view,
            deadlines,
            serving: watch::Sender::new(Serving::No { leader: None }),
            leads: watch::Sender::new(false),
            barriers,
            renewals,
            lease_over: Notify::new(),
            unsaved,
            clock,
            origin: coarse_timer::origin().unwrap_or_else(Instant::now),
            confirmed_ms: AtomicU64::new(0),
        };
        let barriers = Barriers {
            urgent,
            renewals: waiting,
        };
        (Arc::new(leader), barriers)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.clock.now().as_millis()).unwrap_or(u64::MAX)
    }

    /// The end of the present period: all tasks that do something each period do so at once.
    pub(super) fn next_tick(&self, period: Duration) -> Instant {
        self.tick_after(Instant::now(), period)
    }

    /// The end of the period in which `time` is.
    fn tick_after(&self, time: Instant, period: Duration) -> Instant {
        let periods = time.duration_since(self.origin).as_nanos() / period.as_nanos();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX - 1);
        self.origin + period * (periods + 1)
    }

    /// Time since a quorum confirmed this leader.
    fn silence(&self) -> Duration {
        let confirmed = self.confirmed_ms.load(Ordering::Relaxed);
        Duration::from_millis(self.now_ms().saturating_sub(confirmed))
    }

    fn is_sole_voter(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let groups = metrics.membership_config.membership().get_joint_config();
        groups
            .iter()
            .all(|it| it.len() == 1 && it.contains(&self.id))
    }

    /// Confirms that this node leads and that the view has everything that was answered before the
    /// call.
    pub(super) async fn barrier(&self) -> Result<(), StoreError> {
        self.confirmed(&self.barriers).await
    }

    /// As [`Self::barrier`], up to [`HEARTBEAT`] later.
    pub(super) async fn renewal_barrier(&self) -> Result<(), StoreError> {
        self.confirmed(&self.renewals).await
    }

    async fn confirmed(
        &self,
        waiting: &mpsc::UnboundedSender<Confirmed>,
    ) -> Result<(), StoreError> {
        let mut serving = self.serving.subscribe();
        serving.borrow_and_update().check()?;
        if self.is_sole_voter() {
            return Ok(());
        }
        let (done, confirmed) = oneshot::channel();
        waiting.send(done).ok();
        let closed = || StoreError::unavailable("the store is closed");
        tokio::select! {
            confirmed = confirmed => confirmed.unwrap_or_else(|_| Err(closed())),
            // No more rounds may come.
            ceased = serving.wait_for(|now| now.check().is_err()) => {
                ceased.map_err(|_| closed())?.check().map(drop)
            }
        }
    }

    /// Asks a quorum whether this node still leads, again if too few answered in time.
    async fn confirm(&self) -> Result<(), StoreError> {
        let asking = async {
            let mut pause = RETRY_AFTER;
            loop {
                match self.raft.ensure_linearizable().await {
                    Err(error) if is_too_few(&error) => tokio::time::sleep(pause).await,
                    answered => return answered,
                }
                pause = (pause * 2).min(HEARTBEAT);
            }
        };
        let leader = match tokio::time::timeout(BARRIER_PATIENCE, asking).await {
            Ok(Ok(_)) => {
                self.confirmed_ms.store(self.now_ms(), Ordering::Relaxed);
                return Ok(());
            }
            Ok(Err(error)) => error
                .forward_to_leader()
                .and_then(|to| Some(to.leader_node.as_ref()?.node.clone())),
            Err(_) => None,
        };
        Err(StoreError::NotLeader { leader })
    }

    /// Makes rounds of confirmation until the store is closed. One answers all barriers that came
    /// before it began.
    pub(super) async fn confirm_barriers(self: Arc<Self>, mut barriers: Barriers) {
        let mut leads = self.leads.subscribe();
        let mut rounds = FuturesUnordered::new();
        let mut last_round = Instant::now();
        let mut last_resend = last_round;
        // Renewals that came while a round was under way.
        let mut waiting = Vec::new();
        loop {
            let is_leader = *leads.borrow_and_update();
            let is_under_way = !rounds.is_empty();
            let free_at = match is_under_way {
                true => last_round + ROUND_EVERY,
                false => last_round,
            };
            let next_round = match is_under_way && !waiting.is_empty() {
                true => last_round + RENEWAL_ROUND_EVERY,
                false => self.tick_after(last_round, HEARTBEAT),
            };
            let urgent = async {
                tokio::time::sleep_until(free_at).await;
                barriers.urgent.recv().await
            };
            let mut all: Vec<Confirmed> = tokio::select! {
                Some(()) = rounds.next() => continue,
                urgent = urgent => match urgent {
                    Some(urgent) => vec![urgent],
                    None => return,
                },
                () = tokio::time::sleep_until(next_round), if is_leader => Vec::new(),
                Some(renewal) = barriers.renewals.recv(), if is_under_way => {
                    waiting.push(renewal);
                    continue;
                }
                // Whoever waits for a leader that is none any more is told.
                changed = leads.changed() => match changed {
                    Ok(()) => Vec::new(),
                    Err(_) => return,
                },
            };
            all.append(&mut waiting);
            for queue in [&mut barriers.urgent, &mut barriers.renewals] {
                while let Ok(more) = queue.try_recv() {
                    all.push(more);
                }
            }
            last_round = Instant::now();
            let lacks = is_any_behind(&self.raft.metrics().borrow());
            let resend_after = if lacks { HEARTBEAT } else { RESEND_EVERY };
            // (Rounds are late by this and that.)
            if last_round.duration_since(last_resend) + HEARTBEAT / 2 >= resend_after {
                last_resend = last_round;
                self.raft.trigger().heartbeat().await.ok();
            }
            let leader = self.clone();
            rounds.push(async move {
                let confirmed = leader.confirm().await;
                for barrier in all {
                    barrier.send(confirmed.clone()).ok();
                }
            });
        }
    }

    /// Follows leadership until the store stops.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut metrics = self.raft.metrics();
        let mut tick = Instant::now();
        loop {
            tokio::select! {
                changed = metrics.changed() => if changed.is_err() {
                    return self.stop("the store is closed");
                },
                () = tokio::time::sleep_until(tick) => {}
            }
            self.deadlines.tick();
            let (state, term, leader, failed) = {
                let metrics = metrics.borrow_and_update();
                let nodes = metrics.membership_config.membership();
                let leader = metrics.current_leader.and_then(|id| nodes.get_node(&id));
                (
                    metrics.state,
                    metrics.current_term,
                    leader.map(|voter| voter.node.clone()),
                    metrics.running_state.clone().err(),
                )
            };
            if let Some(fatal) = failed {
                return self.stop(&fatal.to_string());
            }
            if let Some(reason) = self.log.flushes.failed() {
                // `openraft` may not have heard of it.
                self.stop(&reason);
                self.raft.shutdown().await.ok();
                return;
            }
            let leads = state == ServerState::Leader;
            self.leads
                .send_if_modified(|now| std::mem::replace(now, leads) != leads);
            match state {
                ServerState::Leader => self.lead(term).await,
                _ => self.set_serving(Serving::No { leader }),
            }
            tick = self.next_tick(if leads { TICK } else { FOLLOWER_TICK });
            if self.unsaved.load(Ordering::Relaxed) > SNAPSHOT_BYTES
                || self.log.bytes() > 4 * SNAPSHOT_BYTES
            {
                self.unsaved.store(0, Ordering::Relaxed);
                self.raft.trigger().snapshot().await.ok();
            }
        }
    }

    async fn lead(&self, term: u64) {
        if *self.serving.borrow() == (Serving::Yes { term }) {
            if self.silence() < QUORUM_PATIENCE / 2 || self.confirm().await.is_ok() {
                return;
            }
            if self.silence() > QUORUM_PATIENCE {
                tracing::warn!(
                    term,
                    "no quorum of voters answers; this node serves no more"
                );
                self.set_serving(Serving::No { leader: None });
            }
            return;
        }
        // Everything that was ever answered is applied when these pass.
        if self.confirm().await.is_ok() {
            self.deadlines.begin_to_serve(term);
            tracing::info!(term, "this node leads the store");
            self.set_serving(Serving::Yes { term });
        }
    }

    fn set_serving(&self, serving: Serving) {
        self.serving.send_if_modified(|now| {
            let changed = *now != serving;
            *now = serving;
            changed
        });
    }

    fn stop(&self, reason: &str) {
        self.view.fail(reason);
        self.set_serving(Serving::Stopped(reason.into()));
    }

    /// Proposes what is requested, and the ends of leases, until the store is closed.
    pub(super) async fn propose(self: Arc<Self>, mut requests: mpsc::Receiver<Request>) {
        let in_flight = Arc::new(Semaphore::new(PROPOSALS_MAX));
        let mut serving = self.serving.subscribe();
        let mut held = None;
        loop {
            let mut batch: Vec<Request> = held.take().into_iter().collect();
            if batch.is_empty() {
                tokio::select! {
                    request = requests.recv() => match request {
                        Some(request) => batch.push(request),
                        None => return,
                    },
                    () = self.lease_over.notified() => {}
                    // (An error: the store is closed, and so are the requests.)
                    Ok(()) = serving.changed() => {}
                }
            }
            // Meanwhile more requests come.
            let room = loop {
                if let Err(error) = serving.borrow_and_update().check() {
                    refuse(batch.drain(..), &error);
                    while let Ok(request) = requests.try_recv() {
                        refuse([request], &error);
                    }
                    break None;
                }
                tokio::select! {
                    room = in_flight.clone().acquire_owned() => break room.ok(),
                    _ = serving.changed() => {}
                }
            };
            let Some(room) = room else { continue };
            let mut bytes: usize = batch.iter().map(|request| request.bytes).sum();
            while batch.len() < BATCH_COMMANDS_MAX
                && bytes < BATCH_BYTES_MAX
                && let Ok(request) = requests.try_recv()
            {
                if bytes + request.bytes > BATCH_BYTES_MAX && !batch.is_empty() {
                    held = Some(request);
                    break;
                }
                bytes += request.bytes;
                batch.push(request);
            }
            let ended = self.deadlines.take_ended();
            if batch.is_empty() && ended.is_empty() {
                continue;
            }
            let answering = self.send(&ended, batch).await;
            tokio::spawn(async move {
                answering.await;
                drop(room);
            });
        }
    }

    /// Sends one proposal; the future waits for its outcome and answers its requests.
    async fn send(
        &self,
        ended: &[LeaseId],
        batch: Vec<Request>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let mut commands: Vec<Command> = Vec::with_capacity(ended.len() + batch.len());
        for lease in ended {
            tracing::info!(%lease, "lease ended");
            commands.push(Command::Expire(lease.0));
        }
        let mut answers = Vec::with_capacity(batch.len());
        for request in batch {
            commands.push(request.command);
            answers.push(request.answer);
        }
        let skipped = ended.len();
        let sent = match Proposal::new(&commands) {
            Ok(proposal) => {
                let sent = self.raft.client_write_ff(proposal).await;
                sent.map_err(stopped)
            }
            Err(error) => Err(StoreError::unavailable(error)),
        };
        async move {
            let outcomes = match sent {
                // Nothing was proposed.
                Err(error) => Err(error),
                // `openraft` may forget a proposal of a leader that was replaced: it must not hold
                // its place for ever.
                Ok(written) => match tokio::time::timeout(CHANGE_PATIENCE, written).await {
                    Ok(written) => outcomes(written, skipped, answers.len()),
                    Err(_) => Err(StoreError::Unknown {
                        reason: "the voters did not agree in time".into(),
                    }),
                },
            };
            match outcomes {
                Ok(outcomes) => {
                    for (answer, outcome) in answers.into_iter().zip(outcomes) {
                        answer.send(Ok(outcome)).ok();
                    }
                }
                Err(error) => {
                    for answer in answers {
                        answer.send(Err(error.clone())).ok();
                    }
                }
            }
        }
    }
}

type CheckError = openraft::error::CheckIsLeaderError<u64, Voter>;

/// Whether a voter or a learner lacks entries of the leader's log.
fn is_any_behind(metrics: &RaftMetrics<u64, Voter>) -> bool {
    let known = metrics.replication.iter().flatten();
    let mut matched = known.map(|(_, log_id)| log_id.map(|it| it.index));
    matched.any(|index| index < metrics.last_log_index)
}

fn is_too_few(error: &openraft::error::RaftError<u64, CheckError>) -> bool {
    matches!(error.api_error(), Some(CheckError::QuorumNotEnough(_)))
}

type Written = Result<
    Result<ClientWriteResponse<Types>, openraft::error::ClientWriteError<u64, Voter>>,
    oneshot::error::RecvError,
>;

/// The outcomes of the requests of a proposal. After any error the entry may be in the log, and
/// be committed now or by the next leader.
fn outcomes(
    written: Written,
    skipped: usize,
    wanted: usize,
) -> Result<Vec<CommandOutcome>, StoreError> {
    let unknown = |reason: String| StoreError::Unknown { reason };
    let response = written
        .map_err(|_| unknown("this node's copy of the store stopped".into()))?
        .map_err(|error| unknown(error.to_string()))?;
    let outcomes: Vec<CommandOutcome> = response.data.0.into_iter().skip(skipped).collect();
    match outcomes.len() == wanted {
        true => Ok(outcomes),
        false => Err(unknown("outcomes are missing".into())),
    }
}

fn refuse(requests: impl IntoIterator<Item = Request>, error: &StoreError) {
    for request in requests {
        request.answer.send(Err(error.clone())).ok();
    }
}

/// The outcome of a transaction.
pub(super) fn txn_outcome(outcome: CommandOutcome) -> Result<TxnOutcome, StoreError> {
    match outcome {
        CommandOutcome::Txn(Ok(outcome)) => Ok(outcome.into()),
        CommandOutcome::Txn(Err(failure)) => Err(failure.into()),
        other => Err(StoreError::Unknown {
            reason: format!("not the outcome of a transaction: {other:?}"),
        }),
    }
}
