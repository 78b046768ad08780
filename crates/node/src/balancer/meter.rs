//! Measures this node: what its machines demand, and what it can give. Reads `/proc`
//! and control groups; the kernel's counters rise, and differences of two readings
//! are rates.
//!
//! Of a machine's process only guest threads count as its demand: those that copy it
//! away do so for the node. A thread's demand is the time that it ran and the time
//! that it waited for a core (`/proc/PID/task/TID/schedstat`), also where a quota
//! around the node made it wait. A machine's own limit holds its threads asleep, so
//! what it holds back is in neither.
//!
//! A working set is found by having the kernel forget which pages were touched, and
//! looking later which were touched again (`/proc/PID/clear_refs`, `smaps_rollup`):
//! seldom, and the more so the more memory there is to go through. Pages that the
//! processor still has translations of are missed: some MiB of a machine that touches
//! little else.

use crate::processes::Workers;
use crate::state_dir::StateDir;
use keel_api::PeerTraffic;
use keel_balance::load::{Capacity, Factors, MachineSample, NodeSample, Usage};
use keel_cluster::{MachineName, NodeName};
use keel_machine::cgroup::{Budget, Group, GroupCounts, Pressure};
use keel_machine::guest_memory;
use keel_net::traffic::{self, Traffic};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What disks carry where nothing else is known, in bytes a second.
const IO_BYTES_PER_S: f64 = 1e9;
/// Readings that are nearer than this tell nothing.
const APART_S_MIN: f64 = 0.05;
/// How long touched pages are gathered for a working set; so long again for each GiB
/// that the machine occupies.
const WORKING_SET_SPAN: Duration = Duration::from_secs(60);

/// What was measured.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    /// What the node can give.
    pub(super) capacity: Capacity,
    /// What others than machines use.
    pub(super) base: Factors,
    /// Each process of a machine here, whether the machine runs here or not.
    pub(super) machines: HashMap<MachineName, (Factors, Usage)>,
    /// Shares of time waited, by machines.
    pub(super) cpu_pressure: f64,
    pub(super) stall_pressure: f64,
    /// To and from other nodes.
    pub(super) traffic: Vec<PeerTraffic>,
}

/// What is known of a machine that runs here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Runs {
    /// Limit of its CPU time, in cores.
    pub(super) cores_max: Option<f64>,
    /// Memory that it writes.
    pub(super) dirty_bytes_per_s: f64,
}

impl Measured {
    /// What of it is this node's load. `runs` knows the machines that run here: of others
    /// there is a copy that is not this node's yet, or any more. What such a copy occupies
    /// counts. What its threads did does not, which was before it left: a node would seem
    /// loaded by what it has just given away, and give away more.
    pub(super) fn sample(self, runs: impl Fn(&MachineName) -> Option<Runs>) -> NodeSample {
        let mut base = self.base;
        let mut machines = Vec::with_capacity(self.machines.len());
        for (machine, (mut factors, usage)) in self.machines {
            let Some(runs) = runs(&machine) else {
                base.memory_bytes = base.memory_bytes.saturating_add(factors.memory_bytes);
                continue;
            };
            if let Some(most) = runs.cores_max {
                factors.cpu_cores = factors.cpu_cores.min(most);
                factors.cpu_bound_cores = factors.cpu_bound_cores.min(most);
            }
            factors.dirty_bytes_per_s = runs.dirty_bytes_per_s;
            machines.push(MachineSample {
                name: machine.as_str().into(),
                factors,
                lasted_ms: 0,
                usage,
            });
        }
        machines.sort_by(|one, other| one.name.cmp(&other.name));
        NodeSample {
            capacity: self.capacity,
            base: Factors {
                cpu_bound_cores: 0.0,
                ..base
            },
            machines,
            cpu_pressure: self.cpu_pressure,
            stall_pressure: self.stall_pressure,
        }
    }
}

/// Counters of one thread.
#[derive(Debug, Default, Clone, Copy)]
struct Thread {
    is_guest: bool,
    /// Nanoseconds that it waited for a core.
    waited: u64,
    /// Nanoseconds run, and of guests waited for a core too. What the node itself does
    /// does not weigh more because it waits: a compiling thread of low priority would
    /// else count for a core.
    nanos: u64,
    /// Whether it ran, or waited for a core, when it was looked at.
    runnable: bool,
    /// How often it went to sleep.
    rests: u64,
}

