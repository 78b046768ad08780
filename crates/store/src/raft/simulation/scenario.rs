//! One seed: a cluster, its clients, its faults, and what must hold afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::clients::{KEYS, Recorded, Seen, record, values, watch};
use super::faults::{FAULTS, Fault};
use super::linearizability;
use super::owners::{self, Line, own};
use super::world::{Process, World};
use crate::interface::{Change, Listing, Revision, Store};
use crate::raft::{IfAbsent, RaftOptions, Voter};

/// Time for the store to answer, and for all voters to have everything, once the faults stopped.
const SETTLE: Duration = Duration::from_secs(30);
/// Time for a change of the voters, while everything works.
pub(super) const CHANGE: Duration = Duration::from_secs(20);
const CLIENTS: u64 = 3;
const CALLS_MAX: usize = 80;
const WATCHES: u64 = 2;
/// Why a leader may stop that another voter is about to replace. In `openraft` 0.9.25 the answer of
/// a voter with a higher vote ends the task that sends to it, and an earlier answer of the same
/// voter may ask for a snapshot after that: `Command::Replicate` in `raft_core.rs` takes the absence
/// of the task for a fault of the disk.
const DEPOSED: &str = "replication channel closed";
/// Computers of the nodes that run the machine by turns.
pub(super) const OWNERS: [&str; 3] = ["a", "b", "c"];

/// What happened under a seed, or under many.
#[derive(Debug, Clone, Default)]
pub(super) struct Run {
    pub(super) calls: usize,
    pub(super) unanswered: usize,
    changes_watched: usize,
    pub(super) terms: u64,
    snapshots_received: usize,
    pub(super) take_overs: u64,
    lines: usize,
    /// How often a leader stopped because it was [`DEPOSED`].
    deposed: u64,
    /// How often each fault occurred.
    pub(super) faults: BTreeMap<Fault, u64>,
    /// Everything that happened, of one seed.
    pub(super) trace: Vec<String>,
}

impl Run {
    pub(super) fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.unanswered += other.unanswered;
        self.changes_watched += other.changes_watched;
        self.terms += other.terms;
        self.snapshots_received += other.snapshots_received;
        self.take_overs += other.take_overs;
        self.lines += other.lines;
        self.deposed += other.deposed;
        for (fault, times) in &other.faults {
            *self.faults.entry(*fault).or_default() += times;
        }
    }

    /// Whether each kind of fault and of event occurred.
    pub(super) fn has_everything(&self) -> bool {
        let counts = [
            self.take_overs,
            self.terms,
            self.calls as u64,
            self.unanswered as u64,
            self.changes_watched as u64,
            self.snapshots_received as u64,
        ];
        self.faults.len() == FAULTS.len() && counts.iter().all(|count| *count > 0)
    }
}

pub(super) struct Scenario {
    pub(super) world: Arc<World>,
    options: RaftOptions,
    pub(super) run: Run,
    /// Which voter served in which term, and where.
    served: BTreeMap<u64, String>,
    next_name: u64,
}

/// Runs one seed with some of these faults.
///
/// # Errors
/// The first promise that was not kept.
pub(super) async fn run(seed: u64, faults: &[Fault], prints: bool) -> Result<Run, String> {
    let world = World::new(seed, prints);
    let done = run_in(&world, faults).await;
    world.end();
    done
}

async fn run_in(world: &Arc<World>, faults: &[Fault]) -> Result<Run, String> {
    let options = RaftOptions {
        history_revisions_max: usize::try_from(world.draw(20..2_000)).unwrap_or(20),
        snapshot_entries: world.draw(5..150),
        ..RaftOptions::default()
    };
    let mut scenario = Scenario {
        options,
        ..Scenario::new(world)
    };
    scenario.begin().await?;
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (1..=CLIENTS)
        .map(|client| tokio::spawn(record(world.clone(), client, CALLS_MAX, stop.clone())))
        .collect();
    let watches: Vec<_> = (0..WATCHES)
        .map(|_| tokio::spawn(watch(world.clone(), stop.clone())))
        .collect();
    let owners: Vec<_> = OWNERS
        .iter()
        .map(|name| {
            world.add(name);
            tokio::spawn(own(world.clone(), (*name).into(), stop.clone()))
        })
        .collect();
    // Voters are added while the store is used.
    let voters = [1, 3, 3, 3, 5][usize::try_from(world.draw(0..5)).unwrap_or(1)];
    scenario.grow(voters).await?;
    for _ in 0..world.draw(3..8) {
        world.sleep_ms(100..900).await;
        let fault = world.pick(faults).ok_or("no fault")?;
        scenario.fault(fault, voters).await?;
        scenario.look()?;
        scenario.reopen().await?;
    }
    scenario.settle().await?;
    world.sleep_ms(1_500..2_500).await;
    stop.store(true, Relaxed);
    // Calls that are under way when the copies are read would be neither before nor after that.
    let clients = ended(clients).await?;
    let owners = ended(owners).await?;
    let watches = ended(watches).await?;
    let contents = scenario.compare_copies().await?;
    scenario.check(&contents, clients, watches, owners)?;
    let mut run = scenario.run;
    run.trace = world.trace();
    Ok(run)
}

