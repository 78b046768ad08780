//! When a voter asks to be elected.
//!
//! ```text
//!             no leader heard for LEASE + a random time
//!   Follower ───────────────────────────────────────────▶ Pre-vote
//!      ▲                                                     │
//!      ├──── no quorum would vote for it: a random time ◀────┤
//!      │                                                     │ a quorum would
//!      └──── another leads ◀──── Candidate ◀─────────────────┘
//!                                    └──▶ nobody wins: a random time, Pre-vote again
//! ```
//!
//! `openraft`'s own timer is off. It draws its random time once for each start, so two voters with
//! near values split the vote again and again; and it has no pre-vote (Raft thesis, section 9.6),
//! without which a voter that was cut off raises its term meanwhile and deposes the leader when it
//! comes back. A voter that agrees to another's candidacy puts its own off, so that votes are
//! rarely split. None of this concerns safety: an election may be asked for at any time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use openraft::ServerState;
use rand::RngExt;
use rand::rngs::StdRng;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::log::Log;
use super::network::Network;
use super::types::{LogId, Raft, Voter};

/// `openraft`'s bounds, in milliseconds: `ELECTION_MIN` is the time for a vote's answer, and has to be
/// the shorter one.
pub(super) const ELECTION_MIN: u64 = 349;
pub(super) const ELECTION_MAX: u64 = 350;
/// A voter that heard its leader within this time votes for nobody else (`openraft`'s lease).
pub(super) const LEASE: Duration = Duration::from_millis(ELECTION_MAX);
/// Bounds, in milliseconds, of the random time on top of [`LEASE`] after which a silent leader is
/// to be replaced. The heartbeats of a busy computer are late, so it does not begin at zero.
const AFTER_LEADER_MS: std::ops::Range<u64> = 150..450;
/// Bounds of the time for an election to be won; a vote takes two writes to disk.
const AFTER_ELECTION_MS: std::ops::Range<u64> = 200..500;
/// Bounds of the pause after a pre-vote that failed, or was given to another.
const AFTER_PRE_VOTE_MS: std::ops::Range<u64> = 100..350;
/// Time for the answers to a pre-vote; twice as long after each that failed, as the voters may be
/// farther away, up to `PRE_VOTE_PATIENCE_MAX`.
const PRE_VOTE_PATIENCE: Duration = Duration::from_millis(250);
const PRE_VOTE_PATIENCE_MAX: Duration = Duration::from_millis(1000);

/// How often a voter that cannot be elected looks whether it can, beside being told.
const LOOK_EVERY: Duration = Duration::from_secs(4);

/// What a voter knows of its group's leader.
#[derive(Debug, Clone)]
struct Seen {
    /// Whether this voter may be elected: it has a vote and does not lead.
    is_electable: bool,
    /// When this voter last heard a leader, or took part in an election.
    heard: Instant,
    /// Whether that was a leader.
    has_leader: bool,
    /// The groups of voters, two while the group is being changed. A quorum of each has to agree.
    groups: Vec<BTreeSet<u64>>,
    others: Vec<(u64, Voter)>,
}

impl Seen {
    fn is_quorum(&self, agreed: &BTreeSet<u64>) -> bool {
        let is_majority = |group: &BTreeSet<u64>| group.intersection(agreed).count() * 2;
        self.groups
            .iter()
            .all(|group| is_majority(group) > group.len())
    }
}

/// Draws the random times.
#[derive(Debug)]
struct Timer {
    random: StdRng,
    /// Of the time for which `due` was drawn.
    heard: Option<Instant>,
    due: Instant,
}

impl Timer {
    fn new(random: StdRng) -> Self {
        let due = Instant::now();
        Self {
            random,
            heard: None,
            due,
        }
    }

    fn draw(&mut self, bounds_ms: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.random.random_range(bounds_ms))
    }

    /// When this voter is to ask for votes, if it hears nothing until then.
    fn due(&mut self, seen: &Seen) -> Instant {
        if self.heard != Some(seen.heard) {
            self.heard = Some(seen.heard);
            self.due = seen.heard
                + match seen.has_leader {
                    true => LEASE + self.draw(AFTER_LEADER_MS),
                    false => self.draw(AFTER_ELECTION_MS),
                };
        }
        self.due
    }

    fn put_off(&mut self, now: Instant) {
        self.due = self.due.max(now + self.draw(AFTER_PRE_VOTE_MS));
    }
}

/// A voter's candidacies.
pub(super) struct Election {
    id: u64,
    raft: Raft,
    log: Log,
    network: Network,
    /// This voter agreed to another's candidacy.
    agreed: Notify,
    /// How often it asked for pre-votes.
    pre_votes: AtomicU64,
}

impl Election {
    pub(super) fn new(id: u64, raft: Raft, log: Log, network: Network) -> Arc<Self> {
        Arc::new(Self {
            id,
            raft,
            log,
            network,
            agreed: Notify::new(),
            pre_votes: AtomicU64::new(0),
        })
    }

    /// How often this voter asked the others whether they would vote for it, since its start.
    pub(super) fn pre_votes(&self) -> u64 {
        self.pre_votes.load(Ordering::Relaxed)
    }

