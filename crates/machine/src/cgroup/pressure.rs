//! Pressure stall information (PSI): how long tasks of a group were stalled for lack of
//! CPU, memory or disk. Available for version 2 groups, with or without controllers, and
//! for the whole host.

use super::group::{Folder, Group};
use super::layout::Version;
use super::slice::Slice;
use crate::kernel_file::read_short;
use std::path::Path;

/// Cumulative microseconds in which some task of a group was stalled; `None` where the
/// kernel does not report it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    pub cpu_micros: Option<u64>,
    pub memory_micros: Option<u64>,
    pub io_micros: Option<u64>,
}

impl Pressure {
    /// Whether no task has stalled for memory or disks between two readings, as far as the kernel
    /// reports it.
    pub fn has_same_stalls(&self, before: &Pressure) -> bool {
        let is_known = self.memory_micros.is_some() && self.io_micros.is_some();
        let stalls = |it: &Pressure| (it.memory_micros, it.io_micros);
        is_known && stalls(self) == stalls(before)
    }

    /// That of the host.
    pub fn of_host() -> Self {
        let total = |what: &str| total(&Path::new("/proc/pressure").join(what));
        Pressure {
            cpu_micros: total("cpu"),
            memory_micros: total("memory"),
            io_micros: total("io"),
        }
    }

    fn of(folders: &[Folder]) -> Self {
        let unified = folders.iter().find(|it| it.version == Version::V2);
        let total = |what: &str| total(&unified?.path.join(what));
        Pressure {
            cpu_micros: total("cpu.pressure"),
            memory_micros: total("memory.pressure"),
            io_micros: total("io.pressure"),
        }
    }
}

impl Group {
    /// Cumulative microseconds in which a worker was stalled for memory or for disks, whichever is
    /// more; 0 where the kernel does not report it.
    pub fn stalled_micros(&self) -> u64 {
        let unified = self.folders.iter().find(|it| it.version == Version::V2);
        let files = ["memory.pressure", "io.pressure"];
        let stalled = files.map(|file| unified.and_then(|it| total(&it.path.join(file))));
        stalled.into_iter().flatten().max().unwrap_or(0)
    }
}

impl Slice {
    /// That of all machines of a node together.
    pub fn pressure(&self) -> Pressure {
        Pressure::of(&self.folders)
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=1026347`
fn total(path: &Path) -> Option<u64> {
    parse(&read_short(path)?)
}

fn parse(text: &str) -> Option<u64> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    let total = some
        .split_whitespace()
        .find_map(|it| it.strip_prefix("total="));
    total?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn the_total_of_some_is_parsed() {
        let text = "some avg10=0.00 avg60=1.50 avg300=0.00 total=1026347\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=848813\n";
        assert_eq!(parse(text), Some(1_026_347));
        for broken in ["", "full total=3", "some avg10=0", "some total=x"] {
            assert_eq!(parse(broken), None);
        }
    }
}