/// Counters of one process.
#[derive(Debug, Default, Clone)]
struct Counters {
    threads: HashMap<u32, Thread>,
    io_bytes: u64,
    /// Microseconds stood still for memory and disks.
    stalled_micros: u64,
    group: GroupCounts,
}

/// Looking for what a process touches.
#[derive(Debug)]
struct Touched {
    since: Instant,
    bytes: Option<u64>,
}

/// Counters of the whole host, in ticks of all cores.
#[derive(Debug, Default, Clone, Copy)]
struct Host {
    busy: u64,
    stolen: u64,
    all: u64,
}

/// Reads and remembers.
pub(super) struct Meter {
    dir: StateDir,
    previous: HashMap<u32, Counters>,
    touched: HashMap<u32, Touched>,
    own: Counters,
    host: Host,
    pressure: Pressure,
    traffic: BTreeMap<NodeName, traffic::Bytes>,
    at: Option<Instant>,
}

impl Meter {
    pub(super) fn new(dir: StateDir) -> Self {
        Meter {
            dir,
            previous: HashMap::new(),
            touched: HashMap::new(),
            own: Counters::default(),
            host: Host::default(),
            pressure: Pressure::default(),
            traffic: BTreeMap::new(),
            at: None,
        }
    }

    /// What happened since the last call; `None` the first time.
    pub(super) fn measure(
        &mut self,
        workers: &Workers,
        parts: &Workers,
        traffic: &Traffic,
        speed: f64,
    ) -> Option<Measured> {
        let now = Instant::now();
        let seconds = self.at.map(|at| now.duration_since(at).as_secs_f64());
        if seconds.is_some_and(|seconds| seconds < APART_S_MIN) {
            return None;
        }
        self.at = Some(now);
        let budget = Budget::read();
        let host = read_host();
        let own = read_process(Path::new("/proc/self"), None);
        let pressure = pressure(workers, &budget);
        let traffic = traffic.so_far();
        let mut counters = HashMap::new();
        let mut residents = Vec::new();
        let mut machines = HashMap::new();
        let mut helpers = Factors::default();
        let mut memory_bytes = 0u64;
        for (machine, pid) in workers.processes() {
            let process = PathBuf::from(format!("/proc/{pid}"));
            let group = Group::load(&self.dir.worker(&machine));
            let now = read_process(&process, group.as_ref());
            let resident = resident_bytes(&process);
            memory_bytes = memory_bytes.saturating_add(resident);
            let touched = self.touched.get(&pid).and_then(|it| it.bytes);
            if let (Some(before), Some(seconds)) = (self.previous.get(&pid), seconds) {
                let (guest, other) = rates(before, &now, seconds);
                helpers.cpu_cores += other.cpu_cores;
                let factors = Factors {
                    memory_bytes: resident,
                    ..guest
                };
                let usage = Usage {
                    working_set_bytes: touched,
                    ..usage(before, &now, seconds)
                };
                machines.insert(machine, (factors, usage));
            }
            counters.insert(pid, now);
            residents.push((pid, resident));
        }
        // Parts of other nodes' machines are load that no round can move.
        for (_, pid) in parts.processes() {
            let now = read_process(&PathBuf::from(format!("/proc/{pid}")), None);
            if let (Some(before), Some(seconds)) = (self.previous.get(&pid), seconds) {
                let (guest, other) = rates(before, &now, seconds);
                helpers.cpu_cores += guest.cpu_cores + other.cpu_cores;
            }
            counters.insert(pid, now);
        }
        let measured = seconds.map(|seconds| {
            let own_rates = rates(&self.own, &own, seconds);
            let own_cores = own_rates.0.cpu_cores + own_rates.1.cpu_cores;
            let guests: f64 = machines.values().map(|(it, _)| it.cpu_cores).sum();
            let cores_of_host = cores_of_host();
            let host_share = host_shares(&self.host, &host);
            // A node that is bounded shares with nobody what it is bounded to.
            let (cores, others) = match budget.cores {
                Some(cores) => (cores.min(cores_of_host), 0.0),
                None => {
                    let ours = own_cores + helpers.cpu_cores + guests;
                    let busy = host_share.0 * cores_of_host;
                    let stolen = host_share.1 * cores_of_host;
                    (cores_of_host - stolen, (busy - ours).max(0.0))
                }
            };
            let traffic = traffic_rates(&self.traffic, &traffic, seconds);
            let network = traffic
                .iter()
                .map(|it| it.sent_bytes_per_s + it.received_bytes_per_s);
            let (capacity_bytes, base_bytes) = memory(&budget, memory_bytes);
            Measured {
                capacity: Capacity {
                    cores: cores.max(0.01),
                    speed,
                    memory_bytes: capacity_bytes,
                    io_bytes_per_s: IO_BYTES_PER_S,
                },
                base: Factors {
                    cpu_cores: own_cores + helpers.cpu_cores + others,
                    memory_bytes: base_bytes,
                    network_bytes_per_s: network.sum(),
                    ..Factors::default()
                },
                machines,
                cpu_pressure: share(self.pressure.cpu_micros, pressure.cpu_micros, seconds),
                stall_pressure: share(self.pressure.memory_micros, pressure.memory_micros, seconds)
                    .max(share(self.pressure.io_micros, pressure.io_micros, seconds)),
                traffic,
            }
        });
        self.look_at_working_sets(&residents);
        self.traffic = traffic;
        self.previous = counters;
        self.own = own;
        self.host = host;
        self.pressure = pressure;
        measured
    }
}

