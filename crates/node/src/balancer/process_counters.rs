//! Readings of one process: its threads' run time, its input and output, and its memory.
//!
//! Only the guest threads of a machine's process count as its demand: threads that copy it to
//! another node count for the node. A thread's demand is its run time plus its run-queue wait
//! (`/proc/PID/task/TID/schedstat`), also if a quota around the node caused the wait. A machine's
//! own limit makes its threads sleep, so throttling by it is in neither.
//!
//! What costs the kernel much is not read of processes that rest: a node at rest has many.

use keel_balance::load::{Factors, Usage};
use keel_machine::cgroup::{Group, GroupCounts};
use keel_machine::kernel_file::read_short;
use keel_machine::kind::{GUEST_THREAD_PREFIX, Kind, Kinds};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The memory of a process is not read again before it ran for so long, in which it occupies some
/// MiB at most, or [`AGE_MAX`] passed.
const RESIDENT_RAN_NANOS: u64 = 2_000_000;
/// Readings of a process that rests are not older. What its threads ran in that time, less than a
/// tick of 10 ms, counts in one second.
const AGE_MAX: Duration = Duration::from_secs(10);

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
pub(super) struct ProcessCounters {
    threads: HashMap<u32, Thread>,
    /// When the threads were read, and the ticks that the process had run.
    threads_read: Option<(Instant, u64)>,
    pub(super) resident: Option<Resident>,
    io_bytes: u64,
    /// Microseconds stalled for memory and disks.
    stalled_micros: u64,
    group: GroupCounts,
}

impl ProcessCounters {
    /// Whether the threads are as they were, if the process has run `ticks`. A thread that waits
    /// for a core has not run either: it is looked at.
    fn has_rested(&self, ticks: u64) -> bool {
        let read = self
            .threads_read
            .filter(|(at, before)| *before == ticks && at.elapsed() < AGE_MAX);
        let mut threads = self.threads.values();
        read.is_some() && threads.all(|it| it.is_old && !it.runnable)
    }

    /// Nanoseconds that its threads ran. Falls when one of them ends.
    fn ran_nanos(&self) -> u64 {
        let nanos = self.threads.values().map(|thread| thread.nanos);
        nanos.fold(0, u64::saturating_add)
    }

    /// The bytes that the process, whose counters these are, occupies, and keeps them; `last` is
    /// the reading before.
    pub(super) fn read_resident(
        &mut self,
        kinds: &Kinds,
        process: &Path,
        last: Option<Resident>,
    ) -> u64 {
        let ran_nanos = self.ran_nanos();
        let last = last.filter(|last| {
            let ran = ran_nanos.checked_sub(last.ran_nanos);
            let has_rested = ran.is_some_and(|ran| ran < RESIDENT_RAN_NANOS);
            has_rested && last.at.elapsed() < AGE_MAX
        });
        let resident = last.unwrap_or_else(|| Resident {
            bytes: resident_bytes(kinds, process),
            at: Instant::now(),
            ran_nanos,
        });
        self.resident = Some(resident);
        resident.bytes
    }
}

/// Memory that a process occupied at a reading.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resident {
    bytes: u64,
    at: Instant,
    ran_nanos: u64,
}

/// The other rates of a process.
pub(super) fn usage(before: &ProcessCounters, now: &ProcessCounters, seconds: f64) -> Usage {
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

/// Rates of guest threads, and of the other threads.
pub(super) fn rates(
    before: &ProcessCounters,
    now: &ProcessCounters,
    seconds: f64,
) -> (Factors, Factors) {
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

/// The processes that are read as one, and which of their threads execute a machine.
pub(super) struct Processes<'a> {
    /// Folders in `/proc`.
    folders: Vec<PathBuf>,
    kind: Option<&'a dyn Kind>,
}

impl<'a> Processes<'a> {
    /// A worker of a kind and what is beside it, or a process of no kind.
    pub(super) fn of(process: &Path, kind: Option<&'a dyn Kind>) -> Self {
        let beside = kind.map(|kind| kind.processes_beside(process));
        let mut folders = beside.unwrap_or_default();
        folders.push(process.to_owned());
        Processes { folders, kind }
    }

    fn is_guest(&self, thread: &str) -> bool {
        match self.kind {
            Some(kind) => kind.is_guest_thread(thread),
            None => thread.starts_with(GUEST_THREAD_PREFIX),
        }
    }
}

/// Reads the counters of processes. What `before` knows of their threads is not read again.
pub(super) fn read_processes(
    processes: &Processes<'_>,
    group: Option<&Group>,
    before: Option<&ProcessCounters>,
) -> ProcessCounters {
    let ticks = processes.folders.iter().map(|process| {
        let stat = read_short(&process.join("stat"))?;
        ran_ticks(&stat)
    });
    let ticks: Option<u64> = ticks.sum();
    let rested = before.filter(|before| ticks.is_some_and(|ticks| before.has_rested(ticks)));
    let mut counters = match rested {
        Some(before) => before.clone(),
        None => {
            let io = processes.folders.iter().map(|process| {
                let io = read_short(&process.join("io")).unwrap_or_default();
                field(&io, "read_bytes:") + field(&io, "write_bytes:")
            });
            ProcessCounters {
                threads_read: ticks.map(|ticks| (Instant::now(), ticks)),
                threads: read_threads(processes, before),
                io_bytes: io.sum(),
                group: group.map_or_else(GroupCounts::default, Group::counts),
                ..ProcessCounters::default()
            }
        }
    };
    // Whoever waits for a disk does not run.
    counters.stalled_micros = group.map_or(0, Group::stalled_micros);
    counters
}

fn read_threads(
    processes: &Processes<'_>,
    before: Option<&ProcessCounters>,
) -> HashMap<u32, Thread> {
    let mut threads = HashMap::new();
    let folders = processes.folders.iter();
    let tasks = folders.flat_map(|process| std::fs::read_dir(process.join("task")));
    for task in tasks.flatten().flatten() {
        let path = task.path();
        let tid = task.file_name().to_str().and_then(|tid| tid.parse().ok());
        // A thread may end during the reading.
        let (Some(tid), Some(stat)) = (tid, read_short(&path.join("schedstat"))) else {
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
                runnable: false,
                ..*known
            };
            threads.insert(tid, thread);
            continue;
        }
        let Some(status) = read_short(&path.join("status")) else {
            continue;
        };
        let word = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim()
        };
        let is_guest = processes.is_guest(word("Name:"));
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
        threads.insert(tid, thread);
    }
    threads
}

