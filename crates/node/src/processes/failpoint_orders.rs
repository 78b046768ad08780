//! Orders for failpoints that workers get which are started later.

use keel_machine::failpoint::Injection;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// By the failpoint's name.
static ORDERS: Mutex<BTreeMap<&'static str, Injection>> = Mutex::new(BTreeMap::new());

/// The orders that new workers get.
pub(super) fn orders() -> MutexGuard<'static, BTreeMap<&'static str, Injection>> {
    ORDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The orders for a new worker, as its environment has them.
pub(super) fn for_new_worker() -> String {
    let orders = orders();
    let orders: Vec<String> = orders
        .iter()
        .map(|(name, order)| format!("{name}={order}"))
        .collect();
    orders.join(";")
}
