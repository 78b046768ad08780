//! Pages that threads wait for repeatedly, and whether parts share bytes in them or only
//! the page: where each part accesses other bytes than the others, the page moves back
//! and forth for nothing (false sharing; Torrellas, Lam and Hennessy, "False sharing and
//! spatial locality in multiprocessor caches", 1994).
//!
//! For each wait, the 64-byte line and the kind of access are recorded. Later accesses to
//! the page cannot be observed. A page counts as falsely shared if several parts wrote in
//! the recorded waits and no wait began at a line that another part wrote. Where only one
//! part writes, the others may read constant data first and changed data afterwards;
//! these cases cannot be distinguished.
//!
//! Only recent waits count: records expire after [`PERIOD_MICROS`] to twice that.

use keel_wasm::coherence::{Access, PageId, PartId, PartSet};
use keel_wasm::memory::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// Bytes that are distinguished: a 64th of a page, one cache line.
const LINE_BYTES: u64 = 64;
const LINES: u64 = PAGE_BYTES / LINE_BYTES;
/// How long a wait is remembered at least, in microseconds.
const PERIOD_MICROS: u64 = 30_000_000;
/// Pages recorded in each period, at most.
const PAGES_MAX: usize = 4096;
/// Pages with fewer waits are not reported.
const WAITS_MIN: u32 = 2;

/// Lines of a page that a part's threads accessed first when they waited for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FaultFootprint {
    /// One bit per line: read.
    read: u64,
    /// One bit per line: written.
    written: u64,
    /// Number of waits.
    waits: u32,
}

impl FaultFootprint {
    fn with(self, other: FaultFootprint) -> FaultFootprint {
        FaultFootprint {
            read: self.read | other.read,
            written: self.written | other.written,
            waits: self.waits.saturating_add(other.waits),
        }
    }
}

/// Recent waits of a part's threads.
#[derive(Debug, Default)]
pub(super) struct FaultHistory {
    now: HashMap<PageId, FaultFootprint>,
    before: HashMap<PageId, FaultFootprint>,
    /// Number of the period of `now`.
    period: u64,
    /// No further pages are recorded in this period.
    is_full: bool,
}

impl FaultHistory {
    fn advance_to(&mut self, now_micros: u64) {
        let period = now_micros / PERIOD_MICROS;
        if period > self.period {
            let last = std::mem::take(&mut self.now);
            self.before = match period == self.period + 1 {
                true => last,
                false => HashMap::new(),
            };
            (self.period, self.is_full) = (period, false);
        }
    }

    /// Records that a thread waits for a page in order to access a byte.
    pub(super) fn record_wait(&mut self, page: PageId, byte: u64, access: Access, now_micros: u64) {
        self.advance_to(now_micros);
        if !self.now.contains_key(&page) {
            if self.now.len() >= PAGES_MAX && !self.is_full {
                // Pages with one wait are mostly part of a scan.
                self.now.retain(|_, footprint| footprint.waits >= WAITS_MIN);
                self.is_full = self.now.len() > PAGES_MAX / 2;
            }
            if self.is_full && self.now.len() >= PAGES_MAX {
                return;
            }
        }
        let line = 1 << (byte / LINE_BYTES % LINES);
        let (read, written) = match access {
            Access::Read => (line, 0),
            Access::Write => (0, line),
        };
        let footprint = self.now.entry(page).or_default();
        *footprint = footprint.with(FaultFootprint {
            read,
            written,
            waits: 1,
        });
    }

    /// Up to a number of pages, from one on, with more than one wait, in rising order;
    /// and the page to continue from.
    pub(super) fn pages(
        &mut self,
        from: PageId,
        most: usize,
        now_micros: u64,
    ) -> (Vec<(PageId, FaultFootprint)>, Option<PageId>) {
        self.advance_to(now_micros);
        let mut all: BTreeMap<PageId, FaultFootprint> = BTreeMap::new();
        for (page, footprint) in self.now.iter().chain(&self.before) {
            if *page >= from {
                let known = all.entry(*page).or_default();
                *known = known.with(*footprint);
            }
        }
        all.retain(|_, footprint| footprint.waits >= WAITS_MIN);
        let next = all.keys().nth(most).copied();
        (all.into_iter().take(most).collect(), next)
    }
}

/// A page that threads of a machine waited for recently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotPage {
    pub memory: u32,
    /// Number of the page in the memory.
    pub number: u32,
    /// Number of waits in the last 30 to 60 seconds.
    pub waits: u64,
    /// The parts of the waiting threads.
    pub parts: PartSet,
    pub sharing: Sharing,
}

impl HotPage {
    /// Offset of its first byte in the memory.
    pub fn start(&self) -> u64 {
        u64::from(self.number) * PAGE_BYTES
    }
}

/// What parts share of a page that they wait for in turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sharing {
    /// Only one part waits for it, or none writes.
    Unshared,
    /// Parts access bytes that another part writes.
    True,
    /// At most one part writes, and the others begin elsewhere in the page.
    Unclear,
    /// Several parts write, and each accesses other bytes than the others write, as far
    /// as observed.
    False,
}

