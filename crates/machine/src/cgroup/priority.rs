//! Whom the kernel ends first when the host itself has no memory left: workers,
//! each of which is one machine that can be started again, before the agent and
//! its parent, without which none is. And who goes first where processors are scarce:
//! what balances and moves machines, before guests, or a hot node could not be helped.

use std::time::{Duration, Instant};

/// Added to the badness of a worker, in thousandths of all memory.
const WORKER: i32 = 500;
/// The same of an agent and its parent.
const AGENT: i32 = -500;
const FILE: &str = "/proc/self/oom_score_adj";
/// The nice value of this process's session.
const AUTOGROUP: &str = "/proc/self/autogroup";

/// Nice value of what is not a guest.
const CONTROL_NICE: i32 = -10;
/// Nice value of guests where that of the others can be had.
const GUEST_NICE: i32 = 0;

/// Lets this process, and what it starts, go before guests. Needs a right
/// (CAP_SYS_NICE); without it nothing changes.
pub fn raise_priority() {
    if let Err(error) = rustix::process::setpriority_process(None, CONTROL_NICE) {
        tracing::debug!(%error, "guests are as important as what moves them");
    }
}

/// Nice value of threads that compile what a guest or its user waits for, above that of
/// guests.
const COMPILE_STEP: i32 = 5;
/// Nice value of a process that compiles ahead: beside a guest on the same processor it
/// gets 36 parts of 1,060 (the kernel's `sched_prio_to_weight`).
const BACKGROUND_NICE: i32 = 15;

/// Lets guests go before the calling thread, which compiles. The value is absolute: what
/// its process has may be far before that of guests.
pub fn yield_compile_thread() {
    let guests = guest_nice().or_else(|| rustix::process::getpriority_process(None).ok());
    set_own(guests.unwrap_or(GUEST_NICE) + COMPILE_STEP);
}

/// How a process that compiles stands beside guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompilePriority {
    /// As its agent: before guests, where that is allowed.
    First,
    /// Somebody waits for it: beside a guest on the same processor it gets a quarter.
    Wanted,
    /// Nobody does: a guest on the same processor keeps 97 parts of a hundred.
    Background,
}

/// Gives a process of its own that compiles, with all threads that it has, its place
/// beside guests. It becomes the leader of a session: where the kernel shares processors
/// among sessions first (`sched_autogroup_enabled`), nice values count only within one,
/// so the session gets the value too. To go forward again needs a right (CAP_SYS_NICE).
pub fn set_compile_priority(priority: CompilePriority) {
    let nice = match priority {
        CompilePriority::First => rustix::process::getpriority_process(None).unwrap_or(GUEST_NICE),
        CompilePriority::Wanted => GUEST_NICE + COMPILE_STEP,
        CompilePriority::Background => BACKGROUND_NICE,
    };
    // (It leads its session already the second time.)
    let _ = rustix::process::setsid();
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    for thread in threads.flatten() {
        let number = thread.file_name().to_str().and_then(|it| it.parse().ok());
        let Some(thread) = number.and_then(rustix::process::Pid::from_raw) else {
            continue;
        };
        if let Err(error) = rustix::process::setpriority_process(Some(thread), nice) {
            tracing::debug!(%error, nice, "a compiling thread's priority stays");
        }
    }
    // (There is no such file where the kernel does not share by sessions.)
    if let Err(error) = std::fs::write(AUTOGROUP, nice.to_string()) {
        tracing::debug!(%error, "the session's priority stays");
    }
}

/// The nice value for guests' threads in this process; `None` if they are to have its
/// own.
pub fn guest_nice() -> Option<i32> {
    let own = rustix::process::getpriority_process(None).ok()?;
    (own < GUEST_NICE).then_some(GUEST_NICE)
}

/// Lets guests have their share beside the thread that made it, which copies a
/// machine while it runs: nobody waits for that. Where so many want the processors
/// that this share is too little to get a machine away, the thread goes first again.
/// At the end, too.
#[derive(Debug)]
pub struct YieldPolicy {
    own: i32,
    looked: Instant,
    /// Nanoseconds that it ran and that it waited for a processor.
    used: (u64, u64),
    on: bool,
}

/// What is looked at must be so long, in nanoseconds: several turns of everybody.
const LOOKED_AT_NANOS: u64 = 20_000_000;
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Of the time that it wants to run, the least share in which a thread is to run.
const SHARE_MIN: f64 = 0.25;

impl YieldPolicy {
    /// `None` where guests and the rest have the same priority.
    pub fn begin() -> Option<Self> {
        let own = rustix::process::getpriority_process(None).ok()?;
        let used = ran_and_waited()?;
        (own < GUEST_NICE && set_own(GUEST_NICE)).then(|| YieldPolicy {
            own,
            looked: Instant::now(),
            used,
            on: true,
        })
    }

    /// Ends if the thread gets too little; to be called often.
    pub fn look(&mut self) {
        if !self.on || self.looked.elapsed() < LOOK_EVERY {
            return;
        }
        self.looked = Instant::now();
        let Some((ran, waited)) = ran_and_waited() else {
            return;
        };
        let now = (ran - self.used.0, waited - self.used.1);
        if now.0 + now.1 < LOOKED_AT_NANOS {
            return;
        }
        self.used = (ran, waited);
        if is_starved(now) {
            self.end();
        }
    }

    /// The thread goes first from now on.
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
    // (On Linux that of a thread.)
    let set = rustix::process::setpriority_process(None, nice);
    if let Err(error) = &set {
        tracing::debug!(%error, nice, "this thread's priority stays as it is");
    }
    set.is_ok()
}

/// Nanoseconds that this thread ran, and that it waited for a processor.
fn ran_and_waited() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let mut words = text.split_ascii_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

/// Makes this process, and what it starts, one of the last to be ended. Needs a
/// right (CAP_SYS_RESOURCE); without it nothing changes.
pub fn protect_agent_from_oom() {
    adjust(|now| now.min(AGENT));
}

/// Makes this process one of the first to be ended.
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
        tracing::debug!(%error, "whom the kernel ends first stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_time_is_enough() {
        assert!(!is_starved((0, 0)) && !is_starved((5, 15)) && !is_starved((9, 1)));
        assert!(is_starved((0, 1)) && is_starved((5, 16)));
    }

    /// Compiling went before guests once: a step was added to what the process had.
    #[test]
    fn compiling_yields_to_guests_whatever_its_process_has() {
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
    fn the_priority_comes_back() {
        std::thread::spawn(|| {
            let nice = || rustix::process::getpriority_process(None).unwrap();
            assert!(ran_and_waited().is_some());
            if !set_own(CONTROL_NICE) {
                eprintln!("skipped: priorities need CAP_SYS_NICE");
                return;
            }
            let mut courtesy = YieldPolicy::begin().unwrap();
            courtesy.look();
            assert_eq!(nice(), GUEST_NICE);
            courtesy.end();
            assert_eq!(nice(), CONTROL_NICE);
            drop(YieldPolicy::begin().unwrap());
            assert_eq!(nice(), CONTROL_NICE);
            assert!(set_own(GUEST_NICE));
            // Nobody goes before anybody: there is nothing to do.
            assert!(YieldPolicy::begin().is_none());
        })
        .join()
        .unwrap();
    }
}
