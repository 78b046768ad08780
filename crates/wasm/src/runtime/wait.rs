//! `memory.atomic.wait` and `notify`: queues of threads by address, in order.
//!
//! A captured waiting thread stays in its queue, so no wake-up is lost: it finds itself woken when
//! it resumes.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// All wait queues of a machine; plain data, part of its image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitQueues {
    /// By memory and address: threads in FIFO order.
    queues: BTreeMap<(u32, u64), VecDeque<u32>>,
    /// Threads that were woken and have not returned yet.
    woken: BTreeSet<u32>,
}

impl WaitQueues {
    /// Appends a thread to a queue.
    pub fn enter(&mut self, memory: u32, address: u64, tid: u32) {
        self.queues
            .entry((memory, address))
            .or_default()
            .push_back(tid);
    }

    /// Wakes up to `count` threads, and returns them.
    pub fn notify(&mut self, memory: u32, address: u64, count: u32) -> Vec<u32> {
        let Some(queue) = self.queues.get_mut(&(memory, address)) else {
            return Vec::new();
        };
        let count = (count as usize).min(queue.len());
        let woken: Vec<u32> = queue.drain(..count).collect();
        if queue.is_empty() {
            self.queues.remove(&(memory, address));
        }
        self.woken.extend(&woken);
        woken
    }

    /// Whether a thread was woken; clears the mark.
    pub fn take_woken(&mut self, tid: u32) -> bool {
        self.woken.remove(&tid)
    }

    /// Whether a thread was woken.
    pub fn is_woken(&self, tid: u32) -> bool {
        self.woken.contains(&tid)
    }

    /// Whether a thread is in a queue.
    pub fn has(&self, tid: u32) -> bool {
        self.queues.values().any(|queue| queue.contains(&tid))
    }

    /// Removes a thread from its queue after a time-out.
    pub fn leave(&mut self, memory: u32, address: u64, tid: u32) {
        if let Some(queue) = self.queues.get_mut(&(memory, address)) {
            queue.retain(|waiting| *waiting != tid);
            if queue.is_empty() {
                self.queues.remove(&(memory, address));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_in_order_and_remembers() {
        let mut queues = WaitQueues::default();
        for tid in [3, 1, 2] {
            queues.enter(0, 64, tid);
        }
        assert_eq!(queues.notify(0, 68, 9), []);
        assert_eq!(queues.notify(0, 64, 2), [3, 1]);
        assert!(queues.take_woken(3));
        assert!(!queues.take_woken(3));
        assert!(queues.is_woken(1));
        queues.leave(0, 64, 2);
        assert_eq!(queues.notify(0, 64, u32::MAX), []);
    }
}
