//! A node's agent, beside moves: it starts the machine that the schedule gives it, adopts what its
//! predecessor left, and writes how the machine ended.

use super::Node::{A, B};
use super::{Copy, Defect, Driver, Ending, NOW_UNIX_MS, Node, Process, World};
use keel_cluster::Epoch;
use keel_machine::moves::SourceMove;
use keel_machine::moves::ownership::{self, EndEffect};
use keel_machine::spec::Status;
use keel_store::Txn;

impl World {
    /// One action of a node's agent, as its schedule, its process and the record have it.
    pub(super) fn agent(&mut self, node: Node) {
        if let Some(ending) = self.endings[node as usize] {
            self.write_end(node, ending);
            return;
        }
        // The offer of a dead agent is withdrawn by its successor.
        if node == B && self.sees_commit() {
            return;
        }
        let reserved = self.store.has(&self.reservation_key());
        let b_is_empty = self.processes[B as usize].is_none();
        if node == A && self.driver.is_none() && reserved && !b_is_empty {
            self.settle_arrival();
            return;
        }
        // The reservation for a lost arrival is released.
        if node == B && reserved && b_is_empty {
            let txn = Txn::new().delete(self.reservation_key());
            self.send(&txn);
            return;
        }
        let process = self.processes[node as usize].as_ref();
        let arrival = process.and_then(Process::arrival);
        match (process.map(|it| it.giving), arrival) {
            (None, _) => self.without_process(node),
            (Some(_), Some(state)) => self.with_arrival(state),
            (Some(true), None) if self.driver.is_none() => self.take_up_move(),
            (Some(true), None) => {}
            (Some(false), None) => self.with_machine(node),
        }
        self.say(&format!("the agent at {node:?}"));
    }

    /// No process runs here. The scheduled machine is started, or its loss is written.
    pub(super) fn without_process(&mut self, node: Node) {
        // The end of a lost worker is not written during its move.
        let moving = node == A && self.driver.is_some();
        if moving && self.defect != Defect::OldRule {
            return;
        }
        let Some(mut record) = self.found().map(|it| it.record) else {
            return;
        };
        if record.owner != node.name() || !self.store.has(&self.entry_key(node)) {
            return;
        }
        let epoch = record.epoch;
        match record.status {
            Status::Scheduled | Status::Restarting { .. }
                if epoch <= self.agent_since[node as usize]
                    && self.given[node as usize] != Some(epoch)
                    && self.defect != Defect::StartsAgainUnderItsEpoch =>
            {
                record.epoch = record.next_epoch();
                let txn = self.change(&record);
                if self.send(&txn) == Some(true) {
                    self.given[node as usize] = Some(record.epoch);
                }
            }
            Status::Scheduled | Status::Restarting { .. } if !moving => {
                let frozen = false;
                let process = self.new_process(Copy::Machine { epoch, frozen });
                // Who starts it has just read that it is this node's.
                self.armed[node as usize] = self.has_lease(node);
                self.begins(node, process.id, epoch);
                self.processes[node as usize] = Some(process);
            }
            Status::Running | Status::Filling { .. } => {
                self.write_end(node, Ending { epoch });
            }
            // It was lost while arriving; the source takes it back if it can.
            Status::Arriving { .. } if self.processes[A as usize].is_none() => {
                self.write_end(node, Ending { epoch });
            }
            _ => {}
        }
    }

    /// Writes the end of a life until the write is answered.
    pub(super) fn write_end(&mut self, node: Node, ending: Ending) {
        self.endings[node as usize] = None;
        let Some(mut record) = self.found().map(|it| it.record) else {
            return;
        };
        let epoch = match self.defect {
            Defect::EndsTwice => record.epoch,
            _ => ending.epoch,
        };
        let lost = Status::Failed {
            reason: "its worker was lost".into(),
        };
        let effect = ownership::end(&mut record, &node.name(), epoch, &lost, NOW_UNIX_MS);
        self.say(&format!("the end of {epoch} at {node:?}: {effect:?}"));
        if effect == EndEffect::None {
            return;
        }
        self.given[node as usize] = Some(record.epoch);
        if effect == EndEffect::RestartsAlready {
            return;
        }
        let mut txn = self.change(&record);
        if record.status.ended() {
            txn = txn.delete(self.entry_key(node));
        }
        if self.send(&txn) != Some(true) {
            self.endings[node as usize] = Some(ending);
        }
    }

    /// A machine runs here without a move.
    pub(super) fn with_machine(&mut self, node: Node) {
        let moving = node == A && self.driver.is_some();
        let live = self.processes[node as usize]
            .as_ref()
            .and_then(Process::live);
        let is_over = live.is_some_and(|epoch| self.has_next_life(node, epoch));
        if (!self.store.has(&self.entry_key(node)) || is_over) && !moving {
            self.processes[node as usize] = None;
            return;
        }
        self.write_running(node, false);
    }

    /// Whether a machine that ran on a node under an epoch was given away, and given back to be
    /// started again.
    pub(super) fn has_next_life(&self, node: Node, epoch: Epoch) -> bool {
        let record = self.found().map(|it| it.record);
        record.is_some_and(|it| {
            let starts = matches!(it.status, Status::Scheduled | Status::Restarting { .. });
            starts && it.owner == node.name() && it.epoch > epoch
        })
    }

    pub(super) fn write_running(&mut self, node: Node, filling: bool) {
        let process = self.processes[node as usize].as_ref();
        let (Some(found), Some(epoch)) = (self.found(), process.and_then(Process::live)) else {
            return;
        };
        let mut record = found.record;
        if let Some(next) = ownership::running(&record, &node.name(), epoch, filling) {
            record.enter(next, NOW_UNIX_MS);
            let txn = self.change(&record);
            self.send(&txn);
        }
    }

    /// A new agent at the source finds a worker whose machine was moving.
    pub(super) fn take_up_move(&mut self) {
        let Some((id, frozen)) = self.processes[A as usize].as_ref().map(|it| {
            let frozen = matches!(it.copy, Copy::Machine { frozen: true, .. });
            (it.id, frozen)
        }) else {
            return;
        };
        let Some(mut record) = self.found().map(|it| it.record) else {
            self.processes[A as usize] = None;
            return;
        };
        let needs_copy = matches!(
            &record.status,
            Status::Arriving { from } | Status::Filling { from } if *from == A.name()
        );
        if record.owner == A.name() && !record.status.ended() {
            // A write under a new epoch, then the thaw.
            record.epoch = record.next_epoch();
            let txn = self.change(&record);
            if self.send(&txn) == Some(true) {
                self.thaw(id, record.epoch);
            }
            return;
        }
        if !(frozen && needs_copy) {
            self.processes[A as usize] = None;
            return;
        }
        let committed = record.epoch;
        let epoch = Epoch {
            counter: committed.counter - 1,
            ..committed
        };
        let (source, commands) = SourceMove::handed(epoch, committed, self.post_copy);
        self.driver = Some(Driver {
            source,
            commands: commands.into(),
            transfer: self.transfer(epoch, committed, 0),
            record,
            process: id,
            decided: None,
            is_told: false,
            in_doubt: None,
        });
    }
}