impl Meter {
    /// Looks at what processes touched: of those that are due the one that waits
    /// longest, since it takes as long as there is memory to go through.
    fn look_at_working_sets(&mut self, residents: &[(u32, u64)]) {
        self.touched
            .retain(|pid, _| residents.iter().any(|(it, _)| it == pid));
        let waits = |(pid, resident): &(u32, u64)| {
            let gibs = u32::try_from(resident >> 30).unwrap_or(u32::MAX);
            let span = WORKING_SET_SPAN.saturating_mul(gibs.saturating_add(1));
            let since = self.touched.get(pid).map(|it| it.since.elapsed());
            // One that was never looked at waits longest.
            let late = since.map_or(Some(Duration::MAX), |since| since.checked_sub(span))?;
            Some((late, *pid))
        };
        let Some((_, pid)) = residents.iter().filter_map(waits).max() else {
            return;
        };
        let process = PathBuf::from(format!("/proc/{pid}"));
        let known = self.touched.contains_key(&pid);
        let bytes = known.then(|| referenced_bytes(&process)).flatten();
        // 1: of all pages.
        let forgotten = std::fs::write(process.join("clear_refs"), "1").is_ok();
        let touched = Touched {
            since: Instant::now(),
            bytes: bytes.filter(|_| forgotten),
        };
        self.touched.insert(pid, touched);
    }
}

/// What went to and came from each node that there was anything of.
fn traffic_rates(
    before: &BTreeMap<NodeName, traffic::Bytes>,
    now: &BTreeMap<NodeName, traffic::Bytes>,
    seconds: f64,
) -> Vec<PeerTraffic> {
    let rates = now.iter().map(|(node, now)| {
        let before = before.get(node).copied().unwrap_or_default();
        let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
        PeerTraffic {
            peer: node.to_string(),
            sent_bytes_per_s: rate(before.sent, now.sent),
            received_bytes_per_s: rate(before.received, now.received),
        }
    });
    rates
        .filter(|it| it.sent_bytes_per_s + it.received_bytes_per_s > 0.0)
        .collect()
}

/// Bytes of a process that were touched since the kernel was told to forget it.
fn referenced_bytes(process: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(process.join("smaps_rollup")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Referenced:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib.saturating_mul(1024))
}

