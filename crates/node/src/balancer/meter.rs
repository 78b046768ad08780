//! Measures this node: the demand of its machines, and its capacity. Reads `/proc` and control
//! groups, whose counters increase; the difference of two readings gives a rate.
//!
//! Only the guest threads of a machine's process count as its demand: threads that copy it to
//! another node count for the node. A thread's demand is its run time plus its run-queue wait
//! (`/proc/PID/task/TID/schedstat`), also if a quota around the node caused the wait. A machine's
//! own limit makes its threads sleep, so throttling by it is in neither.
//!
//! A working set is measured by clearing the kernel's referenced bits and counting the pages with
//! the bit set later (`/proc/PID/clear_refs`, `smaps_rollup`). The larger the memory, the less
//! often this is done. Pages with translations still in the TLB are missed: some MiB of a machine
//! with a small working set.

use crate::processes::Workers;
use crate::state_dir::StateDir;
use keel_api::PeerTraffic;
use keel_balance::load::{Capacity, Factors, MachineSample, NodeSample, Usage};
use keel_cluster::{MachineName, NodeName};
use keel_machine::cgroup::{Budget, Group, GroupCounts, Pressure};
use keel_machine::kind::{GUEST_THREAD_PREFIX, Kinds};
use keel_net::traffic::{self, Traffic};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Assumed disk throughput, in bytes a second, if none is known.
const IO_BYTES_PER_S: f64 = 1e9;
/// The least time between two readings.
const APART_S_MIN: f64 = 0.05;
/// How long referenced pages of a working set are collected; the time is added again for each GiB
/// that the machine occupies.
const WORKING_SET_SPAN: Duration = Duration::from_secs(60);

/// The result of a measurement.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    /// The node's capacity.
    pub(super) capacity: Capacity,
    /// Use by processes that are not machines.
    pub(super) base: Factors,
    /// Each process of a machine here, whether the machine runs here or not.
    pub(super) machines: HashMap<MachineName, (Factors, Usage)>,
    /// Share of time that machines waited.
    pub(super) cpu_pressure: f64,
    pub(super) stall_pressure: f64,
    /// Traffic with other nodes.
    pub(super) traffic: Vec<PeerTraffic>,
}

/// State of a machine that runs here.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunningMachine {
    /// Limit of its CPU time, in cores.
    pub(super) cores_max: Option<f64>,
    /// Bytes a second that it writes.
    pub(super) dirty_bytes_per_s: f64,
}

impl Measured {
    /// The part of the measurement that is this node's load. `runs` returns the machines that run
    /// here. Other processes are copies that do not run here yet or any more: their memory counts,
    /// but not their CPU time, which is from before the move. Otherwise a node would seem loaded
    /// by a machine that it has just moved away, and move more away.
    pub(super) fn sample(
        self,
        runs: impl Fn(&MachineName) -> Option<RunningMachine>,
    ) -> NodeSample {
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
    /// Nanoseconds of run time, for guest threads plus the time that they waited for a core. The
    /// node's own threads do not weigh more because they wait: a low-priority compiling thread
    /// would otherwise count as a core.
    nanos: u64,
    /// Whether it was runnable at the reading.
    runnable: bool,
    /// Number of times that it went to sleep.
    rests: u64,
    /// Whether an earlier reading found it, so that it has had its name for a while.
    is_old: bool,
}

/// Counters of one process.
#[derive(Debug, Default, Clone)]
struct Counters {
    threads: HashMap<u32, Thread>,
    io_bytes: u64,
    /// Microseconds stalled for memory and disks.
    stalled_micros: u64,
    group: GroupCounts,
}

/// The measurement of a working set in progress.
#[derive(Debug)]
struct WorkingSetScan {
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

/// Takes readings and keeps the last one.
pub(super) struct Meter {
    dir: StateDir,
    kinds: Kinds,
    previous: HashMap<u32, Counters>,
    touched: HashMap<u32, WorkingSetScan>,
    own: Counters,
    host: Host,
    pressure: Pressure,
    traffic: BTreeMap<NodeName, traffic::Bytes>,
    at: Option<Instant>,
}

impl Meter {
    pub(super) fn new(dir: StateDir, kinds: Kinds) -> Self {
        Meter {
            dir,
            kinds,
            previous: HashMap::new(),
            touched: HashMap::new(),
            own: Counters::default(),
            host: Host::default(),
            pressure: Pressure::default(),
            traffic: BTreeMap::new(),
            at: None,
        }
    }

