//! Two nodes, the machine, its user, and all faults.

#[path = "leases.rs"]
mod leases;
#[path = "new_store.rs"]
mod new_store;
#[path = "source.rs"]
mod source;

use crate::store::Store;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::high_availability::HighAvailability;
use keel_machine::moves::ownership::{self, EndEffect, ResumeDecision, Transfer, VersionedRecord};
use keel_machine::moves::{
    SourceCommand, SourceMove, SourceState, TargetCommand, TargetEvent, TargetMove, TargetState,
};
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{Record, Status};
use keel_store::keys::Key;
use keel_store::{KeyValue, Txn};
use new_store::Backup;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::VecDeque;

/// Steps with faults, and steps without them afterwards.
pub(crate) const FAULTY_STEPS: u32 = 70;
pub(crate) const CALM_STEPS: u32 = 600;
/// Pieces of memory that post-copy transfers.
const PIECES: u32 = 3;
/// Early enough that no life counts as stable.
const NOW_UNIX_MS: u64 = 1000;

/// A rule that is violated on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Defect {
    None,
    /// The former rule: a refused settling write means that the commit was applied, the
    /// target's agent lets an arrival resume without asking the store, and the end of a
    /// lost worker is written while the outcome of its move is unknown.
    OldRule,
    /// A source in doubt reads that it is the owner, and resumes.
    ReadSettles,
    /// A source drops its copy before the target has all of it.
    ForgetsEarly,
    /// The settling write restores the record of the start of the move.
    SettlesWithOldRecord,
    /// An end whose answer was lost is written again, whatever the epoch is by then.
    EndsTwice,
    /// A new agent starts a machine that its predecessor may have started already.
    StartsAgainUnderItsEpoch,
    /// A worker gets the deadline of a new lease without a look at the store.
    ExtendsUnread,
    /// A lease ends at the store before the workers of its node hold their machines.
    HoldsLate,
    /// A failover does not compare that the node has no lease.
    TakesFromTheLiving,
    /// A source takes its machine back from a node that may have a lease again.
    TakesBackUncompared,
    /// The machines of a store that begins anew go on in their old incarnation.
    KeepsIncarnation,
    /// A store that begins anew uses revisions again that the former one used.
    RepeatsRevisions,
}

impl Defect {
    pub(crate) const ALL: [Defect; 12] = [
        Defect::OldRule,
        Defect::ReadSettles,
        Defect::ForgetsEarly,
        Defect::SettlesWithOldRecord,
        Defect::EndsTwice,
        Defect::StartsAgainUnderItsEpoch,
        Defect::ExtendsUnread,
        Defect::HoldsLate,
        Defect::TakesFromTheLiving,
        Defect::TakesBackUncompared,
        Defect::KeepsIncarnation,
        Defect::RepeatsRevisions,
    ];
}

/// Outcome of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It runs at its source under its former epoch.
    Stayed,
    /// It runs at its source under a newer epoch, by a write of the source.
    Kept,
    /// It runs at its target.
    Moved,
    /// It was restarted.
    Restarted,
    /// A later machine of the same name runs.
    Recreated,
    /// It has ended, and the record says so.
    Ended,
    /// It was removed.
    Removed,
}

impl End {
    pub(crate) const ALL: [End; 7] = [
        End::Stayed,
        End::Kept,
        End::Moved,
        End::Restarted,
        End::Recreated,
        End::Ended,
        End::Removed,
    ];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    A = 0,
    B = 1,
}

use Node::{A, B};

impl Node {
    fn name(self) -> NodeName {
        let name = match self {
            A => "a",
            B => "b",
        };
        name.parse().unwrap()
    }
}

/// A worker's process.
#[derive(Debug)]
struct Process {
    id: u32,
    copy: Copy,
    /// It is or was the source of a move.
    giving: bool,
    /// Pieces of memory that only the source of its move has.
    missing: u32,
    /// The loss of the source was noticed; its agent settles the move.
    source_lost: bool,
}

