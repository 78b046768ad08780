//! A move of one machine, seen from the source.
//!
//! ```text
//!   Offered ──accepted──▶ Copying ──converged, store answers──▶ Freezing ──all arrived──▶ Committing
//!      │ refused             │ cancelled / peer lost /             │ too late /              │      │
//!      │                     │ store down                          │ peer lost / cancelled   │      │ answer lost
//!      ▼                     ▼                                     ▼                         │      ▼
//!   Stayed ◀─────────────────┴─────────────────────────────────────┘◀──────── refused ───────┤   InDoubt
//!      ▲                                                                                     │    │    │
//!      │ own write won (new epoch)                                                           │won │    │ the record shows
//!      └─────────────────────────────────────────────────────────────────────────────────────┼────┘    │ the commit
//!                                                                                            ▼         ▼
//!   Gone ◀──────────────────────────── target resumed ─────────────────────────────────── Handed ◀─────┘
//!      ▲                                                                                     │ target resumed (post-copy)
//!      └──────────────────────────── target has all pages ──────────────────────────────── Serving
//!
//!   InDoubt, TakingBack ──the machine ended, was removed or has another owner──▶ Superseded
//! ```
//!
//! Until the commit is applied, every failure leads to `Stayed`: the machine runs on
//! unchanged. A read never resolves `InDoubt`; only a write does. In `Handed` the frozen
//! copy is kept until the target's agent reports that the machine resumed, or that it did
//! not and never will: then the source takes it back, by a write under a new epoch. In
//! `Serving` the machine runs at the target and fetches the pages of the frozen copy: it
//! cannot return any more. In `Superseded` neither copy of this move may run: both are
//! dropped. [`super::ownership`] defines the record's state for each of these.

use keel_cluster::Epoch;

/// State of the move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceState {
    /// The offer was sent to the target.
    Offered,
    /// Memory is copied; the machine runs.
    Copying,
    /// Copying has converged; the store's availability is checked.
    AskingStore,
    /// The machine is frozen, the rest is being sent.
    Freezing,
    /// The transaction is in flight.
    Committing,
    /// The outcome of the transaction is unknown. The machine is frozen.
    InDoubt,
    /// The transaction was applied; the target was told to resume. The frozen copy is
    /// kept.
    Handed,
    /// The machine runs at the target; the rest of its memory is sent by post-copy.
    Serving,
    /// The target does not have the machine; a write takes it back. The machine is
    /// frozen.
    TakingBack,
    /// The machine runs here.
    Stayed { epoch: Epoch, reason: String },
    /// The machine runs at the target.
    Gone { epoch: Epoch },
    /// The machine ended before it was handed over.
    Ended,
    /// The machine ended, was removed or got another owner while the outcome of the
    /// transaction was unknown.
    Superseded {
        /// The record's state.
        reason: String,
    },
}

/// An event of a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEvent {
    /// The target has reserved room and waits for pages.
    Accepted,
    /// The target refuses the offer.
    Refused(String),
    /// Few bytes are left.
    Converged,
    /// The user cancelled the move.
    Cancel(String),
    /// The connection to the target's worker is lost, or the target gave up.
    PeerLost(String),
    /// The store answered a round trip.
    StoreAnswered,
    /// The store is unreachable.
    StoreUnavailable(String),
    /// Threads did not reach safepoints in time; they run on.
    FreezeLate(String),
    /// The target has everything and is ready to resume.
    Prepared,
    /// The transaction was applied.
    CommitWon,
    /// The transaction was refused: nothing changed.
    CommitRefused(String),
    /// The answer of the transaction was lost.
    CommitUnknown,
    /// The source's own write was applied, and the machine has this epoch: the commit in
    /// flight cannot be applied any more.
    OwnWriteWon { epoch: Epoch },
    /// The machine ended, was removed, or has another owner according to the record:
    /// neither the own write nor the commit was applied.
    Superseded {
        /// The record's state.
        reason: String,
        /// Whether the machine ended while the source owned it: its output stays here.
        output_stays: bool,
    },
    /// The own write failed, or its answer was lost.
    OwnWriteUnknown,
    /// The target reports that the machine runs there.
    TargetResumed,
    /// The target's agent reports that the machine does not run there and never will.
    TargetNotRunning,
    /// The frozen copy is not needed any more: the target has all pages, or the machine
    /// ended or was lost there.
    Served,
    /// The machine ended by itself.
    MachineEnded,
}

