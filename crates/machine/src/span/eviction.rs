//! Which pages leave a part that has more than it may keep: copies that others have, too,
//! the oldest first, as these are only dropped; then pages that only this part has, which
//! another part gets.
//!
//! What comes back soon after it was given away is needed here; what is gone through once
//! is not, however much it is (2Q: Johnson and Shasha, "2Q: a low overhead high performance
//! buffer management replacement algorithm", VLDB 1994). Whether a page that was needed
//! still is used is only asked when it is its turn, and one that is gets another (the clock
//! algorithm: Corbató, "A Paging Experiment with the Multics System", 1968). So it is with
//! what was here already when there came to be too much. Of others it would say nothing:
//! each was used when it came.
//!
//! ```text
//!            ┌──────── comes again ◀── ghosts (names of what left) ◀─┐
//!            ▼                                                       │
//!   used ──▶ old ── while young ones are few, and unused ▶ given away│
//!     ▲      └── used ─▶ old                                         │
//!     └────┐                                                         │
//!   was here ─▶ young ── while they are many ────▶ given away ───────┘
//!   comes ─────▶ young
//!   read ──────▶ copies ─────────────────────────▶ dropped
//! ```
//!
//! This module chooses; it has no memory and no clock.

use keel_wasm::coherence::{Access, PageId};
use std::collections::{HashMap, HashSet, VecDeque};

/// Of the pages that only this part has one in so many is young at least, before one that
/// came back goes (2Q's Kin).
const YOUNG_PART: usize = 4;
/// Of the pages that a part may keep, the names of half as many are remembered that left
/// (2Q's Kout).
const GHOSTS_PART: u64 = 2;
/// Pages that get another turn before one goes that is used, too.
const TURNS_MAX: usize = 8;
/// Void places in a line that are let be.
const VOID_MIN: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queue {
    Copies,
    Young,
    /// It was here before. In line with young ones.
    Adopted,
    Old,
}

/// Pages in the order in which they came, also some that left since: `count` have not.
#[derive(Debug, Default)]
struct PageQueue {
    pages: VecDeque<(PageId, u64)>,
    count: usize,
}

/// The pages of a part, as far as they may have to go.
#[derive(Debug, Default)]
pub(super) struct EvictionPolicy {
    /// Number of the last arrival or leave.
    last: u64,
    /// Where each page is, and by which arrival: others of it in line are void.
    at: HashMap<PageId, (Queue, u64)>,
    copies: PageQueue,
    young: PageQueue,
    old: PageQueue,
    /// Pages that left, and by the how-manieth leave.
    ghosts: VecDeque<(PageId, u64)>,
    remembered: HashMap<PageId, u64>,
    /// Chosen to be given away, and still here.
    going: HashSet<PageId>,
    /// Of those, how many left since somebody asked.
    given: u64,
}

impl EvictionPolicy {
    fn line(&mut self, queue: Queue) -> &mut PageQueue {
        match queue {
            Queue::Copies => &mut self.copies,
            Queue::Young | Queue::Adopted => &mut self.young,
            Queue::Old => &mut self.old,
        }
    }

    /// Whether anything is known of a page that is here.
    pub(super) fn knows(&self, page: PageId) -> bool {
        self.at.contains_key(&page) || self.going.contains(&page)
    }

    /// Pages that were chosen and have not left.
    pub(super) fn going(&self) -> usize {
        self.going.len()
    }

    /// Pages that can be given away.
    pub(super) fn owned(&self) -> usize {
        self.young.count + self.old.count
    }

    /// A page is here that was before anything was given away; from now on it is known
    /// whether it is used.
    pub(super) fn is_here(&mut self, page: PageId) {
        self.remove(page);
        self.put(page, Queue::Adopted);
    }

    /// A page has come, or may be written from now on.
    pub(super) fn came(&mut self, page: PageId, access: Access) {
        let is_owned = match self.at.get(&page) {
            Some((Queue::Young | Queue::Adopted | Queue::Old, _)) => true,
            Some((Queue::Copies, _)) | None => false,
        };
        // (It keeps its place in line.)
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
        self.going.remove(&page);
        if let Some((queue, _)) = self.at.remove(&page) {
            self.line(queue).count -= 1;
        }
    }

    /// A page is not here any more.
    pub(super) fn left(&mut self, page: PageId) {
        self.given += u64::from(self.going.contains(&page));
        self.remove(page);
    }

    /// Pages that were chosen and have left since this was asked last.
    pub(super) fn take_given(&mut self) -> u64 {
        std::mem::take(&mut self.given)
    }

    /// The first in line that is still there, which it leaves, and how it stood there.
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

