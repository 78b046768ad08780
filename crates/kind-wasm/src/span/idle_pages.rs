//! Memory of a part that is not accessed. For each 64 KiB it is recorded whether any page
//! was accessed since the last scan; memories of more than 4 GiB are divided into larger
//! regions, of which 64 KiB each are sampled, elsewhere each time, as the kernel's DAMON
//! does (Park, Lee and Yeom, "Profiling dynamic data access patterns with controlled
//! overhead and quality", Middleware 2019), but without its privileges. A region without
//! accesses in several scans and for [`IDLE_MICROS`] between the last observed access and
//! the last scan is idle: moving it to another part makes no thread wait.
//!
//! ```text
//!   first scan ──▶ scanned ── some of it was accessed ──▶ used at that time
//!                     └── no access in several scans, for half a minute ──▶ idle
//! ```
//!
//! This module only keeps the records; the caller has the memory and the clock.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Time without accesses after which a region is idle, in microseconds.
const IDLE_MICROS: u64 = 30_000_000;
/// Time after a scan in which a second access to a used region cannot be observed, in
/// microseconds.
const RECENT_MICROS: u64 = 100_000;
/// Minimum number of scans without accesses.
const SCANS_MIN: u32 = 3;
/// Bytes scanned together, and the minimum size of a region.
pub(super) const SAMPLE_BYTES: u64 = 64 << 10;
/// Maximum number of regions in a memory; in larger memories regions are larger.
const REGIONS_MAX: u64 = 1 << 16;

/// A range of memory that was not accessed recently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleRange {
    pub memory: u32,
    /// Offset of its first byte.
    pub start: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Region {
    /// First byte of the next sample.
    next: u64,
    /// Time of the last observed access, or of the first scan.
    used_micros: u64,
    /// Time of the last scan.
    scanned_micros: u64,
    /// Scans since `used_micros`.
    scans: u32,
}

impl Region {
    fn is_idle(&self) -> bool {
        self.scans >= SCANS_MIN
            && self.scanned_micros.saturating_sub(self.used_micros) >= IDLE_MICROS
    }
}

/// The regions of one memory.
#[derive(Debug, Default)]
struct Regions {
    bytes: u64,
    by_number: BTreeMap<u64, Region>,
}

/// Scan results for a part's memories.
#[derive(Debug, Default)]
pub(super) struct IdlePages {
    memories: BTreeMap<u32, Regions>,
}

impl IdlePages {
    /// Whether the region of a byte was scanned just now and had been accessed: accesses
    /// to it cannot be observed for a moment.
    pub(super) fn was_just_used(&self, memory: u32, at: u64, now_micros: u64) -> bool {
        let regions = self.memories.get(&memory).filter(|it| it.bytes > 0);
        let region = regions.and_then(|it| it.by_number.get(&(at / it.bytes)));
        region.is_some_and(|it| it.scans == 0 && it.scanned_micros + RECENT_MICROS > now_micros)
    }

    /// The region of a byte, in a memory of this size; and the position of its next
    /// sample, if it was scanned before.
    pub(super) fn region(
        &mut self,
        memory: u32,
        memory_bytes: u64,
        at: u64,
    ) -> (std::ops::Range<u64>, Option<u64>) {
        let wanted = memory_bytes.div_ceil(REGIONS_MAX).next_power_of_two();
        let regions = self.memories.entry(memory).or_default();
        let bytes = wanted.max(SAMPLE_BYTES);
        // The memory has grown: records of regions of another size are void.
        if regions.bytes != bytes {
            *regions = Regions {
                bytes,
                by_number: BTreeMap::new(),
            };
        }
        let number = at / bytes;
        let known = regions.by_number.get(&number);
        (
            number * bytes..(number + 1) * bytes,
            known.map(|it| it.next),
        )
    }

    /// Records a scan of a region: whether it was accessed, and the next sample. The
    /// range between the previous region and this one is not populated.
    pub(super) fn record_scan(
        &mut self,
        memory: u32,
        gap: std::ops::Range<u64>,
        (next, used): (u64, bool),
        now_micros: u64,
    ) {
        self.record_absent(memory, gap);
        let Some(regions) = self.memories.get_mut(&memory) else {
            return;
        };
        let number = next / regions.bytes;
        match regions.by_number.get_mut(&number) {
            Some(region) => {
                (region.next, region.scanned_micros) = (next, now_micros);
                region.scans = region.scans.saturating_add(1);
                if used {
                    (region.used_micros, region.scans) = (now_micros, 0);
                }
            }
            None => {
                let region = Region {
                    next,
                    used_micros: now_micros,
                    scanned_micros: now_micros,
                    scans: 0,
                };
                regions.by_number.insert(number, region);
            }
        }
    }

    /// Records that a range is not populated.
    pub(super) fn record_absent(&mut self, memory: u32, range: std::ops::Range<u64>) {
        let Some(regions) = self.memories.get_mut(&memory) else {
            return;
        };
        let numbers = range.start / regions.bytes..range.end.div_ceil(regions.bytes);
        let gone: Vec<u64> = match numbers.is_empty() {
            true => Vec::new(),
            false => regions.by_number.range(numbers).map(|it| *it.0).collect(),
        };
        for number in gone {
            regions.by_number.remove(&number);
        }
    }

