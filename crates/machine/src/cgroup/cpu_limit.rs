//! Limits of CPU time for some threads of a worker's processes: those that execute a guest, while
//! those that emulate its devices and move it are not held back.
//!
//! ```text
//!   version 2                                   version 1
//!   MACHINE.RANDOM/     the worker's group      root of the cpu hierarchy
//!     guest/            threads (threaded)        keel-HASH.MACHINE.RANDOM/   threads
//! ```
//!
//! In version 2 a group below the worker's may have single threads if it is threaded
//! (Documentation/admin-guide/cgroup-v2.rst of Linux, "Threads"). In version 1 any group may; a folder
//! for the whole node would compete with the host's processes as one of them, so there is none.
//!
//! A thread that is held back may hold a lock that another one of its process waits for, so the period
//! is short.

use super::group::{Group, field, make, named, read};
use super::layout::{Layout, Version};
use rustix::fs::{Access, access};
use std::fs;
use std::path::{Path, PathBuf};

/// The period in which a thread's time is counted, in microseconds, unless its quota would be less
/// than the kernel accepts.
const PERIOD_MICROS: u64 = 10_000;
/// The least quota: `min_cfs_quota_period` of Linux.
const QUOTA_MICROS_MIN: u64 = 1000;
/// What a thread without a group weighs: in version 1, and in version 2.
const SHARES: u64 = 1024;
const WEIGHT: u64 = 100;
const WEIGHT_MAX: u64 = 10_000;

/// The group below a worker's, in version 2.
pub(super) const GUEST_LEAF: &str = "guest";

/// The period and the quota of a limit, in microseconds.
fn quota(limit_millis: u32) -> (u64, u64) {
    let millis = u64::from(limit_millis.max(1));
    let quota = PERIOD_MICROS * millis / 1000;
    match quota < QUOTA_MICROS_MIN {
        true => (QUOTA_MICROS_MIN * 1000 / millis, QUOTA_MICROS_MIN),
        false => (PERIOD_MICROS, quota),
    }
}

/// What this process lacks to limit CPU time; `None` if nothing.
pub fn lacks_for_cpu_limits() -> Option<String> {
    let remedy = "(`keel doctor` shows the remedy)";
    let layout = match Layout::read() {
        Ok(layout) => layout,
        Err(error) => {
            return Some(format!(
                "control groups, whose location is unknown: {error}"
            ));
        }
    };
    match layout.cpu_root(&layout.on_unified()) {
        Some((_, folder)) if access(folder, Access::WRITE_OK).is_ok() => None,
        Some((_, folder)) => Some(format!(
            "the right to create control groups in {} {remedy}",
            folder.display()
        )),
        None => Some(format!("the cpu controller of control groups {remedy}")),
    }
}

impl Group {
    /// The group for threads, which may not exist yet.
    fn threads(&self) -> Option<(Version, PathBuf)> {
        if let Some(path) = &self.threads {
            return Some((Version::V1, path.clone()));
        }
        let unified = self.unified()?;
        Some((Version::V2, unified.path.join(GUEST_LEAF)))
    }

    /// Limits the CPU time that these threads use together, in thousandths of a core; `None` ends the
    /// limit. Other threads that were limited before stay so.
    ///
    /// # Errors
    /// That of the kernel, or what is missing, as a message.
    pub fn limit_cpu(&self, limit_millis: Option<u32>, threads: &[u32]) -> Result<(), String> {
        let threads_of_group = self.threads();
        let Some((version, path)) = threads_of_group else {
            return match limit_millis {
                Some(_) => Err("this worker has no control group".into()),
                None => Ok(()),
            };
        };
        if limit_millis.is_none() && !path.exists() {
            return Ok(());
        }
        let write = |path: PathBuf, text: String| {
            let written = fs::write(&path, text);
            written.map_err(named(&path))
        };
        let count = (threads.len() as u64).max(1);
        match version {
            Version::V1 => {
                make(&path)?;
                write(path.join("cpu.shares"), (SHARES * count).to_string())?;
                let quota = match limit_millis.map(quota) {
                    Some((period, quota)) => {
                        // Whatever it was before: a quota may not exceed a period's cores.
                        write(path.join("cpu.cfs_quota_us"), "-1".into())?;
                        write(path.join("cpu.cfs_period_us"), period.to_string())?;
                        quota.to_string()
                    }
                    None => "-1".into(),
                };
                write(path.join("cpu.cfs_quota_us"), quota)?;
            }
            Version::V2 => {
                make(&path)?;
                let parent = path.parent().unwrap_or(Path::new(""));
                if read(&path.join("cgroup.type")).trim() != "threaded" {
                    write(path.join("cgroup.type"), "threaded".into())?;
                }
                write(parent.join("cgroup.subtree_control"), "+cpu".into())?;
                let weight = (WEIGHT * count).min(WEIGHT_MAX);
                write(path.join("cpu.weight"), weight.to_string())?;
                let most = match limit_millis.map(quota) {
                    Some((period, quota)) => format!("{quota} {period}"),
                    None => format!("max {PERIOD_MICROS}"),
                };
                write(path.join("cpu.max"), most)?;
            }
        }
        let file = path.join(match version {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.threads",
        });
        for thread in threads {
            write(file.clone(), thread.to_string())?;
        }
        Ok(())
    }

