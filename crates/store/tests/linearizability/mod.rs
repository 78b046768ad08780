//! A checker of histories for linearizability: is there an order of all calls, each between its
//! beginning and its end, in which a plain register gives the same answers?
//!
//! The algorithm is that of Wing and Gong ("Testing and verifying concurrent objects", 1993) with
//! Lowe's memory of states already tried ("Testing for linearizability", 2017), each key apart, as
//! in Knossos and Porcupine.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

/// What a call did, with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    /// The value found.
    Read(Option<u64>),
    Write(u64),
    /// Writes `to` if the value is `from`; whether it was, if that is known.
    Swap {
        from: Option<u64>,
        to: u64,
        done: Option<bool>,
    },
}

impl Op {
    /// The same before its answer came.
    fn unanswered(&self) -> Self {
        match self.clone() {
            Op::Swap { from, to, .. } => Op::Swap {
                from,
                to,
                done: None,
            },
            other => other,
        }
    }

    /// The value after the call, if its answer fits the value before.
    fn step(&self, value: Option<u64>) -> Option<Option<u64>> {
        match self {
            Op::Read(found) => (*found == value).then_some(value),
            Op::Write(written) => Some(Some(*written)),
            Op::Swap { from, to, done } => {
                let fits = *from == value;
                let after = if fits { Some(*to) } else { value };
                done.is_none_or(|done| done == fits).then_some(after)
            }
        }
    }
}

/// One call of one client.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) key: String,
    pub(crate) op: Op,
    pub(crate) begin: Duration,
    /// `None` if no answer came: it may take effect at any time after its beginning, or never.
    pub(crate) end: Option<Duration>,
}

/// Finds the first key whose history no order explains.
pub(crate) fn check(history: &[Call]) -> Result<(), String> {
    let mut keys: BTreeMap<&str, Vec<&Call>> = BTreeMap::new();
    for call in history {
        keys.entry(&call.key).or_default().push(call);
    }
    for (key, calls) in keys {
        if !explains(&calls) {
            return Err(format!(
                "no order of its {} calls explains {key}, since {:?}",
                calls.len(),
                first_unexplained(&calls)
            ));
        }
    }
    Ok(())
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
    let mut value = None;
    let mut taken = vec![0u64; calls.len().div_ceil(64)];
    let mut tried: HashSet<(Vec<u64>, Option<u64>)> = HashSet::new();
    let mut stack: Vec<(usize, Option<u64>)> = Vec::new();
    let mut at = events.next[0];
    while !events.is_over(events.next[0]) {
        let (call, begins) = events.of[at];
        if begins {
            if let Some(after) = calls[call].op.step(value) {
                let mut with = taken.clone();
                with[call / 64] |= 1 << (call % 64);
                if tried.insert((with.clone(), after)) {
                    stack.push((call, value));
                    (taken, value) = (with, after);
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
        value = earlier;
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
            key: "k".into(),
            op,
            begin: Duration::from_millis(begin),
            end: end.map(Duration::from_millis),
        }
    }

    fn swap(from: Option<u64>, to: u64, done: Option<bool>) -> Op {
        Op::Swap { from, to, done }
    }

    #[test]
    fn concurrent_calls_have_some_order() {
        let history = [
            call(Op::Write(1), 0, Some(10)),
            call(Op::Read(None), 1, Some(9)),
            call(Op::Read(Some(1)), 2, Some(8)),
            call(swap(Some(1), 2, Some(true)), 3, Some(12)),
            call(Op::Read(Some(2)), 11, Some(13)),
        ];
        assert_eq!(check(&history), Ok(()));
    }

    #[test]
    fn stale_reads_are_found() {
        let history = [
            call(Op::Write(1), 0, Some(1)),
            call(Op::Write(2), 2, Some(3)),
            call(Op::Read(Some(1)), 4, Some(5)),
        ];
        let error = check(&history).unwrap_err();
        assert!(error.contains("since Some(Call { key: \"k\", op: Read(Some(1)),"));
        // Two reads of one order each, which contradict each other.
        let history = [
            call(Op::Write(1), 0, Some(9)),
            call(Op::Write(2), 0, Some(9)),
            call(Op::Read(Some(1)), 10, Some(11)),
            call(Op::Read(Some(2)), 12, Some(13)),
        ];
        assert!(check(&history).is_err());
    }

    #[test]
    fn lost_and_doubled_writes_are_found() {
        let lost = [
            call(Op::Write(1), 0, Some(1)),
            call(Op::Read(None), 2, Some(3)),
        ];
        assert!(check(&lost).is_err());
        let doubled = [
            call(Op::Write(1), 0, Some(1)),
            call(swap(Some(1), 2, Some(true)), 2, Some(9)),
            call(swap(Some(1), 3, Some(true)), 2, Some(9)),
        ];
        assert!(check(&doubled).is_err());
    }

    #[test]
    fn what_has_no_answer_may_happen_late_or_never() {
        let write = call(Op::Write(1), 0, None);
        for read in [None, Some(1)] {
            let history = [write.clone(), call(Op::Read(read), 5, Some(6))];
            assert_eq!(check(&history), Ok(()), "{read:?}");
        }
        // But not before it began, and not twice.
        let history = [
            call(Op::Read(Some(1)), 0, Some(1)),
            call(Op::Write(1), 2, None),
        ];
        assert!(check(&history).is_err());
        let history = [
            write,
            call(Op::Read(Some(1)), 1, Some(2)),
            call(Op::Write(2), 3, Some(4)),
            call(Op::Read(Some(1)), 5, Some(6)),
        ];
        assert!(check(&history).is_err());
        let swapped = [
            call(swap(None, 1, None), 0, None),
            call(swap(Some(1), 2, Some(true)), 3, Some(4)),
        ];
        assert_eq!(check(&swapped), Ok(()));
    }
}
