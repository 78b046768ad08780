//! One machine move, seen from the target's worker.
//!
//! ```text
//!   Receiving ──state arrived──▶ Preparing ──instances made──▶ Prepared ──go (epoch)──▶ Running
//!       │ source lost / abort        │ failed / lost / abort       │ abort / agent: never
//!       ▼                            ▼                             ▼
//!   Dropped ◀────────────────────────┴─────────────────────────────┘
//! ```
//!
//! Once `Prepared`, a lost source alone does not drop the machine: the commit
//! may have won. Its own agent, which reads the store, then says `go` or
//! `abort`. It runs only on a `go` that names an epoch newer than the one it
//! was offered under.

use keel_cluster::Epoch;

/// Where the move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetState {
    /// Pages arrive.
    Receiving,
    /// Threads and instances are being made.
    Preparing,
    /// Everything is there; the word to go is awaited.
    Prepared,
    /// It runs here.
    Running {
        /// Under this epoch.
        epoch: Epoch,
    },
    /// It does not, and never will.
    Dropped,
}

/// What happens to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetEvent {
    /// The last of the state arrived.
    StateArrived,
    /// It is ready to go on.
    InstancesMade,
    /// It cannot be made ready.
    Failed(String),
    /// The commit won; from the source or from the own agent.
    Go(Epoch),
    /// The source, or the own agent, gave the move up.
    Abort(String),
    /// The connection to the source is lost.
    SourceLost(String),
}

/// What the runtime is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetCommand {
    /// Make threads and instances.
    Prepare,
    /// Tell the source that all is ready.
    SendPrepared,
    /// Let the machine go on under an epoch.
    Thaw(Epoch),
    /// Tell the source, and whoever asks, that it runs.
    SendResumed(Epoch),
    /// Forget everything.
    Drop(String),
    /// Tell the own agent that only the store can say how it goes on.
    AskAgent,
}

/// One machine move, seen from the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetMove {
    state: TargetState,
    offered: Epoch,
}

impl TargetMove {
    /// A move that was accepted, of a machine that ran under `offered`.
    pub fn new(offered: Epoch) -> Self {
        TargetMove {
            state: TargetState::Receiving,
            offered,
        }
    }

    /// Where it is.
    pub fn state(&self) -> TargetState {
        self.state
    }

    /// Takes an event, answers with what to do.
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
            // Said again because the answer was lost.
            (S::Running { epoch }, E::Go(_)) => vec![C::SendResumed(epoch)],
            (S::Prepared, E::SourceLost(_)) => vec![C::AskAgent],
            (S::Receiving | S::Preparing, E::Failed(reason) | E::SourceLost(reason))
            | (S::Receiving | S::Preparing | S::Prepared, E::Abort(reason)) => {
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
        // Once only, however often it is told.
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
}
