//! A checker of histories for linearizability: is there an order of all calls, each between its
//! beginning and its end, in which a plain map gives the same answers?
//!
//! The algorithm is that of Wing and Gong ("Testing and verifying concurrent objects", 1993) with
//! Lowe's memory of states already tried ("Testing for linearizability", 2017), as in Knossos and
//! Porcupine. Those check each key apart, which is faster; here calls read and change several keys
//! at once, and all of a history's few keys are one object.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

/// What several keys hold; `None` is a key that does not exist.
pub(crate) type Values = BTreeMap<String, Option<u64>>;

/// What a call did, with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    /// The values found, all at once.
    Read(Values),
    /// Puts all of `put` if all of `when` is so; whether it was, if that is known.
    Txn {
        when: Values,
        put: BTreeMap<String, u64>,
        done: Option<bool>,
    },
}

impl Op {
    /// The same before its answer came.
    fn unanswered(&self) -> Self {
        match self.clone() {
            Op::Txn { when, put, .. } => Op::Txn {
                when,
                put,
                done: None,
            },
            other => other,
        }
    }

    /// What all keys hold after the call, if its answer fits what they held before.
    fn step(&self, all: &BTreeMap<String, u64>) -> Option<BTreeMap<String, u64>> {
        let holds = |values: &Values| {
            let mut values = values.iter();
            values.all(|(key, value)| all.get(key) == value.as_ref())
        };
        match self {
            Op::Read(found) => holds(found).then(|| all.clone()),
            Op::Txn { when, put, done } => {
                let fits = holds(when);
                if done.is_some_and(|done| done != fits) {
                    return None;
                }
                let mut after = all.clone();
                if fits {
                    after.extend(put.clone());
                }
                Some(after)
            }
        }
    }
}

/// One call of one client.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) op: Op,
    pub(crate) begin: Duration,
    /// `None` if no answer came: it may take effect at any time after its beginning, or never.
    pub(crate) end: Option<Duration>,
}

/// Finds an order that explains a history.
pub(crate) fn check(history: &[Call]) -> Result<(), String> {
    let calls: Vec<&Call> = history.iter().collect();
    match explains(&calls) {
        true => Ok(()),
        false => Err(format!(
            "no order explains its {} calls, since {:?}",
            calls.len(),
            first_unexplained(&calls)
        )),
    }
}

/// The first call without which everything that had ended by then is explained.
fn first_unexplained<'a>(calls: &[&'a Call]) -> Option<&'a Call> {
    let mut ended: Vec<&Call> = calls.to_vec();
    ended.sort_by_key(|call| call.end.unwrap_or(Duration::MAX));
    ended.into_iter().find(|last| {
        let end = last.end.unwrap_or(Duration::MAX);
        // What ends later may have taken effect already; a read has none.
        let until_then = calls.iter().filter(|call| call.begin <= end).map(|call| {
            let answered = call.end.is_some_and(|its| its <= end);
            match (&call.op, answered) {
                (_, true) => Some(Call::clone(call)),
                (Op::Read(_), false) => None,
                (op, false) => Some(Call {
                    op: op.unanswered(),
                    end: None,
                    ..Call::clone(call)
                }),
            }
        });
        let until_then: Vec<Call> = until_then.flatten().collect();
        !explains(&until_then.iter().collect::<Vec<_>>())
    })
}

/// Beginnings and ends of calls in the order of time, as a list from which calls are taken and put
/// back. Position 0 is its head.
struct Events {
    /// The call, and whether it begins or ends.
    of: Vec<(usize, bool)>,
    next: Vec<usize>,
    before: Vec<usize>,
    /// Where each call begins, and where it ends.
    begins: Vec<usize>,
    ends: Vec<usize>,
}

