//! Both sides of a move, their agents and the store, in one deterministic
//! simulation: messages are lost, late and repeated; workers and agents die and
//! come back; others write the record. What must hold at every step: never two
//! live copies, and no copy under an epoch that is not newer than all before.
//! And once the faults stop: the machine runs, unless the process that held the
//! only copy was killed.
//!
//! Every second machine moves by post-copy: what the target lacks must stay with the
//! source until the target has it, unless the source's process is killed.
//!
//! The state machines are the real ones. What is around them (agents, workers'
//! processes, transactions) is modelled after `keel-node`, rule by rule.
//!
//! A failing seed is printed; `KEEL_SIM_SEED=N` repeats it with a trace,
//! `KEEL_SIM_SEEDS=N` runs another number of them.

use keel_cluster::Epoch;
use keel_machine::moves::{
    SourceCommand, SourceEvent, SourceMove, SourceState, TargetCommand, TargetEvent, TargetMove,
    TargetState,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::VecDeque;

const SEEDS: u64 = 300_000;
/// Steps with faults, and without them after that.
const FAULTY_STEPS: u32 = 60;
const CALM_STEPS: u32 = 400;
/// Pieces of memory that come after a machine which moves by post-copy.
const PIECES: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    A,
    B,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Running,
    /// At B by the commit; not known to run there.
    Arriving,
    /// It runs there, and a part of its memory is still at A.
    Filling,
    Failed,
}

/// What the store says of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    owner: Node,
    epoch: Epoch,
    status: Status,
    revision: u64,
}

/// The process at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WorkerA {
    Running(Epoch),
    Frozen,
    Gone,
}

/// The process at the target.
#[derive(Debug)]
struct WorkerB {
    target: TargetMove,
    /// It was seen that the source is lost; its agent is to settle.
    source_lost: bool,
    /// Pieces of memory that only the source has.
    missing: u32,
}

/// The agent at the source drives the move, if it lives.
#[derive(Debug)]
struct Driver {
    source: SourceMove,
    commands: VecDeque<SourceCommand>,
    /// The record as the move began, by its revision.
    revision: u64,
    began: Epoch,
}

struct World {
    random: StdRng,
    trace: bool,
    record: Record,
    reservation: bool,
    a: WorkerA,
    b: Option<WorkerB>,
    driver: Option<Driver>,
    /// A transaction that nobody knows the fate of: it may be applied yet.
    in_flight: Option<(u64, Epoch)>,
    link: bool,
    faults: bool,
    /// The newest epoch under which a copy ran.
    newest: Epoch,
    post_copy: bool,
    /// A process with the only copy was killed.
    excused: bool,
}

impl World {
    fn new(seed: u64, trace: bool) -> Self {
        let epoch = Epoch {
            incarnation: 1,
            counter: 5,
        };
        let record = Record {
            owner: Node::A,
            epoch,
            status: Status::Running,
            revision: 10,
        };
        let post_copy = seed % 2 == 1;
        let mut source = SourceMove::new(epoch, post_copy);
        let commands = source.step(SourceEvent::Accepted).into();
        World {
            random: StdRng::seed_from_u64(seed),
            trace,
            record,
            reservation: true,
            a: WorkerA::Running(epoch),
            b: Some(WorkerB {
                target: TargetMove::new(epoch),
                source_lost: false,
                missing: if post_copy { PIECES } else { 0 },
            }),
            driver: Some(Driver {
                source,
                commands,
                revision: record.revision,
                began: epoch,
            }),
            in_flight: None,
            link: true,
            faults: true,
            newest: epoch,
            post_copy,
            excused: false,
        }
    }

    /// True one time in `n`, and never when the faults have stopped.
    fn fault(&mut self, n: u32) -> bool {
        self.faults && self.random.random_range(0..n) == 0
    }

