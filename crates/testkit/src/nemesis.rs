//! The nemesis: machines move and are checkpointed while faults are injected, at random but from a
//! seed. After each round all faults are repaired. Then every machine must run on one node and
//! continue to write; its file must be what one copy would have written. It may have rewound to a
//! checkpoint only if its own process was killed, or, with high availability, if its node could not
//! renew its lease: a killed agent is no reason. What a reader saw of a machine with protected output
//! has never rewound. Meanwhile users start other machines and change these (`commands`), and how
//! long all stands still is measured (`outages`).

mod commands;
mod fault;
mod outages;
mod tally;

use crate::disk::SmallDisk;
use crate::network::Network;
use crate::reader::Reader;
use crate::wall_clock::WallClocks;
use crate::witness::{Evidence, examine};
use crate::{Guest, LocalCluster, wait_for};
use anyhow::{Context, Result, ensure};
use commands::Commands;
use fault::Fault;
use keel_api::{
    AuthorityInfo, CheckpointRequest, MachineInfo, MoveRequest, Nothing, StoreInfo, Urgency,
    VotersRequest,
};
use keel_machine::failpoint::{ALL, Action, Injection};
use keel_machine::high_availability::{Fence, HighAvailability, Protect};
use keel_machine::moves::Ending;
use keel_machine::restart_policy::Restart;
use outages::Outages;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
pub use tally::Tally;

/// The nodes; three of them hold the store.
pub const NODES: [&str; 4] = ["a", "b", "c", "d"];
/// Words for faults that may be left out: those of links, full disks, wrong clocks, lost packets.
pub const WITHOUT: [&str; 4] = ["links", "disks", "clocks", "losses"];
/// Name and memory in MiB of each machine, and how it is kept.
const MACHINES: [(&str, u32, Kept); 5] = [
    ("small", 2, Kept::Here),
    ("middle", 16, Kept::Here),
    ("large", 64, Kept::Available),
    ("safe", 8, Kept::Available),
    ("seen", 4, Kept::Protected),
];
/// Time between the lines of a machine, in microseconds.
const PAUSE_US: u32 = 2000;
/// The interval of checkpoints of machines with high availability.
const INTERVAL_MS: u64 = 1000;
/// Lines that the loss of a node alone may undo: those of two intervals, since none is made while a
/// machine moves, and the first after a move has everything.
const UNDONE_MAX: u64 = 2 * INTERVAL_MS * 1000 / PAUSE_US as u64;
/// Size of the disk of each node, in MiB.
const DISK_MIB: u32 = 512;
/// The failpoints that delay a commit and lose its answer.
const DOUBT: [(&str, &str); 2] = [("move.commit", "delay(400)"), ("move.committed", "error")];
/// Share of rounds in which a user starts another machine, and of those with a change of one.
const COMMAND_SHARE: f64 = 0.3;
/// The longest time for which the last node stays off after all lost power: longer than the others
/// wait for it before its machines begin elsewhere.
const LAST_OFF_MAX: Duration = Duration::from_secs(15);
/// Share of rounds in which the cluster's authority is to be replaced; one takes some ten seconds.
const ROTATION_SHARE: f64 = 0.05;
/// The longest duration of a fault: less than the time after which a worker counts as lost.
const BROKEN_MAX: Duration = Duration::from_secs(4);
/// The most by which a wall clock is wrong.
const CLOCK_MAX: Duration = Duration::from_secs(2 * 86_400);
/// Time limit of a request.
const REQUEST_PATIENCE: Duration = Duration::from_secs(40);

/// What the failure of a machine's node may do to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// It waits for its node.
    Here,
    /// It continues elsewhere, from its checkpoint.
    Available,
    /// As that, and nothing that was read of its output is undone.
    Protected,
}

impl Kept {
    fn high_availability(self) -> Option<HighAvailability> {
        let of = |checkpoint_every_ms, fence, protect| {
            Some(HighAvailability {
                checkpoint_every_ms,
                fence,
                protect,
                ..HighAvailability::default()
            })
        };
        match self {
            Kept::Here => None,
            Kept::Available => of(INTERVAL_MS, Fence::Timer, Protect::None),
            Kept::Protected => of(100, Fence::None, Protect::Output),
        }
    }
}