/// What these tasks say.
async fn ended<T>(tasks: Vec<JoinHandle<Result<T, String>>>) -> Result<Vec<T>, String> {
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.map_err(|error| error.to_string())??);
    }
    Ok(all)
}

fn voter(name: &str) -> Voter {
    Voter {
        node: name.into(),
        address: format!("{name}:1"),
    }
}

impl Scenario {
    pub(super) fn new(world: &Arc<World>) -> Self {
        Self {
            world: world.clone(),
            options: RaftOptions::default(),
            run: Run::default(),
            served: BTreeMap::new(),
            next_name: 0,
        }
    }

    fn new_computer(&mut self) -> String {
        let name = format!("n{}", self.next_name);
        self.next_name += 1;
        self.world.add(&name);
        name
    }

    pub(super) async fn begin(&mut self) -> Result<(), String> {
        let first = self.new_computer();
        let found = IfAbsent::Found(voter(&first));
        self.world.boot(&first, found, self.options.clone()).await
    }

    /// The voter that serves, if one does.
    pub(super) fn leader(&self) -> Option<Process> {
        let mut all = self.world.processes();
        all.retain(|process| process.store.is_serving());
        // A leader that was cut off may not know yet that it leads no more.
        all.into_iter().max_by_key(|it| it.store.status().term)
    }

    /// Notes which voters serve; at most one in a term.
    pub(super) fn look(&mut self) -> Result<(), String> {
        for process in self.world.processes() {
            let status = process.store.status();
            if let Some(reason) = process.store.stopped() {
                let name = process.name();
                self.world.detail(|| format!("{name} stopped: {reason}"));
                if !reason.contains(DEPOSED) && !self.world.was_full(&name) {
                    return Err(format!("{name} stopped: {reason}"));
                }
            }
            if !process.store.is_serving() || status.leader != Some(status.id) {
                continue;
            }
            let name = format!("{} voter {}", process.name(), status.id);
            self.world
                .detail(|| format!("{name} serves in term {}", status.term));
            let served = self
                .served
                .entry(status.term)
                .or_insert_with(|| name.clone());
            if *served != name {
                return Err(format!("{served} and {name} serve in term {}", status.term));
            }
        }
        Ok(())
    }

    /// Adds voters until there are so many, each at a new computer, while everything works.
    pub(super) async fn grow(&mut self, voters: usize) -> Result<(), String> {
        let mut group = BTreeSet::from([1]);
        while group.len() < voters {
            let id = self.add_learner().await?;
            group.insert(id);
        }
        self.set_voters(group).await
    }

    /// Adds a computer with a copy without a vote; its number.
    pub(super) async fn add_learner(&mut self) -> Result<u64, String> {
        let name = self.new_computer();
        let begun = Instant::now();
        let mut id = None;
        while begun.elapsed() < CHANGE {
            self.world.sleep_ms(5..20).await;
            let Some(leader) = self.leader() else {
                continue;
            };
            if id.is_none() {
                let Ok(Ok(next)) = tokio::time::timeout(CHANGE, leader.store.next_id()).await
                else {
                    continue;
                };
                let join = IfAbsent::Join(next);
                self.world.boot(&name, join, self.options.clone()).await?;
                id = Some(next);
            }
            let Some(id) = id else { continue };
            let adding = leader.store.add_learner(id, voter(&name));
            if let Ok(Ok(())) = tokio::time::timeout(CHANGE, adding).await {
                return Ok(id);
            }
        }
        Err(format!("{name} did not become a learner in time"))
    }

    async fn set_voters(&self, voters: BTreeSet<u64>) -> Result<(), String> {
        let begun = Instant::now();
        while begun.elapsed() < CHANGE {
            self.world.sleep_ms(5..20).await;
            let Some(leader) = self.leader() else {
                continue;
            };
            let setting = leader.store.set_voters(voters.clone());
            tokio::time::timeout(CHANGE, setting).await.ok();
            let status = leader.store.status();
            if status.voters.keys().eq(voters.iter()) && !status.is_changing {
                self.world.note(|| format!("voters are {voters:?}"));
                return Ok(());
            }
        }
        Err("the voters were not changed in time".into())
    }

    /// A random computer that has a voter or had one.
    pub(super) fn any_voter(&self) -> String {
        let names = self.world.voter_names();
        self.world.pick(&names).unwrap_or_default()
    }

    pub(super) async fn boot(&self, name: &str) -> Result<(), String> {
        if self.world.process(name).is_some() {
            return Ok(());
        }
        let booting = self
            .world
            .boot(name, IfAbsent::Refuse, self.options.clone())
            .await;
        booting.map_err(|error| format!("{name} cannot start: {error}"))
    }

    /// Opens the copies again that stopped by themselves, as their nodes do.
    async fn reopen(&mut self) -> Result<(), String> {
        for process in self.world.processes() {
            let Some(reason) = process.store.stopped() else {
                continue;
            };
            let name = process.name();
            self.world.note(|| format!("{name} is opened again"));
            self.run.deposed += u64::from(reason.contains(DEPOSED));
            self.world.end_process(&name, false);
            self.boot(&name).await?;
        }
        Ok(())
    }