    /// The measurement since the last call; `None` for the first one.
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
        let own = read_process(Path::new("/proc/self"), None, Some(&self.own));
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
            let now = read_process(&process, group.as_ref(), self.previous.get(&pid));
            let resident = resident_bytes(&self.kinds, &process);
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
            let process = PathBuf::from(format!("/proc/{pid}"));
            let now = read_process(&process, None, self.previous.get(&pid));
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
            // A node with a limit of its own shares it with no other process.
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
    /// Measures working sets: of the processes that are due the one that waits longest, since the
    /// time grows with the memory to scan.
    fn look_at_working_sets(&mut self, residents: &[(u32, u64)]) {
        self.touched
            .retain(|pid, _| residents.iter().any(|(it, _)| it == pid));
        let waits = |(pid, resident): &(u32, u64)| {
            let gibs = u32::try_from(resident >> 30).unwrap_or(u32::MAX);
            let span = WORKING_SET_SPAN.saturating_mul(gibs.saturating_add(1));
            let since = self.touched.get(pid).map(|it| it.since.elapsed());
            // A process that was never measured waits longest.
            let late = since.map_or(Some(Duration::MAX), |since| since.checked_sub(span))?;
            Some((late, *pid))
        };
        let Some((_, pid)) = residents.iter().filter_map(waits).max() else {
            return;
        };
        let process = PathBuf::from(format!("/proc/{pid}"));
        let known = self.touched.contains_key(&pid);
        let bytes = known.then(|| referenced_bytes(&process)).flatten();
        // 1 clears the bits of all pages.
        let forgotten = std::fs::write(process.join("clear_refs"), "1").is_ok();
        let touched = WorkingSetScan {
            since: Instant::now(),
            bytes: bytes.filter(|_| forgotten),
        };
        self.touched.insert(pid, touched);
    }
}

/// Traffic rates with each node that had any traffic.
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

/// Bytes of a process that were referenced since the bits were cleared.
fn referenced_bytes(process: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(process.join("smaps_rollup")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Referenced:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib.saturating_mul(1024))
}

/// The other rates of a process.
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

/// Pressure of this node's machines; if the kernel has none for the group, that of the host,
/// provided that the node uses the whole host.
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

/// Rates of guest threads, and of the other threads.
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
            // Exactly one core: the kernel counts a wait only once it has ended.
            guest.cpu_cores += 1.0;
            guest.cpu_bound_cores += 1.0;
        } else if earlier.is_some() {
            guest.cpu_cores += cores;
        } else {
            // All counters of a thread that is younger than the last reading count, up to the
            // elapsed time.
            guest.cpu_cores += cores.min(1.0);
        }
    }
    guest.io_bytes_per_s = now.io_bytes.saturating_sub(before.io_bytes) as f64 / seconds;
    let stalled = now.stalled_micros.saturating_sub(before.stalled_micros);
    guest.stalled = (stalled as f64 / 1e6 / seconds).clamp(0.0, 1.0);
    (guest, other)
}

