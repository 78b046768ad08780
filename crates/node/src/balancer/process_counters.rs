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
use keel_machine::kind::{GUEST_THREAD_PREFIX, Kind};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The memory of a process is not read again before it ran for so long, in which it occupies some
/// MiB at most, or [`AGE_MAX`] passed.
const RESIDENT_RAN_NANOS: u64 = 2_000_000;
/// A reading of a process that rests is not taken again before it is so old. What its threads ran
/// meanwhile, less than a tick of 10 ms, counts when it is.
const AGE_MAX: Duration = Duration::from_secs(30);

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

/// What `/proc/PID/stat` tells of a process, in ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    /// When it began, since the boot of the host: with its number, which process it is.
    began: u64,
    /// How long all of its threads ran, those that ended too.
    ran: u64,
}

/// Counters of one process, as they were at one reading.
#[derive(Debug, Clone)]
struct Reading {
    /// Its folder in `/proc`.
    folder: PathBuf,
    at: Instant,
    /// `None` if it was not there.
    stat: Option<Stat>,
    threads: HashMap<u32, Thread>,
    io_bytes: u64,
}

impl Reading {
    /// Of a process that is not there any more.
    fn gone(folder: &Path) -> Self {
        Reading {
            folder: folder.to_owned(),
            at: Instant::now(),
            stat: None,
            threads: HashMap::new(),
            io_bytes: 0,
        }
    }

    /// Whether all is as it was, if this is told of the process now. A thread that waits for a core has
    /// not run either: it is looked at.
    fn has_rested(&self, now: Option<Stat>) -> bool {
        let mut threads = self.threads.values();
        now.is_some()
            && self.stat == now
            && self.at.elapsed() < AGE_MAX
            && threads.all(|it| it.is_old && !it.runnable)
    }
}

/// Counters of processes that are read as one.
#[derive(Debug, Default, Clone)]
pub(super) struct ProcessCounters {
    readings: Vec<Reading>,
    /// When these processes were looked for.
    found: Option<Instant>,
    pub(super) resident: Option<Resident>,
    /// Whether none of them has run since the reading before.
    pub(super) has_rested: bool,
    /// Microseconds stalled for memory and disks.
    stalled_micros: u64,
    group: GroupCounts,
}

impl ProcessCounters {
    fn threads(&self) -> impl Iterator<Item = (&u32, &Thread)> {
        self.readings.iter().flat_map(|reading| &reading.threads)
    }

    fn thread(&self, tid: u32) -> Option<&Thread> {
        let mut readings = self.readings.iter();
        readings.find_map(|reading| reading.threads.get(&tid))
    }

    fn io_bytes(&self) -> u64 {
        self.readings.iter().map(|reading| reading.io_bytes).sum()
    }

    /// Nanoseconds that its threads ran. Falls when one of them ends.
    fn ran_nanos(&self) -> u64 {
        let nanos = self.threads().map(|(_, thread)| thread.nanos);
        nanos.fold(0, u64::saturating_add)
    }

