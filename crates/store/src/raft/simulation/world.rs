//! Simulated computers, some with voters on them, and the network between them.
//!
//! Everything is one thread and one clock, which goes on when nothing else can. A computer that
//! *stands still* sends, gets and writes nothing until it goes on; its timers run on. Where the
//! *service* of a computer stands still, requests of clients wait there, and its voter goes on. A process
//! that ended has no more effect on anything, though its tasks may run for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use keel_net::{BoxFuture, Bytes, Reply, RpcError};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use redb::Database;
use tokio::time::Instant;

use super::super::lease_ends::Service;
use super::super::log::{Disk, Log, Opened};
use super::super::network::Transport;
use super::super::open_error::OpenError;
use super::super::snapshot::{SnapshotFile, SnapshotPlace};
use super::super::start::{Host, Loaded, start};
use super::super::{IfAbsent, RaftOptions, RaftStore, Voter};
use super::disk::{OpenDisk, SimulatedDisk};
use crate::clock::Clock;
use crate::encoding::kind::RAFT_SNAPSHOT;

/// A computer, with what survives its processes.
struct Computer {
    disk: SimulatedDisk,
    clock: Clock,
    /// It has a voter, or had one.
    has_voter: bool,
    running: Option<Running>,
    /// It stands still until then.
    still_until: Instant,
    /// Requests of clients wait until then.
    unserved_until: Instant,
}

/// A running voter.
#[derive(Clone)]
struct Running {
    store: Arc<RaftStore>,
    disk: OpenDisk,
}

/// The voter of a computer, for clients: what it says counts while its process runs.
#[derive(Clone)]
pub(super) struct Process {
    pub(super) store: Arc<RaftStore>,
    disk: OpenDisk,
}

impl Process {
    /// Of its computer.
    pub(super) fn name(&self) -> String {
        self.store.folder.display().to_string()
    }

    pub(super) fn runs(&self) -> bool {
        self.disk.is_open()
    }
}

struct State {
    random: StdRng,
    computers: BTreeMap<String, Computer>,
    /// From and to: what is sent is lost.
    cut: BTreeSet<(String, String)>,
    /// Share of messages that are lost.
    loss: f64,
    /// Bounds of the time that messages take, and that disks take, in microseconds.
    message_us: std::ops::Range<u64>,
    disk_us: std::ops::Range<u64>,
    /// Pieces of snapshots that voters got.
    snapshots: usize,
    /// What happened, for whoever looks at one seed.
    trace: Vec<String>,
}

pub(super) struct World {
    state: Mutex<State>,
    pub(super) begun: Instant,
    prints: bool,
}

