//! Whether nothing is on its way between parts: each counts what it said to each other and
//! what it heard of it, while it waits for nothing and begins nothing (Mattern, "Algorithms
//! for distributed termination detection", 1987).
//!
//! A count of its own for each connection makes one round enough: connections keep their
//! order, so where two parts agree on how much was said between them it is the same that
//! was said and heard, and the moments at which they counted are a consistent cut with
//! nothing on its way. What is heard later only follows from what was said later, and
//! nobody says anything unless it hears something.

use super::PartId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Counts {
    sent: u64,
    received: u64,
}

/// How many messages a part said to each other part, and heard of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic(BTreeMap<PartId, Counts>);

impl Traffic {
    /// One more was said to a part.
    pub fn count_sent(&mut self, to: PartId) {
        self.0.entry(to).or_default().sent += 1;
    }

    /// One more was heard of a part, and what follows from it is said.
    pub fn count_received(&mut self, from: PartId) {
        self.0.entry(from).or_default().received += 1;
    }

    /// What comes next of a part, or goes there, is on another connection.
    pub fn forget(&mut self, part: PartId) {
        self.0.remove(&part);
    }

    /// A part has another number from now on, and what had that number is forgotten.
    pub fn rename(&mut self, from: PartId, to: PartId) {
        self.0.remove(&to);
        if let Some(counts) = self.0.remove(&from) {
            self.0.insert(to, counts);
        }
    }

    fn counts(&self, part: PartId) -> Counts {
        self.0.get(&part).copied().unwrap_or_default()
    }

    /// Whether nothing is on its way between those parts, each of which counted when nothing
    /// was under way there, and begins nothing since.
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

    /// A part that says so many more messages for what it hears.
    #[derive(Default)]
    struct Part {
        traffic: Traffic,
        /// Of what it heard, what it has not said yet.
        unsent: VecDeque<u32>,
    }

    /// Messages that are followed by others, between parts that count at any time: never are
    /// they said to rest before they do, and at the end they are.
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
        // It has another number.
        home.rename(b, c);
        assert!(Traffic::is_quiescent(&of(&home, &member, c)));
        // It is another one.
        home.forget(c);
        assert!(!Traffic::is_quiescent(&of(&home, &member, c)));
        assert!(Traffic::is_quiescent(&of(&home, &Traffic::default(), c)));
    }
}
