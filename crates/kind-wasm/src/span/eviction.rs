//! Selects the pages that a part evicts when it exceeds its limit: first read copies, the
//! oldest first, because they are only dropped; then pages that only this part holds,
//! which move to another part.
//!
//! A page that returns soon after it was evicted is part of the working set; a page of a
//! sequential scan is not, however long the scan is (2Q: Johnson and Shasha, "2Q: a low
//! overhead high performance buffer management replacement algorithm", VLDB 1994).
//! Whether a page of the working set is still used is only asked when its turn comes, and
//! a used page gets another turn (the clock algorithm: Corbató, "A Paging Experiment with
//! the Multics System", 1968). The same holds for pages that were present when the limit
//! was set. For new pages the accessed bit says nothing: each was accessed when it
//! arrived.
//!
//! ```text
//!            ┌──────── returns ◀────── ghosts (names of evicted) ◀───┐
//!            ▼                                                       │
//!   used ──▶ old ── while few are young, and not used ──▶ evicted ───┤
//!     ▲      └── used ─▶ old                                         │
//!     └────┐                                                         │
//!   present ─▶ young ── while many are young ──────────▶ evicted ────┘
//!   arrives ─▶ young
//!   read ────▶ copies ─────────────────────────────────▶ dropped
//! ```
//!
//! The policy only selects; it accesses neither memory nor a clock.

use keel_wasm::coherence::{Access, PageId};
use std::collections::{HashMap, HashSet, VecDeque};

/// One in this many owned pages is young, at least, before a returned page is evicted
/// (2Q's Kin).
const YOUNG_PART: usize = 4;
/// For each this many pages of the limit, the name of one evicted page is remembered
/// (2Q's Kout).
const GHOSTS_PART: u64 = 2;
/// Turns that used pages get before one of them is evicted nevertheless.
const TURNS_MAX: usize = 8;
/// Stale entries in a queue that are tolerated.
const VOID_MIN: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queue {
    Copies,
    Young,
    /// Present before the limit was set; queued with the young pages.
    Adopted,
    Old,
}

/// Pages in order of arrival, with stale entries of pages that left: `count` are valid.
#[derive(Debug, Default)]
struct PageQueue {
    pages: VecDeque<(PageId, u64)>,
    count: usize,
}

/// The eviction state of a part's pages.
#[derive(Debug, Default)]
pub(super) struct EvictionPolicy {
    /// Number of the last arrival or departure.
    last: u64,
    /// The queue of each page and its arrival number: other entries of the page are
    /// stale.
    at: HashMap<PageId, (Queue, u64)>,
    copies: PageQueue,
    young: PageQueue,
    old: PageQueue,
    /// Evicted pages with the number of their departure.
    ghosts: VecDeque<(PageId, u64)>,
    remembered: HashMap<PageId, u64>,
    /// Selected for eviction and still present.
    departing: HashSet<PageId>,
    /// Selected pages that left since the last query.
    evicted: u64,
}

impl EvictionPolicy {
    fn line(&mut self, queue: Queue) -> &mut PageQueue {
        match queue {
            Queue::Copies => &mut self.copies,
            Queue::Young | Queue::Adopted => &mut self.young,
            Queue::Old => &mut self.old,
        }
    }

    /// Whether a present page is in any queue.
    pub(super) fn knows(&self, page: PageId) -> bool {
        self.at.contains_key(&page) || self.departing.contains(&page)
    }

    /// Number of pages that were selected and have not left.
    pub(super) fn departing(&self) -> usize {
        self.departing.len()
    }

    /// Number of pages that can be moved away.
    pub(super) fn owned(&self) -> usize {
        self.young.count + self.old.count
    }

    /// Adds a page that was present before the limit was set; its accesses are observed
    /// from now on.
    pub(super) fn adopt(&mut self, page: PageId) {
        self.remove(page);
        self.put(page, Queue::Adopted);
    }

    /// A page has arrived, or has become writable.
    pub(super) fn arrived(&mut self, page: PageId, access: Access) {
        let is_owned = match self.at.get(&page) {
            Some((Queue::Young | Queue::Adopted | Queue::Old, _)) => true,
            Some((Queue::Copies, _)) | None => false,
        };
        // It keeps its place in the queue.
        if is_owned && access == Access::Write {
            return;
        }
        self.remove(page);
        let queue = match access {
            Access::Read => Queue::Copies,
            Access::Write if self.remembered.remove(&page).is_some() => Queue::Old,
            Access::Write => Queue::Young,
        };
        self.put(page, queue);
    }