    fn say(&self, what: &str) {
        if self.trace {
            let b = self.b.as_ref().map(|b| b.target.state());
            let source = self.driver.as_ref().map(|driver| driver.source.state());
            println!(
                "{what}: {:?}, A {:?}, B {b:?}, source {source:?}",
                self.record, self.a
            );
        }
    }

    // ── what must hold ──────────────────────────────────────────────────

    fn live(&self) -> Vec<(Node, Epoch)> {
        let mut live = Vec::new();
        if let WorkerA::Running(epoch) = self.a {
            live.push((Node::A, epoch));
        }
        if let Some(TargetState::Running { epoch }) = self.b.as_ref().map(|b| b.target.state()) {
            live.push((Node::B, epoch));
        }
        live
    }

    fn check(&mut self) {
        let live = self.live();
        assert!(live.len() <= 1, "two live copies: {live:?}");
        if let Some((_, epoch)) = live.first() {
            assert!(*epoch >= self.newest, "epoch {epoch:?} is not the newest");
            self.newest = *epoch;
        }
        let lacks = self.lacking();
        assert!(
            !lacks || self.a != WorkerA::Gone || self.excused,
            "the source dropped what the target lacks"
        );
    }

    /// Whether it runs at B without all of its memory.
    fn lacking(&self) -> bool {
        self.b.as_ref().is_some_and(|b| {
            b.missing > 0 && matches!(b.target.state(), TargetState::Running { .. })
        })
    }

    // ── the store ───────────────────────────────────────────────────────

    fn write(&mut self, change: impl FnOnce(&mut Record)) {
        change(&mut self.record);
        self.record.revision += 1;
    }

    /// The move's transaction.
    fn apply_commit(&mut self, revision: u64, epoch: Epoch) -> bool {
        let holds =
            self.record.revision == revision && self.record.owner == Node::A && self.reservation;
        if holds {
            self.reservation = false;
            self.write(|record| {
                record.owner = Node::B;
                record.epoch = epoch;
                record.status = Status::Arriving;
            });
        }
        holds
    }

    // ── the target's side ───────────────────────────────────────────────

    fn step_b(&mut self, event: TargetEvent) -> Vec<TargetCommand> {
        match &mut self.b {
            Some(b) => b.target.step(event),
            None => Vec::new(),
        }
    }

    fn go(&mut self, epoch: Epoch) -> bool {
        !self.step_b(TargetEvent::Go(epoch)).is_empty()
    }

    fn break_link(&mut self) {
        if !std::mem::take(&mut self.link) {
            return;
        }
        let commands = self.step_b(TargetEvent::SourceLost("lost".into()));
        if let Some(b) = &mut self.b {
            b.source_lost = commands.contains(&TargetCommand::AskAgent);
            if b.target.state() == TargetState::Dropped {
                self.b = None;
                self.reservation = false;
            }
        }
    }

    /// `offer::settle`: takes the reservation away; where it was gone, the
    /// commit had won.
    fn settle_b(&mut self) {
        let state = self.b.as_ref().map(|b| b.target.state());
        if matches!(state, None | Some(TargetState::Running { .. })) {
            return;
        }
        let taken = std::mem::take(&mut self.reservation);
        if !taken && self.record.owner == Node::B && self.record.status != Status::Failed {
            if state == Some(TargetState::Prepared) {
                self.go(self.record.epoch);
                return;
            }
            if state != Some(TargetState::Dropped) {
                return;
            }
        }
        self.b = None;
    }