/// Ticks that all threads of a process ran, those that ended too: `utime` and `stime` of
/// proc_pid_stat(5), fields 14 and 15. The name, in brackets, may have spaces.
fn ran_ticks(stat: &str) -> Option<u64> {
    let mut words = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some(user.saturating_add(system))
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
    let status = read_short(&process.join("status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| {
        let rest = line.strip_prefix("RssShmem:")?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    });
    let shared = kib.unwrap_or(0).saturating_mul(1024);
    mapped.saturating_sub(shared).saturating_add(memory)
}

pub(super) fn mapped_bytes(process: &Path) -> u64 {
    let statm = read_short(&process.join("statm")).unwrap_or_default();
    let pages: u64 = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or(0);
    pages.saturating_mul(rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::kind::{Abilities, Difference, KindName, WorkerFolders};
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

    fn counters(threads: &[(u32, Thread)]) -> ProcessCounters {
        ProcessCounters {
            threads: threads.iter().copied().collect(),
            ..ProcessCounters::default()
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
        let own = &Processes::of(Path::new("/proc/self"), None);
        let before = read_processes(own, None, None);
        let at = Instant::now();
        std::thread::sleep(std::time::Duration::from_millis(200));
        let now = read_processes(own, None, Some(&before));
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

        fn images(&self, _spec: &Spec) -> Result<Vec<String>, String> {
            Ok(Vec::new())
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

    /// The threads of a process that has not run for a tick are not read again, unless one of them
    /// waits for a core, is new, or they were read long ago.
    #[test]
    fn threads_of_a_process_that_rests_are_not_read_again() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194304 9 9 0 0 250 50 0 0 20 0 1 0 5 6 7";
        assert_eq!(ran_ticks(stat), Some(300));
        assert_eq!(ran_ticks("7 (a) S 1"), None);
        let now = Instant::now();
        let rested = |thread: Thread, at| {
            let threads_read = Some((at, 300));
            let read = ProcessCounters {
                threads_read,
                ..counters(&[(1, thread)])
            };
            (read.has_rested(300), read.has_rested(301))
        };
        let resting = Thread {
            runnable: false,
            ..thread(true, 0, 0)
        };
        assert_eq!(rested(resting, now), (true, false));
        assert_eq!(rested(thread(true, 0, 0), now), (false, false));
        let is_old = false;
        assert_eq!(rested(Thread { is_old, ..resting }, now), (false, false));
        if let Some(long_ago) = now.checked_sub(AGE_MAX) {
            assert_eq!(rested(resting, long_ago), (false, false));
        }
    }

    /// What is known of the memory of a process that rested is not read again; of one that ran, or
    /// that lost a thread, it is.
    #[test]
    fn memory_of_a_process_that_rests_is_not_read_again() {
        let kinds = Kinds::new([]);
        let own = Path::new("/proc/self");
        let ran = |nanos| counters(&[(1, thread(true, nanos, 0))]);
        let known = Resident {
            bytes: 7,
            at: Instant::now(),
            ran_nanos: 5_000_000,
        };
        let read = |nanos, last| ran(nanos).read_resident(&kinds, own, last);
        assert_eq!(read(6_000_000, Some(known)), 7);
        assert!(read(7_000_000, Some(known)) > 1 << 20);
        assert!(read(4_000_000, Some(known)) > 1 << 20);
        assert!(read(6_000_000, None) > 1 << 20);
        let Some(at) = known.at.checked_sub(AGE_MAX) else {
            return;
        };
        assert!(read(6_000_000, Some(Resident { at, ..known })) > 1 << 20);
    }
}
