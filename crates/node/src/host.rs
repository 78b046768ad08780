//! The host of this node: its memory and its processor's features.

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