/// Merges the reports of all parts, in rising order.
pub(super) fn merged(
    reports: impl IntoIterator<Item = (PartId, PageId, FaultFootprint)>,
) -> Vec<HotPage> {
    let mut pages: BTreeMap<PageId, Vec<(PartId, FaultFootprint)>> = BTreeMap::new();
    for (part, page, footprint) in reports {
        pages.entry(page).or_default().push((part, footprint));
    }
    let hot = pages.into_iter().map(|(page, footprint)| {
        let waits = footprint
            .iter()
            .map(|(_, footprint)| u64::from(footprint.waits));
        HotPage {
            memory: page.memory,
            number: page.number,
            waits: waits.sum(),
            parts: footprint.iter().map(|(part, _)| *part).collect(),
            sharing: sharing(&footprint),
        }
    });
    hot.collect()
}

fn sharing(footprint: &[(PartId, FaultFootprint)]) -> Sharing {
    let writers = footprint
        .iter()
        .filter(|(_, footprint)| footprint.written != 0)
        .count();
    if footprint.len() < 2 || writers == 0 {
        return Sharing::Unshared;
    }
    let meets = |(one, (_, writer)): (usize, &(PartId, FaultFootprint))| {
        let others = footprint
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != one);
        let used = others.fold(0, |all, (_, (_, it))| all | it.read | it.written);
        writer.written & used != 0
    };
    match footprint.iter().enumerate().any(meets) {
        true => Sharing::True,
        false if writers == 1 => Sharing::Unclear,
        false => Sharing::False,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u32) -> PageId {
        PageId { memory: 0, number }
    }

    fn part(number: usize) -> PartId {
        PartId::new(number).unwrap()
    }

    /// Reports of parts with these waits: part, page, byte, access.
    fn reports(waits: &[(usize, u32, u64, Access)]) -> Vec<HotPage> {
        let mut parts: BTreeMap<usize, FaultHistory> = BTreeMap::new();
        for (at, number, byte, access) in waits {
            // Twice: single waits are not reported.
            for _ in 0..2 {
                let history = parts.entry(*at).or_default();
                history.record_wait(page(*number), *byte, *access, 5);
            }
        }
        let all = parts.into_iter().flat_map(|(at, mut history)| {
            let (pages, rest) = history.pages(page(0), 100, 6);
            assert_eq!(rest, None);
            let rows = pages.into_iter();
            rows.map(move |(page, footprint)| (part(at), page, footprint))
        });
        merged(all)
    }

    #[test]
    fn true_and_false_sharing_are_distinguished() {
        use Access::{Read, Write};
        let hot = reports(&[
            // Two counters in one page; one part also accesses its end.
            (0, 1, 0, Write),
            (1, 1, 64, Write),
            (1, 1, 4095, Write),
            // The same counter.
            (0, 2, 63, Write),
            (2, 2, 0, Write),
            // One part reads what the other writes, at its second access.
            (0, 3, 512, Write),
            (1, 3, 0, Read),
            (1, 3, 512, Read),
            // It reads another line first.
            (0, 4, 512, Write),
            (1, 4, 576, Read),
            // One of two writers also reads another line.
            (0, 7, 0, Write),
            (1, 7, 64, Write),
            (1, 7, 128, Read),
            // Both read; one writes.
            (0, 5, 0, Read),
            (1, 5, 0, Read),
            (2, 6, 0, Write),
        ]);
        let sharing: Vec<_> = hot.iter().map(|it| (it.number, it.sharing)).collect();
        let expected = [
            (1, Sharing::False),
            (2, Sharing::True),
            (3, Sharing::True),
            (4, Sharing::Unclear),
            (5, Sharing::Unshared),
            (6, Sharing::Unshared),
            (7, Sharing::False),
        ];
        assert_eq!(sharing, expected);
        assert_eq!((hot[0].waits, hot[0].parts.len()), (6, 2));
    }

    #[test]
    fn reports_are_paged_and_expire() {
        let mut history = FaultHistory::default();
        for number in 0..10 {
            for _ in 0..=number {
                history.record_wait(page(number), 0, Access::Read, 0);
            }
        }
        let (some, next) = history.pages(page(0), 4, 1);
        let numbers: Vec<u32> = some.iter().map(|(page, _)| page.number).collect();
        assert_eq!(
            (numbers, next),
            (vec![1, 2, 3, 4], Some(page(5))),
            "a single wait was reported"
        );
        assert_eq!(history.pages(page(5), 9, 1).0.len(), 5);
        // Waits of the previous period are added.
        history.record_wait(page(0), 0, Access::Read, PERIOD_MICROS);
        assert_eq!(history.pages(page(0), 9, PERIOD_MICROS).0[0].1.waits, 2);
        assert!(history.pages(page(0), 9, 3 * PERIOD_MICROS).0.is_empty());
    }

    #[test]
    fn the_number_of_pages_is_bounded() {
        let mut history = FaultHistory::default();
        let most = PAGES_MAX as u32;
        // Pages with one wait make room.
        for number in 0..3 * most {
            history.record_wait(page(number), 0, Access::Read, 0);
            history.record_wait(page(number % 10), 0, Access::Write, 0);
        }
        assert!(history.now.len() <= PAGES_MAX && history.now.len() > 10);
        assert_eq!(history.pages(page(0), 100, 0).0.len(), 10);
        // Where all pages have many waits, those already recorded stay.
        for number in 0..2 * most {
            history.record_wait(page(number), 0, Access::Read, 0);
            history.record_wait(page(number), 0, Access::Read, 0);
        }
        assert_eq!(history.now.len(), PAGES_MAX);
        history.record_wait(page(3), 0, Access::Read, 0);
        assert_eq!(history.now.len(), PAGES_MAX);
    }
}