    /// Idle ranges from a byte of a memory on, in rising order, up to a number; and where
    /// to continue.
    pub(super) fn ranges(
        &self,
        (memory, from): (u32, u64),
        most: usize,
    ) -> (Vec<IdleRange>, Option<(u32, u64)>) {
        let mut ranges: Vec<IdleRange> = Vec::new();
        for (number, regions) in self.memories.range(memory..) {
            let first = match *number == memory {
                true => from.div_ceil(regions.bytes.max(1)),
                false => 0,
            };
            for (region, it) in regions.by_number.range(first..) {
                if !it.is_idle() {
                    continue;
                }
                let start = region * regions.bytes;
                let is_full = ranges.len() == most;
                match ranges.last_mut() {
                    Some(last) if last.memory == *number && last.start + last.bytes == start => {
                        last.bytes += regions.bytes;
                    }
                    _ if is_full => return (ranges, Some((*number, start))),
                    _ => ranges.push(IdleRange {
                        memory: *number,
                        start,
                        bytes: regions.bytes,
                    }),
                }
            }
        }
        (ranges, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K64: u64 = SAMPLE_BYTES;
    const MIB: u64 = 1 << 20;

    /// Scans regions of a memory of 16 MiB, given by their numbers, in order; whether
    /// each was accessed.
    fn look(idle: &mut IdlePages, regions: &[(u64, bool)], now_micros: u64) {
        let mut last = 0;
        for (number, used) in regions {
            let at = number * K64 + 8192;
            let (range, _) = idle.region(0, 16 * MIB, at);
            assert_eq!(range, number * K64..(number + 1) * K64);
            idle.record_scan(0, last..range.start, (at, *used), now_micros);
            last = range.end;
        }
        idle.record_absent(0, last..16 * MIB);
    }

    fn ranges(idle: &IdlePages) -> Vec<(u64, u64)> {
        let (ranges, rest) = idle.ranges((0, 0), 100);
        assert_eq!(rest, None);
        let ranges = ranges.into_iter();
        ranges.map(|it| (it.start / K64, it.bytes / K64)).collect()
    }

    const SECOND: u64 = 1_000_000;

    #[test]
    fn unused_regions_become_idle() {
        let mut idle = IdlePages::default();
        let none = [(1, true), (2, false), (3, true), (9, false)];
        look(&mut idle, &none, 0);
        assert_eq!(ranges(&idle), []);
        // One is used, one leaves, one arrives.
        let some = [(1, true), (2, false), (9, false), (10, false)];
        look(&mut idle, &some, 10 * SECOND);
        look(&mut idle, &some, 20 * SECOND);
        look(&mut idle, &some, 29 * SECOND);
        assert_eq!(ranges(&idle), []);
        look(&mut idle, &some, 30 * SECOND);
        assert_eq!(ranges(&idle), [(2, 1), (9, 1)]);
        let just = |region: u64, now: u64| idle.was_just_used(0, region * K64 + 5, now);
        assert!(just(1, 30 * SECOND + 1000) && !just(1, 31 * SECOND));
        assert!(!just(2, 30 * SECOND) && !just(77, 30 * SECOND));
        let last = [(2, true), (9, false), (10, false)];
        look(&mut idle, &last, 60 * SECOND);
        assert_eq!(ranges(&idle), [(9, 2)]);
        assert_eq!(idle.region(0, 16 * MIB, 9 * K64).1, Some(9 * K64 + 8192));
        assert_eq!(idle.region(0, 16 * MIB, K64).1, None);
    }

    /// However long a pass takes, unscanned regions are not idle.
    #[test]
    fn rarely_scanned_regions_are_not_idle() {
        let mut idle = IdlePages::default();
        for turn in 0..SCANS_MIN {
            look(
                &mut idle,
                &[(4, true), (5, false)],
                u64::from(turn) * 200 * SECOND,
            );
            assert_eq!(ranges(&idle), []);
        }
        look(&mut idle, &[(4, true), (5, false)], 800 * SECOND);
        assert_eq!(ranges(&idle), [(5, 1)]);
    }

    #[test]
    fn reports_are_paged() {
        let mut idle = IdlePages::default();
        let all: Vec<(u64, bool)> = (0..100).step_by(2).map(|it| (it, false)).collect();
        for turn in 0..=SCANS_MIN {
            look(&mut idle, &all, u64::from(turn) * IDLE_MICROS);
        }
        let (mut told, mut next) = (Vec::new(), Some((0, 0)));
        while let Some(from) = next {
            let (some, rest) = idle.ranges(from, 7);
            assert!(some.len() <= 7);
            told.extend(some.into_iter().map(|it| (it.start / K64, it.bytes / K64)));
            next = rest;
        }
        assert_eq!(told, ranges(&idle));
        assert_eq!(told.len(), 50);
    }

    #[test]
    fn large_memories_have_larger_regions() {
        let mut idle = IdlePages::default();
        let (range, _) = idle.region(2, 64 << 30, 5 << 30);
        assert_eq!(range.end - range.start, MIB);
        for turn in 0..=u64::from(SCANS_MIN) {
            let next = range.start + turn * K64;
            idle.record_scan(2, 0..range.start, (next, false), turn * IDLE_MICROS);
        }
        let (ranges, _) = idle.ranges((0, 0), 9);
        assert_eq!((ranges[0].memory, ranges[0].bytes), (2, MIB));
        // The memory grows: earlier records are void.
        let (range, known) = idle.region(2, (64 << 30) + 1, 5 << 30);
        assert_eq!((range.end - range.start, known), (2 * MIB, None));
        assert_eq!(idle.ranges((0, 0), 9).0, []);
    }
}
