//! An ordered map from pages to values. Pages are mostly contiguous, so the map groups 64 pages in
//! a row and 64 rows in a block (16 MiB of memory): the tree holds one entry per 4096 pages.

use super::PageId;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::RangeInclusive;

/// Pages per row, and rows per block.
const SLOTS: u32 = u64::BITS;
const BLOCK: u32 = SLOTS * SLOTS;

/// A sparse array of 64 values with an occupancy bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Slots<T> {
    present: u64,
    /// Present values, in order of index.
    values: Vec<T>,
}

impl<T> Slots<T> {
    fn new() -> Self {
        Slots {
            present: 0,
            values: Vec::new(),
        }
    }

    fn is_empty(&self) -> bool {
        self.present == 0
    }

    fn has(&self, at: u32) -> bool {
        self.present & 1 << at != 0
    }

    /// Position of a value in `values`.
    fn index(&self, at: u32) -> usize {
        (self.present & ((1 << at) - 1)).count_ones() as usize
    }

    fn get(&self, at: u32) -> Option<&T> {
        self.has(at).then(|| self.values.get(self.index(at)))?
    }

    fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        let index = self.has(at).then(|| self.index(at))?;
        self.values.get_mut(index)
    }

    fn or_insert_with(&mut self, at: u32, make: impl FnOnce() -> T) -> &mut T {
        let index = self.index(at);
        if !self.has(at) {
            self.present |= 1 << at;
            self.values.insert(index, make());
        }
        &mut self.values[index]
    }

    fn remove(&mut self, at: u32) -> Option<T> {
        let index = self.has(at).then(|| self.index(at))?;
        self.present &= !(1 << at);
        Some(self.values.remove(index))
    }

    fn numbers(&self) -> impl Iterator<Item = u32> + use<T> {
        let present = self.present;
        (0..SLOTS).filter(move |at| present & 1 << at != 0)
    }

    fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.numbers().zip(&self.values)
    }

    /// Retains the values for which `keeps` returns true, in order.
    fn retain(&mut self, mut keeps: impl FnMut(u32, &mut T) -> bool) {
        let (mut numbers, mut left) = (self.numbers(), self.present);
        self.values.retain_mut(|value| {
            let Some(at) = numbers.next() else {
                return true;
            };
            let stays = keeps(at, value);
            if !stays {
                left &= !(1 << at);
            }
            stays
        });
        self.present = left;
    }
}

/// Memory and index of the block.
type BlockKey = (u32, u32);

/// The block of a page, its row, and its index in the row.
fn place(page: PageId) -> (BlockKey, u32, u32) {
    let key = (page.memory, page.number / BLOCK);
    (key, page.number % BLOCK / SLOTS, page.number % SLOTS)
}