/// Reads the counters of a process. What `before` knows of its threads is not read again.
fn read_process(process: &Path, group: Option<&Group>, before: Option<&Counters>) -> Counters {
    let mut counters = Counters::default();
    let tasks = std::fs::read_dir(process.join("task"));
    for task in tasks.into_iter().flatten().flatten() {
        let path = task.path();
        let tid = task.file_name().to_str().and_then(|tid| tid.parse().ok());
        // A thread may end during the reading.
        let (Some(tid), Ok(stat)) = (tid, std::fs::read_to_string(path.join("schedstat"))) else {
            continue;
        };
        let Some((ran, waited)) = ran_and_waited_nanos(&stat) else {
            continue;
        };
        // To format the rest takes the kernel longer than all else, and of most threads only this
        // counts. (One that was just begun has no name yet.)
        let known = before.and_then(|before| before.threads.get(&tid));
        if let Some(known) = known.filter(|known| !known.is_guest && known.is_old) {
            let thread = Thread {
                nanos: ran,
                waited,
                ..*known
            };
            counters.threads.insert(tid, thread);
            continue;
        }
        let Ok(status) = std::fs::read_to_string(path.join("status")) else {
            continue;
        };
        let word = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim()
        };
        let is_guest = word("Name:").starts_with(GUEST_THREAD_PREFIX);
        let thread = Thread {
            is_guest,
            waited,
            nanos: if is_guest {
                ran.saturating_add(waited)
            } else {
                ran
            },
            runnable: word("State:").starts_with('R'),
            is_old: known.is_some(),
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

/// Nanoseconds of run time and run-queue wait: `RUN WAITED SLICES`.
fn ran_and_waited_nanos(schedstat: &str) -> Option<(u64, u64)> {
    let mut words = schedstat.split_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .unwrap_or(0)
}

/// Memory that a process occupies. All present pages of a machine's memory count, not only those
/// in the process's page table.
fn resident_bytes(kinds: &Kinds, process: &Path) -> u64 {
    let mapped = mapped_bytes(process);
    let Some(memory) = kinds.memory_bytes(process) else {
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
    // The run time of KVM guests is included in `user`.
    let all: u64 = ticks.iter().take(8).sum();
    let idle = ticks.get(3)? + ticks.get(4)?;
    let stolen = ticks.get(7).copied().unwrap_or(0);
    Some(Host {
        busy: all - idle - stolen,
        stolen,
        all,
    })
}

/// Shares of all cores' time that were busy, and stolen by the hypervisor.
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

/// The node's memory, and the part that other processes than machines occupy.
fn memory(budget: &Budget, machines_bytes: u64) -> (u64, u64) {
    let total = crate::host::memory_bytes();
    match budget.memory_bytes {
        // An agent runs no machine itself.
        Some(limit) if limit < total => (limit, mapped_bytes(Path::new("/proc/self"))),
        _ => {
            let used = total.saturating_sub(crate::host::memory_available_bytes());
            (total, used.saturating_sub(machines_bytes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::kind::{Abilities, Difference, Kind, KindName, WorkerFolders};
    use keel_machine::spec::Spec;
    use std::sync::Arc;

    fn thread(is_guest: bool, nanos: u64, rests: u64) -> Thread {
        Thread {
            is_guest,
            waited: nanos / 2,
            nanos,
            runnable: true,
            rests,
            is_old: true,
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
            // It has waited for a while, which the kernel has not counted yet.
            (1, thread(true, 5 * second + second / 3, 7)),
            (2, thread(false, second / 2, 0)),
            (3, thread(true, second / 4, 1)),
            // Started after the first reading.
            (4, thread(true, second / 4, 0)),
        ]);
        let (guest, other) = rates(&before, &now, 1.0);
        assert_eq!(guest.cpu_cores, 1.5);
        assert_eq!(guest.cpu_bound_cores, 1.0);
        assert_eq!(other.cpu_cores, 0.5);
        // Half of each is waiting in this example.
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
            (machine.as_str() == "here").then_some(RunningMachine {
                cores_max: Some(1.0),
                dirty_bytes_per_s: 5.0,
            })
        });
        // Its process had run for part of the measured time.
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
        let before = read_process(own, None, None);
        let at = Instant::now();
        std::thread::sleep(std::time::Duration::from_millis(200));
        let now = read_process(own, None, Some(&before));
        let (guest, _) = rates(&before, &now, at.elapsed().as_secs_f64());
        burner.join().unwrap();
        // Run time or wait: independent of the load of the host.
        assert!(guest.cpu_cores > 0.5, "{guest:?}");
    }

    /// Memory of a machine that its kind knows counts beside that of its process.
    #[test]
    fn memory_that_a_kind_knows_is_counted() {
        let own = Path::new("/proc/self");
        let none = Kinds::new([]);
        let before = resident_bytes(&none, own);
        assert!(before > 1 << 20);
        let memory_bytes = 24 << 20;
        let known = Kinds::new([Arc::new(KnownMemory(memory_bytes)) as Arc<dyn Kind>]);
        let whole = resident_bytes(&known, own);
        assert!(
            whole >= memory_bytes && whole >= before / 2 + memory_bytes,
            "{whole}, {before}"
        );
    }

    /// A kind whose machines occupy a number of bytes.
    #[derive(Debug)]
    struct KnownMemory(u64);

    impl Kind for KnownMemory {
        fn name(&self) -> KindName {
            "known".parse().unwrap()
        }

        fn abilities(&self) -> Abilities {
            Abilities::default()
        }

        fn check(&self, _spec: &Spec) -> Result<(), String> {
            Ok(())
        }

        fn image(&self, _spec: &Spec) -> Option<String> {
            None
        }

        fn summary(&self, _spec: &Spec) -> String {
            String::new()
        }

        fn shown(&self, _spec: &Spec) -> serde_json::Value {
            serde_json::Value::Null
        }

        fn differences(&self, _old: &Spec, _new: &Spec) -> Vec<Difference> {
            Vec::new()
        }

        fn memory_bytes(&self, _process: &Path) -> Option<u64> {
            Some(self.0)
        }

        fn run_worker(&self, _folders: &WorkerFolders) -> Result<(), String> {
            Err("it has no worker".into())
        }
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
        // Other tests run in processes of their own. Pages with translations still in the TLB,
        // some MiB, are not seen as referenced again.
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