/// What else of a process is a rate.
fn usage(before: &Counters, now: &Counters, seconds: f64) -> Usage {
    let rate = |before: Option<u64>, now: Option<u64>| {
        let more = now?.saturating_sub(before?);
        Some(more as f64 / seconds)
    };
    let waited = now.threads.iter().filter(|(_, thread)| thread.is_guest);
    let waited = waited.map(|(tid, thread)| {
        let earlier = before
            .threads
            .get(tid)
            .map_or(thread.waited, |it| it.waited);
        thread.waited.saturating_sub(earlier)
    });
    Usage {
        cpu_waited_cores: waited.sum::<u64>() as f64 / 1e9 / seconds,
        working_set_bytes: None,
        refaults_per_s: rate(before.group.refaults, now.group.refaults),
        io_operations_per_s: rate(before.group.io_operations, now.group.io_operations),
    }
}

/// That of this node's machines; where the kernel keeps it for no group, that of the
/// host, if the host is the node's alone.
fn pressure(workers: &Workers, budget: &Budget) -> Pressure {
    let own = workers.slice().pressure();
    if own.cpu_micros.is_some() || budget.cores.is_some() {
        return own;
    }
    Pressure::of_host()
}

fn share(before: Option<u64>, now: Option<u64>, seconds: f64) -> f64 {
    match (before, now) {
        (Some(before), Some(now)) => {
            (now.saturating_sub(before) as f64 / 1e6 / seconds).clamp(0.0, 1.0)
        }
        _ => 0.0,
    }
}

/// Rates of guests' threads, and of the others.
fn rates(before: &Counters, now: &Counters, seconds: f64) -> (Factors, Factors) {
    let (mut guest, mut other) = (Factors::default(), Factors::default());
    for (tid, thread) in &now.threads {
        let earlier = before.threads.get(tid);
        let since = earlier.map_or(0, |it| it.nanos);
        let cores = thread.nanos.saturating_sub(since) as f64 / 1e9 / seconds;
        let never_rested =
            earlier.is_some_and(|it| it.runnable && thread.runnable && it.rests == thread.rests);
        if !thread.is_guest {
            other.cpu_cores += cores;
        } else if never_rested {
            // Exactly one: the kernel counts waiting only once it is over.
            guest.cpu_cores += 1.0;
            guest.cpu_bound_cores += 1.0;
        } else if earlier.is_some() {
            guest.cpu_cores += cores;
        } else {
            // Of a thread that is younger than the last reading all counts: no more than
            // there was time for.
            guest.cpu_cores += cores.min(1.0);
        }
    }
    guest.io_bytes_per_s = now.io_bytes.saturating_sub(before.io_bytes) as f64 / seconds;
    let stalled = now.stalled_micros.saturating_sub(before.stalled_micros);
    guest.stalled = (stalled as f64 / 1e6 / seconds).clamp(0.0, 1.0);
    (guest, other)
}

fn read_process(process: &Path, group: Option<&Group>) -> Counters {
    let mut counters = Counters::default();
    let tasks = std::fs::read_dir(process.join("task"));
    for task in tasks.into_iter().flatten().flatten() {
        let path = task.path();
        let tid = task.file_name().to_str().and_then(|tid| tid.parse().ok());
        // A thread may end while it is looked at.
        let (Some(tid), Ok(stat)) = (tid, std::fs::read_to_string(path.join("schedstat"))) else {
            continue;
        };
        let (Some((ran, waited)), Ok(status)) = (
            ran_and_waited_nanos(&stat),
            std::fs::read_to_string(path.join("status")),
        ) else {
            continue;
        };
        let word = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim()
        };
        let is_guest = word("Name:").starts_with("guest-");
        let thread = Thread {
            is_guest,
            waited,
            nanos: if is_guest {
                ran.saturating_add(waited)
            } else {
                ran
            },
            runnable: word("State:").starts_with('R'),
            rests: field(&status, "voluntary_ctxt_switches:"),
        };
        counters.threads.insert(tid, thread);
    }
    if let Ok(io) = std::fs::read_to_string(process.join("io")) {
        counters.io_bytes = field(&io, "read_bytes:") + field(&io, "write_bytes:");
    }
    if let Some(group) = group {
        let pressure = group.pressure();
        let stalled = [pressure.memory_micros, pressure.io_micros];
        counters.stalled_micros = stalled.into_iter().flatten().max().unwrap_or(0);
        counters.group = group.counts();
    }
    counters
}

