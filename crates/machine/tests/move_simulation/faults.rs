//! Faults: lost connections, dead processes, and answers of the store that come late or never.

use super::Node::{A, B};
use super::{Copy, Ending, NOW_UNIX_MS, Node, World};
use keel_machine::moves::{SourceCommand, SourceState, TargetCommand, TargetEvent, TargetState};
use keel_machine::restart_policy::Restart;
use rand::RngExt;

impl World {
    pub(super) fn break_link(&mut self) {
        if !std::mem::take(&mut self.link) {
            return;
        }
        let commands = self.step_arrival(TargetEvent::SourceLost("lost".into()));
        if let Some(b) = &mut self.processes[B as usize] {
            b.source_lost |= commands.contains(&TargetCommand::AskAgent);
            if b.arrival() == Some(TargetState::Dropped) {
                self.settle_arrival();
            }
        }
    }

    pub(super) fn kill(&mut self, node: Node) {
        let Some(process) = self.processes[node as usize].take() else {
            return;
        };
        self.deaths += 1;
        self.source_killed |= node == A;
        if process.arrival().is_some() || process.giving {
            self.link = false;
            let _ = self.step_arrival(TargetEvent::SourceLost("lost".into()));
            if let Some(b) = &mut self.processes[B as usize]
                && b.arrival() == Some(TargetState::Prepared)
            {
                b.source_lost = true;
            }
        }
        // Its agent notices; it starts each epoch of the machine at most once.
        if let (Copy::Machine { epoch, .. }, false) = (&process.copy, process.giving) {
            self.endings[node as usize] = Some(Ending { epoch: *epoch });
        }
        self.say(&format!("the worker at {node:?} dies"));
    }

    pub(super) fn late_transaction(&mut self) {
        if let Some(txn) = self.store.in_flight.pop() {
            // Or never.
            if !self.fault(3) {
                let applied = self.store.apply(&txn);
                self.say(&format!("a late transaction: {applied}"));
            }
        }
    }

    pub(super) fn break_something(&mut self) {
        if !self.faults {
            return;
        }
        match self.random.random_range(0..20) {
            18 if self.renews_store => self.begin_store_anew(),
            19 if self.renews_store => self.back_up_or_restore(),
            0 => {
                self.break_link();
                self.say("the link breaks");
            }
            1 => self.set(),
            2 | 3 => self.kill_agent(),
            4 => self.kill(B),
            5 => self.kill(A),
            // The worst moment: the outcome of the commit is unknown.
            6 | 7 if self.in_doubt() => self.kill(A),
            8 => self.remove(),
            9 => {
                let node = if self.random.random_range(0..2) == 0 {
                    A
                } else {
                    B
                };
                self.create(node, Restart::No);
            }
            10 => self.lose_arrival(),
            11 => self.start_again(),
            _ => {}
        }
    }

    pub(super) fn in_doubt(&self) -> bool {
        let state = self.driver.as_ref().map(|it| it.source.state());
        matches!(state, Some(SourceState::InDoubt | SourceState::Handed))
    }

    pub(super) fn kill_agent(&mut self) {
        let node = if self.random.random_range(0..3) == 0 {
            B
        } else {
            A
        };
        self.endings[node as usize] = None;
        self.agent_since[node as usize] = self.store.epochs_so_far();
        self.given[node as usize] = None;
        if node == B {
            // With its watch.
            self.store.unseen.clear();
        }
        self.say(&format!("the agent at {node:?} dies"));
        let Some(driver) = self.driver.take_if(|_| node == A) else {
            return;
        };
        // A transaction that it sent may still arrive.
        if let Some(SourceCommand::Commit { .. }) = driver.commands.front() {
            let txn = driver.transfer.commit(&driver.record, NOW_UNIX_MS).unwrap();
            self.store.in_flight.push(txn);
        }
        self.store.in_flight.extend(driver.decided.map(|it| it.0));
    }
}
