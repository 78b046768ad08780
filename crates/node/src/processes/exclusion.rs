//! The operations in progress on the machines of this node, so that conflicting ones exclude each
//! other: a move and a change of limits, a start and a removal.

use keel_cluster::MachineName;
use keel_machine::moves::SourceEvent;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Control of a move in progress by other operations.
#[derive(Debug, Clone)]
pub(crate) struct MoveHandle {
    interrupt: watch::Sender<Option<SourceEvent>>,
    over: watch::Receiver<bool>,
}

/// The move's ends of the channels of a [`MoveHandle`].
pub(crate) struct MoveEnds {
    /// The event that interrupts the move, once there is one.
    pub(crate) interrupted: watch::Receiver<Option<SourceEvent>>,
    /// Set to true at the end of the move.
    pub(crate) over: watch::Sender<bool>,
}

impl MoveHandle {
    pub(crate) fn new() -> (Self, MoveEnds) {
        let (interrupt, interrupted) = watch::channel(None);
        let (over_sender, over) = watch::channel(false);
        let ends = MoveEnds {
            interrupted,
            over: over_sender,
        };
        (MoveHandle { interrupt, over }, ends)
    }

    /// Asks the move to stop. It may complete all the same.
    pub(crate) fn cancel(&self, reason: &str) {
        self.interrupt
            .send_replace(Some(SourceEvent::Cancel(reason.to_owned())));
    }

    /// Waits for the end of the move, with either result.
    pub(crate) async fn over(mut self) {
        // A dropped sender means the same.
        let _ = self.over.wait_for(|over| *over).await;
    }
}

/// Operations in progress, by machine.
#[derive(Debug, Default)]
pub(crate) struct Exclusion {
    moves: Mutex<HashMap<MachineName, MoveHandle>>,
    busy: Mutex<HashSet<MachineName>>,
    /// Held during a change of a machine's limits or its set of parts.
    pub(crate) changes: tokio::sync::Mutex<()>,
}

impl Exclusion {
    /// Moves away from here.
    pub(crate) fn moves(&self) -> MutexGuard<'_, HashMap<MachineName, MoveHandle>> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a machine is moving away from here.
    pub(crate) fn is_moving(&self, machine: &MachineName) -> bool {
        self.moves().contains_key(machine)
    }

    /// Machines that are arriving, being started, ended or removed.
    pub(crate) fn busy(&self) -> MutexGuard<'_, HashSet<MachineName>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Interrupts a move of a machine that has ended by itself.
    pub(crate) fn machine_ended(&self, machine: &MachineName) {
        if let Some(handle) = self.moves().get(machine) {
            handle
                .interrupt
                .send_replace(Some(SourceEvent::MachineEnded));
        }
    }
}