impl Events {
    fn new(calls: &[&Call]) -> Self {
        // What has no answer ends after everything.
        let time = |call: usize, begins: bool| match begins {
            true => calls[call].begin,
            false => calls[call].end.unwrap_or(Duration::MAX),
        };
        let mut of: Vec<(usize, bool)> = (0..calls.len())
            .flat_map(|call| [(call, true), (call, false)])
            .collect();
        // At the same instant calls begin before others end: they may be concurrent.
        of.sort_by_key(|(call, begins)| (time(*call, *begins), !begins));
        of.insert(0, (usize::MAX, true));
        let count = of.len();
        let mut begins = vec![0; calls.len()];
        let mut ends = vec![0; calls.len()];
        for (at, (call, is_begin)) in of.iter().enumerate().skip(1) {
            match is_begin {
                true => begins[*call] = at,
                false => ends[*call] = at,
            }
        }
        Events {
            of,
            next: (1..=count).collect(),
            before: (0..count).map(|at| at.saturating_sub(1)).collect(),
            begins,
            ends,
        }
    }

    fn is_over(&self, at: usize) -> bool {
        at >= self.of.len()
    }

    fn unlink(&mut self, at: usize) {
        let (before, next) = (self.before[at], self.next[at]);
        self.next[before] = next;
        if !self.is_over(next) {
            self.before[next] = before;
        }
    }

    fn link(&mut self, at: usize) {
        let (before, next) = (self.before[at], self.next[at]);
        self.next[before] = at;
        if !self.is_over(next) {
            self.before[next] = at;
        }
    }

    fn take(&mut self, call: usize) {
        self.unlink(self.begins[call]);
        self.unlink(self.ends[call]);
    }

    /// The reverse of [`Events::take`], in the reverse order.
    fn put_back(&mut self, call: usize) {
        self.link(self.ends[call]);
        self.link(self.begins[call]);
    }
}

