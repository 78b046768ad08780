//! The control group of one worker. Its agent makes it and removes it; the
//! worker goes into it and sets its own limit, since only it knows how many
//! memories its machine has.

use super::format_bytes;
use super::layout::Version;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// In a worker's folder: where its group is.
const FILE: &str = "cgroups";
/// Beyond a machine's memories: code, compiling it, buffers of moves and
/// checkpoints.
const ENGINE_BYTES: u64 = 2 << 30;
/// For each guest thread: native stack, save area, what the runtime keeps.
const THREAD_BYTES: u64 = 8 << 20;
/// A limit that is this near was reached: what is counted is counted in batches.
const NEAR_BYTES: u64 = 1 << 20;
/// How long the kernel may take to let go of a group whose process is gone.
pub(super) const REMOVE_PATIENCE: Duration = Duration::from_secs(2);

/// One hierarchy's folder of the group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Folder {
    pub(super) version: Version,
    pub(super) path: PathBuf,
    /// Whether memory is bounded and counted there.
    pub(super) memory: bool,
}

/// A worker's control group: a folder in each hierarchy of use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub(super) folders: Vec<Folder>,
}

/// What the kernel counts of a group; `None` where it does not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupUsage {
    /// Memory now, in bytes: guest and engine, files that are cached for it.
    pub memory_bytes: Option<u64>,
    /// The most that it was.
    pub memory_peak_bytes: Option<u64>,
    /// The most that it may be.
    pub memory_limit_bytes: Option<u64>,
    /// CPU time, in microseconds.
    pub cpu_micros: Option<u64>,
    /// How long it was kept from running by a quota, in microseconds. keel sets none.
    pub throttled_micros: Option<u64>,
}

/// What a group did, counted by the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupCounts {
    /// Pages that were needed again after they had been taken away.
    pub refaults: Option<u64>,
    /// Reads from and writes to disks.
    pub io_operations: Option<u64>,
}

/// The kernel ended a group's process for want of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutOfMemory {
    /// The group's own limit was reached.
    Limit {
        /// The limit.
        limit_bytes: u64,
    },
    /// The host, or a group around the node's, had none left.
    Host {
        /// The most that the group had, if that was counted.
        peak_bytes: Option<u64>,
    },
}

impl std::fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OutOfMemory::Limit { limit_bytes } => write!(
                f,
                "out of memory: the kernel ended its process at the limit of its cgroup, {} for its memories and the engine (raise its memory limit, or lower that of its threads)",
                format_bytes(*limit_bytes)
            ),
            OutOfMemory::Host { peak_bytes } => {
                write!(
                    f,
                    "out of memory: the host, or a limit around the node, had none left, and the kernel ended its process"
                )?;
                if let Some(bytes) = peak_bytes {
                    write!(f, ", which had {}", format_bytes(*bytes))?;
                }
                write!(
                    f,
                    " (move machines to other nodes, or give this one more memory)"
                )
            }
        }
    }
}

/// The limit of the group of a machine: more than the machine can come to by its
/// own limits, so that those are reached first, where they have names (growing
/// fails, an access beyond is a trap). The engine gets 2 GiB, a quarter of the
/// memories (what checkpoints copy while they freeze) and 8 MiB a thread.
pub fn memory_limit_bytes(memories: usize, memory_bytes: u64, threads_max: u32) -> u64 {
    let memories = memory_bytes.saturating_mul(memories as u64);
    memories
        .saturating_add(memories / 4)
        .saturating_add(THREAD_BYTES.saturating_mul(threads_max.into()))
        .saturating_add(ENGINE_BYTES)
}

