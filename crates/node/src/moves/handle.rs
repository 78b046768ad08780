//! State of the moves layer.

use super::dry_run_history::History;
use super::queue::MoveQueue;
use crate::checkpoints::Checkpoints;
use crate::compilation::Code;
use crate::context::Context;
use crate::images::Images;
use crate::processes::Processes;
use crate::rules::Rules;
use crate::spanning::Spanning;
use crate::traces::Span;
use keel_api::Urgency;
use keel_cluster::{MachineName, NodeName};
use keel_machine::moves::MoveReport;
use keel_machine::moves::convergence::LAST_PAGES_BUDGET;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::broadcast;

/// Reports that a subscriber may lag behind before it loses some.
const BEHIND_MAX: usize = 256;

/// A user's order to move a machine, with its options.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MoveOrder {
    pub(crate) machine: MachineName,
    pub(crate) target: NodeName,
    /// Whether the move is post-copy.
    pub(crate) post_copy: bool,
    /// Where the checkpoint that precedes a post-copy move is stored.
    pub(crate) checkpoint_to: Option<String>,
    pub(crate) urgency: Urgency,
    /// The longest downtime for sending the residual dirty pages, in microseconds.
    pub(crate) budget_micros: Option<u64>,
}

impl MoveOrder {
    pub(super) fn budget(&self) -> Duration {
        self.budget_micros
            .map_or(LAST_PAGES_BUDGET, Duration::from_micros)
    }
}

/// Moves away from this node, and to it.
pub(crate) struct Moves {
    pub(super) context: Arc<Context>,
    pub(super) processes: Arc<Processes>,
    pub(super) images: Arc<Images>,
    pub(super) code: Arc<Code>,
    pub(super) rules: Arc<Rules>,
    pub(super) checkpoints: Arc<Checkpoints>,
    pub(super) spanning: Arc<Spanning>,
    /// Which moves away from here copy at a time.
    pub(crate) queue: Arc<MoveQueue>,
    /// Held during the check and reservation of room for an arriving machine.
    pub(super) reserving: tokio::sync::Mutex<()>,
    history: Mutex<History>,
    /// Traces of the machines that are arriving.
    arrivals: Mutex<HashMap<MachineName, Span>>,
    ended: broadcast::Sender<Arc<MoveReport>>,
}

/// The lower layers.
pub(crate) struct Dependencies {
    pub(crate) context: Arc<Context>,
    pub(crate) processes: Arc<Processes>,
    pub(crate) images: Arc<Images>,
    pub(crate) code: Arc<Code>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) checkpoints: Arc<Checkpoints>,
    pub(crate) spanning: Arc<Spanning>,
}

impl Moves {
    pub(crate) fn new(below: Dependencies) -> Self {
        Moves {
            context: below.context,
            processes: below.processes,
            images: below.images,
            code: below.code,
            rules: below.rules,
            checkpoints: below.checkpoints,
            spanning: below.spanning,
            queue: Arc::default(),
            reserving: tokio::sync::Mutex::default(),
            history: Mutex::default(),
            arrivals: Mutex::default(),
            ended: broadcast::Sender::new(BEHIND_MAX),
        }
    }

    /// Reports of the moves away from here, as they end.
    pub(crate) fn ended(&self) -> broadcast::Receiver<Arc<MoveReport>> {
        self.ended.subscribe()
    }

    /// Announces the end of a move.
    pub(super) fn announce_end(&self, report: &MoveReport) {
        // There may be no subscriber.
        let _ = self.ended.send(Arc::new(report.clone()));
    }

    /// Keeps the trace of an arriving machine until it runs here, or does not.
    pub(super) fn trace_arrival(&self, machine: &MachineName, trace: Span) {
        self.arrivals().insert(machine.clone(), trace);
    }

    /// Ends the trace of an arriving machine; nothing if it has none.
    pub(crate) fn end_arrival_trace(&self, machine: &MachineName, outcome: Result<(), &str>) {
        let trace = self.arrivals().remove(machine);
        if let (Some(trace), Err(reason)) = (trace, outcome) {
            trace.fail(reason);
        }
    }

    fn arrivals(&self) -> MutexGuard<'_, HashMap<MachineName, Span>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rate of a copy to a node by the last moves there, in bytes per second, if it is known.
    pub(crate) fn rate_to(&self, target: &NodeName) -> Option<f64> {
        self.history().rate_to(target)
    }

    /// Earlier moves away from here.
    pub(super) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
