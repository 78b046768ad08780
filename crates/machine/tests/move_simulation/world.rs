//! Two nodes, the machine and its user, and what must hold after each step.
//!
//! - `agent`, `source`, `target`: what the nodes do, the latter two in a move
//! - `faults`: what breaks; `leases`: nodes without a lease; `new_store`: a store that begins anew

#[path = "agent.rs"]
mod agent;
#[path = "faults.rs"]
mod faults;
#[path = "leases.rs"]
mod leases;
#[path = "new_store.rs"]
mod new_store;
#[path = "source.rs"]
mod source;
#[path = "target.rs"]
mod target;

use crate::store::Store;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::high_availability::HighAvailability;
use keel_machine::moves::ownership::{self, Transfer, VersionedRecord};
use keel_machine::moves::{SourceCommand, SourceMove, TargetMove, TargetState};
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
    /// A machine that has ended is started again under the epoch of its last life.
    StartsUnderItsLastEpoch,
}

impl Defect {
    pub(crate) const ALL: [Defect; 13] = [
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
        Defect::StartsUnderItsLastEpoch,
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
    /// It ended, and was started again.
    StartedAgain,
    /// A later machine of the same name runs.
    Recreated,
    /// It has ended, and the record says so.
    Ended,
    /// It was removed.
    Removed,
}

impl End {
    pub(crate) const ALL: [End; 8] = [
        End::Stayed,
        End::Kept,
        End::Moved,
        End::Restarted,
        End::StartedAgain,
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
    /// How often the machine was started again after an end.
    starts: u32,
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
            starts: 0,
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
            _ if self.starts > 0 => End::StartedAgain,
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

    /// `start`, of a machine that has ended.
    fn start_again(&mut self) {
        let Some(found) = self.found() else {
            return;
        };
        let epoch = found.record.epoch;
        let Some(again) = ownership::start_again(&found, true, NOW_UNIX_MS).unwrap() else {
            return;
        };
        let mut record = again.record;
        assert!(record.epoch > epoch, "started under its epoch: {self:?}");
        let txn = match self.defect {
            Defect::StartsUnderItsLastEpoch => {
                record.epoch = epoch;
                again.txn.put(self.record_key(), record.encode().unwrap())
            }
            _ => again.txn,
        };
        if self.send(&txn) == Some(true) {
            self.starts += 1;
            self.say("started again");
        }
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
}
