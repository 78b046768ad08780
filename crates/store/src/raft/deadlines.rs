//! When leases end. Only the leader decides that a lease ended, by an entry of the log; renewals
//! live in its memory. A new leader, and one that was itself stopped for a while, gives every
//! lease its full time: holders may have renewed, or tried to, what it does not know of. For the same
//! reason a lease whose time is over does not end before what came until then is
//! [served](Deadlines::served).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::interface::LeaseId;

/// Nobody looked at the deadlines for so long: this process was stopped, or could not run, and
/// renewals may have come in vain. Well below the time that nodes have between two renewals.
const PAUSE: Duration = Duration::from_millis(500);

/// The deadline of each lease of the state machine.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    clock: Clock,
    all: Mutex<All>,
}

#[derive(Debug, Default)]
struct All {
    leases: HashMap<LeaseId, Deadline>,
    /// When somebody looked last.
    looked: Duration,
    /// Renewals that came until then have been made.
    served: Duration,
    /// The last term in which this voter began to serve.
    term: u64,
}

#[derive(Debug)]
struct Deadline {
    ttl: Duration,
    at: Duration,
    /// Its end is proposed: it can no longer be renewed. Only the entry of the log removes it; if
    /// that is lost, the next leader begins anew.
    is_ending: bool,
    /// Renewals that came and wait to be confirmed: it does not end before them.
    unconfirmed: usize,
}

impl Deadline {
    /// Whether its time is over, with everything that came until then `served`, and nothing may still
    /// renew it.
    fn has_ended(&self, served: Duration) -> bool {
        !self.is_ending && self.at <= served && self.unconfirmed == 0
    }

    fn new(ttl_ms: u64, now: Duration) -> Self {
        let ttl = Duration::from_millis(ttl_ms);
        Deadline {
            ttl,
            at: now + ttl,
            is_ending: false,
            unconfirmed: 0,
        }
    }
}

/// A renewal that came, until it is confirmed or dropped.
#[derive(Debug)]
pub(super) struct Renewal<'a> {
    deadlines: &'a Deadlines,
    lease: LeaseId,
    /// When it came.
    asked: Duration,
}

impl Renewal<'_> {
    /// Gives the lease its full time, in milliseconds, from when the renewal came; `None` if it has
    /// ended, or its end is proposed.
    pub(super) fn confirmed(self) -> Option<u64> {
        let (mut all, _) = self.deadlines.look();
        let deadline = all.leases.get_mut(&self.lease);
        let deadline = deadline.filter(|it| !it.is_ending)?;
        deadline.at = deadline.at.max(self.asked + deadline.ttl);
        u64::try_from(deadline.ttl.as_millis()).ok()
    }
}

impl Drop for Renewal<'_> {
    fn drop(&mut self) {
        let mut all = self.deadlines.look().0;
        if let Some(deadline) = all.leases.get_mut(&self.lease) {
            // (Leases may have been replaced by those of a snapshot.)
            deadline.unconfirmed = deadline.unconfirmed.saturating_sub(1);
        }
    }
}

impl All {
    /// Gives all leases their full time.
    fn begin_again(&mut self, now: Duration) {
        for deadline in self.leases.values_mut() {
            deadline.at = now + deadline.ttl;
        }
    }
}

