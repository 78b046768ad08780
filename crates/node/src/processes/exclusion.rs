//! Which operations are under way with the machines of this node, so that two that
//! contradict each other do not run at the same time: a move and a change of limits, a
//! start and a removal.

use keel_cluster::MachineName;
use keel_machine::moves::SourceEvent;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// What others can do to a move that is under way.
#[derive(Debug, Clone)]
pub(crate) struct MoveHandle {
    interrupt: watch::Sender<Option<SourceEvent>>,
    over: watch::Receiver<bool>,
}

/// The ends of a [`MoveHandle`] that its move has.
pub(crate) struct MoveEnds {
    /// What interrupts it, once something does.
    pub(crate) interrupted: watch::Receiver<Option<SourceEvent>>,
    /// Set to true when it is over.
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

    /// Asks the move to stop; it may be too late.
    pub(crate) fn cancel(&self, reason: &str) {
        self.interrupt
            .send_replace(Some(SourceEvent::Cancel(reason.to_owned())));
    }

    /// Waits until the move is over, one way or the other.
    pub(crate) async fn over(mut self) {
        // A sender that is gone means the same.
        let _ = self.over.wait_for(|over| *over).await;
    }
}

/// Operations that are under way, by machine.
#[derive(Debug, Default)]
pub(crate) struct Exclusion {
    moves: Mutex<HashMap<MachineName, MoveHandle>>,
    busy: Mutex<HashSet<MachineName>>,
    /// Held while a machine's limits or its set of parts are changed.
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

    /// The machine ended by itself: a move of it, if there is one, is interrupted.
    pub(crate) fn machine_ended(&self, machine: &MachineName) {
        if let Some(handle) = self.moves().get(machine) {
            handle
                .interrupt
                .send_replace(Some(SourceEvent::MachineEnded));
        }
    }
}