/// Nanoseconds run and waited: `RUN WAITED SLICES`.
fn ran_and_waited_nanos(schedstat: &str) -> Option<(u64, u64)> {
    let mut words = schedstat.split_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .unwrap_or(0)
}

/// What a process occupies. Of a machine's memory all that is there counts, not only what is
/// in the process's page table.
fn resident_bytes(process: &Path) -> u64 {
    let mapped = mapped_bytes(process);
    let Some(memory) = guest_memory::bytes_of_process(process) else {
        return mapped;
    };
    let status = std::fs::read_to_string(process.join("status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| {
        let rest = line.strip_prefix("RssShmem:")?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    });
    let shared = kib.unwrap_or(0).saturating_mul(1024);
    mapped.saturating_sub(shared).saturating_add(memory)
}

fn mapped_bytes(process: &Path) -> u64 {
    let statm = std::fs::read_to_string(process.join("statm")).unwrap_or_default();
    let pages: u64 = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or(0);
    pages.saturating_mul(rustix::param::page_size() as u64)
}

fn cores_of_host() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64)
}

fn read_host() -> Host {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    parse_host(&text).unwrap_or_default()
}

/// `cpu  user nice system idle iowait irq softirq steal guest guest_nice`
fn parse_host(text: &str) -> Option<Host> {
    let line = text.lines().find(|line| line.starts_with("cpu "))?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .map_while(|word| word.parse().ok())
        .collect();
    // What guests of KVM ran is in `user` already.
    let all: u64 = ticks.iter().take(8).sum();
    let idle = ticks.get(3)? + ticks.get(4)?;
    let stolen = ticks.get(7).copied().unwrap_or(0);
    Some(Host {
        busy: all - idle - stolen,
        stolen,
        all,
    })
}

/// Shares of all cores' time that were busy, and stolen by the host of this host.
fn host_shares(before: &Host, now: &Host) -> (f64, f64) {
    let all = now.all.saturating_sub(before.all);
    if all == 0 {
        return (0.0, 0.0);
    }
    let share = |before: u64, now: u64| now.saturating_sub(before) as f64 / all as f64;
    (
        share(before.busy, now.busy),
        share(before.stolen, now.stolen),
    )
}