    fn put(&mut self, page: PageId, queue: Queue) {
        self.last += 1;
        let number = self.last;
        self.at.insert(page, (queue, number));
        let line = self.line(queue);
        line.pages.push_back((page, number));
        line.count += 1;
        if line.pages.len() > 2 * line.count + VOID_MIN {
            let mut pages = std::mem::take(&mut line.pages);
            pages.retain(|(page, number)| {
                let stands = self.at.get(page);
                stands.is_some_and(|(_, at)| at == number)
            });
            self.line(queue).pages = pages;
        }
    }

    fn remove(&mut self, page: PageId) {
        self.departing.remove(&page);
        if let Some((queue, _)) = self.at.remove(&page) {
            self.line(queue).count -= 1;
        }
    }

    /// A page has left.
    pub(super) fn departed(&mut self, page: PageId) {
        self.evicted += u64::from(self.departing.contains(&page));
        self.remove(page);
    }

    /// Number of selected pages that have left since the last call.
    pub(super) fn take_evicted(&mut self) -> u64 {
        std::mem::take(&mut self.evicted)
    }

    /// Removes the first valid page of a queue; returns it with its queue.
    fn first(&mut self, queue: Queue) -> Option<(PageId, Queue)> {
        loop {
            let (page, number) = self.line(queue).pages.pop_front()?;
            if let Some((queue, at)) = self.at.get(&page).copied()
                && at == number
            {
                self.remove(page);
                return Some((page, queue));
            }
        }
    }

    /// At most this many read copies, the oldest first. Copies that cannot be dropped now
    /// stay queued; pages that are no longer copies become owned.
    pub(super) fn copies(
        &mut self,
        most: usize,
        is_droppable: impl Fn(PageId) -> bool,
    ) -> Vec<PageId> {
        let mut chosen = Vec::new();
        // Each copy is considered once.
        for _ in 0..self.copies.count {
            if chosen.len() == most {
                break;
            }
            let Some((page, _)) = self.first(Queue::Copies) else {
                break;
            };
            match is_droppable(page) {
                true => chosen.push(page),
                false => self.put(page, Queue::Copies),
            }
        }
        chosen
    }

    /// The next page to move to another part, if any; `may_keep` pages may stay.
    /// `is_used` says whether a page was accessed since it was last asked, or since it
    /// arrived.
    pub(super) fn next(
        &mut self,
        may_keep: u64,
        mut is_used: impl FnMut(PageId) -> bool,
    ) -> Option<PageId> {
        let mut goes_young = self.young.count * YOUNG_PART >= self.owned();
        let mut turns = 0;
        let page = loop {
            let (queue, other) = match goes_young {
                true => (Queue::Young, Queue::Old),
                false => (Queue::Old, Queue::Young),
            };
            let (page, stood) = self.first(queue).or_else(|| self.first(other))?;
            if stood == Queue::Young || turns == TURNS_MAX || !is_used(page) {
                break page;
            }
            turns += 1;
            // A page of a scan is evicted rather.
            goes_young = true;
            self.put(page, Queue::Old);
        };
        self.departing.insert(page);
        self.last += 1;
        self.remembered.insert(page, self.last);
        self.ghosts.push_back((page, self.last));
        let most = usize::try_from(may_keep / GHOSTS_PART).unwrap_or(usize::MAX);
        while self.ghosts.len() > most.max(1) {
            // The page may have returned and left again.
            if let Some((forgotten, number)) = self.ghosts.pop_front()
                && self.remembered.get(&forgotten) == Some(&number)
            {
                self.remembered.remove(&forgotten);
            }
        }
        Some(page)
    }

