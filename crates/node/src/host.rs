//! The host of this node: its memory, its processors' time and their features.

use keel_machine::kernel_file::read_short;
use std::path::Path;

/// CPU features that a guest may rely on: the baseline of the architecture. Guests see no others,
/// since every node compiles for itself.
const BASELINE: [&str; 4] = ["sse2", "ssse3", "sse4_1", "sse4_2"];

/// Memory of the host, in bytes; 0 if `/proc` is not readable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostMemory {
    pub(crate) bytes: u64,
    pub(crate) available_bytes: u64,
}

impl HostMemory {
    /// As it is now.
    pub(crate) fn read() -> Self {
        let text = read_short(Path::new("/proc/meminfo")).unwrap_or_default();
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name))
                .and_then(|rest| rest.trim().strip_suffix("kB"))
                .and_then(|kib| kib.trim().parse::<u64>().ok())
                .map_or(0, |kib| kib << 10)
        };
        HostMemory {
            bytes: field("MemTotal:"),
            available_bytes: field("MemAvailable:"),
        }
    }
}

/// Time of all processors of the host since it booted, in ticks.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct HostProcessors {
    pub(crate) busy: u64,
    pub(crate) stolen: u64,
    pub(crate) all: u64,
}

/// Shares of all processors' time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ProcessorShares {
    pub(crate) busy: f64,
    /// By the hypervisor.
    pub(crate) stolen: f64,
}

impl HostProcessors {
    /// As it is now; all 0 if `/proc` is not readable.
    pub(crate) fn read() -> Self {
        // (All processors come first.)
        let text = read_short(Path::new("/proc/stat")).unwrap_or_default();
        Self::parse(&text).unwrap_or_default()
    }

    /// `cpu  user nice system idle iowait irq softirq steal guest guest_nice`
    fn parse(text: &str) -> Option<Self> {
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
        Some(HostProcessors {
            busy: all - idle - stolen,
            stolen,
            all,
        })
    }

    /// What of the time since an earlier reading was busy or stolen; nothing of no time.
    pub(crate) fn shares_since(&self, before: &Self) -> ProcessorShares {
        let all = self.all.saturating_sub(before.all).max(1);
        let share = |before: u64, now: u64| now.saturating_sub(before) as f64 / all as f64;
        ProcessorShares {
            busy: share(before.busy, self.busy),
            stolen: share(before.stolen, self.stolen),
        }
    }
}

/// The CPU's features, by the kernel's names.
pub(crate) fn cpu_features() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("flags"))
        .and_then(|rest| rest.split_once(':'))
        .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

/// CPU features that a machine of this node needs on any node.
pub(crate) fn needed_features() -> Vec<String> {
    let here = cpu_features();
    BASELINE
        .iter()
        .filter(|feature| here.iter().any(|mine| mine == **feature))
        .map(|feature| (*feature).to_owned())
        .collect()
}

/// Whether this node's CPU has the features that a machine needs.
///
/// # Errors
/// The missing ones, in a sentence.
pub(crate) fn check_features(needed: &[String]) -> Result<(), String> {
    let here = cpu_features();
    let missing = needed.iter().filter(|it| !here.contains(it));
    let missing: Vec<&str> = missing.map(String::as_str).collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(format!("this node's CPU lacks {}", missing.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_processor_time_are_read() {
        let read = |text| HostProcessors::parse(text).unwrap();
        let before = read("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1\n");
        let now = read("cpu  150 0 100 730 100 0 0 20 50 0\n");
        let shares = |busy, stolen| ProcessorShares { busy, stolen };
        assert_eq!(now.shares_since(&before), shares(0.5, 0.2));
        assert_eq!(now.shares_since(&now), shares(0.0, 0.0));
        assert!(HostProcessors::parse("nothing").is_none());
        assert!(HostProcessors::read().all > 0);
    }
}
