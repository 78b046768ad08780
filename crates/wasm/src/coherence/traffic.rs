//! Quiescence detection: each part counts the messages that it sent to and received from each other
//! part, at a moment when it has no transaction and starts none (Mattern, "Algorithms for
//! distributed termination detection", 1987).
//!
//! With one counter per connection a single round suffices: connections are FIFO, so if two parts
//! agree on the number of messages between them, the same messages were sent and received, and the
//! moments of counting form a consistent cut without messages in flight. Messages received later
//! are caused by messages sent later, and a passive part sends only in reaction to a message.

use super::PartId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Counts {
    sent: u64,
    received: u64,
}

/// Numbers of messages sent to and received from each other part.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic(BTreeMap<PartId, Counts>);

impl Traffic {
    /// Counts a message sent to a part.
    pub fn count_sent(&mut self, to: PartId) {
        self.0.entry(to).or_default().sent += 1;
    }

    /// Counts a message received from a part, after its reactions were counted.
    pub fn count_received(&mut self, from: PartId) {
        self.0.entry(from).or_default().received += 1;
    }

    /// Resets the counters of a part: a new connection begins.
    pub fn forget(&mut self, part: PartId) {
        self.0.remove(&part);
    }

    /// A part has another number from now on; the counters of that number are dropped.
    pub fn rename(&mut self, from: PartId, to: PartId) {
        self.0.remove(&to);
        if let Some(counts) = self.0.remove(&from) {
            self.0.insert(to, counts);
        }
    }

    fn counts(&self, part: PartId) -> Counts {
        self.0.get(&part).copied().unwrap_or_default()
    }

    /// Whether no message is in flight between these parts, each of which counted while it was passive
    /// and has stayed so.
    pub fn is_quiescent(parts: &BTreeMap<PartId, Traffic>) -> bool {
        parts.iter().all(|(from, traffic)| {
            let mut others = parts.iter().filter(|(to, _)| *to != from);
            others.all(|(to, other)| traffic.counts(*to).sent == other.counts(*from).received)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};
    use std::collections::VecDeque;

    /// A part that sends this many messages in reaction to each received one.
    #[derive(Default)]
    struct Part {
        traffic: Traffic,
        /// Pending reactions.
        unsent: VecDeque<u32>,
    }

    /// Random message cascades between parts that count at any time: quiescence is never detected
    /// early, and is detected at the end.
    #[test]
    fn it_is_said_to_rest_when_it_does() {
        let number = |at: usize| PartId::new(at).unwrap();
        let mut rounds = 0;
        for seed in 0..2000 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let count = rng.random_range(2..=5);
            let mut parts: Vec<Part> = (0..count).map(|_| Part::default()).collect();
            let mut links: BTreeMap<(usize, usize), VecDeque<u32>> = BTreeMap::new();
            let mut reports = BTreeMap::new();
            for _ in 0..rng.random_range(1..4) {
                parts[rng.random_range(0..count)].unsent.push_back(3);
            }
            for step in 0.. {
                assert!(step < 100_000, "seed {seed} has no end");
                let at = rng.random_range(0..count);
                match rng.random_range(0..4) {
                    0 if parts[at].unsent.is_empty() => {
                        reports.insert(number(at), parts[at].traffic.clone());
                    }
                    1 => {
                        let Some(depth) = parts[at].unsent.pop_front() else {
                            continue;
                        };
                        for _ in 0..rng.random_range(0..=depth) {
                            let to = (at + rng.random_range(1..count)) % count;
                            parts[at].traffic.count_sent(number(to));
                            let link = links.entry((at, to)).or_default();
                            link.push_back(depth - 1);
                        }
                    }
                    _ => {
                        let from = rng.random_range(0..count);
                        let link = links.get_mut(&(from, at));
                        if let Some(depth) = link.and_then(VecDeque::pop_front) {
                            parts[at].traffic.count_received(number(from));
                            parts[at].unsent.push_back(depth);
                        }
                    }
                }
                if reports.len() < count || !Traffic::is_quiescent(&reports) {
                    continue;
                }
                rounds += 1;
                assert!(links.values().all(VecDeque::is_empty), "seed {seed}");
                assert!(parts.iter().all(|it| it.unsent.is_empty()), "seed {seed}");
                break;
            }
        }
        assert_eq!(rounds, 2000);
    }

    #[test]
    fn another_connection_begins_anew() {
        let (a, b, c) = (PartId::HOME, PartId(1), PartId(2));
        let (mut home, mut member) = (Traffic::default(), Traffic::default());
        home.count_sent(b);
        let of = |home: &Traffic, member: &Traffic, number| {
            BTreeMap::from([(a, home.clone()), (number, member.clone())])
        };
        assert!(!Traffic::is_quiescent(&of(&home, &member, b)));
        member.count_received(a);
        assert!(Traffic::is_quiescent(&of(&home, &member, b)));
        // The part has another number.
        home.rename(b, c);
        assert!(Traffic::is_quiescent(&of(&home, &member, c)));
        // It is a new part.
        home.forget(c);
        assert!(!Traffic::is_quiescent(&of(&home, &member, c)));
        assert!(Traffic::is_quiescent(&of(&home, &Traffic::default(), c)));
    }
}