impl World {
    pub(super) fn new(seed: u64, prints: bool) -> Arc<Self> {
        let state = State {
            random: StdRng::seed_from_u64(seed),
            computers: BTreeMap::new(),
            cut: BTreeSet::new(),
            loss: 0.0,
            message_us: 100..2_000,
            disk_us: 200..4_000,
            snapshots: 0,
            trace: Vec::new(),
        };
        Arc::new(Self {
            state: Mutex::new(state),
            begun: Instant::now(),
            prints,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A random number of the bounds.
    pub(super) fn draw(&self, bounds: std::ops::Range<u64>) -> u64 {
        self.lock().random.random_range(bounds)
    }

    pub(super) fn chance(&self, probability: f64) -> bool {
        self.lock().random.random_bool(probability)
    }

    pub(super) fn pick<T: Clone>(&self, from: &[T]) -> Option<T> {
        match from.len() as u64 {
            0 => None,
            length => Some(from[usize::try_from(self.draw(0..length)).unwrap_or(0)].clone()),
        }
    }

    pub(super) async fn sleep_ms(&self, bounds: std::ops::Range<u64>) {
        tokio::time::sleep(Duration::from_millis(self.draw(bounds))).await;
    }

    pub(super) fn note(&self, what: impl FnOnce() -> String) {
        let line = format!("{:9.3} {}", self.begun.elapsed().as_secs_f64(), what());
        if self.prints {
            println!("{line}");
        }
        self.lock().trace.push(line);
    }

    /// What is too much to be noted of every seed.
    pub(super) fn detail(&self, what: impl FnOnce() -> String) {
        if self.prints {
            println!("{:9.3} {}", self.begun.elapsed().as_secs_f64(), what());
        }
    }

    /// How many pieces of snapshots arrived.
    pub(super) fn snapshots(&self) -> usize {
        self.lock().snapshots
    }

    /// Everything that was noted.
    pub(super) fn trace(&self) -> Vec<String> {
        self.lock().trace.clone()
    }

    /// Adds a computer without a voter. Clocks differ by at most half a per cent from true time.
    pub(super) fn add(&self, name: &str) {
        let mut state = self.lock();
        let clock = Clock::Simulated {
            begun: self.begun,
            rate: state.random.random_range(0.995..1.005),
        };
        let computer = Computer {
            disk: SimulatedDisk::default(),
            clock,
            has_voter: false,
            running: None,
            still_until: self.begun,
            unserved_until: self.begun,
        };
        state.computers.insert(name.into(), computer);
    }

    /// Removes everything: voters have the world, and the world its voters.
    pub(super) fn end(&self) {
        let computers = std::mem::take(&mut self.lock().computers);
        drop(computers);
    }

    /// All computers.
    pub(super) fn names(&self) -> Vec<String> {
        self.lock().computers.keys().cloned().collect()
    }

    /// The computers that have a voter or had one.
    pub(super) fn voter_names(&self) -> Vec<String> {
        let state = self.lock();
        let with_voters = state.computers.iter().filter(|(_, it)| it.has_voter);
        with_voters.map(|(name, _)| name.clone()).collect()
    }

    /// Whether a computer with this name has a process.
    pub(super) fn process(&self, name: &str) -> Option<Process> {
        let state = self.lock();
        let running = state.computers.get(name)?.running.clone()?;
        Some(Process {
            store: running.store,
            disk: running.disk,
        })
    }

    pub(super) fn processes(&self) -> Vec<Process> {
        let names = self.voter_names();
        names.iter().filter_map(|name| self.process(name)).collect()
    }

    /// Starts the voter of a computer, from its disk.
    ///
    /// # Errors
    /// A sentence.
    pub(super) async fn boot(
        self: &Arc<Self>,
        name: &str,
        if_absent: IfAbsent,
        options: RaftOptions,
    ) -> Result<(), String> {
        let (disk, clock, random) = {
            let mut state = self.lock();
            let random = StdRng::seed_from_u64(state.random.random());
            let computer = state.computers.get_mut(name).ok_or("no such computer")?;
            computer.has_voter = true;
            (computer.disk.open(), computer.clock, random)
        };
        let new = match &if_absent {
            IfAbsent::Refuse => None,
            IfAbsent::Found(_) => Some(1),
            IfAbsent::Join(id) => Some(*id),
        };
        let database = Database::builder().create_with_backend(disk.clone());
        let text = |error: OpenError| error.to_string();
        let log = Disk::check(database, new).map_err(text)?;
        let log = log.ok_or("redb found the file of the log damaged")?;
        let file = SnapshotFile::at(Arc::new(Place {
            world: self.clone(),
            computer: name.into(),
            disk: disk.clone(),
        }));
        let saved = file.load().map_err(text)?;
        let opened = Log::of(log, file.saved());
        let loaded = Loaded::new(opened, file, saved, options.store_bytes_max).map_err(text)?;
        let Opened {
            log,
            disk: writer,
            writes,
            id,
            ..
        } = loaded.opened;
        let (world, computer) = (self.clone(), name.to_owned());
        let pause = async move || world.disk_time(&computer).await;
        tokio::spawn(disk.clone().write_all(writer, writes, pause));
        let host = Host {
            transport: Some(Arc::new(Links {
                world: self.clone(),
                from: name.into(),
                disk: disk.clone(),
            })),
            service: Arc::new(Requests {
                world: self.clone(),
                computer: name.into(),
            }),
            clock,
            random,
        };
        let file = loaded.file;
        let content = (file.clone(), loaded.model, loaded.meta);
        let tasks = start(log, id, content, host, options).await?;
        let store = RaftStore {
            tasks,
            folder: PathBuf::from(name),
            file,
            thread: None,
            writer: None,
        };
        store.begin(if_absent).await?;
        let store = Arc::new(store);
        self.note(|| format!("{name} runs voter {id}"));
        let running = Running { store, disk };
        if let Some(computer) = self.lock().computers.get_mut(name) {
            computer.running = Some(running);
        }
        Ok(())
    }

    /// Ends the process of a computer, at once.
    pub(super) fn end_process(&self, name: &str, loses_power: bool) {
        let mut state = self.lock();
        let State {
            random, computers, ..
        } = &mut *state;
        let Some(computer) = computers.get_mut(name) else {
            return;
        };
        computer.disk.end_processes(loses_power, random);
        let Some(running) = computer.running.take() else {
            return;
        };
        // Its tasks have no more effect; they end so that they do not run for ever.
        tokio::spawn(async move { running.store.tasks.leader.raft.shutdown().await });
    }

    pub(super) fn set_full(&self, name: &str, is_full: bool) {
        if let Some(computer) = self.lock().computers.get(name) {
            computer.disk.set_full(is_full);
        }
    }

    /// Whether the process of a computer was refused a write for lack of space.
    pub(super) fn was_full(&self, name: &str) -> bool {
        let state = self.lock();
        let computer = state.computers.get(name);
        computer.is_some_and(|computer| computer.disk.has_refused())
    }

    pub(super) fn clock(&self, name: &str) -> Option<Clock> {
        Some(self.lock().computers.get(name)?.clock)
    }

    pub(super) fn stand_still(&self, name: &str, time: Duration) {
        if let Some(computer) = self.lock().computers.get_mut(name) {
            computer.still_until = Instant::now() + time;
        }
    }

    /// Requests of clients wait at a computer for so long.
    pub(super) fn stop_service(&self, name: &str, time: Duration) {
        if let Some(computer) = self.lock().computers.get_mut(name) {
            computer.unserved_until = Instant::now() + time;
        }
    }

    /// Waits while a computer stands still.
    pub(super) async fn awake(&self, name: &str) {
        self.wait_until(name, |computer| computer.still_until).await;
    }

    /// Waits while a computer or its service stands still.
    pub(super) async fn served(&self, name: &str) {
        self.wait_until(name, |computer| {
            computer.still_until.max(computer.unserved_until)
        })
        .await;
    }

    /// Waits until a time of a computer that may become a later one.
    async fn wait_until(&self, name: &str, until: impl Fn(&Computer) -> Instant) {
        let now_until = || self.lock().computers.get(name).map(&until);
        while let Some(until) = now_until()
            && until > Instant::now()
        {
            tokio::time::sleep_until(until).await;
        }
    }

    /// The time that a disk takes for what comes next, once its computer does not stand still.
    async fn disk_time(&self, name: &str) -> Duration {
        self.awake(name).await;
        let mut state = self.lock();
        let bounds = state.disk_us.clone();
        // A disk that has much to do.
        let is_busy = state.random.random_bool(0.01);
        let time = Duration::from_micros(state.random.random_range(bounds));
        if is_busy { time * 50 } else { time }
    }

    pub(super) fn cut(&self, from: &str, to: &str) {
        self.lock().cut.insert((from.into(), to.into()));
    }

    pub(super) fn set_loss(&self, loss: f64) {
        self.lock().loss = loss;
    }

    /// Bounds of the time that messages and disks take, in microseconds.
    pub(super) fn set_times(
        &self,
        message_us: std::ops::Range<u64>,
        disk_us: std::ops::Range<u64>,
    ) {
        let mut state = self.lock();
        state.message_us = message_us;
        state.disk_us = disk_us;
    }

    /// All links work, and no computer or its service stands still, or has a full disk.
    pub(super) fn heal(&self) {
        let mut state = self.lock();
        state.cut.clear();
        state.loss = 0.0;
        state.message_us = 100..2_000;
        state.disk_us = 200..4_000;
        for computer in state.computers.values_mut() {
            computer.still_until = Instant::now();
            computer.unserved_until = Instant::now();
            computer.disk.set_full(false);
        }
    }

    pub(super) fn restore_links(&self) {
        self.lock().cut.clear();
    }

    /// A message under way; whether it arrives.
    pub(super) async fn travel(&self, from: &str, to: &str) -> bool {
        let (time, is_lost) = {
            let mut state = self.lock();
            let bounds = state.message_us.clone();
            let loss = state.loss;
            let time = Duration::from_micros(state.random.random_range(bounds));
            (time, state.random.random_bool(loss))
        };
        self.awake(from).await;
        tokio::time::sleep(time).await;
        self.awake(to).await;
        let link = (from.to_owned(), to.to_owned());
        !is_lost && !self.lock().cut.contains(&link)
    }
}

/// Where the requests of clients to the voter of a computer are served.
struct Requests {
    world: Arc<World>,
    computer: String,
}

impl Service for Requests {
    fn turn(&self) -> BoxFuture<'static, bool> {
        let (world, computer) = (self.world.clone(), self.computer.clone());
        Box::pin(async move {
            world.served(&computer).await;
            // What waited goes on first.
            tokio::time::sleep(Duration::from_millis(10)).await;
            true
        })
    }
}

/// Where the snapshot of a voter is.
struct Place {
    world: Arc<World>,
    computer: String,
    disk: OpenDisk,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.computer)
    }
}

