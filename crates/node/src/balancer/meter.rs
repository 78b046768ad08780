//! Measures this node: the demand of its machines, and its capacity. Reads `/proc` and control
//! groups, whose counters increase; the difference of two readings gives a rate.
//!
//! A working set is measured by clearing the kernel's referenced bits and counting the pages with
//! the bit set later (`/proc/PID/clear_refs`, `smaps_rollup`). The larger the memory, the less
//! often this is done. Pages with translations still in the TLB are missed: some MiB of a machine
//! with a small working set. Of a whole system it is not known: where its processor executes it, the
//! bits are those of another table.

use super::process_counters::{
    ProcessCounters, Processes, Stalls, mapped_bytes, rates, read_processes, usage,
};
use super::rest::{Look, Rest};
use crate::host::{HostMemory, HostProcessors};
use crate::processes::Workers;
use crate::state_dir::StateDir;
use keel_api::PeerTraffic;
use keel_balance::load::{Capacity, Factors, MachineSample, NodeSample, Usage};
use keel_cluster::{MachineName, NodeName};
use keel_machine::cgroup::{Budget, Group, Pressure};
use keel_machine::kind::{KindName, Kinds};
use keel_net::traffic::{self, Traffic};
use rustix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Assumed disk throughput, in bytes a second, if none is known.
const IO_BYTES_PER_S: f64 = 1e9;
/// The least time between two readings.
const APART_S_MIN: f64 = 0.05;
/// What this node may use changes rarely.
const LIMITS_AGE: Duration = Duration::from_secs(10);
/// The kernel adds stalls up every two seconds, those of a group and of one in it at different times.
const STALLS_LATE_MAX: Duration = Duration::from_secs(5);
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

/// The measurement of a working set in progress.
#[derive(Debug)]
struct WorkingSetScan {
    since: Instant,
    bytes: Option<u64>,
}

/// Takes readings and keeps the last one.
pub(super) struct Meter {
    dir: StateDir,
    kinds: Kinds,
    limits: Option<Limits>,
    groups: HashMap<u32, Group>,
    /// The kind of each worker's machine.
    kind_names: HashMap<u32, KindName>,
    previous: HashMap<u32, ProcessCounters>,
    touched: HashMap<u32, WorkingSetScan>,
    /// The processor time of this process so far.
    own: Duration,
    host: HostProcessors,
    pressure: Pressure,
    rest: Rest,
    /// The last measurement.
    last: Option<Measured>,
    /// Of processes that machines have for themselves, with the bytes that they occupy.
    residents: Vec<(u32, u64)>,
    /// When machines, all together, were last seen to have stalled.
    stalled: Option<Instant>,
    /// For how long machines were held back by their limits.
    throttled: HashMap<u32, u64>,
    traffic: BTreeMap<NodeName, traffic::Bytes>,
    /// When the node was last looked at, and when it was last measured.
    at: Option<Instant>,
    measured_at: Option<Instant>,
}