    /// Starts what does not run, and what stopped by itself.
    async fn restart_all(&mut self) -> Result<(), String> {
        self.reopen().await?;
        for name in self.world.voter_names() {
            self.boot(&name).await?;
        }
        Ok(())
    }

    /// Ends all faults, and waits until the store answers and every voter has everything.
    async fn settle(&mut self) -> Result<(), String> {
        self.world.note(|| "the faults stop".into());
        self.world.heal();
        let begun = Instant::now();
        while begun.elapsed() < SETTLE {
            self.world.sleep_ms(20..40).await;
            self.look()?;
            self.restart_all().await?;
            let Some(leader) = self.leader() else {
                continue;
            };
            let reading = tokio::time::timeout(Duration::from_secs(1), leader.store.revision());
            if !matches!(reading.await, Ok(Ok(_))) {
                continue;
            }
            let status = leader.store.status();
            let members = status.voters.keys().chain(status.learners.keys());
            let members: BTreeSet<u64> = members.copied().collect();
            let processes = self.world.processes();
            let behind = processes.iter().filter(|process| {
                let its = process.store.status();
                members.contains(&its.id) && its.applied + 50 < status.applied
            });
            if behind.count() == 0 {
                return Ok(());
            }
        }
        let states: Vec<_> = self.world.processes();
        let states: Vec<_> = states.iter().map(|it| it.store.status()).collect();
        Err(format!("the store does not settle: {states:?}"))
    }

    /// The content of all voters once nothing changes any more: equal, or it is an error.
    async fn compare_copies(&mut self) -> Result<Listing, String> {
        let begun = Instant::now();
        let mut differences = String::new();
        while begun.elapsed() < SETTLE {
            self.world.sleep_ms(100..200).await;
            self.look()?;
            self.restart_all().await?;
            let Some(leader) = self.leader() else {
                continue;
            };
            let status = leader.store.status();
            let processes = self.world.processes();
            let members = processes.iter().filter(|process| {
                let id = process.store.id();
                status.voters.contains_key(&id) || status.learners.contains_key(&id)
            });
            let mut contents = Vec::new();
            for process in members {
                if process.store.status().applied == status.applied {
                    let view = &process.store.tasks.leader.view;
                    contents.push(view.list("").map_err(|error| error.to_string())?);
                }
            }
            // What a voter applied is the same as what every other applied up to the same entry,
            // at any time: only those that have the leader's last entry are compared.
            let first = contents.first().cloned();
            if let Some(first) = first
                && contents.len() == status.voters.len() + status.learners.len()
            {
                return match contents.iter().all(|content| *content == first) {
                    true => Ok(first),
                    false => Err(format!("copies differ: {contents:?}")),
                };
            }
            differences = format!("{} copies of {status:?}", contents.len());
        }
        Err(format!("the copies do not become equal: {differences}"))
    }

    fn check(
        &mut self,
        contents: &Listing,
        clients: Vec<Recorded>,
        watches: Vec<Seen>,
        owners: Vec<Vec<Line>>,
    ) -> Result<(), String> {
        let (mut calls, mut acknowledged) = (Vec::new(), BTreeMap::new());
        for recorded in clients {
            calls.extend(recorded.calls);
            acknowledged.extend(recorded.acknowledged);
        }
        // The end is a call too: nothing acknowledged is lost.
        let end = self.world.begun.elapsed();
        calls.push(linearizability::Call {
            op: linearizability::Op::Read(values(&KEYS, &contents.entries)?),
            begin: end,
            end: Some(end),
        });
        self.run.calls = calls.len();
        self.run.unanswered = calls.iter().filter(|call| call.end.is_none()).count();
        linearizability::check(&calls)?;
        let mut seen: BTreeMap<Revision, Vec<Change>> = BTreeMap::new();
        for watch in watches {
            self.run.changes_watched += watch.changes.len();
            let complete = watch.complete_after + 1..=watch.last;
            for (revision, put) in acknowledged.range(complete) {
                let changes = watch.changes.get(revision).map_or(&[][..], Vec::as_slice);
                let has = |key: &str, value: u64| {
                    changes.iter().any(|change| match change {
                        Change::Put(entry) => {
                            entry.key == key && entry.value == value.to_string().as_bytes()
                        }
                        Change::Delete { .. } => false,
                    })
                };
                if !put.iter().all(|(key, value)| has(key, *value)) {
                    return Err(format!(
                        "a watch saw {changes:?} in revision {revision}, not {put:?}"
                    ));
                }
            }
            for (revision, changes) in watch.changes {
                let first = seen.entry(revision).or_insert_with(|| changes.clone());
                if *first != changes {
                    return Err(format!(
                        "watches saw {first:?} and {changes:?} in revision {revision}"
                    ));
                }
            }
        }
        let lines = owners.concat();
        self.run.lines = lines.len();
        self.run.take_overs = owners::check(lines)?.saturating_sub(1);
        self.run.terms = self.served.len() as u64;
        self.run.snapshots_received = self.world.snapshots();
        Ok(())
    }
}