    /// The target's agent looks around: its schedule, its worker.
    fn agent_b(&mut self) {
        let state = self.b.as_ref().map(|b| b.target.state());
        if self.b.as_ref().is_some_and(|b| b.source_lost) && state == Some(TargetState::Prepared) {
            self.settle_b();
            return;
        }
        if self.record.owner != Node::B {
            // Not in its schedule: what runs is ended, what arrives is not.
            if matches!(state, Some(TargetState::Running { .. })) {
                self.b = None;
            }
            return;
        }
        let lacks = self.lacking();
        if lacks && self.a == WorkerA::Gone {
            // `await_source`: what it lacks is nowhere.
            self.b = None;
            return;
        }
        match (state, self.record.status) {
            (Some(TargetState::Prepared), Status::Arriving) => {
                self.go(self.record.epoch);
            }
            (Some(TargetState::Running { .. }), Status::Arriving) if lacks => {
                self.write(|record| record.status = Status::Filling);
            }
            (Some(TargetState::Running { .. }), Status::Arriving) => {
                self.write(|record| record.status = Status::Running);
            }
            (Some(TargetState::Running { .. }), Status::Filling) if !lacks => {
                self.write(|record| record.status = Status::Running);
            }
            (None, Status::Running | Status::Filling) => {
                self.write(|record| record.status = Status::Failed)
            }
            // Its worker is lost, and so is the source's copy.
            (None, Status::Arriving) if self.a == WorkerA::Gone => {
                self.write(|record| record.status = Status::Failed);
            }
            // The source takes it back.
            _ => {}
        }
    }

    // ── the source's side ───────────────────────────────────────────────

    fn thaw_a(&mut self, epoch: Epoch) {
        if self.a == WorkerA::Frozen {
            self.a = WorkerA::Running(epoch);
        }
    }

    /// The next thing that the driver has to do, with what comes of it.
    fn drive(&mut self) {
        let Some(driver) = &mut self.driver else {
            return;
        };
        let Some(command) = driver.commands.pop_front() else {
            if driver.source.is_over() {
                self.driver = None;
            }
            return;
        };
        if let Some(event) = self.carry_out(&command)
            && let Some(driver) = &mut self.driver
        {
            let more = driver.source.step(event);
            driver.commands.extend(more);
        }
        self.say(&format!("{command:?}"));
    }

    fn carry_out(&mut self, command: &SourceCommand) -> Option<SourceEvent> {
        let lost = || SourceEvent::PeerLost("lost".into());
        let event = match command {
            SourceCommand::StartCopy if self.a == WorkerA::Gone => SourceEvent::MachineEnded,
            SourceCommand::StartCopy if !self.link || self.b.is_none() => lost(),
            SourceCommand::StartCopy if self.fault(10) => SourceEvent::Cancel("no".into()),
            SourceCommand::StartCopy => SourceEvent::Converged,
            SourceCommand::AskStore if self.fault(10) => SourceEvent::StoreAway("away".into()),
            SourceCommand::AskStore => SourceEvent::StoreAnswered,
            SourceCommand::FreezeAndSend => self.freeze_and_send(),
            SourceCommand::Commit { epoch } => self.commit(*epoch),
            SourceCommand::SettleByWrite { epoch } => self.settle_by_write(*epoch),
            SourceCommand::TellTarget { epoch } => self.tell_target(*epoch),
            SourceCommand::TakeBack { epoch } => self.take_back(*epoch),
            SourceCommand::Thaw { epoch } => {
                self.thaw_a(*epoch);
                return None;
            }
            SourceCommand::AbortTarget { .. } => {
                if !self.fault(2) {
                    self.break_link();
                }
                if !self.fault(2) {
                    self.settle_b();
                }
                return None;
            }
            SourceCommand::Serve => return self.serve(),
            SourceCommand::Forget => {
                self.a = WorkerA::Gone;
                return None;
            }
        };
        Some(event)
    }

    /// Sends one piece, if it can, and goes on with that until nobody needs any.
    fn serve(&mut self) -> Option<SourceEvent> {
        let lost = self.fault(4);
        if self.a == WorkerA::Gone || !self.needs_copy() {
            return Some(SourceEvent::Served);
        }
        // (A lost connection is made anew.)
        if let Some(b) = self.b.as_mut().filter(|_| !lost) {
            b.missing = b.missing.saturating_sub(1);
        }
        let lacks = self.b.as_ref().is_none_or(|b| b.missing > 0);
        if !lacks && !self.fault(4) {
            return Some(SourceEvent::Served);
        }
        if let Some(driver) = &mut self.driver {
            driver.commands.push_front(SourceCommand::Serve);
        }
        None
    }

