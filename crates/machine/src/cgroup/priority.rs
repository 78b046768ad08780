//! OOM kill order: workers, each of which has one machine that can be restarted, before
//! the agent and its parent, without which no machine is restarted. And scheduling
//! priorities: threads that balance and move machines run before guests, because a hot
//! node could not be relieved otherwise. And memory: what an
//! agent used once it does not read again from a disk that may be busy.

use rustix::mm::MlockAllFlags;
use rustix::process::{Resource, Rlimit, setrlimit};
use std::time::{Duration, Instant};

/// Added to a worker's OOM score, in thousandths of all memory.
const WORKER: i32 = 500;
/// The same for an agent and its parent.
const AGENT: i32 = -500;
const FILE: &str = "/proc/self/oom_score_adj";
/// The nice value of this process's session.
const AUTOGROUP: &str = "/proc/self/autogroup";

/// Nice value of everything but guests. Not lower: the kernel's own threads have 0, and many busy ones
/// far below it keep those from running, and with them the disks.
const CONTROL_NICE: i32 = -10;
/// Nice value of guests where the value above can be set.
const GUEST_NICE: i32 = 0;

/// Lets this process and its children run before guests. Needs a right (CAP_SYS_NICE);
/// without it nothing changes.
pub fn raise_priority() {
    if let Err(error) = rustix::process::setpriority_process(None, CONTROL_NICE) {
        tracing::debug!(%error, "cannot raise the priority above that of guests");
    }
}

/// Nice value, relative to guests', of threads that compile what a guest or its user
/// waits for.
const COMPILE_STEP: i32 = 5;
/// Nice value of a process that compiles a program: beside a guest on the same processor
/// it gets 36 of 1,060 parts (the kernel's `sched_prio_to_weight`).
const BACKGROUND_NICE: i32 = 15;

/// Lets guests run before the calling thread, which compiles. The value is absolute,
/// because the process's own may be far below that of guests.
pub fn yield_compile_thread() {
    let guests = guest_nice().or_else(|| rustix::process::getpriority_process(None).ok());
    set_own(guests.unwrap_or(GUEST_NICE) + COMPILE_STEP);
}

/// Priority of a compiling process relative to guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompilePriority {
    /// The priority of its agent: before guests, where permitted.
    First,
    /// A guest on the same processor keeps 97 %.
    Background,
    /// A move has waited for it for long: beside a guest on the same processor it gets a quarter.
    Overdue,
}

/// Sets the priority of a compiling process and all its threads relative to guests. It
/// becomes the leader of a session: where the kernel distributes processors among
/// sessions first (`sched_autogroup_enabled`), nice values count only within one, so the
/// session gets the value too. Raising the priority again needs a right (CAP_SYS_NICE).
pub fn set_compile_priority(priority: CompilePriority) {
    let nice = match priority {
        CompilePriority::First => rustix::process::getpriority_process(None).unwrap_or(GUEST_NICE),
        CompilePriority::Background => BACKGROUND_NICE,
        CompilePriority::Overdue => GUEST_NICE + COMPILE_STEP,
    };
    // On the second call it already leads its session.
    let _ = rustix::process::setsid();
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    for thread in threads.flatten() {
        let number = thread.file_name().to_str().and_then(|it| it.parse().ok());
        let Some(thread) = number.and_then(rustix::process::Pid::from_raw) else {
            continue;
        };
        if let Err(error) = rustix::process::setpriority_process(Some(thread), nice) {
            tracing::debug!(%error, nice, "cannot set the priority of a compiling thread");
        }
    }
    // The file does not exist where the kernel does not group by sessions.
    if let Err(error) = std::fs::write(AUTOGROUP, nice.to_string()) {
        tracing::debug!(%error, "cannot set the priority of the session");
    }
}

/// The nice value for guests' threads in this process; `None` to keep that of the
/// process.
pub fn guest_nice() -> Option<i32> {
    let own = rustix::process::getpriority_process(None).ok()?;
    (own < GUEST_NICE).then_some(GUEST_NICE)
}

/// Lets guests have their share of the processors beside the current thread, which copies
/// a machine while it runs. If this share is too small for the move to make progress, the
/// thread gets its priority back; also at the end.
#[derive(Debug)]
pub struct YieldPolicy {
    own: i32,
    measured_at: Instant,
    /// Nanoseconds that the thread ran, and that it waited for a processor.
    used: (u64, u64),
    on: bool,
}

/// The minimum duration of a measurement, in nanoseconds: several time slices of all
/// threads.
const MEASURED_NANOS_MIN: u64 = 20_000_000;
const CHECK_INTERVAL: Duration = Duration::from_millis(5);
/// The smallest share of its runnable time in which the thread should run.
const SHARE_MIN: f64 = 0.25;