    /// How long threads were held back by a limit, in microseconds; `None` if none ever was set.
    pub fn throttled_micros(&self) -> Option<u64> {
        let (version, path) = self.threads()?;
        let text = read(&path.join("cpu.stat"));
        match version {
            Version::V1 => field(&text, "throttled_time").map(|nanos| nanos / 1000),
            Version::V2 => field(&text, "throttled_usec"),
        }
    }

    /// Removes the group for threads, if it is empty.
    pub(super) fn remove_threads(&self) {
        if let Some((_, path)) = self.threads() {
            // There may be none.
            let _ = fs::remove_dir(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::group::Folder;
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    #[test]
    fn quotas_are_what_the_kernel_accepts() {
        assert_eq!(quota(1500), (10_000, 15_000));
        assert_eq!(quota(100), (10_000, 1000));
        assert_eq!(quota(99), (10_101, 1000));
        assert_eq!(quota(10), (100_000, 1000));
        assert_eq!(quota(0), quota(1));
    }

    /// As the kernel's files are, without a kernel behind them.
    #[test]
    fn a_threaded_group_is_made_below_the_worker_s() {
        let folder = tempfile::tempdir().unwrap();
        let group = Group {
            folders: vec![Folder {
                version: Version::V2,
                path: folder.path().to_owned(),
                memory: true,
            }],
            threads: None,
        };
        let guest = folder.path().join(GUEST_LEAF);
        group.limit_cpu(None, &[7]).unwrap();
        assert!(!guest.exists());
        assert_eq!(group.throttled_micros(), None);
        group.limit_cpu(Some(250), &[7, 8]).unwrap();
        let says = |name: &str| fs::read_to_string(guest.join(name)).unwrap();
        assert_eq!(
            (says("cgroup.type"), says("cpu.weight")),
            ("threaded".into(), "200".into())
        );
        assert_eq!(
            (says("cpu.max"), says("cgroup.threads")),
            ("2500 10000".into(), "8".into())
        );
        let enabled = fs::read_to_string(folder.path().join("cgroup.subtree_control"));
        assert_eq!(enabled.unwrap(), "+cpu");
        fs::write(guest.join("cpu.stat"), "usage_usec 9\nthrottled_usec 5\n").unwrap();
        assert_eq!(group.throttled_micros(), Some(5));
        group.limit_cpu(None, &[]).unwrap();
        assert_eq!(says("cpu.max"), "max 10000");
        let none = Group {
            folders: Vec::new(),
            threads: None,
        };
        none.limit_cpu(None, &[]).unwrap();
        none.limit_cpu(Some(100), &[]).unwrap_err();
    }

    /// A thread of this process in the real version 1 hierarchy.
    #[test]
    fn a_thread_is_held_back_and_let_go_on() {
        let layout = Layout::read().unwrap();
        let root = match layout.cpu_root(&layout.on_unified()) {
            Some((Version::V1, folder)) if access(folder, Access::WRITE_OK).is_ok() => folder,
            _ => {
                eprintln!("not tested: no cpu controller of version 1 can be used here");
                return;
            }
        };
        let path = root.join(format!("keel-test-{:x}", rand::random::<u64>()));
        let group = Group {
            folders: Vec::new(),
            threads: Some(path.clone()),
        };
        let ends = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (send, threads) = std::sync::mpsc::channel();
            let ends = &ends;
            scope.spawn(move || {
                let own = rustix::thread::gettid().as_raw_nonzero().get();
                send.send(own.unsigned_abs()).unwrap();
                while !ends.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let thread = threads.recv().unwrap();
            group.limit_cpu(Some(50), &[thread]).unwrap();
            let deadline = Instant::now() + Duration::from_secs(20);
            while group.throttled_micros().unwrap() == 0 && Instant::now() < deadline {
                std::thread::yield_now();
            }
            group.limit_cpu(Some(64_000), &[]).unwrap();
            group.limit_cpu(Some(10), &[]).unwrap();
            group.limit_cpu(None, &[]).unwrap();
            let quota = fs::read_to_string(path.join("cpu.cfs_quota_us")).unwrap();
            ends.store(true, Ordering::Relaxed);
            assert_eq!(quota.trim(), "-1");
            assert!(group.throttled_micros().unwrap() > 0);
        });
        // The kernel lets go of a thread a moment after its end.
        let deadline = Instant::now() + Duration::from_secs(20);
        while path.exists() {
            assert!(Instant::now() < deadline, "it is not removed");
            group.remove_threads();
            std::thread::yield_now();
        }
    }
}