    /// `reconcile::needs_copy`, and whether it was lost there.
    fn needs_copy(&self) -> bool {
        match self.record.status {
            Status::Filling => true,
            Status::Arriving => self.b.is_some(),
            Status::Running | Status::Failed => false,
        }
    }

    fn freeze_and_send(&mut self) -> SourceEvent {
        let late = self.fault(15);
        match self.a {
            WorkerA::Running(_) if late => {
                return SourceEvent::FreezeLate("late".into());
            }
            WorkerA::Running(_) => self.a = WorkerA::Frozen,
            WorkerA::Frozen => {}
            WorkerA::Gone => return SourceEvent::MachineEnded,
        }
        if !self.link || self.b.is_none() || self.fault(10) {
            self.break_link();
            return SourceEvent::PeerLost("lost".into());
        }
        self.step_b(TargetEvent::StateArrived);
        self.step_b(TargetEvent::InstancesMade);
        if self.fault(8) {
            // It is ready, but the word of it is lost.
            self.break_link();
            return SourceEvent::PeerLost("lost".into());
        }
        SourceEvent::Prepared
    }

    fn commit(&mut self, epoch: Epoch) -> SourceEvent {
        let Some(revision) = self.driver.as_ref().map(|driver| driver.revision) else {
            return SourceEvent::CommitUnknown;
        };
        if self.fault(4) {
            // It is on its way, and may arrive at any time, or never.
            self.in_flight = Some((revision, epoch));
            return SourceEvent::CommitUnknown;
        }
        let won = self.apply_commit(revision, epoch);
        match (won, self.fault(4)) {
            (_, true) => SourceEvent::CommitUnknown,
            (true, false) => SourceEvent::CommitWon,
            (false, false) => SourceEvent::CommitRefused("refused".into()),
        }
    }

    fn settle_by_write(&mut self, epoch: Epoch) -> SourceEvent {
        let Some(driver) = &self.driver else {
            return SourceEvent::OwnWriteUnknown;
        };
        let (revision, began) = (driver.revision, driver.began);
        if self.fault(4) {
            return SourceEvent::OwnWriteUnknown;
        }
        if self.record.revision == revision {
            self.write(|record| {
                record.owner = Node::A;
                record.epoch = epoch;
                record.status = Status::Running;
            });
            return if self.fault(4) {
                SourceEvent::OwnWriteUnknown
            } else {
                SourceEvent::OwnWriteWon
            };
        }
        let record = self.record;
        match (record.owner, record.epoch) {
            (Node::A, now) if now == epoch => SourceEvent::OwnWriteWon,
            (Node::A, now) if now == began && record.status != Status::Failed => {
                if let Some(driver) = &mut self.driver {
                    driver.revision = record.revision;
                }
                SourceEvent::OwnWriteUnknown
            }
            _ => SourceEvent::OwnWriteLost,
        }
    }

    fn tell_target(&mut self, epoch: Epoch) -> SourceEvent {
        if self.link && self.b.is_some() && !self.fault(4) {
            let went = self.go(epoch);
            if went && !self.fault(4) {
                return SourceEvent::TargetResumed;
            }
        }
        if self.fault(3) {
            return SourceEvent::PeerLost("its agent does not answer".into());
        }
        // `offer::arrival`
        match self.b.as_ref().map(|b| b.target.state()) {
            None => SourceEvent::TargetWithout,
            Some(TargetState::Running { .. }) => SourceEvent::TargetResumed,
            Some(TargetState::Prepared) => {
                self.go(epoch);
                SourceEvent::TargetResumed
            }
            Some(_) => {
                self.b = None;
                SourceEvent::TargetWithout
            }
        }
    }