/// A cluster, its machines, and the faults.
#[derive(Debug)]
pub struct Nemesis {
    cluster: LocalCluster,
    /// Folder of each node, where a file system of its own may be mounted.
    disks: BTreeMap<&'static str, SmallDisk>,
    /// Faults that cannot be injected here, by the word of [`WITHOUT`].
    without: Vec<String>,
    shared: PathBuf,
    module: Arc<[u8]>,
    commands: Commands,
    outages: Outages,
    random: StdRng,
    told: Vec<Evidence>,
    /// Last known node of each machine.
    owners: Vec<String>,
    /// Those of machines with protected output.
    _readers: Vec<Reader>,
    /// Counters of the run.
    pub tally: Arc<Tally>,
}

impl Nemesis {
    /// Starts nodes and machines below a folder, every node in a network namespace of its own.
    /// `without` names the faults that are left out, by words of [`WITHOUT`].
    ///
    /// # Errors
    /// A fault that is not left out cannot be injected here: what it needs. The log of a node that
    /// did not start.
    pub async fn start(
        program: &Path,
        witness: &Path,
        folder: &Path,
        without: Vec<String>,
        seed: u64,
    ) -> Result<Self> {
        let has = |fault: &str| !without.iter().any(|it| it == fault);
        let leave_out =
            |fault: &str| format!("this needs what is missing here (--without {fault})");
        let network = match has(WITHOUT[0]) {
            true => Some(Network::new(&NODES).with_context(|| leave_out(WITHOUT[0]))?),
            false => None,
        };
        let mut disks = BTreeMap::new();
        for node in NODES.into_iter().filter(|_| has(WITHOUT[1])) {
            let disk = SmallDisk::mount(&folder.join(node), DISK_MIB);
            disks.insert(node, disk.with_context(|| leave_out(WITHOUT[1]))?);
        }
        let clocks = match has(WITHOUT[2]) {
            true => {
                let clocks = WallClocks::new(&folder.join("clocks"));
                Some(clocks.with_context(|| leave_out(WITHOUT[2]))?)
            }
            false => None,
        };
        let cluster =
            LocalCluster::start_to_be_broken(program, folder, &NODES, network, clocks).await?;
        // Nothing is lost yet, so this tries only whether it can be.
        if let Some(network) = cluster.network().filter(|_| has(WITHOUT[3])) {
            let tried = network.lose(NODES[0], None);
            tried.with_context(|| leave_out(WITHOUT[3]))?;
        }
        let shared = folder.join("shared");
        std::fs::create_dir_all(&shared)?;
        let module: Arc<[u8]> = std::fs::read(witness)?.into();
        let mut readers = Vec::new();
        for (number, (name, mib, kept)) in MACHINES.iter().enumerate() {
            let file = shared.join(format!("{name}.lines"));
            // What it writes to a file is seen at once; its output is what a reader gets.
            let is_read = *kept == Kept::Protected;
            let path = match is_read {
                true => "-".to_owned(),
                false => file.display().to_string(),
            };
            let (mib, pause) = (mib.to_string(), PAUSE_US.to_string());
            let args = [path.as_str(), mib.as_str(), pause.as_str()];
            let mut guest = Guest::new(name, NODES[number % NODES.len()], &module, &args);
            guest.volume = (!is_read).then_some(&shared);
            guest.restart = Restart::OnFailure;
            guest.ha = kept.high_availability();
            cluster.run(&guest).await?;
            if is_read {
                let clients = NODES.iter().map(|node| cluster.client(node)).collect();
                readers.push(Reader::begin(clients, name, &file)?);
            }
        }
        let kept = MACHINES.iter().filter(|(_, _, kept)| *kept != Kept::Here);
        let files = kept.map(|(name, ..)| shared.join(format!("{name}.lines")));
        let outages = Outages::begin(&cluster, &NODES, files.collect());
        let mut nemesis = Nemesis {
            cluster,
            disks,
            without,
            shared,
            module,
            commands: Commands::default(),
            outages,
            random: StdRng::seed_from_u64(seed),
            told: vec![Evidence::default(); MACHINES.len()],
            owners: vec![String::new(); MACHINES.len()],
            _readers: readers,
            tally: Arc::default(),
        };
        nemesis.wait_all_running().await?;
        for (name, _, kept) in MACHINES {
            match kept {
                Kept::Available | Kept::Protected => nemesis.wait_in_sync(name).await?,
                Kept::Here => nemesis.checkpoint(name).await?,
            }
        }
        nemesis.outages.take();
        Ok(nemesis)
    }