    /// At most so many copies that others have, too, oldest first. Those that cannot be
    /// dropped just now stay, and are asked about later; what is none any more is owned.
    pub(super) fn copies(
        &mut self,
        most: usize,
        is_droppable: impl Fn(PageId) -> bool,
    ) -> Vec<PageId> {
        let mut chosen = Vec::new();
        // Each is asked about once.
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

    /// The next that another part is to get, if there is one; `may_keep` pages are kept
    /// here. `is_used` says whether a page was since it was asked of it last, or it came.
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
            // (Rather one that only came by.)
            goes_young = true;
            self.put(page, Queue::Old);
        };
        self.going.insert(page);
        self.last += 1;
        self.remembered.insert(page, self.last);
        self.ghosts.push_back((page, self.last));
        let most = usize::try_from(may_keep / GHOSTS_PART).unwrap_or(usize::MAX);
        while self.ghosts.len() > most.max(1) {
            // (It may have come back, and left again.)
            if let Some((forgotten, number)) = self.ghosts.pop_front()
                && self.remembered.get(&forgotten) == Some(&number)
            {
                self.remembered.remove(&forgotten);
            }
        }
        Some(page)
    }

    /// What was chosen and did not leave for long can be chosen again.
    pub(super) fn give_up_waiting(&mut self) {
        for page in std::mem::take(&mut self.going) {
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
            keep.came(page(number), access);
        }
    }

    /// So many are given away, and leave.
    fn give(keep: &mut EvictionPolicy, count: usize) -> Vec<u32> {
        let given: Vec<PageId> = (0..count)
            .map_while(|_| keep.next(100, |_| false))
            .collect();
        for page in &given {
            keep.left(*page);
        }
        given.iter().map(|page| page.number).collect()
    }

    #[test]
    fn copies_go_first_and_the_oldest_of_them() {
        let mut keep = EvictionPolicy::default();
        came(&mut keep, 0..4, Access::Write);
        came(&mut keep, 10..16, Access::Read);
        // One is written now, one is gone, one is in use.
        keep.came(page(11), Access::Write);
        keep.left(page(12));
        let dropped = keep.copies(3, |it| it != page(10));
        assert_eq!(dropped, [page(13), page(14), page(15)]);
        assert_eq!(keep.copies(9, |_| true), [page(10)]);
        assert_eq!(keep.copies(9, |_| true), []);
        assert_eq!(give(&mut keep, 9), [0, 1, 2, 3, 11]);
        assert!(give(&mut keep, 9).is_empty());
        assert!(!keep.knows(page(11)));
    }

    /// What is used all the time stays, whatever is gone through once.
    #[test]
    fn what_comes_back_stays() {
        let mut keep = EvictionPolicy::default();
        came(&mut keep, 0..8, Access::Write);
        assert_eq!(give(&mut keep, 4), [0, 1, 2, 3]);
        // They are needed.
        came(&mut keep, 0..4, Access::Write);
        for start in (100..1000).step_by(10) {
            came(&mut keep, start..start + 10, Access::Write);
            let given = give(&mut keep, 10);
            assert!(given.iter().all(|it| *it >= 4), "{given:?}");
        }
        // Not for ever: where nearly all is such, the oldest of them go.
        let given = give(&mut keep, 8);
        assert!(given.contains(&0), "{given:?}");
    }

    /// What is used stays: what was here without that it had to go once, what comes if it
    /// had to.
    #[test]
    fn what_is_used_stays() {
        let mut keep = EvictionPolicy::default();
        (0..100).for_each(|number| keep.is_here(page(number)));
        came(&mut keep, 200..210, Access::Write);
        let hot = |page: PageId| [3, 50, 97, 201].contains(&page.number);
        let mut asked = HashSet::new();
        let mut gone = Vec::new();
        for new in 300..420 {
            let next = keep.next(100, |page| {
                asked.insert(page.number);
                hot(page)
            });
            keep.left(next.unwrap());
            gone.push(next.unwrap().number);
            came(&mut keep, [new], Access::Write);
            // (It is needed at once.)
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
        // What is used no more goes as others.
        let mut rest = std::iter::from_fn(|| keep.next(100, |_| false));
        assert!(rest.any(hot));
    }

    #[test]
    fn where_all_is_used_one_goes_all_the_same() {
        let mut keep = EvictionPolicy::default();
        (0..40).for_each(|number| keep.is_here(page(number)));
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
    fn names_of_what_left_are_forgotten_in_time() {
        let mut keep = EvictionPolicy::default();
        came(&mut keep, 0..500, Access::Write);
        give(&mut keep, 300);
        assert_eq!((keep.ghosts.len(), keep.remembered.len()), (50, 50));
        // Nor do places of pages that come and go.
        for _ in 0..5000 {
            keep.left(page(450));
            came(&mut keep, [450], Access::Write);
        }
        assert_eq!((keep.young.count, keep.old.count), (200, 0));
        assert!(keep.young.pages.len() <= 400 + VOID_MIN + 1);
    }

    #[test]
    fn what_does_not_leave_is_chosen_again() {
        let mut keep = EvictionPolicy::default();
        came(&mut keep, 0..2, Access::Write);
        assert_eq!(keep.next(100, |_| false), Some(page(0)));
        assert!(keep.knows(page(0)));
        assert_eq!((keep.going(), keep.owned()), (1, 1));
        keep.give_up_waiting();
        assert_eq!((keep.going(), keep.owned()), (0, 2));
        assert_eq!(give(&mut keep, 2).len(), 2);
        assert_eq!((keep.take_given(), keep.take_given()), (2, 0));
    }
}
