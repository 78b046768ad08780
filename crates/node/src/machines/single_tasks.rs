//! Tasks of which there is one for each worker, although several may ask for it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The workers that have a task, each with whether it was asked for again.
#[derive(Debug, Default)]
pub(super) struct SingleTasks(Mutex<BTreeMap<u64, bool>>);

impl SingleTasks {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, bool>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the task of a worker: whether the caller has to begin it.
    pub(super) fn begin(&self, worker: u64) -> bool {
        let mut all = self.all();
        let again = all.get_mut(&worker);
        let is_first = again.is_none();
        match again {
            Some(again) => *again = true,
            None => {
                all.insert(worker, false);
            }
        }
        is_first
    }

    /// To be asked by a task with nothing left to do: whether it may end, since nobody has asked for
    /// it again.
    pub(super) fn end(&self, worker: u64) -> bool {
        let mut all = self.all();
        let again = all.get_mut(&worker).is_some_and(std::mem::take);
        if !again {
            all.remove(&worker);
        }
        !again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_that_sees_each_request() {
        let tasks = SingleTasks::default();
        assert!(tasks.begin(1));
        assert!(tasks.begin(2));
        assert!(!tasks.begin(1));
        // Asked for meanwhile: it looks again.
        assert!(!tasks.end(1));
        assert!(tasks.end(1));
        assert!(tasks.begin(1));
    }
}
