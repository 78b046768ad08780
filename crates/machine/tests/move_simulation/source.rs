//! The move at its source: the agent that drives it, and what each of its commands does.

use super::Node::{A, B};
use super::{Copy, Defect, Driver, NOW_UNIX_MS, PIECES, Process, World};
use keel_cluster::Epoch;
use keel_machine::moves::ownership::{self, ResumeDecision, Settlement, Target, Transfer};
use keel_machine::moves::{
    SourceCommand, SourceEvent, SourceMove, TargetEvent, TargetMove, TargetState,
};
use keel_machine::spec::Status;
use keel_store::Txn;

impl World {
    pub(super) fn transfer(&self, epoch: Epoch, committed: Epoch, revision: u64) -> Transfer {
        Transfer {
            machine: self.machine.clone(),
            source: A.name(),
            target: B.name(),
            epoch,
            committed,
            revision,
            is_complete: !self.post_copy,
        }
    }

    pub(super) fn begin_move(&mut self) {
        let found = self.found().unwrap();
        assert_eq!(found.record.status, Status::Running);
        let (epoch, committed) = (found.record.epoch, found.record.next_epoch());
        let reserve = Txn::new().put(self.reservation_key(), Vec::new());
        assert!(self.store.apply(&reserve));
        let mut source = SourceMove::new(epoch, committed, self.post_copy);
        let commands = source.step(SourceEvent::Accepted).into();
        let mut process = self.new_process(Copy::Arrival(TargetMove::new(epoch)));
        process.missing = if self.post_copy { PIECES } else { 0 };
        self.armed[B as usize] = self.has_lease(B);
        self.processes[B as usize] = Some(process);
        self.began = epoch;
        self.driver = Some(Driver {
            source,
            commands,
            transfer: self.transfer(epoch, committed, found.revision),
            record: found.record,
            process: self.processes[A as usize].as_ref().unwrap().id,
            decided: None,
            is_told: false,
            in_doubt: None,
        });
    }

    /// Executes the driver's next command and processes the result.
    pub(super) fn drive(&mut self) {
        let Some(driver) = &mut self.driver else {
            return;
        };
        if let Some((txn, epoch)) = driver.decided.take() {
            let event = self.own_write(&txn, epoch);
            self.feed(event);
            return;
        }
        let Some(command) = driver.commands.pop_front() else {
            if driver.source.is_over() {
                self.driver = None;
                // The connection between the two workers is closed after the move.
                self.break_link();
            }
            return;
        };
        if let Some(event) = self.carry_out(&command) {
            self.feed(event);
        }
        self.say(&format!("{command:?}"));
    }

    pub(super) fn feed(&mut self, event: SourceEvent) {
        if let Some(driver) = &mut self.driver {
            let more = driver.source.step(event);
            driver.commands.extend(more);
        }
    }

    pub(super) fn source_process(&mut self) -> Option<&mut Process> {
        let id = self.driver.as_ref()?.process;
        self.processes[A as usize].as_mut().filter(|it| it.id == id)
    }

    pub(super) fn carry_out(&mut self, command: &SourceCommand) -> Option<SourceEvent> {
        let lost = || SourceEvent::PeerLost("lost".into());
        let event = match command {
            SourceCommand::StartCopy => match self.source_process() {
                None => SourceEvent::MachineEnded,
                Some(process) => {
                    process.giving = true;
                    match self.link && self.processes[B as usize].is_some() {
                        false => lost(),
                        true if self.fault(10) => SourceEvent::Cancel("no".into()),
                        true => SourceEvent::Converged,
                    }
                }
            },
            SourceCommand::AskStore if self.fault(10) => {
                SourceEvent::StoreUnavailable("away".into())
            }
            SourceCommand::AskStore => SourceEvent::StoreAnswered,
            SourceCommand::FreezeAndSend => self.freeze_and_send(),
            SourceCommand::Commit { .. } => self.commit(),
            SourceCommand::SettleByWrite => return self.settle(),
            SourceCommand::TellTarget { epoch } => self.tell_target(*epoch),
            SourceCommand::TakeBack => return self.take_back(),
            SourceCommand::Thaw { epoch } => {
                let id = self.driver.as_ref()?.process;
                self.thaw(id, *epoch);
                return None;
            }
            SourceCommand::AbortTarget { .. } => {
                if !self.fault(2) {
                    self.break_link();
                }
                if !self.fault(2) {
                    self.settle_arrival();
                }
                return None;
            }
            SourceCommand::Serve => return self.serve(),
            SourceCommand::Forget | SourceCommand::End => {
                if self.source_process().is_some() {
                    self.processes[A as usize] = None;
                }
                return None;
            }
        };
        Some(event)
    }

    /// Sends one piece, if possible, and repeats until none is needed.
    pub(super) fn serve(&mut self) -> Option<SourceEvent> {
        let lost = self.fault(4);
        let needed = match self.found().map(|it| it.record.status) {
            Some(Status::Filling { .. }) => true,
            Some(Status::Arriving { .. }) => self.processes[B as usize].is_some(),
            _ => false,
        };
        if self.source_process().is_none() || !needed || self.defect == Defect::ForgetsEarly {
            return Some(SourceEvent::Served);
        }
        // A lost connection is replaced.
        let b = self.processes[B as usize].as_mut();
        if let Some(b) = b.filter(|_| !lost) {
            b.missing = b.missing.saturating_sub(1);
        }
        let lacks = self.processes[B as usize]
            .as_ref()
            .is_none_or(|b| b.missing > 0);
        if !lacks && !self.fault(4) {
            return Some(SourceEvent::Served);
        }
        if let Some(driver) = &mut self.driver {
            driver.commands.push_front(SourceCommand::Serve);
        }
        None
    }