impl Meter {
    pub(super) fn new(dir: StateDir, kinds: Kinds) -> Self {
        Meter {
            dir,
            kinds,
            limits: None,
            groups: HashMap::new(),
            kind_names: HashMap::new(),
            previous: HashMap::new(),
            touched: HashMap::new(),
            own: own_time(),
            host: HostProcessors::default(),
            pressure: Pressure::default(),
            rest: Rest::default(),
            last: None,
            residents: Vec::new(),
            stalled: None,
            throttled: HashMap::new(),
            traffic: BTreeMap::new(),
            at: None,
            measured_at: None,
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
        let since = |at: Instant| now.duration_since(at).as_secs_f64();
        if self.at.is_some_and(|at| since(at) < APART_S_MIN) {
            return None;
        }
        self.at = Some(now);
        let seconds = self.measured_at.map(since);
        let known = self.limits.take();
        let known = known.filter(|known| known.read.elapsed() < LIMITS_AGE);
        let limits = self.limits.insert(known.unwrap_or_else(Limits::read));
        let (budget, cores_of_host) = (limits.budget, limits.cores_of_host);
        let traffic = traffic.so_far();
        let (of_machines, of_parts) = (workers.processes(), parts.processes());
        let mut processes: Vec<u32> = of_machines.iter().chain(&of_parts).map(|it| it.1).collect();
        processes.sort_unstable();
        let in_slice = |pid: &u32| {
            let group = self.groups.get(pid);
            group.is_some_and(|group| workers.slice().holds(group))
        };
        let is_accounted = processes.iter().all(in_slice);
        let network = traffic
            .values()
            .map(|it| it.sent.saturating_add(it.received));
        let look = Look {
            at: now,
            machines_micros: is_accounted.then(|| workers.slice().cpu_micros()).flatten(),
            pressure: pressure(workers, &budget),
            host: HostProcessors::read(),
            memory: HostMemory::read(),
            network_bytes: network.fold(0, u64::saturating_add),
            budget,
            cores_of_host,
            processes,
        };
        let (pressure, host, host_memory) = (look.pressure, look.host, look.memory);
        if self.rest.stands(look)
            && let Some(last) = &mut self.last
        {
            last.capacity.speed = speed;
            let last = last.clone();
            self.look_at_working_sets();
            return Some(last);
        }
        self.measured_at = Some(now);
        let own = own_time();
        if !pressure.has_same_stalls(&self.pressure) {
            self.stalled = Some(now);
        }
        let stalls = match self.stalled {
            Some(at) if at.elapsed() < STALLS_LATE_MAX => Stalls::Possible,
            _ => Stalls::None,
        };
        let mut counters = HashMap::new();
        let mut residents = Vec::new();
        let mut machines = HashMap::new();
        let mut throttled = HashMap::new();
        let mut helpers = Factors::default();
        let mut memory_bytes = 0u64;
        for (machine, pid) in of_machines {
            let process = PathBuf::from(format!("/proc/{pid}"));
            if !self.groups.contains_key(&pid)
                && let Some(group) = Group::load(&self.dir.worker(&machine))
            {
                self.groups.insert(pid, group);
            }
            let group = self.groups.get(&pid);
            if !self.kind_names.contains_key(&pid)
                && let Some(kind) = self.kinds.of_worker(&process)
            {
                self.kind_names.insert(pid, kind.name());
            }
            let kind = self.kind_names.get(&pid);
            let kind = kind.and_then(|name| self.kinds.get(name).ok());
            let before = self.previous.get(&pid);
            let processes = Processes::of(&process, kind, before);
            let mut now = read_processes(&processes, group, stalls, before);
            // What does not run is not held back.
            let known = self.throttled.get(&pid).copied();
            let micros = match now.has_rested {
                true => known,
                false => group.and_then(Group::throttled_micros),
            };
            if let Some(micros) = micros {
                throttled.insert(pid, micros);
            }
            let last = before.and_then(|before| before.resident);
            let resident = now.read_resident(&processes, last);
            memory_bytes = memory_bytes.saturating_add(resident);
            let touched = self.touched.get(&pid).and_then(|it| it.bytes);
            if let (Some(before), Some(seconds)) = (before, seconds) {
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
            if !processes.has_others() {
                residents.push((pid, resident));
            }
        }
        // Parts of other nodes' machines are load that no round can move.
        for (_, pid) in of_parts {
            let process = PathBuf::from(format!("/proc/{pid}"));
            let processes = Processes::of(&process, None, None);
            let now = read_processes(&processes, None, stalls, self.previous.get(&pid));
            if let (Some(before), Some(seconds)) = (self.previous.get(&pid), seconds) {
                let (guest, other) = rates(before, &now, seconds);
                helpers.cpu_cores += guest.cpu_cores + other.cpu_cores;
            }
            counters.insert(pid, now);
        }
        let measured = seconds.map(|seconds| {
            let own_cores = own.saturating_sub(self.own).as_secs_f64() / seconds;
            let guests: f64 = machines.values().map(|(it, _)| it.cpu_cores).sum();
            let host_share = host.shares_since(&self.host);
            // A node with a limit of its own shares it with no other process.
            let (cores, others) = match budget.cores {
                Some(cores) => (cores.min(cores_of_host), 0.0),
                None => {
                    let ours = own_cores + helpers.cpu_cores + guests;
                    let busy = host_share.busy * cores_of_host;
                    let stolen = host_share.stolen * cores_of_host;
                    (cores_of_host - stolen, (busy - ours).max(0.0))
                }
            };
            let traffic = traffic_rates(&self.traffic, &traffic, seconds);
            let network = traffic
                .iter()
                .map(|it| it.sent_bytes_per_s + it.received_bytes_per_s);
            // To the kernel a thread that is held back by its limit waits for a core.
            let held_back = throttled.iter().map(|(pid, micros)| {
                share(self.throttled.get(pid).copied(), Some(*micros), seconds)
            });
            let waited = share(self.pressure.cpu_micros, pressure.cpu_micros, seconds);
            let (capacity_bytes, base_bytes) = memory(&budget, host_memory, memory_bytes);
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
                cpu_pressure: (waited - held_back.sum::<f64>()).max(0.0),
                stall_pressure: share(self.pressure.memory_micros, pressure.memory_micros, seconds)
                    .max(share(self.pressure.io_micros, pressure.io_micros, seconds)),
                traffic,
            }
        });
        self.residents = residents;
        self.look_at_working_sets();
        self.last = measured.clone();
        self.traffic = traffic;
        self.groups.retain(|pid, _| counters.contains_key(pid));
        self.kind_names.retain(|pid, _| counters.contains_key(pid));
        self.previous = counters;
        self.own = own;
        self.host = host;
        self.pressure = pressure;
        self.throttled = throttled;
        measured
    }
}

impl Meter {
    /// Measures working sets: of the processes that are due the one that waits longest, since the
    /// time grows with the memory to scan.
    fn look_at_working_sets(&mut self) {
        let residents = &self.residents;
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

/// What this node may use.
#[derive(Debug)]
struct Limits {
    read: Instant,
    budget: Budget,
    cores_of_host: f64,
}

impl Limits {
    fn read() -> Self {
        let cores = std::thread::available_parallelism();
        Limits {
            read: Instant::now(),
            budget: Budget::read(),
            cores_of_host: cores.map_or(1.0, |cores| cores.get() as f64),
        }
    }
}

/// The processor time of this process so far.
fn own_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

/// The node's memory, and the part that other processes than machines occupy.
fn memory(budget: &Budget, host: HostMemory, machines_bytes: u64) -> (u64, u64) {
    let total = host.bytes;
    match budget.memory_bytes {
        // An agent runs no machine itself.
        Some(limit) if limit < total => (limit, mapped_bytes(Path::new("/proc/self"))),
        _ => {
            let used = total.saturating_sub(host.available_bytes);
            (total, used.saturating_sub(machines_bytes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