fn named(path: &Path) -> impl Fn(std::io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

impl Group {
    /// The group that was made for the worker whose folder this is.
    pub fn load(folder: &Path) -> Option<Self> {
        let text = std::fs::read(folder.join(FILE)).ok()?;
        serde_json::from_slice(&text)
            .inspect_err(|error| {
                tracing::warn!(%error, folder = %folder.display(), "its cgroup is not known");
            })
            .ok()
    }

    /// Says in a worker's folder which group is its.
    ///
    /// # Errors
    /// The file system's, in a sentence.
    pub fn save(&self, folder: &Path) -> Result<(), String> {
        let path = folder.join(FILE);
        let text = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        std::fs::write(&path, text).map_err(named(&path))
    }

    /// Puts this process into the group.
    ///
    /// # Errors
    /// The kernel's, in a sentence.
    pub fn join(&self) -> Result<(), String> {
        for folder in &self.folders {
            let path = folder.path.join("cgroup.procs");
            // (0 is whoever writes it.)
            std::fs::write(&path, "0").map_err(named(&path))?;
        }
        Ok(())
    }

    fn memory(&self) -> Option<&Folder> {
        self.folders.iter().find(|folder| folder.memory)
    }

    fn unified(&self) -> Option<&Folder> {
        let mut folders = self.folders.iter();
        folders.find(|folder| folder.version == Version::V2)
    }

    /// Bounds its memory.
    ///
    /// # Errors
    /// The kernel's, in a sentence.
    pub fn limit_memory(&self, bytes: u64) -> Result<(), String> {
        let Some(memory) = self.memory() else {
            return Ok(());
        };
        let path = memory.path.join(match memory.version {
            Version::V1 => "memory.limit_in_bytes",
            Version::V2 => "memory.max",
        });
        std::fs::write(&path, bytes.to_string()).map_err(named(&path))
    }

    /// What the kernel counts of it.
    pub fn usage(&self) -> GroupUsage {
        let mut usage = GroupUsage::default();
        if let Some(memory) = self.memory() {
            let [now, peak, limit] = match memory.version {
                Version::V1 => [
                    "memory.usage_in_bytes",
                    "memory.max_usage_in_bytes",
                    "memory.limit_in_bytes",
                ],
                Version::V2 => ["memory.current", "memory.peak", "memory.max"],
            }
            .map(|name| number(&memory.path.join(name)));
            usage.memory_bytes = now;
            usage.memory_peak_bytes = peak;
            // Version 1 has a word for none that is a number.
            usage.memory_limit_bytes = limit.filter(|limit| *limit < 1 << 62);
        }
        if let Some(unified) = self.unified() {
            let text = read(&unified.path.join("cpu.stat"));
            usage.cpu_micros = field(&text, "usage_usec");
            usage.throttled_micros = field(&text, "throttled_usec");
        }
        usage
    }

    /// Pages that were needed again after they had been taken away, and operations on
    /// disks, since the group was made; as far as the kernel counts them.
    pub fn counts(&self) -> GroupCounts {
        let mut counts = GroupCounts::default();
        if let Some(memory) = self.memory() {
            let text = read(&memory.path.join("memory.stat"));
            let kinds = ["workingset_refault_anon", "workingset_refault_file"];
            let found = kinds.iter().filter_map(|name| field(&text, name));
            counts.refaults = found.reduce(u64::saturating_add);
        }
        if let Some(unified) = self.unified() {
            // A line for each disk: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 ...`
            if let Ok(text) = std::fs::read_to_string(unified.path.join("io.stat")) {
                let words = text.split_whitespace();
                let operations = words.filter_map(|word| {
                    let (name, number) = word.split_once('=')?;
                    let counts = name == "rios" || name == "wios";
                    counts.then(|| number.parse::<u64>().ok())?
                });
                counts.io_operations = Some(operations.sum());
            }
        }
        counts
    }

    /// Whether, and why, the kernel ended its process for want of memory.
    pub fn out_of_memory(&self) -> Option<OutOfMemory> {
        let memory = self.memory()?;
        let text = read(&memory.path.join(match memory.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        }));
        if field(&text, "oom_kill").unwrap_or(0) == 0 {
            return None;
        }
        let usage = self.usage();
        let (limit, peak) = (usage.memory_limit_bytes, usage.memory_peak_bytes);
        let own = match memory.version {
            Version::V2 => field(&text, "oom").unwrap_or(0) > 0,
            Version::V1 => limit
                .zip(peak)
                .is_some_and(|(limit, peak)| peak.saturating_add(NEAR_BYTES) >= limit),
        };
        Some(match limit.filter(|_| own) {
            Some(limit_bytes) => OutOfMemory::Limit { limit_bytes },
            None => OutOfMemory::Host { peak_bytes: peak },
        })
    }

    /// Removes the group whose process is gone, and what the worker's folder says
    /// of it; waits a little for the kernel. What stays is swept by the next agent.
    pub fn remove_saved(folder: &Path) {
        let Some(group) = Group::load(folder) else {
            return;
        };
        group.remove();
        if let Err(error) = std::fs::remove_file(folder.join(FILE)) {
            tracing::debug!(%error, "where a group was is still said");
        }
    }

    /// Removes the group; waits a little until its process is gone.
    pub fn remove(&self) {
        let deadline = Instant::now() + REMOVE_PATIENCE;
        for folder in &self.folders {
            loop {
                match std::fs::remove_dir(&folder.path) {
                    Ok(()) => break,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
                    Err(error) if Instant::now() > deadline => {
                        tracing::warn!(%error, group = %folder.path.display(), "a group stays");
                        break;
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The number in a file; `None` for a file that is not there or says `max`.
fn number(path: &Path) -> Option<u64> {
    read(path).trim().parse().ok()
}

/// The number behind a name, in a file of names and numbers.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (found, number) = line.split_once(' ')?;
        (found == name).then(|| number.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group of plain files that look as the kernel's do.
    fn group(version: Version, files: &[(&str, &str)]) -> (tempfile::TempDir, Group) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let group = Group {
            folders: vec![Folder {
                version,
                path: folder.path().to_owned(),
                memory: true,
            }],
        };
        (folder, group)
    }

    #[test]
    fn counters_of_version_2() {
        let (folder, group) = group(
            Version::V2,
            &[
                ("memory.current", "4096\n"),
                ("memory.peak", "8192\n"),
                ("memory.max", "max\n"),
                (
                    "memory.events",
                    "low 0\nhigh 0\nmax 3\noom 0\noom_kill 0\noom_group_kill 0\n",
                ),
                (
                    "memory.stat",
                    "anon 4096\nworkingset_refault_anon 5\nworkingset_refault_file 2\n",
                ),
                (
                    "io.stat",
                    "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16 rios=1 wios=0\n",
                ),
                (
                    "cpu.stat",
                    "usage_usec 120\nuser_usec 100\nnr_throttled 0\nthrottled_usec 7\n",
                ),
            ],
        );
        let expected = GroupUsage {
            memory_bytes: Some(4096),
            memory_peak_bytes: Some(8192),
            memory_limit_bytes: None,
            cpu_micros: Some(120),
            throttled_micros: Some(7),
        };
        assert_eq!(group.usage(), expected);
        let counts = GroupCounts {
            refaults: Some(7),
            io_operations: Some(8),
        };
        assert_eq!(group.counts(), counts);
        assert_eq!(group.out_of_memory(), None);
        let events = |text| std::fs::write(folder.path().join("memory.events"), text).unwrap();
        events("oom 0\noom_kill 1\n");
        let host = OutOfMemory::Host {
            peak_bytes: Some(8192),
        };
        assert_eq!(group.out_of_memory(), Some(host));
        events("oom 2\noom_kill 1\n");
        group.limit_memory(9000).unwrap();
        let limit = OutOfMemory::Limit { limit_bytes: 9000 };
        assert_eq!(group.out_of_memory(), Some(limit));
    }

    #[test]
    fn counters_of_version_1() {
        let (_folder, group) = group(
            Version::V1,
            &[
                ("memory.usage_in_bytes", "4096\n"),
                ("memory.max_usage_in_bytes", "1073741824\n"),
                ("memory.limit_in_bytes", "9223372036854771712\n"),
                (
                    "memory.oom_control",
                    "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
                ),
            ],
        );
        let usage = group.usage();
        assert_eq!(usage.memory_bytes, Some(4096));
        assert_eq!((usage.memory_limit_bytes, usage.cpu_micros), (None, None));
        let peak_bytes = Some(1 << 30);
        let host = OutOfMemory::Host { peak_bytes };
        assert_eq!(group.out_of_memory(), Some(host));
        group.limit_memory(1 << 30).unwrap();
        let limit = OutOfMemory::Limit {
            limit_bytes: 1 << 30,
        };
        assert_eq!(group.out_of_memory(), Some(limit));
        assert!(limit.to_string().starts_with("out of memory: "), "{limit}");
        // Far from its own limit it was the host's.
        group.limit_memory(4 << 30).unwrap();
        assert_eq!(group.out_of_memory(), Some(host));
        assert!(host.to_string().contains("1024 MiB"), "{host}");
    }

    #[test]
    fn what_is_not_there_is_not_counted() {
        let (_folder, group) = group(Version::V2, &[]);
        assert_eq!(group.usage(), GroupUsage::default());
        assert_eq!(group.counts(), GroupCounts::default());
        assert_eq!(group.out_of_memory(), None);
    }

    #[test]
    fn groups_are_found_again() {
        let (folder, group) = group(Version::V1, &[]);
        assert_eq!(Group::load(folder.path()), None);
        group.save(folder.path()).unwrap();
        assert_eq!(Group::load(folder.path()), Some(group));
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(Group::load(folder.path()), None);
    }

    #[test]
    fn a_machine_comes_to_its_own_limits_first() {
        let gib = 1u64 << 30;
        assert!(memory_limit_bytes(1, 4 * gib, 256) > 4 * gib + 256 * (2 << 20));
        assert!(memory_limit_bytes(3, 4 * gib, 1) > 12 * gib);
        assert_eq!(memory_limit_bytes(9, u64::MAX, u32::MAX), u64::MAX);
    }
}