    fn take_back(&mut self, epoch: Epoch) -> SourceEvent {
        let Some(began) = self.driver.as_ref().map(|driver| driver.began) else {
            return SourceEvent::OwnWriteUnknown;
        };
        if self.fault(4) {
            return SourceEvent::OwnWriteUnknown;
        }
        let record = self.record;
        if record.owner == Node::A && record.epoch == epoch {
            return SourceEvent::OwnWriteWon;
        }
        let arriving = record.owner == Node::B
            && record.epoch == began.next()
            && record.status == Status::Arriving;
        if !arriving {
            return SourceEvent::OwnWriteLost;
        }
        self.write(|record| {
            record.owner = Node::A;
            record.epoch = epoch;
            record.status = Status::Running;
        });
        if self.fault(4) {
            SourceEvent::OwnWriteUnknown
        } else {
            SourceEvent::OwnWriteWon
        }
    }

    /// A new agent at the source finds a worker that was giving its machine
    /// away: `reconcile::resume_after_move`.
    fn agent_a_again(&mut self) {
        if self.driver.is_some() {
            return;
        }
        let record = self.record;
        if self.a == WorkerA::Gone {
            // Its schedule says that it runs here, and it does not.
            if record.owner == Node::A && record.status == Status::Running {
                self.write(|record| record.status = Status::Failed);
            }
            return;
        }
        match (record.owner, record.status) {
            (Node::A, Status::Running) => {
                // A write under a new epoch, then the thaw.
                if self.a == WorkerA::Frozen {
                    self.write(|record| record.epoch = record.epoch.next());
                    self.thaw_a(self.record.epoch);
                }
            }
            (Node::B, Status::Arriving | Status::Filling) => {
                let began = Epoch {
                    counter: record.epoch.counter - 1,
                    ..record.epoch
                };
                let (source, commands) = SourceMove::handed(began, self.post_copy);
                self.driver = Some(Driver {
                    source,
                    commands: commands.into(),
                    revision: 0,
                    began,
                });
            }
            _ => self.a = WorkerA::Gone,
        }
        self.say("a new agent at A");
    }

    // ── one step ────────────────────────────────────────────────────────

    fn step(&mut self) {
        match self.random.random_range(0..12) {
            0..=4 => self.drive(),
            5 | 6 => {
                self.agent_b();
                self.say("the agent at B");
            }
            7 => self.agent_a_again(),
            8 => {
                if let Some((revision, epoch)) = self.in_flight.take() {
                    let applied = self.apply_commit(revision, epoch);
                    self.say(&format!("a late commit: {applied}"));
                }
            }
            _ => self.break_something(),
        }
        self.check();
    }

    fn break_something(&mut self) {
        if !self.faults {
            return;
        }
        match self.random.random_range(0..14) {
            0 => {
                self.break_link();
                self.say("the link breaks");
            }
            1 => {
                // Something about it is written by others.
                self.write(|_| {});
                self.say("another write");
            }
            2 | 3 => {
                if let Some(driver) = self.driver.take() {
                    // What it had sent may still arrive.
                    if let Some(SourceCommand::Commit { epoch }) = driver.commands.front() {
                        self.in_flight = Some((driver.revision, *epoch));
                    }
                    self.say("the agent at A dies");
                }
            }
            4 => {
                let was_live = self.live().iter().any(|(node, _)| *node == Node::B);
                if self.b.take().is_some() {
                    self.link = false;
                    // Before it ran, A has a copy; if A's is gone, this was it.
                    if was_live || self.a == WorkerA::Gone {
                        self.excused = true;
                    }
                    if self.record.owner != Node::B {
                        self.reservation = false;
                    }
                    self.say("the worker at B dies");
                }
            }
            5 if self.lacking() && self.a == WorkerA::Frozen => {
                // What only it had is lost, and the machine with it.
                self.a = WorkerA::Gone;
                self.excused = true;
                self.say("the worker at A dies");
            }
            _ => {}
        }
    }

