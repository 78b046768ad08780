//! Failpoints for workers that start later.

use keel_machine::failpoint::Injection;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// By the failpoint's name.
static ORDERS: Mutex<BTreeMap<&'static str, Injection>> = Mutex::new(BTreeMap::new());

/// The failpoints of new workers.
pub(super) fn orders() -> MutexGuard<'static, BTreeMap<&'static str, Injection>> {
    ORDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The failpoints of a new worker, in the format of its environment variable.
pub(super) fn for_new_worker() -> String {
    let orders = orders();
    let orders: Vec<String> = orders
        .iter()
        .map(|(name, order)| format!("{name}={order}"))
        .collect();
    orders.join(";")
}