#[derive(Debug)]
enum Copy {
    /// Started or thawed under this epoch.
    Machine { epoch: Epoch, frozen: bool },
    /// An arriving machine.
    Arrival(TargetMove),
}

impl Process {
    fn live(&self) -> Option<Epoch> {
        match &self.copy {
            Copy::Machine {
                epoch,
                frozen: false,
            } => Some(*epoch),
            Copy::Machine { .. } => None,
            Copy::Arrival(target) => match target.state() {
                TargetState::Running { epoch } => Some(epoch),
                _ => None,
            },
        }
    }

    fn arrival(&self) -> Option<TargetState> {
        match &self.copy {
            Copy::Arrival(target) => Some(target.state()),
            Copy::Machine { .. } => None,
        }
    }
}

/// The agent at the source, which drives the move while it lives.
#[derive(Debug)]
struct Driver {
    source: SourceMove,
    commands: VecDeque<SourceCommand>,
    transfer: Transfer,
    record: Record,
    /// The process that it moves.
    process: u32,
    /// A write that was decided and is not sent yet, with the epoch that it gives.
    decided: Option<(Txn, Epoch)>,
    /// Whether the target was told of the commit directly, with or without success.
    is_told: bool,
    /// The revision that a write compared which takes the machine back, and whose answer was lost.
    in_doubt: Option<u64>,
}

/// The end of a life that an agent is writing.
#[derive(Debug, Clone, Copy)]
struct Ending {
    epoch: Epoch,
}

pub(crate) struct World {
    random: StdRng,
    /// Whether the machine has high availability.
    ha: bool,
    /// Whether the store may begin anew.
    renews_store: bool,
    /// Whether the worker of each node has a deadline that has not passed: without one a machine
    /// with high availability is held.
    armed: [bool; 2],
    defect: Defect,
    trace: bool,
    machine: MachineName,
    store: Store,
    processes: [Option<Process>; 2],
    endings: [Option<Ending>; 2],
    /// The newest epoch that a machine could have when each agent started: those above it were
    /// assigned later, so no earlier agent started the machine under them.
    agent_since: [Epoch; 2],
    /// The epoch that each agent assigned to the machine's next life on its node.
    given: [Option<Epoch>; 2],
    driver: Option<Driver>,
    link: bool,
    faults: bool,
    next_process: u32,
    /// The newest epoch under which a copy ran, and its process.
    newest: (Epoch, u32),
    post_copy: bool,
    /// Number of processes killed.
    deaths: u32,
    /// A process at the source was killed, with its memory.
    source_killed: bool,
    /// The last acknowledged limit of memory, of the record's creation.
    acknowledged: u64,
    /// The first epoch of the record's creation.
    first: Epoch,
    /// What a backup of the store has.
    backup: Option<Backup>,
    began: Epoch,
    creations: u32,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let record = self.found().map(|it| {
            let record = it.record;
            (record.owner, record.epoch.to_string(), record.status)
        });
        write!(
            f,
            "{record:?}, processes {:?}, endings {:?}, driver {:?}",
            self.processes,
            self.endings,
            self.driver
                .as_ref()
                .map(|it| (it.source.state(), &it.commands))
        )
    }
}

fn new_record(machine: &MachineName, owner: Node, restart: Restart, ha: bool) -> Record {
    let mut record = crate::record::new(machine.clone(), owner.name(), restart);
    record.started_unix_ms = NOW_UNIX_MS;
    record.spec.ha = ha.then(HighAvailability::default);
    record
}