/// A command to the runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceCommand {
    /// Start to copy: the target is ready.
    StartCopy,
    /// Make a round trip to the store: an outage must be noticed before any downtime.
    AskStore,
    /// Freeze the machine and send the last pages and the state.
    FreezeAndSend,
    /// Run the transaction that changes the owner to the target, under `epoch`.
    Commit { epoch: Epoch },
    /// Write owner = source under a new epoch, on the condition that the machine's epoch is
    /// that of the start of the move. Repeat until answered.
    SettleByWrite,
    /// Tell the target to resume under `epoch`. Repeat until it answers, through its
    /// agent if necessary.
    TellTarget {
        /// The committed epoch.
        epoch: Epoch,
    },
    /// Write owner = source under a new epoch, on the condition that the target still is the
    /// owner. Repeat until answered.
    TakeBack,
    /// Resume the machine here under `epoch`; dirty pages are still tracked.
    Thaw { epoch: Epoch },
    /// Tell the target to drop what it received and its reservation.
    AbortTarget { reason: String },
    /// Send the pages that the target lacks, until they are not needed any more.
    Serve,
    /// Drop the frozen copy and end the worker.
    Forget,
    /// End the worker with its frozen copy; the machine's output stays here.
    End,
}

/// A move of one machine, seen from the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceMove {
    state: SourceState,
    /// The epoch under which the machine runs here.
    epoch: Epoch,
    /// The epoch under which it would run at the target.
    committed: Epoch,
    /// Whether the machine is frozen.
    frozen: bool,
    /// Whether this is a post-copy move.
    post_copy: bool,
}

impl SourceMove {
    /// A move that was offered; the machine runs here under `epoch`, and would run at the
    /// target under `committed`.
    pub fn new(epoch: Epoch, committed: Epoch, post_copy: bool) -> Self {
        SourceMove {
            state: SourceState::Offered,
            epoch,
            committed,
            frozen: false,
            post_copy,
        }
    }

    /// A move whose commit was applied, continued by another agent: the machine ran here
    /// under `epoch` and is frozen, and is the target's under `committed`. Returns the first
    /// commands, too.
    pub fn handed(epoch: Epoch, committed: Epoch, post_copy: bool) -> (Self, Vec<SourceCommand>) {
        let source = SourceMove {
            state: SourceState::Handed,
            epoch,
            committed,
            frozen: true,
            post_copy,
        };
        (source, vec![SourceCommand::TellTarget { epoch: committed }])
    }

    pub fn state(&self) -> &SourceState {
        &self.state
    }

    /// Whether the move has ended.
    pub fn is_over(&self) -> bool {
        matches!(
            self.state,
            SourceState::Stayed { .. }
                | SourceState::Gone { .. }
                | SourceState::Ended
                | SourceState::Superseded { .. }
        )
    }