    /// Makes selected pages that have not left candidates again.
    pub(super) fn reconsider_departing(&mut self) {
        for page in std::mem::take(&mut self.departing) {
            self.put(page, Queue::Young);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u32) -> PageId {
        PageId { memory: 0, number }
    }

    fn came(keep: &mut EvictionPolicy, pages: impl IntoIterator<Item = u32>, access: Access) {
        for number in pages {
            keep.arrived(page(number), access);
        }
    }

    /// Evicts a number of pages.
    fn give(keep: &mut EvictionPolicy, count: usize) -> Vec<u32> {
        let evicted: Vec<PageId> = (0..count)
            .map_while(|_| keep.next(100, |_| false))
            .collect();
        for page in &evicted {
            keep.departed(*page);
        }
        evicted.iter().map(|page| page.number).collect()
    }

    #[test]
    fn copies_are_dropped_oldest_first() {
        let mut keep = EvictionPolicy::default();
        came(&mut keep, 0..4, Access::Write);
        came(&mut keep, 10..16, Access::Read);
        // One has become writable, one has left, one cannot be dropped.
        keep.arrived(page(11), Access::Write);
        keep.departed(page(12));
        let dropped = keep.copies(3, |it| it != page(10));
        assert_eq!(dropped, [page(13), page(14), page(15)]);
        assert_eq!(keep.copies(9, |_| true), [page(10)]);
        assert_eq!(keep.copies(9, |_| true), []);
        assert_eq!(give(&mut keep, 9), [0, 1, 2, 3, 11]);
        assert!(give(&mut keep, 9).is_empty());
        assert!(!keep.knows(page(11)));
    }

    /// The working set stays during a scan.
    #[test]
    fn returned_pages_stay() {
        let mut keep = EvictionPolicy::default();
        came(&mut keep, 0..8, Access::Write);
        assert_eq!(give(&mut keep, 4), [0, 1, 2, 3]);
        // They return.
        came(&mut keep, 0..4, Access::Write);
        for start in (100..1000).step_by(10) {
            came(&mut keep, start..start + 10, Access::Write);
            let evicted = give(&mut keep, 10);
            assert!(evicted.iter().all(|it| *it >= 4), "{evicted:?}");
        }
        // Not for ever: where nearly all pages have returned, the oldest are evicted.
        let evicted = give(&mut keep, 8);
        assert!(evicted.contains(&0), "{evicted:?}");
    }

    /// Used pages stay: those present from the start without being evicted once, others
    /// after they returned.
    #[test]
    fn used_pages_stay() {
        let mut keep = EvictionPolicy::default();
        (0..100).for_each(|number| keep.adopt(page(number)));
        came(&mut keep, 200..210, Access::Write);
        let hot = |page: PageId| [3, 50, 97, 201].contains(&page.number);
        let mut asked = HashSet::new();
        let mut gone = Vec::new();
        for new in 300..420 {
            let next = keep.next(100, |page| {
                asked.insert(page.number);
                hot(page)
            });
            keep.departed(next.unwrap());
            gone.push(next.unwrap().number);
            came(&mut keep, [new], Access::Write);
            // It returns at once.
            if gone.last() == Some(&201) {
                came(&mut keep, [201], Access::Write);
            }
        }
        let stays = gone.iter().filter(|it| hot(page(**it)));
        assert_eq!(stays.collect::<Vec<_>>(), [&201]);
        assert!((0..100).all(|it| hot(page(it)) || gone.contains(&it)));
        assert!(
            (300..420).all(|it| !asked.contains(&it)),
            "of those it says nothing"
        );
        assert_eq!(keep.old.count, 4);
        // Pages that are no longer used are evicted like others.
        let mut rest = std::iter::from_fn(|| keep.next(100, |_| false));
        assert!(rest.any(hot));
    }

    #[test]
    fn a_used_page_is_evicted_if_all_are_used() {
        let mut keep = EvictionPolicy::default();
        (0..40).for_each(|number| keep.adopt(page(number)));
        for goes in 1..=20 {
            let mut turns = 0;
            let next = keep.next(100, |_| {
                turns += 1;
                true
            });
            assert!(next.is_some());
            assert_eq!((turns, keep.owned()), (TURNS_MAX, 40 - goes));
        }
    }

    #[test]
    fn names_of_evicted_pages_are_forgotten() {
        let mut keep = EvictionPolicy::default();
        came(&mut keep, 0..500, Access::Write);
        give(&mut keep, 300);
        assert_eq!((keep.ghosts.len(), keep.remembered.len()), (50, 50));
        // Nor do entries of pages that come and leave.
        for _ in 0..5000 {
            keep.departed(page(450));
            came(&mut keep, [450], Access::Write);
        }
        assert_eq!((keep.young.count, keep.old.count), (200, 0));
        assert!(keep.young.pages.len() <= 400 + VOID_MIN + 1);
    }

    #[test]
    fn pages_that_do_not_leave_are_candidates_again() {
        let mut keep = EvictionPolicy::default();
        came(&mut keep, 0..2, Access::Write);
        assert_eq!(keep.next(100, |_| false), Some(page(0)));
        assert!(keep.knows(page(0)));
        assert_eq!((keep.departing(), keep.owned()), (1, 1));
        keep.reconsider_departing();
        assert_eq!((keep.departing(), keep.owned()), (0, 2));
        assert_eq!(give(&mut keep, 2).len(), 2);
        assert_eq!((keep.take_evicted(), keep.take_evicted()), (2, 0));
    }
}