impl World {
    /// A machine that runs at A and whose move to B was accepted.
    pub(crate) fn new(seed: u64, defect: Defect, trace: bool) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let machine: MachineName = "m".parse().unwrap();
        let policy = random.random_range(0..3);
        let restart = [Restart::No, Restart::OnFailure, Restart::Always][policy];
        let post_copy = seed % 2 == 1;
        let mut world = World {
            random,
            ha: seed % 4 >= 2,
            renews_store: seed % 8 >= 4,
            armed: [true, true],
            defect,
            trace,
            store: Store::default(),
            processes: [None, None],
            endings: [None, None],
            agent_since: [Epoch::default(); 2],
            given: [None, None],
            driver: None,
            link: true,
            faults: false,
            next_process: 0,
            newest: (Epoch::default(), u32::MAX),
            post_copy,
            deaths: 0,
            source_killed: false,
            acknowledged: crate::record::MEMORY_BYTES,
            first: Epoch::default(),
            backup: None,
            began: Epoch::default(),
            creations: 0,
            machine,
        };
        for node in [A, B] {
            let alive = Txn::new().put(Key::Alive(node.name()), Vec::new());
            assert!(world.store.apply(&alive));
        }
        world.create(A, restart);
        world.agent(A);
        world.agent(A);
        world.begin_move();
        world.faults = true;
        world
    }

    pub(crate) fn stop_faults(&mut self) {
        self.faults = false;
    }

    /// True with probability 1/n, and never once the faults have stopped.
    fn fault(&mut self, n: u32) -> bool {
        self.faults && self.random.random_range(0..n) == 0
    }

    fn say(&self, what: &str) {
        if self.trace {
            println!("{what}: {self:?}");
        }
    }

    // ── the store ───────────────────────────────────────────────────────

    fn record_key(&self) -> String {
        Key::Machine(self.machine.clone()).to_string()
    }

    fn entry_key(&self, node: Node) -> String {
        Key::Schedule(node.name(), self.machine.clone()).to_string()
    }

    fn reservation_key(&self) -> String {
        Key::Reservation(B.name(), self.machine.clone()).to_string()
    }

    fn record_entry(&self) -> Option<&KeyValue> {
        self.store.get(&self.record_key())
    }

    fn found(&self) -> Option<VersionedRecord> {
        Some(VersionedRecord::read(self.record_entry()?).unwrap())
    }

    /// Runs a transaction; `None` if its answer is lost.
    fn send(&mut self, txn: &Txn) -> Option<bool> {
        if self.fault(4) {
            match self.random.random_range(0..3) {
                0 => self.store.in_flight.push(txn.clone()),
                1 => drop(self.store.apply(txn)),
                _ => {}
            }
            return None;
        }
        Some(self.store.apply(txn))
    }

    /// A change of the record, on the condition that it was not changed meanwhile.
    fn change(&self, record: &Record) -> Txn {
        let revision = self.record_entry().map_or(0, |it| it.modified);
        Txn::new()
            .when_modified_at(self.record_key(), revision)
            .put(self.record_key(), record.encode().unwrap())
    }

    // ── invariants ──────────────────────────────────────────────────────

    /// A copy of a process on a node starts to run, unless it is held.
    fn begins(&mut self, node: Node, process: u32, epoch: Epoch) {
        if self.is_held(node) {
            return;
        }
        let (newest, before) = self.newest;
        let rises = match process == before {
            true => epoch >= newest,
            false => epoch > newest,
        };
        assert!(rises, "it runs under {epoch}, after {newest}: {self:?}");
        self.newest = (epoch, process);
    }

    fn check(&self) {
        let live: Vec<(Node, Epoch)> = [A, B]
            .into_iter()
            .filter_map(|node| Some((node, self.runs(node)?)))
            .collect();
        assert!(live.len() <= 1, "two live copies: {self:?}");
        if let Some((node, epoch)) = live.first() {
            let Some(record) = self.found().map(|it| it.record) else {
                panic!("a machine runs that was removed: {self:?}");
            };
            let named = record.owner == node.name() && !record.status.ended();
            assert!(named, "the record does not name what runs: {self:?}");
            assert!(*epoch <= record.epoch, "older than what runs: {self:?}");
            assert!(*epoch >= self.first, "of another creation: {self:?}");
        }
        if let Some(record) = self.found().map(|it| it.record) {
            let kept = record.spec.memory_bytes >= self.acknowledged;
            assert!(kept, "an acknowledged change is undone: {self:?}");
            assert!(record.restarts <= self.deaths, "restarts: {self:?}");
        }
        let has_source = matches!(
            self.processes[A as usize].as_ref().map(|it| &it.copy),
            Some(Copy::Machine { .. })
        );
        assert!(
            !self.lacking() || has_source || self.source_killed,
            "the source dropped what the target lacks: {self:?}"
        );
    }

    /// Whether the machine runs at B without all of its memory, or is held there, and was not
    /// given to another node since.
    fn lacking(&self) -> bool {
        let Some(b) = self.processes[B as usize]
            .as_ref()
            .filter(|b| b.missing > 0)
        else {
            return false;
        };
        let is_present = |epoch: Epoch| {
            let record = self.found().map(|it| it.record);
            record.is_some_and(|it| it.owner == B.name() && it.epoch == epoch)
        };
        b.live().is_some_and(is_present)
    }

    /// The outcome, once nothing remains to be done.
    pub(crate) fn end(&self) -> Option<End> {
        if self.driver.is_some() || !self.store.in_flight.is_empty() || self.lacking() {
            return None;
        }
        let idle = self.processes.iter().all(Option::is_none);
        let Some(record) = self.found().map(|it| it.record) else {
            return idle.then_some(End::Removed);
        };
        if record.status.ended() {
            assert!(self.deaths > 0, "it ended by itself: {self:?}");
            return idle.then_some(End::Ended);
        }
        let running: Vec<(Node, Epoch)> = [A, B]
            .into_iter()
            .filter_map(|node| Some((node, self.runs(node)?)))
            .collect();
        let [(node, epoch)] = running[..] else {
            return None;
        };
        let processes = self.processes.iter().flatten().count();
        let settled = record.status == Status::Running
            && record.owner == node.name()
            && record.epoch == epoch
            && processes == 1
            && self.store.has(&self.entry_key(node));
        settled.then_some(match (self.creations, record.restarts, node) {
            (2.., _, _) => End::Recreated,
            (_, 1.., _) => End::Restarted,
            (_, _, B) => End::Moved,
            (_, _, A) if epoch == self.began => End::Stayed,
            (_, _, A) => End::Kept,
        })
    }

    // ── the user ────────────────────────────────────────────────────────

    /// `run` or `restore`, if no machine has the name.
    fn create(&mut self, node: Node, restart: Restart) {
        let mut record = new_record(&self.machine, node, restart, self.ha);
        record.epoch.incarnation = self.store.incarnation;
        let txn = Txn::new()
            .when_absent(self.record_key())
            .put(self.record_key(), record.encode().unwrap())
            .put(self.entry_key(node), Vec::new());
        if self.store.apply(&txn) {
            self.creations += 1;
            self.first = self.found().map(|it| it.record.epoch).unwrap_or_default();
            self.acknowledged = crate::record::MEMORY_BYTES;
            self.deaths = 0;
            self.say("created");
        }
    }

    /// `rm`, which the owner carries out.
    fn remove(&mut self) {
        let Some(found) = self.found().filter(|it| it.record.status.ended()) else {
            return;
        };
        let txn = Txn::new()
            .when_modified_at(self.record_key(), found.revision)
            .delete(self.record_key());
        assert!(self.store.apply(&txn));
        let owner = if found.record.owner == A.name() { A } else { B };
        self.processes[owner as usize] = None;
        self.acknowledged = crate::record::MEMORY_BYTES;
        self.say("removed");
    }

    /// `set`, whose check succeeded before the move began.
    fn set(&mut self) {
        let Some(VersionedRecord { mut record, .. }) = self.found() else {
            return;
        };
        record.spec.memory_bytes += 1;
        let txn = self.change(&record);
        if self.send(&txn) == Some(true) {
            self.acknowledged = record.spec.memory_bytes;
            self.say("set");
        }
    }

    // ── processes ───────────────────────────────────────────────────────

    fn new_process(&mut self, copy: Copy) -> Process {
        self.next_process += 1;
        Process {
            id: self.next_process,
            copy,
            giving: false,
            missing: 0,
            source_lost: false,
        }
    }

    fn step_arrival(&mut self, event: TargetEvent) -> Vec<TargetCommand> {
        let Some(process) = &mut self.processes[B as usize] else {
            return Vec::new();
        };
        let id = process.id;
        let Copy::Arrival(target) = &mut process.copy else {
            return Vec::new();
        };
        let commands = target.step(event);
        for command in &commands {
            if let TargetCommand::Thaw(epoch) = command {
                self.begins(B, id, *epoch);
            }
        }
        commands
    }

    fn go(&mut self, epoch: Epoch) -> bool {
        let commands = self.step_arrival(TargetEvent::Go(epoch));
        commands
            .iter()
            .any(|it| matches!(it, TargetCommand::SendResumed(_)))
    }

    /// Resumes the process of the move at its source, if it exists.
    fn thaw(&mut self, id: u32, epoch: Epoch) {
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

    fn break_link(&mut self) {
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

    fn kill(&mut self, node: Node) {
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

    // ── agents ──────────────────────────────────────────────────────────

    /// One action of a node's agent, according to its schedule, its process and the
    /// record.
    fn agent(&mut self, node: Node) {
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
    fn without_process(&mut self, node: Node) {
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
    fn write_end(&mut self, node: Node, ending: Ending) {
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
    fn with_machine(&mut self, node: Node) {
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
    fn has_next_life(&self, node: Node, epoch: Epoch) -> bool {
        let record = self.found().map(|it| it.record);
        record.is_some_and(|it| {
            let starts = matches!(it.status, Status::Scheduled | Status::Restarting { .. });
            starts && it.owner == node.name() && it.epoch > epoch
        })
    }

    fn write_running(&mut self, node: Node, filling: bool) {
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

    /// A machine arrives here, is ready, or has resumed.
    fn with_arrival(&mut self, state: TargetState) {
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
    fn sees_commit(&mut self) -> bool {
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

    fn offered(&self) -> Epoch {
        self.began
    }

    fn go_if_won(&mut self, record: &Record) -> bool {
        match ownership::may_resume(&B.name(), self.offered(), Some(record)) {
            ResumeDecision::Resume(epoch) => self.go(epoch),
            ResumeDecision::Drop | ResumeDecision::Undecided => false,
        }
    }

    /// Settles an arrival whose source is lost: removes the reservation; if it is removed
    /// already, the commit may have been applied, and the record decides.
    fn settle_arrival(&mut self) {
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

    /// A new agent at the source finds a worker whose machine was moving.
    fn take_up_move(&mut self) {
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

    // ── one step ────────────────────────────────────────────────────────

    pub(crate) fn step(&mut self) {
        match self.random.random_range(0..14) {
            0..=4 => self.drive(),
            5 | 6 => self.agent(B),
            7 | 8 => self.agent(A),
            9 => self.late_transaction(),
            10 if self.ha => self.of_leases(),
            _ => self.break_something(),
        }
        self.check();
    }

    fn late_transaction(&mut self) {
        if let Some(txn) = self.store.in_flight.pop() {
            // Or never.
            if !self.fault(3) {
                let applied = self.store.apply(&txn);
                self.say(&format!("a late transaction: {applied}"));
            }
        }
    }

    fn break_something(&mut self) {
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
            _ => {}
        }
    }

    fn in_doubt(&self) -> bool {
        let state = self.driver.as_ref().map(|it| it.source.state());
        matches!(state, Some(SourceState::InDoubt | SourceState::Handed))
    }

    fn kill_agent(&mut self) {
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