impl YieldPolicy {
    /// `None` where guests have the same priority as other threads.
    pub fn begin() -> Option<Self> {
        let own = rustix::process::getpriority_process(None).ok()?;
        let used = ran_and_waited()?;
        (own < GUEST_NICE && set_own(GUEST_NICE)).then(|| YieldPolicy {
            own,
            measured_at: Instant::now(),
            used,
            on: true,
        })
    }

    /// Ends the yielding if the thread gets too little; call often.
    pub fn check(&mut self) {
        if !self.on || self.measured_at.elapsed() < CHECK_INTERVAL {
            return;
        }
        self.measured_at = Instant::now();
        let Some((ran, waited)) = ran_and_waited() else {
            return;
        };
        let now = (ran - self.used.0, waited - self.used.1);
        if now.0 + now.1 < MEASURED_NANOS_MIN {
            return;
        }
        self.used = (ran, waited);
        if is_starved(now) {
            self.end();
        }
    }

    /// Restores the thread's priority.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.on) {
            set_own(self.own);
        }
    }
}

impl Drop for YieldPolicy {
    fn drop(&mut self) {
        self.end();
    }
}

fn is_starved((ran, waited): (u64, u64)) -> bool {
    (ran as f64) < SHARE_MIN * (ran + waited) as f64
}

fn set_own(nice: i32) -> bool {
    // On Linux this affects the thread.
    let set = rustix::process::setpriority_process(None, nice);
    if let Err(error) = &set {
        tracing::debug!(%error, nice, "cannot set the priority of this thread");
    }
    set.is_ok()
}

/// Nanoseconds that this thread ran, and that it waited for a processor.
fn ran_and_waited() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let mut words = text.split_ascii_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

/// Makes this process and its children late victims of the OOM killer. Needs a right
/// (CAP_SYS_RESOURCE); without it nothing changes.
pub fn protect_agent_from_oom() {
    adjust(|now| now.min(AGENT));
}

/// Keeps what this process has used once in memory: where the kernel takes pages back, its next step
/// could have to wait for a busy disk, and the renewals of leases with it. Needs a right
/// (CAP_SYS_RESOURCE, or no limit for locked memory); without it nothing changes.
pub fn lock_agent_memory() {
    // At a limit, allocations would fail.
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    let locked = setrlimit(Resource::Memlock, unlimited).and_then(|()| {
        rustix::mm::mlockall(
            MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT,
        )
    });
    if let Err(error) = locked {
        tracing::debug!(%error, "cannot keep the agent in memory");
    }
}

/// Makes this process an early victim of the OOM killer.
pub fn expose_worker_to_oom() {
    adjust(|now| now.max(WORKER));
}

fn adjust(change: impl Fn(i32) -> i32) {
    let adjusted = std::fs::read_to_string(FILE).and_then(|text| {
        let now = text.trim().parse().map_err(std::io::Error::other)?;
        match change(now) {
            wanted if wanted == now => Ok(()),
            wanted => std::fs::write(FILE, wanted.to_string()),
        }
    });
    if let Err(error) = adjusted {
        tracing::debug!(%error, "cannot set the OOM score");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_time_is_sufficient() {
        assert!(!is_starved((0, 0)) && !is_starved((5, 15)) && !is_starved((9, 1)));
        assert!(is_starved((0, 1)) && is_starved((5, 16)));
    }

    /// The nice value must not be relative to that of the process, or compilation could
    /// run before guests.
    #[test]
    fn compilation_yields_to_guests_at_any_priority() {
        std::thread::spawn(|| {
            let nice = || rustix::process::getpriority_process(None).unwrap();
            if set_own(CONTROL_NICE) {
                yield_compile_thread();
                assert_eq!(nice(), GUEST_NICE + COMPILE_STEP);
            } else {
                eprintln!("skipped in part: priorities need CAP_SYS_NICE");
                yield_compile_thread();
                assert!(nice() > GUEST_NICE);
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_priority_is_restored() {
        std::thread::spawn(|| {
            let nice = || rustix::process::getpriority_process(None).unwrap();
            assert!(ran_and_waited().is_some());
            if !set_own(CONTROL_NICE) {
                eprintln!("skipped: priorities need CAP_SYS_NICE");
                return;
            }
            let mut policy = YieldPolicy::begin().unwrap();
            policy.check();
            assert_eq!(nice(), GUEST_NICE);
            policy.end();
            assert_eq!(nice(), CONTROL_NICE);
            drop(YieldPolicy::begin().unwrap());
            assert_eq!(nice(), CONTROL_NICE);
            assert!(set_own(GUEST_NICE));
            // All threads have the same priority: there is nothing to yield.
            assert!(YieldPolicy::begin().is_none());
        })
        .join()
        .unwrap();
    }
}