    async fn checkpoint(&self, machine: &str) -> Result<()> {
        let request = CheckpointRequest {
            to: Some(self.shared.join("repository").display().to_string()),
            keep: Some(2),
            ..CheckpointRequest::default()
        };
        let path = format!("/v1/machines/{machine}/checkpoints");
        let _: keel_api::CheckpointInfo =
            self.cluster.client(NODES[0]).post(&path, &request).await?;
        Ok(())
    }

    /// Waits until another node has a machine's checkpoint.
    async fn wait_in_sync(&self, machine: &str) -> Result<()> {
        wait_for(
            &format!("another node has {machine}'s checkpoint"),
            || async {
                let info = self.cluster.inspect(NODES[0], machine).await.ok()?;
                (info.in_sync.len() > 1).then_some(())
            },
        )
        .await
    }

    fn evidence(&self, machine: &str) -> Result<Evidence> {
        let text = std::fs::read_to_string(self.shared.join(format!("{machine}.lines")))?;
        examine(&text).with_context(|| format!("machine {machine}"))
    }

    /// Waits until each machine runs on one node and has written more.
    async fn wait_all_running(&mut self) -> Result<()> {
        for (number, (name, ..)) in MACHINES.iter().enumerate() {
            let lines = self.told[number].lines;
            let cluster = &self.cluster;
            let inspect = || async { cluster.inspect(NODES[0], name).await.ok() };
            let runs = wait_for(&format!("{name} continues"), || async {
                let info: MachineInfo = inspect().await?;
                let one = NODES.iter().all(|node| {
                    let expected = usize::from(*node == info.node);
                    cluster.workers_of(node, name) == expected
                });
                let more = self.evidence(name).is_ok_and(|told| told.lines > lines + 1);
                (info.status == "running" && one && more).then_some(info.node)
            })
            .await;
            match runs {
                Ok(owner) => self.owners[number] = owner,
                Err(error) => {
                    // The content of its file explains more than the time-out.
                    self.evidence(name)?;
                    let info = inspect().await.map(|info| MachineInfo {
                        moves: Vec::new(),
                        ..info
                    });
                    return Err(error.context(format!("{info:?}")));
                }
            }
        }
        Ok(())
    }

    fn some_node(&mut self) -> String {
        NODES
            .choose(&mut self.random)
            .copied()
            .unwrap_or_default()
            .to_owned()
    }

    /// A node other than that of a machine.
    fn elsewhere(&mut self, machine: &str) -> String {
        let number = MACHINES.iter().position(|(name, ..)| *name == machine);
        let owner = number.map_or("", |number| self.owners[number].as_str());
        let others: Vec<&str> = NODES.iter().copied().filter(|it| *it != owner).collect();
        let some = others.choose(&mut self.random).copied();
        some.unwrap_or_default().to_owned()
    }

    /// Last known node of a machine.
    fn owner(&self, machine: &str) -> String {
        let number = MACHINES.iter().position(|(name, ..)| *name == machine);
        number.map_or_else(String::new, |number| self.owners[number].clone())
    }

