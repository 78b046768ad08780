//! Limits how many machines leave this node at a time, and orders those that wait.
//!
//! Moves that share a link slow each other down, so only [`TOGETHER_MAX`] copy at once, and at
//! most [`LARGE_TOGETHER_MAX`] of these are large: a large machine never delays the small ones
//! behind it. The most urgent is next, among equals the one that waits longest.

use keel_api::Urgency;
use keel_cluster::MachineName;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

/// Moves that copy at a time.
const TOGETHER_MAX: usize = 4;
/// Of these, moves of large machines.
const LARGE_TOGETHER_MAX: usize = 2;
/// Bytes of memory from which a machine is large.
const LARGE_BYTES: u64 = 256 << 20;

/// The machines that copy and those that wait; a pure state machine.
#[derive(Debug, Default)]
struct Order {
    /// Machines that copy, and whether they are large.
    running: BTreeMap<MachineName, bool>,
    waiting: Vec<Waiting>,
    arrived: u64,
}

#[derive(Debug)]
struct Waiting {
    machine: MachineName,
    large: bool,
    urgency: Urgency,
    number: u64,
}

impl Order {
    fn add(&mut self, machine: &MachineName, bytes: u64, urgency: Urgency) {
        self.arrived += 1;
        self.waiting.push(Waiting {
            machine: machine.clone(),
            large: bytes >= LARGE_BYTES,
            urgency,
            number: self.arrived,
        });
        self.fill();
    }

    fn remove(&mut self, machine: &MachineName) {
        self.running.remove(machine);
        self.waiting.retain(|waiting| waiting.machine != *machine);
        self.fill();
    }

    /// Starts as many waiting machines as the limits allow.
    fn fill(&mut self) {
        while self.running.len() < TOGETHER_MAX {
            let large = self.running.values().filter(|large| **large).count();
            let next = self
                .waiting
                .iter()
                .enumerate()
                .filter(|(_, it)| !it.large || large < LARGE_TOGETHER_MAX)
                .max_by_key(|(_, it)| (it.urgency, std::cmp::Reverse(it.number)))
                .map(|(at, _)| at);
            let Some(next) = next else { return };
            let next = self.waiting.remove(next);
            self.running.insert(next.machine, next.large);
        }
    }

    /// Number of machines before this one in the queue; `None` if it has started.
    fn ahead(&self, machine: &MachineName) -> Option<usize> {
        let this = self.waiting.iter().find(|it| it.machine == *machine)?;
        let rank = |it: &Waiting| (it.urgency, std::cmp::Reverse(it.number));
        Some(
            self.waiting
                .iter()
                .filter(|it| rank(it) > rank(this))
                .count(),
        )
    }
}

/// The moves away from this node that copy, and those that wait.
#[derive(Debug, Default)]
pub(crate) struct MoveQueue {
    order: Mutex<Order>,
    changed: Notify,
}

/// A place in the queue or among those that copy; released on drop.
#[derive(Debug)]
pub(crate) struct QueuePlace {
    queue: Arc<MoveQueue>,
    machine: MachineName,
}

impl MoveQueue {
    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(|error| error.into_inner())
    }

    /// Whether a machine of this size would have to wait.
    pub(crate) fn is_full(&self, bytes: u64) -> bool {
        let order = self.order();
        let large = order.running.values().filter(|large| **large).count();
        let of_large = bytes >= LARGE_BYTES && large >= LARGE_TOGETHER_MAX;
        !order.waiting.is_empty() || order.running.len() >= TOGETHER_MAX || of_large
    }

    /// Enters the queue.
    pub(crate) fn enter(
        self: &Arc<Self>,
        machine: &MachineName,
        bytes: u64,
        urgency: Urgency,
    ) -> QueuePlace {
        self.order().add(machine, bytes, urgency);
        QueuePlace {
            queue: self.clone(),
            machine: machine.clone(),
        }
    }
}

impl QueuePlace {
    /// Number of moves before this one; `None` once it may begin.
    pub(crate) fn ahead(&self) -> Option<usize> {
        self.queue.order().ahead(&self.machine)
    }

    /// Waits until the queue changes, or for a short time.
    pub(crate) async fn changed(&self) {
        let moment = std::time::Duration::from_millis(500);
        // The time-out covers a missed notification.
        let _ = tokio::time::timeout(moment, self.queue.changed.notified()).await;
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.queue.order().remove(&self.machine);
        self.queue.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> MachineName {
        text.parse().unwrap()
    }

    fn running(order: &Order) -> Vec<&str> {
        order.running.keys().map(|name| name.as_str()).collect()
    }

    #[test]
    fn large_machines_do_not_hold_up_small_ones() {
        let mut order = Order::default();
        for machine in ["l1", "l2", "l3", "l4"] {
            order.add(&name(machine), LARGE_BYTES, Urgency::Normal);
        }
        assert_eq!(running(&order), ["l1", "l2"]);
        for machine in ["s1", "s2", "s3"] {
            order.add(&name(machine), 1, Urgency::Normal);
        }
        assert_eq!(running(&order), ["l1", "l2", "s1", "s2"]);
        assert_eq!(order.ahead(&name("s3")), Some(2));
        // A small one leaves and a small one starts, since the large ones may not.
        order.remove(&name("s1"));
        assert_eq!(running(&order), ["l1", "l2", "s2", "s3"]);
        order.remove(&name("l2"));
        assert_eq!(running(&order), ["l1", "l3", "s2", "s3"]);
        assert_eq!(order.ahead(&name("l3")), None);
    }

    #[test]
    fn the_most_urgent_is_next_then_the_oldest() {
        let mut order = Order::default();
        for machine in ["a", "b", "c", "d"] {
            order.add(&name(machine), 1, Urgency::Normal);
        }
        for (machine, urgency) in [
            ("low", Urgency::Low),
            ("old", Urgency::Normal),
            ("new", Urgency::Normal),
            ("high", Urgency::High),
        ] {
            order.add(&name(machine), 1, urgency);
        }
        for (done, next) in [("a", "high"), ("b", "old"), ("c", "new"), ("d", "low")] {
            assert_eq!(order.ahead(&name(next)), Some(0));
            order.remove(&name(done));
            assert!(running(&order).contains(&next), "{next}");
        }
        // One that gives up while it waits leaves the queue.
        order.add(&name("e"), 1, Urgency::High);
        order.remove(&name("e"));
        assert_eq!((order.running.len(), order.waiting.len()), (4, 0));
    }
}
