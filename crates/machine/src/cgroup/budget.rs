//! Limits of the groups around this process: a node in a container, a systemd slice or a
//! test's group has no more than that, whatever the host has.

use super::layout::Layout;
use std::path::Path;

/// Version 1 represents "no limit" by a number of about this size.
const UNLIMITED_BYTES: u64 = 1 << 60;

/// The strictest limits of all groups around this process; `None` for no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Budget {
    pub cores: Option<f64>,
    pub memory_bytes: Option<u64>,
}

impl Budget {
    /// The limits of this process.
    pub fn read() -> Self {
        let Ok(layout) = Layout::read() else {
            return Budget::default();
        };
        let mut budget = Budget::default();
        if let Some(folder) = layout.unified() {
            for folder in ancestors(folder) {
                budget.add_cores(read(folder, "cpu.max").and_then(|text| cores_v2(&text)));
                budget.add_memory(number(folder, "memory.max"));
            }
        }
        if let Some(folder) = layout.legacy("cpu") {
            for folder in ancestors(folder) {
                let quota = read(folder, "cpu.cfs_quota_us");
                let period = read(folder, "cpu.cfs_period_us");
                budget.add_cores(quota.zip(period).and_then(|(q, p)| cores_v1(&q, &p)));
            }
        }
        if let Some(folder) = layout.legacy("memory") {
            for folder in ancestors(folder) {
                let limit = number(folder, "memory.limit_in_bytes");
                budget.add_memory(limit.filter(|bytes| *bytes < UNLIMITED_BYTES));
            }
        }
        budget
    }

    fn add_cores(&mut self, cores: Option<f64>) {
        if let Some(cores) = cores {
            self.cores = Some(self.cores.map_or(cores, |known| known.min(cores)));
        }
    }

    fn add_memory(&mut self, bytes: Option<u64>) {
        if let Some(bytes) = bytes {
            self.memory_bytes = Some(self.memory_bytes.map_or(bytes, |known| known.min(bytes)));
        }
    }
}

/// A group's folder and its ancestors, up to the mount point.
fn ancestors(folder: &Path) -> impl Iterator<Item = &Path> {
    let in_a_hierarchy = |it: &&Path| it.join("cgroup.procs").exists();
    folder.ancestors().take_while(in_a_hierarchy)
}

fn read(folder: &Path, file: &str) -> Option<String> {
    std::fs::read_to_string(folder.join(file)).ok()
}

fn number(folder: &Path, file: &str) -> Option<u64> {
    read(folder, file)?.trim().parse().ok()
}

/// `50000 100000`, or `max 100000`
fn cores_v2(text: &str) -> Option<f64> {
    let mut words = text.split_whitespace();
    cores_v1(words.next()?, words.next()?)
}

/// In microseconds per period; a negative quota means no limit.
fn cores_v1(quota: &str, period: &str) -> Option<f64> {
    let quota: f64 = quota.trim().parse().ok()?;
    let period: f64 = period.trim().parse().ok()?;
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_cores() {
        assert_eq!(cores_v2("50000 100000\n"), Some(0.5));
        assert_eq!(cores_v2("max 100000\n"), None);
        assert_eq!(cores_v2(""), None);
        assert_eq!(cores_v1("-1\n", "100000\n"), None);
        assert_eq!(cores_v1("200000\n", "100000\n"), Some(2.0));
        assert_eq!(cores_v1("1", "0"), None);
    }

    #[test]
    fn the_strictest_ancestor_counts() {
        let mut budget = Budget::default();
        for cores in [None, Some(2.0), Some(0.5), None, Some(1.0)] {
            budget.add_cores(cores);
        }
        budget.add_memory(Some(7));
        budget.add_memory(Some(9));
        assert_eq!((budget.cores, budget.memory_bytes), (Some(0.5), Some(7)));
    }
}
