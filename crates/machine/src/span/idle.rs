//! Which memory of a part nobody uses: of each 64 KiB it is looked at one page, another
//! one each time, whether it was used since the last look (as the kernel's DAMON does with
//! regions: Park, Lee and Yeom, "Profiling dynamic data access patterns with controlled
//! overhead and quality", Middleware 2019; without its rights). What was not used in any
//! look for [`IDLE_MICROS`] is idle: it can go to another part, and nobody waits for it.
//!
//! ```text
//!   first look ──▶ looked at ── one page of it was used ──▶ used then
//!                     └── none for half a minute ──▶ idle
//! ```
//!
//! This module remembers; whoever looks has the memory and the clock.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How long nothing of it was used, in microseconds.
const IDLE_MICROS: u64 = 30_000_000;
/// Bytes of which a page is looked at, in memories that are not large.
const REGION_BYTES_MIN: u64 = 64 << 10;
/// Regions of a memory at most: there are as many of a larger one, and they are larger.
const REGIONS_MAX: u64 = 1 << 16;

/// Memory in a row that nobody used of late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleRange {
    /// The machine's memory.
    pub memory: u32,
    /// Its first byte.
    pub start: u64,
    /// How many.
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Region {
    /// First byte of the page that is looked at next.
    page: u64,
    /// When one was used last, or it was looked at first.
    used_micros: u64,
}

/// The regions of one memory.
#[derive(Debug, Default)]
struct Regions {
    bytes: u64,
    by_number: BTreeMap<u64, Region>,
}

/// What is known of a part's memories.
#[derive(Debug, Default)]
pub(super) struct Idle {
    memories: BTreeMap<u32, Regions>,
}

impl Idle {
    /// The region of a memory, which has so many bytes, in which a byte is; the page of it
    /// that is to be looked at, if it is known.
    pub(super) fn region(
        &mut self,
        memory: u32,
        memory_bytes: u64,
        at: u64,
    ) -> (std::ops::Range<u64>, Option<u64>) {
        let wanted = memory_bytes.div_ceil(REGIONS_MAX).next_power_of_two();
        let regions = self.memories.entry(memory).or_default();
        let bytes = wanted.max(REGION_BYTES_MIN);
        // (It has grown: of other regions nothing is known.)
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
            known.map(|it| it.page),
        )
    }

    /// A region was looked at, and whether its page was used; the one that is next. What
    /// lies between the last one that was looked at and this one is not here.
    pub(super) fn looked(
        &mut self,
        memory: u32,
        gap: std::ops::Range<u64>,
        (page, used): (u64, bool),
        now_micros: u64,
    ) {
        self.is_not_here(memory, gap);
        let Some(regions) = self.memories.get_mut(&memory) else {
            return;
        };
        let region = regions
            .by_number
            .entry(page / regions.bytes)
            .or_insert(Region {
                page,
                used_micros: now_micros,
            });
        region.page = page;
        if used {
            region.used_micros = now_micros;
        }
    }

    /// Nothing of a range is here.
    pub(super) fn is_not_here(&mut self, memory: u32, range: std::ops::Range<u64>) {
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

    /// What is idle of a memory from a byte on, or of those after it, in rising order; at
    /// most so many ranges, and where to go on if there are more.
    pub(super) fn ranges(
        &self,
        (memory, from): (u32, u64),
        most: usize,
        now_micros: u64,
    ) -> (Vec<IdleRange>, Option<(u32, u64)>) {
        let mut ranges: Vec<IdleRange> = Vec::new();
        for (number, regions) in self.memories.range(memory..) {
            let first = match *number == memory {
                true => from.div_ceil(regions.bytes.max(1)),
                false => 0,
            };
            for (region, it) in regions.by_number.range(first..) {
                if now_micros.saturating_sub(it.used_micros) < IDLE_MICROS {
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

    const K64: u64 = REGION_BYTES_MIN;
    const MIB: u64 = 1 << 20;

    /// Looks at regions of a memory of 16 MiB by their numbers, in order; whether they are used.
    fn look(idle: &mut Idle, regions: &[(u64, bool)], now_micros: u64) {
        let mut last = 0;
        for (number, used) in regions {
            let at = number * K64 + 8192;
            let (range, _) = idle.region(0, 16 * MIB, at);
            assert_eq!(range, number * K64..(number + 1) * K64);
            idle.looked(0, last..range.start, (at, *used), now_micros);
            last = range.end;
        }
        idle.is_not_here(0, last..16 * MIB);
    }

    fn ranges(idle: &Idle, now_micros: u64) -> Vec<(u64, u64)> {
        let (ranges, rest) = idle.ranges((0, 0), 100, now_micros);
        assert_eq!(rest, None);
        let ranges = ranges.into_iter();
        ranges.map(|it| (it.start / K64, it.bytes / K64)).collect()
    }

    #[test]
    fn what_nobody_uses_for_long_is_idle() {
        let mut idle = Idle::default();
        let second = 1_000_000;
        look(
            &mut idle,
            &[(1, true), (2, false), (3, true), (9, false)],
            0,
        );
        assert_eq!(ranges(&idle, 29 * second), []);
        // One is used, one goes, one comes.
        look(
            &mut idle,
            &[(1, true), (2, false), (9, false), (10, false)],
            20 * second,
        );
        assert_eq!(ranges(&idle, 31 * second), [(2, 1), (9, 1)]);
        assert_eq!(ranges(&idle, 51 * second), [(1, 2), (9, 2)]);
        look(
            &mut idle,
            &[(2, true), (9, false), (10, false)],
            60 * second,
        );
        assert_eq!(ranges(&idle, 61 * second), [(9, 2)]);
        assert_eq!(idle.region(0, 16 * MIB, 9 * K64).1, Some(9 * K64 + 8192));
        assert_eq!(idle.region(0, 16 * MIB, K64).1, None);
    }

    #[test]
    fn it_is_told_in_pieces() {
        let mut idle = Idle::default();
        let all: Vec<(u64, bool)> = (0..100).step_by(2).map(|it| (it, false)).collect();
        look(&mut idle, &all, 0);
        let now = IDLE_MICROS;
        let (mut told, mut next) = (Vec::new(), Some((0, 0)));
        while let Some(from) = next {
            let (some, rest) = idle.ranges(from, 7, now);
            assert!(some.len() <= 7);
            told.extend(some.into_iter().map(|it| (it.start / K64, it.bytes / K64)));
            next = rest;
        }
        assert_eq!(told, ranges(&idle, now));
        assert_eq!(told.len(), 50);
    }

    #[test]
    fn large_memories_have_larger_regions() {
        let mut idle = Idle::default();
        let (range, _) = idle.region(2, 64 << 30, 5 << 30);
        assert_eq!(range.end - range.start, MIB);
        idle.looked(2, 0..range.start, (range.start, false), 0);
        let (ranges, _) = idle.ranges((0, 0), 9, IDLE_MICROS);
        assert_eq!((ranges[0].memory, ranges[0].bytes), (2, MIB));
        // It grows: of what it was nothing is known.
        let (range, known) = idle.region(2, (64 << 30) + 1, 5 << 30);
        assert_eq!((range.end - range.start, known), (2 * MIB, None));
        assert_eq!(idle.ranges((0, 0), 9, IDLE_MICROS).0, []);
    }
}