fn page_at((memory, block): BlockKey, row: u32, at: u32) -> PageId {
    let number = block * BLOCK + row * SLOTS + at;
    PageId { memory, number }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct PageMap<T> {
    /// Neither a block nor a row is empty.
    blocks: BTreeMap<BlockKey, Slots<Slots<T>>>,
}

impl<T> Default for PageMap<T> {
    fn default() -> Self {
        PageMap {
            blocks: BTreeMap::new(),
        }
    }
}

impl<T> FromIterator<(PageId, T)> for PageMap<T> {
    fn from_iter<I: IntoIterator<Item = (PageId, T)>>(pages: I) -> Self {
        let mut map = PageMap::default();
        for (page, value) in pages {
            map.insert(page, value);
        }
        map
    }
}

impl<T> PageMap<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    pub(super) fn get(&self, page: PageId) -> Option<&T> {
        let (key, row, at) = place(page);
        self.blocks.get(&key)?.get(row)?.get(at)
    }

    pub(super) fn get_mut(&mut self, page: PageId) -> Option<&mut T> {
        let (key, row, at) = place(page);
        self.blocks.get_mut(&key)?.get_mut(row)?.get_mut(at)
    }

    /// The value, inserted if absent.
    pub(super) fn or_insert_with(&mut self, page: PageId, make: impl FnOnce() -> T) -> &mut T {
        let (key, row, at) = place(page);
        let block = self.blocks.entry(key).or_insert_with(Slots::new);
        let row = block.or_insert_with(row, Slots::new);
        row.or_insert_with(at, make)
    }

    pub(super) fn insert(&mut self, page: PageId, value: T) -> Option<T> {
        let (key, row, at) = place(page);
        let block = self.blocks.entry(key).or_insert_with(Slots::new);
        let row = block.or_insert_with(row, Slots::new);
        if let Some(old) = row.get_mut(at) {
            return Some(std::mem::replace(old, value));
        }
        row.or_insert_with(at, || value);
        None
    }

    pub(super) fn remove(&mut self, page: PageId) -> Option<T> {
        let (key, number, at) = place(page);
        let Entry::Occupied(mut block) = self.blocks.entry(key) else {
            return None;
        };
        let row = block.get_mut().get_mut(number)?;
        let value = row.remove(at)?;
        if row.is_empty() {
            block.get_mut().remove(number);
            if block.get().is_empty() {
                block.remove();
            }
        }
        Some(value)
    }

    /// Removes and returns the values of a range, in order.
    pub(super) fn take(&mut self, range: RangeInclusive<PageId>) -> Vec<(PageId, T)> {
        let pages: Vec<PageId> = self.range(range).map(|(page, _)| page).collect();
        let values = pages.into_iter().map(|page| (page, self.remove(page)));
        values
            .filter_map(|(page, value)| Some((page, value?)))
            .collect()
    }

    /// All values, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (PageId, &T)> {
        self.blocks.iter().flat_map(|(key, block)| {
            let rows = block.iter();
            rows.flat_map(move |(row, values)| {
                let values = values.iter();
                values.map(move |(at, value)| (page_at(*key, row, at), value))
            })
        })
    }

    /// The values of a range, in order.
    pub(super) fn range(
        &self,
        range: RangeInclusive<PageId>,
    ) -> impl Iterator<Item = (PageId, &T)> {
        let (start, end) = range.into_inner();
        let (first, last) = (place(start).0, place(end).0);
        // (An inverted range is empty.)
        let blocks = self.blocks.range(first..=last.max(first));
        let rows = blocks.flat_map(|(key, block)| block.iter().map(|(row, it)| (*key, row, it)));
        let within = rows.filter(move |(key, row, _)| {
            page_at(*key, *row, SLOTS - 1) >= start && page_at(*key, *row, 0) <= end
        });
        let pages = within.flat_map(|(key, row, values)| {
            let values = values.iter();
            values.map(move |(at, value)| (page_at(key, row, at), value))
        });
        pages.filter(move |(page, _)| (start..=end).contains(page))
    }

    /// Retains the values for which `keeps` returns true, in order.
    pub(super) fn retain(&mut self, mut keeps: impl FnMut(PageId, &mut T) -> bool) {
        self.blocks.retain(|key, block| {
            block.retain(|row, values| {
                values.retain(|at, value| keeps(page_at(*key, row, at), value));
                !values.is_empty()
            });
            !block.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    /// Equivalent to the standard map, in any order of operations.
    #[test]
    fn it_is_a_map() {
        for seed in 0..20 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut ours, mut theirs) = (PageMap::default(), BTreeMap::new());
            for step in 0..2000u32 {
                let page = PageId {
                    memory: rng.random_range(0..2),
                    number: match rng.random_range(0..9) {
                        0 => u32::MAX - rng.random_range(0..70),
                        1 => BLOCK - 80 + rng.random_range(0..160),
                        _ => rng.random_range(0..200),
                    },
                };
                match rng.random_range(0..6) {
                    0 | 1 => assert_eq!(ours.insert(page, step), theirs.insert(page, step)),
                    2 => {
                        *ours.or_insert_with(page, || step) += 1;
                        *theirs.entry(page).or_insert(step) += 1;
                    }
                    3 => assert_eq!(ours.remove(page), theirs.remove(&page)),
                    4 => assert_eq!(ours.get_mut(page), theirs.get_mut(&page)),
                    _ => assert_eq!(ours.get(page), theirs.get(&page)),
                }
                if step % 500 == 499 {
                    let odd = |value: &u32| value % 3 != 1;
                    let (mut asked, mut expected) = (Vec::new(), Vec::new());
                    ours.retain(|page, value| {
                        asked.push(page);
                        odd(value)
                    });
                    theirs.retain(|page, value| {
                        expected.push(*page);
                        odd(value)
                    });
                    assert_eq!(asked, expected);
                }
            }
            let all: Vec<_> = theirs.iter().map(|(page, value)| (*page, value)).collect();
            assert_eq!(ours.iter().collect::<Vec<_>>(), all);
            assert_eq!(theirs.clone().into_iter().collect::<PageMap<_>>(), ours);
            let page = |number| PageId { memory: 1, number };
            for (first, last) in [
                (0, 63),
                (63, 64),
                (70, 70),
                (5, u32::MAX),
                (9, 3),
                (BLOCK - 1, BLOCK),
                (BLOCK, BLOCK + 63),
            ] {
                let range = page(first)..=page(last);
                let expected: Vec<_> = all
                    .iter()
                    .copied()
                    .filter(|(page, _)| range.contains(page))
                    .collect();
                assert_eq!(ours.range(range).collect::<Vec<_>>(), expected);
            }
            let (first, last) = (page(30), page(100));
            let mut rest = ours.clone();
            let taken = rest.take(first..=last);
            assert!(!taken.is_empty());
            let (inside, outside): (Vec<_>, Vec<_>) = theirs
                .clone()
                .into_iter()
                .partition(|(page, _)| (first..=last).contains(page));
            assert_eq!(taken, inside);
            assert_eq!(rest, outside.into_iter().collect::<PageMap<_>>());
            let mut again = PageMap::default();
            for (page, value) in all.iter().rev() {
                again.insert(*page, **value);
            }
            assert_eq!(again, ours);
            theirs.keys().for_each(|page| {
                assert!(again.remove(*page).is_some());
            });
            assert_eq!(again, PageMap::default());
        }
    }
}