fn explains(calls: &[&Call]) -> bool {
    let mut events = Events::new(calls);
    let mut values = BTreeMap::new();
    let mut taken = vec![0u64; calls.len().div_ceil(64)];
    let mut tried: HashSet<(Vec<u64>, BTreeMap<String, u64>)> = HashSet::new();
    let mut stack: Vec<(usize, BTreeMap<String, u64>)> = Vec::new();
    let mut at = events.next[0];
    while !events.is_over(events.next[0]) {
        let (call, begins) = events.of[at];
        if begins {
            if let Some(after) = calls[call].op.step(&values) {
                let mut with = taken.clone();
                with[call / 64] |= 1 << (call % 64);
                if tried.insert((with.clone(), after.clone())) {
                    stack.push((call, std::mem::replace(&mut values, after)));
                    taken = with;
                    events.take(call);
                    at = events.next[0];
                    continue;
                }
            }
            at = events.next[at];
            continue;
        }
        // The end of a call that has no place yet: the last decision was wrong.
        let Some((call, earlier)) = stack.pop() else {
            return false;
        };
        values = earlier;
        taken[call / 64] &= !(1 << (call % 64));
        events.put_back(call);
        at = events.next[events.begins[call]];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `begin`, `end` in milliseconds.
    fn call(op: Op, begin: u64, end: Option<u64>) -> Call {
        Call {
            op,
            begin: Duration::from_millis(begin),
            end: end.map(Duration::from_millis),
        }
    }

    fn values(values: &[(&str, Option<u64>)]) -> Values {
        let owned = values.iter().map(|(key, value)| (key.to_string(), *value));
        owned.collect()
    }

    fn read(found: &[(&str, Option<u64>)]) -> Op {
        Op::Read(values(found))
    }

    fn txn(when: &[(&str, Option<u64>)], put: &[(&str, u64)], done: Option<bool>) -> Op {
        Op::Txn {
            when: values(when),
            put: put.iter().map(|(key, to)| (key.to_string(), *to)).collect(),
            done,
        }
    }

    fn reads(value: Option<u64>) -> Op {
        read(&[("k", value)])
    }

    fn writes(value: u64) -> Op {
        txn(&[], &[("k", value)], Some(true))
    }

    fn swap(from: Option<u64>, to: u64, done: Option<bool>) -> Op {
        txn(&[("k", from)], &[("k", to)], done)
    }

    #[test]
    fn concurrent_calls_have_some_order() {
        let history = [
            call(writes(1), 0, Some(10)),
            call(reads(None), 1, Some(9)),
            call(reads(Some(1)), 2, Some(8)),
            call(swap(Some(1), 2, Some(true)), 3, Some(12)),
            call(reads(Some(2)), 11, Some(13)),
        ];
        assert_eq!(check(&history), Ok(()));
    }

    #[test]
    fn stale_reads_are_found() {
        let history = [
            call(writes(1), 0, Some(1)),
            call(writes(2), 2, Some(3)),
            call(reads(Some(1)), 4, Some(5)),
        ];
        let error = check(&history).unwrap_err();
        assert!(error.contains("since Some(Call { op: Read({\"k\": Some(1)}),"));
        // Two reads of one order each, which contradict each other.
        let history = [
            call(writes(1), 0, Some(9)),
            call(writes(2), 0, Some(9)),
            call(reads(Some(1)), 10, Some(11)),
            call(reads(Some(2)), 12, Some(13)),
        ];
        assert!(check(&history).is_err());
    }

    #[test]
    fn lost_and_doubled_writes_are_found() {
        let lost = [call(writes(1), 0, Some(1)), call(reads(None), 2, Some(3))];
        assert!(check(&lost).is_err());
        let doubled = [
            call(writes(1), 0, Some(1)),
            call(swap(Some(1), 2, Some(true)), 2, Some(9)),
            call(swap(Some(1), 3, Some(true)), 2, Some(9)),
        ];
        assert!(check(&doubled).is_err());
    }

    #[test]
    fn what_has_no_answer_may_happen_late_or_never() {
        let write = call(txn(&[], &[("k", 1)], None), 0, None);
        for value in [None, Some(1)] {
            let history = [write.clone(), call(reads(value), 5, Some(6))];
            assert_eq!(check(&history), Ok(()), "{value:?}");
        }
        // But not before it began, and not twice.
        let history = [
            call(reads(Some(1)), 0, Some(1)),
            call(txn(&[], &[("k", 1)], None), 2, None),
        ];
        assert!(check(&history).is_err());
        let history = [
            write,
            call(reads(Some(1)), 1, Some(2)),
            call(writes(2), 3, Some(4)),
            call(reads(Some(1)), 5, Some(6)),
        ];
        assert!(check(&history).is_err());
        let swapped = [
            call(swap(None, 1, None), 0, None),
            call(swap(Some(1), 2, Some(true)), 3, Some(4)),
        ];
        assert_eq!(check(&swapped), Ok(()));
    }

    /// Each key by itself has an order, but both together have none.
    #[test]
    fn half_a_transaction_is_found() {
        let both = call(
            txn(&[("a", None)], &[("a", 1), ("b", 1)], Some(true)),
            0,
            Some(9),
        );
        for (b, whole) in [(Some(1), true), (None, false)] {
            let seen = call(read(&[("a", Some(1)), ("b", b)]), 1, Some(8));
            assert_eq!(check(&[both.clone(), seen]).is_ok(), whole, "{b:?}");
        }
        // Two reads of one key each see it in an order that it cannot have.
        let in_turn = [
            both.clone(),
            call(read(&[("a", Some(1))]), 1, Some(2)),
            call(read(&[("b", None)]), 3, Some(4)),
        ];
        assert!(check(&in_turn).is_err());
        // A condition on one key decides what happens to the other.
        for done in [true, false] {
            let other = txn(&[("b", None)], &[("a", 2)], Some(done));
            let after = [both.clone(), call(other, 10, Some(11))];
            assert_eq!(check(&after).is_err(), done);
        }
    }
}
