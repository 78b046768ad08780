//! The control group of one worker. The agent creates and removes it; the worker enters
//! it and sets its own limit, since only it knows how many memories its machine has.

use super::format_bytes;
use super::layout::Version;
use crate::kernel_file::read_short;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// File in a worker's folder with the location of its group.
const FILE: &str = "cgroups";
/// Bytes beyond a machine's memories: code, compilation, buffers of moves and
/// checkpoints.
const ENGINE_BYTES: u64 = 2 << 30;
/// Bytes per guest thread: native stack, save area, runtime state.
const THREAD_BYTES: u64 = 8 << 20;
/// A limit counts as reached within this distance, because the kernel charges in batches.
const NEAR_BYTES: u64 = 1 << 20;
/// Time limit for the kernel to release a group whose process has ended.
pub(super) const REMOVE_PATIENCE: Duration = Duration::from_secs(2);

/// The group's folder in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Folder {
    pub(super) version: Version,
    pub(super) path: PathBuf,
    /// Whether memory is limited and accounted there.
    pub(super) memory: bool,
}

/// A worker's control group: a folder in each hierarchy of use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub(super) folders: Vec<Folder>,
    /// Where threads whose CPU time is limited enter a group of their own, in version 1.
    #[serde(default)]
    pub(super) threads: Option<PathBuf>,
}

/// Resource use of a group as accounted by the kernel; `None` where it is not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GroupUsage {
    /// Present memory use in bytes, including the page cache.
    pub memory_bytes: Option<u64>,
    /// Peak memory use in bytes.
    pub memory_peak_bytes: Option<u64>,
    /// Memory limit in bytes.
    pub memory_limit_bytes: Option<u64>,
    /// CPU time in microseconds.
    pub cpu_micros: Option<u64>,
    /// Time for which its guest was held back by its CPU limit, in microseconds, of kinds whose
    /// limit the kernel keeps.
    pub throttled_micros: Option<u64>,
}

/// Event counters of a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupCounts {
    /// Pages that were evicted and needed again (refaults).
    pub refaults: Option<u64>,
    /// Disk reads and writes.
    pub io_operations: Option<u64>,
}

/// The kernel killed a group's process because memory ran out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutOfMemory {
    /// The group reached its own limit.
    Limit { limit_bytes: u64 },
    /// The host, or a group around the node's, ran out of memory.
    Host {
        /// Peak memory use of the group, if known.
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

/// The limit for a machine's group: above what the machine can reach within its own
/// limits, so that those take effect first, with specific errors (growing fails, an
/// access beyond traps). The engine gets 2 GiB, a quarter of the memories (copies during
/// a checkpoint's freeze) and 8 MiB per thread.
pub fn memory_limit_bytes(memories: usize, memory_bytes: u64, threads_max: u32) -> u64 {
    let memories = memory_bytes.saturating_mul(memories as u64);
    memories
        .saturating_add(memories / 4)
        .saturating_add(THREAD_BYTES.saturating_mul(threads_max.into()))
        .saturating_add(ENGINE_BYTES)
}

pub(super) fn named(path: &Path) -> impl Fn(std::io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// Creates a group, unless it is there.
pub(super) fn make(path: &Path) -> Result<(), String> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(named(path)(error)),
        _ => Ok(()),
    }
}

impl Group {
    /// The group created for the worker with this folder.
    pub fn load(folder: &Path) -> Option<Self> {
        let text = std::fs::read(folder.join(FILE)).ok()?;
        serde_json::from_slice(&text)
            .inspect_err(|error| {
                tracing::warn!(%error, folder = %folder.display(), "cannot read the location of a cgroup");
            })
            .ok()
    }

    /// Records the group in a worker's folder.
    ///
    /// # Errors
    /// That of the file system, as a message.
    pub fn save(&self, folder: &Path) -> Result<(), String> {
        let path = folder.join(FILE);
        let text = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        std::fs::write(&path, text).map_err(named(&path))
    }

    /// Moves this process into the group.
    ///
    /// # Errors
    /// That of the kernel, as a message.
    pub fn join(&self) -> Result<(), String> {
        for folder in &self.folders {
            let path = folder.path.join("cgroup.procs");
            // 0 is the writing process.
            std::fs::write(&path, "0").map_err(named(&path))?;
        }
        Ok(())
    }

