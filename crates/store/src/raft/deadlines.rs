//! When leases end. Only the leader decides that a lease ended, by an entry of the log; renewals
//! live in its memory. A new leader, and one that was itself stopped for a while, gives every
//! lease its full time: holders may have renewed, or tried to, what it does not know of.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::boottime;
use crate::interface::LeaseId;

/// The deadline of each lease of the state machine, on CLOCK_BOOTTIME.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    leases: Mutex<HashMap<LeaseId, Deadline>>,
}

#[derive(Debug)]
struct Deadline {
    ttl: Duration,
    at: Duration,
}

impl Deadlines {
    fn lock(&self) -> MutexGuard<'_, HashMap<LeaseId, Deadline>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces all leases; each has its full time.
    pub(super) fn replace(&self, leases: impl Iterator<Item = (LeaseId, u64)>) {
        let now = boottime();
        let deadline = |ttl_ms| {
            let ttl = Duration::from_millis(ttl_ms);
            Deadline { ttl, at: now + ttl }
        };
        let leases = leases.map(|(lease, ttl_ms)| (lease, deadline(ttl_ms)));
        *self.lock() = leases.collect();
    }

    /// Adds a lease with its full time.
    pub(super) fn add(&self, lease: LeaseId, ttl_ms: u64) {
        let ttl = Duration::from_millis(ttl_ms);
        let at = boottime() + ttl;
        self.lock().insert(lease, Deadline { ttl, at });
    }

    pub(super) fn remove(&self, lease: LeaseId) {
        self.lock().remove(&lease);
    }

    /// Gives every lease its full time.
    pub(super) fn extend_all(&self) {
        let now = boottime();
        for deadline in self.lock().values_mut() {
            deadline.at = now + deadline.ttl;
        }
    }

    /// Gives one lease its full time, in milliseconds; `None` if its time is over.
    pub(super) fn renew(&self, lease: LeaseId) -> Option<u64> {
        let mut leases = self.lock();
        let now = boottime();
        let deadline = leases.get_mut(&lease).filter(|d| d.at > now)?;
        deadline.at = now + deadline.ttl;
        u64::try_from(deadline.ttl.as_millis()).ok()
    }

    /// Removes the leases whose time is over: they can no longer be renewed.
    pub(super) fn take_ended(&self) -> Vec<LeaseId> {
        let mut leases = self.lock();
        let now = boottime();
        let ended = leases.extract_if(|_, deadline| deadline.at <= now);
        let mut ended: Vec<LeaseId> = ended.map(|(lease, _)| lease).collect();
        ended.sort();
        ended
    }

    /// Time until the next lease ends, at most `longest`.
    pub(super) fn wait(&self, longest: Duration) -> Duration {
        let next = self.lock().values().map(|d| d.at).min();
        next.map_or(longest, |at| at.saturating_sub(boottime()).min(longest))
    }
}
