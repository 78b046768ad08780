//! Locking of the runtime's shared state.

use std::sync::{Mutex, MutexGuard};

/// Locks a mutex, ignoring poisoning.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}