    /// Kills the source's worker as soon as a commit is delayed there.
    async fn kill_in_doubt(&self, node: &str, machine: &str, passed: usize) {
        let held = async {
            loop {
                let names = self.cluster.failpoints_passed(node);
                if names.iter().skip(passed).any(|it| it == DOUBT[0].0) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        // A move that did not get this far has no doubt.
        if tokio::time::timeout(BROKEN_MAX, held).await.is_ok() {
            drop(self.cluster.kill_worker(node, machine));
        }
    }

    fn some_machine(&mut self) -> &'static str {
        MACHINES
            .choose(&mut self.random)
            .map_or("", |(name, ..)| name)
    }

    /// The node that leads the store, if one is known.
    async fn leader(&self) -> Option<String> {
        let ask = async |node: &str| {
            let client = self.cluster.client(node);
            let asked = client.get::<StoreInfo>("/v1/store");
            let info = tokio::time::timeout(BROKEN_MAX, asked).await.ok()?.ok()?;
            let leader = info.voters.into_iter().find(|voter| voter.leads)?;
            Some(leader.node)
        };
        ask(NODES[0]).await
    }

    fn has(&self, fault: &str) -> bool {
        !self.without.iter().any(|it| it == fault)
    }

    fn some_fault(&mut self, leader: Option<&str>) -> Fault {
        let node = match leader {
            Some(leader) if self.random.random_bool(0.3) => leader.to_owned(),
            _ => self.some_node(),
        };
        let machine = self.some_machine();
        let linked = self.cluster.network().is_some();
        let disks = self.disks.len() == NODES.len();
        match self.random.random_range(0..134) {
            118..126 if linked && self.has(WITHOUT[3]) => {
                Fault::LossyLink(node, self.random.random_range(1..40))
            }
            126..134 if self.cluster.clocks().is_some() => {
                let most = CLOCK_MAX.as_secs() as i64;
                Fault::Clock(node, self.random.random_range(-most..most))
            }
            114..116 => {
                let mut order = NODES;
                order.shuffle(&mut self.random);
                Fault::AllOff(order)
            }
            116..118 => Fault::FewerVoters(node),
            100..106 if disks => Fault::FullDisk(node),
            106..114 if linked => Fault::SlowLink(node, self.random.random_range(2..60)),
            0..45 => {
                let failpoint = ALL.choose(&mut self.random);
                let name = failpoint.map_or("", |failpoint| failpoint.name);
                let (ms, pass) = (
                    self.random.random_range(1..1500),
                    self.random.random_range(0..2),
                );
                let action = match self.random.random_range(0..4) {
                    0 => Action::Kill,
                    1 => Action::Stop,
                    2 => Action::Error,
                    _ => Action::Delay(Duration::from_millis(ms)),
                };
                let order = Injection {
                    action,
                    skip: pass,
                    always: false,
                };
                Fault::Failpoint(node, name, order)
            }
            45..60 => Fault::KillAgent(node),
            60..63 => Fault::KillWorker(node, machine),
            63..66 => Fault::KillInDoubt(self.owner(machine), machine),
            66..74 => Fault::StopAgent(node),
            74..84 => Fault::StopWorker(node, machine),
            84..87 => Fault::PowerOff(node),
            87..94 if linked => Fault::Cut(node),
            94..100 if linked => {
                let others: Vec<&str> = NODES.iter().copied().filter(|it| *it != node).collect();
                let to = others.choose(&mut self.random).copied().unwrap_or_default();
                Fault::CutOneWay(node, to.to_owned())
            }
            _ => Fault::KillAgent(node),
        }
    }

    /// Injects a fault, if its object exists.
    async fn inject(&mut self, fault: &Fault) {
        match fault {
            Fault::Nothing => {}
            Fault::Failpoint(node, name, order) => {
                let order = order.to_string();
                drop(self.cluster.failpoint(node, name, Some(&order)).await);
            }
            Fault::KillAgent(node) => drop(self.cluster.kill_agent(node)),
            Fault::KillWorker(node, machine) => drop(self.cluster.kill_worker(node, machine)),
            Fault::KillInDoubt(node, _) => {
                for (name, order) in DOUBT {
                    drop(self.cluster.failpoint(node, name, Some(order)).await);
                }
            }
            Fault::StopAgent(node) => drop(self.cluster.stop_agent(node, true)),
            Fault::StopWorker(node, machine) => {
                drop(self.cluster.stop_worker(node, machine, true));
            }
            Fault::PowerOff(node) => self.cluster.power_off(node),
            Fault::AllOff(_) => {
                for node in NODES {
                    self.cluster.power_off(node);
                }
            }
            Fault::FewerVoters(node) => {
                self.set_voters("1").await;
                // In the middle of it.
                self.cluster.power_off(node);
            }
            Fault::Cut(node) => self.cut(|network| network.cut(node, true)),
            Fault::CutOneWay(from, to) => {
                self.cut(|network| network.cut_one_way(from, to, true));
            }
            Fault::FullDisk(node) => self.disk(node, SmallDisk::fill),
            Fault::SlowLink(node, mbit) => {
                self.cut(|network| network.slow(node, Some(*mbit)));
            }
            Fault::LossyLink(node, percent) => {
                let share = f64::from(*percent) / 100.0;
                self.cut(|network| network.lose(node, Some(share)));
            }
            Fault::Clock(node, seconds) => self.set_clock(node, *seconds),
        }
    }

    fn set_clock(&self, node: &str, ahead_s: i64) {
        if let Some(clocks) = self.cluster.clocks()
            && let Err(error) = clocks.set(node, ahead_s)
        {
            eprintln!("the clock of {node}: {error:#}");
        }
    }

    async fn set_voters(&self, count: &str) {
        let request = VotersRequest {
            count: count.to_owned(),
        };
        let client = self.cluster.client(NODES[0]);
        let asked: Result<StoreInfo, _> = client.post("/v1/store/voters", &request).await;
        if let Err(error) = asked {
            eprintln!("{count} voters: {error}");
        }
    }

    fn disk(&self, node: &str, change: impl FnOnce(&SmallDisk) -> Result<()>) {
        if let Some(disk) = self.disks.get(node)
            && let Err(error) = change(disk)
        {
            eprintln!("the disk of {node}: {error:#}");
        }
    }

    /// Leaves the nodes' disks mounted for inspection.
    pub fn keep_disks(&mut self) {
        for (_, disk) in std::mem::take(&mut self.disks) {
            disk.keep();
        }
    }

    fn cut(&self, change: impl FnOnce(&Network) -> Result<()>) {
        if let Some(network) = self.cluster.network()
            && let Err(error) = change(network)
        {
            eprintln!("{error:#}");
        }
    }

    async fn repair(&mut self, fault: &Fault) -> Result<()> {
        match fault {
            Fault::Nothing | Fault::KillAgent(_) | Fault::KillWorker(..) => {}
            Fault::Failpoint(node, name, _) => {
                let cluster = &self.cluster;
                wait_for(&format!("{node} forgets {name}"), || async {
                    cluster.wake(node);
                    cluster.failpoint(node, name, None).await.ok()
                })
                .await?;
            }
            Fault::KillInDoubt(node, _) => {
                for (name, _) in DOUBT {
                    let cluster = &self.cluster;
                    wait_for(&format!("{node} forgets {name}"), || async {
                        cluster.failpoint(node, name, None).await.ok()
                    })
                    .await?;
                }
            }
            Fault::StopAgent(node) | Fault::StopWorker(node, _) => self.cluster.wake(node),
            Fault::PowerOff(node) => self.cluster.power_on(node).await?,
            Fault::AllOff([others @ .., last]) => {
                self.cluster.power_on_all(others).await?;
                let most = LAST_OFF_MAX.as_millis() as u64;
                let ms = self.random.random_range(0..most);
                tokio::time::sleep(Duration::from_millis(ms)).await;
                self.cluster.power_on(last).await?;
            }
            Fault::FewerVoters(node) => {
                self.cluster.power_on(node).await?;
                self.set_voters("auto").await;
                // While new voters get their copies.
                let killed = self.some_node();
                drop(self.cluster.kill_agent(&killed));
                self.cluster.wait_voters(NODES[0], 3).await?;
            }
            Fault::Cut(node) => self.cut(|network| network.cut(node, false)),
            Fault::CutOneWay(from, to) => {
                self.cut(|network| network.cut_one_way(from, to, false));
            }
            Fault::FullDisk(node) => self.disk(node, SmallDisk::free),
            Fault::SlowLink(node, _) => self.cut(|network| network.slow(node, None)),
            Fault::LossyLink(node, _) => self.cut(|network| network.lose(node, None)),
            Fault::Clock(node, _) => self.set_clock(node, 0),
        }
        Ok(())
    }

    /// Runs one round; returns a description.
    ///
    /// # Errors
    /// The violated condition.
    pub async fn round(&mut self) -> Result<String> {
        let leader = self.leader().await;
        let fault = match self.random.random_bool(0.5) {
            true => self.some_fault(leader.as_deref()),
            false => Fault::Nothing,
        };
        let disturbed = !matches!(fault, Fault::Nothing);
        // In both orders: failpoints wait for later operations, a kill may come at any time during
        // them.
        let waits = matches!(fault, Fault::Failpoint(..) | Fault::KillInDoubt(..));
        let first = self.random.random_bool(0.5) || waits;
        let passed = match &fault {
            Fault::KillInDoubt(node, _) => self.cluster.failpoints_passed(node).len(),
            _ => 0,
        };
        let wait = Duration::from_millis(self.random.random_range(0..120));
        if first {
            self.inject(&fault).await;
        }
        let mut what = Vec::new();
        let mut tasks = tokio::task::JoinSet::new();
        let mut busy = BTreeSet::new();
        for _ in 0..self.random.random_range(1..=2) {
            let machine = match fault {
                Fault::KillInDoubt(_, machine) if busy.is_empty() => machine,
                _ => self.some_machine(),
            };
            if !busy.insert(machine) {
                continue;
            }
            let (via, to) = (self.some_node(), self.elsewhere(machine));
            let client = self.cluster.client(&via);
            let in_doubt = matches!(fault, Fault::KillInDoubt(_, it) if it == machine);
            if self.random.random_bool(0.2) && !in_doubt {
                what.push(format!("checkpoint {machine}"));
                tasks.spawn(checkpoint(
                    client,
                    self.shared.clone(),
                    machine,
                    self.tally.clone(),
                ));
            } else {
                what.push(format!("{machine} to {to} by {via}"));
                self.tally.moves.fetch_add(1, Ordering::Relaxed);
                if disturbed {
                    self.tally.disturbed.fetch_add(1, Ordering::Relaxed);
                }
                let post_copy = self.random.random_bool(0.3);
                let request = MoveRequest {
                    to,
                    post_copy,
                    checkpoint_to: post_copy
                        .then(|| self.shared.join("repository").display().to_string()),
                    urgency: Urgency::Normal,
                    downtime_ms: None,
                };
                tasks.spawn(moved(client, machine, request, self.tally.clone()));
            }
        }
        if self.random.random_bool(COMMAND_SHARE) {
            let (via, on) = (self.some_node(), self.some_node());
            what.push(format!("a short machine on {on} by {via}"));
            let (client, module) = (self.cluster.client(&via), self.module.clone());
            tasks.spawn(self.commands.clone().run(client, on, module));
        }
        if self.random.random_bool(COMMAND_SHARE) {
            let (via, machine) = (self.some_node(), self.some_machine());
            what.push(format!("a change of {machine} by {via}"));
            let client = self.cluster.client(&via);
            tasks.spawn(self.commands.clone().set(client, machine));
        }
        if self.random.random_bool(ROTATION_SHARE) {
            let via = self.some_node();
            what.push(format!("a new authority by {via}"));
            tasks.spawn(rotate(self.cluster.client(&via), self.tally.clone()));
        }
        if !first {
            tokio::time::sleep(wait).await;
            self.inject(&fault).await;
        }
        if let Fault::KillInDoubt(node, machine) = &fault {
            self.kill_in_doubt(node, machine, passed).await;
        }
        if waits {
            // Until it is passed, or no operation passes it any more.
            let all = async { while tasks.join_next().await.is_some() {} };
            let _ = tokio::time::timeout(BROKEN_MAX / 2, all).await;
        } else if disturbed {
            let most = BROKEN_MAX.as_millis() as u64;
            let ms = self.random.random_range(1..most);
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
        self.repair(&fault)
            .await
            .with_context(|| format!("{fault:?}"))?;
        let mended = Instant::now();
        // A machine may run long before a request about it is answered.
        let running = MACHINES
            .iter()
            .map(|(name, ..)| grows(self.shared.join(format!("{name}.lines"))));
        let all = async { while tasks.join_next().await.is_some() {} };
        let (answered, running) = tokio::join!(
            tokio::time::timeout(REQUEST_PATIENCE, all),
            futures::future::join_all(running)
        );
        let recovery = running.into_iter().max().unwrap_or_default();
        let recovery = recovery.as_millis() as u64;
        tasks.abort_all();
        ensure!(
            answered.is_ok(),
            "a request has no answer {REQUEST_PATIENCE:?} after {fault:?} was repaired: {}",
            what.join(", ")
        );
        let before = self.told.clone();
        for (number, (name, ..)) in MACHINES.iter().enumerate() {
            // An incomplete last line is read again below.
            if let Ok(told) = self.evidence(name) {
                self.told[number] = told;
            }
        }
        self.wait_all_running()
            .await
            .with_context(|| format!("after {fault:?}, {}", what.join(", ")))?;
        let settled = mended.elapsed().as_millis() as u64;
        self.commands
            .settle(&self.cluster, NODES[0])
            .await
            .with_context(|| format!("after {fault:?}, {}", what.join(", ")))?;
        let (machine_ms, store_ms) = self.outages.take();
        let (mut rewinds, mut failovers, mut most_repeated) = (0, 0, 0);
        for (number, (name, _, kept)) in MACHINES.iter().enumerate() {
            let told = self.evidence(name)?;
            let back = told.rewinds - before[number].rewinds;
            ensure!(
                back == 0 || *kept != Kept::Protected,
                "what was read of {name} rewound after {fault:?}, {}",
                what.join(", ")
            );
            let is_safe = *kept == Kept::Available;
            ensure!(
                back == 0 || fault.kills_machines() || is_safe && fault.ends_leases(),
                "{name} rewound, although nothing of it was lost, after {fault:?}, {}",
                what.join(", ")
            );
            rewinds += back;
            if *kept == Kept::Available {
                let undone = told.repeated - before[number].repeated;
                ensure!(
                    undone <= back * UNDONE_MAX || !matches!(fault, Fault::PowerOff(_)),
                    "{back} failures of {name} undid {undone} lines, after {fault:?}, {what:?}"
                );
                most_repeated = most_repeated.max(undone);
            }
            if is_safe && fault.ends_leases() {
                failovers += back;
            }
            self.told[number] = told;
        }
        if let Some(tally) = Arc::get_mut(&mut self.tally) {
            tally.rounds += 1;
            tally.rewinds += rewinds;
            tally.failovers += failovers;
            let whose = match fault.node() {
                Some(node) if Some(node) == leader.as_deref() => " (the store's leader)",
                _ => "",
            };
            let kind = format!("{}{whose}", fault.kind());
            let of = tally.faults.entry(kind).or_default();
            of.count += 1;
            of.machine_ms = of.machine_ms.max(machine_ms);
            of.store_ms = of.store_ms.max(store_ms);
            of.most_repeated = of.most_repeated.max(most_repeated);
            tally.recoveries_ms[usize::from(fault.kills_machines())].push(recovery);
        }
        Ok(format!(
            "{fault:?}; {} (all wrote after {recovery} ms, settled after {settled}; longest outage: a machine {machine_ms}, the store {store_ms})",
            what.join(", ")
        ))
    }
}

impl Nemesis {
    /// Waits until the cluster's authority is replaced, if it is.
    ///
    /// # Errors
    /// It is not in time: what it waits for.
    pub async fn wait_rotated(&self) -> Result<()> {
        let client = self.cluster.client(NODES[0]);
        let rotated = wait_for("the authority is replaced", || async {
            client
                .get::<AuthorityInfo>("/v1/authority")
                .await
                .is_ok_and(|info| !info.is_rotating)
                .then_some(())
        });
        if let Err(error) = rotated.await {
            let last = client.get::<AuthorityInfo>("/v1/authority").await;
            return Err(error.context(format!("{last:?}")));
        }
        Ok(())
    }
}

/// Asks for another authority; one may be on its way.
async fn rotate(client: keel_api::Client, tally: Arc<Tally>) {
    let asked = client.post::<_, Nothing>("/v1/authority/rotate", &());
    if asked.await.is_ok() {
        tally.rotations.fetch_add(1, Ordering::Relaxed);
    }
}

/// Time until a file has grown.
async fn grows(path: PathBuf) -> Duration {
    let begun = Instant::now();
    let bytes = || std::fs::metadata(&path).map_or(0, |meta| meta.len());
    let before = bytes();
    while bytes() <= before && begun.elapsed() < REQUEST_PATIENCE {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    begun.elapsed()
}

async fn moved(
    client: keel_api::Client,
    machine: &'static str,
    request: MoveRequest,
    tally: Arc<Tally>,
) {
    let ending = crate::move_as(&client, machine, &request).await;
    let count = match ending.map(|report| report.ending) {
        Ok(Ending::Moved) => &tally.moved,
        Ok(Ending::Stayed { .. }) => &tally.stayed,
        Err(_) => &tally.refused,
    };
    count.fetch_add(1, Ordering::Relaxed);
}

async fn checkpoint(
    client: keel_api::Client,
    shared: PathBuf,
    machine: &'static str,
    tally: Arc<Tally>,
) {
    let request = CheckpointRequest {
        to: Some(shared.join("repository").display().to_string()),
        keep: Some(2),
        ..CheckpointRequest::default()
    };
    let path = format!("/v1/machines/{machine}/checkpoints");
    let made: Result<keel_api::CheckpointInfo, _> = client.post(&path, &request).await;
    if made.is_ok() {
        tally.checkpoints.fetch_add(1, Ordering::Relaxed);
    }
}
