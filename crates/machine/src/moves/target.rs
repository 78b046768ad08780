//! A move of one machine, seen from the target's worker.
//!
//! ```text
//!   Receiving ──state arrived──▶ Preparing ──instances made──▶ Prepared ──go (epoch)──▶ Running
//!       │ failed / lost / abort      │ failed / lost / abort       │ failed / abort      │ not
//!       ▼                            ▼                             ▼                     │ resumed
//!   Dropped ◀────────────────────────┴─────────────────────────────┴─────────────────────┘
//! ```
//!
//! Once `Prepared`, the loss of the source alone does not drop the machine: the commit
//! may have been applied. The own agent, which reads the store, then sends `go` or
//! `abort`. The machine runs only after a `go` with an epoch newer than that of the
//! offer. If it fails before it has run here, it is dropped even so, as if this process had died: the
//! source, which keeps its copy until it is told that the machine runs, takes it back by a write.

use keel_cluster::Epoch;

/// State of the move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetState {
    /// Pages arrive.
    Receiving,
    /// Threads and instances are being created.
    Preparing,
    /// All has arrived; the go message is awaited.
    Prepared,
    /// The machine runs here.
    Running { epoch: Epoch },
    /// The machine does not run here and never will.
    Dropped,
}

/// An event of the move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetEvent {
    /// The last part of the state arrived.
    StateArrived,
    /// The machine is ready to resume.
    InstancesMade,
    /// The machine cannot be restored, or what was restored is lost before it runs.
    Failed(String),
    /// It was to be resumed, and cannot be. It has not run here.
    NotResumed(String),
    /// The commit was applied; from the source or the own agent.
    Go(Epoch),
    /// The source or the own agent gave the move up.
    Abort(String),
    /// The connection to the source is lost.
    SourceLost(String),
}

/// A command to the runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetCommand {
    /// Create threads and instances.
    Prepare,
    /// Tell the source that all is ready.
    SendPrepared,
    /// Resume the machine under an epoch.
    Thaw(Epoch),
    /// Tell the source, and later askers, that the machine runs.
    SendResumed(Epoch),
    /// Drop all that was received.
    Drop(String),
    /// Tell the own agent that only the store knows the outcome.
    AskAgent,
}

/// A move of one machine, seen from the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetMove {
    state: TargetState,
    offered: Epoch,
}

impl TargetMove {
    /// A move that was accepted; the machine ran under `offered`.
    pub fn new(offered: Epoch) -> Self {
        TargetMove {
            state: TargetState::Receiving,
            offered,
        }
    }

    pub fn state(&self) -> TargetState {
        self.state
    }

    /// Processes an event; returns the commands.
    pub fn step(&mut self, event: TargetEvent) -> Vec<TargetCommand> {
        use TargetCommand as C;
        use TargetEvent as E;
        use TargetState as S;
        match (self.state, event) {
            (S::Receiving, E::StateArrived) => {
                self.state = S::Preparing;
                vec![C::Prepare]
            }
            (S::Preparing, E::InstancesMade) => {
                self.state = S::Prepared;
                vec![C::SendPrepared]
            }
            (S::Prepared, E::Go(epoch)) if epoch > self.offered => {
                self.state = S::Running { epoch };
                vec![C::Thaw(epoch), C::SendResumed(epoch)]
            }
            // Repeated because the answer was lost.
            (S::Running { epoch }, E::Go(_)) => vec![C::SendResumed(epoch)],
            (S::Prepared, E::SourceLost(_)) => vec![C::AskAgent],
            (S::Receiving | S::Preparing, E::SourceLost(reason))
            | (S::Receiving | S::Preparing | S::Prepared, E::Abort(reason) | E::Failed(reason))
            | (S::Running { .. }, E::NotResumed(reason)) => {
                self.state = S::Dropped;
                vec![C::Drop(reason)]
            }
            (S::Receiving | S::Preparing | S::Prepared | S::Running { .. } | S::Dropped, _) => {
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch {
        incarnation: 1,
        counter: 3,
    };

    fn prepared() -> TargetMove {
        let mut target = TargetMove::new(EPOCH);
        assert_eq!(
            target.step(TargetEvent::StateArrived),
            [TargetCommand::Prepare]
        );
        assert_eq!(
            target.step(TargetEvent::InstancesMade),
            [TargetCommand::SendPrepared]
        );
        target
    }

    #[test]
    fn runs_only_under_a_newer_epoch() {
        let mut target = prepared();
        assert_eq!(target.step(TargetEvent::Go(EPOCH)), []);
        let next = EPOCH.next();
        let thaw = [TargetCommand::Thaw(next), TargetCommand::SendResumed(next)];
        assert_eq!(target.step(TargetEvent::Go(next)), thaw);
        // Only once, however often it is requested.
        assert_eq!(
            target.step(TargetEvent::Go(next)),
            [TargetCommand::SendResumed(next)]
        );
        assert_eq!(target.step(TargetEvent::Abort("late".into())), []);
    }

    #[test]
    fn a_lost_source_drops_it_only_before_it_is_prepared() {
        let mut early = TargetMove::new(EPOCH);
        let lost = || TargetEvent::SourceLost("lost".into());
        assert_eq!(early.step(lost()), [TargetCommand::Drop("lost".into())]);
        assert_eq!(early.step(TargetEvent::Go(EPOCH.next())), []);
        let mut late = prepared();
        assert_eq!(late.step(lost()), [TargetCommand::AskAgent]);
        assert!(matches!(
            late.step(TargetEvent::Go(EPOCH.next()))[0],
            TargetCommand::Thaw(_)
        ));
    }

    #[test]
    fn what_does_not_run_here_is_dropped_and_never_resumed() {
        let mut early = prepared();
        let dropped = [TargetCommand::Drop("gone".into())];
        assert_eq!(early.step(TargetEvent::Failed("gone".into())), dropped);
        assert_eq!(early.step(TargetEvent::Go(EPOCH.next())), []);
        let mut late = prepared();
        late.step(TargetEvent::Go(EPOCH.next()));
        // Once it runs its end is reported, and it stays here.
        assert_eq!(late.step(TargetEvent::Failed("gone".into())), []);
        assert_eq!(late.step(TargetEvent::NotResumed("gone".into())), dropped);
        assert_eq!(late.step(TargetEvent::Go(EPOCH.next())), []);
        assert_eq!(late.state(), TargetState::Dropped);
    }
}