    pub(super) fn freeze_and_send(&mut self) -> SourceEvent {
        let late = self.fault(15);
        let Some(process) = self.source_process() else {
            return SourceEvent::MachineEnded;
        };
        if late {
            return SourceEvent::FreezeLate("late".into());
        }
        if let Copy::Machine { frozen, .. } = &mut process.copy {
            *frozen = true;
        }
        if !self.link || self.processes[B as usize].is_none() || self.fault(10) {
            self.break_link();
            return SourceEvent::PeerLost("lost".into());
        }
        self.step_arrival(TargetEvent::StateArrived);
        self.step_arrival(TargetEvent::InstancesMade);
        if self.fault(8) {
            // The target is ready, but its message is lost.
            self.break_link();
            return SourceEvent::PeerLost("lost".into());
        }
        SourceEvent::Prepared
    }

    pub(super) fn commit(&mut self) -> SourceEvent {
        let Some(driver) = &self.driver else {
            return SourceEvent::CommitUnknown;
        };
        let txn = driver.transfer.commit(&driver.record, NOW_UNIX_MS).unwrap();
        match self.send(&txn) {
            None => SourceEvent::CommitUnknown,
            Some(true) => SourceEvent::CommitWon,
            Some(false) => SourceEvent::CommitRefused("refused".into()),
        }
    }

    pub(super) fn settle(&mut self) -> Option<SourceEvent> {
        let found = self.found();
        let driver = self.driver.as_ref()?;
        let is_ours = found.as_ref().is_some_and(|it| it.record.owner == A.name());
        if self.defect == Defect::ReadSettles && is_ours {
            let (process, epoch) = (driver.process, driver.transfer.epoch);
            self.driver = None;
            self.thaw(process, epoch);
            return None;
        }
        let mut settlement = driver.transfer.settle(found.as_ref()).unwrap();
        if self.defect == Defect::SettlesWithOldRecord
            && let Settlement::Write { txn, .. } = &mut settlement
        {
            let mut old = driver.record.clone();
            old.epoch = old.next_epoch();
            *txn = self.change(&old);
        }
        let refused = matches!(settlement, Settlement::Superseded { .. });
        if refused && self.defect == Defect::OldRule {
            return Some(SourceEvent::CommitWon);
        }
        self.decide(settlement)
    }

    pub(super) fn take_back(&mut self) -> Option<SourceEvent> {
        let found = self.found();
        let driver = self.driver.as_ref()?;
        let settlement = driver
            .transfer
            .take_back(found.as_ref(), Target::Without, NOW_UNIX_MS)
            .unwrap();
        self.decide(settlement)
    }

    /// A write is sent in this step or, because its sender may be slow, in a later one.
    pub(super) fn decide(&mut self, settlement: Settlement) -> Option<SourceEvent> {
        match settlement {
            Settlement::Write { txn, record } => {
                if self.fault(2) {
                    self.driver.as_mut()?.decided = Some((txn, record.epoch));
                    return None;
                }
                Some(self.own_write(&txn, record.epoch))
            }
            Settlement::Kept(epoch) => Some(SourceEvent::OwnWriteWon { epoch }),
            Settlement::Won => Some(SourceEvent::CommitWon),
            Settlement::Superseded {
                reason,
                output_stays,
            } => Some(SourceEvent::Superseded {
                reason,
                output_stays,
            }),
        }
    }

    pub(super) fn own_write(&mut self, txn: &Txn, epoch: Epoch) -> SourceEvent {
        match self.send(txn) {
            Some(true) => SourceEvent::OwnWriteWon { epoch },
            Some(false) | None => SourceEvent::OwnWriteUnknown,
        }
    }

    pub(super) fn tell_target(&mut self, epoch: Epoch) -> SourceEvent {
        // The target is told directly once, and from then on its agent is asked.
        let is_told = self
            .driver
            .as_mut()
            .is_some_and(|driver| std::mem::replace(&mut driver.is_told, true));
        if !is_told && self.link && self.source_process().is_some() && !self.fault(4) {
            let went = self.go(epoch);
            if went && !self.fault(4) {
                return SourceEvent::TargetResumed;
            }
        }
        if self.ha
            && !self.has_lease(B)
            && let Some(event) = self.take_back_from_failed()
        {
            return event;
        }
        if self.fault(3) {
            return SourceEvent::PeerLost("its agent does not answer".into());
        }
        let Some(state) = self.processes[B as usize]
            .as_ref()
            .and_then(Process::arrival)
        else {
            return SourceEvent::TargetNotRunning;
        };
        match state {
            TargetState::Running { epoch } if self.was_given_away(epoch) => {
                self.processes[B as usize] = None;
                SourceEvent::TargetNotRunning
            }
            TargetState::Running { .. } => self.resumed_there(),
            TargetState::Prepared if self.defect == Defect::OldRule => {
                self.go(epoch);
                SourceEvent::TargetResumed
            }
            TargetState::Prepared => {
                let record = self.found().map(|it| it.record);
                match ownership::may_resume(&B.name(), self.offered(), record.as_ref()) {
                    ResumeDecision::Resume(won) if won == epoch => match self.go(won) {
                        true => self.resumed_there(),
                        false => SourceEvent::PeerLost("it does not run there".into()),
                    },
                    ResumeDecision::Drop => {
                        self.processes[B as usize] = None;
                        SourceEvent::TargetNotRunning
                    }
                    _ => SourceEvent::PeerLost("it was not given".into()),
                }
            }
            _ => {
                self.processes[B as usize] = None;
                SourceEvent::TargetNotRunning
            }
        }
    }
}