    /// The bytes that the processes, whose counters these are, occupy, and keeps them; `last` is the
    /// reading before.
    pub(super) fn read_resident(
        &mut self,
        processes: &Processes<'_>,
        last: Option<Resident>,
    ) -> u64 {
        let ran_nanos = self.ran_nanos();
        let last = last.filter(|last| {
            let ran = ran_nanos.checked_sub(last.ran_nanos);
            let has_rested = ran.is_some_and(|ran| ran < RESIDENT_RAN_NANOS);
            has_rested && last.at.elapsed() < AGE_MAX
        });
        let resident = last.unwrap_or_else(|| Resident {
            bytes: resident_bytes(processes),
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
    let waited = now.threads().filter(|(_, thread)| thread.is_guest);
    let waited = waited.map(|(tid, thread)| {
        let earlier = before.thread(*tid).map_or(thread.waited, |it| it.waited);
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
    for (tid, thread) in now.threads() {
        let earlier = before.thread(*tid);
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
    let io_bytes = now.io_bytes().saturating_sub(before.io_bytes());
    guest.io_bytes_per_s = io_bytes as f64 / seconds;
    let stalled = now.stalled_micros.saturating_sub(before.stalled_micros);
    guest.stalled = (stalled as f64 / 1e6 / seconds).clamp(0.0, 1.0);
    (guest, other)
}

/// The processes that are read as one, and which of their threads execute a machine.
pub(super) struct Processes<'a> {
    /// Folders in `/proc`: that of the worker, or process of no kind, and those beside it.
    worker: PathBuf,
    beside: Vec<PathBuf>,
    found: Instant,
    kind: Option<&'a dyn Kind>,
}

impl<'a> Processes<'a> {
    /// A worker of a kind and what is beside it, or a process of no kind. What is beside it is not
    /// looked for again as long as all of it was there `before`, for some time.
    pub(super) fn of(
        process: &Path,
        kind: Option<&'a dyn Kind>,
        before: Option<&ProcessCounters>,
    ) -> Self {
        let known = before.and_then(|before| {
            let found = before.found.filter(|found| found.elapsed() < AGE_MAX)?;
            let beside = before.readings.iter().filter(|it| it.folder != process);
            let beside = beside.map(|reading| reading.stat.map(|_| reading.folder.clone()));
            let beside: Vec<PathBuf> = beside.collect::<Option<_>>()?;
            (!beside.is_empty()).then_some((beside, found))
        });
        let look = || {
            let beside = kind.map(|kind| kind.processes_beside(process));
            (beside.unwrap_or_default(), Instant::now())
        };
        let (beside, found) = known.unwrap_or_else(look);
        Processes {
            worker: process.to_owned(),
            beside,
            found,
            kind,
        }
    }

    fn folders(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.worker).chain(&self.beside)
    }

    /// Whether other processes than the worker execute the machine.
    pub(super) fn has_others(&self) -> bool {
        !self.beside.is_empty()
    }

    fn is_guest(&self, thread: &str) -> bool {
        match self.kind {
            Some(kind) => kind.is_guest_thread(thread),
            None => thread.starts_with(GUEST_THREAD_PREFIX),
        }
    }
}

/// Whether machines may have stalled for memory or disks since the reading before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stalls {
    /// None of this node has.
    None,
    Possible,
}

/// Reads the counters of processes. What `before` knows of their threads is not read again.
pub(super) fn read_processes(
    processes: &Processes<'_>,
    group: Option<&Group>,
    stalls: Stalls,
    before: Option<&ProcessCounters>,
) -> ProcessCounters {
    let mut has_rested = before.is_some();
    let readings = processes.folders().map(|folder| {
        let last = before.and_then(|before| {
            let mut readings = before.readings.iter();
            readings.find(|reading| reading.folder == *folder)
        });
        let stat = read_short(&folder.join("stat")).and_then(|stat| parse_stat(&stat));
        let began = last.and_then(|last| Some(last.stat?.began));
        if stat.is_some_and(|stat| began.is_some_and(|began| began != stat.began)) {
            // Another process has its number by now.
            has_rested = false;
            return Reading::gone(folder);
        }
        match last.filter(|last| last.has_rested(stat)) {
            Some(last) => last.clone(),
            None => {
                has_rested = false;
                let io = read_short(&folder.join("io")).unwrap_or_default();
                Reading {
                    folder: folder.clone(),
                    at: Instant::now(),
                    stat,
                    threads: read_threads(folder, processes, last),
                    io_bytes: field(&io, "read_bytes:") + field(&io, "write_bytes:"),
                }
            }
        }
    });
    let readings = readings.collect();
    let known = before.filter(|_| has_rested).map(|before| before.group);
    // Whoever waits for a disk does not run, so that it rested says nothing.
    let stalled = before.filter(|_| stalls == Stalls::None);
    let stalled = stalled.map(|before| before.stalled_micros);
    ProcessCounters {
        readings,
        found: Some(processes.found),
        resident: None,
        has_rested,
        stalled_micros: stalled.unwrap_or_else(|| group.map_or(0, Group::stalled_micros)),
        group: known.unwrap_or_else(|| group.map_or_else(GroupCounts::default, Group::counts)),
    }
}

fn read_threads(
    process: &Path,
    processes: &Processes<'_>,
    before: Option<&Reading>,
) -> HashMap<u32, Thread> {
    let mut threads = HashMap::new();
    let tasks = std::fs::read_dir(process.join("task"));
    for task in tasks.into_iter().flatten().flatten() {
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

/// `utime`, `stime` and `starttime` of proc_pid_stat(5), fields 14, 15 and 22. The name, in brackets, may
/// have spaces.
fn parse_stat(stat: &str) -> Option<Stat> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let words: Vec<&str> = after_name.split_whitespace().collect();
    // The first of them is field 3.
    let field = |number: usize| words.get(number - 3)?.parse::<u64>().ok();
    Some(Stat {
        began: field(22)?,
        ran: field(14)?.saturating_add(field(15)?),
    })
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

/// Memory that processes occupy. All present pages of a machine's memory count, not only those in the
/// worker's page table.
fn resident_bytes(processes: &Processes<'_>) -> u64 {
    let Processes { worker, kind, .. } = processes;
    let mapped = processes.folders().map(|process| mapped_bytes(process));
    let mapped = mapped.fold(0, u64::saturating_add);
    let Some(memory) = kind.and_then(|kind| kind.memory_bytes(worker)) else {
        return mapped;
    };
    let status = read_short(&worker.join("status")).unwrap_or_default();
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

    const STAT: Stat = Stat { began: 6, ran: 300 };

    fn reading(threads: &[(u32, Thread)]) -> Reading {
        Reading {
            folder: "/proc/1".into(),
            at: Instant::now(),
            stat: Some(STAT),
            threads: threads.iter().copied().collect(),
            io_bytes: 0,
        }
    }

    fn counters(threads: &[(u32, Thread)]) -> ProcessCounters {
        ProcessCounters {
            readings: vec![reading(threads)],
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
        let own = &Processes::of(Path::new("/proc/self"), None, None);
        let before = read_processes(own, None, Stalls::None, None);
        let at = Instant::now();
        std::thread::sleep(std::time::Duration::from_millis(200));
        let now = read_processes(own, None, Stalls::None, Some(&before));
        let (guest, _) = rates(&before, &now, at.elapsed().as_secs_f64());
        burner.join().unwrap();
        // Run time or wait: independent of the load of the host.
        assert!(guest.cpu_cores > 0.5, "{guest:?}");
    }

    /// Memory of a machine that its kind knows counts beside that of its process.
    #[test]
    fn memory_that_a_kind_knows_is_counted() {
        let own = Path::new("/proc/self");
        let before = resident_bytes(&Processes::of(own, None, None));
        assert!(before > 1 << 20);
        let memory_bytes = 24 << 20;
        let kind = KnownMemory(memory_bytes);
        let whole = resident_bytes(&Processes::of(own, Some(&kind), None));
        assert!(
            whole >= memory_bytes && whole >= before / 2 + memory_bytes,
            "{whole}, {before}"
        );
    }

    /// They are looked for again once one of them is gone, or after some time.
    #[test]
    fn processes_beside_a_worker_are_remembered() {
        let (worker, other) = (Path::new("/proc/self"), Path::new("/proc/1"));
        let found = Instant::now();
        let with = |stat, found| {
            let beside = Reading {
                stat,
                ..reading(&[])
            };
            let own = Reading {
                folder: worker.to_owned(),
                ..reading(&[])
            };
            ProcessCounters {
                readings: vec![own, beside],
                found: Some(found),
                ..ProcessCounters::default()
            }
        };
        let beside = |before: &ProcessCounters| Processes::of(worker, None, Some(before)).beside;
        assert_eq!(beside(&with(Some(STAT), found)), [other]);
        // Whoever has no kind has nothing beside it.
        assert!(beside(&with(None, found)).is_empty());
        if let Some(long_ago) = found.checked_sub(AGE_MAX) {
            assert!(beside(&with(Some(STAT), long_ago)).is_empty());
        }
    }

    #[test]
    fn a_number_that_another_process_has_by_now_counts_for_nothing() {
        let own = Path::new("/proc/self");
        let before = Reading {
            folder: own.to_owned(),
            ..reading(&[(1, thread(true, 7, 0))])
        };
        let before = ProcessCounters {
            readings: vec![before],
            ..ProcessCounters::default()
        };
        let now = read_processes(
            &Processes::of(own, None, None),
            None,
            Stalls::None,
            Some(&before),
        );
        assert_eq!((now.threads().count(), now.readings[0].stat), (0, None));
        // From then on it is what it is.
        let later = read_processes(
            &Processes::of(own, None, None),
            None,
            Stalls::None,
            Some(&now),
        );
        assert!(later.threads().count() > 0);
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
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194304 9 9 0 0 250 50 0 0 20 0 1 0 6 7 8";
        assert_eq!(parse_stat(stat), Some(STAT));
        assert_eq!(parse_stat("7 (a) S 1"), None);
        let now = Instant::now();
        let rested = |thread: Thread, at| {
            let read = Reading {
                at,
                ..reading(&[(1, thread)])
            };
            assert!(!read.has_rested(None));
            let ran_on = Stat { ran: 301, ..STAT };
            (read.has_rested(Some(STAT)), read.has_rested(Some(ran_on)))
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
        let own = Processes::of(Path::new("/proc/self"), None, None);
        let ran = |nanos| counters(&[(1, thread(true, nanos, 0))]);
        let known = Resident {
            bytes: 7,
            at: Instant::now(),
            ran_nanos: 5_000_000,
        };
        let read = |nanos, last| ran(nanos).read_resident(&own, last);
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