    /// Processes an event; returns the commands. Events that are too late for the state
    /// have no effect.
    pub fn step(&mut self, event: SourceEvent) -> Vec<SourceCommand> {
        use SourceCommand as C;
        use SourceEvent as E;
        use SourceState as S;
        match (&self.state, event) {
            (S::Offered, E::Accepted) => {
                self.state = S::Copying;
                vec![C::StartCopy]
            }
            (S::Copying, E::Converged) => {
                self.state = S::AskingStore;
                vec![C::AskStore]
            }
            (S::AskingStore, E::StoreAnswered) => {
                self.state = S::Freezing;
                self.frozen = true;
                vec![C::FreezeAndSend]
            }
            (S::Freezing, E::Prepared) => {
                self.state = S::Committing;
                vec![C::Commit {
                    epoch: self.committed,
                }]
            }
            (S::Committing | S::InDoubt, E::CommitWon) => {
                self.state = S::Handed;
                vec![C::TellTarget {
                    epoch: self.committed,
                }]
            }
            // While the transaction is in flight, a lost peer or a cancellation has no
            // effect: the transaction's outcome decides.
            (S::Committing, E::CommitUnknown) => {
                self.state = S::InDoubt;
                vec![C::SettleByWrite]
            }
            (S::InDoubt, E::OwnWriteUnknown) => vec![C::SettleByWrite],
            (S::InDoubt, E::OwnWriteWon { epoch }) => {
                self.epoch = epoch;
                self.stay("the store's answer to the commit was lost".into())
            }
            (S::Handed, E::TargetResumed) if self.post_copy => {
                self.state = S::Serving;
                vec![C::Serve]
            }
            (S::Handed, E::TargetResumed) | (S::Serving, E::Served) => {
                self.state = S::Gone {
                    epoch: self.committed,
                };
                vec![C::Forget]
            }
            (S::Handed, E::PeerLost(_)) => vec![C::TellTarget {
                epoch: self.committed,
            }],
            (S::Handed, E::TargetNotRunning) => {
                self.state = S::TakingBack;
                vec![C::TakeBack]
            }
            (S::TakingBack, E::OwnWriteUnknown) => vec![C::TakeBack],
            (S::TakingBack, E::OwnWriteWon { epoch }) => {
                self.epoch = epoch;
                self.stay("the target was lost before the machine resumed there".into())
            }
            (
                S::InDoubt | S::TakingBack,
                E::Superseded {
                    reason,
                    output_stays,
                },
            ) => {
                self.state = S::Superseded {
                    reason: reason.clone(),
                };
                let end = if output_stays { C::End } else { C::Forget };
                vec![C::AbortTarget { reason }, end]
            }
            (
                S::Offered | S::Copying | S::AskingStore | S::Freezing,
                E::Refused(reason)
                | E::Cancel(reason)
                | E::PeerLost(reason)
                | E::StoreUnavailable(reason)
                | E::FreezeLate(reason),
            )
            | (S::Committing, E::CommitRefused(reason)) => self.stay(reason),
            (S::Offered | S::Copying | S::AskingStore | S::Freezing, E::MachineEnded) => {
                self.state = S::Ended;
                vec![C::AbortTarget {
                    reason: "the machine ended".into(),
                }]
            }
            // All other events are late or repeated.
            (
                S::Offered
                | S::Copying
                | S::AskingStore
                | S::Freezing
                | S::Committing
                | S::InDoubt
                | S::Handed
                | S::Serving
                | S::TakingBack
                | S::Stayed { .. }
                | S::Gone { .. }
                | S::Ended
                | S::Superseded { .. },
                _,
            ) => Vec::new(),
        }
    }

