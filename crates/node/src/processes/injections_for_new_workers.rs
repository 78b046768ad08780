//! Injections for workers that start later: a failpoint that is set for workers also holds for them.

use keel_machine::failpoint::Injection;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// By the failpoint's name.
static INJECTIONS: Mutex<BTreeMap<&'static str, Injection>> = Mutex::new(BTreeMap::new());

/// The injections of new workers.
pub(super) fn injections() -> MutexGuard<'static, BTreeMap<&'static str, Injection>> {
    INJECTIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The injections of a new worker, in the format of its environment variable.
pub(super) fn for_new_worker() -> String {
    let injections = injections();
    let injections: Vec<String> = injections
        .iter()
        .map(|(name, injection)| format!("{name}={injection}"))
        .collect();
    injections.join(";")
}