    /// Asks for votes when it is due, until the store stops.
    pub(super) async fn run(self: Arc<Self>, random: StdRng) {
        let mut timer = Timer::new(random);
        let mut group = self.raft.server_metrics();
        let begun = Instant::now();
        let mut patience = PRE_VOTE_PATIENCE;
        while let Some(seen) = self.look(begun).await {
            if seen.has_leader && seen.heard.elapsed() < LEASE {
                patience = PRE_VOTE_PATIENCE;
            }
            if !seen.is_electable {
                // Whether it leads, and the group's voters, are told.
                let changed = tokio::time::timeout(LOOK_EVERY, group.changed()).await;
                if let Ok(Err(_)) = changed {
                    return;
                }
                continue;
            }
            let due = timer.due(&seen);
            if Instant::now() < due {
                tokio::select! {
                    () = tokio::time::sleep_until(due) => {}
                    () = self.agreed.notified() => timer.put_off(Instant::now()),
                }
                continue;
            }
            let would_win = self.would_win(&seen, patience).await;
            // Meanwhile a leader may have been heard, or this voter's last candidacy was won.
            let has_changed = match self.look(begun).await {
                Some(now) => now.heard != seen.heard || !now.is_electable,
                None => return,
            };
            if has_changed {
                continue;
            }
            if would_win {
                tracing::info!("no leader of the store is heard; this voter asks to be elected");
                if self.raft.trigger().elect().await.is_err() {
                    return;
                }
            } else {
                patience = (patience * 2).min(PRE_VOTE_PATIENCE_MAX);
            }
            timer.put_off(Instant::now());
        }
    }

    /// `None` once the store stopped.
    async fn look(&self, begun: Instant) -> Option<Seen> {
        let id = self.id;
        let seen = self.raft.with_raft_state(move |state| {
            let membership = state.membership_state.effective().membership();
            let groups = membership.get_joint_config().clone();
            let is_voter = groups.iter().any(|group| group.contains(&id));
            let nodes = membership.nodes();
            let others = nodes.filter(|(other, _)| {
                **other != id && groups.iter().any(|group| group.contains(other))
            });
            Seen {
                is_electable: is_voter && state.server_state != ServerState::Leader,
                heard: state.vote_last_modified().unwrap_or(begun),
                has_leader: state.vote_ref().is_committed(),
                others: others
                    .map(|(other, voter)| (*other, voter.clone()))
                    .collect(),
                groups,
            }
        });
        seen.await.ok()
    }

    /// Whether a quorum would vote for this voter now.
    async fn would_win(&self, seen: &Seen, patience: Duration) -> bool {
        self.pre_votes.fetch_add(1, Ordering::Relaxed);
        let mut agreed = BTreeSet::from([self.id]);
        let last = self.log.last_id();
        let mut answers: FuturesUnordered<_> = seen
            .others
            .iter()
            .map(|(other, voter)| async move {
                let asked = self.network.pre_vote(*other, voter, last, patience);
                (*other, asked.await)
            })
            .collect();
        while !seen.is_quorum(&agreed) {
            match answers.next().await {
                Some((other, true)) => agreed.insert(other),
                Some((_, false)) => continue,
                None => return false,
            };
        }
        true
    }

    /// Whether this voter would vote for one whose log ends with `last`: it hears no leader, does
    /// not serve as one (`serves`), and its own log does not have more.
    pub(super) async fn agrees(&self, last: Option<LogId>, serves: bool) -> bool {
        let now = Instant::now();
        let hears = self.raft.with_raft_state(move |state| {
            // Of one that was just elected, and does not serve yet, this is its election.
            let heard = state.vote_last_modified();
            state.vote_ref().is_committed()
                && heard.is_some_and(|heard| now.duration_since(heard) <= LEASE)
        });
        let agrees = !serves && last >= self.log.last_id() && matches!(hears.await, Ok(false));
        if agrees {
            self.agreed.notify_one();
        }
        agrees
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn seen(heard: Instant, has_leader: bool) -> Seen {
        Seen {
            is_electable: true,
            heard,
            has_leader,
            groups: vec![BTreeSet::from([1, 2, 3])],
            others: Vec::new(),
        }
    }

    #[test]
    fn a_voter_that_hears_its_leader_waits_and_each_wait_is_drawn_anew() {
        let mut timer = Timer::new(StdRng::seed_from_u64(1));
        let begun = Instant::now();
        let mut waits = BTreeSet::new();
        for n in 0..1000 {
            let heard = begun + Duration::from_millis(250 * n);
            let due = timer.due(&seen(heard, true));
            let wait = due - heard;
            assert!(wait > LEASE, "{wait:?}");
            assert!(wait < LEASE + Duration::from_millis(450), "{wait:?}");
            // Looking again changes nothing.
            assert_eq!(timer.due(&seen(heard, true)), due);
            waits.insert(wait);
        }
        assert!(waits.len() > 200, "{} different waits", waits.len());
    }

    #[test]
    fn an_election_that_nobody_won_is_repeated_after_another_time() {
        let mut timer = Timer::new(StdRng::seed_from_u64(1));
        let heard = Instant::now();
        let first = timer.due(&seen(heard, false));
        assert!(first - heard < Duration::from_millis(500));
        timer.put_off(first);
        let second = timer.due(&seen(heard, false));
        assert!(second >= first + Duration::from_millis(100));
        assert!(second < first + Duration::from_millis(350));
        // Who agreed to another's candidacy never asks earlier than it would have.
        timer.put_off(heard);
        assert!(timer.due(&seen(heard, false)) >= second);
    }

    #[test]
    fn a_quorum_of_each_group_has_to_agree() {
        let mut both = Seen {
            groups: vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([3, 4, 5])],
            ..seen(Instant::now(), true)
        };
        for (agreed, expected) in [
            (vec![], false),
            (vec![1, 2], false),
            (vec![1, 2, 3], false),
            (vec![1, 3, 4], true),
            (vec![1, 2, 4, 5], true),
            (vec![3, 4, 5], false),
        ] {
            assert_eq!(both.is_quorum(&agreed.into_iter().collect()), expected);
        }
        both.groups = vec![BTreeSet::from([1])];
        assert!(both.is_quorum(&BTreeSet::from([1])));
    }
}