impl Deadlines {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            clock,
            all: Mutex::default(),
        }
    }

    /// The leases, after the time in which nobody looked was given to all of them.
    fn look(&self) -> (MutexGuard<'_, All>, Duration) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        if now.saturating_sub(all.looked) > PAUSE {
            all.begin_again(now);
        }
        all.looked = now;
        (all, now)
    }

    /// To be called more often than [`PAUSE`].
    pub(super) fn tick(&self) {
        drop(self.look());
    }

    /// Replaces all leases; each has its full time.
    pub(super) fn replace(&self, leases: impl Iterator<Item = (LeaseId, u64)>) {
        let (mut all, now) = self.look();
        let leases = leases.map(|(lease, ttl_ms)| (lease, Deadline::new(ttl_ms, now)));
        all.leases = leases.collect();
    }

    /// Adds a lease with its full time.
    pub(super) fn add(&self, lease: LeaseId, ttl_ms: u64) {
        let (mut all, now) = self.look();
        all.leases.insert(lease, Deadline::new(ttl_ms, now));
    }

    /// Removes a lease that ended by an entry of the log.
    pub(super) fn remove(&self, lease: LeaseId) {
        self.look().0.leases.remove(&lease);
    }

    /// This voter begins to serve in a term, or serves once more in it after a time without a quorum:
    /// gives every lease its full time. In a new term that includes those whose end was proposed in
    /// vain: all earlier entries are applied. Ends that were proposed in the same term are still in the
    /// log and will be applied, so these leases can not be renewed any more.
    pub(super) fn begin_to_serve(&self, term: u64) {
        let (mut all, now) = self.look();
        let is_new = std::mem::replace(&mut all.term, term) != term;
        all.begin_again(now);
        for deadline in all.leases.values_mut() {
            deadline.is_ending &= !is_new;
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// A renewal of a lease came.
    pub(super) fn renewal(&self, lease: LeaseId) -> Renewal<'_> {
        let (mut all, asked) = self.look();
        if let Some(deadline) = all.leases.get_mut(&lease) {
            deadline.unconfirmed += 1;
        }
        Renewal {
            deadlines: self,
            lease,
            asked,
        }
    }

    /// What came until `until` is served, for which the caller had to wait for so long as the service
    /// `stood` still. If that was long, it may have been much longer, and connections be lost with what
    /// was sent over them.
    pub(super) fn served(&self, until: Duration, stood: Duration) {
        let (mut all, now) = self.look();
        if stood > PAUSE {
            all.begin_again(now);
        }
        all.served = all.served.max(until);
    }

    /// Whether there is something to [take](Self::take_ended).
    pub(super) fn has_ended(&self) -> bool {
        let all = self.look().0;
        all.leases.values().any(|it| it.has_ended(all.served))
    }

    /// The leases that have ended, to be proposed: they can no longer be renewed.
    pub(super) fn take_ended(&self) -> Vec<LeaseId> {
        let (mut all, _) = self.look();
        let served = all.served;
        let mut ended = Vec::new();
        for (lease, deadline) in &mut all.leases {
            if deadline.has_ended(served) {
                deadline.is_ending = true;
                ended.push(*lease);
            }
        }
        ended.sort();
        ended
    }

    /// Time until the next lease has to be looked at, at most `longest`: one whose time is over has been
    /// once everything that came until then is [served](Self::served).
    pub(super) fn wait(&self, longest: Duration) -> Duration {
        let (all, now) = self.look();
        let running = all.leases.values().filter(|it| !it.is_ending);
        let next = running.map(|it| it.at).filter(|at| *at > all.served).min();
        next.map_or(longest, |at| at.saturating_sub(now).min(longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: LeaseId = LeaseId(1);
    const STEP: Duration = Duration::from_millis(1);

    /// On a clock that stands still unless it is advanced: on a busy computer there are pauses.
    fn on_own_clock() -> Deadlines {
        Deadlines::new(Clock::Simulated {
            begun: tokio::time::Instant::now(),
            rate: 1.0,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_is_proposed_once_and_not_renewed() {
        let deadlines = on_own_clock();
        deadlines.add(LEASE, 0);
        deadlines.served(deadlines.now(), Duration::ZERO);
        assert_eq!(deadlines.take_ended(), [LEASE]);
        assert_eq!(deadlines.take_ended(), []);
        assert_eq!(deadlines.renewal(LEASE).confirmed(), None);
        deadlines.remove(LEASE);
        deadlines.begin_to_serve(2);
        assert_eq!(deadlines.take_ended(), []);
    }

    /// The entry that ends it was lost with a term: the lease lives on under the next one. In the same
    /// term the entry is still to come: whoever was told that the lease goes on would lose it at once.
    #[test]
    fn an_end_proposed_in_vain_is_forgotten_with_the_term() {
        let deadlines = Deadlines::default();
        deadlines.begin_to_serve(1);
        deadlines.add(LEASE, 60_000);
        deadlines.look().0.leases.get_mut(&LEASE).unwrap().is_ending = true;
        assert_eq!(deadlines.renewal(LEASE).confirmed(), None);
        deadlines.begin_to_serve(1);
        assert_eq!(deadlines.renewal(LEASE).confirmed(), None);
        deadlines.begin_to_serve(2);
        assert_eq!(deadlines.renewal(LEASE).confirmed(), Some(60_000));
    }

    /// A renewal may have come in time and wait to be served, or to be confirmed.
    #[tokio::test(start_paused = true)]
    async fn a_lease_does_not_end_before_what_came_is_served() {
        let deadlines = on_own_clock();
        for lease in 1..=3 {
            deadlines.add(LeaseId(lease), 0);
        }
        assert_eq!(deadlines.wait(PAUSE), Duration::ZERO);
        assert_eq!(deadlines.take_ended(), []);
        let until = deadlines.now();
        tokio::time::advance(STEP).await;
        let confirmed = deadlines.renewal(LeaseId(1));
        let unconfirmed = deadlines.renewal(LeaseId(2));
        assert_eq!(confirmed.confirmed(), Some(0));
        deadlines.served(until, Duration::ZERO);
        // (The first one has its time again, which is none.)
        assert!(deadlines.has_ended());
        assert_eq!(deadlines.take_ended(), [LeaseId(3)]);
        assert!(!deadlines.has_ended());
        drop(unconfirmed);
        assert!(deadlines.has_ended());
        assert_eq!(deadlines.take_ended(), [LeaseId(2)]);
    }

    /// Otherwise the same would be found again and again until it is taken.
    #[tokio::test(start_paused = true)]
    async fn what_is_served_is_not_waited_for() {
        let deadlines = on_own_clock();
        deadlines.add(LEASE, 0);
        deadlines.served(deadlines.now(), Duration::ZERO);
        assert_eq!(deadlines.wait(PAUSE), PAUSE);
    }

    /// Whoever comes first after a pause sees it.
    #[tokio::test(start_paused = true)]
    async fn a_pause_ends_no_lease() {
        for renews in [true, false] {
            let deadlines = on_own_clock();
            deadlines.add(LEASE, 5_000);
            {
                let mut all = deadlines.look().0;
                all.looked = all.looked.saturating_sub(PAUSE * 2);
                all.leases.get_mut(&LEASE).unwrap().at = Duration::ZERO;
            }
            match renews {
                true => assert_eq!(deadlines.renewal(LEASE).confirmed(), Some(5_000)),
                false => {
                    deadlines.served(deadlines.now(), Duration::ZERO);
                    assert_eq!(deadlines.take_ended(), []);
                }
            }
        }
        // The service alone stood still.
        let deadlines = on_own_clock();
        deadlines.add(LEASE, 5_000);
        let over = deadlines.now() + Duration::from_secs(5);
        tokio::time::advance(STEP).await;
        deadlines.served(over, PAUSE * 2);
        assert_eq!(deadlines.take_ended(), []);
        deadlines.served(over + STEP, Duration::ZERO);
        assert_eq!(deadlines.take_ended(), [LEASE]);
    }
}
