//! The event queue.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Things to come; of the same instant, in the order in which they were put.
#[derive(Debug)]
pub(super) struct Queue<T> {
    /// Time, sequence number, slot.
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    slots: Vec<Option<T>>,
    free: Vec<usize>,
    put: u64,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Self {
        Queue {
            heap: BinaryHeap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            put: 0,
        }
    }

    pub(super) fn put(&mut self, at_ms: u64, thing: T) {
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = Some(thing);
                slot
            }
            None => {
                self.slots.push(Some(thing));
                self.slots.len() - 1
            }
        };
        self.put += 1;
        self.heap.push(Reverse((at_ms, self.put, slot)));
    }

    /// The next event and its time, if that is not later than `until_ms`.
    pub(super) fn take(&mut self, until_ms: u64) -> Option<(u64, T)> {
        let Reverse((at_ms, _, slot)) = *self.heap.peek()?;
        if at_ms > until_ms {
            return None;
        }
        self.heap.pop();
        self.free.push(slot);
        let thing = self.slots[slot].take()?;
        Some((at_ms, thing))
    }
}

#[cfg(test)]
mod tests {
    use super::Queue;

    #[test]
    fn in_order_of_time_and_then_of_putting() {
        let mut queue = Queue::new();
        for (at_ms, thing) in [(5, 'c'), (3, 'a'), (5, 'd'), (3, 'b')] {
            queue.put(at_ms, thing);
        }
        assert_eq!(queue.take(2), None);
        assert_eq!(queue.take(3), Some((3, 'a')));
        queue.put(3, 'x');
        let rest: String = std::iter::from_fn(|| queue.take(9))
            .map(|it| it.1)
            .collect();
        assert_eq!(rest, "bxcd");
        assert_eq!(queue.slots.len(), 4);
    }
}