    fn over(&self) -> bool {
        let runs_where_it_should = match self.live()[..] {
            [(node, epoch)] => {
                self.record.owner == node
                    && self.record.epoch == epoch
                    && self.record.status == Status::Running
            }
            _ => false,
        };
        let whole = !self.lacking();
        whole && self.driver.is_none() && runs_where_it_should && self.in_flight.is_none()
    }
}

/// How a machine ended up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// At its source under the epoch that it had.
    Stayed,
    /// At its source, by a write under a newer one.
    Kept,
    /// At its source, after the commit had won.
    TakenBack,
    /// At its target.
    Moved,
    /// Lost with a process, and said to be.
    Failed,
}

fn run(seed: u64, trace: bool) -> End {
    let mut world = World::new(seed, trace);
    for _ in 0..FAULTY_STEPS {
        world.step();
    }
    world.faults = false;
    for _ in 0..CALM_STEPS {
        if world.over() {
            let epochs = world.record.epoch.counter - 5;
            return match (world.record.owner, epochs) {
                (Node::B, _) => End::Moved,
                (Node::A, 0) => End::Stayed,
                (Node::A, 1) => End::Kept,
                (Node::A, _) => End::TakenBack,
            };
        }
        world.step();
    }
    let end = format!(
        "{:?}, A {:?}, B {:?}, driver {:?}",
        world.record, world.a, world.b, world.driver
    );
    // Lost with a process, it must be said to be.
    let told = world.record.status == Status::Failed && world.live().is_empty();
    assert!(world.excused && told, "the machine does not run: {end}");
    End::Failed
}

#[test]
fn never_two_and_never_none() {
    if let Some(seed) = setting("KEEL_SIM_SEED") {
        println!("{:?}", run(seed, true));
        return;
    }
    let mut ends = Vec::new();
    let seeds = setting("KEEL_SIM_SEEDS").unwrap_or(SEEDS);
    for seed in 0..seeds {
        let result = std::panic::catch_unwind(|| run(seed, false));
        let Ok(end) = result else {
            panic!(
                "seed {seed}: KEEL_SIM_SEED={seed} cargo test --release -p keel-machine --test move_simulation"
            );
        };
        ends.push(end);
    }
    // Every way out was gone, often.
    for end in [
        End::Stayed,
        End::Kept,
        End::TakenBack,
        End::Moved,
        End::Failed,
    ] {
        let count = ends.iter().filter(|was| **was == end).count() as u64;
        println!("{end:?}: {count} of {seeds}");
        assert!(count * 2000 >= seeds, "{end:?}: {count} of {seeds}");
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A source that does not wait until the target has all of it is found too.
#[test]
fn dropping_too_early_is_found() {
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..2000).any(|seed| {
        std::panic::catch_unwind(|| {
            let mut world = World::new(2 * seed + 1, false);
            for _ in 0..FAULTY_STEPS {
                let serves = world
                    .driver
                    .as_ref()
                    .is_some_and(|driver| *driver.source.state() == SourceState::Serving);
                if serves {
                    world.driver = None;
                    world.a = WorkerA::Gone;
                }
                world.step();
            }
        })
        .is_err()
    });
    let _ = std::panic::take_hook();
    assert!(found);
}

/// The simulation finds what it is there to find: without the rule that only a
/// write settles doubt, two copies run.
#[test]
fn a_broken_rule_is_found() {
    // Its panics are what is looked for.
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..20_000).any(|seed| {
        std::panic::catch_unwind(|| {
            let mut world = World::new(seed, false);
            for _ in 0..FAULTY_STEPS {
                let doubt = world
                    .driver
                    .as_ref()
                    .is_some_and(|driver| *driver.source.state() == SourceState::InDoubt);
                if doubt && world.record.owner == Node::A {
                    // It reads, finds itself the owner, and goes on.
                    world.driver = None;
                    world.thaw_a(world.record.epoch);
                }
                world.step();
            }
        })
        .is_err()
    });
    let _ = std::panic::take_hook();
    assert!(found);
}