impl SnapshotPlace for Place {
    fn replace(&self, pieces: &[&[u8]]) -> std::io::Result<()> {
        self.disk.replace_snapshot(pieces)
    }

    fn read(&self) -> std::io::Result<Option<Vec<u8>>> {
        self.disk.snapshot()
    }

    fn run(&self, _is_awaited: bool, work: Box<dyn FnOnce() + Send>) -> BoxFuture<'static, ()> {
        let (world, computer) = (self.world.clone(), self.computer.clone());
        Box::pin(async move {
            tokio::time::sleep(world.disk_time(&computer).await).await;
            work();
        })
    }
}

/// How a voter reaches the others.
struct Links {
    world: Arc<World>,
    from: String,
    disk: OpenDisk,
}

impl Transport for Links {
    fn call(
        &self,
        voter: &Voter,
        kind: u16,
        request: Bytes,
        patience: Duration,
    ) -> BoxFuture<'static, Result<Bytes, RpcError>> {
        let (world, from, disk) = (self.world.clone(), self.from.clone(), self.disk.clone());
        let to = voter.node.clone();
        let peer = to.clone();
        let exchange = async move {
            let lost = std::future::pending::<Result<Bytes, RpcError>>();
            if !disk.is_open() || !world.travel(&from, &to).await {
                return lost.await;
            }
            let Some(target) = world.process(&to) else {
                return Err(RpcError::NotSent {
                    peer: to,
                    reason: "it does not run".into(),
                });
            };
            if kind == RAFT_SNAPSHOT {
                world.lock().snapshots += 1;
            }
            let answer = target.store.answer(kind, &request).await;
            if !target.runs() || !world.travel(&to, &from).await || !disk.is_open() {
                return lost.await;
            }
            match answer? {
                Reply::One(answer) => Ok(answer),
                _ => Err(RpcError::unknown("a stream")),
            }
        };
        // Whoever asks may give up; what is under way arrives all the same.
        let exchange = tokio::spawn(exchange);
        Box::pin(async move {
            match tokio::time::timeout(patience, exchange).await {
                Ok(Ok(answer)) => answer,
                _ => Err(RpcError::Unknown {
                    peer,
                    reason: "no answer in time".into(),
                }),
            }
        })
    }
}