    fn memory(&self) -> Option<&Folder> {
        self.folders.iter().find(|folder| folder.memory)
    }

    pub(super) fn unified(&self) -> Option<&Folder> {
        let mut folders = self.folders.iter();
        folders.find(|folder| folder.version == Version::V2)
    }

    /// Sets the memory limit.
    ///
    /// # Errors
    /// That of the kernel, as a message.
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

    /// Resource use of the group.
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
            // Version 1 represents no limit by a large number.
            usage.memory_limit_bytes = limit.filter(|limit| *limit < 1 << 62);
        }
        if let Some(unified) = self.unified() {
            let text = read(&unified.path.join("cpu.stat"));
            usage.cpu_micros = field(&text, "usage_usec");
        }
        usage.throttled_micros = self.throttled_micros();
        usage
    }

    /// Refaults and disk operations since the group was created, where they are
    /// accounted.
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

    /// Whether and why the kernel killed its process because memory ran out.
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

    /// Removes the group of an ended process and its record in the worker's folder; waits
    /// briefly for the kernel. The next agent removes leftovers.
    pub fn remove_saved(folder: &Path) {
        let Some(group) = Group::load(folder) else {
            return;
        };
        group.remove();
        if let Err(error) = std::fs::remove_file(folder.join(FILE)) {
            tracing::debug!(%error, "cannot remove the record of a group");
        }
    }

    /// Removes the group; waits briefly for its process to end.
    pub fn remove(&self) {
        let deadline = Instant::now() + REMOVE_PATIENCE;
        for folder in &self.folders {
            loop {
                self.remove_threads();
                match std::fs::remove_dir(&folder.path) {
                    Ok(()) => break,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
                    Err(error) if Instant::now() > deadline => {
                        tracing::warn!(%error, group = %folder.path.display(), "cannot remove a group");
                        break;
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }
    }
}

pub(super) fn read(path: &Path) -> String {
    read_short(path).unwrap_or_default()
}

/// The number in a file; `None` if the file is missing or says `max`.
fn number(path: &Path) -> Option<u64> {
    read(path).trim().parse().ok()
}

/// The number of a key, in a file of keys and numbers.
pub(super) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (found, number) = line.split_once(' ')?;
        (found == name).then(|| number.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group of plain files in the kernel's format.
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
            threads: None,
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
                    "usage_usec 120\nuser_usec 100\nnr_throttled 0\nthrottled_usec 0\n",
                ),
            ],
        );
        let expected = GroupUsage {
            memory_bytes: Some(4096),
            memory_peak_bytes: Some(8192),
            memory_limit_bytes: None,
            cpu_micros: Some(120),
            throttled_micros: None,
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
        // Use far below its own limit: the host ran out of memory.
        group.limit_memory(4 << 30).unwrap();
        assert_eq!(group.out_of_memory(), Some(host));
        assert!(host.to_string().contains("1024 MiB"), "{host}");
    }

    #[test]
    fn missing_files_are_not_counted() {
        let (_folder, group) = group(Version::V2, &[]);
        assert_eq!(group.usage(), GroupUsage::default());
        assert_eq!(group.counts(), GroupCounts::default());
        assert_eq!(group.out_of_memory(), None);
    }

    #[test]
    fn saved_groups_are_loaded() {
        let (folder, group) = group(Version::V1, &[]);
        assert_eq!(Group::load(folder.path()), None);
        group.save(folder.path()).unwrap();
        assert_eq!(Group::load(folder.path()), Some(group));
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(Group::load(folder.path()), None);
    }

    #[test]
    fn a_machine_reaches_its_own_limits_first() {
        let gib = 1u64 << 30;
        assert!(memory_limit_bytes(1, 4 * gib, 256) > 4 * gib + 256 * (2 << 20));
        assert!(memory_limit_bytes(3, 4 * gib, 1) > 12 * gib);
        assert_eq!(memory_limit_bytes(9, u64::MAX, u32::MAX), u64::MAX);
    }
}