/// Memory that the node has, and what of it others than machines occupy.
fn memory(budget: &Budget, machines_bytes: u64) -> (u64, u64) {
    let total = crate::host::memory_bytes();
    match budget.memory_bytes {
        Some(limit) if limit < total => (limit, resident_bytes(Path::new("/proc/self"))),
        _ => {
            let used = total.saturating_sub(crate::host::memory_available_bytes());
            (total, used.saturating_sub(machines_bytes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(is_guest: bool, nanos: u64, rests: u64) -> Thread {
        Thread {
            is_guest,
            waited: nanos / 2,
            nanos,
            runnable: true,
            rests,
        }
    }

    fn counters(threads: &[(u32, Thread)]) -> Counters {
        Counters {
            threads: threads.iter().copied().collect(),
            ..Counters::default()
        }
    }

    #[test]
    fn waiting_is_demand_and_copying_is_not_the_guests() {
        let second = 1_000_000_000;
        let before = counters(&[
            (1, thread(true, 5 * second, 7)),
            (2, thread(false, 0, 0)),
            (3, thread(true, 0, 0)),
        ]);
        let now = counters(&[
            // Waits since a while, which the kernel has not counted yet.
            (1, thread(true, 5 * second + second / 3, 7)),
            (2, thread(false, second / 2, 0)),
            (3, thread(true, second / 4, 1)),
            // Began meanwhile.
            (4, thread(true, second / 4, 0)),
        ]);
        let (guest, other) = rates(&before, &now, 1.0);
        assert_eq!(guest.cpu_cores, 1.5);
        assert_eq!(guest.cpu_bound_cores, 1.0);
        assert_eq!(other.cpu_cores, 0.5);
        // (Half of each is waiting here.)
        let waited = usage(&before, &now, 1.0).cpu_waited_cores;
        assert!((waited - 1.0 / 6.0 - 1.0 / 8.0).abs() < 1e-6, "{waited}");
        assert_eq!(ran_and_waited_nanos("300 700 5\n"), Some((300, 700)));
        assert_eq!(ran_and_waited_nanos(""), None);
    }

    #[test]
    fn what_has_left_is_no_load_of_what_it_left() {
        let factors = |cpu_cores| Factors {
            cpu_cores,
            cpu_bound_cores: cpu_cores,
            memory_bytes: 64 << 20,
            ..Factors::default()
        };
        let name = |name: &str| MachineName::new(name).unwrap();
        let machines = [("here", 3.0), ("gone", 0.8)];
        let machines = machines.map(|(it, cores)| (name(it), (factors(cores), Usage::default())));
        let measured = Measured {
            capacity: Capacity {
                cores: 0.4,
                speed: 1.0,
                memory_bytes: 1 << 30,
                io_bytes_per_s: 1e9,
            },
            base: Factors {
                memory_bytes: 0,
                ..factors(0.05)
            },
            machines: machines.into(),
            cpu_pressure: 0.0,
            stall_pressure: 0.0,
            traffic: Vec::new(),
        };
        let sample = measured.sample(|machine| {
            (machine.as_str() == "here").then_some(Runs {
                cores_max: Some(1.0),
                dirty_bytes_per_s: 5.0,
            })
        });
        // Its process had run for a part of the time that was measured.
        assert_eq!(sample.base.cpu_cores, 0.05);
        assert_eq!(sample.base.memory_bytes, 64 << 20);
        let [here] = &sample.machines[..] else {
            panic!("{sample:?}");
        };
        assert_eq!((&*here.name, here.factors.cpu_cores), ("here", 1.0));
        assert_eq!(here.factors.dirty_bytes_per_s, 5.0);
    }

    #[test]
    fn a_thread_that_burns_here_is_seen_to() {
        let burner = std::thread::Builder::new()
            .name("guest-1".into())
            .spawn(|| {
                let end = Instant::now() + std::time::Duration::from_millis(400);
                while Instant::now() < end {
                    std::hint::spin_loop();
                }
            })
            .unwrap();
        let own = Path::new("/proc/self");
        let before = read_process(own, None);
        let at = Instant::now();
        std::thread::sleep(std::time::Duration::from_millis(200));
        let now = read_process(own, None);
        let (guest, _) = rates(&before, &now, at.elapsed().as_secs_f64());
        burner.join().unwrap();
        // Run or waited for: however busy the host is.
        assert!(guest.cpu_cores > 0.5, "{guest:?}");
        assert!(resident_bytes(own) > 1 << 20);
        // A machine's memory counts as soon as something is in it, used or not.
        let before = mapped_bytes(own);
        let memory = guest_memory::GuestMemory::new(512, Some(512), false, 64 << 20).unwrap();
        memory.write(0, &vec![1; 24 << 20]).unwrap();
        assert_eq!(guest_memory::bytes_of_process(own), Some(24 << 20));
        let whole = resident_bytes(own);
        assert!(
            whole >= 24 << 20 && whole >= before / 2 + (24 << 20),
            "{whole}, {before}"
        );
        drop(memory);
        assert_eq!(guest_memory::bytes_of_process(own), None);
    }

    #[test]
    fn what_was_touched_is_seen() {
        let mut held = vec![1u8; 128 << 20];
        let own = Path::new("/proc/self");
        if std::fs::write("/proc/self/clear_refs", "1").is_err() {
            println!("skipped: /proc/self/clear_refs cannot be written here");
            return;
        }
        for at in (0..64 << 20).step_by(4096) {
            held[at] = 2;
        }
        let touched = referenced_bytes(own).expect("the kernel tells");
        std::hint::black_box(&held);
        // (Other tests run in processes of their own. What the processor still had a
        // translation of, some MiB, is not seen to be touched again.)
        assert!((48 << 20..96 << 20).contains(&touched), "{touched}");
    }

    #[test]
    fn the_hosts_counters_are_read() {
        let before = parse_host("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1\n").unwrap();
        let now = parse_host("cpu  150 0 100 730 100 0 0 20 50 0\n").unwrap();
        assert_eq!(host_shares(&before, &now), (0.5, 0.2));
        assert!(parse_host("nothing").is_none());
        assert_eq!(host_shares(&now, &now), (0.0, 0.0));
        assert!(read_host().all > 0);
    }
}
