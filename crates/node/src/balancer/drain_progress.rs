//! How far emptying this node has come.

use keel_api::{LeftBehind, PlanStep};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How far emptying this node has come.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress(Arc<Mutex<State>>);

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) moved: u32,
    pub(super) moving: Vec<PlanStep>,
    pub(super) left: Vec<LeftBehind>,
    /// What is left, in milliseconds, as predicted, and when that was.
    pub(super) rest: Option<(f64, u64)>,
}

impl Progress {
    pub(super) fn locked(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
