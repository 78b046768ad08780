//! Progress of the drain of this node.

use keel_api::{LeftBehind, PlanStep};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Progress of the drain of this node.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress(Arc<Mutex<State>>);

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) moved: u32,
    pub(super) moving: Vec<PlanStep>,
    pub(super) left: Vec<LeftBehind>,
    /// Predicted remaining time in milliseconds, and when it was predicted.
    pub(super) rest: Option<(f64, u64)>,
}

impl Progress {
    pub(super) fn locked(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
