//! The move at its target: the agent that drives it, and what each of its commands does.

use super::Node::{A, B};
use super::{Copy, Process, World};
use keel_cluster::Epoch;
use keel_machine::moves::ownership::{self, ResumeDecision};
use keel_machine::moves::{TargetCommand, TargetEvent, TargetState};
use keel_machine::spec::{Record, Status};
use keel_store::Txn;
use rand::RngExt;

impl World {
    pub(super) fn step_arrival(&mut self, event: TargetEvent) -> Vec<TargetCommand> {
        let Some(process) = &mut self.processes[B as usize] else {
            return Vec::new();
        };
        let id = process.id;
        let Copy::Arrival(target) = &mut process.copy else {
            return Vec::new();
        };
        let commands = target.step(event);
        let thawed = commands.iter().find_map(|command| match command {
            TargetCommand::Thaw(epoch) => Some(*epoch),
            _ => None,
        });
        let Some(epoch) = thawed else {
            return commands;
        };
        if self.fault(8) {
            self.does_not_resume();
            return Vec::new();
        }
        self.begins(B, id, epoch);
        commands
    }

    /// What has arrived cannot run, and never has.
    fn does_not_resume(&mut self) {
        if let Some(process) = &mut self.processes[B as usize]
            && let Copy::Arrival(target) = &mut process.copy
        {
            let dropped = target.step(TargetEvent::NotResumed("refused".into()));
            assert!(matches!(dropped[..], [TargetCommand::Drop(_)]));
            self.say("what has arrived at B cannot run");
        }
    }

    /// What has arrived, or is arriving, is lost in its process, which lives.
    pub(super) fn lose_arrival(&mut self) {
        let dropped = self.step_arrival(TargetEvent::Failed("lost".into()));
        if !dropped.is_empty() {
            self.say("what arrives at B is lost");
        }
    }

    pub(super) fn go(&mut self, epoch: Epoch) -> bool {
        let commands = self.step_arrival(TargetEvent::Go(epoch));
        commands
            .iter()
            .any(|it| matches!(it, TargetCommand::SendResumed(_)))
    }

    /// Resumes the process of the move at its source, if it exists.
    pub(super) fn thaw(&mut self, id: u32, epoch: Epoch) {
        let Some(process) = self.processes[A as usize].as_mut().filter(|it| it.id == id) else {
            return;
        };
        // It closes its connection to the target.
        process.giving = false;
        if let Copy::Machine {
            epoch: under,
            frozen,
        } = &mut process.copy
        {
            *under = epoch;
            *frozen = false;
            self.begins(A, id, epoch);
        }
        self.break_link();
    }

    /// A machine arrives here, is ready, or has resumed.
    pub(super) fn with_arrival(&mut self, state: TargetState) {
        let lost = self.processes[B as usize]
            .as_ref()
            .is_some_and(|it| it.source_lost);
        let record = self.found().map(|it| it.record);
        let scheduled = self.store.has(&self.entry_key(B));
        match state {
            TargetState::Prepared if lost => self.settle_arrival(),
            // No data will follow: the connection was closed, or none was made in time.
            TargetState::Receiving | TargetState::Preparing if self.driver.is_none() => {
                self.step_arrival(TargetEvent::SourceLost("late".into()));
                self.settle_arrival();
            }
            TargetState::Receiving | TargetState::Preparing | TargetState::Prepared => {
                let Some(record) = record.filter(|it| scheduled && it.owner == B.name()) else {
                    return;
                };
                if matches!(record.status, Status::Scheduled | Status::Restarting { .. }) {
                    self.processes[B as usize] = None;
                } else if state == TargetState::Prepared {
                    self.go_if_won(&record);
                }
            }
            TargetState::Dropped => self.settle_arrival(),
            TargetState::Running { .. } if !scheduled => self.processes[B as usize] = None,
            TargetState::Running { epoch } if self.has_next_life(B, epoch) => {
                self.processes[B as usize] = None;
            }
            TargetState::Running { .. } => {
                let lacks = self.lacking();
                if lacks && self.processes[A as usize].is_none() {
                    // The missing memory is lost.
                    self.kill(B);
                } else {
                    self.write_running(B, lacks);
                }
            }
        }
    }

    /// The watch of B's agent shows a commit, which resumes what is prepared. It may do so late.
    pub(super) fn sees_commit(&mut self) -> bool {
        if self.random.random_range(0..2) == 0 {
            return false;
        }
        let Some(entry) = self.store.unseen.pop_front() else {
            return false;
        };
        let state = self.processes[B as usize]
            .as_ref()
            .and_then(Process::arrival);
        let epoch = ownership::announced(self.offered(), &entry);
        if let (Some(TargetState::Prepared), Some(epoch)) = (state, epoch) {
            self.go(epoch);
            self.say("the agent at B sees the commit");
        }
        true
    }

    pub(super) fn offered(&self) -> Epoch {
        self.began
    }

    pub(super) fn go_if_won(&mut self, record: &Record) -> bool {
        match ownership::may_resume(&B.name(), self.offered(), Some(record)) {
            ResumeDecision::Resume(epoch) => self.go(epoch),
            ResumeDecision::Drop | ResumeDecision::Undecided => false,
        }
    }

    /// Settles an arrival whose source is lost: removes the reservation; if it is removed
    /// already, the commit may have been applied, and the record decides.
    pub(super) fn settle_arrival(&mut self) {
        let state = self.processes[B as usize]
            .as_ref()
            .and_then(Process::arrival);
        if matches!(state, None | Some(TargetState::Running { .. })) {
            return;
        }
        let key = self.reservation_key();
        let take = Txn::new()
            .when(keel_store::Compare::Exists { key: key.clone() })
            .delete(key);
        let Some(taken) = self.send(&take) else {
            return;
        };
        if !taken
            && state == Some(TargetState::Prepared)
            && let Some(record) = self.found().map(|it| it.record)
            && self.go_if_won(&record)
        {
            return;
        }
        self.processes[B as usize] = None;
    }
}
