//! When leases end. Only the leader decides that a lease ended, by an entry of the log; renewals
//! live in its memory. A new leader, and one that was itself stopped for a while, gives every
//! lease its full time: holders may have renewed, or tried to, what it does not know of.

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
}

impl Deadline {
    fn new(ttl_ms: u64, now: Duration) -> Self {
        let ttl = Duration::from_millis(ttl_ms);
        Deadline {
            ttl,
            at: now + ttl,
            is_ending: false,
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
            for deadline in all.leases.values_mut() {
                deadline.at = now + deadline.ttl;
            }
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
        for deadline in all.leases.values_mut() {
            deadline.at = now + deadline.ttl;
            deadline.is_ending &= !is_new;
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Gives one lease its full time, in milliseconds, from when that was `asked` for; `None` if
    /// its time is over.
    pub(super) fn renew(&self, lease: LeaseId, asked: Duration) -> Option<u64> {
        let (mut all, _) = self.look();
        let deadline = all.leases.get_mut(&lease);
        let deadline = deadline.filter(|it| !it.is_ending && it.at > asked)?;
        deadline.at = deadline.at.max(asked + deadline.ttl);
        u64::try_from(deadline.ttl.as_millis()).ok()
    }

    /// The leases whose time is over, to be proposed: they can no longer be renewed.
    pub(super) fn take_ended(&self) -> Vec<LeaseId> {
        let (mut all, now) = self.look();
        let mut ended = Vec::new();
        for (lease, deadline) in &mut all.leases {
            if !deadline.is_ending && deadline.at <= now {
                deadline.is_ending = true;
                ended.push(*lease);
            }
        }
        ended.sort();
        ended
    }

    /// Time until the next lease ends, at most `longest`.
    pub(super) fn wait(&self, longest: Duration) -> Duration {
        let (all, now) = self.look();
        let running = all.leases.values().filter(|it| !it.is_ending);
        let next = running.map(|it| it.at).min();
        next.map_or(longest, |at| at.saturating_sub(now).min(longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: LeaseId = LeaseId(1);

    fn at_their_end() -> Deadlines {
        let deadlines = Deadlines::default();
        deadlines.add(LEASE, 0);
        deadlines
    }

    #[test]
    fn an_end_is_proposed_once_and_not_renewed() {
        let deadlines = at_their_end();
        assert_eq!(deadlines.take_ended(), [LEASE]);
        assert_eq!(deadlines.take_ended(), []);
        assert_eq!(deadlines.renew(LEASE, deadlines.now()), None);
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
        assert_eq!(deadlines.renew(LEASE, deadlines.now()), None);
        deadlines.begin_to_serve(1);
        assert_eq!(deadlines.renew(LEASE, deadlines.now()), None);
        deadlines.begin_to_serve(2);
        assert_eq!(deadlines.renew(LEASE, deadlines.now()), Some(60_000));
    }

    /// Whoever comes first after a pause sees it.
    #[test]
    fn a_pause_ends_no_lease() {
        for renews in [true, false] {
            let deadlines = Deadlines::default();
            deadlines.add(LEASE, 5_000);
            {
                let mut all = deadlines.look().0;
                all.looked = all.looked.saturating_sub(PAUSE * 2);
                all.leases.get_mut(&LEASE).unwrap().at = Duration::ZERO;
            }
            match renews {
                true => assert_eq!(deadlines.renew(LEASE, deadlines.now()), Some(5_000)),
                false => assert_eq!(deadlines.take_ended(), []),
            }
        }
    }
}