    fn stay(&mut self, reason: String) -> Vec<SourceCommand> {
        self.state = SourceState::Stayed {
            epoch: self.epoch,
            reason: reason.clone(),
        };
        let mut commands = Vec::new();
        if std::mem::take(&mut self.frozen) {
            commands.push(SourceCommand::Thaw { epoch: self.epoch });
        }
        commands.push(SourceCommand::AbortTarget { reason });
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch {
        incarnation: 1,
        counter: 7,
    };

    fn after(events: &[SourceEvent]) -> (SourceMove, Vec<SourceCommand>) {
        let mut source = SourceMove::new(EPOCH, EPOCH.next(), false);
        let mut last = Vec::new();
        for event in events {
            last = source.step(event.clone());
        }
        (source, last)
    }

    use SourceEvent as E;

    const TO_COMMIT: [SourceEvent; 4] = [E::Accepted, E::Converged, E::StoreAnswered, E::Prepared];

    fn to_commit(rest: &[SourceEvent]) -> Vec<SourceEvent> {
        TO_COMMIT.iter().chain(rest).cloned().collect()
    }

    #[test]
    fn a_move_without_failures() {
        let (source, last) = after(&to_commit(&[E::CommitWon, E::TargetResumed]));
        assert_eq!(last, [SourceCommand::Forget]);
        assert_eq!(
            *source.state(),
            SourceState::Gone {
                epoch: EPOCH.next()
            }
        );
    }

    #[test]
    fn post_copy_follows_the_resumption() {
        let mut source = SourceMove::new(EPOCH, EPOCH.next(), true);
        for event in to_commit(&[E::CommitWon]) {
            source.step(event);
        }
        assert_eq!(source.step(E::TargetResumed), [SourceCommand::Serve]);
        // The machine runs there and cannot return.
        for late in [
            E::TargetNotRunning,
            E::PeerLost("gone".into()),
            E::OwnWriteWon {
                epoch: EPOCH.next().next(),
            },
        ] {
            assert_eq!(source.step(late), []);
        }
        assert!(!source.is_over());
        assert_eq!(source.step(E::Served), [SourceCommand::Forget]);
    }

    #[test]
    fn every_failure_before_the_freeze_leaves_it_running() {
        for prefix in 0..3 {
            for event in [
                E::Refused("no".into()),
                E::Cancel("no".into()),
                E::PeerLost("no".into()),
                E::StoreUnavailable("no".into()),
            ] {
                let events: Vec<_> = TO_COMMIT[..prefix].iter().cloned().chain([event]).collect();
                let (source, last) = after(&events);
                assert!(
                    matches!(source.state(), SourceState::Stayed { epoch, .. } if *epoch == EPOCH)
                );
                assert!(!last.iter().any(|c| matches!(c, SourceCommand::Thaw { .. })));
            }
        }
    }

    #[test]
    fn a_lost_peer_after_the_freeze_thaws() {
        let events: Vec<_> = TO_COMMIT[..3]
            .iter()
            .cloned()
            .chain([E::PeerLost("gone".into())])
            .collect();
        let (_, last) = after(&events);
        assert_eq!(last[0], SourceCommand::Thaw { epoch: EPOCH });
    }

    #[test]
    fn a_lost_peer_during_the_commit_decides_nothing() {
        let (source, last) = after(&to_commit(&[E::PeerLost("gone".into())]));
        assert_eq!(*source.state(), SourceState::Committing);
        assert_eq!(last, []);
    }

    #[test]
    fn doubt_is_settled_by_a_write_only() {
        let (mut source, last) = after(&to_commit(&[E::CommitUnknown]));
        let write = SourceCommand::SettleByWrite;
        assert_eq!(last, std::slice::from_ref(&write));
        assert_eq!(source.step(E::StoreAnswered), []);
        assert_eq!(source.step(E::TargetResumed), []);
        assert_eq!(source.step(E::OwnWriteUnknown), [write]);
        let (mut won, mut superseded) = (source.clone(), source.clone());
        let epoch = EPOCH.next();
        assert_eq!(
            source.step(E::OwnWriteWon { epoch })[0],
            SourceCommand::Thaw { epoch }
        );
        assert!(matches!(
            won.step(E::CommitWon)[0],
            SourceCommand::TellTarget { .. }
        ));
        let commands = superseded.step(superseded_event(false));
        assert!(matches!(commands[0], SourceCommand::AbortTarget { .. }));
        assert_eq!(commands[1], SourceCommand::Forget);
        assert!(superseded.is_over());
    }

    fn superseded_event(output_stays: bool) -> SourceEvent {
        E::Superseded {
            reason: "it was removed".into(),
            output_stays,
        }
    }

    /// Neither copy of the move may run when the machine has another owner.
    #[test]
    fn a_superseded_move_ends_both_copies() {
        for before in [
            &[E::CommitUnknown][..],
            &[E::CommitWon, E::TargetNotRunning],
        ] {
            for output_stays in [false, true] {
                let (mut source, _) = after(&to_commit(before));
                let commands = source.step(superseded_event(output_stays));
                let end = match output_stays {
                    true => SourceCommand::End,
                    false => SourceCommand::Forget,
                };
                let reason = "it was removed".to_owned();
                assert_eq!(commands, [SourceCommand::AbortTarget { reason }, end]);
                assert_eq!(source.step(E::CommitWon), []);
                assert_eq!(
                    source.step(E::OwnWriteWon {
                        epoch: EPOCH.next()
                    }),
                    []
                );
            }
        }
    }

    #[test]
    fn a_target_without_the_machine_gives_it_back_under_a_new_epoch() {
        let (mut source, last) = after(&to_commit(&[E::CommitWon, E::TargetNotRunning]));
        let epoch = EPOCH.next().next();
        assert_eq!(last, [SourceCommand::TakeBack]);
        assert_eq!(
            source.step(E::OwnWriteWon { epoch })[0],
            SourceCommand::Thaw { epoch }
        );
    }

    /// The machine never runs in two places, whatever happens: a source that thaws after
    /// the transaction was sent has written a newer epoch first.
    #[test]
    fn random_events_never_thaw_under_an_epoch_that_the_target_may_have() {
        use rand::{RngExt, SeedableRng, rngs::StdRng};
        let all = |random: &mut StdRng| match random.random_range(0..19) {
            0 => E::Accepted,
            1 => E::Refused(String::new()),
            2 => E::Converged,
            3 => E::Cancel(String::new()),
            4 => E::PeerLost(String::new()),
            5 => E::StoreAnswered,
            6 => E::StoreUnavailable(String::new()),
            7 => E::FreezeLate(String::new()),
            8 => E::Prepared,
            9 => E::CommitWon,
            10 => E::CommitRefused(String::new()),
            11 => E::CommitUnknown,
            // What an own write settles in this random sequence: see below.
            12 => E::OwnWriteWon { epoch: EPOCH },
            13 => superseded_event(random.random_range(0..2) == 0),
            14 => E::OwnWriteUnknown,
            15 => E::TargetResumed,
            16 => E::TargetNotRunning,
            17 => E::Served,
            _ => E::MachineEnded,
        };
        for seed in 0..20_000 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut source = SourceMove::new(EPOCH, EPOCH.next(), seed % 2 == 0);
            let (mut committed, mut told) = (false, false);
            // The epoch of the own write that was commanded last.
            let mut own = None;
            for _ in 0..40 {
                let mut event = all(&mut random);
                // The store answers only requests that were made.
                match event {
                    E::CommitWon | E::CommitRefused(_) | E::CommitUnknown if !committed => continue,
                    E::OwnWriteWon { .. } | E::Superseded { .. } if own.is_none() => continue,
                    _ => {}
                }
                if let (E::OwnWriteWon { epoch }, Some(own)) = (&mut event, own) {
                    *epoch = own;
                }
                let refused = matches!(event, E::CommitRefused(_));
                for command in source.step(event) {
                    match command {
                        SourceCommand::Commit { .. } => committed = true,
                        SourceCommand::SettleByWrite => own = Some(EPOCH.next()),
                        SourceCommand::TakeBack => own = Some(EPOCH.next().next()),
                        SourceCommand::TellTarget { .. } => told = true,
                        SourceCommand::Thaw { epoch } => {
                            if committed && !refused {
                                assert!(epoch > EPOCH, "seed {seed}");
                            }
                            if told {
                                assert!(epoch > EPOCH.next(), "seed {seed}");
                            }
                        }
                        SourceCommand::Forget | SourceCommand::End => {
                            assert!(committed, "seed {seed}");
                        }
                        SourceCommand::StartCopy
                        | SourceCommand::AskStore
                        | SourceCommand::FreezeAndSend
                        | SourceCommand::Serve
                        | SourceCommand::AbortTarget { .. } => {}
                    }
                }
            }
        }
    }
}
