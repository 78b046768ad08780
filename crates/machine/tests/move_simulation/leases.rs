//! Leases of nodes: workers that hold their machine, failovers, and machines that their source
//! takes back from a node without a lease.

use super::Node::{A, B};
use super::{Copy, Defect, NOW_UNIX_MS, Node, World};
use keel_cluster::{Epoch, NodeName};
use keel_machine::moves::ownership::{self, ResumeDecision, Settlement, Target};
use keel_machine::moves::{SourceEvent, TargetState};
use keel_machine::spec::Record;
use keel_store::keys::Key;
use keel_store::{Compare, Txn};
use rand::RngExt;

impl World {
    pub(super) fn alive_key(node: Node) -> String {
        Key::Alive(node.name()).to_string()
    }

    pub(super) fn has_lease(&self, node: Node) -> bool {
        self.store.has(&Self::alive_key(node))
    }

    /// Whether a machine on a node does not run for lack of a lease.
    pub(super) fn is_held(&self, node: Node) -> bool {
        self.ha && !self.armed[node as usize]
    }

    /// The epoch under which a copy runs on a node, if it does and is not held.
    pub(super) fn runs(&self, node: Node) -> Option<Epoch> {
        let live = self.processes[node as usize].as_ref()?.live()?;
        (!self.is_held(node)).then_some(live)
    }

    /// The lease of a node ends: first its worker holds the machine, or is killed; then the store
    /// deletes the key.
    pub(super) fn lapse(&mut self, node: Node) {
        let is_armed = &mut self.armed[node as usize];
        if *is_armed && self.defect != Defect::HoldsLate {
            *is_armed = false;
            self.say(&format!("the worker at {node:?} is without a deadline"));
        } else if self.has_lease(node) {
            let end = Txn::new().delete(Self::alive_key(node));
            assert!(self.store.apply(&end));
            self.say(&format!("the lease of {node:?} ends"));
        } else {
            self.armed[node as usize] = false;
        }
    }

    /// The agent of a node takes a lease, or sends its deadline to a worker that has none, if the
    /// store says that the machine is the node's, or may become it.
    pub(super) fn renew(&mut self, node: Node) {
        if !self.has_lease(node) {
            let take = Txn::new().put(Self::alive_key(node), Vec::new());
            assert!(self.store.apply(&take));
            return;
        }
        if self.armed[node as usize] {
            return;
        }
        let record = self.found().map(|it| it.record);
        let Some(process) = &self.processes[node as usize] else {
            return;
        };
        let (id, live) = (process.id, process.live());
        let may_run = match (&process.copy, process.arrival()) {
            (Copy::Arrival(_), Some(TargetState::Running { .. })) | (Copy::Machine { .. }, _) => {
                let epoch = match &process.copy {
                    Copy::Machine { epoch, .. } => Some(*epoch),
                    Copy::Arrival(_) => live,
                };
                let is_here = |it: Record| {
                    it.owner == node.name() && Some(it.epoch) == epoch && !it.status.ended()
                };
                record.is_some_and(is_here)
            }
            (Copy::Arrival(_), _) => {
                let verdict = ownership::may_resume(&B.name(), self.offered(), record.as_ref());
                verdict != ResumeDecision::Drop
            }
        };
        if may_run || self.defect == Defect::ExtendsUnread {
            self.armed[node as usize] = true;
            if let Some(epoch) = live {
                self.begins(node, id, epoch);
            }
        }
    }

    /// The machine of a node without a lease is given to the other one.
    pub(super) fn fail_over(&mut self) {
        let Some(found) = self.found() else { return };
        let (owner, other) = match found.record.owner == A.name() {
            true => (A, B),
            false => (B, A),
        };
        if self.has_lease(owner) && self.defect != Defect::TakesFromTheLiving {
            return;
        }
        // The source of a move may have been waited for already.
        let waits = self.random.random_range(0..2) == 0;
        let holds_copy = |_: &NodeName| waits;
        let given = ownership::fail_over(&found, &other.name(), holds_copy, NOW_UNIX_MS).unwrap();
        let Some(mut given) = given else { return };
        if self.defect == Defect::TakesFromTheLiving {
            let alive = Self::alive_key(owner);
            let of_lease = |it: &Compare| matches!(it, Compare::Absent { key } if *key == alive);
            given.txn.compare.retain(|it| !of_lease(it));
        }
        let sent = self.send(&given.txn);
        self.say(&format!("given to {other:?}: {sent:?}"));
    }

    /// The target says that the machine resumed there. A write that takes it back may still be
    /// applied, until the record that it compared is changed.
    pub(super) fn resumed_there(&self) -> SourceEvent {
        let in_doubt = self.driver.as_ref().and_then(|driver| driver.in_doubt);
        let Some(in_doubt) = in_doubt else {
            return SourceEvent::TargetResumed;
        };
        let transfer = self.driver.as_ref().map(|driver| &driver.transfer);
        match self.found() {
            Some(found) if found.revision == in_doubt => {
                SourceEvent::PeerLost("a write of its own is in doubt".into())
            }
            Some(found) if transfer.is_some_and(|it| it.has_won(&found.record)) => {
                SourceEvent::TargetResumed
            }
            _ => SourceEvent::TargetNotRunning,
        }
    }

    /// Whether what resumed at the target under an epoch is another node's by now: it is held, for
    /// lack of a lease.
    pub(super) fn was_given_away(&self, epoch: Epoch) -> bool {
        let record = self.found().map(|it| it.record);
        self.ha && record.is_some_and(|it| it.owner != B.name() || it.epoch != epoch)
    }

    /// The target's node has no lease: what became of the machine.
    pub(super) fn take_back_from_failed(&mut self) -> Option<SourceEvent> {
        let transfer = self.driver.as_ref()?.transfer.clone();
        let found = self.found();
        let revision = found.as_ref().map(|it| it.revision);
        let target = match self.defect {
            Defect::TakesBackUncompared => Target::Without,
            _ => Target::Fenced,
        };
        match transfer
            .take_back(found.as_ref(), target, NOW_UNIX_MS)
            .unwrap()
        {
            Settlement::Write { txn, .. } => {
                // The node may have a lease again before the write is made.
                if self.fault(2) {
                    self.renew(B);
                    self.renew(B);
                    if let Some(record) = found.map(|it| it.record) {
                        self.go_if_won(&record);
                    }
                }
                let made = self.send(&txn);
                if made.is_none() {
                    let driver = self.driver.as_mut()?;
                    driver.in_doubt = revision;
                }
                (made == Some(true)).then_some(SourceEvent::TargetNotRunning)
            }
            Settlement::Superseded { .. }
                if found.is_some_and(|it| transfer.has_won(&it.record)) =>
            {
                Some(SourceEvent::TargetResumed)
            }
            _ => Some(SourceEvent::TargetNotRunning),
        }
    }

    pub(super) fn of_leases(&mut self) {
        let node = if self.random.random_range(0..2) == 0 {
            A
        } else {
            B
        };
        match self.random.random_range(0..4) {
            0 => self.fail_over(),
            1 | 2 if self.faults => self.lapse(node),
            _ => self.renew(node),
        }
    }
}
