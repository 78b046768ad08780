//! Machines of this node that are getting parts.

use keel_balance::Name;
use keel_cluster::MachineName;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Machines of this node that are getting parts: rounds do not move them meanwhile.
#[derive(Debug, Clone, Default)]
pub(super) struct Spreading(Arc<Mutex<BTreeSet<Name>>>);

impl Spreading {
    pub(super) fn contains(&self, machine: &Name) -> bool {
        self.machines().contains(machine)
    }

    fn machines(&self) -> MutexGuard<'_, BTreeSet<Name>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a machine until the returned guard is dropped.
    pub(super) fn begin(&self, machine: &MachineName) -> SpreadingGuard {
        let machine = Name::from(machine.as_str());
        self.machines().insert(machine.clone());
        SpreadingGuard(self.clone(), machine)
    }
}

pub(super) struct SpreadingGuard(Spreading, Name);

impl Drop for SpreadingGuard {
    fn drop(&mut self) {
        self.0.machines().remove(&self.1);
    }
}
