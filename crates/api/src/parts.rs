//! The parts of a spanning machine, its threads and its objects: requests to move them, and what is
//! reported about them. Moves of whole machines are in `moves`.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// The parts that a machine is to have; parts of a spanning machine are added and removed to
/// match.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SpanRequest {
    /// Their nodes. The first occurrence of the owner is the home; each further one is a part.
    pub nodes: Vec<String>,
    /// Whether its new threads start at the home, not on the part with the fewest.
    #[serde(default)]
    pub here: bool,
}

/// The parts of a machine, and its threads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PartsInfo {
    /// All parts; the home has number 0 and is the only one of a machine on one node.
    pub parts: Vec<PartInfo>,
    /// Its threads.
    pub threads: Vec<ThreadInfo>,
    /// Number of waits of the home's threads for pages of other parts, by powers of two of
    /// microseconds: below 1, below 2, below 4, …
    #[serde(default)]
    pub waits: Vec<u64>,
    /// Downtime of the change, in microseconds; only after a change.
    #[serde(default)]
    pub downtime_micros: Option<u64>,
}

/// A part of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PartInfo {
    /// Its number.
    pub part: u32,
    /// Its node.
    pub node: String,
    /// Threads that run there.
    pub threads: u32,
    /// Its memory, as last reported; `None` if it has not reported yet, or the machine is on one
    /// node.
    #[serde(default)]
    pub memory: Option<PartMemoryInfo>,
    /// For how many milliseconds it has not answered its home, if it does not answer.
    #[serde(default)]
    pub silent_ms: Option<u64>,
}

impl PartInfo {
    /// Milliseconds without an answer after which a part counts as silent; below, its node may
    /// just be busy.
    pub const SILENT_MS: u64 = 2000;

    /// For how many seconds it has been silent, if it is.
    pub fn silent_s(&self) -> Option<u64> {
        let silent = self.silent_ms.filter(|ms| *ms >= Self::SILENT_MS);
        silent.map(|ms| ms / 1000)
    }
}

/// A part's share of a machine's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PartMemoryInfo {
    /// Bytes that are present, including copies of pages of other parts.
    pub resident_bytes: u64,
    /// The most bytes that it keeps, while others have room.
    pub limit_bytes: Option<u64>,
    /// Total bytes that it has evicted for this limit.
    pub given_bytes: u64,
    /// Bytes of copies that it has dropped for the same reason.
    pub dropped_bytes: u64,
}

/// A thread of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ThreadInfo {
    /// Its number; the main one has 0.
    pub tid: u32,
    /// The part that it runs at.
    pub part: u32,
    /// The part's node.
    pub node: String,
    /// `running`, `waiting` (to be woken by another thread), `moving`.
    pub state: String,
    /// CPU time that it used at the part where it is, in microseconds.
    pub cpu_micros: Option<u64>,
    /// Microseconds that it waited for pages of other nodes, by the node that sent them.
    #[serde(default)]
    pub stalled_micros: BTreeMap<String, u64>,
    /// The object that it prefers to be near, if it has named one (`guests/evenkeel.h`).
    #[serde(default)]
    pub likes: Option<String>,
}

/// A range of a machine's memory that the same parts hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ObjectInfo {
    /// Its range ([`object_range_name`]).
    pub range: String,
    /// Its name in the program, if any (`guests/evenkeel.h`); the names of several objects with
    /// these pages are separated by commas, the largest first.
    pub name: Option<String>,
    /// Bytes, whole pages of 4 KiB.
    pub bytes: u64,
    /// The part that holds it, or wrote it last.
    pub part: u32,
    /// That part's node.
    pub node: String,
    /// Nodes of parts that have copies to read.
    pub readers: Vec<String>,
    /// Number of transfers of its pages between parts.
    pub exchanges: u64,
    /// Number of waits of threads for its pages in the last half minute to minute, for pages with
    /// more than one wait.
    #[serde(default)]
    pub waits: u64,
    /// Of those pages, those that parts used alternately, with one of them writing.
    #[serde(default)]
    pub shared_pages: u32,
    /// Of these, those with false sharing: several parts wrote different bytes from those that the
    /// others used, as far as it is observed. In separate pages there would be no waits.
    #[serde(default)]
    pub falsely_shared_pages: u32,
    /// Bytes that the part which holds it did not use for half a minute, by scanned regions of 64
    /// KiB or more.
    #[serde(default)]
    pub idle_bytes: u64,
    /// Node of the part that has its directory, which moves with whole 64 KiB.
    pub directory: String,
}

/// The result of an object move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ObjectMoved {
    /// Bytes that have moved: other parts may have fetched some of them back.
    pub bytes: u64,
}

/// The name of a range of a machine's memory: `0x10000-0x20000` from its first byte to the one
/// after its last; `1:0x0-0x1000` of another memory than the first.
pub fn object_range_name(memory: u32, start: u64, bytes: u64) -> String {
    let range = format!("{start:#x}-{:#x}", start.saturating_add(bytes));
    match memory {
        0 => range,
        other => format!("{other}:{range}"),
    }
}

/// Parses a name of [`object_range_name`] into memory, first byte and bytes; `None` if it is
/// invalid or empty.
pub fn object_range(name: &str) -> Option<(u32, u64, u64)> {
    let (memory, range) = match name.split_once(':') {
        Some((memory, range)) => (memory.parse().ok()?, range),
        None => (0, name),
    };
    let (start, end) = range.split_once('-')?;
    let byte = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let (start, end) = (byte(start)?, byte(end)?);
    let bytes = end.checked_sub(start).filter(|bytes| *bytes > 0)?;
    Some((memory, start, bytes))
}

/// The target of a thread or an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ThreadMove {
    /// A node on which the machine has a part.
    pub to: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_memory_have_names() {
        for (memory, start, bytes) in [(0, 0x1_0000, 4096), (3, 0, 1), (0, 1 << 40, 1 << 20)] {
            let name = object_range_name(memory, start, bytes);
            assert_eq!(object_range(&name), Some((memory, start, bytes)), "{name}");
        }
        for wrong in [
            "",
            "0x0",
            "0-10",
            "0x10-0x10",
            "0x20-0x10",
            "x:0x0-0x1",
            "cache",
        ] {
            assert_eq!(object_range(wrong), None, "{wrong}");
        }
    }
}
